//! The speed of the memory, from the firmware's tables (SMBIOS 3, type 17 "Memory Device"). Part of `facts`.
//!
//! A structure is a head (type, length of the formatted part, handle), the formatted part, and strings up to two NUL
//! bytes. Firmware is known to get all of it wrong, so nothing is believed further than the bytes reach.

use std::path::Path;

use super::read_bytes;

/// The table itself; only root can read it.
const TABLE: &str = "sys/firmware/dmi/tables/DMI";
/// Real tables have some ten KiB.
const MOST: u64 = 1 << 20;

const MEMORY_DEVICE: u8 = 17;
const END_OF_TABLE: u8 = 127;
/// Offsets in a memory device, and how a speed looks that is elsewhere.
const SIZE: usize = 0x0c;
const SPEED: usize = 0x15;
const CONFIGURED_SPEED: usize = 0x20;
const EXTENDED_SPEED: usize = 0x54;
const EXTENDED_CONFIGURED_SPEED: usize = 0x58;
const IN_EXTENDED: u16 = 0xffff;
/// Faster memory than any there is.
const FASTEST: u32 = 100_000;

/// MT/s that the memory runs at; none where the firmware does not tell.
pub(super) fn observe(root: &Path) -> Option<u32> {
    parse(&read_bytes(&root.join(TABLE), MOST).ok()?)
}

/// The slowest of all modules, because they all run at the speed of that one.
fn parse(table: &[u8]) -> Option<u32> {
    Structures { rest: table }
        .filter(|formatted| formatted.first() == Some(&MEMORY_DEVICE))
        .filter(|formatted| word(formatted, SIZE).is_some_and(|size| size != 0))
        .filter_map(|device| {
            speed(device, CONFIGURED_SPEED, EXTENDED_CONFIGURED_SPEED)
                .or_else(|| speed(device, SPEED, EXTENDED_SPEED))
        })
        .min()
}

fn speed(device: &[u8], at: usize, extended: usize) -> Option<u32> {
    let speed = match word(device, at)? {
        IN_EXTENDED => double_word(device, extended)?,
        speed => u32::from(speed),
    };
    (1..=FASTEST).contains(&speed).then_some(speed)
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at.checked_add(2)?)?.try_into().ok().map(u16::from_le_bytes)
}

fn double_word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

/// The formatted parts of all structures, up to where the table makes no sense any more.
struct Structures<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Structures<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(*self.rest.get(1)?);
        // Shorter than its own head: nothing behind it can be believed.
        if length < 4 || self.rest.first() == Some(&END_OF_TABLE) {
            return None;
        }
        let formatted = self.rest.get(..length)?;
        let strings = self.rest.get(length..)?;
        let end = strings.windows(2).position(|pair| pair == [0, 0]).map(|at| at.saturating_add(2));
        self.rest = end.and_then(|end| strings.get(end..)).unwrap_or_default();
        Some(formatted)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn structure(kind: u8, length: u8, fields: &[(usize, &[u8])], strings: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(length)];
        bytes[0] = kind;
        bytes[1] = length;
        for (at, value) in fields {
            bytes[*at..at + value.len()].copy_from_slice(value);
        }
        bytes.extend(strings);
        bytes.extend([0, 0]);
        bytes
    }

    fn module(size: u16, speed: u16, configured: u16) -> Vec<u8> {
        let fields: [(usize, &[u8]); 3] = [
            (SIZE, &size.to_le_bytes()),
            (SPEED, &speed.to_le_bytes()),
            (CONFIGURED_SPEED, &configured.to_le_bytes()),
        ];
        structure(MEMORY_DEVICE, 0x54, &fields, b"DIMM A1\0Maker")
    }

    #[test]
    fn the_slowest_module_that_is_there_counts() {
        let bios = structure(0, 24, &[], b"Vendor\0Version");
        let table = [bios.clone(), module(0x7fff, 3200, 2933), module(0, 4800, 0), module(16384, 3200, 2666)]
            .concat();
        assert_eq!(parse(&table), Some(2666), "the empty socket does not count");
        let old = structure(MEMORY_DEVICE, 0x1c, &[(SIZE, &[0, 8]), (SPEED, &1333_u16.to_le_bytes())], b"");
        assert_eq!(parse(&[bios.clone(), old].concat()), Some(1333), "before configured speeds");
        assert_eq!(parse(&[bios, module(1024, 0, 0)].concat()), None);
    }

    #[test]
    fn fast_memory_is_told_elsewhere() {
        let device = |configured: u32| {
            let fields: [(usize, &[u8]); 3] = [
                (SIZE, &[1, 0]),
                (CONFIGURED_SPEED, &[0xff, 0xff]),
                (EXTENDED_CONFIGURED_SPEED, &configured.to_le_bytes()),
            ];
            structure(MEMORY_DEVICE, 0x5c, &fields, b"x")
        };
        assert_eq!(parse(&device(70_000)), Some(70_000));
        assert_eq!(parse(&device(u32::MAX)), None);
        let cut = structure(MEMORY_DEVICE, 0x54, &[(SIZE, &[1, 0]), (CONFIGURED_SPEED, &[0xff, 0xff])], b"");
        assert_eq!(parse(&cut), None, "an extended speed that is not there");
    }

    #[test]
    fn a_table_that_makes_no_sense_ends_where_it_does_so() {
        let good = module(1024, 2400, 2400);
        for bad in [&[17][..], &[17, 0], &[17, 3, 0, 0], &[17, 200, 1, 2], &[0; 64]] {
            assert_eq!(parse(bad), None, "{bad:?}");
            assert_eq!(parse(&[good.as_slice(), bad].concat()), Some(2400), "{bad:?}");
        }
        assert_eq!(parse(&[&[17, 3, 0, 0, 0], good.as_slice()].concat()), None);
        let end = structure(END_OF_TABLE, 4, &[], b"");
        assert_eq!(parse(&[end, good.clone()].concat()), None);
        let unfinished = good.get(..good.len() - 1).unwrap();
        assert_eq!(parse(unfinished), Some(2400));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let speed = parse(&bytes);
            prop_assert!(speed.is_none_or(|speed| (1..=FASTEST).contains(&speed)));
        }

        #[test]
        fn a_module_is_found_behind_other_structures(kinds in proptest::collection::vec((0_u8..17, 4_u8..80), 0..20)) {
            let mut table: Vec<u8> = kinds.iter().flat_map(|(kind, length)| structure(*kind, *length, &[], b"s")).collect();
            table.extend(module(1024, 5600, 5200));
            prop_assert_eq!(parse(&table), Some(5200));
        }
    }
}
