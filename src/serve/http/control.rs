//! Commands on the control socket: `POST /control/{verb}` with a JSON object, answered by a stream of NDJSON lines.
//!
//! It carries words only: which verbs there are, who may do what when, and all the acting is the driver's. Whoever
//! can connect to the socket may command (mode 0660).
//!
//! ```text
//!  {"line": "...", "at_ms": 312, "data": ...}       progress; at_ms counts from the request
//!  (an empty line every few seconds of silence)
//!  {"exit": 0, "text": "...", "at_ms": 4711, "data": ...}   the last line, always
//! ```
//!
//! **Invariant:** a client that goes away or reads slowly never holds the driver up: its replies are taken from the
//! channel at once, and progress lines that do not fit are dropped; the last line is not.

use super::{Views, harden, pages};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Extension;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// The body of a command may be this long; more is answered with 413.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Replies on their way to one client. When full, further progress lines are dropped.
pub const MAX_REPLIES: usize = 256;
/// An empty line after so much silence, by which the client knows that the daemon lives.
pub const SILENCE: Duration = Duration::from_secs(3);
/// A verb is at most this long; longer is answered with 404.
const MAX_VERB_BYTES: usize = 40;

/// What the client asks for. The driver answers an unknown verb with `End { exit: 1, .. }`.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlRequest {
    /// The verb of the command line: `promote`, `fence`, ...
    pub verb: String,
    /// A JSON object; `{}` when the client sent nothing.
    pub args: Value,
    pub from: Credentials,
}

/// Who is at the other end of the control socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The kernel's word (SO_PEERCRED); `None`: not over the socket.
    pub uid: Option<u32>,
    pub pid: Option<i32>,
    /// The client's word, which only root's is believed: who became root by sudo.
    pub said: Option<String>,
    /// Of the admin console, in words: it asked for a proof of who this is. The socket never sets it.
    pub console: Option<String>,
}

impl Credentials {
    /// Of the process that connected.
    pub(super) fn of(stream: &tokio::net::UnixStream) -> Credentials {
        let Ok(known) = stream.peer_cred() else { return Credentials::default() };
        Credentials { uid: Some(known.uid()), pid: known.pid(), ..Credentials::default() }
    }
}

/// The header in which a client of root's says who became root.
pub const SUDO_USER: &str = "portcullis-sudo-user";
/// Names of users are at most this long.
const MAX_NAME_BYTES: usize = 64;

/// What the driver answers: lines while it works, and `End` once.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlReply {
    /// A sentence about what just happened, and its facts for programs.
    Line { text: String, data: Option<Value> },
    /// The exit code of the command line, its last sentence, and the facts for programs.
    End { exit: u8, text: String, data: Option<Value> },
}

/// A request with the way back. The sender's `send` does not wait for the client; it fails once the answer ended.
/// Dropping it without `End` tells the client that the outcome is unknown.
pub type Command = (ControlRequest, mpsc::Sender<ControlReply>);

#[derive(Clone)]
struct Commands(mpsc::Sender<Command>);

/// The pages plus the commands: for the control socket only.
pub fn control_router(views: Views, commands: mpsc::Sender<Command>) -> Router {
    let control = Router::new()
        .route("/control/{verb}", post(command))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(Commands(commands));
    harden(control.merge(pages().with_state(views)))
}

async fn command(
    State(commands): State<Commands>,
    Path(verb): Path<String>,
    from: Option<Extension<Credentials>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let known_form = verb.len() <= MAX_VERB_BYTES && verb.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
    if !known_form {
        return refuse(StatusCode::NOT_FOUND, "this is no verb; see portcullis --help");
    }
    let args = if body.is_empty() { Ok(json!({})) } else { serde_json::from_slice::<Value>(&body) };
    let args = match args {
        Ok(args) if args.is_object() => args,
        _ => return refuse(StatusCode::BAD_REQUEST, "the command's body is no JSON object; client and daemon differ"),
    };
    let mut from = from.map(|Extension(from)| from).unwrap_or_default();
    if from.uid == Some(0) {
        let said = headers.get(SUDO_USER).and_then(|name| name.to_str().ok());
        from.said = said.filter(|name| !name.is_empty() && name.len() <= MAX_NAME_BYTES).map(str::to_owned);
    }
    let (reply, replies) = mpsc::channel(MAX_REPLIES);
    match commands.0.try_send((ControlRequest { verb, args, from }, reply)) {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(_)) => {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon has too many commands waiting; try again");
        }
        Err(mpsc::error::TrySendError::Closed(_)) => {
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "the daemon is shutting down; nothing was done");
        }
    }
    let (out, lines) = mpsc::channel(MAX_REPLIES);
    tokio::spawn(forward(replies, out));
    let lines = stream::unfold(lines, |mut lines| async move {
        let line = lines.recv().await?;
        Some((Ok::<Bytes, Infallible>(line), lines))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

/// An answer for what never reached the driver: nothing was done.
fn refuse(code: StatusCode, text: &str) -> Response {
    let line = encode(&json!({"exit": 1, "text": text, "at_ms": 0}));
    (code, [(header::CONTENT_TYPE, "application/x-ndjson")], line).into_response()
}

fn encode(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

/// Takes the driver's replies off its hands until the `End`, also after the client went away.
async fn forward(mut replies: mpsc::Receiver<ControlReply>, out: mpsc::Sender<Bytes>) {
    let began = tokio::time::Instant::now();
    let at = || u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    loop {
        match timeout(SILENCE, replies.recv()).await {
            Err(_) => drop(out.try_send(Bytes::from_static(b"\n"))),
            Ok(Some(ControlReply::Line { text, data })) => {
                drop(out.try_send(encode(&with(json!({"line": text, "at_ms": at()}), data))));
            }
            Ok(Some(ControlReply::End { exit, text, data })) => {
                drop(out.send(encode(&with(json!({"exit": exit, "text": text, "at_ms": at()}), data))).await);
                return;
            }
            Ok(None) => {
                let text = "the daemon ended before it answered; `portcullis status` shows how far it came";
                drop(out.send(encode(&json!({"exit": 4, "text": text, "at_ms": at()}))).await);
                return;
            }
        }
    }
}

fn with(mut line: Value, data: Option<Value>) -> Value {
    if let (Some(object), Some(data)) = (line.as_object_mut(), data) {
        object.insert("data".to_owned(), data);
    }
    line
}
