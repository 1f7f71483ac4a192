//! `check`: the monitoring plugin's line and exit code, from one snapshot.
//!
//! It is about state only: a proper role, fresh proof, replication as configured. What would break a failover one day
//! is the doctor's. Every finding has its own level and sentence; the worst level wins, and its sentences come first.
//!
//! | state | level |
//! |---|---|
//! | active, gate open, in sync as configured | OK |
//! | active, a further standby does not stream | WARNING |
//! | active, not in sync or alone; paused, or a database of it; maintenance | WARNING |
//! | passive, standby streaming, the active peer reachable | OK |
//! | passive, peer unreachable or not streaming | WARNING |
//! | active without an open gate, lapsed, fenced, holder without proof | CRITICAL |
//! | writable without being active, nobody known to be active | CRITICAL |
//! | a value beyond `--warning` or `--critical` | that level |
//! | PostgreSQL down, or without an answer for 5 s | CRITICAL |
//! | somebody else claims the VIP, the daemon's turn does not run or nobody answers | CRITICAL |

mod thresholds;

pub use thresholds::{Range, Threshold, Thresholds};

use super::clean;
use crate::engine::status::{GateState, HELD, Role, Snapshot, VerdictWord, WitnessStatus, human_ms};

/// The levels of the monitoring plugins' interface; the number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl Level {
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Ok => "OK",
            Level::Warning => "WARNING",
            Level::Critical => "CRITICAL",
            Level::Unknown => "UNKNOWN",
        }
    }

    /// Exit code of the program.
    pub fn exit(self) -> u8 {
        self as u8
    }
}

/// The line for an answer that never came.
pub fn unanswered(text: &str) -> (Level, String) {
    (Level::Critical, format!("PORTCULLIS {} - {}\n", Level::Critical.as_str(), clean(text).replace('|', "/")))
}

/// Level and line, a newline at its end.
pub fn check(snapshot: &Snapshot, thresholds: &Thresholds) -> (Level, String) {
    let values = thresholds::values(snapshot);
    let mut findings = findings(snapshot);
    findings.extend(thresholds.findings(&values));
    // A stable sort: sentences of one level keep the order in which they were found.
    findings.sort_by_key(|(level, _)| std::cmp::Reverse(*level));
    let level = findings.first().map_or(Level::Ok, |(level, _)| *level);
    let mut words: Vec<String> = findings.into_iter().map(|(_, text)| text).collect();
    if words.is_empty() {
        words.push(summary(snapshot));
    } else {
        words.push(format!("{} {}, epoch {}", snapshot.node, snapshot.role.as_str(), snapshot.epoch));
    }
    // A bar would begin the performance data.
    let text = clean(&words.join("; ")).replace('|', "/");
    (level, format!("PORTCULLIS {} - {text} | {}\n", level.as_str(), thresholds.performance(&values)))
}

/// The line as facts: `{"status":"OK","exit":0,"text":"...","perfdata":"..."}`.
pub fn as_json(level: Level, line: &str) -> serde_json::Value {
    let line = line.trim_end();
    let line = line.strip_prefix(&format!("PORTCULLIS {} - ", level.as_str())).unwrap_or(line);
    let (text, perfdata) = line.split_once(" | ").unwrap_or((line, ""));
    serde_json::json!({"status": level.as_str(), "exit": level.exit(), "text": text, "perfdata": perfdata})
}

/// What a healthy node says of itself.
fn summary(snapshot: &Snapshot) -> String {
    let mut words = vec![format!("{} {}", snapshot.node, snapshot.role.as_str()), format!("epoch {}", snapshot.epoch)];
    if snapshot.role == Role::Active {
        words.push(format!("lease {}", human_ms(snapshot.gate.lease_remaining_ms)));
        words.push(if snapshot.replication.in_sync { "in sync" } else { "asynchronous" }.to_owned());
        if let Some(peer) = snapshot.peer.as_ref().filter(|peer| !peer.reachable) {
            words.push(format!("peer {} does not answer, the lease is the witness's", peer.name));
        }
    } else if let Some(name) = snapshot.active_node() {
        words.push(format!("streaming from {name}"));
    }
    let silent = |witness: &WitnessStatus| witness.servers.iter().all(|server| server.verdict == VerdictWord::Silent);
    if snapshot.witness.as_ref().is_some_and(silent) {
        words.push("the witness is silent".to_owned());
    }
    words.join(", ")
}

fn findings(snapshot: &Snapshot) -> Vec<(Level, String)> {
    let mut found = Vec::new();
    let node = &snapshot.node;
    let reason = snapshot.gate.reason.as_deref().unwrap_or("no reason given");
    if !snapshot.turn_running {
        found.push((Level::Critical, "the daemon's turn does not run".to_owned()));
    }
    for vip in &snapshot.vips {
        if let Some(mac) = &vip.conflict {
            found.push((Level::Critical, format!("the VIP {} is claimed by {mac} too", vip.address)));
        }
    }
    if snapshot.maintenance {
        found.push((Level::Warning, "maintenance is on: PostgreSQL here is left alone".to_owned()));
    }
    match (snapshot.role, snapshot.gate.state) {
        (Role::Fenced, _) | (_, GateState::Fenced) => {
            found.push((Level::Critical, format!("{node} is fenced: {reason}")))
        }
        (_, GateState::Lapsed) => found.push((Level::Critical, format!("{node} has lapsed: {reason}"))),
        (Role::Active, state) => active(snapshot, state, reason, &mut found),
        (Role::Passive, _) => passive(snapshot, reason, &mut found),
    }
    if !snapshot.postgres.up {
        let error = snapshot.postgres.error.as_deref().unwrap_or("no answer");
        found.push((Level::Critical, format!("PostgreSQL is down: {error}")));
    } else if let Some(since) = &snapshot.postgres.hangs_since {
        found.push((Level::Critical, format!("PostgreSQL does not answer since {since}")));
    }
    found
}

fn active(snapshot: &Snapshot, state: GateState, reason: &str, found: &mut Vec<(Level, String)>) {
    match state {
        GateState::Open if !snapshot.paused_databases.is_empty() => {
            let names = snapshot.paused_databases.join(", ");
            found.push((Level::Warning, format!("paused by name: clients of {names} wait")));
        }
        GateState::Open => {}
        // PostgreSQL is back, and not yet judged.
        GateState::Paused if snapshot.postgres.up && snapshot.gate.reason.as_deref().is_some_and(|why| why != HELD) => {
            found.push((Level::Warning, format!("paused: clients wait: {reason}")));
        }
        GateState::Paused => found.push((Level::Warning, "paused: clients wait".to_owned())),
        GateState::Shut | GateState::Lapsed | GateState::Fenced => {
            // Nobody is served, perhaps for good: a VIP that was removed by hand stays off until a promote.
            found.push((Level::Critical, format!("the gate is not open: {reason}")));
        }
    }
    if snapshot.postgres.up && snapshot.postgres.role.as_deref() == Some("standby") {
        found.push((Level::Critical, "active, but PostgreSQL here is a standby".to_owned()));
    }
    // Of the peer the sentences below speak.
    let further = snapshot
        .nodes
        .iter()
        .filter(|row| row.name != snapshot.node && snapshot.peer.as_ref().is_some_and(|peer| peer.name != row.name));
    for row in further.filter(|row| row.replication_state.as_deref() != Some("streaming")) {
        found.push((Level::Warning, format!("the further standby {} is not streaming", row.name)));
    }
    let replication = &snapshot.replication;
    if let Some(since) = &replication.alone_since {
        found.push((Level::Warning, format!("alone since {since}: what came after would be lost in a failover")));
    } else if let Some(since) = &replication.waiting_since {
        found.push((Level::Warning, format!("commits wait: the standby has been silent since {since}")));
    } else if snapshot.postgres.hangs_since.is_some() {
        // Nobody knows what streams from it.
    } else if replication.mode == "synchronous" && !replication.in_sync {
        found.push((Level::Warning, "replication is not in sync".to_owned()));
    } else if replication.mode != "synchronous" && !any_standby_streams(snapshot) {
        found.push((Level::Warning, "no standby is streaming".to_owned()));
    }
}

fn any_standby_streams(snapshot: &Snapshot) -> bool {
    snapshot.nodes.iter().any(|row| row.role == "standby" && row.replication_state.as_deref() == Some("streaming"))
}

fn passive(snapshot: &Snapshot, reason: &str, found: &mut Vec<(Level, String)>) {
    let node = &snapshot.node;
    let points_at = snapshot.witness.as_ref().and_then(|witness| witness.points_at.as_ref());
    let peer_active = snapshot.active_node().is_some();
    if points_at == Some(node) && !peer_active {
        found.push((Level::Critical, format!("the record names {node}, which has no proof: {reason}")));
    } else if !peer_active && points_at.is_none() {
        found.push((Level::Critical, format!("nobody is known to be active: {reason}")));
    } else if let Some(peer) = &snapshot.peer {
        if !peer.reachable {
            found.push((Level::Warning, format!("the peer {} does not answer", peer.name)));
        } else if peer.role != Some(Role::Active) {
            let name = &peer.name;
            found.push((Level::Critical, format!("nobody is known to be active: {name} says that it is not")));
        }
    }
    if !snapshot.postgres.up {
        return;
    }
    if snapshot.postgres.role.as_deref() == Some("primary") {
        found.push((Level::Critical, "not active, but PostgreSQL here is a writable primary".to_owned()));
    } else if !snapshot.postgres.streaming {
        found.push((Level::Warning, "the standby is not streaming from the active node".to_owned()));
    }
    if snapshot.own_row().is_some_and(|row| !row.attached) {
        found.push((Level::Warning, "the standby is detached".to_owned()));
    }
}
