//! `cargo xtask lab`'s worker: boots a virtual GPU server and drives scenarios on it. Called by xtask, which builds what
//! it needs. Never shipped.
//!
//! ```text
//! run ── kit, lane ── machine (shape) ── agent, tenant ◀── scenario
//!                        └── remote: SSH
//! ```
mod agent;
mod gpu;
mod initramfs;
mod kit;
mod lane;
mod machine;
mod owner;
mod remote;
mod run;
mod scenario;
mod shape;
mod tenant;
mod voice;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::voice::say;

/// What the lab is made of.
#[derive(Debug, Parser)]
pub(crate) struct Files {
    /// The agent
    #[arg(long)]
    agent: PathBuf,
    /// The probe that runs on the server
    #[arg(long)]
    probe: PathBuf,
    /// The release server and control plane that run on the server
    #[arg(long)]
    outside: PathBuf,
    /// The release: package, checksums, signature, install.sh; for the scenarios of an installation
    #[arg(long)]
    dist: Option<PathBuf>,
    /// The tests of the `host` crate that need a real systemd, as cargo built them
    #[arg(long)]
    systemd_tests: PathBuf,
    /// Disk of the server, with .vmlinuz and .initrd beside it
    #[arg(long)]
    host_image: PathBuf,
    /// Disk of a fresh server; for the scenarios of an installation
    #[arg(long)]
    fresh_image: Option<PathBuf>,
    /// Disk of the guests, with .vmlinuz, .initrd and .cmdline beside it
    #[arg(long)]
    guest_image: PathBuf,
    /// What the product installs beside its binary: systemd/, sysusers.d/, tmpfiles.d/
    #[arg(long)]
    packaging: PathBuf,
    /// frps and frpc, for the scenarios that need a tunnel
    #[arg(long, num_args = 2, value_names = ["FRPS", "FRPC"])]
    frp: Option<Vec<PathBuf>>,
    /// Where logs of failed scenarios go
    #[arg(long)]
    logs: PathBuf,
}

/// Runs scenarios on a virtual GPU server.
#[derive(Debug, Parser)]
struct CommandLine {
    #[command(flatten)]
    files: Files,
    /// Open a shell on the server instead
    #[arg(long)]
    shell: bool,
    /// Leave the server running after the first failure
    #[arg(long)]
    keep: bool,
    /// Leave out what takes long
    #[arg(long)]
    brief: bool,
    /// How many servers run at a time; as many as processors and memory carry without
    #[arg(long, value_name = "N")]
    servers: Option<NonZero<usize>>,
    /// Scenarios by name, or by a part of their names
    names: Vec<String>,
}

/// Lists the scenarios.
#[derive(Debug, Parser)]
struct List {
    #[arg(long, required = true)]
    list: bool,
}

fn main() -> ExitCode {
    if List::try_parse().is_ok_and(|wish| wish.list) {
        for scenario in scenario::ALL {
            println!("{:<24} {}", scenario.name, scenario.about);
        }
        return ExitCode::SUCCESS;
    }
    let wish = CommandLine::parse();
    let done = if wish.shell {
        run::shell(&wish.files).map(|()| true)
    } else {
        run::run(&wish.files, &run::choose(&wish.names, wish.brief), wish.keep, wish.servers)
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
