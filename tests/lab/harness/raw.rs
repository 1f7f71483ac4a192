//! Clients that speak PostgreSQL's protocol by hand, hundreds on one thread: each opens a session, falls into a habit,
//! and notes when the last message of an answer reached it and when and how the session ended.
//!
//! What it is NOT: it checks no password (its role is let in by `trust`) and reads no row. **Invariant:** nobody
//! connects twice, so that all that is counted came over the session that was open before the fault.

use super::sys::{Fail, Outcome, be_prompt, enter_netns, millis, now, secs, wait_until};
use portcullis::base::time::{Duration, Instant};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The role that the lab's rules let in without a password, through the gate and at PostgreSQL.
pub const ROLE: &str = "load";
/// What the role and its table need, once on the first primary.
pub const SETUP_SQL: &str =
    "CREATE ROLE load LOGIN; CREATE TABLE load (n bigint, t text); ALTER TABLE load OWNER TO load";
/// The line that lets the role in, for the client rules of the gate and for `pg_hba.conf`.
pub const GATE_RULE: &str = "host all load all trust\n";
pub const POSTGRES_RULE: &str = "local all load trust\n";

/// What a session does once it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    Idle,
    InTransaction,
    /// `pg_sleep(3600)`.
    Sleeping,
    /// Asks, waits for the answer, asks again.
    Asking,
    /// Sends an INSERT every 2 ms and never waits: whatever freezes, bytes lie in every buffer on the way to it.
    Pouring,
    CopyOut,
    CopyIn,
}

/// What one session saw.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub ready: Option<Instant>,
    /// Messages of answers since it was ready, without errors and notices.
    pub answers: u64,
    pub last_answer: Option<Instant>,
    /// When and how it ended: the error's fields, or that it was closed.
    pub ended: Option<(Instant, String)>,
}

#[derive(Debug)]
pub struct Crowd {
    pub members: Vec<(Habit, bool)>,
    seen: Arc<Vec<Mutex<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    /// Opens one session per member (its habit, and whether by TLS) from inside the namespace; returns when all are
    /// ready. `root` is the certificate that the gate shows.
    pub fn open(
        ns: &str,
        gate: SocketAddr,
        members: Vec<(Habit, bool)>,
        root: Option<CertificateDer<'static>>,
    ) -> Outcome<Crowd> {
        let seen: Arc<Vec<Mutex<Seen>>> = Arc::new(members.iter().map(|_| Mutex::default()).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let tls = root.map(connector).transpose()?;
        let (ns, their_seen, their_stop, theirs) = (ns.to_owned(), seen.clone(), stop.clone(), members.clone());
        let body = move || {
            if enter_netns(&ns).is_err() {
                return;
            }
            be_prompt();
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                // A few dial at once: a crowd that dials all at once is refused by nobody, but measures the scheduler.
                let turns = Arc::new(tokio::sync::Semaphore::new(8));
                for (at, (habit, by_tls)) in theirs.into_iter().enumerate() {
                    let (seen, turns) = (their_seen.clone(), turns.clone());
                    let tls = tls.clone().filter(|_| by_tls);
                    tokio::spawn(async move {
                        let error = live(gate, habit, tls, &seen[at], &turns).await.unwrap_or_else(|error| error.0);
                        let mut seen = lock(&seen[at]);
                        if seen.ended.is_none() {
                            seen.ended = Some((now(), error));
                        }
                    });
                }
                while !their_stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(millis(20)).await;
                }
            });
        };
        let thread = std::thread::Builder::new().name("crowd".to_owned()).spawn(body)?;
        let crowd = Crowd { members, seen, stop, thread: Some(thread) };
        wait_until(secs(180), "every session of the crowd to be ready", || {
            let all = crowd.seen();
            if let Some(early) = all.iter().find(|seen| seen.ready.is_none() && seen.ended.is_some()) {
                return Err(Fail(format!("a session ended before it was ready: {:?}", early.ended)));
            }
            Ok(all.iter().all(|seen| seen.ready.is_some()))
        })?;
        Ok(crowd)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.iter().map(|seen| lock(seen).clone()).collect()
    }

    /// The latest answer that any of them got.
    pub fn last_answer(&self) -> Option<Instant> {
        self.seen().iter().filter_map(|seen| seen.last_answer).max()
    }

    pub fn answers(&self) -> u64 {
        self.seen().iter().map(|seen| seen.answers).sum()
    }

    /// Whom an answer reached after the moment, and when the last of each came.
    pub fn late(&self, moment: Instant) -> Vec<(Habit, Instant)> {
        let all = self.members.iter().zip(self.seen());
        all.filter_map(|((habit, _), seen)| Some((*habit, seen.last_answer.filter(|at| *at > moment)?))).collect()
    }

    /// Waits until every session has ended; returns when the last did.
    pub fn wait_ended(&self, deadline: Duration) -> Outcome<Instant> {
        wait_until(deadline, "every session of the crowd to be cut", || {
            let open: Vec<Habit> =
                self.members.iter().zip(self.seen()).filter(|(_, s)| s.ended.is_none()).map(|((h, _), _)| *h).collect();
            if open.is_empty() { Ok(true) } else { Err(Fail(format!("{} are open: {:?} ...", open.len(), open[0]))) }
        })?;
        self.seen()
            .iter()
            .filter_map(|seen| seen.ended.as_ref().map(|(at, _)| *at))
            .max()
            .ok_or_else(|| Fail("an empty crowd".to_owned()))
    }

    /// Waits until somebody gets an answer after the moment.
    pub fn wait_answer_after(&self, moment: Instant, deadline: Duration) -> Outcome {
        wait_until(deadline, "an answer", || Ok(self.last_answer().is_some_and(|at| at > moment))).map(drop)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connector(root: CertificateDer<'static>) -> Outcome<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(root).map_err(|error| Fail(format!("the gate's certificate: {error}")))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|error| Fail(error.to_string()))?.with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}
type Halves = (ReadHalf<Box<dyn Wire>>, WriteHalf<Box<dyn Wire>>);

/// The life of one session; returns how it ended.
async fn live(
    gate: SocketAddr,
    habit: Habit,
    tls: Option<TlsConnector>,
    seen: &Mutex<Seen>,
    turns: &tokio::sync::Semaphore,
) -> Outcome<String> {
    let (mut reader, mut writer) = {
        let _turn = turns.acquire().await.map_err(|error| Fail(error.to_string()))?;
        let opening = tokio::time::timeout(secs(60), open(gate, tls));
        opening.await.map_err(|_| Fail("no session within 60 s".to_owned()))??
    };
    lock(seen).ready = Some(now());
    let inbox = tokio::sync::Notify::new();
    tokio::select! {
        ended = read_all(&mut reader, seen, &inbox) => ended,
        error = follow(&mut writer, habit, &inbox) => {
            // It can write no more; what was said to it may still lie there to be read.
            let why = error.err().map(|error| error.0).unwrap_or_default();
            let rest = tokio::time::timeout(millis(200), read_all(&mut reader, seen, &inbox)).await;
            rest.unwrap_or(Ok(why))
        }
    }
}

async fn open(gate: SocketAddr, tls: Option<TlsConnector>) -> Outcome<Halves> {
    let mut stream = TcpStream::connect(gate).await?;
    stream.set_nodelay(true)?;
    let mut wire: Box<dyn Wire> = match tls {
        None => Box::new(stream),
        Some(connector) => {
            stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await?;
            if stream.read_u8().await? != b'S' {
                return Err(Fail("the gate speaks no TLS".to_owned()));
            }
            let name = ServerName::try_from(super::witness::SERVICE).map_err(|error| Fail(error.to_string()))?;
            Box::new(connector.connect(name, stream).await?)
        }
    };
    let words = format!("user\0{ROLE}\0database\0app\0application_name\0crowd\0\0");
    let length = i32::try_from(words.len() + 8).map_err(|error| Fail(error.to_string()))?;
    let mut startup = length.to_be_bytes().to_vec();
    startup.extend([0, 3, 0, 0]);
    startup.extend(words.as_bytes());
    wire.write_all(&startup).await?;
    loop {
        let (kind, body) = message(&mut wire).await?;
        match kind {
            b'Z' => return Ok(tokio::io::split(wire)),
            b'E' => return Err(Fail(text_of(&body))),
            _ => {}
        }
    }
}

/// One message, whole.
async fn message(reader: &mut (impl AsyncRead + Unpin)) -> Outcome<(u8, Vec<u8>)> {
    let kind = reader.read_u8().await?;
    let length = reader.read_u32().await?.saturating_sub(4);
    let mut body = vec![0; length as usize];
    reader.read_exact(&mut body).await?;
    Ok((kind, body))
}

fn text_of(error: &[u8]) -> String {
    let fields: Vec<String> =
        error.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
    fields
        .into_iter()
        .filter(|field| field.starts_with(['C', 'M']))
        .map(|field| field[1..].to_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

async fn read_all(
    reader: &mut ReadHalf<Box<dyn Wire>>,
    seen: &Mutex<Seen>,
    inbox: &tokio::sync::Notify,
) -> Outcome<String> {
    loop {
        let (kind, body) = match message(reader).await {
            Ok(message) => message,
            Err(error) => {
                let ended = (now(), error.0);
                lock(seen).ended.get_or_insert(ended);
                return Ok(String::new());
            }
        };
        let at = now();
        match kind {
            b'E' => {
                let text = text_of(&body);
                if text.starts_with("57P") || text.starts_with("08") {
                    lock(seen).ended = Some((at, text));
                    return Ok(String::new());
                }
            }
            b'N' | b'S' => {}
            _ => {
                let mut seen = lock(seen);
                seen.answers += 1;
                seen.last_answer = Some(at);
                drop(seen);
                if kind == b'Z' {
                    inbox.notify_one();
                }
            }
        }
    }
}

fn query(sql: &str) -> Vec<u8> {
    framed(b'Q', &[sql.as_bytes(), b"\0"].concat())
}

fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    [&[kind], &length.to_be_bytes()[..], body].concat()
}

/// Lives by the habit until writing fails; idle ones for ever.
async fn follow(writer: &mut WriteHalf<Box<dyn Wire>>, habit: Habit, inbox: &tokio::sync::Notify) -> Outcome {
    match habit {
        Habit::Idle => {}
        Habit::InTransaction => writer.write_all(&query("BEGIN; SELECT 1")).await?,
        Habit::Sleeping => writer.write_all(&query("SELECT pg_sleep(3600)")).await?,
        Habit::CopyOut => {
            let sql = "COPY (SELECT repeat('x', 2000), pg_sleep(0.02) FROM generate_series(1, 1000000)) TO STDOUT";
            writer.write_all(&query(sql)).await?;
        }
        Habit::Asking => loop {
            writer.write_all(&query("SELECT 1")).await?;
            inbox.notified().await;
            tokio::time::sleep(millis(25)).await;
        },
        Habit::Pouring => {
            for n in 0u64.. {
                writer.write_all(&query(&format!("INSERT INTO load VALUES ({n})"))).await?;
                tokio::time::sleep(millis(2)).await;
            }
        }
        Habit::CopyIn => {
            writer.write_all(&query("COPY load (t) FROM STDIN")).await?;
            let rows = framed(b'd', "one more row that goes the other way\n".repeat(20).as_bytes());
            loop {
                writer.write_all(&rows).await?;
                tokio::time::sleep(millis(20)).await;
            }
        }
    }
    writer.flush().await?;
    std::future::pending().await
}
