//! Switchovers under load, there and back (C14): how many transactions failed, and how long clients were held. The gaps
//! are those of clients of our own; `--pgbench` adds the real one, whose own count of failed transactions is believed.
//! `--dirty` has a gigabyte of dirty shared buffers before each, which the shutdown has to write.

use crate::harness::Lab;
use crate::harness::net::at;
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::postgres::{APP_PASSWORD, PORT, SYSTEM_USER, Template};
use crate::harness::sys::{Outcome, millis, ms, now, pause, secs};
use crate::play::bench::{Bench, Seen, longest_gap};
use crate::play::stage::Stage;
use crate::table::{Percentiles, table};
use portcullis::base::time::Instant;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub rounds: u64,
    pub clients: u32,
    pub pgbench: bool,
    pub dirty: bool,
}

/// Of a gigabyte of pages one row each, so that all of them are dirty.
const DIRTY_SQL: &str = "UPDATE dirty SET n = n + 1 WHERE id % 8 = 0";
/// What is watched after the command has ended.
const TAIL: portcullis::base::time::Duration = secs(3);
/// Clients held at most, and none of them failed (C14).
const HELD_MS: i64 = 1000;

struct Round {
    code: i32,
    took: i64,
    /// The longest gap of each client.
    gaps: Vec<i64>,
    /// SQLSTATE and how many clients were told so.
    failed: BTreeMap<String, usize>,
    first_words: String,
    pgbench: Option<Pgbench>,
}

/// What pgbench says at its end.
#[derive(Debug, Default)]
struct Pgbench {
    processed: u64,
    failed: u64,
    /// Clients that gave up: their session ended.
    aborted: u64,
}

pub fn switchovers(lab: &Lab, wanted: Wanted, mut fed: impl FnMut()) -> Outcome<Vec<String>> {
    let stage = Stage::new(lab);
    prepare(lab, wanted)?;
    let ids = (101..101 + wanted.clients).collect();
    let bench = Bench::start(lab.client.ns(), &at(lab.witness.address(), 53), ids, millis(2))?;
    let mut rounds = Vec::new();
    let mut violations = Vec::new();
    for number in 0..wanted.rounds {
        fed();
        let round = one(&stage, &bench, wanted)?;
        let failed: usize = round.failed.values().sum();
        let most = round.gaps.iter().max().copied().unwrap_or_default();
        println!(
            "switchover {}/{}: exit {}, {} ms; longest gap {most} ms; {failed} failed {:?}{}",
            number + 1,
            wanted.rounds,
            round.code,
            round.took,
            round.failed,
            round.pgbench.as_ref().map(|bench| format!("; pgbench {bench:?}")).unwrap_or_default()
        );
        if failed > 0 {
            println!("  the first: {}", round.first_words);
        }
        if round.code != 0 {
            violations.push(format!("switchover {} ended with {}", number + 1, round.code));
        }
        rounds.push(round);
    }
    let serves = stage.serving().ok_or("nobody serves at the end")?;
    let (mut lost, mut committed) = (0, 0);
    for (id, seen) in bench.ids.iter().zip(bench.seen()) {
        let there = stage.node(serves).postgres.numbers_of(*id)?;
        committed += seen.commits.len();
        lost += seen.commits.iter().filter(|(n, _)| !there.contains(n)).count();
    }
    violations.extend(report(&rounds, committed, lost));
    violations.extend(stage.wrong());
    Ok(violations)
}

fn report(rounds: &[Round], committed: usize, lost: usize) -> Vec<String> {
    let every: Vec<i64> = rounds.iter().flat_map(|round| round.gaps.clone()).collect();
    let worst = rounds.iter().map(|round| round.gaps.iter().max().copied().unwrap_or_default()).collect();
    let held = Percentiles::of(worst);
    println!(
        "{}",
        table(&[
            ("switchover: longest gap of any client, of each run".to_owned(), held),
            ("switchover: longest gap of each client".to_owned(), Percentiles::of(every)),
            ("switchover: the command".to_owned(), Percentiles::of(rounds.iter().map(|round| round.took).collect())),
        ])
    );
    let mut failed: BTreeMap<&str, usize> = BTreeMap::new();
    for (code, n) in rounds.iter().flat_map(|round| &round.failed) {
        *failed.entry(code).or_default() += n;
    }
    let all: usize = failed.values().sum();
    println!(
        "figure: switchover: {} runs, {committed} transactions committed, {all} failed {failed:?}, {lost} committed \
         ones missing; clients held for at most {} ms (p99 {} ms)",
        rounds.len(),
        held.max(),
        held.p99()
    );
    let mut violations = Vec::new();
    let bench: Vec<&Pgbench> = rounds.iter().filter_map(|round| round.pgbench.as_ref()).collect();
    if !bench.is_empty() {
        let sum = |of: fn(&Pgbench) -> u64| bench.iter().map(|one| of(one)).sum::<u64>();
        let (failed, aborted) = (sum(|one| one.failed), sum(|one| one.aborted));
        println!(
            "figure: switchover: pgbench: {} transactions processed, {failed} failed, {aborted} clients aborted",
            sum(|one| one.processed)
        );
        if failed + aborted > 0 {
            violations.push(format!("pgbench: {failed} failed transactions, {aborted} clients aborted"));
        }
    }
    if all > 0 {
        violations.push(format!("{all} transactions failed: {failed:?}"));
    }
    if lost > 0 {
        violations.push(format!("{lost} committed transactions are missing"));
    }
    if held.p99() > HELD_MS {
        violations.push(format!("clients were held for {} ms (p99), at most {HELD_MS}", held.p99()));
    }
    violations
}

fn one(stage: &Stage, bench: &Bench, wanted: Wanted) -> Outcome<Round> {
    let active = stage.serving().ok_or("nobody serves before the round begins")?;
    let (old, new) = (stage.node(active), stage.node(1 - active));
    stage.restore(active)?;
    old.wait_in_sync(secs(60))?;
    new.wait_peer()?;
    if wanted.dirty {
        long_sql(old, DIRTY_SQL)?;
    }
    bench.wait_all(now(), secs(60))?;
    let before = bench.seen();
    std::thread::scope(|scope| {
        let pgbench = wanted.pgbench.then(|| scope.spawn(|| pgbench(stage.lab, old)));
        pause(secs(2));
        let entered = now();
        let said = new.cli(&["switchover", "--to", new.name()])?;
        stage.quote(1 - active, &said);
        if said.code != 0 {
            println!("  {}{}", said.out, said.err);
        }
        pause(TAIL);
        bench.wait_all(said.ended, secs(60))?;
        let pgbench = match pgbench {
            Some(thread) => Some(thread.join().unwrap_or_else(|_| Err("pgbench's thread panicked".into()))?),
            None => None,
        };
        Ok(judge(&before, &bench.seen(), said.code, entered, said.ended, pgbench))
    })
}

fn judge(
    before: &[Seen],
    after: &[Seen],
    code: i32,
    entered: Instant,
    ended: Instant,
    pgbench: Option<Pgbench>,
) -> Round {
    let gap = |seen: &Seen| longest_gap(&seen.commits, entered, ended + TAIL).map(|gap| gap.as_millis());
    let gaps = after.iter().filter_map(gap).map(|gap| i64::try_from(gap).unwrap_or(i64::MAX)).collect();
    let mut failed = BTreeMap::new();
    let mut first_words = String::new();
    for (was, is) in before.iter().zip(after) {
        for (_, code, text) in &is.failed[was.failed.len()..] {
            *failed.entry(code.clone()).or_default() += 1;
            if first_words.is_empty() {
                first_words = format!("{code} {text}");
            }
        }
    }
    Round { code, took: ms(entered, ended), gaps, failed, first_words, pgbench }
}

/// Sixteen clients of the real one for long enough to see it through; its session string names the node that serves.
fn pgbench(lab: &Lab, active: &Node) -> Outcome<Pgbench> {
    let tool = Template::once()?.bin_dir.join("pgbench").display().to_string();
    let dsn = format!("host={} port={GATE_PORT} user=app dbname=app password={APP_PASSWORD}", active.address());
    let words = [tool.as_str(), "-n", "-c", "16", "-j", "2", "-T", "8", &dsn];
    let output = lab.client.exec_within(secs(120), "", &words)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let number = |key: &str| {
        let line = out.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or_default()
    };
    let aborted = err.lines().filter(|line| line.contains("client ") && line.contains("aborted")).count() as u64;
    let (processed, failed) =
        (number("number of transactions actually processed: "), number("number of failed transactions: "));
    if processed == 0 && aborted == 0 {
        return Err(format!("pgbench ended with {} and says nothing: {err}", output.status).into());
    }
    Ok(Pgbench { processed, failed, aborted })
}

fn prepare(lab: &Lab, wanted: Wanted) -> Outcome {
    let a = &lab.a;
    if wanted.pgbench {
        let tool = Template::once()?.bin_dir.join("pgbench").display().to_string();
        let socket = a.postgres.socket_dir.display().to_string();
        let words = [&tool, "-i", "-q", "-s", "20", "-h", &socket, "-p", &PORT.to_string(), "-U", "postgres", "app"];
        let output = a.host.exec_within(secs(300), SYSTEM_USER, &words)?;
        if !output.status.success() {
            return Err(format!("pgbench -i: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        a.postgres.sql("app", "GRANT ALL ON ALL TABLES IN SCHEMA public TO app")?;
    }
    if wanted.dirty {
        let sql = "CREATE TABLE dirty (id int, n int, pad text) WITH (fillfactor = 80); \
                   INSERT INTO dirty SELECT g, 0, repeat('x', 800) FROM generate_series(1, 1048576) g";
        long_sql(a, sql)?;
    }
    a.wait_in_sync(secs(60)).map(drop)
}

/// SQL that takes longer than the harness gives its own.
pub fn long_sql(node: &Node, sql: &str) -> Outcome {
    let psql = Template::once()?.bin_dir.join("psql").display().to_string();
    let socket = node.postgres.socket_dir.display().to_string();
    let words = [&psql, "-h", &socket, "-U", "postgres", "-d", "app", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql];
    let output = node.host.exec_within(secs(600), SYSTEM_USER, &words)?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{sql:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Room for a gigabyte of dirty pages, and no checkpoint that writes them before it is asked for.
pub fn make_room(lab: &Lab) -> Outcome {
    for node in lab.nodes() {
        let lines =
            "shared_buffers = 1500MB\nmax_wal_size = 16GB\ncheckpoint_timeout = 1h\nbgwriter_lru_maxpages = 0\n";
        node.postgres.append("postgresql.conf", lines)?;
        node.postgres.stop(&node.host, "fast")?;
        node.postgres.start(&node.host)?;
    }
    Ok(())
}
