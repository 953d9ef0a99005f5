//! All instances of this host: a table of handles, and the one place where a new instance is admitted. Cloned into every
//! HTTP call; reads are snapshots and never wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use jiff::Timestamp;
use qudata_api::{
    Command, CreateBody, Created, ErrorCode, GpuTopology, GpuView, HostView, InstanceState, InstanceView,
    Problem, StatusOf, Teardown,
};
use qudata_guest::keys::HostKey;
use qudata_host::{capacity::HostCapacity, causes::chain, pci::PciAddress, port::bindable, size::ByteSize};
use qudata_qemu::{
    disk,
    egress::{self, EgressError},
    memory::observe_hugepages,
};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    gpus::{GpuOffer, OperatorError},
    instance::{
        events::EventFeed,
        handle::{Handle, PortMove},
        record::{InstanceRecord, InstanceSpec, Leases, Phase},
        spec::{Wish, parse_key},
        task::{self, Beginning},
    },
    inventory::{Free, Ports, Taken, plan_free, plan_huge, plan_leases, plan_sizes},
    outside::Outside,
    publishing::plan::{Published, pick},
    refusal::Refusal,
    settings::TunnelKind,
    site::Site,
};

/// Handle of the whole; clones share it.
#[derive(Debug, Clone)]
pub struct Instances {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    site: Arc<Site>,
    /// By creation, so that the oldest comes first.
    table: Mutex<BTreeMap<(Timestamp, Uuid), Handle>>,
    /// One admission at a time: what is free is decided and taken before the next one looks. No wait for QEMU, a guest
    /// or the network happens under it, one commit does.
    admission: tokio::sync::Mutex<()>,
    started_at: Timestamp,
    port: u16,
    problems: Mutex<Vec<Problem>>,
    /// Set once by the daemon where there are a tunnel and a control plane.
    outside: OnceLock<Outside>,
}

impl Instances {
    /// An empty table. `port` is the API's own.
    pub fn new(site: Arc<Site>, port: u16) -> Self {
        let (table, admission, problems) =
            (Mutex::default(), tokio::sync::Mutex::default(), Mutex::default());
        Self {
            inner: Arc::new(Inner {
                site,
                table,
                admission,
                started_at: Timestamp::now(),
                port,
                problems,
                outside: OnceLock::new(),
            }),
        }
    }

    /// Shows these problems of the host from now on.
    pub fn report(&self, problems: Vec<Problem>) {
        self.problems().extend(problems);
    }

    /// Shows how the connections to the outside are doing from now on.
    pub fn watch_outside(&self, outside: Outside) {
        // Told once, by the daemon.
        let _ = self.inner.outside.set(outside);
    }

    /// Told whenever an instance changes or is gone.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.site.changes.subscribe()
    }

    /// What is to be published, oldest instance first. An instance that is being deleted is withdrawn at once.
    pub fn published(&self) -> Vec<Published> {
        self.handles().iter().filter_map(|handle| published(handle, &handle.view())).collect()
    }

    /// Adds to the history of an instance, if it is still there.
    pub fn note(&self, id: Uuid, phase: &str, message: Option<String>) {
        if let Ok(handle) = self.find(id) {
            handle.note(phase, message);
        }
    }

    /// Publishes a port of a guest under another number than `from`, which the tunnel server gives to somebody else.
    ///
    /// # Errors
    /// When the range is used up or the instance does not answer.
    pub async fn move_port(&self, id: Uuid, guest: u16, from: u16) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        let range = self.inner.site.limits().ssh_ports;
        let published = self.published();
        let public = published.iter().flat_map(|p| p.public.values().copied());
        let taken: BTreeSet<u16> = public.chain([from]).collect();
        let apart = published.iter().flat_map(|p| p.ports.values().copied()).chain(taken.clone()).collect();
        let start = rand::random_range(range.clone());
        let to = pick(&range, &apart, start).or_else(|| pick(&range, &taken, start)).ok_or_else(|| {
            let sentence = format!("no public port is free from {} to {}", range.start(), range.end());
            Refusal::new(ErrorCode::PortTaken, sentence)
        })?;
        handle.move_port(PortMove { guest, from, to }).await
    }

    /// Checks that every instance is confined by the egress policy, and puts the policy back where it is not.
    ///
    /// # Errors
    /// When nftables cannot be asked or refuses.
    pub async fn confine_all(&self, site: &Site) -> Result<(), EgressError> {
        let handles: Vec<Handle> = self.handles().into_iter().filter(has_network).collect();
        let state = site.egress.observe().await?;
        let confined = |handle: &Handle| {
            let admission = site.admission(&handle.holds().leases);
            let closed = is_up(handle) && !state.gated_among(&admission.ports).is_empty();
            state.confines(&admission) && !closed
        };
        if state.intact && handles.iter().all(confined) {
            return Ok(());
        }
        tracing::error!("the network policy was changed by somebody else; putting it back");
        site.egress.install(&egress::resolvers(Path::new("/")).unwrap_or_default()).await?;
        for handle in &handles {
            let admission = site.admission(&handle.holds().leases);
            site.egress.admit(&admission).await?;
            // Asked after the gate fell: an instance that becomes ready meanwhile opens it itself.
            if is_up(handle) {
                site.egress.open(&admission.ports).await?;
            }
        }
        Ok(())
    }

    /// Takes in an instance of an earlier agent.
    pub fn adopt(&self, record: InstanceRecord, beginning: Beginning) {
        let key = (record.created_at, record.id);
        let handle = task::spawn(self.inner.site.clone(), record, beginning);
        self.table().insert(key, handle);
    }

    /// All instances, oldest first.
    pub fn list(&self) -> Vec<InstanceView> {
        self.handles().iter().map(|handle| self.show(handle)).collect()
    }

    /// One instance.
    pub fn get(&self, id: Uuid) -> Option<InstanceView> {
        self.find(id).ok().map(|handle| self.show(&handle))
    }

    /// An instance with what the tunnel says of it.
    fn show(&self, handle: &Handle) -> InstanceView {
        let mut view = handle.view();
        let status = self.inner.outside.get().and_then(|outside| outside.tunnel.as_ref());
        let Some((published, status)) = published(handle, &view).zip(status.map(watch::Receiver::borrow))
        else {
            return view;
        };
        view.routes = published.views(&self.inner.site.public_host(), &status);
        view.problems.extend(view.routes.iter().filter_map(|route| {
            let reason = route.reason.as_ref()?;
            Some(Problem {
                code: "port_not_published".to_owned(),
                message: format!(
                    "port {} of the guest is not published as {}: {reason}",
                    route.guest_port, route.address
                ),
                remedy: "ask the tunnel server's owner; the instance itself is not affected".to_owned(),
                since: view.since,
            })
        }));
        view
    }

    /// The only instance.
    ///
    /// # Errors
    /// 404 when there is none, 409 when there are several: which one is meant is never guessed.
    pub fn sole(&self) -> Result<Uuid, Refusal> {
        match self.handles().as_slice() {
            [] => Err(Refusal::no_such_instance()),
            [one] => Ok(one.id()),
            several => {
                let sentence = format!("there are {} instances; name one by its id", several.len());
                Err(Refusal::new(ErrorCode::AmbiguousInstance, sentence))
            }
        }
    }

    /// Admits a new instance: leases and record are committed, its bring-up has begun; returns before it boots.
    ///
    /// # Errors
    /// 400, 409 or 507; nothing was changed then.
    pub async fn create(&self, body: CreateBody) -> Result<Created, Refusal> {
        let site = &self.inner.site;
        let wish = Wish::from_body(&body, site.settings.tunnel == TunnelKind::Frp)?;
        let host_key = HostKey::generate().map_err(|error| {
            tracing::error!(error = %chain(&error), "no host key");
            Refusal::new(ErrorCode::Internal, "no host key could be made for the guest")
        })?;
        let admission = self.inner.admission.lock().await;
        let record = self.plan(&wish, &host_key)?;
        site.store.put(&record).await.map_err(|error| {
            tracing::error!(error = %chain(&error), "an instance was not admitted");
            Refusal::new(
                ErrorCode::HostFault,
                "the instance could not be written down; is the host's disk full?",
            )
        })?;
        let created = Created {
            ports: record
                .leases
                .public_ports()
                .iter()
                .map(|(guest, public)| (guest.to_string(), public.to_string()))
                .collect(),
            id: record.id,
            name: record.spec.name.clone(),
            warnings: wish.warnings,
        };
        tracing::info!(instance = %record.id, name = record.spec.name, "accepted");
        self.adopt(record, Beginning::Provision(Some(Box::new(host_key))));
        drop(admission);
        Ok(created)
    }

    fn plan(&self, wish: &Wish, host_key: &HostKey) -> Result<InstanceRecord, Refusal> {
        let site = &self.inner.site;
        let limits = site.limits();
        let taken = self.taken();
        let fault = |what: &str, error: &(dyn std::error::Error + 'static)| {
            tracing::error!(error = %chain(error), "{what}");
            Refusal::new(ErrorCode::HostFault, format!("{what}; the agent's log tells why"))
        };
        let unusable = "the base image of this host cannot be used";
        // The name may lead to another image tomorrow; the disk lies over this one for good.
        let base = std::fs::canonicalize(&site.settings.base_image).map_err(|e| fault(unusable, &e))?;
        let image = disk::inspect_base(&base).map_err(|e| fault(unusable, &e))?;
        let host = HostCapacity::observe(&site.settings.data_dir)
            .map_err(|e| fault("the capacity of this host cannot be read", &e))?;
        let offer = site.gpus.offer();
        let ports = Ports {
            routed: &self.routed(),
            start: rand::random_range(limits.ssh_ports.clone()),
            bindable: &|port| bindable(site.settings.listen, port),
        };
        let leases = plan_leases(wish, &taken, &limits, &offer, &ports)?;
        let free = Free { huge: huge(&leases, &offer, &taken), ..plan_free(&host, &taken, &limits) };
        let sizes = plan_sizes(wish, &free, image.virtual_size, &limits)?;
        let id = Uuid::now_v7();
        let name = self.name(wish, id)?;
        let now = Timestamp::now();
        Ok(InstanceRecord {
            id,
            created_at: now,
            spec: InstanceSpec {
                name,
                cpus: sizes.cpus,
                memory: sizes.memory,
                storage: sizes.storage,
                ports: wish.ports.clone(),
                ssh_keys: wish.ssh_keys.clone(),
                tunnel_token: wish.tunnel_token.clone(),
            },
            leases,
            host_key: host_key.public().to_line(),
            user_data: wish.user_data.clone(),
            done: std::collections::BTreeSet::new(),
            phase: Phase::Starting,
            since: now,
            ready_at: None,
            incarnation: 1,
            boot_id: site.boot_id.clone(),
            base: Some(base),
        })
    }

    fn name(&self, wish: &Wish, id: Uuid) -> Result<String, Refusal> {
        // The last bytes of a version 7 id are random.
        let (_, random) = id.as_u64_pair();
        let name = wish.name.clone().unwrap_or_else(|| format!("instance-{:08x}", random & 0xffff_ffff));
        if self.handles().iter().any(|handle| handle.view().name == name) {
            return Err(Refusal::field("name", name, "names that no other instance has are"));
        }
        Ok(name)
    }

    /// Start, stop, restart.
    ///
    /// # Errors
    /// Why not.
    pub async fn command(&self, id: Uuid, command: Command) -> Result<StatusOf, Refusal> {
        self.find(id)?.command(command).await
    }

    /// Deletes an instance with its disk, at any moment of its life.
    ///
    /// # Errors
    /// 404 when there is none with this id: an id is never used again, so a late DELETE cannot hit another instance.
    pub async fn delete(&self, id: Uuid) -> Result<Teardown, Refusal> {
        self.find(id)?.delete().await
    }

    /// Lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn add_key(&self, id: Uuid, key: &str) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        handle.add_key(parse_key("ssh_pubkey", key)?).await
    }

    /// No longer lets a key log in.
    ///
    /// # Errors
    /// Why not.
    pub async fn remove_key(&self, id: Uuid, key: &str) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        handle.remove_key(parse_key("ssh_pubkey", key)?).await
    }

    /// The bounded serial log.
    ///
    /// # Errors
    /// When there is no such instance or the log cannot be read.
    pub async fn console(&self, id: Uuid) -> Result<Vec<u8>, Refusal> {
        self.find(id)?.console().await
    }

    /// History and what comes.
    ///
    /// # Errors
    /// When there is no such instance.
    pub fn events(&self, id: Uuid) -> Result<EventFeed, Refusal> {
        Ok(self.find(id)?.events())
    }

    /// The GPUs of this host.
    pub fn gpus(&self) -> Vec<GpuView> {
        let held = self.handles().into_iter().flat_map(|handle| {
            let id = handle.id();
            handle.holds().leases.gpus.clone().into_iter().map(move |address| (address, id))
        });
        self.inner.site.gpus.views(&held.collect())
    }

    /// One GPU.
    ///
    /// # Errors
    /// 404 when this host has none there.
    pub fn gpu(&self, address: PciAddress) -> Result<GpuView, Refusal> {
        let text = address.to_string();
        self.gpus().into_iter().find(|gpu| gpu.address == text).ok_or_else(|| no_such_gpu(address))
    }

    /// Where the GPUs sit.
    pub fn gpu_places(&self) -> GpuTopology {
        self.inner.site.gpus.places()
    }

    /// Takes a GPU out of business.
    ///
    /// # Errors
    /// 404, or 409 in a state that does not allow it.
    pub async fn quarantine(&self, address: PciAddress, reason: &str) -> Result<GpuView, Refusal> {
        let done = self.inner.site.gpus.quarantine(address, reason).await;
        done.map_err(|error| operator_refusal(address, &error))?;
        self.gpu(address)
    }

    /// Begins to reset and check a quarantined GPU, which frees it if it passes.
    ///
    /// # Errors
    /// 404, or 409 in a state that does not allow it.
    pub async fn release_gpu(&self, address: PciAddress) -> Result<GpuView, Refusal> {
        let done = self.inner.site.gpus.acquit(address).await;
        done.map_err(|error| operator_refusal(address, &error))?;
        self.gpu(address)
    }

    /// The host and what is free on it.
    pub fn host(&self) -> HostView {
        let Inner { site, started_at, port, .. } = &*self.inner;
        let (settings, taken) = (&site.settings, self.taken());
        let none = ByteSize::default();
        let observed = HostCapacity::observe(&settings.data_dir).unwrap_or(HostCapacity {
            cpus: 0,
            memory_total: none,
            memory_available: none,
            disk_total: none,
            disk_free: none,
        });
        let free = plan_free(&observed, &taken, &site.limits());
        let outside = self.inner.outside.get().cloned().unwrap_or_default();
        HostView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: *started_at,
            standalone: settings.standalone,
            accel: settings.accel.to_string(),
            firmware: settings.firmware.to_string(),
            tunnel: settings.tunnel.to_string(),
            tunnel_link: outside.tunnel_link(&site.public_host()),
            control_plane: outside.control_plane_link(&settings.service_url.to_string()),
            listen: settings.listen.to_string(),
            port: *port,
            cpus: observed.cpus,
            memory_total: observed.memory_total.bytes(),
            memory_free: free.memory.bytes(),
            disk_total: observed.disk_total.bytes(),
            disk_free: free.disk.bytes(),
            instances: taken.len(),
            problems: self
                .problems()
                .iter()
                .cloned()
                .chain(site.gpus.problems())
                .chain(outside.problems())
                .collect(),
        }
    }

    fn taken(&self) -> Vec<Taken> {
        let growth = |handle: &Handle| {
            let disk = self.inner.site.paths.instance(handle.id(), 0).disk();
            let blocks = std::fs::metadata(disk).map_or(0, |m| std::os::unix::fs::MetadataExt::blocks(&m));
            // st_blocks counts 512 bytes, stat(2).
            handle.holds().storage.saturating_sub(ByteSize::from_bytes(blocks.saturating_mul(512)))
        };
        let take = |handle: &Handle| Taken {
            leases: handle.holds().leases.clone(),
            cpus: handle.holds().cpus,
            memory: handle.holds().memory,
            disk_growth: growth(handle),
            starting: matches!(handle.view().state, InstanceState::Provisioning),
        };
        self.handles().iter().map(take).collect()
    }

    /// Host ports that the tunnel still leads to: given to a new instance now, an old name would reach its guest.
    fn routed(&self) -> BTreeSet<u16> {
        let status = self.inner.outside.get().and_then(|outside| outside.tunnel.as_ref());
        status.map_or_else(BTreeSet::new, |status| {
            status.borrow().routes.values().map(|found| found.route.local_port).collect()
        })
    }

    fn find(&self, id: Uuid) -> Result<Handle, Refusal> {
        let found = self.handles().into_iter().find(|handle| handle.id() == id);
        found.ok_or_else(Refusal::no_such_instance)
    }

    /// The living handles, oldest first; those of deleted instances are dropped on the way.
    fn handles(&self) -> Vec<Handle> {
        let mut table = self.table();
        table.retain(|_, handle| !handle.is_gone());
        table.values().cloned().collect()
    }

    fn problems(&self) -> MutexGuard<'_, Vec<Problem>> {
        self.inner.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<(Timestamp, Uuid), Handle>> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of an instance is to be published; nothing while it is being deleted, or when it has no name at the tunnel server.
fn published(handle: &Handle, view: &InstanceView) -> Option<Published> {
    let token = handle.holds().tunnel_token.clone()?;
    if view.state == InstanceState::Deleting || handle.is_gone() {
        return None;
    }
    let number = |text: &String| text.parse::<u16>().ok();
    let public = view.ports.iter().filter_map(|(guest, public)| number(guest).zip(number(public))).collect();
    Some(Published { id: handle.id(), ports: handle.holds().leases.ports.clone(), public, token })
}

/// Reserved pages for an instance with these GPUs.
fn huge(leases: &Leases, offer: &GpuOffer, taken: &[Taken]) -> ByteSize {
    let node = |address: &PciAddress| offer.topology.devices.get(address).and_then(|device| device.numa_node);
    let Some(first) = leases.gpus.first() else { return ByteSize::default() };
    let common = leases.gpus.iter().all(|gpu| node(gpu) == node(first));
    let pools = observe_hugepages(Path::new("/")).unwrap_or_default();
    plan_huge(&pools, node(first).filter(|_| common), taken)
}

fn no_such_gpu(address: PciAddress) -> Refusal {
    Refusal::new(
        ErrorCode::NoSuchGpu,
        format!("this host has no GPU {address}; GET /gpus lists those it has"),
    )
}

fn operator_refusal(address: PciAddress, error: &OperatorError) -> Refusal {
    match error {
        OperatorError::Unknown(_) => no_such_gpu(address),
        OperatorError::WrongState { .. } => Refusal::new(ErrorCode::WrongState, error.to_string()),
        OperatorError::Advance(_) => {
            tracing::error!(gpu = %address, error = %chain(error), "an operator's wish was not written down");
            Refusal::new(
                ErrorCode::HostFault,
                "the change could not be written down; is the host's disk full?",
            )
        }
    }
}

/// Whether the ports of an instance should be open.
fn is_up(handle: &Handle) -> bool {
    matches!(handle.view().state, InstanceState::Running | InstanceState::Paused)
}

/// Whether an instance has a network that must be confined. During bring-up its own task sees to that.
fn has_network(handle: &Handle) -> bool {
    use InstanceState as S;
    matches!(handle.view().state, S::Booting | S::Running | S::Paused | S::Rebooting | S::Unresponsive)
}
