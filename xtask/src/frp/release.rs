//! frp as its authors released it: downloaded once, and taken only if it is the archive whose checksum is written here.
//! Called by the parent module.
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::{Maker, VERSION};
use crate::tool::{self, say};

/// SHA-256 of `frp_<VERSION>_linux_<arch>.tar.gz`, from `frp_sha256_checksums.txt` of the release.
const ARCHIVES: &[(&str, &str, &str)] = &[
    ("x86_64", "amd64", "333da23d1b9009d7c01638e9ba38cf4600f7d37d393f854e96ee1396adefa9a6"),
    ("aarch64", "arm64", "3990f396a9a490ee7f0e5f355287750ed41520064ed999eab443b5e9a78d773d"),
];

/// Downloads and unpacks.
pub(super) fn maker() -> Result<Maker> {
    let machine = std::env::consts::ARCH;
    let Some(&(_, arch, sha256)) = ARCHIVES.iter().find(|(name, _, _)| *name == machine) else {
        bail!("no release of frp is pinned for {machine}");
    };
    let stem = format!("frp_{VERSION}_linux_{arch}");
    Ok(Maker {
        source: format!("release {VERSION} of github.com/fatedier/frp"),
        name: format!("{VERSION}-{}", sha256.get(..16).unwrap_or(sha256)),
        make: Box::new(move |work| make(work, &stem, sha256)),
    })
}

fn make(work: &Path, stem: &str, sha256: &str) -> Result<()> {
    let archive = work.join("archive.tar.gz");
    let url = format!("https://github.com/fatedier/frp/releases/download/v{VERSION}/{stem}.tar.gz");
    say(format!("downloading {stem}.tar.gz (once)"));
    let mut curl = Command::new("curl");
    curl.args(["--fail", "--silent", "--show-error", "--location", "--proto", "=https"])
        .args(["--proto-redir", "=https", "--connect-timeout", "10", "--max-time", "300", "--output"])
        .arg(&archive)
        .arg(&url);
    tool::run(&mut curl).context("the release cannot be downloaded")?;
    verify(&archive, sha256)?;
    unpack(&archive, stem, work)
}

/// The two programs out of the archive, and the archive away.
fn unpack(archive: &Path, stem: &str, work: &Path) -> Result<()> {
    let members = ["frps", "frpc"].map(|name| format!("{stem}/{name}"));
    tool::run(
        Command::new("tar")
            .args(["--extract", "--gzip", "--strip-components=1", "--no-same-owner", "--file"])
            .arg(archive)
            .arg("--directory")
            .arg(work)
            .args(members),
    )?;
    fs::remove_file(archive).context("cannot remove the archive")
}

/// Refuses anything but the archive that was pinned.
fn verify(archive: &Path, sha256: &str) -> Result<()> {
    let bytes = fs::read(archive).context("the download left no file")?;
    let found = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if found != sha256 {
        bail!("the download is not what was released: its SHA-256 is {found}, expected {sha256}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_archive_is_taken() {
        let file = std::env::temp_dir().join(format!("xtask-release-{}", std::process::id()));
        fs::write(&file, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let (same, other) = (verify(&file, abc), verify(&file, ARCHIVES[0].2));
        fs::remove_file(&file).unwrap();
        same.unwrap();
        assert!(other.unwrap_err().to_string().contains(abc));
    }

    #[test]
    fn the_two_programs_come_out_and_nothing_else() {
        let work = std::env::temp_dir().join(format!("xtask-unpack-{}", std::process::id()));
        let inside = work.join("frp_x");
        fs::create_dir_all(&inside).unwrap();
        for name in ["frps", "frpc", "LICENSE"] {
            fs::write(inside.join(name), name).unwrap();
        }
        let archive = work.join("archive.tar.gz");
        let mut tar = Command::new("tar");
        tar.arg("--create")
            .arg("--gzip")
            .arg("--file")
            .arg(&archive)
            .arg("--directory")
            .arg(&work)
            .arg("frp_x");
        tool::run(&mut tar).unwrap();
        fs::remove_dir_all(&inside).unwrap();
        unpack(&archive, "frp_x", &work).unwrap();
        let mut names: Vec<_> = fs::read_dir(&work).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        fs::remove_dir_all(&work).unwrap();
        assert_eq!(names, ["frpc", "frps"]);
    }

    #[test]
    fn the_pins_are_checksums() {
        for (_, _, sha256) in ARCHIVES {
            assert!(sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit()), "{sha256}");
        }
    }
}
