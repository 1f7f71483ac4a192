//! Whose turn it is: a few labs stand at once, because a lab mostly waits; who measures what a busy machine would spoil
//! has it alone. It is NOT what keeps labs apart: their names and namespaces do.
//!
//! `cargo test --test lab -- --test-threads 100`, as tests/run.sh does, lets every test wait here, where waiting costs
//! nothing; with fewer threads less is done at once, and nothing else changes. `PORTCULLIS_LABS=1` has one at a time.

use crate::harness::sys::{millis, ms, now, pause};
use portcullis::base::time::Instant;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How many labs stand at once on a machine of two cores.
const LABS: usize = 2;

/// Those that last longest (30 to 80 s) go first, or the others would wait for them in the end.
const LONG: [&str; 27] = [
    "dnssilent",
    "dnsnothing",
    "pauses",
    "busy",
    "observed",
    "byhand",
    "random",
    "boot",
    "sixknot",
    "viponly",
    "thirdahead",
    "third",
    "rejoins",
    "six",
    "sixown",
    "race",
    "dead",
    "crashpromote",
    "carried",
    "drill",
    "fencing",
    "carried-back",
    "doctor-pair",
    "blocks",
    "guidebind",
    "walk",
    "night",
];

/// A place in the queue: those that want the machine alone come last, the long ones first, else who came first.
type Place = (bool, usize, u64);

#[derive(Debug)]
struct Turns {
    begun: Option<Instant>,
    waiting: BTreeSet<Place>,
    next: u64,
    standing: Vec<(u64, String)>,
    alone: bool,
    done: usize,
}

static TURNS: Mutex<Turns> =
    Mutex::new(Turns { begun: None, waiting: BTreeSet::new(), next: 0, standing: Vec::new(), alone: false, done: 0 });
static CHANGED: Condvar = Condvar::new();

/// Held for as long as a lab stands.
#[derive(Debug)]
pub(crate) struct Turn {
    ticket: u64,
    name: String,
    began: Instant,
}

fn turns() -> MutexGuard<'static, Turns> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn labs() -> usize {
    let wanted = std::env::var("PORTCULLIS_LABS").ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or(LABS).max(1)
}

impl Turn {
    /// Waits for a turn beside others, or for one alone.
    pub(crate) fn wait(name: &str, alone: bool) -> Turn {
        let labs = labs();
        let mut state = turns();
        let ticket = state.next;
        state.next += 1;
        let place = (alone, LONG.iter().position(|long| *long == name).unwrap_or(LONG.len()), ticket);
        state.waiting.insert(place);
        // Let the others come, so that there is an order.
        drop(state);
        pause(millis(100));
        state = turns();
        loop {
            let room = if alone { state.standing.is_empty() } else { state.standing.len() < labs && !state.alone };
            if room && state.waiting.first() == Some(&place) {
                break;
            }
            state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.remove(&place);
        state.alone = alone;
        state.standing.push((ticket, name.to_owned()));
        let began = now();
        state.begun.get_or_insert(began);
        state.tell(&format!("{name} begins{}", if alone { ", alone" } else { "" }));
        CHANGED.notify_all();
        Turn { ticket, name: name.to_owned(), began }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = turns();
        state.standing.retain(|(ticket, _)| *ticket != self.ticket);
        state.alone = false;
        state.done += 1;
        let how = if std::thread::panicking() { "FAILED" } else { "ended" };
        state.tell(&format!("{} {how} after {:.1} s", self.name, ms(self.began, now()) as f64 / 1000.0));
        CHANGED.notify_all();
    }
}

impl Turns {
    /// A line of progress, past the test runner, which keeps what tests print until they fail.
    fn tell(&self, what: &str) {
        let at = self.begun.map_or(0, |begun| ms(begun, now()) / 1000);
        let names: Vec<&str> = self.standing.iter().map(|(_, name)| name.as_str()).collect();
        let line = format!(
            "lab {:2}:{:02}  {what}; {} done, {} wait, standing: {}\n",
            at / 60,
            at % 60,
            self.done,
            self.waiting.len(),
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        );
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
