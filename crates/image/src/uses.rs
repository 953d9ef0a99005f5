//! Which disks lie over which image. Reads the headers of the instances' disks without running a tool. Called by the CLI
//! before it lists or removes an image.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{ffi::OsStringExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name of a backing file that the format allows.
const NAME_MAX: u32 = 1023;

/// A disk and what it lies over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskUse {
    /// Name of the folder that the disk is in: the instance's id.
    pub instance: String,
    /// The backing file that its header names.
    pub backing: PathBuf,
}

/// The disks below `instances`, one folder each. A folder without a disk, or with one that needs no other file, is left out.
///
/// # Errors
/// When a disk is there and cannot be read: then nobody knows what it needs.
pub fn in_use(instances: &Path) -> io::Result<Vec<DiskUse>> {
    let entries = match fs::read_dir(instances) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(named(instances, &error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let folder = entry.map_err(|error| named(instances, &error))?;
        let disk = folder.path().join("disk.qcow2");
        match backing_file(&disk) {
            Ok(Some(backing)) => {
                found.push(DiskUse { instance: folder.file_name().to_string_lossy().into_owned(), backing });
            }
            Ok(None) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(named(&disk, &error)),
        }
    }
    found.sort_by(|a, b| a.instance.cmp(&b.instance));
    Ok(found)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The backing file in a qcow2 header. The disk's user may have put anything there: it is compared with names of images and
/// never opened.
fn backing_file(disk: &Path) -> io::Result<Option<PathBuf>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(disk)?;
    let mut header = Vec::new();
    file.by_ref().take(20).read_to_end(&mut header)?;
    let field = |at: usize| header.get(at..).and_then(|rest| rest.first_chunk::<4>()).copied();
    let word = |at: usize| field(at).map_or(0, u32::from_be_bytes);
    let offset = (u64::from(word(8)) << 32) | u64::from(word(12));
    let length = word(16);
    if field(0) != Some(QCOW_MAGIC) || offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > NAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the name of its backing file is too long"));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut name = Vec::new();
    file.take(u64::from(length)).read_to_end(&mut name)?;
    Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(name))))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn disks_tell_what_they_lie_over() {
        let dir = tempfile::tempdir().unwrap();
        let run = |args: &[&str]| {
            let made = Command::new("qemu-img").current_dir(dir.path()).args(args).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        };
        for name in ["b", "a", "whole", "empty"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let base = dir.path().join("base.qcow2");
        let base = base.to_str().unwrap();
        run(&["create", "-q", "-f", "qcow2", base, "64M"]);
        run(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, "a/disk.qcow2"]);
        run(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, "b/disk.qcow2", "1G"]);
        run(&["create", "-q", "-f", "qcow2", "whole/disk.qcow2", "1G"]);
        fs::write(dir.path().join("a-file"), "").unwrap();
        let found = in_use(dir.path()).unwrap();
        let names: Vec<_> =
            found.iter().map(|u| (u.instance.as_str(), u.backing.to_str().unwrap())).collect();
        assert_eq!(names, [("a", base), ("b", base)]);
        assert_eq!(in_use(&dir.path().join("none")).unwrap(), []);
    }

    #[test]
    fn a_disk_that_cannot_be_read_is_not_an_unused_image() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("a/disk.qcow2")).unwrap();
        let error = in_use(dir.path()).unwrap_err();
        assert!(error.to_string().contains("a/disk.qcow2"), "{error}");
    }
}
