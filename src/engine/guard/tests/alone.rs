//! R4 on the way down and up again: the standby is lost, the record says so first, commits go on; it is back, and the
//! record says so last. C10: a crash after every single effect and journal line of that.

use super::super::durability::Phase;
use super::world::{Act, Cut, Delivery, MS, World, name, secs};
use crate::base::ids::{Epoch, Lsn, SystemId, TimelineId};
use crate::engine::durable::Entry;
use crate::engine::setup::Mode;
use crate::engine::turn::{Command, Event, PeerQuestion};

/// The pair at work, whatever says who is active.
pub(super) fn running(mode: Mode, block: bool) -> World {
    let mut world = World::unstarted(mode, 1);
    world.block = block;
    world.begin();
    if mode != Mode::Update {
        world.run_for(secs(5));
        world.promote(0, false);
    }
    world.run_until(secs(40), "in sync", |w| w.snapshot(0).replication.in_sync);
    world
}

/// The three ways of a standby to be lost, and back.
fn losses() -> [(&'static str, Act, Act); 3] {
    [
        ("stopped", Act::StopPg(1), Act::StartPg(1)),
        ("hung", Act::Hang(1, true), Act::Hang(1, false)),
        ("cut off", Act::Cut(Cut::Streams), Act::Heal(Cut::Streams)),
    ]
}

pub(super) fn alone(world: &World) -> bool {
    world.nodes[0].pg.list.is_empty()
}

fn noted(world: &World, kind: &str) -> usize {
    world.snapshot(0).events.iter().filter(|event| event.kind == kind).count()
}

#[test]
fn a_lost_standby_costs_standby_timeout_and_then_commits_go_on_alone() {
    for mode in [Mode::Update, Mode::Observe, Mode::VipOnly] {
        for (how, lose, back) in losses() {
            let mut world = running(mode, false);
            let begun = world.now;
            world.act(lose);
            world.run_for(MS * 2900);
            assert!(!alone(&world), "{mode:?} {how}: not before its time");
            let acks = world.acks;
            world.run_until(secs(3), how, alone);
            assert!(world.now.since(begun) < MS * 4200, "{mode:?} {how}: {:?}", world.now.since(begun));
            world.run_for(secs(1));
            assert!(world.acks >= acks + 4, "{mode:?} {how}: commits go on");
            assert!(world.is_open(0), "the gate never noticed");
            let replication = world.snapshot(0).replication;
            assert!(!replication.in_sync && replication.alone_since.is_some(), "{replication:?}");
            assert_eq!((noted(&world, "standby_lost"), noted(&world, "alone")), (1, 1), "{mode:?} {how}");
            if mode == Mode::Update {
                assert_eq!(world.marker().map(|m| m.sync), Some(None));
            }
            world.act(back);
            world.run_until(secs(10), "armed again", |w| w.snapshot(0).replication.in_sync);
            assert!(world.snapshot(0).replication.alone_since.is_none());
            assert!(noted(&world, "standby_back") == 1 && noted(&world, "in_sync") >= 1);
            assert_eq!(world.snapshot(0).counters.gate_cuts, 0);
        }
    }
}

#[test]
fn an_idle_standby_that_hangs_costs_nobody_anything_until_somebody_writes() {
    let mut world = running(Mode::Update, false);
    world.client_every = secs(3600);
    // The client that is on its way already writes once more.
    world.run_for(secs(1));
    world.act(Act::Hang(1, true));
    world.run_for(secs(30));
    assert!(world.snapshot(0).replication.in_sync && !alone(&world), "nothing is outstanding");
    world.nodes[0].pg.lsn += 1;
    world.run_until(secs(5), "alone", alone);
}

#[test]
fn a_standby_that_is_slow_but_moves_is_not_lost() {
    let mut world = running(Mode::Update, false);
    for _ in 0..10 {
        world.act(Act::Hang(1, true));
        world.run_for(MS * 2400);
        world.act(Act::Hang(1, false));
        world.run_for(MS * 300);
    }
    assert!(!alone(&world) && noted(&world, "standby_lost") == 0);
}

/// A machine that stands still, or a PostgreSQL that answers no look, shows nothing of the standby.
#[test]
fn a_time_in_which_nobody_looked_is_no_silence() {
    let mut world = running(Mode::Update, false);
    world.act(Act::Hang(1, true));
    world.run_for(secs(1));
    world.act(Act::Freeze(0, secs(20)));
    world.run_for(secs(20));
    world.act(Act::Hang(1, false));
    world.run_for(secs(1));
    assert_eq!(noted(&world, "standby_lost"), 0);
}

#[test]
fn block_never_goes_on_alone_and_says_for_whom_commits_wait() {
    for mode in [Mode::Update, Mode::Observe, Mode::VipOnly] {
        let mut world = running(mode, true);
        world.act(Act::Hang(1, true));
        world.run_for(secs(1));
        let acks = world.acks;
        world.run_for(secs(60));
        assert_eq!(world.acks, acks, "{mode:?}");
        assert!(world.is_open(0) && !alone(&world));
        let replication = world.snapshot(0).replication;
        assert!(!replication.in_sync && replication.waiting_since.is_some() && replication.alone_since.is_none());
        let events = world.snapshot(0).events;
        let said = events.iter().find(|event| event.kind == "standby_lost").expect("said");
        assert!(said.text.contains("commits wait for b"), "{}", said.text);
        world.act(Act::Hang(1, false));
        world.run_until(secs(5), "commits go on", |w| w.acks > acks && w.snapshot(0).replication.in_sync);
    }
}

/// Neither at a takeover of a dead peer, nor before the first arming, nor while the standby is rebuilt.
#[test]
fn block_is_not_alone_after_a_failover_either_and_a_rejoin_ends_it() {
    let mut world = running(Mode::Update, true);
    world.kill_all(0);
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    let acks = world.acks;
    world.run_for(secs(10));
    assert!(world.is_open(1), "reads are served");
    assert_eq!((world.acks, world.nodes[1].pg.list.as_str()), (acks, "\"a\""), "nothing is acknowledged");
    world.start(0);
    world.run_for(secs(10));
    let ticket = world.command(1, Command::Rejoin { node: name(0), dry_run: false });
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    world.run_until(secs(20), "acknowledged by both", |w| w.acks > acks && w.snapshot(1).replication.in_sync);
}

#[test]
fn block_needs_no_open_gate_for_the_rejoin_that_brings_the_standby_back() {
    let mut world = running(Mode::Update, true);
    world.act(Act::StopPg(1));
    world.nodes[0].pg.start += 1;
    world.run_for(secs(5));
    assert!(!world.is_open(0), "R6: no standby has confirmed this start");
    let ticket = world.command(0, Command::Rejoin { node: name(1), dry_run: false });
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    world.run_until(secs(20), "in sync", |w| w.is_open(0) && w.snapshot(0).replication.in_sync);
}

/// R6: "or the record says that this node is alone".
#[test]
fn an_active_node_whose_standby_is_gone_at_its_start_opens_once_it_is_recorded_alone() {
    let mut world = running(Mode::Update, false);
    world.act(Act::StopPg(1));
    world.kill_all(0);
    world.revive(0);
    world.run_for(MS * 2500);
    assert!(!world.is_open(0));
    world.run_until(secs(8), "open and alone", |w| w.is_open(0));
    assert_eq!(world.marker().map(|m| (m.epoch, m.sync)), Some((Epoch(1), None)));
    world.run_until(secs(3), "commits go on", |w| alone(w) && w.acks > 0);
}

/// P15: a primary restored from a snapshot, whose standby is ahead and so cannot stream, is not alone: it has lost WAL.
#[test]
fn p15_a_primary_that_lost_wal_does_not_go_alone_past_a_standby_that_has_it() {
    let mut world = running(Mode::Update, false);
    world.run_for(secs(5));
    world.kill_all(0);
    // b has seen that nobody sends: what it has is not what it receives.
    world.run_for(secs(3));
    let pg = &mut world.nodes[0].pg;
    pg.lsn -= 20;
    pg.data[0].1 -= 10;
    world.check_acked = false;
    world.revive(0);
    world.run_for(secs(30));
    assert!(!world.is_open(0) && !alone(&world), "{:?}", world.snapshot(0).gate);
    assert_eq!(world.marker().and_then(|m| m.sync), Some(name(1)));
}

/// P15: the machine comes back from a snapshot, journal and all, and nobody can tell it what the standby has.
#[test]
fn p15_a_restored_machine_does_not_go_alone_on_a_journal_older_than_the_record() {
    let mut world = running(Mode::Update, false);
    world.run_for(secs(1));
    let (disk, shadow) = (world.nodes[0].disk.clone(), world.nodes[0].shadow.clone());
    let pg = world.nodes[0].pg.clone();
    world.act(Act::StopPg(1));
    world.run_until(secs(8), "alone", alone);
    world.act(Act::StartPg(1));
    world.run_until(secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
    world.run_for(secs(3));
    world.kill_all(1);
    world.crash(0);
    let start = world.nodes[0].pg.start;
    (world.nodes[0].disk, world.nodes[0].shadow, world.nodes[0].pg) = (disk, shadow, pg);
    (world.nodes[0].pg.up, world.nodes[0].pg.start) = (false, start);
    world.check_acked = false;
    world.revive(0);
    world.nodes[0].pg.up = true;
    world.run_for(secs(40));
    assert!(!world.is_open(0) && !alone(&world), "{:?}", world.snapshot(0).gate);
    assert_eq!(world.marker().and_then(|m| m.sync), Some(name(1)));
    assert_eq!(noted(&world, "journal_is_old"), 1);
}

/// P15: its data directory alone was restored, and nobody can tell it what the standby has: its own journal does.
#[test]
fn p15_a_restored_data_directory_does_not_go_alone_behind_what_was_confirmed() {
    let mut world = running(Mode::Update, false);
    world.run_for(secs(15));
    world.kill_all(1);
    world.kill_all(0);
    let pg = &mut world.nodes[0].pg;
    pg.lsn -= 60;
    pg.data[0].1 -= 30;
    world.check_acked = false;
    world.revive(0);
    world.run_for(secs(40));
    assert!(!world.is_open(0) && !alone(&world), "{:?}", world.snapshot(0).gate);
    assert_eq!(world.marker().and_then(|m| m.sync), Some(name(1)));
    // A person who knows may have it serve all the same.
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 3, "{text}");
    let ticket = world.promote(0, true);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    world.run_until(secs(10), "open", |w| w.is_open(0));
}

/// P15: what the standby has is heard while the update to `sync=none` is on its way.
#[test]
fn p15_a_record_of_none_does_not_open_past_a_standby_that_is_ahead() {
    let mut world = running(Mode::Update, false);
    world.run_for(secs(5));
    world.kill_all(0);
    world.run_for(secs(3));
    world.kill(1);
    let pg = &mut world.nodes[0].pg;
    pg.lsn -= 20;
    pg.data[0].1 -= 10;
    // Not what the journal tells, in this case.
    world.write_down(0, &[Entry::Confirmed { lsn: Lsn(1), timeline: TimelineId(1), system_id: SystemId(77) }]);
    world.nodes[0].disk.push(Entry::Confirmed { lsn: Lsn(1), timeline: TimelineId(1), system_id: SystemId(77) });
    world.check_acked = false;
    world.hold_updates = true;
    world.revive(0);
    world.run_until(secs(20), "the update is on its way", |w| !w.held.is_empty());
    world.start(1);
    world.run_for(secs(1));
    world.release();
    world.hold_updates = false;
    world.run_until(secs(20), "landed", |w| w.marker().is_some_and(|m| m.sync.is_none()));
    let end = world.now + secs(30);
    while world.now < end {
        world.step();
        assert!(!world.is_open(0) && !alone(&world), "{:?}", world.snapshot(0).gate);
    }
}

/// P6: a list that somebody emptied is put right, and the gate opens only when it is proven that commits wait.
#[test]
fn p6_a_list_that_was_put_right_is_proven_before_the_gate_opens() {
    let mut world = running(Mode::Update, false);
    world.check_acked = false;
    world.nodes[0].pg.list = String::new();
    world.run_until(secs(2), "noticed", |w| !w.is_open(0));
    let mut proven = false;
    let end = world.now + secs(10);
    while world.now < end && !world.is_open(0) {
        world.step();
        proven |= world.nodes[0].guard.as_ref().is_some_and(|g| g.durability.phase == Phase::Proving);
    }
    assert!(world.is_open(0) && proven, "{:?}", world.snapshot(0).gate);
}

#[test]
fn without_a_good_lease_or_without_the_witness_nobody_goes_alone() {
    let mut world = running(Mode::Update, false);
    world.act(Act::StopPg(1));
    world.dns_up = false;
    world.run_for(secs(30));
    assert!(world.is_open(0), "the pledge of b's daemon is good");
    assert!(!alone(&world), "but nothing can be recorded");
    assert_eq!(noted(&world, "commits_wait"), 1);
    world.dns_up = true;
    world.run_until(secs(15), "alone", alone);

    // Lapsed: whoever vouches for this node no more may have vouched for the other. Without a marker nothing else
    // stands between it and a list that it empties by itself.
    for mode in [Mode::Update, Mode::Observe, Mode::VipOnly] {
        let mut world = running(mode, false);
        (world.wire_up, world.dns_up, world.gateway) = (false, false, [false; 2]);
        world.run_for(secs(30));
        assert!(!world.is_open(0) && !alone(&world), "{mode:?}");
    }
}

/// b died half-way through a promote: it has refused our epoch. Without a marker its word is the record.
#[test]
fn r2_a_node_that_has_refused_acknowledges_no_going_alone() {
    for mode in [Mode::Observe, Mode::VipOnly] {
        let mut world = running(mode, false);
        world.write_down(1, &[Entry::Refused { epoch: Epoch(2) }]);
        world.nodes[1].disk.push(Entry::Refused { epoch: Epoch(2) });
        world.kill(1);
        world.start(1);
        let epoch = world.durable(0).complete;
        let ask = PeerQuestion::GoingAlone { epoch, since: "now".into() };
        world.give(1, Event::PeerAsked { ticket: 9, question: Box::new(ask) });
        world.run_for(secs(1));
        let acknowledged = world.nodes[1].disk.iter().any(|entry| matches!(entry, Entry::PeerAlone { .. }));
        assert!(!acknowledged, "{mode:?}");
    }
}

/// P8: without a marker the peer's journal is the record; where it was not asked nobody can know.
#[test]
fn p8_without_a_marker_the_peer_knows_or_the_loss_is_unknown() {
    for mode in [Mode::Observe, Mode::VipOnly] {
        for told in [true, false] {
            let mut world = running(mode, false);
            if told {
                world.act(Act::Hang(1, true));
            } else {
                world.wire_up = false;
            }
            if !told && mode == Mode::VipOnly {
                // ARP prolongs its lease.
                assert!(world.is_open(0));
            }
            world.run_until(secs(12), "alone", alone);
            world.run_for(secs(1));
            assert_eq!(world.durable(1).peer_alone.is_some(), told, "{mode:?}");
            world.kill_all(0);
            world.run_for(secs(5));
            let peer_is_off = (mode == Mode::VipOnly).then(|| name(0));
            let promote = Command::Promote { dry_run: false, yes: true, accept_data_loss: false, peer_is_off };
            let ticket = world.command(1, promote);
            let (exit, text) = world.end_of(1, ticket);
            assert_eq!(exit, 3, "{text}");
            let wanted = if told { "a is alone since" } else { "unknown since the last contact" };
            assert!(text.contains(wanted), "{mode:?} {told}: {text}");
        }
        // Who never goes on alone leaves nothing to be unknown.
        let mut world = running(mode, true);
        world.run_until(secs(5), "a's word", |w| w.durable(1).peer_blocks == w.durable(0).complete);
        world.kill_all(0);
        world.run_for(secs(5));
        let peer_is_off = (mode == Mode::VipOnly).then(|| name(0));
        let promote = Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off };
        let ticket = world.command(1, promote);
        let (exit, text) = world.end_of(1, ticket);
        assert_eq!(exit, 0, "{text}");
    }
}

#[test]
fn a_promote_of_a_standby_that_lacks_acknowledged_writes_is_refused_and_says_since_when() {
    let mut world = running(Mode::Update, false);
    world.act(Act::Cut(Cut::Streams));
    world.run_until(secs(8), "alone", alone);
    world.run_for(secs(3));
    let since = world.marker().expect("there").since;
    world.kill_all(0);
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains(&format!("alone since {since}")), "{text}");
}

#[test]
fn nobody_goes_alone_amid_a_switchover_and_it_is_put_back_whole() {
    let mut world = running(Mode::Update, false);
    world.promote(1, false);
    world.run_until(secs(5), "prepared", |w| w.nodes[0].guard.as_ref().is_some_and(|g| g.handover.is_some()));
    world.kill_all(1);
    let mut during = false;
    let end = world.now + secs(90);
    while world.now < end && world.nodes[0].guard.as_ref().is_some_and(|g| g.handover.is_some()) {
        world.step();
        during |= alone(&world);
    }
    assert!(!during, "not while the switchover is under way");
    world.run_until(secs(20), "put back, alone and open", |w| w.is_open(0) && alone(w));
}

/// A standby that comes and goes: commits do not wait for it again and again.
#[test]
fn a_standby_that_flaps_is_waited_for_less_and_less_often() {
    let mut world = running(Mode::Update, false);
    let mut waited = Vec::new();
    for _ in 0..8 {
        world.act(Act::StopPg(1));
        world.run_until(secs(10), "alone", alone);
        let back = world.now;
        world.act(Act::StartPg(1));
        world.run_until(secs(60), "armed", |w| w.snapshot(0).replication.in_sync);
        waited.push(world.now.since(back));
    }
    assert!(waited[0] < secs(3), "{waited:?}");
    assert!(waited[4] > secs(15) && waited[7] > secs(29) && waited[7] < secs(34), "{waited:?}");
    // Steady for a while: forgiven.
    world.run_for(secs(70));
    world.act(Act::StopPg(1));
    world.run_until(secs(10), "alone", alone);
    let back = world.now;
    world.act(Act::StartPg(1));
    world.run_until(secs(60), "armed", |w| w.snapshot(0).replication.in_sync);
    assert!(world.now.since(back) < secs(3));
}

/// The standby is lost in every moment of being armed again: commits never wait for longer than its time and a
/// checkpoint.
#[test]
fn a_standby_that_is_lost_while_it_is_being_armed_holds_commits_for_no_longer() {
    for wait in 0..40 {
        for (how, lose, _) in losses() {
            let mut world = running(Mode::Update, false);
            world.act(Act::StopPg(1));
            world.run_until(secs(10), "alone", alone);
            world.act(Act::StartPg(1));
            world.run_for(MS * (wait * 25));
            world.act(lose);
            world.run_for(secs(5));
            let acks = world.acks;
            world.run_for(secs(1));
            assert!(world.acks > acks, "{how} after {wait}: {:?}", world.marker());
        }
    }
}

/// What happens to what the daemon had on its way when it died.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Lost,
    /// It is done all the same, and nobody is told.
    Done,
    /// The update lands seconds later.
    Late,
}

fn settle(world: &mut World, fate: Fate) {
    let pending: Vec<_> = world.queue.iter().map(|(key, delivery)| (*key, delivery.clone())).collect();
    for (key, delivery) in pending {
        match delivery {
            Delivery::Update { node: 0, prerequisite, next, .. } => {
                world.queue.remove(&key);
                match fate {
                    Fate::Lost => {}
                    Fate::Done => world.deliver(Delivery::Landing { prerequisite, next }),
                    Fate::Late => world.post(secs(6), Delivery::Landing { prerequisite, next }),
                }
            }
            Delivery::Pg { node: 0, task, .. } => {
                world.queue.remove(&key);
                if fate != Fate::Lost && world.nodes[0].pg.up {
                    let _ = world.run_pg(0, task);
                }
            }
            _ => {}
        }
    }
}

/// Degrade and arm again, node a dying after so many of its effects and journal lines; false: it took fewer.
fn degrade_and_rearm(lose: &Act, back: &Act, fuse: u64, death: Act, fate: Fate) -> bool {
    let mut world = running(Mode::Update, false);
    world.act(lose.clone());
    world.fuse = Some((fuse, death));
    let end = world.now + secs(13);
    let returns = world.now + secs(6);
    let (mut returned, mut died, mut was_alone) = (false, false, false);
    while world.now < end {
        world.step();
        was_alone |= alone(&world);
        if !returned && world.now >= returns {
            returned = true;
            world.act(back.clone());
        }
        if !died && world.fuse.is_none() {
            died = true;
            settle(&mut world, fate);
            world.post(MS * 400, Delivery::Revive(0));
        }
    }
    if !died {
        assert!(was_alone && world.snapshot(0).replication.in_sync, "the whole way down and up");
        return false;
    }
    // The laws (laws.rs) were judged after every event. Whoever would be promoted now, without a word, has everything.
    let runs = |w: &World| w.nodes[0].guard.is_some() && w.is_open(0);
    world.run_until(secs(90), "in sync again", |w| runs(w) && w.snapshot(0).replication.in_sync);
    let acks = world.acks;
    world.run_for(secs(1));
    assert!(world.acks > acks);
    world.kill_all(0);
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert_eq!(world.missing_on(1), None);
    true
}

/// C10.
#[test]
fn c10_a_crash_at_every_line_of_degrade_and_rearm_acknowledges_nothing_that_the_record_does_not_tell() {
    let mut runs = 0;
    for (_, lose, back) in losses() {
        for death in [Act::Kill(0), Act::Crash(0)] {
            for fate in [Fate::Lost, Fate::Done, Fate::Late] {
                for fuse in 0.. {
                    if !degrade_and_rearm(&lose, &back, fuse, death.clone(), fate) {
                        assert!(fuse > 60, "only {fuse} lines");
                        break;
                    }
                    runs += 1;
                }
            }
        }
    }
    eprintln!("figure: C10: {runs} crashes while going alone and being armed again");
}
