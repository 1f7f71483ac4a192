//! What a person asks of a node without a vote. Most of it is refused, with where to ask instead.

use super::{Follower, NO_VOTE, Then};
use crate::engine::durable::Entry;
use crate::engine::rejoining::NODE_LIMIT;
use crate::engine::turn::{Command, Effect, Now, ProcedureBrief, Ticket, Wish};

impl Follower {
    /// Unique enough across restarts because it is the time.
    pub(super) fn procedure_id(&self, now: Now) -> u64 {
        u64::try_from(now.wall.as_millisecond()).unwrap_or(0)
    }

    pub(super) fn on_command(&mut self, now: Now, ticket: Ticket, command: Command, fx: &mut Vec<Effect>) {
        let (me, voters) = (self.setup.me.clone(), self.setup.voters_named());
        let (exit, text) = match command {
            Command::Rejoin { node, dry_run } if node == me => {
                if self.durable.maintenance {
                    let text = "refused: maintenance is on here; `portcullis maintenance off` first".to_owned();
                    fx.push(Effect::End { ticket, exit: 3, text, flag: None });
                } else if let Some(r) = &mut self.rejoin {
                    let text = format!("a rejoin is under way ({}); showing it", r.brief().step);
                    r.join(ticket);
                    fx.push(Effect::Say { ticket, text });
                } else {
                    let id = self.procedure_id(now);
                    self.begin_rejoin(now, id, Some(ticket), dry_run);
                    if self.active().is_none() {
                        let text = format!("waiting for an active node: {voters} (up to {} s)", NODE_LIMIT.as_secs());
                        self.say_rejoin(&text, None, fx);
                    }
                }
                return;
            }
            Command::Maintenance { on } => {
                if self.rejoin.is_some() {
                    let text = "a procedure is under way; try again when it has ended".to_owned();
                    fx.push(Effect::End { ticket, exit: 1, text, flag: None });
                    return;
                }
                let text = if on { "maintenance is on: PostgreSQL here is left alone" } else { "maintenance is off" };
                self.note(now, fx, if on { "maintenance_on" } else { "maintenance_off" }, text.to_owned());
                self.record(fx, vec![Entry::Maintenance { on }], Then::Said { ticket, text: text.to_owned() });
                return;
            }
            Command::Drilled { text } => {
                self.note(now, fx, "drill", text.clone());
                (0, text)
            }
            Command::Promote { .. } => {
                (3, format!("refused: {me} is no voter (voter = false) and is never promoted; promote {voters}, there"))
            }
            Command::Switchover { .. } => {
                (3, format!("refused: {me} is no voter (voter = false); give this command on {voters}"))
            }
            Command::Rejoin { node, .. } => {
                (3, format!("refused: {me} is no voter and rejoins only itself; `rejoin {node}` there, or on {voters}"))
            }
            Command::Fence { .. } => (0, format!("nothing to do: {NO_VOTE}; its gate is always shut")),
            Command::Unfence => (0, "this node is not fenced".to_owned()),
            Command::Pause | Command::Resume => (3, format!("refused: {NO_VOTE}; give this command on {voters}")),
        };
        fx.push(Effect::End { ticket, exit, text, flag: None });
    }

    /// A person on a voter wants this node rejoined; said with every answer until that one hears of it.
    pub(super) fn on_wish(&mut self, now: Now, wish: &Wish) {
        let done = self.last_ended.as_ref().is_some_and(|brief| brief.id == wish.id);
        if self.rejoin.is_some() || done || self.shutting_down {
            return;
        }
        if self.durable.maintenance {
            let text = "refused: maintenance is on there; `portcullis maintenance off` first".to_owned();
            let (kind, step) = ("rejoin".to_owned(), String::new());
            let (ended, lines) = (Some((3, text)), Vec::new());
            self.last_ended = Some(ProcedureBrief { kind, id: wish.id, step, ended, progress: None, lines });
            return;
        }
        self.begin_rejoin(now, wish.id, None, wish.dry_run);
    }
}
