//! Promote, switchover and unfence: the taking side (R2, design.md section 5).
//!
//! ```text
//!  Asking -> Preparing -> CheckingWitness -> Nearing -> Stopping -> CatchingUp -+ (switchover: the peer serves)
//!     |                                                              v
//!     +--------------------------------------------------------> Refusing -> Consenting (peer alive) -> Recording
//!  -> Winning -> WaitingOut (no consent) -> Naming -> Promoting -> GoingAlone -> Completing -> Opening -> done
//! ```
//!
//! **Invariant:** the order is refuse (durable), consent, compare-and-swap and read-back, wait; nothing is promoted
//! before R2's three points hold, and *complete* is durable before the gate may open.
//!
//! Over 600 lines: the steps and what moves from one to the next are read side by side.

mod decision;
mod planned;
mod promotion;

use super::proofs::{AskedFor, PEER_LIMIT, PeerAskedFor, SILENT_LIMIT};
use super::{Guard, Then};
use crate::base::ids::{Epoch, Lsn, NodeName, OpId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::evidence::Seen;
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Now, PeerAnswer, PeerQuestion, ProcedureBrief, Ticket};
use crate::wire::dns::RecordPair;
use crate::wire::marker::Marker;

/// The peer's part of a switchover: checkpoints of many GB while clients run, then hold them and drain.
const PREPARE_LIMIT: Duration = Duration::from_secs(1230);
/// How often it is told what the peer is at, while it stays the same.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Until both answers to the first questions are in.
const ASKING_LIMIT: Duration = PEER_LIMIT.saturating_add(Duration::from_millis(300));
const PUT_BACK_LIMIT: Duration = Duration::from_secs(25);
/// The peer's part: fast stop, then immediate.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Until the standby has replayed what the old primary had written when its clients were held: else it is not stopped.
const NEARING_LIMIT: Duration = Duration::from_secs(5);
/// Until the standby has replayed the shutdown checkpoint. Clients wait meanwhile, and for the start of the old primary
/// where it was in vain.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(10);
const CONSENT_LIMIT: Duration = Duration::from_secs(60);
/// How long a demotion that is under way is waited for before the first decision.
const DEMOTION_LIMIT: Duration = Duration::from_secs(30);
/// Until the gate is open once everything is done.
const OPEN_LIMIT: Duration = Duration::from_secs(15);

/// Which command this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Promote,
    /// Only without loss, never a failover.
    Switchover,
    Unfence,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Promote => "promote",
            Kind::Switchover => "switchover",
            Kind::Unfence => "unfence",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Hash)]
pub(super) enum Step {
    Asking {
        peer: Option<u64>,
        witness: Option<u64>,
        alive: bool,
    },
    Preparing {
        question: u64,
    },
    CheckingWitness {
        question: u64,
    },
    Nearing {
        lsn: Lsn,
    },
    Stopping {
        question: u64,
    },
    CatchingUp {
        checkpoint: Lsn,
        timeline: TimelineId,
    },
    Refusing,
    Consenting {
        question: u64,
    },
    /// VIP only: `fence.stonith` is switching the silent peer off.
    SwitchingOff {
        op: OpId,
    },
    Recording,
    Watching {
        all_since: Option<Instant>,
    },
    Winning,
    WaitingOut {
        until: Instant,
        said: u64,
    },
    Naming,
    Promoting,
    GoingAlone,
    Completing,
    Opening,
    Lowering {
        exit: u8,
    },
}

impl Step {
    fn word(&self) -> &'static str {
        match self {
            Step::Asking { .. } => "asking the peer and the witness",
            Step::Preparing { .. } => "preparing the old node",
            Step::CheckingWitness { .. } => "making sure the witness answers",
            Step::Nearing { .. } => "replaying what the old primary has written",
            Step::Stopping { .. } => "stopping the old primary",
            Step::CatchingUp { .. } => "replaying the last WAL",
            Step::Refusing => "refusing pledges",
            Step::Consenting { .. } => "asking for consent",
            Step::SwitchingOff { .. } => "switching the other node off",
            Step::Recording => "changing the record",
            Step::Watching { .. } => "waiting until every authority shows the change",
            Step::Winning => "writing down the epoch",
            Step::WaitingOut { .. } => "waiting out the old node's lease",
            Step::Naming => "setting the list of synchronous standbys",
            Step::Promoting => "promoting PostgreSQL",
            Step::GoingAlone => "recording that this node is alone",
            Step::Completing => "completing the epoch",
            Step::Opening => "opening the gate",
            Step::Lowering { .. } => "abandoning",
        }
    }
}

/// A takeover under way.
#[derive(Debug, Clone, Hash)]
pub(super) struct Takeover {
    pub(super) id: u64,
    kind: Kind,
    pub(super) dry_run: bool,
    yes: bool,
    pub(super) accept_data_loss: bool,
    pub(super) peer_is_off: bool,
    tickets: Vec<Ticket>,
    started: Instant,
    /// Until when the peer may show that it is alive.
    peer_until: Instant,
    since: String,
    pub(super) step: Step,
    pub(super) deadline: Option<Instant>,
    record: Option<(RecordPair, Seen)>,
    pub(super) epoch: Epoch,
    refused_before: Epoch,
    pub(super) refused_at: Instant,
    /// The peer was asked to hold its clients; it must be told if we give up.
    prepared: bool,
    /// What the peer was said to be at, and since and until when that was told.
    told: Option<(String, Instant, Instant)>,
    /// Where the old primary's WAL stood when its clients were held.
    nearing: Option<Lsn>,
    planned: bool,
    pub(super) consent_asked: bool,
    /// The peer consented, or the third point of R2 is void (the marker names this node's own complete epoch).
    pub(super) consented: bool,
    void: bool,
    /// The peer is surely off: `fence.stonith` said so, or (VIP only) the operator, after this node had refused.
    pub(super) off: bool,
    /// `fence.stonith` runs beside the wait.
    pub(super) stonith: Option<OpId>,
    /// The old primary was stopped and all of its WAL replayed here: whatever `sync=` says, nothing is missing.
    pub(super) handed_over: bool,
    loss: bool,
    marker: Option<Marker>,
    failure: String,
    flag: Option<&'static str>,
    /// Why the old primary cannot hand over although its daemon is there: its PostgreSQL does not answer.
    hung: Option<String>,
}

impl Takeover {
    pub(super) fn brief(&self) -> ProcedureBrief {
        let kind = self.kind.word().to_owned();
        ProcedureBrief {
            kind,
            id: self.id,
            step: self.step.word().to_owned(),
            ended: None,
            progress: None,
            lines: Vec::new(),
        }
    }

    pub(super) fn since(&self) -> &str {
        &self.since
    }

    pub(super) fn join(&mut self, ticket: Ticket) {
        self.tickets.push(ticket);
    }

    pub(super) fn is_switchover(&self) -> bool {
        self.kind == Kind::Switchover
    }

    /// Nothing of it can have landed, at the witness or on the peer's PostgreSQL.
    pub(super) fn may_yield(&self) -> bool {
        !self.prepared && matches!(self.step, Step::Asking { .. } | Step::Refusing | Step::Consenting { .. })
    }
}

impl Guard {
    /// Begins, or says at once why not.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn begin_takeover(
        &mut self,
        now: Now,
        ticket: Ticket,
        kind: Kind,
        dry_run: bool,
        yes: bool,
        accept_data_loss: bool,
        peer_is_off: Option<NodeName>,
        fx: &mut Vec<Effect>,
    ) {
        let id = self.procedure_id(now);
        self.pg.demoted_to_start = false;
        let peer_until = now.boot + if self.peer_is_silent(now) { SILENT_LIMIT } else { ASKING_LIMIT };
        let alive_unknown = Step::Asking { peer: None, witness: None, alive: false };
        self.takeover = Some(Takeover {
            id,
            kind,
            dry_run,
            yes,
            accept_data_loss,
            peer_is_off: peer_is_off.is_some(),
            tickets: vec![ticket],
            started: now.boot,
            peer_until,
            since: now.rfc3339(),
            step: alive_unknown,
            deadline: Some(peer_until),
            record: None,
            epoch: Epoch::NONE,
            refused_before: self.durable.refused,
            refused_at: now.boot,
            prepared: false,
            told: None,
            nearing: None,
            planned: false,
            consent_asked: false,
            consented: false,
            void: false,
            off: false,
            stonith: None,
            handed_over: false,
            loss: false,
            marker: None,
            failure: String::new(),
            flag: None,
            hung: None,
        });
        if let Some(name) = peer_is_off {
            if name != self.setup.peer {
                let text = format!("--peer-is-off {name}: the peer of this node is {}; name that one", self.setup.peer);
                self.end_takeover(now, 3, &text, fx);
                return;
            }
            if self.setup.mode != Mode::VipOnly {
                self.say(now, "--peer-is-off does not shorten the wait: W counts from the record", fx);
            }
        }
        let peer = self.ask_peer_pulse(now, PeerAskedFor::Takeover, false, fx);
        let alone = self.setup.mode == Mode::VipOnly;
        let witness = (!alone).then(|| self.ask_witness(now, 0, AskedFor::Takeover, fx));
        if let Some(t) = &mut self.takeover {
            t.step = Step::Asking { peer: Some(peer), witness, alive: false };
            // Without a witness the record is the peer's word.
            t.record = alone.then(|| (RecordPair::default(), Seen::Unmarked { address_of: None }));
        }
        let whom = if alone { "" } else { " and the witness" };
        let text = format!("asking {}{whom} (at most 2 s)", self.setup.peer);
        self.say(now, &text, fx);
    }

    /// A line with its time for everybody who waits.
    pub(super) fn say(&mut self, _now: Now, text: &str, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        for ticket in &t.tickets {
            fx.push(Effect::Say { ticket: *ticket, text: text.to_owned() });
        }
    }

    /// What is left of W, for everybody who waits.
    fn count(&mut self, left: Duration, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let text = format!("{} may still hold a lease: {} s left", self.setup.peer, left.as_secs() + 1);
        for ticket in &t.tickets {
            fx.push(Effect::Count { ticket: *ticket, text: text.clone(), left });
        }
    }

    pub(super) fn step(&mut self, now: Now, step: Step, limit: Option<Duration>, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        t.step = step;
        t.deadline = limit.map(|limit| now.boot + limit);
        if !t.dry_run {
            let entry =
                Entry::Step { id: t.id, kind: t.kind.word().to_owned(), step: t.step.word().to_owned(), ended: None };
            self.record(fx, vec![entry], Then::Nothing);
        }
    }

    pub(super) fn is_attempt(&self, attempt: u64) -> bool {
        self.takeover.as_ref().is_some_and(|t| t.id == attempt)
    }

    /// Goes on in `on_takeover_recorded` when they are durable.
    pub(super) fn record_attempt(&mut self, entries: Vec<Entry>, fx: &mut Vec<Effect>) {
        let Some(attempt) = self.takeover.as_ref().map(|t| t.id) else { return };
        self.record(fx, entries, Then::Takeover { attempt });
    }

    pub(super) fn end_takeover(&mut self, now: Now, exit: u8, text: &str, fx: &mut Vec<Effect>) {
        let Some(t) = self.takeover.take() else { return };
        for ticket in &t.tickets {
            fx.push(Effect::End { ticket: *ticket, exit, text: text.to_owned(), flag: t.flag });
        }
        let brief = ProcedureBrief { ended: Some((exit, text.to_owned())), ..t.brief() };
        if !t.dry_run {
            let entry = Entry::Step {
                id: t.id,
                kind: brief.kind.clone(),
                step: brief.step.clone(),
                ended: brief.ended.clone(),
            };
            self.record(fx, vec![entry], Then::Nothing);
            self.counters.procedure_ended(&brief.kind, exit, now.boot.since(t.started));
            self.note(now, fx, "procedure_ended", format!("{} ended ({exit}): {text}", brief.kind));
        }
        self.last_ended = Some(brief);
    }

    /// Gives up, puts back what can be put back, and says with which exit code and why.
    pub(super) fn fail_takeover(&mut self, now: Now, exit: u8, why: &str, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        if matches!(t.step, Step::Lowering { .. }) {
            // It could not be written that the attempt is over: *refused* stays.
            let text = format!("{}; {why}", t.failure);
            self.end_takeover(now, 4, &text, fx);
            return;
        }
        // From here on the record is ours, whatever could not be written.
        let exit = if exit == 1 && matches!(t.step, Step::Winning | Step::Completing) { 4 } else { exit };
        t.failure = why.to_owned();
        let put_back = t.prepared && !t.consent_asked;
        let attempt = t.id;
        t.prepared = false;
        if put_back {
            self.ask_peer(now, PeerAskedFor::Pulse, PeerQuestion::PutBack { attempt }, PUT_BACK_LIMIT, fx);
            self.say(now, "putting everything back on the old node", fx);
        }
        let Some(t) = &self.takeover else { return };
        let lower = self.durable.refused > t.refused_before && exit != 4 && self.durable.won < t.epoch;
        if lower {
            let epoch = t.refused_before;
            let exit = if t.consent_asked { 4 } else { exit };
            self.step(now, Step::Lowering { exit }, None, fx);
            self.record_attempt(vec![Entry::RefusedLowered { epoch }], fx);
            return;
        }
        self.end_takeover(now, exit, why, fx);
    }

    /// An answer of the witness to a question of ours.
    pub(super) fn on_takeover_reading(
        &mut self,
        now: Now,
        question: u64,
        reading: Result<(RecordPair, Seen), String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(t) = &mut self.takeover else { return };
        match (&mut t.step, reading) {
            (Step::Asking { witness, .. }, reading) if *witness == Some(question) => {
                *witness = None;
                match reading {
                    Ok(record) => t.record = Some(record),
                    Err(why) => t.failure = why,
                }
                self.when_asked(now, fx);
            }
            (Step::CheckingWitness { question: q }, Ok(record)) if *q == question => {
                if !t.record.as_ref().is_some_and(|(pair, _)| pair.same_data(&record.0)) {
                    self.fail_takeover(
                        now,
                        1,
                        "the record changed meanwhile; nothing was changed, run it again to judge it anew",
                        fx,
                    );
                    return;
                }
                self.say(now, "the witness answers", fx);
                self.near_old_primary(now, fx);
            }
            (Step::CheckingWitness { question: q }, Err(why)) if *q == question => {
                let text = format!("the witness does not answer ({why}); nothing was changed, bring it back first");
                self.fail_takeover(now, 3, &text, fx);
            }
            _ => {}
        }
    }

    /// An answer of the peer to a question of ours.
    pub(super) fn on_takeover_peer(
        &mut self,
        now: Now,
        question: u64,
        answer: Result<Box<PeerAnswer>, String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(t) = &mut self.takeover else { return };
        let answer = answer.map(|a| *a);
        match (&mut t.step, answer) {
            (Step::Asking { peer, alive, .. }, answer) if *peer == Some(question) => {
                *peer = None;
                *alive = answer.is_ok();
                self.when_asked(now, fx);
            }
            (Step::Preparing { question: q }, Ok(PeerAnswer::Ready { cancelled, busy, lsn, .. })) if *q == question => {
                t.nearing = lsn;
                self.on_ready(now, cancelled, busy, fx);
            }
            (Step::Preparing { question: q }, Ok(PeerAnswer::Hangs { why })) if *q == question => {
                self.on_hung_primary(now, why, fx);
            }
            (Step::Stopping { question: q }, Ok(PeerAnswer::Stopped { checkpoint, timeline, .. }))
                if *q == question =>
            {
                let text = format!("the old primary is down; its last checkpoint is {checkpoint}");
                self.say(now, &text, fx);
                self.step(now, Step::CatchingUp { checkpoint, timeline }, Some(CATCH_UP_LIMIT), fx);
            }
            (Step::Consenting { question: q }, Ok(PeerAnswer::Consented { epoch, .. })) if *q == question => {
                if epoch == t.epoch {
                    t.consented = true;
                    let text = format!("{} consented: it is fenced at epoch {epoch}", self.setup.peer);
                    self.say(now, &text, fx);
                    self.begin_recording(now, fx);
                } else {
                    let why = "the peer consented to another epoch; see `portcullis status` there, then run it again";
                    self.fail_takeover(now, 1, why, fx);
                }
            }
            (
                Step::Preparing { question: q } | Step::Stopping { question: q } | Step::Consenting { question: q },
                answer,
            ) if *q == question => {
                if matches!(answer, Ok(PeerAnswer::Refused { .. })) {
                    // Surely no consent was given to this attempt.
                    t.consent_asked = false;
                }
                let why = match answer {
                    Ok(PeerAnswer::Refused { why } | PeerAnswer::Hangs { why }) => {
                        format!("{} refused: {why}", self.setup.peer)
                    }
                    // Nobody serves now: not "nothing was changed".
                    Ok(PeerAnswer::FencedUnwritten { why, .. }) => format!(
                        "{} shut its gate but could not write its consent down ({why}); put that right and run \
                         promote again to finish",
                        self.setup.peer
                    ),
                    Ok(_) => format!("{} gave an answer to another question", self.setup.peer),
                    Err(why) => format!("{} fell silent ({why}); `promote` run again will fail over", self.setup.peer),
                };
                self.fail_takeover(now, 1, &why, fx);
            }
            _ => {}
        }
    }

    pub(super) fn on_takeover_recorded(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &mut self.takeover else { return };
        match t.step.clone() {
            Step::Refusing => {
                t.refused_at = now.boot;
                if t.planned {
                    t.consent_asked = true;
                    let (attempt, epoch, handed_over) = (t.id, t.epoch, t.handed_over);
                    let ask = PeerQuestion::Consent { attempt, epoch, handed_over };
                    let question = self.ask_peer(now, PeerAskedFor::Takeover, ask, CONSENT_LIMIT, fx);
                    self.say(now, "no more pledges from here; asking for consent", fx);
                    self.step(now, Step::Consenting { question }, Some(CONSENT_LIMIT), fx);
                } else {
                    self.say(now, "no more pledges from here", fx);
                    self.begin_recording(now, fx);
                }
            }
            Step::Winning => {
                let until = self.wait_until();
                let released = self.takeover.as_ref().is_some_and(|t| t.consented || t.off);
                if released {
                    self.begin_naming(now, fx);
                } else {
                    if self.setup.stonith {
                        let op = self.stonith(fx);
                        if let Some(t) = &mut self.takeover {
                            t.stonith = Some(op);
                        }
                    }
                    let left = until.since(now.boot).as_secs_f64();
                    let sure = if self.setup.stonith { ", or until fence.stonith says that it is off" } else { "" };
                    let text = format!("the record is ours; waiting out the old node's lease, {left:.1} s{sure}");
                    self.say(now, &text, fx);
                    self.step(now, Step::WaitingOut { until, said: u64::MAX }, None, fx);
                    if let Some(t) = &mut self.takeover {
                        t.deadline = Some(now.boot + Duration::from_secs(1));
                    }
                }
            }
            Step::Completing => {
                self.forget_obedience();
                // The first proof of the new epoch is asked for now, not with the next poll.
                self.poll_at = now.boot;
                let text = format!("epoch {} is complete; opening the gate", self.durable.complete);
                self.say(now, &text, fx);
                let mut limit = OPEN_LIMIT;
                if self.setup.mode == Mode::Observe {
                    self.witness.confirmed = true;
                    limit += self.wait();
                }
                if self.setup.mode == Mode::VipOnly {
                    // R3: a promote under all of R2 opens; from here on a pledge or the VIP's witness prolongs.
                    self.proofs.granted(now.boot);
                }
                self.step(now, Step::Opening, Some(limit), fx);
            }
            Step::Lowering { exit } => {
                let why = t.failure.clone();
                self.end_takeover(now, exit, &why, fx);
            }
            _ => {}
        }
    }

    /// Time has passed, or something came in: is the step over?
    pub(super) fn advance_takeover(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(t) = &self.takeover else { return };
        let late = t.deadline.is_some_and(|d| now.boot >= d);
        match t.step.clone() {
            Step::Asking { .. } if late => self.when_asked(now, fx),
            Step::Preparing { .. } if !late => self.tell_preparing(now, fx),
            Step::Nearing { lsn } if self.has_replayed(lsn) => self.stop_old_primary(now, fx),
            Step::Nearing { .. } if late => {
                let text = format!(
                    "the standby does not keep up: {} s after clients were held it had not replayed what the old \
                     primary had written; look at its load and at `status`",
                    NEARING_LIMIT.as_secs()
                );
                self.fail_takeover(now, 1, &text, fx);
            }
            Step::CatchingUp { checkpoint, timeline } => {
                let report = self.pg.report.as_ref().filter(|_| self.pg.up);
                let there = report
                    .is_some_and(|r| r.timeline == timeline && r.replay_lsn.is_some_and(|replay| replay > checkpoint));
                if there {
                    self.say(now, "the standby has replayed everything", fx);
                    if let Some(t) = &mut self.takeover {
                        t.handed_over = true;
                    }
                    self.begin_refusing(now, true, fx);
                } else if late {
                    let why = "the standby did not replay the old primary's last checkpoint in time; see \
                               PostgreSQL's log here";
                    self.fail_takeover(now, 1, why, fx);
                }
            }
            Step::WaitingOut { until, said } => {
                if now.boot >= until {
                    self.begin_naming(now, fx);
                } else if late {
                    let left = until.since(now.boot).as_secs() + 1;
                    if left != said {
                        self.count(until.since(now.boot), fx);
                    }
                    let next = (now.boot + Duration::from_secs(1)).min(until);
                    if let Some(t) = &mut self.takeover {
                        t.step = Step::WaitingOut { until, said: left };
                        t.deadline = Some(next);
                    }
                }
            }
            Step::SwitchingOff { .. } if late => {
                self.fail_takeover(now, 3, "refused: fence.stonith did not end in time; nothing was changed", fx);
            }
            Step::Recording if late && self.job.is_none() => self.begin_recording(now, fx),
            Step::GoingAlone if late => self.after_promotion(now, fx),
            Step::Watching { all_since } => self.watch_authorities(now, all_since, fx),
            // R3: the promote itself is what opens; a probe of the VIP or R6's wait may take longer than one lease.
            Step::Opening
                if !self.gate.open && !late && self.setup.mode == Mode::VipOnly && self.overtaken().is_none() =>
            {
                self.proofs.granted(now.boot);
            }
            Step::Opening if self.gate.open => {
                let text = format!(
                    "{} is active at epoch {}; total {:.2} s",
                    self.setup.me,
                    self.durable.complete,
                    now.boot.since(self.takeover.as_ref().map_or(now.boot, |t| t.started)).as_secs_f64()
                );
                let handed_over = self.takeover.as_ref().is_some_and(|t| t.handed_over);
                self.end_takeover(now, 0, &text, fx);
                if handed_over {
                    // Clients wait at the old node until it hears this.
                    let pledge = self.wants_pledge();
                    self.ask_peer_pulse(now, PeerAskedFor::Pulse, pledge, fx);
                }
            }
            Step::Opening if late => {
                let reason = self.gate.reason.clone();
                let text = format!("the epoch is complete but the gate is not open yet: {reason}");
                self.end_takeover(now, 4, &text, fx);
            }
            Step::Preparing { .. } | Step::Stopping { .. } | Step::Consenting { .. } | Step::CheckingWitness { .. }
                if late =>
            {
                self.fail_takeover(now, 1, "no answer in time; `promote` run again will decide anew", fx);
            }
            _ => {}
        }
    }
}
