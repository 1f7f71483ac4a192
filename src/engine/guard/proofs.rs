//! Evidence of this node's epoch: the witness's answers, the peer's pulses and pledges. Everything is dated from the
//! question, and an answer asked before our own last update counts for nothing.
//!
//! Over 600 lines: both voters' words are weighed against each other in one place.

use super::{Guard, Then};
use crate::base::ids::{Epoch, NodeName};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::evidence::{self, Memory, Seen, Verdict};
use crate::engine::setup::{Mode, Setup};
use crate::engine::turn::{Effect, Now, PeerAnswer, PeerPg, PeerQuestion, PeerState, PledgeAsk, Ticket};
use crate::wire::dns::{Reading, RecordPair};
use crate::wire::marker::Marker;
use std::collections::BTreeMap;

/// How long the peer is given to answer: *alive* means within this (the contract).
pub(super) const PEER_LIMIT: Duration = Duration::from_secs(2);

/// A peer that has answered nothing for [`PEER_LIMIT`] is not alive unless it answers a question asked now within this.
pub(super) const SILENT_LIMIT: Duration = Duration::from_millis(400);

/// While the gate is open on a proof older than one and a half polls, a poll is divided by this.
const ASK_AGAIN: u32 = 4;

/// Who waits for a witness's answer, beside the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AskedFor {
    Poll,
    Job,
    Takeover,
}

#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Asked {
    pub(super) server: usize,
    pub(super) at: Instant,
    purpose: AskedFor,
}

/// One authority.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct ServerMemory {
    /// When the question of the last conclusive answer was sent.
    pub(super) asked: Option<Instant>,
    pub(super) seen: Option<Seen>,
    pub(super) verdict: Option<Verdict>,
    /// Since when it has said the same.
    pub(super) since: Instant,
    /// The last answer proved nothing, and why.
    pub(super) error: Option<String>,
    /// Its signed time at its last answer, in seconds, and when we had asked.
    pub(super) signed: Option<(u64, Instant)>,
}

/// The witness as remembered.
#[derive(Debug, Clone, Hash)]
pub(super) struct WitnessMemory {
    pub(super) servers: Vec<ServerMemory>,
    questions: BTreeMap<u64, Asked>,
    /// Last read from the server that executes the updates.
    pub(super) pair: Option<RecordPair>,
    pub(super) marker: Option<Marker>,
    pub(super) ignore_before: Instant,
    /// It said "here" for our epoch in this life.
    pub(super) confirmed: bool,
    /// What the record of our epoch says as `sync=`, by our own last update or as read; outer `None`: not known yet.
    pub(super) sync: Option<Option<NodeName>>,
    /// A new boot waits W from here before it opens (S6); W follows the longest lease seen.
    pub(super) boot_from: Option<Instant>,
    /// Observe mode: since when proofs have been unbroken.
    pub(super) unbroken_since: Option<Instant>,
    seen_writing: Epoch,
    /// The record was compared with the journal of a former life.
    pub(super) compared: bool,
    /// It was newer, at this epoch of ours: the journal, and with it all that is here, was restored from a snapshot.
    pub(super) restored: Option<Epoch>,
}

impl WitnessMemory {
    pub(super) fn new(servers: usize) -> WitnessMemory {
        WitnessMemory {
            servers: (0..servers).map(|_| ServerMemory::default()).collect(),
            questions: BTreeMap::new(),
            pair: None,
            marker: None,
            ignore_before: Instant::ZERO,
            confirmed: false,
            sync: None,
            boot_from: None,
            unbroken_since: None,
            seen_writing: Epoch::NONE,
            compared: false,
            restored: None,
        }
    }

    /// The highest epoch seen whose write may still be under way.
    pub(super) fn seen_writing(&self) -> Epoch {
        self.seen_writing
    }

    /// The node the records point at, by the newest conclusive answer.
    pub(super) fn points_at(&self, setup: &Setup) -> Option<&NodeName> {
        if setup.mode == Mode::Update {
            // The others may lag.
            return evidence::points_at(self.servers.first()?.seen.as_ref()?);
        }
        let newest = self.servers.iter().filter(|s| s.seen.is_some()).max_by_key(|s| s.asked)?;
        evidence::points_at(newest.seen.as_ref()?)
    }

    /// Forgets all evidence: after our own change of the record only what is asked from now on counts.
    pub(super) fn forget(&mut self, now: Instant) {
        self.ignore_before = now;
        for server in &mut self.servers {
            server.verdict = None;
            server.seen = None;
        }
        self.unbroken_since = None;
    }
}

/// Who waits for a peer's answer, beside the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum PeerAskedFor {
    Pulse,
    Takeover,
    Rejoin,
    Alone,
    Forward { ticket: Ticket },
}

/// The peer as remembered.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct PeerMemory {
    pub(super) state: Option<PeerState>,
    /// When anything was heard from it.
    pub(super) heard: Option<Instant>,
    pub(super) heard_wall: Option<String>,
    /// When new WAL came from its PostgreSQL: it is not off, whatever its daemon says.
    pub(super) wal_heard: Option<Instant>,
    /// An answer to a question of ours came (its channel works both ways).
    pub(super) answered: Option<Instant>,
    /// When the first question was sent that it has answered none since.
    unanswered_since: Option<Instant>,
    questions: BTreeMap<u64, (Instant, PeerAskedFor, Epoch)>,
    /// To which start of the peer we last pledged, and when.
    pub(super) pledged_to: Option<(u64, Instant)>,
    /// Its position as known at the last look at our own PostgreSQL (R6: is the standby ahead?).
    pub(super) lsn_before: Option<(crate::base::ids::TimelineId, crate::base::ids::Lsn)>,
    /// Its word not to go alone counts only when it was asked for from here on: what is on its way may be older.
    pub(super) word_from: Instant,
    mismatch_noted: bool,
    /// A question of this life was answered, or failed: what the peer knows of later epochs is known, or cannot be.
    pub(super) settled: bool,
}

impl Guard {
    fn memory(&self) -> Memory {
        Memory { epoch: self.durable.won, seq: self.durable.seq, seen: self.durable.seen }
    }

    /// The lease this node may use: never longer than the marker's.
    pub(super) fn lease(&self) -> Duration {
        self.setup.lease(self.witness.marker.as_ref().map(|m| m.lease))
    }

    /// W, for the longest lease seen.
    pub(super) fn wait(&self) -> Duration {
        self.setup.timing.wait(self.witness.marker.as_ref().map(|m| m.lease))
    }

    /// Until when the proofs in hand are good.
    pub(super) fn lease_deadline(&self) -> Instant {
        self.proofs.deadline(self.lease())
    }

    /// Once per poll: every authority and the peer are asked, whether or not earlier questions were answered.
    pub(super) fn poll(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if now.boot >= self.renew_at {
            self.renew_at = now.boot + super::RENEW_EVERY;
        }
        if now.boot < self.poll_at {
            return;
        }
        // On an old proof ask more often: an outage that ends before the lease does shall cost nothing.
        let overdue =
            self.keeps_clients() && self.proofs.newest().is_some_and(|at| at + self.setup.poll * 3 / 2 < now.boot);
        self.poll_at = now.boot + if overdue { self.setup.poll / ASK_AGAIN } else { self.setup.poll };
        for server in 0..self.witness.servers.len() {
            self.ask_witness(now, server, AskedFor::Poll, fx);
        }
        self.ask_neighbours(now, fx);
        if self.setup.peer != self.setup.me {
            let pledge = self.wants_pledge();
            self.ask_peer_pulse(now, PeerAskedFor::Pulse, pledge, fx);
        }
    }

    pub(super) fn wants_pledge(&self) -> bool {
        self.durable.is_holder() && self.fenced().is_none() && !self.shutting_down
    }

    pub(super) fn ask_witness(&mut self, now: Now, server: usize, purpose: AskedFor, fx: &mut Vec<Effect>) -> u64 {
        let question = self.id();
        let limit = self.setup.timing.lease.min(PEER_LIMIT);
        self.witness.questions.insert(question, Asked { server, at: now.boot, purpose });
        fx.push(Effect::AskWitness { question, server, limit });
        question
    }

    pub(super) fn ask_peer_pulse(&mut self, now: Now, by: PeerAskedFor, pledge: bool, fx: &mut Vec<Effect>) -> u64 {
        let question = self.next_id;
        let epoch = self.durable.complete;
        let pledge =
            pledge.then(|| PledgeAsk { epoch, start: self.setup.start, question, boot: self.setup.boot.clone() });
        let ask = PeerQuestion::Pulse { state: self.my_state(), pledge };
        self.ask_peer(now, by, ask, PEER_LIMIT, fx)
    }

    pub(super) fn ask_peer(
        &mut self,
        now: Now,
        by: PeerAskedFor,
        ask: PeerQuestion,
        limit: Duration,
        fx: &mut Vec<Effect>,
    ) -> u64 {
        let question = self.id();
        self.peer.questions.insert(question, (now.boot, by, self.durable.complete));
        self.peer.unanswered_since.get_or_insert(now.boot);
        fx.push(Effect::AskPeer { question, ask: Box::new(ask), limit });
        question
    }

    pub(super) fn on_witness_answered(
        &mut self,
        now: Now,
        question: u64,
        answer: Result<Reading, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(asked) = self.witness.questions.remove(&question) else { return };
        let reading = match answer {
            Ok(reading) => reading,
            Err(why) => {
                self.counters.witness_silent += 1;
                if let Some(server) = self.witness.servers.get_mut(asked.server) {
                    server.error = Some(why.clone());
                }
                return self.deliver_reading(now, asked.purpose, question, Err(why), fx);
            }
        };
        self.compare_clocks(now, asked, reading.signed_time, fx);
        let seen = evidence::see(&self.setup, &reading);
        self.fold_reading(now, asked, &reading, &seen, fx);
        self.deliver_reading(now, asked.purpose, question, Ok((reading.pair, seen)), fx);
    }

    fn deliver_reading(
        &mut self,
        now: Now,
        purpose: AskedFor,
        question: u64,
        reading: Result<(RecordPair, Seen), String>,
        fx: &mut Vec<Effect>,
    ) {
        match purpose {
            AskedFor::Poll => {}
            AskedFor::Job => self.on_job_reading(now, question, reading, fx),
            AskedFor::Takeover => self.on_takeover_reading(now, question, reading, fx),
        }
    }

    fn fold_reading(&mut self, now: Now, asked: Asked, reading: &Reading, seen: &Seen, fx: &mut Vec<Effect>) {
        if asked.at < self.witness.ignore_before {
            return;
        }
        let first = asked.server == 0;
        let memory = self.memory();
        let verdict = match self.setup.mode {
            Mode::Update => evidence::judge(&self.setup, memory, first, seen),
            // Nobody is asked where there is no witness.
            Mode::Observe | Mode::VipOnly => evidence::judge_observed(&self.setup, seen),
        };
        let Some(server) = self.witness.servers.get_mut(asked.server) else { return };
        server.error = None;
        if server.asked.is_some_and(|before| before > asked.at) {
            return;
        }
        server.asked = Some(asked.at);
        server.seen = Some(seen.clone());
        if verdict == Verdict::Lagging {
            return;
        }
        let same_kind = |a: &Verdict| std::mem::discriminant(a) == std::mem::discriminant(&verdict);
        let changed = !server.verdict.as_ref().is_some_and(same_kind);
        if changed {
            server.since = now.boot;
        }
        server.verdict = Some(verdict.clone());
        if first {
            self.witness.pair = Some(reading.pair.clone());
            self.witness.marker = evidence::marker_of(seen).cloned();
        }
        if let Some(marker) = evidence::marker_of(seen) {
            if first && self.setup.mode == Mode::Update {
                self.compare_journal(now, marker, fx);
            }
            self.see_epoch(marker.epoch, fx);
        }
        if self.durable.is_holder() || self.durable.won > self.durable.complete {
            self.act_on_verdict(now, asked, changed, &verdict, seen, fx);
        }
    }

    fn act_on_verdict(
        &mut self,
        now: Now,
        asked: Asked,
        changed: bool,
        verdict: &Verdict,
        seen: &Seen,
        fx: &mut Vec<Effect>,
    ) {
        let server = self.setup.servers.get(asked.server).cloned().unwrap_or_default();
        match verdict {
            Verdict::Here if asked.server == 0 || self.setup.mode == Mode::Observe => {
                self.counters.witness_proofs += 1;
                self.extend_unbroken(asked.at);
                self.proofs.witnessed(asked.at);
                // R6: an address without an epoch confirms nothing after a start; the peer's pledge does, or a promote.
                let update = self.setup.mode == Mode::Update;
                self.witness.confirmed |= update;
                if update && let Some(marker) = evidence::marker_of(seen) {
                    self.witness.sync = Some(marker.sync.clone());
                }
            }
            Verdict::Higher { epoch, active } if self.durable.is_holder() => {
                self.fence(now, *epoch, format!("{active} took over at epoch {epoch}"), fx);
            }
            Verdict::Nothing { why } => {
                self.proofs.void();
                // Our own update landed, and that it did is still to be written down.
                let own = evidence::marker_of(seen).is_some_and(|m| {
                    m.active == self.setup.me && m.epoch > self.durable.won && self.durable.refused.next() >= m.epoch
                });
                if changed && !own {
                    self.note(now, fx, "record_says_nothing", format!("{server}: {why}"));
                }
            }
            Verdict::Elsewhere { node } => {
                if self.setup.mode == Mode::Update || self.elsewhere_everywhere() {
                    self.proofs.void();
                }
                if changed {
                    self.note(now, fx, "record_elsewhere", format!("{server}: the record names {node}"));
                }
            }
            Verdict::Here | Verdict::Lagging | Verdict::Higher { .. } => {}
        }
    }

    /// Durably remembers the highest epoch known from anywhere; at most one write per epoch.
    pub(super) fn see_epoch(&mut self, epoch: Epoch, fx: &mut Vec<Effect>) {
        if epoch > self.durable.seen && epoch > self.witness.seen_writing {
            self.witness.seen_writing = epoch;
            self.record(fx, vec![Entry::Seen { epoch }], Then::Nothing);
        }
    }

    /// A negative verdict that stands: the reason, else `None`.
    pub(super) fn against(&self) -> Option<String> {
        let observe = self.setup.mode == Mode::Observe;
        for (index, server) in self.witness.servers.iter().enumerate() {
            let name = self.setup.servers.get(index).map_or("", String::as_str);
            match &server.verdict {
                Some(Verdict::Nothing { why }) => return Some(format!("the record at {name} says nothing: {why}")),
                Some(Verdict::Elsewhere { node }) if !observe || self.elsewhere_everywhere() => {
                    return Some(format!("the record at {name} names {node}"));
                }
                Some(Verdict::Higher { epoch, active }) => return Some(format!("{active} took over at epoch {epoch}")),
                Some(Verdict::Elsewhere { .. } | Verdict::Here | Verdict::Lagging) | None => {}
            }
        }
        None
    }

    /// Since when the record has named another node under our own epoch, and which.
    pub(super) fn elsewhere_since(&self) -> Option<(Instant, NodeName)> {
        if self.setup.mode == Mode::Observe && !self.elsewhere_everywhere() {
            return None;
        }
        // A silent server does not go on saying it: the record may have been put back since.
        let standing = self.witness.servers.iter().filter(|s| s.error.is_none()).filter_map(|s| match &s.verdict {
            Some(Verdict::Elsewhere { node }) => Some((s.since, node.clone())),
            _ => None,
        });
        match self.setup.mode {
            Mode::Update => standing.min_by_key(|(since, _)| *since),
            // It counts from when the last of them said so.
            Mode::Observe | Mode::VipOnly => standing.max_by_key(|(since, _)| *since),
        }
    }

    /// When a record that names the peer becomes a fence.
    pub(super) fn elsewhere_due(&self) -> Option<Instant> {
        let served = self.durable.is_holder() && self.fenced().is_none();
        self.elsewhere_since().filter(|_| served).map(|(since, _)| since + self.wait())
    }

    /// When W after a new boot is over.
    pub(super) fn open_from(&self) -> Instant {
        self.witness.boot_from.map_or(Instant::ZERO, |from| from + self.wait())
    }

    /// Proof in hand, but not yet enough to open after a start or a lapse (R5, R6).
    pub(super) fn not_confirmed(&self, now: Now) -> Option<String> {
        match self.setup.mode {
            Mode::Update => {
                if !self.witness.confirmed {
                    let epoch = self.durable.complete;
                    return Some(format!("the witness has not confirmed epoch {epoch} since this start"));
                }
                // A zone restored from a backup confirms an epoch that is long over; who took over since knows.
                if !self.peer.settled && self.setup.peer != self.setup.me {
                    return Some(format!("{} is being asked whether it has taken over", self.setup.peer));
                }
                (now.boot < self.open_from()).then(|| "a new boot: waiting W before this node may open".to_owned())
            }
            // A lease without DNS begins with a pledge or a promote of this life (R3): to have one is to be confirmed.
            Mode::VipOnly => None,
            Mode::Observe => {
                if !self.witness.confirmed {
                    return Some(format!(
                        "observe mode: after a start only the pledge of {} confirms epoch {}, or a promote here",
                        self.setup.peer, self.durable.complete
                    ));
                }
                let since = self.witness.unbroken_since;
                let enough = since.is_some_and(|since| since + self.wait() <= now.boot) && now.boot >= self.open_from();
                (!self.keeps_clients() && !enough)
                    .then(|| "observe mode: proofs must be unbroken for W before the gate opens".to_owned())
            }
        }
    }

    pub(super) fn on_peer_answered(
        &mut self,
        now: Now,
        question: u64,
        answer: Result<Box<PeerAnswer>, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some((asked, by, epoch)) = self.peer.questions.remove(&question) else { return };
        self.peer.settled = true;
        if answer.is_ok() {
            self.peer.heard = Some(now.boot);
            self.peer.heard_wall = Some(now.rfc3339());
            self.peer.answered = Some(now.boot);
            self.peer.unanswered_since = None;
        }
        if let Ok(answer) = &answer
            && let PeerAnswer::Pulse { state, pledge } = answer.as_ref()
        {
            self.hear(now, state.clone(), fx);
            self.hear_of_block(asked, state, fx);
            // In observe mode a pledge must not begin the unbroken row while the record speaks against this node.
            let void = self.setup.mode == Mode::Observe && self.against().is_some();
            let fresh = asked >= self.proofs_from && epoch == self.durable.complete && !void;
            if pledge == &Some(Ok(question)) && fresh && self.durable.is_holder() {
                self.counters.peer_pledges += 1;
                self.extend_unbroken(asked);
                self.proofs.pledged(asked);
                if self.setup.mode == Mode::Observe {
                    self.witness.confirmed = true;
                }
            }
        }
        match by {
            PeerAskedFor::Pulse => {}
            PeerAskedFor::Takeover => self.on_takeover_peer(now, question, answer, fx),
            PeerAskedFor::Rejoin => self.on_rejoin_peer(now, question, answer, fx),
            PeerAskedFor::Alone => self.on_alone_answered(now, question, answer, fx),
            PeerAskedFor::Forward { ticket } => self.on_forwarded(now, ticket, answer, fx),
        }
    }

    /// Folds the peer's state in.
    fn hear(&mut self, now: Now, state: PeerState, fx: &mut Vec<Effect>) {
        self.peer.heard = Some(now.boot);
        self.peer.heard_wall = Some(now.rfc3339());
        self.see_epoch(state.seen.max(state.won), fx);
        self.hear_of_sync(&state, fx);
        self.hear_of_release(&state, fx);
        if state.digest != self.setup.digest && !self.peer.mismatch_noted {
            self.peer.mismatch_noted = true;
            let text =
                format!("{} runs another configuration (nodes, timers or witness differ): no pledges", state.node);
            self.note(now, fx, "configuration_differs", text);
        } else if state.digest == self.setup.digest {
            self.peer.mismatch_noted = false;
        }
        if self.durable.is_holder() && self.fenced().is_none() && state.won >= self.durable.complete {
            let both = state.won == self.durable.complete;
            let reason = if both {
                format!("{} claims epoch {} too", state.node, state.won)
            } else {
                format!("{} holds epoch {}", state.node, state.won)
            };
            let number = if both { state.won.next() } else { state.won };
            self.fence(now, number, reason, fx);
        }
        if !self.durable.initialised
            && self.durable.is_virgin()
            && state.seen == Epoch::NONE
            && state.won == Epoch::NONE
        {
            let writing = self.writing.iter().any(|(_, e, _)| e.contains(&Entry::Initialised));
            if !writing {
                self.record(fx, vec![Entry::Initialised], Then::Nothing);
            }
        }
        self.peer.state = Some(state);
    }

    pub(super) fn on_peer_asked(&mut self, now: Now, ticket: Ticket, question: PeerQuestion, fx: &mut Vec<Effect>) {
        match question {
            PeerQuestion::Pulse { state, pledge } => {
                self.hear(now, state.clone(), fx);
                let pledge = pledge.map(|ask| self.pledge(now, &state, &ask).map(|()| ask.question));
                if let Some(Ok(_)) = pledge {
                    self.peer.pledged_to = Some((state.start, now.boot));
                }
                let answer = PeerAnswer::Pulse { state: self.my_state(), pledge };
                fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
            }
            PeerQuestion::Prepare { attempt, epoch } => self.on_prepare(now, ticket, attempt, epoch, fx),
            PeerQuestion::StopPrimary { attempt } => self.on_stop_primary(now, ticket, attempt, fx),
            PeerQuestion::Consent { attempt, epoch, handed_over } => {
                self.on_consent(now, ticket, attempt, epoch, handed_over, fx)
            }
            PeerQuestion::PutBack { attempt } => self.on_put_back(now, ticket, attempt, fx),
            PeerQuestion::PrepareRejoin { id, look: true, tail } => self.on_look(ticket, id, tail, fx),
            PeerQuestion::PrepareRejoin { id, .. } => self.on_prepare_rejoin(now, ticket, id, fx),
            PeerQuestion::GoingAlone { epoch, since } => self.on_going_alone(now, ticket, epoch, since, fx),
            PeerQuestion::Run { command, .. } => self.on_run_for_peer(now, ticket, command, fx),
            PeerQuestion::Follow { .. } | PeerQuestion::PrepareFollower { .. } => {
                let why = format!("{} has a vote and does not ask like a node without one", self.setup.peer);
                fx.push(Effect::AnswerPeer { ticket, answer: Box::new(PeerAnswer::Refused { why }) });
            }
        }
    }

    /// The peer answered or asked something lately.
    pub(super) fn peer_reachable(&self, now: Now) -> bool {
        let limit = (self.setup.poll * 5 / 2).max(PEER_LIMIT);
        self.peer.answered.is_some_and(|at| now.boot.since(at) < limit)
    }

    /// Neither an answer nor a word of the peer's own has come for [`PEER_LIMIT`] and longer, although questions are on
    /// their way to it, and not only just: the first of them left a poll after the last answer.
    pub(super) fn peer_is_silent(&self, now: Now) -> bool {
        let since = |at: Instant, limit| now.boot >= at + limit;
        self.peer.unanswered_since.is_some_and(|at| since(at, PEER_LIMIT / 4))
            && self.peer.heard.is_none_or(|at| since(at, PEER_LIMIT))
    }

    /// What this node tells the other.
    pub(super) fn my_state(&self) -> PeerState {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up);
        PeerState {
            node: self.setup.me.clone(),
            version: self.setup.version.clone(),
            start: self.setup.start,
            boot: self.setup.boot.clone(),
            role: self.role(),
            gate_open: self.gate.open,
            refused: self.durable.refused,
            won: self.durable.won,
            complete: self.durable.complete,
            fence: self.durable.fence,
            seen: self.durable.seen,
            digest: self.setup.digest.clone(),
            nodes: self.setup.nodes.iter().map(|node| node.name.clone()).collect(),
            pg: report.map(|r| PeerPg {
                system_id: r.system_id,
                in_recovery: r.in_recovery,
                timeline: r.timeline,
                lsn: r.lsn,
                replay_lsn: r.replay_lsn,
                streaming: r.streaming,
                confirmed: self.standby_row().and_then(|row| row.flush_lsn),
            }),
            pg_present: self.pg_present || self.pg.report.is_some(),
            in_sync: self.in_sync(),
            prepared: self.is_prepared(),
            adopted: self.pg.adopted && self.pg.task.is_none(),
            rejoining: self.durable.rejoining,
            unheard: self.durable.served_unheard(),
            maintenance: self.in_maintenance(),
            tunnels: true,
            looks: true,
            blocks: self.gives_its_word(),
            procedure: self.procedure_brief(),
            handing_over: self.handover.as_ref().map(|h| (h.attempt, h.word().to_owned())),
            hangs_since: self.hangs_since(self.at).map(str::to_owned),
            wants_rejoin: self.wants_rejoin(),
        }
    }
}
