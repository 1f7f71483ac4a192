//! The commands that are for the data plane and not for the guard: `pause` and `resume` of one database, `reconnect`,
//! `kill`, and `reload`. From a control request to its last line.
//!
//! What it is NOT: nothing here changes who is active, and the guard never hears of it.

use super::audit;
use super::driver::Request;
use super::reload::Reloader;
use super::render::clean;
use crate::base::fault::ExitCode;
use crate::serve::command::{Commands, PAUSE_WAIT, Unknown};
use crate::serve::http::{Command, ControlReply, ControlRequest};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;

/// A database's name is cut after so many characters; PostgreSQL's are at most 63 bytes.
const MAX_NAME: usize = 63;

/// Whom a request is for.
fn database(request: &ControlRequest) -> Option<&str> {
    request.args.get("database").and_then(Value::as_str)
}

/// Whether this request is one of these; the others are the guard's.
pub fn is_for_pools(request: &ControlRequest) -> bool {
    match request.verb.as_str() {
        "pause" | "resume" => database(request).is_some(),
        "reconnect" | "kill" | "reload" => true,
        _ => false,
    }
}

/// The command as somebody gave it.
pub fn typed(request: &ControlRequest) -> String {
    if let Some(client) = request.args.get("client").and_then(Value::as_i64) {
        return format!("{} client {client}", request.verb);
    }
    let name = database(request).map(|name| clean(name).chars().take(MAX_NAME).collect::<String>());
    name.map_or_else(|| request.verb.clone(), |name| format!("{} {name}", request.verb))
}

/// Hands each command to whom it is for, as long as there are any: of the control socket, and of the console.
pub async fn take(
    mut given: mpsc::Receiver<Command>,
    requests: mpsc::Sender<Request>,
    commands: Commands,
    reloader: Arc<Reloader>,
) {
    while let Some((request, reply)) = given.recv().await {
        if is_for_pools(&request) {
            let (commands, reloader, requests) = (commands.clone(), Arc::clone(&reloader), requests.clone());
            tokio::spawn(async move { obey(request, reply, &commands, &reloader, &requests).await });
            continue;
        }
        let by = audit::who(&request.from).await;
        if requests.send(Request::Control(request, by, reply)).await.is_err() {
            return;
        }
    }
}

/// Carries it out and answers.
pub async fn obey(
    request: ControlRequest,
    reply: mpsc::Sender<ControlReply>,
    commands: &Commands,
    reloader: &Reloader,
    audit: &mpsc::Sender<Request>,
) {
    let by = audit::who(&request.from).await;
    let (exit, text, data) = match outcome(&request, commands, reloader).await {
        Ok(done) => done,
        Err(unknown) => (ExitCode::Failed, unknown.to_string(), None),
    };
    let typed = typed(&request);
    let told = audit::told(&by, &typed, super::cli::code(exit), &text);
    // First, so that who is told of the end finds it among the events soon; a daemon that ends has no more of them.
    let _ending = audit.send(Request::Audited(told)).await;
    // A client that is gone reads nothing.
    let _gone = reply.send(ControlReply::End { exit: super::cli::code(exit), text, data }).await;
}

type Done = (ExitCode, String, Option<Value>);

async fn outcome(request: &ControlRequest, commands: &Commands, reloader: &Reloader) -> Result<Done, Unknown> {
    let name = database(request);
    let named = name.unwrap_or_default();
    Ok(match request.verb.as_str() {
        "pause" => match commands.pause(named).await? {
            0 => (ExitCode::Done, format!("{named} is paused; `portcullis resume {named}` lets its clients go"), None),
            left => {
                let text = format!(
                    "{named} is paused, but {left} of its sessions are still in a transaction after {} s; they are \
                     held when it ends: pause it again to wait for that",
                    PAUSE_WAIT.as_secs()
                );
                (ExitCode::HalfWay, text, Some(json!({"in_transaction": left})))
            }
        },
        "resume" => {
            let text = if commands.resume(named)? { "resumed" } else { "was not paused by name" };
            (ExitCode::Done, format!("{named} {text}"), None)
        }
        "reconnect" => {
            let (idle, used) = commands.reconnect(name)?;
            let text = format!("idle backends closed: {idle}; in use, closed when they come back: {used}");
            (ExitCode::Done, text, Some(json!({"idle": idle, "used": used})))
        }
        "kill" if request.args.get("client").is_some() => {
            let id = request.args.get("client").and_then(Value::as_i64).and_then(|id| i32::try_from(id).ok());
            match commands.kill_client(id.unwrap_or(0)).await {
                None => (ExitCode::Failed, "there is no client of this id; SHOW CLIENTS lists them".to_owned(), None),
                Some(true) => (ExitCode::Done, "the session ended".to_owned(), Some(json!({"ended": 1, "left": 0}))),
                Some(false) => {
                    let text = "the session is still ending; its commit may wait for the standby".to_owned();
                    (ExitCode::HalfWay, text, Some(json!({"ended": 0, "left": 1})))
                }
            }
        }
        "kill" => match name {
            None => (ExitCode::Failed, "kill needs the name of a database; to end everything, fence".to_owned(), None),
            Some(name) => {
                let (ended, left) = commands.kill(name).await?;
                let data = Some(json!({"ended": ended, "left": left}));
                if left == 0 {
                    (ExitCode::Done, format!("sessions of {name} ended: {ended}"), data)
                } else {
                    (ExitCode::HalfWay, format!("sessions of {name} ended: {ended}; still ending: {left}"), data)
                }
            }
        },
        "reload" => match reloader.reload() {
            Ok(done) => {
                let text = done.text();
                tracing::info!("{text}");
                (ExitCode::Done, text, Some(json!({"applied": done.applied, "restart": done.waiting})))
            }
            Err(fault) => (fault.exit, format!("nothing was reloaded: {fault}"), None),
        },
        other => (ExitCode::Failed, format!("{other} is not built yet in this daemon"), None),
    })
}
