//! The images of a host: a folder each, complete or not there. Owns publishing, listing and verifying; called by `build` and
//! by the CLI. [`crate`] shows the folder, [`removal`] says which images may go.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use qudata_host::causes::chain;
use qudata_host::durable::{self, DurableError};
use qudata_qemu::disk::{InspectBaseError, inspect_base};
use rustix::fs::{CWD, RenameFlags, renameat_with};

pub use self::removal::Claims;
use crate::{
    digest::Digest,
    lock::{Lock, LockError},
    obtain::PART,
    record::{ImageId, ImageRecord},
    users::UsersError,
};

mod removal;

/// The link to the current image; the default of the agent's `base_image`.
const CURRENT: &str = "qudata-base.qcow2";
const DISK: &str = "disk.qcow2";
const MANIFEST: &str = "manifest.json";
/// What a build, or a removal, is in the middle of.
pub(crate) const WORK: &str = ".work-";
/// Downloads.
pub(crate) const FETCHED: &str = ".fetch";
/// A manifest lists a few thousand packages.
const MANIFEST_MAX: u64 = 16 << 20;

/// The images.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// All images, and what is no image any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Newest first.
    pub images: Vec<ImageRecord>,
    /// Folders that have the name of an image and are none.
    pub damaged: Vec<Damaged>,
}

/// An image that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Its name.
    pub id: ImageId,
    /// Why.
    pub reason: String,
}

/// The images could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Something of the file system.
    #[error("the images' folder cannot be used")]
    Durable(#[source] DurableError),
    /// Reading failed.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody builds.
    #[error("this is not the time to change the images")]
    Lock(#[source] LockError),
    /// No such image.
    #[error("there is no image {id}: see `qudata-agent image list`")]
    NoSuchImage {
        /// The name.
        id: ImageId,
    },
    /// The manifest says something else.
    #[error("the manifest of image {id} is damaged: remove the image and build it again")]
    Manifest {
        /// The image.
        id: ImageId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk is not what it was.
    #[error(
        "the disk of image {id} was changed or is damaged: its SHA-256 is {found}. Build an image again, so that no new \
         instance gets this one; the disks of instances that lie over it may be damaged as well"
    )]
    Changed {
        /// The image.
        id: ImageId,
        /// Of the disk as it is.
        found: String,
    },
    /// The disk is no base image.
    #[error("the disk of image {id} cannot be used")]
    Unfit {
        /// The image.
        id: ImageId,
        /// Why.
        #[source]
        source: InspectBaseError,
    },
    /// New instances get it.
    #[error("image {id} is the current one, which new instances get: build another one first")]
    Current {
        /// The image.
        id: ImageId,
    },
    /// The settings name it.
    #[error(
        "image {id} is the one that the setting base_image leads to, which new instances get: change the setting first"
    )]
    Pinned {
        /// The image.
        id: ImageId,
    },
    /// Disks need it.
    #[error("image {id} is used by the disks of {}: they are lost without it; delete the instances first", instances.join(", "))]
    InUse {
        /// The image.
        id: ImageId,
        /// Their ids.
        instances: Vec<String>,
    },
    /// They have no disk that could tell.
    #[error(
        "it cannot be told whether image {id} is used by {}: their disks do not say yet over which image they lie. Wait until \
         they are up, or delete the instances, then do it again",
        instances.join(", ")
    )]
    Undecided {
        /// The image.
        id: ImageId,
        /// Their ids.
        instances: Vec<String>,
    },
    /// The disks of the instances cannot be looked at.
    #[error("cannot tell which images are in use")]
    Users(#[source] UsersError),
    /// A file or a link of the owner's has the link's name.
    #[error(
        "{} was put there by hand, and disks of instances may lie over it: it is left alone. Delete its instances, then \
         move it away; or keep it and leave images to yourself",
        path.display()
    )]
    InTheWay {
        /// The file or link.
        path: PathBuf,
    },
}

impl StoreError {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Lock(LockError::Busy { .. }) => "busy",
            Self::NoSuchImage { .. } => "no_such_image",
            Self::Manifest { .. } | Self::Changed { .. } | Self::Unfit { .. } => "image_damaged",
            Self::Current { .. } | Self::Pinned { .. } => "image_current",
            Self::InUse { .. } => "image_in_use",
            Self::Undecided { .. } | Self::Users(_) => "uses_unknown",
            Self::Durable(_) | Self::Read { .. } | Self::Lock(_) | Self::InTheWay { .. } => "image_failed",
        }
    }
}

impl Store {
    /// The images in `dir`; none where it is not there. Looking changes nothing.
    ///
    /// # Errors
    /// When the folder is there and cannot be looked at.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        // As the headers of disks name it: without links.
        match fs::canonicalize(dir) {
            Ok(dir) => Ok(Self { dir }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self { dir: dir.to_owned() }),
            Err(error) => Err(read(dir)(error)),
        }
    }

    /// The same for a builder: the folder is made when it is not there.
    pub(crate) fn make(dir: &Path) -> Result<Self, StoreError> {
        // Passable, not listable: the users of VMs read the image that their disk lies over.
        durable::create_dir(dir, 0o711).map_err(StoreError::Durable)?;
        Self::open(dir)
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The disk of an image.
    #[must_use]
    pub fn disk(&self, id: &ImageId) -> PathBuf {
        self.dir.join(id.to_string()).join(DISK)
    }

    /// All images.
    ///
    /// # Errors
    /// When the folder cannot be read. An image that cannot be read is listed as damaged.
    pub fn list(&self) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
            entries => entries.map_err(read(&self.dir))?,
        };
        for entry in entries {
            let name = entry.map_err(read(&self.dir))?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<ImageId>().ok()) else { continue };
            match self.record(&id).and_then(|record| self.check_size(record)) {
                Ok(record) => listing.images.push(record),
                Err(error) => listing.damaged.push(Damaged { id, reason: chain(&error) }),
            }
        }
        listing.images.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
        listing.damaged.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(listing)
    }

    /// The image that new instances get; none when there is none, or when the owner put a file of his own there.
    ///
    /// # Errors
    /// When the link cannot be read.
    pub fn current(&self) -> Result<Option<ImageId>, StoreError> {
        let link = self.dir.join(CURRENT);
        match fs::read_link(&link) {
            Ok(target) => {
                let name = target.parent().and_then(Path::file_name).and_then(|name| name.to_str());
                Ok(name.and_then(|name| name.parse().ok()))
            }
            // EINVAL: no link.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                Ok(None)
            }
            Err(error) => Err(read(&link)(error)),
        }
    }

    /// The manifest of an image.
    ///
    /// # Errors
    /// When there is no such image, or its manifest is damaged.
    pub fn record(&self, id: &ImageId) -> Result<ImageRecord, StoreError> {
        let folder = self.dir.join(id.to_string());
        if !folder.is_dir() {
            return Err(StoreError::NoSuchImage { id: id.clone() });
        }
        let damaged = |source| StoreError::Manifest { id: id.clone(), source };
        let path = folder.join(MANIFEST);
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        if fs::metadata(&path).map_err(damaged)?.len() > MANIFEST_MAX {
            return Err(damaged(invalid("it is too large")));
        }
        let bytes = fs::read(&path).map_err(damaged)?;
        let record: ImageRecord = serde_json::from_slice(&bytes).map_err(|e| damaged(e.into()))?;
        if record.id == *id { Ok(record) } else { Err(damaged(invalid("it is of another image"))) }
    }

    fn check_size(&self, record: ImageRecord) -> Result<ImageRecord, StoreError> {
        let disk = self.disk(&record.id);
        let size = fs::metadata(&disk).map_err(read(&disk))?.len();
        if size == record.size {
            return Ok(record);
        }
        let found = format!("of {size} bytes instead of {}", record.size);
        Err(StoreError::Changed { id: record.id, found })
    }

    /// Reads the whole disk and compares it with the image's name. Takes as long as the disk is large.
    ///
    /// # Errors
    /// When it is not what was published.
    pub fn verify(&self, id: &ImageId) -> Result<ImageRecord, StoreError> {
        let record = self.record(id)?;
        let disk = self.disk(id);
        let found = Digest::sha256_of(&disk, &AtomicU64::new(0)).map_err(read(&disk))?;
        if found.hex() != record.sha256 || ImageId::of(&found) != *id {
            return Err(StoreError::Changed { id: id.clone(), found: found.hex().to_owned() });
        }
        inspect_base(&disk).map_err(|source| StoreError::Unfit { id: id.clone(), source })?;
        Ok(record)
    }

    /// Refuses to replace a file or a link of the owner's by the link. Disks that earlier agents made lie over the name
    /// itself: what it leads to must stay.
    pub(crate) fn check_link(&self) -> Result<(), StoreError> {
        let path = self.dir.join(CURRENT);
        match fs::read_link(&path) {
            Ok(target) if is_ours(&target) => Ok(()),
            Ok(_) => Err(StoreError::InTheWay { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // EINVAL: no link.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(StoreError::InTheWay { path }),
            Err(error) => Err(read(&path)(error)),
        }
    }

    /// Removes what a build left that was given up. A download is kept.
    ///
    /// # Errors
    /// When somebody builds, or something cannot be removed.
    pub fn tidy(&self) -> Result<(), StoreError> {
        let _lock = Lock::take(&self.dir).map_err(StoreError::Lock)?;
        self.sweep_work()
    }

    fn sweep_work(&self) -> Result<(), StoreError> {
        for entry in fs::read_dir(&self.dir).map_err(read(&self.dir))? {
            let entry = entry.map_err(read(&self.dir))?;
            if entry.file_name().to_string_lossy().starts_with(WORK) {
                let path = entry.path();
                let is_dir = entry.file_type().map_err(read(&path))?.is_dir();
                let removed = if is_dir { durable::remove_tree(&path) } else { durable::remove_file(&path) };
                removed.map_err(StoreError::Durable)?;
            }
        }
        Ok(())
    }

    /// Removes what builds left that were killed, and downloads of anything but `part`. Only under the lock.
    pub(crate) fn sweep(&self, part: Option<&str>) -> Result<(), StoreError> {
        self.sweep_work()?;
        let fetched = self.dir.join(FETCHED);
        durable::create_dir(&fetched, 0o711).map_err(StoreError::Durable)?;
        for entry in fs::read_dir(&fetched).map_err(read(&fetched))? {
            let entry = entry.map_err(read(&fetched))?;
            let name = entry.file_name();
            let wanted = part.is_some() && name.to_str() == part && name.to_string_lossy().ends_with(PART);
            if !wanted {
                durable::remove_file(&entry.path()).map_err(StoreError::Durable)?;
            }
        }
        Ok(())
    }

    /// Makes the finished folder an image and the current one. `folder` has the disk, synced, and the boot files.
    pub(crate) fn publish(&self, folder: &Path, record: &ImageRecord) -> Result<(), StoreError> {
        let home = self.dir.join(record.id.to_string());
        let manifest = serde_json::to_vec_pretty(record)
            .map_err(|e| StoreError::Manifest { id: record.id.clone(), source: e.into() })?;
        durable::replace(&folder.join(MANIFEST), &manifest, 0o444).map_err(StoreError::Durable)?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).map_err(read(folder))?;
        // The same bytes are the same image: the one that is there may be used, and stays unless it was damaged.
        if !home.is_dir() {
            fs::rename(folder, &home).map_err(read(&home))?;
        } else if self.verify(&record.id).is_err() {
            renameat_with(CWD, folder, CWD, &home, RenameFlags::EXCHANGE)
                .map_err(|error| read(&home)(error.into()))?;
        }
        durable::sync_dir(&self.dir).map_err(StoreError::Durable)?;
        self.check_link()?;
        let link = self.dir.join(format!("{WORK}link"));
        durable::remove_file(&link).map_err(StoreError::Durable)?;
        symlink(Path::new(&record.id.to_string()).join(DISK), &link).map_err(read(&link))?;
        fs::rename(&link, self.dir.join(CURRENT)).map_err(read(&link))?;
        durable::sync_dir(&self.dir).map_err(StoreError::Durable)
    }
}

/// Whether a link is one that `publish` makes, to the letter.
fn is_ours(target: &Path) -> bool {
    let name = target.to_str().and_then(|target| target.strip_suffix(DISK)?.strip_suffix('/'));
    name.is_some_and(|name| name.parse::<ImageId>().is_ok())
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Read { path, source }
}

#[cfg(test)]
mod tests;
