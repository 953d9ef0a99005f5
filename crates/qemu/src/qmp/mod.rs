//! QEMU's control channel (QMP), spoken by hand: a connection to one QEMU, its commands and its events. Called by
//! [`crate::vm`], [`crate::console`] and the task that owns an instance.
//!
//! ```text
//!  execute() ──frame──▶ writer task ──▶ socket ──▶ QEMU
//!      ▲                                             │
//!      └─ reply, by id ◀── reader task ◀── socket ◀──┘
//!  QmpEvents::next() ◀── in order ──┘
//! ```
//!
//! QEMU serves one client per socket: a second `connect` succeeds and never gets a greeting, and a stopped QEMU looks
//! the same. So everything has a deadline, and silence is an error value, never a verdict about the VM.

mod client;
mod codec;
mod command;
mod error;
mod event;

#[cfg(test)]
pub(crate) mod tests;

pub use client::{EVENT_CAPACITY, Qmp, QmpEvents};
pub use codec::{FRAME_LIMIT, QemuVersion, VersionNumber};
pub use command::{COMMAND_DEADLINE, RunState, Vcpu, VmStatus};
pub use error::{CloseReason, ConnectError, QmpError};
pub use event::{BlockIoError, Event, QmpEvent};
