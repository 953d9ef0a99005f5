//! Who holds a GPU right now. Called before anything is taken away from it: unbinding a driver under an open file
//! blocks in the kernel, some drivers for ever.
//!
//! Reads directory entries and links, and of procfs and sysfs only files that the kernel answers without a lock that a
//! stuck driver can hold: not `bind` of a VT console (the console lock), not `maps` of a process (its memory's lock).

mod node;
mod observe;
#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::observe::{OpenNodes, nvidia_minor, observe_holders};

/// One thing that holds a GPU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// A process with a device node of it open.
    Process(HoldingProcess),
    /// A framebuffer that its driver or the firmware made, for example `fb0`.
    Framebuffer {
        /// Its name under `graphics/`.
        name: String,
    },
    /// A VT console that may draw on its framebuffer, for example `vtcon1`.
    Console {
        /// Its name under `/sys/class/vtconsole`.
        name: String,
    },
    /// A kernel module: the one its driver lives in, and those that use that one.
    Module {
        /// Its name, for example `nvidia_drm`.
        name: String,
    },
    /// Anybody: processes could not be looked at.
    Unseen {
        /// Why not.
        why: String,
    },
}

/// A process that has a device node open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HoldingProcess {
    /// Its id.
    pub pid: u32,
    /// Its name (`comm`), without characters that could steer a terminal.
    pub name: String,
    /// The systemd unit it belongs to, for example `nvidia-persistenced.service`.
    pub unit: Option<String>,
    /// What it has open, for example `/dev/nvidia0`.
    pub node: PathBuf,
    /// Whether the node is this GPU's without doubt. Which of several NVIDIA GPUs is `/dev/nvidia0` only their driver
    /// knows; as long as it was not asked, a holder of one may hold any.
    pub certain: bool,
}

impl Holder {
    /// Whether unbinding the driver has to wait until it is gone. Framebuffers, consoles and modules let go by
    /// themselves when the driver is unbound.
    #[must_use]
    pub fn blocks_unbind(&self) -> bool {
        matches!(self, Self::Process(_) | Self::Unseen { .. })
    }

    /// Whether it holds the GPU through VFIO, or may: a VM, mostly.
    #[must_use]
    pub fn through_vfio(&self) -> bool {
        match self {
            Self::Process(process) => process.node.starts_with("/dev/vfio"),
            Self::Unseen { .. } => true,
            Self::Framebuffer { .. } | Self::Console { .. } | Self::Module { .. } => false,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(process) => process.fmt(f),
            Self::Framebuffer { name } => write!(f, "framebuffer {name}"),
            Self::Console { name } => write!(f, "console {name}"),
            Self::Module { name } => write!(f, "kernel module {name}"),
            Self::Unseen { why } => write!(f, "perhaps a process that cannot be seen ({why})"),
        }
    }
}

impl fmt::Display for HoldingProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doubt = if self.certain { "" } else { "perhaps " };
        write!(f, "{doubt}{} (pid {}", self.name, self.pid)?;
        if let Some(unit) = &self.unit {
            write!(f, ", {unit}")?;
        }
        write!(f, ") through {}", self.node.display())
    }
}
