//! Backward: the only cleanup in the program. Called for DELETE, after a failed bring-up, when a VM has ended, and by
//! recovery. Reverse order, each part idempotent, absence is success, never stops at the first failure.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::{causes::chain, durable, launch::log_path, process::Process};
use qudata_qemu::vm::paths::{PASST, QEMU};

use super::record::InstanceRecord;
use crate::{paths::InstancePaths, paths::taken_away, site::Site};

/// A killed QEMU is gone in milliseconds; one that the kernel holds longer (a device that hangs) is left and reported.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Beside that, for each GiB that a GPU's IOMMU has pinned: the kernel lets go of it page by page before the process is gone.
const UNPIN_PER_GIB: Duration = Duration::from_secs(1);

/// What could not be removed, with the reason: one sentence each, for the log and the caller.
pub type Residues = Vec<String>;

/// Ends the processes of an instance and withdraws its network; the disk stays.
pub async fn end_runtime(site: &Site, record: &InstanceRecord) -> Residues {
    let mut residues = Residues::new();
    let InstancePaths { run, logs, .. } = site.instance(record);
    let gone = taken_away(&run);
    // First the name is taken away: a launch that is still on its way can no longer write its identity and gives up.
    // What has written it is found below. Both names are searched, for an earlier attempt may have been interrupted.
    take_away(&run, &gone, &mut residues);
    let deadline = kill_deadline(record);
    let incarnations: Vec<PathBuf> = [&gone, &run].into_iter().flat_map(|dir| subdirectories(dir)).collect();
    for incarnation in &incarnations {
        for name in [QEMU, PASST] {
            end_process(site, incarnation, name, deadline, &mut residues).await;
        }
    }
    if let Err(error) = site.egress.withdraw(&site.admission(&record.leases)).await {
        residues.push(format!("the network policy: {}", chain(&error)));
    }
    let gpus = &record.leases.gpus;
    let mut held = false;
    for incarnation in &incarnations {
        held |= is_alive(site, incarnation, QEMU).await;
    }
    if held {
        site.gpus.strand(record.id, gpus).await;
    } else {
        site.gpus.release(record.id, gpus).await;
    }
    if residues.is_empty() {
        // Only now: the identity files are what a later attempt would need.
        for incarnation in &incarnations {
            keep_logs(incarnation, &logs);
        }
        for dir in [&gone, &run] {
            remove(dir, &mut residues);
        }
    }
    residues
}

/// Ends everything of an instance, the disk included. Its record is for the caller to remove, last of all.
pub async fn remove_all(site: &Site, record: &InstanceRecord) -> Residues {
    let residues = end_runtime(site, record).await;
    if !residues.is_empty() {
        // A process that could not be ended may still write to the disk.
        return residues;
    }
    let instance = site.instance(record);
    // A large disk takes the file system a while.
    let removed = tokio::task::spawn_blocking(move || remove_files(&instance));
    removed.await.unwrap_or_else(|error| vec![format!("removing the files was interrupted: {error}")])
}

fn remove_files(instance: &InstancePaths) -> Residues {
    let mut residues = Residues::new();
    let gone = taken_away(&instance.data);
    take_away(&instance.data, &gone, &mut residues);
    for dir in [&gone, &instance.data, &instance.logs] {
        remove(dir, &mut residues);
    }
    // On disk before the record goes: after a power cut in between, nothing would know whose these files are.
    let parents = [&instance.data, &instance.logs].into_iter().filter_map(|dir| dir.parent());
    for parent in parents.filter(|parent| parent.exists()) {
        if let Err(error) = durable::sync_dir(parent) {
            residues.push(chain(&error));
        }
    }
    residues
}

fn take_away(dir: &Path, gone: &Path, residues: &mut Residues) {
    if !dir.exists() {
        return;
    }
    // A directory cannot be renamed over one that is not empty; then the earlier one is kept and both are searched.
    if gone.exists() {
        return;
    }
    if let Err(error) = std::fs::rename(dir, gone) {
        residues.push(format!("{}: {error}", dir.display()));
    }
}

fn kill_deadline(record: &InstanceRecord) -> Duration {
    if record.leases.gpus.is_empty() {
        return KILL_DEADLINE;
    }
    let gib = u32::try_from(record.spec.memory.bytes().div_ceil(1 << 30)).unwrap_or(u32::MAX);
    KILL_DEADLINE.saturating_add(UNPIN_PER_GIB.saturating_mul(gib))
}

async fn end_process(site: &Site, dir: &Path, name: &str, deadline: Duration, residues: &mut Residues) {
    if let Err(error) = site.launcher.end(dir, name, deadline).await {
        residues.push(format!("{name}: {}", chain(&error)));
    }
}

/// Whether a process may still be there: also when that cannot be told.
async fn is_alive(site: &Site, dir: &Path, name: &str) -> bool {
    match site.launcher.locate(dir, name).await {
        Ok(None) => false,
        Ok(Some(identity)) => !matches!(Process::adopt(&identity), Ok(None)),
        Err(_) => true,
    }
}

/// What QEMU and passt printed stays until DELETE: it tells why they ended. Not worth a residue when it cannot.
fn keep_logs(incarnation: &Path, logs: &Path) {
    if durable::create_dir(logs, 0o700).is_err() {
        return;
    }
    for name in [QEMU, PASST] {
        let from = log_path(incarnation, name);
        // The run directory may be on another file system, and QEMU's user never had access to this file.
        if from.exists() {
            let _ = std::fs::copy(&from, log_path(logs, name));
        }
    }
}

/// The processes of an instance that are alive, by name. Nothing may be started while there are any.
///
/// # Errors
/// When that cannot be told; then there may be some.
pub async fn find_alive(site: &Site, record: &InstanceRecord) -> Result<Vec<&'static str>, String> {
    let InstancePaths { run, .. } = site.instance(record);
    let mut alive = Vec::new();
    for incarnation in [taken_away(&run), run].iter().flat_map(|dir| subdirectories(dir)) {
        for name in [QEMU, PASST] {
            let identity = site.launcher.locate(&incarnation, name).await.map_err(|e| chain(&e))?;
            let process =
                identity.map(|identity| Process::adopt(&identity)).transpose().map_err(|e| chain(&e))?;
            alive.extend(process.flatten().map(|_| name));
        }
    }
    Ok(alive)
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn remove(dir: &Path, residues: &mut Residues) {
    if let Err(error) = durable::remove_tree(dir) {
        residues.push(chain(&error));
    }
}
