//! Machines with GPUs: their goldens, and real firmware that places their BARs. There is no VFIO where tests run, so a
//! device of QEMU's own with a BAR of the same size takes the place of each function; ports, windows, memory and
//! processors are those of the plan.

use std::collections::BTreeMap;

use qudata_host::pci::PciAddress;

use super::*;
use crate::memory::{Backing, FreePages, HugePage, HugepagePools, MemoryWish, plan_memory};
use crate::mmio::{AddressWidth, plan_mmio};
use crate::passthrough::{MemoryBar, PassthroughFunction};

/// How long firmware may take to place everything; it took 9 s on two busy cores.
const PLACED: Duration = Duration::from_secs(60);

fn bar(size: ByteSize, is_64bit: bool, prefetchable: bool) -> MemoryBar {
    MemoryBar { size, is_64bit, prefetchable }
}

fn function(address: &str, bars: &[MemoryBar]) -> PassthroughFunction {
    PassthroughFunction { address: address.parse().unwrap(), bars: bars.to_vec() }
}

fn slot(functions: Vec<PassthroughFunction>) -> PassthroughSlot {
    PassthroughSlot::new(functions, false).unwrap()
}

/// A card for data centres: one function, everything prefetchable.
fn compute(address: &str) -> PassthroughSlot {
    let bars = [16, 128 << 10, 32].map(|mib| bar(ByteSize::from_mib(mib), true, true));
    slot(vec![function(address, &bars)])
}

/// A card with one BAR of 128 GiB and nothing else.
fn large(bus: u8) -> PassthroughSlot {
    let bars = [bar(ByteSize::from_gib(128), true, true)];
    slot(vec![function(&format!("0000:{bus:02x}:00.0"), &bars)])
}

/// A card for desktops: registers below 4 GiB, a second function that plays sound.
fn desktop(address: &str, sound: &str) -> PassthroughSlot {
    let graphics = [
        bar(ByteSize::from_mib(16), false, false),
        bar(ByteSize::from_gib(32), true, true),
        bar(ByteSize::from_mib(32), true, true),
    ];
    let sound = function(sound, &[bar(ByteSize::from_bytes(16 << 10), false, false)]);
    slot(vec![function(address, &graphics), sound])
}

fn with_gpus(mut machine: Machine, slots: Vec<PassthroughSlot>) -> Machine {
    machine.mmio = plan_mmio(&slots, machine.memory, AddressWidth::EMULATED, &machine.firmware).unwrap();
    machine.passthrough = slots;
    let wish = MemoryWish { ram: machine.memory, passthrough: true, node: None };
    machine.backing = plan_memory(wish, &HugepagePools::default());
    machine
}

/// Every shape that has a golden, by name.
fn shapes(dir: &Path, accel: Accel) -> Vec<(&'static str, Machine)> {
    let gpu = |slots| with_gpus(machine(dir, accel, uefi(dir)), slots);
    let one = || gpu(vec![compute("0000:65:00.0")]);
    let reserved = |page: HugePage, node| {
        let free = FreePages { mib2: 1 << 20, gib1: if page == HugePage::Gib1 { 1 << 10 } else { 0 } };
        let pools = HugepagePools { host: free, nodes: BTreeMap::from([(0, free), (1, free)]) };
        let mut machine = one();
        machine.backing = plan_memory(MemoryWish { ram: machine.memory, passthrough: true, node }, &pools);
        assert_eq!(machine.backing.backing, Backing::Reserved(page));
        machine
    };
    let mut near = one();
    near.backing.node = Some(0);
    let functions = compute("0000:65:00.0").functions().to_vec();
    let unmapped = gpu(vec![PassthroughSlot::new(functions, true).unwrap()]);
    vec![
        ("one", one()),
        ("two", gpu(vec![compute("0000:65:00.0"), compute("10000:01:00.0")])),
        ("functions", gpu(vec![desktop("0000:01:00.0", "0000:01:00.1")])),
        ("direct", with_gpus(machine(dir, accel, direct()), vec![desktop("0000:01:00.0", "0000:01:00.1")])),
        ("eight-large", gpu((1..=8).map(large).collect())),
        ("no-mmap", unmapped),
        ("pages-1g", reserved(HugePage::Gib1, None)),
        ("pages-2m-node", reserved(HugePage::Mib2, Some(0))),
        ("node", near),
    ]
}

#[test]
fn goldens() {
    for (name, machine) in shapes(Path::new("/vm"), Accel::Kvm) {
        let text = lines(&plan_argv(&machine));
        assert_golden(&format!("qemu-gpu-{name}.args"), &text);
        for word in ["balloon", "virtio-mem", "usb-", "vga", "+vmx", "+svm"] {
            assert!(!text.contains(word), "{word} in {name}\n{text}");
        }
    }
}

#[test]
fn the_other_devices_stay_where_they_are() {
    let dir = Path::new("/vm");
    let plain = plan_argv(&machine(dir, Accel::Kvm, uefi(dir)));
    let devices = |argv: &[OsString]| -> Vec<OsString> {
        argv.windows(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
    };
    for (name, machine) in shapes(dir, Accel::Kvm) {
        let argv = plan_argv(&machine);
        assert!(devices(&argv).starts_with(&devices(&plain)), "{name}");
    }
}

/// A function as QEMU's own device: `ivshmem-plain` has one 64-bit prefetchable BAR of any size, and 256 bytes below.
fn stand_in(argv: Vec<OsString>, slots: &[PassthroughSlot]) -> Vec<OsString> {
    let functions: Vec<&PassthroughFunction> = slots.iter().flat_map(PassthroughSlot::functions).collect();
    let mut changed = Vec::new();
    let mut index = 0;
    for argument in argv {
        let text = argument.to_str().unwrap();
        let Some(options) = text.strip_prefix("vfio-pci,") else {
            changed.push(argument);
            continue;
        };
        let function = functions[index];
        let largest = function.bars.iter().map(|bar| bar.size).max().unwrap();
        let kept: Vec<&str> = options
            .split(',')
            .filter(|option| !option.starts_with("host=") && !option.starts_with("x-no-mmap="))
            .collect();
        assert!(text.contains(&format!("host={}", function.address)), "{text}");
        let device = format!("ivshmem-plain,memdev=bar{index},{}", kept.join(","));
        let memory =
            format!("memory-backend-ram,id=bar{index},size={},reserve=off,share=on", largest.bytes());
        // This is the value of a "-device".
        let flag = changed.pop().unwrap();
        changed.extend(["-object".into(), memory.into(), flag, device.into()]);
        index += 1;
    }
    assert_eq!(index, functions.len(), "one device for each function");
    changed
}

/// Where tests run there are no reserved pages. What QEMU does without touching them it does all the same.
fn untouched(argv: Vec<OsString>) -> Vec<OsString> {
    let off = |argument: OsString| {
        let text = argument.to_str().unwrap();
        if text.contains("hugetlb=on") {
            return text.replace("prealloc=on,", "prealloc=off,reserve=off,").into();
        }
        argument
    };
    argv.into_iter().map(off).collect()
}

#[test]
fn real_qemu_takes_every_gpu_line() {
    for (name, mut machine) in shapes(Path::new("/vm"), Accel::Tcg) {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let place = dir.path().canonicalize().unwrap();
        let _passt = populate(&place);
        let uefi_wanted = matches!(machine.firmware, Firmware::Uefi { .. });
        let firmware = if uefi_wanted { uefi(&place) } else { boot_files(&place) };
        let filled = machine.backing.backing == Backing::Transparent;
        machine = Machine {
            // A page of 1 GiB is the least that reserved memory can have.
            memory: if filled { ByteSize::from_mib(256) } else { ByteSize::from_gib(1) },
            cpus: 2,
            backing: machine.backing,
            passthrough: machine.passthrough,
            mmio: machine.mmio,
            ..super::machine(&place, Accel::Tcg, firmware)
        };
        let argv = untouched(stand_in(plan_argv(&machine), &machine.passthrough));
        let (mut qemu, stream) = start(argv, &machine.qmp_socket);
        let memory = ask(&stream, "query-memdev")["return"].clone();
        let ram = memory.as_array().unwrap().iter().find(|device| device["id"] == "ram").unwrap();
        assert_eq!(ram["size"], machine.memory.bytes(), "{name}");
        assert_eq!(
            ram["host-nodes"].as_array().map(Vec::len),
            Some(usize::from(machine.backing.node.is_some()))
        );
        ask(&stream, "quit");
        assert!(qemu.0.wait().unwrap().success(), "{name}");
    }
}

/// Options of `vfio-pci` that the stand-in does not have.
#[test]
fn real_qemu_knows_the_options_of_vfio() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let place = dir.path().canonicalize().unwrap();
    let _passt = populate(&place);
    let slot = PassthroughSlot::new(compute("ffff:ff:1f.7").functions().to_vec(), true).unwrap();
    let mut machine = machine(&place, Accel::Tcg, uefi(&place));
    machine.memory = ByteSize::from_mib(64);
    let argv = plan_argv(&with_gpus(machine, vec![slot]));
    let output = Command::new("qemu-system-x86_64").args(argv).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    // It got as far as looking for the device, and its complaint is the only one.
    assert!(said.contains("ffff:ff:1f.7: no such host device"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
}

/// The memory BARs of all devices, as `query-pci` tells them: size, and the address where they have one.
fn memory_bars(buses: &serde_json::Value, found: &mut Vec<(u64, Option<u64>)>) {
    for device in buses.as_array().into_iter().flatten() {
        for region in device["regions"].as_array().into_iter().flatten() {
            if region["type"] == "memory" {
                found.push((region["size"].as_u64().unwrap(), region["address"].as_u64()));
            }
        }
        memory_bars(&device["pci_bridge"]["devices"], found);
    }
}

/// Lets real firmware run on the planned machine and sees every BAR of every device placed where it can be reached.
fn firmware_places(name: &str, slots: Vec<PassthroughSlot>, firmware: impl FnOnce(&Path) -> Firmware) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let place = dir.path().canonicalize().unwrap();
    let _passt = populate(&place);
    let mut machine = machine(&place, Accel::Tcg, firmware(&place));
    machine.memory = ByteSize::from_gib(3);
    machine.cpus = 1;
    let mut machine = with_gpus(machine, slots);
    // What is not touched costs nothing.
    machine.backing = MemoryPlan::default();
    let argv = stand_in(plan_argv(&machine), &machine.passthrough);
    let (_qemu, stream) = start(argv, &machine.qmp_socket);
    ask(&stream, "cont");
    let begun = Instant::now();
    let mut placed: Vec<(u64, u64)> = loop {
        let mut bars = Vec::new();
        for bus in ask(&stream, "query-pci")["return"].as_array().unwrap() {
            memory_bars(&bus["devices"], &mut bars);
        }
        let large = bars.iter().filter(|(size, _)| *size >= 1 << 30).count();
        let all: Option<_> = bars.iter().map(|(size, address)| Some(((*address)?, *size))).collect();
        if let Some(all) = all {
            let wanted = machine.passthrough.iter().filter(|slot| slot.high_window().gib() > 0).count();
            assert_eq!(large, wanted, "{name}: one large BAR for each GPU");
            break all;
        }
        assert!(begun.elapsed() < PLACED, "{name}: firmware left BARs without an address: {bars:x?}");
        std::thread::sleep(Duration::from_millis(200));
    };
    placed.sort_unstable();
    println!("{name}: placed after {:?}: {placed:x?}", begun.elapsed());
    let end = 1_u64 << machine.mmio.unwrap().address_bits();
    for (address, size) in &placed {
        assert_eq!(address % size, 0, "{name}: {address:x} is not aligned");
        assert!(address + size <= end, "{name}: {address:x} is out of reach");
        assert!(*size < 1 << 30 || *address >= 5 << 30, "{name}: {address:x} is in RAM");
    }
    for pair in placed.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{name}: {pair:x?} overlap");
    }
}

#[test]
fn real_ovmf_places_one_large_bar() {
    firmware_places("one", vec![large(1)], uefi);
}

#[test]
fn real_ovmf_places_two_large_bars() {
    firmware_places("two", vec![large(1), large(2)], uefi);
}

/// Small BARs beside the large ones, a window that keeps clear of HyperTransport, two functions in one slot.
#[test]
fn real_ovmf_places_cards_of_every_kind() {
    let desktop = desktop("0000:01:00.0", "0000:01:00.1");
    firmware_places("three cards", vec![compute("0000:65:00.0"), desktop, compute("0000:66:00.0")], uefi);
}

/// SeaBIOS is told nothing and starts kernels that are given directly, too.
#[test]
fn real_seabios_places_cards_of_every_kind() {
    let mut slots: Vec<PassthroughSlot> =
        (1..=8).map(|bus| compute(&format!("0000:{bus:02x}:00.0"))).collect();
    slots.push(desktop("0000:65:00.0", "0000:65:00.1"));
    firmware_places("nine without UEFI", slots, |_| Firmware::Bios);
}

#[test]
fn addresses_are_those_of_the_host() {
    let line = lines(&plan_argv(&with_gpus(
        machine(Path::new("/vm"), Accel::Kvm, Firmware::Bios),
        vec![desktop("10000:e1:00.0", "10000:e1:00.1")],
    )));
    let address: PciAddress = "10000:e1:00.1".parse().unwrap();
    assert!(line.contains(&format!("vfio-pci,id=gpu0-1,host={address},bus=gpu0-port,addr=0.1")), "{line}");
}
