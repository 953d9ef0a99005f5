//! The corner of the machine that one demo has alone: a directory, user ids, ports, the name of its firewall table. Owns
//! their removal. Called by `demo` and `agent`.
use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use qudata_testkit::leakcheck::Scope;
use qudata_testkit::process::Seen;
use rustix::process::Signal;

use crate::tool::{self, say};

/// On a disk with room for a guest, and open to the VMs' users, as a home directory is not.
const PARENT: &str = "/var/tmp";

/// Apart from the defaults and from what the tests use, so that a demo runs beside both.
pub(super) const UIDS: RangeInclusive<u32> = 870_000..=870_999;
pub(super) const SSH_PORTS: RangeInclusive<u16> = 12_000..=12_049;
pub(super) const APP_PORTS: RangeInclusive<u16> = 26_000..=26_049;
pub(super) const MANAGEMENT_PORTS: RangeInclusive<u16> = 30_200..=30_249;
const API_PORTS: RangeInclusive<u16> = 15_301..=15_399;

/// A demo's directory and what is named after it.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) dir: PathBuf,
    pub(super) api_port: u16,
}

impl Site {
    pub(super) fn open() -> Result<Self> {
        let dir = Path::new(PARENT).join(format!("qudata-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::set_permissions(&dir, Permissions::from_mode(0o755))?;
        let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let api_port = API_PORTS.into_iter().find(free).context("no free port for the agent's API")?;
        Ok(Self { dir, api_port })
    }

    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(super) fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// The agent under a path of its own, so that its processes are told from those of every other agent.
    pub(super) fn agent(&self) -> PathBuf {
        self.dir.join("qudata-agent")
    }

    /// The tunnel client under a path of its own, for the same reason.
    pub(super) fn frpc(&self) -> PathBuf {
        self.dir.join("frpc")
    }

    /// The agent names its table after its data directory; `Agent::start` checks that this is still how.
    pub(super) fn table(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        let text: String = self.data().to_string_lossy().chars().map(plain).collect();
        format!("qudata_{}", text.get(text.len().saturating_sub(24)..).unwrap_or_default())
    }

    /// Everything of the demo but its files.
    pub(super) fn scope(&self) -> Scope {
        let mut scope = Scope::new([], UIDS);
        scope.executables = vec![self.agent(), self.frpc()];
        scope.ports = vec![SSH_PORTS, APP_PORTS, MANAGEMENT_PORTS, self.api_port..=self.api_port];
        scope.tables = self.table();
        scope
    }

    /// The same with the files and the insides of a running agent.
    pub(super) fn scope_with_agent(&self, pid: u32) -> Scope {
        let mut scope = self.scope();
        scope.roots = vec![self.data(), self.run()];
        // The store's file grows and its journal stays.
        scope.allowed = vec![self.data().join("agent.redb")];
        scope.agent = Some(pid);
        scope
    }

    /// Gives a file to the person who called sudo, so that the printed ssh command works for them.
    pub(super) fn hand_over(file: &Path) -> Result<()> {
        let id = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
            chown(file, Some(user), Some(group))
                .with_context(|| format!("cannot give away {}", file.display()))?;
        }
        Ok(())
    }

    /// Removes what is left when the ordinary way failed, and the directory. Says what it had to do.
    pub(super) fn clear(&self) -> Result<()> {
        for process in Seen::all().context("cannot list processes")? {
            // These user ids and this path belong to this demo alone.
            if UIDS.contains(&process.uid) || process.exe.as_deref() == Some(&self.frpc()) {
                say(format!("ending {} (pid {}), which was left behind", process.name, process.pid));
                process.signal(Signal::KILL);
            }
        }
        let table = self.table();
        let present = Command::new("nft").args(["list", "table", "inet", &table]).output();
        if present.is_ok_and(|output| output.status.success()) {
            say(format!("removing the firewall table {table}, which was left behind"));
            tool::run(Command::new("nft").args(["delete", "table", "inet", &table]))?;
        }
        // QEMU may still be writing its last words.
        std::thread::sleep(Duration::from_millis(100));
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}
