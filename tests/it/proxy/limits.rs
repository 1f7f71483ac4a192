//! The limits and time-outs of [pool], with real clients; and what clients notice when backends or PostgreSQL go away.

use crate::front::{Front, Setup, eventually, open_with};
use crate::pg::Pg;
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use portcullis::io::clock;
use portcullis::wire::pg::field;
use std::sync::Arc;
use std::time::Duration;

/// A time-out that runs out soon, and not before a slow machine has done what must come before it.
const SOON: Duration = Duration::from_secs(2);

const HALF: Duration = Duration::from_millis(500);

fn shared(size: u32) -> Pool {
    Pool { mode: PoolMode::Transaction, size, threads: 1, ..Pool::default() }
}

async fn with(pool: Pool) -> Front {
    open_with(Setup { query_wait: pool.query_wait, pool, ..Setup::default() }).await
}

async fn enter(front: &Front, database: &str, name: &str) -> Raw {
    let mut raw = Raw::connect(front).await;
    raw.log_in(&[("user", "trusty"), ("database", database), ("application_name", name)]).await;
    raw
}

/// SQLSTATE and hint of a login that is refused.
async fn refused(front: &Front, database: &str) -> (String, String) {
    let mut raw = Raw::connect(front).await;
    raw.send(&startup(0, &[("user", "trusty"), ("database", database)])).await;
    loop {
        let (kind, body) = raw.receive().await.expect("a word");
        match kind {
            b'E' => return (field(&body, b'C').unwrap(), field(&body, b'H').unwrap_or_default()),
            b'Z' => panic!("let in"),
            _ => {}
        }
    }
}

fn open_and_waiting(front: &Front) -> (u32, u32) {
    let all = front.commands.figures();
    (all.iter().map(|pool| pool.open).sum(), all.iter().map(|pool| pool.waiting).sum())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_user_or_a_database_are_limited_and_told_which_key_says_so() {
    let front = with(Pool { max_clients_per_user: 2, ..shared(3) }).await;
    let (a, _b) = (enter(&front, "app", "a").await, enter(&front, "postgres", "b").await);
    let (code, hint) = refused(&front, "app").await;
    assert_eq!(code, "53300");
    assert!(hint.contains("pool.max_clients_per_user"), "{hint}");
    drop(a);
    eventually("its place is free", async || front.gate.sessions() == 1).await;
    let _c = enter(&front, "app", "c").await;

    let front = with(Pool { max_clients_per_database: 1, mode: PoolMode::Session, ..shared(3) }).await;
    let _a = enter(&front, "app", "a").await;
    let (code, hint) = refused(&front, "app").await;
    assert_eq!(code, "53300");
    assert!(hint.contains("pool.max_clients_per_database"), "{hint}");
    let _b = enter(&front, "postgres", "b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_too_slow_to_log_in_is_closed_on() {
    let front = with(Pool { login_timeout: SOON, ..shared(1) }).await;
    let began = clock::now();
    let mut silent = Raw::connect(&front).await;
    let mut halfway = Raw::connect(&front).await;
    halfway.send(&startup(0, &[("user", "app"), ("database", "app")])).await;
    assert_eq!(halfway.receive().await.expect("it is asked for its password").0, b'R');
    assert!(silent.is_closed().await && halfway.is_closed().await);
    assert!(clock::now().since(began) >= SOON, "{:?}", clock::now().since(began));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_up_packet_that_is_too_long_is_closed_on() {
    let front = with(shared(1)).await;
    for length in [10_001u32, 0x7fff_ffff] {
        let mut raw = Raw::connect(&front).await;
        raw.send(&[&length.to_be_bytes()[..], &[0, 3, 0, 0]].concat()).await;
        let began = clock::now();
        while raw.receive().await.is_some() {}
        // By its login_timeout it would be after a minute.
        assert!(clock::now().since(began) < Duration::from_secs(30), "it waits for {length} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_clients_are_ended_and_busy_ones_are_not() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = with(Pool { client_idle_timeout: SOON, mode, ..shared(3) }).await;
        let (mut idle, mut busy) = (enter(&front, "app", "").await, enter(&front, "app", "").await);
        let mut open = enter(&front, "app", "").await;
        open.ask(&query("begin")).await;
        busy.send(&query("select pg_sleep(5)")).await;
        let (code, text, _) = idle.error().await;
        assert_eq!(code, "57P05");
        assert!(text.contains("pool.client_idle_timeout"), "{text}");
        assert_eq!(busy.until_ready().await, "TDCi");
        assert_eq!(open.ask(&query("commit")).await, "Ci", "in a transaction is not idle");

        let front = with(Pool { idle_in_transaction_timeout: SOON, mode, ..shared(3) }).await;
        let (mut idle, mut open) = (enter(&front, "app", "").await, enter(&front, "app", "").await);
        open.ask(&query("begin")).await;
        let (code, text, _) = open.error().await;
        assert_eq!(code, "25P03");
        assert!(text.contains("pool.idle_in_transaction_timeout"), "{text}");
        assert_eq!(idle.ask(&query("select 1")).await, "TDCi", "idle outside of one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reserve_is_for_who_waited_and_goes_again() {
    let pool =
        Pool { reserve: 1, reserve_after: Duration::from_secs(1), query_wait: Duration::from_secs(8), ..shared(1) };
    let front = with(pool).await;
    let (mut a, mut b, mut c) =
        (enter(&front, "app", "").await, enter(&front, "app", "").await, enter(&front, "app", "").await);
    a.ask(&query("begin")).await;
    let began = clock::now();
    assert_eq!(b.ask(&query("begin")).await, "Ct");
    assert!(clock::now().since(began) >= Duration::from_millis(700), "at once: {:?}", clock::now().since(began));
    eventually("both have one", async || open_and_waiting(&front) == (2, 0)).await;
    c.send(&query("select 1")).await;
    assert_eq!(c.error().await.0, "53300", "there is no more");
    b.ask(&query("commit")).await;
    eventually("the one beyond the size is closed", async || open_and_waiting(&front) == (1, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_backends_and_old_ones_are_closed() {
    let front = with(Pool { idle_timeout: SOON, ..shared(2) }).await;
    let mut a = enter(&front, "app", "").await;
    a.ask(&query("select 1")).await;
    eventually("it is open", async || open_and_waiting(&front).0 == 1).await;
    eventually("the idle one is closed", async || open_and_waiting(&front).0 == 0).await;
    assert_eq!(a.ask(&query("select 1")).await, "TDCi");

    let front = with(Pool { lifetime: Duration::from_secs(1), ..shared(2) }).await;
    let began = clock::now();
    let mut a = enter(&front, "app", "").await;
    let first = value(&mut a, "select pg_backend_pid()").await;
    // In use nearly all the time: it is found to be old when it comes back.
    while value(&mut a, "select pg_backend_pid() from pg_sleep(0.3)").await == first {
        assert!(clock::now().since(began) < Duration::from_secs(30), "it lives on");
    }
    assert!(clock::now().since(began) >= Duration::from_millis(500), "{:?}", clock::now().since(began));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_address_is_told_to_postgresql() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = with(Pool { client_address: true, mode, ..shared(3) }).await;
        let (mut named, mut bare) = (enter(&front, "app", "shop").await, enter(&front, "app", "").await);
        let mut long = enter(&front, "app", &"x".repeat(70)).await;
        for (raw, name) in [(&mut named, "shop - "), (&mut bare, ""), (&mut long, "xxxx")] {
            let address = raw.stream.local_addr().unwrap().to_string();
            let shown = value(raw, "show application_name").await;
            assert!(shown.starts_with(name) && shown.ends_with(&address) && shown.len() <= 63, "{shown}");
            // As others see it.
            let sql = "select application_name from pg_stat_activity where pid = pg_backend_pid()";
            assert_eq!(value(raw, sql).await, shown, "{mode:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_for_a_backend_and_leaves_is_out_of_the_queue() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = with(Pool { mode, ..shared(1) }).await;
        let mut first = enter(&front, "app", "").await;
        first.ask(&query("begin")).await;
        let second = match mode {
            PoolMode::Transaction => {
                let mut second = enter(&front, "app", "").await;
                second.send(&query("select 1")).await;
                second
            }
            PoolMode::Session => {
                let mut second = Raw::connect(&front).await;
                second.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
                second
            }
        };
        eventually("one waits", async || open_and_waiting(&front).1 == 1).await;
        drop(second);
        eventually("nobody waits", async || open_and_waiting(&front).1 == 0).await;
        assert_eq!(first.ask(&query("commit")).await, "Ci");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_host_is_gone_is_found_out() {
    let front = with(shared(1)).await;
    let raw = enter(&front, "app", "").await;
    let (gate, client) = (front.address.port(), raw.stream.local_addr().unwrap().port());
    let filter = format!("sport = :{gate} and dport = :{client}");
    let out = std::process::Command::new("ss").args(["-Htno", &filter]).output().unwrap();
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(shown.contains("timer:(keepalive,"), "{shown:?}");
}

/// Four connections for everyone, and one for the daemon's questions about roles, in a PostgreSQL of its own.
fn small() -> Arc<Pg> {
    let hba = "local all all trust\n";
    let conf = "max_connections = 13\nsuperuser_reserved_connections = 8\nmax_wal_senders = 0\n";
    let pg = Arc::new(Pg::start_with(5499, conf, hba));
    pg.admin("create role trusty login; create role second login; create database app; create database other;")
        .unwrap();
    pg
}

async fn before(pg: &Arc<Pg>, pool: Pool) -> Front {
    let hba = "host all trusty,second 127.0.0.1/32 trust\nhost all all all scram-sha-256";
    let query_wait = pool.query_wait;
    open_with(Setup { pool, hba, query_wait, pg: Some(Arc::clone(pg)), ..Setup::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_smaller_than_all_pools_lets_clients_wait_and_idle_ones_make_room() {
    // On two threads too: a pool's idle backends make room for one on another thread.
    for threads in [1, 4] {
        let pg = small();
        let front = before(&pg, Pool { threads, ..shared(4) }).await;
        let mut all = Vec::new();
        for _ in 0..4 {
            all.push(enter(&front, "app", "").await);
        }
        for raw in &mut all {
            assert_eq!(raw.ask(&query("begin")).await, "Ct");
        }
        // All four are taken: clients of other pools are let in, wait, and are served when one is free.
        for (database, user) in [("other", "trusty"), ("app", "second"), ("other", "second")] {
            let mut raw = Raw::connect(&front).await;
            raw.send(&startup(0, &[("user", user), ("database", database)])).await;
            eventually("it waits", async || open_and_waiting(&front) == (4, 1)).await;
            let one = &mut all[0];
            assert_eq!(one.ask(&query("commit")).await, "Ci");
            assert!(raw.until_ready().await.ends_with('i'), "no error, an idle one makes room");
            assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
            // The one it made room for makes room itself.
            assert_eq!(one.ask(&query("begin")).await, "Ct");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_clients_do_not_notice_a_restart_of_postgresql_and_waiting_ones_wait() {
    let pg = small();
    let front = before(&pg, shared(2)).await;
    let (mut idle, mut late) = (enter(&front, "app", "").await, enter(&front, "app", "").await);
    let mut active = enter(&front, "app", "").await;
    assert_eq!(idle.ask(&query("select 1")).await, "TDCi");
    active.ask(&query("begin")).await;
    pg.stop();
    assert_eq!(active.error().await.0, "57P01", "PostgreSQL's own last words");
    late.send(&query("select 1")).await;
    assert!(late.is_silent_for(Duration::from_millis(500)).await, "it waits");
    pg.start_again();
    assert_eq!(late.until_ready().await, "TDCi");
    assert_eq!(idle.ask(&query("select 1")).await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_dies_while_idle_costs_no_client_an_error() {
    let front = with(shared(1)).await;
    let mut a = enter(&front, "app", "").await;
    for _ in 0..5 {
        let pid = value(&mut a, "select pg_backend_pid()").await;
        front.pg.admin(&format!("select pg_terminate_backend({pid}, 5000)")).unwrap();
        assert_ne!(value(&mut a, "select pg_backend_pid()").await, pid);
    }
}

/// What `reload` names as applied: each key changed while clients are there, and seen to be in force.
#[tokio::test(flavor = "multi_thread")]
async fn each_key_that_a_reload_applies_is_in_force_at_once() {
    let front = with(shared(1)).await;
    let set = |pool: Pool| front.commands.set_limits(pool);
    let (mut a, mut b) = (enter(&front, "app", "").await, enter(&front, "app", "").await);
    a.ask(&query("begin")).await;
    b.send(&query("select 1")).await;
    assert!(b.is_silent_for(HALF).await, "it waits for a backend");
    set(Pool { reserve: 1, reserve_after: Duration::ZERO, ..shared(1) });
    assert_eq!(b.until_ready().await, "TDCi", "reserve, reserve_after");

    set(Pool { max_prepared: 1, ..shared(1) });
    for name in ["first", "second"] {
        let parse = message(b'P', &[name.as_bytes(), b"\0select '", name.as_bytes(), b"'\0\0\0"].concat());
        assert_eq!(a.ask(&[parse, SYNC.to_vec()].concat()).await, "1t");
    }
    assert_eq!(value(&mut a, "select count(*) from pg_prepared_statements").await, "1", "max_prepared");
    a.ask(&query("commit")).await;

    set(Pool { client_address: true, ..shared(1) });
    let mut shown = enter(&front, "app", "shop").await;
    assert!(value(&mut shown, "show application_name").await.starts_with("shop - 127.0.0.1:"), "client_address");

    for (pool, key) in [
        (Pool { max_clients_per_user: 3, ..shared(1) }, "pool.max_clients_per_user"),
        (Pool { max_clients_per_database: 3, ..shared(1) }, "pool.max_clients_per_database"),
    ] {
        set(pool);
        let (code, hint) = refused(&front, "app").await;
        assert!(code == "53300" && hint.contains(key), "{key}: {code} {hint}");
    }

    set(Pool { login_timeout: HALF, ..shared(1) });
    assert!(Raw::connect(&front).await.is_closed().await, "login_timeout");

    for (pool, key) in [
        (Pool { idle_timeout: HALF, ..shared(1) }, "idle_timeout"),
        (Pool { lifetime: HALF, idle_timeout: Duration::ZERO, ..shared(1) }, "lifetime"),
    ] {
        assert_eq!(a.ask(&query("select 1")).await, "TDCi");
        set(pool);
        eventually(key, async || open_and_waiting(&front).0 == 0).await;
        set(shared(1));
    }

    a.ask(&query("begin")).await;
    set(Pool { client_idle_timeout: HALF, ..shared(1) });
    assert_eq!(b.error().await.0, "57P05", "client_idle_timeout");
    set(Pool { idle_in_transaction_timeout: HALF, ..shared(1) });
    assert_eq!(a.error().await.0, "25P03", "idle_in_transaction_timeout");
}

/// What the guard does while PostgreSQL is away, and when it has judged the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_gate_keeps_who_is_between_transactions_and_who_comes_and_passes_nothing() {
    let front = with(shared(2)).await;
    let mut idle = enter(&front, "app", "").await;
    let (mut active, mut waiting) = (enter(&front, "app", "").await, enter(&front, "app", "").await);
    let before = value(&mut waiting, "select pg_backend_pid()").await;
    active.ask(&query("begin")).await;
    active.send(&query("select pg_sleep(1)")).await;
    front.gate.suspend(clock::now() + Duration::from_secs(60), "portcullis: PostgreSQL is away");
    let (code, text, _) = active.error().await;
    assert_eq!((code.as_str(), text.as_str()), ("57P01", "portcullis: PostgreSQL is away"));
    waiting.send(&query("select 1")).await;
    let mut newcomer = Raw::connect(&front).await;
    newcomer.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert!(waiting.is_silent_for(HALF).await && newcomer.is_silent_for(HALF).await, "nothing passes");
    assert_eq!(front.gate.sessions(), 2, "idle and waiting");
    front.extend(Duration::from_secs(3600));
    assert_eq!(waiting.until_ready().await, "TDCi");
    assert!(newcomer.until_ready().await.ends_with('i'), "let in");
    let after = value(&mut idle, "select pg_backend_pid()").await;
    assert_ne!(before, after, "no backend of before serves on");
    // The lease of a suspension ends like any other.
    front.gate.suspend(clock::now() + HALF, "portcullis: PostgreSQL is away");
    idle.send(&query("select 1")).await;
    let (code, text, _) = idle.error().await;
    assert!(code == "57P01" && text.contains("lease ran out"), "{code} {text}");
}

/// Commits that wait for a standby fill the pool: who only reads is served beside them, as by PostgreSQL alone.
#[tokio::test(flavor = "multi_thread")]
async fn commits_that_wait_for_a_standby_do_not_keep_readers_out() {
    let front = with(Pool { query_wait: Duration::from_secs(60), ..shared(2) }).await;
    let mut reader = enter(&front, "app", "").await;
    assert_eq!(reader.ask(&query("create table held_up(n int)")).await, "Ci");
    let mut writers = Vec::new();
    for _ in 0..2 {
        let mut writer = enter(&front, "app", "").await;
        writer.send(&query("begin; set local synchronous_commit = on; insert into held_up values (1); commit")).await;
        writers.push(writer);
    }
    let held_up = "select count(*) from pg_stat_activity where query like '%held_up%' and wait_event = 'SyncRep'";
    eventually("both wait for a standby", async || front.pg.admin(held_up).unwrap() == "2").await;
    for _ in 0..3 {
        assert_eq!(reader.ask(&query("select count(*) from held_up")).await, "TDCi");
    }
    assert_eq!(front.pg.admin(held_up).unwrap(), "2", "they wait on");
    let go_on =
        "select pg_cancel_backend(pid) from pg_stat_activity where query like '%held_up%' and wait_event = 'SyncRep'";
    front.pg.admin(go_on).unwrap();
    for writer in &mut writers {
        assert!(writer.until_ready().await.ends_with("Ci"));
    }
    eventually("no more than the size are kept", async || open_and_waiting(&front).0 <= 2).await;
    front.pg.admin("\\c app\ndrop table held_up").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waited_for_a_role_that_may_not_connect_more_often_reads_postgresqls_words() {
    let pg = small();
    pg.admin("alter role second connection limit 1").unwrap();
    let front = before(&pg, Pool { query_wait: Duration::from_secs(2), ..shared(5) }).await;
    let hello = startup(0, &[("user", "second"), ("database", "app")]);
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut raw = Raw::connect(&front).await;
        raw.send(&hello).await;
        assert!(raw.until_ready().await.ends_with('i'));
        clients.push(raw);
    }
    assert_eq!(clients[0].ask(&query("begin")).await, "Ct");
    clients[1].send(&query("select 1")).await;
    let (code, text, _) = clients[1].error().await;
    assert!(code == "53300" && text.contains("too many connections for role"), "{code} {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_wait_of_zero_waits_for_nothing() {
    let front = with(Pool { query_wait: Duration::ZERO, ..shared(1) }).await;
    // A login is on loan as well, and the next one would not wait for it to come back.
    let is_back = async || front.commands.figures().iter().all(|pool| pool.idle == pool.open);
    let mut a = enter(&front, "app", "").await;
    eventually("the backend of the first login is back", is_back).await;
    let mut b = enter(&front, "app", "").await;
    eventually("the backend of the second login is back", is_back).await;
    assert_eq!(a.ask(&query("begin")).await, "Ct");
    b.send(&query("select 1")).await;
    assert_eq!(b.error().await.0, "53300");
    assert_eq!(a.ask(&query("commit")).await, "Ci");
    assert_eq!(a.ask(&query("select 1")).await, "TDCi");
    front.gate.pause();
    a.send(&query("select 1")).await;
    assert_eq!(a.error().await.0, "57P03");
}

/// Two kinds of clients (their start-up parameters differ) and no backend open: what is opened is for who waits first,
/// and nobody's backend is closed to open another like it.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_two_shapes_that_come_at_once_are_all_served() {
    let front = Arc::new(with(Pool { query_wait: Duration::from_secs(30), ..shared(4) }).await);
    let mut clients = Vec::new();
    for number in 0..13 {
        let zone = if number == 6 { "UTC" } else { "Asia/Tokyo" };
        let mut raw = Raw::connect(&front).await;
        raw.log_in(&[("user", "trusty"), ("database", "app"), ("TimeZone", zone)]).await;
        clients.push(raw);
    }
    for round in 0..25 {
        front.commands.reconnect(Some("app")).expect("closes them all");
        let asking: Vec<_> = clients
            .into_iter()
            .map(|mut raw| {
                tokio::spawn(async move {
                    for _ in 0..4 {
                        let answer = raw.ask(&query("select pg_sleep(0.001)")).await;
                        assert_eq!(answer, "TDCi", "round {round}: it has waited for query_wait");
                    }
                    raw
                })
            })
            .collect();
        clients = Vec::new();
        for task in asking {
            clients.push(task.await.expect("answered"));
        }
    }
}
