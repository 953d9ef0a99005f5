//! The renter's `user_data`: which forms are taken, and how ours and theirs become one MIME `user-data`.
//!
//! cloud-init merges `#cloud-config` parts in order, each part by its own merge type. Ours goes first, so that a
//! plain document of theirs appends to our lists and replaces nothing. But a part may name its own merge type, and
//! one that comes from an include or a multipart replaces by default. So where theirs can merge at all, our lists
//! and our fixed values follow once more.

use super::cloud_config::{Ours, document};
use base64ct::{Base64, Encoding};
use std::fmt;

/// The largest `user_data`, in bytes.
pub const MAX_USER_DATA_BYTES: usize = 32 * 1024;

/// Why a text is not a `user_data` that a guest may be given.
#[derive(Debug, thiserror::Error)]
pub enum UserDataError {
    /// Too large.
    #[error("user_data has {bytes} bytes; at most {MAX_USER_DATA_BYTES} are allowed")]
    TooLong {
        /// Size of what was given.
        bytes: usize,
    },
    /// None of the forms.
    #[error(
        "user_data starts with '{start}'; it must be a document that starts with '#cloud-config', '#!', \
         '#cloud-boothook', '#include' or '#include-once', or a MIME multipart with its headers"
    )]
    Form {
        /// Its first characters, made printable.
        start: String,
    },
    /// A NUL byte, which no form has.
    #[error("user_data contains a NUL character")]
    Nul,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    CloudConfig,
    Script,
    Boothook,
    Include,
    IncludeOnce,
    Multipart,
}

/// A renter's configuration in one of the forms that cloud-init takes. May hold secrets: not printable.
#[derive(Clone, PartialEq, Eq)]
pub struct UserData {
    form: Form,
    text: String,
}

impl UserData {
    /// Recognises the form; the content is cloud-init's to judge.
    ///
    /// # Errors
    /// Too large, or none of the forms.
    pub fn parse(text: &str) -> Result<UserData, UserDataError> {
        if text.len() > MAX_USER_DATA_BYTES {
            return Err(UserDataError::TooLong { bytes: text.len() });
        }
        if text.contains('\0') {
            return Err(UserDataError::Nul);
        }
        let form = form_of(text).ok_or_else(|| UserDataError::Form {
            start: text
                .chars()
                .take(24)
                .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '_' })
                .collect(),
        })?;
        Ok(UserData { form, text: text.to_owned() })
    }
}

impl fmt::Debug for UserData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserData({:?}, {} bytes)", self.form, self.text.len())
    }
}

fn form_of(text: &str) -> Option<Form> {
    let first_line = text.lines().next().unwrap_or_default();
    if first_line.starts_with("#!") {
        return Some(Form::Script);
    }
    // The whole first word: "#cloud-config-jsonp" and "#cloud-config-archive" are other things.
    match first_line.split([' ', '\t']).next().unwrap_or_default() {
        "#cloud-config" => Some(Form::CloudConfig),
        "#cloud-boothook" => Some(Form::Boothook),
        "#include" => Some(Form::Include),
        "#include-once" => Some(Form::IncludeOnce),
        _ => is_multipart(text).then_some(Form::Multipart),
    }
}

/// A header block with the two headers that make cloud-init read the rest as MIME.
fn is_multipart(text: &str) -> bool {
    let head: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).collect();
    let continues = |line: &str| line.starts_with([' ', '\t']);
    let header_name = |line: &str| line.split_once(':').map(|(name, _)| name.to_ascii_lowercase());
    let well_formed = head.iter().all(|line| {
        continues(line)
            || header_name(line).is_some_and(|n| n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
    });
    // Folded headers count as one line.
    let block = head.join("\n").to_ascii_lowercase().replace("\n ", " ").replace("\n\t", " ");
    let value = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    well_formed
        && value("mime-version:").is_some()
        && value("content-type:").is_some_and(|v| v.starts_with("multipart/") && v.contains("boundary="))
}

/// Lists are appended, maps merged, and what is there already stays.
const APPEND: &str = "dict(no_replace,recurse_list)+list(append)";
/// Lists go in front of what is there.
const PREPEND: &str = "dict(no_replace,recurse_list)+list(prepend)";
/// Every top-level key replaces what is there.
const REPLACE: &str = "dict(replace)";

/// One MIME document of our parts and theirs.
pub(super) fn merge(ours: &Ours, theirs: &UserData) -> String {
    let mut parts = vec![config_part("qudata.cfg", None, &document(&ours.whole())), their_part(theirs)];
    match theirs.form {
        Form::CloudConfig | Form::Include | Form::IncludeOnce | Form::Multipart => {
            parts.push(config_part("qudata-lists.cfg", Some(PREPEND), &document(&ours.lists)));
            parts.push(config_part("qudata-pins.cfg", Some(REPLACE), &document(&ours.pins)));
        }
        Form::Script | Form::Boothook => {}
    }
    let boundary = unused_boundary(&parts);
    let body: String = parts.iter().map(|part| format!("--{boundary}\n{part}\n")).collect();
    format!(
        "Content-Type: multipart/mixed; boundary=\"{boundary}\"\nMIME-Version: 1.0\n\n{body}--{boundary}--\n"
    )
}

/// Ours is plain ASCII and stays readable.
fn config_part(name: &str, merge_type: Option<&str>, text: &str) -> String {
    let merge = merge_type.map(|merge| format!("Merge-Type: {merge}\n")).unwrap_or_default();
    format!(
        "Content-Type: text/cloud-config; charset=\"us-ascii\"\n\
         Content-Disposition: attachment; filename=\"{name}\"\n{merge}\n{text}"
    )
}

/// A multipart nests as it is; everything else travels as base64, which keeps every character and line ending.
fn their_part(theirs: &UserData) -> String {
    let kind = match theirs.form {
        Form::Multipart => return theirs.text.clone(),
        Form::CloudConfig => "cloud-config",
        Form::Script => "x-shellscript",
        Form::Boothook => "cloud-boothook",
        Form::Include => "x-include-url",
        Form::IncludeOnce => "x-include-once-url",
    };
    let merge =
        if theirs.form == Form::CloudConfig { format!("Merge-Type: {APPEND}\n") } else { String::new() };
    format!(
        "Content-Type: text/{kind}; charset=\"utf-8\"\nContent-Disposition: attachment; filename=\"user-data\"\n\
         Content-Transfer-Encoding: base64\n{merge}\n{}\n",
        Base64::encode_string(theirs.text.as_bytes())
    )
}

/// The same input gives the same boundary; no part contains it, whatever a renter guesses.
fn unused_boundary(parts: &[String]) -> String {
    let mut boundary = "qudata-part".to_owned();
    while parts.iter().any(|part| part.contains(&boundary)) {
        boundary.push_str("-x");
    }
    boundary
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPART: &str = "Content-Type: multipart/mixed;\n boundary=\"==B==\"\nMIME-Version: 1.0\n\n--==B==\n\
                             Content-Type: text/x-shellscript\n\n#!/bin/sh\ntrue\n\n--==B==--\n";

    #[test]
    fn recognises_the_forms() {
        for (text, form) in [
            ("#cloud-config\npackages: [htop]\n", Form::CloudConfig),
            ("#cloud-config", Form::CloudConfig),
            ("#cloud-config # mine\r\na: 1\r\n", Form::CloudConfig),
            ("#!/bin/sh\necho\n", Form::Script),
            ("#cloud-boothook\n#!/bin/sh\n", Form::Boothook),
            ("#include https://example.com/x\n", Form::Include),
            ("#include-once\nhttps://example.com/x\n", Form::IncludeOnce),
            (MULTIPART, Form::Multipart),
        ] {
            assert_eq!(UserData::parse(text).unwrap().form, form, "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_and_says_what_is_allowed() {
        for (text, expected) in [
            ("", "must be a document that starts with '#cloud-config'"),
            ("packages: [htop]", "user_data starts with 'packages: [htop]'"),
            (" #cloud-config\n", "user_data starts with ' #cloud-config_'"),
            ("#cloud-config-jsonp\n[]", "MIME multipart"),
            ("#cloud-config-archive\n[]", "'#include'"),
            ("## template: jinja\n#cloud-config\n", "user_data starts"),
            ("#part-handler\n", "user_data starts"),
            ("MIME-Version: 1.0\nContent-Type: text/plain; boundary=x\n\nhi", "user_data starts"),
            ("Content-Type: multipart/mixed; boundary=x\n\n--x--", "user_data starts"),
            ("a\u{1F600}b", "user_data starts with 'a_b'"),
            ("#!/bin/sh\n\0", "NUL"),
        ] {
            let error = UserData::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let long = format!("#!/bin/sh\n{}", "#".repeat(MAX_USER_DATA_BYTES));
        assert!(matches!(UserData::parse(&long), Err(UserDataError::TooLong { .. })));
    }

    #[test]
    fn a_guessed_boundary_is_avoided() {
        let boundary = unused_boundary(&["qudata-part-x-x".to_owned(), "qudata-part".to_owned()]);
        assert_eq!(boundary, "qudata-part-x-x-x");
    }

    #[test]
    fn debug_output_holds_no_content() {
        let data = UserData::parse("#!/bin/sh\nexport TOKEN=hush\n").unwrap();
        assert!(!format!("{data:?}").contains("hush"));
    }
}
