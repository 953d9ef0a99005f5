//! The tests of the `host` crate that need systemd as process 1. Called through the table.
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::machine::Machine;
use crate::voice::say;

const LONG: Duration = Duration::from_secs(600);

pub(super) fn run(machine: &mut Machine) -> Result<()> {
    // Rounds of agents that are killed while they start a unit: each takes a second here.
    let script = "ROUNDS=20 /lab/tests/deps/systemd --ignored --test-threads=1 2>&1";
    let said = machine.remote.run(script, LONG)?;
    let verdict = said.stdout.lines().rfind(|line| line.starts_with("test result:"));
    ensure!(said.status.success(), "{}", said.stdout.trim());
    let verdict = verdict.context("the tests said nothing")?;
    ensure!(!verdict.contains(" 0 passed"), "no test ran: {verdict}");
    say(verdict);
    Ok(())
}
