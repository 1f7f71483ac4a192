//! How long requests, transactions and waits took: one tally for each data thread, read by `/metrics`.
//!
//! What it is NOT: nothing is measured by the byte or by the row; the clock is read when a session begins to be busy
//! and when it comes to rest.
//!
//! **Invariant:** a tally is written by its own thread alone, so that counting is no locked instruction and meets no
//! other core.

use super::pool::add;
use crate::base::tally::{LATENCIES, Times, micros, range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A histogram with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    counts: [AtomicU64; LATENCIES.len() + 1],
    micros: AtomicU64,
}

impl Counted {
    pub(crate) fn note(&self, duration: Duration) {
        let micros = micros(duration);
        if let Some(count) = self.counts.get(range(&LATENCIES, micros)) {
            add(count, 1);
        }
        add(&self.micros, micros);
    }

    fn read(&self) -> Times {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Times { counts, sum_us: self.micros.load(Ordering::Relaxed) }
    }
}

/// What one data thread has measured.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) queries: Counted,
    pub(crate) transactions: Counted,
    pub(crate) waits: Counted,
}

/// What all of them have measured since the daemon started, by [`LATENCIES`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    /// From a request to the end of its answer.
    pub queries: Times,
    /// From the first request of a transaction to the end of its last answer.
    pub transactions: Times,
    /// Of clients for a connection to PostgreSQL.
    pub waits: Times,
}

impl Latencies {
    pub(crate) fn take_in(&mut self, tally: &Tally) {
        self.queries.merge(&tally.queries.read());
        self.transactions.merge(&tally.transactions.read());
        self.waits.merge(&tally.waits.read());
    }
}
