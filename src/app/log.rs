//! The log of a server: one line for each event, written by a thread of its own ([`Lines`]), in the form that its
//! reader knows best.
//!
//! ```text
//!  tracing event -> Record -> queue -> repeats held back -> text | JSON | journald's native protocol
//! ```
//!
//! Under systemd (`JOURNAL_STREAM` names our standard error) each line is a journal entry with fields of its own:
//! `PORTCULLIS_EVENT`, `PORTCULLIS_NODE`, `PORTCULLIS_EPOCH`, `PRIORITY`. The crate `tracing-journald` would do that on
//! the thread that has something to say, and block it while journald is stuck.
//!
//! What it is NOT: the event log, which `events` shows; that has every event, however often it comes.
//!
//! **Invariants:** nobody who logs waits. A line equal to one of the last minute is counted, not written, and the
//! count is told when the minute is over; but each cut and each opening of the gate, each fence and each command leaves
//! a line of its own (C20).

mod journal;

use super::lines::{Lines, Sink, lost_text};
use super::notices::{Severity, severity};
use super::render::clean;
use crate::base::time::{Duration, Instant};
use crate::io::clock;
use journal::Journal;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fmt::{Debug, Write as _};
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// A line like one of this time is held back.
const WINDOW: Duration = Duration::from_secs(60);
/// Lines remembered for that; the one not heard of for longest is forgotten first.
const REMEMBERED: usize = 512;
/// Events of which each leaves its line (C20), and what people did.
const EACH: [&str; 5] = ["gate_opened", "gate_cut", "gate_suspended", "fenced", "command"];

static NODE: OnceLock<String> = OnceLock::new();
static LINES: OnceLock<Lines<Record>> = OnceLock::new();
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// Whose log this is, for its fields.
pub fn of_node(name: &str) {
    // Said once for the process.
    let _ = NODE.set(name.to_owned());
}

/// The epoch that lines are logged in from now on.
pub fn at_epoch(epoch: u64) {
    EPOCH.store(epoch, Ordering::Relaxed);
}

/// One line, not yet in any form.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    at: jiff::Timestamp,
    level: Level,
    target: String,
    message: String,
    /// Name, value, and whether the value is a string.
    fields: Vec<(&'static str, String, bool)>,
    epoch: u64,
}

impl Record {
    /// The kind of the event that this line is of.
    fn kind(&self) -> Option<&str> {
        self.fields.iter().find(|(name, ..)| *name == "kind").map(|(_, kind, _)| kind.as_str())
    }

    fn key(&self) -> String {
        format!("{} {} {:?}", self.level, self.message, self.fields)
    }

    /// syslog's number.
    fn priority(&self) -> u8 {
        match (self.level, self.kind().and_then(severity)) {
            (Level::ERROR, _) | (_, Some(Severity::Critical)) => 3,
            (Level::WARN, _) | (_, Some(Severity::Warning)) => 4,
            (_, Some(Severity::Info)) => 5,
            (Level::INFO, None) => 6,
            _ => 7,
        }
    }

    /// `message name=value`, as a line without its time.
    fn words(&self) -> String {
        let mut out = clean(&self.message);
        for (name, value, is_text) in &self.fields {
            let value = clean(value);
            let _never_fails = match is_text {
                true => write!(out, " {name}={value:?}"),
                false => write!(out, " {name}={value}"),
            };
        }
        out
    }

    fn text(&self, color: bool) -> String {
        let level = format!("{:>5}", self.level.as_str());
        let (at, words) = (format!("{:.6}", self.at), self.words());
        if !color {
            return format!("{at} {level} {words}\n");
        }
        let paint = match self.level {
            Level::ERROR => 31,
            Level::WARN => 33,
            Level::INFO => 32,
            _ => 34,
        };
        format!("\x1b[2m{at}\x1b[0m \x1b[{paint}m{level}\x1b[0m {words}\n")
    }

    fn json(&self) -> String {
        let mut fields = Map::new();
        fields.insert("message".to_owned(), Value::String(self.message.clone()));
        for (name, value, is_text) in &self.fields {
            let number = (!is_text).then(|| value.parse::<i64>().ok()).flatten();
            fields.insert((*name).to_owned(), number.map_or_else(|| json!(value), |number| json!(number)));
        }
        let (at, level) = (format!("{:.6}", self.at), self.level.as_str());
        let line = json!({
            "timestamp": at, "level": level, "fields": fields, "target": self.target,
            "node": NODE.get(), "epoch": self.epoch,
        });
        format!("{line}\n")
    }
}

/// The fields of one event.
struct Fields(Record);

impl Fields {
    fn put(&mut self, field: &Field, value: String, is_text: bool) {
        match field.name() {
            "message" => self.0.message = value,
            // Of the crate `log`, which rustls speaks.
            "log.target" => self.0.target = value,
            name if name.starts_with("log.") => {}
            name => self.0.fields.push((name, value, is_text)),
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned(), true);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}"), false);
    }
}

/// Hands what is logged to the writer's thread.
struct Hand(Lines<Record>);

impl<S: Subscriber> Layer<S> for Hand {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        let mut fields = Fields(Record {
            at: clock::wall(),
            level: *meta.level(),
            target: meta.target().to_owned(),
            message: String::new(),
            fields: Vec::new(),
            epoch: EPOCH.load(Ordering::Relaxed),
        });
        event.record(&mut fields);
        self.0.put(fields.0);
    }
}

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text { color: bool },
    Json,
}

/// Begins to write what was logged: not before the process is the user it will be.
///
/// # Errors
/// The system gives no thread.
pub fn begin() -> std::io::Result<()> {
    LINES.get().map_or(Ok(()), Lines::begin)
}

/// The log of a server and where events go. Lines wait until [`begin`].
pub fn start<S: Subscriber>(form: Form) -> (Lines<Record>, impl Layer<S>) {
    // Who asked for JSON gets JSON.
    let journal = if form == Form::Json { None } else { Journal::of_stderr() };
    let out = match journal {
        Some(journal) => Out::Journal(journal),
        None => Out::Stderr(form),
    };
    let lines = Lines::prepare("log", Writer { out, repeats: Repeats::default() });
    // One log for each process.
    let _ = LINES.set(lines.clone());
    (lines.clone(), Hand(lines))
}

enum Out {
    Stderr(Form),
    Journal(Journal),
}

impl Out {
    fn put(&self, record: &Record) {
        let line = match self {
            Out::Stderr(Form::Text { color }) => record.text(*color),
            Out::Stderr(Form::Json) => record.json(),
            Out::Journal(journal) => match journal.send(record, NODE.get().map(String::as_str)) {
                Ok(()) => return,
                // journald is being restarted; what it reads from our standard error it reads later.
                Err(_) => format!("<{}>{}\n", record.priority(), record.words()),
            },
        };
        let _reader_gone = std::io::stderr().lock().write_all(line.as_bytes());
    }
}

struct Writer {
    out: Out,
    repeats: Repeats,
}

impl Sink<Record> for Writer {
    fn write(&mut self, record: Record) {
        let (out, now) = (&self.out, clock::now());
        self.repeats.pass(record, now, &mut |record| out.put(record));
    }

    fn lost(&mut self, missing: u64) {
        self.out.put(&Record {
            at: clock::wall(),
            level: Level::WARN,
            target: "portcullis::app::log".to_owned(),
            message: lost_text(missing).trim_end().to_owned(),
            fields: Vec::new(),
            epoch: EPOCH.load(Ordering::Relaxed),
        });
    }

    fn idle(&mut self) {
        let (out, now) = (&self.out, clock::now());
        self.repeats.sweep(now, WINDOW, &mut |record| out.put(record));
    }

    fn end(&mut self) {
        let (out, now) = (&self.out, clock::now());
        self.repeats.sweep(now, Duration::ZERO, &mut |record| out.put(record));
    }
}

/// What was written in the last minute.
#[derive(Default)]
struct Repeats(HashMap<String, Known>);

struct Known {
    record: Record,
    written: Instant,
    held: u64,
}

impl Known {
    /// The last of those held back, with how many there were.
    fn told(&self) -> Record {
        let times = if self.held == 1 { "once".to_owned() } else { format!("{} times", self.held) };
        Record { message: format!("{} (repeated {times})", self.record.message), ..self.record.clone() }
    }
}

impl Repeats {
    /// Writes a line, or counts it.
    fn pass(&mut self, record: Record, now: Instant, write: &mut dyn FnMut(&Record)) {
        if record.kind().is_some_and(|kind| EACH.contains(&kind)) {
            return write(&record);
        }
        self.sweep(now, WINDOW, write);
        let key = record.key();
        if let Some(known) = self.0.get_mut(&key) {
            known.held += 1;
            known.record = record;
            return;
        }
        if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, known)| known.written).map(|(key, _)| key.clone());
            if let Some(known) = oldest.and_then(|key| self.0.remove(&key)).filter(|known| known.held > 0) {
                write(&known.told());
            }
        }
        write(&record);
        self.0.insert(key, Known { record, written: now, held: 0 });
    }

    /// Tells what was held back for as long as `window`, and forgets what was not repeated.
    fn sweep(&mut self, now: Instant, window: Duration, write: &mut dyn FnMut(&Record)) {
        self.0.retain(|_, known| {
            if now.since(known.written) < window {
                return true;
            }
            if known.held == 0 {
                return false;
            }
            write(&known.told());
            (known.held, known.written) = (0, now);
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn record(message: &str, fields: &[(&'static str, &str)]) -> Record {
        Record {
            at: "2026-11-20T15:11:00.25Z".parse().expect("a time"),
            level: Level::INFO,
            target: "portcullis::app::driver".to_owned(),
            message: message.to_owned(),
            fields: fields.iter().map(|(name, value)| (*name, (*value).to_owned(), true)).collect(),
            epoch: 7,
        }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn an_equal_line_is_written_once_a_minute_and_counted_and_a_cut_each_time() {
        let mut repeats = Repeats::default();
        let mut written = Vec::new();
        let fault = record("PostgreSQL does not answer", &[]);
        let cut = record("the gate was cut (lapsed)", &[("kind", "gate_cut")]);
        for second in 100..250 {
            repeats.pass(fault.clone(), at(second), &mut |record| written.push((second, record.message.clone())));
        }
        let told: Vec<(u64, &str)> = written.iter().map(|(at, text)| (*at, text.as_str())).collect();
        let words = "PostgreSQL does not answer";
        let times = "PostgreSQL does not answer (repeated 59 times)";
        let more = "PostgreSQL does not answer (repeated 60 times)";
        assert_eq!(told, [(100, words), (160, times), (220, more)]);
        // It ended: what is owed is told, once, and then it is forgotten.
        let mut rest = Vec::new();
        for second in [270, 280, 340, 345] {
            repeats.sweep(at(second), WINDOW, &mut |record| rest.push((second, record.message.clone())));
        }
        assert_eq!(rest, [(280, "PostgreSQL does not answer (repeated 30 times)".to_owned())]);
        assert!(repeats.0.is_empty());
        // C20, and what differs in any way is no repetition.
        let mut each = 0;
        for _ in 0..5 {
            repeats.pass(cut.clone(), at(400), &mut |_| each += 1);
        }
        repeats.pass(record("a", &[("node", "alp")]), at(400), &mut |_| each += 1);
        repeats.pass(record("a", &[("node", "midna")]), at(400), &mut |_| each += 1);
        assert_eq!(each, 7);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_no_count_is_lost() {
        let mut repeats = Repeats::default();
        let mut written = 0;
        for n in 0..2000 {
            let line = record(&format!("line {n}"), &[]);
            repeats.pass(line.clone(), at(n / 100), &mut |_| written += 1);
            repeats.pass(line, at(n / 100), &mut |_| written += 1);
            assert!(repeats.0.len() <= REMEMBERED);
        }
        repeats.sweep(at(20), Duration::ZERO, &mut |_| written += 1);
        assert_eq!(written, 4000, "each line, and each count of one");
    }

    #[test]
    fn a_line_stays_one_line_in_every_form() {
        let line = record("two\nlines\x1b[31m", &[("kind", "vip_failed")]);
        let text = line.text(false);
        assert_eq!(text, "2026-11-20T15:11:00.250000Z  INFO two?lines?[31m kind=\"vip_failed\"\n");
        assert_eq!(line.json().lines().count(), 1);
        let json: Value = serde_json::from_str(&line.json()).expect("JSON");
        let said = (&json["fields"]["message"], &json["fields"]["kind"], &json["level"], &json["epoch"]);
        assert_eq!(said, (&json!("two\nlines\x1b[31m"), &json!("vip_failed"), &json!("INFO"), &json!(7)));
        assert_eq!(line.priority(), 4);
        assert_eq!(record("", &[("kind", "gate_cut")]).priority(), 3);
        assert_eq!(record("", &[("kind", "command")]).priority(), 6);
    }
}
