//! What a person reads at three in the morning: `promote` against a dead node in a pipe, and the rejoin after it.

use crate::ensure;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::host::{continue_all, stop_all};
use crate::harness::net::VIP;
use crate::harness::node::GATE_PORT;
use crate::harness::sys::{Outcome, ms, pause, secs, wait_until};
use crate::in_lab;
use serde_json::Value;

/// Every one of these, in this order.
fn expect_in_order(text: &str, words: &[&str]) -> Outcome {
    let mut rest = text;
    for word in words {
        let at = rest.find(word);
        ensure!(at.is_some(), "{word:?} is not (or not in this place) in:\n{text}");
        rest = &rest[at.unwrap_or_default() + word.len()..];
    }
    Ok(())
}

#[test]
fn a_promote_over_a_dead_node_says_what_it_knows_and_what_comes_next() {
    in_lab(Options::new("night"), |lab| {
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        // The folder is the daemon's user's own.
        let told = b.dir.join("state/told");
        let command = format!("\n[notify]\ncommand = [\"/bin/sh\", \"-c\", \"cat >> {}\"]\n", told.display());
        let text = std::fs::read_to_string(&b.config)?;
        lab.start_pair()?;
        std::fs::write(&b.config, text + &command)?;
        let reloaded = b.cli(&["reload"])?.expect(0)?;
        ensure!(reloaded.out.contains("notify.command"), "a reload does not apply it: {}", reloaded.out);
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        a.power_off()?;
        // What the daemon knows by itself: the peer has been silent for these 2 s.
        pause(secs(2));
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        let door = format!("the front door answers at {} after ", b.gate()?);
        let facts = [
            "a does not answer; last contact: 20",
            " ago",
            "the record: epoch 1, active a, sync b, since 20",
            "PostgreSQL here: standby, timeline 1, received 0/",
            "no acknowledged write is missing",
            "the plan: a failover to epoch 2: ",
            "W = 3.26 s",
            "the record moved: epoch 2, active b",
            "3 s left",
            "2 s left",
            "1 s left",
            "b is active at epoch 2; total ",
            &door,
            " s since Enter",
            "b serves alone. When a is back: portcullis rejoin a",
        ];
        expect_in_order(&said.out, &facts)?;
        ensure!(
            !said.out.contains('\r') && !said.out.contains('\x1b'),
            "a pipe got a terminal's codes: {:?}",
            said.out
        );
        ensure!(said.err.is_empty(), "on standard error: {}", said.err);
        let missing = lost(&writer.finish(), 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        eprintln!("night: first ack {} ms after Enter\n{}", ms(said.started, first), said.out);

        // Whoever is to be woken was told, with the epoch that was won.
        wait_until(secs(60), "the notices", || {
            let seen = std::fs::read_to_string(&told).unwrap_or_default();
            let seen: Vec<Value> = seen.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let opened = seen.iter().find(|notice| notice["kind"] == "gate_opened");
            Ok(opened.is_some_and(|notice| notice["epoch"] == 2 && notice["role"] == "active" && notice["node"] == "b"))
        })?;
        ensure!(b.http("/metrics")?.1.contains("portcullis_notices_sent_total"), "no counter of notices");

        a.host.power_on()?;
        a.start_daemon()?;
        let back = b.rejoin("a")?;
        expect_in_order(&back.out, &["a follows as synchronous standby: a failover would lose nothing"])?;

        // As JSON: every line is an object, the last one has the exit code; and a switchover says who follows.
        let planned = a.cli(&["switchover", "--to", "a"])?.expect(0)?;
        let words = ["the plan: a switchover", "a is active at epoch 3", "the front door answers at ", "b follows as "];
        expect_in_order(&planned.out, &words)?;
        a.wait_in_sync(secs(60))?;
        let json = b.cli(&["promote", "--yes", "--json"])?.expect(0)?;
        let lines: Vec<Value> = json.out.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        ensure!(lines.last().is_some_and(|line| line["exit"] == 0), "the last line: {:?}", lines.last());
        let door = lines.iter().find_map(|line| line.pointer("/data/front_door"));
        ensure!(door.is_some_and(|door| door["answers"] == true), "no front door in {}", json.out);
        Ok(())
    });
}

/// PostgreSQL hangs, first the standby's, then the active node's, and both daemons live.
#[test]
fn a_promote_beside_and_over_a_postgresql_that_hangs() {
    in_lab(Options::new("hung"), |lab| {
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        lab.start_pair()?;
        b.wait_in_sync(secs(60))?;
        let again = a.rejoin("b")?;
        expect_in_order(&again.out, &["b is a standby of a already, in sync; nothing was changed"])?;
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;

        let frozen = b.host.named("postgres")?;
        stop_all(&frozen)?;
        let refused = b.cli(&["promote", "--dry-run"])?.expect(3)?;
        ensure!(refused.err.contains("the local PostgreSQL does not answer"), "{}", refused.err);
        continue_all(&frozen);
        b.wait_in_sync(secs(60))?;
        a.wait_in_sync(secs(60))?;
        writer.wait_acks(5, secs(60))?;

        stop_all(&a.host.named("postgres")?)?;
        wait_until(secs(60), "check to say that it hangs", || {
            let check = a.cli(&["check"])?;
            Ok(check.code == 2 && check.out.contains("PostgreSQL does not answer since"))
        })?;
        let planned = b.cli(&["switchover"])?.expect(3)?;
        ensure!(planned.err.contains("`portcullis promote` here takes over with a's consent"), "{}", planned.err);
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        let words = ["no acknowledged write is missing", "with a's consent, so nothing is waited for", "is fenced at"];
        expect_in_order(&said.out, &words)?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        eprintln!("figure: the active PostgreSQL hung: first ack {} ms after Enter", ms(said.started, first));
        // Generous: it was ten minutes and a refusal.
        ensure!(ms(said.started, first) < 30_000, "{} ms", ms(said.started, first));
        let missing = lost(&writer.finish(), 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        Ok(())
    });
}

/// A daemon that has only just started has not looked at its PostgreSQL yet.
#[test]
fn a_promote_right_after_the_start_waits_for_the_first_look() {
    in_lab(Options::new("firstlook"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        a.power_off()?;
        b.stop_daemon()?;
        b.start_daemon()?;
        // It answers before it has looked.
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        ensure!(!said.out.contains("not seen yet"), "{}", said.out);
        b.wait_active(secs(60)).map(drop)
    });
}

/// A VIP and no DNS: the word of the person who switched the old node off replaces the wait, and only that.
#[test]
fn with_a_vip_alone_the_door_is_the_vip_and_a_node_that_is_off_is_not_waited_for() {
    in_lab(Options::vip_only("nightvip"), |lab| {
        let (a, b) = (&lab.a, &lab.b);
        lab.start_servers()?;
        b.start_daemon()?;
        a.start_daemon()?;
        b.wait_peer()?;
        let door = format!("the front door answers at {VIP}:{GATE_PORT} after ");
        let first = a.cli(&["promote", "--yes"])?.expect(0)?;
        expect_in_order(&first.out, &["is active at epoch 1", &door])?;
        a.wait_in_sync(secs(60))?;
        // The standby has heard that it is in sync: else what is lost is unknown.
        b.wait_in_sync(secs(60))?;
        a.power_off()?;
        let silent = b.cli(&["promote", "--yes"])?.expect(3)?;
        ensure!(silent.err.contains("--peer-is-off a"), "{}", silent.err);
        let words = ["promote", "--yes", "--accept-data-loss", "--peer-is-off", "a"];
        let early = b.cli(&words)?.expect(3)?;
        ensure!(early.err.contains("less than W ago"), "{}", early.err);
        // W without a word of it.
        pause(secs(4));
        let said = b.cli(&words)?.expect(0)?;
        let facts = ["unknown since the last contact with a", "a is off, as you say, so nothing is waited for", &door];
        expect_in_order(&said.out, &facts)?;
        ensure!(!said.out.contains("s left"), "it counted down: {}", said.out);
        expect_in_order(&said.out, &["b serves alone. When a is back: portcullis rejoin a"])
    });
}
