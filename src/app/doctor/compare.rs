//! What two nodes must have in common, judged on their sheets, and their clocks on the answers' times; the last drill.

use super::others::{Other, Sample};
use super::replication;
use super::sheet::{LIMITS, Sheet};
use super::{Level, Report};
use crate::app::client::DRILL_FAILED;
use crate::base::config::Config;
use crate::base::ids::NodeName;
use crate::base::time::Duration;

/// Keys that two daemons on one file system need to differ in.
const OWN_KEYS: [&str; 2] = ["state_dir", "runtime_dir"];
/// Differences that are named with their values; of more only the keys are.
const SHOWN: usize = 8;
/// Longest value that is shown.
const LONGEST: usize = 60;
/// Synchronised clocks are nearer than this.
const NEAR: f64 = 2.0;
const DRILL_DAYS: i64 = 90;
/// A pledge that takes this part of the lease to come is late.
const LATE: u32 = 4;

/// Findings that both nodes make of one fault.
pub(super) const TWICE: [&str; 4] = ["config.pledge", "peer.version", "peer.nodes", "pg.identity"];

/// What is in the catalogs, which a standby has from its primary: told once, for the primary.
const IN_CATALOGS: [&str; 6] =
    ["commit.lowered", "commit.cancel", "data.unlogged", "rejoin.grants", "repl.role", "login.md5"];

/// Takes out what a standby says again.
pub(super) fn once(sheets: &[Sheet], report: &mut Report) {
    let standby = |node: &str| sheets.iter().any(|sheet| sheet.node == node && sheet.in_recovery == Some(true));
    let primaries: Vec<(String, String)> = report
        .findings
        .iter()
        .filter(|finding| IN_CATALOGS.contains(&finding.check.as_str()) && !standby(&finding.node))
        .map(|finding| (finding.check.clone(), finding.text.clone()))
        .collect();
    report.findings.retain(|finding| {
        let again = primaries.iter().any(|(check, text)| *check == finding.check && *text == finding.text);
        !(again && standby(&finding.node))
    });
}

pub(super) fn pair(config: &Config, own: &Sheet, other: &Sheet, report: &mut Report) {
    let name = &other.node;
    report.checked(format!("what this node and {name} must have in common"));
    keys(own, other, report);
    for (key, print) in &own.secrets {
        if other.secrets.get(key).is_some_and(|theirs| theirs != print) {
            let text = format!("{key} holds something else on {name} than here");
            let remedy = "copy the right one to the other node with its owner and mode, then restart that daemon";
            report.find(Level::Critical, "secret.differs", text, remedy);
        }
    }
    if own.version != other.version && !report.findings.iter().any(|finding| finding.check == "peer.version") {
        let text = format!("{name}'s daemon is version {}, this program {}", other.version, own.version);
        report.find(Level::Warning, "peer.version", text, "finish the upgrade on both nodes");
    }
    cluster(own, other, report);
    // A node without a running PostgreSQL does not know how large a copy would be.
    let need =
        |sheet: &Sheet, from: &Sheet| (sheet.bytes.is_none() && from.bytes.is_some()).then_some(from.bytes).flatten();
    for (sheet, from) in [(own, other), (other, own)] {
        if let (Some(bytes), Some(node)) = (need(sheet, from), sheet.name().and_then(|name| config.node(&name))) {
            replication::room(node, Some(bytes), sheet.free, report);
        }
    }
}

fn keys(own: &Sheet, other: &Sheet, report: &mut Report) {
    let name = &other.node;
    let differs = |key: &str| own.config.get(key) != other.config.get(key);
    let mut keys: Vec<&String> = own.config.keys().chain(other.config.keys()).collect();
    keys.sort();
    keys.dedup();
    let both = |key: &str| own.config.contains_key(key) && other.config.contains_key(key);
    keys.retain(|key| {
        // Sections that one has and the other not, and nodes of other names, are told as one.
        let whole = key.split('.').next().is_some_and(|section| section != key.as_str() && differs(section));
        let of_version = own.version != other.version && !both(key) && key.contains('.');
        differs(key) && !whole && !of_version && !OWN_KEYS.contains(&key.as_str())
    });
    if keys.is_empty() {
        return;
    }
    let value = |sheet: &Sheet, key: &str| match sheet.config.get(key) {
        None => "not there".to_owned(),
        Some(_) if Config::is_veiled(key) => "(not shown)".to_owned(),
        Some(value) if value.chars().count() > LONGEST => {
            format!("{}...", value.chars().take(LONGEST).collect::<String>())
        }
        Some(value) => value.clone(),
    };
    let mut lines: Vec<String> = keys
        .iter()
        .take(SHOWN)
        .map(|key| format!("{key}: {} here, {} on {name}", value(own, key), value(other, key)))
        .collect();
    if keys.len() > SHOWN {
        lines.push(format!("and {}", keys[SHOWN..].iter().map(|key| key.as_str()).collect::<Vec<_>>().join(", ")));
    }
    let told = if keys.len() == 1 { "1 key differs".to_owned() } else { format!("{} keys differ", keys.len()) };
    let text = format!("{told}: {}", lines.join("; "));
    let remedy = "one file serves both nodes: copy the right one over the other, `portcullis check-config`, then \
                  `portcullis reload`, or a restart of the passive node's daemon first";
    report.find(Level::Warning, "config.differs", text, remedy);
}

fn cluster(own: &Sheet, other: &Sheet, report: &mut Report) {
    let (me, name) = (&own.node, &other.node);
    if let (Some(ours), Some(theirs)) = (&own.system_id, &other.system_id)
        && ours != theirs
        && !report.findings.iter().any(|finding| finding.check == "pg.identity")
    {
        let text =
            format!("{name}'s PostgreSQL has the system identifier {theirs}, this node's {ours}: they are no pair");
        let remedy = "find out which data is the right one; then portcullis rejoin on the node of the other";
        report.find(Level::Critical, "pg.identity", text, remedy);
    }
    if let (Some(ours), Some(theirs)) = (own.postgres, other.postgres)
        && ours != theirs
    {
        let (level, what) = match ours / 10_000 == theirs / 10_000 {
            true => (Level::Advice, "another minor version"),
            false => (Level::Critical, "another major version, which cannot replicate"),
        };
        let text = format!("{name} runs PostgreSQL {}, this node {}: {what}", number(theirs), number(ours));
        let remedy = "bring both to one release; the standby first, then a switchover, then the other";
        report.find(level, "pg.version", text, remedy);
    }
    // The standby replays what the primary's limits allow; after a failover the two change places.
    for limit in LIMITS {
        let (Some(&ours), Some(&theirs)) = (own.limits.get(limit), other.limits.get(limit)) else { continue };
        if ours == theirs {
            continue;
        }
        let (low, high) = if ours < theirs { (own, other) } else { (other, own) };
        let (least, most) = (ours.min(theirs), ours.max(theirs));
        let standby = low.in_recovery == Some(true);
        let (level, then) = match standby {
            true => (Level::Critical, "'s replay may stop, and it does not start again"),
            false => (Level::Warning, " cannot follow after a failover"),
        };
        let text = format!("{limit} is {least} on {0} and {most} on {1}: {0}{then}", low.node, high.node);
        let remedy = format!("in postgresql.conf of {}, then restart its PostgreSQL:\n{limit} = {most}", low.node);
        report.find(level, "pg.standby-limits", text, remedy);
    }
    if let (Some(ours), Some(theirs)) = (&own.preload, &other.preload)
        && ours != theirs
    {
        let text = format!("shared_preload_libraries is '{ours}' on {me} and '{theirs}' on {name}");
        let remedy = "make it the same in postgresql.conf of both, with the packages installed; it needs a restart";
        report.find(Level::Warning, "pg.library", text, remedy);
    }
}

/// `150006` is 15.6.
fn number(version: u32) -> String {
    format!("{}.{}", version / 10_000, version % 10_000)
}

pub(super) fn unasked(name: &NodeName, why: &str, report: &mut Report) {
    report.unchecked(format!("all of {name}"), why.to_owned());
    // The local daemon says the same, with what to do.
    if report.findings.iter().any(|finding| finding.check == "peer.unreachable" && finding.text.contains(name.as_str()))
    {
        return;
    }
    let text = format!("{name} could not be looked at: {why}");
    let remedy = format!(
        "start its daemon, and let the peer channel pass; else run there:\nportcullis doctor --here   # on {name}"
    );
    report.find(Level::Warning, "peer.unasked", text, remedy);
}

/// Offset, rate and round trip from the times of its answers.
pub(super) fn clocks(config: &Config, other: &Other, report: &mut Report) {
    let name = &other.name;
    let Some(best) = other.samples.iter().min_by_key(|sample| sample.round_trip()) else { return };
    report.checked(format!("{name}'s clock and the round trip to it"));
    let round_trip = best.round_trip();
    if round_trip > config.fence.lease / LATE {
        let text = format!("a round trip to {name} takes {} ms", round_trip.as_millis());
        report.find(Level::Warning, "peer.slow", text, "look at the line between the nodes, or lengthen fence.lease");
    }
    let offset = best.offset();
    if offset.abs() - round_trip.as_secs_f64() / 2.0 > NEAR {
        let way = if offset > 0.0 { "ahead of" } else { "behind" };
        let text = format!("{name}'s clock is {:.1} s {way} this node's", offset.abs());
        report.find(Level::Advice, "clock.offset", text, "synchronise both clocks: timedatectl set-ntp true");
    }
    let Some((rate, doubt)) = rate(&other.samples) else {
        return report.unchecked(format!("how fast {name}'s clock runs"), "it could be asked once only");
    };
    if rate.abs() - doubt > config.fence.max_drift {
        let text = format!(
            "{name}'s clock runs {:.1} % {} than this node's; fence.max_drift allows {:.1} %",
            rate.abs() * 100.0,
            if rate > 0.0 { "faster" } else { "slower" },
            config.fence.max_drift * 100.0
        );
        let remedy = "one of the machines counts time wrongly: look at its clock source and its hypervisor; do not \
                      fail over without --peer-is-off before that";
        report.find(Level::Critical, "clock.rate", text, remedy);
    }
}

/// How much faster the other clock runs, and by how much that may be wrong: both answers may have been given at any
/// moment of their round trips.
fn rate(samples: &[Sample]) -> Option<(f64, f64)> {
    let half = samples.len() / 2;
    let (early, late) = samples.split_at(half);
    let best = |all: &[Sample]| all.iter().min_by_key(|sample| sample.round_trip()).copied();
    let (first, last) = (best(early)?, best(late)?);
    let ours = last.middle().since(first.middle()).as_secs_f64();
    let theirs = last.theirs_boot.saturating_sub(first.theirs_boot).as_secs_f64();
    if ours < Duration::from_millis(500).as_secs_f64() {
        return None;
    }
    let doubt = (first.round_trip() + last.round_trip()).as_secs_f64() / 2.0 / ours;
    Some((theirs / ours - 1.0, doubt))
}

/// A switchover that was never tried is a hope. The newest drill of all nodes counts: it is on record where it was
/// given.
pub(super) fn drill(config: &Config, sheets: &[Sheet], now: jiff::Timestamp, report: &mut Report) {
    let voter = |sheet: &Sheet| sheet.name().and_then(|name| config.node(&name)).is_some_and(|node| node.voter);
    if !sheets.first().is_some_and(voter) {
        return;
    }
    report.checked("the last drill");
    let newest = sheets
        .iter()
        .filter_map(|sheet| Some((sheet, sheet.last_drill.as_ref()?)))
        .max_by_key(|(_, row)| row.at.clone());
    let asked = sheets.iter().filter(|sheet| voter(sheet)).count() == 2;
    let (text, remedy) = match newest {
        None if asked => ("no drill is on record on either node".to_owned(), "portcullis drill"),
        None => ("no drill is on record here; the other node could not be asked".to_owned(), "portcullis drill"),
        Some((sheet, row)) if row.text.starts_with(DRILL_FAILED) => {
            (format!("{} on {}: {}", row.at, sheet.node, row.text), "mend what it says, then: portcullis drill")
        }
        Some((sheet, row)) => match days(&row.at, now) {
            Some(days) if days > DRILL_DAYS => {
                (format!("the last drill was {days} days ago, on {}", sheet.node), "portcullis drill")
            }
            _ => return,
        },
    };
    report.find(Level::Advice, "pair.drill", text, remedy);
}

/// Whole days from `at` until now.
pub(super) fn days(at: &str, now: jiff::Timestamp) -> Option<i64> {
    let at: jiff::Timestamp = at.parse().ok()?;
    Some((now.as_second() - at.as_second()) / 86_400)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Instant;
    use crate::engine::status::EventRow;
    use std::path::Path;

    fn config() -> Config {
        Config::parse(&Config::example(), Path::new("example")).expect("the example parses")
    }

    fn sheet(node: &str) -> Sheet {
        Sheet {
            node: node.into(),
            version: "1".into(),
            config: config().sheet(),
            secrets: [("dns.tsig_key_file".to_owned(), "aa".to_owned())].into(),
            system_id: Some("7".into()),
            postgres: Some(150_006),
            in_recovery: Some(node == "midna"),
            limits: LIMITS.iter().map(|name| ((*name).to_owned(), 10)).collect(),
            preload: Some(String::new()),
            bytes: Some(1 << 30),
            free: Some(1 << 40),
            ..Sheet::default()
        }
    }

    fn judged(other: &Sheet) -> Vec<(Level, String, String)> {
        let mut report = Report::default();
        pair(&config(), &sheet("alp"), other, &mut report);
        report.findings.into_iter().map(|f| (f.level, f.check, format!("{} -> {}", f.text, f.remedy))).collect()
    }

    #[test]
    fn each_difference_of_the_two_is_found_alone() {
        assert_eq!(judged(&sheet("midna")), []);
        type Break = fn(&mut Sheet);
        let rows: [(Level, &str, &str, Break); 9] = [
            (Level::Warning, "config.differs", "fence.margin: 500ms here, 300ms on midna", |s| {
                s.config.insert("fence.margin".into(), "300ms".into());
            }),
            (Level::Warning, "config.differs", "fence.stonith: (not shown) here", |s| {
                s.config.insert("fence.stonith".into(), "0011".into());
            }),
            (Level::Critical, "secret.differs", "dns.tsig_key_file", |s| {
                s.secrets.insert("dns.tsig_key_file".into(), "bb".into());
            }),
            (Level::Warning, "peer.version", "version 2", |s| s.version = "2".into()),
            (Level::Critical, "pg.identity", "no pair", |s| s.system_id = Some("8".into())),
            (Level::Critical, "pg.version", "PostgreSQL 16.1", |s| s.postgres = Some(160_001)),
            (Level::Critical, "pg.standby-limits", "max_wal_senders = 10", |s| {
                s.limits.insert("max_wal_senders".into(), 2);
            }),
            (Level::Warning, "pg.standby-limits", "of alp", |s| {
                s.limits.insert("max_connections".into(), 200);
            }),
            (Level::Warning, "rejoin.disk", "midna has 0 MiB free", |s| (s.bytes, s.free) = (None, Some(1))),
        ];
        for (level, check, words, break_it) in rows {
            let mut other = sheet("midna");
            break_it(&mut other);
            let found = judged(&other);
            assert!(
                matches!(&found[..], [(l, c, text)] if *l == level && c == check && text.contains(words)),
                "{check}: {found:?}"
            );
        }
        let mut other = sheet("midna");
        other.config.insert("state_dir".into(), "elsewhere".into());
        assert_eq!(judged(&other), [], "two daemons on one file system need this");
        other.postgres = Some(150_004);
        assert!(matches!(&judged(&other)[..], [(Level::Advice, check, _)] if check == "pg.version"));
    }

    #[test]
    fn what_a_standby_has_from_its_primary_is_told_once() {
        let mut report = Report::default();
        for check in ["rejoin.grants", "door.hba"] {
            for node in ["alp", "midna"] {
                report.find(Level::Warning, check, "the same", "do it");
                report.belongs_to(node);
            }
        }
        once(&[sheet("alp"), sheet("midna")], &mut report);
        let left: Vec<_> = report.findings.iter().map(|f| (f.check.as_str(), f.node.as_str())).collect();
        assert_eq!(left, [("rejoin.grants", "alp"), ("door.hba", "alp"), ("door.hba", "midna")]);
    }

    fn sample(at_ms: u64, trip_ms: u64, theirs_ms: u64) -> Sample {
        let at = |ms: u64| Instant::from_nanos(ms * 1_000_000);
        Sample {
            sent: at(at_ms),
            got: at(at_ms + trip_ms),
            wall_ms: i64::try_from(at_ms).expect("small") + 1_000_000,
            theirs_boot: Duration::from_millis(theirs_ms),
            theirs_wall_ms: i64::try_from(theirs_ms).expect("small") + 1_000_000,
        }
    }

    #[test]
    fn a_clock_that_runs_wrong_is_found_only_where_it_is_certain() {
        let found = |samples: Vec<Sample>| -> Vec<String> {
            let other = Other { name: "midna".parse().expect("a name"), examined: Err("x".into()), samples };
            let mut report = Report::default();
            clocks(&config(), &other, &mut report);
            report.findings.into_iter().map(|finding| finding.check).collect()
        };
        assert_eq!(found(vec![]), [""; 0]);
        assert_eq!(found(vec![sample(0, 2, 1), sample(2000, 2, 2001)]), [""; 0]);
        // 5 % too fast in two seconds.
        assert_eq!(found(vec![sample(0, 2, 1), sample(2000, 2, 2101)]), ["clock.rate"]);
        // The same may be the line's delay.
        assert_eq!(found(vec![sample(0, 200, 1), sample(2000, 200, 2101)]), [""; 0]);
        assert_eq!(found(vec![sample(0, 2, 5001), sample(2000, 2, 7001)]), ["clock.offset"]);
        let slow = crate::base::time::millis(config().fence.lease) / 2;
        assert_eq!(found(vec![sample(0, slow, slow / 2), sample(9000, slow, 9000 + slow / 2)]), ["peer.slow"]);
    }

    #[test]
    fn the_newest_drill_of_both_nodes_counts() {
        let now: jiff::Timestamp = "2026-11-22T00:00:00Z".parse().expect("a time");
        let row = |at: &str, text: &str| Some(EventRow { at: at.into(), kind: "drill".into(), text: text.into() });
        let found = |a: Option<EventRow>, b: Option<EventRow>| -> Vec<String> {
            let sheets = [Sheet { last_drill: a, ..sheet("alp") }, Sheet { last_drill: b, ..sheet("midna") }];
            let mut report = Report::default();
            drill(&config(), &sheets, now, &mut report);
            report.findings.into_iter().map(|finding| finding.text).collect()
        };
        let good = || row("2026-11-20T00:00:00Z", "drill: alp to midna: 90 ms without an answer");
        assert_eq!(found(good(), None), [""; 0]);
        assert_eq!(found(None, good()), [""; 0]);
        assert!(found(None, None)[0].contains("either node"));
        assert!(found(None, row("2026-01-20T00:00:00Z", "drill: x"))[0].contains("306 days ago, on midna"));
        let failed = row("2026-11-21T00:00:00Z", &format!("{DRILL_FAILED}: the way back failed"));
        assert!(found(good(), failed)[0].contains("the way back failed"));
    }
}
