//! HTTP to the daemon: one request per connection, over the Unix socket or TCP, with a time limit on everything.
//!
//! NOT here: what the answers mean.

use super::{End, Target};
use crate::base::fault::{ExitCode, Fault};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::io::ErrorKind;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Reading a page takes at most this long, connecting included; then the daemon does not answer.
pub(super) const READ_TIME: Duration = Duration::from_secs(2);
/// Connecting and sending a command.
const SEND_TIME: Duration = Duration::from_secs(5);
/// The daemon breaks its silence every three seconds while a command runs (`serve::http::control::SILENCE`); after
/// this long it is taken for dead.
const SILENCE_TIME: Duration = Duration::from_secs(15);
/// A page is at most this long; a longer one is not the daemon's.
const MAX_PAGE_BYTES: usize = 8 * 1024 * 1024;
/// One line of a command's answer is at most this long; a longer one is not the daemon's.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// Why there is no answer; decides whether another way is tried.
enum Miss {
    /// Nobody listens on the socket, or we may not connect: `status.listen` may still answer.
    NoSocket(std::io::Error),
    /// Reached, or hanging: asking elsewhere would ask the same daemon.
    Dead(String),
}

fn silent(why: &str) -> Fault {
    Fault::new(
        ExitCode::Failed,
        format!("the daemon does not answer ({why}); see `systemctl status portcullis` and start it"),
    )
}

/// GET of a page: over the socket, else over `status.listen`.
pub(super) async fn read(target: &Target, path: &str) -> Result<Bytes, Fault> {
    match within(READ_TIME, read_socket(target, path)).await {
        Ok(body) => Ok(body),
        Err(Miss::Dead(why)) => Err(silent(&why)),
        Err(Miss::NoSocket(error)) => {
            let socket = target.control.display();
            let Some(listen) = target.status_listen else { return Err(silent(&format!("{socket}: {error}"))) };
            let read = async {
                let stream = TcpStream::connect(listen).await.map_err(|error| Miss::Dead(error.to_string()))?;
                page(stream, path).await
            };
            within(READ_TIME, read).await.map_err(|miss| match miss {
                Miss::Dead(why) => silent(&format!("{socket}: {error}; {listen}: {why}")),
                Miss::NoSocket(why) => silent(&format!("{socket}: {error}; {listen}: {why}")),
            })
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Miss>>) -> Result<T, Miss> {
    match timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(Miss::Dead(format!("nothing within {} s", limit.as_secs()))),
    }
}

async fn connect_socket(target: &Target) -> Result<UnixStream, Miss> {
    UnixStream::connect(&target.control).await.map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied => Miss::NoSocket(error),
        _ => Miss::Dead(error.to_string()),
    })
}

async fn read_socket(target: &Target, path: &str) -> Result<Bytes, Miss> {
    page(connect_socket(target).await?, path).await
}

async fn page<S>(stream: S, path: &str) -> Result<Bytes, Miss>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = build(Method::GET, path, Bytes::new())?;
    let response = ask(stream, request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_PAGE_BYTES).collect().await;
    let body = body.map_err(|error| Miss::Dead(error.to_string()))?.to_bytes();
    if status == StatusCode::OK { Ok(body) } else { Err(Miss::Dead(format!("it answered {status}"))) }
}

fn build(method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, Miss> {
    let mut request = Request::builder().method(method).uri(path);
    // For the daemon's log of who did what.
    if let Ok(name) = std::env::var("SUDO_USER") {
        request = request.header(crate::serve::http::SUDO_USER, name);
    }
    request
        .header(hyper::header::HOST, "portcullis")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .header(hyper::header::CONNECTION, "close")
        .body(Full::new(body))
        .map_err(|error| Miss::Dead(error.to_string()))
}

async fn ask<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Miss>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let dead = |error: hyper::Error| Miss::Dead(error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(dead)?;
    // Ends when the response has been read or dropped; its errors reach us through the response.
    tokio::spawn(async move { drop(connection.await) });
    sender.send_request(request).await.map_err(dead)
}

/// One line of a command's answer.
pub(super) enum Line {
    Progress(Progress),
    End(End),
}

/// What happened so far.
pub(super) struct Progress {
    pub(super) text: String,
    pub(super) at_ms: u64,
    /// Of a wait: how long it still lasts.
    pub(super) left_ms: Option<u64>,
    /// Facts for programs.
    pub(super) data: Option<Value>,
    /// The very line.
    pub(super) raw: String,
}

/// A command's answer as it comes.
pub(super) struct Lines {
    verb: String,
    body: Incoming,
    buffer: Vec<u8>,
}

/// POST of a command; over the socket only.
pub(super) async fn send(target: &Target, verb: &str, args: &Value) -> Result<Lines, Fault> {
    let socket = target.control.display();
    let stream = within(SEND_TIME, connect_socket(target)).await.map_err(|miss| match miss {
        Miss::NoSocket(error) if error.kind() == ErrorKind::PermissionDenied => Fault::new(
            ExitCode::Failed,
            format!("{verb} may not use {socket} ({error}); run it as root, or as the daemon's user or group"),
        ),
        Miss::NoSocket(error) => silent(&format!("{socket}: {error}")),
        Miss::Dead(why) => silent(&format!("{socket}: {why}")),
    })?;
    // From here on the daemon may have begun: what goes wrong now leaves the outcome unknown.
    let sent = async {
        let request = build(Method::POST, &format!("/control/{verb}"), Bytes::from(args.to_string()))?;
        ask(stream, request).await
    };
    let response = within(SILENCE_TIME, sent).await.map_err(|miss| match miss {
        Miss::NoSocket(error) => lost(verb, &error.to_string()),
        Miss::Dead(why) => lost(verb, &why),
    })?;
    Ok(Lines { verb: verb.to_owned(), body: response.into_body(), buffer: Vec::new() })
}

fn lost(verb: &str, why: &str) -> Fault {
    Fault::new(
        ExitCode::HalfWay,
        format!("the daemon fell silent during {verb} ({why}); see `portcullis status`, then run it again"),
    )
}

impl Lines {
    /// The next line. A stream that ends, breaks or falls silent before its last line is a fault: outcome unknown.
    pub(super) async fn next(&mut self) -> Result<Line, Fault> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let raw: Vec<u8> = self.buffer.drain(..=at).collect();
                let raw = String::from_utf8_lossy(&raw).trim().to_owned();
                if raw.is_empty() {
                    continue;
                }
                return parse(raw).ok_or_else(|| lost(&self.verb, "its answer is not understood"));
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(lost(&self.verb, "its answer is too long"));
            }
            let frame = timeout(SILENCE_TIME, self.body.frame()).await;
            match frame {
                Err(_) => return Err(lost(&self.verb, &format!("nothing within {} s", SILENCE_TIME.as_secs()))),
                Ok(None) => return Err(lost(&self.verb, "it closed the connection")),
                Ok(Some(Err(error))) => return Err(lost(&self.verb, &error.to_string())),
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

fn parse(raw: String) -> Option<Line> {
    let value: Value = serde_json::from_str(&raw).ok()?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let data = value.get("data").cloned();
    if let Some(exit) = value.get("exit").and_then(Value::as_u64) {
        let exit = match exit {
            0 => ExitCode::Done,
            1 => ExitCode::Failed,
            2 => ExitCode::Config,
            3 => ExitCode::Refused,
            _ => ExitCode::HalfWay,
        };
        return Some(Line::End(End { exit, text: text("text"), data, raw }));
    }
    let at_ms = value.get("at_ms").and_then(Value::as_u64).unwrap_or(0);
    value.get("line").and_then(Value::as_str)?;
    let left_ms = data.as_ref().and_then(|data| data.get("left_ms")).and_then(Value::as_u64);
    Some(Line::Progress(Progress { text: text("line"), at_ms, left_ms, data, raw }))
}
