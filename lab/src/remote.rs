//! The way into the server: commands and files over one SSH connection. Called by everything that asks the server.
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qudata_testkit::tool::{self, Output};

/// How often a server that boots is tried.
const PAUSE: Duration = Duration::from_millis(500);
const CONNECT: Duration = Duration::from_secs(20);

/// A connection that many commands share: a login takes a second of an emulated processor, a command on an open
/// connection a tenth.
#[derive(Debug)]
pub(crate) struct Remote {
    port: u16,
    dir: PathBuf,
    master: Option<Child>,
}

impl Remote {
    /// A way to the server behind `port` of this machine; `dir` has the key `id` and `known_hosts`.
    pub(crate) fn new(dir: &Path, port: u16) -> Self {
        Self { port, dir: dir.to_owned(), master: None }
    }

    /// Words of an ssh command line, up to the host; `program` is ssh or scp, whose port options differ.
    fn options(&self, program: &str) -> Vec<String> {
        let mut words: Vec<String> = ["-F", "none", "-i"].map(str::to_owned).into();
        words.push(self.dir.join("id").display().to_string());
        for option in [
            "BatchMode=yes".to_owned(),
            "IdentitiesOnly=yes".to_owned(),
            "StrictHostKeyChecking=yes".to_owned(),
            "HostKeyAlias=lab-host".to_owned(),
            "GlobalKnownHostsFile=none".to_owned(),
            format!("UserKnownHostsFile={}", self.dir.join("known_hosts").display()),
            "LogLevel=ERROR".to_owned(),
            "ConnectTimeout=15".to_owned(),
            // A server that was reset says nothing more: notice it.
            "ServerAliveInterval=10".to_owned(),
            "ServerAliveCountMax=6".to_owned(),
            format!("ControlPath={}", self.dir.join("ssh").display()),
        ] {
            words.extend(["-o".to_owned(), option]);
        }
        words.extend([if program == "scp" { "-P" } else { "-p" }.to_owned(), self.port.to_string()]);
        words
    }

    /// Whether the SSH server says hello to a new connection.
    pub(crate) fn is_greeted(&self, within: Duration) -> bool {
        let connect = || {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(within))?;
            stream.read_exact(&mut [0; 4])
        };
        connect().is_ok()
    }

    /// The command line for a person.
    pub(crate) fn shown(&self) -> String {
        let key = self.dir.join("id");
        let hosts = self.dir.join("known_hosts");
        format!(
            "ssh -i {} -o HostKeyAlias=lab-host -o UserKnownHostsFile={} -p {} root@127.0.0.1",
            key.display(),
            hosts.display(),
            self.port
        )
    }

    /// Waits until somebody can log in, and keeps that connection.
    pub(crate) fn connect(&mut self, within: Duration, mut alive: impl FnMut() -> Result<()>) -> Result<()> {
        self.disconnect();
        let until = Instant::now() + within;
        loop {
            alive()?;
            match self.open_master() {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > until => {
                    return Err(error.context(format!("nobody can log in after {} s", within.as_secs())));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// A master of its own, because one that ssh puts into the background keeps the output of the first command open.
    fn open_master(&mut self) -> Result<()> {
        let mut ssh = Command::new("ssh");
        ssh.args(self.options("ssh")).args(["-o", "ControlMaster=yes", "-N", "root@127.0.0.1"]);
        ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut master = ssh.spawn().context("cannot start ssh")?;
        let until = Instant::now() + CONNECT;
        while master.try_wait()?.is_none() {
            if self.dir.join("ssh").exists() && self.run("true", CONNECT).is_ok_and(|o| o.status.success()) {
                self.master = Some(master);
                return Ok(());
            }
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = master.kill();
        let _ = master.wait();
        bail!("ssh to the server does not connect")
    }

    /// Gives the connection up, after the server was reset or before it ends.
    pub(crate) fn disconnect(&mut self) {
        if let Some(mut master) = self.master.take() {
            let _ = master.kill();
            let _ = master.wait();
        }
        let _ = std::fs::remove_file(self.dir.join("ssh"));
    }

    /// Runs a shell script there; an error is only that ssh did not end in time. What the script started there and did
    /// not wait for must not hold its output.
    pub(crate) fn run(&self, script: &str, within: Duration) -> Result<Output> {
        let mut ssh = Command::new("ssh");
        ssh.args(self.options("ssh")).args(["-o", "ControlMaster=no", "root@127.0.0.1", script]);
        tool::run(&mut ssh, within).with_context(|| format!("on the server: {}", short(script)))
    }

    /// Runs a shell script that must succeed; its output.
    pub(crate) fn must(&self, script: &str, within: Duration) -> Result<String> {
        let output = self.run(script, within)?;
        if !output.status.success() {
            bail!("on the server, {} ended with {}: {}", short(script), output.status, output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// A shell for a person, in this terminal.
    pub(crate) fn shell(&self) -> Result<()> {
        let mut ssh = Command::new("ssh");
        ssh.args(self.options("ssh")).args(["-o", "ControlMaster=no", "-t", "root@127.0.0.1"]);
        ssh.status().context("cannot start ssh")?;
        Ok(())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// A word for the shell on the other side.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn short(script: &str) -> String {
    let line: String = script.trim().chars().take(160).collect();
    format!("`{}`", line.replace('\n', "; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pass_the_shell_unchanged() {
        let hostile = "a'b $(x) `y` \"z\" ; \\";
        let output =
            Command::new("sh").args(["-c", &format!("printf %s {}", quoted(hostile))]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), hostile);
    }
}
