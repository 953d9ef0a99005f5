//! Calls to cargo that several commands need: what the workspace consists of, and building the agent.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::tool;

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// cargo as it called us, in the root of the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// `cargo metadata` of our own packages.
pub(crate) fn metadata() -> Result<Value> {
    let text = tool::output(cargo().args(["metadata", "--no-deps", "--format-version=1", "--offline"]))?;
    serde_json::from_str(&text).context("cargo metadata answered no JSON")
}

/// Builds the agent and returns the binary.
pub(crate) fn build_agent(release: bool) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--package", "qudata-agent"]);
    if release {
        build.arg("--release");
    }
    tool::run_visibly(&mut build).context("the agent does not build")?;
    agent(release)
}

/// Builds a test of a package, with the examples it starts, and returns its binary.
pub(crate) fn build_test(package: &str, test: &str) -> Result<PathBuf> {
    tool::run_visibly(cargo().args(["build", "--package", package, "--examples"]))?;
    let mut build = cargo();
    build.args(["test", "--package", package, "--test", test, "--no-run", "--message-format=json"]);
    let told = tool::output(&mut build).with_context(|| format!("the test {test} does not build"))?;
    let artifacts = told.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = |artifact: Value| artifact.get("executable").and_then(Value::as_str).map(PathBuf::from);
    artifacts
        .filter_map(executable)
        .next_back()
        .with_context(|| format!("cargo told no binary of the test {test}"))
}

/// Where cargo puts the agent's binary.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    Ok(target_directory()?.join(if release { "release" } else { "debug" }).join("qudata-agent"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = metadata()?;
    let target = metadata.get("target_directory").and_then(Value::as_str);
    target.map(PathBuf::from).context("cargo metadata names no target directory")
}
