//! The fake frpc against the real one: one table of what the agent relies on, asked of both. What holds for the fake alone
//! is no ground to build on, so a case is only worth something when both pass it. The real side needs frps and frpc;
//! `cargo xtask test` runs it where there are some.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not as expected stops the case"
)]

mod faults;
mod platform;
mod side;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    time::{Duration, Instant},
};

use qudata_testkit::serve::{Answer, Server};

use serde_json::{Value, json};

use self::side::{Echo, Side, store_body};

/// Each case becomes a test of the fake and an ignored test of the real one.
macro_rules! table {
    ($($case:ident),* $(,)?) => {
        mod fake {
            $(#[test] fn $case() { super::$case(&super::Side::fake()); })*
        }
        mod real {
            $(#[test] #[ignore = "needs frps and frpc"] fn $case() { super::$case(&super::Side::real()); })*
        }
    };
}

table! {
    the_version_is_one_line,
    verify_accepts_what_the_agent_uses,
    verify_refuses_what_is_wrong,
    the_admin_api_wants_its_password,
    a_taken_admin_port_ends_it,
    proxies_of_the_settings_run,
    the_store_adds_replaces_and_removes,
    the_store_refuses_nonsense,
    the_store_is_kept_over_a_restart,
    without_a_store_there_is_no_such_call,
    a_refused_port_is_accepted_first,
    a_taken_port_is_named_by_who_has_it,
    a_domain_belongs_to_one_proxy,
    http_goes_by_the_host_that_is_asked_for,
    a_changed_note_asks_the_server_again,
    reload_touches_only_what_changed,
    reload_of_a_broken_file_changes_nothing,
    removal_lets_streams_go_on,
    half_a_stream_is_no_stream,
    stop_and_signals_end_it,
    without_a_server_it_waits_or_ends,
    a_refused_token_is_logged,
    a_lost_session_comes_back,
}

fn the_version_is_one_line(side: &Side) {
    let (code, stdout) = side.run(&["--version"]);
    assert_eq!(code, 0);
    assert_eq!(stdout, format!("{}\n", side.version()));
}

fn verify_accepts_what_the_agent_uses(side: &Side) {
    let (code, stdout) = side.verify(&side.config(""));
    assert!(code == 0 && stdout.contains("syntax is ok"), "{code}: {stdout}");
    let rich = r#"
        [metadatas]
        "instance" = "x"
        [[proxies]]
        name = "one"
        type = "tcp"
        localIP = "127.0.0.1"
        localPort = 22
        remotePort = 10001
        enabled = true
        [[proxies]]
        name = "two"
        type = "http"
        localPort = 80
        customDomains = ["a-b.c_d-8888"]
        [proxies.metadatas]
        guest = "8888"
    "#;
    let (code, stdout) = side.verify(&side.config(rich));
    assert!(code == 0 && stdout.contains("syntax is ok"), "{code}: {stdout}");
}

fn verify_refuses_what_is_wrong(side: &Side) {
    let proxy = |lines: &str| format!("[[proxies]]\nname = \"a\"\n{lines}\n");
    let cases = [
        (side.config("[bogus]\nx = 1"), "unknown field \"bogus\""),
        (side.config("[transport]\nbogus = 1"), "unknown field \"bogus\""),
        (side.config(&proxy("type = \"tcp\"\nlocalPort = 1\nbogus = 2")), "unknown field \"bogus\""),
        (side.config("not toml"), "toml"),
        (side.config("").replace("serverPort = ", "serverPort = \"x\" #"), ""),
        (side.config("").replace("level = \"info\"", "level = \"loud\""), "log level"),
        (side.config(&proxy("type = \"tcp\"\nlocalPort = 70000")), "localPort"),
        (side.config(&proxy("type = \"http\"\nlocalPort = 80")), "custom domains"),
        (side.config(&proxy("type = \"quic\"\nlocalPort = 80")), "type"),
        (side.config(&proxy("type = \"tcp\"\nlocalPort = 1").repeat(2)), "proxy name [a] is duplicated"),
    ];
    for (config, expected) in cases {
        let (code, stdout) = side.verify(&config);
        assert!(code == 1 && stdout.contains(expected), "{expected:?}: {code}: {stdout}");
    }
    assert_eq!(side.run(&["verify", "-c", "/nowhere/frpc.toml"]).0, 1);
}

fn the_admin_api_wants_its_password(side: &Side) {
    let frpc = side.start(&side.config(""));
    let status = |method: &str, path: &str, password: &str| frpc.ask(method, path, password, "").status;
    assert_eq!(status("GET", "/healthz", "wrong"), 200);
    for path in ["/api/status", "/api/reload", "/api/store/proxies"] {
        assert_eq!(status("GET", path, "wrong"), 401, "{path}");
    }
    assert_eq!(frpc.ask("GET", "/api/status", "wrong", "").text().trim(), "Unauthorized");
    assert_eq!(status("GET", "/api/status", side::PASSWORD), 200);
    assert_eq!(status("GET", "/api/nothing", side::PASSWORD), 404);
    assert_eq!(status("POST", "/api/status", side::PASSWORD), 405);
    assert_eq!(status("GET", "/api/stop", side::PASSWORD), 405);
}

fn a_taken_admin_port_ends_it(side: &Side) {
    let taken = TcpListener::bind(("127.0.0.1", side.admin_port())).unwrap();
    let mut frpc = side.spawn(&side.config(""));
    assert_eq!(frpc.wait(Duration::from_secs(10)).code(), Some(1));
    drop(taken);
}

fn proxies_of_the_settings_run(side: &Side) {
    let echo = Echo::start();
    let frpc = side.start(&side.config(&format!(
        "[[proxies]]\nname = \"t\"\ntype = \"tcp\"\nlocalPort = {0}\nremotePort = 10001\n\
         [[proxies]]\nname = \"h\"\ntype = \"http\"\nlocalPort = {0}\ncustomDomains = [\"abc-8888\"]\n",
        echo.port
    )));
    let tcp = frpc.wait_for("t", "running");
    let expected = json!({
        "name": "t", "type": "tcp", "status": "running", "err": "", "plugin": "",
        "local_addr": format!("127.0.0.1:{}", echo.port), "remote_addr": format!("{}:10001", side.address()),
    });
    assert_eq!(tcp, expected);
    let http = frpc.wait_for("h", "running");
    assert_eq!(http["type"], "http");
    assert!(http["remote_addr"].as_str().unwrap().starts_with("abc-8888:"), "{http}");
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
}

fn the_store_adds_replaces_and_removes(side: &Side) {
    let echo = Echo::start();
    let frpc = side.start(&side.config(""));
    let added = frpc.post(&store_body("a", echo.port, 10_001));
    assert_eq!(added.status, 200, "{}", added.text());
    assert_eq!((&added.json()["name"], &added.json()["tcp"]["remotePort"]), (&json!("a"), &json!(10_001)));
    assert_eq!(frpc.wait_for("a", "running")["source"], "store");
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
    assert_eq!(frpc.call("GET", "/api/store/proxies/a", &Value::Null).json()["type"], "tcp");
    let all = frpc.call("GET", "/api/store/proxies", &Value::Null).json();
    assert_eq!(all["proxies"].as_array().unwrap().len(), 1);
    assert_eq!(frpc.post(&store_body("a", echo.port, 10_002)).status, 409);

    let moved = store_body("a", echo.port, 10_003);
    assert_eq!(frpc.call("PUT", "/api/store/proxies/a", &moved).status, 200);
    frpc.wait_until("a has moved", || frpc.status("a")["remote_addr"] == format!("{}:10003", side.address()));
    assert_eq!(echo.through(side.tcp(10_003)), "hello");
    frpc.wait_until("10001 is free", || side.is_closed(10_001));

    assert_eq!(frpc.call("DELETE", "/api/store/proxies/a", &Value::Null).status, 200);
    frpc.wait_until("10003 is free", || side.is_closed(10_003));
    assert_eq!(frpc.status("a"), Value::Null);
    assert_eq!(frpc.call("DELETE", "/api/store/proxies/a", &Value::Null).status, 404);
    assert_eq!(frpc.call("GET", "/api/store/proxies/a", &Value::Null).status, 404);
    assert_eq!(frpc.call("PUT", "/api/store/proxies/a", &moved).status, 404);
}

fn the_store_refuses_nonsense(side: &Side) {
    let frpc = side.start(&side.config(""));
    let good = store_body("a", 22, 10_001);
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    let cases = [
        with("name", json!("")),
        with("type", json!("quic")),
        with("type", json!("http")),
        with("tcp", json!("x")),
        with("http", json!({ "localPort": 1, "customDomains": ["x"] })),
        json!({ "name": "a", "type": "tcp" }),
        json!({ "name": "a", "type": "http", "http": { "localPort": 1 } }),
        json!({ "name": "a", "type": "tcp", "tcp": { "localPort": 70_000, "remotePort": 1 } }),
    ];
    for body in cases {
        let reply = frpc.post(&body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        assert!(reply.json()["Msg"].is_string(), "{body}: {}", reply.text());
    }
    assert_eq!(frpc.ask("POST", "/api/store/proxies", side::PASSWORD, "{").status, 400);
    assert_eq!(frpc.call("PUT", "/api/store/proxies/b", &good).status, 400);
    // Not everything is refused: fields it does not know are not looked at.
    assert_eq!(frpc.post(&with("bogus", json!(1))).status, 200);
}

fn the_store_is_kept_over_a_restart(side: &Side) {
    let echo = Echo::start();
    let config = side.config("");
    let frpc = side.start(&config);
    assert_eq!(frpc.post(&store_body("kept", echo.port, 10_001)).status, 200);
    frpc.wait_for("kept", "running");
    let mode = std::fs::metadata(side.store()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    drop(frpc);
    let frpc = side.start(&config);
    frpc.wait_for("kept", "running");
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
}

fn without_a_store_there_is_no_such_call(side: &Side) {
    let config = side.config("").replace("[store]", "").replace("path = ", "# path = ");
    let frpc = side.start(&config);
    assert_eq!(frpc.call("GET", "/api/store/proxies", &Value::Null).status, 404);
    assert_eq!(frpc.post(&store_body("a", 22, 10_001)).status, 404);
}

fn a_refused_port_is_accepted_first(side: &Side) {
    let frpc = side.start(&side.config(""));
    assert_eq!(frpc.post(&store_body("a", 22, 9_999)).status, 200);
    let status = frpc.wait_for("a", "start error");
    assert_eq!((&status["err"], &status["remote_addr"]), (&json!("port not allowed"), &json!("")));
    // Later ones are not held up by it.
    assert_eq!(frpc.post(&store_body("b", 22, 10_001)).status, 200);
    frpc.wait_for("b", "running");
}

fn a_taken_port_is_named_by_who_has_it(side: &Side) {
    let frpc = side.start(&side.config(""));
    frpc.post(&store_body("first", 22, 10_001));
    frpc.wait_for("first", "running");
    frpc.post(&store_body("second", 22, 10_001));
    assert_eq!(frpc.wait_for("second", "start error")["err"], "port already used");
    let _stranger = TcpListener::bind(side.tcp(10_002)).unwrap();
    frpc.post(&store_body("third", 22, 10_002));
    assert_eq!(frpc.wait_for("third", "start error")["err"], "port unavailable");
}

fn a_domain_belongs_to_one_proxy(side: &Side) {
    let frpc = side.start(&side.config(""));
    let http = |name: &str, domain: &str| json!({ "name": name, "type": "http", "http": { "localPort": 80, "customDomains": [domain] } });
    assert_eq!(frpc.post(&http("a", "Abc-80")).status, 200);
    frpc.wait_for("a", "running");
    assert_eq!(frpc.post(&http("b", "aBC-80")).status, 200);
    assert_eq!(frpc.wait_for("b", "start error")["err"], "router config conflict");
}

fn http_goes_by_the_host_that_is_asked_for(side: &Side) {
    let any = ([127, 0, 0, 1], 0).into();
    let local = Server::start(any, |request| {
        let host = request.header("host").unwrap_or_default();
        Some(Answer::json(200, &json!({ "host": host, "length": request.body.len() })))
    });
    let local = local.unwrap();
    let frpc = side.start(&side.config(""));
    let port = local.address().port();
    frpc.post(
        &json!({ "name": "a", "type": "http", "http": { "localPort": port, "customDomains": ["abc-80"] } }),
    );
    frpc.wait_for("a", "running");
    let large = "x".repeat(300_000);
    for host in ["abc-80", "ABC-80"] {
        let reply = side.http(host).send("POST", "/", large.as_bytes()).unwrap();
        assert_eq!(reply.json(), json!({ "host": host, "length": large.len() }));
    }
    assert_eq!(side.http("abc").call("GET", "/", None).unwrap().status, 404);
    drop(local);
    let broken = side.http("abc-80").call("GET", "/", None);
    assert!(broken.is_err() || broken.unwrap().status != 200);
}

fn a_changed_note_asks_the_server_again(side: &Side) {
    let frpc = side.start(&side.config(""));
    let stranger = TcpListener::bind(side.tcp(10_001)).unwrap();
    let mut body = store_body("a", 22, 10_001);
    frpc.post(&body);
    frpc.wait_for("a", "start error");
    drop(stranger);
    // By itself it would ask after half a minute only.
    body["tcp"]["metadatas"] = json!({ "attempt": "2" });
    let start = Instant::now();
    assert_eq!(frpc.call("PUT", "/api/store/proxies/a", &body).status, 200);
    frpc.wait_for("a", "running");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

fn reload_touches_only_what_changed(side: &Side) {
    let echo = Echo::start();
    let proxy = |name: &str, port: u16| {
        format!(
            "[[proxies]]\nname = \"{name}\"\ntype = \"tcp\"\nlocalPort = {}\nremotePort = {port}\n",
            echo.port
        )
    };
    let frpc = side.start(&side.config(&(proxy("stays", 10_001) + &proxy("goes", 10_002))));
    frpc.wait_for("stays", "running");
    frpc.wait_for("goes", "running");
    let mut stream = echo.stream(side.tcp(10_001));
    frpc.rewrite(&side.config(&(proxy("stays", 10_001) + &proxy("comes", 10_003))));
    assert_eq!(frpc.call("GET", "/api/reload", &Value::Null).status, 200);
    frpc.wait_for("comes", "running");
    frpc.wait_until("10002 is free", || side.is_closed(10_002));
    assert_eq!(frpc.status("goes"), Value::Null);
    assert_eq!(frpc.status("stays")["source"], Value::Null);
    Echo::talk(&mut stream);
    // Not strict unless asked.
    frpc.rewrite(&side.config("[bogus]\nx = 1"));
    assert_eq!(frpc.call("GET", "/api/reload", &Value::Null).status, 200);
    frpc.wait_until("all are gone", || frpc.status("stays").is_null() && frpc.status("comes").is_null());
}

fn reload_of_a_broken_file_changes_nothing(side: &Side) {
    let echo = Echo::start();
    let proxy =
        format!("[[proxies]]\nname = \"a\"\ntype = \"tcp\"\nlocalPort = {}\nremotePort = 10001\n", echo.port);
    let frpc = side.start(&side.config(&proxy));
    frpc.wait_for("a", "running");
    for broken in ["not toml".to_owned(), side.config(&proxy.repeat(2))] {
        frpc.rewrite(&broken);
        let reply = frpc.call("GET", "/api/reload", &Value::Null);
        assert_eq!(reply.status, 400, "{}", reply.text());
    }
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
}

fn removal_lets_streams_go_on(side: &Side) {
    let echo = Echo::start();
    let frpc = side.start(&side.config(""));
    frpc.post(&store_body("a", echo.port, 10_001));
    frpc.wait_for("a", "running");
    let mut stream = echo.stream(side.tcp(10_001));
    frpc.call("DELETE", "/api/store/proxies/a", &Value::Null);
    frpc.wait_until("10001 is free", || side.is_closed(10_001));
    Echo::talk(&mut stream);
    // Until the local side ends it: that is how a tenant's sessions die.
    drop(echo);
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0);
}

fn half_a_stream_is_no_stream(side: &Side) {
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let frpc = side.start(&side.config(""));
    frpc.post(&store_body("a", deaf.local_addr().unwrap().port(), 10_001));
    frpc.wait_for("a", "running");
    let mut stream = TcpStream::connect(side.tcp(10_001)).unwrap();
    stream.write_all(b"hello").unwrap();
    let (mut local, _) = deaf.accept().unwrap();
    local.read_exact(&mut [0; 5]).unwrap();
    // The local side says nothing and stays open. A renter who closes only his half gets no answer any more.
    stream.shutdown(Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

fn stop_and_signals_end_it(side: &Side) {
    let mut frpc = side.start(&side.config(""));
    frpc.wait_for_session();
    assert_eq!(frpc.call("POST", "/api/stop", &Value::Null).status, 200);
    assert_eq!(frpc.wait(Duration::from_secs(10)).code(), Some(0));
    let mut frpc = side.start(&side.config(""));
    frpc.signal(rustix::process::Signal::TERM);
    assert_eq!(frpc.wait(Duration::from_secs(10)).signal(), Some(15));
}

fn without_a_server_it_waits_or_ends(side: &Side) {
    side.down();
    let frpc = side.start(&side.config(""));
    assert_eq!(frpc.call("GET", "/api/status", &Value::Null).text().trim(), "{}");
    // What is wanted meanwhile is not lost.
    let echo = Echo::start();
    assert_eq!(frpc.post(&store_body("a", echo.port, 10_001)).status, 200);
    assert_eq!(frpc.call("GET", "/api/status", &Value::Null).text().trim(), "{}");
    assert!(frpc.log().contains("connect to server error"), "{}", frpc.log());
    side.up();
    frpc.wait_for("a", "running");
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
    drop(frpc);
    side.down();
    let mut frpc = side.spawn(&side.config("").replace("loginFailExit = false", "loginFailExit = true"));
    assert_eq!(frpc.wait(Duration::from_secs(20)).code(), Some(1));
}

fn a_refused_token_is_logged(side: &Side) {
    side.refuse_token();
    let frpc = side.start(&side.config(""));
    let words = "token in login doesn't match token from configuration";
    frpc.wait_until("the refusal is logged", || frpc.log().contains(words));
    assert_eq!(frpc.call("GET", "/api/status", &Value::Null).text().trim(), "{}");
}

fn a_lost_session_comes_back(side: &Side) {
    let echo = Echo::start();
    let frpc = side.start(&side.config(""));
    frpc.post(&store_body("a", echo.port, 10_001));
    frpc.wait_for("a", "running");
    let mut stream = echo.stream(side.tcp(10_001));
    side.down();
    frpc.wait_until("the status is empty", || {
        frpc.call("GET", "/api/status", &Value::Null).text().trim() == "{}"
    });
    // Gone, one way or another.
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(stream.write_all(b"x").is_err() || stream.read(&mut [0; 8]).unwrap_or(0) == 0);
    side.up();
    frpc.wait_for("a", "running");
    assert_eq!(echo.through(side.tcp(10_001)), "hello");
}
