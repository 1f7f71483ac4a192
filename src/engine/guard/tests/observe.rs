//! Observe mode in the simulated world of `tests`: a person edits the address record, whose answers carry no epoch.

use super::*;
use crate::base::time::{Duration, Instant};
use crate::engine::setup::Mode;

const W: Duration = Duration::from_millis(3261);

fn edit(world: &mut World, node: usize) {
    world.record = RecordPair::new(vec![address(node)], 5, Vec::new());
}

/// The pair at its first epoch, a active and in sync.
fn running(servers: usize) -> World {
    let mut world = World::with(Mode::Observe, servers);
    world.run_for(MS * 5000);
    assert!(!world.is_open(0) && !world.is_open(1), "without an epoch the record alone opens nothing");
    let ticket = world.promote(0, false);
    finished(&mut world, 0, ticket, 0);
    world.run_until(MS * 20_000, "in sync", |w| w.snapshot(0).replication.in_sync);
    world
}

fn finished(world: &mut World, node: usize, ticket: u64, exit: u8) -> String {
    world.run_until(MS * 30_000, "the end of the command", |w| w.nodes[node].ends.contains_key(&ticket));
    let (code, text) = world.nodes[node].ends[&ticket].clone();
    assert_eq!(code, exit, "{text}");
    text
}

fn told_to_edit(world: &World, node: usize) -> bool {
    let wanted = format!("change the address record to db.example.org -> {}", address(node));
    world.nodes[node].said.iter().any(|line| line.contains(&wanted))
}

/// A promote with a person who edits when told to.
fn promote_by_hand(world: &mut World, node: usize, accept_data_loss: bool) -> Instant {
    world.loss_accepted |= accept_data_loss;
    world.nodes[node].said.clear();
    let ticket = world.promote(node, accept_data_loss);
    world.run_until(MS * 10_000, "to be told what to edit", |w| told_to_edit(w, node));
    edit(world, node);
    let edited = world.now;
    finished(world, node, ticket, 0);
    edited
}

#[test]
fn a_switchover_by_hand_opens_w_after_the_edit_and_the_old_node_follows() {
    let mut world = running(1);
    let edited = promote_by_hand(&mut world, 1, false);
    assert!(world.is_open(1) && world.now >= edited + W);
    assert_eq!(world.durable(1).complete, Epoch(2));
    world.run_until(MS * 20_000, "the old node to follow", |w| w.snapshot(1).replication.in_sync);
    assert_eq!(world.snapshot(0).role, Role::Passive);
    // And back.
    promote_by_hand(&mut world, 0, false);
    assert!(world.is_open(0) && !world.is_open(1));
}

#[test]
fn without_the_old_primarys_word_the_loss_is_unknown() {
    let mut world = running(1);
    world.kill_all(0);
    let ticket = world.promote(1, false);
    let text = finished(&mut world, 1, ticket, 3);
    assert!(text.contains("unknown since the last contact with a (20"), "{text}");
    assert_eq!(world.durable(1).refused, Epoch::NONE, "a refusal changes nothing");
    promote_by_hand(&mut world, 1, true);
    // The former primary comes back while the taker is away: nobody knows whether its data is the last.
    world.kill_all(1);
    world.nodes[0].pg.up = true;
    world.start(0);
    world.run_for(MS * 3000);
    let ticket = world.promote(0, false);
    finished(&mut world, 0, ticket, 3);
}

#[test]
fn after_a_start_the_record_alone_never_opens_and_the_pledge_does() {
    // P9 (ii): b ran the next epoch while a was dead; a person points the record back at a, and b is dead. (a was
    // alone, so that R6's wait for its standby does not stand in for the rule.)
    let mut world = World::with(Mode::Observe, 1);
    world.nodes[1].pg.follows = false;
    world.run_for(MS * 2000);
    let ticket = world.promote(0, false);
    finished(&mut world, 0, ticket, 0);
    world.kill_all(0);
    promote_by_hand(&mut world, 1, true);
    world.kill_all(1);
    edit(&mut world, 0);
    world.nodes[0].pg.up = true;
    world.start(0);
    world.run_for(MS * 20_000);
    assert!(!world.is_open(0), "week-old data");
    // An ordinary restart: the peer's pledge opens it, W later.
    let mut world = running(1);
    world.kill(0);
    world.run_for(MS * 1000);
    world.start(0);
    let started = world.now;
    world.run_until(MS * 10_000, "open again", |w| w.is_open(0));
    assert!(world.now >= started + W);
    assert_eq!(world.durable(0).complete, Epoch(1));
}

#[test]
fn a_cut_off_node_reopens_only_after_w_unbroken() {
    // P9 (i): a lapses without ever seeing the edit, b takes over, and the record comes back at once.
    let mut world = running(1);
    world.wire_up = false;
    world.deaf[0] = true;
    world.run_until(MS * 5000, "lapse", |w| !w.is_open(0));
    promote_by_hand(&mut world, 1, true);
    world.deaf[0] = false;
    edit(&mut world, 0);
    let back = world.now;
    // `give` asserts after every event that never two gates are open.
    world.run_until(MS * 10_000, "a to open", |w| w.is_open(0));
    assert!(world.now >= back + W, "opened {:?} after the edit", world.now.since(back));
    world.run_until(MS * 2000, "b fenced", |w| w.snapshot(1).role == Role::Fenced);
}

#[test]
fn every_authority_has_to_show_the_change() {
    let mut world = running(2);
    // One of two says otherwise: not enough to cut, nor to take over.
    edit(&mut world, 1);
    world.run_for(MS * 6000);
    assert!(world.is_open(0), "one authority alone does not cut");
    world.second = Some(RecordPair::new(vec![address(1)], 5, Vec::new()));
    let both = world.now;
    world.run_until(MS * 1500, "the cut once both say so", |w| !w.is_open(0));
    world.run_until(MS * 6000, "the fence", |w| w.snapshot(0).role == Role::Fenced);
    assert!(world.now >= both + W, "fenced {:?} after the last authority changed", world.now.since(both));

    let mut world = running(2);
    world.kill_all(0);
    let ticket = world.promote(1, true);
    world.run_until(MS * 10_000, "to be told", |w| told_to_edit(w, 1));
    edit(&mut world, 1);
    world.run_for(MS * 10_000);
    assert_eq!(world.durable(1).won, Epoch::NONE, "the second authority still shows a");
    world.second = Some(RecordPair::new(vec![address(1)], 5, Vec::new()));
    finished(&mut world, 1, ticket, 0);
}

#[test]
fn a_typo_lapses_and_never_fences() {
    let mut world = running(1);
    world.record = RecordPair::new(Vec::new(), 5, Vec::new());
    world.run_for(MS * 10_000);
    let snapshot = world.snapshot(0);
    assert_eq!((snapshot.gate.state, snapshot.role), (GateState::Lapsed, Role::Passive));
    assert!(!world.nodes[0].pg.in_recovery);
    edit(&mut world, 0);
    let right = world.now;
    world.run_until(MS * 8000, "open again", |w| w.is_open(0));
    assert!(world.now >= right + W);
}

#[test]
fn a_fenced_node_that_confirmed_everything_gives_its_word_and_unfence_needs_the_peers() {
    let mut world = running(1);
    edit(&mut world, 1);
    world.run_until(MS * 8000, "the fence", |w| w.snapshot(0).role == Role::Fenced);
    world.run_for(MS * 1000);
    let ticket = world.promote(1, false);
    finished(&mut world, 1, ticket, 0);
    assert!(world.is_open(1));

    let mut world = running(1);
    world.command(0, Command::Fence { reason: "test".into() });
    world.run_for(MS * 1000);
    world.wire_up = false;
    let ticket = world.command(0, Command::Unfence);
    finished(&mut world, 0, ticket, 3);
    world.wire_up = true;
    world.run_for(MS * 3000);
    let ticket = world.command(0, Command::Unfence);
    finished(&mut world, 0, ticket, 0);
    assert!(world.is_open(0));
    assert!(world.durable(0).complete >= Epoch(2));
}

/// Seed 1688 of the simulation: b has a's consent and waits for a person's edit; the nodes lose each other and a is
/// promoted again, with the same number. b's attempt is over: what a acknowledged since is not on b.
#[test]
fn a_consent_is_void_once_the_one_who_gave_it_took_the_epoch_itself() {
    let mut world = running(1);
    let waiting = world.promote(1, false);
    world.run_until(MS * 10_000, "to be told what to edit", |w| told_to_edit(w, 1));
    world.wire_up = false;
    // a's PostgreSQL was stopped for its consent; a person starts it.
    world.run_for(MS * 500);
    world.nodes[0].pg.up = true;
    world.nodes[0].pg.start += 1;
    world.run_for(MS * 3000);
    let again = world.promote(0, true);
    finished(&mut world, 0, again, 0);
    world.run_for(MS * 5000);
    assert!(world.is_open(0));
    assert_eq!(world.durable(0).complete, Epoch(2));
    world.wire_up = true;
    world.run_until(MS * 5000, "b to give up", |w| w.nodes[1].ends.contains_key(&waiting));
    let (exit, text) = world.nodes[1].ends[&waiting].clone();
    assert_eq!(exit, 4, "{text}");
    assert!(text.contains("taken meanwhile"), "{text}");
    edit(&mut world, 1);
    world.run_for(MS * 10_000);
    assert!(world.nodes[1].pg.in_recovery && world.durable(1).won < Epoch(2), "b promotes nothing on the old consent");
}
