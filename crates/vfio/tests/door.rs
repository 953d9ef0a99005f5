//! The door with a real child: a process that hangs in a real open, is killed, or lies.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{AUDIO, GPU, Lab, PORT, TWIN, driver, pci};
use qudata_host::causes::chain;
use qudata_testkit::pci::{Device, FakeHost};
use qudata_vfio::{
    door::{Door, DoorError},
    op::{Op, Reply},
    plan::{BindPolicy, plan_bind},
    rebind::{RebindError, bind},
    topology,
};

const DEADLINE: Duration = Duration::from_secs(20);

fn door(root: &Path) -> Door {
    let program = std::env::current_exe().unwrap().parent().unwrap().join("../examples/pci_child");
    assert!(program.exists(), "cargo builds examples for tests; {} is missing", program.display());
    Door::Child { program, args: Vec::new(), root: root.to_owned() }
}

fn shell(script: &str) -> Door {
    Door::Child {
        program: PathBuf::from("/bin/sh"),
        args: vec!["-c".into(), script.into()],
        root: PathBuf::from("/"),
    }
}

fn host() -> FakeHost {
    FakeHost::with([
        Device::bridge(PORT, 1),
        Device::gpu(GPU).under(PORT).group(7),
        Device::audio(AUDIO).under(PORT).group(7),
    ])
    .unwrap()
}

fn look() -> Vec<Op> {
    let expect = |address, name| Op::ExpectDriver { address: pci(address), driver: driver(name) };
    vec![expect(GPU, "nvidia"), expect(AUDIO, "snd_hda_intel")]
}

/// Makes a write to this file hang as the kernel does: nobody reads the pipe.
fn hang(file: &Path) {
    fs::remove_file(file).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, file, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
}

fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.get(stat.rfind(')')? + 2..)?.chars().next()
}

#[tokio::test]
async fn a_child_works_off_a_list_and_goes() {
    let host = host();
    let mut ops = look();
    ops.push(Op::ReadConfig { address: pci(GPU), length: 4 });
    ops.push(Op::Override { address: pci(GPU), driver: driver("vfio-pci") });
    let replies = door(host.root()).run(&ops, DEADLINE).await.unwrap();
    assert_eq!(replies[0], Reply::Driver(driver("nvidia")));
    assert_eq!(replies[2], Reply::Config(vec![0xde, 0x10, 0xb5, 0x20]));
    let written = fs::read_to_string(host.device_dir(GPU).join("driver_override")).unwrap();
    assert!(written.starts_with("vfio-pci"), "{written}");
}

#[tokio::test]
async fn the_first_failure_ends_the_list_and_says_what_failed() {
    let host = host();
    let missing = Op::Override { address: pci(TWIN), driver: None };
    let never = Op::Override { address: pci(GPU), driver: driver("vfio-pci") };
    let error = door(host.root()).run(&[missing.clone(), never], DEADLINE).await.unwrap_err();
    assert!(
        matches!(&error, DoorError::Refused { op, step: 0, source } if *op == missing
            && source.kind() == std::io::ErrorKind::NotFound),
        "{error:?}"
    );
    assert!(chain(&error).contains("driver_override"), "{}", chain(&error));
    let untouched = fs::read_to_string(host.device_dir(GPU).join("driver_override")).unwrap();
    assert_eq!(untouched, "(null)\n");
}

#[tokio::test]
async fn a_child_that_hangs_is_left_alone_and_stops_when_it_is_let_go() {
    let host = host();
    let unbind = host.path("sys/bus/pci/drivers/nvidia/unbind");
    hang(&unbind);
    let topology = topology::observe(host.root()).unwrap();
    let gpu = topology.gpu(pci(GPU)).unwrap();
    let mut plan = plan_bind(&topology, &gpu, &BindPolicy::default()).unwrap();
    (plan.deadline, plan.quieting) = (Duration::from_secs(2), None);
    let begun = Instant::now();
    let error = bind(&door(host.root()), &plan).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let RebindError::Wedged { source, .. } = &error else { panic!("{error:?}") };
    let DoorError::Hung { op, pid: Some(pid), .. } = source.as_ref() else { panic!("{source:?}") };
    assert_eq!(*op, Op::Unbind { address: pci(GPU), driver: "nvidia".into() });
    assert!(matches!(state(*pid), Some('S' | 'D')), "neither killed nor waited for");
    assert!(chain(&error).contains(&format!("process {pid}")), "{}", chain(&error));

    // Everything else goes on: also what is safe of the same card.
    door(host.root()).run(&look(), DEADLINE).await.unwrap();

    // The kernel lets go: the child finds nobody listening and takes no further step.
    let pipe = tokio::task::spawn_blocking(move || fs::read(unbind));
    while state(*pid).is_some_and(|state| state != 'Z') {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pipe.await.unwrap().unwrap(), GPU.as_bytes(), "the step that hung was done in the end");
    let bind = host.path("sys/bus/pci/drivers/vfio-pci/bind");
    assert_eq!(fs::read_to_string(bind).unwrap(), "", "the next step was not taken");
}

#[tokio::test]
async fn children_work_at_the_same_time() {
    let host = host();
    hang(&host.device_dir(GPU).join("driver_override"));
    let door = door(host.root());
    let stuck = [Op::Override { address: pci(GPU), driver: None }];
    let free = [Op::Override { address: pci(AUDIO), driver: None }];
    let begun = Instant::now();
    let hung = door.run(&stuck, Duration::from_secs(3));
    let well = async {
        let replies = door.run(&free, DEADLINE).await.unwrap();
        (replies, begun.elapsed())
    };
    let (hung, (replies, elapsed)) = tokio::join!(hung, well);
    assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
    assert_eq!(replies, [Reply::Done]);
    assert!(matches!(hung.unwrap_err(), DoorError::Hung { .. }));
    fs::read(host.device_dir(GPU).join("driver_override")).unwrap();
}

#[tokio::test]
async fn a_child_that_ends_early_is_told_apart_from_one_that_failed() {
    let error = shell("cat >/dev/null; exit 3").run(&look(), DEADLINE).await.unwrap_err();
    assert!(matches!(&error, DoorError::Died { step: 0, how, .. } if how.contains('3')), "{error:?}");
    let error = shell("cat >/dev/null; echo '{\"Done\":{\"Driver\":\"nvidia\"}}'; kill -9 $$")
        .run(&look(), DEADLINE)
        .await
        .unwrap_err();
    assert!(matches!(&error, DoorError::Died { step: 1, how, .. } if how.contains("signal: 9")), "{error:?}");
    let error = shell("cat >/dev/null; echo hello").run(&look(), DEADLINE).await.unwrap_err();
    assert!(matches!(&error, DoorError::Died { how, .. } if how.contains("hello")), "{error:?}");
}

#[tokio::test]
async fn a_program_that_is_not_there_has_begun_nothing() {
    let door = Door::child("/no/such/program".into(), Vec::new());
    let error = door.run(&look(), DEADLINE).await.unwrap_err();
    assert!(matches!(error, DoorError::Start { .. }) && error.step().is_none(), "{error:?}");
}

#[tokio::test]
async fn a_child_has_nothing_of_the_agents() {
    let script =
        "cat >/dev/null; tr '\\0' '\\n' </proc/self/environ | grep -v -e ^PWD= -e ^SHLVL= -e ^_=; echo end";
    // Whatever it prints is no outcome, so the error shows the first line of it.
    let error = shell(script).run(&look(), DEADLINE).await.unwrap_err();
    assert!(matches!(&error, DoorError::Died { how, .. } if how == "it wrote end"), "{error:?}");
}

#[tokio::test]
async fn a_real_child_writes_what_the_plan_says() {
    // The plain tree does not react, so what a bind leaves behind are its writes.
    let host = host();
    let lab = Lab::with_audio();
    let plan = lab.plan(GPU);
    let error = bind(&door(host.root()), &plan).await.unwrap_err();
    assert!(
        matches!(error.door(), Some(DoorError::Unmet { op: Op::ExpectDriver { .. }, .. })),
        "a file that takes everything proves nothing: {error:?}"
    );
    let unbound = fs::read_to_string(host.path("sys/bus/pci/drivers/nvidia/unbind")).unwrap();
    assert_eq!(unbound, GPU);
}

#[tokio::test]
async fn children_started_ahead_are_used_and_the_rest_ends_unused() {
    let host = host();
    let Door::Child { program, root, .. } = door(host.root()) else { panic!("not a child") };
    let started = host.path("started");
    let script = format!("echo $$ >>{}; exec {}", started.display(), program.display());
    let door = Door::Child { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()], root };
    let pids = || -> Vec<u32> {
        let text = fs::read_to_string(&started).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    let ready = door.ready(2);
    while pids().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    ready.run(&look(), DEADLINE).await.unwrap();
    ready.run(&look(), DEADLINE).await.unwrap();
    assert_eq!(pids().len(), 2, "no other was started");
    ready.run(&look(), DEADLINE).await.unwrap();
    assert_eq!(pids().len(), 3, "more lists than children start their own");
    let unused = door.ready(1);
    while pids().len() < 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop((ready, unused));
    let end = Instant::now() + DEADLINE;
    while pids().iter().any(|pid| state(*pid).is_some()) {
        assert!(Instant::now() < end, "a child outlived its door");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
