//! What a failover would cost, as the two nodes tell it, against what a promote then says itself.

use super::world::{Act, World, secs};
use crate::engine::setup::Mode;
use crate::engine::status::Snapshot;
use crate::engine::turn::Command;

fn running(mode: Mode) -> World {
    let mut world = super::alone::running(mode, false);
    world.run_for(secs(3));
    world
}

fn told(world: &World, node: usize) -> Snapshot {
    world.snapshot(node)
}

/// What a promote of b says to the question, without doing anything.
fn asked(world: &World) -> (u8, String) {
    let mut world = world.clone();
    let command = Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off: None };
    let ticket = world.command(1, command);
    world.end_of(1, ticket)
}

#[test]
fn in_sync_is_safe_as_both_see_it_and_dead_it_is_what_promote_says() {
    for mode in [Mode::Update, Mode::Observe] {
        let mut world = running(mode);
        for node in [0, 1] {
            let outlook = told(&world, node).outlook;
            assert!(outlook.safe && outlook.lost == Some(0), "{mode:?} {node}: {outlook:?}");
            assert!(outlook.text.starts_with("if a died now, nothing would be lost"), "{outlook:?}");
            let asks = outlook.text.contains("--accept-data-loss");
            assert_eq!(asks, mode != Mode::Update, "what cannot be proven is said: {outlook:?}");
        }
        world.kill_all(0);
        world.run_for(secs(20));
        let outlook = told(&world, 1).outlook;
        let (exit, text) = asked(&world);
        assert_eq!(outlook.safe, exit == 0, "{mode:?}: {outlook:?}, and promote: {text}");
        assert_eq!(outlook.safe, mode == Mode::Update, "{outlook:?}");
        assert!(outlook.text.starts_with("a does not answer; in a failover now, "), "{outlook:?}");
    }
}

#[test]
fn alone_is_never_called_safe_on_either_node() {
    let mut world = running(Mode::Update);
    world.act(Act::Hang(1, true));
    world.run_until(secs(20), "alone", |w| w.snapshot(0).replication.alone_since.is_some());
    world.run_for(secs(3));
    let outlook = told(&world, 0).outlook;
    assert!(!outlook.safe && outlook.text.contains("a has been alone since"), "{outlook:?}");
    world.act(Act::Hang(1, false));
    world.kill_all(0);
    world.run_for(secs(20));
    let outlook = told(&world, 1).outlook;
    let (exit, text) = asked(&world);
    assert_eq!((outlook.safe, exit), (false, 3), "{outlook:?}, and promote: {text}");
    assert!(outlook.text.contains("data might be lost: a is alone since"), "{outlook:?}");
}

#[test]
fn while_it_moves_and_alone_after_it_nothing_is_promised() {
    let mut world = running(Mode::Update);
    world.kill_all(0);
    world.run_for(secs(5));
    let ticket = world.promote(1, false);
    world.run_for(secs(2));
    let outlook = told(&world, 1).outlook;
    assert!(!outlook.safe && outlook.text.contains("while a promote is under way"), "{outlook:?}");
    assert_eq!(world.end_of(1, ticket).0, 0);
    let outlook = told(&world, 1).outlook;
    assert!(!outlook.safe, "it serves alone now: {outlook:?}");
}
