//! PCI addresses as the kernel writes them. Owns their form; used for GPU leases and, from there, for passthrough.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// domain:bus:device.function, for example `0000:65:00.0`. The domain may be left out when parsing (0 is meant).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a PCI address: write domain:bus:device.function, for example 0000:65:00.0")]
pub struct ParsePciAddressError {
    /// What was given, cut to 40 characters.
    pub value: String,
}

impl FromStr for PciAddress {
    type Err = ParsePciAddressError;

    fn from_str(text: &str) -> Result<Self, ParsePciAddressError> {
        parse(text).ok_or_else(|| ParsePciAddressError { value: text.chars().take(40).collect() })
    }
}

fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_hexdigit());
    (plain && digits.contains(&text.len())).then(|| u32::from_str_radix(text, 16).ok())?
}

fn parse(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.split_once(':').unwrap_or(("0000", rest));
    let function = u8::try_from(hex(function, 1..=1)?).ok().filter(|f| *f < 8)?;
    let device = u8::try_from(hex(device, 2..=2)?).ok().filter(|d| *d < 32)?;
    let bus = u8::try_from(hex(bus, 2..=2)?).ok()?;
    // VMD bridges use 5-digit domains, hence up to 8.
    Some(PciAddress { domain: hex(domain, 4..=8)?, bus, device, function })
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_and_long_forms() {
        let long: PciAddress = "0000:65:00.0".parse().unwrap();
        assert_eq!("65:00.0".parse::<PciAddress>().unwrap(), long);
        assert_eq!("10000:e1:1f.7".parse::<PciAddress>().unwrap().to_string(), "10000:e1:1f.7");
        for bad in
            ["", "0", "65:00", "65:20.0", "65:00.8", "zz:00.0", "0000:65:00.0 ", "+000:65:00.0", "1:65:00.0"]
        {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_round_trips(text in ".{0,20}") {
            if let Ok(a) = text.parse::<PciAddress>() {
                prop_assert_eq!(a.to_string().parse::<PciAddress>().unwrap(), a);
            }
        }
    }
}
