//! `/metrics` and `docs/monitoring/` as Prometheus's own tool reads them (Debian's package `prometheus`).

use crate::pages::{ask, parse_metrics};
use crate::states::{active, fenced, lapsed, passive, paused, serve};
use portcullis::base::time::Duration;
use portcullis::engine::status::{CUT_CAUSES, ProcedureStatus, ProofStatus, Snapshot, VipWitnessStatus};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What promtool finds wrong; it is silent when all is well.
fn promtool(args: &[&str], folder: &Path, input: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is there (packaging/setup.sh)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), said)
}

/// A state with everything in it that a metric is made of.
fn everything() -> Snapshot {
    let mut s = active();
    s.proofs =
        vec![ProofStatus { kind: "witness".into(), age_ms: 312 }, ProofStatus { kind: "pledge".into(), age_ms: 90 }];
    s.gate.forwarded = 2;
    s.replication.alone_since = Some("2026-11-20T15:11:00Z".into());
    s.replication.waiting_since = Some("2026-11-20T15:11:00Z".into());
    s.nodes[1].replication_delay_bytes = Some(16 << 20);
    s.nodes[1].replication_delay_seconds = Some(7.5);
    s.paused_databases = vec!["a\"b\\c\nd".into()];
    s.vip_witness = Some(VipWitnessStatus { witness: Some("192.0.2.1".into()), age_ms: Some(5), error: None });
    let step = "waiting".to_owned();
    s.procedure = Some(ProcedureStatus { kind: "promote".into(), id: 1, step, since: String::new() });
    s.counters.procedure_ended("promote", 0, Duration::from_millis(7300));
    s.counters.procedure_ended("promote", 3, Duration::from_millis(20));
    s.counters.procedure_ended("rejoin", 4, Duration::from_secs(90));
    s.counters.cuts.insert("lease".into(), 3);
    s
}

#[tokio::test]
async fn promtool_finds_nothing_wrong_in_any_state() {
    for snapshot in [active(), passive(), lapsed(), fenced(), paused(), everything()] {
        let (at, _switches, _publish) = serve(snapshot).await;
        let (_, _, text) = ask(at, "GET", "/metrics", "").await;
        let (good, said) = promtool(&["check", "metrics"], Path::new("."), &text);
        assert!(good && said.is_empty(), "{said}\n{text}");
        parse_metrics(&text);
    }
}

#[tokio::test]
async fn what_happened_is_told_by_kind_with_its_times() {
    let (at, _switches, _publish) = serve(everything()).await;
    let (_, _, text) = ask(at, "GET", "/metrics", "").await;
    let samples = parse_metrics(&text);
    let expected = [
        (r#"portcullis_proof_age_seconds{kind="witness"}"#, 0.312),
        (r#"portcullis_proof_age_seconds{kind="pledge"}"#, 0.09),
        ("portcullis_replication_alone_since_timestamp_seconds", 1_795_187_460.0),
        (r#"portcullis_replication_delay_seconds{node="midna"}"#, 7.5),
        (r#"portcullis_gate_cuts_by_cause_total{cause="lease"}"#, 3.0),
        (r#"portcullis_gate_cuts_by_cause_total{cause="vip"}"#, 0.0),
        (r#"portcullis_procedure_duration_seconds_bucket{le="5.0",kind="promote",result="done"}"#, 0.0),
        (r#"portcullis_procedure_duration_seconds_bucket{le="10.0",kind="promote",result="done"}"#, 1.0),
        (r#"portcullis_procedure_duration_seconds_sum{kind="rejoin",result="half_way"}"#, 90.0),
        (r#"portcullis_procedure_duration_seconds_count{kind="promote",result="refused"}"#, 1.0),
        (r#"portcullis_query_duration_seconds_bucket{le="0.0001"}"#, 0.0),
        (r#"portcullis_query_duration_seconds_bucket{le="0.00025"}"#, 1.0),
        (r#"portcullis_transaction_duration_seconds_bucket{le="60.0"}"#, 0.0),
        (r#"portcullis_transaction_duration_seconds_bucket{le="+Inf"}"#, 1.0),
        ("portcullis_transaction_duration_seconds_sum", 90.0),
        ("portcullis_pool_wait_duration_seconds_count", 0.0),
        (r#"portcullis_pool_queries_total{user="ann\"\\",database="app"}"#, 9000.0),
        (r#"portcullis_pool_finished_transactions_total{user="ann\"\\",database="app"}"#, 4100.0),
        (r#"portcullis_pool_waits_total{user="ann\"\\",database="app"}"#, 3.0),
        (r#"portcullis_pool_database_paused{database="a\"b\\c\nd"}"#, 1.0),
        ("portcullis_pools_untold", 0.0),
        ("portcullis_start_time_seconds", 1_763_651_460.25),
    ];
    for (name, value) in expected {
        assert_eq!(samples.get(name), Some(&value), "{name} in {samples:#?}");
    }
    let causes = samples.keys().filter(|name| name.starts_with("portcullis_gate_cuts_by_cause_total")).count();
    assert_eq!(causes, CUT_CAUSES.len(), "a cause that never came is told as zero");
}

fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/monitoring")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(monitoring().join(name)).unwrap()
}

#[test]
fn the_alert_rules_are_sound_and_fire_as_they_say() {
    for args in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]] {
        let (good, said) = promtool(&args, &monitoring(), "");
        assert!(good, "{args:?}: {said}");
    }
    let (good, said) = promtool(&["check", "config", "--syntax-only", "prometheus.yml"], &monitoring(), "");
    assert!(good, "{said}");
    // Each alert has a case in which it fires.
    let (rules, cases) = (read("alerts.yml"), read("alerts_test.yml"));
    for line in rules.lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            assert!(cases.contains(&format!("alertname: {name}\n")), "no case for {name}");
        }
    }
}

/// Names of metrics in a text of whatever kind.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours = words.filter(|word| word.starts_with("portcullis_") && !word.starts_with("portcullis_probe"));
    ours.map(str::to_owned).collect()
}

#[tokio::test]
async fn dashboard_and_rules_name_only_metrics_that_there_are_and_every_panel_asks_something() {
    let (at, _switches, _publish) = serve(everything()).await;
    let (_, _, text) = ask(at, "GET", "/metrics", "").await;
    let there = names(&text);
    let dashboard = read("grafana-dashboard.json");
    for file in ["alerts.yml", "alerts_test.yml", "README.md"] {
        let unknown: Vec<_> = names(&read(file)).into_iter().filter(|name| !there.contains(name)).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
    let unknown: Vec<_> = names(&dashboard).into_iter().filter(|name| !there.contains(name)).collect();
    assert!(unknown.is_empty(), "dashboard: {unknown:?}");
    let model: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let panels = model["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: the id is another's");
        let grid = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(grid[0] + grid[2] <= 24, "{title} is beyond the right edge");
        if panel["type"] != "row" {
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{title} asks nothing");
            for target in targets {
                assert!(target["expr"].as_str().unwrap().contains("portcullis_"), "{title}");
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            }
        }
    }
}
