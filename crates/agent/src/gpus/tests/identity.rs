//! Addresses that are another card's, cards that nobody can vouch for, and what is left of an earlier agent's bind.

use qudata_vfio::nvidia::Tools;

use super::*;

impl Lab {
    /// Another device is at the address, as after a start of the host with its cards moved.
    fn replace(&self, address: &str, device: u16, class: u32) {
        let dir = self.kernel.host().device_dir(address);
        std::fs::write(dir.join("device"), format!("0x{device:04x}\n")).unwrap();
        std::fs::write(dir.join("class"), format!("0x{class:06x}\n")).unwrap();
        let mut config = std::fs::read(dir.join("config")).unwrap();
        config[2..4].copy_from_slice(&device.to_le_bytes());
        std::fs::write(dir.join("config"), config).unwrap();
    }

    /// A tenant has the GPU as the host goes down.
    async fn lent(&self) {
        let gpus = self.agent(BOOT).await;
        let bound = gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.unwrap();
        gpus.hold(&bound).await.unwrap();
        drop(gpus);
        self.kernel.host().move_to_driver(GPU, Some("bochs-drm")).unwrap();
        std::fs::write(self.kernel.host().device_dir(GPU).join("driver_override"), "(null)\n").unwrap();
        self.kernel.forget_writes();
    }
}

const DISPLAY: u32 = 0x03_8000;
const NETWORK: u32 = 0x02_0000;

async fn checked(gpus: &Gpus, address: &str) -> Life {
    gpus.recover(&BTreeSet::new());
    tokio::time::sleep(Duration::from_millis(100)).await;
    settled(gpus, address).await
}

#[tokio::test]
async fn a_network_card_at_the_address_of_a_gpu_is_not_touched() {
    for configured in [Vec::new(), vec![pci(GPU)]] {
        let lab = Lab { configured: configured.clone(), ..Lab::new() };
        lab.lent().await;
        lab.replace(GPU, 0x1563, NETWORK);
        let gpus = lab.agent("boot-2").await;
        assert_eq!(checked(&gpus, GPU).await, Life::Quarantined, "{configured:?}");
        assert!(why(&gpus, GPU).contains("no GPU"), "{}", why(&gpus, GPU));
        assert!(lab.kernel.writes_to(GPU).is_empty(), "{:?}", lab.kernel.writes_to(GPU));
        assert!(!gpus.offer().rentable.contains(&pci(GPU)));
        // Neither by an operator's word.
        gpus.acquit(pci(GPU)).await.unwrap();
        assert_eq!(settled(&gpus, GPU).await, Life::Quarantined);
        assert!(lab.kernel.writes_to(GPU).is_empty());
    }
}

/// What an operator took out of business had no record of what it was.
#[tokio::test]
async fn a_network_card_where_a_quarantined_gpu_was_is_not_lent() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    gpus.quarantine(pci(GPU), "fan is loud").await.unwrap();
    drop(gpus);
    lab.replace(GPU, 0x1563, NETWORK);
    let gpus = lab.agent("boot-2").await;
    assert_eq!(checked(&gpus, GPU).await, Life::Quarantined);
    assert!(lab.kernel.writes_to(GPU).is_empty());
}

#[tokio::test]
async fn a_card_that_was_put_in_for_another_is_checked_as_a_new_one_after_a_reboot() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    lab.replace(GPU, 0x2331, DISPLAY);
    lab.kernel.forget_writes();
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined);
    assert!(why(&gpus, GPU).contains("another device"), "{}", why(&gpus, GPU));
    assert!(lab.kernel.writes_to(GPU).is_empty(), "in the same boot nothing of it is touched");
    drop((gpus, bound));
    let lab = Lab { kernel: Lab::with(0x2331).kernel, ..lab };
    let gpus = lab.agent("boot-2").await;
    assert_eq!(checked(&gpus, GPU).await, Life::Free, "{}", why(&gpus, GPU));
}

/// The owner moves a card that a tenant had: where it is now nothing is written down of it.
#[tokio::test]
async fn a_card_of_the_kind_of_one_that_is_gone_is_cleansed_before_it_is_lent() {
    let lab = Lab::new();
    lab.lent().await;
    lab.replace(GPU, 0x2331, DISPLAY);
    let gpus = lab.agent("boot-2").await;
    assert!(gpus.offer().rentable.is_empty(), "{:?}", gpus.offer().rentable);
    assert!(gpus.bind(Uuid::now_v7(), &[pci(TWIN)], owner()).await.is_err());
    assert!(lab.kernel.writes_to(TWIN).is_empty());
    assert_eq!(checked(&gpus, TWIN).await, Life::Free);
    while !gpus.offer().rentable.contains(&pci(TWIN)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let resets = lab.kernel.writes_to(TWIN).iter().filter(|w| w.file.ends_with("reset")).count();
    assert_eq!(resets, 1, "{:?}", lab.kernel.writes_to(TWIN));
}

#[tokio::test]
async fn a_gpu_on_vfio_pci_of_which_nothing_is_written_down_is_cleansed_before_it_is_lent() {
    let lab = Lab::new();
    lab.kernel.host().move_to_driver(GPU, Some("vfio-pci")).unwrap();
    let gpus = lab.agent(BOOT).await;
    assert_eq!(gpus.offer().rentable, [pci(TWIN)]);
    gpus.recover(&BTreeSet::new());
    while gpus.offer().rentable.len() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_ne!(life(&gpus, GPU), Life::Quarantined, "{}", why(&gpus, GPU));
    }
    let resets = lab.kernel.writes_to(GPU).iter().filter(|w| w.file.ends_with("reset")).count();
    assert_eq!(resets, 1, "{:?}", lab.kernel.writes_to(GPU));
}

#[tokio::test]
async fn a_gpu_that_the_owner_took_out_of_the_settings_is_not_lent_again() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    drop((gpus, bound));
    let lab = Lab { configured: vec![pci(TWIN)], ..lab };
    let gpus = lab.agent(BOOT).await;
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Free);
    let offer = gpus.offer();
    assert_eq!(offer.rentable, [pci(TWIN)]);
    assert!(offer.obstacles[&pci(GPU)].contains("QUDATA_GPU_PCI_ADDRS"), "{:?}", offer.obstacles);
}

#[tokio::test]
async fn a_reboot_and_a_passed_check_clear_a_gpu_that_was_gone_also_while_its_instance_lives() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    let gone = |record: &mut GpuRecord| record.why = Some(super::super::watch::OFF_THE_BUS.to_owned());
    gpus.advance(pci(GPU), Life::InUse, gone).await.unwrap();
    drop((gpus, bound));
    let gpus = lab.agent("boot-2").await;
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Free, "{}", why(&gpus, GPU));
}

#[tokio::test]
async fn services_that_were_stopped_for_a_bind_run_again_before_anything_else() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let stopped =
        |record: &mut GpuRecord| record.stopped_services = vec!["nvidia-persistenced.service".into()];
    gpus.advance(pci(GPU), Life::Bound, stopped).await.unwrap();
    let tools = |systemctl: &str| Tools { systemctl: systemctl.into(), ..Tools::default() };
    let left = || gpus.record(pci(GPU)).unwrap();
    gpus.resume(&tools("/bin/false"), left()).await;
    assert_eq!(left().stopped_services.len(), 1, "it is tried again by the next agent");
    gpus.resume(&tools("/bin/true"), GpuRecord { wedged: true, ..left() }).await;
    assert_eq!(left().stopped_services.len(), 1, "it would open the wedged card");
    gpus.resume(&tools("/bin/true"), GpuRecord { boot_id: "boot-0".into(), ..left() }).await;
    assert!(left().stopped_services.is_empty() && left().life == Life::Bound);
    assert_eq!(left().boot_id, "boot-0", "what an earlier boot left is still to be checked");
}

#[tokio::test]
async fn an_operators_word_does_not_undo_a_step_beside_it() {
    let lab = Lab::new();
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    for _ in 0..20 {
        let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
        let (held, said) = tokio::join!(gpus.hold(&bound), gpus.quarantine(pci(GPU), "smoke"));
        held.unwrap();
        said.unwrap();
        assert_eq!(life(&gpus, GPU), Life::InUse);
    }
}

#[tokio::test]
async fn a_card_whose_functions_are_in_several_groups_is_handed_over_whole() {
    let lab = Lab::on(0x20b5, vec![Device::audio("0000:01:00.1").under("0000:00:01.0").group(9)]);
    let gpus = lab.agent(BOOT).await;
    let bound = gpus.bind(Uuid::now_v7(), &[pci(GPU)], owner()).await.unwrap();
    assert_eq!(bound[0].groups, BTreeSet::from([7, 9]));
    // What is to be given to QEMU's user and is not there is an error.
    std::fs::remove_file(lab.kernel.host().root().join("dev/vfio/9")).unwrap();
    assert!(gpus.bind(bound_for(&gpus), &[pci(GPU)], owner()).await.is_err());
}

fn bound_for(gpus: &Gpus) -> Uuid {
    gpus.record(pci(GPU)).unwrap().instance.unwrap()
}

/// The owner's own display is no GPU to be checked, and takes no harm from another that is gone.
#[tokio::test]
async fn a_card_that_the_host_uses_is_left_to_it_also_when_nobody_can_vouch_for_it() {
    let lab = Lab::new();
    lab.lent().await;
    lab.replace(GPU, 0x2331, DISPLAY);
    let host = lab.kernel.host();
    host.add_drm(TWIN, 0).unwrap();
    host.add_process(&FakeProcess {
        pid: 4242,
        name: "Xorg".into(),
        cgroup: "/system.slice/display.service".into(),
        files: vec!["/dev/dri/card0".into()],
    })
    .unwrap();
    let gpus = lab.agent("boot-2").await;
    assert_eq!(checked(&gpus, TWIN).await, Life::Free);
    assert!(lab.kernel.writes_to(TWIN).is_empty() && gpus.offer().obstacles[&pci(TWIN)].contains("Xorg"));
    // As soon as it is left it is checked, and lent after that.
    std::fs::remove_dir_all(lab.kernel.host().root().join("proc/4242")).unwrap();
    gpus.look().await;
    assert!(!gpus.offer().rentable.contains(&pci(TWIN)));
    gpus.prove();
    while !gpus.offer().rentable.contains(&pci(TWIN)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(lab.kernel.writes_to(TWIN).iter().any(|write| write.file.ends_with("reset")));
}

/// Nothing could end the quarantine of a card that was taken out for good.
#[tokio::test]
async fn a_quarantined_gpu_that_is_gone_for_good_is_forgotten_and_known_again_where_it_comes_back() {
    let lab = Lab::new();
    lab.lent().await;
    let host = lab.kernel.host();
    let dir = host.device_dir(GPU);
    let (link, aside) = (host.root().join("sys/bus/pci/devices").join(GPU), host.root().join("aside"));
    let target = std::fs::read_link(&link).unwrap();
    std::fs::rename(&dir, &aside).unwrap();
    std::fs::remove_file(&link).unwrap();
    let gpus = lab.agent("boot-2").await;
    assert_eq!(checked(&gpus, GPU).await, Life::Quarantined);
    let said = |gpus: &Gpus| gpus.problems().into_iter().map(|problem| problem.remedy).collect::<String>();
    assert!(said(&gpus).contains("forgets it"), "{}", said(&gpus));
    gpus.acquit(pci(GPU)).await.unwrap();
    let still = |gpus: &Gpus| gpus.offer().obstacles.get(&pci(GPU)).cloned();
    assert!(
        gpus.problems().is_empty() && still(&gpus).unwrap().contains("no PCI device"),
        "{:?}",
        still(&gpus)
    );
    drop(gpus);
    let gpus = lab.agent("boot-2").await;
    assert!(!gpus.knows(pci(GPU)) && gpus.problems().is_empty());
    drop(gpus);
    std::fs::rename(&aside, &dir).unwrap();
    std::os::unix::fs::symlink(target, &link).unwrap();
    let gpus = lab.agent("boot-2").await;
    assert_eq!(life(&gpus, GPU), Life::Quarantined, "nobody has proven it clean");
    drop(gpus);
    let gpus = lab.agent("boot-3").await;
    assert_eq!(checked(&gpus, GPU).await, Life::Free, "{}", why(&gpus, GPU));
}

#[tokio::test]
async fn only_the_function_whose_driver_has_gone_stays_on_vfio_pci() {
    let audio = "0000:01:00.1";
    let lab = Lab::on(0x20b5, vec![Device::audio(audio).under("0000:00:01.0").group(7)]);
    let home = lab.driver(audio);
    let gpus = lab.agent(BOOT).await;
    let instance = Uuid::now_v7();
    let bound = gpus.bind(instance, &[pci(GPU)], owner()).await.unwrap();
    gpus.hold(&bound).await.unwrap();
    std::fs::remove_dir_all(lab.kernel.host().root().join("sys/bus/pci/drivers/bochs-drm")).unwrap();
    gpus.release(instance, &[pci(GPU)]).await;
    assert_eq!(life(&gpus, GPU), Life::Free, "{}", why(&gpus, GPU));
    assert_eq!((lab.driver(GPU), lab.driver(audio)), (driver("vfio-pci"), home));
}
