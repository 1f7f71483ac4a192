//! Who gave which command, and what came of it: one event (`command`) for each, in the log and in `events`.
//!
//! What it is NOT: it allows and forbids nothing. A command is what it was typed as: no value in it is a secret, and
//! texts are cut short. Dry runs change nothing and leave no event.

use super::render::clean;
use crate::engine::turn::{Command, PeerAnswer, PeerQuestion, Ticket};
use crate::io::host;
use crate::serve::http::Credentials;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long names may be looked for; then numbers do.
const LOOK_UP: Duration = Duration::from_millis(200);
/// A reason or a result is cut after so many characters.
const MAX_TEXT: usize = 300;
/// Commands under way that are remembered.
const REMEMBERED: usize = 256;

/// `ann as root (pid 4711)`.
pub async fn who(from: &Credentials) -> String {
    if let Some(role) = &from.console {
        return clean(role);
    }
    let (uid, pid, said) = (from.uid, from.pid, from.said.clone());
    let Some(uid) = uid else { return "somebody".to_owned() };
    let names = tokio::task::spawn_blocking(move || {
        let login = pid.and_then(host::login_uid).and_then(host::user_name);
        (host::user_name(uid), login)
    });
    // A disk that hangs holds no command up.
    let (user, login) = tokio::time::timeout(LOOK_UP, names).await.ok().and_then(Result::ok).unwrap_or_default();
    words(uid, user, login.or(said), pid)
}

fn words(uid: u32, user: Option<String>, login: Option<String>, pid: Option<i32>) -> String {
    let user = user.unwrap_or_else(|| format!("uid {uid}"));
    let name = match login.filter(|login| *login != user) {
        Some(login) => format!("{} as {user}", clean(&login)),
        None => user,
    };
    pid.map_or_else(|| name.clone(), |pid| format!("{name} (pid {pid})"))
}

/// One event: `ann as root (pid 4711): fence: done: fenced: the gate is cut`.
pub fn told(by: &str, command: &str, exit: u8, text: &str) -> String {
    let result = match exit {
        0 => "done".to_owned(),
        3 => "refused".to_owned(),
        4 => "stopped half-way".to_owned(),
        exit => format!("failed ({exit})"),
    };
    format!("{by}: {command}: {result}: {}", short(text))
}

fn short(text: &str) -> String {
    clean(text).chars().take(MAX_TEXT).collect()
}

/// The command as it was typed; `None`: it changes nothing that an event would not tell by itself.
pub fn typed(command: &Command) -> Option<String> {
    match command {
        Command::Promote { dry_run: true, .. }
        | Command::Switchover { dry_run: true, .. }
        | Command::Rejoin { dry_run: true, .. }
        | Command::Drilled { .. } => None,
        Command::Promote { yes, accept_data_loss, peer_is_off, .. } => {
            let mut text = "promote".to_owned();
            text.push_str(if *yes { " --yes" } else { "" });
            text.push_str(if *accept_data_loss { " --accept-data-loss" } else { "" });
            if let Some(node) = peer_is_off {
                text.push_str(&format!(" --peer-is-off {node}"));
            }
            Some(text)
        }
        Command::Switchover { to: Some(to), .. } => Some(format!("switchover --to {to}")),
        Command::Switchover { to: None, .. } => Some("switchover".to_owned()),
        Command::Rejoin { node, .. } => Some(format!("rejoin {node}")),
        Command::Fence { reason } => Some(format!("fence --reason {:?}", short(reason))),
        Command::Unfence => Some("unfence".to_owned()),
        Command::Pause => Some("pause".to_owned()),
        Command::Resume => Some("resume".to_owned()),
        Command::Maintenance { on } => Some(format!("maintenance {}", if *on { "on" } else { "off" })),
    }
}

/// It may take long enough for this node to end before it does.
fn takes_long(command: &Command) -> bool {
    matches!(command, Command::Promote { .. } | Command::Switchover { .. } | Command::Rejoin { .. } | Command::Unfence)
}

/// A command whose end is not known yet.
struct Asked {
    by: String,
    typed: String,
    command: Command,
}

/// The commands under way.
#[derive(Default)]
pub struct Audit(BTreeMap<Ticket, Asked>);

impl Audit {
    /// Somebody gives a command; what to say of it at once, if anything.
    pub fn begun(&mut self, ticket: Ticket, by: String, command: &Command) -> Option<String> {
        let typed = typed(command)?;
        let said = takes_long(command).then(|| format!("{by}: {typed}: begun"));
        self.0.insert(ticket, Asked { by, typed, command: command.clone() });
        if self.0.len() > REMEMBERED {
            self.0.pop_first();
        }
        said
    }

    /// The other node asks for what somebody typed there.
    pub fn asked_by_peer(&mut self, ticket: Ticket, peer: &str, question: &PeerQuestion) {
        if let PeerQuestion::Run { command, by } = question {
            let by = if by.is_empty() { "somebody".to_owned() } else { short(by) };
            // Said when it is answered.
            let _later = self.begun(ticket, format!("{by} on {peer}"), command);
        }
    }

    /// A command ended: its event.
    pub fn ended(&mut self, ticket: Ticket, exit: u8, text: &str) -> Option<String> {
        let asked = self.0.remove(&ticket)?;
        Some(told(&asked.by, &asked.typed, exit, text))
    }

    /// The other node is answered: its event.
    pub fn answered(&mut self, ticket: Ticket, answer: &PeerAnswer) -> Option<String> {
        let asked = self.0.remove(&ticket)?;
        Some(match answer {
            PeerAnswer::Running { .. } => format!("{}: {}: runs here", asked.by, asked.typed),
            PeerAnswer::Refused { why } => told(&asked.by, &asked.typed, 3, why),
            _ => format!("{}: {}: answered", asked.by, asked.typed),
        })
    }

    /// Puts the person's name into what the other node is asked to run.
    pub fn sign(&self, question: &mut PeerQuestion) {
        if let PeerQuestion::Run { command, by } = question
            && let Some(asked) = self.0.values().rev().find(|asked| asked.command == *command)
        {
            by.clone_from(&asked.by);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> Option<String> {
        Some(name.to_owned())
    }

    #[test]
    fn a_person_is_named_as_far_as_the_machine_knows() {
        assert_eq!(words(0, text("root"), text("ann"), Some(7)), "ann as root (pid 7)");
        assert_eq!(words(0, text("root"), text("root"), Some(7)), "root (pid 7)");
        assert_eq!(words(1000, text("ann"), None, None), "ann");
        assert_eq!(words(4242, None, text("a\x1b[31mb"), Some(7)), "a?[31mb as uid 4242 (pid 7)");
    }

    #[test]
    fn a_command_is_told_as_it_was_typed_with_its_result() {
        let node = || "midna".parse().expect("a name");
        let promote = Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off: Some(node()) };
        let mut audit = Audit::default();
        let said = audit.begun(1, "ann".to_owned(), &promote);
        assert_eq!(said.as_deref(), Some("ann: promote --yes --accept-data-loss --peer-is-off midna: begun"));
        let ended = audit.ended(1, 3, "the other node answers\nstill").expect("known");
        assert!(ended.ends_with(" midna: refused: the other node answers?still"), "{ended}");
        assert_eq!(audit.ended(1, 0, ""), None, "told once");
        let fence = Command::Fence { reason: "x".repeat(5000) };
        assert_eq!(audit.begun(2, "ann".to_owned(), &fence), None, "its end comes at once");
        assert!(audit.ended(2, 0, &"y".repeat(5000)).expect("known").len() < 700);
        assert_eq!(audit.begun(3, "ann".to_owned(), &Command::Rejoin { node: node(), dry_run: true }), None);
        assert_eq!(audit.ended(3, 0, ""), None, "a dry run changes nothing");
    }

    #[test]
    fn the_other_node_is_told_who_asks_and_says_so() {
        let command = Command::Switchover { to: Some("midna".parse().expect("a name")), dry_run: false };
        let (mut here, mut there) = (Audit::default(), Audit::default());
        here.begun(1, "ann as root (pid 7)".to_owned(), &command);
        let mut question = PeerQuestion::Run { command, by: String::new() };
        here.sign(&mut question);
        there.asked_by_peer(9, "alp", &question);
        let said = there.answered(9, &PeerAnswer::Running { id: 1, joined: false });
        assert_eq!(said.as_deref(), Some("ann as root (pid 7) on alp: switchover --to midna: runs here"));
        // A node of an older version does not say who asks.
        let old = r#"{"Run":{"command":{"Rejoin":{"node":"alp","dry_run":false}}}}"#;
        let question: PeerQuestion = serde_json::from_str(old).expect("understood");
        there.asked_by_peer(10, "alp", &question);
        let said = there.answered(10, &PeerAnswer::Refused { why: "no".to_owned() });
        assert_eq!(said.as_deref(), Some("somebody on alp: rejoin alp: refused: no"));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut audit = Audit::default();
        for ticket in 0..10_000 {
            audit.begun(ticket, "ann".to_owned(), &Command::Pause);
        }
        assert_eq!(audit.0.len(), REMEMBERED);
    }
}
