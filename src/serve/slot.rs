//! One session as others may see it: whom it serves, which backend it has now, and what it is asked to do.
//!
//! What it is NOT: no bytes pass here, and nobody but the session's own task ends it.
//!
//! **Invariant:** a cancel request is meant for a backend only while the session has it. Who lets a backend go takes it
//! out of the slot first and then looks whether requests are on their way; who sends one counts it first and then looks
//! which backend it is for. So one of the two always sees the other, and no request hits the backend's next user.

use super::gate::Gate;
use crate::base::time::Instant;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

/// Why a session is to end, as others asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Order {
    /// `kill`.
    Kill = 1,
    /// `pool.client_idle_timeout`.
    Idle,
    /// `pool.idle_in_transaction_timeout`.
    IdleInTransaction,
}

/// What a session is doing, for those who look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Doing {
    Idle = 0,
    /// Waits for a backend.
    Waiting,
    /// A request is in flight.
    Active,
    /// In a transaction, nothing in flight.
    IdleInTransaction,
}

/// One session.
pub(crate) struct Slot {
    /// What the client was given for cancel requests; the process number is PostgreSQL's own in session mode.
    pub(crate) pid: i32,
    pub(crate) key: u32,
    pub(crate) user: Arc<str>,
    pub(crate) database: Arc<str>,
    pub(crate) peer: SocketAddr,
    pub(crate) tls: bool,
    pub(crate) since: Instant,
    /// PostgreSQL's socket, for cancel requests.
    pub(crate) door: Arc<PathBuf>,
    /// In a transaction or with a request in flight.
    pub(crate) busy: AtomicBool,
    /// R4: the next success may be a commit whose wait for the standby was cancelled.
    pub(crate) doubt: AtomicBool,
    /// Cancel requests on their way: PostgreSQL may still act on them, and so the doubt stays.
    pub(crate) cancels: AtomicU32,
    /// The backend's number and key; zero: none.
    backend: AtomicU64,
    doing: AtomicU8,
    /// When it last began or ended to do something, in nanoseconds, as exact as its thread's tick.
    changed: AtomicU64,
    order: AtomicU8,
    /// The last pause of the gate in which it came to rest ([`Gate::hold`]).
    settled: AtomicU64,
    /// The gate asks for a cancel request from the session's own task.
    cancel_asked: AtomicBool,
    /// The client cancelled while it had no backend.
    cancelled: AtomicBool,
    /// The session's own task; it stays the same.
    waker: OnceLock<Waker>,
}

/// Whom a slot is for.
pub(crate) struct Who {
    pub(crate) user: Arc<str>,
    pub(crate) database: Arc<str>,
    pub(crate) peer: SocketAddr,
    pub(crate) tls: bool,
}

impl Slot {
    pub(crate) fn new(pid: i32, key: u32, who: Who, since: Instant, door: Arc<PathBuf>) -> Slot {
        Slot {
            pid,
            key,
            user: who.user,
            database: who.database,
            peer: who.peer,
            tls: who.tls,
            since,
            door,
            busy: AtomicBool::new(false),
            doubt: AtomicBool::new(false),
            cancels: AtomicU32::new(0),
            backend: AtomicU64::new(0),
            doing: AtomicU8::new(0),
            changed: AtomicU64::new(since.as_nanos()),
            order: AtomicU8::new(0),
            settled: AtomicU64::new(0),
            cancel_asked: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            waker: OnceLock::new(),
        }
    }

    pub(crate) fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    /// Its own task is to be woken. Said once, before it first looks.
    pub(crate) fn register(&self, waker: &Waker) {
        let _ = self.waker.set(waker.clone());
    }

    /// The session has this backend from now on.
    pub(crate) fn link(&self, pid: i32, key: u32) {
        let both = (u64::from(pid.cast_unsigned()) << 32) | u64::from(key);
        self.backend.store(both, Ordering::SeqCst);
    }

    /// Takes the backend out. `false`: a cancel request is on its way to it, and it stays.
    pub(crate) fn unlink(&self) -> bool {
        let backend = self.backend.swap(0, Ordering::SeqCst);
        let free = self.cancels.load(Ordering::SeqCst) == 0;
        if !free {
            self.backend.store(backend, Ordering::SeqCst);
        }
        free
    }

    /// The backend's number and key.
    pub(crate) fn backend(&self) -> Option<(i32, u32)> {
        let both = self.backend.load(Ordering::SeqCst);
        let halves = (u32::try_from(both >> 32).ok()?.cast_signed(), u32::try_from(both & 0xffff_ffff).ok()?);
        (both != 0).then_some(halves)
    }

    /// Everything asked for was answered: where no cancel request is on its way, none can be for what comes.
    pub(crate) fn settle_doubt(&self) {
        if self.doubt.load(Ordering::Relaxed) && self.cancels.load(Ordering::SeqCst) == 0 {
            self.doubt.store(false, Ordering::SeqCst);
            // One that came in between was counted before it raised the doubt that we may just have taken.
            if self.cancels.load(Ordering::SeqCst) > 0 {
                self.doubt.store(true, Ordering::SeqCst);
            }
        }
    }

    pub(crate) fn set_doing(&self, doing: Doing, now: Instant) {
        self.doing.store(doing as u8, Ordering::Relaxed);
        self.changed.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(crate) fn doing(&self) -> (Doing, Instant) {
        let doing = match self.doing.load(Ordering::Relaxed) {
            0 => Doing::Idle,
            1 => Doing::Waiting,
            2 => Doing::Active,
            _ => Doing::IdleInTransaction,
        };
        (doing, Instant::from_nanos(self.changed.load(Ordering::Relaxed)))
    }

    /// It has come to rest in this pause and begins nothing before the pause is over.
    pub(crate) fn settle(&self, hold: u64) {
        self.settled.store(hold, Ordering::SeqCst);
    }

    pub(crate) fn settled(&self) -> u64 {
        self.settled.load(Ordering::SeqCst)
    }

    /// Asks the session to end.
    pub(crate) fn give(&self, order: Order) {
        self.order.store(order as u8, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn order(&self) -> Option<Order> {
        match self.order.load(Ordering::Relaxed) {
            1 => Some(Order::Kill),
            2 => Some(Order::Idle),
            3 => Some(Order::IdleInTransaction),
            _ => None,
        }
    }

    /// Takes back an order that came too late.
    pub(crate) fn clear_order(&self) {
        self.order.store(0, Ordering::SeqCst);
    }

    pub(crate) fn ask_to_cancel(&self) {
        self.cancel_asked.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn is_asked_to_cancel(&self) -> bool {
        self.cancel_asked.load(Ordering::Relaxed) && self.cancel_asked.swap(false, Ordering::SeqCst)
    }

    /// A cancel request came while the client waits for a backend.
    pub(crate) fn cancel_wait(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn is_wait_cancelled(&self) -> bool {
        self.cancelled.swap(false, Ordering::SeqCst)
    }
}

/// A session's place in the book.
pub(crate) struct Entry {
    pub(crate) gate: Arc<Gate>,
    pub(crate) slot: Arc<Slot>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.gate.leave(&self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Slot {
        let who = Who { user: "u".into(), database: "d".into(), peer: ([127, 0, 0, 1], 1).into(), tls: false };
        Slot::new(1, 2, who, Instant::ZERO, Arc::default())
    }

    #[test]
    fn a_backend_is_kept_while_a_cancel_request_is_on_its_way() {
        let slot = slot();
        slot.link(-7, u32::MAX);
        assert_eq!(slot.backend(), Some((-7, u32::MAX)));
        slot.cancels.fetch_add(1, Ordering::SeqCst);
        assert!(!slot.unlink());
        assert_eq!(slot.backend(), Some((-7, u32::MAX)));
        slot.cancels.fetch_sub(1, Ordering::SeqCst);
        assert!(slot.unlink());
        assert_eq!(slot.backend(), None);
    }

    #[test]
    fn a_doubt_stays_while_a_cancel_request_is_on_its_way() {
        let slot = slot();
        slot.cancels.fetch_add(1, Ordering::SeqCst);
        slot.doubt.store(true, Ordering::SeqCst);
        slot.settle_doubt();
        assert!(slot.doubt.load(Ordering::SeqCst));
        slot.cancels.fetch_sub(1, Ordering::SeqCst);
        slot.settle_doubt();
        assert!(!slot.doubt.load(Ordering::SeqCst));
    }

    #[test]
    fn an_order_is_obeyed_until_it_is_taken_back() {
        let slot = slot();
        slot.give(Order::Idle);
        assert_eq!(slot.order(), Some(Order::Idle));
        slot.clear_order();
        assert_eq!(slot.order(), None);
    }
}
