//! Clients that speak to one gate each, all on one thread, so that the order of two answers is the order in which they
//! came. Each runs in the network namespace of the gate it speaks to: no wire between, so no answer can be late by a
//! retransmission, and cuts are seen by the nodes alone. (The front door is spoken to from the client host.)
//!
//! A client never claims anything about a statement that was not answered. A number is never sent twice.

use super::trace::Ack;
use crate::harness::client::TABLE_SQL;
use crate::harness::node::GATE_PORT;
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{Fail, Outcome, be_prompt, enter_netns, millis, now, secs, wait_until};
use portcullis::base::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio_postgres::SimpleQueryMessage;

/// What a client does all day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// Inserts that wait for the standby: what is answered must never be lost.
    Durable,
    /// Inserts that do not wait: nothing but the gate stops them.
    Local,
    /// Reads.
    Read,
}

#[derive(Debug, Clone)]
pub struct Client {
    pub id: u32,
    /// Index of the node.
    pub node: usize,
    /// Network namespace to connect from, entered anew for each session: a machine that was off has a new one.
    pub ns: String,
    pub gate: String,
    pub habit: Habit,
    pub every: Duration,
    /// How long an answer may take before the session is given up.
    pub patience: Duration,
}

/// What all clients saw.
#[derive(Debug, Clone, Default)]
pub struct Log {
    pub acks: Vec<Ack>,
    pub errors: Vec<(Instant, u32, String)>,
    /// Answers of a PostgreSQL that is no node's.
    pub strangers: Vec<String>,
}

/// The thread of all clients. Stops when dropped.
#[derive(Debug)]
pub struct Clients {
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Refused connections come by the dozen while a gate is shut; more than this many errors tell nothing new.
const MOST_ERRORS: usize = 2000;
const RETRY_EVERY: Duration = millis(50);
const CONNECT_LIMIT: Duration = secs(1);

impl Clients {
    /// Starts them all; `home` is a namespace that outlives every machine.
    pub fn start(home: &str, clients: Vec<Client>) -> Outcome<Clients> {
        let log = Arc::new(Mutex::new(Log::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (home, their_log, their_stop) = (home.to_owned(), log.clone(), stop.clone());
        let body = move || {
            if let Err(error) = all(&home, &clients, &their_log, &their_stop) {
                note(&their_log, 0, format!("the clients cannot run: {error}"));
            }
        };
        let thread = std::thread::Builder::new().name("clients".to_owned()).spawn(body)?;
        Ok(Clients { log, stop, thread: Some(thread) })
    }

    pub fn with_log<T>(&self, look: impl FnOnce(&Log) -> T) -> T {
        look(&self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until a client of this node got an answer after the moment.
    pub fn wait_answer_of(&self, node: usize, after: Instant, deadline: Duration) -> Outcome {
        wait_until(deadline, &format!("an answer through the gate of node {node}"), || {
            self.with_log(|log| {
                if log.acks.iter().rev().any(|ack| ack.node == node && ack.at > after) {
                    return Ok(true);
                }
                Err(Fail(format!("last error {:?}", log.errors.last())))
            })
        })
        .map(drop)
    }

    /// Stops them and returns all they saw.
    pub fn finish(mut self) -> Log {
        self.halt();
        self.with_log(Log::clone)
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.halt();
    }
}

/// The table that clients write to; the harness makes it at the start of a pair.
pub const fn table_sql() -> &'static str {
    TABLE_SQL
}

fn note(log: &Mutex<Log>, client: u32, text: String) {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    if log.errors.len() < MOST_ERRORS {
        log.errors.push((now(), client, text));
    }
}

fn keep(log: &Mutex<Log>, ack: Ack, stranger: Option<String>) {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    log.acks.push(ack);
    if let Some(address) = stranger {
        log.strangers.push(format!("client {} was answered by the PostgreSQL of {address}", ack.client));
    }
}

fn all(home: &str, clients: &[Client], log: &Mutex<Log>, stop: &AtomicBool) -> Outcome {
    enter_netns(home)?;
    be_prompt();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let gates: Gates = clients.iter().map(|client| (client.gate.clone(), client.node)).collect();
    let lives = clients.iter().map(|client| live(home, client, &gates, log, stop));
    runtime.block_on(futures_util::future::join_all(lives));
    Ok(())
}

/// Which node has this address. A session that was carried over is answered by the other node's PostgreSQL, and it is
/// that node that served it.
type Gates = BTreeMap<String, usize>;

async fn live(home: &str, client: &Client, gates: &Gates, log: &Mutex<Log>, stop: &AtomicBool) {
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = session(home, client, gates, &mut next, log, stop).await {
            note(log, client.id, error.0);
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// The socket belongs to the namespace it was made in; the thread is back home when this returns. The far end is on the
/// same machine or one switch away, so this blocks for a moment only.
fn socket(home: &str, client: &Client) -> Outcome<tokio::net::TcpStream> {
    let gate: SocketAddr = format!("{}:{GATE_PORT}", client.gate).parse()?;
    enter_netns(&client.ns)?;
    let opened = TcpStream::connect_timeout(&gate, millis(300));
    enter_netns(home)?;
    let opened = opened?;
    opened.set_nonblocking(true)?;
    opened.set_nodelay(true)?;
    Ok(tokio::net::TcpStream::from_std(opened)?)
}

async fn session(
    home: &str,
    who: &Client,
    gates: &Gates,
    next: &mut u64,
    log: &Mutex<Log>,
    stop: &AtomicBool,
) -> Outcome {
    let socket = socket(home, who)?;
    let mut config = tokio_postgres::Config::new();
    config.user("app").dbname("app").password(APP_PASSWORD).application_name(format!("soak-{}", who.id));
    let connect = tokio::time::timeout(CONNECT_LIMIT, config.connect_raw(socket, tokio_postgres::NoTls));
    let (client, connection) = connect.await.map_err(|_| Fail("no session within 1 s".to_owned()))??;
    let connection = tokio::spawn(connection);
    let ended = talk(who, &client, gates, next, log, stop).await;
    connection.abort();
    ended
}

async fn talk(
    who: &Client,
    client: &tokio_postgres::Client,
    gates: &Gates,
    next: &mut u64,
    log: &Mutex<Log>,
    stop: &AtomicBool,
) -> Outcome {
    let silent = || Fail(format!("no answer within {:?}", who.patience));
    if who.habit == Habit::Local {
        let setup = client.batch_execute("SET synchronous_commit = local");
        tokio::time::timeout(who.patience, setup).await.map_err(|_| silent())??;
    }
    const FROM: &str =
        "split_part(current_setting('listen_addresses'), ', ', 2), left(pg_walfile_name(pg_current_wal_lsn()), 8)";
    while !stop.load(Ordering::Relaxed) {
        *next += 1;
        let (id, n) = (who.id, *next);
        let sql = match who.habit {
            Habit::Read => format!("SELECT {FROM}"),
            _ => format!("INSERT INTO acks VALUES ({id}, {n}) RETURNING {FROM}"),
        };
        let asked = now();
        let messages = tokio::time::timeout(who.patience, client.simple_query(&sql)).await;
        let at = now();
        let messages = messages.map_err(|_| silent())?.map_err(|error| match error.as_db_error() {
            Some(db) => Fail(format!("{} {}: {}", db.severity(), db.code().code(), db.message())),
            None => Fail(format!("session: {error}")),
        })?;
        let row = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((row.get(0)?.to_owned(), row.get(1)?.to_owned())),
            _ => None,
        });
        let (address, timeline) = row.ok_or("an answer without a row")?;
        let timeline = u32::from_str_radix(&timeline, 16)?;
        let node = gates.get(&address).copied();
        let ack = Ack { client: id, node: node.unwrap_or(who.node), n, asked, at, timeline };
        keep(log, ack, node.is_none().then_some(address));
        tokio::time::sleep(who.every).await;
    }
    Ok(())
}
