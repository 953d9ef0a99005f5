//! The agent's own time from a POST to the exec of QEMU, beside what the original does on the host in that time. A VM
//! without a guest, one at a time; ours and the reference take turns, so that both meet the same load.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use qudata_testkit::agent::{Image, Setup, TestAgent, TestInstance};

use crate::{
    create,
    original::{self, QMP_PAUSE},
    report::{Row, Unit},
    samples::{Samples, between, millis},
    timeline::Timeline,
};

const NAME: &str = "post_to_exec";
const WITHIN: Duration = Duration::from_secs(60);
/// Phases on the way, in the order of their usual appearance.
const STEPS: [&str; 5] = ["accepted", "disk_created", "seed_written", "network_started", "qemu_started"];

/// One create of ours; milliseconds since the call was sent.
#[derive(Debug)]
struct Round {
    /// When each of [`STEPS`] was done.
    steps: Vec<f64>,
    /// When the identity of the QEMU process was written: just before its exec.
    identity: f64,
    /// When the exec was known to have happened: after it.
    exec: f64,
    /// When QEMU had answered over QMP and was let run.
    proven: f64,
}

pub(crate) fn run(quick: bool) -> Result<Vec<Row>> {
    let rounds = if quick { 5 } else { 20 };
    let base = PathBuf::from(env::var_os("QUDATA_TEST_BLANK").context("QUDATA_TEST_BLANK is not set")?);
    let agent = Setup::new(Image::Blank).start();
    // Once for the page cache, not counted.
    ours(&agent)?;
    original::start_vm(&base)?;
    let (mut rows, mut starts) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if round % 2 == 0 {
            rows.push(ours(&agent)?);
            starts.push(original::start_vm(&base)?);
        } else {
            starts.push(original::start_vm(&base)?);
            rows.push(ours(&agent)?);
        }
    }
    report(&rows, &starts)
}

fn ours(agent: &TestAgent) -> Result<Round> {
    let ordered = create::order(agent, &create::blank())?;
    let timeline = Timeline::until(agent.client(), &ordered.id, "booting", WITHIN)?;
    let written = identity_written(&agent.run_dir().join("vms").join(&ordered.id))?;
    agent.delete(&TestInstance::known(&ordered.id));
    let since = |phase: &str| Ok(between(ordered.sent, timeline.at(phase)?));
    Ok(Round {
        steps: STEPS.into_iter().map(since).collect::<Result<_>>()?,
        identity: between(ordered.sent, written),
        exec: since("qemu_started")?,
        proven: since("booting")?,
    })
}

/// When the identity of QEMU's process was written, in the run directory of the VM's only incarnation.
fn identity_written(instance: &Path) -> Result<Timestamp> {
    let incarnations = fs::read_dir(instance).with_context(|| format!("listing {}", instance.display()))?;
    for incarnation in incarnations {
        if let Ok(meta) = fs::metadata(incarnation?.path().join("qemu.process.json")) {
            return Ok(Timestamp::try_from(meta.modified()?)?);
        }
    }
    bail!("no identity of QEMU's process in {}", instance.display())
}

fn report(rounds: &[Round], starts: &[original::Start]) -> Result<Vec<Row>> {
    let collect = |values: Vec<f64>| Samples::new(values).context("no rounds");
    let of = |pick: fn(&Round) -> f64| collect(rounds.iter().map(pick).collect());
    let exec = of(|round| round.exec)?;
    let identity = of(|round| round.identity)?;
    let attach = of(|round| round.proven - round.exec)?;
    let reference = collect(starts.iter().map(|start| millis(start.to_exec)).collect())?;
    let reference_qmp = collect(starts.iter().map(|start| millis(start.to_qmp)).collect())?;
    let work = "three qemu-img runs, copy of the UEFI variables, exec";
    let mut steps = Vec::new();
    for (n, step) in STEPS.iter().enumerate() {
        let times = rounds.iter().filter_map(|round| round.steps.get(n).copied()).collect();
        steps.push(format!("{step} {:.1}", collect(times)?.p50()));
    }
    Ok(vec![
        Row::new(NAME, "p50", Unit::Millis, exec.p50()).at_most(30.0).beside(reference.p50(), work).note(
            format!(
                "{} rounds; medians of ms since the POST was sent: {}; the identity file, written just before the exec, {:.1}",
                exec.len(),
                steps.join(", "),
                identity.p50()
            ),
        ),
        Row::new(NAME, "p90", Unit::Millis, exec.percentile(90)).beside(reference.percentile(90), "the same"),
        Row::new(NAME, "exec to proven QMP, p50", Unit::Millis, attach.p50()).beside(
            reference_qmp.p50(),
            format!("a sleep of {} ms before each look", QMP_PAUSE.as_millis()),
        ),
    ])
}
