//! Files that belong to one process of one machine. Owns their creation: never over an existing file, private from the
//! first moment. Called by `disk` and `firmware`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

/// The user a machine's process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Creates `path`, readable and writable by `owner` alone. Existing files and links are an error: what is there may be
/// in use. Not synced: after a power cut the step that made the file is undone and done again.
pub(crate) fn create_new(path: &Path, owner: Owner) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    if let Err(error) = fchown(&file, Some(owner.uid), Some(owner.gid)) {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn me() -> Owner {
        Owner { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
    }

    #[test]
    fn new_files_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create_new(&path, me()).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert_eq!((made.permissions().mode() & 0o777, made.uid(), made.gid()), (0o600, me().uid, me().gid));
    }

    #[test]
    fn existing_files_and_dangling_links_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, target) = (dir.path().join("f"), dir.path().join("l"), dir.path().join("t"));
        fs::write(&file, b"a disk").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for path in [&file, &link] {
            assert_eq!(create_new(path, me()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        }
        assert_eq!(fs::read(&file).unwrap(), b"a disk");
        assert!(!target.exists());
    }
}
