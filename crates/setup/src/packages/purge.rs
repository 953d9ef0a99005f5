//! Taking away the packages that came with it: which may go, and what of somebody else's goes with them. Called by
//! `uninstall`.

use std::collections::BTreeSet;

use super::{DEADLINE, LOCK_WAIT, bare, known, no_dpkg, refused_by_apt};
use crate::{
    error::{Code, SetupError, UNINSTALL},
    hands::{OrderError, must, order},
    outside::Means,
    places,
};

/// Packages that are to go.
#[derive(Debug)]
pub struct Going<'a> {
    /// They came with it.
    pub added: &'a [String],
    /// Those of them that the installation itself asked apt for.
    pub asked: &'a [String],
    /// `purge` or `remove`.
    pub verb: &'static str,
}

/// Takes the packages away that came with it; what could not go, and why. `changed` is called with settings of packages
/// that somebody has changed, before they go.
///
/// # Errors
/// When apt fails.
pub fn purge(
    means: Means<'_>,
    wish: &Going<'_>,
    changed: &mut dyn FnMut(&str) -> Result<(), SetupError>,
) -> Result<Vec<String>, SetupError> {
    let there: BTreeSet<String> = known(means)?.into_iter().collect();
    let mut going: Vec<String> = wish.added.iter().filter(|name| there.contains(*name)).cloned().collect();
    if going.is_empty() {
        return Ok(Vec::new());
    }
    let mut kept = Vec::new();
    let theirs = asked_for_since(means, &going, wish.asked)?;
    if !theirs.is_empty() {
        going.retain(|name| !theirs.contains(name));
        kept.push(format!(
            "packages that came with the agent and that somebody asked apt for since are kept: {}",
            theirs.join(", ")
        ));
    }
    let ours = going.clone();
    if !stays_within(means, &going, &ours)? {
        // Something that the owner installed since needs one of them: only what nothing needs may go.
        let free = removed_by(means, &["autoremove", "--purge", places::PACKAGE])?;
        let free: Vec<String> =
            free.into_iter().filter(|name| going.iter().any(|g| bare(g) == bare(name))).collect();
        let agent = ours.iter().filter(|name| *name == places::PACKAGE).cloned().collect();
        going = if stays_within(means, &free, &ours)? { free } else { agent };
        let stay: Vec<&str> = ours
            .iter()
            .map(String::as_str)
            .filter(|name| !going.iter().any(|g| bare(g) == bare(name)))
            .collect();
        kept.push(format!(
            "packages that came with the agent and that others need now are kept: {}",
            stay.join(", ")
        ));
    }
    if going.is_empty() {
        return Ok(kept);
    }
    if wish.verb == "purge" {
        changed_settings(means, &going)?.iter().try_for_each(|path| changed(path))?;
        if going.iter().any(|name| name == places::PACKAGE) {
            keep_data(means)?;
        }
    }
    let order = order("apt-get").args([wish.verb, "-y", "-o", LOCK_WAIT]).args(going).within(DEADLINE);
    let answer = means.hands.run(&order, &mut |_| {}).map_err(no_dpkg)?;
    if answer.ok() { Ok(kept) } else { Err(refused_by_apt(&order, &answer).next(UNINSTALL)) }
}

/// In apt's books they are somebody's choice, and not ours.
fn asked_for_since(means: Means<'_>, going: &[String], asked: &[String]) -> Result<Vec<String>, SetupError> {
    let answer = must(means.hands, &order("apt-mark").args(["showmanual"])).map_err(no_dpkg)?;
    let chosen: BTreeSet<&str> = answer.out.lines().map(|line| bare(line.trim())).collect();
    let ours = |name: &str| name == places::PACKAGE || asked.iter().any(|known| known == name);
    let theirs = going.iter().filter(|name| chosen.contains(bare(name)) && !ours(bare(name)));
    Ok(theirs.cloned().collect())
}

/// Files of settings that came with these packages and are not as they came; dpkg(1) shows them as `??5?????? c /etc/x`.
fn changed_settings(means: Means<'_>, packages: &[String]) -> Result<Vec<String>, SetupError> {
    let verify = order("dpkg").args(["--verify"]).args(packages.iter().cloned()).within(DEADLINE);
    let answer = means.hands.run(&verify, &mut |_| {}).map_err(no_dpkg)?;
    let changed = |line: &str| {
        let (marks, path) = line.split_once(" c ")?;
        (marks.as_bytes().get(2) == Some(&b'5')).then(|| path.trim().to_owned())
    };
    Ok(answer.out.lines().filter_map(changed).collect())
}

/// A yes that was preseeded for some other purge must not delete disks in ours. Without debconf nobody asks.
fn keep_data(means: Means<'_>) -> Result<(), SetupError> {
    let answer = format!("{0} {0}/remove_data boolean false\n", places::PACKAGE);
    match must(means.hands, &order("debconf-set-selections").reads(answer.into())) {
        Err(OrderError::Start { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop).map_err(|cause| {
            let what = "debconf cannot be told to keep the data, so the package was not purged";
            SetupError::new(Code::PackageFailed, what, "debconf says why.").next(UNINSTALL).because(cause)
        }),
    }
}

/// Whether taking these away takes nothing else away.
fn stays_within(means: Means<'_>, going: &[String], added: &[String]) -> Result<bool, SetupError> {
    if going.is_empty() {
        return Ok(false);
    }
    let words: Vec<&str> = std::iter::once("purge").chain(going.iter().map(String::as_str)).collect();
    let removed = removed_by(means, &words)?;
    Ok(removed.iter().all(|name| added.iter().any(|known| bare(known) == bare(name))))
}

/// What apt would take away.
fn removed_by(means: Means<'_>, words: &[&str]) -> Result<Vec<String>, SetupError> {
    let order = order("apt-get").args(["-s", "-y"]).args(words.iter().copied());
    let answer = means.hands.run(&order, &mut |_| {}).map_err(no_dpkg)?;
    if !answer.ok() {
        return Err(refused_by_apt(&order, &answer).next(UNINSTALL));
    }
    let going =
        answer.out.lines().filter_map(|line| line.strip_prefix("Purg ").or(line.strip_prefix("Remv ")));
    Ok(going.filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect())
}
