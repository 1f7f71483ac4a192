//! The old side of a switchover: checkpoint, hold clients, stop PostgreSQL, consent; or put everything back.
//!
//! ```text
//!  Checkpointing (clients run) -> Draining -> Held -> Marking -> Stopping -> Stopped -> StoppingToConsent -> consent
//!        +--------- put back: nothing was touched ----------+        +-- put back: PostgreSQL started again --+
//! ```
//!
//! **Invariant:** a consent is sent only after nothing passes the gate any more (cut, or suspended for those who are
//! held over, `carry`), PostgreSQL is not a primary any more and the latch is on disk, in this order; it is never taken
//! back by word (R2, P1). That PostgreSQL is stopped for it is on disk before the stop: a daemon that starts in
//! between starts it again once it has proof (`housekeeping`), and so does one whose own start of it failed.

use super::proofs::PEER_LIMIT;
use super::takeover::Takeover;
use super::{Guard, PgOwner, RETRY_AFTER, Then};
use crate::base::ids::{Epoch, OpId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::status::GateState;
use crate::engine::turn::{Effect, Now, PeerAnswer, PgOutput, PgTask, ProcedureBrief, Ticket};

/// How long open transactions may go on before they are cancelled.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// Until the checkpoint before it is over: one of many GB takes minutes, and clients run meanwhile.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(600);
/// A checkpoint that took longer left time for much to become dirty again: another follows, so many at most.
const SHORT_CHECKPOINT: Duration = Duration::from_secs(1);
const CHECKPOINTS: u32 = 2;
/// A PostgreSQL that answers nobody for so long while it writes one hangs; a slow disk is given more time than usual.
const CHECKPOINT_SILENCE: Duration = Duration::from_secs(8);
/// The word for the stage whose answer the taker waits for no longer than for any other.
pub(super) const CLIENTS_HELD: &str = "clients held";
/// A consent stops PostgreSQL, which maintenance leaves alone.
pub(super) const MAINTENANCE: &str = "maintenance is on there: `portcullis maintenance off` first";
/// Silence of the taker after which a checkpoint is not waited for any more; clients run meanwhile.
const ABSENCE_LIMIT: Duration = Duration::from_secs(10);
/// Nobody is held for a taker whose last pulse is older than this, nor held on, as long as no consent was asked for:
/// what is put back then still has to start PostgreSQL within `pool.query_wait`. Two polls at least.
const FRESH: Duration = Duration::from_secs(5);
/// A stage that takes longer, although the taker is there, is given up.
const STAGE_LIMIT: Duration = Duration::from_secs(40);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    Checkpointing {
        ticket: Ticket,
        begun: Instant,
        left: u32,
    },
    Draining {
        op: OpId,
        ticket: Ticket,
    },
    Held,
    /// That PostgreSQL will be stopped is being written down.
    Marking {
        ticket: Ticket,
    },
    Stopping {
        ticket: Ticket,
    },
    Stopped,
    StoppingToConsent {
        ticket: Ticket,
        epoch: Epoch,
    },
    PuttingBack {
        ticket: Option<Ticket>,
    },
}

/// A switchover away from this node.
#[derive(Debug, Clone, Hash)]
pub(super) struct Handover {
    pub(super) attempt: u64,
    stage: Stage,
    /// The PostgreSQL task the stage waits for: one of an earlier stage or attempt says nothing.
    waits_for: Option<OpId>,
    /// When it began here.
    since: Instant,
    /// When clients were asked to wait.
    held: Instant,
    pub(super) deadline: Instant,
}

impl Handover {
    /// PostgreSQL is being stopped or is stopped for it: the gate stays shut.
    pub(super) fn stopping(&self) -> bool {
        !matches!(
            self.stage,
            Stage::Draining { .. } | Stage::Held | Stage::Marking { .. } | Stage::Checkpointing { .. }
        )
    }

    /// The consent waits for PostgreSQL to be surely down.
    pub(super) fn consenting(&self) -> bool {
        matches!(self.stage, Stage::StoppingToConsent { .. })
    }

    pub(super) fn word(&self) -> &'static str {
        match self.stage {
            Stage::Draining { .. } => "holding clients",
            Stage::Held | Stage::Marking { .. } => CLIENTS_HELD,
            Stage::Checkpointing { .. } => "checkpoint, while clients run",
            Stage::Stopping { .. } | Stage::StoppingToConsent { .. } => "stopping PostgreSQL",
            Stage::Stopped => "PostgreSQL stopped",
            Stage::PuttingBack { .. } => "putting everything back",
        }
    }
}

fn hangs(ticket: Ticket, why: String) -> Effect {
    Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Hangs { why }) }
}

fn refuse(ticket: Ticket, why: &str) -> Effect {
    Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why: why.to_owned() }) }
}

impl Guard {
    /// On, or being written as on.
    pub(super) fn in_maintenance(&self) -> bool {
        let writing = |(_, entries, _): &(u64, Vec<Entry>, Then)| entries.contains(&Entry::Maintenance { on: true });
        self.durable.maintenance || self.writing.iter().any(writing)
    }

    /// A dry run changes nothing, and keeps nothing from being changed.
    fn end_rehearsals(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let why = format!("given up: {} takes over meanwhile", self.setup.peer);
        if self.takeover.as_ref().is_some_and(|t| t.dry_run) {
            self.end_takeover(now, 1, &why, fx);
        }
        if self.rejoin.as_ref().is_some_and(|r| r.dry_run) {
            self.end_rejoin(now, 1, &why, fx);
        }
    }

    pub(super) fn on_prepare(&mut self, now: Now, ticket: Ticket, attempt: u64, epoch: Epoch, fx: &mut Vec<Effect>) {
        self.end_rehearsals(now, fx);
        if self.in_maintenance() {
            fx.push(refuse(ticket, MAINTENANCE));
        } else if self.takeover.is_some() || self.rejoin.is_some() {
            fx.push(refuse(ticket, "another procedure is under way on the old node"));
        } else if let Some(handover) = &mut self.handover {
            // The same question once more: whoever asked last is answered.
            match handover.stage {
                Stage::Checkpointing { begun, left, .. } if handover.attempt == attempt => {
                    handover.stage = Stage::Checkpointing { ticket, begun, left };
                }
                Stage::Draining { op, .. } if handover.attempt == attempt => {
                    handover.stage = Stage::Draining { op, ticket };
                }
                Stage::Held if handover.attempt == attempt => {
                    let lsn = self.pg.report.as_ref().map(|report| report.lsn);
                    let answer = Box::new(PeerAnswer::Ready { attempt, cancelled: 0, busy: 0, lsn });
                    fx.push(Effect::AnswerPeer { ticket, answer });
                }
                // A later attempt of the taker's: the one before is over there (its daemon was killed).
                Stage::Checkpointing { .. } | Stage::Draining { .. } | Stage::Held if handover.attempt < attempt => {
                    self.end_handover(fx);
                    self.on_prepare(now, ticket, attempt, epoch, fx);
                }
                _ => fx.push(refuse(ticket, "another switchover is under way")),
            }
        } else if !self.durable.is_holder() || self.fenced().is_some() {
            fx.push(refuse(ticket, "it is not the active node"));
        } else if epoch <= self.durable.complete {
            fx.push(refuse(ticket, "the new epoch is not above its own"));
        } else if let Some(since) = self.hangs_since(now) {
            fx.push(hangs(ticket, format!("it has not answered since {since}")));
        } else {
            self.handover = Some(Handover {
                attempt,
                stage: Stage::Checkpointing { ticket, begun: now.boot, left: CHECKPOINTS },
                waits_for: None,
                since: now.boot,
                held: now.boot,
                deadline: now.boot + CHECKPOINT_LIMIT,
            });
            let text = format!(
                "{} asked for a switchover to epoch {epoch}; a checkpoint first, while clients run",
                self.setup.peer
            );
            self.note(now, fx, "switchover_prepared", text);
            self.handover_task(PgTask::Checkpoint, fx);
        }
    }

    /// What is left to be written at the stop is little: hold clients and let open transactions end.
    fn hold_clients(&mut self, now: Now, ticket: Ticket, fx: &mut Vec<Effect>) {
        if let Some(why) = self.taker_is_gone(now, self.fresh()) {
            fx.push(refuse(ticket, &why));
            self.put_back(now, None, fx);
            return;
        }
        let op = OpId(self.id());
        let carry = self.can_carry();
        let Some(handover) = &mut self.handover else { return };
        handover.stage = Stage::Draining { op, ticket };
        handover.held = now.boot;
        handover.deadline = now.boot + STAGE_LIMIT;
        self.gate.paused = true;
        self.note(now, fx, "clients_held", format!("holding clients for the switchover to {}", self.setup.peer));
        fx.push(if carry { Effect::HoldToCarry } else { Effect::HoldClients });
        fx.push(Effect::Drain { op, limit: DRAIN_LIMIT });
    }

    pub(super) fn on_drained(&mut self, now: Now, op: OpId, cancelled: u64, busy: u64, fx: &mut Vec<Effect>) {
        let Some(handover) = &mut self.handover else { return };
        let Stage::Draining { op: waiting, ticket } = handover.stage else { return };
        if waiting != op {
            return;
        }
        handover.stage = Stage::Held;
        handover.deadline = now.boot + STAGE_LIMIT;
        let attempt = handover.attempt;
        if cancelled > 0 {
            let text = format!(
                "{cancelled} sessions did not end their transaction within {} s; what they ran was cancelled, and \
                 {busy} will be ended",
                DRAIN_LIMIT.as_secs()
            );
            self.note(now, fx, "drain_incomplete", text);
        }
        let lsn = self.pg.report.as_ref().map(|report| report.lsn);
        let answer = PeerAnswer::Ready { attempt, cancelled, busy, lsn };
        fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
    }

    pub(super) fn on_stop_primary(&mut self, now: Now, ticket: Ticket, attempt: u64, fx: &mut Vec<Effect>) {
        let handover = self.handover.as_mut().filter(|h| h.attempt == attempt);
        if let Some(Stage::Marking { ticket: waits } | Stage::Stopping { ticket: waits }) =
            handover.map(|h| &mut h.stage)
        {
            // The same question once more.
            *waits = ticket;
            return;
        }
        let Some(handover) = self.handover.as_mut().filter(|h| h.attempt == attempt && h.stage == Stage::Held) else {
            fx.push(refuse(ticket, "no switchover of that attempt is prepared there"));
            return;
        };
        handover.stage = Stage::Marking { ticket };
        handover.waits_for = None;
        handover.deadline = now.boot + STAGE_LIMIT;
        self.record(fx, vec![Entry::Stopping { attempt }], Then::Stop { attempt });
    }

    /// It is on disk that PostgreSQL is stopped for this attempt, or cannot be written.
    pub(super) fn on_stop_recorded(
        &mut self,
        now: Now,
        attempt: u64,
        result: Result<(), String>,
        fx: &mut Vec<Effect>,
    ) {
        // What a daemon that is about to end would stop, nobody watches.
        let waits = |h: &&mut Handover| h.attempt == attempt && h.waits_for.is_none();
        let Some(handover) = self.handover.as_mut().filter(waits).filter(|_| !self.shutting_down) else { return };
        match (handover.stage, result) {
            (Stage::Marking { ticket }, Ok(())) => {
                handover.stage = Stage::Stopping { ticket };
                handover.deadline = now.boot + STAGE_LIMIT * 3;
                let held = handover.held;
                self.begin_hold_over(now, attempt, held, fx);
                self.handover_task(PgTask::Stop, fx);
            }
            (Stage::Marking { ticket }, Err(why)) => {
                fx.push(refuse(ticket, &why));
                self.put_back(now, None, fx);
            }
            // The gate is cut, and a consent that cannot be written either is still a fence.
            (Stage::StoppingToConsent { .. }, _) => {
                let stop = if self.hangs_since(now).is_some() { PgTask::StopNow } else { PgTask::Stop };
                self.clear_the_way(now, "the stop of a consent", fx);
                self.handover_task(stop, fx);
            }
            _ => {}
        }
    }

    fn handover_task(&mut self, task: PgTask, fx: &mut Vec<Effect>) {
        let op = self.pg_task_next(PgOwner::Handover, task, fx);
        if let Some(handover) = &mut self.handover {
            handover.waits_for = Some(op);
        }
    }

    /// It is over on this side; what it still wanted of PostgreSQL does not begin any more.
    pub(super) fn end_handover(&mut self, fx: &mut Vec<Effect>) {
        self.handover = None;
        self.forget_waiting(PgOwner::Handover);
        // Its checkpoint may run for minutes, and whatever this node does next would wait for it.
        if let Some((op, _)) = self.pg.task.filter(|(_, owner)| *owner == PgOwner::Handover && !self.pg.restarts) {
            self.on_pg_done(self.at, op, Err("given up with its switchover".to_owned()), fx);
        }
        if !self.gate.held {
            self.release_clients(fx);
        }
    }

    pub(super) fn on_handover_pg(
        &mut self,
        now: Now,
        op: OpId,
        result: Result<PgOutput, String>,
        fx: &mut Vec<Effect>,
    ) {
        let gave_up = self.taker_gave_up();
        let Some(handover) = self.handover.as_mut().filter(|h| h.waits_for == Some(op)) else { return };
        handover.deadline = now.boot + STAGE_LIMIT;
        let attempt = handover.attempt;
        match (handover.stage, result) {
            (Stage::Checkpointing { ticket, .. }, Ok(PgOutput::Hangs(why))) => {
                self.on_no_session(now);
                fx.push(hangs(ticket, why));
                self.put_back(now, None, fx);
            }
            (Stage::Checkpointing { ticket, begun, left }, Ok(_)) => {
                if left > 1 && now.boot.since(begun) > SHORT_CHECKPOINT {
                    handover.stage = Stage::Checkpointing { ticket, begun: now.boot, left: left - 1 };
                    handover.deadline = now.boot + CHECKPOINT_LIMIT;
                    self.handover_task(PgTask::Checkpoint, fx);
                } else {
                    self.hold_clients(now, ticket, fx);
                }
            }
            (Stage::Stopping { ticket }, Ok(PgOutput::Control(data))) if data.state == "shut down" => {
                handover.stage = Stage::Stopped;
                let answer = PeerAnswer::Stopped { attempt, checkpoint: data.checkpoint, timeline: data.timeline };
                fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
            }
            (Stage::StoppingToConsent { ticket, .. }, Ok(_)) if gave_up => {
                // Nobody waits for this consent any more: to give it would only leave nobody to serve.
                fx.push(refuse(ticket, "the taker gave up before PostgreSQL here was down"));
                handover.stage = Stage::PuttingBack { ticket: None };
                self.handover_task(PgTask::Start, fx);
            }
            (Stage::StoppingToConsent { ticket, epoch }, Ok(_)) => self.latch_consent(now, ticket, attempt, epoch, fx),
            (Stage::Stopping { ticket }, Ok(_)) => {
                fx.push(refuse(ticket, "its PostgreSQL did not shut down cleanly"));
                self.put_back(now, None, fx);
            }
            (Stage::Checkpointing { ticket, .. } | Stage::Stopping { ticket }, Err(why)) => {
                fx.push(refuse(ticket, &why));
                self.put_back(now, None, fx);
            }
            (Stage::StoppingToConsent { ticket, .. }, Err(why)) => {
                fx.push(refuse(ticket, &why));
                self.end_handover(fx);
            }
            (Stage::PuttingBack { ticket }, result) => {
                self.end_handover(fx);
                match &result {
                    Ok(_) => self.note(now, fx, "put_back", "the switchover was given up; serving on".to_owned()),
                    Err(why) => {
                        // The journal says that it is stopped: it is tried again.
                        self.pg.retry_at = now.boot + RETRY_AFTER;
                        let seconds = RETRY_AFTER.as_secs();
                        let text = format!("PostgreSQL did not start again: {why}; trying again in {seconds} s");
                        self.note(now, fx, "put_back_failed", text);
                    }
                }
                if let Some(ticket) = ticket {
                    fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::PutBack { attempt }) });
                }
            }
            _ => {}
        }
    }

    /// The last step before the other node's compare-and-swap.
    pub(super) fn on_consent(
        &mut self,
        now: Now,
        ticket: Ticket,
        attempt: u64,
        epoch: Epoch,
        handed_over: bool,
        fx: &mut Vec<Effect>,
    ) {
        self.end_rehearsals(now, fx);
        if self.in_maintenance() {
            fx.push(refuse(ticket, MAINTENANCE));
            return;
        }
        if handed_over && !self.stands_handed_over(attempt) {
            // It was put back (or this daemon started again) and may have acknowledged what the taker has not got.
            fx.push(refuse(ticket, "that switchover was given up there, and it serves on"));
            return;
        }
        // Two people at once: of two nodes that both ask, the first by name goes on, or neither would.
        let yields = self.setup.peer < self.setup.me && self.takeover.as_ref().is_some_and(Takeover::may_yield);
        if (self.takeover.is_some() && !yields) || self.rejoin.is_some() {
            fx.push(refuse(ticket, "another procedure is under way on the old node"));
            return;
        }
        if yields {
            let why = format!("{} is promoted at the same time and goes first", self.setup.peer);
            self.fail_takeover(now, 1, &why, fx);
        }
        if epoch <= self.durable.complete || epoch <= self.durable.won {
            fx.push(refuse(ticket, "the new epoch is not above its own"));
            return;
        }
        // A later attempt of the taker's: the one before is over there (its daemon was killed).
        if self.handover.as_ref().is_some_and(|h| h.attempt > attempt) {
            fx.push(refuse(ticket, "another switchover is under way"));
            return;
        }
        // Cut first, whatever follows; those who are held over for this attempt are behind a gate that is shut already.
        let reason = format!("consented to {} taking epoch {epoch}", self.setup.peer);
        self.proofs.void();
        self.unbind_vips(fx);
        if !self.hold_under_consent(attempt, epoch) {
            self.shut(now, GateState::Shut, reason, fx);
        }
        // Not seen is not stopped: it may be in crash recovery and come up writable in a moment.
        // Nor is a standby that was told to promote: it may become a primary at any moment after this.
        let told = |start: u64| self.durable.won > self.durable.complete || self.pg.told_to_promote == Some(start);
        let standby = self.pg.up && self.pg.report.as_ref().is_some_and(|r| r.in_recovery && !told(r.start));
        let running = !standby && self.pg_present;
        let deadline = now.boot + STAGE_LIMIT * 3;
        self.handover = Some(Handover {
            attempt,
            stage: Stage::StoppingToConsent { ticket, epoch },
            waits_for: None,
            since: now.boot,
            held: now.boot,
            deadline,
        });
        if running {
            self.record(fx, vec![Entry::Stopping { attempt }], Then::Stop { attempt });
            return;
        }
        self.latch_consent(now, ticket, attempt, epoch, fx);
    }

    /// What this attempt stopped has not been started since; a copy of the question finds it stopping or given.
    fn stands_handed_over(&self, attempt: u64) -> bool {
        let stopped = |h: &Handover| matches!(h.stage, Stage::Stopped | Stage::StoppingToConsent { .. });
        self.pg.consented_attempt == Some(attempt)
            || self.handover.as_ref().is_some_and(|h| h.attempt == attempt && stopped(h))
    }

    fn latch_consent(&mut self, now: Now, ticket: Ticket, attempt: u64, epoch: Epoch, fx: &mut Vec<Effect>) {
        self.gate.held = false;
        if self.hold_over.is_some() {
            // They are let go of when it is known where to.
            self.handover = None;
            self.forget_waiting(PgOwner::Handover);
        } else {
            self.end_handover(fx);
        }
        self.pg.demoted = false;
        self.pg.following = false;
        self.pg.consented_at = now.boot;
        self.pg.consented_attempt = Some(attempt);
        self.fence_now = Some((epoch, format!("consented to {} taking epoch {epoch}", self.setup.peer)));
        self.note(
            now,
            fx,
            "consented",
            format!("fenced at epoch {epoch} by consent; {} may take over", self.setup.peer),
        );
        let entry = Entry::Consented { number: epoch, attempt, at: now.rfc3339() };
        let answer = Box::new(PeerAnswer::Consented { attempt, epoch });
        self.record(fx, vec![entry], Then::Answer { ticket, answer });
    }

    pub(super) fn on_put_back(&mut self, now: Now, ticket: Ticket, attempt: u64, fx: &mut Vec<Effect>) {
        if self.handover.as_ref().is_some_and(|h| h.attempt == attempt) {
            self.put_back(now, Some(ticket), fx);
        } else {
            fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::PutBack { attempt }) });
        }
    }

    fn put_back(&mut self, now: Now, ticket: Option<Ticket>, fx: &mut Vec<Effect>) {
        let Some(handover) = &mut self.handover else { return };
        if matches!(handover.stage, Stage::StoppingToConsent { .. } | Stage::PuttingBack { .. }) {
            return;
        }
        let stopped = matches!(handover.stage, Stage::Stopping { .. } | Stage::Stopped);
        let attempt = handover.attempt;
        if stopped {
            handover.stage = Stage::PuttingBack { ticket };
            handover.deadline = now.boot + STAGE_LIMIT * 3;
            self.handover_task(PgTask::Start, fx);
            return;
        }
        self.end_handover(fx);
        self.note(now, fx, "put_back", "the switchover was given up before PostgreSQL was touched".to_owned());
        if let Some(ticket) = ticket {
            fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::PutBack { attempt }) });
        }
    }

    /// The taker's own pulse says that it is not at it any more: its word to put everything back was lost.
    fn taker_gave_up(&self) -> bool {
        let (Some(handover), Some(peer)) = (&self.handover, &self.peer.state) else { return false };
        let running = |brief: &ProcedureBrief| brief.id == handover.attempt && brief.ended.is_none();
        // A pulse that was on its way when the attempt began says nothing of it.
        self.peer.heard.is_some_and(|at| at >= handover.since + PEER_LIMIT * 2)
            && !peer.procedure.as_ref().is_some_and(running)
    }

    /// Why nobody is to be held for this taker: it was not heard for `limit`, or its PostgreSQL is not there, so that
    /// commits hang and the drain would only cancel them.
    fn taker_is_gone(&self, now: Now, limit: Duration) -> Option<String> {
        if let Some(why) = self.taker_is_silent(now, limit) {
            return Some(why);
        }
        let peer = &self.setup.peer;
        let waits = self.pg.report.as_ref().is_some_and(|report| !report.sync_list.is_empty());
        (waits && self.durability.standby.lost).then(|| format!("the standby {peer} is lost: commits wait for it"))
    }

    fn taker_is_silent(&self, now: Now, limit: Duration) -> Option<String> {
        let handover = self.handover.as_ref()?;
        let silent = now.boot.since(self.peer.heard.map_or(handover.since, |at| at.max(handover.since)));
        (silent >= limit).then(|| format!("{} was not heard for {} s", self.setup.peer, silent.as_secs()))
    }

    /// How old the taker's last pulse may be while clients are held for it.
    fn fresh(&self) -> Duration {
        FRESH.max(self.setup.poll * 2 + PEER_LIMIT)
    }

    /// The taker fell silent, or gave up, before any consent: put everything back.
    pub(super) fn advance_handover(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(stage) = self.handover.as_ref().map(|h| h.stage) else { return };
        let gave_up = self.taker_gave_up();
        let gone = match stage {
            Stage::Checkpointing { .. } => self.taker_is_gone(now, ABSENCE_LIMIT.max(self.fresh())),
            Stage::Draining { .. } => self.taker_is_gone(now, self.fresh()),
            // Whether its standby keeps up it finds out itself, in seconds.
            Stage::Held | Stage::Marking { .. } | Stage::Stopped => self.taker_is_silent(now, self.fresh()),
            Stage::Stopping { .. } | Stage::StoppingToConsent { .. } | Stage::PuttingBack { .. } => None,
        };
        if let Some(why) = gone {
            if let Stage::Checkpointing { ticket, .. } | Stage::Draining { ticket, .. } | Stage::Marking { ticket } =
                stage
            {
                fx.push(refuse(ticket, &why));
            }
            self.note(now, fx, "taker_silent", format!("the switchover is given up: {why}"));
            self.put_back(now, None, fx);
            return;
        }
        let silent = self.silent_for(now);
        if let (Stage::Checkpointing { ticket, .. }, true) = (stage, silent >= CHECKPOINT_SILENCE) {
            fx.push(hangs(ticket, format!("it fell silent during the checkpoint, {} s ago", silent.as_secs())));
            self.put_back(now, None, fx);
            return;
        }
        let Some(handover) = &mut self.handover else { return };
        if now.boot < handover.deadline && !gave_up {
            return;
        }
        handover.deadline = now.boot + STAGE_LIMIT;
        match handover.stage {
            Stage::Checkpointing { .. }
            | Stage::Draining { .. }
            | Stage::Held
            | Stage::Marking { .. }
            | Stage::Stopped => {
                self.note(
                    now,
                    fx,
                    "taker_silent",
                    format!("{} fell silent or gave up during a switchover", self.setup.peer),
                );
                self.put_back(now, None, fx);
            }
            _ => {}
        }
    }
}
