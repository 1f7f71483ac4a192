//! One step of a procedure goes wrong, or is done twice: what a [`Meddler`] does to the effects of both guards. A step
//! is an effect that leaves the guard and is answered; they are counted as they come, so nobody lists them by hand.
//!
//! What it is NOT: what has to come of it (`procedures`).

use crate::base::ids::OpId;
use crate::base::time::{Duration, Instant};
use crate::engine::guard::tests::world::{Act, Delivery, MS, World, secs};
use crate::engine::turn::{Effect, Event, PeerQuestion};
use crate::wire::dns::{RecordPair, UpdateOutcome};

/// What is done to one step, or to all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::guard::tests) enum Fault {
    /// It is done twice, and answered twice.
    Twice,
    /// A copy comes when everybody has gone on.
    CopyLater,
    /// kill -9 of the daemon before the record is on disk; it is started again at once.
    KilledBefore,
    /// ... when it is, and the daemon does not know.
    KilledUntold,
    /// ... when it knows, and what it did then is on its way.
    KilledAfter,
    /// The machine fails with the record on disk, and is there again seconds later.
    Crashed,
    /// The record cannot be written.
    RecordFails,
    /// ... nor any that follows.
    DiskFull,
    /// PostgreSQL's task fails before it began.
    TaskUnbegun,
    /// ... when it was done.
    TaskBrokeOff,
    /// ... and takes long.
    TaskSlow,
    /// The update is lost; the answer is; it lands much later.
    UpdateLost,
    UpdateUnanswered,
    UpdateLate,
    UpdateNotSent,
    UpdateRefused,
    /// The question is lost, or its answer.
    QuestionLost,
    AnswerLost,
    /// No question of either node reaches the other from here on, while their PostgreSQLs stream.
    ChannelDead,
    /// Nothing at all does.
    WireDead,
    WitnessSilent,
    /// From here on.
    WitnessDead,
    BindFails,
}

/// A kind of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::guard::tests) enum Kind {
    Record,
    Task,
    Update,
    Question,
    /// A question of every poll.
    Pulse,
    Answer,
    PulseAnswered,
    Witness,
    Drain,
    Vip,
}

impl Kind {
    fn of(effect: &Effect) -> Option<Kind> {
        match effect {
            Effect::Record { .. } => Some(Kind::Record),
            Effect::Pg { .. } => Some(Kind::Task),
            Effect::Update { .. } => Some(Kind::Update),
            Effect::AskPeer { ask, .. } if matches!(**ask, PeerQuestion::Pulse { .. }) => Some(Kind::Pulse),
            Effect::AskPeer { .. } | Effect::AskNode { .. } => Some(Kind::Question),
            Effect::AnswerPeer { answer, .. } if matches!(**answer, crate::engine::turn::PeerAnswer::Pulse { .. }) => {
                Some(Kind::PulseAnswered)
            }
            Effect::AnswerPeer { .. } => Some(Kind::Answer),
            Effect::AskWitness { .. } => Some(Kind::Witness),
            Effect::Drain { .. } | Effect::Stonith { .. } | Effect::AskNeighbour { .. } => Some(Kind::Drain),
            Effect::BindVip { .. } | Effect::ProbeVip { .. } => Some(Kind::Vip),
            Effect::Extend { .. }
            | Effect::Cut { .. }
            | Effect::Suspend { .. }
            | Effect::HoldClients
            | Effect::LetClientsGo
            | Effect::UnbindVip { .. }
            | Effect::AnnounceVip { .. }
            | Effect::KernelGate { .. }
            | Effect::Units { .. }
            | Effect::Say { .. }
            | Effect::Count { .. }
            | Effect::Progress { .. }
            | Effect::FollowFrom { .. }
            | Effect::CarryOver { .. }
            | Effect::Forward { .. }
            | Effect::HoldToCarry
            | Effect::End { .. }
            | Effect::Note { .. } => None,
        }
    }

    /// What can happen to it alone. Copies of a whole run are another matter.
    pub(in crate::engine::guard::tests) fn faults(self) -> &'static [Fault] {
        use Fault::*;
        match self {
            Kind::Record => &[KilledBefore, KilledUntold, KilledAfter, Crashed, RecordFails, DiskFull],
            Kind::Task => &[TaskUnbegun, TaskBrokeOff, TaskSlow],
            Kind::Update => {
                &[CopyLater, UpdateLost, UpdateUnanswered, UpdateLate, UpdateNotSent, UpdateRefused, WitnessDead]
            }
            Kind::Question => &[CopyLater, QuestionLost, ChannelDead, WireDead],
            Kind::Answer => &[AnswerLost, CopyLater],
            Kind::Pulse => &[ChannelDead],
            Kind::Witness => &[WitnessSilent, WitnessDead],
            Kind::Vip => &[BindFails],
            Kind::PulseAnswered | Kind::Drain => &[],
        }
    }
}

/// Counts the steps, and meddles with the one it was told to.
#[derive(Debug, Clone, Default)]
pub(in crate::engine::guard::tests) struct Meddler {
    /// Whose and of which kind, in order.
    pub(super) steps: Vec<(usize, Kind)>,
    /// Which step (none: every one), and what is done to it.
    pub(super) fault: Option<(Option<usize>, Fault)>,
    /// What of it is still to be done when a delivery comes: of this node, this record or this task.
    write: Option<(usize, u64)>,
    task: Option<(usize, OpId)>,
    channel_dead: bool,
}

/// A late copy comes after so long.
const LATER: Duration = secs(4);
/// So long a slow task takes.
const SLOW: Duration = secs(25);

impl Meddler {
    pub(super) fn with(fault: Option<(Option<usize>, Fault)>) -> Meddler {
        Meddler { fault, ..Meddler::default() }
    }
}

impl World {
    fn meddler(&mut self) -> Option<&mut Meddler> {
        self.meddler.as_deref_mut()
    }

    /// True: it was dealt with here.
    pub(in crate::engine::guard::tests) fn meddles_with(&mut self, node: usize, effect: &Effect) -> bool {
        let (Some(kind), Some(meddler)) = (Kind::of(effect), self.meddler()) else { return false };
        let number = meddler.steps.len();
        meddler.steps.push((node, kind));
        if meddler.channel_dead && matches!(kind, Kind::Pulse | Kind::Question) {
            return self.unanswered(node, effect);
        }
        let Some((which, fault)) = meddler.fault else { return false };
        if which.is_some_and(|which| which != number) {
            return false;
        }
        self.note(|_| format!("step {number} of {kind:?} on node {node}: {fault:?}"));
        self.meddle(node, effect, fault)
    }

    /// Does it with the meddler looking away.
    fn in_peace(&mut self, node: usize, effects: Vec<Effect>) {
        let meddler = self.meddler.take();
        self.effects(node, effects);
        self.meddler = meddler;
    }

    fn meddle(&mut self, node: usize, effect: &Effect, fault: Fault) -> bool {
        let life = self.nodes[node].life;
        match (fault, effect) {
            (Fault::Twice, _) => {
                // Whoever answers takes the ticket with the first answer: the second is a second delivery of it.
                if let Effect::AnswerPeer { ticket, .. } = effect
                    && let Some(asked) = self.nodes[node].asked.get(ticket).copied()
                {
                    self.in_peace(node, vec![effect.clone()]);
                    self.nodes[node].asked.insert(*ticket, asked);
                    self.in_peace(node, vec![effect.clone()]);
                    return true;
                }
                self.in_peace(node, vec![effect.clone(), effect.clone()]);
                true
            }
            (Fault::CopyLater, Effect::Update { prerequisite, addresses, marker, .. }) => {
                let next = RecordPair::written(addresses, 5, marker);
                self.post(LATER, Delivery::Landing { prerequisite: prerequisite.clone(), next });
                false
            }
            (Fault::CopyLater, Effect::AskPeer { question, ask, .. }) => {
                let (question, ask) = (*question, ask.clone());
                self.post(LATER, Delivery::Ask { from: node, life, question, ask, copy: true });
                false
            }
            (Fault::CopyLater, Effect::AnswerPeer { ticket, answer }) => {
                if let Some((from, life, question)) = self.nodes[node].asked.get(ticket).copied() {
                    let event = Event::PeerAnswered { question, answer: Ok(answer.clone()) };
                    self.post(LATER, Delivery::To(from, life, event));
                }
                false
            }
            (Fault::KilledBefore, _) => {
                self.post(Duration::ZERO, Delivery::Act(Act::Kill(node)));
                self.post(MS * 100, Delivery::Revive(node));
                false
            }
            (
                Fault::KilledUntold | Fault::KilledAfter | Fault::Crashed | Fault::RecordFails,
                Effect::Record { seq, .. },
            ) => {
                let seq = *seq;
                if let Some(meddler) = self.meddler() {
                    meddler.write = Some((node, seq));
                }
                false
            }
            (Fault::DiskFull, _) => {
                self.nodes[node].journal_broken = true;
                false
            }
            (Fault::TaskUnbegun, Effect::Pg { op, .. }) => {
                let result = Err("it was not even begun".to_owned());
                self.post(MS * 20, Delivery::To(node, life, Event::PgDone { op: *op, result }));
                true
            }
            (Fault::TaskBrokeOff, Effect::Pg { op, .. }) => {
                let op = *op;
                if let Some(meddler) = self.meddler() {
                    meddler.task = Some((node, op));
                }
                false
            }
            (Fault::TaskSlow, Effect::Pg { op, task }) => {
                self.post(SLOW, Delivery::Pg { node, life, op: *op, task: task.clone() });
                true
            }
            (Fault::QuestionLost, _) => self.unanswered(node, effect),
            (Fault::ChannelDead, _) => {
                if let Some(meddler) = self.meddler() {
                    meddler.channel_dead = true;
                }
                self.unanswered(node, effect)
            }
            (Fault::WireDead, _) => {
                self.wire_up = false;
                false
            }
            (Fault::AnswerLost, Effect::AnswerPeer { ticket, .. }) => {
                self.nodes[node].asked.remove(ticket);
                true
            }
            (Fault::WitnessSilent, Effect::AskWitness { question, limit, .. }) => {
                let answer = Err("no answer".to_owned());
                let event = Event::WitnessAnswered { question: *question, answer };
                self.post(*limit, Delivery::To(node, life, event));
                true
            }
            (Fault::WitnessDead, _) => {
                self.dns_up = false;
                false
            }
            (Fault::BindFails, Effect::BindVip { address, .. }) => {
                let (address, why) = (*address, "no such device".to_owned());
                self.post(MS, Delivery::To(node, life, Event::VipBindFailed { address, why }));
                true
            }
            (fault, Effect::Update { op, prerequisite, addresses, marker, limit }) => {
                let landing = |after: Duration| {
                    let next = RecordPair::written(addresses, 5, marker);
                    (after, Delivery::Landing { prerequisite: prerequisite.clone(), next })
                };
                let unknown = (*limit, UpdateOutcome::Unknown("no answer".to_owned()));
                let (landing, (after, outcome)) = match fault {
                    Fault::UpdateLost => (None, unknown),
                    Fault::UpdateUnanswered => (Some(landing(MS * 2)), unknown),
                    Fault::UpdateLate => (Some(landing(LATER * 2)), unknown),
                    Fault::UpdateNotSent => (None, (MS, UpdateOutcome::NotSent("connection refused".to_owned()))),
                    Fault::UpdateRefused => (None, (MS, UpdateOutcome::Refused("NOTAUTH".to_owned()))),
                    _ => return false,
                };
                if let Some((after, landing)) = landing {
                    self.post(after, landing);
                }
                self.post(after, Delivery::To(node, life, Event::UpdateAnswered { op: *op, outcome }));
                true
            }
            _ => false,
        }
    }

    fn unanswered(&mut self, node: usize, effect: &Effect) -> bool {
        let Effect::AskPeer { question, limit, .. } = effect else { return false };
        let life = self.nodes[node].life;
        let event = Event::PeerAnswered { question: *question, answer: Err("no answer".to_owned()) };
        self.post(*limit, Delivery::To(node, life, event));
        true
    }

    /// `None`: it was dealt with here.
    pub(in crate::engine::guard::tests) fn meddles_with_delivery(&mut self, delivery: Delivery) -> Option<Delivery> {
        let Some(meddler) = self.meddler() else { return Some(delivery) };
        let fault = meddler.fault.map(|(_, fault)| fault);
        match delivery {
            Delivery::Pg { node, op, task, .. } if meddler.task == Some((node, op)) => {
                meddler.task = None;
                let _done = self.run_pg(node, task);
                self.give(node, Event::PgDone { op, result: Err("it broke off".to_owned()) });
                None
            }
            Delivery::Write { node, life, seq, entries } if meddler.write == Some((node, seq)) => {
                meddler.write = None;
                if self.nodes[node].life != life || self.nodes[node].guard.is_none() {
                    return None;
                }
                if fault == Some(Fault::RecordFails) {
                    self.give(node, Event::RecordFailed { seq, why: "No space left on device".to_owned() });
                    return None;
                }
                self.write_down(node, &entries);
                self.nodes[node].disk.extend(entries);
                match fault {
                    Some(Fault::KilledAfter) => {
                        self.give(node, Event::Recorded { seq });
                        self.act(Act::Kill(node));
                        self.post(MS * 100, Delivery::Revive(node));
                    }
                    Some(Fault::Crashed) => {
                        self.act(Act::Crash(node));
                        self.post(secs(5), Delivery::Revive(node));
                    }
                    _ => {
                        self.act(Act::Kill(node));
                        self.post(MS * 100, Delivery::Revive(node));
                    }
                }
                None
            }
            other => Some(other),
        }
    }

    /// Every fault ends, and what `dead` names stays so.
    pub(super) fn mend(&mut self, dead: Option<usize>) {
        self.meddler = None;
        (self.dns_up, self.wire_up) = (true, true);
        for node in (0..2).filter(|node| dead != Some(*node)) {
            self.nodes[node].journal_broken = false;
            self.revive(node);
        }
    }

    pub(super) fn serves(&self, node: usize) -> bool {
        self.is_open(node) && self.nodes[node].gate_until > Instant::ZERO
    }
}
