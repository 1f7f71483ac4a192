//! The taking side of a switchover before its point of no return: the old node prepares, the standby keeps up.
//!
//! What it is NOT: it decides nothing about R2; everything here can still be put back.

use super::{NEARING_LIMIT, STOP_LIMIT, Step, TELL_EVERY, Takeover};
use crate::base::ids::Lsn;
use crate::base::time::Duration;
use crate::engine::guard::Guard;
use crate::engine::guard::handover::CLIENTS_HELD;
use crate::engine::guard::proofs::{AskedFor, PEER_LIMIT, PeerAskedFor};
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Now, PeerQuestion};

/// Until the old node says that it has begun; one of an earlier version says nothing, and drains for so long at most.
const BEGIN_LIMIT: Duration = Duration::from_secs(15);
/// Silence of the old node while it prepares, which may take long, after which it is given up.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

impl Takeover {
    /// It is a rehearsal, or has not refused yet.
    pub(in crate::engine::guard) fn is_only_planned(&self) -> bool {
        let before = matches!(
            self.step,
            Step::Asking { .. }
                | Step::Preparing { .. }
                | Step::CheckingWitness { .. }
                | Step::Nearing { .. }
                | Step::Stopping { .. }
                | Step::CatchingUp { .. }
        );
        self.dry_run || before
    }
}

impl Guard {
    /// The old node holds its clients; what it could not wait for is the operator's to know.
    pub(in crate::engine::guard) fn on_ready(&mut self, now: Now, cancelled: u64, busy: u64, fx: &mut Vec<Effect>) {
        let text = match cancelled {
            0 => "clients are held at their transaction boundary".to_owned(),
            _ => format!(
                "clients are held at their transaction boundary; {cancelled} open transactions took too long and \
                 were cancelled, {busy} of those sessions will be ended"
            ),
        };
        self.say(now, &text, fx);
        if self.setup.mode == Mode::VipOnly {
            self.near_old_primary(now, fx);
            return;
        }
        let q = self.ask_witness(now, 0, AskedFor::Takeover, fx);
        self.step(now, Step::CheckingWitness { question: q }, Some(PEER_LIMIT), fx);
    }

    /// The old primary's PostgreSQL gives no session, so it hands nothing over. Its daemon lives: it can cut its gate,
    /// stop PostgreSQL the hard way and consent (R2), and then the record alone says what is lost (R4).
    pub(in crate::engine::guard) fn on_hung_primary(&mut self, now: Now, why: String, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        t.prepared = false;
        t.hung = Some(why);
        self.judge_takeover(now, true, fx);
    }

    /// Why the old primary cannot hand over, as this attempt was told or as its daemon says of itself.
    pub(in crate::engine::guard) fn hung_primary(&self, alive: bool) -> Option<String> {
        let told = self.takeover.as_ref().and_then(|t| t.hung.clone());
        let says = self.peer.state.as_ref().filter(|p| alive && p.pg.as_ref().is_some_and(|pg| !pg.in_recovery));
        told.or_else(|| Some(format!("it has not answered since {}", says?.hangs_since.as_ref()?)))
    }

    /// A standby that hangs or lags is found out while nothing is stopped yet.
    pub(in crate::engine::guard) fn near_old_primary(&mut self, now: Now, fx: &mut Vec<Effect>) {
        match self.takeover.as_ref().and_then(|t| t.nearing).filter(|lsn| !self.has_replayed(*lsn)) {
            Some(lsn) => self.step(now, Step::Nearing { lsn }, Some(NEARING_LIMIT), fx),
            None => self.stop_old_primary(now, fx),
        }
    }

    pub(in crate::engine::guard) fn has_replayed(&self, lsn: Lsn) -> bool {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up);
        report.and_then(|report| report.replay_lsn).is_some_and(|replay| replay >= lsn)
    }

    pub(in crate::engine::guard) fn stop_old_primary(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(attempt) = self.takeover.as_ref().map(|t| t.id) else { return };
        let ask = PeerQuestion::StopPrimary { attempt };
        let question = self.ask_peer(now, PeerAskedFor::Takeover, ask, STOP_LIMIT, fx);
        self.say(now, "the old primary is being stopped", fx);
        self.step(now, Step::Stopping { question }, Some(STOP_LIMIT), fx);
    }

    /// A checkpoint of many GB takes its time: what the peer is at, by its own pulses.
    pub(in crate::engine::guard) fn tell_preparing(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        if self.peer.heard.is_none_or(|at| now.boot >= at + SILENCE_LIMIT) {
            let why = format!("{} fell silent; `promote` run again will fail over", self.setup.peer);
            self.fail_takeover(now, 1, &why, fx);
            return;
        }
        let at_it = self.peer.state.as_ref().and_then(|p| p.handing_over.clone());
        let word = at_it.filter(|(attempt, _)| *attempt == t.id).map(|(_, word)| word).unwrap_or_default();
        let (since, next) = match &t.told {
            Some((told, since, next)) if *told == word => (*since, *next),
            _ => (now.boot, now.boot),
        };
        // Its answer was lost: clients are not to wait for our patience.
        let limit = match word.as_str() {
            "" => Some(BEGIN_LIMIT),
            CLIENTS_HELD => Some(PEER_LIMIT),
            _ => None,
        };
        if limit.is_some_and(|limit| now.boot >= since + limit) {
            let why = format!("{} is not preparing, or its answer was lost; try again", self.setup.peer);
            self.fail_takeover(now, 1, &why, fx);
            return;
        }
        let due = now.boot >= next;
        if let Some(t) = &mut self.takeover {
            t.told = Some((word.clone(), since, if due { now.boot + TELL_EVERY } else { next }));
        }
        if !due || word.is_empty() {
            return;
        }
        let text = match now.boot.since(since).as_secs() {
            0 => format!("{}: {word}", self.setup.peer),
            seconds => format!("{}: {word} ({seconds} s)", self.setup.peer),
        };
        self.say(now, &text, fx);
    }
}
