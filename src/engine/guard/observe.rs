//! What is particular to `dns.mode = "observe"`: a person edits the record, its answers carry an address and no epoch,
//! and there is no marker to say what the old primary acknowledged alone.
//!
//! What it is NOT: the steps of a takeover (`takeover`) or the evidence of an epoch (`proofs`), which both modes have.

use super::Guard;
use super::judge::Loss;
use crate::base::ids::{Epoch, Lsn, SystemId, TimelineId};
use crate::base::time::Instant;
use crate::engine::evidence::Verdict;
use crate::engine::report::PgReport;

impl Guard {
    /// Observe mode: proofs are unbroken while each was asked for before the last ran out.
    pub(super) fn extend_unbroken(&mut self, asked: Instant) {
        let broken = self.lease_deadline() < asked;
        if broken || self.witness.unbroken_since.is_none() {
            self.witness.unbroken_since = Some(asked);
        }
    }

    /// Observe mode: every authority that answers says so. One that said so and then fell silent still does.
    pub(super) fn elsewhere_everywhere(&self) -> bool {
        let mut any = false;
        for server in &self.witness.servers {
            match server.verdict {
                Some(Verdict::Elsewhere { .. }) => any = true,
                Some(_) if server.error.is_none() => return false,
                _ => {}
            }
        }
        any
    }

    /// What the address record has to be for this node, for a person who edits it.
    pub(super) fn wanted_record(&self) -> String {
        let addresses: Vec<String> = self.setup.addresses_of(&self.setup.me).iter().map(ToString::to_string).collect();
        format!("{} -> {}", self.setup.service, addresses.join(", "))
    }

    /// R4 without a marker: only the peer's word tells what it acknowledged; without it the loss is unknown.
    pub(super) fn judge_unmarked(&self, report: &PgReport, planned: bool, alive: bool) -> Loss {
        if planned {
            return Loss::None("the old primary hands over its last write: nothing is lost".to_owned());
        }
        if let Some((lsn, timeline, _)) = self.durable.confirmed.filter(|confirmed| is_behind(report, *confirmed)) {
            return Loss::Possible(format!(
                "the data here ({}, timeline {}) is behind {lsn} (timeline {timeline}), which was confirmed before",
                report.lsn, report.timeline
            ));
        }
        let peer = self.peer.state.as_ref().filter(|_| alive);
        if let Some((_, since)) = self.durable.peer_alone.as_ref().filter(|_| peer.is_none_or(|p| !p.in_sync)) {
            let name = &self.setup.peer;
            return Loss::Possible(format!(
                "{name} is alone since {since}: what it acknowledged after that is not here"
            ));
        }
        let Some(peer) = peer else {
            if self.peer_gave_its_word() && report.in_recovery {
                let name = &self.setup.peer;
                return Loss::None(format!(
                    "on_standby_loss = \"block\": {name} gave its word to acknowledge nothing without this node"
                ));
            }
            let last = self.peer.heard_wall.clone().unwrap_or_else(|| "never in this life of the daemon".to_owned());
            let name = &self.setup.peer;
            return Loss::Possible(format!(
                "without a marker at the witness the loss is unknown since the last contact with {name} ({last})"
            ));
        };
        let none_yet = self.durable.won == Epoch::NONE && peer.won == Epoch::NONE;
        if none_yet && !report.in_recovery {
            return Loss::None("the first epoch, and this PostgreSQL is the primary".to_owned());
        }
        if peer.unheard {
            // Whose number is higher says nothing here: neither knew of the other's.
            return Loss::Possible(format!(
                "{} served epoch {} without this node's word; what it acknowledged is not here",
                peer.node, peer.complete
            ));
        }
        if self.durable.won > peer.won {
            return Loss::None(format!(
                "this node had the last epoch ({}), as {} confirms",
                self.durable.won, peer.node
            ));
        }
        let same_data = peer.pg.as_ref().is_none_or(|pg| pg.system_id == report.system_id);
        if peer.pg.as_ref().is_some_and(|pg| pg.timeline > report.timeline) || !same_data {
            return Loss::Possible(format!("{} has data of another system or a later timeline", peer.node));
        }
        if peer.won > self.durable.won && peer.fence > peer.complete && peer.in_sync {
            return Loss::None(format!("{} is fenced, and all it acknowledged was confirmed here", peer.node));
        }
        Loss::Possible(format!("{} does not hand over and does not say that all it acknowledged is here", peer.node))
    }
}

/// Is the data here behind what a primary confirmed before?
pub(super) fn is_behind(report: &PgReport, (lsn, timeline, system_id): (Lsn, TimelineId, SystemId)) -> bool {
    system_id != report.system_id || timeline > report.timeline || (timeline == report.timeline && report.lsn < lsn)
}
