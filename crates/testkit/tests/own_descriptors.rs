//! The part of the leak oracle that looks into one process, with this process in the place of the agent. A file of its
//! own with one test: other tests of the same process would open descriptors and start threads of their own.

use std::{fs::File, net::TcpListener, process::Command, sync::mpsc, thread, time::Duration};

use qudata_testkit::leakcheck::{Baseline, Kind, Leak, Scope};

#[track_caller]
fn assert_one(leaks: &[Leak], kind: Kind, part: &str) {
    assert!(
        matches!(leaks, [leak] if leak.kind == kind && leak.what.contains(part)),
        "expected one {kind} with {part:?}, found {leaks:#?}"
    );
}

#[test]
fn a_descriptor_a_thread_and_a_child_of_the_agent_are_found() {
    let mut scope = Scope::new([], 799_999..=799_999);
    scope.tables = "qudata_no_such_table".into();
    scope.agent = Some(std::process::id());
    let baseline = Baseline::take(&scope).unwrap();
    scope.idle_threads = 1;
    let patient = Baseline::take(&scope).unwrap();
    assert_eq!(baseline.compare().unwrap(), []);

    let file = File::open("/dev/zero").unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Descriptor, "/dev/zero");
    let second = File::open("/dev/zero").unwrap();
    assert_one(&baseline.compare().unwrap(), Kind::Descriptor, "2 more: /dev/zero");
    drop((file, second));

    let (done, wait) = mpsc::channel::<()>();
    let idle = thread::Builder::new().name("idle".into()).spawn(move || wait.recv().is_err()).unwrap();
    // The name is set by the new thread itself.
    thread::sleep(Duration::from_millis(100));
    assert_one(&baseline.compare().unwrap(), Kind::Thread, "idle");
    assert_eq!(patient.compare().unwrap(), [], "one idle thread is tolerated when that is asked for");
    drop(done);
    assert!(idle.join().unwrap());

    let mut child = Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let leaks = baseline.compare().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_one(&leaks, Kind::Process, &format!("pid {}", child.id()));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let leaks = baseline.compare().unwrap();
    drop(listener);
    assert!(leaks.iter().any(|leak| leak.kind == Kind::Listener && leak.what.contains(&port.to_string())));
    assert!(leaks.iter().any(|leak| leak.kind == Kind::Descriptor && leak.what == "socket"), "{leaks:#?}");

    assert_eq!(baseline.settle(Duration::from_secs(5)).unwrap(), []);
}
