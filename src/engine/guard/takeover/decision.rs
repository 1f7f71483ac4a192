//! The taking side's decision: what was heard, what is at stake, whether it may begin (R2, R4, design.md section 5).
//!
//! What it is NOT: it changes nothing durable before [`Guard::begin_refusing`].

use super::{ASKING_LIMIT, DEMOTION_LIMIT, Kind, PREPARE_LIMIT, Step};
use crate::base::config::FencePostgres;
use crate::base::ids::Epoch;
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::evidence;
use crate::engine::guard::judge::Loss;
use crate::engine::guard::proofs::{PEER_LIMIT, PeerAskedFor};
use crate::engine::guard::{Guard, PgOwner};
use crate::engine::setup::Mode;
use crate::engine::status::Role;
use crate::engine::turn::{Effect, Now, PeerQuestion, PgTask};

/// How often it is looked whether PostgreSQL has been seen.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Guard {
    /// Both answers are in, or their time is over: decide what this is.
    pub(in crate::engine::guard) fn when_asked(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let Step::Asking { peer, witness, alive } = t.step.clone() else { return };
        let witness_until = t.started + ASKING_LIMIT;
        let waits_for_peer = peer.is_some() && now.boot < t.peer_until;
        if waits_for_peer || witness.is_some() && now.boot < witness_until {
            let deadline = if waits_for_peer { t.peer_until } else { witness_until };
            if let Some(t) = &mut self.takeover {
                t.deadline = Some(deadline);
            }
            return;
        }
        if self.start_for_takeover(now, fx) {
            return;
        }
        // A demotion under way (fence, then unfence at once) is waited for rather than complained about.
        let demoting = matches!(self.pg.task, Some((_, PgOwner::Demotion | PgOwner::Follow)));
        // A daemon that has just started has not looked yet: that is no reason to refuse.
        let unseen = !self.pg.up && (self.pg.demoted || self.pg.error.is_none() && self.pg_present);
        if let Some(t) = &mut self.takeover
            && ((demoting && now.boot < t.started + DEMOTION_LIMIT)
                || (unseen && now.boot < t.started.max(self.pg.look_from) + PEER_LIMIT * 2))
        {
            t.deadline = Some(now.boot + LOOK_AGAIN);
            return;
        }
        if self.waits_for_look(now, alive) {
            if let Some(t) = &mut self.takeover {
                t.deadline = Some(now.boot + LOOK_AGAIN);
            }
            return;
        }
        if self.durable.is_holder() && self.gate.open {
            let text = format!("{} is already active at epoch {}", self.setup.me, self.durable.complete);
            if let Some(t) = &mut self.takeover {
                t.flag = Some("already_active");
            }
            self.end_takeover(now, 0, &text, fx);
            return;
        }
        self.judge_takeover(now, alive, fx);
    }

    /// Whether PostgreSQL here answers is found out before anybody is held for it: by a look that began after the
    /// command, or (a failover, where every moment counts) by the silence of the last one.
    fn waits_for_look(&self, now: Now, alive: bool) -> bool {
        let Some(t) = &self.takeover else { return false };
        let fresh = self.pg.silence.answered >= t.started;
        let wanted = self.is_silent() || (self.pg.up && (alive || t.dry_run));
        wanted && !fresh && now.boot < t.started + PEER_LIMIT * 2
    }

    /// A PostgreSQL that the fence stopped, or that its unit was refused, is started as a standby of nobody: without it
    /// there is nothing to judge and nothing to promote.
    pub(in crate::engine::guard) fn start_for_takeover(&mut self, now: Now, fx: &mut Vec<Effect>) -> bool {
        let Some(t) = &self.takeover else { return false };
        // An ordinary standby that is down is not ours to turn into a standby of nobody, and one that recovers from a
        // crash comes up by itself; nothing is touched before a person has confirmed.
        let wanted = self.fenced().is_some() || self.pg.start_refused;
        let confirmed = t.yes || t.kind == Kind::Unfence;
        let stopped = wanted && !self.pg.up && self.pg_present;
        let seen_down = self.pg.error.is_some() || self.setup.fence_postgres == FencePostgres::Stop;
        if t.dry_run || !confirmed || t.kind == Kind::Switchover || !stopped || !seen_down || self.pg.demoted_to_start {
            return false;
        }
        self.pg.demoted_to_start = true;
        self.say(now, "PostgreSQL here is down; starting it read-only", fx);
        self.pg_task(PgOwner::Demotion, PgTask::Demote { follow_peer: false }, fx);
        if let Some(t) = &mut self.takeover {
            t.deadline = Some(now.boot + Duration::from_millis(200));
        }
        true
    }

    pub(in crate::engine::guard) fn judge_takeover(&mut self, now: Now, alive: bool, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let (kind, dry_run, yes, accept) = (t.kind, t.dry_run, t.yes, t.accept_data_loss);
        let peer_is_off = t.peer_is_off;
        let Some((_, seen)) = t.record.clone() else {
            let why = if t.failure.is_empty() { "no answer".to_owned() } else { t.failure.clone() };
            let text = format!(
                "the witness does not answer ({why}); nothing was changed; bring {} back, --peer-is-off does not \
                 replace the record",
                self.setup.servers.first().map_or("it", String::as_str)
            );
            self.end_takeover(now, 3, &text, fx);
            return;
        };
        let marker = evidence::marker_of(&seen).cloned();
        let peer_state = self.peer.state.clone().filter(|_| alive);
        let mut highest = self.durable.seen.max(self.durable.won).max(marker.as_ref().map_or(Epoch::NONE, |m| m.epoch));
        if let Some(peer) = &peer_state {
            highest = highest.max(peer.won).max(peer.seen);
        }
        let fence = self.fence_now.as_ref().map_or(Epoch::NONE, |(number, _)| *number).max(self.durable.fence);
        let epoch = highest.next().max(fence);
        let peer_serves = peer_state.as_ref().is_some_and(|p| {
            // A fenced primary (`fence.postgres = "keep"`) hands nothing over; it consents.
            let holds = p.complete > Epoch::NONE && p.complete == p.won && p.fence <= p.complete;
            holds && p.role != Role::Fenced && p.pg.as_ref().is_some_and(|pg| !pg.in_recovery)
        });
        // A holder that serves nobody and whose WAL does not come hands nothing over; it consents.
        let serving = peer_state.as_ref().is_some_and(|p| p.gate_open);
        let hung = self.hung_primary(alive).filter(|_| peer_serves);
        let planned = peer_serves
            && hung.is_none()
            && self.pg.report.as_ref().is_some_and(|r| r.in_recovery && self.pg.up && (r.streaming || serving));
        // A record older than an epoch known here (a restored zone) says nothing of what was acknowledged since.
        let stale = marker.as_ref().map_or(Epoch::NONE, |m| m.epoch) < highest && self.durable.complete < highest;
        let stale = stale.then_some(highest);
        let loss = self.judge_loss(&seen, planned, stale, alive);
        for line in self.facts(now, &seen, alive, planned, &loss, epoch) {
            self.say(now, &line, fx);
        }
        // One that stopped half-way is finished by the same command: nobody serves, and the old node says so itself.
        let half_way = self.durable.won > self.durable.complete
            || peer_state.as_ref().is_some_and(|p| p.role == Role::Fenced && !p.gate_open);
        let finishes = alive && half_way && matches!(loss, Loss::None(_));
        let refusal = match (&loss, kind) {
            (Loss::NotPromotable(why), _) => Some(why.clone()),
            (_, Kind::Switchover) if hung.is_some() => Some(format!(
                "PostgreSQL on {0} cannot hand over ({1}); `portcullis promote` here takes over with {0}'s consent",
                self.setup.peer,
                hung.clone().unwrap_or_default()
            )),
            (_, Kind::Switchover) if !planned && !finishes => Some(format!(
                "a switchover needs both nodes alive and serving ({}); `promote` decides by itself which case it is",
                if alive { "the peer is alive but does not serve" } else { "the peer does not answer" }
            )),
            _ if self.setup.mode == Mode::Observe
                && peer_state.as_ref().is_some_and(|p| p.digest != self.setup.digest) =>
            {
                Some(
                    "the configurations of the two nodes differ (nodes, timers or dns.servers); make them one, restart \
                     both daemons"
                        .to_owned(),
                )
            }
            _ if !self.vips.is_empty() && !self.link_up => {
                Some("the link of the VIP's interface is down here, so the VIP could not be bound; mend it".to_owned())
            }
            _ if peer_state.as_ref().is_some_and(|p| p.maintenance) => Some(format!(
                "maintenance is on at {0}, which leaves its PostgreSQL alone; `portcullis maintenance off` there first",
                self.setup.peer
            )),
            (_, Kind::Unfence) => self.unfence_refusal(&seen, alive),
            _ if peer_is_off && self.heard_within_wait(now, alive) => Some(format!(
                "--peer-is-off, but {} was heard less than W ago, or this daemon started since: wait {:.0} s \
                     without a word of it",
                self.setup.peer,
                self.wait().as_secs_f64().ceil()
            )),
            _ if self.setup.mode == Mode::VipOnly && !alive && !peer_is_off && !self.setup.stonith => Some(format!(
                "{peer} does not answer, and without DNS nothing says that it has stopped: switch it off and add \
                 --peer-is-off {peer} (or configure fence.stonith)",
                peer = self.setup.peer
            )),
            _ if planned && !self.pg.report.as_ref().is_some_and(|r| r.streaming) => Some(format!(
                "the standby here does not stream from {} now, so its last write would not arrive; look at `status` \
                 and try again, or rejoin this node",
                self.setup.peer
            )),
            // Without a marker its word counts once it is fenced.
            (Loss::Possible(why), _) if !accept && hung.is_some() && self.setup.mode != Mode::Update => Some(format!(
                "{why}; its PostgreSQL does not answer: `portcullis fence` on {} stops it, then promote again",
                self.setup.peer
            )),
            (Loss::Possible(why), _) if !accept => {
                Some(format!("{why}; to go on all the same: promote --accept-data-loss"))
            }
            _ if kind == Kind::Promote && !yes && !dry_run => {
                Some("not confirmed; add --yes (or answer the question on a terminal)".to_owned())
            }
            _ => None,
        };
        if let Some(why) = refusal {
            if let Some(t) = &mut self.takeover
                && matches!(loss, Loss::Possible(_))
                && kind == Kind::Promote
            {
                t.flag = Some("may_lose");
            }
            self.end_takeover(now, 3, &format!("refused: {why}"), fx);
            return;
        }
        if dry_run {
            let text = format!("would take epoch {epoch}; every check passed, nothing was changed");
            self.end_takeover(now, 0, &text, fx);
            return;
        }
        if let Some(t) = &mut self.takeover {
            t.epoch = epoch;
            t.planned = planned;
            t.void = marker
                .as_ref()
                .is_some_and(|m| m.active == self.setup.me && m.epoch == self.durable.complete && m.epoch == highest);
            t.loss = matches!(loss, Loss::Possible(_));
        }
        if planned {
            let attempt = self.takeover.as_ref().map_or(0, |t| t.id);
            let ask = PeerQuestion::Prepare { attempt, epoch };
            let question = self.ask_peer(now, PeerAskedFor::Takeover, ask, PREPARE_LIMIT, fx);
            if let Some(t) = &mut self.takeover {
                t.prepared = true;
            }
            self.step(now, Step::Preparing { question }, Some(PREPARE_LIMIT), fx);
        } else {
            self.begin_refusing(now, alive, fx);
        }
    }

    /// Anything was heard from the peer within the last W (R2's condition on `--peer-is-off`, S12).
    pub(in crate::engine::guard) fn heard_within_wait(&self, now: Now, alive: bool) -> bool {
        // What was heard in a former life is forgotten, so a start counts as a word of the peer.
        let at = self.peer.heard.max(self.peer.wal_heard).unwrap_or(self.started).max(self.started);
        alive || now.boot < at + self.wait()
    }

    pub(in crate::engine::guard) fn begin_refusing(&mut self, now: Now, alive: bool, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let refuse = Epoch(t.epoch.0.saturating_sub(1));
        self.step(now, Step::Refusing, None, fx);
        if let Some(t) = &mut self.takeover {
            t.refused_before = self.durable.refused;
            // The consent of a peer that is alive replaces the wait.
            t.consent_asked = false;
            t.consented = t.void;
            t.planned = (t.planned || alive) && !t.void;
        }
        self.record_attempt(vec![Entry::Refused { epoch: refuse }], fx);
    }
}
