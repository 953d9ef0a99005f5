//! Texts into values, one function a kind. `None` means "not allowed"; what is allowed says the table in `keys`.

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

use secrecy::SecretString;

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl PortRange {
    /// Whether `port` is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// All of them, lowest first.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

/// Digits only: `+8` and ` 8` are no numbers.
pub(super) fn number(text: &str, allowed: std::ops::RangeInclusive<u64>) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok())?.filter(|n| allowed.contains(n))
}

/// Absolute and without `..`, so that it means the same wherever the agent is started.
pub(super) fn path(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let plain = path.is_absolute() && !text.contains('\0');
    (plain && !path.components().any(|c| c == std::path::Component::ParentDir)).then(|| path.to_owned())
}

pub(super) fn ports(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-')?;
    let port = |text| u16::try_from(number(text, 1024..=65535)?).ok();
    let range = PortRange { first: port(first)?, last: port(last)? };
    (range.first <= range.last).then_some(range)
}

/// Items between commas; an empty text has none.
pub(super) fn list<T>(text: &str, item: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    if text.trim().is_empty() {
        return Some(Vec::new());
    }
    text.split(',').map(|part| item(part.trim())).collect()
}

/// `10.0.0.0/8`, `fd00::/8`, or one address.
pub(super) fn network(text: &str) -> Option<String> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
    let bits = match address.parse::<IpAddr>().ok()? {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    match prefix {
        Some(prefix) => number(prefix, 0..=bits).map(|_| text.to_owned()),
        None => Some(text.to_owned()),
    }
}

/// A host name or an IP address, of nothing that means more in a configuration file.
pub(super) fn host(text: &str) -> Option<String> {
    let name = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    let edges = |c: char| c == '-' || c == '.';
    let fine = name && (1..=253).contains(&text.len()) && !text.starts_with(edges) && !text.ends_with(edges);
    (fine || text.parse::<IpAddr>().is_ok()).then(|| text.to_owned())
}

/// A name of a place, as people write it.
pub(super) fn place(text: &str) -> Option<String> {
    let plain = !text.chars().any(char::is_control) && text.trim() == text;
    (plain && text.chars().count() <= 64).then(|| text.to_owned())
}

/// A secret of the tunnel server.
pub(super) fn token(text: &str) -> Option<SecretString> {
    (text.len() <= 512 && qudata_tunnel::check_token(text).is_ok()).then(|| text.into())
}

/// A DNS label.
pub(super) fn label(text: &str) -> Option<String> {
    let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let edges = !text.starts_with('-') && !text.ends_with('-');
    (plain && edges && (1..=32).contains(&text.len())).then(|| text.to_owned())
}

pub(super) fn api_key(text: &str) -> Option<SecretString> {
    let plain = text.bytes().all(|b| b.is_ascii_graphic());
    (plain && text.len() > 3 && text.len() <= 512 && text.starts_with("ak-")).then(|| text.into())
}
