//! Logging in to a guest as a renter does: the system's ssh client, a key file, the host key pinned. Called by product
//! tests.
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
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
    port: u16,
}

impl Login {
    /// Pins `host_key` for `port` of this machine in a file in `dir`.
    pub fn new(dir: &Path, identity: &Path, port: u16, host_key: &str) -> Self {
        let known_hosts = dir.join(format!("known_hosts-{port}"));
        let line = format!("guest-{port} {host_key}\n");
        fs::write(&known_hosts, line).unwrap_or_else(|e| panic!("{}: {e}", known_hosts.display()));
        Self { identity: identity.to_owned(), known_hosts, port }
    }

    /// Runs a command as root in the guest.
    ///
    /// # Errors
    /// When ssh does not end in time. A refused login is an [`Output`] with status 255.
    pub fn try_run(&self, command: &str) -> io::Result<Output> {
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
        .args(["-o", &format!("HostKeyAlias=guest-{}", self.port)])
        .args(["-o", &format!("UserKnownHostsFile={}", self.known_hosts.display())])
        .args(["-p", &self.port.to_string(), "-i"])
        .arg(&self.identity)
        .args(["root@127.0.0.1", command]);
        tool::run(&mut ssh, DEADLINE)
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
