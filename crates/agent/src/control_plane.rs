//! The remote service that orders and bills, as this host deals with it: it registers, gives signs of life, and tells how
//! the oldest instance does. Started by `daemon` for a host that has a control plane ([`Membership`]); what the service
//! orders comes in through the HTTP API.
//!
//! ```text
//!                 /init, /init/host               /ping, every minute
//!  Registering ────────────────────▶ Registered ◀───────────────────▶ Registered
//!       │                                │ ▲
//!       │ no answer, a wrong one, 401    │ │ it answers again
//!       └──────────────▶ Down ◀──────────┘ │
//!                          └───────────────┘
//! ```
//! The service may be down, slow or hostile: nothing here is waited for by instances, the tunnel or the local API, every
//! call is bounded (`call`), calls become rarer while they fail (`pace`), and nothing of a reply but a checked secret and
//! a checked token is ever used. A secret is on disk before it counts; from then on the old one is worth nothing.

mod call;
mod dial;
mod facts;
mod keeper;
mod pace;
mod reach;
mod registration;
mod reporter;
mod status;
mod tls;
mod url;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use self::{
    call::{CallLimits, Caller, Credential},
    pace::Pauses,
    tls::Trust,
};
pub use self::{
    facts::{HostLook, Location},
    reach::{Answer, ReachError, reach},
    registration::{Membership, Registration, RegistrationError},
    status::{ControlPlaneState, ControlPlaneStatus},
    url::{ServiceUrl, ServiceUrlError},
    wire::StatsInput,
};
use crate::{instance::record::Sealed, secret::AgentSecret};

/// How the oldest instance does; none without instances.
pub type StatsSource = Arc<dyn Fn() -> Option<StatsInput> + Send + Sync>;

/// What the agent says of itself when it registers.
#[derive(Debug, Clone, Copy)]
pub struct Introduction {
    /// TCP port of its API.
    pub agent_port: u16,
    /// Public address, where the owner says one. Otherwise the address that this host uses towards the internet is told,
    /// which behind a NAT is none that others reach; the tunnel does not need one.
    pub address: Option<Ipv4Addr>,
    /// Whether this is a test.
    pub test_mode: bool,
}

/// Everything the client needs.
pub struct ControlPlaneSetup {
    /// Where the service is.
    pub service: ServiceUrl,
    /// The owner's key; without it a saved registration must do.
    pub api_key: Option<SecretString>,
    /// What is saved.
    pub registration: Registration,
    /// Where it is saved.
    pub data_dir: PathBuf,
    /// What the agent says of itself.
    pub introduction: Introduction,
    /// Where to look for what the host is made of.
    pub look: HostLook,
    /// What callers of the API present: replaced when the service gives another secret.
    pub secret: watch::Sender<AgentSecret>,
    /// How the oldest instance does.
    pub stats: StatsSource,
}

impl fmt::Debug for ControlPlaneSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlaneSetup").field("service", &self.service).finish_non_exhaustive()
    }
}

/// The client at work; dropping it ends it. What it has saved stays.
#[derive(Debug)]
pub struct ControlPlane {
    status: watch::Receiver<ControlPlaneStatus>,
    tunnel_token: watch::Receiver<Option<Sealed>>,
    _tasks: JoinSet<()>,
}

impl ControlPlane {
    /// Begins to register, in tasks of its own, and never ends by itself. A host that was registered before has its
    /// secret and tunnel token at once.
    pub fn start(setup: ControlPlaneSetup) -> Self {
        Self::begin(setup, Trust::system(), Timing::default())
    }

    fn begin(setup: ControlPlaneSetup, trust: Trust, timing: Timing) -> Self {
        let ControlPlaneSetup { service, api_key, registration, data_dir, introduction, look, secret, stats } =
            setup;
        let shared = Arc::new(Shared {
            caller: Caller::new(service, trust, timing.limits),
            api_key,
            agent_id: registration.agent_id,
            data_dir,
            introduction,
            look,
            stats,
            timing,
            callers: secret,
            known: Mutex::new(registration.secret),
            tunnel_token: watch::Sender::new(registration.tunnel_token),
            status: watch::Sender::new(ControlPlaneStatus::beginning()),
            refused: Notify::new(),
            end_owed: AtomicBool::new(false),
        });
        let (status, tunnel_token) = (shared.status.subscribe(), shared.tunnel_token.subscribe());
        let mut tasks = JoinSet::new();
        tasks.spawn(reporter::run(shared.clone()));
        tasks.spawn(keeper::Keeper::new(shared).run());
        Self { status, tunnel_token, _tasks: tasks }
    }

    /// How it is doing.
    pub fn status(&self) -> watch::Receiver<ControlPlaneStatus> {
        self.status.clone()
    }

    /// The name of the agent's own virtual host at the tunnel server, once there is one.
    pub fn tunnel_token(&self) -> watch::Receiver<Option<Sealed>> {
        self.tunnel_token.clone()
    }
}

/// Periods and bounds; other than the default in tests only.
#[derive(Debug, Clone, Copy)]
struct Timing {
    limits: CallLimits,
    pauses: Pauses,
    /// Between signs of life.
    ping: Duration,
    /// Between reports of an instance.
    stats: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            limits: CallLimits::default(),
            pauses: Pauses::default(),
            ping: Duration::from_secs(60),
            stats: Duration::from_secs(5),
        }
    }
}

/// What both tasks work with.
struct Shared {
    caller: Caller,
    api_key: Option<SecretString>,
    agent_id: uuid::Uuid,
    data_dir: PathBuf,
    introduction: Introduction,
    look: HostLook,
    stats: StatsSource,
    timing: Timing,
    /// What callers of the API present.
    callers: watch::Sender<AgentSecret>,
    /// The secret that the service gave: the same, once it has given one.
    known: Mutex<Option<AgentSecret>>,
    tunnel_token: watch::Sender<Option<Sealed>>,
    status: watch::Sender<ControlPlaneStatus>,
    /// The reporter was refused with the known secret.
    refused: Notify,
    /// The service believes in an instance whose end it was not told.
    end_owed: AtomicBool,
}

impl Shared {
    fn known(&self) -> Option<AgentSecret> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_known(&self, secret: &AgentSecret) -> bool {
        self.known().is_some_and(|known| known.matches(secret.expose().as_bytes()))
    }

    /// Takes what the service gave into use; it is on disk already.
    fn adopt(&self, secret: Option<AgentSecret>, token: Option<Sealed>) {
        if let Some(secret) = secret {
            *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(secret.clone());
            self.callers.send_replace(secret);
        }
        if let Some(token) = token {
            self.tunnel_token.send_if_modified(|known| {
                let is_new = known.as_ref() != Some(&token);
                *known = Some(token);
                is_new
            });
        }
    }

    fn key(&self) -> Option<Credential> {
        self.api_key.as_ref().map(|key| Credential::ApiKey(key.expose_secret().into()))
    }

    fn show(&self, state: ControlPlaneState) {
        self.status.send_if_modified(|status| status.enter(state));
    }
}
