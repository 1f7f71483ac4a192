//! Two whole guards against a small simulated world: one witness, one wire, two PostgreSQLs, and a clock of its own on
//! each node. It is a value: cloned, hashed and replayed, so the model explores it and the simulation repeats a seed.
//!
//! What it is NOT: what the hands do with effects (`hands`), what must hold (`laws`), who plays the faults (`model`,
//! `random`, and every case by itself).

pub(super) use super::parts::{Act, Clock, Cut, Delivery, MS, Pg, Rng, VIP, address, holds, name, secs};
use crate::base::config::FencePostgres;

use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::guard::Guard;
use crate::engine::lease::Timing;
use crate::engine::setup::Mode;
use crate::engine::setup::{NodeSetup, Setup};
use crate::engine::turn::{Command, Event, Now};
use crate::wire::dns::RecordPair;
use crate::wire::marker::Marker;
use std::collections::BTreeMap;

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) guard: Option<Guard>,
    pub(super) clock: Clock,
    /// How often the machine booted.
    pub(super) boots: u64,
    pub(super) life: u64,
    pub(super) disk: Vec<Entry>,
    /// The replay of `disk`, kept as it grows.
    pub(super) shadow: Durable,
    pub(super) journal_broken: bool,
    /// SIGSTOP: what comes meanwhile is delivered at the thaw.
    pub(super) frozen_until: Instant,
    /// Since when a higher epoch stands in the record.
    pub(super) superseded: Option<Instant>,
    /// On the node's own clock.
    pub(super) gate_until: Instant,
    pub(super) pg: Pg,
    pub(super) promotions: u64,
    /// Until when the kernel keeps the VIP here, in true time.
    pub(super) vip_until: Instant,
    pub(super) off: bool,
    /// PostgreSQL went down with its machine, or an operator stopped it: who mends that starts it again.
    pub(super) fell: bool,
    pub(super) ends: BTreeMap<u64, (u8, String)>,
    pub(super) asked: BTreeMap<u64, (usize, u64, u64)>,
    pub(super) said: Vec<String>,
}

#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) now: Instant,
    pub(super) nodes: [Node; 2],
    pub(super) record: RecordPair,
    pub(super) timing: Timing,
    pub(super) poll: Duration,
    pub(super) look_every: Duration,
    pub(super) client_every: Duration,
    pub(super) dns_up: bool,
    pub(super) dns_cut: [bool; 2],
    /// Delays, losses and copies; `None`: everything is quick and in order.
    pub(super) rng: Option<Rng>,
    /// Acknowledged writes: up to which of each branch.
    pub(super) acked: BTreeMap<u64, u64>,
    pub(super) acks: u64,
    pub(super) openings: u64,
    pub(super) turns: u64,
    pub(super) loss_accepted: bool,
    pub(super) check_acked: bool,
    pub(super) wire_up: bool,
    /// The two PostgreSQLs reach each other, where the nodes do.
    pub(super) streams_up: bool,
    /// Nothing from this node reaches the other.
    pub(super) mute: [bool; 2],
    pub(super) mode: Mode,
    /// What a second authority shows, where there is one.
    pub(super) second: Option<RecordPair>,
    /// The first of them, which executes the updates, answers nobody.
    pub(super) first_silent: bool,
    /// `fence.stonith` is configured; when it ran, and the epoch that the record named then.
    pub(super) stonith: bool,
    pub(super) shot: Vec<(Instant, u64)>,
    /// Nodes that no DNS answer reaches.
    pub(super) deaf: [bool; 2],
    /// The VIP's witness answers this node.
    pub(super) gateway: [bool; 2],
    pub(super) lan_up: bool,
    /// Updates land, but their answers are lost.
    pub(super) lose_update_answers: bool,
    /// Updates are on their way for as long as this is set; `release` lets them land.
    pub(super) hold_updates: bool,
    pub(super) fence_postgres: FencePostgres,
    /// `replication.mode = "asynchronous"`.
    pub(super) asynchronous: bool,
    /// `replication.on_standby_loss = "block"`.
    pub(super) block: bool,
    /// So many effects and journal lines of node a until its daemon dies, or its machine.
    pub(super) fuse: Option<(u64, Act)>,
    pub(super) held: Vec<(RecordPair, RecordPair)>,
    pub(super) queue: BTreeMap<(Instant, u64), Delivery>,
    pub(super) order: u64,
    pub(super) ticket: u64,
    /// Who won which epoch.
    pub(super) owners: BTreeMap<u64, usize>,
    /// A broken law panics; else it is kept in `broken`.
    pub(super) strict: bool,
    pub(super) broken: Option<(&'static str, String)>,
    /// The marker as last read, beside its text.
    pub(super) read: Option<(String, Option<Marker>)>,
    /// Keeps nothing that only people read: a state of the model is small.
    pub(super) lean: bool,
    /// One line per transition, where somebody wants them.
    pub(super) log: Option<Vec<String>>,
    /// What a generic test of the procedures does to one of their steps.
    pub(super) meddler: Option<Box<super::procedures::Meddler>>,
}

impl World {
    pub(super) fn new() -> World {
        World::with(Mode::Update, 1)
    }

    pub(super) fn with(mode: Mode, servers: usize) -> World {
        let mut world = World::unstarted(mode, servers);
        world.begin();
        world
    }

    /// Before either daemon was started: for a world with timers or clocks of its own.
    pub(super) fn unstarted(mode: Mode, servers: usize) -> World {
        let start = Instant::from_nanos(1_000_000_000_000);
        let pg = |in_recovery| Pg {
            up: true,
            in_recovery,
            timeline: 1,
            lsn: 1000,
            list: String::new(),
            follows: in_recovery,
            hung: false,
            frozen: false,
            start: 1,
            data: vec![(0, 0)],
            refusal: false,
            told_ahead: 0,
            source: None,
        };
        let node = |in_recovery| Node {
            guard: None,
            clock: Clock { rate: 1000, zero: start, reads: start },
            boots: 0,
            life: 0,
            disk: Vec::new(),
            shadow: Durable::default(),
            journal_broken: false,
            frozen_until: Instant::ZERO,
            superseded: None,
            gate_until: Instant::ZERO,
            pg: pg(in_recovery),
            promotions: 0,
            vip_until: Instant::ZERO,
            off: false,
            fell: false,
            ends: BTreeMap::new(),
            asked: BTreeMap::new(),
            said: Vec::new(),
        };
        World {
            now: start,
            nodes: [node(false), node(true)],
            record: RecordPair::new(vec![address(0)], 5, Vec::new()),
            timing: Timing { lease: MS * 3000, max_drift: 0.01, margin: MS * 200 },
            poll: MS * 1000,
            look_every: MS * 250,
            client_every: MS * 200,
            dns_up: true,
            dns_cut: [false; 2],
            rng: None,
            acked: BTreeMap::new(),
            acks: 0,
            openings: 0,
            turns: 0,
            loss_accepted: false,
            check_acked: true,
            wire_up: true,
            streams_up: true,
            mute: [false; 2],
            mode,
            second: (servers > 1).then(|| RecordPair::new(vec![address(0)], 5, Vec::new())),
            first_silent: false,
            stonith: false,
            shot: Vec::new(),
            deaf: [false; 2],
            gateway: [true; 2],
            lan_up: true,
            lose_update_answers: false,
            hold_updates: false,
            fence_postgres: FencePostgres::Demote,
            asynchronous: false,
            block: false,
            fuse: None,
            held: Vec::new(),
            queue: BTreeMap::new(),
            order: 0,
            ticket: 100,
            owners: BTreeMap::new(),
            strict: true,
            broken: None,
            read: None,
            lean: false,
            log: None,
            meddler: None,
        }
    }

    /// Both daemons start.
    pub(super) fn begin(&mut self) {
        self.start(0);
        self.start(1);
        self.post(MS, Delivery::Look(0));
        self.post(MS * 2, Delivery::Look(1));
        self.post(MS * 50, Delivery::Client);
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
            voters: vec![name(0), name(1)],
            timing: self.timing,
            poll: self.poll,
            mode: self.mode,
            propagation: Duration::ZERO,
            servers: match (self.mode, &self.second) {
                (Mode::VipOnly, _) => Vec::new(),
                (_, None) => vec!["192.0.2.53:53".to_owned()],
                (_, Some(_)) => vec!["192.0.2.53:53".to_owned(), "192.0.2.54:53".to_owned()],
            },
            vips: if self.mode == Mode::VipOnly { vec![VIP.parse().expect("valid")] } else { Vec::new() },
            kernel_gate: false,
            stonith: self.stonith,
            units: false,
            synchronous: !self.asynchronous,
            block: self.block,
            standby_timeout: secs(3),
            hold_limit: Duration::from_secs(30),
            fence_postgres: self.fence_postgres,
            digest: "same".into(),
            start: self.nodes[node].life + 10_000 * node as u64,
            boot: format!("5f1c0000-0000-4000-8000-{:08}{node:04}", self.nodes[node].boots),
        }
    }

    /// The clocks of one node.
    pub(super) fn clocks(&self, node: usize) -> Now {
        let micros = i64::try_from(self.now.as_nanos() / 1000).expect("small") + 1_700_000_000_000_000;
        let wall = jiff::Timestamp::from_microsecond(micros).expect("valid");
        Now { boot: self.nodes[node].clock.read(self.now), wall }
    }

    pub(super) fn post(&mut self, after: Duration, delivery: Delivery) {
        self.order += 1;
        self.queue.insert((self.now + after, self.order), delivery);
    }

    pub(super) fn start(&mut self, node: usize) {
        self.nodes[node].life += 1;
        let mut effects = Vec::new();
        let durable = if self.lean { self.nodes[node].shadow.clone() } else { self.durable(node) };
        assert_eq!(durable, self.nodes[node].shadow, "replay equals live state");
        let guard = Guard::start(self.setup(node), durable, true, self.clocks(node), &mut effects);
        self.nodes[node].guard = Some(guard);
        self.effects(node, effects);
        self.note(|w| format!("{} starts: {}", name(node), w.state_of(node)));
    }

    /// Burns by one; at the end node a dies, in the middle of whatever it does.
    pub(super) fn burn(&mut self, node: usize) -> bool {
        if node != 0 {
            return false;
        }
        let Some((left, act)) = self.fuse.take() else { return false };
        if left > 0 {
            self.fuse = Some((left - 1, act));
            return false;
        }
        self.act(act);
        true
    }

    /// kill -9 of the daemon: its gate goes with its process.
    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].guard = None;
        self.nodes[node].gate_until = Instant::ZERO;
        self.nodes[node].asked.clear();
        self.nodes[node].frozen_until = Instant::ZERO;
    }

    pub(super) fn kill_all(&mut self, node: usize) {
        self.kill(node);
        self.nodes[node].pg.up = false;
        self.nodes[node].fell = true;
        self.nodes[node].vip_until = Instant::ZERO;
    }

    /// The machine fails; when it is there again its clock has begun anew.
    pub(super) fn crash(&mut self, node: usize) {
        self.kill_all(node);
        self.nodes[node].boots += 1;
        self.nodes[node].clock.zero = self.now;
        self.nodes[node].clock.reads = Instant::from_nanos(1_000_000_000);
    }

    /// The machine is up: the daemon runs; PostgreSQL only where the machine starts it, and `may-start-primary` would
    /// let it. What a daemon had stopped before it was killed stays stopped.
    pub(super) fn revive(&mut self, node: usize) {
        if self.nodes[node].off {
            return;
        }
        if self.nodes[node].guard.is_none() {
            self.start(node);
        }
        let marker = self.marker();
        let here = self.record.addresses == [address(node)];
        let n = &mut self.nodes[node];
        let confirmed = match self.mode {
            Mode::Update => marker.is_some_and(|m| m.active == name(node) && m.epoch == n.shadow.complete),
            Mode::Observe => here,
            Mode::VipOnly => true,
        };
        let may = n.pg.in_recovery || (n.shadow.is_holder() && n.shadow.fenced.is_none() && confirmed);
        if n.fell && !n.pg.up && may {
            n.pg.up = true;
            n.pg.start += 1;
        }
        n.fell &= !n.pg.up;
    }

    pub(super) fn act(&mut self, act: Act) {
        self.note(|_| format!("{act:?}"));
        match act {
            // Nobody talks to a stopped daemon; it hears when it goes on.
            Act::Order(node, _) if self.nodes[node].frozen_until > self.now => {
                let thaw = self.nodes[node].frozen_until.since(self.now);
                self.post(thaw, Delivery::Act(act));
            }
            Act::Order(node, command) => {
                self.command(node, command);
            }
            Act::Kill(node) => self.kill(node),
            Act::Crash(node) => self.crash(node),
            Act::StopPg(node) => (self.nodes[node].pg.up, self.nodes[node].fell) = (false, true),
            Act::StartPg(node) => {
                self.nodes[node].pg.up = true;
                self.nodes[node].pg.start += 1;
            }
            Act::Hang(node, on) => self.nodes[node].pg.hung = on,
            Act::Freeze(node, time) => self.nodes[node].frozen_until = self.now + time,
            Act::Cut(cut) => self.cut(cut, true),
            Act::Heal(cut) => self.cut(cut, false),
            Act::PowerOff(node) => {
                self.nodes[node].off = true;
                self.crash(node);
            }
            Act::PowerOn(node) => {
                self.nodes[node].off = false;
                self.revive(node);
            }
            Act::Edit(node) => self.record = RecordPair::new(vec![address(node)], 5, Vec::new()),
        }
    }

    pub(super) fn cut(&mut self, cut: Cut, on: bool) {
        match cut {
            Cut::Wire => self.wire_up = !on,
            Cut::WireFrom(node) => self.mute[node] = on,
            Cut::Witness(node) => self.dns_cut[node] = on,
            Cut::Deaf(node) => self.deaf[node] = on,
            Cut::Gateway(node) => self.gateway[node] = !on,
            Cut::Lan => self.lan_up = !on,
            Cut::Streams => self.streams_up = !on,
        }
    }

    /// Every fault ends.
    pub(super) fn heal(&mut self) {
        self.rng = None;
        (self.dns_up, self.dns_cut, self.deaf) = (true, [false; 2], [false; 2]);
        (self.wire_up, self.mute, self.lose_update_answers) = (true, [false; 2], false);
        (self.gateway, self.lan_up, self.streams_up) = ([true; 2], true, true);
        for node in 0..2 {
            self.nodes[node].pg.hung = false;
            self.nodes[node].pg.frozen = false;
            self.nodes[node].off = false;
            self.nodes[node].journal_broken = false;
            self.nodes[node].frozen_until = Instant::ZERO;
        }
        (0..2).for_each(|node| self.revive(node));
    }

    pub(super) fn snapshot(&self, node: usize) -> crate::engine::status::Snapshot {
        self.nodes[node].guard.as_ref().expect("running").snapshot(self.clocks(node))
    }

    pub(super) fn is_open(&self, node: usize) -> bool {
        self.nodes[node].gate_until > self.nodes[node].clock.read(self.now)
    }

    pub(super) fn somebody_is_open(&self) -> bool {
        self.is_open(0) || self.is_open(1)
    }

    pub(super) fn durable(&self, node: usize) -> Durable {
        Durable::replay(&self.nodes[node].disk)
    }

    pub(super) fn marker(&self) -> Option<Marker> {
        match (&self.read, self.record.marker.first()) {
            (Some((known, marker)), Some(text)) if known == text => marker.clone(),
            (_, text) => text.and_then(|text| text.parse().ok()),
        }
    }

    /// Reads the marker once per change: every law looks at it after every event.
    pub(super) fn read_marker(&mut self) {
        let text = self.record.marker.first();
        if self.read.as_ref().map(|(known, _)| known) != text {
            self.read = text.map(|text| (text.clone(), text.parse().ok()));
        }
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
        let clocks = self.clocks(node);
        let kind = self.log.is_some().then(|| kind_of(&event));
        let Some(guard) = &mut self.nodes[node].guard else { return };
        let mut effects = Vec::new();
        guard.handle(clocks, event, &mut effects);
        if self.lean {
            guard.events.clear();
        }
        assert_eq!(guard.durable, self.nodes[node].shadow, "replay equals live state");
        self.turns += 1;
        self.effects(node, effects);
        if let Some(kind) = kind {
            self.note(|w| format!("{} {kind}: {}", name(node), w.state_of(node)));
        }
        self.check();
    }

    /// A line of the log, where one is kept.
    pub(super) fn note(&mut self, text: impl FnOnce(&World) -> String) {
        if let Some(mut log) = self.log.take() {
            log.push(format!("{:?} {}", self.now, text(self)));
            self.log = Some(log);
        }
    }

    /// Role, gate and epochs of a node, in a few words.
    pub(super) fn state_of(&self, node: usize) -> String {
        let n = &self.nodes[node];
        let Some(guard) = &n.guard else { return "not running".into() };
        let d = &n.shadow;
        format!(
            "{} {} refused {} won {} complete {} fence {}{}",
            guard.role().as_str(),
            if self.is_open(node) { "open" } else { guard.gate.state.as_str() },
            d.refused.0,
            d.won.0,
            d.complete.0,
            d.fence.0,
            guard.procedure_brief().filter(|b| b.ended.is_none()).map_or(String::new(), |b| format!(" [{}]", b.step)),
        )
    }

    pub(super) fn release(&mut self) {
        self.hold_updates = false;
        for (prerequisite, next) in std::mem::take(&mut self.held) {
            self.deliver(Delivery::Landing { prerequisite, next });
        }
    }

    /// When the guard of this node wants its next turn, in true time.
    fn due(&self, node: usize) -> Option<Instant> {
        let n = &self.nodes[node];
        n.guard.as_ref().map(|g| n.clock.when(g.next_deadline()).max(n.frozen_until))
    }

    /// A node whose own deadline comes before anything that is on its way.
    fn deadline_first(&self) -> Option<(usize, Instant)> {
        let next = self.queue.keys().next().map(|(at, _)| *at).expect("looks go on for ever");
        (0..2).find_map(|node| self.due(node).filter(|due| *due <= next).map(|due| (node, due)))
    }

    /// What is delivered next, unless a deadline comes first.
    pub(super) fn head(&self) -> Option<&Delivery> {
        if self.deadline_first().is_some() { None } else { self.queue.values().next() }
    }

    pub(super) fn step(&mut self) {
        if let Some((node, due)) = self.deadline_first() {
            self.now = self.now.max(due);
            self.give(node, Event::DeadlinePassed);
        } else if let Some(((at, _), delivery)) = self.queue.pop_first() {
            self.now = self.now.max(at);
            self.deliver(delivery);
        }
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end && self.broken.is_none() {
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

/// The first words of an event, for the log.
fn kind_of(event: &Event) -> String {
    let text = match event {
        Event::WitnessAnswered { answer: Ok(_), .. } => "WitnessAnswered".to_owned(),
        Event::PeerAnswered { answer: Ok(answer), .. } => format!("PeerAnswered {answer:?}"),
        Event::PeerAsked { question, .. } => format!("PeerAsked {question:?}"),
        Event::PgObserved { .. } => "PgObserved".to_owned(),
        other => format!("{other:?}"),
    };
    text.chars().take(60).collect()
}
