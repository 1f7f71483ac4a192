//! The interleavings of the protocol review (P1 to P17, S1 to S17) that no other test plays, by name. docs/safety.md
//! says for each entry which test is its case.

use super::world::{Act, Cut, MS, World, address, name, secs};
use crate::base::ids::Epoch;
use crate::base::time::Duration;
use crate::engine::durable::Durable;
use crate::engine::setup::Mode;
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, Event};
use crate::wire::dns::RecordPair;

const W: Duration = Duration::from_millis(3261);

fn with_marker(world: &World, change: impl Fn(&str) -> String, node: usize) -> RecordPair {
    RecordPair::written(&[address(node)], 5, &change(&world.record.marker[0]))
}

#[test]
fn p1_an_update_that_comes_after_unfence_finds_the_record_changed() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    world.hold_updates = true;
    world.run_until(secs(5), "b's update is on its way", |w| !w.held.is_empty());
    let late = std::mem::take(&mut world.held);
    world.hold_updates = false;
    world.kill_all(1);
    world.run_for(secs(20));
    let ticket = world.command(0, Command::Unfence);
    assert_eq!(world.end_of(0, ticket).0, 0);
    assert!(world.is_open(0));
    (world.held, world.hold_updates) = (late, true);
    world.release();
    assert_eq!(world.marker().map(|m| m.active), Some(name(0)), "the late one found another record");
    world.run_for(secs(10));
    assert!(world.is_open(0));
}

#[test]
fn p3_a_second_authority_that_still_says_here_prolongs_nothing() {
    let mut world = World::with(Mode::Update, 2);
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.second = Some(world.record.clone());
    world.wire_up = false;
    world.first_silent = true;
    world.run_for(secs(4));
    assert!(!world.is_open(0), "only the server that executes the updates counts");
    assert_eq!(world.snapshot(0).gate.state, GateState::Lapsed);
}

#[test]
fn p4_stonith_runs_only_once_the_record_is_ours() {
    let mut world = World::unstarted(Mode::Update, 1);
    world.stonith = true;
    world.begin();
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.cut(Cut::Wire, true);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(!world.shot.is_empty());
    assert!(world.shot.iter().all(|(_, epoch)| *epoch == 2), "after the compare-and-swap: {:?}", world.shot);
    // The machine comes up at once (a power cycle): it opens nothing.
    world.revive(0);
    world.run_for(secs(10));
    assert!(world.is_open(1) && !world.is_open(0));
}

#[test]
fn p6_the_record_says_synchronous_only_once_the_peer_has_said_that_it_replayed() {
    let mut world = World::new();
    world.run_until(secs(20), "the name is set", |w| w.nodes[0].pg.list == "\"b\"");
    world.nodes[1].frozen_until = world.now + secs(15);
    world.run_for(secs(14));
    assert!(world.is_open(0));
    assert_eq!(world.marker().and_then(|m| m.sync), None, "the walsender's word is not enough");
    world.run_until(secs(20), "armed", |w| w.snapshot(0).replication.in_sync);
}

#[test]
fn p12_an_address_without_a_marker_confirms_nothing() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.kill_all(1);
    world.record = RecordPair::new(vec![address(0)], 5, Vec::new());
    world.nodes[0].pg.up = true;
    world.start(0);
    world.run_for(secs(20));
    assert!(!world.is_open(0));
}

#[test]
fn p13_two_nodes_that_claim_one_epoch_both_fence() {
    let mut world = World::with(Mode::Observe, 1);
    world.run_for(secs(5));
    let ticket = world.promote(0, false);
    world.end_of(0, ticket);
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.check_acked = false;
    world.wire_up = false;
    for node in [1, 0] {
        let ticket = world.promote(node, true);
        world.run_for(secs(3));
        world.act(Act::Edit(node));
        assert_eq!(world.end_of(node, ticket).0, 0);
        world.run_for(secs(5));
    }
    assert_eq!((world.durable(0).won, world.durable(1).won), (Epoch(2), Epoch(2)), "neither knew of the other");
    world.wire_up = true;
    world.run_for(secs(3));
    assert_eq!((world.snapshot(0).role, world.snapshot(1).role), (Role::Fenced, Role::Fenced));
    assert!(world.durable(0).fence >= Epoch(3) && world.durable(1).fence >= Epoch(3));
}

#[test]
fn p15_a_primary_that_lost_wal_does_not_open() {
    let mut world = World::running();
    world.kill_all(0);
    // The machine is restored from a snapshot: the journal and the marker agree, the standby is ahead.
    world.nodes[0].pg.lsn -= 20;
    world.nodes[0].pg.data[0].1 -= 1;
    world.revive(0);
    assert!(world.nodes[0].pg.up);
    world.run_for(secs(20));
    assert!(!world.is_open(0), "{:?}", world.snapshot(0).gate);
}

#[test]
fn p16_a_node_with_an_unfinished_rejoin_is_not_promotable_and_the_record_does_not_name_it() {
    let mut world = World::running();
    let start = world.nodes[1].pg.start;
    world.command(1, Command::Rejoin { node: name(1), dry_run: false });
    world.run_until(secs(20), "cloned", |w| w.nodes[1].pg.start > start);
    assert_eq!(world.marker().and_then(|m| m.sync), None, "the first step of a rejoin is the record");
    assert!(world.durable(1).rejoining);
    world.kill_all(0);
    world.kill(1);
    world.start(1);
    world.run_for(secs(3));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains("unfinished rejoin"), "{text}");
}

#[test]
fn p17_the_taker_writes_the_old_node_as_synchronous_and_opens_only_with_the_list_of_the_record() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "the record moved", |w| w.marker().is_some_and(|m| m.epoch == Epoch(2)));
    assert_eq!(world.marker().and_then(|m| m.sync), Some(name(0)));
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert_eq!((world.marker().and_then(|m| m.sync), world.nodes[1].pg.list.as_str()), (None, ""));
    // A list that does not agree with the record shuts the gate until it does.
    let mut world = World::running();
    // Somebody did this by hand, which no promise covers until it is seen.
    world.check_acked = false;
    world.nodes[0].pg.list.clear();
    let end = world.now + secs(2);
    let mut shut = false;
    while world.now < end {
        world.step();
        shut |= !world.is_open(0);
    }
    assert!(shut, "the record says sync=b, PostgreSQL does not");
    world.run_until(secs(5), "open again", |w| w.is_open(0) && w.nodes[0].pg.list == "\"b\"");
}

#[test]
fn s1_a_secondary_that_lags_does_not_cut_the_node_just_promoted() {
    let mut world = World::with(Mode::Update, 2);
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.second = Some(world.record.clone());
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    let cuts = world.snapshot(1).counters.gate_cuts;
    world.run_for(secs(30));
    assert!(world.is_open(1));
    assert_eq!((world.snapshot(1).counters.gate_cuts, world.durable(1).fenced), (cuts, None));
}

#[test]
fn s2_an_attempt_that_never_won_fences_nobody() {
    let mut world = World::running();
    // The question reaches b's witness, its update does not.
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "b refuses", |w| w.durable(1).refused == Epoch(1));
    world.cut(Cut::Witness(1), true);
    world.cut(Cut::Wire, true);
    world.end_of(1, ticket);
    world.heal();
    world.run_for(secs(5));
    assert_eq!((world.durable(1).won, world.durable(0).won), (Epoch::NONE, Epoch(1)));
    assert!(world.durable(0).fence <= Epoch(2), "a consent at most");
}

#[test]
fn s6_a_foreign_boot_under_our_own_name_cuts() {
    let mut world = World::running();
    let boot = world.setup(0).boot;
    world.record = with_marker(&world, |text| text.replace(&boot, "5f1c0000-0000-4000-8000-00000000dead"), 0);
    world.run_for(MS * 1100);
    assert!(!world.is_open(0), "a clone of this machine wrote its own boot");
    assert_eq!(world.durable(0).fence, Epoch::NONE);
}

#[test]
fn s7_a_node_that_lost_its_state_pledges_nothing() {
    let mut world = World::running();
    world.kill(1);
    world.nodes[1].disk.clear();
    world.nodes[1].shadow = Durable::default();
    world.dns_up = false;
    world.start(1);
    world.run_for(secs(5));
    assert!(!world.is_open(0), "no pledge from a node without state");
    world.dns_up = true;
    world.run_until(secs(5), "open again", |w| w.is_open(0));
}

#[test]
fn s9_crash_recovery_inside_a_running_postmaster_holds_clients_until_the_standby_has_it() {
    let mut world = World::running();
    world.wire_up = false;
    world.run_for(secs(1));
    world.give(0, Event::PgLost("the database system is in recovery mode".into()));
    world.run_for(secs(2));
    assert!(!world.is_open(0), "R6: unreplicated commits may be visible now");
    world.wire_up = true;
    world.run_until(secs(5), "open again", |w| w.is_open(0));
    assert_eq!(world.marker().and_then(|m| m.sync), Some(name(1)), "the standby came before its time was over");
}

#[test]
fn s11_two_walsenders_of_one_name_are_not_in_sync() {
    let mut world = World::running();
    let mut report = world.report(0).expect("up");
    let twin = report.standbys[0].clone();
    report.standbys.push(twin);
    let asked = world.nodes[0].clock.read(world.now);
    world.give(0, Event::PgObserved { asked, report: Box::new(report) });
    assert!(!world.snapshot(0).replication.in_sync);
}

#[test]
fn s12_the_word_that_a_node_is_off_is_refused_while_it_was_heard_less_than_w_ago() {
    let mut world = World::with(Mode::VipOnly, 1);
    world.run_for(secs(5));
    let ticket = world.promote(0, false);
    world.end_of(0, ticket);
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.cut(Cut::Wire, true);
    let off =
        |accept| Command::Promote { dry_run: false, yes: true, accept_data_loss: accept, peer_is_off: Some(name(0)) };
    let ticket = world.command(1, off(true));
    assert_eq!(world.end_of(1, ticket).0, 3);
    assert_eq!(world.durable(1).won, Epoch::NONE);
    world.act(Act::PowerOff(0));
    world.run_for(W + secs(1));
    world.loss_accepted = true;
    let ticket = world.command(1, off(true));
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

#[test]
fn s16_a_second_procedure_shows_the_first_one_and_starts_nothing() {
    let mut world = World::running();
    let first = world.promote(1, false);
    world.run_for(MS * 20);
    let second = world.command(1, Command::Rejoin { node: name(1), dry_run: false });
    let third = world.command(0, Command::Switchover { to: Some(name(0)), dry_run: false });
    assert_eq!(world.end_of(1, first).0, 0);
    assert_eq!(world.end_of(1, second).0, 0, "it ends as the first one does");
    assert!(!world.durable(1).rejoining);
    world.end_of(0, third);
    world.run_for(secs(5));
    assert!(world.somebody_is_open());
}
