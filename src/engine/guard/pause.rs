//! A pause of the whole machine by its hypervisor stops every clock it has, so that a lease timed here is still good
//! when it wakes. The witness's signed time betrays it at the first answer after the pause (S17).
//!
//! What it is NOT: a promise for the time before that answer: up to one poll of stale reads, and commits only under
//! `sync=<peer>` (design.md section 3, "What the rules do not cover").

use super::Guard;
use super::proofs::Asked;
use crate::base::time::Duration;
use crate::engine::turn::{Effect, Now};

/// TSIG counts whole seconds, and a server's clock is slewed now and then: a difference up to this proves nothing.
const SIGNED_TOLERANCE: Duration = Duration::from_secs(2);

impl Guard {
    /// A pause of the whole machine is invisible to its own clocks. The server's signed time betrays it: if more time
    /// passed there than here can have passed between its last answer and this one, everything in hand is void and the
    /// gate lapses until asked anew. A step of the server's clock forwards costs that one lapse, one backwards nothing.
    pub(super) fn compare_clocks(&mut self, now: Now, asked: Asked, signed: Option<u64>, fx: &mut Vec<Effect>) {
        let drift = self.setup.timing.max_drift;
        let (Some(signed), Some(server)) = (signed, self.witness.servers.get_mut(asked.server)) else { return };
        let before = server.signed.replace((signed, asked.at));
        let Some((before, since)) = before.filter(|(_, since)| *since <= asked.at) else {
            // An older question answered late says nothing: the newer one stays.
            server.signed = before.or(server.signed);
            return;
        };
        let there = Duration::from_secs(signed.saturating_sub(before));
        let here = now.boot.since(since);
        if there <= here.mul_f64(1.0 + drift) + SIGNED_TOLERANCE {
            return;
        }
        self.counters.pauses_seen += 1;
        self.void_everything(now);
        let text = format!(
            "{} s passed at the witness and {:.1} s here: this machine was paused (or the witness's clock stepped); \
             the proofs in hand are void",
            there.as_secs(),
            here.as_secs_f64()
        );
        self.note(now, fx, "pause_seen", text);
    }

    /// Nothing asked for before now proves anything any more; everybody is asked anew at once.
    fn void_everything(&mut self, now: Now) {
        self.proofs.void();
        self.proofs_from = now.boot;
        self.witness.ignore_before = self.witness.ignore_before.max(now.boot);
        self.witness.unbroken_since = None;
        self.poll_at = now.boot;
    }
}
