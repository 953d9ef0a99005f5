//! Many readings of one quantity and what is said about them. Called by every benchmark.

use std::time::Duration;

use jiff::Timestamp;

/// Readings, at least one, in ascending order.
#[derive(Debug, Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// `None` when there is nothing, or something that is no number.
    pub(crate) fn new(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        Some(Self(values))
    }

    /// The smallest reading that `percent` of all readings do not exceed (nearest rank).
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).clamp(1, self.0.len());
        self.0.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn p50(&self) -> f64 {
        self.percentile(50)
    }

    pub(crate) fn max(&self) -> f64 {
        self.percentile(100)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Milliseconds with all their decimals.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Milliseconds from one moment of this machine's clock to another.
pub(crate) fn between(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_readings_by_nearest_rank() {
        let samples = Samples::new((1..=20).rev().map(f64::from).collect()).unwrap();
        let seen = [1, 5, 50, 90, 99, 100].map(|percent| samples.percentile(percent));
        assert_eq!(seen, [1.0, 1.0, 10.0, 18.0, 20.0, 20.0]);
        assert_eq!(Samples::new(vec![7.5]).unwrap().p50(), 7.5);
    }

    #[test]
    fn nothing_and_no_number_are_no_samples() {
        assert!(Samples::new(Vec::new()).is_none());
        assert!(Samples::new(vec![1.0, f64::NAN]).is_none());
    }

    #[test]
    fn moments_may_lie_either_way() {
        let [early, late] = [1_000_000_000, 1_002_500_000].map(|n| Timestamp::from_nanosecond(n).unwrap());
        assert_eq!((between(early, late), between(late, early)), (2.5, -2.5));
    }
}
