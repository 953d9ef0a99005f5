//! The agent's own descriptors and threads, counted by sort: they have no names that outlive a restart. Called by
//! `leakcheck::look`.

use std::{fs, io};

use super::{Kind, LookError, Scope, Sightings, note};

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    let Some(pid) = scope.agent else { return Ok(()) };
    let fail = |e: io::Error| LookError::new(format!("the agent, pid {pid}"), e);
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).map_err(fail)? {
        // Closed while we looked.
        let Ok(link) = fd.and_then(|fd| fs::read_link(fd.path())) else { continue };
        let sort = sort_of(&link.to_string_lossy());
        note(seen, Kind::Descriptor, sort.clone(), sort);
    }
    for thread in fs::read_dir(format!("/proc/{pid}/task")).map_err(fail)? {
        let Ok(name) = thread.and_then(|thread| fs::read_to_string(thread.path().join("comm"))) else {
            continue;
        };
        note(seen, Kind::Thread, name.trim(), name.trim());
    }
    Ok(())
}

/// `socket:[12345]` → `socket`; a path stays as it is.
fn sort_of(link: &str) -> String {
    match link.split_once(":[") {
        Some((sort @ ("socket" | "pipe"), _)) => sort.to_owned(),
        _ => link.to_owned(),
    }
}
