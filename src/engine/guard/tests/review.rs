//! Interleavings that a second look found: each broke a rule before it was mended.

use super::world::{Delivery, World, secs};
use crate::engine::setup::Mode;
use crate::engine::turn::PeerQuestion;

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
