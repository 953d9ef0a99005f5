//! Files that survive a power cut whole: old or new, never half. Owns temp + fsync + rename + fsync of the directory,
//! and removal that counts "already gone" as done.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A file operation failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt} {path}")]
pub struct DurableError {
    /// What was tried, as a verb.
    pub attempt: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
    let path = path.to_owned();
    move |source| DurableError { attempt, path, source }
}

/// Replaces the file at `path` with `bytes` and `mode`; afterwards it is on disk, or the old one is untouched.
///
/// # Errors
/// When the directory is missing, full or not writable.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DurableError> {
    write_aside(path, bytes, mode, File::sync_all)?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

fn write_aside(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    settle: impl FnOnce(&File) -> io::Result<()>,
) -> Result<(), DurableError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // The pid keeps two writers apart; a leftover of a killed writer is overwritten by create+truncate below.
    name.push(format!(".new-{}", std::process::id()));
    let temporary = dir.join(name);
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        // The mode of an existing leftover or a strict umask must not decide who may read the result.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        settle(&file)?;
        fs::rename(&temporary, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed("write", path)(error)
    })
}

/// Replaces the file at `path` in one step, without waiting for the disk: for what means nothing after a reboot. Whoever
/// reads it sees the old file or the new one, whole, also when the writer is killed.
///
/// # Errors
/// When the directory is missing, full or not writable.
pub fn publish(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DurableError> {
    write_aside(path, bytes, mode, |_| Ok(()))
}

/// Creates the directory `path` with its parents and sets `mode` on the last one.
///
/// # Errors
/// When a parent is not writable or `path` is not a directory.
pub fn create_dir(path: &Path, mode: u32) -> Result<(), DurableError> {
    fs::create_dir_all(path).map_err(failed("create directory", path))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of", path))
}

/// Removes a file. `false`: it was not there, which is as good.
///
/// # Errors
/// Anything but absence.
pub fn remove_file(path: &Path) -> Result<bool, DurableError> {
    known_absence(fs::remove_file(path)).map_err(failed("remove", path))
}

/// Removes a directory and what is in it, following no symlink. `false`: it was not there.
///
/// # Errors
/// Anything but absence.
pub fn remove_tree(path: &Path) -> Result<bool, DurableError> {
    known_absence(fs::remove_dir_all(path)).map_err(failed("remove directory", path))
}

/// Gives `path` to a user and group; a symlink is not followed.
///
/// # Errors
/// When the path is missing or the caller is not root.
pub fn give_to(path: &Path, uid: u32, gid: u32) -> Result<(), DurableError> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(failed("change the owner of", path))
}

/// Makes renames and removals in `dir` durable.
///
/// # Errors
/// When the directory cannot be opened or synced.
pub fn sync_dir(dir: &Path) -> Result<(), DurableError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed("sync directory", dir))
}

fn known_absence(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_sets_content_and_mode_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        publish(&path, b"older", 0o644).unwrap();
        replace(&path, b"old", 0o644).unwrap();
        replace(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_replace_keeps_the_old_file_and_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("is-a-dir");
        fs::create_dir(&path).unwrap();
        let error = replace(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("is-a-dir"), "{error}");
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn absence_is_success() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!remove_file(&dir.path().join("no")).unwrap());
        assert!(!remove_tree(&dir.path().join("no")).unwrap());
    }
}
