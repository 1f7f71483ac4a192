//! The way down (R4): when the synchronous standby counts as lost, and what this primary does then. The way up, and
//! the list itself, are in `durability`.
//!
//! The evidence is what PostgreSQL's walsender says, because that is what commits wait for: whatever the peer's daemon
//! claims, a commit goes on only when the walsender heard that its WAL was flushed. A standby with nothing to flush
//! owes no sign of life, so an idle pair stays synchronous; one whose walsender is gone owes one from that moment on.
//!
//! **Invariants:** silence is counted over looks that follow each other closely, never over a time in which nobody
//! looked. Nothing is acknowledged alone before our *own* update to `sync=none` succeeded, or (without a marker)
//! before the peer acknowledged it or could not be asked and it is in our journal; who gave its word not to (`word`)
//! needs the acknowledgement. `on_standby_loss = "block"` empties no list.

use super::durability::{AloneFor, Listed, Phase, listed};
use super::observe::is_behind;
use super::proofs::{PEER_LIMIT, PeerAskedFor};
use super::{Guard, PgOwner, Then};
use crate::base::ids::{Epoch, Lsn};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Now, PeerAnswer, PeerQuestion, PeerState, PgTask, Ticket};
use crate::wire::marker::Marker;

/// Looks further apart than this do not show that the standby was silent between them.
const LOOKS_APART: Duration = Duration::from_secs(2);
/// Pause after an attempt to go alone that failed.
const AGAIN: Duration = Duration::from_secs(2);
/// A standby that is lost so soon after commits began to wait for it flaps.
const STEADY: Duration = Duration::from_secs(60);
/// How long a standby that flaps has to stream before commits wait for it again: doubled with each loss in a row.
const CALM: Duration = Duration::from_secs(2);
const CALM_MOST: Duration = Duration::from_secs(30);

/// The synchronous standby, as the walsenders of this start of PostgreSQL show it.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct StandbyMemory {
    start: u64,
    looked: Instant,
    flushed: Option<Lsn>,
    /// Since when it owes a sign of life.
    silent: Option<(Instant, String)>,
    /// It owed one for `standby_timeout`.
    pub(super) lost: bool,
    /// Commits waited when it was lost, and that was said.
    said: bool,
    /// Why this node does not go alone was said.
    said_why_not: bool,
    /// Since when it has streamed without a silence.
    streams_since: Option<Instant>,
    /// Losses in a row, each soon after commits had begun to wait for it.
    losses: u32,
    /// When commits last began to wait for it.
    armed_at: Option<Instant>,
    retry_at: Instant,
}

impl StandbyMemory {
    /// How long it has to stream before commits wait for it again.
    fn calm(&self) -> Duration {
        match self.losses {
            0 | 1 => Duration::ZERO,
            losses => (CALM * 2u32.saturating_pow((losses - 2).min(8))).min(CALM_MOST),
        }
    }

    /// Commits begin to wait for it, or the record says that they do.
    pub(super) fn armed(&mut self, now: Now) {
        self.armed_at = Some(now.boot);
    }

    /// A person has brought it back: what it did before says nothing.
    pub(super) fn forgive(&mut self) {
        self.losses = 0;
    }

    /// It streams, and has for long enough.
    pub(super) fn is_steady(&self, now: Now) -> bool {
        !self.lost && self.streams_since.is_some_and(|since| now.boot >= since + self.calm())
    }

    /// RFC 3339, since when commits have waited in vain.
    pub(super) fn waiting_since(&self) -> Option<String> {
        self.silent.as_ref().filter(|_| self.lost).map(|(_, since)| since.clone())
    }
}

impl Guard {
    /// One look: did the standby give a sign of life?
    pub(super) fn watch_standby(&mut self, now: Now, asked: Instant, fx: &mut Vec<Effect>) {
        let row = self.standby_row().map(|row| (row.flush_lsn, row.state == "streaming"));
        let holds = self.durable.is_holder() && self.fenced().is_none();
        let report = self.pg.report.as_ref().filter(|r| self.setup.synchronous && !r.in_recovery && holds);
        let memory = &mut self.durability.standby;
        let Some(report) = report else {
            *memory = StandbyMemory { losses: memory.losses, armed_at: memory.armed_at, ..StandbyMemory::default() };
            return;
        };
        let waits = listed(&report.sync_list) != Listed::Empty;
        let flushed = row.and_then(|(flushed, _)| flushed);
        // One that is sent a base backup, or has not answered yet, has no position: it owes one.
        let owes = flushed.is_none_or(|at| report.flush_lsn.is_none_or(|goal| at < goal));
        let advanced = flushed.is_some_and(|at| memory.flushed.is_none_or(|before| at > before));
        let unbroken = memory.start == report.start && asked.since(memory.looked) <= LOOKS_APART;
        memory.start = report.start;
        memory.looked = now.boot;
        memory.flushed = flushed;
        if !owes {
            memory.silent = None;
        } else if advanced || !unbroken || memory.silent.is_none() {
            memory.silent = Some((now.boot, now.rfc3339()));
        }
        let timeout = self.setup.standby_timeout;
        let lost = memory.silent.as_ref().is_some_and(|(since, _)| asked >= *since + timeout);
        let streams = row.is_some_and(|(_, streams)| streams) && !lost;
        memory.streams_since = memory.streams_since.filter(|_| streams).or(streams.then_some(now.boot));
        let before = std::mem::replace(&mut memory.lost, lost);
        if lost && waits && !memory.said {
            self.say_lost(now, row.is_some(), flushed, fx);
        } else if before && !lost {
            self.say_back(now, waits, fx);
        }
    }

    fn say_lost(&mut self, now: Now, there: bool, flushed: Option<Lsn>, fx: &mut Vec<Effect>) {
        let soon = self.durability.standby.armed_at.is_some_and(|at| now.boot.since(at) < STEADY);
        let memory = &mut self.durability.standby;
        memory.said = true;
        memory.losses = if soon { memory.losses.saturating_add(1) } else { 1 };
        self.counters.standby_losses += 1;
        let peer = &self.setup.peer;
        let what = match (there, flushed) {
            (true, Some(at)) => format!("it has flushed nothing beyond {at}"),
            (true, None) => "it has confirmed nothing".to_owned(),
            (false, _) => "no walsender, or more than one, carries its name".to_owned(),
        };
        let then = match self.setup.block {
            true => format!("on_standby_loss = \"block\": commits wait for {peer} until it confirms again"),
            false => "commits wait until it is recorded that this node is alone".to_owned(),
        };
        let timeout = self.setup.standby_timeout.as_secs_f64();
        self.note(now, fx, "standby_lost", format!("{peer} has been silent for {timeout:.1} s ({what}); {then}"));
    }

    fn say_back(&mut self, now: Now, waits: bool, fx: &mut Vec<Effect>) {
        let memory = &mut self.durability.standby;
        let said = std::mem::take(&mut memory.said);
        memory.said_why_not = false;
        let calm = memory.calm();
        if said {
            let peer = &self.setup.peer;
            let then = match (waits, calm.is_zero()) {
                (true, _) => "commits go on".to_owned(),
                (false, true) => "commits will wait for it again in a moment".to_owned(),
                (false, false) => format!(
                    "it was lost {} times in a row, so commits wait for it again only after {} s of streaming",
                    self.durability.standby.losses,
                    calm.as_secs()
                ),
            };
            self.note(now, fx, "standby_back", format!("{peer} confirms again; {then}"));
        }
    }

    /// The standby is lost and commits wait for it: goes alone where that is allowed.
    pub(super) fn advance_alone(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let standby = &self.durability.standby;
        if !self.setup.synchronous && self.is_bound() && now.boot >= standby.retry_at {
            // Asynchronous now, and bound by the word it gave before: the peer lifts that, as soon as it can be asked.
            if self.peer_reachable(now) && self.stays_together(now).is_none() {
                self.go_alone(now, AloneFor::Silence, fx);
            }
            return;
        }
        if !standby.lost || self.setup.block || now.boot < standby.retry_at {
            return;
        }
        let Some(report) = self.pg.report.as_ref().filter(|r| self.pg.up && !r.in_recovery) else { return };
        if listed(&report.sync_list) == Listed::Empty && self.record_sync() == Some(None) {
            return;
        }
        if let Some(why) = self.stays_together(now) {
            if !std::mem::replace(&mut self.durability.standby.said_why_not, true) {
                let text = format!("commits wait for {}, and this node does not go alone: {why}", self.setup.peer);
                self.note(now, fx, "commits_wait", text);
            }
            return;
        }
        self.give_up_arming(now, "the standby is lost", fx);
        self.go_alone(now, AloneFor::Silence, fx);
    }

    /// An arming that has named the standby and recorded nothing yet ends here: the list may name a standby under
    /// `sync=none` (R4), and going alone, which follows, empties it. What is being recorded runs to its end (P5).
    pub(super) fn give_up_arming(&mut self, now: Now, why: &str, fx: &mut Vec<Effect>) {
        match (self.durability.phase, self.pg.task) {
            (Phase::Confirming { .. }, _) => self.durability.phase = Phase::Idle,
            // Two checkpoints may take minutes; nothing that they began has to be undone.
            (Phase::Barrier | Phase::Proving, Some((op, PgOwner::Durability))) => {
                self.on_pg_done(now, op, Err(format!("given up: {why}")), fx);
            }
            _ => {}
        }
    }

    /// R4: only while the lease is good, and not amid a procedure. R6, P15: not while the standby is ahead of a primary
    /// that has just started: then it is this one that lost WAL.
    pub(super) fn stays_together(&self, now: Now) -> Option<String> {
        if self.takeover.as_ref().is_some_and(|t| !t.dry_run) || self.handover.is_some() || self.rejoin.is_some() {
            return Some("a procedure is under way".to_owned());
        }
        if let Err((_, why)) = self.lease_stands(now) {
            return Some(why);
        }
        // No compare-and-swap would fail here if the service had moved while this machine stood still: somebody has to
        // have vouched for it since.
        let silent = self.durability.standby.silent.as_ref().map(|(since, _)| *since);
        if self.setup.mode != Mode::Update && self.proofs.newest() < silent {
            return Some("nobody has vouched for this node since the standby fell silent".to_owned());
        }
        let report = self.pg.report.as_ref()?;
        if self.pg.barrier_passed {
            return None;
        }
        let behind = self.durable.confirmed.filter(|confirmed| is_behind(report, *confirmed));
        let behind = behind.map(|(lsn, timeline, _)| {
            format!(
                "{} had {lsn} (timeline {timeline}), this primary has only {} (timeline {}): it has lost WAL; promote \
                 there, or `promote --accept-data-loss` here",
                self.setup.peer, report.lsn, report.timeline
            )
        });
        self.lost_wal().or(behind)
    }

    /// R6, P15: why this primary has surely lost WAL (a restored snapshot), by the peer's last word or the witness's.
    pub(super) fn lost_wal(&self) -> Option<String> {
        let report = self.pg.report.as_ref().filter(|r| !r.in_recovery && self.durable.is_holder())?;
        let peer = &self.setup.peer;
        if self.witness.restored == Some(self.durable.won) {
            return Some(format!(
                "at this start the record was newer than this node's journal: restored from a snapshot, it would serve \
                 old data; promote {peer}, or `promote --accept-data-loss` here"
            ));
        }
        // A word from before our epoch was judged when that was taken.
        let word = self.peer.state.as_ref().filter(|p| p.seen >= self.durable.won).and_then(|p| p.pg.as_ref());
        let ahead = word.filter(|pg| {
            let same = pg.system_id == report.system_id && pg.timeline == report.timeline;
            pg.in_recovery && same && pg.lsn > report.lsn
        });
        ahead.map(|pg| {
            format!("{peer} has {}, this primary only {}: it has lost WAL; promote there", pg.lsn, report.lsn)
        })
    }

    /// P15: an update of ours that the journal does not know was sent after the snapshot that this machine was restored
    /// from. One that a life sent and died before it could write it down is no such sign, nor is that of a new boot,
    /// whose intent is in the journal.
    pub(super) fn compare_journal(&mut self, now: Now, marker: &Marker, fx: &mut Vec<Effect>) {
        if std::mem::replace(&mut self.witness.compared, true) || self.job.is_some() {
            return;
        }
        let ours = marker.active == self.setup.me && marker.epoch == self.durable.won && self.durable.is_holder();
        if ours && marker.seq > self.durable.seq.saturating_add(1) && self.durable.boot_pending.is_none() {
            self.witness.restored = Some(marker.epoch);
            let (there, here, peer) = (marker.seq, self.durable.seq, &self.setup.peer);
            let text = format!(
                "the record (seq {there}) is newer than this node's journal (seq {here}): a restored snapshot? It \
                 serves only once {peer} has confirmed its WAL"
            );
            self.note(now, fx, "journal_is_old", text);
        }
    }

    /// Commits are not to wait for the standby: it is lost, or replication is asynchronous.
    fn is_parted(&self) -> bool {
        self.durability.standby.lost || !self.setup.synchronous
    }

    /// Starts going alone; false while something else is under way.
    pub(super) fn go_alone(&mut self, now: Now, by: AloneFor, fx: &mut Vec<Effect>) -> bool {
        if self.pg.task.is_some() || !matches!(self.durability.phase, Phase::Idle) {
            return false;
        }
        if self.record_sync() == Some(None) && self.durable.sync.is_none() && !self.is_bound() {
            self.empty_list(now, by, fx);
            return true;
        }
        if self.setup.mode != Mode::Update {
            // P8: the record is the peer's word, as long as it can be asked. Who asks for a rejoin knows.
            if by == AloneFor::Silence && (self.peer_reachable(now) || self.is_bound()) {
                let ask = PeerQuestion::GoingAlone { epoch: self.durable.complete, since: now.rfc3339() };
                let question = self.ask_peer(now, PeerAskedFor::Alone, ask, PEER_LIMIT, fx);
                self.durability.phase = Phase::AskingPeer { question };
            } else {
                self.journal_alone(now, by, fx);
            }
            return true;
        }
        if !self.start_job(now, super::record::Purpose::Sync(None), fx) {
            return false;
        }
        self.durability.phase = Phase::RecordingAlone(by);
        true
    }

    fn journal_alone(&mut self, now: Now, by: AloneFor, fx: &mut Vec<Effect>) {
        let (epoch, seq, since) = (self.durable.won, self.durable.seq + 1, now.rfc3339());
        self.durability.phase = Phase::RecordingAlone(by);
        let mut entries = vec![Entry::Sync { epoch, seq, sync: None, since }];
        if self.is_bound() {
            // The peer has acknowledged it, or is being rejoined: its own journal says so first.
            entries.push(Entry::Blocks { epoch: Epoch::NONE });
        }
        self.record(fx, entries, Then::Durability);
    }

    /// The record says `sync=none` by our own hand: now, and never before, the list may be emptied.
    pub(super) fn empty_list(&mut self, now: Now, by: AloneFor, fx: &mut Vec<Effect>) {
        self.durability.phase = Phase::Idle;
        let silence = by == AloneFor::Silence;
        if silence && (!self.durability.standby.lost || self.stays_together(now).is_some()) {
            // It is back, or this is not the moment: a record that says less than is true harms nobody.
            return;
        }
        if self.setup.block {
            self.alone_done(now, by, Ok(()), fx);
            return;
        }
        self.durability.phase = Phase::Emptying(by);
        self.pg_task_next(PgOwner::Durability, PgTask::SetSyncList(None), fx);
    }

    /// Going alone for want of the standby has ended, one way or the other.
    pub(super) fn on_silence_alone(&mut self, now: Now, result: Result<(), String>, fx: &mut Vec<Effect>) {
        match result {
            Ok(()) => {
                let text =
                    format!("alone: sync=none is recorded, commits do not wait for {} any more", self.setup.peer);
                self.note(now, fx, "alone", text);
            }
            Err(why) => {
                let standby = &mut self.durability.standby;
                standby.retry_at = now.boot + AGAIN;
                if !std::mem::replace(&mut standby.said_why_not, true) {
                    let text = format!("commits wait for {}: this node cannot go alone: {why}", self.setup.peer);
                    self.note(now, fx, "commits_wait", text);
                }
            }
        }
    }

    /// Without a marker: the peer acknowledged that this node goes alone, refused, or was silent.
    pub(super) fn on_alone_answered(
        &mut self,
        now: Now,
        question: u64,
        answer: Result<Box<PeerAnswer>, String>,
        fx: &mut Vec<Effect>,
    ) {
        if self.durability.phase != (Phase::AskingPeer { question }) {
            return;
        }
        self.durability.phase = Phase::Idle;
        let why = match answer.map(|a| *a) {
            Err(why) if self.is_bound() => format!(
                "with on_standby_loss = \"block\" it gave its word to acknowledge nothing without {0}, and {0} has to \
                 acknowledge that it goes alone, which it does not ({why}); start its daemon",
                self.setup.peer
            ),
            // Who cannot be asked cannot object (P8): a promote there counts everything since the last contact as lost.
            Ok(PeerAnswer::Acknowledged) | Err(_) => {
                if self.is_parted() && self.stays_together(now).is_none() {
                    self.journal_alone(now, AloneFor::Silence, fx);
                }
                return;
            }
            Ok(PeerAnswer::Refused { why }) => format!("{} does not acknowledge it: {why}", self.setup.peer),
            Ok(_) => format!("{} gave an answer to another question", self.setup.peer),
        };
        self.on_silence_alone(now, Err(why), fx);
    }

    /// The peer goes alone and asks for a durable word of it. Who has refused gives none (R2).
    pub(super) fn on_going_alone(
        &mut self,
        now: Now,
        ticket: Ticket,
        epoch: Epoch,
        since: String,
        fx: &mut Vec<Effect>,
    ) {
        let writing = |(_, entries, _): &(u64, Vec<Entry>, Then)| {
            entries.iter().any(|entry| matches!(entry, Entry::Refused { epoch: refused } if *refused >= epoch))
        };
        let taking = self.takeover.as_ref().is_some_and(|t| !t.dry_run);
        let refused = self.durable.refused >= epoch || self.writing.iter().any(writing);
        let why = if taking {
            "a promote is under way here"
        } else if refused || self.durable.won >= epoch {
            "a later epoch was taken or asked for here"
        } else {
            let answer = Box::new(PeerAnswer::Acknowledged);
            self.peer.word_from = now.boot;
            self.record(fx, vec![Entry::PeerAlone { epoch, since: Some(since) }], Then::Answer { ticket, answer });
            return;
        };
        fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why: why.to_owned() }) });
    }

    /// The peer says that it is in sync with this node again: what it acknowledged alone came over with the rest.
    pub(super) fn hear_of_sync(&mut self, state: &PeerState, fx: &mut Vec<Effect>) {
        let over = self.durable.peer_alone.as_ref().is_some_and(|(epoch, _)| state.in_sync && state.complete >= *epoch);
        let clearing = Entry::PeerAlone { epoch: state.complete, since: None };
        if over && !self.writing.iter().any(|(_, entries, _)| entries.contains(&clearing)) {
            self.record(fx, vec![clearing], Then::Nothing);
        }
    }
}
