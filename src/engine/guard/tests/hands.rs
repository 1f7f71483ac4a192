//! The hands of the simulated world: what becomes of every effect, and what is delivered when. Questions are answered,
//! lost or late; PostgreSQL does its tasks; a client writes through every open gate and counts what was acknowledged.
//!
//! What it is NOT: the clocks and the queue (`world`), or what must hold (`laws`).

use super::laws::MISSING;
use super::world::{Cut, Delivery, MS, Pg, World, holds, name};
use crate::base::ids::{Lsn, SystemId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::report::{ControlData, PgReport, RejoinHow, RejoinPlan, SourceFacts, StandbyRow};
use crate::engine::turn::{Effect, Event, PgOutput, PgTask};
use crate::wire::dns::{Reading, RecordPair, UpdateOutcome};

impl World {
    /// How long something takes: usually `quick`, sometimes anything up to `slow` milliseconds.
    fn delay(&mut self, quick: Duration, slow: u64) -> Duration {
        let Some(rng) = &mut self.rng else { return quick };
        if rng.one_in(12) { rng.ms(slow) } else { quick + Duration::from_micros(rng.below(4000)) }
    }

    /// With faults at play, once in `n`.
    fn chance(&mut self, n: u64) -> bool {
        self.rng.as_mut().is_some_and(|rng| rng.one_in(n))
    }

    fn dns_reaches(&self, node: usize) -> bool {
        self.dns_up && !self.dns_cut[node]
    }

    fn wire_from(&self, node: usize) -> bool {
        self.wire_up && !self.mute[node]
    }

    /// Writes through every open gate; a write is acknowledged as PostgreSQL would.
    fn client(&mut self) {
        self.post(self.client_every, Delivery::Client);
        for node in 0..2 {
            let pg = &self.nodes[node].pg;
            let stands = self.nodes[node].frozen_until > self.now || pg.frozen;
            if !self.is_open(node) || stands || !pg.up || pg.in_recovery {
                continue;
            }
            if self.check_acked
                && !self.loss_accepted
                && let Some(text) = self.missing_on(node)
            {
                self.broke(MISSING, text);
                return;
            }
            let pg = &self.nodes[node].pg;
            let synchronous = !pg.list.is_empty();
            let streams = self.streams(1 - node);
            let pg = &mut self.nodes[node].pg;
            pg.lsn += 1;
            let last = pg.data.last_mut().expect("a branch");
            last.1 += 1;
            let (branch, count) = *last;
            let flushes = streams && !self.nodes[1 - node].pg.hung && !self.nodes[1 - node].pg.frozen;
            if synchronous && flushes {
                self.catch_up(1 - node);
            }
            if !synchronous || flushes {
                self.acked.insert(branch, count);
                self.acks += 1;
            }
        }
    }

    /// The list is emptied: every commit that waited is a plain success.
    fn release_commits(&mut self, node: usize) {
        let pg = &self.nodes[node].pg;
        if let Some((branch, count)) = pg.data.last().copied().filter(|_| pg.up && !pg.list.is_empty()) {
            self.acked.insert(branch, count);
        }
    }

    /// The standby receives everything its primary has.
    pub(super) fn catch_up(&mut self, standby: usize) {
        let from = self.nodes[1 - standby].pg.clone();
        let to = &mut self.nodes[standby].pg;
        (to.lsn, to.timeline, to.data) = (from.lsn, from.timeline, from.data);
    }

    pub(super) fn effects(&mut self, node: usize, effects: Vec<Effect>) {
        let life = self.nodes[node].life;
        for (index, effect) in effects.into_iter().enumerate() {
            if self.burn(node) {
                return;
            }
            if self.meddles_with(node, &effect) {
                continue;
            }
            match effect {
                Effect::Cut { .. } => {
                    assert_eq!(index, 0, "a cut is the first effect of its turn");
                    self.nodes[node].gate_until = Instant::ZERO;
                }
                Effect::Suspend { until, .. } => {
                    assert!(index == 0 || !self.is_open(node), "it shuts an open gate before anything else");
                    assert!(until > self.clocks(node).boot, "nobody waits for a lease that has run out");
                    self.nodes[node].gate_until = Instant::ZERO;
                }
                Effect::CarryOver { epoch, .. } => {
                    assert_eq!(index, 0, "sessions are carried before anything else");
                    assert!(!self.is_open(node), "only what is suspended is carried");
                    self.nodes[node].gate_until = Instant::ZERO;
                    if !self.lean {
                        self.nodes[node].said.push(format!("carried over at {epoch}"));
                    }
                }
                Effect::Extend { until } => {
                    self.openings += u64::from(!self.is_open(node));
                    self.nodes[node].gate_until = until;
                }
                Effect::Record { seq, entries } => {
                    let after = self.delay(MS * 2, 400);
                    // One journal thread: in order.
                    let last = self
                        .queue
                        .iter()
                        .filter(
                            |(_, d)| matches!(d, Delivery::Write { node: n, life: l, .. } if *n == node && *l == life),
                        )
                        .map(|((at, _), _)| *at)
                        .max();
                    let after = after.max(last.map_or(Duration::ZERO, |at| at.since(self.now)));
                    self.post(after, Delivery::Write { node, life, seq, entries });
                }
                Effect::AskWitness { question, limit, server } => {
                    let limit = self.nodes[node].clock.span(limit);
                    let pair = self.second.clone().filter(|_| server == 1).unwrap_or_else(|| self.record.clone());
                    let after = self.delay(MS * 2, 3000);
                    let heard = self.dns_reaches(node) && !self.deaf[node] && !(self.first_silent && server == 0);
                    let (after, answer) = match heard && after < limit {
                        true => (after, Ok(Reading { pair, ..Reading::default() })),
                        false => (limit, Err("no answer".to_owned())),
                    };
                    self.post(after, Delivery::To(node, life, Event::WitnessAnswered { question, answer }));
                }
                Effect::Update { op, prerequisite, addresses, marker, limit } => {
                    let limit = self.nodes[node].clock.span(limit);
                    let next = RecordPair::written(&addresses, 5, &marker);
                    self.update(node, op, prerequisite, next, limit);
                }
                Effect::AskPeer { question, ask, limit } => {
                    let limit = self.nodes[node].clock.span(limit);
                    let failure = Event::PeerAnswered { question, answer: Err("no answer".into()) };
                    self.post(limit, Delivery::To(node, life, failure));
                    let mut copy = false;
                    while !self.chance(40) {
                        let after = self.delay(MS, 2500);
                        let ask = ask.clone();
                        self.post(after, Delivery::Ask { from: node, life, question, ask, copy });
                        if copy || !self.chance(40) {
                            break;
                        }
                        copy = true;
                    }
                }
                Effect::AnswerPeer { ticket, answer } => {
                    if let Some((from, life, question)) = self.nodes[node].asked.remove(&ticket)
                        && self.wire_from(node)
                        && !self.chance(40)
                    {
                        let event = Event::PeerAnswered { question, answer: Ok(answer) };
                        let after = self.delay(MS, 2500);
                        self.post(after, Delivery::To(from, life, event));
                    }
                }
                Effect::Pg { op, task } => {
                    let after = self.delay(MS * 20, 3000);
                    self.post(after, Delivery::Pg { node, life, op, task });
                }
                Effect::Drain { op, .. } => {
                    self.post(MS * 5, Delivery::To(node, life, Event::Drained { op, cancelled: 0, busy: 0 }));
                }
                Effect::Say { text, .. } | Effect::Progress { text, .. } if !self.lean => {
                    self.nodes[node].said.push(text);
                }
                Effect::End { ticket, exit, text, .. } => {
                    self.note(|_| format!("{} ended with {exit}: {text}", name(node)));
                    self.nodes[node].ends.insert(ticket, (exit, text));
                }
                Effect::BindVip { address, seconds } => {
                    let was = self.nodes[node].vip_until > self.now;
                    let time = Duration::from_secs(u64::from(seconds));
                    self.nodes[node].vip_until = self.now + self.nodes[node].clock.span(time);
                    if !was {
                        self.post(MS, Delivery::To(node, life, Event::VipBound { address }));
                    }
                }
                Effect::UnbindVip { .. } => self.nodes[node].vip_until = Instant::ZERO,
                Effect::ProbeVip { address } => {
                    let claimed_by = self.vip_elsewhere(node).then(|| "02:00:00:00:00:01".to_owned());
                    self.post(MS * 600, Delivery::To(node, life, Event::VipProbed { address, claimed_by }));
                }
                Effect::AskNeighbour { question, limit, .. } => {
                    let answered = self.gateway[node] && self.vip_here(node) && !self.vip_elsewhere(node);
                    let (after, answer) = match answered && !self.chance(20) {
                        true => (self.delay(MS, 900), Ok([192, 0, 2, 1].into())),
                        false => (self.nodes[node].clock.span(limit), Err("nobody answered".to_owned())),
                    };
                    self.post(after, Delivery::To(node, life, Event::NeighbourAnswered { question, answer }));
                }
                Effect::Forward { serves, returns } => {
                    let peer = self.nodes[1 - node].shadow.complete;
                    assert!(serves.or(returns).is_none_or(|epoch| epoch <= peer), "only what the peer holds or held");
                }
                Effect::Say { .. }
                | Effect::Count { .. }
                | Effect::Progress { .. }
                | Effect::Note { .. }
                | Effect::HoldClients
                | Effect::HoldToCarry
                | Effect::LetClientsGo
                | Effect::AnnounceVip { .. }
                | Effect::AskNode { .. }
                | Effect::FollowFrom { .. }
                | Effect::KernelGate { .. }
                | Effect::Units { .. } => {}
                Effect::Stonith { op, .. } => {
                    self.shot.push((self.now, self.marker().map_or(0, |m| m.epoch.0)));
                    self.crash(1 - node);
                    self.post(MS * 500, Delivery::To(node, life, Event::StonithDone { op, result: Ok(()) }));
                }
            }
        }
    }

    fn update(
        &mut self,
        node: usize,
        op: crate::base::ids::OpId,
        prerequisite: RecordPair,
        next: RecordPair,
        limit: Duration,
    ) {
        let life = self.nodes[node].life;
        let unanswered = |why: &str, outcome: fn(String) -> UpdateOutcome| {
            Delivery::To(node, life, Event::UpdateAnswered { op, outcome: outcome(why.to_owned()) })
        };
        let after = self.delay(MS * 2, 6000);
        if !self.dns_reaches(node) {
            self.post(limit, unanswered("down", UpdateOutcome::NotSent));
        } else if self.hold_updates {
            self.held.push((prerequisite, next));
            self.post(limit, unanswered("on its way", UpdateOutcome::Unknown));
        } else if after >= limit || self.deaf[node] {
            self.post(limit, unanswered("late", UpdateOutcome::Unknown));
            self.post(after, Delivery::Landing { prerequisite, next });
        } else {
            if self.chance(20) {
                // A copy that the network kept for a while.
                let later = after + self.delay(MS * 100, 20_000);
                self.post(later, Delivery::Landing { prerequisite: prerequisite.clone(), next: next.clone() });
            }
            self.post(after, Delivery::Update { node, life, op, prerequisite, next, limit });
        }
    }

    fn vip_here(&self, node: usize) -> bool {
        self.nodes[node].vip_until > self.now
    }

    /// The other node has the VIP too, and can be heard.
    fn vip_elsewhere(&self, node: usize) -> bool {
        self.lan_up && self.vip_here(1 - node)
    }

    pub(super) fn streams(&self, standby: usize) -> bool {
        let (s, p) = (&self.nodes[standby].pg, &self.nodes[1 - standby].pg);
        self.wire_up
            && self.streams_up
            && self.mute == [false; 2]
            && s.up
            && p.up
            && s.in_recovery
            && s.follows
            && !p.in_recovery
            && s.lsn <= p.lsn
            && s.timeline <= p.timeline
            && s.data.iter().all(|(branch, count)| holds(&p.data, *branch, *count))
    }

    pub(super) fn report(&mut self, node: usize) -> Option<PgReport> {
        let other = 1 - node;
        if self.streams(node) && !self.nodes[node].pg.hung && !self.nodes[1 - node].pg.frozen {
            self.catch_up(node);
        }
        let streaming = self.streams(node);
        let row = self.streams(other).then(|| StandbyRow {
            application_name: name(other).to_string(),
            state: "streaming".into(),
            sync_state: if self.nodes[node].pg.list.is_empty() { "async" } else { "sync" }.into(),
            flush_lsn: Some(Lsn(self.nodes[other].pg.lsn)),
            replay_lsn: Some(Lsn(self.nodes[other].pg.lsn)),
            pid: 1,
        });
        let pg = &self.nodes[node].pg;
        pg.up.then(|| PgReport {
            next_xid: None,
            start: pg.start,
            system_id: SystemId(77),
            in_recovery: pg.in_recovery,
            timeline: TimelineId(pg.timeline),
            lsn: Lsn(pg.lsn),
            flush_lsn: (!pg.in_recovery).then_some(Lsn(pg.lsn)),
            replay_lsn: pg.in_recovery.then_some(Lsn(pg.lsn)),
            receive_lsn: None,
            streaming,
            sync_list: pg.list.clone(),
            conf_loaded_us: 0,
            read_only: false,
            standbys: row.into_iter().collect(),
        })
    }

    pub(super) fn run_pg(&mut self, node: usize, task: PgTask) -> Result<PgOutput, String> {
        let standby = &self.nodes[1 - node].pg;
        let streams = self.streams(1 - node) && !standby.hung && !standby.frozen && !self.nodes[node].pg.frozen;
        let other = self.nodes[1 - node].pg.clone();
        if task == PgTask::SetSyncList(None) && self.is_open(node) && !self.nodes[node].pg.in_recovery {
            self.release_commits(node);
        }
        let n = &mut self.nodes[node];
        let pg = &mut n.pg;
        match task {
            PgTask::SetSyncList(list) => pg.list = list.map(|n| format!("\"{n}\"")).unwrap_or_default(),
            PgTask::RearmBarrier if pg.up => return Ok(PgOutput::Lsn(Lsn(pg.lsn))),
            PgTask::Stop | PgTask::StopNow => {
                pg.frozen = false;
                // A standby writes no checkpoint of its own, and what is down is down.
                pg.lsn += if pg.up && !pg.in_recovery { 10 } else { 0 };
                pg.up = false;
                let (lsn, timeline) = (pg.lsn, pg.timeline);
                if streams {
                    pg.up = true;
                    self.catch_up(1 - node);
                    self.nodes[node].pg.up = false;
                }
                let data = ControlData {
                    system_id: SystemId(77),
                    state: "shut down".into(),
                    checkpoint: Lsn(lsn - 1),
                    timeline: TimelineId(timeline),
                };
                return Ok(PgOutput::Control(data));
            }
            // Running is started; a standby is only told whom to follow; a primary is promoted.
            PgTask::Start if pg.up => {}
            PgTask::Demote { follow_peer } if pg.up && pg.in_recovery => pg.follows = follow_peer,
            PgTask::Promote { .. } if pg.up && !pg.in_recovery => {}
            PgTask::Promote { .. } | PgTask::Checkpoint | PgTask::RearmBarrier if !pg.up => {
                return Err("PostgreSQL does not run".to_owned());
            }
            PgTask::Rejoin(_) if !other.up || other.in_recovery => {
                return Err("there is no primary to clone".to_owned());
            }
            PgTask::Start => {
                pg.up = true;
                pg.start += 1;
            }
            PgTask::Demote { follow_peer } => {
                let start = pg.start + 1;
                *pg = Pg { up: true, in_recovery: true, follows: follow_peer, start, frozen: false, ..pg.clone() };
            }
            PgTask::Promote { above } => {
                pg.in_recovery = false;
                pg.follows = false;
                pg.timeline = pg.timeline.max(above.0) + 1;
                pg.lsn += 5;
                n.promotions += 1;
                pg.data.push((n.promotions * 2 + node as u64, 0));
            }
            PgTask::Rejoin(source) => {
                let start = pg.start + 1;
                *pg = Pg {
                    up: true,
                    in_recovery: true,
                    timeline: other.timeline,
                    lsn: other.lsn,
                    list: String::new(),
                    follows: true,
                    hung: false,
                    frozen: false,
                    start,
                    data: other.data,
                    refusal: false,
                    told_ahead: 0,
                    source: Some(source.lsn),
                };
            }
            PgTask::PrepareStandby | PgTask::LookAsSource(_) => {
                let source = SourceFacts {
                    system_id: SystemId(77),
                    bytes: 1,
                    tablespaces: 0,
                    spaces: Vec::new(),
                    timeline: TimelineId(pg.timeline),
                    history: Vec::new(),
                    control_timeline: TimelineId(pg.timeline),
                    lsn: Lsn(pg.lsn + pg.told_ahead),
                    oldest: Lsn(0),
                    same_tail: None,
                };
                return Ok(PgOutput::Source(source));
            }
            PgTask::PlanRejoin(_) => {
                let refusal = pg.refusal.then(|| "a test says no".to_owned());
                let plan = RejoinPlan { how: RejoinHow::Clone, why: "a test".to_owned(), refusal, tail: None };
                return Ok(PgOutput::Plan(plan));
            }
            PgTask::RearmBarrier | PgTask::Checkpoint | PgTask::Adopt | PgTask::Nudge => {}
            PgTask::DropIdleSlots | PgTask::SwitchPoint { .. } => {}
        }
        Ok(PgOutput::Done)
    }

    /// Whose daemon this is for.
    pub(super) fn target(delivery: &Delivery) -> Option<usize> {
        match delivery {
            Delivery::To(node, ..)
            | Delivery::Write { node, .. }
            | Delivery::Pg { node, .. }
            | Delivery::Look(node) => Some(*node),
            Delivery::Ask { from, .. } => Some(1 - from),
            Delivery::Update { .. }
            | Delivery::Landing { .. }
            | Delivery::Client
            | Delivery::Revive(_)
            | Delivery::Act(_)
            | Delivery::Heal(_) => None,
        }
    }

    pub(super) fn deliver(&mut self, delivery: Delivery) {
        let Some(delivery) = self.meddles_with_delivery(delivery) else { return };
        if let Some(node) = Self::target(&delivery)
            && self.nodes[node].frozen_until > self.now
        {
            self.post(self.nodes[node].frozen_until.since(self.now), delivery);
            return;
        }
        match delivery {
            Delivery::To(node, life, event) if self.nodes[node].life == life => self.give(node, event),
            Delivery::To(..) => {}
            Delivery::Update { node, life, op, prerequisite, next, .. } => {
                let done = self.land(prerequisite, next);
                let outcome = if self.lose_update_answers || self.deaf[node] {
                    UpdateOutcome::Unknown("lost".into())
                } else if done {
                    UpdateOutcome::Done
                } else {
                    UpdateOutcome::Conflict
                };
                self.post(MS, Delivery::To(node, life, Event::UpdateAnswered { op, outcome }));
            }
            Delivery::Write { node, life, seq, entries } => {
                if self.nodes[node].life == life && self.nodes[node].guard.is_some() {
                    if self.nodes[node].journal_broken {
                        self.give(node, Event::RecordFailed { seq, why: "No space left on device".into() });
                        return;
                    }
                    self.write_down(node, &entries);
                    if !self.lean {
                        self.nodes[node].disk.extend(entries);
                    }
                    if self.burn(node) {
                        return;
                    }
                    self.give(node, Event::Recorded { seq });
                }
            }
            Delivery::Landing { prerequisite, next } => {
                self.land(prerequisite, next);
            }
            Delivery::Client => self.client(),
            Delivery::Ask { from, life, question, ask, copy } => {
                let to = 1 - from;
                if self.wire_from(from) && self.nodes[to].guard.is_some() {
                    // The same in every history, so that histories that differ in nothing else are one state.
                    let ticket = ((from as u64 + 1) * 1000 + life) * 10_000_000 + question * 2 + u64::from(copy);
                    self.nodes[to].asked.insert(ticket, (from, life, question));
                    self.give(to, Event::PeerAsked { ticket, question: ask });
                }
            }
            Delivery::Pg { node, life, op, task: PgTask::Checkpoint } if self.nodes[node].pg.frozen => {
                let result = Ok(PgOutput::Hangs("PostgreSQL gave no session within 4s".into()));
                self.post(MS * 4000, Delivery::To(node, life, Event::PgDone { op, result }));
            }
            Delivery::Pg { node, life, op, task } if self.needs_a_session(node, &task) => {
                let result = Err("PostgreSQL gave no session within 60s".into());
                self.post(MS * 60_000, Delivery::To(node, life, Event::PgDone { op, result }));
            }
            Delivery::Pg { node, life, op, task } => {
                if self.nodes[node].life == life && self.nodes[node].guard.is_some() {
                    let fails = self.chance(25);
                    let result = if fails && self.chance(2) {
                        Err("it was not even begun".to_owned())
                    } else {
                        self.run_pg(node, task)
                    };
                    let result = if fails { Err("it broke off".to_owned()) } else { result };
                    self.give(node, Event::PgDone { op, result });
                }
            }
            Delivery::Look(node) if self.nodes[node].pg.frozen && self.nodes[node].pg.up => {
                self.give(node, Event::PgSilent("PostgreSQL did not answer within 2s".into()));
                self.post(MS * 2000, Delivery::Look(node));
            }
            Delivery::Look(node) => {
                let event = match self.report(node) {
                    Some(report) => {
                        let asked = self.nodes[node].clock.read(self.now);
                        Event::PgObserved { asked, report: Box::new(report) }
                    }
                    None => Event::PgLost("down".into()),
                };
                self.give(node, event);
                self.post(self.look_every, Delivery::Look(node));
            }
            Delivery::Revive(node) => self.revive(node),
            Delivery::Act(act) => self.act(act),
            Delivery::Heal(cut) => self.heal_one(cut),
        }
    }

    fn needs_a_session(&self, node: usize, task: &PgTask) -> bool {
        let pg = &self.nodes[node].pg;
        let hard = matches!(task, PgTask::Stop | PgTask::StopNow | PgTask::Demote { .. } | PgTask::Rejoin(_));
        pg.frozen && pg.up && !hard
    }

    fn heal_one(&mut self, cut: Cut) {
        self.note(|_| format!("{cut:?} is over"));
        self.cut(cut, false);
    }

    /// An update reaches the server; true when its prerequisites held.
    fn land(&mut self, prerequisite: RecordPair, next: RecordPair) -> bool {
        let done = prerequisite.same_data(&self.record);
        if done {
            self.note(|_| format!("the record becomes {:?}", next.marker));
            self.record = next;
        }
        done
    }
}
