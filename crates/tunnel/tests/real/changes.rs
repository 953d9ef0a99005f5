//! Twenty routes come and go while others stream. The original rewrote the configuration and restarted frpc; what that
//! costs is measured beside.

use std::{fs, process::Command, time::Duration};

use crate::{
    frps::{Frps, free_port, program},
    local::{ticker, web},
    site::{Site, all_up, http, tcp, until},
    streams::{Seen, Stream},
};

const CHANGES: u16 = 20;
const TICKS: &str = "GET /ticks HTTP/1.1\r\nhost: tok.example\r\n\r\n";

fn report(what: &str, tcp: Seen, http: Seen) {
    println!(
        "{what}: tcp {} drops, longest gap {:.1} ms; http {} drops, longest gap {:.1} ms",
        tcp.drops,
        tcp.longest_gap.as_secs_f64() * 1e3,
        http.drops,
        http.longest_gap.as_secs_f64() * 1e3
    );
}

async fn change_beside_streams(frps: &Frps, site: &Site, what: &str) {
    let stay =
        vec![tcp("stay.22", frps.tcp(0), ticker().await), http("stay.80", "tok.example", web("x").await)];
    let tunnel = site.start(stay.clone());
    until(&tunnel, "the routes that stay", |s| all_up(s, 2)).await;
    let open = async || (Stream::open(frps.tcp(0), "").await, Stream::open(frps.vhost, TICKS).await);
    let (tcp_stream, http_stream) = open().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    report("for comparison, while nothing changes", tcp_stream.close().await, http_stream.close().await);
    let (tcp_stream, http_stream) = open().await;
    let mut slowest = Duration::ZERO;
    for nth in 1..=CHANGES {
        let mut routes = stay.clone();
        routes.push(tcp(&format!("other-{nth}.22"), frps.tcp(nth), free_port()));
        routes.push(http(&format!("other-{nth}.80"), &format!("other-{nth}.example"), free_port()));
        tunnel.want(routes);
        slowest = slowest.max(until(&tunnel, "two more", |s| all_up(s, 4)).await);
        tunnel.want(stay.clone());
        slowest = slowest.max(until(&tunnel, "two less", |s| all_up(s, 2)).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (tcp, http) = (tcp_stream.close().await, http_stream.close().await);
    report(&format!("{CHANGES} times added and removed by {what}"), tcp, http);
    println!("slowest change of two routes, until frps had answered: {slowest:?}");
    for seen in [tcp, http] {
        // The longest gap is a figure and no verdict: a machine that does other things has them by itself.
        assert!(seen.drops == 0 && seen.bytes > 100, "{seen:?}");
    }
    tunnel.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn changes_by_the_store_do_not_touch_other_routes() {
    let frps = Frps::start("token");
    change_beside_streams(&frps, &Site::new(&frps, "agent", "token"), "the store").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn changes_by_the_file_do_not_touch_other_routes() {
    let frps = Frps::start("token");
    let site = Site::new(&frps, "agent", "token").claiming("0.67.0");
    change_beside_streams(&frps, &site, "file and reload").await;
}

/// SIGTERM, wait, start, half a second's sleep, as the original does for every create and every delete.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs frps and frpc"]
async fn orig_f4_a_restart_for_every_change_drops_every_session() {
    let frps = Frps::start("token");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("frpc.toml");
    let (ticker, web) = (ticker().await, web("x").await);
    let write = |nth: Option<u16>| {
        let mut text = format!(
            "serverAddr = \"127.0.0.1\"\nserverPort = {}\nauth.token = \"token\"\n\
             [[proxies]]\nname = \"tcp\"\ntype = \"tcp\"\nlocalPort = {ticker}\nremotePort = {}\n\
             [[proxies]]\nname = \"http\"\ntype = \"http\"\nlocalPort = {web}\ncustomDomains = [\"tok.example\"]\n",
            frps.port,
            frps.tcp(0)
        );
        if let Some(nth) = nth {
            text += &format!(
                "[[proxies]]\nname = \"other\"\ntype = \"tcp\"\nlocalPort = 9\nremotePort = {}\n",
                frps.tcp(nth)
            );
        }
        fs::write(&path, text).unwrap();
        Command::new(program("frpc", "FRPC_BIN"))
            .arg("-c")
            .arg(&path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut frpc = write(None);
    let tcp_stream = Stream::open(frps.tcp(0), "").await;
    let http_stream = Stream::open(frps.vhost, TICKS).await;
    for change in 0..2 * CHANGES {
        Command::new("kill").arg(frpc.id().to_string()).status().unwrap();
        frpc.wait().unwrap();
        frpc = write((change % 2 == 0).then_some(1 + change / 2));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (tcp, http) = (tcp_stream.close().await, http_stream.close().await);
    frpc.kill().unwrap();
    frpc.wait().unwrap();
    report(&format!("{CHANGES} times added and removed by restarts"), tcp, http);
    assert!(tcp.drops >= usize::from(CHANGES) && http.drops >= usize::from(CHANGES));
}
