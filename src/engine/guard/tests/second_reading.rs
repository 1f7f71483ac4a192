//! Interleavings that a second look found: each broke a rule before it was mended.

use super::world::{Act, Delivery, World, address, name, secs};
use crate::base::config::FencePostgres;
use crate::base::ids::Epoch;
use crate::engine::setup::Mode;
use crate::engine::status::GateState;
use crate::engine::turn::{Command, Event, PeerQuestion};
use crate::wire::dns::RecordPair;

/// The question for consent is 55 s on the wire (a partition, then TCP sends it again): the old node puts everything
/// back and serves on alone. What comes at last must not be taken for the end of that hand-over: whatever was
/// acknowledged since would be lost, and nobody asked.
#[test]
fn a_consent_asked_for_after_everything_was_put_back_is_refused() {
    let mut world = World::unstarted(Mode::Update, 1);
    world.asynchronous = true;
    world.begin();
    world.run_until(secs(30), "a serves and b streams", |w| w.is_open(0) && w.snapshot(1).postgres.streaming);
    let ticket = world.promote(1, false);
    let consent = |d: &Delivery| match d {
        Delivery::Ask { ask, .. } => matches!(**ask, PeerQuestion::Consent { .. }),
        _ => false,
    };
    world.run_until(secs(20), "asked", |w| w.queue.values().any(consent));
    let key = world.queue.iter().find(|(_, d)| consent(d)).map(|(key, _)| *key).expect("there");
    let late = world.queue.remove(&key).expect("there");
    world.post(secs(55), late);
    world.wire_up = false;
    let before = world.acks;
    world.run_until(secs(50), "it serves on, alone", |w| w.is_open(0) && w.acks > before);
    world.wire_up = true;
    let (exit, text) = world.end_of(1, ticket);
    world.run_for(secs(10));
    assert_eq!((exit, world.is_open(0)), (1, true), "{text}");
}

/// VIP only. Each node took over while the other was off, and neither heard of it: b holds epoch 3, a served epoch 2
/// for a week. When b is switched on again its number is the higher one, but that must not give it the service.
#[test]
fn a_node_that_served_unheard_pledges_nothing_to_an_older_life_of_the_other() {
    let mut world = World::with(Mode::VipOnly, 0);
    let off = |world: &mut World, node: usize| {
        world.run_for(secs(5));
        let peer_is_off = Some(name(1 - node));
        let command = Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off };
        let ticket = world.command(node, command);
        let (exit, text) = world.end_of(node, ticket);
        assert_eq!(exit, 0, "{text}");
    };
    let ticket = world.promote(0, true);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.act(Act::PowerOff(0));
    off(&mut world, 1);
    world.kill(1);
    world.start(1);
    off(&mut world, 1);
    assert_eq!(world.durable(1).complete, Epoch(3));
    world.act(Act::PowerOff(1));
    world.act(Act::PowerOn(0));
    world.loss_accepted = true;
    off(&mut world, 0);
    assert_eq!(world.durable(0).complete, Epoch(2));
    world.run_for(secs(60));
    world.act(Act::PowerOn(1));
    world.run_for(secs(20));
    assert!(!world.is_open(1), "nobody was asked");
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    // The way back to the newer data: end b's epoch by hand.
    world.command(1, Command::Fence { reason: "a has the newer data".into() });
    world.run_for(secs(5));
    let ticket = world.promote(0, true);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!((exit, world.is_open(0)), (0, true), "{text}");
}

/// The taker gave up (its daemon started again) while the old primary was still going down for its consent: what nobody
/// waits for is not given, or nobody would serve.
#[test]
fn a_consent_that_nobody_waits_for_any_more_is_not_given() {
    let mut world = World::running();
    let question = PeerQuestion::Consent { attempt: 77, epoch: Epoch(9), handed_over: false };
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(question) });
    assert!(!world.is_open(0), "cut first");
    let stop = |d: &Delivery| matches!(d, Delivery::Pg { node: 0, .. });
    world.run_until(secs(2), "PostgreSQL is being stopped", |w| w.queue.values().any(stop));
    let key = world.queue.iter().find(|(_, d)| stop(d)).map(|(key, _)| *key).expect("just seen");
    let slow = world.queue.remove(&key).expect("there");
    world.post(secs(7), slow);
    world.run_until(secs(20), "it serves on", |w| w.is_open(0));
    assert_eq!((world.durable(0).fenced, world.durable(0).fence), (None, Epoch::NONE));
}

#[test]
fn an_operators_pause_outlives_a_switchover_that_was_given_up() {
    let mut world = World::running();
    world.command(0, Command::Pause);
    world.promote(1, false);
    world.run_until(secs(10), "clients are held", |w| w.snapshot(0).procedure.is_some());
    world.kill(1);
    world.start(1);
    world.run_until(secs(20), "given up", |w| w.snapshot(0).procedure.is_none());
    world.run_for(secs(3));
    assert_eq!(world.snapshot(0).gate.state, GateState::Paused);
    world.command(0, Command::Resume);
    assert_eq!(world.snapshot(0).gate.state, GateState::Open);
}

#[test]
fn unfence_starts_the_postgresql_that_the_fence_stopped() {
    let mut world = World::unstarted(Mode::Update, 1);
    world.fence_postgres = FencePostgres::Stop;
    world.begin();
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.command(0, Command::Fence { reason: "test".into() });
    world.run_until(secs(10), "stopped", |w| !w.nodes[0].pg.up);
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!((exit, world.is_open(0)), (0, true), "{text}");
    assert!(world.nodes[0].pg.up && !world.nodes[0].pg.in_recovery);
}

/// Observe mode. b has a's consent and waits for the edit; the nodes lose each other, a is promoted again under the
/// very number and serves; then the edit is made. b never heard of it, and the consent must not count.
#[test]
fn a_consent_whose_giver_is_not_heard_any_more_does_not_count_at_the_edit() {
    let mut world = World::with(Mode::Observe, 1);
    let ticket = world.promote(0, false);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    let waiting = world.promote(1, false);
    world.run_until(secs(10), "told to edit", |w| {
        w.nodes[1].said.iter().any(|line| line.contains("change the address"))
    });
    world.wire_up = false;
    world.run_for(secs(1));
    world.nodes[0].pg.up = true;
    world.nodes[0].pg.start += 1;
    world.run_for(secs(3));
    world.loss_accepted = true;
    let again = world.promote(0, true);
    assert_eq!(world.end_of(0, again).0, 0);
    world.loss_accepted = false;
    world.run_for(secs(5));
    assert!(world.is_open(0) && world.acks > 0);
    world.record = RecordPair::new(vec![address(1)], 5, Vec::new());
    let (exit, text) = world.end_of(1, waiting);
    assert_eq!(exit, 4, "{text}");
    assert!(world.nodes[1].pg.in_recovery, "{text}");
}

#[test]
fn a_taker_that_starts_again_lets_the_old_node_serve_on_at_once() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "clients are held", |w| w.snapshot(0).procedure.is_some());
    world.kill(1);
    world.start(1);
    let begun = world.now;
    world.run_until(secs(12), "it serves on", |w| w.is_open(0) && w.snapshot(0).procedure.is_none());
    assert!(world.now.since(begun) < secs(10), "its pulse says that nothing is under way there");
    assert_eq!(world.snapshot(0).gate.state, GateState::Open);
}

/// VIP only. Both machines lost their power and one comes back: its unit may not start PostgreSQL, nobody pledges, and
/// a person who says that the other one is off has to get the service back with our own verbs.
#[test]
fn a_promote_starts_the_postgresql_that_its_unit_was_refused() {
    let mut world = World::with(Mode::VipOnly, 0);
    let ticket = world.promote(0, true);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.act(Act::PowerOff(0));
    world.act(Act::PowerOff(1));
    world.run_for(secs(5));
    world.start(0);
    world.give(0, Event::PgStartRefused);
    world.run_for(secs(5));
    assert!(!world.nodes[0].pg.up, "nothing proves that it may be the primary");
    let peer_is_off = Some(name(1));
    let ticket = world.command(0, Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off });
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!((exit, world.is_open(0)), (0, true), "{text}");
}

#[test]
fn an_operators_pause_ends_with_the_service_here() {
    let mut world = World::running();
    world.command(0, Command::Pause);
    world.command(0, Command::Fence { reason: "test".into() });
    world.run_for(secs(5));
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!((exit, world.snapshot(0).gate.state), (0, GateState::Open), "{text}");
}

/// Only a fence or a refused unit makes a PostgreSQL that is down ours to start, and only once a person confirmed:
/// "refused" means that nothing was changed.
#[test]
fn a_refused_promote_leaves_a_standby_that_is_down_alone() {
    let mut world = World::running();
    world.nodes[1].pg.up = false;
    world.run_for(secs(2));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    world.run_for(secs(3));
    assert!(!world.nodes[1].pg.up && world.nodes[1].pg.follows, "it still belongs to its primary");
}
