use std::collections::BTreeSet;

use super::*;
use crate::{
    holders::HoldingProcess,
    topology::{Isolation, PciDevice},
};

const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";
const PORT: &str = "0000:00:01.0";

fn pci(address: &str) -> PciAddress {
    address.parse().unwrap()
}

fn device(address: &str, class: u32, driver: &str) -> PciDevice {
    PciDevice {
        address: pci(address),
        class,
        vendor: 0x10de,
        device: 0x2330,
        driver: Some(driver.to_owned()).filter(|driver| !driver.is_empty()),
        group: Some(7),
        numa_node: None,
        link: None,
        bars: Vec::new(),
        reset_methods: vec!["flr".into(), "bus".into()],
        upstream: vec![pci(PORT)],
        boot_vga: false,
        physical: None,
    }
}

/// A card with an audio function below a port, on a host where all is well.
fn host() -> Topology {
    let mut port = device(PORT, 0x06_0400, "pcieport");
    port.upstream.clear();
    let devices = [port, device(GPU, 0x03_0200, "nvidia"), device(AUDIO, 0x04_0300, "snd_hda_intel")];
    Topology {
        devices: devices.into_iter().map(|device| (device.address, device)).collect(),
        isolation: Isolation { interrupt_remapping: true, vfio_pci: true, ..Isolation::default() },
    }
}

fn gpu() -> Gpu {
    Gpu { address: pci(GPU), functions: BTreeSet::from([pci(GPU), pci(AUDIO)]) }
}

fn holder(name: &str, unit: Option<&str>) -> Holder {
    Holder::Process(HoldingProcess {
        pid: 77,
        name: name.into(),
        unit: unit.map(str::to_owned),
        node: "/dev/nvidia0".into(),
        certain: true,
    })
}

type Spoil = fn(&mut Topology, &mut BindPolicy);

/// One thing wrong each, with the code and words that must come of it.
const REFUSALS: &[(&str, &str, &str, Spoil)] = &[
    ("no_such_device", AUDIO, "gpu list", |host, _| drop(host.devices.remove(&pci(AUDIO)))),
    ("not_a_gpu", "network controller", "configured", |host, _| of(host, GPU).class = 0x02_0000),
    ("wedged", "still hangs", "reboot", |_, policy| policy.wedged = true),
    ("virtual_function", PORT, PORT, |host, _| of(host, GPU).physical = Some(pci(PORT))),
    ("has_virtual_functions", "0000:01:10.0", "sriov_numvfs", |host, _| {
        add(host, "0000:01:10.0", 0x03_0200);
        of(host, "0000:01:10.0").physical = Some(pci(GPU));
    }),
    ("no_iommu_group", AUDIO, "intel_iommu=on", |host, _| of(host, AUDIO).group = None),
    ("no_interrupt_remapping", "forge", "x2APIC", |host, _| host.isolation.interrupt_remapping = false),
    ("unsafe_interrupts", "allow_unsafe_interrupts", "modprobe.d", |host, _| {
        host.isolation.unsafe_interrupts = true;
    }),
    ("acs_override", "pcie_acs_override", "command line", |host, _| host.isolation.acs_override = true),
    ("foreign_device", "group 7 with 0000:01:01.0", "slot", |host, _| add(host, "0000:01:01.0", 0x02_0000)),
    ("nouveau", "crash", "blacklist", |host, _| of(host, GPU).driver = Some("nouveau".into())),
    ("boot_vga", "console", GPU, |host, _| of(host, GPU).boot_vga = true),
    ("held", "python3 (pid 77)", "stop python3", |_, policy| policy.holders.push(holder("python3", None))),
    ("no_reset", "reset", "slot", |host, _| {
        of(host, AUDIO).reset_methods.clear();
        // The bridge would do, but for a neighbour in a group of its own.
        add(host, "0000:01:02.0", 0x02_0000);
        of(host, "0000:01:02.0").group = Some(8);
    }),
    ("no_vfio_pci", "not loaded", "modprobe vfio-pci", |host, _| host.isolation.vfio_pci = false),
];

fn of<'a>(host: &'a mut Topology, address: &str) -> &'a mut PciDevice {
    host.devices.get_mut(&pci(address)).unwrap()
}

fn add(host: &mut Topology, address: &str, class: u32) {
    host.devices.insert(pci(address), device(address, class, "e1000e"));
}

#[test]
fn each_reason_to_refuse_has_its_code_its_words_and_a_remedy() {
    for (code, words, remedy, spoil) in REFUSALS {
        let (mut host, mut policy) = (host(), BindPolicy::default());
        plan_bind(&host, &gpu(), &policy).unwrap();
        spoil(&mut host, &mut policy);
        let refusal = plan_bind(&host, &gpu(), &policy).expect_err(code);
        assert_eq!(refusal.code(), *code, "{refusal}");
        assert!(refusal.to_string().contains(words), "{code}: {refusal}");
        assert!(refusal.remedy().contains(remedy), "{code}: {}", refusal.remedy());
    }
}

#[test]
fn bridges_may_share_the_group_and_an_nvswitch_may_not() {
    let mut host = host();
    for (address, class) in [("0000:00:01.1", 0x06_0400), ("0000:00:00.0", 0x06_0000)] {
        add(&mut host, address, class);
        of(&mut host, address).upstream.clear();
    }
    of(&mut host, "0000:00:00.0").driver = None;
    plan_bind(&host, &gpu(), &BindPolicy::default()).unwrap();
    add(&mut host, "0000:05:00.0", 0x06_8000);
    let refusal = plan_bind(&host, &gpu(), &BindPolicy::default()).unwrap_err();
    assert_eq!(refusal.code(), "foreign_device");
}

#[test]
fn an_owner_may_give_away_the_console() {
    let mut host = host();
    of(&mut host, GPU).boot_vga = true;
    let policy = BindPolicy { configured: true, ..BindPolicy::default() };
    plan_bind(&host, &gpu(), &policy).unwrap();
}

#[test]
fn what_lets_go_by_itself_or_when_told_is_no_reason() {
    let holders = vec![
        Holder::Framebuffer { name: "fb0".into() },
        Holder::Console { name: "vtcon1".into() },
        Holder::Module { name: "nvidia".into() },
        holder("nvidia-persiste", Some("nvidia-persistenced.service")),
    ];
    let plan = plan_bind(&host(), &gpu(), &BindPolicy { holders, ..BindPolicy::default() }).unwrap();
    let quieting = plan.quieting.unwrap();
    assert_eq!((quieting.gpu, quieting.services), (pci(GPU), vec!["nvidia-persistenced.service".to_owned()]));
}

#[test]
fn a_plan_reserves_all_functions_before_it_frees_one() {
    let plan = plan_bind(&host(), &gpu(), &BindPolicy::default()).unwrap();
    let words: Vec<String> = plan.ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        words,
        [
            "checking that 0000:01:00.0 answers",
            "checking that 0000:01:00.1 answers",
            "reserving 0000:01:00.0 for vfio-pci (driver_override)",
            "reserving 0000:01:00.1 for vfio-pci (driver_override)",
            "unbinding 0000:01:00.0 from nvidia",
            "unbinding 0000:01:00.1 from snd_hda_intel",
            "binding 0000:01:00.0 to vfio-pci",
            "binding 0000:01:00.1 to vfio-pci",
            "checking the driver of 0000:01:00.0",
            "checking the driver of 0000:01:00.1",
            "checking that 0000:01:00.0 answers",
            "checking that 0000:01:00.1 answers",
        ]
    );
    assert_eq!((plan.checks(), plan.undo.len(), plan.is_bound()), (2, 2, false));
    let originals = plan.originals();
    assert_eq!(originals[&pci(GPU)].as_deref(), Some("nvidia"));
    assert_eq!(originals[&pci(AUDIO)].as_deref(), Some("snd_hda_intel"));
}

#[test]
fn a_bound_gpu_is_only_looked_at_and_needs_no_quiet() {
    let mut host = host();
    of(&mut host, GPU).driver = Some("vfio-pci".into());
    of(&mut host, AUDIO).driver = Some("vfio-pci".into());
    // Loaded as can be seen, wherever the look for it went wrong.
    host.isolation.vfio_pci = false;
    let plan = plan_bind(&host, &gpu(), &BindPolicy::default()).unwrap();
    assert!(plan.is_bound() && plan.undo.is_empty() && plan.quieting.is_none());
    let looks = |op: &Op| matches!(op, Op::ExpectAlive { .. } | Op::ExpectDriver { .. });
    assert!(plan.ops.iter().all(looks), "{:?}", plan.ops);
}

#[test]
fn a_plan_back_asks_for_holders_before_it_writes() {
    let originals =
        BTreeMap::from([(pci(GPU), Some("nvidia".to_owned())), (pci(AUDIO), Some("vfio-pci".to_owned()))]);
    let plan = plan_give_back(&host(), &gpu(), &originals, AfterUse::Host);
    let words: Vec<String> = plan.ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        words,
        [
            "checking that nobody holds 0000:01:00.0",
            "checking that nobody holds 0000:01:00.1",
            "clearing driver_override of 0000:01:00.0",
            "unbinding 0000:01:00.0 from vfio-pci",
            "binding 0000:01:00.0 to nvidia",
            "checking the driver of 0000:01:00.0",
        ],
        "a function that was on vfio-pci before stays there"
    );
}

#[test]
fn what_stays_on_vfio_needs_no_steps() {
    let none = BTreeMap::from([(pci(GPU), None), (pci(AUDIO), None)]);
    let vfio = BTreeMap::from([(pci(GPU), Some(VFIO_PCI.to_owned()))]);
    let host_drivers = BTreeMap::from([(pci(GPU), Some("nvidia".to_owned()))]);
    for (originals, after, stays) in [
        (&none, AfterUse::Host, true),
        (&vfio, AfterUse::Host, true),
        (&host_drivers, AfterUse::Vfio, true),
        (&host_drivers, AfterUse::Host, false),
    ] {
        let plan = plan_give_back(&host(), &gpu(), originals, after);
        assert_eq!(plan.ops.is_empty(), stays, "{originals:?} {after:?}");
    }
}

#[test]
fn a_card_that_was_pulled_out_has_nothing_to_go_back() {
    let mut host = host();
    host.devices.clear();
    let originals = BTreeMap::from([(pci(GPU), Some("nvidia".to_owned()))]);
    assert!(plan_give_back(&host, &gpu(), &originals, AfterUse::Host).ops.is_empty());
}
