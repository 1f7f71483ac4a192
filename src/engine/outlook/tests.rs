//! Tables: what a failover would cost, what is to be typed next, and how the ledger counts.

use super::*;
use serde_json::{Value, json};
use std::time::Duration;

fn facts(standing: Standing) -> Facts {
    Facts {
        active: "alp".parse().expect("a name"),
        taker: "midna".parse().expect("a name"),
        serving: Serving::Heard,
        provable: true,
        standing,
    }
}

#[test]
fn only_proof_is_called_safe() {
    let since = || "12:01:03".to_owned();
    let why = || "the record says sync=midna: no acknowledged write is missing".to_owned();
    let table = [
        (Standing::InSync, true, "if alp died now, nothing would be lost: midna has all"),
        (Standing::TakerLosesNothing(why()), true, "if alp died now, nothing would be lost: the record says"),
        (Standing::Alone { since: since() }, false, "if alp died now, what was acknowledged since 12:01:03 would be"),
        (Standing::CommitsWait { since: since() }, false, "what would be lost if alp died now is not known: commits"),
        (Standing::NotInSync, false, "what would be lost if alp died now is not known: midna is not proven"),
        (Standing::Asynchronous, false, "if alp died now, the last transactions might be lost"),
        (Standing::TakerMayLose("alone".into()), false, "if alp died now, data might be lost: alone"),
        (Standing::CannotTakeOver("no data".into()), false, "if alp died now, midna could not take over: no data"),
        (Standing::NoRecord, false, "what would be lost if alp died now is not known: the witness does not answer"),
        (Standing::Moving("rejoin".into()), false, "what a failover would lose is not known while a rejoin"),
        (Standing::NoOtherNode, false, "if alp died now, there is no other node"),
    ];
    for (standing, safe, text) in table {
        let said = outlook(&facts(standing.clone()));
        assert_eq!((said.safe, said.lost), (safe, safe.then_some(0)), "{standing:?}");
        assert!(said.text.starts_with(text), "{standing:?}: {}", said.text);
    }
    let nobody = outlook(&Facts { serving: Serving::Nobody, ..facts(Standing::TakerLosesNothing("why".into())) });
    assert_eq!(nobody.text, "nobody is known to serve; if midna were promoted now, nothing would be lost: why");
    let unproven = outlook(&Facts { provable: false, ..facts(Standing::InSync) });
    assert!(unproven.safe && unproven.text.contains("--accept-data-loss"), "{unproven:?}");
    let dead = outlook(&Facts { serving: Serving::Silent, ..facts(Standing::NoRecord) });
    assert_eq!(
        dead.text,
        "alp does not answer; what a failover now would lose is not known: the witness does not answer, and midna \
         needs it"
    );
    let dead = outlook(&Facts { serving: Serving::Silent, ..facts(Standing::TakerLosesNothing("all is here".into())) });
    assert_eq!(dead.text, "alp does not answer; in a failover now, nothing would be lost: all is here");
}

/// alp, active, in sync with midna; the patch goes over it, deep.
fn snapshot(patch: Value) -> Snapshot {
    let row = |id: u32, name: &str, role: &str| {
        let standby = role == "standby";
        json!({"node_id": id, "name": name, "hostname": "h", "port": 1, "status": "up", "role": role, "weight": 0.5,
            "attached": true, "replication_delay_bytes": 0, "replication_state": standby.then_some("streaming"),
            "sync_state": null, "select_count": 0})
    };
    let mut all = json!({
        "node": "alp", "version": "0", "role": "active", "epoch": 2, "vip": null, "vips": [],
        "witness": {"mode": "update", "points_at": "alp", "epoch": 2, "age_ms": 1,
            "servers": [{"server": "s", "verdict": "here", "age_ms": 1, "error": null}]},
        "gate": {"open": true, "state": "open", "reason": null, "lease_remaining_ms": 1, "sessions": 0},
        "peer": {"name": "midna", "reachable": true, "role": "passive", "epoch": 2, "age_ms": 1},
        "procedure": null, "events": [], "advice": null,
        "nodes": {"a": row(0, "alp", "primary"), "b": row(1, "midna", "standby")},
        "replication": {"mode": "synchronous", "in_sync": true, "alone_since": null, "timeline": 1, "lsn": "0/1000"},
        "postgres": {"up": true, "role": "primary", "error": null, "streaming": false},
        "journal": {"refused": 0, "won": 0, "complete": 0, "fence": 0}, "next_xid": 700,
        "counters": {"gate_openings": 0, "gate_cuts": 0, "witness_proofs": 0, "peer_pledges": 0,
            "witness_silent": 0, "peer_refused_connections": 0, "sessions_total": 0, "auth_failures": 0},
    });
    lay_over(&mut all, patch);
    let nodes: Vec<Value> = all["nodes"].as_object().expect("rows").values().cloned().collect();
    all["nodes"] = nodes.into();
    serde_json::from_value(all).expect("a snapshot")
}

fn lay_over(below: &mut Value, patch: Value) {
    match (below, patch) {
        (Value::Object(below), Value::Object(patch)) => {
            for (key, value) in patch {
                lay_over(below.entry(key).or_insert(Value::Null), value);
            }
        }
        (below, patch) => *below = patch,
    }
}

fn passive() -> Value {
    json!({"node": "midna", "role": "passive", "gate": {"open": false, "state": "shut", "reason": "alp is active"},
        "peer": {"name": "alp", "role": "active"}, "next_xid": null,
        "postgres": {"role": "standby", "streaming": true}})
}

fn over(mut below: Value, patch: Value) -> Value {
    lay_over(&mut below, patch);
    below
}

/// What it is, the patch over a healthy pair, and the command with the node to type it on.
type Case = (&'static str, Value, Option<(&'static str, &'static str)>);

#[test]
fn every_state_has_its_next_command() {
    let gone = || json!({"nodes": {"b": {"status": "down", "replication_state": null}}});
    let table: Vec<Case> = vec![
        ("in sync", json!({}), None),
        ("passive", passive(), None),
        ("hung", json!({"turn_running": false}), Some(("journalctl -u portcullis -n 50", "alp"))),
        (
            "switching",
            json!({"procedure": {"kind": "promote", "id": 1, "step": "waiting", "since": ""}, "maintenance": true}),
            Some(("portcullis status --watch", "alp")),
        ),
        (
            "conflict",
            json!({"vips": [{"address": "192.0.2.100/24", "bound": false, "conflict": "02:00:00:00:00:09"}]}),
            Some(("portcullis doctor", "alp")),
        ),
        (
            "fenced, the other serves",
            json!({"role": "fenced", "gate": {"open": false, "state": "fenced"},
                "advice": "portcullis rejoin alp    (bring this node back as standby)"}),
            Some(("portcullis rejoin alp", "alp")),
        ),
        (
            "fenced, the other does not serve",
            json!({"role": "fenced", "gate": {"open": false, "state": "fenced"},
                "advice": "portcullis promote    (on midna: it is named by the record but does not serve)"}),
            Some(("portcullis promote", "midna")),
        ),
        (
            "half-way",
            json!({"role": "passive", "gate": {"open": false, "state": "shut"},
                "advice": "portcullis promote    (finish the interrupted takeover)"}),
            Some(("portcullis promote", "alp")),
        ),
        (
            "both down but this one",
            over(
                passive(),
                json!({"peer": {"reachable": false},
                "advice": "portcullis promote --dry-run    (shows what a failover would do)"}),
            ),
            Some(("portcullis promote --dry-run", "midna")),
        ),
        (
            "lapsed, silence",
            json!({"role": "passive", "gate": {"open": false, "state": "lapsed", "reason": "no proof"}}),
            Some(("portcullis doctor", "alp")),
        ),
        (
            "lapsed, the record was edited",
            json!({"role": "passive", "gate": {"open": false, "state": "lapsed"},
                "advice": "put the DNS record right, or promote on the node that shall serve"}),
            Some(("portcullis promote --dry-run", "alp")),
        ),
        ("maintenance", json!({"maintenance": true}), Some(("portcullis maintenance off", "alp"))),
        (
            "paused",
            json!({"gate": {"open": false, "state": "paused", "reason": HELD}}),
            Some(("portcullis resume", "alp")),
        ),
        ("paused by name", json!({"paused_databases": ["app"]}), Some(("portcullis resume app", "alp"))),
        (
            "PostgreSQL down, the other has all",
            json!({"postgres": {"up": false}, "outlook": {"safe": true, "lost": 0, "text": ""}}),
            Some(("portcullis promote", "midna")),
        ),
        (
            "PostgreSQL down, the other has not",
            json!({"postgres": {"up": false}}),
            Some(("journalctl -u 'postgresql@*' -n 50", "alp")),
        ),
        (
            "opening",
            json!({"gate": {"open": false, "state": "shut", "reason": "not bound"}}),
            Some(("portcullis doctor", "alp")),
        ),
        ("alone, it answers", gone(), Some(("portcullis rejoin midna", "alp"))),
        (
            "alone, it does not",
            over(gone(), json!({"peer": {"reachable": false}})),
            Some(("systemctl start portcullis", "midna")),
        ),
        (
            "catching up",
            json!({"nodes": {"b": {"replication_state": "catchup"}}, "replication": {"in_sync": false}}),
            None,
        ),
        ("streams, no daemon", json!({"peer": {"reachable": false}}), Some(("systemctl start portcullis", "midna"))),
        (
            "the third is away",
            json!({"nodes": {"c": {"node_id": 2, "name": "zora", "hostname": "h", "port": 1, "status": "up",
                "role": "standby", "weight": 0.1, "attached": false, "replication_delay_bytes": null,
                "replication_state": null, "sync_state": null, "select_count": 0}}}),
            Some(("portcullis rejoin zora", "alp")),
        ),
        (
            "not streaming",
            over(passive(), json!({"postgres": {"streaming": false}})),
            Some(("portcullis rejoin midna", "midna")),
        ),
        (
            "two primaries",
            over(passive(), json!({"postgres": {"role": "primary"}})),
            Some(("portcullis rejoin midna", "midna")),
        ),
        (
            "standby down",
            over(passive(), json!({"postgres": {"up": false}})),
            Some(("journalctl -u 'postgresql@*' -n 50", "midna")),
        ),
        (
            "nobody serves",
            over(passive(), json!({"peer": {"role": "passive"}})),
            Some(("portcullis promote --dry-run", "alp")),
        ),
        ("configured differently", json!({"peer": {"same_configuration": false}}), Some(("portcullis doctor", "alp"))),
        (
            "the witness is silent",
            json!({"witness": {"servers": [{"server": "s", "verdict": "silent", "age_ms": 9, "error": "no answer"}]}}),
            Some(("portcullis doctor", "alp")),
        ),
    ];
    for (name, patch, expected) in table {
        let found = next(&snapshot(patch));
        let found = found.as_ref().map(|next| (next.command.as_str(), next.on.as_str()));
        assert_eq!(found, expected, "{name}");
    }
    let dry = next(&snapshot(over(
        passive(),
        json!({"peer": {"reachable": false},
        "advice": "portcullis promote --dry-run    (shows what a failover would do)"}),
    )));
    assert_eq!(
        dry.expect("a command").why,
        "alp does not answer: this shows what a failover would do; without --dry-run it is done"
    );
}

fn at(seconds: u64) -> Instant {
    Instant::ZERO + Duration::from_secs(seconds)
}

/// alp at this position and transaction, midna so far behind, or away.
fn step(ledger: &mut Ledger, second: u64, lsn: u64, xid: u64, delay: Option<u64>, alone: bool) -> Snapshot {
    let mut now = snapshot(json!({
        "next_xid": xid,
        "replication": {"lsn": Lsn(lsn).to_string(), "in_sync": !alone, "alone_since": alone.then_some("12:01:03")},
        "nodes": {"b": {"replication_delay_bytes": delay, "replication_state": delay.map(|_| "streaming"),
            "status": if delay.is_some() { "up" } else { "down" }}},
        "outlook": {"safe": !alone, "lost": if alone { Value::Null } else { json!(0) }, "text": "as the guard says"},
    }));
    ledger.complete(at(second), &mut now);
    now
}

#[test]
fn what_the_standby_lacks_is_counted() {
    let mut ledger = Ledger::default();
    let now = step(&mut ledger, 1, 1000, 700, Some(0), false);
    assert_eq!((now.lag.as_ref().map(|lag| (lag.bytes, lag.ms)), now.outlook.safe), (Some((0, Some(0))), true));
    // Behind by a little, and by how long.
    step(&mut ledger, 2, 2000, 710, Some(0), false);
    step(&mut ledger, 3, 3000, 720, Some(1000), false);
    let now = step(&mut ledger, 5, 4000, 730, Some(2000), false);
    assert_eq!(now.lag.as_ref().map(|lag| (lag.bytes, lag.ms)), Some((2000, Some(2000))));
    assert_eq!(now.outlook.text, "as the guard says", "in sync is in sync");
    // It catches up to 3000, goes away, and the primary goes on alone.
    step(&mut ledger, 6, 4000, 730, Some(1000), false);
    let now = step(&mut ledger, 20, 9000, 742, None, true);
    assert_eq!(now.lag.as_ref().map(|lag| (lag.bytes, lag.ms, lag.away)), Some((6000, Some(15_000), true)));
    assert_eq!((now.outlook.safe, now.outlook.lost, now.outlook.lost_bytes), (false, Some(22), Some(6000)));
    assert_eq!(
        now.outlook.text,
        "if alp died now, about 22 transactions (5.8 KiB of WAL) would be lost: alp has been alone since 12:01:03"
    );
    // It is back and has all; the record does not say so yet.
    let now = step(&mut ledger, 30, 9000, 742, Some(0), true);
    assert_eq!((now.outlook.safe, now.outlook.lost), (false, Some(0)));
    assert!(now.next.is_none(), "it needs time only");
}

#[test]
fn a_standby_whose_last_word_is_older_than_its_connection_is_counted_by_that() {
    let mut ledger = Ledger::default();
    for second in 1..60 {
        step(&mut ledger, second, second * 1000, second * 10, Some(0), false);
    }
    // Its connection is gone, and it said two seconds ago where it was.
    step(&mut ledger, 60, 60_000, 600, Some(2500), false);
    let now = step(&mut ledger, 64, 61_000, 640, None, true);
    assert_eq!((now.outlook.lost, now.outlook.lost_bytes), (Some(70), Some(3500)));
}

#[test]
fn a_daemon_that_came_too_late_does_not_guess() {
    let mut ledger = Ledger::default();
    let now = step(&mut ledger, 1, 5000, 900, None, true);
    assert_eq!((now.lag, now.outlook.lost), (None, None));
    assert_eq!(now.outlook.text, "as the guard says");
    // The standby appears, and lacks what was written before this daemon began.
    let now = step(&mut ledger, 2, 6000, 905, Some(4000), true);
    assert_eq!(now.lag.map(|lag| (lag.bytes, lag.ms)), Some((4000, None)));
    assert_eq!(now.outlook.lost, None);
}

#[test]
fn another_history_is_counted_anew_and_the_ledger_is_bounded() {
    let mut ledger = Ledger::default();
    step(&mut ledger, 1, 1000, 1, Some(0), false);
    for second in 2..20_000 {
        step(&mut ledger, second, 1000 + second, second, None, true);
    }
    assert!(ledger.marks.len() <= MARKS, "{}", ledger.marks.len());
    let now = step(&mut ledger, 20_000, 1_000_000, 20_001, None, true);
    assert_eq!(now.outlook.lost, Some(20_000), "thinning keeps the one that counts");
    let now = step(&mut ledger, 20_001, 500, 3, Some(0), false);
    assert_eq!(now.lag.map(|lag| lag.bytes), Some(0));
    assert_eq!(ledger.marks.len(), 1);
}

#[test]
fn bytes_are_short() {
    let table = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3_355_443, "3.1 MiB"), (u64::MAX, "16777215 TiB")];
    for (bytes, text) in table {
        assert_eq!(human_bytes(bytes), text);
    }
}
