//! `/ping`, `/host`, `/metrics`, `/openapi.json`.

use std::time::Duration;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use qudata_api::{ErrorBody, ErrorCode, HostView, Success};

use tokio::{task::spawn_blocking, time::timeout};

use super::{
    super::metrics::{self, CONTENT_TYPE},
    Done, Reply, Shared, openapi_json,
};
use crate::refusal::Refusal;

/// A healthy file system tells its free space in microseconds.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// Whether the agent answers. The only path that needs no secret.
#[utoipa::path(get, path = "/ping", security(()), responses((status = 200, body = Done)))]
pub(super) async fn ping() -> Reply<()> {
    Reply::plain()
}

/// The host and the agent on it.
#[utoipa::path(get, path = "/host", responses(
    (status = 200, body = Success<HostView>),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn host(State(shared): State<Shared>) -> Result<Reply<HostView>, Refusal> {
    observed(move || shared.instances.host()).await.map(Reply::of)
}

/// Looks at the host. A disk that hangs holds its own caller up, for a bounded time, and nobody else.
async fn observed<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    match timeout(LOOK_DEADLINE, spawn_blocking(look)).await {
        Ok(Ok(seen)) => Ok(seen),
        Ok(Err(error)) => {
            Err(Refusal::new(ErrorCode::Internal, format!("looking at the host failed: {error}")))
        }
        Err(_) => Err(Refusal::new(
            ErrorCode::HostFault,
            "this host does not tell its capacity; the file system of the agent's data may hang",
        )),
    }
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn metrics(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let text = observed(move || metrics::scrape(shared.instances, &shared.counters))
        .await?
        .map_err(|_| Refusal::new(ErrorCode::Internal, "the metrics could not be written"))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses(
    (status = 200, content_type = "application/json", body = Object),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}
