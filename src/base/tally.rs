//! Durations counted into ranges, for histograms.
//!
//! What it is NOT: it knows no clock and forgets nothing; who measures hands in a duration.
//!
//! **Invariant:** `counts` has one range more than there are bounds: the last is for what exceeds them all.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Upper bounds of what clients feel, in microseconds: a tenth of a millisecond to a minute.
pub const LATENCIES: [u64; 17] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 15_000_000, 60_000_000,
];
/// Upper bounds of what people wait for, in microseconds: a quarter of a second to an hour.
pub const PROCEDURES: [u64; 14] = [
    250_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    15_000_000,
    30_000_000,
    60_000_000,
    120_000_000,
    300_000_000,
    900_000_000,
    1_800_000_000,
    3_600_000_000,
];

/// Whole microseconds, saturating.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The range that a duration belongs to.
pub fn range(bounds: &[u64], micros: u64) -> usize {
    bounds.partition_point(|bound| *bound < micros)
}

/// How many durations fell into each range, and their sum.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Each for itself, not added up.
    pub counts: Vec<u64>,
    pub sum_us: u64,
}

impl Times {
    /// Counts one.
    pub fn add(&mut self, bounds: &[u64], duration: Duration) {
        let micros = micros(duration);
        self.counts.resize(bounds.len() + 1, 0);
        if let Some(count) = self.counts.get_mut(range(bounds, micros)) {
            *count += 1;
        }
        self.sum_us = self.sum_us.saturating_add(micros);
    }

    /// Adds what another has counted, by the same bounds.
    pub fn merge(&mut self, other: &Times) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
    }

    /// All of them.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_range_and_nothing_is_lost_above_the_last() {
        let mut times = Times::default();
        for ms in [0, 100, 250, 251, 3_600_000, 3_600_001] {
            times.add(&PROCEDURES, Duration::from_millis(ms));
        }
        assert_eq!((times.counts[0], times.counts[1], times.counts[13], times.counts[14]), (3, 1, 1, 1));
        assert_eq!(times.sum_us, 7_200_602_000);
        let mut twice = times.clone();
        twice.merge(&times);
        assert_eq!((twice.count(), twice.sum_us), (12, 14_401_204_000));
    }

    #[test]
    fn bounds_rise() {
        assert!(LATENCIES.is_sorted() && PROCEDURES.is_sorted());
    }
}
