//! A control plane for tests: it answers `/ping`, `/init`, `/init/host` and `/stats` as the service does, notes every
//! call, and complains about whatever is not in the contract. Friendly: what a hostile one does is the business of the
//! client's own tests. Called by product tests and the demo; it orders nothing, that is `platform`'s part.
//!
//! ```text
//! nobody ── /init with the API key ──▶ registered ── /init, /init/host, /stats with the secret ──▶ registered
//!                                          ▲ rotate(): the next /init gives a new secret, the old one is refused
//! ```
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

mod contract;

use std::{
    net::SocketAddr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::serve::{Answer, Request, Server};

/// Base path of the service.
const BASE: &str = "/v0";

/// What the service knows and gives.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The key it accepts until it has given a secret.
    pub api_key: String,
    /// The secret it gives at the first `/init`.
    pub secret: String,
    /// The name of the host in the tunnel.
    pub tunnel_token: String,
    /// Whether it knows the host's hardware already, so that nobody needs to tell.
    pub host_exists: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            api_key: "ak-0123456789abcdef0123456789abcdef".to_owned(),
            secret: "secret-of-the-first-registration-0001".to_owned(),
            tunnel_token: "host-7f3a".to_owned(),
            host_exists: false,
        }
    }
}

/// With what a call was signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signed {
    /// `X-API-Key`.
    ApiKey,
    /// `X-Agent-Secret`.
    Secret,
    /// Neither, or both.
    Badly,
}

/// One call that the service got.
#[derive(Debug, Clone)]
pub struct Call {
    /// When.
    pub at: Instant,
    /// Path after the base, `/init`.
    pub path: String,
    /// Its header.
    pub signed: Signed,
    /// Its body; null where there was none.
    pub body: Value,
    /// What it was answered.
    pub status: u16,
}

impl Call {
    /// Whether a field of its body is this text.
    fn says(&self, field: &str, text: &str) -> bool {
        self.body.get(field).is_some_and(|value| value == text)
    }
}

/// What an agent is known by once it has registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Its own id.
    pub agent_id: String,
    /// The port of its API.
    pub agent_port: u16,
    /// The secret that it accepts.
    pub secret: String,
    /// Its name in the tunnel.
    pub tunnel_token: String,
}

#[derive(Debug)]
struct State {
    terms: Terms,
    /// The secret in force; none before the first `/init`.
    secret: Option<String>,
    /// The secret that the next `/init` gives.
    next_secret: Option<String>,
    emergency: bool,
    /// Answers every call with this status instead.
    failing: Option<u16>,
    registered: Option<Registered>,
    calls: Vec<Call>,
    complaints: Vec<String>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

impl Shared {
    /// No test's panic closes it: the state is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The service, running or stopped. Dropping it ends it.
#[derive(Debug)]
pub struct ControlPlane {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: Mutex<Option<Server>>,
}

impl ControlPlane {
    /// Starts one on a free port of this machine.
    pub fn start(terms: Terms) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), terms)
    }

    /// Starts one at this address, for agents that look for it there after a restart of their host.
    pub fn start_at(address: SocketAddr, terms: Terms) -> Self {
        let state = State {
            terms,
            secret: None,
            next_secret: None,
            emergency: false,
            failing: None,
            registered: None,
            calls: Vec::new(),
            complaints: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), news: Condvar::new() });
        let server = listen(address, &shared);
        Self { address: server.address(), shared, server: Mutex::new(Some(server)) }
    }

    /// What an agent's `QUDATA_SERVICE_URL` must be.
    pub fn url(&self) -> String {
        format!("http://{}{BASE}", self.address)
    }

    /// What an agent's `QUDATA_API_KEY` must be.
    pub fn api_key(&self) -> String {
        self.shared.lock().terms.api_key.clone()
    }

    /// Goes down: connections are refused.
    pub fn stop(&self) {
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Comes back where it was, remembering everything.
    pub fn resume(&self) {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if server.is_none() {
            *server = Some(listen(self.address, &self.shared));
        }
    }

    /// Answers every call with `status`, until [`Self::recover`].
    pub fn fail(&self, status: u16) {
        self.shared.lock().failing = Some(status);
    }

    /// Answers as it should again.
    pub fn recover(&self) {
        self.shared.lock().failing = None;
    }

    /// The next `/init` gives `secret`; from then on the one before is refused.
    pub fn rotate(&self, secret: &str) {
        self.shared.lock().next_secret = Some(secret.to_owned());
    }

    /// Forgets the secret, as after a restore from an old copy: calls signed with it are refused until an agent registers
    /// again with its API key.
    pub fn forget(&self, next_secret: &str) {
        let mut state = self.shared.lock();
        state.secret = None;
        state.next_secret = Some(next_secret.to_owned());
    }

    /// Says `emergency_reinit` in answers to `/init`.
    pub fn set_emergency(&self, emergency: bool) {
        self.shared.lock().emergency = emergency;
    }

    /// Every call so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.lock().calls.clone()
    }

    /// The bodies of the accepted calls of `path`, oldest first.
    pub fn accepted(&self, path: &str) -> Vec<Value> {
        let calls = self.calls().into_iter();
        calls.filter(|call| call.path == path && call.status == 200).map(|call| call.body).collect()
    }

    /// What was not in the contract, in the order of the calls. Empty is what a test wants to see at its end.
    pub fn complaints(&self) -> Vec<String> {
        self.shared.lock().complaints.clone()
    }

    /// The agent that has registered, once it has told its hardware too (where the service did not know it).
    pub fn registered(&self) -> Option<Registered> {
        self.shared.lock().complete()
    }

    /// The same, as soon as there is one.
    #[track_caller]
    pub fn wait_for_registration(&self, within: Duration) -> Registered {
        self.wait_for("complete registration", within, State::complete)
    }

    /// An accepted `/stats` that says `status`, newer than `after`.
    #[track_caller]
    pub fn wait_for_status(&self, status: &str, after: Instant, within: Duration) -> Call {
        self.wait_for(&format!("call of /stats with status {status}"), within, |state| {
            let told = |call: &&Call| {
                call.at > after && call.path == "/stats" && call.status == 200 && call.says("status", status)
            };
            state.calls.iter().rev().find(told).cloned()
        })
    }

    #[track_caller]
    fn wait_for<T>(&self, what: &str, within: Duration, look: impl Fn(&State) -> Option<T>) -> T {
        let until = Instant::now() + within;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&state) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the control plane got no {what} within {within:?}; calls: {:?}; complaints: {:?}",
                state.calls,
                state.complaints
            );
            state = self.shared.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn listen(address: SocketAddr, shared: &Arc<Shared>) -> Server {
    let shared = Arc::clone(shared);
    let server = Server::start(address, move |request| {
        let answer = shared.lock().take(request);
        shared.news.notify_all();
        Some(answer)
    });
    server.unwrap_or_else(|e| panic!("the control plane cannot listen on {address}: {e}"))
}

impl State {
    fn complete(&self) -> Option<Registered> {
        self.registered.clone().filter(|_| self.terms.host_exists)
    }

    /// Judges, notes and answers one call.
    fn take(&mut self, request: &Request) -> Answer {
        let path = request.path.strip_prefix(BASE).unwrap_or(&request.path).to_owned();
        let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
        let signed = match (request.header("x-api-key"), request.header("x-agent-secret")) {
            (Some(_), None) => Signed::ApiKey,
            (None, Some(_)) => Signed::Secret,
            _ => Signed::Badly,
        };
        let answer = self
            .failing
            .map_or_else(|| self.judge(request, &path, signed, &body), |status| refusal(status, "not now"));
        self.calls.push(Call { at: Instant::now(), path, signed, body, status: answer.status });
        answer
    }

    fn judge(&mut self, request: &Request, path: &str, signed: Signed, body: &Value) -> Answer {
        let Some(faults) = contract::faults(&request.method, path, body) else {
            self.complaints.push(format!("{} {path} is not in the contract", request.method));
            return refusal(404, "no such call");
        };
        if !request.path.starts_with(BASE) {
            self.complaints.push(format!("{} is not below {BASE}", request.path));
        }
        if let Some(refused) = self.refuse_signature(request, path, signed) {
            return refused;
        }
        if !faults.is_empty() {
            self.complaints.extend(faults.iter().map(|fault| format!("{path}: {fault}")));
            return refusal(400, &faults.join(", "));
        }
        match path {
            "/init" => self.init(signed, body),
            "/init/host" => {
                self.terms.host_exists = true;
                Answer::json(200, &json!({ "ok": true }))
            }
            _ => Answer::json(200, &json!({ "ok": true })),
        }
    }

    /// The API key until a secret is known, then the secret; a call with a wrong one is refused.
    fn refuse_signature(&mut self, request: &Request, path: &str, signed: Signed) -> Option<Answer> {
        let secret = request.header("x-agent-secret");
        match signed {
            Signed::Badly => {
                self.complaints
                    .push(format!("{path} came with none or both of X-API-Key and X-Agent-Secret"));
                Some(refusal(401, "sign with one of the two"))
            }
            // It may have been replaced a moment ago: no breach of the contract.
            Signed::Secret => {
                let good = secret.is_some() && secret == self.secret.as_deref();
                (!good).then(|| refusal(401, "this secret is not known"))
            }
            Signed::ApiKey if request.header("x-api-key") != Some(self.terms.api_key.as_str()) => {
                Some(refusal(403, "this API key is not known"))
            }
            // The way back for an agent that was told that its secret is not known.
            Signed::ApiKey if matches!(path, "/init" | "/ping") => None,
            Signed::ApiKey => {
                self.complaints.push(format!("{path} was signed with the API key, not with the secret"));
                Some(refusal(401, "sign with the secret"))
            }
        }
    }

    fn init(&mut self, signed: Signed, body: &Value) -> Answer {
        let text = |field: &str| body.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        let port = body.get("agent_port").and_then(Value::as_u64).and_then(|port| port.try_into().ok());
        let created = self.registered.is_none();
        let given = match (self.next_secret.take(), &self.secret, signed) {
            (Some(next), _, _) => Some(next),
            (None, None, _) => Some(self.terms.secret.clone()),
            (None, Some(known), Signed::ApiKey) => Some(known.clone()),
            // Empty: use the saved one.
            (None, Some(_), _) => None,
        };
        if let Some(secret) = &given {
            self.secret = Some(secret.clone());
        }
        self.registered = Some(Registered {
            agent_id: text("agent_id"),
            agent_port: port.unwrap_or_default(),
            secret: self.secret.clone().unwrap_or_default(),
            tunnel_token: self.terms.tunnel_token.clone(),
        });
        let told = self.calls.iter().rev().find(|call| call.path == "/stats" && call.status == 200);
        let running = told.is_some_and(|call| !call.says("status", "destroyed"));
        Answer::json(
            200,
            &json!({ "ok": true, "data": {
                "agent_created": created,
                "emergency_reinit": self.emergency,
                "host_exists": self.terms.host_exists,
                "secret_key": given.unwrap_or_default(),
                "tunnel_token": self.terms.tunnel_token,
                "instance_running": running,
            }}),
        )
    }
}

fn refusal(status: u16, words: &str) -> Answer {
    Answer::json(status, &json!({ "ok": false, "error": words }))
}

#[cfg(test)]
mod tests;
