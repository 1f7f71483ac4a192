//! The old side of a switchover when something ends in the middle: a PostgreSQL that was stopped for it does not stay
//! stopped, a taker that is gone holds nobody, and nothing that hangs keeps a stop waiting.

use super::world::{MS, World, secs};
use crate::base::ids::OpId;
use crate::engine::durable::Entry;
use crate::engine::turn::{Effect, Event, PeerQuestion, PgTask};

fn step_is(world: &World, node: usize, step: &str) -> bool {
    world.snapshot(node).procedure.is_some_and(|p| p.step == step)
}

/// One event for node a, by hand.
fn give(world: &mut World, event: Event) -> Vec<Effect> {
    let now = world.clocks(0);
    let mut fx = Vec::new();
    world.nodes[0].guard.as_mut().expect("runs").handle(now, event, &mut fx);
    fx
}

fn task(fx: &[Effect], wanted: &PgTask) -> Option<OpId> {
    fx.iter().find_map(|effect| match effect {
        Effect::Pg { op, task } if task == wanted => Some(*op),
        _ => None,
    })
}

/// Finding 3: only the daemon dies, and nobody else starts PostgreSQL.
#[test]
fn a_daemon_that_died_after_the_stop_starts_postgresql_again() {
    for stage in ["stopping PostgreSQL", "PostgreSQL stopped"] {
        let mut world = World::running();
        let ticket = world.promote(1, false);
        world.run_until(secs(10), stage, |w| {
            step_is(w, 0, stage) && (stage != "PostgreSQL stopped" || !w.nodes[0].pg.up)
        });
        world.kill(0);
        // What the killed daemon had begun goes on without it.
        world.nodes[0].pg.up = false;
        world.run_for(MS * 100);
        world.start(0);
        assert_ne!(world.end_of(1, ticket).0, 0, "{stage}");
        world.run_until(secs(30), "a serves again", |w| w.is_open(0));
        world.run_for(secs(2));
        assert_eq!(world.durable(0).stopping, None, "{stage}: it runs again");
    }
}

/// The same with the consent: the stop was done, and the consent never written.
#[test]
fn a_daemon_that_died_before_it_wrote_the_consent_starts_postgresql_again() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "stopped", |w| step_is(w, 0, "PostgreSQL stopped"));
    world.nodes[0].journal_broken = true;
    world.run_until(secs(10), "asked for consent", |w| !step_is(w, 0, "PostgreSQL stopped"));
    world.kill(0);
    world.kill(1);
    world.nodes[0].journal_broken = false;
    world.start(0);
    world.start(1);
    world.run_until(secs(30), "a serves again", |w| w.is_open(0));
}

#[test]
fn nothing_is_stopped_that_the_journal_does_not_know() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "held", |w| step_is(w, 0, "clients held"));
    world.nodes[0].journal_broken = true;
    world.run_until(secs(20), "put back", |w| w.snapshot(0).procedure.is_none());
    assert!(world.nodes[0].pg.up && world.is_open(0), "it was never stopped");
    world.run_for(secs(5));
    assert!(world.is_open(0));
}

/// Finding 8.
#[test]
fn a_start_that_failed_at_put_back_is_tried_again() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "stopped", |w| step_is(w, 0, "PostgreSQL stopped"));
    world.kill(1);
    let attempt = world.snapshot(0).procedure.expect("runs").id;
    let fx = give(&mut world, Event::PeerAsked { ticket: 9, question: Box::new(PeerQuestion::PutBack { attempt }) });
    let op = task(&fx, &PgTask::Start).expect("put back");
    give(&mut world, Event::PgDone { op, result: Err("no memory".to_owned()) });
    world.run_until(secs(30), "a serves again", |w| w.is_open(0));
    assert!(world.nodes[0].disk.contains(&Entry::Stopping { attempt }));
}
