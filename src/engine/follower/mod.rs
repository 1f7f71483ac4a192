//! A node without a vote (`voter = false`): its PostgreSQL follows whichever voter is active, and that is all.
//!
//! What it is: a pure state machine beside the guard, with the same events in and effects out. It asks both voters
//! with every poll, learns who is active, keeps `primary_conninfo` pointed there, and is rejoined on a person's word.
//! What it is NOT: it holds no epoch, pledges nothing, is never promoted, opens no gate, binds no VIP, and changes no
//! record.
//!
//! ```text
//!               one voter's gate is open at the highest epoch         another's is, at a higher epoch
//!   as it stands --------------------------------------> follows it ---------------------------------> follows that
//!        ^   nobody, or two of one epoch: stays as it is      |
//!        |                                                    | streams no more: ahead of the switch point, WAL gone
//!        +---------------------- rejoin <------ in trouble <--+ was found writable; another system identifier
//! ```
//!
//! **Invariants:** no effect of this machine opens a gate, promotes PostgreSQL, or updates the record. It follows only
//! a node of the highest epoch it ever heard of. From `RejoinStarted` to `RejoinDone` it follows nobody by itself.
//! Rooms: `keep` (PostgreSQL kept following), `rejoin`, `commands` (what a person asks), `view`.

mod commands;
mod keep;
mod rejoin;
mod view;

use crate::base::ids::{Epoch, NodeName, OpId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::evidence::{self, Seen};
use crate::engine::report::PgReport;
use crate::engine::setup::{Mode, Setup};
use crate::engine::status::{Counters, EventRow};
use crate::engine::turn::{
    Effect, Event, Facts, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask, ProcedureBrief, Ticket,
};
use std::collections::{BTreeMap, VecDeque};

/// How many events `status` remembers; older ones are in the event log on disk.
const EVENTS_MAX: usize = 50;
/// How long a voter is given to answer.
const VOTER_LIMIT: Duration = Duration::from_secs(2);
/// Two turns that only time brings about are at least so far apart.
const TURN_APART: Duration = Duration::from_millis(2);
/// What clients and people are told.
const NO_VOTE: &str = "this node has no vote (voter = false): it follows the active node and serves no clients";

/// What continues when entries are durable.
#[derive(Debug, Clone, PartialEq)]
enum Then {
    Nothing,
    Rejoin,
    Said { ticket: Ticket, text: String },
}

/// Who waits for a PostgreSQL task.
#[derive(Debug, Clone, PartialEq)]
enum Owner {
    Follow(NodeName),
    Nudge,
    Demotion,
    SwitchPoint,
    Rejoin,
}

/// A voter, as it answered last.
#[derive(Debug, Clone, Default)]
struct Voter {
    facts: Option<Facts>,
    answered: Option<Instant>,
}

/// One authority, only shown.
#[derive(Debug, Clone, Default)]
struct Server {
    asked: Option<Instant>,
    seen: Option<Seen>,
    error: Option<String>,
}

/// Whom a question went to.
#[derive(Debug, Clone, PartialEq)]
enum Asked {
    Voter(NodeName),
    Rejoin(NodeName),
    Server(usize, Instant),
}

/// What is known of the local PostgreSQL.
#[derive(Debug, Clone, Default)]
struct PgMemory {
    present: bool,
    up: bool,
    error: Option<String>,
    report: Option<PgReport>,
    task: Option<(OpId, Owner)>,
    /// The running task stops or starts PostgreSQL.
    restarts: bool,
    /// A look that began before the last task ended says nothing.
    look_from: Instant,
    retry_at: Instant,
    /// Whom it was told to stream from in this life.
    follows: Option<NodeName>,
    /// Since when it has not streamed although it follows an active node.
    dry_since: Option<Instant>,
    nudge_at: Instant,
    /// The switch point was looked up for this dry spell.
    judged: bool,
    /// It is ahead of where the active node's timeline began.
    diverged: bool,
    start_refused: bool,
    /// What its last failure was told as, while it goes on.
    failed_as: Option<String>,
}

/// The whole node.
#[derive(Debug, Clone)]
pub struct Follower {
    setup: Setup,
    durable: Durable,
    next_seq: u64,
    next_id: u64,
    writing: VecDeque<(u64, Vec<Entry>, Then)>,
    /// The reading of this turn.
    at: Now,
    poll_at: Instant,
    voters: BTreeMap<NodeName, Voter>,
    servers: Vec<Server>,
    questions: BTreeMap<u64, Asked>,
    pg: PgMemory,
    /// Why PostgreSQL cannot follow by itself, as it was last noted.
    trouble: Option<String>,
    rejoin: Option<rejoin::Rejoin>,
    last_ended: Option<ProcedureBrief>,
    shutting_down: bool,
    events: VecDeque<EventRow>,
    counters: Counters,
}

impl Follower {
    /// A follower that has just started. The effects clear what a former life, perhaps as a voter, left over.
    pub fn start(setup: Setup, durable: Durable, pg_present: bool, now: Now, fx: &mut Vec<Effect>) -> Follower {
        fx.push(Effect::Cut { reason: NO_VOTE.to_owned() });
        fx.extend(setup.vip_addresses().into_iter().map(|address| Effect::UnbindVip { address }));
        if setup.kernel_gate {
            fx.push(Effect::KernelGate { until: None });
        }
        if setup.units {
            fx.push(Effect::Units { start: false });
        }
        let mut follower = Follower {
            next_seq: 1,
            next_id: 1,
            writing: VecDeque::new(),
            at: now,
            poll_at: now.boot,
            voters: setup.voters.iter().map(|name| (name.clone(), Voter::default())).collect(),
            servers: setup.servers.iter().map(|_| Server::default()).collect(),
            questions: BTreeMap::new(),
            pg: PgMemory { present: pg_present, ..PgMemory::default() },
            trouble: None,
            rejoin: None,
            last_ended: None,
            shutting_down: false,
            events: VecDeque::new(),
            counters: Counters::default(),
            setup,
            durable,
        };
        follower.turn(now, fx);
        follower
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
        self.at = now;
        match event {
            Event::Recorded { seq } => self.on_recorded(now, seq, fx),
            Event::RecordFailed { seq, why } => self.on_record_failed(now, seq, &why, fx),
            Event::WitnessAnswered { question, answer } => {
                let asked = self.questions.remove(&question);
                let server = match asked {
                    Some(Asked::Server(index, at)) => self.servers.get_mut(index).map(|server| (server, at)),
                    _ => None,
                };
                if let Some((server, at)) = server {
                    match answer {
                        Ok(reading) => {
                            let seen = Some(evidence::see(&self.setup, &reading));
                            *server = Server { asked: Some(at), seen, error: None };
                        }
                        Err(why) => server.error = Some(why),
                    }
                }
            }
            Event::PeerAnswered { question, answer } => self.on_answer(now, question, answer.map(|a| *a), fx),
            // Nobody asks a node without a vote; who does gets no promise.
            Event::PeerAsked { ticket, .. } | Event::FollowerAsked { ticket, .. } => {
                let answer = Box::new(PeerAnswer::Refused { why: NO_VOTE.to_owned() });
                fx.push(Effect::AnswerPeer { ticket, answer });
            }
            Event::PgObserved { asked, report } => self.on_pg_observed(now, asked, *report, fx),
            Event::PgLost(why) => {
                if self.pg.up {
                    self.note(now, fx, "postgres_down", format!("the local PostgreSQL is gone: {why}"));
                }
                self.pg.up = false;
                self.pg.error = Some(why);
            }
            Event::PgSilent(why) => self.pg.error = Some(why),
            Event::PgDone { op, result } => self.on_pg_done(now, op, result, fx),
            Event::PgProgress { op, text, progress } => {
                if self.pg.task.as_ref().is_some_and(|(running, _)| *running == op) {
                    if crate::engine::rejoining::tells_divergence(progress.as_ref()) {
                        self.note(now, fx, "diverged", text.clone());
                    }
                    self.say_rejoin(&text, progress, fx);
                }
            }
            Event::PgStartRefused => self.pg.start_refused |= self.pg.task.is_none(),
            Event::Command { ticket, command } => self.on_command(now, ticket, command, fx),
            Event::Sessions { total, auth_failures, .. } => {
                self.counters.sessions_total = total;
                self.counters.auth_failures = auth_failures;
            }
            Event::Audited { text } => self.note(now, fx, "command", text),
            Event::ShutdownAsked => {
                self.shutting_down = true;
                self.note(now, fx, "shutdown", "the daemon was asked to stop".to_owned());
            }
            // Answers to what this machine never asks, and the weather of a VIP that is never bound here.
            Event::DeadlinePassed
            | Event::UpdateAnswered { .. }
            | Event::VipBound { .. }
            | Event::VipBindFailed { .. }
            | Event::VipProbed { .. }
            | Event::VipRemoved { .. }
            | Event::LinkDown
            | Event::LinkUp
            | Event::NeighbourAnswered { .. }
            | Event::StonithDone { .. }
            | Event::UnitsDone { .. }
            | Event::ForeignClaim { .. }
            | Event::VipFound { .. }
            | Event::VipIs { .. }
            | Event::Drained { .. } => {}
        }
        self.turn(now, fx);
    }

    fn turn(&mut self, now: Now, fx: &mut Vec<Effect>) {
        self.poll(now, fx);
        if !self.shutting_down {
            self.advance_rejoin(now, fx);
            self.keep(now, fx);
        }
    }

    /// When [`Event::DeadlinePassed`] is wanted at the latest.
    pub fn next_deadline(&self) -> Instant {
        let rejoin = self.rejoin.as_ref().and_then(|r| r.deadline);
        let retry = (self.pg.retry_at > self.at.boot).then_some(self.pg.retry_at);
        let at = [rejoin, retry].into_iter().flatten().fold(self.poll_at, Instant::min);
        at.max(self.at.boot + TURN_APART)
    }

    /// Once per poll: both voters, and every authority, which is only shown.
    fn poll(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if now.boot < self.poll_at {
            return;
        }
        self.poll_at = now.boot + self.setup.poll;
        let state = self.state();
        for voter in self.setup.voters.clone() {
            let ask = PeerQuestion::Follow { state: state.clone() };
            self.ask(&voter, Asked::Voter(voter.clone()), ask, VOTER_LIMIT, fx);
        }
        for server in 0..self.servers.len() {
            let question = self.id();
            self.questions.insert(question, Asked::Server(server, now.boot));
            fx.push(Effect::AskWitness { question, server, limit: VOTER_LIMIT });
        }
    }

    fn ask(&mut self, node: &NodeName, by: Asked, ask: PeerQuestion, limit: Duration, fx: &mut Vec<Effect>) -> u64 {
        let question = self.id();
        self.questions.insert(question, by);
        fx.push(Effect::AskNode { question, node: node.clone(), ask: Box::new(ask), limit });
        question
    }

    fn on_answer(&mut self, now: Now, question: u64, answer: Result<PeerAnswer, String>, fx: &mut Vec<Effect>) {
        match self.questions.remove(&question) {
            Some(Asked::Voter(name)) => {
                let Ok(PeerAnswer::Facts(facts)) = answer else { return };
                let known = facts.state.seen.max(facts.state.won);
                let writing = self.writing.iter().any(|(_, e, _)| e.contains(&Entry::Seen { epoch: known }));
                if known > self.durable.seen && !writing {
                    self.record(fx, vec![Entry::Seen { epoch: known }], Then::Nothing);
                }
                if let Some(wish) = facts.wish.clone() {
                    self.on_wish(now, &wish);
                }
                let voter = self.voters.entry(name).or_default();
                voter.facts = Some(*facts);
                voter.answered = Some(now.boot);
            }
            Some(Asked::Rejoin(name)) => self.on_rejoin_answer(now, question, &name, answer, fx),
            Some(Asked::Server(..)) | None => {}
        }
    }

    /// What a voter said, while it is fresh.
    fn fresh(&self, name: &NodeName) -> Option<&Facts> {
        let limit = (self.setup.poll * 5 / 2).max(VOTER_LIMIT);
        let voter = self.voters.get(name)?;
        voter.answered.filter(|at| self.at.boot.since(*at) < limit)?;
        voter.facts.as_ref()
    }

    /// The voter whose gate is open at the highest epoch; nobody where that is not known, or two claim one epoch.
    fn active(&self) -> Option<&Facts> {
        let serves = |facts: &&Facts| {
            let state = &facts.state;
            state.gate_open && state.complete > Epoch::NONE && state.complete >= self.durable.seen
        };
        let mut serving: Vec<&Facts> =
            self.setup.voters.iter().filter_map(|name| self.fresh(name)).filter(serves).collect();
        serving.sort_by_key(|facts| std::cmp::Reverse(facts.state.complete));
        match serving.as_slice() {
            [one, other, ..] if one.state.complete == other.state.complete => None,
            [one, ..] => Some(one),
            [] => None,
        }
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
        match then {
            Then::Nothing => {}
            Then::Rejoin => self.on_rejoin_recorded(now, fx),
            Then::Said { ticket, text } => fx.push(Effect::End { ticket, exit: 0, text, flag: None }),
        }
    }

    fn on_record_failed(&mut self, now: Now, seq: u64, why: &str, fx: &mut Vec<Effect>) {
        let Some(at) = self.writing.iter().position(|(s, ..)| *s == seq) else { return };
        let Some((.., then)) = self.writing.remove(at) else { return };
        let text = format!("the journal cannot be written: {why}; free the disk of state_dir");
        self.note(now, fx, "journal_failed", text.clone());
        match then {
            Then::Nothing => {}
            Then::Rejoin => self.fail_rejoin(now, 1, &text, fx),
            Then::Said { ticket, .. } => fx.push(Effect::End { ticket, exit: 1, text, flag: None }),
        }
    }

    fn is_writing(&self, entry: &Entry) -> bool {
        self.writing.iter().any(|(_, entries, _)| entries.contains(entry))
    }

    /// Starts a PostgreSQL task; the caller has looked that none runs.
    fn pg_task(&mut self, owner: Owner, task: PgTask, fx: &mut Vec<Effect>) {
        let op = OpId(self.id());
        self.pg.restarts = matches!(task, PgTask::Stop | PgTask::Start | PgTask::Demote { .. } | PgTask::Rejoin(_));
        self.pg.task = Some((op, owner));
        fx.push(Effect::Pg { op, task });
    }

    fn on_pg_done(&mut self, now: Now, op: OpId, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        let Some((_, owner)) = self.pg.task.take_if(|(running, _)| *running == op) else { return };
        self.pg.look_from = now.boot;
        if std::mem::take(&mut self.pg.restarts) {
            self.pg.up = false;
            self.pg.error = None;
        }
        if owner == Owner::Rejoin {
            self.on_rejoin_pg(now, result, fx);
        } else {
            self.on_kept(now, owner, result, fx);
        }
    }

    fn on_pg_observed(&mut self, now: Now, asked: Instant, mut report: PgReport, fx: &mut Vec<Effect>) {
        if asked < self.pg.look_from {
            return;
        }
        let before = self.pg.report.as_ref().filter(|before| before.start == report.start && report.in_recovery);
        if let Some(before) = before {
            // Without a walreceiver a standby tells the timeline that it has replayed; it never goes back.
            report.timeline = report.timeline.max(before.timeline);
        }
        if !self.pg.up {
            let what = if report.in_recovery { "a standby" } else { "a primary" };
            self.note(now, fx, "postgres_up", format!("PostgreSQL is up as {what}, timeline {}", report.timeline));
        }
        self.pg.up = true;
        self.pg.present = true;
        self.pg.error = None;
        self.pg.start_refused = false;
        self.pg.report = Some(report);
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

    /// The local PostgreSQL as last seen, while it runs.
    fn report(&self) -> Option<&PgReport> {
        self.pg.report.as_ref().filter(|_| self.pg.up)
    }

    fn update_mode(&self) -> bool {
        self.setup.mode == Mode::Update
    }
}

#[cfg(test)]
mod tests;
