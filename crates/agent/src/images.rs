//! Tells whoever removes base images where disks lie over them. Called at the agent's start; `qudata-image` reads it.
//!
//! The command that removes images goes by settings of its own, which need not be the agent's: a unit may set the data
//! directory in its environment. So every agent leaves a note beside the images, and a removal looks at all of them.
//!
//! ```text
//! <image_dir>/.users/_2fvar_2flib_2fqudata_2finstances      the folder's path, and a line end
//! ```

use std::path::Path;

use qudata_api::Problem;
use qudata_host::durable::{self, DurableError};

/// Folder of the notes.
const USERS: &str = ".users";

/// Leaves the note that disks in `instances` lie over images in `images`. A folder of images that is not there holds none.
///
/// # Errors
/// When the note cannot be written.
pub fn note_user(images: &Path, instances: &Path) -> Result<(), DurableError> {
    let note = images.join(USERS).join(name(instances));
    let text = format!("{}\n", instances.display());
    if !images.is_dir() || std::fs::read_to_string(&note).is_ok_and(|found| found == text) {
        return Ok(());
    }
    durable::create_dir(&images.join(USERS), 0o755)?;
    durable::sync_dir(images)?;
    durable::replace(&note, text.as_bytes(), 0o644)
}

/// What to say when the note could not be left.
pub fn not_noted(error: &DurableError) -> Problem {
    Problem {
        code: "images_unprotected".to_owned(),
        message: format!(
            "`image remove` may not see this agent's disks: {}",
            qudata_host::causes::chain(error)
        ),
        remedy: "do what the message says and restart the agent; remove no base image before".to_owned(),
        since: jiff::Timestamp::now(),
    }
}

/// A file name for a path: two paths never have the same one.
fn name(path: &Path) -> String {
    use std::fmt::Write;
    let mut name = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        // Writing to a String cannot fail.
        let _ = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => write!(name, "{}", char::from(*byte)),
            other => write!(name, "_{other:02x}"),
        };
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_folder_of_instances_leaves_a_note_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        note_user(&dir.path().join("absent"), Path::new("/a")).unwrap();
        assert!(!dir.path().join("absent").exists());
        for _ in 0..2 {
            for instances in ["/srv/a/instances", "/srv_a/instances"] {
                note_user(dir.path(), Path::new(instances)).unwrap();
            }
        }
        let mut notes: Vec<String> = std::fs::read_dir(dir.path().join(USERS))
            .unwrap()
            .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect();
        notes.sort();
        assert_eq!(notes, ["/srv/a/instances\n", "/srv_a/instances\n"]);
    }
}
