//! What the host can give and who has it: ports, slots (users), CPUs, memory, disk, GPUs. Pure bookkeeping over the
//! existing leases and one observation of the host; `instances` calls it under its admission lock.
//!
//! There is no table beside the records: what is leased is what living records hold. So a lease cannot outlive its
//! instance or be given twice, also across crashes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
};

use qudata_api::ErrorCode;
use qudata_host::{capacity::HostCapacity, pci::PciAddress, size::ByteSize};
use qudata_qemu::memory::{HugePage, HugepagePools};
use qudata_vfio::choose::choose;

use crate::{
    gpus::GpuOffer,
    instance::{
        record::Leases,
        spec::{GpuWish, SSH_PORT, Wish},
    },
    publishing::plan::plan_public,
    refusal::Refusal,
};

/// What one QEMU process needs beside the guest's RAM: device models, page tables, the console ring. Measured 40 MiB
/// for a small idle machine; page tables add 2 MiB per GiB.
const VM_OVERHEAD: ByteSize = ByteSize::from_mib(128);

/// What an existing instance takes.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What it holds.
    pub leases: Leases,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its RAM.
    pub memory: ByteSize,
    /// What its disk may still grow: virtual size less what is allocated.
    pub disk_growth: ByteSize,
    /// Its VM is on its way and has not taken its memory yet.
    pub starting: bool,
}

/// What the owner allows.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Host ports for guests' port 22.
    pub ssh_ports: RangeInclusive<u16>,
    /// Host ports for all other guest ports.
    pub app_ports: RangeInclusive<u16>,
    /// Host ports for the agent's own SSH.
    pub management_ports: RangeInclusive<u16>,
    /// Public ports are those of a tunnel server.
    pub tunneled: bool,
    /// vCPUs that may be promised per CPU of the host.
    pub cpu_overcommit: u32,
    /// RAM that is never given away.
    pub reserve_memory: ByteSize,
    /// Disk space that is never given away.
    pub reserve_disk: ByteSize,
    /// Defaults, shrunk to what is free.
    pub defaults: Defaults,
}

/// What an instance gets that asks for nothing.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory: ByteSize,
    /// Disk.
    pub storage: ByteSize,
}

/// What is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// vCPUs.
    pub cpus: u32,
    /// RAM for a guest, overhead already taken off.
    pub memory: ByteSize,
    /// RAM for a guest with GPUs in reserved huge pages, which are no part of `memory`.
    pub huge: ByteSize,
    /// Disk space.
    pub disk: ByteSize,
}

/// Sizes granted to a new instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory: ByteSize,
    /// Disk.
    pub storage: ByteSize,
}

/// What a VM with this much guest RAM takes from the host.
fn footprint(memory: ByteSize) -> ByteSize {
    memory.saturating_add(VM_OVERHEAD).saturating_add(ByteSize::from_bytes(memory.bytes() / 512))
}

/// What a new instance may have at most.
pub fn plan_free(host: &HostCapacity, taken: &[Taken], limits: &Limits) -> Free {
    let sum = |size: fn(&Taken) -> ByteSize| {
        taken.iter().map(size).fold(ByteSize::default(), ByteSize::saturating_add)
    };
    let promised_cpus = taken.iter().fold(0, |n: u32, t| n.saturating_add(t.cpus));
    // Guests touch their RAM late: what is available now may be promised already, so both bounds hold.
    let unpromised = host.memory_total.saturating_sub(sum(|t| footprint(t.memory)));
    let memory = unpromised.min(host.memory_available).saturating_sub(limits.reserve_memory);
    // footprint(m) = m + m/512 + overhead, solved for m.
    let guest = memory.saturating_sub(VM_OVERHEAD).mib() / 513 * 512;
    let growth = sum(|t| t.disk_growth);
    Free {
        cpus: host.cpus.saturating_mul(limits.cpu_overcommit).saturating_sub(promised_cpus).min(host.cpus),
        memory: ByteSize::from_mib(guest),
        huge: ByteSize::default(),
        disk: host.disk_free.saturating_sub(growth).saturating_sub(limits.reserve_disk),
    }
}

/// Reserved pages for the RAM of a guest whose GPUs are on `node`. VFIO pins all of it, so guests with GPUs are the ones that
/// get them; those that are just starting have been promised theirs. Pages of both sizes are not mixed.
pub fn plan_huge(pools: &HugepagePools, node: Option<u32>, taken: &[Taken]) -> ByteSize {
    let free = match node {
        Some(node) => pools.nodes.get(&node).copied().unwrap_or_default(),
        None => pools.host,
    };
    let bytes = |pages: u64, page: HugePage| ByteSize::from_bytes(pages.saturating_mul(page.size().bytes()));
    let promised = taken.iter().filter(|t| t.starting && !t.leases.gpus.is_empty()).map(|t| t.memory);
    let promised = promised.fold(ByteSize::default(), ByteSize::saturating_add);
    bytes(free.mib2, HugePage::Mib2).max(bytes(free.gib1, HugePage::Gib1)).saturating_sub(promised)
}

/// Grants sizes: wishes as they are or a refusal, defaults shrunk to what is free. `image` is the base image's virtual
/// size, below which no disk can be.
///
/// # Errors
/// 400 for a disk smaller than the image, 507 for what the host does not have.
pub fn plan_sizes(wish: &Wish, free: &Free, image: ByteSize, limits: &Limits) -> Result<Sizes, Refusal> {
    let short = |code, what: &str, wanted: String, free: String| {
        Refusal::new(code, format!("not enough {what}: {wanted} wanted, {free} free on this host"))
    };
    let cpus = wish.cpus.unwrap_or(limits.defaults.cpus.min(free.cpus).max(1));
    if cpus > free.cpus {
        return Err(short(ErrorCode::NoCpus, "CPUs", cpus.to_string(), free.cpus.to_string()));
    }
    let least = ByteSize::from_mib(512);
    let memory = wish.memory.unwrap_or(limits.defaults.memory.min(free.memory).max(least));
    // What is in reserved pages needs only the overhead from the rest.
    if memory > free.memory && memory > free.huge {
        let free = format!("{}M", free.memory.max(free.huge).mib());
        return Err(short(ErrorCode::NoMemory, "memory", format!("{}M", memory.mib()), free));
    }
    let whole_gib = ByteSize::from_gib(free.disk.gib());
    let storage = match wish.storage {
        Some(storage) if storage < image => {
            let gib = image.bytes().div_ceil(1 << 30);
            return Err(Refusal::field(
                "storage_gb",
                storage.gib(),
                format!("at least {gib} is, the size of the image"),
            ));
        }
        Some(storage) => storage,
        None => limits.defaults.storage.min(whole_gib).max(image),
    };
    if storage > free.disk {
        let (wanted, free) = (format!("{} GiB", storage.gib()), format!("{} GiB", free.disk.gib()));
        return Err(short(ErrorCode::NoDisk, "disk space", wanted, free));
    }
    Ok(Sizes { cpus, memory, storage })
}

/// What a new instance cannot have beside the leases of the others.
pub struct Ports<'a> {
    /// Host ports that the tunnel still routes for an instance that is gone.
    pub routed: &'a BTreeSet<u16>,
    /// Where the search for a public port begins.
    pub start: u16,
    /// Asks the host whether a port is free right now.
    pub bindable: &'a dyn Fn(u16) -> bool,
}

impl fmt::Debug for Ports<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports")
            .field("routed", self.routed)
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}

/// Finds what a new instance will hold.
///
/// # Errors
/// 409 when a port range or a GPU asked for is taken or unfit, 507 when too few GPUs are free.
pub fn plan_leases(
    wish: &Wish,
    taken: &[Taken],
    limits: &Limits,
    offer: &GpuOffer,
    host: &Ports<'_>,
) -> Result<Leases, Refusal> {
    let held: BTreeSet<u16> = taken
        .iter()
        .flat_map(|t| t.leases.ports.values().copied().chain([t.leases.management_port]))
        .chain(host.routed.iter().copied())
        .collect();
    // See `public_ports`.
    let public: BTreeSet<u16> = taken.iter().flat_map(|t| t.leases.public.values().copied()).collect();
    let mut chosen = BTreeSet::new();
    let mut pick = |range: &RangeInclusive<u16>, what: &str| {
        let free = |port: &u16| !held.contains(port) && !chosen.contains(port) && (host.bindable)(*port);
        let apart = |port: &u16| free(port) && !public.contains(port);
        let port = range.clone().find(apart).or_else(|| range.clone().find(free)).ok_or_else(|| {
            let sentence = format!("no {what} port is free from {} to {}", range.start(), range.end());
            Refusal::new(ErrorCode::PortTaken, sentence)
        })?;
        chosen.insert(port);
        Ok(port)
    };
    let mut ports = BTreeMap::new();
    for guest in &wish.ports {
        let range = if *guest == SSH_PORT { &limits.ssh_ports } else { &limits.app_ports };
        ports.insert(*guest, pick(range, "public")?);
    }
    let management_port = pick(&limits.management_ports, "management")?;
    let public =
        if limits.tunneled { public_ports(&ports, taken, limits, host.start)? } else { BTreeMap::new() };
    let slots: BTreeSet<u32> = taken.iter().map(|t| t.leases.slot).collect();
    let slot = (0..u32::MAX).find(|slot| !slots.contains(slot)).unwrap_or_default();
    Ok(Leases { slot, ports, public, management_port, gpus: plan_gpus(&wish.gpus, taken, offer)? })
}

fn public_ports(
    ports: &BTreeMap<u16, u16>,
    taken: &[Taken],
    limits: &Limits,
    start: u16,
) -> Result<BTreeMap<u16, u16>, Refusal> {
    let used: BTreeSet<u16> = taken.iter().flat_map(|t| t.leases.public.values().copied()).collect();
    // Where the tunnel server is this host itself, the gate of a host port closes the public port of the same number too.
    let local = taken.iter().flat_map(|t| t.leases.ports.values()).chain(ports.values());
    let apart = used.iter().chain(local).copied().collect();
    let plan = |taken| plan_public(ports, &limits.ssh_ports, taken, start);
    plan(&apart).or_else(|| plan(&used)).ok_or_else(|| {
        let (first, last) = (limits.ssh_ports.start(), limits.ssh_ports.end());
        Refusal::new(ErrorCode::PortTaken, format!("no public port is free from {first} to {last}"))
    })
}

fn plan_gpus(wish: &GpuWish, taken: &[Taken], offer: &GpuOffer) -> Result<Vec<PciAddress>, Refusal> {
    let held: BTreeSet<PciAddress> = taken.iter().flat_map(|t| t.leases.gpus.iter().copied()).collect();
    let free: Vec<PciAddress> =
        offer.rentable.iter().copied().filter(|address| !held.contains(address)).collect();
    match wish {
        GpuWish::AllFree if free.is_empty() && !offer.all.is_empty() => {
            Err(no_gpu("all GPUs of this host are taken or unfit; ask for \"gpus\": 0 to do without", offer))
        }
        GpuWish::AllFree => Ok(free),
        GpuWish::Count(count) => {
            let count = usize::try_from(*count).unwrap_or(usize::MAX);
            choose(&offer.topology, &free, count).ok_or_else(|| {
                let (free, all) = (free.len(), offer.all.len());
                no_gpu(&format!("{count} GPUs wanted, {free} of {all} free on this host"), offer)
            })
        }
        GpuWish::Addresses(addresses) => {
            for address in addresses {
                if !offer.all.contains(address) {
                    return Err(Refusal::field("gpu_addrs", address, "the GPUs listed by GET /gpus are"));
                }
                if held.contains(address) {
                    let sentence = format!("GPU {address} belongs to another instance");
                    return Err(Refusal::new(ErrorCode::GpuTaken, sentence));
                }
                if let Some(obstacle) = offer.obstacles.get(address) {
                    return Err(Refusal::new(ErrorCode::GpuUnfit, obstacle.clone()));
                }
            }
            Ok(addresses.clone())
        }
    }
}

/// Too few GPUs, and what is in the way of the others.
fn no_gpu(sentence: &str, offer: &GpuOffer) -> Refusal {
    let obstacles = offer.obstacles.values().map(|obstacle| format!(". {obstacle}"));
    Refusal::new(ErrorCode::NoGpu, format!("{sentence}{}", obstacles.collect::<String>()))
}

#[cfg(test)]
mod tests;
