//! Asks a VIP's witnesses whether they are there (R3): an ARP request or neighbour solicitation *from* the VIP,
//! answered *to* the VIP, while nobody else holds it.
//!
//! What this is NOT: a lease, a schedule, a hand. Each call has sockets of its own, so that nothing that is done to the
//! VIP meanwhile holds it up.
//!
//! **Invariants:** never asked from a VIP that is not bound here (the question itself would teach others where it is);
//! an answer counts only when it came to the VIP, from another machine, and nobody else claimed the VIP until
//! [`OTHERS_SPEAK`] after the question; silence is never an answer.

use crate::io::arp::{FRAME_LIMIT, PacketSocket};
use crate::io::vip::{self, Link, VipHand};
use crate::wire::arp::{self, Mac};
use futures_util::future::select_all;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};
use rtnetlink::RouteMessageBuilder;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// How long another holder of the VIP has to speak up, however quick the witness was.
pub const OTHERS_SPEAK: Duration = Duration::from_millis(50);
/// A lost frame is asked again.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// More witnesses than this are not asked; any one of them suffices.
const WITNESSES: usize = 8;

/// Asks the `configured` witnesses of the VIP's family, or the gateways of its interface when none is configured; the
/// first that answers within `limit`. The error says who claims the VIP instead, or who stayed silent.
pub async fn ask(hand: &VipHand, configured: &[IpAddr], limit: Duration) -> Result<IpAddr, String> {
    match tokio::time::timeout(limit, ask_and_hear(hand, configured)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no witness of the VIP {} answered within {limit:?}", hand.vip().address)),
    }
}

async fn ask_and_hear(hand: &VipHand, configured: &[IpAddr]) -> Result<IpAddr, String> {
    let vip = hand.vip().address;
    let link = hand.link().await?;
    if !link.up {
        return Err(format!("the link of {} is down", link.name));
    }
    if !hand.is_bound().await? {
        return Err(format!("the VIP {vip} is not bound, and nothing may be asked from it"));
    }
    let witnesses = witnesses(vip, configured, &link).await?;
    // Looked up now: a claim that has come must not wait for the kernel while the time for it runs out. Linux answers
    // on every interface for every address, so with two of them on one link we hear ourselves.
    let own: BTreeSet<Mac> = vip::links().await?.iter().map(|link| link.mac).collect();
    // All ears are open before the first question.
    let claims = hand.socket(&link)?;
    let mut ears = Vec::new();
    for witness in &witnesses {
        let socket = PacketSocket::open(link.index, *witness)
            .map_err(|error| format!("the witness {witness} cannot be asked on {}: {error}", link.name))?;
        ears.push((*witness, socket));
    }
    let mut questions: Vec<Vec<u8>> =
        witnesses.iter().filter_map(|witness| question(link.mac, vip, *witness)).collect();
    // And whoever else holds it: he answers a probe, which teaches nobody anything.
    questions.push(match vip {
        IpAddr::V4(vip) => arp::probe(link.mac, vip),
        IpAddr::V6(vip) => arp::solicitation_probe(link.mac, vip),
    });
    let asking = async {
        loop {
            for frame in &questions {
                if let Err(error) = claims.send(frame).await {
                    return format!("{} takes no frames: {error}", link.name);
                }
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    };
    let hearing =
        ears.iter().map(|(witness, socket)| Box::pin(hear(socket, |frame| answer_of(frame, *witness, vip, &own))));
    let answered = async {
        let ((first, ..), ()) = tokio::join!(select_all(hearing), tokio::time::sleep(OTHERS_SPEAK));
        first
    };
    // Another's probe is a question, which our kernel answers: it claims nothing that is bound here.
    let claim = |frame: &[u8]| arp::foreign_claim(frame, vip, link.mac, false).filter(|mac| !own.contains(mac));
    tokio::select! {
        biased;
        claimed = hear(&claims, claim) => Err(format!("{} answers for the VIP {vip} too", arp::mac_text(claimed?))),
        answer = answered => answer,
        error = asking => Err(error),
    }
}

/// Which witnesses (the gateways where none is configured) answer a question that is asked from this machine's `own`
/// address. It says nothing about the VIP and needs none bound: `doctor` asks it of a passive node.
pub async fn reach(
    hand: &VipHand,
    own: IpAddr,
    configured: &[IpAddr],
    limit: Duration,
) -> Result<Vec<(IpAddr, bool)>, String> {
    let link = hand.link().await?;
    let witnesses = witnesses(hand.vip().address, configured, &link).await?;
    let ask = async |witness: IpAddr| -> Result<(IpAddr, bool), String> {
        let failed = |error: std::io::Error| format!("{witness} cannot be asked on {}: {error}", link.name);
        let socket = PacketSocket::open(link.index, witness).map_err(failed)?;
        let Some(frame) = question(link.mac, own, witness) else { return Ok((witness, false)) };
        let asking = async {
            loop {
                if let Err(error) = socket.send(&frame).await {
                    return failed(error);
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        let heard = async {
            tokio::select! {
                answer = hear(&socket, |frame| arp::answer(frame, witness, own)) => answer.map(|_| true),
                why = asking => Err(why),
            }
        };
        Ok((witness, tokio::time::timeout(limit, heard).await.unwrap_or(Ok(false))?))
    };
    let answers = futures_util::future::join_all(witnesses.into_iter().map(ask)).await;
    answers.into_iter().collect()
}

fn question(mac: Mac, vip: IpAddr, witness: IpAddr) -> Option<Vec<u8>> {
    match (vip, witness) {
        (IpAddr::V4(vip), IpAddr::V4(witness)) => Some(arp::request(mac, vip, witness)),
        (IpAddr::V6(vip), IpAddr::V6(witness)) => Some(arp::solicitation(mac, vip, witness)),
        _ => None,
    }
}

/// Waits for ever for the first frame that says it.
async fn hear<T>(socket: &PacketSocket, says: impl Fn(&[u8]) -> Option<T>) -> Result<T, String> {
    let mut buffer = [0; FRAME_LIMIT];
    loop {
        let length = socket.receive(&mut buffer).await.map_err(|error| format!("nothing is heard: {error}"))?;
        if let Some(said) = says(&buffer[..length]) {
            return Ok(said);
        }
    }
}

/// The witness, when the frame is its answer and not one of this very machine, which witnesses nothing.
fn answer_of(frame: &[u8], witness: IpAddr, vip: IpAddr, own: &BTreeSet<Mac>) -> Option<IpAddr> {
    arp::answer(frame, witness, vip).filter(|mac| !own.contains(mac)).map(|_| witness)
}

async fn witnesses(vip: IpAddr, configured: &[IpAddr], link: &Link) -> Result<Vec<IpAddr>, String> {
    let mut found =
        if configured.is_empty() { gateways(vip.is_ipv4(), link.index).await? } else { configured.to_vec() };
    found.retain(|witness| witness.is_ipv4() == vip.is_ipv4() && *witness != vip);
    found.truncate(WITNESSES);
    match (found.is_empty(), configured.is_empty()) {
        (false, _) => Ok(found),
        (true, true) => Err(format!("{} has no gateway to ask for the VIP {vip}; set vip.witness", link.name)),
        (true, false) => Err(format!("vip.witness names nobody of the family of the VIP {vip}; add one")),
    }
}

/// The gateways of the default routes over this interface.
async fn gateways(v4: bool, interface: u32) -> Result<Vec<IpAddr>, String> {
    let wanted = if v4 {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    };
    let routes = vip::routes(wanted).await?;
    let found: BTreeSet<IpAddr> = routes.iter().flat_map(|route| gateways_of(route, interface)).collect();
    Ok(found.into_iter().collect())
}

fn gateways_of(route: &RouteMessage, interface: u32) -> Vec<IpAddr> {
    if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let over = route.attributes.contains(&RouteAttribute::Oif(interface));
    let mut found: Vec<IpAddr> = if over { route.attributes.iter().filter_map(gateway).collect() } else { Vec::new() };
    for part in &route.attributes {
        if let RouteAttribute::MultiPath(hops) = part {
            let ours = hops.iter().filter(|hop| hop.interface_index == interface);
            found.extend(ours.flat_map(|hop| hop.attributes.iter().filter_map(gateway)));
        }
    }
    found
}

fn gateway(part: &RouteAttribute) -> Option<IpAddr> {
    match part {
        RouteAttribute::Gateway(RouteAddress::Inet(v4)) | RouteAttribute::Via(RouteVia::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(v6)) | RouteAttribute::Via(RouteVia::Inet6(v6)) => {
            Some((*v6).into())
        }
        _ => None,
    }
}
