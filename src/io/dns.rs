//! The hands and ears towards one authoritative server: questions by UDP, updates by TCP, each sent once.
//!
//! It is NOT a resolver: the system resolver is used only by [`find_authorities`], to find hosts, never as evidence.
//!
//! **Invariants:** every call ends within its `limit`; a question or update is sent at most once (a second copy of a
//! compare-and-swap reports "conflict" for the success of the first); a failed call says why in one sentence.
//!
//! Cancel-safety: `ask` may be dropped at any point. Dropping `update` after it connected leaves the outcome unknown.

use crate::wire::dns::{
    Answer, Asked, Facts, HeadQuestion, Question, Reading, RecordPair, ServiceNames, TsigKey, Update, UpdateOutcome,
    ZoneHead,
};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{TokioResolver, config::ResolverOpts};
use ring::rand::{SecureRandom, SystemRandom};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// Largest answer taken by UDP, in bytes; what is longer is cut off and does not decode, which counts as no answer.
const UDP_BUFFER: usize = 4096;

/// How many datagrams that are no answer to the question are passed over before the question is given up as failed.
const MAX_STRAYS: u32 = 64;

/// How long a signed question listens on after an answer that does not count: whoever can throw a forged datagram at
/// us, but not stop the server's own, shall not silence the witness (RFC 8945 section 5.3).
const LISTEN_ON: Duration = Duration::from_millis(300);

/// How long [`find_authorities`] looks; after that it fails.
const FIND_LIMIT: Duration = Duration::from_secs(10);

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// One authoritative server of the service's zone.
#[derive(Debug, Clone)]
pub struct Authority {
    pub server: SocketAddr,
    pub names: Arc<ServiceNames>,
    /// With a key, questions are signed and an answer that is not counts as silence. Updates need one.
    pub key: Option<Arc<TsigKey>>,
    /// One socket per kind of question, for the time when no new one can be had.
    spare: Arc<[Mutex<Option<UdpSocket>>; Asked::ALL.len()]>,
}

impl Authority {
    pub fn new(server: SocketAddr, names: Arc<ServiceNames>, key: Option<Arc<TsigKey>>) -> Authority {
        Authority { server, names, key, spare: Arc::default() }
    }

    /// Asks for A, AAAA and TXT at once. A reading is as old as the moment before this call: the caller takes its own
    /// stamp. An `Err` is silence, in a sentence.
    pub async fn ask(&self, limit: Duration) -> Result<Reading, String> {
        let [v4, v6, marker] = Asked::ALL.map(|asked| self.ask_one(asked));
        match timeout(limit, async { tokio::try_join!(v4, v6, marker) }).await {
            Ok(Ok((v4, v6, marker))) => Ok(Reading::of([v4, v6, marker])),
            Ok(Err(why)) => Err(format!("{} gives no answer that counts: {why}", self.server)),
            Err(_) => Err(format!("{} did not answer within {limit:?}", self.server)),
        }
    }

    async fn ask_one(&self, asked: Asked) -> Result<Facts, String> {
        let question = Question::new(&self.names, asked, random_id(), self.key.as_deref(), unix_seconds())?;
        match self.by_udp(asked, &question).await? {
            Answer::Facts(facts) => return Ok(facts),
            Answer::Truncated | Answer::Stray => {}
        }
        match self.by_tcp(&question).await? {
            Answer::Facts(facts) => Ok(facts),
            Answer::Truncated | Answer::Stray => Err("its answer by TCP is none to the question".into()),
        }
    }

    /// By a socket of its own, with a port that nobody can guess; by the spare one while the process is out of
    /// descriptors: a node must go on hearing that it is no longer the active one (C18).
    async fn by_udp(&self, asked: Asked, question: &Question) -> Result<Answer, String> {
        let mut spare = self.spare[asked as usize].lock().await;
        if spare.is_none() {
            *spare = self.socket().await.ok();
        }
        match (self.socket().await, &*spare) {
            (Ok(fresh), _) => {
                drop(spare);
                put(&fresh, question, self.key.is_some()).await
            }
            (Err(_), Some(kept)) => put(kept, question, self.key.is_some()).await,
            (Err(error), None) => Err(sentence(error)),
        }
    }

    /// The socket is connected, so that the kernel takes datagrams of this server only and reports its ICMP refusals.
    async fn socket(&self) -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind(any_address(self.server)).await?;
        socket.connect(self.server).await?;
        Ok(socket)
    }

    async fn by_tcp(&self, question: &Question) -> Result<Answer, String> {
        let mut stream = TcpStream::connect(self.server).await.map_err(sentence)?;
        exchange(&mut stream, question.bytes())
            .await
            .map_err(sentence)
            .and_then(|bytes| question.read(&bytes, unix_seconds()))
    }

    /// The zone's own head, by TCP: the way that updates and long answers take.
    ///
    /// # Errors
    /// A sentence that names the server.
    pub async fn head(&self, limit: Duration) -> Result<ZoneHead, String> {
        let server = self.server;
        let told = |why: String| format!("{server} gives no answer by TCP that counts: {why}");
        let question = HeadQuestion::new(&self.names, random_id(), self.key.as_deref(), unix_seconds())?;
        let whole = async {
            let mut stream = TcpStream::connect(server).await.map_err(sentence)?;
            exchange(&mut stream, question.bytes()).await.map_err(sentence)
        };
        match timeout(limit, whole).await {
            Ok(bytes) => question.read(&bytes.map_err(told)?, unix_seconds()).map_err(told),
            Err(_) => Err(format!("{server} did not answer by TCP within {limit:?}")),
        }
    }

    /// Swaps both record sets for `addresses` and `marker`, both with `ttl` in seconds, if they still are as
    /// `prerequisite` says. One connection, one send, never a retry.
    pub async fn update(
        &self,
        prerequisite: &RecordPair,
        addresses: &[IpAddr],
        ttl: u32,
        marker: &str,
        limit: Duration,
    ) -> UpdateOutcome {
        let Some(key) = &self.key else {
            return UpdateOutcome::NotSent("updates must be signed; set dns.tsig_key_file".into());
        };
        let server = self.server;
        let unsent = |why: String| UpdateOutcome::NotSent(format!("{server} took no connection for the update: {why}"));
        let deadline = tokio::time::sleep(limit);
        tokio::pin!(deadline);
        let mut stream = tokio::select! {
            connected = TcpStream::connect(server) => match connected {
                Ok(stream) => stream,
                Err(error) => return unsent(sentence(error)),
            },
            () = &mut deadline => return unsent(format!("no answer within {limit:?}")),
        };
        // Until the answer is here, closing the socket throws away what the kernel has not delivered yet, also when
        // this call is dropped: an update left in a send buffer could otherwise land minutes later.
        if let Err(error) = abort_on_close(&stream, true) {
            return unsent(sentence(error));
        }
        // Signed only now, so that the age of the signature is that of the sending.
        let update =
            match Update::new(&self.names, prerequisite, (addresses, ttl, marker), random_id(), key, unix_seconds()) {
                Ok(update) => update,
                Err(why) => return UpdateOutcome::NotSent(why),
            };
        let unknown = |why: String| {
            UpdateOutcome::Unknown(format!("the update was sent to {server}, but {why}; run it again to settle it"))
        };
        let answer = tokio::select! {
            answer = exchange(&mut stream, update.bytes()) => answer,
            () = &mut deadline => return unknown(format!("no answer came within {limit:?}")),
        };
        match answer {
            Ok(bytes) => {
                // The answer is here, so nothing is left to throw away; a failure only makes the close less polite.
                let _ = abort_on_close(&stream, false);
                update.judge(&bytes, unix_seconds())
            }
            Err(error) => unknown(sentence(error)),
        }
    }
}

/// One question by UDP, sent once. Late answers to earlier questions on a kept socket are passed over like any stray.
async fn put(socket: &UdpSocket, question: &Question, signed: bool) -> Result<Answer, String> {
    socket.send(question.bytes()).await.map_err(sentence)?;
    let mut buffer = vec![0; UDP_BUFFER];
    let mut doubt: Option<String> = None;
    let listen_on = tokio::time::sleep(Duration::MAX);
    tokio::pin!(listen_on);
    for _ in 0..MAX_STRAYS {
        let length = tokio::select! {
            received = socket.recv(&mut buffer) => received.map_err(sentence)?,
            () = &mut listen_on => break,
        };
        match question.read(&buffer[..length], unix_seconds()) {
            Ok(Answer::Stray) => {}
            Ok(answer) => return Ok(answer),
            Err(why) if !signed => return Err(why),
            Err(why) => {
                if doubt.is_none() {
                    listen_on.set(tokio::time::sleep(LISTEN_ON));
                }
                doubt = doubt.or(Some(why));
            }
        }
    }
    Err(doubt.unwrap_or_else(|| format!("{MAX_STRAYS} datagrams came from it that are no answer")))
}

/// One message there and one back, with the length before each (RFC 1035 section 4.2.2).
async fn exchange(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| std::io::Error::other("the message is too long for DNS"))?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.set_nodelay(true)?;
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

fn abort_on_close(stream: &TcpStream, abort: bool) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(abort.then_some(Duration::ZERO))
}

fn any_address(server: SocketAddr) -> SocketAddr {
    match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn sentence(error: std::io::Error) -> String {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => "nothing listens there".into(),
        Kind::UnexpectedEof => "it closed the connection without an answer".into(),
        Kind::ConnectionReset => "it broke the connection off".into(),
        _ => error.to_string(),
    }
}

/// A message id nobody can guess. Without random numbers (cannot happen after boot) the port alone must do.
fn random_id() -> u16 {
    let mut bytes = [0; 2];
    let _ = SystemRandom::new().fill(&mut bytes);
    u16::from_be_bytes(bytes)
}

/// The wall clock, for TSIG only (RFC 8945 section 4.2): it grants nothing.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

/// The authoritative servers of `zone`, as the system resolver knows them: the primary named in the SOA first (it takes
/// the updates), then the others of the NS set. At most 10 s.
pub async fn find_authorities(zone: &str) -> Result<Vec<SocketAddr>, String> {
    let builder = TokioResolver::builder_tokio()
        .map_err(|error| format!("/etc/resolv.conf cannot be used ({error}); name the servers in dns.servers"))?;
    let mut options = ResolverOpts::default();
    options.cache_size = 0;
    let resolver = builder.with_options(options).build();
    let resolver = resolver.map_err(|error| format!("no resolver ({error}); name the servers in dns.servers"))?;
    find_authorities_by(&resolver, zone).await
}

/// The same by a given resolver.
pub async fn find_authorities_by(resolver: &TokioResolver, zone: &str) -> Result<Vec<SocketAddr>, String> {
    let failed = |why: String| format!("the servers of zone {zone} were not found: {why}; name them in dns.servers");
    let origin = Name::from_ascii(format!("{}.", zone.trim_end_matches('.'))).map_err(|e| failed(e.to_string()))?;
    let look = async {
        let mut hosts = Vec::new();
        let soa = resolver.lookup(origin.clone(), RecordType::SOA).await.map_err(|e| failed(e.to_string()))?;
        for record in soa.answers() {
            if let RData::SOA(soa) = &record.data {
                hosts.push(soa.mname.clone());
            }
        }
        if let Ok(servers) = resolver.lookup(origin.clone(), RecordType::NS).await {
            for record in servers.answers() {
                if let RData::NS(host) = &record.data {
                    hosts.push(host.0.clone());
                }
            }
        }
        let mut found = Vec::new();
        for host in hosts {
            let Ok(addresses) = resolver.lookup_ip(host).await else { continue };
            for address in addresses.iter().map(|ip| SocketAddr::new(ip, DNS_PORT)) {
                if !found.contains(&address) {
                    found.push(address);
                }
            }
        }
        if found.is_empty() { Err(failed("none of them has an address".into())) } else { Ok(found) }
    };
    timeout(FIND_LIMIT, look).await.unwrap_or_else(|_| Err(failed(format!("no answer within {FIND_LIMIT:?}"))))
}
