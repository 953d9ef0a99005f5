//! Calls to the agent over its unix socket. Owns the connection, the deadlines and what is said when the agent cannot
//! be reached; used by every command but `serve`.

mod events;
mod sse;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use qudata_api::{ErrorBody, InstanceList, InstanceView, Success};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

pub(crate) use self::events::EventStream;
use crate::exit::{Exit, Failure};

/// A socket on this machine either takes a connection at once or is overrun.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Reads are answered from memory.
const READ_DEADLINE: Duration = Duration::from_secs(10);
/// Changes may have to wait for QEMU or the guest; the agent has deadlines of its own below this.
const CHANGE_DEADLINE: Duration = Duration::from_secs(120);
/// A console is at most 1 MiB, which replaced characters may triple.
const BODY_LIMIT: usize = 8 << 20;

/// The agent of this host.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    socket: PathBuf,
}

impl Agent {
    /// The agent behind `socket`, by default the one in the folder that the agent itself would take.
    pub(crate) fn at(socket: Option<PathBuf>) -> Self {
        let run_dir = || std::env::var_os("QUDATA_VM_RUN_DIR").filter(|d| !d.is_empty());
        let default =
            || run_dir().map_or_else(|| PathBuf::from("/var/run/qudata"), PathBuf::from).join("agent.sock");
        Self { socket: socket.unwrap_or_else(default) }
    }

    /// `data` of a GET.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let body = self.get_bytes(path).await?;
        data(path, &body)
    }

    /// Body of a GET that is no JSON.
    pub(crate) async fn get_bytes(&self, path: &str) -> Result<Bytes, Failure> {
        self.call(Method::GET, path, Bytes::new(), READ_DEADLINE).await
    }

    /// `data` of a call with a body.
    pub(crate) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let sent = serde_json::to_vec(body).map_err(anyhow::Error::new)?;
        data(path, &self.call(method, path, sent.into(), CHANGE_DEADLINE).await?)
    }

    /// A call with a body that is answered without data.
    pub(crate) async fn order(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), Failure> {
        let sent = serde_json::to_vec(body).map_err(anyhow::Error::new)?;
        self.call(method, path, sent.into(), CHANGE_DEADLINE).await.map(drop)
    }

    /// `data` of a POST without a body.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        data(path, &self.call(Method::POST, path, Bytes::new(), CHANGE_DEADLINE).await?)
    }

    /// `data` of a DELETE.
    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        data(path, &self.call(Method::DELETE, path, Bytes::new(), CHANGE_DEADLINE).await?)
    }

    /// All instances, oldest first.
    pub(crate) async fn instances(&self) -> Result<Vec<InstanceView>, Failure> {
        Ok(self.get::<InstanceList>("/instances").await?.instances)
    }

    /// The instance that is meant by `wish`.
    pub(crate) async fn pick(&self, wish: Option<&str>) -> Result<InstanceView, Failure> {
        let instances = self.instances().await?;
        crate::pick::pick(&instances, wish).cloned()
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, Failure> {
        let answered = async {
            let response = self.open(method, path, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), BODY_LIMIT).collect().await;
            let body = body.map_err(|e| self.silent(&format!("the answer broke off: {e}")))?.to_bytes();
            if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
        };
        let late = |_| self.silent(&format!("no answer within {} s", deadline.as_secs()));
        timeout(deadline, answered).await.map_err(late)?
    }

    /// Sends the request and waits for the head of the answer.
    async fn open(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(anyhow::Error::new)?;
        let connected = timeout(CONNECT_DEADLINE, UnixStream::connect(&self.socket)).await;
        let stream = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = stream.map_err(|e| unreachable(&self.socket, &e))?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| self.silent(&e.to_string()))?;
        // Ends with the connection; its errors also reach the request.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|e| self.silent(&format!("the connection broke off: {e}")))
    }

    /// Connected, and then no proper answer.
    fn silent(&self, what: &str) -> Failure {
        let place = self.socket.display();
        Failure::new(Exit::Unreachable, format!("the agent does not answer at {place} ({what}): {REMEDY}"))
    }
}

const REMEDY: &str = "systemctl status qudata-agent, or start it with `qudata-agent serve`";

fn unreachable(socket: &Path, error: &io::Error) -> Failure {
    let place = socket.display();
    let sentence = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("this user may not talk to the agent at {place}: run as root or join group qudata")
        }
        // Nobody has made the socket, or nobody listens to it any more.
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("the agent does not answer at {place}: {REMEDY}")
        }
        _ => format!("the agent does not answer at {place} ({error}): {REMEDY}"),
    };
    Failure::new(Exit::Unreachable, sentence)
}

fn data<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, Failure> {
    let misfit = |why: String| {
        Failure::new(
            Exit::Failed,
            format!(
                "the answer to {path} is not understood ({why}): are agent and command of the same version?"
            ),
        )
    };
    let answer: Success<T> = serde_json::from_slice(body).map_err(|e| misfit(e.to_string()))?;
    answer.data.ok_or_else(|| misfit("no data".to_owned()))
}

fn refusal(status: StatusCode, body: &[u8]) -> Failure {
    if let Ok(body) = serde_json::from_slice::<ErrorBody>(body) {
        return Failure::refused(ErrorBody { error: crate::screen::harmless(&body.error), ..body });
    }
    // A code that a newer agent has and this program does not know: its sentence and status still say enough.
    let known: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let sentence = known.as_ref().and_then(|b| b.get("error")?.as_str()).map(crate::screen::harmless);
    let exit = match status {
        StatusCode::BAD_REQUEST => Exit::Usage,
        StatusCode::NOT_FOUND => Exit::NotFound,
        StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE => Exit::Refused,
        StatusCode::INSUFFICIENT_STORAGE => Exit::NoCapacity,
        _ => Exit::Failed,
    };
    match sentence {
        Some(sentence) => Failure::new(exit, sentence),
        None => Failure::new(Exit::Failed, format!("the agent answered {status} without a reason")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_do_not_fit_are_told_apart_from_refusals() {
        assert_eq!(data::<u32>("/x", br#"{"ok":true,"data":7}"#).unwrap(), 7);
        for body in [&b"<html>"[..], br#"{"ok":true}"#, br#"{"ok":true,"data":"seven"}"#] {
            let failure = data::<u32>("/x", body).unwrap_err();
            assert!(failure.exit == Exit::Failed && failure.sentence.contains("same version"), "{failure}");
        }
    }

    #[test]
    fn refusals_of_newer_agents_keep_their_meaning() {
        let table = [
            (
                409,
                r#"{"ok":false,"error":"too \u001b[2Jsoon","code":"moon_phase"}"#,
                Exit::Refused,
                "too soon",
            ),
            (507, r#"{"ok":false,"error":"full","code":"no_moon"}"#, Exit::NoCapacity, "full"),
            (500, "oops", Exit::Failed, "the agent answered 500 Internal Server Error without a reason"),
        ];
        for (status, body, exit, sentence) in table {
            let failure = refusal(StatusCode::from_u16(status).unwrap(), body.as_bytes());
            assert_eq!((failure.exit, failure.sentence.as_str()), (exit, sentence));
        }
    }
}
