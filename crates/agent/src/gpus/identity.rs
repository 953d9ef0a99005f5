//! Whether what is at an address is the card that a record is about. Part of `gpus`; asked before anything is touched.
//!
//! Addresses are given out anew when a card is taken out or moved: what has a GPU's address after a reboot may be another
//! GPU, or the host's disk. And a card that an instance had may come back at an address of which nothing is written down.

use std::collections::{BTreeMap, BTreeSet};

use qudata_host::pci::PciAddress;
use qudata_vfio::{
    health::Baseline,
    topology::{Gpu, Topology},
};

use super::{
    Card, Gpus,
    record::{GpuRecord, Life},
};

/// Vendor and device.
type Ids = (u16, u16);

/// What is at the address of a GPU.
#[derive(Debug)]
pub(super) enum Seen {
    /// It, or nothing that could be told apart from it.
    Known(Gpu),
    /// Another card since a reboot, which is checked as a new one.
    New(Gpu),
    /// Something else, which is left alone; a sentence.
    Other(String),
}

/// Compares a record with what is at its address.
pub(super) fn recognise(
    topology: &Topology,
    configured: &[PciAddress],
    gpu: &Gpu,
    record: &GpuRecord,
    boot_id: &str,
) -> Seen {
    if !topology.devices.contains_key(&gpu.address) {
        // The plan says that nothing is there.
        return Seen::Known(gpu.clone());
    }
    let Some(there) = topology.gpus(configured).into_iter().find(|there| there.address == gpu.address) else {
        return Seen::Other("what is at its address now is no GPU, and was not touched".to_owned());
    };
    let Some(was) = &record.baseline else { return Seen::Known(there) };
    let now = Baseline::of(topology, &there);
    if ids(was) == ids(&now) {
        return Seen::Known(there);
    }
    if record.boot_id != boot_id {
        return Seen::New(there);
    }
    let list = |baseline: &Baseline| {
        let each = ids(baseline).into_iter().map(|(address, (v, d))| format!("{address} {v:04x}:{d:04x}"));
        each.collect::<Vec<_>>().join(", ")
    };
    Seen::Other(format!(
        "another device is at its address now ({}, and was {}) and was not touched; a reboot has it checked as a new one",
        list(&now),
        list(was)
    ))
}

fn ids(baseline: &Baseline) -> BTreeMap<PciAddress, Ids> {
    baseline.functions.iter().map(|(address, f)| (*address, (f.vendor, f.device))).collect()
}

impl Gpus {
    /// Marks the free GPUs of which nobody can say that they are clean: on `vfio-pci` without a word of ours, or of the
    /// kind of one that was not proven clean and is not where it was.
    pub(super) fn doubt(&self) {
        let (topology, setup) = (self.topology(), &self.inner.setup);
        let mut cards = self.cards();
        let moved: BTreeSet<Ids> = cards
            .values()
            .filter(|card| card.record.life != Life::Free)
            .filter_map(|card| Some((card, card.record.baseline.as_ref()?)))
            .filter(|(card, was)| ids(was) != ids(&Baseline::of(&topology, &card.gpu)))
            .flat_map(|(_, was)| ids(was).into_values())
            .collect();
        for card in cards.values_mut().filter(|card| card.record.life == Life::Free) {
            let Card { record, unproven, .. } = card;
            let Some(device) = topology.devices.get(&record.address) else { continue };
            let fresh = record.cleansed && record.boot_id == setup.boot_id;
            let stray =
                record.instance.is_none() && !record.cleansed && device.driver.as_deref() == Some("vfio-pci");
            *unproven = stray || (!fresh && moved.contains(&(device.vendor, device.device)));
        }
    }
}
