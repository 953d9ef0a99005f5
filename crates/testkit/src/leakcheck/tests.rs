//! Every kind of leak, seeded on this machine and found; and nothing found where nothing was seeded. Needs root.

use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::symlink, net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;

use super::*;

/// One test's own corner of the machine: tests run side by side.
struct Corner {
    dir: TempDir,
    scope: Scope,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

fn corner() -> Corner {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = tempfile::Builder::new().prefix("qudata-seed-").tempdir_in("/var/tmp").unwrap();
    let uid = 799_000 + 10 * (std::process::id() % 5000) + n;
    let mut scope = Scope::new([dir.path().to_owned()], uid..=uid);
    scope.tables = format!("qudataseed{}x{n}x", std::process::id());
    scope.sysfs = dir.path().with_extension("sysfs");
    Corner { dir, scope }
}

impl Corner {
    fn baseline(&self) -> Baseline {
        Baseline::take(&self.scope).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Ends and collects a seeded process whatever the test's outcome.
struct Seeded(Child);

impl Drop for Seeded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sleeper() -> Command {
    let mut command = Command::new("/bin/sleep");
    command.arg("600").current_dir("/");
    command
}

fn tool(program: &str, args: &[&str]) {
    let output = crate::tool::run(Command::new(program).args(args), Duration::from_secs(10)).unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", output.stderr);
}

/// Exactly one leak, of this kind, whose words hold `part`.
#[track_caller]
fn assert_one(leaks: &[Leak], kind: Kind, part: &str) {
    let [leak] = leaks else { panic!("expected one {kind} with {part:?}, found {leaks:#?}") };
    assert!(leak.kind == kind && leak.what.contains(part), "expected {kind} with {part:?}, found {leak}");
    assert!(!leak.to_string().contains('\n'), "a leak is one line: {leak}");
}

#[test]
fn nothing_seeded_is_nothing_found() {
    let corner = corner();
    fs::write(corner.path("before"), "").unwrap();
    assert_eq!(corner.baseline().compare().unwrap(), []);
}

#[test]
fn a_process_of_a_vms_user_alive_or_dead() {
    let corner = corner();
    let baseline = corner.baseline();
    let uid = *corner.scope.uids.start();
    let mut child = Seeded(sleeper().uid(uid).spawn().unwrap());
    assert_one(&baseline.compare().unwrap(), Kind::Process, &format!("uid {uid}"));
    child.0.kill().unwrap();
    let dead = (0..500).find_map(|_| {
        thread::sleep(Duration::from_millis(10));
        baseline.compare().unwrap().into_iter().find(|leak| leak.what.contains("state Z"))
    });
    assert_one(&dead.into_iter().collect::<Vec<_>>(), Kind::Process, &format!("pid {}", child.0.id()));
    child.0.wait().unwrap();
    assert_eq!(baseline.compare().unwrap(), []);
}

#[test]
fn a_process_by_executable_by_directory_and_by_argument() {
    let mut corner = corner();
    let program = corner.path("program");
    fs::copy("/bin/sleep", &program).unwrap();
    corner.scope.executables.push(program.clone());
    let baseline = corner.baseline();
    let pid = |child: &Seeded| format!("pid {} ", child.0.id());
    {
        let child = Seeded(Command::new(&program).arg("600").current_dir("/").spawn().unwrap());
        assert_one(&baseline.compare().unwrap(), Kind::Process, &pid(&child));
    }
    {
        let child = Seeded(sleeper().current_dir(corner.dir.path()).spawn().unwrap());
        assert_one(&baseline.compare().unwrap(), Kind::Process, &pid(&child));
    }
    {
        let script = format!("sleep 600; : {}", corner.path("disk.qcow2").display());
        let child = Seeded(Command::new("/bin/sh").args(["-c", &script]).process_group(0).spawn().unwrap());
        let leaks = baseline.compare().unwrap();
        // The shell's own child lives on when the shell is killed.
        tool("kill", &["-9", "--", &format!("-{}", child.0.id())]);
        assert_one(&leaks, Kind::Process, &pid(&child));
    }
    let file = fs::File::create(corner.path("open")).unwrap();
    let baseline = corner.baseline();
    let child = Seeded(sleeper().stdout(file).spawn().unwrap());
    assert_one(&baseline.compare().unwrap(), Kind::Process, &pid(&child));
}

#[test]
fn a_listening_port_in_the_range_and_none_outside() {
    let mut corner = corner();
    let (inside, outside) =
        (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = inside.local_addr().unwrap().port();
    drop(inside);
    corner.scope.ports.push(port..=port);
    let baseline = corner.baseline();
    assert_eq!(baseline.compare().unwrap(), [], "{outside:?} is nobody's business");
    let again = TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Listener, &format!("tcp port {port} of uid 0"));
    drop(again);
    let datagrams = std::net::UdpSocket::bind(("127.0.0.1", port)).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Listener, &format!("udp port {port} of uid 0"));
    drop(datagrams);
}

#[test]
fn a_unix_socket_in_use_is_one_leak_and_its_file_another_once_it_is_dead() {
    let corner = corner();
    let baseline = corner.baseline();
    let listener = UnixListener::bind(corner.path("qmp.sock")).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::UnixSocket, "qmp.sock");
    drop(listener);
    assert_one(&baseline.compare().unwrap(), Kind::File, "qmp.sock (socket without a process)");
}

#[test]
fn files_directories_and_links_unless_allowed() {
    let mut corner = corner();
    corner.scope.allowed = vec![corner.path("state.redb"), corner.path("images")];
    let baseline = corner.baseline();
    fs::write(corner.path("state.redb"), "").unwrap();
    fs::create_dir(corner.path("images")).unwrap();
    fs::write(corner.path("images/base"), "").unwrap();
    assert_eq!(baseline.compare().unwrap(), []);
    fs::write(corner.path("disk.qcow2"), "").unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::File, "disk.qcow2 (file)");
    fs::remove_file(corner.path("disk.qcow2")).unwrap();
    fs::create_dir(corner.path("run")).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::File, "run (directory)");
    fs::remove_dir(corner.path("run")).unwrap();
    symlink("/nowhere", corner.path("link")).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::File, "link (link)");
}

#[test]
fn a_mount_in_a_root() {
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let corner = corner();
    let point = corner.path("mount");
    fs::create_dir(&point).unwrap();
    let baseline = corner.baseline();
    tool("mount", &["-t", "tmpfs", "none", point.to_str().unwrap()]);
    let _mounted = Unmount(&point);
    assert_one(&baseline.compare().unwrap(), Kind::Mount, point.to_str().unwrap());
}

#[test]
fn an_nft_table_and_what_is_in_it() {
    struct Table<'a>(&'a str);
    impl Drop for Table<'_> {
        fn drop(&mut self) {
            let _ = Command::new("nft").args(["delete", "table", "inet", self.0]).status();
        }
    }
    let corner = corner();
    let table = format!("{}t", corner.scope.tables);
    let empty = corner.baseline();
    tool("nft", &["add", "table", "inet", &table]);
    let _there = Table(&table);
    assert_one(&empty.compare().unwrap(), Kind::Firewall, &format!("table inet {table}"));

    let with_table = corner.baseline();
    tool("nft", &["add", "set", "inet", &table, "guests", "{ type uid; }"]);
    assert_one(&with_table.compare().unwrap(), Kind::Firewall, "set inet");

    let with_set = corner.baseline();
    tool("nft", &["add", "element", "inet", &table, "guests", "{ 720001 }"]);
    assert_one(&with_set.compare().unwrap(), Kind::Firewall, "element 720001");

    tool("nft", &["add", "set", "inet", &table, "attached", "{ type ipv4_addr; }"]);
    let with_element = corner.baseline();
    tool("nft", &["add", "element", "inet", &table, "attached", "{ 192.0.2.1 }"]);
    assert_eq!(with_element.compare().unwrap(), [], "the host's own networks");
    tool("nft", &["add", "chain", "inet", &table, "unhooked"]);
    assert_one(&with_element.compare().unwrap(), Kind::Firewall, "chain inet");

    let with_chain = corner.baseline();
    tool("nft", &["add", "rule", "inet", &table, "unhooked", "tcp dport 22 counter reject"]);
    assert_one(&with_chain.compare().unwrap(), Kind::Firewall, "rule in inet");
    assert_eq!(corner.baseline().compare().unwrap(), []);
}

#[test]
fn another_pci_driver_override_or_cgroup() {
    let corner = corner();
    let sysfs = corner.scope.sysfs.clone();
    let (device, groups) = (sysfs.join("bus/pci/devices/0000:65:00.0"), sysfs.join("fs/cgroup/unified"));
    fs::create_dir_all(&device).unwrap();
    fs::create_dir_all(&groups).unwrap();
    symlink("../../drivers/nvidia", device.join("driver")).unwrap();
    fs::write(device.join("driver_override"), "(null)\n").unwrap();
    let baseline = corner.baseline();
    assert_eq!(baseline.compare().unwrap(), []);

    fs::remove_file(device.join("driver")).unwrap();
    symlink("../../drivers/vfio-pci", device.join("driver")).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Pci, "0000:65:00.0 driver vfio-pci");
    fs::remove_file(device.join("driver")).unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Pci, "0000:65:00.0 driver none");
    symlink("../../drivers/nvidia", device.join("driver")).unwrap();
    fs::write(device.join("driver_override"), "vfio-pci\n").unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Pci, "0000:65:00.0 driver override vfio-pci");
    fs::write(device.join("driver_override"), "(null)\n").unwrap();

    fs::create_dir(groups.join("user.slice")).unwrap();
    fs::create_dir(groups.join("qudata.slice")).unwrap();
    let leaks = baseline.compare().unwrap();
    fs::remove_dir_all(&sysfs).unwrap();
    assert_one(&leaks, Kind::Cgroup, "qudata.slice");
}

#[test]
fn what_cannot_be_looked_at_is_no_pass() {
    let mut corner = corner();
    fs::write(corner.path("no-directory"), "").unwrap();
    corner.scope.roots = vec![corner.path("no-directory")];
    let error = Baseline::take(&corner.scope).unwrap_err();
    assert!(error.to_string().contains("no-directory"), "{error}");
    corner.scope.roots.clear();
    corner.scope.agent = Some(u32::MAX);
    assert!(Baseline::take(&corner.scope).unwrap_err().to_string().contains("agent"));
}

#[test]
fn settling_waits_for_what_ends_by_itself_and_reports_what_does_not() {
    let corner = corner();
    let baseline = corner.baseline();
    let uid = *corner.scope.uids.start();
    let mut brief = Command::new("/bin/sleep").arg("0.3").uid(uid).current_dir("/").spawn().unwrap();
    let collector = thread::spawn(move || brief.wait().unwrap());
    assert_eq!(baseline.settle(Duration::from_secs(10)).unwrap(), []);
    collector.join().unwrap();
    fs::write(corner.path("stays"), "").unwrap();
    assert_one(&baseline.settle(Duration::from_millis(50)).unwrap(), Kind::File, "stays");
}
