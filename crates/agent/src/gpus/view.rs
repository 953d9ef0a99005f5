//! GPUs as the API shows them: the record, the last look at the hardware and the leases, put together. Part of `gpus`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use qudata_api::{
    GpuDistance, GpuDistanceMeaning, GpuHolder, GpuHolderKind, GpuLink, GpuPlace, GpuRefusal, GpuState,
    GpuTopology, GpuView, Problem,
};
use qudata_host::pci::PciAddress;
use qudata_vfio::{
    distance::{Distance, distance},
    holders::Holder,
    topology::{Link, PciDevice, Topology},
};
use uuid::Uuid;

use super::{
    Gpus,
    card::{Card, Obstacle},
    record::Life,
};

impl Gpus {
    /// All GPUs, by address. `leases` says which instance holds which.
    pub fn views(&self, leases: &BTreeMap<PciAddress, Uuid>) -> Vec<GpuView> {
        let topology = self.topology();
        self.cards().values().map(|card| self.view(card, &topology, leases)).collect()
    }

    fn view(&self, card: &Card, topology: &Topology, leases: &BTreeMap<PciAddress, Uuid>) -> GpuView {
        let Card { gpu, record, refused, holders, .. } = card;
        let device = topology.devices.get(&gpu.address);
        let devices = || gpu.functions.iter().filter_map(|address| topology.devices.get(address));
        let lease = leases.get(&gpu.address).copied();
        let state = match record.life {
            Life::Free if lease.is_some() => GpuState::Leased,
            Life::Free => GpuState::Free,
            Life::Bound => GpuState::Bound,
            Life::InUse => GpuState::InUse,
            Life::Draining => GpuState::Draining,
            Life::Sanitizing => GpuState::Sanitizing,
            Life::Quarantined => GpuState::Quarantined,
        };
        let remedy = match record.life {
            Life::Quarantined => card.obstacle().map(|obstacle| obstacle.remedy),
            _ => record.why.as_ref().map(|_| {
                "it is quarantined when its instance gives it back; save your work and delete the instance".to_owned()
            }),
        };
        GpuView {
            address: gpu.address.to_string(),
            name: device.and_then(|device| self.name(device)),
            vendor_id: device.map(|device| format!("{:04x}", device.vendor)),
            device_id: device.map(|device| format!("{:04x}", device.device)),
            state,
            since: record.since,
            why: record.why.clone(),
            remedy,
            instance: lease.or(record.instance.filter(|_| record.life != Life::Free)),
            rentable: record.life != Life::Quarantined && refused.is_none(),
            refusal: refused
                .as_ref()
                .filter(|_| record.life == Life::Free)
                .map(|o| refusal(o, card.refused_since)),
            driver: device.and_then(|device| device.driver.clone()),
            original_driver: record.originals.get(&gpu.address).cloned().flatten(),
            functions: gpu.functions.iter().map(ToString::to_string).collect(),
            iommu_group: device.and_then(|device| device.group),
            numa_node: device.and_then(|device| device.numa_node),
            link: device.and_then(|device| device.link).map(link),
            bar_bytes: devices().flat_map(|device| &device.bars).map(|bar| bar.size).sum(),
            reset_methods: device.map(|device| device.reset_methods.clone()).unwrap_or_default(),
            holders: holders.iter().map(holder).collect(),
        }
    }

    fn name(&self, device: &PciDevice) -> Option<String> {
        self.inner.ids.name(device.vendor, device.device)
    }

    /// Where the GPUs sit and how far from each other.
    pub fn places(&self) -> GpuTopology {
        let topology = self.topology();
        let addresses: Vec<PciAddress> = self.cards().keys().copied().collect();
        let place = |address: &PciAddress| {
            let device = topology.devices.get(address);
            GpuPlace {
                address: address.to_string(),
                name: device.and_then(|device| self.name(device)),
                iommu_group: device.and_then(|device| device.group),
                numa_node: device.and_then(|device| device.numa_node),
            }
        };
        let row = |a: &PciAddress| addresses.iter().map(|b| letters(distance(&topology, *a, *b))).collect();
        let meaning = |distance: &Distance| GpuDistanceMeaning {
            distance: letters(*distance),
            meaning: distance.meaning().to_owned(),
        };
        GpuTopology {
            gpus: addresses.iter().map(place).collect(),
            matrix: addresses.iter().map(row).collect(),
            legend: Distance::ALL.iter().map(meaning).collect(),
        }
    }

    /// What is wrong with GPUs, for the view of the host.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |card: &Card| {
            let record = &card.record;
            let (why, since) = (record.why.as_ref()?, record.since);
            let quarantined = record.life == Life::Quarantined;
            let remedy = if quarantined {
                card.obstacle().map(|obstacle| obstacle.remedy).unwrap_or_default()
            } else {
                "it is quarantined when its instance gives it back".to_owned()
            };
            let word = if quarantined { "quarantined" } else { "under suspicion" };
            let code = if quarantined { "gpu_quarantined" } else { "gpu_fault" };
            let message = format!("GPU {} is {word}: {why}", record.address);
            Some(Problem { code: code.to_owned(), message, remedy, since })
        };
        let mut problems: Vec<Problem> = self.cards().values().filter_map(problem).collect();
        problems.extend(self.bus_hangs());
        problems
    }
}

fn refusal(obstacle: &Obstacle, since: Timestamp) -> GpuRefusal {
    GpuRefusal {
        code: obstacle.code.clone(),
        message: obstacle.sentence.clone(),
        remedy: obstacle.remedy.clone(),
        since,
        by_choice: obstacle.by_choice,
    }
}

fn link(link: Link) -> GpuLink {
    let gigatransfers = |megatransfers: u32| f64::from(megatransfers) / 1000.0;
    GpuLink {
        speed: gigatransfers(link.speed),
        width: link.width,
        max_speed: gigatransfers(link.max_speed),
        max_width: link.max_width,
    }
}

fn holder(holder: &Holder) -> GpuHolder {
    let thing = |kind, name: &str| GpuHolder { kind, name: name.to_owned(), pid: None, unit: None };
    match holder {
        Holder::Process(process) => GpuHolder {
            pid: Some(process.pid),
            unit: process.unit.clone(),
            ..thing(GpuHolderKind::Process, &process.name)
        },
        Holder::Framebuffer { name } => thing(GpuHolderKind::Framebuffer, name),
        Holder::Console { name } => thing(GpuHolderKind::Console, name),
        Holder::Module { name } => thing(GpuHolderKind::Module, name),
        Holder::Unseen { .. } => thing(GpuHolderKind::Process, "not to be seen"),
    }
}

fn letters(distance: Distance) -> GpuDistance {
    match distance {
        Distance::Same => GpuDistance::X,
        Distance::Pix => GpuDistance::Pix,
        Distance::Pxb => GpuDistance::Pxb,
        Distance::Phb => GpuDistance::Phb,
        Distance::Node => GpuDistance::Node,
        Distance::Sys => GpuDistance::Sys,
    }
}
