//! Interleavings that a second look found: each broke a rule before it was mended.

use super::world::{Act, Delivery, World, name, secs};
use crate::base::ids::Epoch;
use crate::engine::setup::Mode;
use crate::engine::turn::{Command, PeerQuestion};

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
