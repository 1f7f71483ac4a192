//! Clients that come through the other node: the receiving end of tunnels over the peer channel (`wire::tunnel`).
//!
//! A tunnel is a client's connection like any other from the moment its opening was accepted: the rules see the
//! client's own address, its TLS is its own, and the gate is asked before each forward. What it is NOT: it is never
//! forwarded on, because nothing here leads to `serve::forward` (S13).
//!
//! **Invariants:** a tunnel is let in only while this gate stands at the epoch that its opening names, and takes one of
//! the places of `pool.max_clients`. What is decided on the peer channel's runtime waits for nothing; clients are
//! served on the proxy's.

use super::backend::Proof;
use super::command::Commands;
use super::data::Threads;
use super::gate::{Pass, Passage};
use super::listener::{Proxy, Seat};
use super::session;
use super::tls::{ClientStream, Moving, Parked};
use crate::base::ids::NodeName;
use crate::wire::tunnel::{Carried, Opening};
use bytes::{Buf, BytesMut};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;

/// Octets that are read ahead to be looked at.
const AHEAD: usize = 512;

/// One tunnel, behind the answer that it is one.
pub(crate) struct Tunnel {
    stream: TlsStream<Moving>,
    /// Read to be looked at, and still to be read.
    ahead: BytesMut,
    _place: OwnedSemaphorePermit,
}

impl Tunnel {
    pub(super) fn new(stream: TlsStream<Moving>, place: OwnedSemaphorePermit) -> Tunnel {
        Tunnel { stream, ahead: BytesMut::new(), _place: place }
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
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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

/// What a client through the other node gets at the gate.
pub(crate) struct Ticket {
    pub(crate) pass: Pass,
    pub(crate) seat: Seat,
    pub(crate) passage: Passage,
    wants: Wants,
}

enum Wants {
    /// To be served as if it had just been accepted here.
    Connection(SocketAddr),
    Session(Box<Carried>, Proof),
}

/// A client and what it got.
pub(crate) struct Entered {
    pub(crate) client: Parked,
    pub(crate) ticket: Ticket,
}

/// On its way to the proxy's runtime.
pub(crate) type Arrival = Entered;

impl Tunnels {
    /// Whether this gate takes it; the text is for the other node.
    pub(super) fn admit(&self, from: &NodeName, opening: Opening) -> Result<Ticket, String> {
        let (proxy, gate) = (&self.proxy, &self.proxy.gate);
        if *from != self.peer {
            return Err(format!("only {} may open tunnels", self.peer));
        }
        let epoch = match &opening {
            Opening::Connection { epoch, .. } => *epoch,
            Opening::Session(carried) => carried.epoch,
        };
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
        let wants = match opening {
            Opening::Connection { client, .. } => Wants::Connection(client),
            Opening::Session(_) if seat.crowded => return Err(full()),
            Opening::Session(carried) => {
                let proof = Proof::of(&carried.proven);
                let proof = proof.ok_or("what proves the client is not understood; upgrade the older node")?;
                Wants::Session(carried, proof)
            }
        };
        Ok(Ticket { pass, seat, passage, wants })
    }

    /// Hands the client to the proxy's runtime.
    pub(super) fn enter(&self, tunnel: Tunnel, ticket: Ticket) {
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

/// Takes clients up as they come, for as long as it is polled.
pub(crate) async fn receive(mut arriving: mpsc::Receiver<Arrival>, proxy: Arc<Proxy>, threads: Arc<Threads>) {
    let mut sessions = JoinSet::new();
    loop {
        let arrival = tokio::select! {
            arrival = arriving.recv() => arrival,
            Some(_) = sessions.join_next() => continue,
        };
        let Some(Entered { client, ticket: Ticket { pass, seat, passage, wants } }) = arrival else { return };
        match wants {
            Wants::Connection(peer) => {
                let Ok(client) = client.unpark() else { continue };
                let (proxy, threads) = (Arc::clone(&proxy), Arc::clone(&threads));
                sessions.spawn(session::serve(client, peer, proxy, threads, pass, (seat, passage)));
            }
            Wants::Session(carried, proof) => {
                session::admit(client, *carried, proof, &threads, pass, (seat, passage));
            }
        }
    }
}
