//! `cargo xtask dist`: a release of the agent, ready to be put on a web server. Called by main; docs/release.md tells its
//! owner.
//!
//! ```text
//! release binary, frpc, packaging/ ──▶ tree ──▶ control (elf: libraries, glibc floor) ──▶ dpkg-deb ──▶ lintian
//! <out>/qudata-agent_<version>_amd64.deb
//! <out>/SHA256SUMS, SHA256SUMS.sig       of the package and install.sh, by the release key
//! <out>/install.sh                       with the public half of that key
//! ```
//! The same commit with the same binaries gives the same package, byte for byte.
mod changelog;
mod control;
mod elf;
mod licences;
mod prove;
mod sign;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::tool::{self, say};
use crate::{cargo, deps, frp};

/// Name of the package and of the program in it.
const NAME: &str = "qudata-agent";
/// What the release carries beside the package.
const SUMS: &str = "SHA256SUMS";
const SIGNATURE: &str = "SHA256SUMS.sig";
const INSTALLER: &str = "install.sh";

/// What is released, and where to.
#[derive(Debug, Default, Args)]
pub(crate) struct Dist {
    /// Folder of the release [default: dist in cargo's target folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where the folder will be found: https, file, or http on a loopback address. install.sh fetches from there; without
    /// it install.sh asks for QUDATA_RELEASE_URL
    #[arg(long, value_name = "URL", value_parser = sign::release_url)]
    release_url: Option<String>,
    /// Private Ed25519 key (PEM) that signs; without it a key is made for this one release and thrown away
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// The agent, already built [default: built here]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Do not let lintian judge the package
    #[arg(long)]
    no_lint: bool,
    /// Install, upgrade, remove and purge the package in fresh trees of Debian 12 and 13
    #[arg(long)]
    prove: bool,
}

/// Facts that are the same for every part of one release.
#[derive(Debug)]
struct Release {
    /// As Debian writes it: a pre-release sorts before its release.
    version: String,
    /// Time of the commit, in seconds since 1970: the date of everything in the package.
    epoch: String,
}

impl Release {
    fn now() -> Result<Self> {
        let version = env!("CARGO_PKG_VERSION").replacen('-', "~", 1);
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(epoch) => epoch,
            Err(_) => tool::output(
                Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(cargo::root()),
            )
            .context("the time of the commit dates the package; outside git set SOURCE_DATE_EPOCH")?,
        };
        let epoch = epoch.trim().to_owned();
        if epoch.is_empty() || !epoch.bytes().all(|byte| byte.is_ascii_digit()) {
            bail!("SOURCE_DATE_EPOCH is {epoch:?}; it must be seconds since 1970");
        }
        Ok(Self { version, epoch })
    }

    fn package(&self) -> String {
        format!("{NAME}_{}_amd64.deb", self.version)
    }
}

/// Makes the release; its folder is the last line on stdout.
pub(crate) fn run(wish: &Dist) -> Result<ExitCode> {
    println!("{}", make(wish)?.display());
    Ok(ExitCode::SUCCESS)
}

/// A release of this agent for the lab: nobody judges it, nobody's key signs it.
pub(crate) fn for_lab(binary: PathBuf) -> Result<PathBuf> {
    let out = Some(cargo::target_directory()?.join("dist"));
    make(&Dist { out, binary: Some(binary), no_lint: true, ..Dist::default() })
}

fn make(wish: &Dist) -> Result<PathBuf> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("a release is made on x86-64, because it runs the agent it packs");
    }
    deps::ensure(&[deps::DIST])?;
    let release = Release::now()?;
    let binary = match &wish.binary {
        Some(binary) => binary.clone(),
        None => cargo::build_agent(true)?,
    };
    let out = match &wish.out {
        Some(out) => out.clone(),
        None => cargo::target_directory()?.join("dist"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let work = tempfile::Builder::new()
        .prefix(".making-")
        .tempdir_in(&out)
        .with_context(|| format!("cannot make a folder in {}", out.display()))?;
    let package = build(&release, &binary, work.path())?;
    if !wish.no_lint {
        lint(&package)?;
    }
    if wish.prove {
        prove::run(&package)?;
    }
    sign::seal(work.path(), &release.package(), wish.signing_key.as_deref(), wish.release_url.as_deref())?;
    publish(work.path(), &out, &release.package())?;
    Ok(out)
}

/// The package, in `work`.
fn build(release: &Release, binary: &Path, work: &Path) -> Result<PathBuf> {
    let said = tool::output(Command::new(binary).arg("--version"))?;
    if said.trim() != format!("{NAME} {}", env!("CARGO_PKG_VERSION")) {
        bail!(
            "{} says it is {:?}; this is the source of {}",
            binary.display(),
            said.trim(),
            env!("CARGO_PKG_VERSION")
        );
    }
    let root = work.join("root");
    tree::lay_out(&root, &tree::Parts { release, binary, frpc: &frp::need()?.frpc })?;
    control::write(&root, release)?;
    let package = work.join(release.package());
    // xz, because dpkg of Debian 12 and Ubuntu 22.04 both read it; one thread, because the count shows in the result.
    tool::run(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", "--build"])
            .arg(&root)
            .arg(&package)
            .env("SOURCE_DATE_EPOCH", &release.epoch)
            .env("DPKG_DEB_THREADS_MAX", "1"),
    )?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    Ok(package)
}

/// Fails on what shellcheck says of our scripts, and on what lintian calls an error or a warning in the package; shows
/// everything they say.
fn lint(package: &Path) -> Result<()> {
    say("shellcheck and lintian");
    check_scripts()?;
    tool::run_visibly(
        Command::new("lintian")
            .args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0", "--info"])
            .args(["--profile", "debian"])
            .arg(package),
    )
    .context("lintian finds fault with the package")
}

fn check_scripts() -> Result<()> {
    let packaging = cargo::root().join("packaging");
    let scripts = ["postinst", "prerm", "postrm", "config", "prove.sh"];
    let mut shellcheck = Command::new("shellcheck");
    // Not what debconf brings: it is on the server, not here.
    shellcheck.args(["--exclude=SC1091", "--color=never"]).arg(packaging.join(INSTALLER));
    shellcheck.args(scripts.map(|name| packaging.join("deb").join(name)));
    tool::run_visibly(&mut shellcheck).context("shellcheck finds fault with a script")
}

/// Moves what was made into the release's folder, and an older package out of it: a release is one package.
fn publish(work: &Path, out: &Path, package: &str) -> Result<()> {
    for entry in fs::read_dir(out).with_context(|| format!("cannot list {}", out.display()))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(&format!("{NAME}_")) && name.ends_with("_amd64.deb") && name != package {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    for name in [package, SIGNATURE, SUMS, INSTALLER] {
        fs::rename(work.join(name), out.join(name))
            .with_context(|| format!("cannot put {name} in its place"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shellcheck_has_nothing_to_say() {
        check_scripts().unwrap();
    }

    #[test]
    fn an_older_package_leaves_and_what_is_not_ours_stays() {
        let (work, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["qudata-agent_2.0.0_amd64.deb", SUMS, SIGNATURE, INSTALLER] {
            fs::write(work.path().join(name), name).unwrap();
        }
        for name in ["qudata-agent_1.0.0_amd64.deb", SUMS, "notes.txt"] {
            fs::write(out.path().join(name), "old").unwrap();
        }
        publish(work.path(), out.path(), "qudata-agent_2.0.0_amd64.deb").unwrap();
        let mut names: Vec<_> = fs::read_dir(out.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [SUMS, SIGNATURE, INSTALLER, "notes.txt", "qudata-agent_2.0.0_amd64.deb"]);
        assert_eq!(fs::read_to_string(out.path().join(SUMS)).unwrap(), SUMS);
    }
}
