//! A snapshot in the words of pgpool-II 4.3, for what its users' monitoring matches on.
//!
//! What it is NOT: the place of its other columns; those of sessions are `serve::show`'s.

use super::{NodeRow, Snapshot};

/// Versions of pgpool-II whose `SHOW pool_nodes` has these fourteen columns.
pub const FORMATS: [&str; 5] = ["4.3", "4.4", "4.5", "4.6", "4.7"];

/// What most rows of nodes begin with: id, hostname, port, status, role.
pub fn head(node: &NodeRow) -> [String; 5] {
    [
        node.node_id.to_string(),
        node.hostname.clone(),
        node.port.to_string(),
        // As pgpool-II: one that was taken out of service is down to its users.
        if node.attached { node.status.clone() } else { "down".to_owned() },
        node.role.clone(),
    ]
}

/// When its status last changed.
pub fn changed(node: &NodeRow) -> String {
    node.last_status_change.as_deref().map(local_form).unwrap_or_default()
}

/// `YYYY-MM-DD HH:MM:SS`, in UTC; what is not RFC 3339 passes as it is.
fn local_form(rfc3339: &str) -> String {
    let parsed = rfc3339.parse::<jiff::Timestamp>();
    parsed.map_or_else(|_| rfc3339.to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

impl Snapshot {
    /// The fourteen columns of `SHOW pool_nodes`: node_id, hostname, port, status, pg_status, lb_weight, role, pg_role,
    /// select_cnt, load_balance_node, replication_delay, replication_state, replication_sync_state,
    /// last_status_change.
    pub fn pool_nodes_cells(&self, node: &NodeRow) -> [String; 14] {
        let [id, hostname, port, status, role] = head(node);
        let up = node.status == "up";
        [
            id,
            hostname,
            port,
            status,
            node.status.clone(),
            format!("{:.6}", node.weight),
            role,
            if up { node.role.clone() } else { "unknown".to_owned() },
            node.select_count.to_string(),
            // Reads are not balanced: a session's node is the one whose gate it came through.
            (node.name == self.node).to_string(),
            node.replication_delay_bytes.unwrap_or(0).to_string(),
            node.replication_state.clone().unwrap_or_default(),
            node.sync_state.clone().unwrap_or_default(),
            changed(node),
        ]
    }

    /// The lines of `/pool_nodes?format=4.3`: as `psql -t -A -F,` prints `SHOW pool_nodes` there.
    pub fn pool_nodes_lines_of_4_3(&self) -> String {
        self.nodes.iter().map(|node| self.pool_nodes_cells(node).join(",") + "\n").collect()
    }
}
