//! One call to the control plane, from the request to the bytes of the answer, within its bounds. Knows no meaning of any
//! call; `keeper`, `reporter` and `reach` make them.
//!
//! The service is trusted with nothing: what it sends is bounded in time and size, redirects are errors, and nothing of a
//! reply decides where the next call goes.

use std::{fmt, pin::pin, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use futures_util::future::{self, Either};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    time::timeout,
};

use super::{
    dial::{DialError, Line, dial},
    pace::retry_after,
    tls::Trust,
    url::ServiceUrl,
};
use crate::secret::AgentSecret;

/// Bounds of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallLimits {
    /// Until there is a connection, with TLS.
    pub(super) connect: Duration,
    /// Until the whole reply is there.
    pub(super) total: Duration,
    /// Bytes of a reply's body.
    pub(super) reply: usize,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self { connect: Duration::from_secs(5), total: Duration::from_secs(10), reply: 1 << 20 }
    }
}

/// Bytes of a reply's head.
const HEAD_BYTES: usize = 32 << 10;
/// Lines of a reply's head.
const HEAD_LINES: usize = 64;
/// Of a service's own words about a failure, so much is shown.
const WORDS: usize = 160;

/// A call failed. Holds no secret: what a service says of itself is cut, and left out where it repeats one.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// There was no connection to talk over.
    #[error(transparent)]
    Dial(DialError),
    /// It took too long.
    #[error("{authority} did not {what} within {limit:?}")]
    Deadline {
        /// Where.
        authority: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// There is no such request: a key or an address that passed the checks is none of HTTP's.
    #[error("the call cannot be written as HTTP")]
    Request(#[source] axum::http::Error),
    /// What came back is no HTTP, or ended early.
    #[error("{authority} did not answer in HTTP")]
    Http {
        /// Where.
        authority: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// The reply is larger than any that the contract knows.
    #[error("the reply of {authority} has more than {limit} bytes")]
    TooLarge {
        /// Where.
        authority: String,
        /// The limit.
        limit: usize,
    },
    /// The reply ends in the middle.
    #[error("the reply of {authority} ended early or is badly chunked")]
    Cut {
        /// Where.
        authority: String,
    },
    /// An answer that is no success.
    #[error("{call} was answered with {status}{}", said(.words.as_deref()))]
    Status {
        /// The call.
        call: &'static str,
        /// The status.
        status: u16,
        /// How long the service wants to be left alone.
        retry_after: Option<Duration>,
        /// What it says about it, cut and printable.
        words: Option<String>,
    },
}

fn said(words: Option<&str>) -> String {
    words.map(|words| format!(" (\"{words}\")")).unwrap_or_default()
}

/// Who calls.
#[derive(Clone)]
pub(super) enum Credential {
    /// The owner, before there is a secret.
    ApiKey(SecretString),
    /// This agent.
    Secret(AgentSecret),
    /// Somebody who looks whether the service is there.
    Nobody,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ApiKey(_) => "ApiKey",
            Self::Secret(_) => "Secret",
            Self::Nobody => "Nobody",
        })
    }
}

impl Credential {
    /// The header, its name and value.
    fn header(&self) -> Option<(HeaderName, &str)> {
        match self {
            Self::ApiKey(key) => Some((HeaderName::from_static("x-api-key"), key.expose_secret())),
            Self::Secret(secret) => Some((HeaderName::from_static("x-agent-secret"), secret.expose())),
            Self::Nobody => None,
        }
    }
}

/// One call.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Path below the base; also the call's name.
    pub(super) path: &'static str,
    pub(super) credential: &'a Credential,
    /// JSON.
    pub(super) body: Vec<u8>,
    /// Whether the reply's body matters. Where it does not, it is not waited for.
    pub(super) wants_reply: bool,
}

/// Makes calls, each on a connection of its own.
#[derive(Debug)]
pub(super) struct Caller {
    url: ServiceUrl,
    trust: Trust,
    limits: CallLimits,
}

impl Caller {
    pub(super) fn new(url: ServiceUrl, trust: Trust, limits: CallLimits) -> Self {
        Self { url, trust, limits }
    }

    /// Makes one call. A success has a 2xx status and answers the body, empty where it does not matter.
    ///
    /// # Errors
    /// Anything else, within the limits.
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Bytes, CallError> {
        match timeout(self.limits.total, self.unbounded(call)).await {
            Ok(done) => done,
            Err(_) => Err(self.late("answer", self.limits.total)),
        }
    }

    fn late(&self, what: &'static str, limit: Duration) -> CallError {
        CallError::Deadline { authority: self.url.authority(), what, limit }
    }

    async fn unbounded(&self, call: &Call<'_>) -> Result<Bytes, CallError> {
        let dialed = timeout(self.limits.connect, dial(&self.url, &self.trust)).await;
        match dialed.map_err(|_| self.late("connect", self.limits.connect))?.map_err(CallError::Dial)? {
            Line::Plain(stream) => self.exchange(stream, call).await,
            Line::Tls(stream) => self.exchange(*stream, call).await,
        }
    }

    fn request(&self, call: &Call<'_>) -> Result<Request<Full<Bytes>>, axum::http::Error> {
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(self.url.path(call.path))
            .header(header::HOST, self.url.authority())
            .header(header::USER_AGENT, concat!("qudata-agent/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, "application/json")
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close");
        if let Some((name, text)) = call.credential.header() {
            let mut credential = HeaderValue::from_str(text)?;
            // Not in any debug output, also of hyper.
            credential.set_sensitive(true);
            request = request.header(name, credential);
        }
        if call.method != Method::GET {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(Bytes::copy_from_slice(&call.body)))
    }

    async fn exchange<S>(&self, stream: S, call: &Call<'_>) -> Result<Bytes, CallError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let authority = || self.url.authority();
        let http = |source| CallError::Http { authority: authority(), source };
        let request = self.request(call).map_err(CallError::Request)?;
        let mut protocol = http1::Builder::new();
        protocol.max_buf_size(HEAD_BYTES).max_headers(HEAD_LINES);
        // Interim replies and what stands around chunks count for no other limit.
        let most = u64::try_from(self.limits.reply.saturating_add(HEAD_BYTES)).unwrap_or(u64::MAX);
        let (from, to) = tokio::io::split(stream);
        let stream = TokioIo::new(tokio::io::join(from.take(most.saturating_mul(2)), to));
        let (mut sender, connection) = protocol.handshake(stream).await.map_err(http)?;
        let answer = pin!(async move {
            let response = sender.send_request(request).await.map_err(http)?;
            self.read(response, call).await
        });
        // Both live in this future, so that nothing of a call is left when its deadline has passed.
        match future::select(answer, pin!(connection)).await {
            Either::Left((answer, _)) => answer,
            Either::Right((_, answer)) => answer.await,
        }
    }

    async fn read(&self, response: Response<Incoming>, call: &Call<'_>) -> Result<Bytes, CallError> {
        let (head, body) = response.into_parts();
        if head.status.is_success() && !call.wants_reply {
            return Ok(Bytes::new());
        }
        let limit = self.limits.reply;
        let read = async {
            let read = Limited::new(body, limit).collect().await;
            read.map(|read| read.to_bytes()).map_err(|error| match error.is::<LengthLimitError>() {
                true => CallError::TooLarge { authority: self.url.authority(), limit },
                false => CallError::Cut { authority: self.url.authority() },
            })
        };
        if head.status.is_success() {
            return read.await;
        }
        // The status is what counts: a body that does not come takes nothing away from it.
        let body = match timeout(self.limits.connect / 5, read).await {
            Ok(Ok(body)) => body,
            _ => Bytes::new(),
        };
        Err(CallError::Status {
            call: call.path,
            status: head.status.as_u16(),
            retry_after: asked_patience(&head.headers),
            words: words(&body, call.credential.header().map(|(_, text)| text)),
        })
    }
}

fn asked_patience(headers: &HeaderMap) -> Option<Duration> {
    retry_after(headers.get(header::RETRY_AFTER)?.to_str().ok()?)
}

/// What a service says about a failure, where it says so in JSON. Left out where it repeats the caller's secret.
fn words(body: &[u8], secret: Option<&str>) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Failure {
        error: String,
    }
    let said = serde_json::from_slice::<Failure>(body).ok()?.error;
    if said.is_empty() || secret.is_some_and(|secret| said.contains(secret)) {
        return None;
    }
    Some(said.chars().take(WORDS).flat_map(char::escape_debug).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_never_printed() {
        let key = Credential::ApiKey("ak-canary".into());
        let secret = Credential::Secret(AgentSecret::parse("canary-canary-canary").unwrap());
        let call = Call {
            method: Method::POST,
            path: "/init",
            credential: &secret,
            body: Vec::new(),
            wants_reply: true,
        };
        let caller =
            Caller::new("http://127.0.0.1:1".parse().unwrap(), Trust::system(), CallLimits::default());
        let request = caller.request(&call).unwrap();
        let printed = format!("{key:?} {secret:?} {call:?} {:?}", request.headers());
        assert!(!printed.contains("canary"), "{printed}");
        assert_eq!(request.headers()["x-agent-secret"], "canary-canary-canary");
    }

    #[test]
    fn the_services_words_are_cut_and_never_a_secret() {
        let said = |text: &str| words(text.as_bytes(), Some("sk-0123456789abcdef"));
        assert_eq!(said(r#"{"ok":false,"error":"the key is revoked"}"#).unwrap(), "the key is revoked");
        assert_eq!(said(r#"{"error":"bad sk-0123456789abcdef"}"#), None);
        assert_eq!(said(r#"{"error":"\u001b[2J"}"#).unwrap(), "\\u{1b}[2J");
        let long = format!(r#"{{"error":"{}"}}"#, "x".repeat(10_000));
        assert_eq!(said(&long).unwrap().len(), WORDS);
        for other in ["", "<html>", r#"{"error":{"a":1}}"#, r#"{"error":""}"#, "[]"] {
            assert_eq!(said(other), None, "{other}");
        }
    }
}
