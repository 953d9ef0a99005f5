//! `cargo xtask lab`: the scenarios that need a GPU server of their own, in a virtual one. Builds what the lab takes (agent,
//! lab, two images) and runs it. Called by main and by `cargo xtask test`.
//!
//! ```text
//! this machine ── QEMU, emulation ──▶ the server (Linux, systemd, VFIO, an emulated IOMMU, GPU stand-ins)
//!                                      └── QEMU, nested KVM ──▶ a tenant's guest
//! ```
use std::num::NonZero;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo::{self, cargo};
use crate::tool;
use crate::{deps, dist, frp, image};

/// RAM that the server and QEMU around it take.
const NEEDED_MIB: u64 = 7 * 1024;

/// What of the lab to run.
#[derive(Debug, Default, Args)]
pub(crate) struct Lab {
    /// Scenarios by name, or by a part of their names; all without
    names: Vec<String>,
    /// Start the server, install the agent, and open a shell there instead of running scenarios
    #[arg(long)]
    shell: bool,
    /// Leave the server running after the first failure and say how to get in
    #[arg(long)]
    keep: bool,
    /// Leave out what takes long, as `cargo xtask test` does
    #[arg(long)]
    brief: bool,
    /// How many servers run at a time; as many as processors and memory carry without
    #[arg(long, value_name = "N")]
    servers: Option<NonZero<usize>>,
    /// List the scenarios
    #[arg(long)]
    list: bool,
}

impl Lab {
    /// What belongs to every run of the tests.
    pub(crate) fn brief() -> Self {
        Self { brief: true, ..Self::default() }
    }
}

/// Why the lab cannot run on this machine, as the end of a sentence.
pub(crate) fn obstacle() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some(format!("its server is an x86_64 machine and this one is {}", std::env::consts::ARCH));
    }
    match free_mib() {
        Some(free) if free < NEEDED_MIB => {
            Some(format!("it needs {NEEDED_MIB} MiB of free RAM and {free} MiB are there"))
        }
        _ => None,
    }
}

fn free_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

/// The command that runs the lab, with everything built that it needs.
pub(crate) fn command(wish: &Lab) -> Result<Command> {
    deps::ensure(&[deps::LAB])?;
    let mut command = Command::new(built("qudata-lab")?);
    if wish.list {
        command.arg("--list");
        return Ok(command);
    }
    let agent = cargo::build_agent(true)?;
    command.arg("--outside").arg(built("qudata-lab-outside")?);
    command.arg("--agent").arg(&agent);
    command.arg("--probe").arg(built("qudata-lab-probe")?);
    command.arg("--systemd-tests").arg(cargo::build_test("qudata-host", "systemd")?);
    command.arg("--host-image").arg(image::ensure_host()?);
    // Made only where a scenario may ask for them.
    let installs = !wish.brief || !wish.names.is_empty();
    if installs {
        command.arg("--fresh-image").arg(image::ensure_fresh()?);
    }
    command.arg("--guest-image").arg(image::ensure()?.guest);
    command.arg("--packaging").arg(cargo::root().join("packaging"));
    if let Some(frp) = frp::search()?.found() {
        command.arg("--frp").arg(&frp.frps).arg(&frp.frpc);
        if installs {
            command.arg("--dist").arg(dist::for_lab(agent)?);
        }
    }
    command.arg("--logs").arg(cargo::target_directory()?.join("lab"));
    for (wanted, flag) in [(wish.shell, "--shell"), (wish.keep, "--keep"), (wish.brief, "--brief")] {
        if wanted {
            command.arg(flag);
        }
    }
    if let Some(servers) = wish.servers {
        command.arg("--servers").arg(servers.to_string());
    }
    command.args(&wish.names);
    Ok(command)
}

/// Builds the lab and returns one of its binaries.
fn built(binary: &str) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "qudata-lab", "--bin", binary]);
    tool::run_visibly(&mut build).context("the lab does not build")?;
    Ok(cargo::target_directory()?.join("release").join(binary))
}

/// Runs it; true when every scenario passed.
pub(crate) fn run(wish: &Lab) -> Result<bool> {
    Ok(command(wish)?.status().context("cannot start the lab")?.success())
}
