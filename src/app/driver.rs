//! The turn: one event, one reading of the clocks, the guard, then its effects in order. It decides nothing.
//!
//! ```text
//!  event -> now -> guard.handle(now, event, &mut effects) -> Cut / Extend inline, the rest to the hands
//!        -> publish the snapshot -> wait until min(next event, next deadline, 200 ms)
//! ```

use crate::app::audit::{self, Audit};
use crate::app::hands::Hands;
use crate::app::lines::Lines;
use crate::app::log;
use crate::app::notices::{self, Notice, Notices};
use crate::app::render::clean;
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant};
use crate::engine::lag::LagMeter;
use crate::engine::machine::Machine;
use crate::engine::outlook::Ledger;
use crate::engine::status::{EventRow, Snapshot};
use crate::engine::turn::{Command, Effect, Event, Now, PeerAnswer, PeerQuestion, Ticket};
use crate::io::clock;
use crate::serve::command::Commands;
use crate::serve::gate::Gate;
use crate::serve::http::{ControlReply, ControlRequest};
use crate::serve::peer::PeerCounters;
use serde_json::Value;
use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot, watch};

/// Events that may wait for the turn. Full: senses wait, and the gate's own deadline goes on running out.
pub const EVENTS_WAITING: usize = 1024;
/// The snapshot is published at least this often, so that ages and the lease shown are true.
const PUBLISH_EVERY: Duration = Duration::from_millis(200);
/// Two snapshots are at least so far apart, and a turn is shown at the latest after twice this.
const PUBLISH_APART: Duration = Duration::from_millis(20);
/// Bytes after which the event log becomes `events.log.1` (replacing the one before) and a new one is begun.
const EVENT_LOG_MAX: u64 = 4 * 1024 * 1024;
/// How long sessions have to finish their transactions when the daemon is asked to stop. Short: after a restart the
/// next daemon serves nobody before this is over, and clients that come meanwhile wait.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take then to unbind and to tell the others.
const SHUTDOWN_LIMIT: Duration = Duration::from_millis(600);
/// How often the end of both is looked for.
const END_LOOK: Duration = Duration::from_millis(5);
/// What clients read whose session ends between two transactions; PostgreSQL's own words, so that drivers know them.
const STOPPING: &str =
    "portcullis: terminating connection due to administrator command (the daemon of this node is shutting down)";

/// Requests that need an answer on their own way back.
pub enum Request {
    /// With who asks, in words.
    Control(ControlRequest, String, mpsc::Sender<ControlReply>),
    /// What was done beside the guard, for the event log.
    Audited(String),
    Peer(NodeName, Box<PeerQuestion>, oneshot::Sender<PeerAnswer>),
    /// Of a node without a vote.
    Follower(NodeName, Box<PeerQuestion>, oneshot::Sender<PeerAnswer>),
}

/// Hands a question of the peer channel to the turn and waits for its answer.
pub async fn ask_guard(
    requests: &mpsc::Sender<Request>,
    from: NodeName,
    question: PeerQuestion,
    votes: bool,
    peer: &NodeName,
) -> PeerAnswer {
    // A node without a vote is answered apart, so that nothing it says can pass for the peer's word.
    let only_follows = matches!(question, PeerQuestion::Follow { .. } | PeerQuestion::PrepareFollower { .. });
    let refused = |why: &str| PeerAnswer::Refused { why: why.to_owned() };
    if !votes || (from == *peer) == only_follows {
        return refused("only the other voter is listened to, and nodes without a vote when they only follow");
    }
    let (reply, answer) = oneshot::channel();
    let question = Box::new(question);
    let request = match only_follows {
        true => Request::Follower(from, question, reply),
        false => Request::Peer(from, question, reply),
    };
    if requests.send(request).await.is_err() {
        return refused("the daemon is shutting down");
    }
    answer.await.unwrap_or_else(|_| refused("the daemon dropped the question"))
}

/// How far the end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    No,
    /// Sessions leave at their transaction boundaries; the guard knows of nothing, so that all its rules hold.
    Draining(Instant),
    /// The guard has cut.
    Shut(Instant),
}

/// The crank.
pub struct Driver {
    pub guard: Machine,
    pub hands: Hands,
    pub gate: Arc<Gate>,
    pub events: mpsc::Receiver<Event>,
    pub requests: mpsc::Receiver<Request>,
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    /// Nanoseconds since boot of the last turn.
    pub beat: Arc<AtomicU64>,
    pub event_log: Lines,
    pub notices: Notices,
    /// `service.name`, for notices.
    pub service: String,
    /// Effects of the guard's own start.
    pub first: Vec<Effect>,
    pub next_ticket: Ticket,
    pub peer_counters: Arc<PeerCounters>,
    pub watchdog: bool,
    pub pools: Commands,
    /// Since when each node is in its state, as far as this daemon saw.
    pub changes: Changes,
    pub audit: Audit,
    /// To be told with the next event.
    pub said: Vec<String>,
    pub lag: LagMeter,
    /// What earlier snapshots tell of lag and loss.
    pub ledger: Ledger,
}

/// For `last_status_change`: what each node's status and role were last, and since when.
#[derive(Debug, Default)]
pub struct Changes(HashMap<NodeName, ((String, String, bool), String)>);

impl Changes {
    /// Notes what is new in this snapshot, and fills in since when.
    fn fill(&mut self, snapshot: &mut Snapshot, at: impl Fn() -> String) {
        for row in &mut snapshot.nodes {
            let state = (row.status.clone(), row.role.clone(), row.attached);
            let known = self.0.entry(row.name.clone()).or_insert_with(|| (state.clone(), at()));
            if known.0 != state {
                *known = (state, at());
            }
            row.last_status_change = Some(known.1.clone());
        }
    }
}

/// The event log at `path`, written by a thread of its own: neither its disk nor a want of threads holds up a turn.
///
/// # Errors
/// The system gives no thread.
pub fn open_event_log(path: PathBuf) -> std::io::Result<Lines> {
    Lines::start("events", move |line| {
        if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > EVENT_LOG_MAX) {
            let _kept_longer = std::fs::rename(&path, path.with_extension("log.1"));
        }
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
        if let Ok(mut file) = file {
            let _disk_full = file.write_all(line);
        }
    })
}

/// Both clocks, once per turn.
pub fn read_clocks() -> Now {
    Now { boot: clock::now(), wall: clock::wall() }
}

impl Driver {
    /// Turns until `stop` completes; then lets sessions finish their transactions, cuts, unbinds and returns.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let first = std::mem::take(&mut self.first);
        self.execute(first);
        let mut effects = Vec::new();
        let mut published = Instant::ZERO;
        let mut unpublished = false;
        let mut ending = Ending::No;
        let mut status_at = Instant::ZERO;
        tokio::pin!(stop);
        loop {
            let soon = if unpublished { PUBLISH_APART } else { PUBLISH_EVERY };
            let soon = if ending == Ending::No { soon } else { END_LOOK };
            let wait = self.guard.next_deadline().since(clock::now()).min(soon);
            let event = tokio::select! {
                biased;
                Some(event) = self.events.recv() => event,
                Some(request) = self.requests.recv() => self.accept(request),
                () = &mut stop, if ending == Ending::No => {
                    ending = Ending::Draining(clock::now());
                    self.begin_drain();
                    Event::DeadlinePassed
                }
                () = tokio::time::sleep(wait) => Event::DeadlinePassed,
            };
            let now = read_clocks();
            self.beat.store(now.boot.as_nanos(), Ordering::Relaxed);
            if let Event::PgObserved { asked, report } = &event {
                self.lag.observe(*asked, report);
            }
            for text in std::mem::take(&mut self.said) {
                self.guard.handle(now, Event::Audited { text }, &mut effects);
            }
            self.guard.handle(now, event, &mut effects);
            self.audit_ends(now, &mut effects);
            // Who was told that a command ended asks for the status next: it must show what the command did.
            let all = std::mem::take(&mut effects).into_iter();
            let (ends, others): (Vec<_>, Vec<_>) = all.partition(|effect| matches!(effect, Effect::End { .. }));
            self.execute(others);
            if !ends.is_empty() {
                self.publish(now);
                self.execute(ends);
            }
            unpublished = now.boot.since(published) < PUBLISH_APART && ending == Ending::No;
            if !unpublished {
                published = now.boot;
                self.publish(now);
                // The sockets of a gate that has just opened follow in a moment.
                unpublished = self.gate.passes() && !self.gate.is_listening();
            }
            if now.boot.since(status_at) >= Duration::from_secs(1) {
                status_at = now.boot;
                self.tell_systemd();
            }
            match self.next_ending(ending, now) {
                Some(next) if next != ending => {
                    ending = next;
                    self.guard.handle(now, Event::ShutdownAsked, &mut effects);
                    let last = std::mem::take(&mut effects);
                    self.execute(last);
                }
                Some(_) => {}
                None => return,
            }
        }
    }

    /// Commands that end with these effects are events.
    fn audit_ends(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let mut told = Vec::new();
        for effect in effects.iter() {
            match effect {
                Effect::End { ticket, exit, text, .. } => told.extend(self.audit.ended(*ticket, *exit, text)),
                Effect::AnswerPeer { ticket, answer } => told.extend(self.audit.answered(*ticket, answer)),
                _ => {}
            }
        }
        for text in told {
            self.guard.handle(now, Event::Audited { text }, effects);
        }
    }

    fn begin_drain(&self) {
        let (sessions, busy) = (self.gate.sessions(), self.gate.busy());
        tracing::info!("asked to stop: {sessions} sessions, {busy} of them amid a transaction");
        self.gate.stop(STOPPING);
        let _not_under_systemd = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    }

    /// How far the end is now; `None`: the process may go.
    fn next_ending(&self, ending: Ending, now: Now) -> Option<Ending> {
        let (since, limit) = match ending {
            Ending::No => return Some(ending),
            Ending::Draining(since) => (since, DRAIN_LIMIT),
            Ending::Shut(since) => (since, SHUTDOWN_LIMIT),
        };
        let over = now.boot.since(since) >= limit;
        match ending {
            Ending::Shut(_) if over || self.gate.is_deserted() && self.hands.is_idle() => None,
            Ending::Draining(_) if over || self.gate.is_deserted() => Some(Ending::Shut(now.boot)),
            _ => Some(ending),
        }
    }

    fn publish(&mut self, now: Now) {
        let mut effects = Vec::new();
        let counts = Event::Sessions {
            sessions: self.gate.sessions(),
            total: self.gate.sessions_total(),
            auth_failures: self.gate.auth_failures(),
        };
        self.guard.handle(now, counts, &mut effects);
        self.execute(effects);
        let mut snapshot = self.guard.snapshot(now);
        if snapshot.gate.open && !self.gate.is_listening() {
            snapshot.gate.open = false;
            snapshot.gate.reason = Some(match self.gate.is_stopping() {
                true => "the daemon is shutting down".to_owned(),
                false => "the sockets for clients are being opened (see the log if it stays so)".to_owned(),
            });
        }
        snapshot.paused_databases = self.pools.paused();
        self.changes.fill(&mut snapshot, || now.rfc3339());
        snapshot.gate.forwarded = self.pools.forwarded();
        snapshot.gate.waiting = self.pools.figures().iter().map(|pool| u64::from(pool.waiting)).sum();
        let refused = self.peer_counters.each();
        snapshot.counters.peer_refused_connections =
            refused.iter().filter(|(label, _)| *label != "accepted").map(|(_, count)| count).sum();
        let notices = self.notices.counts();
        snapshot.counters.notices_sent = notices.sent;
        snapshot.counters.notices_failed = notices.failed;
        snapshot.counters.notices_dropped = notices.dropped;
        for row in &mut snapshot.nodes {
            let behind = self.lag.behind(row.name.as_str(), now.boot).filter(|_| row.role == "standby");
            row.replication_delay_seconds = behind.map(|behind| behind.as_secs_f64());
        }
        log::at_epoch(snapshot.epoch);
        self.ledger.complete(now.boot, &mut snapshot);
        self.snapshots.send_replace(Arc::new(snapshot));
    }

    fn tell_systemd(&self) {
        // A line of its own to systemd.
        let status = clean(&self.snapshots.borrow().headline());
        let mut words = vec![sd_notify::NotifyState::Status(&status)];
        if self.watchdog {
            words.push(sd_notify::NotifyState::Watchdog);
        }
        let _not_under_systemd = sd_notify::notify(&words);
    }

    /// Inline effects first and in order, the rest to the hands.
    fn execute(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Cut { reason } => self.gate.cut(&reason),
                Effect::Suspend { until, reason } => self.gate.suspend(until, &reason),
                Effect::Extend { until } => {
                    self.gate.at_epoch(self.guard.complete());
                    self.gate.extend(until);
                }
                Effect::Forward { serves, returns } => self.pools.peer_serves(serves, returns),
                Effect::CarryOver { epoch, reason } => self.gate.carry_over(epoch, &reason),
                Effect::HoldClients => self.gate.pause(),
                Effect::HoldToCarry => self.gate.pause_to_carry(),
                Effect::LetClientsGo => self.gate.resume(),
                Effect::Note { kind, text } => {
                    tracing::info!(kind, "{text}");
                    self.notify(kind, &text);
                    self.log_event(kind, text);
                }
                mut other => {
                    if let Effect::AskPeer { ask, .. } = &mut other {
                        self.audit.sign(ask);
                    }
                    self.hands.execute(other);
                }
            }
        }
    }

    /// `[notify]`: handed over, never waited for.
    fn notify(&self, kind: &str, text: &str) {
        if !self.notices.wants(kind) {
            return;
        }
        let now = read_clocks();
        let snapshot = self.guard.snapshot(now);
        let procedure = snapshot.procedure.as_ref().map(|procedure| procedure.kind.as_str());
        let Some(severity) = notices::severity_during(kind, procedure) else { return };
        self.notices.put(Notice {
            node: snapshot.node,
            service: self.service.clone(),
            at: now.rfc3339(),
            kind: kind.to_owned(),
            severity,
            text: text.to_owned(),
            epoch: snapshot.epoch,
            role: snapshot.role,
            folded: 0,
        });
    }

    /// The event log is for people: losing a line of it costs nothing but the line.
    fn log_event(&self, kind: &str, text: String) {
        let at = format!("{:.0}", clock::wall());
        let row = EventRow { at, kind: kind.to_owned(), text };
        let Ok(mut line) = serde_json::to_vec(&row) else { return };
        line.push(b'\n');
        self.event_log.put(line);
    }

    fn accept(&mut self, request: Request) -> Event {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        match request {
            Request::Control(request, by, reply) => match command(&request) {
                Ok(command) => {
                    self.hands.expect_command(ticket, reply);
                    if audit::typed(&command).is_none() {
                        tracing::info!("{by}: {} (nothing is to be changed)", request.verb);
                    }
                    self.said.extend(self.audit.begun(ticket, by, &command));
                    Event::Command { ticket, command }
                }
                Err(text) => {
                    self.said.push(audit::told(&by, &request.verb, 1, &text));
                    let _client_gone = reply.try_send(ControlReply::End { exit: 1, text, data: None });
                    Event::DeadlinePassed
                }
            },
            Request::Audited(text) => {
                self.said.push(text);
                Event::DeadlinePassed
            }
            Request::Peer(from, question, reply) => {
                self.hands.expect_question(ticket, reply);
                self.audit.asked_by_peer(ticket, from.as_str(), &question);
                Event::PeerAsked { ticket, question }
            }
            Request::Follower(from, question, reply) => {
                self.hands.expect_question(ticket, reply);
                Event::FollowerAsked { ticket, from, question }
            }
        }
    }
}

/// The command of a control request.
fn command(request: &ControlRequest) -> Result<Command, String> {
    let flag = |key: &str| request.args.get(key).and_then(Value::as_bool).unwrap_or(false);
    let text = |key: &str| request.args.get(key).and_then(Value::as_str).map(str::to_owned);
    let name = |key: &str| -> Result<Option<NodeName>, String> {
        text(key).map(|name| name.parse().map_err(|error: crate::base::ids::BadId| error.0)).transpose()
    };
    let dry_run = flag("dry_run");
    match request.verb.as_str() {
        "promote" => Ok(Command::Promote {
            dry_run,
            yes: flag("yes"),
            accept_data_loss: flag("accept_data_loss"),
            peer_is_off: name("peer_is_off")?,
        }),
        "switchover" => Ok(Command::Switchover { to: name("to")?, dry_run }),
        "rejoin" => {
            let node = name("node")?.ok_or("rejoin needs the name of a node")?;
            Ok(Command::Rejoin { node, dry_run })
        }
        "fence" => Ok(Command::Fence { reason: text("reason").unwrap_or_else(|| "fenced by the operator".to_owned()) }),
        "unfence" => Ok(Command::Unfence),
        "pause" => Ok(Command::Pause),
        "resume" => Ok(Command::Resume),
        "maintenance" => Ok(Command::Maintenance { on: flag("on") }),
        "drilled" => {
            Ok(Command::Drilled { text: clean(&text("text").unwrap_or_default()).chars().take(500).collect() })
        }
        other => Err(format!("{other} is not built yet in this daemon")),
    }
}
