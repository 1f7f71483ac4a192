//! What a node without a vote shows and tells: the snapshot, and its state for the voters.

use super::{Follower, NO_VOTE};
use crate::base::time::millis;
use crate::engine::evidence;
use crate::engine::outlook::{Facts, Outlook, Serving, Standing, outlook};
use crate::engine::report::StandbyRow;
use crate::engine::setup::NodeSetup;
use crate::engine::status::{
    GateState, GateStatus, JournalStatus, NodeRow, PeerStatus, PostgresStatus, ProcedureStatus, ReplicationStatus,
    Role, ServerStatus, Snapshot, VerdictWord, VipStatus, WitnessStatus,
};
use crate::engine::turn::{FollowerState, Now, PeerPg};

/// A node's PostgreSQL as one row needs it.
#[derive(Default)]
struct Seen<'a> {
    pg: Option<&'a PeerPg>,
    row: Option<&'a StandbyRow>,
    fenced: bool,
}

impl Follower {
    /// What the voters are told with every question.
    pub(super) fn state(&self) -> FollowerState {
        FollowerState {
            node: self.setup.me.clone(),
            version: self.setup.version.clone(),
            follows: self.pg.follows.clone(),
            pg: self.own_pg(),
            trouble: self.trouble.clone(),
            procedure: self.rejoin.as_ref().map(super::rejoin::Rejoin::brief).or_else(|| self.last_ended.clone()),
        }
    }

    fn own_pg(&self) -> Option<PeerPg> {
        self.report().map(|r| PeerPg {
            system_id: r.system_id,
            in_recovery: r.in_recovery,
            timeline: r.timeline,
            lsn: r.lsn,
            replay_lsn: r.replay_lsn,
            streaming: r.streaming,
            confirmed: None,
        })
    }

    /// The whole node for people, as of `now`.
    pub fn snapshot(&self, now: Now) -> Snapshot {
        let report = self.report();
        let active = self.active();
        let marker = self.servers.first().and_then(|s| s.seen.as_ref()).and_then(evidence::marker_of);
        let alone = marker.filter(|m| m.sync.is_none() && self.update_mode()).map(|m| m.since.clone());
        let nets = self.setup.vips.iter();
        let vips: Vec<VipStatus> =
            nets.map(|net| VipStatus { address: net.to_string(), bound: false, conflict: None, mac: None }).collect();
        Snapshot {
            node: self.setup.me.clone(),
            version: self.setup.version.clone(),
            role: Role::Passive,
            gate: GateStatus {
                forwarded: 0,
                waiting: 0,
                open: false,
                state: GateState::Shut,
                reason: Some(NO_VOTE.to_owned()),
                lease_remaining_ms: 0,
                sessions: 0,
            },
            epoch: active.map_or(self.durable.seen, |facts| facts.state.complete).0,
            witness: (!self.setup.servers.is_empty()).then(|| self.witness_status(now)),
            vip: vips.first().cloned(),
            vips,
            peer: active.map(|facts| PeerStatus {
                name: facts.state.node.clone(),
                reachable: true,
                role: Some(facts.state.role),
                epoch: Some(facts.state.complete.0),
                age_ms: self
                    .voters
                    .get(&facts.state.node)
                    .and_then(|voter| voter.answered)
                    .map(|at| millis(now.boot.since(at))),
                version: Some(facts.state.version.clone()),
                same_configuration: Some(facts.state.digest == self.setup.digest),
                nodes: facts.state.nodes.clone(),
            }),
            replication: ReplicationStatus {
                mode: if self.setup.synchronous { "synchronous" } else { "asynchronous" }.to_owned(),
                in_sync: active.is_some_and(|facts| facts.state.in_sync),
                alone_since: alone,
                waiting_since: None,
                timeline: report.map(|r| r.timeline.0),
                lsn: report.map(|r| r.lsn.to_string()),
                blocks: false,
            },
            procedure: self.rejoin.as_ref().map(|r| {
                let brief = r.brief();
                let since = r.since().to_owned();
                ProcedureStatus { kind: brief.kind, id: brief.id, step: brief.step, since }
            }),
            nodes: self.node_rows(),
            events: self.events.iter().cloned().collect(),
            postgres: PostgresStatus {
                up: self.pg.up,
                role: report.map(|r| if r.in_recovery { "standby" } else { "primary" }.to_owned()),
                error: self.pg.error.clone().or_else(|| self.trouble.clone()),
                streaming: self.in_service(),
                hangs_since: None,
            },
            journal: JournalStatus {
                refused: self.durable.refused.0,
                won: self.durable.won.0,
                complete: self.durable.complete.0,
                fence: self.durable.fence.0,
            },
            advice: self.advice(),
            maintenance: self.durable.maintenance,
            paused_databases: Vec::new(),
            vip_witness: None,
            counters: self.counters.clone(),
            turn_running: true,
            proofs: Vec::new(),
            at: now.rfc3339(),
            outlook: self.outlook(),
            next: None,
            lag: None,
            lease_ms: 0,
            next_xid: None,
        }
    }

    /// As the active node tells it; this one could not take over.
    fn outlook(&self) -> Outlook {
        let Some(facts) = self.active() else {
            return Outlook::unknown("no voter is known to serve; ask on one of them what a failover would lose");
        };
        let active = &facts.state.node;
        let Some(taker) = self.setup.voters.iter().find(|name| *name != active) else { return Outlook::default() };
        let alone = self.servers.first().and_then(|s| s.seen.as_ref()).and_then(evidence::marker_of);
        let standing = match alone {
            _ if !self.setup.synchronous => Standing::Asynchronous,
            _ if facts.state.in_sync => Standing::InSync,
            Some(marker) if marker.sync.is_none() => Standing::Alone { since: marker.since.clone() },
            _ => Standing::NotInSync,
        };
        // Whether the voters could prove it without a marker is theirs to say.
        let provable = true;
        outlook(&Facts { active: active.clone(), taker: taker.clone(), serving: Serving::Heard, provable, standing })
    }

    /// It streams from the active node, on its timeline.
    fn in_service(&self) -> bool {
        let Some((report, facts)) = self.report().zip(self.active()) else { return false };
        let same = facts.state.pg.as_ref().is_some_and(|pg| pg.timeline == report.timeline);
        let theirs = self.pg.follows.as_ref() == Some(&facts.state.node);
        report.in_recovery && report.streaming && theirs && same && !self.durable.rejoining
    }

    fn advice(&self) -> Option<String> {
        let helps = self.trouble.is_some() && self.rejoin.is_none() && self.active().is_some();
        let missing = !self.pg.present && self.rejoin.is_none();
        (helps || missing).then(|| format!("portcullis rejoin {}    (make it a standby)", self.setup.me))
    }

    fn witness_status(&self, now: Now) -> WitnessStatus {
        // The others may lag.
        let seen = self.servers.iter().find_map(|s| s.seen.as_ref());
        let age = |at| millis(now.boot.since(at));
        let servers = self.servers.iter().zip(&self.setup.servers).map(|(s, name)| {
            let points = s.seen.as_ref().map(evidence::points_at);
            ServerStatus {
                server: name.clone(),
                verdict: match (&s.error, points) {
                    (Some(_), _) | (None, None) => VerdictWord::Silent,
                    (None, Some(None)) => VerdictWord::Nothing,
                    (None, Some(Some(_))) => VerdictWord::Elsewhere,
                },
                age_ms: s.asked.map(age),
                error: s.error.clone(),
            }
        });
        WitnessStatus {
            mode: if self.update_mode() { "update" } else { "observe" }.to_owned(),
            points_at: seen.and_then(evidence::points_at).cloned(),
            epoch: seen.and_then(evidence::marker_of).map(|m| m.epoch.0),
            age_ms: self.servers.iter().filter_map(|s| s.asked).max().map(age),
            servers: servers.collect(),
        }
    }

    fn node_rows(&self) -> Vec<NodeRow> {
        let own = self.own_pg();
        let active = self.active();
        let primary = active.and_then(|facts| facts.state.pg.as_ref()).filter(|pg| !pg.in_recovery).map(|pg| pg.lsn);
        let rows = self.setup.nodes.iter().enumerate();
        rows.map(|(index, node)| {
            let mut seen = self.see(node);
            if node.name == self.setup.me {
                seen.pg = own.as_ref();
            }
            let is_primary = seen.pg.is_some_and(|pg| !pg.in_recovery)
                && !seen.fenced
                && active.is_none_or(|facts| facts.state.node == node.name)
                && self.setup.is_voter(&node.name);
            let up = seen.pg.is_some() || seen.row.is_some();
            let streams = match (seen.row, seen.pg) {
                (Some(row), _) => Some(row.state.clone()),
                (None, Some(pg)) => pg.streaming.then(|| "streaming".to_owned()),
                (None, None) => None,
            };
            let lsn = seen.row.and_then(|row| row.replay_lsn.or(row.flush_lsn));
            let lsn = lsn.or(seen.pg.map(|pg| pg.replay_lsn.unwrap_or(pg.lsn)));
            let delay = primary.zip(lsn).map(|(primary, lsn)| primary.0.saturating_sub(lsn.0));
            NodeRow {
                node_id: u32::try_from(index).unwrap_or(0),
                name: node.name.clone(),
                hostname: node.hostname.clone(),
                port: node.port,
                status: if up { "up" } else { "down" }.to_owned(),
                role: if is_primary { "primary" } else { "standby" }.to_owned(),
                weight: node.weight,
                attached: up && (is_primary || streams.as_deref() == Some("streaming")),
                replication_delay_bytes: if is_primary { Some(0) } else { delay },
                replication_state: streams.filter(|_| !is_primary),
                sync_state: seen.row.filter(|_| !is_primary).map(|row| row.sync_state.clone()),
                select_count: 0,
                last_status_change: None,
                replication_delay_seconds: None,
            }
        })
        .collect()
    }

    fn see(&self, node: &NodeSetup) -> Seen<'_> {
        let active = self.active();
        // None where two carry its name.
        let row = active.and_then(|facts| {
            let mut rows = facts.standbys.iter().filter(|row| row.application_name == node.name.as_str());
            rows.next().filter(|_| rows.next().is_none())
        });
        let fresh = self.fresh(&node.name);
        let others = self.setup.voters.iter().filter_map(|name| self.fresh(name)).flat_map(|facts| &facts.others);
        let other = others.filter(|state| state.node == node.name).find_map(|state| state.pg.as_ref());
        let fenced = fresh.is_some_and(|facts| facts.state.role == Role::Fenced);
        Seen { pg: fresh.and_then(|facts| facts.state.pg.as_ref()).or(other), row, fenced }
    }
}
