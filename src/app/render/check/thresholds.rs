//! `--warning` and `--critical` of `check`: ranges as the Monitoring Plugins' guidelines write them, and the
//! performance data that goes with them.
//!
//! | range | alerts when the value is |
//! |---|---|
//! | `10` | below 0 or above 10 |
//! | `10:` | below 10 |
//! | `~:10` | above 10 |
//! | `10:20` | below 10 or above 20 |
//! | `@10:20` | from 10 to 20 |

use super::Level;
use crate::base::time::Duration;
use crate::engine::status::{Role, Snapshot};
use std::fmt::{self, Write as _};
use std::str::FromStr;

/// What has a threshold; all of them are in the performance data where there is a value.
const METRICS: [&str; 7] =
    ["lease", "sessions", "waiting", "witness_age", "peer_age", "replication_delay", "replication_delay_seconds"];

/// One range.
#[derive(Debug, Clone, PartialEq)]
pub struct Range {
    low: f64,
    high: f64,
    /// `@`: alerts inside.
    inside: bool,
    /// As it was written.
    text: String,
}

impl FromStr for Range {
    type Err = String;
    fn from_str(text: &str) -> Result<Range, String> {
        let bad = || format!("{} is no range; write 10, 10:, ~:10, 10:20 or @10:20", text.escape_debug());
        let (inside, body) = text.strip_prefix('@').map_or((false, text), |body| (true, body));
        let (low, high) = match body.split_once(':') {
            None => ("0", body),
            Some((low, high)) => (if low.is_empty() { "0" } else { low }, if high.is_empty() { "inf" } else { high }),
        };
        let number = |text: &str| {
            let plain = text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-'));
            text.parse::<f64>().ok().filter(|_| plain || text == "inf")
        };
        let low = if low == "~" { f64::NEG_INFINITY } else { number(low).ok_or_else(bad)? };
        let high = number(high).ok_or_else(bad)?;
        // "inf" is ours, for what is left out.
        if low > high || body.contains("inf") {
            return Err(bad());
        }
        Ok(Range { low, high, inside, text: text.to_owned() })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Range {
    fn alerts(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value) == self.inside
    }
}

/// A threshold as it is written on the command line: `replication_delay=16000000`.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    metric: &'static str,
    range: Range,
}

impl FromStr for Threshold {
    type Err = String;
    fn from_str(text: &str) -> Result<Threshold, String> {
        let (metric, range) = text.split_once('=').ok_or("write METRIC=RANGE, as in replication_delay=16000000")?;
        let known = METRICS.iter().find(|known| **known == metric);
        let metric = known.ok_or_else(|| format!("{} is none of {}", metric.escape_debug(), METRICS.join(", ")))?;
        Ok(Threshold { metric, range: range.parse()? })
    }
}

/// What a person wants to be told of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Thresholds {
    pub warning: Vec<Threshold>,
    pub critical: Vec<Threshold>,
}

/// One value of a snapshot.
pub(super) struct Value {
    metric: &'static str,
    number: f64,
    /// As performance data writes it, with its unit.
    text: String,
    /// The thresholds mean it: the lease of a node that is not active is none.
    counts: bool,
}

/// Milliseconds as seconds with two decimals, which is how performance data is read.
fn seconds(metric: &'static str, ms: u64) -> Value {
    let text = format!("{}.{:02}s", ms / 1000, ms % 1000 / 10);
    Value { metric, number: Duration::from_millis(ms).as_secs_f64(), text, counts: true }
}

fn count(metric: &'static str, number: u64, unit: &str) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "a threshold is no more exact")]
    let value = number as f64;
    Value { metric, number: value, text: format!("{number}{unit}"), counts: true }
}

/// Every value that there is, in the order in which it is told.
pub(super) fn values(snapshot: &Snapshot) -> Vec<Value> {
    let lease = seconds("lease", snapshot.gate.lease_remaining_ms);
    let mut all = vec![
        Value { counts: snapshot.role == Role::Active, ..lease },
        count("sessions", snapshot.gate.sessions, ""),
        count("waiting", snapshot.gate.waiting, ""),
        count("epoch", snapshot.epoch, ""),
    ];
    if let Some(age) = snapshot.witness.as_ref().and_then(|witness| witness.age_ms) {
        all.push(seconds("witness_age", age));
    }
    if let Some(age) = snapshot.peer.as_ref().and_then(|peer| peer.age_ms) {
        all.push(seconds("peer_age", age));
    }
    // Of a standby that is away no row tells: it counts from where it was last seen, and is not 0 bytes behind.
    let away = snapshot.lag.as_ref().map(|lag| lag.bytes);
    if let Some(delay) = snapshot.nodes.iter().filter_map(|row| row.replication_delay_bytes).chain(away).max() {
        all.push(count("replication_delay", delay, "B"));
    }
    let delays = snapshot.nodes.iter().filter_map(|row| row.replication_delay_seconds);
    if let Some(delay) = delays.reduce(f64::max) {
        let text = format!("{delay:.2}s");
        all.push(Value { metric: "replication_delay_seconds", number: delay, text, counts: true });
    }
    all
}

impl Thresholds {
    fn of<'a>(all: &'a [Threshold], metric: &str) -> Option<&'a Range> {
        // The last one counts, as with other options.
        all.iter().rfind(|threshold| threshold.metric == metric).map(|threshold| &threshold.range)
    }

    /// What is beyond a threshold, at the worse of its levels.
    pub(super) fn findings(&self, values: &[Value]) -> Vec<(Level, String)> {
        let levels = [(Level::Critical, &self.critical), (Level::Warning, &self.warning)];
        let finding = |value: &Value| {
            let beyond = |(level, all): &(Level, &Vec<Threshold>)| {
                let range = Thresholds::of(all, value.metric)?;
                range.alerts(value.number).then(|| {
                    let place = if range.inside { "inside" } else { "outside" };
                    (*level, format!("{} is {}, {place} of {range}", value.metric, value.text))
                })
            };
            levels.iter().find_map(beyond).filter(|_| value.counts)
        };
        values.iter().filter_map(finding).collect()
    }

    /// Performance data: `label=value[UOM];warn;crit;min`.
    pub(super) fn performance(&self, values: &[Value]) -> String {
        let mut out = String::new();
        for value in values {
            let separator = if out.is_empty() { "" } else { " " };
            let range = |all| Thresholds::of(all, value.metric).map(ToString::to_string).unwrap_or_default();
            let (warning, critical) = (range(&self.warning), range(&self.critical));
            let _never_fails = write!(out, "{separator}{}={};{warning};{critical};0", value.metric, value.text);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_guidelines() {
        let table = [
            ("10", &[-1.0, 10.5][..], &[0.0, 10.0][..]),
            ("10:", &[9.9], &[10.0, 1e9]),
            ("~:10", &[10.1], &[-5.0, 10.0]),
            ("10:20", &[9.0, 21.0], &[10.0, 20.0]),
            ("@10:20", &[10.0, 15.0, 20.0], &[9.9, 20.1]),
            (":5", &[-0.1, 5.1], &[0.0, 5.0]),
            ("0.5:", &[0.4], &[0.5]),
        ];
        for (text, alerts, calm) in table {
            let range: Range = text.parse().expect(text);
            assert!(alerts.iter().all(|value| range.alerts(*value)), "{text}");
            assert!(!calm.iter().any(|value| range.alerts(*value)), "{text}");
            assert_eq!(range.to_string(), text);
        }
        for text in ["", "@", ":x", "20:10", "1:2:3", "1e3", "inf", "0:inf", "nan", "~", "10%"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
    }
}
