//! Routes carry what is sent, come and go, and leave nothing behind.

use qudata_tunnel::{RouteState, TunnelState};

use crate::{
    frps::Frps,
    local::{call, connect, echo, echoes, noise, web},
    site::{Site, all_up, http, is_down, state_of, tcp, until},
};

const THREE_MIB: usize = 3 << 20;

async fn carry_whole(site: Site, frps: &Frps) {
    let (echo, one, two) = (echo().await, web("one").await, web("two").await);
    let routes = vec![
        tcp("vm.22", frps.tcp(0), echo),
        http("vm.80", "tok.example", one),
        http("vm.8080", "tok-8080.example", two),
    ];
    let tunnel = site.start(routes);
    let took = until(&tunnel, "three routes", |s| all_up(s, 3)).await;
    println!("up after {took:?} with frpc {}", tunnel.status().borrow().version.unwrap());
    let sent = noise(THREE_MIB);
    assert!(echoes(&mut connect(frps.tcp(0)).await, &sent).await, "3 MiB by TCP");
    let (status, body) = call(frps.vhost, "tok.example", Some(&sent)).await;
    assert!(status == 200 && body == sent, "3 MiB by HTTP");
    assert_eq!(call(frps.vhost, "tok.example", None).await, (200, b"one".to_vec()));
    assert_eq!(call(frps.vhost, "tok-8080.example", None).await, (200, b"two".to_vec()));
    let name = format!("127.0.0.1:{}", frps.tcp(0));
    assert_eq!(state_of(&tunnel.status().borrow(), "vm.22"), Some(&RouteState::Up { remote_addr: name }));
    // Gone, and moved to another place under the same name.
    tunnel.want(vec![tcp("vm.22", frps.tcp(1), echo), http("vm.80", "tok.example", two)]);
    until(&tunnel, "two routes", |s| all_up(s, 2)).await;
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", frps.tcp(0))).await.is_err());
    assert!(echoes(&mut connect(frps.tcp(1)).await, b"moved").await);
    assert_eq!(call(frps.vhost, "tok.example", None).await, (200, b"two".to_vec()));
    assert_eq!(call(frps.vhost, "tok-8080.example", None).await.0, 404);
    tunnel.want(Vec::new());
    until(&tunnel, "no route", |s| s.routes.is_empty() && s.state == TunnelState::Up).await;
    assert_eq!(call(frps.vhost, "tok.example", None).await.0, 404);
    let pid = site.pid();
    tunnel.stop().await.unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(is_down(&tunnel.status().borrow(), "tunnel_stopped"));
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn tcp_and_http_are_carried_whole_by_the_store() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token");
    carry_whole(site, &frps).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn tcp_and_http_are_carried_whole_by_the_file() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token").claiming("0.61.1");
    carry_whole(site, &frps).await;
}

/// What frpc's user may read and write, and what others see of it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f6_secrets_are_in_no_file_of_others_and_in_no_command_line() {
    use std::{fs, os::unix::fs::MetadataExt};
    let frps = Frps::start("s3cret-token");
    for site in
        [Site::new(&frps, "a", "s3cret-token"), Site::new(&frps, "b", "s3cret-token").claiming("0.61.1")]
    {
        let tunnel = site.start(Vec::new());
        until(&tunnel, "a session", |s| s.state == TunnelState::Up).await;
        let proc = format!("/proc/{}", site.pid());
        for name in ["cmdline", "environ"] {
            let text = fs::read_to_string(format!("{proc}/{name}")).unwrap();
            assert!(!text.contains("s3cret"), "{name}: {text}");
        }
        let environ = fs::read_to_string(format!("{proc}/environ")).unwrap();
        assert!(environ.split('\0').filter(|e| !e.is_empty()).count() <= 2, "{environ}");
        assert_eq!(fs::metadata(&proc).unwrap().uid(), site.setup.uid);
        for file in fs::read_dir(&site.setup.dir).unwrap() {
            let file = file.unwrap();
            let meta = file.metadata().unwrap();
            let others = meta.mode() & 0o077;
            assert_eq!(others, 0, "{} has mode {:o}", file.path().display(), meta.mode());
            let name = file.file_name().into_string().unwrap();
            let frpcs = ["frpc.toml", "frpc.token", "state"].contains(&name.as_str());
            let owner = if frpcs { site.setup.uid } else { fs::metadata("/proc/self").unwrap().uid() };
            assert_eq!(meta.uid(), owner, "{name}");
        }
        assert!(!site.log().contains("s3cret"));
        tunnel.stop().await.unwrap();
    }
}
