//! The machine of this node: the guard of a voter, or the follower that a node without a vote is.
//!
//! **Invariant:** which of the two it is, the configuration says once, at the start.

use crate::base::ids::Epoch;
use crate::base::time::Instant;
use crate::engine::durable::Durable;
use crate::engine::follower::Follower;
use crate::engine::guard::Guard;
use crate::engine::setup::Setup;
use crate::engine::status::{EventRow, Snapshot};
use crate::engine::turn::{Effect, Event, Now};

/// One of the two, turned by the same crank.
#[derive(Debug, Clone)]
pub enum Machine {
    Voter(Box<Guard>),
    Follower(Box<Follower>),
}

impl Machine {
    /// As [`Guard::start`] or [`Follower::start`].
    pub fn start(setup: Setup, durable: Durable, pg_present: bool, now: Now, fx: &mut Vec<Effect>) -> Machine {
        if setup.is_voter(&setup.me) {
            Machine::Voter(Box::new(Guard::start(setup, durable, pg_present, now, fx)))
        } else {
            Machine::Follower(Box::new(Follower::start(setup, durable, pg_present, now, fx)))
        }
    }

    /// What the event log on disk says of former lives, oldest first; only shown.
    pub fn remember(&mut self, past: Vec<EventRow>) {
        match self {
            Machine::Voter(guard) => guard.remember(past),
            Machine::Follower(follower) => follower.remember(past),
        }
    }

    /// One turn: one event, one reading of the clocks.
    pub fn handle(&mut self, now: Now, event: Event, fx: &mut Vec<Effect>) {
        match self {
            Machine::Voter(guard) => guard.handle(now, event, fx),
            Machine::Follower(follower) => follower.handle(now, event, fx),
        }
    }

    /// When [`Event::DeadlinePassed`] is wanted at the latest.
    pub fn next_deadline(&self) -> Instant {
        match self {
            Machine::Voter(guard) => guard.next_deadline(),
            Machine::Follower(follower) => follower.next_deadline(),
        }
    }

    /// The epoch that this node's gate is open for, or would be; a follower has none.
    pub fn complete(&self) -> Epoch {
        match self {
            Machine::Voter(guard) => guard.complete(),
            Machine::Follower(_) => Epoch::NONE,
        }
    }

    /// The whole node for people, as of `now`.
    pub fn snapshot(&self, now: Now) -> Snapshot {
        match self {
            Machine::Voter(guard) => guard.snapshot(now),
            Machine::Follower(follower) => follower.snapshot(now),
        }
    }
}
