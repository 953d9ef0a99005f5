//! Which disks lie over which image. Reads the headers of the instances' disks without running a tool. Called by `users`,
//! and by `space` for how much they may still grow.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        ffi::OsStringExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// An instance's disk, in its folder.
const DISK: &str = "disk.qcow2";
const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name of a backing file that the format allows.
const NAME_MAX: u32 = 1023;

/// A disk and what it lies over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskUse {
    /// Name of the folder that the disk is in: the instance's id.
    pub instance: String,
    /// The backing file that its header names; `None` while nobody can tell: the disk of an instance is not there yet, is not
    /// written yet, or does not name its base yet. It may come to lie over any image, also over one that is no longer the
    /// current one.
    pub backing: Option<PathBuf>,
}

/// The disks below `instances`, one folder each. A folder that has not the name of an instance is left out when it has no
/// disk, or one that needs no other file.
///
/// # Errors
/// When the folder is not there, or a disk is there and cannot be read: then nobody knows what it needs.
pub(crate) fn in_use(instances: &Path) -> io::Result<Vec<DiskUse>> {
    let entries = fs::read_dir(instances).map_err(|error| named(instances, &error))?;
    let mut found = Vec::new();
    for entry in entries {
        let folder = entry.map_err(|error| named(instances, &error))?;
        let disk = folder.path().join(DISK);
        let instance = folder.file_name().to_string_lossy().into_owned();
        let is_instance = uuid::Uuid::parse_str(&instance).is_ok();
        match backing_file(&disk) {
            Ok(Header::Over(backing)) => found.push(DiskUse { instance, backing: Some(backing) }),
            // qemu-img writes a header without the name first and adds the name later.
            Ok(Header::Whole) if is_instance => found.push(DiskUse { instance, backing: None }),
            Ok(Header::Whole) => {}
            Ok(Header::Unwritten) => found.push(DiskUse { instance, backing: None }),
            // A folder that is gone by now is of an instance that was deleted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if is_instance && folder.path().is_dir() {
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

/// The disks below `instances` may grow by so many bytes in all: what their machines see, less what is allocated. A disk
/// that is not written yet is of an instance that was admitted by what is free without it.
///
/// # Errors
/// When the folder is not there, or a disk is there and cannot be read.
pub(crate) fn growth(instances: &Path) -> io::Result<u64> {
    let mut sum = 0_u64;
    for entry in fs::read_dir(instances).map_err(|error| named(instances, &error))? {
        let disk = entry.map_err(|error| named(instances, &error))?.path().join(DISK);
        match growth_of(&disk) {
            Ok(bytes) => sum = sum.saturating_add(bytes),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(named(&disk, &error)),
        }
    }
    Ok(sum)
}

fn growth_of(disk: &Path) -> io::Result<u64> {
    let file = open(disk)?;
    // st_blocks counts 512 bytes, stat(2).
    let allocated = file.metadata()?.blocks().saturating_mul(512);
    let mut header = Vec::new();
    file.take(32).read_to_end(&mut header)?;
    let size = header.get(24..).and_then(|rest| rest.first_chunk::<8>()).copied();
    let qcow = header.starts_with(&QCOW_MAGIC);
    Ok(size.filter(|_| qcow).map_or(0, u64::from_be_bytes).saturating_sub(allocated))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The disk's user may have put anything in its place: a link is not followed, a pipe not waited for.
fn open(disk: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    File::options().read(true).custom_flags(flags.bits().cast_signed()).open(disk)
}

enum Header {
    Over(PathBuf),
    Whole,
    Unwritten,
}

/// The backing file in a qcow2 header. The disk's user may have put anything there: it is compared with names of images and
/// never opened.
fn backing_file(disk: &Path) -> io::Result<Header> {
    let mut file = open(disk)?;
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
        assert_eq!(in_use(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_instance_whose_disk_is_not_made_yet_may_need_any_image() {
        let dir = tempfile::tempdir().unwrap();
        let id = |number| uuid::Uuid::from_u128(number).to_string();
        let (admitted, making, nameless) = (id(1), id(2), id(3));
        for name in [&admitted, &making, &nameless, "lost+found"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join(&making).join("disk.qcow2"), "").unwrap();
        // As it is for a moment while qemu-img makes it over an image.
        let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
        header.resize(104, 0);
        fs::write(dir.path().join(&nameless).join("disk.qcow2"), header).unwrap();
        fs::write(dir.path().join(id(4)), "a file").unwrap();
        let unknown = |instance| DiskUse { instance, backing: None };
        assert_eq!(in_use(dir.path()).unwrap(), [unknown(admitted), unknown(making), unknown(nameless)]);
    }

    #[test]
    fn disks_grow_to_what_their_machines_see() {
        let dir = tempfile::tempdir().unwrap();
        for (name, virtual_size, allocated) in [("a", 8_u64 << 20, 1 << 20), ("b", 1 << 20, 2 << 20)] {
            let mut disk = b"QFI\xfb\0\0\0\x03".to_vec();
            disk.resize(24, 0);
            disk.extend(virtual_size.to_be_bytes());
            disk.resize(allocated, 1);
            fs::create_dir(dir.path().join(name)).unwrap();
            let file = File::create_new(dir.path().join(name).join(DISK)).unwrap();
            io::Write::write_all(&mut &file, &disk).unwrap();
            file.sync_all().unwrap();
        }
        fs::create_dir(dir.path().join("c")).unwrap();
        fs::write(dir.path().join("a-file"), "").unwrap();
        let grows = growth(dir.path()).unwrap();
        assert!((6 << 20..=7 << 20).contains(&grows), "{grows}");
        assert_eq!(growth(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
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
