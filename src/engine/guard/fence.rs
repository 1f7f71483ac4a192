//! The fenced state (R5): cut first, then latch, then take PostgreSQL out of service. Cutting asks nobody.

use super::{Guard, PgOwner, RETRY_AFTER, Then};
use crate::base::config::FencePostgres;
use crate::base::ids::Epoch;
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::status::GateState;
use crate::engine::turn::{Effect, Now, PgOutput, PgTask};

/// How long after a consent PostgreSQL stays stopped for the winner before it is started as a standby of nobody.
const WINNER_LIMIT: Duration = Duration::from_secs(15);

impl Guard {
    /// Why this node is fenced, whether or not that is on disk yet.
    pub(super) fn fenced(&self) -> Option<String> {
        self.fence_now.as_ref().map(|(_, reason)| reason.clone()).or_else(|| self.durable.fenced.clone())
    }

    /// Cuts at once and latches `number`. A fence that cannot be written is still a fence: it is retried.
    pub(super) fn fence(&mut self, now: Now, number: Epoch, reason: String, fx: &mut Vec<Effect>) {
        if self.fence_now.as_ref().is_some_and(|(n, _)| *n >= number)
            || (self.durable.fenced.is_some() && self.durable.fence >= number)
        {
            return;
        }
        self.fence_now = Some((number, reason.clone()));
        self.proofs.void();
        self.unbind_vips(fx);
        self.shut(now, GateState::Fenced, reason.clone(), fx);
        // The service is gone from here, and an operator's pause of it with it.
        self.gate.held = false;
        self.end_handover(fx);
        self.pg.demoted = false;
        self.pg.demoted_to_start = false;
        self.pg.following = false;
        self.pg.retry_at = now.boot;
        self.pg.failed_as = None;
        self.note(now, fx, "fenced", format!("fenced at {number}: {reason}"));
        let entry = Entry::Fenced { number, reason, at: now.rfc3339() };
        self.record(fx, vec![entry], Then::Fenced { tries: 0 });
    }

    /// The gate is not paused any more (it may well be shut).
    pub(super) fn release_clients(&mut self, fx: &mut Vec<Effect>) {
        if self.gate.paused {
            self.gate.paused = false;
            fx.push(Effect::LetClientsGo);
        }
    }

    /// The record has named the peer for W under our own epoch: a person wants this node out.
    pub(super) fn fence_when_due(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.elsewhere_due().is_some_and(|due| due <= now.boot)
            && let Some((_, node)) = self.elsewhere_since()
        {
            let reason = format!("the record has named {node} for {:.1} s", self.wait().as_secs_f64());
            self.fence(now, self.durable.complete.next(), reason, fx);
        }
        if self.fence_retry.as_ref().is_some_and(|(at, ..)| *at <= now.boot)
            && let Some((_, entries, tries)) = self.fence_retry.take()
        {
            self.record(fx, entries, Then::Fenced { tries });
        }
    }

    /// Takes PostgreSQL out of service while fenced; follows the winner after a consent.
    pub(super) fn advance_fence(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.durable.maintenance {
            return;
        }
        // A taker that died half-way is as much out of service, but nobody may start its PostgreSQL writable either.
        // So is one whose update landed when it was not there any more to write down that it had won.
        let landed = self.witness.marker.as_ref();
        let landed = landed.is_some_and(|m| m.active == self.setup.me && m.epoch > self.durable.won);
        let half_way = self.durable.won > self.durable.complete || landed;
        if (self.fenced().is_none() && !half_way) || now.boot < self.pg.retry_at {
            return;
        }
        if self.pg.task.is_some() && (self.fenced().is_none() || !self.gives_way()) {
            return;
        }
        let consenting = self.writing.iter().any(|(_, e, _)| e.iter().any(|e| matches!(e, Entry::Consented { .. })));
        if consenting || self.takeover.is_some() || self.rejoin.is_some() || self.handover.is_some() {
            return;
        }
        let down = !self.pg.up && self.pg.error.is_some() && self.pg_present && !self.pg.demoted;
        let demote = self.setup.fence_postgres == FencePostgres::Demote;
        if self.durable.consented && self.fence_now.is_none() {
            // A winner that does not come must not leave this node without a PostgreSQL that `unfence` could use.
            if down && demote && now.boot >= self.pg.consented_at + WINNER_LIMIT {
                self.pg_task(PgOwner::Demotion, PgTask::Demote { follow_peer: false }, fx);
            } else {
                self.follow_the_winner(now, fx);
            }
            return;
        }
        if self.fenced().is_none() {
            if down && demote {
                self.pg_task(PgOwner::Demotion, PgTask::Demote { follow_peer: false }, fx);
            }
            return;
        }
        let primary = self.pg.up && self.pg.report.as_ref().is_some_and(|r| !r.in_recovery);
        let task = match self.setup.fence_postgres {
            FencePostgres::Keep => return,
            FencePostgres::Stop if primary => PgTask::Stop,
            FencePostgres::Stop => return,
            FencePostgres::Demote if primary || down => PgTask::Demote { follow_peer: false },
            FencePostgres::Demote => return,
        };
        self.clear_the_way(now, "the fence", fx);
        self.pg_task(PgOwner::Demotion, task, fx);
    }

    /// What only looks, prepares, arms or writes a checkpoint hangs with a PostgreSQL that hangs, for minutes: what
    /// takes it out of service does not wait for it. Only what stops or starts it for somebody is waited for.
    fn gives_way(&self) -> bool {
        self.pg.task.is_some_and(|(_, owner)| !self.pg.restarts || owner == PgOwner::Housekeeping)
    }

    /// Gives up whatever task is under way and gives way, for `whom`.
    pub(super) fn clear_the_way(&mut self, now: Now, whom: &str, fx: &mut Vec<Effect>) {
        while let Some((op, _)) = self.pg.task.filter(|_| self.gives_way()) {
            self.on_pg_done(now, op, Err(format!("given up for {whom}")), fx);
        }
    }

    /// After a consent: once the winner's epoch is complete, come back as its standby.
    fn follow_the_winner(&mut self, _now: Now, fx: &mut Vec<Effect>) {
        let Some(peer) = &self.peer.state else { return };
        let won = peer.complete >= self.durable.fence && peer.pg.as_ref().is_some_and(|pg| !pg.in_recovery);
        if !won {
            return;
        }
        // A promotion that ended only now: it was told whom to follow, and follows nobody.
        self.pg.following &= !(self.pg.up && self.pg.report.as_ref().is_some_and(|r| !r.in_recovery));
        if self.pg.following {
            let streams = self.pg.up && self.pg.report.as_ref().is_some_and(|r| r.in_recovery && r.streaming);
            let writing = self.writing.iter().any(|(_, e, _)| e.contains(&Entry::FenceEnded));
            if streams && !writing {
                self.record(fx, vec![Entry::FenceEnded], Then::Nothing);
            }
        } else {
            self.pg_task(PgOwner::Follow, PgTask::Demote { follow_peer: true }, fx);
        }
    }

    pub(super) fn on_demoted(
        &mut self,
        now: Now,
        owner: PgOwner,
        result: Result<PgOutput, String>,
        fx: &mut Vec<Effect>,
    ) {
        match result {
            Ok(_) => {
                self.pg.demoted = true;
                self.pg.failed_as = None;
                self.pg.following = owner == PgOwner::Follow;
                self.pg.adopted = self.pg.adopted || owner == PgOwner::Follow;
                let text = match (owner, self.setup.fence_postgres) {
                    (PgOwner::Follow, _) => format!("PostgreSQL follows {} as its standby", self.setup.peer),
                    (_, FencePostgres::Stop) => "PostgreSQL was stopped".to_owned(),
                    _ => "PostgreSQL was demoted: read-only, following nobody until rejoin".to_owned(),
                };
                self.note(now, fx, "postgres_demoted", text);
            }
            Err(why) => {
                self.pg.retry_at = now.boot + RETRY_AFTER;
                let seconds = Duration::as_secs(&RETRY_AFTER);
                self.note_failure(now, "demotion_failed", format!("{why}; trying again every {seconds} s"), fx);
            }
        }
    }

    /// One event for a failure that goes on, however often it is tried again.
    pub(super) fn note_failure(&mut self, now: Now, kind: &'static str, text: String, fx: &mut Vec<Effect>) {
        if self.pg.failed_as.as_ref() != Some(&text) {
            self.pg.failed_as = Some(text.clone());
            self.note(now, fx, kind, text);
        }
    }
}
