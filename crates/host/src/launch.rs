//! Starting processes that outlive the agent. Owns the hand-over to the shim (see `shim`) and the identity file by which
//! a later agent finds the process again.
//!
//! ```text
//! agent ──spawn──▶ shim ──writes <name>.process.json, drops privileges, exec──▶ the program (same pid)
//!       ◀── report pipe: closed by exec = started, text = why not ──
//! ```
//! The identity file exists before the program runs, so an agent killed at any moment leaves no process that its
//! successor cannot find. A successor that wants to be sure nothing starts any more renames the directory first: the
//! shim then cannot write the file and gives up.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::process::{Process, ProcessError, ProcessIdentity};

/// A program start is a matter of milliseconds; a host that takes longer than this has a problem worth reporting.
const START_DEADLINE: Duration = Duration::from_secs(10);

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
        /// The shim's words.
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
}

/// Starts processes. Today detached; the systemd launcher takes the same [`Launch`].
#[derive(Debug, Clone)]
pub struct Launcher {
    shim: PathBuf,
    shim_args: Vec<OsString>,
}

impl Launcher {
    /// Processes in sessions of their own. `shim` with `shim_args` is a command that calls [`crate::shim::main`].
    pub fn detached(shim: PathBuf, shim_args: Vec<OsString>) -> Self {
        Self { shim, shim_args }
    }

    /// Starts the process and waits until its program really runs.
    ///
    /// # Errors
    /// [`LaunchError`]; then nothing was started, or (`Watch`) the identity file tells what was.
    pub async fn launch(&self, launch: &Launch) -> Result<Process, LaunchError> {
        let (launcher, wanted) = (self.clone(), launch.clone());
        // fork and exec block, and the report pipe is read to its end: not on an async thread.
        let started = tokio::task::spawn_blocking(move || launcher.spawn(&wanted));
        let not_started =
            |reason: String| LaunchError::NotStarted { program: launch.program.clone(), reason };
        match tokio::time::timeout(START_DEADLINE, started).await {
            Ok(Ok(result)) => result?,
            Ok(Err(join)) => return Err(not_started(join.to_string())),
            Err(_) => return Err(not_started(format!("no sign of life for {START_DEADLINE:?}"))),
        }
        let gone = || {
            not_started(format!("it ended at once; see {}", log_path(&launch.dir, &launch.name).display()))
        };
        let identity = Self::find(&launch.dir, &launch.name)?.ok_or_else(gone)?;
        Process::adopt(&identity)
            .map_err(|source| LaunchError::Watch { name: launch.name.clone(), source })?
            .ok_or_else(gone)
    }

    /// The identity of the process that was started as `name` in `dir`, if one ever was. It may be gone by now.
    ///
    /// # Errors
    /// When the file is there and cannot be read or understood.
    pub fn find(dir: &Path, name: &str) -> Result<Option<ProcessIdentity>, LaunchError> {
        let path = identity_path(dir, name);
        let fail = |source| LaunchError::Prepare { name: name.to_owned(), path: path.clone(), source };
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| fail(e.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(fail(e)),
        }
    }

    fn spawn(&self, launch: &Launch) -> Result<(), LaunchError> {
        let prepare = |path: &Path| {
            let (name, path) = (launch.name.clone(), path.to_owned());
            move |source| LaunchError::Prepare { name, path, source }
        };
        let log = log_path(&launch.dir, &launch.name);
        // Append mode, so that a log can be trimmed while it is written.
        let log_file =
            File::options().append(true).create(true).mode(0o600).open(&log).map_err(prepare(&log))?;
        // An identity of an earlier incarnation must not be taken for this one's.
        crate::durable::remove_file(&identity_path(&launch.dir, &launch.name))
            .map_err(|e| prepare(&e.path.clone())(e.source))?;
        let mut child = Command::new(&self.shim)
            .args(&self.shim_args)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .spawn()
            .map_err(prepare(&self.shim))?;
        let wish = serde_json::to_vec(launch).map_err(|e| prepare(&launch.dir)(e.into()))?;
        let mut report = String::new();
        let spoken = (|| {
            child.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(&wish))?;
            child.stdout.take().map_or(Ok(0), |pipe| pipe.take(4096).read_to_string(&mut report))
        })();
        let reason = match spoken {
            Ok(_) if report.is_empty() => return Ok(()),
            Ok(_) => report,
            Err(e) => e.to_string(),
        };
        let _ = child.wait();
        // The shim has given up root by then and cannot take its file back itself.
        let _ = crate::durable::remove_file(&identity_path(&launch.dir, &launch.name));
        Err(LaunchError::NotStarted { program: launch.program.clone(), reason })
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
