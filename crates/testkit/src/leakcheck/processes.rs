//! Processes in scope: of a VM's user, of a named executable, using something under a root, or of the agent's own
//! family. Called by `leakcheck::look`.

use std::{collections::BTreeSet, fs, path::Path};

use super::{Kind, LookError, Scope, Sightings, note};
use crate::process::Seen;

pub(super) fn look(scope: &Scope, seen: &mut Sightings) -> Result<(), LookError> {
    let all = Seen::all().map_err(|e| LookError::new("processes", e))?;
    let family = family(scope.agent, &all);
    for process in all {
        // The one who asks is not a finding, nor is the agent whose leaks are being looked for.
        if process.pid == std::process::id() || Some(process.pid) == scope.agent {
            continue;
        }
        if in_scope(scope, &process) || family.contains(&process.pid) {
            let key = format!("{}@{}", process.pid, process.start_ticks);
            note(seen, Kind::Process, key, describe(&process));
        }
    }
    Ok(())
}

fn in_scope(scope: &Scope, process: &Seen) -> bool {
    scope.uids.contains(&process.uid)
        || process.exe.as_ref().is_some_and(|exe| scope.executables.contains(exe))
        || scope.roots.iter().any(|root| uses(process, root))
}

/// Whether it names something under `root` in its arguments, works in it, runs from it or has a file of it open.
fn uses(process: &Seen, root: &Path) -> bool {
    let under = |path: &Path| path.starts_with(root);
    let dir = format!("/proc/{}", process.pid);
    let root_text = root.to_string_lossy();
    process.exe.as_deref().is_some_and(under)
        || fs::read_link(format!("{dir}/cwd")).is_ok_and(|path| under(&path))
        || process.args.iter().any(|arg| arg.contains(root_text.as_ref()))
        || fs::read_dir(format!("{dir}/fd")).is_ok_and(|fds| {
            fds.filter_map(Result::ok).any(|fd| fs::read_link(fd.path()).is_ok_and(|path| under(&path)))
        })
}

/// The agent's descendants and everything in its session or process group.
fn family(agent: Option<u32>, all: &[Seen]) -> BTreeSet<u32> {
    let Some(agent) = agent else { return BTreeSet::new() };
    let mut family: BTreeSet<u32> =
        all.iter().filter(|p| p.session == agent || p.group == agent).map(|p| p.pid).collect();
    family.insert(agent);
    loop {
        let children: Vec<u32> = all
            .iter()
            .filter(|p| family.contains(&p.parent) && !family.contains(&p.pid))
            .map(|p| p.pid)
            .collect();
        if children.is_empty() {
            return family;
        }
        family.extend(children);
    }
}

fn describe(process: &Seen) -> String {
    let mut args: String = process.args.join(" ").chars().take(160).collect();
    if args.is_empty() {
        args.clone_from(&process.name);
    }
    format!("pid {} uid {} state {}: {args}", process.pid, process.uid, process.state)
}
