//! `doctor` and `doctor selftest` as the real binary, on whatever machine this is and against a scripted agent.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests state expectations")]

#[allow(dead_code, reason = "shared with the tests of the other commands, which need more of it")]
mod fake_agent;

use std::{fs, process::Stdio, thread, time::Duration};

use fake_agent::{Answer, Ended, FakeAgent, qudata_agent};
use serde_json::{Value, json};

const ID: &str = "019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01";
const GPU: &str = "0000:65:00.0";

fn host() -> Answer {
    Answer::data(&json!({
        "version": "0.1.0", "started_at": "2026-01-02T09:47:00Z", "standalone": true, "accel": "tcg",
        "firmware": "direct", "tunnel": "none", "listen": "127.0.0.1", "port": 15001, "cpus": 2,
        "memory_total": 1_u64 << 34, "memory_free": 1_u64 << 33, "disk_total": 1_u64 << 38,
        "disk_free": 1_u64 << 37, "instances": 0, "problems": [],
    }))
}

fn gpu(state: &str) -> Value {
    json!({
        "address": GPU, "vendor_id": "10de", "device_id": "2330", "state": state, "since": "2026-01-02T11:46:40Z",
        "rentable": state == "free", "functions": [GPU], "bar_bytes": 0, "reset_methods": ["flr"], "holders": [],
        "driver": "nvidia",
    })
}

fn gpus(list: &[Value]) -> Answer {
    Answer::data(&json!(list))
}

/// Port 1 is nobody's: whoever logs in there is refused at once.
fn instance(state: &str) -> Answer {
    Answer::data(&json!({
        "id": ID, "name": "selftest", "status": "running", "state": state, "since": "2026-01-02T11:46:40Z",
        "ports": { "22": "1" }, "ssh": { "host": "127.0.0.1", "port": 1, "user": "root" },
        "ssh_host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEHOSTKEY", "ssh_keys": [], "cpus": 4,
        "memory": 8_u64 << 30, "storage": 50_u64 << 30, "gpus": [GPU], "created_at": "2026-01-02T11:46:20Z",
        "problems": [], "reason": "the kernel paniced",
    }))
}

fn accepted() -> Answer {
    Answer::data(&json!({ "ports": { "22": "1" }, "id": ID, "name": "selftest" }))
}

fn deleted() -> Answer {
    Answer::data(&json!({ "id": ID, "complete": true }))
}

fn agent(more: Vec<(&str, Vec<Answer>)>) -> FakeAgent {
    let mut script = vec![("GET /host", vec![host()]), ("GET /gpus", vec![gpus(&[gpu("free")])])];
    script.extend(more);
    FakeAgent::start(script)
}

fn verdicts(ended: &Ended) -> Vec<(String, String)> {
    let findings = ended.json()["findings"].as_array().unwrap().clone();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    findings.iter().map(|f| (text(f, "id").replace("selftest.", ""), text(f, "verdict"))).collect()
}

fn expected(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|&(id, verdict)| (id.to_owned(), verdict.to_owned())).collect()
}

#[test]
fn this_machine_is_looked_at_in_time_and_the_exit_tells_the_verdict() {
    let agent = FakeAgent::start(vec![("GET /host", vec![host()]), ("GET /gpus", vec![gpus(&[])])]);
    let ended = agent.run("doctor --json");
    let report = ended.json();
    let failed = report["verdict"] == "fail";
    assert_eq!(ended.code, Some(i32::from(failed)), "{report:#}");
    // 2.5 s are allowed; a machine that is busy with other tests may add its own.
    assert!(report["took_ms"].as_u64().unwrap() < 8000, "{report:#}");
    let strict = agent.run("doctor --strict --quiet");
    assert_eq!(strict.code, Some(i32::from(report["verdict"] != "pass")));
    assert!(!strict.out.contains("PASS"), "{}", strict.out);
    let of_agent: Vec<&Value> =
        report["findings"].as_array().unwrap().iter().filter(|finding| finding["id"] == "agent").collect();
    assert!(of_agent[0]["line"].as_str().unwrap().contains("0.1.0"), "{of_agent:?}");

    // Wherever the settings say it is.
    let socket = agent.dir().join("agent.sock");
    let mut command = qudata_agent(&format!("doctor --json --socket {}", socket.display()));
    let named = Ended::of(command.env("QUDATA_VM_RUN_DIR", "/nonexistent").output().unwrap());
    let findings = named.json()["findings"].as_array().unwrap().clone();
    let of_agent = findings.iter().find(|finding| finding["id"] == "agent").unwrap();
    assert!(of_agent["line"].as_str().unwrap().contains("0.1.0"), "{of_agent}");
}

#[test]
fn settings_that_cannot_be_used_are_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    fs::write(&file, "vm_cpsu = 4\n").unwrap();
    let line = format!("doctor --json --config {}", file.display());
    let mut command = qudata_agent(&line);
    let ended = Ended::of(command.env("QUDATA_VM_RUN_DIR", dir.path()).output().unwrap()).exits(1);
    let first = &ended.json()["findings"][0];
    assert_eq!((&first["id"], &first["verdict"]), (&json!("settings"), &json!("fail")));
    assert!(first["line"].as_str().unwrap().contains("vm_cpsu"), "{first}");
}

#[test]
fn checks_are_listed_and_explained() {
    let list = Ended::of(qudata_agent("doctor --explain").output().unwrap()).exits(0).out;
    assert!(list.contains("iommu.interrupt_remapping") && list.lines().count() >= 39, "{list}");
    let one = Ended::of(qudata_agent("doctor --explain gpu.group").output().unwrap()).exits(0).out;
    assert!(one.starts_with("gpu.group: nothing else"), "{one}");
    let trial = Ended::of(qudata_agent("doctor --json --explain selftest.ready").output().unwrap()).exits(0);
    assert_eq!(trial.json()["id"], "selftest");
    let none = Ended::of(qudata_agent("doctor --explain gpu").output().unwrap()).exits(2);
    assert!(none.err.contains("\"gpu\""), "{}", none.err);
}

#[test]
fn whatever_fails_in_the_guest_everything_is_gone_afterwards() {
    let agent = agent(vec![
        ("POST /instances", vec![accepted()]),
        (&format!("GET /instances/{ID}"), vec![instance("booting"), instance("running")]),
        (
            &format!("DELETE /instances/{ID}"),
            vec![Answer::data(&json!({ "id": ID, "complete": false })), deleted()],
        ),
        (&format!("GET /gpus/{GPU}"), vec![Answer::data(&gpu("sanitizing")), Answer::data(&gpu("free"))]),
    ]);
    let ended = agent.run("doctor selftest --json").exits(1);
    let order = [
        ("create", "pass"),
        ("ready", "pass"),
        ("gpu_seen", "fail"),
        ("deleted", "pass"),
        ("gpu_back", "pass"),
    ];
    assert_eq!(verdicts(&ended), expected(&order), "{ended:?}");
    assert_eq!((&ended.json()["passed"], &ended.json()["gpus"]), (&json!(false), &json!([GPU])));
    let body = agent.body_of("POST /instances");
    assert_eq!((&body["gpu_addrs"], &body["gpus"]), (&json!([GPU]), &Value::Null));
    assert!(body["ssh_pubkeys"][0].as_str().unwrap().starts_with("ssh-ed25519 "), "{body}");
    assert!(body.get("tunnel_token").is_none(), "{body}");
}

#[test]
fn an_instance_that_fails_to_boot_is_told_with_its_reason_and_kept_if_that_is_wanted() {
    let script = || {
        vec![("POST /instances", vec![accepted()])]
            .into_iter()
            .chain([("GET /instances/019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01", vec![instance("failed")])])
            .collect::<Vec<_>>()
    };
    // No DELETE is scripted: one would fail the test.
    let kept = agent(script()).run("doctor selftest --keep").exits(1).out;
    assert!(kept.contains("FAIL  selftest.ready") && kept.contains("the kernel paniced"), "{kept}");
    assert!(kept.contains("kept: selftest-"), "{kept}");
}

#[test]
fn gpus_that_cannot_be_tried_are_told_and_left_alone() {
    let mut refused = gpu("free");
    refused["refusal"] = json!({
        "code": "held", "message": "GPU is in use by Xorg", "remedy": "stop Xorg", "since": "2026-01-02T11:46:40Z",
        "by_choice": false,
    });
    for (view, verdict, words, code) in [
        (refused, "fail", "in use by Xorg", 1),
        (gpu("quarantined"), "fail", "quarantined", 1),
        (gpu("in_use"), "warn", "an instance has it", 1),
    ] {
        let agent = FakeAgent::start(vec![("GET /host", vec![host()]), ("GET /gpus", vec![gpus(&[view])])]);
        // An order would fail the test.
        let ended = agent.run("doctor selftest --json").exits(code);
        assert_eq!(verdicts(&ended), expected(&[("create", verdict)]));
        let line = ended.json()["findings"][0]["line"].as_str().unwrap().to_owned();
        assert!(line.contains(words), "{line}");
    }
    let refusal = Answer::error(507, "no_memory", "not enough memory: 8192M wanted, 0M free on this host");
    let ended = agent(vec![("POST /instances", vec![refusal])]).run("doctor selftest --json").exits(1);
    assert_eq!(verdicts(&ended), expected(&[("create", "fail")]));
    agent(Vec::new()).run("doctor selftest --gpu 66:00.0").exits(4);
}

#[test]
fn an_interruption_leaves_nothing_behind() {
    let agent = agent(vec![
        ("POST /instances", vec![accepted()]),
        (&format!("GET /instances/{ID}"), vec![instance("booting")]),
        (&format!("DELETE /instances/{ID}"), vec![deleted()]),
        (&format!("GET /gpus/{GPU}"), vec![Answer::data(&gpu("free"))]),
    ]);
    let mut command = agent.command("doctor selftest");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while !agent.asked().iter().any(|asked| asked.call == format!("GET /instances/{ID}")) {
        thread::sleep(Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = Ended::of(child.wait_with_output().unwrap()).exits(7);
    assert!(ended.err.contains("interrupted") && ended.err.contains("was deleted"), "{}", ended.err);
    assert!(agent.asked().iter().any(|asked| asked.call == format!("DELETE /instances/{ID}")));
}

#[test]
fn a_look_that_hangs_is_left_and_keeps_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("agent.toml");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // `output` reads to the end of both outputs, so the process that hangs must not have them.
    let words = format!("doctor --json --config {}", pipe.display());
    let ended = Ended::of(qudata_agent(&words).output().unwrap());
    // Lets go of the one that hangs.
    drop(fs::OpenOptions::new().write(true).open(&pipe));
    let report = ended.exits(0).json();
    assert_eq!((&report["verdict"], &report["fail"]), (&json!("warn"), &json!(0)), "{report}");
}
