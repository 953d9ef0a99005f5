//! Ports of this host reachable from anywhere: frpc and its routes. Knows nothing of instances; called by the agent.
//!
//! ```text
//! agent ──want(routes)──▶ TunnelTask ──▶ frpc (its own user, outlives the agent) ══▶ frps ◀── the world
//!       ◀──watch status──            ◀── admin API on 127.0.0.1, its log
//! ```
//! Adding or removing a route never touches the others: through frpc's store where it has one (0.68), otherwise through
//! its configuration file and a reload, which leaves what has not changed alone. frpc is restarted only when nothing is
//! routed: when it has died, when what it was started with has changed, or to make it look for frps at once.

mod admin;
mod backoff;
mod beacon;
mod board;
mod config;
mod definition;
mod frpc;
mod judge;
mod log;
mod lookout;
mod plan;
mod publish;
mod rounds;
mod route;
mod setup;
mod status;
mod task;
mod tunnel;
mod version;

pub use self::{
    config::{TokenError, check_token},
    route::{Domain, NameError, ProxyName, Refusal, Route, RouteKind},
    setup::{Server, TunnelSetup},
    status::{RouteState, RouteStatus, TunnelState, TunnelStatus},
    tunnel::{StopError, Tunnel},
    version::Version,
};
