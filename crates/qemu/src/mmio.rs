//! Where the BARs of a machine's GPUs go in the guest's address space. Owns the plan (pure) of the window above RAM and
//! of the address bits that reach it; the agent calls it before a launch, `argv` renders it.
//!
//! ```text
//! 0 … 2 GiB ── low BARs ── 4 GiB ── rest of RAM ──▶ ── window of the GPUs ──▶ end
//!                                                  └ aligned to its size    └ must be within 2^address bits
//! ```
//! Firmware places BARs, by rules of its own. They were read in its source and seen with OVMF 2022.11 and 2025.02,
//! SeaBIOS 1.16.2 and 1.16.3:
//! - An OVMF whose window is short loses **every** BAR, not the last one. So each port is counted with the power of two
//!   that OVMF reserves for it; such blocks fill a window without gaps.
//! - OVMF takes the larger of what it is told (`X-PciMmio64Mb`, at most 16 TiB) and an eighth or a quarter of the address
//!   space, the latter at its top. The plan holds for both.
//! - SeaBIOS since 1.16.3 takes whole eighths of the address space, at its top. Where they reach into RAM, or where no RAM
//!   is above 4 GiB, it aligns wrongly or puts BARs, the disk's among them, beyond the last address.
//! - QEMU refuses to start when RAM and `pci-hole64-size` do not fit the address bits. On AMD processors it moves RAM
//!   above 1 TiB when they would reach the HyperTransport range.
//! - Older OVMF maps the whole address space in small pages: with 46 bits it needs 256 MiB and four times as long to
//!   start as with 41. So the guest gets as few bits as hold everything.

use qudata_host::size::ByteSize;

use crate::{firmware::Firmware, passthrough::PassthroughSlot};

const GIB: u64 = 1 << 30;
/// RAM that QEMU leaves below 4 GiB at least.
const LOW_RAM: u64 = 2 * GIB;
const RAM_ABOVE: u64 = 4 * GIB;
/// What firmware has for BARs below 4 GiB: 960 MiB in the tightest layout in use, less what the other devices take.
const LOW_SPACE: ByteSize = ByteSize::from_mib(896);
/// For the small BARs of all other devices; a window is whole GiB anyway.
const OTHERS: u64 = GIB;
/// The largest window OVMF may be told.
const LARGEST_WINDOW: ByteSize = ByteSize::from_gib(16 << 10);
/// Addresses that AMD processors keep for HyperTransport: a BAR there cannot be reached by another GPU.
const HYPER_TRANSPORT: u64 = 1012 * GIB;
const HYPER_TRANSPORT_END: u64 = 1024 * GIB;
/// Firmware believes 41 bits and more, and doubts fewer: 40 is what QEMU claims when it knows nothing.
const FEWEST_BITS: u32 = 41;
/// OVMF uses no more, because older Linux guests fail above.
const MOST_BITS: u32 = 46;
/// SeaBIOS uses no more for most guests, for the same reason.
const SEABIOS_BITS: u32 = 44;
/// With less, QEMU puts all RAM below 4 GiB.
const RAM_WITH_HIGH_PART: ByteSize = ByteSize::from_mib(2816);
/// What OVMF uses of a processor without pages of 1 GiB.
const BITS_WITHOUT_LARGE_PAGES: u32 = 40;

/// How many address bits a guest can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressWidth(u32);

/// `/proc/cpuinfo` does not tell the width of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("/proc/cpuinfo does not tell how many physical address bits the processor has (\"address sizes\")")]
pub struct AddressWidthError;

impl AddressWidth {
    /// For emulated processors: as many as firmware can use.
    pub const EMULATED: Self = Self(MOST_BITS);

    /// Under KVM, from the text of `/proc/cpuinfo`: what the host's processor has and firmware can use of it.
    ///
    /// # Errors
    /// When the text does not say.
    pub fn of_host(cpuinfo: &str) -> Result<Self, AddressWidthError> {
        let field = |name: &str| {
            let value = cpuinfo.lines().find_map(|line| line.strip_prefix(name));
            value.and_then(|rest| rest.trim_start().strip_prefix(':'))
        };
        let sizes = field("address sizes").ok_or(AddressWidthError)?;
        let bits = sizes.split_whitespace().next().and_then(|word| word.parse::<u32>().ok());
        let bits = bits.filter(|bits| (32..=64).contains(bits)).ok_or(AddressWidthError)?;
        let large_pages = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "pdpe1gb"));
        Ok(Self(bits.min(if large_pages { MOST_BITS } else { BITS_WITHOUT_LARGE_PAGES })))
    }

    /// The number.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// The address space that a machine's GPUs get. Made by [`plan_mmio`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioPlan {
    hole: ByteSize,
    ovmf_window: Option<ByteSize>,
    bits: u32,
}

impl MmioPlan {
    /// `pci-hole64-size` of the host bridge.
    #[must_use]
    pub const fn hole(self) -> ByteSize {
        self.hole
    }

    /// What OVMF is told, in whole MiB; other firmware finds its window itself.
    #[must_use]
    pub const fn ovmf_window(self) -> Option<ByteSize> {
        self.ovmf_window
    }

    /// Physical address bits of the guest's processors.
    #[must_use]
    pub const fn address_bits(self) -> u32 {
        self.bits
    }
}

/// The GPUs do not fit the guest's address space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanMmioError {
    /// Too many BARs that must be below 4 GiB.
    #[error(
        "the {gpus} GPUs need {needed} of addresses below 4 GiB and a guest has {LOW_SPACE} there: put fewer GPUs into one \
         instance"
    )]
    Low {
        /// How many GPUs were asked for.
        gpus: usize,
        /// What they need together.
        needed: ByteSize,
    },
    /// A window beyond what UEFI firmware can be told.
    #[error(
        "the memory windows of the {gpus} GPUs take {needed} of addresses and UEFI firmware can be given {LARGEST_WINDOW}: \
         put fewer GPUs into one instance"
    )]
    Window {
        /// How many GPUs were asked for.
        gpus: usize,
        /// What they need together.
        needed: ByteSize,
    },
    /// So little RAM that SeaBIOS places large BARs wrongly.
    #[error(
        "a guest with {ram} of RAM cannot place the memory windows of the GPUs without UEFI: give the instance at least \
         {RAM_WITH_HIGH_PART}, or set the firmware to uefi"
    )]
    SmallRam {
        /// The guest's RAM.
        ram: ByteSize,
    },
    /// Not enough address bits.
    #[error(
        "RAM of {ram} and memory windows of {needed} for the {gpus} GPUs take {needed_bits} address bits and a guest on this \
         host has {bits}: put fewer GPUs or less RAM into one instance"
    )]
    High {
        /// How many GPUs were asked for.
        gpus: usize,
        /// What they need together.
        needed: ByteSize,
        /// The guest's RAM.
        ram: ByteSize,
        /// The bits that everything would take.
        needed_bits: u32,
        /// The bits there are.
        bits: u32,
    },
}

/// Finds room for the BARs of `slots` above `ram`. `None` when there is nothing to place.
///
/// # Errors
/// What does not fit, and what to do about it.
pub fn plan_mmio(
    slots: &[PassthroughSlot],
    ram: ByteSize,
    width: AddressWidth,
    firmware: &Firmware,
) -> Result<Option<MmioPlan>, PlanMmioError> {
    let gpus = slots.len();
    if gpus == 0 {
        return Ok(None);
    }
    let low =
        slots.iter().map(PassthroughSlot::low_window).fold(ByteSize::default(), ByteSize::saturating_add);
    if low > LOW_SPACE {
        return Err(PlanMmioError::Low { gpus, needed: low });
    }
    let demand = Demand::of(slots, ram);
    match firmware {
        Firmware::Uefi { .. } => demand.with_ovmf(width),
        Firmware::Bios | Firmware::Direct { .. } => {
            let all_low = demand.sum(0).saturating_add(low.bytes()) <= LOW_SPACE.bytes();
            if ram < RAM_WITH_HIGH_PART && !all_low {
                return Err(PlanMmioError::SmallRam { ram });
            }
            demand.with_seabios(width)
        }
    }
    .map(Some)
}

/// What has to be placed above RAM.
struct Demand {
    /// One power of two for each port; zero where nothing is high.
    ports: Vec<u64>,
    ram: ByteSize,
    /// `pci-hole64-size`: the ports and the other devices.
    hole: u64,
    ram_end: u64,
}

impl Demand {
    fn of(slots: &[PassthroughSlot], ram: ByteSize) -> Self {
        let ports: Vec<u64> = slots.iter().map(|slot| slot.high_window().bytes()).collect();
        let sum = ports.iter().fold(0_u64, |sum, port| sum.saturating_add(*port));
        let hole = whole_gib(sum.saturating_add(OTHERS));
        Self { ports, ram, hole, ram_end: ram_end(ram, hole) }
    }

    /// The ports together, each of them at least this large.
    fn sum(&self, least: u64) -> u64 {
        self.ports.iter().fold(0, |sum, port| sum.saturating_add(least.max(*port)))
    }

    fn with_ovmf(&self, width: AddressWidth) -> Result<MmioPlan, PlanMmioError> {
        let mut window = self.hole;
        let base = window_base(self.ram_end, window);
        if base < HYPER_TRANSPORT_END && base.saturating_add(window) > HYPER_TRANSPORT {
            // A window as large as everything below it begins there.
            window = HYPER_TRANSPORT_END;
        }
        if window > LARGEST_WINDOW.bytes() {
            let needed = ByteSize::from_bytes(self.hole);
            return Err(PlanMmioError::Window { gpus: self.ports.len(), needed });
        }
        let needed = bits_below(window_base(self.ram_end, window).saturating_add(window));
        self.plan(needed, width, Some(ByteSize::from_bytes(window)))
    }

    fn with_seabios(&self, width: AddressWidth) -> Result<MmioPlan, PlanMmioError> {
        let width = AddressWidth(width.bits().min(SEABIOS_BITS));
        let needed = (FEWEST_BITS.min(width.bits())..u64::BITS).find(|bits| self.fits_seabios(*bits));
        self.plan(needed.unwrap_or(u64::BITS), width, None)
    }

    /// Whether whole eighths of this address space, at its top, hold the ports above RAM.
    fn fits_seabios(&self, bits: u32) -> bool {
        let end = 1_u64 << bits;
        let eighth = end >> 3;
        // Ports get more than they ask for when the space is large.
        let sum = self.sum(end >> 11).saturating_add(OTHERS);
        let Some(size) = sum.checked_next_multiple_of(eighth) else { return false };
        let Some(mut base) = end.checked_sub(size) else { return false };
        if base < HYPER_TRANSPORT_END && end > HYPER_TRANSPORT {
            // It steps back once from what is reserved, and does not look what is there.
            match base.checked_sub(size) {
                Some(lower) if lower.saturating_add(size) <= HYPER_TRANSPORT => base = lower,
                _ => return false,
            }
        }
        self.ram_end < base && self.ports.iter().all(|port| *port <= eighth)
    }

    fn plan(
        &self,
        needed_bits: u32,
        width: AddressWidth,
        ovmf_window: Option<ByteSize>,
    ) -> Result<MmioPlan, PlanMmioError> {
        let (hole, bits) = (ByteSize::from_bytes(self.hole), width.bits());
        if needed_bits > bits {
            let gpus = self.ports.len();
            return Err(PlanMmioError::High { gpus, needed: hole, ram: self.ram, needed_bits, bits });
        }
        Ok(MmioPlan { hole, ovmf_window, bits: needed_bits.max(FEWEST_BITS).min(bits) })
    }
}

/// The end of RAM as QEMU lays it out, rounded up to whole GiB. Which processor the guest has does not matter: the end is
/// the one on AMD's, which is never below the other.
fn ram_end(ram: ByteSize, hole: u64) -> u64 {
    let above = whole_gib(ram.bytes().saturating_sub(LOW_RAM));
    let plain = RAM_ABOVE.saturating_add(above);
    if plain.saturating_add(hole) > HYPER_TRANSPORT {
        return HYPER_TRANSPORT_END.saturating_add(above);
    }
    plain
}

/// Where OVMF puts a window that it is told: above RAM, aligned to the largest power of two within.
fn window_base(ram_end: u64, window: u64) -> u64 {
    let alignment = 1_u64 << window.max(1).ilog2();
    ram_end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
}

fn whole_gib(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(GIB).unwrap_or(u64::MAX)
}

/// Bits that reach every address below `end`.
fn bits_below(end: u64) -> u32 {
    u64::BITS - end.saturating_sub(1).leading_zeros()
}

#[cfg(test)]
mod tests;
