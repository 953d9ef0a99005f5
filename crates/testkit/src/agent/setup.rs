//! How a test's agent is started: binary, environment, files. Called by tests; everything not set here is the agent's
//! own default.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use super::{
    TestAgent,
    outside::{self, Frpc},
    slot::Slot,
    small_disk::SmallDisk,
};
use crate::tool;

/// An agent that is expected not to start may take this long to say so.
const REFUSAL: Duration = Duration::from_secs(20);

/// Which disk the VMs of a test get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// A Debian guest started by kernel and initrd: seconds to SSH.
    Direct,
    /// The same guest started as a cloud image is, by UEFI firmware.
    Uefi,
    /// An empty disk: the firmware finds nothing to start and idles. For tests that need a VM and no guest.
    Blank,
}

impl Image {
    fn firmware(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Uefi => "uefi",
            Self::Blank => "bios",
        }
    }

    fn path(self) -> PathBuf {
        from_environment(match self {
            Self::Direct | Self::Uefi => "QUDATA_TEST_IMAGE",
            Self::Blank => "QUDATA_TEST_BLANK",
        })
    }
}

/// A path that `cargo xtask test` hands over.
fn from_environment(variable: &str) -> PathBuf {
    let value = env::var_os(variable);
    let path = PathBuf::from(value.unwrap_or_else(|| {
        panic!(
            "{variable} is not set: run the product tests by `cargo xtask test`, which builds what they need"
        )
    }));
    assert!(path.is_file(), "{variable} names {}, which is no file: run `cargo xtask test`", path.display());
    path
}

/// Settings of an agent to be started.
#[derive(Debug, Clone)]
pub struct Setup {
    image: Image,
    changes: BTreeMap<String, Option<String>>,
    file: String,
    /// Size of the file system of the agent's data, for one of its own.
    small_disk: Option<u64>,
    /// The tunnel client, for an agent with a tunnel.
    pub(super) frpc: Option<Frpc>,
}

impl Setup {
    /// An agent whose VMs start from `image`.
    pub fn new(image: Image) -> Self {
        Self { image, changes: BTreeMap::new(), file: String::new(), small_disk: None, frpc: None }
    }

    /// With this environment variable.
    #[must_use]
    pub fn set(mut self, variable: &str, value: &str) -> Self {
        self.changes.insert(variable.to_owned(), Some(value.to_owned()));
        self
    }

    /// Without this environment variable.
    #[must_use]
    pub fn unset(mut self, variable: &str) -> Self {
        self.changes.insert(variable.to_owned(), None);
        self
    }

    /// With this text in its settings file.
    #[must_use]
    pub fn file(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.file);
        self
    }

    /// With its data on a file system of its own, of so many bytes; see [`TestAgent::disk`].
    #[must_use]
    pub fn small_disk(mut self, bytes: u64) -> Self {
        self.small_disk = Some(bytes);
        self
    }

    /// Starts it and waits until it answers.
    pub fn start(self) -> TestAgent {
        let slot = Slot::take();
        self.prepare(&slot);
        let image = slot.dir().join("disk.img");
        let disk = self.small_disk.map(|bytes| SmallDisk::mount(&image, &slot.data_dir(), bytes));
        TestAgent::start(self, disk, slot)
    }

    /// Starts it, expecting that it refuses to; what it said.
    pub fn refused(&self) -> tool::Output {
        let slot = Slot::take();
        self.prepare(&slot);
        self.run_to_end(&slot)
    }

    pub(super) fn run_to_end(&self, slot: &Slot) -> tool::Output {
        tool::run(&mut self.command(slot), REFUSAL)
            .unwrap_or_else(|e| panic!("the agent did not refuse: {e}"))
    }

    /// The built binary.
    pub(super) fn binary(&self) -> PathBuf {
        from_environment("QUDATA_TEST_AGENT")
    }

    pub(super) fn log_file(&self, slot: &Slot) -> PathBuf {
        slot.dir().join("agent.log")
    }

    fn prepare(&self, slot: &Slot) {
        let (from, to) = (self.binary(), slot.binary());
        fs::hard_link(&from, &to)
            .or_else(|_| fs::copy(&from, &to).map(drop))
            .unwrap_or_else(|e| panic!("cannot put {} into {}: {e}", from.display(), slot.dir().display()));
        if let Some(frpc) = &self.frpc {
            frpc.prepare(slot);
        }
        fs::write(config(slot), &self.file).unwrap_or_else(|e| panic!("cannot write the settings file: {e}"));
    }

    pub(super) fn command(&self, slot: &Slot) -> Command {
        let log = File::options().create(true).append(true).open(self.log_file(slot));
        let log = log.unwrap_or_else(|e| panic!("cannot write the agent's log: {e}"));
        let mut command = Command::new(slot.binary());
        command
            .args(["serve", "--config"])
            .arg(config(slot))
            // Nothing of the test's own environment: unknown QUDATA_* variables are refused, and secrets stay apart.
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(self.environment(slot))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be opened twice"))
            .stderr(log);
        command
    }

    fn environment(&self, slot: &Slot) -> BTreeMap<String, String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let range = |ports: std::ops::RangeInclusive<u16>| format!("{}-{}", ports.start(), ports.end());
        let defaults = [
            ("QUDATA_STANDALONE", "true".to_owned()),
            ("QUDATA_DEBUG", "true".to_owned()),
            ("QUDATA_LOG_FORMAT", "text".to_owned()),
            ("QUDATA_ACCEL", "tcg".to_owned()),
            // More VMs than processors: most of them idle.
            ("QUDATA_CPU_OVERCOMMIT", "8".to_owned()),
            ("QUDATA_FIRMWARE", self.image.firmware().to_owned()),
            ("QUDATA_BASE_IMAGE", text(&self.image.path())),
            ("QUDATA_DATA_DIR", text(&slot.data_dir())),
            ("QUDATA_LOG_DIR", text(&slot.dir().join("log"))),
            ("QUDATA_VM_RUN_DIR", text(&slot.dir().join("run"))),
            ("QUDATA_VM_UID_BASE", slot.vm_uids().start().to_string()),
            ("QUDATA_AGENT_PORT", slot.api_port().to_string()),
            ("QUDATA_SSH_PORTS", range(slot.ssh_ports())),
            ("QUDATA_APP_PORTS", range(slot.app_ports())),
            ("QUDATA_MANAGEMENT_PORTS", range(slot.management_ports())),
        ];
        let mut environment: BTreeMap<String, String> =
            defaults.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        if let Some(frpc) = &self.frpc {
            environment.insert("QUDATA_FRPC_BINARY".to_owned(), text(&frpc.path(slot)));
            environment.insert("QUDATA_FRPC_CONFIG".to_owned(), text(&outside::config(slot.dir())));
        }
        for (name, value) in &self.changes {
            match value {
                Some(value) => environment.insert(name.clone(), value.clone()),
                None => environment.remove(name),
            };
        }
        environment
    }
}

fn config(slot: &Slot) -> PathBuf {
    slot.dir().join("agent.toml")
}
