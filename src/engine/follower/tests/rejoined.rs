//! A rejoin that looks and plans before it touches anything.

use super::*;
use crate::engine::report::WalTail;

fn only_behind() -> RejoinPlan {
    let tail = WalTail { segment: "000000010000000000000001".into(), from: 0, len: 8, sha256: "ab".into() };
    RejoinPlan { how: RejoinHow::Follow, why: "it is only behind".into(), refusal: None, tail: Some(tail) }
}

fn begin(play: &mut Play, ticket: Ticket, dry_run: bool) {
    play.give(Event::Command { ticket, command: Command::Rejoin { node: name("c"), dry_run } });
}

/// What the rejoin was told of the source when it worked.
fn worked(play: &Play) -> Option<SourceFacts> {
    play.tasks.iter().find_map(|(_, task)| match task {
        PgTask::Rejoin(source) => Some(source.clone()),
        _ => None,
    })
}

#[test]
fn what_can_be_refused_or_rehearsed_is_before_anything_is_touched() {
    let mut play = Play::new(Vec::new());
    play.plan.refusal = Some("another cluster".to_owned());
    play.run(1000);
    let (tasks, disk) = (play.tasks.len(), play.disk.clone());
    assert_eq!(
        play.command(41, Command::Rejoin { node: name("c"), dry_run: false }),
        (3, "refused: another cluster".to_owned())
    );
    play.plan = only_behind();
    play.same_tail = Some(true);
    let (exit, text) = play.command(42, Command::Rejoin { node: name("c"), dry_run: true });
    assert_eq!((exit, text.as_str()), (0, "would follow a: it is only behind; nothing was changed"));
    assert_eq!(play.asked, ["look a", "look a", "prove a"], "nothing is prepared");
    assert!(play.tasks[tasks..].iter().all(|(_, task)| matches!(task, PgTask::PlanRejoin(_))), "{:?}", play.tasks);
    assert_eq!(play.disk, disk, "the journal was touched");
    // The source does not serve any more when it is looked at: nothing is changed either.
    play.voters.insert(name("a"), Some(voter("a", 0)));
    let (exit, text) = play.command(43, Command::Rejoin { node: name("c"), dry_run: false });
    assert_eq!(exit, 1, "{text}");
    assert!(text.contains("nothing was changed") && play.disk == disk, "{text}");
}

#[test]
fn what_is_only_behind_is_followed_on_proof_of_the_same_wal_alone() {
    for (same_tail, wanted) in [(Some(true), Some(true)), (Some(false), Some(false)), (None, None)] {
        let mut play = Play::new(Vec::new());
        play.plan = only_behind();
        play.same_tail = same_tail;
        play.run(1000);
        play.asked.clear();
        begin(&mut play, 51, false);
        assert_eq!(play.asked, ["look a", "prove a", "prepare a", "look a", "look a"]);
        // The hand decides by it once more, on data that stands still.
        assert_eq!(worked(&play).expect("it worked").same_tail, wanted);
        let plans = play.tasks.iter().filter_map(|(_, task)| match task {
            PgTask::PlanRejoin(source) => Some(source.same_tail),
            _ => None,
        });
        assert_eq!(plans.collect::<Vec<_>>(), [None, wanted], "the plan is made anew with what was proven");
    }
}

#[test]
fn the_active_node_is_asked_again_when_this_one_has_stopped() {
    let mut play = Play::new(Vec::new());
    play.plan = only_behind();
    play.same_tail = Some(true);
    play.run(1000);
    // Written while this node still received: told before the stop, it would be ahead.
    play.grows = 500;
    let before = play.source_lsn;
    begin(&mut play, 61, false);
    let told: Vec<&str> = play.asked.iter().map(String::as_str).take(4).collect();
    assert_eq!(told, ["look a", "prove a", "prepare a", "look a"]);
    let source = worked(&play).expect("it worked");
    assert_eq!((source.lsn, source.same_tail), (Lsn(before + 4 * 500), Some(true)), "the answer after the stop");
    let stop = play.tasks.iter().position(|(_, task)| *task == PgTask::Stop).expect("stopped");
    let work = play.tasks.iter().position(|(_, task)| matches!(task, PgTask::Rejoin(_))).expect("worked");
    assert!(stop < work);
    // It serves no more by then: nothing is done to the data.
    let mut play = Play::new(Vec::new());
    play.plan = only_behind();
    play.same_tail = Some(true);
    play.run(1000);
    play.gone_after_stop = true;
    begin(&mut play, 62, false);
    assert!(worked(&play).is_none() && play.asked.last().is_some_and(|asked| asked == "look a"), "{:?}", play.asked);
    let (exit, text) = ended(62).expect("it ended");
    assert!(exit == 4 && text.contains("run rejoin again"), "{exit} {text}");
}
