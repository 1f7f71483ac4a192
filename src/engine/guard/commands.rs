//! What a person asks of this node, and commands given on the wrong one: they are run by the peer and watched from
//! here.

use super::handover::MAINTENANCE;
use super::proofs::PeerAskedFor;
use super::takeover::Kind;
use super::{Guard, Then};
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::rejoining::Heard;
use crate::engine::turn::{Command, Effect, Now, PeerAnswer, PeerQuestion, ProcedureBrief, Ticket};

/// How long a forwarded procedure may be silent before the watcher gives up.
pub(super) const WATCH_LIMIT: Duration = Duration::from_secs(30);

/// A procedure that runs on the peer while somebody waits here.
#[derive(Debug, Clone, Hash)]
pub(super) struct Watching {
    ticket: Ticket,
    command: Command,
    /// Known once the peer has begun.
    id: Option<u64>,
    ask_until: Instant,
    ask_at: Option<Instant>,
    heard: Instant,
    told: Heard,
    /// What runs there ran already, and that is still to be said.
    joined: bool,
}

impl Guard {
    /// The peer's name.
    pub(super) fn peer_name(&self) -> NodeName {
        self.setup.peer.clone()
    }

    /// A number for a procedure that both journals hold: unique enough across restarts because it is the time.
    pub(super) fn procedure_id(&mut self, now: Now) -> u64 {
        u64::try_from(now.wall.as_millisecond()).unwrap_or(0)
    }

    pub(super) fn on_command(&mut self, now: Now, ticket: Ticket, command: Command, fx: &mut Vec<Effect>) {
        let procedure = matches!(
            command,
            Command::Promote { .. } | Command::Switchover { .. } | Command::Rejoin { .. } | Command::Unfence
        );
        let dry = matches!(
            command,
            Command::Promote { dry_run: true, .. }
                | Command::Switchover { dry_run: true, .. }
                | Command::Rejoin { dry_run: true, .. }
        );
        if procedure && !dry && self.takeover.as_ref().is_some_and(|t| t.dry_run) {
            self.end_takeover(now, 1, "given up: a command that acts was given meanwhile", fx);
        }
        if procedure && self.join_running(now, ticket, &command, fx) {
            return;
        }
        if procedure && self.in_maintenance() {
            let text = "refused: maintenance is on here; `portcullis maintenance off` first".to_owned();
            fx.push(Effect::End { ticket, exit: 3, text, flag: None });
            return;
        }
        match command {
            Command::Promote { dry_run, yes, accept_data_loss, peer_is_off } => {
                self.begin_takeover(now, ticket, Kind::Promote, dry_run, yes, accept_data_loss, peer_is_off, fx);
            }
            Command::Switchover { to: None, .. } if self.setup.nodes.len() > 2 => {
                let voters = self.setup.voters_named();
                let text = format!("refused: there is more than one standby; name the one with --to ({voters})");
                fx.push(Effect::End { ticket, exit: 3, text, flag: None });
            }
            Command::Switchover { to: Some(to), .. } if self.setup.followers().any(|name| *name == to) => {
                let voters = self.setup.voters_named();
                let text = format!("refused: {to} has no vote (voter = false) and is never active; name {voters}");
                fx.push(Effect::End { ticket, exit: 3, text, flag: None });
            }
            Command::Switchover { to, dry_run } => {
                let target = to.unwrap_or_else(|| {
                    if self.durable.is_holder() { self.setup.peer.clone() } else { self.setup.me.clone() }
                });
                if target == self.setup.me {
                    self.begin_takeover(now, ticket, Kind::Switchover, dry_run, true, false, None, fx);
                } else if target == self.setup.peer {
                    let command = Command::Switchover { to: Some(target), dry_run };
                    self.forward(now, ticket, command, Duration::from_secs(2), fx);
                } else {
                    let text =
                        format!("refused: no voter is named {target}; name {} or {}", self.setup.me, self.setup.peer);
                    fx.push(Effect::End { ticket, exit: 3, text, flag: None });
                }
            }
            Command::Rejoin { node, dry_run } => self.on_rejoin_command(now, ticket, &node, dry_run, fx),
            Command::Unfence => {
                if self.fenced().is_none() {
                    fx.push(Effect::End { ticket, exit: 0, text: "this node is not fenced".to_owned(), flag: None });
                } else {
                    self.begin_takeover(now, ticket, Kind::Unfence, false, true, false, None, fx);
                }
            }
            Command::Fence { reason } => {
                if self.fenced().is_some() {
                    // Who waits for the node that was consented to waits no longer.
                    self.end_hold_over(fx);
                    fx.push(Effect::End {
                        ticket,
                        exit: 0,
                        text: "this node is fenced already".to_owned(),
                        flag: None,
                    });
                    return;
                }
                let number = self.durable.seen.max(self.durable.won).next();
                self.fence(now, number, reason, fx);
                let text = "fenced: the gate is cut; `portcullis unfence` lifts it".to_owned();
                fx.push(Effect::End { ticket, exit: 0, text, flag: None });
            }
            Command::Pause => {
                self.gate.held = true;
                if !self.gate.paused {
                    self.gate.paused = true;
                    fx.push(Effect::HoldClients);
                    self.note(now, fx, "paused", "clients are held at their next transaction boundary".to_owned());
                }
                let text = "paused; `portcullis resume` lets clients go".to_owned();
                fx.push(Effect::End { ticket, exit: 0, text, flag: None });
            }
            Command::Drilled { text } => {
                self.note(now, fx, "drill", text.clone());
                fx.push(Effect::End { ticket, exit: 0, text, flag: None });
            }
            Command::Maintenance { on } => self.on_maintenance(now, ticket, on, fx),
            Command::Resume => {
                self.gate.held = false;
                if self.gate.paused && self.handover.is_none() {
                    self.release_clients(fx);
                    self.note(now, fx, "resumed", "clients go on".to_owned());
                }
                fx.push(Effect::End { ticket, exit: 0, text: "resumed".to_owned(), flag: None });
            }
        }
    }

    /// PostgreSQL is left alone from here on, or not any more; the gate goes on obeying the lease.
    fn on_maintenance(&mut self, now: Now, ticket: Ticket, on: bool, fx: &mut Vec<Effect>) {
        if on && (self.takeover.is_some() || self.rejoin.is_some() || self.handover.is_some()) {
            let text = "a procedure is under way; try again when it has ended".to_owned();
            fx.push(Effect::End { ticket, exit: 1, text, flag: None });
            return;
        }
        let text = if on {
            "maintenance is on: PostgreSQL here is left alone; the gate goes on obeying the lease"
        } else {
            "maintenance is off"
        };
        self.note(now, fx, if on { "maintenance_on" } else { "maintenance_off" }, text.to_owned());
        self.record(fx, vec![Entry::Maintenance { on }], Then::Said { ticket, text: text.to_owned() });
    }

    /// A second procedure shows the first one's progress and ends with its exit code; it never starts another.
    fn join_running(&mut self, now: Now, ticket: Ticket, command: &Command, fx: &mut Vec<Effect>) -> bool {
        if let Some(t) = &mut self.takeover {
            let brief = t.brief();
            t.join(ticket);
            let text = format!("a {} is under way ({}); showing it", brief.kind, brief.step);
            fx.push(Effect::Say { ticket, text });
            return true;
        }
        if let Some(r) = &mut self.rejoin {
            let brief = r.brief();
            r.join(ticket);
            let text = format!("a rejoin is under way ({}); showing it", brief.step);
            fx.push(Effect::Say { ticket, text });
            return true;
        }
        // The old side of the peer's: to begin one here would cut everybody who waits for the end of that.
        if let Some(h) = &self.handover {
            let (id, text) = (h.attempt, format!("{} takes over ({}); showing it", self.setup.peer, h.word()));
            fx.push(Effect::Say { ticket, text });
            self.watch(now, ticket, command.clone(), Some(id), Duration::ZERO);
            return true;
        }
        false
    }

    /// Has the peer run a command; asks again until `limit` while its daemon does not answer.
    pub(super) fn forward(
        &mut self,
        now: Now,
        ticket: Ticket,
        command: Command,
        limit: Duration,
        fx: &mut Vec<Effect>,
    ) {
        let text = format!("{} is asked to do it", self.setup.peer);
        fx.push(Effect::Say { ticket, text });
        self.watch(now, ticket, command.clone(), None, limit);
        let ask = PeerQuestion::Run { command, by: String::new() };
        self.ask_peer(now, PeerAskedFor::Forward { ticket }, ask, super::proofs::PEER_LIMIT, fx);
    }

    fn watch(&mut self, now: Now, ticket: Ticket, command: Command, id: Option<u64>, limit: Duration) {
        self.watching.push(Watching {
            ticket,
            command,
            id,
            ask_until: now.boot + limit,
            ask_at: None,
            heard: now.boot,
            told: Heard::default(),
            joined: false,
        });
    }

    pub(super) fn on_forwarded(
        &mut self,
        now: Now,
        ticket: Ticket,
        answer: Result<Box<PeerAnswer>, String>,
        fx: &mut Vec<Effect>,
    ) {
        let peer = self.peer_name();
        let Some(at) = self.watching.iter().position(|w| w.ticket == ticket) else { return };
        let watching = &mut self.watching[at];
        match answer.map(|a| *a) {
            Ok(PeerAnswer::Running { id, joined }) => {
                watching.joined = joined;
                watching.id = Some(id);
                watching.heard = now.boot;
            }
            // It is there, so that question or its answer was lost; it may well be at it.
            Err(_) if self.peer.heard > Some(watching.heard) && now.boot < watching.heard + WATCH_LIMIT => {
                watching.ask_at = Some(now.boot);
            }
            Err(why) if now.boot >= watching.ask_until => {
                self.watching.remove(at);
                let text = format!("the daemon of {peer} does not answer ({why}); start it there");
                fx.push(Effect::End { ticket, exit: 1, text, flag: None });
            }
            Err(_) => watching.ask_at = Some(now.boot + Duration::from_secs(1)),
            Ok(PeerAnswer::Refused { why }) => {
                self.watching.remove(at);
                fx.push(Effect::End { ticket, exit: 3, text: format!("refused by {peer}: {why}"), flag: None });
            }
            Ok(_) => {
                self.watching.remove(at);
                fx.push(Effect::End {
                    ticket,
                    exit: 1,
                    text: format!("{peer} gave an answer to another question"),
                    flag: None,
                });
            }
        }
    }

    /// Shows what the peer says of the procedures watched from here.
    pub(super) fn advance_watching(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let mut again = Vec::new();
        let brief = self.peer.state.as_ref().and_then(|p| p.procedure.clone());
        let heard = self.peer.heard;
        let peer = self.peer_name();
        self.watching.retain_mut(|w| {
            if w.ask_at.is_some_and(|at| now.boot >= at) {
                w.ask_at = None;
                again.push((w.ticket, w.command.clone()));
            }
            let Some(id) = w.id else { return true };
            let known = brief.as_ref().is_some_and(|b| b.id == id);
            if let Some(heard) = heard.filter(|_| known) {
                w.heard = w.heard.max(heard);
            }
            if now.boot.since(w.heard) > WATCH_LIMIT {
                let text = format!(
                    "{peer} says nothing of it any more; look there with `portcullis status`, then run it again"
                );
                fx.push(Effect::End { ticket: w.ticket, exit: 4, text, flag: None });
                return false;
            }
            let Some(brief) = brief.as_ref().filter(|b| b.id == id) else { return true };
            if std::mem::take(&mut w.joined) {
                let text = format!("a {} is under way on {peer} ({}); showing it", brief.kind, brief.step);
                fx.push(Effect::Say { ticket: w.ticket, text });
            }
            let news = w.told.news(brief).into_iter();
            fx.extend(news.map(|(text, progress)| Effect::told(w.ticket, text, progress)));
            match &brief.ended {
                Some((exit, text)) => {
                    fx.push(Effect::End { ticket: w.ticket, exit: *exit, text: text.clone(), flag: None });
                    false
                }
                None => true,
            }
        });
        for (ticket, command) in again {
            let ask = PeerQuestion::Run { command, by: String::new() };
            self.ask_peer(now, PeerAskedFor::Forward { ticket }, ask, super::proofs::PEER_LIMIT, fx);
        }
    }

    /// The peer's person gave a command there that runs here.
    pub(super) fn on_run_for_peer(&mut self, now: Now, ticket: Ticket, command: Command, fx: &mut Vec<Effect>) {
        let answer = if let Some(brief) = self.procedure_brief().filter(|b| b.ended.is_none()) {
            PeerAnswer::Running { id: brief.id, joined: true }
        } else {
            match command {
                _ if self.in_maintenance() => PeerAnswer::Refused { why: MAINTENANCE.to_owned() },
                Command::Rejoin { .. } if self.wrong_direction(now).is_some() => {
                    PeerAnswer::Refused { why: self.wrong_direction(now).unwrap_or_default() }
                }
                Command::Switchover { dry_run, .. } => {
                    self.begin_takeover(now, 0, Kind::Switchover, dry_run, true, false, None, fx);
                    PeerAnswer::Running { id: self.takeover.as_ref().map_or(0, |t| t.id), joined: false }
                }
                Command::Rejoin { dry_run, .. } => {
                    PeerAnswer::Running { id: self.begin_rejoin(now, None, dry_run), joined: false }
                }
                _ => PeerAnswer::Refused { why: "this command is given on the node itself".to_owned() },
            }
        };
        fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
    }

    /// The procedure that runs here, or the last one that ended.
    pub(super) fn procedure_brief(&self) -> Option<ProcedureBrief> {
        let takeover = self.takeover.as_ref().map(super::takeover::Takeover::brief);
        let rejoin = self.rejoin.as_ref().map(super::rejoin::Rejoin::brief);
        takeover.or(rejoin).or_else(|| self.last_ended.clone())
    }
}
