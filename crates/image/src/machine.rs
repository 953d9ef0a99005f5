//! The machine that customises an image, rendered to QEMU's command line. Pure; called by `boot`. It is no instance: it
//! runs once, for minutes, nothing of a tenant's runs in it, and the disk is thrown away unless everything succeeded.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use qudata_host::size::ByteSize;
use qudata_qemu::{firmware::Firmware, machine::Accel};

/// Name of the port through which the script reports.
pub(crate) const REPORT_PORT: &str = "ru.qudata.image";
/// Name of the port through which it logs. Not the serial line: scripts that write to an emulated one can stall.
pub(crate) const LOG_PORT: &str = "ru.qudata.log";
/// Address of its network interface.
pub(crate) const MAC: &str = "52:54:00:71:75:64";

/// Everything that QEMU is told.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) accel: Accel,
    pub(crate) firmware: &'a Firmware,
    pub(crate) cpus: u32,
    pub(crate) memory: ByteSize,
    /// qcow2 over the source.
    pub(crate) disk: &'a Path,
    pub(crate) seed: &'a Path,
    pub(crate) pipes: &'a Pipes,
}

/// Pipes that QEMU writes to.
#[derive(Debug)]
pub(crate) struct Pipes {
    pub(crate) console: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) report: PathBuf,
}

/// The arguments.
pub(crate) fn plan_argv(machine: &Machine<'_>) -> Vec<OsString> {
    let mut line = Line(Vec::new());
    line.add("-name", "qudata-image");
    let accel = match machine.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    };
    let flash = match machine.firmware {
        Firmware::Uefi { .. } => ",pflash0=code,pflash1=vars",
        Firmware::Bios | Firmware::Direct { .. } => "",
    };
    line.add("-machine", format!("q35,accel={accel},usb=off,vmport=off,graphics=off{flash}"));
    line.add("-cpu", if machine.accel == Accel::Kvm { "host,-vmx,-svm" } else { "max" });
    line.add("-smp", machine.cpus.to_string());
    line.add("-m", format!("{}M", machine.memory.mib()));
    line.0.extend(["-nodefaults".into(), "-no-user-config".into()]);
    line.add("-display", "none");
    line.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // A reset starts it again, as firmware does at its first boot; only a power-off ends QEMU.
    line.add("-action", "reboot=reset,shutdown=poweroff");
    firmware(machine.firmware, &mut line);
    disks(machine, &mut line);
    // QEMU's own network stack, and not passt behind the tenants' policy: the mirror that it must reach may well be on the
    // owner's own network, where tenants must never get. So whatever runs here reaches that network too. That is no tenant's
    // code, but not all of it is signed by a distribution either: with --jupyter it is what PyPI serves, and with --from FILE
    // or a digest whatever the owner has found good.
    line.add("-netdev", "user,id=net,ipv6=off");
    line.add("-device", format!("virtio-net-pci,netdev=net,mac={MAC},romfile="));
    line.add("-device", "virtio-rng-pci");
    line.chardev("console", &machine.pipes.console);
    line.add("-serial", "chardev:console");
    line.add("-device", "virtio-serial-pci,id=ports,max_ports=3");
    for (number, id, path, name) in
        [(1, "report", &machine.pipes.report, REPORT_PORT), (2, "log", &machine.pipes.log, LOG_PORT)]
    {
        line.chardev(id, path);
        line.add("-device", format!("virtserialport,bus=ports.0,nr={number},chardev={id},name={name}"));
    }
    line.0
}

fn firmware(firmware: &Firmware, line: &mut Line) {
    match firmware {
        Firmware::Uefi { code, vars } => {
            line.node("driver=raw,node-name=code,read-only=on,file.driver=file,file.filename", code, "");
            line.node("driver=raw,node-name=vars,file.driver=file,file.filename", vars, "");
        }
        Firmware::Bios => {}
        Firmware::Direct { kernel, initrd, cmdline } => {
            line.add("-kernel", kernel);
            line.add("-initrd", initrd);
            line.add("-append", cmdline);
        }
    }
}

fn disks(machine: &Machine<'_>, line: &mut Line) {
    // Whatever is not written when the host loses power is thrown away as a whole: no flush is worth waiting for.
    let quick = ",cache.no-flush=on,discard=unmap,detect-zeroes=unmap";
    let disk = "driver=qcow2,node-name=disk,file.driver=file,file.discard=unmap,file.filename";
    line.node(disk, machine.disk, quick);
    // A full host disk is an error inside, so that the work ends; waiting for room would be a machine that hangs.
    line.add("-device", "virtio-blk-pci,drive=disk,bootindex=1,werror=report,rerror=report");
    line.node("driver=raw,node-name=seed,read-only=on,file.driver=file,file.filename", machine.seed, "");
    line.add("-device", "virtio-blk-pci,drive=seed");
}

struct Line(Vec<OsString>);

impl Line {
    fn add(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.extend([flag.into(), value.into()]);
    }

    /// A block node; a comma in the path is doubled, as QEMU wants it.
    fn node(&mut self, head: &str, path: &Path, tail: &str) {
        self.add("-blockdev", joined(head, path, tail));
    }

    fn chardev(&mut self, id: &str, path: &Path) {
        self.add("-chardev", joined(&format!("file,id={id},path"), path, ""));
    }
}

fn joined(head: &str, path: &Path, tail: &str) -> OsString {
    let mut value = format!("{head}=").into_bytes();
    for byte in path.as_os_str().as_bytes() {
        if *byte == b',' {
            value.push(b',');
        }
        value.push(*byte);
    }
    value.extend_from_slice(tail.as_bytes());
    OsString::from_vec(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(accel: Accel, firmware: &Firmware) -> String {
        let pipes = Pipes { console: "/w/console".into(), log: "/w/log".into(), report: "/w/report".into() };
        let machine = Machine {
            accel,
            firmware,
            cpus: 4,
            memory: ByteSize::from_gib(2),
            disk: "/w/a,b.qcow2".as_ref(),
            seed: "/w/seed.iso".as_ref(),
            pipes: &pipes,
        };
        let words = plan_argv(&machine);
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        words.join("\n").replace("\n-", "\n\n-")
    }

    #[test]
    fn command_lines() {
        let uefi = Firmware::Uefi { code: "/f/code.fd".into(), vars: "/w/vars.fd".into() };
        insta::assert_snapshot!("uefi_kvm", argv(Accel::Kvm, &uefi));
        let direct = Firmware::Direct {
            kernel: "/i/disk.vmlinuz".into(),
            initrd: "/i/disk.initrd".into(),
            cmdline: "root=/dev/vda1 console=ttyS0".into(),
        };
        let (bios, direct) = (argv(Accel::Tcg, &Firmware::Bios), argv(Accel::Tcg, &direct));
        assert!(!bios.contains("pflash") && !bios.contains("-kernel") && bios.contains("accel=tcg"));
        assert!(direct.contains("-append\nroot=/dev/vda1 console=ttyS0\n"), "{direct}");
    }
}
