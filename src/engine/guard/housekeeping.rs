//! What the guard keeps in order by itself, without a person and without a procedure: the first marker of a fresh pair,
//! a new boot in the marker, the PostgreSQL that was refused at boot, role and slot, a standby made by hand.
//!
//! **Invariant:** nothing here opens a gate, and nothing here runs beside a procedure.

use super::durability::Phase;
use super::record::Purpose;
use super::{Guard, PgOwner, RETRY_AFTER, Then};
use crate::base::ids::Epoch;
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::evidence::Seen;
use crate::engine::setup::Mode;
use crate::engine::status::Role;
use crate::engine::turn::{Effect, Now, PgOutput, PgTask};

/// How often a standby that does not stream is told to look for its primary.
const NUDGE_EVERY: Duration = Duration::from_secs(1);
/// How often, at most, the position our primary confirmed is written down.
const CONFIRMED_EVERY: Duration = Duration::from_secs(10);

impl Guard {
    /// What the guard keeps in order by itself: the first marker, a new boot, role and slot, a standby made by hand.
    pub(super) fn advance_housekeeping(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.takeover.is_some() || self.handover.is_some() || self.rejoin.is_some() {
            return;
        }
        self.keep_confirmed(now, fx);
        if self.setup.mode == Mode::Update && self.job.is_none() {
            if self.may_write_first_marker(now) {
                self.start_job(now, Purpose::First, fx);
            } else if self.has_new_boot() {
                self.begin_boot(fx);
            }
        }
        self.end_boot_wait(now, fx);
        self.end_stop(fx);
        self.start_what_was_refused(now, fx);
        if self.durable.maintenance {
            return;
        }
        if self.pg.task.is_some() || now.boot < self.pg.retry_at || !self.pg.up {
            return;
        }
        let Some(report) = &self.pg.report else { return };
        let idle = matches!(self.durability.phase, Phase::Idle);
        if self.gate.open && idle && self.pg.prepared_start != Some(report.start) {
            self.pg.prepared_start = Some(report.start);
            self.pg_task(PgOwner::Housekeeping, PgTask::PrepareStandby, fx);
        } else if report.in_recovery
            && !self.pg.adopted
            && self.fenced().is_none()
            && self.peer.state.as_ref().is_some_and(|p| p.gate_open && p.prepared && p.complete >= self.durable.seen)
        {
            self.pg.adopted = true;
            self.pg_task(PgOwner::Housekeeping, PgTask::Adopt, fx);
        } else if report.in_recovery
            && !report.streaming
            && self.pg.adopted
            && self.peer_reachable(now)
            && self.peer.state.as_ref().and_then(|p| p.pg.as_ref()).is_some_and(|pg| !pg.in_recovery)
        {
            self.pg.retry_at = now.boot + NUDGE_EVERY;
            self.pg_task(PgOwner::Housekeeping, PgTask::Nudge, fx);
        } else if report.in_recovery && report.streaming && self.slots_may_be_left(now) {
            self.pg_task(PgOwner::Housekeeping, PgTask::DropIdleSlots, fx);
        }
    }

    pub(super) fn on_housekeeping_pg(&mut self, now: Now, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        match result {
            Ok(_) => self.pg.failed_as = None,
            Err(why) => {
                self.pg.retry_at = now.boot + RETRY_AFTER;
                self.pg.prepared_start = None;
                self.pg.adopted = false;
                self.note_failure(now, "postgres_setup_failed", why, fx);
            }
        }
    }

    /// Record before you act (S6): a start after this one, within W of the update, has to wait as well.
    fn begin_boot(&mut self, fx: &mut Vec<Effect>) {
        if self.writing.iter().any(|(.., then)| *then == Then::Boot) {
            return;
        }
        let boot = self.setup.boot.clone();
        self.record(fx, vec![Entry::BootPending { boot }], Then::Boot);
    }

    pub(super) fn on_boot_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.has_new_boot() && self.takeover.is_none() {
            self.start_job(now, Purpose::Boot, fx);
        }
    }

    fn end_boot_wait(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let pending = self.durable.boot_pending.is_some() && self.job.is_none() && !self.has_new_boot();
        let over = now.boot >= self.open_from() && self.witness.confirmed;
        if pending && over && !self.writing.iter().any(|(_, e, _)| e.contains(&Entry::BootWaited)) {
            self.record(fx, vec![Entry::BootWaited], Then::Nothing);
        }
    }

    /// What a switchover stopped runs again: nobody has to start it any more.
    fn end_stop(&mut self, fx: &mut Vec<Effect>) {
        let writing = self.writing.iter().any(|(_, e, _)| e.contains(&Entry::StopOver));
        if self.durable.stopping.is_some() && self.pg.up && !writing {
            self.record(fx, vec![Entry::StopOver], Then::Nothing);
        }
    }

    /// R6: a PostgreSQL that `may-start-primary` refused is started once the proof has come that it may be the primary;
    /// so is one that was stopped for a switchover which came to nothing.
    fn start_what_was_refused(&mut self, now: Now, fx: &mut Vec<Effect>) {
        // Not seen yet is not stopped.
        let stopped = self.durable.stopping.is_some() && self.pg.error.is_some();
        let wanted = self.pg.start_refused || stopped;
        if !wanted || self.pg.up || self.pg.task.is_some() || now.boot < self.pg.retry_at {
            return;
        }
        let proven = self.role() == Role::Active && self.not_confirmed(now).is_none();
        // A fresh pair: nobody has ever held an epoch, and the other PostgreSQL is no primary.
        let fresh = self.durable.is_virgin()
            && self.durable.initialised
            && self.peer_reachable(now)
            && self.peer.state.as_ref().is_some_and(|p| {
                let primary = p.pg.as_ref().is_some_and(|pg| !pg.in_recovery);
                p.seen == Epoch::NONE && p.won == Epoch::NONE && !primary
            });
        if self.durable.maintenance || !(proven || fresh) {
            return;
        }
        self.pg.start_refused = false;
        let which = if stopped { "that a switchover had stopped" } else { "that was refused" };
        self.note(now, fx, "postgres_start", format!("proof has come: starting the PostgreSQL {which}"));
        self.pg_task(PgOwner::Housekeeping, PgTask::Start, fx);
    }

    fn may_write_first_marker(&self, now: Now) -> bool {
        let fresh = self.durable.is_virgin() && self.durable.initialised;
        let primary = self.pg.up && self.pg.report.as_ref().is_some_and(|r| !r.in_recovery && !r.read_only);
        let shows_me = matches!(
            self.witness.servers.first().and_then(|s| s.seen.as_ref()),
            Some(Seen::Unmarked { address_of }) if address_of.as_ref().is_none_or(|name| *name == self.setup.me)
        );
        let peer_agrees = self.peer_reachable(now)
            && self.peer.state.as_ref().is_some_and(|p| {
                let standby = p.pg.as_ref().is_some_and(|pg| {
                    pg.in_recovery && self.pg.report.as_ref().is_some_and(|r| r.system_id == pg.system_id)
                });
                p.seen == Epoch::NONE && p.won == Epoch::NONE && (standby || !p.pg_present)
            });
        fresh && primary && shows_me && peer_agrees && self.fenced().is_none()
    }

    fn has_new_boot(&self) -> bool {
        let seen = self.witness.servers.first().and_then(|s| s.seen.as_ref());
        self.durable.is_holder()
            && !self.witness.confirmed
            && self.fenced().is_none()
            && matches!(seen, Some(Seen::Agreed { marker }) if marker.active == self.setup.me
                && marker.epoch == self.durable.won && marker.boot != self.setup.boot)
    }

    /// Both remember what the standby confirmed, now and then: data behind that is not promotable, and a primary behind
    /// it does not go alone (P15).
    fn keep_confirmed(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if now.boot < self.durability.confirmed_at + CONFIRMED_EVERY {
            return;
        }
        let Some(report) = self.pg.report.as_ref().filter(|_| self.pg.up) else { return };
        let confirmed = if !report.in_recovery {
            self.standby_row().filter(|_| self.in_sync() && self.pg.barrier_passed).and_then(|row| row.flush_lsn)
        } else if report.streaming {
            self.peer.state.as_ref().and_then(|p| p.pg.as_ref()).and_then(|pg| pg.confirmed)
        } else {
            None
        };
        let Some(lsn) = confirmed else { return };
        let entry = (lsn, report.timeline, report.system_id);
        if self.durable.confirmed != Some(entry) {
            self.durability.confirmed_at = now.boot;
            let (lsn, timeline, system_id) = entry;
            self.record(fx, vec![Entry::Confirmed { lsn, timeline, system_id }], Then::Nothing);
        }
    }
}
