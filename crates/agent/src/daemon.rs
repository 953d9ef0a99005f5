//! The composition root: checks that this host can run VMs, takes over what an earlier agent left, opens the API, and
//! ends without touching any VM.
//!
//! Order: settings → directories → store (its lock keeps a second agent out) → sockets → egress policy → recovery → API.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use qudata_api::Problem;
use qudata_guest::keys::{KeyFileError, ManagementKey};
use qudata_host::{command::Tool, durable, launch::SystemdError, process};
use qudata_qemu::{
    disk,
    egress::{Egress, Removals, Surroundings},
    machine::Accel,
    probe::KvmProbe,
    version,
};
use qudata_vfio::door::{CHILD_COMMAND, Door};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

use crate::{
    control_plane::{Membership, RegistrationError},
    gpus::{GpuSetup, Gpus, record::GpuRecord},
    http::{
        self, Api,
        sockets::{self, ListenError},
    },
    images,
    instances::Instances,
    launching::choose_launcher,
    outside,
    pages::Pages,
    paths::Paths,
    recovery,
    settings::{FirmwareKind, Settings},
    site::Site,
    store::{OpenStoreError, Opened, Store},
    supervision,
};

/// How long the store may seem to be in use after an agent was killed.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How often the egress policy is looked at, beside each time that something is removed from nftables: a firewall that is
/// reloaded by the owner must not leave guests unconfined.
const GUARD_PERIOD: Duration = Duration::from_secs(20);
/// Between two looks, for hosts whose rules change all the time.
const GUARD_PAUSE: Duration = Duration::from_millis(500);
/// The subcommand of this binary that calls [`qudata_host::shim::main`].
pub const SHIM_COMMAND: &str = "launch-shim";

/// The agent cannot run here, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Not root.
    #[error("the agent must run as root: it gives every VM a user of its own")]
    NotRoot,
    /// KVM cannot be used.
    #[error("QUDATA_ACCEL=kvm (the default) cannot be used: {verdict}")]
    Kvm {
        /// What the probe found.
        verdict: String,
    },
    /// A program or file that is needed is not there.
    #[error("{what} is missing at {path}: {remedy}")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The store cannot be opened.
    #[error("the store cannot be used")]
    Store(#[source] OpenStoreError),
    /// The API cannot be offered.
    #[error("the API cannot be offered")]
    Listen(#[source] ListenError),
    /// VMs shall be units of systemd, and cannot.
    #[error("QUDATA_LAUNCHER=systemd cannot be used")]
    Launcher(#[source] SystemdError),
    /// What is kept of the control plane cannot be used, or frp is wanted without one.
    #[error("the registration of this host cannot be used")]
    Membership(#[source] RegistrationError),
    /// Something else that the agent needs at start.
    #[error("cannot {attempt}")]
    Start {
        /// What was tried.
        attempt: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn cannot<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    attempt: &'static str,
) -> impl FnOnce(E) -> DaemonError {
    move |source| DaemonError::Start { attempt, source: source.into() }
}

/// Runs the agent until SIGTERM or SIGINT. VMs live on.
///
/// # Errors
/// When this host cannot run VMs or another agent uses the same data. Nothing was changed then, apart from empty
/// directories.
pub async fn run(settings: Settings) -> Result<(), DaemonError> {
    if !rustix::process::geteuid().is_root() {
        return Err(DaemonError::NotRoot);
    }
    let paths = Paths::new(&settings.data_dir, &settings.vm_run_dir, &settings.log_dir);
    make_dirs(&paths)?;
    let (opened, missing) = open(&settings, &paths).await?;
    let Opened { store, records, gpus, set_aside } = opened;
    let tenants = !records.is_empty();
    let tcp = sockets::listen_tcp(settings.listen, settings.agent_port).await.map_err(DaemonError::Listen)?;
    let port = tcp.local_addr().map_err(cannot("read the API's port"))?.port();
    let unix = sockets::listen_unix(&paths.socket()).await.map_err(DaemonError::Listen)?;
    // After the sockets: whoever cannot have them has changed nothing.
    let membership = Membership::decide(&settings).map_err(DaemonError::Membership)?;
    let (secret, callers_secret) = watch::channel(membership.secret().clone());
    let gpus = open_gpus(&settings, &store, gpus).await?;
    let (site, unconfined) = make_site(settings, paths, store, gpus).await?;
    let site = Arc::new(site);
    let around = Surroundings::look(Path::new("/")).map_err(cannot("look at the host's network"))?;
    site.egress
        .install(&around)
        .await
        .map_err(cannot("install the network policy that keeps guests away from this host"))?;
    let mut problems: Vec<Problem> = set_aside.into_iter().map(|path| store_set_aside(&path)).collect();
    problems.extend(unconfined);
    problems.extend(missing.map(|error| nothing_new("program_missing", &error)));
    let noted = images::note_user(&site.settings.image_dir, &site.paths.instances());
    problems.extend(noted.err().map(|error| images::not_noted(&error)));
    let instances = Instances::new(site.clone(), port);
    let held = records.iter().flat_map(|record| record.leases.gpus.iter().copied()).collect();
    site.gpus.resume_services().await;
    problems.extend(recovery::recover(&site, records, &instances).await);
    site.gpus.recover(&held);
    instances.report(problems);
    if tenants {
        tokio::spawn(tell_of_kvm(site.clone(), instances.clone()));
    }
    tracing::info!(port, instances = instances.list().len(), "ready");
    // Ends with this function.
    let connections = outside::connect(&site, &instances, port, membership, secret).await;
    let mut watches = JoinSet::new();
    watches.spawn(guard_egress(site.clone(), instances.clone(), around));
    let gpus = site.gpus.clone();
    watches.spawn(async move { gpus.watch().await });
    watches.spawn(supervision::prove_life(instances.clone()));
    let ended = ended()?;
    supervision::tell_ready(&instances);
    let stopping = async {
        ended.await;
        supervision::tell_stopping();
    };
    http::serve(Api::new(instances.clone(), callers_secret), tcp, unix, stopping).await;
    drop((watches, connections));
    let _ = durable::remove_file(&site.paths.socket());
    if instances.list().is_empty() {
        // Nobody is left to be confined.
        if let Err(error) = site.egress.remove_table().await {
            tracing::warn!(error = %qudata_host::causes::chain(&error), "the network policy stays behind");
        }
    }
    tracing::info!("stopped; VMs live on");
    Ok(())
}

/// Opens the store, and looks whether this host can start VMs. Tenants of an earlier agent are taken over whatever is
/// missing, which is told then; without any it is a reason not to start.
async fn open(settings: &Settings, paths: &Paths) -> Result<(Opened, Option<DaemonError>), DaemonError> {
    let mut missing = check_programs(settings).err();
    if let Some(error) = missing.take_if(|_| !paths.store().exists()) {
        return Err(error);
    }
    let opened = open_store(&paths.store()).await.map_err(DaemonError::Store)?;
    if opened.records.is_empty() {
        if let Some(error) = missing {
            return Err(error);
        }
        check_kvm(settings, paths.run()).await?;
        return Ok((opened, None));
    }
    Ok((opened, missing))
}

/// Opens the store, with patience: a child that a killed agent was just starting holds the inherited lock until its own
/// program runs.
async fn open_store(path: &Path) -> Result<Opened, OpenStoreError> {
    let end = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        match Store::open(path) {
            Err(OpenStoreError::InUse { .. }) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            done => return done,
        }
    }
}

fn make_dirs(paths: &Paths) -> Result<(), DaemonError> {
    // Passable, not listable: the users of QEMU and passt must reach their files, which are private themselves.
    for dir in [paths.data().to_owned(), paths.instances(), paths.run().to_owned(), paths.vms()] {
        durable::create_dir(&dir, 0o711).map_err(cannot("create the agent's directories"))?;
    }
    durable::create_dir(&paths.logs(), 0o700)
        .map_err(cannot("create the directory of the instances' logs"))?;
    Ok(())
}

fn check_programs(settings: &Settings) -> Result<(), DaemonError> {
    let install =
        "install the packages qemu-system-x86, qemu-utils, passt and ovmf, or set its QUDATA_ variable";
    let mut needed = vec![
        ("QEMU", &settings.qemu_binary, install),
        ("qemu-img", &settings.qemu_img, install),
        ("passt", &settings.passt_binary, install),
        (
            "the base image",
            &settings.base_image,
            "build one with `qudata-agent image build`, or set QUDATA_BASE_IMAGE",
        ),
    ];
    if settings.firmware == FirmwareKind::Uefi {
        needed.push(("OVMF", &settings.ovmf_code, install));
        needed.push(("the OVMF variables", &settings.ovmf_vars, install));
    }
    for (what, path, remedy) in needed {
        if !path.is_file() {
            return Err(DaemonError::Missing { what, path: path.clone(), remedy });
        }
    }
    disk::inspect_base(&settings.base_image).map_err(cannot("use the base image"))?;
    Ok(())
}

/// With tenants on the host a KVM that does not work is a problem to show, not a reason to leave them alone.
async fn tell_of_kvm(site: Arc<Site>, instances: Instances) {
    if let Err(error) = check_kvm(&site.settings, site.paths.run()).await {
        instances.report(vec![nothing_new("kvm_unusable", &error)]);
    }
}

fn nothing_new(code: &str, error: &DaemonError) -> Problem {
    let message = qudata_host::causes::chain(error);
    tracing::error!(message, "new VMs will not start");
    Problem {
        code: code.to_owned(),
        message,
        remedy: "VMs that run are not affected; do what the message says before you start new ones"
            .to_owned(),
        since: jiff::Timestamp::now(),
    }
}

async fn check_kvm(settings: &Settings, scratch: &Path) -> Result<(), DaemonError> {
    if settings.accel != Accel::Kvm {
        tracing::warn!("QUDATA_ACCEL=tcg: guests are emulated; slow, and no protection against hostile ones");
        return Ok(());
    }
    let verdict = KvmProbe::run(&settings.qemu_binary, scratch).await.map_err(cannot("try out KVM"))?;
    if verdict.is_usable() { Ok(()) } else { Err(DaemonError::Kvm { verdict: verdict.to_string() }) }
}

/// Looks at the GPUs. A driver that cannot be loaded is no reason not to start: each GPU then says what is in its way.
async fn open_gpus(settings: &Settings, store: &Store, records: Vec<GpuRecord>) -> Result<Gpus, DaemonError> {
    let setup = GpuSetup {
        enabled: !settings.debug,
        configured: settings.gpu_pci_addrs.clone(),
        after: settings.gpu_after,
        root: PathBuf::from("/"),
        door: Door::Child {
            program: std::env::current_exe().map_err(cannot("find the agent's own program"))?,
            args: vec![CHILD_COMMAND.into()],
            root: PathBuf::from("/"),
        },
        store: store.clone(),
        boot_id: process::boot_id().map_err(cannot("read the id of this boot"))?,
    };
    if setup.enabled
        && !Path::new("/sys/bus/pci/drivers/vfio-pci").exists()
        && let Err(error) = Tool::new("modprobe").arg("vfio-pci").run().await
    {
        tracing::warn!(error = %qudata_host::causes::chain(&error), "vfio-pci cannot be loaded");
    }
    Ok(Gpus::open(setup, records).await)
}

async fn make_site(
    settings: Settings,
    paths: Paths,
    store: Store,
    gpus: Gpus,
) -> Result<(Site, Option<Problem>), DaemonError> {
    let program = std::env::current_exe().map_err(cannot("find the agent's own program"))?;
    let table = table_name(paths.data()).parse().map_err(cannot("name the network policy"))?;
    let allow = settings.egress_allow.iter().map(|cidr| cidr.parse()).collect::<Result<Vec<_>, _>>();
    let kvm_group = std::fs::metadata("/dev/kvm").map(|device| device.gid()).ok().filter(|gid| *gid != 0);
    let chosen = choose_launcher(settings.launcher, program.clone(), vec![SHIM_COMMAND.into()]).await;
    let (launcher, unconfined) = chosen.map_err(DaemonError::Launcher)?;
    let site = Site {
        management_key: management_key(&settings.management_key)?,
        launcher,
        egress: Egress::new(table, allow.map_err(cannot("read QUDATA_EGRESS_ALLOW"))?),
        vm_groups: kvm_group.filter(|_| settings.accel == Accel::Kvm).into_iter().collect(),
        qemu_version: version::observe_qemu(&settings.qemu_binary).await.ok().map(|found| found.qemu),
        program,
        boot_id: process::boot_id().map_err(cannot("read the id of this boot"))?,
        settings,
        paths,
        store,
        gpus,
        pages: Pages::of("/"),
        changes: watch::Sender::new(()),
    };
    Ok((site, unconfined))
}

/// One policy per data directory, so that two agents of one host (a test beside the real one) do not meet.
pub fn table_name(data: &Path) -> String {
    if data == Path::new("/var/lib/qudata") {
        return "qudata".to_owned();
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let text: String = data.to_string_lossy().chars().map(plain).collect();
    let tail = text.len().saturating_sub(24);
    format!("qudata_{}", text.get(tail..).unwrap_or_default())
}

fn management_key(path: &Path) -> Result<ManagementKey, DaemonError> {
    match ManagementKey::load(path) {
        Ok(key) => Ok(key),
        Err(KeyFileError::Absent { .. }) => {
            let key = ManagementKey::generate().map_err(cannot("make the management key"))?;
            let dir = path.parent().unwrap_or(Path::new("/"));
            durable::create_dir(dir, 0o700).map_err(cannot("make the directory of the management key"))?;
            key.save(path).map_err(cannot("save the management key"))?;
            Ok(key)
        }
        Err(error) => Err(cannot("read the management key")(error)),
    }
}

fn store_set_aside(path: &Path) -> Problem {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    Problem {
        code: "store_set_aside".to_owned(),
        message: format!("the store was damaged; it was set aside as {file} and a new one was begun"),
        remedy: "instances of the old store are listed as orphans: their VMs and disks are untouched"
            .to_owned(),
        since: jiff::Timestamp::now(),
    }
}

/// Puts the policy back when somebody else's firewall tool has removed it, and renews it when the host has got another network
/// or other resolvers.
async fn guard_egress(site: Arc<Site>, instances: Instances, mut around: Surroundings) {
    // Not at once: recovery has just seen to it.
    let mut clock = tokio::time::interval_at(tokio::time::Instant::now() + GUARD_PERIOD, GUARD_PERIOD);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let deaf =
        |error| tracing::warn!(%error, "changes of nftables are not heard; it is looked at every 20 s");
    let mut removals = Removals::listen().map_err(deaf).ok();
    let mut moved = false;
    loop {
        let heard = async {
            match &removals {
                Some(removals) => removals.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = clock.tick() => {}
            heard = heard => if let Err(error) = heard {
                deaf(error);
                removals = None;
            },
        }
        // Files of a disk that may hang: not on a thread that serves the API.
        let look = tokio::task::spawn_blocking(|| Surroundings::look(Path::new("/"))).await;
        match look.map_err(std::io::Error::other).flatten() {
            Ok(now) => moved |= around.follow(now),
            Err(error) => tracing::error!(%error, "the host's network cannot be looked at"),
        }
        match instances.confine_all(&site, &around, moved).await {
            Ok(()) => moved = false,
            Err(error) => {
                let error = qudata_host::causes::chain(&error);
                tracing::error!(%error, "the network policy cannot be checked");
            }
        }
        tokio::time::sleep(GUARD_PAUSE).await;
    }
}

fn ended() -> Result<impl Future<Output = ()> + Send + 'static, DaemonError> {
    let mut term = signal(SignalKind::terminate()).map_err(cannot("listen for SIGTERM"))?;
    let mut int = signal(SignalKind::interrupt()).map_err(cannot("listen for SIGINT"))?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => tracing::info!("SIGTERM"),
            _ = int.recv() => tracing::info!("SIGINT"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_that_is_about_to_go_is_waited_for_and_one_that_stays_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.redb");
        let held = Store::open(&path).unwrap();
        let opening = tokio::spawn({
            let path = path.clone();
            async move { open_store(&path).await }
        });
        tokio::time::sleep(LOCK_PAUSE * 5).await;
        drop(held);
        let second = opening.await.unwrap().unwrap();
        assert!(matches!(open_store(&path).await, Err(OpenStoreError::InUse { .. })));
        drop(second);
    }

    #[test]
    fn each_data_directory_has_a_policy_of_its_own() {
        assert_eq!(table_name(Path::new("/var/lib/qudata")), "qudata");
        for path in ["/var/tmp/a", "/srv/Ünï/x", "/a/very/long/path/that/goes/on/and/on"] {
            let name = table_name(Path::new(path));
            assert!(name.parse::<qudata_qemu::egress::TableName>().is_ok(), "{name}");
        }
    }
}
