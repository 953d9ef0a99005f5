//! Tests of the bookkeeping: nothing is given twice, nothing is promised that is not there.

use proptest::prelude::*;

use std::sync::Arc;

use qudata_qemu::memory::FreePages;
use qudata_vfio::topology::{PciDevice, Topology};

use super::*;

static NONE: BTreeSet<u16> = BTreeSet::new();

fn at<'a>(bindable: &'a dyn Fn(u16) -> bool) -> Ports<'a> {
    Ports { routed: &NONE, start: 10_002, bindable }
}

fn gpu(bus: u8) -> PciAddress {
    format!("{bus:02x}:00.0").parse().unwrap()
}

fn limits() -> Limits {
    Limits {
        ssh_ports: 10_000..=10_003,
        app_ports: 20_000..=20_010,
        management_ports: 30_000..=30_003,
        tunneled: false,
        cpu_overcommit: 1,
        reserve_memory: ByteSize::from_gib(1),
        reserve_disk: ByteSize::from_gib(2),
        defaults: Defaults { cpus: 4, memory: ByteSize::from_gib(8), storage: ByteSize::from_gib(50) },
    }
}

fn offer() -> GpuOffer {
    let all = vec![gpu(1), gpu(2)];
    let device = |address: &PciAddress| PciDevice {
        address: *address,
        class: 0x03_0200,
        vendor: 0x10de,
        device: 0x2330,
        driver: None,
        group: Some(1),
        numa_node: None,
        link: None,
        bars: Vec::new(),
        reset_methods: Vec::new(),
        upstream: Vec::new(),
        boot_vga: false,
        physical: None,
    };
    let devices = all.iter().map(|address| (*address, device(address))).collect();
    let topology = Arc::new(Topology { devices, ..Topology::default() });
    GpuOffer { rentable: all.clone(), all, topology, ..GpuOffer::default() }
}

fn host() -> HostCapacity {
    HostCapacity {
        cpus: 8,
        memory_total: ByteSize::from_gib(32),
        memory_available: ByteSize::from_gib(30),
        disk_total: ByteSize::from_gib(200),
        disk_free: ByteSize::from_gib(100),
    }
}

fn wish(json: serde_json::Value) -> Wish {
    Wish::from_body(&serde_json::from_value(json).unwrap(), false).unwrap()
}

fn taken(leases: Leases, memory: u64) -> Taken {
    Taken {
        leases,
        cpus: 2,
        memory: ByteSize::from_gib(memory),
        disk_growth: ByteSize::from_gib(10),
        starting: false,
    }
}

#[test]
fn ports_come_from_their_ranges_and_skip_what_is_bound() {
    let wish = wish(serde_json::json!({"ports": ["22", "80", "81"], "gpus": 0}));
    let leases = plan_leases(&wish, &[], &limits(), &offer(), &at(&|port| port != 20_000)).unwrap();
    assert_eq!(leases.ports, BTreeMap::from([(22, 10_000), (80, 20_001), (81, 20_002)]));
    assert_eq!((leases.management_port, leases.slot), (30_000, 0));
}

#[test]
fn a_public_port_is_not_the_number_of_a_host_port_while_there_are_others() {
    let wish = wish(serde_json::json!({"ports": ["22"], "gpus": 0}));
    let tunneled = Limits { tunneled: true, ..limits() };
    let mut all: Vec<Taken> = Vec::new();
    let mut numbers = BTreeSet::new();
    for _ in 0..4 {
        let ports = Ports { start: 10_000, ..at(&|_| true) };
        let leases = plan_leases(&wish, &all, &tunneled, &offer(), &ports);
        let Ok(leases) = leases else { panic!("{leases:?} beside {all:?}") };
        let new = [leases.ports[&22], leases.public[&22]].into_iter().filter(|n| numbers.insert(*n)).count();
        assert!(all.len() > 1 || new == 2, "{leases:?} beside {all:?}");
        all.push(taken(leases, 1));
    }
}

#[test]
fn a_used_up_range_is_a_conflict() {
    let wish = wish(serde_json::json!({"ports": ["22"], "gpus": 0}));
    let refusal = plan_leases(&wish, &[], &limits(), &offer(), &at(&|port| port >= 20_000)).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::PortTaken);
    assert!(refusal.sentence.contains("10000 to 10003"), "{refusal}");
}

#[test]
fn gpus_by_count_address_and_all() {
    let first =
        plan_leases(&wish(serde_json::json!({"gpus": 1})), &[], &limits(), &offer(), &at(&|_| true)).unwrap();
    assert_eq!(first.gpus, [gpu(1)]);
    let one = [taken(first, 1)];
    let rest = plan_leases(&wish(serde_json::json!({})), &one, &limits(), &offer(), &at(&|_| true)).unwrap();
    assert_eq!(rest.gpus, [gpu(2)]);
    let code = |body, taken: &[Taken]| {
        plan_leases(&wish(body), taken, &limits(), &offer(), &at(&|_| true)).unwrap_err().code
    };
    assert_eq!(code(serde_json::json!({"gpus": 2}), &one), ErrorCode::NoGpu);
    assert_eq!(code(serde_json::json!({"gpu_addrs": ["01:00.0"]}), &one), ErrorCode::GpuTaken);
    assert_eq!(code(serde_json::json!({"gpu_addrs": ["03:00.0"]}), &one), ErrorCode::InvalidField);
    let both = [taken(rest, 1), one[0].clone()];
    assert_eq!(code(serde_json::json!({}), &both), ErrorCode::NoGpu);
}

#[test]
fn an_unfit_gpu_is_refused_with_what_is_in_its_way() {
    let obstacles = BTreeMap::from([(gpu(1), "it is quarantined; release it".to_owned())]);
    let offer = GpuOffer { rentable: vec![gpu(2)], obstacles, ..offer() };
    let plan = |body| plan_leases(&wish(body), &[], &limits(), &offer, &at(&|_| true));
    assert_eq!(plan(serde_json::json!({})).unwrap().gpus, [gpu(2)]);
    assert_eq!(plan(serde_json::json!({"gpus": 1})).unwrap().gpus, [gpu(2)]);
    for (body, code) in [
        (serde_json::json!({"gpus": 2}), ErrorCode::NoGpu),
        (serde_json::json!({"gpu_addrs": ["01:00.0"]}), ErrorCode::GpuUnfit),
    ] {
        let refusal = plan(body).unwrap_err();
        assert_eq!(refusal.code, code);
        assert!(refusal.sentence.contains("it is quarantined; release it"), "{refusal}");
    }
}

#[test]
fn defaults_shrink_and_wishes_do_not() {
    let small = HostCapacity { cpus: 2, memory_total: ByteSize::from_gib(6), ..host() };
    let free = plan_free(&small, &[], &limits());
    let image = ByteSize::from_gib(2);
    let sizes = plan_sizes(&wish(serde_json::json!({})), &free, image, &limits()).unwrap();
    assert_eq!(sizes.cpus, 2);
    assert!(sizes.memory < ByteSize::from_gib(5) && sizes.memory > ByteSize::from_gib(4), "{sizes:?}");
    assert_eq!(sizes.storage, ByteSize::from_gib(50));
    for (body, code) in [
        (serde_json::json!({"cpus": "3"}), ErrorCode::NoCpus),
        (serde_json::json!({"memory": "6G"}), ErrorCode::NoMemory),
        (serde_json::json!({"storage_gb": 99}), ErrorCode::NoDisk),
        (serde_json::json!({"storage_gb": 1}), ErrorCode::InvalidField),
    ] {
        assert_eq!(
            plan_sizes(&wish(body.clone()), &free, image, &limits()).unwrap_err().code,
            code,
            "{body}"
        );
    }
}

#[test]
fn reserved_pages_count_for_guests_with_gpus_and_once() {
    let pages = FreePages { mib2: 512, gib1: 24 };
    let pools = HugepagePools { host: pages, nodes: BTreeMap::from([(1, FreePages { gib1: 8, ..pages })]) };
    let leases =
        |gpus| Leases { slot: 0, ports: BTreeMap::new(), public: BTreeMap::new(), management_port: 0, gpus };
    let starting = |gpus| Taken { starting: true, ..taken(leases(gpus), 6) };
    let gib = |taken: &[Taken], node| plan_huge(&pools, node, taken).gib();
    assert_eq!((gib(&[], None), gib(&[], Some(1)), gib(&[], Some(0))), (24, 8, 0));
    assert_eq!(gib(&[starting(vec![gpu(1)])], None), 18);
    assert_eq!(
        gib(&[starting(vec![]), taken(leases(vec![gpu(1)]), 6)], None),
        24,
        "no pages, or taken already"
    );

    let free = Free { huge: ByteSize::from_gib(24), ..plan_free(&host(), &[], &limits()) };
    let most = |free: &Free, memory: &str| {
        plan_sizes(&wish(serde_json::json!({"memory": memory})), free, ByteSize::default(), &limits()).is_ok()
    };
    let small = Free { memory: ByteSize::from_gib(2), ..free };
    assert!(most(&small, "24G") && !most(&small, "25G"));
    assert!(!most(&Free { huge: ByteSize::default(), ..small }, "3G"));
}

proptest! {
    #[test]
    fn nothing_is_leased_twice(bodies in prop::collection::vec((0usize..4, 0u32..2), 1..6)) {
        let mut all: Vec<Taken> = Vec::new();
        for (ports, gpus) in bodies {
            let ports: Vec<u32> = (100..).take(ports).collect();
            let wish = wish(serde_json::json!({"ports": ports, "gpus": gpus}));
            if let Ok(leases) = plan_leases(&wish, &all, &limits(), &offer(), &at(&|_| true)) {
                all.push(taken(leases, 1));
            }
        }
        let unique = |list: Vec<String>| list.iter().collect::<BTreeSet<_>>().len() == list.len();
        let held = |f: fn(&Leases) -> Vec<String>| all.iter().flat_map(|t| f(&t.leases)).collect::<Vec<_>>();
        prop_assert!(unique(held(|l| l.ports.values().map(u16::to_string).collect())));
        prop_assert!(unique(held(|l| vec![l.slot.to_string()])));
        prop_assert!(unique(held(|l| vec![l.management_port.to_string()])));
        prop_assert!(unique(held(|l| l.gpus.iter().map(PciAddress::to_string).collect())));
    }

    #[test]
    fn promises_stay_within_the_host(sizes in prop::collection::vec(1u64..16, 0..8), want in 1u64..40) {
        let leases = Leases { slot: 0, ports: BTreeMap::new(), public: BTreeMap::new(), management_port: 0, gpus: vec![] };
        let all: Vec<Taken> = sizes.iter().map(|gib| taken(leases.clone(), *gib)).collect();
        let free = plan_free(&host(), &all, &limits());
        let wish = wish(serde_json::json!({"memory": format!("{want}G"), "cpus": 1}));
        if let Ok(granted) = plan_sizes(&wish, &free, ByteSize::default(), &limits()) {
            let promised: u64 = sizes.iter().sum::<u64>() + granted.memory.gib();
            prop_assert!(promised < host().memory_total.gib());
        }
    }
}
