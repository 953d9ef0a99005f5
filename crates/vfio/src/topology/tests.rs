use std::{path::Path, sync::mpsc, thread, time::Duration};

use proptest::prelude::*;
use qudata_testkit::pci::{Device, FakeBar, FakeHost};

use super::*;

fn at(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn seen(host: &FakeHost) -> Topology {
    observe(host.root()).unwrap()
}

/// A card with audio below a root port, another card without a driver, a disk, the console of a BMC.
fn host() -> FakeHost {
    FakeHost::with([
        Device::bridge("0000:00:01.0", 1).group(1),
        Device::gpu("0000:01:00.0").under("0000:00:01.0").group(2).numa(0).boot_vga(false),
        Device::audio("0000:01:00.1").under("0000:00:01.0").group(2).numa(0),
        Device::bridge("0000:00:02.0", 2).group(3),
        Device::gpu("0000:02:00.0")
            .under("0000:00:02.0")
            .group(4)
            .ids(0x1002, 0x740f)
            .class(0x03_8000)
            .unbound(),
        Device::new("0000:00:17.0").class(0x01_0802).group(5).driver("nvme").reset("flr"),
        Device::new("0000:03:00.0").class(0x03_0000).ids(0x1a03, 0x2000).driver("ast").boot_vga(true),
    ])
    .unwrap()
}

#[test]
fn a_device_as_the_kernel_shows_it() {
    let topology = seen(&host());
    assert_eq!(topology.devices.len(), 7);
    let bar = |index, size, wide| Bar { index, size, is_64bit: wide, prefetchable: wide };
    assert_eq!(
        topology.devices[&at("0000:01:00.0")],
        PciDevice {
            address: at("0000:01:00.0"),
            class: 0x03_0200,
            vendor: 0x10de,
            device: 0x20b5,
            driver: Some("nvidia".into()),
            group: Some(2),
            numa_node: Some(0),
            link: Some(Link { speed: 16000, width: 16, max_speed: 16000, max_width: 16 }),
            bars: vec![bar(0, 16 << 20, false), bar(1, 128 << 30, true), bar(3, 32 << 20, true)],
            reset_methods: vec!["flr".into(), "bus".into()],
            upstream: vec![at("0000:00:01.0")],
            boot_vga: false,
            physical: None,
        }
    );
    let bmc = &topology.devices[&at("0000:03:00.0")];
    assert!(bmc.boot_vga && bmc.link.is_none() && bmc.group.is_none() && bmc.numa_node.is_none());
    assert_eq!(topology.devices[&at("0000:02:00.0")].driver, None);
}

#[test]
fn gpus_are_slots_in_order() {
    let topology = seen(&host());
    let addresses = |configured: &[PciAddress]| -> Vec<String> {
        topology.gpus(configured).iter().map(|gpu| gpu.address.to_string()).collect()
    };
    assert_eq!(addresses(&[]), ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"]);
    // A configured disk is a GPU to us; the audio function of a card stands for its card; nothing is nothing.
    let configured = [at("0000:00:17.0"), at("0000:01:00.1"), at("0000:7f:00.0")];
    assert_eq!(addresses(&configured), ["0000:00:17.0", "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"]);
    let gpu = topology.gpu(at("0000:01:00.1")).unwrap();
    assert_eq!(gpu.address, at("0000:01:00.0"));
    assert_eq!(gpu.functions, [at("0000:01:00.0"), at("0000:01:00.1")].into());
    assert_eq!(topology.gpu(at("0000:7f:00.0")), None);
}

/// The slot of a card whose physical function has made virtual ones: those are devices of their own.
#[test]
fn virtual_functions_are_no_part_of_their_card() {
    let vf = |address: &str| {
        Device::gpu(address).ids(0x10de, 0x20b7).virtual_of("0000:41:00.0").group(9).unbound()
    };
    let host = FakeHost::with([Device::gpu("0000:41:00.0").group(8), vf("0000:41:00.4"), vf("0000:41:01.0")])
        .unwrap();
    let topology = seen(&host);
    assert_eq!(topology.devices[&at("0000:41:00.4")].physical, Some(at("0000:41:00.0")));
    let gpus = topology.gpus(&[]);
    assert_eq!(gpus, [Gpu { address: at("0000:41:00.0"), functions: [at("0000:41:00.0")].into() }]);
    let gpus = topology.gpus(&[at("0000:41:01.0")]);
    assert_eq!(gpus[1], Gpu { address: at("0000:41:01.0"), functions: [at("0000:41:01.0")].into() });
    assert_eq!(topology.gpu(at("0000:41:00.4")).unwrap().functions.len(), 1);
}

#[test]
fn domains_beyond_the_first() {
    let host = FakeHost::with([Device::gpu("10000:e1:00.0"), Device::gpu("0001:01:00.0")]).unwrap();
    let gpus = seen(&host).gpus(&[]);
    assert_eq!(
        gpus.iter().map(|gpu| gpu.address.to_string()).collect::<Vec<_>>(),
        ["0001:01:00.0", "10000:e1:00.0"]
    );
}

#[test]
fn isolation_is_what_the_kernel_says() {
    let host = host();
    let good = Isolation { interrupt_remapping: true, vfio_pci: true, ..Isolation::default() };
    assert_eq!(seen(&host).isolation, good);
    host.set_interrupt_remapping(false).unwrap();
    host.file("proc/cmdline", "ro pcie_acs_override=downstream quiet\n").unwrap();
    host.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n").unwrap();
    host.remove_driver("vfio-pci").unwrap();
    let bad = Isolation {
        interrupt_remapping: false,
        unsafe_interrupts: true,
        acs_override: true,
        vfio_pci: false,
    };
    assert_eq!(seen(&host).isolation, bad);
    host.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n").unwrap();
    assert!(!seen(&host).isolation.unsafe_interrupts);
    host.file("sys/module/iommufd/parameters/allow_unsafe_interrupts", "1\n").unwrap();
    assert!(seen(&host).isolation.unsafe_interrupts);
}

#[test]
fn a_group_that_vfio_made_up_is_none() {
    let host = FakeHost::with([Device::gpu("0000:01:00.0").group(0)]).unwrap();
    assert_eq!(seen(&host).devices[&at("0000:01:00.0")].group, Some(0));
    host.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n").unwrap();
    assert_eq!(seen(&host).devices[&at("0000:01:00.0")].group, None);
}

/// Every file that hangs for a device with a stuck driver is a pipe without another end: whoever opens one is not back
/// in time.
#[test]
fn a_wedged_device_is_seen_like_any_other() {
    let host = host();
    let before = seen(&host);
    for address in before.devices.keys() {
        host.wedge(&address.to_string()).unwrap();
    }
    let (tell, told) = mpsc::channel();
    let root = host.root().to_owned();
    thread::spawn(move || tell.send(observe(&root)));
    let after = told.recv_timeout(Duration::from_secs(10)).expect("reads a file that hangs").unwrap();
    assert_eq!(after, before);
}

#[test]
fn a_device_that_vanished_is_left_out_and_a_broken_one_is_an_error() {
    let host = host();
    let before = seen(&host).devices.len();
    std::fs::remove_dir_all(host.device_dir("0000:02:00.0")).unwrap();
    assert_eq!(seen(&host).devices.len(), before - 1, "a link to nothing is a device on its way out");
    std::fs::write(host.device_dir("0000:01:00.0").join("class"), "three\n").unwrap();
    let error = observe(host.root()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "class of PCI device 0000:01:00.0 is \"three\", which is not a form this version knows"
    );
    std::fs::remove_file(host.device_dir("0000:01:00.0").join("class")).unwrap();
    assert_eq!(observe(host.root()).unwrap_err().to_string(), "cannot read class of PCI device 0000:01:00.0");
}

/// The kernel takes the files of a device away one by one before the device itself.
#[test]
fn a_device_on_its_way_out_is_waited_for() {
    let host = host();
    let dir = host.device_dir("0000:02:00.0");
    std::fs::remove_file(dir.join("class")).unwrap();
    let kernel = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        std::fs::remove_dir_all(dir).unwrap();
    });
    assert!(!seen(&host).devices.contains_key(&at("0000:02:00.0")));
    kernel.join().unwrap();
}

#[test]
fn devices_that_come_and_go_while_being_read() {
    let mut host = host();
    for bus in 0x10..0x30 {
        host.add(Device::gpu(&format!("0000:{bus:02x}:00.0"))).unwrap();
    }
    let root = host.root().to_owned();
    let reader = thread::spawn(move || {
        let mut fewest = usize::MAX;
        while fewest > 7 {
            fewest = observe(&root).unwrap().devices.len();
        }
    });
    for bus in 0x10..0x30 {
        host.unplug(&format!("0000:{bus:02x}:00.0")).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    reader.join().unwrap();
}

/// Off the bus, the kernel still shows the old ids; the link it cannot read.
#[test]
fn a_device_off_the_bus_has_no_link() {
    let host = host();
    let dir = host.device_dir("0000:01:00.0");
    std::fs::write(dir.join("max_link_speed"), "Unknown\n").unwrap();
    std::fs::remove_file(dir.join("current_link_width")).unwrap();
    let device = seen(&host).devices[&at("0000:01:00.0")].clone();
    assert_eq!((device.vendor, device.link), (0x10de, None));
}

#[test]
fn a_bar_without_room_still_counts() {
    let gpu = Device::new("0000:01:00.0").class(0x03_0000).bar(0, 256 << 20, FakeBar::PREFETCH_64);
    let host = FakeHost::with([gpu]).unwrap();
    let unassigned = "0x0000000000000000 0x000000000fffffff 0x000000002014220c\n".to_owned();
    std::fs::write(host.device_dir("0000:01:00.0").join("resource"), unassigned).unwrap();
    assert_eq!(seen(&host).devices[&at("0000:01:00.0")].bars[0].size, 256 << 20);
}

#[test]
fn no_sysfs_is_an_error_and_no_pci_is_no_devices() {
    let dir = tempfile::tempdir().unwrap();
    let error = observe(dir.path()).unwrap_err().to_string();
    assert!(error.contains("/sys/bus/pci/devices"), "{error}");
    std::fs::create_dir_all(dir.path().join("sys/bus")).unwrap();
    let error = observe(dir.path()).unwrap_err().to_string();
    assert!(error.contains("/proc/cmdline"), "{error}");
    std::fs::create_dir_all(dir.path().join("proc")).unwrap();
    std::fs::write(dir.path().join("proc/cmdline"), "ro\n").unwrap();
    std::fs::write(dir.path().join("proc/interrupts"), "").unwrap();
    assert_eq!(observe(dir.path()).unwrap(), Topology::default());
}

/// Functions of a few slots, of any class, some virtual.
fn functions() -> impl Strategy<Value = Vec<(u8, u8, bool, bool)>> {
    proptest::collection::vec((0_u8..3, 0_u8..8, any::<bool>(), any::<bool>()), 0..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever is there and configured: GPUs are in order, each function is in one of them, each is of one slot and
    /// goes by one of its own functions, no display controller is forgotten.
    #[test]
    fn gpus_are_a_partition(functions in functions(), configured in proptest::collection::vec(0_usize..16, 0..4)) {
        let mut host = FakeHost::new().unwrap();
        let mut all = Vec::new();
        for (bus, function, display, is_virtual) in functions {
            let address = format!("0000:0{bus}:00.{function}");
            if all.contains(&at(&address)) {
                continue;
            }
            all.push(at(&address));
            let device = Device::new(&address).class(if display { 0x03_0000 } else { 0x02_0000 });
            let physical = all[0].to_string();
            let is_virtual = is_virtual && physical != address;
            host.add(if is_virtual { device.virtual_of(&physical) } else { device }).unwrap();
        }
        let configured: Vec<PciAddress> = configured.iter().filter_map(|i| all.get(*i).copied()).collect();
        let topology = seen(&host);
        let gpus = topology.gpus(&configured);
        prop_assert!(gpus.is_sorted_by_key(|gpu| gpu.address));
        let members: Vec<PciAddress> = gpus.iter().flat_map(|gpu| gpu.functions.iter().copied()).collect();
        prop_assert_eq!(members.len(), members.iter().collect::<BTreeSet<_>>().len());
        for gpu in &gpus {
            prop_assert!(gpu.functions.contains(&gpu.address));
            let buses: BTreeSet<String> = gpu.functions.iter().map(|at| at.to_string()[..10].to_owned()).collect();
            prop_assert_eq!(buses.len(), 1);
        }
        for (address, device) in &topology.devices {
            let wanted = configured.contains(address) || (device.is_display() && device.physical.is_none());
            prop_assert!(!wanted || members.contains(address), "{address}");
            prop_assert!(topology.gpu(*address).unwrap().functions.contains(address));
        }
    }
}

/// Whatever machine this runs on: its devices are the ones that the kernel lists, and each is read.
#[test]
fn the_machine_that_runs_the_tests() {
    let Ok(listed) = std::fs::read_dir("/sys/bus/pci/devices") else {
        assert_eq!(observe(Path::new("/")).unwrap().devices.len(), 0);
        return;
    };
    let topology = observe(Path::new("/")).unwrap();
    assert_eq!(topology.devices.len(), listed.count());
    for device in topology.devices.values() {
        assert!(device.vendor != 0 && device.vendor != 0xffff, "{device:?}");
        for bridge in &device.upstream {
            assert!(topology.devices[bridge].is_bridge(), "{device:?}");
        }
    }
}
