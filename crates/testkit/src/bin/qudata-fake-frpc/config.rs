//! frpc.toml, as far as the agent uses it: anything else is refused as the real frpc refuses what it does not know.
//! Called by main and by `/api/reload`.

use std::{collections::BTreeMap, fs, path::Path};

use qudata_testkit::frp::Version;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::store::Log;

/// Whether unknown keys are an error: yes at the start and for `verify`, no for `/api/reload` without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strictness {
    Strict,
    Lenient,
}

/// Keys, in the dotted form, with the version that first knew them.
const KEYS: &[(&str, u32)] = &[
    ("serverAddr", 0),
    ("serverPort", 0),
    ("user", 0),
    ("clientID", 67),
    ("loginFailExit", 0),
    ("metadatas.*", 0),
    ("auth.method", 0),
    ("auth.token", 0),
    ("auth.tokenSource.type", 64),
    ("auth.tokenSource.file.path", 64),
    ("log.to", 0),
    ("log.level", 0),
    ("log.maxDays", 0),
    ("log.disablePrintColor", 0),
    ("webServer.addr", 0),
    ("webServer.port", 0),
    ("webServer.user", 0),
    ("webServer.password", 0),
    ("webServer.pprofEnable", 0),
    ("transport.protocol", 0),
    ("transport.wireProtocol", 69),
    ("transport.poolCount", 0),
    ("transport.tcpMux", 0),
    ("transport.tcpMuxKeepaliveInterval", 0),
    ("transport.heartbeatInterval", 0),
    ("transport.heartbeatTimeout", 0),
    ("transport.dialServerTimeout", 0),
    ("transport.dialServerKeepalive", 0),
    ("transport.tls.enable", 0),
    ("transport.tls.trustedCaFile", 0),
    ("transport.tls.serverName", 0),
    ("store.path", 68),
    ("proxies.name", 0),
    ("proxies.type", 0),
    ("proxies.enabled", 66),
    ("proxies.localIP", 0),
    ("proxies.localPort", 0),
    ("proxies.remotePort", 0),
    ("proxies.customDomains", 0),
    ("proxies.metadatas.*", 0),
];

/// One published port, in the form of the settings file, of the store's file and of the admin API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Definition {
    #[serde(default)]
    pub(crate) name: String,
    #[serde(default, rename = "type")]
    pub(crate) kind: String,
    #[serde(default = "local", rename = "localIP")]
    pub(crate) local_ip: String,
    #[serde(default)]
    pub(crate) local_port: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) remote_port: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_domains: Vec<String>,
    /// Mean nothing here, and make two proxies different.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadatas: BTreeMap<String, String>,
}

fn local() -> String {
    "127.0.0.1".to_owned()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

impl Definition {
    /// What frpc itself finds wrong with it, before any server sees it.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.name.trim().is_empty() {
            return Err("name should not be empty".to_owned());
        }
        // The remote port is the server's to judge.
        if u16::try_from(self.local_port).is_err() {
            let port = self.local_port;
            return Err(format!("localPort: localPort: port number {port} must be in the range 0..65535"));
        }
        match self.kind.as_str() {
            "tcp" => Ok(()),
            "http" if self.custom_domains.is_empty() => {
                Err("subdomain and custom domains should not be both empty".to_owned())
            }
            "http" => Ok(()),
            other => Err(format!("unknown proxy type: {other}")),
        }
    }
}

/// The settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    pub(crate) server_addr: String,
    #[serde(default = "server_port")]
    pub(crate) server_port: u16,
    #[serde(default = "yes")]
    pub(crate) login_fail_exit: bool,
    #[serde(default)]
    pub(crate) auth: Auth,
    #[serde(default)]
    pub(crate) log: Log,
    #[serde(default)]
    pub(crate) web_server: WebServer,
    #[serde(default)]
    pub(crate) store: Store,
    #[serde(default)]
    pub(crate) proxies: Vec<Definition>,
}

fn server_port() -> u16 {
    7000
}

fn yes() -> bool {
    true
}

/// How it proves who it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Auth {
    token: String,
    token_source: Option<Value>,
}

/// The admin API.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct WebServer {
    pub(crate) addr: String,
    pub(crate) port: u16,
    pub(crate) user: String,
    pub(crate) password: String,
}

/// Proxies that come and go one by one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Store {
    pub(crate) path: String,
}

impl Config {
    /// Reads and judges the file.
    pub(crate) fn load(file: &Path, strictness: Strictness, version: Version) -> Result<Self, String> {
        let text = fs::read_to_string(file).map_err(|e| format!("open {}: {e}", file.display()))?;
        if text.contains("{{") {
            // The real one would execute it. Nobody who uses this one may rely on that.
            return Err("template: frp:1: templates are not for this program".to_owned());
        }
        let table: toml::Table = toml::from_str(&text).map_err(|e| format!("toml: {}", e.message()))?;
        if strictness == Strictness::Strict {
            refuse_unknown(&toml::Value::Table(table.clone()), "", version)?;
        }
        let config: Self = table.try_into().map_err(|e: toml::de::Error| format!("json: {}", e.message()))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !self.auth.token.is_empty() && self.auth.token_source.is_some() {
            return Err("cannot specify both auth.token and auth.tokenSource".to_owned());
        }
        self.log.check()?;
        for (at, proxy) in self.proxies.iter().enumerate() {
            proxy.check().map_err(|why| format!("proxy {}: {why}", proxy.name))?;
            if self.proxies.iter().take(at).any(|other| other.name == proxy.name) {
                return Err(format!("proxy name [{}] is duplicated", proxy.name));
            }
        }
        Ok(())
    }
}

fn refuse_unknown(value: &toml::Value, path: &str, version: Version) -> Result<(), String> {
    let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        toml::Value::Table(table) => {
            table.iter().try_for_each(|(key, inner)| refuse_key(key, &join(key), inner, version))
        }
        toml::Value::Array(list) if path == "proxies" => {
            list.iter().try_for_each(|inner| refuse_unknown(inner, path, version))
        }
        _ => Ok(()),
    }
}

fn refuse_key(key: &str, path: &str, value: &toml::Value, version: Version) -> Result<(), String> {
    let knows = |since: u32| version.major > 0 || version.minor >= since;
    let known = KEYS.iter().filter(|(_, since)| knows(*since)).any(|(known, _)| {
        *known == path
            || known.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))
            || known.strip_suffix(".*").is_some_and(|table| path.starts_with(&format!("{table}.")))
    });
    if !known {
        return Err(format!("json: unknown field \"{key}\""));
    }
    refuse_unknown(value, path, version)
}
