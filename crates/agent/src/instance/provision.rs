//! Bring-up of one instance, from leases to a VM whose guest boots. Called by the instance's task for the first start
//! and for every later one; what exists already is used, never made again.
//!
//! ```text
//!   disk ┐
//!   seed ├─▶ files done (commit) ─┐
//!   vars ┘                        ├─▶ QEMU ─▶ proven over QMP ─▶ continue
//!   egress ─▶ passt ──────────────┤
//!   GPUs bound ───────────────────┘
//! ```
//! Each value is needed by the next step, so a VM on unbound GPUs or without its network does not compile. The intent
//! was committed by admission (`Phase::Starting`); `teardown` undoes whatever was reached.

use std::{error::Error, time::Duration};

use qudata_guest::{
    keys::{GuestKey, HostKey},
    seed::{Seed, SeedSpec, StaticNetwork, UserData},
};
use qudata_host::{
    causes::chain,
    durable,
    launch::{Confinement, Launch, log_path},
    process::Process,
    size::ByteSize,
};
use qudata_qemu::{
    disk::{self, Owner},
    firmware::{self, Firmware},
    machine::{Disk, MacAddress, Machine, NetworkDevice},
    passt::{self, Forward, Passt},
    vm::{Vm, VmLaunch, paths::PASST},
};

use super::{
    events::EventLog,
    hardware::plan_hardware,
    record::{FileStep, InstanceRecord},
    spec::SSH_PORT,
    teardown,
};
use crate::{gpus::BoundGpu, site::Site};

/// Writing a seed is a few kilobytes; more time than this means that the host disk hangs.
const SEED_DEADLINE: Duration = Duration::from_secs(20);
const PASST_DEADLINE: Duration = Duration::from_secs(10);
/// Disks, sockets, notifiers; QEMU uses a few dozen.
const QEMU_FILES: u64 = 1024;
/// Connections through passt take two descriptors each.
const PASST_FILES: u64 = 1 << 16;
/// Socket buffers of all connections included.
const PASST_MEMORY: ByteSize = ByteSize::from_gib(1);
/// It has one thread.
const PASST_TASKS: u64 = 8;
/// passt serves tenants; the host's own work goes first.
const PASST_NICE: i32 = 5;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} failed")]
pub struct ProvisionError {
    /// Which step, as a noun.
    pub step: &'static str,
    /// Why.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

fn failed<E: Into<Box<dyn Error + Send + Sync>>>(step: &'static str) -> impl FnOnce(E) -> ProvisionError {
    move |source| ProvisionError { step, source: source.into() }
}

/// A VM whose guest boots.
#[derive(Debug)]
pub struct Started {
    /// The VM, proven and continued.
    pub vm: Vm,
    /// Its network.
    pub passt: Process,
    /// The record with what was done.
    pub record: InstanceRecord,
}

/// The files of an instance, complete and committed.
struct Files {
    record: InstanceRecord,
    firmware: Firmware,
}

/// The network backend, listening and confined.
struct Network {
    passt: Process,
}

/// Runs all steps.
///
/// # Errors
/// The first step that failed. What was reached before is for `teardown`.
pub async fn bring_up(
    site: &Site,
    record: InstanceRecord,
    host_key: Option<HostKey>,
    events: &EventLog,
) -> Result<Started, ProvisionError> {
    let id = record.id;
    ensure_nothing_runs(site, &record).await?;
    let gpus = bind_gpus(site, &record, events);
    let network = start_network(site, &record);
    let files = make_files(site, record.clone(), host_key, events);
    let (files, network, gpus) = tokio::try_join!(files, network, gpus)?;
    events.add("network_started", None);
    tracing::debug!(instance = %id, "files and network are ready");
    start_vm(site, files, gpus, network, events).await
}

/// Two VMs on one disk would destroy it. Ordinarily nothing runs here; something does when an earlier end was impossible
/// or unclear.
async fn ensure_nothing_runs(site: &Site, record: &InstanceRecord) -> Result<(), ProvisionError> {
    let alive = teardown::find_alive(site, record).await.map_err(failed("looking for an earlier VM"))?;
    if alive.is_empty() {
        return Ok(());
    }
    Err(failed("starting")(format!(
        "{} of an earlier start still runs; delete the instance",
        alive.join(" and ")
    )))
}

async fn bind_gpus(
    site: &Site,
    record: &InstanceRecord,
    events: &EventLog,
) -> Result<Vec<BoundGpu>, ProvisionError> {
    let gpus = &record.leases.gpus;
    let owner = site.users(&record.leases).qemu;
    let bound = site.gpus.bind(record.id, gpus, owner).await.map_err(failed("binding GPUs"))?;
    if !gpus.is_empty() {
        events.add("gpus_bound", None);
    }
    Ok(bound)
}

async fn make_files(
    site: &Site,
    mut record: InstanceRecord,
    host_key: Option<HostKey>,
    events: &EventLog,
) -> Result<Files, ProvisionError> {
    let instance = site.instance(&record);
    let owner = site.users(&record.leases).qemu;
    durable::create_dir(&instance.data, 0o711).map_err(failed("creating the instance's directory"))?;
    durable::create_dir(&instance.logs, 0o700).map_err(failed("creating the directory of its logs"))?;
    let before = record.done.clone();
    let disk = make_disk(site, &record, owner, events);
    let seed = make_seed(site, &record, owner, host_key, events);
    let ((), host_key) = tokio::try_join!(disk, seed)?;
    make_variables(site, &record, owner)?;
    if let Some(line) = host_key {
        record.host_key = line;
    }
    record.done.extend([FileStep::Disk, FileStep::Seed, FileStep::Firmware]);
    record.user_data = None;
    if record.done != before {
        // Waits for the disk, which must not hold up a thread that serves the API.
        let dir = instance.data.clone();
        let synced = tokio::task::spawn_blocking(move || durable::sync_dir(&dir)).await;
        synced
            .map_err(failed("syncing the instance's directory"))?
            .map_err(failed("syncing the instance's directory"))?;
        site.store.put(&record).await.map_err(failed("recording the files"))?;
    }
    let firmware = site.firmware(&instance, &record).map_err(failed("finding the boot files"))?;
    Ok(Files { record, firmware })
}

async fn make_disk(
    site: &Site,
    record: &InstanceRecord,
    owner: Owner,
    events: &EventLog,
) -> Result<(), ProvisionError> {
    if record.done.contains(&FileStep::Disk) {
        return Ok(());
    }
    let overlay = site.instance(record).disk();
    // Not recorded as done: left by an agent that was killed half-way. No guest has ever seen it.
    disk::remove_overlay(&overlay).map_err(failed("removing a half-made disk"))?;
    let base = site.base(record);
    let image = disk::inspect_base(base).map_err(failed("inspecting the base image"))?;
    let plan = disk::plan_overlay(&overlay, base, image, record.spec.storage, owner)
        .map_err(failed("planning the disk"))?;
    disk::create_overlay(&plan, &site.settings.qemu_img).await.map_err(failed("creating the disk"))?;
    events.add("disk_created", None);
    Ok(())
}

/// Returns the public line of the host key that was written, or `None` when the seed exists already.
async fn make_seed(
    site: &Site,
    record: &InstanceRecord,
    owner: Owner,
    host_key: Option<HostKey>,
    events: &EventLog,
) -> Result<Option<String>, ProvisionError> {
    if record.done.contains(&FileStep::Seed) {
        return Ok(None);
    }
    // An agent that took over a half-made instance makes a new key: nobody has seen the guest yet.
    let host_key = match host_key {
        Some(key) => key,
        None => HostKey::generate().map_err(failed("making the guest's host key"))?,
    };
    let line = host_key.public().to_line();
    let seed = render_seed(site, record, &host_key).map_err(failed("writing the seed"))?;
    let path = site.instance(record).seed();
    let written = tokio::task::spawn_blocking(move || -> Result<(), Box<dyn Error + Send + Sync>> {
        durable::remove_file(&path)?;
        seed.write_iso(&path)?;
        Ok(durable::give_to(&path, owner.uid, owner.gid)?)
    });
    let written = tokio::time::timeout(SEED_DEADLINE, written).await;
    written
        .map_err(failed("writing the seed"))?
        .map_err(failed("writing the seed"))?
        .map_err(failed("writing the seed"))?;
    events.add("seed_written", None);
    Ok(Some(line))
}

fn render_seed(
    site: &Site,
    record: &InstanceRecord,
    host_key: &HostKey,
) -> Result<Seed, Box<dyn Error + Send + Sync>> {
    let keys =
        record.spec.ssh_keys.iter().map(|line| GuestKey::parse(line)).collect::<Result<Vec<_>, _>>()?;
    let user_data = record.user_data.as_ref().map(|text| UserData::parse(text.open())).transpose()?;
    let mac = MacAddress::of(record.id).bytes();
    Ok(Seed::render(&SeedSpec {
        instance_id: &record.id.to_string(),
        hostname: &record.spec.name,
        host_key,
        management_key: site.management_key.public(),
        ssh_keys: &keys,
        user_data: user_data.as_ref(),
        network: StaticNetwork {
            address: passt::GUEST_ADDRESS,
            prefix: passt::GUEST_PREFIX,
            gateway: passt::GATEWAY,
            dns: passt::DNS,
            mac,
            mtu: passt::MTU,
        },
    }))
}

fn make_variables(site: &Site, record: &InstanceRecord, owner: Owner) -> Result<(), ProvisionError> {
    let target = site.instance(record).variables();
    let uefi = site.settings.firmware == crate::settings::FirmwareKind::Uefi;
    // The owner may change the firmware between two starts; then the variables are made late.
    if !uefi || (record.done.contains(&FileStep::Firmware) && target.exists()) {
        return Ok(());
    }
    firmware::remove_variables(&target).map_err(failed("removing half-made UEFI variables"))?;
    firmware::create_variables(&site.settings.ovmf_vars, &target, owner)
        .map_err(failed("creating UEFI variables"))
}

async fn start_network(site: &Site, record: &InstanceRecord) -> Result<Network, ProvisionError> {
    let paths = site.instance(record).vm;
    let users = site.users(&record.leases);
    durable::create_dir(&site.instance(record).run, 0o711).map_err(failed("creating the run directory"))?;
    paths.create(users.qemu, users.passt).map_err(failed("creating the run directory"))?;
    // Confined before it exists: there is no moment in which this guest reaches the host.
    site.egress.admit(&site.admission(&record.leases)).await.map_err(failed("confining the network"))?;
    let listen = match site.settings.listen {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(_) => {
            return Err(failed("starting the network")("QUDATA_LISTEN is no IPv4 address"));
        }
    };
    let forward =
        |(guest_port, host_port): (&u16, &u16)| Forward { host_port: *host_port, guest_port: *guest_port };
    let plan = Passt {
        socket: paths.network_socket(),
        log: paths.passt_dir().join("passt.log"),
        listen,
        forwards: record.leases.ports.iter().map(forward).collect(),
        management: Forward { host_port: record.leases.management_port, guest_port: SSH_PORT },
    };
    let launch = Launch {
        program: site.settings.passt_binary.clone(),
        args: passt::plan_argv(&plan),
        uid: users.passt.uid,
        gid: users.passt.gid,
        groups: Vec::new(),
        dir: paths.dir().to_owned(),
        name: PASST.to_owned(),
        nice: PASST_NICE,
        no_files: PASST_FILES,
        confinement: Confinement {
            description: format!("network of VM {} ({})", record.spec.name, record.id),
            writable: vec![paths.passt_dir()],
            memory_max: Some(PASST_MEMORY),
            tasks_max: Some(PASST_TASKS),
            own_sandbox: true,
            ..Confinement::default()
        },
        ending: None,
    };
    let passt = site.launcher.launch(&launch).await.map_err(failed("starting passt"))?;
    tokio::select! {
        ready = passt::socket_ready(&plan.socket, PASST_DEADLINE) => ready.map_err(failed("starting passt"))?,
        report = passt.exited() => {
            let report = report.map_err(failed("watching passt"))?;
            let log = std::fs::read_to_string(log_path(paths.dir(), PASST)).unwrap_or_default();
            return Err(failed("starting passt")(format!("it ended with {report}: {}", log.trim())));
        }
    }
    // Made by passt's user; QEMU's must be able to connect.
    durable::give_to(&plan.socket, users.qemu.uid, users.qemu.gid)
        .map_err(failed("handing over the network"))?;
    Ok(Network { passt })
}

async fn start_vm(
    site: &Site,
    files: Files,
    gpus: Vec<BoundGpu>,
    network: Network,
    events: &EventLog,
) -> Result<Started, ProvisionError> {
    let Files { mut record, firmware } = files;
    let instance = site.instance(&record);
    let hardware = plan_hardware(site, &record, &firmware, &gpus, events)
        .await
        .map_err(failed("planning the machine"))?;
    if let Some(slow) = &hardware.slow {
        events.add("slow_start", Some(slow.to_string()));
    }
    let machine = Machine {
        uuid: record.id,
        name: record.spec.name.clone(),
        accel: site.settings.accel,
        cpus: record.spec.cpus,
        memory: record.spec.memory,
        backing: hardware.backing,
        firmware,
        disk: Disk { overlay: instance.disk(), cache: site.settings.disk_cache },
        seed: instance.seed(),
        network: NetworkDevice { socket: instance.vm.network_socket(), mac: MacAddress::of(record.id) },
        passthrough: hardware.slots,
        mmio: hardware.mmio,
        qmp_socket: instance.vm.qmp_socket(),
        ready_socket: instance.vm.ready_socket(),
        power_socket: instance.vm.power_socket(),
    };
    record.boot_id.clone_from(&site.boot_id);
    let launch = VmLaunch {
        machine: &machine,
        paths: &instance.vm,
        program: site.settings.qemu_binary.clone(),
        owner: site.users(&record.leases).qemu,
        groups: site.vm_groups.clone(),
        nice: 0,
        no_files: QEMU_FILES,
        base_image: Some(site.base(&record).to_owned()),
        iommu_groups: gpus.iter().flat_map(|gpu| gpu.groups.iter().copied()).collect(),
        memlock: hardware.memlock,
        shutdown: Some(site.program.clone()),
    };
    // Written down before QEMU can have them: whoever finds the record knows that they are to be cleansed.
    site.gpus.hold(&gpus).await.map_err(failed("recording the GPUs"))?;
    let launched = launch.exec(&site.launcher).await.map_err(failed("starting QEMU"))?;
    events.add("qemu_started", None);
    let vm = launched.prove(hardware.deadline).await.map_err(failed("starting QEMU"))?;
    drop(hardware.promise);
    if let Some(pins) = &hardware.pins
        && let Err(error) = vm.pin(pins).await
    {
        tracing::warn!(instance = %record.id, error = %chain(&error), "vCPUs are not near the GPUs");
    }
    vm.resume().await.map_err(failed("letting the guest run"))?;
    events.add("booting", None);
    Ok(Started { vm, passt: network.passt, record })
}
