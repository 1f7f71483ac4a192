//! What the senses report to the engine: plain values, dated by the driver, without opinion.

use crate::base::ids::{Lsn, SystemId, TimelineId};
use serde::{Deserialize, Serialize};

/// One look at the local PostgreSQL over the guard's own session on the Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PgReport {
    /// Rises each time the guard's session had to be opened anew: a restart, or crash recovery inside a running
    /// postmaster, which `pg_postmaster_start_time()` does not show (protocol-review S9).
    pub start: u64,
    pub system_id: SystemId,
    /// `pg_is_in_recovery()`.
    pub in_recovery: bool,
    /// Of a primary the timeline being written (from `pg_walfile_name`, not `pg_control_checkpoint()`, which lags
    /// after a promotion); of a standby the one received or replayed.
    pub timeline: TimelineId,
    /// Primary: `pg_current_wal_insert_lsn()`. Standby: the greater of received (flushed) and replayed.
    pub lsn: Lsn,
    /// Primary: `pg_current_wal_flush_lsn()`, which is what standbys are sent; the insert position may stay ahead of it
    /// for as long as nobody commits.
    #[serde(default)]
    pub flush_lsn: Option<Lsn>,
    /// Standby: `pg_last_wal_replay_lsn()`.
    pub replay_lsn: Option<Lsn>,
    /// Standby: `pg_last_wal_receive_lsn()` (flushed).
    pub receive_lsn: Option<Lsn>,
    /// Standby: status of the walreceiver is `streaming`.
    pub streaming: bool,
    /// `SHOW synchronous_standby_names`.
    pub sync_list: String,
    /// `pg_conf_load_time()` as microseconds since 1970.
    pub conf_loaded_us: i64,
    /// `SHOW default_transaction_read_only` = on, or any other reason why a primary would refuse writes.
    pub read_only: bool,
    /// Rows of `pg_stat_replication` (primary).
    pub standbys: Vec<StandbyRow>,
    /// Primary: the transaction id that is given next; only shown.
    #[serde(default)]
    pub next_xid: Option<u64>,
}

/// One row of `pg_stat_replication` that matters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StandbyRow {
    pub application_name: String,
    /// `startup`, `catchup`, `streaming`, ...
    pub state: String,
    /// `async`, `potential`, `sync`, `quorum`.
    pub sync_state: String,
    pub flush_lsn: Option<Lsn>,
    pub replay_lsn: Option<Lsn>,
    pub pid: i32,
}

/// What `pg_controldata` says of a cluster that is not running.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ControlData {
    pub system_id: SystemId,
    /// "Database cluster state": `shut down`, `in production`, ...
    pub state: String,
    /// Latest checkpoint location.
    pub checkpoint: Lsn,
    pub timeline: TimelineId,
}

/// What the source of a rejoin says of itself, through its own daemon. What an older daemon does not say is 0 or empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceFacts {
    pub system_id: SystemId,
    /// Size of all tablespaces, WAL apart.
    pub bytes: u64,
    /// Tablespaces outside the data directory.
    pub tablespaces: u32,
    /// Where they are, and their bytes.
    #[serde(default)]
    pub spaces: Vec<(String, u64)>,
    /// The timeline that is being written; 0: not told.
    #[serde(default)]
    pub timeline: TimelineId,
    /// The timelines before it, oldest first, each with where it ended.
    #[serde(default)]
    pub history: Vec<(TimelineId, Lsn)>,
    /// Of the latest checkpoint: behind `timeline` for a while after a promotion.
    #[serde(default)]
    pub control_timeline: TimelineId,
    /// Where the last record ended when this was asked.
    #[serde(default)]
    pub lsn: Lsn,
    /// The oldest WAL it still has.
    #[serde(default)]
    pub oldest: Lsn,
    /// Whether its WAL is byte for byte what [`WalTail`] asked about; `None`: not asked, or not to be told.
    #[serde(default)]
    pub same_tail: Option<bool>,
}

/// The end of a node's own WAL, to be compared with the source's: equal timeline numbers do not mean equal WAL (P14).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WalTail {
    /// Name of the segment file.
    pub segment: String,
    /// From this byte of it, this many.
    pub from: u64,
    pub len: u64,
    /// SHA-256 of them, in hexadecimal.
    pub sha256: String,
}

/// How a node becomes a standby of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RejoinHow {
    /// Its WAL is the beginning of the source's: it only has to follow.
    Follow,
    /// By `pg_rewind`.
    Rewind,
    /// By a fresh copy.
    Clone,
}

/// What a rejoin would do here, found out by looking alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RejoinPlan {
    pub how: RejoinHow,
    /// Why this way, and what it needs, in a sentence without a capital at its beginning.
    pub why: String,
    /// It cannot be done at all, and what would help.
    pub refusal: Option<String>,
    /// To be proven the same at the source before anything is followed.
    pub tail: Option<WalTail>,
}

/// How far a copy is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Progress {
    pub done_bytes: u64,
    /// 0: not known yet.
    pub total_bytes: u64,
    pub rate_bytes_per_s: u64,
    pub left_s: Option<u64>,
    /// What it does beside copying: waiting for a checkpoint, syncing files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Transactions that the source does not have, once they are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diverged_transactions: Option<u64>,
    /// Whether there are any cannot be told; the line says why.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub uncounted: bool,
}
