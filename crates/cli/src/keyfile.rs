//! Public keys from the command line: a key as text, or a file with keys. Owns the default key; used by `instance
//! create` and `instance key`. Whether a key is good is for the agent to say.

use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

/// The keys that `argument` stands for.
pub(crate) fn keys_of(argument: &str) -> Result<Vec<String>, Failure> {
    if is_key(argument) {
        return Ok(vec![argument.trim().to_owned()]);
    }
    let path = Path::new(argument);
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::new(Exit::Usage, format!("cannot read the key file {argument}: {e}")))?;
    if text.contains("PRIVATE KEY") {
        return Err(Failure::new(
            Exit::Usage,
            format!("{argument} is a private key, which must not leave its owner: give {argument}.pub"),
        ));
    }
    let keys: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    if keys.is_empty() {
        return Err(Failure::new(Exit::Usage, format!("there is no key in {argument}")));
    }
    Ok(keys.into_iter().map(str::to_owned).collect())
}

/// The key that is taken when none is given: `~/.ssh/id_ed25519.pub`, if it exists.
pub(crate) fn default_file() -> Option<PathBuf> {
    let path = Path::new(&std::env::var_os("HOME")?).join(".ssh/id_ed25519.pub");
    path.is_file().then_some(path)
}

/// A key has an algorithm, a space and base64; no path that anybody has looks like that.
fn is_key(argument: &str) -> bool {
    let algorithm = argument.split_whitespace().next().unwrap_or_default();
    let known = ["ssh-", "ecdsa-", "sk-"].iter().any(|start| algorithm.starts_with(start));
    known && argument.trim().contains(' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB me@home";

    #[test]
    fn a_key_as_text_or_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, format!("# mine\n\n{KEY}\n  sk-ssh-ed25519@openssh.com AAAA token\n")).unwrap();
        assert_eq!(keys_of(KEY).unwrap(), [KEY]);
        let both = keys_of(file.to_str().unwrap()).unwrap();
        assert_eq!(both, [KEY, "sk-ssh-ed25519@openssh.com AAAA token"]);
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let table = [
            (write("id", "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n"), "id.pub"),
            (write("empty", "# nothing\n"), "no key in"),
            ("no/such/file".to_owned(), "cannot read"),
            ("ssh-ed25519".to_owned(), "cannot read"),
        ];
        for (argument, expected) in table {
            let failure = keys_of(&argument).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.sentence.contains(expected), "{failure}");
            assert!(!failure.sentence.contains("secret"));
        }
    }
}
