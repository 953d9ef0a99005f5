//! Builders that end in the middle.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use qudata_image::Customisation;

use crate::kit::{Kit, file, quietly};

const SOON: Duration = Duration::from_secs(20);

/// The example, which cargo builds beside the tests.
fn builder(kit: &Kit, source: &Path, customise: bool) -> Child {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("examples/build_image");
    assert!(program.is_file(), "{} is not built", program.display());
    let mut command = Command::new(program);
    command.arg(kit.images()).arg(source).arg(kit.path("build.log"));
    if customise {
        command.arg("customise");
    }
    command.spawn().unwrap()
}

/// Pids of processes that have a file of the images open or named on their command line, this one apart.
fn holders(kit: &Kit) -> Vec<u32> {
    let images = kit.images().display().to_string();
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    let holds = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&images) && *pid != std::process::id()
    };
    pids.filter(holds).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {SOON:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn machine(kit: &Kit) -> Option<u32> {
    holders(kit).into_iter().find(|pid| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.ends_with("qemu-system-x86_64")
    })
}

pub(crate) fn machine_runs(kit: &Kit) -> bool {
    machine(kit).is_some()
}

fn work_folders(kit: &Kit) -> Vec<PathBuf> {
    let entries = fs::read_dir(kit.images()).unwrap().map(|entry| entry.unwrap());
    let work = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".work-"));
    work.map(|entry| entry.path()).collect()
}

#[tokio::test]
async fn killed_at_any_moment_there_is_a_whole_image_or_none() {
    let kit = Kit::new();
    let source = kit.image("a.qcow2", 24);
    // As long as a whole one takes here and now, and a little longer.
    let begin = Instant::now();
    assert!(builder(&kit, &source, false).wait().unwrap().success());
    let whole = begin.elapsed();
    fs::remove_dir_all(kit.images()).unwrap();
    let mut made = 0;
    for delay in (0..30).map(|step| whole * step / 26) {
        let mut child = builder(&kit, &source, false);
        thread::sleep(delay);
        child.kill().unwrap();
        made += u32::from(child.wait().unwrap().success());
        let store = kit.store();
        let listing = store.list().unwrap();
        assert!(listing.damaged.is_empty(), "after {delay:?}: {listing:?}");
        for record in &listing.images {
            store.verify(&record.id).unwrap();
        }
        if let Some(current) = store.current().unwrap() {
            store.verify(&current).unwrap();
        }
    }
    assert!(made < 30, "some were killed");
    let made = quietly(&kit.plain(file(&source))).await.unwrap();
    assert_eq!(kit.store().current().unwrap(), Some(made.id));
    assert!(work_folders(&kit).is_empty());
}

#[tokio::test]
async fn the_machine_ends_with_its_builder() {
    let kit = Kit::new();
    // Nothing starts from it: the machine idles until it is ended.
    let source = kit.image("a.qcow2", 1);
    let mut child = builder(&kit, &source, true);
    wait_until("the machine runs", || machine_runs(&kit));
    let score = machine(&kit).map(|pid| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(score.as_deref(), Some("1000\n"), "it dies for lack of memory before any renter's machine");
    wait_until("the machine is gone", || holders(&kit).is_empty());
    assert_eq!(work_folders(&kit).len(), 1, "a killed builder cannot tidy up");

    // Given up by its caller, as by Ctrl-C.
    let wish = kit.customised(file(&source), Customisation::default());
    let mut building = Box::pin(quietly(&wish));
    loop {
        tokio::select! {
            done = &mut building => panic!("{done:?}"),
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        if machine_runs(&kit) {
            break;
        }
    }
    drop(building);
    wait_until("the machine is gone", || holders(&kit).is_empty());
    kit.store().tidy().unwrap();
    assert!(work_folders(&kit).is_empty());
    kit.assert_nothing_made();
}
