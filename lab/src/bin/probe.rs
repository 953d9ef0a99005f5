//! Runs on the lab's server: prints what the leak oracle sees there, as JSON. Called by the lab over SSH.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use qudata_testkit::leakcheck::{Scope, Snapshot};

/// The server belongs to the lab alone, so everything the agent's defaults name counts.
fn scope(agent: u32) -> Scope {
    let roots = ["/var/lib/qudata", "/run/qudata", "/var/log/qudata", "/etc/qudata"];
    let mut scope = Scope::new(roots.map(PathBuf::from), 720_000..=729_999);
    scope.executables =
        ["/usr/bin/qemu-system-x86_64", "/usr/bin/passt", "/usr/bin/passt.avx2"].map(PathBuf::from).into();
    scope.ports = vec![10_000..=15_000, 15_001..=15_300, 20_000..=32_000];
    // The store's file grows.
    scope.allowed = vec!["/var/lib/qudata/agent.redb".into()];
    scope.agent = Some(agent);
    scope
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(pid), None) = (words.next(), words.next()) else {
        bail!("usage: qudata-lab-probe PID-OF-THE-AGENT");
    };
    let agent = pid.parse().with_context(|| format!("{pid:?} is no process id"))?;
    println!("{}", Snapshot::take(&scope(agent))?.to_json());
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qudata-lab-probe: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
