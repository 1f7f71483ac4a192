//! What survives a restart: the journal's entries and the state that is the replay of them.
//!
//! **Invariant:** [`Durable::apply`] is the only way the state changes; replay and live use the same function.
//! Epochs never fall, except *refused*, which an abandoned attempt whose update surely did not land lowers again.

use crate::base::ids::{Epoch, Lsn, NodeName, SystemId, TimelineId};
use serde::{Deserialize, Serialize};

/// One record of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Entry {
    /// This journal belongs to a node that was there when the pair had no epoch yet (or was rejoined), so an empty
    /// one means "never held one" and not "lost".
    Initialised,
    /// The highest epoch and, for one's own, seq known from anywhere.
    Seen {
        epoch: Epoch,
    },
    /// No pledge for epochs up to here.
    Refused {
        epoch: Epoch,
    },
    /// The attempt was abandoned and its update surely did not land.
    RefusedLowered {
        epoch: Epoch,
    },
    /// Our compare-and-swap was seen standing.
    Won {
        epoch: Epoch,
        seq: u64,
        loss: bool,
        /// The lease of the one it was taken from, in milliseconds: a takeover finished later waits for it (P11).
        #[serde(default)]
        old_lease_ms: u64,
    },
    /// It was taken with a VIP alone and without the other node's word, which may have taken epochs of its own before.
    Unheard {
        epoch: Epoch,
    },
    /// R2 is satisfied: this node may open the epoch.
    Complete {
        epoch: Epoch,
    },
    /// What our own update wrote as `sync=` for our epoch; `since` is RFC 3339.
    Sync {
        epoch: Epoch,
        seq: u64,
        sync: Option<NodeName>,
        since: String,
    },
    /// The peer goes alone at its epoch, by its own word and where no marker says so; `None`: it is in sync again.
    PeerAlone {
        epoch: Epoch,
        since: Option<String>,
    },
    /// This node gives its word: it acknowledges nothing without the peer, from this epoch on (`PeerState::blocks`);
    /// none: the peer knows that it does not count any more.
    Blocks {
        epoch: Epoch,
    },
    /// The peer gave that word for its epoch.
    PeerBlocks {
        epoch: Epoch,
    },
    /// This node serves nothing of epochs below `number`.
    Fenced {
        number: Epoch,
        reason: String,
        at: String,
    },
    /// A consent was given (a fence with it): this node follows the winner by itself.
    Consented {
        number: Epoch,
        attempt: u64,
        at: String,
    },
    /// The fenced state ended (rejoin, or the switched-over node follows); the number stays.
    FenceEnded,
    /// Highest flushed position that our primary confirmed.
    Confirmed {
        lsn: Lsn,
        timeline: TimelineId,
        system_id: SystemId,
    },
    /// From here to `RejoinDone` the data here is not promotable.
    RejoinStarted {
        id: u64,
    },
    RejoinDone {
        id: u64,
    },
    /// It ended before anything here was touched: the data is what it was.
    RejoinAbandoned {
        id: u64,
    },
    /// This boot is about to be written into the marker; W is waited from the update, also by a later start (S6).
    BootPending {
        boot: String,
    },
    BootWaited,
    /// PostgreSQL is about to be stopped for a switchover, or for a consent, of this attempt.
    Stopping {
        attempt: u64,
    },
    /// It runs again, so nobody has to start it any more.
    StopOver,
    /// PostgreSQL is left alone, or not any more.
    Maintenance {
        on: bool,
    },
    /// A step of a procedure began or ended: an intent log.
    Step {
        id: u64,
        kind: String,
        step: String,
        ended: Option<(u8, String)>,
    },
    /// The whole state, written first into a fresh journal file.
    Snapshot(Box<Durable>),
}

/// Replay of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Durable {
    pub initialised: bool,
    pub seen: Epoch,
    pub refused: Epoch,
    pub won: Epoch,
    pub won_loss: bool,
    pub complete: Epoch,
    /// While the epoch is not complete: the longest lease that has to be waited out, in milliseconds.
    #[serde(default)]
    pub old_lease_ms: u64,
    /// An epoch taken without the other node's word, until the two have the same data again.
    #[serde(default)]
    pub unheard: Epoch,
    /// This boot was being written into the marker, and W after that is not over (S6).
    #[serde(default)]
    pub boot_pending: Option<String>,
    /// PostgreSQL was stopped for a switchover of this attempt, and neither consented nor started again since.
    #[serde(default)]
    pub stopping: Option<u64>,
    /// PostgreSQL is left alone.
    #[serde(default)]
    pub maintenance: bool,
    /// Of our own epoch: the highest seq we wrote and what it said.
    pub seq: u64,
    pub sync: Option<NodeName>,
    pub sync_since: Option<String>,
    /// The peer went alone: at which of its epochs, and when (RFC 3339).
    #[serde(default)]
    pub peer_alone: Option<(Epoch, String)>,
    /// The epoch at which this node gave its word not to go alone; it binds, whatever the configuration says since.
    #[serde(default)]
    pub blocks: Epoch,
    /// The epoch of the peer for which it gave that word.
    #[serde(default)]
    pub peer_blocks: Epoch,
    /// The fence number; passed only by winning an epoch not below it.
    pub fence: Epoch,
    /// The fenced state and why, until promote, unfence or rejoin end it.
    pub fenced: Option<String>,
    /// The fence was a consent: follow the winner.
    pub consented: bool,
    pub confirmed: Option<(Lsn, TimelineId, SystemId)>,
    /// A rejoin that did not finish: not promotable.
    pub rejoining: bool,
    /// A procedure that a restart interrupted.
    pub procedure: Option<(u64, String, String)>,
}

impl Durable {
    /// Folds one entry in.
    pub fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Initialised => self.initialised = true,
            Entry::Seen { epoch } => self.seen = self.seen.max(*epoch),
            Entry::Refused { epoch } => self.refused = self.refused.max(*epoch),
            Entry::RefusedLowered { epoch } => self.refused = *epoch,
            Entry::Won { epoch, seq, loss, old_lease_ms } => {
                self.initialised = true;
                self.won = self.won.max(*epoch);
                self.seen = self.seen.max(*epoch);
                self.seq = *seq;
                self.won_loss = *loss;
                self.old_lease_ms = self.old_lease_ms.max(*old_lease_ms);
            }
            Entry::Unheard { epoch } => self.unheard = *epoch,
            Entry::Complete { epoch } => {
                self.complete = self.complete.max(*epoch);
                self.won_loss = false;
                if self.complete == self.won {
                    self.old_lease_ms = 0;
                }
                if *epoch >= self.fence {
                    self.fenced = None;
                    self.consented = false;
                }
            }
            Entry::Sync { epoch, seq, sync, since } => {
                if *epoch == self.won {
                    self.seq = self.seq.max(*seq);
                    self.sync = sync.clone();
                    if sync.is_some() {
                        self.unheard = Epoch::NONE;
                    }
                    self.sync_since = Some(since.clone());
                }
            }
            Entry::PeerAlone { epoch, since } => {
                if since.is_some() {
                    self.peer_blocks = Epoch::NONE;
                }
                self.peer_alone = since.clone().map(|since| (*epoch, since));
            }
            Entry::Blocks { epoch } => self.blocks = *epoch,
            Entry::PeerBlocks { epoch } => self.peer_blocks = *epoch,
            // From a fence on its PostgreSQL is the fence's to stop and to start.
            Entry::Fenced { number, reason, .. } => {
                self.stopping = None;
                self.fence = self.fence.max(*number);
                self.fenced = Some(reason.clone());
                self.consented = false;
            }
            Entry::Consented { number, .. } => {
                self.stopping = None;
                self.fence = self.fence.max(*number);
                self.fenced = Some("consented to a switchover".to_owned());
                self.consented = true;
            }
            Entry::FenceEnded => {
                self.unheard = Epoch::NONE;
                self.fenced = None;
                self.consented = false;
            }
            Entry::Confirmed { lsn, timeline, system_id } => self.confirmed = Some((*lsn, *timeline, *system_id)),
            Entry::RejoinStarted { .. } => {
                self.stopping = None;
                self.rejoining = true;
                // What it was given for is replaced.
                self.peer_blocks = Epoch::NONE;
            }
            Entry::RejoinAbandoned { .. } => self.rejoining = false,
            Entry::RejoinDone { .. } => {
                self.unheard = Epoch::NONE;
                self.initialised = true;
                self.rejoining = false;
                self.fenced = None;
                self.consented = false;
            }
            Entry::BootPending { boot } => self.boot_pending = Some(boot.clone()),
            Entry::BootWaited => self.boot_pending = None,
            Entry::Stopping { attempt } => self.stopping = Some(*attempt),
            Entry::StopOver => self.stopping = None,
            Entry::Maintenance { on } => self.maintenance = *on,
            Entry::Step { id, kind, step, ended } => {
                self.procedure = match ended {
                    Some(_) => None,
                    None => Some((*id, kind.clone(), step.clone())),
                }
            }
            Entry::Snapshot(state) => *self = (**state).clone(),
        }
    }

    /// Replays entries from nothing.
    pub fn replay<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Durable {
        let mut state = Durable::default();
        for entry in entries {
            state.apply(entry);
        }
        state
    }

    /// This node completed an epoch that nothing recorded here has ended.
    pub fn is_holder(&self) -> bool {
        self.complete > Epoch::NONE && self.complete == self.won && self.fence <= self.complete
    }

    /// What this node acknowledged last may be unknown to the other: nobody but a person may give the service there.
    pub fn served_unheard(&self) -> bool {
        self.complete > Epoch::NONE && self.unheard == self.complete
    }

    /// The journal has never held an epoch of any kind.
    pub fn is_virgin(&self) -> bool {
        self.seen == Epoch::NONE && self.refused == Epoch::NONE && self.won == Epoch::NONE && self.fence == Epoch::NONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fenced(number: u64) -> Entry {
        Entry::Fenced { number: Epoch(number), reason: "test".into(), at: String::new() }
    }

    #[test]
    fn a_fence_number_never_falls_and_is_passed_only_by_a_higher_epoch() {
        let won = |e| Entry::Won { epoch: Epoch(e), seq: 1, loss: false, old_lease_ms: 0 };
        let mut entries = vec![won(3), Entry::Complete { epoch: Epoch(3) }, fenced(5), fenced(4)];
        let state = Durable::replay(&entries);
        assert_eq!(state.fence, Epoch(5));
        assert!(!state.is_holder());
        entries.extend([won(4), Entry::Complete { epoch: Epoch(4) }]);
        let state = Durable::replay(&entries);
        assert!(state.fenced.is_some(), "an epoch below the fence lifts nothing");
        assert!(!state.is_holder());
        entries.extend([won(5), Entry::Complete { epoch: Epoch(5) }]);
        let state = Durable::replay(&entries);
        assert!(state.fenced.is_none());
        assert!(state.is_holder());
    }

    #[test]
    fn a_won_epoch_that_is_not_complete_holds_nothing() {
        let mut entries = vec![
            Entry::Won { epoch: Epoch(3), seq: 1, loss: false, old_lease_ms: 0 },
            Entry::Complete { epoch: Epoch(3) },
        ];
        entries.push(Entry::Won { epoch: Epoch(4), seq: 2, loss: false, old_lease_ms: 0 });
        assert!(!Durable::replay(&entries).is_holder());
    }

    #[test]
    fn ending_the_fenced_state_keeps_the_number() {
        let state = Durable::replay(&[
            Entry::Won { epoch: Epoch(1), seq: 1, loss: false, old_lease_ms: 0 },
            Entry::Complete { epoch: Epoch(1) },
            fenced(2),
            Entry::RejoinStarted { id: 1 },
            Entry::RejoinDone { id: 1 },
        ]);
        assert_eq!((state.fence, state.fenced.clone()), (Epoch(2), None));
        assert!(!state.is_holder(), "the old epoch stays ended");
    }

    #[test]
    fn a_stop_is_remembered_until_it_was_consented_put_back_or_fenced() {
        let stop = || Entry::Stopping { attempt: 7 };
        let at = String::new;
        assert_eq!(Durable::replay(&[stop()]).stopping, Some(7));
        let ends = [Entry::StopOver, fenced(3), Entry::Consented { number: Epoch(3), attempt: 7, at: at() }];
        for end in ends {
            assert_eq!(Durable::replay(&[stop(), end.clone()]).stopping, None, "{end:?}");
        }
    }

    #[test]
    fn a_snapshot_of_an_earlier_version_is_understood() {
        let mut old = serde_json::to_value(Durable::default()).expect("JSON");
        old.as_object_mut().expect("an object").remove("stopping").expect("was there");
        assert_eq!(serde_json::from_value::<Durable>(old).expect("understood"), Durable::default());
    }

    #[test]
    fn a_snapshot_replays_to_the_same_state() {
        let entries = [Entry::Initialised, Entry::Seen { epoch: Epoch(4) }, fenced(5)];
        let live = Durable::replay(&entries);
        assert_eq!(Durable::replay(&[Entry::Snapshot(Box::new(live.clone()))]), live);
    }
}
