//! One server at a time, and the scenarios that run on it one after the other. Several lanes make a run. Called by `run`.
//!
//! ```text
//! take ──▶ attempt ──▶ ok ──────────────────────────────────▶ take …
//!    ▲         └─────▶ failed ──▶ logs, the server ends ─────▶ take …
//!    └── the emulated server's kernel died: again on a new one
//! ```
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::agent;
use crate::machine::{Machine, Parts};
use crate::run::{Outcome, Work};
use crate::scenario::Scenario;
use crate::shape::{Boot, L1};
use crate::voice::{say, speak_of};

/// How often a scenario is begun again because the emulated server's kernel died under it (see `machine`).
/// Were it the product's doing, it would happen each time.
const DEATHS: usize = 3;
const COLLECT: Duration = Duration::from_secs(60);

/// What a server tells about itself after a failure: file name and script.
const REPORTS: &[(&str, &str)] = &[
    ("agent.log", "journalctl --no-pager -o short-precise -u qudata-agent"),
    ("journal.log", "journalctl --no-pager -o short-precise"),
    ("dmesg.log", "dmesg"),
    ("processes.log", "ps -eo user,pid,ppid,stat,wchan:24,etime,args --forest"),
    ("units.log", "systemctl list-units --all --no-pager 'qudata*'; systemd-cgls --no-pager"),
    ("network.log", "nft list ruleset; ss -tulpn"),
    ("pci.log", "lspci -nnk"),
    (
        "instances.log",
        "qudata-agent status --json; qudata-agent gpu list --json; for f in /var/log/qudata/instances/*/* /run/qudata/vms/*/*/*.log; \
         do echo \"== $f\"; tail -c 20000 \"$f\"; done",
    ),
];

/// Beside the disk of a server that stays: its process id.
pub(crate) const KEPT: &str = "kept";

/// Where one lane works.
#[derive(Debug)]
pub(crate) struct Lane<'a> {
    /// What its servers are made of, in a directory of its own.
    pub(crate) parts: Parts,
    /// Where logs of failed scenarios go.
    pub(crate) logs: &'a Path,
}

impl Lane<'_> {
    /// Runs what nobody has taken yet until nothing is left, or until a server is to stay for a person.
    pub(crate) fn run(&self, work: &Work) -> Result<()> {
        let mut machine: Option<Machine> = None;
        while let Some(scenario) = work.take(machine.as_ref().map(|machine| &machine.shape)) {
            speak_of(Some(scenario.name));
            let kept = self.scenario(scenario, &mut machine, work)?;
            speak_of(None);
            if kept {
                return Ok(());
            }
        }
        end(machine)
    }

    /// True when its server stays and nothing more may run.
    fn scenario(&self, scenario: &Scenario, machine: &mut Option<Machine>, work: &Work) -> Result<bool> {
        let shape = (scenario.shape)();
        if machine.as_ref().is_some_and(|machine| machine.shape != shape) {
            end(machine.take())?;
        }
        let started = Instant::now();
        let mut error = self.attempt(scenario, &shape, machine).err();
        for _ in 0..DEATHS {
            if error.is_none() || !machine.as_ref().is_some_and(Machine::is_dead) {
                break;
            }
            say("the emulated server died, its kernel says nothing more: again on a new one");
            // Nobody is left there to be asked.
            self.collect(None, &format!("{}-died", scenario.name));
            end(machine.take())?;
            error = self.attempt(scenario, &shape, machine).err();
        }
        let outcome = Outcome::new(scenario, started.elapsed(), error);
        outcome.tell();
        let failed = outcome.is_failure();
        work.came_out(outcome);
        if failed {
            // A dead server answers no question; each would be waited for.
            let alive = machine.as_ref().filter(|machine| !machine.is_dead());
            self.collect(alive, scenario.name);
            if self.parts.keep
                && let Some(machine) = machine.take()
            {
                leave(&machine, &self.parts.dir)?;
                return Ok(true);
            }
        }
        // What a failed scenario left must not fail the next; and no installation shall find what another one left.
        if failed || shape.boot == Boot::Fresh {
            end(machine.take())?;
        }
        Ok(false)
    }

    fn attempt(&self, scenario: &Scenario, shape: &L1, machine: &mut Option<Machine>) -> Result<()> {
        say(scenario.about);
        if machine.is_none() {
            *machine = Some(ready(shape, &self.parts)?);
        }
        match machine {
            Some(machine) => (scenario.run)(machine),
            None => bail!("there is no server"),
        }
    }

    /// Saves what the server can tell. Nothing here may hide the failure itself.
    fn collect(&self, machine: Option<&Machine>, name: &str) {
        let to: PathBuf = self.logs.join(name);
        if let Err(error) = fs::create_dir_all(&to) {
            return say(format!("no logs, {} cannot be created: {error}", to.display()));
        }
        for name in ["console.log", "qemu.log"] {
            let _ = fs::copy(self.parts.dir.join(name), to.join(name));
        }
        for (name, script) in REPORTS.iter().filter(|_| machine.is_some()) {
            let said = machine.map(|machine| machine.remote.run(script, COLLECT));
            let text = match said {
                Some(Ok(output)) => output.stdout + &output.stderr,
                Some(Err(error)) => format!("{error:#}"),
                None => String::new(),
            };
            let _ = fs::write(to.join(name), text);
        }
        say(format!("logs are in {}", to.display()));
    }
}

/// A server with the agent installed, unless its shape says that nothing is.
pub(crate) fn ready(shape: &L1, parts: &Parts) -> Result<Machine> {
    say(format!("starting a server with {} slots in emulation", shape.slots.len()));
    let machine = Machine::boot(shape, parts)?;
    say(format!("the server is up after {} s", machine.boot.as_secs()));
    if machine.shape.boot == Boot::Direct {
        agent::install(&machine)?;
    }
    Ok(machine)
}

fn end(machine: Option<Machine>) -> Result<()> {
    machine.map_or(Ok(()), Machine::end)
}

/// The server stays for a person.
fn leave(machine: &Machine, dir: &Path) -> Result<()> {
    fs::write(dir.join(KEPT), machine.pid().to_string()).context("cannot note the kept server")?;
    say(format!("the server stays; log in with\n  {}", machine.remote.shown()));
    let room = dir.parent().unwrap_or(dir);
    say(format!("end it with\n  kill {} && rm -r {}", machine.pid(), room.display()));
    Ok(())
}
