//! The agent's connections to the outside, tunnel and control plane: how they are started (`connect`), and what `GET /host`
//! shows of them. Filled by both through watches, read by `Instances`.

mod connect;

use qudata_api::{LinkView, Problem};
use qudata_tunnel::{TunnelState, TunnelStatus};
use tokio::sync::watch;

pub use self::connect::{Connections, connect};
use crate::control_plane::{ControlPlaneState, ControlPlaneStatus};

/// What the agent's connections to the outside say of themselves.
#[derive(Debug, Clone, Default)]
pub struct Outside {
    /// The tunnel.
    pub tunnel: Option<watch::Receiver<TunnelStatus>>,
    /// The control plane.
    pub control_plane: Option<watch::Receiver<ControlPlaneStatus>>,
}

impl Outside {
    /// The tunnel for `GET /host`; `server` is whom it is with.
    pub fn tunnel_link(&self, server: &str) -> Option<LinkView> {
        let status = self.tunnel.as_ref()?.borrow();
        let (state, reason) = match &status.state {
            TunnelState::Starting => ("starting", None),
            TunnelState::Up => ("up", None),
            TunnelState::Down { reason, .. } => ("down", Some(reason.clone())),
        };
        Some(LinkView {
            peer: server.to_owned(),
            state: state.to_owned(),
            since: status.since,
            reason,
            version: status.version.map(|version| format!("frpc {version}")),
        })
    }

    /// The control plane for `GET /host`; `url` is where it is.
    pub fn control_plane_link(&self, url: &str) -> Option<LinkView> {
        let status = self.control_plane.as_ref()?.borrow();
        let (state, reason) = match &status.state {
            ControlPlaneState::Registering => ("starting", None),
            ControlPlaneState::Registered => ("up", None),
            ControlPlaneState::Down { reason, .. } => ("down", Some(reason.clone())),
        };
        Some(LinkView {
            peer: url.to_owned(),
            state: state.to_owned(),
            since: status.since,
            reason,
            version: None,
        })
    }

    /// What is wrong with them.
    pub fn problems(&self) -> Vec<Problem> {
        let tunnel = self.tunnel.as_ref().and_then(|status| {
            let status = status.borrow();
            let TunnelState::Down { code, reason, remedy } = &status.state else { return None };
            Some(problem(code, format!("the tunnel is down: {reason}"), remedy, status.since))
        });
        let control_plane = self.control_plane.as_ref().and_then(|status| {
            let status = status.borrow();
            let ControlPlaneState::Down { code, reason, remedy } = &status.state else { return None };
            Some(problem(code, reason.clone(), remedy, status.since))
        });
        tunnel.into_iter().chain(control_plane).collect()
    }
}

fn problem(code: &str, message: String, remedy: &str, since: jiff::Timestamp) -> Problem {
    Problem { code: code.to_owned(), message, remedy: remedy.to_owned(), since }
}
