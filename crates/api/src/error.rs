//! The envelope of every answer and the stable error codes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A successful answer: `{"ok":true,"data":…}`, without `data` where there is nothing to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Success<T> {
    /// Always true.
    pub ok: bool,
    /// What was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<T>,
}

impl<T> Success<T> {
    /// An answer with data.
    pub fn of(data: T) -> Self {
        Self { ok: true, data: Some(data) }
    }
}

impl Success<()> {
    /// `{"ok":true}`.
    pub fn plain() -> Self {
        Self { ok: true, data: None }
    }
}

/// A refused or failed call: `{"ok":false,"error":"<sentence>","code":"<stable_code>"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Always false.
    pub ok: bool,
    /// One sentence for a person: what is wrong and what to do.
    pub error: String,
    /// Stable code for programs.
    pub code: ErrorCode,
}

impl ErrorBody {
    /// The body for a code and a sentence.
    pub fn new(code: ErrorCode, error: impl Into<String>) -> Self {
        Self { ok: false, error: error.into(), code }
    }
}

/// Stable codes; new ones may be added, none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the body is no JSON of the expected form.
    MalformedBody,
    /// 400: a field's value is not allowed; the sentence names field, value and what is.
    InvalidField,
    /// 401: no secret was given.
    SecretMissing,
    /// 403: the secret is wrong, or the local user is not allowed.
    Forbidden,
    /// 404: there is no such instance.
    NoSuchInstance,
    /// 404: this host has no such GPU.
    NoSuchGpu,
    /// 404: there is no such path.
    NoSuchPath,
    /// 405: the path does not take this method.
    MethodNotAllowed,
    /// 408: the request did not arrive in time.
    RequestTimeout,
    /// 409: several instances exist and the call names none.
    AmbiguousInstance,
    /// 409: the instance is in a state that does not allow the call.
    WrongState,
    /// 409: a GPU that was asked for by address is not free.
    GpuTaken,
    /// 409: a GPU that was asked for by address cannot be lent; the sentence says why and what to do.
    GpuUnfit,
    /// 409: no host port is left in the range.
    PortTaken,
    /// 413: the body is over the limit.
    BodyTooLarge,
    /// 431: the request head is over the limit.
    HeaderTooLarge,
    /// 500: a defect of the agent.
    Internal,
    /// 500: the host refused something the agent needs.
    HostFault,
    /// 502: the guest did not do its part.
    GuestFault,
    /// 503: too many connections or calls at once; try again.
    Busy,
    /// 507: no GPU is free.
    NoGpu,
    /// 507: not enough memory.
    NoMemory,
    /// 507: not enough disk space.
    NoDisk,
    /// 507: not enough CPUs.
    NoCpus,
}
