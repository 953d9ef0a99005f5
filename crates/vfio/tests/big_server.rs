//! A server with eight GPUs, two sockets, PCIe switches, NVSwitches, NICs and the console of a BMC, as this crate sees
//! it: the list, the matrix in the form of `nvidia-smi topo`, and who gets which GPUs. Compared with a golden file;
//! `UPDATE_GOLDEN=1 cargo test -p qudata-vfio` rewrites it, and the diff is read like any other change.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests state expectations")]

use std::{fmt::Write, fs, path::Path};

use qudata_host::pci::PciAddress;
use qudata_testkit::pci::{Device, FakeHost};
use qudata_vfio::{
    choose::choose,
    distance::{Distance, distance},
    names::PciIds,
    topology::{Topology, observe},
};

const IDS: &str = "10de  NVIDIA Corporation\n\t22a3  GH100 [H100 NVSwitch]\n\t2330  GH100 [H100 SXM5 80GB]\n\
                   15b3  Mellanox Technologies\n\t1021  MT2910 Family [ConnectX-7]\n\
                   1a03  ASPEED Technology, Inc.\n\t2000  ASPEED Graphics Family\n";

/// Devices in the order in which they are added; groups are counted.
struct Server {
    devices: Vec<Device>,
}

impl Server {
    fn add(&mut self, device: Device, parent: &str, node: i32) {
        let group = u32::try_from(self.devices.len()).unwrap();
        let device = device.group(group).numa(node);
        self.devices.push(if parent.is_empty() { device } else { device.under(parent) });
    }

    /// A switch: its port upwards at `up` under `parent`, and ports downwards to each of `buses`.
    fn switch(&mut self, parent: &str, up: &str, buses: &[u8], node: i32) -> Vec<String> {
        let (domain, bus) = up.split_once(':').unwrap();
        let inside = u8::from_str_radix(&bus[..2], 16).unwrap() + 1;
        self.add(Device::bridge(up, inside).ids(0x1000, 0xc030), parent, node);
        let port = |i: usize| format!("{domain}:{inside:02x}:{i:02x}.0");
        for (i, bus) in buses.iter().enumerate() {
            self.add(Device::bridge(&port(i), *bus).ids(0x1000, 0xc030), up, node);
        }
        (0..buses.len()).map(port).collect()
    }

    fn root_port(&mut self, address: &str, bus: u8, node: i32) -> String {
        self.add(Device::bridge(address, bus), "", node);
        address.to_owned()
    }
}

fn gpu(address: &str) -> Device {
    Device::gpu(address).ids(0x10de, 0x2330).link("32.0 GT/s PCIe", 16)
}

fn nic(address: &str) -> Device {
    Device::new(address).class(0x02_0700).ids(0x15b3, 0x1021).link("32.0 GT/s PCIe", 16).driver("mlx5_core")
}

fn nvswitch(address: &str) -> Device {
    Device::new(address)
        .class(0x06_8000)
        .ids(0x10de, 0x22a3)
        .link("16.0 GT/s PCIe", 2)
        .driver("nvidia-nvswitch")
}

/// ```text
/// node 0: 0000:17 ─ switch ─ GPU 0, GPU 1, NIC 0        node 1: 0000:85 ─ GPU 4
///         0000:3a ─ switch ┬ GPU 2                              0000:85 ─ GPU 5
///                          └ switch ─ GPU 3                     0001:c0 ─ switch ─ GPU 6, GPU 7, NIC 1
///         0000:64 ─ switch ─ four NVSwitches
///         0000:00 ─ BMC
/// ```
fn server() -> FakeHost {
    let mut s = Server { devices: Vec::new() };
    let bmc = s.root_port("0000:00:1c.0", 2, 0);
    let graphics =
        Device::new("0000:02:00.0").class(0x03_0000).ids(0x1a03, 0x2000).driver("ast").boot_vga(true);
    s.add(graphics, &bmc, 0);

    let root = s.root_port("0000:17:01.0", 0x18, 0);
    let ports = s.switch(&root, "0000:18:00.0", &[0x1a, 0x1b, 0x1c], 0);
    s.add(gpu("0000:1a:00.0"), &ports[0], 0);
    s.add(gpu("0000:1b:00.0"), &ports[1], 0);
    s.add(nic("0000:1c:00.0"), &ports[2], 0);

    let root = s.root_port("0000:3a:01.0", 0x3b, 0);
    let ports = s.switch(&root, "0000:3b:00.0", &[0x3d, 0x3e], 0);
    s.add(gpu("0000:3d:00.0"), &ports[0], 0);
    let ports = s.switch(&ports[1], "0000:3e:00.0", &[0x40], 0);
    s.add(gpu("0000:40:00.0"), &ports[0], 0);

    let root = s.root_port("0000:64:01.0", 0x65, 0);
    let ports = s.switch(&root, "0000:65:00.0", &[0x67, 0x68, 0x69, 0x6a], 0);
    for (bus, port) in (0x67..).zip(&ports) {
        s.add(nvswitch(&format!("0000:{bus:02x}:00.0")), port, 0);
    }

    let root = s.root_port("0000:85:01.0", 0x86, 1);
    s.add(gpu("0000:86:00.0"), &root, 1);
    let root = s.root_port("0000:85:02.0", 0x87, 1);
    s.add(gpu("0000:87:00.0"), &root, 1);

    let root = s.root_port("0001:c0:01.0", 0xc1, 1);
    let ports = s.switch(&root, "0001:c1:00.0", &[0xc3, 0xc4, 0xc5], 1);
    s.add(gpu("0001:c3:00.0"), &ports[0], 1);
    s.add(gpu("0001:c4:00.0"), &ports[1], 1);
    s.add(nic("0001:c5:00.0"), &ports[2], 1);

    let host = FakeHost::with(s.devices).unwrap();
    host.file("usr/share/misc/pci.ids", IDS).unwrap();
    host
}

fn list(text: &mut String, host: &FakeHost, topology: &Topology) {
    let ids = PciIds::load(host.root());
    for gpu in topology.gpus(&[]) {
        let device = &topology.devices[&gpu.address];
        let or_none = |number: Option<u32>| number.map_or("-".into(), |number| number.to_string());
        let link = device.link.map_or("-".into(), |link| format!("{} MT/s x{}", link.speed, link.width));
        let bars: u64 = device.bars.iter().map(|bar| bar.size).sum();
        writeln!(
            text,
            "{}  {:<43}  {:<6}  group {:>2}  node {}  {link}  {} MiB",
            gpu.address,
            ids.name_or_ids(device.vendor, device.device),
            device.driver.as_deref().unwrap_or("-"),
            or_none(device.group),
            or_none(device.numa_node),
            bars >> 20,
        )
        .unwrap();
    }
}

/// GPUs and NICs against each other, then the legend.
fn matrix(text: &mut String, topology: &Topology, gpus: &[PciAddress]) {
    let nics = topology.devices.values().filter(|device| device.class >> 8 == 0x0207).map(|nic| nic.address);
    let named = |name: &'static str| move |(i, address)| (format!("{name}{i}"), address);
    let all: Vec<(String, PciAddress)> = (gpus.iter().copied().enumerate().map(named("GPU")))
        .chain(nics.enumerate().map(named("NIC")))
        .collect();
    let header: String = all.iter().map(|(name, _)| format!("{name:>5}")).collect();
    writeln!(text, "{:4}{header}   NUMA", "").unwrap();
    for (name, address) in &all {
        let row: String =
            all.iter().map(|(_, other)| format!("{:>5}", distance(topology, *address, *other))).collect();
        let node = topology.devices[address].numa_node.map_or("-".into(), |node| node.to_string());
        writeln!(text, "{name:4}{row}   {node}").unwrap();
    }
    text.push('\n');
    for distance in Distance::ALL {
        writeln!(text, "  {distance:<4} = {}", distance.meaning()).unwrap();
    }
}

fn choices(text: &mut String, topology: &Topology, gpus: &[PciAddress]) {
    let all: Vec<usize> = (0..gpus.len()).collect();
    let free: [&[usize]; 4] = [&all, &[1, 2, 3, 5, 6], &[0, 4, 5, 7], &[3, 7]];
    for free in free {
        let addresses: Vec<PciAddress> = free.iter().map(|i| gpus[*i]).collect();
        writeln!(text, "of {free:?}").unwrap();
        for count in 1..=free.len() + 1 {
            let chosen = choose(topology, &addresses, count).map(|set| {
                let number = |gpu: &PciAddress| gpus.iter().position(|at| at == gpu).unwrap();
                set.iter().map(number).collect::<Vec<_>>()
            });
            let chosen = chosen.map_or("too few".into(), |set| format!("{set:?}"));
            writeln!(text, "  {count}: {chosen}").unwrap();
        }
    }
}

#[test]
fn a_big_server() {
    let host = server();
    let topology = observe(host.root()).unwrap();
    let gpus: Vec<PciAddress> = topology.gpus(&[]).iter().map(|gpu| gpu.address).collect();
    // The BMC's console is a GPU by its class; `plan` refuses to take it away.
    assert!(topology.devices[&gpus[0]].boot_vga);
    let gpus = &gpus[1..];
    let mut text = String::new();
    list(&mut text, &host, &topology);
    text.push('\n');
    matrix(&mut text, &topology, gpus);
    text.push('\n');
    choices(&mut text, &topology, gpus);

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/big-server.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        golden == text,
        "rerun with UPDATE_GOLDEN=1 if that is meant\n--- golden\n{golden}--- now\n{text}"
    );
}
