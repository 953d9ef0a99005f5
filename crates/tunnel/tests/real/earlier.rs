//! What the frpc of an earlier agent routes is known from the first moment, and it can be ended without a tunnel.

use std::path::Path;

use qudata_tunnel::{RouteState, TunnelState, earlier_routes, end_earlier};

use crate::{
    frps::Frps,
    local::{closed, connect, echo, echoes},
    site::{Site, all_up, state_of, tcp, until},
};

async fn known_at_once(site: Site, frps: &Frps) {
    let echo = echo().await;
    let (stay, go) = (tcp("stay.22", frps.tcp(0), echo), tcp("go.22", frps.tcp(1), echo));
    let tunnel = site.start(vec![stay.clone(), go.clone()]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    drop(tunnel);
    let mut session = connect(frps.tcp(0)).await;
    let mut found = earlier_routes(&site.setup.dir, &site.setup.config);
    found.sort_by_key(|route| route.name.clone());
    assert_eq!(found, [go, stay.clone()]);
    let tunnel = site.start(vec![stay]);
    {
        let status = tunnel.status();
        let status = status.borrow();
        assert_eq!(status.state, TunnelState::Starting);
        assert_eq!(state_of(&status, "go.22"), Some(&RouteState::Removing));
        assert_eq!(state_of(&status, "stay.22"), Some(&RouteState::Adding));
    }
    until(&tunnel, "one route", |s| all_up(s, 1)).await;
    closed(frps.tcp(1)).await;
    assert!(echoes(&mut session, b"all the while").await);
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn an_earlier_frpcs_routes_are_known_at_once_from_its_store() {
    let frps = Frps::start("token");
    known_at_once(Site::new(&frps, "agent", "token"), &frps).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn an_earlier_frpcs_routes_are_known_at_once_from_its_file() {
    let frps = Frps::start("token");
    known_at_once(Site::new(&frps, "agent", "token").claiming("0.67.0"), &frps).await;
}

/// The machine was started anew: the files are there and nobody runs.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn routes_of_a_frpc_that_is_gone_are_soon_gone() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let tunnel = site.start(vec![tcp("go.22", frps.tcp(0), echo().await)]);
    until(&tunnel, "a route", |s| all_up(s, 1)).await;
    drop(tunnel);
    site.kill_frpc();
    let tunnel = site.start(Vec::new());
    assert_eq!(state_of(&tunnel.status().borrow(), "go.22"), Some(&RouteState::Removing));
    until(&tunnel, "no route", |s| all_up(s, 0)).await;
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn an_earlier_frpc_is_ended_without_a_tunnel() {
    let frps = Frps::start("token");
    for site in [Site::new(&frps, "agent", "token"), Site::new(&frps, "agent", "token").claiming("0.67.0")] {
        let setup = &site.setup;
        end_earlier(&setup.launcher, &setup.dir).await.unwrap();
        let tunnel = site.start(vec![tcp("go.22", frps.tcp(0), echo().await)]);
        until(&tunnel, "a route", |s| all_up(s, 1)).await;
        drop(tunnel);
        let proc = format!("/proc/{}", site.pid());
        assert!(Path::new(&proc).exists());
        end_earlier(&setup.launcher, &setup.dir).await.unwrap();
        assert!(!Path::new(&proc).exists());
        closed(frps.tcp(0)).await;
        assert_eq!(earlier_routes(&setup.dir, &setup.config), []);
        end_earlier(&setup.launcher, &setup.dir).await.unwrap();
        let tunnel = site.start(Vec::new());
        until(&tunnel, "a tunnel without routes", |s| all_up(s, 0)).await;
        tunnel.stop().await.unwrap();
    }
}
