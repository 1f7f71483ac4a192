//! A service with a VIP and no DNS (R3): the peer's pledge or an ARP witness keeps the lease, and nobody takes over
//! from a silent node on a guess.

use crate::claims::{LAST_ACK_MS, LEASE_MS};
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::net::{VIP, who_answers_arp};
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::sys::{Outcome, ms, never, now, secs, wait_until};
use crate::harness::{Lab, watch};
use crate::in_lab;
use portcullis::base::time::Instant;

/// The first epoch is a promote; nothing opens by itself before it.
fn start(lab: &Lab) -> Outcome {
    lab.start_servers()?;
    lab.b.start_daemon()?;
    lab.a.start_daemon()?;
    never(
        secs(4),
        "a gate that opens before the first promote",
        || Ok(lab.a.gate_is_open()? || lab.b.gate_is_open()?),
    )?;
    lab.a.cli(&["promote", "--yes"])?.expect(0)?;
    lab.a.wait_active(secs(60))?;
    lab.a.wait_in_sync(secs(60))?;
    Ok(())
}

fn through_the_vip(lab: &Lab, id: u32) -> Outcome<Writer> {
    let gate = format!("{VIP}:{GATE_PORT}").parse()?;
    Writer::start_flowing(
        lab.client.ns(),
        WriterOptions { target: Target::Always(gate), ..WriterOptions::once(id, gate) },
    )
}

fn last_ack(writer: Writer) -> Outcome<Instant> {
    Ok(writer.finish().last_ack().ok_or("no acknowledgement")?.at)
}

fn owner(lab: &Lab) -> Outcome<std::collections::BTreeSet<String>> {
    who_answers_arp(lab.client.ns(), VIP)
}

fn only_owner_is(lab: &Lab, node: &Node) -> Outcome {
    let owners = owner(lab)?;
    ensure!(owners.len() == 1 && owners.contains(&node.host.plug.mac), "answering for the VIP: {owners:?}");
    Ok(())
}

#[test]
fn arp_prolongs_without_the_peer_and_opens_nothing_after_a_lapse() {
    in_lab(Options::vip_only("viponly"), |lab| {
        start(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        ensure!(a.status()?.pointer("/witness") == Some(&serde_json::Value::Null), "a witness where there is none");

        // The peer's daemon is cut off: the ARP witness alone keeps the lease, no client notices.
        let writer = through_the_vip(lab, 1)?;
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, 6433)?;
        never(secs(8), "a lapse while the VIP's witness answers", || Ok(!a.gate_is_open()?))?;
        let log = writer.finish();
        let gap = i64::try_from(log.longest_gap().0.as_millis()).unwrap_or(i64::MAX);
        ensure!(gap < LEASE_MS, "a gap of {:?} with one voter", log.longest_gap().0);

        // Both voters gone: shut at the lease, on a session that was already open and lives on the node itself.
        let inside = Writer::start_flowing(a.ns(), WriterOptions::once(2, a.gate()?))?;
        lab.switch.cut_between(&a.host.plug, &lab.witness.host.plug)?;
        let cut = now();
        wait_until(secs(60), "the gate shut", || Ok(!a.gate_is_open()?))?;
        let last = last_ack(inside)?;
        eprintln!("figure: viponly: both voters gone: last ack {} ms after the cut", ms(cut, last));
        ensure!(ms(cut, last) <= LAST_ACK_MS, "acknowledged {} ms after the cut", ms(cut, last));

        // ARP returns, the pledge does not (P10): nothing opens.
        lab.switch.heal()?;
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, 6433)?;
        never(secs(6), "a gate that ARP alone opened after a lapse", || a.gate_is_open())?;
        ensure!(owner(lab)?.is_empty(), "somebody answers for the VIP of a lapsed node");

        // The pledge does open it.
        lab.switch.heal()?;
        let healed = now();
        a.wait_active(secs(60))?;
        eprintln!("figure: viponly: open again {} ms after the peer was heard again", ms(healed, now()));
        only_owner_is(lab, a)?;

        // A daemon that is killed and started again needs the pledge as well.
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, 6433)?;
        a.kill_daemon(rustix::process::Signal::KILL)?;
        a.start_daemon()?;
        never(secs(5), "a gate that opened at start without the peer", || a.gate_is_open())?;
        lab.switch.heal()?;
        a.wait_active(secs(60))?;
        Ok(())
    });
}

#[test]
fn a_silent_node_is_taken_over_from_only_on_a_persons_word() {
    in_lab(Options::vip_only("vipword"), |lab| {
        start(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        let roles = (watch::roles(a.ns(), a.address())?, watch::roles(b.ns(), b.address())?);

        // A whole switchover first: the peer's consent is the record.
        let writer = through_the_vip(lab, 1)?;
        b.cli(&["switchover"])?.expect(0)?;
        b.wait_active(secs(60))?;
        only_owner_is(lab, b)?;
        drop(writer);
        b.wait_in_sync(secs(60))?;
        watch::never_two_active(&roles.0.finish(), &roles.1.finish())?;
        let roles = (watch::roles(a.ns(), a.address())?, watch::roles(b.ns(), b.address())?);

        b.power_off()?;
        let said = a.cli(&["promote", "--yes"])?.expect(3)?;
        ensure!(said.err.contains("--peer-is-off b"), "{}", said.err);
        let early = a.cli(&["promote", "--yes", "--accept-data-loss", "--peer-is-off", "b"])?;
        let heard = a.status()?.pointer("/peer/age_ms").and_then(serde_json::Value::as_u64).unwrap_or(0);
        ensure!(
            early.code == 3 || heard > 3000,
            "--peer-is-off believed {heard} ms after the peer was heard: {early:?}"
        );
        wait_until(secs(60), "W since the peer was heard", || {
            let age = a.status()?.pointer("/peer/age_ms").and_then(serde_json::Value::as_u64);
            Ok(age.is_some_and(|age| age > 3500))
        })?;
        let asked = now();
        if early.code != 0 {
            a.cli(&["promote", "--yes", "--accept-data-loss", "--peer-is-off", "b"])?.expect(0)?;
        }
        eprintln!("figure: vipword: promote from a node that is off: {} ms", ms(asked, now()));
        only_owner_is(lab, a)?;

        // The old one comes back: no gate, no VIP, nothing writable.
        b.boot()?;
        b.wait_role("fenced", secs(60))?;
        wait_until(secs(60), "the old primary read-only or down", || {
            Ok(b.postgres.is_read_only().unwrap_or(true) && !b.gate_is_open()? && !b.has_vip()?)
        })?;
        a.rejoin("b")?;
        a.wait_in_sync(secs(60))?;
        watch::never_two_active(&roles.0.finish(), &roles.1.finish())
    });
}
