//! Keeps the tunnel's routes what the instances need: the agent's own API and every published port. Started by the
//! daemon when the tunnel is frp; asks `Instances` what is there, tells the tunnel, and finds another public port where
//! the server has given one to somebody else.
//!
//! Nothing here waits for the tunnel: an instance boots, runs and is deleted with the tunnel down all the same.

pub mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use qudata_api::ErrorCode;
use qudata_tunnel::{Refusal as Why, Route, RouteKind, RouteState, RouteStatus, Tunnel, TunnelStatus};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use uuid::Uuid;

use self::plan::{Published, name, own_route};
use crate::{instance::record::Sealed, instances::Instances, refusal::Refusal};

/// Between two tries for a port, doubled each time: a server that refuses all of them is not to be flooded.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// An instance that is being brought up or busy with a call is asked again after this.
const BUSY_PAUSE: Duration = Duration::from_millis(500);
/// Nobody's routes wait longer for one instance.
const PATIENCE: Duration = Duration::from_millis(500);

/// What the agent publishes of itself.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    /// Its id.
    pub agent_id: Uuid,
    /// Port of its API.
    pub port: u16,
}

/// The task; see the module.
#[derive(Debug)]
pub struct Publisher {
    tunnel: Tunnel,
    instances: Instances,
    own: Own,
    /// Name of the API's virtual host, once the control plane has given one.
    token: watch::Receiver<Option<Sealed>>,
    /// Tries for another public port, by instance and guest port.
    moves: BTreeMap<(Uuid, u16), Moves>,
    /// Routes of VMs that no record knows any more: their tenants keep their way in.
    kept: Vec<Route>,
    /// Instances whose routes have all been up.
    announced: BTreeSet<Uuid>,
}

#[derive(Debug, Clone, Copy)]
struct Moves {
    pause: Duration,
    next: Instant,
}

impl Moves {
    fn later(self, now: Instant) -> Self {
        Self { pause: (self.pause * 2).min(LONGEST_PAUSE), next: now + self.pause }
    }
}

impl Publisher {
    /// A publisher; nothing happens before [`Publisher::run`].
    pub fn new(
        tunnel: Tunnel,
        instances: Instances,
        own: Own,
        token: watch::Receiver<Option<Sealed>>,
        kept: Vec<Route>,
    ) -> Self {
        Self { tunnel, instances, own, token, moves: BTreeMap::new(), kept, announced: BTreeSet::new() }
    }

    /// All routes that should be there: the API's once it has a name, and those of the instances.
    pub fn wanted(own: Own, token: Option<&Sealed>, published: &[Published]) -> Vec<Route> {
        let api = token.and_then(|token| own_route(own.agent_id, token, own.port).ok());
        api.into_iter().chain(published.iter().flat_map(Published::routes)).collect()
    }

    /// Runs as long as the agent does.
    pub async fn run(mut self) {
        let mut changes = self.instances.changes();
        let mut status = self.tunnel.status();
        let mut told = None;
        loop {
            let published = self.instances.published();
            let mut wanted = Self::wanted(self.own, self.token.borrow_and_update().as_ref(), &published);
            wanted.extend(self.kept.iter().cloned());
            if told.as_ref() != Some(&wanted) {
                self.tunnel.want(wanted.clone());
                told = Some(wanted);
            }
            let seen = status.borrow_and_update().clone();
            self.announce(&published, &seen);
            let again = self.move_refused(&published, &seen).await;
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = status.changed() => if changed.is_err() { return },
                // Without a control plane no new token comes: that is no reason to stop.
                Ok(()) = self.token.changed() => {}
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// An instance can be reached from outside from now on.
    fn announce(&mut self, published: &[Published], status: &TunnelStatus) {
        self.announced.retain(|id| published.iter().any(|instance| instance.id == *id));
        for instance in published {
            let up = |route: Route| {
                let found = status.routes.get(&route.name).filter(|found| found.route == route);
                found.is_some_and(|found| matches!(found.state, RouteState::Up { .. }))
            };
            if !instance.ports.is_empty() && instance.routes().all(up) && self.announced.insert(instance.id) {
                self.instances.note(instance.id, "published", None);
            }
        }
    }

    /// Looks for other public ports where the server refuses; returns when to look again.
    async fn move_refused(&mut self, published: &[Published], status: &TunnelStatus) -> Instant {
        let refused: Vec<_> = published.iter().flat_map(|instance| refused_ports(instance, status)).collect();
        // Kept until the route is up: a port that is refused again is looked for more slowly.
        self.moves
            .retain(|(id, guest), _| published.iter().any(|i| i.id == *id) && !is_up(status, *id, *guest));
        let now = Instant::now();
        let mut again = now + LONGEST_PAUSE;
        for (id, guest, public) in refused {
            let moves = self.moves.entry((id, guest)).or_insert(Moves { pause: FIRST_PAUSE, next: now });
            if moves.next <= now {
                // A late answer is as good: the order names the port that it replaces.
                let order = timeout(PATIENCE, self.instances.move_port(id, guest, public));
                let done = order.await.unwrap_or_else(|_| Err(Refusal::busy("the instance is busy")));
                *moves = match done {
                    Err(refusal) if refusal.code == ErrorCode::Busy => {
                        Moves { next: now + BUSY_PAUSE, ..*moves }
                    }
                    Err(refusal) => {
                        tracing::warn!(instance = %id, guest, public, %refusal, "no other public port");
                        moves.later(now)
                    }
                    Ok(()) => moves.later(now),
                };
            }
            again = again.min(moves.next);
        }
        again
    }
}

fn is_up(status: &TunnelStatus, id: Uuid, guest: u16) -> bool {
    find(status, id, guest).is_some_and(|found| matches!(found.state, RouteState::Up { .. }))
}

fn find(status: &TunnelStatus, id: Uuid, guest: u16) -> Option<&RouteStatus> {
    name(id, guest).ok().and_then(|name| status.routes.get(&name))
}

/// The TCP ports of an instance that the server does not give us: guest port and public port.
fn refused_ports(instance: &Published, status: &TunnelStatus) -> Vec<(Uuid, u16, u16)> {
    let refused = |guest: &u16| {
        let found = find(status, instance.id, *guest)?;
        let RouteState::Refused { why: Why::PortTaken | Why::PortNotAllowed, .. } = found.state else {
            return None;
        };
        // What is said of an earlier port is no longer of interest.
        match found.route.kind {
            RouteKind::Tcp { remote_port } if instance.public.get(guest) == Some(&remote_port) => {
                Some((instance.id, *guest, remote_port))
            }
            RouteKind::Tcp { .. } | RouteKind::Http { .. } => None,
        }
    };
    instance.ports.keys().filter_map(refused).collect()
}

#[cfg(test)]
mod tests;
