//! Calls to frpc's admin server: one short connection each, with a deadline and a limit to what is read. Called by
//! `publish` and `rounds`. Paths and bodies: client/api_router.go and client/http/model of frp 0.70.

use std::{collections::BTreeMap, io, net::Ipv4Addr, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, StatusCode,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    config::{ADMIN_ADDRESS, AdminAccess},
    definition::StoreProxy,
    route::ProxyName,
};

/// It answers from memory within a millisecond; adding a route writes a small file.
const CALL_DEADLINE: Duration = Duration::from_secs(3);
const BODY_LIMIT: usize = 1 << 20;
/// What an error shows of an answer.
const WORDS: usize = 300;

/// frpc's admin server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    /// Nobody listens: it is starting, or has ended.
    #[error("frpc's admin server cannot be reached to {attempt}")]
    Connect {
        attempt: &'static str,
        #[source]
        source: io::Error,
    },
    /// It hangs.
    #[error("frpc's admin server did not {attempt} within {CALL_DEADLINE:?}")]
    Late { attempt: &'static str },
    /// The connection broke, or the answer was too long.
    #[error("frpc's admin server broke off when asked to {attempt}")]
    Broken {
        attempt: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is not the frpc that we started: it does not know the password.
    #[error("frpc's admin server does not know the agent")]
    Stranger,
    /// It said no.
    #[error("frpc's admin server refused to {attempt} with {status}: {words}")]
    Refused { attempt: &'static str, status: u16, words: String },
    /// It said something else than expected.
    #[error("frpc's admin server cannot be understood when asked to {attempt}")]
    Words {
        attempt: &'static str,
        #[source]
        source: serde_json::Error,
    },
}

/// A route as frpc sees it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
pub(crate) struct SeenRoute {
    pub(crate) name: String,
    #[serde(default, rename = "type")]
    pub(crate) kind: String,
    #[serde(rename = "status")]
    pub(crate) phase: String,
    #[serde(default, rename = "err")]
    pub(crate) words: String,
    #[serde(default)]
    pub(crate) local_addr: String,
    #[serde(default)]
    pub(crate) remote_addr: String,
}

#[derive(Deserialize)]
struct StoreList {
    #[serde(default)]
    proxies: Vec<StoreProxy>,
}

/// The admin server of one frpc.
pub(crate) struct Admin {
    port: u16,
    login: HeaderValue,
}

struct Call {
    attempt: &'static str,
    method: Method,
    path: String,
    body: Bytes,
}

impl Call {
    fn get(attempt: &'static str, path: &str) -> Self {
        Self { attempt, method: Method::GET, path: path.to_owned(), body: Bytes::new() }
    }
}

impl Admin {
    pub(crate) fn new(access: &AdminAccess) -> Self {
        let login = format!("Basic {}", STANDARD.encode(format!("{}:{}", access.user, access.password)));
        // A password read back from a file that was tampered with may be no header; then frpc answers 401.
        let mut login = HeaderValue::try_from(login).unwrap_or(HeaderValue::from_static(""));
        login.set_sensitive(true);
        Self { port: access.port, login }
    }

    /// How frpc's routes do; none while it has no session with frps.
    pub(crate) async fn status(&self) -> Result<Vec<SeenRoute>, AdminError> {
        let call = Call::get("tell its status", "/api/status");
        let by_kind: BTreeMap<String, Vec<SeenRoute>> = self.read(call).await?;
        Ok(by_kind.into_values().flatten().collect())
    }

    /// What is in frpc's store.
    pub(crate) async fn stored(&self) -> Result<Vec<StoreProxy>, AdminError> {
        let list: StoreList = self.read(Call::get("list its routes", "/api/store/proxies")).await?;
        Ok(list.proxies)
    }

    /// Adds a route to the store.
    pub(crate) async fn add(&self, route: &StoreProxy) -> Result<(), AdminError> {
        let attempt = "add a route";
        let body = serde_json::to_vec(route).map_err(|source| AdminError::Words { attempt, source })?.into();
        let call = Call { attempt, method: Method::POST, path: "/api/store/proxies".to_owned(), body };
        self.call(call).await.map(drop)
    }

    /// Removes a route from the store; that it is not there is as good.
    pub(crate) async fn remove(&self, name: &ProxyName) -> Result<(), AdminError> {
        let (attempt, path) = ("remove a route", format!("/api/store/proxies/{name}"));
        let call = Call { attempt, method: Method::DELETE, path, body: Bytes::new() };
        match self.call(call).await {
            Err(AdminError::Refused { status: 404, .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Makes frpc read its configuration again.
    pub(crate) async fn reload(&self) -> Result<(), AdminError> {
        let call = Call::get("read its configuration", "/api/reload?strictConfig=true");
        self.call(call).await.map(drop)
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, call: Call) -> Result<T, AdminError> {
        let attempt = call.attempt;
        let body = self.call(call).await?;
        serde_json::from_slice(&body).map_err(|source| AdminError::Words { attempt, source })
    }

    async fn call(&self, call: Call) -> Result<Bytes, AdminError> {
        let attempt = call.attempt;
        let answered = timeout(CALL_DEADLINE, self.exchange(call)).await;
        answered.map_err(|_| AdminError::Late { attempt })?
    }

    async fn exchange(&self, call: Call) -> Result<Bytes, AdminError> {
        let Call { attempt, method, path, body } = call;
        let broken =
            |source: Box<dyn std::error::Error + Send + Sync>| AdminError::Broken { attempt, source };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, ADMIN_ADDRESS)
            .header(AUTHORIZATION, self.login.clone());
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|e| broken(e.into()))?;
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await;
        let stream = stream.map_err(|source| AdminError::Connect { attempt, source })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(e.into()))?;
        // Ends with the connection; its errors also reach the request.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|e| broken(e.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), BODY_LIMIT).collect().await.map_err(broken)?.to_bytes();
        match status {
            StatusCode::UNAUTHORIZED => Err(AdminError::Stranger),
            status if status.is_success() => Ok(body),
            status => Err(AdminError::Refused { attempt, status: status.as_u16(), words: words(&body) }),
        }
    }
}

/// The sentence of a refusal: frpc sends text, or JSON with the text in `error` or `msg`.
fn words(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let field = ["error", "msg", "message"].iter().find_map(|name| json.get(name)?.as_str());
    let text = field.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS).collect()
}

#[cfg(test)]
mod tests;
