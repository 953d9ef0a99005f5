//! `time.sync`, `dns`, `control_plane`, `frps`, `agent`: does the host reach whom it needs, and does the agent run?

use qudata_agent_core::{control_plane::Answer, settings::TunnelKind};

use super::{fail, pass, unseen, warn};
use crate::{
    Finding,
    observed::{AgentLook, AgentView, Observed, Outside, Systemd, Unit, Unseen},
};

const TIME: &str = "time.sync";
const DNS: &str = "dns";
const CONTROL_PLANE: &str = "control_plane";
const FRPS: &str = "frps";
const AGENT: &str = "agent";

pub(super) fn check(seen: &Observed) -> Vec<Finding> {
    let mut findings = vec![time(&seen.outside), dns(&seen.outside), control_plane(seen), frps(seen)];
    findings.extend(agent(seen));
    findings
}

fn time(outside: &Outside) -> Finding {
    match outside.synchronized {
        Ok(true) => pass(TIME, "the clock is kept by the network"),
        Ok(false) => warn(
            TIME,
            "the clock is not kept by the network: certificates and bills depend on it",
            "run `timedatectl set-ntp true` (Debian and Ubuntu: apt install systemd-timesyncd)",
        ),
        Err(ref why) => unseen(TIME, why),
    }
}

fn dns(outside: &Outside) -> Finding {
    let names = "put `nameserver` lines into /etc/resolv.conf, or look at `resolvectl status`";
    let resolvers = match &outside.resolvers {
        Ok(resolvers) => resolvers,
        Err(why) => return unseen(DNS, why),
    };
    let lost: Vec<String> =
        outside.names.iter().filter_map(|(_, found)| found.as_ref().err()).map(ToString::to_string).collect();
    let found: Vec<&str> = outside.names.iter().map(|(name, _)| name.as_str()).collect();
    match found.as_slice() {
        _ if !lost.is_empty() => fail(DNS, lost.join("; "), names),
        _ if resolvers.is_empty() => warn(
            DNS,
            "no resolver that guests can use: all are IPv6 or on the loopback",
            "put a `nameserver` with an IPv4 address of the network into /etc/resolv.conf",
        ),
        [_, ..] => pass(DNS, format!("{} found; guests ask {}", found.join(" and "), resolvers.join(", "))),
        [] => pass(DNS, format!("guests ask {}", resolvers.join(", "))),
    }
}

fn view(seen: &Observed) -> Option<&AgentView> {
    match &seen.agent {
        AgentLook::Answers(view) => Some(view),
        AgentLook::NoSocket | AgentLook::NobodyListens | AgentLook::Unseen(_) => None,
    }
}

fn control_plane(seen: &Observed) -> Finding {
    let url = &seen.settings.service_url;
    let answer = match &seen.outside.control_plane {
        None => return pass(CONTROL_PLANE, "none: this host is standalone"),
        Some(answer) => answer,
    };
    // Who is connected has a key that counts.
    let up = view(seen).and_then(|view| view.control_plane.as_deref()) == Some("up");
    match answer {
        _ if up => pass(CONTROL_PLANE, format!("the agent is connected to {url}")),
        Err(why @ Unseen::Needs(_)) => unseen(CONTROL_PLANE, why),
        Err(why) => fail(
            CONTROL_PLANE,
            format!("{url} is not reached: {why}"),
            "let this host out to it (TCP), then try `curl -v` with that address; or run without one: standalone = true",
        ),
        Ok(Answer::Refused(500..)) => warn(
            CONTROL_PLANE,
            format!("{url} is reached and has trouble of its own"),
            "wait; the agent tries again by itself",
        ),
        Ok(_) => match (&seen.files.has_key, seen.settings.tunnel) {
            (Ok(true), _) | (Err(_), TunnelKind::None) => pass(CONTROL_PLANE, format!("{url} is reached")),
            (Err(why), TunnelKind::Frp) => unseen(CONTROL_PLANE, why),
            (Ok(false), TunnelKind::Frp) => fail(
                CONTROL_PLANE,
                format!("{url} is reached, and this host has no key for it"),
                "get a key and give it to `qudata-agent install`, or run without one: standalone = true",
            ),
            (Ok(false), TunnelKind::None) => {
                pass(CONTROL_PLANE, format!("{url} is reached; without a key this host does not join it"))
            }
        },
    }
}

fn frps(seen: &Observed) -> Finding {
    let settings = &seen.settings;
    let (server, port) = (settings.frp_server(), settings.frp_port);
    match &seen.outside.frps {
        None => pass(FRPS, "not needed: no tunnel"),
        Some(_) if view(seen).and_then(|view| view.tunnel.as_deref()) == Some("up") => {
            pass(FRPS, format!("the tunnel to {server}:{port} is up"))
        }
        Some(Ok(())) => pass(FRPS, format!("{server}:{port} takes connections")),
        Some(Err(why @ Unseen::Needs(_))) => unseen(FRPS, why),
        Some(Err(why)) => fail(
            FRPS,
            format!("the tunnel server {server}:{port} is not reached: {why}"),
            format!("let this host out to TCP port {port}; region and frp_server say which server it is"),
        ),
    }
}

fn agent(seen: &Observed) -> Vec<Finding> {
    let unit = match &seen.systemd {
        Systemd::Booted(look) => look.unit.as_ref().ok(),
        Systemd::NotBooted | Systemd::Unseen(_) => None,
    };
    let view = match &seen.agent {
        AgentLook::Answers(view) => view,
        AgentLook::Unseen(why @ Unseen::Denied(_)) => return vec![unseen(AGENT, why)],
        AgentLook::Unseen(why) => {
            let remedy = "run `systemctl status qudata-agent`; VMs live on when it is restarted";
            return vec![fail(AGENT, format!("it does not answer: {why}"), remedy)];
        }
        AgentLook::NoSocket | AgentLook::NobodyListens => return vec![absent(&seen.agent, unit)],
    };
    let mut findings = Vec::new();
    for gpu in view.gpus.iter().filter(|gpu| gpu.state == "quarantined") {
        let why = gpu.why.as_deref().unwrap_or("it was not proven healthy and clean");
        let remedy = format!("when that is dealt with: `qudata-agent gpu release {}`", gpu.address);
        findings.push(fail(AGENT, format!("quarantined: {why}"), remedy).on(gpu.address));
    }
    for (message, remedy) in &view.problems {
        findings.push(warn(AGENT, message.clone(), remedy.clone()));
    }
    if findings.is_empty() {
        let (version, instances) = (&view.version, view.instances);
        findings.push(pass(AGENT, format!("version {version} runs, {instances} instances")));
    }
    findings
}

fn absent(agent: &AgentLook, unit: Option<&Unit>) -> Finding {
    let start = "run `systemctl start qudata-agent`";
    match unit {
        Some(unit) if unit.active == "failed" => fail(
            AGENT,
            format!("its unit has failed ({})", unit.result),
            "`journalctl -u qudata-agent -n 50` says why; then `systemctl restart qudata-agent`",
        ),
        Some(unit) if unit.active == "activating" => warn(
            AGENT,
            "it is starting, or starting again and again",
            "`journalctl -u qudata-agent -n 50` says why",
        ),
        Some(unit) if unit.load == "loaded" => warn(AGENT, "it is installed and does not run", start),
        _ if matches!(agent, AgentLook::NobodyListens) => warn(
            AGENT,
            "its socket is there and nobody listens: it was killed",
            "start it: VMs that run are taken over",
        ),
        _ => warn(
            AGENT,
            "it is not installed as a service",
            "run `qudata-agent install` when nothing above fails",
        ),
    }
}
