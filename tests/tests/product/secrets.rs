//! The canary: unique values go into every secret input, and then they are looked for wherever others can read.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use qudata_testkit::{
    agent::{Image, Setup, TestAgent},
    process::Seen,
};
use qudata_tests::{SOON, small};
use serde_json::{Value, json};

const TOKEN: &str = "canary-tunnel-token-7f3a";
const PASSWORD: &str = "canary-registry-password-91bc";
const ENVIRONMENT: &str = "canary-environment-52de";
const USER_DATA: &str = "canary-user-data-c0a8";
const API_KEY: &str = "ak-canary-api-key-66e1";
const WRONG_SECRET: &str = "canary-wrong-secret-3d97";

/// §1.5: bodies, passwords and tokens were in logs, in argv and in the environment of children.
#[test]
fn orig_15_secrets_are_nowhere_to_be_read() {
    let agent = Setup::new(Image::Blank).set("QUDATA_API_KEY", API_KEY).start();
    let mut baseline = agent.baseline();
    let vm = agent.create(&wish());
    agent.wait_for_phase(&vm, "booting", SOON);
    let mut secrets: Vec<String> =
        [TOKEN, PASSWORD, ENVIRONMENT, USER_DATA, API_KEY, WRONG_SECRET].map(str::to_owned).into();
    secrets.push(agent.client().secret.clone().unwrap());
    let key = fs::read_to_string(agent.data_dir().join(".ssh/management_key")).unwrap();
    secrets.push(key.lines().nth(3).unwrap().to_owned());

    let mut places = bodies(&agent, &vm.path());
    places.push(("the agent's log".into(), agent.logs().into_bytes()));
    for process in Seen::all().unwrap() {
        let who = format!("pid {} {}", process.pid, process.name);
        // The owner hands the key over in the agent's own environment; it must go no further.
        if process.pid != agent.pid() {
            places.push((format!("environment of {who}"), process.environment()));
        }
        places.push((format!("arguments of {who}"), process.args.join(" ").into_bytes()));
    }
    for dir in [agent.data_dir(), agent.run_dir(), agent.log_dir()] {
        readable_files(&dir, &mut places);
    }
    for (place, bytes) in &places {
        let text = String::from_utf8_lossy(bytes);
        let found = secrets.iter().find(|secret| text.contains(secret.as_str()));
        assert!(found.is_none(), "{place} shows {found:?}");
    }
    for private in ["agent_secret", ".ssh/management_key"] {
        let mode = fs::metadata(agent.data_dir().join(private)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{private} has mode {mode:o}");
    }
    agent.delete(&vm);
    agent.assert_clean(&mut baseline);
}

fn wish() -> Value {
    let mut wish = small();
    wish["tunnel_token"] = json!(TOKEN);
    wish["login"] = json!("somebody");
    wish["password"] = json!(PASSWORD);
    wish["registry"] = json!("registry.example");
    wish["env_variables"] = json!({ "KEY": ENVIRONMENT });
    wish["user_data"] = json!(format!("#cloud-config\nwrite_files:\n- path: /x\n  content: {USER_DATA}\n"));
    wish
}

/// What the API answers, above all to calls with secrets where they do not belong.
fn bodies(agent: &TestAgent, path: &str) -> Vec<(String, Vec<u8>)> {
    let mut places = Vec::new();
    for get in ["/instances", path, "/host", "/metrics", "/openapi.json", &format!("{path}/console")] {
        places.push((format!("GET {get}"), agent.call("GET", get, None).body));
    }
    let mistakes = [
        ("tunnel_token", json!({ "x": TOKEN })),
        ("tunnel_token", json!(format!("{TOKEN}\"\n"))),
        ("tunnel_token", json!(TOKEN.repeat(100))),
        ("user_data", json!([USER_DATA])),
        ("user_data", json!(format!("no known kind {USER_DATA}"))),
        ("ssh_enabled", json!(PASSWORD)),
        (PASSWORD, json!(1)),
    ];
    // The last two put a secret where no secret is expected: those values may be shown to who sent them.
    for (field, value) in &mistakes[..5] {
        let mut body = wish();
        body[*field] = value.clone();
        let reply = agent.call("POST", "/instances", Some(&body));
        assert!((400..500).contains(&reply.status), "{field}: {}", reply.text());
        places.push((format!("the answer to a bad {field}"), reply.body));
    }
    let cut = wish().to_string();
    for length in [cut.len() - 1, cut.len() / 2, cut.len() / 3] {
        let reply = agent.client().send("POST", "/instances", &cut.as_bytes()[..length]).unwrap();
        assert_eq!(reply.status, 400);
        places.push((format!("the answer to {length} bytes of a body"), reply.body));
    }
    let mut stranger = agent.client().clone();
    stranger.secret = Some(WRONG_SECRET.into());
    places.push((
        "the answer to a wrong secret".into(),
        stranger.call("GET", "/instances", None).unwrap().body,
    ));
    places
}

/// Files that other users may read, and the way to which is open.
fn readable_files(dir: &Path, places: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        let Ok(meta) = entry.metadata() else { continue };
        let mode = meta.permissions().mode();
        if meta.is_dir() && mode & 0o001 != 0 {
            readable_files(&entry.path(), places);
        } else if meta.is_file() && mode & 0o004 != 0 {
            places.push((entry.path().display().to_string(), fs::read(entry.path()).unwrap_or_default()));
        }
    }
}
