//! The histories that the model disturbs, what it must have met on the way, and one state of it.

use super::world::{Act, Clock, Cut, MS, World, name, secs};
use crate::base::ids::Epoch;
use crate::base::time::{Duration, Instant};
use crate::engine::lease::Timing;
use crate::engine::setup::Mode;
use crate::engine::turn::Command;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Less than every limit; a daemon that systemd starts again.
pub(super) const SHORT: Duration = Duration::from_millis(900);
/// Just inside the limit of a question.
pub(super) const ALMOST: Duration = Duration::from_millis(1700);
/// Past the limit of a question, inside the lease.
pub(super) const LATE: Duration = Duration::from_millis(2500);
/// Past the lease on the slowest clock.
pub(super) const LEASE: Duration = Duration::from_millis(4600);
/// Past W on the slowest clock.
pub(super) const LONG: Duration = Duration::from_millis(6500);
/// Past everything that a person may have done meanwhile.
pub(super) const FAR: Duration = Duration::from_secs(28);
pub(super) const NEVER: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) world: World,
    /// Deviations that are left.
    pub(super) left: u8,
    pub(super) scenario: usize,
    /// What happened on the way: for `sometimes` only, so not part of the state.
    pub(super) past: u64,
    pub(super) openings: u64,
    pub(super) begin: Instant,
    pub(super) window: Instant,
    pub(super) end: Instant,
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.world, self.left, self.scenario).hash(state);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        let print = |state: &State| {
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        };
        print(self) == print(other)
    }
}

/// A history to disturb.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) mode: Mode,
    /// What happens in any case, counted from the start of the window.
    pub(super) script: Vec<(u64, Act)>,
    /// What a person may order at any moment, as a deviation.
    pub(super) orders: Vec<Act>,
    /// Deviations are spent in the window; after it the history runs on, undisturbed, for `tail`.
    pub(super) window: Duration,
    pub(super) tail: Duration,
    /// Begins before the pair is in sync for the first time.
    pub(super) early: bool,
}

pub(super) fn promote(node: usize) -> Act {
    Act::Order(node, Command::Promote { dry_run: false, yes: true, accept_data_loss: false, peer_is_off: None })
}

pub(super) fn accept(node: usize) -> Act {
    Act::Order(node, Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off: None })
}

pub(super) fn scenarios() -> Vec<Scenario> {
    let unfence = |node| Act::Order(node, Command::Unfence);
    let fence = |node| Act::Order(node, Command::Fence { reason: "model".into() });
    let switchover = |node| Act::Order(node, Command::Switchover { to: None, dry_run: false });
    let update = |name, script, orders, window| Scenario {
        name,
        mode: Mode::Update,
        script,
        orders,
        window: Duration::from_millis(window),
        tail: secs(9),
        early: false,
    };
    vec![
        // The active node dies, or only the wire does: it may serve on the witness's word until the record moves.
        update("failover", vec![(100, Act::Crash(0)), (300, promote(1))], vec![promote(1)], 9000),
        update("cut off", vec![(100, Act::Cut(Cut::Wire)), (300, promote(1))], vec![promote(0), unfence(0)], 9500),
        // The wire is back while the taker waits: it must not pledge to the node that it takes over from.
        update(
            "blip",
            vec![(100, Act::Cut(Cut::Wire)), (300, promote(1)), (2800, Act::Heal(Cut::Wire))],
            vec![promote(0)],
            9000,
        ),
        update("switchover", vec![(300, switchover(1))], vec![promote(0), unfence(0)], 3000),
        // Two people at once, on both nodes.
        update("both promote", vec![(100, fence(0)), (900, promote(1)), (903, promote(0))], vec![promote(1)], 8000),
        update("restart and both", vec![(100, Act::Kill(0)), (1000, promote(1)), (1900, promote(0))], vec![], 8000),
        // The taker may die after the consent, its update anywhere: the old node goes back by `unfence`, once its
        // PostgreSQL is there again as a standby of nobody.
        Scenario {
            tail: secs(34),
            ..update("unfence", vec![(300, promote(1)), (19_500, unfence(0))], vec![promote(1)], 3000)
        },
        // The standby drops and comes back: alone, and armed again.
        update(
            "alone and armed",
            vec![(200, Act::StopPg(1)), (4000, Act::StartPg(1)), (8000, Act::Crash(0)), (8200, promote(1))],
            vec![],
            9000,
        ),
        // It hangs, or only the PostgreSQLs are apart: the daemons go on talking. Alone is recorded at 4 to 5 s.
        update(
            "hung and armed",
            vec![(200, Act::Hang(1, true)), (6000, Act::Hang(1, false)), (9500, promote(1))],
            vec![],
            9000,
        ),
        update(
            "streams cut",
            vec![(200, Act::Cut(Cut::Streams)), (6500, promote(1)), (7000, Act::Heal(Cut::Streams))],
            vec![promote(1)],
            8500,
        ),
        Scenario {
            early: true,
            ..update("first arming", vec![(4500, Act::StopPg(1)), (7000, promote(1))], vec![], 9000)
        },
        // A person edits the record, and back, W apart.
        Scenario {
            mode: Mode::Observe,
            ..update(
                "observe",
                vec![(100, Act::Cut(Cut::Wire)), (200, accept(1)), (1000, Act::Edit(1)), (7500, Act::Edit(0))],
                vec![],
                11_000,
            )
        },
        Scenario {
            mode: Mode::Observe,
            ..update("observe switchover", vec![(200, promote(1)), (2500, Act::Edit(1))], vec![promote(0)], 6000)
        },
        // R3: no third voter. The peer is gone, ARP prolongs; a person switches a off, says so, and on again later.
        vip_only(
            "vip power",
            vec![
                (100, Act::Cut(Cut::Wire)),
                (8000, Act::PowerOff(0)),
                (14_500, off(1)),
                (19_000, Act::Heal(Cut::Wire)),
                (21_000, Act::PowerOn(0)),
            ],
            17_000,
        ),
        // P10: a's cable is pulled, so it lapses; a person takes it for off; then the cable is back, and only that.
        vip_only(
            "vip cable",
            vec![
                (100, Act::Cut(Cut::Wire)),
                (100, Act::Cut(Cut::Lan)),
                (101, Act::Cut(Cut::Gateway(0))),
                (9500, off(1)),
                (15_000, Act::Heal(Cut::Gateway(0))),
                (19_000, Act::Heal(Cut::Lan)),
            ],
            12_000,
        ),
        vip_only("vip switchover", vec![(300, promote(1))], 4000),
    ]
}

pub(super) fn vip_only(name: &'static str, script: Vec<(u64, Act)>, window: u64) -> Scenario {
    let window = Duration::from_millis(window);
    Scenario { name, mode: Mode::VipOnly, script, orders: vec![], window, tail: secs(14), early: false }
}

/// Promote, and the person's word that the other node is off.
pub(super) fn off(node: usize) -> Act {
    let peer_is_off = Some(name(1 - node));
    Act::Order(node, Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off })
}

pub(super) type Met = (&'static str, fn(&State) -> bool);

/// Things the model must have met, or it proved nothing.
pub(super) const MET: [Met; 16] = [
    ("a failover completes", |s| {
        let w = &s.world;
        w.is_open(1) && w.nodes[1].shadow.complete >= Epoch(2) && w.nodes[0].guard.is_none()
    }),
    ("a switchover completes by consent", |s| s.world.is_open(1) && s.world.nodes[0].shadow.consented),
    ("a lapse reopens", |s| {
        s.world.is_open(0) && s.openings < s.world.openings && s.world.nodes[0].shadow.won <= Epoch(1)
    }),
    ("a consent is given and its taker dies", |s| {
        s.world.nodes[0].shadow.consented && s.world.nodes[1].guard.is_none()
    }),
    ("a consent is given in vain and unfence takes the epoch", |s| {
        s.past & CONSENTED != 0 && s.world.is_open(0) && s.world.nodes[0].shadow.complete >= Epoch(2)
    }),
    ("an update is lost and settled", |s| s.past & UPDATE_LOST != 0 && s.world.is_open(1)),
    ("a late update finds the record changed", |s| s.past & UPDATE_LATE != 0 && s.world.somebody_is_open()),
    ("alone and armed again", |s| {
        s.past & ALONE != 0 && s.world.marker().is_some_and(|m| m.sync.is_some()) && s.world.is_open(0)
    }),
    ("commits go on without a standby that was lost", |s| {
        let (w, n) = (&s.world, &s.world.nodes[0]);
        w.is_open(0) && n.pg.list.is_empty() && n.guard.as_ref().is_some_and(|g| g.counters.standby_losses > 0)
    }),
    ("two promotes run at once", |s| s.past & RACE != 0 && s.world.somebody_is_open()),
    ("a frozen node's lease has not run out", |s| {
        (0..2).any(|n| s.world.is_open(n) && s.world.nodes[n].frozen_until > s.world.now)
    }),
    ("a fence is latched", |s| s.world.nodes[0].shadow.fenced.is_some() && !s.world.nodes[0].shadow.consented),
    ("an edit lapses and its taker opens", |s| s.world.mode == Mode::Observe && s.world.is_open(1)),
    ("ARP alone prolongs a lease", |s| {
        let w = &s.world;
        w.mode == Mode::VipOnly && w.is_open(0) && !w.wire_up && s.openings == w.openings && w.now >= s.begin + LONG
    }),
    ("VIP only: a lapsed node that still runs is replaced", |s| {
        let w = &s.world;
        w.mode == Mode::VipOnly && w.is_open(1) && w.nodes[0].guard.is_some() && !w.nodes[0].shadow.consented
    }),
    ("VIP only: a node that a person switched off is replaced", |s| {
        s.world.mode == Mode::VipOnly && s.world.is_open(1) && s.world.nodes[0].off
    }),
];

pub(super) const CONSENTED: u64 = 1;
pub(super) const UPDATE_LOST: u64 = 2;
pub(super) const UPDATE_LATE: u64 = 4;
pub(super) const ALONE: u64 = 8;
pub(super) const RACE: u64 = 16;

/// The pair at work, with the timers and clocks of the model.
pub(super) fn at_work(scenario: &Scenario, rates: [u64; 2]) -> World {
    let mut world = World::unstarted(scenario.mode, 1);
    world.timing = Timing { lease: secs(4), max_drift: 0.1, margin: MS * 200 };
    (world.poll, world.look_every, world.client_every) = (secs(2), secs(1), MS * 500);
    for (node, rate) in rates.into_iter().enumerate() {
        world.nodes[node].clock = Clock { rate, zero: world.now, reads: world.now };
    }
    world.begin();
    if scenario.mode != Mode::Update {
        world.run_for(secs(6));
        world.promote(0, false);
    }
    if scenario.early {
        world.run_until(secs(30), "open", |w| w.is_open(0));
    } else {
        world.run_until(secs(60), "in sync", |w| w.snapshot(0).replication.in_sync);
        // Past a poll of both, so that the window begins in the same phase whatever the rates are.
        world.run_for(secs(3));
    }
    world.lean = true;
    world.strict = false;
    for node in &mut world.nodes {
        node.disk.clear();
        node.said.clear();
        node.ends.clear();
        if let Some(guard) = &mut node.guard {
            guard.events.clear();
        }
    }
    world
}
