//! `SHOW pool_nodes`, answered from the snapshot in the form of pgpool-II 4.3.
//!
//! What it is NOT: simple protocol only, as in pgpool-II; all columns are text (type OID 0), as there.

use crate::engine::status::{NodeRow, Snapshot};
use crate::wire::pg;
use bytes::{BufMut, BytesMut};
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};
use pgwire::messages::response::{CommandComplete, ReadyForQuery, TransactionStatus};

const COLUMNS: [&str; 14] = [
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

/// The whole answer, down to the ReadyForQuery with the session's transaction status.
pub(crate) fn pool_nodes(snapshot: &Snapshot, status: u8) -> BytesMut {
    let mut out = BytesMut::new();
    let fields = COLUMNS.iter().map(|name| FieldDescription::new((*name).to_owned(), 0, 0, 0, -1, -1, 0)).collect();
    pg::put(&RowDescription::new(fields), &mut out);
    for node in &snapshot.nodes {
        pg::put(&row(&cells(snapshot, node)), &mut out);
    }
    pg::put(&CommandComplete::new("SHOW".to_owned()), &mut out);
    let status = TransactionStatus::try_from(status).unwrap_or(TransactionStatus::Idle);
    pg::put(&ReadyForQuery::new(status), &mut out);
    out
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
