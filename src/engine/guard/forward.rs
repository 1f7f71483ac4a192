//! Whether the other node is known to serve, so that clients of this one may be forwarded to its gate (R1, S13).
//!
//! What it is NOT: no proof. The other gate alone asks its lease; this only says where it is worth to knock, and ends
//! what must not go on: nothing is forwarded by a node that holds an epoch or is taking one. Who was forwarded before
//! that is waited for until the other node gives it back (`serve::forward`); its gate passes nothing by then.

use super::Guard;
use crate::base::ids::Epoch;
use crate::base::time::Instant;
use crate::engine::status::Role;
use crate::engine::turn::{Effect, Now};

/// What was last said of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Forwards {
    /// The other node serves at this epoch.
    pub(super) serves: Option<Epoch>,
    /// This node takes over from it: clients of that epoch come back until this moment at the latest.
    pub(super) returns: Option<(Epoch, Instant)>,
}

impl Guard {
    /// The epoch that this node's gate is open for, or would be.
    pub fn complete(&self) -> Epoch {
        self.durable.complete
    }

    /// Says what changed about that.
    pub(super) fn advance_forward(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let before = self.forwards;
        let serves = self.peer_serves(now);
        let returns = if serves.is_some() { None } else { self.come_back(now) };
        self.forwards = Forwards { serves, returns };
        let told = |forwards: Forwards| (forwards.serves, forwards.returns.map(|(epoch, _)| epoch));
        if told(before) != told(self.forwards) {
            let (serves, returns) = told(self.forwards);
            fx.push(Effect::Forward { serves, returns });
        }
    }

    /// Clients that the other node holds for the end of this takeover, and gives back then: for as long as it holds
    /// them at most. Of one that fell silent nobody comes back.
    fn come_back(&self, now: Now) -> Option<(Epoch, Instant)> {
        let begins = self.forwards.serves.map(|epoch| (epoch, now.boot + self.setup.hold_limit));
        let begins = begins.filter(|_| self.takes_over());
        let returns = begins.or(self.forwards.returns).filter(|(_, until)| now.boot < *until);
        returns.filter(|_| !self.shutting_down && self.peer_reachable(now))
    }

    fn takes_over(&self) -> bool {
        self.takeover.as_ref().is_some_and(|t| !t.is_only_planned())
    }

    fn peer_serves(&self, now: Now) -> Option<Epoch> {
        // A taker forwards until it refuses: before that a switchover may still be put back, and at its hold sessions
        // that cannot come back end over there, at their boundary.
        let own = self.keeps_clients() || self.durable.is_holder() || self.takes_over();
        if own || self.shutting_down || !self.peer_reachable(now) {
            return None;
        }
        let peer = self.peer.state.as_ref().filter(|peer| peer.role == Role::Active && peer.tunnels)?;
        // Not one that somebody has taken over from, this node among them.
        let newest = self.durable.seen.max(self.durable.won).max(peer.seen);
        let is_newest = peer.complete > Epoch::NONE && peer.complete >= newest;
        // It begins with an open gate; what began stays while PostgreSQL is away there.
        let begins = peer.gate_open || self.forwards.serves == Some(peer.complete);
        (is_newest && begins).then_some(peer.complete)
    }
}
