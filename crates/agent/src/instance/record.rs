//! The durable truth about one instance. Written by its task before each effect, read by recovery and teardown.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use jiff::Timestamp;
use qudata_host::{pci::PciAddress, size::ByteSize};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Text that is kept and never printed: keys, tokens, the renter's user-data.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(String);

impl Sealed {
    /// Seals a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that needs it.
    pub fn open(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealed")
    }
}

/// The validated wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Name, unique on the host; also the guest's host name.
    pub name: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory: ByteSize,
    /// Virtual size of the disk.
    pub storage: ByteSize,
    /// Guest ports to publish, 22 among them when SSH is published.
    pub ports: BTreeSet<u16>,
    /// The renter's public keys, one OpenSSH line each.
    pub ssh_keys: Vec<String>,
    /// Domain label of the renter's tunnel.
    pub tunnel_token: Option<Sealed>,
}

/// What is held for the instance and for nobody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leases {
    /// Decides the users that QEMU and passt run as.
    pub slot: u32,
    /// Guest port → host port.
    pub ports: BTreeMap<u16, u16>,
    /// Guest port → port on the tunnel server. Empty without a tunnel: then the host ports are public.
    #[serde(default)]
    pub public: BTreeMap<u16, u16>,
    /// Host port through which the agent alone reaches the guest's SSH.
    pub management_port: u16,
    /// GPUs.
    pub gpus: Vec<PciAddress>,
}

impl Leases {
    /// Guest port → the port a renter uses.
    pub fn public_ports(&self) -> BTreeMap<u16, u16> {
        let public = |(guest, host): (&u16, &u16)| (*guest, *self.public.get(guest).unwrap_or(host));
        self.ports.iter().map(public).collect()
    }
}

/// A host change that is made once per instance and undone by DELETE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileStep {
    /// The renter's disk. Once done it is never made again: that would destroy it.
    Disk,
    /// The NoCloud seed.
    Seed,
    /// UEFI variables.
    Firmware,
}

/// Where the instance is in its life, as far as it must survive the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Being brought up; the guest was not proven yet.
    Starting,
    /// The guest was proven. Whether it is paused now is QEMU's to say.
    Up,
    /// Powered off; the disk is kept.
    Stopped {
        /// Why.
        reason: String,
    },
    /// Broken; the disk is kept until DELETE.
    Failed {
        /// Why.
        reason: String,
    },
    /// DELETE was accepted; nothing of it may stay.
    Deleting,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Id of the instance; also the UUID of its machine.
    pub id: Uuid,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// The wish.
    pub spec: InstanceSpec,
    /// What it holds.
    pub leases: Leases,
    /// The guest's SSH host key, OpenSSH public line. Pinned: nothing is trusted on first use.
    pub host_key: String,
    /// The renter's cloud-init user-data, until the seed is written.
    pub user_data: Option<Sealed>,
    /// File steps that are complete.
    pub done: BTreeSet<FileStep>,
    /// Where it is in its life.
    pub phase: Phase,
    /// Since when.
    pub since: Timestamp,
    /// When the guest was first proven.
    pub ready_at: Option<Timestamp>,
    /// Counts the starts of its VM, from 1. Raised and committed before each start.
    pub incarnation: u32,
    /// Boot of the host in which its VM was last started.
    pub boot_id: String,
    /// The base image that its disk lies over: the file itself, never a link that leads to a newer image one day. Absent in
    /// the records of agents that knew one image only.
    #[serde(default)]
    pub base: Option<PathBuf>,
}
