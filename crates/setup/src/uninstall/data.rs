//! What the agent keeps: taken away by name, so that an owner's own files in the same folder stay. Called by `uninstall`.
//!
//! The list of changes and the program that goes through it are in the default folder; they stay to the very end, so that a
//! run that is cut off here is finished too.

use uuid::Uuid;

use super::Left;
use crate::{error::SetupError, files::Files, manifest::Noted, places};

/// Whether the agent makes something of this name.
type Own = fn(&str) -> bool;

/// Takes the data away; what is left, in sentences.
pub(super) fn remove(files: &Files, noted: &Noted) -> Result<Left, SetupError> {
    let (data, images) = (&noted.data_dir, &noted.image_dir);
    let mut kept = Vec::new();
    clear(files, &format!("{data}/instances"), is_instance, &mut kept)?;
    clear(files, images, is_image, &mut kept)?;
    clear(files, &format!("{data}/.ssh"), |name| name.starts_with("management_key"), &mut kept)?;
    clear(files, data, is_state, &mut kept)?;
    let list = |names: &[String]| names.join(", ");
    Ok(if kept.is_empty() {
        kept
    } else {
        vec![format!("what the agent did not make is kept: {}", list(&kept))]
    })
}

/// Removes the agent's own in a folder, and the folder when nothing else is in it. A link is followed: the owner put the
/// folder elsewhere, and the link stays.
fn clear(files: &Files, dir: &str, own: Own, kept: &mut Vec<String>) -> Result<(), SetupError> {
    for name in files.names(dir)? {
        let path = format!("{dir}/{name}");
        // Folders of the agent that were cleared before, and have something of the owner's in them, were named.
        if places::STATE == path || matches!(name.as_str(), "instances" | "images" | ".ssh") {
            continue;
        }
        if !own(&name) {
            kept.push(path);
        } else if files.is_dir(&path) {
            files.remove_tree(&path)?;
        } else {
            files.remove(&path)?;
        }
    }
    if files.is_dir(dir) {
        files.remove_empty_dir(dir)?;
    }
    Ok(())
}

/// `<uuid>`, and what teardown has renamed.
fn is_instance(name: &str) -> bool {
    name.split('.').next().is_some_and(|stem| Uuid::parse_str(stem).is_ok())
}

/// An image's id, a download that was cut off, the link to the current image with its boot files, and what the builder
/// and the agent keep beside them.
fn is_image(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    let is_id = stem.len() == 16 && stem.bytes().all(|b| b.is_ascii_hexdigit());
    let working = [".users", ".fetch", ".work-", ".lock"].iter().any(|own| name.starts_with(own));
    is_id || working || stem == "qudata-base"
}

fn is_state(name: &str) -> bool {
    let own = ["agent.redb", "agent.damaged-", "agent_id", "agent_secret", "tunnel_token"];
    own.iter().any(|own| name.starts_with(own))
}
