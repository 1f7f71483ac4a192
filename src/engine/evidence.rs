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
    /// Anything else: NXDOMAIN, two addresses, an address of no node, an unreadable marker... `stamp` is epoch and seq
    /// of the marker beside it, where one can be read: even nonsense can be old.
    Nothing { why: String, stamp: Option<(Epoch, u64)> },
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
    let nothing = |why: String| Seen::Nothing { why, stamp: None };
    let marker = match reading.pair.marker.as_slice() {
        // Nobody keeps it up to date there: one left over from update mode proves nothing.
        _ if setup.mode == Mode::Observe => None,
        [] => None,
        [text] => match text.parse::<Marker>() {
            Ok(marker) => Some(marker),
            Err(why) => return nothing(format!("the marker is unreadable: {why}")),
        },
        more => return nothing(format!("there are {} markers", more.len())),
    };
    let stamp = marker.as_ref().map(|marker| (marker.epoch, marker.seq));
    if let Some(strange) = &reading.strange {
        return Seen::Nothing { why: strange.clone(), stamp };
    }
    match (marker, owner(setup, &reading.pair.addresses)) {
        (_, Err(why)) => Seen::Nothing { why, stamp },
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
        // A secondary may still show a mistake that a takeover has mended.
        Seen::Nothing { stamp: Some(stamp), .. } if !first && *stamp < (memory.epoch, memory.seq) => {
            return Verdict::Lagging;
        }
        Seen::Nothing { why, .. } => return Verdict::Nothing { why: why.clone() },
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
        Seen::Nothing { why, .. } => Verdict::Nothing { why: why.clone() },
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::config::FencePostgres;
    use crate::base::time::Duration;
    use crate::engine::lease::Timing;
    use crate::engine::setup::NodeSetup;

    fn setup() -> Setup {
        let node = |name: &str, last: u8| NodeSetup {
            name: name.parse().unwrap(),
            addresses: vec![IpAddr::from([192, 0, 2, last])],
            hostname: name.to_owned(),
            port: 5432,
            weight: 0.5,
        };
        Setup {
            version: "test".into(),
            service: "db.example.org".into(),
            me: "b".parse().unwrap(),
            peer: "a".parse().unwrap(),
            nodes: vec![node("a", 11), node("b", 12), node("c", 13)],
            voters: vec!["a".parse().unwrap(), "b".parse().unwrap()],
            timing: Timing { lease: Duration::from_secs(3), max_drift: 0.01, margin: Duration::ZERO },
            poll: Duration::from_secs(1),
            mode: Mode::Update,
            propagation: Duration::ZERO,
            servers: vec!["192.0.2.53:53".into(), "192.0.2.54:53".into()],
            vips: Vec::new(),
            kernel_gate: false,
            stonith: false,
            units: false,
            synchronous: true,
            block: false,
            standby_timeout: Duration::from_secs(3),
            hold_limit: Duration::from_secs(30),
            fence_postgres: FencePostgres::Demote,
            digest: "same".into(),
            start: 1,
            boot: "5f1c0000-0000-4000-8000-000000000001".into(),
        }
    }

    fn reading(epoch: u64, active: &str, addresses: &[u8]) -> Reading {
        let marker = format!(
            "v=1 epoch={epoch} seq=4 active={active} sync=none timeline=3 lease=3000 sysid=7318000111222333444 \
             boot=5f1c0000-0000-4000-8000-000000000001 since=2026-11-20T15:11:00Z"
        );
        let addresses: Vec<IpAddr> = addresses.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect();
        Reading { pair: RecordPair::written(&addresses, 5, &marker), ..Reading::default() }
    }

    /// A node without a vote is never active: its address is a mistake, as that of no node is, and nobody is fenced.
    #[test]
    fn the_address_of_a_node_without_a_vote_says_nothing() {
        let seen = see(&setup(), &reading(7, "b", &[13]));
        assert!(matches!(&seen, Seen::Nothing { why, .. } if why.contains("192.0.2.13")), "{seen:?}");
    }

    #[test]
    fn a_secondary_that_lags_counts_for_nothing_even_when_it_shows_an_old_mistake() {
        let setup = setup();
        let epoch = Epoch;
        let memory = Memory { epoch: epoch(7), seq: 5, seen: epoch(7) };
        let verdict = |first, reading: &Reading| judge(&setup, memory, first, &see(&setup, reading));
        let alias = Reading { strange: Some("an alias".into()), ..reading(6, "a", &[]) };
        for old in
            [reading(6, "a", &[11]), reading(6, "a", &[]), reading(6, "a", &[11, 12]), reading(7, "b", &[66]), alias]
        {
            assert_eq!(verdict(false, &old), Verdict::Lagging, "{old:?}");
            assert!(matches!(verdict(true, &old), Verdict::Nothing { .. }), "{old:?}");
        }
        // A mistake of the present counts wherever it stands.
        let now = Memory { seq: 4, ..memory };
        let two = see(&setup, &reading(7, "b", &[11, 12]));
        assert!(matches!(judge(&setup, now, false, &two), Verdict::Nothing { .. }));
        assert_eq!(judge(&setup, now, true, &see(&setup, &reading(7, "b", &[12]))), Verdict::Here);
    }
}
