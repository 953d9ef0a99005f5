//! GET at a fixed rate: with nothing else going on, while instances are created one lot after the other, and while
//! guests are created and boot. The reference is the original's one mutex, held through the host work and the wait for
//! QMP of each create.

use std::{env, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result};
use qudata_testkit::agent::TestInstance;

use crate::{
    fleet::{Lab, Site},
    load::{self, Calls, Floor},
    original::{self, Start},
    report::{Row, Unit},
    timeline::Timeline,
};

const NAME: &str = "get_under_create";
const PATH: &str = "/instances";
const GOAL: f64 = 25.0;
const WITHIN: Duration = Duration::from_secs(60);

pub(crate) fn run(lab: &mut Lab) -> Result<Vec<Row>> {
    let (idle_for, rounds) = if lab.quick { (3, 5) } else { (10, 25) };
    // The guests of another benchmark would be in the way.
    lab.fleet = None;
    let (lock, size) = (lock_time()?, lab.size());
    let site = Site::open()?;
    let client = site.agent.client().clone();
    let ((), idle) = load::while_running(&client, PATH, || thread::sleep(Duration::from_secs(idle_for)))?;
    let (created, creating) = load::while_running(&client, PATH, || churn(&site, size, rounds))?;
    created?;
    let nothing = Floor::open()?;
    let (booted, booting) = load::while_running(&client, PATH, || {
        load::while_running(nothing.client(), PATH, || site.boot(size))
    })?;
    let (booted, floor) = booted?;
    lab.fleet = Some(site.with(booted?)?);
    report(&Seen { idle, creating, booting, floor, lock, size })
}

/// Creates `size` instances at once, deletes them when their QEMUs run, and again.
fn churn(site: &Site, size: usize, rounds: usize) -> Result<()> {
    for _ in 0..rounds {
        let ordered = site.order(size)?;
        for one in &ordered {
            Timeline::until(site.agent.client(), &one.id, "booting", WITHIN)?;
        }
        for one in ordered {
            site.agent.delete(&TestInstance::known(&one.id));
        }
    }
    Ok(())
}

/// How long one create of the original holds its lock, measured here: the middle one of three.
fn lock_time() -> Result<Duration> {
    let base = PathBuf::from(env::var_os("QUDATA_TEST_BLANK").context("QUDATA_TEST_BLANK is not set")?);
    let start = |_| original::start_vm(&base).map(|Start { to_exec, to_qmp }| to_exec + to_qmp);
    let mut times = (0..3).map(start).collect::<Result<Vec<_>>>()?;
    times.sort();
    times.get(1).copied().context("three were measured")
}

/// What was measured.
#[derive(Debug)]
struct Seen {
    idle: Calls,
    creating: Calls,
    booting: Calls,
    /// Calls to a server that does nothing, at the same time as those.
    floor: Calls,
    /// How long the original's lock is held for one create.
    lock: Duration,
    size: usize,
}

fn report(seen: &Seen) -> Result<Vec<Row>> {
    let Seen { idle, creating, booting, floor, lock, size } = seen;
    let held = lock.saturating_mul(u32::try_from(*size)?);
    let behind = load::behind_a_lock(held, held).context("no time has passed")?;
    let computed = format!(
        "one lock, computed: calls during {size} creates that hold it for {} ms each (measured)",
        lock.as_millis()
    );
    let p99 = |calls: &Calls| calls.latency.percentile(99);
    let words = |what: &str, calls: &Calls| {
        format!(
            "{what}: {} calls in {:.0} s, p50 {:.2} ms, p99 {:.2} ms, max {:.1} ms, the caller itself late by p99 {:.1} ms",
            calls.latency.len(),
            calls.elapsed.as_secs_f64(),
            calls.latency.p50(),
            p99(calls),
            calls.latency.max(),
            calls.lateness.percentile(99),
        )
    };
    let note = format!(
        "calls are sent by the clock, lateness of the caller is not counted. {}. {}. {}. {}",
        words("Idle", idle),
        words("Creating", creating),
        words("Creating and booting in emulation", booting),
        words("The server that does nothing, meanwhile", floor)
    );
    Ok(vec![
        Row::new(NAME, "creating, p50", Unit::Millis, creating.latency.p50())
            .beside(behind.p50(), computed.clone()),
        Row::new(NAME, "creating, p99", Unit::Millis, p99(creating))
            .at_most(GOAL)
            .beside(behind.percentile(99), computed)
            .note(note),
        Row::new(NAME, "creating and booting, p99", Unit::Millis, p99(booting))
            .at_most(GOAL)
            .beside(p99(floor), "a server that does nothing, called at the same time"),
    ])
}
