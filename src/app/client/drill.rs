//! `drill`: a switchover there and back with a prober running, and what clients would have felt.
//!
//! ```text
//!  checks (a dry run) -> prober answers -> there -> in sync again -> back -> in sync again -> report, event `drill`
//! ```
//!
//! What it is NOT: it never fails over, and it does nothing that two `switchover`s would not do: every check and every
//! act is the daemon's. With `--dsn` the prober of `portcullis probe` reads and writes through the front door; without
//! it only the door itself is tried, which says nothing of sessions and transactions, and the report says so.
//!
//! **Invariant:** whatever goes wrong after the way there has begun, the last sentence says where the service is.

use super::door::Door;
use super::{Lines, Out, Target, command, snapshot};
use crate::app::notices::failures;
use crate::app::probe::{self, LostWrites, ProbeArgs, Summary};
use crate::app::render;
use crate::base::fault::{ExitCode, Fault};
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant, millis};
use crate::engine::status::Snapshot;
use crate::io::clock;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Time from one question of the prober to the next.
const PROBE_EVERY: Duration = Duration::from_millis(50);
/// Good answers before anything is moved: what was never good says nothing when it is bad.
const GOOD_FIRST: usize = 5;
/// How long the prober has for them, and for the first good answer after each way.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// How long the pair has to be in sync again after each way.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// The standby knows by hearsay, a poll or two later, that the pair is in sync: so long nothing is refused for that.
const HEARSAY_LIMIT: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How the event of a drill that did not come to its end begins.
pub const FAILED: &str = "the drill failed";
/// Failures of the past that the report lists.
const FAILURES_LISTED: usize = 3;

/// The flags of `drill`, and what the configuration says.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillArgs {
    /// Where to first; the other voter where nothing is said.
    pub to: Option<NodeName>,
    /// As `probe` takes it.
    pub dsn: Option<String>,
    pub json: bool,
    /// W.
    pub wait: Duration,
    /// The two nodes that the service can be on.
    pub voters: [NodeName; 2],
}

/// Where things stand, for whoever breaks off.
#[derive(Debug, Clone, Default)]
enum Stage {
    #[default]
    Nothing,
    There(NodeName, NodeName),
    Between(NodeName, NodeName),
    Back(NodeName),
}

/// `drill`: there and back, or why not.
///
/// # Errors
/// As of a switchover; after the way there exit code 4, because the service has moved.
pub async fn drill(target: &Target, args: &DrillArgs, out: &mut Out<'_>) -> Result<ExitCode, Fault> {
    let stage = RefCell::new(Stage::Nothing);
    let began = clock::now();
    let done = {
        let mut lines = Lines::new(&mut *out, args.json);
        let whole = there_and_back(target, args, &stage, began, &mut lines);
        tokio::select! {
            // First: a command under way would tell of itself only.
            biased;
            _ = tokio::signal::ctrl_c() => Err(broken_off(&stage.borrow())),
            done = whole => done,
        }
    };
    let at_ms = millis(clock::now().since(began));
    if let Some(fault) = done.as_ref().err().filter(|_| stage.borrow().has_begun()) {
        // For `doctor`; what went wrong is said with or without it.
        let text = format!("{FAILED}: {}", render::clean(&fault.text));
        let _only_for_the_log = command(target, "drilled", &json!({"text": text}), &mut |_| {}).await;
    }
    match done {
        Ok(report) => {
            if args.json {
                let line = json!({
                    "exit": 0, "text": report.headline(), "at_ms": at_ms, "data": {"drill": report.json()},
                });
                out.put(&format!("{line}\n"))?;
            } else {
                out.put(&report.text())?;
            }
            Ok(ExitCode::Done)
        }
        Err(fault) if args.json => {
            let exit = crate::app::cli::code(fault.exit);
            let line = json!({"exit": exit, "text": fault.text, "at_ms": at_ms});
            out.put(&format!("{line}\n"))?;
            Ok(fault.exit)
        }
        Err(fault) => Err(fault),
    }
}

impl Stage {
    fn has_begun(&self) -> bool {
        !matches!(self, Stage::Nothing)
    }
}

fn broken_off(stage: &Stage) -> Fault {
    let text = match stage {
        Stage::Nothing => {
            return Fault::new(ExitCode::Failed, "the drill was broken off; nothing was changed, run it again");
        }
        Stage::There(home, away) => format!(
            "the drill was broken off; the switchover to {away} under way is finished by the daemon; \
             `portcullis switchover --to {home}` brings the service back"
        ),
        Stage::Between(home, away) => format!(
            "the drill was broken off; the service is on {away}; `portcullis switchover --to {home}` brings it back"
        ),
        Stage::Back(home) => {
            format!("the drill was broken off; the switchover back to {home} under way is finished by the daemon")
        }
    };
    Fault::new(ExitCode::HalfWay, text)
}

async fn there_and_back(
    target: &Target,
    args: &DrillArgs,
    stage: &RefCell<Stage>,
    began: Instant,
    lines: &mut Lines<'_, '_>,
) -> Result<Report, Fault> {
    let deadline = clock::now() + HEARSAY_LIMIT;
    let (before, home, away) = loop {
        let before = snapshot(target).await?;
        match ends(&before, args.to.as_ref(), &args.voters) {
            Ok((home, away)) => break (before, home, away),
            Err(fault) if clock::now() >= deadline => return Err(fault),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let entered = |name: &'static str| Some((name, millis(clock::now().since(began))));
    lines.stage = entered("checks");
    let rehearsal = json!({"to": away.as_str(), "dry_run": true});
    let dry = command(target, "switchover", &rehearsal, &mut |progress| lines.progress(progress)).await?;
    if dry.exit != ExitCode::Done {
        return Err(Fault::new(dry.exit, format!("no drill: {}", render::clean(&dry.text))));
    }
    let prober = Prober::start(target, args)?;
    prober.good_since(Instant::ZERO, GOOD_FIRST).await.map_err(|why| {
        let text = format!("no drill: the prober gets no answer through the front door ({why}); nothing was changed");
        Fault::new(ExitCode::Failed, text)
    })?;
    if let Some(fault) = prober.fault().await {
        return Err(fault);
    }

    *stage.borrow_mut() = Stage::There(home.clone(), away.clone());
    lines.stage = entered("there");
    let there = match way(target, &home, &away, &prober, lines).await {
        Ok(there) => there,
        Err((exit, why)) => {
            let text = format!("the way there failed: {why}");
            return Err(Fault::new(exit, located(target, &text, &home).await));
        }
    };
    *stage.borrow_mut() = Stage::Between(home.clone(), away.clone());
    let stuck = |why: String| {
        let text = format!(
            "{why}; the service is on {away}, it was on {home} before: `portcullis switchover --to {home}` brings it \
             back"
        );
        Fault::new(ExitCode::HalfWay, text)
    };
    in_sync(target, &away, &home).await.map_err(|why| stuck(format!("there, but not back: {why}")))?;
    *stage.borrow_mut() = Stage::Back(home.clone());
    lines.stage = entered("back");
    let back = match way(target, &away, &home, &prober, lines).await {
        Ok(back) => back,
        Err((_, why)) => {
            let text = format!("the way back failed: {why}");
            return Err(Fault::new(ExitCode::HalfWay, located(target, &text, &home).await));
        }
    };
    let now = in_sync(target, &home, &away).await;
    let now = match now {
        Ok(now) => now,
        // It is where it was; that it is not in sync is part of the report.
        Err(_) => snapshot(target).await?,
    };
    let summary = prober.finish().await?;
    let failures = failures(&before.events);
    let failures = failures.into_iter().rev().take(FAILURES_LISTED).map(render::event_line).collect();
    let in_sync = now.replication.in_sync;
    let report = Report { home, away, there, back, summary, in_sync, wait: args.wait, failures };
    // The report stands without it.
    let _only_for_the_log = command(target, "drilled", &json!({"text": report.headline()}), &mut |_| {}).await;
    Ok(report)
}

/// From where to where.
fn ends(now: &Snapshot, to: Option<&NodeName>, voters: &[NodeName; 2]) -> Result<(NodeName, NodeName), Fault> {
    let refused = |text: String| Fault::new(ExitCode::Refused, format!("no drill: {text}"));
    let [one, two] = voters;
    if let Some(name) = [Some(&now.node), to].into_iter().flatten().find(|name| !voters.contains(name)) {
        return Err(refused(format!("{name} is no voter; a drill goes there and back between {one} and {two}, there")));
    }
    let Some(home) = now.active_node().cloned() else {
        return Err(refused("no node is active as far as this one knows; look at `portcullis status`".to_owned()));
    };
    // Further standbys have no vote, and the service never goes there.
    let other = if home == *one { two } else { one };
    let away = to.unwrap_or(other).clone();
    if away == home {
        return Err(refused(format!("{away} is active already; name the standby")));
    }
    if now.replication.mode == "synchronous" && !now.replication.in_sync {
        let text = format!("{away} is not in sync with {home}; a drill begins in sync, see `portcullis status`");
        return Err(refused(text));
    }
    Ok((home, away))
}

/// What one way cost.
#[derive(Debug, Clone, PartialEq)]
struct Way {
    gap: Duration,
    errors: usize,
    first_error: Option<String>,
}

impl Way {
    fn text(&self) -> String {
        let errors = match (&self.first_error, self.errors) {
            (Some(first), n) => format!("{n} errors, the first: {first}"),
            (None, _) => "0 errors".to_owned(),
        };
        format!("{} ms without an answer, {errors}", millis(self.gap))
    }

    fn json(&self) -> Value {
        json!({"gap_ms": millis(self.gap), "errors": self.errors, "first_error": self.first_error})
    }
}

async fn way(
    target: &Target,
    from: &NodeName,
    to: &NodeName,
    prober: &Prober,
    lines: &mut Lines<'_, '_>,
) -> Result<Way, (ExitCode, String)> {
    if !lines.json {
        lines.put(&format!("{from} to {to}:"));
    }
    let began = clock::now();
    let mut print = |progress: &super::Progress| lines.progress(progress);
    let end = command(target, "switchover", &json!({"to": to.as_str(), "dry_run": false}), &mut print).await;
    let end = end.map_err(|fault| (fault.exit, fault.text))?;
    if end.exit != ExitCode::Done {
        return Err((end.exit, render::clean(&end.text)));
    }
    let ended = clock::now();
    let unanswered = |why| (ExitCode::HalfWay, format!("{to} is active, but the prober gets no answer ({why})"));
    prober.good_since(ended, 1).await.map_err(unanswered)?;
    Ok(prober.way(began))
}

/// Waits until the pair is as it was with `active` serving.
async fn in_sync(target: &Target, active: &NodeName, other: &NodeName) -> Result<Snapshot, String> {
    let deadline = clock::now() + SYNC_LIMIT;
    loop {
        let why = match snapshot(target).await {
            Ok(now) => {
                let replication = &now.replication;
                let standby = || now.nodes.iter().any(|r| r.name == *other && r.role == "standby" && r.attached);
                let ready = replication.in_sync || replication.mode != "synchronous" && standby();
                if now.active_node() == Some(active) && ready {
                    return Ok(now);
                }
                format!("the pair is not in sync after {} s", SYNC_LIMIT.as_secs())
            }
            Err(fault) => fault.text,
        };
        if clock::now() >= deadline {
            return Err(why);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The same sentence, with where the service is now.
async fn located(target: &Target, text: &str, home: &NodeName) -> String {
    // The nodes hear each other once a poll.
    tokio::time::sleep(Duration::from_secs(1)).await;
    match snapshot(target).await.ok().and_then(|now| now.active_node().cloned()) {
        Some(active) if active == *home => format!("{text}; the service is on {home}, as before the drill"),
        Some(active) => {
            format!("{text}; the service is on {active}: `portcullis switchover --to {home}` brings it back")
        }
        None => format!("{text}; no node says that it serves: look at `portcullis status` on both"),
    }
}

/// The end of a drill.
struct Report {
    home: NodeName,
    away: NodeName,
    there: Way,
    back: Way,
    /// `None`: only the door was measured.
    summary: Option<Summary>,
    in_sync: bool,
    wait: Duration,
    failures: Vec<String>,
}

impl Report {
    fn headline(&self) -> String {
        let (home, away) = (&self.home, &self.away);
        let what = if self.summary.is_some() { "" } else { " (the door alone)" };
        format!("drill{what}: {home} to {away}: {}; and back: {}", self.there.text(), self.back.text())
    }

    fn text(&self) -> String {
        let mut text = self.headline() + "\n";
        text += &match &self.summary {
            Some(summary) => {
                let lost = match &summary.lost {
                    LostWrites::Known { missing } => format!("{} lost", missing.len()),
                    LostWrites::Unknown { why } => format!("whether any is lost is unknown: {why}"),
                };
                format!("writes: {} acknowledged, {lost}\n", summary.acknowledged)
            }
            None => "only the door was measured, without a login; --dsn measures reads and writes\n".to_owned(),
        };
        let wait = self.wait.as_secs_f64();
        text += &if self.in_sync {
            format!("a real failover now would lose nothing: in sync; it would wait W = {wait:.2} s\n")
        } else {
            format!(
                "a real failover now MAY LOSE what was acknowledged last: not in sync; it would wait W = {wait:.2} s\n"
            )
        };
        if self.failures.is_empty() {
            text += "no failure among the events remembered here\n";
        } else {
            text += &format!("the last failures before it:\n  {}\n", self.failures.join("\n  "));
        }
        text
    }

    fn json(&self) -> Value {
        let writes = self.summary.as_ref().map(|summary| {
            let lost = match &summary.lost {
                LostWrites::Known { missing } => Some(missing.len()),
                LostWrites::Unknown { .. } => None,
            };
            json!({"acknowledged": summary.acknowledged, "lost": lost})
        });
        json!({
            "from": self.home, "to": self.away, "there": self.there.json(), "back": self.back.json(),
            "writes": writes, "in_sync": self.in_sync, "wait_ms": millis(self.wait), "failures": self.failures,
        })
    }
}

/// One answer through the front door, or its absence.
#[derive(Debug, Clone)]
struct Seen {
    at: Instant,
    good: bool,
    error: Option<String>,
}

#[derive(Debug, Clone, Default)]
struct Sightings(Arc<Mutex<Vec<Seen>>>);

impl Sightings {
    fn all(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, good: bool, error: Option<String>) {
        self.all().push(Seen { at: clock::now(), good, error });
    }
}

/// The longest time between two good answers of which the later came after `began`, and the errors since.
fn measure(seen: &[Seen], began: Instant) -> Way {
    let mut last: Option<Instant> = None;
    let mut way = Way { gap: Duration::ZERO, errors: 0, first_error: None };
    for one in seen {
        if one.good {
            if let Some(last) = last.filter(|_| one.at >= began) {
                way.gap = way.gap.max(one.at.since(last));
            }
            last = Some(one.at);
        } else if one.at >= began {
            way.errors += 1;
            if way.first_error.is_none() {
                way.first_error = Some(one.error.clone().unwrap_or_else(|| "no answer".to_owned()));
            }
        }
    }
    way
}

/// `probe` with its lines read here instead of printed: one JSON object a tick.
struct Listening {
    seen: Sightings,
    line: Vec<u8>,
}

impl Write for Listening {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let tick = serde_json::from_slice::<Value>(&self.line).unwrap_or_default();
            self.line.clear();
            // The summary at the end is no tick.
            if tick.get("tick").is_some() {
                let error = tick.get("error").and_then(Value::as_str).map(str::to_owned);
                let good = ["health", "select", "update"].iter().all(|kind| tick.get(kind) == Some(&Value::Bool(true)));
                self.seen.add(good, error);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

type Probing = JoinHandle<Result<Option<Summary>, Fault>>;

struct Prober {
    seen: Sightings,
    stop: RefCell<Option<oneshot::Sender<()>>>,
    task: RefCell<Option<Probing>>,
}

impl Drop for Prober {
    fn drop(&mut self) {
        if let Some(task) = self.task.borrow_mut().take() {
            task.abort();
        }
    }
}

impl Prober {
    fn start(target: &Target, args: &DrillArgs) -> Result<Prober, Fault> {
        let seen = Sightings::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = match (&args.dsn, target.door.clone()) {
            (Some(dsn), _) => {
                let probe = ProbeArgs { interval: PROBE_EVERY, json: true, ..ProbeArgs::new(dsn.clone()) };
                let mut listening = Listening { seen: seen.clone(), line: Vec::new() };
                tokio::spawn(async move {
                    let stop = async { drop(stopped.await) };
                    probe::run(&probe, &mut listening, stop).await.map(Some)
                })
            }
            (None, Some(door)) => tokio::spawn(knocking(door, seen.clone(), stopped)),
            (None, None) => return Err(Fault::new(ExitCode::Config, "no front door is configured; give --dsn")),
        };
        Ok(Prober { seen, stop: RefCell::new(Some(stop)), task: RefCell::new(Some(task)) })
    }

    /// Waits for so many good answers after this moment.
    async fn good_since(&self, since: Instant, many: usize) -> Result<(), String> {
        let deadline = clock::now() + ANSWER_LIMIT;
        loop {
            {
                let seen = self.seen.all();
                if seen.iter().filter(|one| one.good && one.at >= since).count() >= many {
                    return Ok(());
                }
                if clock::now() >= deadline {
                    let last = seen.last().and_then(|one| one.error.clone());
                    return Err(last.unwrap_or_else(|| "no answer".to_owned()));
                }
            }
            if self.task.borrow().as_ref().is_some_and(JoinHandle::is_finished) {
                return Err(self.fault().await.map_or_else(|| "it ended".to_owned(), |fault| fault.text));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Why it ended by itself, if it did.
    async fn fault(&self) -> Option<Fault> {
        let ended = self.task.borrow().as_ref().is_some_and(JoinHandle::is_finished);
        let task = if ended { self.task.borrow_mut().take() } else { None };
        task?.await.ok()?.err()
    }

    fn way(&self, began: Instant) -> Way {
        measure(&self.seen.all(), began)
    }

    /// Ends it; what `probe` found where it ran.
    async fn finish(&self) -> Result<Option<Summary>, Fault> {
        if let Some(stop) = self.stop.borrow_mut().take() {
            let _ended_before = stop.send(());
        }
        let task = self.task.borrow_mut().take();
        match task {
            Some(task) => task.await.unwrap_or(Ok(None)),
            None => Ok(None),
        }
    }
}

/// The door alone, until told to stop.
async fn knocking(door: Door, seen: Sightings, mut stopped: oneshot::Receiver<()>) -> Result<Option<Summary>, Fault> {
    loop {
        let answer = door.answers().await;
        seen.add(answer.is_ok(), answer.err());
        tokio::select! {
            _ = &mut stopped => return Ok(None),
            () = tokio::time::sleep(PROBE_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests;
