use proptest::prelude::*;

use super::*;

fn pages(gib1: u64, mib2: u64) -> FreePages {
    FreePages { mib2, gib1 }
}

fn wish(ram: ByteSize, node: Option<u32>) -> MemoryWish {
    MemoryWish { ram, passthrough: true, node }
}

#[test]
fn the_largest_pages_that_are_enough_and_near() {
    let pools = HugepagePools {
        host: pages(20, 20_000),
        nodes: BTreeMap::from([(0, pages(16, 0)), (1, pages(4, 20_000))]),
    };
    use Backing::{Reserved, Transparent};
    for (mib, node, backing) in [
        (16 << 10, Some(0), Reserved(HugePage::Gib1)),
        (17 << 10, Some(0), Transparent),
        (17 << 10, Some(1), Reserved(HugePage::Mib2)),
        (17 << 10, None, Reserved(HugePage::Gib1)),
        (21 << 10, None, Reserved(HugePage::Mib2)),
        (40_000, Some(1), Reserved(HugePage::Mib2)),
        (40_002, Some(1), Transparent),
        // Not a whole number of pages.
        (1536, Some(0), Transparent),
        (1536, Some(1), Reserved(HugePage::Mib2)),
        (1025, Some(1), Transparent),
        // A node that the host does not have.
        (1024, Some(7), Transparent),
        (0, None, Transparent),
    ] {
        let plan = plan_memory(wish(ByteSize::from_mib(mib), node), &pools);
        assert_eq!(plan, MemoryPlan { backing, node }, "{mib} MiB on {node:?}");
    }
    let plain = MemoryWish { ram: ByteSize::from_gib(1), passthrough: false, node: Some(0) };
    assert_eq!(plan_memory(plain, &pools), MemoryPlan::default(), "without GPUs nothing is reserved");
}

#[test]
fn what_others_are_about_to_take_is_not_free() {
    let pools = HugepagePools {
        host: pages(8, 8192),
        nodes: BTreeMap::from([(0, pages(4, 4096)), (1, pages(4, 4096))]),
    };
    let gib = ByteSize::from_gib;
    let takes = |ram, node| plan_memory(wish(gib(ram), node), &pools).takes(gib(ram)).unwrap();
    assert_eq!(takes(3, Some(1)), PagesTaken { page: HugePage::Gib1, node: Some(1), count: 3 });
    assert_eq!(takes(6, Some(1)), PagesTaken { page: HugePage::Mib2, node: Some(1), count: 3072 });
    let left = pools.clone().beside([takes(3, Some(1)), takes(6, Some(0)), takes(2, None)]);
    assert_eq!(left.host, pages(3, 5120));
    assert_eq!(left.nodes, BTreeMap::from([(0, pages(2, 1024)), (1, pages(0, 4096))]));
    assert_eq!(plan_memory(wish(gib(9), None), &pools).takes(gib(9)).unwrap().page, HugePage::Mib2);
    assert_eq!(plan_memory(wish(gib(17), None), &pools).takes(gib(17)), None);
}

#[test]
fn limits_and_deadlines_grow_with_what_is_pinned() {
    let ram = ByteSize::from_gib(64);
    let plan = |backing| MemoryPlan { backing, node: None };
    let seconds = |backing| plan(backing).launch_deadline(ram).as_secs();
    assert_eq!((plan(Backing::OnDemand).memlock(ram), seconds(Backing::OnDemand)), (None, 90));
    for (backing, deadline) in [(Backing::Transparent, 730), (Backing::Reserved(HugePage::Gib1), 410)] {
        assert_eq!(plan(backing).memlock(ram), Some(ByteSize::from_gib(65)));
        assert_eq!(seconds(backing), deadline, "{backing:?}");
    }
    for (gib, threads) in [(0, 1), (1, 1), (5, 5), (2048, 16)] {
        assert_eq!(plan(Backing::Transparent).threads(ByteSize::from_gib(gib)), threads);
    }
}

/// A host with two nodes.
fn host() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let (gib1, mib2) = ("hugepages-1048576kB", "hugepages-2048kB");
    for (dir, pool, free) in [
        ("sys/kernel/mm/hugepages", gib1, "24\n"),
        ("sys/kernel/mm/hugepages", mib2, "1000\n"),
        ("sys/devices/system/node/node0/hugepages", gib1, "8\n"),
        ("sys/devices/system/node/node0/hugepages", mib2, "1000\n"),
        ("sys/devices/system/node/node12/hugepages", gib1, "16\n"),
    ] {
        write(&format!("{dir}/{pool}/free_hugepages"), free);
    }
    write(&format!("sys/kernel/mm/hugepages/{gib1}/resv_hugepages"), "10\n");
    write("sys/devices/system/node/possible", "0-12\n");
    root
}

#[test]
fn pools_are_read_without_what_was_promised() {
    let root = host();
    let pools = observe_hugepages(root.path()).unwrap();
    // The promise of ten pages may have to be kept by either node.
    let nodes = BTreeMap::from([(0, pages(0, 1000)), (12, pages(6, 0))]);
    assert_eq!(pools, HugepagePools { host: pages(14, 1000), nodes });

    let bare = tempfile::tempdir().unwrap();
    assert_eq!(observe_hugepages(bare.path()).unwrap(), HugepagePools::default());

    let file = root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    fs::write(&file, "plenty\n").unwrap();
    let error = observe_hugepages(root.path()).unwrap_err();
    assert_eq!((error.path, error.source.kind()), (file, io::ErrorKind::InvalidData));
}

#[test]
fn this_host_can_be_read() {
    let pools = observe_hugepages(Path::new("/")).unwrap();
    assert!(pools.nodes.values().all(|node| node.mib2 <= pools.host.mib2));
}

proptest! {
    #[test]
    fn a_plan_takes_no_page_that_is_not_there(
        mib in 0_u64..1 << 22, gib1 in 0_u64..4096, mib2 in 0_u64..1 << 21, node in prop::option::of(0_u32..3),
    ) {
        let nodes = BTreeMap::from([(0, pages(gib1 / 2, mib2)), (1, pages(gib1 - gib1 / 2, 0))]);
        let pools = HugepagePools { host: pages(gib1, mib2), nodes };
        let plan = plan_memory(wish(ByteSize::from_mib(mib), node), &pools);
        if let Backing::Reserved(page) = plan.backing {
            let there = node.map_or(pools.host, |node| pools.nodes[&node]).of(page);
            prop_assert!(mib % page.size().mib() == 0 && mib / page.size().mib() <= there);
        }
        prop_assert!(plan.memlock(ByteSize::from_mib(mib)).unwrap() > ByteSize::from_mib(mib));
    }
}
