//! `SHOW pool_...`: the nodes in the form of pgpool-II 4.3, and what the gate knows of pools and sessions.
//!
//! What it is NOT: typed. All columns are text: in the simple protocol with type OID 0, as in pgpool-II; in the
//! extended one, which pgpool-II does not have for these, as PostgreSQL's own type, because drivers decode by it.
//!
//! Everyone sees every row, as in `pg_stat_activity`; the address of another role's client only `admin_user` does, and
//! only that role is shown more sessions than [`MAX_ROWS`]: an answer is kept in memory until its client has read it.

use super::command::figures;
use super::listener::Proxy;
use super::slot::{Doing, Slot};
use crate::base::time::{Duration, Instant};
use crate::engine::status::{NodeRow, Snapshot};
use crate::wire::pg::{self, Shown};
use bytes::{BufMut, BytesMut};
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};
use pgwire::messages::response::{CommandComplete, ReadyForQuery, TransactionStatus};

/// Sessions shown to other roles than `admin_user`.
const MAX_ROWS: usize = 1000;
const NODES: [&str; 14] = [
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

const POOLS: [&str; 8] = ["username", "database", "paused", "clients", "waiting", "backends", "idle", "size"];
const STATS: [&str; 7] =
    ["username", "database", "logins", "transactions", "bytes_received", "bytes_sent", "wait_seconds"];
const PROCESSES: [&str; 10] = [
    "pool_pid",
    "username",
    "database",
    "client_addr",
    "client_port",
    "tls",
    "state",
    "connected_seconds",
    "state_seconds",
    "backend_pid",
];

/// PostgreSQL's type `text`.
const TEXT: u32 = 25;

fn columns(what: Shown) -> &'static [&'static str] {
    match what {
        Shown::Nodes => &NODES,
        Shown::Pools => &POOLS,
        Shown::Stats => &STATS,
        Shown::Processes => &PROCESSES,
        Shown::Version => &["pool_version"],
    }
}

/// The whole answer to a simple query, down to the ReadyForQuery with the session's transaction status. `user` is who
/// asks.
pub(crate) fn answer(what: Shown, proxy: &Proxy, user: &str, status: u8) -> BytesMut {
    let mut out = BytesMut::new();
    let field = |name: &&str| FieldDescription::new((*name).to_owned(), 0, 0, 0, -1, -1, 0);
    pg::put(&RowDescription::new(columns(what).iter().map(field).collect()), &mut out);
    rows(what, proxy, user, &mut out);
    let status = TransactionStatus::try_from(status).unwrap_or(TransactionStatus::Idle);
    pg::put(&ReadyForQuery::new(status), &mut out);
    out
}

/// The RowDescription of the extended protocol. Text looks the same in both formats; `formats` are as in a Bind.
pub(crate) fn describe(what: Shown, formats: &[i16], out: &mut BytesMut) {
    let format = |at: usize| if formats.len() == 1 { formats[0] } else { formats.get(at).copied().unwrap_or(0) };
    let field = |(at, name): (usize, &&str)| FieldDescription::new((*name).to_owned(), 0, 0, TEXT, -1, -1, format(at));
    pg::put(&RowDescription::new(columns(what).iter().enumerate().map(field).collect()), out);
}

/// The rows and the CommandComplete.
pub(crate) fn rows(what: Shown, proxy: &Proxy, user: &str, out: &mut BytesMut) {
    match what {
        Shown::Nodes => {
            let snapshot = proxy.snapshots.borrow().clone();
            for node in &snapshot.nodes {
                pg::put(&row(&cells(&snapshot, node)), out);
            }
        }
        Shown::Pools => {
            let size = proxy.limits().size.to_string();
            for pool in figures(proxy) {
                let counts = [pool.clients, pool.waiting, pool.open, pool.idle].map(|n| n.to_string());
                let [clients, waiting, open, idle] = counts;
                let paused = pool.paused.to_string();
                let cells = [pool.user, pool.database, paused, clients, waiting, open, idle, size.clone()];
                pg::put(&row(&cells), out);
            }
        }
        Shown::Stats => {
            for pool in figures(proxy) {
                let counts = [pool.logins, pool.transactions, pool.bytes_in, pool.bytes_out].map(|n| n.to_string());
                let [logins, transactions, bytes_in, bytes_out] = counts;
                let waited = seconds(pool.waited);
                pg::put(&row(&[pool.user, pool.database, logins, transactions, bytes_in, bytes_out, waited]), out);
            }
        }
        Shown::Processes => processes(proxy, user, out),
        Shown::Version => pg::put(&row(&[format!("portcullis {}", proxy.snapshots.borrow().version)]), out),
    }
    pg::put(&CommandComplete::new("SHOW".to_owned()), out);
}

fn processes(proxy: &Proxy, user: &str, out: &mut BytesMut) {
    let mut all = proxy.gate.all_slots();
    all.sort_by_key(|slot| slot.since);
    let is_admin = user == proxy.options.admin_user;
    if !is_admin && all.len() > MAX_ROWS {
        let hidden = all.len() - MAX_ROWS;
        pg::put_notice(
            &format!("portcullis: the {hidden} newest sessions are not shown; postgres.admin_user sees all"),
            out,
        );
        all.truncate(MAX_ROWS);
    }
    let now = proxy.gate.now();
    for slot in all {
        pg::put(&row(&process(&slot, now, is_admin || *slot.user == *user)), out);
    }
}

fn process(slot: &Slot, now: Instant, with_address: bool) -> [String; 10] {
    let (doing, since) = slot.doing();
    let state = match doing {
        Doing::Idle => "idle",
        Doing::Waiting => "waiting",
        Doing::Active => "active",
        Doing::IdleInTransaction => "idle in transaction",
    };
    let (address, port) = if with_address {
        (slot.peer.ip().to_canonical().to_string(), slot.peer.port().to_string())
    } else {
        (String::new(), String::new())
    };
    [
        slot.pid.to_string(),
        slot.user.to_string(),
        slot.database.to_string(),
        address,
        port,
        slot.tls.to_string(),
        state.to_owned(),
        seconds(now.since(slot.since)),
        seconds(now.since(since)),
        slot.backend().map(|(pid, _)| pid.to_string()).unwrap_or_default(),
    ]
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

fn cells(snapshot: &Snapshot, node: &NodeRow) -> [String; 14] {
    let up = node.status == "up";
    [
        node.node_id.to_string(),
        node.hostname.clone(),
        node.port.to_string(),
        node.status.clone(),
        node.status.clone(),
        format!("{:.6}", node.weight),
        node.role.clone(),
        if up { node.role.clone() } else { "unknown".to_owned() },
        node.select_count.to_string(),
        // Reads are not balanced: a session's node is the one whose gate it came through.
        (node.name == snapshot.node).to_string(),
        node.replication_delay_bytes.unwrap_or(0).to_string(),
        node.replication_state.clone().unwrap_or_default(),
        node.sync_state.clone().unwrap_or_default(),
        node.last_status_change.as_deref().map(local_form).unwrap_or_default(),
    ]
}

/// `YYYY-MM-DD HH:MM:SS`, in UTC; what is not RFC 3339 passes as it is.
fn local_form(rfc3339: &str) -> String {
    let parsed = rfc3339.parse::<jiff::Timestamp>();
    parsed.map_or_else(|_| rfc3339.to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

fn row(cells: &[String]) -> DataRow {
    let mut data = BytesMut::new();
    for cell in cells {
        data.put_i32(i32::try_from(cell.len()).unwrap_or(0));
        data.put_slice(cell.as_bytes());
    }
    DataRow::new(data, i16::try_from(cells.len()).unwrap_or(0))
}
