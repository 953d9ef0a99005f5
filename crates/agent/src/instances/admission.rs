//! The one place where a new instance is admitted: what is free is decided and taken before the next one looks.

use std::{collections::BTreeSet, os::unix::fs::MetadataExt, path::Path};

use jiff::Timestamp;
use qudata_api::{CreateBody, Created, ErrorCode, InstanceState};
use qudata_guest::keys::HostKey;
use qudata_host::{
    capacity::HostCapacity, causes::chain, durable, pci::PciAddress, port::bindable, size::ByteSize,
};
use qudata_qemu::{disk, memory::observe_hugepages};
use uuid::Uuid;

use super::Instances;
use crate::{
    gpus::GpuOffer,
    instance::{
        handle::Handle,
        record::{InstanceRecord, InstanceSpec, Leases, Phase},
        spec::Wish,
        task::Beginning,
    },
    inventory::{Free, Ports, Taken, plan_free, plan_huge, plan_leases, plan_sizes},
    refusal::Refusal,
    settings::TunnelKind,
};

impl Instances {
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
        let id = Uuid::now_v7();
        let place = site.paths.instance(id, 0).data;
        self.hold(&place).await?;
        let record = match self.plan(&wish, &host_key, id) {
            Ok(record) => record,
            Err(refusal) => {
                let _ = std::fs::remove_dir(&place);
                return Err(refusal);
            }
        };
        if let Err(error) = site.store.put(&record).await {
            let _ = std::fs::remove_dir(&place);
            tracing::error!(error = %chain(&error), "an instance was not admitted");
            let why = "the instance could not be written down; is the host's disk full?";
            return Err(Refusal::new(ErrorCode::HostFault, why));
        }
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
        self.adopt(record, Beginning::Provision(Box::new(host_key)));
        drop(admission);
        Ok(created)
    }

    /// Makes the instance's folder, on disk, before anybody looks which base image is current: while it is there and its
    /// disk does not say over which image it lies, `qudata-image` removes none.
    async fn hold(&self, place: &Path) -> Result<(), Refusal> {
        let (place, parent) = (place.to_owned(), self.inner.site.paths.instances());
        let made = tokio::task::spawn_blocking(move || {
            durable::create_dir(&place, 0o711)?;
            durable::sync_dir(&parent).inspect_err(|_| drop(std::fs::remove_dir(&place)))
        });
        let fault = |error: &(dyn std::error::Error + 'static)| {
            tracing::error!(error = %chain(error), "the folder of an instance");
            let why = "the instance's folder could not be made; is the host's disk full?";
            Refusal::new(ErrorCode::HostFault, why)
        };
        made.await.map_err(|e| fault(&e))?.map_err(|e| fault(&e))
    }

    fn plan(&self, wish: &Wish, host_key: &HostKey, id: Uuid) -> Result<InstanceRecord, Refusal> {
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
            done: BTreeSet::new(),
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

    pub(super) fn taken(&self) -> Vec<Taken> {
        let growth = |handle: &Handle| {
            let disk = self.inner.site.paths.instance(handle.id(), 0).disk();
            let blocks = std::fs::metadata(disk).map_or(0, |m| m.blocks());
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
}

/// Reserved pages for an instance with these GPUs.
fn huge(leases: &Leases, offer: &GpuOffer, taken: &[Taken]) -> ByteSize {
    let node = |address: &PciAddress| offer.topology.devices.get(address).and_then(|device| device.numa_node);
    let Some(first) = leases.gpus.first() else { return ByteSize::default() };
    let common = leases.gpus.iter().all(|gpu| node(gpu) == node(first));
    let pools = observe_hugepages(Path::new("/")).unwrap_or_default();
    plan_huge(&pools, node(first).filter(|_| common), taken)
}
