//! Licences, sources and doubled versions of dependencies, by cargo-deny, without the network. Called by the parent module.
use anyhow::{Context, Result};

use crate::cargo::cargo;
use crate::tool::{self, say};

pub(super) fn check() -> Result<()> {
    if tool::output(cargo().args(["deny", "--version"])).is_err() {
        say("cargo-deny is missing; installing it (builds for some minutes, once)");
        tool::run_visibly(cargo().args(["install", "cargo-deny", "--locked"])).context(
            "cargo-deny could not be installed; `cargo install cargo-deny --locked` by hand shows why",
        )?;
    }
    // Advisories need a download; the other three need only what cargo has fetched already.
    tool::run_visibly(cargo().args([
        "deny",
        "--offline",
        "--workspace",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))
}
