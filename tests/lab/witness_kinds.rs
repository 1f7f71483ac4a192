//! The witness in its other shapes: other programs, a secondary that lags, and a zone restored from an old backup.

use crate::claims::{CUT_MS, last_cut};
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::node::{PEER_PORT, text_at};
use crate::harness::sys::{Outcome, ms, never, now, secs, wait_until};
use crate::harness::witness::Kind;
use crate::in_lab;

/// A switchover, and a record moved by hand and put back: what planned.rs and record.rs show on BIND.
fn switchover_and_flip(name: &'static str, kind: Kind) {
    in_lab(Options { witness: kind, ..Options::new(name) }, |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let epoch = a.epoch()?;
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        ensure!(b.epoch()? > epoch, "the epoch did not rise");
        ensure!(lab.witness.service_addresses()? == [b.address()], "the record: {:?}", lab.witness.service_addresses());
        ensure!(lab.witness.marker()?.unwrap_or_default().contains("active=b"), "marker {:?}", lab.witness.marker());
        b.wait_in_sync(secs(60))?;

        let options = WriterOptions { target: Target::Always(b.gate()?), ..WriterOptions::once(1, b.gate()?) };
        let writer = Writer::start_flowing(lab.client.ns(), options)?;
        lab.witness.move_record_to(a.address())?;
        let moved = now();
        wait_until(secs(60), "the gate of b to be cut", || Ok(!b.gate_is_open()?))?;
        let last = writer.log().last_ack().ok_or("no acknowledgement")?.at;
        ensure!(ms(moved, last) <= CUT_MS, "the last acknowledgement came {} ms after the flip", ms(moved, last));
        ensure!(!a.gate_is_open()?, "a opened although the marker names b");
        lab.witness.move_record_to(b.address())?;
        let back = now();
        let first = writer.wait_ack_via(b.gate()?, back, secs(60))?;
        // The server is killed and comes back: what it acknowledged is still there.
        lab.witness.kill()?;
        lab.witness.start()?;
        ensure!(lab.witness.service_addresses()? == [b.address()], "an update was lost with the server");
        println!(
            "figure: {kind:?}: promote took {} ms; last ack {} ms after the flip, first {} ms after it was put back",
            ms(said.started, said.ended),
            ms(moved, last),
            ms(back, first)
        );
        Ok(())
    });
}

#[test]
fn switchover_and_flip_with_knot() {
    switchover_and_flip("knot", Kind::Knot);
}

#[test]
fn switchover_and_flip_with_the_embedded_witness() {
    switchover_and_flip("embedded", Kind::Embedded);
}

#[test]
fn a_lagging_secondary_neither_cuts_the_promoted_node_nor_prolongs_its_lease() {
    in_lab(Options { secondary: true, ..Options::new("lagging") }, |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let second = lab.secondary.as_ref().ok_or("no secondary")?;
        let verdict = |node: &crate::harness::node::Node, index: usize| -> Outcome<String> {
            Ok(text_at(&node.status()?, &format!("/witness/servers/{index}/verdict")))
        };
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        let asked = second.ask(lab.client.ns(), crate::harness::witness::SERVICE, hickory_proto::rr::RecordType::A)?;
        let shown = crate::harness::witness::addresses_in(&asked);
        ensure!(shown == [a.address()], "the secondary does not lag, it shows {shown:?}");
        let cuts = b.status()?.pointer("/counters/gate_cuts").cloned();
        // Longer than W and than a lease: neither the cut nor the fence of a record that names another.
        never(secs(5), "b cut by a secondary that lags", || Ok(!b.gate_is_open()?))?;
        ensure!(b.status()?.pointer("/counters/gate_cuts").cloned() == cuts, "b was cut");
        a.wait_status(secs(60), "to stream as a standby", |status| text_at(status, "/nodes/0/role") == "standby")?;

        // A dead secondary changes nothing either, and the primary alone is enough.
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, PEER_PORT)?;
        second.kill()?;
        never(secs(5), "b cut by a secondary that is down", || Ok(!b.gate_is_open()?))?;

        // Up to date it says "here", and that still prolongs nothing: only the server that executes the updates does.
        second.forget_zone()?;
        second.start()?;
        wait_until(secs(60), "the secondary to say here", || Ok(verdict(b, 1)? == "here"))?;
        lab.witness.kill()?;
        let killed = now();
        wait_until(secs(60), "the gate of b to lapse", || Ok(!b.gate_is_open()?))?;
        let lapsed = ms(killed, now());
        // By the lease of the last question, which was a poll ago at most (the page is looked at, and a busy machine
        // asks later), and for no other reason.
        ensure!(lapsed >= 1000, "b lapsed {lapsed} ms after the primary server died");
        ensure!(last_cut(b)?.contains("the lease ran out"), "cut otherwise: {}", last_cut(b)?);
        ensure!(verdict(b, 1)? == "here" && b.gate_state()? == "lapsed", "b's gate is {}", b.gate_state()?);
        never(secs(2), "a gate opened by the word of a secondary", || Ok(b.gate_is_open()? || a.gate_is_open()?))?;
        lab.witness.start()?;
        let back = now();
        b.wait_active(secs(60))?;
        println!(
            "figure: lagging secondary: 0 cuts in 5 s; lapsed {lapsed} ms after the primary server died, open again \
             {} ms after it came back",
            ms(back, now())
        );
        Ok(())
    });
}

#[test]
fn a_zone_restored_from_an_old_backup_never_makes_the_old_node_active() {
    restored_backup(Options::new("backup"));
}

/// Where the record says `sync=none` there is no standby to wait for after a start: only the peer's word is left.
#[test]
fn nor_does_it_in_asynchronous_mode() {
    restored_backup(Options { mode: "asynchronous", ..Options::new("backup2") });
}

fn restored_backup(options: Options) {
    let promote: &[&str] = if options.mode == "asynchronous" {
        &["promote", "--yes", "--accept-data-loss"]
    } else {
        &["promote", "--yes"]
    };
    in_lab(options, |lab| {
        start(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        // Stopped as a person would; what is on disk then is the backup.
        lab.witness.kill()?;
        let backup = lab.witness.backup()?;
        lab.witness.start()?;
        a.power_off()?;
        b.cli(promote)?.expect(0)?;
        b.wait_active(secs(60))?;
        let epoch = b.epoch()?;

        lab.witness.kill()?;
        lab.witness.restore(&backup)?;
        lab.witness.start()?;
        let restored = now();
        ensure!(lab.witness.marker()?.unwrap_or_default().contains("active=a"), "the backup is not an old one");
        wait_until(secs(60), "the gate of b cut by a marker from the past", || Ok(!b.gate_is_open()?))?;
        let cut = ms(restored, now());
        ensure!(b.gate_state()? == "lapsed", "b's gate is {}", b.gate_state()?);
        // The old node boots: the record names it, at the very epoch it completed.
        let allowed = a.boot()?;
        never(secs(6), "the old node active by a record from the past", || {
            Ok(a.gate_is_open()? || a.role()? == "active" || b.gate_is_open()?)
        })?;
        let openings = a.status()?.pointer("/counters/gate_openings").and_then(serde_json::Value::as_u64);
        ensure!(openings == Some(0), "the old node's gate was open for a moment: {openings:?} openings");
        ensure!(b.role()? != "fenced", "the backup fenced the node that was promoted");
        ensure!(!b.postgres.is_read_only()?, "the backup demoted the promoted primary");
        // A person says who it is.
        let said = b.cli(promote)?.expect(0)?;
        b.wait_active(secs(60))?;
        ensure!(b.epoch()? > epoch, "the new epoch {} is not above {epoch}", b.epoch()?);
        a.wait_role("fenced", secs(60))?;
        println!(
            "figure: restored backup: b cut {cut} ms after it; may-start-primary on a said {allowed}; promote on b \
             took {} ms, epoch {} to {}",
            ms(said.started, said.ended),
            epoch,
            b.epoch()?
        );
        Ok(())
    });
}

/// [`Lab::start_pair`], which in asynchronous mode must not wait for "in sync".
fn start(lab: &Lab) -> Outcome {
    if lab.options.mode == "synchronous" {
        return lab.start_pair();
    }
    lab.start_servers()?;
    lab.b.start_daemon()?;
    lab.a.start_daemon()?;
    lab.a.wait_active(secs(60)).map(drop)
}
