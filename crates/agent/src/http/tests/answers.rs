//! Every call of the contract and the form of its answers.

use qudata_api::{ErrorCode, InstanceEvent};

use super::*;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJiSCWrL2tGmcyLCMIXvJ2qLq4F1zjTXvUmZ9n4nH4oZ a";

#[tokio::test]
async fn only_ping_is_public() {
    let served = Served::with(0).await;
    let answer = served.raw(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "{\"ok\":true}"));
    for path in ["/instances", "/host", "/metrics", "/openapi.json", "/nothing", "/ping/", "//ping"] {
        let ask = |secret: &str| format!("GET {path} HTTP/1.1\r\n{secret}Connection: close\r\n\r\n");
        let said = served.raw(ask("").as_bytes()).await.refused(401, "secret_missing");
        assert!(said.contains("X-Agent-Secret"), "{said}");
        let right = &served.secret;
        for wrong in [
            "X-Agent-Secret: wrong\r\n".to_owned(),
            "X-Agent-Secret:\r\n".to_owned(),
            format!("X-Agent-Secret: {right}0\r\n"),
            format!("X-Agent-Secret: {right}\r\nX-Agent-Secret: {right}\r\n"),
        ] {
            served.raw(ask(&wrong).as_bytes()).await.refused(403, "forbidden");
        }
    }
}

#[tokio::test]
async fn the_list_has_the_originals_status() {
    let data = Served::with(0).await.call("GET", "/instances", "").await.data();
    assert_eq!(data, serde_json::json!({"status": "destroyed", "instances": []}));
    let data = Served::with(3).await.call("GET", "/instances", "").await.data();
    assert_eq!(data["status"], "paused");
    let names: Vec<_> =
        data["instances"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["vm-0", "vm-1", "vm-2"], "oldest first");
}

#[tokio::test]
async fn one_instance_is_shown_by_its_id() {
    let served = Served::with(2).await;
    let id = served.ids()[1];
    let data = served.call("GET", &format!("/instances/{id}"), "").await.data();
    assert_eq!((data["name"].as_str(), data["ports"]["22"].as_str()), (Some("vm-1"), Some("10001")));
    let other = Uuid::now_v7();
    served.call("GET", &format!("/instances/{other}"), "").await.refused(404, "no_such_instance");
    for bad in ["x", "0", "%ff", &format!("{id}0")] {
        let said = served.call("GET", &format!("/instances/{bad}"), "").await.refused(400, "invalid_field");
        assert!(said.starts_with("id: "), "{said}");
    }
}

#[tokio::test]
async fn calls_without_an_id_mean_the_only_instance() {
    let none = Served::with(0).await;
    let several = Served::with(2).await;
    let key = format!("{{\"ssh_pubkey\":\"{KEY}\"}}");
    for (method, path, body) in
        [("PUT", "/instances", "{\"command\":\"stop\"}"), ("POST", "/ssh", &key), ("DELETE", "/ssh", &key)]
    {
        none.call(method, path, body).await.refused(404, "no_such_instance");
        several.call(method, path, body).await.refused(409, "ambiguous_instance");
        // Named in the query or in the body, both if they agree; a stopped guest takes no key, which is past naming.
        let id = several.ids()[1];
        let named = body.replacen('{', &format!("{{\"id\":\"{id}\","), 1);
        for (path, body) in [
            (format!("{path}?id={id}"), body),
            (path.to_owned(), &named),
            (format!("{path}?id={id}"), &named),
        ] {
            let answer = several.call(method, &path, body).await;
            assert!(
                !matches!(answer.json()["code"].as_str(), Some("ambiguous_instance" | "no_such_instance")),
                "{answer:?}"
            );
        }
        let other = several.ids()[0];
        several.call(method, &format!("{path}?id={other}"), &named).await.refused(400, "invalid_field");
    }
    let several_delete = several.call("DELETE", "/instances", "").await;
    several_delete.refused(409, "ambiguous_instance");
    assert_eq!(several.ids().len(), 2);
}

#[tokio::test]
async fn stop_of_a_stopped_instance_answers_its_state() {
    let served = Served::with(1).await;
    let id = served.ids()[0];
    for path in ["/instances".to_owned(), format!("/instances/{id}")] {
        let answer = served.call("PUT", &path, "{\"command\":\"stop\"}").await;
        assert_eq!(answer.data(), serde_json::json!({"id": id, "state": "stopped"}));
    }
}

#[tokio::test]
async fn an_unknown_command_is_400_and_says_which_are_known() {
    let served = Served::with(1).await;
    let said =
        served.call("PUT", "/instances", "{\"command\":\"explode\"}").await.refused(400, "invalid_field");
    assert!(said.contains("`start`, `stop`, `restart`"), "{said}");
    for bad in
        ["", "{}", "[]", "{\"command\":1}", "{\"command\":\"stop\",\"x\":1}", "{\"command\":\"stop\"} x"]
    {
        served.call("PUT", "/instances", bad).await.refused(400, "malformed_body");
    }
}

#[tokio::test]
async fn delete_without_an_instance_is_fine_and_a_late_one_hits_nobody() {
    let served = Served::with(0).await;
    let answer = served.call("DELETE", "/instances", "").await;
    assert_eq!(answer.body, "{\"ok\":true}");
    let served = Served::with(1).await;
    let late = Uuid::now_v7();
    for (path, body) in [
        (format!("/instances?id={late}"), String::new()),
        ("/instances".to_owned(), format!("{{\"id\":\"{late}\"}}")),
        (format!("/instances/{late}"), String::new()),
    ] {
        served.call("DELETE", &path, &body).await.refused(404, "no_such_instance");
    }
    // A misspelt name of the parameter must not mean "the only one".
    for path in [
        "/instances?instance=x",
        "/instances?ID=x",
        "/instances?id=x",
        "/instances?id=",
        &format!("/instances/{late}?id=x"),
    ] {
        served.call("DELETE", path, "").await.refused(400, "invalid_field");
    }
    served.call("DELETE", "/instances", "{\"instance\":\"x\"}").await.refused(400, "malformed_body");
    assert_eq!(served.ids().len(), 1);
}

#[tokio::test]
async fn a_bad_create_changes_nothing() {
    let served = Served::with(0).await;
    for body in ["", "null", "[]", "{\"cpu\":\"8\"}", "{\"ports\":\"22\"}"] {
        served.call("POST", "/instances", body).await.refused(400, "malformed_body");
    }
    served.call("POST", "/instances?name=x", "{}").await.refused(400, "invalid_field");
    let said =
        served.call("POST", "/instances", "{\"ssh_enabled\":\"canary\",\"password\":\"canary\"}").await;
    assert!(!said.body.contains("canary"), "{said:?}");
    assert!(served.ids().is_empty());
}

#[tokio::test]
async fn unknown_paths_and_methods_are_told() {
    let served = Served::with(0).await;
    let said = served.call("GET", "/nothing", "").await.refused(404, "no_such_path");
    assert!(said.contains("/openapi.json"), "{said}");
    for (method, path, allowed) in [
        ("PATCH", "/instances", &["get", "post", "put", "delete"][..]),
        ("POST", "/ping", &["get"]),
        ("GET", "/ssh", &["post", "delete"]),
        ("POST", "/instances/x", &["get", "put", "delete"]),
    ] {
        let answer = served.call(method, path, "").await;
        answer.refused(405, "method_not_allowed");
        let line = answer.head.lines().find(|line| line.starts_with("allow:")).expect("Allow").to_owned();
        assert!(allowed.iter().all(|method| line.contains(method)), "{line}");
    }
}

#[tokio::test]
async fn the_console_is_plain_text() {
    let served = Served::with(1).await;
    let id = served.ids()[0];
    let answer = served.call("GET", &format!("/instances/{id}/console"), "").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, ""), "{answer:?}");
    assert!(answer.head.contains("content-type: text/plain; charset=utf-8"), "{answer:?}");
    assert_eq!(served.call("GET", &format!("/instances/{id}/console?tail=10"), "").await.status, 200);
    served.call("GET", &format!("/instances/{id}/console?tail=-1"), "").await.refused(400, "invalid_field");
}

#[tokio::test]
async fn host_gpus_and_metrics_are_shown() {
    let served = Served::with(2).await;
    let host = served.call("GET", "/host", "").await.data();
    assert_eq!((host["instances"].as_u64(), host["tunnel"].as_str()), (Some(2), Some("none")));
    assert_eq!(served.call("GET", "/gpus", "").await.data(), serde_json::json!([]));
    served.call("GET", "/nothing/at/all", "").await;
    let answer = served.call("GET", "/metrics", "").await;
    assert!(answer.head.contains("application/openmetrics-text"), "{answer:?}");
    for line in [
        "qudata_instances{state=\"stopped\"} 2",
        "qudata_http_requests_total{method=\"GET\",route=\"/host\",status=\"200\"} 1",
        "qudata_http_requests_total{method=\"GET\",route=\"-\",status=\"404\"} 1",
        "# TYPE qudata_host_memory_free_bytes gauge",
    ] {
        assert!(answer.body.contains(line), "{line} is not in {}", answer.body);
    }
    assert!(!answer.body.contains("at/all"), "paths from outside are no labels");
    assert!(answer.body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn events_end_with_the_instance() {
    let served = Served::with(1).await;
    let id = served.ids()[0];
    let path = format!("/instances/{id}/events");
    let (feed, deleted) = tokio::join!(served.call("GET", &path, ""), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        served.call("DELETE", &format!("/instances/{id}"), "").await
    });
    assert_eq!(deleted.data()["id"], serde_json::json!(id));
    assert!(feed.head.contains("content-type: text/event-stream"), "{feed:?}");
    let block = feed
        .body
        .find("id: 1\nevent: phase\ndata: ")
        .map(|at| &feed.body[at..])
        .unwrap_or_else(|| panic!("{feed:?}"));
    let data = block.lines().nth(2).unwrap().strip_prefix("data: ").unwrap();
    let event: InstanceEvent = serde_json::from_str(data).unwrap();
    assert_eq!((event.seq, event.phase.as_str()), (1, "deleting"));
    served.call("GET", &path, "").await.refused(404, "no_such_instance");
}

#[tokio::test]
async fn events_need_an_instance_and_a_readable_position() {
    let served = Served::with(1).await;
    served
        .call("GET", &format!("/instances/{}/events", Uuid::now_v7()), "")
        .await
        .refused(404, "no_such_instance");
    let id = served.ids()[0];
    let request = format!(
        "GET /instances/{id}/events HTTP/1.1\r\nX-Agent-Secret: {}\r\nLast-Event-ID: x\r\nConnection: close\r\n\r\n",
        served.secret
    );
    served.raw(request.as_bytes()).await.refused(400, "invalid_field");
}

#[tokio::test]
async fn a_silent_event_stream_is_kept_alive() {
    let limits = Limits { event_silence: Duration::from_millis(50), ..Limits::default() };
    let served = Served::limited(1, limits).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let id = served.ids()[0];
    let request = format!("GET /instances/{id}/events HTTP/1.1\r\nX-Agent-Secret: {}\r\n\r\n", served.secret);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    while text.matches(": still here\n\n").count() < 2 {
        let mut buffer = vec![0; 1024];
        let count = timeout(Duration::from_secs(5), stream.read(&mut buffer)).await.unwrap().unwrap();
        assert_ne!(count, 0, "{text}");
        text += &String::from_utf8_lossy(&buffer[..count]);
    }
}

#[tokio::test]
async fn every_documented_path_is_served_and_the_document_is_the_golden_one() {
    let served = Served::with(0).await;
    let answer = served.call("GET", "/openapi.json", "").await;
    let mut document: Value = answer.json();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, openapi_json());
    for path in document["paths"].as_object().unwrap().keys() {
        let answer = served.call("GET", &path.replace("{id}", &Uuid::nil().to_string()), "").await;
        assert_ne!(answer.json_code(), Some("no_such_path".into()), "{path}");
    }
    // A release is no change of the contract.
    document["info"]["version"] = "of the agent".into();
    insta::assert_snapshot!("openapi", serde_json::to_string_pretty(&document).unwrap());
}

impl Answer {
    fn json_code(&self) -> Option<String> {
        serde_json::from_str::<Value>(&self.body).ok()?["code"].as_str().map(str::to_owned)
    }
}

/// A status that changes is a change of the contract.
#[test]
fn codes_have_their_status() {
    for (code, status) in [
        (ErrorCode::MalformedBody, 400),
        (ErrorCode::InvalidField, 400),
        (ErrorCode::SecretMissing, 401),
        (ErrorCode::Forbidden, 403),
        (ErrorCode::NoSuchInstance, 404),
        (ErrorCode::NoSuchPath, 404),
        (ErrorCode::MethodNotAllowed, 405),
        (ErrorCode::RequestTimeout, 408),
        (ErrorCode::AmbiguousInstance, 409),
        (ErrorCode::WrongState, 409),
        (ErrorCode::GpuTaken, 409),
        (ErrorCode::GpuUnfit, 409),
        (ErrorCode::NoSuchGpu, 404),
        (ErrorCode::PortTaken, 409),
        (ErrorCode::BodyTooLarge, 413),
        (ErrorCode::HeaderTooLarge, 431),
        (ErrorCode::Internal, 500),
        (ErrorCode::HostFault, 500),
        (ErrorCode::GuestFault, 502),
        (ErrorCode::Busy, 503),
        (ErrorCode::NoGpu, 507),
        (ErrorCode::NoMemory, 507),
        (ErrorCode::NoDisk, 507),
        (ErrorCode::NoCpus, 507),
    ] {
        assert_eq!(error::status(code).as_u16(), status, "{code:?}");
    }
}
