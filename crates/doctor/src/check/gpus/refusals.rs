//! All reasons why a GPU must not be lent. `vfio::plan` tells the first; so it is asked again with that one out of the way
//! until it has no more. Called by the checks of GPUs.

use std::collections::BTreeMap;

use qudata_host::pci::PciAddress;
use qudata_vfio::{
    holders::Holder,
    plan::{BindPolicy, BindRefusal, plan_bind},
    topology::{Gpu, Topology},
};

use super::{DRIVER, GROUP, HOLDERS, RESET};
use crate::{
    Finding,
    check::fail,
    observed::{GpuState, Observed, Pci},
};

/// More than there are kinds of refusals.
const MOST: usize = 32;

/// An instance has the GPU; how that shows.
pub(super) struct Lent(pub(super) String);

/// Those that other checks do not tell.
pub(super) fn refusals(seen: &Observed, pci: &Pci, gpu: &Gpu, state: &GpuState, lent: bool) -> Vec<Finding> {
    let seen_by_us = |holder: &&Holder| !matches!(holder, Holder::Unseen { .. });
    let mut policy = BindPolicy {
        configured: seen.is_named(gpu),
        // Who has lent it holds it; and who cannot be seen is told as such.
        holders: if lent { Vec::new() } else { state.holders.iter().filter(seen_by_us).cloned().collect() },
        wedged: false,
    };
    let mut host = pci.topology.clone();
    let mut findings = Vec::new();
    for _ in 0..MOST {
        let Err(refusal) = plan_bind(&host, gpu, &policy) else { break };
        findings.extend(
            told_as(&refusal, &pci.topology)
                .map(|id| fail(id, without_subject(&refusal, gpu), refusal.remedy())),
        );
        if !out_of_the_way(&refusal, gpu, &mut host, &mut policy) {
            break;
        }
    }
    findings
}

/// The refusal of something that is named beside it anyway.
fn without_subject(refusal: &BindRefusal, gpu: &Gpu) -> String {
    let (text, address) = (refusal.to_string(), gpu.address);
    let rest = text.strip_prefix("GPU ").unwrap_or(&text).strip_prefix(&format!("{address} "));
    rest.map_or_else(|| text.clone(), |rest| format!("it {rest}"))
}

/// The check that tells it; none: one of its own does.
fn told_as(refusal: &BindRefusal, host: &Topology) -> Option<&'static str> {
    match refusal {
        // Without any group the IOMMU is off, which has a check of its own.
        BindRefusal::NoGroup { .. } => host.devices.values().any(|d| d.group.is_some()).then_some(GROUP),
        BindRefusal::VirtualFunction { .. } | BindRefusal::ForeignDevice { .. } => Some(GROUP),
        BindRefusal::HasVirtualFunctions { .. } | BindRefusal::Held { .. } => Some(HOLDERS),
        BindRefusal::Nouveau { .. } | BindRefusal::NotAGpu { .. } => Some(DRIVER),
        BindRefusal::NoReset { .. } => Some(RESET),
        BindRefusal::NoSuchDevice { .. }
        | BindRefusal::Wedged { .. }
        | BindRefusal::NoInterruptRemapping
        | BindRefusal::UnsafeInterrupts
        | BindRefusal::AcsOverride
        | BindRefusal::BootVga { .. }
        | BindRefusal::NoVfioPci => None,
    }
}

/// A host without this reason; `false` where there is no such host.
fn out_of_the_way(refusal: &BindRefusal, gpu: &Gpu, host: &mut Topology, policy: &mut BindPolicy) -> bool {
    let own = |host: &mut Topology, change: &dyn Fn(&mut qudata_vfio::topology::PciDevice)| {
        host.devices.values_mut().filter(|device| gpu.functions.contains(&device.address)).for_each(change);
    };
    match refusal {
        BindRefusal::NoSuchDevice { .. } => return false,
        BindRefusal::NotAGpu { .. } => own(host, &|device| device.class = 0x03_0000),
        BindRefusal::Wedged { .. } => policy.wedged = false,
        BindRefusal::VirtualFunction { .. } => own(host, &|device| device.physical = None),
        BindRefusal::HasVirtualFunctions { functions, .. } => {
            host.devices.retain(|address, _| !functions.contains(address));
        }
        BindRefusal::NoGroup { .. } | BindRefusal::ForeignDevice { .. } => {
            let groups: BTreeMap<PciAddress, u32> =
                gpu.functions.iter().copied().zip((0..=u32::MAX).rev()).collect();
            own(host, &|device| device.group = groups.get(&device.address).copied());
        }
        BindRefusal::NoInterruptRemapping => host.isolation.interrupt_remapping = true,
        BindRefusal::UnsafeInterrupts => host.isolation.unsafe_interrupts = false,
        BindRefusal::AcsOverride => host.isolation.acs_override = false,
        BindRefusal::Nouveau { .. } => own(host, &|device| device.driver = None),
        BindRefusal::BootVga { .. } => policy.configured = true,
        BindRefusal::Held { .. } => policy.holders.clear(),
        BindRefusal::NoReset { .. } => own(host, &|device| device.reset_methods = vec!["flr".to_owned()]),
        BindRefusal::NoVfioPci => host.isolation.vfio_pci = true,
    }
    true
}
