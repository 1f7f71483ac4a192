//! The relations between keys, each proven once at load, and the warnings about what is accepted but worth saying.

use super::text::Notes;
use super::{Config, DnsMode, Node, OnStandbyLoss, Passive, ReplicationMode};
use std::net::IpAddr;
use std::time::Duration;

/// A VIP lives in the kernel in whole seconds, half a second less than the lease.
const SHORTEST_LEASE_WITH_VIP: Duration = Duration::from_secs(3);
/// What a take-over must wait beyond the arithmetic: scheduling of the cut on the other side.
const SHORTEST_MARGIN: Duration = Duration::from_millis(100);
/// TTL of a record (RFC 2181 section 8).
const LONGEST_TTL: Duration = Duration::from_secs(0x7fff_ffff);
/// The label before the service name under which the marker stands, with its dot.
const MARKER_PREFIX_LENGTH: usize = "_portcullis.".len();
/// What the marker's `sync=` says of a primary that is alone (design.md section 4); no node can be called so.
const NO_STANDBY: &str = "none";

/// Notes an error for each relation that does not hold.
pub(super) fn relations(config: &Config, notes: &Notes<'_>) {
    timers(config, notes);
    names(config, notes);
    nodes(config, notes);
}

fn show(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

fn timers(config: &Config, notes: &Notes<'_>) {
    let fence = &config.fence;
    if let Some(dns) = &config.dns {
        if dns.poll.is_zero() {
            notes.error("dns.poll", "0s would ask without pause", "write \"1s\"");
        }
        let least = dns.poll.saturating_mul(2);
        if fence.lease < least {
            let problem = format!("{} is shorter than twice dns.poll ({})", show(fence.lease), show(dns.poll));
            notes.error("fence.lease", problem, format!("write \"{}\" or more", show(least)));
        }
        if dns.ttl.subsec_nanos() != 0 || dns.ttl > LONGEST_TTL {
            let problem = format!("{} is not a TTL, which DNS counts in whole seconds", show(dns.ttl));
            notes.error("dns.ttl", problem, "write \"5s\"");
        }
    }
    if config.vip.is_some() && fence.lease < SHORTEST_LEASE_WITH_VIP {
        let problem = format!("{} is too short for a VIP, whose kernel lifetime is whole seconds", show(fence.lease));
        notes.error("fence.lease", problem, format!("write \"{}\" or more", show(SHORTEST_LEASE_WITH_VIP)));
    }
    if fence.lease.is_zero() {
        notes.error("fence.lease", "0s is no lease", "write \"5s\"");
    }
    if fence.margin < SHORTEST_MARGIN {
        let problem = format!("{} is too little slack", show(fence.margin));
        notes.error("fence.margin", problem, format!("write \"{}\" or more", show(SHORTEST_MARGIN)));
    }
    if fence.kernel_gate && config.service.passive == Passive::Forward {
        let problem = "\"forward\" needs the port of the gate, which fence.kernel_gate shuts on a passive node";
        notes.error("service.passive", problem, "write \"refuse\", or fence.kernel_gate = false");
    }
    if config.replication.standby_timeout.is_zero() {
        notes.error("replication.standby_timeout", "0s would lose the standby at every breath", "write \"3s\"");
    }
}

fn names(config: &Config, notes: &Notes<'_>) {
    let name = &config.service.name;
    match &config.dns {
        Some(dns) => {
            let within = *name == dns.zone || name.ends_with(&format!(".{}", dns.zone));
            if dns.zone.is_empty() {
                let problem = format!("\"{name}\" has no dot, so that no zone follows from it");
                notes.error("service.name", problem, "write the full name, \"db.example.org\"");
            } else if !within {
                let problem = format!("\"{name}\" is not within dns.zone \"{}\"", dns.zone);
                notes.error("service.name", problem, format!("write \"db.{}\", or the zone it is in", dns.zone));
            }
            if name.len() + MARKER_PREFIX_LENGTH > 253 {
                notes.error("service.name", "leaves no room for \"_portcullis.\" before it", "choose a shorter name");
            }
        }
        None if config.vip.is_some() => {}
        None => notes.error(
            "dns",
            "missing, and there is no [vip] either: nothing says which node is active",
            "write a [dns] section with zone and servers, or a [vip] section, or both",
        ),
    }
}

fn nodes(config: &Config, notes: &Notes<'_>) {
    let own = |unit: &&String| unit.starts_with("portcullis") || unit.starts_with("postgresql");
    if let Some(unit) = config.service.units.iter().find(own) {
        let problem = format!("{unit} would be stopped with every cut of the gate");
        notes.error("service.units", problem, "name only the applications that belong to the active node");
    }
    for (index, node) in config.nodes.iter().enumerate() {
        if node.name.as_str() == NO_STANDBY {
            let problem = format!("\"{NO_STANDBY}\" is the marker's word for \"no standby\"");
            notes.error(&place(&config.nodes, index, "name"), problem, "give the node another name");
        }
        for (before, other) in config.nodes.iter().take(index).enumerate() {
            let place = |key: &str| place(&config.nodes, index, key);
            if node.name == other.name {
                let problem = format!("\"{}\" is the name of [[node]] {} already", node.name, before + 1);
                notes.error(&place("name"), problem, "give each node a name of its own");
            }
            if let Some(shared) = node.addresses.iter().find(|address| other.addresses.contains(address)) {
                let problem = format!("{shared} is the address of node {} already", other.name);
                notes.error(&place("address"), problem, "give each node an address of its own");
            } else if node.peer_listen == other.peer_listen {
                let problem = format!("{} is where node {} listens already", node.peer_listen, other.name);
                notes.error(&place("peer_listen"), problem, "give each node a peer channel of its own");
            }
        }
    }
    let voters: Vec<&str> = config.nodes.iter().filter(|node| node.voter).map(|node| node.name.as_str()).collect();
    if voters.len() != 2 {
        let problem = format!("{} voters ({}), where exactly two are needed", voters.len(), voters.join(", "));
        notes.error("node", problem, "write voter = false in every [[node]] but two (default: true in the first two)");
    }
    if let Some(vip) = &config.vip {
        let addresses: Vec<IpAddr> = vip.addresses.iter().map(|vip| vip.addr()).collect();
        if let Some(twice) =
            addresses.iter().enumerate().find(|(at, vip)| addresses.iter().take(*at).any(|v| v == *vip))
        {
            notes.error("vip.address", format!("{} is there twice", twice.1), "name each VIP once");
        }
        let strange = |witness: &&IpAddr| {
            addresses.contains(witness) || config.nodes.iter().any(|node| node.addresses.contains(witness))
        };
        if let Some(own) = vip.witness.iter().find(strange) {
            let problem = format!("{own} is a VIP or a node, whose answer would prove nothing");
            notes.error("vip.witness", problem, "name the gateway, or another machine that is always there");
        }
        for (index, node) in config.nodes.iter().enumerate() {
            if let Some(taken) = vip.addresses.iter().find(|vip| node.addresses.contains(&vip.addr())) {
                let problem = format!("{} is the VIP, which belongs to no node", taken.addr());
                notes.error(&place(&config.nodes, index, "address"), problem, "write the node's own address");
            }
        }
    }
}

/// The path by which `text.rs` shows a key of the node at `index`.
fn place(nodes: &[Node], index: usize, key: &str) -> String {
    match nodes.get(index) {
        Some(node) if !nodes.iter().take(index).any(|other| other.name == node.name) => {
            format!("node.{}.{key}", node.name)
        }
        _ => format!("node[{}].{key}", index + 1),
    }
}

/// One sentence each about what is accepted.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    let replication = &config.replication;
    let on_node = |address: IpAddr| config.nodes.iter().find(|node| node.addresses.contains(&address));
    if let Some(dns) = &config.dns {
        for server in &dns.servers {
            if let Some(node) = on_node(server.ip()) {
                warnings.push(format!(
                    "dns.servers: {server} is node {}: a witness on a node is no third voter; use a server that \
                     stands with neither",
                    node.name
                ));
            }
        }
        let synchronous_continue =
            replication.mode == ReplicationMode::Synchronous && replication.on_standby_loss == OnStandbyLoss::Continue;
        if dns.mode == DnsMode::Observe && synchronous_continue {
            warnings.push(
                "dns.mode = \"observe\" keeps no marker: a promote without the old primary's word cannot know whether \
                 it went on alone and needs --accept-data-loss"
                    .to_owned(),
            );
        }
    }
    if config.dns.is_none() {
        let continues =
            replication.mode != ReplicationMode::Synchronous || replication.on_standby_loss == OnStandbyLoss::Continue;
        let loss = if continues { ", and without the old primary's word --accept-data-loss" } else { "" };
        warnings.push(format!(
            "without [dns] there is no third voter: a promote while the other node is silent needs --peer-is-off or \
             fence.stonith{loss}"
        ));
    }
    if let Some(witness) = &config.witness {
        let servers = config.dns.as_ref().map(|dns| dns.servers.as_slice()).unwrap_or_default();
        for listen in witness.listen.iter().filter(|listen| !servers.contains(listen)) {
            if let Some(node) = on_node(listen.ip()) {
                warnings.push(format!(
                    "witness.listen: {listen} is node {}: a witness on a node is no third voter; run it on a machine \
                     that stands with neither",
                    node.name
                ));
            }
        }
    }
    warnings
}
