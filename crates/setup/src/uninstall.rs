//! Takes an installation back: the list of changes, backwards. Owns what may be in the way and what is removed besides.
//! Called by the CLI's `uninstall`.
//!
//! It stops the agent and its tunnel client and nothing else. An entry leaves the list when it is taken back, so that a run
//! that was cut off is finished by the next one.

use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::{
    boot,
    error::{Code, SetupError},
    hands::{failed, must, order},
    install::{lock, not_root},
    ledger::{Ledger, Undone, checksum},
    manifest::{Backup, Entry, Manifest},
    observe,
    outside::{Means, Tenant},
    packages, places, progress, settings_file,
};

/// What the CLI was asked.
#[derive(Debug, Clone, Copy)]
pub struct Removal {
    /// Data and instances go as well.
    pub purge: bool,
    /// Nobody is asked.
    pub yes: bool,
    /// Root runs this.
    pub root: bool,
}

/// What is left, in sentences; empty: nothing.
pub type Left = Vec<String>;

/// What would be done. Changes nothing.
///
/// # Errors
/// When the list cannot be read.
pub fn describe(means: Means<'_>, removal: Removal) -> Result<String, SetupError> {
    use std::fmt::Write;
    let Some(manifest) = Manifest::load(means.files)? else {
        return Ok(format!(
            "There is no list of changes in {}: `install` changed nothing here.\n",
            places::STATE
        ));
    };
    let mut text = format!("stop and disable {}\n", places::AGENT_UNIT);
    for entry in manifest.entries.iter().rev() {
        // Writing to a String cannot fail.
        let _ = match entry {
            Entry::Folder { path } => writeln!(text, "remove the folder {path} if it is empty"),
            Entry::File { path, before: None, .. } => writeln!(text, "remove {path}"),
            Entry::File { path, .. } => writeln!(text, "put back {path} as it was"),
            Entry::Generated { path, .. } => {
                writeln!(text, "put back {path}, or let the boot loader make it anew")
            }
            Entry::Packages { added, .. } => writeln!(text, "purge the packages {}", added.join(" ")),
            Entry::Unit { name } => writeln!(text, "disable {name}"),
            Entry::Groups { added, .. } => writeln!(text, "remove the groups {}", added.join(" ")),
        };
    }
    let data = data_dir(means, &manifest)?;
    let _ = match removal.purge {
        true => writeln!(text, "delete all instances, {data} and /var/log/qudata"),
        false => writeln!(text, "keep {data}"),
    };
    text.push_str("\nNothing was changed.\n");
    Ok(text)
}

/// Takes everything back.
///
/// # Errors
/// When instances are in the way, somebody does not agree, or something cannot be taken back yet.
pub fn uninstall(means: Means<'_>, removal: Removal) -> Result<Left, SetupError> {
    if !removal.root {
        return Err(not_root("uninstall"));
    }
    if !means.files.exists(places::STATE) {
        sweep_downloads(means)?;
        remove_empty(means)?;
        return Ok(vec!["`qudata-agent install` changed nothing on this host.".into()]);
    }
    let _lock = lock(means)?;
    let mut ledger = Ledger::open(means.files)?;
    let data = data_dir(means, &ledger.manifest)?;
    let tenants = means.tenants(&data)?;
    consent(means, removal, &tenants, &data)?;
    say(means, "uninstall: begins");
    for tenant in &tenants {
        means.outside.delete(&tenant.id).map_err(|why| {
            let what = format!("instance {} ({}) cannot be deleted: {why}", tenant.id, tenant.name);
            let next = "systemctl start qudata-agent; qudata-agent instance list";
            let remedy = "The agent has to run and to know it for that.";
            SetupError::new(Code::InstancesExist, what, remedy).next(next)
        })?;
    }
    nobody_left(means, &data)?;
    if ledger.manifest.data_dir.as_ref() != Some(&data) {
        ledger.manifest.data_dir = Some(data.clone());
        ledger.manifest.parameters = boot::ours(&ledger, means.files)?;
        ledger.save()?;
    }
    stop(means, &data)?;
    remove_rules(means)?;
    // An installation that was cut off has not come so far.
    packages::note_groups(means, &mut ledger)?;
    let mut left = backwards(means, &mut ledger)?;
    if !ledger.manifest.entries.is_empty() {
        return Ok(left);
    }
    for path in boot::forget(means.files, &ledger.manifest.parameters)? {
        say(means, &format!("uninstall: took the parameters out of {path}"));
    }
    sweep(means)?;
    if removal.purge {
        nobody_left(means, &data)?;
        remove_data(means, &data)?;
        means.files.remove_tree("/var/log/qudata")?;
    } else {
        say(means, "uninstall: done");
        left.push(format!(
            "{data} is kept, with images and keys: `rm -r {data}` when nothing in it is needed."
        ));
    }
    means.files.remove_tree(places::STATE)?;
    remove_empty(means)?;
    Ok(left)
}

/// The list and the program that goes through it stay to the end, so that a run that is cut off here is finished too.
fn remove_data(means: Means<'_>, data: &str) -> Result<(), SetupError> {
    let own = places::STATE.strip_prefix(data).and_then(|rest| rest.strip_prefix('/'));
    let Some(own) = own else { return means.files.remove_tree(data).map(drop) };
    for name in means.files.names(data)?.into_iter().filter(|name| name != own) {
        let path = format!("{data}/{name}");
        if means.files.is_dir(&path) {
            means.files.remove_tree(&path)?;
        } else {
            means.files.remove(&path)?;
        }
    }
    Ok(())
}

/// Folders that are nobody's when nothing is in them.
fn remove_empty(means: Means<'_>) -> Result<(), SetupError> {
    for dir in ["/var/lib/qudata", "/var/log/qudata"] {
        if means.files.exists(dir) {
            means.files.remove_empty_dir(dir)?;
        }
    }
    Ok(())
}

fn say(means: Means<'_>, text: &str) {
    progress::log_line(means, text);
}

/// Where the data is; a run that was cut off may have taken back the settings that said it.
fn data_dir(means: Means<'_>, manifest: &Manifest) -> Result<String, SetupError> {
    if let Some(noted) = &manifest.data_dir {
        return Ok(noted.clone());
    }
    let text = means.files.text(places::SETTINGS)?.unwrap_or_default();
    Ok(settings_file::text_of(&text, "data_dir").unwrap_or_else(|| "/var/lib/qudata".into()))
}

/// Instances are somebody's: they are named, and go only with `--purge` and a yes.
fn consent(means: Means<'_>, removal: Removal, tenants: &[Tenant], data: &str) -> Result<(), SetupError> {
    let names: Vec<String> =
        tenants.iter().map(|tenant| format!("{} ({})", tenant.id, tenant.name)).collect();
    if !tenants.is_empty() && !removal.purge {
        let what = format!("this host has {} instance(s): {}", tenants.len(), names.join(", "));
        let remedy = "Delete them first, or give --purge, which deletes them with their disks after asking.";
        return Err(SetupError::new(Code::InstancesExist, what, remedy).next("qudata-agent instance list"));
    }
    if !removal.purge || removal.yes {
        return Ok(());
    }
    let mut question = format!("Remove {data} with all images and disks?");
    if !names.is_empty() {
        question = format!("Delete these instances with their disks: {}?\n{question}", names.join(", "));
    }
    let declined = |what: &str| {
        let remedy = "Nothing was changed. Say --yes if that is meant.";
        Err(SetupError::new(Code::Declined, what, remedy).next("qudata-agent uninstall --purge --yes"))
    };
    match means.person.ask(&question) {
        Some(true) => Ok(()),
        Some(false) => declined("the data is not to be removed"),
        None => declined("--purge removes data, and there is no terminal to ask on"),
    }
}

/// While the agent runs it takes orders: an instance may have come since the question, or be one that it does not know.
fn nobody_left(means: Means<'_>, data: &str) -> Result<(), SetupError> {
    let left = means.tenants(data)?;
    if left.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = left.iter().map(|tenant| format!("{} ({})", tenant.id, tenant.name)).collect();
    let what = format!("this host still has {} instance(s): {}", left.len(), names.join(", "));
    let remedy = format!(
        "Nothing of theirs was removed. Delete them first; one that the agent does not know is in {data}/instances."
    );
    Err(SetupError::new(Code::InstancesExist, what, remedy).next("qudata-agent instance list"))
}

/// The agent, and the tunnel client that outlives it. VMs are none any more, which is looked at again once nobody can order
/// any; what else runs is not ours.
fn stop(means: Means<'_>, data: &str) -> Result<(), SetupError> {
    let was = observe::unit_is(means, "is-active") || observe::unit_is(means, "is-enabled");
    let known = means.hands.run(&order("systemctl").args(["cat", places::AGENT_UNIT]), &mut |_| {});
    if !known.is_ok_and(|answer| answer.ok()) {
        return nobody_left(means, data);
    }
    systemctl(means, &["stop", places::AGENT_UNIT], "the agent cannot be stopped")?;
    if let Err(refused) = nobody_left(means, data) {
        if was {
            systemctl(means, &["start", places::AGENT_UNIT], "the agent cannot be started again")
                .map_err(|failed| failed.because(refused.to_string()))?;
        }
        return Err(refused);
    }
    systemctl(means, &["disable", "--now", places::AGENT_UNIT], "the agent cannot be stopped")?;
    systemctl(means, &["stop", "--", "qudata-vm-*-frpc.service"], "the tunnel client cannot be stopped")
}

fn systemctl(means: Means<'_>, words: &[&str], what: &str) -> Result<(), SetupError> {
    let order = order("systemctl").args(words.iter().copied()).within(Duration::from_secs(120));
    must(means.hands, &order).map(drop).map_err(|cause| {
        SetupError::new(Code::AgentFailed, what, "systemd says why.")
            .next("systemctl status qudata-agent")
            .because(cause)
    })
}

/// The agent's rules outlive it, for the sake of its VMs, which are none any more.
fn remove_rules(means: Means<'_>) -> Result<(), SetupError> {
    let there = means.hands.run(&order("nft").args(["list", "table", "inet", places::GROUP]), &mut |_| {});
    if !there.is_ok_and(|answer| answer.ok()) {
        return Ok(());
    }
    must(means.hands, &order("nft").args(["delete", "table", "inet", places::GROUP])).map(drop).map_err(
        |cause| {
            let what = "the agent's rules in the firewall cannot be removed";
            SetupError::new(Code::HostFault, what, "nft says why.")
                .next("sudo nft list tables")
                .because(cause)
        },
    )
}

/// Goes through the list from its end.
fn backwards(means: Means<'_>, ledger: &mut Ledger<'_>) -> Result<Left, SetupError> {
    let (mut left, mut reload) = (Vec::new(), false);
    while let Some(entry) = ledger.manifest.entries.last().cloned() {
        if let Some(earlier) = settings_before(ledger, &entry) {
            // What is made of settings comes after them, also for a run that is cut off in between.
            ledger.manifest.entries.pop();
            ledger.manifest.entries.insert(earlier, entry);
            ledger.save()?;
            continue;
        }
        match &entry {
            Entry::Folder { path } => {
                means.files.remove_empty_dir(path)?;
            }
            Entry::File { path, before, after, secret, edited, .. } => {
                let undone = ledger.restore(path, before.as_ref(), after, *secret)?;
                reload |= undone == Undone::Restored
                    && (path.starts_with("/etc/systemd") || path.starts_with("/etc/udev"));
                if let Undone::Kept(why) = undone {
                    left.push(why);
                } else if let Some(edited) = edited {
                    let place = ledger.outlive(edited)?;
                    left.push(format!("what somebody else had made of {path} lies in {place}"));
                }
            }
            Entry::Generated { path, before, after } => {
                let anew = boot::restore(ledger, means.files, (path, before.as_ref(), after.as_deref()))?;
                if anew || means.files.exists(places::GRUB_DROP_IN) {
                    boot::refresh(means, ledger, (path, before.as_ref()))?;
                }
            }
            Entry::Packages { before, added, named, done } => {
                // apt was cut off: what came is what it was to install and was not there before.
                let added = match done {
                    true => added.clone(),
                    false => packages::came(&packages::list(means)?, before, named),
                };
                keep_program(means);
                // A purge of the package takes its settings along, which are the owner's when they are still here.
                let verb = if has_settings(means)? { "remove" } else { "purge" };
                let kept = packages::purge(means, &added, verb)?;
                if !kept.is_empty() {
                    keep_groups(ledger);
                }
                left.extend(kept);
            }
            Entry::Unit { name } => disable(means, name)?,
            Entry::Groups { added, before } => left.extend(remove_groups(means, ledger, added, before)?),
        }
        say(means, &format!("uninstall: took back {}", name_of(&entry)));
        ledger.manifest.entries.pop();
        ledger.save()?;
    }
    if reload && means.files.exists("/run/systemd/system") {
        must(means.hands, &order("systemctl").args(["daemon-reload"])).map_err(|cause| {
            SetupError::new(Code::HostFault, "systemd did not read its units again", "systemd says why.")
                .because(cause)
        })?;
    }
    Ok(left)
}

/// From here on the package is taken away, and the program with it: where the power fails meanwhile, somebody must be able
/// to go on. A host without room for it loses only that.
fn keep_program(means: Means<'_>) {
    let Ok(Some(program)) = means.files.read("/proc/self/exe") else { return };
    let kept = means.files.read(places::PROGRAM).is_ok_and(|kept| kept.as_ref() == Some(&program));
    if kept {
        return;
    }
    match means.files.write(places::PROGRAM, &program, means.files.mine(0o700)) {
        Ok(()) => {
            let text =
                format!("The packages go now. Should that be cut off: sudo {} uninstall", places::PROGRAM);
            means.person.tell(&progress::Event::Note(text.clone()));
            say(means, &text);
        }
        Err(error) => say(means, &format!("uninstall: the program is not kept: {error}{}", error.causes())),
    }
}

/// For a generated file: the place of the first of the settings that it was made from, while they are not taken back.
fn settings_before(ledger: &Ledger<'_>, entry: &Entry) -> Option<usize> {
    let is_setting = |entry: &Entry| matches!(entry, Entry::File { path, .. } if path == places::GRUB_DROP_IN || path == places::KERNEL_CMDLINE);
    let generated = matches!(entry, Entry::Generated { .. });
    ledger.manifest.entries.iter().position(is_setting).filter(|_| generated)
}

fn name_of(entry: &Entry) -> &str {
    match entry {
        Entry::Folder { path } | Entry::File { path, .. } | Entry::Generated { path, .. } => path,
        Entry::Packages { .. } => "packages",
        Entry::Groups { .. } => "groups",
        Entry::Unit { name } => name,
    }
}

fn disable(means: Means<'_>, name: &str) -> Result<(), SetupError> {
    // A unit whose file is gone has nothing to be disabled.
    let _ = means.hands.run(&order("systemctl").args(["disable", "--quiet", name]), &mut |_| {}).map_err(
        |cause| SetupError::new(Code::HostFault, format!("{name} cannot be disabled"), "").because(cause),
    )?;
    Ok(())
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
            *added = vec![places::GROUP.to_owned()];
        }
    }
}

/// Removes the groups that came with the packages. When nobody else has changed any since, also the copies of their files
/// are as they were.
fn remove_groups(
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

/// Where a server lost its power while install.sh worked, the folder of that. One that works now holds a lock on the
/// folder above.
fn sweep_downloads(means: Means<'_>) -> Result<(), SetupError> {
    const ABOVE: &str = "/var/lib";
    let files = means.files;
    let Ok(above) = std::fs::File::open(files.at(ABOVE)) else { return Ok(()) };
    if flock(&above, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(());
    }
    for name in files.names(ABOVE)? {
        let path = format!("{ABOVE}/{name}");
        if name.starts_with("qudata-install.") && files.is_dir(&path) {
            files.remove_tree(&path)?;
        }
    }
    Ok(())
}

/// What the agent wrote by itself where the package has its settings, and what is left in `/run`.
fn sweep(means: Means<'_>) -> Result<(), SetupError> {
    let files = means.files;
    for name in files.names("/etc/qudata")? {
        if name.starts_with("frpc.") {
            files.remove(&format!("/etc/qudata/{name}"))?;
        }
    }
    if files.exists("/etc/qudata") {
        files.remove_empty_dir("/etc/qudata")?;
    }
    files.remove(places::SELFTEST_DROP_IN)?;
    sweep_downloads(means)
}
