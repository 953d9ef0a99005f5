//! An IPv4 network in prefix notation, as owners write allow-lists. Parsed here so that no text reaches nft.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// `address/prefix` without host bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

/// A text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is no IPv4 network: write address/prefix with no bit set behind the prefix, for example 10.1.0.0/16"
)]
pub struct ParseCidrError {
    /// What was given, cut to 40 characters.
    pub value: String,
}

impl Cidr {
    pub(super) const fn new(address: [u8; 4], prefix: u8) -> Self {
        let [a, b, c, d] = address;
        Self { address: Ipv4Addr::new(a, b, c, d), prefix }
    }
}

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, ParseCidrError> {
        parse(text).ok_or_else(|| ParseCidrError { value: text.chars().take(40).collect() })
    }
}

fn parse(text: &str) -> Option<Cidr> {
    let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
    let address: Ipv4Addr = address.parse().ok()?;
    if !prefix.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let prefix: u8 = prefix.parse().ok().filter(|&prefix| prefix <= 32)?;
    let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
    (address.to_bits() & host_bits == 0).then_some(Cidr { address, prefix })
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn networks_as_people_write_them() {
        for (text, printed) in
            [("10.1.0.0/16", "10.1.0.0/16"), ("192.0.2.7", "192.0.2.7/32"), ("0.0.0.0/0", "0.0.0.0/0")]
        {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), printed);
        }
        for text in
            ["", "10.1.2.3/16", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/0", "10.0.0.0/8 }", "10.0.0.0/"]
        {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_is_nothing_but_digits_and_separators(text in "[0-9./; \\n{}]{0,24}") {
            if let Ok(network) = text.parse::<Cidr>() {
                prop_assert!(network.to_string().chars().all(|c| c.is_ascii_digit() || c == '.' || c == '/'));
                prop_assert_eq!(network.to_string().parse::<Cidr>().unwrap(), network);
            }
        }
    }
}
