//! The backends of one (user, database) on one data thread: opened when needed, lent to one session at a time, queued
//! for in order.
//!
//! What it is NOT: it moves no bytes of a client and knows no statement. A backend in a state that another client must
//! not see is not given back here; who lent it tidies it up or closes it.
//!
//! Over 600 lines: the queue and what serves it are one thing.
//!
//! **Invariants:** a backend is lent again only in the generation of the gate it was opened in. Whoever waits longest
//! is served first. A ticket that is dropped gives back what it was given.

mod lease;

pub(crate) use lease::Lease;

use super::backend::{self, Backend, NoBackend, Proof};
use super::data::Data;
use super::gate::Pass;
use super::listener::Proxy;
use super::slot::Slot;
use crate::base::config::{self, PoolMode};
use crate::base::time::Instant;
use crate::wire::pg::{Refusal, Startup};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Greetings that a pool keeps.
const MAX_GREETINGS: usize = 64;
/// How long somebody has to wait before it is asked whether backends wait for their standby.
const HELD_UP_AFTER: Duration = Duration::from_secs(1);
/// Time between two lines in the log about clients that got no backend.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// Pause before PostgreSQL is tried again that cannot take a connection just now.
const RETRY: Duration = Duration::from_millis(100);

/// What the commands say about one database, on all threads.
#[derive(Debug, Default)]
pub(crate) struct Database {
    pub(crate) paused: AtomicBool,
    /// Grows with every `reconnect`: backends of an earlier count are not lent again.
    pub(crate) reconnects: AtomicU32,
    /// Sessions logged in.
    pub(crate) clients: Arc<AtomicU32>,
}

/// The [pool] of now, as this thread last heard: read without a lock.
pub(crate) struct Limits {
    heard: RefCell<Arc<config::Pool>>,
    own: RefCell<Rc<config::Pool>>,
}

impl Limits {
    pub(crate) fn new(pool: Arc<config::Pool>) -> Limits {
        Limits { own: RefCell::new(Rc::new((*pool).clone())), heard: RefCell::new(pool) }
    }

    pub(crate) fn get(&self) -> Rc<config::Pool> {
        Rc::clone(&self.own.borrow())
    }

    pub(crate) fn renew(&self, pool: Arc<config::Pool>) {
        if !Arc::ptr_eq(&self.heard.borrow(), &pool) {
            *self.own.borrow_mut() = Rc::new((*pool).clone());
            *self.heard.borrow_mut() = pool;
        }
    }
}

/// What one pool did; written by its thread alone.
#[derive(Debug, Default)]
pub(crate) struct PoolStats {
    pub(crate) clients: AtomicU32,
    pub(crate) waiting: AtomicU32,
    pub(crate) open: AtomicU32,
    pub(crate) idle: AtomicU32,
    pub(crate) transactions: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    /// Nanoseconds that clients waited for a backend, and how many had to.
    pub(crate) waited: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) logins: AtomicU64,
    /// Requests answered to their end, and transactions that came to theirs.
    pub(crate) queries: AtomicU64,
    pub(crate) ended: AtomicU64,
}

/// Adds to a counter of which the caller is the only writer: no locked instruction.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Start-up parameters that backends of one kind share.
pub(crate) type Shape = Rc<Startup>;

/// Settings that differ from what the start-up packet made them, by name; `None`: none.
pub(crate) type Settings = Option<Rc<Pairs>>;
pub(crate) type Pairs = Vec<(String, String)>;

pub(crate) struct Pool {
    data: Weak<Data>,
    proxy: Arc<Proxy>,
    limits: Rc<Limits>,
    pub(crate) database: Arc<Database>,
    pub(crate) stats: Arc<PoolStats>,
    user: Arc<str>,
    database_name: Arc<str>,
    /// The newest proof of the role, for backends opened later.
    proof: RefCell<Proof>,
    idle: RefCell<Vec<Lease>>,
    /// Backends open or being opened.
    open: Cell<u32>,
    /// Of them, those being opened, by shape.
    opening: RefCell<Vec<Shape>>,
    queue: RefCell<VecDeque<Rc<Ticket>>>,
    /// What PostgreSQL says to a client of this shape at its login.
    greetings: RefCell<HashMap<Shape, Rc<[u8]>>>,
    settings: RefCell<Vec<Weak<Pairs>>>,
    shapes: RefCell<Vec<Weak<Startup>>>,
    /// Why PostgreSQL took no more connections lately, in its own words.
    refusal: RefCell<Option<Vec<u8>>>,
    /// When it was last said in the log that a client got no backend.
    complained: Cell<Instant>,
    /// Backends whose commits wait for their standby, as of a moment ago: they do not count against the size.
    held_up: Cell<u32>,
    is_asking: Cell<bool>,
}

/// A place in the queue.
struct Ticket {
    shape: Shape,
    pass: Pass,
    since: Instant,
    /// The same to the nanosecond: who waits at all has time for the clock.
    asked: Instant,
    answer: RefCell<Option<Result<Lease, NoBackend>>>,
    waker: RefCell<Option<Waker>>,
}

impl Ticket {
    fn tell(&self, answer: Result<Lease, NoBackend>) {
        *self.answer.borrow_mut() = Some(answer);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// Who waits for a backend; leaves the queue when dropped.
pub(crate) struct Waiting {
    pool: Rc<Pool>,
    ticket: Rc<Ticket>,
}

impl Waiting {
    /// A backend, or why there is none.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Lease, NoBackend>> {
        if let Some(answer) = self.ticket.answer.borrow_mut().take() {
            return Poll::Ready(answer.map(Lease::lent));
        }
        *self.ticket.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.pool.queue.borrow_mut().retain(|ticket| !Rc::ptr_eq(ticket, &self.ticket));
        self.pool.count_waiting();
        let given = self.ticket.answer.borrow_mut().take();
        if let Some(Ok(lease)) = given {
            self.pool.give_back(lease);
        }
    }
}

/// What a request for a backend gets.
pub(crate) enum Lent {
    Now(Lease),
    Wait(Waiting),
}

impl Pool {
    pub(crate) fn new(data: &Rc<Data>, names: (&str, &str), proof: Proof) -> Rc<Pool> {
        let (user, database) = names;
        let proxy = &data.proxy;
        let pool = Rc::new(Pool {
            data: Rc::downgrade(data),
            proxy: Arc::clone(proxy),
            limits: Rc::clone(&data.limits),
            database: proxy.database(database),
            stats: Arc::default(),
            user: user.into(),
            database_name: database.into(),
            proof: RefCell::new(proof),
            idle: RefCell::default(),
            open: Cell::new(0),
            opening: RefCell::default(),
            queue: RefCell::default(),
            greetings: RefCell::default(),
            settings: RefCell::default(),
            shapes: RefCell::default(),
            refusal: RefCell::default(),
            complained: Cell::new(Instant::ZERO),
            held_up: Cell::new(0),
            is_asking: Cell::new(false),
        });
        proxy.register_pool(names, &pool.stats);
        pool
    }

    /// A client proved the role anew.
    pub(crate) fn renew_proof(&self, proof: Proof) {
        // What lets the gate in where PostgreSQL asks for a password is not forgotten for a client that needed none.
        if proof.has_secret() {
            *self.proof.borrow_mut() = proof;
        }
    }

    /// The newest proof of the role.
    pub(crate) fn proof(&self) -> Proof {
        self.proof.borrow().clone()
    }

    /// One value for equal start-up packets.
    pub(crate) fn shape(&self, startup: Startup) -> Shape {
        let mut shapes = self.shapes.borrow_mut();
        shapes.retain(|shape| shape.strong_count() > 0);
        if let Some(known) = shapes.iter().filter_map(Weak::upgrade).find(|known| **known == startup) {
            return known;
        }
        let shape = Rc::new(startup);
        shapes.push(Rc::downgrade(&shape));
        shape
    }

    /// One value for equal settings.
    pub(crate) fn settings(&self, mut pairs: Vec<(String, String)>) -> Settings {
        if pairs.is_empty() {
            return None;
        }
        pairs.sort();
        let mut all = self.settings.borrow_mut();
        if let Some(known) = all.iter().filter_map(Weak::upgrade).find(|known| **known == pairs) {
            return Some(known);
        }
        all.retain(|settings| settings.strong_count() > 0);
        let settings = Rc::new(pairs);
        all.push(Rc::downgrade(&settings));
        Some(settings)
    }

    /// What a new client of this shape is told, where it is known already.
    pub(crate) fn greeting(&self, shape: &Shape) -> Option<Rc<[u8]>> {
        self.greetings.borrow().get(shape).cloned()
    }

    /// A backend of this shape, at once where one is free.
    pub(crate) fn request(self: &Rc<Self>, shape: &Shape, settings: &Settings, pass: &Pass) -> Lent {
        if self.queue.borrow().is_empty()
            && let Some(lease) = self.take(shape, settings, pass)
        {
            return Lent::Now(lease.lent());
        }
        let ticket = Rc::new(Ticket {
            shape: Rc::clone(shape),
            pass: pass.clone(),
            since: self.now(),
            asked: self.proxy.gate.now(),
            answer: RefCell::default(),
            waker: RefCell::default(),
        });
        self.queue.borrow_mut().push_back(Rc::clone(&ticket));
        self.serve_queue();
        self.count_waiting();
        Lent::Wait(Waiting { pool: Rc::clone(self), ticket })
    }

    /// A backend of its own for a replication connection: no place of the pool's is taken, and it is never lent again.
    pub(crate) async fn open_apart(self: &Rc<Self>, shape: &Shape, pass: &Pass) -> Result<Lease, NoBackend> {
        let proof = self.proof.borrow().clone();
        backend::open(&self.proxy, shape, &proof, pass).await.map(|backend| Lease::new(backend, self).lent())
    }

    /// Whether somebody waits.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.queue.borrow().is_empty()
    }

    /// Somebody waits no longer.
    fn note_wait(&self, ticket: &Ticket) {
        let waited = self.proxy.gate.now().since(ticket.asked);
        add(&self.stats.waited, u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        add(&self.stats.waits, 1);
        if let Some(data) = self.data.upgrade() {
            data.tally.waits.note(waited);
        }
    }

    fn now(&self) -> Instant {
        self.data.upgrade().map_or(Instant::ZERO, |data| data.now.get())
    }

    fn count_waiting(&self) {
        self.stats.waiting.store(u32::try_from(self.queue.borrow().len()).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    fn count(&self) {
        self.stats.open.store(self.open.get(), Ordering::Relaxed);
        self.stats.idle.store(u32::try_from(self.idle.borrow().len()).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// An idle backend of this shape, best with these settings, that has nothing to say.
    fn take(&self, shape: &Shape, settings: &Settings, pass: &Pass) -> Option<Lease> {
        let found = loop {
            let mut idle = self.idle.borrow_mut();
            let fits = |lease: &Lease| Rc::ptr_eq(&lease.shape, shape);
            let same = |lease: &Lease| fits(lease) && same_settings(&lease.settings, settings);
            let Some(at) = idle.iter().rposition(same).or_else(|| idle.iter().rposition(fits)) else { break None };
            // The order is that of their last use.
            let lease = if at + 1 == idle.len() { idle.pop()? } else { idle.remove(at) };
            drop(idle);
            let is_of_now = lease.pass.is_of(pass) && lease.suspensions == self.proxy.gate.suspensions();
            if is_of_now && lease.is_silent() {
                break Some(lease);
            }
            self.close(lease);
        };
        self.count();
        found
    }

    /// A backend is free again, at rest and as it was lent; it is given to who waits, kept, or closed for its age.
    pub(crate) fn give_back(self: &Rc<Self>, mut lease: Lease) {
        lease.on_loan = false;
        let limits = self.limits.get();
        let lifetime = limits.lifetime;
        let now = self.now();
        let old = !lifetime.is_zero() && now.since(lease.born) >= lifetime;
        let of_before = lease.reconnects != self.database.reconnects.load(Ordering::Relaxed);
        // Opened beyond the size for who waited: kept while somebody does.
        let surplus = self.open.get() > limits.size && self.queue.borrow().is_empty();
        if old || of_before || surplus || lease.pass.is_over() {
            self.close(lease);
        } else {
            lease.idle_since = now;
            self.idle.borrow_mut().push(lease);
        }
        if !self.queue.borrow().is_empty() {
            self.serve_queue();
        }
        self.count();
    }

    /// Ends a backend; its place is free.
    pub(crate) fn close(&self, mut lease: Lease) {
        lease.on_loan = false;
    }

    /// The place of a backend that is gone, or that lives on without being this pool's.
    pub(crate) fn free_place(&self) {
        self.open.set(self.open.get().saturating_sub(1));
        self.proxy.backends.fetch_sub(1, Ordering::SeqCst);
        self.count();
    }

    /// After a backend was closed outside of [`Pool::give_back`]: who waits may have its place.
    pub(crate) fn lost(self: &Rc<Self>) {
        self.free_place();
        self.serve_queue();
    }

    /// Serves who waits, first come first served: with what is idle, else with a new backend where one may be opened.
    /// Who waits for one that is being opened holds up nobody: others may have what is idle and of no use to him.
    fn serve_queue(self: &Rc<Self>) {
        // Those being opened for nobody yet. One is opened for each who waits, of his shape, and not more.
        let mut coming = self.opening.borrow().clone();
        let mut at = 0;
        loop {
            let Some(next) = self.queue.borrow().get(at).cloned() else { return };
            if let Some(lease) = self.take(&next.shape, &None, &next.pass) {
                self.queue.borrow_mut().remove(at);
                self.count_waiting();
                self.note_wait(&next);
                next.tell(Ok(lease));
                continue;
            }
            at += 1;
            if let Some(his) = coming.iter().position(|shape| Rc::ptr_eq(shape, &next.shape)) {
                coming.swap_remove(his);
                continue;
            }
            if !self.may_open(&next) {
                return;
            }
            self.open.set(self.open.get() + 1);
            self.opening.borrow_mut().push(Rc::clone(&next.shape));
            tokio::task::spawn_local(Rc::clone(self).open_one(Rc::clone(&next.shape), next.pass.clone()));
        }
    }

    /// Takes one place of all there are.
    fn may_open(&self, ticket: &Ticket) -> bool {
        let pool = self.limits.get();
        let waited = self.now().since(ticket.since);
        let size = if waited >= pool.reserve_after { pool.size.saturating_add(pool.reserve) } else { pool.size };
        let size = size.saturating_add(self.held_up.get());
        if self.open.get() >= size {
            // One of another shape makes room.
            let Some(other) = self.oldest_idle() else { return false };
            self.close(other);
        }
        let taken = || self.proxy.take_place();
        let found = taken() || (self.data.upgrade().is_some_and(|data| data.close_an_idle_one()) && taken());
        if !found {
            self.proxy.is_place_wanted.store(true, Ordering::SeqCst);
        }
        found
    }

    /// The idle backend that was not used for longest.
    pub(crate) fn oldest_idle(&self) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        (!idle.is_empty()).then(|| idle.remove(0))
    }

    /// Opens a backend for whoever waits then. The place was taken by the caller.
    async fn open_one(self: Rc<Self>, shape: Shape, pass: Pass) {
        let place = Place { pool: Rc::clone(&self), shape: Rc::clone(&shape), kept: Cell::new(false) };
        loop {
            let proof = self.proof.borrow().clone();
            let reconnects = self.database.reconnects.load(Ordering::Relaxed);
            let opened = backend::open(&self.proxy, &shape, &proof, &pass).await;
            let wanted = |ticket: &&Rc<Ticket>| Rc::ptr_eq(&ticket.shape, &shape);
            let is_wanted = self.queue.borrow().iter().any(|ticket| wanted(&ticket));
            match opened {
                Ok(mut backend) => {
                    place.kept.set(true);
                    drop(place);
                    *self.refusal.borrow_mut() = None;
                    backend.reconnects = reconnects;
                    backend.born = self.now();
                    self.remember(shape, &backend.greeting);
                    self.give_back(Lease::new(backend, &self));
                    return;
                }
                // It starts, stops, or is full: who waits goes on waiting.
                Err(none) if is_wanted && none.is_passing() && pass.stands() => {
                    // Others are connected beside the gate: an idle backend of whatever pool makes room.
                    if none.is_full() && !self.data.upgrade().is_some_and(|data| data.close_an_idle_one()) {
                        self.proxy.is_place_wanted.store(true, Ordering::SeqCst);
                    }
                    if let NoBackend::Refused(message) = none {
                        *self.refusal.borrow_mut() = Some(message);
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(none) => {
                    drop(place);
                    self.greetings.borrow_mut().remove(&shape);
                    let mut queue = self.queue.borrow_mut();
                    let at = queue.iter().position(|ticket| wanted(&ticket));
                    let first = at.and_then(|at| queue.remove(at));
                    drop(queue);
                    self.count_waiting();
                    if let Some(first) = first {
                        first.tell(Err(none));
                    }
                    self.serve_queue();
                    return;
                }
            }
        }
    }

    /// Keeps what new clients of a shape are told, where they need no backend to be told it.
    fn remember(&self, shape: Shape, greeting: &Rc<[u8]>) {
        if self.proxy.options.pool.mode == PoolMode::Transaction {
            let mut greetings = self.greetings.borrow_mut();
            // Clients may differ without end in what they ask for.
            if greetings.len() >= MAX_GREETINGS {
                greetings.clear();
            }
            greetings.insert(shape, Rc::clone(greeting));
        }
    }

    /// Once a tick: who waited too long is told so, who waits gets what the reserve has, idle ones age.
    /// `is_other`: it may be another PostgreSQL than before.
    pub(crate) fn tick(self: &Rc<Self>, is_other: bool) {
        let pool = self.limits.get();
        let now = self.now();
        loop {
            let late = |ticket: &Rc<Ticket>| now.since(ticket.since) >= pool.query_wait || !ticket.pass.stands();
            let front = self.queue.borrow().front().filter(|ticket| late(ticket)).cloned();
            let Some(front) = front else { break };
            self.queue.borrow_mut().pop_front();
            self.note_wait(&front);
            let why = self.refusal.borrow().clone();
            front.tell(Err(why.map_or_else(|| self.waited_too_long().into(), NoBackend::Refused)));
        }
        self.count_waiting();
        if is_other {
            // Another PostgreSQL may answer when it opens again.
            self.greetings.borrow_mut().clear();
            *self.refusal.borrow_mut() = None;
        }
        self.look_for_held_up();
        self.serve_queue();
        let reconnects = self.database.reconnects.load(Ordering::Relaxed);
        let done = |backend: &Lease| {
            let idle = !pool.idle_timeout.is_zero() && now.since(backend.idle_since) >= pool.idle_timeout;
            let old = !pool.lifetime.is_zero() && now.since(backend.born) >= pool.lifetime;
            idle || old || is_other || backend.reconnects != reconnects || backend.pass.is_over()
        };
        let gone: Vec<Lease> = self.idle.borrow_mut().extract_if(.., |backend| done(backend)).collect();
        gone.into_iter().for_each(|backend| self.close(backend));
        // The size was lowered, or more were needed for a while.
        while self.open.get() > pool.size
            && self.queue.borrow().is_empty()
            && let Some(oldest) = self.oldest_idle()
        {
            self.close(oldest);
        }
    }

    /// Where somebody has waited for a while, asks PostgreSQL how many of the backends wait for a standby: those who
    /// only read are not to wait with them.
    fn look_for_held_up(self: &Rc<Self>) {
        let waits = |ticket: &Rc<Ticket>| self.now().since(ticket.since) >= HELD_UP_AFTER;
        if !self.queue.borrow().front().is_some_and(waits) {
            self.held_up.set(0);
        } else if !self.is_asking.replace(true) {
            let pool = Rc::clone(self);
            drop(tokio::task::spawn_local(async move {
                // Who cannot be asked holds nobody up.
                let ours = |slot: &Arc<Slot>| *slot.user == *pool.user && *slot.database == *pool.database_name;
                let all = pool.proxy.gate.all_slots();
                let lent: Vec<i32> = all
                    .iter()
                    .filter(|slot| ours(slot))
                    .filter_map(|slot| slot.backend())
                    .map(|(pid, _)| pid)
                    .collect();
                let found = pool.proxy.roles.held_up(&lent).await;
                pool.held_up.set(found.unwrap_or(0));
                pool.is_asking.set(false);
                pool.serve_queue();
            }));
        }
    }

    /// Whether it is time to say in the log that a client got no backend: there may be thousands.
    pub(crate) fn may_complain(&self) -> bool {
        let (now, last) = (self.now(), self.complained.get());
        let may = last == Instant::ZERO || now.since(last) >= COMPLAIN_EVERY;
        if may {
            self.complained.set(now);
        }
        may
    }

    fn waited_too_long(&self) -> Refusal {
        let pool = self.limits.get();
        let waited = humantime::format_duration(pool.query_wait);
        Refusal::new("53300", format!("portcullis: no backend became free within {waited}")).hint(format!(
            "pool.size = {} of portcullis limits the connections of a user to a database ({} open), and PostgreSQL's \
             max_connections those of all; pool.query_wait is how long a client waits.",
            pool.size,
            self.open.get()
        ))
    }

    /// Nobody uses it and nothing is open.
    pub(crate) fn is_unused(&self) -> bool {
        self.open.get() == 0 && self.queue.borrow().is_empty() && self.stats.clients.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Closed with the thread: their places are free.
        let open = self.open.get();
        self.proxy.backends.fetch_sub(open.min(self.proxy.backends.load(Ordering::SeqCst)), Ordering::SeqCst);
    }
}

/// The place of a backend being opened; free again unless it was kept.
struct Place {
    pool: Rc<Pool>,
    shape: Shape,
    kept: Cell<bool>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let at = self.pool.opening.borrow().iter().position(|shape| Rc::ptr_eq(shape, &self.shape));
        at.map(|at| self.pool.opening.borrow_mut().swap_remove(at));
        if !self.kept.get() {
            self.pool.free_place();
        }
    }
}

/// Whether both are one value of the same pool.
pub(crate) fn same_settings(a: &Settings, b: &Settings) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Rc::ptr_eq(a, b),
        _ => false,
    }
}
