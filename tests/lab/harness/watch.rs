//! Watchers: threads that look at one thing every 20 ms and keep all they saw with both times of each look.

use super::net::at;
use super::node::{STATUS_PORT, http_here, text_at};
use super::sys::{Fail, Outcome, be_prompt, enter_netns, millis, ms, now};
use super::witness::{MARKER, SERVICE, addresses_in, ask_here, marker_in};
use hickory_proto::rr::RecordType;
use portcullis::base::time::Instant;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// One look: asked at `asked`, answered at `answered`; the truth of it lies in between.
#[derive(Debug, Clone)]
pub struct Look<T> {
    pub asked: Instant,
    pub answered: Instant,
    pub seen: T,
}

/// A thread that looks until it is dropped or finished. Looks that fail are kept as `None`.
#[derive(Debug)]
pub struct Watcher<T> {
    looks: Arc<Mutex<Vec<Look<Option<T>>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Clone + Send + 'static> Watcher<T> {
    /// Looks every 20 ms from inside the namespace.
    pub fn start(ns: &str, mut look: impl FnMut() -> Outcome<T> + Send + 'static) -> Outcome<Watcher<T>> {
        let looks = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ns, their_looks, their_stop) = (ns.to_owned(), looks.clone(), stop.clone());
        let body = move || {
            if enter_netns(&ns).is_err() {
                return;
            }
            be_prompt();
            while !their_stop.load(Ordering::Relaxed) {
                let asked = now();
                let seen = look().ok();
                let one = Look { asked, answered: now(), seen };
                their_looks.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                std::thread::sleep(millis(20));
            }
        };
        let thread = std::thread::Builder::new().name("watcher".to_owned()).spawn(body)?;
        Ok(Watcher { looks, stop, thread: Some(thread) })
    }

    /// All looks so far.
    pub fn looks(&self) -> Vec<Look<Option<T>>> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn finish(mut self) -> Vec<Look<Option<T>>> {
        self.halt();
        self.looks()
    }

    /// The first look asked after the moment whose answer satisfies.
    pub fn first_after(&self, moment: Instant, good: impl Fn(&T) -> bool) -> Option<Look<T>> {
        self.looks().into_iter().filter(|look| look.asked >= moment).find_map(|look| {
            let seen = look.seen.filter(|seen| good(seen))?;
            Some(Look { asked: look.asked, answered: look.answered, seen })
        })
    }
}

impl<T> Watcher<T> {
    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<T> Drop for Watcher<T> {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Watches whether a node says `role` = `active`; asked from `ns` at the node's address.
pub fn roles(ns: &str, address: &str) -> Outcome<Watcher<String>> {
    let target: SocketAddr = at(address, STATUS_PORT).parse()?;
    Watcher::start(ns, move || {
        let (_, body) = http_here(target, "/status.json")?;
        Ok(text_at(&serde_json::from_str::<Value>(&body)?, "/role"))
    })
}

/// Watches `/active` as a load balancer would: true while it answers 200.
pub fn active_page(ns: &str, address: &str) -> Outcome<Watcher<bool>> {
    let target: SocketAddr = at(address, STATUS_PORT).parse()?;
    Watcher::start(ns, move || Ok(http_here(target, "/active")?.0 == 200))
}

/// Watches the record: the service's addresses and the marker's text.
pub fn record(ns: &str, dns: &str) -> Outcome<Watcher<(Vec<String>, String)>> {
    let server = at(dns, 53);
    Watcher::start(ns, move || {
        let addresses = addresses_in(&ask_here(&server, SERVICE, RecordType::A)?);
        let marker = marker_in(&ask_here(&server, MARKER, RecordType::TXT)?).unwrap_or_default();
        Ok((addresses, marker))
    })
}

/// Fails if the looks prove that both nodes were `active` at one moment: one was seen active, then surely later the
/// other, then surely later the first again. (Two looks that overlap prove nothing, and nobody takes over twice here.)
pub fn never_two_active(a: &[Look<Option<String>>], b: &[Look<Option<String>>]) -> Outcome {
    for (first, second) in [(a, b), (b, a)] {
        let active = |looks: &[Look<Option<String>>]| -> Vec<(Instant, Instant)> {
            let kept = looks.iter().filter(|look| look.seen.as_deref() == Some("active"));
            kept.map(|look| (look.asked, look.answered)).collect()
        };
        let (ours, theirs) = (active(first), active(second));
        let (Some(earliest), Some(latest)) = (ours.first(), ours.last()) else { continue };
        let between = theirs.iter().find(|(asked, answered)| *asked > earliest.1 && *answered < latest.0);
        if let Some((asked, _)) = between {
            let text = format!(
                "two nodes said active: one {} ms before and {} ms after the other did",
                ms(earliest.1, *asked),
                ms(*asked, latest.0)
            );
            return Err(Fail(text));
        }
    }
    Ok(())
}
