//! Units of a real systemd. They need it as PID 1, so they run where that is: in the lab's L1, as root, with
//! `--ignored`. Ordinary runs leave them out by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests state expectations")]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use qudata_host::{
    launch::{Confinement, Ending, Launch, LaunchError, Launcher, identity_path, log_path},
    process::Process,
    size::ByteSize,
};

const WHY: &str = "these tests need systemd as PID 1, its bus, and libnss-systemd";
const SOON: Duration = Duration::from_secs(10);

static NEXT_UID: AtomicU32 = AtomicU32::new(790_000);

struct Run {
    _parent: tempfile::TempDir,
    dir: PathBuf,
}

impl Run {
    fn new() -> Self {
        let parent = tempfile::Builder::new().prefix("qudata-test-").tempdir_in("/run").unwrap();
        fs::set_permissions(parent.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let dir = parent.path().join("1");
        qudata_host::durable::create_dir(&dir, 0o711).unwrap();
        Self { _parent: parent, dir }
    }

    fn launch(&self, program: &str, args: &[&str]) -> Launch {
        let uid = NEXT_UID.fetch_add(1, Ordering::Relaxed);
        Launch {
            program: program.into(),
            args: args.iter().map(Into::into).collect(),
            uid,
            gid: uid,
            groups: Vec::new(),
            dir: self.dir.clone(),
            name: "probe".into(),
            nice: 5,
            no_files: 64,
            confinement: Confinement { private_network: true, ..Confinement::default() },
            ending: None,
        }
    }

    fn unit(&self) -> String {
        let parent = self.dir.parent().unwrap().file_name().unwrap().to_str().unwrap();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        format!("qudata-vm-{}-1-probe.service", parent.chars().map(plain).collect::<String>())
    }

    fn log(&self) -> String {
        fs::read_to_string(log_path(&self.dir, "probe")).unwrap_or_default()
    }
}

async fn launcher() -> Launcher {
    Launcher::systemd().await.expect(WHY)
}

fn is_loaded(unit: &str) -> bool {
    let shown = Command::new("systemctl").args(["show", "-P", "LoadState", unit]).output().unwrap();
    String::from_utf8_lossy(&shown.stdout).trim() != "not-found"
}

fn status_line(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find(|l| l.starts_with(name)).unwrap().split_whitespace().nth(1).unwrap().to_owned()
}

fn processes_of(uid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let owned = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with(&format!("Uid:\t{uid}\t")))
            && !status.contains("State:\tZ")
    };
    pids.filter(owned).collect()
}

#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn a_unit_is_confined_found_again_and_ended() {
    let (launcher, run) = (launcher().await, Run::new());
    let mut launch = run.launch("/bin/sleep", &["60"]);
    launch.confinement.memory_max = Some(ByteSize::from_mib(64));
    launch.confinement.memlock = Some(ByteSize::from_mib(32));
    launch.confinement.tasks_max = Some(7);
    let process = launcher.launch(&launch).await.unwrap();
    let pid = process.identity().pid;
    let cgroup = process.identity().cgroup.clone().unwrap();
    assert_eq!(cgroup, format!("/qudata.slice/{}", run.unit()));
    for (line, expected) in [
        ("Uid:", launch.uid.to_string().as_str()),
        ("Gid:", launch.gid.to_string().as_str()),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
    ] {
        assert_eq!(status_line(pid, line), expected, "{line}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.contains("Max core file size        0"), "{limits}");
    assert!(limits.contains("Max locked memory         33554432"), "{limits}");
    let group = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/{file}")).unwrap();
    assert_eq!((group("memory.max").trim(), group("pids.max").trim()), ("67108864", "7"));
    let environ = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    let names: Vec<_> = environ.split('\0').filter_map(|e| Some(e.split_once('=')?.0)).collect();
    assert!(names.iter().all(|name| ["PATH", "LC_ALL"].contains(name)), "{environ}");

    let reloaded = Command::new("systemctl").arg("daemon-reload").status().unwrap();
    assert!(reloaded.success());
    let shown = Command::new("systemctl").args(["show", "-P", "LoadState", &run.unit()]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), "loaded", "systemd can read its own unit file");

    drop(process);
    let found = launcher.locate(&run.dir, "probe").await.unwrap().unwrap();
    assert_eq!(found.pid, pid);
    let mut other = found.clone();
    other.cgroup = Some("/qudata.slice/another.service".into());
    assert!(Process::adopt(&other).unwrap().is_none(), "the control group is part of the identity");
    let adopted = Process::adopt(&found).unwrap().unwrap();
    launcher.end(&run.dir, "probe", SOON).await.unwrap();
    adopted.exited().await.unwrap();
    assert!(!is_loaded(&run.unit()));
    assert!(!Path::new(&format!("/run/userdb/{}.user", launch.uid)).exists());
    launcher.end(&run.dir, "probe", SOON).await.unwrap();
}

/// Whether the program was asked before SIGTERM shows in a file that the question leaves.
#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn a_stop_by_systemd_asks_first_and_an_end_by_the_agent_does_not() {
    let launcher = launcher().await;
    for asked in [true, false] {
        let run = Run::new();
        let (mine, trace) = (run.dir.join("mine"), run.dir.join("mine/asked"));
        let mut launch = run.launch("/bin/sleep", &["60"]);
        qudata_host::durable::create_dir(&mine, 0o700).unwrap();
        qudata_host::durable::give_to(&mine, launch.uid, launch.gid).unwrap();
        launch.confinement.writable = vec![mine];
        launch.ending = Some(Ending {
            program: "/bin/touch".into(),
            args: vec![trace.clone().into()],
            patience: SOON,
            before: vec!["other".into()],
        });
        let process = launcher.launch(&launch).await.unwrap();
        if asked {
            assert!(Command::new("systemctl").args(["stop", &run.unit()]).status().unwrap().success());
        } else {
            launcher.end(&run.dir, "probe", SOON).await.unwrap();
        }
        process.exited().await.unwrap();
        assert_eq!(trace.exists(), asked, "{}", run.log());
        launcher.end(&run.dir, "probe", SOON).await.unwrap();
    }
    assert!(!Launcher::host_is_going_down().await.unwrap());
}

#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn arguments_arrive_as_they_are() {
    let (launcher, run) = (launcher().await, Run::new());
    let odd =
        ["$HOME", "${PATH}", "%i %% %h", "it's \"quoted\"", "a\\nb \\x41", "two\nlines", "", "ü", "$$", ";"];
    let mut args = vec!["-c", "printf '<%s>' \"$@\"; sleep 60; true", "sh"];
    args.extend(odd);
    launcher.launch(&run.launch("/bin/sh", &args)).await.unwrap();
    let expected: String = odd.iter().map(|arg| format!("<{arg}>")).collect();
    for _ in 0..100 {
        if run.log() == expected {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(run.log(), expected);
    launcher.end(&run.dir, "probe", SOON).await.unwrap();
}

/// Tries what a guest that has broken out of QEMU would try.
#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn what_is_not_granted_is_not_there() {
    let (launcher, run) = (launcher().await, Run::new());
    let (mine, secret) = (run.dir.join("mine"), run.dir.join("secret"));
    let script = format!(
        "try() {{ if eval \"$2\" >/dev/null 2>&1; then echo \"$1=yes\"; else echo \"$1=no\"; fi; }}
         try mine 'echo x >{mine}/file'; try dir 'echo x >{dir}/file'; try tmp 'test -e /tmp/host-was-here'
         try home 'ls /root /home/*'; try null 'echo x >/dev/null'; try kmsg 'head -c1 /dev/kmsg'
         try kvm '(exec 3<>/dev/kvm)'; try net 'grep -v lo: /proc/net/dev | grep :'; try sys 'echo 1 >/sys/kernel/mm/ksm/run'
         try init 'ls /proc/1'; try unshare 'unshare -U true'; try secret 'cat {secret}'; echo done=yes; sleep 60; true",
        mine = mine.display(),
        dir = run.dir.display(),
        secret = secret.display(),
    );
    let mut launch = run.launch("/bin/sh", &["-c", &script]);
    fs::write("/tmp/host-was-here", "x").unwrap();
    fs::write(&secret, "x").unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    qudata_host::durable::create_dir(&mine, 0o700).unwrap();
    qudata_host::durable::give_to(&mine, launch.uid, launch.gid).unwrap();
    launch.confinement.writable = vec![mine];
    launcher.launch(&launch).await.unwrap();
    for _ in 0..200 {
        if run.log().contains("done=") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let expected = "mine=yes dir=no tmp=no home=no null=yes kmsg=no kvm=no net=no sys=no init=no unshare=no secret=no done=yes";
    assert_eq!(run.log().split_whitespace().collect::<Vec<_>>().join(" "), expected);
    launcher.end(&run.dir, "probe", SOON).await.unwrap();
}

#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn failures_say_why_and_leave_nothing() {
    type Change = fn(&mut Launch);
    let launcher = launcher().await;
    let with = |change: Change| {
        let run = Run::new();
        let mut launch = run.launch("/bin/sleep", &["60"]);
        change(&mut launch);
        (run, launch)
    };
    let table: [(Change, &str); 4] = [
        (|launch| launch.program = "/no/such/program".into(), "could not execute it"),
        (|launch| launch.confinement.writable = vec!["/no/such/dir".into()], "view of the file system"),
        (|launch| launch.groups = vec![4_000_000], "does not know its user or group"),
        (|launch| launch.args.push("\u{0}".into()), "refused StartTransientUnit"),
    ];
    for (change, words) in table {
        let (run, launch) = with(change);
        let error = launcher.launch(&launch).await.unwrap_err();
        assert!(
            matches!(&error, LaunchError::NotStarted { reason, .. } if reason.contains(words)),
            "{words}: {error}"
        );
        assert!(!is_loaded(&run.unit()), "{words}");
        assert!(!identity_path(&run.dir, "probe").exists(), "{words}");
        assert!(launcher.locate(&run.dir, "probe").await.unwrap().is_none(), "{words}");
        assert!(!Path::new(&format!("/run/userdb/{}.user", launch.uid)).exists(), "{words}");
    }
}

/// An agent is killed somewhere in a launch, `after` its first word.
fn killed_agent(launch: &Launch, after: Duration) {
    let program = std::env::current_exe().unwrap().parent().unwrap().join("../examples/launch_unit");
    let mut agent: Child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    agent.stdin.take().unwrap().write_all(&serde_json::to_vec(launch).unwrap()).unwrap();
    let mut word = String::new();
    BufReader::new(agent.stdout.take().unwrap()).read_line(&mut word).unwrap();
    assert_eq!(word, "asking\n");
    std::thread::sleep(after);
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[tokio::test]
#[ignore = "needs systemd as PID 1: runs in the lab"]
async fn an_agent_killed_at_any_instant_leaves_nothing_that_cannot_be_found() {
    let launcher = launcher().await;
    let rounds: u64 = std::env::var("ROUNDS").map_or(60, |n| n.parse().unwrap());
    let (mut adopted, mut nothing, mut late) = (0, 0, 0);
    for round in 0..rounds {
        let run = Run::new();
        let launch = run.launch("/bin/sleep", &["300"]);
        killed_agent(&launch, Duration::from_micros(round * 800_000 / rounds));
        if round % 2 == 0 {
            // A successor that adopts: what it finds is what runs.
            match launcher.locate(&run.dir, "probe").await.unwrap() {
                Some(identity) => {
                    adopted += 1;
                    let process = Process::adopt(&identity).unwrap().expect("found, so it runs");
                    assert_eq!(processes_of(launch.uid), [process.identity().pid], "round {round}");
                }
                None => nothing += 1,
            }
        }
        let gone = run.dir.with_extension("gone");
        fs::rename(&run.dir, &gone).unwrap();
        launcher.end(&gone, "probe", SOON).await.unwrap();
        if processes_of(launch.uid).is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        late += usize::from(!processes_of(launch.uid).is_empty());
        assert!(!is_loaded(&run.unit()), "round {round}");
    }
    println!("{rounds} kills: {adopted} adopted, {nothing} had started nothing");
    assert_eq!(late, 0, "processes that nobody would ever find");
    assert!(rounds < 20 || (adopted > 0 && nothing > 0), "the kills hit both sides: {adopted}, {nothing}");
}
