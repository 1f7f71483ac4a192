//! One walk through the states of a pair: in each, every surface of every node that runs (JSON by socket and by HTTP,
//! page, text, rows, check, metrics, numbers for old monitoring, pages for balancers, SHOW, console) says the same, and
//! the nodes agree with one another.
//!
//! The surfaces cannot be asked at one moment: what is compared is what was said between two snapshots that say the
//! same ([`essence`]). Where they differ, something moved, and it is looked again; where they agree, every difference
//! is a fault.

mod plain;
mod surfaces;

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::host;
use crate::harness::net::{self, VIP};
use crate::harness::node::{GATE_PORT, Node, PEER_PORT, text_at};
use crate::harness::postgres::{APP_PASSWORD, Template};
use crate::harness::sys::{Fail, Outcome, millis, ms, now, pause, run_within, secs, wait_until};
use crate::in_lab;
use rustix::process::Signal;
use serde_json::{Value, json};
use surfaces::Told;

/// How long a state may take to stand still.
const STILL: std::time::Duration = secs(60);

/// What must not differ between two surfaces: all of a snapshot but ages, counters and what is drawn over time.
fn essence(status: &Value) -> Value {
    let at = |pointer: &str| status.pointer(pointer).cloned().unwrap_or(Value::Null);
    let list = |pointer: &str, keys: &[&str]| -> Vec<Value> {
        let items = at(pointer).as_array().cloned().unwrap_or_default();
        items.iter().map(|item| keys.iter().map(|key| item[*key].clone()).collect()).collect()
    };
    let row = [
        "node_id",
        "name",
        "hostname",
        "port",
        "status",
        "role",
        "weight",
        "attached",
        "replication_delay_bytes",
        "replication_state",
        "sync_state",
        "last_status_change",
    ];
    let replication = ["mode", "in_sync", "alone_since", "waiting_since", "timeline"];
    let peer = ["name", "reachable", "role", "epoch", "same_configuration"];
    json!({
        "node": at("/node"), "role": at("/role"), "epoch": at("/epoch"), "open": at("/gate/open"),
        "state": at("/gate/state"), "reason": at("/gate/reason"), "sessions": at("/gate/sessions"),
        "points_at": at("/witness/points_at"), "witness": list("/witness/servers", &["server", "verdict", "error"]),
        "vips": list("/vips", &["address", "bound", "conflict"]),
        "peer": Value::Array(peer.map(|key| at(&format!("/peer/{key}"))).to_vec()),
        "replication": Value::Array(replication.map(|key| at(&format!("/replication/{key}"))).to_vec()),
        "procedure": [at("/procedure/kind"), at("/procedure/step")], "nodes": list("/nodes", &row),
        "postgres": at("/postgres"), "maintenance": at("/maintenance"), "paused": at("/paused_databases"),
        "outlook": at("/outlook"), "next": at("/next"), "advice": at("/advice"),
        "lag": [at("/lag/node"), at("/lag/bytes"), at("/lag/away")],
        "event": at("/events").as_array().and_then(|all| all.last().cloned()),
    })
}

/// Everything a node says, all of one state: asked again until the snapshots before and after are alike.
fn told(lab: &Lab, node: &Node, deadline: std::time::Duration) -> Outcome<Told> {
    let begun = now();
    loop {
        let before = node.status()?;
        let told = Told::ask(lab, node, before)?;
        let after = node.status()?;
        let (one, other) = (essence(&told.status), essence(&after));
        if one == other {
            return Ok(told);
        }
        ensure!(now().since(begun) < deadline, "{} never stood still: {one}\n{other}", node.name());
        pause(millis(20));
    }
}

/// What one state is, by what every node shall say of itself.
struct Scene<'a> {
    name: &'static str,
    /// The node that serves, if one does.
    active: Option<&'a Node>,
    /// Role, state of the gate and level of `check`, for each node that runs.
    nodes: Vec<(&'a Node, &'a str, &'a str, i32)>,
    /// The nodes hear each other.
    hear: bool,
    /// It passes by itself: no more is asked than that no surface contradicts another.
    passing: bool,
}

impl<'a> Scene<'a> {
    fn new(name: &'static str, active: Option<&'a Node>, nodes: Vec<(&'a Node, &'a str, &'a str, i32)>) -> Scene<'a> {
        Scene { name, active, nodes, hear: true, passing: false }
    }

    /// Waits until the nodes say what they shall, then asks everybody everything.
    fn walk(&self, lab: &Lab) -> Outcome<Vec<Told>> {
        let begun = now();
        let in_scene = |fail: Fail| Fail(format!("{}: {}", self.name, fail.0));
        for (node, role, state, _) in &self.nodes {
            node.wait_status(STILL, &format!("to be {role} and {state}"), |status| {
                text_at(status, "/role") == *role && text_at(status, "/gate/state") == *state
            })
            .map_err(in_scene)?;
        }
        if !self.passing {
            self.wait_for_one_story().map_err(in_scene)?;
        }
        let mut all = Vec::new();
        for (node, role, state, level) in &self.nodes {
            let told = told(lab, node, STILL).map_err(in_scene)?;
            told.agree().map_err(in_scene)?;
            let (is, gate) = (text_at(&told.status, "/role"), text_at(&told.status, "/gate/state"));
            ensure!(is == *role && gate == *state, "{}: {} is {is} and {gate}", self.name, node.name());
            let check = told.check.code;
            ensure!(check == *level, "{}: check on {} ends with {check}: {}", self.name, node.name(), told.check.out);
            all.push(told);
        }
        eprintln!("walk: {}: {} nodes, {} ms", self.name, all.len(), ms(begun, now()));
        Ok(all)
    }

    /// News travel: the nodes may differ for a moment, and not for longer.
    fn wait_for_one_story(&self) -> Outcome {
        wait_until(STILL, "the nodes to tell one story", || {
            let seen: Vec<Value> =
                self.nodes.iter().map(|(node, ..)| node.status()).collect::<Outcome<Vec<Value>>>()?;
            match self.contradiction(&seen) {
                None => Ok(true),
                Some(what) => Err(Fail(what)),
            }
        })
        .map(drop)
    }

    fn contradiction(&self, seen: &[Value]) -> Option<String> {
        let actives: Vec<String> =
            seen.iter().filter(|s| text_at(s, "/role") == "active").map(|s| text_at(s, "/node")).collect();
        let expected: Vec<String> = self.active.iter().map(|node| node.name().to_owned()).collect();
        if actives != expected
            && self.active.is_none_or(|node| self.nodes.iter().any(|(n, ..)| n.name() == node.name()))
        {
            return Some(format!("active: {actives:?}, not {expected:?}"));
        }
        let [one, other] = seen else { return None };
        if !self.hear {
            return None;
        }
        for (me, it) in [(one, other), (other, one)] {
            for key in ["role", "epoch"] {
                let (says, heard) = (&it[key], &me["peer"][key]);
                if says != heard {
                    return Some(format!("{} says {key} {says}, {} heard {heard}", it["node"], me["node"]));
                }
            }
        }
        let same = |pointer: &str| one.pointer(pointer) == other.pointer(pointer);
        for pointer in ["/epoch", "/replication/in_sync", "/replication/alone_since", "/outlook/safe"] {
            if !same(pointer) {
                return Some(format!("{pointer}: {:?} and {:?}", one.pointer(pointer), other.pointer(pointer)));
            }
        }
        for n in 0..2 {
            for key in ["name", "hostname", "port", "status", "role", "attached", "weight"] {
                let pointer = format!("/nodes/{n}/{key}");
                if !same(&pointer) {
                    return Some(format!("{pointer}: {:?} and {:?}", one.pointer(&pointer), other.pointer(&pointer)));
                }
            }
        }
        None
    }
}

/// A client with an open transaction, for as long as its server lets it; its process.
fn hold_a_transaction(lab: &Lab, node: &Node) -> Outcome<i32> {
    let psql = Template::once()?.bin_dir.join("psql").display().to_string();
    let dsn = format!("host={} port={GATE_PORT} user=app dbname=app password={APP_PASSWORD}", node.address());
    let log = lab.client.lab_dir.join("holder.log");
    let sql = "BEGIN; SELECT txid_current(); SELECT pg_sleep(60)";
    let pid = lab.client.spawn(&log, &[], &[&psql, "-XAt", &dsn, "-c", sql])?;
    wait_until(secs(30), "the open transaction", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND state = 'active' \
                     AND pid <> pg_backend_pid()";
        Ok(node.postgres.sql("postgres", query)?.trim() == "1")
    })?;
    Ok(pid)
}

#[test]
fn every_surface_tells_the_same_in_every_state() {
    in_lab(Options::with_vip("walk"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let calm = |name, active, standby| {
            Scene::new(name, Some(active), vec![(active, "active", "open", 0), (standby, "passive", "shut", 0)])
        };
        b.wait_status(STILL, "to stream", |s| s.pointer("/postgres/streaming") == Some(&Value::Bool(true)))?;
        a.wait_in_sync(STILL)?;
        let all = calm("in sync", a, b).walk(lab)?;
        for told in &all {
            ensure!(told.status["outlook"]["safe"] == true, "in sync and not safe: {}", told.status["outlook"]);
            ensure!(told.status["next"].is_null(), "in sync, and something is to be done: {}", told.status["next"]);
        }

        a.cli(&["pause"])?.expect(0)?;
        Scene::new("paused", Some(a), vec![(a, "active", "paused", 1), (b, "passive", "shut", 0)]).walk(lab)?;
        a.cli(&["resume"])?.expect(0)?;

        a.cli(&["maintenance", "on"])?.expect(0)?;
        a.wait_status(STILL, "to leave PostgreSQL alone", |s| s["maintenance"] == true)?;
        Scene::new("maintenance", Some(a), vec![(a, "active", "open", 1), (b, "passive", "shut", 0)]).walk(lab)?;
        a.cli(&["maintenance", "off"])?.expect(0)?;
        a.wait_status(STILL, "to care again", |s| s["maintenance"] == false)?;

        // Switching: an open transaction keeps the switchover waiting, so that it can be looked at.
        let holder = hold_a_transaction(lab, a)?;
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| b.cli(&["promote", "--yes"]));
            for node in [a, b] {
                node.wait_status(STILL, "to be moving", |s| !s["procedure"].is_null())?;
            }
            for node in [a, b] {
                let told = told(lab, node, STILL)?;
                ensure!(!told.status["procedure"].is_null(), "it moved too fast for {}", node.name());
                told.agree().map_err(|fail| Fail(format!("switching: {}", fail.0)))?;
            }
            host::send(holder, Signal::KILL)?;
            moved.join().map_err(|_| Fail("the promote panicked".to_owned()))??.expect(0)
        })?;
        b.wait_active(STILL)?;
        b.wait_in_sync(STILL)?;
        a.wait_status(STILL, "to stream", |s| s.pointer("/postgres/streaming") == Some(&Value::Bool(true)))?;
        calm("switched", b, a).walk(lab)?;

        // Alone: the standby's PostgreSQL is gone, its daemon is not.
        a.postgres.stop(&a.host, "fast")?;
        b.wait_status(STILL, "to be alone", |s| !s["replication"]["alone_since"].is_null())?;
        a.wait_status(STILL, "to miss its PostgreSQL", |s| s["postgres"]["up"] == false)?;
        let all = Scene::new("alone", Some(b), vec![(b, "active", "open", 1), (a, "passive", "shut", 2)]).walk(lab)?;
        for told in &all {
            ensure!(told.status["outlook"]["safe"] == false, "alone and safe: {}", told.status["outlook"]);
            ensure!(!told.status["next"].is_null(), "alone, and nothing is to be done");
        }
        a.postgres.start(&a.host)?;
        b.wait_in_sync(STILL)?;
        a.wait_status(STILL, "to stream", |s| s.pointer("/postgres/streaming") == Some(&Value::Bool(true)))?;

        // Somebody else claims the VIP.
        net::add_address(lab.client.ns(), VIP)?;
        let claim = ["ip", "netns", "exec", lab.client.ns(), "arping", "-U", "-c", "1", "-I", "eth0", "-s", VIP, VIP];
        run_within(secs(30), &claim)?;
        b.wait_status(STILL, "to name the other claimant", |s| !text_at(s, "/vip/conflict").is_empty())?;
        let told_b = told(lab, b, STILL)?;
        ensure!(!told_b.status["vip"]["conflict"].is_null(), "the conflict went by itself");
        told_b.agree().map_err(|fail| Fail(format!("conflict: {}", fail.0)))?;
        ensure!(told_b.check.code == 2, "check: {}", told_b.check.out);
        net::delete_address(lab.client.ns(), VIP)?;
        b.wait_active(STILL)?;
        b.wait_in_sync(STILL)?;

        // Lapsed: nobody vouches for b.
        lab.witness.kill()?;
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, PEER_PORT)?;
        let mut lapsed = Scene::new("lapsed", None, vec![(b, "passive", "lapsed", 2), (a, "passive", "shut", 2)]);
        lapsed.hear = false;
        for node in [a, b] {
            node.wait_status(STILL, "to miss the other and the witness", |s| {
                s["peer"]["reachable"] == false && text_at(s, "/witness/servers/0/verdict") == "silent"
            })?;
        }
        // The passive one cannot say who serves; how grave that is, check decides by what it knows.
        lapsed.nodes[1].3 = a.cli(&["check"])?.code;
        lapsed.walk(lab)?;
        lab.switch.heal()?;
        lab.witness.start()?;
        b.wait_active(STILL)?;
        b.wait_in_sync(STILL)?;

        // Fenced by word of the operator, then the other one takes over.
        b.cli(&["fence", "--reason", "a walk"])?.expect(0)?;
        Scene::new("fenced", None, vec![(b, "fenced", "fenced", 2), (a, "passive", "shut", 2)]).walk(lab)?;
        a.cli(&["promote", "--yes"])?.expect(0)?;
        a.wait_active(STILL)?;

        // The other machine is dead.
        b.power_off()?;
        a.wait_status(STILL, "to miss its peer and to be alone", |s| {
            s["peer"]["reachable"] == false && !s["replication"]["alone_since"].is_null()
        })?;
        let mut dead = Scene::new("peer dead", Some(a), vec![(a, "active", "open", 1)]);
        dead.hear = false;
        dead.walk(lab).map(drop)
    });
}
