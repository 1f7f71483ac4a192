//! What a failover at this moment would cost, and the exact command for the next sensible action. Shown on every
//! surface, so said once, here.
//!
//! What it is NOT: it permits nothing. Whether a promote loses data is judged anew when it runs
//! (`guard/judge`), on the record of that moment.
//!
//! **Invariant:** `safe` is said only where there is proof: `in_sync` as the contract means it, or what the taker
//! itself would judge. What is not known is called not known.

use crate::base::ids::{Lsn, NodeName};
use crate::base::time::{Duration, Instant, millis};
use crate::engine::status::{GateState, HELD, NodeRow, Role, Snapshot, VerdictWord};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What a failover at this moment would cost, from what this node knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlook {
    /// A failover now loses nothing, and this node has the proof.
    pub safe: bool,
    /// Transactions that would be lost, about; null where nobody here can tell.
    pub lost: Option<u64>,
    /// WAL that the standby lacks; null where nobody here can tell.
    #[serde(default)]
    pub lost_bytes: Option<u64>,
    /// The sentence for people: `if alp died now, nothing would be lost: ...`.
    pub text: String,
}

impl Default for Outlook {
    /// What an older daemon, which does not send it, would have said.
    fn default() -> Outlook {
        Outlook::unknown("what a failover would lose is not known")
    }
}

impl Outlook {
    /// Nobody here can tell, for the reason in the sentence.
    pub fn unknown(text: impl Into<String>) -> Outlook {
        Outlook { safe: false, lost: None, lost_bytes: None, text: text.into() }
    }
}

/// The exact command for the next sensible action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    pub command: String,
    /// Why, in a sentence without a capital at its beginning.
    pub why: String,
    /// The node to type it on.
    pub on: NodeName,
}

/// How far the standby is behind, as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Which standby: the other voter, seen from the primary; this node, seen from a standby.
    pub node: NodeName,
    pub bytes: u64,
    /// For how long it has been without something that the primary has written; null where that was not watched.
    pub ms: Option<u64>,
    /// It is not connected: counted from where it was last seen.
    pub away: bool,
}

/// How things stand between the node that serves and the one that would take over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The contract's `in_sync`.
    InSync,
    /// The record says that nobody is waited for, since then.
    Alone {
        since: String,
    },
    /// Commits wait for a standby that has been silent since then.
    CommitsWait {
        since: String,
    },
    /// Synchronous by configuration, and not proven.
    NotInSync,
    Asynchronous,
    /// What this node would judge if it took over now; the reason is a whole clause.
    TakerLosesNothing(String),
    TakerMayLose(String),
    CannotTakeOver(String),
    /// The witness does not answer this node, so it could not take over.
    NoRecord,
    /// A procedure of this kind is moving things.
    Moving(String),
    NoOtherNode,
}

/// What is heard of the node that serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    /// It answers, or is this node.
    Heard,
    Silent,
    /// It answers, and says that it does not serve.
    Nobody,
}

/// What [`outlook`] is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The node that serves, or served last.
    pub active: NodeName,
    /// The voter that would take over.
    pub taker: NodeName,
    pub serving: Serving,
    /// A promote without the old node's word can prove that nothing is lost: there is a marker, or the word of
    /// `on_standby_loss = "block"`.
    pub provable: bool,
    pub standing: Standing,
}

/// The outlook in words.
pub fn outlook(facts: &Facts) -> Outlook {
    let Facts { active, taker, .. } = facts;
    let (now, what) = match facts.serving {
        Serving::Heard => {
            (format!("if {active} died now,"), format!("what would be lost if {active} died now is not known"))
        }
        Serving::Silent => (
            format!("{active} does not answer; in a failover now,"),
            format!("{active} does not answer; what a failover now would lose is not known"),
        ),
        Serving::Nobody => (
            format!("nobody is known to serve; if {taker} were promoted now,"),
            format!("nobody is known to serve; what a promote of {taker} would lose is not known"),
        ),
    };
    let safe = |text: String| Outlook { safe: true, lost: Some(0), lost_bytes: Some(0), text };
    let all_there = format!("{now} nothing would be lost: {taker} has all that was acknowledged");
    match &facts.standing {
        Standing::InSync if facts.provable => safe(all_there),
        Standing::InSync => safe(format!(
            "{all_there} (without a marker promote cannot prove it then, and will ask for --accept-data-loss)"
        )),
        Standing::TakerLosesNothing(why) => safe(format!("{now} nothing would be lost: {why}")),
        Standing::Alone { since } => Outlook::unknown(format!(
            "{now} what was acknowledged since {since} would be lost: {active} has been alone since then"
        )),
        Standing::CommitsWait { since } => {
            Outlook::unknown(format!("{what}: commits wait for {taker}, which has been silent since {since}"))
        }
        Standing::NotInSync => {
            Outlook::unknown(format!("{what}: {taker} is not proven to have all that was acknowledged"))
        }
        Standing::Asynchronous => Outlook::unknown(format!(
            "{now} the last transactions might be lost: replication is asynchronous, and promises nothing"
        )),
        Standing::TakerMayLose(why) => Outlook::unknown(format!("{now} data might be lost: {why}")),
        Standing::CannotTakeOver(why) => Outlook::unknown(format!("{now} {taker} could not take over: {why}")),
        Standing::NoRecord => Outlook::unknown(format!("{what}: the witness does not answer, and {taker} needs it")),
        Standing::Moving(kind) => {
            Outlook::unknown(format!("what a failover would lose is not known while a {kind} is under way"))
        }
        Standing::NoOtherNode => Outlook::unknown(format!("{now} there is no other node that could take over")),
    }
}

/// `1 transaction`, `about 12 transactions`.
fn transactions(count: u64) -> String {
    match count {
        1 => "about 1 transaction".to_owned(),
        _ => format!("about {count} transactions"),
    }
}

/// Bytes for people: `812 B`, `3.2 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        None => format!("{bytes} B"),
        Some((unit, name)) => {
            let tenths = u128::from(bytes) * 10 / u128::from(*unit);
            if tenths >= 100 {
                format!("{} {name}", tenths / 10)
            } else {
                format!("{}.{} {name}", tenths / 10, tenths % 10)
            }
        }
    }
}

/// Positions kept to turn a distance in WAL into transactions and seconds.
const MARKS: usize = 512;
/// Who has lost the standby's connection knows its position from the peer, whose word may be so much older.
const HINDSIGHT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    lsn: u64,
    xid: Option<u64>,
}

/// Where the primary was when, and where the standby was last: a distance in WAL as transactions and seconds. Kept
/// outside the guard, which decides nothing by it.
#[derive(Debug, Default)]
pub struct Ledger {
    marks: VecDeque<Mark>,
    /// The last position of the standby, and whose.
    standby: Option<(NodeName, u64)>,
}

impl Ledger {
    /// Adds to a fresh snapshot what only its forerunners know: lag, what would be lost, and what to do next.
    pub fn complete(&mut self, now: Instant, snapshot: &mut Snapshot) {
        snapshot.lag = self.lag(now, snapshot);
        if let Some(counted) = self.counted(snapshot) {
            snapshot.outlook = counted;
        }
        snapshot.next = next(snapshot);
    }

    fn lag(&mut self, now: Instant, snapshot: &Snapshot) -> Option<Lag> {
        let own: Option<Lsn> = snapshot.replication.lsn.as_ref().and_then(|lsn| lsn.parse().ok());
        let primary = snapshot.postgres.role.as_deref() == Some("primary");
        let name =
            if primary { snapshot.peer.as_ref().map(|peer| peer.name.clone()) } else { Some(snapshot.node.clone()) };
        let name = name?;
        let row = snapshot.nodes.iter().find(|row| row.name == name && row.role == "standby");
        let delay = row.and_then(|row| row.replication_delay_bytes);
        let head = match (own, delay) {
            (Some(own), _) if primary => own.0,
            (Some(own), Some(delay)) if !primary => own.0.saturating_add(delay),
            // A standby that cannot ask where the primary is, or nothing at all.
            _ => return None,
        };
        if self.marks.back().is_some_and(|mark| mark.lsn > head) {
            // Another history: a takeover, or a rewind.
            self.marks.clear();
            self.standby = None;
        }
        if self.marks.back().is_none_or(|mark| mark.lsn < head) {
            self.marks.push_back(Mark { at: now, lsn: head, xid: snapshot.next_xid });
        } else if let Some(last) = self.marks.back_mut() {
            // An xid may be given before anything of it is written.
            last.xid = snapshot.next_xid.or(last.xid);
        }
        if let Some(delay) = delay {
            self.standby = Some((name.clone(), head.saturating_sub(delay)));
        }
        let position = self.standby.as_ref().filter(|(known, _)| *known == name).map(|(_, position)| *position)?;
        self.thin(now, position);
        let bytes = head.saturating_sub(position);
        let known = self.marks.front().is_some_and(|mark| mark.lsn <= position);
        let lacked = self.marks.iter().find(|mark| mark.lsn > position);
        let ms = match (bytes, known, lacked) {
            (0, ..) => Some(0),
            (_, true, Some(mark)) => Some(millis(now.since(mark.at))),
            _ => None,
        };
        Some(Lag { node: name, bytes, ms, away: delay.is_none() })
    }

    /// Only the newest mark that the standby has is needed of those behind it, and what [`HINDSIGHT`] may come back to;
    /// of too many others every second one goes, which costs a little precision.
    fn thin(&mut self, now: Instant, position: u64) {
        let is_past = |mark: &Mark| mark.lsn <= position && now.since(mark.at) > HINDSIGHT;
        while self.marks.len() > 1 && self.marks.get(1).is_some_and(is_past) {
            self.marks.pop_front();
        }
        if self.marks.len() > MARKS {
            let mut keep = false;
            let (first, last) = (self.marks.front().map(|mark| mark.lsn), self.marks.back().map(|mark| mark.lsn));
            self.marks.retain(|mark| {
                keep = !keep;
                keep || Some(mark.lsn) == first || Some(mark.lsn) == last
            });
        }
    }

    /// The outlook with numbers, where this node serves and something would be lost.
    fn counted(&self, snapshot: &Snapshot) -> Option<Outlook> {
        let alone = snapshot.replication.alone_since.as_ref();
        let loses = alone.is_some() || snapshot.replication.mode == "asynchronous";
        if snapshot.role != Role::Active || snapshot.outlook.safe || snapshot.procedure.is_some() || !loses {
            return None;
        }
        let lag = snapshot.lag.as_ref()?;
        let (_, position) = self.standby.as_ref()?;
        let had = self.marks.iter().rev().find(|mark| mark.lsn <= *position)?.xid?;
        let lost = snapshot.next_xid?.saturating_sub(had);
        // Everything is there, and still nothing promises it.
        let lost = if lag.bytes == 0 { 0 } else { lost };
        let (node, size) = (&snapshot.node, human_bytes(lag.bytes));
        let text = match (alone, lag.bytes) {
            (Some(since), 0) => {
                format!(
                    "if {node} died now, nothing more than since {since} is missing on {}: it has all of the WAL, \
                    but commits do not wait for it yet, and the record says alone",
                    lag.node
                )
            }
            (Some(since), _) => {
                format!(
                    "if {node} died now, {} ({size} of WAL) would be lost: {node} has been alone since {since}",
                    transactions(lost)
                )
            }
            (None, 0) => format!(
                "if {node} died now, the last transactions might be lost: {} has all of the WAL at this moment, but \
                 replication is asynchronous, and promises nothing",
                lag.node
            ),
            (None, _) => format!(
                "if {node} died now, {} ({size} of WAL) would be lost: replication is asynchronous",
                transactions(lost)
            ),
        };
        Some(Outlook { safe: false, lost: Some(lost), lost_bytes: Some(lag.bytes), text })
    }
}

/// The next sensible command, most urgent first; `None`: nothing is to be done.
pub fn next(now: &Snapshot) -> Option<Next> {
    let me = &now.node;
    let say =
        |command: &str, on: &NodeName, why: String| Some(Next { command: command.to_owned(), why, on: on.clone() });
    if !now.turn_running {
        let why = "the daemon's turn does not run: its log says why; `systemctl restart portcullis` starts it anew";
        return say("journalctl -u portcullis -n 50", me, why.to_owned());
    }
    if let Some(procedure) = &now.procedure {
        return say("portcullis status --watch", me, format!("{} is under way: {}", procedure.kind, procedure.step));
    }
    if let Some(conflict) = now.vips.iter().find(|vip| vip.conflict.is_some()) {
        let mac = conflict.conflict.as_deref().unwrap_or_default();
        return say(
            "portcullis doctor",
            me,
            format!(
                "the machine with MAC address {mac} claims the VIP {} too: find it and take the address off it; the \
                 gate opens again by itself once nobody claims it",
                conflict.address
            ),
        );
    }
    advised(now).or_else(|| own_node(now)).or_else(|| other_nodes(now))
}

/// The guard's own advice, where it is a command: `portcullis rejoin alp    (bring this node back as standby)`.
fn advised(now: &Snapshot) -> Option<Next> {
    let advice = now.advice.as_deref()?;
    if !advice.starts_with("portcullis ") {
        return None;
    }
    let (command, rest) = advice.split_once(" (").unwrap_or((advice, ""));
    let mut why = rest.strip_suffix(')').unwrap_or(rest).to_owned();
    let mut on = now.node.clone();
    // "(on midna: it is named by the record ...)"
    if let Some((name, rest)) = why.strip_prefix("on ").and_then(|rest| rest.split_once(": "))
        && let Ok(name) = name.parse()
    {
        on = name;
        why = rest.to_owned();
    }
    if command.trim() == "portcullis promote --dry-run" {
        let peer = now.peer.as_ref().map_or("the other node", |peer| peer.name.as_str());
        why = format!("{peer} does not answer: this {why}; without --dry-run it is done");
    }
    Some(Next { command: command.trim().to_owned(), why, on })
}

/// What this node itself needs.
fn own_node(now: &Snapshot) -> Option<Next> {
    let me = &now.node;
    let reason = || now.gate.reason.clone().unwrap_or_else(|| "no reason given".to_owned());
    let say = |command: &str, why: String| Some(Next { command: command.to_owned(), why, on: me.clone() });
    if now.maintenance {
        return say("portcullis maintenance off", format!("maintenance is on: PostgreSQL on {me} is left alone"));
    }
    if now.gate.state == GateState::Lapsed {
        if now.advice.as_deref().is_some_and(|advice| advice.starts_with("put the DNS record right")) {
            let why = "the record does not name this node: put it right and the gate opens by itself, or promote the \
                       node that shall serve";
            return say("portcullis promote --dry-run", why.to_owned());
        }
        let why =
            format!("{}; the gate opens by itself when the proof is back; doctor looks for what is missing", reason());
        return say("portcullis doctor", why);
    }
    if now.role == Role::Active && !now.postgres.up {
        let error = now.postgres.error.as_deref().unwrap_or("no answer");
        if let Some(peer) = now.peer.as_ref().filter(|peer| peer.reachable && now.outlook.safe) {
            let why = format!(
                "PostgreSQL on {me} is down ({error}) and {} has everything; or start it on {me} again",
                peer.name
            );
            return Some(Next { command: "portcullis promote".to_owned(), why, on: peer.name.clone() });
        }
        let why = format!("PostgreSQL on {me} is down ({error}): its log says why; start it again");
        return say("journalctl -u 'postgresql@*' -n 50", why);
    }
    if now.gate.state == GateState::Paused && now.gate.reason.as_deref().is_none_or(|reason| reason == HELD) {
        return say("portcullis resume", "clients are held until then".to_owned());
    }
    if let Some(name) = now.paused_databases.first() {
        let why = format!("clients of {} are held until then", now.paused_databases.join(", "));
        return say(&format!("portcullis resume {name}"), why);
    }
    if now.role == Role::Active {
        if !now.gate.open && now.gate.state != GateState::Paused {
            return say("portcullis doctor", format!("active, but the gate is not open: {}", reason()));
        }
        return None;
    }
    if !now.postgres.up {
        let error = now.postgres.error.as_deref().unwrap_or("no answer");
        let why = format!("PostgreSQL on {me} is down ({error}): its log says why; start it again, or rejoin {me}");
        return say("journalctl -u 'postgresql@*' -n 50", why);
    }
    let Some(active) = now.active_node() else {
        let named = now.witness.as_ref().and_then(|witness| witness.points_at.clone());
        let on = named.unwrap_or_else(|| me.clone());
        let why = "nobody is known to serve: this shows what a promote there would do; without --dry-run it is done";
        return Some(Next { command: "portcullis promote --dry-run".to_owned(), why: why.to_owned(), on });
    };
    if now.postgres.role.as_deref() == Some("primary") {
        let why = format!("{active} is active, but PostgreSQL on {me} is a primary too: make it a standby");
        return say(&format!("portcullis rejoin {me}"), why);
    }
    if !now.postgres.streaming {
        let why = format!("{me} does not stream from {active}; doctor says why, and rejoin brings it back");
        return say(&format!("portcullis rejoin {me}"), why);
    }
    None
}

/// What the others need, as this node sees them.
fn other_nodes(now: &Snapshot) -> Option<Next> {
    let me = &now.node;
    if now.role == Role::Active {
        if let Some(peer) = &now.peer {
            if let Some(next) = standby(now, &peer.name, peer.reachable) {
                return Some(next);
            }
            if !peer.reachable {
                let why = format!(
                    "the daemon of {} does not answer, so it could not take over; see whether the machine, its network \
                     and its daemon are up",
                    peer.name
                );
                let command = "systemctl start portcullis".to_owned();
                return Some(Next { command, why, on: peer.name.clone() });
            }
        }
        let peer = now.peer.as_ref().map(|peer| &peer.name);
        let further = now.nodes.iter().filter(|row| row.name != *me && Some(&row.name) != peer);
        for row in further {
            if let Some(next) = standby(now, &row.name, row.status == "up") {
                return Some(next);
            }
        }
    }
    if now.peer.as_ref().is_some_and(|peer| peer.same_configuration == Some(false)) {
        let why = "the two nodes are configured differently, and pledge nothing to one another: doctor shows where";
        return Some(Next { command: "portcullis doctor".to_owned(), why: why.to_owned(), on: me.clone() });
    }
    let silent = |witness: &crate::engine::status::WitnessStatus| {
        !witness.servers.is_empty() && witness.servers.iter().all(|server| server.verdict == VerdictWord::Silent)
    };
    if now.witness.as_ref().is_some_and(silent) {
        let why = "no server of the record answers: no failover is possible until one does, and the lease hangs on \
                   the other node alone";
        return Some(Next { command: "portcullis doctor".to_owned(), why: why.to_owned(), on: me.clone() });
    }
    None
}

/// A standby of this active node that does not do its work.
fn standby(now: &Snapshot, name: &NodeName, reachable: bool) -> Option<Next> {
    let row: &NodeRow = now.nodes.iter().find(|row| row.name == *name)?;
    match row.replication_state.as_deref() {
        // One that catches up needs time and nothing else.
        Some(_) => None,
        None if !reachable => {
            let why = format!(
                "{name} does not answer, so nobody could take over: start the machine and its daemon; it comes back \
                 by itself, or with `portcullis rejoin {name}`"
            );
            Some(Next { command: "systemctl start portcullis".to_owned(), why, on: name.clone() })
        }
        None => {
            let why = format!("{name} does not stream, so a failover to it would lose data: bring it back as standby");
            Some(Next { command: format!("portcullis rejoin {name}"), why, on: now.node.clone() })
        }
    }
}

#[cfg(test)]
#[path = "outlook/tests.rs"]
mod tests;
