//! The old side of a switchover when something ends in the middle: a PostgreSQL that was stopped for it does not stay
//! stopped, a taker that is gone holds nobody, and nothing that hangs keeps a stop waiting.

use super::super::PgOwner;
use super::world::{Delivery, MS, World, name, secs};
use crate::base::ids::{Epoch, OpId, TimelineId};
use crate::engine::durable::Entry;
use crate::engine::status::GateState;
use crate::engine::turn::{Command, Effect, Event, PeerAnswer, PeerQuestion, PgOutput, PgTask};

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

fn refused(fx: &[Effect], whom: u64) -> Option<String> {
    fx.iter().find_map(|effect| match effect {
        Effect::AnswerPeer { ticket, answer } if *ticket == whom => match &**answer {
            PeerAnswer::Refused { why } => Some(why.clone()),
            _ => None,
        },
        _ => None,
    })
}

/// Only the daemon dies, and nobody else starts PostgreSQL.
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

/// A start that fails once is not the end of it.
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

/// The taker dies while a long checkpoint runs, and commits hang for want of its PostgreSQL.
#[test]
fn a_taker_that_died_during_a_long_checkpoint_is_not_waited_for() {
    for (what, machine) in [("its daemon", false), ("its machine", true)] {
        let mut world = World::running();
        world.promote(1, false);
        world.run_until(secs(5), "checkpoint", |w| step_is(w, 0, "checkpoint, while clients run"));
        let slow = |d: &Delivery| matches!(d, Delivery::Pg { node: 0, task: PgTask::Checkpoint, .. });
        let key = world.queue.iter().find(|(_, d)| slow(d)).map(|(key, _)| *key).expect("under way");
        let slow = world.queue.remove(&key).expect("there");
        world.post(secs(300), slow);
        if machine {
            world.kill_all(1)
        } else {
            world.kill(1)
        }
        world.run_until(secs(12), what, |w| w.snapshot(0).procedure.is_none());
        assert!(world.is_open(0), "{what}: it serves");
        if machine {
            // And does not wait for the checkpoint to go alone.
            world.run_until(secs(20), "alone", |w| w.nodes[0].pg.list.is_empty());
        }
    }
}

/// The checkpoint ends before the silence was long enough: nobody is held for a taker that was not heard lately.
#[test]
fn nobody_is_held_for_a_taker_that_is_not_heard() {
    let mut world = World::running();
    world.run_for(MS * 10);
    let question = Box::new(PeerQuestion::Prepare { attempt: 7, epoch: Epoch(9) });
    let fx = give(&mut world, Event::PeerAsked { ticket: 5, question });
    let op = task(&fx, &PgTask::Checkpoint).expect("a checkpoint first");
    world.now = world.now + secs(6);
    let fx = give(&mut world, Event::PgDone { op, result: Ok(PgOutput::Done) });
    let op = task(&fx, &PgTask::Checkpoint).expect("it took long: another");
    let fx = give(&mut world, Event::PgDone { op, result: Ok(PgOutput::Done) });
    assert_eq!(refused(&fx, 5).expect("refused"), "b was not heard for 6 s");
    assert!(!fx.iter().any(|e| matches!(e, Effect::HoldToCarry | Effect::HoldClients)), "{fx:?}");
    assert_eq!(task(&fx, &PgTask::Checkpoint), None);
}

/// A look that hangs with PostgreSQL does not keep the fence waiting, nor a checkpoint a consent's stop.
#[test]
fn what_hangs_gives_way_to_a_fence_and_to_a_consent() {
    let mut world = World::running();
    world.run_for(MS * 10);
    let now = world.clocks(0);
    let mut fx = Vec::new();
    let guard = world.nodes[0].guard.as_mut().expect("runs");
    guard.pg_task_next(PgOwner::Look, PgTask::LookAsSource(None), &mut fx);
    guard.handle(now, Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } }, &mut fx);
    assert!(task(&fx, &PgTask::Demote { follow_peer: false }).is_some(), "{fx:?}");

    let mut world = World::running();
    world.run_for(MS * 10);
    let question = Box::new(PeerQuestion::Prepare { attempt: 7, epoch: Epoch(9) });
    let fx = give(&mut world, Event::PeerAsked { ticket: 5, question });
    task(&fx, &PgTask::Checkpoint).expect("a checkpoint first");
    let question = Box::new(PeerQuestion::Consent { attempt: 7, epoch: Epoch(9), handed_over: false });
    let fx = give(&mut world, Event::PeerAsked { ticket: 6, question });
    let written = |effect: &Effect| match effect {
        Effect::Record { seq, entries } if entries.contains(&Entry::Stopping { attempt: 7 }) => Some(*seq),
        _ => None,
    };
    let seq = fx.iter().find_map(written).expect("written down first");
    let guard = world.nodes[0].guard.as_mut().expect("runs");
    guard.writing.retain(|(s, ..)| *s >= seq);
    let fx = give(&mut world, Event::Recorded { seq });
    assert!(task(&fx, &PgTask::Stop).is_some(), "{fx:?}");
}

/// A standby that was told to promote may become a primary after its consent.
#[test]
fn a_standby_with_a_promotion_under_way_is_stopped_before_it_consents() {
    for told in [false, true] {
        let mut world = World::running();
        world.run_for(MS * 10);
        let now = world.clocks(1);
        let mut fx = Vec::new();
        let guard = world.nodes[1].guard.as_mut().expect("runs");
        if told {
            guard.pg_task_next(PgOwner::Takeover, PgTask::Promote { above: TimelineId(1) }, &mut fx);
            let op = task(&fx, &PgTask::Promote { above: TimelineId(1) }).expect("begun");
            guard.handle(now, Event::PgDone { op, result: Err("it goes on replaying".to_owned()) }, &mut fx);
        }
        fx.clear();
        let question = Box::new(PeerQuestion::Consent { attempt: 7, epoch: Epoch(9), handed_over: false });
        guard.handle(now, Event::PeerAsked { ticket: 6, question }, &mut fx);
        let consents = fx.iter().any(|e| {
            matches!(e, Effect::Record { entries, .. }
                if entries.iter().any(|entry| matches!(entry, Entry::Consented { .. })))
        });
        assert_eq!(consents, !told, "{fx:?}");
        if told {
            world.effects(1, fx);
            world.run_until(secs(5), "stopped, then given", |w| w.durable(1).consented);
            assert!(!world.nodes[1].pg.up);
        }
    }
}

/// A second command on the old node shows the first one's progress.
#[test]
fn a_command_on_the_old_node_joins_the_peers_switchover() {
    let dry = Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off: None };
    let promote = Command::Promote { dry_run: false, yes: true, accept_data_loss: false, peer_is_off: None };
    let rejoin = Command::Rejoin { node: name(0), dry_run: false };
    for command in [dry.clone(), promote, rejoin] {
        let mut world = World::running();
        let ticket = world.promote(1, false);
        world.run_until(secs(10), "being stopped", |w| step_is(w, 0, "stopping PostgreSQL"));
        let second = world.command(0, command.clone());
        assert_eq!(world.snapshot(0).gate.state, GateState::Paused, "{command:?}: clients wait on");
        assert_eq!(world.end_of(1, ticket).0, 0, "{command:?}");
        assert_eq!(world.end_of(0, second).0, 0, "{command:?}");
        assert!(world.nodes[0].said.iter().any(|line| line == "carried over at 2"), "{command:?}");
    }
    // Nor does a dry run that began before it keep it from being done.
    let mut world = World::running();
    let (rehearsal, ticket) = (world.command(0, dry), world.promote(1, false));
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(world.end_of(0, rehearsal).0 <= 1);
}

#[test]
fn a_rejoin_in_the_wrong_direction_is_refused_at_once() {
    let mut world = World::running();
    world.kill_all(1);
    let ticket = world.command(0, Command::Rejoin { node: name(0), dry_run: false });
    let (exit, text) = world.nodes[0].ends.get(&ticket).cloned().expect("at once");
    assert_eq!((exit, text.as_str()), (3, "refused: a is the active node itself: the wrong direction"));
}
