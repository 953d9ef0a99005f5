//! Taking over from an earlier agent: observe what is there, plan what to do about it (pure), apply. Runs before the API
//! opens. Nothing alive is ended here unless its end was already decided and written down.

use std::{sync::Arc, time::Duration};

use qudata_api::Problem;
use qudata_host::{causes::chain, process::Process};
use qudata_qemu::{
    egress::EgressState,
    vm::{
        Adoption, Vm,
        paths::{PASST, QEMU},
    },
};
use uuid::Uuid;

use crate::{
    instance::{
        record::{InstanceRecord, Phase},
        task::{Adopted, Beginning},
    },
    instances::Instances,
    paths::taken_away,
    site::Site,
};

/// How long one VM may take to answer; those that do not are adopted as unresponsive.
const ADOPT_DEADLINE: Duration = Duration::from_secs(3);

/// What was found of an instance's VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A living process that is the instance's VM, whether it answers or not.
    Alive,
    /// None.
    Nothing,
    /// A living process whose identity could not be settled: it is left alone.
    Unclear,
}

/// What is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Take the VM over.
    Adopt,
    /// Bring it up: it was being brought up, or the host has rebooted under it.
    BringUp,
    /// Note that the VM ended while nobody was watching.
    NoteEnd,
    /// Note that the host has rebooted under the VM.
    NoteReboot,
    /// End what is left of the VM; the instance rests.
    EndRuntime,
    /// Finish the DELETE.
    Delete,
    /// Show it as it is and touch nothing.
    Leave,
}

/// Whether the host has rebooted since the VM was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostBoot {
    /// It has not.
    Same,
    /// It has, and the owner wants instances to start again.
    OtherStart,
    /// It has, and the owner wants them to stay stopped.
    OtherStop,
}

/// Decides.
pub fn plan_recovery(phase: &Phase, found: Found, boot: HostBoot) -> Plan {
    match (phase, found) {
        (Phase::Deleting, _) => Plan::Delete,
        (_, Found::Unclear) => Plan::Leave,
        (Phase::Starting | Phase::Up, Found::Alive) => Plan::Adopt,
        (Phase::Starting, Found::Nothing) => Plan::BringUp,
        (Phase::Up, Found::Nothing) => match boot {
            HostBoot::Same => Plan::NoteEnd,
            HostBoot::OtherStart => Plan::BringUp,
            HostBoot::OtherStop => Plan::NoteReboot,
        },
        // The end was decided and written down; the agent was killed before it was done.
        (Phase::Stopped { .. } | Phase::Failed { .. }, _) => Plan::EndRuntime,
    }
}

struct Observation {
    found: Found,
    vm: Option<Vm>,
    passt: Option<Process>,
}

/// Takes over every recorded instance and reports what does not belong to any.
pub async fn recover(site: &Arc<Site>, records: Vec<InstanceRecord>, instances: &Instances) -> Vec<Problem> {
    let known: Vec<Uuid> = records.iter().map(|record| record.id).collect();
    let policy = Arc::new(site.egress.observe().await.unwrap_or_else(|error| {
        tracing::error!(error = %chain(&error), "the network policy cannot be read");
        EgressState::default()
    }));
    // One hanging QEMU must not delay the others.
    let mut recoveries = tokio::task::JoinSet::new();
    for record in records {
        let (site, policy) = (site.clone(), policy.clone());
        recoveries.spawn(async move { recover_one(&site, &policy, record).await });
    }
    while let Some(recovered) = recoveries.join_next().await {
        match recovered {
            Ok((record, beginning)) => instances.adopt(record, beginning),
            Err(error) => tracing::error!(%error, "an instance could not be recovered"),
        }
    }
    find_orphans(site, &known)
}

async fn recover_one(
    site: &Arc<Site>,
    policy: &EgressState,
    mut record: InstanceRecord,
) -> (InstanceRecord, Beginning) {
    let id = record.id;
    // A teardown was interrupted here: nothing new can come of it, and it is gone on with. Beside a directory of the
    // first name it tells nothing: that one was made later, and a tenant may live in it.
    let run = site.instance(&record).run;
    let interrupted = taken_away(&run).exists() && !run.exists();
    let Observation { found, vm, passt } = if interrupted {
        Observation { found: Found::Nothing, vm: None, passt: None }
    } else {
        observe(site, &record).await
    };
    let boot = match (record.boot_id == site.boot_id, site.settings.start_after_reboot) {
        (true, _) => HostBoot::Same,
        (false, true) => HostBoot::OtherStart,
        (false, false) => HostBoot::OtherStop,
    };
    let plan = plan_recovery(&record.phase, found, boot);
    tracing::info!(instance = %id, phase = ?record.phase, ?found, ?plan, "recovering");
    let beginning = match (plan, vm) {
        (Plan::Adopt, Some(vm)) => {
            confine(site, policy, &record).await;
            Beginning::Adopted(Box::new(Adopted { vm, passt }))
        }
        (Plan::Adopt | Plan::Leave, _) => {
            let reason = "a process of this instance is alive and could not be identified; it is left alone";
            record.phase = Phase::Failed { reason: reason.to_owned() };
            Beginning::Rest
        }
        // What takes long is the instance's own business: a QEMU that the kernel does not let go must not keep the agent
        // from the others.
        (Plan::BringUp, _) => Beginning::BringUp,
        (Plan::NoteEnd | Plan::NoteReboot, _) => {
            let reason = if plan == Plan::NoteReboot {
                "the host has rebooted; the disk is kept, start boots it again"
            } else {
                "the VM ended while the agent was not running; the disk is kept, start boots it again"
            };
            record.phase = Phase::Stopped { reason: reason.to_owned() };
            put(site, &record).await;
            Beginning::End
        }
        (Plan::EndRuntime, _) => Beginning::End,
        (Plan::Delete, _) => Beginning::Delete,
    };
    (record, beginning)
}

/// Confines an adopted VM again where the policy was lost. Where it holds it is left alone: admitting anew would close
/// the tenant's ports for a moment.
async fn confine(site: &Site, policy: &EgressState, record: &InstanceRecord) {
    let admission = site.admission(&record.leases);
    if policy.confines(&admission) {
        return;
    }
    if let Err(error) = site.egress.admit(&admission).await {
        tracing::error!(instance = %record.id, error = %chain(&error), "the network policy was not renewed");
    }
}

async fn observe(site: &Site, record: &InstanceRecord) -> Observation {
    let paths = site.instance(record).vm;
    let passt = site.launcher.locate(paths.dir(), PASST).await.ok().flatten();
    let passt = passt.and_then(|identity| Process::adopt(&identity).ok().flatten());
    let identity = match site.launcher.locate(paths.dir(), QEMU).await {
        Ok(Some(identity)) => identity,
        Ok(None) => return Observation { found: Found::Nothing, vm: None, passt },
        Err(error) => {
            tracing::error!(instance = %record.id, error = %chain(&error), "the identity of the VM cannot be read");
            return Observation { found: Found::Unclear, vm: None, passt };
        }
    };
    match Vm::adopt(&identity, paths, record.id, ADOPT_DEADLINE).await {
        Ok(Adoption::Gone) => Observation { found: Found::Nothing, vm: None, passt },
        Ok(Adoption::Running(vm)) => Observation { found: Found::Alive, vm: Some(vm), passt },
        Ok(Adoption::Unresponsive(vm, error)) => {
            tracing::warn!(instance = %record.id, error = %chain(&error), "the VM does not answer");
            Observation { found: Found::Alive, vm: Some(vm), passt }
        }
        Err(error) => {
            tracing::error!(instance = %record.id, error = %chain(&error), "the VM cannot be identified");
            Observation { found: Found::Unclear, vm: None, passt }
        }
    }
}

async fn put(site: &Site, record: &InstanceRecord) -> bool {
    let done = site.store.put(record).await;
    if let Err(error) = &done {
        tracing::error!(instance = %record.id, error = %chain(error), "commit failed");
    }
    done.is_ok()
}

/// Directories of instances that no record knows: reported, never removed. A disk in them may be a tenant's.
fn find_orphans(site: &Site, known: &[Uuid]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for parent in [site.paths.instances(), site.paths.vms()] {
        let Ok(entries) = std::fs::read_dir(&parent) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let id =
                path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| Uuid::parse_str(stem).ok());
            if id.is_none_or(|id| known.contains(&id)) {
                continue;
            }
            // An order that was cut off before it was accepted: there is nothing in it.
            if std::fs::remove_dir(&path).is_ok() {
                continue;
            }
            tracing::warn!(path = %path.display(), "belongs to no instance");
            problems.push(Problem {
                code: "orphan".to_owned(),
                message: site.without_paths(&format!("{} belongs to no instance", path.display())),
                remedy: "look at it; remove it if nobody needs it (the agent never removes what it has no record of)"
                    .to_owned(),
                since: jiff::Timestamp::now(),
            });
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    // orig-L1: every start of the original killed what it found.
    #[test]
    fn orig_l1_nothing_alive_is_ended_unless_that_was_decided() {
        let reason = String::new;
        let phases = [
            Phase::Starting,
            Phase::Up,
            Phase::Stopped { reason: reason() },
            Phase::Failed { reason: reason() },
            Phase::Deleting,
        ];
        let expected = [
            // alive, nothing (same boot), nothing (other boot, start or stop), unclear
            [Plan::Adopt, Plan::BringUp, Plan::BringUp, Plan::BringUp, Plan::Leave],
            [Plan::Adopt, Plan::NoteEnd, Plan::BringUp, Plan::NoteReboot, Plan::Leave],
            [Plan::EndRuntime, Plan::EndRuntime, Plan::EndRuntime, Plan::EndRuntime, Plan::Leave],
            [Plan::EndRuntime, Plan::EndRuntime, Plan::EndRuntime, Plan::EndRuntime, Plan::Leave],
            [Plan::Delete; 5],
        ];
        let world = [
            (Found::Alive, HostBoot::Same),
            (Found::Nothing, HostBoot::Same),
            (Found::Nothing, HostBoot::OtherStart),
            (Found::Nothing, HostBoot::OtherStop),
            (Found::Unclear, HostBoot::Same),
        ];
        for (phase, row) in phases.iter().zip(expected) {
            for ((found, boot), plan) in world.into_iter().zip(row) {
                assert_eq!(plan_recovery(phase, found, boot), plan, "{phase:?} {found:?} {boot:?}");
            }
        }
    }
}
