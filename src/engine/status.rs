//! One read-only snapshot of everything; the only thing HTTP and the command line show. Its JSON form is the
//! contract's `status --json`; fields may be added, never renamed.

use crate::base::ids::NodeName;
use serde::{Deserialize, Serialize};

/// `status --json` and `GET /status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub node: NodeName,
    pub version: String,
    /// What this node can prove now: `active`, `fenced` or `passive`.
    pub role: Role,
    pub gate: GateStatus,
    pub epoch: u64,
    pub witness: Option<WitnessStatus>,
    pub vip: Option<VipStatus>,
    pub vips: Vec<VipStatus>,
    pub peer: Option<PeerStatus>,
    pub replication: ReplicationStatus,
    pub procedure: Option<ProcedureStatus>,
    pub nodes: Vec<NodeRow>,
    pub events: Vec<EventRow>,
    /// Local PostgreSQL as last seen (an addition to the contract).
    pub postgres: PostgresStatus,
    /// The durable numbers of R2 (an addition to the contract).
    pub journal: JournalStatus,
    /// What to type next, if anything (an addition to the contract).
    pub advice: Option<String>,
    /// Counters for `/metrics` (an addition to the contract).
    pub counters: Counters,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Active,
    Passive,
    Fenced,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Active => "active",
            Role::Passive => "passive",
            Role::Fenced => "fenced",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateState {
    Open,
    Shut,
    Lapsed,
    Fenced,
    Paused,
}

impl GateState {
    pub fn as_str(self) -> &'static str {
        match self {
            GateState::Open => "open",
            GateState::Shut => "shut",
            GateState::Lapsed => "lapsed",
            GateState::Fenced => "fenced",
            GateState::Paused => "paused",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateStatus {
    pub open: bool,
    pub state: GateState,
    /// Why it is not open; null while it is.
    pub reason: Option<String>,
    pub lease_remaining_ms: u64,
    pub sessions: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WitnessStatus {
    /// `update` or `observe`.
    pub mode: String,
    /// Name of the node the record points at; null when unknown or at none.
    pub points_at: Option<NodeName>,
    pub epoch: Option<u64>,
    pub age_ms: Option<u64>,
    pub servers: Vec<ServerStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictWord {
    Here,
    Elsewhere,
    Nothing,
    Silent,
}

impl VerdictWord {
    pub fn as_str(self) -> &'static str {
        match self {
            VerdictWord::Here => "here",
            VerdictWord::Elsewhere => "elsewhere",
            VerdictWord::Nothing => "nothing",
            VerdictWord::Silent => "silent",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    pub server: String,
    pub verdict: VerdictWord,
    pub age_ms: Option<u64>,
    pub error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VipStatus {
    pub address: String,
    pub bound: bool,
    /// The MAC address of somebody else who claims it; null when nobody does.
    pub conflict: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub name: NodeName,
    pub reachable: bool,
    pub role: Option<Role>,
    pub epoch: Option<u64>,
    pub age_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicationStatus {
    /// `synchronous` or `asynchronous`.
    pub mode: String,
    pub in_sync: bool,
    /// RFC 3339, when this pair went alone; null when in sync or unknown.
    pub alone_since: Option<String>,
    pub timeline: Option<u32>,
    pub lsn: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcedureStatus {
    /// `promote`, `switchover` or `rejoin`.
    pub kind: String,
    pub id: u64,
    pub step: String,
    pub since: String,
}

/// One row of `nodes`, `SHOW pool_nodes` and `/pool_nodes`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeRow {
    pub node_id: u32,
    pub name: NodeName,
    pub hostname: String,
    pub port: u16,
    /// `up` or `down`.
    pub status: String,
    /// `primary` or `standby`.
    pub role: String,
    pub weight: f64,
    pub attached: bool,
    pub replication_delay_bytes: Option<u64>,
    pub replication_state: Option<String>,
    pub sync_state: Option<String>,
    pub select_count: u64,
    /// RFC 3339 (an addition to the contract): when `status` or `role` last changed.
    #[serde(default)]
    pub last_status_change: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRow {
    /// RFC 3339, UTC.
    pub at: String,
    pub kind: String,
    pub text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PostgresStatus {
    pub up: bool,
    /// `primary`, `standby` or null.
    pub role: Option<String>,
    pub error: Option<String>,
    /// This node, as a standby, is streaming from the active node and in service.
    pub streaming: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalStatus {
    pub refused: u64,
    pub won: u64,
    pub complete: u64,
    pub fence: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub gate_openings: u64,
    pub gate_cuts: u64,
    pub witness_proofs: u64,
    pub peer_pledges: u64,
    pub witness_silent: u64,
    pub peer_refused_connections: u64,
    pub sessions_total: u64,
    pub auth_failures: u64,
}
