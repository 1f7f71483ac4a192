//! Readers through the service name: what a client has been shown must never be gone later (C9). Each remembers the
//! highest number of every writer that an answer showed, with the time; numbers rise, and none is sent twice.

use crate::harness::client::resolve;
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{Fail, Outcome, enter_netns, millis, now, secs};
use portcullis::base::time::{Duration, Instant};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio_postgres::SimpleQueryMessage;

/// Rows that were shown: writer and number, and when first.
pub type Seen = BTreeMap<(u32, u64), Instant>;

/// A thread with one session at a time. Stops when dropped.
#[derive(Debug)]
pub struct Reader {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

const EVERY: Duration = millis(5);
const LIMIT: Duration = secs(2);

impl Reader {
    /// Reads what these writers wrote, from inside the namespace.
    pub fn start(ns: &str, dns: &str, writers: &[u32]) -> Outcome<Reader> {
        let (seen, stop) = (Arc::new(Mutex::new(Seen::new())), Arc::new(AtomicBool::new(false)));
        let (ns, dns, writers) = (ns.to_owned(), dns.to_owned(), writers.to_vec());
        let (their_seen, their_stop) = (seen.clone(), stop.clone());
        let body = move || {
            if enter_netns(&ns).is_err() {
                return;
            }
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            while !their_stop.load(Ordering::Relaxed) {
                let _ended = runtime.block_on(session(&dns, &writers, &their_seen, &their_stop));
                std::thread::sleep(millis(20));
            }
        };
        let thread = std::thread::Builder::new().name("reader".to_owned()).spawn(body)?;
        Ok(Reader { seen, stop, thread: Some(thread) })
    }

    /// What it was shown since the last time.
    pub fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn session(dns: &str, writers: &[u32], seen: &Mutex<Seen>, stop: &AtomicBool) -> Outcome {
    let gate = resolve(dns)?;
    let mut config = tokio_postgres::Config::new();
    config.host(gate.ip().to_string()).port(gate.port()).user("app").dbname("app").password(APP_PASSWORD);
    let connect = tokio::time::timeout(secs(1), config.connect(tokio_postgres::NoTls));
    let (client, connection) = connect.await.map_err(|_| Fail("no session within 1 s".to_owned()))??;
    let connection = tokio::spawn(connection);
    let sql: Vec<String> = writers.iter().map(|w| format!("(SELECT max(n) FROM acks WHERE w = {w})")).collect();
    let sql = format!("SELECT {}", sql.join(", "));
    let ended = loop {
        if stop.load(Ordering::Relaxed) {
            break Ok(());
        }
        let answer = match tokio::time::timeout(LIMIT, client.simple_query(&sql)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => break Err(error.into()),
            Err(_) => break Err(Fail("no answer".to_owned())),
        };
        let at = now();
        for message in &answer {
            let SimpleQueryMessage::Row(row) = message else { continue };
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            for (index, writer) in writers.iter().enumerate() {
                if let Some(n) = row.get(index).and_then(|text| text.parse().ok()) {
                    seen.entry((*writer, n)).or_insert(at);
                }
            }
        }
        tokio::time::sleep(EVERY).await;
    };
    connection.abort();
    ended
}
