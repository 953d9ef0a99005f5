//! `iommu.*`: does the host keep devices of guests away from its memory and interrupts?

use qudata_vfio::plan::BindRefusal;

use super::{fail, pass, unseen};
use crate::{
    Finding,
    observed::{Iommu, Observed, Pci, Unseen},
};

const ENABLED: &str = "iommu.enabled";
const REMAPPING: &str = "iommu.interrupt_remapping";
const UNSAFE: &str = "iommu.unsafe_interrupts";
const ACS: &str = "iommu.acs_override";

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let pci = match &seen.pci {
        Ok(pci) => pci,
        Err(why) => return [ENABLED, REMAPPING, UNSAFE, ACS].map(|id| unseen(id, why)).into(),
    };
    let isolation = pci.topology.isolation;
    let groups = groups(pci);
    let remapping = match isolation.interrupt_remapping {
        true => pass(REMAPPING, "interrupts are remapped"),
        false if groups == 0 => unseen(REMAPPING, &Unseen::Needs("the IOMMU is off")),
        false => refused(REMAPPING, &BindRefusal::NoInterruptRemapping),
    };
    let interrupts = match isolation.unsafe_interrupts {
        false => pass(UNSAFE, "devices may not forge interrupts"),
        true => refused(UNSAFE, &BindRefusal::UnsafeInterrupts),
    };
    let acs = match isolation.acs_override {
        false => pass(ACS, "the kernel's groups are what the hardware isolates"),
        true => refused(ACS, &BindRefusal::AcsOverride),
    };
    vec![enabled(seen, groups), remapping, interrupts, acs]
}

fn groups(pci: &Pci) -> usize {
    let groups: std::collections::BTreeSet<u32> =
        pci.topology.devices.values().filter_map(|device| device.group).collect();
    groups.len()
}

fn refused(id: &'static str, refusal: &BindRefusal) -> Finding {
    fail(id, refusal.to_string(), refusal.remedy())
}

fn enabled(seen: &Observed, groups: usize) -> Finding {
    let intel = seen.processor.as_ref().is_ok_and(|processor| processor.intel);
    if groups > 0 {
        return pass(ENABLED, format!("on: {groups} groups of devices"));
    }
    let firmware = match &seen.firmware_iommu {
        Ok(firmware) => firmware,
        // That it is off is seen by the groups; who has it off is not.
        Err(why) => {
            let line = format!("the IOMMU is off; whether the firmware offers it was not looked at: {why}");
            return fail(ENABLED, line, "look again; if it stays so, turn it on in the firmware setup");
        }
    };
    let remedy = match firmware {
        None => {
            let name = if intel { "\"VT-d\"" } else { "\"IOMMU\" (AMD-Vi)" };
            let remedy = format!("turn on {name} in the firmware setup and boot again");
            return fail(ENABLED, "the IOMMU is off: no DMAR or IVRS table", remedy).on("firmware");
        }
        Some(Iommu::Intel) => "run `qudata-agent install`, or boot with intel_iommu=on iommu=pt yourself",
        Some(Iommu::Amd) => {
            "remove amd_iommu=off and iommu=off from the kernel's command line and boot again"
        }
    };
    fail(ENABLED, "the IOMMU is off, although the firmware offers it", remedy).on("kernel")
}
