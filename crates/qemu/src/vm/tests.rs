//! Launching, proving and adopting real QEMU processes (stopped, emulated; nothing boots).

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        net::UnixListener,
    },
    process::Command,
};

use qudata_host::{process::Signal, size::ByteSize};

use super::*;
use crate::{
    firmware::Firmware,
    machine::{Accel, CacheMode, Disk, MacAddress, NetworkDevice},
    memory::MemoryPlan,
    pinning::{CpuList, PinError, plan_pinning},
    qmp::Event,
};

const PLENTY: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_millis(200);

/// A run directory with everything QEMU's command line refers to.
struct Host {
    _dir: tempfile::TempDir,
    /// Stands in for passt.
    _network: UnixListener,
    paths: VmPaths,
    machine: Machine,
    owner: Owner,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let me = fs::metadata("/proc/self").unwrap();
        let owner = if me.uid() == 0 {
            Owner { uid: 60_011, gid: 60_011 }
        } else {
            Owner { uid: me.uid(), gid: me.gid() }
        };
        let paths = VmPaths::new(dir.path().join("vm"));
        paths.create(owner, owner).unwrap();
        let _network = UnixListener::bind(paths.network_socket()).unwrap();
        let (overlay, seed) = (dir.path().join("disk.qcow2"), dir.path().join("seed.iso"));
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&overlay).arg("64M").status();
        assert!(made.expect("these tests need qemu-img").success());
        fs::write(&seed, vec![0; 64 << 10]).unwrap();
        for path in [&overlay, &seed, &paths.network_socket()] {
            chown(path, Some(owner.uid), Some(owner.gid)).unwrap();
        }
        let uuid = Uuid::new_v4();
        let machine = Machine {
            uuid,
            name: "test".into(),
            accel: Accel::Tcg,
            cpus: 1,
            memory: ByteSize::from_mib(64),
            backing: MemoryPlan::default(),
            firmware: Firmware::Bios,
            disk: Disk { overlay, cache: CacheMode::PageCache },
            seed,
            network: NetworkDevice { socket: paths.network_socket(), mac: MacAddress::of(uuid) },
            passthrough: Vec::new(),
            mmio: None,
            qmp_socket: paths.qmp_socket(),
            ready_socket: paths.ready_socket(),
            power_socket: paths.power_socket(),
        };
        Self { _dir: dir, _network, paths, machine, owner }
    }

    fn launch(&self, program: &str) -> VmLaunch<'_> {
        VmLaunch {
            machine: &self.machine,
            paths: &self.paths,
            program: program.into(),
            owner: self.owner,
            groups: Vec::new(),
            nice: 0,
            no_files: 1024,
            base_image: None,
            iommu_groups: Vec::new(),
            memlock: None,
            shutdown: None,
        }
    }

    async fn start(&self) -> Vm {
        Vm::launch(&launcher(), &self.launch("/usr/bin/qemu-system-x86_64"), PLENTY).await.unwrap()
    }

    async fn adopt(&self, deadline: Duration) -> Result<Adoption, AdoptError> {
        let identity = Launcher::find(self.paths.dir(), paths::QEMU).unwrap().unwrap();
        Vm::adopt(&identity, self.paths.clone(), self.machine.uuid, deadline).await
    }
}

/// A test that fails must not leave a machine behind.
impl Drop for Host {
    fn drop(&mut self) {
        let Ok(Some(identity)) = Launcher::find(self.paths.dir(), paths::QEMU) else { return };
        if let Ok(Some(process)) = Process::adopt(&identity) {
            let _ = process.signal(Signal::Kill);
        }
    }
}

fn launcher() -> Launcher {
    let shim = std::env::current_exe().unwrap().parent().unwrap().join("../examples/vm_shim");
    assert!(shim.exists(), "cargo builds examples for tests; {} is missing", shim.display());
    Launcher::detached(shim, Vec::new())
}

#[tokio::test]
async fn a_machine_is_launched_proven_driven_and_killed() {
    let host = Host::new();
    let mut vm = host.start().await;
    println!("launch to proven identity: {:?}", vm.launch_took().unwrap());
    let mut events = vm.take_events().unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Prelaunch, "it waits for its proof");
    vm.resume().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
    vm.pause().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Paused);
    vm.reset().await.unwrap();
    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(Event::Reset { .. })) {
        seen.push(tokio::time::timeout(PLENTY, events.next()).await.unwrap().unwrap().event());
    }
    seen.retain(|event| *event != Event::Other);
    assert_eq!(seen[..2], [Event::Resume, Event::Stop]);

    let status = fs::read_to_string(format!("/proc/{}/status", vm.identity().pid)).unwrap();
    assert!(status.contains(&format!("Uid:\t{}", host.owner.uid)), "{status}");
    let socket = fs::metadata(host.paths.qmp_socket()).unwrap();
    assert_eq!(socket.permissions().mode() & 0o077, 0, "QMP is for its user alone");

    vm.kill(PLENTY).await.unwrap();
    vm.exited().await.unwrap();
    assert!(matches!(host.adopt(PLENTY).await.unwrap(), Adoption::Gone));
    assert!(host.paths.remove().unwrap() && !host.paths.remove().unwrap());
}

#[tokio::test]
async fn processors_are_pinned_and_nothing_else_is() {
    let mut host = Host::new();
    host.machine.cpus = 2;
    let vm = host.start().await;
    let pid = vm.identity().pid;
    let allowed = |thread: u32| -> CpuList {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().parse().unwrap()
    };
    let before = allowed(pid);
    let last: CpuList = before.iter().last().unwrap().to_string().parse().unwrap();
    let vcpus = vm.vcpus().await.unwrap();
    assert_eq!(vcpus.iter().map(|vcpu| vcpu.index).collect::<Vec<_>>(), [0, 1]);
    vm.pin(&plan_pinning(1, &last).unwrap()).await.unwrap();
    let threads: Vec<CpuList> = vcpus.iter().map(|vcpu| allowed(vcpu.thread)).collect();
    assert_eq!(threads, [last.clone(), before.clone()], "only the first has a set");
    assert_eq!(allowed(pid), before);
    let error = vm.pin(&["1023".parse().unwrap()]).await.unwrap_err();
    assert!(matches!(error, PinError::Affinity { cpu: 0, .. }), "{error:?}");
    vm.kill(PLENTY).await.unwrap();
}

// orig-L1, orig-L12: a restart killed the VM, and a silent one read "running".
#[tokio::test]
async fn adoption_finds_the_vm_and_silence_is_not_death() {
    let host = Host::new();
    drop(host.start().await);
    let Adoption::Running(vm) = host.adopt(PLENTY).await.unwrap() else { panic!("not adopted") };
    assert_eq!(vm.run_state().await.unwrap(), RunState::Prelaunch);

    vm.process.signal(Signal::Stop).unwrap();
    drop(vm);
    let Adoption::Unresponsive(mut vm, _) = host.adopt(SOON).await.unwrap() else { panic!("it answered") };
    assert!(matches!(vm.pause().await, Err(VmError::Unresponsive)));
    assert!(vm.reconnect(SOON).await.is_err());
    vm.process.signal(Signal::Cont).unwrap();
    vm.reconnect(PLENTY).await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), RunState::Prelaunch);
    assert!(vm.take_events().is_some() && vm.take_events().is_none());
    drop(vm);

    fs::rename(host.paths.qmp_socket(), host.paths.qemu_dir().join("away")).unwrap();
    let Adoption::Unresponsive(vm, error) = host.adopt(SOON).await.unwrap() else { panic!("it answered") };
    assert!(matches!(error, ConnectVmError::Connect(ConnectError::Connect { .. })), "{error:?}");
    vm.kill(PLENTY).await.unwrap();
}

// orig-L6: whatever answered on the socket path was taken for the VM.
#[tokio::test]
async fn another_machine_or_process_is_not_adopted_and_not_harmed() {
    let mut host = Host::new();
    let vm = host.start().await;
    let real = host.machine.uuid;
    host.machine.uuid = Uuid::new_v4();
    drop(vm);
    let error = host.adopt(PLENTY).await.unwrap_err();
    assert!(
        matches!(&error, AdoptError::Identity(ConnectVmError::OtherMachine { found, .. }) if *found == real),
        "{error:?}"
    );
    host.machine.uuid = real;

    let other = Host::new();
    let victim = other.start().await;
    fs::remove_file(host.paths.qmp_socket()).unwrap();
    fs::hard_link(other.paths.qmp_socket(), host.paths.qmp_socket()).unwrap();
    drop(victim);
    let error = host.adopt(PLENTY).await.unwrap_err();
    assert!(matches!(error, AdoptError::Identity(ConnectVmError::OtherProcess { .. })), "{error:?}");

    for host in [&host, &other] {
        let identity = Launcher::find(host.paths.dir(), paths::QEMU).unwrap().unwrap();
        assert!(Process::adopt(&identity).unwrap().is_some(), "still alive");
    }
}

#[tokio::test]
async fn a_qemu_that_ends_at_once_says_why() {
    let mut host = Host::new();
    fs::remove_file(&host.machine.disk.overlay).unwrap();
    host.machine.disk.overlay = "/nonexistent/disk.qcow2".into();
    let begun = Instant::now();
    let launch = host.launch("/usr/bin/qemu-system-x86_64");
    let error = Vm::launch(&launcher(), &launch, PLENTY).await.unwrap_err();
    assert!(
        matches!(&error, LaunchVmError::Ended { log, report } if log.contains("/nonexistent/disk.qcow2") && report.code == Some(1)),
        "{error:?}"
    );
    assert!(begun.elapsed() < PLENTY / 2, "noticed at once, not at the deadline");

    let error = Vm::launch(&launcher(), &host.launch("/nonexistent/qemu"), PLENTY).await.unwrap_err();
    assert!(matches!(error, LaunchVmError::Start(_)), "{error:?}");
}

#[tokio::test]
async fn a_qemu_that_never_opens_its_socket_is_left_alone() {
    let mut host = Host::new();
    host.machine.qmp_socket = host.paths.qemu_dir().join("elsewhere.sock");
    let launched = host.launch("/usr/bin/qemu-system-x86_64").exec(&launcher()).await.unwrap();
    let identity = launched.identity().clone();
    let error = launched.prove(SOON).await.unwrap_err();
    assert!(matches!(error, LaunchVmError::Connect(ConnectVmError::Connect(_))), "{error:?}");
    assert!(Process::adopt(&identity).unwrap().is_some(), "still alive");
}
