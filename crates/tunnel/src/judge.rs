//! What is to be believed: from what frpc's admin server lists and its log notes to states with a reason and a remedy.
//! Pure; called by `rounds`.

use std::time::Duration;

use crate::{
    admin::SeenRoute,
    astray::is_extra,
    board::States,
    definition::Definitions,
    log::{Session, printable},
    plan::Wanted,
    publish::Publication,
    route::{ProxyName, Refusal, Route, RouteKind},
    setup::Server,
    status::{RouteState, TunnelState},
};

/// How long frps may leave a session or its first route without an answer before it counts as away.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long frpc may list nothing at all, which it does without a session and for a moment after a login.
const EMPTY_PATIENCE: Duration = Duration::from_millis(500);

/// Whether frpc has a session with frps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Up,
    /// Cannot be told yet.
    Pending,
    Down,
}

/// Whether frps has answered about this route in the present session; frpc forgets the answers of earlier ones.
fn is_answered(seen: &SeenRoute) -> bool {
    matches!(seen.phase.as_str(), "running" | "start error" | "check failed")
}

/// Whether frps has answered about any of these routes.
pub(crate) fn any_answered(seen: &[SeenRoute]) -> bool {
    seen.iter().any(is_answered)
}

/// The session, from the routes frpc lists, whether it should list any, its log, and for how long it has had routes and
/// none was answered.
pub(crate) fn link(
    seen: &[SeenRoute],
    has_routes: bool,
    session: Option<&Session>,
    unanswered: Duration,
) -> Link {
    if any_answered(seen) {
        return Link::Up;
    }
    match session {
        Some(Session::Failed(_)) => Link::Down,
        Some(Session::LoggedIn) if !has_routes => Link::Up,
        // After a loss frpc may wait up to 20 s before it notes that it tries again.
        Some(Session::LoggedIn) if has_routes && seen.is_empty() && unanswered >= EMPTY_PATIENCE => {
            Link::Down
        }
        Some(Session::LoggedIn | Session::Trying) | None if has_routes && unanswered >= PATIENCE => {
            Link::Down
        }
        Some(Session::LoggedIn | Session::Trying) | None => Link::Pending,
    }
}

/// How every route does. One that frpc runs and neither has nor should have is told too: its port is in use.
pub(crate) fn route_states(
    wanted: &Wanted,
    known: &Definitions,
    seen: &[SeenRoute],
    publication: &Publication,
    link: Link,
) -> States {
    let found = |name: &ProxyName| seen.iter().find(|seen| seen.name == name.as_str());
    let mut states = States::new();
    for (name, route) in wanted {
        let as_wanted = known.get(name).is_some_and(|defined| defined.route == *route);
        let state = match (publication.rejection(name), found(name)) {
            (Some(words), _) => RouteState::Refused { why: Refusal::Other, words: words.to_owned() },
            (None, Some(seen)) if as_wanted => state_of(seen, link),
            (None, _) => unanswered(link),
        };
        states.insert(name.clone(), (route.clone(), state));
    }
    for (name, defined) in known.iter().filter(|(name, _)| !wanted.contains_key(name)) {
        states.insert(name.clone(), (defined.route.clone(), RouteState::Removing));
    }
    for route in seen.iter().filter(|seen| is_extra(seen, known)).filter_map(route_of) {
        states.entry(route.name.clone()).or_insert((route, RouteState::Removing));
    }
    states
}

/// The route that frpc runs, in its own words. `None` when it leads nowhere yet, or was never one of ours.
fn route_of(seen: &SeenRoute) -> Option<Route> {
    let (_, local_port) = seen.local_addr.rsplit_once(':')?;
    let (place, remote_port) = seen.remote_addr.rsplit_once(':').unwrap_or((&seen.remote_addr, ""));
    let kind = match seen.kind.as_str() {
        "tcp" => RouteKind::Tcp { remote_port: remote_port.parse().ok()? },
        "http" => RouteKind::Http { domain: place.parse().ok()? },
        _ => return None,
    };
    let name = ProxyName::try_from(seen.name.as_str()).ok()?;
    Some(Route { name, kind, local_port: local_port.parse().ok()? })
}

fn unanswered(link: Link) -> RouteState {
    match link {
        Link::Up | Link::Pending => RouteState::Adding,
        Link::Down => RouteState::Waiting,
    }
}

fn state_of(seen: &SeenRoute, link: Link) -> RouteState {
    match seen.phase.as_str() {
        "running" => RouteState::Up { remote_addr: printable(&seen.remote_addr) },
        "start error" => {
            let words = printable(&seen.words);
            RouteState::Refused { why: Refusal::from_words(&words), words }
        }
        _ => unanswered(link),
    }
}

/// Why there is no session, in frpc's own words, and what to do. The words: client/service.go, server/service.go,
/// pkg/auth of frp 0.70, and Go's net and crypto/tls.
pub(crate) fn blame(server: &Server, words: Option<&str>) -> TunnelState {
    let place = format!("{}:{}", server.host, server.port);
    let Some(words) = words else {
        return TunnelState::Down {
            code: "frps_unreachable",
            reason: format!("there is no session with frps at {place}"),
            remedy: "check that frps runs there and that this host reaches it".to_owned(),
        };
    };
    // All frpc says when it breaks off because of a certificate is that the session was shut down.
    let doubts = server.ca.is_some() && words.contains("session shutdown");
    let any = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    let (code, what, remedy) = if any(&["x509:", "tls:", "certificate"])
        || words.starts_with("open ")
        || doubts
    {
        (
            "frps_untrusted",
            "the certificate of frps does not pass, or frps broke off",
            "check the CA file that the agent was given, that it can be read by frpc's user, and the name in the \
             certificate of frps",
        )
    } else if any(&[
        "dial tcp",
        "lookup ",
        "i/o timeout",
        "connection refused",
        "connection reset",
        "no route to host",
        "session shutdown",
        "deadline exceeded",
        "broken pipe",
        "EOF",
    ]) {
        (
            "frps_unreachable",
            "frps cannot be reached",
            "check that frps runs there and that this host reaches it",
        )
    } else {
        ("frps_refused", "frps refuses this host", "check that the agent's token is the one of frps")
    };
    TunnelState::Down {
        code,
        reason: format!("{what}, at {place}: {words}"),
        remedy: format!("{remedy}; the tunnel comes back by itself"),
    }
}

#[cfg(test)]
mod tests;
