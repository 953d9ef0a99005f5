//! An agent behind the real frp, as the world outside sees it. Each of these needs frps and frpc; `cargo xtask test` runs
//! them where there are some.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use qudata_testkit::{
    agent::{Image, Setup, TestAgent},
    control_plane::{ControlPlane, Terms},
    frp::{self, Frp, Frps, Options},
    http::VirtualHost,
    platform::Platform,
    ssh::{KeyPair, Login},
};
use qudata_tests::{AT_ONCE, BOOT, SOON, guest};
use serde_json::json;

use crate::tunnel::{order, route, wait_for_routes, wait_until, wish};

/// Says back the body of every POST, and to a GET says something every ten milliseconds for ever.
const ECHO: &str = "cat > /root/echo.py <<'END'
import http.server, time
class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b'tick')
            time.sleep(0.01)
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('', 8000), Echo).serve_forever()
END
systemd-run --quiet python3 /root/echo.py";

fn real() -> (Frp, Frps) {
    let frp = frp::find().unwrap_or_else(|why| panic!("{why}"));
    let frps = Frps::start(&frp, Options::default());
    (frp, frps)
}

fn platform(frps: &Frps, control_plane: &ControlPlane) -> Platform {
    let platform = Platform::new(frps.vhost_http(), &control_plane.wait_for_registration(SOON));
    platform.wait_until_reachable(SOON).unwrap();
    platform
}

#[test]
#[ignore = "needs frps and frpc"]
fn slow_a_guest_is_reached_through_frps_and_its_sessions_outlive_the_agent() {
    let (frp, frps) = real();
    let control_plane = ControlPlane::start(Terms::default());
    let agent = Setup::new(Image::Direct).tunnel(&control_plane, &frp, &frps).start();
    let platform = platform(&frps, &control_plane);
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let mut wish = guest(&key.public);
    wish["tunnel_token"] = json!("renter-1");
    let vm = order(&platform, &wish);
    agent.wait_for_phase(&vm, "ready", BOOT);
    wait_for_routes(&agent, &vm, SOON);

    let (ssh, app) = (route(&agent, &vm, 22).1, route(&agent, &vm, 8000).1);
    let login = Login::at(agent.dir(), &key.file, frps.tcp(ssh), &agent.field(&vm, "ssh_host_key"));
    assert_eq!(login.run("id -un"), "root\n");
    login.run(ECHO);
    let app = frps.http(&format!("renter-1-{app}"));
    wait_until("the application answers", BOOT, || app.send("POST", "/", b"x").is_ok_and(|r| r.body == b"x"));
    let body: Vec<u8> =
        (0..3 * 1024 * 1024_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let reply = app.send("POST", "/", &body).unwrap();
    assert!(reply.status == 200 && reply.body == body, "{} bytes came back", reply.body.len());

    let mut session = login.session();
    let frpc = agent.frpc().unwrap();
    agent.kill9();
    session.talk("while there is no agent");
    agent.restart();
    platform.wait_until_reachable(SOON).unwrap();
    session.talk("with another agent");
    assert_eq!(agent.frpc().unwrap().identity(), frpc.identity(), "frpc is adopted, not started again");
    platform.pause(&vm.id).unwrap();
    platform.resume(&vm.id).unwrap();
    session.talk("after a pause");

    let start = Instant::now();
    platform.order("DELETE", &format!("/instances?id={}", vm.id), None).unwrap();
    session.wait_for_end(SOON);
    let took = start.elapsed();
    eprintln!("the session died {took:?} after DELETE");
    assert!(took < AT_ONCE, "{took:?}");
    platform.wait_until_gone(&vm.id, SOON).unwrap();
    assert_eq!(control_plane.complaints(), Vec::<String>::new());
    agent.assert_clean(&mut baseline);
}

/// F4 of the audit: every create and every delete restarted frpc, and with it every session of every tenant.
#[test]
#[ignore = "needs frps and frpc"]
fn slow_orig_f4_tenants_come_and_go_beside_open_sessions() {
    const ROUNDS: u32 = 20;
    let (frp, frps) = real();
    let control_plane = ControlPlane::start(Terms::default());
    let agent = Setup::new(Image::Direct).tunnel(&control_plane, &frp, &frps).start();
    let platform = platform(&frps, &control_plane);
    let key = KeyPair::make(agent.dir(), "renter");
    let mut order_with_key = guest(&key.public);
    order_with_key["tunnel_token"] = json!("renter-1");
    let vm = order(&platform, &order_with_key);
    agent.wait_for_phase(&vm, "ready", BOOT);
    wait_for_routes(&agent, &vm, SOON);
    let (ssh, app) = (route(&agent, &vm, 22).1, route(&agent, &vm, 8000).1);
    let login = Login::at(agent.dir(), &key.file, frps.tcp(ssh), &agent.field(&vm, "ssh_host_key"));
    login.run(ECHO);
    let app = frps.http(&format!("renter-1-{app}"));
    wait_until("the application answers", BOOT, || app.send("POST", "/", b"x").is_ok_and(|r| r.body == b"x"));

    let (mut session, stream, frpc) = (login.session(), Stream::open(&app), agent.frpc().unwrap());
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        slowest = slowest.max(session.talk("quiet"));
    }
    eprintln!("undisturbed: slowest echo {slowest:?}, longest gap of the stream {:?}", stream.longest_gap());
    let mut slowest = Duration::ZERO;
    for n in 0..ROUNDS {
        let mut other = wish(&format!("other-{n}"));
        other["storage_gb"] = json!("3");
        let other = order(&platform, &other);
        wait_until("the other is published", SOON, || {
            slowest = slowest.max(session.talk("beside an add"));
            route(&agent, &other, 22).0 == "up"
        });
        platform.order("DELETE", &format!("/instances?id={}", other.id), None).unwrap();
        wait_until("the other is gone", SOON, || {
            slowest = slowest.max(session.talk("beside a removal"));
            agent.get(&other).status == 404
        });
    }
    let gap = stream.longest_gap();
    eprintln!(
        "{ROUNDS} others added and removed: slowest echo {slowest:?}, longest gap of the stream {gap:?}"
    );
    assert!(
        slowest < AT_ONCE && gap < AT_ONCE,
        "somebody else's coming and going is felt: {slowest:?}, {gap:?}"
    );
    assert_eq!(agent.frpc().unwrap().identity(), frpc.identity(), "frpc was started again");
    platform.delete(&vm.id, SOON).unwrap();
}

/// An HTTP answer that never ends, read in a thread of its own.
struct Stream {
    /// The longest time between two pieces since the last look; none after its end.
    longest: Arc<Mutex<Option<Duration>>>,
}

impl Stream {
    fn open(app: &VirtualHost) -> Self {
        let mut stream = app.server.connect().unwrap();
        let head = format!("GET / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", app.name);
        stream.write_all(head.as_bytes()).unwrap();
        let longest = Arc::new(Mutex::new(Some(Duration::ZERO)));
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
        let told = Arc::clone(&longest);
        thread::spawn(move || {
            let mut last = Instant::now();
            while stream.read(&mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {
                let gap = last.elapsed();
                last = Instant::now();
                if let Some(longest) = told.lock().unwrap().as_mut() {
                    *longest = gap.max(*longest);
                }
            }
            *told.lock().unwrap() = None;
        });
        Self { longest }
    }

    /// And begins anew. Panics when the stream has ended.
    #[track_caller]
    fn longest_gap(&self) -> Duration {
        let mut longest = self.longest.lock().unwrap();
        let gap = longest.unwrap_or_else(|| panic!("the stream has ended"));
        *longest = Some(Duration::ZERO);
        gap
    }
}

/// F3 and F11 of the audit: two hosts on one server could not both have an SSH VM.
#[test]
#[ignore = "needs frps and frpc"]
fn orig_f3_two_agents_share_one_server() {
    let (frp, frps) = real();
    let planes = ["host-a", "host-b"]
        .map(|token| ControlPlane::start(Terms { tunnel_token: token.to_owned(), ..Terms::default() }));
    // The same few ports for both: they must meet.
    let agents: Vec<TestAgent> = planes
        .iter()
        .map(|plane| {
            let setup = Setup::new(Image::Blank).tunnel(plane, &frp, &frps);
            setup.set("QUDATA_SSH_PORTS", "14900-14903").start()
        })
        .collect();
    let mut public = Vec::new();
    for (n, (agent, plane)) in agents.iter().zip(&planes).enumerate() {
        let platform = platform(&frps, plane);
        for m in 0..2 {
            let vm = order(&platform, &wish(&format!("renter-{n}-{m}")));
            wait_for_routes(agent, &vm, Duration::from_secs(120));
            public.push(route(agent, &vm, 22).1);
        }
    }
    public.sort_unstable();
    assert_eq!(public, [14_900, 14_901, 14_902, 14_903]);
}

#[test]
#[ignore = "needs frps and frpc"]
fn slow_a_server_that_goes_away_refuses_and_comes_back_touches_no_tenant() {
    let (frp, frps) = real();
    let control_plane = ControlPlane::start(Terms::default());
    let agent = Setup::new(Image::Blank).tunnel(&control_plane, &frp, &frps).start();
    let platform = platform(&frps, &control_plane);
    let vm = order(&platform, &wish("renter-1"));
    wait_for_routes(&agent, &vm, SOON);
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    let token = frps.token();
    let outages: [(&str, &dyn Fn()); 3] = [
        ("away for half a minute", &|| {
            frps.stop();
            thread::sleep(Duration::from_secs(30));
        }),
        ("another token", &|| {
            frps.set_token("another");
            frps.restart();
            thread::sleep(Duration::from_secs(15));
            frps.set_token(&token);
        }),
        ("restarts every five seconds", &|| {
            for _ in 0..3 {
                frps.restart();
                thread::sleep(Duration::from_secs(5));
            }
        }),
    ];
    for (what, outage) in outages {
        outage();
        assert_eq!(agent.call("GET", "/ping", None).status, 200);
        frps.restart();
        let took = wait_until(what, SOON, || reachable(frps.tcp(route(&agent, &vm, 22).1)));
        eprintln!("{what}: published again {took:?} after the server was back");
        wait_for_routes(&agent, &vm, SOON);
        assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    }
    platform.wait_until_reachable(SOON).unwrap();
    platform.delete(&vm.id, SOON).unwrap();
}

fn reachable(address: SocketAddr) -> bool {
    std::net::TcpStream::connect(address).is_ok()
}
