//! Rejoin of a node without a vote, on that node: a fresh clone of the active voter, the old directory set aside. The
//! voters' own is `engine::guard`'s; here the record is not touched, because it never names this node.
//!
//! **Invariant:** from `RejoinStarted` to `RejoinDone` PostgreSQL here follows nobody but by this procedure.

use super::{Asked, Follower, Owner, Then};
use crate::base::ids::{Lsn, NodeName};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::report::{Progress, SourceFacts};
use crate::engine::turn::{Effect, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask, ProcedureBrief, Ticket};

/// How long is waited for a voter whose gate is open.
const ACTIVE_LIMIT: Duration = Duration::from_secs(30);
/// The active node's part: role and slot.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Until the new standby streams and has caught up.
const STREAM_LIMIT: Duration = Duration::from_secs(120);
/// While something else is waited for than time.
const NO_LIMIT: Duration = Duration::from_secs(86_400);

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Asking,
    Marking,
    Preparing { question: u64 },
    Stopping,
    Cloning,
    Streaming { goal: Option<Lsn> },
    Finishing,
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Step::Asking => "asking who is active",
            Step::Marking => "marking this node's data as unfinished",
            Step::Preparing { .. } => "the active node makes role and slot",
            Step::Stopping => "stopping PostgreSQL",
            Step::Cloning => "cloning",
            Step::Streaming { .. } => "catching up",
            Step::Finishing => "ending the unfinished state",
        }
    }
}

/// A rejoin under way here.
#[derive(Debug, Clone)]
pub(super) struct Rejoin {
    id: u64,
    tickets: Vec<Ticket>,
    dry_run: bool,
    since: String,
    step: Step,
    pub(super) deadline: Option<Instant>,
    give_up: Instant,
    last_line: String,
    progress: Option<Progress>,
    /// Whom it is cloned from, once that is known.
    source: Option<(NodeName, Option<SourceFacts>)>,
    /// The data here is not what it was, or was not whole before.
    touched: bool,
}

impl Rejoin {
    pub(super) fn brief(&self) -> ProcedureBrief {
        let step = match self.step {
            Step::Cloning if !self.last_line.is_empty() => self.last_line.clone(),
            _ => self.step.word().to_owned(),
        };
        ProcedureBrief { kind: "rejoin".to_owned(), id: self.id, step, ended: None, progress: self.progress.clone() }
    }

    pub(super) fn since(&self) -> &str {
        &self.since
    }

    pub(super) fn join(&mut self, ticket: Ticket) {
        self.tickets.push(ticket);
    }

    /// The clone is there, and follows whoever is active.
    pub(super) fn is_streaming(&self) -> bool {
        matches!(self.step, Step::Streaming { .. })
    }
}

impl Follower {
    pub(super) fn begin_rejoin(&mut self, now: Now, id: u64, ticket: Option<Ticket>, dry_run: bool) {
        self.rejoin = Some(Rejoin {
            id,
            tickets: ticket.into_iter().collect(),
            dry_run,
            since: now.rfc3339(),
            step: Step::Asking,
            deadline: Some(now.boot + ACTIVE_LIMIT),
            give_up: now.boot + ACTIVE_LIMIT,
            last_line: String::new(),
            progress: None,
            source: None,
            touched: self.durable.rejoining,
        });
    }

    pub(super) fn say_rejoin(&mut self, text: &str, progress: Option<Progress>, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.last_line = text.to_owned();
        r.progress = progress;
        fx.extend(r.tickets.iter().map(|ticket| Effect::told(*ticket, text.to_owned(), r.progress.clone())));
    }

    fn rejoin_step(&mut self, now: Now, step: Step, limit: Duration, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.step = step;
        r.give_up = now.boot + limit;
        r.deadline = (limit < NO_LIMIT).then_some(r.give_up);
        let text = r.step.word();
        self.say_rejoin(text, None, fx);
        if let Some(r) = &mut self.rejoin {
            r.last_line.clear();
        }
    }

    fn end_rejoin(&mut self, now: Now, exit: u8, text: &str, fx: &mut Vec<Effect>) {
        let Some(r) = self.rejoin.take() else { return };
        for ticket in &r.tickets {
            fx.push(Effect::End { ticket: *ticket, exit, text: text.to_owned(), flag: None });
        }
        self.last_ended = Some(ProcedureBrief { ended: Some((exit, text.to_owned())), ..r.brief() });
        if !r.dry_run {
            self.note(now, fx, "procedure_ended", format!("rejoin ended ({exit}): {text}"));
        }
    }

    pub(super) fn fail_rejoin(&mut self, now: Now, exit: u8, why: &str, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let untouched = !r.touched && self.durable.rejoining;
        if untouched {
            let entry = Entry::RejoinAbandoned { id: r.id };
            self.record(fx, vec![entry], Then::Nothing);
        }
        let exit = if self.durable.rejoining && !untouched && exit == 1 { 4 } else { exit };
        self.end_rejoin(now, exit, why, fx);
    }

    pub(super) fn advance_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let late = now.boot >= r.give_up;
        match &r.step {
            Step::Asking => match self.active().map(|facts| facts.state.node.clone()) {
                Some(source) => self.begin_from(now, source, fx),
                None if late => {
                    let text = format!("neither of {} says that it serves", self.setup.voters_named());
                    self.end_rejoin(now, 1, &format!("{text}: there is nothing to rejoin to; promote first"), fx);
                }
                None => {}
            },
            Step::Preparing { .. } if late => {
                self.fail_rejoin(now, 1, "the active node did not answer in time; run rejoin again", fx);
            }
            Step::Stopping if self.pg.task.is_none() => self.pg_task(Owner::Rejoin, PgTask::Stop, fx),
            Step::Streaming { goal } => {
                let there = self.report().is_some_and(|report| {
                    let reached = |goal: Lsn| report.replay_lsn.is_some_and(|lsn| lsn >= goal);
                    report.in_recovery && report.streaming && goal.is_none_or(reached)
                });
                if there && self.pg.task.is_none() {
                    let entry = Entry::RejoinDone { id: r.id };
                    self.rejoin_step(now, Step::Finishing, NO_LIMIT, fx);
                    self.record(fx, vec![entry], Then::Rejoin);
                } else if late {
                    let text = "the new standby does not stream; see PostgreSQL's log and run rejoin again";
                    self.fail_rejoin(now, 4, text, fx);
                }
            }
            Step::Marking | Step::Preparing { .. } | Step::Stopping | Step::Cloning | Step::Finishing => {}
        }
    }

    fn begin_from(&mut self, now: Now, source: NodeName, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        if r.dry_run {
            let text = format!("would clone {source} and set the old directory aside; nothing was changed");
            return self.end_rejoin(now, 0, &text, fx);
        }
        r.source = Some((source, None));
        let entry = Entry::RejoinStarted { id: r.id };
        self.rejoin_step(now, Step::Marking, NO_LIMIT, fx);
        self.record(fx, vec![entry], Then::Rejoin);
    }

    pub(super) fn on_rejoin_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let Some((source, _)) = r.source.clone() else { return };
        match r.step {
            Step::Marking => {
                let ask = PeerQuestion::PrepareFollower { id: r.id };
                let question = self.ask(&source, Asked::Rejoin(source.clone()), ask, PREPARE_LIMIT, fx);
                self.rejoin_step(now, Step::Preparing { question }, PREPARE_LIMIT, fx);
            }
            Step::Finishing => {
                let upstream = self.pg.follows.clone().unwrap_or(source);
                let text = format!("{} is a standby of {upstream}, streaming", self.setup.me);
                self.end_rejoin(now, 0, &text, fx);
            }
            Step::Asking | Step::Preparing { .. } | Step::Stopping | Step::Cloning | Step::Streaming { .. } => {}
        }
    }

    pub(super) fn on_prepared(
        &mut self,
        now: Now,
        question: u64,
        from: &NodeName,
        answer: Result<PeerAnswer, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(r) = self.rejoin.as_mut().filter(|r| r.step == Step::Preparing { question }) else { return };
        match answer {
            Ok(PeerAnswer::Prepared { source, .. }) => {
                r.source = Some((from.clone(), Some(source)));
                r.touched = true;
                fx.push(Effect::FollowFrom { node: from.clone() });
                // The task begins with this turn, or when the one under way has ended.
                self.rejoin_step(now, Step::Stopping, NO_LIMIT, fx);
            }
            Ok(PeerAnswer::Refused { why }) | Err(why) => {
                self.fail_rejoin(now, 1, &format!("{from}: {why}; run rejoin again"), fx);
            }
            Ok(_) => {
                self.fail_rejoin(now, 1, &format!("{from} gave an answer to another question; run rejoin again"), fx)
            }
        }
    }

    pub(super) fn on_rejoin_pg(&mut self, now: Now, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        match (&r.step, result) {
            (Step::Stopping, Ok(_)) => {
                let Some((_, Some(source))) = r.source.clone() else { return };
                self.rejoin_step(now, Step::Cloning, NO_LIMIT, fx);
                // Nobody has compared the end of the WAL: it is not followed, but rewound to or cloned.
                let source = SourceFacts { same_tail: Some(false), ..source };
                self.pg_task(Owner::Rejoin, PgTask::Rejoin(source), fx);
            }
            (Step::Cloning, Ok(_)) => {
                self.pg.follows = r.source.as_ref().map(|(name, _)| name.clone());
                (self.pg.dry_since, self.pg.judged, self.pg.diverged) = (None, false, false);
                let goal = self.active().and_then(|facts| facts.state.pg.as_ref()).map(|pg| pg.lsn);
                self.rejoin_step(now, Step::Streaming { goal }, STREAM_LIMIT, fx);
            }
            (_, Err(why)) => self.fail_rejoin(now, 4, &format!("{why}; run rejoin again"), fx),
            (_, Ok(_)) => {}
        }
    }
}
