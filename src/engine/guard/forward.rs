//! Whether the other node is known to serve, so that clients of this one may be forwarded to its gate (R1, S13).
//!
//! What it is NOT: no proof. The other gate alone asks its lease; this only says where it is worth to knock, and ends
//! what must not go on: nothing is forwarded by a node that holds an epoch or is taking one.

use super::Guard;
use crate::base::ids::Epoch;
use crate::engine::status::Role;
use crate::engine::turn::{Effect, Now};

impl Guard {
    /// The epoch that this node's gate is open for, or would be.
    pub fn complete(&self) -> Epoch {
        self.durable.complete
    }

    /// Says what changed about that.
    pub(super) fn advance_forward(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let epoch = self.peer_serves(now);
        if epoch != self.forwards {
            self.forwards = epoch;
            fx.push(Effect::Forward { epoch });
        }
    }

    fn peer_serves(&self, now: Now) -> Option<Epoch> {
        // A taker forwards until it refuses: before that a switchover may still be put back, and at its hold sessions
        // that came through here end over there, at their boundary.
        let takes = self.takeover.as_ref().is_some_and(|t| !t.is_only_planned());
        let own = self.keeps_clients() || self.durable.is_holder() || takes;
        if own || self.shutting_down || !self.peer_reachable(now) {
            return None;
        }
        let peer = self.peer.state.as_ref().filter(|peer| peer.role == Role::Active && peer.tunnels)?;
        // Not one that somebody has taken over from, this node among them.
        let newest = self.durable.seen.max(self.durable.won).max(peer.seen);
        let is_newest = peer.complete > Epoch::NONE && peer.complete >= newest;
        // It begins with an open gate; what began stays while PostgreSQL is away there.
        let begins = peer.gate_open || self.forwards == Some(peer.complete);
        (is_newest && begins).then_some(peer.complete)
    }
}
