//! Lays the root directory of the lab's server out as a disk: one ext4 without partitions, started by `-kernel` and
//! `-initrd`, so nothing stands between QEMU and systemd. No loop device, no mount. Called once per build by the parent
//! module.
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::disk;
use crate::tool::{self, say};

const STEM: &str = "host";

/// Room for the disks of several tenants; the file is sparse.
const SIZE: &str = "48G";

/// Turns `<build>/root` into `<build>/host.qcow2` and the files for direct boot beside it.
pub(super) fn build(build: &Path) -> Result<()> {
    say("laying out the disk of the lab's server");
    // One inode per 64 KiB: disk images are few and large. Lazy: the server fills its inode tables as it runs.
    let extended = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0";
    // Root, because only root may read what is 0600 in the new tree.
    tool::run(tool::privileged("mke2fs").current_dir(build).args([
        "-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-i", "65536", "-d", "root", "-E", extended,
        "disk.raw", SIZE,
    ]))?;
    tool::run(Command::new("qemu-img").current_dir(build).args([
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "disk.raw",
        "host.qcow2",
    ]))?;
    fs::remove_file(build.join("disk.raw")).context("cannot remove the raw disk")?;
    disk::copy_kernel(build, STEM)
}
