//! The fence (R5) against what stands in its way.

use super::world::{self, World, secs};
use crate::engine::turn::Command;

#[test]
fn a_task_that_hangs_with_postgresql_does_not_hold_the_fence_up() {
    let mut world = World::running();
    world.kill(0);
    world.start(0);
    // Its first task for PostgreSQL, which only prepares, is never answered.
    let task = |w: &World| {
        let found = w.queue.iter().find(|(_, delivery)| matches!(delivery, world::Delivery::Pg { node: 0, .. }));
        found.map(|(at, _)| *at)
    };
    world.run_until(secs(10), "a task for PostgreSQL", |w| task(w).is_some());
    let hung = task(&world).expect("it was there");
    world.queue.remove(&hung);
    world.command(0, Command::Fence { reason: "test".to_owned() });
    world.run_until(secs(2), "PostgreSQL is demoted", |w| w.nodes[0].pg.in_recovery);
}
