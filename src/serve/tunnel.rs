//! Clients that come through the other node: the receiving end of tunnels over the peer channel (`wire::tunnel`).
//!
//! A tunnel is a client's connection like any other from the moment its opening was accepted: the rules see the
//! client's own address, its TLS is its own, and the gate is asked before each forward. Where the other node becomes
//! the active one, a client goes back to it by this very tunnel ([`Tunnel::give_back`]). What it is NOT: it is never
//! forwarded on, because nothing here leads to `serve::forward` (S13).
//!
//! **Invariants:** a tunnel is let in only while this gate stands at the epoch that its opening names, and takes one of
//! the places of `pool.max_clients`. What is decided on the peer channel's runtime waits for nothing; clients are
//! served on the proxy's.

use super::backend::Proof;
use super::command::Commands;
use super::data::Threads;
use super::forward::Home;
use super::gate::{Pass, Passage};
use super::listener::{Proxy, Seat};
use super::session;
use super::tls::{ClientStream, Moving, Parked};
use crate::base::ids::NodeName;
use crate::wire::tunnel::{self as wire, Carried, FRAME_HEAD, FRAME_MOST, Frame, Opening, Secured};
use bytes::{Buf, BytesMut};
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

/// Octets that are read ahead to be looked at.
const AHEAD: usize = 512;
/// Octets read at once of a client that is given back.
const READ: usize = 8 * 1024;
/// What of a client may be under way when it is given back: more than two kernels keep for a connection by default
/// (tcp_wmem and tcp_rmem). One that has sent more ends.
pub(super) const EARLY_MOST: usize = 16 * 1024 * 1024;
/// How long the giving back of one client may take, among all that are given back at once.
pub(super) const RETURN_LIMIT: Duration = Duration::from_secs(30);

/// One tunnel, behind the answer that it is one.
pub(crate) struct Tunnel {
    stream: TlsStream<Moving>,
    /// Read to be looked at, and still to be read.
    ahead: BytesMut,
    /// Its octets go out in frames; `None`: the other end knows no returns.
    framing: Option<Framing>,
    /// The client's TLS, which ends at the other node.
    pub(super) secure: Option<Secure>,
    _place: OwnedSemaphorePermit,
}

/// The frame that is being written.
#[derive(Default)]
struct Framing {
    head: [u8; FRAME_HEAD],
    /// Octets of the head, and behind it, that are still to be written.
    head_left: usize,
    left: usize,
}

/// A client's TLS that ends at the other node.
pub(super) struct Secure {
    pub(super) end_point: Option<Arc<[u8]>>,
    pub(super) certificate: Option<CertificateDer<'static>>,
    pub(super) has_ca: bool,
}

impl From<Secured> for Secure {
    fn from(secured: Secured) -> Secure {
        let Secured { end_point, certificate, has_ca } = secured;
        Secure {
            end_point: (!end_point.is_empty()).then(|| end_point.into()),
            certificate: (!certificate.is_empty()).then(|| certificate.into()),
            has_ca,
        }
    }
}

impl Tunnel {
    /// `returns`: the other end knows them.
    pub(super) fn new(stream: TlsStream<Moving>, place: OwnedSemaphorePermit, returns: bool) -> Tunnel {
        let framing = returns.then(Framing::default);
        Tunnel { stream, ahead: BytesMut::new(), framing, secure: None, _place: place }
    }

    /// Its client may go back by it.
    pub(super) fn may_go_back(&self) -> bool {
        self.framing.is_some()
    }

    pub(super) fn moving(&self) -> &Moving {
        self.stream.get_ref().0
    }

    pub(super) fn moving_mut(&mut self) -> &mut Moving {
        self.stream.get_mut().0
    }

    /// Waits for octets and shows them without taking them; zero at the end. Cancel-safe.
    pub(super) async fn peek(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.ahead.is_empty() {
            let mut read = [0; AHEAD];
            let n = self.stream.read(&mut read).await?;
            self.ahead.extend_from_slice(&read[..n]);
        }
        let n = self.ahead.len().min(into.len());
        into[..n].copy_from_slice(&self.ahead[..n]);
        Ok(n)
    }

    /// Gives the client back to the node that has its socket: what it is, and `early`, which was read of it already.
    /// Nothing may be under way to it.
    ///
    /// # Errors
    /// Why it did not; the client may still be told so.
    pub(super) async fn give_back(&mut self, opening: &Opening, early: Vec<u8>) -> Result<(), String> {
        // Before anything is said: what cannot be sent is found out here.
        let json = wire::encode(opening).map_err(|error| error.to_string())?;
        let back = async {
            if self.framing.as_ref().is_none_or(|framing| framing.head_left + framing.left > 0) {
                return Err("it is in the middle of a message".to_owned());
            }
            let broken = |error: io::Error| error.to_string();
            self.say(Frame::Stop, &[]).await.map_err(broken)?;
            self.stream.flush().await.map_err(broken)?;
            let mut early = Zeroizing::new(early);
            let mut read = vec![0; READ];
            loop {
                let n = AsyncReadExt::read(self, &mut read).await.map_err(broken)?;
                if n == 0 {
                    break;
                }
                if early.len() + n > EARLY_MOST {
                    return Err(format!("the client has sent more than {EARLY_MOST} octets meanwhile"));
                }
                early.extend_from_slice(&read[..n]);
            }
            self.say(Frame::Opening, &json).await.map_err(broken)?;
            for part in early.chunks(FRAME_MOST) {
                self.say(Frame::Ahead, part).await.map_err(broken)?;
            }
            self.say(Frame::End, &[]).await.map_err(broken)?;
            self.stream.flush().await.map_err(broken)?;
            // Closed with octets unread it would be a reset, which may overtake what was said. The other side has it
            // all, and may be gone already.
            let _gone = self.stream.shutdown().await;
            while matches!(AsyncReadExt::read(&mut self.stream, &mut read).await, Ok(1..)) {}
            Ok(())
        };
        timeout(RETURN_LIMIT, back).await.unwrap_or_else(|_| Err("the other node did not take it in time".to_owned()))
    }

    async fn say(&mut self, frame: Frame, octets: &[u8]) -> io::Result<()> {
        self.stream.write_all(&frame.head(octets.len())).await?;
        self.stream.write_all(octets).await
    }

    /// So many octets that may go in the frame at hand; a new one begins where there is none.
    fn frame(&mut self, octets: usize) -> Option<(&mut Framing, &mut TlsStream<Moving>)> {
        let framing = self.framing.as_mut()?;
        if framing.head_left + framing.left == 0 && octets > 0 {
            framing.left = octets.min(FRAME_MOST);
            framing.head = Frame::Octets.head(framing.left);
            framing.head_left = FRAME_HEAD;
        }
        Some((framing, &mut self.stream))
    }
}

impl Framing {
    /// So many octets went out, those of the head first; how many of them were the client's.
    fn wrote(&mut self, n: usize) -> usize {
        let of_head = n.min(self.head_left);
        self.head_left -= of_head;
        self.left -= n - of_head;
        n - of_head
    }

    /// The head as far as it is still to be written.
    fn head(&self) -> &[u8] {
        &self.head[FRAME_HEAD - self.head_left..]
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        } else {
            let n = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead[..n]);
            self.ahead.advance(n);
            if self.ahead.is_empty() {
                self.ahead = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Some((framing, stream)) = self.frame(buf.len()) else {
            return Pin::new(&mut self.stream).poll_write(cx, buf);
        };
        loop {
            let body = &buf[..buf.len().min(framing.left)];
            if framing.head_left == 0 {
                let written = ready!(Pin::new(stream).poll_write(cx, body))?;
                return Poll::Ready(Ok(framing.wrote(written)));
            }
            // One record for both.
            let both = [io::IoSlice::new(framing.head()), io::IoSlice::new(body)];
            let written = ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &both))?;
            if written == 0 {
                return Poll::Ready(Ok(0));
            }
            let own = framing.wrote(written);
            if own > 0 || body.is_empty() {
                return Poll::Ready(Ok(own));
            }
        }
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.framing.is_none() {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        }
        let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
        self.poll_write(cx, first)
    }
    fn is_write_vectored(&self) -> bool {
        self.framing.is_none() && self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The gate's end of the peer channel: who may open tunnels, and to what.
#[derive(Clone)]
pub struct Tunnels {
    proxy: Arc<Proxy>,
    peer: NodeName,
}

impl Commands {
    /// Tunnels to this gate, from that node alone.
    pub fn tunnels(&self, peer: NodeName) -> Tunnels {
        Tunnels { proxy: Arc::clone(&self.proxy), peer }
    }
}

/// What a client through the other node, or one that comes back from there, gets at the gate.
pub(crate) struct Ticket {
    pass: Pass,
    seat: Seat,
    passage: Passage,
    wants: Wants,
    secure: Option<Secure>,
}

enum Wants {
    /// To be served as if it had just been accepted here.
    Connection(SocketAddr),
    /// As if it had just proven itself here.
    Greeting(Box<Carried>, Proof),
    Session(Box<Carried>, Proof),
}

/// A client and what it got.
pub(crate) struct Entered {
    client: Parked,
    ticket: Ticket,
}

/// On its way to the proxy's runtime.
pub(crate) type Arrival = Entered;

/// Whether this gate takes it; the text is for the other node, or for its client.
pub(super) fn admit(proxy: &Arc<Proxy>, opening: Opening) -> Result<Ticket, String> {
    let gate = &proxy.gate;
    let epoch = opening.epoch();
    // Counted in before it is asked whether anybody is still let in.
    let passage = gate.passage();
    let Some(pass) = gate.admit().filter(|pass| pass.stands() && !gate.is_stopping()) else {
        return Err(format!("the gate of {} is not open", proxy.options.node));
    };
    if gate.epoch() != epoch {
        return Err(format!("the gate of {} is open for epoch {}, not {epoch}", proxy.options.node, gate.epoch()));
    }
    let full = || format!("{} has too many clients already (pool.max_clients)", proxy.options.node);
    let seat = Seat::take(proxy).ok_or_else(full)?;
    let proof = |carried: &Carried| {
        let proof = Proof::of(&carried.proven);
        proof.ok_or_else(|| "what proves the client is not understood; upgrade the older node".to_owned())
    };
    let (wants, secure) = match opening {
        Opening::Connection { client, tls, .. } => (Wants::Connection(client), tls.map(Secure::from)),
        Opening::Session(_) | Opening::Proven(_) if seat.crowded => return Err(full()),
        Opening::Session(carried) => {
            let proof = proof(&carried)?;
            (Wants::Session(carried, proof), None)
        }
        Opening::Proven(carried) => {
            let secure = carried.tls.then(|| Secure::from(Secured::default()));
            let proof = proof(&carried)?;
            (Wants::Greeting(carried, proof), secure)
        }
    };
    Ok(Ticket { pass, seat, passage, wants, secure })
}

impl Tunnels {
    /// Whether this gate takes it; the text is for the other node.
    pub(super) fn admit(&self, from: &NodeName, opening: Opening) -> Result<Ticket, String> {
        if *from != self.peer {
            return Err(format!("only {} may open tunnels", self.peer));
        }
        admit(&self.proxy, opening)
    }

    /// Hands the client to the proxy's runtime.
    pub(super) fn enter(&self, mut tunnel: Tunnel, mut ticket: Ticket) {
        tunnel.secure = ticket.secure.take();
        match ClientStream::Tunnel(Box::new(tunnel)).park() {
            Ok(client) => {
                if self.proxy.arrivals.try_send(Entered { client, ticket }).is_err() {
                    tracing::warn!("a client through the other node is closed: too many come at once");
                }
            }
            Err(error) => tracing::debug!(%error, "a tunnel ended while it was opened"),
        }
    }
}

/// A client whose socket is here was given back by the other node: this gate takes it up.
///
/// # Errors
/// Why not, and the client.
pub(super) async fn come_home(proxy: &Arc<Proxy>, home: Home) -> Result<(), (ClientStream, String)> {
    let Home { client, opening, ahead } = home;
    let ticket = match admit(proxy, opening) {
        Ok(ticket) => ticket,
        Err(why) => return Err((client, why)),
    };
    match client.with_ahead(ahead).park() {
        // There is room: who is taken up leaves at once.
        Ok(client) => drop(proxy.arrivals.send(Entered { client, ticket }).await),
        Err(error) => tracing::debug!(%error, "a client left while it came back"),
    }
    Ok(())
}

/// The same for a client that nobody else answers for: it is told why it cannot go on.
pub(super) async fn take_up(proxy: &Arc<Proxy>, home: Home) {
    let user = home.opening.user().to_owned();
    if let Err((client, why)) = come_home(proxy, home).await {
        tracing::warn!(user, why, "a client that the other node gave back could not go on here");
        session::dismiss(client, session::failed(proxy, &why)).await;
    }
}

/// Takes clients up as they come, for as long as it is polled.
pub(crate) async fn receive(mut arriving: mpsc::Receiver<Arrival>, proxy: Arc<Proxy>, threads: Arc<Threads>) {
    let mut sessions = JoinSet::new();
    loop {
        let arrival = tokio::select! {
            arrival = arriving.recv() => arrival,
            Some(_) = sessions.join_next() => continue,
        };
        let Some(Entered { client, ticket: Ticket { pass, seat, passage, wants, .. } }) = arrival else { return };
        match wants {
            Wants::Connection(peer) => {
                let Ok(client) = client.unpark_at_the_door() else { continue };
                let (proxy, threads) = (Arc::clone(&proxy), Arc::clone(&threads));
                sessions.spawn(session::serve(client, peer, proxy, threads, pass, (seat, passage)));
            }
            Wants::Greeting(carried, proof) => {
                session::admit_proven(client, &carried, proof, &threads, pass, (seat, passage));
            }
            Wants::Session(carried, proof) => {
                session::admit(client, *carried, proof, &threads, pass, (seat, passage));
            }
        }
    }
}
