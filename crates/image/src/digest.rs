//! SHA-256 and SHA-512 of files, and the lists that distributions publish of them. Called by `obtain` and `store`.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest as _, Sha256, Sha512};

/// A digest in hexadecimal, lower case. Its length tells the algorithm: 64 digits are SHA-256, 128 are SHA-512.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest(String);

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no digest: SHA-256 has 64 hexadecimal digits, SHA-512 has 128")]
pub struct ParseDigestError {
    /// What was given, cut to 140 characters.
    pub text: String,
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        if matches!(text.len(), 64 | 128) && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Self(text.to_ascii_lowercase()));
        }
        Err(ParseDigestError { text: text.chars().take(140).collect() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.0)
    }
}

impl Digest {
    /// `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        if self.is_long() { "sha512" } else { "sha256" }
    }

    /// The hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0
    }

    fn is_long(&self) -> bool {
        self.0.len() == 128
    }

    /// The digest of a file by the same algorithm. Reads the whole file; `read` counts the bytes.
    pub(crate) fn of_file_like(&self, path: &Path, read: &AtomicU64) -> io::Result<Self> {
        if self.is_long() { hash::<Sha512>(path, read) } else { hash::<Sha256>(path, read) }
    }

    /// The SHA-256 of a file.
    pub(crate) fn sha256_of(path: &Path, read: &AtomicU64) -> io::Result<Self> {
        hash::<Sha256>(path, read)
    }

    /// The SHA-256 of a text.
    pub(crate) fn sha256_of_text(text: &str) -> Self {
        Self(hex(&Sha256::digest(text.as_bytes())))
    }
}

fn hash<H: sha2::Digest>(path: &Path, read: &AtomicU64) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hash = H::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(Digest(hex(&hash.finalize())));
        }
        hash.update(buffer.get(..count).unwrap_or_default());
        read.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest that a list has for the file `name`: lines `digest  name`, `digest *name`, or `SHA256 (name) = digest`. None
/// also where the list has two different ones.
pub(crate) fn find(list: &str, name: &str) -> Option<Digest> {
    let mut found = list.lines().filter_map(entry).filter(|(of, _)| *of == name).map(|(_, digest)| digest);
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

fn entry(line: &str) -> Option<(&str, Digest)> {
    if let Some((head, digest)) = line.split_once(") = ") {
        let (_, name) = head.split_once(" (")?;
        return Some((name, digest.trim().parse().ok()?));
    }
    let (digest, rest) = line.split_once(' ')?;
    let name = rest.strip_prefix([' ', '*'])?;
    Some((name.strip_prefix("./").unwrap_or(name), digest.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn files_are_hashed_by_both() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        let read = AtomicU64::new(0);
        let short = Digest::sha256_of(file.path(), &read).unwrap();
        assert_eq!(short.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(read.load(Ordering::Relaxed), 3);
        let long: Digest = "ab".repeat(64).parse().unwrap();
        let long = long.of_file_like(file.path(), &read).unwrap();
        assert!(long.to_string().starts_with("sha512:ddaf35a193617abacc417349ae204131"), "{long}");
    }

    #[test]
    fn lists_as_distributions_write_them() {
        let long = "cd".repeat(64);
        let list = format!("{EMPTY} *a.img\n{long}  ./b.img\nSHA256 (c d.img) = {EMPTY}\nrubbish\n\n");
        assert_eq!(find(&list, "a.img").unwrap().hex(), EMPTY);
        assert_eq!(find(&list, "b.img").unwrap().algorithm(), "sha512");
        assert_eq!(find(&list, "c d.img").unwrap().hex(), EMPTY);
        for missing in ["img", "A.img", "", "rubbish"] {
            assert_eq!(find(&list, missing), None, "{missing}");
        }
    }

    #[test]
    fn a_list_that_contradicts_itself_proves_nothing() {
        let other = "ab".repeat(32);
        assert_eq!(find(&format!("{EMPTY}  a\n{other}  a\n"), "a"), None);
        assert!(find(&format!("{EMPTY}  a\n{EMPTY}  a\n"), "a").is_some());
    }

    #[test]
    fn digests_are_hexadecimal_of_two_lengths() {
        assert_eq!(EMPTY.to_uppercase().parse::<Digest>().unwrap().hex(), EMPTY);
        for text in ["", "ab", &EMPTY[1..], &EMPTY.replace('e', "g")] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
