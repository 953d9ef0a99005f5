//! Long-lived processes that are not tied to the agent: who they are, adopting them, waiting for them, ending them.
//!
//! A process is named by pid, start time and boot id, held by a pidfd, and double-checked by its executable.
//! Never by a command line or a name pattern: the original killed whatever mentioned its socket path.
//! Dropping a [`Process`] does nothing to the process.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// What tells one process from every other, also across reboots and pid reuse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat`, proc(5).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` of the boot it was started in.
    pub boot_id: String,
    /// The program it runs.
    pub exe: PathBuf,
    /// The launcher program it was until it executed `exe`.
    pub via: PathBuf,
    /// The control group of its unit, from the root of systemd's hierarchy; none when it was started without systemd.
    #[serde(default)]
    pub cgroup: Option<String>,
}

/// A signal we send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ask it to end.
    Term,
    /// End it.
    Kill,
    /// Freeze it.
    Stop,
    /// Let a frozen one go on.
    Cont,
}

/// How a process ended, as far as it can be known: only its parent is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitReport {
    /// Exit code, when it ended by itself and we were its parent.
    pub code: Option<i32>,
    /// Signal number, when one ended it and we were its parent.
    pub signal: Option<i32>,
}

impl std::fmt::Display for ExitReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit status {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => f.write_str("unknown status"),
        }
    }
}

/// An operation on a process failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt} process {pid}")]
pub struct ProcessError {
    /// What was tried, as a verb.
    pub attempt: &'static str,
    /// On which process.
    pub pid: u32,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// A running (or just ended) process that we may wait for and signal without any risk of hitting another one.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    fd: AsyncFd<OwnedFd>,
    ended: OnceLock<ExitReport>,
}

impl Process {
    /// Takes hold of the process with this identity. `None`: it is gone (ended, another boot, or its pid now belongs to
    /// another process). Needs a tokio runtime.
    ///
    /// # Errors
    /// When `/proc` or the pidfd refuses for a reason other than absence.
    pub fn adopt(identity: &ProcessIdentity) -> Result<Option<Self>, ProcessError> {
        let fail = |attempt| {
            let pid = identity.pid;
            move |source| ProcessError { attempt, pid, source }
        };
        if boot_id().map_err(fail("read the boot id for"))? != identity.boot_id {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(fail("open a pidfd of")(errno.into())),
        };
        // The pidfd is taken first: if what /proc says afterwards matches, the fd is of that very process.
        match observe(identity.pid) {
            Ok(Some(seen)) if seen.is(identity) => {}
            Ok(Some(seen)) if seen.zombie && seen.start_ticks == identity.start_ticks => {
                // Ended while nobody watched. If it was our child, nobody else will ever take its status.
                let _ = waitid(WaitId::PidFd(fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                return Ok(None);
            }
            Ok(_) => return Ok(None),
            Err(source) => return Err(fail("identify")(source)),
        }
        let fd = watch(fd).map_err(fail("watch"))?;
        Ok(Some(Self { identity: identity.clone(), fd, ended: OnceLock::new() }))
    }

    /// Who it is.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Waits until the process has ended. Cancel-safe; any number of tasks may wait.
    ///
    /// # Errors
    /// When the runtime cannot watch the pidfd.
    pub async fn exited(&self) -> Result<ExitReport, ProcessError> {
        let ready = self.fd.readable().await;
        let mut guard = ready.map_err(|source| self.error("wait for", source))?;
        // The pidfd stays readable for ever once the process has ended.
        guard.retain_ready();
        Ok(*self.ended.get_or_init(|| self.reap()))
    }

    fn reap(&self) -> ExitReport {
        // ECHILD when it was adopted: then init reaps it and its status is not for us.
        match waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
        {
            Ok(Some(status)) => {
                ExitReport { code: status.exit_status(), signal: status.terminating_signal() }
            }
            Ok(None) | Err(_) => ExitReport::default(),
        }
    }

    /// Sends a signal. A process that has already ended is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        let number = match signal {
            Signal::Term => rustix::process::Signal::TERM,
            Signal::Kill => rustix::process::Signal::KILL,
            Signal::Stop => rustix::process::Signal::STOP,
            Signal::Cont => rustix::process::Signal::CONT,
        };
        match pidfd_send_signal(self.fd.get_ref(), number) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(self.error("signal", errno.into())),
        }
    }

    /// SIGKILL, then waits until it is really gone.
    ///
    /// # Errors
    /// `TimedOut` when the kernel still holds it at the deadline (a process in uninterruptible sleep).
    pub async fn kill(&self, deadline: Duration) -> Result<(), ProcessError> {
        self.signal(Signal::Kill)?;
        match tokio::time::timeout(deadline, self.exited()).await {
            Ok(result) => result.map(|_| ()),
            Err(_) => {
                Err(self.error("end", io::Error::new(io::ErrorKind::TimedOut, "still alive after SIGKILL")))
            }
        }
    }

    fn error(&self, attempt: &'static str, source: io::Error) -> ProcessError {
        ProcessError { attempt, pid: self.identity.pid, source }
    }
}

#[allow(
    deprecated,
    reason = "unsound for arbitrary AsRawFd types only; an OwnedFd stays open while it is registered"
)]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

/// The identity of process `pid`, which runs `exe` in the control group `cgroup`. `None` when it is gone.
pub(crate) fn identity_of(pid: u32, exe: &Path, cgroup: &str) -> io::Result<Option<ProcessIdentity>> {
    let Some(seen) = observe(pid)?.filter(|seen| !seen.zombie) else { return Ok(None) };
    let identity = ProcessIdentity {
        pid,
        start_ticks: seen.start_ticks,
        boot_id: boot_id()?,
        exe: fs::canonicalize(exe)?,
        via: PathBuf::new(),
        cgroup: Some(cgroup.to_owned()),
    };
    Ok(seen.is(&identity).then_some(identity))
}

/// The identity this very process would have after executing `exe`; called by the launcher shim.
pub(crate) fn identity_of_self(exe: &Path) -> io::Result<ProcessIdentity> {
    let pid = std::process::id();
    let seen = observe(pid)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok(ProcessIdentity {
        pid,
        start_ticks: seen.start_ticks,
        boot_id: boot_id()?,
        // /proc shows the resolved path, and Debian has more than one name for it (/bin is a link).
        exe: fs::canonicalize(exe)?,
        via: seen.exe,
        cgroup: None,
    })
}

struct Observed {
    start_ticks: u64,
    exe: PathBuf,
    zombie: bool,
    cgroup: Option<String>,
}

impl Observed {
    fn is(&self, identity: &ProcessIdentity) -> bool {
        // A process that is dying loses its executable before it becomes a zombie; until then it holds its files.
        let dying = self.exe.as_os_str().is_empty();
        !self.zombie
            && self.start_ticks == identity.start_ticks
            && (dying || is_program(&self.exe, &identity.exe) || self.exe == identity.via)
            // A process cannot leave the group of its unit; one that is dying may have lost it.
            && (dying || identity.cgroup.is_none() || self.cgroup == identity.cgroup)
    }
}

/// Some programs execute a variant of themselves for the processor at hand: passt becomes `passt.avx2`.
fn is_program(seen: &Path, expected: &Path) -> bool {
    let variant = || {
        let (seen_name, name) = (seen.file_name()?.to_str()?, expected.file_name()?.to_str()?);
        let suffix = seen_name.strip_prefix(name)?.strip_prefix('.')?;
        Some(seen.parent() == expected.parent() && !suffix.is_empty())
    };
    seen == expected || variant().unwrap_or(false)
}

/// `None` when there is no such process.
fn observe(pid: u32) -> io::Result<Option<Observed>> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let stat = match fs::read_to_string(proc.join("stat")) {
        Ok(stat) => stat,
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(3) => return Ok(None),
        Err(e) => return Err(e),
    };
    let (state, start_ticks) = parse_stat(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc stat line"))?;
    let exe = match fs::read_link(proc.join("exe")) {
        Ok(exe) => without_deleted_mark(exe),
        // A zombie has none any more, nor has a process that is about to become one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => PathBuf::new(),
        Err(e) => return Err(e),
    };
    let cgroup = fs::read_to_string(proc.join("cgroup")).ok().as_deref().and_then(parse_cgroup);
    Ok(Some(Observed { start_ticks, exe, zombie: matches!(state, 'Z' | 'X'), cgroup }))
}

/// State (field 3) and start time (field 22). The name in field 2 may hold spaces and parentheses, so the search starts
/// behind its last one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The path in the hierarchy that systemd keeps its units in: the unified one, or the one named after it.
fn parse_cgroup(text: &str) -> Option<String> {
    let path = |prefix: &str| {
        text.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(prefix).map(str::to_owned))
    };
    path("name=systemd:").or_else(|| path(":"))
}

/// A program that was upgraded while it ran shows as `/usr/bin/x (deleted)`; it is still that program.
fn without_deleted_mark(exe: PathBuf) -> PathBuf {
    match exe.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(text) => PathBuf::from(text),
        None => exe,
    }
}

/// The id of this boot of the kernel.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, ProcessIdentity) {
        let child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        // Wait until exec is done, so that /proc shows sleep and not this test.
        let exe = fs::canonicalize("/bin/sleep").unwrap();
        let seen = loop {
            let seen = observe(child.id()).unwrap().unwrap();
            if seen.exe == exe {
                break seen;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let identity = ProcessIdentity {
            pid: child.id(),
            start_ticks: seen.start_ticks,
            boot_id: boot_id().unwrap(),
            exe,
            via: PathBuf::new(),
            cgroup: None,
        };
        (child, identity)
    }

    #[tokio::test]
    async fn adopt_wait_and_kill() {
        let (_child, identity) = sleeper();
        let process = Process::adopt(&identity).unwrap().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(30), process.exited()).await.is_err());
        process.kill(Duration::from_secs(5)).await.unwrap();
        assert_eq!(process.exited().await.unwrap().signal, Some(9));
        process.signal(Signal::Term).unwrap();
        assert!(Process::adopt(&identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn dropping_a_process_leaves_it_alive() {
        let (mut child, identity) = sleeper();
        drop(Process::adopt(&identity).unwrap().unwrap());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_child_that_ended_unwatched_is_reaped() {
        let (mut child, identity) = sleeper();
        rustix::process::kill_process(Pid::from_child(&child), rustix::process::Signal::KILL).unwrap();
        while observe(identity.pid).unwrap().is_some_and(|seen| !seen.zombie) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(Process::adopt(&identity).unwrap().is_none());
        assert!(child.try_wait().is_err(), "nothing is left to wait for");
    }

    #[tokio::test]
    async fn a_dying_process_is_not_taken_for_gone() {
        for _ in 0..100 {
            let (mut child, identity) = sleeper();
            rustix::process::kill_process(Pid::from_child(&child), rustix::process::Signal::KILL).unwrap();
            if let Some(process) = Process::adopt(&identity).unwrap() {
                process.exited().await.unwrap();
            }
            assert!(child.try_wait().is_err(), "ended and reaped, whenever it was looked at");
        }
    }

    // orig-L6: identity by command line let pid reuse kill a stranger.
    #[tokio::test]
    async fn a_reused_pid_is_another_process() {
        let (mut child, identity) = sleeper();
        let impostors = [
            ProcessIdentity { start_ticks: identity.start_ticks + 1, ..identity.clone() },
            ProcessIdentity { boot_id: "another boot".into(), ..identity.clone() },
            ProcessIdentity { exe: "/usr/bin/qemu-system-x86_64".into(), ..identity.clone() },
            ProcessIdentity { cgroup: Some("/qudata.slice/other.service".into()), ..identity.clone() },
            ProcessIdentity { pid: 0, ..identity.clone() },
            ProcessIdentity { pid: u32::MAX, ..identity.clone() },
        ];
        for other in impostors {
            assert!(Process::adopt(&other).unwrap().is_none(), "{other:?}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn stat_lines_with_hostile_names() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0";
        for name in ["(a)", "(a b)", "(a) R 1 (b)", "())"] {
            assert_eq!(parse_stat(&format!("77 {name} {tail}")), Some(('S', 4242)), "{name}");
        }
        assert_eq!(parse_stat("77 (a) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn the_control_group_of_both_hierarchies() {
        let unit = Some("/qudata.slice/a.service".to_owned());
        assert_eq!(parse_cgroup("0::/qudata.slice/a.service\n"), unit);
        let old = "12:pids:/x\n1:name=systemd:/qudata.slice/a.service\n0::/y\n";
        assert_eq!(parse_cgroup(old), unit);
        assert_eq!(parse_cgroup("12:pids:/x\n"), None);
        assert_eq!(parse_cgroup(""), None);
    }

    #[test]
    fn a_variant_beside_the_program_is_the_program() {
        let passt = Path::new("/usr/bin/passt");
        assert!(is_program(passt, passt) && is_program(Path::new("/usr/bin/passt.avx2"), passt));
        for other in ["/usr/bin/passtx", "/usr/bin/passt.", "/tmp/passt.avx2", "/usr/bin/pasta"] {
            assert!(!is_program(Path::new(other), passt), "{other}");
        }
    }

    #[test]
    fn an_upgraded_program_keeps_its_name() {
        assert_eq!(without_deleted_mark("/usr/bin/q (deleted)".into()), Path::new("/usr/bin/q"));
        assert_eq!(without_deleted_mark("/usr/bin/q".into()), Path::new("/usr/bin/q"));
    }
}
