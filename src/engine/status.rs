//! One read-only snapshot of everything; the only thing HTTP and the command line show. Its JSON form is the
//! contract's `status --json`; fields may be added, never renamed.

pub mod pgpool;

use crate::base::ids::NodeName;
use crate::base::tally::{PROCEDURES, Times};
use crate::base::time::Duration;
use crate::engine::outlook::{Lag, Next, Outlook};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    /// Oldest first.
    pub events: Vec<EventRow>,
    /// Local PostgreSQL as last seen (an addition to the contract).
    pub postgres: PostgresStatus,
    /// The durable numbers of R2 (an addition to the contract).
    pub journal: JournalStatus,
    /// What to type next, if anything (an addition to the contract).
    pub advice: Option<String>,
    /// PostgreSQL is left alone (an addition to the contract).
    #[serde(default)]
    pub maintenance: bool,
    /// Databases whose clients are held by name (an addition to the contract); of a pause of the whole service
    /// `gate.state` tells. The guard does not know them: the driver adds them.
    #[serde(default)]
    pub paused_databases: Vec<String>,
    /// VIP only: who answered for the lease on the link (an addition to the contract).
    #[serde(default)]
    pub vip_witness: Option<VipWitnessStatus>,
    /// Counters for `/metrics` (an addition to the contract).
    pub counters: Counters,
    /// Whether the daemon's turn ran lately (an addition to the contract). The driver publishes `true`; `serve::http`
    /// sets it to `false` when nobody has beaten since, and then ages and states here are those of the last turn.
    #[serde(default = "yes")]
    pub turn_running: bool,
    /// The proofs in hand, each kind's newest (an addition to the contract).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub proofs: Vec<ProofStatus>,
    /// RFC 3339, UTC: when this was true (an addition to the contract).
    #[serde(default)]
    pub at: String,
    /// What a failover now would cost (an addition to the contract).
    #[serde(default)]
    pub outlook: Outlook,
    /// What to type next (an addition to the contract); null: nothing is to be done. The guard does not know all that
    /// it needs: the driver adds it.
    #[serde(default)]
    pub next: Option<Next>,
    /// How far the standby is behind (an addition to the contract); null where nobody here can tell. The driver adds
    /// it.
    #[serde(default)]
    pub lag: Option<Lag>,
    /// `fence.lease` (an addition to the contract).
    #[serde(default)]
    pub lease_ms: u64,
    /// Of a primary, the transaction id that is given next: what is written is counted by it (an addition to the
    /// contract).
    #[serde(default)]
    pub next_xid: Option<u64>,
}

/// A proof in hand (R1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofStatus {
    /// `witness`, `pledge`, `vip_witness` or `promote`.
    pub kind: String,
    /// Since its question was sent, from where the lease counts.
    pub age_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

/// The reason of a gate that a person paused.
pub const HELD: &str = "clients are held at their transaction boundary";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    /// Of clients that this gate serves, those through the other node among them.
    pub sessions: u64,
    /// Clients of this node that the other one's gate serves (an addition to the contract). The guard does not know
    /// them: the driver adds them.
    #[serde(default)]
    pub forwarded: u64,
    /// Clients that wait for a backend (an addition to the contract). The guard does not know them: the driver adds
    /// them.
    #[serde(default)]
    pub waiting: u64,
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

/// The ARP or NDP witness of a service with a VIP alone (R3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VipWitnessStatus {
    /// The last one that answered.
    pub witness: Option<String>,
    pub age_ms: Option<u64>,
    pub error: Option<String>,
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
    /// Bound here: the MAC address of our interface; else of who announced it last on the link, null when nobody was
    /// heard (an addition to the contract).
    #[serde(default)]
    pub mac: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub name: NodeName,
    pub reachable: bool,
    pub role: Option<Role>,
    pub epoch: Option<u64>,
    pub age_ms: Option<u64>,
    /// Of its daemon (an addition to the contract).
    #[serde(default)]
    pub version: Option<String>,
    /// What both nodes must agree on is the same in both configurations (an addition to the contract).
    #[serde(default)]
    pub same_configuration: Option<bool>,
    /// The nodes that its configuration names; empty where it has not told (an addition to the contract).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeName>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicationStatus {
    /// `synchronous` or `asynchronous`.
    pub mode: String,
    pub in_sync: bool,
    /// RFC 3339, when this pair went alone; null when in sync or unknown.
    pub alone_since: Option<String>,
    /// RFC 3339, since when the standby that commits wait for is silent (an addition to the contract).
    #[serde(default)]
    pub waiting_since: Option<String>,
    pub timeline: Option<u32>,
    pub lsn: Option<String>,
    /// `on_standby_loss = "block"`: no commit is acknowledged without the standby (an addition to the contract).
    #[serde(default)]
    pub blocks: bool,
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
    /// Since when the oldest WAL that this standby has not replayed has been there; the active node knows it (an
    /// addition to the contract). The guard does not: the driver adds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_delay_seconds: Option<f64>,
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
    /// RFC 3339, since when it has not answered, where that is long enough to act on (an addition to the contract).
    #[serde(default)]
    pub hangs_since: Option<String>,
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
    /// Times the gate was shut with its clients kept, because PostgreSQL was away.
    #[serde(default)]
    pub gate_suspensions: u64,
    pub witness_proofs: u64,
    pub peer_pledges: u64,
    /// Answers of the VIP's witnesses that prolonged the lease (VIP only).
    #[serde(default)]
    pub neighbour_proofs: u64,
    /// Pauses of this machine that the witness's signed time betrayed.
    #[serde(default)]
    pub pauses_seen: u64,
    pub witness_silent: u64,
    /// Times the synchronous standby was lost.
    #[serde(default)]
    pub standby_losses: u64,
    pub peer_refused_connections: u64,
    pub sessions_total: u64,
    pub auth_failures: u64,
    /// Of `[notify]`: told, could not be told, and given up because too many waited. The driver adds them.
    #[serde(default)]
    pub notices_sent: u64,
    #[serde(default)]
    pub notices_failed: u64,
    #[serde(default)]
    pub notices_dropped: u64,
    /// Cuts by their cause, one of [`CUT_CAUSES`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cuts: BTreeMap<String, u64>,
    /// Procedures that ended here, but for dry runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub procedures: Vec<ProcedureTimes>,
}

/// What a cut is for: the lease ran out; the record named nobody or the other node; a fence; PostgreSQL was away or not
/// as recorded; the VIP; a switchover; the end of the daemon.
pub const CUT_CAUSES: [&str; 8] = ["lease", "record", "fenced", "postgres", "vip", "switchover", "shutdown", "other"];

/// What procedures there are, and how they end.
pub const PROCEDURE_KINDS: [&str; 4] = ["promote", "switchover", "unfence", "rejoin"];
pub const PROCEDURE_RESULTS: [&str; 4] = ["done", "failed", "refused", "half_way"];

/// How long procedures of one kind took that ended in one way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcedureTimes {
    /// One of [`PROCEDURE_KINDS`].
    pub kind: String,
    /// One of [`PROCEDURE_RESULTS`].
    pub result: String,
    /// By [`PROCEDURES`].
    pub times: Times,
}

impl Counters {
    /// A procedure ended with this exit code.
    pub fn procedure_ended(&mut self, kind: &str, exit: u8, took: Duration) {
        let result = match exit {
            0 => "done",
            3 => "refused",
            4 => "half_way",
            _ => "failed",
        };
        let is_it = |one: &ProcedureTimes| one.kind == kind && one.result == result;
        let at = self.procedures.iter().position(is_it).unwrap_or_else(|| {
            let one = ProcedureTimes { kind: kind.to_owned(), result: result.to_owned(), times: Times::default() };
            self.procedures.push(one);
            self.procedures.len() - 1
        });
        if let Some(one) = self.procedures.get_mut(at) {
            one.times.add(&PROCEDURES, took);
        }
    }
}

/// What an older daemon, which does not send the field, would have said.
fn yes() -> bool {
    true
}

/// Milliseconds for people: `0.3 s`, `42 s`, `7 min`, `3 h`, `5 days`.
pub fn human_ms(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..=9 => format!("{}.{} s", seconds, ms % 1000 / 100),
        10..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Status numbers of pgpool-II's `pcp_node_info`, which its users' monitoring matches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PgpoolStatus {
    /// 1: up, nobody connected yet.
    Waiting = 1,
    /// 2: up, with connections.
    Up = 2,
    /// 3: down, or detached by hand (pgpool-II makes no difference between the two).
    Down = 3,
}

impl Snapshot {
    /// The row of the node that published this.
    pub fn own_row(&self) -> Option<&NodeRow> {
        self.nodes.iter().find(|row| row.name == self.node)
    }

    /// Name of the node that is known to be active, from what this node can prove or was told. `None` is not proof
    /// that nobody is.
    pub fn active_node(&self) -> Option<&NodeName> {
        if self.role == Role::Active {
            return Some(&self.node);
        }
        self.peer.as_ref().filter(|peer| peer.reachable && peer.role == Some(Role::Active)).map(|peer| &peer.name)
    }

    /// The event that made it what it is, if the log still has it: since when, and why.
    pub fn since(&self) -> Option<&EventRow> {
        let kind = match (self.role, self.gate.state) {
            (Role::Active, GateState::Open) => "gate_opened",
            (Role::Fenced, _) | (_, GateState::Fenced) => "fenced",
            (_, GateState::Lapsed) => "gate_cut",
            _ => return None,
        };
        self.events.iter().rev().find(|event| event.kind == kind)
    }

    /// One sentence for the head of every page: who is active, and how this node knows.
    pub fn headline(&self) -> String {
        let node = &self.node;
        let reason = self.gate.reason.as_deref().unwrap_or("no reason given");
        let elsewhere = self.peer.as_ref().filter(|_| self.role != Role::Active && self.active_node().is_some());
        match (self.role, self.gate.state) {
            (Role::Active, GateState::Open) if !self.paused_databases.is_empty() => {
                let names = self.paused_databases.join(", ");
                format!("{node} is active: its gate is open, but clients of {names} wait: paused by name")
            }
            (Role::Active, GateState::Open) => format!("{node} is active: its gate is open"),
            (Role::Active, GateState::Paused) if !self.postgres.up => {
                format!("{node} is active, and clients wait for its PostgreSQL: {reason}")
            }
            (Role::Active, GateState::Paused) => format!("{node} is active and paused: clients wait"),
            (Role::Active, _) => format!("{node} is active, its gate is not open yet: {reason}"),
            (Role::Fenced, _) | (_, GateState::Fenced) => match elsewhere {
                Some(peer) => format!("{} is active; {node} is fenced: {reason}", peer.name),
                None => format!("{node} is fenced: {reason}"),
            },
            (Role::Passive, GateState::Lapsed) => format!("{node} has lapsed, its gate is shut: {reason}"),
            (Role::Passive, _) => match (elsewhere, self.witness.as_ref().and_then(|w| w.points_at.as_ref())) {
                (Some(peer), _) => format!("{} is active; {node} is passive", peer.name),
                (None, Some(name)) if *name != self.node => {
                    format!("{node} is passive; the record points at {name}, which does not say that it is active")
                }
                (None, Some(name)) => {
                    format!("nobody is known to be active; the record points at {name}, whose gate is shut: {reason}")
                }
                (None, None) => format!("nobody is known to be active; {node} is passive: {reason}"),
            },
        }
    }

    /// The status number of one row for monitoring made for pgpool-II: 2 when up and somebody is connected, which is
    /// clients of this node's gate for the primary, and replication for both.
    pub fn pgpool_status(&self, row: &NodeRow) -> PgpoolStatus {
        if row.status != "up" || !row.attached {
            return PgpoolStatus::Down;
        }
        let streams = |row: &NodeRow| row.status == "up" && row.replication_state.as_deref() == Some("streaming");
        let connected = if row.role == "primary" {
            let own_clients = self.gate.sessions > 0 && row.name == self.node;
            own_clients || self.postgres.streaming || self.nodes.iter().any(streams)
        } else {
            streams(row) || (row.name == self.node && self.postgres.streaming)
        };
        if connected { PgpoolStatus::Up } else { PgpoolStatus::Waiting }
    }

    /// The lines of `/pool_nodes` and `cgi`: `0,192.0.2.11,5432,2,0.500000,primary`.
    pub fn pool_nodes_lines(&self) -> String {
        self.nodes
            .iter()
            .map(|row| {
                let status = self.pgpool_status(row) as u8;
                format!("{},{},{},{status},{:.6},{}\n", row.node_id, row.hostname, row.port, row.weight, row.role)
            })
            .collect()
    }

    /// The same picture after the gate shut by itself because the daemon published nothing more: what was open is
    /// lapsed. A snapshot must not outlive the lease it tells of.
    pub fn overtaken(&self, reason: &str) -> Snapshot {
        let mut copy = self.clone();
        if copy.gate.open {
            copy.gate.open = false;
            copy.gate.state = GateState::Lapsed;
            copy.gate.reason = Some(reason.to_owned());
            copy.role = Role::Passive;
        }
        copy.gate.lease_remaining_ms = 0;
        copy.outlook = Outlook::unknown(format!("what a failover would lose is not known: {reason}"));
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short_and_never_round_up() {
        let table = [(0, "0.0 s"), (4210, "4.2 s"), (9999, "9.9 s"), (10_000, "10 s"), (119_999, "119 s")];
        for (ms, text) in table {
            assert_eq!(human_ms(ms), text);
        }
        assert_eq!(human_ms(120_000), "2 min");
        assert_eq!(human_ms(7_200_000), "2 h");
        assert_eq!(human_ms(u64::MAX), "213503982334 days");
    }
}
