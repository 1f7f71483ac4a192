//! Nodes without a vote, as a voter sees them: shown, answered, given role and slot, and told of a person's wish to
//! have them rejoined. They decide for themselves (`engine::follower`).
//!
//! **Invariant:** nothing that such a node says or does is evidence: it reaches no proof, no pledge, no record and no
//! list of synchronous standbys, and it never counts as the peer.

use super::commands::WATCH_LIMIT;
use super::{Guard, PgOwner};
use crate::base::ids::{Lsn, NodeName};
use crate::base::time::{Duration, Instant};
use crate::engine::rejoining::Heard;
use crate::engine::report::{StandbyRow, WalTail};
use crate::engine::turn::{
    Effect, Facts, FollowerState, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask, ProcedureBrief, Ticket,
};
use std::collections::{BTreeMap, VecDeque};

/// How long a wish waits for the node's daemon (the contract: 30 s for NODE's daemon to answer).
const WISH_LIMIT: Duration = Duration::from_secs(30);
/// How often a standby drops slots that a node without a vote left when it went to another primary.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// Who does not serve is no source.
const NOT_ACTIVE: &str = "this node is not the active one, or its gate is not open";

/// `rejoin` of such a node, given here: it fetches the wish with its next question, and is watched.
#[derive(Debug, Clone, Hash)]
struct Wish {
    ticket: Ticket,
    node: NodeName,
    wish: crate::engine::turn::Wish,
    until: Instant,
    /// The procedure that runs there, once it does.
    taken: Option<u64>,
    heard: Instant,
    told: Heard,
}

/// A node without a vote that looks at this one before it is rejoined.
#[derive(Debug, Clone, Hash)]
struct Look {
    ticket: Ticket,
    node: NodeName,
    id: u64,
    tail: Option<WalTail>,
}

/// What is known of the nodes without a vote.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct FollowersMemory {
    heard: BTreeMap<NodeName, (Instant, FollowerState)>,
    /// Who waits for role and slot.
    preparing: Vec<(Ticket, u64)>,
    /// Who waits for this node's facts, and the one that they are being gathered for.
    looks: VecDeque<Look>,
    looking: Option<Look>,
    wishes: Vec<Wish>,
    sweep_at: Instant,
}

impl Guard {
    pub(super) fn on_follower_asked(
        &mut self,
        now: Now,
        ticket: Ticket,
        from: &NodeName,
        question: PeerQuestion,
        fx: &mut Vec<Effect>,
    ) {
        let known = self.setup.followers().any(|name| name == from);
        let answer = match question {
            PeerQuestion::Follow { state } if known && state.node == *from => {
                let brief = state.procedure.clone();
                self.followers.heard.insert(from.clone(), (now.boot, state));
                self.watch_wishes(now, from, brief.as_ref(), fx);
                PeerAnswer::Facts(Box::new(self.facts_for(now, from)))
            }
            PeerQuestion::PrepareFollower { .. } if !self.durable.is_holder() || !self.gate.open => {
                PeerAnswer::Refused { why: NOT_ACTIVE.to_owned() }
            }
            PeerQuestion::PrepareFollower { .. } if self.takeover.is_some() || self.handover.is_some() => {
                PeerAnswer::Refused { why: "another procedure is under way here".to_owned() }
            }
            PeerQuestion::PrepareFollower { id, look: true, tail } if known => {
                // A newer question replaces one that nobody waits for any more.
                self.followers.looks.retain(|look| look.node != *from);
                self.followers.looks.push_back(Look { ticket, node: from.clone(), id, tail });
                self.next_follower_look(fx);
                return;
            }
            PeerQuestion::PrepareFollower { id, .. } if known => {
                self.followers.preparing.push((ticket, id));
                self.pg_task_next(PgOwner::Followers, PgTask::PrepareStandby, fx);
                return;
            }
            _ => PeerAnswer::Refused { why: format!("{from} is no node without a vote here; make the files equal") },
        };
        fx.push(Effect::AnswerPeer { ticket, answer: Box::new(answer) });
    }

    fn facts_for(&self, now: Now, asker: &NodeName) -> Facts {
        let others = self.setup.followers().filter(|name| *name != asker);
        let report = self.pg.report.as_ref().filter(|r| self.pg.up && !r.in_recovery && self.gate.open);
        let wish = self.followers.wishes.iter().find(|w| w.node == *asker && w.taken.is_none());
        // Nobody follows a procedure there by what it hears here.
        let brief = |state: &FollowerState| FollowerState {
            procedure: state.procedure.clone().map(|brief| ProcedureBrief { lines: Vec::new(), ..brief }),
            ..state.clone()
        };
        Facts {
            state: self.my_state(),
            standbys: report.map(|r| r.standbys.clone()).unwrap_or_default(),
            others: others.filter_map(|name| self.follower_state(now, name)).map(brief).collect(),
            wish: wish.map(|w| w.wish.clone()),
        }
    }

    /// One after another: each has an end of its own to compare.
    fn next_follower_look(&mut self, fx: &mut Vec<Effect>) {
        if self.followers.looking.is_some() {
            return;
        }
        let Some(look) = self.followers.looks.pop_front() else { return };
        let tail = look.tail.clone();
        self.followers.looking = Some(look);
        self.pg_task_next(PgOwner::FollowerLook, PgTask::LookAsSource(tail), fx);
    }

    pub(super) fn on_follower_looked(&mut self, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        if let Some(Look { ticket, id, .. }) = self.followers.looking.take() {
            let answer = Box::new(prepared(id, &result));
            fx.push(Effect::AnswerPeer { ticket, answer });
        }
        if !self.durable.is_holder() || !self.gate.open {
            for look in std::mem::take(&mut self.followers.looks) {
                let answer = Box::new(PeerAnswer::Refused { why: NOT_ACTIVE.to_owned() });
                fx.push(Effect::AnswerPeer { ticket: look.ticket, answer });
            }
        }
        self.next_follower_look(fx);
    }

    pub(super) fn on_followers_pg(&mut self, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        for (ticket, id) in std::mem::take(&mut self.followers.preparing) {
            fx.push(Effect::AnswerPeer { ticket, answer: Box::new(prepared(id, &result)) });
        }
    }

    /// A standby that was the primary once: a node that streamed from it has left its slot here when it went.
    pub(super) fn slots_may_be_left(&mut self, now: Now) -> bool {
        let due = self.setup.followers().next().is_some() && now.boot >= self.followers.sweep_at;
        if due {
            self.followers.sweep_at = now.boot + SWEEP_EVERY;
        }
        due
    }

    /// What it said of itself lately.
    fn follower_state(&self, now: Now, name: &NodeName) -> Option<&FollowerState> {
        let limit = (self.setup.poll * 5 / 2).max(super::proofs::PEER_LIMIT);
        self.followers.heard.get(name).filter(|(at, _)| now.boot.since(*at) < limit).map(|(_, state)| state)
    }

    /// Its walsender here, while this is the primary; none when two carry its name.
    pub(super) fn follower_row(&self, name: &NodeName) -> Option<&StandbyRow> {
        let report = self.pg.report.as_ref().filter(|r| self.pg.up && !r.in_recovery)?;
        let mut rows = report.standbys.iter().filter(|row| row.application_name == name.as_str());
        let row = rows.next()?;
        rows.next().is_none().then_some(row)
    }

    /// For `nodes`: up, in recovery, position, streaming.
    pub(super) fn follower_seen(&self, now: Now, name: &NodeName) -> (bool, Option<bool>, Option<Lsn>, bool) {
        let row = self.follower_row(name);
        let said = self.follower_state(now, name).and_then(|state| state.pg.as_ref());
        let streams = match (row, said) {
            (Some(row), _) => row.state == "streaming",
            // Its own word counts where its walsender cannot be seen: on the standby.
            (None, Some(pg)) => pg.streaming && !self.gate.open,
            (None, None) => false,
        };
        let lsn = said.map(|pg| pg.replay_lsn.unwrap_or(pg.lsn)).or(row.and_then(|row| row.flush_lsn));
        (row.is_some() || said.is_some(), Some(true), lsn, streams)
    }

    /// `rejoin NODE` of a node without a vote.
    pub(super) fn wish_rejoin(
        &mut self,
        now: Now,
        ticket: Ticket,
        node: &NodeName,
        dry_run: bool,
        fx: &mut Vec<Effect>,
    ) {
        fx.push(Effect::Say { ticket, text: format!("{node} is asked to do it") });
        let wish = crate::engine::turn::Wish { id: self.procedure_id(now), dry_run };
        let until = now.boot + WISH_LIMIT;
        if self.follower_state(now, node).is_none() {
            let text = format!("waiting for {node}'s daemon (up to {} s)", WISH_LIMIT.as_secs());
            fx.push(Effect::Say { ticket, text });
        }
        let (node, told) = (node.clone(), Heard::default());
        self.followers.wishes.push(Wish { ticket, node, wish, until, taken: None, heard: now.boot, told });
    }

    /// What `from` says of its procedure, for those who wait here.
    fn watch_wishes(&mut self, now: Now, from: &NodeName, brief: Option<&ProcedureBrief>, fx: &mut Vec<Effect>) {
        self.followers.wishes.retain_mut(|w| {
            let Some(brief) = brief.filter(|_| w.node == *from) else { return true };
            // The one wished for, or one that was under way there already.
            if w.taken.is_none() && (brief.id == w.wish.id || brief.ended.is_none()) {
                w.taken = Some(brief.id);
            }
            if w.taken != Some(brief.id) {
                return true;
            }
            w.heard = now.boot;
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
    }

    /// Wishes that nobody fetches, and procedures that are not heard of any more.
    pub(super) fn advance_followers(&mut self, now: Now, fx: &mut Vec<Effect>) {
        self.followers.wishes.retain(|w| {
            let (exit, text) = match w.taken {
                None if now.boot >= w.until => (1, format!("the daemon of {} does not answer; start it there", w.node)),
                Some(_) if now.boot.since(w.heard) > WATCH_LIMIT => {
                    let node = &w.node;
                    (
                        4,
                        format!(
                            "{node} says nothing of it any more; look there with `portcullis status`, then run it again"
                        ),
                    )
                }
                _ => return true,
            };
            fx.push(Effect::End { ticket: w.ticket, exit, text, flag: None });
            false
        });
    }
}

/// The facts for a rejoin, or why there are none.
fn prepared(id: u64, result: &Result<PgOutput, String>) -> PeerAnswer {
    match result {
        Ok(PgOutput::Source(source)) => PeerAnswer::Prepared { id, source: source.clone() },
        Ok(_) => PeerAnswer::Refused { why: "the active node does not know its own size".to_owned() },
        Err(why) => PeerAnswer::Refused { why: why.clone() },
    }
}
