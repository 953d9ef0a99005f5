//! Runs the machine that customises an image to its end. Owns its process, its pipes and its deadlines; called by
//! `customise`. The process ends with this program, however that ends: it is no instance.

use std::{
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use qudata_qemu::{disk::Owner, machine::Accel};
use rustix::fs::{CWD, FileType, Mode};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{OpenOptions, Receiver},
    process::{Child, Command},
    time::{Instant, interval, sleep_until},
};

use crate::{
    build::Place,
    console_log::ConsoleLog,
    launch,
    machine::{Machine, plan_argv},
    report::Report,
    space::Room,
};

const READ: usize = 16 << 10;
/// How often the room on the disk is looked at.
const BEAT: Duration = Duration::from_secs(2);
const KILL: Duration = Duration::from_secs(20);
/// What QEMU prints when somebody ends it from outside: then its status is 0 as well.
const TERMINATED: &str = "terminating on signal";

/// One run, described.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) machine: &'a Machine<'a>,
    pub(crate) place: &'a Place,
    /// Longest time without a sign of life.
    pub(crate) silence: Duration,
    /// Longest time in all.
    pub(crate) longest: Duration,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) report: Report,
    /// None: the guest powered itself off.
    pub(crate) ill: Option<String>,
    /// Last lines of the log.
    pub(crate) tail: Vec<String>,
}

/// The machine could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A pipe could not be made.
    #[error("cannot make the pipe {}", path.display())]
    Pipe {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log cannot be written.
    #[error("cannot write the log {}", path.display())]
    Log {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU could not be started.
    #[error("cannot start {} through setpriv, choom and nice", qemu.display())]
    Start {
        /// The program.
        qemu: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU cannot be waited for, or does not die.
    #[error("the machine's process cannot be ended")]
    Wait(#[source] io::Error),
}

/// Runs it; `stepped` gets the name of each step as it begins.
pub(crate) async fn boot(wish: &Boot<'_>, stepped: &mut dyn FnMut(&str)) -> Result<Ended, BootError> {
    let log = ConsoleLog::create(&wish.place.log);
    let log = log.map_err(|source| BootError::Log { path: wish.place.log.clone(), source })?;
    let pipes = wish.machine.pipes;
    let mut run = Run {
        console: pipe(&pipes.console, wish.place.user)?,
        script: pipe(&pipes.log, wish.place.user)?,
        words: pipe(&pipes.report, wish.place.user)?,
        report: Report::default(),
        log,
    };
    let mut child = start(wish)?;
    let mut stderr = child.stderr.take();
    let mut said = Vec::new();
    let ill = {
        let listen = async {
            if let Some(pipe) = &mut stderr {
                // What it says is for people; that it cannot be read changes nothing.
                let _ = pipe.take(64 << 10).read_to_end(&mut said).await;
            }
            child.wait().await
        };
        tokio::pin!(listen);
        run.watch(wish, listen, stepped).await?
    };
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    if !said.is_empty() {
        run.keep(format!("\nqemu: {said}\n").as_bytes())?;
    }
    let ill = match ill {
        Watched::Late(reason) => {
            tokio::time::timeout(KILL, child.kill())
                .await
                .unwrap_or_else(|late| Err(io::Error::new(io::ErrorKind::TimedOut, late)))
                .map_err(BootError::Wait)?;
            Some(reason)
        }
        Watched::Exited(status) if status.success() && !said.contains(TERMINATED) => None,
        Watched::Exited(status) => Some(format!("was ended from outside or failed ({status})")),
    };
    run.drain(stepped)?;
    Ok(Ended { tail: run.log.tail(), report: run.report, ill })
}

fn start(wish: &Boot<'_>) -> Result<Child, BootError> {
    // The group matters only to another user: root opens everything.
    let mut command = Command::new(launch::PROGRAM);
    command.args(launch::plan_args(wish.place.user, kvm_group(wish.machine.accel)));
    command.arg(&wish.place.qemu).args(plan_argv(wish.machine));
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command.spawn().map_err(|source| BootError::Start { qemu: wish.place.qemu.clone(), source })
}

/// The group that may open /dev/kvm.
fn kvm_group(accel: Accel) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    match accel {
        Accel::Kvm => std::fs::metadata("/dev/kvm").ok().map(|found| found.gid()),
        Accel::Tcg => None,
    }
}

fn pipe(path: &Path, user: Option<Owner>) -> Result<Receiver, BootError> {
    let failed = |source| BootError::Pipe { path: path.to_owned(), source };
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
        .map_err(|error| failed(error.into()))?;
    if let Some(user) = user {
        std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)).map_err(failed)?;
    }
    // Also for writing: otherwise it is at its end until QEMU opens it.
    OpenOptions::new().read_write(true).open_receiver(path).map_err(failed)
}

enum Watched {
    Exited(ExitStatus),
    Late(String),
}

struct Run {
    console: Receiver,
    script: Receiver,
    words: Receiver,
    report: Report,
    log: ConsoleLog,
}

impl Run {
    async fn watch(
        &mut self,
        wish: &Boot<'_>,
        mut exit: impl Future<Output = io::Result<ExitStatus>> + Unpin,
        stepped: &mut dyn FnMut(&str),
    ) -> Result<Watched, BootError> {
        let end = Instant::now() + wish.longest;
        let mut quiet = Instant::now() + wish.silence;
        let (mut console, mut script, mut words) = ([0; READ], [0; READ], [0; READ]);
        let mut beat = interval(BEAT);
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    // What it writes is foreseen only about; renters' machines would be paused for lack of room.
                    if Room::observe(wish.place).is_ok_and(|room| room.is_used_up()) {
                        return Ok(Watched::Late("was taking the room of instances' disks".to_owned()));
                    }
                    continue;
                }
                status = &mut exit => return status.map(Watched::Exited).map_err(BootError::Wait),
                read = self.console.read(&mut console) => {
                    let length = read.map_err(BootError::Wait)?;
                    self.keep(console.get(..length).unwrap_or_default())?;
                }
                read = self.script.read(&mut script) => {
                    let length = read.map_err(BootError::Wait)?;
                    self.keep(script.get(..length).unwrap_or_default())?;
                }
                read = self.words.read(&mut words) => {
                    let length = read.map_err(BootError::Wait)?;
                    self.hear(words.get(..length).unwrap_or_default(), stepped);
                }
                () = sleep_until(quiet) => {
                    return Ok(Watched::Late(format!("said nothing for {} min", wish.silence.as_secs() / 60)));
                }
                () = sleep_until(end) => {
                    return Ok(Watched::Late(format!("was not done after {} min", wish.longest.as_secs() / 60)));
                }
            }
            quiet = Instant::now() + wish.silence;
        }
    }

    /// What lies in the pipes when the machine is gone.
    fn drain(&mut self, stepped: &mut dyn FnMut(&str)) -> Result<(), BootError> {
        let mut buffer = [0; READ];
        while let Ok(length @ 1..) = self.words.try_read(&mut buffer) {
            self.hear(buffer.get(..length).unwrap_or_default(), stepped);
        }
        while let Ok(length @ 1..) = self.script.try_read(&mut buffer) {
            self.keep(buffer.get(..length).unwrap_or_default())?;
        }
        while let Ok(length @ 1..) = self.console.try_read(&mut buffer) {
            self.keep(buffer.get(..length).unwrap_or_default())?;
        }
        Ok(())
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), BootError> {
        self.log.add(bytes).map_err(|source| BootError::Log { path: self.log.path().to_owned(), source })
    }

    fn hear(&mut self, bytes: &[u8], stepped: &mut dyn FnMut(&str)) {
        if self.report.add(bytes)
            && let Some(step) = &self.report.step
        {
            stepped(step);
        }
    }
}
