//! From the start of a new agent, after the old one was killed, to all guests being shown as running. The original
//! kills its VMs in that place; the soonest they could be back is a boot, so a boot is the reference.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use qudata_testkit::{http::Client, process::Seen};
use serde_json::Value;

use crate::{
    fleet::{Fleet, Lab},
    report::{Row, Unit},
    samples::{Samples, millis},
};

const NAME: &str = "recovery";
const WITHIN: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);
/// 300 ms, and 5 ms for each of four VMs.
const GOAL: f64 = 320.0;

pub(crate) fn run(lab: &mut Lab) -> Result<Vec<Row>> {
    let rounds = if lab.quick { 2 } else { 7 };
    let fleet = lab.fleet()?;
    let before = qemus(fleet);
    let mut times = Vec::new();
    for _ in 0..rounds {
        times.push(millis(round(fleet)?));
    }
    if qemus(fleet) != before {
        bail!("a QEMU process is another one than before: {before:?}, {:?}", qemus(fleet));
    }
    let times = Samples::new(times).context("no rounds")?;
    let boot = fleet.boot.p50();
    Ok(vec![
        Row::new(NAME, "p50", Unit::Millis, times.p50())
            .at_most(GOAL)
            .beside(boot, "the original kills its VMs: one boot of these guests")
            .note(format!(
                "{} kills, {} guests, all untouched; the longest {:.0} ms",
                times.len(),
                fleet.instances.len(),
                times.max()
            )),
    ])
}

fn qemus(fleet: &Fleet) -> Vec<(u32, u64)> {
    fleet.instances.iter().map(|vm| fleet.agent.qemu(vm)).map(|process: Seen| process.identity()).collect()
}

fn round(fleet: &Fleet) -> Result<Duration> {
    let agent = &fleet.agent;
    agent.kill9();
    thread::scope(|scope| {
        let start = Instant::now();
        let started = scope.spawn(|| agent.restart());
        let shown = all_running(agent.client(), fleet.instances.len(), start);
        if started.join().is_err() {
            bail!("the new agent did not start; its words are above");
        }
        shown
    })
}

fn all_running(client: &Client, guests: usize, start: Instant) -> Result<Duration> {
    while start.elapsed() < WITHIN {
        if let Ok(reply) = client.call("GET", "/instances", None)
            && reply.status == 200
            && running(&reply.data()) == guests
        {
            return Ok(start.elapsed());
        }
        thread::sleep(PAUSE);
    }
    bail!("the new agent did not show {guests} running guests within {WITHIN:?}")
}

fn running(list: &Value) -> usize {
    let instances = list.get("instances").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    instances.iter().filter(|vm| vm.get("state").and_then(Value::as_str) == Some("running")).count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_running_guests_count() {
        let list =
            json!({ "status": "running", "instances": [{ "state": "running" }, { "state": "booting" }] });
        assert_eq!((running(&list), running(&Value::Null)), (1, 0));
    }
}
