//! `pause`, `resume`, `reconnect` and `kill` of one database, and limits that change while clients are there.

use crate::front::{Front, Setup, eventually, free_port, open_with, shut_with};
use crate::raw::*;
use portcullis::base::config::{Pool, PoolMode};
use portcullis::base::tally::Times;
use portcullis::engine::status::Role;
use portcullis::serve::listener::Doors;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;

fn setup(mode: PoolMode) -> Setup {
    Setup { pool: Pool { mode, size: 3, threads: 2, ..Pool::default() }, ..Setup::default() }
}

async fn in_database(front: &Front, database: &str) -> Raw {
    let mut raw = Raw::connect(front).await;
    raw.log_in(&[("user", "trusty"), ("database", database)]).await;
    raw
}

/// Backends of this gate's role in a database.
fn backends(front: &Front, database: &str) -> String {
    let sql = format!(
        "select count(*) from pg_stat_activity where usename = 'trusty' and datname = '{database}' and \
         client_addr is null"
    );
    front.pg.admin(&sql).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_database_is_held_at_its_boundary_and_the_others_go_on() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = open_with(setup(mode)).await;
        let (mut a, mut b) = (in_database(&front, "app").await, in_database(&front, "postgres").await);
        assert_eq!(a.ask(&query("begin")).await, "Ct");
        let pausing = {
            let commands = front.commands.clone();
            tokio::spawn(async move { commands.pause("app").await.unwrap() })
        };
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!pausing.is_finished(), "one is in a transaction");
        assert_eq!(a.ask(&query("select 1")).await, "TDCt", "which goes on");
        assert_eq!(a.ask(&query("commit")).await, "Ci");
        assert_eq!(pausing.await.unwrap(), 0);
        a.send(&query("select 2")).await;
        let mut late = Raw::connect(&front).await;
        late.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
        assert!(a.is_silent_for(Duration::from_millis(200)).await, "held");
        assert!(late.is_silent_for(Duration::from_millis(10)).await, "held before its login");
        assert_eq!(b.ask(&query("select 1")).await, "TDCi", "another database");
        assert!(front.commands.resume("app").unwrap());
        assert!(!front.commands.resume("app").unwrap());
        assert_eq!(a.until_ready().await, "TDCi");
        assert!(late.until_ready().await.ends_with('i'));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_held_for_too_long_is_told_and_who_leaves_is_gone() {
    let front = open_with(Setup { query_wait: Duration::from_secs(8), ..setup(PoolMode::Transaction) }).await;
    let (mut a, mut b) = (in_database(&front, "app").await, in_database(&front, "app").await);
    assert_eq!(front.commands.pause("app").await, Ok(0));
    a.send(&query("select 1")).await;
    b.send(&query("select 1")).await;
    drop(b);
    // Not only by its time-out, with which the other would go as well.
    eventually("the one that left is gone", async || front.gate.sessions() == 1).await;
    assert!(a.is_silent_for(Duration::from_millis(10)).await, "the other is held still");
    let (code, text, _) = a.error().await;
    assert_eq!(code, "57P03");
    assert!(text.contains("did not resume within 8s"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnect_closes_idle_backends_at_once_and_others_when_they_come_back() {
    let front = open_with(setup(PoolMode::Transaction)).await;
    let (mut a, mut b) = (in_database(&front, "app").await, in_database(&front, "app").await);
    a.ask(&query("begin")).await;
    b.ask(&query("begin")).await;
    b.ask(&query("commit")).await;
    let first = value(&mut a, "select pg_backend_pid()").await;
    eventually("one idle, one used", async || {
        front.commands.figures().iter().any(|row| row.database == "app" && (row.open, row.idle) == (2, 1))
    })
    .await;
    assert_eq!(front.commands.reconnect(Some("app")), Ok((1, 1)));
    eventually("the idle one is closed", async || backends(&front, "app") == "1").await;
    assert_eq!(value(&mut a, "select pg_backend_pid()").await, first, "amid a transaction nothing changes");
    a.ask(&query("commit")).await;
    assert_ne!(value(&mut a, "select pg_backend_pid()").await, first);
    assert_eq!(value(&mut b, "select 1").await, "1");
    assert!(front.commands.reconnect(None).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnect_lets_a_session_keep_its_backend_to_its_end() {
    let front = open_with(setup(PoolMode::Session)).await;
    let mut a = in_database(&front, "app").await;
    let first = value(&mut a, "select pg_backend_pid()").await;
    front.commands.reconnect(Some("app")).unwrap();
    assert_eq!(value(&mut a, "select pg_backend_pid()").await, first);
    a.send(&message(b'X', b"")).await;
    eventually("closed at its end", async || backends(&front, "app") == "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_ends_the_sessions_of_one_database_and_welcomes_new_ones() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = open_with(setup(mode)).await;
        let (mut idle, mut busy) = (in_database(&front, "app").await, in_database(&front, "app").await);
        let mut other = in_database(&front, "postgres").await;
        idle.ask(&query("select 1")).await;
        busy.ask(&query("begin")).await;
        busy.send(&query("select pg_sleep(5)")).await;
        eventually("it sleeps", async || front.gate.busy() == 1).await;
        assert_eq!(front.commands.kill("app").await, Ok((2, 0)));
        for client in [&mut idle, &mut busy] {
            let (code, text, _) = client.error().await;
            assert_eq!(code, "57P01");
            assert!(text.contains("kill"), "{text}");
            assert!(client.is_closed().await);
        }
        eventually("their backends are closed", async || backends(&front, "app") == "0").await;
        assert_eq!(other.ask(&query("select 1")).await, "TDCi");
        let mut new = in_database(&front, "app").await;
        assert_eq!(new.ask(&query("select 1")).await, "TDCi");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_ends_statements_that_run_but_no_commit_that_waits_for_its_standby() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let front = open_with(setup(mode)).await;
        let (mut asleep, mut commits) = (in_database(&front, "app").await, in_database(&front, "app").await);
        let mut other = in_database(&front, "postgres").await;
        commits.ask(&query("create table killed(n int)")).await;
        let mut pids = Vec::new();
        for client in [&mut asleep, &mut commits, &mut other] {
            client.ask(&query("begin")).await;
            pids.push(value(client, "select pg_backend_pid()").await);
        }
        commits.ask(&query("set local synchronous_commit = on; insert into killed values (1)")).await;
        asleep.send(&query("select pg_sleep(300)")).await;
        commits.send(&query("commit")).await;
        other.send(&query("select pg_sleep(2)")).await;
        let waits = |pid: &str| {
            let event = format!("select coalesce(wait_event, '') from pg_stat_activity where pid = {pid}");
            front.pg.admin(&event).unwrap()
        };
        for (pid, event) in pids.iter().zip(["PgSleep", "SyncRep", "PgSleep"]) {
            eventually("it waits", async || waits(pid) == event).await;
        }
        assert_eq!(front.commands.kill("app").await, Ok((2, 0)));
        for client in [&mut asleep, &mut commits] {
            assert_eq!(client.error().await.0, "57P01");
        }
        let is_there = |pid: &str| {
            front.pg.admin(&format!("select count(*) from pg_stat_activity where pid = {pid}")).unwrap() == "1"
        };
        eventually("the statement ends", async || !is_there(&pids[0])).await;
        assert_eq!(waits(&pids[1]), "SyncRep", "R4: the commit waits on");
        assert_eq!(other.until_ready().await, "TDCt", "another database's is left alone");
        front.pg.admin(&format!("select pg_cancel_backend({})", pids[1])).unwrap();
        eventually("and then ends", async || !is_there(&pids[1])).await;
        front.pg.admin("\\c app\ndrop table killed").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_nobody_came_to_is_an_error_that_names_the_others() {
    let front = open_with(setup(PoolMode::Transaction)).await;
    let text = front.commands.pause("app").await.unwrap_err().to_string();
    assert!(text.contains("database app") && text.contains("there is none yet"), "{text}");
    let _a = in_database(&front, "app").await;
    let text = front.commands.kill("shop").await.unwrap_err().to_string();
    assert!(text.contains("database shop") && text.ends_with("name app"), "{text}");
    assert!(front.commands.resume("shop").is_err() && front.commands.reconnect(Some("shop")).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_limits_hold_from_then_on_for_clients_that_are_there() {
    let front = open_with(setup(PoolMode::Transaction)).await;
    let (mut a, mut b) = (in_database(&front, "app").await, in_database(&front, "app").await);
    let pool = Pool {
        size: 1,
        query_wait: Duration::from_millis(500),
        max_clients: 2,
        threads: 7,
        mode: PoolMode::Session,
        ..Pool::default()
    };
    front.commands.set_limits(pool);
    assert_eq!((front.commands.limits().threads, front.commands.limits().mode), (2, PoolMode::Transaction));
    let mut c = Raw::connect(&front).await;
    c.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert_eq!(c.error().await.0, "53300");
    a.ask(&query("begin")).await;
    b.send(&query("select 1")).await;
    let (code, text, _) = b.error().await;
    assert_eq!(code, "53300");
    assert!(text.contains("within 500ms"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_transactions_and_waits_are_counted_with_their_times() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let pool = Pool { mode, size: 1, threads: 2, ..Pool::default() };
        let front = open_with(Setup { pool, ..Setup::default() }).await;
        let mut a = in_database(&front, "app").await;
        let before = front.commands.latencies();
        for sql in ["begin", "select pg_sleep(0.3)", "select 1 / 0"] {
            a.ask(&query(sql)).await;
        }
        // What the client does meanwhile belongs to the transaction.
        tokio::time::sleep(Duration::from_millis(300)).await;
        a.ask(&query("rollback")).await;
        a.ask(&query("select 1")).await;
        let figures = || front.commands.figures().into_iter().find(|pool| pool.user == "trusty").unwrap();
        eventually("both are counted", async || (figures().queries, figures().ended) == (5, 2)).await;
        let now = front.commands.latencies();
        let of = |now: &Times, before: &Times| (now.count() - before.count(), now.sum_us - before.sum_us);
        let (queries, transactions) = (of(&now.queries, &before.queries), of(&now.transactions, &before.transactions));
        assert_eq!((queries.0, transactions.0), (5, 2), "{mode:?}");
        assert!(queries.1 >= 300_000 && transactions.1 >= 600_000, "{mode:?}: {queries:?} {transactions:?}");
        assert!(transactions.1 - queries.1 >= 250_000, "{mode:?}: {queries:?} {transactions:?}");

        // Somebody has to wait for the one connection.
        let waits = (now.waits.clone(), figures().waits);
        if mode == PoolMode::Transaction {
            let mut b = in_database(&front, "app").await;
            a.ask(&query("begin")).await;
            b.send(&query("select 1")).await;
            assert!(b.is_silent_for(Duration::from_millis(300)).await, "it waits");
            a.ask(&query("commit")).await;
            b.until_ready().await;
            let now = front.commands.latencies().waits;
            let (count, sum) = of(&now, &waits.0);
            assert!(count == 1 && figures().waits == waits.1 + 1, "{count} waits, {:?}", figures());
            assert!((300_000..60_000_000).contains(&sum), "waited for {sum} us");
        }
    }
}

/// What the service manager keeps.
static KEPT: Mutex<Vec<TcpListener>> = Mutex::new(Vec::new());

fn keep(socket: BorrowedFd<'_>) {
    KEPT.lock().unwrap().push(socket.try_clone_to_owned().unwrap().into());
}

/// A copy of what it keeps of this address: it has it still.
fn kept(address: SocketAddr) -> Option<TcpListener> {
    let kept = KEPT.lock().unwrap();
    kept.iter().find(|socket| socket.local_addr().unwrap() == address).map(|socket| socket.try_clone().unwrap())
}

async fn is_refused(address: SocketAddr) -> bool {
    TcpStream::connect(address).await.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_ends_lets_transactions_finish_and_clients_wait_for_the_next() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let doors = Doors { keep: Some(keep), ..Doors::default() };
        let front = open_with(Setup { doors, ..setup(mode) }).await;
        let address = front.address;
        let (mut idle, mut busy) = (in_database(&front, "app").await, in_database(&front, "app").await);
        let mut silent = Raw::connect(&front).await;
        assert_eq!(busy.ask(&query("begin")).await, "Ct");
        front.gate.stop("portcullis: the end");
        let (code, text, _) = idle.error().await;
        assert_eq!((&*code, &*text), ("57P01", "portcullis: the end"));
        eventually("the socket is handed over", async || kept(address).is_some() && !front.gate.is_listening()).await;
        let mut late = Raw::connect(&front).await;
        late.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
        assert_eq!(busy.ask(&query("select 1")).await, "TDCt", "the transaction goes on");
        front.gate.resume();
        assert!(!front.gate.is_deserted(), "{mode:?}: a transaction is open");
        busy.send(&query("commit")).await;
        let (code, text, before) = busy.error().await;
        assert_eq!((&*code, &*text, &*before), ("57P01", "portcullis: the end", "CZ"), "answered first");
        assert!(silent.is_closed().await);
        drop((idle, busy));
        eventually("everybody has left", async || front.gate.is_deserted()).await;
        drop(front);

        let doors = Doors { inherited: vec![kept(address).unwrap()], keep: None };
        let next = shut_with(Setup { doors, ..setup(mode) }).await;
        assert_eq!(next.address, address);
        assert!(late.is_silent_for(Duration::from_millis(300)).await, "nothing passes a gate that is not open");
        next.extend(Duration::from_secs(60));
        assert!(late.until_ready().await.ends_with('i'));
        assert_eq!(late.ask(&query("select 1")).await, "TDCi");
        // The service manager is slow and has its copy still: a gate that is cut refuses all the same.
        next.gate.cut("cut");
        eventually("the kernel refuses", async || is_refused(address).await).await;
        next.extend(Duration::from_secs(60));
        next.wait_for_door().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_is_not_kept_for_a_gate_that_cannot_open() {
    let listening = || {
        let socket = TcpListener::bind(("127.0.0.1", free_port())).unwrap();
        // The service manager's.
        (socket.try_clone().unwrap(), socket)
    };
    let (_copy, socket) = listening();
    let doors = Doors { inherited: vec![socket], keep: None };
    let front = shut_with(Setup { doors, ..setup(PoolMode::Session) }).await;
    let mut waiting = Raw::connect(&front).await;
    assert!(waiting.is_silent_for(Duration::from_millis(300)).await, "it may still open");
    front.snapshot.send_modify(|snapshot| Arc::make_mut(snapshot).role = Role::Fenced);
    eventually("the kernel refuses", async || is_refused(front.address).await).await;
    assert!(waiting.is_closed().await);

    let (_copy, socket) = listening();
    let address = socket.local_addr().unwrap();
    assert!(TcpStream::connect(address).await.is_ok());
    let (_other_copy, own) = listening();
    let doors = Doors { inherited: vec![own, socket], keep: None };
    let front = shut_with(Setup { doors, ..setup(PoolMode::Session) }).await;
    eventually("an address of before is closed", async || is_refused(address).await).await;
    assert!(TcpStream::connect(front.address).await.is_ok(), "its own is not");
}
