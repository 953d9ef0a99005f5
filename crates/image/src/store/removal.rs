//! Which images may go, and how they go. Called by the CLI.
//!
//! An agent makes the folder of an instance, on disk, before it looks which image is current, and does not ask for the lock.
//! What keeps its image is the order here: an image that is current is never removed, and only after that was seen the
//! folders are looked at. A folder whose disk does not say its base yet keeps all images.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qudata_host::durable;

use super::{Store, StoreError, WORK, read};
use crate::{lock::Lock, record::ImageId, users, uses::DiskUse};

/// What the agent of somebody's settings needs of the images. What other agents need they have written down themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Folder of the instances' folders.
    pub instances: PathBuf,
    /// The setting `base_image`: the link to the current image, or what the owner has pinned.
    pub base_image: PathBuf,
}

impl Store {
    /// The disks of all agents that use these images.
    ///
    /// # Errors
    /// When one of them cannot be looked at: then nobody knows what it needs.
    pub fn uses(&self, claims: &Claims) -> Result<Vec<DiskUse>, StoreError> {
        users::uses(&self.dir, &claims.instances).map_err(StoreError::Users)
    }

    /// The instances whose disks lie over an image.
    #[must_use]
    pub fn users(&self, id: &ImageId, uses: &[DiskUse]) -> Vec<String> {
        let disk = self.disk(id);
        let same = |path: &Path| path == disk || fs::canonicalize(path).is_ok_and(|real| real == disk);
        let over = |u: &&DiskUse| u.backing.as_deref().is_some_and(same);
        uses.iter().filter(over).map(|u| u.instance.clone()).collect()
    }

    /// The image that the setting `base_image` leads to; none where it leads elsewhere or nowhere.
    ///
    /// # Errors
    /// When it cannot be followed.
    pub fn pinned(&self, base_image: &Path) -> Result<Option<ImageId>, StoreError> {
        let real = match fs::canonicalize(base_image) {
            Ok(real) => real,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(base_image)(error)),
        };
        let name = real.strip_prefix(&self.dir).ok().and_then(Path::parent).and_then(Path::to_str);
        let id = name.and_then(|name| name.parse::<ImageId>().ok());
        Ok(id.filter(|id| self.disk(id) == real))
    }

    /// Whether nothing needs an image at this moment.
    ///
    /// # Errors
    /// When there is none, when new instances get it, or when disks lie over it or may come to.
    pub fn check_unused(&self, id: &ImageId, claims: &Claims) -> Result<(), StoreError> {
        if !self.dir.join(id.to_string()).is_dir() {
            return Err(StoreError::NoSuchImage { id: id.clone() });
        }
        // Before the folders are looked at: see above.
        if self.current()?.as_ref() == Some(id) {
            return Err(StoreError::Current { id: id.clone() });
        }
        if self.pinned(&claims.base_image)?.as_ref() == Some(id) {
            return Err(StoreError::Pinned { id: id.clone() });
        }
        let uses = self.uses(claims)?;
        let users = self.users(id, &uses);
        if !users.is_empty() {
            return Err(StoreError::InUse { id: id.clone(), instances: users });
        }
        let undecided: Vec<_> =
            uses.into_iter().filter(|u| u.backing.is_none()).map(|u| u.instance).collect();
        if !undecided.is_empty() {
            return Err(StoreError::Undecided { id: id.clone(), instances: undecided });
        }
        Ok(())
    }

    /// Removes an image that nothing needs.
    ///
    /// # Errors
    /// When new instances get it, when disks lie over it or may come to, or when it cannot be removed.
    pub fn remove(&self, id: &ImageId, claims: &Claims) -> Result<(), StoreError> {
        let _lock = Lock::take(&self.dir).map_err(StoreError::Lock)?;
        self.take_away(id, claims)
    }

    /// Removes every image that neither new instances get nor old ones use, and tells which.
    ///
    /// # Errors
    /// At the first that cannot be removed, or of which nobody can tell whether it is used.
    pub fn prune(&self, claims: &Claims) -> Result<Vec<ImageId>, StoreError> {
        let _lock = Lock::take(&self.dir).map_err(StoreError::Lock)?;
        let mut removed = Vec::new();
        for record in self.list()?.images {
            match self.take_away(&record.id, claims) {
                Ok(()) => removed.push(record.id),
                Err(StoreError::Current { .. } | StoreError::Pinned { .. } | StoreError::InUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Only under the lock: builds change what is current.
    fn take_away(&self, id: &ImageId, claims: &Claims) -> Result<(), StoreError> {
        self.check_unused(id, claims)?;
        let folder = self.dir.join(id.to_string());
        // Gone in one step; what a power cut leaves of the rest is swept by the next build.
        let gone = self.dir.join(format!("{WORK}removed-{id}"));
        durable::remove_tree(&gone).map_err(StoreError::Durable)?;
        fs::rename(&folder, &gone).map_err(read(&folder))?;
        durable::sync_dir(&self.dir).map_err(StoreError::Durable)?;
        durable::remove_tree(&gone).map(drop).map_err(StoreError::Durable)
    }
}
