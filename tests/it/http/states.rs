//! Snapshots by hand, one for each state, and a server over them.

use axum::Router;
use portcullis::base::tally::LATENCIES;
use portcullis::engine::outlook::{Lag, Outlook};
use portcullis::engine::status::*;
use portcullis::serve::command::Figures;
use portcullis::serve::http::{History, Live, Views, log, router, serve_listener};
use portcullis::serve::tally::Latencies;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub fn row(node_id: u32, name: &str, role: &str) -> NodeRow {
    let standby = role == "standby";
    NodeRow {
        node_id,
        name: name.parse().unwrap(),
        hostname: format!("192.0.2.1{}", node_id + 1),
        port: 5432,
        status: "up".into(),
        role: role.into(),
        weight: 0.5,
        attached: true,
        replication_delay_bytes: standby.then_some(0),
        replication_state: standby.then(|| "streaming".into()),
        sync_state: standby.then(|| "sync".into()),
        select_count: 0,
        last_status_change: Some("2026-11-20T15:11:00Z".into()),
        replication_delay_seconds: None,
    }
}

/// alp is active, its gate open, in sync with midna.
pub fn active() -> Snapshot {
    let server =
        ServerStatus { server: "192.0.2.53:53".into(), verdict: VerdictWord::Here, age_ms: Some(312), error: None };
    let vip = VipStatus {
        address: "192.0.2.100/24".into(),
        bound: true,
        conflict: None,
        mac: Some("52:54:00:12:34:0a".into()),
    };
    Snapshot {
        node: "alp".parse().unwrap(),
        version: "0.1.0".into(),
        role: Role::Active,
        gate: GateStatus {
            open: true,
            state: GateState::Open,
            reason: None,
            lease_remaining_ms: 4210,
            sessions: 12,
            forwarded: 0,
            waiting: 0,
        },
        epoch: 7,
        witness: Some(WitnessStatus {
            mode: "update".into(),
            points_at: Some("alp".parse().unwrap()),
            epoch: Some(7),
            age_ms: Some(312),
            servers: vec![server],
        }),
        vip: Some(vip.clone()),
        vips: vec![vip],
        peer: Some(PeerStatus {
            name: "midna".parse().unwrap(),
            reachable: true,
            role: Some(Role::Passive),
            epoch: Some(7),
            age_ms: Some(120),
            version: Some("0.1.0".into()),
            same_configuration: Some(true),
            nodes: Vec::new(),
        }),
        replication: ReplicationStatus {
            mode: "synchronous".into(),
            in_sync: true,
            alone_since: None,
            waiting_since: None,
            timeline: Some(3),
            lsn: Some("0/3000148".into()),
            blocks: false,
        },
        procedure: None,
        nodes: vec![row(0, "alp", "primary"), row(1, "midna", "standby")],
        events: vec![
            EventRow { at: "2026-11-20T15:10:58Z".into(), kind: "started".into(), text: "alp started".into() },
            EventRow {
                at: "2026-11-20T15:11:00Z".into(),
                kind: "gate_opened".into(),
                text: "alp opened epoch 7 on <192.0.2.53>".into(),
            },
        ],
        postgres: PostgresStatus {
            up: true,
            role: Some("primary".into()),
            error: None,
            streaming: false,
            hangs_since: None,
        },
        journal: JournalStatus { refused: 6, won: 7, complete: 7, fence: 6 },
        advice: None,
        maintenance: false,
        paused_databases: vec![],
        vip_witness: None,
        counters: Counters { gate_openings: 2, gate_cuts: 1, witness_proofs: 4711, ..Counters::default() },
        turn_running: true,
        proofs: Vec::new(),
        at: "2026-11-20T15:42:07Z".into(),
        outlook: Outlook {
            safe: true,
            lost: Some(0),
            lost_bytes: Some(0),
            text: "if alp died now, nothing would be lost: midna has all that was acknowledged".into(),
        },
        next: None,
        lag: Some(Lag { node: "midna".parse().unwrap(), bytes: 0, ms: Some(0), away: false }),
        lease_ms: 5000,
        next_xid: Some(81_234),
    }
}

/// The other end of the same picture: midna, passive and streaming.
pub fn passive() -> Snapshot {
    let mut s = active();
    s.node = "midna".parse().unwrap();
    s.role = Role::Passive;
    s.gate = GateStatus {
        open: false,
        state: GateState::Shut,
        reason: Some("alp is active".into()),
        lease_remaining_ms: 0,
        sessions: 0,
        forwarded: 0,
        waiting: 0,
    };
    s.witness.as_mut().unwrap().servers[0].verdict = VerdictWord::Elsewhere;
    s.vip.as_mut().unwrap().bound = false;
    s.vips[0].bound = false;
    s.lag.as_mut().unwrap().node = "midna".parse().unwrap();
    s.peer = Some(PeerStatus {
        name: "alp".parse().unwrap(),
        reachable: true,
        role: Some(Role::Active),
        epoch: Some(7),
        age_ms: Some(90),
        version: Some("0.1.0".into()),
        same_configuration: Some(true),
        nodes: Vec::new(),
    });
    s.postgres =
        PostgresStatus { up: true, role: Some("standby".into()), error: None, streaming: true, hangs_since: None };
    s
}

/// alp's proof ran out: no witness, no peer.
pub fn lapsed() -> Snapshot {
    let mut s = active();
    s.role = Role::Passive;
    s.gate = GateStatus {
        open: false,
        state: GateState::Lapsed,
        reason: Some("neither the witness nor midna has confirmed epoch 7 for 5 s".into()),
        lease_remaining_ms: 0,
        sessions: 0,
        forwarded: 0,
        waiting: 0,
    };
    let witness = s.witness.as_mut().unwrap();
    witness.age_ms = Some(6100);
    witness.servers[0].verdict = VerdictWord::Silent;
    witness.servers[0].error = Some("no answer within 1 s".into());
    s.vip.as_mut().unwrap().bound = false;
    s.vips[0].bound = false;
    let peer = s.peer.as_mut().unwrap();
    peer.reachable = false;
    peer.age_ms = Some(7000);
    s.replication.in_sync = false;
    s.nodes[1].status = "down".into();
    s.nodes[1].replication_state = None;
    s.nodes[1].sync_state = None;
    s.nodes[1].replication_delay_bytes = None;
    s.advice = Some("nothing: the gate opens by itself when the witness or midna answers".into());
    s
}

/// alp was overtaken: midna holds epoch 8, alp's PostgreSQL was demoted and follows nobody.
pub fn fenced() -> Snapshot {
    let mut s = active();
    s.role = Role::Fenced;
    s.epoch = 8;
    s.gate = GateStatus {
        open: false,
        state: GateState::Fenced,
        reason: Some("midna won epoch 8".into()),
        lease_remaining_ms: 0,
        sessions: 0,
        forwarded: 0,
        waiting: 0,
    };
    let witness = s.witness.as_mut().unwrap();
    witness.points_at = Some("midna".parse().unwrap());
    witness.epoch = Some(8);
    witness.servers[0].verdict = VerdictWord::Elsewhere;
    s.vip.as_mut().unwrap().bound = false;
    s.vips[0].bound = false;
    s.vips[0].mac = Some("52:54:00:12:34:0b".into());
    s.vip = s.vips.first().cloned();
    let peer = s.peer.as_mut().unwrap();
    peer.role = Some(Role::Active);
    peer.epoch = Some(8);
    s.replication.in_sync = false;
    s.nodes = vec![row(0, "alp", "standby"), row(1, "midna", "primary")];
    s.nodes[0].replication_state = None;
    s.nodes[0].sync_state = None;
    s.nodes[0].attached = false;
    s.postgres =
        PostgresStatus { up: true, role: Some("standby".into()), error: None, streaming: false, hangs_since: None };
    s.journal.fence = 8;
    s.advice = Some("portcullis rejoin alp".into());
    s
}

/// alp is active, clients are held.
pub fn paused() -> Snapshot {
    let mut s = active();
    s.gate.open = false;
    s.gate.state = GateState::Paused;
    s.gate.reason = Some("paused by the operator".into());
    s
}

/// The two closures, as switches.
#[derive(Clone)]
pub struct Switches {
    pub beat: Arc<AtomicBool>,
    pub gate: Arc<AtomicBool>,
}

/// One pool whose names need to be escaped.
fn pools() -> Vec<Figures> {
    vec![Figures {
        user: "ann\"\\".to_owned(),
        database: "app".to_owned(),
        paused: true,
        clients: 12,
        waiting: 1,
        open: 5,
        idle: 3,
        logins: 40,
        transactions: 4000,
        bytes_in: 10,
        bytes_out: 20,
        waited: Duration::from_millis(1500),
        waits: 3,
        queries: 9000,
        ended: 4100,
    }]
}

/// One request of a fifth of a millisecond, and one transaction that was longer than any bound.
fn latencies() -> Latencies {
    let mut all = Latencies::default();
    all.queries.add(&LATENCIES, Duration::from_micros(200));
    all.transactions.add(&LATENCIES, Duration::from_secs(90));
    all
}

pub fn views(snapshot: Snapshot) -> (Views, Switches, watch::Sender<Arc<Snapshot>>) {
    views_with(snapshot, History::default())
}

pub fn views_with(snapshot: Snapshot, history: History) -> (Views, Switches, watch::Sender<Arc<Snapshot>>) {
    let switches =
        Switches { beat: Arc::new(AtomicBool::new(true)), gate: Arc::new(AtomicBool::new(snapshot.gate.open)) };
    let (publish, receiver) = watch::channel(Arc::new(snapshot));
    let (beat, gate) = (switches.beat.clone(), switches.gate.clone());
    let views = Views {
        snapshot: receiver,
        beat: Arc::new(move || beat.load(Ordering::SeqCst)),
        gate_passes: Arc::new(move || gate.load(Ordering::SeqCst)),
        pools: Arc::new(pools),
        latencies: Arc::new(latencies),
        started: 1_763_651_460.25,
        events: log::EventLog::new("/nonexistent/events.log".into()),
        live: Live::new(history),
    };
    (views, switches, publish)
}

/// A server on a free loopback port; it ends with the test's runtime.
pub async fn listen(router: Router) -> SocketAddr {
    let listener = free_port().await;
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let () = serve_listener(listener, router).await;
    });
    at
}

/// Below the ephemeral range, as the house asks; the first that nobody has.
pub async fn free_port() -> TcpListener {
    let start = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap();
    for port in start..32_000 {
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await {
            return listener;
        }
    }
    panic!("no free port from {start}");
}

pub async fn serve(snapshot: Snapshot) -> (SocketAddr, Switches, watch::Sender<Arc<Snapshot>>) {
    let (views, switches, publish) = views(snapshot);
    (listen(router(views)).await, switches, publish)
}
