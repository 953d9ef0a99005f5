//! The durable truth about one GPU: where it is in its life, what it was before, what it must still be afterwards.
//!
//! ```text
//!        bring-up          QEMU starts       VM has ended        nobody holds it
//!  free ─────────▶ bound ─────────▶ in_use ─────────▶ draining ─────────▶ sanitizing
//!   ▲                └──────────────────────────────────▲                  │      │
//!   └──────────────── reset, checked, given back ────────────────────────────┘      │ anything else
//!                                                        ▲                          ▼
//!                            operator, or a reboot ──────┴───────────────── quarantined
//! ```
//! `leased` is no state of its own here: a GPU is leased when the record of an instance holds it. So a lease and the
//! instance cannot come apart, and a crash cannot give a GPU twice.

use std::collections::BTreeMap;

use jiff::Timestamp;
use qudata_host::pci::PciAddress;
use qudata_vfio::health::Baseline;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Where a GPU is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// With its host driver, proven or never lent.
    Free,
    /// Being moved to `vfio-pci`, or there.
    Bound,
    /// A QEMU has it, or is about to.
    InUse,
    /// Its VM is over; whoever still has it open is waited for.
    Draining,
    /// Being reset and checked.
    Sanitizing,
    /// Not proven healthy and clean.
    Quarantined,
}

impl Life {
    /// Whether this step exists. There is none from `InUse` to `Free`, nor from `Quarantined`, but through a reset and
    /// a check.
    pub fn may_become(self, next: Self) -> bool {
        use Life::{Bound, Draining, Free, InUse, Quarantined, Sanitizing};
        match (self, next) {
            (Free, Bound | Draining | Quarantined)
            | (Bound, Bound | InUse | Draining | Quarantined)
            // A VM of the same instance that starts anew.
            | (InUse, Bound | InUse | Draining | Quarantined)
            | (Draining, Draining | Sanitizing | Quarantined)
            // An agent that was killed here begins again.
            | (Sanitizing, Draining | Free | Quarantined)
            | (Quarantined, Draining | Quarantined) => true,
            (Free | Bound | InUse | Draining | Sanitizing | Quarantined, _) => false,
        }
    }
}

/// One GPU, as it is written down. Committed before the effect it announces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRecord {
    /// The GPU.
    pub address: PciAddress,
    /// Where it is in its life.
    pub life: Life,
    /// Since when.
    pub since: Timestamp,
    /// Why it is quarantined or under suspicion.
    pub why: Option<String>,
    /// The instance it serves or served last.
    pub instance: Option<Uuid>,
    /// The driver of each function before the GPU was lent first; none: it had none.
    pub originals: BTreeMap<PciAddress, Option<String>>,
    /// What it looked like then: it must look the same afterwards.
    pub baseline: Option<Baseline>,
    /// Only a reboot of the host helps: an operation hangs in the kernel, or the GPU fell off the bus. It may answer again
    /// after that and still not work. Nothing of it is touched before.
    #[serde(default)]
    pub wedged: bool,
    /// Services of the host that were stopped for the bind and are to run again.
    #[serde(default)]
    pub stopped_services: Vec<String>,
    /// It was reset and checked when it was last set free.
    #[serde(default)]
    pub cleansed: bool,
    /// It is not in the host any more, and an operator has said that it is gone for good.
    #[serde(default)]
    pub forgotten: bool,
    /// The boot of the host in which this was written.
    pub boot_id: String,
}

impl GpuRecord {
    /// A GPU that was never lent.
    pub fn new(address: PciAddress, boot_id: &str) -> Self {
        Self {
            address,
            life: Life::Free,
            since: Timestamp::now(),
            why: None,
            instance: None,
            originals: BTreeMap::new(),
            baseline: None,
            wedged: false,
            stopped_services: Vec::new(),
            cleansed: false,
            forgotten: false,
            boot_id: boot_id.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Life::*, *};

    const ALL: [Life; 6] = [Free, Bound, InUse, Draining, Sanitizing, Quarantined];

    // orig-G1: the original handed a GPU on without reset or check.
    #[test]
    fn orig_g1_nothing_becomes_free_but_through_sanitizing() {
        for life in ALL {
            assert_eq!(life.may_become(Free), life == Sanitizing, "{life:?}");
        }
        assert!(ALL.iter().all(|life| life.may_become(Sanitizing) == (*life == Draining)));
    }

    #[test]
    fn every_state_may_fail_and_every_state_has_a_way_on() {
        for life in ALL {
            assert!(life.may_become(Quarantined), "{life:?}");
            assert!(ALL.iter().any(|next| *next != Quarantined && life.may_become(*next)), "{life:?}");
        }
        assert!(!Free.may_become(InUse) && !Quarantined.may_become(Bound) && !Draining.may_become(InUse));
    }
}
