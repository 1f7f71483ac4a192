//! Unplanned: killed, cut off, dead. What the old node acknowledges afterwards, and what the new one holds. Frozen is
//! claims_pause.rs.

use crate::claims::{LAST_ACK_MS, ON_THE_WIRE, VIP_GONE_MS};
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::{VIP, address_gone, connects, who_answers_arp};
use crate::harness::node::{GATE_PORT, text_at};
use crate::harness::sys::{Fail, ms, never, secs, wait_until};
use crate::in_lab;
use rustix::process::Signal;

#[test]
fn kill_9_of_the_daemon_loses_the_vip_by_itself() {
    in_lab(Options::with_vip("vipkill"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        ensure!(a.has_vip()? && !b.has_vip()?, "the VIP should be on a alone");
        let vip_gate = format!("{VIP}:{GATE_PORT}").parse()?;
        let options = WriterOptions { target: Target::Always(vip_gate), ..WriterOptions::once(1, vip_gate) };
        let writer = Writer::start_flowing(client, options)?;
        let answers = who_answers_arp(client, VIP)?;
        ensure!(answers == [a.host.plug.mac.clone()].into(), "ARP before: {answers:?}");

        let killed = a.kill_daemon(Signal::KILL)?;
        let gone = address_gone(a.ns(), VIP, secs(60))?;
        ensure!(ms(killed, gone) <= VIP_GONE_MS, "the VIP left {} ms after the kill", ms(killed, gone));
        let last = writer.log().last_ack().ok_or("no acknowledgement")?.at;
        ensure!(last <= killed + ON_THE_WIRE, "an acknowledgement {} ms after kill -9", ms(killed, last));

        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        let first = writer.wait_ack_via(vip_gate, said.started, secs(60))?;
        let answers = who_answers_arp(client, VIP)?;
        ensure!(answers == [b.host.plug.mac.clone()].into(), "ARP after: {answers:?}");
        ensure!(!a.has_vip()? && b.has_vip()?, "the VIP should be on b alone");
        let log = writer.finish();
        let missing = lost(&log, 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        eprintln!(
            "vipkill: VIP gone {} ms after the kill; promote took {} ms, first write {} ms after its start",
            ms(killed, gone),
            ms(said.started, said.ended),
            ms(said.started, first)
        );
        // The daemon, started again, finds a won epoch against it and binds nothing.
        a.start_daemon()?;
        a.wait_role("fenced", secs(60))?;
        ensure!(!a.has_vip()?, "the restarted old node bound the VIP");
        Ok(())
    });
}

#[test]
fn node_cut_off_stops_acknowledging_locally_within_lease_plus_300ms() {
    in_lab(Options::new("cutoff"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        // A session on a itself whose commits do not wait for the standby: the gate alone can stop it.
        let setup = "SET synchronous_commit = local".to_owned();
        let writer = Writer::start_flowing(a.ns(), WriterOptions { setup, ..WriterOptions::once(1, a.gate()?) })?;
        let cut = a.host.isolate()?;
        wait_until(secs(60), "the gate of a shut", || Ok(!a.gate_is_open()?))?;
        never(secs(2), "a gate without proof", || Ok(a.gate_is_open()? || b.gate_is_open()?))?;
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(ms(cut, last) <= LAST_ACK_MS, "the last acknowledgement came {} ms after the cut", ms(cut, last));
        ensure!(ms(cut, last) >= 500, "acknowledgements ended {} ms after the cut: not by the lease", ms(cut, last));
        ensure!(!connects(a.ns(), a.address(), GATE_PORT)?, "the gate accepts connections on the node itself");
        // b, told to, takes over; a comes back to a record that is no longer its own and learns it.
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        a.host.rejoin_network()?;
        a.wait_role("fenced", secs(60))?;
        ensure!(b.gate_is_open()?, "the return of a shut b");
        eprintln!(
            "cutoff: last ack {} ms after the cut; promote took {} ms",
            ms(cut, last),
            ms(said.started, said.ended)
        );
        Ok(())
    });
}

#[test]
fn a_dead_node_is_replaced_stays_shut_and_rejoins() {
    in_lab(Options::new("dead"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        let dark = a.power_off()?;
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        writer.wait_acks(50, secs(60))?;

        // Power is back: PostgreSQL's unit asks before it starts, and the daemon opens nothing.
        let allowed = a.boot()?;
        ensure!(!allowed, "may-start-primary let the old primary start writable");
        never(secs(5), "the old node serving", || Ok(a.gate_is_open()? || a.role()? == "active"))?;
        ensure!(!connects(client, a.address(), GATE_PORT)?, "the old gate accepts connections");
        let writable = a.postgres.is_read_only().map(|read_only| !read_only).unwrap_or(false);
        ensure!(!writable, "the old primary came up writable");
        // Asked again while the daemon runs: yes only if it has made a standby of it meanwhile.
        let standby = a.postgres.data_dir.join("standby.signal").exists();
        ensure!(!a.may_start_primary()? || standby, "the old primary may start writable while the daemon runs");

        let rejoined = b.rejoin("a")?;
        b.wait_in_sync(secs(60))?;
        a.wait_status(secs(60), "to be a passive standby", |status| {
            text_at(status, "/role") == "passive" && text_at(status, "/nodes/0/role") == "standby"
        })?;
        wait_until(secs(60), "/replica on a", || Ok(a.http("/replica")?.0 == 200))?;
        writer.wait_acks(20, secs(60))?;
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
        eprintln!(
            "dead: first write {} ms after Enter, {} ms after the power went; rejoin took {} ms; {} acks, none lost",
            ms(said.started, first),
            ms(dark, first),
            ms(rejoined.started, rejoined.ended),
            log.acks.len()
        );
        Ok(())
    });
}
