//! What a run brings to its server on a small read-only disk: agent, probe, guest image, unit, fresh keys. Made once per
//! run, shared by all servers of the run. Called by `run`.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use qudata_testkit::ssh::KeyPair;
use qudata_testkit::tool;

use crate::{Files, initramfs};

const DEADLINE: Duration = Duration::from_secs(180);
/// Room beside the files.
const SLACK_MIB: u64 = 64;
/// Folders of the packaging, as they are called in it.
const FOLDERS: [&str; 3] = ["systemd", "sysusers.d", "tmpfiles.d"];
/// Process 1 of the quick guest: see there.
const QUICK_INIT: &str = include_str!("../files/quick-init.sh");

/// What [`make`] leaves beside the kit: the lab's own way into its servers.
pub(crate) const WAY_IN: [&str; 2] = ["id", "known_hosts"];

/// Makes `<dir>/kit.raw`, and beside it the lab's own key `id` and `known_hosts`.
pub(crate) fn make(dir: &Path, files: &Files) -> Result<PathBuf> {
    let kit = dir.join("kit");
    let images = kit.join("images");
    fs::create_dir_all(&images).with_context(|| format!("cannot create {}", images.display()))?;
    place(&files.agent, &kit.join("qudata-agent"), 0o755)?;
    place(&files.probe, &kit.join("qudata-lab-probe"), 0o755)?;
    place(&files.outside, &kit.join("qudata-lab-outside"), 0o755)?;
    systemd_tests(&kit, &files.systemd_tests)?;
    if let Some(dist) = &files.dist {
        release(dist, &kit.join("dist"))?;
    }
    for ending in ["qcow2", "vmlinuz", "initrd", "cmdline"] {
        place(&files.guest_image.with_extension(ending), &images.join(format!("guest.{ending}")), 0o644)?;
    }
    for (program, name) in files.frp.iter().flatten().zip(["frps", "frpc"]) {
        place(program, &kit.join(name), 0o755)?;
    }
    let key = KeyPair::make(dir, "id");
    write(&kit.join("authorized_keys"), &format!("{}\n", key.public), 0o644)?;
    let host = KeyPair::make(&kit, "ssh_host_ed25519_key");
    write(&dir.join("known_hosts"), &format!("lab-host {}\n", host.public), 0o644)?;
    // The tenant's key: `instance create` and `instance ssh` take it from the home of whoever calls them.
    KeyPair::make(&kit, "tenant");
    packaging(&kit, &files.packaging)?;
    quick_guest(&images)?;
    image(dir)
}

/// The tests of real units, with the program that plays the agent where they look for it.
fn systemd_tests(kit: &Path, tests: &Path) -> Result<()> {
    let example = tests.parent().and_then(Path::parent).map(|target| target.join("examples/launch_unit"));
    let example = example.context("the tests lie in no folder of cargo's")?;
    for (from, to) in [(tests, "tests/deps/systemd"), (&example, "tests/examples/launch_unit")] {
        let to = kit.join(to);
        fs::create_dir_all(to.parent().unwrap_or(kit))?;
        place(from, &to, 0o755)?;
    }
    Ok(())
}

/// The files of a release.
fn release(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for file in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let file = file?;
        // Not a folder that a release in the making has there.
        if file.file_type()?.is_file() {
            place(&file.path(), &to.join(file.file_name()), 0o644)?;
        }
    }
    Ok(())
}

/// What the product installs beside its binary: unit, users, directories.
fn packaging(kit: &Path, shipped: &Path) -> Result<()> {
    for folder in FOLDERS {
        let (from, to) = (shipped.join(folder), kit.join("packaging").join(folder));
        fs::create_dir_all(&to).with_context(|| format!("cannot create {}", to.display()))?;
        for file in fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))? {
            let file = file?;
            place(&file.path(), &to.join(file.file_name()), 0o644)?;
        }
    }
    Ok(())
}

/// The same disk and kernel beside an initramfs that starts the lab's process 1.
fn quick_guest(images: &Path) -> Result<()> {
    for ending in ["qcow2", "vmlinuz"] {
        place(&images.join(format!("guest.{ending}")), &images.join(format!("quick.{ending}")), 0o644)?;
    }
    let mut initrd =
        initramfs::archive("lab-init", QUICK_INIT.as_bytes()).context("the init is too large")?;
    let original = images.join("guest.initrd");
    initrd.extend(fs::read(&original).with_context(|| format!("cannot read {}", original.display()))?);
    fs::write(images.join("quick.initrd"), initrd).context("cannot write the quick guest's initramfs")?;
    write(&images.join("quick.cmdline"), "rdinit=/lab-init console=ttyS0 quiet", 0o644)
}

fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    // A link costs nothing; a copy works everywhere.
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn image(dir: &Path) -> Result<PathBuf> {
    let bytes = size(&dir.join("kit"))?;
    let mib = bytes / (1 << 20) * 21 / 20 + SLACK_MIB;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.current_dir(dir).args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", "lab", "-m", "0"]);
    mke2fs.args(["-d", "kit", "-E", "root_owner=0:0", "kit.raw", &format!("{mib}M")]);
    let done = tool::run(&mut mke2fs, DEADLINE).context("cannot run mke2fs")?;
    if !done.status.success() {
        bail!("mke2fs failed: {}", done.stderr.trim());
    }
    fs::remove_dir_all(dir.join("kit")).context("cannot remove the files of the kit")?;
    Ok(dir.join("kit.raw"))
}

fn size(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        sum += if meta.is_dir() { size(&entry.path())? } else { meta.len() };
    }
    Ok(sum)
}
