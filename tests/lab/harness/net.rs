//! The wires of the lab: one network namespace per host, each joined by a veth pair to one bridge that lives in a
//! namespace of its own ("the switch"), and the ways to break them.
//!
//! A cut is always made at the switch, never inside the node: the node keeps its address and, unless its link is taken
//! down, believes that its network card is fine.

use super::sys::{Outcome, enter_netns, run, run_quietly, run_within, secs, sh_words, wait_until};
use portcullis::base::time::{Duration, Instant};
use std::collections::BTreeSet;

/// The test network (RFC 5737); it exists only inside the namespaces.
pub const SUBNET: &str = "192.0.2.0/24";
pub const GATEWAY: &str = "192.0.2.1";
pub const VIP: &str = "192.0.2.100";
/// The same for labs of IPv6 alone (RFC 3849).
pub const GATEWAY_V6: &str = "2001:db8:2::1";

/// A host's address, by its last number, in the network of the family.
pub fn address_of(ipv6: bool, last: u8) -> String {
    if ipv6 { format!("2001:db8:2::{last}") } else { format!("192.0.2.{last}") }
}

/// `address:port`, with brackets around an IPv6 address.
pub fn at(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// The bridge that all hosts hang on.
#[derive(Debug, Clone)]
pub struct Switch {
    /// Name of the network namespace.
    pub ns: String,
}

/// Where a host hangs on the switch.
#[derive(Debug, Clone)]
pub struct Plug {
    pub ns: String,
    /// The outer end of the veth pair, in the switch's namespace.
    pub port: String,
    pub address: String,
    pub mac: String,
}

impl Plug {
    pub fn new(prefix: &str, name: &str, last: u8) -> Plug {
        Plug::of_family(prefix, name, last, false)
    }

    pub fn of_family(prefix: &str, name: &str, last: u8, ipv6: bool) -> Plug {
        Plug {
            ns: format!("{prefix}-{name}"),
            port: format!("p-{name}"),
            address: address_of(ipv6, last),
            mac: format!("02:00:00:00:02:{last:02x}"),
        }
    }
}

impl Switch {
    /// Makes the namespace, the bridge, and an empty table for cuts.
    pub fn build(prefix: &str) -> Outcome<Switch> {
        let switch = Switch { ns: format!("{prefix}-sw") };
        let ns = &switch.ns;
        sh_words(&format!("ip netns add {ns}"))?;
        for line in [
            "link set lo up".to_owned(),
            "link add br0 type bridge stp_state 0 mcast_snooping 0 forward_delay 0".to_owned(),
            format!("addr add {GATEWAY}/24 dev br0"),
            format!("addr add {GATEWAY_V6}/64 dev br0 nodad"),
            "link set br0 up".to_owned(),
        ] {
            sh_words(&format!("ip -n {ns} {line}"))?;
        }
        switch.nft("add table bridge lab; add chain bridge lab cuts { type filter hook forward priority 0; }")?;
        Ok(switch)
    }

    /// Makes the host's namespace and joins it to the switch; the same MAC address after each power-on.
    pub fn plug_in(&self, plug: &Plug) -> Outcome {
        let Plug { ns, port, address, mac } = plug;
        let switch = &self.ns;
        sh_words(&format!("ip netns add {ns}"))?;
        sh_words(&format!("ip -n {switch} link add {port} type veth peer name eth0 address {mac} netns {ns}"))?;
        // Without duplicate address detection, which would keep an IPv6 address from use for a second.
        let (mask, gateway) = if address.contains(':') { ("64 nodad", GATEWAY_V6) } else { ("24", GATEWAY) };
        for line in
            ["link set lo up".to_owned(), format!("addr add {address}/{mask} dev eth0"), "link set eth0 up".to_owned()]
        {
            sh_words(&format!("ip -n {ns} {line}"))?;
        }
        sh_words(&format!("ip -n {switch} link set {port} master br0 up"))?;
        sh_words(&format!("ip -n {ns} route add default via {gateway}"))?;
        Ok(())
    }

    /// Takes the host's wire and namespace away, as a machine without power: its network card is dark too.
    pub fn unplug(&self, plug: &Plug) {
        run_quietly(&format!("ip -n {} link del {}", self.ns, plug.port));
        run_quietly(&format!("ip netns del {}", plug.ns));
    }

    /// The outer end of the wire down: the host sees that it has no carrier.
    pub fn link_down(&self, plug: &Plug) -> Outcome {
        sh_words(&format!("ip -n {} link set {} down", self.ns, plug.port)).map(drop)
    }

    pub fn link_up(&self, plug: &Plug) -> Outcome {
        sh_words(&format!("ip -n {} link set {} up", self.ns, plug.port)).map(drop)
    }

    /// Off the bridge: the host reaches nobody but its card still shows carrier.
    pub fn isolate(&self, plug: &Plug) -> Outcome {
        sh_words(&format!("ip -n {} link set {} nomaster", self.ns, plug.port)).map(drop)
    }

    /// Back on the bridge.
    pub fn rejoin_bridge(&self, plug: &Plug) -> Outcome {
        sh_words(&format!("ip -n {} link set {} master br0", self.ns, plug.port)).map(drop)
    }

    /// Drops everything between two hosts, both ways, ARP included.
    pub fn cut_between(&self, one: &Plug, other: &Plug) -> Outcome {
        let (x, y) = (&one.port, &other.port);
        self.nft(&format!(
            "add rule bridge lab cuts iifname {x} oifname {y} drop; \
             add rule bridge lab cuts iifname {y} oifname {x} drop"
        ))
    }

    /// Drops the TCP traffic of one port between two hosts, whoever opened the connection.
    pub fn cut_port_between(&self, one: &Plug, other: &Plug, port: u16) -> Outcome {
        let (x, y) = (&one.port, &other.port);
        for (from, to) in [(x, y), (y, x)] {
            for side in ["sport", "dport"] {
                self.nft(&format!(
                    "add rule bridge lab cuts iifname {from} oifname {to} ether type {{ ip, ip6 }} \
                     meta l4proto tcp th {side} {port} drop"
                ))?;
            }
        }
        Ok(())
    }

    /// Drops everything from one host to another; the other way stays open.
    pub fn cut_from(&self, from: &Plug, to: &Plug) -> Outcome {
        self.nft(&format!("add rule bridge lab cuts iifname {} oifname {} drop", from.port, to.port))
    }

    /// Loses this many per cent of all packets between hosts, at random.
    pub fn lose(&self, percent: u32) -> Outcome {
        self.nft(&format!("add rule bridge lab cuts numgen random mod 100 < {percent} drop"))
    }

    /// Undoes every cut made with nftables.
    pub fn heal(&self) -> Outcome {
        self.nft("flush chain bridge lab cuts")
    }

    fn nft(&self, script: &str) -> Outcome {
        run(&["ip", "netns", "exec", &self.ns, "nft", script]).map(drop)
    }
}

/// Is this address on the namespace's `eth0`?
pub fn has_address(ns: &str, address: &str) -> Outcome<bool> {
    let text = run(&["ip", "-n", ns, "-o", "addr", "show", "dev", "eth0"])?;
    let needle = format!(" {address}/");
    Ok(text.lines().any(|line| line.contains(&needle)))
}

/// Waits until the address is gone and says when; looks every 20 ms.
pub fn address_gone(ns: &str, address: &str, deadline: Duration) -> Outcome<Instant> {
    wait_until(deadline, &format!("{address} gone from {ns}"), || Ok(!has_address(ns, address)?))?;
    Ok(super::sys::now())
}

/// Asks from the namespace who has the address, for a second, by broadcast only; the MAC addresses that answered, in
/// lower case. Several answers mean that two hosts claim it.
pub fn who_answers_arp(ns: &str, address: &str) -> Outcome<BTreeSet<String>> {
    let words = ["ip", "netns", "exec", ns, "arping", "-b", "-c", "20", "-w", "1", "-I", "eth0", address];
    let output = run_within(secs(30), &words)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let macs = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once('[')?;
        Some(rest.split_once(']')?.0.to_ascii_lowercase())
    });
    Ok(macs.collect())
}

/// Does a TCP connection from the namespace open? `Ok(false)` is a refusal or silence for a second.
pub fn connects(ns: &str, address: &str, port: u16) -> Outcome<bool> {
    let target: std::net::SocketAddr = at(address, port).parse()?;
    super::sys::in_netns(ns, || Ok(std::net::TcpStream::connect_timeout(&target, super::sys::secs(1)).is_ok()))
}

/// Puts an address on a namespace's card by hand, as a person (or another program) would.
pub fn add_address(ns: &str, address: &str) -> Outcome {
    sh_words(&format!("ip -n {ns} addr add {address}/32 dev eth0")).map(drop)
}

/// Removes it by hand, whatever mask it was bound with.
pub fn delete_address(ns: &str, address: &str) -> Outcome {
    let text = run(&["ip", "-n", ns, "-o", "addr", "show", "dev", "eth0"])?;
    let needle = format!("{address}/");
    let word = text.split_whitespace().find(|word| word.starts_with(&needle));
    let word = word.ok_or_else(|| format!("{address} is not on {ns}, so it cannot be deleted there"))?;
    run(&["ip", "-n", ns, "addr", "del", word, "dev", "eth0"]).map(drop)
}

/// The calling thread moves into the namespace for good; for threads that serve one host all their life.
pub fn live_in(ns: &str) -> Outcome {
    enter_netns(ns)
}
