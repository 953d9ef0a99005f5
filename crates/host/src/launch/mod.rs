//! Starting processes that outlive the agent, finding them again, ending them. Owns the files by which a later agent
//! knows what an earlier one started; called by bring-up, recovery and teardown.
//!
//! ```text
//!             ┌─ detached ─▶ shim ─▶ the program, in a session of its own
//! Launch ─────┤
//!             └─ systemd ──▶ a transient unit in qudata.slice
//! <dir>/<name>.process.json   who runs: pid, start time, boot, program, control group
//! <dir>/<name>.unit.json      systemd only: the unit, written before systemd is asked to start it
//! <dir>/<name>.log            what it printed
//! ```
//! An agent killed at any moment leaves no process that its successor cannot find. Detached: the identity file exists
//! before the program runs. systemd: the name of the unit is on file before it exists, and systemd knows the process of
//! every unit. A successor that wants to be sure that nothing starts any more **renames the directory first**: the shim
//! then cannot write the file and gives up; a unit checks at its start that its directory is there, and one that started
//! before is ended by its name.

mod bus;
mod detached;
mod systemd;
mod unit;
mod users;

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::{bus::Bus, detached::Detached, systemd::UnitNote};
pub use self::{bus::BusError, systemd::SystemdError};
use crate::{
    command::ToolError,
    process::{Process, ProcessError, ProcessIdentity},
    size::ByteSize,
};

/// What an error shows of a program's own words.
const LOG_TAIL: u64 = 1000;

/// What to start and as whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// User it runs as; never root for a VM.
    pub uid: u32,
    /// Group it runs as.
    pub gid: u32,
    /// Supplementary groups, for example `kvm`.
    pub groups: Vec<u32>,
    /// Directory of the launch, owned by root and not writable by `uid`: holds `<name>.process.json` and `<name>.log`.
    pub dir: PathBuf,
    /// Short name, for example `qemu`.
    pub name: String,
    /// Niceness, 0 to 19.
    pub nice: i32,
    /// Limit of open files; the agent's own hard limit where that is lower.
    pub no_files: u64,
    /// What it may touch.
    pub confinement: Confinement,
    /// How it is asked to end; SIGTERM without. Only the systemd launcher knows the moment.
    #[serde(default)]
    pub ending: Option<Ending>,
}

/// What systemd does before it sends SIGTERM: when the host goes down, or somebody stops the unit by hand. Ending it by
/// [`Launcher::end`] asks nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Absolute path of a program that asks it to end. It runs as the same user in the same sandbox.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// How long that may take.
    pub patience: Duration,
    /// Names of launches in the same directory that are ended after it.
    pub before: Vec<String>,
}

/// What a program may touch beside its own memory. Kept whole by the systemd launcher; the detached one keeps `memlock`
/// and ignores the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// What people see in `systemctl status`.
    pub description: String,
    /// Device nodes it may open, for example `/dev/kvm`; it sees no other but those every program has.
    pub devices: Vec<PathBuf>,
    /// Files and directories it may write, where their owner and mode let it. They must exist; everything else is
    /// read-only.
    pub writable: Vec<PathBuf>,
    /// Files and directories it reads. Needed only below `/home`, `/root`, `/run/user`, `/tmp` and `/var/tmp`, of which
    /// it otherwise sees nothing; harmless elsewhere. `dir` is among them by itself.
    pub readable: Vec<PathBuf>,
    /// Limit of its memory, with page cache and kernel memory; none without.
    pub memory_max: Option<ByteSize>,
    /// Limit of locked memory, which VFIO needs for all of the guest's RAM; the host's default without.
    pub memlock: Option<ByteSize>,
    /// Limit of its threads; the host's default without.
    pub tasks_max: Option<u64>,
    /// It needs no network but unix sockets.
    pub private_network: bool,
    /// It shuts itself in with namespaces of its own, which it therefore may create.
    pub own_sandbox: bool,
    /// It writes the code it executes, as an emulator does.
    pub writes_code: bool,
}

/// A process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file of the launch could not be written or read.
    #[error("cannot prepare the start of {name}: {path}")]
    Prepare {
        /// Name of the launch.
        name: String,
        /// The path concerned.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program was not executed.
    #[error("{program} was not started: {reason}")]
    NotStarted {
        /// The program.
        program: PathBuf,
        /// The shim's or systemd's words.
        reason: String,
    },
    /// It started and could not be taken hold of.
    #[error("{name} was started and cannot be watched")]
    Watch {
        /// Name of the launch.
        name: String,
        /// Why.
        #[source]
        source: ProcessError,
    },
    /// systemd was asked about a unit and did not answer.
    #[error("systemd does not tell what became of {unit}")]
    Ask {
        /// The unit.
        unit: String,
        /// Why.
        #[source]
        source: BusError,
    },
}

/// What was started could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    /// What was started cannot be told.
    #[error("what was started cannot be told")]
    Find(#[source] LaunchError),
    /// The process refuses to end.
    #[error("the process does not end")]
    Process(#[source] ProcessError),
    /// systemd could not be asked to end the unit.
    #[error("systemd did not end {unit}")]
    Unit {
        /// The unit.
        unit: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// The unit has processes left at the deadline, usually in uninterruptible sleep.
    #[error("{unit} still has processes after {after:?}")]
    StillThere {
        /// The unit.
        unit: String,
        /// The deadline.
        after: Duration,
    },
}

/// Starts processes, detached or as units of systemd.
#[derive(Debug, Clone)]
pub struct Launcher {
    way: Way,
    // Also without systemd as the way: an earlier agent may have started units.
    bus: Arc<Bus>,
}

#[derive(Debug, Clone)]
enum Way {
    Detached(Detached),
    Systemd { version: u32 },
}

impl Launcher {
    /// Processes in sessions of their own. `shim` with `shim_args` is a command that calls [`crate::shim::main`].
    pub fn detached(shim: PathBuf, shim_args: Vec<OsString>) -> Self {
        Self { way: Way::Detached(Detached { shim, shim_args }), bus: Arc::default() }
    }

    /// Processes as transient units of systemd, confined as [`Launch::confinement`] says.
    ///
    /// # Errors
    /// When systemd does not run this host, is too old, does not answer on the system bus, or could start nothing as a
    /// user without an entry in `/etc/passwd`.
    pub async fn systemd() -> Result<Self, SystemdError> {
        let bus = Arc::<Bus>::default();
        let version = systemd::usable_version(&bus).await?;
        Ok(Self { way: Way::Systemd { version }, bus })
    }

    /// Whether the host is shutting down: what ends now was not ended by its tenant, nor by a fault. `false` where
    /// systemd does not run the host.
    ///
    /// # Errors
    /// When systemd runs it and does not tell.
    pub async fn host_is_going_down() -> Result<bool, ToolError> {
        systemd::is_stopping().await
    }

    /// The best way this host has: systemd, otherwise [`Launcher::detached`] with the reason why.
    pub async fn detect(shim: PathBuf, shim_args: Vec<OsString>) -> (Self, Option<SystemdError>) {
        match Self::systemd().await {
            Ok(launcher) => (launcher, None),
            Err(error) => (Self::detached(shim, shim_args), Some(error)),
        }
    }

    /// Whether what it starts is confined as [`Launch::confinement`] says.
    pub fn confines(&self) -> bool {
        matches!(self.way, Way::Systemd { .. })
    }

    /// Starts the process and waits until its program really runs.
    ///
    /// # Errors
    /// [`LaunchError`]; then nothing was started, or (`Watch`, `Ask`) the files of the launch tell what was.
    pub async fn launch(&self, launch: &Launch) -> Result<Process, LaunchError> {
        match &self.way {
            Way::Detached(detached) => detached.launch(launch).await,
            Way::Systemd { version } => systemd::launch(self.bus.clone(), launch.clone(), *version).await,
        }
    }

    /// What the identity file of `name` in `dir` says, if there is one. The process may be gone by now. An agent that
    /// takes over from another asks [`Launcher::locate`].
    ///
    /// # Errors
    /// When the file is there and cannot be read or understood.
    pub fn find(dir: &Path, name: &str) -> Result<Option<ProcessIdentity>, LaunchError> {
        read_json(name, &identity_path(dir, name))
    }

    /// The identity of the process that was started as `name` in `dir`, if one ever was, by whatever launcher, also when
    /// the agent was killed while it started. The process may be gone by now.
    ///
    /// # Errors
    /// When the files of the launch cannot be read, or systemd has to be asked and does not answer.
    pub async fn locate(&self, dir: &Path, name: &str) -> Result<Option<ProcessIdentity>, LaunchError> {
        if let Some(identity) = Self::find(dir, name)? {
            return Ok(Some(identity));
        }
        match UnitNote::read(dir, name)? {
            Some(note) => systemd::locate(&self.bus, dir, name, &note).await,
            None => Ok(None),
        }
    }

    /// Ends what was started as `name` in `dir`, at once, and waits until it is gone; absence is success. Rename `dir`
    /// before: then nothing can be started in it afterwards.
    ///
    /// # Errors
    /// [`EndError`]; it can be tried again.
    pub async fn end(&self, dir: &Path, name: &str, deadline: Duration) -> Result<(), EndError> {
        let identity = Self::find(dir, name).map_err(EndError::Find)?;
        let process = identity.map(|identity| Process::adopt(&identity)).transpose();
        if let Some(process) = process.map_err(EndError::Process)?.flatten() {
            process.kill(deadline).await.map_err(EndError::Process)?;
        }
        match UnitNote::read(dir, name).map_err(EndError::Find)? {
            Some(note) => systemd::end(&self.bus, &note, deadline).await,
            None => Ok(()),
        }
    }
}

/// Opens the log and removes what an earlier launch of this name left: its identity must not be taken for this one's.
fn begin(launch: &Launch) -> Result<File, LaunchError> {
    let log = log_path(&launch.dir, &launch.name);
    // Append mode, so that a log can be trimmed while it is written.
    let file = File::options().append(true).create(true).mode(0o600).open(&log);
    let file = file.map_err(prepare(&launch.name, log))?;
    for stale in [identity_path(&launch.dir, &launch.name), systemd::note_path(&launch.dir, &launch.name)] {
        crate::durable::remove_file(&stale).map_err(|e| prepare(&launch.name, e.path)(e.source))?;
    }
    Ok(file)
}

fn prepare(name: &str, path: PathBuf) -> impl FnOnce(io::Error) -> LaunchError {
    let name = name.to_owned();
    move |source| LaunchError::Prepare { name, path, source }
}

/// `None` when there is no such file.
fn read_json<T: serde::de::DeserializeOwned>(name: &str, path: &Path) -> Result<Option<T>, LaunchError> {
    match fs::read(path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|e| prepare(name, path.to_owned())(e.into()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(prepare(name, path.to_owned())(e)),
    }
}

/// The end of what a program printed, for an error.
fn log_tail(dir: &Path, name: &str) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log_path(dir, name))?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(end.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    match read() {
        Ok(words) if words.is_empty() => "it printed nothing".to_owned(),
        Ok(words) => words,
        Err(error) => format!("its log cannot be read: {error}"),
    }
}

/// Where the identity of the process `name` is kept.
pub fn identity_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.process.json"))
}

/// Where its standard output and error go.
pub fn log_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.log"))
}
