//! A promote at night: what it waits for before it refuses, and what it counts down.

use super::world::{Act, World, secs};
use crate::engine::turn::Command;

/// A daemon that was started a moment ago answers before it has looked at its PostgreSQL: that is no reason to refuse.
#[test]
fn a_promote_before_the_first_look_waits_for_it() {
    let mut world = World::running();
    // Both answers are there long before the next look.
    world.look_every = secs(2);
    world.run_for(secs(1));
    world.kill(1);
    world.start(1);
    let command = Command::Promote { dry_run: true, yes: false, accept_data_loss: false, peer_is_off: None };
    let ticket = world.command(1, command);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

/// One whose PostgreSQL is not there at all is refused, and not after minutes.
#[test]
fn a_promote_without_postgresql_is_refused_in_seconds() {
    let mut world = World::running();
    world.act(Act::PowerOff(0));
    world.run_for(secs(10));
    world.nodes[1].pg.up = false;
    world.kill(1);
    world.start(1);
    let before = world.now;
    let ticket = world.promote(1, true);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains("the local PostgreSQL is not up"), "{text}");
    assert!(world.now.since(before) < secs(10), "it took {:?}", world.now.since(before));
}
