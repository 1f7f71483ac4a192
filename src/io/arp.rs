//! The link's own ear and voice: one AF_PACKET socket on one interface, for frames about one address.
//!
//! A filter in the kernel lets only such frames through (ARP, or neighbour advertisements), so that a busy link does
//! not wake the daemon. The interface is not made promiscuous. Needs CAP_NET_RAW.
//!
//! What this is NOT: `pnet_datalink` (promiscuous, every protocol, a thread that blocks). It builds and judges no
//! frame: `wire::arp` does, and it repeats what the filter tests.

use socket2::{Domain, SockAddr, SockFilter, Socket, Type};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest frame looked at; ARP has 42 octets (60 on the wire), a neighbour advertisement rarely over 86. A longer one
/// is cut, and then no longer parses.
pub const FRAME_LIMIT: usize = 512;

/// An AF_PACKET socket bound to one interface, hearing only frames that say something about one address.
#[derive(Debug)]
pub struct PacketSocket {
    socket: AsyncFd<Socket>,
}

impl PacketSocket {
    /// Opens and binds; must be called inside a tokio runtime. Errors: EPERM without CAP_NET_RAW, ENODEV when the
    /// interface is gone, ENXIO on sending while it is down.
    pub fn open(interface_index: u32, address: IpAddr) -> io::Result<PacketSocket> {
        // Protocol 0 hears nothing: nothing unfiltered is queued before the filter stands and `bind` names the
        // protocol.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        socket.attach_filter(&filter(address))?;
        let protocol = if address.is_ipv4() { libc::ETH_P_ARP } else { libc::ETH_P_IPV6 };
        socket.bind(&link_address(interface_index, protocol)?)?;
        socket.set_nonblocking(true)?;
        Ok(PacketSocket { socket: register(socket)? })
    }

    /// Sends one whole Ethernet frame.
    pub async fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            let mut ready = self.socket.ready(Interest::WRITABLE | Interest::ERROR).await?;
            if let Ok(result) = ready.try_io(|fd| fd.get_ref().write(frame)) {
                return result.map(|_| ());
            }
        }
    }

    /// The next frame, cut to the buffer. ENETDOWN once when the interface goes down or away; after it has come up
    /// again the same socket hears on. Cancel-safe.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.socket.ready(Interest::READABLE | Interest::ERROR).await?;
            if let Ok(result) = ready.try_io(|fd| fd.get_ref().read(buffer)) {
                return result;
            }
        }
    }
}

/// Classic BPF on the frame as it stands on the wire (`linux/filter.h`). IPv4: ARP whose sender is the address, or that
/// asks for it from 0.0.0.0. IPv6: a neighbour advertisement whose target ends in the address's last four octets.
fn filter(address: IpAddr) -> Vec<SockFilter> {
    /// Load the byte, or the word, at the offset.
    const BYTE: u16 = 0x30;
    const WORD: u16 = 0x20;
    /// Jump when equal; return that many octets.
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// Offsets in an Ethernet frame.
    const ARP_SENDER: u32 = 28;
    const ARP_TARGET: u32 = 38;
    const IPV6_NEXT_HEADER: u32 = 20;
    const ICMPV6_TYPE: u32 = 54;
    const ADVERTISED_END: u32 = 74;
    let take = SockFilter::new(RETURN, 0, 0, 0xffff);
    let drop = SockFilter::new(RETURN, 0, 0, 0);
    match address {
        IpAddr::V4(v4) => vec![
            SockFilter::new(WORD, 0, 0, ARP_SENDER),
            SockFilter::new(EQUAL, 3, 0, v4.to_bits()),
            SockFilter::new(EQUAL, 0, 3, 0),
            SockFilter::new(WORD, 0, 0, ARP_TARGET),
            SockFilter::new(EQUAL, 0, 1, v4.to_bits()),
            take,
            drop,
        ],
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            vec![
                SockFilter::new(BYTE, 0, 0, IPV6_NEXT_HEADER),
                SockFilter::new(EQUAL, 0, 5, 58),
                SockFilter::new(BYTE, 0, 0, ICMPV6_TYPE),
                SockFilter::new(EQUAL, 0, 3, 136),
                SockFilter::new(WORD, 0, 0, ADVERTISED_END),
                SockFilter::new(EQUAL, 0, 1, u32::from_be_bytes([a, b, c, d])),
                take,
                drop,
            ]
        }
    }
}

/// Hands the socket to the runtime's poller.
#[allow(unsafe_code)]
fn register(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // ERROR: an interface that goes down or away shows as that alone, and a reader would sleep for ever.
    let interest = Interest::READABLE | Interest::WRITABLE | Interest::ERROR;
    // SAFETY: the socket owns its descriptor, and nothing replaces or closes it while the `AsyncFd`, which is private
    // to `PacketSocket` and lends it out by shared reference only, owns the socket.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest)? })
}

/// The `sockaddr_ll` that binds to one protocol on one interface (packet(7)); neither socket2 nor rustix builds one.
#[allow(unsafe_code)]
fn link_address(interface_index: u32, protocol: i32) -> io::Result<SockAddr> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let index = libc::c_int::try_from(interface_index).map_err(invalid)?;
    let protocol = u16::try_from(protocol).map_err(invalid)?.to_be();
    let family = libc::sa_family_t::try_from(libc::AF_PACKET).map_err(invalid)?;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(invalid)?;
    // SAFETY: `try_init` hands out zeroed storage of the size and alignment of `sockaddr_storage`, which every
    // `sockaddr_*` fits; all-zero is a valid `sockaddr_ll`; family and length are set to match it.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, size| {
            let link = &mut *storage.cast::<libc::sockaddr_ll>();
            link.sll_family = family;
            link.sll_protocol = protocol;
            link.sll_ifindex = index;
            *size = length;
            Ok(())
        })
    }?;
    Ok(address)
}
