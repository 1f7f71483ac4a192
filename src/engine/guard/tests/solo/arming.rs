//! An arming that gives way to the rejoin of the very node that commits were to wait for (R4).

use super::{MS, Solo, tasks};
use crate::base::ids::{Lsn, SystemId, TimelineId};
use crate::engine::durable::Entry;
use crate::engine::guard::durability::Phase;
use crate::engine::guard::{PgOwner, Then};
use crate::engine::report::SourceFacts;
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Event, PeerAnswer, PeerQuestion, PgOutput, PgTask};

fn source() -> SourceFacts {
    SourceFacts {
        system_id: SystemId(77),
        bytes: 12,
        tablespaces: 0,
        spaces: Vec::new(),
        timeline: TimelineId(1),
        history: Vec::new(),
        control_timeline: TimelineId(1),
        lsn: Lsn(0),
        oldest: Lsn(0),
        same_tail: None,
    }
}

/// The active node, nothing under way; the record says `sync=none`.
fn active() -> Solo {
    let mut solo = Solo::active(Mode::Update);
    solo.run(MS * 1000);
    // What the guard prepared by itself when it opened.
    if let Some((op, _)) = solo.guard.pg.task {
        solo.give(Event::PgDone { op, result: Ok(PgOutput::Done) });
    }
    assert_eq!((solo.guard.pg.task, solo.guard.durability.phase), (None, Phase::Idle));
    solo.fx.clear();
    solo
}

fn confirming(solo: &Solo) -> Phase {
    Phase::Confirming { lsn: Lsn(1000), until: solo.now + MS * 30_000 }
}

fn barrier(solo: &mut Solo) {
    let (now, mut fx) = (Solo::clocks(solo.now), Vec::new());
    solo.guard.at = now;
    solo.guard.durability.phase = Phase::Barrier;
    solo.guard.pg_task_next(PgOwner::Durability, PgTask::RearmBarrier, &mut fx);
}

fn ask(solo: &mut Solo) {
    let question = Box::new(PeerQuestion::PrepareRejoin { id: 9, look: false, tail: None });
    solo.give(Event::PeerAsked { ticket: 77, question });
}

fn answered(solo: &Solo) -> Option<PeerAnswer> {
    solo.fx.iter().find_map(|effect| match effect {
        Effect::AnswerPeer { ticket: 77, answer } => Some(answer.as_ref().clone()),
        _ => None,
    })
}

fn finish(solo: &mut Solo, output: PgOutput) {
    let (op, _) = solo.guard.pg.task.expect("a task runs");
    solo.give(Event::PgDone { op, result: Ok(output) });
}

#[test]
fn a_rejoin_of_the_node_that_is_being_armed_ends_the_arming_and_is_prepared_at_once() {
    for at_barrier in [false, true] {
        let mut solo = active();
        if at_barrier {
            barrier(&mut solo);
        } else {
            solo.guard.durability.phase = confirming(&solo);
        }
        ask(&mut solo);
        // The record says none by our own hand, so that the list may be emptied; the record needs no update.
        assert_eq!(tasks(&solo), [PgTask::SetSyncList(None)], "at the barrier: {at_barrier}");
        finish(&mut solo, PgOutput::Done);
        finish(&mut solo, PgOutput::Source(source()));
        assert_eq!(answered(&solo), Some(PeerAnswer::Prepared { id: 9, source: source() }));
        assert!(!solo.wanted(|e| matches!(e, Effect::Update { .. })), "the record was changed without need");
    }
}

#[test]
fn where_an_update_to_the_name_may_yet_land_the_record_comes_first() {
    let mut solo = active();
    // P5: an older arming was in doubt when it ended.
    let sync = Some("b".parse().expect("valid"));
    let entry = Entry::Sync { epoch: solo.guard.durable.won, seq: 7, sync, since: String::new() };
    let mut fx = Vec::new();
    solo.guard.record(&mut fx, vec![entry], Then::Nothing);
    solo.execute(fx);
    solo.fx.clear();
    solo.guard.durability.phase = confirming(&solo);
    ask(&mut solo);
    assert!(solo.wanted(|e| matches!(e, Effect::Update { .. })), "no update of ours makes sync=none sure");
    assert_eq!(tasks(&solo), [], "the list was emptied under a record that may say sync=b");
}

#[test]
fn an_arming_that_is_being_recorded_runs_to_its_end() {
    let mut solo = active();
    for phase in [Phase::Intending, Phase::RecordingSync { clean: true }] {
        solo.guard.durability.phase = phase;
        ask(&mut solo);
        assert_eq!((tasks(&solo), answered(&solo)), (Vec::new(), None), "{phase:?}");
        assert_eq!(solo.guard.durability.phase, phase);
    }
}
