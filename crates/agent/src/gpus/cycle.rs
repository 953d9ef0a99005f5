//! The way of a GPU to an instance and back: bind, hold, cleanse. Part of `gpus`; each step is written down before it is
//! done, so that an agent killed anywhere leaves a record from which its successor goes on.
//!
//! There is one way back, whoever asks for it (DELETE, the end of a VM, recovery, an operator): wait until nobody holds
//! the GPU, make sure that all of it is on `vfio-pci`, reset it, compare it with what it was, give it back. Whatever
//! does not succeed ends in quarantine.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::future::{join_all, try_join_all};
use qudata_host::{causes::chain, durable, pci::PciAddress};
use qudata_qemu::disk::Owner;
use qudata_vfio::{
    door::{Door, DoorError},
    health::Baseline,
    holders::Holder,
    nvidia,
    plan::{BindPlan, VFIO_PCI, plan_bind, plan_give_back},
    rebind::{self, RebindError},
    sanitize,
    topology::{Gpu, Topology},
};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{
    AdvanceError, Gpus,
    bound::{BoundGpu, GpuError},
    card::policy,
    identity::{Seen, recognise},
    record::{GpuRecord, Life},
    watch::OFF_THE_BUS,
};

/// How long a holder may take to let go after its process has ended: the kernel unpins its memory first.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long a teardown waits for GPUs that are being cleansed; a bus reset takes about a second.
const RELEASE_PATIENCE: Duration = Duration::from_secs(15);
const DRAIN_PAUSE: Duration = Duration::from_millis(50);
/// How long udev may look at a device whose driver has just taken it.
const SETTLE: Duration = Duration::from_secs(2);

/// One child each.
const LISTS_TO_CLEANSE: usize = 3;

/// The driver of each function before the GPU was lent.
type Originals = BTreeMap<PciAddress, Option<String>>;

/// Who wants GPUs bound.
struct Order {
    instance: Uuid,
    owner: Owner,
    wanted: Weak<()>,
    /// With a child for each GPU.
    door: Door,
}

/// Held by whoever waits for GPUs: when it is dropped, they are not wanted any more.
struct Wanted(Weak<()>, #[allow(dead_code, reason = "what the other counts")] Arc<()>);

impl Default for Wanted {
    fn default() -> Self {
        let alive = Arc::new(());
        Self(Arc::downgrade(&alive), alive)
    }
}

impl Gpus {
    /// Brings GPUs to `vfio-pci` for an instance, all at the same time. What is there already is left as it is.
    ///
    /// # Errors
    /// The first failure; [`Gpus::release`] undoes what was reached.
    pub async fn bind(
        &self,
        instance: Uuid,
        addresses: &[PciAddress],
        owner: Owner,
    ) -> Result<Vec<BoundGpu>, GpuError> {
        if addresses.is_empty() {
            return Ok(Vec::new());
        }
        // They start while the host is looked at: a child takes longer to start than most drivers to let go.
        let door = self.inner.setup.door.ready(addresses.len());
        self.look().await;
        // Not cancelled with the bring-up: a DELETE must find a GPU whose turn is over, not one that a child still
        // writes to. What has not begun by then does not begin any more.
        let (gpus, addresses) = (self.clone(), addresses.to_vec());
        let wanted = Wanted::default();
        let order = Order { instance, owner, wanted: wanted.0.clone(), door };
        let binding = tokio::spawn(async move {
            let each = addresses.iter().map(|address| gpus.bind_one(&order, *address));
            // All of them to their end, for the same reason.
            join_all(each).await.into_iter().collect()
        });
        binding.await.unwrap_or_else(|error| Err(GpuError::Interrupted { reason: error.to_string() }))
    }

    async fn bind_one(&self, order: &Order, address: PciAddress) -> Result<BoundGpu, GpuError> {
        let Order { instance, owner, wanted, door } = order;
        let instance = *instance;
        let not_lendable = |reason: String| GpuError::NotLendable { address, reason };
        let turn = self.turn(address).ok_or_else(|| not_lendable("there is no such GPU".to_owned()))?;
        let _turn = turn.lock().await;
        if wanted.strong_count() == 0 {
            return Err(not_lendable("its instance does not want it any more".to_owned()));
        }
        let (gpu, record) =
            self.card(address).ok_or_else(|| not_lendable("there is no such GPU".to_owned()))?;
        match record.life {
            Life::Free if !self.is_unproven(address) => {}
            Life::Bound | Life::InUse if record.instance == Some(instance) => {}
            _ => return Err(not_lendable(self.reason(address))),
        }
        let topology = &self.as_it_is_now(&gpu).await;
        let quiet = self.quiet(&gpu, topology).await;
        let holders = self.holders(&gpu, topology).await;
        let plan = plan_bind(topology, &gpu, &policy(&self.inner.setup, address, &holders))
            .map_err(|refusal| not_lendable(format!("{refusal}; {}", refusal.remedy())))?;
        let first_time = record.life == Life::Free;
        let services = services(&plan);
        // Nobody is stopped, so nobody comes back: the others need not wait.
        let _quiet = quiet.filter(|_| !services.is_empty());
        self.advance(address, Life::Bound, |record| {
            record.instance = Some(instance);
            record.stopped_services = services;
            if first_time {
                record.why = None;
                record.originals = plan.originals();
                record.baseline = Some(Baseline::of(topology, &gpu));
            }
        })
        .await
        .map_err(|source| GpuError::Advance { address, source })?;
        if let Err(source) = rebind::bind(door, &plan).await {
            if let Some(DoorError::Hung { .. }) = source.door() {
                self.condemn(address, chain(&source), true).await;
            }
            return Err(GpuError::Rebind { address, source: Box::new(source) });
        }
        let bound =
            BoundGpu::of(&gpu, topology).ok_or_else(|| not_lendable("it has no IOMMU group".to_owned()))?;
        for group in &bound.groups {
            durable::give_to(&self.node(*group), owner.uid, owner.gid)
                .map_err(|source| GpuError::Node { address, source })?;
        }
        Ok(bound)
    }

    /// Writes down that a VM has these GPUs, before it starts.
    ///
    /// # Errors
    /// When it cannot be written down; then no VM may start.
    pub async fn hold(&self, bound: &[BoundGpu]) -> Result<(), GpuError> {
        let hold = |gpu: &BoundGpu| {
            let address = gpu.address;
            async move {
                // By now its services run again.
                self.advance(address, Life::InUse, |record| record.stopped_services.clear())
                    .await
                    .map_err(|source| GpuError::Advance { address, source })
            }
        };
        try_join_all(bound.iter().map(hold)).await.map(drop)
    }

    /// Takes GPUs back from an instance whose VM has ended, all at the same time, and makes them fit for the next. One
    /// that does not pass is quarantined; the instance has nothing to do with it any more.
    ///
    /// Waits for the end of it as long as a healthy GPU needs, so that whoever deletes and creates at once finds it
    /// free; what takes longer goes on by itself, and the GPU is not lent meanwhile.
    pub async fn release(&self, instance: Uuid, addresses: &[PciAddress]) {
        for turn in addresses.iter().filter_map(|address| self.turn(*address)) {
            // A bring-up that was given up may be in the middle of binding it; after this it has bound it or never will.
            drop(turn.lock().await);
        }
        let ours = |address: &PciAddress| {
            let life = self.record(*address).map(|record| record.life);
            self.serves(*address, instance) && !matches!(life, None | Some(Life::Free | Life::Quarantined))
        };
        let ours: Vec<PciAddress> = addresses.iter().copied().filter(ours).collect();
        if ours.is_empty() {
            return;
        }
        let gpus = self.clone();
        let cleansing = tokio::spawn(async move {
            join_all(ours.iter().map(|address| gpus.cleanse(*address))).await;
            gpus.settle(&ours).await;
        });
        if timeout(RELEASE_PATIENCE, cleansing).await.is_err() {
            tracing::warn!(%instance, "cleansing its GPUs takes long; it goes on");
        }
    }

    /// Looks until nobody holds GPUs that are just back with their host driver: for an instant udev has what is new there
    /// open, and what one look finds counts until the next. Who really holds one is told after a moment.
    pub(super) async fn settle(&self, addresses: &[PciAddress]) {
        let end = Instant::now() + SETTLE;
        loop {
            self.look().await;
            let held = |address: &PciAddress| {
                let obstacle = self.cards().get(address).and_then(super::card::Card::obstacle);
                obstacle.is_some_and(|obstacle| obstacle.code == "held")
            };
            if !addresses.iter().any(held) || Instant::now() >= end {
                return;
            }
            sleep(DRAIN_PAUSE).await;
        }
    }

    /// A VM of this instance could not be ended: its GPUs may still be in use.
    pub async fn strand(&self, instance: Uuid, addresses: &[PciAddress]) {
        for address in addresses.iter().filter(|address| self.serves(**address, instance)) {
            self.condemn(*address, "the VM that has it could not be ended".to_owned(), false).await;
        }
    }

    /// The one way back. Ends free or quarantined.
    pub(super) async fn cleanse(&self, address: PciAddress) {
        let Some(turn) = self.turn(address) else { return };
        let _turn = turn.lock().await;
        let Some((gpu, record)) = self.card(address) else { return };
        if record.life == Life::Free && !self.is_unproven(address) {
            // Somebody else has done it while the turn was waited for.
            return;
        }
        // A card that was gone may answer and not work; a reboot and a passed check prove that it does.
        let cleared = |why: &String| why == OFF_THE_BUS && record.boot_id != self.inner.setup.boot_id;
        let suspicion = record.why.clone().filter(|why| record.life != Life::Quarantined && !cleared(why));
        match self.try_cleanse(&gpu, record).await {
            Ok(()) => {}
            Err(Trouble { why, wedged }) => {
                let reboot = wedged || self.is_off_the_bus(address).await;
                return self.condemn(address, why, reboot).await;
            }
        }
        if let Some(why) = suspicion {
            // Whatever it answers now.
            let reboot = why == OFF_THE_BUS;
            return self.condemn(address, why, reboot).await;
        }
        if let Err(error) = self.advance(address, Life::Free, free).await {
            self.condemn(address, chain(&error), false).await;
        }
    }

    async fn try_cleanse(&self, gpu: &Gpu, record: GpuRecord) -> Result<(), Trouble> {
        let address = gpu.address;
        let setup = &self.inner.setup;
        // To vfio-pci, reset and check, back: the children start while the VM's hold on the GPU ends.
        let door = setup.door.ready(LISTS_TO_CLEANSE);
        self.look().await;
        let topology = self.topology();
        let (gpu, known) = match recognise(&topology, &setup.configured, gpu, &record, &setup.boot_id) {
            Seen::Known(gpu) => (gpu, true),
            Seen::New(gpu) => (gpu, false),
            Seen::Other(why) => return Err(Trouble::because(why)),
        };
        let gpu = &gpu;
        let step = |record: &mut GpuRecord| {
            record.wedged = false;
            if !known {
                (record.originals, record.baseline) = (Originals::new(), None);
            }
        };
        let GpuRecord { originals, baseline, .. } = self.advance(address, Life::Draining, step).await?;
        self.drained(gpu, &topology).await?;
        self.take_nodes_back(gpu, &topology);
        // Half-bound, or back with its host driver after a reboot: a reset must reach the whole slot, and no host driver
        // may touch the GPU before it.
        let quiet = self.quiet(gpu, &topology).await;
        let holders = self.holders(gpu, &topology).await;
        let plan = plan_bind(&topology, gpu, &policy(setup, address, &holders))
            .map_err(|refusal| Trouble::because(format!("{refusal}; {}", refusal.remedy())))?;
        let services = services(&plan);
        let quiet = quiet.filter(|_| !services.is_empty());
        if !services.is_empty() {
            self.advance(address, Life::Draining, |record| record.stopped_services = services).await?;
        }
        // Never lent before: what it was is what is there now.
        let originals = if originals.is_empty() { plan.originals() } else { originals };
        let baseline = baseline.unwrap_or_else(|| Baseline::of(&topology, gpu));
        rebind::bind(&door, &plan).await?;
        drop(quiet);
        let kept = (originals.clone(), baseline.clone());
        self.advance(address, Life::Sanitizing, |record| {
            record.originals = kept.0;
            record.baseline = Some(kept.1);
            record.stopped_services.clear();
        })
        .await?;
        self.look().await;
        let topology = self.topology();
        let sanitized = sanitize::sanitize(&door, gpu, &topology, &baseline).await?;
        tracing::info!(gpu = %address, ?sanitized, "reset and checked");
        let plan = plan_give_back(&topology, gpu, &self.at_home(originals), setup.after);
        rebind::give_back(&door, &plan).await?;
        Ok(())
    }

    /// The drivers to go back to, as far as this host still has them. A function that was proven clean stays on
    /// `vfio-pci` without.
    fn at_home(&self, mut originals: Originals) -> Originals {
        let drivers = self.inner.setup.root.join("sys/bus/pci/drivers");
        for (address, driver) in &mut originals {
            if let Some(gone) = driver.take_if(|driver| !drivers.join(driver).exists()) {
                tracing::warn!(gpu = %address, driver = gone, "its driver is not loaded any more; it stays on vfio-pci");
                *driver = Some(VFIO_PCI.to_owned());
            }
        }
        originals
    }

    /// The topology with this GPU where it is: between the last look and now somebody else may have given it back.
    async fn as_it_is_now(&self, gpu: &Gpu) -> Arc<Topology> {
        let topology = self.topology();
        let devices = self.inner.setup.root.join("sys/bus/pci/devices");
        let driver = |function: &PciAddress| {
            let link = std::fs::read_link(devices.join(format!("{function}/driver"))).ok()?;
            Some(link.file_name()?.to_string_lossy().into_owned())
        };
        let seen =
            |function: &PciAddress| topology.devices.get(function).and_then(|seen| seen.driver.clone());
        if gpu.functions.iter().all(|function| driver(function) == seen(function)) {
            return topology;
        }
        self.look().await;
        self.topology()
    }

    /// Held from the look at who holds a GPU until it has left its driver. NVIDIA's services hold all GPUs of the driver:
    /// what is not seen because it was stopped for another GPU comes back in the middle of this one's unbind.
    async fn quiet(&self, gpu: &Gpu, topology: &Topology) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        let driver = |function: &PciAddress| topology.devices.get(function)?.driver.as_deref();
        let theirs = gpu.functions.iter().any(|function| driver(function) == Some(nvidia::DRIVER));
        if theirs { Some(self.inner.quiet.lock().await) } else { None }
    }

    /// Waits until no process has the GPU open. Writing to `unbind` before that would hang.
    async fn drained(&self, gpu: &Gpu, topology: &Arc<Topology>) -> Result<(), Trouble> {
        let end = Instant::now() + DRAIN_DEADLINE;
        loop {
            let holders = self.holders(gpu, topology).await;
            let Some(holder) = holders.into_iter().find(Holder::through_vfio) else {
                return Ok(());
            };
            if Instant::now() >= end {
                return Err(Trouble::because(format!("{holder} still holds it")));
            }
            sleep(DRAIN_PAUSE).await;
        }
    }

    /// Nobody but root opens it until it is lent again, also where it is not proven clean: users of VMs are used again.
    fn take_nodes_back(&self, gpu: &Gpu, topology: &Topology) {
        let group = |function: &PciAddress| topology.devices.get(function)?.group;
        for group in gpu.functions.iter().filter_map(group) {
            // Absence is success.
            let _ = durable::give_to(&self.node(group), 0, 0);
        }
    }

    fn is_unproven(&self, address: PciAddress) -> bool {
        self.cards().get(&address).is_some_and(|card| card.unproven)
    }

    fn node(&self, group: u32) -> PathBuf {
        self.inner.setup.root.join(Path::new("dev/vfio")).join(group.to_string())
    }

    pub(super) fn turn(&self, address: PciAddress) -> Option<Arc<tokio::sync::Mutex<()>>> {
        self.cards().get(&address).map(|card| card.turn.clone())
    }

    fn card(&self, address: PciAddress) -> Option<(Gpu, GpuRecord)> {
        self.cards().get(&address).map(|card| (card.gpu.clone(), card.record.clone()))
    }

    fn reason(&self, address: PciAddress) -> String {
        let obstacle = self.cards().get(&address).and_then(super::card::Card::obstacle);
        obstacle.map_or_else(|| "it is not free".to_owned(), |obstacle| obstacle.to_string())
    }
}

/// The services that a plan stops.
fn services(plan: &BindPlan) -> Vec<String> {
    plan.quieting.as_ref().map(|quieting| quieting.services.clone()).unwrap_or_default()
}

/// Nothing of its past matters any more.
fn free(record: &mut GpuRecord) {
    (record.why, record.instance, record.wedged) = (None, None, false);
    record.stopped_services.clear();
    (record.originals, record.baseline, record.cleansed) = (BTreeMap::new(), None, true);
}

/// Why a GPU is quarantined.
struct Trouble {
    why: String,
    wedged: bool,
}

impl Trouble {
    fn because(why: String) -> Self {
        Self { why, wedged: false }
    }
}

impl From<AdvanceError> for Trouble {
    fn from(error: AdvanceError) -> Self {
        Self::because(chain(&error))
    }
}

impl From<RebindError> for Trouble {
    fn from(error: RebindError) -> Self {
        Self { why: chain(&error), wedged: matches!(error.door(), Some(DoorError::Hung { .. })) }
    }
}

impl From<sanitize::SanitizeError> for Trouble {
    fn from(error: sanitize::SanitizeError) -> Self {
        Self { why: chain(&error), wedged: matches!(error.door(), Some(DoorError::Hung { .. })) }
    }
}
