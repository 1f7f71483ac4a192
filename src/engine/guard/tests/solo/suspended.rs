//! A PostgreSQL that is away: what suspends the gate, what cuts it, and what ends a suspension.

use super::{MS, Solo};
use crate::engine::report::PgReport;
use crate::engine::setup::Mode;
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, Effect, Event};

/// The effects that move the gate, in a word each.
fn moves(solo: &Solo) -> Vec<&'static str> {
    let word = |effect: &Effect| match effect {
        Effect::Extend { .. } => Some("extend"),
        Effect::Suspend { .. } => Some("suspend"),
        Effect::Cut { .. } => Some("cut"),
        Effect::UnbindVip { .. } => Some("unbind"),
        Effect::Units { start: false } => Some("stop units"),
        _ => None,
    };
    let mut moves: Vec<&str> = solo.fx.iter().filter_map(word).collect();
    moves.dedup();
    moves
}

#[test]
fn a_postgresql_that_restarts_shuts_the_gate_and_costs_no_client_its_session() {
    for mode in [Mode::Update, Mode::VipOnly] {
        let mut solo = Solo::active(mode);
        let report = solo.pg.take();
        solo.give(Event::PgLost("connection refused".into()));
        assert!(matches!(solo.fx[0], Effect::Suspend { until, .. } if until > solo.now), "{:?}", solo.fx);
        let snapshot = solo.snapshot();
        assert!(!snapshot.gate.open && !solo.is_open(), "nothing passes");
        assert_eq!((snapshot.gate.state, snapshot.role), (GateState::Paused, Role::Active));
        // Longer than the lease: proofs go on prolonging the wait, and the VIP stays.
        solo.run(MS * 5000);
        assert_eq!(moves(&solo), ["suspend"], "{mode:?}");
        // It is there again, and this start of it has to be judged anew (R6) before anything passes.
        solo.pg = report.map(|report| PgReport { start: 2, ..report });
        solo.run(MS * 2000);
        assert!(solo.is_open(), "{:?}", solo.snapshot().gate);
        assert_eq!(moves(&solo), ["suspend", "extend"], "{mode:?}");
        assert!(!solo.wanted(|e| matches!(e, Effect::Units { .. })), "the units never noticed");
    }
}

#[test]
fn a_wait_for_postgresql_ends_with_the_lease_and_with_its_limit() {
    let mut solo = Solo::active(Mode::Update);
    solo.pg = None;
    solo.give(Event::PgLost("connection refused".into()));
    solo.marker = None;
    solo.run(MS * 4000);
    assert_eq!(moves(&solo), ["suspend", "cut", "stop units"]);
    assert_eq!(solo.snapshot().gate.state, GateState::Lapsed);

    let mut solo = Solo::active(Mode::VipOnly);
    solo.pg = None;
    solo.give(Event::PgLost("connection refused".into()));
    solo.run(MS * 29_000);
    assert_eq!(moves(&solo), ["suspend"]);
    solo.run(MS * 2000);
    assert_eq!(moves(&solo), ["suspend", "cut", "unbind", "stop units"]);
    assert_eq!(solo.snapshot().gate.state, GateState::Shut);
    // It is not suspended anew; an opening after that is one from the start.
    solo.fx.clear();
    solo.run(MS * 2000);
    assert_eq!(moves(&solo), Vec::<&str>::new());
}

#[test]
fn a_fence_ends_the_wait_for_postgresql_at_once() {
    let mut solo = Solo::active(Mode::Update);
    solo.pg = None;
    solo.give(Event::PgLost("connection refused".into()));
    solo.fx.clear();
    solo.give(Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } });
    assert!(matches!(solo.fx[0], Effect::Cut { .. }), "{:?}", solo.fx);
    assert_eq!(solo.fx[1], Effect::KernelGate { until: None });
}

#[test]
fn a_postgresql_that_became_a_standby_or_refuses_writes_is_not_waited_for() {
    for change in [|r: PgReport| PgReport { in_recovery: true, ..r }, |r: PgReport| PgReport { read_only: true, ..r }] {
        let mut solo = Solo::active(Mode::Update);
        solo.pg = solo.pg.take().map(change);
        solo.run(MS * 1500);
        assert_eq!(moves(&solo), ["cut", "stop units"]);
    }
}

#[test]
fn a_list_that_disagrees_with_the_record_cuts_an_open_gate() {
    let mut solo = Solo::active(Mode::Update);
    solo.pg = solo.pg.take().map(|report| PgReport { sync_list: "stranger".into(), ..report });
    solo.run(MS * 1000);
    assert!(moves(&solo).starts_with(&["cut"]), "{:?}", moves(&solo));
}
