//! `portcullis probe`: looks at the service through the front door, as a client would, and counts what it loses.
//!
//! Every tick asks three things: *health* (does the session live, or can one be opened), *select* (a read from table
//! `portcullis_probe`) and *update* (a new row there with the next number). A number whose insert was acknowledged is
//! the probe's truth: at the end a fresh session is asked which of them are missing, and those are lost writes.
//!
//! It is NOT a load generator and holds nothing against a slow answer that comes within [`STATEMENT_TIME`]; a longer
//! one is an outage, however alive the connection looks. [`tally`] counts, [`session`] speaks PostgreSQL.
//!
//! **Invariant:** a number counts as acknowledged only after PostgreSQL's answer to its insert was read in full; an
//! insert that failed or timed out counts as neither, because it may have happened.

mod session;
mod tally;

pub use tally::{Kind, LostWrites, Outage, Summary};

use crate::base::fault::{ExitCode, Fault};
use crate::base::time::Instant;
use crate::io::clock;
use jiff::Timestamp;
use serde_json::{Value, json};
use session::{Dsn, Session, Trouble};
use std::io::Write;
use std::time::Duration;
use tally::{Moment, Tally};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

/// A connection to one address is given up after this long.
pub const CONNECT_TIME: Duration = Duration::from_secs(1);
/// A whole attempt, resolving and logging in included, is given up after this long: a gate that accepts and then says
/// nothing is an outage.
pub const ATTEMPT_TIME: Duration = Duration::from_secs(2);
/// A statement that takes longer is an outage, and its session is given up.
pub const STATEMENT_TIME: Duration = Duration::from_secs(2);
/// For the last question (what is missing?), retries included. After that the answer is "unknown".
pub const VERIFY_TIME: Duration = Duration::from_secs(10);
/// Shortest accepted interval.
pub const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// Rows of this session that stay in the table; of older acknowledged numbers nobody can tell any more whether they
/// are missing, and the summary says how many were verified.
pub const KEPT_ROWS: u64 = 200_000;
/// Acknowledged numbers between two trims of the table to [`KEPT_ROWS`].
const TRIM_EVERY: u64 = 1_000;
/// Pause between attempts to get the last question through.
const VERIFY_PAUSE: Duration = Duration::from_millis(250);

/// The flags of `probe`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeArgs {
    /// URL or `key=value` words, as libpq reads them. `PGPASSWORD` is used when it holds no password.
    pub dsn: String,
    pub interval: Duration,
    /// `None`: until Ctrl-C.
    pub duration: Option<Duration>,
    pub read_only: bool,
    pub json: bool,
}

impl ProbeArgs {
    /// The defaults of the command line.
    pub fn new(dsn: impl Into<String>) -> ProbeArgs {
        let interval = Duration::from_millis(250);
        ProbeArgs { dsn: dsn.into(), interval, duration: None, read_only: false, json: false }
    }
}

/// Probes until the duration is over, Ctrl-C or SIGTERM, writing to standard output. `Done` without an outage, `Failed`
/// with. A second Ctrl-C ends it without the summary.
pub async fn probe(args: &ProbeArgs) -> Result<ExitCode, Fault> {
    let no_signals = |error| Fault::new(ExitCode::Failed, format!("signals cannot be caught ({error}); report this"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let mut stop = Some(stop);
    let mut stdout = std::io::stdout();
    let mut run = std::pin::pin!(run(args, &mut stdout, async { drop(stopped.await) }));
    loop {
        tokio::select! {
            summary = run.as_mut() => {
                return Ok(if summary?.outages.is_empty() { ExitCode::Done } else { ExitCode::Failed });
            }
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        match stop.take() {
            Some(stop) => drop(stop.send(())),
            None => return Err(Fault::new(ExitCode::Failed, "broken off; without its last read probe has no summary")),
        }
    }
}

/// The same with its world as arguments: ends when `stop` does.
pub async fn run(
    args: &ProbeArgs,
    out: &mut (dyn Write + Send),
    stop: impl Future<Output = ()> + Send,
) -> Result<Summary, Fault> {
    let dsn = Dsn::parse(&args.dsn)?;
    if args.interval < MIN_INTERVAL {
        let least = MIN_INTERVAL.as_millis();
        return Err(Fault::new(ExitCode::Config, format!("--interval is too short; give at least {least}ms")));
    }
    let mut prober = Prober::new(dsn, args.read_only);
    let mut stop = std::pin::pin!(stop);
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut over = std::pin::pin!(async {
        match args.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    });
    loop {
        // A tick that has begun is finished, so that its insert is counted; its time limits bound the wait.
        tokio::select! {
            biased;
            () = stop.as_mut() => break,
            () = over.as_mut() => break,
            _ = ticks.tick() => {}
        }
        let tick = prober.tick().await?;
        let line = if args.json { tick.json().to_string() } else { tick.text() };
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            // Nobody reads any more (`| head`): what was seen so far is still the answer.
            break;
        }
    }
    let summary = prober.finish().await;
    let text = if args.json { format!("{}\n", summary.json()) } else { summary.text() };
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    Ok(summary)
}

/// What one tick saw.
struct Tick {
    number: u64,
    at: Timestamp,
    took: Duration,
    health: bool,
    select: bool,
    /// `None` when only reading.
    update: Option<bool>,
    /// The number of this tick's insert.
    n: Option<u64>,
    node: Option<String>,
    reconnected: bool,
    trouble: Option<String>,
}

impl Tick {
    fn text(&self) -> String {
        let mark = |good: bool| if good { "✓" } else { "x" };
        let update = self.update.map_or("-", mark);
        let ms = self.took.as_secs_f64() * 1000.0;
        let at = self.at.strftime("%H:%M:%S.%3f");
        let node = self.node.as_deref().unwrap_or("-");
        let mut line = format!("{at} {} {} {update} {ms:7.1} ms  {node}", mark(self.health), mark(self.select));
        if self.reconnected {
            line += "  reconnected";
        }
        if let Some(trouble) = &self.trouble {
            line += &format!("  {trouble}");
        }
        line
    }

    fn json(&self) -> Value {
        json!({
            "at": self.at.to_string(),
            "tick": self.number,
            "health": self.health,
            "select": self.select,
            "update": self.update,
            "n": self.n,
            "ms": (self.took.as_secs_f64() * 1e6).round() / 1e3,
            "node": self.node,
            "reconnected": self.reconnected,
            "error": self.trouble,
        })
    }
}

struct Prober {
    dsn: Dsn,
    /// Names the rows of this run.
    id: String,
    read_only: bool,
    session: Option<Session>,
    connected_once: bool,
    /// The table was there when last looked at.
    prepared: bool,
    tally: Tally,
    ticks: u64,
}

impl Prober {
    fn new(dsn: Dsn, read_only: bool) -> Prober {
        let id = format!("{}-{}", Timestamp::now().as_microsecond(), std::process::id());
        let tally = Tally::new(!read_only);
        Prober { dsn, id, read_only, session: None, connected_once: false, prepared: false, tally, ticks: 0 }
    }

    /// Both clocks: the wall for people, the boot clock for lengths.
    fn moment() -> Moment {
        let now = Timestamp::now();
        // Milliseconds are enough for people, and they fit a line.
        Moment { wall: now.round(jiff::Unit::Millisecond).unwrap_or(now), boot: clock::now() }
    }

    /// One round of questions. Only what no retry can mend is a fault.
    async fn tick(&mut self) -> Result<Tick, Fault> {
        self.ticks += 1;
        let began = Self::moment();
        let mut tick = Tick {
            number: self.ticks,
            at: began.wall,
            took: Duration::ZERO,
            health: false,
            select: false,
            update: (!self.read_only).then_some(false),
            n: None,
            node: None,
            reconnected: false,
            trouble: None,
        };
        self.questions(&mut tick).await?;
        tick.took = clock::now().since(began.boot);
        let ended = Self::moment();
        self.tally.saw(Kind::Health, tick.health, began, ended);
        self.tally.saw(Kind::Select, tick.select, began, ended);
        if let Some(update) = tick.update {
            self.tally.saw(Kind::Update, update, began, ended);
        }
        if self.tally.acknowledged().is_multiple_of(TRIM_EVERY) && tick.update == Some(true) {
            self.trim().await;
        }
        Ok(tick)
    }

    async fn questions(&mut self, tick: &mut Tick) -> Result<(), Fault> {
        tick.health = self.health(tick).await;
        tick.node = self.session.as_ref().and_then(|session| session.node().map(str::to_owned));
        if !tick.health {
            // Without a session the other two have failed too; asking would only take as long again.
            return Ok(());
        }
        if !self.read_only && !self.prepared {
            self.prepare(tick).await?;
        }
        let last = self.tally.last_acknowledged();
        match self.ask(|session, id, _| Box::pin(session.last_number(id)), 0).await {
            Ok(seen) => {
                tick.select = true;
                if seen < last {
                    tick.trouble = Some(format!("stale: number {last} was acknowledged, {seen} is the last here"));
                }
            }
            Err(trouble) => note(tick, "select", &trouble),
        }
        if self.read_only {
            return Ok(());
        }
        let n = self.tally.next_number();
        tick.n = Some(n);
        match self.ask(|session, id, n| Box::pin(session.insert(id, n)), n).await {
            Ok(()) => {
                self.tally.acknowledge(n);
                tick.update = Some(true);
            }
            Err(trouble) => {
                if trouble.refused {
                    self.tally.refuse();
                }
                self.prepared &= !trouble.tableless();
                note(tick, "update", &trouble);
            }
        }
        Ok(())
    }

    /// Lives the session? A broken one is replaced at once, in this very tick; that alone is no outage.
    async fn health(&mut self, tick: &mut Tick) -> bool {
        if self.session.is_some() {
            match self.ask(|session, _, _| Box::pin(session.alive()), 0).await {
                Ok(()) => return true,
                Err(trouble) if trouble.timed_out => {
                    note(tick, "health", &trouble);
                    return false;
                }
                Err(trouble) => note(tick, "session lost", &trouble),
            }
            self.session = None;
        }
        match Session::open(&self.dsn).await {
            Ok(session) => {
                tick.reconnected = std::mem::replace(&mut self.connected_once, true);
                if tick.reconnected {
                    self.tally.reconnected();
                }
                self.session = Some(session);
                true
            }
            Err(trouble) => {
                note(tick, "connect", &trouble);
                false
            }
        }
    }

    /// Makes the table where it is missing. Only a role that may not is a fault: waiting does not help it.
    async fn prepare(&mut self, tick: &mut Tick) -> Result<(), Fault> {
        match self.ask(|session, id, _| Box::pin(session.prepare(id)), 0).await {
            Ok(()) => {
                self.prepared = true;
                Ok(())
            }
            Err(trouble) if trouble.forbidden() => Err(Fault::new(
                ExitCode::Config,
                format!(
                    "table {} cannot be made here ({trouble}); make it as its owner, or use --read-only",
                    session::TABLE
                ),
            )),
            Err(trouble) => {
                note(tick, "table", &trouble);
                Ok(())
            }
        }
    }

    /// Asks the session something; a session that broke or hung over it is given up.
    async fn ask<T, F>(&mut self, question: F, n: u64) -> Result<T, Trouble>
    where
        F: for<'a> FnOnce(&'a Session, &'a str, u64) -> session::Answer<'a, T>,
    {
        let Some(session) = &self.session else { return Err(Trouble::closed()) };
        let answer = question(session, &self.id, n).await;
        if let Err(trouble) = &answer
            && (trouble.timed_out || session.is_closed())
        {
            self.session = None;
        }
        answer
    }

    async fn trim(&mut self) {
        if let Some(before) = self.tally.last_acknowledged().checked_sub(KEPT_ROWS) {
            // What cannot be deleted now is deleted with the next trim.
            if self.ask(|session, id, n| Box::pin(session.trim(id, n)), before).await.is_ok() {
                self.tally.forget_up_to(before);
            }
        }
    }

    async fn finish(mut self) -> Summary {
        let lost = if self.read_only || self.tally.acknowledged() == 0 {
            LostWrites::Known { missing: Vec::new() }
        } else {
            self.verify().await
        };
        self.session = None;
        self.tally.finish(Self::moment(), self.ticks, lost)
    }

    /// Asks through a fresh session which acknowledged numbers are missing: the old session may still lead to a node
    /// that no longer counts.
    async fn verify(&mut self) -> LostWrites {
        let deadline: Instant = clock::now() + VERIFY_TIME;
        loop {
            let why = match Session::open(&self.dsn).await {
                Ok(session) => match session.numbers(&self.id, self.tally.first_kept()).await {
                    Ok(present) => return LostWrites::Known { missing: self.tally.missing(&present) },
                    Err(trouble) => trouble.to_string(),
                },
                Err(trouble) => trouble.to_string(),
            };
            if clock::now() >= deadline {
                return LostWrites::Unknown { why };
            }
            tokio::time::sleep(VERIFY_PAUSE).await;
        }
    }
}

/// Keeps the first trouble of a tick: what follows is mostly its echo.
fn note(tick: &mut Tick, what: &str, trouble: &Trouble) {
    if tick.trouble.is_none() {
        tick.trouble = Some(format!("{what}: {trouble}"));
    }
}
