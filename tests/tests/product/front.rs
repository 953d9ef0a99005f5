//! What comes to the API and makes no sense: a sentence, a fitting status, no change.

use proptest::{collection::vec, prelude::*, test_runner::TestRunner};
use qudata_testkit::agent::TestAgent;
use qudata_tests::{blank_agent, small};
use serde_json::{Value, json};

#[test]
fn nonsense_never_breaks_anything() {
    let agent = blank_agent();
    let mut baseline = agent.baseline();
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() });
    runner
        .run(&(method(), path(), body()), |(method, path, body)| {
            let reply = agent.client().send(&method, &path, body.as_bytes());
            let reply = reply.map_err(|e| TestCaseError::fail(format!("no answer: {e}")))?;
            prop_assert!(reply.status < 500, "{} {}", reply.status, reply.text());
            prop_assert!(reply.status < 400 || !reply.error().is_empty(), "no sentence: {}", reply.text());
            Ok(())
        })
        .unwrap();
    runner
        .run(&vec(any::<u8>(), 0..300), |bytes| {
            // No answer at all is fine: these bytes are hardly ever HTTP.
            if let Ok(mut stream) = agent.client().connect() {
                use std::io::Write;
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                if let Ok(reply) = qudata_testkit::http::Reply::read(&stream) {
                    prop_assert!((400..500).contains(&reply.status), "{} {}", reply.status, reply.text());
                }
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(agent.ids(), [] as [String; 0], "nonsense made an instance");
    assert!(agent.ended().is_none());
    agent.assert_clean(&mut baseline);
}

fn method() -> impl Strategy<Value = String> {
    prop_oneof!["GET|POST|PUT|DELETE|PATCH|OPTIONS", "[A-Z]{1,9}"]
}

fn path() -> impl Strategy<Value = String> {
    let id = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-8[0-9a-f]{3}-[0-9a-f]{12}|[a-z0-9%.]{0,20}";
    prop_oneof![
        "/(instances|ssh|ping|gpus|host|metrics|openapi.json|)(\\?(id|tail)=[a-z0-9-]{0,9})?",
        id.prop_map(|id| format!("/instances/{id}")),
        id.prop_map(|id| format!("/instances/{id}/ssh")),
        id.prop_map(|id| format!("/instances/{id}/console?tail=x")),
        "/[a-z/.%0-9]{0,40}",
    ]
}

/// Bodies near a valid create call, none of them valid: one field always has a value that is not allowed.
fn body() -> impl Strategy<Value = String> {
    prop_oneof![
        bad_field().prop_map(|(field, value)| with(field, value).to_string()),
        bad_field().prop_map(|(field, value)| json!({ field: value }).to_string()),
        ".{0,80}",
        "[\\[{]{1,200}",
        Just(String::new()),
    ]
    // An empty wish is a valid one: everything by default.
    .prop_filter("a valid wish", |text| serde_json::from_str::<Value>(text).ok() != Some(json!({})))
    .prop_filter("an empty body may be a wish", |text| !text.trim().is_empty())
}

fn with(field: &str, value: Value) -> Value {
    let mut body = small();
    body[field] = value;
    body
}

const NUMBERS: &[&str] = &["cpus", "storage_gb", "memory"];

fn bad_field() -> impl Strategy<Value = (&'static str, Value)> {
    let texts = prop_oneof!["-?0", "-[1-9]{1,3}", "[a-zA-Z ]{1,8}", "[1-9]\\.[0-9]", "0x10", " 1", "08"];
    prop_oneof![
        (proptest::sample::select(&NUMBERS[..2]), texts).prop_map(|(field, text)| (field, json!(text))),
        (proptest::sample::select(NUMBERS), -9i64..=0).prop_map(|(field, number)| (field, json!(number))),
        "[a-z ]{1,8}|-[0-9]G|[0-9]Q".prop_map(|text| ("memory", json!(text))),
        vec("0|65536|-1|022|ssh|2 2", 1..4).prop_map(|ports| ("ports", json!(ports))),
        Just(("ports", json!(["80", "80"]))),
        Just(("ports", json!((1..=33).map(|n| n.to_string()).collect::<Vec<_>>()))),
        "[A-Z_ /.]{1,20}|-a|a-|[a-z]{64}".prop_map(|name| ("name", json!(name))),
        ".{1,60}".prop_map(|key| ("ssh_pubkeys", json!([key]))),
        "[a-z]{1,12}_x".prop_map(|_| ("no_such_field", json!(1))),
        Just(("gpu_addrs", json!(["nonsense"]))),
        Just(("gpus", json!(-1))),
        Just(("ssh_enabled", json!("yes"))),
    ]
}

/// The sentences: each names the field and the value.
#[test]
fn bad_input_gets_a_sentence_a_code_and_no_change() {
    let agent = blank_agent();
    let cases = [
        ("cpus", json!("abc"), "abc"),
        ("cpus", json!(-3), "-3"),
        ("memory", json!("12Q"), "12Q"),
        ("storage_gb", json!("0"), "0"),
        ("ports", json!(["70000"]), "70000"),
        ("ports", json!(["022"]), "022"),
        ("name", json!("No Good"), "No Good"),
        ("gpu_addrs", json!(["here"]), "here"),
    ];
    for (field, value, shown) in cases {
        let reply = agent.call("POST", "/instances", Some(&with(field, value)));
        assert_eq!((reply.status, reply.code().as_str()), (400, "invalid_field"), "{field}");
        assert!(reply.error().contains(field) && reply.error().contains(shown), "{}", reply.error());
        assert!(!reply.error().contains(agent.dir().to_str().unwrap()), "{}", reply.error());
    }
    too_much(&agent);
    let unknown = agent.call("POST", "/instances", Some(&with("cpu", json!("1"))));
    assert!(unknown.status == 400 && unknown.error().contains("cpu"), "{}", unknown.text());
    let command = agent.call("PUT", "/instances", Some(&json!({ "command": "explode" })));
    assert!(command.status == 400 && command.error().contains("explode"), "{}", command.text());
    assert_eq!(agent.call("PUT", "/instances", Some(&json!({ "command": "stop" }))).status, 404);
    assert_eq!(agent.call("GET", "/nowhere", None).code(), "no_such_path");
    assert_eq!(agent.call("PATCH", "/instances", None).code(), "method_not_allowed");
    assert_eq!(agent.ids(), [] as [String; 0]);
}

/// Wishes larger than the host are refused, not shrunk.
fn too_much(agent: &TestAgent) {
    for (field, value, code) in
        [("cpus", "1000", "no_cpus"), ("memory", "60T", "no_memory"), ("storage_gb", "900000", "no_disk")]
    {
        let reply = agent.call("POST", "/instances", Some(&with(field, json!(value))));
        assert_eq!((reply.status, reply.code().as_str()), (507, code), "{}", reply.text());
    }
    let reply = agent.call("POST", "/instances", Some(&with("gpus", json!(1))));
    assert_eq!((reply.status, reply.code().as_str()), (507, "no_gpu"), "{}", reply.text());
}

#[test]
fn the_secret_is_asked_for() {
    let agent = blank_agent();
    let mut client = agent.client().clone();
    client.secret = None;
    let reply = client.call("GET", "/instances", None).unwrap();
    assert_eq!((reply.status, reply.code().as_str()), (401, "secret_missing"));
    assert_eq!(client.call("GET", "/ping", None).unwrap().json(), json!({ "ok": true }));
    let right = agent.client().secret.clone().unwrap();
    for wrong in ["x".to_owned(), right[1..].to_owned(), format!("{right}x"), right.to_uppercase() + "X"] {
        client.secret = Some(wrong);
        for (method, path) in
            [("GET", "/instances"), ("DELETE", "/instances"), ("GET", "/metrics"), ("GET", "/openapi.json")]
        {
            let reply = client.call(method, path, None).unwrap();
            assert_eq!((reply.status, reply.code().as_str()), (403, "forbidden"), "{method} {path}");
        }
    }
}
