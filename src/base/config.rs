//! TOML text to [`Config`]: parsed once into proven types; nothing half-valid leaves this file.

use crate::base::ids::NodeName;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

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
    /// `None`: VIP only (not built yet: refused at load).
    pub dns: Option<Dns>,
    pub witness: Option<Witness>,
    /// Empty: DNS only.
    pub vip: Option<Vip>,
    pub fence: Fence,
    pub replication: Replication,
    pub pool: Pool,
    pub reads_balance: bool,
    pub status_listen: Option<SocketAddr>,
    /// One sentence each: accepted, but worth saying at start and in `check-config`.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Service {
    /// Lower case, without the dot at the end.
    pub name: String,
    pub listen: Vec<SocketAddr>,
}

#[derive(Debug, Clone)]
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

#[derive(Debug, Clone)]
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

#[derive(Debug, Clone)]
pub struct Cluster {
    pub key_file: PathBuf,
}

#[derive(Debug, Clone)]
pub struct Postgres {
    pub admin_user: String,
}

#[derive(Debug, Clone)]
pub struct Auth {
    pub hba_file: PathBuf,
    /// Both or neither.
    pub tls_cert_file: Option<PathBuf>,
    pub tls_key_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsMode {
    Update,
    Observe,
}

#[derive(Debug, Clone)]
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

#[derive(Debug, Clone)]
pub struct Tsig {
    pub name: String,
    /// `hmac-sha256`, `hmac-sha384` or `hmac-sha512`.
    pub algorithm: String,
    pub key_file: PathBuf,
}

#[derive(Debug, Clone)]
pub struct Witness {
    pub listen: Vec<SocketAddr>,
    pub ns: String,
    pub active: NodeName,
}

#[derive(Debug, Clone)]
pub struct Vip {
    pub addresses: Vec<ipnet::IpNet>,
    pub interface: Option<String>,
    pub witness: Vec<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FencePostgres {
    Demote,
    Stop,
    Keep,
}

#[derive(Debug, Clone)]
pub struct Fence {
    pub lease: Duration,
    /// At most 0.1.
    pub max_drift: f64,
    pub margin: Duration,
    pub postgres: FencePostgres,
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

#[derive(Debug, Clone)]
pub struct Replication {
    pub mode: ReplicationMode,
    pub on_standby_loss: OnStandbyLoss,
    pub standby_timeout: Duration,
    pub user: String,
    pub password_file: PathBuf,
    pub conninfo: String,
    pub slots: bool,
}

#[derive(Debug, Clone)]
pub struct Pool {
    pub max_clients: u32,
    pub query_wait: Duration,
    pub size: u32,
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
