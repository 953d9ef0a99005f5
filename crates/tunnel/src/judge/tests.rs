use super::*;
use crate::{
    config::{Abilities, AdminAccess, Config},
    definition::{
        Defined,
        tests::{http, tcp},
    },
    publish::ConfigFile,
};

fn seen(name: &str, phase: &str, words: &str) -> SeenRoute {
    SeenRoute {
        name: name.into(),
        phase: phase.into(),
        words: words.into(),
        remote_addr: if phase == "running" { "h:1".into() } else { String::new() },
        ..SeenRoute::default()
    }
}

fn nothing_rejected() -> Publication {
    let setup = crate::config::tests::setup();
    let abilities = Abilities { store: true, token_file: true };
    let config = Config::plan(&setup, abilities, AdminAccess::generate(1)).unwrap();
    let file = ConfigFile { frpc: "/bin/true".into(), path: "/none".into(), uid: 0, gid: 0 };
    Publication::empty(file, config)
}

#[test]
fn the_session_is_told_from_routes_first_and_the_log_second() {
    let (short, long) = (Duration::from_millis(100), Duration::from_secs(4));
    let failed = Session::Failed("x".into());
    let running = [seen("a", "running", "")];
    let refused = [seen("a", "start error", "port already used")];
    let waiting = [seen("a", "wait start", "")];
    type Row<'a> = (&'a [SeenRoute], bool, Option<&'a Session>, Duration, Link);
    let table: [Row<'_>; 11] = [
        (&running, true, Some(&failed), long, Link::Up),
        (&refused, true, None, long, Link::Up),
        (&waiting, true, Some(&Session::LoggedIn), short, Link::Pending),
        (&waiting, true, Some(&Session::LoggedIn), long, Link::Down),
        (&[], true, Some(&Session::LoggedIn), short, Link::Pending),
        (&[], true, Some(&Session::LoggedIn), Duration::from_millis(600), Link::Down),
        (&[], false, Some(&Session::LoggedIn), long, Link::Up),
        (&[], false, Some(&failed), short, Link::Down),
        (&[], true, Some(&Session::Trying), short, Link::Pending),
        (&[], true, None, long, Link::Down),
        (&[], false, None, long, Link::Pending),
    ];
    for (at, (seen, has_routes, session, unanswered, expected)) in table.into_iter().enumerate() {
        assert_eq!(link(seen, has_routes, session, unanswered), expected, "row {at}");
    }
}

#[test]
fn every_route_has_a_state() {
    let routes = [tcp("up", 1, 1), tcp("no", 2, 2), tcp("new", 3, 3), tcp("changed", 4, 4)];
    let wanted: Wanted = routes.iter().map(|r| (r.name.clone(), r.clone())).collect();
    let known: Definitions = [tcp("up", 1, 1), tcp("no", 2, 2), tcp("changed", 9, 4), tcp("old", 5, 5)]
        .into_iter()
        .map(|route| (route.name.clone(), Defined { route, attempt: 0 }))
        .collect();
    let listed = [
        seen("up", "running", ""),
        seen("no", "start error", "port not allowed"),
        seen("changed", "running", ""),
        seen("old", "running", ""),
    ];
    let states = route_states(&wanted, &known, &listed, &nothing_rejected(), Link::Up);
    let state = |name: &str| states[&name.parse::<ProxyName>().unwrap()].1.clone();
    assert_eq!(state("up"), RouteState::Up { remote_addr: "h:1".into() });
    let refused = RouteState::Refused { why: Refusal::PortNotAllowed, words: "port not allowed".into() };
    assert_eq!(state("no"), refused);
    assert_eq!(state("new"), RouteState::Adding);
    assert_eq!(state("changed"), RouteState::Adding, "what runs is the old definition");
    assert_eq!(state("old"), RouteState::Removing);
    let states = route_states(&wanted, &known, &[], &nothing_rejected(), Link::Down);
    let state = |name: &str| states[&name.parse::<ProxyName>().unwrap()].1.clone();
    assert_eq!((state("up"), state("new")), (RouteState::Waiting, RouteState::Waiting));
    assert_eq!(state("old"), RouteState::Removing, "frpc would route it in the next session");
}

/// As frp 0.70 lists them: server/proxy/http.go leaves port 80 out.
#[test]
fn what_frpc_runs_and_does_not_have_is_told_with_its_port() {
    let run = |name: &str, kind: &str, local: &str, remote: &str| SeenRoute {
        name: name.into(),
        kind: kind.into(),
        phase: "running".into(),
        words: String::new(),
        local_addr: local.into(),
        remote_addr: remote.into(),
    };
    let listed = [
        run("gone.22", "tcp", "127.0.0.1:20022", "frps.x:10022"),
        run("gone.80", "http", "127.0.0.1:20080", "tok.x:8080"),
        run("gone.81", "http", "127.0.0.1:20081", "tok-81.x"),
        run("new", "tcp", "127.0.0.1:9", "frps.x:10023"),
        run("plugin", "tcp", "", "frps.x:10024"),
        run("not yet", "http", "127.0.0.1:5", ""),
    ];
    let new = tcp("new", 1, 1);
    let wanted: Wanted = [(new.name.clone(), new.clone())].into();
    let states = route_states(&wanted, &Definitions::new(), &listed, &nothing_rejected(), Link::Up);
    let removing = |route: Route| (route, RouteState::Removing);
    let expected = [
        removing(tcp("gone.22", 10_022, 20_022)),
        removing(http("gone.80", "tok.x", 20_080)),
        removing(http("gone.81", "tok-81.x", 20_081)),
        (new, RouteState::Adding),
    ];
    assert_eq!(states.into_values().collect::<Vec<_>>(), expected);
}

#[test]
fn frpcs_words_are_told_with_a_code_and_a_remedy() {
    let server = Server { host: "frps.x".into(), port: 7000, token: None, ca: None };
    let table = [
        ("dial tcp 127.0.0.1:7000: connect: connection refused", "frps_unreachable"),
        ("dial tcp: lookup agent.x: no such host", "frps_unreachable"),
        ("i/o timeout", "frps_unreachable"),
        ("EOF", "frps_unreachable"),
        ("token in login doesn't match token from configuration", "frps_refused"),
        ("register control error", "frps_refused"),
        (
            "tls: failed to verify certificate: x509: certificate signed by unknown authority",
            "frps_untrusted",
        ),
        ("open /etc/qudata/ca.pem: permission denied", "frps_untrusted"),
    ];
    for (words, expected) in table {
        let TunnelState::Down { code, reason, remedy } = blame(&server, Some(words)) else { panic!() };
        assert_eq!(code, expected, "{words}");
        assert!(reason.contains(words) && reason.contains("frps.x:7000") && !remedy.is_empty());
    }
    let code = |server: &Server, words| match blame(server, words) {
        TunnelState::Down { code, .. } => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(code(&server, None), "frps_unreachable");
    assert_eq!(code(&server, Some("session shutdown")), "frps_unreachable");
    let verified = Server { ca: Some("/ca.pem".into()), ..server };
    assert_eq!(code(&verified, Some("session shutdown")), "frps_untrusted");
}
