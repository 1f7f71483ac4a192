//! The client of the daemon: what each verb prints and how it exits, against a daemon that is played here.

use crate::control::{daemon, daemon_as, end, line};
use crate::states::{active, fenced, passive, serve};
use portcullis::app::client::{Out, PromoteArgs, Target, check, events, nodes, parse_since, promote, run, status};
use portcullis::app::render::Style;
use portcullis::app::render::check::Thresholds;
use portcullis::base::fault::{ExitCode, Fault};
use portcullis::engine::status::Snapshot;
use portcullis::serve::http::{Command, ControlReply};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex};

fn target(control: &Path) -> Target {
    Target { node: Some("alp".parse().unwrap()), control: control.to_owned(), status_listen: None, door: None }
}

macro_rules! printed {
    ($out:ident => $call:expr) => {{
        let mut buffer = Vec::new();
        let mut writer = Out { writer: &mut buffer, style: Style::PLAIN };
        let $out = &mut writer;
        let result = $call.await;
        (result, String::from_utf8(buffer).unwrap())
    }};
}

#[tokio::test]
async fn reading_goes_over_the_socket_and_falls_back_to_tcp() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (at, _switches, _publish) = serve(fenced()).await;
    let fallback = Target { status_listen: Some(at), ..target(&path) };
    // No socket at all.
    let (result, text) = printed!(out => status(&fallback, false, false, out));
    assert_eq!(result.unwrap(), ExitCode::Done);
    assert!(text.starts_with("midna is active; alp is fenced: midna won epoch 8\n"), "{text}");
    // A dead daemon's socket.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (code, text) = printed!(out => check(&fallback, &Thresholds::default(), false, out));
    assert_eq!(code, 2);
    assert!(text.starts_with("PORTCULLIS CRITICAL - alp is fenced"), "{text}");
    // A live one is asked first: its snapshot is the active one.
    let daemon = daemon(&path, |_| async {}).await;
    let (code, text) = printed!(out => check(&fallback, &Thresholds::default(), false, out));
    assert_eq!((code, text.starts_with("PORTCULLIS OK - alp active")), (0, true), "{text}");
    let (_, text) = printed!(out => status(&fallback, true, false, out));
    assert_eq!(serde_json::from_str::<portcullis::engine::status::Snapshot>(&text).unwrap(), active());
    let (_, text) = printed!(out => nodes(&fallback, true, out));
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()[1]["name"], "midna");
    let (_, text) = printed!(out => portcullis::app::client::cgi(&fallback, None, out));
    assert_eq!(text.lines().next().unwrap(), "Content-Type: text/plain");
    assert_eq!(text.lines().nth(2).unwrap(), "0,192.0.2.11,5432,2,0.500000,primary");
    daemon.abort();
}

#[tokio::test]
async fn no_daemon_is_exit_1_and_critical_for_check() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = target(&folder.path().join("control.sock"));
    let (result, _) = printed!(out => status(&nobody, false, false, out));
    let fault = result.unwrap_err();
    assert_eq!(fault.exit, ExitCode::Failed);
    assert!(fault.text.contains("the daemon does not answer") && fault.text.contains("start it"), "{fault}");
    let (code, text) = printed!(out => check(&nobody, &Thresholds::default(), false, out));
    assert_eq!(code, 2);
    assert!(text.starts_with("PORTCULLIS CRITICAL - the daemon does not answer"), "{text}");
    let (result, _) = printed!(out => run(&nobody, "pause", &json!({}), false, out));
    assert_eq!(result.unwrap_err().exit, ExitCode::Failed);
}

#[tokio::test]
async fn a_daemon_that_hangs_is_given_up_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let _hanging = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let limit = std::time::Duration::from_secs(30);
    let asked = async { printed!(out => status(&target(&path), false, false, out)) };
    let (result, _) = tokio::time::timeout(limit, asked).await.expect("no time limit");
    assert_eq!(result.unwrap_err().exit, ExitCode::Failed);
}

#[tokio::test]
async fn the_daemon_of_another_node_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let (at, _switches, _publish) = serve(active()).await;
    let wrong = Target {
        node: Some("midna".parse().unwrap()),
        control: folder.path().join("control.sock"),
        status_listen: Some(at),
        door: None,
    };
    let (result, _) = printed!(out => status(&wrong, false, false, out));
    assert!(result.unwrap_err().text.contains("the daemon of alp answered"));
}

#[tokio::test]
async fn events_since_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let (at, _switches, _publish) = serve(active()).await;
    let target = Target { status_listen: Some(at), ..target(&folder.path().join("control.sock")) };
    let (_, text) = printed!(out => events(&target, None, false, out));
    assert_eq!(text.lines().count(), 2);
    let (_, text) = printed!(out => events(&target, Some("2026-11-20T15:10:59Z"), false, out));
    assert_eq!(text, "2026-11-20T15:11:00Z  gate_opened  alp opened epoch 7 on <192.0.2.53>\n");
    let (result, _) = printed!(out => events(&target, Some("yesterday"), false, out));
    assert_eq!(result.unwrap_err().exit, ExitCode::Config);
    let now: jiff::Timestamp = "2026-11-20T15:11:00Z".parse().unwrap();
    for (text, at) in [
        ("1h 30m", "2026-11-20T13:41:00Z"),
        ("2026-11-20", "2026-11-20T00:00:00Z"),
        ("2026-11-20T10:00", "2026-11-20T10:00:00Z"),
        ("2026-11-20T10:00:00+02:00", "2026-11-20T08:00:00Z"),
    ] {
        assert_eq!(parse_since(text, now).unwrap().to_string(), at, "{text}");
    }
}

#[tokio::test]
async fn a_command_prints_as_it_goes_and_gives_the_daemons_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon(&path, |(request, reply): Command| async move {
        reply.send(line("cut\x1b[2J")).await.unwrap();
        let exit = request.args["exit"].as_u64().unwrap();
        reply.send(end(u8::try_from(exit).unwrap(), "that was it")).await.unwrap();
    })
    .await;
    let target = target(&path);
    let (result, text) = printed!(out => run(&target, "fence", &json!({"exit": 0}), false, out));
    assert_eq!(result.unwrap(), ExitCode::Done);
    let (first, last) = text.split_once('\n').unwrap();
    assert!(first.trim_start().starts_with("+0.0") && first.ends_with(" s  cut?[2J"), "{text}");
    assert_eq!(last, "that was it\n");
    for (exit, code) in [(1, ExitCode::Failed), (3, ExitCode::Refused), (4, ExitCode::HalfWay)] {
        let (result, text) = printed!(out => run(&target, "fence", &json!({"exit": exit}), false, out));
        let fault: Fault = result.unwrap_err();
        assert_eq!((fault.exit, fault.text.as_str()), (code, "that was it"));
        assert!(!text.contains("that was it"), "the last sentence of a failure goes to standard error");
    }
    let (result, text) = printed!(out => run(&target, "fence", &json!({"exit": 3}), true, out));
    assert_eq!(result.unwrap(), ExitCode::Refused);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["line"], &lines[1]["exit"]), (&json!("cut\x1b[2J"), &json!(3)));
    daemon.abort();
}

#[tokio::test]
async fn a_daemon_that_dies_under_a_command_is_exit_4() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 1000]).await.unwrap() > 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"line\":\"begun\",\"at_ms\":1}\n").await.unwrap();
    });
    let (result, text) = printed!(out => run(&target(&path), "promote", &json!({}), false, out));
    assert_eq!(result.unwrap_err().exit, ExitCode::HalfWay);
    assert!(text.contains("begun"));
}

type Seen = Arc<Mutex<Vec<Value>>>;

/// A daemon whose dry run ends with `facts`; real runs succeed. Remembers what it was asked.
async fn promoting(path: &Path, facts: ControlReply) -> (tokio::task::JoinHandle<()>, Seen) {
    promoting_as(active(), path, facts).await
}

async fn promoting_as(snapshot: Snapshot, path: &Path, facts: ControlReply) -> (tokio::task::JoinHandle<()>, Seen) {
    let seen = Seen::default();
    let asked = seen.clone();
    let daemon = daemon_as(snapshot, path, move |(request, reply): Command| {
        asked.lock().unwrap().push(request.args.clone());
        let facts = facts.clone();
        async move {
            let answer = if request.args["dry_run"] == true { facts } else { end(0, "alp is active, epoch 8") };
            reply.send(answer).await.unwrap();
        }
    })
    .await;
    (daemon, seen)
}

#[tokio::test]
async fn promote_asks_only_on_a_terminal_and_acts_only_when_told() {
    let ready = ControlReply::End { exit: 0, text: "ready".into(), data: Some(json!({"may_lose": false})) };
    let lossy = ControlReply::End {
        exit: 3,
        text: "alone since 12:01:03: what was acknowledged after that is not here".into(),
        data: Some(json!({"may_lose": true})),
    };
    let refused = ControlReply::End { exit: 3, text: "the witness does not answer".into(), data: Some(json!({})) };
    let active =
        ControlReply::End { exit: 0, text: "alp is active".into(), data: Some(json!({"already_active": true})) };
    // Facts, what is typed, exit code, number of real runs, accept_data_loss in the real run.
    let table = [
        (&ready, Some("yes"), ExitCode::Done, 1, false),
        (&ready, Some("y"), ExitCode::Done, 1, false),
        (&ready, Some(" Yes"), ExitCode::Done, 1, false),
        (&ready, Some("yess"), ExitCode::Refused, 0, false),
        (&ready, Some(""), ExitCode::Refused, 0, false),
        (&ready, None, ExitCode::Refused, 0, false),
        (&lossy, Some("lose-data"), ExitCode::Done, 1, true),
        (&lossy, Some("yes"), ExitCode::Refused, 0, false),
        (&lossy, Some("y"), ExitCode::Refused, 0, false),
        (&refused, Some("yes"), ExitCode::Refused, 0, false),
        (&refused, Some("lose-data"), ExitCode::Refused, 0, false),
        (&active, None, ExitCode::Done, 0, false),
    ];
    for (facts, typed, exit, real_runs, accepts) in table {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let (daemon, seen) = promoting(&path, facts.clone()).await;
        let mut answer = |_: &str| typed.map(str::to_owned);
        let target = target(&path);
        let (result, text) = printed!(out => promote(&target, &PromoteArgs::default(), Some(&mut answer), out));
        // Its last word ("nothing was changed") is not for somebody who is about to be asked.
        assert!(!text.contains("ready"), "{text}");
        let code = result.unwrap_or_else(|fault| fault.exit);
        assert_eq!(code, exit, "{facts:?} {typed:?}");
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0]["dry_run"], true);
        assert_eq!(seen.len() - 1, real_runs, "{facts:?} {typed:?}");
        if real_runs == 1 {
            let expected = json!({"yes": true, "dry_run": false, "accept_data_loss": accepts, "peer_is_off": null});
            assert_eq!(seen[1], expected);
        }
        daemon.abort();
    }
}

#[tokio::test]
async fn promote_without_a_terminal_needs_yes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (daemon, seen) = promoting_as(passive(), &path, end(0, "ready")).await;
    let asker = Target { node: None, ..target(&path) };
    let (result, _) = printed!(out => promote(&asker, &PromoteArgs::default(), None, out));
    let fault = result.unwrap_err();
    assert_eq!(fault.exit, ExitCode::Refused);
    assert!(fault.text.contains("--yes"), "{fault}");
    assert!(seen.lock().unwrap().is_empty(), "the daemon was not even asked");
    let target = asker;
    let args = PromoteArgs { yes: true, peer_is_off: Some("midna".into()), ..PromoteArgs::default() };
    let (result, text) = printed!(out => promote(&target, &args, None, out));
    assert_eq!((result.unwrap(), text.as_str()), (ExitCode::Done, "alp is active, epoch 8\n"));
    assert_eq!(seen.lock().unwrap()[0]["peer_is_off"], "midna");
    daemon.abort();
}

#[tokio::test]
async fn promote_on_the_active_node_says_so_and_asks_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (daemon, seen) = promoting(&path, end(0, "ready")).await;
    let target = target(&path);
    let (result, text) = printed!(out => promote(&target, &PromoteArgs::default(), None, out));
    assert_eq!(result.unwrap(), ExitCode::Done);
    assert!(text.contains("already active"), "{text}");
    assert!(seen.lock().unwrap().is_empty());
    daemon.abort();
}
