//! What it costs to bring a GPU to `vfio-pci`: ours, with its child and its looks before and after, beside the bare writes.
//! Called through the table.
//!
//! Compared where nothing else goes on, as the bare writes are: while a released GPU is cleansed. In a start, disk and
//! network are made at the same time and take the same processors; that figure is told beside it.
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::{self, Baseline};
use crate::gpu;
use crate::machine::Machine;
use crate::scenario::gpu::{ensure_returned, rent};
use crate::shape::slot;
use crate::tenant::{Order, Tenant};
use crate::voice::say;

const QUICK: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(120);
const ROUNDS: usize = 9;
const STARTS: usize = 3;
/// The goal is 1.3; the rest is for a machine that is busy with other things as well.
const MOST: f64 = 3.0;

/// Ours and the bare writes in turn, then some starts; medians.
pub(super) fn run(machine: &mut Machine) -> Result<()> {
    let machine = &*machine;
    let functions = rent(machine, &[slot::A])?.concat();
    let address = functions.first().context("the slot is empty")?;
    let before = Baseline::take(machine)?;
    let drivers = gpu::drivers(machine, &functions)?;
    let (mut bare, mut ours, mut starting) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let returned =
            || ensure_returned(machine, &functions, &drivers).with_context(|| format!("in round {round}"));
        for words in [&["quarantine", address, "--reason", "timed"][..], &["release", address]] {
            let command: Vec<&str> = ["gpu"].iter().chain(words).chain(&["--yes"]).copied().collect();
            agent::command(machine, &command, QUICK)?;
        }
        returned()?;
        ours.push(taken_in(machine, address)?);
        bare.push(bare_writes(machine, address)?);
        returned()?;
    }
    for _ in 0..STARTS {
        let tenant = Tenant::order(machine, &Order { name: "bound", gpus: Some(1), ..Order::default() })?;
        tenant.wait_for("booting", START)?;
        starting.push(taken_in(machine, address)?);
        tenant.delete()?;
        ensure_returned(machine, &functions, &drivers)?;
    }
    say(format!("bind: ours {ours:.0?} ms, bare writes {bare:.0?} ms, in starts {starting:.0?} ms"));
    let (bare, ours, starting) = (median(bare)?, median(ours)?, median(starting)?);
    let ratio = ours / bare;
    say(format!(
        "bind: ours {ours:.1} ms, bare writes {bare:.1} ms: {ratio:.2}; in a start {starting:.1} ms"
    ));
    ensure!(ratio <= MOST, "binding took {ratio:.2} of what the bare writes take");
    before.assert_clean(machine)
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().context("nothing was measured")
}

/// How long the agent says that the last bind took, from the hand-over to its child to the last look, in milliseconds.
fn taken_in(machine: &Machine, address: &str) -> Result<f64> {
    let log = machine.remote.must("journalctl -u qudata-agent -o cat", QUICK)?;
    let took = |line: &str| {
        let entry: Value = serde_json::from_str(line).ok()?;
        let is = |field: &str, value: &str| entry.get(field).and_then(Value::as_str) == Some(value);
        if is("message", "taken to vfio-pci") && is("gpu", address) {
            return entry.get("took_ms")?.as_f64();
        }
        None
    };
    log.lines().rev().find_map(took).context("the log tells of no bind")
}

/// Three writes, and the way back outside the measurement.
fn bare_writes(machine: &Machine, address: &str) -> Result<f64> {
    let script = format!(
        "set -e; cd /sys/bus/pci/devices/{address}; a=$(date +%s%N)
echo vfio-pci >driver_override; echo {address} >driver/unbind; echo {address} >/sys/bus/pci/drivers/vfio-pci/bind
b=$(date +%s%N); c=$(date +%s%N); echo >driver_override; echo {address} >driver/unbind; echo {address} >/sys/bus/pci/drivers_probe
echo $((b - a - (c - b)))"
    );
    // The call of `date` that lies in between is taken off again.
    let text = machine.remote.must(&script, QUICK)?;
    let nanoseconds: f64 = text.trim().parse().with_context(|| format!("no number: {text:?}"))?;
    agent::wait_until_it_answers(machine)?;
    Ok(nanoseconds / 1e6)
}
