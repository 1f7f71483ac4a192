//! Rejoin of a node without a vote, on that node: it follows, is rewound or cloned, as its plan says. The way is the
//! voters' (`engine::guard`); only the record is not touched, because it never names this node.
//!
//! ```text
//!  asking -> looking -> planning [-> proving] -> marking -> preparing -> stopping -> facts -> working -> goal
//!                                                               asked again: we received on |         -> streaming
//! ```
//!
//! **Invariants:** what can be refused is refused before anything is touched. From `RejoinStarted` to `RejoinDone`
//! PostgreSQL here follows nobody but by this procedure, and it is done only when it has replayed what the node that
//! is active then wrote after the work had ended.

use super::{Asked, Follower, Owner, Then};
use crate::base::ids::{Lsn, NodeName, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::rejoining::{
    self, LOOK_AGAIN, LOOK_LIMIT, NODE_LIMIT, PREPARE_LIMIT, STREAM_LIMIT, intention, with_proof,
};
use crate::engine::report::{Progress, RejoinPlan, SourceFacts, WalTail};
use crate::engine::turn::{Effect, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask, ProcedureBrief, Ticket};

/// While something else is waited for than time.
const NO_LIMIT: Duration = Duration::from_secs(86_400);

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Asking,
    Looking { question: u64 },
    Planning,
    Proving { question: u64 },
    Marking,
    Preparing { question: u64 },
    Stopping,
    Facts { question: u64 },
    Working,
    Goal { question: Option<u64>, again: Instant },
    Streaming { goal: Lsn, timeline: TimelineId },
    Finishing,
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Step::Asking => "asking who is active",
            Step::Looking { .. } => "looking at the active node",
            Step::Planning => "looking at the data here",
            Step::Proving { .. } => "comparing the end of the WAL here with the active node's",
            Step::Marking => "marking this node's data as unfinished",
            Step::Preparing { .. } => "the active node makes role and slot",
            Step::Stopping => "stopping PostgreSQL",
            Step::Facts { .. } => "looking at the active node again",
            Step::Working => "making this node a standby",
            Step::Goal { .. } => "asking the active node how far it is",
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
    began: Instant,
    step: Step,
    pub(super) deadline: Option<Instant>,
    give_up: Instant,
    last_line: String,
    /// All of them, for who follows it on a voter.
    lines: rejoining::Lines,
    progress: Option<Progress>,
    plan: Option<RejoinPlan>,
    /// Whom it is made a standby of; once that is known, with what it says of itself.
    source: Option<(NodeName, Option<SourceFacts>)>,
    /// The data here is not what it was, or was not whole before.
    touched: bool,
}

impl Rejoin {
    pub(super) fn brief(&self) -> ProcedureBrief {
        let step = match self.step {
            Step::Working if !self.last_line.is_empty() => self.last_line.clone(),
            _ => self.step.word().to_owned(),
        };
        let (kind, progress, lines) = ("rejoin".to_owned(), self.progress.clone(), self.lines.kept());
        ProcedureBrief { kind, id: self.id, step, ended: None, progress, lines }
    }

    pub(super) fn since(&self) -> &str {
        &self.since
    }

    pub(super) fn join(&mut self, ticket: Ticket) {
        self.tickets.push(ticket);
    }

    /// The work is done, and what it made follows whoever is active.
    pub(super) fn is_streaming(&self) -> bool {
        matches!(self.step, Step::Goal { .. } | Step::Streaming { .. })
    }
}

impl Follower {
    pub(super) fn begin_rejoin(&mut self, now: Now, id: u64, ticket: Option<Ticket>, dry_run: bool) {
        self.rejoin = Some(Rejoin {
            id,
            tickets: ticket.into_iter().collect(),
            dry_run,
            since: now.rfc3339(),
            began: now.boot,
            step: Step::Asking,
            deadline: Some(now.boot + NODE_LIMIT),
            give_up: now.boot + NODE_LIMIT,
            last_line: String::new(),
            lines: rejoining::Lines::default(),
            progress: None,
            plan: None,
            source: None,
            touched: self.durable.rejoining,
        });
    }

    pub(super) fn say_rejoin(&mut self, text: &str, progress: Option<Progress>, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.last_line = text.to_owned();
        r.progress = progress;
        r.lines.say(text, r.progress.as_ref());
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
            self.counters.procedure_ended("rejoin", exit, now.boot.since(r.began));
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
        let active = self.active().map(|facts| facts.state.node.clone());
        let Some(r) = &self.rejoin else { return };
        let late = now.boot >= r.give_up;
        match r.step.clone() {
            Step::Asking => match active {
                Some(source) => {
                    let question = self.look_at(&source, None, fx);
                    if let Some(r) = &mut self.rejoin {
                        r.source = Some((source, None));
                    }
                    self.rejoin_step(now, Step::Looking { question }, LOOK_LIMIT, fx);
                }
                None if late => {
                    let text = format!("neither of {} says that it serves", self.setup.voters_named());
                    self.end_rejoin(now, 1, &format!("{text}: there is nothing to rejoin to; promote first"), fx);
                }
                None => {}
            },
            Step::Looking { .. } | Step::Proving { .. } if late => {
                let text = "the active node did not answer in time; nothing was changed, run rejoin again";
                self.end_rejoin(now, 1, text, fx);
            }
            // The task begins with this turn, or when the one under way has ended.
            Step::Planning if self.pg.task.is_none() => {
                let Some((_, Some(source))) = r.source.clone() else { return };
                self.pg_task(Owner::Rejoin, PgTask::PlanRejoin(source), fx);
            }
            Step::Preparing { .. } | Step::Facts { .. } if late => {
                self.fail_rejoin(now, 1, "the active node did not answer in time; run rejoin again", fx);
            }
            Step::Stopping if self.pg.task.is_none() => self.pg_task(Owner::Rejoin, PgTask::Stop, fx),
            Step::Goal { .. } if late => {
                let text = "no active node says how far it is; run rejoin again when a node is active";
                self.fail_rejoin(now, 4, text, fx);
            }
            Step::Goal { question: None, again } if now.boot >= again => self.ask_goal(active, fx),
            Step::Streaming { goal, timeline } => self.watch_stream(now, active, goal, timeline, late, fx),
            _ => {}
        }
    }

    fn look_at(&mut self, source: &NodeName, tail: Option<WalTail>, fx: &mut Vec<Effect>) -> u64 {
        let id = self.rejoin.as_ref().map_or(0, |r| r.id);
        let ask = PeerQuestion::PrepareFollower { id, look: true, tail };
        self.ask(source, Asked::Rejoin(source.clone()), ask, LOOK_LIMIT, fx)
    }

    /// Of whoever is active now: the service may have moved during the work.
    fn ask_goal(&mut self, active: Option<NodeName>, fx: &mut Vec<Effect>) {
        let Some(source) = active else { return };
        let question = self.look_at(&source, None, fx);
        let Some(r) = &mut self.rejoin else { return };
        r.source = Some((source, None));
        if let Step::Goal { question: asked, .. } = &mut r.step {
            *asked = Some(question);
        }
    }

    fn watch_stream(
        &mut self,
        now: Now,
        active: Option<NodeName>,
        goal: Lsn,
        timeline: TimelineId,
        late: bool,
        fx: &mut Vec<Effect>,
    ) {
        let Some(r) = &self.rejoin else { return };
        let id = r.id;
        // The service moved: what the old one wrote last is no goal any more.
        let moved = active.is_some_and(|name| r.source.as_ref().is_none_or(|(source, _)| *source != name));
        let there = self.report().is_some_and(|report| {
            let reached = report.timeline >= timeline && report.replay_lsn.is_some_and(|lsn| lsn >= goal);
            report.in_recovery && report.streaming && reached
        });
        if moved {
            self.rejoin_step(now, Step::Goal { question: None, again: now.boot }, STREAM_LIMIT, fx);
        } else if there && self.pg.task.is_none() {
            self.rejoin_step(now, Step::Finishing, NO_LIMIT, fx);
            self.record(fx, vec![Entry::RejoinDone { id }], Then::Rejoin);
        } else if late {
            let text = "the new standby does not stream; see PostgreSQL's log and run rejoin again";
            self.fail_rejoin(now, 4, text, fx);
        }
    }

    pub(super) fn on_rejoin_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let Some((source, _)) = r.source.clone() else { return };
        match r.step {
            Step::Marking => {
                let ask = PeerQuestion::PrepareFollower { id: r.id, look: false, tail: None };
                let question = self.ask(&source, Asked::Rejoin(source.clone()), ask, PREPARE_LIMIT, fx);
                self.rejoin_step(now, Step::Preparing { question }, PREPARE_LIMIT, fx);
            }
            Step::Finishing => {
                let upstream = self.pg.follows.clone().unwrap_or(source);
                let text = format!("{} is a standby of {upstream}, streaming", self.setup.me);
                self.end_rejoin(now, 0, &text, fx);
            }
            _ => {}
        }
    }

    /// A voter answered this procedure.
    pub(super) fn on_rejoin_answer(
        &mut self,
        now: Now,
        question: u64,
        from: &NodeName,
        answer: Result<PeerAnswer, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(r) = &mut self.rejoin else { return };
        match (&mut r.step, rejoining::facts(answer)) {
            (Step::Looking { question: q } | Step::Proving { question: q }, Ok(source)) if *q == question => {
                r.source = Some((from.clone(), Some(source)));
                self.rejoin_step(now, Step::Planning, NO_LIMIT, fx);
            }
            (Step::Looking { question: q } | Step::Proving { question: q }, Err(why)) if *q == question => {
                let text = format!("{from}: {why}; nothing was changed, run rejoin again");
                self.end_rejoin(now, 1, &text, fx);
            }
            (Step::Preparing { question: q }, Ok(source)) if *q == question => {
                let planned = r.source.take().and_then(|(_, facts)| facts);
                r.source = Some((from.clone(), Some(with_proof(planned.as_ref(), source))));
                r.touched = true;
                fx.push(Effect::FollowFrom { node: from.clone() });
                self.rejoin_step(now, Step::Stopping, NO_LIMIT, fx);
            }
            (Step::Facts { question: q }, Ok(source)) if *q == question => {
                let prepared = r.source.take().and_then(|(_, facts)| facts);
                let source = with_proof(prepared.as_ref(), source);
                r.source = Some((from.clone(), Some(source.clone())));
                self.rejoin_step(now, Step::Working, NO_LIMIT, fx);
                self.pg_task(Owner::Rejoin, PgTask::Rejoin(source), fx);
            }
            (Step::Preparing { question: q } | Step::Facts { question: q }, Err(why)) if *q == question => {
                self.fail_rejoin(now, 1, &format!("{from}: {why}; run rejoin again"), fx);
            }
            (Step::Goal { question: q, .. }, Ok(source)) if *q == Some(question) => {
                let step = Step::Streaming { goal: source.lsn, timeline: source.timeline };
                self.rejoin_step(now, step, STREAM_LIMIT, fx);
            }
            (Step::Goal { question: q, again }, Err(_)) if *q == Some(question) => {
                (*q, *again) = (None, now.boot + LOOK_AGAIN);
            }
            _ => {}
        }
    }

    /// Refused, rehearsed, proven or begun.
    fn on_plan(&mut self, now: Now, plan: RejoinPlan, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        let Some((source, facts)) = r.source.clone() else { return };
        let (id, dry_run) = (r.id, r.dry_run);
        let proven = facts.is_some_and(|facts| facts.same_tail.is_some()) || r.plan.is_some();
        r.plan = Some(plan.clone());
        if let Some(why) = &plan.refusal {
            self.end_rejoin(now, 3, &format!("refused: {why}"), fx);
            return;
        }
        if let Some(tail) = plan.tail.clone().filter(|_| !proven) {
            let question = self.look_at(&source, Some(tail), fx);
            self.rejoin_step(now, Step::Proving { question }, LOOK_LIMIT, fx);
            return;
        }
        let text = intention(&plan, &source);
        if dry_run {
            self.end_rejoin(now, 0, &format!("would {text}; nothing was changed"), fx);
            return;
        }
        self.say_rejoin(&format!("will {text}"), None, fx);
        self.rejoin_step(now, Step::Marking, NO_LIMIT, fx);
        self.record(fx, vec![Entry::RejoinStarted { id }], Then::Rejoin);
    }

    pub(super) fn on_rejoin_pg(&mut self, now: Now, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        match (&r.step, result) {
            (Step::Planning, Ok(PgOutput::Plan(plan))) => self.on_plan(now, plan, fx),
            (Step::Planning, Ok(_)) => {
                let text = "the data here could not be looked at; nothing was changed, run rejoin again";
                self.end_rejoin(now, 1, text, fx);
            }
            (Step::Planning, Err(why)) => {
                self.end_rejoin(now, 1, &format!("{why}; nothing was changed, run rejoin again"), fx);
            }
            (Step::Stopping, Ok(_)) => {
                let Some((source, _)) = r.source.clone() else { return };
                // It received until it stopped: what the active node said before would call it ahead.
                let question = self.look_at(&source, None, fx);
                self.rejoin_step(now, Step::Facts { question }, LOOK_LIMIT, fx);
            }
            (Step::Working, Ok(_)) => {
                self.pg.follows = r.source.as_ref().map(|(name, _)| name.clone());
                (self.pg.dry_since, self.pg.judged, self.pg.diverged) = (None, false, false);
                let step = Step::Goal { question: None, again: now.boot };
                self.rejoin_step(now, step, STREAM_LIMIT, fx);
            }
            (_, Err(why)) => self.fail_rejoin(now, 4, &format!("{why}; run rejoin again"), fx),
            (_, Ok(_)) => {}
        }
    }
}
