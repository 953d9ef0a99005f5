//! The proxies, wanted and real: what the settings and the store ask for, what is published, why the rest is not. Called
//! by main's loop, which brings the two together, and by `admin`.
//!
//! ```text
//! wait start ──▶ running ──▶ (gone)
//!      ▲ └─────▶ start error
//!      └── after a while ┘
//! ```

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use qudata_testkit::frp::FakeFrpc;
use serde_json::{Value, json};

use crate::{
    config::{Config, Definition},
    faults::{Faults, Session},
    forward::Forward,
    store::{self, Logger},
};

/// frpc waits so long before it asks again for a proxy that was refused.
const RETRY: Duration = Duration::from_secs(30);

/// How a proxy is doing.
#[derive(Debug)]
enum Phase {
    WaitStart { since: Instant },
    StartError { why: String, since: Instant },
    Running { forward: Option<Forward> },
}

/// Everything behind the lock.
#[derive(Debug, Default)]
struct State {
    from_settings: Vec<Definition>,
    from_store: Vec<Definition>,
    real: BTreeMap<String, (Definition, Phase)>,
    session: Option<Session>,
    was_up: bool,
    ending: Option<u8>,
}

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Proxies {
    config: Config,
    /// Where published ports are: where the server is, if it is on this machine.
    address: IpAddr,
    store: Option<PathBuf>,
    log: Logger,
    state: Mutex<State>,
}

/// Why a change of the store was refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Conflict,
    Missing,
    Broken(String),
}

impl Proxies {
    pub(crate) fn new(config: &Config, log: Logger) -> Result<Self, String> {
        let local = IpAddr::from([127, 0, 0, 1]);
        let address = config.server_addr.parse().ok().filter(IpAddr::is_loopback).unwrap_or(local);
        let store = (!config.store.path.is_empty()).then(|| PathBuf::from(&config.store.path));
        let from_store = store.as_deref().map(store::load).transpose()?.unwrap_or_default();
        let state = State { from_settings: config.proxies.clone(), from_store, ..State::default() };
        Ok(Self { config: config.clone(), address, store, log, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it publishes.
    pub(crate) fn address(&self) -> IpAddr {
        self.address
    }

    /// The local side of a virtual host.
    pub(crate) fn local_of(&self, host: &str) -> Option<(IpAddr, u16)> {
        let state = self.lock();
        let has = |proxy: &Definition| proxy.custom_domains.iter().any(|d| d.eq_ignore_ascii_case(host));
        let mut running = state.real.values().filter(|(_, phase)| matches!(phase, Phase::Running { .. }));
        let (proxy, _) = running.find(|(proxy, _)| proxy.kind == "http" && has(proxy))?;
        Some((proxy.local_ip.parse().ok()?, proxy.local_port.try_into().ok()?))
    }

    /// A line in the log.
    pub(crate) fn say(&self, words: &str) {
        self.log.say(words);
    }

    /// Whether there ever was a session.
    pub(crate) fn was_up(&self) -> bool {
        self.lock().was_up
    }

    /// The exit status, once it is to end.
    pub(crate) fn ending(&self) -> Option<u8> {
        self.lock().ending
    }

    /// It is to end with this status.
    pub(crate) fn end(&self, status: u8) {
        self.lock().ending = Some(status);
    }

    /// Whether proxies can come and go one by one.
    pub(crate) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// The settings file asks for these from now on.
    pub(crate) fn reload(&self, wanted: Vec<Definition>, faults: &Faults) {
        self.lock().from_settings = wanted;
        self.changed(faults);
        self.log.say("success reload conf");
    }

    /// The proxies of the store, by name.
    pub(crate) fn stored(&self) -> BTreeMap<String, Definition> {
        let state = self.lock();
        state.from_store.iter().map(|proxy| (proxy.name.clone(), proxy.clone())).collect()
    }

    /// Adds to the store.
    pub(crate) fn add(&self, proxy: Definition, faults: &Faults) -> Result<(), Refusal> {
        proxy.check().map_err(Refusal::Broken)?;
        self.change(faults, |stored| {
            if stored.iter().any(|other| other.name == proxy.name) {
                return Err(Refusal::Conflict);
            }
            stored.push(proxy);
            Ok(())
        })
    }

    /// Replaces in the store.
    pub(crate) fn update(&self, proxy: Definition, faults: &Faults) -> Result<(), Refusal> {
        proxy.check().map_err(Refusal::Broken)?;
        self.change(faults, |stored| {
            let place = stored.iter_mut().find(|other| other.name == proxy.name).ok_or(Refusal::Missing)?;
            *place = proxy;
            Ok(())
        })
    }

    /// Removes from the store.
    pub(crate) fn remove(&self, name: &str, faults: &Faults) -> Result<(), Refusal> {
        self.change(faults, |stored| {
            let before = stored.len();
            stored.retain(|proxy| proxy.name != name);
            if stored.len() == before { Err(Refusal::Missing) } else { Ok(()) }
        })
    }

    fn change(
        &self,
        faults: &Faults,
        act: impl FnOnce(&mut Vec<Definition>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        {
            let mut state = self.lock();
            let mut stored = state.from_store.clone();
            act(&mut stored)?;
            if let Some(file) = &self.store {
                store::save(file, stored.clone()).map_err(Refusal::Broken)?;
            }
            state.from_store = stored;
        }
        self.changed(faults);
        Ok(())
    }

    /// A change takes effect before it is answered, or the program crashes first.
    fn changed(&self, faults: &Faults) {
        if faults.crash_on_change {
            self.end(2);
        } else {
            self.step(faults);
        }
    }

    /// Brings what is closer to what should be.
    pub(crate) fn step(&self, faults: &Faults) {
        let mut state = self.lock();
        self.follow_session(&mut state, faults);
        if faults.session != Session::Up {
            return;
        }
        let wanted: BTreeMap<String, Definition> = state
            .from_settings
            .iter()
            .chain(&state.from_store)
            .map(|proxy| (proxy.name.clone(), proxy.clone()))
            .collect();
        state.real.retain(|name, (real, _)| wanted.get(name) == Some(real));
        let now = Instant::now();
        for (name, proxy) in wanted {
            state.real.entry(name).or_insert((proxy, Phase::WaitStart { since: now }));
        }
        let names: Vec<String> = state.real.keys().cloned().collect();
        for name in names {
            self.start_if_due(&mut state, &name, faults);
        }
    }

    fn follow_session(&self, state: &mut State, faults: &Faults) {
        if state.session == Some(faults.session) {
            return;
        }
        state.session = Some(faults.session);
        if faults.session == Session::Up {
            state.was_up = true;
            self.log.say("login to server success, get run id [0123456789abcdef]");
            return;
        }
        self.log.say(&format!("connect to server error: {}", faults.session.words(&self.config)));
        for (_, phase) in state.real.values() {
            if let Phase::Running { forward: Some(forward) } = phase {
                forward.cut();
            }
        }
        state.real.clear();
    }

    fn start_if_due(&self, state: &mut State, name: &str, faults: &Faults) {
        let retry = faults.retry_ms.map_or(RETRY, Duration::from_millis);
        let Some((proxy, phase)) = state.real.get(name) else { return };
        let due = match phase {
            Phase::WaitStart { since } => since.elapsed() >= Duration::from_millis(faults.settle_ms),
            Phase::StartError { since, .. } => since.elapsed() >= retry,
            Phase::Running { .. } => false,
        };
        if !due {
            return;
        }
        let proxy = proxy.clone();
        let phase = match self.publish(state, &proxy, faults) {
            Ok(forward) => Phase::Running { forward },
            Err(why) => {
                self.log.say(&format!("[{name}] start error: {why}"));
                Phase::StartError { why, since: Instant::now() }
            }
        };
        state.real.insert(proxy.name.clone(), (proxy, phase));
    }

    /// What the server does when a proxy is announced; its words when it refuses.
    fn publish(&self, state: &State, proxy: &Definition, faults: &Faults) -> Result<Option<Forward>, String> {
        let ordered = faults.start_errors.get(&proxy.name);
        if let Some(words) = ordered.or_else(|| faults.start_errors.get(&proxy.remote_port.to_string())) {
            return Err(words.clone());
        }
        let running = || {
            let all = state.real.values().filter(|(other, _)| other.name != proxy.name);
            all.filter_map(|(other, phase)| match phase {
                Phase::Running { forward } => Some((other, forward.as_ref())),
                _ => None,
            })
        };
        if proxy.kind == "http" {
            // The server compares domains without regard to case.
            let taken = |domain: &String| {
                running()
                    .any(|(other, _)| other.custom_domains.iter().any(|d| d.eq_ignore_ascii_case(domain)))
            };
            let conflict = proxy.custom_domains.iter().any(taken);
            return if conflict { Err("router config conflict".to_owned()) } else { Ok(None) };
        }
        let port = u16::try_from(proxy.remote_port).map_err(|_| "port not allowed".to_owned())?;
        if running().any(|(_, forward)| port != 0 && forward.is_some_and(|forward| forward.port() == port)) {
            return Err("port already used".to_owned());
        }
        if port != 0 && faults.allow.is_some_and(|(first, last)| !(first..=last).contains(&port)) {
            return Err("port not allowed".to_owned());
        }
        let local = proxy.local_ip.parse().map_err(|e| format!("localIP: {e}"))?;
        let local_port = u16::try_from(proxy.local_port).map_err(|e| format!("localPort: {e}"))?;
        let forward = Forward::start((self.address, port).into(), (local, local_port));
        forward.map(Some).map_err(|_| "port unavailable".to_owned())
    }

    /// `/api/status`: empty without a session.
    pub(crate) fn status(&self) -> Value {
        let state = self.lock();
        let mut all = serde_json::Map::new();
        for (proxy, phase) in state.real.values() {
            let stored = state.from_store.iter().any(|other| other.name == proxy.name);
            let list = all.entry(&proxy.kind).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(self.status_of(proxy, phase, stored));
            }
        }
        Value::Object(all)
    }

    fn status_of(&self, proxy: &Definition, phase: &Phase, stored: bool) -> Value {
        let (word, why, remote) = match phase {
            Phase::WaitStart { .. } => ("wait start", "", String::new()),
            Phase::StartError { why, .. } => ("start error", why.as_str(), String::new()),
            Phase::Running { forward: Some(forward) } => {
                ("running", "", format!("{}:{}", self.config.server_addr, forward.port()))
            }
            Phase::Running { forward: None } => {
                let all = proxy
                    .custom_domains
                    .iter()
                    .map(|domain| format!("{domain}:{}", FakeFrpc::VHOST_HTTP_PORT));
                ("running", "", all.collect::<Vec<_>>().join(","))
            }
        };
        let mut status = json!({
            "name": proxy.name, "type": proxy.kind, "status": word, "err": why,
            "local_addr": format!("{}:{}", proxy.local_ip, proxy.local_port), "plugin": "", "remote_addr": remote,
        });
        if stored && let Some(fields) = status.as_object_mut() {
            fields.insert("source".to_owned(), "store".into());
        }
        status
    }
}
