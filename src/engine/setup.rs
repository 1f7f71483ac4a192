//! What the guard needs of the configuration, distilled once at start.

use crate::base::config::{Config, DnsMode, FencePostgres, OnStandbyLoss, ReplicationMode};
use crate::base::ids::NodeName;
use crate::engine::lease::Timing;
use std::net::IpAddr;
use std::time::Duration;

/// What stands behind the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The marker at the server that executes the updates.
    Update,
    /// An address record that a person edits.
    Observe,
    /// A VIP and the peer's word alone (R3).
    VipOnly,
}

/// One configured node as the guard sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSetup {
    pub name: NodeName,
    pub addresses: Vec<IpAddr>,
    /// As shown in `nodes`.
    pub hostname: String,
    pub port: u16,
    pub weight: f64,
}

/// The guard's part of the configuration, and what names this start of this daemon.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    pub version: String,
    /// `service.name`, for people who edit the record.
    pub service: String,
    pub me: NodeName,
    /// The other voter.
    pub peer: NodeName,
    pub nodes: Vec<NodeSetup>,
    /// The two that vote and can be active; a node that is not among them only follows.
    pub voters: Vec<NodeName>,
    pub timing: Timing,
    pub poll: Duration,
    pub mode: Mode,
    pub propagation: Duration,
    /// Display names; the first takes the updates in update mode.
    pub servers: Vec<String>,
    pub vips: Vec<ipnet::IpNet>,
    pub kernel_gate: bool,
    /// `fence.stonith` is configured.
    pub stonith: bool,
    /// `service.units` is not empty.
    pub units: bool,
    pub synchronous: bool,
    /// `on_standby_loss = "block"`: never alone; the list names the peer whatever happens.
    pub block: bool,
    /// Silence of the standby after which it counts as lost.
    pub standby_timeout: Duration,
    /// How long clients wait for a PostgreSQL that is away before the gate is cut: `pool.query_wait`.
    pub hold_limit: Duration,
    pub fence_postgres: FencePostgres,
    /// What both nodes must agree on, hashed.
    pub digest: String,
    /// Random, one per start.
    pub start: u64,
    pub boot: String,
}

impl Setup {
    /// From the proven configuration; `servers` as found, `start` random, `boot` the kernel's boot_id.
    pub fn new(
        config: &Config,
        me: &NodeName,
        servers: Vec<String>,
        digest: String,
        start: u64,
        boot: String,
    ) -> Setup {
        let peer = config.nodes.iter().filter(|n| n.voter).map(|n| n.name.clone()).find(|n| n != me);
        let total: f64 = config.nodes.iter().map(|n| n.weight).sum();
        let dns = config.dns.as_ref();
        Setup {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            service: config.service.name.clone(),
            me: me.clone(),
            peer: peer.unwrap_or_else(|| me.clone()),
            nodes: config
                .nodes
                .iter()
                .map(|n| NodeSetup {
                    name: n.name.clone(),
                    addresses: n.addresses.clone(),
                    hostname: n.postgres.host.clone(),
                    port: n.postgres.port,
                    weight: if total > 0.0 { n.weight / total } else { 0.0 },
                })
                .collect(),
            voters: config.voters().into_iter().map(|n| n.name.clone()).collect(),
            timing: Timing {
                lease: config.fence.lease,
                max_drift: config.fence.max_drift,
                margin: config.fence.margin,
            },
            poll: dns.map_or(Duration::from_secs(1), |d| d.poll),
            mode: match dns.map(|d| d.mode) {
                Some(DnsMode::Update) => Mode::Update,
                Some(DnsMode::Observe) => Mode::Observe,
                None => Mode::VipOnly,
            },
            propagation: dns.map_or(Duration::ZERO, |d| d.propagation),
            servers,
            vips: config.vip.as_ref().map(|v| v.addresses.clone()).unwrap_or_default(),
            kernel_gate: config.fence.kernel_gate,
            stonith: !config.fence.stonith.is_empty(),
            units: !config.service.units.is_empty(),
            synchronous: config.replication.mode == ReplicationMode::Synchronous,
            block: config.replication.mode == ReplicationMode::Synchronous
                && config.replication.on_standby_loss == OnStandbyLoss::Block,
            standby_timeout: config.replication.standby_timeout,
            hold_limit: config.pool.query_wait,
            fence_postgres: config.fence.postgres,
            digest,
            start,
            boot,
        }
    }

    /// The voter that publishes this address; a node without a vote is never active and publishes none.
    pub fn node_of(&self, address: IpAddr) -> Option<&NodeName> {
        self.nodes.iter().find(|n| n.addresses.contains(&address)).map(|n| &n.name).filter(|name| self.is_voter(name))
    }

    /// May this node ever be active?
    pub fn is_voter(&self, name: &NodeName) -> bool {
        self.voters.contains(name)
    }

    /// The configured nodes without a vote.
    pub fn followers(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.iter().map(|n| &n.name).filter(|name| !self.is_voter(name))
    }

    /// The voters for people: `alp or midna`.
    pub fn voters_named(&self) -> String {
        self.voters.iter().map(NodeName::as_str).collect::<Vec<_>>().join(" or ")
    }

    /// Addresses of one node.
    pub fn addresses_of(&self, name: &NodeName) -> Vec<IpAddr> {
        self.nodes.iter().find(|n| &n.name == name).map(|n| n.addresses.clone()).unwrap_or_default()
    }

    /// The VIPs as plain addresses.
    pub fn vip_addresses(&self) -> Vec<IpAddr> {
        self.vips.iter().map(|net| net.addr()).collect()
    }

    /// The lease the holder uses: never longer than the marker's (P11).
    pub fn lease(&self, marker: Option<Duration>) -> Duration {
        marker.map_or(self.timing.lease, |m| m.min(self.timing.lease))
    }

    /// How the active node is named to people: name and first address.
    pub fn named(&self, name: &NodeName) -> String {
        match self.addresses_of(name).first() {
            Some(address) => format!("{name} ({address})"),
            None => name.to_string(),
        }
    }
}
