//! Starting processes without systemd: through the shim, in a session of their own. Called by [`super::Launcher`].
//!
//! ```text
//! agent ──spawn──▶ shim ──writes <name>.process.json, drops privileges, exec──▶ the program (same pid)
//!       ◀── report pipe: closed by exec = started, text = why not ──
//! ```
//! Of a launch's confinement only the limit of locked memory is kept; the rest takes systemd.

use std::{
    ffi::OsString,
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use super::{Launch, LaunchError, Launcher, identity_path, log_tail, prepare};
use crate::process::Process;

/// A program start is a matter of milliseconds; a host that takes longer than this has a problem worth reporting.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// A command that calls [`crate::shim::main`].
#[derive(Debug, Clone)]
pub(super) struct Detached {
    pub(super) shim: PathBuf,
    pub(super) shim_args: Vec<OsString>,
}

impl Detached {
    /// Starts the process and waits until its program really runs.
    pub(super) async fn launch(&self, launch: &Launch) -> Result<Process, LaunchError> {
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
        let gone = || not_started(format!("it ended at once: {}", log_tail(&launch.dir, &launch.name)));
        let identity = Launcher::find(&launch.dir, &launch.name)?.ok_or_else(gone)?;
        Process::adopt(&identity)
            .map_err(|source| LaunchError::Watch { name: launch.name.clone(), source })?
            .ok_or_else(gone)
    }

    fn spawn(&self, launch: &Launch) -> Result<(), LaunchError> {
        let log_file = super::begin(launch)?;
        let failed = |path: PathBuf| prepare(&launch.name, path);
        let mut child = Command::new(&self.shim)
            .args(&self.shim_args)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .spawn()
            .map_err(failed(self.shim.clone()))?;
        let wish = serde_json::to_vec(launch).map_err(|e| failed(launch.dir.clone())(e.into()))?;
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
