//! Executes effects. Each hand works by itself and answers with an event; none of them can hold up the turn.
//!
//! **Invariant:** `Cut` and `Extend` are executed inline by the driver and are not here. A hand that is slow delays
//! only its own answer: the journal has a thread, each VIP a task with its effects in order, everything else a task per
//! effect.

use crate::app::daemon::Parts;
use crate::app::meter::Meter;
use crate::app::wall::WallHand;
use crate::base::ids::{NodeName, OpId};
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::report::SourceFacts;
use crate::engine::turn::{Effect, Event, PeerAnswer, PeerQuestion, PgOutput, PgTask, Ticket};
use crate::io::dns::Authority;
use crate::io::journal::Journal;
use crate::io::neighbour;
use crate::io::outside;
use crate::io::postgres::{Cluster, Peer, PgError, PgLost, StopMode, Tick, slot_name};
use crate::io::vip::{PROBE_TIME, VipHand};
use crate::serve::gate::Gate;
use crate::serve::http::ControlReply;
use crate::serve::peer::PeerClient;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// Effects that wait for one VIP. More cannot wait: the guard asks for a renewal every 400 ms. Full: that one is
/// dropped.
const VIP_WAITING: usize = 64;
/// Questions to VIP witnesses under way; one per VIP and poll is usual.
const NEIGHBOURS_ASKED: usize = 16;
/// A settings change, a checkpoint, a promotion.
const PG_LIMIT: Duration = Duration::from_secs(60);
/// A checkpoint of all that is dirty, before a switchover holds anybody.
const PG_CHECKPOINT_LIMIT: Duration = Duration::from_secs(590);
/// A PostgreSQL that gives no session within this hangs.
const PG_SESSION_LIMIT: Duration = Duration::from_secs(4);
/// Until a started PostgreSQL takes connections (recovery may be long).
const PG_START_LIMIT: Duration = Duration::from_secs(300);
/// A fast stop of a fenced primary; then immediate (R5: bounded).
const PG_FENCE_STOP: Duration = Duration::from_secs(5);
/// A fast stop of a switchover: its last WAL has to reach the standby. Clients wait for it, and for a start where it
/// was in vain: both have to fit into `pool.query_wait`.
const PG_STOP_LIMIT: Duration = Duration::from_secs(15);
/// How often the drain looks whether it is done.
const DRAIN_LOOK: Duration = Duration::from_millis(2);
/// How long sessions that are not in a transaction have to come to rest.
const DRAIN_IDLE: Duration = Duration::from_secs(1);
/// What is left for sessions to end after their queries were cancelled.
const DRAIN_AFTER_CANCEL: Duration = Duration::from_secs(2);

/// How long the end of a command waits for the sockets of a gate that has just opened.
const SOCKET_LOOK: Duration = Duration::from_millis(5);
const SOCKET_LOOKS: u32 = 100;

/// Between a cut and the end of the VIP: nothing leaves from an address that is gone, the sessions' last words neither.
pub const LAST_WORDS: Duration = Duration::from_millis(30);

/// Held by what is under way and must not be torn by the end of the process.
type UnderWay = Arc<()>;

enum VipTask {
    Bind(u32),
    Unbind,
    Probe,
    Announce { burst: bool },
}

/// All hands.
pub struct Hands {
    events: mpsc::Sender<Event>,
    gate: Arc<Gate>,
    authorities: Vec<Arc<Authority>>,
    ttl: u32,
    peer: Option<Arc<PeerClient>>,
    journal: std::sync::mpsc::Sender<(u64, Vec<Entry>, UnderWay)>,
    cluster: Arc<Cluster>,
    peer_cluster: Option<Peer>,
    nodes: Arc<[Peer]>,
    voters: HashMap<NodeName, Arc<PeerClient>>,
    vips: HashMap<IpAddr, mpsc::Sender<(VipTask, UnderWay)>>,
    vip_nets: Vec<ipnet::IpNet>,
    vip_interface: Option<String>,
    vip_witnesses: Arc<[IpAddr]>,
    neighbours: Arc<Semaphore>,
    wall: Option<WallHand>,
    pg_task: Option<tokio::task::JoinHandle<()>>,
    commands: HashMap<Ticket, mpsc::Sender<ControlReply>>,
    questions: HashMap<Ticket, oneshot::Sender<PeerAnswer>>,
    /// The newest wish and its number.
    units: watch::Sender<(u64, bool)>,
    /// The number of the last wish that came to its end.
    units_done: Arc<AtomicU64>,
    stonith: Arc<Vec<String>>,
    under_way: UnderWay,
}

impl Hands {
    /// Starts the journal's thread and a task per VIP.
    pub fn new(parts: &Parts, journal: Journal, events: mpsc::Sender<Event>) -> Hands {
        let (entries, waiting) = std::sync::mpsc::channel();
        spawn_journal(journal, waiting, events.clone());
        let mut vips = HashMap::new();
        for net in &parts.vips {
            let (tasks, queue) = mpsc::channel(VIP_WAITING);
            tokio::spawn(vip_task(*net, parts.vip_interface.clone(), queue, events.clone()));
            vips.insert(net.addr(), tasks);
        }
        let (units, wanted) = watch::channel((0, false));
        let units_done = Arc::new(AtomicU64::new(0));
        tokio::spawn(units_task(parts.units.clone(), wanted, events.clone(), Arc::clone(&units_done)));
        Hands {
            units,
            units_done,
            under_way: UnderWay::default(),
            stonith: Arc::new(parts.stonith.clone()),
            events,
            gate: Arc::clone(&parts.gate),
            authorities: parts.authorities.clone(),
            ttl: parts.ttl,
            peer: parts.peer.clone(),
            journal: entries,
            cluster: Arc::clone(&parts.cluster),
            peer_cluster: parts.peer_cluster.clone(),
            nodes: parts.nodes.clone().into(),
            voters: parts.voters.clone(),
            vips,
            vip_nets: parts.vips.clone(),
            vip_interface: parts.vip_interface.clone(),
            vip_witnesses: parts.vip_witnesses.clone().into(),
            neighbours: Arc::new(Semaphore::new(NEIGHBOURS_ASKED)),
            wall: parts.wall.clone(),
            pg_task: None,
            commands: HashMap::new(),
            questions: HashMap::new(),
        }
    }

    /// Nothing is under way that the end of the process would tear: no entry of the journal, no VIP, no unit.
    pub fn is_idle(&self) -> bool {
        Arc::strong_count(&self.under_way) == 1 && self.units.borrow().0 == self.units_done.load(Ordering::SeqCst)
    }

    /// Remembers whom to tell about a command.
    pub fn expect_command(&mut self, ticket: Ticket, reply: mpsc::Sender<ControlReply>) {
        self.commands.insert(ticket, reply);
    }

    /// Remembers whom to answer about a question of the peer.
    pub fn expect_question(&mut self, ticket: Ticket, reply: oneshot::Sender<PeerAnswer>) {
        self.questions.retain(|_, waiting| !waiting.is_closed());
        self.questions.insert(ticket, reply);
    }

    /// Executes one effect that may take time. Inline effects are the driver's.
    pub fn execute(&mut self, effect: Effect) {
        match effect {
            Effect::Record { seq, entries } => {
                let _driver_gone = self.journal.send((seq, entries, Arc::clone(&self.under_way)));
            }
            Effect::AskWitness { question, server, limit } => self.ask_witness(question, server, limit),
            Effect::Update { op, prerequisite, addresses, marker, limit } => {
                let Some(authority) = self.authorities.first().cloned() else { return };
                let ttl = self.ttl;
                self.spawn(async move {
                    let outcome = authority.update(&prerequisite, &addresses, ttl, &marker, limit).await;
                    Event::UpdateAnswered { op, outcome }
                });
            }
            Effect::AskPeer { question, ask, limit } => self.ask_peer(self.peer.clone(), question, *ask, limit),
            Effect::AskNode { question, node, ask, limit } => {
                self.ask_peer(self.voters.get(&node).cloned(), question, *ask, limit);
            }
            Effect::FollowFrom { node } => {
                self.peer_cluster = self.nodes.iter().find(|other| other.name == node).cloned();
            }
            Effect::AnswerPeer { ticket, answer } => {
                if let Some(reply) = self.questions.remove(&ticket) {
                    let _asker_gone = reply.send(*answer);
                }
            }
            Effect::Pg { op, task } => self.pg(op, task),
            Effect::BindVip { address, seconds } => self.vip(address, VipTask::Bind(seconds)),
            Effect::UnbindVip { address } => self.vip(address, VipTask::Unbind),
            Effect::ProbeVip { address } => self.vip(address, VipTask::Probe),
            Effect::AnnounceVip { address, burst } => self.vip(address, VipTask::Announce { burst }),
            Effect::AskNeighbour { question, address, limit } => self.ask_neighbour(question, address, limit),
            Effect::KernelGate { until } => {
                if let Some(wall) = &self.wall {
                    wall.set(until);
                }
            }
            Effect::Units { start } => {
                self.units.send_modify(|(number, wanted)| (*number, *wanted) = (*number + 1, start));
            }
            Effect::Stonith { op, node } => {
                let words = Arc::clone(&self.stonith);
                self.spawn(async move { Event::StonithDone { op, result: outside::stonith(&words, &node).await } });
            }
            Effect::Drain { op, limit } => self.drain(op, limit),
            Effect::Say { ticket, text } => {
                if let Some(reply) = self.commands.get(&ticket) {
                    let _client_gone = reply.try_send(ControlReply::Line { text, data: None });
                }
            }
            Effect::Count { ticket, text, left } => {
                if let Some(reply) = self.commands.get(&ticket) {
                    let data = Some(serde_json::json!({ "left_ms": crate::base::time::millis(left) }));
                    let _client_gone = reply.try_send(ControlReply::Line { text, data });
                }
            }
            Effect::Progress { ticket, text, progress } => {
                if let Some(reply) = self.commands.get(&ticket) {
                    let data = serde_json::to_value(progress).ok();
                    let _client_gone = reply.try_send(ControlReply::Line { text, data });
                }
            }
            Effect::End { ticket, exit, text, flag } => {
                if let Some(reply) = self.commands.remove(&ticket) {
                    let data = flag.map(|flag| serde_json::json!({ flag: true }));
                    let gate = Arc::clone(&self.gate);
                    tokio::spawn(async move {
                        // Who is told that the gate is open connects next.
                        for _ in 0..SOCKET_LOOKS {
                            if !gate.passes() || gate.is_listening() {
                                break;
                            }
                            tokio::time::sleep(SOCKET_LOOK).await;
                        }
                        let _client_gone = reply.send(ControlReply::End { exit, text, data }).await;
                    });
                }
            }
            Effect::Extend { .. }
            | Effect::Cut { .. }
            | Effect::Suspend { .. }
            | Effect::CarryOver { .. }
            | Effect::Forward { .. }
            | Effect::HoldClients
            | Effect::HoldToCarry
            | Effect::LetClientsGo
            | Effect::Note { .. } => {}
        }
    }

    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let event = work.await;
            let _driver_gone = events.send(event).await;
        });
    }

    fn ask_witness(&self, question: u64, server: usize, limit: Duration) {
        let Some(authority) = self.authorities.get(server).cloned() else { return };
        self.spawn(async move { Event::WitnessAnswered { question, answer: authority.ask(limit).await } });
    }

    fn ask_peer(&self, peer: Option<Arc<PeerClient>>, question: u64, ask: PeerQuestion, limit: Duration) {
        let Some(peer) = peer else { return };
        self.spawn(async move {
            let answer: Result<PeerAnswer, _> = peer.ask(&ask, limit).await;
            Event::PeerAnswered { question, answer: answer.map(Box::new).map_err(|error| error.to_string()) }
        });
    }

    fn vip(&self, address: IpAddr, task: VipTask) {
        if let Some(tasks) = self.vips.get(&address)
            && tasks.try_send((task, Arc::clone(&self.under_way))).is_err()
        {
            tracing::warn!("the hand of VIP {address} is stuck; its kernel lifetime takes it away");
        }
    }

    /// Beside the VIP's own task, which may be busy binding.
    fn ask_neighbour(&self, question: u64, address: IpAddr, limit: Duration) {
        let Some(net) = self.vip_nets.iter().find(|net| net.addr() == address).copied() else { return };
        let (interface, witnesses) = (self.vip_interface.clone(), Arc::clone(&self.vip_witnesses));
        let Ok(permit) = Arc::clone(&self.neighbours).try_acquire_owned() else {
            let answer = Err("too many questions to the VIP's witnesses are under way".to_owned());
            self.spawn(async move { Event::NeighbourAnswered { question, answer } });
            return;
        };
        self.spawn(async move {
            let ask = async {
                let hand = VipHand::new(&net, interface.as_deref()).await?;
                neighbour::ask(&hand, &witnesses, limit).await
            };
            let answer = tokio::time::timeout(limit, ask).await;
            drop(permit);
            let late = || Err(format!("the witnesses of the VIP {address} could not be asked within {limit:?}"));
            Event::NeighbourAnswered { question, answer: answer.unwrap_or_else(|_| late()) }
        });
    }

    fn drain(&self, op: OpId, limit: Duration) {
        let gate = Arc::clone(&self.gate);
        let hold = gate.hold();
        self.spawn(async move {
            let cancelled = drain(&gate, hold, limit).await;
            Event::Drained { op, cancelled, busy: gate.busy() }
        });
    }

    /// One task at a time: one that is still under way was given up by the guard, and is over before the next begins.
    fn pg(&mut self, op: OpId, task: PgTask) {
        let (cluster, peer, nodes) = (Arc::clone(&self.cluster), self.peer_cluster.clone(), Arc::clone(&self.nodes));
        let events = self.events.clone();
        let given_up = self.pg_task.take();
        let work = async move {
            if let Some(given_up) = given_up {
                given_up.abort();
                let _how_it_ended = given_up.await;
            }
            let name = task.clone();
            let result = run_pg(&cluster, peer.as_ref(), &nodes, op, task, &events).await;
            if let Err(error) = &result {
                tracing::warn!("PostgreSQL task {name:?} failed: {error}");
            }
            let done = Event::PgDone { op, result: result.map_err(|error| error.to_string()) };
            let _driver_gone = events.send(done).await;
        };
        self.pg_task = Some(tokio::spawn(work));
    }
}

/// Waits until the sessions of this hold came to rest, and cancels what did not in time: how many. A hold that is over,
/// or that another has followed, has nobody to wait for and nothing to cancel: its switchover was given up, and clients
/// run.
async fn drain(gate: &Gate, hold: u64, limit: Duration) -> u64 {
    if at_rest_within(gate, hold, limit).await {
        return 0;
    }
    let cancelled = gate.busy();
    gate.cancel_busy();
    at_rest_within(gate, hold, DRAIN_AFTER_CANCEL).await;
    cancelled
}

/// Whether every session came to rest, or the hold is over; one that is only looked into, or may send what belongs to
/// its last message, is not waited for as long as one in a transaction.
async fn at_rest_within(gate: &Gate, hold: u64, limit: Duration) -> bool {
    let begun = crate::io::clock::now();
    loop {
        let passed = crate::io::clock::now().since(begun);
        if !gate.is_paused() || gate.hold() != hold {
            return true;
        }
        if gate.unsettled() == 0 || (passed >= DRAIN_IDLE.min(limit) && gate.busy() == 0) {
            return true;
        }
        if passed >= limit {
            return false;
        }
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}

async fn run_pg(
    cluster: &Cluster,
    peer: Option<&Peer>,
    nodes: &[Peer],
    op: OpId,
    task: PgTask,
    events: &mpsc::Sender<Event>,
) -> Result<PgOutput, PgError> {
    let no_peer = || PgError::Refused("there is no other node configured".to_owned());
    match task {
        PgTask::SetSyncList(name) => cluster.set_sync_list(name.as_ref(), PG_LIMIT).await.map(|()| PgOutput::Done),
        PgTask::RearmBarrier => cluster.rearm_barrier(PG_LIMIT).await.map(PgOutput::Lsn),
        PgTask::Stop | PgTask::StopNow => {
            let limit = if task == PgTask::Stop { PG_STOP_LIMIT } else { PG_FENCE_STOP };
            cluster.stop(StopMode::Fast, limit).await?;
            match cluster.control_data().await {
                Ok(data) => Ok(PgOutput::Control(data)),
                // Nothing there to be stopped (a first rejoin).
                Err(_) => Ok(PgOutput::Done),
            }
        }
        PgTask::Checkpoint => match cluster.reach(PG_SESSION_LIMIT).await {
            // Minutes are for the checkpoint, not for one who does not answer.
            Err(PgLost::Silent(why)) => Ok(PgOutput::Hangs(why)),
            Err(lost) => Err(lost.into()),
            Ok(()) => cluster.checkpoint(PG_CHECKPOINT_LIMIT).await.map(|()| PgOutput::Done),
        },
        PgTask::Start => cluster.start(PG_START_LIMIT).await.map(|()| PgOutput::Done),
        PgTask::Demote { follow_peer } => {
            let follow = if follow_peer { Some(peer.ok_or_else(no_peer)?) } else { None };
            cluster.demote(follow, PG_FENCE_STOP, PG_START_LIMIT).await.map(|_| PgOutput::Done)
        }
        PgTask::Promote { above } => cluster.promote_above(above, PG_LIMIT).await.map(|()| PgOutput::Done),
        PgTask::PlanRejoin(source) => {
            cluster.rehearse_rejoin(peer.ok_or_else(no_peer)?, &source).await.map(PgOutput::Plan)
        }
        PgTask::Rejoin(source) => rejoin(cluster, peer.ok_or_else(no_peer)?, op, &source, events).await,
        PgTask::LookAsSource(tail) => cluster.look_as_source(tail.as_ref(), PG_LIMIT).await.map(PgOutput::Source),
        PgTask::PrepareStandby => {
            cluster.ensure_replication_role(PG_LIMIT).await?;
            if let Some(peer) = peer.filter(|_| cluster.replication.slots) {
                cluster.ensure_slot(&slot_name(&peer.name), PG_LIMIT).await?;
                // The pair waits for no further standby: one whose slot finds no room says so, and streams without.
                for other in nodes.iter().filter(|other| other.name != peer.name) {
                    if let Err(error) = cluster.ensure_slot(&slot_name(&other.name), PG_LIMIT).await {
                        tracing::warn!("no slot for {}: {error}; raise max_replication_slots", other.name);
                    }
                }
            }
            cluster.source_facts(PG_LIMIT).await.map(PgOutput::Source)
        }
        PgTask::SwitchPoint { from, to } => cluster.switch_point(from, to).map(PgOutput::Lsn),
        PgTask::DropIdleSlots => cluster.drop_idle_slots(PG_LIMIT).await.map(|()| PgOutput::Done),
        PgTask::Nudge => cluster.nudge(PG_LIMIT).await.map(|()| PgOutput::Done),
        PgTask::Adopt => cluster.follow(Some(peer.ok_or_else(no_peer)?), PG_LIMIT).await.map(|()| PgOutput::Done),
    }
}

async fn rejoin(
    cluster: &Cluster,
    peer: &Peer,
    op: OpId,
    source: &SourceFacts,
    events: &mpsc::Sender<Event>,
) -> Result<PgOutput, PgError> {
    let mut meter = Meter::new(crate::io::clock::now());
    let mut tell = |tick| {
        if let Some((text, progress)) = meter.tick(crate::io::clock::now(), tick) {
            let _queue_full = events.try_send(Event::PgProgress { op, text, progress });
        }
    };
    let done = cluster.rejoin(peer, source, &mut tell).await?;
    if let Some(words) = done.set_aside() {
        tell(Tick::Words(words));
    }
    tell(Tick::Words("starting PostgreSQL as a standby".to_owned()));
    cluster.start(PG_START_LIMIT).await?;
    Ok(PgOutput::Done)
}

fn spawn_journal(
    mut journal: Journal,
    waiting: std::sync::mpsc::Receiver<(u64, Vec<Entry>, UnderWay)>,
    events: mpsc::Sender<Event>,
) {
    let work = move || {
        while let Ok((seq, entries, _under_way)) = waiting.recv() {
            let event = match journal.append(&entries) {
                Ok(()) => Event::Recorded { seq },
                Err(why) => Event::RecordFailed { seq, why },
            };
            if events.blocking_send(event).is_err() {
                return;
            }
        }
    };
    // A thread of its own: a slow disk holds up nothing but what waits for it.
    if let Err(error) = std::thread::Builder::new().name("journal".to_owned()).spawn(work) {
        tracing::error!("the journal's thread cannot be started: {error}");
    }
}

/// `service.units`: the newest wish counts, and one that is under way is given up for it.
async fn units_task(
    units: Vec<String>,
    mut wanted: watch::Receiver<(u64, bool)>,
    events: mpsc::Sender<Event>,
    done: Arc<AtomicU64>,
) {
    let mut next = None;
    loop {
        if next.is_none() && wanted.changed().await.is_err() {
            return;
        }
        next = None;
        let (number, start) = *wanted.borrow_and_update();
        tokio::select! {
            result = outside::units(&units, start) => {
                done.store(number, Ordering::SeqCst);
                if events.send(Event::UnitsDone { start, result }).await.is_err() {
                    return;
                }
            }
            changed = wanted.changed() => match changed {
                Ok(()) => next = Some(()),
                Err(_) => return,
            },
        }
    }
}

async fn vip_task(
    net: ipnet::IpNet,
    interface: Option<String>,
    mut queue: mpsc::Receiver<(VipTask, UnderWay)>,
    events: mpsc::Sender<Event>,
) {
    let address = net.addr();
    let mut hand: Option<VipHand> = None;
    while let Some((task, _under_way)) = queue.recv().await {
        if hand.is_none() {
            hand = match VipHand::new(&net, interface.as_deref()).await {
                Ok(made) => Some(made),
                Err(why) => {
                    if !matches!(task, VipTask::Unbind) {
                        let _driver_gone = events.send(Event::VipBindFailed { address, why }).await;
                    }
                    continue;
                }
            };
        }
        let Some(made) = &hand else { continue };
        let event = match task {
            VipTask::Bind(seconds) => match made.bind(seconds).await {
                Ok(()) => Some(Event::VipBound { address }),
                Err(why) => Some(Event::VipBindFailed { address, why }),
            },
            VipTask::Unbind => {
                tokio::time::sleep(LAST_WORDS).await;
                if let Err(why) = made.unbind().await {
                    tracing::warn!("{why}; its kernel lifetime takes it away");
                }
                None
            }
            VipTask::Probe => match made.probe(PROBE_TIME).await {
                Ok(claim) => Some(Event::VipProbed { address, claimed_by: claim.map(mac_text) }),
                Err(why) => Some(Event::VipBindFailed { address, why }),
            },
            VipTask::Announce { burst } => {
                if let Err(why) = if burst { made.announce_burst().await } else { made.announce().await } {
                    tracing::warn!("{why}");
                }
                None
            }
        };
        if let Some(event) = event
            && events.send(event).await.is_err()
        {
            return;
        }
    }
}

/// A MAC address as people write it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::time::Instant;
    use crate::serve::slot::{Slot, Who};

    const LIMIT: Duration = Duration::from_millis(200);

    fn busy_slot() -> Slot {
        let peer = std::net::SocketAddr::from(([192, 0, 2, 7], 4000));
        let who = Who { user: "a".into(), database: "b".into(), peer, tls: false };
        let slot = Slot::new(1, 2, who, Instant::ZERO, Arc::default());
        slot.busy.store(true, Ordering::SeqCst);
        slot
    }

    /// Put back, and a later attempt: what runs now is not the drain's to cancel.
    #[tokio::test]
    async fn a_drain_ends_with_its_hold_and_cancels_nothing_afterwards() {
        for again in [false, true] {
            let gate = Gate::new(crate::io::clock::now);
            let entry = gate.enter(busy_slot()).expect("nobody else");
            gate.pause_to_carry();
            let hold = gate.hold();
            let draining = drain(&gate, hold, LIMIT);
            let put_back = async {
                tokio::time::sleep(LIMIT / 4).await;
                gate.resume();
                if again {
                    gate.pause_to_carry();
                }
            };
            let (cancelled, ()) = tokio::join!(draining, put_back);
            assert_eq!(cancelled, 0);
            assert!(gate.all_slots().iter().all(|slot| !slot.is_asked_to_cancel()), "it runs on");
            drop(entry);
        }
    }

    #[tokio::test]
    async fn a_drain_cancels_what_does_not_end_in_time() {
        let gate = Gate::new(crate::io::clock::now);
        let _entry = gate.enter(busy_slot()).expect("nobody else");
        gate.pause_to_carry();
        let cancelled = drain(&gate, gate.hold(), LIMIT).await;
        assert_eq!(cancelled, 1);
        assert!(gate.all_slots().iter().all(|slot| slot.is_asked_to_cancel()));
    }
}
