//! A takeover where no marker at a witness decides it: the record is edited by a person (observe mode), or there is
//! only a VIP and the peer's word (R3).
//!
//! **Invariant:** with a VIP alone nothing is won before the peer has consented, or was switched off after this node
//! had durably refused; what would be lost is judged again at that moment.

use super::Guard;
use super::judge::Loss;
use super::takeover::Step;
use crate::base::ids::OpId;
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::evidence::Verdict;
use crate::engine::turn::{Effect, Now};

/// How long `fence.stonith` may take: a management board that answers slowly, and a machine that powers off.
const STONITH_LIMIT: Duration = Duration::from_secs(90);

impl Guard {
    /// Observe mode: every configured authority shows us, and, asked `propagation` later, still does. Only questions
    /// sent after this node refused count, and one that does not answer counts as still showing the other node.
    pub(super) fn watch_authorities(&mut self, now: Now, all_since: Option<Instant>, fx: &mut Vec<Effect>) {
        if let Some(why) = self.overtaken() {
            self.fail_takeover(now, 1, &why, fx);
            return;
        }
        let Some(refused_at) = self.takeover.as_ref().map(|t| t.refused_at) else { return };
        let shown = |since: Instant| {
            let mut servers = self.witness.servers.iter();
            servers.all(|s| {
                let here = s.error.is_none() && s.verdict == Some(Verdict::Here);
                here && s.asked.is_some_and(|asked| asked >= since)
            })
        };
        let since = shown(refused_at).then(|| all_since.unwrap_or(now.boot));
        let enough = since.is_some_and(|since| shown(since + self.setup.propagation));
        let Some(t) = &mut self.takeover else { return };
        t.step = Step::Watching { all_since: since };
        if enough {
            if self.consent_is_doubtful(now) {
                let peer = &self.setup.peer;
                let why =
                    format!("{peer}, which consented, is not heard any more and may serve again; run promote again");
                self.fail_takeover(now, 1, &why, fx);
                return;
            }
            let Some(epoch) = self.takeover.as_ref().map(|t| t.epoch) else { return };
            self.proofs.void();
            self.witness.forget(now.boot);
            self.say(now, "every authority shows this node", fx);
            self.step(now, Step::Winning, None, fx);
            let (seq, since) = (self.durable.seq + 1, now.rfc3339());
            let won = Entry::Won { epoch, seq, loss: false, old_lease_ms: 0 };
            self.record_attempt(vec![won, Entry::Sync { epoch, seq, sync: None, since }], fx);
        }
    }

    /// Without compare-and-swap a consent counts only while its giver is heard to stand by it: it may have been
    /// promoted again under the same number meanwhile. A person who accepts loss waits W instead.
    fn consent_is_doubtful(&mut self, now: Now) -> bool {
        let reachable = self.peer_reachable(now);
        let peer = self.peer.state.as_ref().filter(|_| reachable);
        let Some(t) = &mut self.takeover else { return false };
        if !t.consented || !t.consent_asked || peer.is_some_and(|p| p.fence >= t.epoch && p.won < t.epoch) {
            return false;
        }
        if t.accept_data_loss {
            (t.consented, t.handed_over) = (false, false);
        }
        !t.accept_data_loss
    }

    /// R2 with a VIP alone: the peer's durable acknowledgement (its consent), or it is surely off.
    pub(super) fn take_without_witness(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        if t.consented {
            self.win_without_witness(now, fx);
        } else if t.peer_is_off {
            if self.heard_within_wait(now, false) {
                let why = format!("refused: {} was heard less than W ago: it is not off", self.setup.peer);
                self.fail_takeover(now, 3, &why, fx);
                return;
            }
            self.say(now, &format!("{} is off, as you say", self.setup.peer), fx);
            self.surely_off(now, fx);
        } else if self.setup.stonith {
            let op = self.stonith(fx);
            self.say(now, &format!("fence.stonith switches {} off", self.setup.peer), fx);
            self.step(now, Step::SwitchingOff { op }, Some(STONITH_LIMIT), fx);
        } else {
            let why = format!("refused: {} has not consented", self.setup.peer);
            self.fail_takeover(now, 3, &why, fx);
        }
    }

    fn surely_off(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if let Some(t) = &mut self.takeover {
            t.off = true;
        }
        self.win_without_witness(now, fx);
    }

    fn win_without_witness(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if let Some(why) = self.overtaken() {
            self.fail_takeover(now, 1, &why, fx);
            return;
        }
        let Some(t) = &self.takeover else { return };
        let (epoch, accept, planned, alive) = (t.epoch, t.accept_data_loss, t.handed_over && t.consented, t.consented);
        let loss = match self.pg.report.as_ref().filter(|_| self.pg.up) {
            Some(report) => self.judge_unmarked(report, planned, alive),
            None => Loss::NotPromotable("the local PostgreSQL is not up any more".to_owned()),
        };
        let why = match loss {
            Loss::None(_) => None,
            Loss::Possible(_) if accept => None,
            Loss::Possible(why) | Loss::NotPromotable(why) => Some(why),
        };
        if let Some(why) = why {
            let why = format!("what would be lost changed meanwhile: {why}; run promote again to judge it anew");
            self.fail_takeover(now, 1, &why, fx);
            return;
        }
        self.proofs.void();
        self.say(now, &format!("epoch {epoch} is ours"), fx);
        self.step(now, Step::Winning, None, fx);
        let (seq, since) = (self.durable.seq + 1, now.rfc3339());
        let won = Entry::Won { epoch, seq, loss: false, old_lease_ms: 0 };
        let mut entries = vec![won, Entry::Sync { epoch, seq, sync: None, since }];
        entries.extend((!alive).then_some(Entry::Unheard { epoch }));
        self.record_attempt(entries, fx);
    }

    /// Has `fence.stonith` switch the peer off.
    pub(super) fn stonith(&mut self, fx: &mut Vec<Effect>) -> OpId {
        let op = OpId(self.id());
        fx.push(Effect::Stonith { op, node: self.setup.peer.clone() });
        op
    }

    pub(super) fn on_stonith(&mut self, now: Now, op: OpId, result: Result<(), String>, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        let peer = self.setup.peer.clone();
        match (&t.step, result) {
            (Step::SwitchingOff { op: waiting }, Ok(())) if *waiting == op => {
                self.note(now, fx, "stonith", format!("fence.stonith: {peer} is surely off"));
                self.surely_off(now, fx);
            }
            (Step::SwitchingOff { op: waiting }, Err(why)) if *waiting == op => {
                let why = format!("refused: fence.stonith failed ({why}), so {peer} may still serve");
                self.fail_takeover(now, 3, &why, fx);
            }
            (Step::WaitingOut { .. }, Ok(())) if t.stonith == Some(op) => {
                t.off = true;
                t.step = Step::WaitingOut { until: now.boot, said: 0 };
                self.note(now, fx, "stonith", format!("fence.stonith: {peer} is surely off"));
                self.say(now, &format!("{peer} is surely off (fence.stonith)"), fx);
            }
            (Step::WaitingOut { .. }, Err(why)) if t.stonith == Some(op) => {
                self.say(now, &format!("fence.stonith failed ({why}); waiting W all the same"), fx);
                self.note(now, fx, "stonith_failed", why);
            }
            _ => {}
        }
    }
}
