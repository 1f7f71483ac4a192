//! What a second pair of eyes found in the data path: shared backends whose clients leave, dribble or err.

use crate::front::{Front, Setup, eventually, open, open_with};
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Long enough for the pump to have looked at what it has and to find no more.
const DRIBBLE: Duration = Duration::from_millis(150);

async fn shared(size: u32) -> Front {
    let pool = Pool { mode: PoolMode::Transaction, size, threads: 1, ..Pool::default() };
    open_with(Setup { pool, ..Setup::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_statement_may_come_in_pieces() {
    let front = shared(1).await;
    let mut a = Raw::trusty(&front).await;
    let long = format!("select length('{}')", "x".repeat(40_000));
    let bytes = [parse("long", &long), SYNC.to_vec()].concat();
    for piece in bytes.chunks(9_000) {
        a.send(piece).await;
        tokio::time::sleep(DRIBBLE).await;
    }
    assert_eq!(a.until_ready().await, "1i");
    assert_eq!(a.ask(&run("long")).await, "2DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simple_query_of_another_takes_no_unnamed_statement() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    assert_eq!(a.ask(&[parse("", "select 'a'"), describe(""), SYNC.to_vec()].concat()).await, "1tTi");
    assert_eq!(b.ask(&query("select 1")).await, "TDCi");
    assert_eq!(a.ask(&run("")).await, "2DCi");
    // The gate's own queries are such ones too.
    assert_eq!(a.ask(&[parse("", "set statement_timeout = '7s'"), run("")].concat()).await, "12Ci");
    assert_eq!(a.ask(&run("")).await, "2Ci");
    // And the client's own, as with PostgreSQL.
    assert_eq!(a.ask(&query("select 1")).await, "TDCi");
    assert_eq!(a.ask(&run("")).await, "Ei");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_amid_a_long_statement_leaves_all_in_step() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    let text = format!("select length('{}')", "x".repeat(40_000));
    let long = parse("long", &text);
    // PostgreSQL reads the second half as part of what it skips.
    a.send(&[&bind("none")[..], &long[..25_000]].concat()).await;
    assert_eq!(a.error().await.0, "26000");
    assert_eq!(a.ask(&[&long[25_000..], &SYNC].concat()).await, "i");
    assert_eq!(a.ask(&run("long")).await, "Ei", "it was skipped");
    assert_eq!(b.ask(&[parse("s", "select 1"), SYNC.to_vec()].concat()).await, "1i");
    assert_eq!(b.ask(&[parse("mine", &text), run("mine")].concat()).await, "12DCi");
    assert_eq!(a.ask(&[parse("s", "select 1"), run("s")].concat()).await, "12DCi");
    assert_eq!(a.ask(&[parse("long", &text), run("long")].concat()).await, "12DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parsed_behind_deallocate_all_stays() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    assert_eq!(a.ask(&[parse("old", "select 1"), SYNC.to_vec()].concat()).await, "1i");
    for all in ["deallocate all", "discard all"] {
        let pipeline = [extended(all), SYNC.to_vec(), parse("new", "select 2"), describe("new"), SYNC.to_vec()];
        a.send(&pipeline.concat()).await;
        assert_eq!(a.until_ready().await, "12Ci", "{all}");
        assert_eq!(a.until_ready().await, "1tTi", "{all}");
        assert_eq!(a.ask(&run("new")).await, "2DCi", "{all}");
        assert_eq!(a.ask(&run("old")).await, "Ei", "{all}");
        // The backend has it under the gate's name: another may say the same.
        assert_eq!(b.ask(&[parse("theirs", "select 2"), run("theirs")].concat()).await, "12DCi", "{all}");
        assert_eq!(b.ask(&[message(b'C', b"Stheirs\0"), SYNC.to_vec()].concat()).await, "3i");
        assert_eq!(a.ask(&[message(b'C', b"Snew\0"), SYNC.to_vec()].concat()).await, "3i");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_short_timeouts_follow_a_client() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("set session authorization ann; set role carded")).await;
    assert_eq!(value(&mut b, "select session_user || current_user").await, "trustytrusty");
    assert_eq!(value(&mut a, "select session_user || ' ' || current_user").await, "ann carded");
    b.ask(&query("set role carded")).await;
    value(&mut a, "select 1").await;
    assert_eq!(value(&mut b, "select session_user || ' ' || current_user").await, "trusty carded");
    a.ask(&query("reset session authorization")).await;
    // A setting that only the login role may make.
    a.ask(&query("set log_min_messages = fatal; set role carded")).await;
    assert_eq!(value(&mut b, "show log_min_messages").await, "warning");
    assert_eq!(value(&mut a, "show log_min_messages").await, "fatal");
    assert_eq!(value(&mut a, "select session_user || ' ' || current_user").await, "trusty carded");
    for _ in 0..20 {
        let mut c = Raw::trusty(&front).await;
        assert!(c.ask(&query("set statement_timeout = 1")).await.ends_with("Ci"));
        assert_eq!(value(&mut b, "show statement_timeout").await, "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_read_costs_no_session_while_the_standby_is_lost() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    front.confirmed.store(false, Ordering::SeqCst);
    // One that comes before the query hits nobody.
    let sleeps = format!("select count(*) from pg_stat_activity where pid = {} and wait_event = 'PgSleep'", raw.pid);
    for _ in 0..10 {
        raw.send(&query("select pg_sleep(20)")).await;
        eventually("it sleeps", async || front.pg.admin(&sleeps).unwrap() == "1").await;
        raw.cancel(&front).await;
        assert_eq!(raw.error().await.0, "57014");
        assert_eq!(raw.until_ready().await, "i");
        assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    }
    assert_eq!(front.asked.load(Ordering::SeqCst), 0, "nothing was committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_meets_what_another_set_in_passing() {
    let front = shared(1).await;
    let (mut a, mut b) = (Raw::trusty(&front).await, Raw::trusty(&front).await);
    a.ask(&query("set work_mem = '5MB'; set role app")).await;
    for set in [
        "begin; set my.tenant = 'x'; commit",
        "/* app */ set my.tenant = 'x'",
        "set \"my\".\"tenant\" = 'x'",
        "select set_config('my.tenant', 'x', false)",
        "select pg_catalog.set_config('search_path', 'pg_catalog', false)",
    ] {
        for extend in [false, true] {
            if extend && set.contains(';') {
                continue;
            }
            a.ask(&if extend { [extended(set), SYNC.to_vec()].concat() } else { query(set) }).await;
            assert_eq!(value(&mut b, "select coalesce(current_setting('my.tenant', true), '')").await, "", "{set}");
            assert_eq!(value(&mut b, "show search_path").await, "\"$user\", public", "{set}");
            assert_eq!(value(&mut b, "select current_user || current_setting('work_mem')").await, "trusty4MB", "{set}");
            assert_eq!(value(&mut a, "select current_user || current_setting('work_mem')").await, "app5MB", "{set}");
        }
    }
    assert_eq!(value(&mut a, "show search_path").await, "pg_catalog");
    assert_eq!(value(&mut a, "show my.tenant").await, "x");
}
