//! The peer channel: TLS 1.3 between the daemons of one cluster, each side's key pinned by the other.
//!
//! ```text
//! identity   cluster secret + node name -> Ed25519 key; which key stands for which node; the TLS settings
//! client     one lasting connection to one peer: questions out, answers in, matched by id
//! tunnel     a connection that carries one client to the active node's gate, and nothing else
//! server     accepts any configured node's key, knows by it which node that is, runs a handler for each question
//! ```
//!
//! What this is NOT: a cipher, a MAC or a replay window (TLS is all three), a queue (what was not answered in time is
//! lost, and the asker knows), nor any meaning of a question.
//!
//! **Invariants:** nothing of a certificate counts but its public key. A connection counts as up only after the other
//! side's greeting: in TLS 1.3 a client's handshake is done before the server has judged its key. Whatever is refused
//! is counted each time and logged once a minute for each source address and reason.

mod client;
mod identity;
mod server;
mod tunnel;

pub use client::PeerClient;
pub use identity::PeerIdentity;
pub use server::{Progress, listen, listen_stream, listen_with, serve_on};
pub(crate) use tunnel::OpenTunnel;

use crate::wire::peer::WireError;
use bytes::{Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Unacknowledged bytes this old end a connection (TCP_USER_TIMEOUT).
const USER_TIMEOUT: Duration = Duration::from_secs(5);
/// An idle connection whose far end is gone is noticed after about KEEPALIVE_AFTER + 3 x KEEPALIVE_EVERY.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(5);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(2);
/// Frames that wait to be written on one connection. Full: a question is refused as busy; an answer waits.
const FRAMES_WAITING: usize = 64;
/// The same refusal of the same address is logged once in this time.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Address and reason pairs remembered for that. Full of fresh ones: further addresses are counted, not logged.
const LOG_REMEMBERED: usize = 1024;

/// Why a question got no answer. Each is one sentence for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the peer did not answer in time")]
    Timeout,
    #[error("the peer cannot be reached: {0}")]
    Unreachable(String),
    #[error("the connection to the peer broke: {0}")]
    Broken(String),
    #[error("the connection to the peer has gone silent")]
    Silent,
    #[error("the peer's key is not {0}'s; both nodes must have the same cluster.key_file and node names")]
    RefusedKey(String),
    #[error("the peer refused this node's key; both nodes must have the same cluster.key_file and node names")]
    RefusedByPeer,
    #[error("the peer calls itself {0}, but its key says otherwise; mend its --node or [[node]] names")]
    WrongName(String),
    #[error("the peer speaks version {theirs} of the peer protocol, this node {ours}; upgrade the older one")]
    WrongVersion { theirs: u16, ours: u16 },
    #[error("the peer sent what is no message of this protocol: {0}; upgrade the older node")]
    Malformed(String),
    #[error("the message is too long for the peer channel ({0} octets, {1} is the limit)")]
    TooLong(usize, usize),
    #[error("too many questions to the peer are waiting")]
    Busy,
    /// The peer understood the envelope, not the question, or had no room for it.
    #[error("the peer refused the question: {0}")]
    Refused(String),
    #[error("{0} is not a configured node")]
    NoSuchNode(String),
}

impl From<WireError> for PeerError {
    fn from(error: WireError) -> PeerError {
        match error {
            WireError::Oversize(length, most) => PeerError::TooLong(length, most),
            other => PeerError::Malformed(other.to_string()),
        }
    }
}

/// Why something from the other side was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Refusal {
    Key,
    Tls,
    Name,
    Version,
    Malformed,
    Oversize,
    Timeout,
    TooMany,
    ByPeer,
}

/// What was refused since the start, by reason; plus the connections accepted.
#[derive(Debug, Default)]
pub struct PeerCounters {
    /// Connections that passed key, name and version.
    pub accepted: AtomicU64,
    /// No key, or the key of no configured node; or the other side found ours so before we saw its own.
    pub refused_key: AtomicU64,
    /// Not TLS 1.3: garbage, older versions, replayed or damaged handshakes.
    pub refused_tls: AtomicU64,
    /// The greeting names another node than the key.
    pub refused_name: AtomicU64,
    /// The greeting has another protocol version.
    pub wrong_version: AtomicU64,
    /// Not a message of this protocol.
    pub malformed: AtomicU64,
    /// A frame longer than the limit.
    pub oversize: AtomicU64,
    /// No complete handshake and greeting in time.
    pub timed_out: AtomicU64,
    /// More handshakes at once than there is room for.
    pub too_many: AtomicU64,
    /// As a client: the peer refused our key.
    pub refused_by_peer: AtomicU64,
}

impl PeerCounters {
    /// Every counter with its metric label.
    pub fn each(&self) -> [(&'static str, u64); 10] {
        [
            ("accepted", &self.accepted),
            ("refused_key", &self.refused_key),
            ("refused_tls", &self.refused_tls),
            ("refused_name", &self.refused_name),
            ("wrong_version", &self.wrong_version),
            ("malformed", &self.malformed),
            ("oversize", &self.oversize),
            ("timed_out", &self.timed_out),
            ("too_many", &self.too_many),
            ("refused_by_peer", &self.refused_by_peer),
        ]
        .map(|(label, counter)| (label, counter.load(Ordering::Relaxed)))
    }

    fn of(&self, refusal: Refusal) -> (&AtomicU64, &'static str) {
        match refusal {
            Refusal::Key => (&self.refused_key, "its key is no configured node's; compare cluster.key_file and names"),
            Refusal::Tls => (&self.refused_tls, "it does not speak TLS 1.3 as a node does"),
            Refusal::Name => (&self.refused_name, "it calls itself by another name than its key's"),
            Refusal::Version => (&self.wrong_version, "it speaks another version of the protocol; upgrade the older"),
            Refusal::Malformed => (&self.malformed, "it sent what is no message of this protocol"),
            Refusal::Oversize => (&self.oversize, "it sent a longer frame than is allowed"),
            Refusal::Timeout => (&self.timed_out, "it did not finish its greeting in time"),
            Refusal::TooMany => (&self.too_many, "too many connections are being set up"),
            Refusal::ByPeer => (&self.refused_by_peer, "it refused our key; compare cluster.key_file and names"),
        }
    }
}

/// Counts every refusal and logs the first of its kind a minute.
struct Refusals {
    counters: Arc<PeerCounters>,
    said: Mutex<HashMap<(IpAddr, Refusal), Instant>>,
}

impl Refusals {
    fn new(counters: Arc<PeerCounters>) -> Refusals {
        Refusals { counters, said: Mutex::new(HashMap::new()) }
    }

    fn refuse(&self, from: SocketAddr, refusal: Refusal, detail: &dyn std::fmt::Display) {
        let (counter, why) = self.counters.of(refusal);
        counter.fetch_add(1, Ordering::Relaxed);
        if self.may_say(from.ip(), refusal) {
            tracing::warn!("peer channel: refused {}: {why} ({detail})", from.ip());
        }
    }

    fn may_say(&self, from: IpAddr, refusal: Refusal) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.get(&(from, refusal)).is_some_and(|at| at.elapsed() < LOG_EVERY) {
            return false;
        }
        if said.len() >= LOG_REMEMBERED {
            said.retain(|_, at| at.elapsed() < LOG_EVERY);
        }
        let room = said.len() < LOG_REMEMBERED;
        if room {
            said.insert((from, refusal), Instant::now());
        }
        room
    }
}

/// What every connection gets, on either side.
fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// Why no further frame came.
enum ReadError {
    Io(io::Error),
    Wire(WireError),
}

/// Frames as they arrive. Cancel-safe: what was read stays in the buffer.
struct FrameReader<R> {
    stream: R,
    received: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    fn new(stream: R) -> FrameReader<R> {
        FrameReader { stream, received: BytesMut::new() }
    }

    async fn next(&mut self) -> Result<Bytes, ReadError> {
        loop {
            if let Some(frame) = crate::wire::peer::next_frame(&mut self.received).map_err(ReadError::Wire)? {
                return Ok(frame);
            }
            if self.stream.read_buf(&mut self.received).await.map_err(ReadError::Io)? == 0 {
                return Err(ReadError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

/// Writes what it is handed until there is nobody left to hand it anything, then says goodbye.
async fn write_frames<W: AsyncWrite + Unpin>(mut stream: W, mut frames: mpsc::Receiver<Bytes>) -> io::Result<()> {
    while let Some(frame) = frames.recv().await {
        stream.write_all(&frame).await?;
        stream.flush().await?;
    }
    stream.shutdown().await
}

/// The TLS error inside an I/O error, where there is one.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}
