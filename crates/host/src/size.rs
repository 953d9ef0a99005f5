//! Sizes of memory and disks. Owns parsing and printing of byte counts; used wherever a size crosses a seam.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. Parsed from `32G`, `512M`, `1T`, `4096K` or a bare number of bytes; the suffixes are binary
/// (1G = 2^30) and may be written `G`, `g`, `GiB` or `GB`, as QEMU and the original agent take them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

impl ByteSize {
    /// `n` bytes.
    pub const fn from_bytes(n: u64) -> Self {
        Self(n)
    }

    /// `n` MiB, saturating.
    pub const fn from_mib(n: u64) -> Self {
        Self(n.saturating_mul(MIB))
    }

    /// `n` GiB, saturating.
    pub const fn from_gib(n: u64) -> Self {
        Self(n.saturating_mul(GIB))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whole MiB, rounded down.
    pub const fn mib(self) -> u64 {
        self.0 / MIB
    }

    /// Whole GiB, rounded down.
    pub const fn gib(self) -> u64 {
        self.0 / GIB
    }

    /// Sum that never wraps.
    #[must_use]
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Difference that stops at zero.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a size: write a whole number with K, M, G or T, for example 8G")]
pub struct ParseSizeError {
    /// What was given, cut to 40 characters.
    pub value: String,
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let refuse = || ParseSizeError { value: text.chars().take(40).collect() };
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| refuse())?;
        let unit = match suffix.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kb" | "kib" => KIB,
            "m" | "mb" | "mib" => MIB,
            "g" | "gb" | "gib" => GIB,
            "t" | "tb" | "tib" => TIB,
            _ => return Err(refuse()),
        };
        number.checked_mul(unit).map(Self).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, unit) = match self.0 {
            n if n >= TIB && n % TIB == 0 => (n / TIB, "T"),
            n if n >= GIB && n % GIB == 0 => (n / GIB, "G"),
            n if n >= MIB && n % MIB == 0 => (n / MIB, "M"),
            n if n >= KIB && n % KIB == 0 => (n / KIB, "K"),
            n => (n, ""),
        };
        write!(f, "{n}{unit}")
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        u64::deserialize(d).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_as_the_platform_writes_them() {
        for (text, bytes) in
            [("32G", 32 * GIB), ("8GiB", 8 * GIB), ("512m", 512 * MIB), ("1T", TIB), ("7", 7)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        for text in ["", "G", "-1G", "1.5G", "1 G", "99999999999T", "1X", "0x10"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn printing_and_parsing_agree(n in any::<u64>()) {
            let size = ByteSize::from_bytes(n);
            prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }

        #[test]
        fn parsing_never_panics(text in ".{0,60}") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
