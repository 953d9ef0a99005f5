//! One builder at a time. Owns the lock file; called by `build` and by `Store::remove`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

/// What a builder was starting when it ended has a copy of the lock until it executes its program.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

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
        let end = Instant::now() + PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => sleep(PAUSE),
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(LockError::Busy { dir: dir.to_owned() }),
                Err(error) => return Err(failed(error.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_builder_that_ends_at_this_moment_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        assert!(matches!(Lock::take(dir.path()), Err(LockError::Busy { .. })));
        let ends = std::thread::spawn(move || {
            sleep(PATIENCE / 5);
            drop(first);
        });
        Lock::take(dir.path()).unwrap();
        ends.join().unwrap();
    }
}
