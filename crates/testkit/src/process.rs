//! Processes as a bystander sees them in /proc: who they are, whose they are, what they use. Called by `leakcheck` for
//! its snapshots and by tests that must know that a VM's process was not touched.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// One process at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot; with the pid it names one process for ever.
    pub start_ticks: u64,
    /// Real user id.
    pub uid: u32,
    /// Parent.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// State letter of /proc: `R`, `S`, `T` (stopped), `Z` (dead, not collected).
    pub state: char,
    /// Short name.
    pub name: String,
    /// Executable, where it can be read.
    pub exe: Option<PathBuf>,
    /// Arguments.
    pub args: Vec<String>,
    /// CPU time used so far.
    pub cpu: Duration,
}

impl Seen {
    /// All processes of this machine.
    ///
    /// # Errors
    /// When /proc cannot be listed.
    pub fn all() -> io::Result<Vec<Self>> {
        let pids = fs::read_dir("/proc")?
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
        Ok(pids.filter_map(Self::of).collect())
    }

    /// The process `pid`, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let stat = fs::read_to_string(dir.join("stat")).ok()?;
        // The name stands in brackets and may hold anything, brackets too.
        let (open, close) = (stat.find('(')?, stat.rfind(')')?);
        let name = stat.get(open + 1..close)?.to_owned();
        let fields: Vec<&str> = stat.get(close + 2..)?.split(' ').collect();
        let number = |n: usize| fields.get(n)?.parse::<u64>().ok();
        let id = |n: usize| u32::try_from(number(n)?).ok();
        let ticks = number(11)? + number(12)?;
        Some(Self {
            pid,
            start_ticks: number(19)?,
            uid: real_uid(&dir)?,
            parent: id(1)?,
            group: id(2)?,
            session: id(3)?,
            state: fields.first()?.chars().next()?,
            name,
            exe: fs::read_link(dir.join("exe")).ok(),
            args: arguments(&dir),
            cpu: Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()),
        })
    }

    /// What names this process and no other.
    pub fn identity(&self) -> (u32, u64) {
        (self.pid, self.start_ticks)
    }

    /// The same process now; none when it is gone, even if its pid lives on.
    pub fn now(&self) -> Option<Self> {
        Self::of(self.pid).filter(|other| other.start_ticks == self.start_ticks)
    }

    /// Whether it still exists and is not just waiting to be collected.
    pub fn is_alive(&self) -> bool {
        self.now().is_some_and(|seen| seen.state != 'Z')
    }

    /// Whether the file name of its executable starts with `prefix`.
    pub fn runs(&self, prefix: &str) -> bool {
        let file = self.exe.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        file.is_some_and(|name| name.starts_with(prefix))
    }

    /// Sends a signal; `false` when the process was gone.
    pub fn signal(&self, signal: Signal) -> bool {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        self.now().is_some() && pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// Its environment as it was at the start; empty when it cannot be read.
    pub fn environment(&self) -> Vec<u8> {
        fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default()
    }
}

fn real_uid(dir: &Path) -> Option<u32> {
    let status = fs::read_to_string(dir.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn arguments(dir: &Path) -> Vec<String> {
    let bytes = fs::read(dir.join("cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.split('\0').filter(|arg| !arg.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn this_process_is_seen_as_it_is() {
        let me = Seen::of(std::process::id()).unwrap();
        assert_eq!(me.exe, std::env::current_exe().ok());
        assert_eq!(me.uid, rustix::process::getuid().as_raw());
        assert!(me.is_alive() && Seen::all().unwrap().iter().any(|p| p.identity() == me.identity()));
    }

    #[test]
    fn a_stopped_and_a_dead_process_are_told_from_a_living_one() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let seen = Seen::of(child.id()).unwrap();
        assert!(seen.is_alive() && seen.signal(Signal::STOP));
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while seen.now().unwrap().state != 'T' {
            assert!(std::time::Instant::now() < deadline, "SIGSTOP had no effect");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!seen.is_alive() && !seen.signal(Signal::CONT));
    }
}
