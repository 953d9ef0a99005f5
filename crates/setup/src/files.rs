//! Files of the host, below a root. Owns how they are written so that a power cut leaves the old or the new one, and the
//! gate through which every effect goes. Called by everything here that touches a file.

use std::{
    fmt, fs,
    fs::{File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{Timespec, Timestamps};

use crate::error::SetupError;

/// What stands between an intention and the host: in production nothing, in tests what ends the program at any point.
pub trait Gate: fmt::Debug {
    /// Asked before every effect.
    ///
    /// # Errors
    /// When the effect must not happen.
    fn pass(&self, effect: &str) -> io::Result<()>;

    /// Waits until a file or folder is on disk.
    ///
    /// # Errors
    /// When it cannot be.
    fn settle(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    /// Waits until everything is on disk that was written to the file system of a folder.
    ///
    /// # Errors
    /// When it cannot be.
    fn settle_all(&self, dir: &File) -> io::Result<()> {
        Ok(rustix::fs::syncfs(dir)?)
    }
}

/// Lets everything happen.
#[derive(Debug)]
pub struct Open;

impl Gate for Open {
    fn pass(&self, _effect: &str) -> io::Result<()> {
        Ok(())
    }
}

/// Who may read a file, whose it is, and how old it says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Look {
    /// Permission bits.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change, seconds and nanoseconds; none: now.
    pub mtime: Option<(i64, i64)>,
}

/// The host's files.
#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    gate: Box<dyn Gate>,
}

impl Files {
    /// The files below `root`, `/` but in tests.
    pub fn below(root: impl Into<PathBuf>, gate: Box<dyn Gate>) -> Self {
        Self { root: root.into(), gate }
    }

    /// Where `path` really is.
    #[must_use]
    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The look of a file that belongs to whoever runs this: root, but in tests.
    #[must_use]
    pub fn mine(&self, mode: u32) -> Look {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Look { mode, uid, gid, mtime: None }
    }

    /// Content; none when there is no such file.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, SetupError> {
        match fs::read(self.at(path)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(SetupError::file("read", path, e)),
        }
    }

    /// Content as text; none when there is no such file.
    ///
    /// # Errors
    /// As [`Files::read`].
    pub fn text(&self, path: &str) -> Result<Option<String>, SetupError> {
        Ok(self.read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Whether there is something, a symlink to nothing included.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.at(path)).is_ok()
    }

    /// The look of a file; none when there is none.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn look(&self, path: &str) -> Result<Option<Look>, SetupError> {
        match fs::metadata(self.at(path)) {
            Ok(found) => Ok(Some(Look {
                mode: found.permissions().mode() & 0o7777,
                uid: found.uid(),
                gid: found.gid(),
                mtime: Some((found.mtime(), found.mtime_nsec())),
            })),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(SetupError::file("look at", path, e)),
        }
    }

    /// Whether it is a folder, and no link to one.
    #[must_use]
    pub fn is_dir(&self, path: &str) -> bool {
        fs::symlink_metadata(self.at(path)).is_ok_and(|found| found.is_dir())
    }

    /// Names in a folder, in order; none in one that is not there.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn names(&self, dir: &str) -> Result<Vec<String>, SetupError> {
        let entries = match fs::read_dir(self.at(dir)) {
            Ok(entries) => entries,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(SetupError::file("list", dir, e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| SetupError::file("list", dir, e))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Replaces a file, or makes it: afterwards it is on disk, or the old one is untouched.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, bytes: &[u8], look: Look) -> Result<(), SetupError> {
        let place = self.real(path);
        let aside = aside(&place);
        let done = (|| {
            self.gate.pass(&format!("write aside {path}"))?;
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            file.write_all(bytes)?;
            let found = file.metadata()?;
            if (found.uid(), found.gid()) != (look.uid, look.gid) {
                std::os::unix::fs::fchown(&file, Some(look.uid), Some(look.gid))?;
            }
            file.set_permissions(Permissions::from_mode(look.mode))?;
            if let Some((seconds, nanoseconds)) = look.mtime {
                let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
                rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time })?;
            }
            self.gate.settle(&file)?;
            self.gate.pass(&format!("rename over {path}"))?;
            fs::rename(&aside, &place)?;
            self.sync(place.parent())
        })();
        done.map_err(|e: io::Error| {
            // Of a full disk it would hold the last bytes. After a power cut the next removal or restoring takes it away.
            if self.gate.pass(&format!("remove what was begun of {path}")).is_ok() {
                let _ = fs::remove_file(&aside);
            }
            SetupError::file("write", path, e)
        })
    }

    /// Where a file is written: an owner's link stays one, and what it leads to is the file.
    fn real(&self, path: &str) -> PathBuf {
        let place = self.at(path);
        let is_link = fs::symlink_metadata(&place).is_ok_and(|found| found.is_symlink());
        if is_link { fs::canonicalize(&place).unwrap_or(place) } else { place }
    }

    /// Makes a folder; its parent is there. False: it was there already.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_dir(&self, path: &str, mode: u32) -> Result<bool, SetupError> {
        let place = self.at(path);
        if place.is_dir() {
            return Ok(false);
        }
        let done = (|| {
            self.gate.pass(&format!("make folder {path}"))?;
            fs::create_dir(&place)?;
            fs::set_permissions(&place, Permissions::from_mode(mode))?;
            self.sync(place.parent())
        })();
        done.map(|()| true).map_err(|e: io::Error| SetupError::file("make the folder", path, e))
    }

    /// Removes a file with what was left beside it. False: it was not there.
    ///
    /// # Errors
    /// Anything but absence.
    pub fn remove(&self, path: &str) -> Result<bool, SetupError> {
        self.remove_aside(path)?;
        self.remove_one(path, &self.at(path))
    }

    /// Removes what a power cut left beside a file that was being written.
    ///
    /// # Errors
    /// Anything but absence.
    pub fn remove_aside(&self, path: &str) -> Result<(), SetupError> {
        self.remove_one(path, &aside(&self.real(path))).map(drop)
    }

    fn remove_one(&self, path: &str, place: &Path) -> Result<bool, SetupError> {
        if fs::symlink_metadata(place).is_err() {
            return Ok(false);
        }
        let done = self.gate.pass(&format!("remove {}", place.display())).and_then(|()| {
            fs::remove_file(place)?;
            self.sync(place.parent())
        });
        done.map(|()| true).map_err(|e| SetupError::file("remove", path, e))
    }

    /// Removes a folder if it is empty. False: it is not, or not there.
    ///
    /// # Errors
    /// Anything else.
    pub fn remove_empty_dir(&self, path: &str) -> Result<bool, SetupError> {
        self.gate.pass(&format!("remove folder {path}")).map_err(|e| SetupError::file("remove", path, e))?;
        let done = match fs::remove_dir(self.at(path)) {
            Ok(()) => self.sync(self.at(path).parent()).map(|()| true),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::NotADirectory
                        // A file system of its own is mounted there: it is the owner's.
                        | io::ErrorKind::ResourceBusy
                ) =>
            {
                Ok(false)
            }
            Err(e) => Err(e),
        };
        done.map_err(|e| SetupError::file("remove the folder", path, e))
    }

    /// Removes a folder with everything in it; symlinks are not followed.
    ///
    /// # Errors
    /// Anything but absence.
    pub fn remove_tree(&self, path: &str) -> Result<bool, SetupError> {
        self.gate.pass(&format!("remove tree {path}")).map_err(|e| SetupError::file("remove", path, e))?;
        let removed = match qudata_host::durable::remove_tree(&self.at(path)) {
            Ok(removed) => removed,
            // What was in it is gone; a folder that a file system is mounted at stays the owner's.
            Err(_) if fs::read_dir(self.at(path)).is_ok_and(|mut left| left.next().is_none()) => true,
            Err(e) => return Err(SetupError::file("remove", path, e)),
        };
        if removed {
            self.sync(self.at(path).parent()).map_err(|e| SetupError::file("remove", path, e))?;
        }
        Ok(removed)
    }

    /// Waits until what was written to `file` is on disk.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn settle(&self, file: &File) -> io::Result<()> {
        self.gate.settle(file)
    }

    /// Waits until everything is on disk that another program wrote to the file system of `path`.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn settle_around(&self, path: &str) -> Result<(), SetupError> {
        let place = self.at(path);
        let dir = place.parent().unwrap_or(Path::new("/"));
        let done = File::open(dir).and_then(|dir| self.gate.settle_all(&dir));
        done.map_err(|e| SetupError::file("put on disk", path, e))
    }

    fn sync(&self, dir: Option<&Path>) -> io::Result<()> {
        self.gate.settle(&File::open(dir.unwrap_or(Path::new("/")))?)
    }
}

/// Where a file is written before it takes its place. One name, so that what a power cut leaves is found again; no
/// program reads files that end like this.
fn aside(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(".qudata-new");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_content_mode_and_time() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::below(dir.path(), Box::new(Open));
        let me = fs::metadata(dir.path()).unwrap();
        let look = Look { mode: 0o640, uid: me.uid(), gid: me.gid(), mtime: Some((1_000_000, 5)) };
        files.write("/a", b"one", look).unwrap();
        assert_eq!(
            (files.text("/a").unwrap().unwrap(), files.look("/a").unwrap()),
            ("one".into(), Some(look))
        );
        assert_eq!(files.names("/").unwrap(), ["a"]);
        assert!(files.remove("/a").unwrap() && !files.remove("/a").unwrap());
        assert_eq!(files.look("/a").unwrap(), None);
    }

    #[test]
    fn what_a_power_cut_left_beside_a_file_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::below(dir.path(), Box::new(Open));
        fs::write(dir.path().join("a.qudata-new"), "half").unwrap();
        assert!(!files.remove("/a").unwrap());
        assert!(files.names("/").unwrap().is_empty());
    }

    #[test]
    fn an_owners_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::below(dir.path(), Box::new(Open));
        fs::write(dir.path().join("kept.toml"), "theirs").unwrap();
        std::os::unix::fs::symlink("kept.toml", dir.path().join("agent.toml")).unwrap();
        files.write("/agent.toml", b"ours", files.mine(0o640)).unwrap();
        assert!(fs::symlink_metadata(dir.path().join("agent.toml")).unwrap().is_symlink());
        assert_eq!(files.text("/kept.toml").unwrap().unwrap(), "ours");
        fs::write(dir.path().join("kept.toml.qudata-new"), "half").unwrap();
        files.remove_aside("/agent.toml").unwrap();
        assert_eq!(files.names("/").unwrap(), ["agent.toml", "kept.toml"]);
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::below(dir.path(), Box::new(Open));
        // Nothing can be renamed over a folder: as good as a disk without room.
        fs::create_dir(dir.path().join("a")).unwrap();
        assert!(files.write("/a", b"text", files.mine(0o600)).is_err());
        assert_eq!(files.names("/").unwrap(), ["a"]);
    }

    /// Notes which folders were put on disk.
    #[derive(Debug, Clone, Default)]
    struct Settled(std::rc::Rc<std::cell::RefCell<Vec<u64>>>);

    impl Gate for Settled {
        fn pass(&self, _effect: &str) -> io::Result<()> {
            Ok(())
        }

        fn settle(&self, file: &File) -> io::Result<()> {
            self.0.borrow_mut().push(file.metadata()?.ino());
            Ok(())
        }
    }

    #[test]
    fn what_was_removed_stays_removed_when_the_power_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let settled = Settled::default();
        let files = Files::below(dir.path(), Box::new(settled.clone()));
        fs::create_dir_all(dir.path().join("home/full/deep")).unwrap();
        fs::create_dir(dir.path().join("home/empty")).unwrap();
        let home = fs::metadata(dir.path().join("home")).unwrap().ino();
        assert!(files.remove_tree("/home/full").unwrap() && !files.remove_tree("/home/full").unwrap());
        assert_eq!(settled.0.borrow_mut().split_off(0), [home]);
        assert!(files.remove_empty_dir("/home/empty").unwrap());
        assert_eq!(settled.0.borrow_mut().split_off(0), [home]);
    }
}
