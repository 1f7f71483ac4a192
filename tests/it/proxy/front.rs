//! A gate with its proxy before the shared cluster, and psql through it.

use crate::pg::{PASSWORD, Pg, shared};
use futures_util::FutureExt;
use portcullis::app::notices::{self, Notices};
use portcullis::app::pools::{is_for_pools, obey, typed};
use portcullis::app::reload::Reloader;
use portcullis::base::config::{Config, Console, Notify, Pool, Secret};
use portcullis::base::time::{Duration, Instant};
use portcullis::engine::outlook::Outlook;
use portcullis::engine::status::*;
use portcullis::io::clock;
use portcullis::serve::command::Commands;
use portcullis::serve::forward::Forwarder;
use portcullis::serve::gate::{Gate, ReadClock};
use portcullis::serve::http::{self, ControlReply};
use portcullis::serve::listener::{Confirm, Doors, ProxyOptions, Rules, mock_secret, run_with};
use portcullis::serve::tls::TlsAcceptor;
use portcullis::wire::hba::{HbaFile, IdentFile};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tokio::process::Command;
use tokio::sync::{mpsc, watch};

/// What a test may choose.
pub struct Setup {
    pub hba: &'static str,
    /// pg_ident.conf.
    pub ident: &'static str,
    /// `auth.cache`.
    pub cache: Duration,
    pub cluster_key: [u8; 32],
    pub tls: Option<TlsAcceptor>,
    pub max_clients: u32,
    pub query_wait: Duration,
    pub clock: ReadClock,
    pub pool: Pool,
    /// Another than the shared one.
    pub pg: Option<Arc<Pg>>,
    /// An inherited socket says where it listens.
    pub doors: Doors,
    /// The way to another gate.
    pub forward: Option<Arc<Forwarder>>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            hba: "host all trusty 127.0.0.1/32 trust\nhost all all all scram-sha-256",
            ident: "",
            cache: Duration::ZERO,
            cluster_key: [7; 32],
            tls: None,
            max_clients: 100,
            query_wait: Duration::from_secs(30),
            clock: clock::now,
            pool: Pool { threads: 2, ..Pool::default() },
            pg: None,
            doors: Doors::default(),
            forward: None,
        }
    }
}

pub struct Front {
    pub pg: Arc<Pg>,
    pub gate: Arc<Gate>,
    pub address: SocketAddr,
    /// What the peer says when asked whether it has everything.
    pub confirmed: Arc<AtomicBool>,
    pub asked: Arc<AtomicU32>,
    /// What a reload replaces.
    pub rules: Arc<Rules>,
    pub commands: Commands,
    /// What was commanded at the console, and by whom.
    pub audit: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
    daemon: tokio::task::JoinHandle<()>,
    /// What the guard publishes.
    pub snapshot: watch::Sender<Arc<Snapshot>>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
        self.daemon.abort();
    }
}

/// A gate open for longer than any test takes.
pub async fn open() -> Front {
    open_with(Setup::default()).await
}

pub async fn open_with(setup: Setup) -> Front {
    let front = shut_with(setup).await;
    front.extend(Duration::from_secs(3600));
    front.wait_for_door().await;
    front
}

pub async fn shut_with(setup: Setup) -> Front {
    let pg = match setup.pg {
        Some(pg) => pg,
        None => tokio::task::spawn_blocking(shared).await.unwrap(),
    };
    let gate = Gate::new(setup.clock);
    let inherited = setup.doors.inherited.first().map(|socket| socket.local_addr().unwrap());
    let address = inherited.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], free_port())));
    let maps = IdentFile::parse("pg_ident.conf", setup.ident).unwrap();
    let hba = HbaFile::parse("hba.conf", setup.hba).unwrap().with_maps(maps).unwrap();
    let rules = Rules::new(hba, setup.tls, setup.cache);
    let options = ProxyOptions {
        listen: vec![address],
        vips: vec![],
        socket_dir: pg.socket_dir().to_owned(),
        port: pg.port,
        admin_user: "postgres".to_owned(),
        rules: Arc::clone(&rules),
        mock_secret: mock_secret(&Secret::new(setup.cluster_key.to_vec())),
        pool: Pool { max_clients: setup.max_clients, query_wait: setup.query_wait, ..setup.pool },
        node: "alp".parse().unwrap(),
        forward: setup.forward,
    };
    let (snapshot, snapshots) = watch::channel(Arc::new(snapshot()));
    let (confirmed, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU32::new(0)));
    let confirm: Confirm = {
        let (confirmed, asked) = (Arc::clone(&confirmed), Arc::clone(&asked));
        Arc::new(move || {
            asked.fetch_add(1, Ordering::SeqCst);
            let confirmed = Arc::clone(&confirmed);
            async move { confirmed.load(Ordering::SeqCst) }.boxed()
        })
    };
    let commands = Commands::new(Arc::clone(&gate), options, snapshots, confirm);
    let (audit, daemon) = open_console(&gate, &commands, &rules);
    let task = tokio::spawn(run_with(commands.clone(), setup.doors));
    Front { pg, gate, address, confirmed, asked, rules, commands, audit, task, daemon, snapshot }
}

/// The console for `trusty`, to look at for `app`; and what stands in for the daemon behind it.
fn open_console(
    gate: &Arc<Gate>,
    commands: &Commands,
    rules: &Arc<Rules>,
) -> (Arc<Mutex<Vec<String>>>, tokio::task::JoinHandle<()>) {
    let example = Config::example();
    let mut config = Config::parse(&example, std::path::Path::new("portcullis.toml")).unwrap();
    config.console = Console { admins: vec!["trusty".to_owned()], stats: vec!["app".to_owned()] };
    let (control, mut requests) = mpsc::channel::<http::Command>(16);
    commands.open_console(config.clone(), control);
    let notices = Notices::start(Notify::default(), notices::LIMIT);
    let file = "/nonexistent/portcullis.toml".into();
    let reloader = Arc::new(Reloader::new(file, Arc::clone(rules), commands.clone(), notices, config));
    let audit = Arc::new(Mutex::new(Vec::new()));
    let (gate, commands, noted) = (Arc::clone(gate), commands.clone(), Arc::clone(&audit));
    // The driver would log them.
    let (told, mut events) = mpsc::channel(16);
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let daemon = tokio::spawn(async move {
        while let Some((request, reply)) = requests.recv().await {
            let by = request.from.console.clone().expect("who gave it");
            noted.lock().unwrap().push(format!("{by}: {}", typed(&request)));
            if is_for_pools(&request) {
                let (commands, reloader, told) = (commands.clone(), Arc::clone(&reloader), told.clone());
                tokio::spawn(async move { obey(request, reply, &commands, &reloader, &told).await });
                continue;
            }
            // The guard's.
            match request.verb.as_str() {
                "pause" => gate.pause(),
                _ => gate.resume(),
            }
            let text = format!("{}d", request.verb);
            let _gone = reply.send(ControlReply::End { exit: 0, text, data: None }).await;
        }
    });
    (audit, daemon)
}

impl Front {
    /// Open until so long from now. Returns the deadline.
    pub fn extend(&self, by: Duration) -> Instant {
        let until = clock::now() + by;
        self.gate.extend(until);
        until
    }

    pub async fn wait_for_door(&self) {
        eventually("the door opens", async || tokio::net::TcpStream::connect(self.address).await.is_ok()).await;
    }

    /// A backend runs pg_sleep().
    pub async fn wait_until_asleep(&self, pid: i32) {
        let sleeps = format!("select count(*) from pg_stat_activity where pid = {pid} and wait_event = 'PgSleep'");
        eventually("it sleeps", async || self.pg.admin(&sleeps).unwrap() == "1").await;
    }

    pub fn psql(&self, user: &str, password: &str, sql: &str) -> Command {
        let mut command = Command::new("psql");
        command.args(["-XAtq", "-w", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-c", sql]);
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.address.port().to_string());
        command.env("PGUSER", user).env("PGDATABASE", "app").env("PGPASSWORD", password);
        command.env("PGSSLMODE", "disable").env("PGCONNECT_TIMEOUT", "10").kill_on_drop(true);
        command
    }

    pub async fn query(&self, user: &str, sql: &str) -> Result<String, String> {
        output(&mut self.psql(user, PASSWORD, sql)).await
    }

    pub async fn client(&self, user: &str) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.address.port()).user(user).password(PASSWORD).dbname("app");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

pub async fn output(command: &mut Command) -> Result<String, String> {
    let out = tokio::time::timeout(Duration::from_secs(120), command.output()).await.expect("psql hangs").unwrap();
    if out.status.success() {
        Ok(String::from_utf8(out.stdout).unwrap().trim_end().to_owned())
    } else {
        Err(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

/// Waits for a condition, half a minute at most.
pub async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

/// Below the ephemeral range, free now, of this process.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let offset = (std::process::id() % 500) * 20 + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(20_000 + offset % 12_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn snapshot() -> Snapshot {
    let node = |node_id: u32, name: &str, role: &str| NodeRow {
        node_id,
        name: name.parse().unwrap(),
        hostname: format!("192.0.2.{}", 11 + node_id),
        port: 5432,
        status: "up".to_owned(),
        role: role.to_owned(),
        weight: 0.5,
        attached: true,
        replication_delay_bytes: Some(u64::from(node_id) * 120),
        replication_state: (node_id == 1).then(|| "streaming".to_owned()),
        sync_state: (node_id == 1).then(|| "sync".to_owned()),
        select_count: 0,
        last_status_change: Some("2026-11-20T15:21:12Z".to_owned()),
        replication_delay_seconds: None,
    };
    Snapshot {
        node: "alp".parse().unwrap(),
        version: "test".to_owned(),
        role: Role::Active,
        gate: GateStatus {
            open: true,
            state: GateState::Open,
            reason: None,
            lease_remaining_ms: 1,
            sessions: 0,
            forwarded: 0,
            waiting: 0,
        },
        epoch: 7,
        witness: None,
        vip: None,
        vips: vec![],
        peer: None,
        replication: ReplicationStatus {
            mode: "synchronous".to_owned(),
            in_sync: true,
            alone_since: None,
            waiting_since: None,
            timeline: None,
            lsn: None,
            blocks: false,
        },
        procedure: None,
        nodes: vec![node(0, "alp", "primary"), node(1, "midna", "standby")],
        events: vec![],
        postgres: PostgresStatus::default(),
        journal: JournalStatus { won: 7, complete: 7, ..JournalStatus::default() },
        advice: None,
        turn_running: true,
        proofs: Vec::new(),
        maintenance: false,
        paused_databases: vec![],
        vip_witness: None,
        counters: Counters::default(),
        at: String::new(),
        outlook: Outlook::default(),
        next: None,
        lag: None,
        lease_ms: 5000,
        next_xid: None,
    }
}
