//! Clients of this node that are served by the other: each through a tunnel of its own (`wire::tunnel`).
//!
//! ```text
//! passive = "forward"   listener -> accept -> connection: opened with the client's address, octets from the first on
//! a switchover          session at its boundary -> carry: opened with all that the session is (Carried), then octets
//! ```
//!
//! Whoever holds a session at its boundary, plain or TLS, calls [`Forwarder::carry`] with its stream and what of it was
//! read and not yet passed ([`Quiet`]), and with a [`Carried`] that names the epoch at which the other node is known to
//! serve. It returns when that session's life is over, or gives the stream back untouched with the reason why the other
//! node did not take it: then the client is still the caller's, to be told or held. Any thread with a runtime will do.
//!
//! What it is NOT: it never asks this node's gate and uses none of its backends. It rests on the other node's gate
//! alone (R1); what the guard says ([`Forwarder::serves`]) only begins and ends it.
//!
//! **Invariants:** memory is bounded: two buffers for each client, and a side is not read while the other does not
//! take. Openings under way are few, so that the peer's own handshakes, renewals of a lease among them, find room.

use super::command::Commands;
use super::gate::Gate;
use super::listener::ProxyOptions;
use super::peer::{OpenTunnel, PeerClient, PeerError};
use super::tls::ClientStream;
use crate::base::ids::Epoch;
use crate::wire::tunnel::{Carried, Opening};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// Openings under way at a time: fewer than the peer has places for handshakes of one address.
const KNOCKING: usize = 5;
/// How long one waits for its turn to knock, and then for the answer.
const TURN_LIMIT: Duration = Duration::from_secs(10);
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// How long a client may take to close after the other node has; then it is closed on.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);
/// Clients forwarded at a time, where `pool.max_clients` is not less; one more is refused. Each has two descriptors, as
/// one that is served here has with its backend.
const FORWARDED_MAX: u32 = 4096;
/// How long after a session was carried over the guard may take to learn that the other node serves.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Time between two lines in the log about clients that were not let in.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The way to the other node's gate.
pub struct Forwarder {
    peer: Arc<PeerClient>,
    /// `service.passive = "forward"`: new connections too.
    takes_connections: bool,
    most: u64,
    /// The epoch at which the other node is known to serve.
    serves: watch::Sender<Option<Epoch>>,
    knocking: Semaphore,
    forwarded: AtomicU64,
    complained: Mutex<Option<Instant>>,
}

/// A client's connection at a moment at which nothing is in flight.
pub struct Quiet {
    client: ClientStream,
    /// Read from the client, and passed to nobody yet.
    ahead: Vec<u8>,
}

#[allow(dead_code, reason = "for the old side of a switchover")]
impl Quiet {
    /// Of a session at its boundary.
    pub(crate) fn new(client: ClientStream, ahead: Vec<u8>) -> Quiet {
        Quiet { client, ahead }
    }

    /// For who must go on with it.
    pub(crate) fn into_parts(self) -> (ClientStream, Vec<u8>) {
        (self.client, self.ahead)
    }
}

impl From<TcpStream> for Quiet {
    fn from(stream: TcpStream) -> Quiet {
        Quiet { client: ClientStream::Plain(stream), ahead: Vec::new() }
    }
}

/// Counts a client while it is forwarded.
struct Counted<'a>(&'a Forwarder);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.forwarded.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Forwarder {
    /// To this peer, which is not known to serve yet. `takes_connections`: new ones too (`service.passive`).
    pub fn new(peer: Arc<PeerClient>, takes_connections: bool, max_clients: u32) -> Arc<Forwarder> {
        Arc::new(Forwarder {
            peer,
            takes_connections,
            most: max_clients.min(FORWARDED_MAX).into(),
            serves: watch::Sender::new(None),
            knocking: Semaphore::new(KNOCKING),
            forwarded: AtomicU64::new(0),
            complained: Mutex::new(None),
        })
    }

    /// The guard's word: the other node serves at this epoch; or it does not, or this node is about to. Whatever was
    /// forwarded at another ends at once.
    pub fn serves(&self, epoch: Option<Epoch>) {
        self.serves.send_if_modified(|known| std::mem::replace(known, epoch) != epoch);
    }

    /// Clients that are forwarded now.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::SeqCst)
    }

    /// Where new connections go, if anywhere.
    pub(crate) fn takes_connections(&self) -> Option<Epoch> {
        (*self.serves.borrow()).filter(|_| self.takes_connections)
    }

    /// Returns when the other node is not known to serve at this epoch.
    async fn is_over(&self, epoch: Epoch) {
        // The sender is in here: it cannot be gone.
        let _ = self.serves.subscribe().wait_for(|known| *known != Some(epoch)).await;
    }

    fn count(&self) -> Option<Counted<'_>> {
        let before = self.forwarded.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(self);
        (before < self.most).then_some(counted)
    }

    /// Opens a tunnel.
    ///
    /// # Errors
    /// The other node is not to be reached, or does not take it.
    pub(crate) async fn open(&self, opening: &Opening) -> Result<OpenTunnel, PeerError> {
        let turn = timeout(TURN_LIMIT, self.knocking.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return Err(PeerError::Busy) };
        self.peer.open_tunnel(opening, OPEN_LIMIT).await
    }

    /// Carries a session over: it goes on at the other node, until either side ends it.
    ///
    /// # Errors
    /// The other node did not take it; the client has heard nothing and nothing of it is lost.
    pub async fn carry(&self, quiet: Quiet, carried: Carried) -> Result<(), (Box<Quiet>, PeerError)> {
        let epoch = carried.epoch;
        let Some(_counted) = self.count() else { return Err((Box::new(quiet), PeerError::Busy)) };
        let tunnel = match self.open(&Opening::Session(Box::new(carried))).await {
            Ok(tunnel) => tunnel,
            Err(error) => return Err((Box::new(quiet), error)),
        };
        let ended = async {
            let known = async { self.serves.subscribe().wait_for(|known| *known == Some(epoch)).await.map(drop) };
            if timeout(KNOWN_WITHIN, known).await.is_ok() {
                self.is_over(epoch).await;
            }
        };
        let Quiet { client, ahead } = quiet;
        through(client, &ahead, tunnel, ended).await;
        Ok(())
    }

    /// Forwards one connection that was just accepted, to its end.
    async fn connection(&self, stream: TcpStream, client: SocketAddr, epoch: Epoch) {
        let counted = self.count();
        let opening = Opening::Connection { client, epoch };
        let opened = match &counted {
            Some(_) => tokio::select! {
                biased;
                () = self.is_over(epoch) => Err(PeerError::Refused("it does not serve any more".to_owned())),
                opened = self.open(&opening) => opened,
            },
            None => Err(PeerError::Busy),
        };
        match opened {
            Ok(tunnel) => through(ClientStream::Plain(stream), &[], tunnel, self.is_over(epoch)).await,
            Err(error) => {
                if self.may_complain() {
                    tracing::warn!(%client, %error, "a client could not be forwarded; more are not logged for a while");
                }
                // As the kernel does it where nobody listens.
                ClientStream::Plain(stream).reset();
            }
        }
    }

    fn may_complain(&self) -> bool {
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        let may = complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY);
        if may {
            *complained = Some(Instant::now());
        }
        may
    }
}

/// Copies both ways until both sides have closed, one breaks, or `ended`; what breaks is shown to the other side.
async fn through(mut client: ClientStream, ahead: &[u8], mut tunnel: OpenTunnel, ended: impl Future<Output = ()>) {
    let copied = tokio::select! {
        biased;
        () = ended => false,
        copied = async {
            tunnel.write_all(ahead).await?;
            splice(&mut client, &mut tunnel).await
        } => copied.is_ok(),
    };
    if !copied {
        tunnel.reset();
        client.reset();
    }
}

/// Copies both ways, in a buffer each: a client's end is passed on, and that of the other node ends both. A side that
/// takes nothing is read for nothing.
pub(crate) async fn splice(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    tunnel: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut from_client, mut to_client) = split(&mut *client);
    let (mut from_tunnel, mut to_tunnel) = split(tunnel);
    let up = async {
        copy(&mut from_client, &mut to_tunnel).await?;
        to_tunnel.shutdown().await?;
        // Its answer is still to come.
        std::future::pending().await
    };
    let down = async {
        copy(&mut from_tunnel, &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::select! {
        done = up => done,
        done = down => done,
    }?;
    // Closed with octets unread it would be a reset, which may overtake what was written.
    let mut rest = [0; 1024];
    let closing = async { while matches!(client.read(&mut rest).await, Ok(1..)) {} };
    let _closed_on = timeout(FAREWELL_TIMEOUT, closing).await;
    Ok(())
}

/// Returns when clients may have to be forwarded.
pub(crate) async fn begins(options: &ProxyOptions) {
    match &options.forward {
        Some(forwarder) => {
            let mut serves = forwarder.serves.subscribe();
            let _ = serves.wait_for(|known| known.is_some() && forwarder.takes_connections).await;
        }
        None => std::future::pending().await,
    }
}

/// Accepts clients and forwards them while the other node serves at this epoch and this gate is shut.
pub(crate) async fn accept(
    listener: &TcpListener,
    forwarder: &Arc<Forwarder>,
    epoch: Epoch,
    gate: &Gate,
    clients: &mut JoinSet<()>,
) {
    let mut view = gate.watch();
    loop {
        let accepted = tokio::select! {
            biased;
            () = forwarder.is_over(epoch) => return,
            _ = view.changed() => {
                if gate.passes() || gate.is_stopping() {
                    return;
                }
                continue;
            }
            accepted = listener.accept() => accepted,
            Some(_) = clients.join_next() => continue,
        };
        match accepted {
            Ok((stream, client)) => {
                let forwarder = Arc::clone(forwarder);
                clients.spawn(async move { forwarder.connection(stream, client, epoch).await });
            }
            Err(error) => {
                tracing::warn!(%error, "a client could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl Commands {
    /// The guard's word to the forwarder, where there is one.
    pub fn peer_serves(&self, epoch: Option<Epoch>) {
        if let Some(forwarder) = &self.proxy.options.forward {
            forwarder.serves(epoch);
        }
    }

    /// Clients of this node that the other serves.
    pub fn forwarded(&self) -> u64 {
        self.proxy.options.forward.as_ref().map_or(0, |forwarder| forwarder.forwarded())
    }
}
