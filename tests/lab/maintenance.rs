//! `maintenance on|off`: PostgreSQL is left alone, while the gate goes on obeying the lease.

use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::node::{Node, text_at};
use crate::harness::sys::{Outcome, ms, never, now, secs, wait_until};
use crate::in_lab;
use serde_json::Value;

/// The postmaster's pid and start, which change with every restart.
fn postmaster(node: &Node) -> Outcome<String> {
    let text = std::fs::read_to_string(node.postgres.data_dir.join("postmaster.pid"))?;
    Ok(text.lines().take(3).collect::<Vec<_>>().join(" "))
}

fn is_writable_primary(node: &Node) -> Outcome<bool> {
    Ok(!node.postgres.is_read_only()?)
}

/// Every surface says so, and none that it is not.
fn shown(node: &Node, on: bool) -> Outcome {
    node.wait_status(secs(60), "to show maintenance", |s| s.pointer("/maintenance") == Some(&Value::Bool(on)))?;
    let status = node.cli(&["status"])?.expect(0)?.out;
    // A line of its own, not the events below.
    ensure!(status.lines().any(|line| line.starts_with("maintenance")) == on, "status: {status}");
    let check = node.cli(&["check"])?;
    ensure!(check.out.contains("maintenance is on") == on, "check: {}", check.out);
    ensure!(!on || check.code >= 1, "check ends with {} although maintenance is on: {}", check.code, check.out);
    Ok(())
}

#[test]
fn maintenance_leaves_postgresql_alone_and_the_gate_obeys() {
    in_lab(Options::new("maintenance"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        shown(a, false)?;
        a.cli(&["maintenance", "on"])?.expect(0)?;
        shown(a, true)?;
        let said = a.cli(&["check"])?;
        ensure!(said.code == 1, "nothing but maintenance is amiss, and check ends with {}: {}", said.code, said.out);
        let gate = a.gate()?;
        let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(1, gate) };
        let writer = Writer::start_flowing(client, options)?;

        // An administrator restarts PostgreSQL: the gate shuts, nobody else starts it, and the gate opens by itself.
        let before = postmaster(a)?;
        let epoch = a.epoch()?;
        a.postgres.stop(&a.host, "fast")?;
        let down = now();
        wait_until(secs(60), "the gate to be shut without a PostgreSQL", || Ok(!a.gate_is_open()?))?;
        never(secs(2), "somebody starting PostgreSQL", || Ok(a.postgres.data_dir.join("postmaster.pid").exists()))?;
        a.postgres.start(&a.host)?;
        a.wait_active(secs(60))?;
        writer.wait_ack_via(gate, down, secs(60))?;
        ensure!(a.epoch()? == epoch && postmaster(a)? != before, "epoch or postmaster are not as after a restart");
        let back = ms(down, now());
        a.wait_in_sync(secs(60))?;

        // It outlives the daemon.
        a.stop_daemon()?;
        a.start_daemon()?;
        shown(a, true)?;
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;

        // Nobody takes over from a node under maintenance while it can be asked, and it takes over itself neither.
        let refused = b.cli(&["promote", "--yes"])?;
        let told = format!("{}{}", refused.out, refused.err);
        ensure!([1, 3].contains(&refused.code), "promote ended with {}: {told}", refused.code);
        ensure!(told.contains("maintenance is on"), "the reason is missing: {told}");
        ensure!(a.gate_is_open()? && a.epoch()? == epoch, "a refused promote changed the active node");
        let refused = a.cli(&["switchover", "--to", "b"])?;
        ensure!([1, 3].contains(&refused.code), "switchover ended with {}: {}", refused.code, refused.err);
        ensure!(a.gate_is_open()?, "a refused switchover shut the gate");

        // A fence cuts the gate, and PostgreSQL stays what it was.
        let before = postmaster(a)?;
        let last = writer.log().last_ack().ok_or("no acknowledgement")?.n;
        a.cli(&["fence", "--reason", "a test"])?.expect(0)?;
        a.wait_role("fenced", secs(60))?;
        let fenced = now();
        never(secs(4), "PostgreSQL touched, or an acknowledgement", || {
            let acked = !writer.log().acks_after(fenced).is_empty();
            Ok(acked || postmaster(a)? != before || !is_writable_primary(a)? || a.gate_is_open()?)
        })?;
        let log = writer.finish();
        ensure!(log.acks.iter().any(|ack| ack.n >= last), "the writer's log went backwards");
        shown(a, true)?;

        // The end of maintenance is when the fence gets its PostgreSQL.
        a.cli(&["maintenance", "off"])?.expect(0)?;
        let off = now();
        wait_until(secs(60), "the fenced PostgreSQL to be demoted", || a.postgres.is_read_only())?;
        ensure!(a.postgres.data_dir.join("standby.signal").exists(), "demoted without standby.signal");
        shown(a, false)?;
        ensure!(text_at(&a.status()?, "/role") == "fenced", "the end of maintenance lifted the fence");
        eprintln!("maintenance: served again {back} ms after the stop; demoted {} ms after its end", ms(off, now()));
        Ok(())
    });
}
