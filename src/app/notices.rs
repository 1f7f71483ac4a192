//! `[notify]`: events worth waking someone for, told to a command of the administrator's and by mail.
//!
//! What it is NOT: it decides nothing and nothing waits for it. A notice may be late, folded into the next of its kind,
//! or given up; the event log has every event.
//!
//! ```text
//!  driver --put--> queue (64, the oldest is given up) --one at a time--> notify.command, then sendmail
//! ```
//!
//! The table of kinds is [`severity`]; `docs/operations.md` has it for people.
//!
//! **Invariants:** [`Notices::put`] never waits. One program runs at a time, at most [`LIMIT`], without a shell, with a
//! clean environment, and its whole process group is killed after that. Of one kind at most [`FREE`] notices leave in
//! [`WINDOW`]; further ones are folded into one, which says how many.

use crate::app::render::clean;
use crate::base::config::Notify;
use crate::base::ids::NodeName;
use crate::base::time::{Duration, Instant};
use crate::engine::status::{EventRow, Role};
use crate::io::{clock, outside};
use serde::Serialize;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A program that has not ended after this is killed.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Notices that wait; one more, and the oldest is given up and counted.
pub const WAITING: usize = 64;
/// So many of one kind leave at once...
pub const FREE: usize = 3;
/// ... in this time.
pub const WINDOW: Duration = Duration::from_secs(60);
/// A failure of the program is a line in the log at most this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// How urgent an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good news that ends a worry, or what a person did.
    Info,
    /// It serves, and something behind it does not.
    Warning,
    /// It does not serve here, or will not be able to.
    Critical,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }
}

/// The kinds of events that are worth waking someone for.
pub const KINDS: [(&str, Severity); 37] = [
    ("gate_cut", Severity::Critical),
    ("fenced", Severity::Critical),
    ("record_elsewhere", Severity::Critical),
    ("record_says_nothing", Severity::Critical),
    ("postgres_down", Severity::Critical),
    ("postgres_silent", Severity::Critical),
    ("demotion_failed", Severity::Critical),
    ("journal_failed", Severity::Critical),
    ("vip_conflict", Severity::Critical),
    ("conflict", Severity::Critical),
    ("put_back_failed", Severity::Critical),
    ("pause_seen", Severity::Critical),
    ("commits_wait", Severity::Critical),
    ("journal_is_old", Severity::Critical),
    ("alone", Severity::Warning),
    ("standby_lost", Severity::Warning),
    ("cannot_follow", Severity::Warning),
    ("diverged", Severity::Warning),
    ("durability_failed", Severity::Warning),
    ("configuration_differs", Severity::Warning),
    ("gate_suspended", Severity::Warning),
    ("procedure_interrupted", Severity::Warning),
    ("taker_silent", Severity::Warning),
    ("postgres_setup_failed", Severity::Warning),
    ("stonith_failed", Severity::Warning),
    ("units_failed", Severity::Warning),
    ("vip_failed", Severity::Warning),
    ("vip_expired", Severity::Warning),
    ("vip_removed", Severity::Warning),
    ("gate_opened", Severity::Info),
    ("in_sync", Severity::Info),
    ("standby_back", Severity::Info),
    ("postgres_up", Severity::Info),
    ("procedure_ended", Severity::Info),
    ("promoted", Severity::Info),
    ("vip_bound", Severity::Info),
    ("drill", Severity::Info),
];

/// `None`: this kind wakes nobody.
pub fn severity(kind: &str) -> Option<Severity> {
    KINDS.iter().find(|(known, _)| *known == kind).map(|(_, severity)| *severity)
}

/// The same while a switchover hands the service over: what belongs to it wakes nobody in earnest.
pub fn severity_during(kind: &str, procedure: Option<&str>) -> Option<Severity> {
    let planned = procedure == Some("switchover") && matches!(kind, "gate_cut" | "gate_suspended" | "postgres_down");
    severity(kind).map(|severity| if planned { Severity::Info } else { severity })
}

/// The failures among these events, oldest first, without what belongs to a switchover.
pub fn failures(events: &[EventRow]) -> Vec<&EventRow> {
    let mut planned = false;
    let is_failure = |event: &&EventRow| {
        match event.kind.as_str() {
            "switchover_prepared" => planned = true,
            "consented" | "put_back" | "put_back_failed" => planned = false,
            _ => {}
        }
        let during = severity_during(&event.kind, planned.then_some("switchover"));
        matches!(during, Some(Severity::Warning | Severity::Critical))
    };
    events.iter().filter(is_failure).collect()
}

/// One event as it is told: the JSON on standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notice {
    pub node: NodeName,
    /// `service.name`.
    pub service: String,
    /// RFC 3339, UTC; of the last one where several were folded.
    pub at: String,
    pub kind: String,
    pub severity: Severity,
    pub text: String,
    pub epoch: u64,
    /// What the node could prove right after the event.
    pub role: Role,
    /// Earlier ones of this kind that this one stands for.
    pub folded: u64,
}

/// What became of them since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoticeCounts {
    pub sent: u64,
    pub failed: u64,
    pub dropped: u64,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Notice>,
    settings: Notify,
    /// When the last few of each kind left.
    left: HashMap<String, VecDeque<Instant>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: tokio::sync::Notify,
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Held for a push or a pop only, never over a wait.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where notices are put. A copy leads to the same queue.
#[derive(Clone, Default)]
pub struct Notices(Arc<Shared>);

impl std::fmt::Debug for Notices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Notices({:?})", self.counts())
    }
}

impl Notices {
    /// Starts the task that tells them; inside a tokio runtime. `limit` is [`LIMIT`] but in tests.
    pub fn start(settings: Notify, limit: Duration) -> Notices {
        let notices = Notices::default();
        notices.set(settings);
        tokio::spawn(tell_all(Arc::clone(&notices.0), limit));
        notices
    }

    /// Whom to tell from now on.
    pub fn set(&self, settings: Notify) {
        let mut queue = self.0.queue();
        queue.settings = settings;
        if nobody(&queue.settings) {
            queue.waiting.clear();
        }
    }

    /// Is anybody told of this kind?
    pub fn wants(&self, kind: &str) -> bool {
        severity(kind).is_some() && !nobody(&self.0.queue().settings)
    }

    /// Hands one over. Never waits.
    pub fn put(&self, mut notice: Notice) {
        let mut queue = self.0.queue();
        let now = clock::now();
        let held = queue.release(&notice.kind, now).is_some();
        let same = queue.waiting.iter().position(|waiting| waiting.kind == notice.kind);
        if let Some(at) = same.filter(|_| held) {
            let folded = queue.waiting.remove(at).map_or(0, |old| old.folded + 1);
            notice.folded += folded;
        }
        queue.waiting.push_back(notice);
        if queue.waiting.len() > WAITING {
            queue.waiting.pop_front();
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
        drop(queue);
        self.0.news.notify_one();
    }

    /// For `/metrics`.
    pub fn counts(&self) -> NoticeCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NoticeCounts { sent: read(&self.0.sent), failed: read(&self.0.failed), dropped: read(&self.0.dropped) }
    }
}

fn nobody(settings: &Notify) -> bool {
    settings.command.is_empty() && settings.mail.is_empty()
}

impl Queue {
    /// When one more of this kind may leave; `None`: now.
    fn release(&self, kind: &str, now: Instant) -> Option<Instant> {
        let left = self.left.get(kind)?;
        let oldest = left.len().checked_sub(FREE).and_then(|at| left.get(at))?;
        Some(*oldest + WINDOW).filter(|at| now < *at)
    }

    /// The next that may leave, or when to look again.
    fn next(&mut self, now: Instant) -> Result<Notice, Option<Instant>> {
        let mut soonest: Option<Instant> = None;
        for at in 0..self.waiting.len() {
            let Some(notice) = self.waiting.get(at) else { break };
            match self.release(&notice.kind, now) {
                Some(later) => soonest = Some(soonest.map_or(later, |soonest| soonest.min(later))),
                None => {
                    let Some(notice) = self.waiting.remove(at) else { break };
                    let left = self.left.entry(notice.kind.clone()).or_default();
                    left.push_back(now);
                    if left.len() > FREE {
                        left.pop_front();
                    }
                    return Ok(notice);
                }
            }
        }
        Err(soonest)
    }
}

/// The one task: the next notice, its programs, the one after.
async fn tell_all(shared: Arc<Shared>, limit: Duration) {
    let mut complained: Option<Instant> = None;
    let mut unsaid = 0_u64;
    loop {
        let (next, settings) = {
            let mut queue = shared.queue();
            (queue.next(clock::now()), queue.settings.clone())
        };
        let notice = match next {
            Ok(notice) => notice,
            Err(look) => {
                let wait = look.map_or(WINDOW, |at| at.since(clock::now()));
                // Nothing to do before news, or before one that is held may leave.
                let _news_or_time = tokio::time::timeout(wait, shared.news.notified()).await;
                continue;
            }
        };
        let Err(why) = tell(&notice, &settings, limit).await else {
            shared.sent.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        shared.failed.fetch_add(1, Ordering::Relaxed);
        let now = clock::now();
        if complained.is_some_and(|at| now.since(at) < COMPLAIN_EVERY) {
            unsaid += 1;
            continue;
        }
        let more = if unsaid > 0 { format!(" ({unsaid} more since the last such line)") } else { String::new() };
        tracing::warn!("{} was not told: {}{more}; look at [notify]", notice.kind, clean(&why));
        (complained, unsaid) = (Some(now), 0);
    }
}

/// One notice to everybody; one that fails does not keep the other from being told.
async fn tell(notice: &Notice, settings: &Notify, limit: Duration) -> Result<(), String> {
    let mut faults = Vec::new();
    if !settings.command.is_empty() {
        let mut input = serde_json::to_vec(notice).map_err(|error| error.to_string())?;
        input.push(b'\n');
        faults.extend(run("notify.command", &settings.command, &input, limit).await.err());
    }
    if !settings.mail.is_empty() {
        let mut words = vec![settings.sendmail.display().to_string(), "-i".to_owned(), "--".to_owned()];
        words.extend(settings.mail.iter().cloned());
        faults.extend(run("sendmail", &words, mail(notice, &settings.mail).as_bytes(), limit).await.err());
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
}

async fn run(what: &str, words: &[String], input: &[u8], limit: Duration) -> Result<(), String> {
    let printed = outside::tell(words, input, limit).await.map_err(|why| format!("{what}: {why}"))?;
    if !printed.trim().is_empty() {
        tracing::debug!("{what} printed: {}", clean(printed.trim()));
    }
    Ok(())
}

/// A mail as sendmail reads it. Nothing of an event can begin a header line of its own.
fn mail(notice: &Notice, to: &[String]) -> String {
    let one_line = |text: &str| clean(text).replace(['\r', '\n'], " ");
    let ascii = |text: &str| one_line(text).replace(|c: char| !c.is_ascii(), "?");
    let text = one_line(&notice.text);
    let severity = notice.severity.as_str();
    let (node, service, role) = (&notice.node, &notice.service, notice.role.as_str());
    let folded = match notice.folded {
        0 => String::new(),
        more => format!("\nThis stands for {} events of this kind; `portcullis events` lists them.\n", more + 1),
    };
    format!(
        "To: {}\nSubject: [portcullis] {service} {node} {severity}: {}\nAuto-Submitted: auto-generated\n\
         MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n\
         {text}\n\nnode {node}, role {role}, epoch {}, {severity}, {}, at {}\n{folded}",
        to.join(", "),
        ascii(&notice.text).chars().take(120).collect::<String>(),
        notice.epoch,
        one_line(&notice.kind),
        notice.at,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(kind: &str, n: u64) -> Notice {
        Notice {
            node: "alp".parse().expect("valid"),
            service: "db.example.org".to_owned(),
            at: "2026-11-20T15:11:00Z".to_owned(),
            kind: kind.to_owned(),
            severity: Severity::Critical,
            text: format!("number {n}"),
            epoch: 7,
            role: Role::Passive,
            folded: 0,
        }
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos((1000 + seconds) * 1_000_000_000)
    }

    #[test]
    fn a_flood_of_one_kind_is_held_and_the_others_pass_it() {
        let mut queue = Queue::default();
        for n in 0..4 {
            queue.waiting.push_back(notice("gate_cut", n));
        }
        queue.waiting.push_back(notice("fenced", 9));
        for n in 0..3 {
            assert_eq!(queue.next(at(n)).expect("free").text, format!("number {n}"));
        }
        assert_eq!(queue.next(at(3)).expect("another kind").kind, "fenced");
        assert_eq!(queue.next(at(3)), Err(Some(at(60))), "the fourth waits");
        assert_eq!(queue.next(at(60)).expect("its time came").text, "number 3");
        assert_eq!(queue.next(at(60)), Err(None));
    }

    #[test]
    fn what_is_held_is_folded_into_the_newest_and_what_finds_no_room_is_counted() {
        let notices = Notices::default();
        let now = clock::now();
        notices.0.queue().left.insert("gate_cut".to_owned(), [now, now, now].into());
        for n in 0..5 {
            notices.put(notice("gate_cut", n));
        }
        {
            let queue = notices.0.queue();
            assert_eq!(queue.waiting.len(), 1);
            assert_eq!((queue.waiting[0].text.as_str(), queue.waiting[0].folded), ("number 4", 4));
        }
        for n in 0..WAITING {
            notices.put(notice("fenced", u64::try_from(n).expect("small")));
        }
        assert_eq!(notices.counts().dropped, 1, "the oldest went");
        assert!(notices.0.queue().waiting.iter().all(|notice| notice.kind == "fenced"));
    }

    #[test]
    fn a_mail_has_one_subject_and_no_header_of_an_event() {
        let mut hostile = notice("fenced", 1);
        hostile.text = "why\r\nBcc: everybody@example.org\nü".to_owned();
        let mail = mail(&hostile, &["dba@example.org".to_owned(), "root".to_owned()]);
        let (head, body) = mail.split_once("\n\n").expect("a body");
        assert!(head.starts_with("To: dba@example.org, root\nSubject: [portcullis] db.example.org alp critical: why"));
        assert!(head.is_ascii() && !head.lines().any(|line| line.starts_with("Bcc")), "{head}");
        assert!(body.contains("role passive, epoch 7, critical, fenced, at 2026-11-20T15:11:00Z"), "{body}");
    }

    #[test]
    fn what_belongs_to_a_switchover_is_no_failure() {
        let row = |kind: &str| EventRow { at: String::new(), kind: kind.to_owned(), text: String::new() };
        let events = ["gate_cut", "switchover_prepared", "gate_cut", "postgres_down", "vip_conflict", "consented"];
        let events: Vec<EventRow> = events.iter().chain(&["postgres_up", "postgres_down"]).map(|k| row(k)).collect();
        let kinds: Vec<&str> = failures(&events).iter().map(|event| event.kind.as_str()).collect();
        assert_eq!(kinds, ["gate_cut", "vip_conflict", "postgres_down"]);
        assert_eq!(severity_during("gate_cut", Some("switchover")), Some(Severity::Info));
        assert_eq!(severity_during("gate_cut", Some("promote")), Some(Severity::Critical));
    }

    #[test]
    fn the_table_for_people_names_every_kind() {
        let page = include_str!("../../docs/operations.md");
        for (kind, severity) in KINDS {
            let row = page.lines().find(|line| line.starts_with("| ") && line.contains(&format!("`{kind}`")));
            let row = row.unwrap_or_else(|| panic!("docs/operations.md does not name {kind}"));
            assert!(row.contains(severity.as_str()), "{kind} is {} here: {row}", severity.as_str());
        }
        assert_eq!(severity("paused"), None);
    }
}
