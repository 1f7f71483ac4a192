//! What a failover now would cost, as a voter knows it: the facts for [`outlook`](crate::engine::outlook::outlook).
//!
//! What it is NOT: it decides nothing; a takeover judges the record anew.

use super::super::Guard;
use super::super::judge::Loss;
use crate::base::ids::Epoch;
use crate::engine::evidence::{self, Seen};
use crate::engine::outlook::{Facts, Outlook, Serving, Standing, outlook};
use crate::engine::setup::Mode;
use crate::engine::status::{ReplicationStatus, Role};
use crate::engine::turn::Now;

impl Guard {
    /// As of `now`; `replication` is what the same snapshot says of it.
    pub(in crate::engine::guard) fn outlook(&self, now: Now, replication: &ReplicationStatus) -> Outlook {
        let (me, peer) = (&self.setup.me, &self.setup.peer);
        let update = self.setup.mode == Mode::Update;
        let serves = self.durable.is_holder() && self.fenced().is_none();
        let (active, taker) = if serves { (me, peer) } else { (peer, me) };
        let moving = match (&self.takeover, &self.rejoin, &self.handover) {
            (Some(takeover), ..) => Some(takeover.brief().kind),
            (None, None, Some(_)) => Some("switchover".to_owned()),
            _ => None,
        };
        let standing = match moving {
            _ if me == peer => Standing::NoOtherNode,
            Some(kind) => Standing::Moving(kind),
            None if serves => self.served_here(replication),
            None => self.taken_over_here(now, replication),
        };
        let provable = update || if serves { self.gives_its_word() } else { self.peer_gave_its_word() };
        let told = self.peer.state.as_ref().is_some_and(|peer| peer.role == Role::Active);
        let serving = match (serves, self.peer_reachable(now), told) {
            (true, ..) | (false, true, true) => Serving::Heard,
            (false, true, false) => Serving::Nobody,
            (false, false, _) => Serving::Silent,
        };
        outlook(&Facts { active: active.clone(), taker: taker.clone(), serving, provable, standing })
    }

    fn served_here(&self, replication: &ReplicationStatus) -> Standing {
        match (&replication.alone_since, &replication.waiting_since) {
            _ if !self.setup.synchronous => Standing::Asynchronous,
            _ if replication.in_sync && self.role() == Role::Active => Standing::InSync,
            (Some(since), _) => Standing::Alone { since: since.clone() },
            (None, Some(since)) => Standing::CommitsWait { since: since.clone() },
            (None, None) => Standing::NotInSync,
        }
    }

    /// What this node would judge, as [`Guard::judge_loss`] does when it is told to take over.
    fn taken_over_here(&self, now: Now, replication: &ReplicationStatus) -> Standing {
        let reachable = self.peer_reachable(now);
        let known = self.peer.state.as_ref();
        let serves = reachable && known.is_some_and(|peer| peer.role == Role::Active);
        if serves && replication.in_sync && self.fenced().is_none() {
            return Standing::InSync;
        }
        // The record, where there is one; with a VIP alone there is nothing to be asked.
        let server = match self.setup.mode {
            Mode::Update => self.witness.servers.first(),
            Mode::Observe => self.witness.servers.iter().filter(|s| s.seen.is_some()).max_by_key(|s| s.asked),
            Mode::VipOnly => None,
        };
        let seen = server.filter(|server| server.error.is_none()).and_then(|server| server.seen.clone());
        let none = || Seen::Nothing { why: "without DNS there is no record".to_owned(), stamp: None };
        let Some(seen) = seen.or_else(|| (self.setup.mode == Mode::VipOnly).then(none)) else {
            return Standing::NoRecord;
        };
        let marked = evidence::marker_of(&seen).map_or(Epoch::NONE, |marker| marker.epoch);
        let told = known.map_or(Epoch::NONE, |peer| peer.won.max(peer.seen));
        let highest = self.durable.seen.max(self.durable.won).max(marked).max(told);
        let stale = (marked < highest && self.durable.complete < highest).then_some(highest);
        // One that serves and dies takes its word with it.
        match self.judge_loss(&seen, false, stale, reachable && !serves) {
            // While it lives its own word counts, and that is that commits do not wait for this node.
            Loss::None(_) if serves => Standing::NotInSync,
            Loss::None(why) => Standing::TakerLosesNothing(why),
            Loss::Possible(why) => Standing::TakerMayLose(why),
            Loss::NotPromotable(why) => Standing::CannotTakeOver(why),
        }
    }
}
