//! One request, from its head to its answer: the caller is admitted, the body read within its bounds, the route run in a
//! task of its own, and the whole written to the log. Called by `front` for every request of a connection.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{MatchedPath, Request},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use qudata_api::ErrorCode;
use tokio::{sync::watch, time::timeout};
use tower::ServiceExt;

use super::{
    Api,
    auth::{self, Peer},
    error::last_words,
    limits::Limits,
    metrics::Counters,
    routes,
};
use crate::{refusal::Refusal, secret::CurrentSecret};

/// The one path that anybody may ask.
const PUBLIC: &str = "/ping";
/// Longest path in the log.
const LOGGED_PATH: usize = 120;

/// What all connections share.
pub(super) struct App {
    pub(super) limits: Limits,
    pub(super) counters: Counters,
    pub(super) closing: watch::Receiver<bool>,
    secret: CurrentSecret,
    router: Router,
}

impl App {
    pub(super) fn new(api: Api, closing: watch::Receiver<bool>) -> Self {
        let Api { instances, secret, limits } = api;
        let counters = Counters::default();
        let shared = routes::Shared {
            instances,
            closing: closing.clone(),
            counters: counters.clone(),
            event_silence: limits.event_silence,
        };
        Self { limits, counters, closing, secret, router: routes::router(shared) }
    }
}

/// Answers one request, whatever it is.
pub(super) async fn answer(app: &Arc<App>, peer: Peer, request: Request<Incoming>) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = match admit(app, peer, request).await {
        Ok(request) => carry_out(app.router.clone(), request).await,
        Err((refusal, Rest::Unread)) => last_words(refusal),
        Err((refusal, Rest::Nothing)) => refusal.into_response(),
    };
    let route = response.extensions().get::<MatchedPath>().map(MatchedPath::as_str).unwrap_or("-");
    app.counters.answered(&method, route, response.status(), began.elapsed());
    log(peer, &method, &path, response.status(), began);
    response
}

/// What of a refused request is still on its way.
#[derive(Clone, Copy)]
enum Rest {
    /// The connection can take another request.
    Nothing,
    /// A body nobody will read: the connection ends.
    Unread,
}

async fn admit(app: &App, peer: Peer, request: Request<Incoming>) -> Result<Request, (Refusal, Rest)> {
    let rest = if request.body().is_end_stream() { Rest::Nothing } else { Rest::Unread };
    if request.uri().path() != PUBLIC {
        auth::admit(peer, request.headers(), &app.secret).map_err(|refusal| (refusal, rest))?;
    }
    let (parts, body) = request.into_parts();
    let bytes =
        read_body(&parts.headers, body, &app.limits).await.map_err(|refusal| (refusal, Rest::Unread))?;
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

async fn read_body(headers: &HeaderMap, body: Incoming, limits: &Limits) -> Result<Bytes, Refusal> {
    let too_large = || {
        let sentence = format!("the body is over {} bytes", limits.body_bytes);
        Refusal::new(ErrorCode::BodyTooLarge, sentence)
    };
    // Refused before a caller that asks first (Expect: 100-continue) sends any of it.
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limits.body_bytes) {
        return Err(too_large());
    }
    match timeout(limits.body_deadline, Limited::new(body, limits.body_bytes).collect()).await {
        Ok(Ok(read)) => Ok(read.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Refusal::new(ErrorCode::MalformedBody, "the body ended early or is badly chunked")),
        Err(_) => {
            let sentence = format!("the body did not arrive within {} s", limits.body_deadline.as_secs());
            Err(Refusal::new(ErrorCode::RequestTimeout, sentence))
        }
    }
}

/// Runs the route in a task of its own: a caller that leaves does not stop a change halfway, and a panic ends nothing
/// but this call.
async fn carry_out(router: Router, request: Request) -> Response {
    match tokio::spawn(router.oneshot(request)).await {
        Ok(Ok(response)) => response,
        Ok(Err(never)) => match never {},
        Err(error) => Refusal::new(ErrorCode::Internal, format!("a route panicked: {error}")).into_response(),
    }
}

/// Never bodies, headers or queries.
fn log(peer: Peer, method: &Method, path: &str, status: StatusCode, began: Instant) {
    let path = path.get(..LOGGED_PATH).unwrap_or(path);
    let (status, ms, peer) =
        (status.as_u16(), u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX), peer.kind());
    // The platform and dashboards read every few seconds.
    if method == Method::GET && status < 400 {
        tracing::debug!(%method, path, status, ms, peer, "request");
    } else {
        tracing::info!(%method, path, status, ms, peer, "request");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        async fn broken() -> Refusal {
            panic!("at /var/lib/qudata");
        }
        let router = Router::new().route("/", get(broken));
        let response = carry_out(router.clone(), Request::new(Body::empty())).await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&body);
        assert!(text.contains("internal") && !text.contains("/var"), "{text}");
        let again = carry_out(router, Request::new(Body::empty())).await;
        assert_eq!(again.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
}
