use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::golden::{assert_golden, lines};

fn passt(dir: &Path, forwards: &[(u16, u16)], management: u16) -> Passt {
    Passt {
        socket: dir.join("passt.sock"),
        log: dir.join("passt.log"),
        listen: Ipv4Addr::LOCALHOST,
        forwards: forwards.iter().map(|&(host_port, guest_port)| Forward { host_port, guest_port }).collect(),
        management: Forward { host_port: management, guest_port: 22 },
    }
}

#[test]
fn goldens() {
    let mut described = passt("/vm/net".as_ref(), &[(10001, 22), (20000, 8888)], 15400);
    assert_golden("passt-loopback.args", &lines(&plan_argv(&described)));
    described.listen = Ipv4Addr::UNSPECIFIED;
    described.forwards.clear();
    assert_golden("passt-no-ports.args", &lines(&plan_argv(&described)));
    described.forwards = vec![Forward { host_port: 10001, guest_port: 22 }];
    assert_golden("passt-all-addresses.args", &lines(&plan_argv(&described)));
}

#[test]
fn listeners_are_told_from_bound_and_connected_sockets() {
    let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
        0000000000000000: 00000002 00000000 00010000 0001 01 19671 /run/a b/net.sock\n\
        0000000000000000: 00000003 00000000 00000000 0001 03 19672 /run/connected\n\
        0000000000000000: 00000003 00000000 00000000 0001 03 19673\n";
    assert!(lists_listener(table, "/run/a b/net.sock"));
    for other in ["/net.sock", "b/net.sock", "/run/connected", "/run/absent", ""] {
        assert!(!lists_listener(table, other), "{other}");
    }
}

#[tokio::test]
async fn waiting_sees_a_listener_and_gives_up_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("late.sock");
    let waiting = socket_ready(&socket, Duration::from_millis(50)).await;
    assert!(matches!(waiting, Err(SocketReadyError::TimedOut { .. })), "{waiting:?}");
    let path = socket.clone();
    let binding = tokio::spawn(async move {
        sleep(Duration::from_millis(30)).await;
        UnixListener::bind(path).unwrap()
    });
    socket_ready(&socket, Duration::from_secs(5)).await.unwrap();
    drop(binding.await.unwrap());
    let stale = socket_ready(&socket, Duration::from_millis(50)).await;
    assert!(stale.is_err(), "a file that a dead passt left is not ready");
}

/// A passt that this test started and ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A uid nobody has; the test itself may be any unprivileged user.
fn start(described: &Passt) -> Running {
    let mut command = Command::new("passt");
    command.args(plan_argv(described)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if rustix::process::getuid().is_root() {
        command.uid(STRANGER).gid(STRANGER);
    }
    Running(command.spawn().unwrap())
}

const STRANGER: u32 = 61_501;

/// A directory that the stranger may write and others may pass.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    if rustix::process::getuid().is_root() {
        chown(dir.path(), Some(STRANGER), Some(STRANGER)).unwrap();
    }
    dir
}

fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Ports of 127.0.0.1 (or any address) on which somebody listens, by protocol.
fn bound(protocol: &str) -> Vec<u16> {
    let table = fs::read_to_string(format!("/proc/net/{protocol}")).unwrap();
    let local = |line: &str| {
        let field = line.split_ascii_whitespace().nth(1)?;
        u16::from_str_radix(field.rsplit(':').next()?, 16).ok()
    };
    table.lines().skip(1).filter_map(local).collect()
}

#[tokio::test]
async fn real_passt_binds_exactly_the_ports_and_ends_with_its_client() {
    let dir = directory();
    let ports = [free_port(), free_port(), free_port()];
    let described = passt(dir.path(), &[(ports[0], 22), (ports[1], 8000)], ports[2]);
    let mut running = start(&described);
    socket_ready(&described.socket, Duration::from_secs(10)).await.unwrap();
    for port in ports {
        assert!(bound("tcp").contains(&port), "TCP port {port} is bound once the socket listens");
        assert!(!bound("udp").contains(&port), "UDP port {port} must not be");
    }
    let socket = fs::metadata(&described.socket).unwrap();
    assert_ne!(socket.uid(), 0, "passt runs as a user of its own");
    let client = UnixStream::connect(&described.socket).unwrap();
    // passt must have taken the connection before it can notice the end.
    sleep(Duration::from_millis(200)).await;
    drop(client);
    let end = Instant::now() + Duration::from_secs(5);
    while running.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "passt goes on without QEMU");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn real_passt_refuses_a_taken_port_and_names_it() {
    let dir = directory();
    let held = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let taken = held.local_addr().unwrap().port();
    let described = passt(dir.path(), &[(free_port(), 22), (taken, 8000)], free_port());
    let mut running = start(&described);
    let end = Instant::now() + Duration::from_secs(5);
    let status = loop {
        if let Some(status) = running.0.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "passt runs without one of its ports");
        sleep(Duration::from_millis(10)).await;
    };
    let mut said = String::new();
    io::Read::read_to_string(running.0.stderr.as_mut().unwrap(), &mut said).unwrap();
    assert!(!status.success() && said.contains(&taken.to_string()), "{status}: {said}");
}
