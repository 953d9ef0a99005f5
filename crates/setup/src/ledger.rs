//! Changes that can be taken back. Owns the order that makes a power cut harmless: backup, list, change, look, list.
//! `install` changes through it, `uninstall` takes back through it.
//!
//! A file is taken back only when it still is what was written: what somebody else made of it since is theirs.

use sha2::{Digest, Sha256};

use crate::{
    error::SetupError,
    files::{Files, Look},
    manifest::{Backup, Entry, Manifest},
    places,
};

/// Changes of one run, with the list of all so far.
#[derive(Debug)]
pub struct Ledger<'a> {
    files: &'a Files,
    /// The list.
    pub manifest: Manifest,
}

/// A file to be written.
#[derive(Debug, Clone)]
pub struct NewFile<'a> {
    /// Where.
    pub path: &'a str,
    /// What.
    pub bytes: &'a [u8],
    /// Who may read it, whose it is.
    pub look: Look,
    /// Its checksum is salted in the list, so that two hosts with the same secret do not show it.
    pub secret: bool,
}

/// What became of a change that was taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undone {
    /// It is as it was.
    Restored,
    /// It was so already.
    Nothing,
    /// Somebody else changed it since; it was left alone, and why.
    Kept(String),
}

/// Checksum as text.
#[must_use]
pub fn checksum(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl<'a> Ledger<'a> {
    /// Goes on with the list on disk, or begins one. The folder of the list is there.
    ///
    /// # Errors
    /// When the list is damaged.
    pub fn open(files: &'a Files) -> Result<Self, SetupError> {
        Ok(Self { files, manifest: Manifest::load(files)?.unwrap_or_default() })
    }

    /// Puts the list on disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<(), SetupError> {
        self.manifest.save(self.files)
    }

    /// Adds an entry, on disk, unless there is an equal one.
    ///
    /// # Errors
    /// When the list cannot be written.
    pub fn note(&mut self, entry: Entry) -> Result<(), SetupError> {
        if !self.manifest.entries.contains(&entry) {
            self.manifest.entries.push(entry);
            self.save()?;
        }
        Ok(())
    }

    /// Makes the folders above `path` that are missing.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn make_parents(&mut self, path: &str) -> Result<(), SetupError> {
        let mut dir = String::new();
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        for part in parts.iter().take(parts.len().saturating_sub(1)) {
            dir.push('/');
            dir.push_str(part);
            if !self.files.exists(&dir) {
                self.note(Entry::Folder { path: dir.clone() })?;
                self.files.make_dir(&dir, 0o755)?;
            }
        }
        Ok(())
    }

    /// Writes a file, unless it is so already. False: it was.
    ///
    /// # Errors
    /// When it cannot be kept, written or read back.
    pub fn put(&mut self, new: &NewFile<'_>) -> Result<bool, SetupError> {
        let found = self.files.read(new.path)?;
        let same_look = self.files.look(new.path)?.is_some_and(|look| {
            (look.mode, look.uid, look.gid) == (new.look.mode, new.look.uid, new.look.gid)
        });
        let known = self.position(new.path);
        if found.as_deref() == Some(new.bytes) && same_look {
            if let Some(index) = known {
                self.mark_done(index)?;
            }
            return Ok(false);
        }
        self.make_parents(new.path)?;
        let index = match known {
            Some(index) => index,
            None => {
                let before = self.back_up(new.path, new.secret)?;
                let (path, secret) = (new.path.to_owned(), new.secret);
                self.manifest.entries.push(Entry::File {
                    path,
                    before,
                    after: Vec::new(),
                    secret,
                    done: false,
                    edited: Vec::new(),
                });
                self.manifest.entries.len() - 1
            }
        };
        self.keep_edited(index, found.as_deref())?;
        let sum = self.sum(new.bytes, new.secret);
        if let Some(Entry::File { after, done, .. }) = self.manifest.entries.get_mut(index) {
            *done = false;
            after.retain(|known| *known != sum);
            after.push(sum);
        }
        self.save()?;
        self.files.write(new.path, new.bytes, new.look)?;
        if self.files.read(new.path)?.as_deref() != Some(new.bytes) {
            let cause = std::io::Error::other("it does not hold what was written");
            return Err(SetupError::file("write", new.path, cause));
        }
        self.mark_done(index)?;
        Ok(true)
    }

    /// What somebody else made of a file since it was written last goes into the next one, and would go with it when that
    /// is taken back. A secret that was typed anew replaces the one before.
    fn keep_edited(&mut self, index: usize, found: Option<&[u8]>) -> Result<(), SetupError> {
        let Some(found) = found else { return Ok(()) };
        let sum = checksum(found);
        let theirs = match self.manifest.entries.get(index) {
            Some(Entry::File { path, before, after, secret: false, edited, .. }) => {
                let copies = before.iter().chain(edited).map(|backup| &backup.sha256);
                let known = copies.chain(after).any(|known| *known == sum);
                (!known).then(|| path.clone())
            }
            _ => None,
        };
        let Some(path) = theirs else { return Ok(()) };
        let copy = self.back_up(&path, false)?;
        if let Some(Entry::File { edited, .. }) = self.manifest.entries.get_mut(index) {
            edited.extend(copy);
        }
        Ok(())
    }

    /// Checksum as the list keeps it; of a secret only together with the list's salt.
    fn sum(&self, bytes: &[u8], secret: bool) -> String {
        if secret { checksum(&[self.manifest.salt.as_bytes(), bytes].concat()) } else { checksum(bytes) }
    }

    fn position(&self, wanted: &str) -> Option<usize> {
        self.manifest
            .entries
            .iter()
            .position(|entry| matches!(entry, Entry::File { path, .. } if path == wanted))
    }

    fn mark_done(&mut self, index: usize) -> Result<(), SetupError> {
        match self.manifest.entries.get_mut(index) {
            Some(Entry::File { done, .. }) if !*done => {
                *done = true;
                self.save()
            }
            _ => Ok(()),
        }
    }

    /// Keeps a copy of a file; none when it is not there.
    ///
    /// # Errors
    /// When it cannot be read, or the copy not be written.
    pub fn back_up(&mut self, path: &str, secret: bool) -> Result<Option<Backup>, SetupError> {
        let (Some(bytes), Some(look)) = (self.files.read(path)?, self.files.look(path)?) else {
            return Ok(None);
        };
        let name = format!("{:04}", self.manifest.next_backup);
        self.manifest.next_backup += 1;
        self.files.make_dir(places::BACKUP, 0o700)?;
        self.files.write(&format!("{}/{name}", places::BACKUP), &bytes, self.files.mine(0o600))?;
        Ok(Some(Backup { name, look, sha256: self.sum(&bytes, secret) }))
    }

    /// Writes a file down again from its copy; what had none is removed.
    ///
    /// # Errors
    /// When the copy is gone, or the file cannot be written.
    pub fn copy_back(&self, path: &str, before: Option<&Backup>) -> Result<(), SetupError> {
        let Some(backup) = before else { return self.files.remove(path).map(drop) };
        let kept = format!("{}/{}", places::BACKUP, backup.name);
        let bytes = self.files.read(&kept)?.ok_or_else(|| {
            SetupError::file("read", &kept, std::io::Error::from(std::io::ErrorKind::NotFound))
        })?;
        self.files.write(path, &bytes, backup.look)
    }

    /// Puts a copy where the end of the list does not end it; where.
    ///
    /// # Errors
    /// When it cannot be written there.
    pub fn outlive(&self, backup: &Backup) -> Result<String, SetupError> {
        let kept = format!("{}/{}", places::BACKUP, backup.name);
        let Some(bytes) = self.files.read(&kept)? else { return Ok(kept) };
        self.keep_for_good(&backup.name, &bytes)
    }

    /// Copies a file of somebody else's that goes with a package; where to.
    ///
    /// # Errors
    /// When it cannot be read, or the copy not be written.
    pub fn keep_theirs(&self, path: &str) -> Result<Option<String>, SetupError> {
        let Some(bytes) = self.files.read(path)? else { return Ok(None) };
        self.keep_for_good(&path.trim_start_matches('/').replace('/', "_"), &bytes).map(Some)
    }

    fn keep_for_good(&self, name: &str, bytes: &[u8]) -> Result<String, SetupError> {
        let time: String = self.manifest.since.chars().filter(char::is_ascii_digit).take(14).collect();
        let dir = format!("/var/backups/qudata-{time}");
        self.files.make_dir("/var/backups", 0o755)?;
        self.files.make_dir(&dir, 0o700)?;
        let place = format!("{dir}/{name}");
        self.files.write(&place, bytes, self.files.mine(0o600))?;
        Ok(place)
    }

    /// Takes one file back.
    ///
    /// # Errors
    /// When it cannot be; it is still in the list then.
    pub fn restore(
        &self,
        path: &str,
        before: Option<&Backup>,
        after: &[String],
        secret: bool,
    ) -> Result<Undone, SetupError> {
        self.files.remove_aside(path)?;
        let found = self.files.read(path)?;
        let sum = found.as_deref().map(|bytes| self.sum(bytes, secret));
        let was = before.map(|backup| &backup.sha256);
        let untouched = match (&found, before) {
            (None, None) => true,
            (Some(_), Some(_)) => sum.as_ref() == was && !after.iter().any(|s| Some(s) == was),
            _ => false,
        };
        if untouched {
            return Ok(Undone::Nothing);
        }
        let ours = sum.as_ref().is_some_and(|sum| after.contains(sum));
        let Some(backup) = before else {
            if !ours {
                return Ok(Undone::Kept(format!(
                    "{path} was changed by somebody else since: it is left as it is"
                )));
            }
            self.files.remove(path)?;
            return Ok(Undone::Restored);
        };
        let kept = format!("{}/{}", places::BACKUP, backup.name);
        if !ours {
            let what = if found.is_some() { "changed" } else { "removed" };
            let kept = self.outlive(backup)?;
            let text = format!(
                "{path} was {what} by somebody else since: it is left so; as it was it lies in {kept}"
            );
            return Ok(Undone::Kept(text));
        }
        let bytes = self.files.read(&kept)?.filter(|bytes| backup.sha256 == self.sum(bytes, secret));
        let Some(bytes) = bytes else {
            return Ok(Undone::Kept(format!(
                "{path} is left as it is: its backup {kept} is gone or damaged"
            )));
        };
        self.files.write(path, &bytes, backup.look)?;
        Ok(Undone::Restored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Open;

    struct Host {
        _dir: tempfile::TempDir,
        files: Files,
    }

    fn host() -> Host {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("var/lib/qudata/setup")).unwrap();
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        let files = Files::below(dir.path(), Box::new(Open));
        Host { _dir: dir, files }
    }

    fn put(ledger: &mut Ledger<'_>, path: &str, text: &str) -> bool {
        let look = ledger.files.mine(0o644);
        ledger.put(&NewFile { path, bytes: text.as_bytes(), look, secret: false }).unwrap()
    }

    fn undo(ledger: &Ledger<'_>) -> Undone {
        let entry = ledger.manifest.entries.iter().find(|e| matches!(e, Entry::File { .. })).unwrap();
        let Entry::File { path, before, after, secret, .. } = entry else { unreachable!() };
        ledger.restore(path, before.as_ref(), after, *secret).unwrap()
    }

    #[test]
    fn a_file_comes_back_with_its_mode_and_time_however_often_it_was_written() {
        let host = host();
        let look = Look { mtime: Some((1_000, 0)), ..host.files.mine(0o604) };
        host.files.write("/etc/a", b"owner", look).unwrap();
        for text in ["one", "two", "one"] {
            let mut ledger = Ledger::open(&host.files).unwrap();
            assert!(put(&mut ledger, "/etc/a", text) && !put(&mut ledger, "/etc/a", text));
        }
        let ledger = Ledger::open(&host.files).unwrap();
        assert_eq!((undo(&ledger), undo(&ledger)), (Undone::Restored, Undone::Nothing));
        assert_eq!(host.files.read("/etc/a").unwrap().unwrap(), b"owner");
        assert_eq!(host.files.look("/etc/a").unwrap(), Some(look));
    }

    #[test]
    fn what_somebody_else_made_of_it_is_left_alone() {
        let host = host();
        host.files.write("/etc/a", b"owner", host.files.mine(0o644)).unwrap();
        let mut ledger = Ledger::open(&host.files).unwrap();
        put(&mut ledger, "/etc/a", "ours");
        put(&mut ledger, "/etc/new/b", "ours");
        for (text, said) in [(Some("theirs"), "changed"), (None, "removed")] {
            match text {
                Some(text) => host.files.write("/etc/a", text.as_bytes(), host.files.mine(0o644)).unwrap(),
                None => drop(host.files.remove("/etc/a").unwrap()),
            }
            let Undone::Kept(why) = undo(&ledger) else { panic!("taken back") };
            assert!(why.contains(said), "{why}");
            assert_eq!(host.files.text("/etc/a").unwrap().as_deref(), text);
        }
        assert!(ledger.manifest.entries.contains(&Entry::Folder { path: "/etc/new".into() }));
    }

    #[test]
    fn what_somebody_else_made_of_it_before_it_was_written_anew_is_kept() {
        let host = host();
        let mut ledger = Ledger::open(&host.files).unwrap();
        put(&mut ledger, "/etc/a", "ours");
        host.files.write("/etc/a", b"ours and theirs", host.files.mine(0o644)).unwrap();
        for text in ["ours anew", "ours again"] {
            put(&mut ledger, "/etc/a", text);
        }
        let ledger = Ledger::open(&host.files).unwrap();
        assert_eq!(undo(&ledger), Undone::Restored);
        let edited = ledger.manifest.entries.iter().find_map(|entry| match entry {
            Entry::File { edited, .. } => Some(edited.as_slice()),
            _ => None,
        });
        let Some([edited]) = edited else { panic!("{edited:?}") };
        let place = ledger.outlive(edited).unwrap();
        assert!(place.starts_with("/var/backups/qudata-"), "{place}");
        assert_eq!(host.files.text(&place).unwrap().unwrap(), "ours and theirs");
    }

    #[test]
    fn what_a_power_cut_left_beside_a_restored_file_goes() {
        let host = host();
        let mut ledger = Ledger::open(&host.files).unwrap();
        put(&mut ledger, "/etc/a", "ours");
        host.files.write("/etc/a", b"theirs", host.files.mine(0o644)).unwrap();
        host.files.write("/etc/a.qudata-new", b"half", host.files.mine(0o644)).unwrap();
        assert!(matches!(undo(&ledger), Undone::Kept(_)));
        assert!(!host.files.exists("/etc/a.qudata-new"));
    }

    #[test]
    fn a_secret_leaves_nothing_in_the_list() {
        let host = host();
        let mut ledger = Ledger::open(&host.files).unwrap();
        let look = host.files.mine(0o600);
        ledger.put(&NewFile { path: "/etc/key", bytes: b"canary", look, secret: true }).unwrap();
        let list = host.files.text(places::MANIFEST).unwrap().unwrap();
        assert!(!list.contains("canary") && !list.contains(&checksum(b"canary")), "{list}");
        assert_eq!(undo(&ledger), Undone::Restored);
        assert!(!host.files.exists("/etc/key"));
    }

    #[test]
    fn a_secret_that_somebody_changed_since_is_theirs_too() {
        let host = host();
        let look = host.files.mine(0o600);
        for before in [None, Some("older")] {
            let path = "/etc/key";
            let _ = host.files.remove(places::MANIFEST).unwrap();
            match before {
                Some(text) => host.files.write(path, text.as_bytes(), look).unwrap(),
                None => drop(host.files.remove(path).unwrap()),
            }
            let mut ledger = Ledger::open(&host.files).unwrap();
            ledger.put(&NewFile { path, bytes: b"ours", look, secret: true }).unwrap();
            host.files.write(path, b"theirs", look).unwrap();
            // Another run reads the list from the disk.
            let ledger = Ledger::open(&host.files).unwrap();
            let Undone::Kept(why) = undo(&ledger) else { panic!("taken back: {before:?}") };
            assert!(why.contains("changed") && !why.contains("theirs"), "{why}");
            assert_eq!(host.files.text(path).unwrap().unwrap(), "theirs");
            host.files.write(path, b"ours", look).unwrap();
            assert_eq!(undo(&ledger), Undone::Restored);
            assert_eq!(host.files.text(path).unwrap().as_deref(), before);
        }
    }

    #[test]
    fn a_damaged_list_stops_everything() {
        let host = host();
        for text in ["", "{", "{\"version\":9,\"since\":\"\",\"next_backup\":1,\"entries\":[]}"] {
            host.files.write(places::MANIFEST, text.as_bytes(), host.files.mine(0o600)).unwrap();
            let error = Ledger::open(&host.files).unwrap_err();
            assert_eq!(error.code.as_str(), "manifest_damaged");
        }
    }
}
