//! What must hold after every event, judged with the world's eyes: it sees both gates, both disks and the record at
//! once, frozen nodes and slow clocks included.
//!
//! What it is NOT: the rules themselves. They are in the guard; here stands only what they promise.

use super::world::{World, holds, name};
use crate::base::time::Instant;
use crate::engine::durable::{Durable, Entry};
use crate::engine::setup::Mode;

/// Never two gates that could pass traffic at one instant.
pub(super) const TWO_GATES: &str = "never two gates that could pass traffic";
/// A takeover completes only when the other node's proofs are dead.
pub(super) const TOO_EARLY: &str = "no takeover completes before the other's proofs are dead";
pub(super) const ONE_OWNER: &str = "an epoch is won by one node only";
pub(super) const UNRECORDED: &str = "what is recorded is never un-recorded";
pub(super) const MISSING: &str = "no acknowledged write is missing on the active node";
pub(super) const TRUE_RECORD: &str = "the node that the record calls in sync holds every acknowledged write";
pub(super) const TOLD: &str = "commits pass without the standby only while the record says so";
/// A gate is open only on a complete epoch above every fence, for a lease at most, and never long beside a higher one.
pub(super) const OPEN_RIGHTLY: &str = "a gate is open only on a complete epoch, for a lease at most";
/// S13.
pub(super) const FORWARDS: &str = "who serves forwards nobody";
pub(super) const SERVES_AGAIN: &str = "after all faults heal somebody can serve";

/// How far what is recorded has come; it never goes back.
fn heights(durable: &Durable) -> [u64; 4] {
    [durable.fence.0, durable.won.0, durable.complete.0, durable.seen.0]
}

impl World {
    /// A promise was broken: the end, for whoever is strict; else remembered, the first one.
    pub(super) fn broke(&mut self, law: &'static str, text: String) {
        assert!(!self.strict, "{law}: {text} (at {:?})", self.now);
        if self.broken.is_none() {
            self.broken = Some((law, text));
        }
    }

    /// After every event.
    pub(super) fn check(&mut self) {
        if self.is_open(0) && self.is_open(1) {
            let until = [self.nodes[0].gate_until, self.nodes[1].gate_until];
            self.broke(TWO_GATES, format!("a until {:?}, b until {:?} on their clocks", until[0], until[1]));
        }
        self.read_marker();
        let marker = self.marker();
        let lease = self.timing.lease;
        for node in 0..2 {
            let higher =
                marker.as_ref().is_some_and(|m| m.epoch > self.nodes[node].shadow.complete && m.active != name(node));
            let since = self.nodes[node].superseded.unwrap_or(self.now);
            self.nodes[node].superseded = higher.then_some(since);
            if !self.is_open(node) {
                continue;
            }
            let n = &self.nodes[node];
            if n.guard.as_ref().is_some_and(|guard| guard.forwards.serves.is_some()) {
                self.broke(FORWARDS, format!("{} is open and forwards", name(node)));
                continue;
            }
            let local = |at: Instant| n.clock.read(at);
            let whole = n.shadow.complete == n.shadow.won && n.shadow.fence <= n.shadow.complete;
            let beyond = n.gate_until > local(self.now) + lease;
            let beside = local(self.now).since(local(since)) > lease && since >= n.clock.zero;
            if !whole {
                let text = format!("{} is open: {:?}", name(node), n.shadow);
                self.broke(OPEN_RIGHTLY, text);
            } else if beyond || beside {
                let what = if beyond { "is open beyond a lease" } else { "serves beside a higher epoch" };
                self.broke(OPEN_RIGHTLY, format!("{} {what}", name(node)));
            }
            let n = &self.nodes[node];
            let mine = marker.as_ref().filter(|m| m.active == name(node) && m.epoch == n.shadow.complete);
            let alone = n.pg.up && !n.pg.in_recovery && n.pg.list.is_empty() && !self.asynchronous;
            if self.check_acked && alone && (self.block || mine.is_some_and(|m| m.sync.is_some())) {
                let text = format!("{} commits alone; the record says {:?}", name(node), mine.map(|m| &m.sync));
                self.broke(TOLD, text);
            }
        }
        self.check_record();
    }

    /// R4: whoever may be promoted without a word holds everything.
    fn check_record(&mut self) {
        if !self.check_acked || self.loss_accepted || self.mode != Mode::Update {
            return;
        }
        let Some(named) = self.marker().and_then(|m| m.sync) else { return };
        let node = usize::from(named == name(1));
        // An unfinished rejoin is durably not promotable, whatever the record says.
        if !self.nodes[node].shadow.rejoining
            && let Some(text) = self.missing_on(node)
        {
            self.broke(TRUE_RECORD, text);
        }
    }

    /// Which acknowledged writes are not on this node.
    pub(super) fn missing_on(&self, node: usize) -> Option<String> {
        let data = &self.nodes[node].pg.data;
        let missing = self.acked.iter().find(|(branch, count)| !holds(data, **branch, **count));
        missing.map(|(branch, count)| {
            format!("writes of branch {branch} up to {count} are missing on {}: {data:?}", name(node))
        })
    }

    /// Entries reach the disk of `node`.
    pub(super) fn write_down(&mut self, node: usize, entries: &[Entry]) {
        let before = heights(&self.nodes[node].shadow);
        for entry in entries {
            if let Entry::Won { epoch, .. } = entry {
                let owner = *self.owners.entry(epoch.0).or_insert(node);
                // Without compare-and-swap two nodes that never met may claim one number; then both fence (P13).
                if owner != node && self.mode == Mode::Update {
                    self.broke(ONE_OWNER, format!("{epoch} was won by {} and by {}", name(owner), name(node)));
                }
            }
            if let Entry::Complete { epoch } = entry
                && *epoch > self.nodes[node].shadow.complete
            {
                self.judge_completion(node);
            }
            self.nodes[node].shadow.apply(entry);
        }
        let after = heights(&self.nodes[node].shadow);
        if before.iter().zip(&after).any(|(b, a)| a < b) {
            self.broke(UNRECORDED, format!("fence, won, complete, seen of {}: {before:?}, then {after:?}", name(node)));
        }
    }

    /// R2's third point, with the world's eyes: the other node holds no proof that is still good on its own clock.
    fn judge_completion(&mut self, node: usize) {
        // In observe mode a complete epoch is not open yet: that takes proofs unbroken for W, of both (R5).
        if self.mode == Mode::Observe {
            return;
        }
        let other = &self.nodes[1 - node];
        let Some(guard) = &other.guard else { return };
        let now = self.clocks(1 - node);
        let local = now.boot;
        let may_open = guard.durable.is_holder() && guard.fenced().is_none() && guard.not_confirmed(now).is_none();
        if may_open && guard.lease_deadline() > local {
            let until = guard.lease_deadline();
            self.broke(TOO_EARLY, format!("{} may serve until {until:?}, it is {local:?} there", name(1 - node)));
        }
    }
}
