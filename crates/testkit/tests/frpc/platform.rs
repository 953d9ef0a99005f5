//! The platform against something that looks like an agent, with the real frp between them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use qudata_testkit::{
    control_plane::Registered,
    frp::{self, Frps, Options},
    platform::Platform,
    serve::{Answer, Server},
};
use serde_json::json;

use crate::side::Side;

const SECRET: &str = "secret-of-the-agent";

/// An agent with one instance, until that is deleted.
fn agent(deleted: Arc<Mutex<bool>>) -> Server {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::start(any, move |request| {
        if request.header("x-agent-secret") != Some(SECRET) {
            return Some(Answer::json(
                403,
                &json!({ "ok": false, "error": "wrong secret", "code": "wrong_secret" }),
            ));
        }
        let mut deleted = deleted.lock().unwrap();
        let ok = |data| Some(Answer::json(200, &json!({ "ok": true, "data": data })));
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/instances") => ok(json!({ "status": "destroyed" })),
            ("POST", "/instances") => ok(json!({ "id": "i", "ports": {}, "length": request.body.len() })),
            ("GET", "/instances/i") if !*deleted => ok(json!({})),
            ("DELETE", "/instances") => {
                *deleted = true;
                ok(json!({}))
            }
            ("PUT", "/instances") => Some(Answer::json(
                409,
                &json!({ "ok": false, "error": "wrong state", "code": "wrong_state" }),
            )),
            _ => Some(Answer::json(404, &json!({ "ok": false, "error": "no such instance" }))),
        }
    });
    server.unwrap()
}

#[test]
#[ignore = "needs frps and frpc"]
fn orders_go_through_the_tunnel_and_nowhere_else() {
    let side = Side::real();
    let deleted = Arc::default();
    let server = agent(Arc::clone(&deleted));
    let registered = Registered {
        agent_id: "a".to_owned(),
        agent_port: server.address().port(),
        secret: SECRET.to_owned(),
        tunnel_token: "Host-1".to_owned(),
    };
    let platform = Platform::new(side.frps().vhost_http(), &registered);
    let why = platform.wait_until_reachable(Duration::ZERO).unwrap_err();
    assert!(why.contains("404"), "frps without the route: {why}");

    let domain = format!("Host-1-{}", registered.agent_port);
    let proxy = format!(
        "[[proxies]]\nname = \"api\"\ntype = \"http\"\nlocalPort = {}\ncustomDomains = [\"{domain}\"]\n",
        registered.agent_port
    );
    let frpc = side.start(&side.config(&proxy));
    frpc.wait_for("api", "running");
    platform.wait_until_reachable(Duration::from_secs(5)).unwrap();
    assert_eq!(platform.list().unwrap()["status"], "destroyed");
    let large = "x".repeat(900_000);
    assert!(platform.create(&json!({ "user_data": large })).unwrap()["length"].as_u64() > Some(900_000));
    let why = platform.pause("i").unwrap_err();
    assert!(why.contains("409") && why.contains("wrong state"), "{why}");
    platform.delete("i", Duration::from_secs(5)).unwrap();
    assert!(*deleted.lock().unwrap());

    let stranger =
        Platform::new(side.frps().vhost_http(), &Registered { secret: "guessed".to_owned(), ..registered });
    assert!(stranger.list().unwrap_err().contains("wrong secret"));
}

#[test]
#[ignore = "needs frps and frpc"]
fn a_server_restarts_where_it_was_with_another_token() {
    let frp = frp::find().unwrap_or_else(|why| panic!("{why}"));
    let frps = Frps::start(&frp, Options { tcp_ports: 12_000..=12_001, ..Options::default() });
    let (address, port, pid) = (frps.address(), frps.port(), frps.pid());
    frps.set_token("another");
    frps.restart();
    assert_eq!((frps.address(), frps.port(), frps.token().as_str()), (address, port, "another"));
    assert_ne!(frps.pid(), pid);
    assert_eq!(frps.http("nobody").call("GET", "/", None).unwrap().status, 404);
    frps.stop();
    assert!(frps.http("nobody").call("GET", "/", None).is_err() && frps.pid().is_none());
}
