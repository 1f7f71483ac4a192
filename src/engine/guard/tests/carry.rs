//! Clients held over a switchover: kept behind a gate that passes nothing, carried over once, put back, or cut.

use super::world::{Act, MS, World, address, secs};
use crate::base::ids::{Epoch, OpId};
use crate::engine::setup::Mode;
use crate::engine::status::GateState;
use crate::engine::turn::{Command, Effect, Event, PeerAnswer, PeerQuestion, PgOutput, PgTask};

/// Lines that node 0 was told of its clients.
fn carried(world: &World) -> Vec<&str> {
    world.nodes[0].said.iter().map(String::as_str).filter(|line| line.starts_with("carried over")).collect()
}

fn step_is(world: &World, node: usize, step: &str) -> bool {
    world.snapshot(node).procedure.is_some_and(|p| p.step == step)
}

#[test]
fn clients_wait_through_the_consent_and_are_carried_over_when_the_peer_is_open() {
    let mut world = World::running();
    let cuts = world.snapshot(0).counters.gate_cuts;
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "being stopped", |w| step_is(w, 0, "stopping PostgreSQL"));
    assert!(!world.is_open(0) && world.snapshot(0).gate.state == GateState::Paused);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    assert_eq!(world.snapshot(0).gate.state, GateState::Paused, "they wait under the fence");
    let opened = std::cell::Cell::new(None);
    world.run_until(secs(10), "carried over", |w| {
        if w.is_open(1) && opened.get().is_none() {
            opened.set(Some(w.now));
        }
        assert!(opened.get().is_some() || carried(w).is_empty(), "nobody is carried to a gate that is shut");
        !carried(w).is_empty()
    });
    let waited = world.now.since(opened.get().expect("opened"));
    assert!(waited < MS * 100, "heard at once, not with the next poll: {waited:?}");
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert_eq!(carried(&world), ["carried over at 2"]);
    assert_eq!(world.snapshot(0).gate.state, GateState::Fenced);
    assert_eq!(world.snapshot(0).counters.gate_cuts, cuts + 1, "the end of the wait is the only cut");
    world.run_for(secs(20));
    assert_eq!(carried(&world).len(), 1, "once");
}

#[test]
fn a_checkpoint_runs_before_anybody_is_held() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(5), "checkpoint", |w| step_is(w, 0, "checkpoint, while clients run"));
    assert!(world.is_open(0) && world.snapshot(0).gate.state == GateState::Open, "clients run");
    world.run_until(secs(5), "held", |w| w.snapshot(0).gate.state == GateState::Paused);
    // The taker says what the old node is at.
    world.run_until(secs(10), "b serves", |w| w.is_open(1));
}

/// The taker dies at each stage before the consent: everything is put back, and nobody was ended.
#[test]
fn a_switchover_put_back_at_any_stage_ends_no_session() {
    for stage in [
        "checkpoint, while clients run",
        "holding clients",
        "clients held",
        "stopping PostgreSQL",
        "PostgreSQL stopped",
    ] {
        let mut world = World::running();
        let cuts = world.snapshot(0).counters.gate_cuts;
        world.promote(1, false);
        world.run_until(secs(5), stage, |w| step_is(w, 0, stage));
        world.kill(1);
        world.start(1);
        world.run_until(secs(25), "it serves on", |w| w.is_open(0) && w.snapshot(0).procedure.is_none());
        world.run_for(secs(1));
        assert_eq!(world.snapshot(0).gate.state, GateState::Open, "{stage}: clients go on");
        assert_eq!(world.snapshot(0).counters.gate_cuts, cuts, "{stage}: nobody was ended");
        assert!(carried(&world).is_empty(), "{stage}");
    }
}

#[test]
fn a_taker_that_never_opens_costs_the_clients_their_patience_and_no_more() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    world.kill_all(1);
    world.run_for(secs(20));
    assert_eq!(world.snapshot(0).gate.state, GateState::Paused, "they wait");
    world.run_for(secs(12));
    assert_eq!(world.snapshot(0).gate.state, GateState::Fenced, "query_wait is over");
    assert!(!world.is_open(0) && carried(&world).is_empty());
}

#[test]
fn whatever_is_not_this_consent_cuts_those_who_wait() {
    type Case = (&'static str, fn(&mut World));
    let cases: [Case; 3] = [
        ("the operator takes the service back", |world| {
            world.command(0, Command::Unfence);
        }),
        ("the operator fences above it", |world| {
            world.command(0, Command::Fence { reason: "test".into() });
        }),
        ("the daemon ends", |world| world.give(0, Event::ShutdownAsked)),
    ];
    for (what, act) in cases {
        let mut world = World::running();
        world.promote(1, false);
        world.run_until(secs(10), "consented", |w| w.durable(0).consented);
        world.kill(1);
        act(&mut world);
        world.run_for(secs(1));
        assert_ne!(world.snapshot(0).gate.state, GateState::Paused, "{what}");
        assert!(carried(&world).is_empty(), "{what}");
    }
}

/// Before the consent the lease has to stand: a record that was edited meanwhile cuts.
#[test]
fn a_record_that_speaks_against_this_node_before_the_consent_cuts_those_who_wait() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "stopped", |w| step_is(w, 0, "PostgreSQL stopped"));
    world.kill(1);
    world.record.addresses = vec![address(1)];
    world.run_for(secs(2));
    assert_ne!(world.snapshot(0).gate.state, GateState::Paused);
    assert!(!world.is_open(0));
}

#[test]
fn with_a_vip_sessions_end_before_it_moves() {
    let mut world = World::with(Mode::VipOnly, 0);
    let ticket = world.promote(0, true);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "being stopped", |w| step_is(w, 0, "stopping PostgreSQL"));
    assert_eq!(world.snapshot(0).gate.state, GateState::Shut, "cut at a boundary");
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(carried(&world).is_empty());
}

/// A node that restarts in the middle has no clients: it carries nobody, whatever it hears.
#[test]
fn a_restart_after_the_consent_carries_nobody() {
    let mut world = World::running();
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    world.act(Act::Kill(0));
    world.start(0);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.run_for(secs(5));
    assert!(carried(&world).is_empty());
}

/// Clients of the taker that the old node serves come back with the service.
#[test]
fn who_was_forwarded_is_waited_for_from_the_refusal_on() {
    let known = |world: &World| {
        let forwards = world.nodes[1].guard.as_ref().expect("runs").forwards;
        (forwards.serves, forwards.returns.map(|(epoch, _)| epoch))
    };
    let (forwards, waits, nobody) = ((Some(Epoch(1)), None), (None, Some(Epoch(1))), (None, None));
    let mut world = World::running();
    world.run_until(secs(5), "b forwards", |w| known(w) == forwards);
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "stopped", |w| step_is(w, 0, "PostgreSQL stopped"));
    assert_eq!(known(&world), forwards, "it may still be put back");
    world.run_until(secs(10), "refused", |w| known(w) == waits);
    assert!(!world.is_open(1));
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert_eq!(known(&world), waits, "they come once the old node has heard that the gate is open");
    world.run_for(secs(31));
    assert_eq!(known(&world), nobody, "nobody is held for longer");
    assert!(world.is_open(1));
    // Of an old node that dies nobody comes back.
    let mut world = World::running();
    world.run_until(secs(5), "b forwards", |w| known(w) == forwards);
    world.promote(1, false);
    world.run_until(secs(10), "refused", |w| known(w) == waits);
    world.kill_all(0);
    world.run_for(secs(5));
    assert_eq!(known(&world), nobody);
    // A failover waits for nobody either.
    let mut world = World::running();
    world.run_until(secs(5), "b forwards", |w| known(w) == forwards);
    world.kill_all(0);
    world.run_until(secs(10), "silent", |w| known(w) == nobody);
    world.promote(1, true);
    world.run_until(secs(60), "b serves", |w| {
        assert_eq!(known(w), nobody);
        w.is_open(1)
    });
}

/// The old side by hand: how many were cancelled is told, and a long checkpoint is followed by a short one.
#[test]
fn what_the_drain_cancelled_is_told_to_the_taker() {
    let mut world = World::running();
    let give = |world: &mut World, event: Event| -> Vec<Effect> {
        let now = world.clocks(0);
        let mut fx = Vec::new();
        world.nodes[0].guard.as_mut().expect("runs").handle(now, event, &mut fx);
        fx
    };
    let checkpoint = |fx: &[Effect]| {
        let task = |effect: &Effect| match effect {
            Effect::Pg { op, task: PgTask::Checkpoint } => Some(*op),
            _ => None,
        };
        fx.iter().find_map(task)
    };
    world.run_for(MS * 10);
    let question = Box::new(PeerQuestion::Prepare { attempt: 7, epoch: Epoch(9) });
    let fx = give(&mut world, Event::PeerAsked { ticket: 5, question });
    let op = checkpoint(&fx).expect("a checkpoint first");
    assert!(!fx.iter().any(|e| matches!(e, Effect::HoldToCarry | Effect::HoldClients)), "{fx:?}");
    world.now = world.now + secs(2);
    let fx = give(&mut world, Event::PgDone { op, result: Ok(PgOutput::Done) });
    let op = checkpoint(&fx).expect("it took long: another");
    let fx = give(&mut world, Event::PgDone { op, result: Ok(PgOutput::Done) });
    assert!(fx.contains(&Effect::HoldToCarry), "{fx:?}");
    let drain = |effect: &Effect| match effect {
        Effect::Drain { op, .. } => Some(*op),
        _ => None,
    };
    let op: OpId = fx.iter().find_map(drain).expect("a drain");
    let fx = give(&mut world, Event::Drained { op, cancelled: 3, busy: 1 });
    let told = |effect: &Effect| match effect {
        Effect::AnswerPeer { ticket: 5, answer } => matches!(**answer, PeerAnswer::Ready { cancelled: 3, busy: 1, .. }),
        _ => false,
    };
    assert!(fx.iter().any(told), "{fx:?}");
}
