//! How long to wait before the next try: longer each time, never the same for a whole fleet. Called by `task`, `rounds`.

use std::time::Duration;

/// A growing pause with jitter.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// The pause before the next try: between three quarters and five quarters of its turn.
    pub(crate) fn pause(&mut self) -> Duration {
        let turn = self.next;
        self.next = (turn * 2).min(self.longest);
        turn.mul_f64(rand::random_range(0.75..1.25))
    }

    /// It went well: the next pause is a short one.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.pause()).collect();
        assert!(pauses[0] < Duration::from_millis(626) && pauses[0] >= Duration::from_millis(374));
        assert!(pauses[8..].iter().all(|p| *p >= Duration::from_secs(22) && *p <= Duration::from_secs(38)));
        assert!(pauses[8..].windows(2).any(|w| w[0] != w[1]), "no jitter");
        backoff.reset();
        assert!(backoff.pause() < Duration::from_secs(1));
    }
}
