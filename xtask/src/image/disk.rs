//! Lays the root directory out as a disk a cloud would ship: GPT, an ESP with GRUB, one ext4. No loop device, no mount:
//! every tool writes at its offset inside one sparse file. Called once per build by the parent module.
//!
//! ```text
//! 0      1 MiB        34 MiB                     end - 1 MiB
//! | GPT  | ESP (FAT)  | root (ext4, label root)  | GPT copy
//! ```
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::recipe;
use crate::tool;

const MIB: u64 = 1024 * 1024;
const ESP_START_MIB: u64 = 1;
const ESP_MIB: u64 = 33;
const ROOT_START_MIB: u64 = ESP_START_MIB + ESP_MIB;
/// Room for the guest's first steps even when nobody enlarges the disk.
const SLACK_MIB: u64 = 512;

/// What the two configurations need, that of `update-grub` among them.
const MODULES: &str = "part_gpt ext2 search search_label search_fs_uuid linux normal configfile test echo loadenv gzio \
                       serial terminal regexp all_video";

/// Turns `<build>/root` into `<build>/<stem>.qcow2` and the files for direct boot beside it.
pub(super) fn build(build: &Path, stem: &str) -> Result<()> {
    let root_mib = root_size_mib(build)?;
    lay_out(build, stem, root_mib, &recipe::grub_config())?;
    boot_files(build, stem)
}

/// Turns `<build>/root` into `<build>/<stem>.qcow2`, with a root partition of this size and this configuration in the boot
/// loader.
pub(super) fn lay_out(build: &Path, stem: &str, root_mib: u64, grub_config: &str) -> Result<()> {
    let disk = build.join("disk.raw");
    let total = (ROOT_START_MIB + root_mib + 1) * MIB;
    File::create(&disk).and_then(|file| file.set_len(total)).context("cannot create the raw disk")?;
    partition(build, root_mib)?;
    esp(build, grub_config)?;
    root(build, root_mib)?;
    let qcow2 = format!("{stem}.qcow2");
    tool::run(
        Command::new("qemu-img")
            .current_dir(build)
            .args(["convert", "-f", "raw", "-O", "qcow2", "disk.raw", &qcow2]),
    )?;
    fs::remove_file(&disk).context("cannot remove the raw disk")
}

fn root_size_mib(build: &Path) -> Result<u64> {
    let text = tool::output(tool::privileged("du").current_dir(build).args(["-sm", "root"]))?;
    let used: u64 = text
        .split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("du answered {text:?}"))?;
    Ok(used + used / 5 + SLACK_MIB)
}

fn partition(build: &Path, root_mib: u64) -> Result<()> {
    let table = build.join("partitions");
    let text = format!(
        "label: gpt\nstart={ESP_START_MIB}MiB,size={ESP_MIB}MiB,type=U,name=ESP\nstart={ROOT_START_MIB}MiB,size={root_mib}MiB,type=L,name=root\n"
    );
    fs::write(&table, text).context("cannot write the partition table")?;
    // sfdisk takes its script on stdin only.
    let done = Command::new("sfdisk")
        .current_dir(build)
        .args(["--quiet", "disk.raw"])
        .stdin(File::open(&table)?)
        .output()
        .context("cannot start sfdisk")?;
    if !done.status.success() {
        bail!("sfdisk failed: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(())
}

fn esp(build: &Path, grub_config: &str) -> Result<()> {
    fs::write(build.join("grub.cfg"), grub_config).context("cannot write grub.cfg")?;
    tool::run(Command::new("grub-mkstandalone").current_dir(build).args([
        "--format=x86_64-efi",
        "--output=boot.efi",
        &format!("--modules={MODULES}"),
        &format!("--install-modules={MODULES}"),
        "--locales=",
        "--fonts=",
        "--themes=",
        "boot/grub/grub.cfg=grub.cfg",
    ]))?;
    let sector = (ESP_START_MIB * MIB / 512).to_string();
    let blocks = (ESP_MIB * MIB / 1024).to_string();
    tool::run(
        Command::new("mkfs.vfat")
            .current_dir(build)
            .args(["-F", "32", "-s", "1", "-n", "ESP", "--offset", &sector, "disk.raw", &blocks]),
    )?;
    let drive = format!("disk.raw@@{}", ESP_START_MIB * MIB);
    tool::run(Command::new("mmd").current_dir(build).args(["-i", &drive, "::EFI", "::EFI/BOOT"]))?;
    tool::run(Command::new("mcopy").current_dir(build).args([
        "-i",
        &drive,
        "boot.efi",
        "::EFI/BOOT/BOOTX64.EFI",
    ]))
}

fn root(build: &Path, root_mib: u64) -> Result<()> {
    let offset =
        format!("offset={},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", ROOT_START_MIB * MIB);
    let size = format!("{root_mib}M");
    // Root, because only root may read what is 0600 in the new tree.
    tool::run(tool::privileged("mke2fs").current_dir(build).args([
        "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-d", "root", "-E", &offset, "disk.raw", &size,
    ]))
}

/// The kernel, its initramfs and its command line beside the image, for the firmware setting `direct`.
fn boot_files(build: &Path, stem: &str) -> Result<()> {
    copy_kernel(build, stem)?;
    fs::write(build.join(format!("{stem}.cmdline")), recipe::CMDLINE).context("cannot write the command line")
}

/// Copies the one kernel of `<build>/root` and its initramfs beside the image.
pub(super) fn copy_kernel(build: &Path, stem: &str) -> Result<()> {
    for (prefix, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd")] {
        let dir = build.join("root/boot");
        let mut found = fs::read_dir(&dir)
            .with_context(|| format!("cannot list {}", dir.display()))?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(prefix)));
        let (Some(from), None) = (found.next(), found.next()) else {
            bail!("expected exactly one {prefix}* in the image's /boot");
        };
        let to = build.join(format!("{stem}.{name}"));
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}
