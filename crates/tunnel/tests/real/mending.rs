//! A frpc that does not do what it was told: it cannot write its store, or runs other routes than it should.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use qudata_tunnel::{RouteState, TunnelState};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    frps::Frps,
    local::{closed, connect, echo, echoes},
    site::{Site, all_up, is_down, state_of, tcp, until, within},
};

fn allow(dir: &Path, mode: u32) {
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn a_frpc_that_cannot_write_its_store_is_told_of_and_not_stormed() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let echo = echo().await;
    let routes = [
        tcp("stay.22", frps.tcp(0), echo),
        tcp("go.22", frps.tcp(1), echo),
        tcp("new.22", frps.tcp(2), echo),
    ];
    let [stay, go, new] = routes;
    let tunnel = site.start(vec![stay.clone(), go]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    let pid = site.pid();
    let mut session = connect(frps.tcp(0)).await;
    allow(&site.file("state"), 0o500);
    tunnel.want(vec![stay, new]);
    let told = until(&tunnel, "the refusal", |s| is_down(s, "frpc_admin")).await;
    println!("told after {told:?}");
    assert!(told >= Duration::from_secs(3), "it may pass");
    let status = tunnel.status().borrow().clone();
    let TunnelState::Down { reason, .. } = &status.state else { panic!() };
    assert!(reason.contains("500") && reason.contains("permission denied"), "{reason}");
    assert!(matches!(state_of(&status, "stay.22"), Some(RouteState::Up { .. })));
    assert_eq!(state_of(&status, "go.22"), Some(&RouteState::Removing));
    assert_eq!(state_of(&status, "new.22"), Some(&RouteState::Adding));
    let asked = || site.log().matches("http request: [/api/status]").count();
    let before = asked();
    assert!(before > 0, "{}", site.log());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let rounds = asked() - before;
    println!("{rounds} rounds in 5 s");
    assert!((1..=10).contains(&rounds), "{rounds}");
    allow(&site.file("state"), 0o700);
    let took = within(&tunnel, "the change", Duration::from_secs(5), |s| all_up(s, 2)).await;
    println!("changed {took:?} after the reason was gone");
    assert!(echoes(&mut session, b"all the while").await);
    closed(frps.tcp(1)).await;
    assert_eq!(site.pid(), pid);
    tunnel.stop().await.unwrap();
}

/// As somebody who has the password; the status of the answer.
async fn behind_its_back(site: &Site, method: &str, path: &str, body: &str) -> String {
    let config: toml::Table = toml::from_str(&fs::read_to_string(&site.setup.config).unwrap()).unwrap();
    let server = config["webServer"].as_table().unwrap();
    let word = |name: &str| server[name].as_str().unwrap();
    let login = STANDARD.encode(format!("{}:{}", word("user"), word("password")));
    let port = u16::try_from(server["port"].as_integer().unwrap()).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Basic {login}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().to_owned()
}

/// What is told to frpc while it logs in can be lost. That moment is too short for a test; this looks the same.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn routes_that_frpc_lost_and_routes_that_it_kept_are_mended() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    let echo = echo().await;
    let (stay, lost) = (tcp("stay.22", frps.tcp(0), echo), tcp("lost.22", frps.tcp(1), echo));
    let tunnel = site.start(vec![stay, lost]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    let (pid, mut session) = (site.pid(), connect(frps.tcp(0)).await);
    assert_eq!(behind_its_back(&site, "DELETE", "/api/store/proxies/lost.22", "").await, "200");
    closed(frps.tcp(1)).await;
    until(&tunnel, "the loss", |s| state_of(s, "lost.22") == Some(&RouteState::Adding)).await;
    let took = until(&tunnel, "both routes", |s| all_up(s, 2)).await;
    println!("back {took:?} after the loss was noticed");
    assert!(echoes(&mut connect(frps.tcp(1)).await, b"back").await);

    let kept = format!(
        r#"{{"name":"kept.22","type":"tcp","tcp":{{"localIP":"127.0.0.1","localPort":{echo},"remotePort":{}}}}}"#,
        frps.tcp(2)
    );
    assert_eq!(behind_its_back(&site, "POST", "/api/store/proxies", &kept).await, "200");
    let status = tunnel.status();
    until(&tunnel, "the route that is too many", |s| s.routes.len() == 3).await;
    let told = status.borrow().routes.values().find(|told| told.state == RouteState::Removing).cloned();
    assert_eq!(told.unwrap().route, tcp("kept.22", frps.tcp(2), echo));
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    closed(frps.tcp(2)).await;
    assert_eq!(site.pid(), pid);
    assert!(echoes(&mut session, b"all the while").await);
    tunnel.stop().await.unwrap();
}
