//! A third node without a vote: made by `rejoin`, follows the active node through switchover and failover, never votes,
//! never is promoted, and is brought back where it cannot follow.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::node::{Node, text_at};
use crate::harness::sys::{Outcome, secs, wait_until};
use crate::in_lab;
use serde_json::Value;

const STREAMS: &str = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'c' AND state = 'streaming'";
const SLOT: &str = "SELECT active FROM pg_replication_slots WHERE slot_name = 'portcullis_c'";

fn options(name: &'static str) -> Options {
    Options { third: true, ..Options::new(name) }
}

/// The pair in service, c with a daemon and no PostgreSQL, and the line in pg_hba.conf that lets it replicate.
fn start(lab: &Lab) -> Outcome<&Node> {
    lab.start_pair()?;
    let c = lab.c.as_ref().ok_or("no third node")?;
    for node in lab.nodes() {
        node.postgres.append("pg_hba.conf", "host replication replicator 192.0.2.13/32 scram-sha-256\n")?;
        node.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
    }
    c.start_daemon()?;
    c.wait_status(secs(60), "to hear the active node", |status| text_at(status, "/peer/role") == "active")?;
    Ok(c)
}

/// c streams from the active node over its slot, and commits wait for the voter alone.
fn follows(active: &Node, other: &str, c: &Node) -> Outcome {
    let name = active.name();
    wait_until(secs(60), &format!("c to stream from {name}"), || Ok(active.postgres.sql("postgres", STREAMS)? == "1"))?;
    ensure!(active.postgres.sql("postgres", SLOT)? == "t", "c does not use its slot on {name}");
    c.wait_status(secs(60), "to be a standby in service", |status| {
        status.pointer("/postgres/streaming") == Some(&Value::Bool(true)) && text_at(status, "/peer/name") == name
    })?;
    let list = active.postgres.sql("postgres", "SHOW synchronous_standby_names")?;
    ensure!(list.is_empty() || list == format!("\"{other}\""), "{name} waits for {list}");
    let state = "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'c'";
    ensure!(active.postgres.sql("postgres", state)? == "async", "c is more than an asynchronous standby of {name}");
    Ok(())
}

/// Every node's `nodes` say this: name, status and role in the order of the file.
fn agree(nodes: &[&Node], wanted: &str) -> Outcome {
    for node in nodes {
        node.wait_status(secs(60), &format!("to show {wanted}"), |status| rows(status) == wanted)?;
    }
    Ok(())
}

fn rows(status: &Value) -> String {
    let rows = status["nodes"].as_array().cloned().unwrap_or_default();
    let row = |row: &Value| format!("{} {} {}", text_at(row, "/name"), text_at(row, "/status"), text_at(row, "/role"));
    rows.iter().map(row).collect::<Vec<_>>().join(", ")
}

#[test]
fn a_third_node_follows_whoever_is_active() {
    in_lab(options("third"), |lab| {
        let c = start(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        let writer = Writer::start_flowing(lab.client.ns(), WriterOptions::service(1, lab.witness.address()))?;
        agree(&[a, b, c], "a up primary, b up standby, c down standby")?;
        ensure!(!c.may_start_primary()?, "a primary may start on a node without a vote");

        // Made from nothing, asked for on the active node.
        a.cli(&["rejoin", "c"])?.expect(0)?;
        follows(a, "b", c)?;
        agree(&[a, b, c], "a up primary, b up standby, c up standby")?;
        for node in [a, b, c] {
            node.wait_status(secs(60), "to show c streaming", |status| {
                text_at(status, "/nodes/2/replication_state") == "streaming"
                    && status.pointer("/nodes/2/replication_delay_bytes").is_some_and(Value::is_u64)
            })?;
        }
        ensure!(c.may_start_primary()?, "a standby may not start");
        for node in [a, b, c] {
            node.cli(&["check"])?.expect(0)?;
            let page = node.http("/pool_nodes")?.1;
            let right = page.lines().count() == 3
                && ["1", "2"].iter().any(|up| page.contains(&format!("2,192.0.2.13,5432,{up},0.333333,standby\n")));
            ensure!(right, "/pool_nodes on {}: {page}", node.name());
        }
        for (path, code) in [("/replica", 200), ("/read-only", 200), ("/active", 503), ("/health", 200)] {
            let answered = c.http(path)?.0;
            ensure!(answered == code, "{path} on c answers {answered}");
        }
        c.cli(&["rejoin", "c", "--dry-run"])?.expect(0)?;

        // Never promoted, whoever asks.
        let said = c.cli(&["promote", "--yes"])?.expect(3)?;
        ensure!(
            said.err.contains("voter") && said.err.contains("a or b"),
            "promote on c said {}{}",
            said.out,
            said.err
        );
        c.cli(&["switchover", "--to", "c"])?.expect(3)?;
        a.cli(&["switchover", "--to", "c"])?.expect(3)?;
        a.cli(&["switchover"])?.expect(3)?;

        b.cli(&["switchover", "--to", "b"])?.expect(0)?;
        b.wait_active(secs(60))?;
        follows(b, "a", c)?;
        agree(&[a, b, c], "a up standby, b up primary, c up standby")?;
        b.wait_in_sync(secs(60))?;
        writer.wait_acks(20, secs(60))?;

        // A drill needs no --to: the service goes to the other voter and back. Not given on c, which has no vote.
        let before = b.epoch()?;
        let said = a.cli(&["drill"])?.expect(0)?;
        ensure!(said.out.contains("drill (the door alone): b to a: "), "the drill said {}", said.out);
        ensure!(b.epoch()? == before + 2, "there and back is two epochs, not {before} to {}", b.epoch()?);
        let said = c.cli(&["drill"])?.expect(3)?;
        ensure!(said.err.contains("no voter") && said.err.contains("a and b"), "drill on c said {}", said.err);
        b.wait_in_sync(secs(60))?;
        follows(b, "a", c)?;
        // The slot that c left on a would keep WAL there for ever.
        wait_until(secs(120), "c's slot on a to be dropped", || Ok(a.postgres.sql("postgres", SLOT)?.is_empty()))?;

        b.power_off()?;
        a.cli(&["promote", "--yes"])?.expect(0)?;
        a.wait_active(secs(60))?;
        follows(a, "b", c)?;
        agree(&[a, c], "a up primary, b down standby, c up standby")?;
        writer.wait_acks(20, secs(60))?;

        // Only behind: what it lacks is streamed, and nothing is copied or set aside.
        c.postgres.stop(&c.host, "fast")?;
        writer.wait_acks(20, secs(60))?;
        let rehearsed = a.cli(&["rejoin", "c", "--dry-run"])?.expect(0)?;
        ensure!(rehearsed.out.contains("would follow a: "), "the rehearsal said {}", rehearsed.out);
        let said = c.cli(&["rejoin", "c"])?.expect(0)?;
        ensure!(said.out.contains("will follow a: "), "it only had been stopped: {}", said.out);
        ensure!(said.out.contains("no rewind needed"), "it only had been stopped: {}", said.out);
        follows(a, "b", c)?;

        // A reboot of c: its PostgreSQL starts as what it is, and the daemon finds the active node.
        c.power_off()?;
        ensure!(c.boot()?, "the standby was not allowed to start");
        follows(a, "b", c)?;
        let log = writer.finish();
        wait_until(secs(60), "all that was acknowledged on c", || Ok(lost(&log, 1, &c.postgres)?.is_empty()))?;
        ensure!(c.postgres.is_read_only()?, "c is writable");
        eprintln!("figure: third: {} acknowledged, none missing on a or c", log.acks.len());
        Ok(())
    });
}

#[test]
fn a_third_node_that_cannot_follow_says_so_and_is_rejoined() {
    in_lab(options("thirdahead"), |lab| {
        let c = start(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        c.cli(&["rejoin", "c"])?.expect(0)?;
        follows(a, "b", c)?;

        // Promoted by hand: not a primary for long, and not a standby by itself either.
        // Not waited for there, and whatever psql says of it: the demotion may come before the end of that session.
        drop(c.postgres.sql("postgres", "SELECT pg_promote(false)"));
        c.wait_status(secs(60), "to say that it needs a rejoin", |status| {
            text_at(status, "/postgres/error").contains("portcullis rejoin c")
        })?;
        // While it is started again it answers nobody.
        wait_until(secs(60), "PostgreSQL on c to be read-only", || Ok(c.postgres.is_read_only().unwrap_or(false)))?;
        let said = c.cli(&["check"])?;
        ensure!([1, 2].contains(&said.code), "check on c ended with {}: {}", said.code, said.out);
        // Its last connection ends when the active node has noticed.
        wait_until(secs(60), "check on a to miss c", || {
            let said = a.cli(&["check"])?;
            Ok(said.code == 1 && said.out.contains("standby c is not streaming"))
        })?;
        b.cli(&["rejoin", "c"])?.expect(0)?;
        follows(a, "b", c)?;

        // c has WAL that b never got, and b takes over.
        lab.switch.cut_between(&a.host.plug, &b.host.plug)?;
        a.postgres
            .sql("app", "SET synchronous_commit = local; CREATE TABLE ahead AS SELECT generate_series(1, 9999)")?;
        let there = "SELECT count(*) FROM pg_class WHERE relname = 'ahead'";
        wait_until(secs(60), "c to have it", || Ok(c.postgres.sql("app", there)? == "1"))?;
        ensure!(b.postgres.sql("app", there)? == "0", "b has it as well: the cut is none");
        a.power_off()?;
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        c.wait_status(secs(90), "to say that it is ahead", |status| {
            text_at(status, "/postgres/error").contains("is ahead of where timeline")
        })?;
        b.cli(&["rejoin", "c"])?.expect(0)?;
        follows(b, "a", c)?;
        ensure!(c.postgres.sql("app", there)? == "0", "what nobody acknowledged is still on c");
        Ok(())
    });
}
