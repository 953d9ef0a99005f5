//! An agent behind a tunnel, without frp: the fake frpc publishes, and fails on order. What the real one does is in
//! `tunnel_real`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use qudata_testkit::{
    agent::{Image, Setup, TestAgent, TestInstance},
    control_plane::{ControlPlane, Terms},
    frp::{FakeFrpc, Place},
    platform::Platform,
};
use qudata_tests::{AT_ONCE, SOON, small};
use serde_json::{Value, json};

/// Everything outside of one host.
struct World {
    control_plane: ControlPlane,
    frpc: FakeFrpc,
    place: Place,
}

impl World {
    fn new() -> Self {
        Self {
            control_plane: ControlPlane::start(Terms::default()),
            frpc: FakeFrpc::make(),
            place: Place::take(),
        }
    }

    fn agent(&self) -> TestAgent {
        Setup::new(Image::Blank).fake_tunnel(&self.control_plane, &self.frpc, &self.place).start()
    }

    fn platform(&self) -> Platform {
        let registered = self.control_plane.wait_for_registration(SOON);
        let server = (self.place.address(), FakeFrpc::VHOST_HTTP_PORT).into();
        let platform = Platform::new(server, &registered);
        platform.wait_until_reachable(SOON).unwrap();
        platform
    }
}

/// The smallest wish that the tunnel can publish.
pub(crate) fn wish(token: &str) -> Value {
    let mut wish = small();
    wish["tunnel_token"] = json!(token);
    wish
}

pub(crate) fn order(platform: &Platform, wish: &Value) -> TestInstance {
    let created = platform.create(wish).unwrap();
    let mut vm = TestInstance::known(created["id"].as_str().unwrap());
    vm.created = created;
    vm
}

/// State of the route of a guest's port, and its public port.
pub(crate) fn route(agent: &TestAgent, vm: &TestInstance, guest: u16) -> (String, u16) {
    let view = agent.view(vm);
    let route = view["routes"].as_array().unwrap().iter().find(|route| route["guest_port"] == guest).unwrap();
    let public = route["public_port"].as_u64().unwrap();
    (route["state"].as_str().unwrap().to_owned(), public.try_into().unwrap())
}

#[track_caller]
pub(crate) fn wait_until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < within, "not within {within:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
    start.elapsed()
}

#[track_caller]
pub(crate) fn wait_for_routes(agent: &TestAgent, vm: &TestInstance, within: Duration) -> Duration {
    wait_until("all routes are up", within, || {
        let view = agent.view(vm);
        let routes = view["routes"].as_array().unwrap().clone();
        routes.len() == 2 && routes.iter().all(|route| route["state"] == "up")
    })
}

fn tunnel_state(agent: &TestAgent) -> String {
    let host = agent.call("GET", "/host", None).data();
    host["tunnel_link"]["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn an_agent_is_driven_through_the_tunnel() {
    let world = World::new();
    let agent = world.agent();
    let platform = world.platform();
    agent.wait_for_frpc(SOON);
    let mut baseline = agent.baseline();
    let before = Instant::now();
    let vm = order(&platform, &wish("renter-1"));
    wait_for_routes(&agent, &vm, SOON);
    assert_eq!(platform.list().unwrap()["instances"][0]["id"], vm.id.as_str());
    world.control_plane.wait_for_status("pending", before, SOON);
    let (_, ssh) = route(&agent, &vm, 22);
    assert_eq!(agent.view(&vm)["ports"]["22"], ssh.to_string());
    assert!(!agent.view(&vm)["local_ports"]["22"].is_null());

    platform.delete(&vm.id, SOON).unwrap();
    world.control_plane.wait_for_status("destroyed", before, SOON);
    assert_eq!(world.control_plane.complaints(), Vec::<String>::new());
    agent.assert_clean(&mut baseline);
}

#[test]
fn a_public_port_that_somebody_else_has_is_replaced() {
    let world = World::new();
    let agent = world.agent();
    let platform = world.platform();
    // The server has given all of them to others.
    world.frpc.order(&json!({ "allow": [1, 1] }));
    let vm = order(&platform, &wish("renter-1"));
    let first = vm.port(22);
    agent.wait_for_phase(&vm, "port_moved", SOON);
    world.frpc.recover();
    // What the bring-up remembers must not win over what has changed meanwhile.
    vm.from_the_beginning();
    agent.wait_for_phase(&vm, "booting", SOON);
    wait_for_routes(&agent, &vm, Duration::from_secs(60));
    let (_, public) = route(&agent, &vm, 22);
    assert!(public != first && agent.ssh_ports().contains(&public), "{public} after {first}");
    assert_eq!(agent.view(&vm)["ports"]["22"], public.to_string());
    platform.delete(&vm.id, SOON).unwrap();
}

/// F9 of the audit: the original restarted frpc once and then gave up, and its every failure was the tenants'.
#[test]
fn orig_f9_whatever_frpc_does_tenants_stay_and_the_tunnel_comes_back() {
    let world = World::new();
    let agent = world.agent();
    let platform = world.platform();
    let vm = order(&platform, &wish("renter-1"));
    wait_for_routes(&agent, &vm, SOON);
    agent.wait_for_phase(&vm, "booting", SOON);
    let qemu = agent.qemu(&vm);
    for faults in [
        json!({ "session": "down" }),
        json!({ "session": "refused" }),
        json!({ "silent": true }),
        json!({ "crash_at_start": true }),
        json!({ "unauthorized": true }),
    ] {
        world.frpc.order(&faults);
        if faults["crash_at_start"] == true {
            agent.frpc().unwrap().signal(rustix::process::Signal::KILL);
        }
        wait_until(&format!("{faults} is noticed"), SOON, || tunnel_state(&agent) == "down");
        let problems = agent.call("GET", "/host", None).data()["problems"].to_string();
        assert!(problems.contains("the tunnel is down"), "{faults}: {problems}");
        let start = Instant::now();
        assert_eq!(agent.view(&vm)["id"], vm.id.as_str());
        assert!(start.elapsed() < AT_ONCE, "{faults}: the local API waits for the tunnel");
        world.frpc.recover();
        wait_for_routes(&agent, &vm, Duration::from_secs(60));
        wait_until("the tunnel is up", SOON, || tunnel_state(&agent) == "up");
        assert_eq!(agent.qemu(&vm).identity(), qemu.identity());
    }
    platform.wait_until_reachable(SOON).unwrap();
    platform.delete(&vm.id, SOON).unwrap();
}

/// frpc outlives the agent: left alone, its routes would lead to whoever gets their ports next.
#[test]
fn a_tunnel_that_is_turned_off_leaves_no_client_behind() {
    let world = World::new();
    let mut agent = world.agent();
    let platform = world.platform();
    let vm = order(&platform, &wish("renter-1"));
    wait_for_routes(&agent, &vm, SOON);
    agent.wait_for_phase(&vm, "booting", SOON);
    let (frpc, qemu) = (agent.frpc().unwrap(), agent.qemu(&vm));
    let local = agent.view(&vm)["local_ports"]["22"].clone();
    agent.terminate();
    assert!(frpc.is_alive(), "an agent that stops leaves the tunnel");
    agent.change("QUDATA_TUNNEL", "none");
    agent.restart();
    assert!(!frpc.is_alive() && qemu.is_alive());
    let view = agent.view(&vm);
    assert!(view["ports"]["22"] == local && view["routes"].is_null(), "{view}");
    agent.delete(&vm);
}

#[test]
fn the_control_plane_may_be_away_and_replace_the_secret() {
    let world = World::new();
    let agent = world.agent();
    let platform = world.platform();
    let vm = order(&platform, &wish("renter-1"));
    wait_for_routes(&agent, &vm, SOON);
    world.control_plane.stop();
    // A new agent on a registered host needs no control plane.
    agent.kill9();
    agent.restart();
    platform.wait_until_reachable(SOON).unwrap();
    wait_for_routes(&agent, &vm, SOON);
    world.control_plane.rotate("the-secret-of-the-second-registration");
    world.control_plane.resume();
    let new = wait_until("the platform is known by the new secret", Duration::from_secs(120), || {
        let registered = world.control_plane.registered().unwrap();
        let server = (world.place.address(), FakeFrpc::VHOST_HTTP_PORT).into();
        registered.secret.ends_with("second-registration")
            && Platform::new(server, &registered).list().is_ok()
    });
    eprintln!("the new secret was in force {new:?} after the control plane was back");
    assert!(platform.list().unwrap_err().contains("403"), "the old secret is worth nothing");
    assert_eq!(world.control_plane.complaints(), Vec::<String>::new());
}

/// F2 of the audit: a token with a quote and a newline added whole proxies to the original's settings, one with braces
/// read its environment.
#[test]
fn orig_f2_a_token_says_a_name_and_nothing_else() {
    let world = World::new();
    let agent = world.agent();
    let platform = world.platform();
    let frpc = agent.wait_for_frpc(SOON);
    let long = "a".repeat(10_000);
    for token in [
        "a\"]\n[[proxies]]\nname = \"x\"\ntype = \"tcp\"\nplugin.type = \"static_file\"",
        "{{ .Envs.QUDATA_API_KEY }}",
        "a b",
        "a'b",
        "a\\b",
        "a/b",
        "a,b",
        "*",
        "имя",
        "-a",
        "a.",
        "",
        &long,
    ] {
        let reply = platform.call("POST", "/instances", Some(&wish(token))).unwrap();
        let shown: String = token.chars().take(20).collect();
        assert_eq!((reply.status, reply.code().as_str()), (400, "invalid_field"), "{shown:?}");
        assert!(reply.error().contains("tunnel_token") && reply.error().len() < 500, "{}", reply.error());
    }
    assert_eq!(agent.ids(), Vec::<String>::new());
    assert_eq!(agent.frpc().unwrap().identity(), frpc.identity());
    let routes =
        fs::read_to_string(agent.run_dir().join(format!("tunnel-{}/state/routes.json", agent.table())))
            .unwrap();
    let routes: Value = serde_json::from_str(&routes).unwrap();
    let names: Vec<_> = routes["proxies"].as_array().unwrap().iter().map(|proxy| &proxy["name"]).collect();
    assert!(names.len() == 1 && names[0].as_str().unwrap().starts_with("agent-"), "{names:?}");
}

/// F5 and F6 of the audit: the original's frpc was root, had the API key in its environment, and everybody could read
/// the token.
#[test]
fn orig_f6_frpc_is_nobody_and_tells_nobody() {
    let world = World::new();
    let agent = world.agent();
    world.platform();
    let frpc = agent.wait_for_frpc(SOON);
    assert!(frpc.uid >= 10_000, "{frpc:?}");
    let environment = String::from_utf8_lossy(&frpc.environment()).into_owned();
    let secrets = [world.control_plane.api_key(), "token-for-nobody".to_owned()];
    for secret in &secrets {
        assert!(!environment.contains(secret) && !frpc.args.join(" ").contains(secret));
        assert!(!agent.logs().contains(secret), "the log tells a secret");
    }
    let mut found = 0;
    for file in files_below(agent.dir()) {
        let text = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
        if secrets.iter().any(|secret| text.contains(secret)) {
            found += 1;
            let mode = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} can be read by others", file.display());
        }
    }
    assert!(found > 0, "the token is in no file: this test looks in the wrong place");
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .flat_map(|entry| {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                files_below(&entry.path())
            } else if kind.is_file() && entry.metadata().unwrap().len() < 1_000_000 {
                vec![entry.path()]
            } else {
                Vec::new()
            }
        })
        .collect()
}
