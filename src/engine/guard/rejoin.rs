//! Rejoin, on the node that comes back: it follows, is rewound or cloned, as its plan says.
//!
//! ```text
//!  asking -> looking -> planning [-> proving] -> marking -> preparing -> stopping -> facts -> working -> goal
//!            the active node's facts, a plan made of them, and the end of our WAL   |            -> streaming
//!            compared: nothing is changed yet                                       asked again: we received on
//! ```
//!
//! **Invariant:** from `RejoinStarted` to `RejoinDone` the data here is durably not promotable; the record says
//! `sync=none` before anything here is touched. What can be refused is refused before either. It is done only when the
//! standby has replayed what the active node wrote after the copy or rewind had ended.

use super::proofs::{PEER_LIMIT, PeerAskedFor};
use super::{Guard, PgOwner, Then};
use crate::base::ids::{Lsn, NodeName, OpId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::rejoining::{
    self, LOOK_AGAIN, LOOK_LIMIT, NODE_LIMIT, PREPARE_LIMIT, STREAM_LIMIT, intention, with_proof,
};
use crate::engine::report::{Progress, RejoinPlan, SourceFacts, WalTail};
use crate::engine::status::Role;
use crate::engine::turn::{
    Command, Effect, Now, PeerAnswer, PeerQuestion, PeerState, PgOutput, PgTask, ProcedureBrief, Ticket,
};

/// An active node that does not serve, or does not answer, for so long ends a rejoin that waits for it.
const LOST_LIMIT: Duration = Duration::from_secs(20);
/// How long is waited for synchronous again before the rejoin ends without it.
const SYNC_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, PartialEq, Hash)]
enum Step {
    Asking { question: Option<u64>, again: Instant },
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
    Syncing,
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Step::Asking { .. } => "asking the active node",
            Step::Looking { .. } => "looking at the active node",
            Step::Planning => "looking at the data here",
            Step::Proving { .. } => "comparing the end of the WAL here with the active node's",
            Step::Marking => "marking this node as not promotable",
            Step::Preparing { .. } => "the active node records sync=none",
            Step::Stopping => "stopping PostgreSQL",
            Step::Facts { .. } => "looking at the active node again",
            Step::Working => "making this node a standby",
            Step::Goal { .. } => "asking the active node how far it is",
            Step::Streaming { .. } => "catching up",
            Step::Finishing => "ending the fenced state",
            Step::Syncing => "waiting for synchronous replication",
        }
    }
}

/// A rejoin under way here.
#[derive(Debug, Clone, Hash)]
pub(super) struct Rejoin {
    pub(super) id: u64,
    tickets: Vec<Ticket>,
    pub(super) dry_run: bool,
    since: String,
    began: Instant,
    step: Step,
    pub(super) deadline: Option<Instant>,
    give_up: Instant,
    last_line: String,
    /// All of them, for who follows it on the other node.
    lines: rejoining::Lines,
    progress: Option<Progress>,
    /// Since when the active node has not been there.
    lost: Option<Instant>,
    plan: Option<RejoinPlan>,
    source: Option<SourceFacts>,
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
}

impl Guard {
    /// Brings THIS node back; `ticket` is absent when the peer asked for it.
    pub(super) fn begin_rejoin(&mut self, now: Now, ticket: Option<Ticket>, dry_run: bool) -> u64 {
        let id = self.procedure_id(now);
        self.rejoin = Some(Rejoin {
            id,
            tickets: ticket.into_iter().collect(),
            dry_run,
            since: now.rfc3339(),
            began: now.boot,
            step: Step::Asking { question: None, again: now.boot },
            deadline: Some(now.boot),
            give_up: now.boot + NODE_LIMIT,
            last_line: String::new(),
            lines: rejoining::Lines::default(),
            progress: None,
            lost: None,
            plan: None,
            source: None,
            touched: self.durable.rejoining,
        });
        id
    }

    pub(super) fn say_rejoin(&mut self, _now: Now, text: &str, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.last_line = text.to_owned();
        r.lines.say(text, r.progress.as_ref());
        fx.extend(r.tickets.iter().map(|ticket| Effect::told(*ticket, text.to_owned(), r.progress.clone())));
    }

    /// What the hand says while it works.
    pub(super) fn on_pg_progress(
        &mut self,
        now: Now,
        op: OpId,
        text: String,
        progress: Option<Progress>,
        fx: &mut Vec<Effect>,
    ) {
        if self.pg.task.is_none_or(|(running, _)| running != op) {
            return;
        }
        if rejoining::tells_divergence(progress.as_ref()) {
            self.note(now, fx, "diverged", text.clone());
        }
        if let Some(r) = &mut self.rejoin {
            r.progress = progress;
        }
        self.say_rejoin(now, &text, fx);
    }

    fn rejoin_step(&mut self, now: Now, step: Step, limit: Option<Duration>, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.step = step;
        r.last_line.clear();
        r.progress = None;
        r.lost = None;
        r.give_up = now.boot + limit.unwrap_or(Duration::from_secs(86_400));
        r.deadline = limit.map(|limit| now.boot + limit);
        let text = r.step.word();
        self.say_rejoin(now, text, fx);
    }

    pub(super) fn end_rejoin(&mut self, now: Now, exit: u8, text: &str, fx: &mut Vec<Effect>) {
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
        if let Some(r) = self.rejoin.as_ref().filter(|r| !r.touched && self.durable.rejoining) {
            let id = r.id;
            self.record(fx, vec![Entry::RejoinAbandoned { id }], Then::Nothing);
            self.end_rejoin(now, exit, why, fx);
            return;
        }
        let exit = if self.durable.rejoining && exit == 1 { 4 } else { exit };
        self.end_rejoin(now, exit, why, fx);
    }

    pub(super) fn on_rejoin_peer(
        &mut self,
        now: Now,
        question: u64,
        answer: Result<Box<PeerAnswer>, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(r) = &mut self.rejoin else { return };
        match (&mut r.step, answer.map(|a| *a)) {
            (Step::Asking { question: q, .. }, Ok(PeerAnswer::Pulse { .. })) if *q == Some(question) => {
                self.judge_rejoin(now, fx);
            }
            (Step::Asking { question: q, again }, _) if *q == Some(question) => {
                *q = None;
                *again = now.boot + Duration::from_secs(1);
                r.deadline = Some(*again);
            }
            (Step::Looking { question: q }, Ok(PeerAnswer::Prepared { source, .. })) if *q == question => {
                r.source = Some(source.clone());
                self.rejoin_step(now, Step::Planning, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::PlanRejoin(source), fx);
            }
            (Step::Proving { question: q }, Ok(PeerAnswer::Prepared { source, .. })) if *q == question => {
                r.source = Some(source.clone());
                // The plan knows what an unequal end means.
                self.rejoin_step(now, Step::Planning, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::PlanRejoin(source), fx);
            }
            (Step::Goal { question: q, .. }, Ok(PeerAnswer::Prepared { source, .. })) if *q == Some(question) => {
                let step = Step::Streaming { goal: source.lsn, timeline: source.timeline };
                self.rejoin_step(now, step, Some(STREAM_LIMIT), fx);
            }
            (Step::Goal { question: q, again }, _) if *q == Some(question) => {
                *q = None;
                *again = now.boot + LOOK_AGAIN;
                r.deadline = Some(*again);
            }
            (Step::Looking { question: q } | Step::Proving { question: q }, answer) if *q == question => {
                let why = refusal(answer);
                let text = format!("{}: {why}; nothing was changed, run rejoin again", self.setup.peer);
                self.end_rejoin(now, 1, &text, fx);
            }
            (Step::Preparing { question: q }, Ok(PeerAnswer::Prepared { source, .. })) if *q == question => {
                r.source = Some(with_proof(r.source.as_ref(), source));
                r.touched = true;
                self.rejoin_step(now, Step::Stopping, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::Stop, fx);
            }
            (Step::Facts { question: q }, Ok(PeerAnswer::Prepared { source, .. })) if *q == question => {
                let source = with_proof(r.source.as_ref(), source);
                r.source = Some(source.clone());
                self.rejoin_step(now, Step::Working, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::Rejoin(source), fx);
            }
            (Step::Preparing { question: q } | Step::Facts { question: q }, answer) if *q == question => {
                let why = refusal(answer);
                let text = format!("{}: {why}; run rejoin again", self.setup.peer);
                self.fail_rejoin(now, 1, &text, fx);
            }
            _ => {}
        }
    }

    /// This node serves, as far as its lease says: there is nobody to ask about it.
    pub(super) fn wrong_direction(&self, now: Now) -> Option<String> {
        let serves = self.keeps_clients() && self.lease_stands(now).is_ok();
        serves.then(|| format!("{} is the active node itself: the wrong direction", self.setup.me))
    }

    /// It refuses the wrong direction: the source is the active primary of the highest epoch, the target is not.
    fn judge_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(peer) = self.peer.state.clone() else { return };
        let mine = self.durable.won.max(self.durable.complete);
        let refusal = if self.durable.is_holder() && self.fenced().is_none() {
            Some(format!("{} is the active node itself: the wrong direction", self.setup.me))
        } else if !self.peer_may_be_joined() || peer.complete == crate::base::ids::Epoch::NONE {
            Some(format!("{} does not serve: there is nothing to rejoin to", peer.node))
        } else if peer.complete < mine {
            Some(format!("{} serves epoch {}, this node held {mine}: the wrong direction", peer.node, peer.complete))
        } else if !peer.looks {
            // It would prepare (record sync=none) where it is asked to look.
            let (name, version) = (&peer.node, &peer.version);
            Some(format!("{name} runs {version}, which cannot look without changing something: upgrade {name} first"))
        } else {
            None
        };
        if let Some(why) = refusal {
            self.end_rejoin(now, 3, &format!("refused: {why}"), fx);
            return;
        }
        if let Some(text) = self.is_joined(now) {
            self.end_rejoin(now, 0, &text, fx);
            return;
        }
        let question = self.look_at_source(now, None, fx);
        self.rejoin_step(now, Step::Looking { question }, Some(LOOK_LIMIT), fx);
    }

    /// It follows the active node and may be promoted as it is: nothing has to be brought back.
    fn is_joined(&self, now: Now) -> Option<String> {
        let whole = self.fenced().is_none() && !self.durable.rejoining && self.durable.initialised;
        let (me, peer) = (&self.setup.me, &self.setup.peer);
        let follows = self.pg.up && !self.is_silent() && self.pg.task.is_none() && self.peer_reachable(now);
        (whole && follows && self.in_sync())
            .then(|| format!("{me} is a standby of {peer} already, in sync; nothing was changed"))
    }

    fn look_at_source(&mut self, now: Now, tail: Option<WalTail>, fx: &mut Vec<Effect>) -> u64 {
        let id = self.rejoin.as_ref().map_or(0, |r| r.id);
        let ask = PeerQuestion::PrepareRejoin { id, look: true, tail };
        self.ask_peer(now, PeerAskedFor::Rejoin, ask, LOOK_LIMIT, fx)
    }

    /// The active node's side of it: its facts, and nothing changed.
    pub(super) fn on_look(&mut self, ticket: Ticket, id: u64, tail: Option<WalTail>, fx: &mut Vec<Effect>) {
        if !self.may_be_joined() {
            let why = "this node is not the active one, or its gate is not open".to_owned();
            fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why }) });
            return;
        }
        // A newer question replaces one that nobody waits for any more.
        self.pg.look_for = Some((ticket, id));
        self.pg_task_next(PgOwner::Look, PgTask::LookAsSource(tail), fx);
    }

    pub(super) fn on_looked(&mut self, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some((ticket, id)) = self.pg.look_for.take() else { return };
        let answer = match result {
            Ok(PgOutput::Source(source)) => PeerAnswer::Prepared { id, source },
            Ok(_) => PeerAnswer::Refused { why: "PostgreSQL there gave no facts".to_owned() },
            Err(why) => PeerAnswer::Refused { why },
        };
        fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
    }

    /// Refused, rehearsed, proven or begun.
    fn on_plan(&mut self, now: Now, plan: RejoinPlan, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        let (id, dry_run) = (r.id, r.dry_run);
        let proven = r.source.as_ref().is_some_and(|source| source.same_tail.is_some()) || r.plan.is_some();
        r.plan = Some(plan.clone());
        if let Some(why) = &plan.refusal {
            self.end_rejoin(now, 3, &format!("refused: {why}"), fx);
            return;
        }
        if let Some(tail) = plan.tail.clone().filter(|_| !proven) {
            let question = self.look_at_source(now, Some(tail), fx);
            self.rejoin_step(now, Step::Proving { question }, Some(LOOK_LIMIT), fx);
            return;
        }
        let text = intention(&plan, &self.setup.peer);
        if dry_run {
            self.end_rejoin(now, 0, &format!("would {text}; nothing was changed"), fx);
            return;
        }
        self.say_rejoin(now, &format!("will {text}"), fx);
        self.rejoin_step(now, Step::Marking, None, fx);
        self.record(fx, vec![Entry::RejoinStarted { id }], Then::Rejoin);
    }

    pub(super) fn on_rejoin_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        match r.step {
            Step::Marking => {
                let id = r.id;
                self.peer.word_from = now.boot;
                let ask = PeerQuestion::PrepareRejoin { id, look: false, tail: None };
                let question = self.ask_peer(now, PeerAskedFor::Rejoin, ask, PREPARE_LIMIT, fx);
                self.rejoin_step(now, Step::Preparing { question }, Some(PREPARE_LIMIT), fx);
            }
            Step::Finishing if self.setup.synchronous => self.rejoin_step(now, Step::Syncing, Some(SYNC_LIMIT), fx),
            Step::Finishing => self.rejoin_done(now, "asynchronous", fx),
            _ => {}
        }
    }

    fn rejoin_done(&mut self, now: Now, how: &str, fx: &mut Vec<Effect>) {
        let text = format!("{} is a standby of {} again, {how}", self.setup.me, self.setup.peer);
        self.end_rejoin(now, 0, &text, fx);
    }

    pub(super) fn on_rejoin_pg(&mut self, now: Now, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        match (r.step.clone(), result) {
            (Step::Planning, Ok(PgOutput::Plan(plan))) => self.on_plan(now, plan, fx),
            (Step::Planning, Err(why)) => {
                self.end_rejoin(now, 1, &format!("{why}; nothing was changed, run rejoin again"), fx);
            }
            (Step::Stopping, Ok(_)) => {
                // A standby received until it stopped: what the active node said before would call it ahead.
                let question = self.look_at_source(now, None, fx);
                self.rejoin_step(now, Step::Facts { question }, Some(LOOK_LIMIT), fx);
            }
            (Step::Working, Ok(_)) => {
                self.pg.demoted = true;
                self.pg.adopted = true;
                let step = Step::Goal { question: None, again: now.boot };
                self.rejoin_step(now, step, Some(STREAM_LIMIT), fx);
            }
            (_, Err(why)) => self.fail_rejoin(now, 4, &format!("{why}; run rejoin again"), fx),
            _ => {}
        }
    }

    pub(super) fn advance_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let late = now.boot >= r.give_up;
        if matches!(r.step, Step::Goal { .. } | Step::Streaming { .. }) && self.source_is_lost(now) {
            let text = format!("{} does not serve any more; run rejoin again when a node is active", self.setup.peer);
            self.fail_rejoin(now, 4, &text, fx);
            return;
        }
        let Some(r) = &self.rejoin else { return };
        match r.step.clone() {
            Step::Looking { .. } | Step::Proving { .. } if late => {
                let text = format!("{} did not answer in time; nothing was changed", self.setup.peer);
                self.end_rejoin(now, 1, &text, fx);
            }
            Step::Goal { question: None, again } if now.boot >= again => {
                let question = self.look_at_source(now, None, fx);
                if let Some(r) = &mut self.rejoin {
                    r.step = Step::Goal { question: Some(question), again };
                    r.deadline = Some(now.boot + LOST_LIMIT);
                }
            }
            Step::Goal { .. } if late => {
                self.fail_rejoin(now, 4, "the active node does not say how far it is; run rejoin again", fx);
            }
            Step::Asking { .. } if late => {
                let text = format!("{} did not answer within {} s", self.setup.peer, NODE_LIMIT.as_secs());
                self.end_rejoin(now, 1, &text, fx);
            }
            Step::Asking { question: None, again } if now.boot >= again => {
                let question = self.ask_peer_pulse(now, PeerAskedFor::Rejoin, false, fx);
                let give_up = self.rejoin.as_ref().map(|r| r.give_up);
                if let Some(r) = &mut self.rejoin {
                    r.step = Step::Asking { question: Some(question), again: now.boot + PEER_LIMIT };
                    r.deadline = give_up;
                }
            }
            Step::Streaming { goal, timeline } => {
                let report = self.pg.report.as_ref().filter(|_| self.pg.up);
                let there = report.is_some_and(|report| {
                    report.in_recovery
                        && report.streaming
                        && report.timeline >= timeline
                        && report.replay_lsn.is_some_and(|lsn| lsn >= goal)
                });
                if there {
                    let id = self.rejoin.as_ref().map_or(0, |r| r.id);
                    self.rejoin_step(now, Step::Finishing, None, fx);
                    self.record(fx, vec![Entry::RejoinDone { id }], Then::Rejoin);
                } else if late {
                    self.fail_rejoin(
                        now,
                        4,
                        "the new standby does not stream; see PostgreSQL's log and run rejoin again",
                        fx,
                    );
                }
            }
            Step::Syncing => {
                if self.in_sync() {
                    self.rejoin_done(now, "in sync", fx);
                } else if late {
                    self.rejoin_done(now, "streaming; synchronous replication follows by itself", fx);
                }
            }
            Step::Preparing { .. } | Step::Facts { .. } if late => {
                self.fail_rejoin(now, 1, "the active node did not answer in time; run rejoin again", fx);
            }
            _ => {}
        }
    }

    /// As far as it says: see `may_be_joined` there.
    fn peer_may_be_joined(&self) -> bool {
        let waits = |peer: &PeerState| self.setup.block && peer.role == Role::Active;
        self.peer.state.as_ref().is_some_and(|peer| peer.gate_open || waits(peer))
    }

    /// The node that is being joined has not served, or not answered, for a while.
    fn source_is_lost(&mut self, now: Now) -> bool {
        let serves = self.peer_reachable(now) && self.peer_may_be_joined();
        let Some(r) = &mut self.rejoin else { return false };
        if serves {
            r.lost = None;
            return false;
        }
        now.boot.since(*r.lost.get_or_insert(now.boot)) >= LOST_LIMIT
    }

    /// `rejoin NODE` from either node.
    pub(super) fn on_rejoin_command(
        &mut self,
        now: Now,
        ticket: Ticket,
        node: &NodeName,
        dry_run: bool,
        fx: &mut Vec<Effect>,
    ) {
        if let Some(why) = self.wrong_direction(now).filter(|_| *node == self.setup.me) {
            fx.push(Effect::End { ticket, exit: 3, text: format!("refused: {why}"), flag: None });
        } else if *node == self.setup.me {
            self.begin_rejoin(now, Some(ticket), dry_run);
            if !self.peer_reachable(now) {
                let text = rejoining::waiting(&self.setup.peer);
                self.say_rejoin(now, &text, fx);
            }
        } else if *node == self.setup.peer {
            let command = Command::Rejoin { node: node.clone(), dry_run };
            self.forward(now, ticket, command, NODE_LIMIT, fx);
            if !self.peer_reachable(now) {
                fx.push(Effect::Say { ticket, text: rejoining::waiting(node) });
            }
        } else if self.setup.followers().any(|name| name == node) {
            self.wish_rejoin(now, ticket, node, dry_run, fx);
        } else {
            let names: Vec<&str> = self.setup.nodes.iter().map(|n| n.name.as_str()).collect();
            let text = format!("refused: there is no node named {node}; the nodes are {}", names.join(", "));
            fx.push(Effect::End { ticket, exit: 3, text, flag: None });
        }
    }
}

fn refusal(answer: Result<PeerAnswer, String>) -> String {
    rejoining::facts(answer).err().unwrap_or_default()
}
