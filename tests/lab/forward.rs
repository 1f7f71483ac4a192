//! `service.passive = "forward"`: clients that come to the passive node's address are served by the active one's gate,
//! plain and by TLS, and by nobody once that gate has lapsed, was cut, or the roles have turned.

use crate::claims_pause::let_the_crowd_in;
use crate::claims_sessions::with_tls;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::connects;
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::raw::{Crowd, Habit};
use crate::harness::sys::{Outcome, millis, ms, now, secs, wait_until};
use crate::in_lab;
use portcullis::base::time::Instant;
use rustls::pki_types::CertificateDer;

/// The lab's lease.
const LEASE: std::time::Duration = secs(3);
/// From a moved record to the last answer, as C4 has it for clients of the node itself, and the way through the other.
const CUT_MS: i64 = 2500;

fn count(node: &Node, what: &str) -> Outcome<u64> {
    Ok(node.status()?.pointer(&format!("/gate/{what}")).and_then(serde_json::Value::as_u64).unwrap_or(u64::MAX))
}

/// The passive node's door, which forwards.
fn wait_for_door(lab: &Lab, passive: &Node) -> Outcome {
    let (ns, address) = (lab.client.ns(), passive.address());
    wait_until(secs(60), "the passive node to take clients", || connects(ns, address, GATE_PORT)).map(drop)
}

fn crowd(lab: &Lab, passive: &Node, root: &CertificateDer<'static>) -> Outcome<Crowd> {
    let habits = [Habit::Asking, Habit::Pouring, Habit::Idle, Habit::Sleeping, Habit::CopyOut];
    let members = habits.into_iter().flat_map(|habit| [(habit, false), (habit, true)]).collect();
    let crowd = Crowd::open(lab.client.ns(), passive.gate()?, members, Some(root.clone()))?;
    crowd.wait_answer_after(now(), secs(60))?;
    Ok(crowd)
}

/// Its clients are all the other node's, and nobody takes it for the active one.
fn only_forwards(passive: &Node, least: u64) -> Outcome {
    let (own, forwarded) = (count(passive, "sessions")?, count(passive, "forwarded")?);
    ensure!(own == 0 && forwarded >= least, "{own} sessions of its own, {forwarded} forwarded");
    ensure!(passive.http("/active")?.0 == 503, "a node that forwards calls itself active");
    let (_, metrics) = passive.http("/metrics")?;
    ensure!(metrics.contains(&format!("portcullis_forwarded {forwarded}")), "/metrics tells another number");
    Ok(())
}

/// The active machine stands still for longer than its lease, with octets under way: nothing passes afterwards.
fn frozen(lab: &Lab, root: &CertificateDer<'static>) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    let crowd = crowd(lab, b, root)?;
    only_forwards(b, 10)?;
    let stood = a.host.freeze()?;
    std::thread::sleep(LEASE + millis(1500));
    let went_on = a.host.thaw()?;
    crowd.wait_ended(secs(60))?;
    let late = crowd.late(stood + LEASE);
    ensure!(late.is_empty(), "answers of a gate that had lapsed: {late:?}");
    let last = crowd.last_answer().map_or(0, |at| ms(stood, at));
    eprintln!("forward: the active node frozen: last answer {last} ms after it, thawed at {} ms", ms(stood, went_on));
    Ok(())
}

/// The record moves: the active node cuts, and who is on the way through the other hears of it.
fn cut(lab: &Lab, root: &CertificateDer<'static>) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    a.wait_active(secs(60))?;
    wait_for_door(lab, b)?;
    let crowd = crowd(lab, b, root)?;
    lab.witness.move_record_to(b.address())?;
    let moved = now();
    crowd.wait_ended(secs(60))?;
    let last = crowd.last_answer().map_or(0, |at| ms(moved, at));
    ensure!(last <= CUT_MS, "an answer came {last} ms after the record moved");
    let told = crowd.seen().iter().filter(|s| s.ended.as_ref().is_some_and(|(_, text)| text.contains("57P01"))).count();
    ensure!(told > 0, "nobody was told: {:?}", crowd.seen().first());
    eprintln!("forward: the record moved: last answer {last} ms after it, {told} of 10 told why");
    lab.witness.move_record_to(a.address())?;
    a.wait_active(secs(60)).map(drop)
}

fn flows_through(lab: &Lab, id: u32, door: &Node, active: &Node) -> Outcome {
    wait_for_door(lab, door)?;
    let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::once(id, door.gate()?))?;
    writer.wait_acks(50, secs(60))?;
    only_forwards(door, 1)?;
    let log = writer.finish();
    let missing = lost(&log, id, &active.postgres)?;
    ensure!(missing.is_empty(), "acknowledged through {} and not on {}: {missing:?}", door.name(), active.name());
    Ok(())
}

#[test]
fn a_passive_node_forwards_and_rests_on_the_active_ones_gate_alone() {
    let options = Options { service: "passive = \"forward\"", ..Options::new("forward") };
    in_lab(options, |lab| {
        let root = with_tls(lab)?;
        lab.start_servers()?;
        let_the_crowd_in(lab)?;
        for node in [&lab.b, &lab.a] {
            node.start_daemon()?;
        }
        let (a, b) = (&lab.a, &lab.b);
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;
        flows_through(lab, 1, b, a)?;
        frozen(lab, &root)?;
        cut(lab, &root)?;
        a.wait_in_sync(secs(60))?;

        // The roles turn under clients on both ways: who came through b is b's own now, and both ways work again.
        wait_for_door(lab, b)?;
        let begun: Instant = now();
        let through_b = Writer::start_flowing(lab.client.ns(), WriterOptions::once(2, b.gate()?))?;
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        through_b.wait_acks(50, secs(60))?;
        let log = through_b.finish();
        ensure!(log.errors.is_empty(), "the writer through b had errors: {:?}", log.errors);
        let missing = lost(&log, 2, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged and missing after the switchover: {missing:?}");
        flows_through(lab, 3, a, b)?;
        ensure!(count(b, "forwarded")? == 0, "the active node forwards");
        let sessions = count(b, "sessions")?;
        eprintln!("forward: the roles turned {} ms after the writer began; {sessions} sessions left", ms(begun, now()));
        Ok(())
    });
}
