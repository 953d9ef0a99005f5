//! The base image that disks of instances lie over: whether it is one, and whether QEMU can open it. Apart from the other
//! files of the settings, because images are what owners keep on a file system of the network.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use qudata_agent_core::settings::FirmwareKind;
use qudata_host::causes::chain;
use qudata_qemu::{
    disk::inspect_base,
    firmware::{Firmware, find_boot_files},
};

use super::{Look, is_absent, unreadable};
use crate::observed::{ImageFault, ImageLook, Seen};

/// `o+r` and `o+x`.
const OTHERS_READ: u32 = 0o004;
const OTHERS_PASS: u32 = 0o001;

pub(super) async fn observe(look: &Look) -> Result<ImageLook, ImageFault> {
    let image = look
        .read(|look| Ok(image(&look.under(&look.settings.base_image), look.settings.firmware, &look.root)));
    image.await.unwrap_or_else(|unseen| Err(ImageFault::Unseen(unseen)))
}

fn image(path: &Path, firmware: FirmwareKind, root: &Path) -> Result<ImageLook, ImageFault> {
    // Behind the link that names the current one: that is the file that the agent gives to QEMU.
    let real: PathBuf = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(error) if is_absent(&error) => return Err(ImageFault::Missing),
        Err(error) => return Err(ImageFault::Unseen(unreadable(path, &error))),
    };
    let unusable = |error: &dyn std::error::Error| ImageFault::Unusable(chain(error));
    // Opening a pipe would wait for its writer; what it is instead of a file is told below.
    if real.is_file()
        && let Err(error) = fs::File::open(&real)
    {
        return Err(ImageFault::Unseen(unreadable(&real, &error)));
    }
    let base = inspect_base(&real).map_err(|error| unusable(&error))?;
    let mut files = vec![real.clone()];
    if firmware == FirmwareKind::Direct {
        // Beside the file and not beside the link, like the agent.
        let found = find_boot_files(&real).map_err(|error| unusable(&error))?;
        if let Firmware::Direct { kernel, initrd, .. } = found {
            files.extend([kernel, initrd]);
        }
    }
    let root = fs::canonicalize(root).map_err(|error| ImageFault::Unseen(unreadable(root, &error)))?;
    let folders = real.ancestors().skip(1).take_while(|dir| *dir != root).map(Path::to_owned);
    Ok(ImageLook {
        what: format!("{}, {} with a disk of {}", real.display(), base.format, base.virtual_size),
        unreadable: without(files, OTHERS_READ).map_err(ImageFault::Unseen)?,
        closed: without(folders, OTHERS_PASS).map_err(ImageFault::Unseen)?,
    })
}

/// Those whose mode does not give others this right.
fn without(paths: impl IntoIterator<Item = PathBuf>, right: u32) -> Seen<Vec<PathBuf>> {
    let mut refused = Vec::new();
    for path in paths {
        let found = fs::metadata(&path).map_err(|error| unreadable(&path, &error))?;
        if found.permissions().mode() & right == 0 {
            refused.push(path);
        }
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn images_are_looked_at_behind_their_link() {
        let dir = tempfile::tempdir().unwrap();
        let (link, disk) = (dir.path().join("qudata-base.qcow2"), dir.path().join("disk.raw"));
        let look = || image(&link, FirmwareKind::Uefi, dir.path());
        assert_eq!(look(), Err(ImageFault::Missing));
        symlink(&disk, &link).unwrap();
        assert_eq!(look(), Err(ImageFault::Missing), "a link to nothing");
        fs::write(&disk, [0; 1024]).unwrap();
        let seen = look().unwrap();
        assert!(seen.what.ends_with("disk.raw, raw with a disk of 1K"), "{seen:?}");
        fs::write(&disk, b"KDMV").unwrap();
        let fault = look().unwrap_err();
        assert!(matches!(&fault, ImageFault::Unusable(why) if why.contains("VMDK")), "{fault:?}");
    }

    #[test]
    fn boot_files_are_looked_for_where_the_agent_looks() {
        let dir = tempfile::tempdir().unwrap();
        let (link, disk) = (dir.path().join("qudata-base.qcow2"), dir.path().join("disk.raw"));
        symlink(&disk, &link).unwrap();
        fs::write(&disk, [0; 1024]).unwrap();
        let look = || image(&link, FirmwareKind::Direct, dir.path());
        for file in ["qudata-base.vmlinuz", "qudata-base.initrd"] {
            fs::write(dir.path().join(file), "x").unwrap();
        }
        let fault = look().unwrap_err();
        let beside_the_link = matches!(&fault, ImageFault::Unusable(why) if why.contains("disk.vmlinuz"));
        assert!(beside_the_link, "{fault:?}");
        let [kernel, initrd] = ["disk.vmlinuz", "disk.initrd"].map(|file| dir.path().join(file));
        [&kernel, &initrd].into_iter().for_each(|file| fs::write(file, "x").unwrap());
        mode(&kernel, 0o644);
        mode(&initrd, 0o600);
        mode(&disk, 0o644);
        assert_eq!(look().unwrap().unreadable, [fs::canonicalize(&initrd).unwrap()]);
    }

    #[test]
    fn what_others_may_not_open_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (open, closed) = (dir.path().join("open"), dir.path().join("open/closed"));
        fs::create_dir_all(&closed).unwrap();
        let disk = closed.join("disk.raw");
        fs::write(&disk, [0; 1024]).unwrap();
        mode(&open, 0o711);
        let look = |folder, file| {
            mode(&closed, folder);
            mode(&disk, file);
            let seen = image(&disk, FirmwareKind::Uefi, dir.path()).unwrap();
            (seen.unreadable.len(), seen.closed.len())
        };
        assert_eq!(look(0o755, 0o444), (0, 0));
        assert_eq!(look(0o711, 0o600), (1, 0), "only its owner reads it");
        assert_eq!(look(0o755, 0o640), (1, 0), "only its group reads it");
        assert_eq!(look(0o750, 0o644), (0, 1));
        assert_eq!(look(0o744, 0o644), (0, 1), "a list of names is no way in");
    }

    #[test]
    fn a_pipe_is_told_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("disk.raw");
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, fifo, 0o644.into(), 0).unwrap();
        let fault = image(&pipe, FirmwareKind::Uefi, dir.path()).unwrap_err();
        assert!(matches!(&fault, ImageFault::Unusable(why) if why.contains("regular")), "{fault:?}");
    }
}
