//! What the claims of issue 3 about processes and PostgreSQL share: the evidence that each cut and opening
//! leaves (C20),
//! and how figures are printed.

use crate::ensure;
use crate::harness::node::Node;
use crate::harness::sys::{Fail, Outcome, millis};
use serde_json::Value;

/// Lease and poll of the lab, in milliseconds.
pub(crate) const LEASE_MS: i64 = 3000;
pub(crate) const POLL_MS: i64 = 1000;
/// Safety: nothing is acknowledged later than this after the last proof could come. An answer that left in time may be
/// read a little later.
pub(crate) const LAST_ACK_MS: i64 = LEASE_MS + 300;
/// A target with room for a slow machine: an edit of the record is seen with the next poll, and nothing passes after
/// that. The figures are in docs/safety.md.
pub(crate) const CUT_MS: i64 = 3 * POLL_MS;
/// The VIP's lifetime ends before the lease; Linux looks for what has run out once a second, and so late on a busy one.
pub(crate) const VIP_GONE_MS: i64 = LEASE_MS + 2000;
/// What had left a node before it stood still, or before it was cut, may still be on the wire, or waiting for the
/// client to be scheduled.
pub(crate) const ON_THE_WIRE: std::time::Duration = millis(500);

/// How often `make test` or a person wants something done: `PORTCULLIS_RUNS`, else the default.
pub(crate) fn runs(default: usize) -> usize {
    std::env::var("PORTCULLIS_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// C20: every cut and opening of this daemon's life left exactly one line in its log and one event, with reason, age of
/// the last proof, epoch and sessions. Returns how many of each there were.
pub(crate) fn evidence(node: &Node) -> Outcome<(usize, usize)> {
    let status = node.status()?;
    let counter = |name: &str| status.pointer(&format!("/counters/{name}")).and_then(Value::as_u64);
    let (opened, cut) = (counter("gate_openings"), counter("gate_cuts"));
    let (Some(opened), Some(cut)) = (opened, cut) else { return Err(Fail("status has no counters".to_owned())) };
    let text = std::fs::read_to_string(&node.log)?;
    let at = text.rfind(" runs as node ").ok_or("the daemon's log does not say that it started")?;
    let begun = text[..at].lines().next_back().unwrap_or_default().get(..19).unwrap_or_default();
    let life = &text[at..];
    let lines =
        |kind: &str| -> Vec<&str> { life.lines().filter(|line| line.contains(&format!("kind=\"{kind}\""))).collect() };
    let (openings, cuts) = (lines("gate_opened"), lines("gate_cut"));
    let name = node.name();
    ensure!(openings.len() as u64 == opened, "{name}: {opened} openings, but {} lines: {openings:?}", openings.len());
    ensure!(cuts.len() as u64 == cut, "{name}: {cut} cuts, but {} lines: {cuts:?}", cuts.len());
    for line in openings.iter().chain(&cuts) {
        let tells = [number_after(line, "epoch "), number_after(line, "last proof "), number_before(line, " sessions")];
        ensure!(tells.iter().all(Option::is_some), "{name}: epoch, age or sessions are missing: {line}");
        ensure!(line.contains('(') && line.contains(')'), "{name}: no reason: {line}");
    }
    for line in &cuts {
        let reason = line.split_once("): ").and_then(|(_, rest)| rest.split_once(';')).map_or("", |(reason, _)| reason);
        ensure!(!reason.trim().is_empty(), "{name}: a cut without a reason: {line}");
    }
    // The events of this life, as the command shows them: each is in the log, as often, and the other way round. In the
    // second of the start the former life may have had its last word.
    let shown: Vec<Value> = serde_json::from_str(&node.cli(&["events", "--json"])?.expect(0)?.out)?;
    let word = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let of_the_gate = shown.iter().filter(|row| word(row, "kind").starts_with("gate_"));
    let all: Vec<(String, String)> = of_the_gate.map(|row| (word(row, "at"), word(row, "text"))).collect();
    for (at, event) in all.iter().filter(|(at, _)| at.get(..19).is_some_and(|at| at > begun)) {
        let here =
            all.iter().filter(|(at, other)| other == event && at.get(..19).is_some_and(|at| at >= begun)).count();
        let there = life.matches(event.as_str()).count();
        ensure!(here == there, "{name}: {here} events, {there} lines say at {at}: {event}");
    }
    // Fifty events are shown at most; where there is room, none of this life is missing.
    if shown.len() < 50 {
        for line in openings.iter().chain(&cuts) {
            ensure!(all.iter().any(|(_, event)| line.contains(event)), "{name}: no event for: {line}");
        }
    }
    Ok((openings.len(), cuts.len()))
}

/// What this node said of its last cut.
pub(crate) fn last_cut(node: &Node) -> Outcome<String> {
    let text = std::fs::read_to_string(&node.log)?;
    let line = text.lines().rev().find(|line| line.contains("kind=\"gate_cut\"")).ok_or("no cut in the log")?;
    Ok(line.to_owned())
}

/// Sessions that the last cut of this node ended, in its own words.
pub(crate) fn sessions_of_last_cut(node: &Node) -> Outcome<u64> {
    let line = last_cut(node)?;
    number_before(&line, " sessions").ok_or_else(|| Fail(format!("no sessions in: {line}")))
}

fn number_after(line: &str, word: &str) -> Option<u64> {
    let rest = line.rsplit_once(word)?.1;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn number_before(line: &str, word: &str) -> Option<u64> {
    line.split_once(word)?.0.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
