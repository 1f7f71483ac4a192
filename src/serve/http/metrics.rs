//! The snapshot as Prometheus metrics: a fresh registry for every scrape, because the snapshot is the one truth and
//! nothing is counted here.
//!
//! **Invariant:** no label set grows without a bound: nodes, servers, addresses and kinds come from the configuration
//! or from the code, and of pools (user, database) the first [`MAX_POOLS`] by name are told, none of a stranger.

use crate::base::tally::{LATENCIES, PROCEDURES, Times};
use crate::engine::status::{CUT_CAUSES, GateState, PROCEDURE_KINDS, PROCEDURE_RESULTS, Role, Snapshot, VerdictWord};
use crate::serve::command::Figures;
use crate::serve::tally::Latencies;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::atomic::AtomicU64;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Pools that have rows of their own; how many have none is told too.
const MAX_POOLS: usize = 200;

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type Counters = Family<Labels, Counter<f64, AtomicU64>>;

/// What is counted beside the guard.
pub(super) struct Counted {
    pub(super) pools: Vec<Figures>,
    pub(super) latencies: Latencies,
    /// Seconds since 1970.
    pub(super) started: f64,
}

/// Content type and text, in the OpenMetrics form where the scraper asked for it, else in the classic one.
pub(super) fn render(
    snapshot: &Snapshot,
    counted: Counted,
    open_metrics: bool,
) -> Result<(&'static str, String), fmt::Error> {
    let mut registry = registry(snapshot);
    let help = "When this daemon started, since 1970";
    gauge(&mut registry, "start_time", help, Some(Unit::Seconds), counted.started);
    pools(&mut registry, &counted.pools, &snapshot.paused_databases);
    latencies(&mut registry, counted.latencies);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(if open_metrics { (OPEN_METRICS, text) } else { (CLASSIC, classic(&text)) })
}

/// OpenMetrics to the classic form: there a counter's HELP and TYPE carry the `_total` of its sample, and UNIT and
/// EOF are unknown.
fn classic(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 256);
    let mut help = "";
    for line in text.lines() {
        if line.starts_with("# HELP ") {
            help = line;
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let words =
                help.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')).map_or("", |(_, words)| words);
            out += &format!("# HELP {name}{suffix} {words}\n# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            out += line;
            out.push('\n');
        }
    }
    out
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}

fn number(value: u64) -> f64 {
    // Above 2^53 a metric loses its last digits; no reader of a metric minds.
    value as f64
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

fn label(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

fn registry(snapshot: &Snapshot) -> Registry {
    let mut registry = Registry::with_prefix("portcullis");
    let info: Labels = vec![("node", snapshot.node.to_string()), ("version", snapshot.version.clone())];
    family(&mut registry, "build_info", "This node and the version of its daemon", None, [(info, 1.0)]);
    node_state(&mut registry, snapshot);
    proofs(&mut registry, snapshot);
    databases(&mut registry, snapshot);
    counters(&mut registry, snapshot);
    registry
}

fn gauge(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, value: f64) {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, ConstGauge::new(value)),
        None => registry.register(name, help, ConstGauge::new(value)),
    }
}

/// A metric with labels; left out entirely when there is no value.
fn family(
    registry: &mut Registry,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    values: impl IntoIterator<Item = (Labels, f64)>,
) {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return;
    }
    let family = Gauges::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(value);
    }
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, family),
        None => registry.register(name, help, family),
    }
}

/// Durations that were counted elsewhere, in seconds; left out entirely when there are none.
#[derive(Debug)]
struct Histogram {
    name: &'static str,
    help: &'static str,
    bounds: &'static [u64],
    rows: Vec<(Labels, Times)>,
}

impl Collector for Histogram {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let kind = MetricType::Histogram;
        let mut metric = encoder.encode_descriptor(self.name, self.help, Some(&Unit::Seconds), kind)?;
        for (labels, times) in &self.rows {
            let bounds = self.bounds.iter().map(|bound| number(*bound) / 1e6).chain([f64::INFINITY]);
            let counts = times.counts.iter().copied().chain(std::iter::repeat(0));
            let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
            let (sum, count) = (number(times.sum_us) / 1e6, times.count());
            if labels.is_empty() {
                metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            } else {
                metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

fn latencies(registry: &mut Registry, all: Latencies) {
    let table = [
        ("query_duration", "From a request to the end of its answer; a pipeline is one request", all.queries),
        (
            "transaction_duration",
            "From the first request of a transaction to its end, with what the client does in between",
            all.transactions,
        ),
        ("pool_wait_duration", "Waits for a connection to PostgreSQL, of clients that had to wait", all.waits),
    ];
    for (name, help, times) in table {
        let rows = vec![(Vec::new(), times)];
        registry.register_collector(Box::new(Histogram { name, help, bounds: &LATENCIES, rows }));
    }
}

fn node_state(registry: &mut Registry, snapshot: &Snapshot) {
    let gate = &snapshot.gate;
    gauge(registry, "turn_running", "1 while the daemon's turn is running", None, flag(snapshot.turn_running));
    gauge(registry, "gate_open", "1 while the gate of this node is open", None, flag(gate.open));
    let states = [GateState::Open, GateState::Shut, GateState::Lapsed, GateState::Fenced, GateState::Paused];
    let rows = states.map(|state| (label("state", state.as_str()), flag(gate.state == state)));
    family(registry, "gate_state", "1 for the state the gate is in", None, rows);
    let roles = [Role::Active, Role::Passive, Role::Fenced];
    let rows = roles.map(|role| (label("role", role.as_str()), flag(snapshot.role == role)));
    family(registry, "role", "1 for the role this node can prove now", None, rows);
    let left = seconds(gate.lease_remaining_ms);
    gauge(registry, "lease_remaining", "What is left of the lease", Some(Unit::Seconds), left);
    gauge(registry, "sessions", "Client sessions at this gate", None, number(gate.sessions));
    let forwarded = number(gate.forwarded);
    gauge(registry, "forwarded", "Clients of this node that the other one's gate serves", None, forwarded);
    gauge(registry, "epoch", "Epoch this node holds or follows", None, number(snapshot.epoch));
    gauge(registry, "fence_number", "Epochs up to this one are fenced here", None, number(snapshot.journal.fence));
    let procedure = snapshot.procedure.iter().map(|p| (label("kind", &p.kind), 1.0));
    family(registry, "procedure_running", "1 while a procedure is under way", None, procedure);
    let help = "How long procedures took that ended on this node";
    let labels = |kind: &str, result: &str| vec![("kind", kind.to_owned()), ("result", result.to_owned())];
    // Those that never came too: a counter that begins with its first increase shows none.
    let all = PROCEDURE_KINDS.iter().flat_map(|kind| PROCEDURE_RESULTS.map(|result| (*kind, result)));
    let ended = |kind: &str, result: &str| {
        let of_it = snapshot.counters.procedures.iter().filter(|p| p.kind == kind && p.result == result);
        number(of_it.map(|p| p.times.count()).sum())
    };
    let rows = all.map(|(kind, result)| (labels(kind, result), ended(kind, result)));
    counter(registry, "procedures", "Procedures that ended on this node, but for dry runs", None, rows);
    let rows: Vec<_> =
        snapshot.counters.procedures.iter().map(|p| (labels(&p.kind, &p.result), p.times.clone())).collect();
    if !rows.is_empty() {
        let name = "procedure_duration";
        registry.register_collector(Box::new(Histogram { name, help, bounds: &PROCEDURES, rows }));
    }
    let maintenance = flag(snapshot.maintenance);
    gauge(registry, "maintenance", "1 while PostgreSQL here is left alone", None, maintenance);
}

fn proofs(registry: &mut Registry, snapshot: &Snapshot) {
    let rows = snapshot.proofs.iter().map(|proof| (label("kind", &proof.kind), seconds(proof.age_ms)));
    let help = "Age of the newest proof of each kind in hand, from its question on";
    family(registry, "proof_age", help, Some(Unit::Seconds), rows);
    if let Some(witness) = &snapshot.witness {
        let points_here = witness.points_at.as_ref() == Some(&snapshot.node);
        gauge(registry, "witness_points_here", "1 while the record names this node", None, flag(points_here));
        if let Some(age) = witness.age_ms {
            gauge(registry, "witness_age", "Age of the last answer that counts", Some(Unit::Seconds), seconds(age));
        }
        let words = [VerdictWord::Here, VerdictWord::Elsewhere, VerdictWord::Nothing, VerdictWord::Silent];
        let rows = witness.servers.iter().flat_map(|server| {
            words.map(|word| {
                let labels = vec![("server", server.server.clone()), ("verdict", word.as_str().to_owned())];
                (labels, flag(server.verdict == word))
            })
        });
        family(registry, "witness_verdict", "1 for what each server of the record says", None, rows);
        let rows = witness
            .servers
            .iter()
            .filter_map(|server| server.age_ms.map(|age| (label("server", &server.server), seconds(age))));
        family(registry, "witness_server_age", "Age of each server's last answer", Some(Unit::Seconds), rows);
    }
    if let Some(peer) = &snapshot.peer {
        let name = || label("peer", peer.name.as_str());
        family(registry, "peer_reachable", "1 while the peer answers", None, [(name(), flag(peer.reachable))]);
        let age = peer.age_ms.map(|age| (name(), seconds(age)));
        family(registry, "peer_age", "Age of the peer's last word", Some(Unit::Seconds), age);
        let same = peer.same_configuration.map(|same| (name(), flag(same)));
        family(registry, "peer_same_configuration", "1 while both nodes are configured alike", None, same);
    }
    let rows = snapshot.vips.iter().map(|vip| (label("address", &vip.address), flag(vip.bound)));
    family(registry, "vip_bound", "1 while the address is bound on this node", None, rows);
    let rows = snapshot.vips.iter().map(|vip| (label("address", &vip.address), flag(vip.conflict.is_some())));
    family(registry, "vip_conflict", "1 while somebody else claims the address", None, rows);
}

fn databases(registry: &mut Registry, snapshot: &Snapshot) {
    let replication = &snapshot.replication;
    gauge(registry, "postgres_up", "1 while the local PostgreSQL answers", None, flag(snapshot.postgres.up));
    let streaming = flag(snapshot.postgres.streaming);
    gauge(registry, "standby_streaming", "1 while this node streams from the active one", None, streaming);
    let in_sync = flag(replication.in_sync);
    gauge(registry, "replication_in_sync", "1 while a promote of the standby loses nothing", None, in_sync);
    let alone = flag(replication.alone_since.is_some());
    gauge(registry, "replication_alone", "1 while the primary commits without its standby", None, alone);
    let since = replication.alone_since.as_deref().and_then(|since| since.parse::<jiff::Timestamp>().ok());
    if let Some(since) = since {
        let help = "Since when the primary commits without its standby, since 1970";
        let since = since.as_duration().as_secs_f64();
        gauge(registry, "replication_alone_since_timestamp", help, Some(Unit::Seconds), since);
    }
    let safe = flag(snapshot.outlook.safe);
    gauge(registry, "failover_safe", "1 while a failover now is proven to lose nothing", None, safe);
    if let Some(lost) = snapshot.outlook.lost {
        let help = "Transactions that a failover now would lose, about";
        gauge(registry, "failover_lost_transactions", help, None, number(lost));
    }
    let wait = flag(replication.waiting_since.is_some());
    gauge(registry, "replication_commits_wait", "1 while commits wait for a standby that is silent", None, wait);
    let rows = snapshot.nodes.iter().map(|row| (label("node", row.name.as_str()), flag(row.status == "up")));
    family(registry, "node_up", "1 while the node's PostgreSQL is up", None, rows);
    let rows = snapshot.nodes.iter().map(|row| (label("node", row.name.as_str()), flag(row.attached)));
    family(registry, "node_attached", "1 while the node is in service", None, rows);
    let rows = snapshot
        .nodes
        .iter()
        .filter_map(|row| row.replication_delay_bytes.map(|delay| (label("node", row.name.as_str()), number(delay))));
    family(registry, "replication_delay", "How far the standby is behind", Some(Unit::Bytes), rows);
    let rows = snapshot
        .nodes
        .iter()
        .filter_map(|row| row.replication_delay_seconds.map(|delay| (label("node", row.name.as_str()), delay)));
    let help = "Age of the oldest WAL that the standby has not replayed; told by the active node";
    family(registry, "replication_delay", help, Some(Unit::Seconds), rows);
}

fn counters(registry: &mut Registry, snapshot: &Snapshot) {
    let c = &snapshot.counters;
    let table = [
        ("gate_openings", "Times the gate opened", c.gate_openings),
        ("gate_cuts", "Times the gate was cut", c.gate_cuts),
        ("gate_suspensions", "Times clients waited for a PostgreSQL that was away", c.gate_suspensions),
        ("witness_proofs", "Proofs from the witness", c.witness_proofs),
        ("witness_silences", "Questions the witness left unanswered", c.witness_silent),
        ("peer_pledges", "Pledges from the peer", c.peer_pledges),
        ("vip_witness_proofs", "Answers of the VIP's witnesses that prolonged the lease", c.neighbour_proofs),
        ("standby_losses", "Times the synchronous standby was lost", c.standby_losses),
        ("pauses_seen", "Pauses of this machine that the witness's signed time betrayed", c.pauses_seen),
        ("peer_refused_connections", "Peer connections refused", c.peer_refused_connections),
        ("sessions_accepted", "Client sessions since the daemon started", c.sessions_total),
        ("auth_failures", "Clients whose authentication failed", c.auth_failures),
        ("notices_sent", "Notices that notify.command or sendmail took", c.notices_sent),
        ("notices_failed", "Notices that notify.command or sendmail did not take", c.notices_failed),
        ("notices_dropped", "Notices given up because too many waited", c.notices_dropped),
    ];
    for (name, help, value) in table {
        registry.register(name, help, ConstCounter::new(value));
    }
    let rows = CUT_CAUSES.map(|cause| (label("cause", cause), number(c.cuts.get(cause).copied().unwrap_or(0))));
    counter(registry, "gate_cuts_by_cause", "Times the gate was cut, by what for", None, rows);
}

/// One row for each (user, database) that has clients or backends now: no name of a stranger becomes a label.
fn pools(registry: &mut Registry, figures: &[Figures], paused: &[String]) {
    let (figures, untold) = figures.split_at(figures.len().min(MAX_POOLS));
    let help = "Pools beyond the first by name, which have no rows of their own";
    gauge(registry, "pools_untold", help, None, number(u64::try_from(untold.len()).unwrap_or(0)));
    let labels = |pool: &Figures| vec![("user", pool.user.clone()), ("database", pool.database.clone())];
    let with = |pool: &Figures, name, value: &str| {
        let mut all = labels(pool);
        all.push((name, value.to_owned()));
        all
    };
    let rows = figures.iter().map(|pool| (labels(pool), f64::from(pool.clients)));
    family(registry, "pool_clients", "Clients logged in", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), f64::from(pool.waiting)));
    family(registry, "pool_waiting_clients", "Clients that wait for a connection to PostgreSQL", None, rows);
    let rows = figures.iter().flat_map(|pool| {
        let used = pool.open.saturating_sub(pool.idle);
        [(with(pool, "state", "idle"), f64::from(pool.idle)), (with(pool, "state", "used"), f64::from(used))]
    });
    family(registry, "pool_backends", "Connections to PostgreSQL, open or being opened", None, rows);
    // One that is paused may have no pool any more.
    let known = figures.iter().map(|pool| (label("database", &pool.database), flag(pool.paused)));
    let rows = known.chain(paused.iter().map(|name| (label("database", name), 1.0)));
    family(registry, "pool_database_paused", "1 while the database is paused by name", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), number(pool.logins)));
    counter(registry, "pool_logins", "Clients let in", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), number(pool.transactions)));
    counter(registry, "pool_transactions", "Loans of a connection to a transaction (transaction mode)", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), number(pool.ended)));
    counter(registry, "pool_finished_transactions", "Transactions that came to their end", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), number(pool.queries)));
    counter(registry, "pool_queries", "Requests answered to their end; a pipeline is one", None, rows);
    let rows = figures.iter().map(|pool| (labels(pool), number(pool.waits)));
    counter(registry, "pool_waits", "Clients that had to wait for a connection", None, rows);
    let rows = figures.iter().flat_map(|pool| {
        let (received, sent) = (number(pool.bytes_in), number(pool.bytes_out));
        [(with(pool, "direction", "received"), received), (with(pool, "direction", "sent"), sent)]
    });
    counter(registry, "pool_client", "Bytes from and to clients", Some(Unit::Bytes), rows);
    let rows = figures.iter().map(|pool| (labels(pool), pool.waited.as_secs_f64()));
    counter(registry, "pool_wait", "Time that clients waited for a connection", Some(Unit::Seconds), rows);
}

/// A counter with labels; left out entirely when there is no value.
fn counter(
    registry: &mut Registry,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    values: impl IntoIterator<Item = (Labels, f64)>,
) {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return;
    }
    let family = Counters::default();
    for (labels, value) in values {
        family.get_or_create(&labels).inc_by(value);
    }
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, family),
        None => registry.register(name, help, family),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_beyond_the_bound_have_no_rows_and_are_counted() {
        let figures: Vec<Figures> = (0..MAX_POOLS + 100)
            .map(|n| Figures { user: format!("u{n:04}"), database: "app".to_owned(), ..Figures::default() })
            .collect();
        let mut registry = Registry::with_prefix("portcullis");
        pools(&mut registry, &figures, &[]);
        let mut text = String::new();
        encode(&mut text, &registry).expect("encoded");
        let rows = text.lines().filter(|line| line.starts_with("portcullis_pool_clients{")).count();
        assert_eq!(rows, MAX_POOLS);
        assert!(text.contains("\nportcullis_pools_untold 100.0\n"), "{text}");
    }
}
