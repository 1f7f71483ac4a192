//! The console's own views: all that the gate and the last snapshot know, with types.
//!
//! What it is NOT: pgpool-II's columns. Where pgbouncer has the same figure, its name for it is used, because people
//! and exporters know it.

use super::{Clocks, seconds, sessions};
use crate::base::config::PoolMode;
use crate::engine::status::Snapshot;
use crate::serve::command::figures;
use crate::serve::listener::Proxy;
use crate::serve::slot::Doing;
use crate::wire::pg::console::View;
use crate::wire::pg::table::{Cell, Column, Kind, Row};
use std::sync::Arc;

use Kind::{Bool, Float, Int, Text};

/// What the console can do, for `SHOW HELP`; its views follow in the answer.
const COMMANDS: [(&str, &str); 9] = [
    ("PAUSE [db]", "hold clients at their next transaction boundary; waits until all are, 10 s at most"),
    ("RESUME [db]", "let them go"),
    ("RECONNECT [db]", "no backend of now is lent again: idle ones end at once, others when they come back"),
    ("KILL db", "end all sessions of a database (FATAL 57P01); new ones are welcome unless it is paused"),
    ("KILL CLIENT id", "end one session; SHOW CLIENTS has the ids"),
    ("RELOAD", "read the configuration again, as far as a running daemon can apply it"),
    ("SHOW view", "one of the following; a transaction block undoes nothing of the commands above"),
    ("PGPOOL SHOW item", "a setting under pgpool-II's name; PGPOOL SHOW ALL lists them"),
    ("not here", "fence, promote, switchover, rejoin, maintenance: `portcullis --help` on the nodes"),
];

/// The columns of a view.
pub(crate) fn columns(view: View) -> &'static [Column<'static>] {
    match view {
        View::Pool(what) => super::columns(what),
        View::Clients => &[
            ("id", Int),
            ("user", Text),
            ("database", Text),
            ("state", Text),
            ("addr", Text),
            ("port", Int),
            ("tls", Bool),
            ("connect_time", Text),
            ("connected_seconds", Float),
            ("state_seconds", Float),
            ("server_pid", Int),
        ],
        View::Config => &[("key", Text), ("value", Text), ("changeable", Bool)],
        View::Databases => &[("name", Text), ("paused", Bool), ("current_connections", Int), ("servers", Int)],
        View::Events => &[("at", Text), ("kind", Text), ("text", Text)],
        View::Help => &[("what", Text), ("does", Text)],
        View::Lease => &[
            ("node", Text),
            ("gate", Text),
            ("open", Bool),
            ("lease_remaining_ms", Int),
            ("reason", Text),
            ("epoch", Int),
            ("witness_points_at", Text),
            ("witness_age_ms", Int),
            ("peer", Text),
            ("peer_reachable", Bool),
            ("peer_age_ms", Int),
        ],
        View::Lists => &[("list", Text), ("items", Int)],
        View::Nodes => &[
            ("node_id", Int),
            ("name", Text),
            ("hostname", Text),
            ("port", Int),
            ("status", Text),
            ("role", Text),
            ("weight", Float),
            ("attached", Bool),
            ("replication_delay_bytes", Int),
            ("replication_state", Text),
            ("sync_state", Text),
            ("last_status_change", Text),
        ],
        View::Pools => &[
            ("database", Text),
            ("user", Text),
            ("cl_active", Int),
            ("cl_waiting", Int),
            ("sv_active", Int),
            ("sv_idle", Int),
            ("pool_size", Int),
            ("pool_mode", Text),
            ("paused", Bool),
        ],
        View::Servers => &[("pid", Int), ("user", Text), ("database", Text), ("state", Text), ("client_id", Int)],
        View::Stats => &[
            ("database", Text),
            ("user", Text),
            ("total_login_count", Int),
            ("total_xact_count", Int),
            ("total_received", Int),
            ("total_sent", Int),
            ("total_wait_time", Int),
        ],
        View::Status => &[("item", Text), ("value", Text)],
        View::Version => &[("version", Text)],
    }
}

macro_rules! cells {
    ($($cell:expr),* $(,)?) => { vec![$(Cell::from($cell)),*] };
}

/// The rows.
pub(crate) fn rows(view: View, proxy: &Proxy) -> Vec<Row> {
    let snapshot = proxy.snapshots.borrow().clone();
    match view {
        View::Pool(what) => super::read(what, proxy, usize::MAX).0,
        View::Clients => clients(proxy),
        View::Config => {
            let rows = proxy.config().map(|config| config.rows()).unwrap_or_default();
            rows.into_iter().map(|row| cells![row.key, row.value, row.live]).collect()
        }
        View::Databases => databases(proxy),
        View::Events => snapshot.events.iter().map(|e| cells![&*e.at, &*e.kind, &*e.text]).collect(),
        View::Help => {
            let commands = COMMANDS.iter().map(|(what, does)| cells![*what, *does]);
            let own = View::OWN.iter().map(|(name, _, shows)| cells![format!("SHOW {name}"), *shows]);
            let pool = crate::wire::pg::Shown::ALL.iter();
            let pool = pool.map(|(name, _)| cells![format!("SHOW {name}"), "as pgpool-II 4.3 answers it"]);
            commands.chain(own).chain(pool).collect()
        }
        View::Lease => vec![lease(proxy, &snapshot)],
        View::Lists => lists(proxy),
        View::Nodes => nodes(&snapshot),
        View::Pools => pools(proxy),
        View::Servers => servers(proxy),
        View::Stats => {
            let row = |pool: crate::serve::command::Figures| {
                let waited = u64::try_from(pool.waited.as_micros()).unwrap_or(u64::MAX);
                cells![pool.database, pool.user, pool.logins, pool.transactions, pool.bytes_in, pool.bytes_out, waited]
            };
            figures(proxy).into_iter().map(row).collect()
        }
        View::Status => status(proxy, &snapshot),
        View::Version => vec![cells![format!("portcullis {}", snapshot.version)]],
    }
}

fn doing(doing: Doing) -> &'static str {
    match doing {
        Doing::Idle => "idle",
        Doing::Waiting => "waiting",
        Doing::Active => "active",
        Doing::IdleInTransaction => "idle in transaction",
    }
}

fn clients(proxy: &Proxy) -> Vec<Row> {
    let now = Clocks::read(proxy);
    let row = |slot: Arc<crate::serve::slot::Slot>| {
        let (state, since) = slot.doing();
        cells![
            slot.pid,
            &*slot.user,
            &*slot.database,
            doing(state),
            slot.peer.ip().to_canonical().to_string(),
            u32::from(slot.peer.port()),
            slot.tls,
            now.at(slot.since),
            seconds(now.boot.since(slot.since)),
            seconds(now.boot.since(since)),
            slot.backend().map(|(pid, _)| pid),
        ]
    };
    sessions(proxy).into_iter().map(row).collect()
}

fn databases(proxy: &Proxy) -> Vec<Row> {
    let figures = figures(proxy);
    let row = |(name, database): (String, Arc<crate::serve::pool::Database>)| {
        let of = |count: fn(&crate::serve::command::Figures) -> u32| -> u32 {
            figures.iter().filter(|pool| pool.database == name).map(count).sum()
        };
        let (clients, servers) = (of(|pool| pool.clients), of(|pool| pool.open));
        cells![name, database.paused.load(std::sync::atomic::Ordering::Relaxed), clients, servers]
    };
    proxy.databases().into_iter().map(row).collect()
}

fn pools(proxy: &Proxy) -> Vec<Row> {
    let limits = proxy.limits();
    let mode = match limits.mode {
        PoolMode::Session => "session",
        PoolMode::Transaction => "transaction",
    };
    let row = |pool: crate::serve::command::Figures| {
        cells![
            pool.database,
            pool.user,
            pool.clients.saturating_sub(pool.waiting),
            pool.waiting,
            pool.open.saturating_sub(pool.idle),
            pool.idle,
            limits.size,
            mode,
            pool.paused,
        ]
    };
    figures(proxy).into_iter().map(row).collect()
}

/// Those that a client has, with their process number; then those that nobody has, which only their threads know.
fn servers(proxy: &Proxy) -> Vec<Row> {
    let lent = sessions(proxy).into_iter().filter_map(|slot| {
        let (pid, _) = slot.backend()?;
        Some(cells![pid, &*slot.user, &*slot.database, doing(slot.doing().0), slot.pid])
    });
    let idle = figures(proxy).into_iter().flat_map(|pool| {
        let row = cells![None::<i32>, pool.user, pool.database, "in the pool", None::<i32>];
        std::iter::repeat_n(row, usize::try_from(pool.idle).unwrap_or(0))
    });
    lent.chain(idle).collect()
}

fn lists(proxy: &Proxy) -> Vec<Row> {
    let figures = figures(proxy);
    let mut users: Vec<&str> = figures.iter().map(|pool| &*pool.user).collect();
    users.sort_unstable();
    users.dedup();
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let sum =
        |of: fn(&crate::serve::command::Figures) -> u32| -> u64 { figures.iter().map(|p| u64::from(of(p))).sum() };
    let used = proxy.gate.sessions();
    vec![
        cells!["databases", count(proxy.databases().len())],
        cells!["users", count(users.len())],
        cells!["pools", count(figures.len())],
        cells!["free_clients", u64::from(proxy.limits().max_clients).saturating_sub(used)],
        cells!["used_clients", used],
        cells!["waiting_clients", sum(|pool| pool.waiting)],
        cells!["free_servers", sum(|pool| pool.idle)],
        cells!["used_servers", sum(|pool| pool.open.saturating_sub(pool.idle))],
        cells!["consoles", u64::from(proxy.consoles())],
        cells!["sessions_total", proxy.gate.sessions_total()],
        cells!["auth_failures", proxy.gate.auth_failures()],
    ]
}

fn nodes(snapshot: &Snapshot) -> Vec<Row> {
    let row = |node: &crate::engine::status::NodeRow| {
        cells![
            node.node_id,
            node.name.as_str(),
            &*node.hostname,
            u32::from(node.port),
            &*node.status,
            &*node.role,
            node.weight,
            node.attached,
            node.replication_delay_bytes,
            node.replication_state.as_deref(),
            node.sync_state.as_deref(),
            node.last_status_change.as_deref(),
        ]
    };
    snapshot.nodes.iter().map(row).collect()
}

/// From the gate itself where it knows better than the last snapshot.
fn remaining(proxy: &Proxy) -> u64 {
    crate::base::time::millis(proxy.gate.deadline().since(proxy.gate.now()))
}

/// As every surface says it: a gate that lets clients wait is not open, though its lease is good.
fn open(proxy: &Proxy, snapshot: &Snapshot) -> bool {
    snapshot.gate.open && proxy.gate.passes()
}

fn lease(proxy: &Proxy, snapshot: &Snapshot) -> Row {
    let (gate, witness, peer) = (&snapshot.gate, snapshot.witness.as_ref(), snapshot.peer.as_ref());
    cells![
        snapshot.node.as_str(),
        gate.state.as_str(),
        open(proxy, snapshot),
        remaining(proxy),
        gate.reason.as_deref(),
        snapshot.epoch,
        witness.and_then(|witness| witness.points_at.as_ref()).map(|name| name.as_str()),
        witness.and_then(|witness| witness.age_ms),
        peer.map(|peer| peer.name.as_str()),
        peer.map(|peer| peer.reachable),
        peer.and_then(|peer| peer.age_ms),
    ]
}

fn status(proxy: &Proxy, snapshot: &Snapshot) -> Vec<Row> {
    let mut rows: Vec<(&str, String)> = vec![
        ("summary", snapshot.headline()),
        ("node", snapshot.node.to_string()),
        ("version", snapshot.version.clone()),
        ("role", snapshot.role.as_str().to_owned()),
        ("epoch", snapshot.epoch.to_string()),
        ("gate.open", open(proxy, snapshot).to_string()),
        ("gate.state", snapshot.gate.state.as_str().to_owned()),
        ("gate.lease_remaining_ms", remaining(proxy).to_string()),
        ("gate.sessions", proxy.gate.sessions().to_string()),
    ];
    if let Some(witness) = &snapshot.witness {
        rows.push(("witness.mode", witness.mode.clone()));
        rows.push(("witness.points_at", witness.points_at.as_ref().map(ToString::to_string).unwrap_or_default()));
        for server in &witness.servers {
            let error = server.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            rows.push(("witness.server", format!("{} {}{error}", server.server, server.verdict.as_str())));
        }
    }
    for vip in &snapshot.vips {
        let bound = if vip.bound { "bound" } else { "not bound" };
        let conflict = vip.conflict.as_deref().map(|mac| format!(", claimed by {mac} too")).unwrap_or_default();
        rows.push(("vip", format!("{} {bound}{conflict}", vip.address)));
    }
    if let Some(peer) = &snapshot.peer {
        let role = peer.role.map_or("unknown", |role| role.as_str());
        let reachable = if peer.reachable { role } else { "does not answer" };
        rows.push(("peer", format!("{} {reachable}", peer.name)));
    }
    let replication = &snapshot.replication;
    rows.push(("replication.mode", replication.mode.clone()));
    rows.push(("replication.in_sync", replication.in_sync.to_string()));
    rows.push(("replication.alone_since", replication.alone_since.clone().unwrap_or_default()));
    if let Some(procedure) = &snapshot.procedure {
        rows.push(("procedure", format!("{}: {}", procedure.kind, procedure.step)));
    }
    rows.push(("maintenance", snapshot.maintenance.to_string()));
    rows.push(("outlook.safe", snapshot.outlook.safe.to_string()));
    rows.push(("outlook", snapshot.outlook.text.clone()));
    let next = snapshot.next.as_ref().map(|next| format!("on {}: {}", next.on, next.command));
    rows.push(("next", next.unwrap_or_default()));
    rows.push(("advice", snapshot.advice.clone().unwrap_or_default()));
    rows.into_iter().map(|(item, value)| cells![item, value]).collect()
}
