//! A host where all is well, for tests that spoil one thing each: two GPUs of 80 GB on an AMD server, Debian 12 with a newer
//! kernel and QEMU, an agent that runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use qudata_agent_core::{
    control_plane::Answer,
    probe::KvmProbe,
    settings::{LoadFrom, Settings},
};
use qudata_host::{capacity::HostCapacity, pci::PciAddress, size::ByteSize};
use qudata_qemu::mmio::AddressWidth;
use qudata_vfio::topology::{Bar, Gpu, Isolation, Link, PciDevice, Topology};

use crate::{SettingsRead, observed::*};

pub(super) const FIRST: &str = "0000:41:00.0";
pub(super) const SECOND: &str = "0000:61:00.0";
/// The chip of the management controller, with the console.
pub(super) const CONSOLE: &str = "0000:02:00.0";

pub(super) fn pci(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// Settings with these variables.
pub(super) fn settings(env: &[(&str, &str)]) -> Settings {
    let from = LoadFrom {
        file: None,
        env: env.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        flags: Vec::new(),
        read: &|_| Err(io::ErrorKind::NotFound.into()),
        exists: &|_| true,
    };
    Settings::load(&from).unwrap()
}

fn device(address: &str, class: u32, ids: (u16, u16), group: u32) -> PciDevice {
    PciDevice {
        address: pci(address),
        class,
        vendor: ids.0,
        device: ids.1,
        driver: None,
        group: Some(group),
        numa_node: Some(0),
        link: None,
        bars: Vec::new(),
        reset_methods: Vec::new(),
        upstream: Vec::new(),
        boot_vga: false,
        physical: None,
    }
}

fn card(address: &str, group: u32, port: &str) -> PciDevice {
    let bar = |index, size, prefetchable| Bar { index, size, is_64bit: true, prefetchable };
    PciDevice {
        driver: Some("nvidia".to_owned()),
        link: Some(Link { speed: 2500, width: 16, max_speed: 32000, max_width: 16 }),
        bars: vec![bar(0, 16 << 20, true), bar(2, 128 << 30, true), bar(4, 32 << 20, true)],
        reset_methods: vec!["flr".to_owned(), "bus".to_owned()],
        upstream: vec![pci(port)],
        ..device(address, 0x03_0200, (0x10de, 0x2331), group)
    }
}

fn topology() -> Topology {
    let port = |address: &str, group| PciDevice {
        driver: Some("pcieport".to_owned()),
        ..device(address, 0x06_0400, (0x1022, 0x14ab), group)
    };
    let console = PciDevice {
        driver: Some("ast".to_owned()),
        boot_vga: true,
        ..device(CONSOLE, 0x03_0000, (0x1a03, 0x2000), 3)
    };
    let devices = [
        port("0000:40:01.0", 10),
        card(FIRST, 11, "0000:40:01.0"),
        port("0000:60:01.0", 20),
        card(SECOND, 21, "0000:60:01.0"),
        console,
    ];
    let isolation = Isolation { interrupt_remapping: true, vfio_pci: true, ..Isolation::default() };
    Topology { devices: devices.into_iter().map(|device| (device.address, device)).collect(), isolation }
}

fn look(address: &str, name: &str) -> GpuLook {
    GpuLook {
        gpu: Gpu { address: pci(address), functions: BTreeSet::from([pci(address)]) },
        name: name.to_owned(),
        state: Ok(GpuState::default()),
    }
}

fn programs() -> Programs {
    Programs {
        qemu: Program::Runs("QEMU 10.0 Debian 1:10.0.2".to_owned()),
        qemu_version: "10.0.2".parse().ok(),
        qemu_img: Program::Runs("qemu-img version 10.0.2".to_owned()),
        passt: Program::Runs("passt 0.0~git20240726".to_owned()),
        nft: Program::Runs("nftables v1.0.6 (Lester Gooch #5)".to_owned()),
        nft_works: Ok(()),
        frpc: Program::Runs("0.68.0".to_owned()),
    }
}

fn agent() -> AgentLook {
    let gpu = |address: &str| AgentGpu {
        address: pci(address),
        state: "free".to_owned(),
        instance: None,
        why: None,
    };
    AgentLook::Answers(AgentView {
        version: "0.1.0".to_owned(),
        instances: 0,
        problems: Vec::new(),
        gpus: vec![gpu(FIRST), gpu(SECOND)],
        control_plane: Some("up".to_owned()),
        tunnel: Some("up".to_owned()),
    })
}

fn processor() -> Processor {
    let cpuinfo = "flags\t: lm pdpe1gb svm\naddress sizes\t: 48 bits physical, 48 bits virtual\n";
    Processor {
        intel: false,
        virtualization: Some("svm"),
        in_a_vm: false,
        threads: 128,
        width: AddressWidth::of_host(cpuinfo).ok(),
    }
}

fn room() -> HostCapacity {
    HostCapacity {
        cpus: 128,
        memory_total: ByteSize::from_gib(1024),
        memory_available: ByteSize::from_gib(1000),
        disk_total: ByteSize::from_gib(4000),
        disk_free: ByteSize::from_gib(3900),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn outside() -> Outside {
    Outside {
        synchronized: Ok(true),
        resolvers: Ok(words(&["192.0.2.53"])),
        names: vec![("internal.qudata.ai".to_owned(), Ok(())), ("agent.ru1.qudata.ai".to_owned(), Ok(()))],
        control_plane: Some(Ok(Answer::Refused(401))),
        frps: Some(Ok(())),
    }
}

/// All is well.
pub(crate) fn host() -> Observed {
    let h100 = "NVIDIA Corporation GH100 [H100 PCIe]";
    let gpus = vec![look(CONSOLE, "ASPEED Graphics Family"), look(FIRST, h100), look(SECOND, h100)];
    Observed {
        settings: settings(&[("QUDATA_API_KEY", "ak-0123456789abcdef0123456789abcdef")]),
        settings_read: SettingsRead::Understood,
        is_root: true,
        processor: Ok(processor()),
        kvm: KvmNode::Open,
        guest_code: Ok(KvmProbe::Usable),
        pci: Ok(Pci { topology: topology(), gpus, own: BTreeSet::new() }),
        firmware_iommu: Ok(Some(Iommu::Amd)),
        kernel: Kernel {
            version: Ok("6.12.41".parse().unwrap()),
            release: "6.12.41-amd64".to_owned(),
            has_vfio_pci: Ok(true),
            lockdown: Ok("none".to_owned()),
            secure_boot: Ok(false),
        },
        programs: programs(),
        files: Files {
            ovmf_code: Ok(true),
            ovmf_vars: Ok(true),
            image: Ok(ImageLook {
                what: "/var/lib/qudata/images/0123456789abcdef/disk.qcow2, qcow2 with a disk of 10G"
                    .to_owned(),
                ..ImageLook::default()
            }),
            has_key: Ok(true),
        },
        capacity: Ok(room()),
        hugepages: Ok(Hugepages::default()),
        memlock: Some(ByteSize::from_mib(8)),
        cgroup: Ok(Cgroup::V2(words(&["cpuset", "cpu", "io", "memory", "pids"]))),
        systemd: Systemd::Booted(SystemdLook {
            version: Ok(252),
            features: "+PAM +AUDIT +SECCOMP -APPARMOR".to_owned(),
            launches: Ok(()),
            unit: Ok(Unit {
                load: "loaded".to_owned(),
                active: "active".to_owned(),
                result: "success".to_owned(),
            }),
        }),
        nss: Ok(Nss { library: true, consulted: true }),
        outside: outside(),
        agent: agent(),
    }
}

/// The bus of a host whose bus was seen.
pub(super) fn bus(host: &mut Observed) -> &mut Pci {
    host.pci.as_mut().unwrap()
}

/// A device of it.
pub(super) fn of<'a>(host: &'a mut Observed, address: &str) -> &'a mut PciDevice {
    bus(host).topology.devices.get_mut(&pci(address)).unwrap()
}

/// Adds a device beside the others.
pub(super) fn add(host: &mut Observed, address: &str, class: u32, group: u32) {
    let device = device(address, class, (0x8086, 0x1533), group);
    bus(host).topology.devices.insert(device.address, device);
}

/// What was seen of the first GPU's own files.
pub(super) fn state(host: &mut Observed) -> &mut GpuState {
    let first = pci(FIRST);
    let look = bus(host).gpus.iter_mut().find(|look| look.gpu.address == first).unwrap();
    look.state.as_mut().unwrap()
}

/// The capacity.
pub(super) fn capacity(host: &mut Observed) -> &mut HostCapacity {
    host.capacity.as_mut().unwrap()
}

/// The agent's view.
pub(super) fn view(host: &mut Observed) -> &mut AgentView {
    match &mut host.agent {
        AgentLook::Answers(view) => view,
        other => panic!("{other:?}"),
    }
}

/// systemd.
pub(super) fn systemd(host: &mut Observed) -> &mut SystemdLook {
    match &mut host.systemd {
        Systemd::Booted(look) => look,
        other => panic!("{other:?}"),
    }
}

/// All groups of no IOMMU.
pub(super) fn without_iommu(host: &mut Observed) {
    bus(host).topology.isolation.interrupt_remapping = false;
    let devices: &mut BTreeMap<PciAddress, PciDevice> = &mut bus(host).topology.devices;
    devices.values_mut().for_each(|device| device.group = None);
}
