//! One GPU in memory: its record beside what the last look at the hardware showed. Part of `gpus`.

use std::{collections::BTreeSet, sync::Arc};

use jiff::Timestamp;
use qudata_host::pci::PciAddress;
use qudata_vfio::{
    holders::Holder,
    plan::{BindPolicy, BindRefusal, plan_bind},
    topology::{Gpu, Topology},
};

use super::{
    GpuSetup,
    record::{GpuRecord, Life},
};

/// Why a GPU cannot be lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Stable code.
    pub code: String,
    /// What is in the way.
    pub sentence: String,
    /// What to do about it.
    pub remedy: String,
    /// Nothing is wrong: the owner wants it so, or has not said otherwise.
    pub by_choice: bool,
}

/// A GPU and what is known of it.
#[derive(Debug)]
pub struct Card {
    /// The hardware.
    pub gpu: Gpu,
    /// The durable truth.
    pub record: GpuRecord,
    /// Why the host does not let it be lent, by the last look.
    pub refused: Option<Obstacle>,
    /// Since when, as far as this agent has seen.
    pub refused_since: Timestamp,
    /// Who had it open at the last look.
    pub holders: Vec<Holder>,
    /// The owner's settings mean it; one that was lent when they still did is in sight without.
    pub meant: bool,
    /// It was there at the last look.
    pub there: bool,
    /// It is free by its record, and nobody can say that it is clean.
    pub unproven: bool,
    /// One operation at a time.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

impl Card {
    /// A GPU that is there.
    pub fn new(gpu: Gpu, record: GpuRecord) -> Self {
        Self {
            gpu,
            record,
            refused: None,
            refused_since: Timestamp::now(),
            holders: Vec::new(),
            meant: true,
            there: true,
            unproven: false,
            turn: Arc::default(),
        }
    }

    /// One that was configured or lent and is not there.
    pub fn missing(record: GpuRecord) -> Self {
        let functions = BTreeSet::from([record.address]);
        Self::new(Gpu { address: record.address, functions }, record)
    }

    /// Compares a free GPU with the hardware.
    pub(super) fn look(&mut self, topology: &Topology, holders: Vec<Holder>, setup: &GpuSetup) {
        self.holders = holders;
        let policy = policy(setup, self.gpu.address, &self.holders);
        let refused = plan_bind(topology, &self.gpu, &policy).err().map(|refusal| Obstacle {
            code: refusal.code().to_owned(),
            sentence: refusal.to_string(),
            remedy: refusal.remedy(),
            by_choice: matches!(refusal, BindRefusal::BootVga { .. }),
        });
        let code = |obstacle: &Option<Obstacle>| obstacle.as_ref().map(|obstacle| obstacle.code.clone());
        if code(&refused) != code(&self.refused) {
            self.refused_since = Timestamp::now();
        }
        self.refused = refused;
    }

    /// Why it cannot be lent right now, leases apart.
    pub fn obstacle(&self) -> Option<Obstacle> {
        let Self { record, .. } = self;
        let obstacle = |code: &str, sentence: String, remedy: &str| {
            Some(Obstacle { code: code.to_owned(), sentence, remedy: remedy.to_owned(), by_choice: false })
        };
        let address = record.address;
        match record.life {
            // What the host uses stays its own.
            Life::Free if self.refused.is_some() => self.refused.clone(),
            Life::Free if !self.meant => Some(Obstacle {
                code: "not_configured".to_owned(),
                sentence: format!("GPU {address} is not among the GPUs that the settings name"),
                remedy: "add it to QUDATA_GPU_PCI_ADDRS and restart the agent to rent it".to_owned(),
                by_choice: true,
            }),
            Life::Free if self.unproven => obstacle(
                "sanitizing",
                format!("GPU {address} is reset and checked before it is lent: who had it is not known"),
                "wait a moment",
            ),
            Life::Free => None,
            Life::Quarantined => {
                let why = record.why.as_deref().unwrap_or("it was not proven healthy and clean");
                let remedy = if !self.there {
                    "put it back, which needs a reboot; or, if it is gone for good, `qudata-agent gpu release` forgets it"
                } else if record.wedged {
                    "reboot the host: nothing else ends what hangs in its kernel, or proves that a GPU works again that was gone"
                } else {
                    "look at the GPU; `qudata-agent gpu release` resets and checks it and, if it passes, frees it"
                };
                obstacle("quarantined", format!("GPU {address} is quarantined: {why}"), remedy)
            }
            Life::Bound | Life::InUse => {
                obstacle("taken", format!("GPU {address} belongs to an instance"), "delete that instance")
            }
            Life::Draining | Life::Sanitizing => obstacle(
                "sanitizing",
                format!("GPU {address} is being reset and checked after an instance"),
                "wait a moment",
            ),
        }
    }
}

/// What the owner allows for one GPU.
pub(super) fn policy(setup: &GpuSetup, address: PciAddress, holders: &[Holder]) -> BindPolicy {
    BindPolicy { configured: setup.configured.contains(&address), holders: holders.to_vec(), wedged: false }
}
