//! From the moment the guest's sshd listens to the status `running`. The moment is taken inside the guest and brought to
//! this machine's clock; the reference is the original's way of finding out, on guests booted the same way.

mod original_guest;
mod truth;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use qudata_guest::{
    keys::{GuestKey, ManagementKey},
    session::{Session, SessionSpec},
};
use qudata_testkit::agent::{Image, Setup, TestAgent, TestInstance};

use self::truth::host_seconds;
use crate::{
    create::{self, Ordered},
    original::Keys,
    report::{Row, Unit},
    samples::{Samples, between, millis},
    timeline::Timeline,
};

const NAME: &str = "ready_lag";
/// A guest's boot in emulation, on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// Until a guest that is ready has nothing else left to do.
const REST: Duration = Duration::from_secs(20);
/// Logins of which the median counts, and the pause between two.
const LOGINS: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);
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
    /// One login into the same guest when it has nothing else to do.
    login: f64,
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
    let ordered = create::order(agent, &create::guest(&keys.public, MEMORY))?;
    let timeline = Timeline::until(agent.client(), &ordered.id, "ready", BOOT)?;
    let listening = truth::ask(keys, ordered.port(22)?)?;
    let login = login_at_rest(agent, keys, &ordered)?;
    agent.delete(&TestInstance::known(&ordered.id));
    let (up, ready) = (timeline.at("guest_up")?, timeline.at("ready")?);
    let boot = Boot {
        lag: listening.millis_until(host_seconds(ready)),
        bound: listening.bound_millis(),
        heard: listening.millis_until(host_seconds(up)),
        proven: between(up, ready),
        login,
    };
    eprintln!("bench: lag {:.0} ms, at most {:.0} less; {:.0} s after the POST", boot.lag, boot.bound, {
        between(ordered.sent, ready) / 1000.0
    });
    Ok(boot)
}

/// What one login by the agent's own client costs this guest at rest: the least that proving it can take here.
fn login_at_rest(agent: &TestAgent, keys: &Keys, instance: &Ordered) -> Result<f64> {
    thread::sleep(REST);
    let host_key = agent.field(&TestInstance::known(&instance.id), "ssh_host_key");
    let spec = SessionSpec {
        port: instance.port(22)?,
        management_key: ManagementKey::load(&keys.file)?,
        host_key: GuestKey::parse(&host_key)?,
        deadline: BOOT,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut times = Vec::new();
    for _ in 0..LOGINS {
        let start = Instant::now();
        let session = runtime.block_on(Session::connect(spec.clone()))?;
        times.push(millis(start.elapsed()));
        drop(session);
        thread::sleep(PAUSE);
    }
    Ok(Samples::new(times).context("no logins")?.p50())
}

fn report(ours: &[Boot], original: &[original_guest::Boot]) -> Result<Vec<Row>> {
    let collect = |values: Vec<f64>| Samples::new(values).context("no boots");
    let of = |pick: fn(&Boot) -> f64| collect(ours.iter().map(pick).collect());
    let (lag, bound) = (of(|boot| boot.lag)?, of(|boot| boot.bound)?);
    let login = of(|boot| boot.login)?;
    let reference = collect(original.iter().map(|boot| boot.lag).collect())?;
    let setup = collect(original.iter().map(|boot| boot.setup).collect())?;
    let tries: Vec<String> = original.iter().map(|boot| boot.tries.to_string()).collect();
    let note = format!(
        "{} boots, upper bounds, at most {:.1} ms too high; medians: guest's word heard after {:.1} ms, \
         login, ports and commit {:.1} ms; a login into the same guest at rest {:.1} ms, below which no proof can \
         be. Reference: {} boots, {} runs of ssh, and another {:.0} ms for its three set-up \
         runs, not counted",
        lag.len(),
        bound.max(),
        of(|boot| boot.heard)?.p50(),
        of(|boot| boot.proven)?.p50(),
        login.p50(),
        reference.len(),
        tries.join(" and "),
        setup.p50()
    );
    Ok(vec![
        Row::new(NAME, "p50", Unit::Millis, lag.p50())
            .at_most(150.0)
            .beside(reference.p50(), "ssh forked every 2 s, 5 s timeout, over SLIRP")
            .note(note),
        Row::new(NAME, "p50, less a login", Unit::Millis, lag.p50() - login.p50())
            .beside(login.p50(), "one login into the guest at rest"),
        Row::new(NAME, "max", Unit::Millis, lag.max()).beside(reference.max(), "the same"),
    ])
}
