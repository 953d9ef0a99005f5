//! One run of the lab: which scenarios, on which servers, what came out. Called by main.
//!
//! Scenarios that ask for the same server share one; after a failure the next one gets a fresh one.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::{Machine, Parts};
use crate::scenario::{self, Scenario};
use crate::shape::{Boot, L1};
use crate::{Files, agent, kit};

/// On a disk with room, unlike a temporary directory that may be in memory.
const PARENT: &str = "/var/tmp";
/// How often a scenario is begun again because the emulated server's kernel died under it (nested virtualisation in
/// software emulation does that). Were it the product's doing, it would happen each time.
const DEATHS: usize = 3;
const PREFIX: &str = "qudata-lab-";
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

/// The directory of a run, removed at its end unless a server was kept.
struct Room {
    dir: PathBuf,
    keep: bool,
}

impl Room {
    fn open() -> Result<Self> {
        sweep()?;
        let dir = Path::new(PARENT).join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self { dir, keep: false })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Removes what runs left that were killed: their disks are large.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(PARENT).with_context(|| format!("cannot list {PARENT}"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX) else { continue };
        // A server that was kept has its own process id written down.
        let kept = fs::read_to_string(entry.path().join("kept")).unwrap_or_default();
        let alive = |pid: &str| !pid.is_empty() && Path::new("/proc").join(pid).exists();
        if !alive(pid) && !alive(kept.trim()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// How one scenario ended.
struct Outcome {
    name: &'static str,
    seconds: u64,
    error: Option<String>,
}

/// Runs the scenarios; true when every one passed.
pub(crate) fn run(files: &Files, chosen: &[&'static Scenario], keep: bool) -> Result<bool> {
    if chosen.is_empty() {
        bail!("no scenario has such a name; --list shows them");
    }
    let mut room = Room::open()?;
    let parts = Parts {
        dir: room.dir.clone(),
        image: files.host_image.clone(),
        fresh: files.fresh_image.clone(),
        kit: kit::make(&room.dir, files)?,
        keep,
    };
    let mut outcomes = Vec::new();
    for (shape, scenarios) in by_shape(chosen) {
        let mut machine = None;
        for scenario in scenarios {
            let started = Instant::now();
            let mut error = attempt(scenario, &shape, &parts, &mut machine).err();
            for _ in 0..DEATHS {
                if error.is_none() || !machine.as_ref().is_some_and(Machine::is_dead) {
                    break;
                }
                println!(
                    "lab: the emulated server died, its kernel says nothing more; {} runs again on a new one",
                    scenario.name
                );
                // Nobody is left there to be asked.
                collect(None, &parts, &files.logs.join(format!("{}-died", scenario.name)));
                end(machine.take())?;
                error = attempt(scenario, &shape, &parts, &mut machine).err();
            }
            let outcome = Outcome {
                name: scenario.name,
                seconds: started.elapsed().as_secs(),
                error: error.map(|error| format!("{error:#}")),
            };
            tell(&outcome);
            let failed = outcome.error.is_some();
            outcomes.push(outcome);
            if failed {
                // A dead server answers no question; each would be waited for.
                let alive = machine.as_ref().filter(|machine| !machine.is_dead());
                collect(alive, &parts, &files.logs.join(scenario.name));
                if keep && let Some(machine) = machine.take() {
                    room.keep = true;
                    leave(&machine, &room.dir)?;
                    return Ok(report(&outcomes));
                }
                // What a failed scenario left must not fail the next.
                end(machine.take())?;
            }
            // No installation shall find what another one left.
            if shape.boot == Boot::Fresh {
                end(machine.take())?;
            }
        }
        end(machine)?;
    }
    Ok(report(&outcomes))
}

/// The named ones, a part of a name standing for all that contain it; without a name all of them. `brief` leaves out the
/// long ones that are not named, and says so.
pub(crate) fn choose(names: &[String], brief: bool) -> Vec<&'static Scenario> {
    let exact = |name: &str| scenario::ALL.iter().any(|scenario| scenario.name == name);
    let is = |scenario: &Scenario, name: &str| {
        scenario.name == name || (!exact(name) && scenario.name.contains(name))
    };
    let named = |scenario: &Scenario| names.iter().any(|name| is(scenario, name));
    let (chosen, left): (Vec<_>, Vec<_>) = scenario::ALL
        .iter()
        .filter(|scenario| names.is_empty() || named(scenario))
        .partition(|scenario| !names.is_empty() || !brief || !scenario.long);
    for scenario in left {
        println!("LEFT OUT: {}; `cargo xtask lab {}` runs it", scenario.name, scenario.name);
    }
    chosen
}

fn end(machine: Option<Machine>) -> Result<()> {
    machine.map_or(Ok(()), Machine::end)
}

/// In the order of the table, scenarios of one shape together.
fn by_shape<'a>(chosen: &[&'a Scenario]) -> Vec<(L1, Vec<&'a Scenario>)> {
    let mut groups: Vec<(L1, Vec<&Scenario>)> = Vec::new();
    for scenario in chosen {
        let shape = (scenario.shape)();
        match groups.iter_mut().find(|(other, _)| *other == shape) {
            Some((_, group)) => group.push(scenario),
            None => groups.push((shape, vec![scenario])),
        }
    }
    groups
}

fn attempt(scenario: &Scenario, shape: &L1, parts: &Parts, machine: &mut Option<Machine>) -> Result<()> {
    if machine.is_none() {
        *machine = Some(ready(shape, parts)?);
    }
    eprintln!("lab: {}: {}", scenario.name, scenario.about);
    match machine {
        Some(machine) => (scenario.run)(machine),
        None => bail!("there is no server"),
    }
}

fn ready(shape: &L1, parts: &Parts) -> Result<Machine> {
    eprintln!("lab: starting a server with {} slots in emulation", shape.slots.len());
    let machine = Machine::boot(shape, parts)?;
    eprintln!("lab: the server is up after {} s", machine.boot.as_secs());
    if machine.shape.boot == Boot::Direct {
        agent::install(&machine)?;
    }
    Ok(machine)
}

fn tell(outcome: &Outcome) {
    match &outcome.error {
        None => eprintln!("lab: {} passed after {} s", outcome.name, outcome.seconds),
        Some(error) => eprintln!("lab: {} FAILED after {} s: {error}", outcome.name, outcome.seconds),
    }
}

/// The table and the closing line; true when all passed.
fn report(outcomes: &[Outcome]) -> bool {
    println!();
    for outcome in outcomes {
        let verdict = if outcome.error.is_none() { "ok" } else { "FAILED" };
        println!("{:<28} {verdict:<6} {:>5} s", outcome.name, outcome.seconds);
    }
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    failed == 0
}

/// Saves what the server can tell. Nothing here may hide the failure itself.
fn collect(machine: Option<&Machine>, parts: &Parts, to: &Path) {
    if let Err(error) = fs::create_dir_all(to) {
        eprintln!("lab: no logs, {} cannot be created: {error}", to.display());
        return;
    }
    for name in ["console.log", "qemu.log"] {
        let _ = fs::copy(parts.dir.join(name), to.join(name));
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
    eprintln!("lab: logs are in {}", to.display());
}

/// The server stays for a person.
fn leave(machine: &Machine, dir: &Path) -> Result<()> {
    fs::write(dir.join("kept"), machine.pid().to_string()).context("cannot note the kept server")?;
    eprintln!("lab: the server stays; log in with\n  {}", machine.remote.shown());
    eprintln!("lab: end it with\n  kill {} && rm -r {}", machine.pid(), dir.display());
    Ok(())
}

/// A server with everything installed, and a shell on it until the person leaves.
pub(crate) fn shell(files: &Files) -> Result<()> {
    let room = Room::open()?;
    let parts = Parts {
        dir: room.dir.clone(),
        image: files.host_image.clone(),
        fresh: files.fresh_image.clone(),
        kit: kit::make(&room.dir, files)?,
        keep: false,
    };
    let machine = ready(&L1::gpus(), &parts)?;
    eprintln!("lab: from another terminal: {}", machine.remote.shown());
    eprintln!("lab: the agent is installed and not started; its settings go to /etc/qudata/agent.toml");
    machine.remote.shell()?;
    machine.end()
}
