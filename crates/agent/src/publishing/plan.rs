//! Which public port a guest's port gets, and which route publishes it. Pure; the numbers are the service's contract: a
//! public port says by itself how it is reached.
//!
//! | public port | proxy | reached as |
//! |---|---|---|
//! | 80, 443 | http | virtual host `<token>` |
//! | 10000–15000 | tcp | port of the tunnel server |
//! | others | http | virtual host `<token>-<port>` |

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use qudata_api::{RouteState as Shown, RouteView};
use qudata_tunnel::{Domain, NameError, ProxyName, Route, RouteKind, RouteState, TunnelStatus};
use uuid::Uuid;

use crate::instance::{record::Sealed, spec::SSH_PORT};

/// Public ports that the tunnel server listens on for one route each.
pub const TCP_PORTS: RangeInclusive<u16> = 10_000..=15_000;
/// Ports of the web; the first of these that is asked for gets the bare name.
const SITE_PORTS: [u16; 2] = [80, 443];

/// Public ports for a new instance, guest port → public port. `taken` are those of the other instances. The server's TCP
/// ports are shared by all hosts, so the search begins at `start`, which should be random: hosts that all begin at the
/// same end would refuse each other's.
///
/// `None` when the range of TCP ports is used up.
pub fn plan_public(
    ports: &BTreeMap<u16, u16>,
    range: &RangeInclusive<u16>,
    taken: &BTreeSet<u16>,
    start: u16,
) -> Option<BTreeMap<u16, u16>> {
    let site = SITE_PORTS.into_iter().find(|port| ports.contains_key(port));
    let public = |(guest, host): (&u16, &u16)| match *guest {
        SSH_PORT => Some((SSH_PORT, pick(range, taken, start)?)),
        guest if Some(guest) == site => Some((guest, guest)),
        guest => Some((guest, *host)),
    };
    ports.iter().map(public).collect()
}

/// The first port of the range at or after `start` that is not taken, going round once.
pub fn pick(range: &RangeInclusive<u16>, taken: &BTreeSet<u16>, start: u16) -> Option<u16> {
    let first = if range.contains(&start) { start } else { *range.start() };
    let mut round = (first..=*range.end()).chain(*range.start()..first);
    round.find(|port| !taken.contains(port))
}

/// The route of one port of an instance.
///
/// # Errors
/// When the token makes no name of a virtual host.
pub fn route(instance: &Published, guest: u16, host: u16) -> Result<Route, NameError> {
    let public = instance.public_port(guest, host);
    let kind = if TCP_PORTS.contains(&public) {
        RouteKind::Tcp { remote_port: public }
    } else {
        RouteKind::Http { domain: domain(&instance.token, public)? }
    };
    Ok(Route { name: name(instance.id, guest)?, kind, local_port: host })
}

/// The route of the agent's own API.
///
/// # Errors
/// When the token makes no name of a virtual host.
pub fn own_route(agent_id: Uuid, token: &Sealed, port: u16) -> Result<Route, NameError> {
    let domain = format!("{}-{port}", token.open()).parse()?;
    let kind = RouteKind::Http { domain };
    Ok(Route { name: format!("agent-{agent_id}").parse()?, kind, local_port: port })
}

fn domain(token: &Sealed, public: u16) -> Result<Domain, NameError> {
    if SITE_PORTS.contains(&public) {
        token.open().parse()
    } else {
        format!("{}-{public}", token.open()).parse()
    }
}

/// Name of the route of a guest's port.
///
/// # Errors
/// Never in practice: an id and a number have no other characters.
pub fn name(id: Uuid, guest: u16) -> Result<ProxyName, NameError> {
    format!("{id}-{guest}").parse()
}

/// What of an instance is to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The instance.
    pub id: Uuid,
    /// Guest port → host port.
    pub ports: BTreeMap<u16, u16>,
    /// Guest port → public port.
    pub public: BTreeMap<u16, u16>,
    /// Name of its virtual hosts.
    pub token: Sealed,
}

impl Published {
    fn public_port(&self, guest: u16, host: u16) -> u16 {
        *self.public.get(&guest).unwrap_or(&host)
    }

    /// Its routes; a port whose name cannot be made has none.
    pub fn routes(&self) -> impl Iterator<Item = Route> + '_ {
        self.ports.iter().filter_map(|(guest, host)| route(self, *guest, *host).ok())
    }

    /// How its routes are doing, in the order of the guest's ports. `server` is the tunnel server's name.
    pub fn views(&self, server: &str, status: &TunnelStatus) -> Vec<RouteView> {
        let view = |(guest, host): (&u16, &u16)| {
            let public_port = self.public_port(*guest, *host);
            let route = route(self, *guest, *host);
            let (kind, address) = match &route {
                Ok(Route { kind: RouteKind::Http { domain }, .. }) => ("http", domain.to_string()),
                Ok(_) | Err(_) => ("tcp", format!("{server}:{public_port}")),
            };
            let (state, reason) = match &route {
                Ok(route) => shown(status, route),
                Err(error) => (Shown::Refused, Some(error.to_string())),
            };
            RouteView { guest_port: *guest, public_port, kind: kind.to_owned(), address, state, reason }
        };
        self.ports.iter().map(view).collect()
    }
}

/// What the tunnel says of a route; nothing yet, when it was asked only just now.
fn shown(status: &TunnelStatus, route: &Route) -> (Shown, Option<String>) {
    let Some(found) = status.routes.get(&route.name).filter(|found| found.route == *route) else {
        return (Shown::Adding, None);
    };
    match &found.state {
        RouteState::Up { .. } => (Shown::Up, None),
        RouteState::Adding | RouteState::Removing => (Shown::Adding, None),
        RouteState::Waiting => (Shown::Waiting, None),
        RouteState::Refused { words, .. } => {
            (Shown::Refused, Some(format!("the tunnel server refuses it: {words}")))
        }
    }
}
