//! The NoCloud seed: the first thing a guest reads. Pure rendering of its files from a [`SeedSpec`], and the ISO
//! image that carries them. Called by the instance's provisioning before the VM is launched.
//!
//! What must hold whatever the renter writes goes into `user-data`; what a renter may change goes into
//! `vendor-data`, which cloud-init ranks below it:
//!
//! ```text
//! meta-data       instance id, host name
//! network-config  one static interface, found by its MAC
//! vendor-data     defaults: disk growth, no package update, quiet console
//! user-data       ours alone (#cloud-config)  or  MIME: ours, the renter's, ours once more where theirs could replace it
//! ```

mod cloud_config;
mod iso;
mod user_data;

pub use iso::{SeedImageError, VOLUME_LABEL};
pub use user_data::{MAX_USER_DATA_BYTES, UserData, UserDataError};

use crate::keys::{GuestKey, HostKey};
use std::{net::Ipv4Addr, path::Path};

/// Name of the virtio-serial port over which the guest reports that it is ready.
pub const READY_PORT_NAME: &str = "ru.qudata.ready";

/// Everything a guest is told at its first boot.
#[derive(Debug)]
pub struct SeedSpec<'a> {
    /// Changes exactly when cloud-init must treat the disk as a new machine.
    pub instance_id: &'a str,
    /// Host name; a validated DNS label.
    pub hostname: &'a str,
    /// How the guest's sshd identifies itself.
    pub host_key: &'a HostKey,
    /// The agent's own access.
    pub management_key: &'a GuestKey,
    /// The renter's access.
    pub ssh_keys: &'a [GuestKey],
    /// The renter's own configuration.
    pub user_data: Option<&'a UserData>,
    /// The one interface.
    pub network: StaticNetwork,
}

/// The guest's address, fixed so that it needs no DHCP and is known before it boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticNetwork {
    /// The guest's own address.
    pub address: Ipv4Addr,
    /// Length of the network prefix.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// Name server.
    pub dns: Ipv4Addr,
    /// The interface is found by this; names differ between images.
    pub mac: [u8; 6],
    /// Largest packet.
    pub mtu: u16,
}

impl StaticNetwork {
    /// The addresses every guest of ours has behind its own network backend.
    #[must_use]
    pub const fn behind_backend(mac: [u8; 6], mtu: u16) -> StaticNetwork {
        StaticNetwork {
            address: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            dns: Ipv4Addr::new(10, 0, 2, 3),
            mac,
            mtu,
        }
    }
}

/// The seed's files. `user_data` holds the private host key: not printable.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed {
    /// `meta-data`
    pub meta_data: String,
    /// `network-config`
    pub network_config: String,
    /// `vendor-data`
    pub vendor_data: String,
    /// `user-data`
    pub user_data: String,
}

impl Seed {
    /// Renders the files. Pure.
    #[must_use]
    pub fn render(spec: &SeedSpec<'_>) -> Seed {
        let ours = cloud_config::Ours::of(spec);
        Seed {
            meta_data: cloud_config::meta_data(spec),
            network_config: cloud_config::network_config(&spec.network),
            vendor_data: cloud_config::vendor_data(),
            user_data: match spec.user_data {
                None => cloud_config::document(&ours.whole()),
                Some(theirs) => user_data::merge(&ours, theirs),
            },
        }
    }

    /// Writes the ISO image to `path`, readable by its owner only.
    ///
    /// # Errors
    /// When the image cannot be built or written.
    pub fn write_iso(&self, path: &Path) -> Result<(), SeedImageError> {
        iso::write(self, path)
    }
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seed({} bytes of user-data)", self.user_data.len())
    }
}

#[cfg(test)]
mod tests;
