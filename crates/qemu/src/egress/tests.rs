//! The policy against the real nft, in two network namespaces joined by one wire: `host` runs the policy, `outside`
//! plays the internet and the LAN at once. Needs root, or sudo without a password.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;

const GUEST: u32 = 61_601;
const OTHER: u32 = 61_602;
const MANAGEMENT: u16 = 15_400;

#[test]
fn table_names() {
    for name in ["qudata", "q", "qudata_test_12"] {
        assert!(name.parse::<TableName>().is_ok(), "{name}");
    }
    for name in ["", "Q", "1q", "q-a", "q a", "q;", "_q", "ñ", &"q".repeat(33)] {
        assert!(name.parse::<TableName>().is_err(), "{name}");
    }
}

fn root(program: &str) -> Command {
    if rustix::process::getuid().is_root() {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", program]);
    sudo
}

fn ip(words: &str) {
    let out = root("ip").args(words.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {words}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Two namespaces and the policy of the first.
struct Bench {
    host: String,
    outside: String,
    dir: tempfile::TempDir,
    servers: Vec<Child>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // Closing its input ends a server, whoever it runs as.
            drop(server.stdin.take());
            let _ = server.wait();
        }
        for namespace in [&self.host, &self.outside] {
            let _ = root("ip").args(["netns", "del", namespace]).status();
        }
    }
}

impl Bench {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let (host, outside) = (format!("qd-host-{tag}"), format!("qd-out-{tag}"));
        ip(&format!("netns add {host}"));
        ip(&format!("netns add {outside}"));
        let bench = Self { host, outside, dir: tempfile::tempdir().unwrap(), servers: Vec::new() };
        let (host, outside) = (&bench.host, &bench.outside);
        ip(&format!("-n {host} link add wire type veth peer name wire netns {outside}"));
        for (namespace, last) in [(host, 2), (outside, 1)] {
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} link set wire up"));
            ip(&format!("-n {namespace} address add 203.0.113.{last}/24 dev wire"));
            ip(&format!("-n {namespace} address add 192.168.77.{last}/24 dev wire"));
            ip(&format!("-n {namespace} address add 10.9.0.{last}/24 dev wire"));
            ip(&format!("-n {namespace} address add fd77::{last}/64 dev wire nodad"));
        }
        bench
    }

    /// The policy in `table`, its nft running inside the namespace.
    fn egress(&self, table: &str) -> Egress {
        let nft = self.dir.path().join("nft");
        let sudo = if rustix::process::getuid().is_root() { "" } else { "sudo -n " };
        let script = format!("#!/bin/sh\nexec {sudo}ip netns exec {} nft \"$@\"\n", self.host);
        fs::write(&nft, script).unwrap();
        fs::set_permissions(&nft, fs::Permissions::from_mode(0o755)).unwrap();
        let mut egress = Egress::new(table.parse().unwrap(), vec!["10.9.0.0/24".parse().unwrap()]);
        egress.nft = nft;
        egress
    }

    fn perl(namespace: &str, uid: u32, script: &str, args: &[&str]) -> Command {
        let mut command = root("ip");
        command.args(["netns", "exec", namespace, "setpriv", "--clear-groups"]);
        command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}"));
        command.args(["perl", "-MIO::Socket::IP", "-e", script]).args(args);
        command
    }

    /// A TCP server that greets and closes, and ends with this bench.
    fn serve(&mut self, namespace: &str, uid: u32, address: &str, port: u16) {
        let script = r#"
            my $s = IO::Socket::IP->new(LocalHost => $ARGV[0], LocalPort => $ARGV[1], Listen => 9, ReuseAddr => 1)
                or die "listen: $@";
            $| = 1; print "up\n";
            if (!fork) { while (my $c = $s->accept) { print $c "hello\n"; close $c } exit }
            <STDIN>; kill "TERM", -getpgrp; "#;
        let script = format!("setpgrp; {script}");
        self.start(Self::perl(namespace, uid, &script, &[address, &port.to_string()]));
    }

    fn start(&mut self, mut server: Command) {
        let mut server = server.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(server.stdout.as_mut().unwrap(), &mut up).unwrap();
        self.servers.push(server);
    }

    /// What a connection from `uid` in `namespace` gets: the greeting, or the reason of failure.
    fn tcp(&self, namespace: &str, uid: u32, address: &str, port: u16) -> String {
        let script = r#"
            my $c = IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => $ARGV[1], Timeout => 4)
                or do { print $!; exit };
            my $l = <$c>; print defined $l ? $l : "closed"; "#;
        Self::ask(namespace, uid, script, address, port)
    }

    /// Whether the kernel lets a datagram of `uid` out.
    fn udp(&self, uid: u32, address: &str, port: u16) -> String {
        let script = r#"
            my $c = IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => $ARGV[1], Proto => "udp")
                or do { print $!; exit };
            print defined($c->send("x")) ? "sent" : $!; "#;
        Self::ask(&self.host, uid, script, address, port)
    }

    fn ask(namespace: &str, uid: u32, script: &str, address: &str, port: u16) -> String {
        let out = Self::perl(namespace, uid, script, &[address, &port.to_string()]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }
}

const REFUSED: &str = "Connection refused";
const FORBIDDEN: &str = "Operation not permitted";

fn asking(resolvers: &[Ipv4Addr]) -> Surroundings {
    Surroundings { resolvers: resolvers.to_vec(), ..Surroundings::default() }
}

fn machine() -> Admission {
    Admission { uid: GUEST, ports: vec![10_001], management: MANAGEMENT }
}

#[tokio::test]
async fn a_guest_reaches_the_internet_and_nothing_of_the_owners() {
    let mut bench = Bench::new();
    let (host, outside) = (bench.host.clone(), bench.outside.clone());
    bench.serve(&outside, 0, "::", 80);
    bench.serve(&outside, 0, "::", 53);
    bench.serve(&outside, 0, "::", 25);
    bench.serve(&host, 0, "::", 80);
    let targets = [
        "127.0.0.1",
        "127.9.9.9",
        "192.168.77.1",
        "192.168.77.2",
        "203.0.113.2",
        "::1",
        "fd77::1",
        "fd77::2",
    ];
    for target in targets {
        assert_eq!(bench.tcp(&host, GUEST, target, 80), "hello", "without a policy {target} is reachable");
    }
    let egress = bench.egress("qudata_a");
    egress.install(&asking(&[Ipv4Addr::new(192, 168, 77, 1)])).await.unwrap();
    egress.admit(&machine()).await.unwrap();
    for target in targets {
        let begun = Instant::now();
        assert_eq!(bench.tcp(&host, GUEST, target, 80), REFUSED, "{target}");
        assert!(begun.elapsed() < Duration::from_secs(2), "refused, not left waiting: {target}");
        assert_eq!(bench.tcp(&host, OTHER, target, 80), "hello", "others are not confined: {target}");
        assert_eq!(bench.udp(GUEST, target, 9), FORBIDDEN, "{target}");
    }
    // A route for everything, so that the policy decides and not the lack of a way.
    ip(&format!("-n {host} route add default via 203.0.113.1"));
    for target in ["100.64.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1"] {
        assert_eq!(bench.udp(GUEST, target, 9), FORBIDDEN, "{target}");
        assert_eq!(bench.udp(OTHER, target, 9), "sent", "{target}");
    }
    assert_eq!(bench.tcp(&host, GUEST, "203.0.113.1", 80), "hello", "the internet");
    assert_eq!(bench.udp(GUEST, "203.0.113.1", 9), "sent", "the internet");
    assert_eq!(bench.tcp(&host, GUEST, "10.9.0.1", 80), "hello", "the allow-list");
    assert_eq!(bench.tcp(&host, GUEST, "192.168.77.1", 53), "hello", "the resolver, port 53 only");
    assert_eq!(bench.udp(GUEST, "192.168.77.1", 53), "sent", "the resolver, port 53 only");
    assert_eq!(bench.tcp(&host, GUEST, "10.0.2.3", 53), "hello", "the guest's resolver is the host's");
    assert_ne!(bench.tcp(&host, OTHER, "10.0.2.3", 53), "hello", "for guests only");
    assert_eq!(bench.udp(GUEST, "10.0.2.3", 54), FORBIDDEN, "nothing but questions");
    assert_eq!(bench.udp(GUEST, "192.168.77.3", 53), FORBIDDEN, "another machine's port 53");
    assert_eq!(bench.tcp(&host, GUEST, "203.0.113.1", 25), REFUSED, "spam");
    assert_eq!(bench.tcp(&host, OTHER, "203.0.113.1", 25), "hello", "mail of the host");
}

/// Universities and providers have public addresses on their own networks.
#[tokio::test]
async fn a_network_that_the_host_is_attached_to_is_the_owners_whatever_its_addresses() {
    let mut bench = Bench::new();
    let (host, outside) = (bench.host.clone(), bench.outside.clone());
    bench.serve(&outside, 0, "::", 80);
    bench.serve(&outside, 0, "::", 53);
    ip(&format!("-n {outside} address add 198.51.100.1/32 dev lo"));
    ip(&format!("-n {host} route add 198.51.100.0/24 via 203.0.113.1"));
    let told = root("ip").args(["netns", "exec", &host, "cat", "/proc/self/net/route"]).output().unwrap();
    let tree = bench.dir.path().join("root");
    fs::create_dir_all(tree.join("proc/self/net")).unwrap();
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("proc/self/net/route"), told.stdout).unwrap();
    fs::write(tree.join("etc/resolv.conf"), "nameserver 203.0.113.1\n").unwrap();
    let egress = bench.egress("qudata_h");
    egress.install(&Surroundings::look(&tree).unwrap()).await.unwrap();
    egress.admit(&machine()).await.unwrap();
    assert_eq!(bench.tcp(&host, GUEST, "203.0.113.1", 80), REFUSED, "a neighbour");
    assert_eq!(bench.tcp(&host, OTHER, "203.0.113.1", 80), "hello", "others are not confined");
    assert_eq!(bench.tcp(&host, GUEST, "203.0.113.1", 53), "hello", "the resolver is a neighbour");
    assert_eq!(bench.tcp(&host, GUEST, "198.51.100.1", 80), "hello", "the internet behind a router");
    assert_eq!(bench.tcp(&host, GUEST, "10.9.0.1", 80), "hello", "a neighbour on the allow-list");
}

#[tokio::test]
async fn answers_pass_and_ports_open_and_close() {
    let mut bench = Bench::new();
    let (host, outside) = (bench.host.clone(), bench.outside.clone());
    bench.serve(&host, GUEST, "0.0.0.0", 10_001);
    bench.serve(&host, GUEST, "127.0.0.1", MANAGEMENT);
    let egress = bench.egress("qudata_b");
    egress.install(&Surroundings::default()).await.unwrap();
    egress.admit(&machine()).await.unwrap();
    let from_everywhere = |expected: &str| {
        assert_eq!(bench.tcp(&outside, OTHER, "203.0.113.2", 10_001), expected, "from the internet");
        assert_eq!(bench.tcp(&outside, OTHER, "192.168.77.2", 10_001), expected, "from the LAN");
        assert_eq!(bench.tcp(&host, OTHER, "127.0.0.1", 10_001), expected, "from frpc on the host");
    };
    from_everywhere(REFUSED);
    egress.open(&[10_001]).await.unwrap();
    from_everywhere("hello");
    egress.gate(&[10_001]).await.unwrap();
    from_everywhere(REFUSED);
    assert_eq!(bench.tcp(&host, 0, "127.0.0.1", MANAGEMENT), "hello", "the agent");
    assert_eq!(bench.tcp(&host, OTHER, "127.0.0.1", MANAGEMENT), REFUSED, "another user of the host");
    assert_eq!(bench.tcp(&host, GUEST, "127.0.0.1", MANAGEMENT), REFUSED, "a guest");
}

#[tokio::test]
async fn every_change_may_be_repeated_and_foreign_changes_are_noticed() {
    let bench = Bench::new();
    let (egress, other) = (bench.egress("qudata_c"), bench.egress("qudata_d"));
    let (first, second) = (machine(), Admission { uid: 100, ports: vec![22, 8080], management: 15_401 });
    assert_eq!(egress.observe().await.unwrap(), EgressState::default());
    egress.withdraw(&first).await.unwrap();
    egress.remove_table().await.unwrap();
    other.install(&Surroundings::default()).await.unwrap();
    for _ in 0..2 {
        egress.install(&asking(&[Ipv4Addr::new(192, 0, 2, 53), Ipv4Addr::new(192, 0, 2, 54)])).await.unwrap();
        egress.admit(&first).await.unwrap();
        egress.admit(&second).await.unwrap();
        egress.open(&[8080, 9]).await.unwrap();
    }
    let state = egress.observe().await.unwrap();
    assert!(state.confines(&first) && state.confines(&second), "{state:?}");
    assert_eq!(state.guests, [100, GUEST].into(), "uids that have a name come back as numbers");
    assert_eq!(state.gated, [22, 10_001].into());
    assert_eq!(state.gated_among(&[22, 8080]), [22].into());
    for _ in 0..2 {
        egress.withdraw(&first).await.unwrap();
    }
    let state = egress.observe().await.unwrap();
    assert!(!state.confines(&first) && state.confines(&second), "{state:?}");

    let nft =
        |words: &str| assert!(Command::new(&egress.nft).args(words.split(' ')).status().unwrap().success());
    nft("flush chain inet qudata_c output");
    let state = egress.observe().await.unwrap();
    assert!(state.installed && !state.intact && !state.confines(&second), "{state:?}");
    egress.install(&Surroundings::default()).await.unwrap();
    assert!(egress.observe().await.unwrap().confines(&second), "a new install keeps the machines");
    nft("flush ruleset");
    assert_eq!(egress.observe().await.unwrap(), EgressState::default());
    egress.withdraw(&second).await.unwrap();

    other.install(&Surroundings::default()).await.unwrap();
    egress.install(&Surroundings::default()).await.unwrap();
    for _ in 0..2 {
        egress.remove_table().await.unwrap();
    }
    assert!(other.observe().await.unwrap().intact, "another agent's table stays");
}

/// A connection that `uid` holds open, of a guest to the outside or the other way round.
struct Line {
    client: Child,
}

impl Line {
    /// Says a word and returns what comes back.
    fn says(&mut self, word: &str) -> String {
        let input = self.client.stdin.as_mut().unwrap();
        std::io::Write::write_all(input, format!("{word}\n").as_bytes()).unwrap();
        let mut heard = Vec::new();
        let output = self.client.stdout.as_mut().unwrap();
        let bytes = std::io::Read::bytes(output).map(Result::unwrap);
        heard.extend(bytes.take_while(|byte| *byte != b'\n'));
        String::from_utf8(heard).unwrap()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        drop(self.client.stdin.take());
        let _ = self.client.wait();
    }
}

impl Bench {
    /// A TCP server that gives each line back.
    fn echo(&mut self, namespace: &str, uid: u32, address: &str, port: u16) {
        let script = r#"
            setpgrp; $SIG{CHLD} = "IGNORE";
            my $s = IO::Socket::IP->new(LocalHost => $ARGV[0], LocalPort => $ARGV[1], Listen => 9, ReuseAddr => 1)
                or die "listen: $@";
            $| = 1; print "up\n";
            if (!fork) { while (my $c = $s->accept) { next if fork; $c->autoflush(1); print $c $_ while <$c>; exit } exit }
            <STDIN>; kill "TERM", -getpgrp; "#;
        self.start(Self::perl(namespace, uid, script, &[address, &port.to_string()]));
    }

    fn line(&self, namespace: &str, uid: u32, address: &str, port: u16) -> Line {
        let script = r#"
            $| = 1; $SIG{PIPE} = "IGNORE";
            my $c = IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => $ARGV[1], Timeout => 4) or die "connect: $@";
            $c->autoflush(1);
            while (my $w = <STDIN>) {
                my $l = print($c $w) ? <$c> : undef;
                print defined $l ? $l : "$!\n";
            } "#;
        let mut client = Self::perl(namespace, uid, script, &[address, &port.to_string()]);
        let client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Line { client }
    }

    /// A seat at the announcements inside the namespace.
    fn removals(&self) -> Removals {
        let namespace = fs::File::open(format!("/run/netns/{}", self.host)).unwrap();
        // A thread of its own: it stays in there.
        let opened = std::thread::spawn(move || {
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            removals::open().unwrap()
        });
        Removals::of(opened.join().unwrap()).unwrap()
    }
}

/// A firewall that is loaded anew flushes everything. What a guest connects to before the policy is back must not stay open,
/// and what others have opened to it must.
#[tokio::test]
async fn what_a_guest_reached_without_a_policy_ends_with_it() {
    let mut bench = Bench::new();
    let (host, outside) = (bench.host.clone(), bench.outside.clone());
    bench.echo(&outside, 0, "192.168.77.1", 80);
    bench.echo(&outside, 0, "203.0.113.1", 80);
    bench.echo(&host, 0, "127.0.0.1", 80);
    bench.echo(&host, GUEST, "0.0.0.0", 10_001);
    let egress = bench.egress("qudata_f");
    let policy = async || {
        egress.install(&Surroundings::default()).await.unwrap();
        egress.admit(&machine()).await.unwrap();
        egress.open(&[10_001]).await.unwrap();
    };
    // What a host's firewall does when it is loaded, and what keeps the kernel tracking connections meanwhile.
    let reload = || {
        let rules = "flush ruleset\nadd table inet owner\nadd chain inet owner in { type filter hook input priority 0; }\n\
                     add rule inet owner in ct state invalid drop\n";
        let mut nft = Command::new(&egress.nft).args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut nft.stdin.take().unwrap(), rules.as_bytes()).unwrap();
        assert!(nft.wait().unwrap().success());
    };
    reload();
    policy().await;
    let mut kept = vec![
        bench.line(&host, GUEST, "203.0.113.1", 80),
        bench.line(&outside, OTHER, "192.168.77.2", 10_001),
        bench.line(&host, OTHER, "127.0.0.1", 10_001),
    ];
    let words =
        |lines: &mut [Line]| -> Vec<String> { lines.iter_mut().map(|line| line.says("word")).collect() };
    assert_eq!(words(&mut kept), ["word"; 3]);
    reload();
    let mut sneaked =
        vec![bench.line(&host, GUEST, "192.168.77.1", 80), bench.line(&host, GUEST, "127.0.0.1", 80)];
    assert_eq!(words(&mut sneaked), ["word"; 2], "nothing confines it");
    assert_eq!(words(&mut kept), ["word"; 3]);
    policy().await;
    for word in words(&mut sneaked) {
        assert_ne!(word, "word", "the LAN and the host stay reachable");
    }
    assert_eq!(words(&mut kept), ["word"; 3], "the tenant's own connections were cut");
}

#[tokio::test]
async fn removals_are_heard_and_machines_that_come_and_go_are_not() {
    let bench = Bench::new();
    let egress = bench.egress("qudata_g");
    egress.install(&Surroundings::default()).await.unwrap();
    let removals = bench.removals();
    egress.admit(&machine()).await.unwrap();
    egress.open(&[10_001]).await.unwrap();
    egress.gate(&[10_001]).await.unwrap();
    egress.withdraw(&machine()).await.unwrap();
    let moment = Duration::from_millis(300);
    assert!(tokio::time::timeout(moment, removals.next()).await.is_err(), "no rule was removed");
    for words in [&["flush", "chain", "inet", "qudata_g", "output"][..], &["flush", "ruleset"]] {
        assert!(Command::new(&egress.nft).args(words).status().unwrap().success());
        tokio::time::timeout(Duration::from_secs(20), removals.next()).await.expect("not heard").unwrap();
        while tokio::time::timeout(moment, removals.next()).await.is_ok() {}
    }
}

#[tokio::test]
async fn root_is_refused_and_a_missing_nft_is_named() {
    let mut egress = Egress::new("qudata_e".parse().unwrap(), Vec::new());
    egress.nft = Path::new("/nonexistent/nft").into();
    let as_root = Admission { uid: 0, ..machine() };
    assert!(matches!(egress.admit(&as_root).await, Err(EgressError::Root)));
    let failed = egress.withdraw(&machine()).await.unwrap_err();
    let source = std::error::Error::source(&failed).unwrap().to_string();
    assert!(
        failed.to_string().contains("qudata_e") && source.contains("/nonexistent/nft"),
        "{failed}: {source}"
    );
}
