//! The project's own commands: `cargo xtask image|frp|check|test|demo|lab|bench|dist`. Nothing here is shipped.
mod cargo;
mod check;
mod demo;
mod deps;
mod dist;
mod frp;
mod image;
mod lab;
mod test;
mod tool;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Everything one does with this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the main job for real: agent, instance, boot timeline, SSH, application, clean-up.
    Demo(demo::Demo),
    /// The part of the demo that needs root.
    #[command(hide = true)]
    DemoAsRoot(demo::Plan),
    /// Run every test this machine can run; the sum is the last line.
    Test {
        /// Leave out the tests whose name contains `slow_`.
        #[arg(long)]
        quick: bool,
    },
    /// Judge the source: format, dependencies, size, clippy, docs, licences.
    Check,
    /// Build the development guest image, or find it in the cache; its path is the last line on stdout.
    Image,
    /// Find frps and frpc, or download or build them; their two paths are the last lines on stdout.
    Frp,
    /// Run the scenarios that need a GPU server, in a virtual one; the sum is the last line.
    Lab(lab::Lab),
    /// Make a release: Debian package, checksums, signature, install script; its folder is the last line on stdout.
    Dist(dist::Dist),
    /// Measure, beside the reference; arguments go to the benchmarks.
    Bench {
        /// What the benchmarks understand.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let code = |good: bool| if good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    match task {
        Task::Demo(demo) => demo::prepare(demo),
        Task::DemoAsRoot(plan) => demo::run(&plan),
        Task::Test { quick } => test::run(quick).map(code),
        Task::Check => Ok(code(check::run())),
        Task::Image => {
            println!("{}", image::ensure()?.guest.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Frp => {
            let frp = frp::need()?;
            println!("{}\n{}", frp.frps.display(), frp.frpc.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Lab(wish) => lab::run(&wish).map(code),
        Task::Dist(wish) => dist::run(&wish),
        Task::Bench { arguments } => {
            deps::ensure(&[deps::PRODUCT])?;
            let mut bench = test::product(&cargo::build_agent(true)?, None)?;
            bench.args(["run", "--release", "--package", "qudata-bench", "--"]).args(arguments);
            Ok(code(bench.status()?.success()))
        }
    }
}
