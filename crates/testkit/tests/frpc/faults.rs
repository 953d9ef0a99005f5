//! What the fake does on order and the real one does not.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::side::{PASSWORD, Side, store_body};

#[test]
fn a_proxy_is_refused_by_its_name_or_its_port_and_tried_again() {
    let side = Side::fake();
    let words = "proxy name [agent-1.a] is already in use";
    side.order(&json!({ "retry_ms": 100, "start_errors": { "a": words, "10002": "port already used" } }));
    let frpc = side.start(&side.config(""));
    frpc.post(&store_body("a", 22, 10_001));
    frpc.post(&store_body("b", 22, 10_002));
    assert_eq!(frpc.wait_for("a", "start error")["err"], words);
    assert_eq!(frpc.wait_for("b", "start error")["err"], "port already used");
    side.order(&json!({ "retry_ms": 100 }));
    frpc.wait_for("a", "running");
    frpc.wait_for("b", "running");
}

#[test]
fn a_slow_server_and_a_slow_admin_api() {
    let side = Side::fake();
    side.order(&json!({ "settle_ms": 300, "slow_ms": 200 }));
    let frpc = side.start(&side.config(""));
    let start = Instant::now();
    frpc.post(&store_body("a", 22, 10_001));
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(frpc.status("a")["status"], "wait start");
    frpc.wait_for("a", "running");
}

#[test]
fn the_admin_api_refuses_and_falls_silent() {
    let side = Side::fake();
    let frpc = side.start(&side.config(""));
    side.order(&json!({ "unauthorized": true }));
    assert_eq!(frpc.call("GET", "/api/status", &Value::Null).status, 401);
    side.order(&json!({ "silent": true }));
    let body = store_body("a", 22, 10_001).to_string();
    assert!(frpc.try_ask("POST", "/api/store/proxies", PASSWORD, &body).is_err());
    side.order(&json!({}));
    // It has done what it did not answer.
    frpc.wait_for("a", "running");
}

#[test]
fn it_crashes_at_its_start_and_at_a_change() {
    let side = Side::fake();
    side.order(&json!({ "crash_at_start": true }));
    assert_eq!(side.spawn(&side.config("")).wait(Duration::from_secs(5)).code(), Some(1));
    side.order(&json!({ "crash_on_change": true }));
    let mut frpc = side.start(&side.config(""));
    let body = store_body("a", 22, 10_001).to_string();
    // The answer may be lost with the program.
    let _ = frpc.try_ask("POST", "/api/store/proxies", PASSWORD, &body);
    assert_eq!(frpc.wait(Duration::from_secs(5)).code(), Some(2));
    side.order(&json!({}));
    let frpc = side.start(&side.config(""));
    frpc.wait_for("a", "running");
}

#[test]
fn an_older_version_knows_less() {
    let side = Side::fake();
    side.order(&json!({ "version": "0.61.1" }));
    assert_eq!(side.run(&["--version"]), (0, "0.61.1\n".to_owned()));
    let (code, stdout) = side.verify(&side.config(""));
    assert!(code == 1 && stdout.contains("unknown field \"store\""), "{stdout}");
    let old = side.config("").replace("[store]", "").replace("path = ", "# path = ");
    assert_eq!(side.verify(&old).0, 0);
    let source = "auth.tokenSource.type = \"file\"\nauth.tokenSource.file.path = \"/x\"";
    let with_source = old.replace("auth.token = \"token-of-the-table\"", source);
    assert!(side.verify(&with_source).1.contains("unknown field \"tokenSource\""));
    side.order(&json!({}));
    assert_eq!(side.verify(&with_source).0, 0);
}

#[test]
fn an_order_that_it_does_not_understand_is_no_order() {
    let side = Side::fake();
    side.order(&json!({ "sesion": "down" }));
    let (code, stdout) = side.run(&["--version"]);
    assert!(code == 1 && stdout.contains("sesion"), "{stdout}");
}
