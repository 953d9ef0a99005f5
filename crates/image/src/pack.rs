//! From the disk that a machine wrote to a file of root's that can be published. Called by `build`.
//!
//! qemu-img works as the machine's user, in a folder of that user's: what the machine wrote into its disk's header is not
//! followed with root's rights. So nothing in that folder is trusted: what comes out is opened without following a link,
//! looked at and made ours through the open file, and moved to a folder that only root writes.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown},
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::{command::Tool, durable, size::ByteSize};
use qudata_qemu::disk::{BaseFormat, BaseImage, Owner, inspect_base};
use rustix::fs::OFlags;

use crate::{
    build::{Place, myself},
    error::BuildError,
    launch,
    space::Room,
};

/// Writing a disk of some GiB.
const DEADLINE: Duration = Duration::from_secs(3600);
const FORMAT: &str = BaseFormat::Qcow2.name();
/// Name of the disk.
pub(crate) const DISK: &str = "disk.qcow2";

/// Writes `disk` whole, without anything that it lay over, and checks it. Returns a folder below `dir` with nothing but it.
pub(crate) async fn pack(place: &Place, dir: &Path, disk: &Path) -> Result<PathBuf, BuildError> {
    Room::observe(place)?.check(measure(place, disk).await?, &place.image_dir)?;
    let folder = dir.join("packed");
    durable::create_dir(&folder, 0o755).map_err(BuildError::other("making the image's folder"))?;
    if let Some(user) = place.user {
        lchown(&folder, Some(user.uid), Some(user.gid)).map_err(BuildError::file("give away", &folder))?;
    }
    let packed = folder.join(DISK);
    qemu_img(place, &["convert", "-q", "-f", FORMAT, "-O", FORMAT])
        .arg(disk)
        .arg(&packed)
        .run()
        .await
        .map_err(BuildError::tool("packing the image"))?;
    qemu_img(place, &["check", "-q", "-f", FORMAT])
        .arg(&packed)
        .run()
        .await
        .map_err(BuildError::tool("checking the image"))?;
    let fresh = dir.join("final");
    take(&packed, &fresh, myself()).map_err(BuildError::file("take", &packed))?;
    inspect_packed(&fresh.join(DISK))?;
    Ok(fresh)
}

/// What a packed disk must be.
pub(crate) fn inspect_packed(disk: &Path) -> Result<BaseImage, BuildError> {
    let image = inspect_base(disk).map_err(BuildError::Unfit)?;
    match image.format {
        BaseFormat::Qcow2 => Ok(image),
        // Everything that is nothing else looks like a raw disk.
        BaseFormat::Raw => {
            let source = io::Error::new(io::ErrorKind::InvalidData, "it is not what qemu-img writes");
            Err(BuildError::file("take", disk)(source))
        }
    }
}

/// Most bytes that the packed disk can have.
async fn measure(place: &Place, disk: &Path) -> Result<ByteSize, BuildError> {
    let told = qemu_img(place, &["measure", "-f", FORMAT, "-O", FORMAT])
        .arg(disk)
        .run()
        .await
        .map_err(BuildError::tool("measuring the image"))?;
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    let bytes = text.lines().find_map(|line| line.strip_prefix("required size: ")?.trim().parse().ok());
    bytes.map(ByteSize::from_bytes).ok_or_else(|| {
        let source = io::Error::new(io::ErrorKind::InvalidData, format!("qemu-img said {text:?}"));
        BuildError::file("measure", disk)(source)
    })
}

fn qemu_img(place: &Place, args: &[&str]) -> Tool {
    let tool = Tool::new(launch::PROGRAM).args(launch::plan_args(place.user, None));
    tool.arg(place.qemu_img.as_os_str()).args(args.iter().copied()).deadline(DEADLINE)
}

/// Makes the file `packed` the owner's, readable by all and writable by none, and moves it into the new folder `fresh`.
fn take(packed: &Path, fresh: &Path, owner: Owner) -> io::Result<()> {
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(packed)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return refuse("it is no regular file");
    }
    // Another name could be of anything that lies on this file system.
    if found.nlink() != 1 {
        return refuse("it has another name as well");
    }
    fchown(&file, Some(owner.uid), Some(owner.gid))?;
    file.set_permissions(Permissions::from_mode(0o444))?;
    file.sync_all()?;
    fs::create_dir(fresh)?;
    fs::set_permissions(fresh, Permissions::from_mode(0o755))?;
    let disk = fresh.join(DISK);
    fs::rename(packed, &disk)?;
    let moved = fs::symlink_metadata(&disk)?;
    if (moved.dev(), moved.ino()) != (found.dev(), found.ino()) {
        return refuse("somebody has exchanged it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_file_is_taken_and_moved_out_of_the_users_reach() {
        let dir = tempfile::tempdir().unwrap();
        let (packed, fresh) = (dir.path().join("a"), dir.path().join("fresh"));
        fs::write(&packed, "disk").unwrap();
        take(&packed, &fresh, myself()).unwrap();
        assert!(!packed.exists());
        assert_eq!((mode(&fresh), mode(&fresh.join(DISK))), (0o755, 0o444));
    }

    #[test]
    fn links_of_either_kind_are_not_followed_and_nothing_behind_them_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("victim"), "secret").unwrap();
        fs::set_permissions(path("victim"), Permissions::from_mode(0o600)).unwrap();
        symlink(path("victim"), path("soft")).unwrap();
        fs::hard_link(path("victim"), path("hard")).unwrap();
        fs::create_dir(path("folder")).unwrap();
        for name in ["soft", "hard", "folder", "none"] {
            assert!(take(&path(name), &path("fresh"), myself()).is_err(), "{name}");
            assert!(!path("fresh").exists());
        }
        assert_eq!(mode(&path("victim")), 0o600);
    }

    #[test]
    fn only_what_qemu_img_writes_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        fs::write(&raw, [0; 4096]).unwrap();
        assert!(inspect_packed(&raw).is_err());
    }
}
