//! Files under the roots, less what the caller allows, and mounts in them. Called by `leakcheck::look`.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path};

use super::{Kind, LookError, Scope, Sightings, note};

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    for root in &scope.roots {
        walk(scope, root, seen).map_err(|e| LookError::new(root.display().to_string(), e))?;
    }
    Ok(())
}

fn walk(scope: &Scope, dir: &Path, seen: &mut Sightings) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // A root that is not there yet, and a directory that went while we looked, hold nothing.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if scope.allowed.iter().any(|allowed| path.starts_with(allowed)) {
            continue;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let text = path.to_string_lossy().into_owned();
        let sort = if kind.is_dir() {
            "directory"
        } else if kind.is_symlink() {
            "link"
        } else if kind.is_socket() {
            // While somebody has it bound it is reported as a unix socket already.
            if seen.contains_key(&(Kind::UnixSocket, text.clone())) {
                continue;
            }
            "socket without a process"
        } else {
            "file"
        };
        note(seen, Kind::File, text.clone(), format!("{text} ({sort})"));
        if kind.is_dir() {
            walk(scope, &path, seen)?;
        }
    }
    Ok(())
}

/// Mounts as the agent sees them, or as we do when there is no agent.
pub(super) fn look_at_mounts(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    let of = |who: &str| fs::read_to_string(format!("/proc/{who}/mountinfo"));
    let own = of("self").map_err(|e| LookError::new("/proc/self/mountinfo", e))?;
    let agents = scope.agent.and_then(|pid| of(&pid.to_string()).ok()).unwrap_or_default();
    let mut points: Vec<&str> =
        own.lines().chain(agents.lines()).filter_map(|line| line.split(' ').nth(4)).collect();
    points.sort_unstable();
    points.dedup();
    for point in points {
        if scope.roots.iter().any(|root| Path::new(point).starts_with(root)) {
            note(seen, Kind::Mount, point, point);
        }
    }
    Ok(())
}
