//! One public SSH key. A library parses it; what is added here is policy: which algorithms, how large, and a comment
//! in which no character can mean anything to a shell, a YAML parser or sshd.

use russh::keys::{
    HashAlg, PublicKey,
    ssh_key::{self, public::KeyData},
};
use std::{
    fmt,
    hash::{Hash, Hasher},
    str::FromStr,
};

/// The longest key text that is looked at, in bytes.
pub const MAX_KEY_BYTES: usize = 16 * 1024;

/// Longest comment that is kept.
const MAX_COMMENT_CHARS: usize = 128;

/// sshd refuses smaller moduli since OpenSSH 7 and larger ones always.
const RSA_BITS: std::ops::RangeInclusive<u32> = 2048..=16384;

const ALLOWED: [&str; 7] = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// Why a text is not a key that a guest may be given. The texts never repeat the key itself.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Nothing there.
    #[error("the SSH key is empty; expected one line such as 'ssh-ed25519 AAAA... comment'")]
    Empty,
    /// More than [`MAX_KEY_BYTES`].
    #[error("the SSH key has {bytes} bytes; at most {MAX_KEY_BYTES} are allowed")]
    TooLong {
        /// Size of what was given.
        bytes: usize,
    },
    /// A line break or another control character.
    #[error("the SSH key contains a line break or a control character; expected one line")]
    NotOneLine,
    /// The first word is no allowed algorithm: another algorithm, a certificate, or `authorized_keys` options.
    #[error("the SSH key starts with '{found}'; it must start with one of {}, without options", ALLOWED.join(", "))]
    Algorithm {
        /// The first word, cut and made printable.
        found: String,
    },
    /// Two keys on one line.
    #[error("the text contains more than one SSH key; give one key at a time")]
    SeveralKeys,
    /// The base64 part is not a key of the stated algorithm.
    #[error("the SSH key is damaged: its base64 part is not a {algorithm} key")]
    Damaged {
        /// The stated algorithm.
        algorithm: String,
        /// What the parser says.
        #[source]
        source: ssh_key::Error,
    },
    /// An RSA modulus out of bounds.
    #[error("the RSA key has {bits} bits; {} to {} are allowed", RSA_BITS.start(), RSA_BITS.end())]
    RsaSize {
        /// Size of the modulus.
        bits: u32,
    },
}

/// A public key: algorithm, blob and a harmless comment. Two keys are equal when algorithm and blob are.
#[derive(Clone)]
pub struct GuestKey {
    key: PublicKey,
    /// `<algorithm> <base64>`, the canonical text.
    bare: String,
    comment: String,
}

impl GuestKey {
    /// Parses one OpenSSH public key line.
    ///
    /// # Errors
    /// Anything but exactly one key of an allowed algorithm, without options.
    pub fn parse(text: &str) -> Result<GuestKey, KeyError> {
        if text.len() > MAX_KEY_BYTES {
            return Err(KeyError::TooLong { bytes: text.len() });
        }
        let line = text.trim_matches([' ', '\t', '\r', '\n']);
        if line.chars().any(|c| c.is_control() && c != '\t') {
            return Err(KeyError::NotOneLine);
        }
        let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
        let algorithm = words.next().ok_or(KeyError::Empty)?;
        if !ALLOWED.contains(&algorithm) {
            return Err(KeyError::Algorithm { found: printable(algorithm, 40) });
        }
        let blob = words.next().unwrap_or_default();
        let rest: Vec<&str> = words.collect();
        if rest.iter().any(|word| ALLOWED.contains(word)) {
            return Err(KeyError::SeveralKeys);
        }
        let key = PublicKey::from_openssh(&format!("{algorithm} {blob}"))
            .map_err(|source| KeyError::Damaged { algorithm: algorithm.to_owned(), source })?;
        check_rsa_size(key.key_data())?;
        GuestKey::from_public(key, &rest.join(" "))
            .map_err(|source| KeyError::Damaged { algorithm: algorithm.to_owned(), source })
    }

    /// Takes over a parsed key; `comment` is made harmless.
    pub(crate) fn from_public(mut key: PublicKey, comment: &str) -> Result<GuestKey, ssh_key::Error> {
        key.set_comment("");
        let bare = key.to_openssh()?;
        Ok(GuestKey { key, bare, comment: printable(comment, MAX_COMMENT_CHARS) })
    }

    /// Name of the algorithm, such as `ssh-ed25519`.
    #[must_use]
    pub fn algorithm(&self) -> &str {
        self.bare.split(' ').next().unwrap_or_default()
    }

    /// The comment after normalisation: ASCII letters, digits, space and `@._+:-` only.
    #[must_use]
    pub fn comment(&self) -> &str {
        &self.comment
    }

    /// `SHA256:...`, as `ssh-keygen -l` prints it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.key.fingerprint(HashAlg::Sha256).to_string()
    }

    /// The `authorized_keys` line, without a line break. [`GuestKey::parse`] reads it back.
    #[must_use]
    pub fn to_line(&self) -> String {
        if self.comment.is_empty() { self.bare.clone() } else { format!("{} {}", self.bare, self.comment) }
    }

    /// The parsed key, for comparison with one that came over the wire.
    pub(crate) fn public(&self) -> &PublicKey {
        &self.key
    }
}

/// ssh-key rounds a modulus up to whole bytes; policy wants the true size.
fn check_rsa_size(key: &KeyData) -> Result<(), KeyError> {
    let KeyData::Rsa(rsa) = key else { return Ok(()) };
    let bytes = rsa.n().as_positive_bytes().unwrap_or_default();
    let unused = bytes.first().map_or(0, |first| first.leading_zeros());
    let bits = u32::try_from(bytes.len()).unwrap_or(u32::MAX).saturating_mul(8).saturating_sub(unused);
    if RSA_BITS.contains(&bits) { Ok(()) } else { Err(KeyError::RsaSize { bits }) }
}

/// Keeps what no parser gives a meaning to; everything else becomes `_`.
fn printable(text: &str, max_chars: usize) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || " @._+:-".contains(c);
    let kept: String = text.chars().take(max_chars).map(|c| if harmless(c) { c } else { '_' }).collect();
    kept.trim().to_owned()
}

impl PartialEq for GuestKey {
    fn eq(&self, other: &Self) -> bool {
        self.bare == other.bare
    }
}

impl Eq for GuestKey {}

impl Hash for GuestKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bare.hash(state);
    }
}

impl FromStr for GuestKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        GuestKey::parse(text)
    }
}

impl fmt::Display for GuestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_line())
    }
}

impl fmt::Debug for GuestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestKey({} {})", self.algorithm(), self.fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";

    /// Real keys, made by the OpenSSH tool: what a renter pastes.
    fn made_by_ssh_keygen(arguments: &[&str]) -> (String, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        let made = std::process::Command::new("ssh-keygen")
            .args(["-q", "-N", "", "-C", "me@laptop", "-f"])
            .arg(&file)
            .args(arguments)
            .status()
            .unwrap();
        assert!(made.success());
        let public = file.with_extension("pub");
        let listed = std::process::Command::new("ssh-keygen").arg("-lf").arg(&public).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let fingerprint = listed.split(' ').nth(1).unwrap().to_owned();
        (std::fs::read_to_string(public).unwrap(), fingerprint)
    }

    #[test]
    fn accepts_what_openssh_makes_and_agrees_on_the_fingerprint() {
        for arguments in [
            vec!["-t", "ed25519"],
            vec!["-t", "ecdsa", "-b", "256"],
            vec!["-t", "ecdsa", "-b", "384"],
            vec!["-t", "ecdsa", "-b", "521"],
            vec!["-t", "rsa", "-b", "2048"],
            vec!["-t", "rsa", "-b", "3072"],
        ] {
            let (text, fingerprint) = made_by_ssh_keygen(&arguments);
            let key = GuestKey::parse(&text).unwrap();
            assert_eq!(key.to_line(), text.trim_end());
            assert_eq!(key.fingerprint(), fingerprint);
            assert_eq!(key.comment(), "me@laptop");
        }
    }

    #[test]
    fn accepts_security_keys() {
        let text = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAICFo/k5LU8863u66YC9\
                    eUO2170QduohPURkQnbLa/dczAAAABHNzaDo= me";
        assert_eq!(GuestKey::parse(text).unwrap().algorithm(), "sk-ssh-ed25519@openssh.com");
    }

    #[test]
    fn equality_ignores_the_comment() {
        let one = GuestKey::parse(&format!("{ED25519} one")).unwrap();
        let two = GuestKey::parse(&format!("  {ED25519}\ttwo words \n")).unwrap();
        assert_eq!(one, two);
        assert_eq!(two.to_line(), format!("{ED25519} two words"));
    }

    #[test]
    fn a_small_rsa_key_is_refused() {
        let (text, _) = made_by_ssh_keygen(&["-t", "rsa", "-b", "1024"]);
        assert!(matches!(GuestKey::parse(&text), Err(KeyError::RsaSize { bits: 1024 })));
    }

    #[test]
    fn refuses_everything_else_with_a_reason() {
        let cut = &ED25519[..ED25519.len() - 4];
        for (text, expected) in [
            (String::new(), "empty"),
            (" \n ".to_owned(), "empty"),
            (format!("{ED25519} {}", "c".repeat(MAX_KEY_BYTES)), "at most 16384"),
            (format!("{ED25519} a\n{ED25519} b"), "line break"),
            (format!("{ED25519} a\u{0}b"), "control character"),
            (format!("{ED25519} a {ED25519} b"), "more than one"),
            (format!("no-pty {ED25519}"), "starts with 'no-pty'"),
            (format!("command=\"id\" {ED25519}"), "without options"),
            ("ssh-dss AAAAB3NzaC1kc3MAAACBAP".to_owned(), "starts with 'ssh-dss'"),
            ("ssh-ed25519-cert-v01@openssh.com AAAA".to_owned(), "must start with one of ssh-ed25519"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----".to_owned(), "must start with one of"),
            ("ssh-ed25519".to_owned(), "damaged"),
            (cut.to_owned(), "damaged"),
            (ED25519.replacen("ssh-ed25519", "ssh-rsa", 1), "damaged"),
            (ED25519.replace('+', "$"), "damaged"),
        ] {
            let error = GuestKey::parse(&text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:.60}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_comment_survives_with_a_metacharacter(comment in "[^\\p{Cc}]{0,200}") {
            if let Ok(key) = GuestKey::parse(&format!("{ED25519} {comment}")) {
                let line = key.to_line();
                prop_assert!(line.chars().all(|c| c.is_ascii_alphanumeric() || " @._+:-/=".contains(c)), "{}", line);
                let again = GuestKey::parse(&line).unwrap();
                prop_assert_eq!(again.to_line(), line);
            }
        }

        #[test]
        fn never_panics(text in "\\PC{0,300}") {
            let _ = GuestKey::parse(&text);
        }

        #[test]
        fn a_damaged_blob_never_passes_as_the_same_key(at in 16..80usize, with in "[A-Za-z0-9+/=]") {
            let mut text = ED25519.to_owned();
            text.replace_range(at..=at, &with);
            if let (Ok(key), false) = (GuestKey::parse(&text), text == ED25519) {
                prop_assert_ne!(key, GuestKey::parse(ED25519).unwrap());
            }
        }
    }
}
