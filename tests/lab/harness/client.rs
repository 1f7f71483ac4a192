//! Clients that write rising numbers and remember, with the time, every one that was acknowledged.
//!
//! What a client did not see acknowledged it makes no claim about. A number is never sent twice, so that a number in
//! the table proves nothing but itself.

use super::net::at;
use super::postgres::{APP_PASSWORD, Cluster};
use super::sys::{Fail, Outcome, be_prompt, enter_netns, millis, now, secs, wait_until};
use super::witness::{SERVICE, addresses_in, ask_here};
use futures_util::stream::{FuturesUnordered, StreamExt};
use hickory_proto::rr::RecordType;
use portcullis::base::time::{Duration, Instant};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The writers' table, made once on the first primary.
pub const TABLE_SQL: &str = "CREATE TABLE acks (w int NOT NULL, n bigint NOT NULL, PRIMARY KEY (w, n)); \
                             ALTER TABLE acks OWNER TO app";

/// Where a writer connects.
#[derive(Debug, Clone)]
pub enum Target {
    /// One address, one session: when it ends, the writer is done.
    Once(SocketAddr),
    /// One address, connecting again after each error.
    Always(SocketAddr),
    /// The service name, asked anew at this DNS server before each connection.
    Service { dns: String },
}

#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Tells the rows of several writers apart.
    pub id: u32,
    /// Least time from one statement to the next.
    pub every: Duration,
    /// Statements under way at once on the session; more than one leaves queued bytes behind when a node freezes.
    pub depth: usize,
    /// Run on each new session before the first number.
    pub setup: String,
    pub target: Target,
}

impl WriterOptions {
    pub fn once(id: u32, gate: SocketAddr) -> WriterOptions {
        WriterOptions { id, every: millis(5), depth: 1, setup: String::new(), target: Target::Once(gate) }
    }

    pub fn service(id: u32, dns: &str) -> WriterOptions {
        let target = Target::Service { dns: at(dns, 53) };
        WriterOptions { target, ..WriterOptions::once(id, SocketAddr::from(([0, 0, 0, 0], 0))) }
    }
}

/// One acknowledged number.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    pub n: u64,
    pub at: Instant,
    /// The gate that the session was opened to.
    pub via: SocketAddr,
}

/// What one writer has seen so far.
#[derive(Debug, Clone, Default)]
pub struct WriterLog {
    pub acks: Vec<Ack>,
    pub errors: Vec<(Instant, String)>,
    pub sessions: Vec<(Instant, SocketAddr)>,
    pub done: bool,
}

impl WriterLog {
    pub fn last_ack(&self) -> Option<Ack> {
        self.acks.last().copied()
    }

    pub fn acks_after(&self, moment: Instant) -> Vec<Ack> {
        self.acks.iter().filter(|ack| ack.at > moment).copied().collect()
    }

    /// The longest time between two acknowledgements that follow each other, and when it began.
    pub fn longest_gap(&self) -> (Duration, Instant) {
        let gaps = self.acks.windows(2).map(|pair| (pair[1].at.since(pair[0].at), pair[0].at));
        gaps.max().unwrap_or((Duration::ZERO, Instant::ZERO))
    }
}

/// A client on a thread of its own, inside a host's network namespace. Stops when dropped.
#[derive(Debug)]
pub struct Writer {
    pub id: u32,
    log: Arc<Mutex<WriterLog>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the client in the namespace; returns at once.
    pub fn start(ns: &str, options: WriterOptions) -> Outcome<Writer> {
        let log = Arc::new(Mutex::new(WriterLog::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ns, their_log, their_stop, id) = (ns.to_owned(), log.clone(), stop.clone(), options.id);
        let body = move || {
            be_prompt();
            let ended = enter_netns(&ns).and_then(|()| live(&options, &their_log, &their_stop));
            let mut log = their_log.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = ended {
                log.errors.push((now(), error.0));
            }
            log.done = true;
        };
        let thread = std::thread::Builder::new().name(format!("writer-{id}")).spawn(body)?;
        Ok(Writer { id, log, stop, thread: Some(thread) })
    }

    /// Starts it and waits until the first numbers are acknowledged.
    pub fn start_flowing(ns: &str, options: WriterOptions) -> Outcome<Writer> {
        let writer = Writer::start(ns, options)?;
        writer.wait_acks(10, secs(60))?;
        Ok(writer)
    }

    pub fn log(&self) -> WriterLog {
        self.guard().clone()
    }

    fn guard(&self) -> MutexGuard<'_, WriterLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until this many more numbers are acknowledged.
    pub fn wait_acks(&self, more: usize, deadline: Duration) -> Outcome<Duration> {
        let before = self.guard().acks.len();
        wait_until(deadline, &format!("{more} more acknowledgements at writer {}", self.id), || {
            let log = self.guard();
            if log.acks.len() >= before + more {
                return Ok(true);
            }
            Err(Fail(format!("{} acknowledged, last error {:?}", log.acks.len(), log.errors.last())))
        })
    }

    /// Waits for an acknowledgement that came through this gate after the moment; returns when it came.
    pub fn wait_ack_via(&self, gate: SocketAddr, after: Instant, deadline: Duration) -> Outcome<Instant> {
        let find = || self.guard().acks.iter().find(|ack| ack.via == gate && ack.at > after).map(|ack| ack.at);
        wait_until(deadline, &format!("an acknowledgement through {gate}"), || {
            let last = self.guard().errors.last().cloned();
            if find().is_some() { Ok(true) } else { Err(Fail(format!("last error {last:?}"))) }
        })?;
        find().ok_or_else(|| Fail("the acknowledgement vanished".to_owned()))
    }

    /// The first acknowledgement through this gate after the moment, if it has come.
    pub fn first_ack_via(&self, gate: SocketAddr, after: Instant) -> Option<Instant> {
        let log = self.guard();
        // The newest are looked at first: a log of hours is long.
        let late = log.acks.iter().rev().take_while(|ack| ack.at > after);
        late.filter(|ack| ack.via == gate).last().map(|ack| ack.at)
    }

    /// Stops it and returns all it saw.
    pub fn finish(mut self) -> WriterLog {
        self.halt();
        self.log()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Acknowledged numbers that the cluster does not hold: each is a lost write.
    pub fn lost_on(&self, cluster: &Cluster) -> Outcome<BTreeSet<u64>> {
        lost(&self.log(), self.id, cluster)
    }
}

/// [`Writer::lost_on`] for a writer that has finished.
pub fn lost(log: &WriterLog, id: u32, cluster: &Cluster) -> Outcome<BTreeSet<u64>> {
    let there = cluster.numbers_of(id)?;
    Ok(log.acks.iter().map(|ack| ack.n).filter(|n| !there.contains(n)).collect())
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.halt();
    }
}

/// How long a connection attempt may take; the handshake needs milliseconds. Who tries once has more patience.
const CONNECT_LIMIT: Duration = secs(1);
const ONLY_CONNECT_LIMIT: Duration = secs(30);
/// How long a client that may reconnect waits for one answer before it gives the session up: a dead machine says
/// nothing.
const ANSWER_LIMIT: Duration = secs(2);
/// Pause before the next attempt.
const RETRY_EVERY: Duration = millis(20);

fn live(options: &WriterOptions, log: &Mutex<WriterLog>, stop: &AtomicBool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let ended = runtime.block_on(async {
            let gate = match &options.target {
                Target::Once(gate) | Target::Always(gate) => *gate,
                Target::Service { dns } => resolve(dns)?,
            };
            one_session(options, gate, &mut next, log, stop).await
        });
        if let Err(error) = ended {
            log.lock().unwrap_or_else(PoisonError::into_inner).errors.push((now(), error.0));
        }
        if matches!(options.target, Target::Once(_)) {
            break;
        }
        std::thread::sleep(RETRY_EVERY);
    }
    Ok(())
}

/// Where the service name points now; asked at the authority, so that no cache stands between.
pub fn resolve(dns: &str) -> Outcome<SocketAddr> {
    let kind = if dns.starts_with('[') { RecordType::AAAA } else { RecordType::A };
    let addresses = addresses_in(&ask_here(dns, SERVICE, kind)?);
    let address = addresses.first().ok_or("the service name has no address")?;
    Ok(at(address, super::node::GATE_PORT).parse()?)
}

/// Opens one session and writes numbers until it is told to stop or the session ends.
async fn one_session(
    options: &WriterOptions,
    gate: SocketAddr,
    next: &mut u64,
    log: &Mutex<WriterLog>,
    stop: &AtomicBool,
) -> Outcome {
    let mut config = tokio_postgres::Config::new();
    config.host(gate.ip().to_string()).port(gate.port()).user("app").dbname("app").password(APP_PASSWORD);
    config.application_name(format!("writer-{}", options.id));
    let limit = if matches!(options.target, Target::Once(_)) { ONLY_CONNECT_LIMIT } else { CONNECT_LIMIT };
    let connect = tokio::time::timeout(limit, config.connect(tokio_postgres::NoTls));
    let (client, connection) = connect.await.map_err(|_| Fail(format!("no session at {gate} within {limit:?}")))??;
    let mut connection = tokio::spawn(connection);
    let result = write_numbers(options, gate, &client, next, log, stop).await;
    // What the server said while no statement was under way only the connection knows; a statement finds it closed.
    if result.is_err()
        && let Ok(Ok(Err(error))) = tokio::time::timeout(millis(50), &mut connection).await
        && error.as_db_error().is_some()
    {
        return Err(sentence(error));
    }
    connection.abort();
    result
}

async fn write_numbers(
    options: &WriterOptions,
    gate: SocketAddr,
    client: &tokio_postgres::Client,
    next: &mut u64,
    log: &Mutex<WriterLog>,
    stop: &AtomicBool,
) -> Outcome {
    if !options.setup.is_empty() {
        tokio::time::timeout(ANSWER_LIMIT, client.batch_execute(&options.setup))
            .await
            .map_err(|_| Fail("the set-up statement was not answered".to_owned()))?
            .map_err(sentence)?;
    }
    log.lock().unwrap_or_else(PoisonError::into_inner).sessions.push((now(), gate));
    let patient = matches!(options.target, Target::Once(_));
    let mut under_way = FuturesUnordered::new();
    let mut asked = now();
    loop {
        while under_way.len() < options.depth {
            *next += 1;
            let (n, sql) = (*next, format!("INSERT INTO acks VALUES ({}, {})", options.id, *next));
            under_way.push(async move { (n, client.simple_query(&sql).await) });
        }
        // A short tick, so that the stop flag is seen while no answer comes.
        match tokio::time::timeout(millis(50), under_way.next()).await {
            Ok(Some((n, Ok(_)))) => {
                let at = now();
                log.lock().unwrap_or_else(PoisonError::into_inner).acks.push(Ack { n, at, via: gate });
                let due = asked + options.every;
                if due > at {
                    tokio::time::sleep(due.since(at)).await;
                }
                asked = now();
            }
            Ok(Some((_, Err(error)))) => return Err(sentence(error)),
            Ok(None) => return Err(Fail("nothing is under way".to_owned())),
            Err(_) if !patient && now().since(asked) > ANSWER_LIMIT => {
                return Err(Fail(format!("no answer from {gate} for {ANSWER_LIMIT:?}")));
            }
            Err(_) => {}
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}

/// The server's own words where there are any.
fn sentence(error: tokio_postgres::Error) -> Fail {
    match error.as_db_error() {
        Some(db) => Fail(format!("{} {}: {}", db.severity(), db.code().code(), db.message())),
        None => Fail(format!("session: {error}")),
    }
}
