//! The page's stream of events: bounded, its slow readers held by nobody, and what `/history.json` says.

use crate::pages::ask;
use crate::states::{active, fenced, listen, serve, views_with};
use portcullis::serve::http::live::MAX_STREAMS;
use portcullis::serve::http::{History, Sample, router};
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

async fn look_on(at: SocketAddr) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    BufReader::new(stream)
}

/// The next event.
async fn news(stream: &mut BufReader<TcpStream>) -> Value {
    let reading = async {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(stream.read_line(&mut line).await.unwrap() > 0, "the stream ended");
            if let Some(text) = line.strip_prefix("data: ") {
                return serde_json::from_str(text).unwrap();
            }
        }
    };
    timeout(LIMIT, reading).await.expect("no event")
}

#[tokio::test]
async fn a_stream_tells_all_and_then_what_changed() {
    let (at, switches, publish) = serve(active()).await;
    let mut stream = look_on(at).await;
    let first = news(&mut stream).await;
    assert_eq!(first["title"], "alp: active");
    let ids: Vec<&String> = first["sections"].as_object().unwrap().keys().collect();
    assert_eq!(ids, ["events", "load", "nodes", "proof", "replication", "verdict"]);
    // Nothing new: the title alone, which says that the daemon lives.
    assert_eq!(news(&mut stream).await["sections"], Value::Object(serde_json::Map::new()));
    switches.gate.store(false, Ordering::SeqCst);
    publish.send_replace(Arc::new(fenced()));
    let told = loop {
        let told = news(&mut stream).await;
        if told["title"] == "alp: fenced" {
            break told;
        }
    };
    let sections = told["sections"].as_object().unwrap();
    assert!(sections["verdict"].as_str().unwrap().contains("midna is active; alp is fenced"), "{sections:?}");
    assert!(sections.contains_key("proof"), "{sections:?}");
    drop(publish);
    let mut rest = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("a stream ends with its daemon").unwrap();
}

#[tokio::test]
async fn streams_are_counted_and_slow_readers_hold_nobody() {
    let (at, _switches, publish) = serve(active()).await;
    let mut held = Vec::new();
    for _ in 0..MAX_STREAMS {
        let mut stream = look_on(at).await;
        news(&mut stream).await;
        held.push(stream);
    }
    let (code, headers, _) = ask(at, "GET", "/live", "").await;
    assert_eq!((code, headers["retry-after"].as_str()), (503, "5"));
    // None of them reads any more, and much is published.
    for n in 0..2000 {
        let mut snapshot = active();
        snapshot.gate.reason = Some(format!("{n} {}", "x".repeat(2000)));
        publish.send_replace(Arc::new(snapshot));
        if n % 100 == 0 {
            let asked = timeout(LIMIT, ask(at, "GET", "/health", "")).await.expect("others are held up");
            assert_eq!(asked.0, 200);
        }
    }
    // One that goes makes room.
    drop(held.pop());
    let again = async {
        while ask(at, "HEAD", "/live", "").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, again).await.expect("its place stays taken");
}

#[tokio::test]
async fn the_last_hour_is_there_for_programs() {
    let sample = Sample { t: 10, at: "2026-11-20T15:11:00Z".into(), lag_bytes: Some(7), ..Sample::default() };
    let (views, _switches, _publish) = views_with(active(), History::of([sample]));
    let at = listen(router(views)).await;
    let (code, headers, body) = ask(at, "GET", "/history.json", "").await;
    assert_eq!((code, headers["content-type"].as_str()), (200, "application/json"));
    let told: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&told["samples"][0]["lag_bytes"], &told["samples"][0]["lag_ms"]), (&7.into(), &Value::Null));
    assert_eq!(ask(at, "GET", "/icon.svg", "").await.1["content-type"], "image/svg+xml");
}
