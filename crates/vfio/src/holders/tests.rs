use std::{collections::BTreeMap, fs::File, path::Path, sync::mpsc, thread, time::Duration};

use qudata_host::pci::PciAddress;
use qudata_testkit::pci::{Device, FakeHost, FakeProcess};

use super::*;
use crate::topology::{Gpu, Isolation, Topology, observe as observe_topology};

const ONE: &str = "0000:01:00.0";
const TWO: &str = "0000:02:00.0";

fn at(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// Two cards of the NVIDIA driver, the first with audio.
fn host() -> FakeHost {
    let host = FakeHost::with([
        Device::gpu(ONE).group(11),
        Device::audio("0000:01:00.1").group(11),
        Device::gpu(TWO).group(12),
    ])
    .unwrap();
    for (address, card) in [(ONE, 0), (TWO, 1)] {
        host.add_drm(address, card).unwrap();
    }
    host.add_sound_card("0000:01:00.1", 1).unwrap();
    host
}

fn process(host: &FakeHost, pid: u32, name: &str, files: &[&str]) {
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    let cgroup = format!("/system.slice/{name}.service");
    host.add_process(&FakeProcess { pid, name: name.into(), cgroup, files }).unwrap();
}

fn of(host: &FakeHost, address: &str) -> Vec<String> {
    let topology = observe_topology(host.root()).unwrap();
    let gpu = topology.gpu(at(address)).unwrap();
    observe_holders(host.root(), &gpu, &topology).iter().map(ToString::to_string).collect()
}

#[test]
fn nobody_but_the_modules() {
    let host = host();
    host.add_module_user("nvidia", "nvidia_modeset").unwrap();
    host.add_module_user("nvidia_modeset", "nvidia_drm").unwrap();
    process(
        &host,
        7,
        "cron",
        &["/dev/null", "socket:[1]", "/dev/nvidiactl", "/dev/vfio/vfio", "/dev/vfio/99"],
    );
    let modules = ["nvidia", "nvidia_drm", "nvidia_modeset"].map(|module| format!("kernel module {module}"));
    assert_eq!(of(&host, TWO), modules);
    let topology = observe_topology(host.root()).unwrap();
    let holders = observe_holders(host.root(), &topology.gpu(at(ONE)).unwrap(), &topology);
    assert!(holders.contains(&Holder::Module { name: "snd_hda_intel".into() }));
    assert!(holders.iter().all(|holder| !holder.blocks_unbind() && !holder.through_vfio()), "{holders:?}");
}

#[test]
fn processes_by_every_kind_of_node() {
    let host = host();
    process(&host, 21, "Xorg", &["/dev/null", "/dev/dri/card0"]);
    process(&host, 22, "ffmpeg", &["/dev/dri/renderD128", "/dev/dri/renderD128"]);
    process(&host, 23, "pulseaudio", &["/dev/snd/pcmC1D3p", "/dev/snd/controlC0"]);
    process(&host, 24, "qemu", &["/dev/vfio/11", "anon_inode:[vfio-device]"]);
    let ours: Vec<String> =
        of(&host, ONE).into_iter().filter(|holder| !holder.starts_with("kernel")).collect();
    assert_eq!(
        ours,
        [
            "Xorg (pid 21, Xorg.service) through /dev/dri/card0",
            "ffmpeg (pid 22, ffmpeg.service) through /dev/dri/renderD128",
            "pulseaudio (pid 23, pulseaudio.service) through /dev/snd/pcmC1D3p",
            "qemu (pid 24, qemu.service) through /dev/vfio/11",
        ]
    );
    assert_eq!(of(&host, TWO), ["kernel module nvidia"]);
}

#[test]
fn the_newer_door_of_vfio_and_a_device_without_a_name() {
    let host = host();
    host.move_to_driver(ONE, Some("vfio-pci")).unwrap();
    std::fs::create_dir_all(host.device_dir(ONE).join("vfio-dev/vfio0")).unwrap();
    process(&host, 31, "qemu", &["/dev/vfio/devices/vfio0"]);
    process(&host, 32, "handed", &["anon_inode:[vfio-device]"]);
    let holders = of(&host, ONE);
    assert!(
        holders.contains(&"qemu (pid 31, qemu.service) through /dev/vfio/devices/vfio0".into()),
        "{holders:?}"
    );
    assert!(
        holders.contains(&"perhaps handed (pid 32, handed.service) through /dev/vfio".into()),
        "{holders:?}"
    );
    assert_eq!(of(&host, TWO), ["kernel module nvidia"]);
}

/// Which of two cards is `/dev/nvidia0` only the driver knows, and asking it may hang.
#[test]
fn a_holder_of_one_of_two_nvidia_cards_may_hold_either_until_the_driver_was_asked() {
    let host = host();
    process(&host, 41, "train", &["/dev/nvidia0"]);
    let topology = observe_topology(host.root()).unwrap();
    let nodes = OpenNodes::observe(host.root());
    let holds = |address: &str, minors: &BTreeMap<PciAddress, u32>| {
        let holders = nodes.holders_of(&topology.gpu(at(address)).unwrap(), &topology, minors);
        holders.into_iter().find_map(|holder| match holder {
            Holder::Process(process) => Some(process.certain),
            _ => None,
        })
    };
    let table = [
        (BTreeMap::new(), Some(false), Some(false)),
        ([(at(ONE), 0), (at(TWO), 1)].into(), Some(true), None),
        ([(at(ONE), 1), (at(TWO), 0)].into(), None, Some(true)),
        ([(at(TWO), 0)].into(), None, Some(true)),
        ([(at(TWO), 1)].into(), Some(true), None),
    ];
    for (minors, one, two) in table {
        assert_eq!((holds(ONE, &minors), holds(TWO, &minors)), (one, two), "{minors:?}");
    }
    host.move_to_driver(TWO, Some("vfio-pci")).unwrap();
    assert!(of(&host, ONE).contains(&"train (pid 41, train.service) through /dev/nvidia0".into()));
    assert_eq!(of(&host, TWO), ["kernel module vfio_pci"]);
}

#[test]
fn the_driver_is_asked_for_its_minor() {
    let host = host();
    assert_eq!(nvidia_minor(host.root(), at(ONE)).unwrap(), None);
    host.file(format!("proc/driver/nvidia/gpus/{ONE}/information"), "Device Minor: \t 5\n").unwrap();
    assert_eq!(nvidia_minor(host.root(), at(ONE)).unwrap(), Some(5));
}

#[test]
fn framebuffers_and_consoles() {
    let host = FakeHost::with([
        Device::new(ONE).class(0x03_8000).driver("bochs-drm"),
        Device::new(TWO).class(0x03_0000).driver("ast").boot_vga(true),
        Device::new("0000:03:00.0").class(0x03_0200),
    ])
    .unwrap();
    host.add_console(0, "(S) dummy device", true).unwrap();
    host.add_console(1, "(M) frame buffer device", true).unwrap();
    assert_eq!(of(&host, ONE), ["kernel module bochs_drm"], "no framebuffer, so no console");
    host.add_framebuffer(ONE, 1).unwrap();
    process(&host, 51, "fbi", &["/dev/fb1"]);
    assert_eq!(
        of(&host, ONE),
        [
            "fbi (pid 51, fbi.service) through /dev/fb1",
            "framebuffer fb1",
            "console vtcon1",
            "kernel module bochs_drm"
        ]
    );
    host.add_firmware_framebuffer(0).unwrap();
    assert_eq!(of(&host, TWO), ["framebuffer fb0", "console vtcon1", "kernel module ast"]);
    assert_eq!(of(&host, "0000:03:00.0"), Vec::<String>::new());
}

/// Everything that a stuck driver can make hang is a pipe without another end.
#[test]
fn looking_never_hangs() {
    let host = host();
    host.add_framebuffer(ONE, 0).unwrap();
    host.add_console(1, "(M) frame buffer device", true).unwrap();
    process(&host, 61, "train", &["/dev/nvidia0"]);
    host.wedge(ONE).unwrap();
    let lock_takers = [
        "sys/class/vtconsole/vtcon1/bind".into(),
        format!("proc/driver/nvidia/gpus/{ONE}/information"),
        "proc/61/maps".into(),
        "proc/61/cmdline".into(),
        "proc/61/environ".into(),
        "dev/nvidia0".into(),
    ];
    for file in lock_takers {
        host.hang(file).unwrap();
    }
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(of(&host, ONE)));
    let holders = told.recv_timeout(Duration::from_secs(10)).expect("opens a file that hangs");
    assert!(
        holders.contains(&"perhaps train (pid 61, train.service) through /dev/nvidia0".into()),
        "{holders:?}"
    );
}

#[test]
fn a_process_that_ends_meanwhile_holds_nothing_and_a_hostile_name_is_tidied() {
    let host = host();
    std::fs::create_dir_all(host.path("proc/71")).unwrap();
    process(&host, 72, "x", &["/dev/dri/card0"]);
    std::fs::write(host.path("proc/72/comm"), b"\x1b[31mred\xff\n").unwrap();
    std::fs::remove_file(host.path("proc/72/cgroup")).unwrap();
    assert!(of(&host, ONE).contains(&"[31mred\u{fffd} (pid 72) through /dev/dri/card0".into()));
}

#[test]
fn processes_that_cannot_be_looked_at_may_hold_anything() {
    let host = host();
    std::fs::create_dir_all(host.path("proc/81")).unwrap();
    std::fs::write(host.path("proc/81/fd"), "not a directory").unwrap();
    assert!(of(&host, TWO).iter().all(|holder| holder.starts_with("kernel")), "ended while it was looked at");
    let topology = observe_topology(host.root()).unwrap();
    let gpu = topology.gpu(at(TWO)).unwrap();
    std::fs::rename(host.path("proc"), host.path("gone")).unwrap();
    let holders = observe_holders(host.root(), &gpu, &topology);
    let unseen = holders.iter().find(|holder| matches!(holder, Holder::Unseen { .. })).unwrap();
    assert!(unseen.blocks_unbind() && unseen.through_vfio());
    assert!(
        unseen.to_string().starts_with("perhaps a process that cannot be seen (cannot list /proc"),
        "{unseen}"
    );
}

/// On the machine that runs the tests: this process is seen with a node of its own making.
#[test]
fn a_real_process_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("dev/dri/card7");
    std::fs::create_dir_all(node.parent().unwrap()).unwrap();
    let _open = File::create(&node).unwrap();
    let fake = FakeHost::with([Device::gpu(ONE)]).unwrap();
    fake.add_drm(ONE, 7).unwrap();
    // The devices of the fake host, the processes of this machine.
    std::os::unix::fs::symlink(fake.path("sys"), dir.path().join("sys")).unwrap();
    std::os::unix::fs::symlink("/proc", dir.path().join("proc")).unwrap();
    let topology = observe_topology(fake.root()).unwrap();
    let holders = observe_holders(dir.path(), &topology.gpu(at(ONE)).unwrap(), &topology);
    let me = holders.iter().find_map(|holder| match holder {
        Holder::Process(process) if process.pid == std::process::id() => Some(process),
        _ => None,
    });
    assert_eq!(me.expect("this process").node, Path::new("/dev/dri/card7"));
}

#[test]
fn a_gpu_that_is_not_there_is_held_by_nobody() {
    let host = host();
    let nothing = Topology { devices: BTreeMap::new(), isolation: Isolation::default() };
    let gpu = Gpu { address: at(ONE), functions: [at(ONE)].into() };
    assert_eq!(observe_holders(host.root(), &gpu, &nothing), []);
}
