//! C12: after a power cut, in whatever order machines, daemons, PostgreSQL and the witness come back, an old primary
//! serves nobody, nothing of a former life is left, and the node whose epoch the record confirms opens by itself.

use crate::claims::evidence;
use crate::claims_pause::let_the_crowd_in;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::net::{self, VIP, connects};
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::raw::{Crowd, Habit};
use crate::harness::sys::{Outcome, ms, never, now, secs, wait_until};
use crate::in_lab;

/// A session through the gate is answered.
fn serves(lab: &Lab, node: &Node) -> Outcome {
    let crowd = Crowd::open(lab.client.ns(), node.gate()?, vec![(Habit::Asking, false)], None)?;
    crowd.wait_answer_after(now(), secs(60))
}

/// Opens by itself at the epoch it had, with the VIP, while the other neither opens nor has the VIP.
fn opens_by_itself(lab: &Lab, node: &Node, other: &Node, epoch: u64) -> Outcome<i64> {
    let begun = now();
    wait_until(secs(60), &format!("{} to open by itself", node.name()), || {
        ensure!(!other.host.has_power() || !other.has_vip()?, "{} has the VIP", other.name());
        Ok(node.gate_is_open().unwrap_or(false))
    })?;
    let took = ms(begun, now());
    ensure!(node.epoch()? == epoch, "epoch {} became {}", epoch, node.epoch()?);
    wait_until(secs(60), "the VIP on the active node", || node.has_vip())?;
    serves(lab, node)?;
    Ok(took)
}

/// Nothing of this node may serve: no gate, no VIP, no door; and PostgreSQL is not writable.
fn serves_nobody(lab: &Lab, node: &Node, seconds: u64) -> Outcome {
    never(secs(seconds), &format!("{} serves", node.name()), || {
        Ok(node.gate_is_open().unwrap_or(false)
            || node.has_vip()?
            || connects(lab.client.ns(), node.address(), GATE_PORT)?)
    })
}

fn both_dark(lab: &Lab) -> Outcome {
    for node in lab.nodes() {
        node.power_off()?;
    }
    for node in lab.nodes() {
        node.host.power_on()?;
    }
    Ok(())
}

/// `may-start-primary` lets the active node's PostgreSQL start; the daemon comes after it, the peer last.
fn postgres_first(lab: &Lab, active: &Node, other: &Node, epoch: u64) -> Outcome<i64> {
    both_dark(lab)?;
    ensure!(active.start_postgres_as_the_unit_does()?, "the active node's PostgreSQL was refused");
    active.start_daemon()?;
    serves_nobody(lab, active, 1)?;
    other.start_daemon()?;
    ensure!(other.start_postgres_as_the_unit_does()?, "a standby was refused");
    opens_by_itself(lab, active, other, epoch)
}

/// Daemons first, the witness after them; a PostgreSQL that asks while nobody can confirm its epoch is refused.
fn witness_last(lab: &Lab, active: &Node, other: &Node, epoch: u64) -> Outcome<i64> {
    lab.witness.kill()?;
    both_dark(lab)?;
    other.start_daemon()?;
    active.start_daemon()?;
    ensure!(other.start_postgres_as_the_unit_does()?, "a standby was refused");
    ensure!(!active.start_postgres_as_the_unit_does()?, "a primary was let start without a witness");
    serves_nobody(lab, active, 1)?;
    lab.witness.start()?;
    // The daemon starts what was refused. (A person who does so at the same moment makes two postmasters, of which one
    // ends with an error.)
    let started = || Ok(!active.host.named("postgres")?.is_empty());
    wait_until(secs(60), "the daemon to start the PostgreSQL that was refused", started)?;
    opens_by_itself(lab, active, other, epoch)
}

/// The old primary of a taken-over epoch boots while its successor is dark: refused by its unit, and put right by its
/// daemon even when somebody starts it by hand; a VIP of a former life is removed.
fn the_old_primary_alone(lab: &Lab, old: &Node, new: &Node) -> Outcome<i64> {
    old.power_off()?;
    new.cli(&["promote", "--yes"])?.expect(0)?;
    new.wait_active(secs(60))?;
    let epoch = new.epoch()?;
    new.power_off()?;
    old.host.power_on()?;
    net::add_address(old.ns(), VIP)?;
    ensure!(!old.start_postgres_as_the_unit_does()?, "the unit let the old primary start writable");
    old.postgres.start(&old.host)?;
    ensure!(!old.postgres.is_read_only()?, "started by hand, it should be writable, or this proves nothing");
    let begun = now();
    old.start_daemon()?;
    net::address_gone(old.ns(), VIP, secs(60))?;
    wait_until(secs(60), "the old primary read-only", || old.postgres.is_read_only())?;
    let demoted = ms(begun, now());
    serves_nobody(lab, old, 2)?;
    ensure!(!old.gate_is_open()? && old.postgres.is_read_only()?, "the old primary is writable");

    // Its successor comes back beside it and goes on where it was, without a word from anybody.
    new.host.power_on()?;
    new.start_daemon()?;
    ensure!(new.start_postgres_as_the_unit_does()?, "the active node's PostgreSQL was refused");
    opens_by_itself(lab, new, old, epoch)?;
    ensure!(!old.gate_is_open()? && old.postgres.is_read_only()?, "the old primary is writable");
    new.rejoin(old.name())?;
    new.wait_in_sync(secs(60))?;
    Ok(demoted)
}

#[test]
fn claim_12_boot_is_safe_in_every_order() {
    in_lab(Options::with_vip("boot"), |lab| {
        lab.start_servers()?;
        let_the_crowd_in(lab)?;
        for node in [&lab.b, &lab.a] {
            node.start_daemon()?;
        }
        let (a, b) = (&lab.a, &lab.b);
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;
        let epoch = a.epoch()?;
        let first = postgres_first(lab, a, b, epoch)?;
        a.wait_in_sync(secs(60))?;
        let last = witness_last(lab, a, b, epoch)?;
        a.wait_in_sync(secs(60))?;
        let demoted = the_old_primary_alone(lab, a, b)?;
        // The record names the other node now: once more the other way round.
        let epoch = b.epoch()?;
        let second = postgres_first(lab, b, a, epoch)?;
        for node in lab.nodes() {
            evidence(node)?;
        }
        eprintln!(
            "figure: C12 opened by itself {first} and {second} ms after the last start (PostgreSQL first), \
            {last} ms (witness \
             last); an old primary started by hand was read-only {demoted} ms after its daemon's start"
        );
        Ok(())
    });
}
