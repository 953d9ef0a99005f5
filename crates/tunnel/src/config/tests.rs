use proptest::prelude::*;
use qudata_host::launch::Launcher;

use super::*;
use crate::{
    definition::{
        Defined,
        tests::{http, tcp},
    },
    setup::Server,
};

const ALL: Abilities = Abilities { store: true, token_file: true };
const NONE: Abilities = Abilities { store: false, token_file: false };

pub(crate) fn setup() -> TunnelSetup {
    TunnelSetup {
        frpc: "/usr/bin/frpc".into(),
        config: "/run/qudata/tunnel/frpc.toml".into(),
        dir: "/run/qudata/tunnel".into(),
        uid: 900,
        gid: 900,
        launcher: Launcher::detached("/bin/true".into(), Vec::new()),
        server: Server {
            host: "agent.ru1.qudata.ai".into(),
            port: 7000,
            token: Some("s3cret+/=".into()),
            ca: Some("/etc/qudata/frp-ca.pem".into()),
        },
        user: "018f-agent".into(),
    }
}

fn access() -> AdminAccess {
    AdminAccess { password: "generated".into(), ..AdminAccess::generate(7400) }
}

fn routes() -> Definitions {
    let defined = |route, attempt| Defined { route, attempt };
    [defined(tcp("vm.22", 10_001, 30_022), 0), defined(http("vm.80", "tok.x", 30_080), 2)]
        .into_iter()
        .map(|defined| (defined.route.name.clone(), defined))
        .collect()
}

#[test]
fn golden_with_a_store() {
    let config = Config::plan(&setup(), ALL, access()).unwrap();
    insta::assert_snapshot!(config.render(&Definitions::new()).unwrap());
}

#[test]
fn golden_of_an_old_frpc_with_routes() {
    let config = Config::plan(&setup(), NONE, access()).unwrap();
    insta::assert_snapshot!(config.render(&routes()).unwrap());
}

#[test]
fn a_successor_reads_back_what_was_written() {
    for abilities in [ALL, NONE] {
        let config = Config::plan(&setup(), abilities, access()).unwrap();
        let read: Config = toml::from_str(&config.render(&routes()).unwrap()).unwrap();
        assert!(read.without_routes() == config);
        assert_eq!(read.abilities(), abilities);
        assert_eq!((read.web_server.port, read.web_server.password.as_str()), (7400, "generated"));
        assert_eq!(read.routes(), routes());
    }
}

#[test]
fn an_open_frps_gets_no_token() {
    let mut open = setup();
    open.server.token = None;
    let text = Config::plan(&open, ALL, access()).unwrap().render(&Definitions::new()).unwrap();
    assert!(!text.contains("token ") && !text.contains("tokenSource"), "{text}");
}

/// The original put the token into a text template: a quote and a newline added whole proxies.
#[test]
fn orig_f2_a_token_that_would_write_configuration_is_refused_by_a_sentence() {
    let long = "x".repeat(10_000);
    let hostile = [
        "",
        "a\"\n[[proxies]]\nname = \"x\"",
        "a'b",
        "a b",
        "a\\b",
        "{{ .Envs.QUDATA_API_KEY }}",
        "a{b",
        "tökén",
        "a\0b",
        "a\u{202e}b",
        "a\r\nb",
        &long,
    ];
    for token in hostile {
        let sentence = check_token(token).unwrap_err().to_string();
        assert!(token.is_empty() || !sentence.contains(token), "the token is told");
        let mut bad = setup();
        bad.server.token = Some(token.into());
        assert!(matches!(Config::plan(&bad, ALL, access()), Err(ConfigError::Token(_))), "{token:?}");
    }
    check_token(&"x".repeat(TOKEN_MAX)).unwrap();
}

#[test]
fn no_value_reaches_frpcs_templates() {
    let mut bad = setup();
    bad.server.host = "{{ .Envs.HOME }}".into();
    let error = Config::plan(&bad, ALL, access()).err().unwrap().to_string();
    assert!(error.starts_with("the server of the tunnel cannot be"), "{error}");
    let mut bad = setup();
    bad.user = "a{{b".into();
    assert!(Config::plan(&bad, ALL, access()).is_err());
    let mut bad = setup();
    bad.server.ca = Some("/etc/{{x}}.pem".into());
    assert!(Config::plan(&bad, ALL, access()).is_err());
    let mut bad = setup();
    bad.config = "/run/{{x}}/frpc.toml".into();
    assert!(Config::plan(&bad, ALL, access()).is_err());
    let mut bad = setup();
    bad.dir = "relative".into();
    assert!(Config::plan(&bad, ALL, access()).is_err());
}

#[test]
fn every_frpc_has_a_password_of_its_own() {
    let (one, other) = (AdminAccess::generate(1), AdminAccess::generate(1));
    assert_ne!(one.password, other.password);
    assert_eq!(one.password.len(), 32);
}

proptest! {
    #[test]
    fn whatever_token_passes_is_one_value_of_the_file(token in "[!-~]{1,60}") {
        let mut given = setup();
        given.server.token = Some(token.clone().into());
        if let Ok(config) = Config::plan(&given, NONE, access()) {
            let text = config.render(&routes()).unwrap();
            let read: toml::Table = text.parse().unwrap();
            prop_assert_eq!(read["auth"]["token"].as_str(), Some(token.as_str()));
            prop_assert_eq!(read["proxies"].as_array().unwrap().len(), 2);
        } else {
            prop_assert!(check_token(&token).is_err());
        }
    }
}
