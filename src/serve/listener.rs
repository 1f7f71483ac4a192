//! The front door: listening sockets that exist only while the gate is open, and a task per client.
//!
//! What it is NOT: it does not decide whether the gate is open. A gate that is cut or lapses has its sockets closed, so
//! that the kernel refuses; they come back with the next extension. At the end of the daemon a socket that is open may
//! outlive it ([`Doors`]): connections then wait for the next daemon in the kernel's queue, which serves nobody. A
//! passive node may take clients in to forward them: they are `serve::forward`'s.
//!
//! Over 600 lines: what all sessions share stands beside the sockets they come by, with the tests of both.
//!
//! **Invariant:** one address that cannot be bound does not keep the others from serving.

use super::command::Commands;
use super::console::Console;
use super::data::Threads;
use super::forward::{self, Forwarder};
use super::gate::{Gate, Pass};
use super::pool::{Database, PoolStats};
use super::roles::Roles;
use super::session;
use super::tally::{Latencies, Tally};
use super::tls::{ClientStream, TlsAcceptor};
use super::tunnel::{self, Arrival};
use crate::base::config::{self, Secret};
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::base::time::Instant;
use crate::engine::status::{Role, Snapshot};
use crate::wire::hba::HbaFile;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ring::hmac;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

/// Connections the kernel keeps for us until they are accepted; more are dropped by it and tried again by the client.
const BACKLOG: i32 = 4096;
/// Pause before the data threads are tried again that could not be started.
const THREADS_RETRY: Duration = Duration::from_secs(1);
/// Pause before an address that could not be bound is tried again.
const BIND_RETRY: Duration = Duration::from_millis(100);
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Databases and users kept in the book; more only while they are all in use.
const MAX_NAMES: usize = 1024;
/// Connections beyond `max_clients` that are still told why they are refused; more are closed unheard.
const CROWD: u32 = 256;
/// Clients through the other node that wait to be taken up by the proxy's runtime; one more is closed.
const ARRIVALS_WAITING: usize = 1024;
/// Separates the mock secret from anything else ever derived from the cluster secret.
const MOCK_LABEL: &[u8] = b"portcullis mock authentication, version 1";
/// Silence after which a client is probed, the pause between probes, and how many may go unanswered.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 6);
/// How long sent bytes may stay unacknowledged, a client's shut window included; then the kernel ends the connection.
/// Long, because a client that pages through a result reads nothing for minutes.
const USER_TIMEOUT: Duration = Duration::from_secs(900);
/// Shortest sleep of the watch over the deadline; what it adds to the life of a listening socket, not of a session.
const LAPSE_WATCH_MIN: Duration = Duration::from_millis(1);

/// How long a socket stays open that was the gate's and shall be forwarding's, or the other way round; longer while
/// this node takes over.
const STANDS_FOR: Duration = Duration::from_secs(2);
/// How long a socket of the daemon before is kept open for a gate that is not open yet. Who restarts the daemon of the
/// active node waits a tenth of this; clients that wait in vain are let go before their own patience ends.
const INHERITED_FOR: Duration = Duration::from_secs(5);

/// Backend connections reckoned with when the descriptor limit is raised: PostgreSQL's `max_connections` is below it.
const BACKENDS_MAX: u32 = 4096;

/// Says whether the peer has flushed past the present LSN, or the record allows being alone (R4).
pub type Confirm = Arc<dyn Fn() -> BoxFuture<'static, bool> + Send + Sync>;

/// Who is let in and with which certificate: replaced by a reload, for sessions that begin after it.
pub struct Rules {
    hba: RwLock<Arc<HbaFile>>,
    tls: RwLock<Option<TlsAcceptor>>,
    /// `auth.cache`.
    cache: RwLock<Duration>,
}

impl Rules {
    /// `HbaFile::default()` without a file; `tls` from [`super::tls::load`].
    pub fn new(hba: HbaFile, tls: Option<TlsAcceptor>, cache: Duration) -> Arc<Rules> {
        Arc::new(Rules { hba: RwLock::new(Arc::new(hba)), tls: RwLock::new(tls), cache: RwLock::new(cache) })
    }

    /// Replaces all of them.
    pub fn replace(&self, hba: HbaFile, tls: Option<TlsAcceptor>, cache: Duration) {
        // A poisoned lock cannot be: nothing panics while it is held, and a panic ends the process.
        *self.hba.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(hba);
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
        *self.cache.write().unwrap_or_else(PoisonError::into_inner) = cache;
    }

    pub(crate) fn hba(&self) -> Arc<HbaFile> {
        Arc::clone(&self.hba.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn tls(&self) -> Option<TlsAcceptor> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long a role's secret may be remembered.
    pub(crate) fn cache(&self) -> Duration {
        *self.cache.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The secret behind the salts that roles which do not exist are shown: the same after a restart and on both nodes,
/// because a salt that changes is one of nobody (PostgreSQL keeps its `mock_authentication_nonce` in its control file).
pub fn mock_secret(cluster_key: &Secret) -> Zeroizing<[u8; 32]> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, cluster_key.expose());
    let mut secret = Zeroizing::new([0; 32]);
    secret.copy_from_slice(hmac::sign(&key, MOCK_LABEL).as_ref());
    secret
}

/// What becomes of a socket that is open when the daemon ends.
pub type Keep = fn(BorrowedFd<'_>);

/// Listening sockets over a restart of the daemon.
#[derive(Default)]
pub struct Doors {
    /// What the daemon before left open.
    pub inherited: Vec<std::net::TcpListener>,
    /// Is shown each open socket before it is closed at the end; keeps it where it can.
    pub keep: Option<Keep>,
}

/// Everything the proxy is told once.
pub struct ProxyOptions {
    pub listen: Vec<SocketAddr>,
    /// Listened on too, with the ports of `listen`, unless a wildcard of that family covers them.
    pub vips: Vec<IpAddr>,
    /// PostgreSQL's, with its port: the gate's way in.
    pub socket_dir: PathBuf,
    pub port: u16,
    pub admin_user: String,
    pub rules: Arc<Rules>,
    /// For what roles that do not exist are shown; from [`mock_secret`].
    pub mock_secret: Zeroizing<[u8; 32]>,
    /// As at the start; a reload replaces what [`Proxy::limits`] gives, not this.
    pub pool: config::Pool,
    pub node: NodeName,
    /// The way to the other node's gate.
    pub forward: Option<Arc<Forwarder>>,
}

/// What all sessions share.
pub(crate) struct Proxy {
    pub(crate) gate: Arc<Gate>,
    pub(crate) options: Arc<ProxyOptions>,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) confirm: Confirm,
    pub(crate) door: Arc<PathBuf>,
    pub(crate) roles: Roles,
    pub(crate) console: Console,
    /// What clients read after a lease ran out.
    pub(crate) lapsed: String,
    /// What a reload replaces.
    limits: RwLock<Arc<config::Pool>>,
    /// Connections, logged in or not.
    clients: AtomicU32,
    /// Backends of all pools, open or being opened.
    pub(crate) backends: AtomicU32,
    /// How many there may be; zero: PostgreSQL was not asked yet.
    pub(crate) backends_max: AtomicU32,
    /// A pool found no place: a thread that has an idle backend closes one.
    pub(crate) is_place_wanted: AtomicBool,
    /// Clients through the other node, on their way to this runtime; the receiver until [`run_with`] takes it.
    pub(crate) arrivals: mpsc::Sender<Arrival>,
    arriving: Mutex<Option<mpsc::Receiver<Arrival>>>,
    databases: Mutex<HashMap<String, Arc<Database>>>,
    users: Mutex<HashMap<String, Arc<AtomicU32>>>,
    pools: Mutex<Vec<PoolEntry>>,
    /// One for each data thread.
    tallies: Mutex<Vec<Arc<Tally>>>,
}

/// A pool in the book: user, database, figures.
pub(crate) type PoolEntry = (String, String, Weak<PoolStats>);

impl Proxy {
    /// Serves nobody until [`run`] is polled.
    pub(crate) fn new(
        gate: Arc<Gate>,
        options: ProxyOptions,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        confirm: Confirm,
    ) -> Arc<Proxy> {
        let door = Arc::new(options.socket_dir.join(format!(".s.PGSQL.{}", options.port)));
        let (arrivals, arriving) = mpsc::channel(ARRIVALS_WAITING);
        Arc::new(Proxy {
            arrivals,
            arriving: Mutex::new(Some(arriving)),
            console: Console::default(),
            roles: Roles::new(Arc::clone(&door), &options.admin_user, Arc::clone(&options.rules), Arc::clone(&gate)),
            gate,
            snapshots,
            confirm,
            door,
            lapsed: format!("portcullis: node {} no longer serves (its lease ran out)", options.node),
            limits: RwLock::new(Arc::new(options.pool.clone())),
            options: Arc::new(options),
            clients: AtomicU32::new(0),
            backends: AtomicU32::new(0),
            backends_max: AtomicU32::new(0),
            is_place_wanted: AtomicBool::new(false),
            databases: Mutex::default(),
            users: Mutex::default(),
            pools: Mutex::default(),
            tallies: Mutex::default(),
        })
    }

    /// The [pool] of now. A data thread keeps a copy of its own and asks once a tick.
    pub(crate) fn limits(&self) -> Arc<config::Pool> {
        Arc::clone(&self.limits.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_limits(&self, pool: config::Pool) {
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pool);
    }

    /// Every database that was asked for, by name.
    pub(crate) fn databases(&self) -> Vec<(String, Arc<Database>)> {
        let mut all: Vec<_> = locked(&self.databases).iter().map(|(name, db)| (name.clone(), Arc::clone(db))).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// The pools there are now, on all threads.
    pub(crate) fn pools(&self) -> Vec<(String, String, Arc<PoolStats>)> {
        let live = |(user, database, stats): &PoolEntry| Some((user.clone(), database.clone(), stats.upgrade()?));
        locked(&self.pools).iter().filter_map(live).collect()
    }

    /// A data thread's tally, kept for the figures of all.
    pub(crate) fn tally(&self) -> Arc<Tally> {
        let tally = Arc::<Tally>::default();
        locked(&self.tallies).push(Arc::clone(&tally));
        tally
    }

    /// What all data threads have measured.
    pub(crate) fn latencies(&self) -> Latencies {
        let mut all = Latencies::default();
        locked(&self.tallies).iter().for_each(|tally| all.take_in(tally));
        all
    }

    /// What the commands say about a database; made when it is first asked for, by a client that proved itself.
    pub(crate) fn database(&self, name: &str) -> Arc<Database> {
        let mut databases = locked(&self.databases);
        if databases.len() >= MAX_NAMES {
            // Names that nobody uses: a client may log in to ever new ones.
            databases.retain(|_, database| {
                Arc::strong_count(database) > 1
                    || Arc::strong_count(&database.clients) > 1
                    || database.paused.load(Ordering::SeqCst)
            });
        }
        Arc::clone(databases.entry(name.to_owned()).or_default())
    }

    /// The same, only where it is known: for names that strangers say.
    pub(crate) fn known_database(&self, name: &str) -> Option<Arc<Database>> {
        locked(&self.databases).get(name).cloned()
    }

    /// Counts the clients of a database.
    pub(crate) fn clients(&self, database: &str) -> Arc<AtomicU32> {
        Arc::clone(&self.database(database).clients)
    }

    /// Counts the clients of a user.
    pub(crate) fn user(&self, name: &str) -> Arc<AtomicU32> {
        let mut users = locked(&self.users);
        if users.len() >= MAX_NAMES {
            users.retain(|_, count| Arc::strong_count(count) > 1);
        }
        Arc::clone(users.entry(name.to_owned()).or_default())
    }

    pub(crate) fn register_pool(&self, (user, database): (&str, &str), stats: &Arc<PoolStats>) {
        let mut pools = locked(&self.pools);
        pools.retain(|(_, _, stats)| stats.strong_count() > 0);
        pools.push((user.to_owned(), database.to_owned(), Arc::downgrade(stats)));
    }

    /// Closes the idle backends of a database that a client wants for itself. PostgreSQL waits for them for 5 s.
    pub(crate) fn let_alone(&self, database: &str) {
        if let Some(database) = self.known_database(database) {
            database.reconnects.fetch_add(1, Ordering::SeqCst);
            self.gate.wake();
        }
    }

    /// Takes a place for a backend; `false`: PostgreSQL takes no more connections.
    pub(crate) fn take_place(&self) -> bool {
        let most = match self.backends_max.load(Ordering::SeqCst) {
            0 => u32::MAX,
            most => most,
        };
        let more = |open: u32| (open < most).then_some(open + 1);
        self.backends.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one of these is held, and a panic ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises the soft limit of descriptors to what `max_clients` sessions need, or says that it cannot.
pub fn raise_descriptor_limit(max_clients: u32) -> Result<(), Fault> {
    let needed = u64::from(max_clients) + u64::from(max_clients.min(BACKENDS_MAX)) + 2 * u64::from(CROWD);
    // A client that does not read takes a second one.
    let wanted = needed + u64::from(max_clients);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let fault = || {
        let text = format!(
            "pool.max_clients = {max_clients} needs {needed} file descriptors, but the limit is {}; raise LimitNOFILE \
             or lower it",
            limit.maximum.map_or_else(|| "unknown".to_owned(), |n| n.to_string())
        );
        Fault::new(ExitCode::Config, text)
    };
    if limit.maximum.is_some_and(|maximum| maximum < needed) {
        return Err(fault());
    }
    let wanted = limit.maximum.map_or(wanted, |maximum| wanted.min(maximum));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }).map_err(|_| fault())
}

/// [`run_with`] without a daemon before or after.
pub async fn run(commands: Commands) {
    run_with(commands, Doors::default()).await;
}

/// Serves clients for as long as it is polled; dropping it ends every session at once.
pub async fn run_with(commands: Commands, doors: Doors) {
    let proxy = commands.proxy;
    proxy.roles.run_here();
    // Not in the proxy, which the threads hold: with the last sender they end.
    let threads = loop {
        match Threads::start(&proxy) {
            Ok(threads) => break Arc::new(threads),
            Err(error) => {
                tracing::error!(%error, "the proxy cannot start its threads; trying again");
                tokio::time::sleep(THREADS_RETRY).await;
            }
        }
    };
    let mut tasks = JoinSet::new();
    let Doors { mut inherited, keep } = doors;
    for address in addresses(&proxy.options.listen, &proxy.options.vips) {
        let own = inherited.iter().position(|socket| socket.local_addr().is_ok_and(|own| own == address));
        let own = own.map(|at| Inherited(Some(inherited.swap_remove(at))));
        let door = Door { address, inherited: own, keep };
        tasks.spawn(keep_listening(door, Arc::clone(&proxy), Arc::clone(&threads)));
    }
    // Of addresses that are none any more.
    drop(inherited.into_iter().map(|socket| Inherited(Some(socket))).collect::<Vec<_>>());
    if let Some(arriving) = locked(&proxy.arriving).take() {
        tasks.spawn(tunnel::receive(arriving, Arc::clone(&proxy), threads));
    }
    tasks.spawn(watch_deadline(proxy));
    // None of them ends by itself.
    while tasks.join_next().await.is_some() {}
}

/// Where to listen: the configured addresses, and each VIP that no wildcard covers.
fn addresses(listen: &[SocketAddr], vips: &[IpAddr]) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = Vec::new();
    let covered = |vip: &IpAddr, port: u16| {
        listen.iter().any(|l| l.port() == port && l.is_ipv4() == vip.is_ipv4() && l.ip().is_unspecified())
    };
    let on_vips = listen.iter().flat_map(|l| vips.iter().map(|vip| (*vip, l.port())));
    let on_vips = on_vips.filter(|(vip, port)| !covered(vip, *port)).map(SocketAddr::from);
    for address in listen.iter().copied().chain(on_vips) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// Notices a lease that runs out with nobody there to say so, and ends sessions and sockets. Only courtesy: nothing
/// passes a lapsed gate anyway.
async fn watch_deadline(proxy: Arc<Proxy>) {
    let gate = &proxy.gate;
    let mut view = gate.watch();
    loop {
        let deadline = gate.deadline();
        if deadline == Instant::ZERO {
            // Shut: an extension wakes us.
            let _ = view.wait_for(|_| gate.deadline() != Instant::ZERO).await;
            continue;
        }
        let left = deadline.since(gate.now());
        if left.is_zero() {
            gate.note_lapse(&proxy.lapsed);
        } else {
            // The runtime's timers stand still in suspend; so do all sessions, and each asks the gate.
            tokio::time::sleep(left.max(LAPSE_WATCH_MIN)).await;
        }
    }
}

/// A socket that the daemon before left open; closed when dropped.
struct Inherited(Option<std::net::TcpListener>);

impl Inherited {
    fn open(mut self) -> io::Result<TcpListener> {
        let socket = self.0.take().ok_or(io::ErrorKind::NotFound)?;
        socket.set_nonblocking(true)?;
        TcpListener::from_std(socket)
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            shut(SockRef::from(socket));
        }
    }
}

/// Ends the listening itself, not only our share in it: the service manager may not have let go of its own yet.
fn shut(socket: SockRef<'_>) {
    let _no_longer_listening = socket.shutdown(Shutdown::Both);
}

/// Returns when an inherited socket is not to be kept any longer: this node is not one that may open by itself, or the
/// gate stays shut.
async fn in_vain(mut snapshots: watch::Receiver<Arc<Snapshot>>, since: tokio::time::Instant) {
    let hopeless = |snapshot: &Arc<Snapshot>| {
        let journal = &snapshot.journal;
        let is_holder = journal.complete > 0 && journal.complete == journal.won && journal.fence <= journal.complete;
        snapshot.role == Role::Fenced || !is_holder
    };
    // Timed out or hopeless, it comes to the same.
    let _ = tokio::time::timeout_at(since + INHERITED_FOR, snapshots.wait_for(hopeless)).await;
}

/// An address to listen on.
struct Door {
    address: SocketAddr,
    inherited: Option<Inherited>,
    keep: Option<Keep>,
}

/// One address: a socket while the gate is open, none while it is not.
async fn keep_listening(door: Door, proxy: Arc<Proxy>, threads: Arc<Threads>) {
    let Door { address, mut inherited, keep } = door;
    let started = tokio::time::Instant::now();
    let gate = &proxy.gate;
    let mut sessions = JoinSet::new();
    let mut view = gate.watch();
    let mut complained = false;
    // Between the gate's time and that of forwarding: who connects now waits in the kernel's queue.
    let mut standing: Option<(Inherited, tokio::time::Instant)> = None;
    loop {
        let pass = gate.admit().filter(|_| !gate.is_stopping());
        let forwarder = proxy.options.forward.as_ref().filter(|_| pass.is_none() && !gate.is_stopping());
        let forwards = forwarder.and_then(|forwarder| Some((forwarder, forwarder.takes_connections()?)));
        if pass.is_none() && forwards.is_none() {
            tokio::select! {
                _ = view.changed() => {}
                Some(_) = sessions.join_next() => {}
                () = forward::begins(&proxy.options) => {}
                () = in_vain(proxy.snapshots.clone(), started), if inherited.is_some() => inherited = None,
                () = stands_in_vain(&proxy, &standing), if standing.is_some() => standing = None,
            }
            continue;
        }
        match standing
            .take()
            .map(|(door, _)| door)
            .or_else(|| inherited.take())
            .map_or_else(|| bind(address), Inherited::open)
        {
            Ok(listener) => {
                complained = false;
                let Some(pass) = pass else {
                    if let Some((forwarder, epoch)) = forwards {
                        forward::accept(&listener, forwarder, epoch, &proxy, &mut sessions).await;
                    }
                    standing = stand(listener, &proxy, forward::takes_over(&proxy.options));
                    continue;
                };
                gate.door_opened();
                let is_kept = tokio::select! {
                    biased;
                    () = pass.ended() => false,
                    () = gate.stopped() => true,
                    () = accept(&listener, &proxy, &threads, &pass, &mut sessions) => false,
                };
                if pass.carried().is_some() {
                    // Who connected before that goes along with the others.
                    while let Some(Ok((stream, peer))) = listener.accept().now_or_never() {
                        admit(stream, peer, &proxy, &threads, &pass, &mut sessions);
                    }
                    standing = stand(listener, &proxy, true);
                } else {
                    match keep.filter(|_| is_kept) {
                        Some(keep) => keep(listener.as_fd()),
                        None => shut(SockRef::from(&listener)),
                    }
                    drop(listener);
                }
                gate.door_closed();
            }
            Err(error) => {
                if !complained {
                    tracing::warn!(%address, %error, "cannot listen for clients; trying again until it can");
                    complained = true;
                }
                tokio::time::sleep(BIND_RETRY).await;
            }
        }
    }
}

/// Keeps a socket that forwarding, or the gate, will want in a moment; else it is closed.
fn stand(listener: TcpListener, proxy: &Proxy, soon: bool) -> Option<(Inherited, tokio::time::Instant)> {
    let socket = Inherited(Some(listener.into_std().ok()?));
    let forwards = proxy.options.forward.as_ref().is_some_and(|forwarder| forwarder.is_for_connections());
    (soon && forwards).then(|| (socket, tokio::time::Instant::now() + STANDS_FOR))
}

async fn stands_in_vain(proxy: &Proxy, standing: &Option<(Inherited, tokio::time::Instant)>) {
    if let Some((_, until)) = standing {
        tokio::time::sleep_until(*until).await;
        forward::taken_over(&proxy.options).await;
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        // A VIP may not be bound yet.
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    prepare(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until the pass is over.
async fn accept(
    listener: &TcpListener,
    proxy: &Arc<Proxy>,
    threads: &Arc<Threads>,
    pass: &Pass,
    sessions: &mut JoinSet<()>,
) {
    while pass.stands() {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = sessions.join_next() => continue,
        };
        match accepted {
            Ok((stream, peer)) => admit(stream, peer, proxy, threads, pass, sessions),
            Err(error) => {
                tracing::warn!(%error, "a client could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    proxy: &Arc<Proxy>,
    threads: &Arc<Threads>,
    pass: &Pass,
    sessions: &mut JoinSet<()>,
) {
    let Some(seat) = Seat::take(proxy) else { return };
    let arriving = (seat, proxy.gate.passage());
    let (proxy, threads, pass) = (Arc::clone(proxy), Arc::clone(threads), pass.clone());
    sessions.spawn(session::serve(ClientStream::Plain(stream), peer, proxy, threads, pass, arriving));
}

/// Set once: accepted sockets have what their listener has (tcp(7)).
fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(count))?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// A connection's place among `max_clients`; given back when dropped.
pub(crate) struct Seat {
    proxy: Arc<Proxy>,
    /// Beyond `max_clients`: to be told so.
    pub(crate) crowded: bool,
}

impl Seat {
    /// `None`: so many that they are not even told.
    pub(crate) fn take(proxy: &Arc<Proxy>) -> Option<Seat> {
        let most = proxy.limits().max_clients;
        let before = proxy.clients.fetch_add(1, Ordering::Relaxed);
        let seat = Seat { proxy: Arc::clone(proxy), crowded: before >= most };
        (before < most.saturating_add(CROWD)).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.proxy.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vip_is_listened_on_unless_a_wildcard_covers_it() {
        let parse = |text: &str| text.parse::<SocketAddr>().expect(text);
        let vips: Vec<IpAddr> = vec!["192.0.2.100".parse().expect("v4"), "2001:db8::100".parse().expect("v6")];
        let wild = [parse("0.0.0.0:6432"), parse("[::]:6432")];
        assert_eq!(addresses(&wild, &vips), wild);
        let v4_only = addresses(&wild[..1], &vips);
        assert_eq!(v4_only, [wild[0], parse("[2001:db8::100]:6432")]);
        let specific = addresses(&[parse("192.0.2.11:6432")], &vips);
        assert_eq!(specific, [parse("192.0.2.11:6432"), parse("192.0.2.100:6432"), parse("[2001:db8::100]:6432")]);
    }

    #[tokio::test]
    async fn both_families_listen_on_one_port_and_again_at_once() {
        let port = (0..2000u16).map(|n| 30_000 + n).find(|port| bind(SocketAddr::from(([0, 0, 0, 0], *port))).is_ok());
        let port = port.expect("a free port");
        for _ in 0..3 {
            let v6 = bind(format!("[::]:{port}").parse().expect("address")).expect("v6");
            let v4 = bind(SocketAddr::from(([0, 0, 0, 0], port))).expect("v4 beside v6");
            let client = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
            let accepted = v4.accept().await.expect("accepts");
            let inherited = SockRef::from(&accepted.0);
            assert!(inherited.tcp_nodelay().expect("an option") && inherited.keepalive().expect("an option"));
            assert_eq!(inherited.tcp_user_timeout().expect("an option"), Some(USER_TIMEOUT));
            assert_eq!(inherited.tcp_keepalive_time().expect("an option"), KEEPALIVE.0);
            // Closed from this side first: the port lingers in TIME_WAIT.
            drop((accepted, v4, v6));
            drop(client);
        }
    }

    #[tokio::test]
    async fn an_address_that_is_not_here_yet_can_be_listened_on() {
        assert!(bind("192.0.2.77:30999".parse().expect("address")).is_ok());
    }
}
