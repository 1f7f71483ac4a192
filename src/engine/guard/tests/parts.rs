//! What the simulated world is made of: its deliveries, its acts, what can be cut, a PostgreSQL, a clock, a seeded
//! random number.
//!
//! What it is NOT: the world itself (`world`).

use crate::base::ids::{Lsn, NodeName, OpId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::turn::{Command, Event, PgTask};
use crate::wire::dns::RecordPair;
use std::net::IpAddr;

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) const VIP: &str = "192.0.2.100/24";

pub(super) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(super) fn name(node: usize) -> NodeName {
    ["a", "b"][node].parse().expect("valid")
}

pub(super) fn address(node: usize) -> IpAddr {
    [[192, 0, 2, 11], [192, 0, 2, 12]][node].into()
}

#[derive(Debug, Clone, Hash)]
pub(super) struct Pg {
    pub(super) up: bool,
    pub(super) in_recovery: bool,
    pub(super) timeline: u32,
    pub(super) lsn: u64,
    pub(super) list: String,
    pub(super) follows: bool,
    /// Of a standby: its walreceiver is frozen; the session stands, and nothing is flushed any more.
    pub(super) hung: bool,
    /// All of its processes are stopped: no look, session or commit is answered, until it is stopped the hard way.
    pub(super) frozen: bool,
    pub(super) start: u64,
    /// The writes this cluster holds: how many of each branch; every promotion begins a branch.
    pub(super) data: Data,
    /// A plan to rejoin says no.
    pub(super) refusal: bool,
    /// What it tells a rejoin that looks is so far beyond what a standby can have yet.
    pub(super) told_ahead: u64,
    /// What the last rejoin was told of the active node's WAL.
    pub(super) source: Option<Lsn>,
}

pub(super) type Data = Vec<(u64, u64)>;

pub(super) fn holds(data: &Data, branch: u64, count: u64) -> bool {
    data.iter().any(|(b, c)| *b == branch && *c >= count)
}

/// What is on its way.
#[derive(Debug, Clone, Hash)]
pub(super) enum Delivery {
    To(usize, u64, Event),
    Update {
        node: usize,
        life: u64,
        op: OpId,
        prerequisite: RecordPair,
        next: RecordPair,
        limit: Duration,
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
        /// The same question once more: a network may do that.
        copy: bool,
    },
    Pg {
        node: usize,
        life: u64,
        op: OpId,
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
    /// The machine or the daemon is there again.
    Revive(usize),
    /// Somebody or something acts at a set time.
    Act(Act),
    /// A cut ends.
    Heal(Cut),
}

/// What can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cut {
    Wire,
    /// Nothing from this node reaches the other; the other way works.
    WireFrom(usize),
    /// Nothing from this node reaches the witness.
    Witness(usize),
    /// The witness hears this node and is not heard: its updates land unanswered.
    Deaf(usize),
    /// The VIP's witness does not answer this node (its cable, or the switch before it).
    Gateway(usize),
    /// The nodes do not hear each other's ARP.
    Lan,
    /// The two PostgreSQLs do not reach each other; everything else does.
    Streams,
}

/// What somebody or something does to the world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Act {
    Order(usize, Command),
    Kill(usize),
    Crash(usize),
    StopPg(usize),
    StartPg(usize),
    /// Its standby hangs, or goes on.
    Hang(usize, bool),
    Freeze(usize, Duration),
    Cut(Cut),
    Heal(Cut),
    /// A person switches the machine off; nothing starts it but a person.
    PowerOff(usize),
    PowerOn(usize),
    /// A person makes the address record name this node.
    Edit(usize),
}

/// splitmix64: small, seeded, enough.
#[derive(Debug, Clone, Hash)]
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

    /// Up to `bound` milliseconds.
    pub(super) fn ms(&mut self, bound: u64) -> Duration {
        Duration::from_millis(self.below(bound))
    }
}

/// CLOCK_BOOTTIME of one machine: its own rate, and 0 at its own boot.
#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Clock {
    /// Of its seconds, how many pass in a thousand true ones.
    pub(super) rate: u64,
    /// True time at which it read `reads`.
    pub(super) zero: Instant,
    pub(super) reads: Instant,
}

impl Clock {
    /// What it reads at this true time.
    pub(super) fn read(&self, at: Instant) -> Instant {
        let ran = u128::from(at.as_nanos().saturating_sub(self.zero.as_nanos())) * u128::from(self.rate) / 1000;
        self.reads + Duration::from_nanos(u64::try_from(ran).unwrap_or(u64::MAX))
    }

    /// The first true time at which it reads at least this.
    pub(super) fn when(&self, reads: Instant) -> Instant {
        self.zero + self.span(reads.since(self.reads))
    }

    /// How long this much of its time takes.
    pub(super) fn span(&self, time: Duration) -> Duration {
        let nanos = (time.as_nanos() * 1000).div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}
