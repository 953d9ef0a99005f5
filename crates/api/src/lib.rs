//! The wire contract of the agent's HTTP API: bodies, views, error codes. Serde types and their OpenAPI schema; no logic
//! beyond what a body's form needs, no tokio. The daemon and the CLI both speak it.

mod error;
mod event;
mod gpu;
mod host;
mod instance;
mod request;

pub use error::{ErrorBody, ErrorCode, Success};
pub use event::InstanceEvent;
pub use gpu::{
    GpuDistance, GpuDistanceMeaning, GpuHolder, GpuHolderKind, GpuLink, GpuPlace, GpuRefusal, GpuState,
    GpuTopology, GpuView, QuarantineBody,
};
pub use host::{HostView, LinkView, Problem};
pub use instance::{
    Created, InstanceList, InstanceState, InstanceView, RouteState, RouteView, Sample, SshEndpoint, Status,
    StatusOf, Teardown,
};
pub use request::{Command, CommandBody, CreateBody, NumberText, Opaque, SshKeyBody};
