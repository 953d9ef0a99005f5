//! frp from its source, by the Go toolchain: a tool module in xtask/frp names the version and the checksums of every
//! module that goes in. Called by the parent module.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{Maker, VERSION};
use crate::cargo;
use crate::tool::{self, say};

/// Without the dashboards, which are built by other tools first; without paths of this machine.
const FLAGS: &[&str] = &["-tags", "noweb", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w"];
/// The programs, as packages.
const PACKAGES: &[&str] = &["github.com/fatedier/frp/cmd/frps", "github.com/fatedier/frp/cmd/frpc"];

/// Builds with `go`.
pub(super) fn maker() -> Result<Maker> {
    let module = cargo::root().join("xtask").join("frp");
    Ok(Maker {
        source: format!("{VERSION} built from source by Go"),
        name: format!("{VERSION}-{}", recipe(&module)?),
        make: Box::new(move |work| make(work, &module)),
    })
}

/// Hash of everything that decides what comes out, but for the toolchain.
fn recipe(module: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"].map(|name| module.join(name)) {
        hash.update(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    for word in FLAGS.iter().chain(PACKAGES).chain(&[std::env::consts::ARCH]) {
        hash.update(word);
        hash.update([0]);
    }
    Ok(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

fn make(work: &Path, module: &Path) -> Result<()> {
    tool::run(Command::new("go").arg("version")).context("there is no Go toolchain")?;
    say(format!("building frps and frpc {VERSION} (a few minutes, once)"));
    let mut to = work.as_os_str().to_owned();
    // With the slash, Go puts one file for each package into the directory.
    to.push("/");
    let mut go = Command::new("go");
    go.arg("build")
        .args(FLAGS)
        .arg("-o")
        .arg(PathBuf::from(to))
        .args(PACKAGES)
        .current_dir(module)
        // Nothing but what go.mod and go.sum say, and no C library of this machine.
        .env("GOFLAGS", "-mod=readonly")
        .env("GOWORK", "off")
        .env("CGO_ENABLED", "0");
    tool::run_visibly(&mut go).context("frp does not build")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_names_the_version_and_the_replaced_yamux() {
        let module = cargo::root().join("xtask").join("frp");
        let text = fs::read_to_string(module.join("go.mod")).unwrap();
        assert!(text.contains(&format!("github.com/fatedier/frp v{VERSION}")), "{text}");
        assert!(text.contains("replace github.com/hashicorp/yamux => github.com/fatedier/yamux "), "{text}");
        assert_eq!(recipe(&module).unwrap().len(), 16);
    }
}
