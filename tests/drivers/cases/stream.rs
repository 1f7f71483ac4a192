//! What passes byte by byte: long pipelines nobody reads, big rows, COPY with errors in the middle, odd orders of
//! messages, version negotiation. Memory is the gate process's own.
//!
//! Over 600 lines: a list of cases, each short. What it is NOT: no driver.

use super::{logged_in, raw, until_active};
use crate::raw::{Raw, SYNC, extended, message, query, startup};
use crate::suite::{Case, Target, case};
use portcullis::wire::pg::field;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::OwnedReadHalf;

/// A gate may grow by this much, whatever passes it.
const GROWTH_KIB: u64 = 4 * 1024;
const STATEMENTS: usize = 1_000_000;
const BIG: usize = 100 << 20;
const FLUSH: [u8; 5] = [b'H', 0, 0, 0, 4];

pub fn cases() -> Vec<Case> {
    vec![
        case!(a_million_pipelined_statements_that_nobody_reads, 360),
        case!(a_hundred_thousand_simple_queries_that_nobody_reads, 180),
        case!(a_value_of_a_hundred_megabytes_out, 180),
        case!(a_value_of_a_hundred_megabytes_in, 180),
        case!(a_result_to_a_client_that_does_not_read, 180),
        case!(copy_in_that_fails_while_data_comes, 180),
        case!(copy_in_ended_by_the_client),
        case!(copy_in_and_more_in_one_go),
        case!(copy_in_of_the_extended_protocol_in_one_go),
        case!(copy_in_that_fails_in_a_pipeline),
        case!(copy_out_that_fails),
        case!(copy_messages_outside_of_copy),
        case!(copy_in_refused_because_of_another_message),
        case!(an_error_skips_up_to_the_sync),
        case!(syncs_alone),
        case!(flush_without_sync),
        case!(an_unnamed_statement_used_again),
        case!(an_unnamed_statement_replaced),
        case!(a_named_statement_in_its_life),
        case!(a_portal_taken_in_pieces),
        case!(a_portal_dies_with_its_transaction),
        case!(a_function_call),
        case!(an_empty_query),
        case!(a_message_of_an_unknown_kind),
        case!(a_message_with_an_impossible_length),
        case!(a_message_cut_off),
        case!(a_message_in_single_bytes),
        case!(a_session_left_in_a_transaction),
        case!(protocol_3_2_is_negotiated),
        case!(unknown_protocol_options_are_named),
        case!(protocol_2_and_4_are_refused),
        case!(many_statements_under_many_names, 180),
    ]
}

/// Runs something; the gate must not have grown by more than it may.
async fn bounded(target: &Target, what: impl Future<Output = ()>) {
    let before = target.gate().map(|gate| {
        gate.forget_peak();
        gate.peak_kib()
    });
    what.await;
    if let (Some(gate), Some(before)) = (target.gate(), before) {
        let grown = gate.peak_kib().saturating_sub(before);
        assert!(grown <= GROWTH_KIB, "the gate grew by {grown} KiB");
    }
}

/// Reads messages to the end of so many ReadyForQuery; counts kinds.
async fn read_all(reader: &mut BufReader<OwnedReadHalf>, ready: usize) -> [usize; 256] {
    let mut counts = [0; 256];
    let mut head = [0; 5];
    let mut body = vec![0; 1 << 16];
    while counts[usize::from(b'Z')] < ready {
        reader.read_exact(&mut head).await.unwrap();
        let mut left = usize::try_from(u32::from_be_bytes(head[1..].try_into().unwrap())).unwrap() - 4;
        while left > 0 {
            let piece = left.min(body.len());
            reader.read_exact(&mut body[..piece]).await.unwrap();
            left -= piece;
        }
        counts[usize::from(head[0])] += 1;
    }
    counts
}

/// Writes this so often, reading nothing until writing has stood still for a while; then reads it all.
async fn stuffed(target: &Target, one: &[u8], times: usize, last: &[u8], ready: usize) -> [usize; 256] {
    let (raw, _) = logged_in(target).await;
    let (reader, mut writer) = raw.stream.into_split();
    let batch = one.repeat(100);
    let written = Arc::new(AtomicU64::new(0));
    let (progress, last) = (Arc::clone(&written), last.to_owned());
    let writing = tokio::spawn(async move {
        for _ in 0..times / 100 {
            writer.write_all(&batch).await.unwrap();
            progress.fetch_add(1, Ordering::SeqCst);
        }
        writer.write_all(&last).await.unwrap();
        writer
    });
    let mut before = u64::MAX;
    while !writing.is_finished() && before != written.load(Ordering::SeqCst) {
        before = written.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(!writing.is_finished(), "everything was taken although nothing was read: it lies somewhere");
    let counts = read_all(&mut BufReader::with_capacity(1 << 16, reader), ready).await;
    writing.await.unwrap();
    counts
}

async fn a_million_pipelined_statements_that_nobody_reads(target: Arc<Target>) {
    bounded(&target, async {
        let counts = stuffed(&target, &extended("select 1"), STATEMENTS, &SYNC, 1).await;
        assert_eq!(counts[usize::from(b'C')], STATEMENTS);
        assert_eq!(counts[usize::from(b'E')], 0);
    })
    .await;
}

async fn a_hundred_thousand_simple_queries_that_nobody_reads(target: Arc<Target>) {
    bounded(&target, async {
        let counts =
            stuffed(&target, &query(&format!("select repeat('x', 1000) -- {:300}", "")), 100_000, b"", 100_000).await;
        assert_eq!(counts[usize::from(b'D')], 100_000);
    })
    .await;
}

async fn a_value_of_a_hundred_megabytes_out(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    bounded(&target, async {
        raw.send(&query(&format!("select repeat('v', {BIG}), 'end'"))).await;
        assert_eq!(raw.receive().await.unwrap().0, b'T');
        let (kind, row) = raw.receive().await.unwrap();
        assert_eq!((kind, row.len()), (b'D', 2 + 4 + BIG + 4 + 3));
        assert!(row[6..6 + BIG].iter().all(|byte| *byte == b'v') && row.ends_with(b"end"));
        assert_eq!(raw.until_ready().await, "Ci");
    })
    .await;
}

async fn a_value_of_a_hundred_megabytes_in(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    bounded(&target, async {
        let parse = message(b'P', b"\0select length($1::text), md5($1::text)\0\0\0");
        let mut bind = b"\0\0\0\0\0\x01".to_vec();
        bind.extend(u32::try_from(BIG).unwrap().to_be_bytes());
        bind.resize(bind.len() + BIG, b'w');
        bind.extend(b"\0\0");
        let all = [parse, message(b'B', &bind), message(b'E', b"\0\0\0\0\0"), SYNC.to_vec()].concat();
        raw.send(&all).await;
        assert_eq!(raw.receive().await.unwrap().0, b'1');
        assert_eq!(raw.receive().await.unwrap().0, b'2');
        let (_, row) = raw.receive().await.unwrap();
        assert_eq!(&row[6..15], BIG.to_string().as_bytes());
        assert_eq!(raw.until_ready().await, "Ci");
    })
    .await;
}

async fn a_result_to_a_client_that_does_not_read(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    bounded(&target, async {
        raw.send(&query("select repeat('s', 10000) from generate_series(1, 20000) -- raw slow")).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        // It waits for us, and holds nobody else up.
        until_active(&target, "raw slow").await;
        let (mut other, _) = logged_in(&target).await;
        assert_eq!(other.ask(&query("select 1")).await, "TDCi");
        let (reader, _writer) = raw.stream.into_split();
        let counts = read_all(&mut BufReader::with_capacity(1 << 16, reader), 1).await;
        assert_eq!(counts[usize::from(b'D')], 20_000);
    })
    .await;
}

async fn table(raw: &mut Raw, definition: &str) {
    let name = definition.split('(').next().unwrap();
    raw.ask(&query(&format!("drop table if exists {name}; create table {definition}"))).await;
}

async fn rows(raw: &mut Raw, table: &str) -> String {
    raw.send(&query(&format!("select count(*) from {table}"))).await;
    let mut count = String::new();
    loop {
        match raw.receive().await.unwrap() {
            (b'D', row) => count = String::from_utf8(row[6..].to_vec()).unwrap(),
            (b'E', body) => panic!("{:?}", field(&body, b'M')),
            (b'Z', _) => return count,
            _ => {}
        }
    }
}

/// The data goes on for long after the error; nobody reads while it is sent.
async fn copy_in_that_fails_while_data_comes(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "failing(n int)").await;
    bounded(&target, async {
        raw.send(&query("copy failing from stdin")).await;
        let data = message(b'd', "1\n".repeat(5000).as_bytes());
        for turn in 0..2000 {
            raw.send(if turn == 5 { b"d\0\0\0\x0aoops!\n" } else { &data }).await;
        }
        raw.send(&message(b'c', b"")).await;
        raw.send(&query("select 1")).await;
        assert_eq!(raw.receive().await.unwrap().0, b'G');
        assert_eq!(raw.error().await.0, "22P02");
        assert_eq!(raw.until_ready().await, "i");
        assert_eq!(raw.until_ready().await, "TDCi");
    })
    .await;
    assert_eq!(rows(&mut raw, "failing").await, "0");
}

async fn copy_in_ended_by_the_client(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "given_up(n int)").await;
    raw.send(&query("copy given_up from stdin")).await;
    raw.send(&message(b'd', b"1\n")).await;
    raw.send(&message(b'f', b"enough\0")).await;
    let (code, text, _) = raw.error().await;
    assert_eq!((&*code, text.contains("enough")), ("57014", true));
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(rows(&mut raw, "given_up").await, "0");
}

async fn copy_in_and_more_in_one_go(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "in_one_go(n int)").await;
    let mut all = query("copy in_one_go from stdin; select 'between'; copy in_one_go from stdin");
    for _ in 0..2 {
        all.extend(message(b'd', b"1\n2\n"));
        // Syncs and Flushes within COPY are ignored.
        all.extend(SYNC);
        all.extend(FLUSH);
        all.extend(message(b'd', b"3\n"));
        all.extend(message(b'c', b""));
    }
    all.extend(query("select 'behind'"));
    raw.send(&all).await;
    assert_eq!(raw.until_ready().await, "GCTDCGCi");
    assert_eq!(raw.until_ready().await, "TDCi");
    assert_eq!(rows(&mut raw, "in_one_go").await, "6");
}

async fn copy_in_of_the_extended_protocol_in_one_go(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "extended_go(n int)").await;
    let mut all = extended("copy extended_go from stdin");
    all.extend(message(b'd', b"1\n2\n"));
    all.extend(message(b'c', b""));
    all.extend(extended("select 1"));
    all.extend(SYNC);
    all.extend(extended("select 2"));
    all.extend(SYNC);
    raw.send(&all).await;
    assert_eq!(raw.until_ready().await, "12GC12DCi");
    assert_eq!(raw.until_ready().await, "12DCi");
    assert_eq!(rows(&mut raw, "extended_go").await, "2");
}

async fn copy_in_that_fails_in_a_pipeline(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "failing_go(n int)").await;
    let mut all = extended("copy failing_go from stdin");
    all.extend(message(b'd', b"oops\n"));
    all.extend(message(b'd', b"1\n"));
    all.extend(message(b'c', b""));
    all.extend(extended("select 'skipped'"));
    all.extend(SYNC);
    all.extend(query("select 'behind'"));
    raw.send(&all).await;
    assert_eq!(raw.error().await.0, "22P02");
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.until_ready().await, "TDCi");
}

async fn copy_out_that_fails(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    raw.send(&query("copy (select 1/(100 - n) from generate_series(1, 200) n) to stdout")).await;
    raw.send(&query("select 'behind'")).await;
    let (code, _, before) = raw.error().await;
    assert_eq!((&*code, before.len()), ("22012", 1 + 99));
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.until_ready().await, "TDCi");
}

async fn copy_messages_outside_of_copy(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    for kind in [b'd', b'c', b'f'] {
        raw.send(&message(kind, b"nothing\0")).await;
    }
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    assert_eq!(raw.ask(&query("begin")).await, "Ct");
    raw.send(&message(b'c', b"")).await;
    assert_eq!(raw.ask(&query("commit")).await, "Ci");
    raw.send(&message(b'd', b"x")).await;
    assert_eq!(raw.ask(&SYNC).await, "i");
}

async fn copy_in_refused_because_of_another_message(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    table(&mut raw, "odd(n int)").await;
    raw.send(&query("copy odd from stdin")).await;
    raw.send(&message(b'd', b"1\n")).await;
    // PostgreSQL: unexpected message type during COPY; protocol synchronization is lost, it hangs up.
    raw.send(&query("select 1")).await;
    assert_eq!(raw.error().await.0, "08P01");
    while raw.receive().await.is_some() {}
    let (mut other, _) = logged_in(&target).await;
    assert_eq!(rows(&mut other, "odd").await, "0");
}

async fn an_error_skips_up_to_the_sync(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    let mut all = extended("select 1");
    all.extend(extended("select 1/0"));
    for _ in 0..1000 {
        all.extend(extended("select 2"));
    }
    // Even a simple query is skipped.
    all.extend(query("select 3"));
    all.extend(SYNC);
    all.extend(extended("select 4"));
    all.extend(SYNC);
    raw.send(&all).await;
    assert_eq!(raw.error().await.2, "12DC1");
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.until_ready().await, "12DCi");
    assert_eq!(raw.ask(&query("select 5")).await, "TDCi");
}

async fn syncs_alone(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    raw.send(&SYNC.repeat(5000)).await;
    for _ in 0..5000 {
        assert_eq!(raw.until_ready().await, "i");
    }
    raw.ask(&query("begin")).await;
    raw.send(&SYNC.repeat(3)).await;
    for _ in 0..3 {
        assert_eq!(raw.until_ready().await, "t");
    }
    raw.ask(&query("rollback")).await;
}

async fn flush_without_sync(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    raw.send(&FLUSH).await;
    for _ in 0..100 {
        raw.send(&extended("select 1")).await;
        raw.send(&FLUSH).await;
        let mut kinds = String::new();
        while kinds.len() < 4 {
            kinds.push(char::from(raw.receive().await.unwrap().0));
        }
        assert_eq!(kinds, "12DC");
    }
    assert_eq!(raw.ask(&SYNC).await, "i");
}

/// The unnamed statement outlives its Sync; the next Parse or simple query ends it.
async fn an_unnamed_statement_used_again(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    let parse = message(b'P', b"\0select 'unnamed'\0\0\0");
    assert_eq!(raw.ask(&[&parse[..], &SYNC].concat()).await, "1i");
    // Others come by, on the same backend where there is a pool.
    for n in 0..5 {
        let (mut other, _) = logged_in(&target).await;
        assert_eq!(other.ask(&[extended(&format!("select {n}")), SYNC.to_vec()].concat()).await, "12DCi");
    }
    let bind = message(b'B', b"\0\0\0\0\0\0\0\0");
    let execute = message(b'E', b"\0\0\0\0\0");
    for _ in 0..2 {
        raw.send(&[&bind[..], &execute, &SYNC].concat()).await;
        assert_eq!(raw.receive().await.unwrap().0, b'2');
        let (kind, row) = raw.receive().await.unwrap();
        assert!(kind == b'D' && row.ends_with(b"unnamed"), "another client's statement: {row:?}");
        assert_eq!(raw.until_ready().await, "Ci");
    }
}

async fn an_unnamed_statement_replaced(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    for n in 0..300 {
        raw.send(&[extended(&format!("select 'no {n}'")), SYNC.to_vec()].concat()).await;
        raw.receive().await.unwrap();
        raw.receive().await.unwrap();
        assert!(raw.receive().await.unwrap().1.ends_with(format!("no {n}").as_bytes()));
        assert_eq!(raw.until_ready().await, "Ci");
    }
}

async fn a_named_statement_in_its_life(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    let parse = message(b'P', b"mine\0select 1\0\0\0");
    let bind = message(b'B', b"\0mine\0\0\0\0\0\0\0");
    let execute = message(b'E', b"\0\0\0\0\0");
    let describe = message(b'D', b"Smine\0");
    let close = message(b'C', b"Smine\0");
    assert_eq!(raw.ask(&[&parse[..], &describe, &SYNC].concat()).await, "1tTi");
    assert_eq!(raw.ask(&[&bind[..], &execute, &SYNC].concat()).await, "2DCi");
    // Its name is taken.
    raw.send(&[&parse[..], &bind, &execute, &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "42P05");
    assert_eq!(raw.until_ready().await, "i");
    // Closed in a pipeline and made anew.
    assert_eq!(raw.ask(&[&close[..], &parse, &bind, &execute, &close, &SYNC].concat()).await, "312DC3i");
    raw.send(&[&bind[..], &execute, &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "26000");
    assert_eq!(raw.until_ready().await, "i");
    raw.send(&[&describe[..], &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "26000");
    assert_eq!(raw.until_ready().await, "i");
    // A Parse that fails makes no statement; one behind an error is none either.
    let bad = message(b'P', b"bad\0selec\0\0\0");
    let behind = message(b'P', b"behind\0select 1\0\0\0");
    raw.send(&[&bad[..], &behind, &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "42601");
    assert_eq!(raw.until_ready().await, "i");
    for name in ["bad", "behind"] {
        raw.send(&[message(b'D', format!("S{name}\0").as_bytes()), SYNC.to_vec()].concat()).await;
        assert_eq!(raw.error().await.0, "26000");
        assert_eq!(raw.until_ready().await, "i");
    }
    assert_eq!(raw.ask(&[&behind[..], &SYNC].concat()).await, "1i");
    // Made in a transaction that is rolled back, a statement stays.
    assert_eq!(raw.ask(&query("begin")).await, "Ct");
    assert_eq!(raw.ask(&[&parse[..], &SYNC].concat()).await, "1t");
    assert_eq!(raw.ask(&query("rollback")).await, "Ci");
    assert_eq!(raw.ask(&[&bind[..], &execute, &SYNC].concat()).await, "2DCi");
    // DEALLOCATE and DISCARD end them.
    assert_eq!(raw.ask(&query("deallocate all")).await, "Ci");
    raw.send(&[&bind[..], &execute, &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "26000");
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.ask(&[&parse[..], &SYNC].concat()).await, "1i");
    assert!(raw.ask(&query("discard all")).await.ends_with("Ci"));
    raw.send(&[&bind[..], &execute, &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "26000");
    assert_eq!(raw.until_ready().await, "i");
    assert_eq!(raw.ask(&[&parse[..], &bind, &execute, &SYNC].concat()).await, "12DCi");
}

async fn a_portal_taken_in_pieces(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    assert_eq!(raw.ask(&query("begin")).await, "Ct");
    let parse = message(b'P', b"\0select generate_series(1, 5)\0\0\0");
    let bind = message(b'B', b"p\0\0\0\0\0\0\0\0");
    let two = message(b'E', b"p\0\0\0\0\x02");
    assert_eq!(raw.ask(&[&parse[..], &bind, &two, &SYNC].concat()).await, "12DDst");
    assert_eq!(raw.ask(&[&two[..], &two, &SYNC].concat()).await, "DDsDCt");
    assert_eq!(raw.ask(&[&message(b'C', b"Pp\0")[..], &SYNC].concat()).await, "3t");
    assert_eq!(raw.ask(&query("commit")).await, "Ci");
    // Without a transaction, by Flush, the portal lives up to the Sync.
    raw.send(&[&parse[..], &bind, &two, &FLUSH].concat()).await;
    let mut kinds = String::new();
    while !kinds.ends_with('s') {
        kinds.push(char::from(raw.receive().await.unwrap().0));
    }
    assert_eq!(raw.ask(&[&two[..], &two, &SYNC].concat()).await, "DDsDCi");
}

async fn a_portal_dies_with_its_transaction(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    let parse = message(b'P', b"\0select generate_series(1, 5)\0\0\0");
    let bind = message(b'B', b"p\0\0\0\0\0\0\0\0");
    let two = message(b'E', b"p\0\0\0\0\x02");
    assert_eq!(raw.ask(&[&parse[..], &bind, &two, &SYNC].concat()).await, "12DDsi");
    raw.send(&[&two[..], &SYNC].concat()).await;
    assert_eq!(raw.error().await.0, "34000");
    assert_eq!(raw.until_ready().await, "i");
}

async fn a_function_call(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    // abs(int4) is function 1397; text arguments and a text result.
    let mut body = 1397u32.to_be_bytes().to_vec();
    body.extend(b"\0\0\0\x01\0\0\0\x02-5\0\0");
    assert_eq!(raw.ask(&message(b'F', &body)).await, "Vi");
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    body[..4].copy_from_slice(&1u32.to_be_bytes());
    raw.send(&message(b'F', &body)).await;
    assert_eq!(raw.error().await.0, "42883");
    assert_eq!(raw.until_ready().await, "i");
}

async fn an_empty_query(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    assert_eq!(raw.ask(&query("")).await, "Ii");
    assert_eq!(raw.ask(&query(" ; ;; ")).await, "Ii");
    assert_eq!(raw.ask(&[extended(""), SYNC.to_vec()].concat()).await, "12Ii");
    assert_eq!(raw.ask(&query("select 1; ; select 2")).await, "TDCTDCi");
}

async fn a_message_of_an_unknown_kind(target: Arc<Target>) {
    for kind in [b'y', 0, 255, b'Z'] {
        let (mut raw, _) = logged_in(&target).await;
        raw.send(&message(kind, b"what")).await;
        assert_eq!(raw.error().await.0, "08P01");
        while raw.receive().await.is_some() {}
    }
}

async fn a_message_with_an_impossible_length(target: Arc<Target>) {
    for length in [0u32, 3, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        let (mut raw, _) = logged_in(&target).await;
        raw.send(&[&b"Q"[..], &length.to_be_bytes(), b"select 1\0"].concat()).await;
        let mut code = None;
        while let Some((kind, body)) = raw.receive().await {
            if kind == b'E' {
                code = field(&body, b'C');
            }
        }
        // PostgreSQL hangs up without a word.
        assert!(matches!(code.as_deref(), None | Some("08P01")), "{length:x}: {code:?}");
    }
}

/// The client goes away in the middle of a message: nothing of it is done.
async fn a_message_cut_off(target: Arc<Target>) {
    let (mut other, _) = logged_in(&target).await;
    table(&mut other, "cut_off(n int)").await;
    let insert = query("insert into cut_off values (1)");
    for cut in [1, 3, 5, 10, insert.len() - 1] {
        let (mut raw, _) = logged_in(&target).await;
        raw.send(&insert[..cut]).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(raw);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(rows(&mut other, "cut_off").await, "0");
}

async fn a_message_in_single_bytes(target: Arc<Target>) {
    let mut raw = raw(&target).await;
    for byte in startup(0, &[("user", "trusty"), ("database", &target.database)]) {
        raw.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert!(raw.until_ready().await.ends_with("Ki"));
    let mut all = extended("select 'in single bytes'");
    all.extend(SYNC);
    all.extend(query("select 1"));
    for byte in all {
        raw.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(raw.until_ready().await, "12DCi");
    assert_eq!(raw.until_ready().await, "TDCi");
}

/// Its transaction is rolled back soon, however it leaves.
async fn a_session_left_in_a_transaction(target: Arc<Target>) {
    let (mut other, _) = logged_in(&target).await;
    table(&mut other, "left_behind(n int primary key)").await;
    for turn in 0..4 {
        let (mut raw, _) = logged_in(&target).await;
        assert_eq!(raw.ask(&query("begin; insert into left_behind values (1)")).await, "CCt");
        match turn {
            0 => raw.send(&message(b'X', b"")).await,
            1 => raw.send(b"Q\0\0\0\x20sel").await,
            2 => raw.send(&query("select pg_sleep(0.1)")).await,
            _ => {}
        }
        drop(raw);
        // Waits for the other's lock, then inserts.
        assert_eq!(other.ask(&query("insert into left_behind values (1)")).await, "Ci");
        assert_eq!(other.ask(&query("delete from left_behind")).await, "Ci");
    }
}

/// The version and the options that NegotiateProtocolVersion names, before anything else is said.
async fn negotiated(target: &Target, minor: u8, option: Option<&str>) -> (u32, Vec<String>) {
    let mut raw = raw(target).await;
    let mut parameters = vec![("user", "trusty"), ("database", &*target.database)];
    parameters.extend(option.map(|name| (name, "on")));
    raw.send(&startup(minor, &parameters)).await;
    let (kind, body) = raw.receive().await.unwrap();
    assert_eq!(kind, b'v');
    let version = u32::from_be_bytes(body[..4].try_into().unwrap());
    let count = u32::from_be_bytes(body[4..8].try_into().unwrap());
    let names = body[8..].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let names: Vec<String> = names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
    assert_eq!(usize::try_from(count).unwrap(), names.len());
    assert!(raw.until_ready().await.starts_with('R'));
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    (version, names)
}

async fn protocol_3_2_is_negotiated(target: Arc<Target>) {
    for minor in [2, 9] {
        let (version, names) = negotiated(&target, minor, None).await;
        assert!(names.is_empty());
        // PostgreSQL 15 names its newest minor version alone, later ones the whole; drivers take both.
        assert!(matches!(version, 0 | 0x3_0000), "{version:x}");
    }
}

async fn unknown_protocol_options_are_named(target: Arc<Target>) {
    assert_eq!(negotiated(&target, 0, Some("_pq_.compression")).await.1, ["_pq_.compression"]);
    assert_eq!(negotiated(&target, 2, Some("_pq_.x")).await.1, ["_pq_.x"]);
}

async fn protocol_2_and_4_are_refused(target: Arc<Target>) {
    for major in [1u8, 2, 4, 200] {
        let mut raw = raw(&target).await;
        let mut packet = startup(0, &[("user", "trusty")]);
        packet[5] = major;
        raw.send(&packet).await;
        // An error of whatever form, and the end.
        let mut said = Vec::new();
        let reading = tokio::time::timeout(Duration::from_secs(40), raw.stream.read_to_end(&mut said)).await;
        assert!(matches!(reading, Ok(Ok(_))) && said.first() == Some(&b'E'), "{major}: {said:?}");
    }
}

async fn many_statements_under_many_names(target: Arc<Target>) {
    let (mut raw, _) = logged_in(&target).await;
    for turn in 0..10 {
        let mut all = Vec::new();
        for n in 0..300 {
            let name = format!("s{}", turn * 300 + n);
            all.extend(message(b'P', format!("{name}\0select {n}, '{name}'\0\0\0").as_bytes()));
            all.extend(message(b'B', format!("\0{name}\0\0\0\0\0\0\0").as_bytes()));
            all.extend(message(b'E', b"\0\0\0\0\0"));
        }
        all.extend(SYNC);
        assert_eq!(raw.ask(&all).await, "12DC".repeat(300) + "i");
    }
    // The first is still known.
    raw.send(&[message(b'B', b"\0s0\0\0\0\0\0\0\0"), message(b'E', b"\0\0\0\0\0"), SYNC.to_vec()].concat()).await;
    assert_eq!(raw.receive().await.unwrap().0, b'2');
    assert!(raw.receive().await.unwrap().1.ends_with(b"s0"));
    assert_eq!(raw.until_ready().await, "Ci");
}
