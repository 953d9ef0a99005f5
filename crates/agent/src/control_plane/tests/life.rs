//! A host's life with a service that keeps the contract, and with the turns that it may take.

use qudata_api::Status;
use serde_json::{Value, json};

use super::*;

const NEW_SECRET: &str = "new-secret-0123456789";

fn done() -> (u16, Value) {
    (200, json!({"ok": true}))
}

fn no() -> (u16, Value) {
    (401, json!({"ok": false, "error": "who are you"}))
}

/// The answer to `/init`.
fn welcome(secret: &str, host_exists: bool) -> (u16, Value) {
    let data = json!({"agent_created": true, "emergency_reinit": false, "host_exists": host_exists,
        "secret_key": secret, "tunnel_token": "new-token", "instance_running": false});
    (200, json!({"ok": true, "data": data}))
}

#[tokio::test]
async fn a_new_host_registers_describes_itself_and_gives_signs_of_life() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", None) => welcome(NEW_SECRET, false),
            (_, Some(NEW_SECRET)) => done(),
            _ => no(),
        })
        .await;
    let mut host = Host::fresh(&service.url());
    let client = host.start();
    until_registered(&client).await;
    desk.until_asked("/ping", 2).await;
    let init = &desk.asked("/init")[0];
    assert_eq!(init.headers["x-api-key"], "ak-canary");
    assert_eq!(init.headers["content-type"], "application/json");
    assert_eq!(init.body["agent_id"].as_str().unwrap().as_bytes(), host.files()["agent_id"]);
    assert_eq!((&init.body["agent_port"], &init.body["test_mode"]), (&json!(15_001), &json!(true)));
    assert_eq!(init.body["pid"], std::process::id());
    for field in ["address", "fingerprint", "version"] {
        assert!(init.body[field].is_string(), "{field}: {}", init.body);
    }
    assert_eq!(desk.asked("/init").len(), 1);
    let described = desk.asked("/init/host");
    assert_eq!(described.len(), 1);
    assert!(described[0].body["configuration"]["ram"]["unit"] == "gb", "{}", described[0].body);
    let others = desk.asked.lock().unwrap().clone();
    let with_key = others.iter().filter(|asked| asked.headers.contains_key("x-api-key")).count();
    assert_eq!(with_key, 1, "the key is for the first call");
    assert!(host.accepts(NEW_SECRET));
    assert_eq!(host.files()["agent_secret"], NEW_SECRET.as_bytes());
    assert_eq!(host.files()["tunnel_token"], b"new-token");
    assert_eq!(client.tunnel_token().borrow().as_ref().unwrap().open(), "new-token");
}

#[tokio::test]
async fn a_host_that_was_registered_works_at_once_and_is_known_by_its_secret() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", Some(OLD_SECRET)) => welcome("", true),
            (_, Some(OLD_SECRET)) => done(),
            _ => no(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    // Before anything was asked.
    assert!(host.accepts(OLD_SECRET));
    assert_eq!(client.tunnel_token().borrow().as_ref().unwrap().open(), OLD_TOKEN);
    until_registered(&client).await;
    assert!(host.accepts(OLD_SECRET), "an empty secret means: the saved one");
    assert_eq!(host.files()["agent_secret"], OLD_SECRET.as_bytes());
    assert_eq!(host.files()["tunnel_token"], b"new-token");
    assert_eq!(client.tunnel_token().borrow().as_ref().unwrap().open(), "new-token");
    assert!(desk.asked("/init/host").is_empty(), "the service knows the host");
}

#[tokio::test]
async fn a_new_secret_is_on_disk_before_it_counts_and_ends_the_old_one() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", Some(OLD_SECRET)) => welcome(NEW_SECRET, true),
            (_, Some(NEW_SECRET)) => done(),
            _ => no(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let mut callers = host.callers.clone();
    let path = host.dir.path().join("agent_secret");
    let client = host.start();
    timeout(SOON, callers.changed()).await.unwrap().unwrap();
    assert_eq!(std::fs::read(path).unwrap(), NEW_SECRET.as_bytes(), "the file comes first");
    assert!(host.accepts(NEW_SECRET) && !host.accepts(OLD_SECRET));
    until_registered(&client).await;
    desk.until_asked("/ping", 1).await;
    assert_eq!(desk.asked("/ping")[0].secret(), Some(NEW_SECRET));
}

#[tokio::test]
async fn what_cannot_be_saved_is_not_used() {
    let desk = Desk::default();
    let service = desk.open(|_| welcome(NEW_SECRET, true)).await;
    let mut host = Host::fresh(&service.url());
    let path = host.dir.path().join("agent_secret");
    std::fs::create_dir(&path).unwrap();
    let client = host.start();
    until_down(&client, "registration_not_saved").await;
    assert!(!host.accepts(NEW_SECRET));
    std::fs::remove_dir(&path).unwrap();
    until_registered(&client).await;
    assert!(host.accepts(NEW_SECRET), "it comes back by itself");
}

#[tokio::test]
async fn use_the_saved_secret_says_nothing_to_a_host_without_one() {
    let desk = Desk::default();
    let service = desk.open(|_| welcome("", true)).await;
    let mut host = Host::fresh(&service.url());
    let client = host.start();
    let (code, reason) = settled(&client).await.unwrap();
    assert_eq!(code, "control_plane_reply");
    assert!(reason.contains("none is saved"), "{reason}");
    let names: Vec<String> = host.files().into_keys().collect();
    assert_eq!(names, ["agent_id"], "nothing of such a reply is kept");
}

#[tokio::test]
async fn a_secret_that_is_not_taken_any_more_is_replaced_by_the_key() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", None) => welcome(NEW_SECRET, true),
            (_, Some(NEW_SECRET)) => done(),
            _ => no(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    until_registered(&client).await;
    assert!(host.accepts(NEW_SECRET) && !host.accepts(OLD_SECRET));
    let calls = desk.asked("/init");
    assert_eq!((calls[0].secret(), calls[1].secret()), (Some(OLD_SECRET), None), "the secret is tried first");
}

#[tokio::test]
async fn a_service_that_refuses_everybody_for_a_while_costs_nothing() {
    for key in [None, Some("ak-canary".into())] {
        let (desk, open) = (Desk::default(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let opened = open.clone();
        let service = desk
            .open(move |asked| match (asked.secret(), opened.load(Ordering::Relaxed)) {
                (Some(OLD_SECRET), true) => welcome("", true),
                _ => no(),
            })
            .await;
        let mut host = Host::registered(&service.url());
        host.setup.as_mut().unwrap().api_key = key;
        let client = host.start();
        until_down(&client, "control_plane_refused").await;
        desk.until_asked("/init", 3).await;
        assert!(host.accepts(OLD_SECRET), "tenants' platform keeps its way in");
        open.store(true, Ordering::Relaxed);
        until_registered(&client).await;
        assert!(host.accepts(OLD_SECRET));
    }
}

#[tokio::test]
async fn a_refused_report_makes_the_host_register_again() {
    let (desk, rotated) = (Desk::default(), std::sync::atomic::AtomicBool::new(false));
    let service = desk
        .open(move |asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", Some(OLD_SECRET)) if !rotated.load(Ordering::Relaxed) => welcome("", true),
            ("POST /v0/init", None) => {
                rotated.store(true, Ordering::Relaxed);
                welcome(NEW_SECRET, true)
            }
            ("GET /v0/ping", Some(OLD_SECRET)) => done(),
            (_, Some(NEW_SECRET)) => done(),
            _ => no(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    *host.stats.lock().unwrap() = Some(StatsInput { status: Status::Running, sample: None });
    let client = host.start();
    let taken = || desk.asked("/stats").iter().any(|asked| asked.secret() == Some(NEW_SECRET));
    until("a report with the new secret", taken).await;
    until_registered(&client).await;
    assert!(host.accepts(NEW_SECRET));
}

#[tokio::test]
async fn emergency_reinit_registers_anew_by_the_key_and_describes_the_host_again() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match (asked.what.as_str(), asked.secret()) {
            ("POST /v0/init", secret) => {
                let mut reply = welcome(if secret.is_none() { NEW_SECRET } else { "" }, true);
                reply.1["data"]["emergency_reinit"] = json!(true);
                reply
            }
            _ => done(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    until_registered(&client).await;
    desk.until_asked("/ping", 2).await;
    let with: Vec<Option<String>> =
        desk.asked("/init").iter().map(|asked| asked.secret().map(str::to_owned)).collect();
    assert_eq!(with, [Some(OLD_SECRET.to_owned()), None], "once more, and not for ever");
    assert_eq!(desk.asked("/init/host").len(), 1);
    assert!(host.accepts(NEW_SECRET));
}

#[tokio::test]
async fn an_outage_is_seen_and_over_by_itself() {
    let (desk, up) = (Desk::default(), Arc::new(std::sync::atomic::AtomicBool::new(true)));
    let is_up = up.clone();
    let service = desk
        .open(move |asked| match (asked.what.as_str(), is_up.load(Ordering::Relaxed)) {
            (_, false) => (503, json!({"ok": false, "error": "maintenance"})),
            ("POST /v0/init", true) => welcome("", true),
            _ => done(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    until_registered(&client).await;
    up.store(false, Ordering::Relaxed);
    until_down(&client, "control_plane_unreachable").await;
    assert!(format!("{:?}", client.status().borrow().state).contains("maintenance"));
    up.store(true, Ordering::Relaxed);
    until_registered(&client).await;
    assert_eq!(desk.asked("/init").len(), 1, "an outage is no reason to register again");
}

#[tokio::test]
async fn reports_come_one_at_a_time_while_there_is_an_instance_and_then_its_end_once() {
    let (desk, busy) = (Desk::default(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let is_busy = busy.clone();
    let service = desk
        .open(move |asked| match asked.what.as_str() {
            "POST /v0/init" => welcome("", true),
            "POST /v0/stats" if is_busy.load(Ordering::Relaxed) => (500, json!({"ok": false})),
            _ => done(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    until_registered(&client).await;
    tokio::time::sleep(quick().stats * 4).await;
    assert!(desk.asked("/stats").is_empty(), "there is nothing to report");
    *host.stats.lock().unwrap() = Some(StatsInput { status: Status::Running, sample: None });
    desk.until_asked("/stats", 3).await;
    assert!(desk.asked("/stats").iter().all(|asked| asked.body["status"] == "running"));
    // The end is said until it was heard.
    busy.store(true, Ordering::Relaxed);
    *host.stats.lock().unwrap() = None;
    let ends = || desk.asked("/stats").iter().filter(|asked| asked.body["status"] == "destroyed").count();
    until("two tries", || ends() >= 2).await;
    busy.store(false, Ordering::Relaxed);
    let before = ends();
    until("one that is heard", || ends() > before).await;
    let heard = ends();
    tokio::time::sleep(quick().stats * 6).await;
    assert_eq!(ends(), heard, "once");
}

#[tokio::test]
async fn never_more_than_one_report_is_under_way() {
    // Stats hang; everything else is answered.
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (now, peak) = (open.clone(), most.clone());
    let service = Service::start(Arc::new(move |mut stream| {
        let (now, peak) = (now.clone(), peak.clone());
        Box::pin(async move {
            let Some(asked) = Asked::read(&mut stream).await else { return };
            if !asked.what.ends_with("/stats") {
                let (_, body) = welcome("", true);
                let body = body.to_string();
                let reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(reply.as_bytes()).await;
                return;
            }
            peak.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            let _ = stream.read(&mut [0; 1]).await;
            now.fetch_sub(1, Ordering::Relaxed);
        })
    }))
    .await;
    let mut host = Host::registered(&service.url());
    *host.stats.lock().unwrap() = Some(StatsInput { status: Status::Running, sample: None });
    let client = host.start();
    until_registered(&client).await;
    tokio::time::sleep(quick().limits.total * 3).await;
    assert_eq!(most.load(Ordering::Relaxed), 1);
    assert_eq!(
        client.status().borrow().state,
        ControlPlaneState::Registered,
        "reports are not the registration"
    );
}

#[tokio::test]
async fn reports_leave_a_service_alone_that_asks_for_it() {
    let reports = Arc::new(AtomicUsize::new(0));
    let count = reports.clone();
    let service = Service::start(Arc::new(move |mut stream| {
        let count = count.clone();
        Box::pin(async move {
            let Some(asked) = Asked::read(&mut stream).await else { return };
            let (_, body) = welcome("", true);
            let body = body.to_string();
            let head = if asked.what.ends_with("/stats") {
                count.fetch_add(1, Ordering::Relaxed);
                "HTTP/1.1 503 Busy\r\nRetry-After: 1"
            } else {
                "HTTP/1.1 200 OK"
            };
            let reply = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(reply.as_bytes()).await;
        })
    }))
    .await;
    let mut host = Host::registered(&service.url());
    *host.stats.lock().unwrap() = Some(StatsInput { status: Status::Running, sample: None });
    let _client = host.start();
    until("a report", || reports.load(Ordering::Relaxed) > 0).await;
    let first = Instant::now();
    until("another report", || reports.load(Ordering::Relaxed) > 1).await;
    assert!(first.elapsed() > Duration::from_millis(900), "{:?}", first.elapsed());
}

#[tokio::test]
async fn an_instance_that_the_service_believes_in_and_that_is_not_there_is_said_to_be_gone() {
    let desk = Desk::default();
    let service = desk
        .open(|asked| match asked.what.as_str() {
            "POST /v0/init" => {
                let mut reply = welcome("", true);
                reply.1["data"]["instance_running"] = json!(true);
                reply
            }
            _ => done(),
        })
        .await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    desk.until_asked("/stats", 1).await;
    tokio::time::sleep(quick().stats * 4).await;
    let said = desk.asked("/stats");
    assert_eq!((said.len(), &said[0].body["status"]), (1, &json!("destroyed")));
    drop(client);
}

#[tokio::test]
async fn dropping_the_client_ends_its_calls() {
    let desk = Desk::default();
    let service = desk.open(|_| welcome("", true)).await;
    let mut host = Host::registered(&service.url());
    let client = host.start();
    until_registered(&client).await;
    drop(client);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let made = service.connections();
    tokio::time::sleep(quick().ping * 4).await;
    assert_eq!(service.connections(), made);
}
