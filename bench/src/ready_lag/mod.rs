//! From the moment the guest's sshd listens to the status `running`. The moment is taken inside the guest and brought to
//! this machine's clock; the reference is the original's way of finding out, on guests booted the same way.

mod original_guest;
mod truth;

use std::time::Duration;

use anyhow::{Context, Result};
use qudata_testkit::agent::{Image, Setup, TestAgent, TestInstance};
use serde_json::Value;

use self::truth::host_seconds;
use crate::{
    create,
    original::Keys,
    report::{Row, Unit},
    samples::{Samples, between},
    timeline::Timeline,
};

const NAME: &str = "ready_lag";
/// A guest's boot in emulation, on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// RAM of the guests, ours and the reference's.
const MEMORY: &str = "1G";

/// One boot of ours, in milliseconds.
#[derive(Debug)]
struct Boot {
    /// Listening to `running`, at most.
    lag: f64,
    /// How much less it may be.
    bound: f64,
    /// Listening to the guest's word being heard.
    heard: f64,
    /// From there to `running`: login, ports opened, commit.
    proven: f64,
}

pub(crate) fn run(quick: bool) -> Result<Vec<Row>> {
    let (boots, references) = if quick { (2, 1) } else { (5, 2) };
    let keys = Keys::make()?;
    let agent = Setup::new(Image::Direct).start();
    let mut ours = Vec::new();
    for _ in 0..boots {
        ours.push(boot(&agent, &keys)?);
    }
    drop(agent);
    let mut original = Vec::new();
    for _ in 0..references {
        original.push(original_guest::boot(&keys)?);
    }
    report(&ours, &original)
}

fn boot(agent: &TestAgent, keys: &Keys) -> Result<Boot> {
    let mut wish = create::guest(&keys.public, MEMORY);
    if let Some(fields) = wish.as_object_mut() {
        fields.insert("user_data".to_owned(), Value::String(truth::user_data()));
    }
    let ordered = create::order(agent, &wish)?;
    let timeline = Timeline::until(agent.client(), &ordered.id, "ready", BOOT)?;
    let listening = truth::ask(keys, ordered.port(22)?)?;
    agent.delete(&TestInstance::known(&ordered.id));
    let (up, ready) = (timeline.at("guest_up")?, timeline.at("ready")?);
    let boot = Boot {
        lag: listening.millis_until(host_seconds(ready)),
        bound: listening.bound_millis(),
        heard: listening.millis_until(host_seconds(up)),
        proven: between(up, ready),
    };
    eprintln!("bench: lag {:.0} ms, at most {:.0} less; {:.0} s after the POST", boot.lag, boot.bound, {
        between(ordered.sent, ready) / 1000.0
    });
    Ok(boot)
}

fn report(ours: &[Boot], original: &[original_guest::Boot]) -> Result<Vec<Row>> {
    let collect = |values: Vec<f64>| Samples::new(values).context("no boots");
    let of = |pick: fn(&Boot) -> f64| collect(ours.iter().map(pick).collect());
    let (lag, bound) = (of(|boot| boot.lag)?, of(|boot| boot.bound)?);
    let reference = collect(original.iter().map(|boot| boot.lag).collect())?;
    let setup = collect(original.iter().map(|boot| boot.setup).collect())?;
    let tries: Vec<String> = original.iter().map(|boot| boot.tries.to_string()).collect();
    let note = format!(
        "{} boots, upper bounds, at most {:.1} ms too high; medians: guest's word heard after {:.1} ms, \
         login, ports and commit {:.1} ms. Reference: {} boots, {} runs of ssh, and another {:.0} ms for its three set-up \
         runs, not counted",
        lag.len(),
        bound.max(),
        of(|boot| boot.heard)?.p50(),
        of(|boot| boot.proven)?.p50(),
        reference.len(),
        tries.join(" and "),
        setup.p50()
    );
    Ok(vec![
        Row::new(NAME, "p50", Unit::Millis, lag.p50())
            .at_most(150.0)
            .beside(reference.p50(), "ssh forked every 2 s, 5 s timeout, over SLIRP")
            .note(note),
        Row::new(NAME, "max", Unit::Millis, lag.max()).beside(reference.max(), "the same"),
    ])
}
