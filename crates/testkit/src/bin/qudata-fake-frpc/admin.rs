//! The admin API: who may call what, and what frpc answers. Called by main; acts on `proxies`.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, thread, time::Duration};

use qudata_testkit::{
    frp::{OLDEST, Version},
    serve::{Answer, Request, Server},
};
use serde_json::{Value, json};

use crate::{
    config::{Config, Definition, Strictness},
    faults::Faults,
    proxies::{Proxies, Refusal},
};

const STORE: &str = "/api/store/proxies";
/// frpc lets whoever guesses passwords wait.
const WRONG_PASSWORD: Duration = Duration::from_millis(200);

/// Starts it, if the settings name a port.
pub(crate) fn start(
    file: PathBuf,
    config: &Config,
    proxies: &Arc<Proxies>,
) -> Result<Option<Server>, String> {
    let web = config.web_server.clone();
    if web.port == 0 {
        return Ok(None);
    }
    let host = if web.addr.is_empty() { "127.0.0.1" } else { &web.addr };
    let host = host.parse().map_err(|e| format!("webServer.addr: {e}"))?;
    let api = Api {
        file,
        proxies: Arc::clone(proxies),
        login: (!web.user.is_empty() || !web.password.is_empty())
            .then(|| format!("Basic {}", base64(format!("{}:{}", web.user, web.password).as_bytes()))),
    };
    Server::start(SocketAddr::new(host, web.port), move |request| api.take(request))
        .map(Some)
        .map_err(|e| format!("listen tcp {host}:{}: {e}", web.port))
}

struct Api {
    file: PathBuf,
    proxies: Arc<Proxies>,
    /// What the header must say.
    login: Option<String>,
}

impl Api {
    fn take(&self, request: &Request) -> Option<Answer> {
        let faults = match Faults::read() {
            Ok(faults) => faults,
            Err(words) => return Some(Answer::text(500, &words)),
        };
        thread::sleep(Duration::from_millis(faults.slow_ms));
        let answer = self.answer(request, &faults);
        (!faults.silent).then_some(answer)
    }

    fn answer(&self, request: &Request, faults: &Faults) -> Answer {
        if request.path == "/healthz" {
            return Answer::empty(200);
        }
        if !self.exists(&request.path, faults.version()) {
            return Answer::text(404, "404 page not found\n");
        }
        if !allows(&request.path).contains(&request.method.as_str()) {
            return Answer::empty(405);
        }
        if faults.unauthorized
            || self.login.as_deref().is_some_and(|l| request.header("authorization") != Some(l))
        {
            thread::sleep(WRONG_PASSWORD);
            return Answer::text(401, "Unauthorized\n");
        }
        match (request.method.as_str(), request.path.as_str()) {
            (_, "/api/status") => Answer::json(200, &self.proxies.status()),
            (_, "/api/reload") => self.reload(faults),
            (_, "/api/stop") => {
                self.proxies.end(0);
                Answer::empty(200)
            }
            _ => self.store(request, faults).unwrap_or_else(|(status, words)| {
                Answer::json(status, &json!({ "Code": status, "Msg": words }))
            }),
        }
    }

    fn exists(&self, path: &str, version: Version) -> bool {
        let store = path == STORE || name_of(path).is_some();
        matches!(path, "/api/status" | "/api/reload" | "/api/stop")
            || (store && self.proxies.has_store() && version >= OLDEST)
    }

    fn reload(&self, faults: &Faults) -> Answer {
        match Config::load(&self.file, Strictness::Lenient, faults.version()) {
            Ok(config) => {
                self.proxies.reload(config.proxies, faults);
                Answer::empty(200)
            }
            Err(why) => Answer::json(400, &json!({ "Code": 400, "Msg": format!("invalid argument: {why}") })),
        }
    }

    fn store(&self, request: &Request, faults: &Faults) -> Result<Answer, (u16, String)> {
        let name = name_of(&request.path);
        let known = |name: &str| self.proxies.stored().get(name).map(in_api);
        match (request.method.as_str(), name) {
            ("GET", None) => {
                let all: Vec<Value> = self.proxies.stored().values().map(in_api).collect();
                Ok(Answer::json(200, &json!({ "proxies": all })))
            }
            ("GET", Some(name)) => known(name)
                .map(|proxy| Answer::json(200, &proxy))
                .ok_or_else(|| refused(name, Refusal::Missing)),
            ("DELETE", Some(name)) => {
                self.proxies.remove(name, faults).map_err(|why| refused(name, why))?;
                Ok(Answer::empty(200))
            }
            (method, name) => {
                let proxy = from_api(&request.body).map_err(|why| (400, why))?;
                if name.is_some_and(|name| name != proxy.name) {
                    return Err((400, "proxy name in URL must match name in body".to_owned()));
                }
                let name = proxy.name.clone();
                let done = if method == "PUT" {
                    self.proxies.update(proxy, faults)
                } else {
                    self.proxies.add(proxy, faults)
                };
                done.map_err(|why| refused(&name, why))?;
                Ok(Answer::json(200, &known(&name).unwrap_or_default()))
            }
        }
    }
}

fn allows(path: &str) -> &'static [&'static str] {
    match path {
        "/api/stop" => &["POST"],
        STORE => &["GET", "POST"],
        _ if name_of(path).is_some() => &["GET", "PUT", "DELETE"],
        _ => &["GET"],
    }
}

fn name_of(path: &str) -> Option<&str> {
    path.strip_prefix(STORE)?.strip_prefix('/').filter(|name| !name.is_empty() && !name.contains('/'))
}

fn refused(name: &str, why: Refusal) -> (u16, String) {
    match why {
        Refusal::Conflict => (409, format!("conflict: already exists: proxy {name:?}")),
        Refusal::Missing => (404, format!("not found: proxy {name:?}")),
        Refusal::Broken(why) => (400, format!("invalid argument: validation error: {why}")),
    }
}

/// As the admin API shows a proxy: its name and type, and the rest below the type.
fn in_api(proxy: &Definition) -> Value {
    json!({ "name": proxy.name, "type": proxy.kind, proxy.kind.as_str(): proxy })
}

/// The other way. Unknown fields are ignored, as frpc does here.
fn from_api(body: &[u8]) -> Result<Definition, String> {
    let value: Value = serde_json::from_slice(body).map_err(|e| format!("parse JSON error: {e}"))?;
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (name, kind) = (text("name"), text("type"));
    if name.trim().is_empty() {
        return Err("proxy name is required".to_owned());
    }
    const TYPES: [&str; 8] = ["tcp", "udp", "http", "https", "tcpmux", "stcp", "sudp", "xtcp"];
    if !TYPES.contains(&kind.as_str()) {
        return Err(format!("invalid proxy type: {kind}"));
    }
    let blocks: Vec<&str> = TYPES.into_iter().filter(|name| value.get(name).is_some()).collect();
    let [block] = blocks.as_slice() else {
        return Err("exactly one proxy type block is required".to_owned());
    };
    if *block != kind {
        return Err(format!("proxy type block {block:?} does not match type {kind:?}"));
    }
    let inner = value.get(block).cloned().unwrap_or_default();
    let mut proxy: Definition =
        serde_json::from_value(inner).map_err(|e| format!("parse JSON error: {e}"))?;
    (proxy.name, proxy.kind) = (name, kind);
    Ok(proxy)
}

/// Basic authentication needs nothing more of it than this.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let three =
            chunk.iter().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let letter = LETTERS.get(three >> (18 - 6 * at) & 63).filter(|_| at <= chunk.len());
            text.push(letter.map_or('=', |letter| char::from(*letter)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
