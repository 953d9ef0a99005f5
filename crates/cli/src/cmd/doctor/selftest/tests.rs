//! Orders whose answers are lost, against an agent that drops them.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};

use super::*;

const ID: &str = "019b7f3a-1b00-7c2e-9d41-5f0a3b6c7d01";
const GPU: &str = "0000:65:00.0";
const SINCE: &str = "2026-01-02T11:46:40Z";

/// What the agent does with an order.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    /// Makes the instance and goes away before it answers.
    MadeAndLost,
    /// Goes away before it makes anything.
    Lost,
    /// Says no.
    Refused,
}

#[derive(Debug, Default)]
struct Heard {
    calls: Vec<String>,
    /// The name in the order, while the instance is there.
    instance: Option<String>,
    /// Calls that are still dropped after an order: it is restarting.
    away: usize,
}

struct FakeAgent {
    dir: tempfile::TempDir,
    heard: Arc<Mutex<Heard>>,
}

impl FakeAgent {
    fn start(order: Order) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket(dir.path())).unwrap();
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let shared = heard.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(stream, order, &mut shared.lock().unwrap());
            }
        });
        Self { dir, heard }
    }

    async fn selftest(&self) -> SelftestReport {
        let wish =
            SelftestWish { gpus: Vec::new(), keep: false, timeout: Duration::from_secs(30), tell: &|_| {} };
        selftest(&Agent::at(Some(socket(self.dir.path()))), wish).await.unwrap()
    }

    fn asked(&self, call: &str) -> bool {
        self.heard.lock().unwrap().calls.iter().any(|asked| asked == call)
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

fn serve(stream: UnixStream, order: Order, heard: &mut Heard) {
    let mut reader = BufReader::new(&stream);
    let (mut first, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let line = line.trim().to_ascii_lowercase();
        match line.strip_prefix("content-length:") {
            _ if line.is_empty() => break,
            Some(value) => length = value.trim().parse().unwrap(),
            None if first.is_empty() => first = line,
            None => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let call = first.rsplit_once(' ').unwrap().0.to_owned();
    heard.calls.push(call.clone());
    if heard.away > 0 {
        heard.away -= 1;
        return;
    }
    let ok = |data: Value| Some((200, json!({ "ok": true, "data": data })));
    let answer = match call.as_str() {
        "get /host" => ok(host()),
        "get /gpus" => ok(json!([gpu()])),
        "post /instances" if order == Order::Refused => {
            Some((507, json!({ "ok": false, "error": "no memory", "code": "no_memory" })))
        }
        "post /instances" => {
            let order_body: Value = serde_json::from_slice(&body).unwrap();
            heard.instance =
                (order == Order::MadeAndLost).then(|| order_body["name"].as_str().unwrap().to_owned());
            heard.away = 1;
            None
        }
        "get /instances" => {
            let instances: Vec<Value> = heard.instance.iter().map(|name| instance(name)).collect();
            ok(json!({ "status": "running", "instances": instances }))
        }
        call if call == format!("delete /instances/{ID}") => {
            heard.instance = None;
            ok(json!({ "id": ID, "complete": true }))
        }
        call if call == format!("get /gpus/{GPU}") => ok(gpu()),
        other => panic!("{other}"),
    };
    if let Some((status, body)) = answer {
        let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n\r\n{body}");
        (&stream).write_all(head.as_bytes()).unwrap();
    }
}

fn host() -> Value {
    json!({
        "version": "0.1.0", "started_at": SINCE, "standalone": true, "accel": "tcg", "firmware": "direct",
        "tunnel": "none", "listen": "127.0.0.1", "port": 15001, "cpus": 2, "memory_total": 1_u64 << 34,
        "memory_free": 1_u64 << 33, "disk_total": 1_u64 << 38, "disk_free": 1_u64 << 37, "instances": 0,
        "problems": [],
    })
}

fn gpu() -> Value {
    json!({
        "address": GPU, "vendor_id": "10de", "device_id": "2330", "state": "free", "since": SINCE,
        "rentable": true, "functions": [GPU], "bar_bytes": 0, "reset_methods": ["flr"], "holders": [],
        "driver": "nvidia",
    })
}

fn instance(name: &str) -> Value {
    json!({
        "id": ID, "name": name, "status": "running", "state": "booting", "since": SINCE, "ports": {},
        "ssh_host_key": "ssh-ed25519 AAAA", "ssh_keys": [], "cpus": 4, "memory": 8_u64 << 30, "storage": 50_u64 << 30, "gpus": [GPU],
        "created_at": SINCE, "problems": [],
    })
}

fn verdicts(report: &SelftestReport) -> Vec<(&str, Verdict)> {
    report.findings.iter().map(|finding| (finding.id, finding.verdict)).collect()
}

#[tokio::test]
async fn an_instance_whose_answer_was_lost_is_found_by_its_name_and_deleted() {
    let agent = FakeAgent::start(Order::MadeAndLost);
    let report = agent.selftest().await;
    let expected = [
        ("selftest.create", Verdict::Fail),
        ("selftest.deleted", Verdict::Pass),
        ("selftest.gpu_back", Verdict::Pass),
    ];
    assert_eq!(verdicts(&report), expected, "{report:?}");
    assert!(!report.passed && agent.heard.lock().unwrap().instance.is_none());
}

#[tokio::test]
async fn an_order_that_made_nothing_leaves_nothing_to_delete() {
    let agent = FakeAgent::start(Order::Lost);
    let report = agent.selftest().await;
    assert_eq!(verdicts(&report), [("selftest.create", Verdict::Fail)], "{report:?}");
    assert!(agent.asked("get /instances") && !agent.asked(&format!("delete /instances/{ID}")));
}

#[tokio::test]
async fn a_refusal_is_an_answer() {
    let agent = FakeAgent::start(Order::Refused);
    let report = agent.selftest().await;
    assert_eq!(verdicts(&report), [("selftest.create", Verdict::Fail)], "{report:?}");
    assert!(!agent.asked("get /instances"), "nothing is looked for");
}
