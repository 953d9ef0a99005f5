//! frps goes, comes back, refuses: the tunnel says so and is back within five seconds of the reason's end.

use std::time::{Duration, Instant};

use qudata_tunnel::{RouteState, TunnelState};
use tokio::net::TcpStream;

use crate::{
    frps::{Frps, Options},
    local::{connect, echo, echoes},
    site::{Site, all_up, is_down, state_of, tcp, until, within},
};

const BACK: Duration = Duration::from_secs(5);

async fn up_again(tunnel: &qudata_tunnel::Tunnel, frps: &Frps, since: Instant) -> Duration {
    within(tunnel, "the route again", BACK, |s| all_up(s, 1)).await;
    let took = since.elapsed();
    assert!(echoes(&mut connect(frps.tcp(0)).await, b"back").await);
    took
}

/// The status may not even have noticed: the world counts.
async fn carried_again(frps: &Frps, since: Instant) -> Duration {
    loop {
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", frps.tcp(0))).await
            && echoes(&mut stream, b"back").await
        {
            return since.elapsed();
        }
        assert!(since.elapsed() < BACK, "not back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// By then frpc looks for frps every twenty seconds.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn back_within_seconds_of_a_long_outage() {
    let mut frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    frps.stop();
    let noticed = until(&tunnel, "the outage", |s| is_down(s, "frps_unreachable")).await;
    let since = tunnel.status().borrow().since;
    println!("outage noticed after {noticed:?}");
    assert_eq!(state_of(&tunnel.status().borrow(), "vm.22"), Some(&RouteState::Waiting));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(tunnel.status().borrow().since, since, "since when is kept");
    let TunnelState::Down { reason, .. } = tunnel.status().borrow().state.clone() else { panic!() };
    assert!(reason.contains("connection refused"), "{reason}");
    // Changes meanwhile are made.
    tunnel.want(vec![tcp("vm.22", frps.tcp(0), echo().await), tcp("gone.22", frps.tcp(1), 9)]);
    until(&tunnel, "a second route", |s| s.routes.len() == 2).await;
    tunnel.want(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "one route", |s| s.routes.len() == 1).await;
    let begin = Instant::now();
    frps.run();
    println!("back after {:?} of an outage of 60 s", up_again(&tunnel, &frps, begin).await);
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn back_each_time_when_frps_restarts_every_five_seconds() {
    let mut frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    for away in [0, 0, 300, 0, 1000, 0, 0, 2000, 0, 0] {
        let begin = Instant::now();
        frps.stop();
        tokio::time::sleep(Duration::from_millis(away)).await;
        let there = Instant::now();
        frps.run();
        let took = carried_again(&frps, there).await;
        println!("away for {away} ms: back after {took:?}");
        until(&tunnel, "the route", |s| all_up(s, 1)).await;
        tokio::time::sleep(Duration::from_secs(5).saturating_sub(begin.elapsed())).await;
    }
    tunnel.stop().await.unwrap();
}

/// frpc waits longer each time before it even notes that it tries, up to twenty seconds.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn back_each_time_when_frps_is_never_there_for_long() {
    let mut frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    let mut longest = Duration::ZERO;
    for _ in 0..18 {
        frps.stop();
        let there = Instant::now();
        frps.run();
        longest = longest.max(carried_again(&frps, there).await);
    }
    println!("18 restarts, each as soon as the route was back: back after {longest:?} at most");
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_refused_token_is_told_and_mended_by_frps() {
    let mut frps = Frps::start("theirs");
    let site = Site::new(&frps, "agent", "ours");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "the refusal", |s| is_down(s, "frps_refused")).await;
    let status = tunnel.status().borrow().clone();
    let TunnelState::Down { reason, remedy, .. } = &status.state else { panic!() };
    assert!(reason.contains("token in login doesn't match"), "{reason}");
    assert!(remedy.contains("token"), "{remedy}");
    tokio::time::sleep(Duration::from_secs(4)).await;
    let pid = site.pid();
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(site.pid(), pid, "a frps that stays and refuses is not stormed");
    assert_eq!(tunnel.status().borrow().since, status.since);
    frps.stop();
    frps.configure(&Options { token: "ours", tls: None });
    let begin = Instant::now();
    frps.run();
    println!("back after {:?} of a refused token", up_again(&tunnel, &frps, begin).await);
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_tunnel_may_start_before_frps() {
    let mut frps = Frps::start("token");
    frps.stop();
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "the outage", |s| is_down(s, "frps_unreachable")).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let begin = Instant::now();
    frps.run();
    println!("back after {:?} of the first start of frps", up_again(&tunnel, &frps, begin).await);
    tunnel.stop().await.unwrap();
}
