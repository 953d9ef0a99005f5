//! What each path does. Owns the router and, made from the same declarations, the OpenAPI document; called by `call`
//! for callers that were admitted.

mod events;
mod gpus;
mod host;
mod instances;
mod keys;

use std::time::Duration;

use axum::{
    Router,
    extract::{MatchedPath, Request},
    http::header,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use qudata_api::{ErrorCode, Success};
use serde::Serialize;
use tokio::sync::watch;
use utoipa::{
    Modify, OpenApi, ToSchema,
    openapi::security::{ApiKey, ApiKeyValue, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{error, metrics::Counters};
use crate::{instances::Instances, refusal::Refusal};

/// What routes work with; clones share it.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) instances: Instances,
    pub(super) counters: Counters,
    /// True when the agent ends: streams end then.
    pub(super) closing: watch::Receiver<bool>,
    pub(super) event_silence: Duration,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "qudata-agent",
        description = "Turns a GPU server into rentable virtual machines. Calls without an id mean the only instance; \
            with several they are refused as ambiguous."
    ),
    modifiers(&Secret),
    security(("agent_secret" = []))
)]
struct Document;

struct Secret;

impl Modify for Secret {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let header = ApiKeyValue::with_description("X-Agent-Secret", "Not needed on the local socket.");
        let scheme = SecurityScheme::ApiKey(ApiKey::Header(header));
        openapi.components.get_or_insert_default().add_security_scheme("agent_secret", scheme);
    }
}

/// `{"ok":true}`, for the document.
#[derive(ToSchema)]
#[schema(as = Done)]
#[allow(dead_code, reason = "the schema of `Success::plain`")]
struct Done {
    /// Always true.
    ok: bool,
}

fn declared() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(host::ping))
        .routes(routes!(instances::list, instances::create, instances::command, instances::delete))
        .routes(routes!(instances::show, instances::command_one, instances::delete_one))
        .routes(routes!(instances::console))
        .routes(routes!(events::events))
        .routes(routes!(keys::add, keys::remove))
        .routes(routes!(keys::add_to, keys::remove_from))
        .routes(routes!(gpus::list))
        .routes(routes!(gpus::topology))
        .routes(routes!(gpus::show))
        .routes(routes!(gpus::quarantine))
        .routes(routes!(gpus::release))
        .routes(routes!(host::host))
        .routes(routes!(host::metrics))
        .routes(routes!(host::openapi))
}

/// The router over `shared`.
pub(super) fn router(shared: Shared) -> Router {
    Router::from(declared())
        .layer(middleware::from_fn(remember_route))
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(shared)
}

/// The OpenAPI document.
pub(super) fn openapi_json() -> Vec<u8> {
    error::json(&declared().into_openapi())
}

/// Tells `call` which route answered; a path from outside would make an unbounded label.
async fn remember_route(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    if let Some(route) = route {
        response.extensions_mut().insert(route);
    }
    response
}

async fn no_such_path() -> Refusal {
    Refusal::new(ErrorCode::NoSuchPath, "there is no such path; GET /openapi.json lists all")
}

async fn method_not_allowed() -> Refusal {
    Refusal::new(
        ErrorCode::MethodNotAllowed,
        "this path does not take this method; the header Allow lists those it takes",
    )
}

/// A successful answer.
struct Reply<T>(Success<T>);

impl<T> Reply<T> {
    fn of(data: T) -> Self {
        Self(Success::of(data))
    }
}

impl Reply<()> {
    fn plain() -> Self {
        Self(Success::plain())
    }
}

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], error::json(&self.0)).into_response()
    }
}

/// The instance a call means: the one it names, or the only one.
fn meant(instances: &Instances, named: [Option<Uuid>; 2]) -> Result<Uuid, Refusal> {
    match named {
        [Some(one), Some(other)] if one != other => Err(Refusal::new(
            ErrorCode::InvalidField,
            "id: query and body name different instances; name one",
        )),
        [Some(id), _] | [None, Some(id)] => Ok(id),
        [None, None] => instances.sole(),
    }
}
