//! How often the control plane is called when it does not answer as it should. Pure but for the dice; part of the control
//! plane's client.

use std::time::Duration;

/// A `Retry-After` beyond this is cut: a service that was wrong about it must not lose its hosts for a day.
pub(super) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Bounds of the pauses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pauses {
    /// The shortest pause.
    pub(super) shortest: Duration,
    /// The longest pause, `Retry-After` apart.
    pub(super) longest: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { shortest: Duration::from_secs(1), longest: Duration::from_secs(60) }
    }
}

/// Pauses that grow with each failure, with full jitter above the shortest: many hosts that lost the same service do not
/// come back at the same moment, and none calls more than once in `shortest`. Uses no clock, so a wall clock that is far
/// off or jumps changes nothing.
#[derive(Debug)]
pub(super) struct Pace {
    pauses: Pauses,
    failures: u32,
}

impl Pace {
    pub(super) fn new(pauses: Pauses) -> Self {
        Self { pauses, failures: 0 }
    }

    /// How long to wait after another failure.
    pub(super) fn failed(&mut self, retry_after: Option<Duration>) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let factor = 1_u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let most = self.pauses.shortest.saturating_mul(factor).min(self.pauses.longest);
        let jitter = most.saturating_sub(self.pauses.shortest).mul_f64(rand::random_range(0.0..1.0));
        let asked = retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER);
        asked.max(self.pauses.shortest) + jitter
    }

    /// All is well again.
    pub(super) fn calm(&mut self) {
        self.failures = 0;
    }
}

/// A period that differs from host to host and from time to time by a quarter.
pub(super) fn about(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.75..1.25))
}

/// `Retry-After` in seconds. Its other form, a date, needs two clocks that agree and is not looked at.
pub(super) fn retry_after(text: &str) -> Option<Duration> {
    let digits = !text.is_empty() && text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?.map(Duration::from_secs).map(|asked| asked.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_never_shorter_than_a_second_nor_longer_than_a_minute() {
        for _ in 0..200 {
            let mut pace = Pace::new(Pauses::default());
            let pauses: Vec<Duration> = (0..100).map(|_| pace.failed(None)).collect();
            assert!(pauses.iter().all(|pause| (1.0..=60.0).contains(&pause.as_secs_f64())), "{pauses:?}");
            assert!(pauses[0] <= Duration::from_secs(2) && pauses[1] <= Duration::from_secs(4));
            pace.calm();
            assert!(pace.failed(None) <= Duration::from_secs(2));
        }
    }

    #[test]
    fn many_hosts_do_not_come_back_together() {
        let after_ten = |_| {
            let mut pace = Pace::new(Pauses::default());
            for _ in 0..10 {
                pace.failed(None);
            }
            pace.failed(None)
        };
        let pauses: Vec<Duration> = (0..1000).map(after_ten).collect();
        for tenth in 0..10 {
            let within = |pause: &&Duration| {
                let share = (pause.as_secs_f64() - 1.0) / 59.0 * 10.0;
                (f64::from(tenth)..f64::from(tenth + 1)).contains(&share)
            };
            let count = pauses.iter().filter(within).count();
            assert!((50..200).contains(&count), "{count} of 1000 in tenth {tenth}");
        }
    }

    #[test]
    fn the_service_may_ask_for_more_patience_within_reason() {
        let mut pace = Pace::new(Pauses::default());
        let pause = pace.failed(retry_after("120"));
        assert!((120..=122).contains(&pause.as_secs()), "{pause:?}");
        let mut pace = Pace::new(Pauses::default());
        assert!(pace.failed(retry_after("999999999")) <= LONGEST_RETRY_AFTER + Duration::from_secs(2));
        assert_eq!(retry_after("0"), Some(Duration::ZERO));
        for odd in ["", "-1", "1.5", "1e9", "Fri, 31 Dec 2100 23:59:59 GMT", "99999999999999999999", " 1"] {
            assert_eq!(retry_after(odd), None, "{odd}");
        }
    }

    #[test]
    fn periods_differ() {
        let periods: std::collections::BTreeSet<Duration> =
            (0..50).map(|_| about(Duration::from_secs(60))).collect();
        assert!(periods.len() > 10);
        assert!(periods.iter().all(|period| (45..=75).contains(&period.as_secs())), "{periods:?}");
    }
}
