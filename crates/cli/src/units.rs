//! How numbers are written for people: sizes in IEC units, durations, times relative to now. Pure; used by everything
//! that prints.

use jiff::Timestamp;

/// `512 MiB`, `1.5 GiB`, `32 GiB`: at most three digits and one decimal.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = bytes;
    let mut tenths = 0;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        tenths = (whole % 1024) * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if tenths == 0 || whole >= 100 { format!("{whole} {name}") } else { format!("{whole}.{tenths} {name}") }
}

/// `140 ms`, `48.1 s`, `3 min 20 s`, `2 h 13 min`, `4 d 2 h`.
pub(crate) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    let two = |a: u64, a_name: &str, b: u64, b_name: &str| match b {
        0 => format!("{a} {a_name}"),
        b => format!("{a} {a_name} {b} {b_name}"),
    };
    match s {
        0 => format!("{ms} ms"),
        1..=59 => format!("{s}.{} s", ms % 1000 / 100),
        60..=3599 => two(s / 60, "min", s % 60, "s"),
        3600..=86399 => two(s / 3600, "h", s / 60 % 60, "min"),
        _ => two(s / 86400, "d", s / 3600 % 24, "h"),
    }
}

/// How long ago, for a narrow column: `now`, `42 s`, `3 min`, `2 h`, `4 d`. A time to come is `now`: clocks differ.
pub(crate) fn age(then: Timestamp, now: Timestamp) -> String {
    let s = milliseconds(then, now) / 1000;
    match s {
        0 => "now".to_owned(),
        1..=59 => format!("{s} s"),
        60..=3599 => format!("{} min", s / 60),
        3600..=86399 => format!("{} h", s / 3600),
        _ => format!("{} d", s / 86400),
    }
}

/// `just now` or `3 min ago`.
pub(crate) fn ago(then: Timestamp, now: Timestamp) -> String {
    match milliseconds(then, now) {
        0..=999 => "just now".to_owned(),
        _ => format!("{} ago", age(then, now)),
    }
}

/// Milliseconds between the two, 0 when `then` is yet to come.
pub(crate) fn milliseconds(then: Timestamp, now: Timestamp) -> u64 {
    u64::try_from(now.as_millisecond().saturating_sub(then.as_millisecond())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let table = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (32 << 30, "32 GiB"),
            ((1 << 40) + (1 << 39), "1.5 TiB"),
            ((500 << 30) + (1 << 29), "500 GiB"),
            (u64::MAX, "16777215 TiB"),
        ];
        for (bytes, text) in table {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn durations() {
        let table = [
            (0, "0 ms"),
            (999, "999 ms"),
            (9_960, "9.9 s"),
            (48_190, "48.1 s"),
            (200_000, "3 min 20 s"),
            (120_000, "2 min"),
            (7_980_000, "2 h 13 min"),
            (353_000_000, "4 d 2 h"),
        ];
        for (ms, text) in table {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn ages() {
        let now: Timestamp = "2026-01-02T12:00:00Z".parse().unwrap();
        let table = [
            ("2026-01-02T12:00:00Z", "just now"),
            ("2026-01-02T12:00:05Z", "just now"),
            ("2026-01-02T11:59:18Z", "42 s ago"),
            ("2026-01-02T11:57:00Z", "3 min ago"),
            ("2026-01-02T09:30:00Z", "2 h ago"),
            ("2025-12-29T09:30:00Z", "4 d ago"),
        ];
        for (then, text) in table {
            assert_eq!(ago(then.parse().unwrap(), now), text);
        }
    }
}
