use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use qudata_host::size::ByteSize;
use uuid::Uuid;

use super::*;
use crate::golden::{assert_golden, lines};
use crate::machine::{Disk, MacAddress, NetworkDevice};
use crate::memory::MemoryPlan;

mod gpu;

const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

fn uefi(dir: &Path) -> Firmware {
    Firmware::Uefi { code: OVMF_CODE.into(), vars: dir.join("uefi-vars.fd") }
}

fn direct() -> Firmware {
    Firmware::Direct {
        kernel: "/images/base.vmlinuz".into(),
        initrd: "/images/base.initrd".into(),
        cmdline: "root=LABEL=root ro console=ttyS0,115200 quiet".into(),
    }
}

fn machine(dir: &Path, accel: Accel, firmware: Firmware) -> Machine {
    let uuid = Uuid::parse_str("0190a5b0-7e1c-7abc-8def-0123456789ab").unwrap();
    Machine {
        uuid,
        name: "training".into(),
        accel,
        cpus: 8,
        memory: ByteSize::from_gib(32),
        backing: MemoryPlan::default(),
        firmware,
        disk: Disk { overlay: dir.join("disk.qcow2"), cache: CacheMode::Direct },
        seed: dir.join("seed.iso"),
        network: NetworkDevice { socket: dir.join("net/passt.sock"), mac: MacAddress::of(uuid) },
        passthrough: Vec::new(),
        mmio: None,
        qmp_socket: dir.join("qmp.sock"),
        ready_socket: dir.join("ready.sock"),
        power_socket: dir.join("power.sock"),
    }
}

#[test]
fn goldens() {
    let dir = Path::new("/vm");
    for (accel, accel_name) in [(Accel::Kvm, "kvm"), (Accel::Tcg, "tcg")] {
        for (firmware, name) in [(uefi(dir), "uefi"), (Firmware::Bios, "bios"), (direct(), "direct")] {
            let argv = plan_argv(&machine(dir, accel, firmware));
            assert_golden(&format!("qemu-{name}-{accel_name}.args"), &lines(&argv));
        }
    }
    let mut tmpfs = machine(Path::new("/vm,name=x"), Accel::Kvm, uefi(Path::new("/vm,name=x")));
    tmpfs.disk.cache = CacheMode::PageCache;
    tmpfs.name = "a,debug-threads=off b".into();
    assert_golden("qemu-page-cache-commas.args", &lines(&plan_argv(&tmpfs)));
}

proptest! {
    /// Splits as QEMU does: a value ends at a comma that is not doubled.
    #[test]
    fn a_value_cannot_add_a_key(name in "\\PC{0,40}") {
        let value = Value::new("").set("guest", &name).set("debug-threads", "on");
        let text = String::from_utf8(value.0).unwrap();
        let parts: Vec<String> =
            text.replace(",,", "\u{1}").split(',').map(|part| part.replace('\u{1}', ",")).collect();
        // A trailing comma of the name and the separator make three in a row: QEMU pairs from the left, as replace does.
        prop_assert_eq!(parts, vec![format!("guest={name}"), "debug-threads=on".to_owned()]);
    }
}

#[test]
fn forbidden_hardware_is_on_no_line() {
    let dir = Path::new("/vm");
    for firmware in [uefi(dir), Firmware::Bios, direct()] {
        let text = lines(&plan_argv(&machine(dir, Accel::Kvm, firmware)));
        for word in
            ["-netdev user", "usb-", "vga", "balloon", "spice", "vnc", "-daemonize", "cache.no-flush=on"]
        {
            assert!(!text.contains(word), "{word} in\n{text}");
        }
    }
}

/// A QEMU that this test started and ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Files that every line refers to; the listener stands in for passt.
fn populate(dir: &Path) -> UnixListener {
    let base = dir.join("base.img");
    fs::write(&base, vec![0; 1 << 20]).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o", "extended_l2=on,cluster_size=128k", "-b"])
        .args([base.as_path(), &dir.join("disk.qcow2")])
        .arg("64M")
        .status();
    assert!(made.unwrap().success());
    fs::write(dir.join("seed.iso"), vec![0; 64 << 10]).unwrap();
    fs::copy(OVMF_VARS, dir.join("uefi-vars.fd")).unwrap();
    fs::create_dir(dir.join("net")).unwrap();
    UnixListener::bind(dir.join("net/passt.sock")).unwrap()
}

fn connect(qemu: &mut Running, socket: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            return stream;
        }
        if let Some(status) = qemu.0.try_wait().unwrap() {
            let mut said = String::new();
            std::io::Read::read_to_string(qemu.0.stderr.as_mut().unwrap(), &mut said).unwrap();
            panic!("QEMU refused its line ({status}): {said}");
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "QEMU opened no QMP socket");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Starts the real QEMU and opens its QMP.
fn start(argv: Vec<OsString>, qmp: &Path) -> (Running, UnixStream) {
    let child = Command::new("qemu-system-x86_64")
        .args(argv)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut qemu = Running(child);
    let stream = connect(&mut qemu, qmp);
    let mut greeting = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("\"QMP\""), "{greeting}");
    ask(&stream, "qmp_capabilities");
    (qemu, stream)
}

/// Sends one command and returns the answer, passing over events.
fn ask(stream: &UnixStream, command: &str) -> serde_json::Value {
    let mut write = stream;
    writeln!(write, "{{\"execute\":\"{command}\"}}").unwrap();
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        assert_ne!(reader.read_line(&mut line).unwrap(), 0, "QEMU closed QMP at {command}");
        let answer: serde_json::Value = serde_json::from_str(&line).unwrap();
        if answer.get("return").is_some() || answer.get("error").is_some() {
            return answer;
        }
    }
}

/// Starts the real QEMU with the rendered line, sees it wait for `cont`, and ends it.
fn starts_stopped(firmware: impl FnOnce(&Path) -> Firmware, cache: CacheMode) {
    // Direct I/O needs a disk file system; /tmp may be in memory.
    let dir = tempfile::Builder::new().prefix("a,b c").tempdir_in("/var/tmp").unwrap();
    let dir_path = dir.path().canonicalize().unwrap();
    let passt = populate(&dir_path);
    let mut machine = machine(&dir_path, Accel::Tcg, firmware(&dir_path));
    machine.memory = ByteSize::from_mib(256);
    machine.cpus = 2;
    machine.disk.cache = cache;
    let (mut qemu, stream) = start(plan_argv(&machine), &machine.qmp_socket);
    assert_eq!(ask(&stream, "query-status")["return"]["status"], "prelaunch");
    assert_eq!(ask(&stream, "query-uuid")["return"]["UUID"], machine.uuid.to_string());
    assert_eq!(ask(&stream, "query-name")["return"]["name"], machine.name);
    let chardevs = ask(&stream, "query-chardev")["return"].to_string();
    assert!(chardevs.contains("\"ringbuf\"") && chardevs.contains("\"ready\""), "{chardevs}");
    let blocks = ask(&stream, "query-named-block-nodes")["return"].to_string();
    assert!(blocks.contains("base.img"), "the overlay's backing file is open: {blocks}");
    passt.set_nonblocking(true).unwrap();
    assert!(passt.accept().is_ok(), "QEMU connected to its network socket");
    ask(&stream, "quit");
    assert!(qemu.0.wait().unwrap().success());
}

#[test]
fn real_qemu_takes_the_uefi_line() {
    starts_stopped(uefi, CacheMode::Direct);
}

#[test]
fn real_qemu_takes_the_bios_line() {
    starts_stopped(|_| Firmware::Bios, CacheMode::PageCache);
}

#[test]
fn real_qemu_takes_the_direct_line() {
    starts_stopped(boot_files, CacheMode::Direct);
}

/// Before `cont` a kernel is only loaded, so a well-formed header is all that is needed of one.
fn boot_files(dir: &Path) -> Firmware {
    let (kernel, initrd): (PathBuf, PathBuf) = (dir.join("k,1.vmlinuz"), dir.join("k,1.initrd"));
    fs::write(&kernel, kernel_header()).unwrap();
    fs::write(&initrd, b"initrd").unwrap();
    Firmware::Direct { kernel, initrd, cmdline: "root=LABEL=root console=ttyS0,115200 quiet".into() }
}

/// The fields of the Linux boot protocol (version 2.6) that QEMU reads, and nothing to run.
fn kernel_header() -> Vec<u8> {
    let mut image = vec![0; 16 << 10];
    image[0x1f1] = 4; // setup sectors
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x0206_u16.to_le_bytes());
    image[0x211] = 1; // loaded high
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes()); // highest initrd address
    image[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes()); // longest command line
    image
}
