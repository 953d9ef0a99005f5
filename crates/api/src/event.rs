//! What happens to an instance, as streamed by `GET /instances/{id}/events`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One phase reached. Sent as a server-sent event of type `phase` with `seq` as its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceEvent {
    /// Position in the instance's history, from 1; no gaps.
    pub seq: u64,
    /// When it happened, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Milliseconds since the create call was received.
    pub elapsed_ms: u64,
    /// Stable name: `accepted`, `disk_created`, `seed_written`, `network_started`, `qemu_started`, `booting`,
    /// `guest_up`, `ready`, `paused`, `resumed`, `rebooting`, `stopped`, `starting`, `unresponsive`, `responsive`,
    /// `adopted`, `deleting`, `failed`, `problem`, `key_added`, `key_removed`.
    pub phase: String,
    /// A sentence for a person, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
