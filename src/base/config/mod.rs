//! TOML text to [`Config`]: parsed once into proven types; nothing half-valid leaves this file.
//!
//! What it is not: it opens no file and asks no host. Secrets stay in their files; `io::files` reads and proves those.
//!
//! - `text.rs`: TOML to typed values with their lines;
//! - `read.rs`: the keys and their defaults;
//! - `proof.rs`: the relations between keys, and warnings;
//! - `changes.rs`: which keys differ between two of them;
//! - `rows.rs`: every key and its value as text, without secrets;
//! - `example.rs`: the commented configuration that `init` and the package write.
//!
//! **Invariant:** every relation the contract names beside a key holds in every `Config` that [`Config::parse`]
//! returned.

mod changes;
mod example;
mod proof;
mod read;
mod rows;
mod text;

pub use changes::is_live;
pub use example::{ExampleNode, Template};
pub use rows::ConfigRow;

use crate::base::ids::NodeName;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::DeTable;

/// The whole configuration, proven. Its `Debug` shows no secret: secrets stay in their files.
#[derive(Debug, Clone)]
pub struct Config {
    pub state_dir: PathBuf,
    pub runtime_dir: PathBuf,
    pub service: Service,
    /// In file order; exactly two have `voter`.
    pub nodes: Vec<Node>,
    pub cluster: Cluster,
    pub postgres: Postgres,
    pub auth: Auth,
    /// `None`: VIP only.
    pub dns: Option<Dns>,
    pub witness: Option<Witness>,
    /// Empty: DNS only.
    pub vip: Option<Vip>,
    pub fence: Fence,
    pub replication: Replication,
    pub pool: Pool,
    pub reads_balance: bool,
    pub status_listen: Option<SocketAddr>,
    pub notify: Notify,
    pub console: Console,
    /// One sentence each: accepted, but worth saying at start and in `check-config`.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Lower case, without the dot at the end.
    pub name: String,
    pub listen: Vec<SocketAddr>,
    /// What a passive node does with clients.
    pub passive: Passive,
    /// systemd units started after the gate opened and stopped when it is cut.
    pub units: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passive {
    Refuse,
    /// To the active node's gate, over the peer channel.
    Forward,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: NodeName,
    /// Published in DNS while this node is active; at most one of each family.
    pub addresses: Vec<IpAddr>,
    pub peer_listen: SocketAddr,
    pub weight: f64,
    pub voter: bool,
    pub vip_interface: Option<String>,
    pub postgres: NodePostgres,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NodePostgres {
    /// As the *other* node reaches it.
    pub host: String,
    pub port: u16,
    pub socket_dir: PathBuf,
    pub data_dir: PathBuf,
    pub bin_dir: PathBuf,
    pub start: Option<Vec<String>>,
    pub stop: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    pub key_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Postgres {
    pub admin_user: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Auth {
    pub hba_file: PathBuf,
    /// Maps of certificates' names; `None`: `pg_ident.conf` beside `hba_file`, where it is there.
    pub ident_file: Option<PathBuf>,
    /// Both or neither.
    pub tls_cert_file: Option<PathBuf>,
    pub tls_key_file: Option<PathBuf>,
    /// Certificates of clients are asked for, and must be of a CA in here.
    pub tls_ca_file: Option<PathBuf>,
    /// Certificates of clients that a CA has revoked.
    pub tls_crl_file: Option<PathBuf>,
    /// How long a role's secret may be remembered; zero: not at all.
    pub cache: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsMode {
    Update,
    Observe,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Dns {
    pub mode: DnsMode,
    /// Lower case, without the dot at the end.
    pub zone: String,
    /// Empty: found from the zone's SOA and NS at start, then fixed.
    pub servers: Vec<SocketAddr>,
    pub poll: Duration,
    pub ttl: Duration,
    pub tsig: Option<Tsig>,
    pub update_command: Vec<String>,
    pub propagation: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tsig {
    pub name: String,
    /// `hmac-sha256`, `hmac-sha384` or `hmac-sha512`.
    pub algorithm: String,
    pub key_file: PathBuf,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Witness {
    pub listen: Vec<SocketAddr>,
    pub ns: String,
    pub active: NodeName,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Vip {
    pub addresses: Vec<ipnet::IpNet>,
    pub interface: Option<String>,
    /// ARP or NDP witnesses; empty: the gateway of the VIP's interface.
    pub witness: Vec<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FencePostgres {
    Demote,
    Stop,
    Keep,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Fence {
    pub lease: Duration,
    /// At most 0.1.
    pub max_drift: f64,
    pub margin: Duration,
    pub postgres: FencePostgres,
    /// An nftables set with the lease as its timeout, as a second wall (R7).
    pub kernel_gate: bool,
    /// A command whose exit code 0 means that `{node}` is surely off; empty: none.
    pub stonith: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationMode {
    Synchronous,
    Asynchronous,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStandbyLoss {
    Continue,
    Block,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Replication {
    pub mode: ReplicationMode,
    pub on_standby_loss: OnStandbyLoss,
    pub standby_timeout: Duration,
    pub user: String,
    pub password_file: PathBuf,
    pub conninfo: String,
    pub slots: bool,
}

/// Whom events worth waking someone for are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// Run once for each, with the event as JSON on standard input; empty: none.
    pub command: Vec<String>,
    /// Addresses that get a mail; empty: none.
    pub mail: Vec<String>,
    /// The program that takes the mail.
    pub sendmail: PathBuf,
}

impl Default for Notify {
    fn default() -> Notify {
        Notify { command: Vec::new(), mail: Vec::new(), sendmail: "/usr/sbin/sendmail".into() }
    }
}

/// Who may use the admin console (database `portcullis`); `postgres.admin_user` always may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console {
    /// Roles that may do everything there.
    pub admins: Vec<String>,
    /// Roles that may only look.
    pub stats: Vec<String>,
}

/// When a client has a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// From its login to its end.
    Session,
    /// From the first statement of a transaction to its end.
    Transaction,
}

/// Clients and backends of the gate. A limit or time-out of zero is none.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    pub mode: PoolMode,
    /// Backends per (user, database).
    pub size: u32,
    /// Backends beyond `size`, opened when a client has waited for `reserve_after`.
    pub reserve: u32,
    pub reserve_after: Duration,
    /// An idle backend is closed after this.
    pub idle_timeout: Duration,
    /// A backend older than this is closed instead of being lent again.
    pub lifetime: Duration,
    pub max_clients: u32,
    pub max_clients_per_user: u32,
    pub max_clients_per_database: u32,
    pub query_wait: Duration,
    /// Time a client has for its login.
    pub login_timeout: Duration,
    pub client_idle_timeout: Duration,
    pub idle_in_transaction_timeout: Duration,
    /// Prepared statements kept in one backend (transaction mode).
    pub max_prepared: u32,
    /// The client's address is added to `application_name`.
    pub client_address: bool,
    /// Threads that move data; zero: half the cores, at least one, at most four.
    pub threads: u32,
}

impl Default for Pool {
    fn default() -> Pool {
        Pool {
            mode: PoolMode::Session,
            size: 40,
            reserve: 0,
            reserve_after: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(600),
            lifetime: Duration::from_secs(3600),
            max_clients: 10_000,
            max_clients_per_user: 0,
            max_clients_per_database: 0,
            query_wait: Duration::from_secs(30),
            login_timeout: Duration::from_secs(60),
            client_idle_timeout: Duration::ZERO,
            idle_in_transaction_timeout: Duration::ZERO,
            max_prepared: 200,
            client_address: false,
            threads: 0,
        }
    }
}

/// One thing wrong with the configuration: where, what, and what to do about it. Displays as one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub file: PathBuf,
    /// Counted from 1; the line of the section where the key itself is not written.
    pub line: usize,
    /// Full path of the key, as `fence.lease` or `node.alp.address`.
    pub key: String,
    pub problem: String,
    pub remedy: String,
}
impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConfigError { file, line, key, problem, remedy } = self;
        write!(f, "{}:{line}: {key}: {problem}; {remedy}", file.display())
    }
}
impl std::error::Error for ConfigError {}

/// On which line each key of the file stands.
#[derive(Debug, Clone, Default)]
pub struct Lines(BTreeMap<String, usize>);

impl Lines {
    /// The line of `key`, else of the nearest section around it that is written, else 1.
    pub fn of(&self, key: &str) -> usize {
        let mut path = key;
        loop {
            if let Some(line) = self.0.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return 1,
            }
        }
    }
    fn note(&mut self, key: String, line: usize) {
        self.0.entry(key).or_insert(line);
    }
}

impl Config {
    /// Parses and proves the text of a configuration. `file` is only named in errors.
    ///
    /// # Errors
    /// Everything that is wrong, in the order of the file.
    pub fn parse(text: &str, file: &Path) -> Result<Config, Vec<ConfigError>> {
        Config::parse_with_lines(text, file).map(|(config, _)| config)
    }

    /// As [`Config::parse`], and also says where each key stands, for errors found later (in secret files).
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn parse_with_lines(text: &str, file: &Path) -> Result<(Config, Lines), Vec<ConfigError>> {
        let notes = text::Notes::new(text, file);
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            return Err(notes.syntax(errors));
        }
        let mut config = read::config(&notes, table.get_ref());
        // The relations of values that were not understood would only be noise.
        if let Some(config) = config.as_mut().filter(|_| notes.is_clean()) {
            proof::relations(config, &notes);
            config.warnings = proof::warnings(config);
        } else if config.is_none() && notes.is_clean() {
            notes.error("configuration", "could not be read", "report this as a bug, with the file");
        }
        let lines = notes.finish()?;
        config.map(|config| (config, lines)).ok_or_else(Vec::new)
    }

    /// The fully commented example configuration.
    pub fn example() -> String {
        Template::default().render()
    }

    /// The node of this name.
    pub fn node(&self, name: &NodeName) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == *name)
    }

    /// Position of the node of this name in the file, from 0.
    pub fn index(&self, name: &NodeName) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == *name)
    }

    /// The two nodes whose pledges count.
    pub fn voters(&self) -> [&Node; 2] {
        let mut voters = self.nodes.iter().filter(|node| node.voter);
        let pair = voters.next().zip(voters.next()).expect("a parsed configuration has exactly two voters");
        [pair.0, pair.1]
    }

    /// W, the wait before taking over: L (1 + d) / (1 - d) + margin, rounded up to the millisecond (design.md,
    /// section 3).
    pub fn wait_before_takeover(&self) -> Duration {
        const ONE: u128 = 1_000_000_000;
        // In parts per billion, so that both nodes reckon the very same number.
        let drift = Duration::try_from_secs_f64(self.fence.max_drift).unwrap_or_default().as_nanos().min(ONE / 10);
        let lease = self.fence.lease.as_nanos();
        let wait = (lease * (ONE + drift)).div_ceil(ONE - drift) + self.fence.margin.as_nanos();
        Duration::from_millis(u64::try_from(wait.div_ceil(1_000_000)).unwrap_or(u64::MAX))
    }

    /// A short hash over what both voters must agree on before one pledges to the other: lease, max_drift, margin,
    /// names and addresses of the voters, the DNS mode, zone and servers, the service name and the VIP. A node without
    /// a vote is no part of it: to add one never touches a pledge.
    pub fn shared_digest(&self) -> String {
        let servers = self.dns.as_ref().map(|dns| dns.servers.clone()).unwrap_or_default();
        self.shared_digest_with(&servers)
    }

    /// As [`Config::shared_digest`], with the servers that were found where the configuration names none.
    pub fn shared_digest_with(&self, servers: &[SocketAddr]) -> String {
        let sorted = |mut words: Vec<String>| {
            words.sort();
            words.join(",")
        };
        let mut lines = vec![
            format!("lease {}", self.fence.lease.as_millis()),
            format!("margin {}", self.fence.margin.as_millis()),
            format!("max_drift {}", self.fence.max_drift),
            format!("service {}", self.service.name),
            format!("servers {}", sorted(servers.iter().map(ToString::to_string).collect())),
        ];
        if let Some(dns) = &self.dns {
            lines.push(format!("dns {:?} {}", dns.mode, dns.zone));
        }
        if let Some(vip) = &self.vip {
            lines.push(format!("vip {}", sorted(vip.addresses.iter().map(|vip| vip.addr().to_string()).collect())));
        }
        let node = |node: &Node| {
            let addresses = sorted(node.addresses.iter().map(ToString::to_string).collect());
            format!("node {} {} {addresses}", node.name, node.voter)
        };
        lines.push(sorted(self.nodes.iter().filter(|n| n.voter).map(node).collect()));
        let hash = ring::digest::digest(&ring::digest::SHA256, lines.join("\n").as_bytes());
        let short = hash.as_ref().get(..8).unwrap_or_default();
        data_encoding::HEXLOWER.encode(short)
    }
}

/// A secret read from its file. Never shown by `Debug`; wiped when dropped.
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Secret(Vec<u8>);

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(bytes)
    }
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(...)")
    }
}

#[cfg(test)]
mod tests;
