//! Takes an installation back: the list of changes, backwards. Owns what may be in the way and what is removed besides.
//! Called by the CLI's `uninstall`.
//!
//! It stops the agent and its tunnel client and nothing else. An entry leaves the list when it is taken back, so that a run
//! that was cut off is finished by the next one.

mod data;
mod software;

use std::{path::Path, time::Duration};

use qudata_agent_core::daemon::table_name;
use rustix::fs::{FlockOperation, flock};

use crate::{
    boot,
    error::{AGAIN, Code, SetupError, UNINSTALL},
    hands::{must, order},
    install::{lock, not_root},
    ledger::{Ledger, Undone},
    manifest::{Entry, Manifest, Noted},
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

impl Removal {
    /// `line` with the options that count for a run that goes on.
    fn line(self, line: &str) -> String {
        if self.purge { format!("{line} --purge") } else { line.to_owned() }
    }
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
    let data = noted(means, &manifest)?.data_dir;
    let _ = match removal.purge {
        true => {
            writeln!(text, "delete all instances, the images, disks and keys in {data}, and {}", places::LOGS)
        }
        false => writeln!(text, "keep {data} and {}", places::LOGS),
    };
    text.push_str("\nNothing was changed.\n");
    Ok(text)
}

/// Takes everything back.
///
/// # Errors
/// When instances are in the way, somebody does not agree, or something cannot be taken back yet.
pub fn uninstall(means: Means<'_>, removal: Removal) -> Result<Left, SetupError> {
    take_back(means, removal).map_err(|error| {
        let again = error.next == AGAIN || error.next == UNINSTALL;
        if again { error.next(removal.line(UNINSTALL)) } else { error }
    })
}

fn take_back(means: Means<'_>, removal: Removal) -> Result<Left, SetupError> {
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
    let mut noted = noted(means, &ledger.manifest)?;
    let data = noted.data_dir.clone();
    let tenants = means.tenants(&data)?;
    known_to_the_agent(means, &tenants, &data)?;
    consent(means, removal, &tenants, &data)?;
    say(means, "uninstall: begins");
    for tenant in &tenants {
        means.outside.delete(&tenant.id).map_err(|why| {
            let what = format!("instance {} ({}) cannot be deleted: {why}", tenant.id, tenant.name);
            let next = "systemctl start qudata-agent; qudata-agent instance list";
            SetupError::new(Code::InstancesExist, what, "The agent has to run for that.").next(next)
        })?;
    }
    nobody_left(means, &data)?;
    // An installation that waits for a restart must not go on by itself where its owner is taking it back.
    means.files.remove(places::WISH)?;
    if ledger.manifest.noted.is_none() {
        noted.parameters = boot::ours(&ledger, means.files)?;
        ledger.manifest.noted = Some(noted.clone());
        ledger.save()?;
    }
    stop(means, &data)?;
    remove_rules(means, &data)?;
    // An installation that was cut off has not come so far.
    packages::note_groups(means, &mut ledger)?;
    let mut left = backwards(means, &mut ledger, removal)?;
    for path in boot::forget(means.files, &noted.parameters)? {
        say(means, &format!("uninstall: took the parameters out of {path}"));
    }
    sweep(means)?;
    if removal.purge {
        nobody_left(means, &data)?;
        left.extend(data::remove(means.files, &noted)?);
        means.files.remove_tree(places::LOGS)?;
    } else {
        say(means, "uninstall: done");
        left.push(format!(
            "{data} is kept, with images and keys, and {logs} with the logs: `rm -r {data} {logs}` when nothing in them is needed.",
            logs = places::LOGS
        ));
    }
    means.files.remove_tree(places::STATE)?;
    remove_empty(means)?;
    Ok(left)
}

/// Folders that are nobody's when nothing is in them.
fn remove_empty(means: Means<'_>) -> Result<(), SetupError> {
    for dir in ["/var/lib/qudata", places::LOGS] {
        if means.files.exists(dir) {
            means.files.remove_empty_dir(dir)?;
        }
    }
    Ok(())
}

fn say(means: Means<'_>, text: &str) {
    progress::log_line(means, text);
}

/// What the settings and the agent's unit say; a run that was cut off may have taken them back.
fn noted(means: Means<'_>, manifest: &Manifest) -> Result<Noted, SetupError> {
    if let Some(noted) = &manifest.noted {
        return Ok(noted.clone());
    }
    let text = means.files.text(places::SETTINGS)?.unwrap_or_default();
    if !settings_file::is_toml(&text) {
        let what = format!("{} is not TOML: where the instances are cannot be known", places::SETTINGS);
        return Err(SetupError::new(
            Code::BadSettings,
            what,
            "Mend or remove the file; nothing was changed.",
        )
        .next(format!("sudo editor {}", places::SETTINGS)));
    }
    let show = order("systemctl").args(["show", "-p", "Environment", "--value", places::AGENT_UNIT]);
    let environment = means.hands.run(&show, &mut |_| {}).map(|answer| answer.out).unwrap_or_default();
    let said = |key: &str| {
        let name = format!("QUDATA_{}=", key.to_uppercase());
        let words = environment.split_whitespace().map(|word| word.trim_matches('"'));
        let from_unit = words.filter_map(|word| word.strip_prefix(&name)).next_back().map(str::to_owned);
        let value = from_unit.or_else(|| settings_file::text_of(&text, key))?;
        let plain = value.trim_end_matches('/');
        Some(if plain.is_empty() { value } else { plain.to_owned() })
    };
    let data_dir = said("data_dir").unwrap_or_else(|| "/var/lib/qudata".into());
    let image_dir = said("image_dir").unwrap_or_else(|| format!("{data_dir}/images"));
    Ok(Noted { data_dir, image_dir, parameters: Vec::new() })
}

/// One that the agent does not know it cannot delete, which is said before any other is.
fn known_to_the_agent(means: Means<'_>, tenants: &[Tenant], data: &str) -> Result<(), SetupError> {
    let Some(known) = means.outside.tenants() else { return Ok(()) };
    let unknown: Vec<&str> = tenants
        .iter()
        .filter(|tenant| !known.iter().any(|k| k.id == tenant.id))
        .map(|tenant| tenant.id.as_str())
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let what = format!(
        "this host has {} instance(s) that the agent does not know: {}",
        unknown.len(),
        unknown.join(", ")
    );
    let remedy = format!(
        "Nothing was changed. Look whose they are; what nobody needs in {data}/instances is removed by hand."
    );
    Err(SetupError::new(Code::InstancesExist, what, remedy).next(format!("sudo ls -l {data}/instances")))
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
    let mut question = format!("Remove all images, disks and keys in {data}?");
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
fn remove_rules(means: Means<'_>, data: &str) -> Result<(), SetupError> {
    let table = table_name(Path::new(data));
    let there = means.hands.run(&order("nft").args(["list", "table", "inet", &table]), &mut |_| {});
    if !there.is_ok_and(|answer| answer.ok()) {
        return Ok(());
    }
    must(means.hands, &order("nft").args(["delete", "table", "inet", &table])).map(drop).map_err(|cause| {
        let what = "the agent's rules in the firewall cannot be removed";
        SetupError::new(Code::HostFault, what, "nft says why.").next("sudo nft list tables").because(cause)
    })
}

/// Goes through the list from its end.
fn backwards(means: Means<'_>, ledger: &mut Ledger<'_>, removal: Removal) -> Result<Left, SetupError> {
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
                let mut copies = edited.as_slice();
                if let Undone::Kept(why) = undone {
                    left.push(why);
                    copies = &[];
                }
                for edited in copies {
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
            Entry::Packages { .. } => left.extend(software::take_back(means, ledger, removal, &entry)?),
            Entry::Unit { name } => disable(means, name)?,
            Entry::Groups { added, before } => {
                left.extend(software::remove_groups(means, ledger, added, before)?)
            }
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
