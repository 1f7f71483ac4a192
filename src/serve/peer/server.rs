//! The answering side: accepts the keys of configured nodes, knows by the key which node asks, and runs the handler for
//! every question at once.
//!
//! What this is NOT: it knows no question's meaning, and does not believe what a node says of itself: the name in its
//! greeting must be its key's.
//!
//! **Invariants:** before its key is proven a connection costs one of [`HANDSHAKES`] places (of which one address gets
//! [`HANDSHAKES_PER_ADDRESS`]) for at most [`HANDSHAKE_LIMIT`]. After it a node has at most [`CONNECTIONS_PER_NODE`];
//! one more closes its oldest, which nobody uses any longer; a tunnel (`peer::tunnel`) takes none of them. A handler
//! that runs is finished even if its asker is gone.

use super::identity::PeerIdentity;
use super::tunnel::{self, Entrance};
use super::{FRAMES_WAITING, FrameReader, PeerCounters, ReadError, Refusal, Refusals, tls_error, tune, write_frames};
use crate::base::ids::NodeName;
use crate::serve::tls::Moving;
use crate::serve::tunnel::Tunnels;
use crate::wire::peer::{self, Call, Hello, Reply, VERSION, WireError};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, ReadHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// Handshakes under way at once, in all and from one address; one more is closed at once and counted.
const HANDSHAKES: usize = 32;
const HANDSHAKES_PER_ADDRESS: usize = 8;
/// Longest a connection takes to prove its key and greet.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long a connection that has greeted keeps that place while it says nothing: its first call tells what it is.
const FIRST_CALL: Duration = Duration::from_millis(500);
/// Established connections of one node; one more closes the oldest.
const CONNECTIONS_PER_NODE: usize = 4;
/// Questions in work at once, all nodes together; one more is refused as busy.
const QUESTIONS: usize = 256;
/// Wait before binding (the address may not be there yet) or accepting (no descriptors) is tried again.
const BIND_AGAIN: Duration = Duration::from_millis(500);
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Where a handler puts words of progress before its answer.
pub struct Progress<A> {
    id: u64,
    frames: mpsc::Sender<Bytes>,
    _word: PhantomData<fn(A)>,
}

impl<A: Serialize> Progress<A> {
    /// Sends a word of progress; waits while the connection is busy. Without effect when the asker is gone.
    pub async fn tell(&self, word: &A) {
        let frame = peer::to_body(word).and_then(|body| peer::encode(&Reply::Progress { id: self.id, body }));
        if let Ok(frame) = frame {
            let _asker_gone = self.frames.send(frame).await;
        }
    }
}

/// Serves questions at `address` for ever, from the moment the address can be bound. Dropping the future ends it.
pub async fn listen<Q, A, F, Fut>(
    address: SocketAddr,
    identity: Arc<PeerIdentity>,
    counters: Arc<PeerCounters>,
    handler: F,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    listen_stream(address, identity, counters, move |node, question, _: Progress<A>| handler(node, question)).await;
}

/// The same, with clients of the other node's let in at this gate.
pub async fn listen_with<Q, A, F, Fut>(
    address: SocketAddr,
    identity: Arc<PeerIdentity>,
    counters: Arc<PeerCounters>,
    tunnels: Tunnels,
    handler: F,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let listener = bind(address).await;
    let handler = move |node, question, _: Progress<A>| handler(node, question);
    serve_house(listener, identity, counters, Some(tunnels), handler).await;
}

/// The same, with a handler that may tell its progress.
pub async fn listen_stream<Q, A, F, Fut>(
    address: SocketAddr,
    identity: Arc<PeerIdentity>,
    counters: Arc<PeerCounters>,
    handler: F,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q, Progress<A>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let listener = bind(address).await;
    serve_on(listener, identity, counters, handler).await;
}

async fn bind(address: SocketAddr) -> TcpListener {
    let mut said = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !said => {
                tracing::warn!("the peer channel cannot listen on {address} yet: {error}; trying until it can");
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(BIND_AGAIN).await;
    }
}

/// The same on a socket that listens already.
pub async fn serve_on<Q, A, F, Fut>(
    listener: TcpListener,
    identity: Arc<PeerIdentity>,
    counters: Arc<PeerCounters>,
    handler: F,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q, Progress<A>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    serve_house(listener, identity, counters, None, handler).await;
}

async fn serve_house<Q, A, F, Fut>(
    listener: TcpListener,
    identity: Arc<PeerIdentity>,
    counters: Arc<PeerCounters>,
    tunnels: Option<Tunnels>,
    handler: F,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q, Progress<A>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let house = Arc::new(House {
        entrance: Entrance::new(tunnels),
        identity,
        refusals: Refusals::new(counters),
        places: Mutex::new(Places::default()),
        questions: Arc::new(Semaphore::new(QUESTIONS)),
    });
    let handler = Arc::new(handler);
    let mut guests = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = guests.join_next() => continue,
        };
        let Ok((stream, from)) = accepted else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let Some(handshake) = Handshake::enter(&house, from.ip()) else {
            house.refusals.refuse(from, Refusal::TooMany, &"closed at once");
            continue;
        };
        guests.spawn(receive(house.clone(), stream, from, handshake, handler.clone()));
    }
}

/// What all connections share.
pub(super) struct House {
    pub(super) entrance: Entrance,
    identity: Arc<PeerIdentity>,
    refusals: Refusals,
    places: Mutex<Places>,
    questions: Arc<Semaphore>,
}

#[derive(Default)]
struct Places {
    handshakes: HashMap<IpAddr, usize>,
    /// Oldest first.
    connections: HashMap<NodeName, VecDeque<CancellationToken>>,
}

impl House {
    fn places(&self) -> std::sync::MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a node's new connection; its token is cancelled when a newer one needs the place.
    fn seat(&self, node: &NodeName) -> CancellationToken {
        let token = CancellationToken::new();
        let mut places = self.places();
        let seats = places.connections.entry(node.clone()).or_default();
        seats.retain(|seat| !seat.is_cancelled()); // an ended connection cancels its own
        if seats.len() >= CONNECTIONS_PER_NODE
            && let Some(oldest) = seats.pop_front()
        {
            oldest.cancel();
        }
        seats.push_back(token.clone());
        token
    }
}

/// A place among the handshakes, given back when dropped.
struct Handshake {
    house: Arc<House>,
    from: IpAddr,
}

impl Handshake {
    fn enter(house: &Arc<House>, from: IpAddr) -> Option<Handshake> {
        let mut places = house.places();
        let all: usize = places.handshakes.values().sum();
        let here = places.handshakes.get(&from).copied().unwrap_or(0);
        if all >= HANDSHAKES || here >= HANDSHAKES_PER_ADDRESS {
            return None;
        }
        places.handshakes.insert(from, here + 1);
        Some(Handshake { house: house.clone(), from })
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut places = self.house.places();
        if let Some(here) = places.handshakes.get_mut(&self.from) {
            *here -= 1;
            if *here == 0 {
                places.handshakes.remove(&self.from);
            }
        }
    }
}

type Reader = FrameReader<ReadHalf<TlsStream<Moving>>>;

/// One connection, from its acceptance to its end.
async fn receive<Q, A, F, Fut>(
    house: Arc<House>,
    stream: TcpStream,
    from: SocketAddr,
    handshake: Handshake,
    handler: Arc<F>,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Fn(NodeName, Q, Progress<A>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let greeted = timeout(HANDSHAKE_LIMIT, greet(&house, stream)).await;
    let (node, mut reader) = match greeted {
        Ok(Ok(greeted)) => greeted,
        Ok(Err((refusal, detail))) => return house.refusals.refuse(from, refusal, &detail),
        Err(_) => return house.refusals.refuse(from, Refusal::Timeout, &format_args!("{HANDSHAKE_LIMIT:?}")),
    };
    house.refusals.counters.accepted.fetch_add(1, Ordering::Relaxed);
    let first = timeout(FIRST_CALL, reader.next()).await.ok();
    drop(handshake);
    if let Some(Ok(frame)) = &first
        && let Ok(Call::Tunnel { octets, returns }) = peer::decode(frame)
    {
        if let Err((refusal, detail)) = tunnel::receive(&house, &node, reader, (octets, returns)).await {
            house.refusals.refuse(from, refusal, &detail);
        }
        return;
    }
    let FrameReader { stream, received } = reader;
    let (reader, writer) = tokio::io::split(stream);
    let reader = FrameReader { stream: reader, received };
    let seat = house.seat(&node);
    let (frames, queue) = mpsc::channel(FRAMES_WAITING);
    let mut writing = JoinSet::new();
    writing.spawn(write_frames(writer, queue));
    let mut handlers = JoinSet::new();
    let conversation = Conversation { house: &house, node, from, frames, handler };
    tokio::select! {
        () = seat.cancelled() => {}
        _ = writing.join_next() => {} // the other side takes nothing any more
        ended = conversation.run(first, reader, &mut handlers) => {
            if let Some((refusal, detail)) = ended {
                house.refusals.refuse(from, refusal, &detail);
            }
        }
    }
    seat.cancel();
    drop(writing); // and with it the socket
    while handlers.join_next().await.is_some() {}
}

/// Why a connection was not accepted, or is no longer.
pub(super) type Refused = (Refusal, String);

/// TLS, keys, greetings. The server's greeting comes last: it is the client's word that it is in.
async fn greet(house: &House, stream: TcpStream) -> Result<(NodeName, FrameReader<TlsStream<Moving>>), Refused> {
    let dead = |error: io::Error| (Refusal::Tls, error.to_string());
    tune(&stream).map_err(dead)?;
    let tls = TlsAcceptor::from(house.identity.server()).accept(Moving(Some(stream))).await;
    let tls = tls.map_err(|error| why_refused(&error))?;
    let node = house.identity.node_of(tls.get_ref().1.peer_certificates());
    let node = node.ok_or_else(|| (Refusal::Key, "no certificate".to_owned()))?;
    let mut reader = FrameReader::new(tls);
    let broken = |error: ReadError| match error {
        ReadError::Io(error) => why_refused(&error),
        ReadError::Wire(error) => wire_refused(&error),
    };
    let frame = reader.next().await.map_err(broken)?;
    let theirs: Hello = peer::decode(&frame).map_err(|error| wire_refused(&error))?;
    if theirs.node != node {
        return Err((Refusal::Name, format!("{} with the key of {node}", theirs.node)));
    }
    let ours = peer::encode(&Hello { version: VERSION, node: house.identity.me().clone() });
    let ours = ours.map_err(|error| wire_refused(&error))?;
    let written = async {
        reader.stream.write_all(&ours).await?;
        reader.stream.flush().await
    };
    written.await.map_err(|error| why_refused(&error))?;
    if theirs.version != VERSION {
        let _gone = reader.stream.shutdown().await; // it has our greeting, and so knows why
        return Err((Refusal::Version, format!("{} instead of {VERSION}", theirs.version)));
    }
    Ok((node, reader))
}

/// What a failed handshake, or the first failed read or write after it, means.
fn why_refused(error: &io::Error) -> Refused {
    let refusal = match tls_error(error) {
        // An alert here is a client that did not accept our key, before it showed its own.
        Some(
            rustls::Error::InvalidCertificate(_)
            | rustls::Error::NoCertificatesPresented
            | rustls::Error::AlertReceived(_),
        ) => Refusal::Key,
        _ => Refusal::Tls,
    };
    (refusal, error.to_string())
}

pub(super) fn wire_refused(error: &WireError) -> Refused {
    let refusal = if matches!(error, WireError::Oversize(..)) { Refusal::Oversize } else { Refusal::Malformed };
    (refusal, error.to_string())
}

/// An accepted connection.
struct Conversation<'a, F> {
    house: &'a House,
    node: NodeName,
    from: SocketAddr,
    frames: mpsc::Sender<Bytes>,
    handler: Arc<F>,
}

impl<F> Conversation<'_, F> {
    /// Reads until the other side closes (`None`) or breaks the protocol.
    async fn run<Q, A, Fut>(
        &self,
        mut first: Option<Result<Bytes, ReadError>>,
        mut reader: Reader,
        handlers: &mut JoinSet<()>,
    ) -> Option<Refused>
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        F: Fn(NodeName, Q, Progress<A>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = A> + Send + 'static,
    {
        loop {
            let frame = match first.take() {
                Some(frame) => frame,
                None => tokio::select! {
                    frame = reader.next() => frame,
                    Some(_) = handlers.join_next() => continue,
                },
            };
            let call = match frame {
                Ok(frame) => peer::decode::<Call>(&frame),
                Err(ReadError::Wire(error)) => Err(error),
                // Closed, reset, timed out: connections end.
                Err(ReadError::Io(_)) => return None,
            };
            let (id, body) = match call {
                Ok(Call::Ask { id, body }) => (id, body),
                Ok(Call::Ping) => {
                    if let Ok(frame) = peer::encode(&Reply::Pong) {
                        let _no_room = self.frames.try_send(frame); // then answers are on their way, which say as much
                    }
                    continue;
                }
                // What follows is no frame.
                Ok(Call::Tunnel { .. }) => {
                    return Some((Refusal::Malformed, "a tunnel is asked for first, or not at all".to_owned()));
                }
                Err(error) => return Some(wire_refused(&error)),
            };
            let question = match peer::from_body::<Q>(body) {
                Ok(question) => question,
                Err(error) => {
                    self.house.refusals.refuse(self.from, Refusal::Malformed, &error);
                    self.refuse(id, error.to_string());
                    continue;
                }
            };
            let Ok(permit) = self.house.questions.clone().try_acquire_owned() else {
                self.refuse(id, "it is busy; ask again".to_owned());
                continue;
            };
            let progress = Progress { id, frames: self.frames.clone(), _word: PhantomData };
            let frames = self.frames.clone();
            let answer = (self.handler)(self.node.clone(), question, progress);
            handlers.spawn(async move {
                let frame = answered(id, &answer.await);
                let _asker_gone = frames.send(frame).await;
                drop(permit);
            });
        }
    }

    fn refuse(&self, id: u64, reason: String) {
        if let Ok(frame) = peer::encode(&Reply::Refused { id, reason }) {
            let _no_room = self.frames.try_send(frame); // then the asker's time runs out
        }
    }
}

fn answered<A: Serialize>(id: u64, answer: &A) -> Bytes {
    let frame = peer::to_body(answer).and_then(|body| peer::encode(&Reply::Answer { id, body }));
    frame.unwrap_or_else(|error| {
        tracing::error!("peer channel: an answer could not be sent: {error}");
        let reason = format!("its answer could not be sent: {error}");
        peer::encode(&Reply::Refused { id, reason }).unwrap_or_default()
    })
}
