//! Who holds an address on the link: ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861) frames, built and read.
//!
//! Whole Ethernet frames, so that one AF_PACKET socket sends and hears both families. IPv6 frames carry their checksum:
//! the probe has the unspecified source address, which an ICMPv6 socket would not send.
//!
//! What this is NOT: a socket, a schedule, a decision. It also does not read neighbour discovery options through
//! `pnet_packet`, whose option length overflows on hostile input.
//!
//! **Invariant:** arbitrary bytes never panic; what is not exactly a frame of the kind asked for is `None`.

use pnet_packet::Packet;
use pnet_packet::arp::{ArpHardwareTypes, ArpOperation, ArpOperations, ArpPacket, MutableArpPacket};
use pnet_packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::icmpv6::ndp::{MutableNeighborAdvertPacket, MutableNeighborSolicitPacket, NeighborAdvertFlags};
use pnet_packet::icmpv6::ndp::{NdpOptionTypes, NeighborAdvertPacket};
use pnet_packet::icmpv6::{Icmpv6Packet, Icmpv6Type, Icmpv6Types, checksum};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// Length of an ARP body for IPv4 over Ethernet (RFC 826).
const ARP: usize = 28;
/// Length of an IPv6 header without extensions (RFC 8200, section 3).
const IPV6: usize = 40;
/// Length of a neighbour advertisement or solicitation before its options (RFC 4861, sections 4.3 and 4.4).
const NEIGHBOUR: usize = 24;
/// Length of a link-layer address option for Ethernet (RFC 4861, section 4.6.1).
const LINK_OPTION: usize = 8;
/// Every neighbour discovery message has it, and one with less came through a router (RFC 4861, section 7.1).
const NDP_HOP_LIMIT: u8 = 255;
const BROADCAST: Mac = [0xff; 6];
/// Where an unsolicited neighbour advertisement goes (RFC 4861, section 7.2.6).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The kernel counts an address's lifetime in whole seconds and removes it up to a good quarter of a second late
/// (measured on Linux 6.18), so this much is taken off before rounding down.
pub const LIFETIME_SLACK: Duration = Duration::from_millis(500);
/// No lifetime is ever set longer than this, whatever lease it is told of: `u32::MAX` would mean "for ever".
pub const LIFETIME_LONGEST: u32 = 3600;

/// The kernel lifetime, in seconds, for a VIP whose lease has `left` to run: half a second less, rounded down. `None`
/// when that is no whole second (less than 1.5 s left): then no lifetime is set and the one before it runs out.
pub fn kernel_lifetime(left: Duration) -> Option<u32> {
    match left.checked_sub(LIFETIME_SLACK)?.as_secs() {
        0 => None,
        seconds => Some(u32::try_from(seconds).unwrap_or(LIFETIME_LONGEST).min(LIFETIME_LONGEST)),
    }
}

/// What an ARP frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArpSeen {
    pub operation: Operation,
    pub sender_mac: Mac,
    /// 0.0.0.0 in a probe (RFC 5227, section 1.1).
    pub sender_ip: Ipv4Addr,
    pub target_ip: Ipv4Addr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Request,
    Reply,
}

/// What a neighbour advertisement says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdvertisementSeen {
    /// The address that is claimed.
    pub target: Ipv6Addr,
    /// The target link-layer address option, else the sender of the frame.
    pub mac: Mac,
    /// Whom it was sent to, when it answers a solicitation.
    pub answers: Option<Ipv6Addr>,
}

/// A gratuitous ARP *request* (RFC 5227, section 2.3): sender and target are the announced address. Some devices heed
/// only this form, some only [`gratuitous_reply`].
pub fn gratuitous_request(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(Operation::Request, mac, address, [0; 6], address)
}

/// A gratuitous ARP *reply*. Its target hardware address is the sender's: Linux takes a reply for gratuitous, and lets
/// it override an entry it has just learnt, only then (`arp_is_garp`).
pub fn gratuitous_reply(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(Operation::Reply, mac, address, mac, address)
}

/// An ARP probe (RFC 5227, section 2.1.1): it asks without teaching anybody anything.
pub fn probe(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(Operation::Request, mac, Ipv4Addr::UNSPECIFIED, [0; 6], address)
}

/// An ordinary ARP request (RFC 826): `sender`, which must be bound here, asks for `target`. Whoever hears it learns
/// where `sender` is.
pub fn request(mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    arp(Operation::Request, mac, sender, [0; 6], target)
}

fn arp(operation: Operation, mac: Mac, sender: Ipv4Addr, target_mac: Mac, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(mac, BROADCAST, EtherTypes::Arp, ARP);
    if let Some(mut body) = MutableArpPacket::new(&mut frame[ETHERNET..]) {
        body.set_hardware_type(ArpHardwareTypes::Ethernet);
        body.set_protocol_type(EtherTypes::Ipv4);
        body.set_hw_addr_len(6);
        body.set_proto_addr_len(4);
        body.set_operation(match operation {
            Operation::Request => ArpOperations::Request,
            Operation::Reply => ArpOperations::Reply,
        });
        body.set_sender_hw_addr(mac.into());
        body.set_sender_proto_addr(sender);
        body.set_target_hw_addr(target_mac.into());
        body.set_target_proto_addr(target);
    }
    frame
}

/// Reads an Ethernet frame that holds ARP for IPv4 over Ethernet; anything else is `None`.
pub fn parse_arp(frame: &[u8]) -> Option<ArpSeen> {
    let outer = EthernetPacket::new(frame)?;
    if outer.get_ethertype() != EtherTypes::Arp {
        return None;
    }
    let body = ArpPacket::new(outer.payload())?;
    let plain = body.get_hardware_type() == ArpHardwareTypes::Ethernet
        && body.get_protocol_type() == EtherTypes::Ipv4
        && body.get_hw_addr_len() == 6
        && body.get_proto_addr_len() == 4;
    let operation = match body.get_operation() {
        _ if !plain => return None,
        ArpOperations::Request => Operation::Request,
        ArpOperations::Reply => Operation::Reply,
        ArpOperation(_) => return None,
    };
    Some(ArpSeen {
        operation,
        sender_mac: body.get_sender_hw_addr().into(),
        sender_ip: body.get_sender_proto_addr(),
        target_ip: body.get_target_proto_addr(),
    })
}

/// An unsolicited neighbour advertisement (RFC 4861, sections 4.4 and 7.2.6): Override set, Solicited clear, with the
/// target link-layer address option, to all nodes.
pub fn unsolicited_advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    neighbour(mac, address, ALL_NODES, Some(NdpOptionTypes::TargetLLAddr.0), |body| {
        if let Some(mut body) = MutableNeighborAdvertPacket::new(body) {
            body.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
            body.set_flags(NeighborAdvertFlags::Override);
            body.set_target_addr(address);
        }
    })
}

/// A neighbour solicitation as duplicate address detection sends it (RFC 4862, section 5.4.2): from the unspecified
/// address, with no option, to the target's solicited-node group.
pub fn solicitation_probe(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    solicit(mac, Ipv6Addr::UNSPECIFIED, address, None)
}

/// A neighbour solicitation (RFC 4861, section 7.2.2): `source`, which must be bound here, asks for `target` and says
/// where to send the answer.
pub fn solicitation(mac: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    solicit(mac, source, target, Some(NdpOptionTypes::SourceLLAddr.0))
}

fn solicit(mac: Mac, source: Ipv6Addr, target: Ipv6Addr, option: Option<u8>) -> Vec<u8> {
    let [.., x, y, z] = target.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    neighbour(mac, source, group, option, |body| {
        if let Some(mut body) = MutableNeighborSolicitPacket::new(body) {
            body.set_icmpv6_type(Icmpv6Types::NeighborSolicit);
            body.set_target_addr(target);
        }
    })
}

/// With `option`, our own MAC in a link-layer address option of that type.
fn neighbour(mac: Mac, source: Ipv6Addr, group: Ipv6Addr, option: Option<u8>, fill: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let size = NEIGHBOUR + if option.is_some() { LINK_OPTION } else { 0 };
    let [.., a, b, c, d] = group.octets();
    // RFC 2464, section 7: the group's last four octets after 33:33.
    let mut frame = ethernet(mac, [0x33, 0x33, a, b, c, d], EtherTypes::Ipv6, IPV6 + size);
    let body = &mut frame[ETHERNET + IPV6..];
    fill(body);
    if let Some(kind) = option {
        body[NEIGHBOUR] = kind;
        body[NEIGHBOUR + 1] = 1; // in units of eight octets
        body[NEIGHBOUR + 2..].copy_from_slice(&mac);
    }
    let sum = Icmpv6Packet::new(body).map_or(0, |packet| checksum(&packet, &source, &group));
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    if let Some(mut header) = MutableIpv6Packet::new(&mut frame[ETHERNET..]) {
        header.set_version(6);
        header.set_payload_length(if option.is_some() { 32 } else { 24 });
        header.set_next_header(IpNextHeaderProtocols::Icmpv6);
        header.set_hop_limit(NDP_HOP_LIMIT);
        header.set_source(source);
        header.set_destination(group);
    }
    frame
}

fn ethernet(source: Mac, destination: Mac, kind: EtherType, payload: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + payload];
    if let Some(mut header) = MutableEthernetPacket::new(&mut frame) {
        header.set_source(source.into());
        header.set_destination(destination.into());
        header.set_ethertype(kind);
    }
    frame
}

/// Reads an Ethernet frame that holds a valid neighbour advertisement (RFC 4861, section 7.1.2); else `None`.
pub fn parse_advertisement(frame: &[u8]) -> Option<AdvertisementSeen> {
    let (outer_source, source, destination, body) = neighbour_body(frame, Icmpv6Types::NeighborAdvert)?;
    let packet = NeighborAdvertPacket::new(body)?;
    if packet.get_checksum() != checksum(&Icmpv6Packet::new(body)?, &source, &destination) {
        return None;
    }
    let mut mac = outer_source;
    let mut options = &body[NEIGHBOUR..];
    while let [kind, units, ..] = *options {
        let length = usize::from(units) * 8;
        if length == 0 || length > options.len() {
            return None; // RFC 4861, section 4.6: discard the packet
        }
        if kind == NdpOptionTypes::TargetLLAddr.0 && units == 1 {
            mac.copy_from_slice(&options[2..LINK_OPTION]);
        }
        options = &options[length..];
    }
    let answers = (packet.get_flags() & NeighborAdvertFlags::Solicited != 0).then_some(destination);
    Some(AdvertisementSeen { target: packet.get_target_addr(), mac, answers })
}

/// The frame's sender, the IPv6 source and destination, and the ICMPv6 message, when it is of `kind`, unfragmented, and
/// did not pass a router.
fn neighbour_body(frame: &[u8], kind: Icmpv6Type) -> Option<(Mac, Ipv6Addr, Ipv6Addr, &[u8])> {
    let outer = EthernetPacket::new(frame)?;
    if outer.get_ethertype() != EtherTypes::Ipv6 {
        return None;
    }
    let header = Ipv6Packet::new(&frame[ETHERNET..])?;
    let ours = header.get_version() == 6
        && header.get_next_header() == IpNextHeaderProtocols::Icmpv6
        && header.get_hop_limit() == NDP_HOP_LIMIT;
    let end = ETHERNET + IPV6 + usize::from(header.get_payload_length());
    let body = frame.get(ETHERNET + IPV6..end)?;
    let icmp = Icmpv6Packet::new(body)?;
    let right = ours && body.len() >= NEIGHBOUR && icmp.get_icmpv6_type() == kind && icmp.get_icmpv6_code().0 == 0;
    right.then(|| (outer.get_source().into(), header.get_source(), header.get_destination(), body))
}

/// The MAC of somebody else that says it holds `address`: an ARP frame with it as sender address, or a neighbour
/// advertisement for it, from a MAC that is not `own`. With `probing`, somebody else's probe counts too (RFC 5227,
/// section 2.1.1: both want it, neither may have it).
pub fn foreign_claim(frame: &[u8], address: IpAddr, own: Mac, probing: bool) -> Option<Mac> {
    let mac = match address {
        IpAddr::V4(address) => {
            let seen = parse_arp(frame)?;
            let probes = probing
                && seen.operation == Operation::Request
                && seen.sender_ip.is_unspecified()
                && seen.target_ip == address;
            (seen.sender_ip == address || probes).then_some(seen.sender_mac)
        }
        IpAddr::V6(address) => parse_advertisement(frame).and_then(|seen| (seen.target == address).then_some(seen.mac)),
    }?;
    (mac != own).then_some(mac)
}

/// The MAC of the machine that answers `asker`'s question for `target`: an ARP reply, or a solicited advertisement, to
/// `asker`. Requests, gratuitous frames and answers to others prove nothing about this question.
pub fn answer(frame: &[u8], target: IpAddr, asker: IpAddr) -> Option<Mac> {
    match (target, asker) {
        (IpAddr::V4(target), IpAddr::V4(asker)) => parse_arp(frame).and_then(|seen| {
            let ours = seen.operation == Operation::Reply && seen.sender_ip == target && seen.target_ip == asker;
            ours.then_some(seen.sender_mac)
        }),
        (IpAddr::V6(target), IpAddr::V6(asker)) => parse_advertisement(frame)
            .and_then(|seen| (seen.target == target && seen.answers == Some(asker)).then_some(seen.mac)),
        _ => None,
    }
}

/// A MAC as people write it.
pub fn mac_text(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OURS: Mac = [2, 0, 0, 0, 0, 1];
    const THEIRS: Mac = [2, 0, 0, 0, 0, 2];
    const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
    const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0xaabb, 0xccdd);

    #[test]
    fn the_kernel_lifetime_ends_before_the_lease() {
        let millis = |ms| kernel_lifetime(Duration::from_millis(ms));
        for (left, want) in [
            (0, None),
            (499, None),
            (999, None),
            (1000, None),
            (1499, None),
            (1500, Some(1)),
            (2499, Some(1)),
            (2500, Some(2)),
            (3000, Some(2)),
            (4999, Some(4)),
            (5000, Some(4)),
        ] {
            assert_eq!(millis(left), want, "{left} ms left");
        }
        assert_eq!(kernel_lifetime(Duration::MAX), Some(LIFETIME_LONGEST), "never for ever");
    }

    #[test]
    fn gratuitous_request_is_the_frame_of_rfc_5227() {
        let frame = gratuitous_request(OURS, VIP);
        #[rustfmt::skip]
        assert_eq!(frame, [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff,  2, 0, 0, 0, 0, 1,  8, 6,
            0, 1,  8, 0,  6, 4,  0, 1,
            2, 0, 0, 0, 0, 1,  192, 0, 2, 100,
            0, 0, 0, 0, 0, 0,  192, 0, 2, 100,
        ]);
    }

    #[test]
    fn gratuitous_reply_names_the_sender_as_target_or_linux_would_not_let_it_override() {
        let frame = gratuitous_reply(OURS, VIP);
        assert_eq!(frame[20..22], [0, 2]);
        assert_eq!(frame[22..28], frame[32..38]);
        assert_eq!(frame[28..32], frame[38..42]);
    }

    #[test]
    fn a_probe_teaches_nothing() {
        let seen = parse_arp(&probe(OURS, VIP)).expect("ours");
        assert_eq!(
            seen,
            ArpSeen {
                operation: Operation::Request,
                sender_mac: OURS,
                sender_ip: Ipv4Addr::UNSPECIFIED,
                target_ip: VIP
            }
        );
    }

    #[test]
    fn advertisement_is_the_message_of_rfc_4861() {
        let frame = unsolicited_advertisement(OURS, VIP6);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[0..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!((frame[20], frame[21]), (58, 255), "ICMPv6 with hop limit 255");
        let body = &frame[54..];
        assert_eq!(body[0..2], [136, 0]);
        assert_eq!(body[4..8], [0x20, 0, 0, 0], "Override alone");
        assert_eq!(body[8..24], VIP6.octets());
        assert_eq!(body[24..32], [2, 1, 2, 0, 0, 0, 0, 1]);
        assert_eq!(parse_advertisement(&frame), Some(AdvertisementSeen { target: VIP6, mac: OURS, answers: None }));
    }

    #[test]
    fn solicitation_goes_to_the_solicited_node_group_from_nowhere() {
        let frame = solicitation_probe(OURS, VIP6);
        assert_eq!(frame.len(), 14 + 40 + 24);
        assert_eq!(frame[0..6], [0x33, 0x33, 0xff, 0xbb, 0xcc, 0xdd]);
        assert_eq!(frame[22..38], [0; 16]);
        assert_eq!(frame[54..56], [135, 0]);
        assert_eq!(parse_advertisement(&frame), None, "a question is no claim");
    }

    #[test]
    fn a_claim_is_anothers_only() {
        let vip = IpAddr::V4(VIP);
        assert_eq!(foreign_claim(&gratuitous_request(OURS, VIP), vip, OURS, false), None);
        assert_eq!(foreign_claim(&gratuitous_request(THEIRS, VIP), vip, OURS, false), Some(THEIRS));
        assert_eq!(foreign_claim(&gratuitous_reply(THEIRS, VIP), vip, OURS, false), Some(THEIRS));
        assert_eq!(foreign_claim(&gratuitous_reply(THEIRS, Ipv4Addr::new(192, 0, 2, 101)), vip, OURS, true), None);
        assert_eq!(foreign_claim(&probe(THEIRS, VIP), vip, OURS, false), None, "asking is not claiming");
        assert_eq!(foreign_claim(&probe(THEIRS, VIP), vip, OURS, true), Some(THEIRS), "unless we ask too");
        let vip6 = IpAddr::V6(VIP6);
        assert_eq!(foreign_claim(&unsolicited_advertisement(THEIRS, VIP6), vip6, OURS, false), Some(THEIRS));
        assert_eq!(foreign_claim(&unsolicited_advertisement(OURS, VIP6), vip6, OURS, false), None);
    }

    #[test]
    fn only_a_reply_to_the_asker_is_an_answer() {
        let (witness, other) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 9));
        let seen = |frame: &[u8]| answer(frame, witness.into(), VIP.into());
        assert_eq!(seen(&arp(Operation::Reply, THEIRS, witness, OURS, VIP)), Some(THEIRS));
        assert_eq!(seen(&arp(Operation::Reply, THEIRS, other, OURS, VIP)), None, "somebody else's");
        assert_eq!(seen(&arp(Operation::Reply, THEIRS, witness, OURS, other)), None, "to somebody else");
        assert_eq!(seen(&request(THEIRS, witness, VIP)), None, "a question");
        assert_eq!(seen(&gratuitous_reply(THEIRS, witness)), None, "nobody asked");
        assert_eq!(parse_arp(&request(OURS, VIP, witness)).map(|seen| seen.sender_ip), Some(VIP));

        let witness6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        let solicited = |asker: Ipv6Addr, flags: u8| {
            neighbour(THEIRS, witness6, asker, Some(NdpOptionTypes::TargetLLAddr.0), |body| {
                if let Some(mut body) = MutableNeighborAdvertPacket::new(body) {
                    body.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
                    body.set_flags(flags);
                    body.set_target_addr(witness6);
                }
            })
        };
        let seen = |frame: &[u8]| answer(frame, witness6.into(), VIP6.into());
        assert_eq!(seen(&solicited(VIP6, NeighborAdvertFlags::Solicited)), Some(THEIRS));
        assert_eq!(seen(&solicited(VIP6, NeighborAdvertFlags::Override)), None, "unsolicited");
        assert_eq!(seen(&solicited(witness6, NeighborAdvertFlags::Solicited)), None, "to somebody else");
        assert_eq!(seen(&unsolicited_advertisement(THEIRS, witness6)), None);
    }

    #[test]
    fn a_solicitation_says_where_to_answer() {
        let frame = solicitation(OURS, VIP6, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(frame[22..38], VIP6.octets(), "from the VIP");
        assert_eq!(frame[0..6], [0x33, 0x33, 0xff, 0, 0, 1]);
        assert_eq!(frame[54..56], [135, 0]);
        assert_eq!(frame[78..86], [1, 1, 2, 0, 0, 0, 0, 1], "the source link-layer address option");
    }

    #[test]
    fn a_routed_or_damaged_advertisement_is_no_claim() {
        let good = unsolicited_advertisement(THEIRS, VIP6);
        for (at, what) in [(21, "hop limit"), (60, "checksum covers the body"), (57, "checksum"), (79, "option length")]
        {
            let mut bad = good.clone();
            bad[at] ^= 0x41;
            assert_eq!(parse_advertisement(&bad), None, "{what}");
        }
        assert_eq!(parse_advertisement(&good[..good.len() - 1]), None, "cut short");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_arp(&bytes);
            let _ = parse_advertisement(&bytes);
        }

        #[test]
        fn nearly_right_frames_never_panic(
            v6 in any::<bool>(),
            edits in proptest::collection::vec((0usize..100, any::<u8>()), 0..6),
            cut in 0usize..100,
        ) {
            let mut frame = if v6 { unsolicited_advertisement(THEIRS, VIP6) } else { gratuitous_reply(THEIRS, VIP) };
            for (at, value) in edits {
                if let Some(byte) = frame.get_mut(at) {
                    *byte = value;
                }
            }
            frame.truncate(cut.max(1));
            let _ = foreign_claim(&frame, IpAddr::V4(VIP), OURS, true);
            let _ = foreign_claim(&frame, IpAddr::V6(VIP6), OURS, true);
        }

        #[test]
        fn what_is_built_reads_back(mac in any::<Mac>(), v4 in any::<[u8; 4]>(), v6 in any::<[u8; 16]>()) {
            let seen = parse_arp(&gratuitous_reply(mac, v4.into())).expect("built here");
            prop_assert_eq!((seen.sender_mac, seen.sender_ip, seen.target_ip), (mac, v4.into(), v4.into()));
            let seen = parse_advertisement(&unsolicited_advertisement(mac, v6.into())).expect("built here");
            prop_assert_eq!(seen, AdvertisementSeen { target: v6.into(), mac, answers: None });
        }
    }
}
