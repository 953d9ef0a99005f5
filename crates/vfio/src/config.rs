//! Configuration space of a PCI function as bytes (PCI Local Bus 3.0 §6, PCI Express Base 5.0 §7). Owns the offsets; used
//! by `sysfs`, `bus_reset` and `health`, because only a fresh read of it tells what the device is and not what the
//! kernel remembers.

use crate::topology::Link;

/// The standard header.
pub(crate) const HEADER: usize = 64;
/// Without extended capabilities.
pub(crate) const BASIC: u16 = 256;
/// All of it.
pub(crate) const FULL: u16 = 4096;

/// Command register.
pub(crate) const COMMAND: usize = 0x04;
/// First BAR.
pub(crate) const BAR_0: usize = 0x10;
/// Bridge control register of a bridge.
pub(crate) const BRIDGE_CONTROL: usize = 0x3e;
/// Bit of it: everything below is held in reset.
pub(crate) const SECONDARY_BUS_RESET: u16 = 1 << 6;
/// PCI Express capability.
pub(crate) const CAP_EXPRESS: u8 = 0x10;

/// Bytes read from a `config` file, and where things are in them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config<'a>(pub(crate) &'a [u8]);

impl Config<'_> {
    pub(crate) fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub(crate) fn u16(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.0.get(at..at + 2)?.try_into().ok()?))
    }

    pub(crate) fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.0.get(at..at + 4)?.try_into().ok()?))
    }

    /// Vendor and device id; all ones when too little was read, which is what an absent device shows.
    pub(crate) fn ids(&self) -> (u16, u16) {
        (self.u16(0).unwrap_or(u16::MAX), self.u16(2).unwrap_or(u16::MAX))
    }

    /// Nothing answers. A vendor of ffff is reserved for that.
    pub(crate) fn is_dead(&self) -> bool {
        self.ids().0 == u16::MAX
    }

    /// Where the capability with this id begins.
    pub(crate) fn capability(&self, id: u8) -> Option<usize> {
        let listed = self.u16(0x06)? & 0x10 != 0;
        let mut at = listed.then(|| self.u8(0x34)).flatten()? & 0xfc;
        // 48 fit in 256 bytes; a device that answers garbage must not make this a loop.
        for _ in 0..48 {
            let here = usize::from(at);
            if here < HEADER {
                return None;
            }
            if self.u8(here)? == id {
                return Some(here);
            }
            at = self.u8(here + 1)? & 0xfc;
        }
        None
    }

    /// Where the extended capability with this id begins.
    pub(crate) fn extended(&self, id: u16) -> Option<usize> {
        let mut at = 0x100_usize;
        // 960 fit in 4096 bytes.
        for _ in 0..960 {
            let head = self.u32(at)?;
            if head == 0 || head == u32::MAX {
                return None;
            }
            if head & 0xffff == u32::from(id) {
                return Some(at);
            }
            at = usize::try_from(head >> 20).ok()? & 0xffc;
            if at < 0x100 {
                return None;
            }
        }
        None
    }

    /// The PCI Express link, as the registers show it now.
    pub(crate) fn link(&self) -> Option<Link> {
        let express = self.capability(CAP_EXPRESS)?;
        let (can, is) = (self.u32(express + 0x0c)?, self.u16(express + 0x12)?);
        // Link Capabilities 2 lists all speeds since PCI Express 3; the field in Link Capabilities is the older word.
        let listed = (self.u32(express + 0x2c).unwrap_or(0) >> 1) & 0x7f;
        let best = if listed == 0 { can & 0xf } else { 32 - listed.leading_zeros() };
        let width = |bits: u32| u8::try_from(bits & 0x3f).unwrap_or(0);
        Some(Link {
            speed: mega_transfers(u32::from(is & 0xf)),
            width: width(u32::from(is >> 4)),
            max_speed: mega_transfers(best),
            max_width: width(can >> 4),
        })
    }

    /// The BAR register and whether it is a memory BAR with an address.
    pub(crate) fn bar(&self, index: u8) -> Option<BarRegister> {
        let at = BAR_0 + 4 * usize::from(index);
        let low = self.u32(at)?;
        let is_64bit = low & 0b110 == 0b100;
        let high = if is_64bit { self.u32(at + 4)? } else { 0 };
        Some(BarRegister {
            memory: low & 1 == 0,
            is_64bit,
            prefetchable: low & 0b1000 != 0,
            address: (u64::from(high) << 32) | u64::from(low & !0xf),
        })
    }
}

/// A base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BarRegister {
    /// Memory, not ports.
    pub(crate) memory: bool,
    /// Two registers wide.
    pub(crate) is_64bit: bool,
    /// May be prefetched.
    pub(crate) prefetchable: bool,
    /// Where it is; 0 = nowhere.
    pub(crate) address: u64,
}

/// Speed code of the link registers in MT/s; 0 for a code that is not known.
fn mega_transfers(code: u32) -> u32 {
    match code {
        1 => 2500,
        2 => 5000,
        3 => 8000,
        4 => 16_000,
        5 => 32_000,
        6 => 64_000,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(config: &mut [u8], at: usize, bytes: &[u8]) {
        config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A GPU: PCIe 5 x16 running at PCIe 1 because it is idle.
    fn gpu() -> Vec<u8> {
        let mut config = vec![0; 4096];
        put(&mut config, 0x00, &[0xde, 0x10, 0x30, 0x23, 0x06, 0x04, 0x10, 0x00]);
        put(&mut config, 0x10, &[0, 0, 0, 0xa0, 0x0c, 0, 0, 0, 0, 0x38, 0, 0]);
        put(&mut config, 0x34, &[0x60]);
        put(&mut config, 0x60, &[0x01, 0x78, 0x03, 0x00]);
        put(&mut config, 0x78, &[0x10, 0x00, 0x02, 0x00]);
        put(&mut config, 0x78 + 0x0c, &0x0045_d105_u32.to_le_bytes());
        put(&mut config, 0x78 + 0x12, &0x1101_u16.to_le_bytes());
        put(&mut config, 0x78 + 0x2c, &0x8000_003e_u32.to_le_bytes());
        put(&mut config, 0x100, &0x1340_0001_u32.to_le_bytes());
        put(&mut config, 0x134, &0x0001_0015_u32.to_le_bytes());
        config
    }

    #[test]
    fn a_gpu_is_read() {
        let bytes = gpu();
        let config = Config(&bytes);
        assert_eq!(config.ids(), (0x10de, 0x2330));
        assert!(!config.is_dead());
        assert_eq!(config.capability(CAP_EXPRESS), Some(0x78));
        assert_eq!(config.capability(0x11), None);
        assert_eq!((config.extended(0x15), config.extended(0x0d)), (Some(0x134), None));
        let link = config.link().unwrap();
        assert_eq!((link.speed, link.width, link.max_speed, link.max_width), (2500, 16, 32_000, 16));
        let bar = config.bar(1).unwrap();
        assert!(bar.memory && bar.is_64bit && bar.prefetchable);
        assert_eq!(bar.address, 0x3800_0000_0000);
        assert_eq!(config.bar(0).unwrap().address, 0xa000_0000);
    }

    #[test]
    fn a_device_off_the_bus_is_dead_and_has_nothing() {
        let bytes = vec![0xff; 4096];
        let config = Config(&bytes);
        assert!(config.is_dead() && Config(&[]).is_dead());
        assert!(config.link().is_none() && config.extended(0x15).is_none());
    }

    proptest! {
        #[test]
        fn garbage_ends(bytes in proptest::collection::vec(any::<u8>(), 0..512), id: u8, extended: u16) {
            let config = Config(&bytes);
            config.capability(id);
            config.extended(extended);
            config.link();
            config.bar(5);
        }

        #[test]
        fn loops_end(at in 0u8..64) {
            let mut bytes = vec![0; 4096];
            bytes[0x06] = 0x10;
            bytes[0x34] = 0x40 + at;
            for here in (0x40..0x100).step_by(4) {
                bytes[here + 1] = 0x40 + at;
            }
            prop_assert_eq!(Config(&bytes).capability(0x77), None);
        }
    }
}
