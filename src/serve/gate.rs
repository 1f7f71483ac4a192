//! The gate: an atomic deadline. The only link between the guard and the data plane.
//!
//! The guard extends it with a deadline of CLOCK_BOOTTIME; every forward, in either direction, asks whether that
//! deadline still lies ahead. When the guard falls silent (hung, killed, frozen, the machine suspended) the gate is
//! shut without anybody having to act. What it is NOT: it decides nothing and knows no rule but the deadline.
//!
//! **Invariants:** [`Gate::cut`] cannot fail, queue, or wait for I/O; the store that shuts comes first in it. A
//! session admitted before a cut or a lapse never passes anything again ([`Pass`] carries the generation), even when
//! the gate was extended in the meantime.

mod carry;

use super::slot::{Entry, Slot};
use crate::base::ids::Epoch;
use crate::base::time::Instant;
use std::collections::{HashMap, hash_map};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Reads CLOCK_BOOTTIME; the daemon hands in `io::clock::now`.
pub type ReadClock = fn() -> Instant;

/// Said when a lease ran out and nobody gave a better reason.
const LAPSED: &str = "portcullis: this node no longer serves (its lease ran out)";

/// The one gate of a node. See the module's invariants.
pub struct Gate {
    clock: ReadClock,
    /// Nanoseconds of the deadline; zero: shut.
    serve_until: AtomicU64,
    /// Nanoseconds of the moment until which clients stay although nothing passes; zero: they do not.
    suspended_until: AtomicU64,
    suspensions: AtomicU64,
    /// What the guard opened it for; said to the other node, decides nothing here.
    epoch: AtomicU64,
    /// Grows by one with every cut and every lapse that somebody noticed.
    generation: AtomicU64,
    /// The last generation ended by its lease, not by a cut before that.
    ran_out: AtomicBool,
    /// `fence.kernel_gate`: when a lease runs out, the kernel stops passing this host's packets too.
    walled: AtomicBool,
    paused: AtomicBool,
    carry: carry::Carry,
    /// Sockets on which clients are accepted now.
    doors: AtomicU32,
    draining: AtomicBool,
    /// The daemon is ending: nobody is let in any more, and sessions end at their boundary.
    stopping: AtomicBool,
    /// Connections that are coming in or taking their leave: not in the book, and not to be torn.
    in_passage: AtomicU32,
    /// Wakes every listener and login at once; sessions are woken by their slots.
    view: watch::Sender<View>,
    /// By the process number and the key that the client was given.
    slots: Mutex<HashMap<(i32, u32), Arc<Slot>>>,
    sessions_total: AtomicU64,
    auth_failures: AtomicU64,
}

/// What sessions are woken for.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Why the last generation ended.
    pub(crate) reason: Arc<str>,
    /// Why sessions at a transaction boundary end now.
    pub(crate) drain: Option<Arc<str>>,
    /// What is said to those who cannot wait out the suspension.
    pub(crate) suspended: Arc<str>,
}

impl Gate {
    /// A gate that is shut.
    pub fn new(clock: ReadClock) -> Arc<Gate> {
        Arc::new(Gate {
            clock,
            serve_until: AtomicU64::new(0),
            suspended_until: AtomicU64::new(0),
            suspensions: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            ran_out: AtomicBool::new(false),
            walled: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            carry: carry::Carry::default(),
            doors: AtomicU32::new(0),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            in_passage: AtomicU32::new(0),
            view: watch::Sender::new(View { reason: LAPSED.into(), drain: None, suspended: LAPSED.into() }),
            slots: Mutex::new(HashMap::new()),
            sessions_total: AtomicU64::new(0),
            auth_failures: AtomicU64::new(0),
        })
    }

    /// The kernel gate stands before this one.
    pub fn stand_behind_the_wall(&self) {
        self.walled.store(true, Ordering::SeqCst);
    }

    /// The epoch for which it is opened or prolonged next.
    pub fn at_epoch(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::SeqCst);
    }

    /// The epoch it was opened for last.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Opens the gate or prolongs it: it passes until `until`, a deadline on CLOCK_BOOTTIME. Where the former deadline
    /// ran out before, the sessions of that time end: a lapse nobody noticed is still a lapse.
    pub fn extend(&self, until: Instant) {
        let now = (self.clock)().as_nanos();
        let before = self.serve_until.load(Ordering::SeqCst);
        let waited = self.suspended_until.load(Ordering::SeqCst);
        let was_open = now < before;
        if !was_open && now >= waited && (before != 0 || waited != 0) {
            self.end_generation(LAPSED, true);
        }
        // Somebody may have noted a lapse since we looked; then its listeners are closed and wait to be woken.
        let replaced = self.serve_until.swap(until.as_nanos(), Ordering::SeqCst);
        self.suspended_until.store(0, Ordering::SeqCst);
        if !was_open || replaced == 0 {
            self.wake();
        }
    }

    /// Shuts the gate and ends all sessions now. `reason` is what their clients read (FATAL 57P01). Idempotent.
    pub fn cut(&self, reason: &str) {
        // The cut itself; what follows is courtesy.
        let before = self.serve_until.swap(0, Ordering::SeqCst);
        let waited = self.suspended_until.swap(0, Ordering::SeqCst);
        if before != 0 || waited != 0 {
            self.end_generation(reason, (self.clock)().as_nanos() >= before.max(waited));
        }
    }

    /// Shuts an open gate, or goes on with that, because PostgreSQL is away: nothing passes, but sessions that need
    /// nothing of it, or only begin to, stay until `until`, the lease's deadline. `reason` is what the others read
    /// (FATAL 57P01). A gate that is shut otherwise stays so.
    pub fn suspend(&self, until: Instant, reason: &str) {
        // Means nothing while the gate passes: so there is no moment in which a client may neither pass nor wait.
        let waited = self.suspended_until.swap(until.as_nanos(), Ordering::SeqCst);
        // The cut itself, as in `cut`.
        let before = self.serve_until.swap(0, Ordering::SeqCst);
        let last = before.max(waited);
        if last == 0 {
            self.suspended_until.store(0, Ordering::SeqCst);
            return;
        }
        if before != 0 {
            self.suspensions.fetch_add(1, Ordering::SeqCst);
            self.view.send_modify(|view| view.suspended = reason.into());
            self.wake_sessions();
        }
        if (self.clock)().as_nanos() >= last {
            self.end_generation(LAPSED, true);
        }
    }

    /// Nothing passes, but clients stay.
    pub(crate) fn is_suspended(&self) -> bool {
        let until = self.suspended_until.load(Ordering::SeqCst);
        until != 0 && (self.clock)().as_nanos() < until && !self.passes()
    }

    /// How often it was suspended: after each another PostgreSQL may answer.
    pub(crate) fn suspensions(&self) -> u64 {
        self.suspensions.load(Ordering::SeqCst)
    }

    /// Clients are held at their next transaction boundary, and new ones before their login.
    pub(crate) fn holds_clients(&self) -> bool {
        self.is_paused() || self.is_suspended()
    }

    /// Ends the sessions of a lease that ran out. Called by the listeners' watch, harmless at any time.
    pub(crate) fn note_lapse(&self, reason: &str) {
        for deadline in [&self.serve_until, &self.suspended_until] {
            let before = deadline.load(Ordering::SeqCst);
            if before != 0
                && (self.clock)().as_nanos() >= before
                && deadline.compare_exchange(before, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            {
                self.end_generation(reason, true);
            }
        }
    }

    fn end_generation(&self, reason: &str, ran_out: bool) {
        self.ran_out.store(ran_out, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.draining.store(false, Ordering::SeqCst);
        self.view.send_modify(|view| {
            view.reason = reason.into();
            view.drain = None;
        });
        self.wake_sessions();
    }

    /// The daemon is going to end: no client is accepted any more, and every session ends (FATAL 57P01, `reason`) at
    /// its next transaction boundary. For good; a cut ends the others.
    pub fn stop(&self, reason: &str) {
        self.stopping.store(true, Ordering::SeqCst);
        self.end_sessions_at_boundary(reason);
    }

    /// Whether [`Gate::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Nobody is there any more, and no socket for anybody to come by.
    pub fn is_deserted(&self) -> bool {
        // Who comes in is counted before the socket closes and until it is in the book; who leaves before it is out of
        // the book: looked for on both sides of it.
        let nobody_passes = || self.in_passage.load(Ordering::SeqCst) == 0;
        !self.is_listening() && nobody_passes() && self.slots().is_empty() && nobody_passes()
    }

    /// Counts a connection that is coming in or taking its leave, until this is dropped.
    pub(crate) fn passage(self: &Arc<Self>) -> Passage {
        self.in_passage.fetch_add(1, Ordering::SeqCst);
        Passage(Arc::clone(self))
    }

    /// Returns when the daemon is ending.
    pub(crate) async fn stopped(&self) {
        let mut view = self.watch();
        // The sender lives in the gate, which the caller holds: it cannot be gone.
        let _ = view.wait_for(|_| self.is_stopping()).await;
    }

    /// Everyone looks again.
    pub(crate) fn wake(&self) {
        self.view.send_modify(|_| {});
        self.wake_sessions();
    }

    pub(crate) fn wake_sessions(&self) {
        self.slots().values().for_each(|slot| slot.wake());
    }

    /// Whether the deadline lies ahead. Sessions ask their [`Pass`], which asks this and more.
    pub fn passes(&self) -> bool {
        (self.clock)().as_nanos() < self.serve_until.load(Ordering::SeqCst)
    }

    /// Whether a client that connects now finds a socket. Open is told to people only then.
    pub fn is_listening(&self) -> bool {
        self.doors.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn door_opened(&self) {
        self.doors.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn door_closed(&self) {
        self.doors.fetch_sub(1, Ordering::SeqCst);
    }

    /// Holds clients at their next transaction boundary, new ones before their login.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
        self.carry.hold();
        self.wake();
    }

    /// Lets held clients go.
    pub fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.carry.forget();
        let goes_on = self.is_stopping();
        self.draining.store(goes_on, Ordering::SeqCst);
        self.view.send_modify(|view| view.drain = view.drain.take().filter(|_| goes_on));
        self.wake_sessions();
    }

    /// Whether clients are held.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Ends (FATAL 57P01, `reason`) every session that is at a transaction boundary or comes to one, until
    /// [`Gate::resume`] or the gate is cut.
    pub fn end_sessions_at_boundary(&self, reason: &str) {
        self.view.send_modify(|view| view.drain = Some(reason.into()));
        self.draining.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Sends a CancelRequest to the backend of every busy session, from that session's own task.
    pub fn cancel_busy(&self) {
        self.slots().values().filter(|slot| slot.busy.load(Ordering::SeqCst)).for_each(|slot| slot.ask_to_cancel());
    }

    /// Sessions logged in.
    pub fn sessions(&self) -> u64 {
        u64::try_from(self.slots().len()).unwrap_or(u64::MAX)
    }

    /// Sessions inside a transaction or with a request in flight.
    pub fn busy(&self) -> u64 {
        let busy = self.slots().values().filter(|slot| slot.busy.load(Ordering::Relaxed)).count();
        u64::try_from(busy).unwrap_or(u64::MAX)
    }

    /// Sessions logged in since the start.
    pub fn sessions_total(&self) -> u64 {
        self.sessions_total.load(Ordering::Relaxed)
    }

    /// Logins refused since the start, for a wrong password or by a rule.
    pub fn auth_failures(&self) -> u64 {
        self.auth_failures.load(Ordering::Relaxed)
    }

    pub(crate) fn count_auth_failure(&self) {
        self.auth_failures.fetch_add(1, Ordering::Relaxed);
    }

    /// The deadline, also of a suspension; in the past or zero when shut.
    pub(crate) fn deadline(&self) -> Instant {
        let waited = self.suspended_until.load(Ordering::SeqCst);
        Instant::from_nanos(self.serve_until.load(Ordering::SeqCst).max(waited))
    }

    pub(crate) fn now(&self) -> Instant {
        (self.clock)()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Admits a connection for as long as this generation lasts; `None`: shut. A suspended gate admits who will wait.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Pass> {
        // The generation first: a cut in between leaves a pass that is already over.
        let generation = self.generation.load(Ordering::SeqCst);
        (self.passes() || self.is_suspended()).then(|| Pass { gate: Arc::clone(self), generation })
    }

    /// Enters a session in the book; it leaves when the entry is dropped. `None`: another has that number and key.
    pub(crate) fn enter(self: &Arc<Self>, slot: Slot) -> Option<Entry> {
        let slot = Arc::new(slot);
        match self.slots().entry((slot.pid, slot.key)) {
            hash_map::Entry::Occupied(_) => return None,
            hash_map::Entry::Vacant(place) => place.insert(Arc::clone(&slot)),
        };
        self.sessions_total.fetch_add(1, Ordering::Relaxed);
        Some(Entry { gate: Arc::clone(self), slot })
    }

    pub(crate) fn leave(&self, slot: &Slot) {
        self.slots().remove(&(slot.pid, slot.key));
    }

    /// The session whose client was given this number and key.
    pub(crate) fn find(&self, pid: i32, key: &[u8]) -> Option<Arc<Slot>> {
        let key = u32::from_be_bytes(key.try_into().ok()?);
        self.slots().get(&(pid, key)).cloned()
    }

    /// Whether this session is still in the book.
    pub(crate) fn has(&self, slot: &Arc<Slot>) -> bool {
        self.slots().get(&(slot.pid, slot.key)).is_some_and(|found| Arc::ptr_eq(found, slot))
    }

    /// Every session, for those who look them over.
    pub(crate) fn all_slots(&self) -> Vec<Arc<Slot>> {
        self.slots().values().cloned().collect()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<(i32, u32), Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is coming in or taking its leave.
pub(crate) struct Passage(Arc<Gate>);

impl Drop for Passage {
    fn drop(&mut self) {
        self.0.in_passage.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A connection's right to be served, over with the generation it was given in.
#[derive(Clone)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    generation: u64,
}

impl Pass {
    /// Asked before every forward, in both directions; for an answer, after it was read from PostgreSQL.
    pub(crate) fn passes(&self) -> bool {
        !self.is_over() && self.gate.passes()
    }

    /// Whether its time ended, as far as somebody noticed. Cheaper than [`Pass::passes`], and no proof.
    pub(crate) fn is_over(&self) -> bool {
        self.gate.generation.load(Ordering::SeqCst) != self.generation
    }

    /// Whether it passes, or its client may wait until it does again.
    pub(crate) fn stands(&self) -> bool {
        // Asked once more: between the two a suspension may have ended, with the gate open again.
        !self.is_over() && (self.gate.passes() || self.gate.is_suspended() || self.gate.passes())
    }

    /// Why it passes no more.
    pub(crate) fn reason(&self) -> Arc<str> {
        match () {
            () if self.is_over() => Arc::clone(&self.gate.view.borrow().reason),
            // It passes again, and this one's backend is of before.
            () if self.gate.is_suspended() || self.gate.passes() => Arc::clone(&self.gate.view.borrow().suspended),
            () => LAPSED.into(),
        }
    }

    /// It is over, and no word gets out to the client any more: the kernel gate shut with the lease. A cut before its
    /// time leaves the kernel gate open for a last word.
    pub(crate) fn is_walled_off(&self) -> bool {
        let gate = &self.gate;
        let ran_out = if self.is_over() { gate.ran_out.load(Ordering::SeqCst) } else { !self.stands() };
        ran_out && gate.walled.load(Ordering::SeqCst)
    }

    /// Whether both were given in one generation.
    pub(crate) fn is_of(&self, other: &Pass) -> bool {
        self.generation == other.generation
    }

    /// Returns when it passes no more, as far as somebody noticed.
    pub(crate) async fn ended(&self) {
        let mut view = self.gate.watch();
        // The sender lives in the gate, which we hold: it cannot be gone.
        let _ = view.wait_for(|_| self.is_over()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Duration;
    use std::cell::Cell;

    thread_local!(static NOW: Cell<u64> = const { Cell::new(1_000) });
    fn clock() -> Instant {
        Instant::from_nanos(NOW.get())
    }
    fn at(nanos: u64) -> Instant {
        NOW.set(nanos);
        Instant::from_nanos(nanos)
    }

    #[test]
    fn a_gate_dies_of_silence() {
        let gate = Gate::new(clock);
        assert!(!gate.passes() && gate.admit().is_none(), "shut at birth");
        gate.extend(at(1_000) + Duration::from_nanos(500));
        let pass = gate.admit().expect("open");
        at(1_499);
        assert!(gate.passes() && pass.passes());
        at(1_500);
        assert!(!gate.passes() && !pass.passes(), "the deadline itself is too late");
    }

    #[test]
    fn a_cut_ends_what_was_admitted_even_when_extended_at_once() {
        let gate = Gate::new(clock);
        gate.extend(at(1_000) + Duration::from_secs(1));
        let pass = gate.admit().expect("open");
        gate.cut("because");
        gate.cut("again");
        assert!(!gate.passes());
        gate.extend(at(1_001) + Duration::from_secs(1));
        assert!(gate.passes() && gate.admit().is_some_and(|new| new.passes()));
        assert!(!pass.passes());
        assert_eq!(&*pass.reason(), "because");
    }

    #[test]
    fn a_lapse_nobody_noticed_is_still_a_lapse() {
        let gate = Gate::new(clock);
        gate.extend(at(1_000) + Duration::from_nanos(10));
        let pass = gate.admit().expect("open");
        at(2_000);
        gate.extend(Instant::from_nanos(9_000));
        assert!(gate.passes() && !pass.passes());
        let second = gate.admit().expect("open");
        gate.note_lapse("early");
        assert!(second.passes(), "no lapse yet");
        gate.extend(Instant::from_nanos(10_000));
        assert!(second.passes(), "prolonging ends nobody");
        at(10_000);
        gate.note_lapse("late");
        assert!(!second.passes());
        assert_eq!(&*second.reason(), "late");
    }

    #[test]
    fn a_suspended_gate_passes_nothing_and_keeps_its_sessions_until_the_deadline() {
        let gate = Gate::new(clock);
        gate.suspend(at(1_000) + Duration::from_secs(1), "away");
        assert!(!gate.is_suspended() && gate.admit().is_none(), "what was shut stays shut");
        gate.extend(Instant::from_nanos(2_000));
        let pass = gate.admit().expect("open");
        gate.suspend(Instant::from_nanos(2_000), "away");
        assert!(!gate.passes() && !pass.passes() && !pass.is_over() && pass.stands());
        assert_eq!(&*pass.reason(), "away");
        let newcomer = gate.admit().expect("who comes now waits");
        // Prolonged with the lease, and open again: nobody was ended.
        at(1_900);
        gate.suspend(Instant::from_nanos(3_000), "away");
        at(2_500);
        assert!(pass.stands() && !pass.passes());
        gate.extend(Instant::from_nanos(4_000));
        assert!(pass.passes() && newcomer.passes() && !gate.is_suspended());
        // It dies of silence as an open one does, noticed or not.
        gate.suspend(Instant::from_nanos(4_000), "away");
        at(4_000);
        assert!(!pass.stands() && gate.admit().is_none());
        gate.note_lapse("late");
        assert!(pass.is_over());
        assert_eq!(&*pass.reason(), "late");
        gate.extend(Instant::from_nanos(5_000));
        let second = gate.admit().expect("open");
        gate.suspend(Instant::from_nanos(5_000), "away");
        at(5_000);
        gate.extend(Instant::from_nanos(6_000));
        assert!(second.is_over(), "a lapse nobody noticed");
        // A cut ends who waits.
        let third = gate.admit().expect("open");
        gate.suspend(Instant::from_nanos(6_000), "away");
        gate.cut("because");
        assert!(third.is_over() && !gate.is_suspended() && gate.admit().is_none());
        assert_eq!(&*third.reason(), "because");
    }
}
