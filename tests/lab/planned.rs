//! A planned change of the active node, and what the surfaces say before, between and after.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::node::{GATE_PORT, Node, http_from, text_at};
use crate::harness::postgres::{APP_PASSWORD, Template};
use crate::harness::sys::{Outcome, ms, secs, wait_until};
use crate::harness::watch::{never_two_active, roles};
use crate::in_lab;
use serde_json::Value;

#[test]
fn writes_flow_and_promote_moves_the_service_without_loss() {
    in_lab(Options::new("planned"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let epoch = a.epoch()?;
        // Asked from inside each node: the promise is about what each of them believes of itself.
        let (roles_a, roles_b) = (roles(a.ns(), a.address())?, roles(b.ns(), b.address())?);
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        let rehearsed = b.cli(&["promote", "--yes", "--dry-run"])?.expect(0)?;
        ensure!(a.epoch()? == epoch, "a dry run changed the epoch");
        writer.wait_acks(20, secs(60))?;

        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        // Who was there is carried over, through a; who comes now is led to b.
        writer.wait_acks(20, secs(60))?;
        ensure!(writer.log().errors.is_empty(), "a session that could go on had errors: {:?}", writer.log().errors);
        let newcomer = Writer::start_flowing(client, WriterOptions::service(2, lab.witness.address()))?;
        newcomer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        let newcomers = newcomer.finish();
        ensure!(b.epoch()? > epoch, "the epoch did not rise: {} then {}", epoch, b.epoch()?);
        writer.wait_acks(50, secs(60))?;
        let marker = lab.witness.marker()?.unwrap_or_default();
        ensure!(marker.contains("active=b"), "the marker names another: {marker}");

        // The old primary comes back as streaming standby by itself, and commits wait for it again.
        a.wait_status(secs(60), "to stream as a standby", |status| {
            text_at(status, "/role") == "passive" && text_at(status, "/nodes/0/role") == "standby"
        })?;
        b.wait_in_sync(secs(60))?;
        ensure!(a.postgres.is_read_only()?, "the old primary is writable");
        writer.wait_acks(20, secs(60))?;

        let log = writer.finish();
        let missing = lost(&log, 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        let missing = lost(&newcomers, 2, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged to the newcomer but missing on b: {missing:?}");
        wait_until(secs(60), "a to hold all that was acknowledged", || Ok(lost(&log, 1, &a.postgres)?.is_empty()))?;
        let (seen_a, seen_b) = (roles_a.finish(), roles_b.finish());
        never_two_active(&seen_a, &seen_b)?;
        ensure!(seen_a.len() > 50 && seen_b.len() > 50, "the watchers saw {} and {} looks", seen_a.len(), seen_b.len());
        let again = b.cli(&["promote", "--yes"])?.expect(0)?;
        let (gap, _) = log.longest_gap();
        eprintln!(
            "planned: {} acknowledged, none lost; promote took {} ms, longest outage {} ms, {} errors; dry run said {} \
             lines; promote again: {}",
            log.acks.len(),
            ms(said.started, said.ended),
            gap.as_millis(),
            log.errors.len(),
            rehearsed.out.lines().count(),
            again.out.trim()
        );
        // And back, from the other node this time.
        a.cli(&["switchover", "--to", "a"])?.expect(0)?;
        a.wait_active(secs(60)).map(drop)
    });
}

#[test]
fn surfaces_tell_the_truth() {
    in_lab(Options::new("surfaces"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        while_in_service(lab)?;

        // Lapsed: nobody vouches for a. The replication stays, so only the proof is missing.
        lab.witness.kill()?;
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, crate::harness::node::PEER_PORT)?;
        a.wait_status(secs(60), "to lapse", |status| text_at(status, "/gate/state") == "lapsed")?;
        ensure!(a.role()? == "passive", "lapsed, and its role is {}", a.role()?);
        expect_pages(a, &[("/active", 503), ("/primary", 503), ("/health", 200)])?;
        expect_check(a, &[2], "CRITICAL")?;
        ensure!(!crate::harness::net::connects(lab.client.ns(), a.address(), GATE_PORT)?, "a lapsed gate accepts");
        lab.switch.heal()?;
        lab.witness.start()?;
        a.wait_active(secs(60))?;
        while_in_service(lab)?;

        // Fenced, by word of the operator; durable.
        a.cli(&["fence", "--reason", "lab"])?.expect(0)?;
        a.wait_role("fenced", secs(60))?;
        expect_pages(a, &[("/active", 503), ("/read-write", 503), ("/health", 200)])?;
        expect_check(a, &[1, 2], "")?;
        let status = a.status()?;
        ensure!(
            text_at(&status, "/gate/state") == "fenced",
            "fenced, but the gate is {}",
            text_at(&status, "/gate/state")
        );
        ensure!(!text_at(&status, "/gate/reason").is_empty(), "a fenced gate gives no reason");
        ensure!(!crate::harness::net::connects(lab.client.ns(), a.address(), GATE_PORT)?, "a fenced gate accepts");
        a.stop_daemon()?;
        let silent = a.cli(&["check"])?;
        ensure!(silent.code == 2, "check without a daemon ends with {}: {}", silent.code, silent.out);
        a.cli(&["status"])?.expect(1)?;
        a.start_daemon()?;
        ensure!(a.role()? == "fenced", "a restart lifted the fence: {}", a.role()?);

        // The other node takes over and says so; a shows up as no primary anywhere.
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        expect_pages(b, &[("/active", 200), ("/replica", 503)])?;
        let rows = rows(&b.http("/pool_nodes")?.1);
        let serves =
            ["2", "1"].iter().any(|up| rows.get(1) == Some(&format!("1,192.0.2.12,5432,{up},0.500000,primary")));
        ensure!(serves, "/pool_nodes on b: {rows:?}");
        ensure!(!rows[0].ends_with(",primary"), "two primaries: {rows:?}");
        Ok(())
    });
}

/// Every surface of both nodes while a serves and b stands by.
fn while_in_service(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    b.wait_status(secs(60), "to be a standby in service", |status| {
        text_at(status, "/role") == "passive" && status.pointer("/postgres/streaming") != Some(&Value::Bool(false))
    })?;
    a.wait_in_sync(secs(60))?;
    expect_pages(a, &[("/active", 200), ("/primary", 200), ("/read-write", 200), ("/replica", 503), ("/health", 200)])?;
    wait_until(secs(60), "/replica on b", || Ok(b.http("/replica")?.0 == 200))?;
    expect_pages(b, &[("/active", 503), ("/read-write", 503), ("/read-only", 200), ("/health", 200)])?;
    let outside = http_from(lab.client.ns(), a.address(), "/active")?.0;
    ensure!(outside == 200, "/active asked from the client host answers {outside}");
    for node in [a, b] {
        let page = rows(&node.http("/pool_nodes")?.1);
        let right = page.len() == 2
            && ["2", "1"].iter().any(|up| page[0] == format!("0,192.0.2.11,5432,{up},0.500000,primary"))
            && ["2", "1"].iter().any(|up| page[1] == format!("1,192.0.2.12,5432,{up},0.500000,standby"));
        ensure!(right, "/pool_nodes on {}: {page:?}", node.name());
        let cgi = node.cli(&["cgi"])?.expect(0)?.out.replace("\r\n", "\n");
        let (head, body) = cgi.split_once("\n\n").unwrap_or_default();
        ensure!(head.to_ascii_lowercase().starts_with("content-type: text/plain"), "cgi begins with {head:?}");
        ensure!(rows(body) == page, "cgi says {body:?}");
        expect_check(node, &[0], "OK")?;
        let nodes: Value = serde_json::from_str(&node.cli(&["nodes", "--json"])?.expect(0)?.out)?;
        let nodes = nodes.as_array().cloned().or_else(|| nodes["nodes"].as_array().cloned()).unwrap_or_default();
        ensure!(nodes.len() == 2 && nodes[0]["role"] == "primary" && nodes[1]["role"] == "standby", "nodes: {nodes:?}");
        let status: Value = serde_json::from_str(&node.cli(&["status", "--json"])?.expect(0)?.out)?;
        ensure!(status["node"] == node.name(), "status --json of another node: {}", status["node"]);
        let metrics = node.http("/metrics")?;
        ensure!(metrics.0 == 200 && metrics.1.contains("# HELP portcullis_"), "/metrics: {}", metrics.1);
        let page = node.http("/")?;
        ensure!(page.0 == 200 && page.1.contains("192.0.2.11"), "the page for people does not name the nodes");
    }
    let psql = Template::once()?.bin_dir.join("psql").display().to_string();
    let dsn =
        format!("host=db.example.org port={GATE_PORT} user=app dbname=app password={APP_PASSWORD} connect_timeout=3");
    let shown = lab.client.exec("", &[&psql, "-XAt", &dsn, "-c", "SHOW pool_nodes"])?;
    let lines: Vec<&str> = shown.lines().collect();
    ensure!(lines.len() == 2, "SHOW pool_nodes: {shown:?}");
    ensure!(lines[0].contains("192.0.2.11") && lines[0].contains("primary"), "SHOW pool_nodes: {shown:?}");
    ensure!(lines[1].contains("192.0.2.12") && lines[1].contains("standby"), "SHOW pool_nodes: {shown:?}");
    let page = lab.a.http("/pool_nodes?format=4.3")?.1;
    // The lag of the moment apart.
    let cells = |line: &str, separator: char| {
        let mut cells: Vec<String> = line.split(separator).map(str::to_owned).collect();
        cells[10].clear();
        cells
    };
    let same = lines.iter().zip(page.lines()).all(|(shown, told)| cells(shown, '|') == cells(told, ','));
    ensure!(same && page.lines().count() == 2, "/pool_nodes?format=4.3 says {page:?}, SHOW pool_nodes {lines:?}");
    let since = lines[1].rsplit('|').next().unwrap_or_default();
    ensure!(since.len() == "2026-11-20 15:11:00".len(), "since when the standby is one: {since:?}");

    // The console, through the daemon: what it changes is the daemon's, and is noted.
    let console = dsn.replace("dbname=app", "dbname=portcullis");
    let psql = |sql: &str| lab.client.exec("", &[&psql, "-XAt", "-v", "ON_ERROR_STOP=1", &console, "-c", sql]);
    let said = psql("SHOW STATUS")?;
    ensure!(said.contains("summary|a is active: its gate is open\n"), "SHOW STATUS: {said}");
    let said = psql("PAUSE; SHOW LEASE; RESUME; RELOAD")?;
    ensure!(said.contains("PAUSE") && said.contains("a|") && said.contains("RELOAD"), "the console: {said}");
    wait_until(secs(30), "the pause to be over", || Ok(lab.a.http("/active")?.0 == 200))?;
    for verb in ["pause", "resume", "reload"] {
        wait_until(secs(30), &format!("an event that tells of the console's {verb}"), || {
            let events = lab.a.cli(&["events"])?.expect(0)?.out;
            Ok(events
                .lines()
                .any(|line| line.contains("role app from ") && line.contains(&format!("(console): {verb}: done"))))
        })?;
    }
    let said = psql("SHOW EVENTS")?;
    ensure!(said.contains("(console): reload"), "SHOW EVENTS: {said}");
    Ok(())
}

fn rows(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).filter(|line| !line.is_empty()).collect()
}

fn expect_pages(node: &Node, pages: &[(&str, u16)]) -> Outcome {
    for (path, expected) in pages {
        let (code, body) = node.http(path)?;
        ensure!(code == *expected, "{path} on {} answers {code}, not {expected}: {body}", node.name());
    }
    Ok(())
}

fn expect_check(node: &Node, codes: &[i32], word: &str) -> Outcome {
    let said = node.cli(&["check"])?;
    ensure!(
        codes.contains(&said.code) && said.out.starts_with("PORTCULLIS ") && said.out.contains(word),
        "check on {} ended with {}: {}{}",
        node.name(),
        said.code,
        said.out,
        said.err
    );
    Ok(())
}
