//! What the read-only HTTP server answers in each state, over loopback.

use crate::states::{active, fenced, lapsed, passive, paused, serve};
use portcullis::engine::outlook::Next;
use portcullis::engine::status::{EventRow, GateState, Role, Snapshot, VerdictWord, VipWitnessStatus};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Status code, headers (lower case) and body: plain HTTP/1.0, so that the whole answer is what was read.
pub async fn ask(at: SocketAddr, method: &str, path: &str, head: &str) -> (u16, HashMap<String, String>, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(format!("{method} {path} HTTP/1.0\r\n{head}\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let code = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned())).collect();
    (code, headers, body.to_owned())
}

async fn get(at: SocketAddr, path: &str) -> (u16, String) {
    let (code, _, body) = ask(at, "GET", path, "").await;
    (code, body)
}

#[tokio::test]
async fn every_state_answers_the_load_balancer_paths() {
    let table: [(&str, Snapshot, u16, u16, &str); 5] = [
        ("active", active(), 200, 503, "open: alp is active, epoch 7\n"),
        ("passive", passive(), 503, 200, "shut: alp is active\n"),
        ("lapsed", lapsed(), 503, 503, "lapsed: neither the witness nor midna has confirmed epoch 7 for 5 s\n"),
        ("fenced", fenced(), 503, 503, "fenced: midna won epoch 8\n"),
        ("paused", paused(), 503, 503, "paused: paused by the operator\n"),
    ];
    for (name, snapshot, active, replica, text) in table {
        let (at, _switches, _publish) = serve(snapshot).await;
        for path in ["/active", "/primary", "/read-write"] {
            assert_eq!(get(at, path).await, (active, text.to_owned()), "{name} {path}");
        }
        for path in ["/replica", "/read-only"] {
            assert_eq!(get(at, path).await.0, replica, "{name} {path}");
        }
        assert_eq!(get(at, "/health").await, (200, "the daemon's turn is running\n".to_owned()), "{name}");
    }
}

#[tokio::test]
async fn a_stale_snapshot_never_keeps_the_gate_open() {
    let (at, switches, _publish) = serve(active()).await;
    assert_eq!(get(at, "/active").await.0, 200);
    switches.gate.store(false, Ordering::SeqCst);
    switches.beat.store(false, Ordering::SeqCst);
    let (code, text) = get(at, "/active").await;
    assert_eq!(code, 503);
    assert!(text.starts_with("lapsed: the lease ran out"), "{text}");
    assert_eq!(get(at, "/health").await.0, 503);
    let told: Snapshot = serde_json::from_str(&get(at, "/status.json").await.1).unwrap();
    assert_eq!((told.gate.open, told.gate.state.as_str(), told.role.as_str()), (false, "lapsed", "passive"));
    assert!(!told.turn_running);
    assert!(get(at, "/metrics").await.1.contains("\nportcullis_gate_open 0.0\n"));
    assert!(get(at, "/").await.1.contains("alp has lapsed"));
}

#[tokio::test]
async fn a_standby_of_a_hanging_daemon_is_not_in_service() {
    let (at, switches, _publish) = serve(passive()).await;
    assert_eq!(get(at, "/replica").await.0, 200);
    switches.beat.store(false, Ordering::SeqCst);
    assert_eq!(get(at, "/replica").await.0, 503);
}

#[tokio::test]
async fn a_detached_standby_is_not_in_service() {
    let mut snapshot = passive();
    snapshot.nodes[1].attached = false;
    let (at, _switches, _publish) = serve(snapshot).await;
    assert_eq!(get(at, "/replica").await, (503, "this standby is detached\n".to_owned()));
}

#[tokio::test]
async fn what_is_published_is_what_is_shown() {
    let (at, switches, publish) = serve(active()).await;
    let (code, headers, body) = ask(at, "GET", "/status.json", "").await;
    assert_eq!((code, headers["content-type"].as_str()), (200, "application/json"));
    assert_eq!(serde_json::from_str::<Snapshot>(&body).unwrap(), active());
    switches.gate.store(false, Ordering::SeqCst);
    publish.send_replace(std::sync::Arc::new(fenced()));
    assert_eq!(serde_json::from_str::<Snapshot>(&get(at, "/status.json").await.1).unwrap(), fenced());
}

#[tokio::test]
async fn pool_nodes_are_what_monitoring_for_pgpool_matches() {
    let down = |mut s: Snapshot| {
        s.nodes[1].status = "down".into();
        s
    };
    let alone = |mut s: Snapshot| {
        s.gate.sessions = 0;
        s.nodes[1].replication_state = None;
        s
    };
    let table = [
        ("active", active(), "2,0.500000,primary", "2,0.500000,standby"),
        ("seen from the standby", passive(), "2,0.500000,primary", "2,0.500000,standby"),
        ("standby down, clients", down(active()), "2,0.500000,primary", "3,0.500000,standby"),
        ("nobody connected", alone(active()), "1,0.500000,primary", "1,0.500000,standby"),
        ("standby down, no client", down(alone(active())), "1,0.500000,primary", "3,0.500000,standby"),
    ];
    for (name, snapshot, first, second) in table {
        let (at, _switches, _publish) = serve(snapshot).await;
        let (code, headers, body) = ask(at, "GET", "/pool_nodes", "").await;
        assert_eq!((code, headers["content-type"].as_str()), (200, "text/plain; charset=utf-8"));
        assert_eq!(body, format!("0,192.0.2.11,5432,{first}\n1,192.0.2.12,5432,{second}\n"), "{name}");
    }
}

/// As `psql -t -A -F,` prints `SHOW pool_nodes` of pgpool-II 4.3 (reference-pgpool.md 1.9).
#[tokio::test]
async fn pool_nodes_are_told_in_the_columns_of_pgpool_4_3_where_asked_for() {
    let mut snapshot = active();
    snapshot.nodes[1].attached = false;
    snapshot.nodes[1].last_status_change = None;
    let (at, _switches, _publish) = serve(snapshot).await;
    for version in ["4.3", "4.7"] {
        let (code, headers, body) = ask(at, "GET", &format!("/pool_nodes?format={version}"), "").await;
        assert_eq!((code, headers["content-type"].as_str()), (200, "text/plain; charset=utf-8"));
        assert_eq!(
            body,
            "0,192.0.2.11,5432,up,up,0.500000,primary,primary,0,true,0,,,2026-11-20 15:11:00\n\
             1,192.0.2.12,5432,down,up,0.500000,standby,standby,0,false,0,streaming,sync,\n"
        );
    }
    for wrong in ["4.2", "", "json", "4.3&format=4.4", "%ff"] {
        let (code, text) = get(at, &format!("/pool_nodes?format={wrong}")).await;
        assert!(code == 400 && text.contains("4.3") && text.ends_with('\n'), "{wrong}: {code} {text}");
    }
    assert_eq!(get(at, "/pool_nodes?other=1").await.0, 200, "unknown words are nobody's business");
}

#[tokio::test]
async fn only_reading_is_possible_and_only_what_there_is() {
    let (at, _switches, _publish) = serve(active()).await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        for path in ["/", "/status.json", "/active", "/metrics"] {
            assert_eq!(ask(at, method, path, "Content-Length: 0\r\n").await.0, 405, "{method} {path}");
        }
    }
    assert_eq!(ask(at, "HEAD", "/active", "").await.0, 200);
    for path in ["/nothing", "/status", "/control/promote", "/active/", "/..%2f"] {
        assert_eq!(get(at, path).await.0, 404, "{path}");
    }
    assert_eq!(ask(at, "POST", "/control/promote", "Content-Length: 0\r\n").await.0, 404);
}

/// What is to be read, a line for each piece: neither the drawings nor the tags.
fn words(page: &str) -> String {
    let body = page.split_once("<section").unwrap().1.split_once("<script>").unwrap().0;
    let drawing = regex::Regex::new("(?s)<svg.*?</svg>").unwrap().replace_all(body, "");
    let inline = regex::Regex::new("</?(strong|span|b|time|code|a)( [^>]*)?>").unwrap().replace_all(&drawing, "");
    let text = regex::Regex::new("<[^>]*>|^[^>]*>").unwrap().replace_all(&inline, "\n");
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
}

#[tokio::test]
async fn golden_pages() {
    for (name, snapshot) in [("active", active()), ("passive", passive()), ("fenced", fenced())] {
        let (at, _switches, _publish) = serve(snapshot).await;
        let (_, page) = get(at, "/").await;
        crate::render::golden(&format!("page-{name}.txt"), &words(&page));
    }
}

/// What the policy allows is that very text between the tags, or browsers drop it.
fn is_allowed(policy: &str, body: &str, tag: &str) {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let text = body.split_once(&open).unwrap().1.split_once(&close).unwrap().0;
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    let source = format!("{tag}-src 'sha256-{}'", data_encoding::BASE64.encode(digest.as_ref()));
    assert!(policy.contains(&source), "{policy} lacks {source}");
}

#[tokio::test]
async fn the_page_needs_nothing_but_itself_and_escapes_what_it_shows() {
    let evil = || "<script>alert('x')</script><img src=x onerror=y>\"'".to_owned();
    let mut snapshot = lapsed();
    snapshot.gate.reason = Some(evil());
    snapshot.advice = Some(evil());
    snapshot.outlook.text = evil();
    snapshot.next = Some(Next { command: evil(), why: evil(), on: "alp".parse().unwrap() });
    snapshot.events.push(EventRow { at: evil(), kind: "gate_cut".into(), text: evil() });
    snapshot.replication.alone_since = Some(evil());
    snapshot.replication.mode = evil();
    snapshot.witness.as_mut().unwrap().servers[0].server = evil();
    snapshot.witness.as_mut().unwrap().servers[0].error = Some(evil());
    snapshot.postgres.error = Some(evil());
    snapshot.vips[0].conflict = Some(evil());
    snapshot.at = evil();
    let mut serving = snapshot.clone();
    serving.role = Role::Active;
    serving.gate.open = true;
    serving.gate.state = GateState::Open;
    serving.witness.as_mut().unwrap().servers[0].verdict = VerdictWord::Here;
    serving.vip_witness = Some(VipWitnessStatus { witness: Some(evil()), age_ms: None, error: None });
    serving.events.push(EventRow { at: evil(), kind: "gate_opened".into(), text: evil() });
    for snapshot in [snapshot, serving] {
        let (at, _switches, _publish) = serve(snapshot).await;
        let (code, headers, body) = ask(at, "GET", "/", "").await;
        assert_eq!((code, headers["content-type"].as_str()), (200, "text/html; charset=utf-8"));
        assert_eq!(body.matches("<script").count(), 1, "{body}");
        assert!(!body.contains("<img"), "{body}");
        assert!(body.contains("http-equiv=\"refresh\"") && body.contains("midna"));
        for foreign in ["http://", "https://", " src=", "@import", "url(", " style=", "onload"] {
            let shown = body.replace(" src=x onerror", "");
            assert!(!shown.contains(foreign), "the page asks for {foreign}");
        }
        let policy = &headers["content-security-policy"];
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
        assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
        is_allowed(policy, &body, "style");
        is_allowed(policy, &body, "script");
        let wanted = [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("x-frame-options", "DENY"),
            ("cross-origin-resource-policy", "same-origin"),
        ];
        for (header, value) in wanted {
            assert_eq!(headers[header], value);
        }
    }
}

/// A small reader of the classic text form: every sample has its HELP and TYPE before it, and parses.
pub fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let (mut helped, mut typed, mut samples) = (String::new(), String::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            helped = rest.split_once(' ').expect("help text").0.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("type");
            assert_eq!(name, helped, "TYPE follows its HELP");
            assert!(matches!(kind, "gauge" | "counter" | "histogram"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            typed = name.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').expect("value");
            let name = series.split('{').next().unwrap();
            let parts = ["_bucket", "_sum", "_count"].map(|part| format!("{typed}{part}"));
            assert!(name == typed || parts.iter().any(|part| part == name), "a sample without TYPE: {line}");
            assert!(name.starts_with("portcullis_"), "{line}");
            let again = samples.insert(series.to_owned(), value.parse().expect("number"));
            assert!(again.is_none(), "twice: {series}");
        }
    }
    samples
}

#[tokio::test]
async fn metrics_parse_in_every_state_and_say_what_the_snapshot_says() {
    for snapshot in [active(), passive(), lapsed(), fenced(), paused()] {
        let (at, _switches, _publish) = serve(snapshot.clone()).await;
        let (code, headers, body) = ask(at, "GET", "/metrics", "").await;
        assert_eq!((code, headers["content-type"].as_str()), (200, "text/plain; version=0.0.4; charset=utf-8"));
        let samples = parse_metrics(&body);
        let open = if snapshot.gate.open { 1.0 } else { 0.0 };
        assert_eq!(samples["portcullis_gate_open"], open);
        assert_eq!(samples[&format!("portcullis_role{{role=\"{}\"}}", snapshot.role.as_str())], 1.0);
        assert_eq!(samples["portcullis_gate_openings_total"], 2.0);
    }
    let (at, _switches, _publish) = serve(active()).await;
    let samples = parse_metrics(&ask(at, "GET", "/metrics", "").await.2);
    let expected = [
        ("portcullis_lease_remaining_seconds", 4.21),
        ("portcullis_epoch", 7.0),
        ("portcullis_sessions", 12.0),
        ("portcullis_witness_age_seconds", 0.312),
        ("portcullis_peer_age_seconds{peer=\"midna\"}", 0.12),
        ("portcullis_peer_reachable{peer=\"midna\"}", 1.0),
        ("portcullis_vip_bound{address=\"192.0.2.100/24\"}", 1.0),
        ("portcullis_replication_in_sync", 1.0),
        ("portcullis_replication_delay_bytes{node=\"midna\"}", 0.0),
        ("portcullis_witness_verdict{server=\"192.0.2.53:53\",verdict=\"here\"}", 1.0),
        ("portcullis_witness_proofs_total", 4711.0),
        (r#"portcullis_pool_clients{user="ann\"\\",database="app"}"#, 12.0),
        (r#"portcullis_pool_waiting_clients{user="ann\"\\",database="app"}"#, 1.0),
        (r#"portcullis_pool_backends{user="ann\"\\",database="app",state="idle"}"#, 3.0),
        (r#"portcullis_pool_backends{user="ann\"\\",database="app",state="used"}"#, 2.0),
        (r#"portcullis_pool_database_paused{database="app"}"#, 1.0),
        (r#"portcullis_pool_logins_total{user="ann\"\\",database="app"}"#, 40.0),
        (r#"portcullis_pool_transactions_total{user="ann\"\\",database="app"}"#, 4000.0),
        (r#"portcullis_pool_client_bytes_total{user="ann\"\\",database="app",direction="sent"}"#, 20.0),
        (r#"portcullis_pool_wait_seconds_total{user="ann\"\\",database="app"}"#, 1.5),
    ];
    for (name, value) in expected {
        assert_eq!(samples.get(name), Some(&value), "{name} in {samples:#?}");
    }
}

#[tokio::test]
async fn a_scraper_that_asks_for_open_metrics_gets_them() {
    let (at, _switches, _publish) = serve(active()).await;
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let (_, headers, body) = ask(at, "GET", "/metrics", accept).await;
    assert!(headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(body.ends_with("# EOF\n"));
}

#[tokio::test]
async fn a_client_that_sends_no_request_is_closed() {
    let (at, _switches, _publish) = serve(active()).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"GET /active HTTP/1.1\r\nX-Slow: ").await.unwrap();
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "still open after a minute");
}

#[tokio::test]
async fn more_connections_than_slots_wait_and_are_served() {
    let (at, _switches, _publish) = serve(active()).await;
    let mut held = Vec::new();
    for _ in 0..portcullis::serve::http::listen::MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(at).await.unwrap();
        // An answered request proves that this one holds a slot.
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        held.push(stream);
    }
    let next = tokio::spawn(async move { get(at, "/health").await.0 });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!next.is_finished(), "the bound does not bind");
    held.pop();
    assert_eq!(tokio::time::timeout(Duration::from_secs(30), next).await.unwrap().unwrap(), 200);
}
