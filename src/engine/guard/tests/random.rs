//! Seeded random schedules over long histories: kills, reboots with a clock that begins anew, freezes, partitions one
//! way and both, dead or slow DNS, updates that land late or twice, messages lost and copied, full disks, PostgreSQL
//! tasks that fail or take long, edits, power switches and commands at any moment; each node's clock runs at a rate
//! of its own within `max_drift`. The laws and the client's accounting judge after every event; at the end, healed, a
//! promote must bring the service back and the pair in sync, after every 120 s of faults.
//!
//! A failure names its seed and prints one line per transition; the same seed plays the same history.
//! `PORTCULLIS_SEED=n` (one, every event), `PORTCULLIS_SEEDS=n` (how many), `PORTCULLIS_SIM_SECONDS=n` (how long each).

use super::laws::SERVES_AGAIN;
use super::world::{Act, Clock, Cut, MS, Rng, World, address, name, secs};
use crate::base::time::{Duration, Instant};
use crate::engine::setup::Mode;
use crate::engine::turn::Command;
use crate::wire::dns::RecordPair;

/// Schedules per run and their length; a failure of any names its seed.
const SEEDS: u64 = 240;
const LENGTH: u64 = 120;
/// How long faults come before everything is healed once.
const ROUND: u64 = 120;

struct Schedule {
    world: World,
    rng: Rng,
    /// Losses of the standby alone come beside the other acts, so that the seeds of before play what they played.
    standby: Rng,
    edited: Option<RecordPair>,
    edited_at: Instant,
}

impl Schedule {
    fn new(seed: u64, log: bool) -> Schedule {
        let mut rng = Rng(seed);
        let mode = match seed % 10 {
            0..=6 => Mode::Update,
            7 | 8 => Mode::Observe,
            _ => Mode::VipOnly,
        };
        let mut world = World::unstarted(mode, 1);
        world.log = log.then(Vec::new);
        for node in &mut world.nodes {
            node.clock = Clock { rate: 990 + rng.below(21), zero: world.now, reads: world.now };
        }
        world.begin();
        if mode != Mode::Update {
            world.run_for(secs(5));
            world.promote(0, false);
        }
        world.run_until(secs(40), "in sync", |w| w.snapshot(0).replication.in_sync);
        world.rng = Some(Rng(seed.wrapping_mul(7919)));
        Schedule { world, rng, standby: Rng(seed.wrapping_mul(104_729)), edited: None, edited_at: Instant::ZERO }
    }

    fn act(&mut self) {
        let node = usize::try_from(self.rng.below(2)).expect("small");
        let act = self.rng.below(38);
        let running = self.world.nodes[node].guard.is_some();
        self.world.note(|_| format!("act {act} on {}", name(node)));
        let world = &mut self.world;
        match act {
            0 if running => world.kill(node),
            1 | 2 if running => world.crash(node),
            3 => world.act(Act::StopPg(node)),
            4..=8 => self.switch_on(node),
            9 => world.cut(Cut::Wire, true),
            10 => world.cut(Cut::WireFrom(node), true),
            11..=13 => (world.wire_up, world.mute) = (true, [false; 2]),
            14 => world.dns_up = false,
            15 => world.cut(Cut::Witness(node), true),
            16 => world.cut(Cut::Deaf(node), true),
            17..=19 => (world.dns_up, world.dns_cut, world.deaf) = (true, [false; 2], [false; 2]),
            20 if running => {
                let time = self.rng.ms(8000);
                world.act(Act::Freeze(node, time));
            }
            21 => world.lose_update_answers = !world.lose_update_answers,
            22 => world.nodes[node].journal_broken = true,
            23 | 24 => (0..2).for_each(|n| world.nodes[n].journal_broken = false),
            25 => self.edit(node),
            26 => self.put_right(),
            // What is on its way stays on its way, and lands much later, in the order in which it was sent.
            27 if !world.hold_updates => world.hold_updates = true,
            27 | 28 => world.release(),
            29 if world.mode == Mode::VipOnly => world.cut(Cut::Gateway(node), true),
            30 if world.mode == Mode::VipOnly => world.cut(Cut::Lan, true),
            29 | 30 => (world.gateway, world.lan_up) = ([true; 2], true),
            31 if running && world.mode == Mode::VipOnly => world.act(Act::PowerOff(node)),
            _ if running && world.nodes[node].frozen_until <= world.now => self.order(node, act),
            _ => {}
        }
    }

    /// The machine starts, or a person switches it on: not while somebody relies on his word that it is off.
    fn switch_on(&mut self, node: usize) {
        let promoting = self.world.nodes[1 - node].guard.as_ref().is_some_and(|guard| guard.takeover.is_some());
        if !self.world.nodes[node].off {
            self.world.revive(node);
        } else if !promoting {
            self.world.act(Act::PowerOn(node));
        }
    }

    fn order(&mut self, node: usize, act: u64) {
        let other = &self.world.nodes[1 - node];
        let peer_is_off = other.off.then(|| name(1 - node));
        // Without a marker nothing but a person's word moves the service from a dead node.
        let accept_data_loss = self.world.mode != Mode::Update && self.rng.one_in(2);
        let command = match act {
            31..=34 => Command::Promote { dry_run: false, yes: true, accept_data_loss, peer_is_off },
            35 => Command::Rejoin { node: name(node), dry_run: false },
            36 if self.rng.one_in(2) => Command::Unfence,
            36 => Command::Switchover { to: None, dry_run: false },
            _ if self.rng.one_in(3) => Command::Fence { reason: "random".into() },
            _ => Command::Promote { dry_run: true, yes: true, accept_data_loss: false, peer_is_off: None },
        };
        if let Command::Promote { dry_run: false, accept_data_loss: true, .. } = &command {
            self.world.loss_accepted = true;
        }
        self.world.act(Act::Order(node, command));
    }

    /// A person edits the record: in observe mode it is then left standing for W at least, as promote asks.
    fn edit(&mut self, node: usize) {
        if self.world.mode == Mode::Observe {
            if self.world.now.since(self.edited_at) >= MS * 3400 {
                self.edited_at = self.world.now;
                self.world.act(Act::Edit(node));
            }
            return;
        }
        if self.edited.is_some() || self.world.record.marker.is_empty() {
            return;
        }
        self.edited = Some(self.world.record.clone());
        self.world.record = match self.rng.below(3) {
            0 => RecordPair::default(),
            1 => RecordPair::new(vec![address(node)], 5, Vec::new()),
            _ => RecordPair::written(&[address(node)], 5, &self.world.record.marker[0].clone()),
        };
    }

    /// The address record is made to agree with the marker, or the whole record is put back as it was.
    fn put_right(&mut self) {
        let Some(before) = self.edited.take() else { return };
        self.world.record = match self.world.marker() {
            Some(m) => {
                let owner = usize::from(m.active == name(1));
                RecordPair::written(&[address(owner)], 5, &self.world.record.marker[0].clone())
            }
            None => before,
        };
    }

    fn heal(&mut self) {
        self.world.note(|_| "heal".into());
        self.world.release();
        self.put_right();
        self.world.heal();
        if self.world.mode == Mode::Observe {
            // Whoever began a promote finishes it: it waits for his edit, without a limit.
            self.world.run_for(secs(15));
            for node in 0..2 {
                if self.world.nodes[node].guard.as_ref().is_some_and(|guard| guard.takeover.is_some()) {
                    self.world.act(Act::Edit(node));
                    self.world.run_for(secs(20));
                }
            }
        }
        self.world.run_for(secs(75));
    }

    /// Somebody serves: by itself, or after one promote on either node.
    fn somebody_serves(&mut self) {
        for accept in [false, true] {
            for node in [0, 1] {
                if self.world.somebody_is_open() {
                    return;
                }
                self.world.note(|_| format!("final promote on {} accept {accept}", name(node)));
                self.world.loss_accepted |= accept;
                let ticket = self.world.promote(node, accept);
                if self.world.mode == Mode::Observe {
                    self.world.run_for(secs(3));
                    self.world.act(Act::Edit(node));
                }
                self.world.end_of(node, ticket);
                self.world.run_for(secs(5));
            }
        }
        if !self.world.somebody_is_open() {
            self.world.broke(SERVES_AGAIN, "healed, and nobody serves".into());
        }
    }

    fn synchronous_again(&mut self) {
        let active = usize::from(self.world.is_open(1));
        for _ in 0..3 {
            if self.world.snapshot(active).replication.in_sync {
                return;
            }
            let ticket = self.world.command(active, Command::Rejoin { node: name(1 - active), dry_run: false });
            self.world.end_of(active, ticket);
            self.world.run_for(secs(20));
        }
        if !self.world.snapshot(active).replication.in_sync {
            self.world.broke(SERVES_AGAIN, "healed and rejoined, but not in sync".into());
        }
    }

    /// Rounds of faults, each followed by a calm: a pair that nobody ever repairs would soon only be shut.
    fn run(&mut self, length: Duration) {
        let end = self.world.now + length;
        while self.world.now < end {
            let round = (self.world.now + secs(ROUND)).min(end);
            self.faults(round);
            let rng = self.world.rng.clone();
            self.heal();
            self.somebody_serves();
            self.synchronous_again();
            self.world.rng = rng;
            if std::mem::take(&mut self.world.loss_accepted) {
                // What a person gave up is gone; from here on everything counts again.
                let active = usize::from(self.world.is_open(1));
                self.world.acked = self.world.nodes[active].pg.data.iter().copied().collect();
            }
        }
    }

    fn faults(&mut self, end: Instant) {
        while self.world.now < end {
            let pause = match self.rng.below(4) {
                0 => self.rng.ms(60),
                1 => self.rng.ms(600),
                _ => self.rng.ms(6000),
            };
            self.world.run_for(pause);
            self.act();
            self.lose_the_standby();
        }
    }

    /// A standby hangs or goes on; the PostgreSQLs lose each other or find each other again.
    fn lose_the_standby(&mut self) {
        let node = usize::try_from(self.standby.below(2)).expect("small");
        match self.standby.below(16) {
            0 => self.world.act(Act::Hang(node, true)),
            1 => self.world.act(Act::Cut(Cut::Streams)),
            2 | 3 => (0..2).for_each(|node| self.world.act(Act::Hang(node, false))),
            4 | 5 => self.world.act(Act::Heal(Cut::Streams)),
            _ => {}
        }
    }
}

/// What one seed came to; `Err` with the log when a law was broken.
fn play(seed: u64, length: Duration, log: bool) -> (Schedule, bool) {
    let mut schedule = Schedule::new(seed, log);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| schedule.run(length)));
    (schedule, outcome.is_ok())
}

/// One line per transition; of events that changed nothing none, unless all are wanted.
fn tell(schedule: &Schedule, all: bool) {
    let mut before = ["", ""];
    for line in schedule.world.log.iter().flatten() {
        let mut words = line.splitn(3, ' ').skip(1);
        let node = match words.next() {
            Some("a") => 0,
            Some("b") => 1,
            _ => 2,
        };
        let state = line.rsplit_once(": ").map_or("", |(_, state)| state);
        if !all && node < 2 && before[node] == state {
            continue;
        }
        if node < 2 {
            before[node] = state;
        }
        eprintln!("{line}");
    }
    for (n, node) in schedule.world.nodes.iter().enumerate() {
        eprintln!("{}: pg {:?}\n  {:?}\n  ends {:?}", name(n), node.pg, node.shadow, node.ends);
    }
    eprintln!("record {:?} edited {:?}", schedule.world.record, schedule.edited);
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// Seeds that found something once, each with the length of its history.
const REMEMBERED: [(u64, u64); 4] = [
    // A deadline that had passed and waited for another job spun the turn for ever (with an older schedule).
    (387, 120),
    // Observe mode: a taker that waited for an edit kept a consent whose giver had taken the same epoch meanwhile.
    (1688, 120),
    // An update landed after its taker had died: nothing may start the one whole PostgreSQL, nothing else is
    // promotable.
    (403, 2400),
    (423, 2400),
];

#[derive(Default)]
struct Sums {
    acks: u64,
    openings: u64,
    epochs: u64,
    turns: u64,
    bad: Vec<(u64, u64)>,
}

#[test]
fn random_schedules_break_no_rule() {
    let only = number("PORTCULLIS_SEED");
    let count = number("PORTCULLIS_SEEDS").unwrap_or(SEEDS);
    let length = number("PORTCULLIS_SIM_SECONDS").unwrap_or(LENGTH);
    let all = || (1..=count).map(|seed| (seed, length)).chain(REMEMBERED).collect();
    let seeds: Vec<(u64, u64)> = only.map_or_else(all, |seed| vec![(seed, length)]);
    let mut sums = Sums::default();
    for (seed, length) in &seeds {
        let (schedule, ok) = play(*seed, secs(*length), false);
        sums.acks += schedule.world.acks;
        sums.openings += schedule.world.openings;
        sums.epochs += schedule.world.nodes[0].shadow.seen.0;
        sums.turns += schedule.world.turns;
        sums.bad.extend((!ok).then_some((*seed, *length)));
    }
    let Sums { acks, openings, epochs, turns, mut bad } = sums;
    eprintln!(
        "figure: simulation: {} schedules of {} s: {turns} turns, {acks} acknowledged writes, {openings} openings, \
         {epochs} epochs, {} bad",
        seeds.len(),
        length,
        bad.len()
    );
    bad.sort_unstable();
    if let Some((seed, length)) = bad.first() {
        // Once more, exactly as before, and telling.
        let (schedule, _) = play(*seed, secs(*length), true);
        tell(&schedule, only.is_some());
    }
    assert!(bad.is_empty(), "seeds and seconds {bad:?}: run one with PORTCULLIS_SEED=n PORTCULLIS_SIM_SECONDS=n");
}
