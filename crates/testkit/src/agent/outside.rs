//! An agent with a tunnel and a control plane: what it is told of both, and the tunnel client as a process of its own.
//! Called by tests of the tunnel; `Setup` without this stands alone.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Setup, TestAgent, slot::Slot};
use crate::{
    control_plane::ControlPlane,
    frp::{FakeFrpc, Frp, Frps, Place},
    process::Seen,
};

/// Which tunnel client an agent starts.
#[derive(Debug, Clone)]
pub(super) enum Frpc {
    /// This one, under a path in the test's corner, so that its processes are told from those of other tests.
    Linked(PathBuf),
    /// This one, which is the test's own already.
    Own(PathBuf),
}

impl Frpc {
    /// What the agent starts.
    pub(super) fn path(&self, slot: &Slot) -> PathBuf {
        match self {
            Self::Linked(_) => slot.dir().join("frpc"),
            Self::Own(path) => path.clone(),
        }
    }

    /// Puts it there.
    pub(super) fn prepare(&self, slot: &Slot) {
        if let Self::Linked(from) = self {
            let to = self.path(slot);
            let linked = fs::hard_link(from, &to).or_else(|_| fs::copy(from, &to).map(drop));
            linked.unwrap_or_else(|e| panic!("cannot put {} into {}: {e}", from.display(), to.display()));
        }
    }
}

impl Setup {
    /// Published by the real frp, and registered with `control_plane`.
    #[must_use]
    pub fn tunnel(self, control_plane: &ControlPlane, frp: &Frp, frps: &Frps) -> Self {
        let frpc = Frpc::Linked(frp.frpc.clone());
        let server = (frps.address().to_string(), frps.port());
        self.outside(control_plane, frpc, &server, &frps.token())
    }

    /// Published by the fake frpc at `place`, and registered with `control_plane`.
    #[must_use]
    pub fn fake_tunnel(self, control_plane: &ControlPlane, frpc: &FakeFrpc, place: &Place) -> Self {
        let frpc = Frpc::Own(frpc.program().to_owned());
        self.outside(control_plane, frpc, &(place.address().to_string(), 7000), "token-for-nobody")
    }

    fn outside(
        mut self,
        control_plane: &ControlPlane,
        frpc: Frpc,
        (server, port): &(String, u16),
        token: &str,
    ) -> Self {
        self.frpc = Some(frpc);
        self.unset("QUDATA_STANDALONE")
            .set("QUDATA_TUNNEL", "frp")
            .set("QUDATA_API_KEY", &control_plane.api_key())
            .set("QUDATA_SERVICE_URL", &control_plane.url())
            .set("QUDATA_PUBLIC_ADDRESS", server)
            .set("QUDATA_FRP_SERVER", server)
            .set("QUDATA_FRP_PORT", &port.to_string())
            .set("QUDATA_FRP_TOKEN", token)
    }
}

impl TestAgent {
    /// Its tunnel client, once it runs.
    pub fn frpc(&self) -> Option<Seen> {
        self.frpc_processes().into_iter().next()
    }

    /// The same, waiting for it.
    #[track_caller]
    pub fn wait_for_frpc(&self, within: Duration) -> Seen {
        let until = Instant::now() + within;
        loop {
            if let Some(frpc) = self.frpc() {
                return frpc;
            }
            assert!(Instant::now() < until, "no frpc within {within:?}:\n{}", self.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where its tunnel client is started from; none when it stands alone.
    pub(super) fn frpc_path(&self) -> Option<PathBuf> {
        self.setup.frpc.as_ref().map(|frpc| frpc.path(&self.slot))
    }

    /// All living processes of its tunnel client.
    pub(super) fn frpc_processes(&self) -> Vec<Seen> {
        let Some(path) = self.frpc_path() else { return Vec::new() };
        let is_it = |process: &Seen| process.exe.as_deref() == Some(path.as_path()) && process.state != 'Z';
        Seen::all().unwrap_or_default().into_iter().filter(is_it).collect()
    }
}

/// Where the agent writes the tunnel client's settings.
pub(super) fn config(dir: &Path) -> PathBuf {
    dir.join("frpc.toml")
}
