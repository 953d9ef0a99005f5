//! The published status: what changed keeps a new time, what did not its old one. Written by `task` and `rounds`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::sync::watch;

use crate::{
    plan::Wanted,
    route::{ProxyName, Route},
    status::{RouteState, RouteStatus, TunnelState, TunnelStatus},
    version::Version,
};

/// How each route does.
pub(crate) type States = BTreeMap<ProxyName, (Route, RouteState)>;

/// The writing end of the status.
#[derive(Debug)]
pub(crate) struct Board {
    status: watch::Sender<TunnelStatus>,
}

impl Board {
    /// A board that tells of these routes.
    pub(crate) fn new(states: States) -> (Self, watch::Receiver<TunnelStatus>) {
        let mut first = TunnelStatus {
            state: TunnelState::Starting,
            since: Timestamp::now(),
            version: None,
            routes: BTreeMap::new(),
        };
        change_routes(&mut first, states);
        let (status, seen) = watch::channel(first);
        (Self { status }, seen)
    }

    /// Tells the version of frpc.
    pub(crate) fn version(&self, version: Option<Version>) {
        self.status.send_if_modified(|status| {
            let changed = status.version != version;
            status.version = version;
            changed
        });
    }

    /// Tells how all routes do, and the state of the tunnel if there is news of it.
    pub(crate) fn all(&self, states: States, state: Option<TunnelState>) {
        self.status.send_if_modified(|status| {
            let changed = state.is_some_and(|state| change_state(status, state));
            change_routes(status, states) || changed
        });
    }

    /// Tells that no frpc runs: it routes nothing, so what is not wanted any more is gone.
    pub(crate) fn nothing_routed(&self, wanted: &Wanted, state: Option<TunnelState>) {
        self.all(waiting(wanted), state);
    }

    /// Tells that a frpc may run that cannot be spoken to: what was told of a route stays, and what is not wanted any
    /// more may still be routed.
    pub(crate) fn unclear(&self, wanted: &Wanted, state: Option<TunnelState>) {
        let mut states = waiting(wanted);
        for (name, told) in &self.status.borrow().routes {
            match states.get_mut(name) {
                Some((route, state)) if *route == told.route => *state = told.state.clone(),
                Some(_) => {}
                None => drop(states.insert(name.clone(), (told.route.clone(), RouteState::Removing))),
            }
        }
        self.all(states, state);
    }

    /// What was told last of a route as it is.
    pub(crate) fn told(&self, route: &Route) -> Option<RouteState> {
        let status = self.status.borrow();
        let told = status.routes.get(&route.name).filter(|told| told.route == *route);
        told.map(|told| told.state.clone())
    }
}

/// How routes do before anything is known: those that are not wanted may still be routed by an earlier frpc.
pub(crate) fn first_states(wanted: &[Route], earlier: Vec<Route>) -> States {
    let state = |route: &Route, state| (route.name.clone(), (route.clone(), state));
    let mut states: States = earlier.iter().map(|route| state(route, RouteState::Removing)).collect();
    states.extend(wanted.iter().map(|route| state(route, RouteState::Adding)));
    states
}

fn waiting(wanted: &Wanted) -> States {
    let waiting = |route: &Route| (route.name.clone(), (route.clone(), RouteState::Waiting));
    wanted.values().map(waiting).collect()
}

/// Whether something changed.
fn change_state(status: &mut TunnelStatus, state: TunnelState) -> bool {
    if status.state == state {
        return false;
    }
    if !status.state.is_same(&state) {
        status.since = Timestamp::now();
        log_change(&state);
    }
    status.state = state;
    true
}

/// Whether something changed.
fn change_routes(status: &mut TunnelStatus, states: States) -> bool {
    let before = std::mem::take(&mut status.routes);
    let now = Timestamp::now();
    for (name, (route, state)) in states {
        let same = |old: &&RouteStatus| old.route == route && old.state.is_same(&state);
        let since = before.get(&name).filter(same).map_or(now, |old| old.since);
        status.routes.insert(name, RouteStatus { route, state, since });
    }
    status.routes != before
}

fn log_change(state: &TunnelState) {
    match state {
        TunnelState::Starting => tracing::info!("the tunnel starts"),
        TunnelState::Up => tracing::info!("the tunnel is up"),
        TunnelState::Down { code, reason, remedy } => {
            tracing::warn!(code, reason, remedy, "the tunnel is down");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::tests::tcp;

    fn down(code: &'static str, reason: &str) -> TunnelState {
        TunnelState::Down { code, reason: reason.into(), remedy: String::new() }
    }

    #[test]
    fn what_an_earlier_frpc_may_route_is_told_until_it_is_known_better() {
        let (stay, gone) = (tcp("stay", 1, 2), tcp("gone", 3, 4));
        let wanted: Wanted = [(stay.name.clone(), stay.clone())].into();
        let (board, seen) =
            Board::new(first_states(std::slice::from_ref(&stay), vec![stay.clone(), gone.clone()]));
        let told = || {
            let routes = seen.borrow().routes.clone();
            routes.into_values().map(|told| (told.route, told.state)).collect::<Vec<_>>()
        };
        let first = [(gone, RouteState::Removing), (stay.clone(), RouteState::Adding)];
        assert_eq!(told(), first);
        assert_eq!(seen.borrow().state, TunnelState::Starting);
        board.unclear(&wanted, None);
        assert_eq!(told(), first, "it may still run");
        board.nothing_routed(&wanted, None);
        assert_eq!(told(), [(stay, RouteState::Waiting)]);
    }

    #[test]
    fn times_are_kept_as_long_as_nothing_changes() {
        let (board, mut seen) = Board::new(States::new());
        let first = seen.borrow_and_update().since;
        std::thread::sleep(std::time::Duration::from_millis(2));
        let tell = |state| board.nothing_routed(&Wanted::new(), Some(state));
        tell(down("a", "x"));
        let second = seen.borrow_and_update().since;
        assert!(second > first);
        std::thread::sleep(std::time::Duration::from_millis(2));
        tell(down("a", "y"));
        assert!(seen.has_changed().unwrap(), "other words are told");
        assert_eq!(seen.borrow_and_update().since, second, "of the same trouble");
        tell(down("a", "y"));
        assert!(!seen.has_changed().unwrap());
        tell(down("b", "y"));
        assert!(seen.borrow_and_update().since > second);
    }

    #[test]
    fn a_route_that_changes_starts_anew_and_a_gone_one_goes() {
        let (board, seen) = Board::new(States::new());
        let tell = |route: Route, state| board.all([(route.name.clone(), (route, state))].into(), None);
        let since = || seen.borrow().routes.values().next().unwrap().since;
        let pause = || std::thread::sleep(std::time::Duration::from_millis(2));
        tell(tcp("a", 1, 2), RouteState::Adding);
        let first = since();
        pause();
        tell(tcp("a", 1, 2), RouteState::Adding);
        assert_eq!(since(), first);
        tell(tcp("a", 1, 3), RouteState::Adding);
        let second = since();
        assert!(second > first);
        pause();
        tell(tcp("a", 1, 3), RouteState::Removing);
        assert!(since() > second);
        board.unclear(&Wanted::new(), None);
        assert_eq!(seen.borrow().routes.values().next().unwrap().state, RouteState::Removing);
        board.nothing_routed(&Wanted::new(), None);
        assert!(seen.borrow().routes.is_empty());
    }
}
