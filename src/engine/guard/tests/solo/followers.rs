//! A node without a vote, as the voter sees it: shown, answered and given its slot, and evidence of nothing.

use super::{MS, Solo, tasks};
use crate::base::ids::{Epoch, Lsn, NodeName, SystemId, TimelineId};
use crate::engine::report::{PgReport, SourceFacts, StandbyRow, WalTail};
use crate::engine::setup::Mode;
use crate::engine::status::GateState;
use crate::engine::turn::{
    Command, Effect, Event, Facts, FollowerState, PeerAnswer, PeerPg, PeerQuestion, PgOutput, PgTask, ProcedureBrief,
};

fn name(text: &str) -> NodeName {
    text.parse().expect("valid")
}

fn follower(node: &str, procedure: Option<ProcedureBrief>) -> FollowerState {
    FollowerState {
        node: name(node),
        version: "test".into(),
        follows: Some(name("a")),
        pg: Some(PeerPg {
            system_id: SystemId(77),
            in_recovery: true,
            timeline: TimelineId(9),
            lsn: Lsn(5000),
            replay_lsn: Some(Lsn(5000)),
            streaming: true,
            confirmed: None,
        }),
        trouble: None,
        procedure,
    }
}

fn row(text: &str) -> StandbyRow {
    StandbyRow {
        application_name: text.to_owned(),
        state: "streaming".into(),
        sync_state: "async".into(),
        flush_lsn: Some(Lsn(1000)),
        replay_lsn: Some(Lsn(900)),
        pid: 7,
    }
}

fn ask(solo: &mut Solo, from: &str, question: PeerQuestion) -> Option<PeerAnswer> {
    solo.fx.clear();
    solo.give(Event::FollowerAsked { ticket: 77, from: name(from), question: Box::new(question) });
    answered(solo)
}

fn answered(solo: &Solo) -> Option<PeerAnswer> {
    solo.fx.iter().find_map(|effect| match effect {
        Effect::AnswerPeer { ticket: 77, answer } => Some(answer.as_ref().clone()),
        _ => None,
    })
}

fn facts(solo: &mut Solo, procedure: Option<ProcedureBrief>) -> Facts {
    match ask(solo, "c", PeerQuestion::Follow { state: follower("c", procedure) }) {
        Some(PeerAnswer::Facts(facts)) => *facts,
        other => panic!("no facts: {other:?}"),
    }
}

fn ended(solo: &Solo, wanted: u64) -> Option<(u8, String)> {
    solo.fx.iter().find_map(|effect| match effect {
        Effect::End { ticket, exit, text, .. } if *ticket == wanted => Some((*exit, text.clone())),
        _ => None,
    })
}

#[test]
fn what_a_node_without_a_vote_says_proves_nothing_and_is_not_the_peers_word() {
    let mut solo = Solo::active(Mode::Update);
    // Ahead, on a later timeline: from the peer that would be a fence.
    for _ in 0..20 {
        facts(&mut solo, None);
        solo.run(MS * 250);
    }
    let shown = solo.snapshot();
    assert_eq!((shown.gate.state, shown.gate.open), (GateState::Open, true));
    let peer = shown.peer.expect("there is one");
    assert!(!peer.reachable && peer.age_ms.is_none(), "it counted as the peer: {peer:?}");
    assert_eq!(shown.counters.peer_pledges, 0);
    // And the lease ends as if nobody spoke.
    solo.marker = None;
    for _ in 0..20 {
        facts(&mut solo, None);
        solo.run(MS * 250);
    }
    assert_eq!(solo.snapshot().gate.state, GateState::Lapsed);
}

#[test]
fn its_walsender_never_arms_and_never_satisfies_a_commit() {
    let mut solo = Solo::active(Mode::Update);
    let report = PgReport { standbys: vec![row("c")], ..super::primary() };
    solo.pg = Some(report);
    for _ in 0..20 {
        facts(&mut solo, None);
        solo.run(MS * 250);
    }
    let lists = tasks(&solo).into_iter().filter(|task| matches!(task, PgTask::SetSyncList(_) | PgTask::RearmBarrier));
    assert_eq!(lists.count(), 0, "a node without a vote was made synchronous");
    let shown = solo.snapshot();
    assert!(!shown.replication.in_sync);
    let c = &shown.nodes[2];
    assert_eq!((c.status.as_str(), c.role.as_str(), c.attached), ("up", "standby", true));
    assert_eq!((c.replication_delay_bytes, c.sync_state.as_deref()), (Some(100), Some("async")));
    let b = &shown.nodes[1];
    assert_eq!((b.status.as_str(), b.replication_state.as_deref()), ("down", None), "c's walsender shown as b's");
}

#[test]
fn only_the_active_node_prepares_for_it_and_the_record_stays_as_it_is() {
    let mut solo = Solo::active(Mode::Update);
    solo.run(MS * 1000);
    // What the guard prepared by itself when it opened.
    let op = solo.guard.pg.task.map(|(op, _)| op);
    if let Some(op) = op {
        solo.give(Event::PgDone { op, result: Ok(PgOutput::Done) });
    }
    assert_eq!(
        ask(&mut solo, "c", PeerQuestion::PrepareFollower { id: 5, look: false, tail: None }),
        None,
        "before it is done"
    );
    assert_eq!(tasks(&solo), [PgTask::PrepareStandby]);
    let op = solo.guard.pg.task.map(|(op, _)| op).expect("it runs");
    let source = source(12);
    solo.give(Event::PgDone { op, result: Ok(PgOutput::Source(source.clone())) });
    assert_eq!(answered(&solo), Some(PeerAnswer::Prepared { id: 5, source }));
    assert!(!solo.wanted(|e| matches!(e, Effect::Update { .. })), "the record was touched");
    // Strangers, and a voter that calls itself one.
    for (from, says) in [("d", "d"), ("b", "b"), ("c", "d")] {
        let answer = ask(&mut solo, from, PeerQuestion::Follow { state: follower(says, None) });
        assert!(matches!(answer, Some(PeerAnswer::Refused { .. })), "{from} as {says}: {answer:?}");
    }
    solo.give(Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } });
    let answer = ask(&mut solo, "c", PeerQuestion::PrepareFollower { id: 6, look: false, tail: None });
    assert!(matches!(answer, Some(PeerAnswer::Refused { .. })), "{answer:?}");
    // The peer is no node without a vote either.
    solo.fx.clear();
    let question = Box::new(PeerQuestion::Follow { state: follower("b", None) });
    solo.give(Event::PeerAsked { ticket: 77, question });
    assert!(matches!(answered(&solo), Some(PeerAnswer::Refused { .. })));
}

#[test]
fn a_rejoin_given_here_is_fetched_watched_and_ended_there() {
    let mut solo = Solo::active(Mode::Update);
    solo.give(Event::Command { ticket: 41, command: Command::Rejoin { node: name("c"), dry_run: false } });
    assert!(solo.wanted(|e| matches!(e, Effect::Say { ticket: 41, text } if text.contains("c's daemon (up to 30 s)"))));
    let wish = facts(&mut solo, None).wish.expect("it is told");
    let brief = |step: &str, ended| ProcedureBrief {
        kind: "rejoin".into(),
        id: wish.id,
        step: step.into(),
        ended,
        progress: None,
        lines: Vec::new(),
    };
    assert_eq!(facts(&mut solo, Some(brief("cloning", None))).wish, None, "told once it is under way");
    assert!(solo.wanted(|e| matches!(e, Effect::Say { ticket: 41, text } if text == "cloning")));
    facts(&mut solo, Some(brief("cloning", Some((0, "done".into())))));
    assert_eq!(ended(&solo, 41), Some((0, "done".to_owned())));
    solo.run(MS * 50);
    // What ended before is not taken for it, and a daemon that never comes is not waited for.
    solo.give(Event::Command { ticket: 42, command: Command::Rejoin { node: name("c"), dry_run: true } });
    facts(&mut solo, Some(brief("cloning", Some((4, "long ago".into())))));
    assert_eq!(ended(&solo, 42), None);
    solo.run(MS * 31_000);
    assert_eq!(ended(&solo, 42).map(|(exit, _)| exit), Some(1));
}

#[test]
fn a_switchover_names_a_voter_where_there_are_more_standbys() {
    let mut solo = Solo::active(Mode::Update);
    for (ticket, to) in [(51, None), (52, Some(name("c"))), (53, Some(name("x")))] {
        solo.give(Event::Command { ticket, command: Command::Switchover { to, dry_run: false } });
        assert_eq!(ended(&solo, ticket).map(|(exit, _)| exit), Some(3), "{ticket}");
    }
    assert_eq!(solo.snapshot().epoch, Epoch(3).0);
}

fn source(bytes: u64) -> SourceFacts {
    SourceFacts {
        system_id: SystemId(77),
        bytes,
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

#[test]
fn a_look_changes_nothing_and_each_gets_the_answer_to_its_own() {
    let mut solo = Solo::active(Mode::Update);
    solo.guard
        .setup
        .nodes
        .push(crate::engine::setup::NodeSetup { name: name("d"), ..solo.guard.setup.nodes[2].clone() });
    solo.run(MS * 1000);
    if let Some((op, _)) = solo.guard.pg.task {
        solo.give(Event::PgDone { op, result: Ok(PgOutput::Done) });
    }
    solo.fx.clear();
    let tail = |text: &str| {
        Some(WalTail { segment: "000000010000000000000001".into(), from: 0, len: 8, sha256: text.to_owned() })
    };
    for (ticket, from, id, tail) in [(81, "c", 5, tail("c")), (82, "d", 6, None), (83, "d", 7, tail("d"))] {
        let question = Box::new(PeerQuestion::PrepareFollower { id, look: true, tail });
        solo.give(Event::FollowerAsked { ticket, from: name(from), question });
    }
    for bytes in [12, 13] {
        let (op, _) = solo.guard.pg.task.expect("one look after another");
        solo.give(Event::PgDone { op, result: Ok(PgOutput::Source(source(bytes))) });
    }
    // A newer question of the same node replaces its older one; nothing else was begun.
    assert_eq!(tasks(&solo), [PgTask::LookAsSource(tail("c")), PgTask::LookAsSource(tail("d"))]);
    let answers: Vec<_> = solo
        .fx
        .iter()
        .filter_map(|effect| match effect {
            Effect::AnswerPeer { ticket, answer } => Some((*ticket, answer.as_ref().clone())),
            _ => None,
        })
        .collect();
    let prepared = |id, bytes| PeerAnswer::Prepared { id, source: source(bytes) };
    assert_eq!(answers, [(81, prepared(5, 12)), (83, prepared(7, 13))]);
    assert!(!solo.wanted(|e| matches!(e, Effect::Update { .. } | Effect::Record { .. })), "something was changed");
    // A fence does not wait for a look, and who waited for one hears of it.
    solo.fx.clear();
    for (ticket, from) in [(84, "c"), (85, "d")] {
        let question = Box::new(PeerQuestion::PrepareFollower { id: 8, look: true, tail: None });
        solo.give(Event::FollowerAsked { ticket, from: name(from), question });
    }
    solo.give(Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } });
    solo.run(MS * 1000);
    assert!(tasks(&solo).iter().any(|task| matches!(task, PgTask::Demote { .. })), "{:?}", tasks(&solo));
    let refused = |wanted: u64| {
        let refusal = |answer: &PeerAnswer| matches!(answer, PeerAnswer::Refused { .. });
        solo.wanted(|e| matches!(e, Effect::AnswerPeer { ticket, answer } if *ticket == wanted && refusal(answer)))
    };
    assert!(refused(84) && refused(85));
}
