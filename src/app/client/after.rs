//! What comes after a procedure that succeeded: the front door is tried, and the next step is said in words.
//!
//! What it is NOT: it changes nothing, and the exit code is the procedure's, whatever is found here.

use super::door::Door;
use super::{Target, snapshot};
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant, millis};
use crate::engine::status::{Role, Snapshot};
use crate::io::clock;
use serde_json::{Value, json};

/// How long the front door has to answer.
const DOOR_LIMIT: Duration = Duration::from_secs(3);
/// How long a node that comes back by itself is waited for, so that the last sentence says what is.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A sentence, and its facts for programs.
pub(super) type Word = (String, Value);

/// Is this a procedure that moves the service or a node?
pub(super) fn is_procedure(verb: &str, args: &Value) -> bool {
    let dry = args.get("dry_run").and_then(Value::as_bool) == Some(true);
    !dry && matches!(verb, "promote" | "switchover" | "rejoin" | "unfence")
}

/// What is to be said now. `entered` is when the person pressed Enter.
pub(super) async fn words(target: &Target, verb: &str, entered: Instant) -> Vec<Word> {
    let mut words = Vec::new();
    if let Some(door) = target.door.as_ref().filter(|_| verb != "rejoin") {
        words.push(front_door(door, entered).await);
    }
    words.extend(settled(target).await.map(|text| (text.clone(), json!({ "next": text }))));
    words
}

async fn front_door(door: &Door, entered: Instant) -> Word {
    let found = door.answers_within(DOOR_LIMIT).await;
    let took = clock::now().since(entered);
    match found {
        Ok(at) => (
            format!("the front door answers at {at} after {:.2} s since Enter", took.as_secs_f64()),
            json!({"front_door": {"answers": true, "address": at.to_string(), "ms": millis(took), "error": null}}),
        ),
        Err(why) => (
            format!(
                "warning: the front door does not answer from here ({why}); the gate is open: look at the record, at \
                 the route and at firewalls between clients and it"
            ),
            json!({"front_door": {"answers": false, "address": null, "ms": millis(took), "error": why}}),
        ),
    }
}

/// The next step, once the other node is where it goes by itself, or the time for that is over.
async fn settled(target: &Target) -> Option<String> {
    let deadline = clock::now() + SETTLE_LIMIT;
    loop {
        let seen = snapshot(target).await.ok()?;
        let (text, final_word) = next_step(&seen);
        if final_word || clock::now() >= deadline {
            return Some(text);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// What the other node does, and what to type; and whether that will not change by itself in a moment.
pub(super) fn next_step(now: &Snapshot) -> (String, bool) {
    let Some(active) = now.active_node() else {
        return ("next: `portcullis status` says what is missing".to_owned(), false);
    };
    let peer = now.peer.as_ref();
    let other: &NodeName = match peer {
        Some(peer) if *active == now.node => &peer.name,
        Some(_) => &now.node,
        None => return (format!("{active} serves; there is no other node"), true),
    };
    if now.replication.in_sync {
        return (format!("{other} follows as synchronous standby: a failover would lose nothing"), true);
    }
    let streams = now.nodes.iter().any(|row| row.name == *other && row.role == "standby" && row.attached);
    if streams && now.replication.mode != "synchronous" {
        return (format!("{other} follows as standby; a failover may lose what was acknowledged last"), true);
    }
    let (there, role) = match peer {
        Some(peer) if *active == now.node => (peer.reachable, peer.role),
        _ => (true, Some(now.role)),
    };
    if !there && now.replication.blocks {
        let text = format!(
            "{active} is active, but every commit waits (on_standby_loss = \"block\") until {other} follows. When \
             {other} is back: portcullis rejoin {other}"
        );
        return (text, true);
    }
    if !there {
        return (format!("{active} serves alone. When {other} is back: portcullis rejoin {other}"), true);
    }
    if streams {
        return (
            format!("{other} follows as standby; it is synchronous again when `portcullis status` says so"),
            false,
        );
    }
    let why = if role == Some(Role::Fenced) { "is fenced" } else { "does not follow yet" };
    if now.replication.blocks {
        let text = format!(
            "{active} is active, and every commit waits for {other}, which {why}. If it stays so: portcullis rejoin \
             {other}"
        );
        return (text, false);
    }
    (format!("{active} serves alone; {other} {why}. If it stays so: portcullis rejoin {other}"), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(node: &str, role: &str, peer: Value, in_sync: bool, row: Value) -> Snapshot {
        let text = json!({
            "node": node, "version": "0", "role": role, "epoch": 2, "witness": null, "vip": null, "vips": [],
            "gate": {"open": role == "active", "state": "open", "reason": null, "lease_remaining_ms": 1, "sessions": 0},
            "peer": peer, "procedure": null, "events": [], "advice": null, "nodes": [row],
            "replication": {"mode": "synchronous", "in_sync": in_sync, "alone_since": null, "timeline": 1, "lsn": null},
            "postgres": {"up": true, "role": null, "error": null, "streaming": false},
            "journal": {"refused": 0, "won": 0, "complete": 0, "fence": 0},
            "counters": {"gate_openings": 0, "gate_cuts": 0, "witness_proofs": 0, "peer_pledges": 0,
                "witness_silent": 0, "peer_refused_connections": 0, "sessions_total": 0, "auth_failures": 0},
        });
        serde_json::from_value(text).expect("a snapshot")
    }

    fn row(name: &str, attached: bool) -> Value {
        json!({"node_id": 0, "name": name, "hostname": "h", "port": 1, "status": "up", "role": "standby",
            "weight": 0.5, "attached": attached, "replication_delay_bytes": null, "replication_state": null,
            "sync_state": null, "select_count": 0})
    }

    fn peer(name: &str, reachable: bool, role: &str) -> Value {
        json!({"name": name, "reachable": reachable, "role": role, "epoch": 2, "age_ms": 1})
    }

    #[test]
    fn the_next_step_fits_what_the_other_node_does() {
        let alone = seen("midna", "active", peer("alp", false, "active"), false, row("alp", false));
        let alone = next_step(&alone);
        assert_eq!(alone, ("midna serves alone. When alp is back: portcullis rejoin alp".to_owned(), true));
        let mut blocks = seen("midna", "active", peer("alp", false, "active"), false, row("alp", false));
        blocks.replication.blocks = true;
        let (text, last) = next_step(&blocks);
        assert!(text.contains("every commit waits") && !text.contains("serves alone") && last, "{text}");
        let mut blocks = seen("midna", "active", peer("alp", true, "fenced"), false, row("alp", false));
        blocks.replication.blocks = true;
        assert!(next_step(&blocks).0.contains("every commit waits for alp, which is fenced"));
        let fenced = next_step(&seen("midna", "active", peer("alp", true, "fenced"), false, row("alp", false)));
        assert!(fenced.0.contains("alp is fenced") && fenced.0.ends_with("portcullis rejoin alp") && !fenced.1);
        let coming = next_step(&seen("midna", "active", peer("alp", true, "passive"), false, row("alp", true)));
        assert!(coming.0.contains("alp follows as standby") && !coming.1, "{coming:?}");
        // Asked on the node that was left.
        let left = next_step(&seen("alp", "passive", peer("midna", true, "active"), true, row("alp", true)));
        assert_eq!(left, ("alp follows as synchronous standby: a failover would lose nothing".to_owned(), true));
        let nobody = next_step(&seen("alp", "passive", peer("midna", false, "active"), false, row("alp", true)));
        assert!(nobody.0.contains("portcullis status"), "{nobody:?}");
    }
}
