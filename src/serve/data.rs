//! The data threads: each a current-thread runtime that owns its sessions and its pools, so that a forwarded byte meets
//! no lock and no other core.
//!
//! What it is NOT: nobody logs in here; clients come from the door (`serve::session`) with their proof.
//!
//! **Invariant:** all clients of one (user, database) are on one thread: their pool is there, and only there.

use super::backend::Proof;
use super::gate::{Pass, Passage};
use super::listener::{Proxy, Seat};
use super::pool::{Limits, Pool};
use super::session;
use super::slot::{Doing, Order};
use super::tally::Tally;
use super::tls::Parked;
use crate::base::time::Instant;
use crate::wire::pg::Startup;
use crate::wire::pg::statements::Catalogue;
use crate::wire::tunnel::Carried;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// How often pools and time-outs are looked after; the exactness of their times.
const TICK: Duration = Duration::from_millis(250);
/// Tasks polled between two looks at the sockets.
const EVENT_INTERVAL: u32 = 61;

/// A client that is let in.
pub(crate) struct Newcomer {
    pub(crate) client: Parked,
    pub(crate) peer: SocketAddr,
    pub(crate) startup: Startup,
    pub(crate) proof: Proof,
    pub(crate) pass: Pass,
    pub(crate) seat: Seat,
    pub(crate) passage: Passage,
    /// A session that goes on where the other node left it.
    pub(crate) carried: Option<Box<Carried>>,
}

/// The ways to all threads. The last one dropped ends them, and with them every session.
pub(crate) struct Threads {
    doors: Vec<mpsc::UnboundedSender<Newcomer>>,
}

impl Threads {
    /// Starts them.
    pub(crate) fn start(proxy: &Arc<Proxy>) -> io::Result<Threads> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = usize::try_from(proxy.options.pool.threads).unwrap_or(0);
        let count = if wanted == 0 { (cores / 2).clamp(1, 4) } else { wanted };
        let mut doors = Vec::new();
        for number in 0..count {
            let (door, newcomers) = mpsc::unbounded_channel();
            let proxy = Arc::clone(proxy);
            // Not a `LocalSet`: there every wake-up takes a lock, and each batch polls `run` too.
            let (built, is_built) = std::sync::mpsc::sync_channel(1);
            std::thread::Builder::new().name(format!("data-{number}")).spawn(move || {
                let mut builder = Builder::new_current_thread();
                let runtime = builder.enable_all().event_interval(EVENT_INTERVAL).build_local(LocalOptions::default());
                match runtime {
                    Ok(runtime) => {
                        let _ = built.send(Ok(()));
                        runtime.block_on(run(proxy, newcomers, number == 0));
                    }
                    Err(error) => drop(built.send(Err(error))),
                }
            })?;
            is_built.recv().map_err(io::Error::other)??;
            doors.push(door);
        }
        Ok(Threads { doors })
    }

    /// Hands a client to the thread of its pool.
    pub(crate) fn admit(&self, newcomer: Newcomer) {
        let mut hasher = DefaultHasher::new();
        (&newcomer.startup.user, &newcomer.startup.database).hash(&mut hasher);
        let count = u64::try_from(self.doors.len()).unwrap_or(1).max(1);
        let at = usize::try_from(hasher.finish() % count).unwrap_or(0);
        // A thread that is gone goes with the proxy: the client is closed with its newcomer.
        if let Some(door) = self.doors.get(at) {
            let _ = door.send(newcomer);
        }
    }
}

/// What the sessions of a thread share.
pub(crate) struct Data {
    pub(crate) proxy: Arc<Proxy>,
    /// The time of the last tick: what is measured with it needs no better.
    pub(crate) now: Cell<Instant>,
    pools: RefCell<HashMap<(String, String), Rc<Pool>>>,
    pub(crate) limits: Rc<Limits>,
    pub(crate) catalogue: RefCell<Catalogue>,
    tokens: Cell<u64>,
    pub(crate) tally: Arc<Tally>,
    /// [`super::gate::Gate::suspensions`] at the last tick.
    suspensions: Cell<u64>,
}

impl Data {
    /// The pool of a client that just proved itself.
    pub(crate) fn pool(self: &Rc<Self>, startup: &Startup, proof: Proof) -> Rc<Pool> {
        let key = (startup.user.clone(), startup.database.clone());
        if let Some(pool) = self.pools.borrow().get(&key) {
            pool.renew_proof(proof);
            return Rc::clone(pool);
        }
        let pool = Pool::new(self, (&key.0, &key.1), proof);
        self.pools.borrow_mut().insert(key, Rc::clone(&pool));
        pool
    }

    /// A number no other client of this thread has; never zero.
    pub(crate) fn token(&self) -> u64 {
        self.tokens.set(self.tokens.get() + 1);
        self.tokens.get()
    }

    /// Makes room where PostgreSQL takes no more connections: an idle backend of any pool goes.
    pub(crate) fn close_an_idle_one(&self) -> bool {
        let pools: Vec<Rc<Pool>> = self.pools.borrow().values().cloned().collect();
        for pool in pools {
            if let Some(backend) = pool.oldest_idle() {
                pool.close(backend);
                return true;
            }
        }
        false
    }

    fn tick(&self) {
        self.now.set(self.proxy.gate.now());
        self.limits.renew(self.proxy.limits());
        let pools: Vec<Rc<Pool>> = self.pools.borrow().values().cloned().collect();
        let suspensions = self.proxy.gate.suspensions();
        let is_other = self.suspensions.replace(suspensions) != suspensions || !self.proxy.gate.passes();
        pools.iter().for_each(|pool| pool.tick(is_other));
        drop(pools);
        // The thread that wants it has none itself.
        if self.proxy.is_place_wanted.load(Ordering::SeqCst) && self.close_an_idle_one() {
            self.proxy.is_place_wanted.store(false, Ordering::SeqCst);
        }
        self.pools.borrow_mut().retain(|_, pool| Rc::strong_count(pool) > 1 || !pool.is_unused());
        if is_other {
            // Another PostgreSQL may answer when it opens again.
            self.proxy.backends_max.store(0, Ordering::SeqCst);
        }
    }
}

/// One thread, for as long as the proxy is there.
async fn run(proxy: Arc<Proxy>, mut newcomers: mpsc::UnboundedReceiver<Newcomer>, is_first: bool) {
    let data = Rc::new(Data {
        now: Cell::new(proxy.gate.now()),
        pools: RefCell::default(),
        limits: Rc::new(Limits::new(proxy.limits())),
        catalogue: RefCell::default(),
        tokens: Cell::new(0),
        tally: proxy.tally(),
        suspensions: Cell::new(0),
        proxy,
    });
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut view = data.proxy.gate.watch();
    loop {
        tokio::select! {
            newcomer = newcomers.recv() => match newcomer {
                Some(newcomer) => drop(tokio::task::spawn_local(session::begin(Rc::clone(&data), newcomer))),
                None => return,
            },
            _ = ticks.tick() => {
                data.tick();
                if is_first {
                    look_after_idle(&data);
                }
            }
            // Idle backends of a gate that was cut are closed at once.
            _ = view.changed() => data.tick(),
        }
    }
}

/// Ends clients that have been silent for too long.
fn look_after_idle(data: &Data) {
    let pool = data.limits.get();
    let (idle, in_transaction) = (pool.client_idle_timeout, pool.idle_in_transaction_timeout);
    if idle.is_zero() && in_transaction.is_zero() {
        return;
    }
    let now = data.now.get();
    for slot in data.proxy.gate.all_slots() {
        let (doing, since) = slot.doing();
        let silent = now.since(since);
        match doing {
            Doing::Idle if !idle.is_zero() && silent >= idle => slot.give(Order::Idle),
            Doing::IdleInTransaction if !in_transaction.is_zero() && silent >= in_transaction => {
                slot.give(Order::IdleInTransaction);
            }
            _ => {}
        }
    }
}
