//! A rejoin: refused before anything is touched, rehearsed, ended when its source is gone, and its goal.

use super::world::{World, name, secs};
use crate::base::ids::Lsn;
use crate::engine::report::Progress;
use crate::engine::turn::{Command, Event};

fn rejoin(world: &mut World, dry_run: bool) -> u64 {
    world.command(1, Command::Rejoin { node: name(1), dry_run })
}

#[test]
fn what_can_be_refused_is_refused_before_the_record_and_the_mark() {
    let mut world = World::running();
    let before = world.marker().map(|m| (m.seq, m.sync));
    world.nodes[1].pg.refusal = true;
    let ticket = rejoin(&mut world, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!((exit, text.as_str()), (3, "refused: a test says no"));
    assert_eq!(world.marker().map(|m| (m.seq, m.sync)), before, "the record was touched");
    assert!(!world.durable(1).rejoining && world.nodes[1].pg.up);
}

#[test]
fn a_rehearsal_says_what_it_would_do_and_does_nothing() {
    let mut world = World::running();
    let before = world.marker().map(|m| (m.seq, m.sync));
    let ticket = rejoin(&mut world, true);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(text.starts_with("would clone a: a test") && text.ends_with("nothing was changed"), "{text}");
    assert_eq!(world.marker().map(|m| (m.seq, m.sync)), before);
}

#[test]
fn given_on_the_other_node_it_says_there_all_that_it_says_here() {
    let mut world = World::running();
    let ticket = world.command(0, Command::Rejoin { node: name(1), dry_run: false });
    let working = |w: &World| w.nodes[1].guard.as_ref().is_some_and(|guard| guard.pg.task.is_some());
    world.run_until(secs(20), "at work", |w| w.durable(1).rejoining && working(w));
    let op = world.nodes[1].guard.as_ref().and_then(|guard| guard.pg.task.as_ref()).map(|(op, _)| *op);
    // In one breath: nobody listens so often.
    let diverged = Progress { diverged_transactions: Some(3), ..Progress::default() };
    for (text, progress) in [("3 transactions here alone", Some(diverged)), ("cloning: no way", None)] {
        world.give(1, Event::PgProgress { op: op.expect("at work"), text: text.to_owned(), progress });
    }
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    let said = &world.nodes[0].said;
    let mut rest = said.iter();
    for wanted in [
        "looking at the active node",
        "looking at the data here",
        "will clone a: a test",
        "marking this node as not promotable",
        "3 transactions here alone",
        "cloning: no way",
        "ending the fenced state",
    ] {
        assert!(rest.any(|line| line.starts_with(wanted)), "{wanted} is missing, or not in its place: {said:#?}");
    }
    assert!(!said.iter().any(|line| line.contains("'s daemon")), "it is there: {said:#?}");
}

#[test]
fn who_waits_for_a_daemon_that_is_down_is_told_so_at_once() {
    for (given_on, node) in [(0, 1), (1, 1)] {
        let mut world = World::running();
        world.kill_all(1 - given_on);
        world.run_for(secs(10));
        world.nodes[given_on].said.clear();
        world.command(given_on, Command::Rejoin { node: name(node), dry_run: false });
        let text = format!("waiting for {}'s daemon (up to 30 s)", name(1 - given_on));
        world.run_for(std::time::Duration::from_millis(10));
        assert!(world.nodes[given_on].said.contains(&text), "{:?}", world.nodes[given_on].said);
    }
}

#[test]
fn the_active_node_is_asked_again_when_this_one_has_stopped() {
    let mut world = World::running();
    rejoin(&mut world, false);
    world.run_until(secs(20), "stopped", |w| !w.nodes[1].pg.up && w.nodes[1].pg.source.is_none());
    // Written while the standby still received: told before, it would be ahead.
    world.nodes[0].pg.lsn += 7000;
    let written = Lsn(world.nodes[0].pg.lsn);
    world.run_until(secs(20), "worked", |w| w.nodes[1].pg.source.is_some());
    assert!(world.nodes[1].pg.source.is_some_and(|lsn| lsn >= written), "{:?}", world.nodes[1].pg.source);
}

#[test]
fn it_ends_only_when_what_the_source_wrote_after_the_copy_is_replayed() {
    let mut world = World::running();
    let start = world.nodes[1].pg.start;
    let ticket = rejoin(&mut world, false);
    world.run_until(secs(20), "copied", |w| w.nodes[1].pg.start > start);
    // Written after the copy, and not yet on the wire.
    world.nodes[0].pg.told_ahead = 5000;
    let goal = Lsn(world.nodes[0].pg.lsn + 5000);
    world.run_for(secs(10));
    assert!(!world.nodes[1].ends.contains_key(&ticket) && world.durable(1).rejoining, "it ended without {goal}");
    world.nodes[0].pg.lsn += 6000;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(!world.durable(1).rejoining && Lsn(world.nodes[1].pg.lsn) >= goal);
}

#[test]
fn it_ends_soon_and_with_a_word_when_its_source_is_gone() {
    let mut world = World::running();
    let start = world.nodes[1].pg.start;
    let ticket = rejoin(&mut world, false);
    world.run_until(secs(20), "copied", |w| w.nodes[1].pg.start > start);
    world.kill_all(0);
    let begun = world.now;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
    assert!(text.contains("does not serve any more; run rejoin again"), "{text}");
    assert!(world.now.since(begun) < secs(40), "only after {:?}", world.now.since(begun));
    assert!(world.durable(1).rejoining, "it is not promotable");
}

#[test]
fn p14_a_taker_that_died_half_way_leaves_its_timeline_in_the_record() {
    let mut world = World::running();
    // b takes over, writes timeline 2 and dies before anybody follows; a, still on 1, takes over again.
    world.kill_all(0);
    let ticket = world.promote(1, false);
    world.run_until(secs(20), "the record moved", |w| w.marker().is_some_and(|m| m.active == name(1)));
    assert_eq!(world.marker().map(|m| m.timeline.0), Some(2), "the number that the promotion will write");
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert_eq!(world.nodes[1].pg.timeline, 2, "no number is skipped without need");
    world.kill_all(1);
    world.start(0);
    world.run_for(secs(10));
    assert_eq!(world.nodes[0].pg.timeline, 1);
    world.loss_accepted = true;
    let ticket = world.promote(0, true);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert_eq!(world.nodes[0].pg.timeline, 3, "the number that b used is used again");
}
