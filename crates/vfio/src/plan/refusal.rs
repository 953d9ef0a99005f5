//! Why a GPU must not be given to a VM. Owns the reasons, their words and their remedies; called by `plan`.

use qudata_host::pci::PciAddress;

use super::{BindPolicy, VFIO_PCI};
use crate::{
    holders::Holder,
    nvidia,
    reset::Method,
    topology::{Gpu, PciDevice, Topology},
};

/// Why a GPU is not moved to `vfio-pci`. Nothing was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindRefusal {
    /// There is no such function.
    #[error("there is no PCI device {address}")]
    NoSuchDevice {
        /// The function.
        address: PciAddress,
    },
    /// Something that hosts live by.
    #[error("{address} is no GPU but {what}")]
    NotAGpu {
        /// The function.
        address: PciAddress,
        /// What it is.
        what: &'static str,
    },
    /// An earlier step never returned.
    #[error("GPU {address} is wedged: an earlier operation on it still hangs in the kernel")]
    Wedged {
        /// The GPU.
        address: PciAddress,
    },
    /// A part of a card that shares it with others.
    #[error("{address} is a virtual function of {physical}, not a card of its own")]
    VirtualFunction {
        /// The function.
        address: PciAddress,
        /// The card.
        physical: PciAddress,
    },
    /// A card of which parts are given out one by one; they would go with it.
    #[error("GPU {address} has virtual functions: {}", list(functions))]
    HasVirtualFunctions {
        /// The GPU.
        address: PciAddress,
        /// They.
        functions: Vec<PciAddress>,
    },
    /// No IOMMU, or it does not know the device.
    #[error("{address} has no IOMMU group: it could reach all of the host's memory")]
    NoGroup {
        /// The function.
        address: PciAddress,
    },
    /// A device could forge interrupts.
    #[error("interrupt remapping is off: a guest's device could forge interrupts of the host")]
    NoInterruptRemapping,
    /// Somebody allowed devices to forge interrupts.
    #[error("vfio's allow_unsafe_interrupts is on: a guest's device could forge interrupts of the host")]
    UnsafeInterrupts,
    /// Groups are not what they seem.
    #[error("pcie_acs_override is on the kernel's command line: IOMMU groups do not isolate")]
    AcsOverride,
    /// Something else is in the group.
    #[error("GPU {address} shares IOMMU group {group} with {}", list(devices))]
    ForeignDevice {
        /// The GPU.
        address: PciAddress,
        /// The group.
        group: u32,
        /// What else is in it.
        devices: Vec<PciAddress>,
    },
    /// Its driver crashes the host when it is unbound.
    #[error("{address} is bound to nouveau: unbinding it can crash the host")]
    Nouveau {
        /// The function.
        address: PciAddress,
    },
    /// The console is on it.
    #[error("the firmware's console is on GPU {address}")]
    BootVga {
        /// The GPU.
        address: PciAddress,
    },
    /// Somebody uses it.
    #[error("GPU {address} is in use by {}", list(holders))]
    Held {
        /// The GPU.
        address: PciAddress,
        /// Who.
        holders: Vec<Holder>,
    },
    /// It could not be cleaned for the next tenant.
    #[error("GPU {address} cannot be reset as a whole")]
    NoReset {
        /// The GPU.
        address: PciAddress,
    },
    /// The driver is not there.
    #[error("the driver {VFIO_PCI} is not loaded")]
    NoVfioPci,
}

impl BindRefusal {
    /// A word for programs; never changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSuchDevice { .. } => "no_such_device",
            Self::NotAGpu { .. } => "not_a_gpu",
            Self::Wedged { .. } => "wedged",
            Self::VirtualFunction { .. } => "virtual_function",
            Self::HasVirtualFunctions { .. } => "has_virtual_functions",
            Self::NoGroup { .. } => "no_iommu_group",
            Self::NoInterruptRemapping => "no_interrupt_remapping",
            Self::UnsafeInterrupts => "unsafe_interrupts",
            Self::AcsOverride => "acs_override",
            Self::ForeignDevice { .. } => "foreign_device",
            Self::Nouveau { .. } => "nouveau",
            Self::BootVga { .. } => "boot_vga",
            Self::Held { .. } => "held",
            Self::NoReset { .. } => "no_reset",
            Self::NoVfioPci => "no_vfio_pci",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::NoSuchDevice { .. } => "name one that `qudata-agent gpu list` shows".into(),
            Self::NotAGpu { address, .. } => format!(
                "take it out of the configured GPUs; addresses change when cards are moved, `lspci -nn -s {address}` shows \
                 what is there"
            ),
            Self::Wedged { .. } => "reboot the host; nothing else ends such an operation".into(),
            Self::VirtualFunction { physical, .. } => format!("rent the whole card: {physical}"),
            Self::HasVirtualFunctions { address, .. } => {
                format!("take them away (echo 0 > /sys/bus/pci/devices/{address}/sriov_numvfs) when nobody uses them")
            }
            Self::NoGroup { .. } => {
                "turn on VT-d (Intel) or AMD-Vi in the firmware, on Intel boot with intel_iommu=on, and reboot".into()
            }
            Self::NoInterruptRemapping => {
                "turn on interrupt remapping (x2APIC) in the firmware and remove intremap=off from the kernel's \
                 command line"
                    .into()
            }
            Self::UnsafeInterrupts => {
                "remove allow_unsafe_interrupts from /etc/modprobe.d and from the kernel's command line, and reboot"
                    .into()
            }
            Self::AcsOverride => "remove pcie_acs_override from the kernel's command line and reboot".into(),
            Self::ForeignDevice { .. } => {
                "put the card into another slot, or turn on ACS in the firmware; `qudata-agent gpu topo` shows the \
                 groups"
                    .into()
            }
            Self::Nouveau { address } => format!(
                "keep nouveau away from {address}: blacklist it in /etc/modprobe.d, rebuild the initramfs, and reboot"
            ),
            Self::BootVga { address } => format!(
                "if the console may go dark, add {address} to the configured GPUs; otherwise move it to another card \
                 in the firmware"
            ),
            Self::Held { holders, .. } => format!("stop {}", list(holders)),
            Self::NoReset { .. } => {
                "put the card into a slot with a port of its own: everything below a port can be reset together".into()
            }
            Self::NoVfioPci => format!("run `modprobe {VFIO_PCI}` and load it at every boot (/etc/modules-load.d)"),
        }
    }
}

fn list(things: &[impl ToString]) -> String {
    let words: Vec<String> = things.iter().map(ToString::to_string).collect();
    words.join(", ")
}

/// All reasons, the ones that no other remedy can outdo first.
pub(super) fn check(topology: &Topology, gpu: &Gpu, policy: &BindPolicy) -> Result<(), BindRefusal> {
    let address = gpu.address;
    let missing = |function: &PciAddress| BindRefusal::NoSuchDevice { address: *function };
    let devices = gpu
        .functions
        .iter()
        .map(|function| topology.devices.get(function).ok_or_else(|| missing(function)))
        .collect::<Result<Vec<&PciDevice>, _>>()?;
    if devices.is_empty() {
        return Err(missing(&address));
    }
    if let Some((address, what)) = devices.iter().find_map(|device| Some((device.address, lived_by(device)?)))
        && !devices.iter().any(|device| device.is_display())
    {
        return Err(BindRefusal::NotAGpu { address, what });
    }
    if policy.wedged {
        return Err(BindRefusal::Wedged { address });
    }
    if let Some((function, physical)) = devices.iter().find_map(|d| Some((d.address, d.physical?))) {
        return Err(BindRefusal::VirtualFunction { address: function, physical });
    }
    let virtual_of = |d: &&PciDevice| d.physical.is_some_and(|physical| gpu.functions.contains(&physical));
    let functions: Vec<PciAddress> =
        topology.devices.values().filter(virtual_of).map(|device| device.address).collect();
    if !functions.is_empty() {
        return Err(BindRefusal::HasVirtualFunctions { address, functions });
    }
    isolation(topology, gpu, &devices)?;
    use_of(gpu, policy, &devices)?;
    if Method::choose(topology, gpu).is_none() {
        return Err(BindRefusal::NoReset { address });
    }
    let bound = devices.iter().any(|device| device.driver.as_deref() == Some(VFIO_PCI));
    if !topology.isolation.vfio_pci && !bound {
        return Err(BindRefusal::NoVfioPci);
    }
    Ok(())
}

/// The base classes of what a host has its system, its network and its buses by. Anything else may be configured.
fn lived_by(device: &PciDevice) -> Option<&'static str> {
    match device.class >> 16 {
        0x01 => Some("a storage controller"),
        0x02 => Some("a network controller"),
        0x06 => Some("a bridge"),
        _ => None,
    }
}

/// Would the guest reach more than its GPU?
fn isolation(topology: &Topology, gpu: &Gpu, devices: &[&PciDevice]) -> Result<(), BindRefusal> {
    if let Some(device) = devices.iter().find(|device| device.group.is_none()) {
        return Err(BindRefusal::NoGroup { address: device.address });
    }
    if !topology.isolation.interrupt_remapping {
        return Err(BindRefusal::NoInterruptRemapping);
    }
    if topology.isolation.unsafe_interrupts {
        return Err(BindRefusal::UnsafeInterrupts);
    }
    if topology.isolation.acs_override {
        return Err(BindRefusal::AcsOverride);
    }
    for group in devices.iter().filter_map(|device| device.group) {
        let foreign = |device: &&PciDevice| {
            device.group == Some(group) && !gpu.functions.contains(&device.address) && !is_passive(device)
        };
        let devices: Vec<PciAddress> = topology.devices.values().filter(foreign).map(|d| d.address).collect();
        if !devices.is_empty() {
            return Err(BindRefusal::ForeignDevice { address: gpu.address, group, devices });
        }
    }
    Ok(())
}

/// Bridges forward and do no DMA of their own. An NVSwitch calls itself a bridge too (0680) and is none.
fn is_passive(device: &PciDevice) -> bool {
    device.is_bridge() || (device.class >> 8 == 0x0600 && device.driver.is_none())
}

/// Would the host lose something it uses?
fn use_of(gpu: &Gpu, policy: &BindPolicy, devices: &[&PciDevice]) -> Result<(), BindRefusal> {
    let address = gpu.address;
    let on_host = |device: &&&PciDevice| device.driver.as_deref() != Some(VFIO_PCI);
    if let Some(device) = devices.iter().find(|device| device.driver.as_deref() == Some("nouveau")) {
        return Err(BindRefusal::Nouveau { address: device.address });
    }
    if !policy.configured && devices.iter().filter(on_host).any(|device| device.boot_vga) {
        return Err(BindRefusal::BootVga { address });
    }
    let stays = |holder: &&Holder| holder.blocks_unbind() && !nvidia::yields(holder);
    let holders: Vec<Holder> = policy.holders.iter().filter(stays).cloned().collect();
    if holders.is_empty() { Ok(()) } else { Err(BindRefusal::Held { address, holders }) }
}
