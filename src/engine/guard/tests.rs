//! Two whole guards against a small simulated world: one witness, one wire, two PostgreSQLs, virtual time. After every
//! event: never two gates that could pass traffic. (The seeded simulation with faults is tests/sim, a later issue.)

use super::Guard;
use crate::base::config::{DnsMode, FencePostgres};
use crate::base::ids::{Epoch, Lsn, NodeName, SystemId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::lease::Timing;
use crate::engine::report::{ControlData, PgReport, SourceFacts, StandbyRow};
use crate::engine::setup::{NodeSetup, Setup};
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, Effect, Event, Now, PeerAnswer, PgOutput, PgTask};
use crate::wire::dns::{Reading, RecordPair, UpdateOutcome};
use crate::wire::marker::Marker;
use std::collections::BTreeMap;
use std::net::IpAddr;

const MS: Duration = Duration::from_millis(1);

fn name(node: usize) -> NodeName {
    ["a", "b"][node].parse().expect("valid")
}

fn address(node: usize) -> IpAddr {
    [[192, 0, 2, 11], [192, 0, 2, 12]][node].into()
}

#[derive(Debug, Clone)]
struct Pg {
    up: bool,
    in_recovery: bool,
    timeline: u32,
    lsn: u64,
    list: String,
    follows: bool,
    start: u64,
}

#[derive(Debug)]
enum Delivery {
    To(usize, u64, Event),
    Update { node: usize, life: u64, op: crate::base::ids::OpId, prerequisite: RecordPair, next: RecordPair },
    Write { node: usize, life: u64, seq: u64, entries: Vec<Entry> },
    Ask { from: usize, life: u64, question: u64, ask: Box<crate::engine::turn::PeerQuestion>, deadline: Instant },
    Pg { node: usize, life: u64, op: crate::base::ids::OpId, task: PgTask },
    Look(usize),
}

struct Node {
    guard: Option<Guard>,
    life: u64,
    disk: Vec<Entry>,
    gate_until: Instant,
    pg: Pg,
    ends: BTreeMap<u64, (u8, String)>,
    asked: BTreeMap<u64, (usize, u64, u64)>,
    said: Vec<String>,
}

struct World {
    now: Instant,
    nodes: [Node; 2],
    record: RecordPair,
    dns_up: bool,
    wire_up: bool,
    mode: DnsMode,
    /// What a second authority shows, where there is one.
    second: Option<RecordPair>,
    /// Nodes that no DNS answer reaches.
    deaf: [bool; 2],
    /// Updates land, but their answers are lost.
    lose_update_answers: bool,
    queue: BTreeMap<(Instant, u64), Delivery>,
    order: u64,
    ticket: u64,
}

impl World {
    fn new() -> World {
        World::with(DnsMode::Update, 1)
    }

    fn with(mode: DnsMode, servers: usize) -> World {
        let pg = |in_recovery| Pg {
            up: true,
            in_recovery,
            timeline: 1,
            lsn: 1000,
            list: String::new(),
            follows: in_recovery,
            start: 1,
        };
        let node = |in_recovery| Node {
            guard: None,
            life: 0,
            disk: Vec::new(),
            gate_until: Instant::ZERO,
            pg: pg(in_recovery),
            ends: BTreeMap::new(),
            asked: BTreeMap::new(),
            said: Vec::new(),
        };
        let mut world = World {
            now: Instant::from_nanos(1_000_000_000_000),
            nodes: [node(false), node(true)],
            record: RecordPair::new(vec![address(0)], 5, Vec::new()),
            dns_up: true,
            wire_up: true,
            mode,
            second: (servers > 1).then(|| RecordPair::new(vec![address(0)], 5, Vec::new())),
            deaf: [false; 2],
            lose_update_answers: false,
            queue: BTreeMap::new(),
            order: 0,
            ticket: 100,
        };
        world.start(0);
        world.start(1);
        world.post(MS, Delivery::Look(0));
        world.post(MS * 2, Delivery::Look(1));
        world
    }

    fn running() -> World {
        let mut world = World::new();
        world.run_until(Duration::from_secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
        world
    }

    fn setup(&self, node: usize) -> Setup {
        let entry = |n: usize| NodeSetup {
            name: name(n),
            addresses: vec![address(n)],
            hostname: address(n).to_string(),
            port: 5432,
            weight: 0.5,
        };
        Setup {
            version: "test".into(),
            service: "db.example.org".into(),
            me: name(node),
            peer: name(1 - node),
            nodes: vec![entry(0), entry(1)],
            timing: Timing { lease: MS * 3000, max_drift: 0.01, margin: MS * 200 },
            poll: MS * 1000,
            mode: self.mode,
            propagation: Duration::ZERO,
            servers: ["192.0.2.53:53", "192.0.2.54:53"][..1 + usize::from(self.second.is_some())]
                .iter()
                .map(ToString::to_string)
                .collect(),
            vips: Vec::new(),
            synchronous: true,
            fence_postgres: FencePostgres::Demote,
            digest: "same".into(),
            start: self.nodes[node].life + 10 * node as u64,
            boot: format!("5f1c0000-0000-4000-8000-00000000000{node}"),
        }
    }

    fn clocks(&self) -> Now {
        let micros = i64::try_from(self.now.as_nanos() / 1000).expect("small") + 1_700_000_000_000_000;
        Now { boot: self.now, wall: jiff::Timestamp::from_microsecond(micros).expect("valid") }
    }

    fn post(&mut self, after: Duration, delivery: Delivery) {
        self.order += 1;
        self.queue.insert((self.now + after, self.order), delivery);
    }

    fn start(&mut self, node: usize) {
        self.nodes[node].life += 1;
        let mut effects = Vec::new();
        let durable = Durable::replay(&self.nodes[node].disk);
        let guard = Guard::start(self.setup(node), durable, true, self.clocks(), &mut effects);
        self.nodes[node].guard = Some(guard);
        self.effects(node, effects);
    }

    /// kill -9 of the daemon: its gate goes with its process.
    fn kill(&mut self, node: usize) {
        self.nodes[node].guard = None;
        self.nodes[node].gate_until = Instant::ZERO;
        self.nodes[node].asked.clear();
    }

    fn kill_all(&mut self, node: usize) {
        self.kill(node);
        self.nodes[node].pg.up = false;
    }

    fn snapshot(&self, node: usize) -> crate::engine::status::Snapshot {
        self.nodes[node].guard.as_ref().expect("running").snapshot(self.clocks())
    }

    fn is_open(&self, node: usize) -> bool {
        self.nodes[node].gate_until > self.now
    }

    fn durable(&self, node: usize) -> Durable {
        Durable::replay(&self.nodes[node].disk)
    }

    fn marker(&self) -> Option<Marker> {
        self.record.marker.first().and_then(|text| text.parse().ok())
    }

    fn command(&mut self, node: usize, command: Command) -> u64 {
        self.ticket += 1;
        let ticket = self.ticket;
        self.give(node, Event::Command { ticket, command });
        ticket
    }

    fn promote(&mut self, node: usize, accept_data_loss: bool) -> u64 {
        self.command(node, Command::Promote { dry_run: false, yes: true, accept_data_loss, peer_is_off: None })
    }

    fn give(&mut self, node: usize, event: Event) {
        let clocks = self.clocks();
        let Some(guard) = &mut self.nodes[node].guard else { return };
        let mut effects = Vec::new();
        guard.handle(clocks, event, &mut effects);
        assert_eq!(guard.durable, Durable::replay(&self.nodes[node].disk), "replay equals live state");
        self.effects(node, effects);
        assert!(!(self.is_open(0) && self.is_open(1)), "two open gates at {:?}", self.now);
    }

    fn effects(&mut self, node: usize, effects: Vec<Effect>) {
        let life = self.nodes[node].life;
        for (index, effect) in effects.into_iter().enumerate() {
            match effect {
                Effect::Cut { .. } => {
                    assert_eq!(index, 0, "a cut is the first effect of its turn");
                    self.nodes[node].gate_until = Instant::ZERO;
                }
                Effect::Extend { until } => self.nodes[node].gate_until = until,
                Effect::Record { seq, entries } => self.post(MS * 2, Delivery::Write { node, life, seq, entries }),
                Effect::AskWitness { question, limit, server } => {
                    let pair = self.second.clone().filter(|_| server == 1).unwrap_or_else(|| self.record.clone());
                    let (after, answer) = match self.dns_up && !self.deaf[node] {
                        true => (MS * 2, Ok(Reading { pair, ..Reading::default() })),
                        false => (limit, Err("no answer".to_owned())),
                    };
                    self.post(after, Delivery::To(node, life, Event::WitnessAnswered { question, answer }));
                }
                Effect::Update { op, prerequisite, addresses, marker, limit } => {
                    let next = RecordPair::written(&addresses, 5, &marker);
                    if self.dns_up {
                        self.post(MS * 2, Delivery::Update { node, life, op, prerequisite, next });
                    } else {
                        let outcome = UpdateOutcome::NotSent("down".into());
                        self.post(limit, Delivery::To(node, life, Event::UpdateAnswered { op, outcome }));
                    }
                }
                Effect::AskPeer { question, ask, limit } => {
                    let deadline = self.now + limit;
                    self.post(MS, Delivery::Ask { from: node, life, question, ask, deadline });
                }
                Effect::AnswerPeer { ticket, answer } => {
                    if let Some((from, life, question)) = self.nodes[node].asked.remove(&ticket)
                        && self.wire_up
                    {
                        let event = Event::PeerAnswered { question, answer: Ok(answer) };
                        self.post(MS, Delivery::To(from, life, event));
                    }
                }
                Effect::Pg { op, task } => self.post(MS * 20, Delivery::Pg { node, life, op, task }),
                Effect::Drain { op, .. } => {
                    self.post(MS * 5, Delivery::To(node, life, Event::Drained { op, busy: 0 }));
                }
                Effect::Say { text, .. } => self.nodes[node].said.push(text),
                Effect::End { ticket, exit, text, .. } => {
                    self.nodes[node].ends.insert(ticket, (exit, text));
                }
                Effect::Note { .. }
                | Effect::HoldClients
                | Effect::LetClientsGo
                | Effect::BindVip { .. }
                | Effect::UnbindVip { .. }
                | Effect::ProbeVip { .. }
                | Effect::AnnounceVip { .. } => {}
            }
        }
    }

    fn streams(&self, standby: usize) -> bool {
        let (s, p) = (&self.nodes[standby].pg, &self.nodes[1 - standby].pg);
        self.wire_up
            && s.up
            && p.up
            && s.in_recovery
            && s.follows
            && !p.in_recovery
            && s.lsn <= p.lsn
            && s.timeline <= p.timeline
    }

    fn report(&mut self, node: usize) -> Option<PgReport> {
        let other = 1 - node;
        if self.streams(node) {
            let (lsn, timeline) = (self.nodes[other].pg.lsn, self.nodes[other].pg.timeline);
            self.nodes[node].pg.lsn = lsn;
            self.nodes[node].pg.timeline = timeline;
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
            start: pg.start,
            system_id: SystemId(77),
            in_recovery: pg.in_recovery,
            timeline: TimelineId(pg.timeline),
            lsn: Lsn(pg.lsn),
            replay_lsn: pg.in_recovery.then_some(Lsn(pg.lsn)),
            receive_lsn: None,
            streaming,
            sync_list: pg.list.clone(),
            conf_loaded_us: 0,
            read_only: false,
            standbys: row.into_iter().collect(),
        })
    }

    fn run_pg(&mut self, node: usize, task: PgTask) -> Result<PgOutput, String> {
        let streams = self.streams(1 - node);
        let other_lsn = self.nodes[1 - node].pg.lsn;
        let pg = &mut self.nodes[node].pg;
        match task {
            PgTask::SetSyncList(list) => pg.list = list.map(|n| format!("\"{n}\"")).unwrap_or_default(),
            PgTask::RearmBarrier => return Ok(PgOutput::Lsn(Lsn(pg.lsn))),
            PgTask::Stop => {
                pg.up = false;
                pg.lsn += 10;
                let (lsn, timeline) = (pg.lsn, pg.timeline);
                if streams {
                    self.nodes[1 - node].pg.lsn = lsn;
                }
                let data = ControlData {
                    system_id: SystemId(77),
                    state: "shut down".into(),
                    checkpoint: Lsn(lsn - 1),
                    timeline: TimelineId(timeline),
                };
                return Ok(PgOutput::Control(data));
            }
            PgTask::Start => {
                pg.up = true;
                pg.start += 1;
            }
            PgTask::Demote { follow_peer } => {
                *pg = Pg { up: true, in_recovery: true, follows: follow_peer, start: pg.start + 1, ..pg.clone() };
            }
            PgTask::Promote => {
                pg.in_recovery = false;
                pg.follows = false;
                pg.timeline += 1;
                pg.lsn += 5;
            }
            PgTask::Clone(_) => {
                let start = pg.start + 1;
                *pg = Pg {
                    up: true,
                    in_recovery: true,
                    timeline: 1,
                    lsn: other_lsn,
                    list: String::new(),
                    follows: true,
                    start,
                };
            }
            PgTask::PrepareStandby => {
                let source = SourceFacts { system_id: SystemId(77), bytes: 1, tablespaces: 0 };
                return Ok(PgOutput::Source(source));
            }
            PgTask::Checkpoint | PgTask::Adopt => {}
        }
        Ok(PgOutput::Done)
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::To(node, life, event) if self.nodes[node].life == life => self.give(node, event),
            Delivery::To(..) => {}
            Delivery::Update { node, life, op, prerequisite, next } => {
                let done = prerequisite.same_data(&self.record);
                if done {
                    self.record = next;
                }
                let outcome = if self.lose_update_answers {
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
                    self.nodes[node].disk.extend(entries);
                    self.give(node, Event::Recorded { seq });
                }
            }
            Delivery::Ask { from, life, question, ask, deadline } => {
                let to = 1 - from;
                let failure = Event::PeerAnswered { question, answer: Err("no answer".into()) };
                let late = deadline.since(self.now);
                self.post(late, Delivery::To(from, life, failure));
                if self.wire_up && self.nodes[to].guard.is_some() {
                    self.ticket += 1;
                    let ticket = self.ticket;
                    self.nodes[to].asked.insert(ticket, (from, life, question));
                    self.give(to, Event::PeerAsked { ticket, question: ask });
                }
            }
            Delivery::Pg { node, life, op, task } => {
                if self.nodes[node].life == life && self.nodes[node].guard.is_some() {
                    let result = self.run_pg(node, task);
                    self.give(node, Event::PgDone { op, result });
                }
            }
            Delivery::Look(node) => {
                let event = match self.report(node) {
                    Some(report) => Event::PgObserved { asked: self.now, report: Box::new(report) },
                    None => Event::PgLost("down".into()),
                };
                self.give(node, event);
                self.post(MS * 250, Delivery::Look(node));
            }
        }
    }

    fn step(&mut self) {
        let deadline = |n: &Node| n.guard.as_ref().map(|g| g.next_deadline());
        let next = self.queue.keys().next().map(|(at, _)| *at).expect("looks go on for ever");
        let due = [deadline(&self.nodes[0]), deadline(&self.nodes[1])];
        for (node, due) in due.into_iter().enumerate() {
            if let Some(due) = due
                && due <= next
            {
                self.now = self.now.max(due);
                self.give(node, Event::DeadlinePassed);
                return;
            }
        }
        if let Some(((at, _), delivery)) = self.queue.pop_first() {
            self.now = self.now.max(at);
            self.deliver(delivery);
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn run_until(&mut self, limit: Duration, what: &str, done: impl Fn(&World) -> bool) {
        let end = self.now + limit;
        while !done(self) {
            self.step();
            if self.now >= end {
                for node in 0..2 {
                    if self.nodes[node].guard.is_some() {
                        eprintln!("{}: {:#?}\n{:?}", name(node), self.snapshot(node), self.durable(node));
                    }
                    eprintln!(
                        "said: {:#?} ends {:?} pg {:?}",
                        self.nodes[node].said, self.nodes[node].ends, self.nodes[node].pg
                    );
                }
                panic!("not within {limit:?}: {what}; record {:?}", self.record.marker);
            }
        }
    }

    fn end_of(&mut self, node: usize, ticket: u64) -> (u8, String) {
        self.run_until(Duration::from_secs(90), "the procedure ends", |w| w.nodes[node].ends.contains_key(&ticket));
        self.nodes[node].ends[&ticket].clone()
    }
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_fresh_pair_needs_no_ceremony() {
    let world = World::running();
    assert!(world.is_open(0) && !world.is_open(1));
    let marker = world.marker().expect("written");
    assert_eq!((marker.epoch, marker.active, marker.sync), (Epoch(1), name(0), Some(name(1))));
    assert_eq!(world.snapshot(0).role, Role::Active);
    assert_eq!(world.snapshot(1).role, Role::Passive);
}

#[test]
fn a_switchover_moves_the_service_and_the_old_primary_follows() {
    let mut world = World::running();
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(1) && !world.is_open(0));
    world.run_until(secs(20), "a follows and is in sync", |w| {
        w.snapshot(0).role == Role::Passive && w.snapshot(1).replication.in_sync && w.snapshot(0).postgres.streaming
    });
    let ticket = world.promote(0, false);
    assert_eq!(world.end_of(0, ticket).0, 0, "and back again");
    assert_eq!(world.durable(0).complete, Epoch(3));
}

#[test]
fn a_failover_waits_out_w_and_the_old_node_stays_shut_until_rejoin() {
    let mut world = World::running();
    world.kill_all(0);
    let begun = world.now;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.now.since(begun) >= MS * 3261, "W was waited out");
    assert_eq!(world.marker().and_then(|m| m.sync), None, "alone, and recorded so");
    world.start(0);
    world.run_for(secs(10));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    assert!(world.nodes[0].pg.in_recovery, "demoted");
    let ticket = world.command(1, Command::Rejoin { node: name(0), dry_run: false });
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    world.run_until(secs(20), "in sync again", |w| w.snapshot(1).replication.in_sync);
    assert_eq!(world.snapshot(0).role, Role::Passive);
}

#[test]
fn a_frozen_node_never_serves_beside_the_new_one() {
    let mut world = World::running();
    let frozen = world.nodes[0].guard.take();
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    assert!(!world.is_open(0), "its lease ran out before");
    world.nodes[0].guard = frozen;
    world.run_for(secs(5));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
}

#[test]
fn dns_may_be_dead_for_long_while_the_nodes_see_each_other() {
    let mut world = World::running();
    world.dns_up = false;
    for _ in 0..600 {
        world.run_for(MS * 100);
        assert!(world.is_open(0));
    }
}

#[test]
fn both_voters_gone_shuts_within_the_lease_and_one_back_opens_again() {
    for back_is_dns in [true, false] {
        let mut world = World::running();
        world.dns_up = false;
        world.wire_up = false;
        world.run_for(MS * 3001);
        assert!(!world.is_open(0));
        assert_eq!(world.snapshot(0).gate.state, GateState::Lapsed);
        world.run_for(secs(5));
        world.dns_up = back_is_dns;
        world.wire_up = !back_is_dns;
        world.run_until(secs(3), "open again by itself", |w| w.is_open(0));
    }
}

#[test]
fn a_record_edited_by_hand_cuts_at_once_and_fences_after_w() {
    let mut world = World::running();
    let marker = world.record.marker[0].clone();
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    world.run_for(MS * 1100);
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).gate.state, GateState::Lapsed, "not fenced yet");
    world.run_for(MS * 3400);
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    world.run_for(secs(1));
    assert!(world.nodes[0].pg.in_recovery, "read-only");
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
}

#[test]
fn a_record_put_back_before_w_opens_again_without_a_fence() {
    let mut world = World::running();
    let (old, marker) = (world.record.clone(), world.record.marker[0].clone());
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    world.run_for(MS * 2000);
    assert!(!world.is_open(0));
    world.record = old;
    world.run_until(secs(2), "open again", |w| w.is_open(0));
    assert_eq!(world.durable(0).fence, Epoch(0));
}

#[test]
fn an_empty_record_lapses_but_never_fences() {
    let mut world = World::running();
    let old = world.record.clone();
    world.record = RecordPair::default();
    world.run_for(secs(30));
    assert!(!world.is_open(0));
    assert_eq!(world.snapshot(0).role, Role::Passive);
    assert_eq!(world.durable(0).fence, Epoch(0));
    world.record = old;
    world.run_until(secs(2), "open again", |w| w.is_open(0));
}

#[test]
fn an_unanswered_update_is_settled_by_another_one() {
    let mut world = World::running();
    world.kill_all(0);
    world.lose_update_answers = true;
    let ticket = world.promote(1, false);
    world.run_for(secs(4));
    world.lose_update_answers = false;
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert_eq!(world.marker().map(|m| m.epoch), Some(Epoch(2)));
}

#[test]
fn an_update_whose_fate_stays_unknown_ends_half_way_and_keeps_refusing() {
    let mut world = World::running();
    world.kill_all(0);
    world.lose_update_answers = true;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 4, "{text}");
    assert_eq!(world.durable(1).refused, Epoch(1));
    world.lose_update_answers = false;
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0, "running it again settles it");
}

#[test]
fn without_the_witness_promote_refuses_and_changes_nothing() {
    let mut world = World::running();
    world.dns_up = false;
    let before = world.durable(1);
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 3, "{text}");
    let after = world.durable(1);
    assert_eq!((before.refused, before.won), (after.refused, after.won));
    assert!(world.is_open(0));
}

#[test]
fn a_standby_that_the_record_does_not_name_is_not_promoted_without_a_word() {
    let mut world = World::running();
    world.kill_all(0);
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.start(0);
    world.run_for(secs(8));
    world.kill_all(1);
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 3, "{text}");
    assert!(text.contains("alone since"), "{text}");
    let ticket = world.promote(0, true);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
}

#[test]
fn promote_on_the_active_node_says_so() {
    let mut world = World::running();
    let ticket = world.promote(0, false);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0);
    assert!(text.contains("already active"), "{text}");
    assert_eq!(world.durable(0).complete, Epoch(1));
}

#[test]
fn fence_and_unfence_take_a_new_epoch() {
    let mut world = World::running();
    let ticket = world.command(0, Command::Fence { reason: "test".into() });
    assert_eq!(world.end_of(0, ticket).0, 0);
    assert!(!world.is_open(0));
    world.run_for(secs(5));
    assert_eq!(world.snapshot(0).role, Role::Fenced);
    let ticket = world.command(0, Command::Unfence);
    let (exit, text) = world.end_of(0, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.is_open(0));
    assert_eq!(world.durable(0).complete, Epoch(2));
}

#[test]
fn unfence_is_refused_while_the_record_points_elsewhere_or_is_silent() {
    let mut world = World::running();
    let ticket = world.command(0, Command::Fence { reason: "test".into() });
    world.end_of(0, ticket);
    world.dns_up = false;
    let ticket = world.command(0, Command::Unfence);
    assert_eq!(world.end_of(0, ticket).0, 3);
    world.dns_up = true;
    let marker = world.record.marker[0].clone();
    world.record = RecordPair::written(&[address(1)], 5, &marker);
    let ticket = world.command(0, Command::Unfence);
    assert_eq!(world.end_of(0, ticket).0, 3);
}

#[test]
fn a_restarted_daemon_opens_its_own_epoch_only_after_the_witness_confirmed_it() {
    let mut world = World::running();
    world.kill(0);
    world.dns_up = false;
    world.start(0);
    world.run_for(secs(10));
    assert!(!world.is_open(0), "a pledge alone does not open after a start");
    world.dns_up = true;
    world.run_until(secs(3), "open", |w| w.is_open(0));
}

#[test]
fn a_taker_that_dies_half_way_opens_only_by_promote_again_after_w() {
    let mut world = World::running();
    world.kill_all(0);
    world.promote(1, false);
    world.run_until(secs(10), "won", |w| w.durable(1).won == Epoch(2));
    world.kill(1);
    world.start(1);
    world.run_for(secs(10));
    assert!(!world.is_open(1), "P2: nothing opens by itself");
    let begun = world.now;
    let ticket = world.promote(1, false);
    let (exit, text) = world.end_of(1, ticket);
    assert_eq!(exit, 0, "{text}");
    assert!(world.now.since(begun) >= MS * 3261);
}

#[test]
fn of_two_people_promoting_at_once_one_wins() {
    let mut world = World::running();
    world.kill(0);
    world.run_for(secs(4));
    world.start(0);
    world.run_for(MS * 500);
    let first = world.promote(0, false);
    let second = world.promote(1, false);
    world.end_of(0, first);
    world.end_of(1, second);
    world.run_for(secs(5));
    assert!(world.is_open(0) ^ world.is_open(1));
}

#[test]
fn a_zone_restored_from_a_backup_never_makes_the_old_node_active() {
    let mut world = World::running();
    let old = world.record.clone();
    let ticket = world.promote(1, false);
    assert_eq!(world.end_of(1, ticket).0, 0);
    world.run_for(secs(10));
    world.record = old;
    world.run_for(secs(30));
    assert!(!world.is_open(0));
    assert!(!world.is_open(1), "the gate lapses");
    assert_eq!(world.snapshot(1).gate.state, GateState::Lapsed);
}

#[test]
fn a_consent_is_not_taken_back_by_a_late_put_back() {
    let mut world = World::running();
    world.promote(1, false);
    world.run_until(secs(10), "consented", |w| w.durable(0).consented);
    let ask = crate::engine::turn::PeerQuestion::PutBack { attempt: world.snapshot(1).procedure.expect("runs").id };
    world.give(0, Event::PeerAsked { ticket: 9, question: Box::new(ask) });
    world.run_for(secs(10));
    assert!(!world.is_open(0));
    assert!(world.is_open(1));
    let _shape: Option<PeerAnswer> = None;
}

mod observe;
