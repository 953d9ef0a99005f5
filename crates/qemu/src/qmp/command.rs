//! The QMP commands the agent uses, typed. Replies are read tolerantly: unknown fields are skipped, missing ones are
//! defaults, unknown run states keep their name. Called by [`crate::vm`] and [`crate::console`].

use std::{fmt, time::Duration};

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{client::Qmp, codec::QemuVersion, error::QmpError};

/// What a healthy QEMU needs milliseconds for; generous, because a host under load is not a broken VM.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(5);

/// What the virtual machine is doing, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum RunState {
    /// Executing.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Started with `-S`, never continued.
    Prelaunch,
    /// Powered off, process kept.
    Shutdown,
    /// Suspended to RAM by the guest.
    Suspended,
    /// Stopped by a disk error.
    IoError,
    /// Stopped by an error inside QEMU or KVM; cannot be continued.
    InternalError,
    /// The guest's kernel crashed.
    GuestPanicked,
    /// Waiting for an incoming state.
    Inmigrate,
    /// A state this version does not know.
    Unknown(String),
}

/// The reply to `query-status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    /// The processors run.
    pub running: bool,
    /// The state by name.
    pub state: RunState,
}

#[derive(Deserialize)]
#[serde(default)]
struct StatusReply {
    running: bool,
    status: RunState,
}

/// A virtual processor and the thread of QEMU that executes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Vcpu {
    /// Its number, from 0.
    #[serde(rename = "cpu-index")]
    pub index: u32,
    /// The id of its thread.
    #[serde(rename = "thread-id")]
    pub thread: u32,
}

#[derive(Deserialize)]
struct UuidReply {
    #[serde(rename = "UUID")]
    uuid: Uuid,
}

impl Default for StatusReply {
    fn default() -> Self {
        Self { running: false, status: RunState::Unknown(String::new()) }
    }
}

impl From<String> for RunState {
    fn from(name: String) -> Self {
        match name.as_str() {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "prelaunch" => Self::Prelaunch,
            "shutdown" => Self::Shutdown,
            "suspended" => Self::Suspended,
            "io-error" => Self::IoError,
            "internal-error" => Self::InternalError,
            "guest-panicked" => Self::GuestPanicked,
            "inmigrate" => Self::Inmigrate,
            _ => Self::Unknown(name),
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::Shutdown => "shutdown",
            Self::Suspended => "suspended",
            Self::IoError => "io-error",
            Self::InternalError => "internal-error",
            Self::GuestPanicked => "guest-panicked",
            Self::Inmigrate => "inmigrate",
            Self::Unknown(name) => name,
        })
    }
}

impl Qmp {
    /// What the machine is doing.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn query_status(&self) -> Result<VmStatus, QmpError> {
        let reply: StatusReply = self.execute("query-status", Value::Null, COMMAND_DEADLINE).await?;
        Ok(VmStatus { running: reply.running, state: reply.status })
    }

    /// The UUID the machine was started with (`-uuid`).
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn query_uuid(&self, deadline: Duration) -> Result<Uuid, QmpError> {
        self.execute::<UuidReply>("query-uuid", Value::Null, deadline).await.map(|reply| reply.uuid)
    }

    /// QEMU's version, asked now; [`Qmp::version`] has the one of the greeting without asking.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn query_version(&self) -> Result<QemuVersion, QmpError> {
        self.execute("query-version", Value::Null, COMMAND_DEADLINE).await
    }

    /// The virtual processors and their threads.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn query_vcpus(&self) -> Result<Vec<Vcpu>, QmpError> {
        self.execute("query-cpus-fast", Value::Null, COMMAND_DEADLINE).await
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// [`QmpError`]; refused while the machine is in a state that cannot be continued.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.act("cont", COMMAND_DEADLINE).await
    }

    /// Stops the processors.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.act("stop", COMMAND_DEADLINE).await
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.act("system_reset", COMMAND_DEADLINE).await
    }

    /// Presses the power button; a guest may ignore it.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.act("system_powerdown", COMMAND_DEADLINE).await
    }

    /// Ends QEMU. Success is the order's acceptance; that the process is gone is for its pidfd to tell.
    ///
    /// # Errors
    /// [`QmpError`]; a connection that closes instead of a reply counts as accepted.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.act("quit", COMMAND_DEADLINE).await {
            Err(QmpError::Closed { .. }) => Ok(()),
            other => other,
        }
    }

    /// Takes up to `size` bytes out of the ring buffer of a character device, as base64.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn ringbuf_read(&self, device: &str, size: usize) -> Result<String, QmpError> {
        let arguments = json!({"device": device, "size": size, "format": "base64"});
        self.execute("ringbuf-read", arguments, COMMAND_DEADLINE).await
    }

    async fn act(&self, command: &str, deadline: Duration) -> Result<(), QmpError> {
        self.execute::<Value>(command, Value::Null, deadline).await.map(drop)
    }
}
