//! One builder at a time. Owns the lock file; called by `build` and by `Store::remove`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// The images are not ours to change.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody builds.
    #[error("an image is being built or removed in {} at this moment: wait until it is done", dir.display())]
    Busy {
        /// The images' folder.
        dir: PathBuf,
    },
    /// The file cannot be had.
    #[error("cannot lock {}", path.display())]
    File {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The lock; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(dir: &Path) -> Result<Self, LockError> {
        let path = dir.join(".lock");
        let failed = |source| LockError::File { path: path.clone(), source };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Busy { dir: dir.to_owned() }),
            Err(error) => Err(failed(error.into())),
        }
    }
}
