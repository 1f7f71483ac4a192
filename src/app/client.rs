//! The client side of the verbs: HTTP over the daemon's control socket, and for the verbs that only read the fall-back
//! to `status.listen`.
//!
//! It decides nothing but which question to ask the person at the terminal; every check is the daemon's, which also
//! goes on when this program is gone. [`transport`] speaks HTTP, [`promote`] holds the one dialogue, [`door`] tries the
//! front door, [`after`] says what comes next, [`drill`] moves the service there and back.
//!
//! **Invariant:** a command that reached the daemon and whose end was not seen never ends with exit code 1 ("nothing
//! changed"): its outcome is unknown, so it is 4.

mod after;
mod bar;
mod door;
mod drill;
mod promote;
mod transport;

pub use door::Door;
pub use drill::{DrillArgs, FAILED as DRILL_FAILED, drill};
pub use promote::{Ask, PromoteArgs, ask_on_terminal, promote};

use crate::app::render::check::{Level, Thresholds};
use crate::app::render::{self, Style};
use crate::base::config::Config;
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::base::time::millis;
use crate::engine::status::{EventRow, Snapshot};
use crate::io::clock;
use jiff::Timestamp;
use serde_json::Value;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use transport::{Line, Progress};

/// Time between two pictures of `status --watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Where this node's daemon is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Answers of another node's daemon (one `status.listen` on a shared machine) are refused. `None`: not checked.
    pub node: Option<NodeName>,
    pub control: PathBuf,
    pub status_listen: Option<SocketAddr>,
    /// Tried after a procedure; `None`: not tried.
    pub door: Option<Door>,
}

impl Target {
    /// From the configuration and the node this machine is.
    pub fn new(config: &Config, node: Option<NodeName>) -> Target {
        let control = config.runtime_dir.join("control.sock");
        Target { node, control, status_listen: config.status_listen, door: Some(Door::new(config)) }
    }
}

/// Where a verb writes, and how.
pub struct Out<'a> {
    pub writer: &'a mut (dyn Write + Send),
    pub style: Style,
}

impl Out<'_> {
    /// Writes at once. A reader that has gone away (`| head`) ends the program quietly, as it does for every tool.
    pub fn put(&mut self, text: &str) -> Result<(), Fault> {
        let written = self.writer.write_all(text.as_bytes()).and_then(|()| self.writer.flush());
        written.map_err(|error| Fault::new(ExitCode::Failed, format!("cannot write the answer ({error})")))
    }

    /// One picture of many: on a terminal in the place of the one before, else below it. Each line is overwritten and
    /// then cleared to its end, and nothing is wiped first: no flicker.
    fn picture(&mut self, text: &str) -> Result<(), Fault> {
        if !self.style.terminal {
            return self.put(&format!("{text}\n"));
        }
        self.put(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))
    }

    fn json<T: serde::Serialize>(&mut self, value: &T) -> Result<(), Fault> {
        let text = serde_json::to_string(value)
            .map_err(|error| Fault::new(ExitCode::Failed, format!("the answer is no JSON ({error}); report this")))?;
        self.put(&(text + "\n"))
    }
}

/// The daemon's snapshot: from the socket, else from `status.listen`.
pub async fn snapshot(target: &Target) -> Result<Snapshot, Fault> {
    let body = transport::read(target, "/status.json").await?;
    let snapshot: Snapshot = serde_json::from_slice(&body).map_err(|_| {
        Fault::new(ExitCode::Failed, "the daemon's answer is not understood; are client and daemon of one version?")
    })?;
    match &target.node {
        Some(node) if *node != snapshot.node => Err(Fault::new(
            ExitCode::Failed,
            format!(
                "the daemon of {} answered instead of {node}'s; give --node {} or start {node}'s daemon",
                snapshot.node, snapshot.node
            ),
        )),
        _ => Ok(snapshot),
    }
}

/// `status`. With `watch`, until Ctrl-C: the screen is redrawn on a terminal; in a pipe one picture follows another.
pub async fn status(target: &Target, json: bool, watch: bool, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    if !watch {
        let snapshot = snapshot(target).await?;
        show(&snapshot, json, out)?;
        return Ok(ExitCode::Done);
    }
    let mut stopped = std::pin::pin!(tokio::signal::ctrl_c());
    if out.style.terminal && !json {
        // What stood there before scrolls away rather than being overwritten.
        // Lines too long for the screen are cut there, so that every picture has its place.
        out.put("\x1b[2J\x1b[?7l")?;
    }
    let end = |out: &mut Out<'_>| {
        if out.style.terminal && !json {
            out.put("\x1b[?7h")?;
        }
        Ok(ExitCode::Done)
    };
    loop {
        let answer = tokio::select! {
            answer = snapshot(target) => answer,
            _ = stopped.as_mut() => return end(out),
        };
        match answer {
            Ok(snapshot) if json => out.json(&snapshot)?,
            Err(fault) if json => out.json(&serde_json::json!({"error": fault.text}))?,
            Ok(snapshot) => out.picture(&render::status(&snapshot, out.style))?,
            Err(fault) => out.picture(&format!("portcullis: {}\n", render::clean(&fault.text)))?,
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_EVERY) => {}
            _ = stopped.as_mut() => return end(out),
        }
    }
}

fn show(snapshot: &Snapshot, json: bool, out: &mut Out<'_>) -> Result<(), Fault> {
    if json { out.json(snapshot) } else { out.put(&render::status(snapshot, out.style)) }
}

/// `nodes`; as JSON an array of rows.
pub async fn nodes(target: &Target, json: bool, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    let snapshot = snapshot(target).await?;
    if json {
        out.json(&snapshot.nodes)?
    } else {
        out.put(&render::nodes(&snapshot.nodes, out.style))?
    }
    Ok(ExitCode::Done)
}

/// `events`; as JSON an array, oldest first. `since` as [`parse_since`] reads it.
pub async fn events(target: &Target, since: Option<&str>, json: bool, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    let since = since.map(|text| parse_since(text, Timestamp::now())).transpose()?;
    let all = match since {
        Some(since) => logged(target, since).await?,
        None => snapshot(target).await?.events,
    };
    let late_enough = |event: &&EventRow| match (since, event.at.parse::<Timestamp>()) {
        (Some(since), Ok(at)) => at >= since,
        // An event without a readable time is shown rather than hidden.
        (None, _) | (_, Err(_)) => true,
    };
    let events: Vec<&EventRow> = all.iter().filter(late_enough).collect();
    if json {
        out.json(&events)?;
    } else {
        for event in events {
            out.put(&format!("{}\n", render::event_line(event)))?;
        }
    }
    Ok(ExitCode::Done)
}

/// The event log since then, which reaches further back than a snapshot. An older daemon does not tell it, and one
/// whose disk is full has not written all: what the snapshot has is there in any case.
async fn logged(target: &Target, since: Timestamp) -> Result<Vec<EventRow>, Fault> {
    let snapshot = snapshot(target).await?;
    let body = transport::read(target, &format!("/events.json?since={since}")).await;
    let mut rows: Vec<EventRow> = body.ok().and_then(|body| serde_json::from_slice(&body).ok()).unwrap_or_default();
    let newer: Vec<EventRow> = snapshot.events.into_iter().filter(|event| !rows.contains(event)).collect();
    rows.extend(newer);
    // Times of one form sort as text; those of one second keep their order.
    rows.sort_by(|one, other| one.at.cmp(&other.at));
    Ok(rows)
}

/// `15m`, `2h 30m` (that long ago), `2026-11-20`, `2026-11-20T15:11:00Z` or without the zone, which is then UTC.
pub fn parse_since(text: &str, now: Timestamp) -> Result<Timestamp, Fault> {
    let bad = || {
        let shown = render::clean(text);
        Fault::new(
            ExitCode::Config,
            format!("--since {shown} is no time; write 15m, 2h, 2026-11-20 or 2026-11-20T15:11:00Z"),
        )
    };
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    if let Ok(civil) = text.parse::<jiff::civil::DateTime>() {
        return civil.to_zoned(jiff::tz::TimeZone::UTC).map(|at| at.timestamp()).map_err(|_| bad());
    }
    let ago = humantime::parse_duration(text).map_err(|_| bad())?;
    now.checked_sub(jiff::SignedDuration::try_from(ago).map_err(|_| bad())?).map_err(|_| bad())
}

/// `check`: prints the plugin's line and gives its exit code, 0 to 3. It does not fail: no answer is critical.
pub async fn check(target: &Target, thresholds: &Thresholds, json: bool, out: &mut Out<'_>) -> u8 {
    let (level, line) = match snapshot(target).await {
        Ok(snapshot) => render::check::check(&snapshot, thresholds),
        Err(fault) => render::check::unanswered(&fault.text),
    };
    let said = match json {
        true => out.json(&render::check::as_json(level, &line)),
        false => out.put(&line),
    };
    match said {
        Ok(()) => level.exit(),
        Err(_) => Level::Unknown.exit(),
    }
}

/// `cgi`. `query` is what a web server was asked with, where one asks: it hears of a fault too, as a page.
pub async fn cgi(target: &Target, query: Option<&str>, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    let snapshot = match snapshot(target).await {
        Ok(snapshot) => snapshot,
        Err(fault) => {
            if query.is_some() {
                out.put(&render::cgi_error("503 Service Unavailable", &format!("portcullis: {}", fault.text)))?;
            }
            return Err(fault);
        }
    };
    let answer = render::cgi_as_asked(&snapshot, query.unwrap_or_default());
    out.put(&answer.unwrap_or_else(|refused| refused))?;
    Ok(ExitCode::Done)
}

/// What the daemon said last.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    pub exit: ExitCode,
    pub text: String,
    pub data: Option<Value>,
    /// The very line.
    raw: String,
}

/// Sends a command and hands its lines to `print` as they come; the last one is returned. A fault is an answer that
/// never came or never ended.
async fn command(
    target: &Target,
    verb: &str,
    args: &Value,
    print: &mut (dyn FnMut(&Progress) + Send),
) -> Result<End, Fault> {
    let mut stopped = std::pin::pin!(tokio::signal::ctrl_c());
    let mut stream = transport::send(target, verb, args).await?;
    loop {
        let line = tokio::select! {
            line = stream.next() => line?,
            _ = stopped.as_mut() => return Err(interrupted(verb, args)),
        };
        match line {
            Line::Progress(progress) => print(&progress),
            Line::End(end) => return Ok(end),
        }
    }
}

/// What Ctrl-C means: this program ends, the daemon's work does not.
fn interrupted(verb: &str, args: &Value) -> Fault {
    if args.get("dry_run").and_then(Value::as_bool) == Some(true) {
        return Fault::new(ExitCode::Failed, format!("the dry run of {verb} was broken off; nothing was changed"));
    }
    Fault::new(
        ExitCode::HalfWay,
        format!("{verb} goes on in the daemon; `portcullis status` shows how far it is, {verb} again follows it"),
    )
}

/// A verb without a dialogue, printed to `out`: `fence`, `unfence`, `switchover`, `rejoin`, `pause`, ...
pub async fn run(target: &Target, verb: &str, args: &Value, json: bool, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    let end = printed(target, verb, args, json, out).await?;
    settle(end, json)
}

/// Runs a command with its lines on `out`: the very NDJSON lines with `json`, else sentences with the time since the
/// start. The last sentence is printed too, except that of a failure without `json`, which belongs on standard error.
/// After a procedure that succeeded the front door is tried. A reader of ours that has gone away ends nothing.
async fn printed(target: &Target, verb: &str, args: &Value, json: bool, out: &mut Out<'_>) -> Result<End, Fault> {
    printed_up_to(target, verb, args, json, true, out).await
}

/// [`printed`]; without `last` a success ends in silence: a question follows.
async fn printed_up_to(
    target: &Target,
    verb: &str,
    args: &Value,
    json: bool,
    last: bool,
    out: &mut Out<'_>,
) -> Result<End, Fault> {
    let entered = clock::now();
    let mut lines = Lines::new(out, json);
    let end = command(target, verb, args, &mut |progress| lines.progress(progress)).await;
    lines.close();
    let mut end = match end {
        Ok(end) => end,
        Err(fault) => {
            // A program that reads on finds the end that the daemon did not tell, too.
            lines.fault(&fault, millis(clock::now().since(entered)));
            return Err(fault);
        }
    };
    if last && !json && end.exit == ExitCode::Done && !end.text.is_empty() {
        lines.put(&render::clean(&end.text));
    }
    let nothing_done = end.data.as_ref().and_then(|data| data.get("already_active")).is_some();
    if end.exit == ExitCode::Done && target.door.is_some() && after::is_procedure(verb, args) && !nothing_done {
        let words = tokio::select! {
            words = after::words(target, verb, entered) => words,
            // It is done; only these words are not waited for.
            _ = tokio::signal::ctrl_c() => Vec::new(),
        };
        for (text, data) in words {
            let at_ms = millis(clock::now().since(entered));
            match json {
                true => {
                    lines.last_ms = lines.last_ms.max(at_ms);
                    lines.put(&serde_json::json!({"line": text, "at_ms": lines.last_ms, "data": data}).to_string());
                }
                false => lines.put(&render::clean(&text)),
            }
        }
    }
    if json {
        // By the same clock as the lines before it.
        end.raw = restamped(&end.raw, |at_ms| at_ms.max(lines.last_ms), None);
        lines.put(&end.raw);
    }
    Ok(end)
}

/// The line with another time, and the stage that it belongs to.
fn restamped(raw: &str, at: impl FnOnce(u64) -> u64, stage: Option<&str>) -> String {
    let Ok(Value::Object(mut line)) = serde_json::from_str(raw) else { return raw.to_owned() };
    let at_ms = line.get("at_ms").and_then(Value::as_u64).unwrap_or(0);
    line.insert("at_ms".to_owned(), at(at_ms).into());
    if let Some(stage) = stage {
        line.insert("stage".to_owned(), stage.into());
    }
    Value::Object(line).to_string()
}

/// The lines of a command as they are shown.
struct Lines<'a, 'b> {
    out: &'a mut Out<'b>,
    json: bool,
    /// The last line is one that the next count replaces.
    counting: bool,
    /// Of bytes that are copied.
    bar: bar::Bar,
    /// What belongs to one command of several, and how much later than the first that began.
    stage: Option<(&'static str, u64)>,
    /// The time on the last line for programs.
    last_ms: u64,
}

impl<'a, 'b> Lines<'a, 'b> {
    fn new(out: &'a mut Out<'b>, json: bool) -> Lines<'a, 'b> {
        Lines { out, json, counting: false, bar: bar::Bar::new(), stage: None, last_ms: 0 }
    }

    /// The last line for programs where the daemon's is missing.
    fn fault(&mut self, fault: &Fault, at_ms: u64) {
        if self.json {
            let at_ms = at_ms.max(self.last_ms);
            let exit = crate::app::cli::code(fault.exit);
            self.put(&serde_json::json!({"exit": exit, "text": fault.text, "at_ms": at_ms}).to_string());
        }
    }

    fn put(&mut self, line: &str) {
        drop(self.out.put(&format!("{line}\n")));
    }

    /// One line is rewritten on a terminal; in a pipe a few are left of many.
    fn progress(&mut self, progress: &Progress) {
        if self.json {
            let (stage, later) = self.stage.map_or((None, 0), |(stage, later)| (Some(stage), later));
            self.last_ms = self.last_ms.max(progress.at_ms.saturating_add(later));
            let line = match stage {
                Some(_) => restamped(&progress.raw, |_| self.last_ms, stage),
                None => progress.raw.clone(),
            };
            return self.put(&line);
        }
        let text = render::clean(&progress.text);
        if self.bar.takes(&text, progress.at_ms, progress.data.as_ref()) {
            return;
        }
        let line = format!("{}  {text}", elapsed(progress.at_ms));
        match progress.left_ms {
            Some(_) if self.out.style.terminal => {
                drop(self.out.put(&format!("\r\x1b[K{line}")));
                self.counting = true;
            }
            Some(left) if !is_told_in_a_pipe(left) => {}
            _ => {
                self.close();
                self.put(&line);
            }
        }
    }

    /// What was counted is over: the next line takes its place.
    fn close(&mut self) {
        self.bar.clear();
        if std::mem::take(&mut self.counting) {
            drop(self.out.put("\r\x1b[K"));
        }
    }
}

/// Of the seconds counted down: each of the last three, before that every fifth.
fn is_told_in_a_pipe(left_ms: u64) -> bool {
    let seconds = left_ms / 1000 + 1;
    seconds <= 3 || seconds.is_multiple_of(5)
}

/// The exit code of an end; a failure not yet printed becomes the one line on standard error.
fn settle(end: End, json: bool) -> Result<ExitCode, Fault> {
    if json || end.exit == ExitCode::Done { Ok(end.exit) } else { Err(Fault::new(end.exit, render::clean(&end.text))) }
}

/// `  +0.312 s`: the time since the command was received.
fn elapsed(at_ms: u64) -> String {
    format!("{:>10}", format!("+{}.{:03} s", at_ms / 1000, at_ms % 1000))
}
