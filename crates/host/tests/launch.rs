//! Launching real processes through a real shim: what is started can be found, and what fails says why.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests state expectations")]

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use qudata_host::{
    launch::{Confinement, Launch, LaunchError, Launcher, identity_path, log_path},
    process::Process,
};

fn launcher() -> Launcher {
    let shim = std::env::current_exe().unwrap().parent().unwrap().join("../examples/launch_shim");
    assert!(shim.exists(), "cargo builds examples for tests; {} is missing", shim.display());
    Launcher::detached(shim, Vec::new())
}

fn launch(dir: &Path, program: &str, args: &[&str]) -> Launch {
    let me = fs::metadata("/proc/self").unwrap();
    Launch {
        program: PathBuf::from(program),
        args: args.iter().map(Into::into).collect(),
        uid: if me.uid() == 0 { 60_001 } else { me.uid() },
        gid: if me.uid() == 0 { 60_001 } else { me.gid() },
        groups: Vec::new(),
        dir: dir.to_owned(),
        name: "probe".into(),
        nice: 5,
        no_files: 64,
        confinement: Confinement::default(),
        ending: None,
    }
}

fn status_line(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find(|l| l.starts_with(name)).unwrap().to_owned()
}

#[tokio::test]
async fn a_launched_process_is_detached_unprivileged_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let process = launcher().launch(&launch(dir.path(), "/bin/sleep", &["60"])).await.unwrap();
    let pid = process.identity().pid;
    assert_eq!(status_line(pid, "NoNewPrivs:").split_whitespace().last(), Some("1"));
    assert_eq!(status_line(pid, "CapEff:").split_whitespace().last(), Some("0000000000000000"));
    assert!(
        fs::read_to_string(format!("/proc/{pid}/limits")).unwrap().contains("Max core file size        0")
    );
    let environ = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(environ.split('\0').filter(|e| !e.is_empty()).count() <= 2, "{environ}");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string(), "leads a session of its own");

    drop(process);
    let found = Launcher::find(dir.path(), "probe").unwrap().unwrap();
    let again = Process::adopt(&found).unwrap().expect("still alive after its handle was dropped");
    again.kill(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_run_says_why_and_leaves_no_identity() {
    let dir = tempfile::tempdir().unwrap();
    let error = launcher().launch(&launch(dir.path(), "/no/such/program", &[])).await.unwrap_err();
    assert!(
        matches!(&error, LaunchError::NotStarted { reason, .. } if reason.contains("No such file")),
        "{error}"
    );
    let unexecutable = dir.path().join("text");
    fs::write(&unexecutable, "x").unwrap();
    let error =
        launcher().launch(&launch(dir.path(), unexecutable.to_str().unwrap(), &[])).await.unwrap_err();
    assert!(matches!(error, LaunchError::NotStarted { .. }), "{error}");
    assert!(!identity_path(dir.path(), "probe").exists());
}

#[tokio::test]
async fn output_goes_to_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let started =
        launcher().launch(&launch(dir.path(), "/bin/sh", &["-c", "echo said; sleep 1"])).await.unwrap();
    started.exited().await.unwrap();
    assert_eq!(fs::read_to_string(log_path(dir.path(), "probe")).unwrap(), "said\n");
}

#[tokio::test]
async fn nothing_starts_in_a_directory_that_was_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    fs::create_dir(&run).unwrap();
    let wish = launch(&run, "/bin/sleep", &["60"]);
    let taken = dir.path().join("taken");
    fs::rename(&run, &taken).unwrap();
    let error = launcher().launch(&wish).await.unwrap_err();
    assert!(matches!(error, LaunchError::Prepare { .. } | LaunchError::NotStarted { .. }), "{error}");
    assert!(Launcher::find(&taken, "probe").unwrap().is_none());
}
