//! What a procedure says while it waits and after it: the count-down, the front door, the next step.

use crate::control::{daemon_as, end, line};
use crate::states::{active, fenced};
use portcullis::app::client::{Door, Out, Target, run};
use portcullis::app::render::Style;
use portcullis::base::config::Config;
use portcullis::base::fault::ExitCode;
use portcullis::serve::http::{Command, ControlReply};
use serde_json::{Value, json};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const TERMINAL: Style = Style { color: false, terminal: true };

async fn said(target: &Target, verb: &str, args: Value, json: bool, style: Style) -> (ExitCode, String) {
    let mut buffer = Vec::new();
    let mut out = Out { writer: &mut buffer, style };
    let exit = run(target, verb, &args, json, &mut out).await.unwrap_or_else(|fault| fault.exit);
    (exit, String::from_utf8(buffer).unwrap())
}

fn target(control: &Path, door: Option<Door>) -> Target {
    Target { node: Some("alp".parse().unwrap()), control: control.to_owned(), status_listen: None, door }
}

/// A service whose front door is this port of this machine.
fn door(port: u16) -> Door {
    let text = format!(
        "[service]\nname = \"db.example.org\"\nlisten = [\"127.0.0.1:{port}\"]\n[cluster]\nkey_file = \"/k\"\n\
         [vip]\naddress = \"127.0.0.1/8\"\n\
         [[node]]\nname = \"alp\"\naddress = \"192.0.2.11\"\n[node.postgres]\ndata_dir = \"/d\"\nbin_dir = \"/b\"\n\
         [[node]]\nname = \"midna\"\naddress = \"192.0.2.12\"\n[node.postgres]\ndata_dir = \"/d\"\nbin_dir = \"/b\"\n"
    );
    Door::new(&Config::parse(&text, Path::new("x")).expect("valid"))
}

/// Answers SSLRequest with this byte, as often as it is asked.
async fn gate(answer: u8) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 8];
            if stream.read_exact(&mut request).await.is_ok() && request == [0, 0, 0, 8, 4, 210, 22, 47] {
                drop(stream.write_all(&[answer]).await);
            }
        }
    });
    port
}

#[tokio::test]
async fn a_wait_is_one_line_on_a_terminal_a_few_in_a_pipe_and_all_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon_as(active(), &path, |(_, reply): Command| async move {
        reply.send(line("the record is ours")).await.unwrap();
        for left in (0..12_u64).rev() {
            let text = format!("{} s left", left + 1);
            reply.send(ControlReply::Line { text, data: Some(json!({"left_ms": left * 1000})) }).await.unwrap();
        }
        reply.send(line("promoted")).await.unwrap();
        reply.send(end(0, "done")).await.unwrap();
    })
    .await;
    let target = target(&path, None);
    let (_, text) = said(&target, "promote", json!({}), false, Style::PLAIN).await;
    let counted: Vec<&str> = text.lines().filter_map(|line| line.strip_suffix(" s left")?.rsplit(' ').next()).collect();
    assert_eq!(counted, ["10", "5", "3", "2", "1"], "{text}");
    assert!(!text.contains('\r') && text.ends_with("promoted\ndone\n"), "{text}");
    let (_, text) = said(&target, "promote", json!({}), false, TERMINAL).await;
    assert_eq!(text.lines().count(), 3, "one line each but for the count: {text:?}");
    assert_eq!(text.matches("\r\x1b[K").count(), 13, "twelve times rewritten, once taken away: {text:?}");
    let (_, text) = said(&target, "promote", json!({}), true, TERMINAL).await;
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[1]["data"]["left_ms"], &lines[14]["exit"]), (15, &json!(11_000), &json!(0)));
    daemon.abort();
}

#[tokio::test]
async fn what_succeeded_is_tried_at_the_front_door_and_its_silence_is_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon_as(active(), &path, |(request, reply): Command| async move {
        let exit = u8::try_from(request.args["exit"].as_u64().unwrap_or(0)).unwrap();
        let flag = request.args["flag"].as_str().map(|flag| json!({flag: true}));
        reply.send(ControlReply::End { exit, text: "alp is active".into(), data: flag }).await.unwrap();
    })
    .await;
    let good = target(&path, Some(door(gate(b'N').await)));
    let (exit, text) = said(&good, "promote", json!({}), false, Style::PLAIN).await;
    assert_eq!(exit, ExitCode::Done);
    assert!(text.starts_with("alp is active\nthe front door answers at 127.0.0.1:"), "{text}");
    assert!(text.ends_with("midna follows as synchronous standby: a failover would lose nothing\n"), "{text}");
    let (_, text) = said(&good, "switchover", json!({}), true, Style::PLAIN).await;
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["data"]["front_door"]["answers"], true, "{text}");
    assert_eq!(lines.last().unwrap()["exit"], 0, "the exit code stays the last line");
    let times: Vec<u64> = lines.iter().map(|line| line["at_ms"].as_u64().unwrap()).collect();
    assert!(times.is_sorted() && times.len() > 2, "{text}");
    // Nothing was done, or nothing succeeded, or nothing moved: nothing is tried.
    let quiet = [
        ("promote", json!({"flag": "already_active"})),
        ("promote", json!({"exit": 3})),
        ("promote", json!({"dry_run": true})),
        ("pause", json!({})),
    ];
    for (verb, args) in quiet {
        let (_, text) = said(&good, verb, args, false, Style::PLAIN).await;
        assert!(!text.contains("front door") && !text.contains("follows"), "{verb}: {text}");
    }
    // Something else answers there.
    let odd = target(&path, Some(door(gate(b'x').await)));
    let (exit, text) = said(&odd, "promote", json!({}), false, Style::PLAIN).await;
    assert_eq!(exit, ExitCode::Done, "a warning is no failure of the promote");
    assert!(text.contains("warning: the front door does not answer from here (127.0.0.1:"), "{text}");
    assert!(text.contains("but not as a gate does") && text.contains("look at the record"), "{text}");
    daemon.abort();
}

#[tokio::test]
async fn a_rejoin_says_what_is_left_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon_as(fenced(), &path, |(_, reply): Command| async move {
        reply.send(end(0, "the node streams")).await.unwrap();
    })
    .await;
    let target = target(&path, Some(door(9)));
    let (_, text) = said(&target, "rejoin", json!({"node": "alp"}), false, Style::PLAIN).await;
    assert!(!text.contains("front door"), "a rejoin moves no service: {text}");
    assert!(text.contains("midna serves alone; alp is fenced") && text.contains("portcullis rejoin alp"), "{text}");
    daemon.abort();
}

/// The program itself, because a signal is its own.
#[tokio::test]
async fn ctrl_c_says_that_the_daemon_goes_on_and_how_to_see_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    let config = folder.path().join("portcullis.toml");
    let node = |name: &str| {
        let head = format!("[[node]]\nname = \"{name}\"\naddress = \"192.0.2.1\"\n");
        head + "[node.postgres]\ndata_dir = \"/d\"\nbin_dir = \"/b\"\n"
    };
    let text = format!(
        "runtime_dir = \"{dir}\"\n[service]\nname = \"db.example.org\"\n[cluster]\nkey_file = \"/k\"\n\
         [vip]\naddress = \"192.0.2.100/24\"\n{}{}",
        node("alp"),
        node("midna").replace("192.0.2.1", "192.0.2.2")
    );
    std::fs::write(&config, text).unwrap();
    let daemon = daemon_as(active(), &folder.path().join("control.sock"), |(_, reply): Command| async move {
        drop(reply.send(line("begun")).await);
        std::future::pending::<()>().await;
    })
    .await;
    for words in [&["promote", "--yes", "--json"][..], &["rejoin", "midna"], &["switchover"]] {
        let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_portcullis"))
            .arg("--config")
            .arg(&config)
            .args(["--node", "alp"])
            .args(words)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut first = [0; 8];
        child.stdout.as_mut().unwrap().read_exact(&mut first).await.unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let limit = std::time::Duration::from_secs(60);
        let ended = tokio::time::timeout(limit, child.wait_with_output()).await.expect("it ends").unwrap();
        let (out, err) = (String::from_utf8(ended.stdout).unwrap(), String::from_utf8(ended.stderr).unwrap());
        let wanted = format!("portcullis: {} goes on in the daemon; `portcullis status` shows how far it is", words[0]);
        assert_eq!((ended.status.code(), err.lines().count()), (Some(4), 1), "{err}");
        assert!(err.starts_with(&wanted) && err.contains("again follows it"), "{err}");
        if words.contains(&"--json") {
            let last: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
            assert_eq!((&last["exit"], last["at_ms"].is_u64()), (&json!(4), true), "{out}");
        }
    }
    daemon.abort();
}
