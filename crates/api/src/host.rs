//! The host as `GET /host` shows it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that is wrong: what, since when, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Stable code, for example `vm_unresponsive`.
    pub code: String,
    /// One sentence: what is wrong and where.
    pub message: String,
    /// What to do next.
    pub remedy: String,
    /// Since when, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
}

/// A connection the agent keeps to the outside: the tunnel, or the control plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LinkView {
    /// Whom it is with.
    pub peer: String,
    /// `starting`, `up` or `down`.
    pub state: String,
    /// Since when, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Why it is not up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Version of the program that keeps it, where that is not the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// The host and the agent on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Version of the agent.
    pub version: String,
    /// When this agent process started, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Whether it runs without a control plane.
    pub standalone: bool,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// `uefi`, `bios` or `direct`.
    pub firmware: String,
    /// `frp` or `none`.
    pub tunnel: String,
    /// How the tunnel is doing; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnel_link: Option<LinkView>,
    /// How the connection to the control plane is doing; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_plane: Option<LinkView>,
    /// Address of the API and of the VMs' ports.
    pub listen: String,
    /// TCP port of the API.
    pub port: u16,
    /// Logical CPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory_total: u64,
    /// RAM that a new instance may take, in bytes: what is available now, less what is promised and the reserve.
    pub memory_free: u64,
    /// Size of the file system with the disks, in bytes.
    pub disk_total: u64,
    /// Space a new disk may take, in bytes: what is free, less what existing disks may still grow and the reserve.
    pub disk_free: u64,
    /// Number of instances.
    pub instances: usize,
    /// What is wrong on this host.
    pub problems: Vec<Problem>,
}
