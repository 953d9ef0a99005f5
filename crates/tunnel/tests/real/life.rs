//! frpc's life: it outlives the agent, comes back when killed, starts anew when its settings change, and never brings
//! back a route that nobody wants any more.

use std::{fs, time::Duration};

use qudata_tunnel::{RouteState, TunnelState};
use tokio::net::TcpStream;

use crate::{
    frps::{Frps, Options},
    local::{call, connect, echo, echoes, web},
    site::{Site, all_up, http, is_down, state_of, tcp, until},
};

async fn outlives_the_agent(site: Site, frps: &Frps) {
    let (echo, web) = (echo().await, web("x").await);
    let routes = vec![tcp("vm.22", frps.tcp(0), echo), http("vm.80", "tok.example", web)];
    let tunnel = site.start(routes.clone());
    until(&tunnel, "routes", |s| all_up(s, 2)).await;
    let pid = site.pid();
    let mut session = connect(frps.tcp(0)).await;
    assert!(echoes(&mut session, b"before").await);
    // The agent is gone, and what it would have done meanwhile is not done.
    drop(tunnel);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(echoes(&mut session, b"while nobody looks").await);
    let mut later = routes.clone();
    later[1] = tcp("vm.443", frps.tcp(1), echo);
    let tunnel = site.start(later);
    let took = until(&tunnel, "the routes of the next agent", |s| all_up(s, 2)).await;
    println!("taken over after {took:?}");
    assert_eq!(site.pid(), pid, "the same frpc");
    assert!(echoes(&mut session, b"after").await, "the session survives");
    assert!(echoes(&mut connect(frps.tcp(1)).await, b"new").await);
    assert_eq!(call(frps.vhost, "tok.example", None).await.0, 404, "unwanted since the agent came back");
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_session_survives_the_agent_with_the_store() {
    let frps = Frps::start("token");
    outlives_the_agent(Site::new(&frps, "agent", "token"), &frps).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_session_survives_the_agent_with_the_file() {
    let frps = Frps::start("token");
    outlives_the_agent(Site::new(&frps, "agent", "token").claiming("0.67.0"), &frps).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f9_a_killed_frpc_comes_back_again_and_again() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    for _ in 0..3 {
        let pid = site.pid();
        site.kill_frpc();
        until(&tunnel, "its death", |s| is_down(s, "frpc_died")).await;
        assert_eq!(state_of(&tunnel.status().borrow(), "vm.22"), Some(&RouteState::Waiting));
        let took = until(&tunnel, "its return", |s| all_up(s, 1)).await;
        println!("killed frpc is back after {took:?}");
        assert_ne!(site.pid(), pid);
        assert!(echoes(&mut connect(frps.tcp(0)).await, b"again").await);
    }
    tunnel.stop().await.unwrap();
}

/// Removed while frpc is dead, and while neither frpc nor an agent lives: the store on disk still has it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_removed_route_does_not_come_back_from_the_store() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let echo = echo().await;
    let (stay, go) = (tcp("stay.22", frps.tcp(0), echo), tcp("go.22", frps.tcp(1), echo));
    let tunnel = site.start(vec![stay.clone(), go.clone()]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    let store = site.file("state/routes.json");
    assert!(fs::read_to_string(&store).unwrap().contains("go.22"));
    site.kill_frpc();
    until(&tunnel, "its death", |s| is_down(s, "frpc_died")).await;
    tunnel.want(vec![stay.clone()]);
    until(&tunnel, "the route to be gone at once", |s| s.routes.len() == 1 && s.state != TunnelState::Up)
        .await;
    until(&tunnel, "one route", |s| all_up(s, 1)).await;
    assert!(TcpStream::connect(("127.0.0.1", frps.tcp(1))).await.is_err());

    tunnel.want(vec![stay.clone(), go]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    drop(tunnel);
    site.kill_frpc();
    let tunnel = site.start(vec![stay]);
    until(&tunnel, "one route", |s| all_up(s, 1)).await;
    assert!(!fs::read_to_string(&store).unwrap().contains("go.22"));
    assert!(TcpStream::connect(("127.0.0.1", frps.tcp(1))).await.is_err());
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn other_settings_restart_frpc_once() {
    let mut frps = Frps::start("old");
    let mut site = Site::new(&frps, "agent", "old");
    let routes = vec![tcp("vm.22", frps.tcp(0), echo().await)];
    let tunnel = site.start(routes.clone());
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    let pid = site.pid();
    drop(tunnel);
    frps.stop();
    frps.configure(&Options { token: "new", tls: None });
    frps.run();
    // Nothing about the configuration differs but what is in the file with the token.
    site.setup.server.token = Some("new".into());
    let tunnel = site.start(routes);
    until(&tunnel, "the route with the new token", |s| all_up(s, 1)).await;
    assert_ne!(site.pid(), pid);
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_tunnel_without_a_usable_frpc_says_so_and_starts_when_there_is_one() {
    let frps = Frps::start("token");
    let mut site = Site::new(&frps, "agent", "token");
    let real = site.setup.frpc.clone();
    site.setup.frpc = site.setup.dir.with_file_name("not-yet");
    let tunnel = site.start(vec![tcp("vm.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "the complaint", |s| is_down(s, "frpc_missing")).await;
    fs::copy(real, &site.setup.frpc).unwrap();
    let took = until(&tunnel, "the route", |s| all_up(s, 1)).await;
    println!("frpc was installed and the route is up after {took:?}");
    tunnel.stop().await.unwrap();
}

/// It may hang and carry sessions all the same: it is told of and not ended.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_hanging_frpc_is_told_of_and_left_alone() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let echo = echo().await;
    let (stay, go) = (tcp("stay.22", frps.tcp(0), echo), tcp("go.22", frps.tcp(1), echo));
    let tunnel = site.start(vec![stay.clone(), go]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    let mut session = connect(frps.tcp(0)).await;
    let pid = site.pid();
    site.signal_frpc("STOP");
    let told = until(&tunnel, "the silence", |s| is_down(s, "frpc_admin")).await;
    println!("silence told after {told:?}");
    tunnel.want(vec![stay]);
    until(&tunnel, "the removal to be under way", |s| state_of(s, "go.22") == Some(&RouteState::Removing))
        .await;
    site.signal_frpc("CONT");
    until(&tunnel, "one route", |s| all_up(s, 1)).await;
    assert_eq!(site.pid(), pid);
    assert!(echoes(&mut session, b"still").await);
    tunnel.stop().await.unwrap();
}
