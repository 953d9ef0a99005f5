//! `/instances` and `/instances/{id}`: create, list, command, delete, console.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use qudata_api::{
    CommandBody, CreateBody, Created, ErrorBody, ErrorCode, InstanceList, InstanceView, Status, StatusOf,
    Success, Teardown,
};
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    super::input::{Id, IdQuery, JsonBody, NoQuery, OptionalBody, QueryOf, TailQuery},
    Reply, Shared, meant,
};
use crate::refusal::Refusal;

/// All instances, oldest first, and the status the platform asks for.
#[utoipa::path(get, path = "/instances", responses(
    (status = 200, body = Success<InstanceList>),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn list(State(shared): State<Shared>) -> Reply<InstanceList> {
    let instances = shared.instances.list();
    let status = instances.first().map_or(Status::Destroyed, |oldest| oldest.status);
    Reply::of(InstanceList { status, instances })
}

/// Create an instance. Answered before it boots; follow its events to see it come up.
#[utoipa::path(post, path = "/instances", request_body = CreateBody, responses(
    (status = 200, body = Success<Created>),
    (status = 400, body = ErrorBody),
    (status = 409, description = "A GPU or port is taken", body = ErrorBody),
    (status = 507, description = "No GPU, memory, disk or CPU is left", body = ErrorBody),
))]
pub(super) async fn create(
    State(shared): State<Shared>,
    QueryOf(NoQuery {}): QueryOf<NoQuery>,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<Reply<Created>, Refusal> {
    shared.instances.create(body).await.map(Reply::of)
}

/// Start (resume), stop (pause) or restart an instance.
#[utoipa::path(put, path = "/instances", params(IdQuery), request_body = CommandBody, responses(
    (status = 200, body = Success<StatusOf>),
    (status = 400, body = ErrorBody),
    (status = 404, description = "There is no instance", body = ErrorBody),
    (status = 409, description = "Ambiguous, or not in a state for this", body = ErrorBody),
))]
pub(super) async fn command(
    State(shared): State<Shared>,
    QueryOf(query): QueryOf<IdQuery>,
    JsonBody(body): JsonBody<CommandBody>,
) -> Result<Reply<StatusOf>, Refusal> {
    let id = meant(&shared.instances, [query.id, body.id])?;
    shared.instances.command(id, body.command).await.map(Reply::of)
}

/// Body of `DELETE /instances`, which is usually left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteBody {
    /// Which instance; needed only when there are several.
    id: Option<Uuid>,
}

/// Delete an instance with its disk. Without any instance this succeeds.
#[utoipa::path(delete, path = "/instances", params(IdQuery), request_body = Option<DeleteBody>, responses(
    (status = 200, body = Success<Teardown>),
    (status = 400, body = ErrorBody),
    (status = 404, description = "The id names no instance", body = ErrorBody),
    (status = 409, description = "Ambiguous", body = ErrorBody),
))]
pub(super) async fn delete(
    State(shared): State<Shared>,
    QueryOf(query): QueryOf<IdQuery>,
    OptionalBody(body): OptionalBody<DeleteBody>,
) -> Result<Response, Refusal> {
    let named = [query.id, body.unwrap_or_default().id];
    let deleted = match meant(&shared.instances, named) {
        Ok(id) => shared.instances.delete(id).await,
        Err(refusal) => Err(refusal),
    };
    match deleted {
        Ok(teardown) => Ok(Reply::of(teardown).into_response()),
        // As the original: what is not there is deleted. An id that names nothing is a mistake all the same.
        Err(refusal) if refusal.code == ErrorCode::NoSuchInstance && named == [None, None] => {
            Ok(Reply::plain().into_response())
        }
        Err(refusal) => Err(refusal),
    }
}

/// One instance.
#[utoipa::path(get, path = "/instances/{id}", params(("id" = Uuid, Path)), responses(
    (status = 200, body = Success<InstanceView>),
    (status = 404, body = ErrorBody),
))]
pub(super) async fn show(State(shared): State<Shared>, Id(id): Id) -> Result<Reply<InstanceView>, Refusal> {
    shared.instances.get(id).map(Reply::of).ok_or_else(Refusal::no_such_instance)
}

/// Start (resume), stop (pause) or restart this instance.
#[utoipa::path(put, path = "/instances/{id}", params(("id" = Uuid, Path)), request_body = CommandBody, responses(
    (status = 200, body = Success<StatusOf>),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, description = "Not in a state for this", body = ErrorBody),
))]
pub(super) async fn command_one(
    State(shared): State<Shared>,
    Id(id): Id,
    QueryOf(NoQuery {}): QueryOf<NoQuery>,
    JsonBody(body): JsonBody<CommandBody>,
) -> Result<Reply<StatusOf>, Refusal> {
    let id = meant(&shared.instances, [Some(id), body.id])?;
    shared.instances.command(id, body.command).await.map(Reply::of)
}

/// Delete this instance with its disk.
#[utoipa::path(delete, path = "/instances/{id}", params(("id" = Uuid, Path)), responses(
    (status = 200, body = Success<Teardown>),
    (status = 404, body = ErrorBody),
))]
pub(super) async fn delete_one(
    State(shared): State<Shared>,
    Id(id): Id,
    QueryOf(NoQuery {}): QueryOf<NoQuery>,
    OptionalBody(body): OptionalBody<DeleteBody>,
) -> Result<Reply<Teardown>, Refusal> {
    let id = meant(&shared.instances, [Some(id), body.unwrap_or_default().id])?;
    shared.instances.delete(id).await.map(Reply::of)
}

/// The end of what the guest wrote to its serial console, bounded. Guests write what they like: do not send it to a
/// terminal unfiltered.
#[utoipa::path(get, path = "/instances/{id}/console", params(("id" = Uuid, Path), TailQuery), responses(
    (status = 200, content_type = "text/plain; charset=utf-8", body = String),
    (status = 404, body = ErrorBody),
))]
pub(super) async fn console(
    State(shared): State<Shared>,
    Id(id): Id,
    QueryOf(query): QueryOf<TailQuery>,
) -> Result<Response, Refusal> {
    let bytes = shared.instances.console(id).await?;
    let text = String::from_utf8_lossy(tail(&bytes, query.tail.unwrap_or(usize::MAX))).into_owned();
    let headers =
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((headers, text).into_response())
}

/// The last `count` bytes, without the rest of a character that was cut in two.
fn tail(bytes: &[u8], count: usize) -> &[u8] {
    let start = bytes.len().saturating_sub(count);
    let cut = bytes.get(start..).unwrap_or_default();
    let continued =
        if start == 0 { 0 } else { cut.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count() };
    cut.get(continued..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_begins_at_a_character() {
        let text = "abc é".as_bytes();
        assert_eq!(tail(text, usize::MAX), text);
        assert_eq!(tail(text, 3), " é".as_bytes());
        assert_eq!(tail(text, 1), b"");
        assert_eq!(tail(text, 0), b"");
        assert_eq!(tail(b"\x80\x80\x80\x80\x80", 4), b"\x80", "noise is shown, only a cut character is not");
    }
}
