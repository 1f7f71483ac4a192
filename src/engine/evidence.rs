//! Folds one authority's answer into what it says about this node: a [`Seen`] without age, then a [`Verdict`] against
//! what is recorded here. No decisions; the guard decides.
//!
//! **Invariant:** only [`Verdict::Here`] ever prolongs a lease, and only from the server that executes the updates.

use crate::base::ids::{Epoch, NodeName};
use crate::engine::setup::Mode;
use crate::engine::setup::Setup;
use crate::wire::dns::{Reading, RecordPair};
use crate::wire::marker::Marker;
use std::net::IpAddr;

/// What the records say, before asking whether that is good or bad for us.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Seen {
    /// Marker and address agree.
    Agreed { marker: Marker },
    /// The marker names one node, the address another (a person edited the record).
    Edited { marker: Marker, address_of: NodeName },
    /// No marker, and the address of exactly one node (observe mode, or before the first marker).
    Unmarked { address_of: Option<NodeName> },
    /// Anything else: NXDOMAIN, two addresses, an address of no node, an unreadable marker...
    Nothing { why: String },
}

/// What that means for this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Our epoch (update mode) or our address alone (observe mode).
    Here,
    /// A marker of a higher epoch: fenced.
    Higher { epoch: Epoch, active: NodeName },
    /// The other node's address under our own epoch, or (not holding) simply elsewhere.
    Elsewhere { node: NodeName },
    /// Cut at once, but only lapsed.
    Nothing { why: String },
    /// An old answer of a server that lags: counts for nothing.
    Lagging,
}

/// Whose address a record set is: `Ok(None)` means a VIP, which every node shares.
fn owner(setup: &Setup, addresses: &[IpAddr]) -> Result<Option<NodeName>, String> {
    let vips = setup.vip_addresses();
    let per_family = |v4: bool| addresses.iter().filter(|a| a.is_ipv4() == v4).count();
    if addresses.is_empty() {
        return Err("the record has no address".to_owned());
    }
    if per_family(true) > 1 || per_family(false) > 1 {
        return Err(format!("the record has {} addresses", addresses.len()));
    }
    if addresses.iter().all(|a| vips.contains(a)) {
        return Ok(None);
    }
    let mut owners = addresses.iter().map(|a| setup.node_of(*a));
    let first = owners.next().flatten();
    match first {
        Some(name) if owners.all(|o| o == Some(name)) => Ok(Some(name.clone())),
        _ => Err(format!("the record shows {}, which is no node's address", list(addresses))),
    }
}

fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Reads one answer.
pub fn see(setup: &Setup, reading: &Reading) -> Seen {
    if let Some(strange) = &reading.strange {
        return Seen::Nothing { why: strange.clone() };
    }
    let marker = match reading.pair.marker.as_slice() {
        // Nobody keeps it up to date there: one left over from update mode proves nothing.
        _ if setup.mode == Mode::Observe => None,
        [] => None,
        [text] => match text.parse::<Marker>() {
            Ok(marker) => Some(marker),
            Err(why) => return Seen::Nothing { why: format!("the marker is unreadable: {why}") },
        },
        more => return Seen::Nothing { why: format!("there are {} markers", more.len()) },
    };
    match (marker, owner(setup, &reading.pair.addresses)) {
        (_, Err(why)) => Seen::Nothing { why },
        (None, Ok(address_of)) => Seen::Unmarked { address_of },
        (Some(marker), Ok(None)) => Seen::Agreed { marker },
        (Some(marker), Ok(Some(name))) if name == marker.active => Seen::Agreed { marker },
        (Some(marker), Ok(Some(name))) => Seen::Edited { marker, address_of: name },
    }
}

/// What this node remembers when it judges.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// The epoch this node holds (complete), or zero.
    pub epoch: Epoch,
    /// The highest seq this node wrote in that epoch.
    pub seq: u64,
    /// The highest epoch known from anywhere.
    pub seen: Epoch,
}

/// Judges in update mode, for a node that holds `memory.epoch`. `first` says that the answer came from the server
/// that executes the updates.
pub fn judge(setup: &Setup, memory: Memory, first: bool, seen: &Seen) -> Verdict {
    let marker = match seen {
        Seen::Nothing { why } => return Verdict::Nothing { why: why.clone() },
        Seen::Unmarked { .. } if !first => return Verdict::Lagging,
        Seen::Unmarked { .. } => return Verdict::Nothing { why: "the marker is missing".to_owned() },
        Seen::Agreed { marker } | Seen::Edited { marker, .. } => marker,
    };
    if marker.epoch > memory.epoch && marker.active != setup.me {
        return Verdict::Higher { epoch: marker.epoch, active: marker.active.clone() };
    }
    let old = marker.epoch < memory.epoch || (marker.epoch == memory.epoch && marker.seq < memory.seq);
    if old && !first {
        return Verdict::Lagging;
    }
    if marker.epoch < memory.seen || old {
        return Verdict::Nothing {
            why: format!(
                "the marker (epoch {}, seq {}) is older than what is recorded here (epoch {}, seq {})",
                marker.epoch,
                marker.seq,
                memory.seen.max(memory.epoch),
                memory.seq
            ),
        };
    }
    if marker.active != setup.me {
        return Verdict::Elsewhere { node: marker.active.clone() };
    }
    if let Seen::Edited { address_of, .. } = seen {
        return if *address_of == setup.me {
            Verdict::Nothing { why: "marker and address record disagree".to_owned() }
        } else {
            Verdict::Elsewhere { node: address_of.clone() }
        };
    }
    if marker.epoch != memory.epoch {
        return Verdict::Nothing {
            why: format!("the marker says epoch {}, this node holds {}", marker.epoch, memory.epoch),
        };
    }
    if marker.boot != setup.boot {
        return Verdict::Nothing { why: "the marker names another boot of this node (a cloned machine?)".to_owned() };
    }
    Verdict::Here
}

/// Judges in observe mode: an answer carries no epoch, only an address.
pub fn judge_observed(setup: &Setup, seen: &Seen) -> Verdict {
    match seen {
        Seen::Unmarked { address_of: None } => {
            Verdict::Nothing { why: "the record shows the VIP, which says nothing in observe mode".to_owned() }
        }
        Seen::Unmarked { address_of: Some(name) } if *name == setup.me => Verdict::Here,
        Seen::Unmarked { address_of: Some(name) } => Verdict::Elsewhere { node: name.clone() },
        Seen::Agreed { marker } if marker.active == setup.me => Verdict::Here,
        Seen::Agreed { marker } => Verdict::Elsewhere { node: marker.active.clone() },
        Seen::Edited { address_of, .. } if *address_of == setup.me => Verdict::Here,
        Seen::Edited { address_of, .. } => Verdict::Elsewhere { node: address_of.clone() },
        Seen::Nothing { why } => Verdict::Nothing { why: why.clone() },
    }
}

/// The node the records point at, for people.
pub fn points_at(seen: &Seen) -> Option<&NodeName> {
    match seen {
        Seen::Agreed { marker } => Some(&marker.active),
        Seen::Edited { address_of, .. } => Some(address_of),
        Seen::Unmarked { address_of } => address_of.as_ref(),
        Seen::Nothing { .. } => None,
    }
}

/// The marker in it, if any.
pub fn marker_of(seen: &Seen) -> Option<&Marker> {
    match seen {
        Seen::Agreed { marker } | Seen::Edited { marker, .. } => Some(marker),
        Seen::Unmarked { .. } | Seen::Nothing { .. } => None,
    }
}

/// The addresses an update for `active` writes: the VIP stays where the record shows it, else the node's own.
pub fn addresses_for(setup: &Setup, pair: &RecordPair, active: &NodeName) -> Vec<IpAddr> {
    let vips = setup.vip_addresses();
    if !pair.addresses.is_empty() && pair.addresses.iter().all(|a| vips.contains(a)) {
        return pair.addresses.clone();
    }
    setup.addresses_of(active)
}
