//! Starting, finding and ending transient units. Owns the note that names a launch's unit; called by [`super::Launcher`].
//!
//! ```text
//! note ─▶ user record ─▶ StartTransientUnit ─▶ job done ─▶ main process ─▶ <name>.process.json
//!  └── whatever is cut off from here on is found, or ended, by the unit's name
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{
    EndError, Launch, LaunchError, begin,
    bus::{Bus, BusError, UnitState},
    identity_path, log_tail, prepare,
    unit::{OLDEST_SYSTEMD, plan_unit, unit_name},
    users,
};
use crate::{
    causes::chain,
    command::{Tool, ToolError},
    durable,
    process::{self, Process, ProcessIdentity},
};

/// systemd sets up name spaces and filters before the program runs, on a host that may be starting many.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long a unit that an earlier agent was just starting may take to get there; giving up means that its instance has
/// to be looked at by a person.
const SETTLE_DEADLINE: Duration = START_DEADLINE;
/// How long a unit whose start failed may take to vanish.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts to end a unit: one that was starting at the first has a process at the second.
const END_PERIOD: Duration = Duration::from_millis(200);
const SHORT_PAUSE: Duration = Duration::from_millis(2);
const LONG_PAUSE: Duration = Duration::from_millis(50);
/// Present where systemd runs the host, sd_booted(3).
const BOOTED: &str = "/run/systemd/system";
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd"];

/// This host's systemd cannot run VMs as units.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// Another init runs this host, or it is a container.
    #[error("systemd does not run this host")]
    NotBooted,
    /// It does, and does not answer.
    #[error("systemd does not answer on the system bus: install and start dbus")]
    Bus(#[source] BusError),
    /// Its properties or user records are not enough.
    #[error("systemd {version} is too old: {OLDEST_SYSTEMD} or newer is needed")]
    TooOld {
        /// What it says it is.
        version: String,
    },
    /// Users without an entry in `/etc/passwd` are unknown to it.
    #[error(
        "systemd cannot start a VM as a user of its own: install libnss-systemd, so that the passwd line of /etc/nsswitch.conf names systemd"
    )]
    Users,
}

/// Which unit a launch became; on file before the unit exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnitNote {
    unit: String,
    program: PathBuf,
    uid: u32,
    boot_id: String,
}

impl UnitNote {
    /// The note of `name` in `dir`, if that launch became a unit.
    pub(super) fn read(dir: &Path, name: &str) -> Result<Option<Self>, LaunchError> {
        super::read_json(name, &note_path(dir, name))
    }
}

/// Where the note is kept.
pub(super) fn note_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.unit.json"))
}

/// The number of this host's systemd, when it can do what is needed.
pub(super) async fn usable_version(bus: &Arc<Bus>) -> Result<u32, SystemdError> {
    if !Path::new(BOOTED).is_dir() {
        return Err(SystemdError::NotBooted);
    }
    let bus = bus.clone();
    let asked = tokio::spawn(async move { bus.version().await }).await;
    let text = match asked {
        Ok(version) => version.map_err(SystemdError::Bus)?,
        // Only a runtime that is shutting down drops tasks.
        Err(_) => return Err(SystemdError::NotBooted),
    };
    let version = parse_version(&text).filter(|version| *version >= OLDEST_SYSTEMD);
    let version = version.ok_or(SystemdError::TooOld { version: text })?;
    if users::are_consulted().unwrap_or(false) { Ok(version) } else { Err(SystemdError::Users) }
}

/// Asked by systemctl, which reaches systemd without the bus: that one is going down as well.
pub(super) async fn is_stopping() -> Result<bool, ToolError> {
    if !Path::new(BOOTED).is_dir() {
        return Ok(false);
    }
    let told = Tool::new("systemctl").args(["show", "--property=SystemState", "--value"]).run().await?;
    Ok(told.stdout.trim_ascii() == b"stopping")
}

/// "252.39-1~deb12u1", "v257.5", "249.11-0ubuntu3".
fn parse_version(text: &str) -> Option<u32> {
    let digits = text.strip_prefix('v').unwrap_or(text);
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Starts `launch` as a unit. Goes on to its end in a task of its own when the caller loses interest.
pub(super) async fn launch(bus: Arc<Bus>, launch: Launch, version: u32) -> Result<Process, LaunchError> {
    let program = launch.program.clone();
    let start = tokio::spawn(async move { start(&bus, &launch, version).await });
    start.await.unwrap_or_else(|join| Err(LaunchError::NotStarted { program, reason: join.to_string() }))
}

async fn start(bus: &Arc<Bus>, launch: &Launch, version: u32) -> Result<Process, LaunchError> {
    let not_started = |reason| LaunchError::NotStarted { program: launch.program.clone(), reason };
    let unit = unit_name(&launch.dir, &launch.name);
    let properties = plan_unit(launch, version).map_err(|e| not_started(e.to_string()))?;
    begin(launch)?;
    let note_path = note_path(&launch.dir, &launch.name);
    let boot_id = process::boot_id().map_err(prepare(&launch.name, note_path.clone()))?;
    let note = UnitNote { unit, program: launch.program.clone(), uid: launch.uid, boot_id };
    publish(&launch.name, &note_path, &note)?;
    let started =
        users::announce(launch.uid, launch.gid).map_err(|e| prepare(&launch.name, e.path)(e.source));
    let started = match started {
        Ok(()) => started_process(bus, launch, &note, &properties).await,
        Err(error) => Err(error),
    };
    // Also after a failure: a reference keeps a failed unit in systemd's memory.
    let _ = bus.release(&note.unit).await;
    if started.as_ref().is_err_and(|error| matches!(error, LaunchError::NotStarted { .. })) {
        // What may still be starting must not; a note stays only where that cannot be told.
        if end(bus, &note, END_DEADLINE).await.is_ok() {
            let _ = durable::remove_file(&note_path);
        }
    }
    started
}

async fn started_process(
    bus: &Bus,
    launch: &Launch,
    note: &UnitNote,
    properties: &super::unit::Properties,
) -> Result<Process, LaunchError> {
    let not_started = |reason| LaunchError::NotStarted { program: launch.program.clone(), reason };
    let words = || log_tail(&launch.dir, &launch.name);
    let job = bus.start(&note.unit, properties, START_DEADLINE).await.map_err(|e| not_started(chain(&e)))?;
    let ask = |source| LaunchError::Ask { unit: note.unit.clone(), source };
    let state = bus.state(&note.unit).await.map_err(ask)?;
    let Some(state) = state.filter(|_| job != "assert") else {
        return Err(not_started("its directory was taken away while it started".to_owned()));
    };
    if job != "done" {
        return Err(not_started(format!("{}: {}", why(&job, &state), words())));
    }
    let gone = || not_started(format!("it ended at once ({}): {}", why(&job, &state), words()));
    let identity =
        identify(note, &state).map_err(prepare(&launch.name, launch.program.clone()))?.ok_or_else(gone)?;
    publish(&launch.name, &identity_path(&launch.dir, &launch.name), &identity)?;
    Process::adopt(&identity)
        .map_err(|source| LaunchError::Watch { name: launch.name.clone(), source })?
        .ok_or_else(gone)
}

fn identify(note: &UnitNote, state: &UnitState) -> io::Result<Option<ProcessIdentity>> {
    match state.main_pid {
        0 => Ok(None),
        pid => process::identity_of(pid, &note.program, &state.cgroup),
    }
}

fn publish(name: &str, path: &Path, value: &impl Serialize) -> Result<(), LaunchError> {
    let bytes = serde_json::to_vec(value).map_err(|e| prepare(name, path.to_owned())(e.into()))?;
    // Bound to this boot of the host, so it need not survive a power cut; a killed agent does not lose it.
    durable::publish(path, &bytes, 0o600).map_err(|e| prepare(name, e.path)(e.source))
}

/// Why a unit did not start or did not live, in words. Numbers from 200 on: systemd.exec(5), "process exit codes".
fn why(job: &str, state: &UnitState) -> String {
    let step = match state.status {
        203 => "systemd could not execute it",
        209 => "systemd could not open its log",
        216 | 217 => {
            "systemd does not know its user or group; install libnss-systemd, and see that the passwd line of /etc/nsswitch.conf names systemd"
        }
        226 => "systemd could not make its view of the file system; a path it needs is missing",
        228 => "systemd could not install its system call filter",
        _ => return format!("job {job}, {}, status {}", state.result, state.status),
    };
    format!("{step} (status {})", state.status)
}

/// The identity of the process behind a note whose agent was killed before it could write the identity down.
pub(super) async fn locate(
    bus: &Arc<Bus>,
    dir: &Path,
    name: &str,
    note: &UnitNote,
) -> Result<Option<ProcessIdentity>, LaunchError> {
    let boot_id = process::boot_id().map_err(prepare(name, note_path(dir, name)))?;
    if boot_id != note.boot_id {
        return Ok(None);
    }
    let ask = |source| LaunchError::Ask { unit: note.unit.clone(), source };
    let (bus, asked) = (bus.clone(), note.clone());
    let settled = tokio::spawn(async move { settled(&bus, &asked.unit).await });
    let Some(state) = settled.await.map_err(|_| ask(cut_off()))?.map_err(ask)? else { return Ok(None) };
    let identity = identify(note, &state).map_err(prepare(name, note.program.clone()))?;
    if let Some(identity) = &identity {
        publish(name, &identity_path(dir, name), identity)?;
    }
    Ok(identity)
}

/// The state of a unit that is not on its way any more.
async fn settled(bus: &Bus, unit: &str) -> Result<Option<UnitState>, BusError> {
    let end = Instant::now() + SETTLE_DEADLINE;
    loop {
        match bus.state(unit).await? {
            Some(state) if state.active == "activating" && Instant::now() < end => sleep(LONG_PAUSE).await,
            Some(state) if state.active == "activating" => {
                return Err(BusError::TimedOut { method: "the start of a unit", after: SETTLE_DEADLINE });
            }
            state => return Ok(state),
        }
    }
}

/// Ends the unit of a note, waits until nothing is left of it, and withdraws its user.
pub(super) async fn end(bus: &Arc<Bus>, note: &UnitNote, deadline: Duration) -> Result<(), EndError> {
    let (bus, unit) = (bus.clone(), note.unit.clone());
    if process::boot_id().is_ok_and(|boot_id| boot_id == note.boot_id) {
        let ending = tokio::spawn(async move { end_unit(&bus, unit, deadline).await });
        let cut_off = |_| EndError::Unit { unit: note.unit.clone(), source: cut_off() };
        ending.await.map_err(cut_off)??;
    }
    // A record that stays is a name for a number that nobody uses, until the next boot.
    let _ = users::withdraw(note.uid);
    Ok(())
}

async fn end_unit(bus: &Bus, unit: String, deadline: Duration) -> Result<(), EndError> {
    let late = Instant::now() + deadline;
    let mut again = Instant::now();
    loop {
        let state = match bus.state(&unit).await {
            Ok(None) => return Ok(()),
            Ok(Some(state)) => state,
            Err(source) => return Err(EndError::Unit { unit, source }),
        };
        if matches!(state.active.as_str(), "inactive" | "failed") && is_empty(&state.cgroup) {
            return Ok(());
        }
        let now = Instant::now();
        if now >= late {
            return Err(EndError::StillThere { unit, after: deadline });
        }
        if now >= again {
            again = now + END_PERIOD;
            // Without patience: the caller has decided. A stop would ask the program first.
            let _ = bus.kill(&unit).await;
            // A unit that has no process yet has nothing to kill; the stop takes its start back.
            if state.active == "activating"
                && let Err(source) = bus.stop(&unit).await
            {
                return Err(EndError::Unit { unit, source });
            }
        }
        sleep(SHORT_PAUSE).await;
    }
}

/// Whether a control group has no process, cgroups(7). One that systemd has removed has none.
fn is_empty(cgroup: &str) -> bool {
    let events = |root: &&str| fs::read_to_string(format!("{root}{cgroup}/cgroup.events"));
    cgroup.is_empty()
        || !CGROUPS.iter().filter_map(|root| events(root).ok()).any(|text| text.contains("populated 1"))
}

fn cut_off() -> BusError {
    BusError::TimedOut { method: "a question: the agent is ending", after: Duration::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_every_distribution() {
        let table = [
            ("252.39-1~deb12u1", Some(252)),
            ("249.11-0ubuntu3.12", Some(249)),
            ("v257.5", Some(257)),
            ("255 (255.4-1ubuntu8)", Some(255)),
            ("", None),
            ("systemd", None),
        ];
        for (text, version) in table {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }
}
