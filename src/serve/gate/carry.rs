//! Sessions held for a switchover, and carried over to the peer's gate.
//!
//! What it is NOT: it opens nothing. A carrying over is a cut like any other; a session of the generation that it ends
//! may be handed to a tunnel instead of being told so, where it is at rest and needs nothing of PostgreSQL here.
//!
//! **Invariant:** only sessions of a gate that was suspended until that moment are carried: since then nothing of them
//! has passed.

use super::{Gate, Pass};
use crate::base::ids::Epoch;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What is said of the present hold, and of the last carrying over.
#[derive(Debug, Default)]
pub(super) struct Carry {
    /// Counts pauses; sessions say with this number that they have come to rest in one.
    holds: AtomicU64,
    /// The present pause is for a switchover.
    is_asked: AtomicBool,
    /// The generation that was carried over, plus one; zero: none.
    generation: AtomicU64,
    epoch: AtomicU64,
}

impl Carry {
    /// A pause begins.
    pub(super) fn hold(&self) {
        self.holds.fetch_add(1, Ordering::SeqCst);
    }

    /// It is over.
    pub(super) fn forget(&self) {
        self.is_asked.store(false, Ordering::SeqCst);
    }
}

impl Gate {
    /// As [`Gate::pause`], for a switchover: each session finds out at its boundary what of it could go on elsewhere.
    pub fn pause_to_carry(&self) {
        self.carry.is_asked.store(true, Ordering::SeqCst);
        self.pause();
    }

    /// The present pause is for a switchover.
    pub(crate) fn is_to_carry(&self) -> bool {
        self.carry.is_asked.load(Ordering::SeqCst)
    }

    /// Which pause this is.
    pub(crate) fn hold(&self) -> u64 {
        self.carry.holds.load(Ordering::SeqCst)
    }

    /// Sessions that have not come to rest in the present pause.
    pub fn unsettled(&self) -> u64 {
        let hold = self.hold();
        let unsettled = self.slots().values().filter(|slot| slot.settled() != hold).count();
        u64::try_from(unsettled).unwrap_or(u64::MAX)
    }

    /// Ends a suspension: the peer's gate is open at `epoch`, and whoever waits here goes on there. All others end as
    /// with [`Gate::cut`]; a gate that is not suspended is cut.
    pub fn carry_over(&self, epoch: Epoch, reason: &str) {
        let before = self.serve_until.swap(0, Ordering::SeqCst);
        let waited = self.suspended_until.swap(0, Ordering::SeqCst);
        let now = self.now().as_nanos();
        if before == 0 && now < waited {
            self.carry.epoch.store(epoch.0, Ordering::SeqCst);
            self.carry.generation.store(self.generation.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
        }
        if before != 0 || waited != 0 {
            self.end_generation(reason, now >= before.max(waited));
        }
    }
}

impl Pass {
    /// The epoch at which its session may go on at the peer's gate; `None`: it ends, or is not over.
    pub(crate) fn carried(&self) -> Option<Epoch> {
        let carry = &self.gate.carry;
        let is_carried = self.is_over() && carry.generation.load(Ordering::SeqCst) == self.generation + 1;
        is_carried.then(|| Epoch(carry.epoch.load(Ordering::SeqCst)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::{Duration, Instant};

    fn clock() -> Instant {
        Instant::from_nanos(1_000)
    }

    #[test]
    fn only_what_was_suspended_is_carried_over() {
        let gate = Gate::new(clock);
        let until = clock() + Duration::from_secs(1);
        gate.extend(until);
        let pass = gate.admit().expect("open");
        gate.carry_over(Epoch(2), "moved");
        assert!(pass.is_over() && pass.carried().is_none(), "something of it may be in flight");
        gate.extend(until);
        let old = gate.admit().expect("open");
        gate.suspend(until, "away");
        gate.cut("because");
        assert_eq!(old.carried(), None, "a fence");
        gate.extend(until);
        let pass = gate.admit().expect("open");
        gate.suspend(until, "away");
        assert_eq!(pass.carried(), None, "not yet");
        gate.carry_over(Epoch(3), "moved");
        assert_eq!((pass.carried(), &*pass.reason()), (Some(Epoch(3)), "moved"));
        assert!(!pass.passes() && !gate.passes() && !gate.is_suspended() && gate.admit().is_none());
        assert_eq!(old.carried(), None, "of an earlier generation");
        gate.extend(until);
        assert!(!pass.passes(), "whatever opens here again");
        assert_eq!(gate.admit().expect("open").carried(), None);
    }
}
