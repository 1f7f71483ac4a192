//! Two whole guards against a small simulated world: one witness, one wire, two PostgreSQLs, virtual time. After every
//! event: never two gates that could pass traffic. (The seeded simulation with faults is tests/sim, a later issue.)
//!
//! Over 600 lines: the world and the cases it plays stand together: each case is read against what the world does.

use crate::base::config::FencePostgres;
use crate::base::ids::{Lsn, NodeName, SystemId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::guard::Guard;
use crate::engine::lease::Timing;
use crate::engine::report::{ControlData, PgReport, SourceFacts, StandbyRow};
use crate::engine::setup::Mode;
use crate::engine::setup::{NodeSetup, Setup};
use crate::engine::turn::{Command, Effect, Event, Now, PgOutput, PgTask};
use crate::wire::dns::{Reading, RecordPair, UpdateOutcome};
use crate::wire::marker::Marker;
use std::collections::BTreeMap;
use std::net::IpAddr;

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn name(node: usize) -> NodeName {
    ["a", "b"][node].parse().expect("valid")
}

pub(super) fn address(node: usize) -> IpAddr {
    [[192, 0, 2, 11], [192, 0, 2, 12]][node].into()
}

#[derive(Debug, Clone)]
pub(super) struct Pg {
    pub(super) up: bool,
    pub(super) in_recovery: bool,
    pub(super) timeline: u32,
    pub(super) lsn: u64,
    pub(super) list: String,
    pub(super) follows: bool,
    pub(super) start: u64,
    /// The writes this cluster holds: how many of each branch; every promotion begins a branch.
    pub(super) data: Data,
}

pub(super) type Data = Vec<(u64, u64)>;

fn holds(data: &Data, branch: u64, count: u64) -> bool {
    data.iter().any(|(b, c)| *b == branch && *c >= count)
}

#[derive(Debug)]
pub(super) enum Delivery {
    To(usize, u64, Event),
    Update {
        node: usize,
        life: u64,
        op: crate::base::ids::OpId,
        prerequisite: RecordPair,
        next: RecordPair,
    },
    Write {
        node: usize,
        life: u64,
        seq: u64,
        entries: Vec<Entry>,
    },
    Ask {
        from: usize,
        life: u64,
        question: u64,
        ask: Box<crate::engine::turn::PeerQuestion>,
        deadline: Instant,
    },
    Pg {
        node: usize,
        life: u64,
        op: crate::base::ids::OpId,
        task: PgTask,
    },
    Look(usize),
    /// A client writes through every open gate.
    Client,
    /// A late update lands and nobody is told.
    Landing {
        prerequisite: RecordPair,
        next: RecordPair,
    },
}

/// splitmix64: small, seeded, enough.
#[derive(Debug, Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True once in `n`.
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub(super) struct Node {
    pub(super) guard: Option<Guard>,
    pub(super) life: u64,
    pub(super) disk: Vec<Entry>,
    /// The replay of `disk`, kept as it grows.
    pub(super) shadow: Durable,
    pub(super) journal_broken: bool,
    /// SIGSTOP: what comes meanwhile is delivered at the thaw.
    pub(super) frozen_until: Instant,
    /// Since when a higher epoch stands in the record.
    pub(super) superseded: Option<Instant>,
    pub(super) gate_until: Instant,
    pub(super) pg: Pg,
    pub(super) ends: BTreeMap<u64, (u8, String)>,
    pub(super) asked: BTreeMap<u64, (usize, u64, u64)>,
    pub(super) said: Vec<String>,
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) nodes: [Node; 2],
    pub(super) record: RecordPair,
    pub(super) dns_up: bool,
    pub(super) dns_cut: [bool; 2],
    /// Delays and losses; `None`: everything is quick and in order.
    pub(super) rng: Option<Rng>,
    /// Acknowledged writes: up to which of each branch.
    pub(super) acked: BTreeMap<u64, u64>,
    pub(super) acks: u64,
    pub(super) openings: u64,
    pub(super) loss_accepted: bool,
    pub(super) check_acked: bool,
    pub(super) wire_up: bool,
    pub(super) mode: Mode,
    /// What a second authority shows, where there is one.
    pub(super) second: Option<RecordPair>,
    /// Nodes that no DNS answer reaches.
    pub(super) deaf: [bool; 2],
    /// Updates land, but their answers are lost.
    pub(super) lose_update_answers: bool,
    /// Updates are on their way for as long as this is set; `release` lets them land.
    pub(super) hold_updates: bool,
    pub(super) fence_postgres: FencePostgres,
    pub(super) held: Vec<(RecordPair, RecordPair)>,
    pub(super) queue: BTreeMap<(Instant, u64), Delivery>,
    pub(super) order: u64,
    pub(super) ticket: u64,
}

impl World {
    pub(super) fn new() -> World {
        World::with(Mode::Update, 1)
    }

    pub(super) fn with(mode: Mode, servers: usize) -> World {
        let pg = |in_recovery| Pg {
            up: true,
            in_recovery,
            timeline: 1,
            lsn: 1000,
            list: String::new(),
            follows: in_recovery,
            start: 1,
            data: vec![(0, 0)],
        };
        let node = |in_recovery| Node {
            guard: None,
            life: 0,
            disk: Vec::new(),
            shadow: Durable::default(),
            journal_broken: false,
            frozen_until: Instant::ZERO,
            superseded: None,
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
            dns_cut: [false; 2],
            rng: None,
            acked: BTreeMap::new(),
            acks: 0,
            openings: 0,
            loss_accepted: false,
            check_acked: true,
            wire_up: true,
            mode,
            second: (servers > 1).then(|| RecordPair::new(vec![address(0)], 5, Vec::new())),
            deaf: [false; 2],
            lose_update_answers: false,
            hold_updates: false,
            fence_postgres: FencePostgres::Demote,
            held: Vec::new(),
            queue: BTreeMap::new(),
            order: 0,
            ticket: 100,
        };
        world.start(0);
        world.start(1);
        world.post(MS, Delivery::Look(0));
        world.post(MS * 2, Delivery::Look(1));
        world.post(MS * 50, Delivery::Client);
        world
    }

    pub(super) fn running() -> World {
        let mut world = World::new();
        world.run_until(Duration::from_secs(20), "in sync", |w| w.snapshot(0).replication.in_sync);
        world
    }

    pub(super) fn setup(&self, node: usize) -> Setup {
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
            kernel_gate: false,
            stonith: false,
            units: false,
            synchronous: true,
            fence_postgres: self.fence_postgres,
            digest: "same".into(),
            start: self.nodes[node].life + 10 * node as u64,
            boot: format!("5f1c0000-0000-4000-8000-00000000000{node}"),
        }
    }

    pub(super) fn clocks(&self) -> Now {
        let micros = i64::try_from(self.now.as_nanos() / 1000).expect("small") + 1_700_000_000_000_000;
        Now { boot: self.now, wall: jiff::Timestamp::from_microsecond(micros).expect("valid") }
    }

    pub(super) fn post(&mut self, after: Duration, delivery: Delivery) {
        self.order += 1;
        self.queue.insert((self.now + after, self.order), delivery);
    }

    pub(super) fn start(&mut self, node: usize) {
        self.nodes[node].life += 1;
        let mut effects = Vec::new();
        let durable = Durable::replay(&self.nodes[node].disk);
        assert_eq!(durable, self.nodes[node].shadow, "replay equals live state");
        let guard = Guard::start(self.setup(node), durable, true, self.clocks(), &mut effects);
        self.nodes[node].guard = Some(guard);
        self.effects(node, effects);
    }

    /// kill -9 of the daemon: its gate goes with its process.
    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].guard = None;
        self.nodes[node].gate_until = Instant::ZERO;
        self.nodes[node].asked.clear();
    }

    pub(super) fn kill_all(&mut self, node: usize) {
        self.kill(node);
        self.nodes[node].pg.up = false;
    }

    pub(super) fn snapshot(&self, node: usize) -> crate::engine::status::Snapshot {
        self.nodes[node].guard.as_ref().expect("running").snapshot(self.clocks())
    }

    pub(super) fn is_open(&self, node: usize) -> bool {
        self.nodes[node].gate_until > self.now
    }

    pub(super) fn durable(&self, node: usize) -> Durable {
        Durable::replay(&self.nodes[node].disk)
    }

    pub(super) fn marker(&self) -> Option<Marker> {
        self.record.marker.first().and_then(|text| text.parse().ok())
    }

    pub(super) fn command(&mut self, node: usize, command: Command) -> u64 {
        self.ticket += 1;
        let ticket = self.ticket;
        self.give(node, Event::Command { ticket, command });
        ticket
    }

    pub(super) fn promote(&mut self, node: usize, accept_data_loss: bool) -> u64 {
        self.command(node, Command::Promote { dry_run: false, yes: true, accept_data_loss, peer_is_off: None })
    }

    pub(super) fn give(&mut self, node: usize, event: Event) {
        let clocks = self.clocks();
        let Some(guard) = &mut self.nodes[node].guard else { return };
        let mut effects = Vec::new();
        guard.handle(clocks, event, &mut effects);
        assert_eq!(guard.durable, self.nodes[node].shadow, "replay equals live state");
        self.effects(node, effects);
        self.check();
    }

    /// What must hold after every event.
    fn check(&mut self) {
        assert!(!(self.is_open(0) && self.is_open(1)), "two open gates at {:?}", self.now);
        let marker = self.marker();
        for node in 0..2 {
            let higher =
                marker.as_ref().is_some_and(|m| m.epoch > self.nodes[node].shadow.complete && m.active != name(node));
            let since = self.nodes[node].superseded.unwrap_or(self.now);
            self.nodes[node].superseded = higher.then_some(since);
            if !self.is_open(node) {
                continue;
            }
            let n = &self.nodes[node];
            assert!(n.shadow.complete == n.shadow.won && n.shadow.fence <= n.shadow.complete, "open: {:?}", n.shadow);
            assert!(n.gate_until <= self.now + MS * 3000, "open beyond a lease");
            assert!(self.now.since(since) <= MS * 3000, "{} serves beside a higher epoch", name(node));
        }
    }

    /// How long something takes: usually `quick`, sometimes anything up to `slow`.
    fn delay(&mut self, quick: Duration, slow: u32) -> Duration {
        let Some(rng) = &mut self.rng else { return quick };
        if rng.one_in(12) {
            MS * u32::try_from(rng.below(u64::from(slow))).expect("small")
        } else {
            quick + Duration::from_micros(rng.below(4000))
        }
    }

    fn dns_reaches(&self, node: usize) -> bool {
        self.dns_up && !self.dns_cut[node]
    }

    /// Writes through every open gate; a write is acknowledged as PostgreSQL would.
    fn client(&mut self) {
        self.post(MS * 200, Delivery::Client);
        for node in 0..2 {
            let pg = &self.nodes[node].pg;
            if !self.is_open(node) || self.nodes[node].frozen_until > self.now || !pg.up || pg.in_recovery {
                continue;
            }
            if self.check_acked && !self.loss_accepted {
                for (branch, count) in &self.acked {
                    assert!(
                        holds(&pg.data, *branch, *count),
                        "acknowledged writes of branch {branch} up to {count} are missing on {}: {:?}",
                        name(node),
                        pg.data
                    );
                }
            }
            let synchronous = !pg.list.is_empty();
            let streams = self.streams(1 - node);
            let pg = &mut self.nodes[node].pg;
            pg.lsn += 1;
            let last = pg.data.last_mut().expect("a branch");
            last.1 += 1;
            let (branch, count) = *last;
            if synchronous && streams {
                self.catch_up(1 - node);
            }
            if !synchronous || streams {
                self.acked.insert(branch, count);
                self.acks += 1;
            }
        }
    }

    /// The standby receives everything its primary has.
    fn catch_up(&mut self, standby: usize) {
        let from = self.nodes[1 - standby].pg.clone();
        let to = &mut self.nodes[standby].pg;
        (to.lsn, to.timeline, to.data) = (from.lsn, from.timeline, from.data);
    }

    pub(super) fn effects(&mut self, node: usize, effects: Vec<Effect>) {
        let life = self.nodes[node].life;
        for (index, effect) in effects.into_iter().enumerate() {
            match effect {
                Effect::Cut { .. } => {
                    assert_eq!(index, 0, "a cut is the first effect of its turn");
                    self.nodes[node].gate_until = Instant::ZERO;
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
                    let pair = self.second.clone().filter(|_| server == 1).unwrap_or_else(|| self.record.clone());
                    let after = self.delay(MS * 2, 3000);
                    let (after, answer) = match self.dns_reaches(node) && !self.deaf[node] && after < limit {
                        true => (after, Ok(Reading { pair, ..Reading::default() })),
                        false => (limit, Err("no answer".to_owned())),
                    };
                    self.post(after, Delivery::To(node, life, Event::WitnessAnswered { question, answer }));
                }
                Effect::Update { op, prerequisite, addresses, marker, limit } => {
                    let next = RecordPair::written(&addresses, 5, &marker);
                    let after = self.delay(MS * 2, 6000);
                    if !self.dns_reaches(node) {
                        let outcome = UpdateOutcome::NotSent("down".into());
                        self.post(limit, Delivery::To(node, life, Event::UpdateAnswered { op, outcome }));
                    } else if self.hold_updates {
                        self.held.push((prerequisite, next));
                        let outcome = UpdateOutcome::Unknown("on its way".into());
                        self.post(limit, Delivery::To(node, life, Event::UpdateAnswered { op, outcome }));
                    } else if after >= limit {
                        let outcome = UpdateOutcome::Unknown("late".into());
                        self.post(limit, Delivery::To(node, life, Event::UpdateAnswered { op, outcome }));
                        self.post(after, Delivery::Landing { prerequisite, next });
                    } else {
                        self.post(after, Delivery::Update { node, life, op, prerequisite, next });
                    }
                }
                Effect::AskPeer { question, ask, limit } => {
                    let deadline = self.now + limit;
                    let after = self.delay(MS, 2500);
                    self.post(after, Delivery::Ask { from: node, life, question, ask, deadline });
                }
                Effect::AnswerPeer { ticket, answer } => {
                    if let Some((from, life, question)) = self.nodes[node].asked.remove(&ticket)
                        && self.wire_up
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
                | Effect::AnnounceVip { .. }
                | Effect::AskNeighbour { .. }
                | Effect::KernelGate { .. }
                | Effect::Units { .. }
                | Effect::Stonith { .. } => {}
            }
        }
    }

    pub(super) fn streams(&self, standby: usize) -> bool {
        let (s, p) = (&self.nodes[standby].pg, &self.nodes[1 - standby].pg);
        self.wire_up
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
        if self.streams(node) {
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

    pub(super) fn run_pg(&mut self, node: usize, task: PgTask) -> Result<PgOutput, String> {
        let streams = self.streams(1 - node);
        let other = self.nodes[1 - node].pg.clone();
        let pg = &mut self.nodes[node].pg;
        match task {
            PgTask::SetSyncList(list) => pg.list = list.map(|n| format!("\"{n}\"")).unwrap_or_default(),
            PgTask::RearmBarrier => return Ok(PgOutput::Lsn(Lsn(pg.lsn))),
            PgTask::Stop => {
                pg.up = false;
                pg.lsn += 10;
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
                self.ticket += 1;
                pg.data.push((self.ticket, 0));
            }
            PgTask::Clone(_) => {
                let start = pg.start + 1;
                *pg = Pg {
                    up: true,
                    in_recovery: true,
                    timeline: other.timeline,
                    lsn: other.lsn,
                    list: String::new(),
                    follows: true,
                    start,
                    data: other.data,
                };
            }
            PgTask::PrepareStandby => {
                let source = SourceFacts { system_id: SystemId(77), bytes: 1, tablespaces: 0 };
                return Ok(PgOutput::Source(source));
            }
            PgTask::Checkpoint | PgTask::Adopt | PgTask::Nudge => {}
        }
        Ok(PgOutput::Done)
    }

    pub(super) fn release(&mut self) {
        self.hold_updates = false;
        for (prerequisite, next) in std::mem::take(&mut self.held) {
            self.deliver(Delivery::Landing { prerequisite, next });
        }
    }

    /// Whose daemon this is for.
    fn target(delivery: &Delivery) -> Option<usize> {
        match delivery {
            Delivery::To(node, ..)
            | Delivery::Write { node, .. }
            | Delivery::Pg { node, .. }
            | Delivery::Look(node) => Some(*node),
            Delivery::Ask { from, .. } => Some(1 - from),
            Delivery::Update { .. } | Delivery::Landing { .. } | Delivery::Client => None,
        }
    }

    pub(super) fn deliver(&mut self, delivery: Delivery) {
        if let Some(node) = Self::target(&delivery)
            && self.nodes[node].frozen_until > self.now
        {
            self.post(self.nodes[node].frozen_until.since(self.now), delivery);
            return;
        }
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
                    if self.nodes[node].journal_broken {
                        self.give(node, Event::RecordFailed { seq, why: "No space left on device".into() });
                        return;
                    }
                    let fence = self.nodes[node].shadow.fence;
                    for entry in &entries {
                        self.nodes[node].shadow.apply(entry);
                    }
                    assert!(self.nodes[node].shadow.fence >= fence, "a fence number never falls");
                    self.nodes[node].disk.extend(entries);
                    self.give(node, Event::Recorded { seq });
                }
            }
            Delivery::Landing { prerequisite, next } => {
                if prerequisite.same_data(&self.record) {
                    self.record = next;
                }
            }
            Delivery::Client => self.client(),
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

    pub(super) fn step(&mut self) {
        let deadline = |n: &Node| n.guard.as_ref().map(|g| g.next_deadline().max(n.frozen_until));
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

    pub(super) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    pub(super) fn run_until(&mut self, limit: Duration, what: &str, done: impl Fn(&World) -> bool) {
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

    pub(super) fn end_of(&mut self, node: usize, ticket: u64) -> (u8, String) {
        self.run_until(Duration::from_secs(90), "the procedure ends", |w| w.nodes[node].ends.contains_key(&ticket));
        self.nodes[node].ends[&ticket].clone()
    }
}

pub(super) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
