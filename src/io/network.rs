//! What `init` finds on a machine before there is a configuration: addresses of its network cards, its domain, and what
//! the system's resolver says of a service name.
//!
//! It only looks. What it finds is proposed to a person, never used as evidence.

use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{TokioResolver, config::ResolverOpts};
use ipnet::IpNet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::time::timeout;

/// How long the resolver may take in all; a machine without DNS must not keep a person waiting.
const LOOK_LIMIT: Duration = Duration::from_secs(6);
/// Cards that containers, virtual machines and bridges of theirs make; no client comes that way.
const NOT_A_NETWORK: [&str; 14] = [
    "lo", "docker", "br-", "veth", "virbr", "vnet", "lxcbr", "lxdbr", "cni", "flannel", "cali", "podman", "kube", "tap",
];

/// An address of this machine that others may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub interface: String,
    pub net: IpNet,
    /// The card that packets to nowhere in particular leave by.
    pub is_default: bool,
}

/// The addresses of this machine, those of the card with the default route first, IPv4 before IPv6; without loopback,
/// link-local ones and the cards of containers.
pub fn places() -> Vec<Place> {
    let default = default_interfaces();
    let Ok(all) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let mut found: Vec<Place> = Vec::new();
    for entry in all {
        let (Some(address), Some(mask)) = (entry.address.and_then(ip), entry.netmask.and_then(ip)) else { continue };
        let interface = entry.interface_name;
        let Ok(net) = IpNet::with_netmask(address, mask) else { continue };
        if is_worth_naming(&interface, address) {
            let is_default = default.contains(&interface);
            found.push(Place { interface, net, is_default });
        }
    }
    found.sort_by_key(|place| (!place.is_default, place.net.addr().is_ipv6(), place.interface.clone()));
    found
}

fn ip(address: nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

fn is_worth_naming(interface: &str, address: IpAddr) -> bool {
    let local = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    };
    !local && !NOT_A_NETWORK.iter().any(|made| interface.starts_with(made) && (*made != "lo" || interface == "lo"))
}

/// Names of the cards that have a default route: /proc/net/route (destination and mask zero), /proc/net/ipv6_route
/// (destination and prefix zero, the name last; `lo` holds the kernel's own "unreachable").
fn default_interfaces() -> Vec<String> {
    let mut names = Vec::new();
    for line in fs::read_to_string("/proc/net/route").unwrap_or_default().lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [name, "00000000", _, _, _, _, _, "00000000", ..] = fields.as_slice() {
            names.push((*name).to_owned());
        }
    }
    for line in fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default().lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let zero = fields.first().is_some_and(|to| to.bytes().all(|b| b == b'0')) && fields.get(1) == Some(&"00");
        if let Some(name) = fields.last().filter(|name| zero && **name != "lo") {
            names.push((*name).to_owned());
        }
    }
    names
}

/// The domain this machine is in: of its full name, else the first of the resolver's search list.
pub fn domain() -> Option<String> {
    let name = super::host::name();
    if let Some((_, domain)) = name.split_once('.').filter(|(_, domain)| domain.contains('.')) {
        return Some(domain.to_owned());
    }
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let words = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next()?, "search" | "domain").then(|| words.next().map(str::to_owned))?
    });
    words.map(|word| word.trim_matches('.').to_ascii_lowercase()).filter(|word| word.contains('.'))
}

/// What the system's resolver says of a service name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NameFacts {
    /// The closest zone around it that has an SOA record; `None`: none was found.
    pub zone: Option<ZoneFacts>,
    /// What the name leads to now.
    pub addresses: Vec<IpAddr>,
}

/// A zone and who answers for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneFacts {
    pub name: String,
    /// The SOA's MNAME: who takes updates.
    pub primary: String,
    /// Addresses of the primary, then of the other name servers; may be empty.
    pub servers: Vec<SocketAddr>,
}

/// Asks for the zone around `service` and what the name leads to. Silence is nothing found.
pub async fn look_up(service: &str) -> NameFacts {
    let look = async {
        let mut options = ResolverOpts::default();
        options.cache_size = 0;
        options.attempts = 1;
        options.timeout = Duration::from_secs(2);
        let resolver = TokioResolver::builder_tokio().ok()?.with_options(options).build().ok()?;
        let full = Name::from_ascii(format!("{}.", service.trim_end_matches('.'))).ok()?;
        let addresses = match resolver.lookup_ip(full.clone()).await {
            Ok(found) => found.iter().collect(),
            Err(_) => Vec::new(),
        };
        // The name itself may be a zone of its own; a top-level domain is nobody's to update.
        let mut at = full;
        let mut zone = None;
        while zone.is_none() && at.num_labels() >= 2 {
            zone = soa_primary(&resolver, &at).await.map(|primary| (at.clone(), primary));
            at = at.base_name();
        }
        let zone = match zone {
            Some((name, primary)) => {
                let text = name.to_ascii().trim_end_matches('.').to_ascii_lowercase();
                let servers = super::dns::find_authorities_by(&resolver, &text).await.unwrap_or_default();
                let primary = primary.to_ascii().trim_end_matches('.').to_owned();
                Some(ZoneFacts { name: text, primary, servers })
            }
            None => None,
        };
        Some(NameFacts { zone, addresses })
    };
    timeout(LOOK_LIMIT, look).await.ok().flatten().unwrap_or_default()
}

/// The MNAME of the SOA record that this very name has.
async fn soa_primary(resolver: &TokioResolver, name: &Name) -> Option<Name> {
    let found = resolver.lookup(name.clone(), RecordType::SOA).await.ok()?;
    found.answers().iter().filter(|record| record.name == *name).find_map(|record| match &record.data {
        RData::SOA(soa) => Some(soa.mname.clone()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_others_may_reach_are_proposed() {
        let rows = [
            ("eth0", "192.0.2.11", true),
            ("ens18", "2001:db8::11", true),
            ("wg0", "10.1.0.1", true),
            ("lom1", "192.0.2.11", true),
            ("lo", "127.0.0.1", false),
            ("lo", "192.0.2.7", false),
            ("eth0", "169.254.1.1", false),
            ("eth0", "fe80::1", false),
            ("docker0", "172.17.0.1", false),
            ("br-9f3", "172.18.0.1", false),
            ("veth12", "10.0.3.1", false),
        ];
        for (interface, address, worth) in rows {
            assert_eq!(
                is_worth_naming(interface, address.parse().expect("an address")),
                worth,
                "{interface} {address}"
            );
        }
    }
}
