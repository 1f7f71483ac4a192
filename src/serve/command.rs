//! What people ask of the pools: hold, let go, renew or end what belongs to one database, other limits, and figures.
//!
//! What it is NOT: it decides nothing about the gate; a pause of the whole service is the guard's. What is said here
//! lasts as long as the process: a restart forgets it.
//!
//! **Invariant:** nothing here waits for a session without an end, and no session is ended but by its own task.

use super::gate::Gate;
use super::listener::{Confirm, Proxy, ProxyOptions};
use super::pool::Database;
use super::slot::{Order, Slot};
use super::tally::Latencies;
use crate::base::config;
use crate::engine::status::Snapshot;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;

/// How long `pause` waits for transactions to end; who is still in one is held when it ends.
pub const PAUSE_WAIT: Duration = Duration::from_secs(10);
/// How long `kill` waits for sessions to be gone.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks at the sessions.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A database that no client has logged in to, and those that are known.
#[derive(Debug, PartialEq, Eq)]
pub struct Unknown {
    name: String,
    known: Vec<String>,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no client has logged in to database {} since this daemon started; ", self.name)?;
        if self.known.is_empty() { write!(f, "there is none yet") } else { write!(f, "name {}", self.known.join(", ")) }
    }
}

/// Figures of one (user, database), summed over the threads.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    pub user: String,
    pub database: String,
    pub paused: bool,
    pub clients: u32,
    /// Clients that wait for a backend.
    pub waiting: u32,
    /// Backends, idle ones among them.
    pub open: u32,
    pub idle: u32,
    pub logins: u64,
    pub transactions: u64,
    /// From clients to PostgreSQL.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Time that clients waited for a backend.
    pub waited: Duration,
    /// How many had to.
    pub waits: u64,
    /// Requests answered to their end.
    pub queries: u64,
    /// Transactions that came to their end, in either mode.
    pub ended: u64,
}

/// The data plane as commands see it. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    pub(super) proxy: Arc<Proxy>,
}

impl Commands {
    /// A data plane that serves nobody yet; `listener::run` does.
    pub fn new(
        gate: Arc<Gate>,
        options: ProxyOptions,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        confirm: Confirm,
    ) -> Commands {
        Commands { proxy: Proxy::new(gate, options, snapshots, confirm) }
    }

    fn known(&self, name: &str) -> Result<Arc<Database>, Unknown> {
        self.proxy.known_database(name).ok_or_else(|| Unknown {
            name: name.to_owned(),
            known: self.proxy.databases().into_iter().map(|(name, _)| name).collect(),
        })
    }

    fn sessions(&self, database: &str) -> Vec<Arc<Slot>> {
        let mut all = self.proxy.gate.all_slots();
        all.retain(|slot| *slot.database == *database);
        all
    }

    /// Holds the clients of a database at their next transaction boundary, new ones before their login. Returns when
    /// all are held or idle, or after [`PAUSE_WAIT`]: how many are still in a transaction then.
    ///
    /// # Errors
    /// Nobody has ever logged in to it.
    pub async fn pause(&self, name: &str) -> Result<usize, Unknown> {
        let database = self.known(name)?;
        database.paused.store(true, Ordering::SeqCst);
        self.proxy.gate.wake();
        let all_at_rest = async {
            loop {
                // After a while first: who was just let through is busy by then.
                tokio::time::sleep(LOOK_AGAIN).await;
                if self.in_transaction(name) == 0 || !database.paused.load(Ordering::SeqCst) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(PAUSE_WAIT, all_at_rest).await;
        Ok(self.in_transaction(name))
    }

    fn in_transaction(&self, name: &str) -> usize {
        self.sessions(name).iter().filter(|slot| slot.busy.load(Ordering::SeqCst)).count()
    }

    /// The databases that are paused by name.
    pub fn paused(&self) -> Vec<String> {
        let all = self.proxy.databases().into_iter();
        all.filter(|(_, database)| database.paused.load(Ordering::SeqCst)).map(|(name, _)| name).collect()
    }

    /// Lets them go. Whether they were held.
    ///
    /// # Errors
    /// Nobody has ever logged in to it.
    pub fn resume(&self, name: &str) -> Result<bool, Unknown> {
        let was = self.known(name)?.paused.swap(false, Ordering::SeqCst);
        self.proxy.gate.wake();
        Ok(was)
    }

    /// Whatever is remembered of roles is asked for anew.
    pub fn forget_roles(&self) {
        self.proxy.roles.forget_all();
    }

    /// No backend of now is lent again, of one database or of all: idle ones are closed at once, others when they come
    /// back; and no role is let in by what was known of it before. How many were idle, and how many in use.
    ///
    /// # Errors
    /// Nobody has ever logged in to it.
    pub fn reconnect(&self, name: Option<&str>) -> Result<(u32, u32), Unknown> {
        let databases = match name {
            Some(name) => vec![self.known(name)?],
            None => self.proxy.databases().into_iter().map(|(_, database)| database).collect(),
        };
        let (mut idle, mut used) = (0, 0);
        for (_, database, stats) in self.proxy.pools() {
            if name.is_none_or(|name| name == database) {
                let now = stats.idle.load(Ordering::Relaxed);
                idle += now;
                used += stats.open.load(Ordering::Relaxed).saturating_sub(now);
            }
        }
        self.forget_roles();
        for database in databases {
            database.reconnects.fetch_add(1, Ordering::SeqCst);
        }
        // The data threads look after their pools.
        self.proxy.gate.wake();
        Ok((idle, used))
    }

    /// Ends every session of a database (FATAL 57P01) and its backends, with the statements that run there; new clients
    /// are welcome. How many sessions ended, and how many have not yet. A backend whose commit waits for its standby
    /// ends when it has waited (R4).
    ///
    /// # Errors
    /// Nobody has ever logged in to it.
    pub async fn kill(&self, name: &str) -> Result<(usize, usize), Unknown> {
        if self.proxy.known_database(name).is_none() {
            self.reconnect(Some(name))?;
        }
        // First: a backend of before this serves nobody else after it.
        let time = self.proxy.roles.time().await;
        self.reconnect(Some(name))?;
        let all = self.sessions(name);
        let backends: Vec<i32> = all.iter().filter_map(|slot| slot.backend()).map(|(pid, _)| pid).collect();
        all.iter().for_each(|slot| slot.give(Order::Kill));
        let is_there = |slot: &&Arc<Slot>| self.proxy.gate.has(slot);
        let gone = async {
            while all.iter().any(|slot| is_there(&slot)) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let _ = tokio::time::timeout(KILL_WAIT, gone).await;
        let left = all.iter().filter(is_there).count();
        // PostgreSQL looks for its client only between statements.
        let ended = match time {
            Ok(time) if !backends.is_empty() => self.proxy.roles.end(&backends, name, &time).await.map(drop),
            time => time.map(drop),
        };
        if let Err(error) = ended {
            tracing::warn!(database = name, %error, "statements of killed sessions run on to their end");
        }
        Ok((all.len() - left, left))
    }

    /// Ends one session, by the number that its client was given, and the statement that runs in it. Whether it has
    /// ended; `None`: there is none of this number.
    pub async fn kill_client(&self, id: i32) -> Option<bool> {
        let slot = self.proxy.gate.all_slots().into_iter().find(|slot| slot.pid == id)?;
        let time = self.proxy.roles.time().await;
        slot.give(Order::Kill);
        let gone = async {
            while self.proxy.gate.has(&slot) {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let _ = tokio::time::timeout(KILL_WAIT, gone).await;
        if self.proxy.gate.has(&slot) {
            return Some(false);
        }
        // Only now: the backend that is still in the slot died with the session, and serves nobody else.
        let backend = slot.backend().map(|(pid, _)| pid);
        let ended = match (time, backend) {
            (Ok(time), Some(pid)) => self.proxy.roles.end(&[pid], &slot.database, &time).await.map(drop),
            (time, _) => time.map(drop),
        };
        if let Err(error) = ended {
            tracing::warn!(id, %error, "the statement of a killed session runs on to its end");
        }
        Some(true)
    }

    /// The [pool] in force.
    pub fn limits(&self) -> Arc<config::Pool> {
        self.proxy.limits()
    }

    /// Other limits from now on. `mode` and `threads` stay what they were at the start.
    pub fn set_limits(&self, pool: config::Pool) {
        let now = self.proxy.limits();
        self.proxy.set_limits(config::Pool { mode: now.mode, threads: now.threads, ..pool });
        self.proxy.gate.wake();
    }

    /// How long requests, transactions and waits took, of all pools.
    pub fn latencies(&self) -> Latencies {
        self.proxy.latencies()
    }

    /// Figures of every pool there is, in the order of their names.
    pub fn figures(&self) -> Vec<Figures> {
        figures(&self.proxy)
    }
}

pub(super) fn figures(proxy: &Proxy) -> Vec<Figures> {
    let mut all: BTreeMap<(String, String), Figures> = BTreeMap::new();
    for (user, database, stats) in proxy.pools() {
        let sum = all.entry((user.clone(), database.clone())).or_insert_with(|| Figures {
            paused: proxy.known_database(&database).is_some_and(|known| known.paused.load(Ordering::Relaxed)),
            user,
            database,
            ..Figures::default()
        });
        sum.clients += stats.clients.load(Ordering::Relaxed);
        sum.waiting += stats.waiting.load(Ordering::Relaxed);
        sum.open += stats.open.load(Ordering::Relaxed);
        sum.idle += stats.idle.load(Ordering::Relaxed);
        sum.logins += stats.logins.load(Ordering::Relaxed);
        sum.transactions += stats.transactions.load(Ordering::Relaxed);
        sum.bytes_in += stats.bytes_in.load(Ordering::Relaxed);
        sum.bytes_out += stats.bytes_out.load(Ordering::Relaxed);
        sum.waits += stats.waits.load(Ordering::Relaxed);
        sum.queries += stats.queries.load(Ordering::Relaxed);
        sum.ended += stats.ended.load(Ordering::Relaxed);
        sum.waited += Duration::from_nanos(stats.waited.load(Ordering::Relaxed));
    }
    all.into_values().collect()
}
