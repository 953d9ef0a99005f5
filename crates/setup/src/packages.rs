//! The package and what comes with it: looking, installing by apt, taking away again. Owns apt's command lines, its
//! percentages and the meaning of its failures.

mod purge;

use std::{collections::BTreeSet, time::Duration};

pub use self::purge::{Going, purge};

use crate::{
    error::{Code, SetupError},
    hands::{Answer, Order, OrderError, failed, must, order},
    ledger::Ledger,
    manifest::Entry,
    outside::{Means, Tick},
    places,
    wish::Wish,
};

/// Some hundred megabytes over a slow line.
const DEADLINE: Duration = Duration::from_secs(3600);
/// Seconds that apt waits for another apt.
const LOCK_WAIT: &str = "DPkg::Lock::Timeout=120";
/// Lists older than this name packages that the mirrors may have no more.
const LISTS_DAYS: u64 = 1;

/// Versions of the package.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    /// Installed.
    pub installed: Option<String>,
    /// Half installed: an earlier apt was cut off.
    pub broken: bool,
    /// In the file that is to be installed.
    pub offered: Option<String>,
}

impl Versions {
    /// Whether there is something to install.
    #[must_use]
    pub fn wants_install(&self) -> bool {
        self.broken || self.offered.is_some() && self.offered != self.installed
    }
}

/// Looks at the package.
///
/// # Errors
/// When the file is no package of this agent.
pub fn observe(means: Means<'_>, wish: &Wish) -> Result<Versions, SetupError> {
    let query = order("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${Version}", places::PACKAGE]);
    let answer = means.hands.run(&query, &mut |_| {}).map_err(no_dpkg)?;
    let (status, version) = answer.out.trim().split_once(' ').unwrap_or_default();
    let known = answer.ok() && !matches!(status, "" | "not-installed" | "config-files");
    let installed = (known && status == "installed").then(|| version.to_owned());
    let offered =
        wish.package.as_ref().map(|file| offered(means, &file.display().to_string())).transpose()?;
    Ok(Versions { broken: known && installed.is_none(), installed, offered })
}

fn no_dpkg(cause: OrderError) -> SetupError {
    if matches!(cause, OrderError::Late { .. }) {
        let remedy = "Look what it waits for: a slow line, or another program that installs packages.";
        return SetupError::new(Code::PackageFailed, "apt or dpkg takes too long", remedy).because(cause);
    }
    let remedy = "The agent is installed by apt, on Debian 12 or newer and Ubuntu 22.04 or newer.";
    SetupError::new(Code::UnsupportedDistribution, "dpkg does not work on this host", remedy).because(cause)
}

fn offered(means: Means<'_>, file: &str) -> Result<String, SetupError> {
    let refused = |what: String| {
        SetupError::new(
            Code::NoPackage,
            what,
            "Give the file of the release, qudata-agent_VERSION_amd64.deb.",
        )
    };
    let query = order("dpkg-deb").args(["-f", file, "Package", "Version"]);
    let answer = must(means.hands, &query)
        .map_err(|cause| refused(format!("{file} cannot be read as a package")).because(cause))?;
    let field = |name: &str| answer.out.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    match (field("Package"), field("Version")) {
        (Some(places::PACKAGE), Some(version)) => Ok(version.to_owned()),
        _ => Err(refused(format!("{file} is not the package {}", places::PACKAGE))),
    }
}

/// Names of all packages that are installed.
///
/// # Errors
/// When dpkg does not tell.
pub fn list(means: Means<'_>) -> Result<Vec<String>, SetupError> {
    named_by_status(means, |status| status == "installed")
}

/// Names of all packages of which anything is there, half installed or removed but for their settings.
///
/// # Errors
/// When dpkg does not tell.
pub fn known(means: Means<'_>) -> Result<Vec<String>, SetupError> {
    named_by_status(means, |status| status != "not-installed")
}

fn named_by_status(means: Means<'_>, wanted: fn(&str) -> bool) -> Result<Vec<String>, SetupError> {
    let query = order("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${binary:Package}\n"]);
    let answer = must(means.hands, &query).map_err(no_dpkg)?;
    let named = answer.out.lines().filter_map(|line| line.split_once(' '));
    Ok(named.filter(|(status, _)| wanted(status)).map(|(_, name)| name.to_owned()).collect())
}

/// Lets dpkg finish what was cut off.
///
/// # Errors
/// When it cannot be run. What it cannot finish needs to be unpacked again, or goes.
pub fn finish(means: Means<'_>) -> Result<(), SetupError> {
    let configure = order("dpkg").args(["--configure", "-a"]).within(DEADLINE);
    means.hands.run(&configure, &mut |_| {}).map(drop).map_err(no_dpkg)
}

/// Installs the package in `file` with what it needs, or finishes what an earlier apt began.
///
/// # Errors
/// When apt fails; what it began is in the list.
pub fn install(
    means: Means<'_>,
    ledger: &mut Ledger<'_>,
    file: Option<&str>,
    tick: &mut dyn FnMut(Tick),
) -> Result<(), SetupError> {
    let before = match ledger.manifest.packages() {
        Some((before, _, _)) => before.to_vec(),
        None => list(means)?,
    };
    if ledger.manifest.packages().is_none() {
        ledger.note(Entry::Packages {
            before: before.clone(),
            added: Vec::new(),
            named: Vec::new(),
            asked: Vec::new(),
            done: false,
        })?;
    }
    finish(means)?;
    if lists_are_old(means) {
        update(means, tick)?;
    }
    let mut words = Vec::new();
    if let Some(file) = file {
        words.push(file.to_owned());
        words.extend(recommended(means, file)?);
    }
    let first = attempt(means, ledger, &words, tick)?;
    if !first.1.ok() {
        // Lists that are too old name files that the mirrors have no more.
        update(means, tick)?;
        let (order, answer) = attempt(means, ledger, &words, tick)?;
        if !answer.ok() {
            return Err(refused_by_apt(&order, &answer));
        }
    }
    let now = list(means)?;
    for entry in &mut ledger.manifest.entries {
        if let Entry::Packages { added, named, done, .. } = entry {
            *added = came(&now, &before, named);
            *done = true;
        }
    }
    ledger.save()
}

/// Of the packages that are there `now`, those that apt was to install and that were not there `before`.
#[must_use]
pub fn came(now: &[String], before: &[String], named: &[String]) -> Vec<String> {
    let named: BTreeSet<&str> = named.iter().map(|name| native(name)).collect();
    let known: BTreeSet<&String> = before.iter().collect();
    let ours = now.iter().filter(|name| !known.contains(name) && named.contains(native(name)));
    ours.cloned().collect()
}

/// dpkg names the architecture of some packages where apt names only a foreign one.
fn native(name: &str) -> &str {
    name.strip_suffix(":amd64").unwrap_or(name)
}

/// One run of apt: what it is going to install is in the list before, and the groups that came are after.
fn attempt(
    means: Means<'_>,
    ledger: &mut Ledger<'_>,
    words: &[String],
    tick: &mut dyn FnMut(Tick),
) -> Result<(Order, Answer), SetupError> {
    let asked = apt_order(true, words);
    let answer = means.hands.run(&asked, &mut |_| {}).map_err(no_dpkg)?;
    if !answer.ok() {
        return Ok((asked, answer));
    }
    let inst = answer.out.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    for entry in &mut ledger.manifest.entries {
        if let Entry::Packages { named, asked, .. } = entry {
            let words = words.iter().filter(|word| !word.starts_with('/'));
            for (list, more) in [
                (named, inst.clone().map(str::to_owned).collect()),
                (asked, words.cloned().collect::<Vec<_>>()),
            ] {
                list.extend(more);
                list.sort();
                list.dedup();
            }
        }
    }
    ledger.save()?;
    let old = groups(means)?;
    let result = apt_install(means, words, tick);
    let new: Vec<String> = groups(means)?.into_iter().filter(|name| !old.contains(name)).collect();
    for entry in &mut ledger.manifest.entries {
        if let Entry::Groups { added, .. } = entry {
            added.extend(new.iter().cloned());
        }
    }
    ledger.save()?;
    result
}

fn groups(means: Means<'_>) -> Result<Vec<String>, SetupError> {
    let [list, ..] = places::GROUP_FILES;
    let text = means.files.text(list)?.unwrap_or_default();
    Ok(text.lines().filter_map(|line| line.split(':').next()).map(str::to_owned).collect())
}

/// After an attempt that was cut off: the groups that are new came with it when nobody else has installed anything since;
/// otherwise nobody knows whose they are, but the agent's.
///
/// # Errors
/// When packages or the files of groups cannot be read, or the list not be written.
pub fn note_groups(means: Means<'_>, ledger: &mut Ledger<'_>) -> Result<(), SetupError> {
    let alone = nobody_else_came(means, ledger)?;
    let [list, ..] = places::GROUP_FILES;
    let now = groups(means)?;
    let mut changed = false;
    for entry in &mut ledger.manifest.entries {
        let Entry::Groups { added, before } = entry else { continue };
        let backup = before.iter().find(|(path, _)| path == list).and_then(|(_, backup)| backup.as_ref());
        let old = match backup {
            Some(backup) => {
                means.files.text(&format!("{}/{}", places::BACKUP, backup.name))?.unwrap_or_default()
            }
            None => String::new(),
        };
        let is_new = |name: &String| !old.lines().any(|line| line.split(':').next() == Some(name));
        for name in now.iter().filter(|name| is_new(name) && (alone || *name == places::GROUP)) {
            if !added.contains(name) {
                added.push(name.clone());
                changed = true;
            }
        }
    }
    if changed { ledger.save() } else { Ok(()) }
}

/// Whether every package that is new is one that apt said it would install for us.
fn nobody_else_came(means: Means<'_>, ledger: &Ledger<'_>) -> Result<bool, SetupError> {
    for entry in &ledger.manifest.entries {
        if let Entry::Packages { before, named, .. } = entry {
            let now = list(means)?;
            let ours = came(&now, before, named);
            return Ok(now.iter().all(|name| before.contains(name) || ours.contains(name)));
        }
    }
    Ok(true)
}

/// What the package itself recommends, as far as the distribution has it. What everything else recommends (windows for
/// QEMU) is of no use on a server.
fn recommended(means: Means<'_>, file: &str) -> Result<Vec<String>, SetupError> {
    let query = order("dpkg-deb").args(["-f", file, "Recommends"]);
    let answer = must(means.hands, &query).map_err(no_dpkg)?;
    let first = |item: &str| {
        let name = item.split('|').next().unwrap_or_default().split('(').next().unwrap_or_default();
        name.trim().to_owned()
    };
    let names: Vec<String> = answer.out.split(',').map(first).filter(|name| !name.is_empty()).collect();
    if names.is_empty() {
        return Ok(names);
    }
    let query = order("apt-cache").args(["policy"]).args(names.iter().cloned());
    let answer = must(means.hands, &query).map_err(no_dpkg)?;
    let mut known = Vec::new();
    let (mut name, mut there) = ("", false);
    for line in answer.out.lines() {
        if let Some(head) = line.strip_suffix(':').filter(|_| !line.starts_with(' ')) {
            (name, there) = (head, false);
        } else if line.trim_start().starts_with("Installed:") {
            // Naming it would make it the owner's own choice in apt's books.
            there = !line.contains("(none)");
        } else if line.trim_start().starts_with("Candidate:") && !line.contains("(none)") {
            known.extend(names.iter().find(|wanted| *wanted == name && !there).cloned());
        }
    }
    Ok(known)
}

/// The owner's packages are not in the way of ours: apt refuses rather than to remove one.
fn apt_order(simulated: bool, words: &[String]) -> Order {
    let options = ["install", "-y", "-f", "--no-remove", "--no-install-recommends", "-o", LOCK_WAIT];
    // Without a terminal of its own, so that what dpkg says is heard.
    let plain = ["-o", "Dpkg::Use-Pty=0", "-o", "Dpkg::Options::=--force-confdef"];
    let keep = ["-o", "Dpkg::Options::=--force-confold"];
    let order = order("apt-get").args(simulated.then_some("-s"));
    order.args(options).args(plain).args(keep).args(words.iter().cloned())
}

fn apt_install(
    means: Means<'_>,
    words: &[String],
    tick: &mut dyn FnMut(Tick),
) -> Result<(Order, Answer), SetupError> {
    let shown = apt_order(false, words);
    // The descriptor for its reports is closed in what dpkg starts: as its standard output it would be missed there.
    let run = order("sh")
        .args(["-c", "exec \"$0\" -o APT::Status-Fd=3 \"$@\" 3>&1", shown.program])
        .args(shown.args.iter().cloned())
        .within(DEADLINE);
    let answer = means.hands.run(&run, &mut |line| heard(line, tick)).map_err(no_dpkg)?;
    Ok((shown, answer))
}

/// Turns apt's reports (`dlstatus:1:42.5:…`, `pmstatus:qemu:42.5:…`) into per cent.
fn heard(line: &str, tick: &mut dyn FnMut(Tick)) {
    let mut parts = line.split(':');
    let what = match parts.next() {
        Some("dlstatus") => "packages are fetched",
        Some("pmstatus") => "packages are installed",
        _ => return,
    };
    let percent = parts.nth(1).and_then(|text| text.split('.').next()).and_then(|text| text.parse().ok());
    tick(Tick { what: what.into(), percent: percent.filter(|percent| *percent <= 100) });
}

fn lists_are_old(means: Means<'_>) -> bool {
    let dir = means.files.at("/var/lib/apt/lists");
    let Ok(entries) = std::fs::read_dir(dir) else { return true };
    let ages = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().contains("Packages") || name.to_string_lossy().contains("InRelease")
    });
    let newest = ages.filter_map(|entry| entry.metadata().ok()?.modified().ok()?.elapsed().ok()).min();
    newest.is_none_or(|age| age > Duration::from_secs(LISTS_DAYS * 86_400))
}

fn update(means: Means<'_>, tick: &mut dyn FnMut(Tick)) -> Result<(), SetupError> {
    tick(Tick { what: "lists of packages are fetched".into(), percent: None });
    let order = order("apt-get").args(["update", "-o", LOCK_WAIT]).within(DEADLINE);
    // A list that could not be had need not matter; whether it does, the installation tells.
    means.hands.run(&order, &mut |_| {}).map(drop).map_err(no_dpkg)
}

fn refused_by_apt(order: &Order, answer: &Answer) -> SetupError {
    let words = format!("{}\n{}", answer.out, answer.err);
    let says = |signs: &[&str]| signs.iter().any(|sign| words.contains(sign));
    let down = [
        "Failed to fetch",
        "Could not resolve",
        "Temporary failure resolving",
        "Unable to connect",
        "Could not connect",
    ];
    let cause = failed(order, &Answer { out: String::new(), err: complaints(&words), ..answer.clone() });
    if says(&down) {
        let remedy =
            "Look at this host's network and at /etc/apt/sources.list; what was fetched so far is kept.";
        return SetupError::new(Code::MirrorDown, "apt cannot reach its mirrors", remedy).because(cause);
    }
    if says(&["Could not get lock", "Unable to acquire the dpkg frontend lock"]) {
        let remedy = "Another program installs packages: wait until it is done.";
        return SetupError::new(Code::PackageFailed, "apt is locked", remedy).because(cause);
    }
    let what = "the package and what it needs cannot be installed";
    let remedy = "Do what apt says; what it began is finished by the next run.";
    SetupError::new(Code::PackageFailed, what, remedy).because(cause)
}

/// What apt and dpkg say is wrong, out of everything they say.
fn complaints(words: &str) -> String {
    let wrong = |line: &&str| {
        line.starts_with("E: ")
            || line.starts_with("dpkg: error")
            || line.contains("error processing")
            || line.starts_with("Err:")
    };
    let lines: Vec<&str> = words.lines().filter(wrong).collect();
    if lines.is_empty() { words.to_owned() } else { lines.join("\n") }
}

/// dpkg writes `libc6:amd64` where apt writes `libc6`.
fn bare(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}
