//! Clients that keep their session through a switchover, if it lets them: a transaction of three statements again and
//! again, each with the time of its commit; an error is a failed transaction, and how long one had to wait is the gap
//! between two commits. All on one thread, on the client host, with the service name asked anew for each session.

use crate::harness::client::resolve;
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{Fail, Outcome, be_prompt, enter_netns, millis, now, secs, wait_until};
use portcullis::base::time::{Duration, Instant};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What one client saw.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Number and moment of each commit that was answered.
    pub commits: Vec<(u64, Instant)>,
    /// Errors on a session that stood: each is a transaction that failed. SQLSTATE, or `session`.
    pub failed: Vec<(Instant, String, String)>,
    /// Attempts to connect that failed.
    pub refused: usize,
}

/// The thread of all clients. Stops when dropped.
#[derive(Debug)]
pub struct Bench {
    pub ids: Vec<u32>,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A session that says nothing for so long is given up.
const PATIENCE: Duration = secs(40);
const CONNECT_LIMIT: Duration = secs(5);
const RETRY_EVERY: Duration = millis(20);

impl Bench {
    pub fn start(ns: &str, dns: &str, ids: Vec<u32>, every: Duration) -> Outcome<Bench> {
        let seen = Arc::new(Mutex::new(vec![Seen::default(); ids.len()]));
        let stop = Arc::new(AtomicBool::new(false));
        let (ns, dns, their_ids) = (ns.to_owned(), dns.to_owned(), ids.clone());
        let (their_seen, their_stop) = (seen.clone(), stop.clone());
        let body = move || {
            be_prompt();
            let Ok(runtime) = enter_netns(&ns)
                .and_then(|()| Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?))
            else {
                return;
            };
            let clients = their_ids.iter().enumerate().map(|(index, id)| {
                let one = One { id: *id, index, dns: &dns, every, seen: &their_seen, stop: &their_stop };
                one.live()
            });
            runtime.block_on(futures_util::future::join_all(clients));
        };
        let thread = std::thread::Builder::new().name("bench".to_owned()).spawn(body)?;
        Ok(Bench { ids, seen, stop, thread: Some(thread) })
    }

    /// All they saw so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until every one of them has committed after the moment.
    pub fn wait_all(&self, after: Instant, deadline: Duration) -> Outcome {
        wait_until(deadline, "a commit of every client", || {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.iter().all(|one| one.commits.last().is_some_and(|(_, at)| *at > after)) {
                return Ok(true);
            }
            Err(Fail(format!("errors {:?}", seen.iter().filter_map(|one| one.failed.last()).next_back())))
        })
        .map(drop)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The longest time without a commit that overlaps these moments.
pub fn longest_gap(commits: &[(u64, Instant)], from: Instant, to: Instant) -> Option<Duration> {
    let pairs = commits.windows(2).map(|pair| (pair[0].1, pair[1].1));
    pairs.filter(|(before, after)| *after > from && *before < to).map(|(before, after)| after.since(before)).max()
}

struct One<'a> {
    id: u32,
    index: usize,
    dns: &'a str,
    every: Duration,
    seen: &'a Mutex<Vec<Seen>>,
    stop: &'a AtomicBool,
}

impl One<'_> {
    fn note(&self, add: impl FnOnce(&mut Seen)) {
        add(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner)[self.index]);
    }

    async fn live(self) {
        let mut next = 0;
        while !self.stop.load(Ordering::Relaxed) {
            match self.connect().await {
                Ok((client, connection)) => {
                    if let Err((code, text)) = self.work(&client, &mut next).await {
                        self.note(|seen| seen.failed.push((now(), code, text)));
                    }
                    connection.abort();
                }
                Err(_) => self.note(|seen| seen.refused += 1),
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    async fn connect(&self) -> Outcome<(tokio_postgres::Client, tokio::task::JoinHandle<()>)> {
        let gate = resolve(self.dns)?;
        let mut config = tokio_postgres::Config::new();
        config.host(gate.ip().to_string()).port(gate.port()).user("app").dbname("app").password(APP_PASSWORD);
        config.application_name(format!("bench-{}", self.id));
        let connect = tokio::time::timeout(CONNECT_LIMIT, config.connect(tokio_postgres::NoTls));
        let (client, connection) = connect.await.map_err(|_| Fail("no session in time".to_owned()))??;
        let connection = tokio::spawn(async {
            let _said_to_the_client = connection.await;
        });
        Ok((client, connection))
    }

    async fn work(&self, client: &tokio_postgres::Client, next: &mut u64) -> Result<(), (String, String)> {
        while !self.stop.load(Ordering::Relaxed) {
            *next += 1;
            let insert = format!("INSERT INTO acks VALUES ({}, {next})", self.id);
            for sql in ["BEGIN", &insert, "COMMIT"] {
                match tokio::time::timeout(PATIENCE, client.simple_query(sql)).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => {
                        let code = error.code().map_or("session".to_owned(), |code| code.code().to_owned());
                        let text = error.as_db_error().map_or(error.to_string(), |db| db.message().to_owned());
                        return Err((code, format!("at {sql}: {text}")));
                    }
                    Err(_) => return Err(("silent".to_owned(), format!("at {sql}: no answer for {PATIENCE:?}"))),
                }
            }
            let (n, at) = (*next, now());
            self.note(|seen| seen.commits.push((n, at)));
            tokio::time::sleep(self.every).await;
        }
        Ok(())
    }
}
