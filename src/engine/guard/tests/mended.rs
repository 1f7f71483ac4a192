//! What an auditor found by trying the whole program: a PostgreSQL that does not answer, a taker that falls silent
//! while clients are held, and words that did not say what was so.

use super::world::{Delivery, MS, World, name, secs};
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::setup::Mode;
use crate::engine::turn::{Command, PgTask};

const DRY: Command = Command::Promote { dry_run: true, yes: false, accept_data_loss: false, peer_is_off: None };

fn step_is(world: &World, node: usize, step: &str) -> bool {
    world.snapshot(node).procedure.is_some_and(|p| p.step == step)
}

fn said(world: &World, node: usize, words: &str) -> bool {
    world.nodes[node].said.iter().any(|line| line.contains(words))
}

fn took(world: &World, begun: crate::base::time::Instant) -> Duration {
    world.now.since(begun)
}

/// The active PostgreSQL hangs and its daemon lives: it consents, whenever the hang began.
#[test]
fn a_promote_over_a_hung_primary_goes_by_consent() {
    // Long before the command; just before it; while the checkpoint runs.
    for (hangs_for, at) in [(20, "before"), (0, "just before"), (0, "checkpoint, while clients run")] {
        let mut world = World::running();
        if at == "before" || at == "just before" {
            world.nodes[0].pg.frozen = true;
            world.run_for(secs(hangs_for));
        }
        let begun = world.now;
        let ticket = world.promote(1, false);
        if at.starts_with("checkpoint") {
            world.run_until(secs(5), at, |w| step_is(w, 0, at));
            // The session was given, and then nothing: only the looks tell.
            let slow = |d: &Delivery| matches!(d, Delivery::Pg { node: 0, task: PgTask::Checkpoint, .. });
            let key = world.queue.iter().find(|(_, d)| slow(d)).map(|(key, _)| *key).expect("under way");
            world.queue.remove(&key);
            world.nodes[0].pg.frozen = true;
        }
        let (exit, text) = world.end_of(1, ticket);
        assert_eq!((exit, world.is_open(1), world.is_open(0)), (0, true, false), "{at}: {text}");
        assert!(took(&world, begun) < secs(15), "{at}: {:?}", took(&world, begun));
        assert!(said(&world, 1, "its daemon cuts the gate and stops it"), "{at}: {:#?}", world.nodes[1].said);
        assert!(said(&world, 1, "no acknowledged write is missing"), "{at}");
        assert_eq!(world.missing_on(1), None, "{at}");
    }
}

/// It is stopped before the consent, and only its data decides what is lost.
#[test]
fn a_hung_primary_that_was_alone_is_replaced_with_loss_accepted_only() {
    let mut world = World::running();
    world.streams_up = false;
    let alone = |w: &World| w.marker().is_some_and(|m| m.sync.is_none());
    world.run_until(secs(30), "alone", alone);
    world.run_for(secs(5));
    world.nodes[0].pg.frozen = true;
    world.run_for(secs(10));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!((exit, text.contains("--accept-data-loss")), (3, true), "{text}");
    // A switchover never loses anything, and says what does help.
    let ticket = world.command(1, Command::Switchover { to: Some(name(1)), dry_run: false });
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!((exit, text.contains("promote` here takes over with a's consent")), (3, true), "{text}");
    assert!(world.is_open(0), "nothing was changed");
}

/// A switchover does not turn into anything else, whoever finds out.
#[test]
fn a_switchover_from_a_hung_primary_ends_within_seconds() {
    for long in [false, true] {
        let mut world = World::running();
        world.nodes[0].pg.frozen = true;
        world.run_for(if long { secs(20) } else { MS });
        let begun = world.now;
        let ticket = world.command(1, Command::Switchover { to: Some(name(1)), dry_run: false });
        let (exit, text) = world.end_of(1, ticket);
        assert_eq!(exit, 3, "{text}");
        assert!(text.contains("`portcullis promote` here takes over with a's consent"), "{text}");
        assert!(took(&world, begun) < secs(10) && world.is_open(0));
        assert!(!said(&world, 1, "the plan: a failover") && !said(&world, 1, "the plan: a takeover") || !long);
    }
}

/// Without a marker the word of the old node counts once it is fenced: the refusal says so, within seconds.
#[test]
fn without_a_marker_a_hung_primary_is_fenced_first() {
    let mut world = World::with(Mode::VipOnly, 0);
    let ticket = world.promote(0, true);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.nodes[0].pg.frozen = true;
    world.run_for(secs(10));
    let begun = world.now;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!((exit, text.contains("`portcullis fence` on a stops it")), (3, true), "{text}");
    assert!(took(&world, begun) < secs(10));
    world.command(0, Command::Fence { reason: "it hangs".into() });
    world.run_for(secs(3));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!((exit, world.is_open(1)), (0, true), "{text}");
}

/// What monitoring reads on the node whose PostgreSQL hangs.
#[test]
fn a_hung_primary_is_not_called_in_sync() {
    let mut world = World::running();
    assert_eq!(world.snapshot(0).postgres.hangs_since, None);
    world.nodes[0].pg.frozen = true;
    world.run_for(secs(8));
    let seen = world.snapshot(0);
    assert!(seen.gate.open && seen.postgres.hangs_since.is_some() && !seen.replication.in_sync);
    assert!(seen.advice.is_some_and(|advice| advice.starts_with("portcullis promote    (on b:")));
    assert_eq!(seen.events.iter().filter(|event| event.kind == "postgres_silent").count(), 1);
    world.nodes[0].pg.frozen = false;
    world.run_for(secs(4));
    let seen = world.snapshot(0);
    assert!(seen.postgres.hangs_since.is_none() && seen.replication.in_sync);
}

/// The taker dies, its daemon alone or its machine, while clients are held: nothing was consented to, so they go on
/// well before `pool.query_wait` (30 s).
#[test]
fn a_taker_that_died_while_clients_are_held_holds_them_a_few_seconds() {
    for stage in ["holding clients", "clients held", "PostgreSQL stopped"] {
        for machine in [false, true] {
            let mut world = World::running();
            world.promote(1, false);
            let there = |w: &World| step_is(w, 0, stage) && (stage != "PostgreSQL stopped" || !w.nodes[0].pg.up);
            world.run_until(secs(10), stage, there);
            if machine {
                world.kill_all(1)
            } else {
                world.kill(1)
            }
            let begun = world.now;
            world.run_until(secs(60), stage, |w| w.snapshot(0).procedure.is_none() && w.nodes[0].pg.up);
            assert!(took(&world, begun) < secs(10), "{stage}, machine {machine}: {:?}", took(&world, begun));
            world.run_until(secs(10), "it serves", |w| w.is_open(0));
            assert!(took(&world, begun) < secs(20), "{stage}, machine {machine}: {:?}", took(&world, begun));
        }
    }
}

/// Slower polls do not make a taker that is there look dead.
#[test]
fn a_taker_with_slow_polls_is_waited_for() {
    let mut world = World::unstarted(Mode::Update, 1);
    world.poll = secs(8);
    world.timing.lease = secs(20);
    world.begin();
    world.run_until(secs(90), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.run_for(secs(3));
    world.promote(1, false);
    world.run_until(secs(10), "held", |w| step_is(w, 0, "clients held"));
    world.mute[1] = true;
    let begun = world.now;
    world.run_until(secs(60), "over", |w| w.snapshot(0).procedure.is_none());
    let took = took(&world, begun);
    assert!(took > secs(9) && took < secs(25), "{took:?}");
}

/// The taker's own PostgreSQL does not answer: nobody is held for it, and a rehearsal says so too.
#[test]
fn a_hung_standby_is_refused_before_anybody_is_held() {
    for (what, wait) in [("known", secs(10)), ("not known yet", MS)] {
        for command in [DRY, Command::Switchover { to: Some(name(1)), dry_run: false }] {
            let mut world = World::running();
            world.nodes[1].pg.frozen = true;
            world.run_for(wait);
            let ticket = world.command(1, command.clone());
            let mut held = false;
            while !world.nodes[1].ends.contains_key(&ticket) {
                world.step();
                held |= world.nodes[0].guard.as_ref().is_some_and(|guard| guard.gate.paused);
            }
            let (exit, text) = world.end_of(1, ticket);
            assert_eq!((exit, held), (3, false), "{what}, {command:?}: {text}");
            assert!(text.contains("the local PostgreSQL does not answer"), "{what}: {text}");
        }
    }
}

#[test]
fn under_block_a_failover_says_that_commits_will_wait() {
    let mut world = World::unstarted(Mode::Update, 1);
    world.block = true;
    world.begin();
    world.run_until(secs(30), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.kill_all(0);
    world.run_for(secs(3));
    let ticket = world.command(1, DRY);
    world.end_of(1, ticket);
    assert!(said(&world, 1, "every commit waits until a follows as standby"), "{:#?}", world.nodes[1].said);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    let seen = world.snapshot(1);
    assert!(seen.replication.blocks && !seen.replication.in_sync);
}

/// The daemon dies in the countdown; the same command again wins the next epoch, and nobody is woken for that.
#[test]
fn our_own_update_is_no_strange_record() {
    let mut world = World::running();
    world.kill_all(0);
    world.run_for(secs(3));
    world.promote(1, false);
    world.run_until(secs(10), "countdown", |w| step_is(w, 1, "waiting out the old node's lease"));
    world.kill(1);
    world.start(1);
    world.run_for(secs(2));
    // Polls come at any moment: also between the landing of the update and the journal's answer.
    for node in &mut world.nodes {
        node.said.clear();
    }
    world.poll = MS * 2;
    world.kill(1);
    world.start(1);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    let strange: Vec<_> =
        world.snapshot(1).events.into_iter().filter(|event| event.kind == "record_says_nothing").collect();
    assert!(strange.is_empty(), "{strange:?}");
}

/// A command that was given for the other node and finds that one at something else says so.
#[test]
fn a_relayed_command_says_what_it_shows() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.revive(0);
    world.run_until(secs(20), "fenced", |w| w.nodes[0].shadow.fenced.is_some());
    world.run_for(secs(4));
    let first = world.command(0, Command::Rejoin { node: name(0), dry_run: false });
    world.run_for(MS * 5);
    let second = world.command(1, Command::Switchover { to: Some(name(0)), dry_run: false });
    assert_eq!(world.end_of(1, second).0, 0);
    assert_eq!(world.end_of(0, first).0, 0);
    assert!(said(&world, 1, "a rejoin is under way on a ("), "{:#?}", world.nodes[1].said);
}

/// The active node shows the other one's rejoin, and says before it that one is wanted.
#[test]
fn the_active_node_tells_of_the_other_ones_rejoin() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.revive(0);
    world.run_until(secs(20), "fenced", |w| w.nodes[0].shadow.fenced.is_some());
    world.run_for(secs(4));
    let advice = world.snapshot(1).advice.unwrap_or_default();
    assert!(advice.starts_with("portcullis rejoin a "), "{advice}");
    let ticket = world.command(0, Command::Rejoin { node: name(0), dry_run: false });
    let shown = |w: &World| w.snapshot(1).procedure.is_some_and(|p| p.kind == "rejoin" && p.step.starts_with("on a: "));
    world.run_until(secs(20), "shown there", shown);
    assert_eq!(world.end_of(0, ticket).0, 0);
    world.run_until(secs(5), "over", |w| w.snapshot(1).procedure.is_none());
    assert_eq!(world.snapshot(1).advice, None);
}

/// A standby that is in sync is left alone: neither stopped, nor is the record touched.
#[test]
fn a_rejoin_of_a_standby_in_sync_touches_nothing() {
    for node in [0, 1] {
        let mut world = World::running();
        world.run_for(secs(3));
        let (marker, start) = (world.marker().map(|m| m.seq), world.nodes[1].pg.start);
        let ticket = world.command(node, Command::Rejoin { node: name(1), dry_run: false });
        let (exit, text) = world.end_of(node, ticket);
        assert_eq!((exit, text.contains("already, in sync; nothing was changed")), (0, true), "{text}");
        assert_eq!((world.marker().map(|m| m.seq), world.nodes[1].pg.start), (marker, start));
        assert!(!world.nodes[1].disk.iter().any(|entry| matches!(entry, Entry::RejoinStarted { .. })));
    }
}

/// A command that is never a failover shows no plan of one.
#[test]
fn a_switchover_to_a_node_whose_peer_is_dead_shows_no_failover() {
    let mut world = World::running();
    world.kill_all(0);
    world.run_for(secs(3));
    let ticket = world.command(1, Command::Switchover { to: Some(name(1)), dry_run: false });
    assert_eq!(world.end_of(1, ticket).0, 3);
    assert!(!said(&world, 1, "the plan:"), "{:#?}", world.nodes[1].said);
    // Never heard since this start is one sentence.
    world.kill(1);
    world.start(1);
    world.run_for(secs(3));
    let ticket = world.command(1, DRY);
    world.end_of(1, ticket);
    assert!(said(&world, 1, "last contact: none since this daemon started"), "{:#?}", world.nodes[1].said);
}
