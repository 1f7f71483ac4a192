//! R4 with real PostgreSQL: the synchronous standby is killed, hangs, or is cut off from its primary alone, under
//! write load over one session that was open before. Commits wait for `standby_timeout`, then the record says
//! `sync=none`, and only then are they acknowledged; no client sees an error. With `on_standby_loss = "block"` they
//! wait for ever.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterLog, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::host::{continue_all, stop_all};
use crate::harness::node::text_at;
use crate::harness::sys::{Outcome, millis, ms, never, now, secs, wait_until};
use crate::harness::watch::{Look, record};
use crate::in_lab;
use portcullis::base::time::{Duration, Instant};
use rustix::process::Signal;

/// The service's addresses and the marker, as one look saw them.
type Record = (Vec<String>, String);

/// Of the configuration.
const STANDBY_TIMEOUT: Duration = secs(3);
/// What a busy machine may add: looks, the update, the reload.
const BUSY: Duration = secs(20);

/// Loses the standby by `lose` and has commits go on without it; returns when it was lost, and the first of them.
fn goes_alone(lab: &Lab, how: &str, writer: &Writer, lose: impl FnOnce() -> Outcome) -> Outcome<(Instant, Instant)> {
    let a = &lab.a;
    a.wait_in_sync(secs(120))?;
    let status = a.status()?;
    ensure!(status.pointer("/outlook/lost") == Some(&0.into()), "in sync, and a failover would cost: {status}");
    ensure!(status.pointer("/outlook/safe") == Some(&true.into()), "in sync, and not safe: {status}");
    writer.wait_acks(20, secs(60))?;
    let lost = now();
    lose()?;
    let surely = now();
    let seen = a.wait_status(STANDBY_TIMEOUT + BUSY, "to be alone", |status| {
        !text_at(status, "/replication/alone_since").is_empty()
    });
    let seen = seen.map(|_| now())?;
    writer.wait_acks(20, secs(60))?;
    // Whatever is acknowledged longer after the loss than an answer takes is acknowledged alone.
    let log = writer.log();
    let first = log.acks.iter().map(|ack| ack.at).find(|at| *at > surely + millis(1500));
    let Some(first) = first else { return Err("nothing was acknowledged alone".into()) };
    ensure!(first.since(surely) >= STANDBY_TIMEOUT - millis(500), "{how}: after {} ms already", ms(surely, first));
    let status = a.status()?;
    ensure!(status.pointer("/replication/in_sync") == Some(&false.into()), "{how}: alone and in sync: {status}");
    ensure!(status.pointer("/gate/open") == Some(&true.into()), "{how}: the gate noticed");
    let check = a.cli(&["check"])?;
    ensure!(check.code == 1 && check.out.contains("alone since"), "{how}: check says {} {}", check.code, check.out);
    what_is_told_fits(lab, how, writer, surely)?;
    eprintln!(
        "figure: the standby is {how}: alone {} ms after, first commit without it {} ms after",
        ms(lost, seen),
        ms(lost, first)
    );
    Ok((surely, first))
}

/// What a failover would lose is counted, and what to type is said: neither less than was acknowledged alone, nor more
/// than ever was.
fn what_is_told_fits(lab: &Lab, how: &str, writer: &Writer, surely: Instant) -> Outcome {
    // The newest look at PostgreSQL is a little older than the status, and commits waited before they went on alone.
    let (from, until) = (surely + millis(500), now() - secs(2));
    let status = lab.a.status()?;
    let log = writer.log();
    let alone = log.acks.iter().filter(|ack| ack.at > from && ack.at < until).count() as u64;
    let lost = status.pointer("/outlook/lost").and_then(serde_json::Value::as_u64);
    // The daemon's own work is counted as well, and what was on its way when the standby was seen last.
    let most = log.acks.len() as u64 + 500;
    ensure!(lost.is_some_and(|lost| lost >= alone && lost <= most), "{how}: {alone} to {most}, and told is {status}");
    ensure!(status.pointer("/outlook/safe") == Some(&false.into()), "{how}: called safe: {status}");
    let next = text_at(&status, "/next/command");
    ensure!(how != "killed" || next == "portcullis rejoin b", "{how}: next is {next:?}: {status}");
    Ok(())
}

/// The record said `sync=none` before anything was acknowledged alone: no look that was begun after such an
/// acknowledgement, and ended before the standby was back, saw it say otherwise.
fn record_came_first(
    lab: &Lab,
    looks: &[Look<Option<Record>>],
    log: &WriterLog,
    (from, until): (Instant, Instant),
) -> Outcome {
    let acks: Vec<Instant> = log.acks.iter().map(|ack| ack.at).filter(|at| *at >= from && *at <= until).collect();
    let (Some(first), true) = (acks.first(), acks.len() > 10) else {
        return Err("nothing was acknowledged alone".into());
    };
    let after = looks.iter().filter(|look| look.asked >= *first && look.answered <= until);
    let markers: Vec<&String> = after.filter_map(|look| look.seen.as_ref().map(|(_, marker)| marker)).collect();
    ensure!(markers.len() > 5, "only {} looks at the record of {}", markers.len(), lab.witness.address());
    let wrong = markers.iter().find(|marker| !marker.contains("sync=none"));
    ensure!(wrong.is_none(), "acknowledged alone while the record said {wrong:?}");
    Ok(())
}

#[test]
fn a_lost_standby_costs_its_time_and_no_client_an_error_and_comes_back() {
    in_lab(Options::new("alone"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        an_open_transaction_is_no_loss(lab)?;
        let watcher = record(lab.client.ns(), lab.witness.address())?;
        // One session for all of it: it ends with its first error.
        let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::once(1, a.gate()?))?;
        let mut spans = Vec::new();

        let (_, first) = goes_alone(lab, "killed", &writer, || {
            stop_all(&b.host.named("postgres")?)?;
            for pid in b.host.named("postgres")? {
                crate::harness::host::send(pid, Signal::KILL)?;
            }
            wait_until(secs(60), "no PostgreSQL on b", || Ok(b.host.named("postgres")?.is_empty())).map(drop)
        })?;
        spans.push((first, now()));
        b.postgres.start(&b.host)?;

        let mut frozen = Vec::new();
        let (_, first) = goes_alone(lab, "frozen", &writer, || {
            frozen = b.host.named("postgres")?;
            stop_all(&frozen).map(drop)
        })?;
        spans.push((first, now()));
        continue_all(&frozen);

        let (_, first) = goes_alone(lab, "cut off from its primary alone", &writer, || {
            lab.switch.cut_port_between(&a.host.plug, &b.host.plug, 5432)
        })?;
        spans.push((first, now()));
        lab.switch.heal()?;

        a.wait_in_sync(secs(180))?;
        writer.wait_acks(20, secs(60))?;
        let marker = lab.witness.marker()?.unwrap_or_default();
        ensure!(marker.contains("sync=b"), "in sync, and the record says {marker}");
        let check = a.cli(&["check"])?;
        ensure!(check.code == 0, "in sync again, and check says {} {}", check.code, check.out);
        let kinds: Vec<String> = events(a)?;
        for kind in ["standby_lost", "alone", "standby_back", "in_sync"] {
            let count = kinds.iter().filter(|one| *one == kind).count();
            ensure!(count >= 3, "{count} events of {kind}: {kinds:?}");
        }
        let metrics = a.http("/metrics")?.1;
        ensure!(metrics.contains("\nportcullis_standby_losses_total 3"), "losses counted otherwise: {metrics}");

        let log = writer.finish();
        let looks = watcher.finish();
        ensure!(log.errors.is_empty() && log.sessions.len() == 1, "{:?} in {:?}", log.errors, log.sessions);
        for span in spans {
            record_came_first(lab, &looks, &log, span)?;
        }
        wait_until(secs(60), "b to hold all that was acknowledged", || Ok(lost(&log, 1, &b.postgres)?.is_empty()))?;
        Ok(())
    });
}

/// What an open transaction has written lies in memory: no standby is sent it, and none owes it.
fn an_open_transaction_is_no_loss(lab: &Lab) -> Outcome {
    let a = &lab.a.postgres;
    let unsent = || {
        let sql = "SELECT pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn() > 0";
        Ok(a.sql("app", sql)?.trim() == "t")
    };
    std::thread::scope(|scope| {
        let sql = "BEGIN; CREATE TEMP TABLE gone AS SELECT 1 AS n; \
                   INSERT INTO acks SELECT 99, n FROM generate_series(1, 3) n; SELECT pg_sleep(9); ROLLBACK";
        let open = scope.spawn(move || a.sql("app", sql));
        wait_until(secs(5), "WAL that is written and not flushed", unsent)?;
        let said = || Ok(events(&lab.a)?.iter().any(|kind| kind == "standby_lost"));
        let outcome = never(secs(6), "a standby lost for what it was never sent", said);
        let still = unsent()?;
        ensure!(still, "the WAL was flushed meanwhile, so this showed nothing");
        open.join().map_err(|_| "the open transaction panicked")??;
        outcome
    })
}

fn events(node: &crate::harness::node::Node) -> Outcome<Vec<String>> {
    let status = node.status()?;
    let rows = status.pointer("/events").and_then(|rows| rows.as_array()).cloned().unwrap_or_default();
    Ok(rows.iter().map(|row| text_at(row, "/kind")).collect())
}

/// The other promise of R4: what was acknowledged alone is not silently missing after a promote.
#[test]
fn a_standby_that_lacks_acknowledged_writes_is_not_promoted_without_a_word() {
    in_lab(Options::new("lacks"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::once(1, a.gate()?))?;
        let cut = || lab.switch.cut_port_between(&a.host.plug, &b.host.plug, 5432);
        goes_alone(lab, "cut off, and then the primary dies", &writer, cut)?;
        let since = text_at(&a.status()?, "/replication/alone_since");
        a.power_off()?;
        let refused = b.cli(&["promote", "--yes"])?.expect(3)?;
        let said = format!("{}{}", refused.out, refused.err);
        ensure!(said.contains(&format!("alone since {since}")), "it says not since when ({since}): {said}");
        let accepted = b.cli(&["promote", "--yes", "--accept-data-loss"])?.expect(0)?;
        b.wait_active(secs(60))?;
        let log = writer.finish();
        let missing = lost(&log, 1, &b.postgres)?;
        ensure!(!missing.is_empty(), "nothing is missing, so there was nothing to refuse: {}", accepted.out);
        Ok(())
    });
}

#[test]
fn a_primary_starts_without_its_standby_once_the_record_says_alone() {
    in_lab(Options::new("startalone"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        b.postgres.stop(&b.host, "immediate")?;
        a.postgres.stop(&a.host, "immediate")?;
        a.postgres.start(&a.host)?;
        let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::service(1, lab.witness.address()))?;
        let marker = lab.witness.marker()?.unwrap_or_default();
        ensure!(marker.contains("epoch=1 ") && marker.contains("sync=none"), "served, and the record says {marker}");
        b.postgres.start(&b.host)?;
        a.wait_in_sync(secs(120))?;
        writer.wait_acks(20, secs(60)).map(drop)
    });
}

#[test]
fn block_waits_for_ever_and_says_for_whom() {
    in_lab(Options::new("blocks"), |lab| {
        for node in lab.nodes() {
            node.reconfigure("[replication]\n", "[replication]\non_standby_loss = \"block\"\n")?;
        }
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::once(1, a.gate()?))?;
        b.postgres.stop(&b.host, "immediate")?;
        let stopped = now();
        a.wait_status(STANDBY_TIMEOUT + BUSY, "to say that commits wait", |status| {
            !text_at(status, "/replication/waiting_since").is_empty()
        })?;
        let acks = writer.log().acks_after(stopped).len();
        let moved = || Ok(writer.log().acks_after(stopped).len() > acks);
        never(STANDBY_TIMEOUT * 4, "a commit acknowledged alone under block", moved)?;
        let check = a.cli(&["check"])?;
        ensure!(check.code == 1 && check.out.contains("commits wait"), "check says {} {}", check.code, check.out);
        ensure!(a.gate_is_open()?, "the gate is shut");
        let marker = lab.witness.marker()?.unwrap_or_default();
        ensure!(marker.contains("sync=b"), "blocked, and the record says {marker}");
        b.postgres.start(&b.host)?;
        writer.wait_acks(20, secs(60))?;
        let log = writer.finish();
        ensure!(log.errors.is_empty() && log.sessions.len() == 1, "{:?} in {:?}", log.errors, log.sessions);
        Ok(())
    });
}
