use std::{os::unix::fs::symlink, path::PathBuf};

use tempfile::TempDir;

use super::*;
use crate::{
    config::{Abilities, AdminAccess, Config, tests::setup as a_setup},
    definition::{
        Defined, Definitions,
        tests::{http, tcp},
    },
};

/// As frp 0.70 writes it.
const STORE: &str = r#"{
  "proxies": [
    {"name": "vm.22", "type": "tcp", "transport": {"bandwidthLimitMode": "client"}, "loadBalancer": {"group": ""},
     "healthCheck": {"type": "", "intervalSeconds": 0}, "localIP": "127.0.0.1", "localPort": 20022, "plugin": null,
     "remotePort": 10022},
    {"name": "foreign", "type": "udp", "localIP": "10.0.0.1", "localPort": 5, "remotePort": 6},
    {"name": 7},
    {"name": "vm.80", "type": "http", "localIP": "127.0.0.1", "localPort": 20080, "customDomains": ["tok.x"],
     "metadatas": {"attempt": "2"}}
  ],
  "visitors": []
}"#;

fn in_store_of(text: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("state")).unwrap();
    fs::write(dir.path().join("state/routes.json"), text).unwrap();
    let config = dir.path().join("frpc.toml");
    (dir, config)
}

#[test]
fn the_store_tells_what_an_earlier_frpc_routes() {
    let (dir, config) = in_store_of(STORE);
    let expected = [tcp("vm.22", 10_022, 20_022), http("vm.80", "tok.x", 20_080)];
    assert_eq!(earlier_routes(dir.path(), &config), expected);
    // A configuration without routes, as beside every store.
    let abilities = Abilities { store: true, token_file: true };
    let planned = Config::plan(&a_setup(), abilities, AdminAccess::generate(1)).unwrap();
    fs::write(&config, planned.render(&Definitions::new()).unwrap()).unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), expected);
}

#[test]
fn an_old_frpc_has_them_in_its_configuration() {
    let (dir, config) = in_store_of("");
    fs::remove_file(dir.path().join("state/routes.json")).unwrap();
    let abilities = Abilities { store: false, token_file: false };
    let planned = Config::plan(&a_setup(), abilities, AdminAccess::generate(1)).unwrap();
    let routes = [tcp("a", 1, 2), http("b", "tok.x", 3)];
    let defined = routes.clone().map(|route| (route.name.clone(), Defined { route, attempt: 1 }));
    fs::write(&config, planned.render(&defined.into()).unwrap()).unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), routes);
    // Of a frpc that was ended for good nothing counts.
    fs::remove_dir(dir.path().join("state")).unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), []);
}

#[test]
fn what_cannot_be_read_holds_nothing_and_does_not_block() {
    let nowhere = tempfile::tempdir().unwrap();
    assert_eq!(earlier_routes(nowhere.path(), Path::new("/none")), []);
    for broken in ["", "{", "[]", r#"{"proxies": 1}"#] {
        let (dir, config) = in_store_of(broken);
        fs::write(&config, "proxies = 1").unwrap();
        assert_eq!(earlier_routes(dir.path(), &config), [], "{broken}");
    }
    let (dir, config) = in_store_of(STORE);
    let store = dir.path().join("state/routes.json");
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&store, &elsewhere).unwrap();
    symlink(&elsewhere, &store).unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), [], "a link");
    fs::remove_file(&store).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &store, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), [], "a pipe");
}

#[tokio::test]
async fn that_there_was_never_a_frpc_is_success_at_once() {
    let launcher = Launcher::detached("/bin/true".into(), Vec::new());
    end_earlier(&launcher, Path::new("/none/at/all")).await.unwrap();
    let (dir, config) = in_store_of(STORE);
    end_earlier(&launcher, dir.path()).await.unwrap();
    assert_eq!(earlier_routes(dir.path(), &config), []);
    assert!(!dir.path().join("state").exists());
}
