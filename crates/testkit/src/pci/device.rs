//! What a PCI function of a fake host looks like: its description and the files that follow from it. Called by
//! [`super::FakeHost`].

/// One PCI function, as a value: `Device::gpu("0000:01:00.0").under("0000:00:01.0").group(7)`.
#[derive(Debug, Clone)]
pub struct Device {
    /// domain:bus:device.function, as the kernel writes it.
    pub address: String,
    /// Class code, 24 bits.
    pub class: u32,
    /// Vendor and device id.
    pub ids: (u16, u16),
    /// The bridge above; none = on a root bus.
    pub parent: Option<String>,
    /// The bus below, for a bridge.
    pub secondary_bus: Option<u8>,
    /// IOMMU group.
    pub group: Option<u32>,
    /// NUMA node, -1 = the kernel does not know.
    pub numa_node: i32,
    /// Link; none = a device without one.
    pub link: Option<FakeLink>,
    /// BARs.
    pub bars: Vec<FakeBar>,
    /// Content of `reset_method`; empty = the kernel cannot reset it and shows no `reset`.
    pub reset_methods: String,
    /// The driver it starts with.
    pub driver: Option<String>,
    /// Drivers whose id table has it, the kernel's favourite first: what a probe without an override gives it to.
    pub native_drivers: Vec<String>,
    /// Content of `boot_vga`; none = no such file.
    pub boot_vga: Option<bool>,
    /// The physical function, for a virtual one.
    pub physical_function: Option<String>,
}

/// A link, as the kernel words it.
#[derive(Debug, Clone)]
pub struct FakeLink {
    /// `current_link_speed`, for example `2.5 GT/s PCIe`.
    pub speed: String,
    /// `current_link_width`.
    pub width: u32,
    /// `max_link_speed`.
    pub max_speed: String,
    /// `max_link_width`.
    pub max_width: u32,
}

/// A BAR. A 64-bit one takes two indexes.
#[derive(Debug, Clone, Copy)]
pub struct FakeBar {
    /// 0 to 5.
    pub index: usize,
    /// Bytes.
    pub size: u64,
    /// As in the third column of `resource`.
    pub flags: u64,
}

impl FakeBar {
    /// 64-bit, prefetchable memory.
    pub const PREFETCH_64: u64 = 0x0014_220c;
    /// 32-bit memory.
    pub const MEMORY_32: u64 = 0x0004_0200;
    /// I/O ports.
    pub const PORTS: u64 = 0x0004_0101;

    /// Where it is. Natural alignment is all that matters of a place.
    fn start(&self) -> u64 {
        self.size.max(0x1000) * 4
    }
}

impl FakeLink {
    /// Speed code and width as the link registers have them.
    fn register(speed: &str, width: u32) -> u32 {
        let codes = ["2.5 ", "5.0 ", "8.0 ", "16.0 ", "32.0 ", "64.0 "];
        let code =
            codes.iter().zip(1..).find(|(text, _)| speed.starts_with(*text)).map_or(0, |(_, code)| code);
        (width << 4) | code
    }
}

impl Device {
    /// A function of class 0000 without anything.
    #[must_use]
    pub fn new(address: &str) -> Self {
        Self {
            address: address.into(),
            class: 0,
            ids: (0x1af4, 0x1000),
            parent: None,
            secondary_bus: None,
            group: None,
            numa_node: -1,
            link: None,
            bars: Vec::new(),
            reset_methods: String::new(),
            driver: None,
            native_drivers: Vec::new(),
            boot_vga: None,
            physical_function: None,
        }
    }

    /// A data-centre GPU: 3D controller of NVIDIA's, PCIe 4 x16, three BARs, reset by FLR or bus, bound to `nvidia`.
    #[must_use]
    pub fn gpu(address: &str) -> Self {
        let mut gpu = Self::new(address)
            .class(0x03_0200)
            .ids(0x10de, 0x20b5)
            .link("16.0 GT/s PCIe", 16)
            .bar(0, 16 << 20, FakeBar::MEMORY_32)
            .bar(1, 128 << 30, FakeBar::PREFETCH_64)
            .bar(3, 32 << 20, FakeBar::PREFETCH_64)
            .reset("flr bus")
            .driver("nvidia");
        gpu.native_drivers = vec!["nvidia".into()];
        gpu
    }

    /// The audio function of a graphics card, bound to `snd_hda_intel`.
    #[must_use]
    pub fn audio(address: &str) -> Self {
        let audio = Self::new(address).class(0x04_0300).ids(0x10de, 0x228b).link("16.0 GT/s PCIe", 16);
        audio.bar(0, 16 << 10, FakeBar::MEMORY_32).driver("snd_hda_intel")
    }

    /// A PCI bridge (root port, or port of a switch) with `secondary_bus` below it.
    #[must_use]
    pub fn bridge(address: &str, secondary_bus: u8) -> Self {
        let mut bridge = Self::new(address).class(0x06_0400).ids(0x8086, 0x347a).link("16.0 GT/s PCIe", 16);
        bridge.secondary_bus = Some(secondary_bus);
        bridge.driver("pcieport")
    }

    /// Sets the class code.
    #[must_use]
    pub fn class(mut self, class: u32) -> Self {
        self.class = class;
        self
    }

    /// Sets vendor and device id.
    #[must_use]
    pub fn ids(mut self, vendor: u16, device: u16) -> Self {
        self.ids = (vendor, device);
        self
    }

    /// Puts it below a bridge.
    #[must_use]
    pub fn under(mut self, bridge: &str) -> Self {
        self.parent = Some(bridge.into());
        self
    }

    /// Sets the IOMMU group.
    #[must_use]
    pub fn group(mut self, group: u32) -> Self {
        self.group = Some(group);
        self
    }

    /// Sets the NUMA node.
    #[must_use]
    pub fn numa(mut self, node: i32) -> Self {
        self.numa_node = node;
        self
    }

    /// Sets a link that runs at its best.
    #[must_use]
    pub fn link(mut self, speed: &str, width: u32) -> Self {
        self.link = Some(FakeLink { speed: speed.into(), width, max_speed: speed.into(), max_width: width });
        self
    }

    /// Adds a BAR.
    #[must_use]
    pub fn bar(mut self, index: usize, size: u64, flags: u64) -> Self {
        self.bars.push(FakeBar { index, size, flags });
        self
    }

    /// Sets `reset_method`; empty = no reset.
    #[must_use]
    pub fn reset(mut self, methods: &str) -> Self {
        self.reset_methods = methods.into();
        self
    }

    /// Sets the driver it starts with, which the id table of that driver has too.
    #[must_use]
    pub fn driver(mut self, driver: &str) -> Self {
        self.driver = Some(driver.into());
        self.native_drivers = vec![driver.into()];
        self
    }

    /// Starts without a driver; a probe still finds those in `native_drivers`.
    #[must_use]
    pub fn unbound(mut self) -> Self {
        self.driver = None;
        self
    }

    /// Says whether the firmware's console is on it.
    #[must_use]
    pub fn boot_vga(mut self, on: bool) -> Self {
        self.boot_vga = Some(on);
        self
    }

    /// Makes it a virtual function of `physical`.
    #[must_use]
    pub fn virtual_of(mut self, physical: &str) -> Self {
        self.physical_function = Some(physical.into());
        self
    }

    /// The plain files of its directory.
    pub(super) fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        let (vendor, device) = self.ids;
        let class = self.class;
        let mut files = vec![
            ("class", format!("0x{class:06x}\n")),
            ("vendor", format!("0x{vendor:04x}\n")),
            ("device", format!("0x{device:04x}\n")),
            ("subsystem_vendor", format!("0x{vendor:04x}\n")),
            ("subsystem_device", format!("0x{device:04x}\n")),
            ("revision", "0xa1\n".into()),
            ("numa_node", format!("{}\n", self.numa_node)),
            ("resource", self.resource()),
            ("driver_override", "(null)\n".into()),
            ("uevent", format!("PCI_CLASS={class:X}\nPCI_ID={vendor:04X}:{device:04X}\n")),
            ("enable", "1\n".into()),
            ("power_state", "D0\n".into()),
            ("remove", String::new()),
            ("rescan", String::new()),
        ];
        if let Some(link) = &self.link {
            files.push(("current_link_speed", format!("{}\n", link.speed)));
            files.push(("current_link_width", format!("{}\n", link.width)));
            files.push(("max_link_speed", format!("{}\n", link.max_speed)));
            files.push(("max_link_width", format!("{}\n", link.max_width)));
        }
        if !self.reset_methods.is_empty() {
            files.push(("reset", String::new()));
            files.push(("reset_method", format!("{}\n", self.reset_methods)));
        }
        if let Some(boot) = self.boot_vga {
            files.push(("boot_vga", format!("{}\n", u8::from(boot))));
        }
        if self.secondary_bus.is_some() {
            files.push(("reset_subordinate", String::new()));
        }
        let mut files: Vec<_> = files.into_iter().map(|(name, text)| (name, text.into_bytes())).collect();
        files.push(("config", self.config()));
        files
    }

    fn resource(&self) -> String {
        let line = |index| {
            let bar = self.bars.iter().find(|bar| bar.index == index);
            let (start, end, flags) = bar.map_or((0, 0, 0), |bar| {
                let start = bar.start();
                (start, start + bar.size - 1, bar.flags)
            });
            format!("0x{start:016x} 0x{end:016x} 0x{flags:016x}\n")
        };
        // Six BARs, the ROM, and six for virtual functions, as a kernel with SR-IOV lists them.
        (0..13).map(line).collect()
    }

    /// Configuration space: the header, and a PCI Express capability where there is a link.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; if self.link.is_some() { 4096 } else { 256 }];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0x00, &self.ids.0.to_le_bytes());
        put(0x02, &self.ids.1.to_le_bytes());
        put(0x04, &0x0006_u16.to_le_bytes());
        put(0x08, &((self.class << 8) | 0xa1).to_le_bytes());
        if let Some(bus) = self.secondary_bus {
            put(0x0e, &[1]);
            put(0x19, &[bus, bus]);
        }
        for bar in &self.bars {
            // The low bits of the flags are the register's own.
            let start = bar.start();
            let low =
                u32::try_from(start & 0xffff_fff0).unwrap_or(0) | u32::try_from(bar.flags & 0xf).unwrap_or(0);
            put(0x10 + 4 * bar.index, &low.to_le_bytes());
            if bar.flags & 0x4 != 0 {
                put(0x14 + 4 * bar.index, &u32::try_from(start >> 32).unwrap_or(0).to_le_bytes());
            }
        }
        if let Some(link) = &self.link {
            put(0x06, &0x0010_u16.to_le_bytes());
            put(0x34, &[0x40]);
            put(0x4c, &FakeLink::register(&link.max_speed, link.max_width).to_le_bytes());
            put(0x52, &u16::try_from(FakeLink::register(&link.speed, link.width)).unwrap_or(0).to_le_bytes());
            let flr =
                if self.reset_methods.split(' ').any(|method| method == "flr") { 1_u32 << 28 } else { 0 };
            put(0x40, &[0x10, 0, 0x02, 0]);
            put(0x44, &flr.to_le_bytes());
        }
        config
    }
}
