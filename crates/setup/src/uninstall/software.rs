//! The packages that came, and their groups. Owns what makes a cut in the middle of apt harmless: the program that can go
//! on. Called by `uninstall`.

use super::{Left, Removal, say};
use crate::{
    error::{Code, SetupError},
    hands::{failed, order},
    ledger::{Ledger, checksum},
    manifest::{Backup, Entry},
    observe,
    outside::Means,
    packages::{self, Going},
    places, progress,
};

/// Takes the packages of an entry away; what is left.
pub(super) fn take_back(
    means: Means<'_>,
    ledger: &mut Ledger<'_>,
    removal: Removal,
    entry: &Entry,
) -> Result<Left, SetupError> {
    let Entry::Packages { before, added, named, asked, done } = entry else { return Ok(Left::new()) };
    keep_program(means, removal);
    packages::finish(means)?;
    // apt was cut off: what came is what it was to install and was not there before, in whatever state.
    let added = match done {
        true => added.clone(),
        false => packages::came(&packages::known(means)?, before, named),
    };
    packages::note_groups(means, ledger)?;
    // A purge of the package takes its settings along, which are the owner's when they are still here.
    let verb = if has_settings(means)? { "remove" } else { "purge" };
    let mut copies = Vec::new();
    let kept = packages::purge(means, &Going { added: &added, asked, verb }, &mut |path| {
        let copy = ledger.keep_theirs(path)?;
        copies.extend(copy.map(|copy| format!("{path} went with its package: as it was it lies in {copy}")));
        Ok(())
    })?;
    if !kept.is_empty() {
        keep_groups(ledger);
    }
    Ok(kept.into_iter().chain(copies).collect())
}

/// From here on the package is taken away, and the program with it: where the power fails meanwhile, somebody must be able
/// to go on. A host without room for it loses only that.
fn keep_program(means: Means<'_>, removal: Removal) {
    let Ok(Some(program)) = means.files.read("/proc/self/exe") else { return };
    let kept = means.files.read(places::PROGRAM).is_ok_and(|kept| kept.as_ref() == Some(&program));
    if kept {
        return;
    }
    match means.files.write(places::PROGRAM, &program, means.files.mine(0o700)) {
        Ok(()) => {
            let line = removal.line(&format!("sudo {} uninstall", places::PROGRAM));
            let text = format!("The packages go now. Should that be cut off: {line}");
            means.person.tell(&progress::Event::Note(text.clone()));
            say(means, &text);
        }
        Err(error) => say(means, &format!("uninstall: the program is not kept: {error}{}", error.causes())),
    }
}

/// There are settings that were there before, or that somebody changed since.
fn has_settings(means: Means<'_>) -> Result<bool, SetupError> {
    if means.files.names("/etc/qudata")?.iter().any(|name| !name.starts_with("frpc.")) {
        return Ok(true);
    }
    let before = means.files.read(places::BEFORE)?.unwrap_or_default();
    let before: serde_json::Value = serde_json::from_slice(&before).unwrap_or_default();
    Ok(before.get("etc_qudata").and_then(serde_json::Value::as_bool).unwrap_or(false))
}

/// Packages that stay keep their groups; the agent's goes.
fn keep_groups(ledger: &mut Ledger<'_>) {
    for entry in &mut ledger.manifest.entries {
        if let Entry::Groups { added, .. } = entry {
            added.retain(|name| name == places::GROUP);
        }
    }
}

/// Removes the groups that came with the packages. When nobody else has changed any since, also the copies of their files
/// are as they were.
pub(super) fn remove_groups(
    means: Means<'_>,
    ledger: &Ledger<'_>,
    added: &[String],
    before: &[(String, Option<Backup>)],
) -> Result<Left, SetupError> {
    let mut left = Vec::new();
    for name in added {
        if observe::group(means.files, name)?.is_none() {
            continue;
        }
        let order = order("groupdel").args([name.as_str()]);
        let answer = means.hands.run(&order, &mut |_| {}).map_err(|cause| {
            SetupError::new(Code::HostFault, format!("the group {name} cannot be removed"), "").because(cause)
        })?;
        if !answer.ok() {
            left.push(format!("the group {name} is kept: {}", failed(&order, &answer)));
        }
    }
    for (path, backup) in before.iter().filter(|(path, _)| !path.ends_with('-')) {
        let found = means.files.read(path)?.as_deref().map(checksum);
        if found.as_ref() != backup.as_ref().map(|backup| &backup.sha256) {
            return Ok(left);
        }
    }
    before.iter().try_for_each(|(path, backup)| ledger.copy_back(path, backup.as_ref()))?;
    Ok(left)
}
