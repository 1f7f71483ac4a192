//! Cancel requests, and R4: a cancelled wait for the standby must not look like a success.

use crate::front::{Front, eventually, open};
use crate::raw::*;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_reaches_the_right_backend() {
    let front = open().await;
    let client = front.client("app").await;
    let other = front.client("app").await;
    let token = client.cancel_token();
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let (slept, _, calm) = tokio::join!(
        client.simple_query("select pg_sleep(30)"),
        async {
            // That the gate is busy does not say that PostgreSQL has begun.
            front.wait_until_asleep(pid).await;
            token.cancel_query(tokio_postgres::NoTls).await.unwrap();
        },
        other.simple_query("select pg_sleep(5)"),
    );
    assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");
    assert!(calm.is_ok());
    client.simple_query("select 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_with_a_wrong_key_reaches_nobody() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    raw.send(&query("select pg_sleep(0.5)")).await;
    let mut wrong = Raw::connect(&front).await;
    wrong.send(&portcullis::wire::pg::cancel_request(raw.pid, &[1, 2, 3, 4])).await;
    assert!(wrong.is_closed().await);
    assert_eq!(raw.until_ready().await, "TDCi");
    assert_eq!(front.asked.load(Ordering::SeqCst), 0, "nobody is in doubt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_may_cancel_what_is_busy() {
    let front = open().await;
    let mut busy = Raw::trusty(&front).await;
    let mut idle = Raw::trusty(&front).await;
    busy.send(&query("select pg_sleep(30)")).await;
    front.wait_until_asleep(busy.pid).await;
    front.gate.cancel_busy();
    assert_eq!(busy.error().await.0, "57014");
    assert_eq!(busy.until_ready().await, "i");
    assert_eq!(idle.ask(&query("select 1")).await, "TDCi");
}

/// A session whose insert waits for a standby that does not exist.
async fn waiting_insert(front: &Front, table: &str, quiet: bool) -> Raw {
    let mut raw = Raw::trusty(front).await;
    assert_eq!(raw.ask(&query(&format!("create table {table}(n int)"))).await, "Ci");
    assert!(raw.ask(&query("set synchronous_commit = on")).await.ends_with("Ci"));
    if quiet {
        assert!(raw.ask(&query("set client_min_messages = error")).await.ends_with("Ci"));
    }
    raw.send(&query(&format!("insert into {table} values (1)"))).await;
    let waits = format!("select count(*) from pg_stat_activity where pid = {} and wait_event = 'SyncRep'", raw.pid);
    eventually("it waits for the standby", async || front.pg.admin(&waits).unwrap() == "1").await;
    raw
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_commit_is_held_until_the_peer_has_it() {
    let front = open().await;
    let mut raw = waiting_insert(&front, "held_commit", true).await;
    front.confirmed.store(false, Ordering::SeqCst);
    assert_eq!(front.asked.load(Ordering::SeqCst), 0);
    front.gate.cancel_busy();
    eventually("the peer is asked", async || front.asked.load(Ordering::SeqCst) > 2).await;
    assert!(raw.is_silent_for(Duration::from_millis(300)).await, "no success without the peer");
    front.confirmed.store(true, Ordering::SeqCst);
    assert_eq!(raw.until_ready().await, "Ci");
    // The doubt is over with the command.
    let asked = front.asked.load(Ordering::SeqCst);
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    assert_eq!(front.asked.load(Ordering::SeqCst), asked);
    front.pg.admin("\\c app\ndrop table held_commit").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_of_a_given_up_wait_counts_like_a_cancel() {
    let front = open().await;
    let mut raw = waiting_insert(&front, "given_up", false).await;
    front.confirmed.store(false, Ordering::SeqCst);
    // Around the gate: it sees only the notice.
    front.pg.admin(&format!("select pg_cancel_backend({})", raw.pid)).unwrap();
    let (kind, _) = raw.receive().await.unwrap();
    assert_eq!(kind, b'N');
    assert!(raw.is_silent_for(Duration::from_millis(300)).await, "no success without the peer");
    front.confirmed.store(true, Ordering::SeqCst);
    assert_eq!(raw.until_ready().await, "Ci");
    front.pg.admin("\\c app\ndrop table given_up").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_the_peer_never_confirms_ends_as_outcome_unknown() {
    let front = open().await;
    let mut raw = waiting_insert(&front, "unknown_outcome", true).await;
    front.confirmed.store(false, Ordering::SeqCst);
    front.gate.cancel_busy();
    let (code, text, before) = raw.error().await;
    assert_eq!((&*code, &*before), ("57P01", ""));
    assert!(text.contains("outcome unknown"), "{text}");
    assert!(raw.is_closed().await);
    front.pg.admin("\\c app\ndrop table unknown_outcome").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_gate_ends_no_backend_that_waits_for_its_standby() {
    let front = open().await;
    let raw = waiting_insert(&front, "client_gone", true).await;
    let waits = format!("select count(*) from pg_stat_activity where pid = {} and wait_event = 'SyncRep'", raw.pid);
    drop(raw);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(front.pg.admin(&waits).unwrap(), "1", "it still waits although its client is gone");
    assert_eq!(
        front.pg.admin("\\c app\nselect count(*) from client_gone").unwrap(),
        "0",
        "and shows its row to nobody"
    );
    front.pg.admin(&format!("{}; ", waits.replace("count(*)", "pg_cancel_backend(pid)"))).unwrap();
    eventually("it ends", async || front.pg.admin(&waits).unwrap() == "0").await;
    front.pg.admin("\\c app\ndrop table client_gone").unwrap();
}
