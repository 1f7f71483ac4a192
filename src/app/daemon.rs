//! Start and stop of the node: reads everything that needs rights, becomes the user that owns PostgreSQL, then wires
//! senses, guard, hands and listeners together. It decides nothing.
//!
//! Over 600 lines: it is the one list of everything that there is, in the order in which it must begin.

use crate::app::audit::{self, Audit};
use crate::app::doctor::{Asked, Examiner, Said};
use crate::app::driver::{Changes, Driver, EVENTS_WAITING, Request, ask_guard, open_event_log, read_clocks};
use crate::app::hands::Hands;
use crate::app::link_watch::watch_links;
use crate::app::log;
use crate::app::notices::{self, Notices};
use crate::app::pools;
use crate::app::reload::Reloader;
use crate::app::wall::{Wall, WallHand};
use crate::base::config::{Auth, Config, DnsMode, Node, Passive};
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant};
use crate::engine::lag::LagMeter;
use crate::engine::machine::Machine;
use crate::engine::outlook::Ledger;
use crate::engine::report::PgReport;
use crate::engine::setup::Setup;
use crate::engine::status::{EventRow, Snapshot};
use crate::engine::turn::Event;
use crate::io::dns::{Authority, find_authorities};
use crate::io::journal::Journal;
use crate::io::postgres::{Cluster, Peer, PgLost};
use crate::io::{clock, fd_store, files, postgres, privileges};
use crate::serve::command::Commands;
use crate::serve::forward::Forwarder;
use crate::serve::gate::Gate;
use crate::serve::http::log::EventLog;
use crate::serve::http::{Ask, History, Live, Pools, Views, bind_control, control_router, router, serve_tcp};
use crate::serve::listener::{self, Confirm, Doors, ProxyOptions, Rules};
use crate::serve::peer::{PeerClient, PeerCounters, PeerIdentity, listen_with};
use crate::serve::tls;
use crate::wire::dns::{ServiceNames, TsigKey};
use crate::wire::hba::HbaFile;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, watch};
use zeroize::Zeroizing;

/// How often the local PostgreSQL is looked at, and how long a look may take.
const PG_LOOK_EVERY: Duration = Duration::from_millis(250);
const PG_LOOK_LIMIT: Duration = Duration::from_secs(2);
/// While a procedure is under way here: clients wait for what is seen next.
const PG_LOOK_PROCEDURE: Duration = Duration::from_millis(20);
/// At the start, while the gate is still shut: R6's confirmation of the standby is a look away.
const PG_LOOK_FIRST: Duration = Duration::from_millis(50);
const PG_LOOK_FIRST_FOR: Duration = Duration::from_secs(5);
/// A turn older than this is not running any more (`/health`).
const BEAT_LIMIT: Duration = Duration::from_secs(2);
/// How long an answer after a client's cancel is held for the standby's confirmation (R4).
const CONFIRM_LIMIT: Duration = Duration::from_secs(10);
/// Under `state_dir`: `may-start-primary` refused the local PostgreSQL, so the daemon starts it once proof comes (R6).
pub const START_REFUSED: &str = "start-refused";
/// Events shown from former lives.
const EVENTS_REMEMBERED: usize = 50;

/// What the hands are made of.
pub struct Parts {
    pub gate: Arc<Gate>,
    pub authorities: Vec<Arc<Authority>>,
    pub ttl: u32,
    pub peer: Option<Arc<PeerClient>>,
    pub cluster: Arc<Cluster>,
    pub peer_cluster: Option<Peer>,
    /// All other nodes: each gets its slot here, and a node without a vote follows any of them.
    pub nodes: Vec<Peer>,
    /// To both voters, where this node is none.
    pub voters: HashMap<NodeName, Arc<PeerClient>>,
    pub vips: Vec<ipnet::IpNet>,
    pub vip_interface: Option<String>,
    pub vip_witnesses: Vec<std::net::IpAddr>,
    pub wall: Option<WallHand>,
    pub units: Vec<String>,
    pub stonith: Vec<String>,
}

/// What had to be read with the rights the daemon was started with.
struct Secrets {
    identity: Arc<PeerIdentity>,
    tsig: Option<Arc<TsigKey>>,
    cluster: Arc<Cluster>,
    rules: Arc<Rules>,
    mock: Zeroizing<[u8; 32]>,
}

fn bad(text: impl Into<String>) -> Fault {
    Fault::new(ExitCode::Config, text)
}

/// Runs the node until SIGTERM or SIGINT.
///
/// # Errors
/// Exit code 2: the configuration, a secret or the state directory does not allow a start.
pub fn run(config: Config, me: &NodeName, config_file: &Path) -> Result<(), Fault> {
    let node = config.node(me).cloned().ok_or_else(|| bad(format!("no [[node]] is named {me}")))?;
    for warning in &config.warnings {
        tracing::warn!("{}: {warning}", config_file.display());
    }
    let inherited = fd_store::take();
    let secrets = read_secrets(&config, &node)?;
    listener::raise_descriptor_limit(config.pool.max_clients)?;
    privileges::become_owner(&node.postgres.data_dir, &[config.state_dir.clone(), config.runtime_dir.clone()])
        .map_err(bad)?;
    log::begin().map_err(|error| bad(format!("no thread for the log: {error}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .thread_name("control")
        .build()
        .map_err(|error| bad(format!("no runtime: {error}")))?;
    runtime.block_on(serve(config, node, secrets, config_file.to_owned(), inherited))
}

fn read_secrets(config: &Config, node: &Node) -> Result<Secrets, Fault> {
    let key = files::cluster_key(&config.cluster.key_file).map_err(bad)?;
    let others: Vec<NodeName> = config.nodes.iter().map(|n| n.name.clone()).filter(|n| *n != node.name).collect();
    let identity = Arc::new(PeerIdentity::new(&key, &node.name, &others).map_err(bad)?);
    let tsig = match config.dns.as_ref().and_then(|dns| dns.tsig.as_ref().map(|tsig| (dns.mode, tsig))) {
        Some((mode, tsig)) if mode == DnsMode::Update || tsig.key_file.exists() => {
            let secret = files::tsig_secret(&tsig.key_file).map_err(bad)?;
            let text = data_encoding::BASE64.encode(secret.expose());
            Some(Arc::new(TsigKey::new(&tsig.name, &tsig.algorithm, &text).map_err(bad)?))
        }
        _ => None,
    };
    let mut cluster = Cluster::from_config(config, node).map_err(|error| bad(error.to_string()))?;
    cluster.replication.password = files::replication_password(&config.replication.password_file).map_err(bad)?;
    let (hba, tls) = read_rules(&config.auth)?;
    let rules = Rules::new(hba, tls, config.auth.cache);
    Ok(Secrets { identity, tsig, cluster: Arc::new(cluster), rules, mock: listener::mock_secret(&key) })
}

/// Who is let in and with which certificate, from the files.
pub(super) fn read_rules(auth: &Auth) -> Result<(HbaFile, Option<tls::TlsAcceptor>), Fault> {
    let hba = files::load_rules(auth).map_err(|trouble| bad(trouble.to_string()))?;
    Ok((hba, read_tls(auth)?))
}

/// Certificate, key, CA and revocation lists, where there are any.
pub(super) fn read_tls(auth: &Auth) -> Result<Option<tls::TlsAcceptor>, Fault> {
    let (Some(cert), Some(key)) = (&auth.tls_cert_file, &auth.tls_key_file) else { return Ok(None) };
    let clients = auth.tls_ca_file.as_deref().map(|ca| (ca, auth.tls_crl_file.as_deref()));
    tls::load(cert, key, clients).map(Some)
}

async fn find_servers(config: &Config) -> Result<Vec<SocketAddr>, Fault> {
    let Some(dns) = &config.dns else { return Ok(Vec::new()) };
    if !dns.servers.is_empty() {
        return Ok(dns.servers.clone());
    }
    find_authorities(&dns.zone).await.map_err(|why| bad(format!("dns.servers is not set and {why}; set it")))
}

async fn serve(
    config: Config,
    node: Node,
    secrets: Secrets,
    config_file: PathBuf,
    inherited: Vec<TcpListener>,
) -> Result<(), Fault> {
    let servers = find_servers(&config).await?;
    let (journal, durable, torn) = Journal::open(&config.state_dir).map_err(bad)?;
    if torn {
        tracing::warn!(
            "the journal's last record was cut off by a crash in the middle of writing it; it was never relied on"
        );
    }
    // Behind the state directory's lock, which proves that no other daemon has a wall; before anything listens.
    let wall = Wall::raise(&config, &node).map_err(bad)?;
    let gate = Gate::new(clock::now);
    if wall.is_some() {
        gate.stand_behind_the_wall();
    }
    let boot = clock::boot_id().map_err(|error| bad(format!("/proc is needed for the boot_id: {error}")))?;
    let start = random()?;
    let names: Vec<String> = servers.iter().map(ToString::to_string).collect();
    let digest = config.shared_digest_with(&servers);
    let setup = Setup::new(&config, &node.name, names, digest, start, boot);

    let control = bind_control(&config.runtime_dir.join("control.sock")).await?;
    let (event_tx, event_rx) = mpsc::channel::<Event>(EVENTS_WAITING);
    let (request_tx, request_rx) = mpsc::channel::<Request>(64);
    let (report_tx, report_rx) = watch::channel::<Option<(Instant, PgReport)>>(None);
    let mut parts = make_parts(&config, &node, &secrets, &servers, &setup, Arc::clone(&gate))?;
    parts.wall = wall.as_ref().map(Wall::hand);

    let mut first = Vec::new();
    let present = node.postgres.data_dir.join("PG_VERSION").exists();
    let now = read_clocks();
    let peer_name = setup.peer.clone();
    let mut guard = Machine::start(setup, durable, present, now, &mut first);
    let event_log = config.state_dir.join("events.log");
    guard.remember(past_events(&event_log));
    let event_log = open_event_log(event_log).map_err(|error| bad(format!("no thread for the event log: {error}")))?;
    let snapshot = Arc::new(guard.snapshot(now));
    let (snapshot_tx, snapshot_rx) = watch::channel(snapshot);
    let beat = Arc::new(AtomicU64::new(now.boot.as_nanos()));

    let peer_counters = Arc::new(PeerCounters::default());
    let senses = Senses { events: &event_tx, requests: &request_tx, counters: &peer_counters };
    spawn_senses(&config, &node, &secrets, &parts, &senses, report_tx, snapshot_rx.clone());
    let (rules, identity) = (Arc::clone(&secrets.rules), Arc::clone(&secrets.identity));
    let forwards = config.service.passive == Passive::Forward && node.voter;
    let forward = parts.peer.as_ref().map(|peer| Forwarder::new(Arc::clone(peer), forwards, config.pool.max_clients));
    let commands = make_commands(&config, &node, secrets, &gate, snapshot_rx.clone(), report_rx, forward);
    let examiner = Examiner::new(&config_file, &node.name);
    spawn_peer(&node, identity, &senses, &peer_name, &commands, examiner);
    let notices = Notices::start(config.notify.clone(), notices::LIMIT);
    let reloader = Reloader::new(config_file, rules, commands.clone(), notices.clone(), config.clone());
    let reloader = Arc::new(reloader);
    let people = People { requests: &request_tx, commands: &commands, reloader: &reloader };
    let control_tx = spawn_pages(&config, control, &gate, &beat, &snapshot_rx, people);
    commands.open_console(config.clone(), control_tx);
    let keep = std::env::var_os("NOTIFY_SOCKET").map(|_| fd_store::keep as listener::Keep);
    let proxy = spawn_proxy(commands.clone(), Doors { inherited, keep })?;

    let hands = Hands::new(&parts, journal, event_tx.clone());
    let watchdog = sd_notify::watchdog_enabled().is_some();
    let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    log::of_node(node.name.as_str());
    tracing::info!("portcullis {} runs as node {}", env!("CARGO_PKG_VERSION"), node.name);
    let driver = Driver {
        guard,
        hands,
        gate,
        events: event_rx,
        requests: request_rx,
        snapshots: snapshot_tx,
        beat,
        event_log,
        notices,
        service: config.service.name.clone(),
        first,
        next_ticket: 1,
        peer_counters,
        watchdog,
        pools: commands,
        changes: Changes::default(),
        audit: Audit::default(),
        said: Vec::new(),
        lag: LagMeter::default(),
        ledger: Ledger::default(),
    };
    driver.run(stop_signal(move || reload(&reloader, &request_tx))).await;
    proxy.shutdown_background();
    tracing::info!("stopped");
    Ok(())
}

fn random() -> Result<u64, Fault> {
    use ring::rand::{SecureRandom, SystemRandom};
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).map_err(|_| bad("the kernel gives no random numbers"))?;
    Ok(u64::from_le_bytes(bytes))
}

fn make_parts(
    config: &Config,
    node: &Node,
    secrets: &Secrets,
    servers: &[SocketAddr],
    setup: &Setup,
    gate: Arc<Gate>,
) -> Result<Parts, Fault> {
    let mut authorities = Vec::new();
    let mut ttl = 5;
    if let Some(dns) = &config.dns {
        let names = Arc::new(ServiceNames::new(&dns.zone, &config.service.name).map_err(bad)?);
        ttl = u32::try_from(dns.ttl.as_secs()).unwrap_or(u32::MAX);
        for server in servers {
            authorities.push(Arc::new(Authority::new(*server, Arc::clone(&names), secrets.tsig.clone())));
        }
    }
    let other = config.node(&setup.peer).filter(|n| n.name != node.name);
    let client = |n: &Node| Arc::new(PeerClient::new(Arc::clone(&secrets.identity), n.name.clone(), n.peer_listen));
    let peer = other.map(client);
    let asked = config.voters().into_iter().filter(|_| !node.voter);
    Ok(Parts {
        gate,
        authorities,
        ttl,
        peer,
        cluster: Arc::clone(&secrets.cluster),
        peer_cluster: other.map(Peer::from_node),
        nodes: config.nodes.iter().filter(|n| n.name != node.name).map(Peer::from_node).collect(),
        voters: asked.map(|n| (n.name.clone(), client(n))).collect(),
        vips: config.vip.as_ref().map(|vip| vip.addresses.clone()).unwrap_or_default(),
        vip_witnesses: config.vip.as_ref().map(|vip| vip.witness.clone()).unwrap_or_default(),
        units: config.service.units.clone(),
        stonith: config.fence.stonith.clone(),
        vip_interface: node.vip_interface.clone().or_else(|| config.vip.as_ref().and_then(|v| v.interface.clone())),
        wall: None,
    })
}

/// Where the senses report to.
struct Senses<'a> {
    events: &'a mpsc::Sender<Event>,
    requests: &'a mpsc::Sender<Request>,
    counters: &'a Arc<PeerCounters>,
}

fn spawn_senses(
    config: &Config,
    node: &Node,
    secrets: &Secrets,
    parts: &Parts,
    to: &Senses<'_>,
    reports: watch::Sender<Option<(Instant, PgReport)>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
) {
    let sender = to.events.clone();
    let refused = config.state_dir.join(START_REFUSED);
    let (gate, began) = (Arc::clone(&parts.gate), clock::now());
    let every = move || {
        let starting = !gate.passes() && clock::now().since(began) < PG_LOOK_FIRST_FOR;
        match () {
            () if snapshots.borrow().procedure.is_some() => PG_LOOK_PROCEDURE,
            () if starting => PG_LOOK_FIRST,
            () => PG_LOOK_EVERY,
        }
    };
    tokio::spawn(postgres::watch(Arc::clone(&secrets.cluster), every, PG_LOOK_LIMIT, move |asked, answer| {
        // What may-start-primary left behind; read while PostgreSQL is down only, and gone once it has run.
        let mark = match &answer {
            Ok(_) => {
                let _usually_not_there = std::fs::remove_file(&refused);
                false
            }
            Err(PgLost::Silent(_)) => false,
            Err(_) => refused.exists(),
        };
        if mark {
            let _full = sender.try_send(Event::PgStartRefused);
        }
        let event = match answer {
            Ok(report) => {
                reports.send_replace(Some((asked, report.clone())));
                Event::PgObserved { asked, report: Box::new(report) }
            }
            Err(PgLost::Silent(why)) => Event::PgSilent(why),
            Err(PgLost::Down(why) | PgLost::Refused(why)) => Event::PgLost(why),
        };
        // Full: the next look comes in a quarter of a second.
        let _full = sender.try_send(event);
    }));
    // A node without a vote never has the VIP, and perhaps not its interface either.
    if let Some(vip) = config.vip.as_ref().filter(|_| node.voter) {
        tokio::spawn(watch_links(vip.addresses.clone(), parts.vip_interface.clone(), to.events.clone()));
    }
}

/// The other node's questions, and its clients' tunnels.
fn spawn_peer(
    node: &Node,
    identity: Arc<PeerIdentity>,
    to: &Senses<'_>,
    peer: &NodeName,
    commands: &Commands,
    examiner: Examiner,
) {
    let counters = Arc::clone(to.counters);
    let requests = to.requests.clone();
    let tunnels = commands.tunnels(peer.clone());
    let (peer, votes) = (peer.clone(), node.voter);
    let handler = move |from: NodeName, asked: Asked| {
        let (requests, examiner, peer) = (requests.clone(), examiner.clone(), peer.clone());
        async move {
            match asked {
                Asked::Guard(question) => Said::Guard(ask_guard(&requests, from, question, votes, &peer).await),
                // Any node of the configuration may ask; it is told, and no more.
                Asked::Doctor(what) => Said::Doctor(examiner.answer(what).await),
            }
        }
    };
    tokio::spawn(listen_with(node.peer_listen, identity, counters, tunnels, handler));
}

/// Where commands of people go.
struct People<'a> {
    requests: &'a mpsc::Sender<Request>,
    commands: &'a Commands,
    reloader: &'a Arc<Reloader>,
}

fn spawn_pages(
    config: &Config,
    control: crate::serve::http::ControlSocket,
    gate: &Arc<Gate>,
    beat: &Arc<AtomicU64>,
    snapshots: &watch::Receiver<Arc<Snapshot>>,
    people: People<'_>,
) -> mpsc::Sender<crate::serve::http::Command> {
    let (asked, beat) = (Arc::clone(gate), Arc::clone(beat));
    let gate_passes: Ask = Arc::new(move || asked.passes() && asked.is_listening());
    let beat: Ask =
        Arc::new(move || clock::now().since(Instant::from_nanos(beat.load(Ordering::Relaxed))) < BEAT_LIMIT);
    let figures = people.commands.clone();
    let pools: Pools = Arc::new(move || figures.figures());
    let live = Live::new(History::start(snapshots.clone(), Arc::clone(&pools)));
    let timed = people.commands.clone();
    let latencies = Arc::new(move || timed.latencies());
    let started = clock::wall().as_duration().as_secs_f64();
    let events = EventLog::new(config.state_dir.join("events.log"));
    let views = Views { snapshot: snapshots.clone(), beat, gate_passes, pools, latencies, started, events, live };
    let (command_tx, commands) = mpsc::channel(16);
    let control_pages = control_router(views.clone(), command_tx.clone());
    tokio::spawn(async move {
        let _never: () = control.serve(control_pages).await;
    });
    let (requests, pools) = (people.requests.clone(), people.commands.clone());
    tokio::spawn(pools::take(commands, requests, pools, Arc::clone(people.reloader)));
    if let Some(listen) = config.status_listen {
        let pages = router(views);
        tokio::spawn(async move {
            loop {
                let fault = serve_tcp(listen, pages.clone()).await;
                tracing::warn!("{fault}; trying again in 5 s");
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        });
    }
    command_tx
}

fn make_commands(
    config: &Config,
    node: &Node,
    secrets: Secrets,
    gate: &Arc<Gate>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    reports: watch::Receiver<Option<(Instant, PgReport)>>,
    forward: Option<Arc<Forwarder>>,
) -> Commands {
    let options = ProxyOptions {
        listen: config.service.listen.clone(),
        vips: config.vip.as_ref().map(|v| v.addresses.iter().map(|net| net.addr()).collect()).unwrap_or_default(),
        socket_dir: node.postgres.socket_dir.clone(),
        port: node.postgres.port,
        admin_user: config.postgres.admin_user.clone(),
        rules: secrets.rules,
        mock_secret: secrets.mock,
        pool: config.pool.clone(),
        node: node.name.clone(),
        forward,
    };
    let peer = config.voters().into_iter().map(|n| n.name.clone()).find(|n| *n != node.name);
    let confirm = confirmation(peer, snapshots.clone(), reports);
    Commands::new(Arc::clone(gate), options, snapshots, confirm)
}

/// The door on a runtime of its own, as the data threads are: a busy proxy never delays a renewal. As many threads as
/// move data: a login that changes threads costs more.
fn spawn_proxy(commands: Commands, doors: Doors) -> Result<tokio::runtime::Runtime, Fault> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads((cores / 2).clamp(1, 4))
        .thread_name("proxy")
        .build()
        .map_err(|error| bad(format!("no runtime for the proxy: {error}")))?;
    runtime.spawn(listener::run_with(commands, doors));
    Ok(runtime)
}

/// R4: has the peer flushed past what PostgreSQL had written when this was asked, or is this node alone? It is alone
/// when the list is empty, which it is only by the guard's own record; a `sync=none` merely read may be overtaken.
fn confirmation(
    peer: Option<NodeName>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    reports: watch::Receiver<Option<(Instant, PgReport)>>,
) -> Confirm {
    Arc::new(move || {
        let (peer, snapshots, mut reports) = (peer.clone(), snapshots.clone(), reports.clone());
        Box::pin(async move {
            let asked = clock::now();
            let confirmed = async {
                let mut goal = None;
                loop {
                    {
                        let replication = &snapshots.borrow().replication;
                        if replication.mode != "synchronous" {
                            return true;
                        }
                    }
                    let seen = reports.borrow_and_update().clone();
                    if let Some((at, report)) = seen.filter(|(at, _)| *at >= asked) {
                        let _ = at;
                        if report.sync_list.trim().is_empty() {
                            return true;
                        }
                        let goal = *goal.get_or_insert(report.lsn);
                        let name = peer.as_ref().map_or("", NodeName::as_str);
                        let row = report.standbys.iter().find(|row| row.application_name == name);
                        if row.and_then(|row| row.flush_lsn).is_some_and(|flushed| flushed >= goal) {
                            return true;
                        }
                    }
                    if reports.changed().await.is_err() {
                        return false;
                    }
                }
            };
            tokio::time::timeout(CONFIRM_LIMIT, confirmed).await.unwrap_or(false)
        })
    })
}

fn past_events(path: &Path) -> Vec<EventRow> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let rows: Vec<EventRow> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let skip = rows.len().saturating_sub(EVENTS_REMEMBERED);
    rows.into_iter().skip(skip).collect()
}

/// SIGHUP: the log says what came of it.
fn reload(reloader: &Reloader, requests: &mpsc::Sender<Request>) {
    let (exit, text) = match reloader.reload() {
        Ok(done) => (0, done.text()),
        Err(fault) => {
            tracing::error!("nothing was reloaded: {fault}");
            (1, format!("nothing was reloaded: {fault}"))
        }
    };
    // Who sent the signal is not known; with a driver that has no room for it, the log has it.
    let told = audit::told("SIGHUP", "reload", exit, &text);
    if let Err(error) = requests.try_send(Request::Audited(told)) {
        tracing::info!("{text} ({error})");
    }
}

/// SIGTERM or SIGINT; SIGHUP calls `reload`.
async fn stop_signal(reload: impl Fn()) {
    use tokio::signal::unix::{SignalKind, signal};
    let streams = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = streams else {
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            _ = hangup.recv() => reload(),
        }
    }
}
