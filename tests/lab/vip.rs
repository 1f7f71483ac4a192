//! The VIP against operators, former lives and other claimants.

use crate::claims::CUT_MS;
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::net::{self, VIP, who_answers_arp};
use crate::harness::node::{GATE_PORT, text_at};
use crate::harness::sys::{ms, never, now, secs, wait_until};
use crate::in_lab;
use serde_json::Value;

#[test]
fn operators_ip_addr_del_is_obeyed_not_fought() {
    in_lab(Options::with_vip("vipdel"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        // By the node's own address: only the gate can end this session, not the missing VIP.
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        net::delete_address(a.ns(), VIP)?;
        let deleted = now();
        wait_until(secs(60), "the gate of a cut", || Ok(!a.gate_is_open()?))?;
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(
            ms(deleted, last) <= CUT_MS,
            "the last acknowledgement came {} ms after `ip addr del`",
            ms(deleted, last)
        );
        never(secs(4), "the VIP bound again, or a gate open", || {
            Ok(a.has_vip()? || lab.b.has_vip()? || a.gate_is_open()? || lab.b.gate_is_open()?)
        })?;
        ensure!(who_answers_arp(client, VIP)?.is_empty(), "somebody answers for the deleted VIP");
        ensure!(!a.postgres.is_read_only()?, "`ip addr del` demoted the primary");
        eprintln!("vipdel: last ack {} ms after the deletion", ms(deleted, last));
        Ok(())
    });
}

#[test]
fn stale_vip_of_a_former_life_is_removed_at_start() {
    in_lab(Options::with_vip("vipstale"), |lab| {
        lab.start_servers()?;
        let (a, b) = (&lab.a, &lab.b);
        net::add_address(b.ns(), VIP)?;
        b.start_daemon()?;
        net::address_gone(b.ns(), VIP, secs(60))?;
        // On the node that may serve it goes as well, and comes back only with the lease: with a finite lifetime.
        net::add_address(a.ns(), VIP)?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        let shown = crate::harness::sys::run(&["ip", "-n", a.ns(), "addr", "show", "dev", "eth0"])?;
        let line = shown.lines().skip_while(|line| !line.contains(VIP)).nth(1).unwrap_or_default().to_owned();
        ensure!(line.contains("valid_lft") && !line.contains("forever"), "the VIP was kept for ever: {shown}");
        ensure!(!b.has_vip()?, "both have the VIP");
        Ok(())
    });
}

#[test]
fn a_vip_that_another_host_answers_for_is_not_bound() {
    in_lab(Options::with_vip("vipclaim"), |lab| {
        lab.start_servers()?;
        let (a, thief) = (&lab.a, &lab.client);
        net::add_address(thief.ns(), VIP)?;
        lab.b.start_daemon()?;
        a.start_daemon()?;
        a.wait_status(secs(60), "to name the other claimant", |status| {
            text_at(status, "/vip/conflict").to_ascii_lowercase() == thief.plug.mac
        })?;
        never(secs(3), "the VIP bound, or the gate open, beside another claimant", || {
            Ok(a.has_vip()? || a.gate_is_open()?)
        })?;
        net::delete_address(thief.ns(), VIP)?;
        a.wait_active(secs(60))?;
        ensure!(a.status()?.pointer("/vip/bound") == Some(&Value::Bool(true)), "active without the VIP");
        let vip_gate = format!("{VIP}:{GATE_PORT}").parse()?;
        let options = WriterOptions { target: Target::Always(vip_gate), ..WriterOptions::once(1, vip_gate) };
        let writer = Writer::start_flowing(thief.ns(), options)?;

        // Claimed later, while it serves: cut, never defended (RFC 5227 section 2.4).
        net::add_address(lab.witness.host.ns(), VIP)?;
        let words =
            ["ip", "netns", "exec", lab.witness.host.ns(), "arping", "-U", "-c", "3", "-I", "eth0", "-s", VIP, VIP];
        crate::harness::sys::run_within(secs(30), &words)?;
        wait_until(secs(60), "the gate of a cut by a foreign claim", || Ok(!a.gate_is_open()?))?;
        drop(writer);
        ensure!(!a.has_vip()?, "the VIP was kept against a foreign claim");
        Ok(())
    });
}
