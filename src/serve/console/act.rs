//! What the console changes: commands like those of the control socket, sent there, with who gives them.
//!
//! What it is NOT: it carries nothing out, and notes nothing: whoever takes commands does both.

use super::{Rights, Session};
use crate::serve::command::PAUSE_WAIT;
use crate::serve::http::{ControlReply, ControlRequest, Credentials};
use crate::wire::pg::Refusal;
use crate::wire::pg::console::Action;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;

/// Answers on their way; more are not sent for these commands.
const MAX_REPLIES: usize = 16;
/// Pause between two looks whether all clients are held.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Session<'_> {
    /// Does it, and waits until it is done: the command tag, and what is said beside it.
    pub(super) async fn act(&self, action: &Action) -> Result<(&'static str, String), Refusal> {
        if self.rights != Rights::All {
            let text = format!("portcullis: role \"{}\" may only look", self.user);
            let hint = "Roles in console.admins of portcullis.toml, and postgres.admin_user, may do this.";
            return Err(Refusal::new("42501", text).hint(hint));
        }
        let of = |database: &Option<String>| json!({"database": database});
        let (tag, verb, args) = match action {
            Action::Pause(database) => ("PAUSE", "pause", of(database)),
            Action::Resume(database) => ("RESUME", "resume", of(database)),
            Action::Reconnect(database) => ("RECONNECT", "reconnect", of(database)),
            Action::Kill(database) => ("KILL", "kill", json!({"database": database})),
            Action::KillClient(id) => ("KILL", "kill", json!({"client": id})),
            Action::Reload => ("RELOAD", "reload", json!({})),
        };
        let said = self.command(verb, args).await?;
        if *action == Action::Pause(None) {
            self.until_all_are_held().await?;
        }
        Ok((tag, said))
    }

    async fn command(&self, verb: &str, args: Value) -> Result<String, Refusal> {
        let busy = |text: &str| Refusal::new("53000", format!("portcullis: {text}")).hint("Try again.");
        let Some(daemon) = self.proxy.daemon() else {
            return Err(Refusal::new("55000", "portcullis: there is no daemon behind this gate"));
        };
        let who = format!("role {} from {} (console)", self.user, self.peer);
        let from = Credentials { console: Some(who), ..Credentials::default() };
        let (reply, mut replies) = mpsc::channel(MAX_REPLIES);
        let request = ControlRequest { verb: verb.to_owned(), args, from };
        daemon.control.try_send((request, reply)).map_err(|_| busy("the daemon has too many commands waiting"))?;
        loop {
            match replies.recv().await {
                Some(ControlReply::Line { .. }) => {}
                Some(ControlReply::End { exit: 0, text, .. }) => return Ok(text),
                Some(ControlReply::End { exit, text, .. }) => return Err(failed(exit, &text)),
                None => return Err(busy("the daemon ended before it answered; what came of it is unknown")),
            }
        }
    }

    /// As pgbouncer's PAUSE: done when nobody is in a transaction any more.
    async fn until_all_are_held(&self) -> Result<(), Refusal> {
        let gate = &self.proxy.gate;
        let waiting = async {
            // After a while first: who was just let through is busy by then. Resumed by another, it waits for nobody.
            loop {
                tokio::time::sleep(LOOK_AGAIN).await;
                if gate.busy() == 0 || !gate.is_paused() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(PAUSE_WAIT, waiting).await;
        match gate.busy() {
            left if left > 0 && gate.is_paused() => {
                let waited = PAUSE_WAIT.as_secs();
                let text =
                    format!("portcullis: paused, but {left} sessions are still in a transaction after {waited} s");
                let hint = "They are held when it ends. PAUSE again waits for that; RESUME lets all go.";
                Err(Refusal::new("55006", text).hint(hint))
            }
            _ => Ok(()),
        }
    }
}

/// What the command said of its failure: `what happened; what to do about it`.
fn failed(exit: u8, text: &str) -> Refusal {
    let code = match exit {
        // Of the configuration.
        2 => "F0000",
        4 => "55006",
        _ => "55000",
    };
    match text.split_once("; ") {
        Some((what, remedy)) => Refusal::new(code, format!("portcullis: {what}")).hint(sentence(remedy)),
        None => Refusal::new(code, format!("portcullis: {text}")),
    }
}

/// With a capital and a full stop, as PostgreSQL writes hints.
fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    let first: String = rest.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
    format!("{first}{}.", rest.as_str().trim_end_matches('.'))
}
