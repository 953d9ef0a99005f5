//! The hardware of one virtual machine, as typed values. Owns the vocabulary that `argv` renders and `vm` launches;
//! the agent fills it in from an instance's record.

use std::{fmt, path::PathBuf};

use qudata_host::size::ByteSize;
use uuid::Uuid;

use crate::{firmware::Firmware, memory::MemoryPlan, mmio::MmioPlan, passthrough::PassthroughSlot};

/// Bytes of serial output that QEMU keeps until somebody reads them. QEMU wants a power of two.
pub const CONSOLE_RING: ByteSize = ByteSize::from_mib(1);

/// Name of the virtio-serial port through which a guest says that it is ready.
pub const READY_PORT: &str = "ru.qudata.ready";

/// Identifiers of objects inside QEMU that other modules address over QMP.
pub mod id {
    /// Character device of the serial console (`ringbuf-read`).
    pub const CONSOLE: &str = "console";
    /// Character device behind the ready port.
    pub const READY: &str = "ready";
    /// Block node of the renter's disk, named in I/O error events.
    pub const DISK: &str = "disk";
    /// Network backend.
    pub const NETWORK: &str = "net";
    /// Memory object behind the RAM of a machine whose [`super::MemoryPlan`] asks for one.
    pub const RAM: &str = "ram";
}

/// Everything QEMU is told about one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Identity, checked over QMP before the machine may run.
    pub uuid: Uuid,
    /// Name shown in the process list; free text.
    pub name: String,
    /// Hardware virtualisation or emulation.
    pub accel: Accel,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM; whole MiB are used.
    pub memory: ByteSize,
    /// What backs the RAM: [`crate::memory::plan_memory`].
    pub backing: MemoryPlan,
    /// How the machine starts.
    pub firmware: Firmware,
    /// The renter's disk.
    pub disk: Disk,
    /// Read-only cloud-init seed image.
    pub seed: PathBuf,
    /// The one network card.
    pub network: NetworkDevice,
    /// The host's GPUs in it; bound to `vfio-pci` before the start.
    pub passthrough: Vec<PassthroughSlot>,
    /// Where their BARs go: [`crate::mmio::plan_mmio`] of the same slots, RAM and firmware; `None` without GPUs.
    pub mmio: Option<MmioPlan>,
    /// Where QEMU listens for QMP.
    pub qmp_socket: PathBuf,
    /// Where QEMU listens for the reader of the ready port.
    pub ready_socket: PathBuf,
    /// Where QEMU listens for QMP a second time, for who shuts the guest down without the agent.
    pub power_socket: PathBuf,
}

/// What executes guest instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accel {
    /// The kernel's virtualisation: production.
    Kvm,
    /// Emulation: slow, works anywhere, for tests and demonstrations.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// The disk a machine boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// qcow2 overlay made by [`crate::disk::create_overlay`].
    pub overlay: PathBuf,
    /// Use of the host's page cache.
    pub cache: CacheMode,
}

/// How disk writes travel. Guest flushes reach the disk in both modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CacheMode {
    /// Past the page cache: host memory stays bounded whatever the guest writes.
    #[default]
    Direct,
    /// Through the page cache, for file systems without direct I/O (tmpfs, some overlays).
    PageCache,
}

/// A virtio network card whose other end is passt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkDevice {
    /// Socket on which passt waits for QEMU.
    pub socket: PathBuf,
    /// Address the guest's network configuration matches on.
    pub mac: MacAddress,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of the passt side: the guest's gateway.
    pub const GATEWAY: Self = Self([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);

    /// A locally administered address that belongs to `uuid`. Each machine has a network segment of its own, so two
    /// equal addresses would not meet; they differ all the same, so that logs can be told apart.
    pub fn of(uuid: Uuid) -> Self {
        // The last bytes are random in versions 4 and 7; the first bytes of version 7 are a clock.
        let [.., a, b, c] = *uuid.as_bytes();
        Self([0x52, 0x54, 0x00, a, b, c])
    }

    /// Its six bytes, in transmission order.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn address_is_printed_as_tools_print_it() {
        let uuid = Uuid::parse_str("0190a5b0-7e1c-7abc-8def-0123456789ab").unwrap();
        assert_eq!(MacAddress::of(uuid).to_string(), "52:54:00:67:89:ab");
        assert_eq!(MacAddress::GATEWAY.to_string(), "52:55:0a:00:02:02");
    }

    proptest! {
        #[test]
        fn address_is_local_unicast_and_never_the_gateways(bytes in any::<[u8; 16]>()) {
            let mac = MacAddress::of(Uuid::from_bytes(bytes));
            prop_assert_eq!(mac.0[0] & 0b11, 0b10, "locally administered, not multicast");
            prop_assert_ne!(mac, MacAddress::GATEWAY);
        }
    }
}
