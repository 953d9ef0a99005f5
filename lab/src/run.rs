//! One run of the lab: which scenarios, on how many servers at a time, what came out. Called by main.
//!
//! Scenarios that ask for the same server share one where they can; after a failure the next one gets a fresh one.
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lane::{KEPT, Lane, ready};
use crate::machine::Parts;
use crate::scenario::{self, Scenario};
use crate::shape::L1;
use crate::voice::say;
use crate::{Files, kit};

/// On a disk with room, unlike a temporary directory that may be in memory.
const PARENT: &str = "/var/tmp";
const PREFIX: &str = "qudata-lab-";
/// RAM that a server and QEMU around it take.
const SERVER_MIB: u64 = 7 * 1024;

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
        let kept = kept(&entry.path());
        let alive = |pid: &str| !pid.is_empty() && Path::new("/proc").join(pid).exists();
        if !alive(pid) && !kept.iter().any(|pid| alive(pid.trim())) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// What stands in the notes of a run's kept servers.
fn kept(room: &Path) -> Vec<String> {
    let lanes = fs::read_dir(room).into_iter().flatten().flatten();
    lanes.filter_map(|lane| fs::read_to_string(lane.path().join(KEPT)).ok()).collect()
}

/// How one scenario ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    name: &'static str,
    seconds: u64,
    error: Option<String>,
}

impl Outcome {
    pub(crate) fn new(scenario: &Scenario, took: Duration, error: Option<anyhow::Error>) -> Self {
        let error = error.map(|error| format!("{error:#}"));
        Self { name: scenario.name, seconds: took.as_secs(), error }
    }

    pub(crate) fn is_failure(&self) -> bool {
        self.error.is_some()
    }

    /// One line about it, at once.
    pub(crate) fn tell(&self) {
        match &self.error {
            None => say(format!("passed after {} s", self.seconds)),
            Some(error) => say(format!("FAILED after {} s: {error}", self.seconds)),
        }
    }
}

/// What the lanes of a run share.
#[derive(Debug)]
pub(crate) struct Work {
    left: Mutex<Vec<&'static Scenario>>,
    outcomes: Mutex<Vec<Outcome>>,
}

impl Work {
    fn new(chosen: &[&'static Scenario]) -> Self {
        Self { left: Mutex::new(chosen.to_vec()), outcomes: Mutex::default() }
    }

    /// The next scenario for a lane: one for the server it has, else the first that is left.
    pub(crate) fn take(&self, has: Option<&L1>) -> Option<&'static Scenario> {
        let mut left = lock(&self.left);
        let same = |has: &L1| left.iter().position(|scenario| (scenario.shape)() == *has);
        let next = has.and_then(same).unwrap_or(0);
        (next < left.len()).then(|| left.remove(next))
    }

    pub(crate) fn came_out(&self, outcome: Outcome) {
        lock(&self.outcomes).push(outcome);
    }

    /// What came out, in the order of the table.
    fn outcomes(self) -> Vec<Outcome> {
        let mut outcomes = self.outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcomes
            .sort_by_key(|outcome| scenario::ALL.iter().position(|scenario| scenario.name == outcome.name));
        outcomes
    }
}

/// No lane panics while it holds one of these.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the scenarios on `servers` servers at a time; without a number on as many as processors and memory carry. True when
/// every one passed.
pub(crate) fn run(
    files: &Files,
    chosen: &[&'static Scenario],
    keep: bool,
    servers: Option<NonZero<usize>>,
) -> Result<bool> {
    if chosen.is_empty() {
        bail!("no scenario has such a name; --list shows them");
    }
    let mut room = Room::open()?;
    let kit = kit::make(&room.dir, files)?;
    // The first failure ends a run whose server is to stay: there is one then.
    let most = if keep { 1 } else { servers.map_or_else(carried, NonZero::get) };
    let lanes: Vec<Lane<'_>> = (1..=most.min(chosen.len()))
        .map(|number| lane(&room, number, files, &kit, keep))
        .collect::<Result<_>>()?;
    let work = Work::new(chosen);
    let ran: Vec<Result<()>> = thread::scope(|scope| {
        let running: Vec<_> = lanes.iter().map(|lane| scope.spawn(|| lane.run(&work))).collect();
        running
            .into_iter()
            .map(|lane| lane.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a scenario panicked"))))
            .collect()
    });
    room.keep = lanes.iter().any(|lane| lane.parts.dir.join(KEPT).exists());
    let passed = report(&work.outcomes());
    ran.into_iter().collect::<Result<()>>()?;
    Ok(passed)
}

/// How many servers at a time this machine carries: each has a processor and its RAM.
fn carried() -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free = free.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    let by_memory = usize::try_from(free / 1024 / SERVER_MIB).unwrap_or(1);
    processors.min(by_memory).max(1)
}

/// A lane with a directory of its own, and in it the lab's way into its servers.
fn lane<'a>(room: &Room, number: usize, files: &'a Files, kit: &Path, keep: bool) -> Result<Lane<'a>> {
    let dir = room.dir.join(number.to_string());
    fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for name in kit::WAY_IN {
        fs::copy(room.dir.join(name), dir.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    let parts = Parts {
        dir,
        image: files.host_image.clone(),
        fresh: files.fresh_image.clone(),
        kit: kit.to_owned(),
        keep,
    };
    Ok(Lane { parts, logs: &files.logs })
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

/// The table and the closing line; true when all passed.
fn report(outcomes: &[Outcome]) -> bool {
    println!();
    for outcome in outcomes {
        let verdict = if outcome.is_failure() { "FAILED" } else { "ok" };
        println!("{:<28} {verdict:<6} {:>5} s", outcome.name, outcome.seconds);
    }
    let failed = outcomes.iter().filter(|outcome| outcome.is_failure()).count();
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    failed == 0
}

/// A server with everything installed, and a shell on it until the person leaves.
pub(crate) fn shell(files: &Files) -> Result<()> {
    let room = Room::open()?;
    let kit = kit::make(&room.dir, files)?;
    let machine = ready(&L1::gpus(), &lane(&room, 1, files, &kit, false)?.parts)?;
    say(format!("from another terminal: {}", machine.remote.shown()));
    say("the agent is installed and not started; its settings go to /etc/qudata/agent.toml");
    machine.remote.shell()?;
    machine.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_stays_on_its_server_while_there_is_work_for_it_and_nothing_runs_twice() {
        let chosen: Vec<&Scenario> = scenario::ALL.iter().collect();
        let work = Work::new(&chosen);
        let first = work.take(None).unwrap();
        assert_eq!(first.name, chosen.first().unwrap().name);
        let has = (first.shape)();
        let (mut taken, mut left) = (vec![first.name], false);
        while let Some(next) = work.take(Some(&has)) {
            let same = (next.shape)() == has;
            assert!(same || !work_for(&work, &has), "{} was taken too early", next.name);
            left |= !same;
            taken.push(next.name);
        }
        assert!(left, "all scenarios have one shape: the test tells nothing");
        assert_eq!(taken.len(), chosen.len());
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), chosen.len());
    }

    fn work_for(work: &Work, shape: &L1) -> bool {
        lock(&work.left).iter().any(|scenario| (scenario.shape)() == *shape)
    }

    #[test]
    fn results_stand_in_the_order_of_the_table() {
        let chosen: Vec<&Scenario> = scenario::ALL.iter().take(3).collect();
        let work = Work::new(&chosen);
        for scenario in chosen.iter().rev() {
            work.came_out(Outcome::new(scenario, Duration::ZERO, None));
        }
        let names: Vec<&str> = work.outcomes().iter().map(|outcome| outcome.name).collect();
        assert_eq!(names, chosen.iter().map(|scenario| scenario.name).collect::<Vec<_>>());
    }
}
