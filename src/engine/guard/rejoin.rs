//! Rejoin, on the node that comes back: a fresh clone of the active node, the old directory set aside.
//!
//! **Invariant:** from `RejoinStarted` to `RejoinDone` the data here is durably not promotable; the record says
//! `sync=none` before anything here is touched.

use super::proofs::{PEER_LIMIT, PeerAskedFor};
use super::{Guard, PgOwner, Then};
use crate::base::ids::{Lsn, NodeName};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::report::SourceFacts;
use crate::engine::status::Role;
use crate::engine::turn::{Command, Effect, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask, ProcedureBrief, Ticket};

/// How long the daemon of the node to bring back is waited for (the contract).
const NODE_LIMIT: Duration = Duration::from_secs(30);
/// The active node's part: record, list, role, slot.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Until the new standby streams and has caught up.
const STREAM_LIMIT: Duration = Duration::from_secs(120);
/// How long is waited for synchronous again before the rejoin ends without it.
const SYNC_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, PartialEq, Hash)]
enum Step {
    Asking { question: Option<u64>, again: Instant },
    Marking,
    Preparing { question: u64 },
    Stopping,
    Cloning,
    Streaming { goal: Option<Lsn> },
    Finishing,
    Syncing,
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Step::Asking { .. } => "asking the active node",
            Step::Marking => "marking this node as not promotable",
            Step::Preparing { .. } => "the active node records sync=none",
            Step::Stopping => "stopping PostgreSQL",
            Step::Cloning => "cloning",
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
    dry_run: bool,
    since: String,
    step: Step,
    pub(super) deadline: Option<Instant>,
    give_up: Instant,
    last_line: String,
    source: Option<SourceFacts>,
    /// The data here is not what it was, or was not whole before.
    touched: bool,
}

impl Rejoin {
    pub(super) fn brief(&self) -> ProcedureBrief {
        let step = match self.step {
            Step::Cloning if !self.last_line.is_empty() => self.last_line.clone(),
            _ => self.step.word().to_owned(),
        };
        ProcedureBrief { kind: "rejoin".to_owned(), id: self.id, step, ended: None }
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
            step: Step::Asking { question: None, again: now.boot },
            deadline: Some(now.boot),
            give_up: now.boot + NODE_LIMIT,
            last_line: String::new(),
            source: None,
            touched: self.durable.rejoining,
        });
        id
    }

    pub(super) fn say_rejoin(&mut self, _now: Now, text: &str, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.last_line = text.to_owned();
        for ticket in &r.tickets {
            fx.push(Effect::Say { ticket: *ticket, text: text.to_owned() });
        }
    }

    fn rejoin_step(&mut self, now: Now, step: Step, limit: Option<Duration>, fx: &mut Vec<Effect>) {
        let Some(r) = &mut self.rejoin else { return };
        r.step = step;
        r.last_line.clear();
        r.give_up = now.boot + limit.unwrap_or(Duration::from_secs(86_400));
        r.deadline = limit.map(|limit| now.boot + limit);
        let text = r.step.word();
        self.say_rejoin(now, text, fx);
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
            (Step::Preparing { question: q }, Ok(PeerAnswer::Prepared { source, .. })) if *q == question => {
                r.source = Some(source);
                r.touched = true;
                self.rejoin_step(now, Step::Stopping, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::Stop, fx);
            }
            (Step::Preparing { question: q }, answer) if *q == question => {
                let why = match answer {
                    Ok(PeerAnswer::Refused { why }) | Err(why) => why,
                    Ok(_) => "it gave an answer to another question".to_owned(),
                };
                let text = format!("{}: {why}; run rejoin again", self.setup.peer);
                self.fail_rejoin(now, 1, &text, fx);
            }
            _ => {}
        }
    }

    /// It refuses the wrong direction: the source is the active primary of the highest epoch, the target is not.
    fn judge_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(peer) = self.peer.state.clone() else { return };
        let mine = self.durable.won.max(self.durable.complete);
        let refusal = if self.durable.is_holder() && self.fenced().is_none() {
            Some(format!("{} is the active node itself: the wrong direction", self.setup.me))
        } else if !(peer.gate_open || self.setup.block && peer.role == Role::Active)
            || peer.complete == crate::base::ids::Epoch::NONE
        {
            Some(format!("{} does not serve: there is nothing to rejoin to", peer.node))
        } else if peer.complete < mine {
            Some(format!("{} serves epoch {}, this node held {mine}: the wrong direction", peer.node, peer.complete))
        } else {
            None
        };
        if let Some(why) = refusal {
            self.end_rejoin(now, 3, &format!("refused: {why}"), fx);
            return;
        }
        let id = self.rejoin.as_ref().map_or(0, |r| r.id);
        if self.rejoin.as_ref().is_some_and(|r| r.dry_run) {
            let text = format!("would clone {} and set the old directory aside; nothing was changed", peer.node);
            self.end_rejoin(now, 0, &text, fx);
            return;
        }
        self.rejoin_step(now, Step::Marking, None, fx);
        self.record(fx, vec![Entry::RejoinStarted { id }], Then::Rejoin);
    }

    pub(super) fn on_rejoin_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        match r.step {
            Step::Marking => {
                let id = r.id;
                let ask = PeerQuestion::PrepareRejoin { id };
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
            (Step::Stopping, Ok(_)) => {
                let Some(source) = r.source.clone() else { return };
                self.rejoin_step(now, Step::Cloning, None, fx);
                self.pg_task_next(PgOwner::Rejoin, PgTask::Clone(source), fx);
            }
            (Step::Cloning, Ok(_)) => {
                self.pg.demoted = true;
                self.pg.adopted = true;
                let goal = self.peer.state.as_ref().and_then(|p| p.pg.as_ref()).map(|pg| pg.lsn);
                self.rejoin_step(now, Step::Streaming { goal }, Some(STREAM_LIMIT), fx);
            }
            (_, Err(why)) => self.fail_rejoin(now, 4, &format!("{why}; run rejoin again"), fx),
            _ => {}
        }
    }

    pub(super) fn advance_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(r) = &self.rejoin else { return };
        let late = now.boot >= r.give_up;
        match r.step.clone() {
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
            Step::Streaming { goal } => {
                let report = self.pg.report.as_ref().filter(|_| self.pg.up);
                let there = report.is_some_and(|report| {
                    report.in_recovery
                        && report.streaming
                        && goal.is_none_or(|goal| report.replay_lsn.is_some_and(|lsn| lsn >= goal))
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
            Step::Preparing { .. } if late => {
                self.fail_rejoin(now, 1, "the active node did not answer in time; run rejoin again", fx);
            }
            _ => {}
        }
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
        if *node == self.setup.me {
            self.begin_rejoin(now, Some(ticket), dry_run);
        } else if *node == self.setup.peer {
            let command = Command::Rejoin { node: node.clone(), dry_run };
            self.forward(now, ticket, command, NODE_LIMIT, fx);
        } else if self.setup.followers().any(|name| name == node) {
            self.wish_rejoin(now, ticket, node, dry_run, fx);
        } else {
            let names: Vec<&str> = self.setup.nodes.iter().map(|n| n.name.as_str()).collect();
            let text = format!("refused: there is no node named {node}; the nodes are {}", names.join(", "));
            fx.push(Effect::End { ticket, exit: 3, text, flag: None });
        }
    }
}
