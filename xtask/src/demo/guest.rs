//! The renter's side of the demo: a key, what the guest shall run, and the proofs that SSH and the application answer.
//! Called by `story`.
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use qudata_testkit::http::VirtualHost;
use qudata_testkit::tool as bounded;
use serde_json::{Value, json};

use super::interrupt::Interrupt;
use super::site::Site;
use crate::tool;

/// The port of the demo's application inside the guest.
pub(super) const APP_PORT: u16 = 8000;

/// cloud-init starts the application in its last stage, some time after SSH answers.
const APP_STARTS: Duration = Duration::from_secs(300);
const SSH: Duration = Duration::from_secs(90);

/// A web server as a unit, the way a renter's user_data would start it.
const USER_DATA: &str = "#cloud-config
write_files:
  - path: /srv/demo/index.html
    content: |
      <h1>It runs.</h1>
runcmd:
  - [systemd-run, --unit=demo-app, --working-directory=/srv/demo, python3, -m, http.server, '8000']
";

/// Body of the create call, small enough for any machine.
pub(super) fn wish(public_key: &str) -> Value {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(2));
    json!({
        "name": "demo",
        "cpus": cpus.to_string(),
        "memory": "1G",
        "storage_gb": 8,
        "ports": ["22", APP_PORT.to_string()],
        "ssh_enabled": true,
        "ssh_pubkeys": [public_key],
        "user_data": USER_DATA,
    })
}

/// Makes a key pair, `key` is the one to log in with; returns the public half.
pub(super) fn make_key(site: &Site, name: &str) -> Result<String> {
    let file = site.dir.join(name);
    tool::run(
        Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f"]).arg(&file),
    )?;
    Site::hand_over(&file)?;
    let public = fs::read_to_string(file.with_extension("pub")).context("ssh-keygen left no public key")?;
    Ok(public.trim().to_owned())
}

/// How to log in: the one key, and no host key but the pinned one.
#[derive(Debug)]
pub(super) struct Login {
    address: IpAddr,
    port: u16,
    key: PathBuf,
    known_hosts: PathBuf,
}

impl Login {
    /// Pins `host_key` for the guest behind a port.
    pub(super) fn pin(site: &Site, (address, port): (IpAddr, u16), host_key: &str) -> Result<Self> {
        let known_hosts = site.dir.join("known_hosts");
        let line = format!("[{address}]:{port} {host_key}\n");
        fs::write(&known_hosts, line).context("cannot write known_hosts")?;
        Site::hand_over(&known_hosts)?;
        Ok(Self { address, port, key: site.dir.join("key"), known_hosts })
    }

    /// The command line to print and to run.
    pub(super) fn command(&self) -> Vec<String> {
        let port = self.port.to_string();
        let known_hosts = format!("UserKnownHostsFile={}", self.known_hosts.display());
        let key = self.key.display().to_string();
        let destination = format!("root@{}", self.address);
        ["ssh", "-o", "StrictHostKeyChecking=yes", "-o", &known_hosts, "-i", &key, "-p", &port, &destination]
            .map(str::to_owned)
            .to_vec()
    }

    /// `uname -a` of the guest, over the system's own ssh.
    pub(super) fn prove(&self) -> Result<String> {
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "GlobalKnownHostsFile=none",
        ]);
        ssh.args(self.command().iter().skip(1)).arg("uname -a");
        let output = bounded::run(&mut ssh, SSH).context("logging in to the guest")?;
        anyhow::ensure!(
            output.status.success(),
            "ssh ended with {}: {}",
            output.status,
            output.stderr.trim()
        );
        Ok(output.stdout.trim().to_owned())
    }
}

/// Waits until the application answers 200; returns that. Until it runs, the guest refuses or the connection is closed, and
/// a tunnel server says 404 for it.
pub(super) fn prove_app(app: &VirtualHost, interrupt: &Interrupt) -> Result<u16> {
    let mut last = None;
    let proven = interrupt.poll("answer of the application", APP_STARTS, || {
        last = app.call("GET", "/", None).ok().map(|reply| reply.status);
        Ok(last.filter(|status| *status == 200))
    });
    proven.with_context(|| match last {
        Some(status) => format!("the application answers {status} instead of 200"),
        None => "the application does not answer".to_owned(),
    })
}
