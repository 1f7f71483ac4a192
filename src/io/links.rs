//! The VIP's sense: watches the kernel's netlink events and the link's own talk, and says what happened to each VIP.
//!
//! ```text
//! netlink (link, IPv4 and IPv6 addresses) ---- AddressAdded, AddressRemoved, LinkUp, LinkDown --+
//! packet socket (ARP or NA about the VIP) ---- ForeignClaim ------------------------------------+--> bounded channel
//! events lost, there or here ----------------- Overrun, then all facts anew --------------------+
//! ```
//!
//! The kernel's own removal of an address whose lifetime ran out shows as `AddressRemoved` like anybody else's.
//!
//! What this is NOT: it acts on nothing and decides nothing, and it does not retell its state on request: `io::vip`
//! answers that. Needs CAP_NET_RAW for the claims alone.
//!
//! **Invariants:** an event that cannot be delivered is never lost silently: the consumer gets `Overrun` and then every
//! fact anew. The netlink socket is not the one that changes addresses (events of one's own changes would not show).

use crate::io::arp::{FRAME_LIMIT, PacketSocket};
use crate::io::vip::{self, Vip};
use crate::wire::arp::{self, Mac};
use futures_util::StreamExt;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Events that may wait for the consumer; one more makes an [`LinkEvent::Overrun`].
pub const EVENTS_WAITING: usize = 64;
/// Wait before a watch that broke (no socket, interface gone) is set up again.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// The same MAC's claim is reported once in this time: an active peer claims the VIP with every ARP request it sends.
const CLAIM_EVERY: Duration = Duration::from_secs(1);
/// Claims looked at in a second, whoever sends them; the rest of a flood is dropped, since the first ones have said it.
const CLAIMS_PER_SECOND: u32 = 8;

/// What happened to a VIP or its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkEvent {
    /// The address is on its interface now; reported once, not at each renewal.
    AddressAdded { address: IpAddr, ifindex: u32 },
    /// An instance of the address left its interface: expired, deleted by somebody, or the link went down (IPv6).
    AddressRemoved { address: IpAddr },
    /// The interface is up and has carrier; also reported at start.
    LinkUp { ifindex: u32 },
    /// The interface is down, has no carrier, or is gone; also reported at start.
    LinkDown { ifindex: u32 },
    /// Another machine says on the link that it holds the address; at most once a second for each MAC.
    ForeignClaim { address: IpAddr, mac: Mac },
    /// Events were lost. What is true now follows: for each VIP added or removed, for each interface up or down.
    Overrun,
}

/// The running watch; dropping it ends it.
#[derive(Debug)]
pub struct LinkWatch {
    _tasks: JoinSet<()>,
}

impl LinkWatch {
    /// Starts watching; must be called inside a tokio runtime. What is true at the start is reported first. It mends
    /// itself for ever, so there is no error to return; it ends when dropped or when the receiver is.
    pub fn start(vips: &[Vip], events: mpsc::Sender<LinkEvent>) -> LinkWatch {
        let mut tasks = JoinSet::new();
        tasks.spawn(watch(Known::new(vips), Reporter::new(events.clone())));
        for vip in vips {
            tasks.spawn(hear_claims(vip.clone(), events.clone()));
        }
        LinkWatch { _tasks: tasks }
    }
}

/// Delivers events without ever waiting; remembers when one did not fit.
struct Reporter {
    events: mpsc::Sender<LinkEvent>,
    lost: bool,
}

impl Reporter {
    fn new(events: mpsc::Sender<LinkEvent>) -> Reporter {
        Reporter { events, lost: false }
    }

    fn report(&mut self, event: LinkEvent) {
        if self.lost {
            return; // `Overrun` and every fact will follow
        }
        tracing::debug!(?event, "link event");
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            tracing::warn!("link events come faster than they are handled; all will be looked at anew");
            self.lost = true;
        }
    }

    /// Waits until a lost event can be owned up to, and does. Pending for ever while none is lost. Cancel-safe.
    async fn own_up(&mut self) {
        if !self.lost {
            return std::future::pending().await;
        }
        // An error is a consumer that is gone; the loop ends on `closed` then.
        if self.events.send(LinkEvent::Overrun).await.is_ok() {
            self.lost = false;
        }
    }
}

/// What is known of one VIP and its interface.
struct KnownVip {
    address: IpAddr,
    interface: String,
    ifindex: u32,
    /// `None`: not heard of yet.
    up: Option<bool>,
    /// Prefix lengths under which the address is on the interface.
    instances: BTreeSet<u8>,
}

/// What was reported, so that only changes are.
struct Known {
    vips: Vec<KnownVip>,
}

impl Known {
    fn new(vips: &[Vip]) -> Known {
        let known = |vip: &Vip| KnownVip {
            address: vip.address,
            interface: vip.interface.clone(),
            ifindex: vip.interface_index,
            up: None,
            instances: BTreeSet::new(),
        };
        Known { vips: vips.iter().map(known).collect() }
    }

    fn address_added(&mut self, message: &AddressMessage, reporter: &mut Reporter) {
        let address = vip::local_address(message);
        for vip in &mut self.vips {
            if address == Some(vip.address) && message.header.index == vip.ifindex {
                if vip.instances.is_empty() {
                    reporter.report(LinkEvent::AddressAdded { address: vip.address, ifindex: vip.ifindex });
                }
                vip.instances.insert(message.header.prefix_len);
            }
        }
    }

    fn address_removed(&mut self, message: &AddressMessage, reporter: &mut Reporter) {
        let address = vip::local_address(message);
        for vip in &mut self.vips {
            if address == Some(vip.address) && message.header.index == vip.ifindex {
                // Reported even if another instance stays: which of them was ours is not worth a risk.
                vip.instances.clear();
                reporter.report(LinkEvent::AddressRemoved { address: vip.address });
            }
        }
    }

    fn link_changed(&mut self, message: &LinkMessage, gone: bool, reporter: &mut Reporter) {
        if message.header.interface_family != AddressFamily::Unspec {
            return; // a bridge tells of its ports, and a port that leaves it is not an interface that is gone
        }
        let link = vip::link_of(message);
        for vip in &mut self.vips {
            // A recreated interface comes back under its name with another index.
            if link.name == vip.interface && !gone {
                vip.ifindex = link.index;
            } else if link.index != vip.ifindex {
                continue;
            }
            // An interface that now has our index but another name is ours no longer.
            let up = link.up && !gone && link.name == vip.interface;
            if vip.up != Some(up) {
                vip.up = Some(up);
                let ifindex = vip.ifindex;
                reporter.report(if up { LinkEvent::LinkUp { ifindex } } else { LinkEvent::LinkDown { ifindex } });
            }
        }
    }

    /// Asks the kernel what is true now. Returns every fact with `all`, else what was not known.
    async fn look_anew(&mut self, all: bool) -> Result<Vec<LinkEvent>, String> {
        let mut facts = Vec::new();
        let links = vip::links().await?;
        let addresses = vip::addresses().await?;
        for vip in &mut self.vips {
            let link = links.iter().find(|link| link.name == vip.interface);
            let up = link.is_some_and(|link| link.up);
            vip.ifindex = link.map_or(vip.ifindex, |link| link.index);
            let ours = |message: &&AddressMessage| {
                message.header.index == vip.ifindex && vip::local_address(message) == Some(vip.address)
            };
            let instances: BTreeSet<u8> =
                addresses.iter().filter(ours).map(|message| message.header.prefix_len).collect();
            let (address, ifindex) = (vip.address, vip.ifindex);
            let (was, is) = (!vip.instances.is_empty(), !instances.is_empty());
            if is && (all || !was) {
                facts.push(LinkEvent::AddressAdded { address, ifindex });
            } else if !is && (all || was) {
                facts.push(LinkEvent::AddressRemoved { address });
            }
            if all || vip.up != Some(up) {
                facts.push(if up { LinkEvent::LinkUp { ifindex } } else { LinkEvent::LinkDown { ifindex } });
            }
            vip.instances = instances;
            vip.up = Some(up);
        }
        Ok(facts)
    }
}

/// Watches until the consumer is gone; sets the watch up again when it breaks.
async fn watch(mut known: Known, mut reporter: Reporter) {
    let mut first = true;
    while !reporter.events.is_closed() {
        if !first {
            reporter.lost = true; // whatever happened while nobody watched
        }
        if let Err(error) = watch_once(&mut known, &mut reporter, first).await {
            tracing::warn!("addresses and links are not watched for a moment: {error}");
            first = false;
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }
}

/// `Ok`: the consumer is gone. `Err`: the watch broke.
async fn watch_once(known: &mut Known, reporter: &mut Reporter, first: bool) -> Result<(), String> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&groups)
        .map_err(|error| format!("no netlink socket: {error}; the daemon needs AF_NETLINK"))?;
    let mut pump = JoinSet::new(); // ends with this function
    pump.spawn(connection);
    // The socket listens from here on, so what happens during the dump is seen afterwards.
    if first {
        known.look_anew(false).await?.into_iter().for_each(|fact| reporter.report(fact));
    }
    let consumer = reporter.events.clone();
    loop {
        let message = tokio::select! {
            () = consumer.closed() => return Ok(()),
            () = reporter.own_up() => {
                // Waiting here is right: what happens meanwhile queues up at the socket and is told after these.
                for fact in known.look_anew(true).await? {
                    let _gone = consumer.send(fact).await;
                }
                continue;
            }
            message = messages.next() => message.ok_or("the netlink socket closed")?.0,
        };
        match message.payload {
            NetlinkPayload::Overrun(_) => reporter.lost = true,
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                known.address_added(&message, reporter);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(message)) => {
                known.address_removed(&message, reporter);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                known.link_changed(&message, false, reporter);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                known.link_changed(&message, true, reporter);
            }
            _ => {}
        }
    }
}

/// Listens to the link for others that claim the VIP, until the consumer is gone.
async fn hear_claims(vip: Vip, events: mpsc::Sender<LinkEvent>) {
    let mut said = false;
    loop {
        tokio::select! {
            () = events.closed() => return,
            error = hear_claims_once(&vip, &events) => {
                if !said {
                    tracing::warn!("claims of others on the VIP {} are not heard for now: {error}", vip.address);
                    said = true; // once: a link that stays down is told of by its own event
                }
            }
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// Ends, with the reason, when the interface is gone or the socket fails.
async fn hear_claims_once(vip: &Vip, events: &mpsc::Sender<LinkEvent>) -> String {
    let link = match vip::link_by_name(&vip.interface).await {
        Ok(link) if !link.neighbours => return std::future::pending().await,
        Ok(link) => link,
        Err(error) => return error,
    };
    let mut own = link.mac;
    let trouble = |error| format!("{}: {error}; the daemon needs CAP_NET_RAW and the link to be up", vip.interface);
    let socket = match PacketSocket::open(link.index, vip.address) {
        Ok(socket) => socket,
        Err(error) => return trouble(error),
    };
    let mut limit = ClaimLimit { second: Instant::now(), looked_at: 0, reported: Vec::new() };
    let mut waiting: Option<LinkEvent> = None; // the latest claim, while the channel is full
    let mut buffer = [0; FRAME_LIMIT];
    loop {
        let received = tokio::select! {
            Ok(permit) = events.reserve(), if waiting.is_some() => {
                if let Some(event) = waiting.take() {
                    permit.send(event);
                }
                continue;
            }
            received = socket.receive(&mut buffer) => received,
        };
        let length = match received {
            Ok(length) => length,
            // Down but still there: this very socket hears on when it is up again.
            Err(error) => match vip::link_by_name(&vip.interface).await {
                Ok(now) if now.index == link.index && error.raw_os_error() == Some(libc::ENETDOWN) => {
                    own = now.mac;
                    continue;
                }
                _ => return trouble(error),
            },
        };
        let Some(mac) = arp::foreign_claim(&buffer[..length], vip.address, own, false) else { continue };
        if !limit.lets_pass(mac) {
            continue;
        }
        match vip::is_our_mac(mac).await {
            Ok(true) => {}
            Ok(false) => waiting = Some(LinkEvent::ForeignClaim { address: vip.address, mac }),
            Err(error) => return error,
        }
    }
}

/// Keeps a chatty or hostile link from flooding the consumer.
struct ClaimLimit {
    second: Instant,
    looked_at: u32,
    /// At most [`CLAIMS_PER_SECOND`] long.
    reported: Vec<Mac>,
}

impl ClaimLimit {
    fn lets_pass(&mut self, mac: Mac) -> bool {
        if self.second.elapsed() >= CLAIM_EVERY {
            self.second = Instant::now();
            self.looked_at = 0;
            self.reported.clear();
        }
        let pass = self.looked_at < CLAIMS_PER_SECOND && !self.reported.contains(&mac);
        if pass {
            self.looked_at += 1;
            self.reported.push(mac);
        }
        pass
    }
}
