//! `cargo xtask image`: the development guest image, built once per recipe and kept in the cache; and the lab's GPU
//! server, built the same way. Called by main, and by test, demo and lab, which need their paths.
//!
//! ```text
//! <cache>/images/.lock                    one builder at a time
//! <cache>/images/.build-<hash>-<pid>/     work in progress; left by a crash, removed by the next builder
//! <cache>/images/<hash>/guest.qcow2       published by rename, with .vmlinuz .initrd .cmdline and blank.qcow2 beside it
//! <cache>/images/<hash>/host.qcow2        the same for the lab's server, with .vmlinuz .initrd beside it
//! <cache>/images/<hash>/fresh.qcow2       a server before the product is installed; boots by UEFI and its own GRUB
//! ```
pub(crate) mod cache;
mod disk;
mod fresh;
mod host;
mod recipe;
mod rootfs;
mod sources;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use self::recipe::Recipe;
use crate::deps;
use crate::tool::{self, say};

/// File name of the image without its ending; the agent looks for the kernel under the same stem.
const STEM: &str = "guest";

/// What the cache holds for this recipe.
#[derive(Debug)]
pub(crate) struct Images {
    /// Boots to sshd.
    pub guest: PathBuf,
    /// An empty disk, for tests that need a VM and no guest.
    pub blank: PathBuf,
}

/// Builds what is missing and returns where it lies.
pub(crate) fn ensure() -> Result<Images> {
    let home = built(&Build {
        name: "guest image",
        recipe: &recipe::GUEST,
        results: &["guest.qcow2", "guest.vmlinuz", "guest.initrd", "guest.cmdline", "blank.qcow2"],
        lay_out: guest_contents,
    })?;
    Ok(Images { guest: home.join(format!("{STEM}.qcow2")), blank: home.join("blank.qcow2") })
}

/// The disk of the lab's GPU server, with `.vmlinuz` and `.initrd` beside it.
pub(crate) fn ensure_host() -> Result<PathBuf> {
    let home = built(&Build {
        name: "image of the lab's server",
        recipe: &recipe::HOST,
        results: &["host.qcow2", "host.vmlinuz", "host.initrd"],
        lay_out: host::build,
    })?;
    Ok(home.join("host.qcow2"))
}

/// The disk of a server before the product is installed.
pub(crate) fn ensure_fresh() -> Result<PathBuf> {
    let home = built(&Build {
        name: "image of a fresh server",
        recipe: &recipe::FRESH,
        results: &["fresh.qcow2"],
        lay_out: fresh::build,
    })?;
    Ok(home.join("fresh.qcow2"))
}

/// One kind of image.
struct Build {
    name: &'static str,
    recipe: &'static Recipe,
    /// File names that are kept.
    results: &'static [&'static str],
    /// Makes the results from `<build>/root`.
    lay_out: fn(&Path) -> Result<()>,
}

/// The directory of the cache that holds this image, built first if it is missing.
fn built(build: &Build) -> Result<PathBuf> {
    let release = sources::release()?;
    let hash = build.recipe.hash(&release);
    let images = cache::open("images")?;
    let home = images.join(&hash);
    if !home.exists() {
        // Not needed once the image exists, so an offline machine with a filled cache works.
        deps::ensure(&[deps::IMAGE])?;
        let lock = cache::lock(&images)?;
        if !home.exists() {
            cache::sweep(&images)?;
            let work = images.join(format!("{}{hash}-{}", cache::BUILD_PREFIX, std::process::id()));
            make(build, &work, &home, &release)?;
        }
        drop(lock);
    }
    Ok(home)
}

fn make(build: &Build, work: &Path, home: &Path, release: &str) -> Result<()> {
    let started = Instant::now();
    let name = build.name;
    say(format!("building the {name} from Debian {release} packages (a few minutes, once)"));
    fs::create_dir(work).with_context(|| format!("cannot create {}", work.display()))?;
    let built = rootfs::build(work, release, build.recipe)
        .and_then(|()| (build.lay_out)(work))
        .and_then(|()| publish(build.results, work, home));
    cache::remove(work)?;
    built?;
    say(format!("{name} ready after {} s", started.elapsed().as_secs()));
    Ok(())
}

fn guest_contents(work: &Path) -> Result<()> {
    say("laying out the disk");
    disk::build(work, STEM)?;
    tool::run(Command::new("qemu-img").current_dir(work).args([
        "create",
        "-q",
        "-f",
        "qcow2",
        "blank.qcow2",
        "64M",
    ]))
}

/// Moves the results, and nothing else, to their final name in one step.
fn publish(results: &[&str], work: &Path, home: &Path) -> Result<()> {
    let ready = work.join("ready");
    fs::create_dir(&ready).context("cannot create the directory to publish")?;
    fs::set_permissions(&ready, fs::Permissions::from_mode(0o755))?;
    for name in results {
        let to = ready.join(name);
        fs::rename(work.join(name), &to).with_context(|| format!("the build left no {name}"))?;
        // QEMU reads them under a uid of its own, and nobody writes them again.
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
        fs::File::open(&to)
            .and_then(|file| file.sync_all())
            .with_context(|| format!("cannot sync {name}"))?;
    }
    fs::rename(&ready, home).with_context(|| format!("cannot publish {}", home.display()))
}
