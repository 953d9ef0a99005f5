//! Every command of the real binary against a scripted agent: what it asks, what it prints, how it ends.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests state expectations")]

mod fake_agent;
#[path = "commands/gpus.rs"]
mod gpus;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    process::Stdio,
    time::Instant,
};

use fake_agent::{Answer, Ended, FakeAgent, qudata_agent};
use serde_json::{Value, json};

const A: &str = "019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01";
const B: &str = "019b7f3a-64d8-7a10-8b3f-0c9e2d4f6a12";

fn instance(name: &str, id: &str) -> Value {
    json!({
        "id": id, "name": name, "status": "running", "state": "running", "since": "2026-01-02T11:46:40Z",
        "ports": { "22": "10001", "8888": "20000" },
        "ssh": { "host": "127.0.0.1", "port": 10001, "user": "root" },
        "ssh_host_key": "ssh-ed25519 AAAAHOSTKEY", "ssh_keys": ["SHA256:abc"],
        "cpus": 4, "memory": 8_u64 << 30, "storage": 50_u64 << 30, "gpus": [],
        "created_at": "2026-01-02T11:46:20Z", "ready_at": "2026-01-02T11:46:38Z", "problems": [],
    })
}

fn listed(instances: &[Value]) -> Answer {
    Answer::data(&json!({ "status": "running", "instances": instances }))
}

/// An agent with one instance, `web`, that also answers these calls.
fn with_web(more: Vec<(&str, Vec<Answer>)>) -> FakeAgent {
    let mut script = vec![("GET /instances", vec![listed(&[instance("web", A)])])];
    script.extend(more);
    FakeAgent::start(script)
}

fn events(list: &[(u64, &str, &str)]) -> Answer {
    let text = |(seq, phase, message): &(u64, &str, &str)| {
        let event = json!({
            "seq": seq, "at": "2026-01-02T11:46:40Z", "elapsed_ms": seq * 1000, "phase": phase, "message": message,
        });
        format!("id: {seq}\nevent: phase\ndata: {event}\n\n")
    };
    let stream: String = list.iter().map(text).collect();
    Answer::raw(200, &format!(": hello\n\n{stream}"))
}

fn created() -> Answer {
    Answer::data(
        &json!({ "ports": { "22": "10001" }, "id": A, "name": "web", "warnings": ["image is not used"] }),
    )
}

fn host(problems: &Value) -> Answer {
    Answer::data(&json!({
        "version": "0.1.0", "started_at": "2026-01-02T09:47:00Z", "standalone": true, "accel": "tcg",
        "firmware": "direct", "tunnel": "none", "listen": "127.0.0.1", "port": 15001, "cpus": 2,
        "memory_total": 1_u64 << 34, "memory_free": 1_u64 << 33, "disk_total": 1_u64 << 38,
        "disk_free": 1_u64 << 37, "instances": 1, "problems": problems,
    }))
}

#[test]
fn list_and_show() {
    let view = Answer::data(&instance("web", A));
    let agent = with_web(vec![(&format!("GET /instances/{A}"), vec![view])]);
    let table = agent.run("instance list").exits(0).out;
    assert!(table.starts_with("NAME  STATE") && table.contains("22→10001 8888→20000"), "{table}");
    assert_eq!(agent.run("--json instance list").exits(0).json()["instances"][0]["name"], "web");
    for name in ["", "web", A, "019b"] {
        let shown = agent.run(&format!("instance show {name}")).exits(0).out;
        assert!(shown.contains("ssh -p 10001 root@127.0.0.1"), "{shown}");
    }
    assert_eq!(agent.run("instance show --json").exits(0).json(), instance("web", A));
}

#[test]
fn an_instance_that_is_not_clear_is_not_guessed() {
    let two = listed(&[instance("web", A), instance("db", B)]);
    let agent = FakeAgent::start(vec![("GET /instances", vec![two])]);
    for (wish, code) in [("", 5), ("019b7f3a", 5), ("nothing", 4), ("019c", 4)] {
        let ended = agent.run(&format!("instance stop {wish}")).exits(code);
        assert!(
            ended.err.contains(&format!("web  {A}")) && ended.err.contains(&format!("db   {B}")),
            "{ended:?}"
        );
    }
    let nobody = FakeAgent::start(vec![("GET /instances", vec![listed(&[])])]);
    assert!(nobody.run("instance delete --yes").exits(4).err.contains("instance create"));
}

#[test]
fn every_refusal_has_its_exit_code() {
    let table = [
        (400, "malformed_body", 1),
        (400, "invalid_field", 2),
        (401, "secret_missing", 3),
        (403, "forbidden", 3),
        (404, "no_such_instance", 4),
        (404, "no_such_gpu", 4),
        (404, "no_such_path", 1),
        (405, "method_not_allowed", 1),
        (408, "request_timeout", 1),
        (409, "ambiguous_instance", 5),
        (409, "wrong_state", 5),
        (409, "gpu_taken", 5),
        (409, "gpu_unfit", 5),
        (409, "port_taken", 5),
        (413, "body_too_large", 2),
        (431, "header_too_large", 2),
        (500, "internal", 1),
        (500, "host_fault", 1),
        (502, "guest_fault", 1),
        (503, "busy", 5),
        (507, "no_gpu", 6),
        (507, "no_memory", 6),
        (507, "no_disk", 6),
        (507, "no_cpus", 6),
    ];
    for (status, code, exit) in table {
        let agent =
            FakeAgent::start(vec![("POST /instances", vec![Answer::error(status, code, "because of this")])]);
        let ended = agent.run("instance create --no-wait").exits(exit);
        assert!(ended.err.contains("error: because of this") && ended.out.is_empty(), "{code}: {ended:?}");
    }
}

#[test]
fn create_shows_the_way_to_ready() {
    let phases = events(&[(1, "accepted", ""), (2, "qemu_started", ""), (3, "ready", "")]);
    let agent = FakeAgent::start(vec![
        ("POST /instances", vec![created()]),
        (&format!("GET /instances/{A}/events"), vec![phases.and_hang()]),
        (&format!("GET /instances/{A}"), vec![Answer::data(&instance("web", A))]),
    ]);
    fs::create_dir(agent.dir().join(".ssh")).unwrap();
    fs::write(agent.dir().join(".ssh/id_ed25519.pub"), "ssh-ed25519 AAAA me\n").unwrap();
    let ended = agent.run("instance create --name web --port 8888 --memory 8G").exits(0);
    assert_eq!(
        agent.body_of("POST /instances"),
        json!({ "name": "web", "memory": "8G", "ports": [8888], "ssh_enabled": true,
                "ssh_pubkeys": ["ssh-ed25519 AAAA me"] })
    );
    let phases: Vec<_> = ended.err.lines().map(str::trim).collect();
    assert_eq!(
        phases,
        [
            "note: image is not used",
            &format!("web ({A})"),
            "1.0 s  accepted",
            "2.0 s  QEMU started",
            "3.0 s  ready"
        ]
    );
    assert!(ended.out.contains("web is ready") && ended.out.contains("8888 → 127.0.0.1:20000"), "{ended:?}");

    let ended = agent.run("instance create --json").exits(0);
    assert_eq!(ended.json()["id"], A, "data only on standard output");
}

#[test]
fn create_without_waiting() {
    let agent = FakeAgent::start(vec![("POST /instances", vec![created()])]);
    let ended = agent.run("instance create --no-wait").exits(0);
    assert_eq!(ended.out, "web is accepted\n");
    assert!(ended.err.contains("no SSH key") && ended.err.contains("events --follow web"), "{ended:?}");
    assert_eq!(agent.asked().len(), 1);
}

#[test]
fn create_tells_why_it_failed() {
    let ends = [
        (
            events(&[(1, "accepted", ""), (2, "failed", "no sign of life for 600 s")]),
            1,
            "no sign of life for 600 s",
        ),
        (events(&[(1, "stopped", "powered off from inside")]), 1, "powered off"),
        (events(&[(1, "deleting", "")]), 1, "is being deleted"),
        (events(&[(1, "accepted", "")]).and_hang(), 7, "goes on booting"),
    ];
    for (phases, code, sentence) in ends {
        let agent = FakeAgent::start(vec![
            ("POST /instances", vec![created()]),
            (&format!("GET /instances/{A}/events"), vec![phases]),
        ]);
        let ended = agent.run("instance create --wait 1 --json").exits(code);
        assert!(ended.err.contains(sentence), "{ended:?}");
        assert_eq!(ended.json()["id"], A, "a script knows the id whatever happens");
    }
}

#[test]
fn create_survives_an_agent_that_is_restarted() {
    let first = events(&[(1, "accepted", ""), (2, "booting", "")]);
    // A broken connection: the same agent has the same history, of which nothing may be told twice.
    let again = events(&[(1, "accepted", ""), (2, "booting", ""), (3, "guest_up", "")]);
    // A new agent counts anew, and adopts what was ready without saying so again.
    let new = events(&[(1, "adopted", "")]).later().and_hang();
    let agent = FakeAgent::start(vec![
        ("POST /instances", vec![created()]),
        (&format!("GET /instances/{A}/events"), vec![first, again, new]),
        (&format!("GET /instances/{A}"), vec![Answer::data(&instance("web", A))]),
    ]);
    let ended = agent.run("instance create").exits(0);
    let phases: Vec<_> =
        ended.err.lines().skip(3).filter_map(|l| l.split_once(" s  ")).map(|(_, p)| p).collect();
    assert_eq!(phases, ["accepted", "booting", "guest up", "adopted"], "{ended:?}");
}

#[test]
fn an_interrupted_wait_says_that_the_work_goes_on() {
    let agent = FakeAgent::start(vec![
        ("POST /instances", vec![created()]),
        (&format!("GET /instances/{A}/events"), vec![events(&[(1, "accepted", "")]).and_hang()]),
    ]);
    let mut command = agent.command("instance create");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Once the first phase is shown, the wait has begun.
    let mut shown = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(shown.by_ref().any(|l| l.contains("accepted")));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let rest: Vec<_> = shown.collect();
    assert_eq!(child.wait().unwrap().code(), Some(7), "{rest:?}");
    assert!(rest.join(" ").contains("events --follow web"), "{rest:?}");
}

#[test]
fn create_ends_when_the_instance_is_gone() {
    let gone = Answer::error(404, "no_such_instance", "there is no such instance");
    let agent = FakeAgent::start(vec![
        ("POST /instances", vec![created()]),
        (&format!("GET /instances/{A}/events"), vec![events(&[(1, "accepted", "")]), gone]),
    ]);
    assert!(agent.run("instance create").exits(4).err.contains("deleted before it was ready"));
}

#[test]
fn start_stop_and_restart() {
    let call = format!("PUT /instances/{A}");
    for (line, command) in [("start", "start"), ("stop web", "stop"), ("restart web --yes", "restart")] {
        let agent = with_web(vec![(&call, vec![Answer::data(&json!({ "id": A, "state": "paused" }))])]);
        let ended = agent.run(&format!("instance {line}")).exits(0);
        assert_eq!(ended.out, "web is paused\n");
        assert_eq!(agent.body_of(&call), json!({ "command": command }));
    }
    let agent = with_web(vec![(&call, vec![Answer::data(&json!({ "id": A, "state": "paused" }))])]);
    assert_eq!(agent.run("instance stop --json").exits(0).json()["state"], "paused");
}

#[test]
fn what_destroys_asks_first() {
    let agent = with_web(vec![]);
    for verb in ["delete", "restart"] {
        let ended = agent.run(&format!("instance {verb} web")).exits(2);
        assert!(ended.err.contains("instance web (") && ended.err.contains("--yes"), "{ended:?}");
    }
    assert!(agent.asked().iter().all(|a| a.call == "GET /instances"), "{:?}", agent.asked());
}

#[test]
fn delete_tells_what_is_left() {
    let call = format!("DELETE /instances/{A}");
    let view = format!("GET /instances/{A}");
    let clean = Answer::data(&json!({ "id": A, "complete": true }));
    let agent = with_web(vec![(&call, vec![clean])]);
    assert_eq!(agent.run("instance delete web --yes").exits(0).out, "web is deleted\n");

    let residue = Answer::data(&json!({ "id": A, "complete": false, "residues": ["disk: device is busy"] }));
    let agent = with_web(vec![(&call, vec![residue])]);
    assert!(agent.run("instance delete -y").exits(1).err.contains("disk: device is busy"));

    let underway = Answer::data(&json!({ "id": A, "complete": false }));
    let gone = Answer::error(404, "no_such_instance", "there is no such instance");
    let still = Answer::data(&instance("web", A));
    let agent = with_web(vec![(&call, vec![underway]), (&view, vec![still, gone])]);
    assert_eq!(agent.run("instance delete -y --json").exits(0).json(), json!({ "id": A, "complete": true }));
}

#[test]
fn keys_are_added_and_removed() {
    for (verb, method) in [("add", "POST"), ("remove", "DELETE")] {
        let call = format!("{method} /instances/{A}/ssh");
        let agent = with_web(vec![(&call, vec![Answer::done()])]);
        let file = agent.dir().join("key.pub");
        fs::write(&file, "ssh-ed25519 AAAA me\n").unwrap();
        let ended = agent.run(&format!("instance key {verb} {} web", file.display())).exits(0);
        assert!(ended.out.ends_with("log in to web\n"), "{ended:?}");
        assert_eq!(agent.body_of(&call), json!({ "ssh_pubkey": "ssh-ed25519 AAAA me" }));
        agent.run(&format!("instance key {verb} {}/no.pub", agent.dir().display())).exits(2);
    }
}

#[test]
fn console_once_and_followed() {
    let call = format!("GET /instances/{A}/console");
    let agent = with_web(vec![
        (&call, vec![Answer::raw(200, "boot\n\x1b[1mlogin")]),
        (&format!("{call}?tail=5"), vec![Answer::raw(200, "login")]),
    ]);
    assert_eq!(
        agent.run("instance console").exits(0).out,
        "boot\n\x1b[1mlogin",
        "piped output is left alone"
    );
    assert_eq!(agent.run("instance console --tail 5").exits(0).out, "login");
    assert_eq!(agent.run("instance console --json").exits(0).json()["console"], "boot\n\x1b[1mlogin");

    let gone = Answer::error(404, "no_such_instance", "there is no such instance");
    let grown = Answer::raw(200, "boot\nlogin: root\n");
    let agent = with_web(vec![
        (&call, vec![Answer::raw(200, "boot\nlogin")]),
        (&format!("{call}?tail=131072"), vec![grown, gone]),
    ]);
    assert_eq!(agent.run("instance console -f").exits(0).out, "boot\nlogin: root\n");
}

#[test]
fn events_end_with_the_history_unless_followed() {
    let call = format!("GET /instances/{A}/events");
    let history = events(&[(1, "accepted", ""), (2, "ready", "in time")]);
    let agent = with_web(vec![(&call, vec![history.clone().and_hang()])]);
    let out = agent.run("instance events").exits(0).out;
    assert_eq!(out, "      1.0 s  accepted\n      2.0 s  ready             in time\n");
    let json = agent.run("instance events --json").exits(0).out;
    let seqs: Vec<Value> =
        json.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["seq"].clone()).collect();
    assert_eq!(seqs, [1, 2]);

    let gone = Answer::error(404, "no_such_instance", "there is no such instance");
    let agent = with_web(vec![(&call, vec![history, gone])]);
    assert_eq!(
        agent.run("instance events --follow").exits(0).out.lines().count(),
        2,
        "ends with the instance"
    );
}

#[test]
fn ssh_takes_our_place() {
    let agent = with_web(vec![]);
    let bin = agent.dir().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("ssh"), "#!/bin/sh\nfor a; do echo \"$a\"; done\nexit 42\n").unwrap();
    fs::set_permissions(bin.join("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    let output = agent.command("instance ssh web -- echo hello").env("PATH", &bin).output().unwrap();
    let ended = Ended::of(output).exits(42);
    let arguments: Vec<_> = ended.out.lines().collect();
    assert!(arguments.contains(&"StrictHostKeyChecking=yes"));
    assert!(arguments.contains(&format!("KnownHostsCommand=/bin/echo {A} ssh-ed25519 AAAAHOSTKEY").as_str()));
    assert_eq!(arguments[arguments.len() - 4..], ["--", "127.0.0.1", "echo", "hello"]);

    let output = agent.command("instance ssh web").env("PATH", "/nowhere").output().unwrap();
    assert!(Ended::of(output).exits(1).err.contains("openssh-client"));

    let mut closed = instance("web", A);
    closed.as_object_mut().unwrap().remove("ssh");
    let agent = FakeAgent::start(vec![("GET /instances", vec![listed(&[closed])])]);
    assert!(agent.run("instance ssh").exits(5).err.contains("does not publish port 22"));
}

#[test]
fn status_fails_when_something_is_wrong() {
    let problem = json!([{ "code": "disk_low", "message": "3 GiB are left", "remedy": "delete something",
                           "since": "2026-01-02T11:57:00Z" }]);
    for (problems, code, word) in [(json!([]), 0, "fine"), (problem, 1, "1 problem")] {
        let agent = with_web(vec![
            ("GET /host", vec![host(&problems)]),
            ("GET /gpus", vec![Answer::data(&json!([]))]),
        ]);
        let out = agent.run("status").exits(code).out;
        assert!(out.starts_with(&format!("● qudata-agent 0.1.0: {word}\n")), "{out}");
        assert_eq!(out.contains("→ delete something"), code == 1, "{out}");
        let json = agent.run("status --json").exits(code).json();
        assert_eq!(json["instances"][0]["name"], "web");
    }
}

#[test]
fn an_agent_that_cannot_be_reached() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let line = format!("status --socket {}", socket.display());
    let expected = format!(
        "error: the agent does not answer at {}: systemctl status qudata-agent, or start it with `qudata-agent serve`\n",
        socket.display()
    );
    assert_eq!(Ended::of(qudata_agent(&line).output().unwrap()).exits(3).err, expected);
    // A socket that an agent left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert_eq!(Ended::of(qudata_agent(&line).output().unwrap()).exits(3).err, expected);
    let default = Ended::of(qudata_agent("status").output().unwrap()).exits(3).err;
    assert!(default.contains("/var/run/qudata/agent.sock"), "{default}");
}

#[test]
fn an_agent_that_says_nothing_or_nonsense() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("mute.sock");
    let _mute = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let started = Instant::now();
    let mut command = qudata_agent("instance list --socket");
    let ended = Ended::of(command.arg(&socket).output().unwrap()).exits(3);
    assert!(ended.err.contains("no answer within 10 s") && started.elapsed().as_secs() < 20, "{ended:?}");

    let agent = FakeAgent::start(vec![("GET /instances", vec![Answer::raw(200, "<html>")])]);
    assert!(agent.run("instance list").exits(1).err.contains("same version"));
    let agent = FakeAgent::start(vec![("GET /instances", vec![Answer::raw(502, "Bad Gateway")])]);
    assert!(agent.run("instance list").exits(1).err.contains("502"));
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let many: Vec<_> = (0..2000).map(|_| instance("web", A)).collect();
    let agent = FakeAgent::start(vec![("GET /instances", vec![listed(&many)])]);
    let mut command = agent.command("instance list --json");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = Ended::of(child.wait_with_output().unwrap()).exits(0);
    assert_eq!(ended.err, "");
}

#[test]
fn serve_names_every_wrong_setting_and_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = qudata_agent("serve --standalone");
    command.env("QUDATA_DATA_DIR", dir.path()).env("QUDATA_ACEL", "tcg").env("QUDATA_VM_CPUS", "many");
    let ended = Ended::of(command.output().unwrap()).exits(1);
    assert!(ended.err.contains("QUDATA_ACEL") && ended.err.contains("QUDATA_VM_CPUS"), "{ended:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");

    let ended = Ended::of(qudata_agent("serve --config /no/such/agent.toml").output().unwrap()).exits(1);
    assert!(ended.err.contains("/no/such/agent.toml") && ended.err.contains("No such file"), "{ended:?}");

    let mut command = qudata_agent("serve --standalone");
    command.env("QUDATA_DATA_DIR", dir.path()).env("QUDATA_LOG", "a=b=c");
    assert!(Ended::of(command.output().unwrap()).exits(1).err.contains("QUDATA_LOG"));
}

#[test]
fn documents_come_from_the_binary() {
    for shell in ["bash", "zsh", "fish"] {
        let out = Ended::of(qudata_agent(&format!("completions {shell}")).output().unwrap()).exits(0).out;
        assert!(out.contains("no-wait") && !out.contains("launch-shim"), "{shell}");
    }
    let out = Ended::of(qudata_agent("settings --json").output().unwrap()).exits(0).json();
    assert!(
        out.as_array().unwrap().iter().any(|s| s["variable"] == "QUDATA_ACCEL" && s["key"] == "accel"),
        "{out}"
    );
    let dir = tempfile::tempdir().unwrap();
    let mut command = qudata_agent("man");
    Ended::of(command.arg(dir.path()).output().unwrap()).exits(0);
    assert!(dir.path().join("qudata-agent-instance-ssh.1").exists());
}

#[test]
fn the_shim_is_the_first_word_and_nothing_else() {
    // Without a launch on its input it gives up, and says so on its report pipe.
    let ended = Ended::of(qudata_agent("launch-shim").output().unwrap()).exits(127);
    assert!(ended.out.contains("launch"), "{ended:?}");
    Ended::of(qudata_agent("--json launch-shim").output().unwrap()).exits(2);
}
