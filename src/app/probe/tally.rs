//! Counting: outages of each kind, acknowledged numbers, and the summary of both. Pure; times are handed in.
//!
//! An outage lasts from the beginning of the first failed question to the first good answer after it. One that has
//! not ended when the probe does ends there, and says so.

use crate::base::time::{Duration, Instant, millis};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Outages of one kind that are kept one by one; of further ones only number and greatest length are.
pub const MAX_OUTAGES: usize = 10_000;
/// Missing numbers, and outages of one kind, that the summary for people lists; the counts are always whole.
const LISTED: usize = 20;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Health = 0,
    Select = 1,
    Update = 2,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Health, Kind::Select, Kind::Update];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Health => "health",
            Kind::Select => "select",
            Kind::Update => "update",
        }
    }
}

/// One moment on both clocks: the wall's for people, the boot clock for lengths.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) wall: Timestamp,
    pub(super) boot: Instant,
}

/// A time without good answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Outage {
    pub kind: Kind,
    pub from: Timestamp,
    pub to: Timestamp,
    pub ms: u64,
    /// Still lasting when the probe ended.
    pub unfinished: bool,
    /// Of updates: the last number acknowledged before, and the first after.
    pub last_before: Option<u64>,
    pub first_after: Option<u64>,
}

/// What the final read said about acknowledged numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LostWrites {
    Known { missing: Vec<u64> },
    Unknown { why: String },
}

/// The end of a probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    pub ticks: u64,
    /// In the order in which they began.
    pub outages: Vec<Outage>,
    /// Outages beyond [`MAX_OUTAGES`], not listed.
    pub outages_unlisted: u64,
    /// By [`Kind`].
    pub longest_ms: [u64; 3],
    pub reconnects: u64,
    pub acknowledged: u64,
    /// Acknowledged numbers that the final read could tell about.
    pub verified: u64,
    /// Inserts that PostgreSQL refused with an error.
    pub refused: u64,
    /// Inserts without an answer: they may have happened or not.
    pub unknown: u64,
    pub lost: LostWrites,
    writes: bool,
}

struct Lasting {
    from: Moment,
    last_before: Option<u64>,
}

pub(super) struct Tally {
    writes: bool,
    lasting: [Option<Lasting>; 3],
    outages: Vec<Outage>,
    outages_unlisted: u64,
    longest_ms: [u64; 3],
    reconnects: u64,
    /// The number given out last.
    number: u64,
    acknowledged: u64,
    refused: u64,
    /// Acknowledged numbers as runs, both ends included, rising: as many as there were outages, not as writes.
    runs: Vec<(u64, u64)>,
    /// Numbers below are no longer in the table.
    first_kept: u64,
}

impl Tally {
    pub(super) fn new(writes: bool) -> Tally {
        Tally {
            writes,
            lasting: [None, None, None],
            outages: Vec::new(),
            outages_unlisted: 0,
            longest_ms: [0; 3],
            reconnects: 0,
            number: 0,
            acknowledged: 0,
            refused: 0,
            runs: Vec::new(),
            first_kept: 1,
        }
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    pub(super) fn acknowledge(&mut self, n: u64) {
        self.acknowledged += 1;
        match self.runs.last_mut() {
            Some((_, to)) if *to + 1 == n => *to = n,
            _ => self.runs.push((n, n)),
        }
    }

    /// The number given out last was refused: it surely is not there.
    pub(super) fn refuse(&mut self) {
        self.refused += 1;
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Zero before the first.
    pub(super) fn last_acknowledged(&self) -> u64 {
        self.runs.last().map_or(0, |(_, to)| *to)
    }

    pub(super) fn first_kept(&self) -> u64 {
        self.first_kept
    }

    /// Numbers up to `n` have been deleted from the table.
    pub(super) fn forget_up_to(&mut self, n: u64) {
        self.first_kept = self.first_kept.max(n + 1);
        let first = self.first_kept;
        self.runs.retain(|(_, to)| *to >= first);
        if let Some((from, _)) = self.runs.first_mut() {
            *from = (*from).max(first);
        }
    }

    pub(super) fn reconnected(&mut self) {
        self.reconnects += 1;
    }

    /// One answer, or its absence. Updates must be acknowledged before they are seen.
    pub(super) fn saw(&mut self, kind: Kind, good: bool, began: Moment, ended: Moment) {
        let last = self.last_acknowledged();
        let slot = &mut self.lasting[kind as usize];
        match (slot.take(), good) {
            (None, true) => {}
            (None, false) => {
                let last_before = (kind == Kind::Update && last > 0).then_some(last);
                *slot = Some(Lasting { from: began, last_before });
            }
            (Some(lasting), false) => *slot = Some(lasting),
            (Some(lasting), true) => {
                let first_after = (kind == Kind::Update).then_some(last);
                self.over(kind, lasting, ended, false, first_after);
            }
        }
    }

    fn over(&mut self, kind: Kind, lasting: Lasting, end: Moment, unfinished: bool, first_after: Option<u64>) {
        let ms = millis(end.boot.since(lasting.from.boot));
        let longest = &mut self.longest_ms[kind as usize];
        *longest = ms.max(*longest);
        if self.outages.len() >= MAX_OUTAGES {
            self.outages_unlisted += 1;
            return;
        }
        let (from, to, last_before) = (lasting.from.wall, end.wall, lasting.last_before);
        self.outages.push(Outage { kind, from, to, ms, unfinished, last_before, first_after });
    }

    /// The acknowledged numbers that are not among `present`, which rises.
    pub(super) fn missing(&self, present: &[u64]) -> Vec<u64> {
        let numbers = self.runs.iter().flat_map(|(from, to)| *from..=*to);
        numbers.filter(|n| present.binary_search(n).is_err()).collect()
    }

    pub(super) fn finish(mut self, now: Moment, ticks: u64, lost: LostWrites) -> Summary {
        for kind in Kind::ALL {
            if let Some(lasting) = self.lasting[kind as usize].take() {
                self.over(kind, lasting, now, true, None);
            }
        }
        self.outages.sort_by_key(|outage| (outage.from, outage.kind as usize));
        let kept: u64 = self.runs.iter().map(|(from, to)| to - from + 1).sum();
        let verified = if matches!(lost, LostWrites::Known { .. }) { kept } else { 0 };
        Summary {
            ticks,
            outages: self.outages,
            outages_unlisted: self.outages_unlisted,
            longest_ms: self.longest_ms,
            reconnects: self.reconnects,
            acknowledged: self.acknowledged,
            verified,
            refused: self.refused,
            unknown: self.number - self.acknowledged - self.refused,
            lost,
            writes: self.writes,
        }
    }
}

impl Summary {
    /// How many acknowledged writes are missing; `None` when that could not be found out.
    pub fn lost_writes(&self) -> Option<u64> {
        match &self.lost {
            LostWrites::Known { missing } => Some(missing.len() as u64),
            LostWrites::Unknown { .. } => None,
        }
    }

    /// The last object of `--json`.
    pub fn json(&self) -> Value {
        let outages = self.outages.iter().map(|outage| {
            json!({
                "kind": outage.kind.as_str(), "from": outage.from.to_string(), "to": outage.to.to_string(),
                "ms": outage.ms, "unfinished": outage.unfinished,
                "last_acknowledged_before": outage.last_before, "first_acknowledged_after": outage.first_after,
            })
        });
        let mut longest = json!({"health": self.longest_ms[0], "select": self.longest_ms[1]});
        if let (true, Some(object)) = (self.writes, longest.as_object_mut()) {
            object.insert("update".to_owned(), json!(self.longest_ms[2]));
        }
        let (missing, error) = match &self.lost {
            LostWrites::Known { missing } => (missing.iter().take(LISTED).copied().collect(), None),
            LostWrites::Unknown { why } => (Vec::new(), Some(why)),
        };
        json!({
            "summary": true, "ticks": self.ticks, "outages": outages.collect::<Vec<_>>(),
            "outages_unlisted": self.outages_unlisted, "longest_outage_ms": longest, "reconnects": self.reconnects,
            "acknowledged_writes": self.acknowledged, "verified_writes": self.verified,
            "refused_writes": self.refused, "unknown_writes": self.unknown, "lost_writes": self.lost_writes(),
            "missing": missing, "verify_error": error,
        })
    }

    /// The same for people.
    pub fn text(&self) -> String {
        let mut out = format!("\nticks: {}, reconnects: {}\n", self.ticks, self.reconnects);
        for kind in Kind::ALL {
            if kind == Kind::Update && !self.writes {
                continue;
            }
            let of_kind: Vec<&Outage> = self.outages.iter().filter(|outage| outage.kind == kind).collect();
            if of_kind.is_empty() {
                line(&mut out, format_args!("{:7} no outage", kind.as_str()));
                continue;
            }
            let longest = seconds(self.longest_ms[kind as usize]);
            let s = if of_kind.len() == 1 { "" } else { "s" };
            line(&mut out, format_args!("{:7} {} outage{s}, longest {longest}", kind.as_str(), of_kind.len()));
            for outage in of_kind.iter().take(LISTED) {
                outage_line(&mut out, outage);
            }
            if of_kind.len() > LISTED {
                line(&mut out, format_args!("        and {} more (--json lists them)", of_kind.len() - LISTED));
            }
        }
        if self.outages_unlisted > 0 {
            line(&mut out, format_args!("{} further outages are not listed", self.outages_unlisted));
        }
        if self.writes {
            self.write_lines(&mut out);
        }
        out
    }

    fn write_lines(&self, out: &mut String) {
        line(out, format_args!("acknowledged writes: {}", self.acknowledged));
        line(out, format_args!("refused writes:      {}", self.refused));
        line(out, format_args!("without an answer:   {} (they may or may not have happened)", self.unknown));
        match &self.lost {
            LostWrites::Known { missing } if missing.is_empty() => line(out, format_args!("lost writes:         0")),
            LostWrites::Known { missing } => {
                let listed: Vec<String> = missing.iter().take(LISTED).map(u64::to_string).collect();
                let more = if missing.len() > LISTED { ", ..." } else { "" };
                let listed = listed.join(", ");
                line(out, format_args!("lost writes:         {} (numbers {listed}{more})", missing.len()));
            }
            LostWrites::Unknown { why } => {
                line(out, format_args!("lost writes:         unknown, the last read failed ({why})"));
            }
        }
        if self.verified < self.acknowledged && self.lost_writes().is_some() {
            line(out, format_args!("                     of the last {} acknowledged ones", self.verified));
        }
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}

fn seconds(ms: u64) -> String {
    format!("{:.3} s", Duration::from_millis(ms).as_secs_f64())
}

fn outage_line(out: &mut String, outage: &Outage) {
    let (from, to) = (outage.from.strftime("%H:%M:%S.%3f"), outage.to.strftime("%H:%M:%S.%3f"));
    let mut text = format!("        {from} to {to}, {}", seconds(outage.ms));
    if outage.unfinished {
        text += ", not over at the end";
    }
    if let Some(n) = outage.last_before {
        text += &format!("; last acknowledged before: {n}");
    }
    if let Some(n) = outage.first_after {
        text += &format!("; first after: {n}");
    }
    line(out, format_args!("{text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Moment {
        let wall = Timestamp::from_millisecond(1_800_000_000_000 + ms).expect("in range");
        Moment { wall, boot: Instant::from_nanos(u64::try_from(ms).expect("positive") * 1_000_000) }
    }

    fn known(missing: &[u64]) -> LostWrites {
        LostWrites::Known { missing: missing.to_vec() }
    }

    #[test]
    fn an_outage_lasts_from_the_first_failed_question_to_the_first_good_answer() {
        let mut tally = Tally::new(true);
        for (ms, good) in [(0, true), (250, false), (500, false), (750, true), (1000, true)] {
            let n = tally.next_number();
            if good {
                tally.acknowledge(n);
            }
            tally.saw(Kind::Update, good, at(ms), at(ms + 10));
            tally.saw(Kind::Select, true, at(ms), at(ms + 10));
        }
        let summary = tally.finish(at(2000), 5, known(&[]));
        assert_eq!(summary.outages.len(), 1);
        let outage = &summary.outages[0];
        assert_eq!((outage.kind, outage.ms, outage.unfinished), (Kind::Update, 510, false));
        assert_eq!((outage.last_before, outage.first_after), (Some(1), Some(4)));
        assert_eq!((summary.acknowledged, summary.unknown, summary.longest_ms), (3, 2, [0, 0, 510]));
    }

    #[test]
    fn an_outage_at_the_end_is_not_forgotten() {
        let mut tally = Tally::new(false);
        tally.saw(Kind::Health, false, at(100), at(200));
        let summary = tally.finish(at(900), 1, known(&[]));
        assert_eq!((summary.outages[0].ms, summary.outages[0].unfinished), (800, true));
        assert!(summary.text().contains("not over at the end"));
        assert!(!summary.text().contains("update"));
    }

    #[test]
    fn only_acknowledged_numbers_can_be_missing() {
        let mut tally = Tally::new(true);
        tally.number = 9;
        for n in [1, 2, 3, 6, 7, 9] {
            tally.acknowledge(n);
        }
        assert_eq!(tally.missing(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), [0u64; 0]);
        assert_eq!(tally.missing(&[1, 4, 5, 7]), [2, 3, 6, 9]);
        tally.forget_up_to(2);
        assert_eq!((tally.missing(&[]), tally.first_kept()), (vec![3, 6, 7, 9], 3));
        let summary = tally.finish(at(1), 9, known(&[3, 6]));
        assert_eq!((summary.acknowledged, summary.verified, summary.lost_writes()), (6, 4, Some(2)));
        assert!(summary.text().contains("lost writes:         2 (numbers 3, 6)"), "{}", summary.text());
    }

    #[test]
    fn what_could_not_be_verified_is_not_called_zero() {
        let mut tally = Tally::new(true);
        let n = tally.next_number();
        tally.acknowledge(n);
        let summary = tally.finish(at(1), 1, LostWrites::Unknown { why: "refused".to_owned() });
        assert_eq!(summary.json()["lost_writes"], Value::Null);
        assert!(summary.text().contains("unknown"));
    }
}
