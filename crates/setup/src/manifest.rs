//! The list of everything that was changed, as it is kept on disk. Written before each change and after it; read by the
//! next installation and by `uninstall`, which goes through it backwards.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Code, SetupError},
    files::{Files, Look},
    places,
};

/// The form of the file.
const VERSION: u32 = 2;

/// Everything that was changed, in the order in which it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Form of the file.
    pub version: u32,
    /// When the first change was made, RFC 3339.
    pub since: String,
    /// Goes into the checksums of secrets, so that they tell nothing to who reads the list but not the secret.
    pub salt: String,
    /// Number of the next backup.
    pub next_backup: u32,
    /// What the settings say, from when taking back begins: they are taken back too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noted: Option<Noted>,
    /// The changes.
    pub entries: Vec<Entry>,
}

/// What a removal that was cut off still has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// Where the data is.
    pub data_dir: String,
    /// Where the images are.
    pub image_dir: String,
    /// The kernel's parameters that came with it into entries of systemd-boot.
    pub parameters: Vec<String>,
}

/// A file as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Name in the folder of backups.
    pub name: String,
    /// Who could read it, whose it was, how old.
    pub look: Look,
    /// Checksum of what was in it; of a secret, salted.
    pub sha256: String,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Entry {
    /// A folder that was not there.
    Folder {
        /// Which.
        path: String,
    },
    /// A file that was written.
    File {
        /// Which.
        path: String,
        /// As it was; none: it was not there.
        before: Option<Backup>,
        /// Checksums of what was written, the last one last; of a secret, salted.
        after: Vec<String>,
        /// Holds a secret.
        secret: bool,
        /// It was written and read back.
        done: bool,
        /// What somebody else had made of it each time when it was written anew.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        edited: Vec<Backup>,
    },
    /// Files that the boot loader's own tools make of its settings.
    Generated {
        /// Which of them.
        path: String,
        /// As it was; none: it was not there.
        before: Option<Backup>,
        /// What the tools made of it; none: they did not come to their end.
        after: Option<String>,
    },
    /// Packages.
    Packages {
        /// Installed before.
        before: Vec<String>,
        /// Came with it.
        added: Vec<String>,
        /// What apt said that it would install, over all attempts. Anything else came by somebody else.
        #[serde(default)]
        named: Vec<String>,
        /// What apt was asked for by name, the package itself apart.
        #[serde(default)]
        asked: Vec<String>,
        /// apt came to its end.
        done: bool,
    },
    /// A unit that was switched on.
    Unit {
        /// Which.
        name: String,
    },
    /// Groups that came with the packages.
    Groups {
        /// They; none while apt works, and after an attempt that was cut off.
        added: Vec<String>,
        /// The files of groups as they were, with the copies that their tools keep beside them.
        before: Vec<(String, Option<Backup>)>,
    },
}

impl Manifest {
    /// Nothing was changed yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            version: VERSION,
            since: jiff::Timestamp::now().to_string(),
            salt: format!("{:032x}", rand::random::<u128>()),
            next_backup: 1,
            noted: None,
            entries: Vec::new(),
        }
    }

    /// The list on disk; none when nothing was ever changed.
    ///
    /// # Errors
    /// When it is there and cannot be understood: nothing may be changed or taken back then.
    pub fn load(files: &Files) -> Result<Option<Self>, SetupError> {
        let Some(bytes) = files.read(places::MANIFEST)? else { return Ok(None) };
        let damaged = |why: String| {
            let what = format!("{}, the list of everything that `install` changed, {why}", places::MANIFEST);
            let remedy = format!(
                "Put back a copy of it. Without one: the files as they were lie in {}; put them back by hand, then move {} away.",
                places::BACKUP,
                places::STATE
            );
            SetupError::new(Code::ManifestDamaged, what, remedy).next(format!("ls -l {}", places::BACKUP))
        };
        let read: Self =
            serde_json::from_slice(&bytes).map_err(|e| damaged("cannot be understood".into()).because(e))?;
        if read.version != VERSION {
            return Err(damaged(format!("has form {}, and this program knows form {VERSION}", read.version)));
        }
        Ok(Some(read))
    }

    /// Puts the list on disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, files: &Files) -> Result<(), SetupError> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|e| SetupError::file("write", places::MANIFEST, e))?;
        bytes.push(b'\n');
        files.write(places::MANIFEST, &bytes, files.mine(0o600))
    }

    /// The packages that came with it.
    #[must_use]
    pub fn packages(&self) -> Option<(&[String], &[String], bool)> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Packages { before, added, done, .. } => Some((before.as_slice(), added.as_slice(), *done)),
            Entry::Folder { .. }
            | Entry::File { .. }
            | Entry::Generated { .. }
            | Entry::Unit { .. }
            | Entry::Groups { .. } => None,
        })
    }

    /// Whether a file is in the list.
    #[must_use]
    pub fn has_file(&self, wanted: &str) -> bool {
        self.entries.iter().any(|entry| matches!(entry, Entry::File { path, .. } if path == wanted))
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Self::new()
    }
}
