//! What of the instances the network outside may see: names at the tunnel server, open ports, the confinement of guests.

use std::collections::BTreeSet;

use qudata_api::{ErrorCode, InstanceState, InstanceView, Problem};
use qudata_qemu::egress::{EgressError, Surroundings};
use tokio::sync::watch;
use uuid::Uuid;

use super::Instances;
use crate::{
    instance::handle::{Handle, PortMove},
    publishing::plan::{Published, pick},
    refusal::Refusal,
    site::Site,
};

impl Instances {
    /// What is to be published, oldest instance first. An instance that is being deleted is withdrawn at once.
    pub fn published(&self) -> Vec<Published> {
        self.handles().iter().filter_map(|handle| published(handle, &handle.view())).collect()
    }

    /// Adds to the history of an instance, if it is still there.
    pub fn note(&self, id: Uuid, phase: &str, message: Option<String>) {
        if let Ok(handle) = self.find(id) {
            handle.note(phase, message);
        }
    }

    /// Publishes a port of a guest under another number than `from`, which the tunnel server gives to somebody else.
    ///
    /// # Errors
    /// When the range is used up or the instance does not answer.
    pub async fn move_port(&self, id: Uuid, guest: u16, from: u16) -> Result<(), Refusal> {
        let handle = self.find(id)?;
        let range = self.inner.site.limits().ssh_ports;
        let published = self.published();
        let public = published.iter().flat_map(|p| p.public.values().copied());
        let taken: BTreeSet<u16> = public.chain([from]).collect();
        let apart = published.iter().flat_map(|p| p.ports.values().copied()).chain(taken.clone()).collect();
        let start = rand::random_range(range.clone());
        let to = pick(&range, &apart, start).or_else(|| pick(&range, &taken, start)).ok_or_else(|| {
            let sentence = format!("no public port is free from {} to {}", range.start(), range.end());
            Refusal::new(ErrorCode::PortTaken, sentence)
        })?;
        handle.move_port(PortMove { guest, from, to }).await
    }

    /// Checks that every instance is confined by the egress policy, and puts the policy back where it is not, or renews it
    /// where the network `around` the host has `moved`.
    ///
    /// # Errors
    /// When nftables cannot be asked or refuses.
    pub async fn confine_all(
        &self,
        site: &Site,
        around: &Surroundings,
        moved: bool,
    ) -> Result<(), EgressError> {
        let handles: Vec<Handle> = self.handles().into_iter().filter(has_network).collect();
        let state = site.egress.observe().await?;
        let confined = |handle: &Handle| {
            let admission = site.admission(&handle.holds().leases);
            let closed = is_up(handle) && !state.gated_among(&admission.ports).is_empty();
            state.confines(&admission) && !closed
        };
        // One that has begun to end meanwhile takes its own part out; it must not be put back.
        let handles: Vec<Handle> = handles.into_iter().filter(has_network).collect();
        let intact = state.intact && handles.iter().all(confined);
        if intact && !moved {
            return Ok(());
        }
        if !intact {
            tracing::error!("the network policy was changed by somebody else; putting it back");
        }
        site.egress.install(around).await?;
        for handle in &handles {
            let admission = site.admission(&handle.holds().leases);
            site.egress.admit(&admission).await?;
            // Asked after the gate fell: an instance that becomes ready meanwhile opens it itself.
            if is_up(handle) {
                site.egress.open(&admission.ports).await?;
            }
        }
        Ok(())
    }

    /// An instance with what the tunnel says of it.
    pub(super) fn show(&self, handle: &Handle) -> InstanceView {
        let mut view = handle.view();
        let status = self.inner.outside.get().and_then(|outside| outside.tunnel.as_ref());
        let Some((published, status)) = published(handle, &view).zip(status.map(watch::Receiver::borrow))
        else {
            return view;
        };
        view.routes = published.views(&self.inner.site.public_host(), &status);
        view.problems.extend(view.routes.iter().filter_map(|route| {
            let reason = route.reason.as_ref()?;
            Some(Problem {
                code: "port_not_published".to_owned(),
                message: format!(
                    "port {} of the guest is not published as {}: {reason}",
                    route.guest_port, route.address
                ),
                remedy: "ask the tunnel server's owner; the instance itself is not affected".to_owned(),
                since: view.since,
            })
        }));
        view
    }
}

/// What of an instance is to be published; nothing while it is being deleted, or when it has no name at the tunnel server.
fn published(handle: &Handle, view: &InstanceView) -> Option<Published> {
    let token = handle.holds().tunnel_token.clone()?;
    if view.state == InstanceState::Deleting || handle.is_gone() {
        return None;
    }
    let number = |text: &String| text.parse::<u16>().ok();
    let public = view.ports.iter().filter_map(|(guest, public)| number(guest).zip(number(public))).collect();
    Some(Published { id: handle.id(), ports: handle.holds().leases.ports.clone(), public, token })
}

/// Whether the ports of an instance should be open.
fn is_up(handle: &Handle) -> bool {
    matches!(handle.view().state, InstanceState::Running | InstanceState::Paused)
}

/// Whether an instance has a network that must be confined. During bring-up its own task sees to that.
fn has_network(handle: &Handle) -> bool {
    use InstanceState as S;
    matches!(handle.view().state, S::Booting | S::Running | S::Paused | S::Rebooting | S::Unresponsive)
}
