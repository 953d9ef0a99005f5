//! The GPUs that the goldens are made of. Tests only.

use qudata_api::{
    GpuDistance, GpuDistanceMeaning, GpuHolder, GpuHolderKind, GpuLink, GpuPlace, GpuRefusal, GpuState,
    GpuTopology, GpuView,
};

use super::{at, instances};

/// A healthy, free GPU.
fn gpu(address: &str, group: u32, node: u32) -> GpuView {
    GpuView {
        address: address.to_owned(),
        name: Some("NVIDIA Corporation GH100 [H100 SXM5 80GB]".to_owned()),
        vendor_id: Some("10de".to_owned()),
        device_id: Some("2330".to_owned()),
        state: GpuState::Free,
        since: at("2026-01-01T12:00:00Z"),
        why: None,
        remedy: None,
        instance: None,
        rentable: true,
        refusal: None,
        driver: Some("nvidia".to_owned()),
        original_driver: None,
        functions: vec![address.to_owned()],
        iommu_group: Some(group),
        numa_node: Some(node),
        link: Some(GpuLink { speed: 2.5, width: 16, max_speed: 32.0, max_width: 16 }),
        bar_bytes: (128 << 30) + (32 << 20),
        reset_methods: vec!["flr".to_owned(), "bus".to_owned()],
        holders: Vec::new(),
    }
}

/// One of each kind that matters: two in use, free, quarantined, refused, left out, not there.
pub(crate) fn gpus() -> Vec<GpuView> {
    let used = used();
    let mut second = used.clone();
    second.address = "0000:66:00.0".to_owned();
    second.functions = vec![second.address.clone()];
    second.iommu_group = Some(42);
    vec![used, second, gpu("0000:b3:00.0", 76, 1), quarantined(), refused(), console(), missing()]
}

fn used() -> GpuView {
    let mut used = gpu("0000:65:00.0", 41, 0);
    used.state = GpuState::InUse;
    used.instance = instances().first().map(|i| i.id);
    used.functions.push("0000:65:00.1".to_owned());
    used.driver = Some("vfio-pci".to_owned());
    used.original_driver = Some("nvidia".to_owned());
    used.link = Some(GpuLink { speed: 32.0, width: 16, max_speed: 32.0, max_width: 16 });
    let unit = "qudata-vm-019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01-1-qemu.service";
    used.holders = vec![holder(GpuHolderKind::Process, "qemu-system-x86_64", Some((4242, unit)))];
    used
}

fn quarantined() -> GpuView {
    let mut quarantined = gpu("0000:b4:00.0", 77, 1);
    quarantined.state = GpuState::Quarantined;
    quarantined.since = at("2026-01-02T11:57:00Z");
    quarantined.rentable = false;
    quarantined.why = Some("after the reset its link came back with 8 of 16 lanes".to_owned());
    quarantined.remedy =
        Some("reseat the card or its riser, then `qudata-agent gpu release 0000:b4:00.0`".to_owned());
    quarantined.driver = None;
    quarantined.original_driver = Some("nvidia".to_owned());
    quarantined.link = Some(GpuLink { speed: 32.0, width: 8, max_speed: 32.0, max_width: 16 });
    quarantined
}

fn refused() -> GpuView {
    let mut refused = gpu("0000:b5:00.0", 78, 1);
    refused.rentable = false;
    refused.refusal = Some(GpuRefusal {
        code: "foreign_device".to_owned(),
        message:
            "its IOMMU group 78 also has 0000:b6:00.0 (a network card), which a tenant would get with it"
                .to_owned(),
        remedy: "move one of the two to another slot, or switch ACS on in the firmware".to_owned(),
        since: at("2026-01-02T09:47:00Z"),
        by_choice: false,
    });
    refused.reset_methods.clear();
    refused.holders = vec![
        holder(GpuHolderKind::Process, "python3", Some((977, "jupyter.service"))),
        holder(GpuHolderKind::Module, "nvidia_drm", None),
    ];
    refused
}

fn console() -> GpuView {
    let mut console = gpu("0000:03:00.0", 12, 0);
    console.name = Some("ASPEED Technology, Inc. ASPEED Graphics Family".to_owned());
    (console.vendor_id, console.device_id) = (Some("1a03".to_owned()), Some("2000".to_owned()));
    console.driver = Some("ast".to_owned());
    console.rentable = false;
    console.refusal = Some(GpuRefusal {
        code: "boot_vga".to_owned(),
        message: "the host's console is on it".to_owned(),
        remedy: "name it in QUDATA_GPU_PCI_ADDRS if it is to be rented nevertheless".to_owned(),
        since: at("2026-01-02T09:47:00Z"),
        by_choice: true,
    });
    console.link = None;
    console.bar_bytes = (64 << 20) + (128 << 10);
    console.holders =
        vec![holder(GpuHolderKind::Framebuffer, "fb0", None), holder(GpuHolderKind::Console, "vtcon1", None)];
    console
}

fn missing() -> GpuView {
    let mut missing = gpu("0000:c1:00.0", 0, 0);
    (missing.name, missing.vendor_id, missing.device_id) = (None, None, None);
    (missing.driver, missing.iommu_group, missing.numa_node, missing.link) = (None, None, None, None);
    (missing.rentable, missing.bar_bytes) = (false, 0);
    missing.reset_methods.clear();
    missing.refusal = Some(GpuRefusal {
        code: "no_such_device".to_owned(),
        message: "GPU 0000:c1:00.0 is not on the PCI bus".to_owned(),
        remedy:
            "look whether the card has power and sits in its slot, or remove it from QUDATA_GPU_PCI_ADDRS"
                .to_owned(),
        since: at("2026-01-02T09:47:00Z"),
        by_choice: false,
    });
    missing
}

fn holder(kind: GpuHolderKind, name: &str, process: Option<(u32, &str)>) -> GpuHolder {
    let (pid, unit) = process.map(|(pid, unit)| (pid, unit.to_owned())).unzip();
    GpuHolder { kind, name: name.to_owned(), pid, unit }
}

/// Two sockets, two switches each; on each switch an equal share of `count` GPUs.
pub(crate) fn topology(count: usize) -> GpuTopology {
    let socket = |i: usize| i * 2 / count.max(2);
    let switch = |i: usize| i * 4 / count.max(4);
    let distance = |a: usize, b: usize| match (a == b, switch(a) == switch(b), socket(a) == socket(b)) {
        (true, ..) => GpuDistance::X,
        (_, true, _) => GpuDistance::Pix,
        (_, _, true) => GpuDistance::Node,
        _ if count == 2 => GpuDistance::Pix,
        _ => GpuDistance::Sys,
    };
    let place = |i: usize| GpuPlace {
        address: format!("0000:{:02x}:00.0", 0x17 + 8 * i),
        name: Some("NVIDIA Corporation GH100 [H100 SXM5 80GB]".to_owned()),
        iommu_group: u32::try_from(20 + 7 * i).ok(),
        numa_node: u32::try_from(socket(i)).ok(),
    };
    let legend = [
        (GpuDistance::X, "itself"),
        (GpuDistance::Pix, "at most one PCIe bridge between them"),
        (GpuDistance::Pxb, "several PCIe bridges, without passing the host bridge of the CPU"),
        (GpuDistance::Phb, "a PCIe host bridge of the CPU"),
        (GpuDistance::Node, "host bridges of one NUMA node, and what connects them"),
        (GpuDistance::Sys, "different NUMA nodes, and what connects the sockets (for example QPI or UPI)"),
    ];
    let meaning =
        |(distance, text): (GpuDistance, &str)| GpuDistanceMeaning { distance, meaning: text.to_owned() };
    GpuTopology {
        gpus: (0..count).map(place).collect(),
        matrix: (0..count).map(|a| (0..count).map(|b| distance(a, b)).collect()).collect(),
        legend: legend.into_iter().map(meaning).collect(),
    }
}
