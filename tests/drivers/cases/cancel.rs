//! Cancel requests at any moment, byte by byte; and that none ever hits another client's query.

use super::{logged_in, raw, until_active};
use crate::raw::{Raw, SYNC, extended, message, query};
use crate::suite::{Case, Target, case};
use portcullis::wire::pg::{cancel_request, field};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Cancels sent at clients that have just become idle.
const LATE: u32 = 300;

pub fn cases() -> Vec<Case> {
    vec![
        case!(during_a_query),
        case!(during_an_extended_query),
        case!(during_a_transaction),
        case!(during_copy_in),
        case!(during_copy_out),
        case!(during_copy_in_of_the_extended_protocol),
        case!(in_the_middle_of_a_pipeline),
        case!(before_the_answer_is_read),
        case!(when_idle),
        case!(after_the_session_ended),
        case!(with_a_wrong_key),
        case!(with_no_key_or_a_long_one),
        case!(twice_at_once),
        case!(while_waiting_for_a_lock),
        case!(a_late_one_hits_no_other_client, 180),
    ]
}

/// Sends a cancel request; waits until whoever took it has closed.
async fn cancel(target: &Target, pid: i32, key: &[u8]) {
    let mut raw = raw(target).await;
    raw.send(&cancel_request(pid, key)).await;
    assert!(raw.is_closed().await, "an answer to a cancel request");
}

/// The next error must be 57014.
async fn is_cancelled(raw: &mut Raw) {
    let (code, text, before) = raw.error().await;
    assert_eq!(code, "57014", "{text} after {before}");
}

async fn is_usable(raw: &mut Raw) {
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
}

async fn during_a_query(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    for turn in 0..3 {
        let mark = format!("raw cancel {turn}");
        raw.send(&query(&format!("select pg_sleep(600) -- {mark}"))).await;
        until_active(&target, &mark).await;
        cancel(&target, raw.pid, &key).await;
        is_cancelled(&mut raw).await;
        assert_eq!(raw.until_ready().await, "i");
        is_usable(&mut raw).await;
    }
}

async fn during_an_extended_query(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.send(&extended("select pg_sleep(600) -- raw extended")).await;
    raw.send(&SYNC).await;
    until_active(&target, "raw extended").await;
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn during_a_transaction(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    assert_eq!(raw.ask(&query("begin")).await, "Ct");
    raw.send(&query("select pg_sleep(600) -- raw tx")).await;
    until_active(&target, "raw tx").await;
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "e");
    assert_eq!(raw.ask(&query("rollback")).await, "Ci");
    is_usable(&mut raw).await;
}

async fn during_copy_in(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.ask(&query("create table if not exists into_here(t text)")).await;
    raw.send(&query("copy into_here from stdin")).await;
    assert_eq!(raw.receive().await.unwrap().0, b'G');
    raw.send(&message(b'd', b"one\ntwo\n")).await;
    cancel(&target, raw.pid, &key).await;
    // PostgreSQL looks up at the next data.
    raw.send(&message(b'd', b"three\n")).await;
    is_cancelled(&mut raw).await;
    // What the client had under way is swallowed.
    raw.send(&message(b'd', b"four\n")).await;
    raw.send(&message(b'c', b"")).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn during_copy_in_of_the_extended_protocol(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.ask(&query("create table if not exists into_there(t text)")).await;
    raw.send(&extended("copy into_there from stdin")).await;
    raw.send(&message(b'H', b"")).await;
    let mut kinds = String::new();
    while !kinds.ends_with('G') {
        kinds.push(char::from(raw.receive().await.expect("CopyInResponse").0));
    }
    cancel(&target, raw.pid, &key).await;
    raw.send(&message(b'd', b"one\n")).await;
    is_cancelled(&mut raw).await;
    raw.send(&message(b'd', b"two\n")).await;
    raw.send(&message(b'c', b"")).await;
    raw.send(&SYNC).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn during_copy_out(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.send(&query("copy (select repeat('x', 1000) from generate_series(1, 10000000)) to stdout")).await;
    for _ in 0..100 {
        raw.receive().await.unwrap();
    }
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn in_the_middle_of_a_pipeline(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    let mut pipeline = extended("select 1");
    pipeline.extend(extended("select pg_sleep(600) -- raw pipeline"));
    pipeline.extend(extended("select 2"));
    pipeline.extend(SYNC);
    pipeline.extend(extended("select 3"));
    pipeline.extend(SYNC);
    raw.send(&pipeline).await;
    until_active(&target, "raw pipeline").await;
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    // The rest up to the Sync is skipped, what is behind it is not.
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.until_ready().await, "12DCi");
    is_usable(&mut raw).await;
}

async fn before_the_answer_is_read(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.send(&query("select repeat('x', 1000) from generate_series(1, 1000000)")).await;
    // It waits for us to read, then for the cancel.
    tokio::time::sleep(Duration::from_millis(100)).await;
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn when_idle(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    is_usable(&mut raw).await;
    cancel(&target, raw.pid, &key).await;
    // PostgreSQL ignores it when it looks up; the next query is not to be hit once it has.
    tokio::time::sleep(Duration::from_secs(1)).await;
    is_usable(&mut raw).await;
    assert_eq!(raw.ask(&query("select pg_sleep(0.2)")).await, "TDCi");
}

async fn after_the_session_ended(target: Arc<Target>) {
    let (raw, key) = logged_in(&target).await;
    let pid = raw.pid;
    drop(raw);
    let (mut other, _) = logged_in(&target).await;
    other.send(&query("select pg_sleep(0.3)")).await;
    cancel(&target, pid, &key).await;
    assert_eq!(other.until_ready().await, "TDCi");
}

/// Runs a query that lasts until its first client commits; then the second has its answer.
async fn held(target: &Arc<Target>, mark: &str) -> (Raw, Raw, Vec<u8>) {
    let (mut holder, _) = logged_in(target).await;
    let (mut raw, key) = logged_in(target).await;
    assert_eq!(holder.ask(&query("begin; select pg_advisory_xact_lock(1)")).await, "CTDCt");
    raw.send(&query(&format!("select pg_advisory_xact_lock(1) -- {mark}"))).await;
    until_active(target, mark).await;
    (holder, raw, key)
}

async fn with_a_wrong_key(target: Arc<Target>) {
    let (mut holder, mut raw, key) = held(&target, "raw wrong").await;
    let wrong: Vec<u8> = key.iter().map(|byte| byte ^ 0x55).collect();
    cancel(&target, raw.pid, &wrong).await;
    cancel(&target, raw.pid + 1, &key).await;
    assert_eq!(holder.ask(&query("commit")).await, "Ci");
    assert_eq!(raw.until_ready().await, "TDCi");
}

async fn with_no_key_or_a_long_one(target: Arc<Target>) {
    let (mut holder, mut raw, key) = held(&target, "raw odd").await;
    for odd in [&[][..], &key[..3], &[key.clone(), key.clone()].concat(), &[7; 256], &[7; 5000]] {
        let mut sender = super::raw(&target).await;
        sender.send(&cancel_request(raw.pid, odd)).await;
        // Refused or ignored, with a word or without.
        while sender.receive().await.is_some() {}
    }
    assert_eq!(holder.ask(&query("commit")).await, "Ci");
    assert_eq!(raw.until_ready().await, "TDCi");
}

async fn twice_at_once(target: Arc<Target>) {
    let (mut raw, key) = logged_in(&target).await;
    raw.send(&query("select pg_sleep(600) -- raw twice")).await;
    until_active(&target, "raw twice").await;
    tokio::join!(cancel(&target, raw.pid, &key), cancel(&target, raw.pid, &key), cancel(&target, raw.pid, &key));
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "i");
    is_usable(&mut raw).await;
}

async fn while_waiting_for_a_lock(target: Arc<Target>) {
    let (mut holder, _) = logged_in(&target).await;
    let (mut raw, key) = logged_in(&target).await;
    holder.ask(&query("create table if not exists locked(a int)")).await;
    assert_eq!(holder.ask(&query("begin; lock table locked")).await, "CCt");
    raw.send(&query("select * from locked -- raw lock")).await;
    until_active(&target, "raw lock").await;
    cancel(&target, raw.pid, &key).await;
    is_cancelled(&mut raw).await;
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(holder.ask(&query("commit")).await, "Ci");
}

/// Reads to ReadyForQuery; whether the query was cancelled. No other error is right. `None`: the session ended by it,
/// as a pool ends one whose query is cancelled while it waits for a backend.
async fn settle(raw: &mut Raw) -> Option<bool> {
    let mut cancelled = false;
    loop {
        match raw.receive().await {
            Some((b'E', body)) => {
                let code = field(&body, b'C').unwrap();
                assert_eq!(code, "57014", "{:?}", field(&body, b'M'));
                cancelled = true;
            }
            Some((b'Z', _)) => return Some(cancelled),
            Some(_) => {}
            None if cancelled => return None,
            None => panic!("closed without a word"),
        }
    }
}

/// Clients whose transactions have just ended are cancelled again and again; others work all the time, in a pool on the
/// very backends. None of those is ever hit.
async fn a_late_one_hits_no_other_client(target: Arc<Target>) {
    let (over, hits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let mut bystanders = Vec::new();
    for _ in 0..4 {
        let (target, over, hits) = (Arc::clone(&target), Arc::clone(&over), Arc::clone(&hits));
        bystanders.push(tokio::spawn(async move {
            let (mut raw, _) = logged_in(&target).await;
            let mut done = 0;
            while !over.load(Ordering::SeqCst) {
                raw.send(&query("select pg_sleep(0.002)")).await;
                if settle(&mut raw).await != Some(false) {
                    hits.fetch_add(1, Ordering::SeqCst);
                }
                done += 1;
            }
            done
        }));
    }
    let (mut raw, mut key) = logged_in(&target).await;
    // So that it does not wait for a new backend below.
    is_usable(&mut raw).await;
    for turn in 0..LATE {
        let cancelling = {
            let (target, pid, key) = (Arc::clone(&target), raw.pid, key.clone());
            tokio::spawn(async move {
                // Now before, now at, now after the end of the query.
                tokio::time::sleep(Duration::from_micros(u64::from(turn % 40) * 100)).await;
                cancel(&target, pid, &key).await;
            })
        };
        raw.send(&query("select pg_sleep(0.001)")).await;
        let ended = settle(&mut raw).await.is_none();
        cancelling.await.unwrap();
        if ended {
            (raw, key) = logged_in(&target).await;
        }
    }
    over.store(true, Ordering::SeqCst);
    for bystander in bystanders {
        assert!(bystander.await.unwrap() > 20, "a bystander starved");
    }
    assert_eq!(hits.load(Ordering::SeqCst), 0, "other clients' queries were cancelled");
}
