//! Where built things live, who may build, and what a crashed build of an image left. Called by the parent module, and by
//! `frp` for what it makes.
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::tool::{self, say};

/// Names of builds in progress; a published image is named by its hash alone.
pub(super) const BUILD_PREFIX: &str = ".build-";

/// QEMU runs under a uid of its own and must get here, so the place is not under anybody's home.
const DEFAULT: &str = "/var/cache/qudata";

/// The directory for one kind of things, created on first use and reachable by every uid.
pub(crate) fn open(kind: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("QUDATA_CACHE_DIR") {
        Some(root) if !Path::new(&root).is_absolute() => {
            bail!("QUDATA_CACHE_DIR is {root:?}; it must be an absolute path")
        }
        Some(root) => PathBuf::from(root).join(kind),
        None => PathBuf::from(DEFAULT).join(kind),
    };
    if !dir.exists() {
        let user = rustix::process::geteuid().as_raw().to_string();
        let group = rustix::process::getegid().as_raw().to_string();
        tool::run(
            tool::privileged("install")
                .args(["--directory", "--mode=0755", "--owner", &user, "--group", &group])
                .arg(&dir),
        )
        .with_context(|| {
            format!("cannot create {}; set QUDATA_CACHE_DIR to a directory you own", dir.display())
        })?;
    }
    reachable(&dir)?;
    Ok(dir)
}

fn reachable(dir: &Path) -> Result<()> {
    for ancestor in dir.ancestors() {
        let mode = fs::metadata(ancestor)
            .with_context(|| format!("cannot read {}", ancestor.display()))?
            .permissions()
            .mode();
        if mode & 0o001 == 0 {
            bail!(
                "{} is closed to other users, and QEMU and frpc run as such; set QUDATA_CACHE_DIR to a directory every user can enter",
                ancestor.display()
            );
        }
    }
    Ok(())
}

/// Waits until this process is the only builder; given up when the value is dropped or the process ends.
pub(crate) fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        say("another build is running; waiting for it");
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(file)
}

/// Removes what crashed builds left. Only under the lock: then no build is alive.
pub(super) fn sweep(images: &Path) -> Result<()> {
    for entry in fs::read_dir(images).with_context(|| format!("cannot list {}", images.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(BUILD_PREFIX)) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a build directory, most of which belongs to root.
pub(super) fn remove(work: &Path) -> Result<()> {
    // --one-file-system: a mount that a killed mmdebstrap left inside must not be emptied.
    tool::run(tool::privileged("rm").args(["-rf", "--one-file-system", "--"]).arg(work))
        .with_context(|| format!("cannot remove {}", work.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_ancestor_is_named() {
        let dir = std::env::temp_dir().join(format!("xtask-cache-{}", std::process::id()));
        let inner = dir.join("inner");
        fs::create_dir_all(&inner).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        let error = reachable(&inner).unwrap_err().to_string();
        fs::remove_dir_all(&dir).unwrap();
        assert!(error.contains(&format!("{} is closed", dir.display())), "{error}");
    }

    #[test]
    fn the_lock_admits_one() {
        let dir = std::env::temp_dir().join(format!("xtask-lock-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let held = lock(&dir).unwrap();
        let second = File::options().write(true).open(dir.join(".lock")).unwrap();
        assert!(second.try_lock().is_err());
        drop(held);
        assert!(second.try_lock().is_ok());
        fs::remove_dir_all(&dir).unwrap();
    }
}
