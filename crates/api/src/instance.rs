//! Instances as the API shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Problem;

/// Status in the original's words; what the platform bills by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// There is none, or it is being deleted.
    Destroyed,
    /// Accepted, not usable yet.
    Pending,
    /// The guest is up and SSH was proven.
    Running,
    /// Stopped by request, or powered off from inside; `start` brings it back.
    Paused,
    /// Restarting.
    Rebooting,
    /// It needs somebody; the reason says what happened.
    Error,
}

/// Precise state; [`Status`] is derived from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Host side is being prepared.
    Provisioning,
    /// QEMU runs, the guest is not up yet.
    Booting,
    /// The guest is up and SSH was proven.
    Running,
    /// Stopped by request; memory is kept.
    Paused,
    /// The guest is restarting.
    Rebooting,
    /// Powered off; the disk is kept and `start` boots it again.
    Stopped,
    /// QEMU does not answer; it is left alone and watched.
    Unresponsive,
    /// Being deleted.
    Deleting,
    /// Bring-up failed or QEMU ended by itself; the disk is kept until DELETE.
    Failed,
}

impl InstanceState {
    /// The word of the original's contract.
    pub fn status(self) -> Status {
        match self {
            Self::Provisioning | Self::Booting => Status::Pending,
            Self::Running => Status::Running,
            Self::Paused | Self::Stopped => Status::Paused,
            Self::Rebooting => Status::Rebooting,
            Self::Deleting => Status::Destroyed,
            Self::Unresponsive | Self::Failed => Status::Error,
        }
    }
}

/// Where to log in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshEndpoint {
    /// Address to connect to.
    pub host: String,
    /// Port to connect to.
    pub port: u16,
    /// User to log in as.
    pub user: String,
}

/// How a published port is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouteState {
    /// Being announced to the tunnel server.
    Adding,
    /// The tunnel server routes it.
    Up,
    /// The tunnel is down; it comes back by itself.
    Waiting,
    /// The tunnel server refuses it.
    Refused,
}

/// One port as the tunnel publishes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RouteView {
    /// Port in the guest.
    pub guest_port: u16,
    /// Public port.
    pub public_port: u16,
    /// `tcp`, or `http` (by virtual host).
    pub kind: String,
    /// Where it is reached: `host:port`, or the virtual host's name.
    pub address: String,
    /// Whether it is.
    pub state: RouteState,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// One reading of what the guest uses. Guests can lie: for display, never for decisions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// When it was taken, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// CPU use in percent of all vCPUs, 0 to 100; absent in the first sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// RAM use in percent, 0 to 100.
    pub ram_percent: f64,
    /// Bytes received since boot.
    pub net_rx_bytes: u64,
    /// Bytes sent since boot.
    pub net_tx_bytes: u64,
    /// GPU use in percent (the busiest one), where `nvidia-smi` exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_percent: Option<f64>,
    /// GPU temperature in °C (the hottest one).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_celsius: Option<f64>,
    /// GPU memory use in percent (the fullest one).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory_percent: Option<f64>,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceView {
    /// Its id.
    pub id: Uuid,
    /// Its name, unique on the host.
    pub name: String,
    /// Status in the original's words.
    pub status: Status,
    /// Precise state.
    pub state: InstanceState,
    /// Since when it is in this state, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Why, where the state is not the ordinary one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Guest port → public port.
    pub ports: BTreeMap<String, String>,
    /// Guest port → port on the host itself; empty without a tunnel, where `ports` are those.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub local_ports: BTreeMap<String, String>,
    /// What the tunnel makes of `ports`; empty without a tunnel.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub routes: Vec<RouteView>,
    /// Where to log in; absent when port 22 is not published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<SshEndpoint>,
    /// The guest's SSH host key in OpenSSH form: pin it.
    pub ssh_host_key: String,
    /// SHA256 fingerprints of the renter's keys.
    pub ssh_keys: Vec<String>,
    /// vCPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// Disk size in bytes.
    pub storage: u64,
    /// PCI addresses of its GPUs.
    pub gpus: Vec<String>,
    /// When it was accepted, RFC 3339.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was first ready, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ready_at: Option<Timestamp>,
    /// What the guest last said of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// `data` of `GET /instances`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceList {
    /// Status of the sole instance, of the oldest of several, `destroyed` when there is none.
    pub status: Status,
    /// All of them, oldest first.
    pub instances: Vec<InstanceView>,
}

/// `data` of `POST /instances`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Created {
    /// Guest port → public port.
    pub ports: BTreeMap<String, String>,
    /// Id of the new instance.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// What was accepted and is not honoured, each as one sentence.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub warnings: Vec<String>,
}

/// `data` of `PUT` and similar calls on one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusOf {
    /// The instance.
    pub id: Uuid,
    /// Its state when the call was answered.
    pub state: InstanceState,
}

/// `data` of `DELETE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Teardown {
    /// The instance that was deleted; absent when there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// Whether all of it is gone. `false`: it is still being removed, or some of it could not be.
    pub complete: bool,
    /// What could not be removed, each with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub residues: Vec<String>,
}
