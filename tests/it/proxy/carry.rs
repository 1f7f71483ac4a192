//! Sessions held for a switchover, taken apart at the old gate and going on at the other: two gates in one process,
//! both before the shared cluster, and the peer channel between them.

use crate::front::{Front, Setup, eventually, free_port, open_with};
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode, Secret};
use portcullis::base::ids::{Epoch, NodeName};
use portcullis::io::clock;
use portcullis::serve::forward::Forwarder;
use portcullis::serve::peer::{PeerClient, PeerCounters, PeerIdentity, listen_with};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

const EPOCH: Epoch = Epoch(8);

/// alp hands over to midna.
struct Pair {
    alp: Front,
    midna: Front,
    forwarder: Arc<Forwarder>,
    task: JoinHandle<()>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn identity(me: &str, other: &str) -> Arc<PeerIdentity> {
    let name = |text: &str| -> NodeName { text.parse().unwrap() };
    Arc::new(PeerIdentity::new(&Secret::new(vec![7; 32]), &name(me), &[name(other)]).unwrap())
}

impl Pair {
    async fn start(mode: PoolMode) -> Pair {
        let pool = || Pool { mode, size: 3, threads: 2, ..Pool::default() };
        let midna = open_with(Setup { pool: pool(), ..Setup::default() }).await;
        midna.gate.at_epoch(EPOCH);
        let channel = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let handler = |_, question: u64| async move { question };
        let tunnels = midna.commands.tunnels("alp".parse().unwrap());
        let counters = Arc::new(PeerCounters::default());
        let task = tokio::spawn(listen_with(channel, identity("midna", "alp"), counters, tunnels, handler));
        let peer = PeerClient::new(identity("alp", "midna"), "midna".parse().unwrap(), channel);
        let forwarder = Forwarder::new(Arc::new(peer), false, 16);
        let alp = open_with(Setup { pool: pool(), forward: Some(Arc::clone(&forwarder)), ..Setup::default() }).await;
        Pair { alp, midna, forwarder, task }
    }

    /// Everybody has come to rest, and nothing passes any more.
    async fn hold(&self) {
        self.alp.gate.pause_to_carry();
        eventually("they come to rest", async || self.alp.gate.unsettled() == 0).await;
        self.alp.gate.suspend(clock::now() + Duration::from_secs(600), "portcullis: switchover to midna");
    }

    fn carry_over(&self) {
        self.forwarder.serves(Some(EPOCH));
        self.alp.gate.carry_over(EPOCH, "portcullis: the active node is midna");
    }

    /// It was given up.
    fn put_back(&self) {
        self.alp.gate.resume();
        self.alp.extend(Duration::from_secs(3600));
    }
}

/// Two prepared statements, two settings and a name, as a client makes them.
async fn furnish(raw: &mut Raw) {
    assert_eq!(raw.ask(&query("set my.tenant = 'it''s'")).await.replace('S', ""), "Ci");
    assert_eq!(raw.ask(&query("set search_path = pg_catalog, \"a b\"")).await.replace('S', ""), "Ci");
    let named = [parse("one", "select current_setting('my.tenant') || 1"), SYNC.to_vec()].concat();
    assert_eq!(raw.ask(&named).await, "1i");
    assert_eq!(raw.ask(&query("set application_name = 'held'")).await.replace('S', ""), "Ci");
}

async fn is_furnished(raw: &mut Raw) {
    for (sql, wanted) in [
        ("show search_path", "pg_catalog, \"a b\""),
        ("select current_setting('my.tenant')", "it's"),
        ("show application_name", "held"),
    ] {
        assert_eq!(value(raw, sql).await, wanted, "{sql}");
    }
    assert_eq!(raw.ask(&run("one")).await, "2DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_on_at_the_other_gate_and_its_client_hears_nothing_but_its_answer() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let pair = Pair::start(mode).await;
        let mut raw = Raw::trusty(&pair.alp).await;
        furnish(&mut raw).await;
        let mut idle = Raw::trusty(&pair.alp).await;
        pair.hold().await;
        // Asked while it is held: answered once, over there.
        raw.send(&run("one")).await;
        assert!(raw.is_silent_for(Duration::from_millis(200)).await, "{mode:?}: nothing passes");
        pair.carry_over();
        assert_eq!(raw.until_ready().await, "2DCi", "{mode:?}");
        is_furnished(&mut raw).await;
        assert_eq!(value(&mut idle, "select 6 * 7").await, "42");
        assert_eq!((pair.alp.gate.sessions(), pair.midna.gate.sessions()), (0, 2), "{mode:?}");
        assert_eq!(pair.alp.commands.forwarded(), 2);
        // Its key is its own there.
        raw.send(&query("select pg_sleep(600)")).await;
        eventually("it is busy", async || pair.midna.gate.busy() == 1).await;
        let asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and application_name = 'held'";
        eventually("it sleeps", async || pair.midna.pg.admin(asleep).unwrap() == "1").await;
        raw.cancel(&pair.midna).await;
        assert_eq!(raw.error().await.0, "57014");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_taken_along_is_named_and_the_others_go_on() {
    let pair = Pair::start(PoolMode::Session).await;
    let mut plain = Raw::trusty(&pair.alp).await;
    for (make, kept) in [
        ("create temp table mine(n int)", "a temporary table"),
        ("listen news", "LISTEN"),
        ("select pg_advisory_lock(4711)", "an advisory lock"),
        ("begin; declare c cursor with hold for select 1; commit", "a cursor WITH HOLD"),
        ("prepare p as select 1", "a statement of PREPARE"),
        ("select set_config('my.' || 'hidden', 'x', false)", "set_config()"),
    ] {
        let mut raw = Raw::trusty(&pair.alp).await;
        raw.ask(&query(make)).await;
        pair.hold().await;
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*before), ("57P01", ""), "{make}");
        assert!(text.contains(kept) && text.contains("switchover to midna"), "{make}: {text}");
        assert!(raw.is_closed().await);
        pair.put_back();
        // What is only of a transaction is none of it.
        for sql in ["begin", "set local my.x = '1'", "commit"] {
            plain.ask(&query(sql)).await;
        }
        assert_eq!(value(&mut plain, "select 1").await, "1", "{make}");
    }
    pair.hold().await;
    pair.carry_over();
    assert_eq!(value(&mut plain, "select 2").await, "2");
    assert_eq!(pair.midna.gate.sessions(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switchover_that_is_given_up_costs_a_backend_and_no_session() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let pair = Pair::start(mode).await;
        let mut raw = Raw::trusty(&pair.alp).await;
        furnish(&mut raw).await;
        let before = value(&mut raw, "select pg_backend_pid()").await;
        // Before anything was stopped nothing is even touched.
        pair.alp.gate.pause_to_carry();
        eventually("it comes to rest", async || pair.alp.gate.unsettled() == 0).await;
        pair.alp.gate.resume();
        assert_eq!(value(&mut raw, "select pg_backend_pid()").await, before, "{mode:?}");
        for _ in 0..2 {
            pair.hold().await;
            raw.send(&run("one")).await;
            assert!(raw.is_silent_for(Duration::from_millis(100)).await);
            pair.put_back();
            assert_eq!(raw.until_ready().await, "2DCi", "{mode:?}");
            is_furnished(&mut raw).await;
        }
        assert_ne!(value(&mut raw, "select pg_backend_pid()").await, before, "PostgreSQL may be another");
        assert_eq!(pair.midna.gate.sessions(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_the_other_gate_does_not_take_is_told_where_the_service_is() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let pair = Pair::start(mode).await;
        let mut raw = Raw::trusty(&pair.alp).await;
        raw.ask(&query("select 1")).await;
        pair.hold().await;
        pair.midna.gate.cut("shut again");
        pair.carry_over();
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*before), ("57P01", ""));
        assert!(text.contains("the active node is midna") && text.contains("is not open"), "{text}");
        // A fence at that point is a cut like any other.
        let pair = Pair::start(mode).await;
        let mut raw = Raw::trusty(&pair.alp).await;
        pair.hold().await;
        pair.alp.gate.cut("portcullis: fenced");
        pair.forwarder.serves(Some(EPOCH));
        pair.alp.gate.carry_over(EPOCH, "too late");
        assert_eq!(raw.error().await.1, "portcullis: fenced");
    }
}

/// Drivers parse, look at the description, and bind what they parsed: the hold does not come between.
#[tokio::test(flavor = "multi_thread")]
async fn an_unnamed_statement_that_was_parsed_is_bound_before_the_session_rests() {
    let pair = Pair::start(PoolMode::Session).await;
    let mut raw = Raw::trusty(&pair.alp).await;
    assert_eq!(raw.ask(&[parse("", "select 7"), describe(""), SYNC.to_vec()].concat()).await, "1tTi");
    pair.alp.gate.pause_to_carry();
    assert_eq!(raw.ask(&run("")).await, "2DCi", "it is let through");
    eventually("it rests", async || pair.alp.gate.unsettled() == 0).await;
    raw.send(&query("select 8")).await;
    assert!(raw.is_silent_for(Duration::from_millis(200)).await, "and is held then");
    // Those who share backends keep theirs at the gate.
    let sharing = Pair::start(PoolMode::Transaction).await;
    let mut raw = Raw::trusty(&sharing.alp).await;
    assert_eq!(raw.ask(&[parse("", "select 7"), describe(""), SYNC.to_vec()].concat()).await, "1tTi");
    sharing.hold().await;
    sharing.carry_over();
    assert_eq!(raw.ask(&run("")).await, "2DCi");
    assert_eq!(sharing.midna.gate.sessions(), 1);
}

/// A session in a transaction is not at rest, and what is left of it ends with PostgreSQL; it is never carried.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_in_a_transaction_is_never_carried_over() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let pair = Pair::start(mode).await;
        let mut raw = Raw::trusty(&pair.alp).await;
        assert_eq!(raw.ask(&query("begin")).await, "Ct");
        pair.alp.gate.pause_to_carry();
        assert_eq!(raw.ask(&query("select 1")).await, "TDCt", "it may end it");
        assert_eq!((pair.alp.gate.unsettled(), pair.alp.gate.busy()), (1, 1), "{mode:?}");
        pair.alp.gate.suspend(clock::now() + Duration::from_secs(600), "portcullis: switchover to midna");
        pair.carry_over();
        assert_eq!(raw.error().await.0, "57P01", "{mode:?}");
        assert_eq!(pair.midna.gate.sessions(), 0);
    }
}
