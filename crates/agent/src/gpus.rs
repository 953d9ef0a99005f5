//! The GPUs of this host and where each is in its life. Owns their records and the last look at the hardware; `cycle`
//! moves them to `vfio-pci` and back, `watch` looks after those in use. Called by admission, bring-up, teardown, the API.
//!
//! What takes time or may hang happens in short-lived children of `qudata_vfio`, one GPU at a time (its turn); reads
//! are snapshots and never wait.

mod bound;
pub mod card;
mod cycle;
mod identity;
pub mod record;
mod services;
mod view;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use jiff::Timestamp;
use qudata_api::Problem;
use qudata_host::{causes::chain, pci::PciAddress};
use qudata_vfio::{
    door::Door,
    holders::{Holder, OpenNodes},
    names::PciIds,
    nvidia,
    plan::AfterUse,
    topology::{self, Gpu, PciDevice, Topology},
};
use tokio::{sync::oneshot, task::JoinHandle};
use uuid::Uuid;

pub use self::{
    bound::{BoundFunction, BoundGpu, GpuError},
    watch::OperatorError,
};
use self::{
    card::{Card, Obstacle},
    record::{GpuRecord, Life},
};
use crate::store::{Store, StoreError};

/// Reading the topology takes milliseconds; a host that takes longer has a bus that hangs.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// What the owner decided about GPUs, and where the agent finds things.
#[derive(Debug)]
pub struct GpuSetup {
    /// Whether GPUs are rented at all.
    pub enabled: bool,
    /// The GPUs that may be rented; empty: all display controllers but the one with the firmware's console.
    pub configured: Vec<PciAddress>,
    /// Where a GPU goes after an instance.
    pub after: AfterUse,
    /// Root of the file system; `/` but in tests.
    pub root: PathBuf,
    /// Does what may hang.
    pub door: Door,
    /// Keeps the records.
    pub store: Store,
    /// This boot of the host.
    pub boot_id: String,
}

/// Handle of the whole; clones share it.
#[derive(Debug, Clone)]
pub struct Gpus {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    setup: GpuSetup,
    ids: PciIds,
    cards: Mutex<BTreeMap<PciAddress, Card>>,
    topology: Mutex<Arc<Topology>>,
    /// The GPUs that the NVIDIA driver had when it was asked, and its answers.
    minors: Mutex<(BTreeSet<PciAddress>, BTreeMap<PciAddress, u32>)>,
    /// Held while services of the host are stopped for a bind.
    quiet: tokio::sync::Mutex<()>,
    /// Looks at the hardware that did not come back.
    hung: Mutex<Hung>,
    /// Held for one look at the hardware: an older view must not be stored over a newer one.
    looking: tokio::sync::Mutex<()>,
    /// Held for one commit: an operator's word and a step of a bring-up must not overwrite each other.
    commit: tokio::sync::Mutex<()>,
}

/// What hangs in the kernel, a thread each. While it does, the same is not asked again: the threads are those that commits
/// to the store need too.
#[derive(Debug, Default)]
struct Hung {
    bus: Option<(Timestamp, JoinHandle<()>)>,
    reads: BTreeMap<PciAddress, JoinHandle<()>>,
}

/// What admission may choose from.
#[derive(Debug, Clone, Default)]
pub struct GpuOffer {
    /// All GPUs of the host.
    pub all: Vec<PciAddress>,
    /// Those that can be lent now, as far as leases do not speak against it.
    pub rentable: Vec<PciAddress>,
    /// Why the others cannot, one sentence each.
    pub obstacles: BTreeMap<PciAddress, String>,
    /// Where they sit.
    pub topology: Arc<Topology>,
}

impl Gpus {
    /// Looks at the hardware and takes in what an earlier agent wrote down. Nothing is changed yet; see
    /// [`Gpus::recover`].
    pub async fn open(setup: GpuSetup, records: Vec<GpuRecord>) -> Self {
        let ids = PciIds::load(&setup.root);
        let gpus = Self {
            inner: Arc::new(Inner {
                setup,
                ids,
                cards: Mutex::default(),
                topology: Mutex::default(),
                minors: Mutex::default(),
                quiet: tokio::sync::Mutex::default(),
                hung: Mutex::default(),
                looking: tokio::sync::Mutex::default(),
                commit: tokio::sync::Mutex::default(),
            }),
        };
        if gpus.inner.setup.enabled {
            gpus.look().await;
            gpus.take_in(records);
            gpus.doubt();
            gpus.look().await;
        }
        gpus
    }

    /// A host that rents no GPUs.
    #[cfg(test)]
    pub(crate) fn none(store: Store) -> Self {
        let setup = GpuSetup {
            enabled: false,
            configured: Vec::new(),
            after: AfterUse::Host,
            root: PathBuf::from("/nonexistent"),
            door: Door::Child { program: PathBuf::new(), args: Vec::new(), root: PathBuf::new() },
            store,
            boot_id: String::new(),
        };
        let (ids, cards) = (PciIds::load(&setup.root), Mutex::default());
        let (topology, minors) = (Mutex::default(), Mutex::default());
        let (quiet, commit) = (tokio::sync::Mutex::default(), tokio::sync::Mutex::default());
        let (hung, looking) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { inner: Arc::new(Inner { setup, ids, cards, topology, minors, quiet, hung, looking, commit }) }
    }

    fn take_in(&self, records: Vec<GpuRecord>) {
        let (topology, setup) = (self.topology(), &self.inner.setup);
        let mut known: BTreeMap<PciAddress, GpuRecord> =
            records.into_iter().map(|record| (record.address, record)).collect();
        let mut cards = self.cards();
        for gpu in topology.gpus(&setup.configured) {
            let named = gpu.functions.iter().any(|function| setup.configured.contains(function));
            let record = known.remove(&gpu.address);
            // One that is lent or was not proven clean stays in sight, whatever the settings say now.
            let unfinished = record.as_ref().is_some_and(|record| record.life != Life::Free);
            if !(named || setup.configured.is_empty() || unfinished) {
                continue;
            }
            let record = record.unwrap_or_else(|| GpuRecord::new(gpu.address, &setup.boot_id));
            let record = GpuRecord { forgotten: false, ..record };
            let meant = named || setup.configured.is_empty();
            cards.insert(gpu.address, Card { meant, ..Card::new(gpu, record) });
        }
        known.retain(|_, record| !record.forgotten);
        let absent = setup.configured.iter().copied().filter(|address| {
            !cards.values().any(|card| card.gpu.functions.contains(address)) && !known.contains_key(address)
        });
        let absent: Vec<GpuRecord> = absent.map(|address| GpuRecord::new(address, &setup.boot_id)).collect();
        let lost = known
            .into_values()
            .filter(|record| record.life != Life::Free || setup.configured.contains(&record.address));
        for record in absent.into_iter().chain(lost) {
            cards.insert(record.address, Card::missing(record));
        }
    }

    /// Looks at the hardware again and works out which GPUs can be lent.
    pub async fn look(&self) {
        let _looking = self.inner.looking.lock().await;
        if self.bus_hangs().is_some() {
            return;
        }
        let root = self.inner.setup.root.clone();
        let (found, looked) = oneshot::channel();
        let look = tokio::task::spawn_blocking(move || {
            // Nobody waits any more after the deadline.
            let _ =
                found.send(topology::observe(&root).map(|topology| (topology, OpenNodes::observe(&root))));
        });
        match tokio::time::timeout(LOOK_DEADLINE, looked).await {
            Ok(Ok(Ok((topology, nodes)))) => {
                let topology = Arc::new(topology);
                self.ask_minors(&topology).await;
                let minors = self.minors();
                *self.inner.topology.lock().unwrap_or_else(PoisonError::into_inner) = topology.clone();
                let setup = &self.inner.setup;
                for card in self.cards().values_mut() {
                    card.there = topology.devices.contains_key(&card.record.address);
                    if card.record.life == Life::Free {
                        let holders = nodes.holders_of(&card.gpu, &topology, &minors);
                        card.look(&topology, holders, setup);
                    }
                }
            }
            Ok(Ok(Err(error))) => tracing::error!(error = %chain(&error), "the PCI bus cannot be read"),
            Ok(Err(error)) => tracing::error!(%error, "the PCI bus cannot be read"),
            Err(_) => {
                tracing::error!(deadline = ?LOOK_DEADLINE, "reading the PCI bus hangs");
                self.hung().bus = Some((Timestamp::now(), look));
            }
        }
    }

    /// Told while a look at the PCI bus does not come back.
    fn bus_hangs(&self) -> Option<Problem> {
        let since =
            self.hung().bus.as_ref().filter(|(_, look)| !look.is_finished()).map(|(since, _)| *since)?;
        Some(Problem {
            code: "pci_bus_hangs".to_owned(),
            message: "reading the PCI bus hangs in the kernel: what is shown of the GPUs is from before"
                .to_owned(),
            remedy:
                "look at the kernel's log (dmesg) for the device that does not answer; a reboot clears it"
                    .to_owned(),
            since,
        })
    }

    fn hung(&self) -> MutexGuard<'_, Hung> {
        self.inner.hung.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who holds a GPU right now.
    async fn holders(&self, gpu: &Gpu, topology: &Arc<Topology>) -> Vec<Holder> {
        let (root, gpu, topology, minors) =
            (self.inner.setup.root.clone(), gpu.clone(), topology.clone(), self.minors());
        // Looks at every process of the host.
        let look = tokio::task::spawn_blocking(move || {
            OpenNodes::observe(&root).holders_of(&gpu, &topology, &minors)
        });
        // Others wait for this one's turn meanwhile: what cannot be seen holds it.
        match tokio::time::timeout(LOOK_DEADLINE, look).await {
            Ok(Ok(holders)) => holders,
            Ok(Err(error)) => vec![Holder::Unseen { why: error.to_string() }],
            Err(_) => {
                vec![Holder::Unseen { why: "looking through the processes of the host hangs".to_owned() }]
            }
        }
    }

    /// Asks the NVIDIA driver which `/dev/nvidiaN` is whose, when its set of GPUs has changed: without an answer a holder of
    /// one may hold any. In a child, because the driver may hang, and not on every look, because it wakes the GPUs.
    async fn ask_minors(&self, topology: &Topology) {
        let theirs = |device: &&PciDevice| device.driver.as_deref() == Some(nvidia::DRIVER);
        let gpus: BTreeSet<PciAddress> =
            topology.devices.values().filter(theirs).map(|device| device.address).collect();
        if self.inner.minors.lock().unwrap_or_else(PoisonError::into_inner).0 == gpus {
            return;
        }
        // All at once: where the driver hangs, each answer takes its deadline.
        let ask = |address: &PciAddress| {
            let address = *address;
            async move {
                let minor = nvidia::minor(&self.inner.setup.door, address).await.unwrap_or_else(|error| {
                    tracing::warn!(gpu = %address, error = %chain(&error), "the NVIDIA driver does not answer");
                    None
                });
                Some((address, minor?))
            }
        };
        let minors = join_all(gpus.iter().map(ask)).await.into_iter().flatten().collect();
        *self.inner.minors.lock().unwrap_or_else(PoisonError::into_inner) = (gpus, minors);
    }

    fn minors(&self) -> BTreeMap<PciAddress, u32> {
        self.inner.minors.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// What admission may choose from.
    pub fn offer(&self) -> GpuOffer {
        let cards = self.cards();
        let obstacle =
            |card: &Card| card.obstacle().map(|obstacle| (card.record.address, obstacle.to_string()));
        GpuOffer {
            all: cards.keys().copied().collect(),
            rentable: cards.values().filter(|c| c.obstacle().is_none()).map(|c| c.record.address).collect(),
            obstacles: cards.values().filter_map(obstacle).collect(),
            topology: self.topology(),
        }
    }

    /// Whether this is a GPU of this host that may be named in a wish.
    pub fn knows(&self, address: PciAddress) -> bool {
        self.cards().contains_key(&address)
    }

    fn topology(&self) -> Arc<Topology> {
        self.inner.topology.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cards(&self) -> MutexGuard<'_, BTreeMap<PciAddress, Card>> {
        self.inner.cards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, address: PciAddress) -> Option<GpuRecord> {
        self.cards().get(&address).map(|card| card.record.clone())
    }

    /// Moves a GPU on: on disk first, then in memory. `change` sees the record with `life` and `since` set already.
    async fn advance(
        &self,
        address: PciAddress,
        life: Life,
        change: impl FnOnce(&mut GpuRecord),
    ) -> Result<GpuRecord, AdvanceError> {
        self.step(address, |_| life, change).await
    }

    /// The same to where `next` says, which sees where it is by then.
    async fn step(
        &self,
        address: PciAddress,
        next: impl FnOnce(Life) -> Life,
        change: impl FnOnce(&mut GpuRecord),
    ) -> Result<GpuRecord, AdvanceError> {
        let _commit = self.inner.commit.lock().await;
        let mut record = self.record(address).ok_or(AdvanceError::Unknown { address })?;
        let life = next(record.life);
        if record.life != life && !record.life.may_become(life) {
            return Err(AdvanceError::NoSuchStep { address, from: record.life, to: life });
        }
        if record.life != life {
            record.since = Timestamp::now();
        }
        record.life = life;
        record.boot_id.clone_from(&self.inner.setup.boot_id);
        change(&mut record);
        let stored = self.inner.setup.store.put_gpu(&record).await;
        // What protects tenants holds in memory even where the disk is full.
        if (stored.is_ok() || life == Life::Quarantined)
            && let Some(card) = self.cards().get_mut(&address)
        {
            // Nothing becomes free but by a reset and a check.
            card.unproven &= life != Life::Free;
            card.record = record.clone();
        }
        stored.map_err(|source| AdvanceError::Store { address, source })?;
        tracing::info!(gpu = %address, ?life, instance = ?record.instance, why = record.why, "GPU");
        Ok(record)
    }

    /// Takes a GPU out of business. In memory it is so even if it cannot be written down.
    async fn condemn(&self, address: PciAddress, why: String, wedged: bool) {
        tracing::error!(gpu = %address, why, wedged, "quarantined");
        let quarantined = self
            .advance(address, Life::Quarantined, |record| {
                record.why = Some(why);
                record.wedged |= wedged;
            })
            .await;
        if let Err(error) = quarantined {
            tracing::error!(gpu = %address, error = %chain(&error), "the quarantine was not written down");
        }
    }

    /// Writes down that a GPU that is not in the host any more is to be spoken of no longer. What is known of it stays: it
    /// counts again where it comes back.
    async fn forget(&self, address: PciAddress) -> Result<(), AdvanceError> {
        let _commit = self.inner.commit.lock().await;
        let record = self.record(address).ok_or(AdvanceError::Unknown { address })?;
        if record.life != Life::Quarantined {
            // Somebody else was faster.
            return Err(AdvanceError::NoSuchStep { address, from: record.life, to: Life::Quarantined });
        }
        let forgotten = GpuRecord { forgotten: true, ..record };
        let stored = self.inner.setup.store.put_gpu(&forgotten).await;
        stored.map_err(|source| AdvanceError::Store { address, source })?;
        if let Some(card) = self.cards().get_mut(&address) {
            let record = GpuRecord::new(address, &self.inner.setup.boot_id);
            let (turn, meant) = (card.turn.clone(), card.meant);
            *card = Card { turn, meant, unproven: true, ..Card::missing(record) };
        }
        tracing::info!(gpu = %address, "forgotten: it is not in this host any more");
        Ok(())
    }

    fn records(&self) -> Vec<GpuRecord> {
        self.cards().values().map(|card| card.record.clone()).collect()
    }

    /// Which instance a GPU serves or served last.
    fn serves(&self, address: PciAddress, instance: Uuid) -> bool {
        self.cards().get(&address).is_some_and(|card| card.record.instance == Some(instance))
    }
}

/// A step in the life of a GPU was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AdvanceError {
    /// There is no such GPU.
    #[error("there is no GPU {address} on this host")]
    Unknown {
        /// Its address.
        address: PciAddress,
    },
    /// The step does not exist.
    #[error("GPU {address} cannot go from {from:?} to {to:?}")]
    NoSuchStep {
        /// Its address.
        address: PciAddress,
        /// Where it is.
        from: Life,
        /// Where it should go.
        to: Life,
    },
    /// It could not be written down, so it was not done.
    #[error("the new state of GPU {address} could not be written down")]
    Store {
        /// Its address.
        address: PciAddress,
        /// Why.
        #[source]
        source: StoreError,
    },
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.sentence, self.remedy)
    }
}
