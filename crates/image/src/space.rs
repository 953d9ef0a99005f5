//! Room for a build on the file system of the images, on which renters' disks may grow as well: a machine whose disk finds no
//! room is paused. Called by `build` before anything is fetched, and by `pack`.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use qudata_host::size::ByteSize;

use crate::{
    build::Place,
    error::BuildError,
    users::{UsersError, users},
    uses::growth,
};

/// What customising without a driver writes: some packages.
const PACKAGES_GIB: u64 = 1;
/// The same with a driver: the driver, a compiler, the kernel with its headers, and the packages they came in.
const DRIVER_GIB: u64 = 4;

/// Less than this is nothing.
pub(crate) const LITTLE: ByteSize = ByteSize::from_mib(16);

/// The room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Free on the file system.
    pub free: ByteSize,
    /// What the instances' disks may still grow by.
    pub promised: ByteSize,
    /// What the owner keeps free.
    pub reserve: ByteSize,
}

impl Room {
    /// Looks at the file system and at the disks of all agents that use the images.
    pub(crate) fn observe(place: &Place) -> Result<Self, BuildError> {
        let images = &place.image_dir;
        let free = free(images).map_err(BuildError::file("look at", images))?;
        let promised = promised(images, &place.instances).map_err(BuildError::Users)?;
        let [free, promised] = [free, promised].map(ByteSize::from_bytes);
        Ok(Self { free, promised, reserve: place.reserve_disk })
    }

    /// What a build may take.
    pub(crate) fn left(&self) -> ByteSize {
        self.free.saturating_sub(self.promised).saturating_sub(self.reserve)
    }

    /// Whether a build must not go on: at the end of a file system everything fails in another way.
    pub(crate) fn is_used_up(&self) -> bool {
        self.left() < LITTLE
    }

    /// Passes when `needed` more fits.
    pub(crate) fn check(&self, needed: ByteSize, dir: &Path) -> Result<(), BuildError> {
        if needed <= self.left() {
            return Ok(());
        }
        Err(BuildError::NoRoom { needed, room: *self, dir: dir.to_owned() })
    }
}

/// What a build will take at least. `source`: bytes that are copied, where they are known before. The changes are written
/// twice, once by the machine and once packed with everything else; so is the source.
pub(crate) fn plan_need(source: u64, customised: bool, driver: bool) -> ByteSize {
    let changes = match (customised, driver) {
        (false, _) => 0,
        (true, false) => PACKAGES_GIB,
        (true, true) => DRIVER_GIB,
    };
    let once = ByteSize::from_bytes(source).saturating_add(ByteSize::from_gib(changes));
    once.saturating_add(once)
}

fn free(dir: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Growth of the disks that share the room of `images`. What is not there does not grow.
fn promised(images: &Path, own: &Path) -> Result<u64, UsersError> {
    let mut sum = 0_u64;
    for user in users(images, own)? {
        let grows = shares_room(images, &user.instances)
            .and_then(|shares| if shares { growth(&user.instances) } else { Ok(0) });
        match grows {
            Ok(bytes) => sum = sum.saturating_add(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(user.unreadable(source)),
        }
    }
    Ok(sum)
}

/// Whether two folders are on one file system. Subvolumes of btrfs and data sets of ZFS have device numbers of their own and
/// one pool of room: what is free there is the same to the byte.
fn shares_room(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(fs::metadata(one)?.dev() == fs::metadata(other)?.dev() || free(one)? == free(other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_and_kept_free_is_not_there() {
        let gib = ByteSize::from_gib;
        let room = |free, promised, reserve| Room {
            free: gib(free),
            promised: gib(promised),
            reserve: gib(reserve),
        };
        let dir = Path::new("/images");
        assert!(room(20, 8, 2).check(gib(10), dir).is_ok());
        for (room, needed) in [(room(20, 8, 2), 11), (room(20, 30, 2), 1), (room(3, 1, 2), 1)] {
            let error = room.check(gib(needed), dir).unwrap_err();
            assert_eq!(error.code(), "disk_too_small");
            let text = error.to_string();
            let figures = [gib(needed), room.free, room.promised, room.reserve];
            assert!(figures.iter().all(|size| text.contains(&format!("{}.0 GiB", size.gib()))), "{text}");
        }
    }

    #[test]
    fn a_driver_takes_the_most() {
        assert_eq!(plan_need(3 << 30, false, false), ByteSize::from_gib(6));
        assert_eq!(plan_need(0, true, false), ByteSize::from_gib(2));
        assert_eq!(plan_need(1 << 30, true, true), ByteSize::from_gib(10));
    }

    #[test]
    fn disks_of_all_agents_are_promised_their_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let images = path("images");
        fs::create_dir_all(images.join(".users")).unwrap();
        for name in ["own", "other"] {
            let folder = path(name).join("a");
            fs::create_dir_all(&folder).unwrap();
            let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
            header.resize(24, 0);
            header.extend((1_u64 << 40).to_be_bytes());
            fs::write(folder.join("disk.qcow2"), header).unwrap();
        }
        let note =
            |name: &str| fs::write(images.join(".users").join(name), format!("{}\n", path(name).display()));
        let tib = |own: &str| promised(&images, &path(own)).unwrap().div_ceil(1 << 40);
        assert_eq!((tib("own"), tib("none")), (1, 0));
        note("other").unwrap();
        note("unmounted").unwrap();
        assert_eq!((tib("own"), tib("none")), (2, 1));
        fs::write(images.join(".users/bad"), "").unwrap();
        assert!(matches!(promised(&images, &path("own")), Err(UsersError::Malformed { .. })));
    }
}
