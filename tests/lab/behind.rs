//! A standby whose daemon was started again after its active node had died: it must still know how far it is.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::sys::{Outcome, secs, wait_until};
use crate::in_lab;
use rustix::process::Signal;

const CONTROL: &str = "SELECT greatest((SELECT timeline_id FROM pg_control_checkpoint()), \
    (SELECT min_recovery_end_timeline FROM pg_control_recovery()))";

/// Switched over that often, the pair is on a timeline that the standby's control file does not name yet.
#[test]
fn a_standby_started_again_after_its_active_node_died_is_promoted_without_a_word() {
    in_lab(Options::new("behind"), |lab| {
        lab.start_servers()?;
        // A page written out would take the control file along.
        for node in lab.nodes() {
            node.postgres.append("postgresql.auto.conf", "bgwriter_lru_maxpages = 0\nwal_receiver_timeout = 5s\n")?;
            node.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
        }
        lab.b.start_daemon()?;
        lab.a.start_daemon()?;
        lab.a.wait_active(secs(60))?;
        lab.a.wait_in_sync(secs(60))?;
        switch_over(&lab.a, &lab.b)?;
        switch_over(&lab.b, &lab.a)?;
        dies_and_is_replaced(lab, &lab.a, &lab.b, 3)
    });
}

/// `to` takes over from `from`, which ends as its standby.
fn switch_over(from: &Node, to: &Node) -> Outcome {
    to.cli(&["promote", "--yes"])?.expect(0)?;
    to.wait_active(secs(60))?;
    from.wait_postgres("standby")?;
    to.wait_in_sync(secs(60)).map(drop)
}

fn dies_and_is_replaced(lab: &Lab, active: &Node, standby: &Node, timeline: u32) -> Outcome {
    let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::service(1, lab.witness.address()))?;
    writer.wait_acks(50, secs(60))?;
    active.power_off()?;
    let gone = || Ok(standby.postgres.sql("postgres", "SELECT count(*) FROM pg_stat_wal_receiver")?.trim() == "0");
    standby.kill_daemon(Signal::KILL)?;
    // What the daemon saw while the active node lived is gone with it; PostgreSQL forgets with its walreceiver.
    wait_until(secs(120), "the walreceiver to give up", gone)?;
    let known: u32 = standby.postgres.sql("postgres", CONTROL)?.trim().parse()?;
    ensure!(known < timeline, "the control file tells timeline {known}: this proves nothing");
    standby.start_daemon()?;
    standby.wait_postgres("standby")?;
    let said = standby.cli(&["promote", "--yes"])?.expect(0)?;
    ensure!(said.out.contains("loss: none"), "{}", said.out);
    ensure!(said.out.contains(&format!("timeline {timeline}, ")), "{}", said.out);
    standby.wait_active(secs(60))?;
    writer.wait_ack_via(standby.gate()?, said.started, secs(60))?;
    let log = writer.finish();
    let missing = lost(&log, 1, &standby.postgres)?;
    ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
    Ok(())
}
