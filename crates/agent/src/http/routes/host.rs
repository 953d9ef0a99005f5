//! `/ping`, `/host`, `/gpus`, `/metrics`, `/openapi.json`.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use qudata_api::{ErrorBody, ErrorCode, GpuView, HostView, Success};

use super::{
    super::metrics::{self, CONTENT_TYPE},
    Done, Reply, Shared, openapi_json,
};
use crate::refusal::Refusal;

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
pub(super) async fn host(State(shared): State<Shared>) -> Reply<HostView> {
    Reply::of(shared.instances.host())
}

/// The GPUs of this host.
#[utoipa::path(get, path = "/gpus", responses(
    (status = 200, body = Success<Vec<GpuView>>),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn gpus(State(shared): State<Shared>) -> Reply<Vec<GpuView>> {
    Reply::of(shared.instances.gpus())
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn metrics(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let text = metrics::scrape(shared.instances, &shared.counters)
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
