//! What is written down about an image: its manifest. Made by `build`, kept and read by `store`.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Digits of an id.
const DIGITS: usize = 16;

/// Name of an image: the first 16 digits of the SHA-256 of its disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(String);

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no id of an image: it has {DIGITS} hexadecimal digits, see `qudata-agent image list`")]
pub struct ParseIdError {
    /// What was given, cut to 40 characters.
    pub text: String,
}

impl FromStr for ImageId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let hexadecimal = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() == DIGITS && hexadecimal {
            return Ok(Self(text.to_owned()));
        }
        Err(ParseIdError { text: text.chars().take(40).collect() })
    }
}

impl TryFrom<String> for ImageId {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, ParseIdError> {
        text.parse()
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ImageId {
    /// The id of a disk with this SHA-256.
    pub(crate) fn of(digest: &Digest) -> Self {
        Self(digest.hex().chars().take(DIGITS).collect())
    }
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its name.
    pub id: ImageId,
    /// SHA-256 of the disk.
    pub sha256: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// Bytes of the disk's file.
    pub size: u64,
    /// Bytes of the disk that a machine sees: no instance can have less.
    pub virtual_size: u64,
    /// What it was made from.
    pub base: BaseRecord,
    /// What was asked for.
    pub options: Options,
    /// The system's name, as it tells it; none when it was not customised.
    pub system: Option<String>,
    /// Kernel that it boots.
    pub kernel: Option<String>,
    /// NVIDIA driver.
    pub driver: Option<DriverRecord>,
    /// All packages and their versions.
    pub packages: Vec<(String, String)>,
}

/// What an image was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRecord {
    /// `debian-12`, an address or a file.
    pub name: String,
    /// Where it was fetched.
    pub from: String,
    /// `sha256:…` or `sha512:…` of what was fetched.
    pub digest: String,
    /// What proved it, in words.
    pub proof: String,
}

/// The driver inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverRecord {
    /// Version of the kernel module.
    pub version: String,
    /// `open` or `proprietary`.
    pub modules: String,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Whether it was booted once and changed.
    pub customised: bool,
    /// `--driver`.
    pub driver: String,
    /// `--package`.
    pub packages: Vec<String>,
    /// `--jupyter`.
    pub jupyter: bool,
    /// `--container-toolkit`.
    pub container_toolkit: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_no_paths() {
        assert!("0123456789abcdef".parse::<ImageId>().is_ok());
        for text in ["", "..", "0123456789abcde", "0123456789ABCDEF", "../../etc/passwd", "0123456789abcde/"]
        {
            assert!(text.parse::<ImageId>().is_err(), "{text}");
            assert!(serde_json::from_value::<ImageId>(text.into()).is_err(), "{text}");
        }
    }
}
