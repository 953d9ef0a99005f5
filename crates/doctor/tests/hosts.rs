//! Whole looks at hosts that are folders: what is missing, broken or hangs is told, in time.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests state expectations")]

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixListener,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qudata_agent_core::settings::{LoadFrom, Settings};
use qudata_doctor::{Finding, Report, Scope, Verdict, examine, explain};
use qudata_testkit::pci::{Device, FakeHost};
use tokio::sync::Mutex;

const FIRST: &str = "0000:01:00.0";
const SECOND: &str = "0000:02:00.0";

/// Settings that need nothing of the machine that runs the test.
fn settings(more: &[(&str, &str)]) -> Settings {
    let nowhere = ["QUDATA_QEMU_BINARY", "QUDATA_QEMU_IMG", "QUDATA_PASST_BINARY", "QUDATA_FRPC_BINARY"];
    let env = nowhere.map(|name| (name, "/nonexistent/program"));
    let env = env.iter().chain(&[("QUDATA_STANDALONE", "true")]).chain(more);
    let from = LoadFrom {
        file: None,
        env: env.map(|(name, value)| (name.into(), value.into())).collect(),
        flags: Vec::new(),
        read: &|_| Err(io::ErrorKind::NotFound.into()),
        exists: &|_| false,
    };
    Settings::load(&from).unwrap()
}

/// One look at a time. Each starts programs, and a process that is just being made has a copy of every socket of this one:
/// a listener that another test has closed would go on taking connections. And each has to be done in time.
static ALONE: Mutex<()> = Mutex::const_new(());

async fn look(root: &Path, settings: &Settings) -> Report {
    let _alone = ALONE.lock().await;
    let scope = Scope { root: root.to_owned(), patience: Duration::from_millis(1500), ..Scope::default() };
    let begun = Instant::now();
    let report = examine(settings, &scope).await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    for finding in &report.findings {
        assert!(finding.verdict != Verdict::Fail || finding.remedy.is_some(), "{finding:?}");
    }
    report
}

fn of<'a>(report: &'a Report, id: &str, subject: Option<&str>) -> &'a Finding {
    let found = report.of(id).find(|finding| subject.is_none() || finding.subject.as_deref() == subject);
    found.unwrap_or_else(|| panic!("no {id} of {subject:?}: {:#?}", report.findings))
}

fn two_gpus() -> FakeHost {
    let host = FakeHost::with([Device::gpu(FIRST).group(1), Device::gpu(SECOND).group(2)]).unwrap();
    host.file("proc/sys/kernel/osrelease", "6.1.0-37-amd64\n").unwrap();
    host.file(
        "proc/cpuinfo",
        "vendor_id\t: AuthenticAMD\nflags\t: lm svm pdpe1gb\naddress sizes\t: 48 bits physical\n",
    )
    .unwrap();
    host
}

#[tokio::test]
async fn an_empty_folder_is_a_host_without_anything_and_no_crash() {
    let dir = tempfile::tempdir().unwrap();
    let report = look(dir.path(), &settings(&[])).await;
    assert_eq!(report.verdict(), Verdict::Fail);
    for (id, verdict) in [
        ("cpu.virtualization", Verdict::Warn),
        ("kvm.device", Verdict::Fail),
        ("gpu.present", Verdict::Warn),
        ("qemu.version", Verdict::Fail),
        ("image", Verdict::Fail),
        ("ovmf", Verdict::Fail),
        ("agent", Verdict::Warn),
    ] {
        assert_eq!(of(&report, id, None).verdict, verdict, "{id}");
    }
    let ids: Vec<_> =
        explain::ALL.iter().filter(|check| check.id != "selftest").map(|check| check.id).collect();
    assert!(ids.iter().all(|id| report.of(id).count() > 0));
}

#[tokio::test]
async fn gpus_are_judged_by_what_the_kernel_shows() {
    let host = two_gpus();
    let report = look(host.root(), &settings(&[])).await;
    assert!(of(&report, "gpu.present", None).line.starts_with("2 GPUs to be rented"));
    for id in ["iommu.enabled", "iommu.interrupt_remapping"] {
        assert_eq!(of(&report, id, None).verdict, Verdict::Pass, "{id}");
    }
    for id in ["gpu.power", "gpu.group", "gpu.driver", "gpu.holders", "gpu.reset", "gpu.bars"] {
        for gpu in [FIRST, SECOND] {
            let found = of(&report, id, Some(gpu));
            assert_eq!(found.verdict, Verdict::Pass, "{found:?}");
        }
    }
    host.move_to_driver(FIRST, Some("nouveau"))
        .or_else(|_| {
            host.add_driver("nouveau")?;
            host.move_to_driver(FIRST, Some("nouveau"))
        })
        .unwrap();
    host.set_interrupt_remapping(false).unwrap();
    let report = look(host.root(), &settings(&[])).await;
    assert_eq!(of(&report, "gpu.driver", Some(FIRST)).verdict, Verdict::Fail);
    assert_eq!(of(&report, "gpu.driver", Some(SECOND)).verdict, Verdict::Pass);
    assert_eq!(of(&report, "iommu.interrupt_remapping", None).verdict, Verdict::Fail);
}

#[tokio::test]
async fn a_file_that_hangs_costs_its_gpu_alone() {
    let host = two_gpus();
    host.wedge(SECOND).unwrap();
    let report = look(host.root(), &settings(&[])).await;
    assert_eq!(of(&report, "gpu.power", Some(SECOND)).verdict, Verdict::Pass, "what hangs is not read");
    let config = host.device_dir(SECOND).join("config");
    let relative = config.strip_prefix(host.root()).unwrap().to_owned();
    std::fs::remove_file(&config).unwrap();
    host.hang(&relative).unwrap();
    let report = look(host.root(), &settings(&[])).await;
    let hung = of(&report, "gpu.power", Some(SECOND));
    assert!(hung.verdict == Verdict::Warn && hung.line.contains("no answer within 1.5 s"), "{hung:?}");
    assert_eq!(of(&report, "gpu.power", Some(FIRST)).verdict, Verdict::Pass);
}

#[tokio::test]
async fn what_hangs_is_told_as_neither_well_nor_missing() {
    let host = two_gpus();
    std::fs::create_dir_all(host.path("run/systemd/system")).unwrap();
    for file in ["proc/sys/kernel/osrelease", "etc/nsswitch.conf"] {
        host.hang(file).unwrap();
    }
    let report = look(host.root(), &settings(&[("QUDATA_LAUNCHER", "systemd")])).await;
    for id in ["kernel.version", "secure_boot", "nss_systemd"] {
        let found = of(&report, id, None);
        let late = found.verdict == Verdict::Warn && found.line.contains("no answer within 1.5 s");
        assert!(late, "{found:?}");
    }
}

/// As on a file system of the network whose server is away.
#[tokio::test]
async fn an_image_that_hangs_costs_its_own_finding_alone() {
    let host = two_gpus();
    for file in ["disk.raw", "disk.vmlinuz", "disk.initrd"] {
        host.file(format!("images/{file}"), "x").unwrap();
    }
    host.hang("images/disk.cmdline").unwrap();
    for file in ["agent_id", "agent_secret"] {
        host.file(format!("data/{file}"), "x").unwrap();
    }
    let (url, server) = control_plane();
    let settings = settings(&[
        ("QUDATA_STANDALONE", "false"),
        ("QUDATA_FRP_SERVER", "127.0.0.1"),
        ("QUDATA_SERVICE_URL", &url),
        ("QUDATA_FIRMWARE", "direct"),
        ("QUDATA_BASE_IMAGE", "/images/disk.raw"),
        ("QUDATA_DATA_DIR", "/data"),
    ]);
    let report = look(host.root(), &settings).await;
    server.join().unwrap();
    let image = of(&report, "image", None);
    assert!(image.verdict == Verdict::Warn && image.line.contains("no answer within 1.5 s"), "{image:?}");
    let reached = of(&report, "control_plane", None);
    assert_eq!(reached.verdict, Verdict::Pass, "its key is on another file system: {reached:?}");
}

/// An agent that says nothing for a while and then tells of its host and of its GPUs once.
fn agent(listener: UnixListener, silent: Duration) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(silent);
        let data = serde_json::json!({
            "version": "9.9.9", "instances": 1, "problems": [],
        });
        let gpus = serde_json::json!([
            { "address": FIRST, "state": "in_use", "instance": "019b7f3a" },
            { "address": SECOND, "state": "quarantined", "why": "its link is worse" },
        ]);
        let mut answered = 0;
        while answered < 2 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut head = [0; 4096];
            let read = stream.read(&mut head).unwrap();
            let head = String::from_utf8_lossy(&head[..read]).into_owned();
            // Somebody who only tries whether anybody listens.
            if head.is_empty() {
                continue;
            }
            let data = if head.starts_with("GET /host ") { &data } else { &gpus };
            let body = serde_json::json!({ "ok": true, "data": data }).to_string();
            let told = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            // Not where nobody waits for it any more.
            answered += i32::from(told.is_ok());
        }
    })
}

/// On a busy host the look at everything may be what makes it late, and late is no fault of it.
#[tokio::test]
async fn slow_an_agent_that_is_late_is_asked_a_second_time() {
    let host = two_gpus();
    std::fs::create_dir_all(host.path("var/run/qudata")).unwrap();
    let socket = host.path("var/run/qudata/agent.sock");
    let server = agent(UnixListener::bind(&socket).unwrap(), Duration::from_secs(2));
    let report = look(host.root(), &settings(&[])).await;
    server.join().unwrap();
    assert!(of(&report, "gpu.holders", Some(FIRST)).line.contains("in use by instance 019b7f3a"));
}

#[tokio::test]
async fn a_running_agent_is_asked_and_a_dead_one_noticed() {
    let host = two_gpus();
    std::fs::create_dir_all(host.path("var/run/qudata")).unwrap();
    let socket = host.path("var/run/qudata/agent.sock");
    let server = agent(UnixListener::bind(&socket).unwrap(), Duration::ZERO);
    let report = look(host.root(), &settings(&[])).await;
    server.join().unwrap();
    let quarantined = of(&report, "agent", Some(SECOND));
    assert!(
        quarantined.verdict == Verdict::Fail && quarantined.line.contains("link is worse"),
        "{quarantined:?}"
    );
    assert!(of(&report, "gpu.holders", Some(FIRST)).line.contains("in use by instance 019b7f3a"));
    // The listener is gone, its socket is not.
    let report = look(host.root(), &settings(&[])).await;
    assert!(of(&report, "agent", None).line.contains("nobody listens"), "{:?}", of(&report, "agent", None));
}

/// A service that answers one request, and what it was asked.
fn control_plane() -> (String, thread::JoinHandle<String>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://127.0.0.1:{}/v0", listener.local_addr().unwrap().port());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 4096];
        let read = stream.read(&mut head).unwrap();
        stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").unwrap();
        String::from_utf8_lossy(&head[..read]).into_owned()
    });
    (url, server)
}

#[tokio::test]
async fn a_control_plane_that_answers_anything_is_reached() {
    let (url, server) = control_plane();
    let host = two_gpus();
    let of_service = |url: &str| {
        settings(&[
            ("QUDATA_STANDALONE", "false"),
            ("QUDATA_TUNNEL", "none"),
            ("QUDATA_SERVICE_URL", url),
            ("QUDATA_API_KEY", "ak-0123456789abcdef0123456789abcdef"),
        ])
    };
    let report = look(host.root(), &of_service(&url)).await;
    let asked = server.join().unwrap();
    assert!(asked.starts_with("GET /v0/ping HTTP/1.1\r\n") && !asked.contains("ak-0123"), "{asked}");
    assert_eq!(
        of(&report, "control_plane", None).verdict,
        Verdict::Pass,
        "{:?}",
        of(&report, "control_plane", None)
    );
    // Nobody listens there any more.
    let report = look(host.root(), &of_service(&url)).await;
    let found = of(&report, "control_plane", None);
    assert!(found.verdict == Verdict::Fail && found.line.contains("cannot connect"), "{found:?}");
}
