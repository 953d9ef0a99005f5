//! The package in trees of the systems it is for: dependencies found, installed, upgraded, removed, purged. Called by the
//! parent module for `--prove`. Each tree is made for this and thrown away by mmdebstrap.
use std::path::Path;

use anyhow::{Context, Result};

use crate::tool::{self, say};
use crate::{cargo, deps};

/// The Debian releases that are served. (Ubuntu's differ in package names, which packaging/deb/control respects, and in
/// glibc, which `elf` judges.)
const RELEASES: &[&str] = &["bookworm", "trixie"];
/// What every server has and a bare tree has not.
const USUAL: &str = "--include=systemd,debconf,init-system-helpers,ca-certificates";

/// Fails at the first thing that is not as it should be.
pub(super) fn run(package: &Path) -> Result<()> {
    deps::ensure(&[deps::PROVE])?;
    let story = cargo::root().join("packaging").join("deb").join("prove.sh");
    for release in RELEASES {
        say(format!("the package in a fresh tree of {release}"));
        let copy =
            |from: &Path, to: &str| format!("--customize-hook=upload {:?} {to}", from.display().to_string());
        let mut tree = tool::privileged("mmdebstrap");
        tree.args(["--variant=apt", "--format=null", "--quiet", USUAL])
            .arg(copy(package, "/var/tmp/package.deb"))
            .arg(copy(&story, "/var/tmp/prove.sh"))
            .arg(r#"--customize-hook=chroot "$1" sh /var/tmp/prove.sh /var/tmp/package.deb"#)
            .args([release, "/dev/null"]);
        tool::run_visibly(&mut tree)
            .with_context(|| format!("the package does not do what it should in {release}"))?;
    }
    Ok(())
}
