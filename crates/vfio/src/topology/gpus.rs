//! Which of the devices are GPUs, and what belongs to each. Pure; called by whoever lists, leases or moves GPUs.

use std::collections::{BTreeMap, BTreeSet};

use qudata_host::pci::PciAddress;

use super::{Gpu, PciDevice, Topology};

/// Base class of display controllers: VGA, 3D and others.
const DISPLAY: u32 = 0x03;

impl PciDevice {
    /// Whether it is a display controller, which is what GPUs of all makers say they are.
    #[must_use]
    pub fn is_display(&self) -> bool {
        self.class >> 16 == DISPLAY
    }

    /// Whether it is a bridge: bridges may share a group with a GPU, they do no DMA of their own.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        self.class >> 8 == 0x0604
    }
}

/// domain, bus and device: what the functions of one card have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Slot(String);

impl Slot {
    fn of(address: PciAddress) -> Self {
        let mut text = address.to_string();
        text.truncate(text.rfind('.').unwrap_or(text.len()));
        Self(text)
    }
}

/// What was found in one slot so far.
#[derive(Default)]
struct Found {
    functions: BTreeSet<PciAddress>,
    displays: BTreeSet<PciAddress>,
    configured: BTreeSet<PciAddress>,
}

impl Topology {
    /// All GPUs in the order of their addresses: every slot with a display controller of any maker, and every slot with
    /// a `configured` address, whatever is there. Addresses where nothing is are left out.
    ///
    /// A GPU goes by the address of its first display controller, without one by the first that was configured. Virtual
    /// functions are separate devices with their own groups: they are no GPUs unless configured, and no part of the
    /// card that they are carved from.
    #[must_use]
    pub fn gpus(&self, configured: &[PciAddress]) -> Vec<Gpu> {
        let mut slots: BTreeMap<Slot, Found> = BTreeMap::new();
        let mut gpus = Vec::new();
        for (address, device) in &self.devices {
            let is_configured = configured.contains(address);
            if device.physical.is_some() {
                let functions = BTreeSet::from([*address]);
                gpus.extend(is_configured.then_some(Gpu { address: *address, functions }));
                continue;
            }
            let found = slots.entry(Slot::of(*address)).or_default();
            found.functions.insert(*address);
            found.displays.extend(device.is_display().then_some(*address));
            found.configured.extend(is_configured.then_some(*address));
        }
        gpus.extend(slots.into_values().filter_map(|found| {
            let address = *found.displays.first().or(found.configured.first())?;
            Some(Gpu { address, functions: found.functions })
        }));
        gpus.sort_by_key(|gpu| gpu.address);
        gpus
    }

    /// The card with the function at `address`, whatever it is; none where nothing is.
    #[must_use]
    pub fn gpu(&self, address: PciAddress) -> Option<Gpu> {
        self.gpus(&[address]).into_iter().find(|gpu| gpu.functions.contains(&address))
    }
}
