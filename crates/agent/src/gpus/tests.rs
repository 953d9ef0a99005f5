//! The life of GPUs on a kernel that reacts: what is written down, what is lent, and what becomes of each kind of failure.

use std::{collections::BTreeSet, io, path::Path, sync::Arc};

use qudata_qemu::disk::Owner;
use qudata_testkit::pci::{
    Device, FakeHost, FakeProcess,
    react::{FakeKernel, Fault},
};
use qudata_vfio::{
    plan::AfterUse,
    sysfs::{SysfsKernel, Writes},
};

use super::*;

mod identity;

const GPU: &str = "0000:01:00.0";
const TWIN: &str = "0000:02:00.0";
const BOOT: &str = "boot-1";

#[derive(Debug)]
struct Reacting(Arc<FakeKernel>);

impl Writes for Reacting {
    fn write_at(&self, file: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(file, offset, bytes)
    }
}

/// A host with two GPUs, a store, and as many agents after each other as a test likes.
struct Lab {
    kernel: Arc<FakeKernel>,
    dir: tempfile::TempDir,
    after: AfterUse,
    configured: Vec<PciAddress>,
}

impl Lab {
    fn new() -> Self {
        Self::with(0x20b5)
    }

    /// With this device id of the first.
    fn with(id: u16) -> Self {
        Self::on(id, Vec::new())
    }

    /// With more devices.
    fn on(id: u16, more: Vec<Device>) -> Self {
        let gpu = |address: &str| Device::gpu(address).driver("bochs-drm");
        let mut devices = vec![
            Device::bridge("0000:00:01.0", 1),
            gpu(GPU).ids(0x10de, id).under("0000:00:01.0").group(7),
            Device::bridge("0000:00:02.0", 2),
            gpu(TWIN).under("0000:00:02.0").group(8),
        ];
        devices.extend(more);
        let host = FakeHost::with(devices).unwrap();
        for group in ["dev/vfio/7", "dev/vfio/8", "dev/vfio/9"] {
            host.file(group, "").unwrap();
        }
        Self {
            kernel: Arc::new(FakeKernel::new(host)),
            dir: tempfile::tempdir().unwrap(),
            after: AfterUse::Host,
            configured: Vec::new(),
        }
    }

    /// An agent in this boot of the host, with what an earlier one wrote down.
    async fn agent(&self, boot: &str) -> Gpus {
        let opened = Store::open(&self.dir.path().join("agent.redb")).unwrap();
        let root = self.kernel.host().root().to_owned();
        let real = SysfsKernel::with(root.clone(), Arc::new(Reacting(self.kernel.clone())));
        let setup = GpuSetup {
            enabled: true,
            configured: self.configured.clone(),
            after: self.after,
            root,
            door: Door::InProcess(Arc::new(real)),
            store: opened.store,
            boot_id: boot.to_owned(),
        };
        Gpus::open(setup, opened.gpus).await
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.kernel.host().driver_of(address)
    }
}

fn pci(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn owner() -> Owner {
    Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
}

fn driver(name: &str) -> Option<String> {
    Some(name.to_owned())
}

fn life(gpus: &Gpus, address: &str) -> Life {
    gpus.record(pci(address)).unwrap().life
}

fn why(gpus: &Gpus, address: &str) -> String {
    gpus.record(pci(address)).unwrap().why.unwrap_or_default()
}

async fn settled(gpus: &Gpus, address: &str) -> Life {
    for _ in 0..500 {
        let life = life(gpus, address);
        if matches!(life, Life::Free | Life::Quarantined) {
            return life;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{address} stays {:?}", life(gpus, address));
}

#[tokio::test]
async fn a_gpu_is_lent_and_comes_back_clean_to_its_driver() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    assert_eq!(gpus.offer().rentable, [pci(GPU), pci(TWIN)]);
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    assert_eq!((bound[0].address, &bound[0].groups), (pci(GPU), &BTreeSet::from([7])));
    assert_eq!((life(&gpus, GPU), lab.driver(GPU)), (Life::Bound, driver("vfio-pci")));
    assert_eq!(gpus.offer().rentable, [pci(TWIN)]);
    gpus.hold(&bound).await.unwrap();
    assert_eq!(life(&gpus, GPU), Life::InUse);
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!((life(&gpus, GPU), lab.driver(GPU)), (Life::Free, driver("bochs-drm")));
    assert_eq!(lab.kernel.override_of(GPU), None);
    assert_eq!(lab.driver(TWIN), driver("bochs-drm"), "the other one was not touched");
    assert!(lab.kernel.writes_to(TWIN).is_empty());
    let resets = lab.kernel.writes_to(GPU).iter().filter(|w| w.file.ends_with("reset")).count();
    assert_eq!(resets, 1, "{:?}", lab.kernel.writes_to(GPU));
    assert_eq!(gpus.offer().rentable, [pci(GPU), pci(TWIN)]);
}

#[tokio::test]
async fn an_owner_may_keep_gpus_on_vfio() {
    let lab = Lab { after: AfterUse::Vfio, ..Lab::new() };
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    for _ in 0..2 {
        gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
        gpus.release(instance, &[pci(GPU)]).await;
        assert_eq!((life(&gpus, GPU), lab.driver(GPU)), (Life::Free, driver("vfio-pci")));
    }
    drop(gpus);
    // The next agent knows that it was cleansed and left there: it does not reset it for nothing.
    let gpus = lab.agent(BOOT).await;
    lab.kernel.forget_writes();
    gpus.recover(&BTreeSet::new());
    assert_eq!(life(&gpus, GPU), Life::Free);
    assert!(lab.kernel.writes().is_empty());
}

// orig-G1: the original ignored every failure here.
#[tokio::test]
async fn orig_g1_a_gpu_whose_reset_fails_is_not_lent_again() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    lab.kernel.fault(GPU, Fault::ResetFails);
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    assert!(why(&gpus, GPU).contains("reset"), "{}", why(&gpus, GPU));
    let offer = gpus.offer();
    assert_eq!(offer.rentable, [pci(TWIN)]);
    assert!(offer.obstacles[&pci(GPU)].contains("gpu release"), "{:?}", offer.obstacles);
    assert!(gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.is_err());
    assert_eq!(lab.driver(GPU), driver("vfio-pci"), "no host driver touches it");

    // It stays so for the next agent, and an operator's word alone does not free it.
    drop(gpus);
    let gpus = lab.agent(BOOT).await;
    gpus.recover(&BTreeSet::new());
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    gpus.acquit(pci(GPU)).await.unwrap();
    assert_eq!(settled(&gpus, GPU).await, Life::Quarantined);
    // Mended, it passes.
    lab.kernel.repair(GPU);
    gpus.acquit(pci(GPU)).await.unwrap();
    assert_eq!(settled(&gpus, GPU).await, Life::Free);
    assert_eq!(lab.driver(GPU), driver("bochs-drm"));
}

#[tokio::test]
async fn a_gpu_that_fell_off_the_bus_under_its_tenant_is_quarantined() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    let config = lab.kernel.host().device_dir(GPU).join("config");
    let alive = std::fs::read(&config).unwrap();
    lab.kernel.fall_off_the_bus(GPU).unwrap();
    assert!(gpus.is_off_the_bus(pci(GPU)).await && !gpus.is_off_the_bus(pci(TWIN)).await);
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    // That it answers again proves nothing: a reboot and a passed check clear it.
    std::fs::write(&config, alive).unwrap();
    assert!(gpus.acquit(pci(GPU)).await.is_err());
    drop(gpus);
    let gpus = lab.agent("boot-2").await;
    gpus.recover(&BTreeSet::new());
    while life(&gpus, GPU) == Life::Quarantined {
        tokio::task::yield_now().await;
    }
    assert_eq!(settled(&gpus, GPU).await, Life::Free, "{}", why(&gpus, GPU));
}

/// The instance whose bring-up wedged it keeps its record until DELETE; that must not keep the GPU from being checked.
#[tokio::test]
async fn a_reboot_clears_a_quarantine_also_while_a_failed_instance_holds_the_gpu() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.unwrap();
    gpus.condemn(pci(GPU), "it hangs".to_owned(), true).await;
    drop(gpus);
    let gpus = lab.agent("boot-2").await;
    gpus.recover(&[pci(GPU)].into());
    for _ in 0..200 {
        if life(&gpus, GPU) != Life::Quarantined {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(settled(&gpus, GPU).await, Life::Free, "{}", why(&gpus, GPU));
}

/// After a reboot, or an update of the owner's, the driver it had may not be loaded. That says nothing against the GPU.
#[tokio::test]
async fn a_gpu_whose_driver_has_gone_from_the_host_stays_on_vfio_pci_and_is_free() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let home = lab.driver(GPU).unwrap();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    std::fs::remove_dir_all(lab.kernel.host().root().join("sys/bus/pci/drivers").join(home)).unwrap();
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Free, "{}", why(&gpus, GPU));
    assert_eq!(lab.driver(GPU), driver("vfio-pci"));
    gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.unwrap();
}

// orig-G5, orig-G6: a write that hangs held the original's lock for ever.
#[tokio::test]
async fn slow_orig_g5_a_gpu_that_hangs_is_left_and_the_others_are_lent() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    lab.kernel.fault(GPU, Fault::HangsOnUnbind);
    let instance = Uuid::now_v7();
    let hung = tokio::spawn({
        let gpus = gpus.clone();
        async move { gpus.bind(instance, &[pci(GPU)], owner()).await.map(drop) }
    });
    // Meanwhile everything else goes on.
    let other = Uuid::now_v7();
    gpus.bind(other, &[pci(TWIN)], owner()).await.unwrap();
    assert_eq!(gpus.offer().all.len(), 2);
    gpus.release(other, &[pci(TWIN)]).await;
    assert_eq!(life(&gpus, TWIN), Life::Free);
    assert!(hung.await.unwrap().is_err());
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    assert!(gpus.offer().obstacles[&pci(GPU)].contains("reboot the host"), "{:?}", gpus.offer().obstacles);
    gpus.release(instance, &[pci(GPU)]).await;
    let refused = gpus.acquit(pci(GPU)).await.unwrap_err();
    assert!(matches!(refused, OperatorError::WrongState { life: Life::Quarantined, .. }), "{refused}");
}

#[tokio::test]
async fn a_gpu_that_somebody_holds_is_refused_with_the_holder() {
    let lab = Lab::new();
    lab.kernel.host().add_drm(GPU, 0).unwrap();
    lab.kernel
        .host()
        .add_process(&FakeProcess {
            pid: 4242,
            name: "Xorg".into(),
            cgroup: "/system.slice/display.service".into(),
            files: vec!["/dev/dri/card0".into()],
        })
        .unwrap();
    let gpus = lab.agent(BOOT).await;
    let offer = gpus.offer();
    assert_eq!(offer.rentable, [pci(TWIN)]);
    assert!(offer.obstacles[&pci(GPU)].contains("Xorg"), "{:?}", offer.obstacles);
    assert!(gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.is_err());
    assert!(lab.kernel.writes_to(GPU).is_empty(), "nothing was touched");
    assert_eq!(life(&gpus, GPU), Life::Free);
}

/// Seen in the lab: udev had the framebuffer of a GPU just given back open, and the next order was refused for seconds.
#[tokio::test]
async fn whoever_only_looks_at_a_gpu_that_is_back_does_not_keep_it_from_the_next() {
    let lab = Lab::new();
    let host = lab.kernel.host();
    host.add_drm(GPU, 0).unwrap();
    host.add_process(&FakeProcess {
        pid: 4242,
        name: "(udev-worker)".into(),
        cgroup: "/system.slice/systemd-udevd.service".into(),
        files: vec!["/dev/dri/card0".into()],
    })
    .unwrap();
    let gpus = lab.agent(BOOT).await;
    assert_eq!(gpus.offer().rentable, [pci(TWIN)]);
    let process = host.root().join("proc/4242");
    let looked = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        std::fs::remove_dir_all(process).unwrap();
    };
    let back = [pci(GPU)];
    tokio::join!(gpus.settle(&back), looked);
    assert_eq!(gpus.offer().rentable.len(), 2, "{:?}", gpus.offer().obstacles);
}

/// What an agent killed at any step leaves, the next one finishes or undoes.
#[tokio::test]
async fn whatever_an_agent_left_ends_free_or_quarantined() {
    for left in [Life::Bound, Life::InUse, Life::Draining, Life::Sanitizing] {
        let lab = Lab::new();
        let gpus = lab.agent(BOOT).await;
        let instance = Uuid::now_v7();
        let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
        gpus.hold(&bound).await.unwrap();
        let record = GpuRecord { life: left, ..gpus.record(pci(GPU)).unwrap() };
        gpus.inner.setup.store.put_gpu(&record).await.unwrap();
        drop((gpus, bound));

        let gpus = lab.agent(BOOT).await;
        assert_eq!(life(&gpus, GPU), left);
        assert_eq!(gpus.offer().rentable, [pci(TWIN)], "{left:?}");
        gpus.recover(&BTreeSet::from([pci(GPU)]));
        assert_eq!(life(&gpus, GPU), left, "an instance holds it: that is its own recovery's business");
        gpus.recover(&BTreeSet::new());
        assert_eq!(settled(&gpus, GPU).await, Life::Free, "{left:?}: {}", why(&gpus, GPU));
        assert_eq!(lab.driver(GPU), driver("bochs-drm"), "{left:?}");
    }
}

// orig-C3: a DELETE that arrived before the create had begun was lost.
#[tokio::test]
async fn orig_c3_a_gpu_that_is_not_wanted_any_more_is_not_bound_afterwards() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let turn = gpus.turn(pci(GPU)).unwrap();
    let busy = turn.lock().await;
    let binding = tokio::spawn({
        let gpus = gpus.clone();
        async move { gpus.bind(instance, &[pci(GPU)], owner()).await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    binding.abort();
    assert!(binding.await.is_err());
    let releasing = tokio::spawn({
        let gpus = gpus.clone();
        async move { gpus.release(instance, &[pci(GPU)]).await }
    });
    drop(busy);
    releasing.await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((life(&gpus, GPU), lab.driver(GPU)), (Life::Free, driver("bochs-drm")));
    assert!(lab.kernel.writes_to(GPU).is_empty());
}

#[tokio::test]
async fn a_gpu_that_came_home_while_its_turn_was_waited_for_goes_back_there() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    // As a cleanse has it that takes longer than whoever deleted waits for it.
    lab.kernel.host().move_to_driver(GPU, Some("vfio-pci")).unwrap();
    gpus.look().await;
    let instance = Uuid::now_v7();
    let turn = gpus.turn(pci(GPU)).unwrap();
    let busy = turn.lock().await;
    let binding = tokio::spawn({
        let gpus = gpus.clone();
        async move { gpus.bind(instance, &[pci(GPU)], owner()).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.kernel.host().move_to_driver(GPU, Some("bochs-drm")).unwrap();
    drop(busy);
    let bound = binding.await.unwrap().unwrap();
    assert_eq!((bound.len(), lab.driver(GPU)), (1, driver("vfio-pci")));
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!((settled(&gpus, GPU).await, lab.driver(GPU)), (Life::Free, driver("bochs-drm")));
}

#[tokio::test]
async fn an_instance_takes_back_its_own_gpu_and_nobody_else_can() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    assert!(gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.is_err());
    gpus.release(Uuid::now_v7(), &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::InUse, "another instance's release does not touch it");
    gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.strand(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
}

#[tokio::test]
async fn a_quarantine_beside_a_bring_up_is_not_lost() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    for _ in 0..20 {
        let step = gpus.advance(pci(GPU), Life::Bound, |record| record.why = None);
        let (word, step) = tokio::join!(gpus.quarantine(pci(GPU), "smoke"), step);
        word.unwrap();
        assert!(step.is_err() || life(&gpus, GPU) == Life::Quarantined, "{:?}", life(&gpus, GPU));
        assert!(why(&gpus, GPU).contains("smoke"));
        gpus.acquit(pci(GPU)).await.unwrap();
        settled(&gpus, GPU).await;
    }
}

#[tokio::test]
async fn an_operator_takes_a_gpu_away_when_its_tenant_has_gone() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    gpus.quarantine(pci(TWIN), "fan is loud").await.unwrap();
    assert_eq!(life(&gpus, TWIN), Life::Quarantined);
    gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.quarantine(pci(GPU), "fan is loud").await.unwrap();
    assert_eq!(life(&gpus, GPU), Life::Bound, "its tenant keeps it");
    assert!(gpus.views(&BTreeMap::new())[0].why.as_ref().unwrap().contains("fan is loud"));
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    assert!(matches!(gpus.acquit(pci("09:00.0")).await, Err(OperatorError::Unknown(_))));
    assert_eq!(gpus.problems().len(), 2);
}
