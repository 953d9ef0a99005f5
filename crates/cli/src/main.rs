//! The binary `qudata-agent`: daemon, client of the daemon, and start shim of its children. Owns the dispatch and the
//! exit code; called by systemd, by people, and by itself.

mod args;
mod client;
mod cmd;
mod confirm;
mod exit;
mod keyfile;
mod pick;
mod render;
mod screen;
mod units;

use std::{io::Write, process::ExitCode};

use clap::Parser;

use crate::screen::{Screen, Tone};

fn main() -> ExitCode {
    // Before anything else: the shim must be a process of one thread. Not a subcommand: people have no use for it.
    let first = std::env::args_os().nth(1);
    if first.as_deref().is_some_and(|a| a == qudata_agent_core::daemon::SHIM_COMMAND) {
        return qudata_host::shim::main().into();
    }
    // Likewise: it may be lost to the kernel, and it is started for every step on a GPU.
    if first.as_deref().is_some_and(|a| a == qudata_vfio::door::CHILD_COMMAND) {
        return qudata_vfio::door::child_main().into();
    }
    // It runs in the sandbox of a VM.
    if first.as_deref().is_some_and(|a| a == qudata_qemu::shutdown::COMMAND) {
        return qudata_qemu::shutdown::main().into();
    }
    let line = match args::CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => {
            let _ = error.print();
            return u8::try_from(error.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
        }
    };
    let screen = Screen::observe(line.global.json);
    match cmd::run(line, &screen) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if !failure.sentence.is_empty() {
                let label = screen.err.paint(Tone::Bad, "error:");
                let _ = writeln!(std::io::stderr().lock(), "{label} {}", failure.sentence);
            }
            failure.exit.into()
        }
    }
}
