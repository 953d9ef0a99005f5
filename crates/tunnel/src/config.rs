//! frpc's configuration: rendered by a serializer from checked values, and read back by the agent that takes over. Pure;
//! called by `frpc` and `publish`.
//!
//! frpc runs what it reads through Go templates first, so a value with `{{` could read its environment. Such a value is
//! refused wherever it comes from.

use rand::{RngExt, distr::Alphanumeric};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use crate::{
    definition::{Definitions, Proxy},
    route::is_plain,
    setup::TunnelSetup,
    version::Version,
};

/// The longest token.
const TOKEN_MAX: usize = 4096;
const HOST_MAX: usize = 253;
const USER_MAX: usize = 128;
const PASSWORD_LEN: usize = 32;
/// Where frpc's admin server listens.
pub(crate) const ADMIN_ADDRESS: &str = "127.0.0.1";
/// The user of the admin server; frpc asks for no password when both are empty.
const ADMIN_USER: &str = "agent";
/// Connections held ready, which saves a round trip to frps at the start of each session.
const POOL: u32 = 2;
/// How long frpc waits for frps to take a connection, in seconds.
const DIAL_TIMEOUT: u32 = 5;
/// How often the two make sure of each other, in seconds: a frps that vanished without a word is noticed after this and
/// ten seconds more.
const KEEPALIVE: u32 = 10;

/// A token that frp cannot be given. The token itself is not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the token for frps cannot be used: it takes 1 to {TOKEN_MAX} printable ASCII characters without spaces, quotes, \
     backslashes and braces"
)]
pub struct TokenError;

/// Whether `token` can be given to frpc, which is asked before anything is written.
///
/// # Errors
/// When it is empty, too long, or holds a character that could mean something else in a configuration.
pub fn check_token(token: &str) -> Result<(), TokenError> {
    let letter = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\'' | '`' | '\\' | '{' | '}');
    let fits = (1..=TOKEN_MAX).contains(&token.len()) && token.chars().all(letter);
    if fits { Ok(()) } else { Err(TokenError) }
}

/// What the tunnel was set up with cannot be written down.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("{what} of the tunnel cannot be {value:?}: {allowed}")]
    Value { what: &'static str, value: String, allowed: &'static str },
    #[error("the configuration of frpc cannot be rendered")]
    Render(#[source] toml::ser::Error),
    #[error("a value in the configuration of frpc looks like a template")]
    Template,
}

/// How to reach frpc's admin server. New for every frpc, so that nobody who finds the port free later learns anything.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AdminAccess {
    addr: String,
    pub(crate) port: u16,
    pub(crate) user: String,
    pub(crate) password: String,
}

impl AdminAccess {
    /// Access to a new admin server on `port`.
    pub(crate) fn generate(port: u16) -> Self {
        let letters = rand::rng().sample_iter(Alphanumeric).take(PASSWORD_LEN);
        Self {
            addr: ADMIN_ADDRESS.to_owned(),
            port,
            user: ADMIN_USER.to_owned(),
            password: letters.map(char::from).collect(),
        }
    }
}

/// What frpc can be told, which depends on its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    pub(crate) store: bool,
    pub(crate) token_file: bool,
}

impl Abilities {
    pub(crate) fn of(version: Version) -> Self {
        Self { store: version.has_store(), token_file: version.reads_token_file() }
    }
}

/// pkg/config/v1/client.go of frp 0.70.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    server_addr: String,
    server_port: u16,
    user: String,
    login_fail_exit: bool,
    log: Log,
    auth: Auth,
    transport: Transport,
    pub(crate) web_server: AdminAccess,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    store: Option<Store>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    proxies: Vec<Proxy>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Log {
    to: String,
    level: String,
    disable_print_color: bool,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Auth {
    method: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_source: Option<TokenSource>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TokenSource {
    #[serde(rename = "type")]
    kind: String,
    file: TokenFile,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TokenFile {
    path: String,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Transport {
    dial_server_timeout: u32,
    pool_count: u32,
    tcp_mux_keepalive_interval: u32,
    tls: Tls,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tls {
    enable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trusted_ca_file: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Store {
    path: String,
}

impl Config {
    /// The part of the configuration that a frpc is started with and keeps.
    pub(crate) fn plan(
        setup: &TunnelSetup,
        abilities: Abilities,
        web_server: AdminAccess,
    ) -> Result<Self, ConfigError> {
        let server = &setup.server;
        let token = server.token.as_ref().map(SecretString::expose_secret);
        token.map(check_token).transpose()?;
        let from_file = token.is_some() && abilities.token_file;
        let token_source = || -> Result<_, ConfigError> {
            let path = path_text("the token file", &setup.token_file())?;
            Ok(TokenSource { kind: "file".to_owned(), file: TokenFile { path } })
        };
        let store = || Ok::<_, ConfigError>(Store { path: path_text("the store", &setup.store())? });
        let ca = server.ca.as_ref().map(|ca| path_text("the CA file", ca)).transpose()?;
        Ok(Self {
            server_addr: host_text(&server.host)?,
            server_port: server.port,
            user: user_text(&setup.user)?,
            login_fail_exit: false,
            log: Log { to: "console".to_owned(), level: "info".to_owned(), disable_print_color: true },
            auth: Auth {
                method: "token".to_owned(),
                token: token.filter(|_| !from_file).map(str::to_owned),
                token_source: from_file.then(token_source).transpose()?,
            },
            transport: Transport {
                dial_server_timeout: DIAL_TIMEOUT,
                pool_count: POOL,
                tcp_mux_keepalive_interval: KEEPALIVE,
                tls: Tls { enable: true, trusted_ca_file: ca },
            },
            web_server,
            store: abilities.store.then(store).transpose()?,
            proxies: Vec::new(),
        })
    }

    /// What the frpc that was started with this can do.
    pub(crate) fn abilities(&self) -> Abilities {
        // A token that is written out was written so because there was no other way.
        Abilities { store: self.store.is_some(), token_file: self.auth.token.is_none() }
    }

    /// The routes in it.
    pub(crate) fn routes(&self) -> Definitions {
        let defined = self.proxies.iter().filter_map(Proxy::read);
        defined.map(|defined| (defined.route.name.clone(), defined)).collect()
    }

    /// The same without routes.
    pub(crate) fn without_routes(&self) -> Self {
        Self { proxies: Vec::new(), ..self.clone() }
    }

    /// The text of the file, with these routes.
    pub(crate) fn render(&self, routes: &Definitions) -> Result<String, ConfigError> {
        let proxies = routes.values().map(Proxy::of).collect();
        let text = toml::to_string(&Self { proxies, ..self.clone() }).map_err(ConfigError::Render)?;
        // Every value was checked; this is for the one that somebody adds and forgets.
        if text.contains("{{") { Err(ConfigError::Template) } else { Ok(text) }
    }
}

fn refused(what: &'static str, value: &str, allowed: &'static str) -> ConfigError {
    ConfigError::Value { what, value: value.chars().take(60).collect(), allowed }
}

fn host_text(host: &str) -> Result<String, ConfigError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    if (1..=HOST_MAX).contains(&host.len()) && host.chars().all(letter) {
        return Ok(host.to_owned());
    }
    Err(refused("the server", host, "it takes a host name or an address"))
}

fn user_text(user: &str) -> Result<String, ConfigError> {
    if is_plain(user, USER_MAX) {
        return Ok(user.to_owned());
    }
    Err(refused("the user", user, "it takes up to 128 letters, digits, dots, dashes and underscores"))
}

fn path_text(what: &'static str, path: &std::path::Path) -> Result<String, ConfigError> {
    let shown = path.to_string_lossy();
    let text = path.to_str().filter(|text| path.is_absolute() && !text.contains("{{"));
    text.map(str::to_owned).ok_or_else(|| {
        refused(what, &shown, "it takes an absolute path in UTF-8 without {{, which frpc would execute")
    })
}

#[cfg(test)]
pub(crate) mod tests;
