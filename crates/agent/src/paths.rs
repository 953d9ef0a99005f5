//! Every path of the agent and of an instance, in one place.
//!
//! ```text
//! <data>/                         kept over reboots
//!   agent.redb  agent_secret  agent_id  .ssh/management_key
//!   instances/<id>/               root, 0711: disk.qcow2  vars.fd  seed.iso   (files of the VM's user)
//! <run>/                          one boot
//!   agent.sock
//!   vms/<id>/<incarnation>/       root, 0711: identities of processes, sockets; see `qudata_qemu::vm::paths`
//! <log>/                          for people
//!   instances/<id>/               console.log  qemu.log  passt.log
//! ```
//! Every start of a VM has a run directory of its own. A launch that is late (its agent was killed, its instance given
//! up) finds its directory gone and starts nothing, whatever was begun since.
//!
//! What the VM's user may write is never the place of a file that root trusts: a QEMU taken over by its guest can neither
//! forge the identity of a process nor lead the agent through a symlink.

use std::path::{Path, PathBuf};

use qudata_qemu::vm::paths::VmPaths;
use uuid::Uuid;

/// Suffix of a directory that teardown has taken away: nothing new can appear in it under its old name.
const TAKEN: &str = "gone";

/// The agent's own paths.
#[derive(Debug, Clone)]
pub struct Paths {
    data: PathBuf,
    run: PathBuf,
    log: PathBuf,
}

impl Paths {
    /// Paths below a data, a run and a log directory.
    pub fn new(data: &Path, run: &Path, log: &Path) -> Self {
        Self { data: data.to_owned(), run: run.to_owned(), log: log.to_owned() }
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.data.join("agent.redb")
    }

    /// The secret of the HTTP API.
    pub fn secret(&self) -> PathBuf {
        self.data.join("agent_secret")
    }

    /// The local socket of the HTTP API.
    pub fn socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// Parent of all instance directories.
    pub fn instances(&self) -> PathBuf {
        self.data.join("instances")
    }

    /// Parent of all run directories of VMs.
    pub fn vms(&self) -> PathBuf {
        self.run.join("vms")
    }

    /// Parent of the instances' logs.
    pub fn logs(&self) -> PathBuf {
        self.log.join("instances")
    }

    /// The paths of one instance and one incarnation of its VM.
    pub fn instance(&self, id: Uuid, incarnation: u32) -> InstancePaths {
        let run = self.vms().join(id.to_string());
        InstancePaths {
            data: self.instances().join(id.to_string()),
            vm: VmPaths::new(run.join(incarnation.to_string())),
            run,
            logs: self.logs().join(id.to_string()),
        }
    }
}

/// The paths of one instance.
#[derive(Debug, Clone)]
pub struct InstancePaths {
    /// Directory of what is kept until DELETE.
    pub data: PathBuf,
    /// Parent of the run directories of all incarnations of its VM.
    pub run: PathBuf,
    /// The run directory of this incarnation.
    pub vm: VmPaths,
    /// What its guest and its processes printed, kept until DELETE.
    pub logs: PathBuf,
}

impl InstancePaths {
    /// The renter's disk.
    pub fn disk(&self) -> PathBuf {
        self.data.join("disk.qcow2")
    }

    /// UEFI variables.
    pub fn variables(&self) -> PathBuf {
        self.data.join("vars.fd")
    }

    /// Bounded serial log.
    pub fn console(&self) -> PathBuf {
        self.logs.join("console.log")
    }

    /// NoCloud seed.
    pub fn seed(&self) -> PathBuf {
        self.data.join("seed.iso")
    }
}

/// The name a directory gets when it is taken away before removal.
pub fn taken_away(dir: &Path) -> PathBuf {
    dir.with_extension(TAKEN)
}
