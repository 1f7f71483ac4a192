//! The page for people: one HTML document, drawn from one snapshot and the last hour, plots included, so that it says
//! all it says without script. With script it stays up to date by [`live`](super::live), which sends the same sections.
//!
//! Style and script stand in the page, and the policy allows exactly these two by their hashes; nothing is asked of any
//! other host.

use super::history::Sample;
use super::plot::{Line, Plot, SPAN};
use crate::engine::outlook::human_bytes;
use crate::engine::status::{EventRow, GateState, NodeRow, Role, Snapshot, VerdictWord, human_ms};
use askama::Template;
use std::sync::LazyLock;

/// Also the text between the tags: the hash must be of these very bytes.
const STYLE: &str = include_str!("../../../templates/page/page.css");
const SCRIPT: &str = include_str!("../../../templates/page/page.js");
pub(super) const ICON: &str = include_str!("../../../templates/page/icon.svg");

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        data_encoding::BASE64.encode(digest.as_ref())
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(STYLE),
        hash(SCRIPT)
    )
});

const KIB: f64 = 1024.0;

/// Events on the page, newest first; the rest is in `portcullis events`.
const EVENTS: usize = 30;

pub(super) fn content_security_policy() -> &'static str {
    POLICY.as_str()
}

/// The page in parts, in their order: what is between the tags of each `section`, by its id.
pub(super) type Sections = Vec<(&'static str, String)>;

#[derive(Template)]
#[template(path = "page/page.html")]
struct Page<'a> {
    style: &'static str,
    script: &'static str,
    title: String,
    sections: &'a Sections,
}

#[derive(Template)]
#[template(path = "page/verdict.html")]
struct Verdict<'a> {
    s: &'a Snapshot,
    word: &'static str,
    /// `good`, `warn`, `bad` or `calm`.
    mood: &'static str,
    at: String,
    headline: String,
    /// HTML.
    why: Vec<String>,
    outlook_mood: &'static str,
    outlook_mark: &'static str,
    outlook_word: String,
    advice: Option<&'a str>,
}

#[derive(Template)]
#[template(path = "page/proof.html")]
struct Proof<'a> {
    s: &'a Snapshot,
    lease: String,
    lease_all: String,
    lease_ms: u64,
    lease_mood: &'static str,
    /// Who holds the VIP where it is not bound here.
    holder: Option<String>,
}

#[derive(Template)]
#[template(path = "page/replication.html")]
struct Replication<'a> {
    s: &'a Snapshot,
    /// HTML.
    state: String,
    lag: String,
    plots: Vec<String>,
    since: String,
}

#[derive(Template)]
#[template(path = "page/nodes.html")]
struct Nodes<'a> {
    s: &'a Snapshot,
    rows: Vec<Row<'a>>,
}

struct Row<'a> {
    row: &'a NodeRow,
    weight: String,
    delay: String,
    replication: String,
}

#[derive(Template)]
#[template(path = "page/load.html")]
struct Load<'a> {
    s: &'a Snapshot,
    paused: String,
    plots: Vec<String>,
}

#[derive(Template)]
#[template(path = "page/events.html")]
struct Events<'a> {
    /// With whether it is one to worry about.
    events: Vec<(&'a EventRow, bool)>,
}

/// HTML of an age that the script counts on: `0.3 s ago`, or a word when there was never anything.
fn ago(age_ms: &Option<u64>) -> String {
    match age_ms {
        Some(age) => format!("<span data-age=\"{age}\">{} ago</span>", human_ms(*age)),
        None => "never".to_owned(),
    }
}

/// HTML of what a server says: a mark, the word, and what it means.
fn verdict(word: &VerdictWord) -> &'static str {
    match word {
        VerdictWord::Here => "✓ here <span class=\"dim\">(this node)</span>",
        VerdictWord::Elsewhere => "→ elsewhere <span class=\"dim\">(not this node)</span>",
        VerdictWord::Nothing => "<span class=\"bad\">✗ nothing</span> <span class=\"dim\">(no node)</span>",
        VerdictWord::Silent => "<span class=\"bad\">… silent</span>",
    }
}

/// `2026-11-20 15:11:00` of an RFC 3339 time.
fn clock(at: &str) -> String {
    at.replace('T', " ").trim_end_matches('Z').to_owned()
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A procedure moves the service, and for the moment it is not served here.
fn moves(s: &Snapshot) -> bool {
    !s.gate.open && s.procedure.as_ref().is_some_and(|procedure| procedure.kind != "rejoin")
}

/// The word of the badge, and the mood.
fn badge(s: &Snapshot) -> (&'static str, &'static str) {
    match (s.role, s.gate.state) {
        _ if !s.turn_running => ("DAEMON HANGS", "bad"),
        _ if s.vips.iter().any(|vip| vip.conflict.is_some()) => ("CONFLICT", "bad"),
        _ if moves(s) => ("SWITCHING", "calm"),
        (Role::Active, GateState::Open) if s.outlook.safe => ("ACTIVE", "good"),
        (Role::Active, GateState::Open) => ("ACTIVE, NO SAFE FAILOVER", "warn"),
        (Role::Active, GateState::Paused) => ("ACTIVE, PAUSED", "warn"),
        (Role::Active, _) => ("ACTIVE, GATE NOT OPEN", "bad"),
        (Role::Fenced, _) | (_, GateState::Fenced) => ("FENCED", "bad"),
        (_, GateState::Lapsed) => ("LAPSED", "bad"),
        (Role::Passive, _) if s.active_node().is_some() && s.postgres.streaming => ("PASSIVE", "calm"),
        (Role::Passive, _) if s.active_node().is_some() => ("PASSIVE, NOT STREAMING", "warn"),
        (Role::Passive, _) => ("PASSIVE, NOBODY KNOWN TO SERVE", "bad"),
    }
}

/// Why it is so, as HTML.
fn why(s: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    if moves(s) {
        lines.push(escape(&s.headline()));
    }
    if !s.turn_running {
        lines.push(
            "<strong class=\"bad\">The daemon's turn does not run: what stands here is of its last one.</strong>"
                .to_owned(),
        );
    }
    if s.role == Role::Active && s.gate.open {
        let mut proofs = Vec::new();
        if let Some(witness) = &s.witness {
            let here = witness.servers.iter().filter(|server| server.verdict == VerdictWord::Here);
            proofs.extend(here.map(|server| format!("{} names it ({})", escape(&server.server), ago(&server.age_ms))));
        }
        if let Some(peer) = s.peer.as_ref().filter(|peer| peer.reachable) {
            proofs.push(format!("{} answers ({})", escape(peer.name.as_str()), ago(&peer.age_ms)));
        }
        if let Some(name) = s.vip_witness.as_ref().and_then(|witness| witness.witness.as_ref()) {
            proofs.push(format!("VIP witness {} answers", escape(name)));
        }
        if !proofs.is_empty() {
            lines.push(format!("Proof: {}.", proofs.join("; ")));
        }
    }
    if s.active_node().is_none() && !moves(s) && matches!(s.gate.state, GateState::Lapsed | GateState::Fenced) {
        lines.push("From here nobody is known to serve.".to_owned());
    }
    if let Some(event) = s.since() {
        lines.push(format!(
            "Since <time datetime=\"{}\">{} UTC</time>: {}",
            escape(&event.at),
            escape(&clock(&event.at)),
            escape(&event.text)
        ));
    }
    lines
}

fn first_section(s: &Snapshot) -> Verdict<'_> {
    let (word, mood) = badge(s);
    let lost = s.outlook.lost.filter(|_| !s.outlook.safe);
    let (outlook_mood, outlook_mark, outlook_word) = match (s.outlook.safe, lost) {
        (true, _) => ("good", "✓", "Nothing would be lost.".to_owned()),
        (false, Some(0)) => ("warn", "!", "Nothing is missing now, but nothing promises it.".to_owned()),
        (false, Some(1)) => ("bad", "✗", "About 1 transaction would be lost.".to_owned()),
        (false, Some(count)) => ("bad", "✗", format!("About {count} transactions would be lost.")),
        (false, None) if s.procedure.is_some() => ("warn", "?", "Not known at this moment.".to_owned()),
        (false, None) => ("warn", "?", "Not safe: nobody can promise that nothing would be lost.".to_owned()),
    };
    // Said already, where it is the command.
    let said = s.next.as_ref().map(|next| next.command.as_str());
    let advice = s.advice.as_deref().filter(|advice| said.is_none_or(|command| !advice.starts_with(command)));
    Verdict {
        s,
        word,
        mood,
        at: clock(&s.at).split_once(' ').map_or_else(String::new, |(_, time)| time.to_owned()),
        headline: match &s.procedure {
            Some(p) if moves(s) => format!("{} is under way on {}: {}", p.kind, s.node, p.step),
            _ => s.headline(),
        },
        why: why(s),
        outlook_mood,
        outlook_mark,
        outlook_word,
        advice,
    }
}

fn proof(s: &Snapshot) -> Proof<'_> {
    let left = s.gate.lease_remaining_ms;
    Proof {
        s,
        lease: match left {
            0 if s.role == Role::Passive && s.gate.state == GateState::Shut => {
                "none: only the active node holds one".to_owned()
            }
            0 => "none".to_owned(),
            left => format!("{} left", human_ms(left)),
        },
        lease_all: human_ms(s.lease_ms),
        // No bar where there is none to run down.
        lease_ms: if left == 0 && matches!(s.gate.state, GateState::Shut | GateState::Fenced) { 0 } else { s.lease_ms },
        lease_mood: if left * 3 > s.lease_ms { "good" } else { "bad" },
        holder: s.active_node().filter(|name| **name != s.node).map(ToString::to_string),
    }
}

/// The state of replication, as HTML.
fn state(s: &Snapshot) -> String {
    let replication = &s.replication;
    let mode = escape(&replication.mode);
    match (&replication.alone_since, &replication.waiting_since) {
        _ if replication.in_sync => format!("✓ {mode}, in sync: commits wait until the standby has them"),
        (_, Some(since)) => {
            let since = escape(&clock(since));
            format!("<strong class=\"bad\">✗ commits wait</strong>: the standby has been silent since {since} UTC")
        }
        (Some(since), _) => {
            let since = escape(&clock(since));
            let active = s.active_node().map_or_else(|| "the active node".to_owned(), |name| escape(name.as_str()));
            format!(
                "<strong class=\"bad\">✗ alone since {since} UTC</strong>: {active} does not wait for a standby \
                 ({mode} by configuration)"
            )
        }
        (None, None) if replication.mode == "synchronous" => {
            format!("<strong class=\"bad\">✗ not in sync</strong> ({mode} by configuration)")
        }
        (None, None) => format!("{mode}: the last transactions may be missing on a standby"),
    }
}

/// A number of the ring as a plot's.
fn float(value: u64) -> f64 {
    // Beyond 2^53 a plot of an hour shows no difference.
    #[allow(clippy::cast_precision_loss)]
    let value = value as f64;
    value
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Never negative; saturates.
fn whole(value: f64) -> u64 {
    value.round() as u64
}

/// Times of day at the ends and in the middle of a plot.
fn times(s: &Snapshot) -> [String; 3] {
    let Ok(now) = s.at.parse::<jiff::Timestamp>() else {
        return ["an hour ago".to_owned(), "half an hour ago".to_owned(), "now".to_owned()];
    };
    let back = |seconds: i64| {
        let then = now.checked_sub(jiff::SignedDuration::from_secs(seconds)).unwrap_or(now);
        let text = format!("{then:.0}");
        text.get(11..16).unwrap_or_default().to_owned()
    };
    let span = i64::try_from(SPAN).unwrap_or(0);
    [back(span), back(span / 2), format!("{} UTC", back(0))]
}

type Pick = fn(&Sample) -> Option<f64>;

struct Hour<'a> {
    samples: &'a [Sample],
    times: [String; 3],
}

impl Hour<'_> {
    fn plot(
        &self,
        title: &'static str,
        least_top: f64,
        human: &dyn Fn(f64) -> String,
        lines: &[(&'static str, Pick)],
    ) -> String {
        let lines = lines.iter().map(|(name, pick)| Line {
            name,
            points: self.samples.iter().filter_map(|sample| Some((sample.t, pick(sample)?))).collect(),
        });
        let end = self.samples.last().map_or(0, |sample| sample.t);
        // The least top of bytes is one of theirs.
        let unit = if (least_top - KIB).abs() < 1.0 { KIB } else { 1.0 };
        Plot { title, human, unit, end, times: self.times.clone(), least_top, lines: lines.collect() }.svg()
    }
}

fn replication<'a>(s: &'a Snapshot, hour: &Hour<'_>) -> Replication<'a> {
    let bytes = |value: f64| human_bytes(whole(value));
    let seconds = |value: f64| human_ms(whole(value));
    let lag = match &s.lag {
        None => "not known".to_owned(),
        Some(lag) => {
            let time = lag.ms.map_or_else(String::new, |ms| format!(", {}", human_ms(ms)));
            let away = if lag.away { " (it is not connected: counted from where it was last seen)" } else { "" };
            format!("{} is {}{time} behind{away}", lag.node, human_bytes(lag.bytes))
        }
    };
    let kept = hour.samples.len();
    Replication {
        s,
        state: state(s),
        lag,
        plots: vec![
            hour.plot("lag in bytes", KIB, &bytes, &[("", |sample| sample.lag_bytes.map(float))]),
            hour.plot("lag in seconds", 1000.0, &seconds, &[("", |sample| sample.lag_ms.map(float))]),
        ],
        since: match hour.samples.first() {
            _ if kept >= super::history::KEPT => "The last hour; every point is the highest of 10 s.".to_owned(),
            Some(first) => {
                format!("Since the daemon started ({} UTC); every point is the highest of 10 s.", clock(&first.at))
            }
            None => "The daemon has only just started: the plots begin 10 s after that.".to_owned(),
        },
    }
}

fn nodes(s: &Snapshot) -> Nodes<'_> {
    let rows = s.nodes.iter().map(|row| Row {
        row,
        weight: format!("{:.2}", row.weight),
        delay: row.replication_delay_bytes.map_or_else(String::new, human_bytes),
        replication: [row.replication_state.as_deref(), row.sync_state.as_deref()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", "),
    });
    Nodes { s, rows: rows.collect() }
}

fn load<'a>(s: &'a Snapshot, hour: &Hour<'_>) -> Load<'a> {
    let count = |value: f64| format!("{value:.0}");
    let rate = |value: f64| if value < 10.0 { format!("{value:.1}/s") } else { format!("{value:.0}/s") };
    let bytes = |value: f64| format!("{}/s", human_bytes(whole(value)));
    let mut plots = vec![
        hour.plot("sessions", 10.0, &count, &[("", |sample| Some(float(sample.sessions)))]),
        hour.plot("transactions that write", 10.0, &rate, &[("", |sample| sample.writes_per_s)]),
        hour.plot(
            "bytes from and to clients",
            KIB,
            &bytes,
            &[("from (line)", |sample| sample.received_bytes_per_s), ("to (dashes)", |sample| sample.sent_bytes_per_s)],
        ),
    ];
    if hour.samples.iter().any(|sample| sample.transactions_per_s.is_some_and(|rate| rate > 0.0)) {
        plots.push(hour.plot("transactions through the pool", 10.0, &rate, &[("", |s| s.transactions_per_s)]));
    }
    Load { s, paused: s.paused_databases.join(", "), plots }
}

/// Is it one to look at? Only how it is shown hangs on this.
fn is_grave(kind: &str) -> bool {
    let words = ["failed", "conflict", "lost", "fenced", "gate_cut", "alone", "postgres_down", "commits_wait"];
    words.iter().any(|word| kind.contains(word)) || kind.starts_with("record_") || kind == "diverged"
}

fn events(s: &Snapshot) -> Events<'_> {
    let newest = s.events.iter().rev().take(EVENTS);
    Events { events: newest.map(|event| (event, is_grave(&event.kind))).collect() }
}

/// What the browser's tab says.
pub(super) fn title(snapshot: &Snapshot) -> String {
    let (word, _) = badge(snapshot);
    format!("{}: {}", snapshot.node, word.to_lowercase())
}

/// Every section.
pub(super) fn sections(snapshot: &Snapshot, samples: &[Sample]) -> askama::Result<Sections> {
    let hour = Hour { samples, times: times(snapshot) };
    Ok(vec![
        ("verdict", first_section(snapshot).render()?),
        ("proof", proof(snapshot).render()?),
        ("replication", replication(snapshot, &hour).render()?),
        ("nodes", nodes(snapshot).render()?),
        ("load", load(snapshot, &hour).render()?),
        ("events", events(snapshot).render()?),
    ])
}

/// The whole page around its sections.
pub(super) fn document(title: &str, sections: &Sections) -> askama::Result<String> {
    Page { style: STYLE, script: SCRIPT, title: title.to_owned(), sections }.render()
}
