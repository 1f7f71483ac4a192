//! What was seen, and what must not follow from it. Pure: lists in, violations out.
//!
//! The token that orders two answers is the timeline of the PostgreSQL that gave them: each takeover promotes, each
//! promotion makes a timeline, and the answer itself carries it, so nothing of the daemons' own words is believed.
//!
//! **Invariant:** answers are in the order in which one thread read them, so two nodes compare without a margin.

use crate::harness::sys::ms;
use portcullis::base::time::Instant;
use std::collections::BTreeMap;

/// One answered statement.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    pub client: u32,
    /// Index of the node whose PostgreSQL answered.
    pub node: usize,
    pub n: u64,
    pub asked: Instant,
    pub at: Instant,
    /// Of the PostgreSQL that answered; 0 where the client did not ask for it.
    pub timeline: u32,
}

/// One look at a node's status page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub node: usize,
    pub asked: Instant,
    pub answered: Instant,
    /// Said `active`, or that its gate is open.
    pub active: bool,
    pub open: bool,
    /// The epoch it may open, and the last one it won.
    pub complete: u64,
    pub won: u64,
    pub lease_ms: u64,
    pub cuts: u64,
}

/// Answers of one node on one timeline, first to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    pub node: usize,
    pub timeline: u32,
    pub first: Instant,
    pub last: Instant,
    pub answers: usize,
}

/// The answers merged to intervals of service, in the order in which they began.
pub fn services(acks: &[Ack]) -> Vec<Service> {
    let mut merged: BTreeMap<(usize, u32), Service> = BTreeMap::new();
    for ack in acks {
        let new = Service { node: ack.node, timeline: ack.timeline, first: ack.at, last: ack.at, answers: 0 };
        let service = merged.entry((ack.node, ack.timeline)).or_insert(new);
        service.first = service.first.min(ack.at);
        service.last = service.last.max(ack.at);
        service.answers += 1;
    }
    let mut all: Vec<Service> = merged.into_values().collect();
    all.sort_by_key(|service| service.first);
    all
}

/// Two nodes' intervals of service that overlap: a later answer of one within or after the other's newer service.
pub fn overlaps(acks: &[Ack]) -> Vec<String> {
    let all = services(acks);
    let mut found = Vec::new();
    for (index, one) in all.iter().enumerate() {
        for other in all.iter().skip(index + 1).filter(|other| other.node != one.node && other.first <= one.last) {
            let late = |ack: &&Ack| ack.node == one.node && ack.timeline == one.timeline && ack.at >= other.first;
            let asked_after = acks.iter().filter(late).filter(|ack| ack.asked >= other.first).count();
            found.push(format!(
                "two nodes answered: node {} (timeline {}) {} times until {} ms after the first answer of node {} \
                 (timeline {}); {asked_after} of these were asked after it",
                one.node,
                one.timeline,
                acks.iter().filter(late).count(),
                ms(other.first, one.last),
                other.node,
                other.timeline
            ));
        }
    }
    found
}

/// Looks that prove two nodes active at once, or an older epoch active after a newer one, or one epoch won by both.
pub fn two_active(looks: &[Look]) -> Vec<String> {
    let mut found = Vec::new();
    // Of each node and epoch, the first moment at which it surely was active, and the last look that found it so.
    let mut spans: BTreeMap<(u64, usize), (Instant, Instant)> = BTreeMap::new();
    let mut winners: BTreeMap<u64, usize> = BTreeMap::new();
    for look in looks {
        if look.active {
            let span = spans.entry((look.complete, look.node)).or_insert((look.answered, look.asked));
            *span = (span.0.min(look.answered), span.1.max(look.asked));
        }
        if look.won > 0 && *winners.entry(look.won).or_insert(look.node) != look.node {
            winners.insert(look.won, usize::MAX);
        }
    }
    found.extend(winners.iter().filter(|(_, node)| **node == usize::MAX).map(|(e, _)| format!("both won epoch {e}")));
    for ((epoch, node), (_, last)) in &spans {
        for ((newer, other), (first, _)) in &spans {
            if node != other && epoch == newer && node < other {
                found.push(format!("both nodes were active at epoch {epoch}"));
            }
            if node != other && epoch < newer && last > first {
                found.push(format!(
                    "node {node} was active at epoch {epoch} {} ms after node {other} was at epoch {newer}",
                    ms(*first, *last)
                ));
            }
        }
    }
    found
}
