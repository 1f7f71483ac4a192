//! A snapshot as text: pure functions, used by the command line. [`check`] holds the rules of the monitoring plugin.
//!
//! NOT here: where the snapshot came from, or any decision about it beyond its wording. **Invariant:** without a
//! terminal the text has no escape sequence, whatever came over the wire: control characters are shown as `?`.

pub mod check;

use crate::engine::outlook::human_bytes;
use crate::engine::status::{EventRow, NodeRow, Snapshot, VerdictWord, human_ms, pgpool};
use comfy_table::{CellAlignment, Table, presets};
use std::io::IsTerminal;

/// Events at the foot of `status`; `portcullis events` shows all.
const EVENTS: usize = 4;
/// Width of the words on the left.
const LABEL: usize = 13;

/// How to write: colour on a terminal (unless `NO_COLOR` is set, or `TERM` is `dumb`), frames on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    pub color: bool,
    pub terminal: bool,
}

impl Style {
    /// For a pipe, a file, or a test.
    pub const PLAIN: Style = Style { color: false, terminal: false };

    /// For standard output as it is now.
    pub fn of_stdout() -> Style {
        let terminal = std::io::stdout().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        // A screen that knows no escapes is written to as a pipe is.
        Style { color: terminal && !no_color && !dumb, terminal: terminal && !dumb }
    }

    fn paint(self, paint: Paint, text: &str) -> String {
        if !self.color {
            return text.to_owned();
        }
        let code = match paint {
            Paint::Good => "32",
            Paint::Bad => "31",
            Paint::Warn => "33",
            Paint::Strong => "1",
            Paint::Dim => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

#[derive(Debug, Clone, Copy)]
enum Paint {
    Good,
    Bad,
    Warn,
    Strong,
    Dim,
}

/// Text from elsewhere, made fit for a terminal: one line, no control characters.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn line(out: &mut String, label: &str, text: &str) {
    out.push_str(format!("{label:LABEL$}{text}").trim_end());
    out.push('\n');
}

fn lease(remaining_ms: u64) -> String {
    if remaining_ms == 0 { "none".to_owned() } else { format!("{} left", human_ms(remaining_ms)) }
}

fn ago(age_ms: Option<u64>) -> String {
    age_ms.map_or_else(|| "never heard".to_owned(), |age| format!("heard {} ago", human_ms(age)))
}

/// `status`: the story of this node in about 25 lines.
pub fn status(snapshot: &Snapshot, style: Style) -> String {
    let mut out = String::new();
    let paint = if snapshot.gate.open {
        Paint::Good
    } else if snapshot.active_node().is_some() {
        Paint::Strong
    } else {
        Paint::Bad
    };
    out.push_str(&style.paint(paint, &clean(&snapshot.headline())));
    out.push('\n');
    if let Some(event) = snapshot.since() {
        out.push_str(&style.paint(Paint::Dim, &clean(&format!("since {}: {}", event.at, event.text))));
        out.push('\n');
    }
    out.push('\n');
    if !snapshot.turn_running {
        let text = "does not run: what stands here is from its last turn; look at the daemon's log";
        line(&mut out, "daemon", &style.paint(Paint::Bad, text));
    }
    this_node(&mut out, snapshot, style);
    witness(&mut out, snapshot, style);
    neighbours(&mut out, snapshot, style);
    databases(&mut out, snapshot, style);
    outlook(&mut out, snapshot, style);
    out.push('\n');
    out.push_str(&short_nodes(&snapshot.nodes));
    if !snapshot.events.is_empty() {
        out.push_str(&style.paint(Paint::Dim, "\nlast events\n"));
        let skip = snapshot.events.len().saturating_sub(EVENTS);
        for event in snapshot.events.iter().skip(skip) {
            out.push_str(&format!("  {}\n", event_line(event)));
        }
    }
    out
}

/// What a failover now would cost, and what to type next: the page's words.
fn outlook(out: &mut String, snapshot: &Snapshot, style: Style) {
    let paint = if snapshot.outlook.safe { Paint::Good } else { Paint::Warn };
    line(out, "failover", &style.paint(paint, &clean(&snapshot.outlook.text)));
    match &snapshot.next {
        Some(next) => {
            let command = style.paint(Paint::Strong, &clean(&next.command));
            line(out, "next", &format!("on {}: {command}", next.on));
            if !next.why.is_empty() {
                line(out, "", &clean(&next.why));
            }
        }
        None if snapshot.outlook.safe => line(out, "next", "nothing: all is as it should be"),
        None => line(out, "next", "nothing: no command helps here; what is under way goes on by itself"),
    }
    // Where there is a command, it is made of the advice.
    if let Some(advice) = snapshot.advice.as_ref().filter(|_| snapshot.next.is_none()) {
        line(out, "what to do", &clean(advice));
    }
}

fn this_node(out: &mut String, snapshot: &Snapshot, style: Style) {
    let about = format!(
        "{}, {}, epoch {}, portcullis {}",
        snapshot.node,
        snapshot.role.as_str(),
        snapshot.epoch,
        snapshot.version
    );
    line(out, "this node", &clean(&about));
    let gate = &snapshot.gate;
    let paint = if gate.open { Paint::Good } else { Paint::Warn };
    let mut text = style.paint(paint, gate.state.as_str());
    if let Some(reason) = &gate.reason {
        text += &format!(": {}", clean(reason));
    }
    let sessions = if gate.sessions == 1 { "session" } else { "sessions" };
    let forwarded = match gate.forwarded {
        0 => String::new(),
        count => format!(", {count} forwarded to the active node"),
    };
    line(out, "gate", &format!("{text}; {} {sessions}{forwarded}", gate.sessions));
    line(out, "lease", &lease(gate.lease_remaining_ms));
    if snapshot.maintenance {
        line(out, "maintenance", &style.paint(Paint::Warn, "on: PostgreSQL here is left alone"));
    }
    if !snapshot.paused_databases.is_empty() {
        let names = snapshot.paused_databases.join(", ");
        let text = format!("by name: {names}; their clients wait until `portcullis resume NAME`");
        line(out, "paused", &style.paint(Paint::Warn, &clean(&text)));
    }
    if let Some(procedure) = &snapshot.procedure {
        let mut text = format!("{} {}: {}", procedure.kind, procedure.id, procedure.step);
        if !procedure.since.is_empty() {
            text += &format!(", since {}", procedure.since);
        }
        line(out, "procedure", &style.paint(Paint::Strong, &clean(&text)));
    }
}

fn witness(out: &mut String, snapshot: &Snapshot, style: Style) {
    let Some(witness) = &snapshot.witness else { return };
    let at = witness.points_at.as_ref().map_or("no node".to_owned(), |name| name.to_string());
    let epoch = witness.epoch.map_or(String::new(), |epoch| format!(", epoch {epoch}"));
    let text = format!("points at {at}{epoch}, {} ({} mode)", ago(witness.age_ms), witness.mode);
    line(out, "witness", &clean(&text));
    for server in &witness.servers {
        let (paint, says) = match server.verdict {
            VerdictWord::Here | VerdictWord::Elsewhere => (Paint::Good, "says"),
            VerdictWord::Nothing => (Paint::Bad, "says"),
            VerdictWord::Silent => (Paint::Warn, "is"),
        };
        let error = server.error.as_ref().map_or(String::new(), |error| format!(": {}", clean(error)));
        let word = style.paint(paint, server.verdict.as_str());
        line(out, "", &format!("{} {says} {word}, {}{error}", clean(&server.server), ago(server.age_ms)));
    }
}

fn neighbours(out: &mut String, snapshot: &Snapshot, style: Style) {
    for vip in &snapshot.vips {
        let bound = if vip.bound { "bound here" } else { "not bound here" };
        let conflict = vip
            .conflict
            .as_ref()
            .map_or(String::new(), |mac| style.paint(Paint::Bad, &format!("; claimed by {} too", clean(mac))));
        line(out, "VIP", &format!("{} {bound}{conflict}", clean(&vip.address)));
    }
    if let Some(witness) = &snapshot.vip_witness {
        let text = match (&witness.error, &witness.witness) {
            (Some(why), _) => style.paint(Paint::Warn, &format!("no proof: {}", clean(why))),
            (None, Some(name)) => format!("{} answers, {}", clean(name), ago(witness.age_ms)),
            (None, None) => "not asked yet (only the active node asks)".to_owned(),
        };
        line(out, "VIP witness", &text);
    }
    let Some(peer) = &snapshot.peer else { return };
    let text = if peer.reachable {
        let role = peer.role.map_or("role unknown", |role| role.as_str());
        let epoch = peer.epoch.map_or(String::new(), |epoch| format!(", epoch {epoch}"));
        format!("{} {role}{epoch}, {}", peer.name, ago(peer.age_ms))
    } else {
        style.paint(Paint::Warn, &format!("{} does not answer, {}", peer.name, ago(peer.age_ms)))
    };
    line(out, "peer", &text);
}

fn databases(out: &mut String, snapshot: &Snapshot, style: Style) {
    let pg = &snapshot.postgres;
    let role = pg.role.as_deref().unwrap_or("role unknown");
    let mut text = match (pg.up, &pg.hangs_since) {
        (true, None) => format!("up, {}", clean(role)),
        (true, Some(since)) => {
            style.paint(Paint::Bad, &format!("does not answer since {}, {}", clean(since), clean(role)))
        }
        (false, _) => style.paint(Paint::Bad, "down"),
    };
    if pg.role.as_deref() == Some("standby") {
        text += if pg.streaming { ", streaming from the active node" } else { ", not streaming" };
    }
    if let Some(error) = &pg.error {
        text += &format!(": {}", clean(error));
    }
    line(out, "PostgreSQL", &text);
    let replication = &snapshot.replication;
    let position = match (replication.timeline, &replication.lsn) {
        (Some(timeline), Some(lsn)) => format!(" (timeline {timeline}, {lsn})"),
        (Some(timeline), None) => format!(" (timeline {timeline})"),
        (None, Some(lsn)) => format!(" ({lsn})"),
        (None, None) => String::new(),
    };
    let lag = snapshot.lag.as_ref().map(|lag| {
        let time = lag.ms.map_or_else(String::new, |ms| format!(", {}", human_ms(ms)));
        let away = if lag.away { " (not connected)" } else { "" };
        format!("; {} is {}{time} behind{away}", lag.node, human_bytes(lag.bytes))
    });
    let lag = lag.unwrap_or_default();
    let state = match (&replication.alone_since, replication.in_sync, replication.mode.as_str()) {
        (_, true, _) => style.paint(Paint::Good, "in sync"),
        (None, ..) if replication.waiting_since.is_some() => {
            let since = replication.waiting_since.as_deref().unwrap_or_default();
            style.paint(Paint::Warn, &format!("commits wait: the standby has been silent since {}", clean(since)))
        }
        (Some(since), ..) => style.paint(Paint::Warn, &format!("alone since {}", clean(since))),
        (None, false, _) if pg.hangs_since.is_some() => "unknown while PostgreSQL does not answer".to_owned(),
        (None, _, "synchronous") => style.paint(Paint::Warn, "not in sync"),
        (None, ..) => "a promote may lose the last transactions".to_owned(),
    };
    line(out, "replication", &format!("{}, {state}{lag}{}", clean(&replication.mode), clean(&position)));
}

/// One event: `2026-11-20T15:11:00Z  gate_opened  alp opened epoch 7`.
pub fn event_line(event: &EventRow) -> String {
    clean(&format!("{}  {}  {}", event.at, event.kind, event.text))
}

/// `nodes`: one row a node, framed on a terminal, plain and aligned in a pipe.
pub fn nodes(rows: &[NodeRow], style: Style) -> String {
    let mut table = Table::new();
    table.load_style(if style.terminal { presets::UTF8_BORDERS_ONLY } else { presets::NOTHING });
    table.set_header([
        "node_id",
        "name",
        "hostname",
        "port",
        "status",
        "role",
        "weight",
        "attached",
        "delay_bytes",
        "state",
        "sync",
        "selects",
        "since",
    ]);
    for row in rows {
        let word = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), clean);
        table.add_row([
            row.node_id.to_string(),
            row.name.to_string(),
            clean(&row.hostname),
            row.port.to_string(),
            clean(&row.status),
            clean(&row.role),
            format!("{:.2}", row.weight),
            if row.attached { "yes" } else { "no" }.to_owned(),
            row.replication_delay_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
            word(&row.replication_state),
            word(&row.sync_state),
            row.select_count.to_string(),
            word(&row.last_status_change),
        ]);
    }
    for index in [0, 3, 6, 8, 11] {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    if !style.terminal {
        unpad(&mut table);
    }
    lines(&table)
}

/// The columns that matter at a glance; they fit 80 characters.
fn short_nodes(rows: &[NodeRow]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["node", "address", "status", "role", "behind", "replication"]);
    for row in rows {
        let status = if row.attached { clean(&row.status) } else { format!("{}, detached", clean(&row.status)) };
        let words = [row.replication_state.as_deref(), row.sync_state.as_deref()];
        let replication = words.into_iter().flatten().map(clean).collect::<Vec<_>>().join(", ");
        table.add_row([
            row.name.to_string(),
            format!("{}:{}", clean(&row.hostname), row.port),
            status,
            clean(&row.role),
            row.replication_delay_bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{bytes} B")),
            if replication.is_empty() { "-".to_owned() } else { replication },
        ]);
    }
    unpad(&mut table);
    lines(&table)
}

fn unpad(table: &mut Table) {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
}

fn lines(table: &Table) -> String {
    table.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `cgi`: a CGI answer with the lines of `/pool_nodes`.
pub fn cgi(snapshot: &Snapshot) -> String {
    format!("Content-Type: text/plain\n\n{}", snapshot.pool_nodes_lines())
}

/// The same for `?format=4.3` and its kin; `Err`: the answer to any other query.
pub fn cgi_as_asked(snapshot: &Snapshot, query: &str) -> Result<String, String> {
    let format = query.split('&').find_map(|word| word.strip_prefix("format="));
    match format {
        None => Ok(cgi(snapshot)),
        Some(format) if pgpool::FORMATS.contains(&format) => {
            Ok(format!("Content-Type: text/plain\n\n{}", snapshot.pool_nodes_lines_of_4_3()))
        }
        Some(_) => {
            let known = pgpool::FORMATS.join(", ");
            Err(cgi_error("400 Bad Request", &format!("format is a version of pgpool-II: one of {known}")))
        }
    }
}

/// A CGI answer that says why there is no other.
pub fn cgi_error(status: &str, text: &str) -> String {
    format!("Status: {status}\nContent-Type: text/plain\n\n{}\n", clean(text))
}
