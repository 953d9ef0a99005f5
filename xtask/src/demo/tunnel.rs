//! The outside world of a demo with a tunnel, all on this machine: the control plane that the agent registers with, the
//! frps that publishes it, and the platform that rents its machine out through both. Called by `demo` and `story`.
use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use qudata_testkit::control_plane::{ControlPlane, Registered, Terms};
use qudata_testkit::frp::{Frp, Frps, Options};
use qudata_testkit::http::VirtualHost;
use qudata_testkit::platform::Platform;
use qudata_testkit::process::Seen;
use rustix::process::Signal;
use serde_json::Value;

use super::guest;
use super::interrupt::Interrupt;
use super::site::Site;
use crate::tool::say;

/// The agent may take so long to register and to be reachable.
const MEETING: Duration = Duration::from_secs(60);
const GONE: Duration = Duration::from_secs(60);
const FRPC_ENDS: Duration = Duration::from_secs(10);

/// Name of the renter's virtual host.
const RENTER: &str = "demo-renter";

/// Control plane and frps.
#[derive(Debug)]
pub(super) struct World {
    frp: Frp,
    frps: Frps,
    control_plane: ControlPlane,
}

impl World {
    /// Starts both.
    pub(super) fn start(frp: Frp) -> Self {
        let frps = Frps::start(&frp, Options { token: "demo-token".to_owned(), ..Options::default() });
        let terms = Terms { tunnel_token: "demo-host".to_owned(), ..Terms::default() };
        let control_plane = ControlPlane::start(terms);
        say(format!("frps {} on {}, control plane at {}", frp.version, frps.address(), control_plane.url()));
        Self { frp, frps, control_plane }
    }

    /// What the agent must be told of it.
    pub(super) fn environment(&self, site: &Site) -> Vec<(&'static str, String)> {
        let terms = Terms::default();
        vec![
            ("QUDATA_TUNNEL", "frp".to_owned()),
            ("QUDATA_API_KEY", terms.api_key),
            ("QUDATA_SERVICE_URL", self.control_plane.url()),
            ("QUDATA_PUBLIC_ADDRESS", self.frps.address().to_string()),
            ("QUDATA_FRP_SERVER", self.frps.address().to_string()),
            ("QUDATA_FRP_PORT", self.frps.port().to_string()),
            ("QUDATA_FRP_TOKEN", self.frps.token()),
            ("QUDATA_FRPC_BINARY", site.frpc().display().to_string()),
            ("QUDATA_FRPC_CONFIG", site.dir.join("frpc.toml").display().to_string()),
        ]
    }

    /// Puts frpc where its processes are told from those of every other agent.
    pub(super) fn lend_frpc(&self, site: &Site) -> Result<()> {
        let (from, to) = (&self.frp.frpc, site.frpc());
        fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
    }

    /// Waits until the agent has registered.
    pub(super) fn meet(&self, interrupt: &Interrupt) -> Result<Registered> {
        interrupt.poll("registration of the agent", MEETING, || Ok(self.control_plane.registered()))
    }

    /// The platform, as soon as it reaches the agent through the tunnel.
    pub(super) fn platform(&self, registered: &Registered, interrupt: &Interrupt) -> Result<Renter<'_>> {
        let platform = Platform::new(self.frps.vhost_http(), registered);
        let start = Instant::now();
        interrupt.poll("answer of the agent through the tunnel", MEETING, || Ok(platform.list().ok()))?;
        let took = start.elapsed().as_millis();
        say(format!(
            "agent {} has registered; its API answers through the tunnel ({took} ms)",
            registered.agent_id
        ));
        Ok(Renter { world: self, platform })
    }

    /// What the control plane had to complain about, as an error.
    pub(super) fn verdict(&self) -> Result<()> {
        let complaints = self.control_plane.complaints();
        anyhow::ensure!(complaints.is_empty(), "the control plane complains: {}", complaints.join("; "));
        let statuses = self.control_plane.accepted("/stats").len();
        anyhow::ensure!(statuses > 0, "the control plane was never told how the instance does");
        Ok(())
    }

    /// Ends the frpc that the agent leaves running, as it should: this demo is over.
    pub(super) fn end_frpc(site: &Site) -> Result<()> {
        let ours = || -> Result<Vec<Seen>> {
            let all = Seen::all().context("cannot list processes")?;
            Ok(all.into_iter().filter(|p| p.exe.as_deref() == Some(&site.frpc()) && p.is_alive()).collect())
        };
        let until = Instant::now() + FRPC_ENDS;
        loop {
            let left = ours()?;
            if left.is_empty() {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < until, "frpc does not end");
            for process in left {
                process.signal(Signal::TERM);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Somebody who rents through the platform.
#[derive(Debug)]
pub(super) struct Renter<'a> {
    world: &'a World,
    platform: Platform,
}

impl Renter<'_> {
    /// Orders the machine.
    pub(super) fn create(&self, public_key: &str) -> Result<Value> {
        let mut wish = guest::wish(public_key);
        if let Some(fields) = wish.as_object_mut() {
            fields.insert("tunnel_token".to_owned(), RENTER.into());
        }
        self.platform.create(&wish).map_err(|why| anyhow!(why))
    }

    /// What the platform does with a running machine: pause, resume, another key.
    pub(super) fn handle(&self, id: &str, public_key: &str) -> Result<()> {
        let steps = || {
            self.platform.pause(id)?;
            self.platform.resume(id)?;
            self.platform.add_key(id, public_key)?;
            self.platform.remove_key(id, public_key)
        };
        steps().map_err(|why| anyhow!(why))?;
        say("paused, resumed, a key added and removed, all through the tunnel");
        Ok(())
    }

    /// Deletes it.
    pub(super) fn delete(&self, id: &str) -> Result<()> {
        self.platform.delete(id, GONE).map_err(|why| anyhow!(why))
    }

    /// Where published TCP ports are.
    pub(super) fn address(&self) -> IpAddr {
        self.world.frps.address()
    }

    /// The application, by its virtual host.
    pub(super) fn app(&self, port: u16) -> VirtualHost {
        self.world.frps.http(&format!("{RENTER}-{port}"))
    }

    /// For the last line of `--once`; by hand, because its order is part of the promise.
    pub(super) fn line(&self, ssh_port: u16, app_port: u16) -> String {
        let (frp, server) = (self.world.frp.version, self.address());
        format!("{{\"frp\":\"{frp}\",\"ssh\":\"{server}:{ssh_port}\",\"app\":\"{RENTER}-{app_port}\"}}")
    }
}
