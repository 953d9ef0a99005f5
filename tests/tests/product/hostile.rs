//! A guest that means harm: it reaches for the host and floods its console.

use std::{
    fs::File,
    net::{TcpListener, UdpSocket},
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use qudata_testkit::{
    agent::{TestAgent, TestInstance},
    ssh::{KeyPair, Login},
    tool,
};
use qudata_tests::{AT_ONCE, BOOT, SOON, guest, guest_agent};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

/// §1.7: user networking without restriction let the guest reach the host's loopback; the serial log was unbounded.
#[test]
fn slow_orig_17_a_hostile_guest_reaches_nothing_and_fills_nothing() {
    let agent = guest_agent();
    let mut baseline = agent.baseline();
    let key = KeyPair::make(agent.dir(), "renter");
    let vm = agent.create(&guest(&key.public));
    agent.wait_for_phase(&vm, "ready", BOOT);
    let login = agent.login(&vm, &key.file);
    reach_for_the_host(&agent, &login);
    flood_the_console(&agent, &vm, &login);
    hang_every_login(&agent, &vm, &login, &key);
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

fn reach_for_the_host(agent: &TestAgent, login: &Login) {
    let outside = Outside::open();
    let server = TcpListener::bind("0.0.0.0:0").unwrap();
    let api = agent.client().address.port();
    let ports = [server.local_addr().unwrap().port(), api];
    let mut targets = vec![("169.254.169.254".to_owned(), 80), ("10.0.2.2".to_owned(), 22)];
    for address in [own_address(), "127.0.0.1".into(), "10.0.2.2".into(), "10.0.2.3".into(), "0.0.0.0".into()]
    {
        targets.extend(ports.map(|port| (address.clone(), port)));
    }
    targets.retain(|(address, port)| reaches(login, address, *port));
    assert!(targets.is_empty(), "the guest reached {targets:?}");
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err(), "a connection from the guest waits at the host's server");
    // The guest's network works: a public address is within reach. Otherwise the refusals above would prove nothing.
    let public = reaches(login, Outside::ADDRESS, outside.port());
    assert!(public, "the guest reaches nothing at all: {}", login.run("ip route; ip address"));
    // A network that this host is attached to is its owner's, also when it came after the agent.
    let until = Instant::now() + SOON * 2;
    while reaches(login, Outside::NEIGHBOUR, outside.port()) {
        assert!(Instant::now() < until, "the guest reaches a neighbour of the host");
    }
    assert!(reaches(login, Outside::ADDRESS, outside.port()));
}

fn reaches(login: &Login, address: &str, port: u16) -> bool {
    let connect = format!(
        "import socket; socket.create_connection(('{address}', {port}), 3).close(); print('reached')"
    );
    login.try_run(&format!("python3 -c \"{connect}\"")).unwrap().stdout.contains("reached")
}

/// The address this machine would use towards the internet.
fn own_address() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: connecting a datagram socket only chooses the route.
    socket.connect("203.0.113.1:9").unwrap();
    socket.local_addr().unwrap().ip().to_string()
}

/// C6: a guest whose sshd hangs locked the whole agent up. Now it costs one call an error in time, and nobody else.
fn hang_every_login(agent: &TestAgent, vm: &TestInstance, login: &Login, key: &KeyPair) {
    // A moment later, so that this login itself still ends.
    login.run_later("kill -STOP $(pidof sshd)");
    thread::sleep(Duration::from_secs(4));
    thread::scope(|scope| {
        let asked = Instant::now();
        let add = scope.spawn(|| agent.call("POST", "/ssh", Some(&json!({ "ssh_pubkey": key.public }))));
        for _ in 0..5 {
            let start = Instant::now();
            assert_eq!(agent.get(vm).status, 200);
            assert!(start.elapsed() < AT_ONCE, "GET took {:?} while a guest's sshd hangs", start.elapsed());
            thread::sleep(AT_ONCE / 10);
        }
        let reply = add.join().unwrap();
        assert!(asked.elapsed() < SOON * 2, "the call took {:?}", asked.elapsed());
        assert_eq!((reply.status, reply.code().as_str()), (502, "guest_fault"), "{}", reply.text());
    });
}

/// A stand-in for the internet: a listener with a public address in a network namespace of its own, behind a router with one
/// that is a neighbour of the host.
struct Outside {
    name: String,
    listener: TcpListener,
}

impl Outside {
    const ADDRESS: &str = "198.51.100.1";
    const NEIGHBOUR: &str = "203.0.113.2";

    fn open() -> Self {
        let name = format!("qt{}", std::process::id());
        let (near, far) = (format!("{name}a"), format!("{name}b"));
        let script = format!(
            "ip netns add {name} && ip link add {near} type veth peer name {far} netns {name} \
             && ip address add 203.0.113.1/30 dev {near} && ip link set {near} up \
             && ip -n {name} address add {}/30 dev {far} && ip -n {name} address add {}/32 dev {far} \
             && ip -n {name} link set {far} up && ip route add {} via {}",
            Self::NEIGHBOUR,
            Self::ADDRESS,
            Self::ADDRESS,
            Self::NEIGHBOUR
        );
        let made = tool::run(Command::new("sh").args(["-c", &script]), Duration::from_secs(10)).unwrap();
        assert!(made.status.success(), "cannot make a network namespace: {}", made.stderr);
        let namespace = File::open(format!("/run/netns/{name}")).unwrap();
        // A socket stays in the namespace of the thread that made it.
        let listen = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            TcpListener::bind(("0.0.0.0", 0)).unwrap()
        };
        Self { name, listener: thread::spawn(listen).join().unwrap() }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// The serial log was unbounded: half a megabyte a second into the host's RAM.
fn flood_the_console(agent: &TestAgent, vm: &TestInstance, login: &Login) {
    // Two to four times the bound, at the speed of an emulated serial port.
    login.run("timeout 8 sh -c 'yes flood-flood-flood > /dev/ttyS0'; true");
    let console = agent.call("GET", &format!("{}/console", vm.path()), None);
    assert_eq!(console.status, 200);
    assert!(console.text().contains("flood-flood"), "the console shows what the guest wrote last");
    assert!(console.body.len() <= 1 << 20, "the console's answer has {} bytes", console.body.len());
    let used = tool::run(Command::new("du").args(["-sbc"]).args([agent.run_dir(), agent.log_dir()]), SOON)
        .unwrap()
        .stdout;
    let used: u64 = used.lines().last().unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!(used < 4 << 20, "run and log directories hold {used} bytes");
}
