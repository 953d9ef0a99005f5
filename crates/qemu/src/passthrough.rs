//! The GPUs of one machine, as plain values: which functions sit in which slot and how much address space each wants.
//! Owns their shape; `mmio` finds the space, `argv` renders the slots. The agent fills them in from what the host has.

use std::fmt;

use qudata_host::{pci::PciAddress, size::ByteSize};

use crate::{qmp::VersionNumber, version::KernelVersion};

/// Functions a PCI slot can hold.
const MOST_FUNCTIONS: usize = 8;
/// Larger BARs exist in no GPU; the bound keeps sums of BARs far from overflow.
const LARGEST_BAR: u64 = 16 << 40;
/// A bridge forwards address space in units of this.
const BRIDGE_UNIT: u64 = 1 << 20;
/// What firmware reserves below 4 GiB behind a port that asks for nothing.
const DEFAULT_LOW: u64 = 2 << 20;

/// Below this a BAR is mapped fast enough by any kernel and any QEMU.
const LARGE_BAR: u64 = 16 << 30;
/// The first Linux that maps a BAR in huge pages.
const HUGE_BAR_KERNEL: KernelVersion = KernelVersion { major: 6, minor: 12 };
/// The first QEMU that aligns its mappings of BARs so that the kernel can do so.
const HUGE_BAR_QEMU: VersionNumber = VersionNumber { major: 9, minor: 2, micro: 0 };
/// What is reported for software older than that: this many seconds for this many GiB.
const SLOW: (u64, u64) = (30, 128);

/// A memory BAR of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBar {
    /// Its size, a power of two.
    pub size: ByteSize,
    /// May be placed above 4 GiB.
    pub is_64bit: bool,
    /// May be prefetched.
    pub prefetchable: bool,
}

/// One function of the host that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassthroughFunction {
    /// Where the host has it. It is bound to `vfio-pci` before the machine starts.
    pub address: PciAddress,
    /// Its memory BARs.
    pub bars: Vec<MemoryBar>,
}

/// One GPU: a PCI Express slot of the guest with all functions that travel together. The first becomes function 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassthroughSlot {
    functions: Vec<PassthroughFunction>,
    no_mmap: bool,
}

/// Functions that make no slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PassthroughSlotError {
    /// None, or more than a slot holds.
    #[error("a GPU has 1 to {MOST_FUNCTIONS} functions, not {count}")]
    Count {
        /// How many there are.
        count: usize,
    },
    /// A BAR of a size that hardware cannot have.
    #[error(
        "GPU function {address} has a BAR of {size}; a BAR is a power of two up to {}",
        ByteSize::from_bytes(LARGEST_BAR)
    )]
    BarSize {
        /// The function.
        address: PciAddress,
        /// What was read.
        size: ByteSize,
    },
}

impl PassthroughSlot {
    /// A slot with these functions, function 0 first. With `no_mmap` the guest's access to BARs goes through QEMU: slow,
    /// and no direct transfers between GPUs, but fast to start on a host for which [`warn_of_slow_bars`] warns.
    ///
    /// # Errors
    /// When these cannot be the functions of one slot.
    pub fn new(functions: Vec<PassthroughFunction>, no_mmap: bool) -> Result<Self, PassthroughSlotError> {
        let count = functions.len();
        if count == 0 || count > MOST_FUNCTIONS {
            return Err(PassthroughSlotError::Count { count });
        }
        for function in &functions {
            let odd =
                |bar: &&MemoryBar| !bar.size.bytes().is_power_of_two() || bar.size.bytes() > LARGEST_BAR;
            if let Some(bar) = function.bars.iter().find(odd) {
                return Err(PassthroughSlotError::BarSize { address: function.address, size: bar.size });
            }
        }
        Ok(Self { functions, no_mmap })
    }

    /// Its functions, function 0 first.
    #[must_use]
    pub fn functions(&self) -> &[PassthroughFunction] {
        &self.functions
    }

    /// Whether its BARs stay out of the guest's address map.
    #[must_use]
    pub fn no_mmap(&self) -> bool {
        self.no_mmap
    }

    /// What its port reserves for 64-bit prefetchable BARs, zero for none. OVMF rounds a reservation up to a power of two
    /// and aligns it to its size, so a number that is one already is what the guest will see.
    #[must_use]
    pub fn high_window(&self) -> ByteSize {
        rounded(self.sum(|bar| bar.is_high()))
    }

    /// The part of a 32-bit address space that its port takes. A bridge forwards 64-bit addresses only to prefetchable
    /// BARs; every other BAR has to be here.
    #[must_use]
    pub fn low_window(&self) -> ByteSize {
        rounded(self.sum(|bar| !bar.is_high()).max(DEFAULT_LOW))
    }

    /// What has to be asked for below 4 GiB; `None` when the firmware's own choice is enough.
    #[must_use]
    pub fn low_reserve(&self) -> Option<ByteSize> {
        Some(self.low_window()).filter(|window| window.bytes() > DEFAULT_LOW)
    }

    /// Bytes of BARs that old software maps slowly.
    fn large(&self) -> u64 {
        self.sum(|bar| bar.size.bytes() >= LARGE_BAR)
    }

    fn sum(&self, wanted: impl Fn(&MemoryBar) -> bool) -> u64 {
        self.bars().filter(|bar| wanted(bar)).map(|bar| bar.size.bytes()).sum()
    }

    fn bars(&self) -> impl Iterator<Item = &MemoryBar> {
        self.functions.iter().flat_map(|function| &function.bars)
    }
}

impl MemoryBar {
    /// Whether firmware may place it above 4 GiB behind a bridge.
    #[must_use]
    pub fn is_high(&self) -> bool {
        self.is_64bit && self.prefetchable
    }
}

/// A power of two in which BARs of this sum fit, each aligned to its size.
fn rounded(sum: u64) -> ByteSize {
    ByteSize::from_bytes(if sum == 0 { 0 } else { sum.max(BRIDGE_UNIT).next_power_of_two() })
}

/// GPUs that this host's software maps page by page: the guest's firmware stands still meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowBars {
    /// The GPUs concerned, by their function 0.
    pub gpus: Vec<PciAddress>,
    /// About how many seconds longer the start takes.
    pub seconds: u64,
    /// The host's kernel.
    pub kernel: KernelVersion,
    /// The host's QEMU.
    pub qemu: VersionNumber,
}

/// Whether mapping the BARs will be slow: a GPU with a BAR of 16 GiB or more, mapped, on a kernel before 6.12 or with a
/// QEMU before 9.2. Whether to do something about it (`no_mmap`) is for the owner.
#[must_use]
pub fn warn_of_slow_bars(
    slots: &[PassthroughSlot],
    kernel: KernelVersion,
    qemu: VersionNumber,
) -> Option<SlowBars> {
    if kernel >= HUGE_BAR_KERNEL && qemu >= HUGE_BAR_QEMU {
        return None;
    }
    let large = |slot: &&PassthroughSlot| !slot.no_mmap && slot.large() > 0;
    let slow: Vec<&PassthroughSlot> = slots.iter().filter(large).collect();
    let gib = slow.iter().map(|slot| slot.large() >> 30).sum::<u64>();
    let gpus: Vec<PciAddress> =
        slow.iter().filter_map(|slot| slot.functions.first()).map(|function| function.address).collect();
    let (seconds, per_gib) = SLOW;
    let seconds = gib.saturating_mul(seconds).div_ceil(per_gib);
    (!gpus.is_empty()).then_some(SlowBars { gpus, seconds, kernel, qemu })
}

impl fmt::Display for SlowBars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus: Vec<String> = self.gpus.iter().map(PciAddress::to_string).collect();
        write!(
            f,
            "the start will take about {} s longer: the memory of GPU {} is mapped page by page by Linux {} with QEMU {}; \
             update to Linux {HUGE_BAR_KERNEL} and QEMU {HUGE_BAR_QEMU} or newer, or leave that memory unmapped (slower, \
             no direct transfers between GPUs)",
            self.seconds,
            gpus.join(", "),
            self.kernel,
            self.qemu,
        )
    }
}

#[cfg(test)]
mod tests;
