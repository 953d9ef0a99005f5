//! The secret that callers of the TCP API present. Owns its shape, its file and the comparison; made or loaded at start by
//! the daemon, replaced by `control_plane`, asked by `http/auth`.

use std::{
    fmt,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use qudata_host::durable::{self, DurableError};
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;
use tokio::sync::watch;

/// Shortest and longest secret accepted from a file: the control plane's are not ours to shape.
const LENGTH: std::ops::RangeInclusive<usize> = 16..=512;

/// The secret. It is never printed; whoever needs it reads the file.
#[derive(Clone)]
pub struct AgentSecret(SecretString);

impl fmt::Debug for AgentSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentSecret")
    }
}

/// The agent has no secret to check callers by.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file is there and cannot be read.
    #[error("cannot read the agent's secret {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "{} is no secret: one line of 16 to 512 printable characters without spaces is; remove the file to get a new one",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// A new secret could not be kept.
    #[error("cannot keep a new secret for the agent")]
    Write(#[source] DurableError),
    /// The file can be read by others and that could not be changed.
    #[error("cannot take {} away from other users", path.display())]
    Protect {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl AgentSecret {
    /// The secret in the file at `path`; a new one, kept there, when the file is absent or empty (what a power cut leaves
    /// of a file that was not written durably).
    ///
    /// # Errors
    /// When the file cannot be read or written, or holds no secret.
    pub fn load_or_create(path: &Path) -> Result<Self, SecretError> {
        match Self::load(path)? {
            Some(secret) => Ok(secret),
            None => {
                let secret = Self::random();
                secret.save(path)?;
                Ok(secret)
            }
        }
    }

    /// The secret in the file at `path`, which is made private; none when the file is absent or empty.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no secret.
    pub fn load(path: &Path) -> Result<Option<Self>, SecretError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(SecretError::Malformed { path: path.to_owned() });
            }
            Err(source) => return Err(SecretError::Read { path: path.to_owned(), source }),
        };
        let text = SecretString::from(text);
        let line = text.expose_secret().trim_end();
        if line.is_empty() {
            return Ok(None);
        }
        let secret = Self::parse(line).ok_or_else(|| SecretError::Malformed { path: path.to_owned() })?;
        fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(|source| SecretError::Protect { path: path.to_owned(), source })?;
        Ok(Some(secret))
    }

    /// A secret that somebody else made; none when it has not the shape of one: 16 to 512 printable ASCII characters
    /// without spaces.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = LENGTH.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        plain.then(|| Self(text.into()))
    }

    /// A new secret, known to nobody yet.
    pub fn random() -> Self {
        use std::fmt::Write;
        let mut hex = String::with_capacity(64);
        for byte in rand::random::<[u8; 32]>() {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex.into())
    }

    /// Keeps it in the file at `path`, which holds the old one or this one, never half of it.
    ///
    /// # Errors
    /// When the file cannot be written; it is as it was then.
    pub fn save(&self, path: &Path) -> Result<(), SecretError> {
        durable::replace(path, self.0.expose_secret().as_bytes(), 0o600).map_err(SecretError::Write)
    }

    /// The text, for the header of a call to the control plane.
    pub(crate) fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// Whether `given` is the secret. How long it takes does not tell how much of it is right.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.0.expose_secret().as_bytes().ct_eq(given).into()
    }
}

/// The secret as it is at any moment: the control plane may replace it, and the old one is worth nothing from then on.
#[derive(Debug, Clone)]
pub struct CurrentSecret(watch::Receiver<AgentSecret>);

impl CurrentSecret {
    /// Whether `given` is the secret now.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.0.borrow().matches(given)
    }
}

impl From<watch::Receiver<AgentSecret>> for CurrentSecret {
    fn from(secret: watch::Receiver<AgentSecret>) -> Self {
        Self(secret)
    }
}

impl From<AgentSecret> for CurrentSecret {
    /// One that never changes.
    fn from(secret: AgentSecret) -> Self {
        Self(watch::Sender::new(secret).subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_new_secret_is_kept_private_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent_secret");
        let made = AgentSecret::load_or_create(&path).unwrap();
        let kept = fs::read_to_string(&path).unwrap();
        assert_eq!((kept.len(), mode(&path)), (64, 0o600));
        assert!(made.matches(kept.as_bytes()));
        assert!(AgentSecret::load_or_create(&path).unwrap().matches(kept.as_bytes()));
        assert_eq!(fs::read_to_string(&path).unwrap(), kept, "loading changes nothing");
        assert!(!AgentSecret::load_or_create(&dir.path().join("other")).unwrap().matches(kept.as_bytes()));
    }

    #[test]
    fn only_the_whole_secret_matches() {
        let secret = AgentSecret("0123456789abcdef".into());
        for wrong in
            ["", "0", "0123456789abcde", "0123456789abcdeF", "0123456789abcdef ", "0123456789abcdef0"]
        {
            assert!(!secret.matches(wrong.as_bytes()), "{wrong:?}");
        }
        assert!(secret.matches(b"0123456789abcdef"));
    }

    #[test]
    fn a_file_from_elsewhere_is_used_and_made_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent_secret");
        fs::write(&path, "from-the-control-plane\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert!(AgentSecret::load_or_create(&path).unwrap().matches(b"from-the-control-plane"));
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn an_empty_file_is_replaced_and_any_other_text_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent_secret");
        fs::write(&path, "\n").unwrap();
        let made = AgentSecret::load_or_create(&path).unwrap();
        assert!(made.matches(&fs::read(&path).unwrap()));
        for bad in
            [&b"canary"[..], b"canary canary canary canary", b"canary-canary-canary\nline", b"\xff\xfe\xff"]
        {
            fs::write(&path, bad).unwrap();
            let error = AgentSecret::load_or_create(&path).unwrap_err();
            assert!(matches!(error, SecretError::Malformed { .. }), "{error:?}");
            assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
            assert_eq!(fs::read(&path).unwrap(), bad, "a refused file is left alone");
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        let secret = AgentSecret("0123456789abcdef".into());
        assert_eq!(format!("{secret:?}"), "AgentSecret");
        let printed = format!("{:?}", CurrentSecret::from(secret));
        assert!(!printed.contains("0123"), "{printed}");
    }

    #[test]
    fn the_old_secret_is_worth_nothing_once_there_is_a_new_one() {
        let (old, new) = (AgentSecret::random(), AgentSecret::random());
        let sender = watch::Sender::new(old.clone());
        let current = CurrentSecret::from(sender.subscribe());
        assert!(current.matches(old.expose().as_bytes()));
        sender.send_replace(new.clone());
        assert!(current.matches(new.expose().as_bytes()) && !current.matches(old.expose().as_bytes()));
        drop(sender);
        assert!(current.matches(new.expose().as_bytes()), "the last one stays");
    }

    #[test]
    fn secrets_of_others_have_a_shape() {
        let longest = "x".repeat(512);
        for fine in ["0123456789abcdef", "s3cr3t-\"{}'\\~!/=+", longest.as_str()] {
            assert!(AgentSecret::parse(fine).unwrap().matches(fine.as_bytes()));
        }
        let too_long = "x".repeat(513);
        for bad in [
            "",
            "short",
            "0123456789abcdef\n",
            "0123456789 abcdef",
            "0123456789abcd\u{e9}f",
            too_long.as_str(),
        ] {
            assert!(AgentSecret::parse(bad).is_none(), "{bad:?}");
        }
    }
}
