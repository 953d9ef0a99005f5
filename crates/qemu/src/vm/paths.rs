//! The run directory of one VM: the only place that knows the names in it. Used by everybody who starts, finds or
//! removes a VM's processes.
//!
//! ```text
//! <dir>/                 0711 the agent's: nobody else may replace an identity or a log
//!   qemu.process.json, qemu.log, passt.process.json, passt.log    written by the launcher
//!   console.log          what the guest printed
//!   qemu/                0700 QEMU's user: qmp.sock, power.sock, ready.sock
//!   passt/               0711 passt's user: net.sock
//! ```

use std::path::{Path, PathBuf};

use qudata_host::{
    durable::{self, DurableError},
    launch,
};

use crate::owned::Owner;

/// Name under which QEMU is launched.
pub const QEMU: &str = "qemu";
/// Name under which passt is launched.
pub const PASST: &str = "passt";

/// Paths below one run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    dir: PathBuf,
}

impl VmPaths {
    /// The names below `dir`. A path of a socket holds 107 bytes at most, of which `dir` may use 90.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory itself: `dir` of both launches.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where QEMU, as its own user, creates its sockets.
    #[must_use]
    pub fn qemu_dir(&self) -> PathBuf {
        self.dir.join(QEMU)
    }

    /// QEMU's control channel.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.qemu_dir().join("qmp.sock")
    }

    /// A second control channel, for [`crate::shutdown`]: QEMU serves one client per socket, and the agent has the other.
    #[must_use]
    pub fn power_socket(&self) -> PathBuf {
        self.qemu_dir().join("power.sock")
    }

    /// The host's side of the port through which a guest says that it is ready.
    #[must_use]
    pub fn ready_socket(&self) -> PathBuf {
        self.qemu_dir().join("ready.sock")
    }

    /// Where passt, as its own user, creates its socket.
    #[must_use]
    pub fn passt_dir(&self) -> PathBuf {
        self.dir.join(PASST)
    }

    /// Where QEMU meets passt.
    #[must_use]
    pub fn network_socket(&self) -> PathBuf {
        self.passt_dir().join("net.sock")
    }

    /// The serial log.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// What QEMU itself printed.
    #[must_use]
    pub fn qemu_log(&self) -> PathBuf {
        launch::log_path(&self.dir, QEMU)
    }

    /// What passt printed.
    #[must_use]
    pub fn passt_log(&self) -> PathBuf {
        launch::log_path(&self.dir, PASST)
    }

    /// Makes the three directories. Doing it again changes nothing.
    ///
    /// # Errors
    /// When the parent is not writable, or an owner cannot be given.
    pub fn create(&self, qemu: Owner, passt: Owner) -> Result<(), DurableError> {
        durable::create_dir(&self.dir, 0o711)?;
        for (dir, mode, owner) in [(self.qemu_dir(), 0o700, qemu), (self.passt_dir(), 0o711, passt)] {
            durable::create_dir(&dir, mode)?;
            durable::give_to(&dir, owner.uid, owner.gid)?;
        }
        Ok(())
    }

    /// Removes the directory and all below it; `false` when it was absent.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> Result<bool, DurableError> {
        durable::remove_tree(&self.dir)
    }
}
