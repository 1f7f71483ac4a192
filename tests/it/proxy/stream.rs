//! Bytes both ways: COPY, long pipelines, slow readers, errors in the middle; all in bounded memory.

use crate::front::{eventually, open, output};
use crate::raw::*;
use std::io::Write;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Resident memory of this process, in MiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_of_fifty_megabytes_comes_back_identical() {
    let front = open().await;
    let (there, back) = (front.pg.scratch("there"), front.pg.scratch("back"));
    // Through files: other tests measure the memory of this process.
    let mut file = std::io::BufWriter::new(std::fs::File::create(&there).unwrap());
    let (mut seed, mut written) = (1u64, 0);
    while written < 50 << 20 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let width = usize::try_from(seed >> 56).unwrap();
        writeln!(file, "{seed:016x}{:z>width$}", "").unwrap();
        written += 17 + width;
    }
    drop(file);
    let mut psql = front.psql("trusty", "", "drop table if exists copied");
    psql.args(["-c", "create unlogged table copied(n serial, line text)"]);
    psql.args(["-c", &format!("\\copy copied(line) from '{}'", there.display())]);
    psql.args(["-c", &format!("\\copy (select line from copied order by n) to '{}'", back.display())]);
    output(&mut psql).await.unwrap();
    output(tokio::process::Command::new("cmp").args([&there, &back])).await.expect("what came back differs");
    output(&mut front.psql("trusty", "", "drop table copied")).await.unwrap();
    for file in [there, back] {
        std::fs::remove_file(file).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_without_sync_runs_both_ways_at_once() {
    const QUERIES: usize = 20_000;
    let front = open().await;
    let raw = Raw::trusty(&front).await;
    let before = resident();
    let (mut reader, mut writer) = raw.stream.into_split();
    // Each answer is as long as several requests: a proxy that waits for Sync, or reads one side at a time, hangs.
    let sender = tokio::spawn(async move {
        let one = extended("select repeat('r', 400)");
        for _ in 0..QUERIES {
            writer.write_all(&one).await.unwrap();
        }
        writer.write_all(&SYNC).await.unwrap();
        writer
    });
    let (mut completed, mut bytes) = (0, 0);
    let reading = async {
        let mut head = [0; 5];
        let mut body = vec![0; 1024];
        loop {
            reader.read_exact(&mut head).await.unwrap();
            let length = usize::try_from(u32::from_be_bytes(head[1..].try_into().unwrap())).unwrap() - 4;
            reader.read_exact(&mut body[..length]).await.unwrap();
            bytes += length;
            match head[0] {
                b'C' => completed += 1,
                b'Z' => break,
                b'E' => panic!("error"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(200), reading).await.expect("the pipeline hangs");
    assert_eq!(completed, QUERIES);
    assert!(bytes > QUERIES * 400);
    drop(sender.await.unwrap());
    let grown = resident().saturating_sub(before);
    assert!(grown < 100, "memory grew by {grown} MiB (other tests included)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_and_never_reads_holds_no_memory() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    let before = resident();
    // The other way round: nothing is read, so the backend stops, so the gate stops reading us. It must block, not
    // grow.
    let one = extended("select repeat('r', 4000)").repeat(100);
    let mut sent = 0;
    while let Ok(result) = tokio::time::timeout(Duration::from_secs(1), raw.stream.write_all(&one)).await {
        result.unwrap();
        sent += 100;
        assert!(sent < 2_000_000, "somebody swallows everything");
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 100, "memory grew by {grown} MiB (other tests included)");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_of_a_large_result_holds_no_memory() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    let before = resident();
    raw.send(&query("select repeat('x', 1000) from generate_series(1, 200000)")).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 100, "200 MB are under way and memory grew by {grown} MiB (other tests included)");
    let (mut rows, mut buffer, mut total) = (0u32, vec![0; 1 << 16], 0usize);
    // 1 header, 2 column count, 4 length: each row is 1011 bytes on the wire.
    while total < 200_000 * 1011 {
        let n = raw.stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "closed early");
        total += n;
        rows += 1;
    }
    assert!(rows > 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_amid_a_pipeline_is_heard_before_any_sync() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    let pipeline = [extended("select 1"), extended("select 1/0"), extended("select 2")].concat();
    raw.send(&pipeline).await;
    let (code, _, before) = raw.error().await;
    assert_eq!((&*code, &*before), ("22012", "12DC1"));
    assert_eq!(raw.ask(&SYNC).await, "i", "the rest was skipped");
    assert_eq!(raw.ask(&query("select 3")).await, "TDCi");
    assert_eq!(raw.ask(&[query("select 1/0"), query("select 4")].concat()).await, "Ei");
    assert_eq!(raw.until_ready().await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_failures_leave_the_session_in_step() {
    let front = open().await;
    let mut raw = Raw::trusty(&front).await;
    assert_eq!(raw.ask(&query("create temp table t(n int)")).await, "Ci");
    // The data is wrong, and comes before the error is heard; in both protocols.
    let data = [message(b'd', b"not a number\n"), message(b'd', b"2\n"), message(b'c', b"")].concat();
    assert_eq!(raw.ask(&[query("copy t from stdin"), data.clone()].concat()).await, "GEi");
    assert_eq!(raw.ask(&[extended("copy t from stdin"), SYNC.to_vec(), data, SYNC.to_vec()].concat()).await, "12GEi");
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    let good = [message(b'd', b"7\n"), message(b'c', b""), SYNC.to_vec()].concat();
    raw.send(&[extended("copy t from stdin"), SYNC.to_vec()].concat()).await;
    raw.send(&good).await;
    assert_eq!(raw.until_ready().await, "12GCi");
    front.gate.pause();
    raw.send(&query("select 1")).await;
    assert!(raw.is_silent_for(Duration::from_millis(200)).await, "known to be at rest after all that");
    front.gate.resume();
    assert_eq!(raw.until_ready().await, "TDCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_are_tidied_up_when_their_clients_go_and_clients_hear_when_backends_go() {
    let front = open().await;
    let mut polite = Raw::trusty(&front).await;
    let rude = Raw::trusty(&front).await;
    let half = Raw::trusty(&front).await;
    let pids = format!("{}, {}, {}", polite.pid, rude.pid, half.pid);
    polite.send(&[b'X', 0, 0, 0, 4]).await;
    assert!(polite.is_closed().await);
    drop(rude);
    // Half-closed after a question: the answer still comes.
    let mut half = half;
    half.send(&query("select pg_sleep(0.2)")).await;
    half.stream.shutdown().await.unwrap();
    assert_eq!(half.until_ready().await, "TDCi");
    assert!(half.is_closed().await);
    let count = format!(
        "select count(*) from pg_stat_activity where pid in ({pids}) and state = 'idle' and query = 'DISCARD ALL'"
    );
    eventually("backends are ready for others", async || front.pg.admin(&count).unwrap() == "2").await;
    let half_is_gone = format!("select count(*) from pg_stat_activity where pid = {}", half.pid);
    eventually("one left amid a question", async || front.pg.admin(&half_is_gone).unwrap() == "0").await;
    let next = Raw::trusty(&front).await;
    assert!(pids.contains(&next.pid.to_string()), "one of them serves the next client");
    drop(next);

    let mut victim = Raw::trusty(&front).await;
    front.pg.admin(&format!("select pg_terminate_backend({})", victim.pid)).unwrap();
    let (code, text, _) = victim.error().await;
    assert_eq!((&*code, &*text), ("57P01", "terminating connection due to administrator command"));
    assert!(victim.is_closed().await);
    eventually("sessions are gone", async || front.gate.sessions() == 0).await;
}
