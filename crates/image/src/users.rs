//! Whose disks may lie over the images of a folder. Every agent writes down beside the images where its instances are, at
//! each start: whoever removes images may have other settings than the agent, whose unit can set a data folder of its own.
//! Called by `store` before an image goes, and by `space` before a build fills the disk.
//!
//! ```text
//! <images>/.users/<name>      the path of a folder of instances, and a line end
//! ```

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::{ffi::OsStringExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use crate::uses::{DiskUse, in_use};

/// Folder of the notes.
const USERS: &str = ".users";
/// A path and a line end.
const NOTE_MAX: u64 = 4097;

/// An agent whose disks cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The notes cannot be read.
    #[error("{} cannot be read, which tells where the instances of an agent are", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A note that is none.
    #[error(
        "{} is damaged, which tells where the instances of an agent are: start that agent again, or delete this file if that \
         agent is no more",
        note.display()
    )]
    Malformed {
        /// The file.
        note: PathBuf,
    },
    /// The folder of an agent's instances is not there, or not all of it can be read.
    #[error(
        "the instances of the agent that {} tells of cannot be looked at: start that agent (mount its disk), or delete this \
         file if that agent is no more",
        note.display()
    )]
    Agent {
        /// The file.
        note: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder that the settings name cannot be read.
    #[error("the disks of the instances cannot be read")]
    Own(#[source] io::Error),
}

/// A folder of instances, and the file that says so; none: the settings do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) instances: PathBuf,
    pub(crate) note: Option<PathBuf>,
}

impl User {
    /// What is told when the folder cannot be looked at.
    pub(crate) fn unreadable(&self, source: io::Error) -> UsersError {
        match &self.note {
            Some(note) => UsersError::Agent { note: note.clone(), source },
            None => UsersError::Own(source),
        }
    }
}

/// The folders of all agents that use `images`; `own` is the one of the caller's settings.
pub(crate) fn users(images: &Path, own: &Path) -> Result<Vec<User>, UsersError> {
    let dir = images.join(USERS);
    let mut users = Vec::new();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(UsersError::Read { path: dir, source }),
    };
    for entry in entries.into_iter().flatten() {
        let entry = entry.map_err(|source| UsersError::Read { path: dir.clone(), source })?;
        // What an agent leaves that is ended while it writes: until the file has its name it uses no image.
        if !entry.file_name().to_string_lossy().contains(".new-") {
            let note = entry.path();
            users.push(User { instances: noted(&note)?, note: Some(note) });
        }
    }
    if !users.iter().any(|user| user.instances == own) {
        users.push(User { instances: own.to_owned(), note: None });
    }
    users.sort_by(|a, b| a.instances.cmp(&b.instances));
    Ok(users)
}

/// The path in a note.
fn noted(note: &Path) -> Result<PathBuf, UsersError> {
    let malformed = || UsersError::Malformed { note: note.to_owned() };
    let failed = |source| UsersError::Read { path: note.to_owned(), source };
    if !fs::symlink_metadata(note).map_err(failed)?.is_file() {
        return Err(malformed());
    }
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file =
        File::options().read(true).custom_flags(flags.bits().cast_signed()).open(note).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(NOTE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    let whole = bytes.pop() == Some(b'\n') && !bytes.contains(&b'\n') && !bytes.contains(&0);
    let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
    let short = u64::try_from(path.as_os_str().len()).is_ok_and(|length| length < NOTE_MAX);
    if whole && short && path.is_absolute() { Ok(path) } else { Err(malformed()) }
}

/// What the disks of all agents lie over that use `images`. A folder that only the settings name may be missing: no agent
/// ever started with it.
pub(crate) fn uses(images: &Path, own: &Path) -> Result<Vec<DiskUse>, UsersError> {
    let mut all = Vec::new();
    for user in users(images, own)? {
        match in_use(&user.instances) {
            Ok(uses) => all.extend(uses),
            Err(error) if error.kind() == io::ErrorKind::NotFound && user.note.is_none() => {}
            Err(source) => return Err(user.unreadable(source)),
        }
    }
    all.sort_by(|a, b| a.instance.cmp(&b.instance));
    // One folder can have two names.
    all.dedup();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Site(tempfile::TempDir);

    impl Site {
        fn new() -> Self {
            let site = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(site.path("images/.users")).unwrap();
            site
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn note(&self, name: &str, text: &str) -> PathBuf {
            let note = self.path("images/.users").join(name);
            fs::write(&note, text).unwrap();
            note
        }

        /// A folder of instances with one that has no disk yet.
        fn agent(&self, name: &str, instance: u128) -> PathBuf {
            let dir = self.path(name);
            fs::create_dir_all(dir.join(uuid::Uuid::from_u128(instance).to_string())).unwrap();
            dir
        }

        fn uses(&self) -> Result<Vec<DiskUse>, UsersError> {
            uses(&self.path("images"), &self.path("own"))
        }
    }

    #[test]
    fn the_disks_of_every_agent_count_and_each_once() {
        let site = Site::new();
        assert_eq!(site.uses().unwrap(), []);
        let (own, other) = (site.agent("own", 1), site.agent("other", 2));
        assert_eq!(site.uses().unwrap().len(), 1);
        for (name, dir) in [("own", &own), ("other", &other)] {
            site.note(name, &format!("{}\n", dir.display()));
        }
        symlink(&other, site.path("alias")).unwrap();
        site.note("alias", &format!("{}\n", site.path("alias").display()));
        // A writer that was killed.
        site.note("other.new-123", "/half");
        assert_eq!(site.uses().unwrap().len(), 2);
    }

    #[test]
    fn what_a_note_names_must_be_there() {
        let site = Site::new();
        let text = format!("{}\n", site.path("gone").display());
        let note = site.note("gone", &text);
        let error = site.uses().unwrap_err();
        assert!(error.to_string().contains(note.to_str().unwrap()), "{error}");
        assert!(matches!(error, UsersError::Agent { .. }));
        site.agent("gone", 1);
        assert_eq!(site.uses().unwrap().len(), 1);
        // Also when the settings name it as well.
        let note = site.note("own", &format!("{}\n", site.path("own").display()));
        assert!(matches!(site.uses(), Err(UsersError::Agent { note: n, .. }) if n == note));
    }

    #[test]
    fn a_damaged_note_is_not_nobody() {
        for text in ["", "\n", "/a", "a/b\n", "/a\n/b\n", "/a\0b\n", &format!("/{}\n", "a".repeat(5000))] {
            let site = Site::new();
            let note = site.note("a", text);
            let error = site.uses().unwrap_err();
            assert!(matches!(&error, UsersError::Malformed { note: n } if *n == note), "{text:?}: {error}");
            assert!(error.to_string().contains("delete this file"), "{error}");
        }
        let site = Site::new();
        symlink("/dev/zero", site.path("images/.users/a")).unwrap();
        assert!(matches!(site.uses(), Err(UsersError::Malformed { .. })));
        let site = Site::new();
        fs::remove_dir(site.path("images/.users")).unwrap();
        fs::write(site.path("images/.users"), "").unwrap();
        assert!(matches!(site.uses(), Err(UsersError::Read { .. })));
    }
}
