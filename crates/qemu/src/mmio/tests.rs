//! The plan against models of the firmware and of QEMU, written from their rules and not from the plan.

use proptest::prelude::*;
use qudata_host::pci::PciAddress;

use super::*;
use crate::passthrough::{MemoryBar, PassthroughFunction};

const TIB: u64 = 1024 * GIB;

fn uefi() -> Firmware {
    Firmware::Uefi { code: "/code".into(), vars: "/vars".into() }
}

fn address() -> PciAddress {
    "0000:65:00.0".parse().unwrap()
}

fn high(sizes: &[u64]) -> PassthroughSlot {
    let bar =
        |size: &u64| MemoryBar { size: ByteSize::from_bytes(*size), is_64bit: true, prefetchable: true };
    let function = PassthroughFunction { address: address(), bars: sizes.iter().map(bar).collect() };
    PassthroughSlot::new(vec![function], false).unwrap()
}

fn low(size: u64) -> PassthroughSlot {
    let bar = MemoryBar { size: ByteSize::from_bytes(size), is_64bit: false, prefetchable: false };
    let function = PassthroughFunction { address: address(), bars: vec![bar] };
    PassthroughSlot::new(vec![function], false).unwrap()
}

fn gib(n: u64) -> ByteSize {
    ByteSize::from_gib(n)
}

/// Cards as they are sold, by their 64-bit prefetchable BARs.
fn card(memory: u64) -> PassthroughSlot {
    high(&[16 << 20, memory * GIB, 32 << 20])
}

#[test]
fn without_gpus_there_is_nothing_to_plan() {
    assert_eq!(plan_mmio(&[], gib(64), AddressWidth::EMULATED, &uefi()), Ok(None));
}

#[test]
fn as_few_bits_as_hold_everything() {
    for (cards, memory, ram, window, bits) in [
        (1, 128, 64, 257, 41),
        // Aligned to 512G it would reach the addresses of HyperTransport.
        (2, 128, 64, 1024, 41),
        (8, 128, 512, 2049, 43),
        (8, 256, 2048, 4097, 44),
        (1, 32, 64, 65, 41),
        (8, 32, 1500, 513, 42),
    ] {
        let slots = vec![card(memory); cards];
        let plan = plan_mmio(&slots, gib(ram), AddressWidth::EMULATED, &uefi()).unwrap().unwrap();
        let found = (plan.ovmf_window().unwrap().gib(), plan.address_bits());
        assert_eq!(found, (window, bits), "{cards} cards of {memory}G, RAM {ram}G");
        let other = plan_mmio(&slots, gib(ram), AddressWidth::EMULATED, &Firmware::Bios).unwrap().unwrap();
        assert_eq!((other.ovmf_window(), other.hole()), (None, plan.hole()));
        assert!((41..=44).contains(&other.address_bits()), "{other:?}");
    }
}

// The table of what was measured: one BAR of 128 GiB fits 40 bits, two as well when OVMF is told, four do not.
#[test]
fn forty_bits_hold_two_large_bars_and_not_four() {
    let bits = AddressWidth(40);
    let plan = |count| plan_mmio(&vec![high(&[128 * GIB]); count], gib(4), bits, &uefi());
    for count in [1, 2] {
        assert_eq!(plan(count).unwrap().unwrap().address_bits(), 40);
    }
    let error = plan(4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "RAM of 4G and memory windows of 513G for the 4 GPUs take 41 address bits and a guest on this host has 40: put \
         fewer GPUs or less RAM into one instance"
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let width = AddressWidth::EMULATED;
    let error = plan_mmio(&vec![low(256 << 20); 4], gib(4), width, &uefi()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the 4 GPUs need 1G of addresses below 4 GiB and a guest has 896M there: put fewer GPUs into one instance"
    );
    let error = plan_mmio(&[high(&[16 * TIB])], gib(4), width, &uefi()).unwrap_err();
    assert!(matches!(error, PlanMmioError::Window { gpus: 1, .. }), "{error}");
    let error = plan_mmio(&[high(&[8 * TIB])], gib(4), width, &Firmware::Bios).unwrap_err();
    assert!(matches!(error, PlanMmioError::High { needed_bits: 46, bits: 44, .. }), "{error}");
}

// SeaBIOS 1.16.3 was seen to put the disk's BAR beyond the last address.
#[test]
fn bios_needs_ram_above_four_gib_for_large_bars() {
    let plan = |slot: PassthroughSlot, mib| {
        plan_mmio(&[slot], ByteSize::from_mib(mib), AddressWidth::EMULATED, &Firmware::Bios)
    };
    let error = plan(card(32), 2815).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a guest with 2815M of RAM cannot place the memory windows of the GPUs without UEFI: give the instance at least \
         2816M, or set the firmware to uefi"
    );
    assert!(plan(card(32), 2816).is_ok());
    assert!(plan(high(&[256 << 20]), 512).is_ok(), "what fits below 4 GiB is placed there");
    assert!(plan(low(16 << 20), 512).is_ok());
}

/// In 16 TiB of addresses every port gets 8 GiB, which is more than these ask for: two eighths instead of one.
#[test]
fn ports_get_more_than_they_ask_for_when_space_is_large() {
    let slots: Vec<PassthroughSlot> = (0..11).map(|power| high(&[GIB << power])).collect();
    let plan = |ram: u64| plan_mmio(&slots, gib(ram << 10), AddressWidth::EMULATED, &Firmware::Bios);
    assert_eq!(plan(11).unwrap().unwrap().address_bits(), 44);
    assert!(matches!(plan(13), Err(PlanMmioError::High { needed_bits: 45, .. })));
}

#[test]
fn widths_of_processors() {
    let text = |bits: &str, flags: &str| {
        format!(
            "processor\t: 0\nflags\t\t: fpu {flags} vme\naddress sizes\t: {bits} bits physical, 48 bits virtual\n"
        )
    };
    for (bits, flags, width) in [
        ("39", "pdpe1gb", 39),
        ("46", "pdpe1gb", 46),
        ("52", "pdpe1gb", 46),
        ("46", "pdpe", 40),
        ("39", "", 39),
    ] {
        assert_eq!(AddressWidth::of_host(&text(bits, flags)).unwrap().bits(), width, "{bits} {flags}");
    }
    for bad in
        ["", "address sizes\t:", "address sizes: many bits", "address sizes : 7 bits", "xaddress sizes : 46"]
    {
        assert_eq!(AddressWidth::of_host(bad), Err(AddressWidthError), "{bad}");
    }
    let this = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(AddressWidth::of_host(&this).unwrap().bits() >= 36);
}

/// Where QEMU ends RAM, and whether it starts at all: its `pc_max_used_gpa` and the AMD rule.
fn qemu_ram_end(ram: u64, hole: u64, bits: u32, amd: bool) -> Option<u64> {
    let below = if ram >= 0xb000_0000 { 0x8000_0000 } else { ram };
    let round = |end: u64| end.div_ceil(GIB) * GIB;
    let mut start = 4 * GIB;
    if amd && round(start + ram - below) + hole > 0xfd_0000_0000 {
        start = TIB;
    }
    let end = start + ram - below;
    (round(end) + hole <= 1 << bits).then_some(end)
}

/// The window of an OVMF that takes `1/share` of the address space by itself, or of one that does not (`None`).
fn ovmf_window(told: u64, ram_end: u64, bits: u32, share: Option<u32>) -> (u64, u64) {
    assert!(told.is_multiple_of(GIB) && told <= 16 * TIB, "OVMF ignores {told:#x}");
    let alignment = if told.is_power_of_two() { told } else { told.next_power_of_two() / 2 };
    let base = ram_end.div_ceil(GIB) * GIB;
    let base = base.div_ceil(alignment) * alignment;
    if let Some(shift) = share {
        let own = (1_u64 << bits) >> shift;
        if told < own && base + own < 1 << bits {
            return ((1 << bits) - own, own);
        }
    }
    (base, told)
}

/// A SeaBIOS of three generations.
#[derive(Debug, Clone, Copy, PartialEq)]
enum SeaBios {
    /// Up to 1.16.2: right above RAM.
    Classic,
    /// 1.16.3: at the end, and ports forget the alignment of what is behind them.
    V1_16_3,
    /// 1.17 and newer.
    V1_17,
}

/// Where SeaBIOS puts each port: its address, size and the size of the largest BAR behind it.
fn seabios(
    version: SeaBios,
    slots: &[PassthroughSlot],
    ram_end: u64,
    bits: u32,
    amd: bool,
) -> Vec<(u64, u64, u64)> {
    let round = |n: u64, to: u64| n.div_ceil(to) * to;
    let top = 1_u64 << bits.min(if version == SeaBios::V1_17 { 44 } else { 46 });
    let padded = version != SeaBios::Classic && ram_end > 4 * GIB;
    let mut ports: Vec<(u64, u64, u64)> = Vec::new();
    for slot in slots {
        let bars = slot.functions().iter().flat_map(|f| &f.bars).map(|bar| bar.size.bytes());
        let (largest, sum) = bars.fold((0, 0), |(largest, sum), bar| (bar.max(largest), sum + bar));
        let align = match version {
            SeaBios::V1_16_3 if padded => top >> 11,
            SeaBios::V1_17 if padded => largest.max(top >> 11).max(1 << 20),
            _ => largest.max(1 << 20),
        };
        let sum = sum.max(align);
        ports.push((align, round(slot.high_window().bytes().max(sum), align), largest));
    }
    ports.sort_unstable_by_key(|port| std::cmp::Reverse((port.0, port.1)));
    let sum: u64 = ports.iter().map(|(_, size, _)| size).sum();
    let mut base = ram_end;
    if version != SeaBios::Classic {
        // The other devices have some kilobytes more.
        let mut size = round(sum + (80 << 10), GIB);
        if padded {
            size = round(size, top >> 3);
        }
        if base < top - size {
            base = top - size;
        }
        if amd && base < TIB && base + size > HYPER_TRANSPORT {
            base -= size;
        }
    }
    let mut at = round(round(base, ports.first().map_or(1, |port| port.0)), GIB);
    let mut placed = Vec::new();
    for (_, size, largest) in ports {
        placed.push((at, size, largest));
        at += size;
    }
    // And come last.
    placed.push((at, 80 << 10, 0));
    placed
}

/// Puts blocks of powers of two, each aligned to its size, into a window; the end of the last one.
fn fill(base: u64, mut blocks: Vec<u64>) -> u64 {
    blocks.sort_unstable_by(|a, b| b.cmp(a));
    blocks.into_iter().fold(base, |at, block| {
        assert_eq!(at % block, 0, "a gap before {block:#x} at {at:#x}");
        at + block
    })
}

fn slots() -> impl Strategy<Value = Vec<PassthroughSlot>> {
    let bars = prop::collection::vec(12_u32..=40, 1..=4);
    let slot = bars.prop_map(|bits| high(&bits.iter().map(|bits| 1_u64 << bits).collect::<Vec<_>>()));
    prop::collection::vec(slot, 1..=16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_window_holds_every_bar(slots in slots(), ram_mib in 64_u64..=4 << 20, width in 36_u32..=46) {
        let ram = ByteSize::from_mib(ram_mib);
        let Ok(Some(plan)) = plan_mmio(&slots, ram, AddressWidth(width), &uefi()) else { return Ok(()) };
        let bits = plan.address_bits();
        prop_assert!(bits <= width && (bits >= 41 || bits == width));
        // In its port's block, every BAR of a slot is aligned to its size.
        for slot in &slots {
            let bars = slot.functions().iter().flat_map(|f| &f.bars).map(|bar| bar.size.bytes()).collect();
            prop_assert!(fill(0, bars) <= slot.high_window().bytes());
        }
        let blocks: Vec<u64> = slots.iter().map(|slot| slot.high_window().bytes()).collect();
        let told = plan.ovmf_window().unwrap().bytes();
        for amd in [false, true] {
            let ram_end = qemu_ram_end(ram.bytes(), plan.hole().bytes(), bits, amd);
            prop_assert!(ram_end.is_some(), "QEMU does not start: {plan:?}");
            for share in [None, Some(3), Some(2)] {
                let (base, size) = ovmf_window(told, ram_end.unwrap(), bits, share);
                prop_assert!(base >= ram_end.unwrap() && base + size <= 1 << bits, "{base:#x} {size:#x} {plan:?}");
                let end = fill(base, blocks.clone());
                prop_assert!(end + GIB / 2 <= base + size, "room for the others: {end:#x} {plan:?}");
                if amd && bits >= 41 {
                    prop_assert!(end <= HYPER_TRANSPORT || base >= TIB, "{base:#x}..{end:#x} {plan:?}");
                }
            }
        }
    }

    #[test]
    fn seabios_reaches_every_bar(slots in slots(), ram_mib in 2816_u64..=4 << 20, width in 36_u32..=46) {
        let ram = ByteSize::from_mib(ram_mib);
        let Ok(Some(plan)) = plan_mmio(&slots, ram, AddressWidth(width), &Firmware::Bios) else { return Ok(()) };
        let bits = plan.address_bits();
        prop_assert!(bits <= width);
        for (version, amd) in [SeaBios::Classic, SeaBios::V1_16_3, SeaBios::V1_17]
            .into_iter()
            .flat_map(|version| [(version, false), (version, true)])
        {
            let ram_end = qemu_ram_end(ram.bytes(), plan.hole().bytes(), bits, amd);
            prop_assert!(ram_end.is_some(), "QEMU does not start: {plan:?}");
            for (at, size, largest) in seabios(version, &slots, ram_end.unwrap(), bits, amd) {
                let context = format!("{version:?} amd {amd}: {at:#x} {size:#x} {largest:#x} {plan:?}");
                prop_assert!(at >= ram_end.unwrap() && at + size <= 1 << bits, "{context}");
                prop_assert!(largest == 0 || at % largest == 0, "{context}");
            }
        }
    }

    #[test]
    fn more_bits_never_hurt(slots in slots(), ram_gib in 1_u64..=4096, width in 36_u32..=45) {
        let plan = |width| plan_mmio(&slots, gib(ram_gib), AddressWidth(width), &uefi());
        if plan(width).is_ok() {
            prop_assert!(plan(width + 1).is_ok());
        }
    }
}
