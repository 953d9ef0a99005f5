//! What is shown of an instance: the view behind every GET, its problems, and the record behind both. Part of the
//! instance's task.

use std::collections::BTreeMap;

use jiff::Timestamp;
use qudata_api::{InstanceState, InstanceView, Problem, SshEndpoint};
use qudata_guest::keys::GuestKey;
use qudata_host::causes::chain;

use super::{
    handle::port_map,
    record::{InstanceRecord, Phase},
    spec::SSH_PORT,
    task::{Beginning, InstanceTask},
};
use crate::{settings::TunnelKind, site::Site};

impl InstanceTask {
    /// Changes the state; the reason belongs to the new one.
    pub(super) fn enter(&mut self, state: InstanceState, reason: Option<String>) {
        if self.state != state {
            tracing::info!(instance = %self.record.id, from = ?self.state, to = ?state, reason, "state");
            self.since = Timestamp::now();
        }
        (self.state, self.reason) = (state, reason);
        self.publish();
    }

    /// Shows what is.
    pub(super) fn publish(&mut self) {
        let view = InstanceView {
            state: self.state,
            status: self.state.status(),
            since: self.since,
            reason: self.reason.clone(),
            sample: self.sample.clone(),
            problems: self.problems.values().cloned().collect(),
            ..first_view(&self.site, &self.record, self.state)
        };
        self.view.send_replace(view);
        self.site.changes.send_replace(());
    }

    /// Notes a problem; one that is known already keeps its beginning.
    pub(super) fn problem(&mut self, code: &'static str, message: impl Into<String>, remedy: &str) {
        let message = message.into();
        tracing::warn!(instance = %self.record.id, code, message, "problem");
        if !self.problems.contains_key(code) {
            self.events.add("problem", Some(message.clone()));
        }
        let problem = |since| Problem { code: code.to_owned(), message, remedy: remedy.to_owned(), since };
        let since = self.problems.get(code).map_or_else(Timestamp::now, |known| known.since);
        self.problems.insert(code, problem(since));
        self.publish();
    }

    /// A problem is over.
    pub(super) fn solved(&mut self, code: &'static str) {
        if self.problems.remove(code).is_some() {
            self.publish();
        }
    }

    /// Writes the phase down. A store that fails is a problem to be told, not a reason to stop serving a tenant; whether
    /// it is on disk matters to what must not begin without.
    pub(super) async fn commit(&mut self, phase: Phase) -> bool {
        self.record.phase = phase;
        self.record.since = Timestamp::now();
        self.write_down().await
    }

    /// Writes the record down as it is; false when it is not on disk, which is shown then.
    pub(super) async fn write_down(&mut self) -> bool {
        match self.site.store.put(&self.record).await {
            Ok(()) => {
                self.solved("store_failed");
                true
            }
            Err(error) => {
                tracing::error!(instance = %self.record.id, error = %chain(&error), "commit failed");
                self.problem(
                    "store_failed",
                    "the agent cannot write down the state of this instance",
                    "free space on the file system of the agent's data directory",
                );
                false
            }
        }
    }
}

/// The state that a record and a beginning mean.
pub(super) fn first_state(record: &InstanceRecord, beginning: &Beginning) -> InstanceState {
    match (beginning, &record.phase) {
        (Beginning::Provision(_) | Beginning::BringUp, _) => InstanceState::Provisioning,
        (Beginning::Delete, _) | (_, Phase::Deleting) => InstanceState::Deleting,
        (_, Phase::Starting) => InstanceState::Booting,
        (_, Phase::Up) => InstanceState::Running,
        (_, Phase::Stopped { .. }) => InstanceState::Stopped,
        (_, Phase::Failed { .. }) => InstanceState::Failed,
    }
}

/// The reason a record tells.
pub(super) fn first_reason(record: &InstanceRecord) -> Option<String> {
    match &record.phase {
        Phase::Stopped { reason } | Phase::Failed { reason } => Some(reason.clone()),
        Phase::Starting | Phase::Up | Phase::Deleting => None,
    }
}

/// The view of a record in a state.
pub(super) fn first_view(site: &Site, record: &InstanceRecord, state: InstanceState) -> InstanceView {
    // As they are now: the owner may have changed the tunnel since the instance was made. Without a name at the tunnel
    // server nothing of it is published.
    let published = site.settings.tunnel == TunnelKind::Frp && record.spec.tunnel_token.is_some();
    let public = if published { record.leases.public_ports() } else { record.leases.ports.clone() };
    let ssh = public.get(&SSH_PORT).map(|port| SshEndpoint {
        host: if published { site.public_host() } else { site.local_host() },
        port: *port,
        user: "root".to_owned(),
    });
    let fingerprint = |line: &String| GuestKey::parse(line).ok().map(|key| key.fingerprint());
    InstanceView {
        id: record.id,
        name: record.spec.name.clone(),
        status: state.status(),
        state,
        since: record.since,
        reason: first_reason(record),
        ports: port_map(&public),
        local_ports: if published { port_map(&record.leases.ports) } else { BTreeMap::new() },
        routes: Vec::new(),
        ssh,
        ssh_host_key: record.host_key.clone(),
        ssh_keys: record.spec.ssh_keys.iter().filter_map(fingerprint).collect(),
        cpus: record.spec.cpus,
        memory: record.spec.memory.bytes(),
        storage: record.spec.storage.bytes(),
        gpus: record.leases.gpus.iter().map(ToString::to_string).collect(),
        created_at: record.created_at,
        ready_at: record.ready_at,
        sample: None,
        problems: Vec::new(),
    }
}
