//! A route as frpc takes it: as a table of its configuration and as a body of its store API. Pure; called by `config` and
//! `publish`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::route::{ProxyName, Route, RouteKind};

/// Routes end here on this host, whatever they are reached by.
const LOCAL: &str = "127.0.0.1";
/// frpc starts a route anew when anything about it changes. This is what changes when it is tried again.
const ATTEMPT: &str = "attempt";

/// A route that frpc has been given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Defined {
    pub(crate) route: Route,
    /// 0 at first; counts the tries after a refusal.
    pub(crate) attempt: u32,
}

/// Routes by name.
pub(crate) type Definitions = BTreeMap<ProxyName, Defined>;

/// What a route of either kind consists of, pkg/config/v1/proxy.go of frp 0.70.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Block {
    #[serde(rename = "localIP")]
    local_ip: String,
    local_port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    remote_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    custom_domains: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metadatas: Option<BTreeMap<String, String>>,
}

/// A route as a table of the configuration.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    block: Block,
}

/// A route as a body of the store API, client/http/model of frp 0.70.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
pub(crate) struct StoreProxy {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tcp: Option<Block>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    http: Option<Block>,
}

impl Block {
    fn of(defined: &Defined) -> Self {
        let (remote_port, custom_domains) = match &defined.route.kind {
            RouteKind::Tcp { remote_port } => (Some(*remote_port), None),
            RouteKind::Http { domain } => (None, Some(vec![domain.to_string()])),
        };
        let attempt = || BTreeMap::from([(ATTEMPT.to_owned(), defined.attempt.to_string())]);
        Self {
            local_ip: LOCAL.to_owned(),
            local_port: defined.route.local_port,
            remote_port,
            custom_domains,
            metadatas: (defined.attempt > 0).then(attempt),
        }
    }

    /// `None` when it is nothing that was written here.
    fn read(&self, name: &str, kind: &str) -> Option<Defined> {
        let kind = match (kind, self.remote_port, self.custom_domains.as_deref()) {
            ("tcp", Some(remote_port), None) => RouteKind::Tcp { remote_port },
            ("http", None, Some([domain])) => RouteKind::Http { domain: domain.parse().ok()? },
            _ => return None,
        };
        let attempt = self.metadatas.as_ref().and_then(|words| words.get(ATTEMPT));
        let attempt = attempt.map_or(Some(0), |text| text.parse().ok())?;
        let ours = self.local_ip == LOCAL;
        let name = ProxyName::try_from(name).ok().filter(|_| ours)?;
        Some(Defined { route: Route { name, kind, local_port: self.local_port }, attempt })
    }
}

fn kind_of(route: &Route) -> &'static str {
    match route.kind {
        RouteKind::Tcp { .. } => "tcp",
        RouteKind::Http { .. } => "http",
    }
}

impl Proxy {
    pub(crate) fn of(defined: &Defined) -> Self {
        Self {
            name: defined.route.name.to_string(),
            kind: kind_of(&defined.route).to_owned(),
            block: Block::of(defined),
        }
    }

    /// `None` when it is nothing that was written here.
    pub(crate) fn read(&self) -> Option<Defined> {
        self.block.read(&self.name, &self.kind)
    }
}

impl StoreProxy {
    pub(crate) fn of(defined: &Defined) -> Self {
        let kind = kind_of(&defined.route);
        let block = Block::of(defined);
        let (tcp, http) = if kind == "tcp" { (Some(block), None) } else { (None, Some(block)) };
        Self { name: defined.route.name.to_string(), kind: kind.to_owned(), tcp, http }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `None` when it is nothing that was written here.
    pub(crate) fn read(&self) -> Option<Defined> {
        let block = match (&self.tcp, &self.http) {
            (Some(block), None) | (None, Some(block)) => block,
            (Some(_), Some(_)) | (None, None) => return None,
        };
        block.read(&self.name, &self.kind)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn tcp(name: &str, remote_port: u16, local_port: u16) -> Route {
        Route { name: name.parse().unwrap(), kind: RouteKind::Tcp { remote_port }, local_port }
    }

    pub(crate) fn http(name: &str, domain: &str, local_port: u16) -> Route {
        Route {
            name: name.parse().unwrap(),
            kind: RouteKind::Http { domain: domain.parse().unwrap() },
            local_port,
        }
    }

    pub(crate) fn any_route() -> impl Strategy<Value = Route> {
        let kind = prop_oneof![
            any::<u16>().prop_map(|remote_port| RouteKind::Tcp { remote_port }),
            "[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?"
                .prop_map(|domain| RouteKind::Http { domain: domain.parse().unwrap() }),
        ];
        ("[a-c]", kind, any::<u16>()).prop_map(|(name, kind, local_port)| Route {
            name: name.parse().unwrap(),
            kind,
            local_port,
        })
    }

    #[test]
    fn bodies_are_what_the_store_takes() {
        let body =
            |route, attempt| serde_json::to_value(StoreProxy::of(&Defined { route, attempt })).unwrap();
        assert_eq!(
            body(tcp("vm.ssh", 10_022, 22_000), 0),
            serde_json::json!({"name": "vm.ssh", "type": "tcp",
                "tcp": {"localIP": "127.0.0.1", "localPort": 22_000, "remotePort": 10_022}})
        );
        assert_eq!(
            body(http("vm.web", "t-80.x", 8080), 3),
            serde_json::json!({"name": "vm.web", "type": "http",
                "http": {"localIP": "127.0.0.1", "localPort": 8080, "customDomains": ["t-80.x"],
                    "metadatas": {"attempt": "3"}}})
        );
    }

    #[test]
    fn what_somebody_else_wrote_is_not_taken_for_ours() {
        let read = |text: &str| serde_json::from_str::<StoreProxy>(text).unwrap().read();
        let plugin = r#"{"name":"x","type":"tcp","tcp":{"localIP":"","localPort":0,"remotePort":1}}"#;
        assert!(read(plugin).is_none());
        assert!(read(r#"{"name":"x","type":"udp"}"#).is_none());
        let two = r#"{"name":"x","type":"http","http":{"localIP":"127.0.0.1","localPort":1,"customDomains":["a","b"]}}"#;
        assert!(read(two).is_none());
    }

    proptest! {
        #[test]
        fn whatever_is_written_is_read_back(route in any_route(), attempt in 0u32..3) {
            let defined = Defined { route, attempt };
            let text = serde_json::to_string(&StoreProxy::of(&defined)).unwrap();
            prop_assert_eq!(serde_json::from_str::<StoreProxy>(&text).unwrap().read(), Some(defined.clone()));
            let text = toml::to_string(&Proxy::of(&defined)).unwrap();
            prop_assert_eq!(toml::from_str::<Proxy>(&text).unwrap().read(), Some(defined));
        }
    }
}
