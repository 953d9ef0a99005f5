//! `qudata-bench`: what the agent costs, each figure beside a reference measured in the same run. The ratio is the
//! result: absolute times belong to the machine and to who else uses it. Called by `cargo xtask bench`.
mod create;
mod disk;
mod fleet;
mod footprint;
mod get_under_create;
mod load;
mod machine;
mod original;
mod post_to_exec;
mod ready_lag;
mod recovery;
mod report;
mod samples;
mod timeline;

use std::{env, process::ExitCode, thread};

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};

use self::{fleet::Lab, report::Report};

/// What `cargo xtask bench` hands over.
const VARIABLES: [&str; 3] = ["QUDATA_TEST_AGENT", "QUDATA_TEST_IMAGE", "QUDATA_TEST_BLANK"];

/// Measures the agent beside a reference: the ratio is the result.
#[derive(Debug, Parser)]
#[command(name = "qudata-bench", bin_name = "cargo xtask bench --")]
struct Cli {
    /// Which benchmarks; all of them when none is named.
    #[arg(value_enum)]
    names: Vec<Name>,
    /// Print one line of JSON on stdout; the table goes to stderr then.
    #[arg(long)]
    json: bool,
    /// Fewer rounds: shows that it works, decides nothing.
    #[arg(long)]
    quick: bool,
}

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Name {
    /// From a POST to the exec of QEMU.
    PostToExec,
    /// From the guest's sshd listening to the status `running`.
    ReadyLag,
    /// GET while four VMs are being created.
    GetUnderCreate,
    /// Memory, threads and files of the agent, size of the binary.
    Footprint,
    /// From the start of a new agent to all VMs being shown as running.
    Recovery,
    /// Making a disk, and first writes to it.
    Disk,
}

impl Name {
    fn run(self, lab: &mut Lab) -> Result<Vec<report::Row>> {
        match self {
            Self::PostToExec => post_to_exec::run(lab.quick),
            Self::ReadyLag => ready_lag::run(lab.quick),
            Self::GetUnderCreate => get_under_create::run(lab),
            Self::Footprint => footprint::run(lab),
            Self::Recovery => recovery::run(lab),
            Self::Disk => disk::run(lab.quick),
        }
    }

    fn text(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = check_environment() {
        eprintln!("bench: error: {error:#}");
        return ExitCode::FAILURE;
    }
    let report = measure(&cli);
    if cli.json {
        eprintln!("{}", report.table());
        println!("{}", report.json());
    } else {
        println!("{}", report.table());
    }
    if report.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check_environment() -> Result<()> {
    let missing: Vec<&str> = VARIABLES.into_iter().filter(|name| env::var_os(name).is_none()).collect();
    if !missing.is_empty() {
        bail!("{} not set: run `cargo xtask bench`, which builds what is needed", missing.join(", "));
    }
    if !rustix::process::geteuid().is_root() {
        bail!("the agent starts VMs under users of their own and needs root for that: run as root");
    }
    Ok(())
}

fn measure(cli: &Cli) -> Report {
    let names = if cli.names.is_empty() { Name::value_variants() } else { cli.names.as_slice() };
    let mut lab = Lab::new(cli.quick);
    let mut report = Report::new(cli.quick);
    for &name in names {
        eprintln!("bench: {}", name.text());
        // The test harness panics where it cannot go on; the other benchmarks can.
        let outcome = thread::scope(|scope| scope.spawn(|| name.run(&mut lab)).join());
        match outcome {
            Ok(Ok(rows)) => report.add(rows),
            Ok(Err(error)) => report.fail(&name.text(), &format!("{error:#}")),
            Err(_) => report.fail(&name.text(), "the harness gave up; its words are above"),
        }
    }
    report
}
