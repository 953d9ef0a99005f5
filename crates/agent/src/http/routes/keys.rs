//! `/ssh` and `/instances/{id}/ssh`: who may log in to a guest, changed while it runs.

use axum::extract::State;
use qudata_api::{ErrorBody, SshKeyBody};

use super::{
    super::input::{Id, IdQuery, JsonBody, NoQuery, QueryOf},
    Done, Reply, Shared, meant,
};
use crate::refusal::Refusal;

/// Let a key log in. Adding it again changes nothing.
#[utoipa::path(post, path = "/ssh", params(IdQuery), request_body = SshKeyBody, responses(
    (status = 200, body = Done),
    (status = 400, body = ErrorBody),
    (status = 404, description = "There is no instance", body = ErrorBody),
    (status = 409, description = "Ambiguous, or the guest is not up", body = ErrorBody),
))]
pub(super) async fn add(
    State(shared): State<Shared>,
    QueryOf(query): QueryOf<IdQuery>,
    JsonBody(body): JsonBody<SshKeyBody>,
) -> Result<Reply<()>, Refusal> {
    let id = meant(&shared.instances, [query.id, body.id])?;
    shared.instances.add_key(id, &body.ssh_pubkey).await.map(|()| Reply::plain())
}

/// No longer let a key log in. Removing it again changes nothing.
#[utoipa::path(delete, path = "/ssh", params(IdQuery), request_body = SshKeyBody, responses(
    (status = 200, body = Done),
    (status = 400, body = ErrorBody),
    (status = 404, description = "There is no instance", body = ErrorBody),
    (status = 409, description = "Ambiguous, or the guest is not up", body = ErrorBody),
))]
pub(super) async fn remove(
    State(shared): State<Shared>,
    QueryOf(query): QueryOf<IdQuery>,
    JsonBody(body): JsonBody<SshKeyBody>,
) -> Result<Reply<()>, Refusal> {
    let id = meant(&shared.instances, [query.id, body.id])?;
    shared.instances.remove_key(id, &body.ssh_pubkey).await.map(|()| Reply::plain())
}

/// Let a key log in to this instance.
#[utoipa::path(post, path = "/instances/{id}/ssh", params(("id" = Uuid, Path)), request_body = SshKeyBody, responses(
    (status = 200, body = Done),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, description = "The guest is not up", body = ErrorBody),
))]
pub(super) async fn add_to(
    State(shared): State<Shared>,
    Id(id): Id,
    QueryOf(NoQuery {}): QueryOf<NoQuery>,
    JsonBody(body): JsonBody<SshKeyBody>,
) -> Result<Reply<()>, Refusal> {
    let id = meant(&shared.instances, [Some(id), body.id])?;
    shared.instances.add_key(id, &body.ssh_pubkey).await.map(|()| Reply::plain())
}

/// No longer let a key log in to this instance.
#[utoipa::path(delete, path = "/instances/{id}/ssh", params(("id" = Uuid, Path)), request_body = SshKeyBody, responses(
    (status = 200, body = Done),
    (status = 400, body = ErrorBody),
    (status = 404, body = ErrorBody),
    (status = 409, description = "The guest is not up", body = ErrorBody),
))]
pub(super) async fn remove_from(
    State(shared): State<Shared>,
    Id(id): Id,
    QueryOf(NoQuery {}): QueryOf<NoQuery>,
    JsonBody(body): JsonBody<SshKeyBody>,
) -> Result<Reply<()>, Refusal> {
    let id = meant(&shared.instances, [Some(id), body.id])?;
    shared.instances.remove_key(id, &body.ssh_pubkey).await.map(|()| Reply::plain())
}
