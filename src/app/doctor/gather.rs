//! The facts that the checks judge, asked live on this node: bounded, and nothing is changed anywhere.
//!
//! The one thing sent that could change something is an update to the DNS server whose prerequisite names a text that
//! nobody ever wrote; and what it would write is what was just read.

use super::host::{self, HostFacts};
use super::show::Progress;
use crate::app::client::{self, Target};
use crate::base::config::{Config, DnsMode, Node};
use crate::base::ids::NodeName;
use crate::base::time::Duration;
use crate::engine::status::Snapshot;
use crate::io::dns::{Authority, find_authorities};
use crate::io::host as local;
use crate::io::postgres::{Cluster, Fitness, Login, Peer, Survey, Tool};
use crate::io::{files, outside};
use crate::wire::dns::{Reading, RecordPair, ServiceNames, TsigKey, UpdateOutcome, ZoneHead};
use crate::wire::hba::HbaFile;
use crate::wire::pg::{Startup, field};
use futures_util::future::join_all;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// All questions of PostgreSQL, one of a DNS server, one knock at a door, one login at another PostgreSQL.
const PG_LIMIT: Duration = Duration::from_millis(3500);
const FITNESS_LIMIT: Duration = Duration::from_secs(2);
const DNS_LIMIT: Duration = Duration::from_secs(3);
const FIND_LIMIT: Duration = Duration::from_secs(3);
const DOOR_LIMIT: Duration = Duration::from_millis(1500);
const LOGIN_LIMIT: Duration = Duration::from_secs(4);
const UNITS_LIMIT: Duration = Duration::from_secs(4);
/// What `pg_rewind` logs in to.
const REWIND_DATABASE: &str = "postgres";
/// Mode bits of everybody else.
const OTHERS: u32 = 0o007;
/// Roles and databases that are tried at each door, beside the admin user.
const TRIED: usize = 2;
/// Longest refusal of a PostgreSQL that is read.
const MAX_REFUSAL: usize = 16 * 1024;

/// Whose PostgreSQL stands behind a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Own,
    Peer,
}

/// What a PostgreSQL port said to a login that is no replication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Knock {
    /// Nothing listens there.
    Closed,
    /// It listens, and no rule of pg_hba lets this login in.
    Rejected,
    /// It asked for a password, or for nothing at all.
    Admitted,
    Unclear(String),
}

/// One knock at PostgreSQL's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    pub whose: Whose,
    pub address: SocketAddr,
    pub user: String,
    pub database: String,
    pub knock: Knock,
}

/// One DNS server.
#[derive(Debug)]
pub struct Server {
    pub address: SocketAddr,
    pub answer: Result<Reading, String>,
    /// The zone's SOA, asked by TCP.
    pub head: Result<ZoneHead, String>,
    /// Our wall clock when it was asked, in seconds since 1970.
    pub asked_at: i64,
    /// Of the server that takes the updates: what it said to one whose prerequisite cannot hold.
    pub update: Option<UpdateOutcome>,
}

/// Mode bits of a place in the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub mode: u32,
}

/// The replication role's login at another node's PostgreSQL, tried from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginFacts {
    pub at: NodeName,
    pub replication: Login,
    /// To the database that `pg_rewind` reads from.
    pub rewind: Login,
}

/// Everything.
#[derive(Debug)]
pub struct Facts {
    pub survey: Result<Survey, String>,
    pub fitness: Result<Fitness, String>,
    pub tools: Vec<Tool>,
    pub logins: Vec<LoginFacts>,
    pub status: Result<Snapshot, String>,
    pub doors: Vec<Door>,
    /// The gate is not open, and yet its port takes connections there.
    pub gate_taken: Option<SocketAddr>,
    pub servers: Result<Vec<Server>, String>,
    /// Servers that stand on this machine or on a node.
    pub server_on_node: Vec<SocketAddr>,
    pub socket: Option<Place>,
    pub socket_dir: Option<Place>,
    /// Those of `hba_file`; its errors are in `files` too.
    pub rules: Result<HbaFile, String>,
    /// Wrong files of the configuration: text and remedy.
    pub files: Vec<(String, String)>,
    /// Secret files that others can read or write.
    pub open_secrets: Vec<Place>,
    /// Secret files and the users they belong to, who are neither root nor the data directory's owner.
    pub foreign_secrets: Vec<(PathBuf, u32)>,
    /// The unit that owns the cluster, and whether it asks `may-start-primary`.
    pub unit: Option<(String, bool)>,
    pub units: Result<Vec<outside::UnitFacts>, String>,
    pub host: HostFacts,
    /// The table of the second wall stands; `None`: not configured.
    pub kernel_gate: Option<Result<bool, String>>,
}

/// Asks everything of this node, most of it at once.
pub async fn gather(config: &Config, node: &Node, file: &Path, target: &Target, progress: &Progress) -> Facts {
    let cluster = Cluster::from_config(config, node).map_err(|error| error.to_string());
    let cluster = cluster.as_ref();
    let first = async {
        let status = progress.step("daemon", client::snapshot(target));
        let pg = progress.step("PostgreSQL", postgres(cluster.map_err(String::as_str)));
        let (status, (survey, fitness)) = tokio::join!(status, pg);
        let status = status.map_err(|fault| fault.text);
        let (doors, gate_taken) = tokio::join!(
            progress.step("side doors", doors(config, node, survey.as_ref().ok(), status.as_ref().ok())),
            gate_taken(config, node, status.as_ref().ok(), target),
        );
        (status, survey, fitness, doors, gate_taken)
    };
    let tools = async {
        match cluster {
            Ok(cluster) => cluster.tools().await,
            Err(_) => Vec::new(),
        }
    };
    let units = async {
        let limit = tokio::time::timeout(UNITS_LIMIT, outside::unit_facts(&config.service.units)).await;
        limit.unwrap_or_else(|_| Err(format!("systemctl gave no answer within {UNITS_LIMIT:?}")))
    };
    let ((status, survey, fitness, doors, gate_taken), servers, tools, logins, units, host) = tokio::join!(
        first,
        progress.step("DNS", servers(config)),
        tools,
        progress.step("replication login", logins(config, node, cluster.ok())),
        units,
        progress.step("machine", host::gather(config, node)),
    );
    let place = |path: PathBuf| {
        let meta = std::fs::metadata(&path).ok()?;
        let fits = meta.is_dir() || meta.file_type().is_socket();
        fits.then(|| Place { path, mode: meta.mode() & 0o7777 })
    };
    let (errors, _) = files::prove_files(config, &crate::base::config::Lines::default(), file);
    let open_secrets = open_secrets(config);
    // Those have a check, and a remedy, of their own.
    let is_open = |text: &str| open_secrets.iter().any(|place| text.contains(&*place.path.to_string_lossy()));
    let files = errors.into_iter().map(|e| (format!("{}: {}", e.key, e.problem), e.remedy));
    let files = files.filter(|(text, _)| !(text.contains("has mode") && is_open(text))).collect();
    let on_node = |server: &Server| {
        let ip = server.address.ip();
        config.nodes.iter().any(|node| node.addresses.contains(&ip)) || local::is_local(ip)
    };
    Facts {
        server_on_node: servers.iter().flatten().filter(|s| on_node(s)).map(|s| s.address).collect(),
        socket: cluster.ok().and_then(|cluster| place(cluster.socket())),
        socket_dir: place(node.postgres.socket_dir.clone()),
        rules: files::load_rules(&config.auth).map_err(|trouble| trouble.to_string()),
        unit: cluster.ok().and_then(Cluster::unit).filter(|_| outside::has_systemd()).map(|unit| {
            let asks = asks_before_start(&unit);
            (unit, asks)
        }),
        kernel_gate: None,
        doors,
        gate_taken,
        servers,
        files,
        open_secrets,
        foreign_secrets: foreign_secrets(config, node),
        units,
        tools,
        logins,
        host,
        survey,
        fitness,
        status,
    }
}

async fn postgres(cluster: Result<&Cluster, &str>) -> (Result<Survey, String>, Result<Fitness, String>) {
    let cluster = match cluster {
        Ok(cluster) => cluster,
        Err(why) => return (Err(why.to_owned()), Err(why.to_owned())),
    };
    let survey = tokio::time::timeout(PG_LIMIT, cluster.survey(PG_LIMIT)).await;
    let late = || format!("PostgreSQL did not answer everything within {PG_LIMIT:?}");
    let survey = survey.map_err(|_| late()).and_then(|survey| survey.map_err(|error| error.to_string()));
    let fitness = match &survey {
        Ok(survey) => {
            let mut libraries: Vec<String> =
                survey.databases.iter().flat_map(|database| database.libraries.iter().cloned()).collect();
            libraries.sort();
            libraries.dedup();
            let look = cluster.fitness(survey.setting("shared_preload_libraries"), &libraries, FITNESS_LIMIT);
            let look = tokio::time::timeout(FITNESS_LIMIT, look).await.map_err(|_| late());
            look.and_then(|look| look.map_err(|error| error.to_string()))
        }
        Err(why) => Err(why.clone()),
    };
    (survey, fitness)
}

async fn logins(config: &Config, node: &Node, cluster: Option<&Cluster>) -> Vec<LoginFacts> {
    let Some(cluster) = cluster else { return Vec::new() };
    let others = config.nodes.iter().filter(|other| other.name != node.name);
    let ask = async |other: &Node| {
        let peer = Peer::from_node(other);
        let (replication, rewind) = tokio::join!(
            cluster.try_login(&peer, None, LOGIN_LIMIT),
            cluster.try_login(&peer, Some(REWIND_DATABASE), LOGIN_LIMIT)
        );
        LoginFacts { at: other.name.clone(), replication, rewind }
    };
    join_all(others.map(ask)).await
}

/// The secret files of the configuration that others can read or write.
pub fn open_secrets(config: &Config) -> Vec<Place> {
    let place = |path: &PathBuf| {
        let mode = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?.mode() & 0o7777;
        (mode & OTHERS != 0).then(|| Place { path: path.clone(), mode })
    };
    secrets(config).filter_map(place).collect()
}

/// Those that belong to another user than root and the data directory's owner, who could open them to anybody.
fn foreign_secrets(config: &Config, node: &Node) -> Vec<(PathBuf, u32)> {
    let Ok(owner) = std::fs::metadata(&node.postgres.data_dir).map(|meta| meta.uid()) else { return Vec::new() };
    let foreign = |path: &PathBuf| {
        let uid = std::fs::metadata(path).ok()?.uid();
        (uid != 0 && uid != owner).then(|| (path.clone(), uid))
    };
    secrets(config).filter_map(foreign).collect()
}

fn secrets(config: &Config) -> impl Iterator<Item = &PathBuf> {
    let tsig = config.dns.iter().filter_map(|dns| dns.tsig.as_ref()).map(|tsig| &tsig.key_file);
    let fixed = [&config.cluster.key_file, &config.replication.password_file];
    fixed.into_iter().chain(tsig).chain(&config.auth.tls_key_file)
}

/// Does a drop-in of PostgreSQL's unit ask `may-start-primary`?
fn asks_before_start(unit: &str) -> bool {
    let template = "postgresql@.service";
    ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"]
        .iter()
        .flat_map(|root| [unit, template].map(|name| PathBuf::from(format!("{root}/{name}.d"))))
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "conf"))
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
        .any(|text| text.lines().any(|line| line.starts_with("Exec") && line.contains("may-start-primary")))
}

/// Asked while this process is still what it was started as: reading nftables needs CAP_NET_ADMIN.
pub fn kernel_gate(config: &Config) -> Option<Result<bool, String>> {
    config.fence.kernel_gate.then(outside::kernel_gate_stands)
}

async fn servers(config: &Config) -> Result<Vec<Server>, String> {
    let Some(dns) = &config.dns else { return Ok(Vec::new()) };
    let names = Arc::new(ServiceNames::new(&dns.zone, &config.service.name)?);
    let key = match &dns.tsig {
        Some(tsig) if dns.mode == DnsMode::Update || tsig.key_file.exists() => {
            let secret = files::tsig_secret(&tsig.key_file)?;
            let text = data_encoding::BASE64.encode(secret.expose());
            Some(Arc::new(TsigKey::new(&tsig.name, &tsig.algorithm, &text)?))
        }
        _ => None,
    };
    let addresses = match dns.servers.is_empty() {
        true => tokio::time::timeout(FIND_LIMIT, find_authorities(&dns.zone))
            .await
            .map_err(|_| format!("the servers of zone {} were not found within {FIND_LIMIT:?}", dns.zone))??,
        false => dns.servers.clone(),
    };
    let ask = async |(at, address): (usize, SocketAddr)| {
        let authority = Authority::new(address, Arc::clone(&names), key.clone());
        let asked_at = crate::io::clock::wall().as_second();
        let (answer, head) = tokio::join!(authority.ask(DNS_LIMIT), authority.head(DNS_LIMIT));
        let update = match &answer {
            Ok(reading) if at == 0 && dns.mode == DnsMode::Update => Some(try_update(&authority, reading).await),
            _ => None,
        };
        Server { address, answer, head, asked_at, update }
    };
    Ok(join_all(addresses.into_iter().enumerate().map(ask)).await)
}

/// An update that must fail on its prerequisite: the key and its rights are proven, and nothing changes.
async fn try_update(authority: &Authority, reading: &Reading) -> UpdateOutcome {
    let mut nonce = [0_u8; 16];
    if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut nonce).is_err() {
        return UpdateOutcome::NotSent("the kernel gives no random bytes".to_owned());
    }
    let never = format!("portcullis-doctor-{}", data_encoding::HEXLOWER.encode(&nonce)).into_bytes();
    let pair = &reading.pair;
    let prerequisite = RecordPair::new(pair.addresses.clone(), pair.ttl, vec![vec![never]]);
    let marker = pair.marker.first().cloned().unwrap_or_default();
    authority.update(&prerequisite, &pair.addresses, pair.ttl, &marker, DNS_LIMIT).await
}

/// Knocks at PostgreSQL's port wherever clients could find it.
async fn doors(config: &Config, node: &Node, survey: Option<&Survey>, status: Option<&Snapshot>) -> Vec<Door> {
    let port = node.postgres.port;
    let mut places: Vec<(Whose, SocketAddr)> =
        node.addresses.iter().map(|address| (Whose::Own, SocketAddr::new(*address, port))).collect();
    let bound = |vip: &IpAddr| {
        status.is_some_and(|s| s.vips.iter().any(|v| v.bound && v.address.split('/').next() == Some(&vip.to_string())))
    };
    let vips = config.vip.iter().flat_map(|vip| vip.addresses.iter().map(|net| net.addr()));
    places.extend(vips.filter(bound).map(|vip| (Whose::Own, SocketAddr::new(vip, port))));
    for other in config.nodes.iter().filter(|other| other.name != node.name) {
        let found = tokio::net::lookup_host((other.postgres.host.as_str(), other.postgres.port));
        let found = tokio::time::timeout(DOOR_LIMIT, found).await;
        places.extend(found.into_iter().flatten().flatten().map(|address| (Whose::Peer, address)));
    }
    let mut logins = vec![(config.postgres.admin_user.clone(), "postgres".to_owned())];
    if let Some(survey) = survey {
        let roles = survey.roles.iter().map(|(name, _)| name);
        let roles = roles.filter(|name| **name != config.postgres.admin_user && **name != config.replication.user);
        for role in roles.take(TRIED) {
            let databases = survey.databases.iter().map(|database| &database.name);
            logins.extend(databases.take(TRIED).map(|database| (role.clone(), database.clone())));
        }
    }
    let logins = &logins;
    let at_one = async |(whose, address): (Whose, SocketAddr)| {
        let mut doors = Vec::new();
        for (user, database) in logins {
            let (user, database) = (user.clone(), database.clone());
            let answer = tokio::time::timeout(DOOR_LIMIT, knock(address, &user, &database)).await;
            let knock = answer.unwrap_or_else(|_| Knock::Unclear(format!("no answer within {DOOR_LIMIT:?}")));
            let shut = matches!(knock, Knock::Closed | Knock::Unclear(_));
            doors.push(Door { whose, address, user, database, knock });
            if shut {
                break;
            }
        }
        doors
    };
    join_all(places.into_iter().map(at_one)).await.into_iter().flatten().collect()
}

/// Begins a login and goes no further than the first word of the answer.
async fn knock(address: SocketAddr, user: &str, database: &str) -> Knock {
    let mut stream = match TcpStream::connect(address).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return Knock::Closed,
        Err(error) => return Knock::Unclear(error.to_string()),
    };
    let startup = Startup {
        minor: 0,
        user: user.to_owned(),
        database: database.to_owned(),
        parameters: Vec::new(),
        options: Vec::new(),
    };
    match first_word(&mut stream, &startup.encode()).await {
        Ok((b'E', body)) => match field(&body, b'C').as_deref() {
            // invalid_authorization_specification: no rule, or one that rejects.
            Some("28000") => Knock::Rejected,
            _ => Knock::Unclear(field(&body, b'M').unwrap_or_else(|| "an error without a message".to_owned())),
        },
        Ok((b'R', _)) => Knock::Admitted,
        Ok((other, _)) => Knock::Unclear(format!("a message of type {other}, which PostgreSQL does not begin with")),
        Err(error) => Knock::Unclear(error.to_string()),
    }
}

async fn first_word(stream: &mut TcpStream, startup: &[u8]) -> std::io::Result<(u8, Vec<u8>)> {
    stream.write_all(startup).await?;
    let kind = stream.read_u8().await?;
    let length = usize::try_from(stream.read_u32().await?).unwrap_or(usize::MAX).saturating_sub(4);
    if length > MAX_REFUSAL {
        return Err(std::io::Error::other("its answer is too long for one of PostgreSQL's"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok((kind, body))
}

/// Does anything take connections at the gate's port while the gate is not open, before and after the look?
async fn gate_taken(config: &Config, node: &Node, status: Option<&Snapshot>, target: &Target) -> Option<SocketAddr> {
    let shut = |s: &Snapshot| !s.gate.open && s.gate.state != crate::engine::status::GateState::Paused;
    if !status.is_some_and(shut) {
        return None;
    }
    let port = config.service.listen.first()?.port();
    for address in node.addresses.iter().map(|address| SocketAddr::new(*address, port)) {
        let opened = tokio::time::timeout(DOOR_LIMIT, TcpStream::connect(address)).await;
        if matches!(opened, Ok(Ok(_))) && client::snapshot(target).await.is_ok_and(|s| shut(&s)) {
            return Some(address);
        }
    }
    None
}
