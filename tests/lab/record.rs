//! The witness: the record moved by hand, the DNS server dead, and both voters gone.

use crate::claims::{CUT_MS, LAST_ACK_MS, LEASE_MS};
use crate::ensure;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::connects;
use crate::harness::node::{GATE_PORT, PEER_PORT};
use crate::harness::sys::{millis, ms, never, now, pause, secs, wait_until};
use crate::in_lab;

/// W of issue 2's pair: L (1 + d) / (1 - d) + margin with L 3 s, d 0.01, margin 200 ms; in milliseconds, rounded down.
const W_MS: i64 = 3260;

#[test]
fn record_moved_by_hand_cuts_an_open_session_then_fences() {
    in_lab(Options::new("moved"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let writer = Writer::start_flowing(client, WriterOptions { depth: 4, ..WriterOptions::once(1, a.gate()?) })?;
        let begun = now();
        lab.witness.move_record_to(b.address())?;
        let moved = now();
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        let cut = now();
        ensure!(a.role()? != "fenced", "fenced at once: an edit must stand for W first");
        a.wait_role("fenced", secs(60))?;
        let fenced = now();
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(
            ms(moved, last) <= CUT_MS,
            "the last acknowledgement came {} ms after the record moved",
            ms(moved, last)
        );
        let stood = ms(begun, fenced);
        ensure!(stood >= W_MS, "fenced {stood} ms after the edit; W is {W_MS} ms");
        ensure!(!b.gate_is_open()?, "b opened although the marker names a");
        wait_until(secs(60), "PostgreSQL on a read-only", || a.postgres.is_read_only())?;
        ensure!(!connects(client, a.address(), GATE_PORT)?, "the fenced gate accepts connections");
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        ensure!(log.sessions.len() == 1, "the writer opened another session: {:?}", log.sessions);
        eprintln!(
            "moved: last ack {} ms, gate cut {} ms, fenced {stood} ms after the edit",
            ms(moved, last),
            ms(moved, cut)
        );
        // b, told to, serves; a stays fenced.
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        ensure!(lost(&log, 1, &b.postgres)?.is_empty(), "acknowledged but missing on b");
        Ok(())
    });
}

#[test]
fn record_put_back_within_w_opens_the_gate_again() {
    in_lab(Options::new("putback"), |lab| {
        lab.start_pair()?;
        let a = &lab.a;
        lab.witness.move_record_to(lab.b.address())?;
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        lab.witness.move_record_to(a.address())?;
        a.wait_active(secs(60))?;
        // A typo is worse than an edit to look at, and must do no more harm: cut, lapsed, never fenced.
        lab.witness.nsupdate("update delete db.example.org A")?;
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        never(secs(5), "a fenced by a record that says nothing", || Ok(a.role()? == "fenced"))?;
        ensure!(!a.postgres.is_read_only()?, "a typo demoted the only primary");
        lab.witness.nsupdate(&format!("update add db.example.org 5 A {}", a.address()))?;
        a.wait_active(secs(60)).map(drop)
    });
}

#[test]
fn dns_dead_for_15s_costs_no_client_error() {
    in_lab(Options::new("dnsdead"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        let openings = a.status()?.pointer("/counters/gate_openings").cloned();
        let killed = now();
        lab.witness.kill()?;
        never(secs(15), "the gate of a shut while its peer vouches for it", || Ok(!a.gate_is_open()?))?;
        // New sessions too.
        let second = Writer::start_flowing(client, WriterOptions::once(2, a.gate()?))?;
        ensure!(second.finish().errors.is_empty(), "a new session met an error");
        let dead_for = ms(killed, now());
        lab.witness.start()?;
        a.wait_status(secs(60), "to hear the witness again", |status| {
            status.pointer("/witness/servers/0/verdict").and_then(|verdict| verdict.as_str()) == Some("here")
        })?;
        let log = writer.finish();
        let (gap, at) = log.longest_gap();
        ensure!(log.errors.is_empty(), "client errors: {:?}", log.errors);
        ensure!(
            gap < millis(LEASE_MS.unsigned_abs()),
            "an outage of {gap:?} beginning {} ms after the kill",
            ms(killed, at)
        );
        ensure!(
            a.status()?.pointer("/counters/gate_openings").cloned() == openings,
            "the gate was cut and opened again"
        );
        eprintln!("dnsdead: {dead_for} ms without DNS, {} acks, longest gap {} ms", log.acks.len(), gap.as_millis());
        Ok(())
    });
}

#[test]
fn both_voters_gone_shuts_within_the_lease_and_one_back_opens_it_again() {
    in_lab(Options::new("voters"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        lab.witness.kill()?;
        pause(secs(1));
        // The peer channel alone: replication goes on, so that commits could be acknowledged if the gate let them.
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, PEER_PORT)?;
        let cut = now();
        wait_until(secs(60), "the gate of a shut", || Ok(!a.gate_is_open()?))?;
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(
            ms(cut, last) <= LAST_ACK_MS,
            "the last acknowledgement came {} ms after both voters were gone",
            ms(cut, last)
        );
        ensure!(ms(cut, last) >= 500, "acknowledgements ended {} ms after the cut: not by the lease", ms(cut, last));
        ensure!(a.gate_state()? == "lapsed", "the gate is {}", a.gate_state()?);
        ensure!(!connects(client, a.address(), GATE_PORT)?, "a lapsed gate accepts connections");
        never(secs(4), "a gate opened without proof", || Ok(a.gate_is_open()? || b.gate_is_open()?))?;
        ensure!(!a.postgres.is_read_only()?, "a lapse demoted the primary");

        // The witness alone comes back.
        lab.witness.start()?;
        let back = now();
        a.wait_active(secs(60))?;
        let opened_dns = ms(back, now());
        let writer = Writer::start_flowing(client, WriterOptions::once(2, a.gate()?))?;

        // And once more, with the peer alone coming back.
        lab.witness.kill()?;
        wait_until(secs(60), "the gate of a shut again", || Ok(!a.gate_is_open()?))?;
        drop(writer);
        never(millis(1500), "a gate opened without proof", || a.gate_is_open())?;
        lab.switch.heal()?;
        let back = now();
        a.wait_active(secs(60))?;
        let opened_peer = ms(back, now());
        Writer::start_flowing(client, WriterOptions::once(3, a.gate()?))?;
        eprintln!(
            "voters: last ack {} ms after the cut; open again {opened_dns} ms after DNS, {opened_peer} ms after the \
             peer",
            ms(cut, last)
        );
        Ok(())
    });
}
