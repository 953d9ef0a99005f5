//! Installs the Debian packages that a step needs and the machine lacks. Called at the start of image, test and demo.
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tool::{self, say};

/// What the agent itself runs.
pub(crate) const PRODUCT: &[&str] =
    &["qemu-system-x86", "qemu-utils", "ovmf", "passt", "nftables", "openssh-client"];

/// What builds the guest image.
pub(crate) const IMAGE: &[&str] = &[
    "mmdebstrap",
    "e2fsprogs",
    "dosfstools",
    "mtools",
    "fdisk",
    "grub-efi-amd64-bin",
    "grub-common",
    "qemu-utils",
];

/// What the lab runs outside its server.
pub(crate) const LAB: &[&str] =
    &["qemu-system-x86", "qemu-utils", "ovmf", "e2fsprogs", "openssh-client", "util-linux"];

/// What makes and judges a release.
pub(crate) const DIST: &[&str] = &["binutils", "gzip", "lintian", "openssl", "shellcheck"];

/// What makes the trees that a release is tried in.
pub(crate) const PROVE: &[&str] = &["mmdebstrap", "debian-archive-keyring"];

/// What only the tests run.
pub(crate) const TESTS: &[&str] =
    &["xorriso", "shellcheck", "gpg", "gpg-agent", "gpgv", "curl", "e2fsprogs", "fdisk"];

/// Makes sure that every package of `sets` is installed.
pub(crate) fn ensure(sets: &[&[&str]]) -> Result<()> {
    let wanted: BTreeSet<&str> = sets.iter().flat_map(|set| set.iter().copied()).collect();
    if !Path::new("/usr/bin/dpkg-query").exists() || !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "this machine is not Debian-like (no dpkg-query and apt-get); install the counterparts of these packages yourself: {}",
            wanted.into_iter().collect::<Vec<_>>().join(" ")
        );
    }
    let missing = plan_missing(&wanted, &installed(&wanted)?);
    if missing.is_empty() {
        return Ok(());
    }
    say(format!("installing {}", missing.join(" ")));
    apt(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    apt(&install)
}

fn plan_missing<'a>(wanted: &BTreeSet<&'a str>, installed: &BTreeSet<String>) -> Vec<&'a str> {
    wanted.iter().copied().filter(|name| !installed.contains(*name)).collect()
}

fn installed(wanted: &BTreeSet<&str>) -> Result<BTreeSet<String>> {
    let answer = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(wanted)
        // An unknown name makes the exit status 1; what it does know is printed all the same.
        .output()
        .context("cannot start dpkg-query")?;
    Ok(read_installed(&String::from_utf8_lossy(&answer.stdout)))
}

fn read_installed(answer: &str) -> BTreeSet<String> {
    answer
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, status)| *status == "installed")
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn apt(args: &[&str]) -> Result<()> {
    let mut command = tool::privileged("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=120"]);
    tool::run_visibly(command.args(args))
        .context("the packages are needed; install them yourself or run this again as root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_installed_state_counts() {
        let installed = read_installed("passt installed\nqemu-utils config-files\novmf not-installed\n");
        let wanted = BTreeSet::from(["passt", "qemu-utils", "ovmf", "never-heard-of"]);
        assert_eq!(plan_missing(&wanted, &installed), ["never-heard-of", "ovmf", "qemu-utils"]);
    }
}
