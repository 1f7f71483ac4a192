//! The pledge: "I do not take over from epoch e before L from your question" (design.md section 3, Proof 2). What this
//! node gives; what it gets is evidence (`proofs`).
//!
//! **Invariant:** a pledge writes nothing and names the asker's start; a node that is active, takes over, or knows of a
//! later epoch gives none.

use super::Guard;
use crate::engine::evidence::{self, Seen};
use crate::engine::setup::Mode;
use crate::engine::turn::{Now, PeerState, PledgeAsk};

impl Guard {
    /// May this node promise not to take over from the asker's epoch? (design.md section 3, Proof 2.) Writes nothing.
    pub(super) fn pledge(&self, now: Now, asker: &PeerState, ask: &PledgeAsk) -> Result<(), String> {
        let no = |why: &str| Err(why.to_owned());
        if !self.durable.initialised {
            return no("this node has lost its state (or never had one): rejoin it");
        }
        if self.durable.is_holder() && self.fenced().is_none() {
            return no("this node is active itself");
        }
        if self.durable.served_unheard() && !self.durable.consented {
            return no("this node served an epoch that was taken without that node's word: promote there, or rejoin");
        }
        if self.takeover.as_ref().is_some_and(|t| !t.dry_run) {
            return no("a promote is under way here");
        }
        if self.durable.refused >= ask.epoch || self.durable.won >= ask.epoch {
            return no("a later epoch was taken or asked for here");
        }
        if ask.epoch > self.durable.seen {
            return no("this epoch is being recorded");
        }
        if asker.digest != self.setup.digest {
            return no("the configurations differ");
        }
        if let Some((start, at)) = self.peer.pledged_to
            && start != ask.start
            && now.boot < at + self.wait()
        {
            return no("another start of that node was pledged to less than W ago");
        }
        if let Some(server) = self.witness.servers.first()
            && let (Some(asked), Some(seen)) = (server.asked, &server.seen)
            && now.boot < asked + self.setup.timing.lease
            && asked >= self.witness.ignore_before
        {
            let here = match (self.setup.mode, seen) {
                (Mode::Update, Seen::Agreed { marker }) => {
                    marker.active == asker.node && marker.epoch == ask.epoch && marker.boot == ask.boot
                }
                (Mode::Observe | Mode::VipOnly, seen) => evidence::points_at(seen) == Some(&asker.node),
                (Mode::Update, _) => false,
            };
            if !here {
                return no("the witness does not name that node here");
            }
        }
        Ok(())
    }
}
