//! `SHOW pool_...`: what pgpool-II 4.3 answers, column for column, filled with what this gate knows; where it has no
//! equal, pgpool-II's neutral value. Answered on any session; the gate's own, richer views are the console's
//! ([`views`]).
//!
//! What it is NOT: typed. All columns are text: in the simple protocol with type OID 0, as in pgpool-II; in the
//! extended one, which pgpool-II does not have for these, as PostgreSQL's own type, because drivers decode by it.
//!
//! A row of `pool_pools` and `pool_processes` is a session: there is no process for each. Everyone sees every row, as
//! in `pg_stat_activity`, but only `admin_user` and the console more sessions than [`MAX_ROWS`]: an answer is kept in
//! memory until its client has read it. Addresses of clients are in none of them.

mod status;
pub(crate) mod views;

use super::command::figures;
use super::listener::Proxy;
use super::slot::{Doing, Slot};
use crate::base::time::{Duration, Instant};
use crate::engine::status::pgpool::{changed, head};
use crate::engine::status::{NodeRow, Snapshot};
use crate::wire::pg::table::{self, Cell, Column, Kind, Row, Typing};
use crate::wire::pg::{self, Shown};
use bytes::BytesMut;
use pgwire::messages::response::{CommandComplete, ReadyForQuery, TransactionStatus};
pub(crate) use status::item;
use std::sync::Arc;

/// Sessions shown to other roles than `admin_user`.
const MAX_ROWS: usize = 1000;

/// Text columns.
macro_rules! text {
    ($($name:literal),* $(,)?) => { &[$(($name, Kind::Text)),*] };
}

const NODES: &[Column<'static>] = text![
    "node_id",
    "hostname",
    "port",
    "status",
    "pg_status",
    "lb_weight",
    "role",
    "pg_role",
    "select_cnt",
    "load_balance_node",
    "replication_delay",
    "replication_state",
    "replication_sync_state",
    "last_status_change",
];
const POOLS: &[Column<'static>] = text![
    "pool_pid",
    "start_time",
    "client_connection_count",
    "pool_id",
    "backend_id",
    "database",
    "username",
    "backend_connection_time",
    "client_connection_time",
    "client_disconnection_time",
    "client_idle_duration",
    "majorversion",
    "minorversion",
    "pool_counter",
    "pool_backendpid",
    "pool_connected",
    "status",
];
const PROCESSES: &[Column<'static>] = text![
    "pool_pid",
    "start_time",
    "client_connection_count",
    "database",
    "username",
    "backend_connection_time",
    "pool_counter",
    "status",
];
const HEALTH_CHECK_STATS: &[Column<'static>] = text![
    "node_id",
    "hostname",
    "port",
    "status",
    "role",
    "last_status_change",
    "total_count",
    "success_count",
    "fail_count",
    "skip_count",
    "retry_count",
    "average_retry_count",
    "max_retry_count",
    "max_duration",
    "min_duration",
    "average_duration",
    "last_health_check",
    "last_successful_health_check",
    "last_skip_health_check",
    "last_failed_health_check",
];
const BACKEND_STATS: &[Column<'static>] = text![
    "node_id",
    "hostname",
    "port",
    "status",
    "role",
    "select_cnt",
    "insert_cnt",
    "update_cnt",
    "delete_cnt",
    "ddl_cnt",
    "other_cnt",
    "panic_cnt",
    "fatal_cnt",
    "error_cnt",
];

/// The columns of a view, in pgpool-II's order.
pub(crate) fn columns(what: Shown) -> &'static [Column<'static>] {
    match what {
        Shown::Nodes => NODES,
        Shown::Pools => POOLS,
        Shown::Processes => PROCESSES,
        Shown::Status => text!["item", "value", "description"],
        Shown::Version => text!["pool_version"],
        Shown::HealthCheckStats => HEALTH_CHECK_STATS,
        Shown::BackendStats => BACKEND_STATS,
    }
}

/// The whole answer to a simple query, down to the ReadyForQuery with the session's transaction status. `user` is who
/// asks.
pub(crate) fn answer(what: Shown, proxy: &Proxy, user: &str, status: u8) -> BytesMut {
    let mut out = BytesMut::new();
    table::describe(columns(what), &[], Typing::Untyped, &mut out);
    rows(what, proxy, user, &mut out);
    let status = TransactionStatus::try_from(status).unwrap_or(TransactionStatus::Idle);
    pg::put(&ReadyForQuery::new(status), &mut out);
    out
}

/// The RowDescription of the extended protocol. Text looks the same in both formats; `formats` are as in a Bind.
pub(crate) fn describe(what: Shown, formats: &[i16], out: &mut BytesMut) {
    table::describe(columns(what), formats, Typing::Typed, out);
}

/// The rows and the CommandComplete.
pub(crate) fn rows(what: Shown, proxy: &Proxy, user: &str, out: &mut BytesMut) {
    let most = if user == proxy.options.admin_user { usize::MAX } else { MAX_ROWS };
    let (rows, hidden) = read(what, proxy, most);
    if hidden > 0 {
        pg::put_notice(
            &format!("portcullis: the {hidden} newest sessions are not shown; postgres.admin_user sees all"),
            out,
        );
    }
    rows.iter().for_each(|row| table::row(row, &[], out));
    pg::put(&CommandComplete::new("SHOW".to_owned()), out);
}

fn row<const N: usize>(cells: [String; N]) -> Row {
    cells.into_iter().map(Cell::Text).collect()
}

/// The rows, of sessions at most so many; how many more there are.
pub(crate) fn read(what: Shown, proxy: &Proxy, most: usize) -> (Vec<Row>, usize) {
    let snapshot = proxy.snapshots.borrow().clone();
    let nodes = snapshot.nodes.iter();
    let rows = match what {
        Shown::Nodes => nodes.map(|node| row(snapshot.pool_nodes_cells(node))).collect(),
        Shown::Pools | Shown::Processes => {
            let mut all = sessions(proxy);
            let hidden = all.len().saturating_sub(most);
            all.truncate(most);
            let now = Clocks::read(proxy);
            let cells = |slot: Arc<Slot>| match what {
                Shown::Pools => row(pool_cells(&snapshot, &slot, &now)),
                _ => row(process_cells(&slot, &now)),
            };
            return (all.into_iter().map(cells).collect(), hidden);
        }
        Shown::Status => status::items(proxy).into_iter().map(row).collect(),
        Shown::Version => vec![row([version(&snapshot)])],
        Shown::HealthCheckStats => nodes.map(|node| row(health_cells(node))).collect(),
        Shown::BackendStats => {
            let passed = figures(proxy).iter().map(|pool| pool.transactions).sum::<u64>();
            nodes.map(|node| row(backend_cells(&snapshot, node, passed))).collect()
        }
    };
    (rows, 0)
}

/// `4.3.5 (tamahomeboshi)` in pgpool-II.
fn version(snapshot: &Snapshot) -> String {
    format!("{} (portcullis)", snapshot.version)
}

/// Every session, the oldest first.
fn sessions(proxy: &Proxy) -> Vec<Arc<Slot>> {
    let mut all = proxy.gate.all_slots();
    all.sort_by_key(|slot| (slot.since, slot.pid));
    all
}

/// What a moment since boot is on the wall.
struct Clocks {
    boot: Instant,
    wall: jiff::Timestamp,
}

impl Clocks {
    fn read(proxy: &Proxy) -> Clocks {
        Clocks { boot: proxy.gate.now(), wall: jiff::Timestamp::now() }
    }

    /// `YYYY-MM-DD HH:MM:SS`, in UTC.
    fn at(&self, moment: Instant) -> String {
        let ago = jiff::SignedDuration::try_from(self.boot.since(moment)).unwrap_or_default();
        self.wall.checked_sub(ago).unwrap_or(self.wall).strftime("%Y-%m-%d %H:%M:%S").to_string()
    }
}

/// In pgpool-II's words.
fn doing(slot: &Slot) -> &'static str {
    match slot.doing().0 {
        Doing::Idle => "Idle",
        // For a backend: pgpool-II, which has one for each child, knows no such wait.
        Doing::Waiting | Doing::Active => "Execute command",
        Doing::IdleInTransaction => "Idle in transaction",
    }
}

fn pool_cells(snapshot: &Snapshot, slot: &Slot, now: &Clocks) -> [String; 17] {
    let backend = slot.backend().map(|(pid, _)| pid);
    let (_, since) = slot.doing();
    let idle = if doing(slot) == "Idle" { now.boot.since(since).as_secs() } else { 0 };
    [
        slot.pid.to_string(),
        now.at(slot.since),
        "1".to_owned(),
        "0".to_owned(),
        snapshot.own_row().map_or(0, |own| own.node_id).to_string(),
        slot.database.to_string(),
        slot.user.to_string(),
        // Of a pool, the backend may be older than the session or younger; nobody keeps when.
        String::new(),
        now.at(slot.since),
        String::new(),
        idle.to_string(),
        "3".to_owned(),
        "0".to_owned(),
        "1".to_owned(),
        backend.unwrap_or(0).to_string(),
        "1".to_owned(),
        doing(slot).to_owned(),
    ]
}

fn process_cells(slot: &Slot, now: &Clocks) -> [String; 8] {
    [
        slot.pid.to_string(),
        now.at(slot.since),
        "1".to_owned(),
        slot.database.to_string(),
        slot.user.to_string(),
        String::new(),
        "1".to_owned(),
        doing(slot).to_owned(),
    ]
}

/// The daemon asks without end and keeps no count: the counts and times of checks are those of none.
fn health_cells(node: &NodeRow) -> [String; 20] {
    let [id, hostname, port, status, role] = head(node);
    let (none, fraction) = (|| "0".to_owned(), || "0.000000".to_owned());
    let never = String::new;
    [
        id,
        hostname,
        port,
        status,
        role,
        changed(node),
        none(),
        none(),
        none(),
        none(),
        none(),
        fraction(),
        none(),
        none(),
        none(),
        fraction(),
        never(),
        never(),
        never(),
        never(),
    ]
}

/// The gate reads no statement: what passed it is counted in transactions, of no kind.
fn backend_cells(snapshot: &Snapshot, node: &NodeRow, passed: u64) -> [String; 14] {
    let [id, hostname, port, status, role] = head(node);
    let other = if node.name == snapshot.node { passed } else { 0 };
    let none = || "0".to_owned();
    [
        id,
        hostname,
        port,
        status,
        role,
        node.select_count.to_string(),
        none(),
        none(),
        none(),
        none(),
        other.to_string(),
        none(),
        none(),
        none(),
    ]
}

/// Seconds for people.
fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}
