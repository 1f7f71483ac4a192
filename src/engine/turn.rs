//! The vocabulary of one turn: all that comes in ([`Event`]), all that goes out ([`Effect`]).
//!
//! Order between effects lives in the guard's state, not in the executor: the guard emits `Record`, waits for
//! `Recorded` and only then emits what depends on it. `Cut` and `Extend` are executed inline and first; they
//! cannot fail or wait.
//!
//! Over 600 lines: it is one vocabulary, and hardly anything but declarations.

use crate::base::ids::{Epoch, Lsn, NodeName, OpId, SystemId, TimelineId};
use crate::base::time::Instant;
use crate::engine::durable::Entry;
use crate::engine::report::{ControlData, PgReport, Progress, RejoinPlan, SourceFacts, StandbyRow, WalTail};
use crate::engine::status::Role;
use crate::wire::dns::{Reading, RecordPair, UpdateOutcome};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::Duration;

/// One reading of both clocks per turn: boot time decides, wall time is only shown and written into records.
#[derive(Debug, Clone, Copy, Hash)]
pub struct Now {
    pub boot: Instant,
    pub wall: jiff::Timestamp,
}

impl Now {
    /// RFC 3339 with whole seconds, UTC.
    pub fn rfc3339(&self) -> String {
        format!("{:.0}", self.wall)
    }
}

/// Whom an answer goes to: a waiting command or a waiting question of the peer.
pub type Ticket = u64;

/// All that comes in.
#[derive(Debug, Clone, Hash)]
pub enum Event {
    /// A deadline the guard named has passed.
    DeadlinePassed,
    Recorded {
        seq: u64,
    },
    RecordFailed {
        seq: u64,
        why: String,
    },
    /// An authority answered question `question` (or stayed silent, or answered something that proves nothing).
    WitnessAnswered {
        question: u64,
        answer: Result<Reading, String>,
    },
    UpdateAnswered {
        op: OpId,
        outcome: UpdateOutcome,
    },
    /// The peer's answer to our question; `Err` when none came within its limit.
    PeerAnswered {
        question: u64,
        answer: Result<Box<PeerAnswer>, String>,
    },
    /// The peer asks; answered with [`Effect::AnswerPeer`].
    PeerAsked {
        ticket: Ticket,
        question: Box<PeerQuestion>,
    },
    /// A node without a vote asks; answered with [`Effect::AnswerPeer`]. What it says is evidence of nothing.
    FollowerAsked {
        ticket: Ticket,
        from: NodeName,
        question: Box<PeerQuestion>,
    },
    /// `asked` is when the look began.
    PgObserved {
        asked: Instant,
        report: Box<PgReport>,
    },
    /// The guard's session was lost or refused: PostgreSQL is down, starting or in crash recovery.
    PgLost(String),
    /// No answer in time: PostgreSQL hangs. Proves nothing.
    PgSilent(String),
    PgDone {
        op: OpId,
        result: Result<PgOutput, String>,
    },
    /// Progress of a long PostgreSQL task (a rejoin), for the person who waits; as figures where it has any.
    PgProgress {
        op: OpId,
        text: String,
        progress: Option<Progress>,
    },
    /// The VIP was bound or renewed by us.
    VipBound {
        address: IpAddr,
    },
    VipBindFailed {
        address: IpAddr,
        why: String,
    },
    /// Nobody answered the probe (`None`), or this MAC did.
    VipProbed {
        address: IpAddr,
        claimed_by: Option<String>,
    },
    /// The kernel says that the address is gone: expired, or removed by somebody.
    VipRemoved {
        address: IpAddr,
    },
    LinkDown,
    LinkUp,
    /// A VIP witness (the gateway by default) answered an ARP or NDP request sent from the VIP, and nobody else
    /// answered for the VIP meanwhile; `Err` when none did within the limit, or somebody else did (R3).
    NeighbourAnswered {
        question: u64,
        answer: Result<IpAddr, String>,
    },
    /// `fence.stonith` ended; `Ok`: the node is surely off.
    StonithDone {
        op: OpId,
        result: Result<(), String>,
    },
    /// `service.units` were started or stopped, or could not be.
    UnitsDone {
        start: bool,
        result: Result<(), String>,
    },
    /// `may-start-primary` refused the local PostgreSQL, which is down since: the daemon starts it once proof comes.
    PgStartRefused,
    /// Somebody else announced one of our VIPs.
    ForeignClaim {
        address: IpAddr,
        mac: String,
    },
    /// Where one of our VIPs belongs here; only shown.
    VipFound {
        address: IpAddr,
        mac: String,
    },
    /// The netlink stream lost events, here is what is true now.
    VipIs {
        address: IpAddr,
        bound: bool,
    },
    /// The bounded drain of a switchover ended: what so many sessions ran was cancelled for it, and `busy` are left.
    Drained {
        op: OpId,
        cancelled: u64,
        busy: u64,
    },
    Command {
        ticket: Ticket,
        command: Command,
    },
    Sessions {
        sessions: u64,
        total: u64,
        auth_failures: u64,
    },
    /// Who gave which command, and what came of it: for the event log.
    Audited {
        text: String,
    },
    /// SIGTERM: cut, unbind, say goodbye.
    ShutdownAsked,
}

/// What a person asks of this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Command {
    Promote {
        dry_run: bool,
        yes: bool,
        accept_data_loss: bool,
        peer_is_off: Option<NodeName>,
    },
    Switchover {
        to: Option<NodeName>,
        dry_run: bool,
    },
    Rejoin {
        node: NodeName,
        dry_run: bool,
    },
    Fence {
        reason: String,
    },
    Unfence,
    Pause,
    Resume,
    /// PostgreSQL is left alone (no start, stop, demote, restart); the gate goes on obeying the lease.
    Maintenance {
        on: bool,
    },
    /// What a drill found, for the event log.
    Drilled {
        text: String,
    },
}

/// Work for the PostgreSQL hand; one at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PgTask {
    /// Set `synchronous_standby_names` and wait until it is in force here.
    SetSyncList(Option<NodeName>),
    /// R4's proof that commits really wait; answers the insert LSN.
    RearmBarrier,
    /// Fast stop, bounded, then immediate; answers pg_controldata.
    Stop,
    /// The same of one that does not answer: nobody waits long for its fast stop.
    StopNow,
    /// CHECKPOINT, so that a stop that follows is short; [`PgOutput::Hangs`] where there is no session to be had.
    Checkpoint,
    /// Start as whatever its signal files say.
    Start,
    /// Stop, standby.signal, follow the peer or nobody, start.
    Demote { follow_peer: bool },
    /// Replay all that was received, end recovery on a timeline above this one, wait until writable.
    Promote { above: TimelineId },
    /// What a rejoin would do here; looks only.
    PlanRejoin(SourceFacts),
    /// Follow, rewind or clone the peer, configure, start.
    Rejoin(SourceFacts),
    /// On the active node: what a rejoin to it must know; changes nothing.
    LookAsSource(Option<WalTail>),
    /// On the active node: the replication role and the peer's slot.
    PrepareStandby,
    /// On a standby that already streams: our own primary_conninfo (application_name, passfile, slot).
    Adopt,
    /// A standby whose primary is back: look for it now, not after `wal_retrieve_retry_interval`.
    Nudge,
    /// On a standby that does not stream: where timeline `to` left `from`, by the history file that was fetched.
    SwitchPoint { from: TimelineId, to: TimelineId },
    /// On a standby: slots of ours that nobody uses any more, and that would keep WAL for ever.
    DropIdleSlots,
}

/// What a PostgreSQL task answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PgOutput {
    Done,
    Lsn(Lsn),
    Control(ControlData),
    Source(SourceFacts),
    Plan(RejoinPlan),
    /// It is there, and gives no session in time.
    Hangs(String),
}

/// All that goes out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The gate may pass traffic until this moment.
    Extend {
        until: Instant,
    },
    /// Nothing passes any more. The text is what clients are told.
    Cut {
        reason: String,
    },
    /// Nothing passes any more, but sessions that have no backend wait, until this moment at the latest; the rest as
    /// with a cut.
    Suspend {
        until: Instant,
        reason: String,
    },
    /// What a suspended gate still keeps goes on at the peer's gate, which is open at this epoch: sessions at a
    /// transaction boundary that need nothing of PostgreSQL here each become a tunnel, all others end with `reason`.
    CarryOver {
        epoch: Epoch,
        reason: String,
    },
    /// The other node is known to serve at this epoch: clients of this node may be forwarded to its gate, those of
    /// another epoch are not any longer. `None`: nobody is. Or this node takes over from it (`returns`): those of that
    /// epoch are given back.
    Forward {
        serves: Option<Epoch>,
        returns: Option<Epoch>,
    },
    /// Hold clients at their next transaction boundary.
    HoldClients,
    /// The same for a switchover: each session finds out at its boundary what of it could go on at the other node.
    HoldToCarry,
    LetClientsGo,
    /// Wait (bounded) until no session is inside a transaction, then cancel those that are.
    Drain {
        op: OpId,
        limit: Duration,
    },
    Record {
        seq: u64,
        entries: Vec<Entry>,
    },
    AskWitness {
        question: u64,
        server: usize,
        limit: Duration,
    },
    Update {
        op: OpId,
        prerequisite: RecordPair,
        addresses: Vec<IpAddr>,
        marker: String,
        limit: Duration,
    },
    AskPeer {
        question: u64,
        ask: Box<PeerQuestion>,
        limit: Duration,
    },
    /// A question to the node of this name: a node without a vote asks both voters.
    AskNode {
        question: u64,
        node: NodeName,
        ask: Box<PeerQuestion>,
        limit: Duration,
    },
    AnswerPeer {
        ticket: Ticket,
        answer: Box<PeerAnswer>,
    },
    /// A node without a vote: this is whom `Adopt` and `Clone` mean by the peer from here on.
    FollowFrom {
        node: NodeName,
    },
    Pg {
        op: OpId,
        task: PgTask,
    },
    /// (Re)bind with the kernel lifetime that is left.
    BindVip {
        address: IpAddr,
        seconds: u32,
    },
    UnbindVip {
        address: IpAddr,
    },
    ProbeVip {
        address: IpAddr,
    },
    /// Gratuitous ARP or unsolicited neighbour advertisements: five at once in alternating forms, or one of each.
    AnnounceVip {
        address: IpAddr,
        burst: bool,
    },
    /// Ask the VIP's witnesses for their hardware address, from the VIP, which is bound (R3).
    AskNeighbour {
        question: u64,
        address: IpAddr,
        limit: Duration,
    },
    /// The second wall: traffic to the gate and to PostgreSQL passes the kernel until then; `None`: not at all. The
    /// newest counts.
    KernelGate {
        until: Option<Instant>,
    },
    /// Start `service.units`, or stop them. The newest counts.
    Units {
        start: bool,
    },
    /// Run `fence.stonith` against this node.
    Stonith {
        op: OpId,
        node: NodeName,
    },
    /// A line for the person who waits on `ticket`.
    Say {
        ticket: Ticket,
        text: String,
    },
    /// How long a wait still lasts, about once a second.
    Count {
        ticket: Ticket,
        text: String,
        left: Duration,
    },
    /// A line that the next one of its kind replaces on a terminal, with its figures for programs.
    Progress {
        ticket: Ticket,
        text: String,
        progress: Progress,
    },
    /// The last word to `ticket`; `flag` is a fact for programs (`already_active`, `may_lose`).
    End {
        ticket: Ticket,
        exit: u8,
        text: String,
        flag: Option<&'static str>,
    },
    /// One line in the log and one event.
    Note {
        kind: &'static str,
        text: String,
    },
}

impl Effect {
    /// A line for who waits on `ticket`, with its figures where it has any.
    pub fn told(ticket: Ticket, text: String, progress: Option<Progress>) -> Effect {
        match progress {
            Some(progress) => Effect::Progress { ticket, text, progress },
            None => Effect::Say { ticket, text },
        }
    }
}

/// What one node tells the other about itself with every pulse.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerState {
    pub node: NodeName,
    pub version: String,
    /// Random, one per start of the daemon.
    pub start: u64,
    /// The kernel's boot_id.
    pub boot: String,
    pub role: Role,
    pub gate_open: bool,
    pub refused: Epoch,
    pub won: Epoch,
    pub complete: Epoch,
    pub fence: Epoch,
    /// Highest epoch known from anywhere.
    pub seen: Epoch,
    /// What both nodes must agree on, hashed.
    pub digest: String,
    /// Every node of its configuration, those without a vote too; only compared by `doctor`. Empty: not told.
    #[serde(default)]
    pub nodes: Vec<NodeName>,
    pub pg: Option<PeerPg>,
    /// A data directory exists, running or not.
    pub pg_present: bool,
    /// In sync as the active node sees it.
    pub in_sync: bool,
    /// The replication role and the slot of the other node are there.
    pub prepared: bool,
    /// A standby whose `primary_conninfo` is the daemon's own.
    pub adopted: bool,
    /// An unfinished rejoin: its data is not promotable.
    pub rejoining: bool,
    /// Its epoch was taken without the other node's word, and they have not had the same data since.
    #[serde(default)]
    pub unheard: bool,
    /// Its PostgreSQL is left alone, so it consents to nothing.
    #[serde(default)]
    pub maintenance: bool,
    /// It lets clients in through tunnels of the peer channel.
    #[serde(default)]
    pub tunnels: bool,
    /// It only looks when a rejoin asks it to ([`PeerQuestion::PrepareRejoin`]).
    #[serde(default)]
    pub looks: bool,
    /// Its word, where no marker says it: at its epoch all that it acknowledged is on the hearer, and it acknowledges
    /// nothing more without it (`on_standby_loss = "block"`) until the hearer has acknowledged a going alone.
    #[serde(default)]
    pub blocks: bool,
    pub procedure: Option<ProcedureBrief>,
    /// The old side of a switchover: whose attempt, and what it is at.
    #[serde(default)]
    pub handing_over: Option<(u64, String)>,
    /// RFC 3339, since when its PostgreSQL has not answered: it hands nothing over.
    #[serde(default)]
    pub hangs_since: Option<String>,
    /// Only a `rejoin` brings it back: its own advice.
    #[serde(default)]
    pub wants_rejoin: bool,
}

/// The peer's PostgreSQL, in the peer's own words.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerPg {
    pub system_id: SystemId,
    pub in_recovery: bool,
    pub timeline: TimelineId,
    /// Primary: insert LSN. Standby: flushed.
    pub lsn: Lsn,
    pub replay_lsn: Option<Lsn>,
    pub streaming: bool,
    /// Primary: what our own walreceiver has confirmed as flushed.
    pub confirmed: Option<Lsn>,
}

/// A procedure as the other node may show it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcedureBrief {
    pub kind: String,
    pub id: u64,
    pub step: String,
    /// Exit code and last sentence, once it ended.
    pub ended: Option<(u8, String)>,
    /// The figures of `step`.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// The last of all that was said, bounded; empty from an older daemon, whose `step` is then all there is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<Told>,
}

/// One line of a procedure, for those who follow it from another node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Told {
    /// The first is 1.
    pub number: u64,
    pub text: String,
    #[serde(default)]
    pub progress: Option<Progress>,
}

/// What a node without a vote tells the voters about itself. A type of its own, so that it can never be taken for a
/// peer's state: it is shown, and proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FollowerState {
    pub node: NodeName,
    pub version: String,
    /// Whom its PostgreSQL was told to stream from.
    pub follows: Option<NodeName>,
    pub pg: Option<PeerPg>,
    /// Why it cannot follow by itself.
    pub trouble: Option<String>,
    pub procedure: Option<ProcedureBrief>,
}

/// What a voter tells a node without a vote.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Facts {
    pub state: PeerState,
    /// Rows of `pg_stat_replication` of the node whose gate is open.
    pub standbys: Vec<StandbyRow>,
    /// The other nodes without a vote, as heard lately.
    pub others: Vec<FollowerState>,
    /// A person there wants the asker rejoined.
    #[serde(default)]
    pub wish: Option<Wish>,
}

/// `rejoin` of a node without a vote, given on a voter; the node that asks takes it as its procedure's number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wish {
    pub id: u64,
    pub dry_run: bool,
}

/// Questions on the peer channel.
// A few per second: one allocation less is not worth a box in every match.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "the pulse is the message of every poll; one is in flight at a time")]
pub enum PeerQuestion {
    /// Here is my state; what is yours; and (when `pledge` is set) will you keep your hands off this epoch?
    Pulse { state: PeerState, pledge: Option<PledgeAsk> },
    /// Switchover, step 1: checkpoint while clients run, then hold them and drain. Answered when done.
    Prepare { attempt: u64, epoch: Epoch },
    /// Switchover, step 2: nothing passes any more, stop PostgreSQL; answered with pg_controldata.
    StopPrimary { attempt: u64 },
    /// The last step before the compare-and-swap: fence yourself durably at `epoch` (design.md R2, consent).
    Consent {
        attempt: u64,
        epoch: Epoch,
        /// The asker has replayed the last write of a PostgreSQL that this very attempt stopped: the answer is yes only
        /// while it is still stopped for it.
        #[serde(default)]
        handed_over: bool,
    },
    /// Before any consent: put everything back.
    PutBack { attempt: u64 },
    /// First step of a rejoin, to the active node: write `sync=none`, empty the list, make role and slot. With `look`
    /// nothing is changed: only its facts are told, and whether its WAL has this end (an older daemon prepares).
    PrepareRejoin {
        id: u64,
        #[serde(default)]
        look: bool,
        #[serde(default)]
        tail: Option<WalTail>,
    },
    /// Without a marker: I go alone at this epoch; write that down (R4, P8).
    GoingAlone { epoch: Epoch, since: String },
    /// Run this procedure on your side (a command given on the wrong node).
    Run {
        command: Command,
        /// Who gave it, in words; empty: not told.
        #[serde(default)]
        by: String,
    },
    /// From a node without a vote: here is what I am; what are you? Never a pulse: it proves nothing to anybody.
    Follow { state: FollowerState },
    /// From a node without a vote that is being rejoined: role, slot and facts. The record stays as it is. With `look`
    /// nothing is changed at all, as in [`PeerQuestion::PrepareRejoin`].
    PrepareFollower {
        id: u64,
        #[serde(default)]
        look: bool,
        #[serde(default)]
        tail: Option<WalTail>,
    },
}

/// "I do not take over from epoch e before L from your question."
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PledgeAsk {
    pub epoch: Epoch,
    pub start: u64,
    pub question: u64,
    pub boot: String,
}

/// Answers on the peer channel.
// A few per second: one allocation less is not worth a box in every match.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "the pulse is the message of every poll; one is in flight at a time")]
pub enum PeerAnswer {
    Pulse {
        state: PeerState,
        /// `Ok(question)` pledges; the text says why not.
        pledge: Option<Result<u64, String>>,
    },
    Ready {
        attempt: u64,
        /// Sessions whose open transactions were cancelled, and those that will be ended all the same.
        #[serde(default)]
        cancelled: u64,
        #[serde(default)]
        busy: u64,
        /// Where its WAL stood at its last look.
        #[serde(default)]
        lsn: Option<Lsn>,
    },
    /// To [`PeerQuestion::Prepare`]: its PostgreSQL does not answer. Nothing was changed, and it would consent.
    Hangs {
        why: String,
    },
    Stopped {
        attempt: u64,
        checkpoint: Lsn,
        timeline: TimelineId,
    },
    Consented {
        attempt: u64,
        epoch: Epoch,
    },
    /// To [`PeerQuestion::Consent`]: cut and fenced, but that could not be written down, so it is no consent.
    FencedUnwritten {
        attempt: u64,
        why: String,
    },
    PutBack {
        attempt: u64,
    },
    Prepared {
        id: u64,
        source: SourceFacts,
    },
    Running {
        id: u64,
        /// It ran already: nothing was begun for this.
        #[serde(default)]
        joined: bool,
    },
    /// It is on disk here that the asker goes alone.
    Acknowledged,
    Facts(Box<Facts>),
    Refused {
        why: String,
    },
}
