//! `on_standby_loss = "block"` where no marker says what was acknowledged: a word that the active node gives and its
//! peer writes down, so that a promote without the active node may still say "nothing is lost" (R4).
//!
//! What one's own configuration file says proves nothing of the other node: it may have been changed there, or never
//! have been in force.
//!
//! **Invariants:** the word is given only in sync, and is on the giver's disk first. From then on, whatever its
//! configuration says and whatever epochs it takes itself, its list is emptied only after the peer has durably
//! acknowledged that, or by the peer's own rejoin; or once the peer knows of a later epoch, for which the word was not
//! given. The peer counts it only for the last epoch it knows of, and takes it only from an answer to a question that
//! is younger than its last acknowledgement.

use super::{Guard, Then};
use crate::base::ids::Epoch;
use crate::base::time::Instant;
use crate::engine::durable::Entry;
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, PeerState};

impl Guard {
    /// Its word that it does not go alone binds this node, also after its configuration was changed.
    pub(super) fn is_bound(&self) -> bool {
        let giving = |(_, entries, _): &(u64, Vec<Entry>, Then)| {
            entries.iter().any(|entry| matches!(entry, Entry::Blocks { epoch } if *epoch > Epoch::NONE))
        };
        self.durable.blocks > Epoch::NONE || self.writing.iter().any(giving)
    }

    /// Nothing is acknowledged here without the peer: the list names it whatever the record says.
    pub(super) fn blocks(&self) -> bool {
        self.setup.block || self.is_bound()
    }

    /// Written down here, in force, and for the epoch that is served.
    pub(super) fn gives_its_word(&self) -> bool {
        let serves = self.durable.is_holder() && self.fenced().is_none();
        self.setup.block && serves && self.durable.blocks == self.durable.complete
    }

    /// In sync under "block": everything is on the peer, and stays so.
    pub(super) fn advance_word(&mut self, fx: &mut Vec<Effect>) {
        let unmarked = self.setup.mode != Mode::Update;
        let serves = self.durable.is_holder() && self.fenced().is_none();
        let epoch = self.durable.complete;
        if !self.setup.block || !unmarked || !serves || self.durable.blocks == epoch || !self.in_sync() {
            return;
        }
        self.record_word(Entry::Blocks { epoch }, fx);
    }

    /// The peer knows of a later epoch than the one this node gave its word for: it does not count it any more.
    pub(super) fn hear_of_release(&mut self, state: &PeerState, fx: &mut Vec<Effect>) {
        if self.durable.blocks > Epoch::NONE && state.seen > self.durable.blocks {
            self.record_word(Entry::Blocks { epoch: Epoch::NONE }, fx);
        }
    }

    /// The peer's word, in an answer to what was asked at `asked`.
    pub(super) fn hear_of_block(&mut self, asked: Instant, state: &PeerState, fx: &mut Vec<Effect>) {
        let epoch = state.complete;
        let current = epoch == state.won && epoch >= self.durable.seen && epoch > self.durable.won;
        let whole = self.durable.initialised && !self.durable.rejoining && self.rejoin.is_none();
        let counts = state.blocks && self.setup.mode != Mode::Update && asked >= self.peer.word_from;
        if counts && current && whole && self.durable.peer_blocks != epoch {
            self.record_word(Entry::PeerBlocks { epoch }, fx);
        }
    }

    /// The peer's word stands for the last epoch known here.
    pub(super) fn peer_gave_its_word(&self) -> bool {
        let epoch = self.durable.peer_blocks;
        let last = epoch > Epoch::NONE && epoch == self.durable.seen && epoch > self.durable.won;
        self.durable.initialised && last
    }

    /// Only a change is written, and once.
    fn record_word(&mut self, entry: Entry, fx: &mut Vec<Effect>) {
        if !self.writing.iter().any(|(_, entries, _)| entries.contains(&entry)) {
            self.record(fx, vec![entry], Then::Nothing);
        }
    }
}
