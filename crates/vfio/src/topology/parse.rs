//! The forms in which sysfs writes numbers, links and BARs. Pure; called by `observe`. Formats: the kernel's
//! `Documentation/ABI/testing/sysfs-bus-pci` and `drivers/pci/pci-sysfs.c`.

use std::path::{Component, Path};

use qudata_host::pci::PciAddress;

use super::{Bar, Link};

/// `IORESOURCE_MEM`: memory, not ports.
const MEMORY: u64 = 0x200;
/// `IORESOURCE_PREFETCH`.
const PREFETCH: u64 = 0x2000;
/// `IORESOURCE_MEM_64`.
const MEMORY_64: u64 = 0x10_0000;

/// `0x030200`.
pub(super) fn hex(text: &str) -> Option<u64> {
    let digits = text.trim().strip_prefix("0x")?;
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// `16.0 GT/s PCIe` is 16000 MT/s. `Unknown` is nothing.
pub(super) fn speed(text: &str) -> Option<u32> {
    let (number, unit) = text.trim().split_once(' ')?;
    if !unit.starts_with("GT/s") {
        return None;
    }
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let digit =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u32>().ok())?;
    if tenths.len() != 1 {
        return None;
    }
    digit(whole)?.checked_mul(1000)?.checked_add(digit(tenths)?.checked_mul(100)?)
}

/// The four files of a link. A function inside the root complex has them too, with nothing in them: it has no link.
/// A device that is asleep or gone tells its best, but not what it runs at: that is speed 0.
pub(super) fn link(speed_now: &str, width_now: &str, speed_most: &str, width_most: &str) -> Option<Link> {
    let max_speed = speed(speed_most)?;
    let max_width = width_most.trim().parse().ok().filter(|width| *width > 0)?;
    Some(Link {
        speed: speed(speed_now).unwrap_or(0),
        width: width_now.trim().parse().unwrap_or(0),
        max_speed,
        max_width,
    })
}

/// `-1` is nothing.
pub(super) fn numa_node(text: &str) -> Option<u32> {
    text.trim().parse().ok()
}

/// Memory BARs of `resource`: lines of `start end flags`, of which the first six are BARs. None for a text of another
/// form; a BAR that is not in use is all zeros, one the kernel found no room for starts at 0 and still has a size.
pub(super) fn bars(text: &str) -> Option<Vec<Bar>> {
    let mut bars = Vec::new();
    for (index, line) in (0_u8..6).zip(text.lines()) {
        let mut columns = line.split_ascii_whitespace().map(hex);
        let (start, end, flags) = (columns.next()??, columns.next()??, columns.next()??);
        if flags & MEMORY == 0 {
            continue;
        }
        let size = end.checked_sub(start)?.checked_add(1)?;
        let (is_64bit, prefetchable) = (flags & MEMORY_64 != 0, flags & PREFETCH != 0);
        bars.push(Bar { index, size, is_64bit, prefetchable });
    }
    Some(bars)
}

/// `flr bus`, best first.
pub(super) fn reset_methods(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// The bridges above a device, from where its link in `bus/pci/devices` points to:
/// `../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0`. A domain behind a controller (Intel's VMD) has its own root
/// further down, and the bridges count from that one.
pub(super) fn upstream(target: &Path, own: PciAddress) -> Vec<PciAddress> {
    let mut chain = Vec::new();
    for component in target.components() {
        let Component::Normal(name) = component else { continue };
        let Some(name) = name.to_str() else { continue };
        if name.starts_with("pci") {
            chain.clear();
        } else if let Ok(address) = name.parse::<PciAddress>()
            && address != own
        {
            chain.push(address);
        }
    }
    chain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn speeds() {
        for (text, expected) in [
            ("2.5 GT/s PCIe", Some(2500)),
            ("8.0 GT/s PCIe\n", Some(8000)),
            ("8 GT/s", Some(8000)),
            ("64.0 GT/s PCIe", Some(64000)),
            ("66 MHz PCI", None),
            ("Unknown", None),
            ("Unknown speed", None),
            ("", None),
            ("-1.0 GT/s PCIe", None),
            ("8.05 GT/s PCIe", None),
            ("99999999.0 GT/s PCIe", None),
        ] {
            assert_eq!(speed(text), expected, "{text}");
        }
    }

    #[test]
    fn a_link_without_a_best_is_none_and_one_asleep_is_slow() {
        assert_eq!(link("Unknown", "0", "Unknown", "0"), None);
        assert_eq!(link("2.5 GT/s PCIe", "1", "Unknown", "255"), None);
        let asleep = Link { speed: 0, width: 63, max_speed: 16000, max_width: 16 };
        assert_eq!(link("Unknown", "63", "16.0 GT/s PCIe", "16"), Some(asleep));
    }

    #[test]
    fn bars_of_a_big_gpu() {
        let text = "0x00000000a0000000 0x00000000a0ffffff 0x0000000000040200\n\
                    0x0000206000000000 0x0000207fffffffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000208000000000 0x0000208001ffffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000003000 0x000000000000307f 0x0000000000040101\n\
                    0x00000000a1000000 0x00000000a107ffff 0x0000000000046200\n";
        let bar = |index, size, wide| Bar { index, size, is_64bit: wide, prefetchable: wide };
        assert_eq!(
            bars(text).unwrap(),
            [bar(0, 16 << 20, false), bar(1, 128 << 30, true), bar(3, 32 << 20, true)],
            "neither ports nor the ROM"
        );
        assert_eq!(bars("0x0 0x0"), None);
        assert_eq!(bars("0x2000 0x1000 0x200"), None, "ends before it starts");
        assert_eq!(bars("0x0 0xffffffffffffffff 0x200"), None, "larger than can be counted");
    }

    #[test]
    fn bridges_come_from_the_last_root() {
        let own: PciAddress = "10000:02:00.0".parse().unwrap();
        let path = "../../../devices/pci0000:00/0000:00:0e.0/pci10000:00/10000:00:02.0/10000:02:00.0";
        assert_eq!(upstream(Path::new(path), own), ["10000:00:02.0".parse().unwrap()]);
        let on_the_root = Path::new("../../../devices/pci0000:00/0000:00:02.0");
        assert_eq!(upstream(on_the_root, "0000:00:02.0".parse().unwrap()), []);
    }

    fn hex64() -> impl Strategy<Value = String> {
        any::<u64>().prop_map(|n| format!("0x{n:016x}"))
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,80}", other in "[0-9a-fx \\n.GTs/PCIe-]{0,120}") {
            for text in [&text, &other] {
                let _ = (hex(text), speed(text), numa_node(text), bars(text), reset_methods(text));
                let _ = link(text, text, text, text);
                let _ = upstream(Path::new(text.as_str()), "0000:00:00.0".parse().unwrap());
            }
        }

        #[test]
        fn lines_of_any_numbers_do_not_either(lines in proptest::collection::vec((hex64(), hex64(), hex64()), 0..20)) {
            let text: String = lines.iter().map(|(a, b, c)| format!("{a} {b} {c}\n")).collect();
            if let Some(bars) = bars(&text) {
                prop_assert!(bars.len() <= 6);
                prop_assert!(bars.iter().all(|bar| bar.index < 6));
            }
        }

        #[test]
        fn what_the_kernel_writes_is_read_back(n in 0..=0xffff_ffff_u64, tenths in 0_u32..100_000, node in -1_i32..64) {
            prop_assert_eq!(hex(&format!("0x{n:06x}\n")), Some(n));
            let text = format!("{}.{} GT/s PCIe\n", tenths / 10, tenths % 10);
            prop_assert_eq!(speed(&text), Some(tenths * 100));
            prop_assert_eq!(numa_node(&format!("{node}\n")), u32::try_from(node).ok());
        }

        #[test]
        fn a_bar_has_the_size_it_has(power in 4_u32..44, place in 0_u64..1 << 16, index in 0_usize..6) {
            let size = 1_u64 << power;
            let start = place * size;
            let line = |i| if i == index {
                format!("0x{start:016x} 0x{:016x} 0x000000000014220c\n", start + size - 1)
            } else {
                format!("0x{:016x} 0x{:016x} 0x{:016x}\n", 0, 0, 0)
            };
            let text: String = (0..13).map(line).collect();
            let bar = Bar { index: u8::try_from(index).unwrap(), size, is_64bit: true, prefetchable: true };
            prop_assert_eq!(bars(&text), Some(vec![bar]));
        }
    }
}
