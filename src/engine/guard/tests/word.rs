//! R4 without a marker: whose word makes the loss of a silent peer known (`word`).

use super::alone::{alone, running};
use super::world::{Act, World, name, secs};
use crate::base::ids::Epoch;
use crate::engine::setup::Mode;
use crate::engine::turn::Command;

/// What one's own file says of "block" proves nothing of the other node.
#[test]
fn p8_only_a_word_that_was_given_and_not_taken_back_makes_the_loss_of_a_silent_peer_known() {
    for mode in [Mode::Observe, Mode::VipOnly] {
        let rehearse = |world: &mut World| {
            let peer_is_off = (mode == Mode::VipOnly).then(|| name(0));
            let promote = Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off };
            let ticket = world.command(1, promote);
            world.end_of(1, ticket)
        };
        let given = |w: &World| w.durable(1).peer_blocks == w.durable(0).complete;

        // b is dead, a's key was changed and its daemon restarted: it is bound all the same.
        let mut world = running(mode, true);
        world.run_until(secs(5), "a's word", given);
        world.kill(1);
        world.act(Act::StopPg(1));
        world.kill(0);
        world.block = false;
        world.start(0);
        world.run_for(secs(20));
        assert!(!alone(&world), "{mode:?}");
        // Nor does an epoch that it takes itself free it.
        let accept = Command::Promote {
            dry_run: false,
            yes: true,
            accept_data_loss: true,
            peer_is_off: (mode == Mode::VipOnly).then(|| name(1)),
        };
        let ticket = world.command(0, accept);
        let (exit, text) = world.end_of(0, ticket);
        assert_eq!(exit, 0, "{text}");
        let acks = world.acks;
        world.run_for(secs(20));
        assert_eq!((alone(&world), world.acks), (false, acks), "{mode:?}");

        // b's daemon is there: it acknowledges that, and knows it from then on.
        let mut world = running(mode, true);
        world.run_until(secs(5), "a's word", given);
        world.kill(0);
        world.block = false;
        world.start(0);
        world.run_for(secs(5));
        world.act(Act::Hang(1, true));
        world.run_until(secs(30), "alone", alone);
        assert_eq!((world.durable(0).blocks, world.durable(1).peer_blocks), (Epoch::NONE, Epoch::NONE));
        world.kill_all(0);
        world.run_for(secs(5));
        world.block = true;
        world.kill(1);
        world.start(1);
        world.run_for(secs(5));
        let (exit, text) = rehearse(&mut world);
        assert_eq!(exit, 3, "{mode:?}: {text}");

        // b has lost its journal, and with it the word.
        let mut world = running(mode, true);
        world.run_until(secs(5), "a's word", given);
        world.kill_all(0);
        world.kill(1);
        world.nodes[1].disk.clear();
        world.nodes[1].shadow = crate::engine::durable::Durable::default();
        world.start(1);
        world.run_for(secs(5));
        let (exit, text) = rehearse(&mut world);
        assert_eq!(exit, 3, "{mode:?}: {text}");
        assert!(text.contains("unknown since"), "{text}");

        // They have never been in sync.
        let mut world = World::unstarted(mode, 1);
        world.block = true;
        world.streams_up = false;
        world.begin();
        world.run_for(secs(5));
        world.promote(0, false);
        world.run_until(secs(10), "active", |w| w.durable(0).is_holder());
        world.run_for(secs(5));
        world.kill_all(0);
        world.run_for(secs(5));
        let (exit, text) = rehearse(&mut world);
        assert_eq!(exit, 3, "{mode:?}: {text}");
    }
}
