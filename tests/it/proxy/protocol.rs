//! What drivers do that is not plain: plans that a DDL made stale, DEALLOCATE and SHOW in the extended protocol,
//! clients that close their side, cancel requests that come late, settings made in passing.

use crate::front::{Front, Setup, eventually, open, open_with};
use crate::pg::Pg;
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

fn setup(size: u32) -> Setup {
    let pool = Pool { mode: PoolMode::Transaction, size, threads: 1, ..Pool::default() };
    Setup { pool, ..Setup::default() }
}

async fn shared(size: u32) -> Front {
    open_with(setup(size)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_plan_is_an_error_once_and_is_gone_from_all_backends_when_parsed_anew() {
    let front = shared(2).await;
    let (mut a, mut b, mut c, mut d) =
        (Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("create table stale(n int); insert into stale values (1)")).await;
    for client in [&mut a, &mut b] {
        assert_eq!(client.ask(&[parse("s", "select * from stale"), SYNC.to_vec()].concat()).await, "1i");
    }
    // On one backend while c has the other, and then on that.
    c.ask(&query("begin")).await;
    for client in [&mut a, &mut b] {
        assert_eq!(client.ask(&run("s")).await, "2DCi");
    }
    d.ask(&query("begin")).await;
    c.ask(&query("commit")).await;
    for client in [&mut a, &mut b] {
        assert_eq!(client.ask(&run("s")).await, "2DCi");
    }
    d.ask(&query("commit")).await;
    assert_eq!(d.ask(&query("alter table stale add column m int")).await, "Ci");
    for (client, how) in [(&mut a, "closed"), (&mut b, "another name")] {
        client.send(&run("s")).await;
        assert_eq!(client.error().await.0, "0A000", "as without the gate");
        assert_eq!(client.until_ready().await, "i");
        let name = if how == "closed" { "s" } else { "t" };
        let again = [parse(name, "select * from stale"), describe(name), run(name)].concat();
        let answer = client.ask(&[if how == "closed" { close("s") } else { vec![] }, again].concat()).await;
        assert!(answer.ends_with("1tT2DCi"), "{how}: {answer}");
        // The backend it ran on is the one used last.
        c.ask(&query("begin")).await;
        assert_eq!(client.ask(&run(name)).await, "2DCi", "{how}: on the other backend");
        d.ask(&query("begin")).await;
        c.ask(&query("commit")).await;
        assert_eq!(client.ask(&run(name)).await, "2DCi", "{how}: and on the first");
        d.ask(&query("commit")).await;
    }
    // Another error of that class is about no plan.
    assert_eq!(a.ask(&run("s")).await, "2DCi");
    d.ask(&query("drop table stale")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deallocate_is_understood_in_the_extended_protocol() {
    let front = shared(2).await;
    let (mut a, mut b, mut c) = (Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await);
    let sync = SYNC.to_vec();
    b.ask(&[parse("mine", "select 1"), sync.clone()].concat()).await;
    // As psycopg 3 in a pipeline: amid other statements.
    a.ask(&[parse("y", "select 1"), sync.clone()].concat()).await;
    let pipeline = [extended("select 2"), extended("deallocate y"), extended("select 3"), sync.clone()].concat();
    assert_eq!(a.ask(&pipeline).await, "12DC12C12DCi");
    assert_eq!(a.ask(&run("y")).await, "Ei");
    assert_eq!(a.ask(&[extended("DEALLOCATE PREPARE \"y\""), sync.clone()].concat()).await, "12Ei", "it is gone");
    assert_eq!(a.ask(&[parse("y", "select 1, 2"), run("y")].concat()).await, "12DCi");
    // As tokio-postgres: prepared first, run in the next transaction, on another backend.
    assert_eq!(a.ask(&[parse("d", "deallocate prepare Y;"), describe("d"), sync.clone()].concat()).await, "1tni");
    c.ask(&query("begin")).await;
    assert_eq!(a.ask(&run("y")).await, "2DCi", "parsed is not carried out");
    assert_eq!(a.ask(&run("d")).await, "2Ci");
    assert_eq!(a.ask(&run("y")).await, "Ei");
    a.send(&run("d")).await;
    assert_eq!(a.error().await.0, "26000", "once");
    assert_eq!(a.until_ready().await, "i");
    c.ask(&query("commit")).await;
    assert_eq!(b.ask(&run("mine")).await, "2DCi", "another's stays");
    // Unnamed, parsed in one transaction and bound in the next.
    a.ask(&[parse("y", "select 4"), parse("", "deallocate y"), sync.clone()].concat()).await;
    c.ask(&query("begin")).await;
    assert_eq!(a.ask(&run("")).await, "2Ci");
    assert_eq!(a.ask(&run("y")).await, "Ei");
    let left = value(&mut a, "select count(*) from pg_prepared_statements where name = 'portcullis_0'").await;
    assert_eq!(left, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn show_pool_answers_drivers_that_prepare_everything() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let mut setup = setup(2);
        setup.pool.mode = mode;
        let front = open_with(setup).await;
        let client = front.client("app").await;
        for _ in 0..2 {
            let rows = client.query("SHOW pool_nodes", &[]).await.unwrap();
            assert_eq!(rows.len(), 2);
            assert_eq!(rows[1].get::<_, String>("role"), "standby");
            let count: i64 = client.query_one("select count(*) from pg_class", &[]).await.unwrap().get(0);
            assert!(count > 0);
        }
        let version: String = client.query_one("show pool_version;", &[]).await.unwrap().get(0);
        assert_eq!(version, "test (portcullis)");
        let kept = client.prepare("show pool_pools").await.unwrap();
        for _ in 0..3 {
            assert!(!client.query(&kept, &[]).await.unwrap().is_empty());
        }

        let mut raw = Raw::trusty(&front).await;
        let sync = SYNC.to_vec();
        let portal = message(b'D', b"P\0");
        // As libpq's PQexecParams and as JDBC, with and without a name, in a transaction too.
        let whole = |name: &str| {
            [parse(name, "SHOW pool_nodes"), bind(name), portal.clone(), EXECUTE.to_vec(), sync.clone()].concat()
        };
        assert_eq!(raw.ask(&whole("")).await, "12TDDCi");
        assert_eq!(raw.ask(&query("begin")).await, "Ct");
        assert_eq!(raw.ask(&whole("S_1")).await, "12TDDCt");
        assert_eq!(raw.ask(&[bind("S_1"), EXECUTE.to_vec(), sync.clone()].concat()).await, "2DDCt");
        assert_eq!(raw.ask(&[extended("select 1"), sync.clone()].concat()).await, "12DCt");
        assert_eq!(raw.ask(&query("commit")).await, "Ci");
        assert_eq!(raw.ask(&[close("S_1"), sync.clone()].concat()).await, "3i");
        assert_eq!(raw.ask(&run("S_1")).await, "Ei");
        // Byte by byte, and pipelined behind another exchange.
        for byte in whole("") {
            raw.send(&[byte]).await;
        }
        assert_eq!(raw.until_ready().await, "12TDDCi");
        // A Query or a Sync ends what came before.
        raw.send(&[query("select 1"), whole("")].concat()).await;
        assert_eq!(raw.until_ready().await, "TDCi");
        assert_eq!(raw.until_ready().await, "12TDDCi");
        raw.send(&[extended("select 1"), sync.clone(), whole(""), query("select 2")].concat()).await;
        let mut heard = Vec::new();
        for _ in 0..3 {
            heard.push(raw.until_ready().await);
        }
        assert_eq!(heard, ["12DCi", "12TDDCi", "TDCi"]);
        // Amid others it is not answered, and all stays in step.
        assert_eq!(
            raw.ask(&[whole("")[..whole("").len() - 5].to_vec(), extended("select 1"), sync.clone()].concat()).await,
            "12TDDCEi"
        );
        assert_eq!(raw.ask(&[extended("select 1"), whole("")].concat()).await, "12DCEi");
        // A name that the client uses for something else is no more the gate's.
        assert_eq!(raw.ask(&[parse("n", "show pool_nodes"), sync.clone()].concat()).await, "1i");
        assert_eq!(
            raw.ask(&[extended("select 1"), close("n"), parse("n", "select 1, 2"), sync.clone()].concat()).await,
            "12DC31i"
        );
        assert_eq!(raw.ask(&run("n")).await, "2DCi");
        assert_eq!(raw.ask(&[parse("", "show pool_nodes"), sync.clone()].concat()).await, "1i");
        assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
        assert_eq!(raw.ask(&run("")).await, "Ei", "a simple query ends the unnamed one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_closed_its_side_while_it_waits_gets_its_answer() {
    let front = shared(1).await;
    let (mut a, mut b, mut c) = (Raw::trusty(&front).await, Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("begin")).await;
    b.send(&[query("select 1"), query("select 2")].concat()).await;
    b.stream.shutdown().await.unwrap();
    // It hears that it waits, and is asked for no more than to be there.
    assert_eq!(b.receive().await.unwrap().0, b'N');
    c.send(&query("select 1")).await;
    eventually("both wait", async || front.commands.figures().iter().any(|pool| pool.waiting == 2)).await;
    assert!(b.is_silent_for(Duration::from_millis(400)).await, "and is not sent away");
    drop(c);
    eventually("one that is gone is gone", async || front.gate.sessions() == 2).await;
    a.ask(&query("commit")).await;
    assert_eq!(b.until_ready().await, "TDCi");
    assert_eq!(b.until_ready().await, "TDCi");
    assert!(b.is_closed().await);
    // While all are held.
    let mut d = Raw::trusty(&front).await;
    front.gate.pause();
    d.send(&query("select 1")).await;
    d.stream.shutdown().await.unwrap();
    assert_eq!(d.receive().await.unwrap().0, b'N');
    front.gate.resume();
    assert_eq!(d.until_ready().await, "TDCi");
    // What the gate answers itself.
    let mut e = Raw::trusty(&front).await;
    e.send(&query("show pool_nodes")).await;
    e.stream.shutdown().await.unwrap();
    assert_eq!(e.until_ready().await, "TDDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_stays_behind_the_success_that_is_held() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    raw.ask(&query("create table noted(n int)")).await;
    for sql in ["listen here", "set synchronous_commit = on", "set client_min_messages = error", "begin"] {
        raw.ask(&query(sql)).await;
    }
    raw.ask(&query("insert into noted values (1)")).await;
    raw.ask(&query("notify here, 'done'")).await;
    raw.send(&query("commit")).await;
    let waits = format!("select count(*) from pg_stat_activity where pid = {} and wait_event = 'SyncRep'", raw.pid);
    eventually("it waits for the standby", async || front.pg.admin(&waits).unwrap() == "1").await;
    front.confirmed.store(false, Ordering::SeqCst);
    front.gate.cancel_busy();
    eventually("the peer is asked", async || front.asked.load(Ordering::SeqCst) > 2).await;
    assert!(raw.is_silent_for(Duration::from_millis(300)).await, "not the notification either");
    front.confirmed.store(true, Ordering::SeqCst);
    assert_eq!(raw.until_ready().await, "CAi");
    front.pg.admin("\\c app\ndrop table noted").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_that_comes_late_keeps_the_backend_until_postgresql_acted_on_it() {
    let pg = tokio::task::spawn_blocking(|| Arc::new(Pg::start())).await.unwrap();
    let front = open_with(Setup { pg: Some(Arc::clone(&pg)), ..setup(1) }).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("select 1")).await;
    pg.freeze(true);
    a.send(&query("select pg_sleep(1)")).await;
    eventually("it sleeps", async || front.gate.busy() == 1).await;
    // Whoever cancels does not wait for ever.
    a.cancel(&front).await;
    assert_eq!(a.until_ready().await, "TDCi");
    b.send(&query("select pg_sleep(0.5)")).await;
    assert!(b.is_silent_for(Duration::from_millis(500)).await, "nobody else may be hit");
    pg.freeze(false);
    assert_eq!(b.until_ready().await, "TDCi", "it is free again, and was not cancelled");
    assert_eq!(a.ask(&query("select 1")).await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_statement_sets_by_a_call_is_met_by_nobody_whenever_it_runs() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let sync = SYNC.to_vec();
    for (name, sql) in [
        ("named", "select set_config('search_path', 'pg_catalog', false)"),
        ("", "select set_config('search_path', 'pg_catalog', false)"),
        ("inside", "with x as (select set_config('search_path', 'pg_catalog', false) as y) select y from x"),
    ] {
        assert_eq!(a.ask(&[parse(name, sql), sync.clone()].concat()).await, "1i");
        for _ in 0..2 {
            assert_eq!(a.ask(&run(name)).await, "2DCi");
            assert_eq!(value(&mut b, "show search_path").await, "\"$user\", public", "{sql}");
            // A simple query would end the unnamed one.
            a.send(&[parse("look", "show search_path"), run("look")].concat()).await;
            let mut path = String::new();
            while let Some((kind, body)) = a.receive().await.filter(|(kind, _)| *kind != b'Z') {
                if kind == b'D' {
                    path = String::from_utf8_lossy(&body[6..]).into_owned();
                }
            }
            assert_eq!(path, "pg_catalog", "{sql}");
            a.ask(&[close("look"), sync.clone()].concat()).await;
        }
        a.ask(&query("reset search_path")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_local_costs_no_look_at_the_settings() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let pid = value(&mut a, "select pg_backend_pid()").await;
    let last = format!("select query from pg_stat_activity where pid = {pid}");
    let sync = SYNC.to_vec();
    let idle = async || {
        eventually("it is back", async || front.commands.figures().iter().any(|pool| pool.idle == 1)).await;
        front.pg.admin(&last).unwrap()
    };
    a.ask(&[parse("local", "SET LOCAL work_mem = '5MB';"), sync.clone()].concat()).await;
    for set in [
        query("set local work_mem = '5MB'"),
        [extended("set local work_mem = '5MB'"), sync.clone()].concat(),
        run("local"),
    ] {
        a.ask(&query("begin")).await;
        assert!(a.ask(&set).await.ends_with("Ct"));
        assert_eq!(value(&mut a, "show work_mem").await, "5MB");
        a.ask(&query("commit")).await;
        assert_eq!(idle().await, "commit", "nothing was asked after it");
        assert_eq!(value(&mut b, "show work_mem").await, "4MB");
    }
    // What is not surely one is looked at.
    for set in ["set local work_mem = '5MB'; set work_mem = '6MB'", "set work_mem = '6MB'"] {
        a.ask(&query("begin")).await;
        a.ask(&query(set)).await;
        a.ask(&query("commit")).await;
        assert!(idle().await.contains("pg_settings"), "{set}");
        assert_eq!(value(&mut b, "show work_mem").await, "4MB", "{set}");
        assert_eq!(value(&mut a, "show work_mem").await, "6MB", "{set}");
        a.ask(&query("reset work_mem")).await;
    }
    // One that failed vouches for nothing behind it.
    let sets = [query("set work_mem = '7MB'"), [extended("set work_mem = '7MB'"), sync.clone()].concat()];
    let locals = [query("set local nothing = 1"), [extended("set local nothing = 1"), sync.clone()].concat()];
    for (set, local) in sets.iter().flat_map(|set| locals.iter().map(move |local| (set, local))) {
        a.ask(&query("begin; savepoint s")).await;
        assert!(a.ask(local).await.ends_with("Ee"));
        assert_eq!(a.ask(&query("rollback to s")).await, "Ct");
        a.ask(set).await;
        a.ask(&query("commit")).await;
        assert_eq!(value(&mut b, "show work_mem").await, "4MB");
        assert_eq!(value(&mut a, "show work_mem").await, "7MB");
        a.ask(&query("reset work_mem")).await;
    }
    // Bound, and another is executed.
    a.ask(&[parse("set", "set work_mem = '8MB'"), sync.clone()].concat()).await;
    for tricky in [
        [bind("local"), bind("set"), EXECUTE.to_vec(), sync.clone()].concat(),
        [bind("set"), EXECUTE.to_vec(), bind("local"), EXECUTE.to_vec(), sync.clone()].concat(),
        [bind("local"), query("set work_mem = '8MB'")].concat(),
        [message(b'B', b"p\0set\0\0\0\0\0\0\0"), bind("local"), message(b'E', b"p\0\0\0\0\0"), sync.clone()].concat(),
    ] {
        a.ask(&query("begin")).await;
        a.ask(&tricky).await;
        a.ask(&query("commit")).await;
        assert_eq!(value(&mut b, "show work_mem").await, "4MB");
        assert_eq!(value(&mut a, "show work_mem").await, "8MB");
        a.ask(&query("reset work_mem")).await;
    }
}
