//! What a day of commands leaves behind, looked at where another lab has had its day: who did what, how long it took,
//! and no secret anywhere.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::node::{Node, text_at};
use crate::harness::postgres::{APP_PASSWORD, REPLICATION_PASSWORD};
use crate::harness::sys::{Fail, Outcome, secs, wait_until};
use serde_json::Value;

/// The `command` events of a node, oldest first.
fn commands(node: &Node) -> Outcome<Vec<String>> {
    let events: Vec<Value> = serde_json::from_str(&node.cli(&["events", "--json"])?.expect(0)?.out)?;
    Ok(events.iter().filter(|e| text_at(e, "/kind") == "command").map(|e| text_at(e, "/text")).collect())
}

/// Each command is an event with who, what and its result, and a line of the log.
pub fn commands_are_told(node: &Node, expected: &[&str]) -> Outcome {
    let log = std::fs::read_to_string(&node.log)?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("kind=\"command\"")).collect();
    let told = commands(node)?;
    for words in expected {
        let it = told.iter().find(|text| text.starts_with("root (pid ") && text.contains(words));
        let it = it.ok_or_else(|| Fail(format!("no event of {}: {words}: {told:#?}", node.name())))?;
        ensure!(lines.iter().any(|line| line.contains(it.as_str())), "no line of {}: {it}", node.name());
    }
    Ok(())
}

/// A reload by signal is told, and who sent it is not known.
pub fn a_signal_is_told(node: &Node) -> Outcome {
    node.kill_daemon(rustix::process::Signal::HUP)?;
    wait_until(secs(60), "SIGHUP to be told", || {
        Ok(commands(node)?.iter().any(|text| text.starts_with("SIGHUP: reload: done: reloaded ")))
    })?;
    Ok(())
}

/// The value of a sample; none: it is not there.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// `active` serves after a switchover from `standby`, and clients write.
pub fn measured(active: &Node, standby: &Node) -> Outcome {
    let metrics = active.http("/metrics")?.1;
    let of = |name: &str| sample(&metrics, name).ok_or_else(|| Fail(format!("no {name} in {metrics}")));
    for counted in ["query", "transaction"] {
        let [count, sum] = ["count", "sum"].map(|part| of(&format!("portcullis_{counted}_duration_seconds_{part}")));
        let (count, sum) = (count?, sum?);
        ensure!(count >= 20.0 && sum > 0.0 && sum / count < 60.0, "{count} {counted} durations, {sum} s of all");
    }
    let done = of("portcullis_procedures_total{kind=\"switchover\",result=\"done\"}")?;
    let took = of("portcullis_procedure_duration_seconds_sum{kind=\"switchover\",result=\"done\"}")?;
    ensure!(done >= 1.0 && took > 0.0, "{done} switchovers in {took} s");
    for kind in ["witness", "pledge"] {
        let age = of(&format!("portcullis_proof_age_seconds{{kind=\"{kind}\"}}"))?;
        ensure!((0.0..60.0).contains(&age), "the {kind}'s proof is {age} s old");
    }
    let behind = of(&format!("portcullis_replication_delay_seconds{{node=\"{}\"}}", standby.name()))?;
    ensure!((0.0..60.0).contains(&behind), "{behind} s behind");
    let cuts = "portcullis_gate_cuts_by_cause_total{cause=\"switchover\"}";
    let metrics = standby.http("/metrics")?.1;
    ensure!(sample(&metrics, cuts) == Some(1.0), "the cut of the switchover: {metrics}");
    Ok(())
}

/// No secret of this lab is in any log, status, metric, page or event.
pub fn no_secret_is_told(lab: &Lab) -> Outcome {
    let cluster = std::fs::read_to_string(lab.dir.join("cluster.key"))?;
    let secrets = [cluster.trim(), lab.witness.key(), REPLICATION_PASSWORD, APP_PASSWORD];
    for node in lab.nodes() {
        let mut told = vec![
            ("log", std::fs::read_to_string(&node.log)?),
            ("event log", std::fs::read_to_string(node.state_seen_from_here("events.log")?)?),
            ("events", node.cli(&["events", "--json"])?.expect(0)?.out),
            ("status", node.cli(&["status"])?.expect(0)?.out),
        ];
        for path in ["/", "/status.json", "/metrics", "/pool_nodes", "/active", "/replica"] {
            told.push((path, node.http(path)?.1));
        }
        for (place, text) in &told {
            ensure!(!text.is_empty(), "{place} of {} is empty", node.name());
            for secret in secrets {
                ensure!(!text.contains(secret), "{place} of {} has {secret:.8}...", node.name());
            }
        }
    }
    Ok(())
}
