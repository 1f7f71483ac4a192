//! The hand of the second wall: one thread that gives `io::kernel_gate` the newest word of the guard.
//!
//! A thread, not a task: nothing that keeps the runtime busy may delay a renewal. It is NOT where a lease is judged.
//!
//! **Invariants:** an older word is never applied after a newer one; the table goes away with this value, at a clean
//! stop and at a start that failed, and stays when the process dies (then its element runs out by itself). A cut leaves
//! the wall open for [`LAST_WORDS`] at most, never longer than it was: the gate passes nothing any more, and each
//! client shall still read why.

use crate::app::hands::LAST_WORDS;
use crate::base::config::{Config, Node};
use crate::base::time::{Duration, Instant};
use crate::io::clock;
use crate::io::kernel_gate::{KernelGate, Plan, Stood, remove_leftover};
use std::net::{IpAddr, ToSocketAddrs};
use std::thread::JoinHandle;
use tokio::sync::watch;

/// A table that somebody took away stands again after so long, also on a node that has nothing to renew.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A change of the wall that took longer is made again; usual is a tenth of a millisecond.
const LATE: Duration = Duration::from_millis(20);
const TRIES: u32 = 3;

/// What the thread is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Until(Option<Instant>),
    /// The clean end.
    TakeAway,
}

/// Where [`crate::engine::turn::Effect::KernelGate`] goes.
#[derive(Debug, Clone)]
pub struct WallHand(watch::Sender<Word>);

impl WallHand {
    /// Traffic passes the kernel until then. The newest counts; nothing waits.
    pub fn set(&self, until: Option<Instant>) {
        self.0.send_if_modified(|word| {
            // Nothing is said after the end, nor the same twice: the guard says it with every turn.
            let told = *word != Word::TakeAway && *word != Word::Until(until);
            if told {
                *word = Word::Until(until);
            }
            told
        });
    }
}

/// The standing wall; dropping it takes the table away and waits until that is done.
#[derive(Debug)]
pub struct Wall {
    hand: WallHand,
    thread: Option<JoinHandle<()>>,
}

impl Wall {
    /// Makes the table, shut, where the configuration wants one; else takes away what a former life left. Must be
    /// called inside a tokio runtime.
    ///
    /// # Errors
    /// A wall that is configured and cannot be made: the daemon does not start without it.
    pub fn raise(config: &Config, node: &Node) -> Result<Option<Wall>, String> {
        if !config.fence.kernel_gate {
            match remove_leftover() {
                Ok(true) => tracing::info!("the kernel gate that a former life left was taken away"),
                Ok(false) => {}
                Err(why) => tracing::warn!("{why}"),
            }
            return Ok(None);
        }
        let plan = plan(config, node);
        tracing::info!(
            "the kernel gate stands before ports {:?} and {}; PostgreSQL's stays open to {:?}",
            plan.gate,
            plan.postgres,
            plan.nodes
        );
        let gate = KernelGate::new(plan)?;
        let (words, mut heard) = watch::channel(Word::Until(None));
        let runtime = tokio::runtime::Handle::current();
        let work = move || keep(gate, || runtime.block_on(next(&mut heard)));
        let thread = std::thread::Builder::new()
            .name("kernel-gate".to_owned())
            .spawn(work)
            .map_err(|error| format!("the thread of the kernel gate cannot be started: {error}"))?;
        Ok(Some(Wall { hand: WallHand(words), thread: Some(thread) }))
    }

    /// For the hands.
    pub fn hand(&self) -> WallHand {
        self.hand.clone()
    }
}

impl Drop for Wall {
    fn drop(&mut self) {
        self.hand.0.send_replace(Word::TakeAway);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// The next word; the same again after [`LOOK_EVERY`].
async fn next(heard: &mut watch::Receiver<Word>) -> Word {
    match tokio::time::timeout(LOOK_EVERY, heard.changed()).await {
        Ok(Err(_)) => Word::TakeAway,
        Ok(Ok(())) | Err(_) => *heard.borrow_and_update(),
    }
}

/// Applies words until the end. A trouble is told once, not at each renewal.
fn keep(mut gate: KernelGate, mut next: impl FnMut() -> Word) {
    let mut said = None;
    let mut open_until = Instant::ZERO;
    while let Word::Until(until) = next() {
        let now = clock::now();
        open_until = match until {
            Some(until) => until,
            None => open_until.min(now + LAST_WORDS),
        };
        match set_in_time(open_until, clock::now, |left| gate.set(Some(left))) {
            Ok(stood) => {
                if stood == Stood::No {
                    tracing::warn!("somebody took the kernel gate's table away; it stands again");
                }
                if said.take().is_some() {
                    tracing::info!("the kernel gate obeys again");
                }
            }
            Err(why) if said.as_ref() == Some(&why) => {}
            Err(why) => {
                tracing::warn!("{why}");
                said = Some(why);
            }
        }
    }
    if let Err(why) = gate.remove() {
        tracing::warn!("{why}");
    }
}

/// Opens the wall until then. The kernel counts from when it gets to it: where this thread was stopped in between (the
/// machine, the process, another's ruleset being loaded), it is said again at once, shorter.
fn set_in_time<T>(
    until: Instant,
    now: impl Fn() -> Instant,
    mut set: impl FnMut(Duration) -> Result<T, String>,
) -> Result<T, String> {
    let mut again = TRIES;
    loop {
        let begun = now();
        let stood = set(until.since(begun))?;
        again -= 1;
        // On a machine that is always late the next word matters more: it may be a cut.
        if now().since(begun) <= LATE || until <= begun || again == 0 {
            return Ok(stood);
        }
    }
}

/// Which ports, and who is let through to PostgreSQL in any case.
fn plan(config: &Config, node: &Node) -> Plan {
    let mut nodes: Vec<IpAddr> = Vec::new();
    for other in config.nodes.iter().filter(|other| other.name != node.name) {
        nodes.extend(&other.addresses);
        match (other.postgres.host.as_str(), other.postgres.port).to_socket_addrs() {
            Ok(found) => nodes.extend(found.map(|address| address.ip())),
            Err(error) => tracing::warn!(
                "node.postgres.host {} has no address now ({error}): the kernel gate lets {} reach PostgreSQL only \
                 from {:?}; write an address there",
                other.postgres.host,
                other.name,
                other.addresses
            ),
        }
    }
    nodes.sort_unstable();
    nodes.dedup();
    Plan {
        gate: config.service.listen.iter().map(|listen| listen.port()).collect(),
        postgres: node.postgres.port,
        nodes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// The clock goes on by so many milliseconds while each change is made.
    fn told(until: u64, delays: &[u64]) -> Vec<u64> {
        let ms = |ms: u64| Instant::from_nanos(1_000_000 * ms);
        let (at, mut told) = (Cell::new(0), Vec::new());
        let mut delays = delays.iter();
        let set = |left: Duration| {
            told.push(crate::base::time::millis(left));
            at.set(at.get() + delays.next().expect("not asked again for ever"));
            Ok::<(), String>(())
        };
        set_in_time(ms(until), || ms(at.get()), set).expect("set");
        told
    }

    #[test]
    fn a_wall_that_was_opened_late_is_shortened_at_once() {
        assert_eq!(told(3000, &[1]), [3000]);
        assert_eq!(told(3000, &[500, 1]), [3000, 2500], "another's ruleset was being loaded");
        assert_eq!(told(3000, &[60_000, 1]), [3000, 0], "stopped for a minute: shut");
        assert_eq!(told(3000, &[100; 3]), [3000, 2900, 2800], "always late: then the next word");
        assert_eq!(told(0, &[500]), [0], "shut is shut, however late");
    }
}
