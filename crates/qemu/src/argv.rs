//! Renders a [`Machine`] to QEMU's command line. Pure; called by `vm` at launch. The goldens under `tests/golden`
//! show every line this can produce, and a test starts the real QEMU with each of them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::firmware::Firmware;
use crate::machine::{Accel, CONSOLE_RING, CacheMode, Machine, READY_PORT, id};
use crate::memory::Backing;
use crate::passthrough::PassthroughSlot;

/// The arguments that make QEMU be `machine`. Needs QEMU 7.2 or newer (`-netdev stream`).
///
/// The machine starts stopped (`-S`): it runs after its identity was proven over QMP.
pub fn plan_argv(machine: &Machine) -> Vec<OsString> {
    let mut line = Line::default();
    board(machine, &mut line);
    confinement(&mut line);
    firmware(&machine.firmware, &mut line);
    disk(machine, &mut line);
    seed(machine, &mut line);
    network(machine, &mut line);
    channels(machine, &mut line);
    // Last, so that the other devices have the same addresses with and without GPUs.
    mmio(machine, &mut line);
    for (index, slot) in machine.passthrough.iter().enumerate() {
        gpu(index, slot, &mut line);
    }
    line.0
}

/// Devices a machine gets without being asked are devices nobody looked at: none of them.
fn confinement(line: &mut Line) {
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.option("-display", Value::new("none"));
    line.option(
        "-sandbox",
        Value::new("on")
            .set("obsolete", "deny")
            .set("elevateprivileges", "deny")
            .set("spawn", "deny")
            .set("resourcecontrol", "deny"),
    );
    line.option("-msg", Value::new("timestamp=on"));
    line.flag("-S");
}

fn board(machine: &Machine, line: &mut Line) {
    line.option("-name", Value::new("").set("guest", &machine.name).set("debug-threads", "on"));
    line.option("-uuid", Value::new(&machine.uuid.to_string()));
    let mut board = Value::new("q35").set("accel", machine.accel.to_string());
    // mem-merge off: page sharing between tenants is a side channel. The rest is hardware no image needs.
    for (key, value) in [
        ("usb", "off"),
        ("vmport", "off"),
        ("sata", "off"),
        ("smbus", "off"),
        ("smm", "off"),
        ("hpet", "off"),
        ("graphics", "off"),
        ("mem-merge", "off"),
        ("dump-guest-core", "off"),
    ] {
        board = board.set(key, value);
    }
    if matches!(machine.firmware, Firmware::Uefi { .. }) {
        board = board.set("pflash0", "code").set("pflash1", "vars");
    }
    if machine.backing.backing != Backing::OnDemand {
        board = board.set("memory-backend", id::RAM);
    }
    line.option("-machine", board);
    line.option("-cpu", processor(machine));
    let cpus = machine.cpus.to_string();
    line.option("-smp", Value::new(&cpus).set("sockets", "1").set("cores", &cpus).set("threads", "1"));
    line.option("-m", Value::new("").set("size", ram(machine)));
    backing(machine, line);
    line.option("-rtc", Value::new("base=utc"));
    line.option("-boot", Value::new("strict=on"));
    // A guest that suspends to RAM would never be woken.
    line.option("-global", Value::new("ICH9-LPC.disable_s3=1"));
    line.option("-global", Value::new("ICH9-LPC.disable_s4=1"));
    // Power-off ends QEMU, reboot resets in place, and a panicked kernel may still write its dump and reboot.
    line.option(
        "-action",
        Value::new("").set("reboot", "reset").set("shutdown", "poweroff").set("panic", "none"),
    );
}

fn processor(machine: &Machine) -> Value {
    let bits = machine.mmio.map(|plan| plan.address_bits().to_string());
    match (machine.accel, bits) {
        // A renter's hypervisor inside the guest would reach host code that nobody needs: no nesting.
        (Accel::Kvm, None) => Value::new("host,-vmx,-svm"),
        (Accel::Kvm, Some(bits)) => {
            Value::new("host,-vmx,-svm").set("host-phys-bits", "on").set("host-phys-bits-limit", bits)
        }
        // Whole: with `max,-svm` the emulator of QEMU 7.2 makes mount namespaces fail in the guest (EBUSY, seen with
        // Linux 6.1), so that half of systemd does not start. Emulated SVM is no way to the host's.
        (Accel::Tcg, None) => Value::new("max"),
        (Accel::Tcg, Some(bits)) => Value::new("max").set("phys-bits", bits),
    }
}

fn ram(machine: &Machine) -> String {
    format!("{}M", machine.memory.mib())
}

/// RAM that is filled before the machine starts.
fn backing(machine: &Machine, line: &mut Line) {
    let plan = machine.backing;
    let object = |kind: &str| Value::new(kind).set("id", id::RAM).set("size", ram(machine));
    let (object, policy) = match plan.backing {
        Backing::OnDemand => return,
        // Transparent huge pages are for anonymous memory: a memfd would get small pages.
        Backing::Transparent => (object("memory-backend-ram").set("share", "off"), "preferred"),
        Backing::Reserved(page) => {
            let object = object("memory-backend-memfd").set("share", "on").set("hugetlb", "on");
            (object.set("hugetlbsize", format!("{}M", page.size().mib())), "bind")
        }
    };
    let object = object
        .set("prealloc", "on")
        .set("prealloc-threads", plan.threads(machine.memory).to_string())
        // What the board says of its memory does not hold for memory that it is given.
        .set("merge", "off")
        .set("dump", "off");
    line.option(
        "-object",
        match plan.node {
            Some(node) => object.set("host-nodes", node.to_string()).set("policy", policy),
            None => object,
        },
    );
}

/// Room for the BARs of GPUs.
fn mmio(machine: &Machine, line: &mut Line) {
    let Some(plan) = machine.mmio else { return };
    let hole = format!("{}M", plan.hole().mib());
    line.option("-global", Value::new("").set("q35-pcihost.pci-hole64-size", hole));
    if let Some(window) = plan.ovmf_window() {
        let name = Value::new("").set("name", "opt/ovmf/X-PciMmio64Mb");
        line.option("-fw_cfg", name.set("string", window.mib().to_string()));
    }
}

/// A port with one GPU behind it: drivers expect a PCI Express slot, and a port can be reset on its own.
fn gpu(index: usize, slot: &PassthroughSlot, line: &mut Line) {
    let (name, number) = (format!("gpu{index}"), (index + 1).to_string());
    let port = format!("{name}-port");
    let mut reserve = Value::new("pcie-root-port")
        .set("id", &port)
        .set("bus", "pcie.0")
        .set("chassis", &number)
        .set("slot", &number)
        // Nothing is plugged in later. Ten ports with the usual reserve would use up all I/O addresses.
        .set("io-reserve", "0");
    if slot.high_window().bytes() > 0 {
        reserve = reserve.set("pref64-reserve", slot.high_window().bytes().to_string());
    }
    if let Some(low) = slot.low_reserve() {
        reserve = reserve.set("mem-reserve", low.bytes().to_string());
    }
    line.option("-device", reserve);
    for (position, function) in slot.functions().iter().enumerate() {
        let mut device = Value::new("vfio-pci")
            .set("id", format!("{name}-{position}"))
            .set("host", function.address.to_string())
            .set("bus", &port)
            .set("addr", format!("0.{position}"))
            // A ROM is code of the previous tenant's, if he could write it; computing needs none.
            .set("rombar", "0");
        if position == 0 && slot.functions().len() > 1 {
            device = device.set("multifunction", "on");
        }
        if slot.no_mmap() {
            device = device.set("x-no-mmap", "on");
        }
        line.option("-device", device);
    }
}

fn firmware(firmware: &Firmware, line: &mut Line) {
    match firmware {
        Firmware::Uefi { code, vars } => {
            line.option("-blockdev", file_node("code-file", code).set("read-only", "on"));
            line.option("-blockdev", raw_node("code", "code-file").set("read-only", "on"));
            line.option("-blockdev", file_node("vars-file", vars));
            line.option("-blockdev", raw_node("vars", "vars-file"));
        }
        Firmware::Bios => {}
        Firmware::Direct { kernel, initrd, cmdline } => {
            // QEMU takes these three whole: no option syntax, so no escaping.
            line.pair("-kernel", kernel.as_os_str());
            line.pair("-initrd", initrd.as_os_str());
            line.pair("-append", OsStr::new(cmdline));
        }
    }
}

fn disk(machine: &Machine, line: &mut Line) {
    let (direct, aio) = match machine.disk.cache {
        CacheMode::Direct => ("on", "native"),
        CacheMode::PageCache => ("off", "threads"),
    };
    line.option("-object", Value::new("iothread").set("id", "io"));
    line.option(
        "-blockdev",
        file_node("disk-file", &machine.disk.overlay)
            // Two QEMUs on one disk destroy it; the lock turns that into a refusal.
            .set("locking", "on")
            .set("aio", aio)
            .set("cache.direct", direct)
            .set("discard", "unmap"),
    );
    line.option(
        "-blockdev",
        // The backing file and its format stand in the overlay's header, which this program wrote.
        Value::new("")
            .set("driver", "qcow2")
            .set("node-name", id::DISK)
            .set("file", "disk-file")
            .set("cache.direct", direct)
            .set("discard", "unmap")
            .set("detect-zeroes", "unmap"),
    );
    line.option(
        "-device",
        Value::new("virtio-blk-pci")
            .set("id", "disk0")
            .set("drive", id::DISK)
            .set("iothread", "io")
            .set("bootindex", "1")
            .set("disable-legacy", "on")
            // A full or failing host disk pauses the guest and reports, instead of feeding it I/O errors.
            .set("werror", "stop")
            .set("rerror", "stop"),
    );
}

fn seed(machine: &Machine, line: &mut Line) {
    line.option("-blockdev", file_node("seed-file", &machine.seed).set("read-only", "on"));
    line.option("-blockdev", raw_node("seed", "seed-file").set("read-only", "on"));
    line.option(
        "-device",
        Value::new("virtio-blk-pci").set("id", "seed0").set("drive", "seed").set("disable-legacy", "on"),
    );
}

fn network(machine: &Machine, line: &mut Line) {
    line.option(
        "-netdev",
        Value::new("stream")
            .set("id", id::NETWORK)
            .set("server", "off")
            .set("addr.type", "unix")
            .set("addr.path", &machine.network.socket),
    );
    line.option(
        "-device",
        Value::new("virtio-net-pci")
            .set("id", "net0")
            .set("netdev", id::NETWORK)
            .set("mac", machine.network.mac.to_string())
            .set("disable-legacy", "on")
            // No network boot, so no boot ROM.
            .set("romfile", ""),
    );
}

fn channels(machine: &Machine, line: &mut Line) {
    line.option("-device", Value::new("virtio-rng-pci").set("id", "rng0").set("disable-legacy", "on"));
    line.option(
        "-chardev",
        Value::new("ringbuf").set("id", id::CONSOLE).set("size", CONSOLE_RING.bytes().to_string()),
    );
    line.option("-serial", Value::new("chardev:console"));
    line.option("-chardev", socket_server(id::READY, &machine.ready_socket));
    line.option(
        "-device",
        Value::new("virtio-serial-pci")
            .set("id", "serial0")
            .set("max_ports", "2")
            .set("disable-legacy", "on"),
    );
    line.option(
        "-device",
        Value::new("virtserialport")
            .set("bus", "serial0.0")
            .set("nr", "1")
            .set("chardev", id::READY)
            .set("name", READY_PORT),
    );
    for (name, socket) in [("qmp", &machine.qmp_socket), ("power", &machine.power_socket)] {
        line.option("-chardev", socket_server(name, socket));
        line.option("-mon", Value::new("").set("chardev", name).set("mode", "control"));
    }
}

fn file_node(name: &str, path: &Path) -> Value {
    Value::new("").set("driver", "file").set("node-name", name).set("filename", path)
}

fn raw_node(name: &str, file: &str) -> Value {
    Value::new("").set("driver", "raw").set("node-name", name).set("file", file)
}

fn socket_server(id: &str, path: &Path) -> Value {
    Value::new("socket").set("id", id).set("path", path).set("server", "on").set("wait", "off")
}

/// Arguments in the order they were added.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn pair(&mut self, flag: &str, value: &OsStr) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }

    fn option(&mut self, flag: &str, value: Value) {
        self.0.push(flag.into());
        self.0.push(OsString::from_vec(value.0));
    }
}

/// One argument in QEMU's `first,key=value,key=value` syntax.
struct Value(Vec<u8>);

impl Value {
    /// Starts with words of our own, taken as they are.
    fn new(first: &str) -> Self {
        Self(first.as_bytes().to_vec())
    }

    /// Adds `key=value`; a comma inside the value is doubled, as QEMU wants it.
    fn set(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        if !self.0.is_empty() {
            self.0.push(b',');
        }
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        for &byte in value.as_ref().as_bytes() {
            if byte == b',' {
                self.0.push(b',');
            }
            self.0.push(byte);
        }
        self
    }
}

#[cfg(test)]
mod tests;
