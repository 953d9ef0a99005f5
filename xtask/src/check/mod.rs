//! `cargo xtask check`: everything about the source that a machine can judge without running it. Called by main.
//! All rules run even after one has failed, so that one run shows everything.
mod deny;
mod rooms;
mod size;

use anyhow::Result;

use crate::cargo::cargo;
use crate::tool::{self, say};

/// One rule, and what to do when it is broken.
struct Rule {
    name: &'static str,
    check: fn() -> Result<()>,
    remedy: &'static str,
}

const RULES: &[Rule] = &[
    Rule { name: "format", check: format, remedy: "run `cargo fmt --all`" },
    Rule {
        name: "dependencies",
        check: rooms::check,
        remedy: "move the code to the crate that may know both sides, or pass the value in; the rooms are in ARCHITECTURE.md",
    },
    Rule {
        name: "size",
        check: size::check,
        remedy: "split the file: one subject each, named by its first line",
    },
    Rule {
        name: "clippy",
        check: clippy,
        remedy: "fix what it names; an exception is `#[expect(lint, reason = \"…\")]` at the smallest scope",
    },
    Rule { name: "docs", check: docs, remedy: "fix the links and the missing sentences it names" },
    Rule {
        name: "deny",
        check: deny::check,
        remedy: "choose another crate or version, or add an exception with its reason to deny.toml",
    },
];

/// Runs every rule; true when all hold.
pub(crate) fn run() -> bool {
    let mut broken = Vec::new();
    for rule in RULES {
        say(format!("check {}", rule.name));
        if let Err(error) = (rule.check)() {
            broken.push((rule, error));
        }
    }
    for (rule, error) in &broken {
        eprintln!("\n{} failed: {error:#}\n  to do: {}", rule.name, rule.remedy);
    }
    println!("{} rules hold, {} broken", RULES.len() - broken.len(), broken.len());
    broken.is_empty()
}

fn format() -> Result<()> {
    tool::run_visibly(cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    tool::run_visibly(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}

fn docs() -> Result<()> {
    tool::run_visibly(cargo().env("RUSTDOCFLAGS", "--deny warnings").args([
        "doc",
        "--workspace",
        "--no-deps",
    ]))
}
