//! The control plane against clients that keep the contract and clients that do not.

use super::*;
use crate::http::{Client, Reply};

struct Agent<'a> {
    service: &'a ControlPlane,
    /// Header and value.
    sign: (&'static str, String),
}

impl Agent<'_> {
    fn call(&self, method: &str, path: &str, body: &Value) -> Reply {
        let client =
            Client { address: self.service.address, secret: None, deadline: Duration::from_secs(10) };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (name, value) = &self.sign;
        let head = format!("{method} {BASE}{path} HTTP/1.1\r\nHost: x\r\n{name}: {value}\r\n");
        client.raw(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap()
    }

    fn init(&self) -> Reply {
        self.call(
            "POST",
            "/init",
            &json!({
                "agent_id": "01234567-89ab-4cde-8f01-23456789abcd", "agent_port": 15001,
                "address": "203.0.113.7", "fingerprint": "0123456789abcdef", "pid": 4711, "version": "0.1.0",
            }),
        )
    }
}

fn by_key(service: &ControlPlane) -> Agent<'_> {
    Agent { service, sign: ("X-API-Key", Terms::default().api_key) }
}

fn by_secret<'a>(service: &'a ControlPlane, secret: &str) -> Agent<'a> {
    Agent { service, sign: ("X-Agent-Secret", secret.to_owned()) }
}

fn stats(status: &str) -> Value {
    json!({
        "gpu_util": 0, "gpu_temp": 0, "cpu_util": 1.5, "ram_util": 2, "mem_util": 0, "inet_in": 0, "inet_out": 0,
        "status": status,
    })
}

#[test]
fn a_secret_is_given_once_and_replaced_on_demand() {
    let service = ControlPlane::start(Terms { host_exists: true, ..Terms::default() });
    let first = by_key(&service).init().data();
    assert_eq!(
        (&first["agent_created"], &first["secret_key"]),
        (&json!(true), &json!(Terms::default().secret))
    );
    let registered = service.wait_for_registration(Duration::ZERO);
    assert_eq!(
        (registered.agent_port, registered.secret.as_str()),
        (15_001, Terms::default().secret.as_str())
    );

    let agent = by_secret(&service, &Terms::default().secret);
    let again = agent.init().data();
    assert_eq!((&again["agent_created"], &again["secret_key"]), (&json!(false), &json!("")));
    service.rotate("the-second");
    assert_eq!(agent.init().data()["secret_key"], "the-second");
    assert_eq!(agent.call("POST", "/stats", &stats("running")).status, 401);
    assert_eq!(by_secret(&service, "the-second").call("POST", "/stats", &stats("running")).status, 200);
    assert!(service.wait_for_registration(Duration::ZERO).secret == "the-second");

    service.forget("the-third");
    assert_eq!(by_secret(&service, "the-second").init().status, 401);
    assert_eq!(by_key(&service).init().data()["secret_key"], "the-third");
    assert_eq!(service.complaints(), Vec::<String>::new());
}

#[test]
fn breaches_of_the_contract_are_refused_and_noted() {
    let service = ControlPlane::start(Terms::default());
    let (key, stranger) = (by_key(&service), by_secret(&service, "guessed"));
    let wrong = Agent { service: &service, sign: ("X-API-Key", "ak-wrong".to_owned()) };
    let unsigned = Agent { service: &service, sign: ("X-Nothing", String::new()) };
    assert_eq!((wrong.init().status, stranger.init().status, unsigned.init().status), (403, 401, 401));
    assert_eq!(key.call("POST", "/init", &json!({ "agent_id": 1 })).status, 400);
    assert_eq!(key.init().status, 200);
    assert_eq!(key.call("POST", "/stats", &stats("running")).status, 401);
    let agent = by_secret(&service, &Terms::default().secret);
    assert_eq!(agent.call("POST", "/stats", &stats("fine")).status, 400);
    assert_eq!(agent.call("GET", "/stats", &Value::Null).status, 404);
    let complaints = service.complaints().join("\n");
    for words in ["none or both", "agent_id is 1", "with the API key", "status is \"fine\"", "GET /stats"] {
        assert!(complaints.contains(words), "{words}: {complaints}");
    }
}

#[test]
fn it_can_be_down_and_can_fail_and_remembers() {
    let service = ControlPlane::start(Terms { host_exists: true, ..Terms::default() });
    by_key(&service).init();
    let agent = by_secret(&service, &Terms::default().secret);
    service.fail(503);
    assert_eq!(agent.call("GET", "/ping", &Value::Null).status, 503);
    service.recover();
    let before = Instant::now();
    assert_eq!(agent.call("POST", "/stats", &stats("paused")).status, 200);
    service.wait_for_status("paused", before, Duration::ZERO);
    service.stop();
    let client = Client { address: service.address, secret: None, deadline: Duration::from_secs(5) };
    assert!(client.connect().is_err());
    service.resume();
    assert_eq!(agent.init().data()["instance_running"], true);
    assert_eq!(service.accepted("/stats"), [stats("paused")]);
}
