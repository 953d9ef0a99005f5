//! Tests of what is published, and of what follows from the server's refusals.

use jiff::Timestamp;
use qudata_api::RouteState as Shown;
use qudata_tunnel::TunnelState;

use super::{plan::*, *};

fn instance(public: &[(u16, u16)]) -> Published {
    let ports = [(22, 10_000), (80, 20_000), (8888, 20_001)];
    Published {
        id: Uuid::from_u128(7),
        ports: ports.into(),
        public: public.iter().copied().collect(),
        token: Sealed::new("renter"),
    }
}

fn status(states: Vec<(Route, RouteState)>) -> TunnelStatus {
    let since = Timestamp::UNIX_EPOCH;
    let entry =
        |(route, state): (Route, RouteState)| (route.name.clone(), RouteStatus { route, state, since });
    TunnelStatus {
        state: TunnelState::Up,
        since,
        version: None,
        routes: states.into_iter().map(entry).collect(),
    }
}

fn refused(why: Why) -> RouteState {
    RouteState::Refused { why, words: "no".to_owned() }
}

#[test]
fn the_public_port_says_how_it_is_reached() {
    let instance = instance(&[(22, 12_345), (80, 80), (8888, 20_001)]);
    let kinds: Vec<String> = instance
        .routes()
        .map(|route| match route.kind {
            RouteKind::Tcp { remote_port } => format!("{}<tcp {remote_port}", route.local_port),
            RouteKind::Http { domain } => format!("{}<http {domain}", route.local_port),
        })
        .collect();
    assert_eq!(kinds, ["10000<tcp 12345", "20000<http renter", "20001<http renter-20001"]);
    let own = own_route(Uuid::from_u128(1), &Sealed::new("host"), 15_001).unwrap();
    assert_eq!(own.name.to_string(), format!("agent-{}", Uuid::from_u128(1)));
    assert_eq!(own.kind, RouteKind::Http { domain: "host-15001".parse().unwrap() });
}

#[test]
fn ssh_gets_a_port_of_the_server_and_one_web_port_the_bare_name() {
    let ports: BTreeMap<u16, u16> = [(22, 10_000), (80, 20_000), (443, 20_001), (8888, 20_002)].into();
    let plan = |taken: &[u16], start| {
        plan_public(&ports, &(10_000..=10_003), &taken.iter().copied().collect(), start)
    };
    let public: BTreeMap<u16, u16> = [(22, 10_002), (80, 80), (443, 20_001), (8888, 20_002)].into();
    assert_eq!(plan(&[], 10_002), Some(public));
    assert_eq!(plan(&[10_002, 10_003], 10_002).unwrap()[&22], 10_000);
    assert_eq!(plan(&[10_000, 10_001, 10_002, 10_003], 10_002), None);
    let only_tls: BTreeMap<u16, u16> = [(443, 20_001)].into();
    assert_eq!(plan_public(&only_tls, &(10_000..=10_003), &BTreeSet::new(), 10_000).unwrap()[&443], 443);
}

#[test]
fn a_taken_port_is_looked_for_again_and_stale_words_are_not() {
    let instance = instance(&[(22, 12_345), (80, 80), (8888, 20_001)]);
    let ssh = instance.routes().next().unwrap();
    let of = |states| refused_ports(&instance, &status(states));
    assert_eq!(of(vec![(ssh.clone(), refused(Why::PortTaken))]), [(instance.id, 22, 12_345)]);
    assert_eq!(of(vec![(ssh.clone(), refused(Why::PortNotAllowed))]), [(instance.id, 22, 12_345)]);
    assert_eq!(of(vec![(ssh.clone(), refused(Why::Other))]), []);
    let earlier = Route { kind: RouteKind::Tcp { remote_port: 11_111 }, ..ssh };
    assert_eq!(of(vec![(earlier, refused(Why::PortTaken))]), []);
}

#[test]
fn the_api_is_published_once_it_has_a_name() {
    let own = Own { agent_id: Uuid::from_u128(1), port: 15_001 };
    let published = [instance(&[(22, 12_345)])];
    assert_eq!(Publisher::wanted(own, None, &published).len(), 3);
    assert_eq!(Publisher::wanted(own, Some(&Sealed::new("host")), &published).len(), 4);
}

#[test]
fn views_tell_what_is_really_routed() {
    let instance = instance(&[(22, 12_345), (80, 80), (8888, 20_001)]);
    let routes: Vec<Route> = instance.routes().collect();
    let up = RouteState::Up { remote_addr: "1.2.3.4:12345".to_owned() };
    let status = status(vec![(routes[0].clone(), up), (routes[1].clone(), refused(Why::DomainTaken))]);
    let views = instance.views("frps.example", &status);
    let shown: Vec<(u16, &str, Shown)> =
        views.iter().map(|view| (view.public_port, view.address.as_str(), view.state)).collect();
    assert_eq!(
        shown,
        [
            (12_345, "frps.example:12345", Shown::Up),
            (80, "renter", Shown::Refused),
            (20_001, "renter-20001", Shown::Adding),
        ]
    );
    assert_eq!(views[1].reason.as_deref(), Some("the tunnel server refuses it: no"));
}
