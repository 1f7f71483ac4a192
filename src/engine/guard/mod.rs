//! The node: role, lease, fence and procedures in one pure state machine.
//!
//! What it is: [`Guard::handle`] takes one event and one reading of the clocks and appends effects; it cannot fail and
//! cannot wait. [`Guard::next_deadline`] says when it wants to be called again. What it is NOT: it does not read a
//! clock, open a socket or write a file, and it keeps nothing that a restart must remember outside [`Durable`].
//!
//! ```text
//!            won by compare-and-swap, complete             proof ran out, or the record says nothing
//!   passive ------------------------------------> active <------------------------------------------> lapsed
//!      ^                                            |   proof for the same epoch returned                |
//!      |  rejoin; a switched-over node follows      | a higher epoch, the record named the peer for W,   |
//!      +------------------ fenced <-----------------+ consent, the operator                              |
//!                            ^---------------------------------------------------------------------------+
//! ```
//!
//! **Invariants** (design.md section 3): the gate is extended only by `decide`, only to the lease's deadline, and only
//! when `standing` finds every condition of R1 true; a cut is always the first effect of its turn; nothing that needs
//! the journal is emitted before `Recorded`. The submodules are rooms of this one machine:
//! `proofs` (witness and peer evidence), `standing` (R1: what opens, suspends and cuts), `fence`, `vip`, `record`
//! (updates and their settling), `durability` and `alone` (R4), `observe` (records edited by hand), `unmarked`
//! (takeovers no marker decides), `word` (under "block", without a marker), `followers` (nodes without a
//! vote), `pledge`, `pause`, `silence`, `units`, `housekeeping`, `takeover` (promote, switchover, unfence), `handover`
//! (the old side of a switchover) and `carry` (its clients), `rejoin`, `forward` (where a passive node's clients go),
//! `view`.

mod alone;
mod carry;
mod commands;
mod durability;
mod fence;
mod followers;
mod forward;
mod handover;
mod housekeeping;
mod judge;
mod observe;
mod pause;
mod pledge;
mod proofs;
mod record;
mod rejoin;
mod silence;
mod standing;
mod takeover;
mod units;
mod unmarked;
mod view;
mod vip;
mod word;

use crate::base::ids::{Epoch, OpId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::lease::Proofs;
use crate::engine::report::PgReport;
use crate::engine::setup::{Mode, Setup};
use crate::engine::status::{Counters, EventRow, GateState};
use crate::engine::turn::{Effect, Event, Now, PeerAnswer, PgOutput, PgTask, Ticket};
use std::collections::VecDeque;

/// How many events `status` remembers; older ones are in the event log on disk.
const EVENTS_MAX: usize = 50;
/// How often a VIP that is bound is renewed and the state is looked at anew.
const RENEW_EVERY: Duration = Duration::from_millis(400);
/// Two turns that only time brings about are at least so far apart.
const TURN_APART: Duration = Duration::from_millis(2);
/// No turn for so long (the driver turns five times a second): neighbours may have forgotten or mistaken the VIP.
const STALL: Duration = Duration::from_secs(1);
/// How long after a failed PostgreSQL task of its own (a demotion) the guard tries again.
const RETRY_AFTER: Duration = Duration::from_secs(3);

/// What continues when entries are durable.
#[derive(Debug, Clone, PartialEq, Hash)]
enum Then {
    Nothing,
    /// Of the attempt with this number: what an abandoned one still writes moves no later one on.
    Takeover {
        attempt: u64,
    },
    Rejoin,
    Durability,
    Arm,
    Fenced {
        tries: u32,
    },
    /// The intent to write this boot into the marker is on disk.
    Boot,
    /// PostgreSQL may be stopped for this attempt.
    Stop {
        attempt: u64,
    },
    /// A command that was only waiting for the disk.
    Said {
        ticket: Ticket,
        text: String,
    },
    Answer {
        ticket: Ticket,
        answer: Box<PeerAnswer>,
    },
}

/// Who waits for a PostgreSQL task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PgOwner {
    Takeover,
    Handover,
    Rejoin,
    /// A rejoin of the peer, which looks at this node first.
    Look,
    Demotion,
    Follow,
    Durability,
    Housekeeping,
    /// Role and slots for a node without a vote that is being rejoined.
    Followers,
    /// The rejoin of such a node, which looks at this one first.
    FollowerLook,
}

/// What is known of the local PostgreSQL.
#[derive(Debug, Clone, Hash, Default)]
struct PgMemory {
    up: bool,
    error: Option<String>,
    report: Option<PgReport>,
    /// Of this start: what the standby must have flushed before a client passes (R6), and whether it has.
    barrier: Option<crate::base::ids::Lsn>,
    barrier_passed: bool,
    /// Consecutive looks at which the standby was ahead of this primary, and from when the next one counts.
    ahead: u32,
    ahead_from: Instant,
    /// The one task under way.
    task: Option<(OpId, PgOwner)>,
    /// What the running task sets the list of synchronous standbys to.
    setting: Option<String>,
    /// The running task stops or starts PostgreSQL: what was seen before says nothing afterwards.
    restarts: bool,
    /// A look that began before the last task ended says nothing.
    look_from: Instant,
    /// Tasks that wait for it to end: at most one per owner.
    next: VecDeque<(OpId, PgOwner, PgTask)>,
    retry_at: Instant,
    /// Demoted once in this life: an operator who stops it afterwards is obeyed.
    demoted: bool,
    /// Started read-only once for a promote or unfence of a node whose fence stops PostgreSQL.
    demoted_to_start: bool,
    /// Demoted to follow the winner of a switchover.
    following: bool,
    consented_at: Instant,
    /// The last one that was consented to in this life.
    consented_attempt: Option<u64>,
    prepared_start: Option<u64>,
    adopted: bool,
    /// The rejoin of the peer that asked for a look: whom to answer, and its number.
    look_for: Option<(Ticket, u64)>,
    /// The start that was last told to promote: it may do so long after whoever told it gave up.
    told_to_promote: Option<u64>,
    /// `may-start-primary` refused it: the daemon starts it once proof has come (R6).
    start_refused: bool,
    silence: silence::Silence,
    /// What its last failure was told as, while it goes on.
    failed_as: Option<String>,
}

/// The gate as the guard last set it.
#[derive(Debug, Clone)]
struct GateMemory {
    open: bool,
    until: Instant,
    paused: bool,
    /// By an operator: the end of a switchover does not let clients go.
    held: bool,
    /// Since when only PostgreSQL is missing: nothing passes, and clients that wait for nothing of it stay.
    suspended: Option<Instant>,
    state: GateState,
    reason: String,
    sessions: u64,
}

/// The whole node.
#[derive(Debug, Clone)]
pub struct Guard {
    setup: Setup,
    durable: Durable,
    next_seq: u64,
    next_id: u64,
    writing: VecDeque<(u64, Vec<Entry>, Then)>,
    /// A fence that is true although it may not be written yet.
    fence_now: Option<(Epoch, String)>,
    fence_retry: Option<(Instant, Vec<Entry>, u32)>,
    /// When this life began.
    started: Instant,
    /// The reading of this turn.
    at: Now,
    poll_at: Instant,
    renew_at: Instant,
    witness: proofs::WitnessMemory,
    proofs: Proofs,
    /// A proof asked for before this moment counts for nothing: this machine was paused.
    proofs_from: Instant,
    peer: proofs::PeerMemory,
    pg: PgMemory,
    pg_present: bool,
    vips: Vec<vip::VipMemory>,
    link_up: bool,
    gate: GateMemory,
    job: Option<record::RecordJob>,
    durability: durability::Durability,
    takeover: Option<takeover::Takeover>,
    handover: Option<handover::Handover>,
    /// Clients that wait for the end of a switchover.
    hold_over: Option<carry::HoldOver>,
    rejoin: Option<rejoin::Rejoin>,
    watching: Vec<commands::Watching>,
    followers: followers::FollowersMemory,
    neighbours: vip::NeighbourMemory,
    units: units::UnitsMemory,
    last_ended: Option<crate::engine::turn::ProcedureBrief>,
    shutting_down: bool,
    /// The epoch at which the other node is known to serve, as last said.
    forwards: forward::Forwards,
    events: VecDeque<EventRow>,
    counters: Counters,
}

impl Guard {
    /// A guard that has just started: shut, whatever the journal says. The effects clear what a former life left over.
    pub fn start(setup: Setup, durable: Durable, pg_present: bool, now: Now, fx: &mut Vec<Effect>) -> Guard {
        let servers = setup.servers.len();
        let vips = setup.vip_addresses();
        let mut guard = Guard {
            next_seq: 1,
            next_id: 1,
            writing: VecDeque::new(),
            fence_now: None,
            fence_retry: None,
            started: now.boot,
            at: now,
            poll_at: now.boot,
            renew_at: now.boot,
            witness: proofs::WitnessMemory::new(servers),
            proofs: Proofs::default(),
            proofs_from: Instant::ZERO,
            peer: proofs::PeerMemory::default(),
            pg: PgMemory::default(),
            pg_present,
            vips: vips.iter().map(|a| vip::VipMemory::new(*a)).collect(),
            link_up: true,
            gate: GateMemory {
                open: false,
                until: Instant::ZERO,
                paused: false,
                held: false,
                suspended: None,
                state: GateState::Shut,
                reason: "the daemon has just started".to_owned(),
                sessions: 0,
            },
            job: None,
            durability: durability::Durability::default(),
            takeover: None,
            handover: None,
            hold_over: None,
            rejoin: None,
            watching: Vec::new(),
            followers: followers::FollowersMemory::default(),
            neighbours: vip::NeighbourMemory::default(),
            units: units::UnitsMemory::new(now.boot + setup.timing.lease),
            last_ended: None,
            shutting_down: false,
            forwards: forward::Forwards::default(),
            events: VecDeque::new(),
            counters: Counters::default(),
            setup,
            durable,
        };
        for address in vips {
            fx.push(Effect::UnbindVip { address });
        }
        if guard.setup.kernel_gate {
            fx.push(Effect::KernelGate { until: None });
        }
        if guard.durable.boot_pending.as_ref() == Some(&guard.setup.boot) {
            guard.witness.boot_from = Some(now.boot);
        }
        if let Some((id, kind, step)) = guard.durable.procedure.clone() {
            guard.note(
                now,
                fx,
                "procedure_interrupted",
                format!("a restart interrupted the {kind} at \"{step}\"; run it again to finish"),
            );
            let entry = Entry::Step { id, kind, step, ended: Some((4, "interrupted by a restart".to_owned())) };
            guard.record(fx, vec![entry], Then::Nothing);
        }
        guard.turn(now, fx);
        guard
    }

    /// What the event log on disk says of former lives, oldest first; only shown.
    pub fn remember(&mut self, past: Vec<EventRow>) {
        let mut events: VecDeque<EventRow> = past.into();
        events.append(&mut self.events);
        while events.len() > EVENTS_MAX {
            events.pop_front();
        }
        self.events = events;
    }

    /// One turn: one event, one reading of the clocks.
    pub fn handle(&mut self, now: Now, event: Event, fx: &mut Vec<Effect>) {
        let still = now.boot.since(self.at.boot);
        self.at = now;
        if still > STALL {
            self.announce_anew(now);
        }
        match event {
            Event::DeadlinePassed => {}
            Event::Recorded { seq } => self.on_recorded(now, seq, fx),
            Event::RecordFailed { seq, why } => self.on_record_failed(now, seq, &why, fx),
            Event::WitnessAnswered { question, answer } => self.on_witness_answered(now, question, answer, fx),
            Event::UpdateAnswered { op, outcome } => self.on_update_answered(now, op, outcome, fx),
            Event::PeerAnswered { question, answer } => self.on_peer_answered(now, question, answer, fx),
            Event::PeerAsked { ticket, question } => self.on_peer_asked(now, ticket, *question, fx),
            Event::FollowerAsked { ticket, from, question } => {
                self.on_follower_asked(now, ticket, &from, *question, fx);
            }
            Event::PgObserved { asked, report } => self.on_pg_observed(now, asked, *report, fx),
            Event::PgLost(why) => self.on_pg_lost(now, why, fx),
            Event::PgSilent(why) => self.on_pg_silent(now, why),
            Event::PgDone { op, result } => self.on_pg_done(now, op, result, fx),
            Event::PgProgress { op, text, progress } => self.on_pg_progress(now, op, text, progress, fx),
            Event::Drained { op, cancelled, busy } => self.on_drained(now, op, cancelled, busy, fx),
            Event::Command { ticket, command } => self.on_command(now, ticket, command, fx),
            Event::Sessions { sessions, total, auth_failures } => {
                self.gate.sessions = sessions;
                self.counters.sessions_total = total;
                self.counters.auth_failures = auth_failures;
            }
            Event::Audited { text } => self.note(now, fx, "command", text),
            Event::ShutdownAsked => {
                self.shutting_down = true;
                self.note(now, fx, "shutdown", "the daemon was asked to stop".to_owned());
            }
            vip @ (Event::VipBound { .. }
            | Event::VipBindFailed { .. }
            | Event::VipProbed { .. }
            | Event::VipRemoved { .. }
            | Event::ForeignClaim { .. }
            | Event::VipFound { .. }
            | Event::VipIs { .. }
            | Event::LinkDown
            | Event::LinkUp) => self.on_vip(now, vip, fx),
            Event::NeighbourAnswered { question, answer } => self.on_neighbour(now, question, answer),
            Event::StonithDone { op, result } => self.on_stonith(now, op, result, fx),
            Event::UnitsDone { start, result } => self.on_units(now, start, result, fx),
            // Said again with every look; while a task runs it may be that very start.
            Event::PgStartRefused => self.pg.start_refused |= self.pg.task.is_none(),
        }
        self.turn(now, fx);
    }

    /// What happens in every turn, whatever came in.
    fn turn(&mut self, now: Now, fx: &mut Vec<Effect>) {
        self.poll(now, fx);
        self.stop_units_of_a_former_life(now, fx);
        self.fence_when_due(now, fx);
        self.decide(now, fx);
        if !self.shutting_down {
            self.advance_takeover(now, fx);
            self.advance_handover(now, fx);
            self.advance_hold_over(now, fx);
            self.advance_rejoin(now, fx);
            self.advance_job(now, fx);
            self.advance_fence(now, fx);
            self.advance_durability(now, fx);
            self.advance_word(fx);
            self.advance_housekeeping(now, fx);
            self.advance_silence(now, fx);
            self.advance_watching(now, fx);
            self.advance_followers(now, fx);
            self.decide(now, fx);
        }
        self.advance_forward(now, fx);
    }

    /// When [`Event::DeadlinePassed`] is wanted at the latest.
    pub fn next_deadline(&self) -> Instant {
        let mut at = self.poll_at.min(self.renew_at);
        let others = [
            self.keeps_clients().then_some(self.gate.until),
            self.gate.suspended.map(|since| since + self.setup.hold_limit),
            self.takeover.as_ref().and_then(|t| t.deadline),
            self.rejoin.as_ref().and_then(|r| r.deadline),
            self.handover.as_ref().map(|h| h.deadline),
            self.job.as_ref().map(|j| j.wake),
            self.fence_retry.as_ref().map(|(at, ..)| *at),
            self.elsewhere_due(),
        ];
        for other in others.into_iter().flatten() {
            at = at.min(other);
        }
        // A deadline that has passed and waits for something else (a job of another purpose) must not spin the turn.
        at.max(self.at.boot + TURN_APART)
    }

    /// Queues entries for the journal.
    fn record(&mut self, fx: &mut Vec<Effect>, entries: Vec<Entry>, then: Then) {
        let seq = self.next_seq;
        self.next_seq += 1;
        fx.push(Effect::Record { seq, entries: entries.clone() });
        self.writing.push_back((seq, entries, then));
    }

    fn on_recorded(&mut self, now: Now, seq: u64, fx: &mut Vec<Effect>) {
        let Some(at) = self.writing.iter().position(|(s, ..)| *s == seq) else { return };
        let Some((_, entries, then)) = self.writing.remove(at) else { return };
        for entry in &entries {
            self.durable.apply(entry);
        }
        // Passed by an epoch not below it, written or not.
        let complete = self.durable.complete;
        let passed = |number: Epoch| entries.contains(&Entry::Complete { epoch: complete }) && number <= complete;
        if self.fence_now.as_ref().is_some_and(|(n, _)| passed(*n)) {
            self.fence_now = None;
            self.fence_retry = None;
        }
        if self.durable.fenced.is_some() && self.fence_now.as_ref().is_some_and(|(n, _)| *n <= self.durable.fence) {
            self.fence_now = None;
        }
        match then {
            Then::Nothing | Then::Fenced { .. } => {}
            Then::Takeover { attempt } if self.is_attempt(attempt) => self.on_takeover_recorded(now, fx),
            Then::Takeover { .. } => {}
            Then::Rejoin => self.on_rejoin_recorded(now, fx),
            Then::Durability => self.on_sync_journaled(now, Ok(()), fx),
            Then::Arm => self.on_arm_recorded(now, true, fx),
            Then::Boot => self.on_boot_recorded(now, fx),
            Then::Stop { attempt } => self.on_stop_recorded(now, attempt, Ok(()), fx),
            Then::Said { ticket, text } => fx.push(Effect::End { ticket, exit: 0, text, flag: None }),
            Then::Answer { ticket, answer } => fx.push(Effect::AnswerPeer { ticket, answer }),
        }
    }

    fn on_record_failed(&mut self, now: Now, seq: u64, why: &str, fx: &mut Vec<Effect>) {
        let Some(at) = self.writing.iter().position(|(s, ..)| *s == seq) else { return };
        let Some((_, entries, then)) = self.writing.remove(at) else { return };
        self.note(
            now,
            fx,
            "journal_failed",
            format!("the journal cannot be written: {why}; free the disk of state_dir"),
        );
        match then {
            Then::Nothing | Then::Boot => {}
            Then::Stop { attempt } => {
                self.on_stop_recorded(now, attempt, Err(format!("the journal cannot be written: {why}")), fx);
            }
            Then::Said { ticket, .. } => {
                let text = format!("the journal cannot be written: {why}; nothing was changed");
                fx.push(Effect::End { ticket, exit: 1, text, flag: None });
            }
            Then::Arm => self.on_arm_recorded(now, false, fx),
            Then::Takeover { attempt } if self.is_attempt(attempt) => {
                let text =
                    format!("the journal cannot be written: {why}; free the disk of state_dir, then run it again");
                self.fail_takeover(now, 1, &text, fx);
            }
            Then::Takeover { .. } => {}
            Then::Rejoin => self.fail_rejoin(now, 1, &format!("the journal cannot be written: {why}"), fx),
            Then::Durability => {
                self.on_sync_journaled(now, Err(format!("the journal cannot be written: {why}")), fx);
            }
            Then::Fenced { tries } => self.fence_retry = Some((now.boot + Duration::from_secs(1), entries, tries + 1)),
            Then::Answer { ticket, answer } => {
                // A consent that cannot be written is not given, but the fence stands: it is tried again as a fence.
                if let Some((number, reason)) = self.fence_now.clone() {
                    let entry = Entry::Fenced { number, reason, at: now.rfc3339() };
                    self.fence_retry = Some((now.boot + Duration::from_secs(1), vec![entry], 1));
                }
                let why = format!("the journal cannot be written: {why}");
                let answer = match *answer {
                    PeerAnswer::Consented { attempt, .. } => PeerAnswer::FencedUnwritten { attempt, why },
                    _ => PeerAnswer::Refused { why },
                };
                fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
            }
        }
    }

    /// One event in `status`, one line in the log.
    fn note(&mut self, now: Now, fx: &mut Vec<Effect>, kind: &'static str, text: String) {
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(EventRow { at: now.rfc3339(), kind: kind.to_owned(), text: text.clone() });
        fx.push(Effect::Note { kind, text });
    }

    fn id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Starts a PostgreSQL task when none runs.
    fn pg_task(&mut self, owner: PgOwner, task: PgTask, fx: &mut Vec<Effect>) -> bool {
        if self.pg.task.is_some() {
            return false;
        }
        self.pg_task_next(owner, task, fx);
        true
    }

    /// A procedure's task: begins when the one under way has ended. A newer one of the same owner replaces what waits.
    fn pg_task_next(&mut self, owner: PgOwner, task: PgTask, fx: &mut Vec<Effect>) -> OpId {
        let op = OpId(self.id());
        self.forget_waiting(owner);
        self.pg.next.push_back((op, owner, task));
        self.next_pg_task(fx);
        op
    }

    /// The owner gave up: what it wanted and what has not begun must not begin any more.
    fn forget_waiting(&mut self, owner: PgOwner) {
        self.pg.next.retain(|(_, waiting, _)| *waiting != owner);
    }

    fn next_pg_task(&mut self, fx: &mut Vec<Effect>) {
        if self.pg.task.is_some() {
            return;
        }
        let Some((op, owner, task)) = self.pg.next.pop_front() else { return };
        self.pg.task = Some((op, owner));
        self.pg.restarts =
            matches!(task, PgTask::Stop | PgTask::StopNow | PgTask::Start | PgTask::Demote { .. } | PgTask::Rejoin(_));
        if matches!(task, PgTask::Promote { .. }) {
            self.pg.told_to_promote = self.pg.report.as_ref().map(|report| report.start);
        }
        self.pg.setting = match &task {
            PgTask::SetSyncList(name) => Some(name.as_ref().map(|n| format!("\"{n}\"")).unwrap_or_default()),
            _ => None,
        };
        fx.push(Effect::Pg { op, task });
    }

    fn on_pg_done(&mut self, now: Now, op: OpId, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some((running, owner)) = self.pg.task else { return };
        if running != op {
            return;
        }
        self.pg.task = None;
        self.pg.look_from = now.boot;
        if let (Some(list), Ok(_), Some(report)) = (self.pg.setting.take(), &result, &mut self.pg.report) {
            report.sync_list = list;
        }
        if std::mem::take(&mut self.pg.restarts) {
            self.pg.up = false;
            self.pg.error = None;
            self.pg.barrier = None;
            self.pg.barrier_passed = false;
            self.forget_silence();
        }
        self.next_pg_task(fx);
        match owner {
            PgOwner::Takeover => self.on_takeover_pg(now, result, fx),
            PgOwner::Handover => self.on_handover_pg(now, op, result, fx),
            PgOwner::Rejoin => self.on_rejoin_pg(now, result, fx),
            PgOwner::Look => self.on_looked(result, fx),
            PgOwner::Durability => self.on_durability_pg(now, result, fx),
            PgOwner::Followers => self.on_followers_pg(result, fx),
            PgOwner::FollowerLook => self.on_follower_looked(result, fx),
            PgOwner::Demotion | PgOwner::Follow => self.on_demoted(now, owner, result, fx),
            PgOwner::Housekeeping => self.on_housekeeping_pg(now, result, fx),
        }
    }

    /// The name of the node the records point at, for the sentence a client reads.
    fn told(&self, reason: &str) -> String {
        // Where there is no witness, or it was not asked since, the peer's own word says who serves.
        let trusts = self.setup.mode == Mode::VipOnly || self.fenced().is_some();
        let peer = self.peer.state.as_ref().filter(|p| trusts && p.gate_open).map(|p| &p.node);
        let active = self.witness.points_at(&self.setup).filter(|name| **name != self.setup.me).or(peer);
        match active {
            Some(name) => format!(
                "portcullis: node {} no longer serves ({reason}); the active node is {}",
                self.setup.me,
                self.setup.named(name)
            ),
            None => format!("portcullis: node {} does not serve ({reason})", self.setup.me),
        }
    }
}

#[cfg(test)]
mod tests;
