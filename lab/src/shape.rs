//! The lab's server as data: what hardware a scenario asks for, and the QEMU arguments that make it. Pure.
//!
//! ```text
//! pcie.0 ── 00:10.0 root port ── slot 0        node n: pxb-pcie, bus 0x40·(n+1)
//!        ── 00:11.0 root port ── slot 1                 └── 40:00.0 root port ── slot n
//! ```
//! Only a root of its own tells the server which node its slots are near; pcie.0 is near none.
//!
//! Each slot hangs on a root port with an address of its own, so the driver finds a slot's devices in the server's sysfs
//! without knowing what bus numbers the firmware gave out.

/// A server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct L1 {
    /// Processors.
    /// More than one only where the scenario is about them: see [`crate::machine`] for what emulation does to those.
    pub(crate) cpus: u32,
    /// RAM, shared evenly among the NUMA nodes.
    pub(crate) ram_mib: u32,
    /// NUMA nodes, each with CPUs, RAM and a PCI root of its own.
    pub(crate) numa_nodes: u32,
    /// Whether the IOMMU remaps interrupts; without, no device may be given to a guest.
    pub(crate) interrupt_remapping: bool,
    /// Whether there is an IOMMU: switched off in the firmware, it is not to be seen.
    pub(crate) iommu: bool,
    /// How it starts, and from what.
    pub(crate) boot: Boot,
    /// What is plugged in.
    pub(crate) slots: Vec<Slot>,
    /// More words for the kernel's command line.
    pub(crate) kernel_args: Vec<&'static str>,
}

/// How a server starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// The lab's server, with everything that the agent needs: its kernel is handed to QEMU.
    Direct,
    /// A server before the product is installed: UEFI, its own GRUB, its own command line.
    Fresh,
}

/// A slot and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    /// What scenarios call it.
    pub(crate) name: &'static str,
    /// NUMA node of its PCI root; none: pcie.0.
    pub(crate) node: Option<u32>,
    /// How its devices are connected.
    pub(crate) wiring: Wiring,
    /// Its devices, function 0 first.
    pub(crate) devices: Vec<Device>,
}

/// How the devices of a slot are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wiring {
    /// Functions of one device on the root port: one IOMMU group, one card.
    Functions,
    /// Cards behind a bridge without isolation: one IOMMU group, several cards.
    SharedBridge,
}

/// A stand-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// A display controller (class 0380) with a real DRM driver, `bochs-drm`. Reset: bus.
    Display,
    /// A VGA controller (class 0300), driver `virtio-pci`. Reset: flr.
    Vga,
    /// An audio controller (class 0403), driver `snd_hda_intel`. No reset of its own.
    Audio,
    /// A card whose driver `radeon` hangs; the image does not load it by itself.
    Hanging,
    /// A foreign device: a random number generator, driver `virtio-pci`.
    Foreign,
}

impl Device {
    fn qemu(self) -> &'static str {
        match self {
            Self::Display => "bochs-display",
            Self::Vga => "virtio-vga",
            Self::Audio => "ich9-intel-hda",
            Self::Hanging => "ati-vga,model=rv100",
            Self::Foreign => "virtio-rng-pci",
        }
    }
}

impl Slot {
    fn new(name: &'static str, devices: &[Device]) -> Self {
        Self { name, node: None, wiring: Wiring::Functions, devices: devices.to_vec() }
    }
}

/// Names of the slots of [`L1::gpus`].
pub(crate) mod slot {
    pub(crate) const A: &str = "a";
    pub(crate) const B: &str = "b";
    pub(crate) const TWO_FUNCTIONS: &str = "two functions";
    pub(crate) const SHARED: &str = "shared group";
}

impl L1 {
    /// No GPU at all.
    pub(crate) fn plain() -> Self {
        Self {
            cpus: 1,
            ram_mib: 5120,
            numa_nodes: 1,
            interrupt_remapping: true,
            iommu: true,
            boot: Boot::Direct,
            slots: Vec::new(),
            kernel_args: Vec::new(),
        }
    }

    /// Two GPUs with a host driver, one of two functions, and one that shares its group with a foreign device.
    pub(crate) fn gpus() -> Self {
        let shared = Slot {
            wiring: Wiring::SharedBridge,
            ..Slot::new(slot::SHARED, &[Device::Display, Device::Foreign])
        };
        let slots = vec![
            Slot::new(slot::A, &[Device::Display]),
            Slot::new(slot::B, &[Device::Display]),
            Slot::new(slot::TWO_FUNCTIONS, &[Device::Vga, Device::Audio]),
            shared,
        ];
        Self { slots, ..Self::plain() }
    }

    /// The same without interrupt remapping.
    pub(crate) fn without_interrupt_remapping() -> Self {
        Self { interrupt_remapping: false, ..Self::gpus() }
    }

    /// A GPU that hangs its driver, and a healthy one.
    pub(crate) fn hanging() -> Self {
        let slots = vec![Slot::new(slot::A, &[Device::Hanging]), Slot::new(slot::B, &[Device::Display])];
        // The driver that hangs holds the kernel's list of framebuffers: the healthy GPU must not have one. And it spins
        // while it hangs: that takes a processor.
        Self { cpus: 2, slots, kernel_args: vec!["modprobe.blacklist=bochs"], ..Self::plain() }
    }

    /// A server before the product is installed, with two GPUs.
    pub(crate) fn fresh() -> Self {
        let slots = vec![Slot::new(slot::A, &[Device::Display]), Slot::new(slot::B, &[Device::Display])];
        Self { boot: Boot::Fresh, slots, ..Self::plain() }
    }

    /// The same without a GPU.
    pub(crate) fn fresh_without_gpu() -> Self {
        Self { slots: Vec::new(), ..Self::fresh() }
    }

    /// The same with the IOMMU switched off in the firmware.
    pub(crate) fn fresh_without_iommu() -> Self {
        Self { iommu: false, ..Self::fresh() }
    }

    /// The same with its only GPU in a group with a foreign device.
    pub(crate) fn fresh_shared_group() -> Self {
        let shared = Slot {
            wiring: Wiring::SharedBridge,
            ..Slot::new(slot::SHARED, &[Device::Display, Device::Foreign])
        };
        Self { slots: vec![shared], ..Self::fresh() }
    }

    /// Two sockets with a GPU each.
    pub(crate) fn two_nodes() -> Self {
        let on = |node, name| Slot { node: Some(node), ..Slot::new(name, &[Device::Display]) };
        Self { cpus: 2, numa_nodes: 2, slots: vec![on(0, slot::A), on(1, slot::B)], ..Self::plain() }
    }

    /// Address of the root port of a slot.
    pub(crate) fn port_of(&self, name: &str) -> Option<String> {
        let index = self.slots.iter().position(|slot| slot.name == name)?;
        let slot = self.slots.get(index)?;
        Some(match slot.node {
            None => format!("0000:00:{:02x}.0", FIRST_PORT + index),
            Some(node) => format!("0000:{:02x}:{index:02x}.0", first_bus(node)),
        })
    }

    /// The kernel's command line.
    pub(crate) fn command_line(&self) -> String {
        let mut words = vec!["root=LABEL=root rw console=ttyS0 quiet intel_iommu=on iommu=pt"];
        // On a busy machine the emulated timer is late, and the kernel takes that for a broken one and panics.
        words.push("no_timer_check");
        words.extend(&self.kernel_args);
        words.join(" ")
    }

    /// Arguments for processors, memory, IOMMU and slots.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut words = vec!["-M".to_owned(), "q35".to_owned(), "-nodefaults".to_owned()];
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        add("-smp", self.cpus.to_string());
        // SVM in emulation is what nested KVM runs on.
        add("-cpu", "max,+svm".to_owned());
        add("-m", format!("{}M", self.ram_mib));
        if self.iommu {
            let remapping = if self.interrupt_remapping { "on" } else { "off" };
            add("-device", format!("intel-iommu,intremap={remapping},caching-mode=on"));
        }
        if self.numa_nodes > 1 {
            for node in 0..self.numa_nodes {
                let size = self.ram_mib / self.numa_nodes;
                add("-object", format!("memory-backend-ram,id=ram{node},size={size}M"));
                let share = self.cpus / self.numa_nodes;
                let (first, last) = (node * share, (node + 1) * share - 1);
                add("-numa", format!("node,nodeid={node},memdev=ram{node},cpus={first}-{last}"));
            }
            for node in 0..self.numa_nodes {
                let bus = first_bus(node);
                add("-device", format!("pxb-pcie,id=root{node},bus=pcie.0,bus_nr={bus},numa_node={node}"));
            }
        }
        for (index, slot) in self.slots.iter().enumerate() {
            slot_arguments(index, slot, &mut add);
        }
        words
    }
}

/// Number on pcie.0 of the first root port, above what QEMU hands out by itself.
const FIRST_PORT: usize = 0x10;
/// Bus numbers of each further PCI root.
const PXB_BUSES: u32 = 0x40;

/// First bus number of the PCI root of a node.
fn first_bus(node: u32) -> u32 {
    (node + 1) * PXB_BUSES
}

fn slot_arguments(index: usize, slot: &Slot, add: &mut impl FnMut(&str, String)) {
    let (bus, number) = match slot.node {
        None => ("pcie.0".to_owned(), FIRST_PORT + index),
        Some(node) => (format!("root{node}"), index),
    };
    let (port, chassis) = (format!("port{index}"), index + 1);
    add(
        "-device",
        format!("pcie-root-port,id={port},bus={bus},addr={number:#x},chassis={chassis},slot={chassis}"),
    );
    match slot.wiring {
        Wiring::Functions => {
            let several = if slot.devices.len() > 1 { ",multifunction=on" } else { "" };
            for (function, device) in slot.devices.iter().enumerate() {
                add("-device", format!("{},bus={port},addr=0.{function}{several}", device.qemu()));
            }
        }
        Wiring::SharedBridge => {
            add("-device", format!("pcie-pci-bridge,id=bridge{index},bus={port}"));
            for (number, device) in (1..).zip(&slot.devices) {
                add("-device", format!("{},bus=bridge{index},addr={number:#x}", device.qemu()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(shape: &L1) -> Vec<String> {
        let words = shape.arguments();
        let of = |pair: &[String]| (pair[0] == "-device").then(|| pair[1].clone());
        words.windows(2).filter_map(of).collect()
    }

    #[test]
    fn slots_become_ports_with_devices() {
        let shown = devices(&L1::gpus());
        for line in [
            "intel-iommu,intremap=on,caching-mode=on",
            "pcie-root-port,id=port0,bus=pcie.0,addr=0x10,chassis=1,slot=1",
            "bochs-display,bus=port0,addr=0.0",
            "virtio-vga,bus=port2,addr=0.0,multifunction=on",
            "ich9-intel-hda,bus=port2,addr=0.1,multifunction=on",
            "pcie-pci-bridge,id=bridge3,bus=port3",
            "virtio-rng-pci,bus=bridge3,addr=0x2",
        ] {
            assert!(shown.iter().any(|device| device == line), "{line} is not in {shown:#?}");
        }
        assert!(devices(&L1::without_interrupt_remapping())[0].contains("intremap=off"));
    }

    #[test]
    fn a_far_slot_hangs_on_the_root_of_its_node() {
        let shape = L1::two_nodes();
        let shown = devices(&shape).join("\n");
        assert!(shown.contains("pxb-pcie,id=root1,bus=pcie.0,bus_nr=128,numa_node=1"), "{shown}");
        assert!(shown.contains("id=port1,bus=root1,addr=0x1,"), "{shown}");
        assert_eq!(shape.port_of(slot::A).as_deref(), Some("0000:40:00.0"));
        assert_eq!(shape.port_of(slot::B).as_deref(), Some("0000:80:01.0"));
        assert_eq!(shape.port_of("none"), None);
    }
}
