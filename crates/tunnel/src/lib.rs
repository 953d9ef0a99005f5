//! Ports of this host reachable from anywhere: frpc and its routes. Knows nothing of instances; called by the agent.
//!
//! ```text
//! agent ──want(routes)──▶ TunnelTask ──▶ frpc (its own user, outlives the agent) ══▶ frps ◀── the world
//!       ◀──watch status──            ◀── admin API on 127.0.0.1, its log
//! ```
//! Adding or removing a route never touches the others: through frpc's store where it has one (0.68), otherwise through
//! its configuration file and a reload, which leaves what has not changed alone.
//!
//! frpc goes on when the agent ends. The tunnel ends it, and with it all sessions, only when it was started with other
//! settings than the agent has now, when it does not know the agent (401), and when it has not answered for two minutes;
//! then another one is started, as when it has died. While nothing is routed it is also restarted to make it look for
//! frps at once. The agent ends it when it has no tunnel any more.

mod admin;
mod astray;
mod backoff;
mod balk;
mod beacon;
mod board;
mod config;
mod definition;
mod earlier;
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
    earlier::{earlier_routes, end_earlier},
    route::{Domain, NameError, ProxyName, Refusal, Route, RouteKind},
    setup::{Server, TunnelSetup},
    status::{RouteState, RouteStatus, TunnelState, TunnelStatus},
    tunnel::{StopError, Tunnel},
    version::Version,
};
