//! frps refuses a route: which, why, and what becomes of the others.

use std::time::Duration;

use qudata_tunnel::{Refusal, RouteKind, RouteState, Tunnel, TunnelStatus};

use crate::{
    frps::Frps,
    local::{call, connect, echo, echoes, web},
    site::{Site, all_up, http, is_up, state_of, tcp, until, within},
};

fn refused(status: &TunnelStatus, name: &str) -> Option<Refusal> {
    match state_of(status, name) {
        Some(RouteState::Refused { why, .. }) => Some(*why),
        _ => None,
    }
}

async fn until_refused(tunnel: &Tunnel, name: &str, why: Refusal) -> Duration {
    until(tunnel, &format!("{name} refused as {why:?}"), |s| refused(s, name) == Some(why)).await
}

/// The original gave its proxies the same names on every host.
async fn share(one: Site, two: Site, frps: &Frps) {
    let (a, b) = (echo().await, echo().await);
    let (web_a, web_b) = (web("a").await, web("b").await);
    let first = one.start(vec![tcp("vm.22", frps.tcp(0), a), http("vm.80", "a.example", web_a)]);
    until(&first, "the first", |s| all_up(s, 2)).await;
    // The same names.
    let second = two.start(vec![tcp("vm.22", frps.tcp(1), b), http("vm.80", "b.example", web_b)]);
    until(&second, "the second", |s| all_up(s, 2)).await;
    assert_eq!(call(frps.vhost, "a.example", None).await.1, b"a");
    assert_eq!(call(frps.vhost, "b.example", None).await.1, b"b");
    // Taken port, taken domain, a port frps does not give out, and one that is fine.
    second.want(vec![
        tcp("port.22", frps.tcp(0), b),
        http("domain.80", "a.example", web_b),
        tcp("outside.22", 9, b),
        tcp("fine.22", frps.tcp(2), b),
    ]);
    let fine = until(&second, "the one that is fine", |s| is_up(s, &["fine.22"])).await;
    let taken = until_refused(&second, "port.22", Refusal::PortTaken).await;
    until_refused(&second, "domain.80", Refusal::DomainTaken).await;
    until_refused(&second, "outside.22", Refusal::PortNotAllowed).await;
    println!("fine beside refused ones: up after {fine:?}, refusal told after {:?}", fine + taken);
    // Another port, as the agent does when it is told.
    let mut news = second.status();
    second.want(vec![tcp("port.22", frps.tcp(3), b), http("domain.80", "a.example", web_b)]);
    // Nothing that was said of the old port is said of the new one.
    loop {
        news.changed().await.unwrap();
        let status = news.borrow_and_update().clone();
        let now = &status.routes[&"port.22".parse().unwrap()];
        if now.route.kind == (RouteKind::Tcp { remote_port: frps.tcp(3) }) {
            assert!(!matches!(now.state, RouteState::Refused { .. }), "{now:?}");
            if matches!(now.state, RouteState::Up { .. }) {
                break;
            }
        }
    }
    until(&second, "the other port", |s| is_up(s, &["port.22"])).await;
    assert!(echoes(&mut connect(frps.tcp(3)).await, b"elsewhere").await);
    assert_eq!(call(frps.vhost, "a.example", None).await.1, b"a", "whose it was first");
    assert_eq!(refused(&second.status().borrow(), "domain.80"), Some(Refusal::DomainTaken));
    // Once the other lets go, by itself.
    first.want(Vec::new());
    let took = within(&second, "the domain", Duration::from_secs(40), |s| is_up(s, &["domain.80"])).await;
    println!("a domain that was let go is had after {took:?}");
    assert_eq!(call(frps.vhost, "a.example", None).await.1, b"b");
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f3_two_hosts_share_a_frps_with_the_store() {
    let frps = Frps::start("token");
    share(Site::new(&frps, "agent-1", "token"), Site::new(&frps, "agent-2", "token"), &frps).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f3_two_hosts_share_a_frps_with_the_file() {
    let frps = Frps::start("token");
    let two = Site::new(&frps, "agent-2", "token").claiming("0.67.0");
    share(Site::new(&frps, "agent-1", "token"), two, &frps).await;
}

/// Two hosts with the same id, which an installation that was copied leads to.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn the_same_name_twice_is_refused_and_had_later() {
    let frps = Frps::start("token");
    let (one, two) = (Site::new(&frps, "agent", "token"), Site::new(&frps, "agent", "token"));
    let echo = echo().await;
    let first = one.start(vec![tcp("vm.22", frps.tcp(0), echo)]);
    until(&first, "the first", |s| all_up(s, 1)).await;
    let second = two.start(vec![tcp("vm.22", frps.tcp(1), echo)]);
    until_refused(&second, "vm.22", Refusal::NameTaken).await;
    one.kill_frpc();
    first.stop().await.unwrap();
    let took = until(&second, "the name", |s| all_up(s, 1)).await;
    println!("a name that was let go is had after {took:?}");
    second.stop().await.unwrap();
}

/// What one lets go is asked for by the other only afterwards.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_port_swapped_between_two_routes_is_had_by_both() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let echo = echo().await;
    let tunnel = site.start(vec![tcp("a.22", frps.tcp(0), echo), tcp("b.22", frps.tcp(1), echo)]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    for swapped in [true, false, true] {
        let (a, b) = if swapped { (1, 0) } else { (0, 1) };
        tunnel.want(vec![tcp("a.22", frps.tcp(a), echo), tcp("b.22", frps.tcp(b), echo)]);
        let at = |port: u16| RouteState::Up { remote_addr: format!("127.0.0.1:{port}") };
        let (a, b) = (at(frps.tcp(a)), at(frps.tcp(b)));
        let took = until(&tunnel, "both swapped", |s| {
            state_of(s, "a.22") == Some(&a) && state_of(s, "b.22") == Some(&b)
        })
        .await;
        println!("ports swapped after {took:?}");
    }
    tunnel.stop().await.unwrap();
}
