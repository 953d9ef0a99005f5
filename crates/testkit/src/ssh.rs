//! Logging in to a guest as a renter does: the system's ssh client, a key file, the host key pinned. Called by product
//! tests.
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::tool::{self, Output};

/// Logging in and a short command, in emulation on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A key pair in files.
#[derive(Debug, Clone)]
pub struct KeyPair {
    /// The private half's file.
    pub file: PathBuf,
    /// The public half, as one line.
    pub public: String,
}

impl KeyPair {
    /// Makes `<dir>/<name>` and `<dir>/<name>.pub`.
    pub fn make(dir: &Path, name: &str) -> Self {
        let file = dir.join(name);
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&file);
        let output = tool::run(&mut command, DEADLINE).unwrap_or_else(|e| panic!("ssh-keygen: {e}"));
        assert!(output.status.success(), "ssh-keygen: {}", output.stderr);
        let public = fs::read_to_string(file.with_extension("pub")).unwrap_or_else(|e| panic!("{e}"));
        Self { file, public: public.trim().to_owned() }
    }
}

/// A way into one guest.
#[derive(Debug, Clone)]
pub struct Login {
    identity: PathBuf,
    known_hosts: PathBuf,
    address: SocketAddr,
}

impl Login {
    /// Pins `host_key` for `port` of this machine in a file in `dir`.
    pub fn new(dir: &Path, identity: &Path, port: u16, host_key: &str) -> Self {
        Self::at(dir, identity, (Ipv4Addr::LOCALHOST, port).into(), host_key)
    }

    /// Pins `host_key` for the guest behind `address` in a file in `dir`.
    pub fn at(dir: &Path, identity: &Path, address: SocketAddr, host_key: &str) -> Self {
        let known_hosts = dir.join(format!("known_hosts-{}", address.port()));
        let line = format!("guest-{} {host_key}\n", address.port());
        fs::write(&known_hosts, line).unwrap_or_else(|e| panic!("{}: {e}", known_hosts.display()));
        Self { identity: identity.to_owned(), known_hosts, address }
    }

    fn command(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "ConnectTimeout=20",
        ])
        .args(["-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR", "-o", "GlobalKnownHostsFile=none"])
        .args(["-o", &format!("HostKeyAlias=guest-{}", self.address.port())])
        .args(["-o", &format!("UserKnownHostsFile={}", self.known_hosts.display())])
        .args(["-p", &self.address.port().to_string(), "-i"])
        .arg(&self.identity)
        .args([&format!("root@{}", self.address.ip()), command]);
        ssh
    }

    /// A session that stays open and says back every line it is told.
    #[track_caller]
    pub fn session(&self) -> Session {
        let child = self.command("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|e| panic!("ssh: {e}"));
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            panic!("ssh has no pipes")
        };
        let mut session = Session { child, to, from: BufReader::new(from) };
        session.talk("the first line");
        session
    }

    /// Runs a command as root in the guest.
    ///
    /// # Errors
    /// When ssh does not end in time. A refused login is an [`Output`] with status 255.
    pub fn try_run(&self, command: &str) -> io::Result<Output> {
        tool::run(&mut self.command(command), DEADLINE)
    }

    /// Runs a command as root in the guest that must succeed; its output.
    #[track_caller]
    pub fn run(&self, command: &str) -> String {
        match self.try_run(command) {
            Ok(output) if output.status.success() => output.stdout,
            Ok(output) => panic!("{command:?} in the guest ended with {}: {}", output.status, output.stderr),
            Err(e) => panic!("{command:?} in the guest: {e}"),
        }
    }

    /// Runs a command a second after this login has ended: one that takes the login's own ground away.
    #[track_caller]
    pub fn run_later(&self, command: &str) {
        self.run(&format!("setsid sh -c 'sleep 1; {command}' < /dev/null > /dev/null 2>&1 &"));
    }

    /// The guest must refuse this key.
    #[track_caller]
    pub fn assert_refused(&self) {
        let output = self.try_run("true").unwrap_or_else(|e| panic!("{e}"));
        let refused = output.status.code() == Some(255) && output.stderr.contains("Permission denied");
        assert!(refused, "the key was not refused: {output:?}");
    }
}

/// An open session. Dropping it ends it.
#[derive(Debug)]
pub struct Session {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Session {
    /// The guest must say back what it is told; how long that took.
    #[track_caller]
    pub fn talk(&mut self, words: &str) -> Duration {
        let start = Instant::now();
        let told = writeln!(self.to, "{words}").and_then(|()| self.to.flush());
        told.unwrap_or_else(|e| panic!("the session takes no more words: {e}"));
        let mut back = String::new();
        let read = self.from.read_line(&mut back);
        read.unwrap_or_else(|e| panic!("the session cannot be read: {e}"));
        assert_eq!(back.trim_end(), words, "the session has ended, or says something else");
        start.elapsed()
    }

    /// Waits until the session has ended by itself.
    #[track_caller]
    pub fn wait_for_end(&mut self, within: Duration) {
        let until = Instant::now() + within;
        while matches!(self.child.try_wait(), Ok(None)) {
            assert!(Instant::now() < until, "the session is open after {within:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
