//! Comparison of rendered text with files under `tests/golden`. Tests only.
//! `UPDATE_GOLDEN=1 cargo test -p qudata-qemu` rewrites the files; the diff is then read like any other change.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// Fails when `text` is not what the golden `name` holds.
pub(crate) fn assert_golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        golden == text,
        "{name} differs; rerun with UPDATE_GOLDEN=1 if that is meant\n--- golden\n{golden}--- now\n{text}"
    );
}

/// One option per line, with its value.
pub(crate) fn lines(argv: &[OsString]) -> String {
    let mut text = String::new();
    for arg in argv {
        let arg = arg.to_str().unwrap();
        if !text.is_empty() {
            text.push(if arg.starts_with('-') { '\n' } else { ' ' });
        }
        text.push_str(arg);
    }
    text.push('\n');
    text
}
