//! What a tunnel says about itself. Written by `board`, read by the agent.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::{
    route::{ProxyName, Refusal, Route},
    version::Version,
};

/// The tunnel and its routes at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelStatus {
    /// Whether there is a session with frps, and whether frpc does what it is told.
    pub state: TunnelState,
    /// Since when it is so.
    pub since: Timestamp,
    /// Version of frpc, once it is known.
    pub version: Option<Version>,
    /// Every wanted route, and every one that is not wanted any more and that frpc may still have.
    pub routes: BTreeMap<ProxyName, RouteStatus>,
}

/// Whether there is a session with frps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TunnelState {
    /// frpc is being started or logs in.
    Starting,
    /// There is a session.
    Up,
    /// There is none, or frpc does not do what it is told (`frpc_admin`); then what it routes it goes on routing, and
    /// the routes tell. It comes back by itself once the reason is gone.
    Down {
        /// Stable word for programs:
        /// `frps_unreachable`, `frps_refused` (the token), `frps_untrusted` (its certificate), `frpc_missing`,
        /// `frpc_unusable`, `frpc_launch`, `frpc_died`, `frpc_admin`, `tunnel_settings`, `tunnel_files`, `tunnel_stopped`.
        code: &'static str,
        /// One sentence, with frpc's own words where it has any.
        reason: String,
        /// What to do.
        remedy: String,
    },
}

impl TunnelState {
    /// Whether this is the same state, however it is told.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Starting, Self::Starting) | (Self::Up, Self::Up) => true,
            (Self::Down { code, .. }, Self::Down { code: other, .. }) => code == other,
            (Self::Starting | Self::Up | Self::Down { .. }, _) => false,
        }
    }
}

/// One route at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteStatus {
    /// The route.
    pub route: Route,
    /// How it does.
    pub state: RouteState,
    /// Since when.
    pub since: Timestamp,
}

/// How a route does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteState {
    /// frps has been asked, or is about to be.
    Adding,
    /// The world reaches it.
    Up {
        /// Where, in frp's words: `host:port` for TCP, `domain:port` for HTTP.
        remote_addr: String,
    },
    /// frps does not take it. It is tried again.
    Refused {
        /// Why.
        why: Refusal,
        /// In frps' words.
        words: String,
    },
    /// There is no session with frps.
    Waiting,
    /// It is not wanted any more, and frpc may still have it: its local port must not be given to somebody else.
    Removing,
}

impl RouteState {
    /// Whether this is the same state, however it is told.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Up { remote_addr }, Self::Up { remote_addr: other }) => remote_addr == other,
            (Self::Refused { why, .. }, Self::Refused { why: other, .. }) => why == other,
            (Self::Adding, Self::Adding)
            | (Self::Waiting, Self::Waiting)
            | (Self::Removing, Self::Removing) => true,
            (Self::Adding | Self::Up { .. } | Self::Refused { .. } | Self::Waiting | Self::Removing, _) => {
                false
            }
        }
    }
}
