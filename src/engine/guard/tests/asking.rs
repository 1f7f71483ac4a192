//! How long a command asks before it decides: *alive* means, it answers a question asked now.

use super::world::{Act, MS, World, name, secs};
use crate::base::time::Duration;

/// From the command on b until it knows whether a is alive.
fn asked_for(world: &mut World) -> Duration {
    let from = world.now;
    world.promote(1, false);
    let asks = |w: &World| w.snapshot(1).procedure.is_some_and(|p| p.step == "asking the peer and the witness");
    world.run_until(secs(5), "decided", |w| !asks(w));
    world.now.since(from)
}

fn said(world: &World, text: &str) -> bool {
    world.nodes[1].said.iter().any(|line| line.starts_with(text))
}

#[test]
fn a_peer_that_has_long_been_silent_is_not_waited_for() {
    let mut world = World::running();
    world.kill_all(0);
    world.run_for(secs(4));
    let took = asked_for(&mut world);
    assert!(took >= MS * 400 && took < MS * 450, "{took:?}");
    assert!(said(&world, "a does not answer"), "{:?}", world.nodes[1].said);
    world.run_until(secs(10), "b serves", |w| w.is_open(1));
}

#[test]
fn a_peer_that_fell_silent_just_now_has_its_two_seconds() {
    for before in [Duration::ZERO, secs(1)] {
        let mut world = World::running();
        world.kill_all(0);
        world.run_for(before);
        let took = asked_for(&mut world);
        assert!(took >= secs(2), "{before:?}: {took:?}");
    }
}

/// Silence is an unanswered question, not a long pause between two.
#[test]
fn a_peer_that_was_not_asked_is_not_silent() {
    let age = |w: &World| w.snapshot(1).peer.and_then(|peer| peer.age_ms).unwrap_or(9999);
    let mut world = World::unstarted(crate::engine::setup::Mode::Update, 1);
    world.poll = MS * 2500;
    world.begin();
    world.run_until(secs(60), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.run_until(secs(10), "just asked", |w| age(w) < 10);
    world.kill_all(0);
    world.run_for(MS * 2200);
    assert!(age(&world) > 2000, "nothing came meanwhile");
    let took = asked_for(&mut world);
    assert!(took >= secs(2), "{took:?}");
}

/// It comes back at the very moment: an answer within the limit counts, a later one does not.
#[test]
fn a_long_silent_peer_that_answers_is_alive() {
    for (late, alive) in [(MS * 300, true), (MS * 700, false)] {
        let mut world = World::running();
        world.act(Act::Freeze(0, secs(4) + late));
        world.run_for(secs(4));
        asked_for(&mut world);
        let text = if alive { "is alive" } else { "does not answer" };
        assert!(said(&world, &format!("{} {text}", name(0))), "{late:?}: {:?}", world.nodes[1].said);
    }
}

/// Each answer begins the silence anew.
#[test]
fn a_peer_that_answered_since_is_given_two_seconds_again() {
    let mut world = World::running();
    world.act(Act::Freeze(0, secs(4)));
    world.run_for(secs(6));
    world.kill_all(0);
    let took = asked_for(&mut world);
    assert!(took >= secs(2), "{took:?}");
}
