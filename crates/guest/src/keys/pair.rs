//! The key pairs that the agent makes: a host key per guest, so that nothing is trusted on first use, and one
//! management key with which the agent logs in. Private halves cannot be printed.

use super::GuestKey;
use qudata_host::durable::{self, DurableError};
use russh::keys::{
    Algorithm, PrivateKey,
    ssh_key::{self, LineEnding},
};
use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A key pair could not be made or taken apart.
#[derive(Debug, thiserror::Error)]
#[error("cannot {attempt} an SSH key pair")]
pub struct KeyGenerationError {
    /// What was tried, as a verb.
    pub attempt: &'static str,
    /// Why it failed.
    #[source]
    pub source: ssh_key::Error,
}

fn failed(attempt: &'static str) -> impl FnOnce(ssh_key::Error) -> KeyGenerationError {
    move |source| KeyGenerationError { attempt, source }
}

/// A key file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// There is no such file: the caller makes a new key.
    #[error("there is no management key at {path}")]
    Absent {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It exists and cannot be read.
    #[error("cannot read the management key {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its content is not an unencrypted ed25519 key in OpenSSH format.
    #[error("the management key {path} is not an unencrypted ed25519 key in OpenSSH format")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says; none when the key is of another kind.
        #[source]
        source: Option<ssh_key::Error>,
    },
    /// It cannot be written.
    #[error("cannot save the management key")]
    Write {
        /// Which file, and why.
        #[source]
        source: DurableError,
    },
}

/// The ed25519 key with which one guest's sshd identifies itself.
pub struct HostKey {
    private: String,
    public: GuestKey,
}

impl HostKey {
    /// Makes a new pair.
    ///
    /// # Errors
    /// When the key library fails.
    pub fn generate() -> Result<HostKey, KeyGenerationError> {
        HostKey::from_private(&generate_ed25519()?)
    }

    pub(crate) fn from_private(key: &PrivateKey) -> Result<HostKey, KeyGenerationError> {
        let public = GuestKey::from_public(key.public_key().clone(), "").map_err(failed("encode"))?;
        let private = key.to_openssh(LineEnding::LF).map_err(failed("encode"))?.to_string();
        Ok(HostKey { private, public })
    }

    /// The public half: what a session pins. `to_line` and `parse` carry it through a store.
    #[must_use]
    pub fn public(&self) -> &GuestKey {
        &self.public
    }

    /// The private half in OpenSSH format, for the seed alone.
    pub(crate) fn private_openssh(&self) -> &str {
        &self.private
    }
}

impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostKey({})", self.public.fingerprint())
    }
}

/// The key with which the agent logs in to its guests as root. Cheap to clone.
#[derive(Clone)]
pub struct ManagementKey {
    private: Arc<PrivateKey>,
    public: GuestKey,
}

impl ManagementKey {
    /// Makes a new pair; [`ManagementKey::save`] keeps it.
    ///
    /// # Errors
    /// When the key library fails.
    pub fn generate() -> Result<ManagementKey, KeyGenerationError> {
        ManagementKey::from_private(generate_ed25519()?).map_err(failed("encode"))
    }

    fn from_private(private: PrivateKey) -> Result<ManagementKey, ssh_key::Error> {
        let public = GuestKey::from_public(private.public_key().clone(), "qudata-agent")?;
        Ok(ManagementKey { private: Arc::new(private), public })
    }

    /// Reads the key file at `path`.
    ///
    /// # Errors
    /// [`KeyFileError::Absent`] when there is none; otherwise what is wrong with it.
    pub fn load(path: &Path) -> Result<ManagementKey, KeyFileError> {
        let damaged = |source| KeyFileError::Damaged { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => KeyFileError::Absent { path: path.to_owned() },
            _ => KeyFileError::Read { path: path.to_owned(), source },
        })?;
        let private = PrivateKey::from_openssh(&text).map_err(|e| damaged(Some(e)))?;
        if private.is_encrypted() || private.algorithm() != Algorithm::Ed25519 {
            return Err(damaged(None));
        }
        ManagementKey::from_private(private).map_err(|e| damaged(Some(e)))
    }

    /// Writes the key file at `path`, readable by its owner only.
    ///
    /// # Errors
    /// When the directory is missing or not writable.
    pub fn save(&self, path: &Path) -> Result<(), KeyFileError> {
        let text = self
            .private
            .to_openssh(LineEnding::LF)
            .map_err(|e| KeyFileError::Damaged { path: path.to_owned(), source: Some(e) })?;
        durable::replace(path, text.as_bytes(), 0o600).map_err(|source| KeyFileError::Write { source })
    }

    /// The public half: what a guest authorises.
    #[must_use]
    pub fn public(&self) -> &GuestKey {
        &self.public
    }

    /// The private half, for the session alone.
    pub(crate) fn private(&self) -> Arc<PrivateKey> {
        Arc::clone(&self.private)
    }
}

impl fmt::Debug for ManagementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ManagementKey({})", self.public.fingerprint())
    }
}

fn generate_ed25519() -> Result<PrivateKey, KeyGenerationError> {
    PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).map_err(failed("generate"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_saved_key_comes_back_private_to_its_owner_and_readable_by_openssh() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("management_key");
        let key = ManagementKey::generate().unwrap();
        key.save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(ManagementKey::load(&path).unwrap().public(), key.public());
        let derived = std::process::Command::new("ssh-keygen").arg("-yf").arg(&path).output().unwrap();
        let derived = String::from_utf8(derived.stdout).unwrap();
        assert_eq!(&GuestKey::parse(&derived).unwrap(), key.public());
    }

    #[test]
    fn absence_and_damage_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("management_key");
        assert!(matches!(ManagementKey::load(&path), Err(KeyFileError::Absent { .. })));
        std::fs::write(&path, "not a key").unwrap();
        assert!(matches!(ManagementKey::load(&path), Err(KeyFileError::Damaged { .. })));
    }

    #[test]
    fn no_debug_output_holds_a_private_half() {
        let host = HostKey::generate().unwrap();
        let shown = format!("{host:?} {:?}", ManagementKey::generate().unwrap());
        assert!(!shown.contains("PRIVATE"), "{shown}");
        let body = host.private_openssh().lines().nth(3).unwrap();
        assert!(!shown.contains(body), "{shown}");
    }

    #[test]
    fn two_keys_differ() {
        assert_ne!(HostKey::generate().unwrap().public(), HostKey::generate().unwrap().public());
    }
}
