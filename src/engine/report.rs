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

/// What the source of a clone says of itself, through its own daemon.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceFacts {
    pub system_id: SystemId,
    /// Size of all tablespaces, WAL apart.
    pub bytes: u64,
    /// Tablespaces outside the data directory.
    pub tablespaces: u32,
}
