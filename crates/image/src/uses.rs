//! Which disks lie over which image. Reads the headers of the instances' disks without running a tool. Called by the CLI
//! before it lists images, and by the store before it removes one.

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
    /// The backing file that its header names; `None` while nobody can tell: the disk of an instance is not there yet, or is
    /// not written yet. It may come to lie over any image, also over one that is no longer the current one.
    pub backing: Option<PathBuf>,
}

/// The disks below `instances`, one folder each. A disk that needs no other file is left out, and so is a folder without a
/// disk that has not the name of an instance.
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
        let instance = folder.file_name().to_string_lossy().into_owned();
        match backing_file(&disk) {
            Ok(Header::Over(backing)) => found.push(DiskUse { instance, backing: Some(backing) }),
            Ok(Header::Whole) => {}
            Ok(Header::Unwritten) => found.push(DiskUse { instance, backing: None }),
            // A folder that is gone by now is of an instance that was deleted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if uuid::Uuid::parse_str(&instance).is_ok() && folder.path().is_dir() {
                    found.push(DiskUse { instance, backing: None });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(named(&disk, &error)),
        }
    }
    found.sort_by(|a, b| a.instance.cmp(&b.instance));
    Ok(found)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

enum Header {
    Over(PathBuf),
    Whole,
    Unwritten,
}

/// The backing file in a qcow2 header. The disk's user may have put anything there: it is compared with names of images and
/// never opened.
fn backing_file(disk: &Path) -> io::Result<Header> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(disk)?;
    let mut header = Vec::new();
    file.by_ref().take(20).read_to_end(&mut header)?;
    let field = |at: usize| header.get(at..).and_then(|rest| rest.first_chunk::<4>()).copied();
    let word = |at: usize| field(at).map_or(0, u32::from_be_bytes);
    let offset = (u64::from(word(8)) << 32) | u64::from(word(12));
    let length = word(16);
    if field(0) != Some(QCOW_MAGIC) || field(16).is_none() {
        return Ok(Header::Unwritten);
    }
    if offset == 0 || length == 0 {
        return Ok(Header::Whole);
    }
    if length > NAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the name of its backing file is too long"));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut name = Vec::new();
    file.take(u64::from(length)).read_to_end(&mut name)?;
    Ok(Header::Over(PathBuf::from(std::ffi::OsString::from_vec(name))))
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
        let names: Vec<_> = found
            .iter()
            .map(|u| (u.instance.as_str(), u.backing.as_ref().unwrap().to_str().unwrap()))
            .collect();
        assert_eq!(names, [("a", base), ("b", base)]);
        assert_eq!(in_use(&dir.path().join("none")).unwrap(), []);
    }

    #[test]
    fn an_instance_whose_disk_is_not_made_yet_may_need_any_image() {
        let dir = tempfile::tempdir().unwrap();
        let (admitted, making) = (uuid::Uuid::from_u128(1).to_string(), uuid::Uuid::from_u128(2).to_string());
        for name in [&admitted, &making, "lost+found"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join(&making).join("disk.qcow2"), "").unwrap();
        fs::write(dir.path().join(uuid::Uuid::from_u128(3).to_string()), "a file").unwrap();
        let unknown = |instance| DiskUse { instance, backing: None };
        assert_eq!(in_use(dir.path()).unwrap(), [unknown(admitted), unknown(making)]);
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
