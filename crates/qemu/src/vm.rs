//! One incarnation of a VM: a QEMU process with its QMP connection. Owns launching it, proving that it is the right
//! one, taking it over from an earlier agent, and ending it. Called by the task that owns the instance.
//!
//! ```text
//! VmLaunch ─exec─▶ LaunchedVm ─prove─▶ Vm ◀─adopt─ identity file of an earlier agent
//!                  (runs, not yet known          (pid, start time, boot, executable)
//!                   to be ours)
//! ```
//! A VM that does not answer is unresponsive: a finding, never a reason to end it. Nothing here ends a process but
//! [`Vm::kill`], and dropping a value leaves the process running.

mod confinement;
mod error;
pub mod paths;

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use qudata_host::{
    launch::{Ending, Launch, Launcher},
    process::{ExitReport, Process, ProcessError, ProcessIdentity},
    size::ByteSize,
};
use tokio::time::sleep;
use uuid::Uuid;

pub use self::error::{AdoptError, ConnectVmError, LaunchVmError, VmError};
use self::{confinement::plan_confinement, paths::VmPaths};
use crate::{
    argv::plan_argv,
    console::read_tail,
    machine::Machine,
    owned::Owner,
    qmp::{ConnectError, Qmp, QmpEvents, RunState, Vcpu},
    shutdown,
};

/// What an error shows of QEMU's own output.
const LOG_TAIL: u64 = 2000;
/// Pauses between two looks at the socket of a QEMU that is starting (40 ms on a fast machine, minutes with much
/// memory to pin): an eighth of the time waited so far, within these bounds.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// Between a QEMU that closes its sockets and the end of its process.
const END_GRACE: Duration = Duration::from_millis(500);

/// How to start the QEMU of a machine.
#[derive(Debug)]
pub struct VmLaunch<'a> {
    /// The hardware. Its socket paths must be those of `paths`.
    pub machine: &'a Machine,
    /// The run directory, created with [`VmPaths::create`].
    pub paths: &'a VmPaths,
    /// QEMU.
    pub program: PathBuf,
    /// The user QEMU runs as.
    pub owner: Owner,
    /// Supplementary groups, such as the one that may use `/dev/kvm`.
    pub groups: Vec<u32>,
    /// Niceness.
    pub nice: i32,
    /// Limit of open files.
    pub no_files: u64,
    /// The image below the disk, which QEMU reads.
    pub base_image: Option<PathBuf>,
    /// IOMMU groups of its GPUs.
    pub iommu_groups: Vec<u32>,
    /// Limit of locked memory, where GPUs pin the guest's RAM.
    pub memlock: Option<ByteSize>,
    /// A program that runs [`crate::shutdown::main`] when its first argument is [`crate::shutdown::COMMAND`]. Without it a
    /// guest loses its power when the host goes down.
    pub shutdown: Option<PathBuf>,
}

/// A QEMU that runs and has not yet been spoken to.
#[derive(Debug)]
pub struct LaunchedVm {
    process: Process,
    paths: VmPaths,
    uuid: Uuid,
    started: Instant,
}

/// A VM whose process is known; its QMP connection may be missing.
#[derive(Debug)]
pub struct Vm {
    process: Process,
    paths: VmPaths,
    uuid: Uuid,
    qmp: Option<Qmp>,
    events: Option<QmpEvents>,
    handshake: Option<Duration>,
}

/// What became of a VM that an earlier agent started.
#[derive(Debug)]
pub enum Adoption {
    /// The process is gone.
    Gone,
    /// It runs, it is the right one, and it answers.
    Running(Vm),
    /// It runs and does not answer; [`Vm::reconnect`] tries again.
    Unresponsive(Vm, ConnectVmError),
}

impl VmLaunch<'_> {
    /// Starts the QEMU process. It is stopped (`-S`) and executes nothing of the guest's yet.
    ///
    /// # Errors
    /// [`LaunchVmError::Start`].
    pub async fn exec(&self, launcher: &Launcher) -> Result<LaunchedVm, LaunchVmError> {
        let started = Instant::now();
        let launch = Launch {
            program: self.program.clone(),
            args: plan_argv(self.machine),
            uid: self.owner.uid,
            gid: self.owner.gid,
            groups: self.groups.clone(),
            dir: self.paths.dir().to_owned(),
            name: paths::QEMU.to_owned(),
            nice: self.nice,
            no_files: self.no_files,
            confinement: plan_confinement(self),
            ending: self.shutdown.clone().map(|program| Ending {
                program,
                args: vec![shutdown::COMMAND.into(), self.paths.power_socket().into()],
                patience: shutdown::PATIENCE,
                before: vec![paths::PASST.to_owned()],
            }),
        };
        let process = launcher.launch(&launch).await.map_err(LaunchVmError::Start)?;
        Ok(LaunchedVm { process, paths: self.paths.clone(), uuid: self.machine.uuid, started })
    }
}

impl LaunchedVm {
    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// Waits for QMP and proves that this process is this machine. `deadline` must grow with the memory that QEMU has
    /// to pin before it answers; the end of the process is noticed at once.
    ///
    /// # Errors
    /// [`LaunchVmError`].
    pub async fn prove(self, deadline: Duration) -> Result<Vm, LaunchVmError> {
        let socket = self.paths.qmp_socket();
        let pid = self.process.identity().pid;
        let proven = tokio::select! {
            biased;
            proven = connect_when_there(&socket, pid, self.uuid, deadline) => proven,
            report = self.process.exited() => {
                let report = report.map_err(LaunchVmError::Watch)?;
                return Err(ended(report, &self.paths));
            }
        };
        let (qmp, events) = match proven {
            Ok(connection) => connection,
            Err(error) => return Err(self.or_ended(error).await),
        };
        let handshake = Some(self.started.elapsed());
        let Self { process, paths, uuid, .. } = self;
        Ok(Vm { process, paths, uuid, qmp: Some(qmp), events: Some(events), handshake })
    }

    /// A connection that breaks because QEMU ends is seen a moment before the end itself.
    async fn or_ended(&self, error: ConnectVmError) -> LaunchVmError {
        match tokio::time::timeout(END_GRACE, self.process.exited()).await {
            Ok(Ok(report)) => ended(report, &self.paths),
            Ok(Err(_)) | Err(_) => LaunchVmError::Connect(error),
        }
    }
}

impl Vm {
    /// Starts QEMU and proves its identity: [`VmLaunch::exec`] and [`LaunchedVm::prove`] in one.
    ///
    /// # Errors
    /// [`LaunchVmError`].
    pub async fn launch(
        launcher: &Launcher,
        launch: &VmLaunch<'_>,
        deadline: Duration,
    ) -> Result<Self, LaunchVmError> {
        launch.exec(launcher).await?.prove(deadline).await
    }

    /// Takes over the VM `uuid` that an earlier agent started as `identity`.
    ///
    /// # Errors
    /// [`AdoptError`]; silence is no error but [`Adoption::Unresponsive`].
    pub async fn adopt(
        identity: &ProcessIdentity,
        paths: VmPaths,
        uuid: Uuid,
        deadline: Duration,
    ) -> Result<Adoption, AdoptError> {
        let Some(process) = Process::adopt(identity).map_err(AdoptError::Process)? else {
            return Ok(Adoption::Gone);
        };
        let mut vm = Self { process, paths, uuid, qmp: None, events: None, handshake: None };
        match vm.reconnect(deadline).await {
            Ok(()) => Ok(Adoption::Running(vm)),
            Err(error @ (ConnectVmError::Connect(_) | ConnectVmError::Identify(_))) => {
                // Silence because the process ended in the meantime is an end, not silence.
                match Process::adopt(identity).map_err(AdoptError::Process)? {
                    Some(_) => Ok(Adoption::Unresponsive(vm, error)),
                    None => Ok(Adoption::Gone),
                }
            }
            Err(error) => Err(AdoptError::Identity(error)),
        }
    }

    /// Replaces the QMP connection by a new one, with proof of identity. On failure there is none.
    ///
    /// # Errors
    /// [`ConnectVmError`].
    pub async fn reconnect(&mut self, deadline: Duration) -> Result<(), ConnectVmError> {
        // The old one first: QEMU serves one client.
        self.qmp = None;
        self.events = None;
        let pid = self.process.identity().pid;
        let (qmp, events) = connect(&self.paths.qmp_socket(), pid, self.uuid, deadline).await?;
        (self.qmp, self.events) = (Some(qmp), Some(events));
        Ok(())
    }

    /// Who its process is.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// Its run directory.
    #[must_use]
    pub fn paths(&self) -> &VmPaths {
        &self.paths
    }

    /// From the start of the launch to the proof of identity; `None` for an adopted VM.
    #[must_use]
    pub fn launch_took(&self) -> Option<Duration> {
        self.handshake
    }

    /// The QMP connection. `None`, or a closed one, means unresponsive.
    #[must_use]
    pub fn qmp(&self) -> Option<&Qmp> {
        self.qmp.as_ref()
    }

    /// The events of the present connection; for one taker, once per connection.
    pub fn take_events(&mut self) -> Option<QmpEvents> {
        self.events.take()
    }

    /// Waits until the process has ended. Cancel-safe.
    ///
    /// # Errors
    /// When the process cannot be watched.
    pub async fn exited(&self) -> Result<ExitReport, ProcessError> {
        self.process.exited().await
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn resume(&self) -> Result<(), VmError> {
        self.connection()?.cont().await.map_err(VmError::Qmp)
    }

    /// Stops the processors.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn pause(&self) -> Result<(), VmError> {
        self.connection()?.stop().await.map_err(VmError::Qmp)
    }

    /// Resets the machine; it boots again. A paused machine stays paused.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn reset(&self) -> Result<(), VmError> {
        self.connection()?.system_reset().await.map_err(VmError::Qmp)
    }

    /// What the machine is doing.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn run_state(&self) -> Result<RunState, VmError> {
        self.connection()?.query_status().await.map(|status| status.state).map_err(VmError::Qmp)
    }

    /// Its virtual processors and their threads, for [`Vm::pin`].
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn vcpus(&self) -> Result<Vec<Vcpu>, VmError> {
        self.connection()?.query_vcpus().await.map_err(VmError::Qmp)
    }

    /// Ends the process at once and waits until it is gone. Only for a VM whose instance is being deleted: the guest
    /// gets no warning, because its disk goes as well.
    ///
    /// # Errors
    /// When the kernel still holds the process at the deadline.
    pub async fn kill(&self, deadline: Duration) -> Result<(), ProcessError> {
        self.process.kill(deadline).await
    }

    fn connection(&self) -> Result<&Qmp, VmError> {
        self.qmp.as_ref().ok_or(VmError::Unresponsive)
    }
}

/// Connects as soon as the socket takes connections; before `deadline`, its absence is no error.
async fn connect_when_there(
    socket: &Path,
    pid: u32,
    uuid: Uuid,
    deadline: Duration,
) -> Result<(Qmp, QmpEvents), ConnectVmError> {
    let started = Instant::now();
    loop {
        let waited = started.elapsed();
        let left = deadline.saturating_sub(waited);
        match connect(socket, pid, uuid, left).await {
            // Not created yet, or created and not yet listening.
            Err(ConnectVmError::Connect(ConnectError::Connect { .. })) if !left.is_zero() => {
                sleep((waited / 8).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)).await;
            }
            done => return done,
        }
    }
}

async fn connect(
    socket: &Path,
    pid: u32,
    uuid: Uuid,
    deadline: Duration,
) -> Result<(Qmp, QmpEvents), ConnectVmError> {
    let started = Instant::now();
    let (qmp, events) = Qmp::connect(socket, deadline).await.map_err(ConnectVmError::Connect)?;
    if qmp.peer_pid() != Some(pid) {
        let (socket, found) = (socket.to_owned(), qmp.peer_pid());
        return Err(ConnectVmError::OtherProcess { socket, expected: pid, found });
    }
    let left = deadline.saturating_sub(started.elapsed());
    let found = qmp.query_uuid(left).await.map_err(ConnectVmError::Identify)?;
    if found != uuid {
        return Err(ConnectVmError::OtherMachine { socket: socket.to_owned(), expected: uuid, found });
    }
    Ok((qmp, events))
}

fn ended(report: ExitReport, paths: &VmPaths) -> LaunchVmError {
    // The error does not fail because the log cannot be read.
    let log = match read_tail(&paths.qemu_log(), LOG_TAIL) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(error) => format!("its log cannot be read: {error}"),
    };
    LaunchVmError::Ended { report, log }
}
