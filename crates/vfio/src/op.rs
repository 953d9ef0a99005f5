//! What is done to a PCI device, one step at a time: the vocabulary of plans and of the door through which they are
//! carried out. `plan` and `sanitize` write lists of these; `sysfs` does one; `door` does a list and stops at the first
//! that fails.
//!
//! Every step looks before it writes, so a list can be repeated from any point. Steps named `Expect…` change nothing
//! and stop the list when the host is not as they say.

use std::{collections::BTreeMap, fmt, io};

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Says which driver alone may have the function (`driver_override`); none = any that knows it.
    Override {
        /// The function.
        address: PciAddress,
        /// The driver.
        driver: Option<String>,
    },
    /// Takes the function from this driver; nothing to do when that driver does not have it.
    Unbind {
        /// The function.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// Gives the function to this driver; nothing to do when it has it.
    Bind {
        /// The function.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// The `driver` link must show this. A successful bind or probe proves nothing.
    ExpectDriver {
        /// The function.
        address: PciAddress,
        /// The driver; none = bound to nothing.
        driver: Option<String>,
    },
    /// The function must answer with these ids from its configuration space. The ids in sysfs are the kernel's memory
    /// and stay when the device is gone.
    ExpectAlive {
        /// The function.
        address: PciAddress,
        /// Vendor id.
        vendor: u16,
        /// Device id.
        device: u16,
    },
    /// No process may have the function open through VFIO: a write to `unbind` would block until it lets go, and a reset
    /// would hit its tenant.
    ExpectUnheld {
        /// The function.
        address: PciAddress,
    },
    /// Reads configuration space from its beginning.
    ReadConfig {
        /// The function.
        address: PciAddress,
        /// How many bytes at most; 4096 is all there can be.
        length: u16,
    },
    /// Asks the NVIDIA driver which of its device files is this GPU's.
    NvidiaMinor {
        /// The GPU.
        address: PciAddress,
    },
    /// Resets one function with one of the kernel's methods; none = the kernel's own choice.
    ResetFunction {
        /// The function.
        address: PciAddress,
        /// A word of `reset_method`.
        method: Option<String>,
    },
    /// Resets everything below a bridge.
    ResetBelow {
        /// The bridge.
        bridge: PciAddress,
        /// The functions below it, all of them.
        functions: Vec<PciAddress>,
    },
}

/// What a step found or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done, or there was nothing to do.
    Done,
    /// The driver the function is bound to.
    Driver(Option<String>),
    /// Vendor and device id as the function answers; all ones when nothing answers.
    Ids(u16, u16),
    /// Ids of the processes that hold it.
    HeldBy(Vec<u32>),
    /// The N of `/dev/nvidiaN`; none where the driver does not have the GPU.
    Minor(Option<u32>),
    /// Configuration space.
    Config(Vec<u8>),
    /// How what is below a bridge was reset.
    Reset(BridgeReset),
}

/// Ways to reset what is below a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BridgeReset {
    /// The kernel did it (`reset_subordinate`).
    Kernel,
    /// By the bridge's control register, with configuration space put back afterwards.
    Register,
}

/// Does single steps. The real one is [`crate::sysfs::SysfsKernel`].
pub trait Kernel: Send + Sync + fmt::Debug {
    /// Does one step. It may block for ever.
    ///
    /// # Errors
    /// What the kernel answers.
    fn apply(&self, op: &Op) -> io::Result<Reply>;
}

impl Op {
    /// The function (or bridge) it is about.
    pub fn address(&self) -> PciAddress {
        match self {
            Self::Override { address, .. }
            | Self::Unbind { address, .. }
            | Self::Bind { address, .. }
            | Self::ExpectDriver { address, .. }
            | Self::ExpectAlive { address, .. }
            | Self::ExpectUnheld { address }
            | Self::ReadConfig { address, .. }
            | Self::NvidiaMinor { address }
            | Self::ResetFunction { address, .. } => *address,
            Self::ResetBelow { bridge, .. } => *bridge,
        }
    }

    /// Whether the kernel may not return from it. Reads of links and of configuration space are safe even for a device
    /// whose driver hangs.
    pub(crate) fn may_hang(&self) -> bool {
        match self {
            Self::Override { .. }
            | Self::Unbind { .. }
            | Self::Bind { .. }
            | Self::NvidiaMinor { .. }
            | Self::ResetFunction { .. }
            | Self::ResetBelow { .. } => true,
            Self::ExpectDriver { .. }
            | Self::ExpectAlive { .. }
            | Self::ExpectUnheld { .. }
            | Self::ReadConfig { .. } => false,
        }
    }

    /// Whether the list may go on after this reply.
    pub(crate) fn accepts(&self, reply: &Reply) -> bool {
        match (self, reply) {
            (Self::ExpectDriver { driver, .. }, Reply::Driver(found)) => driver == found,
            (Self::ExpectAlive { vendor, device, .. }, Reply::Ids(v, d)) => (vendor, device) == (v, d),
            (Self::ExpectUnheld { .. }, Reply::HeldBy(pids)) => pids.is_empty(),
            (Self::ExpectDriver { .. } | Self::ExpectAlive { .. } | Self::ExpectUnheld { .. }, _) => false,
            _ => true,
        }
    }
}

/// As a participle clause: "binding 0000:01:00.0 to vfio-pci".
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Override { address, driver: Some(driver) } => {
                write!(f, "reserving {address} for {driver} (driver_override)")
            }
            Self::Override { address, driver: None } => write!(f, "clearing driver_override of {address}"),
            Self::Unbind { address, driver } => write!(f, "unbinding {address} from {driver}"),
            Self::Bind { address, driver } => write!(f, "binding {address} to {driver}"),
            Self::ExpectDriver { address, .. } => write!(f, "checking the driver of {address}"),
            Self::ExpectAlive { address, .. } => write!(f, "checking that {address} answers"),
            Self::ExpectUnheld { address } => write!(f, "checking that nobody holds {address}"),
            Self::ReadConfig { address, .. } => write!(f, "reading the configuration space of {address}"),
            Self::NvidiaMinor { address } => write!(f, "asking the NVIDIA driver about {address}"),
            Self::ResetFunction { address, method: Some(method) } => {
                write!(f, "resetting {address} ({method})")
            }
            Self::ResetFunction { address, method: None } => write!(f, "resetting {address}"),
            Self::ResetBelow { bridge, .. } => write!(f, "resetting what is below bridge {bridge}"),
        }
    }
}

/// As a clause about what was found, for an expectation that failed: "it is bound to nouveau".
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("it is done"),
            Self::Driver(Some(driver)) => write!(f, "it is bound to {driver}"),
            Self::Driver(None) => f.write_str("it is bound to no driver"),
            Self::Ids(0xffff, _) => {
                f.write_str("it has fallen off the bus (its configuration space reads ff)")
            }
            Self::Ids(vendor, device) => write!(f, "it answers as {vendor:04x}:{device:04x}"),
            Self::HeldBy(pids) => {
                let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
                write!(f, "held by process {}", pids.join(", "))
            }
            Self::Minor(Some(minor)) => write!(f, "it is /dev/nvidia{minor}"),
            Self::Minor(None) => f.write_str("the NVIDIA driver does not have it"),
            Self::Config(bytes) => write!(f, "{} bytes of configuration space", bytes.len()),
            Self::Reset(BridgeReset::Kernel) => f.write_str("reset by the kernel"),
            Self::Reset(BridgeReset::Register) => f.write_str("reset by the bridge's control register"),
        }
    }
}

/// Configuration space by function, from the replies to `ops`.
pub(crate) fn configs(ops: &[Op], replies: Vec<Reply>) -> BTreeMap<PciAddress, Vec<u8>> {
    let bytes = |(op, reply): (&Op, Reply)| match (op, reply) {
        (Op::ReadConfig { address, .. }, Reply::Config(bytes)) => Some((*address, bytes)),
        _ => None,
    };
    ops.iter().zip(replies).filter_map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> PciAddress {
        "0000:01:00.0".parse().unwrap()
    }

    #[test]
    fn only_expectations_stop_a_list() {
        let driver = |name: &str| Some(name.to_owned());
        let expect = Op::ExpectDriver { address: address(), driver: driver("vfio-pci") };
        assert!(expect.accepts(&Reply::Driver(driver("vfio-pci"))));
        for other in [Reply::Driver(None), Reply::Driver(driver("nouveau")), Reply::Done] {
            assert!(!expect.accepts(&other), "{other}");
        }
        let alive = Op::ExpectAlive { address: address(), vendor: 0x10de, device: 0x2330 };
        assert!(alive.accepts(&Reply::Ids(0x10de, 0x2330)));
        assert!(!alive.accepts(&Reply::Ids(0xffff, 0xffff)) && !alive.accepts(&Reply::Ids(0x10de, 0x2331)));
        let unheld = Op::ExpectUnheld { address: address() };
        assert!(unheld.accepts(&Reply::HeldBy(Vec::new())) && !unheld.accepts(&Reply::HeldBy(vec![7])));
        assert!(Op::Bind { address: address(), driver: "x".into() }.accepts(&Reply::Done));
    }

    #[test]
    fn what_was_found_is_told() {
        assert_eq!(Reply::Driver(Some("nouveau".into())).to_string(), "it is bound to nouveau");
        assert!(Reply::Ids(0xffff, 0xffff).to_string().contains("fallen off the bus"));
        assert_eq!(Reply::HeldBy(vec![7, 9]).to_string(), "held by process 7, 9");
    }
}
