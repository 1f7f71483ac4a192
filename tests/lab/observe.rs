//! `dns.mode = "observe"`: nobody but a person changes the record, here with nsupdate. Its answers carry no epoch, so
//! what opens a gate is proofs unbroken for W, and after a start the peer's word.

use crate::claims::CUT_MS;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::connects;
use crate::harness::node::{GATE_PORT, Node, Said, text_at};
use crate::harness::sys::{Fail, Outcome, millis, ms, never, now, secs, wait_until};
use crate::harness::watch::{never_two_active, roles};
use crate::in_lab;
use portcullis::base::time::Instant;

/// W for lease 3 s, drift 0.01 and margin 200 ms.
const W_MS: i64 = 3261;

/// The pair at its first epoch: a `promote` on the primary, which says what the record has to be (and is).
fn start_observed(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    lab.start_servers()?;
    b.start_daemon()?;
    a.start_daemon()?;
    for node in lab.nodes() {
        node.wait_peer()?;
    }
    // Longer than W: the record names a all the while, and without an epoch that opens nothing.
    never(millis(3500), "a gate without an epoch", || Ok(a.gate_is_open()? || b.gate_is_open()?))?;
    let said = a.cli(&["promote", "--yes"])?.expect(0)?;
    ensure!(said.out.contains("db.example.org -> 192.0.2.11"), "it does not say what the record must be: {}", said.out);
    ensure!(ms(said.started, said.ended) >= W_MS, "opened {} ms after Enter", ms(said.started, said.ended));
    a.wait_active(secs(60))?;
    a.wait_in_sync(secs(60)).map(drop)
}

/// `promote` with a person at the DNS server, who edits the record when told to. Returns also the moment before that.
fn promote_and_edit(lab: &Lab, node: &Node, words: &[&str]) -> Outcome<(Said, Instant)> {
    let mut edited = None;
    let told = format!("change the address record to db.example.org -> {} now", node.address());
    let said = node.cli_live(words, |line| {
        if edited.is_none() && line.contains(&told) {
            let before = now();
            edited = Some(lab.witness.move_record_to(node.address()).map(|()| before));
        }
    })?;
    let said = said.expect(0)?;
    let edited = edited.ok_or_else(|| Fail(format!("never told what to change: {}", said.out)))??;
    Ok((said, edited))
}

#[test]
fn observe_promote_with_the_peer_alive_and_with_the_peer_dead() {
    in_lab(Options::observed("observed"), |lab| {
        start_observed(lab)?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let (roles_a, roles_b) = (roles(a.ns(), a.address())?, roles(b.ns(), b.address())?);
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        let (said, edited) = promote_and_edit(lab, b, &["promote", "--yes"])?;
        b.wait_active(secs(60))?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        ensure!(ms(edited, first) >= W_MS, "served {} ms after the edit; W is {W_MS}", ms(edited, first));
        a.wait_status(secs(60), "to stream as a standby", |status| {
            text_at(status, "/role") == "passive" && text_at(status, "/nodes/0/role") == "standby"
        })?;
        b.wait_in_sync(secs(60))?;
        writer.wait_acks(20, secs(60))?;
        let switched = ms(edited, first);

        // b dies. Without its word a knows nothing of what b acknowledged alone, and says so.
        b.power_off()?;
        let refused = a.cli(&["promote", "--yes"])?.expect(3)?;
        let text = format!("{}{}", refused.out, refused.err);
        ensure!(text.contains("unknown since the last contact with b (20"), "the refusal says: {text}");
        ensure!(!a.gate_is_open()? && a.postgres.is_read_only()?, "a refused promote changed something");
        let (said, edited) = promote_and_edit(lab, a, &["promote", "--yes", "--accept-data-loss"])?;
        a.wait_active(secs(60))?;
        let first = writer.wait_ack_via(a.gate()?, said.started, secs(60))?;
        ensure!(ms(edited, first) >= W_MS, "served {} ms after the edit; W is {W_MS}", ms(edited, first));
        writer.wait_acks(20, secs(60))?;

        // b is back: its own epoch is over, and it learns that from a or from the record.
        b.boot()?;
        b.wait_role("fenced", secs(60))?;
        ensure!(!connects(client, b.address(), GATE_PORT)?, "the old gate accepts connections");
        a.rejoin("b")?;
        a.wait_in_sync(secs(60))?;
        let log = writer.finish();
        for node in lab.nodes() {
            wait_until(secs(60), "every acknowledged number on both nodes", || {
                let missing = lost(&log, 1, &node.postgres)?;
                if missing.is_empty() {
                    Ok(true)
                } else {
                    Err(Fail(format!("missing on {}: {missing:?}", node.name())))
                }
            })?;
        }
        let (seen_a, seen_b) = (roles_a.finish(), roles_b.finish());
        let until = |looks: &[crate::harness::watch::Look<Option<String>>]| {
            looks.iter().filter(|look| look.answered < said.started).cloned().collect::<Vec<_>>()
        };
        never_two_active(&until(&seen_a), &until(&seen_b))?;
        eprintln!(
            "observed: first write {switched} ms after the edit (peer alive), {} ms (peer dead); {} acks, none lost",
            ms(edited, first),
            log.acks.len()
        );
        Ok(())
    });
}

#[test]
fn observe_typo_restart_and_record_moved_by_hand() {
    in_lab(Options::observed("byhand"), |lab| {
        start_observed(lab)?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        // A typo: lapsed for longer than W, never fenced; put right, it opens after W without a command.
        lab.witness.nsupdate("update delete db.example.org A")?;
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        never(millis(4500), "a fenced by a record that says nothing", || {
            Ok(a.gate_state()? != "lapsed" || a.postgres.is_read_only()?)
        })?;
        let right = now();
        lab.witness.nsupdate(&format!("update add db.example.org 5 A {}", a.address()))?;
        a.wait_active(secs(60))?;
        ensure!(ms(right, now()) >= W_MS, "opened {} ms after a lapse: answers carry no epoch", ms(right, now()));

        // A restart: the record alone opens nothing, the peer's pledge for our epoch does.
        let epoch = a.epoch()?;
        b.stop_daemon()?;
        a.stop_daemon()?;
        a.start_daemon()?;
        never(secs(5), "a gate opened by the record alone after a start", || a.gate_is_open())?;
        ensure!(a.role()? == "passive" && a.gate_state()? == "lapsed", "a is {} {}", a.role()?, a.gate_state()?);
        let reason = text_at(&a.status()?, "/gate/reason");
        ensure!(reason.contains("pledge of b"), "the reason is: {reason}");
        b.start_daemon()?;
        a.wait_active(secs(60))?;
        ensure!(a.epoch()? == epoch, "a restart changed the epoch");
        a.wait_in_sync(secs(60))?;

        // The record moved by hand.
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        let begun = now();
        lab.witness.move_record_to(b.address())?;
        let moved = now();
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        a.wait_role("fenced", secs(60))?;
        let stood = ms(begun, now());
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(ms(moved, last) <= CUT_MS, "the last acknowledgement came {} ms after the edit", ms(moved, last));
        ensure!(stood >= W_MS, "fenced {stood} ms after the edit; W is {W_MS} ms");
        ensure!(!b.gate_is_open()?, "b opened without a promote");
        wait_until(secs(60), "PostgreSQL on a read-only", || a.postgres.is_read_only())?;

        // b takes over by command: a's word that b has everything is enough, and the record is right already.
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        ensure!(said.out.contains("loss: none"), "it says: {}", said.out);
        b.wait_active(secs(60))?;
        let missing = lost(&log, 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        Writer::start_flowing(client, WriterOptions::once(2, b.gate()?))?;
        eprintln!("byhand: last ack {} ms after the edit, fenced after {stood} ms", ms(moved, last));
        Ok(())
    });
}
