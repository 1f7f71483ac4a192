//! What a rejoin is on every node, with a vote or without: its limits, the plan said in words, and what of an answer
//! counts. The steps are each machine's own (`guard::rejoin`, `follower::rejoin`): a voter's touch the record, a
//! follower's go after whoever is active.

use super::report::{Progress, RejoinHow, RejoinPlan, SourceFacts};
use super::turn::{PeerAnswer, ProcedureBrief, Told};
use crate::base::ids::NodeName;
use crate::base::time::Duration;
use std::collections::VecDeque;

/// How long is waited for the node to bring back, or for one to rejoin to (the contract).
pub(super) const NODE_LIMIT: Duration = Duration::from_secs(30);
/// The active node's facts; right after a promotion a checkpoint comes first.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(90);
/// A question refused is asked again so much later.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The active node's part: record, list, role, slot.
pub(super) const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Until the new standby streams and has caught up.
pub(super) const STREAM_LIMIT: Duration = Duration::from_secs(120);

/// Of what was said, so many lines are kept for those who follow it from another node: with `LINE_MAX` they fit a
/// message between the nodes (64 KiB) several times.
const LINES_MAX: usize = 32;
/// Bytes of one of them.
const LINE_MAX: usize = 400;

/// What a procedure said, to be told on another node too. Figures of a copy under way take each other's place.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Lines {
    said: u64,
    kept: VecDeque<Told>,
}

impl Lines {
    pub(super) fn say(&mut self, text: &str, progress: Option<&Progress>) {
        self.said += 1;
        let mut short = String::new();
        for c in text.chars() {
            if short.len() + c.len_utf8() > LINE_MAX {
                short.push_str("...");
                break;
            }
            // As JSON it would be six times as long.
            short.push(if c.is_control() { ' ' } else { c });
        }
        let told = Told { number: self.said, text: short, progress: progress.cloned() };
        if is_figure(&told) && self.kept.back().is_some_and(is_figure) {
            self.kept.pop_back();
        } else if self.kept.len() >= LINES_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(told);
    }

    pub(super) fn kept(&self) -> Vec<Told> {
        self.kept.iter().cloned().collect()
    }
}

/// Bytes moved, and nothing that is said once.
fn is_figure(told: &Told) -> bool {
    told.progress.as_ref().is_some_and(|p| p.phase.is_none() && p.diverged_transactions.is_none() && !p.uncounted)
}

/// How far somebody who follows a procedure on another node has heard it.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Heard {
    number: u64,
    step: String,
}

impl Heard {
    /// What of it is new. Of an older daemon there is the step alone, as it is at the moment.
    pub(super) fn news(&mut self, brief: &ProcedureBrief) -> Vec<(String, Option<Progress>)> {
        if brief.lines.is_empty() {
            if brief.step == self.step {
                return Vec::new();
            }
            self.step.clone_from(&brief.step);
            return vec![(brief.step.clone(), brief.progress.clone())];
        }
        let new: Vec<&Told> = brief.lines.iter().filter(|told| told.number > self.number).collect();
        self.number = brief.lines.last().map_or(self.number, |told| self.number.max(told.number));
        new.into_iter().map(|told| (told.text.clone(), told.progress.clone())).collect()
    }
}

/// What diverged is told, by its number or as what could not be counted: worth an event.
pub(super) fn tells_divergence(progress: Option<&Progress>) -> bool {
    progress.is_some_and(|progress| progress.diverged_transactions.is_some() || progress.uncounted)
}

/// `follow alp: it is only behind`
pub(super) fn intention(plan: &RejoinPlan, source: &impl std::fmt::Display) -> String {
    let (would, aside) = match plan.how {
        RejoinHow::Follow => ("follow", ""),
        RejoinHow::Rewind => ("rewind to", ""),
        RejoinHow::Clone => ("clone", "; an old data directory is set aside"),
    };
    format!("{would} {source}: {}{aside}", plan.why)
}

/// For who would else see nothing for that long.
pub(super) fn waiting(node: &NodeName) -> String {
    format!("waiting for {node}'s daemon (up to {} s)", NODE_LIMIT.as_secs())
}

/// What was proven when it was planned stays proven; the later answer is fresher in everything else.
pub(super) fn with_proof(before: Option<&SourceFacts>, fresh: SourceFacts) -> SourceFacts {
    SourceFacts { same_tail: before.and_then(|before| before.same_tail), ..fresh }
}

/// The source's facts, or why it gives none.
pub(super) fn facts(answer: Result<PeerAnswer, String>) -> Result<SourceFacts, String> {
    match answer {
        Ok(PeerAnswer::Prepared { source, .. }) => Ok(source),
        Ok(PeerAnswer::Refused { why }) | Err(why) => Err(why),
        Ok(_) => Err("it gave an answer to another question".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brief(lines: &Lines) -> ProcedureBrief {
        let (kind, step) = ("rejoin".to_owned(), "looking".to_owned());
        ProcedureBrief { kind, id: 1, step, ended: None, progress: None, lines: lines.kept() }
    }

    #[test]
    fn every_line_is_heard_once_however_rarely_it_is_listened_to() {
        let (mut lines, mut heard) = (Lines::default(), Heard::default());
        let diverged = Progress { diverged_transactions: Some(3), ..Progress::default() };
        lines.say("will rewind", None);
        lines.say("3 transactions", Some(&diverged));
        for done in 0..1000 {
            lines.say(&format!("{done} bytes"), Some(&Progress { done_bytes: done, ..Progress::default() }));
        }
        let texts = |news: Vec<(String, Option<Progress>)>| news.into_iter().map(|(text, _)| text).collect::<Vec<_>>();
        let first = heard.news(&brief(&lines));
        assert_eq!(first[1].1, Some(diverged), "its figures come with it");
        assert_eq!(texts(first), ["will rewind", "3 transactions", "999 bytes"]);
        assert!(heard.news(&brief(&lines)).is_empty());
        lines.say("done", None);
        assert_eq!(texts(heard.news(&brief(&lines))), ["done"]);
        for _ in 0..100 {
            lines.say(&"\u{1}\u{e4}".repeat(400), None);
        }
        let all = brief(&lines);
        assert_eq!(all.lines.len(), LINES_MAX);
        assert!(serde_json::to_string(&all).expect("JSON").len() < 20_000);
    }

    #[test]
    fn of_an_older_daemon_the_step_is_told_when_it_changes() {
        let (lines, mut heard) = (Lines::default(), Heard::default());
        assert_eq!(heard.news(&brief(&lines)).len(), 1);
        assert!(heard.news(&brief(&lines)).is_empty());
        let older = r#"{"kind":"rejoin","id":1,"step":"stopping","ended":null}"#;
        let older: ProcedureBrief = serde_json::from_str(older).expect("understood");
        assert_eq!(heard.news(&older), [("stopping".to_owned(), None)]);
    }
}
