//! One client, from accept to close: its login at the door, its session on a data thread, and the last word it hears.
//!
//! What it is NOT: it forwards nothing itself; that is the pump's.
//!
//! **Invariant:** when the gate is cut the backend is let go of first and not waited for; then the client is told,
//! where a message may begin.

mod carried;
mod leave;
mod named;

pub(crate) use carried::{Resumed, admit, admit_proven, failed};
pub(crate) use leave::BOUND_HERE;

use super::backend::NoBackend;
use super::cancel;
use super::chores;
use super::console;
use super::data::{Data, Newcomer, Threads};
use super::end::{End, Mode};
use super::gate::{Gate, Pass, Passage};
use super::listener::{Proxy, Seat};
use super::login::{self, Opened, Stop};
use super::pool::{Lease, Lent, Pool, Settings, Shape};
use super::pump::Pump;
use super::slot::{Entry, Order, Slot, Who};
use super::tls::ClientStream;
use crate::base::config::PoolMode;
use crate::wire::pg::{self, Refusal, Startup};
use crate::wire::tunnel::Proven;
use bytes::{BufMut, BytesMut};
use named::{rename_application, take_application_name, with_address};
use pgwire::messages::startup::Authentication;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long the last message may take to leave, and the client to close after it; then it is closed on.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a client that has just connected has to say what it wants when the daemon is ending.
const LAST_CALL: Duration = Duration::from_millis(200);

/// Serves one accepted connection until it is handed to a data thread, or to its end. Runs at the door.
pub(crate) async fn serve(
    client: ClientStream,
    peer: SocketAddr,
    proxy: Arc<Proxy>,
    threads: Arc<Threads>,
    pass: Pass,
    (seat, passage): (Seat, Passage),
) {
    let tls = proxy.options.rules.tls();
    let timeout = proxy.limits().login_timeout;
    let opening = tokio::time::timeout(timeout, login::open(client, peer, tls.as_ref()));
    let opened = tokio::select! {
        biased;
        () = is_over(&pass, || true) => return,
        opened = opening => opened,
        () = last_call(&proxy.gate) => return,
    };
    let (mut client, opened) = match opened {
        Err(_too_slow) => return,
        Ok(Err((client, stop))) => {
            if let Some(client) = client {
                dismiss(client, stop).await;
            }
            return;
        }
        Ok(Ok(opened)) => opened,
    };
    let startup = match opened {
        Opened::Cancel { pid, key } => {
            if pass.passes()
                && let Some(slot) = proxy.gate.find(pid, &key)
            {
                cancel::forward(slot).await;
            }
            return;
        }
        // A crowd is what somebody may come for to the console.
        Opened::Startup(startup) if seat.crowded && !console::is_wanted(&startup) => {
            let refusal = Refusal::new("53300", "sorry, too many clients already")
                .hint("pool.max_clients of portcullis limits them.");
            return dismiss(client, refusal.into()).await;
        }
        Opened::Startup(startup) => startup,
    };
    let is_console = console::is_wanted(&startup);
    // It may have heard something by now, and only this node can go on with it.
    let begun = AtomicBool::new(false);
    let login = async {
        // A pause holds no console; who has to come again waits like all others.
        let mut waits = !is_console;
        loop {
            // Who is gone keeps no seat.
            tokio::select! {
                waited = wait_while_paused(&proxy, &startup.database), if waits => waited?,
                () = client.left(), if waits => return Err(Stop::Silent),
                else => {}
            }
            waits = true;
            begun.store(true, Ordering::Relaxed);
            let authenticate = login::authenticate(&mut client, peer, &startup, &proxy);
            let proof = tokio::time::timeout(timeout, authenticate).await.unwrap_or(Err(Stop::Silent));
            // PostgreSQL was stopped for a switchover before it said who this is, which comes first.
            let is_unasked = matches!(&proof, Err(Stop::Refuse(refusal)) if refusal.code == "57P03");
            let has_heard = startup.minor > 0 || !startup.options.is_empty() || client.is_tls();
            if !is_unasked || has_heard || !(proxy.gate.is_to_carry() || pass.carried().is_some()) {
                return proof;
            }
            begun.store(false, Ordering::Relaxed);
            if pass.is_over() {
                return proof;
            }
        }
    };
    let proof = tokio::select! {
        biased;
        () = is_over(&pass, || begun.load(Ordering::Relaxed)) => Err(Refusal::new("57P01", &*pass.reason()).into()),
        () = proxy.gate.stopped() => Err(stopping().into()),
        proof = login => proof,
    };
    let is_carried = pass.carried().is_some();
    match proof {
        Ok(_) if is_console => console::serve(client, peer, startup, proxy, pass, (seat, passage)).await,
        Ok(proof) if is_carried => {
            drop((seat, passage));
            leave::send_proven(&proxy, client, peer, (&startup, Proven::from(&proof)), &pass).await;
        }
        Ok(proof) => {
            if let Ok(client) = client.park() {
                threads.admit(Newcomer { client, peer, startup, proof, pass, seat, passage, carried: None });
            }
        }
        Err(Stop::Refuse(_)) if is_carried && !begun.load(Ordering::Relaxed) => {
            drop((seat, passage));
            leave::send_on(&proxy, client, peer, &startup, &pass).await;
        }
        // A reset passes the kernel gate, and a client that waits for an answer hears of nothing else.
        Err(_) if pass.is_walled_off() => client.reset(),
        Err(stop) => dismiss(client, stop).await,
    }
}

/// Returns when the pass is over; never where clients were carried over and this one comes to a point itself at which
/// it can be (`goes_on`).
async fn is_over(pass: &Pass, goes_on: impl Fn() -> bool) {
    pass.ended().await;
    if pass.carried().is_some() && goes_on() {
        std::future::pending::<()>().await;
    }
}

/// A client among those of its user or of its database; counted out when dropped.
struct Counted(Arc<AtomicU32>);

impl Counted {
    /// `None`: there are `most` already; zero is no limit.
    fn take(counter: Arc<AtomicU32>, most: u32) -> Option<Counted> {
        let before = counter.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(counter);
        (most == 0 || before < most).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is given back with a session.
struct Places {
    seat: Option<Seat>,
    _user: Counted,
    _database: Counted,
    pool: Rc<Pool>,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.pool.stats.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Begins the session of a client that proved itself. Runs on the data thread of its pool.
pub(crate) async fn begin(data: Rc<Data>, newcomer: Newcomer) {
    // The passage ends with this: by then the client is in the book, or dismissed.
    let Newcomer { client, peer, startup, proof, pass, seat, passage, carried } = newcomer;
    let Ok(mut client) = client.unpark() else { return };
    let proxy = Arc::clone(&data.proxy);
    let limits = data.limits.get();
    let user = Counted::take(proxy.user(&startup.user), limits.max_clients_per_user);
    let database = Counted::take(proxy.clients(&startup.database), limits.max_clients_per_database);
    let (Some(user), Some(database)) = (user, database) else {
        let refusal = Refusal::new("53300", "sorry, too many clients already")
            .hint("pool.max_clients_per_user or pool.max_clients_per_database of portcullis limits them.");
        return dismiss(client, refusal.into()).await;
    };
    let pool = data.pool(&startup, proof);
    pool.stats.clients.fetch_add(1, Ordering::Relaxed);
    pool.stats.logins.fetch_add(1, Ordering::Relaxed);
    let places = Places { seat: Some(seat), _user: user, _database: database, pool: Rc::clone(&pool) };
    let opening = Opening { data: &data, pool: &pool, pass: &pass, peer };
    // For the other node, should it be greeted there.
    let asked = carried.is_none().then(|| startup.clone());
    let started = tokio::select! {
        biased;
        () = pass.ended() => Err(Refusal::new("57P01", &*pass.reason()).into()),
        () = proxy.gate.stopped() => Err(stopping().into()),
        started = async {
            match carried {
                None => opening.start(startup, client.is_tls()).await,
                Some(carried) => opening.resume(startup, *carried).await,
            }
        } => started,
        // It may have to wait for a backend: who is gone makes room in the queue.
        () = client.left() => Err(Stop::Silent),
    };
    match started {
        Ok(Started { greeting, link, entry, mode, shape, settings, resumed }) => {
            let mut pump = Box::new(Pump::new(client, Rc::clone(&data), pool, pass, entry, mode, shape, settings));
            pump.begin(greeting, link);
            if let Some(Err(malformed)) = resumed.map(|resumed| pump.resume(resumed)) {
                let (client, ..) = pump.into_client();
                return dismiss(client, carried::failed(&proxy, malformed.0)).await;
            }
            // A task of its own: this one's size is that of a login.
            drop(tokio::task::spawn_local(relay(pump, places)));
        }
        Err(stop) if pass.carried().is_some() && !matches!(stop, Stop::Silent) && asked.is_some() => {
            drop((places, passage));
            if let Some(startup) = asked {
                leave::send_proven(&proxy, client, peer, (&startup, Proven::from(&pool.proof())), &pass).await;
            }
        }
        Err(_) if pass.is_walled_off() => client.reset(),
        Err(_) if !pass.passes() => dismiss(client, Refusal::new("57P01", &*pass.reason()).into()).await,
        Err(stop) => {
            // Whatever is wrong with this client's end, others are not to wait for it.
            let _ = client.flush().await;
            dismiss(client, stop).await;
        }
    }
}

/// Everything a session begins with.
struct Started {
    greeting: BytesMut,
    link: Option<Lease>,
    entry: Entry,
    mode: Mode,
    shape: Shape,
    settings: Settings,
    resumed: Option<Resumed>,
}

struct Opening<'a> {
    data: &'a Rc<Data>,
    pool: &'a Rc<Pool>,
    pass: &'a Pass,
    peer: SocketAddr,
}

impl Opening<'_> {
    /// Lets the client in: a backend where it has one of its own, else what such a backend said to another.
    async fn start(&self, mut startup: Startup, tls: bool) -> Result<Started, Stop> {
        let proxy = &self.data.proxy;
        let who = Who {
            user: startup.user.as_str().into(),
            database: startup.database.as_str().into(),
            peer: self.peer,
            tls,
        };
        let mode = if startup.wants_replication() { Mode::Apart } else { shared_mode(proxy) };
        let application = self.take_application(&mut startup, mode);
        let shape = self.pool.shape(startup);
        let (settings, known) = match mode {
            Mode::Transaction => {
                let named = (!application.is_empty()).then(|| ("application_name".to_owned(), application.clone()));
                (self.pool.settings(named.into_iter().collect()), self.pool.greeting(&shape))
            }
            Mode::Session | Mode::Apart => (None, None),
        };
        let (said, link) = match known {
            Some(said) => (said, None),
            None => {
                let lease = self.lease_of_now(&shape, mode).await?;
                (Rc::clone(&lease.greeting), Some(lease))
            }
        };
        if link.is_none() && !self.pass.passes() && self.pass.stands() {
            wait_while_paused(proxy, &shape.database).await?;
        }
        // One that was suspended this moment passes nothing: the pump finds out.
        if !self.pass.stands() {
            return Err(Refusal::new("57P01", &*self.pass.reason()).into());
        }
        let number = link.as_ref().filter(|_| mode != Mode::Transaction).map(|lease| lease.pid);
        let entry = enter(&proxy.gate, who, number, proxy, self.data);
        let mut greeting = BytesMut::new();
        pg::put(&Authentication::Ok, &mut greeting);
        if mode == Mode::Transaction {
            rename_application(&said, &application, &mut greeting);
        } else {
            greeting.put_slice(&said);
        }
        greeting.put_slice(&[b'K', 0, 0, 0, 12]);
        greeting.put_i32(entry.slot.pid);
        greeting.put_u32(entry.slot.key);
        greeting.put_slice(&[b'Z', 0, 0, 0, 5, b'I']);
        Ok(Started { greeting, link, entry, mode, shape, settings, resumed: None })
    }

    /// What the client is called, where it is not a start-up parameter of its backend; the packet as backends get it.
    fn take_application(&self, startup: &mut Startup, mode: Mode) -> String {
        let mut application = None;
        let with_client_address = self.data.limits.get().client_address;
        if mode == Mode::Transaction || with_client_address {
            application = Some(take_application_name(startup));
        }
        if with_client_address {
            application = application.map(|name| with_address(&name, self.peer));
        }
        if mode != Mode::Transaction
            && let Some(name) = application.take()
        {
            startup.parameters.push((b"application_name".to_vec(), name.into_bytes()));
        }
        // Nothing of these reaches a backend.
        startup.minor = 0;
        startup.options.clear();
        application.unwrap_or_default()
    }

    /// A backend of before a suspension passes nothing any more: another is waited for.
    async fn lease_of_now(&self, shape: &Shape, mode: Mode) -> Result<Lease, Stop> {
        loop {
            let lease = self.lease(shape, mode).await?;
            let gate = &self.data.proxy.gate;
            if lease.suspensions == gate.suspensions() || !self.pass.stands() {
                return Ok(lease);
            }
            drop(lease);
            wait_while_paused(&self.data.proxy, &shape.database).await?;
        }
    }

    async fn lease(&self, shape: &Shape, mode: Mode) -> Result<Lease, Stop> {
        let lent = if mode == Mode::Apart {
            self.pool.open_apart(shape, self.pass).await
        } else {
            match self.pool.request(shape, &None, self.pass) {
                Lent::Now(lease) => Ok(lease),
                Lent::Wait(waiting) => poll_fn(|cx| waiting.poll(cx)).await,
            }
        };
        lent.map_err(|none| stop_of(none, &shape.user, self.pool))
    }
}

fn shared_mode(proxy: &Proxy) -> Mode {
    match proxy.options.pool.mode {
        PoolMode::Transaction => Mode::Transaction,
        PoolMode::Session => Mode::Session,
    }
}

fn stop_of(none: NoBackend, user: &str, pool: &Pool) -> Stop {
    match none {
        NoBackend::Refused(message) => Stop::PassOn(message),
        NoBackend::Refusal(refusal) => {
            if pool.may_complain() {
                tracing::warn!(
                    user,
                    reason = refusal.message,
                    "no backend for a client; more of these are not logged for a while"
                );
            }
            refusal.into()
        }
    }
}

/// Enters a session in the gate's book, under PostgreSQL's process number where it has a backend of its own. The key
/// is the gate's: a backend may serve another client later.
fn enter(gate: &Arc<Gate>, who: Who, number: Option<i32>, proxy: &Proxy, data: &Data) -> Entry {
    loop {
        let pid = number.unwrap_or_else(|| i32::from_be_bytes(login::random()) & i32::MAX);
        let key = u32::from_be_bytes(login::random());
        let who = Who { user: Arc::clone(&who.user), database: Arc::clone(&who.database), ..who };
        let slot = Slot::new(pid, key, who, data.now.get(), Arc::clone(&proxy.door));
        if let Some(entry) = gate.enter(slot) {
            return entry;
        }
    }
}

/// Pumps until the session ends. Small: there are ten thousand of these.
async fn relay(mut pump: Box<Pump>, places: Places) {
    let end = poll_fn(|cx| pump.poll(cx)).await;
    // A task of its own for the rest, which is long and not awaited by many at once.
    drop(tokio::task::spawn_local(finish(pump, end, places)));
}

async fn finish(mut pump: Box<Pump>, end: End, places: Places) {
    if let End::Carried(epoch) = end {
        return leave::carry_over(*pump, epoch, places).await;
    }
    if matches!(end, End::Shut) && pump.is_unheard() {
        return leave::begin_again(*pump, places);
    }
    let proxy = Arc::clone(pump.proxy());
    let _passage = proxy.gate.passage();
    if matches!(end, End::Shut) {
        // Where nobody cut it, it lapsed: all others hear it from the first that notices.
        proxy.gate.note_lapse(&proxy.lapsed);
    }
    if matches!(end, End::Finished)
        && let Some(lease) = pump.take_lease()
    {
        match pump.mode() {
            Mode::Session => drop(tokio::task::spawn_local(chores::tidy_up(lease))),
            // It left before what it had set was learnt.
            Mode::Transaction if pump.is_dirty() => drop(tokio::task::spawn_local(chores::tidy_up(lease))),
            Mode::Transaction => lease.give_back(),
            Mode::Apart => {}
        }
    }
    let is_gone = matches!(end, End::BackendGone);
    let is_shut = matches!(end, End::Shut);
    let user = pump.user();
    let (client, whole, pass) = pump.into_client();
    let last_word = last_word(end, &proxy, &pass, (&user, &places.pool));
    drop(places);
    if is_shut && pass.is_walled_off() {
        return client.reset();
    }
    // A lapse is told like a cut, but nothing is told into the middle of a message.
    match last_word {
        Some(stop) if whole => dismiss(client, stop).await,
        // PostgreSQL's last words were passed on; they too shall arrive.
        None if is_gone => dismiss(client, Stop::PassOn(Vec::new())).await,
        _ => {}
    }
}

/// What the client is told, if anything.
fn last_word(end: End, proxy: &Proxy, pass: &Pass, (user, pool): (&str, &Pool)) -> Option<Stop> {
    let refusal = match end {
        // PostgreSQL's own last words were passed on.
        End::Finished | End::ClientGone | End::BackendGone => return None,
        End::NoBackend(none) if pass.passes() => return Some(stop_of(*none, user, pool)),
        // PostgreSQL's words pass no gate that is shut.
        End::NoBackend(_) | End::Shut | End::Carried(_) => Refusal::new("57P01", &*pass.reason()),
        End::Kept(what) => Refusal::new("57P01", format!("{}; this session has {what}", pass.reason()))
            .hint("That cannot be taken along to the other node. Connect again."),
        End::Drained => {
            let reason = proxy.gate.watch().borrow().drain.clone();
            let reason = reason.unwrap_or_else(|| "portcullis: this session was ended for a switchover".into());
            Refusal::new("57P01", &*reason)
        }
        End::HeldTooLong => paused_too_long(proxy),
        End::OutcomeUnknown => Refusal::new(
            "57P01",
            "portcullis: outcome unknown: the command was cancelled while it waited for the standby, which did not \
             confirm it in time",
        )
        .hint("It is committed on this node, but would be lost if the other took over now. Look before trying again."),
        End::Untuned => Refusal::new("08006", "portcullis: a backend could not be given this session's settings")
            .hint("portcullis logged why. Connect again."),
        End::Ordered(Order::Kill) => {
            Refusal::new("57P01", "portcullis: terminating connection due to administrator command (kill)")
        }
        End::Ordered(Order::Idle) => {
            Refusal::new("57P05", "portcullis: terminating connection due to pool.client_idle_timeout")
        }
        End::Ordered(Order::IdleInTransaction) => {
            Refusal::new("25P03", "portcullis: terminating connection due to pool.idle_in_transaction_timeout")
        }
        End::Malformed(malformed) => Refusal::new("08P01", malformed.0),
    };
    Some(refusal.into())
}

/// Who comes while the daemon is ending.
pub(super) fn stopping() -> Refusal {
    Refusal::new("57P03", "portcullis: the daemon of this node is shutting down")
        .hint("It may be restarting: connect again.")
}

async fn last_call(gate: &Gate) {
    gate.stopped().await;
    tokio::time::sleep(LAST_CALL).await;
}

fn paused_too_long(proxy: &Proxy) -> Refusal {
    let waited = humantime::format_duration(proxy.limits().query_wait);
    Refusal::new("57P03", format!("portcullis: the service is paused and did not resume within {waited}; try again"))
}

/// New clients of a paused gate, or database, wait before their login.
async fn wait_while_paused(proxy: &Proxy, database: &str) -> Result<(), Stop> {
    let database = proxy.known_database(database);
    let is_database_paused = || database.as_ref().is_some_and(|database| database.paused.load(Ordering::SeqCst));
    let is_paused = || proxy.gate.holds_clients() || is_database_paused();
    if !is_paused() {
        return Ok(());
    }
    let mut view = proxy.gate.watch();
    let resumed = view.wait_for(|_| !is_paused());
    match tokio::time::timeout(proxy.limits().query_wait, resumed).await {
        Ok(_) => Ok(()),
        Err(_) => Err(paused_too_long(proxy).into()),
    }
}

/// Sends the last message and closes, so that it arrives: closing with bytes unread would send a reset that may
/// overtake it.
pub(crate) async fn dismiss(mut client: ClientStream, stop: Stop) {
    let message = match stop {
        Stop::Silent => return,
        Stop::Refuse(refusal) => refusal.encode().to_vec(),
        Stop::PassOn(message) => message,
    };
    let farewell = async {
        client.write_all(&message).await?;
        client.shutdown().await?;
        let mut rest = [0; 1024];
        while client.read(&mut rest).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whatever goes wrong here: the client is gone, or slow, and is closed on.
    let _ = tokio::time::timeout(FAREWELL_TIMEOUT, farewell).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_session_is_small() {
        // Beside the task's head and the socket's entry in the runtime, some 300 bytes.
        let all = size_of::<Pump>() + size_of::<Places>() + size_of::<Slot>();
        assert!(all < 1024, "{all} bytes");
    }
}
