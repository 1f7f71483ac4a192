//! Synchronous or alone (R4): the list in PostgreSQL always agrees with the record, and the record comes first on the
//! way down and last on the way up. Also R6's wait after a start.

use super::alone::StandbyMemory;
use super::record::{JobEnd, Purpose};
use super::{Guard, PgOwner, Then};
use crate::base::ids::{Lsn, NodeName};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::report::{PgReport, StandbyRow};
use crate::engine::setup::Mode;
use crate::engine::status::Role;
use crate::engine::turn::{Effect, Now, PeerAnswer, PgOutput, PgTask, Ticket};

/// How long the standby may take to confirm that it has flushed and replayed past the barrier.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);
/// Pause after a failed attempt to arm.
const ARM_AGAIN: Duration = Duration::from_secs(2);
/// How long a rejoin waits for a record or a PostgreSQL that is busy.
const REJOIN_WAITS: Duration = Duration::from_secs(10);
/// Looks that come sooner after one another than this count once: what the peer said is the same.
const AHEAD_APART: Duration = Duration::from_millis(240);
/// Looks in a row at which the standby was ahead before this primary fences itself.
const AHEAD_LOOKS: u32 = 3;

/// Who asked to go alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AloneFor {
    Takeover,
    /// The standby is lost.
    Silence,
    Rejoin {
        ticket: Ticket,
        id: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) enum Phase {
    #[default]
    Idle,
    /// Correcting a list that disagrees with the record.
    Correcting,
    /// It was put right while the record says that commits wait: whether they do.
    Proving,
    Naming,
    Barrier,
    Confirming {
        lsn: Lsn,
        until: Instant,
    },
    /// What is written down before an update to `sync=<peer>` is sent: from then on it may land.
    Intending,
    RecordingSync {
        /// No earlier update to `sync=<peer>` was in doubt.
        clean: bool,
    },
    Disarming,
    /// Without a marker: the peer is asked to acknowledge that this node goes alone.
    AskingPeer {
        question: u64,
    },
    RecordingAlone(AloneFor),
    Emptying(AloneFor),
    Preparing {
        ticket: Ticket,
        id: u64,
    },
}

/// Where the change between synchronous and alone stands.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct Durability {
    pub(super) phase: Phase,
    pub(super) retry_at: Instant,
    /// A rejoin of the peer that waits until the record is free: whom to answer, its number, until when.
    rejoin_waits: Option<(Ticket, u64, Instant)>,
    pub(super) confirmed_at: Instant,
    pub(super) clean: bool,
    /// P6: the list was wrong while the record names the standby, and it was not proven since that commits wait.
    unproven: bool,
    pub(super) standby: StandbyMemory,
}

impl Guard {
    /// The one walsender that is our standby; none when two carry its name (S11).
    pub(super) fn standby_row(&self) -> Option<&StandbyRow> {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up)?;
        let mut rows = report.standbys.iter().filter(|r| r.application_name == self.setup.peer.as_str());
        let row = rows.next()?;
        rows.next().is_none().then_some(row)
    }

    /// The replication role and the peer's slot are there for this start of PostgreSQL.
    pub(super) fn is_prepared(&self) -> bool {
        let start = self.pg.report.as_ref().map(|r| r.start);
        self.pg.up && start.is_some() && self.pg.prepared_start == start && self.pg.task.is_none()
    }

    fn standby_streams(&self) -> bool {
        self.standby_row().is_some_and(|r| r.state == "streaming")
    }

    /// A promote on the voter peer would lose nothing now, as far as this node can see.
    pub(super) fn in_sync(&self) -> bool {
        if !self.setup.synchronous {
            return false;
        }
        let unmarked = self.setup.mode != Mode::Update;
        if unmarked && self.durable.complete == self.durable.won && self.fenced().is_some() {
            // The word of a former holder (R4 without a marker): all it acknowledged had to wait for the peer.
            return self.durable.sync.as_ref() == Some(&self.setup.peer);
        }
        let Some(report) = self.pg.report.as_ref().filter(|_| self.pg.up) else { return false };
        if self.durable.is_holder() {
            let named = self.record_sync() == Some(Some(self.setup.peer.clone()));
            let listed = listed(&report.sync_list) == Listed::One(self.setup.peer.as_str());
            let row = self
                .standby_row()
                .is_some_and(|r| r.state == "streaming" && (r.sync_state == "sync" || r.sync_state == "quorum"));
            return named && listed && row && !report.in_recovery && !self.durability.standby.lost;
        }
        let named = self.witness.marker.as_ref().is_some_and(|m| m.sync.as_ref() == Some(&self.setup.me)) || unmarked;
        named && report.streaming && self.peer.state.as_ref().is_some_and(|p| p.in_sync)
    }

    /// R1: why the list in force does not agree with the record, else `None`.
    pub(super) fn list_disagrees(&self, report: &PgReport) -> Option<String> {
        let list = listed(&report.sync_list);
        let agrees = match self.record_sync() {
            None => return Some("what the record says of synchronous standbys is not known yet".to_owned()),
            Some(None) => (list == Listed::Empty && !self.blocks()) || list == Listed::One(self.setup.peer.as_str()),
            Some(Some(name)) => list == Listed::One(name.as_str()) && !self.durability.unproven,
        };
        (!agrees).then(|| "synchronous_standby_names does not agree with the record; it is being set".to_owned())
    }

    /// `sync=` of our epoch.
    pub(super) fn record_sync(&self) -> Option<Option<NodeName>> {
        match self.setup.mode {
            Mode::Update => self.witness.sync.clone(),
            Mode::Observe | Mode::VipOnly => Some(self.durable.sync.clone()),
        }
    }

    pub(super) fn on_pg_observed(&mut self, now: Now, asked: Instant, mut report: PgReport, fx: &mut Vec<Effect>) {
        if asked < self.pg.look_from {
            return;
        }
        let new_start = self.pg.report.as_ref().is_none_or(|r| r.start != report.start) || !self.pg.up;
        if new_start {
            self.pg.barrier = None;
            self.pg.barrier_passed = false;
            self.pg.ahead = 0;
        }
        if let Some(before) = self.pg.report.as_ref().filter(|_| !new_start && report.in_recovery) {
            // Without a walreceiver a standby tells the timeline that it has replayed; it never goes back.
            report.timeline = report.timeline.max(before.timeline);
        }
        if !self.pg.up {
            let what = if report.in_recovery { "a standby" } else { "a primary" };
            self.note(now, fx, "postgres_up", format!("PostgreSQL is up as {what}, timeline {}", report.timeline));
        }
        let grew = self.pg.report.as_ref().is_some_and(|r| r.streaming && report.streaming && r.lsn < report.lsn);
        if grew && report.in_recovery {
            self.peer.wal_heard = Some(now.boot);
        }
        self.pg.up = true;
        self.pg.error = None;
        self.pg_answered(asked);
        // Whoever stops it from here on is obeyed.
        self.pg.start_refused = false;
        self.pg_present = true;
        if !report.in_recovery && self.pg.barrier.is_none() {
            self.pg.barrier = Some(report.lsn);
        }
        self.pg.report = Some(report);
        self.check_ahead(now, fx);
        self.watch_standby(now, asked, fx);
        let alone = !self.setup.synchronous || self.record_sync() == Some(None);
        if let Some(barrier) = self.pg.barrier {
            let flushed = self.standby_row().and_then(|r| r.flush_lsn).is_some_and(|lsn| lsn >= barrier);
            if flushed && self.standby_streams() {
                self.pg.barrier_passed = true;
                self.witness.restored = None;
            } else if alone && self.peer.settled && self.lost_wal().is_none() {
                // A record that says "alone" does not bring back what is missing here.
                self.pg.barrier_passed = true;
            }
        }
        self.peer.lsn_before = self
            .peer
            .state
            .as_ref()
            .and_then(|p| p.pg.as_ref())
            .and_then(|pg| (pg.in_recovery && pg.streaming).then_some((pg.timeline, pg.lsn)));
    }

    /// R6: a standby that is ahead means that this primary lost WAL. Its position is the one known at the look
    /// before, so that ours is surely the later reading.
    fn check_ahead(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(report) = &self.pg.report else { return };
        if report.in_recovery || self.pg.barrier_passed || !self.durable.is_holder() {
            self.pg.ahead = 0;
            return;
        }
        match self.peer.lsn_before {
            Some((timeline, lsn)) if timeline == report.timeline && lsn > report.lsn => {
                if now.boot >= self.pg.ahead_from {
                    self.pg.ahead += 1;
                    self.pg.ahead_from = now.boot + AHEAD_APART;
                }
            }
            _ => self.pg.ahead = 0,
        }
        if self.pg.ahead >= AHEAD_LOOKS && self.fenced().is_none() {
            let reason = format!("{} is ahead of this primary, which has lost WAL; promote there", self.setup.peer);
            self.fence(now, self.durable.complete.next(), reason, fx);
        }
    }

    pub(super) fn on_pg_lost(&mut self, now: Now, why: String, fx: &mut Vec<Effect>) {
        if self.pg.up {
            self.note(now, fx, "postgres_down", format!("the local PostgreSQL is gone: {why}"));
        }
        self.pg.up = false;
        self.pg.error = Some(why);
        self.pg.barrier = None;
        self.pg.barrier_passed = false;
        self.forget_silence();
    }

    /// Observe mode: what the journal says of `sync=` is durable (or is not).
    pub(super) fn on_sync_journaled(&mut self, now: Now, result: Result<(), String>, fx: &mut Vec<Effect>) {
        match (self.durability.phase, result) {
            (Phase::RecordingAlone(by), Ok(())) => self.empty_list(now, by, fx),
            (Phase::RecordingAlone(by), Err(why)) => {
                self.durability.phase = Phase::Idle;
                self.alone_done(now, by, Err(why), fx);
            }
            (Phase::RecordingSync { .. }, Ok(())) => {
                self.synchronous_again(now, fx);
            }
            (Phase::RecordingSync { .. }, Err(_)) => {
                self.durability.phase = Phase::Idle;
                self.durability.retry_at = now.boot + ARM_AGAIN;
            }
            _ => {}
        }
    }

    pub(super) fn on_sync_recorded(&mut self, now: Now, end: JobEnd, fx: &mut Vec<Effect>) {
        match (self.durability.phase, end) {
            (Phase::RecordingAlone(by), JobEnd::Settled(_)) => self.empty_list(now, by, fx),
            (Phase::RecordingAlone(by), JobEnd::Changed(why) | JobEnd::NotWritten(why) | JobEnd::Unknown(why)) => {
                self.durability.phase = Phase::Idle;
                self.alone_done(now, by, Err(why), fx);
            }
            (Phase::RecordingSync { .. }, JobEnd::Settled(_)) => {
                self.synchronous_again(now, fx);
            }
            (Phase::RecordingSync { .. }, JobEnd::Unknown(_))
            | (Phase::RecordingSync { clean: false }, JobEnd::Changed(_) | JobEnd::NotWritten(_)) => {
                // The list stays: one of our updates may land at any time (P5). What settles it is another update.
                self.durability.phase = Phase::Idle;
                self.durability.retry_at = now.boot + ARM_AGAIN;
            }
            (Phase::RecordingSync { clean: true }, JobEnd::Changed(_) | JobEnd::NotWritten(_)) => {
                self.durability.phase = Phase::Disarming;
                self.durability.retry_at = now.boot + ARM_AGAIN;
                let (epoch, seq, since) = (self.durable.won, self.durable.seq, now.rfc3339());
                self.record(fx, vec![Entry::Sync { epoch, seq, sync: None, since }], Then::Nothing);
                if self.setup.block || !self.pg_task(PgOwner::Durability, PgTask::SetSyncList(None), fx) {
                    self.durability.phase = Phase::Idle;
                }
            }
            _ => {}
        }
    }

    fn synchronous_again(&mut self, now: Now, fx: &mut Vec<Effect>) {
        self.durability.phase = Phase::Idle;
        self.durability.standby.armed(now);
        let text = format!("synchronous again: {} confirms every commit", self.setup.peer);
        self.note(now, fx, "in_sync", text);
    }

    pub(super) fn alone_done(&mut self, now: Now, by: AloneFor, result: Result<(), String>, fx: &mut Vec<Effect>) {
        match by {
            AloneFor::Takeover => self.on_takeover_alone(now, result, fx),
            AloneFor::Silence => self.on_silence_alone(now, result, fx),
            AloneFor::Rejoin { ticket, id } => match result {
                Ok(()) => {
                    self.durability.phase = Phase::Preparing { ticket, id };
                    self.pg_task_next(PgOwner::Durability, PgTask::PrepareStandby, fx);
                }
                Err(why) => {
                    let why = format!("the active node cannot record sync=none: {why}");
                    fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why }) });
                }
            },
        }
    }

    pub(super) fn on_durability_pg(&mut self, now: Now, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let phase = self.durability.phase;
        match (phase, result) {
            (Phase::Naming, Ok(_)) => {
                self.durability.phase = Phase::Barrier;
                self.pg_task_next(PgOwner::Durability, PgTask::RearmBarrier, fx);
            }
            (Phase::Proving, Ok(_)) => {
                self.durability.phase = Phase::Idle;
                self.durability.unproven = false;
            }
            (Phase::Barrier, Ok(PgOutput::Lsn(lsn))) => {
                self.durability.unproven = false;
                self.durability.phase = Phase::Confirming { lsn, until: now.boot + CONFIRM_LIMIT };
            }
            (Phase::Emptying(by), result) => {
                self.durability.phase = Phase::Idle;
                self.alone_done(now, by, result.map(|_| ()), fx);
            }
            (Phase::Preparing { ticket, id }, result) => {
                self.durability.phase = Phase::Idle;
                let answer = match result {
                    Ok(PgOutput::Source(source)) => {
                        self.pg.prepared_start = self.pg.report.as_ref().map(|r| r.start);
                        self.durability.standby.forgive();
                        PeerAnswer::Prepared { id, source }
                    }
                    Ok(_) => PeerAnswer::Refused { why: "the active node does not know its own size".to_owned() },
                    Err(why) => PeerAnswer::Refused { why },
                };
                fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
            }
            (_, Err(why)) => {
                self.durability.phase = Phase::Idle;
                self.durability.retry_at = now.boot + ARM_AGAIN;
                self.note(now, fx, "durability_failed", why);
            }
            (_, Ok(_)) => self.durability.phase = Phase::Idle,
        }
    }

    /// Keeps list and record together, and arms when the standby streams.
    pub(super) fn advance_durability(&mut self, now: Now, fx: &mut Vec<Effect>) {
        self.try_waiting_rejoin(now, fx);
        self.advance_alone(now, fx);
        match self.durability.phase {
            Phase::Confirming { lsn, until } => self.confirm(now, lsn, until, fx),
            Phase::Idle => self.begin_durability(now, fx),
            _ => {}
        }
    }

    fn confirm(&mut self, now: Now, lsn: Lsn, until: Instant, fx: &mut Vec<Effect>) {
        let Some(report) = &self.pg.report else { return };
        let confirmed = self.peer.state.as_ref().and_then(|p| p.pg.as_ref()).is_some_and(|pg| {
            !self.peer.state.as_ref().is_some_and(|p| p.rejoining)
                && pg.streaming
                && pg.system_id == report.system_id
                && pg.timeline == report.timeline
                && pg.lsn >= lsn
                && pg.replay_lsn.is_some_and(|replay| replay >= lsn)
        });
        if confirmed && self.gate.open {
            let peer = self.peer_name();
            if self.setup.mode != Mode::Update {
                let (epoch, seq, since) = (self.durable.won, self.durable.seq + 1, now.rfc3339());
                self.durability.phase = Phase::RecordingSync { clean: false };
                self.record(fx, vec![Entry::Sync { epoch, seq, sync: Some(peer), since }], Then::Durability);
            } else if self.job.is_none() {
                // P5: *never because it read one*. From here on a late update of ours may say sync=<peer>, also after a
                // restart; only a later update of ours to sync=none lets the list be emptied again.
                self.durability.phase = Phase::Intending;
                self.durability.clean = self.durable.sync.is_none();
                let (epoch, seq, since) = (self.durable.won, self.durable.seq, now.rfc3339());
                self.record(fx, vec![Entry::Sync { epoch, seq, sync: Some(peer), since }], Then::Arm);
            }
        } else if now.boot >= until || !self.durable.is_holder() || self.fenced().is_some() {
            self.durability.retry_at = now.boot + ARM_AGAIN;
            self.durability.phase = Phase::Idle;
        }
    }

    /// The intent is on disk (or could not be written): send the update.
    pub(super) fn on_arm_recorded(&mut self, now: Now, written: bool, fx: &mut Vec<Effect>) {
        if self.durability.phase != Phase::Intending {
            return;
        }
        let (clean, peer) = (self.durability.clean, self.peer_name());
        let able = written && self.gate.open && self.handover.is_none() && self.takeover.is_none();
        if able && self.start_job(now, Purpose::Sync(Some(peer)), fx) {
            self.durability.phase = Phase::RecordingSync { clean };
        } else {
            self.durability.phase = Phase::Idle;
            self.durability.retry_at = now.boot + ARM_AGAIN;
        }
    }

    fn begin_durability(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let busy = self.pg.task.is_some() || self.takeover.is_some() || self.handover.is_some() || self.job.is_some();
        if busy || now.boot < self.durability.retry_at || !self.durable.is_holder() || self.fenced().is_some() {
            return;
        }
        let Some(report) = self.pg.report.as_ref().filter(|r| self.pg.up && !r.in_recovery) else { return };
        let Some(record) = self.record_sync() else { return };
        let list = listed(&report.sync_list);
        let peer = self.peer_name();
        let peer_ready = self.peer.state.as_ref().is_some_and(|p| {
            let streams = p.pg.as_ref().is_some_and(|pg| pg.streaming && pg.system_id == report.system_id);
            streams && p.adopted && !p.rejoining
        });
        let steady = self.durability.standby.is_steady(now);
        let ready = self.standby_streams() && self.is_prepared() && peer_ready && steady;
        let wanted = match &record {
            Some(name) if list != Listed::One(name.as_str()) => Some((Phase::Correcting, Some(name.clone()))),
            Some(_) if self.durability.unproven => {
                self.durability.phase = Phase::Proving;
                self.pg_task_next(PgOwner::Durability, PgTask::RearmBarrier, fx);
                return;
            }
            Some(_) => None,
            None if !self.setup.synchronous && !self.blocks() => {
                (list != Listed::Empty).then_some((Phase::Correcting, None))
            }
            None if ready && self.gate.open && self.setup.synchronous => Some((Phase::Naming, Some(peer))),
            None if self.blocks() => (list != Listed::One(peer.as_str())).then_some((Phase::Correcting, Some(peer))),
            // Under sync=none a name is left alone only while its standby streams; ours was the update that says so.
            None if list != Listed::Empty
                && self.durable.sync.is_none()
                && !self.standby_streams()
                && self.stays_together(now).is_none() =>
            {
                Some((Phase::Correcting, None))
            }
            None => None,
        };
        if let Some((phase, name)) = wanted {
            self.durability.unproven |= record.is_some();
            if phase == Phase::Naming {
                self.durability.standby.armed(now);
            }
            self.durability.phase = phase;
            self.pg_task_next(PgOwner::Durability, PgTask::SetSyncList(name), fx);
        }
    }

    /// The active node's part of a rejoin: record first, then the list, then role and slot.
    pub(super) fn on_prepare_rejoin(&mut self, now: Now, ticket: Ticket, id: u64, fx: &mut Vec<Effect>) {
        let refuse =
            |why: &str| Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why: why.to_owned() }) };
        if !self.may_be_joined() {
            fx.push(refuse("this node is not the active one, or its gate is not open"));
        } else if self.takeover.is_some() || self.handover.is_some() {
            fx.push(refuse("another procedure is under way here"));
        } else if !self.go_alone_for_rejoin(now, ticket, id, fx) {
            // A record or a list on its way, or role and slot after a promote: it is over in a moment.
            self.durability.rejoin_waits = Some((ticket, id, now.boot + REJOIN_WAITS));
        }
    }

    /// Who asks is the one that commits were to wait for: an arming under way is given up, not waited for.
    fn go_alone_for_rejoin(&mut self, now: Now, ticket: Ticket, id: u64, fx: &mut Vec<Effect>) -> bool {
        self.give_up_arming(now, "the standby is being rejoined", fx);
        self.go_alone(now, AloneFor::Rejoin { ticket, id }, fx)
    }

    /// It serves; or, where it never goes alone, it would if it had a standby (R6), which only a rejoin may bring back.
    pub(super) fn may_be_joined(&self) -> bool {
        let primary = self.pg.up && self.pg.report.as_ref().is_some_and(|r| !r.in_recovery);
        let waits = self.blocks() && primary && self.role() == Role::Active;
        self.durable.is_holder() && (self.gate.open || waits)
    }

    /// A rejoin that came while the record or PostgreSQL was busy.
    fn try_waiting_rejoin(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some((ticket, id, until)) = self.durability.rejoin_waits else { return };
        let able = self.may_be_joined() && self.takeover.is_none() && self.handover.is_none();
        if able && self.go_alone_for_rejoin(now, ticket, id, fx) {
            self.durability.rejoin_waits = None;
        } else if now.boot >= until {
            self.durability.rejoin_waits = None;
            let why = "the active node is busy with its record; try again in a few seconds".to_owned();
            fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why }) });
        }
    }
}

/// What `synchronous_standby_names` amounts to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Listed<'a> {
    Empty,
    One(&'a str),
    /// Anything the daemon never writes.
    Other,
}

pub(super) fn listed(list: &str) -> Listed<'_> {
    let list = list.trim();
    if list.is_empty() {
        return Listed::Empty;
    }
    let name = list.strip_prefix('"').and_then(|l| l.strip_suffix('"')).unwrap_or(list);
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if plain { Listed::One(name) } else { Listed::Other }
}
