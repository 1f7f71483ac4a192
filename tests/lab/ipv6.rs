//! A pair, its witness and its clients on a network without IPv4: AAAA records, peer channel, replication, rejoin.

use crate::claims::CUT_MS;
use crate::ensure;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::connects;
use crate::harness::node::{GATE_PORT, text_at};
use crate::harness::sys::{ms, now, run, secs, wait_until};
use crate::harness::witness::{Kind, SERVICE};
use crate::in_lab;
use hickory_proto::rr::RecordType;

fn failover_and_flip(options: Options) {
    in_lab(options, |lab| {
        let kind = lab.options.witness;
        // Nothing here can go by IPv4 in secret.
        for host in [&lab.a.host, &lab.b.host, &lab.witness.host, &lab.client] {
            let shown = run(&["ip", "-n", host.ns(), "-4", "-o", "addr", "show", "dev", "eth0"])?;
            ensure!(shown.is_empty(), "{} has an IPv4 address: {shown}", host.name);
        }
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        ensure!(lab.witness.service_addresses()? == [a.address()], "record {:?}", lab.witness.service_addresses());
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;

        // The record flips and comes back.
        lab.witness.move_record_to(b.address())?;
        let moved = now();
        wait_until(secs(60), "the gate of a to be cut", || Ok(!a.gate_is_open()?))?;
        let cut = ms(moved, writer.log().last_ack().ok_or("no acknowledgement")?.at);
        ensure!(cut <= CUT_MS, "the last acknowledgement came {cut} ms after the flip");
        lab.witness.move_record_to(a.address())?;
        a.wait_active(secs(60))?;
        writer.wait_acks(50, secs(60))?;

        // A switchover, and the old primary follows by itself.
        let switched = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        b.wait_in_sync(secs(60))?;
        ensure!(lab.witness.service_addresses()? == [b.address()], "record {:?}", lab.witness.service_addresses());
        let old = lab.witness.ask(client, SERVICE, RecordType::A)?;
        ensure!(old.is_empty(), "an A record came to be: {old:?}");

        // A failover, and a rejoin.
        b.power_off()?;
        let said = a.cli(&["promote", "--yes"])?.expect(0)?;
        a.wait_active(secs(60))?;
        let first = writer.wait_ack_via(a.gate()?, said.started, secs(60))?;
        b.boot()?;
        let rejoined = a.rejoin("b")?;
        a.wait_in_sync(secs(60))?;
        b.wait_status(secs(60), "to be a passive standby", |status| {
            text_at(status, "/role") == "passive" && text_at(status, "/nodes/1/role") == "standby"
        })?;
        ensure!(!connects(client, b.address(), GATE_PORT)?, "the gate of the passive node accepts connections");
        writer.wait_acks(50, secs(60))?;
        let log = writer.finish();
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        // What people look at.
        for verb in [&["status"][..], &["check"], &["check-config"]] {
            let said = a.cli(verb)?;
            ensure!(said.code <= 1, "`{}` ended with {}: {}{}", said.line, said.code, said.out, said.err);
        }
        let (code, rows) = a.http("/pool_nodes")?;
        ensure!(code == 200 && rows.contains(a.address()), "/pool_nodes: {code} {rows}");
        println!(
            "figure: IPv6 only, {kind:?}: last ack {cut} ms after the flip, switchover {} ms, failover {} ms to the \
             first ack, rejoin {} ms, {} acks, none lost",
            ms(switched.started, switched.ended),
            ms(said.started, first),
            ms(rejoined.started, rejoined.ended),
            log.acks.len()
        );
        Ok(())
    });
}

#[test]
fn ipv6_alone_with_bind() {
    failover_and_flip(Options::ipv6_only("six"));
}

#[test]
fn ipv6_alone_with_the_embedded_witness() {
    failover_and_flip(Options { witness: Kind::Embedded, ..Options::ipv6_only("sixown") });
}

#[test]
fn ipv6_alone_with_knot() {
    failover_and_flip(Options { witness: Kind::Knot, ..Options::ipv6_only("sixknot") });
}
