//! How far standbys are behind in time: since when the oldest WAL that a standby has not replayed has been there.
//!
//! What it is NOT: PostgreSQL's `replay_lag`, which is that of the last answer and stands still while a standby is
//! stuck or gone.
//!
//! **Invariant:** bounded: where too much is remembered, every other moment is forgotten, and the answer gets coarser
//! by as much.

use crate::base::ids::Lsn;
use crate::base::time::{Duration, Instant};
use crate::engine::report::PgReport;
use std::collections::{BTreeMap, VecDeque};

/// Moments remembered: a quarter of an hour at four looks a second, coarser beyond that.
const MOMENTS: usize = 4096;
/// Standbys remembered; there are as many as nodes, and strangers that follow too.
const STANDBYS: usize = 64;

/// What a primary's looks at itself came to.
#[derive(Debug, Default)]
pub struct LagMeter {
    /// When WAL up to here was first seen to be on disk, in order.
    moments: VecDeque<(Instant, Lsn)>,
    /// What each standby has replayed, as last heard; kept when it is gone.
    replayed: BTreeMap<String, Lsn>,
}

impl LagMeter {
    /// One look at the local PostgreSQL. One that is no primary knows nothing, and what was known is over.
    pub fn observe(&mut self, asked: Instant, report: &PgReport) {
        if report.in_recovery {
            *self = LagMeter::default();
            return;
        }
        // The insert position may stay ahead of it for as long as nobody commits, and nobody is behind for that.
        let flushed = report.flush_lsn.unwrap_or(report.lsn);
        if self.moments.back().is_none_or(|(_, last)| *last < flushed) {
            self.moments.push_back((asked, flushed));
        }
        for row in &report.standbys {
            if let Some(replayed) = row.replay_lsn
                && (self.replayed.contains_key(&row.application_name) || self.replayed.len() < STANDBYS)
            {
                self.replayed.insert(row.application_name.clone(), replayed);
            }
        }
        // The newest stays: it says up to where nobody is behind.
        let least = self.replayed.values().min().copied().unwrap_or(flushed);
        while self.moments.len() > 1 && self.moments.front().is_some_and(|(_, lsn)| *lsn <= least) {
            self.moments.pop_front();
        }
        if self.moments.len() > MOMENTS {
            let mut odd = false;
            self.moments.retain(|_| {
                odd = !odd;
                odd
            });
        }
    }

    /// How far this standby is behind; `None`: it was never heard of, or this is no primary.
    pub fn behind(&self, name: &str, now: Instant) -> Option<Duration> {
        let replayed = self.replayed.get(name)?;
        let missing = self.moments.iter().find(|(_, lsn)| lsn > replayed);
        Some(missing.map_or(Duration::ZERO, |(since, _)| now.since(*since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ids::{SystemId, TimelineId};
    use crate::engine::report::StandbyRow;

    fn report(flushed: u64, standbys: &[(&str, u64)]) -> PgReport {
        PgReport {
            start: 1,
            system_id: SystemId(1),
            in_recovery: false,
            timeline: TimelineId::default(),
            lsn: Lsn(flushed + 40),
            flush_lsn: Some(Lsn(flushed)),
            replay_lsn: None,
            receive_lsn: None,
            streaming: false,
            sync_list: String::new(),
            conf_loaded_us: 0,
            next_xid: None,
            read_only: false,
            standbys: standbys
                .iter()
                .map(|(name, replayed)| StandbyRow {
                    application_name: (*name).to_owned(),
                    state: "streaming".to_owned(),
                    sync_state: "sync".to_owned(),
                    flush_lsn: None,
                    replay_lsn: Some(Lsn(*replayed)),
                    pid: 1,
                })
                .collect(),
        }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_standby_is_behind_since_the_oldest_wal_it_lacks_also_when_it_is_gone() {
        let mut meter = LagMeter::default();
        assert_eq!(meter.behind("midna", at(1)), None, "never heard of");
        meter.observe(at(10), &report(100, &[("midna", 100)]));
        // Idle for long: nobody is behind, although the insert position stays ahead.
        meter.observe(at(1000), &report(100, &[("midna", 100)]));
        assert_eq!(meter.behind("midna", at(1000)), Some(Duration::ZERO));
        meter.observe(at(1001), &report(200, &[("midna", 100)]));
        meter.observe(at(1005), &report(300, &[("midna", 200)]));
        assert_eq!(meter.behind("midna", at(1006)), Some(Duration::from_secs(1)), "since what it has not is there");
        meter.observe(at(1007), &report(400, &[]));
        assert_eq!(meter.behind("midna", at(1105)), Some(Duration::from_secs(100)), "it is gone, and falls behind");
        meter.observe(at(1106), &report(400, &[("midna", 400)]));
        assert_eq!(meter.behind("midna", at(1106)), Some(Duration::ZERO));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_moment_stays() {
        let mut meter = LagMeter::default();
        meter.observe(at(1), &report(1, &[("midna", 1)]));
        for n in 2..20_000 {
            meter.observe(at(n), &report(n, &[("midna", 1)]));
        }
        assert!(meter.moments.len() <= MOMENTS);
        let behind = meter.behind("midna", at(20_000)).expect("known").as_secs();
        assert!((19_990..=20_000).contains(&behind), "{behind}");
    }
}
