//! The asking side: one lasting connection to one peer, made when first needed, made anew after it broke.
//!
//! A task owns the connection. It ends, and with it the connection, when the other side closed it, broke the protocol,
//! or said nothing at all for [`SILENCE`] although something was asked; the next question starts another. So a healed
//! network is used at once instead of when TCP's backed-off retransmission gets round to it.
//!
//! What this is NOT: it asks nothing twice. Whether a question may be repeated, its asker knows.
//!
//! **Invariants:** `ask` ends within its limit. Every question gets its answer, or an error, exactly once. A slow
//! handler is not silence: the other side's `Pong` comes past it.

use super::identity::PeerIdentity;
use super::{
    FRAMES_WAITING, FrameReader, PeerCounters, PeerError, ReadError, Refusal, Refusals, tls_error, tune, write_frames,
};
use crate::base::ids::NodeName;
use crate::wire::peer::{self, Call, Hello, Reply, VERSION, WireError};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, ReadHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Longest a TCP connection takes to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Longest the TLS handshake and the greetings take after that.
const GREETING_LIMIT: Duration = Duration::from_millis(1500);
/// Nothing heard for so long after something was sent: the connection is dropped.
const SILENCE: Duration = Duration::from_millis(1500);
/// While an answer is awaited and nothing else is sent, a `Ping` goes out this often.
const PING_EVERY: Duration = Duration::from_millis(500);
/// How often both are looked at, while there is anything to look at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Questions that wait to be sent, and that wait for their answers. Full: `Busy`.
const QUESTIONS_WAITING: usize = 64;
const ANSWERS_WAITING: usize = 256;
/// Progress words an asker may be behind; further ones are dropped, the answer never is.
const PROGRESS_WAITING: usize = 64;

/// The connection to one peer.
pub struct PeerClient {
    identity: Arc<PeerIdentity>,
    peer: NodeName,
    address: SocketAddr,
    refusals: Arc<Refusals>,
    /// Where questions go; closed once the connection's task has ended.
    link: Mutex<Option<mpsc::Sender<Question>>>,
}

impl std::fmt::Debug for PeerClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PeerClient({} at {})", self.peer, self.address)
    }
}

/// A question on its way, with where to put what comes back.
struct Question {
    body: Value,
    progress: Option<mpsc::Sender<Value>>,
    answer: oneshot::Sender<Result<Value, PeerError>>,
}

impl PeerClient {
    /// Connects to nothing yet.
    pub fn new(identity: Arc<PeerIdentity>, peer: NodeName, address: SocketAddr) -> PeerClient {
        PeerClient::counting(identity, peer, address, Arc::new(PeerCounters::default()))
    }

    /// The same, counting what it refuses (and that it is refused) among the others.
    pub fn counting(
        identity: Arc<PeerIdentity>,
        peer: NodeName,
        address: SocketAddr,
        counters: Arc<PeerCounters>,
    ) -> PeerClient {
        let refusals = Arc::new(Refusals::new(counters));
        PeerClient { identity, peer, address, refusals, link: Mutex::new(None) }
    }

    /// One question, one answer, within `limit` in all, connecting included; many may be in flight. An answer that
    /// comes later is dropped. Must be called inside a tokio runtime.
    pub async fn ask<Q: Serialize, A: DeserializeOwned>(&self, question: &Q, limit: Duration) -> Result<A, PeerError> {
        let answer = timeout(limit, self.ask_body(question, None)).await.map_err(|_| PeerError::Timeout)??;
        Ok(peer::from_body(answer)?)
    }

    /// A question whose answer is preceded by words of progress, each handed to `progress` as it comes.
    pub async fn ask_stream<Q: Serialize, A: DeserializeOwned>(
        &self,
        question: &Q,
        limit: Duration,
        mut progress: impl FnMut(A),
    ) -> Result<A, PeerError> {
        let (words, mut heard) = mpsc::channel(PROGRESS_WAITING);
        let whole = async {
            let mut asking = std::pin::pin!(self.ask_body(question, Some(words)));
            let answer = loop {
                tokio::select! {
                    biased; // the words that came before the answer first
                    Some(word) = heard.recv() => progress(peer::from_body(word)?),
                    answer = &mut asking => break answer?,
                }
            };
            while let Ok(word) = heard.try_recv() {
                progress(peer::from_body(word)?);
            }
            Ok(peer::from_body(answer)?)
        };
        timeout(limit, whole).await.unwrap_or(Err(PeerError::Timeout))
    }

    async fn ask_body<Q: Serialize>(
        &self,
        question: &Q,
        progress: Option<mpsc::Sender<Value>>,
    ) -> Result<Value, PeerError> {
        let body = peer::to_body(question)?;
        let (answer, answered) = oneshot::channel();
        self.send(Question { body, progress, answer })?;
        answered.await.unwrap_or_else(|_| Err(PeerError::Broken("it was closed".to_owned())))
    }

    /// Hands the question to the connection's task, starting one where none runs.
    fn send(&self, mut question: Question) -> Result<(), PeerError> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(questions) = link.as_ref() {
            match questions.try_send(question) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => return Err(PeerError::Busy),
                Err(mpsc::error::TrySendError::Closed(unsent)) => question = unsent,
            }
        }
        let (questions, queue) = mpsc::channel(QUESTIONS_WAITING);
        tokio::spawn(run(self.dial(), queue));
        let sent = questions.try_send(question);
        *link = Some(questions);
        sent.map_err(|_| PeerError::Busy)
    }

    pub(super) fn dial(&self) -> Dial {
        Dial {
            identity: self.identity.clone(),
            peer: self.peer.clone(),
            address: self.address,
            refusals: self.refusals.clone(),
        }
    }
}

/// All it takes to make the connection.
pub(super) struct Dial {
    identity: Arc<PeerIdentity>,
    peer: NodeName,
    address: SocketAddr,
    refusals: Arc<Refusals>,
}

/// The life of one connection. However it ends, every question handed to it gets its error.
async fn run(dial: Dial, mut questions: mpsc::Receiver<Question>) {
    let mut pending = HashMap::new();
    let error = match dial.connect().await {
        Ok(FrameReader { stream, received }) => {
            let (reader, writer) = tokio::io::split(stream);
            let reader = FrameReader { stream: reader, received };
            let (frames, queue) = mpsc::channel(FRAMES_WAITING);
            let mut tasks = JoinSet::new(); // ends with this function
            tasks.spawn(write_frames(writer, queue));
            let now = Instant::now();
            let mut link = Link { frames, pending: &mut pending, next_id: 0, sent: now, unheard_since: None };
            link.serve(reader, &mut questions, &dial).await
        }
        Err(error) => error,
    };
    questions.close();
    while let Some(question) = questions.recv().await {
        let _asker_gone = question.answer.send(Err(error.clone()));
    }
    for (_, waiting) in pending {
        let _asker_gone = waiting.answer.send(Err(error.clone()));
    }
}

type Reader = FrameReader<ReadHalf<TlsStream<TcpStream>>>;

impl Dial {
    /// Connects, proves and checks keys, exchanges greetings.
    pub(super) async fn connect(&self) -> Result<FrameReader<TlsStream<TcpStream>>, PeerError> {
        let unreachable = |error: io::Error| PeerError::Unreachable(error.to_string());
        let late = || PeerError::Unreachable(format!("no connection to {} in time", self.address));
        let stream = timeout(CONNECT_LIMIT, TcpStream::connect(self.address)).await.map_err(|_| late())?;
        let stream = stream.map_err(unreachable)?;
        tune(&stream).map_err(unreachable)?;
        let greeted = timeout(GREETING_LIMIT, self.greet(stream)).await;
        greeted.map_err(|_| PeerError::Unreachable(format!("no greeting from {} in time", self.address)))?
    }

    async fn greet(&self, stream: TcpStream) -> Result<FrameReader<TlsStream<TcpStream>>, PeerError> {
        let config = self.identity.client(&self.peer).ok_or_else(|| PeerError::NoSuchNode(self.peer.to_string()))?;
        let name = PeerIdentity::no_name().map_err(PeerError::Broken)?;
        let tls = TlsConnector::from(config).connect(name, stream).await.map_err(|error| self.refused(&error))?;
        let mut reader = FrameReader::new(tls);
        let hello = peer::encode(&Hello { version: VERSION, node: self.identity.me().clone() })?;
        // A server that refuses our key may have closed already: then its alert, still to be read, says more than the
        // failed write.
        let written = async {
            reader.stream.write_all(&hello).await?;
            reader.stream.flush().await
        };
        let written = written.await;
        let frame = match (reader.next().await, written) {
            (Ok(frame), _) => frame,
            (Err(ReadError::Io(read)), Err(write)) if tls_error(&read).is_none() => return Err(self.refused(&write)),
            (Err(error), _) => return Err(self.broken(error)),
        };
        let theirs: Hello = peer::decode(&frame).map_err(|error| self.broken(ReadError::Wire(error)))?;
        if theirs.version != VERSION {
            self.refusals.refuse(self.address, Refusal::Version, &format_args!("{}", theirs.version));
            return Err(PeerError::WrongVersion { theirs: theirs.version, ours: VERSION });
        }
        if theirs.node != self.peer {
            self.refusals.refuse(self.address, Refusal::Name, &theirs.node);
            return Err(PeerError::WrongName(theirs.node.to_string()));
        }
        Ok(reader)
    }

    /// What a failed handshake, or the first failed read or write after it, means.
    fn refused(&self, error: &io::Error) -> PeerError {
        match tls_error(error) {
            Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
                self.refusals.refuse(self.address, Refusal::Key, error);
                PeerError::RefusedKey(self.peer.to_string())
            }
            Some(rustls::Error::AlertReceived(_)) => {
                self.refusals.refuse(self.address, Refusal::ByPeer, error);
                PeerError::RefusedByPeer
            }
            Some(_) => {
                self.refusals.refuse(self.address, Refusal::Tls, error);
                PeerError::Broken(error.to_string())
            }
            // The library's sentence is for its own users, an address of its documentation and all.
            None if error.kind() == io::ErrorKind::UnexpectedEof => PeerError::Broken("it was closed there".to_owned()),
            None => PeerError::Broken(error.to_string()),
        }
    }

    fn broken(&self, error: ReadError) -> PeerError {
        match error {
            ReadError::Io(error) => self.refused(&error),
            ReadError::Wire(error) => {
                let oversize = matches!(error, WireError::Oversize(..));
                let refusal = if oversize { Refusal::Oversize } else { Refusal::Malformed };
                self.refusals.refuse(self.address, refusal, &error);
                PeerError::Malformed(error.to_string())
            }
        }
    }
}

/// An asker that waits.
struct Waiting {
    progress: Option<mpsc::Sender<Value>>,
    answer: oneshot::Sender<Result<Value, PeerError>>,
}

/// A connection that is up.
struct Link<'a> {
    frames: mpsc::Sender<Bytes>,
    pending: &'a mut HashMap<u64, Waiting>,
    next_id: u64,
    /// When something was last sent.
    sent: Instant,
    /// Since when something was sent and nothing heard.
    unheard_since: Option<Instant>,
}

impl Link<'_> {
    /// Carries questions and answers until something ends it; returns what.
    async fn serve(&mut self, mut reader: Reader, questions: &mut mpsc::Receiver<Question>, dial: &Dial) -> PeerError {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                question = questions.recv() => match question {
                    Some(question) => self.ask(question),
                    None => return PeerError::Broken("it was closed here".to_owned()),
                },
                frame = reader.next() => {
                    let heard = match frame {
                        Ok(frame) => peer::decode(&frame).map_err(ReadError::Wire),
                        Err(error) => Err(error),
                    };
                    match heard {
                        Ok(reply) => self.hear(reply),
                        Err(error) => return dial.broken(error),
                    }
                },
                _ = look.tick(), if self.unheard_since.is_some() || !self.pending.is_empty() => {
                    if self.unheard_since.is_some_and(|since| since.elapsed() >= SILENCE) {
                        return PeerError::Silent;
                    }
                    self.pending.retain(|_, waiting| !waiting.answer.is_closed());
                    if !self.pending.is_empty() && self.sent.elapsed() >= PING_EVERY {
                        let _no_room = self.send(&Call::Ping);
                    }
                },
            }
        }
    }

    fn ask(&mut self, question: Question) {
        let Question { body, progress, answer } = question;
        if answer.is_closed() {
            return; // its asker has given up while the connection was being made
        }
        if self.pending.len() >= ANSWERS_WAITING {
            let _asker_gone = answer.send(Err(PeerError::Busy));
            return;
        }
        self.next_id += 1;
        match self.send(&Call::Ask { id: self.next_id, body }) {
            Ok(()) => {
                self.pending.insert(self.next_id, Waiting { progress, answer });
            }
            Err(error) => {
                let _asker_gone = answer.send(Err(error));
            }
        }
    }

    fn send(&mut self, call: &Call) -> Result<(), PeerError> {
        let frame = peer::encode(call)?;
        self.frames.try_send(frame).map_err(|_| PeerError::Busy)?;
        self.sent = Instant::now();
        self.unheard_since.get_or_insert(self.sent);
        Ok(())
    }

    fn hear(&mut self, reply: Reply) {
        self.unheard_since = None;
        let (id, result) = match reply {
            Reply::Answer { id, body } => (id, Ok(body)),
            Reply::Refused { id, reason } => (id, Err(PeerError::Refused(reason))),
            Reply::Progress { id, body } => {
                if let Some(progress) = self.pending.get(&id).and_then(|waiting| waiting.progress.as_ref()) {
                    let _behind = progress.try_send(body);
                }
                return;
            }
            // To what was never asked here.
            Reply::Pong | Reply::Tunnelled | Reply::Framed => return,
        };
        // No such question: its asker's time was up.
        if let Some(waiting) = self.pending.remove(&id) {
            let _asker_gone = waiting.answer.send(result);
        }
    }
}
