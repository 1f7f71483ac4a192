//! What a cut, a lapse and a pause do to sessions and sockets.

use crate::front::{Setup, eventually, open, open_with, shut_with};
use crate::raw::*;
use portcullis::base::time::Instant;
use portcullis::io::clock;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

const REASON: &str = "portcullis: node alp no longer serves (the record moved); the active node is midna (192.0.2.12)";

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_refuses_while_the_gate_is_shut() {
    let front = shut_with(Setup::default()).await;
    let refused = async || {
        TcpStream::connect(front.address).await.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    };
    assert!(refused().await);
    for round in 0..3 {
        front.extend(Duration::from_secs(30));
        front.wait_for_door().await;
        assert_eq!(front.query("trusty", "select 1").await.unwrap(), "1", "round {round}");
        front.gate.cut(REASON);
        eventually("refused after a cut", refused).await;
    }
    front.extend(Duration::from_secs(3));
    front.wait_for_door().await;
    eventually("refused after a lapse", refused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_tells_every_session_why_and_answers_nothing_more() {
    let front = open().await;
    let mut idle = Vec::new();
    for _ in 0..30 {
        idle.push(Raw::trusty(&front).await);
    }
    let mut middle = Raw::trusty(&front).await;
    middle.send(&query("select pg_sleep(5)")).await;
    let mut open_transaction = Raw::trusty(&front).await;
    assert_eq!(open_transaction.ask(&query("begin")).await, "Ct");
    eventually("two are busy", async || front.gate.busy() == 2).await;
    assert_eq!(front.gate.sessions(), 32);
    let pid = middle.pid;
    front.gate.cut(REASON);
    for mut raw in idle.into_iter().chain([middle, open_transaction]) {
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*text, &*before), ("57P01", REASON, ""));
        assert!(raw.is_closed().await);
    }
    eventually("no session is left", async || front.gate.sessions() == 0).await;
    let count = format!("select count(*) from pg_stat_activity where pid = {pid}");
    eventually("the backend ends", async || front.pg.admin(&count).unwrap() == "0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_the_middle_of_a_message_just_closes() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    raw.send(&query("select repeat('x', 64000000)")).await;
    // The row is under way and we do not read it.
    raw.stream.peek(&mut [0; 1]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    front.gate.cut(REASON);
    let mut all = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut raw.stream, &mut all).await;
    assert!(all.len() < 64_000_000, "the row did not end");
    assert!(!all.windows(5).any(|w| w == b"57P01"), "no message inside of a message");
}

/// Milliseconds since 1970, as PostgreSQL counts them.
fn wall_clock() -> i128 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i128::try_from(since.as_millis()).unwrap()
}

/// Writes one after another on a session that is already open and returns when each answer came, and when by its own
/// words PostgreSQL carried it out, in milliseconds since 1970.
async fn answers_until_the_end(raw: &mut Raw) -> (Vec<(Instant, i128)>, Option<String>) {
    let sql = "insert into acks values (1) returning (extract(epoch from clock_timestamp()) * 1000)::bigint";
    let (mut answered, mut executed) = (Vec::new(), 0);
    let mut said = None;
    loop {
        use tokio::io::AsyncWriteExt;
        if raw.stream.write_all(&query(sql)).await.is_err() {
            return (answered, said);
        }
        loop {
            match raw.receive().await {
                None => return (answered, said),
                Some((b'E', body)) => said = portcullis::wire::pg::field(&body, b'C'),
                Some((b'D', body)) => executed = String::from_utf8_lossy(&body[6..]).parse().unwrap(),
                Some((b'C', _)) => answered.push((clock::now(), executed)),
                Some((b'Z', _)) => break,
                Some(_) => {}
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lapse_nobody_announces_ends_all_answers_by_the_deadline() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    assert_eq!(raw.ask(&query("create temp table acks(n int)")).await, "Ci");
    let mut sleeper = Raw::trusty(&front).await;
    sleeper.send(&query("select pg_sleep(6)")).await;
    let mut mute = Raw::trusty(&front).await;
    let (now, wall) = (clock::now(), wall_clock());
    let deadline = front.extend(Duration::from_millis(1500));
    let (answered, said) = answers_until_the_end(&mut raw).await;
    assert!(answered.len() > 5, "it did serve before: {}", answered.len());
    // Nothing that PostgreSQL did after the deadline was answered (10 ms for the reading of two clocks). When a client
    // gets to read what was sent before it is its machine's business, within reason.
    let wall_deadline = wall + i128::try_from(deadline.since(now).as_millis()).unwrap() + 10;
    let late = answered.iter().filter(|(_, executed)| *executed > wall_deadline).count();
    assert_eq!(late, 0, "answers to what was done after the deadline");
    let late = answered.iter().filter(|(at, _)| *at > deadline + Duration::from_secs(1)).count();
    assert_eq!(late, 0, "answers after the deadline");
    assert_eq!(said.as_deref(), Some("57P01"));
    // A query begun before the deadline and answered by PostgreSQL after it is never answered here.
    for session in [&mut sleeper, &mut mute] {
        let (code, text, before) = session.error().await;
        assert_eq!((&*code, &*before), ("57P01", ""));
        assert_eq!(text, "portcullis: node alp no longer serves (its lease ran out)");
        assert!(session.is_closed().await);
    }
}

static SUSPENDED: AtomicU64 = AtomicU64::new(0);

/// CLOCK_BOOTTIME of a machine that was suspended: it jumped, while the timers of the runtime stood still.
fn after_suspend() -> Instant {
    clock::now() + Duration::from_secs(SUSPENDED.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_machine_wakes_up_with_a_shut_gate() {
    let setup = || Setup { clock: after_suspend, ..Setup::default() };
    // An answer that PostgreSQL gives after the wake-up.
    let front = shut_with(setup()).await;
    front.gate.extend(after_suspend() + Duration::from_secs(60));
    front.wait_for_door().await;
    let mut raw = Raw::trusty(&front).await;
    raw.send(&query("select pg_sleep(3)")).await;
    eventually("it sleeps", async || front.gate.busy() == 1).await;
    SUSPENDED.fetch_add(3600, Ordering::SeqCst);
    let (code, _, before) = raw.error().await;
    assert_eq!((&*code, &*before), ("57P01", ""), "nothing passes down");
    // A question that comes after the wake-up; the clock jumps on for the new gate.
    let front = shut_with(setup()).await;
    front.gate.extend(after_suspend() + Duration::from_secs(60));
    front.wait_for_door().await;
    let mut raw = Raw::trusty(&front).await;
    assert_eq!(raw.ask(&query("create sequence touched")).await, "Ci");
    SUSPENDED.fetch_add(3600, Ordering::SeqCst);
    raw.send(&query("select nextval('touched')")).await;
    let (code, _, before) = raw.error().await;
    assert_eq!((&*code, &*before), ("57P01", ""));
    let touched = front.pg.admin("\\c app\nselect is_called from touched; drop sequence touched").unwrap();
    assert_eq!(touched, "f", "nothing passes up");
    // Nor does a login begin, nor a cancel request pass.
    let refused = TcpStream::connect(front.address).await.is_err();
    assert!(refused || front.query("trusty", "select 1").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_opens_again_revives_no_session() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    front.gate.cut(REASON);
    front.extend(Duration::from_secs(30));
    let (code, ..) = raw.error().await;
    assert_eq!(code, "57P01");
    front.wait_for_door().await;
    assert_eq!(front.query("trusty", "select 1").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn prolonging_disturbs_nobody() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    for _ in 0..20 {
        front.extend(Duration::from_secs(5));
        assert_eq!(raw.ask(&query("select pg_sleep(0.05)")).await, "TDCi");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_at_the_boundary_and_resume_lets_go() {
    let front = open().await;
    let mut idle = Raw::trusty(&front).await;
    let mut busy = Raw::trusty(&front).await;
    assert_eq!(busy.ask(&query("begin")).await, "Ct");
    front.gate.pause();
    // Inside a transaction everything goes on, to its end.
    assert_eq!(busy.ask(&query("select 1")).await, "TDCt");
    assert_eq!(busy.ask(&query("commit")).await, "Ci");
    idle.send(&query("select 2")).await;
    busy.send(&query("select 3")).await;
    let newcomer = front.query("trusty", "select 4");
    tokio::pin!(newcomer);
    let held = tokio::time::timeout(Duration::from_millis(300), &mut newcomer).await;
    assert!(held.is_err(), "a new client waits");
    assert!(idle.is_silent_for(Duration::from_millis(50)).await && busy.is_silent_for(Duration::from_millis(50)).await);
    assert_eq!(front.gate.busy(), 0);
    front.gate.resume();
    assert_eq!(idle.until_ready().await, "TDCi");
    assert_eq!(busy.until_ready().await, "TDCi");
    assert_eq!(newcomer.await.unwrap(), "4");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_held_longer_than_query_wait_and_nobody_who_wants_nothing() {
    let front = open_with(Setup { query_wait: Duration::from_millis(400), ..Setup::default() }).await;
    let mut wants = Raw::trusty(&front).await;
    let mut content = Raw::trusty(&front).await;
    front.gate.pause();
    wants.send(&query("select 1")).await;
    let (code, text, _) = wants.error().await;
    assert_eq!(code, "57P03");
    assert!(text.contains("paused and did not resume within 400ms"), "{text}");
    let mut newcomer = Raw::connect(&front).await;
    newcomer.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert_eq!(newcomer.error().await.0, "57P03");
    front.gate.resume();
    assert_eq!(content.ask(&query("select 1")).await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_ends_sessions_at_their_boundary_only() {
    let front = open().await;
    let mut idle = Raw::trusty(&front).await;
    let mut held = Raw::trusty(&front).await;
    let mut busy = Raw::trusty(&front).await;
    assert_eq!(busy.ask(&query("begin")).await, "Ct");
    front.gate.pause();
    held.send(&query("select 1")).await;
    front.gate.end_sessions_at_boundary("portcullis: switched over");
    for raw in [&mut idle, &mut held] {
        let (code, text, _) = raw.error().await;
        assert_eq!((&*code, &*text), ("57P01", "portcullis: switched over"));
    }
    assert_eq!(busy.ask(&query("select 1")).await, "TDCt");
    busy.send(&query("commit")).await;
    assert_eq!(busy.error().await.2, "CZ", "the commit is answered, then the session ends");
    front.gate.resume();
    assert_eq!(front.query("trusty", "select 1").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn show_pool_nodes_is_answered_by_the_gate() {
    let front = open().await;
    let mut psql = front.psql("trusty", "", "show POOL_NODES ;");
    let rows = crate::front::output(psql.args(["-F,"])).await.unwrap();
    assert_eq!(
        rows,
        "0,192.0.2.11,5432,up,up,0.500000,primary,primary,0,true,0,,,2026-11-20 15:21:12\n\
         1,192.0.2.12,5432,up,up,0.500000,standby,standby,0,false,120,streaming,sync,2026-11-20 15:21:12"
    );
    let mut psql = front.psql("trusty", "", "show pool_nodes");
    let with_head =
        crate::front::output(psql.args(["-F,", "-P", "tuples_only=off", "-P", "footer=off"])).await.unwrap();
    assert_eq!(
        with_head.lines().next().unwrap(),
        "node_id,hostname,port,status,pg_status,lb_weight,role,pg_role,select_cnt,load_balance_node,replication_delay,\
         replication_state,replication_sync_state,last_status_change"
    );
    let mut raw = Raw::trusty(&front).await;
    // In pieces, and between other queries; in a transaction the status stays.
    let show = query("SHOW pool_nodes;");
    raw.send(&show[..9]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(raw.ask(&show[9..]).await, "TDDCi");
    assert_eq!(raw.ask(&query("begin")).await, "Ct");
    assert_eq!(raw.ask(&show).await, "TDDCt");
    assert_eq!(raw.ask(&query("show nonsense")).await, "Ee", "all else is PostgreSQL's");
}

/// `fence.kernel_gate`: at the end of the lease the kernel stops passing our words, so a client that waits for an
/// answer would wait for ever; only a reset still gets through. A cut before that is told as ever.
#[tokio::test(flavor = "multi_thread")]
async fn behind_the_kernel_gate_a_lapse_is_a_reset() {
    let front = shut_with(Setup::default()).await;
    front.gate.stand_behind_the_wall();
    front.extend(Duration::from_secs(6));
    front.wait_for_door().await;
    let mut waiting = Raw::trusty(&front).await;
    waiting.send(&query("select pg_sleep(60)")).await;
    let mut idle = Raw::trusty(&front).await;
    eventually("one is busy", async || front.gate.busy() == 1).await;
    for client in [&mut waiting, &mut idle] {
        let end = tokio::time::timeout(Duration::from_secs(30), client.stream.read_u8()).await.expect("it hangs");
        assert_eq!(end.expect_err("a word that the kernel gate would have eaten").kind(), ErrorKind::ConnectionReset);
    }

    front.extend(Duration::from_secs(3600));
    front.wait_for_door().await;
    let mut told = Raw::trusty(&front).await;
    told.send(&query("select pg_sleep(60)")).await;
    eventually("it is busy", async || front.gate.busy() == 1).await;
    front.gate.cut(REASON);
    assert_eq!(told.error().await.1, REASON);
}
