//! How far two devices are apart: the letters of `nvidia-smi topo`, from sysfs alone, so also for cards that no driver
//! of the maker holds. Pure; called by `choose` and by whoever shows the topology.
//!
//! ```text
//! NUMA node 0                      NUMA node 1
//! ├ host bridge 0000:00            └ host bridge 0000:80
//! │ └ switch                         └ GPU 4
//! │   ├ GPU 0   ┐ PIX
//! │   ├ GPU 1   ┘      ┐ PXB
//! │   └ switch ─ GPU 2 ┘           GPU 0 to 3: NODE
//! └ host bridge 0000:40 ─ GPU 3    GPU 0 to 4: SYS
//! ```

use std::fmt;

use qudata_host::pci::PciAddress;
use serde::{Deserialize, Serialize};

use crate::topology::{PciDevice, Topology};

/// A distance; the smaller the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Distance {
    /// The same device.
    #[serde(rename = "self")]
    Same,
    /// Under one bridge or one switch.
    Pix,
    /// Through several bridges or switches, below one root port.
    Pxb,
    /// Through one host bridge.
    Phb,
    /// Through two host bridges of one NUMA node.
    Node,
    /// Through the link between NUMA nodes, or nobody knows.
    Sys,
}

impl Distance {
    /// All of them, best first.
    pub const ALL: [Self; 6] = [Self::Same, Self::Pix, Self::Pxb, Self::Phb, Self::Node, Self::Sys];

    /// The letters.
    #[must_use]
    pub fn letters(self) -> &'static str {
        match self {
            Self::Same => "X",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        }
    }

    /// What the letters mean, for a legend.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Same => "the same device",
            Self::Pix => "through one PCIe bridge or switch at most",
            Self::Pxb => "through several PCIe bridges or switches, but no host bridge",
            Self::Phb => "through a PCIe host bridge, which is the CPU",
            Self::Node => "between PCIe host bridges of one NUMA node",
            Self::Sys => "between NUMA nodes, over the link of the sockets",
        }
    }

    /// Its weight in a sum: how good a set is as a whole.
    #[must_use]
    pub fn cost(self) -> u32 {
        match self {
            Self::Same => 0,
            Self::Pix => 1,
            Self::Pxb => 2,
            Self::Phb => 3,
            Self::Node => 4,
            Self::Sys => 5,
        }
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.letters())
    }
}

/// How far `a` and `b` are apart. Of a device that is not there nothing is known, which is as bad as can be.
#[must_use]
pub fn distance(topology: &Topology, a: PciAddress, b: PciAddress) -> Distance {
    if a == b {
        return Distance::Same;
    }
    let (Some(a), Some(b)) = (topology.devices.get(&a), topology.devices.get(&b)) else {
        return Distance::Sys;
    };
    if let Some(below_root_port) = below_one_root_port(a, b) {
        return below_root_port;
    }
    if HostBridge::of(a) == HostBridge::of(b) {
        return Distance::Phb;
    }
    match (a.numa_node, b.numa_node) {
        (Some(one), Some(other)) if one == other => Distance::Node,
        // No device has a node: the kernel says so on machines that have only one.
        (None, None) if topology.devices.values().all(|device| device.numa_node.is_none()) => Distance::Node,
        _ => Distance::Sys,
    }
}

/// The distance of two devices with a bridge in common. A switch is a bridge upwards and one for each device downwards,
/// so below the last common bridge there is at most one of each when only one switch lies between them.
fn below_one_root_port(a: &PciDevice, b: &PciDevice) -> Option<Distance> {
    let common = a.upstream.iter().zip(&b.upstream).take_while(|(a, b)| a == b).count();
    let most = a.upstream.len().max(b.upstream.len()).saturating_sub(common);
    (common > 0).then_some(if most <= 1 { Distance::Pix } else { Distance::Pxb })
}

/// A host bridge by its root bus, which is the bus of the topmost device below it.
#[derive(PartialEq, Eq)]
struct HostBridge(String);

impl HostBridge {
    fn of(device: &PciDevice) -> Self {
        let top = device.upstream.first().unwrap_or(&device.address).to_string();
        Self(top.rsplit_once(':').map_or(top.as_str(), |(bus, _)| bus).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use qudata_testkit::pci::{Device, FakeHost};

    use super::*;
    use crate::topology::observe;

    fn at(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    /// The machine of the drawing above, and two functions of one card.
    fn host(nodes: [i32; 3]) -> Topology {
        let gpu = |address: &str, bridge: &str, node| Device::gpu(address).under(bridge).numa(node);
        let host = FakeHost::with([
            Device::bridge("0000:00:01.0", 1),
            Device::bridge("0000:01:00.0", 2).under("0000:00:01.0"),
            Device::bridge("0000:02:00.0", 3).under("0000:01:00.0"),
            gpu("0000:03:00.0", "0000:02:00.0", nodes[0]),
            Device::audio("0000:03:00.1").under("0000:02:00.0").numa(nodes[0]),
            Device::bridge("0000:02:01.0", 4).under("0000:01:00.0"),
            gpu("0000:04:00.0", "0000:02:01.0", nodes[0]),
            Device::bridge("0000:02:02.0", 5).under("0000:01:00.0"),
            Device::bridge("0000:05:00.0", 6).under("0000:02:02.0"),
            Device::bridge("0000:06:00.0", 7).under("0000:05:00.0"),
            gpu("0000:07:00.0", "0000:06:00.0", nodes[0]),
            Device::bridge("0000:00:02.0", 8),
            gpu("0000:08:00.0", "0000:00:02.0", nodes[0]),
            Device::bridge("0000:40:01.0", 0x41),
            gpu("0000:41:00.0", "0000:40:01.0", nodes[1]),
            Device::bridge("0000:80:01.0", 0x81),
            gpu("0000:81:00.0", "0000:80:01.0", nodes[2]),
            Device::gpu("0000:80:02.0").numa(nodes[2]),
        ]);
        observe(host.unwrap().root()).unwrap()
    }

    const PAIRS: [(&str, &str, Distance); 8] = [
        ("0000:03:00.0", "0000:03:00.0", Distance::Same),
        ("0000:03:00.0", "0000:03:00.1", Distance::Pix),
        ("0000:03:00.0", "0000:04:00.0", Distance::Pix),
        ("0000:03:00.0", "0000:07:00.0", Distance::Pxb),
        ("0000:03:00.0", "0000:08:00.0", Distance::Phb),
        ("0000:80:02.0", "0000:81:00.0", Distance::Phb),
        ("0000:03:00.0", "0000:41:00.0", Distance::Node),
        ("0000:03:00.0", "0000:81:00.0", Distance::Sys),
    ];

    #[test]
    fn every_letter() {
        let topology = host([0, 0, 1]);
        for (a, b, expected) in PAIRS {
            assert_eq!(distance(&topology, at(a), at(b)), expected, "{a} {b}");
            assert_eq!(distance(&topology, at(b), at(a)), expected, "{b} {a}");
        }
        assert_eq!(distance(&topology, at("0000:03:00.0"), at("0000:99:00.0")), Distance::Sys);
    }

    #[test]
    fn a_machine_without_nodes_has_one_and_an_unknown_node_is_another() {
        let distance = |nodes| distance(&host(nodes), at("0000:03:00.0"), at("0000:81:00.0"));
        assert_eq!(distance([-1, -1, -1]), Distance::Node);
        assert_eq!(distance([-1, 0, -1]), Distance::Sys);
        assert_eq!(distance([0, 0, -1]), Distance::Sys);
    }

    /// Not only the pairs above: there and back is the same way, and nothing else is as near as a device to itself.
    #[test]
    fn there_and_back_is_the_same_way() {
        let topology = host([0, 0, 1]);
        for a in topology.devices.keys() {
            for b in topology.devices.keys() {
                assert_eq!(distance(&topology, *a, *b), distance(&topology, *b, *a), "{a} {b}");
                assert_eq!(distance(&topology, *a, *b) == Distance::Same, a == b, "{a} {b}");
            }
        }
    }

    #[test]
    fn order_and_words() {
        assert!(Distance::ALL.is_sorted() && Distance::ALL.is_sorted_by_key(|distance| distance.cost()));
        assert_eq!(format!("{:>5}", Distance::Pix), "  PIX");
        assert_eq!(
            serde_json::to_string(&Distance::ALL).unwrap(),
            r#"["self","pix","pxb","phb","node","sys"]"#
        );
    }
}
