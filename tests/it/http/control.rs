//! The control socket: rights, commands, streams, and what a bad request gets.

use crate::states::{active, views};
use portcullis::base::fault::ExitCode;
use portcullis::engine::status::Snapshot;
use portcullis::serve::http::{Command, ControlReply, bind_control, control_router};
use serde_json::{Value, json};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// A daemon that answers commands with `answer`, on `path`.
pub async fn daemon<F, R>(path: &Path, answer: F) -> tokio::task::JoinHandle<()>
where
    F: Fn(Command) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    daemon_as(active(), path, answer).await
}

pub async fn daemon_as<F, R>(snapshot: Snapshot, path: &Path, answer: F) -> tokio::task::JoinHandle<()>
where
    F: Fn(Command) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let (views, _switches, publish) = views(snapshot);
    let (commands, mut queue) = mpsc::channel::<Command>(4);
    let socket = bind_control(path).await.unwrap();
    tokio::spawn(async move {
        let _publish = publish;
        let serve = socket.serve::<()>(control_router(views, commands));
        let answers = async {
            while let Some(command) = queue.recv().await {
                tokio::spawn(answer(command));
            }
        };
        tokio::join!(serve, answers);
    })
}

async fn post(path: &Path, verb: &str, body: &str) -> (u16, Vec<Value>) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let head = format!("POST /control/{verb} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // A body that the server refuses to read ends with a reset behind the answer.
    while stream.read_buf(&mut bytes).await.unwrap_or(0) > 0 {}
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let lines =
        body.lines().filter(|line| !line.is_empty()).map(|line| serde_json::from_str(line).unwrap_or(Value::Null));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), lines.collect())
}

pub fn line(text: &str) -> ControlReply {
    ControlReply::Line { text: text.into(), data: None }
}

pub fn end(exit: u8, text: &str) -> ControlReply {
    ControlReply::End { exit, text: text.into(), data: None }
}

#[tokio::test]
async fn a_command_streams_its_lines_and_ends_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon(&path, |(request, reply)| async move {
        reply.send(line(&format!("{} {}", request.verb, request.args))).await.unwrap();
        let data = Some(json!({"epoch": 8}));
        reply.send(ControlReply::Line { text: "record moved".into(), data }).await.unwrap();
        reply.send(end(3, "refused; because")).await.unwrap();
    })
    .await;
    let (code, lines) = post(&path, "promote", r#"{"yes":true}"#).await;
    assert_eq!(code, 200);
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0]["line"], r#"promote {"yes":true}"#);
    assert!(lines[0]["at_ms"].is_u64());
    assert_eq!((&lines[1]["line"], &lines[1]["data"]["epoch"]), (&json!("record moved"), &json!(8)));
    assert_eq!((&lines[2]["exit"], &lines[2]["text"]), (&json!(3), &json!("refused; because")));
    // An empty body is an empty object; anything but an object, or a verb that is none, is refused unasked.
    assert_eq!(post(&path, "fence", "").await.1[0]["line"], "fence {}");
    assert_eq!(post(&path, "fence", "[1]").await.0, 400);
    assert_eq!(post(&path, "fence", "{").await.0, 400);
    assert_eq!(post(&path, "Fence%00", "{}").await.0, 404);
    assert_eq!(post(&path, "fence", &"x".repeat(100_000)).await.0, 413);
    daemon.abort();
}

#[tokio::test]
async fn a_daemon_that_drops_a_command_leaves_the_outcome_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon(&path, |(_, reply)| async move {
        reply.send(line("begun")).await.unwrap();
    })
    .await;
    let (_, lines) = post(&path, "promote", "{}").await;
    assert_eq!(lines[1]["exit"], 4, "{lines:?}");
    daemon.abort();
}

#[tokio::test]
async fn a_client_that_reads_nothing_does_not_hold_the_daemon_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (done, mut finished) = mpsc::channel(1);
    let daemon = daemon(&path, move |(_, reply)| {
        let done = done.clone();
        async move {
            for n in 0..20_000 {
                reply.send(line(&format!("{n} {}", "x".repeat(200)))).await.unwrap();
            }
            reply.send(end(0, "done")).await.unwrap();
            done.send(()).await.unwrap();
        }
    })
    .await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"POST /control/promote HTTP/1.0\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), finished.recv()).await;
    assert!(ended.is_ok(), "the driver waits for a client");
    // And the last line still arrives when the client reads at last.
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.trim_end().ends_with('}') && text.contains(r#""exit":0"#));
    daemon.abort();
}

#[tokio::test]
async fn the_socket_is_private_replaces_a_dead_one_and_spares_a_live_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a stale socket");
    let socket = bind_control(&path).await.unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o660);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    let second = bind_control(&path).await.unwrap_err();
    assert!(second.text.contains("another daemon listens"), "{second}");
    assert_eq!(second.exit, ExitCode::Failed);
    drop(socket);
    assert!(!path.exists(), "the socket goes with its daemon");
    std::fs::write(&path, "precious").unwrap();
    assert!(bind_control(&path).await.unwrap_err().text.contains("is no socket"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let nowhere = bind_control(&folder.path().join("no/such/control.sock")).await.unwrap_err();
    assert!(nowhere.text.contains("check runtime_dir"), "{nowhere}");
}

#[tokio::test]
async fn the_pages_are_on_the_socket_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon(&path, |_| async {}).await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /active HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.0 200"), "{text}");
    daemon.abort();
}

#[tokio::test]
async fn the_kernel_says_who_commands_and_only_root_may_say_for_whom() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let daemon = daemon(&path, |(request, reply)| async move {
        let from = request.from;
        reply.send(end(0, &format!("{:?} {:?} {:?}", from.uid, from.pid, from.said))).await.unwrap();
    })
    .await;
    let own = (rustix::process::geteuid().as_raw(), i32::try_from(std::process::id()).unwrap());
    let said = async |header: &str| {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        let head = format!("POST /control/fence HTTP/1.0\r\n{header}Content-Length: 0\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        line["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(said("").await, format!("Some({}) Some({}) None", own.0, own.1));
    let believed = if own.0 == 0 { "Some(\"ann\")" } else { "None" };
    let header = "Portcullis-Sudo-User: ann\r\n";
    assert_eq!(said(header).await, format!("Some({}) Some({}) {believed}", own.0, own.1));
    let long = format!("Portcullis-Sudo-User: {}\r\n", "x".repeat(65));
    assert!(said(&long).await.ends_with(" None"), "no name is so long");
    daemon.abort();
}
