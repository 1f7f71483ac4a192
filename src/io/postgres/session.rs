//! Sessions of the daemon with the local PostgreSQL, over its Unix socket: the lasting one that watches, and short
//! ones for everything else.
//!
//! The lasting session is itself a sense: it breaks with a restart and with a crash recovery inside a running
//! postmaster, which `pg_postmaster_start_time()` does not show (R6, protocol-review S9). Each new one raises
//! [`PgReport::start`].

use super::replayed::{self, Position};
use super::{Cluster, PgError};
use crate::base::ids::{Lsn, SystemId, TimelineId};
use crate::base::time::Instant;
use crate::engine::report::{PgReport, StandbyRow};
use crate::io::clock;
use std::error::Error as _;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage, SimpleQueryRow};

/// After a loss the next look comes at least this soon: it decides when a restarted PostgreSQL is seen.
const RETRY_AFTER_LOSS: Duration = Duration::from_millis(100);

/// Session settings, sent with the start-up message so that no round trip is spent on them. The daemon's commits wait
/// for no standby, and no time-out of the server's configuration ends its statements or its session.
const OPTIONS: &str = "-c synchronous_commit=local -c statement_timeout=0 -c lock_timeout=0 -c search_path=pg_catalog \
    -c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0 -c client_min_messages=warning";

/// Everything a look asks: one message, one round trip, two results. CASE keeps the functions that fail in recovery,
/// or outside it, from being called there; a promotion between two columns only turns the first case into the second.
const LOOK: &str = "WITH r AS MATERIALIZED (SELECT pg_is_in_recovery() AS rec), \
      w AS MATERIALIZED (SELECT status, received_tli FROM pg_stat_wal_receiver) \
    SELECT r.rec, (SELECT system_identifier FROM pg_control_system()), \
      CASE WHEN NOT r.rec THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END, \
      CASE WHEN r.rec THEN greatest((SELECT received_tli FROM w), (SELECT timeline_id FROM pg_control_checkpoint()), \
        (SELECT min_recovery_end_timeline FROM pg_control_recovery())) END, \
      CASE WHEN NOT r.rec THEN \
        pg_current_wal_insert_lsn() || ' ' || pg_size_bytes(current_setting('wal_segment_size')) END, \
      CASE WHEN r.rec THEN pg_last_wal_replay_lsn() END, \
      CASE WHEN r.rec THEN pg_last_wal_receive_lsn() END, \
      coalesce((SELECT status = 'streaming' FROM w), false), \
      current_setting('synchronous_standby_names'), \
      (extract(epoch FROM pg_conf_load_time()) * 1000000)::bigint, \
      current_setting('default_transaction_read_only'), \
      CASE WHEN NOT r.rec THEN pg_current_wal_flush_lsn() END, \
      CASE WHEN r.rec AND current_setting('recovery_target_timeline') = 'latest' \
        THEN pg_size_bytes(current_setting('wal_segment_size')) END, \
      CASE WHEN NOT r.rec THEN pg_snapshot_xmax(pg_current_snapshot()) END FROM r; \
    SELECT application_name, state, sync_state, flush_lsn, replay_lsn, pid FROM pg_stat_replication";

/// The end of the last record, asked of a primary; for [`last_record_end`].
pub(super) const INSERT_POSITION: &str =
    "SELECT pg_current_wal_insert_lsn() || ' ' || pg_size_bytes(current_setting('wal_segment_size'))";
/// Bytes of a WAL page, and of the header of its first and every other page of a segment (`xlog_internal.h`).
const WAL_PAGE: u64 = 8192;
const LONG_HEADER: u64 = 40;
const SHORT_HEADER: u64 = 24;

/// Why a look gave no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgLost {
    /// Nobody listens, the session broke, or PostgreSQL is starting up or shutting down.
    #[error("{0}")]
    Down(String),
    /// No answer in time: hung or frozen.
    #[error("{0}")]
    Silent(String),
    /// It runs and answers, but does not let the daemon in or fails its query.
    #[error("{0}")]
    Refused(String),
}

/// A session of the daemon; it ends when this is dropped.
pub(super) struct Session {
    client: Arc<Client>,
    /// Ends when the session does, with the reason.
    task: JoinHandle<String>,
}

impl Session {
    /// Runs simple queries and gives the rows of all of them.
    pub(super) async fn rows(&self, sql: &str, limit: Duration) -> Result<Vec<SimpleQueryRow>, PgError> {
        let messages = tokio::time::timeout(limit, self.client.simple_query(sql))
            .await
            .map_err(|_| PgError::TimedOut(format!("PostgreSQL did not answer within {limit:?}")))?
            .map_err(|error| PgError::from(lost_by(&error)))?;
        Ok(messages.into_iter().filter_map(row).collect())
    }

    /// The first column of the first row.
    pub(super) async fn value(&self, sql: &str, limit: Duration) -> Result<String, PgError> {
        let rows = self.rows(sql, limit).await?;
        rows.first()
            .and_then(|row| row.try_get(0).ok().flatten())
            .map(str::to_owned)
            .ok_or_else(|| PgError::Failed("PostgreSQL gave an empty answer; look into its log".to_owned()))
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

impl Cluster {
    /// A new session as the admin user. Cancel-safe.
    pub(super) async fn session(&self, limit: Duration) -> Result<Session, PgLost> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.settings.socket_dir)
            .port(self.settings.port)
            .user(&self.admin_user)
            .dbname("postgres")
            .application_name("portcullis")
            .options(OPTIONS);
        let connected = tokio::time::timeout(limit, config.connect(NoTls))
            .await
            .map_err(|_| PgLost::Silent(format!("PostgreSQL gave no session within {limit:?}")))?;
        let (client, connection) = connected.map_err(|error| lost_by(&error))?;
        let task = tokio::spawn(async move {
            match connection.await {
                Ok(()) => "the session with PostgreSQL ended".to_owned(),
                Err(error) => format!("the session with PostgreSQL broke: {}", sentence(&error)),
            }
        });
        Ok(Session { client: Arc::new(client), task })
    }
}

type Answer = Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>;

/// The lasting session and the looks over it.
pub struct Watcher {
    cluster: Arc<Cluster>,
    session: Option<Session>,
    /// Sessions opened so far.
    start: u64,
    /// A question still without answer after a look ran out of time. At most one is ever under way, so that a hung
    /// PostgreSQL does not find a heap of them when it wakes up.
    pending: Option<Pin<Box<dyn Future<Output = Answer> + Send>>>,
    /// The same of a look into the files of the WAL: a hung disk.
    reading: Option<JoinHandle<Option<(TimelineId, Lsn)>>>,
}

impl Watcher {
    pub fn new(cluster: Arc<Cluster>) -> Watcher {
        Watcher { cluster, session: None, start: 0, pending: None, reading: None }
    }

    /// One look, opening a session when there is none. Cancel-safe; the answer belongs to a question asked after this
    /// was called.
    ///
    /// # Errors
    /// [`PgLost`]; after `Silent` the session is kept, because a hang is not a restart.
    pub async fn observe(&mut self, limit: Duration) -> Result<PgReport, PgLost> {
        match tokio::time::timeout(limit, self.look(limit)).await {
            Ok(answer) => answer,
            Err(_) => Err(PgLost::Silent(format!("PostgreSQL did not answer within {limit:?}"))),
        }
    }

    async fn look(&mut self, limit: Duration) -> Result<PgReport, PgLost> {
        if self.session.as_ref().is_some_and(|session| session.task.is_finished()) {
            self.forget();
        }
        if let Some(late) = self.pending.as_mut() {
            // The answer to an earlier look: too old to be this one's.
            let answer = late.await;
            self.pending = None;
            answer.map_err(|error| self.broken(&error))?;
        }
        let client = match &self.session {
            Some(session) => Arc::clone(&session.client),
            None => {
                let session = self.cluster.session(limit).await?;
                self.start = self.start.saturating_add(1);
                Arc::clone(&self.session.insert(session).client)
            }
        };
        let question: Pin<Box<dyn Future<Output = Answer> + Send>> =
            Box::pin(async move { client.simple_query(LOOK).await });
        let answer = self.pending.insert(question).await;
        self.pending = None;
        let messages = answer.map_err(|error| self.broken(&error))?;
        let (mut report, segment_size) = read_report(self.start, messages)
            .ok_or_else(|| PgLost::Refused("PostgreSQL answered a look in an unknown form".to_owned()))?;
        if let (false, Some(segment_size), Some(replay)) = (report.streaming, segment_size, report.replay_lsn) {
            let position = Position { known: report.timeline, replay, receive: report.receive_lsn, segment_size };
            if let Some((timeline, lsn)) = self.replayed(position).await {
                (report.timeline, report.lsn) = (timeline, lsn);
            }
        }
        Ok(report)
    }

    /// [`replayed::timeline_of`], not on the runtime's own threads. At most one is ever under way.
    async fn replayed(&mut self, position: Position) -> Option<(TimelineId, Lsn)> {
        if let Some(late) = self.reading.as_mut() {
            let _of_an_earlier_look = late.await;
        }
        let wal = self.cluster.settings.data_dir.join("pg_wal");
        let reading = tokio::task::spawn_blocking(move || replayed::timeline_of(&wal, position));
        let found = self.reading.insert(reading).await;
        self.reading = None;
        found.ok().flatten()
    }

    /// Waits until the session is lost, which a dying PostgreSQL brings about at once; for ever while there is none.
    /// Cancel-safe.
    pub async fn lost(&mut self) -> PgLost {
        let Some(session) = self.session.as_mut() else { return std::future::pending().await };
        let reason = (&mut session.task).await.unwrap_or_else(|error| error.to_string());
        self.forget();
        PgLost::Down(reason)
    }

    /// What an error of a look means; a session that cannot be used any more is given up.
    fn broken(&mut self, error: &tokio_postgres::Error) -> PgLost {
        let lost = lost_by(error);
        if !matches!(lost, PgLost::Refused(_)) {
            self.forget();
        }
        lost
    }

    fn forget(&mut self) {
        self.session = None;
        self.pending = None;
    }
}

/// Looks every `every()`, and at once when the session is lost; for ever. `out` gets the moment the question was asked
/// (of a loss: the moment it was noticed).
pub async fn watch(
    cluster: Arc<Cluster>,
    every: impl Fn() -> Duration,
    limit: Duration,
    mut out: impl FnMut(Instant, Result<PgReport, PgLost>),
) {
    let mut watcher = Watcher::new(cluster);
    loop {
        let asked = clock::now();
        let answer = watcher.observe(limit).await;
        let pause = if answer.is_ok() { every() } else { every().min(RETRY_AFTER_LOSS) };
        out(asked, answer);
        tokio::select! {
            lost = watcher.lost() => out(clock::now(), Err(lost)),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What an error of the client library means for the watch.
pub(super) fn lost_by(error: &tokio_postgres::Error) -> PgLost {
    let text = sentence(error);
    if let Some(code) = error.code() {
        let going = [
            SqlState::ADMIN_SHUTDOWN,
            SqlState::CRASH_SHUTDOWN,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::IDLE_SESSION_TIMEOUT,
        ];
        return if going.contains(code) { PgLost::Down(text) } else { PgLost::Refused(text) };
    }
    match error.source().and_then(|source| source.downcast_ref::<std::io::Error>()).map(std::io::Error::kind) {
        // The socket's queue is full: it listens, but nobody accepts.
        Some(std::io::ErrorKind::WouldBlock) => PgLost::Silent("PostgreSQL takes no new sessions".to_owned()),
        Some(std::io::ErrorKind::PermissionDenied) => PgLost::Refused(text),
        Some(_) => PgLost::Down(text),
        None if error.is_closed() => PgLost::Down(text),
        None => PgLost::Refused(text),
    }
}

/// The server's own sentence where there is one, else the library's with its cause.
pub(super) fn sentence(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), error.source()) {
        (Some(db), _) => format!("PostgreSQL says: {} ({})", db.message(), db.code().code()),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

fn row(message: SimpleQueryMessage) -> Option<SimpleQueryRow> {
    match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    }
}

fn text(row: &SimpleQueryRow, column: usize) -> Option<&str> {
    row.try_get(column).ok().flatten()
}

/// Column as an LSN; NULL is `None`.
fn lsn(row: &SimpleQueryRow, column: usize) -> Option<Lsn> {
    text(row, column)?.parse().ok()
}

/// `LSN SEGMENT_SIZE`: where the last record ends. At the start of a page the insert position stands already behind the
/// page's header, where no standby can be before the next record, which an idle primary writes after 15 s or never.
pub(super) fn last_record_end(answer: &str) -> Option<Lsn> {
    let (lsn, segment) = answer.split_once(' ')?;
    let (Lsn(insert), segment) = (lsn.parse().ok()?, segment.parse::<u64>().ok().filter(|size| *size > 0)?);
    let header = match (insert % segment, insert % WAL_PAGE) {
        (LONG_HEADER, _) => LONG_HEADER,
        // A record that goes on from the page before ends further in.
        (_, SHORT_HEADER) => SHORT_HEADER,
        _ => 0,
    };
    Some(Lsn(insert - header))
}

/// The report; of a standby that follows the newest timeline also the size of a WAL segment.
fn read_report(start: u64, messages: Vec<SimpleQueryMessage>) -> Option<(PgReport, Option<u64>)> {
    let mut rows = messages.into_iter().filter_map(row);
    let head = rows.next()?;
    let in_recovery = text(&head, 0)? == "t";
    let timeline = match text(&head, 2) {
        Some(hex) => u32::from_str_radix(hex, 16).ok()?,
        None => text(&head, 3)?.parse().ok()?,
    };
    let (replay_lsn, receive_lsn) = (lsn(&head, 5), lsn(&head, 6));
    let standbys = rows
        .map(|row| {
            Some(StandbyRow {
                application_name: text(&row, 0).unwrap_or_default().to_owned(),
                state: text(&row, 1).unwrap_or_default().to_owned(),
                sync_state: text(&row, 2).unwrap_or_default().to_owned(),
                flush_lsn: lsn(&row, 3),
                replay_lsn: lsn(&row, 4),
                pid: text(&row, 5)?.parse().ok()?,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    let segment_size = text(&head, 12).and_then(|size| size.parse().ok());
    let report = PgReport {
        start,
        // bigint in SQL, unsigned in pg_control: the same bits.
        system_id: SystemId(text(&head, 1)?.parse::<i64>().ok()?.cast_unsigned()),
        in_recovery,
        timeline: TimelineId(timeline),
        lsn: if in_recovery {
            receive_lsn.max(replay_lsn).unwrap_or_default()
        } else {
            last_record_end(text(&head, 4)?)?
        },
        flush_lsn: lsn(&head, 11),
        replay_lsn,
        receive_lsn,
        streaming: text(&head, 7)? == "t",
        sync_list: text(&head, 8)?.to_owned(),
        conf_loaded_us: text(&head, 9)?.parse().ok()?,
        read_only: text(&head, 10)? == "on",
        standbys,
        next_xid: text(&head, 13).and_then(|xid| xid.parse().ok()),
    };
    Some((report, segment_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_header_is_no_record() {
        let end = |lsn: &str| last_record_end(&format!("{lsn} 16777216")).map(|lsn| lsn.to_string());
        assert_eq!(end("0/C000028").as_deref(), Some("0/C000000"), "a fresh segment");
        assert_eq!(end("0/C002018").as_deref(), Some("0/C002000"), "a fresh page");
        // 40 bytes into a page that begins no segment: the rest of a record.
        assert_eq!(end("0/C002028").as_deref(), Some("0/C002028"));
        assert_eq!(end("0/C000060").as_deref(), Some("0/C000060"));
        assert_eq!(last_record_end("0/C000060"), None);
        assert_eq!(last_record_end("0/C000060 0"), None);
    }
}
