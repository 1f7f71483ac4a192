//! This machine as `doctor` sees it: clock source, resolver, Java, room on the disk, the VIP's interface, the daemon's
//! process, units. Everything is only looked at.

use crate::base::time::Duration;
use crate::io::postgres::tool;
use crate::io::vip::VipHand;
use crate::io::{arp::PacketSocket, neighbour};
use ipnet::IpNet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const UNIT_LIMIT: Duration = Duration::from_secs(3);
/// A witness of the VIP has so long to answer ARP or NDP.
const NEIGHBOUR_LIMIT: Duration = Duration::from_millis(1200);

/// A clock source that counts on without help of this kernel's ticks, or what there is.
pub fn clock_source() -> Option<String> {
    let text = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource").ok()?;
    Some(text.trim().to_owned())
}

/// Bytes free for this user in the file system of `path`, or of its nearest parent that is there.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let place = path.ancestors().find(|place| place.exists())?;
    let stat = rustix::fs::statvfs(place).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// What names and answers on this machine may keep longer than their TTL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caches {
    /// `nscd` answers for glibc here.
    pub nscd: bool,
    /// Of each installed Java: its file and `networkaddress.cache.ttl`, where one is set.
    pub java: Vec<(PathBuf, String)>,
}

/// Looks for caches of host names.
pub fn caches() -> Caches {
    let nscd = ["/run/nscd/socket", "/var/run/nscd/socket"].iter().any(|path| Path::new(path).exists());
    let homes = ["/usr/lib/jvm"].iter().filter_map(|root| std::fs::read_dir(root).ok());
    let mut java = Vec::new();
    for home in homes.flatten().flatten() {
        // Links to the same Java are looked at once.
        if home.file_type().is_ok_and(|kind| kind.is_symlink()) {
            continue;
        }
        for place in ["conf/security/java.security", "jre/lib/security/java.security", "lib/security/java.security"] {
            let file = home.path().join(place);
            let Ok(text) = std::fs::read_to_string(&file) else { continue };
            if let Some(ttl) = java_ttl(&text) {
                java.push((file, ttl));
            }
            break;
        }
    }
    Caches { nscd, java }
}

fn java_ttl(text: &str) -> Option<String> {
    let set = |line: &str| {
        Some(line.trim().strip_prefix("networkaddress.cache.ttl")?.trim().strip_prefix('=')?.trim().to_owned())
    };
    text.lines().find_map(set)
}

/// A process as /proc shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    pub net_admin: bool,
    pub net_raw: bool,
    /// Hard limit of descriptors; `None`: not to be seen.
    pub descriptors: Option<u64>,
}

/// What the process may do; `None`: it is gone, or hidden.
pub fn process(pid: i32) -> Option<ProcessFacts> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    Some(process_of(&status, &limits))
}

fn process_of(status: &str, limits: &str) -> ProcessFacts {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = set.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or_default();
    let hard =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().nth(1)?.parse().ok());
    ProcessFacts {
        net_admin: set & (1 << CAP_NET_ADMIN) != 0,
        net_raw: set & (1 << CAP_NET_RAW) != 0,
        descriptors: hard,
    }
}

/// Who listens on a Unix socket.
pub async fn listener_of(socket: &Path) -> Option<i32> {
    tokio::net::UnixStream::connect(socket).await.ok()?.peer_cred().ok()?.pid()
}

/// What systemd does with a unit at boot: `enabled`, `disabled`, ...; empty where it does not know it.
///
/// # Errors
/// systemctl gave no answer.
pub async fn unit_at_boot(unit: &str) -> Result<String, String> {
    let mut command = tool::command("systemctl");
    command.args(["show", "--property=UnitFileState", "--value", "--", unit]);
    let output = tool::run(command, "systemctl", UNIT_LIMIT).await.map_err(|error| error.to_string())?;
    if output.ok { Ok(output.out.trim().to_owned()) } else { Err(output.complaint()) }
}

/// The VIP's interface, and who of its witnesses answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VipFacts {
    pub net: IpNet,
    /// Its interface, or why there is none.
    pub interface: Result<String, String>,
    pub up: bool,
    /// Another address of the VIP's subnet is on the interface.
    pub own_address: Option<IpAddr>,
    /// The witnesses (the gateways where none is configured) and whether they answered; or why nobody was asked.
    pub witnesses: Result<Vec<(IpAddr, bool)>, String>,
}

/// Looks at the interface of `net` and asks the VIP's witnesses, from this machine's own address: nothing that is heard
/// says anything about the VIP. Asking needs CAP_NET_RAW.
pub async fn vip(net: &IpNet, configured: Option<&str>, witnesses: &[IpAddr]) -> VipFacts {
    let mut facts = VipFacts {
        net: *net,
        interface: Err(String::new()),
        up: false,
        own_address: None,
        witnesses: Err("there is no interface".to_owned()),
    };
    let hand = match VipHand::new(net, configured).await {
        Ok(hand) => hand,
        Err(why) => {
            facts.interface = Err(why);
            return facts;
        }
    };
    facts.interface = Ok(hand.vip().interface.clone());
    facts.up = hand.link_is_up().await.unwrap_or(false);
    facts.own_address = crate::io::vip::own_address(net, hand.vip().interface_index).await;
    facts.witnesses = match (facts.up, facts.own_address) {
        (false, _) => Err("its interface is down".to_owned()),
        (true, None) => Err("no address of its subnet is on the interface to ask from".to_owned()),
        (true, Some(own)) => neighbour::reach(&hand, own, witnesses, NEIGHBOUR_LIMIT).await,
    };
    facts
}

/// May this process send ARP at all?
pub fn may_ask_neighbours() -> bool {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    !matches!(PacketSocket::open(1, loopback), Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_and_limits_of_a_process_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max open files            1024                 524288               files\n";
        let facts = process_of("Name:\tportcullis\nCapEff:\t0000000000003000\n", limits);
        assert_eq!(facts, ProcessFacts { net_admin: true, net_raw: true, descriptors: Some(524_288) });
        let facts = process_of("CapEff:\t0000000000001000\n", "Max open files  unlimited unlimited files\n");
        assert_eq!(facts, ProcessFacts { net_admin: true, net_raw: false, descriptors: None });
        assert!(process(std::process::id().try_into().expect("small")).is_some());
    }

    #[test]
    fn java_tells_its_cache_only_where_it_is_set() {
        assert_eq!(java_ttl("# networkaddress.cache.ttl=-1\nnetworkaddress.cache.ttl = 60\n"), Some("60".into()));
        assert_eq!(java_ttl("#networkaddress.cache.ttl=-1\nnetworkaddress.cache.negative.ttl=10\n"), None);
    }

    #[test]
    fn a_place_that_is_not_there_yet_has_the_room_of_its_parent() {
        assert!(free_bytes(Path::new("/tmp/not/there/yet")).is_some_and(|bytes| bytes > 0));
    }
}
