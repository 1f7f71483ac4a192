//! Clients of this node that are served by the other: each through a tunnel of its own (`wire::tunnel`).
//!
//! ```text
//! passive = "forward"   listener -> accept -> connection: opened with the client's address, octets from the first on
//! a switchover          session at its boundary -> carry: opened with all that the session is (Carried), then octets
//! ```
//!
//! Whoever holds a client at its boundary, plain or TLS, calls [`Forwarder::carry`] with its stream and what of it was
//! read and not yet passed ([`Quiet`]), and with an [`Opening`] that names the epoch at which the other node is known
//! to serve. It returns when that session's life is over, with the client where it was given back ([`Home`]), or gives
//! the stream back untouched with the reason why the other node did not take it: then the client is still the
//! caller's, to be told or held. Any thread with a runtime will do.
//!
//! What it is NOT: it never asks this node's gate and uses none of its backends. It rests on the other node's gate
//! alone (R1); what the guard says ([`Forwarder::serves`], [`Forwarder::takes_back`]) only begins and ends it.
//!
//! **Invariant:** openings under way are few, so that the peer's own handshakes, renewals of a lease among them, find
//! room.

mod relay;

use super::command::Commands;
use super::gate::Gate;
use super::listener::{Proxy, ProxyOptions};
use super::peer::{OpenTunnel, PeerClient, PeerError};
use super::tls::ClientStream;
use super::tunnel;
use crate::base::ids::Epoch;
use crate::wire::tunnel::{Carried, Opening};
use bytes::Bytes;
use relay::through;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// Openings under way at a time: fewer than the peer has places for handshakes of one address.
const KNOCKING: usize = 5;
/// How long one waits for its turn to knock, and then for the answer. Ten thousand sessions that are carried over at
/// once take some seconds, by the processor's time for as many handshakes.
const TURN_LIMIT: Duration = Duration::from_secs(60);
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Clients forwarded at a time, where `pool.max_clients` is not less; one more is refused. Each has two descriptors, as
/// one that is served here has with its backend.
const FORWARDED_MAX: u32 = 10_000;
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
    known: watch::Sender<Known>,
    knocking: Semaphore,
    forwarded: AtomicU64,
    complained: Mutex<Option<Instant>>,
}

/// What the guard knows of the other node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Known {
    /// It serves at this epoch.
    serves: Option<Epoch>,
    /// This node takes over from it, which served at this epoch: clients come back by the tunnels of that time.
    returns: Option<Epoch>,
}

/// A client that was given back: it goes on here.
pub struct Home {
    pub(super) client: ClientStream,
    pub(super) opening: Opening,
    /// Read of it, and passed to nobody.
    pub(super) ahead: Bytes,
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Home({})", self.opening.client())
    }
}

impl From<Carried> for Opening {
    fn from(carried: Carried) -> Opening {
        Opening::Session(Box::new(carried))
    }
}

/// A client's connection at a moment at which nothing is in flight.
pub struct Quiet {
    client: ClientStream,
    /// Read from the client, and passed to nobody yet.
    ahead: Vec<u8>,
}

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
            known: watch::Sender::default(),
            knocking: Semaphore::new(KNOCKING),
            forwarded: AtomicU64::new(0),
            complained: Mutex::new(None),
        })
    }

    /// The guard's word: the other node serves at this epoch; or it does not, or this node is about to. Whatever was
    /// forwarded at another ends at once.
    pub fn serves(&self, epoch: Option<Epoch>) {
        self.know(Known { serves: epoch, returns: None });
    }

    /// The guard's word: this node takes over from the other, which served at this epoch. Nobody new is forwarded; who
    /// was is waited for, where the other node knows returns.
    pub fn takes_back(&self, epoch: Epoch) {
        self.know(Known { serves: None, returns: Some(epoch) });
    }

    fn know(&self, now: Known) {
        self.known.send_if_modified(|known| std::mem::replace(known, now) != now);
    }

    /// Clients that are forwarded now.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::SeqCst)
    }

    /// `service.passive = "forward"`.
    pub(crate) fn is_for_connections(&self) -> bool {
        self.takes_connections
    }

    /// Where new connections go, if anywhere.
    pub(crate) fn takes_connections(&self) -> Option<Epoch> {
        self.known.borrow().serves.filter(|_| self.takes_connections)
    }

    /// Returns when the other node is not known to serve at this epoch.
    async fn is_over(&self, epoch: Epoch) {
        // The sender is in here: it cannot be gone.
        let _ = self.known.subscribe().wait_for(|known| known.serves != Some(epoch)).await;
    }

    /// The same for a tunnel that stands; `returns`: its client may still come back.
    async fn is_past(&self, epoch: Epoch, returns: bool) {
        let stays = |known: &Known| known.serves == Some(epoch) || (returns && known.returns == Some(epoch));
        let _ = self.known.subscribe().wait_for(|known| !stays(known)).await;
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

    /// Carries a client over: it goes on at the other node, until either side ends it or it is given back.
    ///
    /// # Errors
    /// The other node did not take it; the client has heard nothing and nothing of it is lost.
    pub async fn carry(
        &self,
        quiet: Quiet,
        opening: impl Into<Opening>,
    ) -> Result<Option<Home>, (Box<Quiet>, PeerError)> {
        let opening = opening.into();
        let (epoch, address, user) = (opening.epoch(), opening.client(), opening.user().to_owned());
        let Some(_counted) = self.count() else { return Err((Box::new(quiet), PeerError::Busy)) };
        let tunnel = match self.open(&opening).await {
            Ok(tunnel) => tunnel,
            Err(error) => return Err((Box::new(quiet), error)),
        };
        drop(opening);
        let framed = tunnel.framed;
        let ended = async {
            let known = async { self.known.subscribe().wait_for(|known| known.serves == Some(epoch)).await.map(drop) };
            if timeout(KNOWN_WITHIN, known).await.is_ok() {
                self.is_past(epoch, framed).await;
            }
        };
        let Quiet { client, ahead } = quiet;
        Ok(through(client, &ahead, tunnel, ended).await.filter(|home| home.is_of(address, &user)))
    }

    /// Forwards one connection that was just accepted, to its end, or until this gate takes it up.
    async fn connection(&self, stream: TcpStream, client: SocketAddr, epoch: Epoch, proxy: &Arc<Proxy>) {
        let counted = self.count();
        let opening = Opening::Connection { client, epoch, tls: None };
        let opened = match &counted {
            Some(_) => tokio::select! {
                biased;
                () = self.is_over(epoch) => Err(PeerError::Refused("it does not serve any more".to_owned())),
                opened = self.open(&opening) => opened,
            },
            None => Err(PeerError::Busy),
        };
        match opened {
            Ok(tunnel) => {
                let past = self.is_past(epoch, tunnel.framed);
                let home = through(ClientStream::Plain(stream), &[], tunnel, past).await;
                drop(counted);
                if let Some(home) = home.filter(|home| home.is_of(client, "")) {
                    tunnel::take_up(proxy, home).await;
                }
            }
            // It came while this node takes over: its own gate opens.
            Err(_) if self.is_for_us(epoch, &proxy.gate).await => {
                drop(counted);
                let opening = Opening::Connection { client, epoch: proxy.gate.epoch(), tls: None };
                let home = Home { client: ClientStream::Plain(stream), opening, ahead: Bytes::new() };
                tunnel::take_up(proxy, home).await;
            }
            Err(error) => {
                if self.may_complain() {
                    tracing::warn!(%client, %error, "a client could not be forwarded; more are not logged for a while");
                }
                // As the kernel does it where nobody listens.
                ClientStream::Plain(stream).reset();
            }
        }
    }

    /// Waits for this node's gate, while it takes over from the other's of that epoch; whether it opened.
    async fn is_for_us(&self, epoch: Epoch, gate: &Gate) -> bool {
        if self.known.borrow().returns != Some(epoch) {
            return false;
        }
        let mut view = gate.watch();
        tokio::select! {
            _ = view.wait_for(|_| gate.passes()) => true,
            () = self.is_past(epoch, true) => gate.passes(),
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

/// Returns when clients may have to be forwarded.
pub(crate) async fn begins(options: &ProxyOptions) {
    match &options.forward {
        Some(forwarder) => {
            let mut known = forwarder.known.subscribe();
            let _ = known.wait_for(|known| known.serves.is_some() && forwarder.takes_connections).await;
        }
        None => std::future::pending().await,
    }
}

/// This node takes over, and clients that were forwarded come back.
pub(crate) fn takes_over(options: &ProxyOptions) -> bool {
    options.forward.as_ref().is_some_and(|forwarder| forwarder.known.borrow().returns.is_some())
}

/// Returns when it does not.
pub(crate) async fn taken_over(options: &ProxyOptions) {
    if let Some(forwarder) = &options.forward {
        let _ = forwarder.known.subscribe().wait_for(|known| known.returns.is_none()).await;
    }
}

/// Accepts clients and forwards them while the other node serves at this epoch and this gate is shut.
pub(crate) async fn accept(
    listener: &TcpListener,
    forwarder: &Arc<Forwarder>,
    epoch: Epoch,
    proxy: &Arc<Proxy>,
    clients: &mut JoinSet<()>,
) {
    let gate: &Gate = &proxy.gate;
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
                let (forwarder, proxy) = (Arc::clone(forwarder), Arc::clone(proxy));
                clients.spawn(async move { forwarder.connection(stream, client, epoch, &proxy).await });
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
    pub fn peer_serves(&self, serves: Option<Epoch>, returns: Option<Epoch>) {
        if let Some(forwarder) = &self.proxy.options.forward {
            forwarder.know(Known { serves, returns });
        }
    }

    /// Clients of this node that the other serves.
    pub fn forwarded(&self) -> u64 {
        self.proxy.options.forward.as_ref().map_or(0, |forwarder| forwarder.forwarded())
    }
}
