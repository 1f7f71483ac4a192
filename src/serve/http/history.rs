//! The last hour in memory, for the page's plots and `/history.json`: one sample every ten seconds.
//!
//! What it is NOT: it is kept nowhere, so it begins with the daemon; who wants more scrapes `/metrics`. Sampled in a
//! task of its own, from what the turn publishes anyway.

use crate::engine::status::Snapshot;
use crate::serve::command::Figures;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

/// Between two samples.
pub const EVERY: Duration = Duration::from_secs(10);
/// Looks for one sample: of lag and sessions it keeps the highest, so that a short peak is seen.
const LOOKS: u32 = 10;
/// Samples kept: an hour. The oldest goes when another comes.
pub const KEPT: usize = 360;

/// One sample. What could not be known then is null, never 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds since the daemon started.
    pub t: u64,
    /// RFC 3339, UTC.
    pub at: String,
    /// Highest of the interval, as [`Lag`](crate::engine::outlook::Lag) says them.
    pub lag_bytes: Option<u64>,
    pub lag_ms: Option<u64>,
    /// Highest of the interval.
    pub sessions: u64,
    /// Transactions that write, of the primary here.
    pub writes_per_s: Option<f64>,
    /// Loans of a connection to a transaction, in transaction mode.
    pub transactions_per_s: Option<f64>,
    /// From and to clients.
    pub received_bytes_per_s: Option<f64>,
    pub sent_bytes_per_s: Option<f64>,
}

/// What is counted up, as it was at the last sample.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    xid: Option<u64>,
    transactions: u64,
    received: u64,
    sent: u64,
}

impl Totals {
    fn of(snapshot: &Snapshot, pools: &[Figures]) -> Totals {
        Totals {
            xid: snapshot.next_xid,
            transactions: pools.iter().map(|pool| pool.transactions).sum(),
            received: pools.iter().map(|pool| pool.bytes_in).sum(),
            sent: pools.iter().map(|pool| pool.bytes_out).sum(),
        }
    }
}

/// Makes samples of what it is shown.
#[derive(Debug, Default)]
struct Sampler {
    peak: Sample,
    before: Option<(Duration, Totals)>,
}

impl Sampler {
    fn look(&mut self, snapshot: &Snapshot) {
        if let Some(lag) = &snapshot.lag {
            self.peak.lag_bytes = self.peak.lag_bytes.max(Some(lag.bytes));
            self.peak.lag_ms = self.peak.lag_ms.max(lag.ms);
        }
        self.peak.sessions = self.peak.sessions.max(snapshot.gate.sessions);
    }

    fn sample(&mut self, since_start: Duration, snapshot: &Snapshot, pools: &[Figures]) -> Sample {
        let totals = Totals::of(snapshot, pools);
        let mut sample = std::mem::take(&mut self.peak);
        sample.t = since_start.as_secs();
        sample.at = snapshot.at.clone();
        if let Some((when, before)) = self.before {
            let seconds = since_start.saturating_sub(when).as_secs_f64();
            // Less than before: a pool went away, or PostgreSQL is another one.
            let rate = |now: u64, before: u64| {
                let grown = u32::try_from(now.checked_sub(before)?).map_or(f64::from(u32::MAX), f64::from);
                (seconds > 0.0).then(|| (grown / seconds * 10.0).round() / 10.0)
            };
            sample.writes_per_s = totals.xid.zip(before.xid).and_then(|(now, before)| rate(now, before));
            sample.transactions_per_s = rate(totals.transactions, before.transactions);
            sample.received_bytes_per_s = rate(totals.received, before.received);
            sample.sent_bytes_per_s = rate(totals.sent, before.sent);
        }
        self.before = Some((since_start, totals));
        sample
    }
}

/// The ring. A copy is the same ring.
#[derive(Debug, Clone, Default)]
pub struct History(Arc<Mutex<VecDeque<Sample>>>);

/// `/history.json`.
#[derive(Serialize)]
struct Document<'a> {
    every_s: u64,
    /// Oldest first; at most an hour, and since the daemon started.
    samples: &'a VecDeque<Sample>,
}

impl History {
    /// With these samples, and no task that adds to them.
    pub fn of(samples: impl IntoIterator<Item = Sample>) -> History {
        let history = History::default();
        samples.into_iter().for_each(|sample| history.push(sample));
        history
    }

    /// Samples what is published from now on, inside a tokio runtime, until nobody publishes any more.
    pub fn start(snapshots: watch::Receiver<Arc<Snapshot>>, pools: super::Pools) -> History {
        let history = History::default();
        let ring = history.clone();
        tokio::spawn(async move {
            let began = tokio::time::Instant::now();
            let mut sampler = Sampler::default();
            let mut ticks = interval(EVERY / LOOKS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for look in 1_u32.. {
                ticks.tick().await;
                if snapshots.has_changed().is_err() {
                    return;
                }
                let now = snapshots.borrow().clone();
                sampler.look(&now);
                if look % LOOKS == 0 {
                    ring.push(sampler.sample(began.elapsed(), &now, &pools()));
                }
            }
        });
        history
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<Sample>> {
        // Held for a push or a copy only, never over a wait.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, sample: Sample) {
        let mut ring = self.ring();
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(sample);
    }

    /// Oldest first.
    pub(super) fn samples(&self) -> Vec<Sample> {
        self.ring().iter().cloned().collect()
    }

    pub(super) fn json(&self) -> Vec<u8> {
        let samples = self.ring().clone();
        serde_json::to_vec(&Document { every_s: EVERY.as_secs(), samples: &samples }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The least of a snapshot that can be parsed.
    fn snapshot(xid: u64, sessions: u64, lag: Option<u64>) -> Snapshot {
        serde_json::from_value(serde_json::json!({
            "node": "alp", "version": "0", "role": "active", "epoch": 2, "witness": null, "vip": null, "vips": [],
            "gate": {"open": true, "state": "open", "reason": null, "lease_remaining_ms": 1, "sessions": sessions},
            "peer": null, "procedure": null, "events": [], "advice": null, "nodes": [],
            "replication": {"mode": "synchronous", "in_sync": true, "alone_since": null, "timeline": 1, "lsn": null},
            "postgres": {"up": true, "role": "primary", "error": null, "streaming": false},
            "journal": {"refused": 0, "won": 0, "complete": 0, "fence": 0}, "next_xid": xid, "at": "then",
            "lag": lag.map(|bytes| serde_json::json!({"node": "midna", "bytes": bytes, "ms": 5, "away": false})),
            "counters": {"gate_openings": 0, "gate_cuts": 0, "witness_proofs": 0, "peer_pledges": 0,
                "witness_silent": 0, "peer_refused_connections": 0, "sessions_total": 0, "auth_failures": 0},
        }))
        .expect("a snapshot")
    }

    #[test]
    fn peaks_are_kept_and_counters_become_rates() {
        let mut sampler = Sampler::default();
        sampler.look(&snapshot(100, 3, None));
        let first = sampler.sample(Duration::from_secs(10), &snapshot(100, 3, None), &[]);
        assert_eq!((first.t, first.sessions, first.lag_bytes, first.writes_per_s), (10, 3, None, None));
        sampler.look(&snapshot(100, 9, Some(4000)));
        sampler.look(&snapshot(120, 2, Some(0)));
        let second = sampler.sample(Duration::from_secs(20), &snapshot(145, 2, Some(0)), &[]);
        assert_eq!((second.sessions, second.lag_bytes, second.lag_ms), (9, Some(4000), Some(5)));
        assert_eq!((second.writes_per_s, second.transactions_per_s), (Some(4.5), Some(0.0)));
        // Another PostgreSQL counts from elsewhere: no rate, and above all none below zero.
        let third = sampler.sample(Duration::from_secs(30), &snapshot(7, 0, None), &[]);
        assert_eq!((third.writes_per_s, third.lag_bytes), (None, None), "a peak is of its interval");
    }

    #[test]
    fn the_ring_keeps_an_hour() {
        let history = History::of((0..1000).map(|t| Sample { t: t * 10, ..Sample::default() }));
        let samples = history.samples();
        assert_eq!((samples.len(), samples[0].t, samples[KEPT - 1].t), (KEPT, 6400, 9990));
        let json: serde_json::Value = serde_json::from_slice(&history.json()).expect("JSON");
        assert_eq!((&json["every_s"], &json["samples"][0]["lag_ms"]), (&10.into(), &serde_json::Value::Null));
    }
}
