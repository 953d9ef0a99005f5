//! `/gpus` and what is below it.

use axum::extract::State;
use qudata_api::{ErrorBody, ErrorCode, GpuTopology, GpuView, QuarantineBody, Success};

use super::{
    super::input::{GpuAddress, JsonBody},
    Reply, Shared,
};
use crate::refusal::Refusal;

/// Longest reason for a quarantine, in characters.
const LONGEST_REASON: usize = 500;

/// The GPUs of this host.
#[utoipa::path(get, path = "/gpus", responses(
    (status = 200, body = Success<Vec<GpuView>>),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn list(State(shared): State<Shared>) -> Reply<Vec<GpuView>> {
    Reply::of(shared.instances.gpus())
}

/// Where the GPUs sit, and how far from each other.
#[utoipa::path(get, path = "/gpus/topology", responses(
    (status = 200, body = Success<GpuTopology>),
    (status = "4XX", body = ErrorBody),
))]
pub(super) async fn topology(State(shared): State<Shared>) -> Reply<GpuTopology> {
    Reply::of(shared.instances.gpu_places())
}

/// One GPU.
#[utoipa::path(get, path = "/gpus/{address}", params(("address" = String, Path)), responses(
    (status = 200, body = Success<GpuView>),
    (status = 404, body = ErrorBody),
))]
pub(super) async fn show(
    State(shared): State<Shared>,
    GpuAddress(address): GpuAddress,
) -> Result<Reply<GpuView>, Refusal> {
    shared.instances.gpu(address).map(Reply::of)
}

/// Take a GPU out of business. One that an instance has is quarantined when it comes back.
#[utoipa::path(post, path = "/gpus/{address}/quarantine", params(("address" = String, Path)), responses(
    (status = 200, body = Success<GpuView>),
    (status = 404, body = ErrorBody),
    (status = 409, description = "It is being reset and checked", body = ErrorBody),
))]
pub(super) async fn quarantine(
    State(shared): State<Shared>,
    GpuAddress(address): GpuAddress,
    JsonBody(QuarantineBody { reason }): JsonBody<QuarantineBody>,
) -> Result<Reply<GpuView>, Refusal> {
    let reason = reason.trim();
    let fits = (1..=LONGEST_REASON).contains(&reason.chars().count());
    if !fits || reason.chars().any(char::is_control) {
        let allowed = "one sentence of 1 to 500 printable characters is";
        return Err(Refusal::new(ErrorCode::InvalidField, format!("reason: this is not allowed; {allowed}")));
    }
    shared.instances.quarantine(address, reason).await.map(Reply::of)
}

/// Reset and check a quarantined GPU; it is free when it passes. Answers at once, with the GPU as it is then.
///
/// One that is not in the host any more is forgotten.
#[utoipa::path(post, path = "/gpus/{address}/release", params(("address" = String, Path)), responses(
    (status = 200, body = Success<GpuView>),
    (status = 404, body = ErrorBody),
    (status = 409, description = "It is not quarantined, or an operation on it hangs", body = ErrorBody),
))]
pub(super) async fn release(
    State(shared): State<Shared>,
    GpuAddress(address): GpuAddress,
) -> Result<Reply<GpuView>, Refusal> {
    shared.instances.release_gpu(address).await.map(Reply::of)
}
