//! The content of an `authorized_keys` file as data. Lines that are not touched stay as they are, byte for byte;
//! a key is found by algorithm and blob, whatever options or comment surround it.

use super::GuestKey;
use russh::keys::PublicKey;

/// The lines of an `authorized_keys` file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthorizedKeys {
    /// Each with its line break; only the last may lack one.
    lines: Vec<Vec<u8>>,
}

impl AuthorizedKeys {
    /// Takes any content; a line that holds no key is kept and never matches.
    #[must_use]
    pub fn parse(content: &[u8]) -> AuthorizedKeys {
        AuthorizedKeys { lines: content.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect() }
    }

    /// Whether some line grants access to `key`.
    #[must_use]
    pub fn contains(&self, key: &GuestKey) -> bool {
        self.lines.iter().any(|line| names(line, key))
    }

    /// Appends `key` unless it is there already. Tells whether anything changed.
    pub fn add(&mut self, key: &GuestKey) -> bool {
        if self.contains(key) {
            return false;
        }
        if let Some(last) = self.lines.last_mut().filter(|last| !last.ends_with(b"\n")) {
            last.push(b'\n');
        }
        self.lines.push(format!("{}\n", key.to_line()).into_bytes());
        true
    }

    /// Removes every line that grants access to `key`, with options or without. Tells whether anything changed.
    pub fn remove(&mut self, key: &GuestKey) -> bool {
        let before = self.lines.len();
        self.lines.retain(|line| !names(line, key));
        self.lines.len() != before
    }

    /// The file's content.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        self.lines.concat()
    }
}

/// Whether sshd would take this line for `key`: the key may stand first or after one word of options.
fn names(line: &[u8], key: &GuestKey) -> bool {
    let Ok(line) = std::str::from_utf8(line) else { return false };
    let line = line.trim_matches([' ', '\t', '\r', '\n']);
    if line.starts_with('#') {
        return false;
    }
    is_key(line, key) || after_options(line).is_some_and(|rest| is_key(rest, key))
}

fn is_key(text: &str, key: &GuestKey) -> bool {
    let mut words = text.split([' ', '\t']).filter(|word| !word.is_empty());
    let (Some(algorithm), Some(blob)) = (words.next(), words.next()) else { return false };
    PublicKey::from_openssh(&format!("{algorithm} {blob}"))
        .is_ok_and(|found| found.key_data() == key.public().key_data())
}

/// What follows the options: they end at the first blank outside double quotes, in which a backslash protects a quote.
fn after_options(line: &str) -> Option<&str> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in line.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' | '\t' if !quoted => return line.get(at..),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti";
    const B: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    fn key(text: &str) -> GuestKey {
        GuestKey::parse(text).unwrap()
    }

    #[test]
    fn adds_once_and_ends_an_unfinished_line_first() {
        let mut file = AuthorizedKeys::parse(b"# mine\nno line break");
        assert!(file.add(&key(&format!("{A} me"))));
        assert!(!file.add(&key(&format!("{A} another comment"))));
        assert_eq!(file.render(), format!("# mine\nno line break\n{A} me\n").into_bytes());
    }

    #[test]
    fn removes_every_form_of_the_key_and_nothing_else() {
        let kept = format!("# {A}\n{B} b\r\n\n\u{1F511} garbage \\ \"\n");
        let content = format!(
            "{A}\n{kept}  {A}\tcomment\nno-pty,command=\"echo \\\" x\" {A} c\n\
             from=\"10.0.0.0/8,! x\",restrict   {A}\n"
        );
        let mut file = AuthorizedKeys::parse(content.as_bytes());
        assert!(file.contains(&key(A)));
        assert!(file.remove(&key(A)));
        assert_eq!(file.render(), kept.as_bytes());
        assert!(!file.remove(&key(A)));
    }

    #[test]
    fn a_key_inside_an_option_or_a_comment_is_no_key() {
        let content = format!("command=\"echo {A}\" {B}\n{B} {A}\n");
        assert!(!AuthorizedKeys::parse(content.as_bytes()).contains(&key(A)));
    }

    fn line() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40),
            Just(A.as_bytes().to_vec()),
            Just(B.as_bytes().to_vec()),
            Just(format!("no-pty {A} x").into_bytes()),
        ]
    }

    fn content() -> impl Strategy<Value = Vec<u8>> {
        (proptest::collection::vec(line(), 0..8), any::<bool>()).prop_map(|(lines, ended)| {
            let mut content = lines.join(&b'\n');
            if ended {
                content.push(b'\n');
            }
            content
        })
    }

    proptest! {
        #[test]
        fn render_gives_back_what_was_parsed(content in content()) {
            prop_assert_eq!(AuthorizedKeys::parse(&content).render(), content);
        }

        #[test]
        fn add_is_idempotent_and_keeps_the_rest(content in content()) {
            let mut file = AuthorizedKeys::parse(&content);
            file.add(&key(A));
            let once = file.render();
            prop_assert!(once.starts_with(&content));
            prop_assert!(!file.add(&key(A)));
            let mut again = AuthorizedKeys::parse(&once);
            prop_assert!(again.contains(&key(A)));
            prop_assert!(!again.add(&key(A)));
            prop_assert_eq!(again.render(), once);
        }

        #[test]
        fn remove_keeps_the_other_lines_in_order(content in content()) {
            let mut file = AuthorizedKeys::parse(&content);
            let expected: Vec<u8> = content
                .split_inclusive(|b| *b == b'\n')
                .filter(|line| !line.windows(A.len()).any(|w| w == A.as_bytes()))
                .collect::<Vec<_>>()
                .concat();
            file.remove(&key(A));
            prop_assert!(!file.contains(&key(A)));
            prop_assert_eq!(file.render(), expected);
        }
    }
}
