//! The read-only snapshot: what HTTP and the command line show, and nothing they could not.

mod outlook;

use super::Guard;
use crate::base::time::millis;
use crate::engine::evidence::{self, Seen, Verdict};
use crate::engine::setup::Mode;
use crate::engine::status::{
    GateState, GateStatus, HELD, JournalStatus, NodeRow, PeerStatus, PostgresStatus, ProcedureStatus, ProofStatus,
    ReplicationStatus, Role, ServerStatus, Snapshot, VerdictWord, VipStatus, VipWitnessStatus, WitnessStatus,
};
use crate::engine::turn::{Now, PeerPg};

impl Guard {
    /// What this node can prove now.
    pub(super) fn role(&self) -> Role {
        if self.fenced().is_some() {
            return Role::Fenced;
        }
        let proven = self.durable.is_holder()
            && self.against().is_none()
            && self.lease_deadline() > self.at.boot
            && (self.keeps_clients() || self.not_confirmed(self.at).is_none());
        if proven { Role::Active } else { Role::Passive }
    }

    /// The whole node for people, as of `now`.
    pub fn snapshot(&self, now: Now) -> Snapshot {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up);
        let open = self.gate.open && self.gate.until > now.boot;
        let replication = self.replication_status(now);
        let outlook = self.outlook(now, &replication);
        Snapshot {
            node: self.setup.me.clone(),
            version: self.setup.version.clone(),
            role: self.role(),
            gate: GateStatus {
                open: open && !self.gate.paused,
                state: self.gate.state,
                reason: match (open, self.gate.paused) {
                    (true, true) => Some(HELD.to_owned()),
                    (true, false) => None,
                    (false, _) => (!self.gate.reason.is_empty()).then(|| self.gate.reason.clone()),
                },
                lease_remaining_ms: millis(self.lease_deadline().since(now.boot)),
                sessions: self.gate.sessions,
                forwarded: 0,
                waiting: 0,
            },
            epoch: self.durable.won.max(self.durable.seen).0,
            witness: (!self.setup.servers.is_empty()).then(|| self.witness_status(now)),
            vip: self.vip_statuses().into_iter().next(),
            vips: self.vip_statuses(),
            peer: (self.setup.peer != self.setup.me).then(|| PeerStatus {
                name: self.setup.peer.clone(),
                reachable: self.peer_reachable(now),
                role: self.peer.state.as_ref().map(|p| p.role),
                epoch: self.peer.state.as_ref().map(|p| p.complete.max(p.seen).0),
                age_ms: self.peer.heard.map(|at| millis(now.boot.since(at))),
                version: self.peer.state.as_ref().map(|p| p.version.clone()),
                same_configuration: self.peer.state.as_ref().map(|p| p.digest == self.setup.digest),
                nodes: self.peer.state.as_ref().map(|p| p.nodes.clone()).unwrap_or_default(),
            }),
            replication,
            procedure: self.procedure_status(now),
            nodes: self.node_rows(now),
            events: self.events.iter().cloned().collect(),
            postgres: PostgresStatus {
                up: self.pg.up,
                role: report.map(|r| if r.in_recovery { "standby" } else { "primary" }.to_owned()),
                error: self.pg.error.clone(),
                streaming: self.standby_in_service(now),
                hangs_since: self.hangs_since(now).map(str::to_owned),
            },
            journal: JournalStatus {
                refused: self.durable.refused.0,
                won: self.durable.won.0,
                complete: self.durable.complete.0,
                fence: self.durable.fence.0,
            },
            advice: self.advice(now),
            maintenance: self.durable.maintenance,
            paused_databases: Vec::new(),
            vip_witness: (self.setup.mode == Mode::VipOnly).then(|| VipWitnessStatus {
                witness: self.neighbours.witness.map(|address| address.to_string()),
                age_ms: self.neighbours.asked.map(|at| millis(now.boot.since(at))),
                error: self.neighbours.error.clone(),
            }),
            counters: self.counters.clone(),
            turn_running: true,
            proofs: self
                .proofs
                .each()
                .map(|(kind, asked)| ProofStatus { kind: kind.to_owned(), age_ms: millis(now.boot.since(asked)) })
                .collect(),
            at: now.rfc3339(),
            outlook,
            next: None,
            lag: None,
            lease_ms: millis(self.setup.timing.lease),
            next_xid: report.and_then(|r| r.next_xid),
        }
    }

    fn standby_in_service(&self, now: Now) -> bool {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up);
        report.is_some_and(|r| r.in_recovery && r.streaming)
            && self.fenced().is_none()
            && !self.durable.rejoining
            && self.peer_reachable(now)
            && self.peer.state.as_ref().is_some_and(|p| p.role == Role::Active)
    }

    fn witness_status(&self, now: Now) -> WitnessStatus {
        let newest = self.witness.servers.iter().filter_map(|s| s.asked).max();
        let seen = match self.setup.mode {
            // The others may lag.
            Mode::Update => self.witness.servers.first(),
            Mode::Observe | Mode::VipOnly => {
                self.witness.servers.iter().filter(|s| s.seen.is_some()).max_by_key(|s| s.asked)
            }
        };
        let seen = seen.and_then(|s| s.seen.as_ref());
        let newest_epoch = seen.and_then(evidence::marker_of).map(|m| m.epoch);
        let servers = self.witness.servers.iter().enumerate().map(|(index, s)| {
            let word = match (&s.error, &s.seen) {
                (Some(_), _) | (None, None) => VerdictWord::Silent,
                (None, Some(seen)) => self.word(s.verdict.as_ref(), seen),
            };
            let epoch = s.seen.as_ref().and_then(evidence::marker_of).map(|m| m.epoch);
            let lags = index > 0 && self.setup.mode == Mode::Update && epoch.is_some() && epoch < newest_epoch;
            let word = if lags { VerdictWord::Silent } else { word };
            let lagging = lags.then(|| "it lags behind: its marker is of an older epoch".to_owned());
            let nothing = match &s.verdict {
                Some(Verdict::Nothing { why }) if word == VerdictWord::Nothing => Some(why.clone()),
                _ => None,
            };
            ServerStatus {
                server: self.setup.servers.get(index).cloned().unwrap_or_default(),
                verdict: word,
                age_ms: s.asked.map(|at| millis(now.boot.since(at))),
                error: s.error.clone().or(lagging).or(nothing),
            }
        });
        WitnessStatus {
            mode: match self.setup.mode {
                Mode::Update => "update".to_owned(),
                Mode::Observe => "observe".to_owned(),
                Mode::VipOnly => "none".to_owned(),
            },
            points_at: seen.and_then(evidence::points_at).cloned(),
            epoch: seen.and_then(evidence::marker_of).map(|m| m.epoch.0),
            age_ms: newest.map(|at| millis(now.boot.since(at))),
            servers: servers.collect(),
        }
    }

    /// `here`, `elsewhere` or `nothing`: for a node that holds nothing, where the record points.
    fn word(&self, verdict: Option<&Verdict>, seen: &Seen) -> VerdictWord {
        if self.durable.is_holder() || self.durable.won > self.durable.complete {
            return match verdict {
                Some(Verdict::Here) => VerdictWord::Here,
                Some(Verdict::Higher { .. } | Verdict::Elsewhere { .. }) => VerdictWord::Elsewhere,
                Some(Verdict::Nothing { .. } | Verdict::Lagging) => VerdictWord::Nothing,
                None => VerdictWord::Silent,
            };
        }
        match evidence::points_at(seen) {
            Some(name) if *name == self.setup.me => VerdictWord::Here,
            Some(_) => VerdictWord::Elsewhere,
            None => VerdictWord::Nothing,
        }
    }

    fn vip_statuses(&self) -> Vec<VipStatus> {
        let nets = self.setup.vips.iter();
        nets.zip(&self.vips)
            .map(|(net, vip)| VipStatus {
                address: net.to_string(),
                bound: vip.is_bound(),
                conflict: vip.conflict.clone(),
                mac: if vip.is_bound() { vip.own_mac.clone() } else { vip.holder_mac.clone() },
            })
            .collect()
    }

    fn replication_status(&self, now: Now) -> ReplicationStatus {
        let report = self.pg.report.as_ref().filter(|_| self.pg.up);
        let marker = self.witness.marker.as_ref();
        let alone = match marker {
            Some(m) if m.sync.is_none() => Some(m.since.clone()),
            Some(_) => None,
            None if self.durable.is_holder() && self.durable.sync.is_none() => self.durable.sync_since.clone(),
            None => None,
        };
        ReplicationStatus {
            mode: if self.setup.synchronous { "synchronous" } else { "asynchronous" }.to_owned(),
            // Nobody knows what streams from a primary that does not answer.
            in_sync: self.in_sync() && self.hangs_since(now).is_none(),
            // One that blocks never is: its list names the peer whatever the record says.
            alone_since: alone.filter(|_| !self.blocks()),
            waiting_since: self
                .durability
                .standby
                .waiting_since()
                .filter(|_| report.is_some_and(|r| !r.in_recovery && !r.sync_list.trim().is_empty())),
            timeline: report.map(|r| r.timeline.0),
            lsn: report.map(|r| r.lsn.to_string()),
            blocks: self.blocks(),
        }
    }

    fn procedure_status(&self, now: Now) -> Option<ProcedureStatus> {
        let (brief, since) = match (&self.takeover, &self.rejoin, &self.handover) {
            (Some(t), ..) => (t.brief(), t.since().to_owned()),
            (None, Some(r), _) => (r.brief(), r.since().to_owned()),
            (None, None, Some(h)) => {
                return Some(ProcedureStatus {
                    kind: "switchover".to_owned(),
                    id: h.attempt,
                    step: h.word().to_owned(),
                    since: String::new(),
                });
            }
            (None, None, None) => return self.peers_rejoin(now),
        };
        Some(ProcedureStatus { kind: brief.kind, id: brief.id, step: brief.step, since })
    }

    /// The peer is being brought back, which concerns whoever looks here.
    fn peers_rejoin(&self, now: Now) -> Option<ProcedureStatus> {
        let state = self.peer.state.as_ref().filter(|_| self.peer_reachable(now))?;
        let brief = state.procedure.as_ref().filter(|brief| brief.kind == "rejoin" && brief.ended.is_none())?;
        Some(ProcedureStatus {
            kind: brief.kind.clone(),
            id: brief.id,
            step: format!("on {}: {}", state.node, brief.step),
            since: String::new(),
        })
    }

    /// Nothing but a `rejoin` brings this node back: fenced other than by a consent, half rejoined, or without state.
    pub(super) fn wants_rejoin(&self) -> bool {
        let fenced = self.fenced().is_some() && !(self.durable.consented && self.fence_now.is_none());
        let lost = !self.durable.initialised && self.durable.seen.0 > 0;
        (fenced || self.durable.rejoining || lost) && self.rejoin.is_none() && self.takeover.is_none()
    }

    fn node_rows(&self, now: Now) -> Vec<NodeRow> {
        let mine = self.pg.report.as_ref().filter(|_| self.pg.up);
        let peer_state = self.peer.state.as_ref().filter(|_| self.peer_reachable(now));
        let peer_pg: Option<&PeerPg> = peer_state.and_then(|p| p.pg.as_ref());
        let primary_lsn = match (mine, peer_pg) {
            (Some(r), _) if !r.in_recovery => Some(r.lsn),
            (_, Some(pg)) if !pg.in_recovery => Some(pg.lsn),
            _ => None,
        };
        let peer_row = self.standby_row();
        self.setup
            .nodes
            .iter()
            .enumerate()
            .map(|(index, node)| {
                let me = node.name == self.setup.me;
                let peer = node.name == self.setup.peer;
                let row = if peer { peer_row } else { self.follower_row(&node.name) };
                let (up, standby, lsn, streaming) = if me {
                    (
                        mine.is_some(),
                        mine.map(|r| r.in_recovery),
                        mine.map(|r| r.lsn),
                        mine.is_some_and(|r| r.streaming),
                    )
                } else if peer && peer_pg.is_some() {
                    (true, peer_pg.map(|p| p.in_recovery), peer_pg.map(|p| p.lsn), peer_pg.is_some_and(|p| p.streaming))
                } else if peer {
                    // The peer's daemon is silent: its walsender here still tells that its PostgreSQL lives.
                    (
                        row.is_some(),
                        Some(true),
                        row.and_then(|r| r.flush_lsn),
                        row.is_some_and(|r| r.state == "streaming"),
                    )
                } else {
                    self.follower_seen(now, &node.name)
                };
                // Only the active node's PostgreSQL is called primary; a fenced one that still runs is not.
                let role = if me {
                    if standby == Some(false) && self.role() != Role::Fenced { "primary" } else { "standby" }
                } else if peer && standby == Some(false) && peer_state.is_some_and(|p| p.role != Role::Fenced) {
                    "primary"
                } else {
                    "standby"
                };
                let is_standby = role == "standby";
                // The walsender's own view is of one moment; the peer's word is up to a poll old.
                let lsn = match row.filter(|_| !me && is_standby) {
                    Some(row) => row.replay_lsn.or(row.flush_lsn).or(lsn),
                    None => lsn,
                };
                let delay = match (is_standby, primary_lsn, lsn) {
                    (true, Some(primary), Some(lsn)) => Some(primary.0.saturating_sub(lsn.0)),
                    (false, ..) => Some(0),
                    _ => None,
                };
                let view = row.filter(|_| !me && is_standby);
                let state = match view {
                    Some(row) => Some(row.state.clone()),
                    None => (is_standby && streaming).then(|| "streaming".to_owned()),
                };
                NodeRow {
                    node_id: u32::try_from(index).unwrap_or(0),
                    name: node.name.clone(),
                    hostname: node.hostname.clone(),
                    port: node.port,
                    status: if up { "up" } else { "down" }.to_owned(),
                    role: role.to_owned(),
                    weight: node.weight,
                    attached: up && (!is_standby || streaming),
                    replication_delay_bytes: delay,
                    replication_state: state,
                    sync_state: view.map(|row| row.sync_state.clone()),
                    select_count: 0,
                    last_status_change: None,
                    replication_delay_seconds: None,
                }
            })
            .collect()
    }

    /// The next sensible command, if any.
    fn advice(&self, now: Now) -> Option<String> {
        let me = &self.setup.me;
        let points = self.witness.points_at(&self.setup);
        if self.takeover.is_some() || self.rejoin.is_some() || self.handover.is_some() {
            return None;
        }
        if self.fenced().is_some() {
            let elsewhere = points.is_some_and(|name| name != me);
            let served = self.peer.state.as_ref().is_some_and(|p| p.gate_open) && self.peer_reachable(now);
            return Some(if served {
                format!("portcullis rejoin {me}    (bring this node back as standby)")
            } else if elsewhere {
                format!("portcullis promote    (on {}: it is named by the record but does not serve)", self.setup.peer)
            } else {
                "portcullis unfence    (lift the fence; or promote on the other node)".to_owned()
            });
        }
        if self.durable.won > self.durable.complete {
            return Some("portcullis promote    (finish the interrupted takeover)".to_owned());
        }
        if self.durable.rejoining {
            return Some(format!("portcullis rejoin {me}    (finish the interrupted rejoin)"));
        }
        if !self.durable.initialised && self.durable.seen.0 > 0 {
            return Some(format!("portcullis rejoin {me}    (this node has no state of its own)"));
        }
        if self.durable.is_holder() && self.gate.state == GateState::Lapsed && self.against().is_some() {
            return Some("put the DNS record right, or promote on the node that shall serve".to_owned());
        }
        let peer = self.peer.state.as_ref().filter(|_| self.peer_reachable(now));
        if self.gate.open && self.hangs_since(now).is_some() && peer.is_some() {
            let peer = &self.setup.peer;
            return Some(format!(
                "portcullis promote    (on {peer}: PostgreSQL here does not answer; this node consents)"
            ));
        }
        if self.gate.open && peer.is_some_and(|p| p.wants_rejoin) {
            return Some(format!(
                "portcullis rejoin {}    (it waits for that; this node serves alone)",
                self.setup.peer
            ));
        }
        if !self.durable.is_holder() && !self.peer_reachable(now) && self.durable.seen.0 > 0 {
            return Some("portcullis promote --dry-run    (shows what a failover would do)".to_owned());
        }
        None
    }
}
