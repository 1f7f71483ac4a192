//! From a tool's signs of life to what a person and a program are told: how much, how fast, how long still.
//!
//! **Invariant:** never 100 % before the end; what moves no bytes (a checkpoint waited for, files synced) is said as
//! such, without a time left.

use crate::base::time::{Duration, Instant};
use crate::engine::report::Progress;
use crate::engine::status::human_ms;
use crate::io::postgres::Tick;
use std::collections::VecDeque;

/// How often bytes are told.
const EVERY: Duration = Duration::from_millis(500);
/// The rate is that of the last so many seconds.
const WINDOW: Duration = Duration::from_secs(10);

/// One copy.
#[derive(Debug)]
pub struct Meter {
    told: Option<Instant>,
    seen: VecDeque<(Instant, u64)>,
    last: Progress,
}

impl Meter {
    pub fn new(now: Instant) -> Meter {
        Meter { told: None, seen: VecDeque::from([(now, 0)]), last: Progress::default() }
    }

    /// What is to be said now, if anything.
    pub fn tick(&mut self, now: Instant, tick: Tick) -> Option<(String, Option<Progress>)> {
        match tick {
            Tick::Words(text) => Some((text, None)),
            Tick::Diverged { transactions, words } => {
                Some((words, Some(Progress { diverged_transactions: Some(transactions), ..Progress::default() })))
            }
            Tick::Uncounted(words) => Some((words, Some(Progress { uncounted: true, ..Progress::default() }))),
            Tick::Phase(text) => {
                self.told = None;
                let progress = Progress { phase: Some(text.to_owned()), left_s: None, ..self.last.clone() };
                Some((text.to_owned(), Some(progress)))
            }
            Tick::Bytes { done, total } => self.bytes(now, done, total.unwrap_or(0)),
        }
    }

    fn bytes(&mut self, now: Instant, done: u64, total: u64) -> Option<(String, Option<Progress>)> {
        if self.seen.back().is_some_and(|(_, before)| *before > done) {
            // Another tool began.
            self.seen.clear();
        }
        self.seen.push_back((now, done));
        while self.seen.len() > 2 && self.seen.front().is_some_and(|(at, _)| now.since(*at) > WINDOW) {
            self.seen.pop_front();
        }
        let rate = self.seen.front().map_or(0, |(at, before)| {
            let ms = u64::try_from(now.since(*at).as_millis()).unwrap_or(u64::MAX);
            (done - before).saturating_mul(1000).checked_div(ms).unwrap_or(0)
        });
        // The total is an estimate; the source grows meanwhile.
        let total = if total == 0 { 0 } else { total.max(done) };
        let left_s = (total > 0 && rate > 0).then(|| (total - done).div_ceil(rate));
        self.last =
            Progress { done_bytes: done, total_bytes: total, rate_bytes_per_s: rate, left_s, ..Progress::default() };
        if self.told.is_some_and(|told| now.since(told) < EVERY) {
            return None;
        }
        self.told = Some(now);
        Some((words(&self.last), Some(self.last.clone())))
    }
}

/// Percent done, never all of it.
pub fn percent(progress: &Progress) -> Option<u64> {
    let all = u128::from(progress.total_bytes);
    let done = (u128::from(progress.done_bytes) * 100).checked_div(all)?;
    u64::try_from(done.min(99)).ok()
}

/// `copied 812 of 5120 MiB (15 %), 96 MiB/s, 45 s left`
fn words(progress: &Progress) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let mut text = match percent(progress) {
        Some(percent) => {
            format!("copied {} of {} MiB ({percent} %)", mib(progress.done_bytes), mib(progress.total_bytes))
        }
        None => format!("copied {} MiB", mib(progress.done_bytes)),
    };
    if progress.rate_bytes_per_s > 0 {
        text.push_str(&format!(", {} MiB/s", mib(progress.rate_bytes_per_s)));
    }
    if let Some(left) = progress.left_s {
        text.push_str(&format!(", about {} left", human_ms(left.saturating_mul(1000))));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(ms: u64) -> Instant {
        Instant::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn it_is_honest_to_the_end() {
        let mut meter = Meter::new(at(0));
        let mut bytes = |ms, done, total| meter.tick(at(ms), Tick::Bytes { done, total: Some(total) });
        let (text, progress) = bytes(1000, 100 * MIB, 1000 * MIB).expect("the first is told");
        let progress = progress.expect("figures");
        assert_eq!((progress.rate_bytes_per_s, progress.left_s), (100 * MIB, Some(9)));
        assert!(text.starts_with("copied 100 of 1000 MiB (10 %), 100 MiB/s, about 9"), "{text}");
        assert!(bytes(1100, 110 * MIB, 1000 * MIB).is_none(), "not with every line");
        let (text, progress) = bytes(11_000, 1200 * MIB, 1000 * MIB).expect("told");
        let progress = progress.expect("figures");
        assert!(text.contains("(99 %)"), "more than was estimated, and not at its end: {text}");
        assert_eq!((progress.done_bytes, progress.total_bytes), (1200 * MIB, 1200 * MIB));
        let (text, progress) = meter.tick(at(11_100), Tick::Phase("syncing")).expect("told at once");
        let progress = progress.expect("figures");
        assert_eq!((text.as_str(), progress.phase.as_deref(), progress.left_s), ("syncing", Some("syncing"), None));
    }

    #[test]
    fn the_rate_is_the_recent_one() {
        let mut meter = Meter::new(at(0));
        for second in 1..=30 {
            let done = if second <= 10 { second * 100 * MIB } else { (1000 + (second - 10)) * MIB };
            meter.tick(at(second * 1000), Tick::Bytes { done, total: Some(10_000 * MIB) });
        }
        assert_eq!(meter.last.rate_bytes_per_s, MIB, "it became slow");
        // A second tool counts from its own beginning.
        meter.tick(at(31_000), Tick::Bytes { done: MIB, total: None });
        assert_eq!((meter.last.total_bytes, meter.last.left_s), (0, None));
    }
}
