//! The life of the demo's one instance: create, watch it boot, prove it, delete it. Called by `demo`.
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qudata_testkit::agent::{Event, Events};
use qudata_testkit::http::{Client, VirtualHost};
use serde_json::Value;

use super::agent::Agent;
use super::guest::{self, Login};
use super::interrupt::Interrupt;
use super::site::Site;
use super::tunnel::Renter;
use crate::tool::{self, say};

/// The agent gives up earlier and says why.
const READY: Duration = Duration::from_secs(900);
const GONE: Duration = Duration::from_secs(60);

/// What was seen on the way.
#[derive(Debug)]
pub(super) struct Proof {
    pub(super) post_to_exec_ms: u64,
    pub(super) create_to_ready_ms: u64,
    pub(super) ssh: String,
    pub(super) app_http_status: u16,
    pub(super) login: Login,
    pub(super) app: VirtualHost,
    /// The tunnel's part of the last line of `--once`.
    pub(super) tunnel: Option<String>,
}

/// From where the machine is rented: beside the agent, or through the tunnel.
#[derive(Debug)]
pub(super) struct Desk<'a> {
    pub(super) agent: &'a Agent,
    pub(super) renter: Option<Renter<'a>>,
}

impl Desk<'_> {
    /// Where published TCP ports are.
    fn address(&self) -> IpAddr {
        self.renter.as_ref().map_or(Ipv4Addr::LOCALHOST.into(), Renter::address)
    }

    /// The application behind a public port.
    fn app(&self, port: u16) -> VirtualHost {
        if let Some(renter) = &self.renter {
            return renter.app(port);
        }
        let deadline = Duration::from_secs(20);
        let server = Client { address: (Ipv4Addr::LOCALHOST, port).into(), secret: None, deadline };
        VirtualHost { server, name: format!("127.0.0.1:{port}") }
    }
}

/// `POST /instances`; the answer.
pub(super) fn create(desk: &Desk, public_key: &str) -> Result<Value> {
    let created = match &desk.renter {
        Some(renter) => renter.create(public_key)?,
        None => desk.agent.call("POST", "/instances", Some(&guest::wish(public_key)))?,
    };
    for warning in created.get("warnings").and_then(Value::as_array).into_iter().flatten() {
        say(format!("warning of the agent: {warning}"));
    }
    Ok(created)
}

/// Follows the instance until it is ready, then logs in and asks its application.
pub(super) fn prove(desk: &Desk, site: &Site, created: &Value, interrupt: &Interrupt) -> Result<Proof> {
    let (agent, id) = (desk.agent, text(created, "id")?);
    let (post_to_exec_ms, create_to_ready_ms) = watch(agent, id, desk.renter.is_some(), interrupt)?;
    let view = agent.call("GET", &format!("/instances/{id}"), None)?;
    // The view knows better than the first answer: a public port that somebody else has is replaced.
    let (ssh_port, app_port) = (port(&view, 22)?, port(&view, guest::APP_PORT)?);
    let login = Login::pin(site, (desk.address(), ssh_port), text(&view, "ssh_host_key")?)?;
    let ssh = login.prove()?;
    say(format!("logged in: {ssh}"));
    let app = desk.app(app_port);
    let app_http_status = guest::prove_app(&app, interrupt)?;
    say("the application answers 200");
    let tunnel = desk.renter.as_ref().map(|renter| renter.line(ssh_port, app_port));
    Ok(Proof { post_to_exec_ms, create_to_ready_ms, ssh, app_http_status, login, app, tunnel })
}

/// Prints each phase as it happens; when QEMU was started and when the guest was ready. With a tunnel, returns once its
/// ports are published too.
fn watch(agent: &Agent, id: &str, tunnel: bool, interrupt: &Interrupt) -> Result<(u64, u64)> {
    let events = follow(agent, id)?;
    let until = Instant::now() + READY;
    let (mut started, mut ready, mut published) = (None, None, !tunnel);
    loop {
        if let (Some(ready), true) = (ready, published) {
            return Ok((started.context("ready without qemu_started")?, ready));
        }
        let event = match events.recv_timeout(Duration::from_millis(100)) {
            Ok(event) => event?,
            Err(RecvTimeoutError::Timeout) if interrupt.raised() => {
                bail!("interrupted while the guest boots")
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < until => continue,
            Err(RecvTimeoutError::Timeout) => bail!("not ready within {} s", READY.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the events ended before the guest was ready"),
        };
        // Milliseconds to seconds without a float.
        let (seconds, rest) = (event.elapsed_ms / 1000, event.elapsed_ms % 1000);
        eprintln!("  {seconds:>4}.{rest:03} s  {:<16} {}", event.phase, event.message);
        match event.phase.as_str() {
            "qemu_started" => started = Some(event.elapsed_ms),
            "ready" => ready = Some(event.elapsed_ms),
            "published" => published = true,
            "failed" => bail!("the instance failed: {}\n{}", event.message, console(agent, id)),
            _ => {}
        }
    }
}

/// The events in a thread of their own: reading blocks, and Ctrl-C shall not wait for the next one.
fn follow(agent: &Agent, id: &str) -> Result<mpsc::Receiver<Result<Event>>> {
    let mut events = Events::open(&agent.client, id, 0).context("the agent shows no events")?;
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let until = Instant::now() + READY;
        while let Some(event) = events.next(until).context("reading the events").transpose() {
            let ended = event.is_err();
            if send.send(event).is_err() || ended {
                return;
            }
        }
    });
    Ok(receive)
}

/// `DELETE`, and waits until the instance is unknown.
pub(super) fn delete(desk: &Desk, id: &str) -> Result<()> {
    if let Some(renter) = &desk.renter {
        return renter.delete(id);
    }
    let (agent, path) = (desk.agent, format!("/instances/{id}"));
    agent.call("DELETE", &path, None)?;
    let until = Instant::now() + GONE;
    while agent.client.call("GET", &path, None)?.status != 404 {
        if Instant::now() > until {
            bail!("the instance is not gone {} s after DELETE", GONE.as_secs());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn console(agent: &Agent, id: &str) -> String {
    let reply = agent.client.call("GET", &format!("/instances/{id}/console"), None);
    let text = reply.map(|reply| reply.text()).unwrap_or_default();
    format!("end of the guest's console:\n{}", tool::tail(text.trim_end(), 2000))
}

/// A text field of an answer.
pub(super) fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value.get(field).and_then(Value::as_str).with_context(|| format!("the agent's answer has no {field}"))
}

fn port(view: &Value, guest_port: u16) -> Result<u16> {
    let ports = view.get("ports").context("the agent's answer has no ports")?;
    text(ports, &guest_port.to_string())?.parse().context("the agent's answer has a port that is none")
}
