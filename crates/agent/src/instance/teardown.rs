//! Backward: the only cleanup in the program. Called for DELETE, after a failed bring-up, when a VM has ended, and by
//! recovery. Reverse order, each part idempotent, absence is success, never stops at the first failure.

use std::{path::Path, time::Duration};

use qudata_host::{durable, launch::Launcher, process::Process};
use qudata_qemu::vm::paths::{PASST, QEMU};

use super::record::InstanceRecord;
use crate::{paths::taken_away, refusal::chain, site::Site};

/// A killed QEMU is gone in milliseconds; one that the kernel holds longer (a device that hangs) is left and reported.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What could not be removed, with the reason: one sentence each, for the log and the caller.
pub type Residues = Vec<String>;

/// Ends the processes of an instance and withdraws its network; the disk stays.
pub async fn end_runtime(site: &Site, record: &InstanceRecord) -> Residues {
    let mut residues = Residues::new();
    let run = site.instance(record).vm.dir().to_owned();
    let gone = taken_away(&run);
    // First the name is taken away: a launch that is still on its way can no longer write its identity and gives up.
    // What has written it is found below. Both names are searched, for an earlier attempt may have been interrupted.
    take_away(&run, &gone, &mut residues);
    for dir in [&gone, &run] {
        for name in [QEMU, PASST] {
            end_process(dir, name, &mut residues).await;
        }
    }
    if let Err(error) = site.egress.withdraw(&site.admission(&record.leases)).await {
        residues.push(format!("the network policy: {}", chain(&error)));
    }
    if residues.is_empty() {
        // Only now: the identity files are what a later attempt would need.
        keep_logs(&gone, &run);
        remove(&gone, &mut residues);
    }
    residues
}

/// Ends everything of an instance, the disk included. Its record is for the caller to remove, last of all.
pub async fn remove_all(site: &Site, record: &InstanceRecord) -> Residues {
    let mut residues = end_runtime(site, record).await;
    if !residues.is_empty() {
        // A process that could not be ended may still write to the disk.
        return residues;
    }
    let instance = site.instance(record);
    let gone = taken_away(&instance.data);
    take_away(&instance.data, &gone, &mut residues);
    for dir in [&gone, &instance.data] {
        remove(dir, &mut residues);
    }
    remove(instance.vm.dir(), &mut residues);
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

async fn end_process(dir: &Path, name: &str, residues: &mut Residues) {
    let ended = async {
        let Some(identity) = Launcher::find(dir, name).map_err(|e| chain(&e))? else { return Ok(()) };
        let Some(process) = Process::adopt(&identity).map_err(|e| chain(&e))? else { return Ok(()) };
        process.kill(KILL_DEADLINE).await.map_err(|e| chain(&e))
    };
    if let Err(reason) = ended.await {
        let reason: String = reason;
        residues.push(format!("{name}: {reason}"));
    }
}

/// What the VM printed stays until DELETE or the next start: it tells why it ended.
fn keep_logs(gone: &Path, run: &Path) {
    if durable::create_dir(run, 0o711).is_err() {
        return;
    }
    for file in ["qemu.log", "passt.log", "console.log"] {
        let _ = std::fs::rename(gone.join(file), run.join(file));
    }
}

fn remove(dir: &Path, residues: &mut Residues) {
    if let Err(error) = durable::remove_tree(dir) {
        residues.push(chain(&error));
    }
}
