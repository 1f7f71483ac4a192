//! A node of several gigabytes rejoins: first from nothing (a clone), then rewound after a loss of power with what was
//! written to it and nobody else has. Measured: how long, and how far each "about N left" was from what it took (C13).

use crate::harness::Lab;
use crate::harness::node::Node;
use crate::harness::sys::{Fail, Outcome, ms, now, secs};
use crate::switchovers::long_sql;
use portcullis::base::time::Instant;
use serde_json::Value;
use std::fs;

/// Rows of about 1 KiB, so that 2^20 of them are a gibibyte and a bit.
const ROWS_A_GIB: u64 = 1 << 20;
/// An estimate given with at least this part copied is judged.
const JUDGED_FROM: u64 = 10;

/// A line with figures: when it came, bytes done, bytes in all, seconds left.
type Line = (Instant, u64, u64, Option<u64>);

pub fn rejoins(lab: &Lab, gib: u64, mut fed: impl FnMut()) -> Outcome<Vec<String>> {
    let (a, b) = (&lab.a, &lab.b);
    // pg_rewind reads files by SQL (docs/operations.md).
    for node in lab.nodes() {
        let lines =
            ["192.0.2.11/32", "192.0.2.12/32"].map(|from| format!("host postgres replicator {from} scram-sha-256\n"));
        node.postgres.prepend("pg_hba.conf", &lines.concat())?;
        node.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
    }
    long_sql(a, "CREATE TABLE big (id bigint PRIMARY KEY, n int NOT NULL, filler text NOT NULL)")?;
    for part in 0..gib {
        fed();
        long_sql(
            a,
            &format!(
                "INSERT INTO big SELECT i, 0, repeat(md5(i::text), 31) FROM generate_series({}, {}) i",
                part * ROWS_A_GIB,
                (part + 1) * ROWS_A_GIB - 1
            ),
        )?;
    }
    long_sql(a, "CHECKPOINT")?;
    a.wait_in_sync(secs(120))?;
    b.stop_daemon()?;
    b.postgres.stop(&b.host, "fast")?;
    fs::remove_dir_all(&b.postgres.data_dir)?;
    b.start_daemon()?;
    b.wait_peer()?;
    fed();
    one("clone", a, b)?;
    a.wait_in_sync(secs(120))?;

    // b loses power with a gigabyte of its own; a is promoted and b rewound.
    fed();
    b.cli(&["promote", "--yes"])?.expect(0)?;
    b.wait_active(secs(60))?;
    b.wait_in_sync(secs(60))?;
    lab.switch.cut_port_between(&a.host.plug, &b.host.plug, crate::harness::postgres::PORT)?;
    long_sql(b, "SET synchronous_commit = local; UPDATE big SET n = 1 WHERE id % 8 = 0")?;
    b.power_off()?;
    lab.switch.heal()?;
    a.cli(&["promote", "--yes", "--accept-data-loss"])?.expect(0)?;
    a.wait_active(secs(60))?;
    b.boot()?;
    b.wait_role("fenced", secs(60))?;
    b.wait_peer()?;
    fed();
    one("rewind", a, b)?;
    a.wait_in_sync(secs(120))?;
    Ok(Vec::new())
}

fn one(what: &str, a: &Node, b: &Node) -> Outcome {
    let mut lines: Vec<Line> = Vec::new();
    let mut texts = Vec::new();
    let said = a.cli_live(&["rejoin", b.name(), "--json"], |line| {
        let Ok(value) = serde_json::from_str::<Value>(line) else { return };
        if let Some(text) = value["text"].as_str() {
            texts.push(text.to_owned());
        }
        let data = &value["data"];
        let phase = data.get("phase").is_some_and(|phase| !phase.is_null());
        match (data["done_bytes"].as_u64(), data["total_bytes"].as_u64()) {
            (Some(done), Some(total)) if !phase => lines.push((now(), done, total, data["left_s"].as_u64())),
            _ => {}
        }
    })?;
    let (took, code) = (ms(said.started, said.ended), said.code);
    for text in &texts {
        println!("  {text}");
    }
    if code != 0 {
        return Err(Fail(format!("{what}: rejoin ended with {code}: {}", said.out)));
    }
    let Some(&(end, copied, ..)) = lines.last() else { return Err(Fail(format!("{what}: no progress was told"))) };
    let mut worst = (0, String::new());
    for &(at, done, total, left) in &lines {
        let (Some(left), actual) = (left, ms(at, end)) else { continue };
        if done * 100 < total * JUDGED_FROM {
            continue;
        }
        let off = (i64::try_from(left).unwrap_or(i64::MAX).saturating_mul(1000) - actual).abs();
        if off >= worst.0 {
            worst = (off, format!("at {} %: {left} s told, {actual} ms it took", done * 100 / total.max(1)));
        }
    }
    let longest = lines.windows(2).map(|pair| ms(pair[0].0, pair[1].0)).max().unwrap_or_default();
    println!(
        "figure: rejoin: {what}: {} MiB in {took} ms, {} lines with figures, at most {longest} ms apart; the estimate \
         furthest off: {}",
        copied >> 20,
        lines.len(),
        worst.1
    );
    Ok(())
}
