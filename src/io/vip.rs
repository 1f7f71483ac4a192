//! The VIP's hand: binds the address with a kernel lifetime, unbinds it, asks who else holds it, announces it.
//!
//! ```text
//! bind(n)    RTM_NEWADDR replace, /32 or /128, noprefixroute, valid_lft = n: the kernel takes it away by itself
//! unbind     RTM_DELADDR for every instance of the address, whoever bound it, with whatever mask, on any interface
//! probe      RFC 5227 or duplicate address detection, shortened; announce: gratuitous ARP or unsolicited NA
//! ```
//!
//! What this is NOT: it keeps no lease, schedules no renewal and no repetition, and does not watch (`io::links` does).
//! Needs CAP_NET_ADMIN to bind and unbind, CAP_NET_RAW to probe and announce.
//!
//! **Invariants:** an address is never bound without a lifetime, nor with one of zero or "for ever"; every call ends
//! within [`NETLINK_LIMIT`] (a probe within its own limit on top). Nothing is held between calls: each opens its own
//! netlink socket (never the watching one: on a shared socket our own changes would not show as events), finds the
//! interface by name and reads its MAC, so a recreated interface or a failed-over bond needs no restart.

use crate::io::arp::{FRAME_LIMIT, PacketSocket};
use crate::wire::arp::{self, LIFETIME_LONGEST, Mac};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::Handle;
use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

/// Longest a talk with the kernel takes; it answers in microseconds. After that the call fails.
pub const NETLINK_LIMIT: Duration = Duration::from_secs(1);
/// Our mark on the address (IFA_PROTO, Linux 5.18 and later; older ones ignore it): `ip -d address` shows whose it is.
pub const PROTOCOL_MARK: u8 = 77;
/// RFC 5227 asks thrice, 1 to 2 s apart; section 2.2 allows less on links known to be quick.
const PROBES: u32 = 3;
const PROBE_EVERY: Duration = Duration::from_millis(50);
/// How long a probe listens in all, when its caller has no other wish.
pub const PROBE_TIME: Duration = Duration::from_millis(200);
/// Frames of one burst, in alternating forms.
const BURST: usize = 5;

/// A virtual address and the interface it belongs on, as found at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    pub address: IpAddr,
    pub interface: String,
    pub interface_index: u32,
    pub mac: Mac,
}

/// Binds, unbinds, probes and announces one VIP.
#[derive(Debug, Clone)]
pub struct VipHand {
    vip: Vip,
}

/// An interface as the kernel describes it now.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Mac,
    /// Administratively up and with carrier.
    pub(super) up: bool,
    /// Has neighbours to ask and tell (not loopback, not NOARP).
    pub(super) neighbours: bool,
}

/// The interface for `net`: the configured one, else the one that has an address in its subnet (the longest prefix
/// wins). Index, name, MAC. Errors when there is none, or more than one.
pub async fn find_interface(net: &IpNet, configured: Option<&str>) -> Result<(u32, String, Mac), String> {
    let link = find(net, configured).await?;
    Ok((link.index, link.name, link.mac))
}

async fn find(net: &IpNet, configured: Option<&str>) -> Result<Link, String> {
    if let Some(name) = configured {
        return link_by_name(name).await;
    }
    let vip = net.addr();
    let mut best: Option<(u8, Vec<u32>)> = None;
    for message in addresses().await? {
        let (Some(address), length) = (local_address(&message), message.header.prefix_len) else { continue };
        let holds = IpNet::new(address, length).is_ok_and(|subnet| subnet.contains(&vip));
        if address == vip || !holds {
            continue; // a left-over instance of the VIP itself says nothing about where it belongs
        }
        match &mut best {
            Some((longest, found)) if *longest == length => found.push(message.header.index),
            Some((longest, _)) if *longest > length => {}
            _ => best = Some((length, vec![message.header.index])),
        }
    }
    let mut found = best.map(|(_, found)| found).unwrap_or_default();
    found.sort_unstable();
    found.dedup();
    let links = links().await?;
    let mut named: Vec<_> = links.into_iter().filter(|link| found.contains(&link.index)).collect();
    match (named.pop(), named.pop()) {
        (Some(link), None) => Ok(link),
        (Some(one), Some(other)) => Err(format!(
            "both {} and {} have the subnet of the VIP {vip}; set [vip] interface to the one it belongs on",
            other.name, one.name
        )),
        (None, _) => Err(format!(
            "no interface has an address in the subnet of the VIP {net}; set [vip] interface, or mend the mask"
        )),
    }
}

/// Another address of the net's subnet on this interface, to ask neighbours from.
pub(super) async fn own_address(net: &IpNet, interface: u32) -> Option<IpAddr> {
    let all = addresses().await.ok()?;
    let fits = |address: &IpAddr| net.contains(address) && *address != net.addr();
    all.iter().filter(|message| message.header.index == interface).filter_map(local_address).find(fits)
}

impl VipHand {
    /// Finds the interface of `net` ([`find_interface`]); touches nothing.
    pub async fn new(net: &IpNet, configured: Option<&str>) -> Result<VipHand, String> {
        let link = find(net, configured).await?;
        let vip = Vip { address: net.addr(), interface: link.name, interface_index: link.index, mac: link.mac };
        Ok(VipHand { vip })
    }

    /// The VIP and where it belongs.
    pub fn vip(&self) -> &Vip {
        &self.vip
    }

    /// Binds the VIP, or renews it, for `valid_secs` from now (`wire::arp::kernel_lifetime`); then the kernel removes
    /// it.
    pub async fn bind(&self, valid_secs: u32) -> Result<(), String> {
        if valid_secs == 0 || valid_secs > LIFETIME_LONGEST {
            return Err(format!(
                "the VIP {} was not bound: a lifetime of {valid_secs} s is not between 1 and {LIFETIME_LONGEST}",
                self.vip.address
            ));
        }
        let link = self.link().await?;
        let v4 = self.vip.address.is_ipv4();
        let result = netlink(async |handle| {
            let mut request =
                handle.address().add(link.index, self.vip.address, host_prefix(self.vip.address)).replace();
            let message = request.message_mut();
            // The builder adds a broadcast address, which a /32 has none of.
            message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
            message.header.scope = AddressScope::Universe;
            // No prefix route: /32 and /128 with nothing to route. No duplicate address detection: the address must
            // work at once, and `probe` has asked before. Preferred 0 (IPv6): never chosen as a source (RFC 6724).
            let mut flags = AddressFlags::Noprefixroute;
            if !v4 {
                flags |= AddressFlags::Nodad;
                message.header.flags |= AddressHeaderFlags::Nodad;
            }
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_valid = valid_secs;
            lifetime.ifa_preferred = if v4 { valid_secs } else { 0 };
            message.attributes.push(AddressAttribute::Flags(flags));
            message.attributes.push(AddressAttribute::CacheInfo(lifetime));
            message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL_MARK)));
            request.execute().await
        })
        .await;
        result.map_err(|error| self.failed("bound", &error))
    }

    /// Removes every instance of the VIP on any interface, also one bound by hand or by a former life, with whatever
    /// mask and lifetime. Says whether there was one.
    pub async fn unbind(&self) -> Result<bool, String> {
        let mut found = false;
        for message in addresses().await? {
            if local_address(&message) != Some(self.vip.address) {
                continue;
            }
            found = true;
            match netlink(async |handle| handle.address().del(message).execute().await).await {
                Ok(()) => {}
                // Gone since the dump: expired, or removed with its primary.
                Err(Trouble::Kernel(libc::EADDRNOTAVAIL | libc::ENODEV)) => {}
                Err(error) => return Err(self.failed("unbound", &error)),
            }
        }
        Ok(found)
    }

    /// Whether the VIP is on its interface now, and usable (no failed or pending duplicate address detection).
    pub async fn is_bound(&self) -> Result<bool, String> {
        let link = self.link().await?;
        let ours = |message: &AddressMessage| {
            message.header.index == link.index && local_address(message) == Some(self.vip.address) && is_usable(message)
        };
        Ok(addresses().await?.iter().any(ours))
    }

    /// Whether the VIP's interface is up and has carrier.
    pub async fn link_is_up(&self) -> Result<bool, String> {
        Ok(self.link().await?.up)
    }

    /// Asks the link thrice, 50 ms apart, who holds the VIP, and listens for `limit` ([`PROBE_TIME`]). `Some`: the MAC
    /// of another machine that answered, claimed it, or probes for it too. Errors when the question cannot be asked:
    /// silence on a dead link proves nothing.
    pub async fn probe(&self, limit: Duration) -> Result<Option<Mac>, String> {
        let link = self.link().await?;
        if !link.up {
            return Err(format!(
                "cannot ask who holds the VIP {}: the link of {} is down; bring it up",
                self.vip.address, link.name
            ));
        }
        if !link.neighbours {
            return Ok(None);
        }
        let frame = match self.vip.address {
            IpAddr::V4(address) => arp::probe(link.mac, address),
            IpAddr::V6(address) => arp::solicitation_probe(link.mac, address),
        };
        // Looked up before the first question: a claim that was heard must not wait while the time for it runs out.
        let own: Vec<Mac> = links().await?.iter().map(|link| link.mac).collect();
        let socket = self.socket(&link)?;
        let asked_and_heard = async {
            let (_, mac) = tokio::try_join!(self.ask(&socket, &frame), self.hear(&socket, link.mac, &own))?;
            Ok(Some(mac))
        };
        tokio::time::timeout(limit, asked_and_heard).await.unwrap_or(Ok(None))
    }

    async fn ask(&self, socket: &PacketSocket, frame: &[u8]) -> Result<(), String> {
        for round in 0..PROBES {
            if round > 0 {
                tokio::time::sleep(PROBE_EVERY).await;
            }
            socket.send(frame).await.map_err(|error| self.failed("probed", &error))?;
        }
        Ok(())
    }

    /// The MAC of the first other machine that claims the VIP; waits for ever.
    async fn hear(&self, socket: &PacketSocket, mac: Mac, own: &[Mac]) -> Result<Mac, String> {
        let mut buffer = [0; FRAME_LIMIT];
        loop {
            let length = socket.receive(&mut buffer).await.map_err(|error| self.failed("probed", &error))?;
            match arp::foreign_claim(&buffer[..length], self.vip.address, mac, true) {
                Some(foreign) if !own.contains(&foreign) => return Ok(foreign),
                _ => {}
            }
        }
    }

    /// Announces the VIP once: gratuitous ARP request and reply, or an unsolicited neighbour advertisement.
    pub async fn announce(&self) -> Result<(), String> {
        self.send_announcements(if self.vip.address.is_ipv4() { 2 } else { 1 }).await
    }

    /// Announces the VIP five times at once in alternating forms, as a new holder should; the driver repeats later.
    pub async fn announce_burst(&self) -> Result<(), String> {
        self.send_announcements(BURST).await
    }

    async fn send_announcements(&self, count: usize) -> Result<(), String> {
        let link = self.link().await?;
        if !link.neighbours {
            return Ok(());
        }
        let forms = match self.vip.address {
            IpAddr::V4(address) => {
                vec![arp::gratuitous_request(link.mac, address), arp::gratuitous_reply(link.mac, address)]
            }
            IpAddr::V6(address) => vec![arp::unsolicited_advertisement(link.mac, address)],
        };
        let socket = self.socket(&link)?;
        let all = async {
            for frame in forms.iter().cycle().take(count) {
                socket.send(frame).await.map_err(|error| self.failed("announced", &error))?;
            }
            Ok(())
        };
        let late = || self.failed("announced", &"the interface takes no frames");
        tokio::time::timeout(NETLINK_LIMIT, all).await.unwrap_or_else(|_| Err(late()))
    }

    pub(super) fn socket(&self, link: &Link) -> Result<PacketSocket, String> {
        PacketSocket::open(link.index, self.vip.address).map_err(|error| {
            format!(
                "cannot open a packet socket on {}: {error}; the daemon needs CAP_NET_RAW and the interface",
                link.name
            )
        })
    }

    pub(super) async fn link(&self) -> Result<Link, String> {
        link_by_name(&self.vip.interface).await
    }

    fn failed(&self, done: &str, error: &dyn std::fmt::Display) -> String {
        format!(
            "the VIP {} could not be {done} on {}: {error}; check the interface and that the daemon has CAP_NET_ADMIN \
             and CAP_NET_RAW",
            self.vip.address, self.vip.interface
        )
    }
}

/// Why a talk with the kernel failed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Kernel(i32),
    #[error("{0}")]
    Other(String),
}

impl From<rtnetlink::Error> for Trouble {
    fn from(error: rtnetlink::Error) -> Trouble {
        match error {
            rtnetlink::Error::NetlinkError(message) => Trouble::Kernel(message.raw_code().abs()),
            other => Trouble::Other(other.to_string()),
        }
    }
}

/// Runs one request on a netlink socket of its own, within [`NETLINK_LIMIT`].
async fn netlink<T, F>(request: impl FnOnce(Handle) -> F) -> Result<T, Trouble>
where
    F: Future<Output = Result<T, rtnetlink::Error>>,
{
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|error| Trouble::Other(format!("no netlink socket: {error}")))?;
    // The connection ends by itself when the handle and the stream are dropped; until then it is polled right here.
    tokio::select! {
        result = tokio::time::timeout(NETLINK_LIMIT, request(handle)) => match result {
            Ok(result) => Ok(result?),
            Err(_) => Err(Trouble::Other("the kernel did not answer in time".to_owned())),
        },
        () = connection => Err(Trouble::Other("the netlink socket closed".to_owned())),
    }
}

/// Every address of every interface.
pub(super) async fn addresses() -> Result<Vec<AddressMessage>, String> {
    netlink(async |handle| handle.address().get().execute().try_collect().await)
        .await
        .map_err(|error| format!("the kernel did not list the addresses: {error}; try again"))
}

/// Every interface.
pub(super) async fn links() -> Result<Vec<Link>, String> {
    let messages: Vec<LinkMessage> = netlink(async |handle| handle.link().get().execute().try_collect().await)
        .await
        .map_err(|error| format!("the kernel did not list the interfaces: {error}; try again"))?;
    Ok(messages.iter().map(link_of).collect())
}

/// Every route of the family of `wanted`.
pub(super) async fn routes(wanted: RouteMessage) -> Result<Vec<RouteMessage>, String> {
    netlink(async |handle| handle.route().get(wanted).execute().try_collect().await)
        .await
        .map_err(|error| format!("the kernel did not list the routes: {error}; try again"))
}

/// The interface of that name now.
pub(super) async fn link_by_name(name: &str) -> Result<Link, String> {
    let found = links().await?.into_iter().find(|link| link.name == name);
    found.ok_or_else(|| format!("there is no interface {name}; create it, or mend [vip] interface"))
}

/// Whether any interface of this machine has that MAC: Linux answers ARP for an address on every interface it has, so
/// with two of them on one link the answer to our own question may be our own.
pub(super) async fn is_our_mac(mac: Mac) -> Result<bool, String> {
    Ok(links().await?.iter().any(|link| link.mac == mac))
}

/// What matters of an interface message.
pub(super) fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        up: message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        neighbours: !message.header.flags.intersects(LinkFlags::Loopback | LinkFlags::Noarp),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            // Not six octets: a tunnel, which has no neighbours to tell.
            LinkAttribute::Address(mac) => match mac.as_slice().try_into() {
                Ok(mac) => link.mac = mac,
                Err(_) => link.neighbours = false,
            },
            _ => {}
        }
    }
    link
}

/// The address itself: IFA_LOCAL, or IFA_ADDRESS where there is no other (IPv6). On IPv4 the latter may be the far end
/// of a point-to-point link.
pub(super) fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut other = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    other
}

fn is_usable(message: &AddressMessage) -> bool {
    !message.header.flags.intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed)
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
