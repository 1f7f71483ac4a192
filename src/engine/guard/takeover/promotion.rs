//! The taking side once it has refused: the record, the wait, and PostgreSQL (R2).
//!
//! **Invariant:** nothing is promoted before the record was read back as ours and the old node surely serves no longer.

use super::Step;
use crate::base::ids::{Epoch, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::evidence;
use crate::engine::guard::durability::AloneFor;
use crate::engine::guard::record::{JobEnd, Purpose, sync_entry};
use crate::engine::guard::{Guard, PgOwner};
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Now, PgOutput, PgTask};

impl Guard {
    /// W after both: refused, and the record read back.
    pub(in crate::engine::guard) fn wait_until(&self) -> Instant {
        let Some(t) = &self.takeover else { return Instant::ZERO };
        let old = t.record.as_ref().and_then(|(_, seen)| evidence::marker_of(seen)).map(|m| m.lease);
        // A takeover of ours that stopped half-way may have been from a node with a longer lease (P11).
        let older = Duration::from_millis(self.durable.old_lease_ms);
        let wait = self.setup.timing.wait(old).max(self.wait()).max(self.setup.timing.wait(Some(older)));
        t.refused_at.max(self.witness.ignore_before) + wait
    }

    pub(in crate::engine::guard) fn begin_recording(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let Some((pair, seen)) = t.record.clone() else { return };
        if self.setup.mode == Mode::VipOnly {
            self.take_without_witness(now, fx);
            return;
        }
        if self.setup.mode == Mode::Observe {
            let wait = self.wait().as_secs_f64().ceil();
            let what = self.wanted_record();
            let text = if evidence::points_at(&seen) == Some(&self.setup.me) {
                format!("the address record shows {what} already; leave it so for at least {wait:.0} s")
            } else {
                format!("change the address record to {what} now, and leave it so for at least {wait:.0} s")
            };
            self.say(now, &format!("{text}; every authority is being watched"), fx);
            self.step(now, Step::Watching { all_since: None }, None, fx);
            return;
        }
        // R4: `sync=<old active>` is true, since nothing was acknowledged at the new epoch; `none` over a record whose
        // taker accepted loss and never completed, and in asynchronous mode.
        let old = evidence::marker_of(&seen);
        let over_loss = old.is_some_and(|m| m.loss && m.active != self.setup.me);
        let own = old.is_some_and(|m| m.active == self.setup.me);
        let sync = match old {
            _ if !self.setup.synchronous || over_loss => None,
            Some(m) if own => m.sync.clone(),
            Some(m) => Some(m.active.clone()),
            None => None,
        };
        let loss = t.loss || old.is_some_and(|m| m.loss && own);
        let handed_over = t.handed_over && t.consented;
        let purpose = Purpose::Takeover { epoch: t.epoch, judged: pair, sync, loss, handed_over };
        if self.start_job(now, purpose, fx) {
            self.step(now, Step::Recording, None, fx);
        } else if let Some(t) = &mut self.takeover {
            // Another update of ours is under way: try in a moment.
            t.step = Step::Recording;
            t.deadline = Some(now.boot + Duration::from_millis(200));
        }
    }

    pub(in crate::engine::guard) fn on_takeover_job(&mut self, now: Now, end: JobEnd, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        match end {
            JobEnd::Settled(marker) => {
                t.marker = Some(marker.clone());
                let old = t.record.as_ref().and_then(|(_, seen)| evidence::marker_of(seen)).map(|m| m.lease);
                let old_lease_ms = old.map_or(0, crate::base::time::millis);
                self.proofs.void();
                self.witness.forget(now.boot);
                let text = format!("the record moved: epoch {}, active {}", marker.epoch, marker.active);
                self.say(now, &text, fx);
                self.note(now, fx, "record_moved", text);
                self.step(now, Step::Winning, None, fx);
                let won = Entry::Won { epoch: marker.epoch, seq: marker.seq, loss: marker.loss, old_lease_ms };
                self.record_attempt(vec![won, sync_entry(&marker)], fx);
            }
            JobEnd::Changed(why) => {
                let text = format!("the record was not changed: {why}; run promote again to judge it anew");
                self.fail_takeover(now, 1, &text, fx);
            }
            JobEnd::NotWritten(why) => {
                let text = format!("the record was not changed: {why}; run promote again");
                self.fail_takeover(now, 1, &text, fx);
            }
            JobEnd::Unknown(why) => {
                let text =
                    format!("whether the record was changed is not known ({why}); run promote again to settle it");
                self.fail_takeover(now, 4, &text, fx);
            }
        }
    }

    /// Why this attempt must not go on: a later epoch was won meanwhile, or this node was fenced above it.
    pub(in crate::engine::guard) fn overtaken(&self) -> Option<String> {
        let epoch = self.takeover.as_ref()?.epoch;
        let seen = self.durable.seen.max(self.witness.seen_writing());
        let fence = self.fence_now.as_ref().map_or(Epoch::NONE, |(number, _)| *number).max(self.durable.fence);
        // Where no compare-and-swap decides, both may have asked for the same number: the one who has it keeps it, and
        // whatever the other consented to before, and lost or not, is void.
        let claimed = self.peer.state.as_ref().is_some_and(|peer| peer.won >= epoch);
        if seen > epoch || claimed {
            let taken = if claimed { epoch.max(seen) } else { seen };
            return Some(format!(
                "epoch {taken} was taken meanwhile; nothing is promoted here, `portcullis status` says who serves"
            ));
        }
        (fence > epoch).then(|| {
            format!("this node was fenced at {fence} meanwhile; nothing is promoted here, run promote again to lift it")
        })
    }

    pub(in crate::engine::guard) fn begin_naming(&mut self, now: Now, fx: &mut Vec<Effect>) {
        // Observe mode: an edit that was put back while W ran promotes nothing.
        let put_back = self.against().filter(|_| self.setup.mode == Mode::Observe);
        if let Some(why) = self.overtaken().or(put_back) {
            self.fail_takeover(now, 4, &why, fx);
            return;
        }
        let name = match self.setup.mode {
            Mode::Update => self.takeover.as_ref().and_then(|t| t.marker.as_ref()).and_then(|m| m.sync.clone()),
            Mode::Observe | Mode::VipOnly => None,
        };
        let name = name.or_else(|| self.blocks().then(|| self.peer_name()));
        if self.pg_task(PgOwner::Takeover, PgTask::SetSyncList(name), fx) {
            self.step(now, Step::Naming, None, fx);
        } else if let Some(t) = &mut self.takeover {
            t.step = Step::WaitingOut { until: now.boot, said: 0 };
            t.deadline = Some(now.boot + Duration::from_millis(200));
        }
    }

    pub(in crate::engine::guard) fn on_takeover_pg(
        &mut self,
        now: Now,
        result: Result<PgOutput, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(t) = &self.takeover else { return };
        match (t.step.clone(), result) {
            (Step::Naming, Ok(_)) => {
                if let Some(why) = self.overtaken() {
                    self.fail_takeover(now, 4, &why, fx);
                } else if self.pg.report.as_ref().is_some_and(|r| !r.in_recovery) {
                    self.after_promotion(now, fx);
                } else {
                    let above = self.timelines_used();
                    self.pg_task_next(PgOwner::Takeover, PgTask::Promote { above }, fx);
                    self.step(now, Step::Promoting, None, fx);
                }
            }
            (Step::Promoting, Ok(_)) => {
                // R6 is about what a start may show; who never goes alone could not open before a rejoin.
                self.pg.barrier_passed |= self.blocks();
                self.say(now, "PostgreSQL is a writable primary", fx);
                self.note(now, fx, "promoted", "PostgreSQL was promoted".to_owned());
                self.after_promotion(now, fx);
            }
            (_, Err(why)) => {
                let text = format!("PostgreSQL: {why}; run promote again to finish");
                self.fail_takeover(now, 4, &text, fx);
            }
            _ => {}
        }
    }

    /// The highest timeline that somebody else may have written, as far as anybody knows: two histories must not get
    /// one number (P14). The record of this takeover names the one that comes after it.
    fn timelines_used(&self) -> TimelineId {
        let recorded = self.takeover.as_ref().and_then(|t| t.marker.as_ref()).map_or(0, |m| m.timeline.0);
        let peer = self.peer.state.as_ref().and_then(|p| p.pg.as_ref()).map_or(0, |pg| pg.timeline.0);
        let confirmed = self.durable.confirmed.map_or(0, |(_, timeline, _)| timeline.0);
        TimelineId(recorded.saturating_sub(1).max(peer).max(confirmed))
    }

    /// The peer's PostgreSQL cannot stream from a primary that was promoted this instant: go alone before opening.
    pub(in crate::engine::guard) fn after_promotion(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let alone = self.takeover.as_ref().and_then(|t| t.marker.as_ref()).is_none_or(|m| m.sync.is_none());
        let streams = self.standby_row().is_some_and(|r| r.state == "streaming");
        if alone || streams || !self.setup.synchronous || self.blocks() {
            self.complete_takeover(now, fx);
            return;
        }
        self.step(now, Step::GoingAlone, None, fx);
        if !self.go_alone(now, AloneFor::Takeover, fx)
            && let Some(t) = &mut self.takeover
        {
            t.deadline = Some(now.boot + Duration::from_millis(200));
        }
    }

    pub(in crate::engine::guard) fn on_takeover_alone(
        &mut self,
        now: Now,
        result: Result<(), String>,
        fx: &mut Vec<Effect>,
    ) {
        match result {
            Ok(()) => {
                self.say(now, "recorded sync=none: serving alone until the other node is back", fx);
                self.complete_takeover(now, fx);
            }
            Err(why) => {
                let text = format!("cannot record sync=none ({why}); run promote again to finish");
                self.fail_takeover(now, 4, &text, fx);
            }
        }
    }

    pub(in crate::engine::guard) fn complete_takeover(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(epoch) = self.takeover.as_ref().map(|t| t.epoch) else { return };
        self.step(now, Step::Completing, None, fx);
        self.record_attempt(vec![Entry::Complete { epoch }], fx);
    }
}
