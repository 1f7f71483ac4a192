//! Clients held over a switchover: from the stop of PostgreSQL here until they go on at the peer's gate, or here again.
//!
//! ```text
//!  Stopping, Stopped        nothing passes; clients without a backend wait; the lease still has to stand
//!     | consent             nothing passes; they wait on under the fence of that very consent
//!     v
//!  the peer's gate is open at the new epoch -> CarryOver: each goes on through a tunnel, the rest ends (57P01)
//! ```
//!
//! What it is NOT: a way around R1 or R5. The gate here is suspended throughout and passes nothing in either direction;
//! what a tunnel carries rests on the peer's gate alone. A suspended gate opens again only by what `standing` finds.
//!
//! **Invariants:** clients are held over only a stop that a switchover asked for, where the service's address moves and
//! the way to this host stays (no VIP, no kernel gate), and for `pool.query_wait` in all. Anything else that happens (a
//! higher epoch, another fence, a lapse before the consent, a procedure begun here, the end of the daemon) cuts.

use super::Guard;
use crate::base::ids::Epoch;
use crate::base::time::Instant;
use crate::engine::status::GateState;
use crate::engine::turn::{Effect, Now};

/// Clients that wait for the end of a switchover.
#[derive(Debug, Clone, Hash)]
pub(super) struct HoldOver {
    attempt: u64,
    /// Since when they are held.
    since: Instant,
    /// That of the consent, once it was asked for.
    epoch: Option<Epoch>,
}

impl Guard {
    /// Sessions can go on through this host when the service has moved.
    pub(super) fn can_carry(&self) -> bool {
        self.vips.is_empty() && !self.setup.kernel_gate && self.setup.peer != self.setup.me
    }

    /// PostgreSQL is about to be stopped for a switchover: nothing passes from here on. Clients wait, as since `since`.
    pub(super) fn begin_hold_over(&mut self, now: Now, attempt: u64, since: Instant, fx: &mut Vec<Effect>) {
        let reason = format!("switchover to {}", self.setup.peer);
        if self.gate.open && self.can_carry() {
            self.hold_over = Some(HoldOver { attempt, since, epoch: None });
            if let Some(until) = self.holds_over(now) {
                self.suspend(now, since, until, reason, fx);
                // They belong beside the active node's gate; a gate that opens here again starts them.
                self.stop_units(fx);
                return;
            }
        }
        self.shut(now, GateState::Shut, reason, fx);
        self.unbind_vips(fx);
    }

    /// A consent is asked for: from now on they wait under its fence. `false`: nobody is held for it.
    pub(super) fn hold_under_consent(&mut self, attempt: u64, epoch: Epoch) -> bool {
        let suspended = self.gate.suspended.is_some();
        match self.hold_over.as_mut().filter(|hold| hold.attempt == attempt && suspended) {
            Some(hold) => {
                hold.epoch = Some(epoch);
                true
            }
            None => false,
        }
    }

    /// Until when clients are held over; `None`: they are not, or not any more.
    pub(super) fn holds_over(&self, now: Now) -> Option<Instant> {
        let hold = self.hold_over.as_ref().filter(|_| self.keeps_clients())?;
        let end = hold.since + self.setup.hold_limit;
        // A dry run begins nothing.
        let acts =
            self.takeover.as_ref().is_some_and(|t| !t.dry_run) || self.rejoin.as_ref().is_some_and(|r| !r.dry_run);
        if now.boot >= end || self.shutting_down || acts {
            return None;
        }
        let stopping = self.handover.as_ref().filter(|h| h.attempt == hold.attempt && h.stopping());
        let Some(epoch) = hold.epoch else {
            stopping?;
            return self.lease_stands(now).ok().map(|until| until.min(end));
        };
        let fence = self.fence_now.as_ref().map_or(Epoch::NONE, |(number, _)| *number).max(self.durable.fence);
        let given = fence == epoch && self.fenced().is_some() && self.handover.is_none();
        let being_given = fence < epoch && stopping.is_some_and(super::handover::Handover::consenting);
        // Whoever else took an epoch meanwhile, it is not the node that they wait for.
        let highest = self.durable.seen.max(self.durable.won).max(self.witness.seen_writing());
        ((given || being_given) && highest <= epoch).then_some(end)
    }

    /// What is told to those who wait.
    pub(super) fn hold_reason(&self) -> String {
        format!("switchover to {}", self.setup.peer)
    }

    /// The peer's gate is open at the epoch that was consented to: those who wait go on there.
    pub(super) fn advance_hold_over(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some((Some(epoch), since)) = self.hold_over.as_ref().map(|hold| (hold.epoch, hold.since)) else { return };
        let written = self.durable.consented && self.durable.fence == epoch;
        let state = self.peer.state.as_ref();
        let open = state.is_some_and(|p| p.gate_open && p.tunnels && p.complete == epoch && p.won == epoch);
        if !written || !open || self.holds_over(now).is_none() {
            return;
        }
        let reason = self.told(&self.hold_reason());
        self.hold_over = None;
        self.gate.suspended = None;
        self.gate.until = Instant::ZERO;
        self.gate.state = GateState::Fenced;
        self.gate.reason = self.fenced().unwrap_or_default();
        self.counters.gate_cuts += 1;
        *self.counters.cuts.entry("switchover".to_owned()).or_default() += 1;
        fx.retain(|effect| !matches!(effect, Effect::Suspend { .. }));
        fx.insert(0, Effect::CarryOver { epoch, reason });
        let text = format!(
            "{} is open at epoch {epoch}: {} sessions that waited for {} ms go on there",
            self.setup.peer,
            self.gate.sessions,
            crate::base::time::millis(now.boot.since(since))
        );
        self.note(now, fx, "sessions_carried_over", text);
        if !self.gate.held {
            self.release_clients(fx);
        }
    }

    /// The wait is over without a carrying over, or the gate opened again.
    pub(super) fn end_hold_over(&mut self, fx: &mut Vec<Effect>) {
        if self.hold_over.take().is_some() && self.handover.is_none() && !self.gate.held {
            self.release_clients(fx);
        }
    }
}
