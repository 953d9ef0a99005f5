//! Lays out a server as its owner has it before the product is installed: UEFI, GRUB, a configuration that `update-grub`
//! made on the disk itself, no package of ours. Called once per build by the parent module.
//!
//! `update-grub` asks grub-probe, and that asks the running system about its root: so the disk is started once in
//! emulation, with a process 1 that does nothing else.
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use qudata_testkit::tool as runner;

use super::{disk, recipe};
use crate::deps;
use crate::tool::{self, say};

const STEM: &str = "fresh";
/// Room for packages, base images and tenants' disks; the file is sparse.
const ROOT_MIB: u64 = 40 * 1024;
/// A busy machine needs a minute.
const FIRST_BOOT: Duration = Duration::from_secs(300);
/// What the boot says when all of it went well.
const WORD: &str = "first-boot: done";

/// Turns `<build>/root` into `<build>/fresh.qcow2`.
pub(super) fn build(build: &Path) -> Result<()> {
    deps::ensure(&[deps::LAB])?;
    say("laying out the disk of a fresh server");
    disk::copy_kernel(build, STEM)?;
    disk::lay_out(build, STEM, ROOT_MIB, recipe::FRESH_GRUB)?;
    say("starting it once, for its boot loader's configuration");
    first_boot(build)
}

fn first_boot(build: &Path) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.current_dir(build).args(["-accel", "tcg", "-M", "q35", "-m", "1024", "-nodefaults", "-no-reboot"]);
    qemu.args(["-display", "none", "-serial", "file:console.log", "-kernel", "fresh.vmlinuz"]);
    qemu.args(["-initrd", "fresh.initrd", "-append"]);
    qemu.arg("root=LABEL=root rw console=ttyS0 quiet no_timer_check init=/var/tmp/first-boot.sh");
    qemu.args(["-drive", "file=fresh.qcow2,format=qcow2,if=virtio"]);
    let done = runner::run(&mut qemu, FIRST_BOOT).context("the fresh server does not end its first boot")?;
    let console = fs::read(build.join("console.log")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    if !done.status.success() || !console.contains(WORD) {
        let lines: Vec<&str> = console.lines().rev().take(20).collect();
        let last: Vec<&str> = lines.into_iter().rev().collect();
        bail!("update-grub failed on the fresh server: {} {}", done.stderr.trim(), last.join("\n  "));
    }
    tool::run(Command::new("qemu-img").current_dir(build).args(["check", "-q", "fresh.qcow2"]))
}
