//! Transaction mode: clients share backends, and none of them sees what another left there.

use crate::front::{Front, Setup, eventually, open_with};
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use std::time::Duration;

async fn shared(size: u32) -> Front {
    open_with(setup(size)).await
}

fn setup(size: u32) -> Setup {
    let pool = Pool { mode: PoolMode::Transaction, size, threads: 1, ..Pool::default() };
    Setup { pool, ..Setup::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_share_a_backend_and_transactions_keep_theirs() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let pid = value(&mut a, "select pg_backend_pid()").await;
    assert_eq!(value(&mut b, "select pg_backend_pid()").await, pid);
    assert_eq!(a.ask(&query("begin")).await, "Ct");
    b.send(&query("select 1")).await;
    assert!(b.is_silent_for(Duration::from_millis(200)).await, "the only backend is in a transaction");
    assert_eq!(value(&mut a, "select pg_backend_pid()").await, pid);
    assert_eq!(a.ask(&query("commit")).await, "Ci");
    assert_eq!(b.until_ready().await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_is_told_what_limits_and_others_are_served_in_order() {
    let front = open_with(Setup { query_wait: Duration::from_millis(700), ..setup(1) }).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.send(&query("select pg_sleep(6)")).await;
    eventually("it sleeps", async || front.gate.busy() == 1).await;
    b.send(&query("select 1")).await;
    let (code, text, _) = b.error().await;
    assert_eq!(code, "53300");
    assert!(text.contains("no backend became free within 700ms"), "{text}");
    assert!(b.is_closed().await);
    assert_eq!(a.until_ready().await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_follow_their_client_and_nobody_else() {
    let front = shared(1).await;
    let mut a = Raw::connect(&front).await;
    a.log_in(&[("user", "trusty"), ("database", "app"), ("application_name", "it's a")]).await;
    let mut b = Raw::trusty(&front).await;
    assert_eq!(value(&mut a, "show application_name").await, "it's a");
    assert_eq!(value(&mut b, "show application_name").await, "");
    for set in ["set search_path = pg_catalog, public", "set statement_timeout = '7s'", "set my.tenant = 'x\\y'"] {
        assert!(a.ask(&query(set)).await.ends_with("Ci"), "{set}");
    }
    assert!(a.ask(&query("set timezone = 'Asia/Tokyo'")).await.contains('S'), "the client hears of it");
    assert_eq!(value(&mut b, "show search_path").await, "\"$user\", public");
    assert_eq!(value(&mut b, "show statement_timeout").await, "0");
    assert_eq!(value(&mut b, "select coalesce(current_setting('my.tenant', true), '')").await, "");
    assert_ne!(value(&mut b, "show timezone").await, "Asia/Tokyo");
    assert_eq!(value(&mut a, "show search_path").await, "pg_catalog, public");
    assert_eq!(value(&mut a, "show statement_timeout").await, "7s");
    assert_eq!(value(&mut a, "show my.tenant").await, "x\\y");
    assert_eq!(value(&mut a, "show timezone").await, "Asia/Tokyo");
    // Rolled back, it was never set; local, it ends with the transaction.
    a.ask(&query("begin; set statement_timeout = '9s'; rollback")).await;
    a.ask(&query("begin; set local search_path = app; commit")).await;
    value(&mut b, "select 1").await;
    assert_eq!(value(&mut a, "show statement_timeout").await, "7s");
    assert_eq!(value(&mut a, "show search_path").await, "pg_catalog, public");
    a.ask(&query("set role app")).await;
    assert_eq!(value(&mut b, "select current_user").await, "trusty");
    assert_eq!(value(&mut a, "select current_user").await, "app");
    a.ask(&query("reset all")).await;
    a.ask(&query("reset role")).await;
    value(&mut b, "select 1").await;
    assert_eq!(value(&mut a, "show search_path").await, "\"$user\", public");
    assert_eq!(value(&mut a, "show application_name").await, "it's a", "what it began with");
    a.ask(&query("set application_name = ''")).await;
    value(&mut b, "select 1").await;
    assert_eq!(value(&mut a, "show application_name").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn named_statements_follow_their_client_to_any_backend() {
    let front = shared(2).await;
    let (mut a, mut b, mut c) = (Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await);
    // Both say "s", and mean different things.
    assert_eq!(a.ask(&[parse("s", "select 'a'"), SYNC.to_vec()].concat()).await, "1i");
    assert_eq!(b.ask(&[parse("s", "select 'b', 2"), describe("s"), SYNC.to_vec()].concat()).await, "1tTi");
    // c takes one backend, then the other: each of the two meets one that does not know its statement.
    for _ in 0..2 {
        assert_eq!(c.ask(&query("begin")).await, "Ct");
        assert_eq!(a.ask(&run("s")).await, "2DCi");
        assert_eq!(b.ask(&run("s")).await, "2DCi");
        assert_eq!(a.ask(&[describe("s"), run("s")].concat()).await, "tT2DCi");
        b.ask(&query("begin")).await;
        assert_eq!(c.ask(&query("commit")).await, "Ci");
        assert_eq!(a.ask(&run("s")).await, "2DCi");
        assert_eq!(b.ask(&[run("s")].concat()).await, "2DCt");
        b.ask(&query("commit")).await;
    }
    // Closed is gone; the same name may then mean another statement.
    assert_eq!(a.ask(&[close("s"), SYNC.to_vec()].concat()).await, "3i");
    assert_eq!(a.ask(&run("s")).await, "Ei");
    assert_eq!(a.ask(&[parse("s", "select 1, 2, 3"), run("s")].concat()).await, "12DCi");
    // A name in use is refused as PostgreSQL does, and serves on.
    let (code, _, _) = {
        a.send(&[parse("s", "select 9"), SYNC.to_vec()].concat()).await;
        a.error().await
    };
    assert_eq!(code, "42P05");
    assert_eq!(a.until_ready().await, "i");
    assert_eq!(a.ask(&run("s")).await, "2DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_survive_errors_amid_a_pipeline() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    // The second Parse is skipped by the server, and so is the Bind.
    let bad = [parse("one", "select 1"), parse("bad", "selec"), parse("two", "select 2"), run("two")].concat();
    assert_eq!(a.ask(&bad).await, "1Ei");
    assert_eq!(a.ask(&run("one")).await, "2DCi");
    assert_eq!(a.ask(&run("two")).await, "Ei", "never parsed");
    assert_eq!(a.ask(&[parse("two", "select 2"), run("two")].concat()).await, "12DCi");
    // Without a Sync: the error is heard, what follows is skipped, and then all is well.
    a.send(&[parse("x", "select 1/0"), bind("x"), EXECUTE.to_vec()].concat()).await;
    assert_eq!(a.error().await.0, "22012");
    a.send(&[parse("y", "select 3"), bind("y")].concat()).await;
    assert_eq!(a.ask(&SYNC).await, "i");
    assert_eq!(a.ask(&[parse("y", "select 3"), run("y")].concat()).await, "12DCi");
    assert_eq!(b.ask(&[parse("y", "select 3"), run("y")].concat()).await, "12DCi");
    assert_eq!(b.ask(&query("discard all")).await, "Ci");
    assert_eq!(a.ask(&run("y")).await, "2DCi", "another's DISCARD takes nothing from it");
    assert_eq!(b.ask(&run("y")).await, "Ei");
    // DEALLOCATE by the client's name.
    assert_eq!(a.ask(&query("deallocate Y")).await, "Ci");
    assert_eq!(a.ask(&run("y")).await, "Ei");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unnamed_statement_is_the_clients_own() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    // Parsed and described in one transaction, used in the next, as asyncpg does.
    assert_eq!(a.ask(&[parse("", "select 'a'"), describe(""), SYNC.to_vec()].concat()).await, "1tTi");
    assert_eq!(b.ask(&[parse("", "select 'b', 2"), SYNC.to_vec()].concat()).await, "1i");
    assert_eq!(a.ask(&[describe(""), SYNC.to_vec()].concat()).await, "tTi");
    a.send(&run("")).await;
    assert_eq!(a.receive().await.expect("2").0, b'2');
    let (kind, row) = a.receive().await.expect("D");
    assert_eq!((kind, &row[..]), (b'D', &b"\0\x01\0\0\0\x01a"[..]));
    assert_eq!(a.until_ready().await, "Ci");
    assert_eq!(b.ask(&run("")).await, "2DCi");
    // A long one too.
    let long = format!("select length('{}')", "x".repeat(40_000));
    assert_eq!(a.ask(&[parse("", &long), SYNC.to_vec()].concat()).await, "1i");
    assert_eq!(a.ask(&[parse("long", &long), SYNC.to_vec()].concat()).await, "1i");
    assert_eq!(b.ask(&[parse("", "select 'b', 2"), run("")].concat()).await, "12DCi");
    assert_eq!(a.ask(&run("")).await, "2DCi");
    assert_eq!(a.ask(&run("long")).await, "2DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_keeps_no_more_statements_than_it_may() {
    let mut setup = setup(1);
    setup.pool.max_prepared = 3;
    let front = open_with(setup).await;
    let mut a = Raw::trusty(&front).await;
    for n in 0..10 {
        assert_eq!(a.ask(&[parse(&format!("s{n}"), &format!("select {n}")), SYNC.to_vec()].concat()).await, "1i");
    }
    for n in [0, 5, 9, 1, 0] {
        a.send(&run(&format!("s{n}"))).await;
        assert_eq!(a.receive().await.expect("2").0, b'2');
        assert_eq!(a.receive().await.expect("D").1[6..], *n.to_string().as_bytes());
        assert_eq!(a.until_ready().await, "Ci");
    }
    let count = value(&mut a, "select count(*) from pg_prepared_statements where name <> ''").await;
    assert_eq!(count, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_hits_the_backend_of_now_or_the_wait() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let pid = value(&mut a, "select pg_backend_pid()").await.parse().unwrap();
    a.send(&query("select pg_sleep(20)")).await;
    front.wait_until_asleep(pid).await;
    b.send(&query("select 1")).await;
    assert!(b.is_silent_for(Duration::from_millis(100)).await);
    b.cancel(&front).await;
    assert_eq!(b.error().await.0, "57014", "it waited in vain, and says so");
    assert_eq!(b.until_ready().await, "i");
    b.send(&[extended("select 2"), extended("select 3")].concat()).await;
    assert!(b.is_silent_for(Duration::from_millis(100)).await);
    b.cancel(&front).await;
    assert_eq!(b.error().await.0, "57014");
    assert!(b.is_silent_for(Duration::from_millis(100)).await, "skipped up to the Sync");
    assert_eq!(b.ask(&[extended("select 4"), SYNC.to_vec()].concat()).await, "i");
    a.cancel(&front).await;
    assert_eq!(a.error().await.0, "57014");
    assert_eq!(a.until_ready().await, "i");
    assert_eq!(b.ask(&query("select 5")).await, "TDCi");
    // Too late: it hits nobody, whoever has the backend now.
    let mut c = Raw::trusty(&front).await;
    c.send(&query("select pg_sleep(3)")).await;
    eventually("it sleeps", async || front.gate.busy() == 1).await;
    a.cancel(&front).await;
    assert_eq!(c.until_ready().await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_and_pipelines_run_in_transaction_mode() {
    let front = shared(2).await;
    let mut a = Raw::trusty(&front).await;
    a.ask(&query("create table if not exists copied(n int)")).await;
    let data = [message(b'd', b"7\n"), message(b'c', b"")].concat();
    assert_eq!(a.ask(&[query("copy copied from stdin"), data.clone()].concat()).await, "GCi");
    let sync = SYNC.to_vec();
    assert_eq!(a.ask(&[extended("copy copied from stdin"), sync.clone(), data, sync].concat()).await, "12GCi");
    assert_eq!(a.ask(&query("copy copied to stdout")).await, "HddcCi");
    // A pipeline of many transactions, sent before any answer is read.
    let many: Vec<u8> = (0..500).flat_map(|_| [extended("select 1"), SYNC.to_vec()].concat()).collect();
    a.send(&many).await;
    for _ in 0..500 {
        assert_eq!(a.until_ready().await, "12DCi");
    }
    assert_eq!(value(&mut a, "select count(*) from copied").await, "2");
    a.ask(&query("drop table copied")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_amid_a_transaction_leaves_nothing_behind() {
    let front = shared(1).await;
    let mut a = Raw::trusty(&front).await;
    a.ask(&query("create table left_open(n int)")).await;
    a.ask(&query("begin; insert into left_open values (1)")).await;
    drop(a);
    let mut b = Raw::trusty(&front).await;
    assert_eq!(value(&mut b, "select count(*) from left_open").await, "0");
    b.ask(&query("drop table left_open")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_ends_waiting_and_idle_clients_and_their_backends() {
    let front = shared(1).await;
    let (mut a, mut b, mut c) = (Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("begin")).await;
    let pid = value(&mut a, "select pg_backend_pid()").await;
    b.send(&query("select 1")).await;
    assert!(b.is_silent_for(Duration::from_millis(100)).await);
    front.gate.cut("moved");
    for client in [&mut a, &mut b, &mut c] {
        let (code, text, _) = client.error().await;
        assert_eq!((&*code, &*text), ("57P01", "moved"));
    }
    let left = format!("select count(*) from pg_stat_activity where pid = {pid}");
    eventually("the backend is gone", async || front.pg.admin(&left).unwrap() == "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_closes_idle_backends() {
    let front = shared(1).await;
    let mut a = Raw::trusty(&front).await;
    let pid = value(&mut a, "select pg_backend_pid()").await;
    let left = format!("select count(*) from pg_stat_activity where pid = {pid}");
    assert_eq!(front.pg.admin(&left).unwrap(), "1");
    front.gate.cut("moved");
    eventually("the idle backend is closed", async || front.pg.admin(&left).unwrap() == "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_idle_backends_alone_can_be_dropped() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let mut setup = setup(4);
        setup.pool.mode = mode;
        let front = open_with(setup).await;
        let mut a = Raw::trusty(&front).await;
        assert_eq!(a.ask(&query("create database short_lived")).await, "Ci");
        let mut b = Raw::connect(&front).await;
        b.log_in(&[("user", "trusty"), ("database", "short_lived")]).await;
        b.ask(&query("select 1")).await;
        if mode == PoolMode::Session {
            drop(b);
        }
        assert_eq!(a.ask(&query("DROP DATABASE short_lived")).await, "Ci");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_an_unknown_kind_ends_the_session_as_postgresql_does() {
    let front = shared(1).await;
    for kind in [b'y', 0, 0xff, b'Z', b'p'] {
        let mut a = Raw::trusty(&front).await;
        a.send(&message(kind, b"what")).await;
        assert_eq!(a.error().await.0, "08P01");
        assert!(a.is_closed().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_has_its_place_until_postgresql_has_ended_it() {
    let front = shared(1).await;
    let mut a = Raw::trusty(&front).await;
    assert_eq!(a.ask(&query("create table if not exists place_kept(n int)")).await.pop(), Some('i'));
    a.ask(&query("begin; set local synchronous_commit = on; insert into place_kept values (1)")).await;
    a.send(&query("commit")).await;
    let waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and query = 'commit'";
    eventually("it waits for the standby", async || front.pg.admin(waits).unwrap() == "1").await;
    socket2::SockRef::from(&a.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(a);
    eventually("the client is gone", async || front.gate.sessions() == 0).await;
    let mut b = Raw::trusty(&front).await;
    b.send(&query("select 1")).await;
    assert!(b.is_silent_for(Duration::from_millis(300)).await, "the only place is taken");
    assert_eq!(front.pg.admin(waits).unwrap(), "1", "and nobody ended its wait");
    front
        .pg
        .admin("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep' and query = 'commit'")
        .unwrap();
    assert_eq!(b.until_ready().await, "TDCi");
    b.ask(&query("drop table place_kept")).await;
}
