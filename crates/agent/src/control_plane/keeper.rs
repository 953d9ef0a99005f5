//! Keeps this host registered: `/init`, `/init/host`, then `/ping` for ever. One of the two tasks of the client.
//!
//! A secret that the service does not take any more is tried by turns with the API key, where there is one: a service
//! that refuses everybody for a minute must not cost a host its place. `emergency_reinit` in a reply means that the
//! service lost or distrusts what it knew of this host. The host then registers once more with its API key, which is what
//! a new secret is given for, and describes itself again. Until a new secret is saved the old one stays in use, so that
//! the platform keeps reaching its tenants; no instance is touched. A reply to the API key that asks again is taken as it
//! is.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::http::Method;
use futures_util::FutureExt;
use hyper::body::Bytes;
use tokio::{net::UdpSocket, time::sleep};

use super::{
    ControlPlaneState, Shared,
    call::{Call, Credential},
    facts,
    pace::{Pace, about},
    registration,
    status::Failure,
    wire::{InitBody, ReplyError, Welcome},
};

/// An address that routes as the internet does and belongs to nobody (RFC 5737). Nothing is sent to it.
const OUTSIDE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);

/// What to prove who calls by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum With {
    Secret,
    ApiKey,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Register(With),
    Describe,
    Ping,
}

pub(super) struct Keeper {
    shared: Arc<Shared>,
    pace: Pace,
    /// The host is described even if the service knows one.
    anew: bool,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let pace = Pace::new(shared.timing.pauses);
        Self { shared, pace, anew: false }
    }

    pub(super) async fn run(mut self) {
        let mut due = Due::Register(if self.shared.known().is_some() { With::Secret } else { With::ApiKey });
        loop {
            let pause;
            (due, pause) = match self.attempt(due).await {
                Ok(next) => (next, self.after_success(next)),
                Err(failure) => {
                    self.shared.show(failure.state());
                    let pause = self.pace.failed(failure.retry_after());
                    (self.after_failure(due, &failure), pause)
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shared.refused.notified(), if due == Due::Ping => {
                    due = self.after_refusal(With::Secret);
                    sleep(self.pace.failed(None)).await;
                }
            }
        }
    }

    async fn attempt(&mut self, due: Due) -> Result<Due, Failure> {
        match due {
            Due::Register(with) => self.register(with).await,
            Due::Describe => self.describe().await,
            Due::Ping => {
                self.say(Method::GET, "/ping", Vec::new()).await?;
                // Only now: a service that gives a secret and refuses it at once is not to be hurried.
                self.pace.calm();
                Ok(Due::Ping)
            }
        }
    }

    fn after_success(&self, next: Due) -> Duration {
        match next {
            Due::Ping => {
                self.shared.show(ControlPlaneState::Registered);
                about(self.shared.timing.ping)
            }
            Due::Register(_) => self.shared.timing.pauses.shortest,
            Due::Describe => Duration::ZERO,
        }
    }

    fn after_failure(&self, due: Due, failure: &Failure) -> Due {
        match due {
            Due::Register(with) if failure.is_refusal() => self.after_refusal(with),
            Due::Describe | Due::Ping if failure.is_refusal() => self.after_refusal(With::Secret),
            same => same,
        }
    }

    /// The other way to prove who calls, where there is one.
    fn after_refusal(&self, refused: With) -> Due {
        let (key, secret) = (self.shared.api_key.is_some(), self.shared.known().is_some());
        Due::Register(match refused {
            With::Secret if key => With::ApiKey,
            With::ApiKey if secret => With::Secret,
            same => same,
        })
    }

    fn credential(&self, with: With) -> Result<Credential, Failure> {
        let found = match with {
            With::Secret => self.shared.known().map(Credential::Secret),
            With::ApiKey => self.shared.key(),
        };
        found.ok_or(Failure::NoCredential)
    }

    async fn register(&mut self, with: With) -> Result<Due, Failure> {
        let credential = self.credential(with)?;
        let body = json(&self.introduction().await);
        let call =
            Call { method: Method::POST, path: "/init", credential: &credential, body, wants_reply: true };
        let reply = self.shared.caller.call(&call).await.map_err(Failure::Call)?;
        let welcome = Welcome::parse(&reply).map_err(Failure::Reply)?;
        let (exists, again) = (welcome.host_exists, welcome.emergency_reinit);
        if welcome.instance_running {
            self.shared.end_owed.store(true, Ordering::Relaxed);
        }
        self.take(welcome).await?;
        // Refusals of the secret before are over.
        let _ = self.shared.refused.notified().now_or_never();
        tracing::info!(host_exists = exists, emergency_reinit = again, "registered with the control plane");
        self.anew |= again;
        if again && with == With::Secret && self.shared.api_key.is_some() {
            return Ok(Due::Register(With::ApiKey));
        }
        Ok(if self.anew || !exists { Due::Describe } else { Due::Ping })
    }

    /// On disk first, then in use: a secret that a power cut can lose would lock the platform out.
    async fn take(&self, welcome: Welcome) -> Result<(), Failure> {
        let Welcome { secret, tunnel_token, .. } = welcome;
        if secret.is_none() && self.shared.known().is_none() {
            return Err(Failure::Reply(ReplyError::NoSecret));
        }
        let new_secret = secret.filter(|secret| !self.shared.is_known(secret));
        let new_token =
            tunnel_token.filter(|token| self.shared.tunnel_token.borrow().as_ref() != Some(token));
        let (data, to_save) = (self.shared.data_dir.clone(), (new_secret.clone(), new_token.clone()));
        let saving = tokio::task::spawn_blocking(move || {
            let (secret, token) = to_save;
            registration::save(&data, secret.as_ref(), token.as_ref())
        });
        // It can only fail to join when the runtime ends.
        saving.await.unwrap_or(Ok(())).map_err(Failure::Save)?;
        if new_secret.is_some() {
            tracing::info!("the control plane gave this agent a new secret; the old one is worth nothing");
        }
        self.shared.adopt(new_secret, new_token);
        Ok(())
    }

    async fn describe(&mut self) -> Result<Due, Failure> {
        let look = self.shared.look.clone();
        // Reads files of the kernel, which take their time on large hosts.
        let body =
            tokio::task::spawn_blocking(move || json(&facts::observe(&look))).await.unwrap_or_default();
        self.say(Method::POST, "/init/host", body).await?;
        self.anew = false;
        Ok(Due::Ping)
    }

    /// A call whose reply does not matter.
    async fn say(&self, method: Method, path: &'static str, body: Vec<u8>) -> Result<Bytes, Failure> {
        let credential = self.credential(With::Secret)?;
        let call = Call { method, path, credential: &credential, body, wants_reply: false };
        self.shared.caller.call(&call).await.map_err(Failure::Call)
    }

    async fn introduction(&self) -> InitBody {
        let introduction = self.shared.introduction;
        let address = match introduction.address {
            Some(address) => address,
            None => outgoing_address().await.unwrap_or(Ipv4Addr::UNSPECIFIED),
        };
        InitBody {
            agent_id: self.shared.agent_id,
            agent_port: introduction.agent_port,
            address,
            fingerprint: facts::machine_id(&self.shared.look.root),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION"),
            test_mode: introduction.test_mode,
        }
    }
}

/// The address that this host uses towards the internet. Connecting a datagram socket looks up the route and no more.
async fn outgoing_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.ok()?;
    socket.connect(OUTSIDE).await.ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// Bodies are made here, of numbers and texts: they always have a form.
fn json(body: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(body).unwrap_or_default()
}
