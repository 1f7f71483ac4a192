//! Behaviour of two whole guards in the simulated world; one test per interleaving. `random` runs seeded schedules.

mod alone;
mod asking;
mod carry;
mod fence;
mod fingerprint;
mod hands;
mod laws;
mod mended;
mod model;
mod night;
mod observe;
mod outlook;
mod parts;
mod procedures;
mod random;
mod rejoined;
mod review;
mod scenarios;
mod second_reading;
mod solo;
mod stopped;
mod word;
mod world;

use crate::base::config::FencePostgres;
use crate::base::ids::Epoch;
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, Event, PeerAnswer, PeerQuestion};
use crate::wire::dns::RecordPair;
use world::{MS, World, address, name, secs};

#[test]
fn a_fresh_pair_needs_no_ceremony() {
    let world = World::running();
    assert!(world.is_open(0) && !world.is_open(1));
    let marker = world.marker().expect("written");
    assert_eq!((marker.epoch, marker.active, marker.sync), (Epoch(1), name(0), Some(name(1))));
    assert_eq!(world.snapshot(0).role, Role::Active);
    assert_eq!(world.snapshot(1).role, Role::Passive);
}

#[test]
fn a_switchover_moves_the_service_and_the_old_primary_follows() {
    let mut world = World::running();
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(1) && !world.is_open(0));
    world.run_until(secs(20), "a follows and is in sync", |w| {
        w.snapshot(0).role == Role::Passive && w.snapshot(1).replication.in_sync && w.snapshot(0).postgres.streaming
    });
    let ticket = world.promote(0, false);
    assert_eq!(world.end_of(0, ticket).0, 0, "and back again");
    assert_eq!(world.durable(0).complete, Epoch(3));
}

#[test]
fn a_failover_waits_out_w_and_the_old_node_stays_shut_until_rejoin() {
    let mut world = World::running();
    world.kill_all(0);
    let begun = world.now;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.now.since(begun) >= MS * 3261, "W was waited out");
    assert_eq!(world.marker().and_then(|m| m.sync), None, "alone, and recorded so");
    world.start(0);
    world.run_for(secs(10));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    assert!(world.nodes[0].pg.in_recovery, "demoted");
    let ticket = world.command(1, Command::Rejoin { node: name(0), dry_run: false });
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    world.run_until(secs(20), "in sync again", |w| w.snapshot(1).replication.in_sync);
    assert_eq!(world.snapshot(0).role, Role::Passive);
}

#[test]
fn a_frozen_node_never_serves_beside_the_new_one() {
    let mut world = World::running();
    let frozen = world.nodes[0].guard.take();
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(!world.is_open(0), "its lease ran out before");
    world.nodes[0].guard = frozen;
    world.run_for(secs(5));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
}

#[test]
fn dns_may_be_dead_for_long_while_the_nodes_see_each_other() {
    let mut world = World::running();
    world.dns_up = false;
    for _ in 0..600 {
        world.run_for(MS * 100);
        assert!(world.is_open(0));
    }
}

#[test]
fn both_voters_gone_shuts_within_the_lease_and_one_back_opens_again() {
    for back_is_dns in [true, false] {
        let mut world = World::running();
        world.dns_up = false;
        world.wire_up = false;
        world.run_for(MS * 3001);
        assert!(!world.is_open(0));
        assert_eq!(world.snapshot(0).gate.state, GateState::Lapsed);
        world.run_for(secs(5));
        world.dns_up = back_is_dns;
        world.wire_up = !back_is_dns;
        world.run_until(secs(3), "open again by itself", |w| w.is_open(0));
    }
}

#[test]
fn a_record_edited_by_hand_cuts_at_once_and_fences_after_w() {
    let mut world = World::running();
    let marker = world.record.marker[0].clone();
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    world.run_for(MS * 1100);
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).gate.state, GateState::Lapsed, "not fenced yet");
    world.run_for(MS * 3400);
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    world.run_for(secs(1));
    assert!(world.nodes[0].pg.in_recovery, "read-only");
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

#[test]
fn a_record_put_back_before_w_opens_again_without_a_fence() {
    let mut world = World::running();
    let (old, marker) = (world.record.clone(), world.record.marker[0].clone());
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    world.run_for(MS * 2000);
    assert!(!world.is_open(0));
    world.record = old;
    world.run_until(secs(2), "open again", |w| w.is_open(0));
    assert_eq!(world.durable(0).fence, Epoch(0));
}

#[test]
fn an_empty_record_lapses_but_never_fences() {
    let mut world = World::running();
    let old = world.record.clone();
    world.record = RecordPair::default();
    world.run_for(secs(30));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Passive);
    assert_eq!(world.durable(0).fence, Epoch(0));
    world.record = old;
    world.run_until(secs(2), "open again", |w| w.is_open(0));
}

#[test]
fn an_unanswered_update_is_settled_by_another_one() {
    let mut world = World::running();
    world.kill_all(0);
    world.lose_update_answers = true;
    let ticket = world.promote(1, false);
    world.run_for(secs(4));
    world.lose_update_answers = false;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert_eq!(world.marker().map(|m| m.epoch), Some(Epoch(2)));
}

#[test]
fn an_update_whose_fate_stays_unknown_ends_half_way_and_keeps_refusing() {
    let mut world = World::running();
    world.kill_all(0);
    world.lose_update_answers = true;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
    assert_eq!(world.durable(1).refused, Epoch(1));
    world.lose_update_answers = false;
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0, "running it again settles it");
}

#[test]
fn without_the_witness_promote_refuses_and_changes_nothing() {
    let mut world = World::running();
    world.dns_up = false;
    let before = world.durable(1);
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    let after = world.durable(1);
    assert_eq!((before.refused, before.won), (after.refused, after.won));
    assert!(world.is_open(0));
}

#[test]
fn a_standby_that_the_record_does_not_name_is_not_promoted_without_a_word() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.start(0);
    world.run_for(secs(8));
    world.kill_all(1);
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains("alone since"), "{text}");
    let ticket = world.promote(0, true);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
}

#[test]
fn promote_on_the_active_node_says_so() {
    let mut world = World::running();
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0);
    assert!(text.contains("already active"), "{text}");
    assert_eq!(world.durable(0).complete, Epoch(1));
}

#[test]
fn fence_and_unfence_take_a_new_epoch() {
    let mut world = World::running();
    let ticket = world.command(0, Command::Fence { reason: "test".into() });
    assert_eq!(world.end_of(0, ticket).0, 0);
    assert!(!world.is_open(0));
    world.run_for(secs(5));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(0));
    assert_eq!(world.durable(0).complete, Epoch(2));
}

#[test]
fn unfence_is_refused_while_the_record_points_elsewhere_or_is_silent() {
    let mut world = World::running();
    let ticket = world.command(0, Command::Fence { reason: "test".into() });
    world.end_of(0, ticket);
    world.dns_up = false;
    let ticket = world.command(0, Command::Unfence);
    assert_eq!(world.end_of(0, ticket).0, 3);
    world.dns_up = true;
    let marker = world.record.marker[0].clone();
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    let ticket = world.command(0, Command::Unfence);
    assert_eq!(world.end_of(0, ticket).0, 3);
}

#[test]
fn a_restarted_daemon_opens_its_own_epoch_only_after_the_witness_confirmed_it() {
    let mut world = World::running();
    world.kill(0);
    world.dns_up = false;
    world.start(0);
    world.run_for(secs(10));
    assert!(!world.is_open(0), "a pledge alone does not open after a start");
    world.dns_up = true;
    world.run_until(secs(3), "open", |w| w.is_open(0));
}

#[test]
fn a_taker_that_dies_half_way_opens_only_by_promote_again_after_w() {
    let mut world = World::running();
    world.kill_all(0);
    world.promote(1, false);
    world.run_until(secs(10), "won", |w| w.durable(1).won == Epoch(2));
    world.kill(1);
    world.start(1);
    world.run_for(secs(10));
    assert!(!world.is_open(1), "P2: nothing opens by itself");
    let begun = world.now;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.now.since(begun) >= MS * 3261);
}

#[test]
fn of_two_people_promoting_at_once_one_wins() {
    let mut world = World::running();
    world.kill(0);
    world.run_for(secs(4));
    world.start(0);
    world.run_for(MS * 500);
    let first = world.promote(0, false);
    let second = world.promote(1, false);
    world.end_of(0, first);
    world.end_of(1, second);
    world.run_for(secs(5));
    assert!(world.is_open(0) ^ world.is_open(1));
}

#[test]
fn a_zone_restored_from_a_backup_never_makes_the_old_node_active() {
    let mut world = World::running();
    let old = world.record.clone();
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.run_for(secs(10));
    world.record = old;
    world.run_for(secs(30));
    assert!(!world.is_open(0));
    assert!(!world.is_open(1), "the gate lapses");
    assert_eq!(world.snapshot(1).gate.state, GateState::Lapsed);
}

#[test]
fn a_consent_is_not_taken_back_by_a_late_put_back() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    let ask = crate::engine::turn::PeerQuestion::PutBack { attempt: world.snapshot(1).procedure.expect("runs").id };
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(ask) });
    world.run_for(secs(10));
    assert!(!world.is_open(0));
    assert!(world.is_open(1));
    let _shape: Option<PeerAnswer> = None;
}

/// S5: b served epoch 2, the zone was restored to "a at epoch 1". What a holds is neither whole nor alone.
#[test]
fn a_restored_zone_makes_the_old_node_neither_lossless_nor_sure_that_nobody_serves() {
    let mut world = World::running();
    world.kill_all(0);
    let old = world.record.clone();
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.start(0);
    world.run_until(secs(10), "a is fenced and demoted", |w| w.durable(0).fenced.is_some() && w.nodes[0].pg.up);
    world.wire_up = false;
    world.run_for(secs(3));
    // b has just proved its epoch; a is asked to serve on the restored record.
    world.record = old;
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains("epoch e2") || text.contains("epoch 2"), "{text}");
    world.loss_accepted = true;
    let begun = world.now;
    let ticket = world.promote(0, true);
    assert_eq!(world.end_of(0, ticket).0, 0);
    assert!(world.now.since(begun) >= MS * 3261, "W was waited out");
}

/// The update landed, then the disk was full: *refused* must not be lowered, and the procedure must end.
#[test]
fn a_full_disk_after_the_update_landed_ends_half_way_and_keeps_refusing() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "the update landed", |w| w.marker().is_some_and(|m| m.epoch == Epoch(2)));
    world.nodes[1].journal_broken = true;
    world.run_for(MS * 100);
    world.nodes[1].journal_broken = false;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
    assert_eq!(world.durable(1).refused, Epoch(1), "the update stands");
}

#[test]
fn an_attempt_that_cannot_be_lowered_ends_all_the_same() {
    let mut world = World::running();
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "refused", |w| w.durable(1).refused == Epoch(1));
    world.wire_up = false;
    world.dns_up = false;
    world.nodes[1].journal_broken = true;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
}

/// The taker gives up while the old primary is being stopped: the gate opens again only when the PostgreSQL that was
/// started anew has been seen and R6's wait is over; never on what was seen before it was stopped.
#[test]
fn a_switchover_given_up_while_stopping_opens_only_on_the_new_start() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(5), "the old primary is being stopped", |w| {
        w.snapshot(1).procedure.is_some_and(|p| p.step == "stopping the old primary")
            && w.snapshot(0).procedure.is_some_and(|p| p.step == "stopping PostgreSQL")
    });
    let attempt = world.snapshot(1).procedure.expect("runs").id;
    world.kill(1);
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(PeerQuestion::PutBack { attempt }) });
    let start = world.nodes[0].pg.start;
    let end = world.now + secs(20);
    while world.now < end && !world.is_open(0) {
        world.step();
        assert!(!world.is_open(0) || (world.nodes[0].pg.up && world.nodes[0].pg.start > start), "open on an old look");
    }
    assert!(world.is_open(0), "put back: {:?}", world.snapshot(0).gate);
}

/// Arming is under way when a switchover asks for the checkpoint; later this node must be able to go alone again.
#[test]
fn a_switchover_in_the_middle_of_arming_leaves_nothing_stuck() {
    for wait in 0..60 {
        let mut world = World::new();
        world.run_until(secs(20), "named", |w| w.nodes[0].pg.list == "\"b\"" || w.is_open(0) && wait > 30);
        world.run_for(MS * wait);
        let ticket = world.promote(1, false);
        world.end_of(1, ticket);
        world.run_until(secs(60), "one of them is in sync", |w| {
            w.snapshot(0).replication.in_sync && w.snapshot(1).replication.in_sync
        });
        let back = usize::from(!world.is_open(1));
        let ticket = world.promote(1 - back, false);
        let (exit, text) = world.end_of(1 - back, ticket);
        assert_eq!(exit, 0, "{wait}: {text}");
    }
}

/// The old node consented, the taker died before its compare-and-swap: the old node must be able to go back.
#[test]
fn a_node_that_consented_in_vain_can_be_unfenced() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    world.kill_all(1);
    world.run_for(secs(20));
    assert!(world.nodes[0].pg.up && world.nodes[0].pg.in_recovery, "read-only, but there");
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(0));
}

/// A taker that died half-way with its PostgreSQL, already promoted: no unit may start that, so the daemon does.
#[test]
fn a_taker_that_died_half_way_with_its_postgres_can_finish() {
    let mut world = World::running();
    world.kill_all(0);
    world.promote(1, false);
    world.run_until(secs(10), "promoted", |w| !w.nodes[1].pg.in_recovery);
    world.kill_all(1);
    world.start(1);
    world.run_for(secs(5));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

/// Seed 403 of the simulation: promote on the active node (just restarted, still shut) sends its update, the machine
/// dies, the update lands. The record names an epoch that the journal does not know, so `may-start-primary` refuses
/// the one whole PostgreSQL there is: the daemon starts it, as a standby of nobody, and promote can go on.
#[test]
fn a_node_whose_update_landed_after_its_death_can_be_promoted() {
    let mut world = World::running();
    world.wire_up = false;
    world.kill(0);
    world.start(0);
    world.hold_updates = true;
    world.promote(0, false);
    world.run_until(secs(5), "the update is on its way", |w| !w.held.is_empty());
    world.crash(0);
    world.release();
    world.revive(0);
    assert!(!world.nodes[0].pg.up, "the unit may not start it");
    world.run_for(secs(10));
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(0));
}

/// P5: an update to sync=b is on its way and unanswered, the standby drops: nothing may be acknowledged alone, neither
/// by this life of the daemon nor by the next, because that update may still land.
#[test]
fn a_late_update_to_synchronous_never_covers_writes_that_were_acknowledged_alone() {
    for restart in [false, true] {
        let mut world = World::new();
        world.run_until(secs(10), "open and alone", |w| w.is_open(0));
        world.hold_updates = true;
        world.run_until(secs(10), "an update is on its way", |w| !w.held.is_empty());
        world.nodes[1].pg.up = false;
        if restart {
            world.kill(0);
            world.start(0);
        }
        world.run_for(secs(20));
        world.release();
        world.kill_all(0);
        if world.marker().is_some_and(|m| m.sync == Some(name(1))) {
            let missing = world.acked.iter().any(|(_, count)| world.nodes[1].pg.data.iter().all(|(_, c)| c < count));
            assert!(!missing, "restart {restart}: acknowledged {:?}, b has {:?}", world.acked, world.nodes[1].pg.data);
        }
    }
}

/// PostgreSQL is in crash recovery (not seen) when the consent is asked for: it is stopped before the consent is given.
#[test]
fn a_consent_is_given_only_after_a_postgres_that_was_not_seen_was_stopped() {
    let mut world = World::running();
    world.give(0, Event::PgLost("the database system is in recovery mode".into()));
    let ask = PeerQuestion::Consent { attempt: 7, epoch: Epoch(2), handed_over: false };
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(ask) });
    world.run_until(secs(5), "consented", |w| w.durable(0).consented);
    assert!(!world.nodes[0].pg.up);
}

/// The disk is full at the moment of the consent, then free again: fenced, durably, and `unfence` lifts it.
#[test]
fn a_consent_that_cannot_be_written_is_still_a_fence_that_unfence_lifts() {
    let mut world = World::running();
    world.nodes[0].journal_broken = true;
    let ask = PeerQuestion::Consent { attempt: 7, epoch: Epoch(2), handed_over: false };
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(ask) });
    world.run_for(MS * 500);
    world.nodes[0].journal_broken = false;
    world.run_for(secs(10));
    assert_eq!(world.durable(0).fence, Epoch(2), "written as soon as it could be");
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(0));
}

/// b won epoch 2 and waits W; a wins epoch 3 meanwhile: b must not promote its PostgreSQL, which would only diverge.
#[test]
fn a_taker_that_was_overtaken_promotes_nothing() {
    let mut world = World::running();
    world.wire_up = false;
    // Before a counts its standby as lost and changes the record itself.
    world.run_for(MS * 200);
    let ticket = world.promote(1, false);
    world.run_until(secs(10), "b won", |w| w.durable(1).won == Epoch(2));
    world.run_for(MS * 100);
    let second = world.promote(0, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
    assert!(world.nodes[1].pg.in_recovery, "{text}");
    assert_eq!(world.end_of(0, second).0, 0);
}

#[test]
fn one_reading_that_names_the_peer_and_then_silence_is_no_fence() {
    let mut world = World::running();
    let old = world.record.clone();
    world.record = RecordPair::written(&[address(1)], 5, &old.marker[0].clone());
    world.run_until(secs(2), "cut", |w| !w.is_open(0));
    world.record = old;
    world.dns_up = false;
    world.run_for(secs(20));
    assert_eq!(world.durable(0).fence, Epoch(0), "nobody said it for W");
    world.dns_up = true;
    world.run_until(secs(3), "open again", |w| w.is_open(0));
}

#[test]
fn a_promote_during_a_dry_run_promotes() {
    let mut world = World::running();
    world.kill_all(0);
    let dry = Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off: None };
    world.command(1, dry);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(world.is_open(1), "exit 0 means that it serves");
}

#[test]
fn a_fenced_primary_that_was_kept_running_does_not_stand_in_the_way() {
    let mut world = World::running();
    world.fence_postgres = FencePostgres::Keep;
    world.kill(0);
    world.start(0);
    world.run_until(secs(10), "open", |w| w.is_open(0));
    let ticket = world.command(0, Command::Fence { reason: "test".into() });
    world.end_of(0, ticket);
    world.run_for(secs(3));
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

/// A rejoin that the active node refuses has touched nothing: when the active node dies, the standby is promotable.
#[test]
fn a_rejoin_that_was_refused_leaves_the_standby_promotable() {
    let mut world = World::running();
    let ticket = world.command(1, Command::Rejoin { node: name(1), dry_run: false });
    world.run_until(secs(5), "marked", |w| w.durable(1).rejoining);
    world.kill_all(0);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 1, "{text}");
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}
