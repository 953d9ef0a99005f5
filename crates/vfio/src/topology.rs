//! What PCI hardware the host has, as the kernel shows it in sysfs. Owns the vocabulary of the crate; `observe` fills it
//! in from files that never hang, not even for a device whose driver does.

mod gpus;
mod isolation;
mod observe;
mod parse;
pub(crate) mod read;
#[cfg(test)]
mod tests;

pub use self::observe::{ObserveError, observe};

use std::collections::{BTreeMap, BTreeSet};

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

/// Everything that passthrough needs to know about the host, read in one go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// All PCI functions of all domains.
    pub devices: BTreeMap<PciAddress, PciDevice>,
    /// What the kernel says about isolation.
    pub isolation: Isolation,
}

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    /// Where it is.
    pub address: PciAddress,
    /// Class code, 24 bits: `0x030200` is a 3D controller.
    pub class: u32,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// The driver it is bound to (`driver` link).
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its NUMA node; none where the kernel says -1.
    pub numa_node: Option<u32>,
    /// Its PCI Express link, where it has one.
    pub link: Option<Link>,
    /// Memory BARs in use, by index.
    pub bars: Vec<Bar>,
    /// Ways the kernel can reset it, best first as the kernel lists them; empty when it cannot.
    pub reset_methods: Vec<String>,
    /// The bridges above it, root port first.
    pub upstream: Vec<PciAddress>,
    /// The firmware's console is on it.
    pub boot_vga: bool,
    /// For a virtual function of SR-IOV: the physical one that it is carved from.
    pub physical: Option<PciAddress>,
}

/// A PCI Express link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Transfer rate now, in MT/s (8000 is PCIe 3).
    pub speed: u32,
    /// Lanes now.
    pub width: u8,
    /// The most it can do, in MT/s.
    pub max_speed: u32,
    /// The most lanes it can have.
    pub max_width: u8,
}

/// A memory region of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bar {
    /// Index, 0 to 5.
    pub index: u8,
    /// Size in bytes.
    pub size: u64,
    /// May be placed above 4 GiB.
    pub is_64bit: bool,
    /// May be prefetched.
    pub prefetchable: bool,
}

/// What stands between a device and the host's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Isolation {
    /// Interrupts are remapped (`IR-` chips in `/proc/interrupts`): a device cannot forge one.
    pub interrupt_remapping: bool,
    /// `allow_unsafe_interrupts` of vfio is on: forging is allowed.
    pub unsafe_interrupts: bool,
    /// `pcie_acs_override` is on the kernel's command line: groups are wishes, not facts.
    pub acs_override: bool,
    /// The `vfio-pci` driver is loaded.
    pub vfio_pci: bool,
}

/// One card: all functions of its slot, which travel together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The function that computes: what `gpu_addrs`, leases and the API name.
    pub address: PciAddress,
    /// All functions of the slot, `address` among them.
    pub functions: BTreeSet<PciAddress>,
}
