//! Promote, demote, make a standby, follow: the changes of PostgreSQL's own role.
//!
//! **Invariant:** whatever is interrupted on the way to a standby leaves one: `standby.signal` is written first.

use super::control::{StopMode, Stopped};
use super::postmaster::Postmaster;
use super::{Cluster, Peer, PgError, files, history};
use crate::base::ids::{Lsn, TimelineId};
use crate::io::clock;
use std::path::Path;
use std::time::Duration;

/// How often the end of a recovery is looked for; it is part of what clients wait for in a switchover.
const WATCH_EVERY: Duration = Duration::from_millis(10);
/// Short questions to a PostgreSQL that is believed to answer; after that it counts as hung.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Whether it is a standby already is asked before a stop: one that is hung is not waited for long.
const ROLE_LIMIT: Duration = Duration::from_secs(2);

/// The settings that end a recovery early; empty: none does.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time", "recovery_target_xid"];
const HAS_TARGET: &str = "SELECT EXISTS (SELECT FROM pg_settings WHERE setting <> '' AND name IN ('recovery_target', \
     'recovery_target_lsn', 'recovery_target_name', 'recovery_target_time', 'recovery_target_xid'))";
/// What a history file says that only keeps a promotion from using its number. It names no timeline, so no standby
/// follows it.
const SKIPPED: &str = "# portcullis: this number was used by another promotion\n";
/// So many numbers are skipped at most.
const SKIP_MAX: u32 = 1000;
/// Looks at a promotion that is not over, after which the start-up process is woken.
const NUDGE_AFTER: u32 = 10;

impl Cluster {
    /// Makes the local standby a writable primary; all received WAL is replayed first. Resumes a paused replay, and
    /// restarts one that has a recovery target without it. Already a primary is fine.
    ///
    /// # Errors
    /// PostgreSQL does not run, or is not writable within `limit` (it goes on: call again).
    pub async fn promote(&self, limit: Duration) -> Result<(), PgError> {
        let deadline = clock::now() + limit;
        let mut session = self.session(limit).await?;
        if session.value("SELECT pg_is_in_recovery()", limit).await? == "f" {
            return Ok(());
        }
        if session.value(HAS_TARGET, limit).await? == "t" {
            drop(session);
            self.forget_target(limit).await?;
            session = self.session(limit).await?;
        }
        session
            .value("SELECT CASE WHEN pg_is_wal_replay_paused() THEN pg_wal_replay_resume() END IS NULL", limit)
            .await?;
        // Not waiting in the server: it looks only every 100 ms.
        session.value("SELECT pg_promote(false)", limit).await?;
        let mut looks = 0_u32;
        while session.value("SELECT pg_is_in_recovery()", limit).await? == "t" {
            looks += 1;
            if looks.is_multiple_of(NUDGE_AFTER) {
                // A start-up process that looks for its primary just then sleeps out `wal_retrieve_retry_interval`.
                session.value("SELECT pg_reload_conf()", limit).await?;
            }
            if clock::now() >= deadline {
                return Err(PgError::TimedOut(format!(
                    "PostgreSQL is not promoted after {limit:?}; it goes on replaying, run promote again"
                )));
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
        Ok(())
    }

    /// A recovery target would end the replay there, and what was received after it would be lost. Such settings need
    /// a restart.
    async fn forget_target(&self, limit: Duration) -> Result<(), PgError> {
        tracing::warn!("PostgreSQL has a recovery target, which would end its replay early: restarting it without");
        self.stop(StopMode::Fast, limit).await?;
        self.edit_auto_conf(&self.settings.data_dir, |conf| {
            for name in TARGETS {
                conf.set(name, "");
            }
        })?;
        self.start(limit).await
    }

    /// [`Cluster::promote`], on a timeline above `above`: a number that somebody else used must not mean two histories
    /// (P14). PostgreSQL takes the first number that has no history file, so empty ones stand there meanwhile.
    ///
    /// # Errors
    /// As [`Cluster::promote`].
    pub async fn promote_above(&self, above: TimelineId, limit: Duration) -> Result<(), PgError> {
        let own = self.local().await?.history.current();
        let wal = self.settings.data_dir.join("pg_wal");
        for number in own.0 + 1..=above.0.min(own.0.saturating_add(SKIP_MAX)) {
            let file = wal.join(history::file_name(TimelineId(number)));
            if !file.exists() {
                files::replace(&file, SKIPPED.as_bytes(), 0o600)?;
            }
        }
        let promoted = self.promote(limit).await;
        // PostgreSQL that goes on promoting after the limit still needs them; a start takes them away.
        if !matches!(promoted, Err(PgError::TimedOut(_))) {
            clear_skipped(&self.settings.data_dir);
        }
        promoted
    }

    /// Ends the primary's service: stops it (fast for `stop_limit`, then harder) and starts it as a hot standby that
    /// follows `peer`, or nobody. A cluster that is already in recovery is only told whom to follow.
    ///
    /// A disk too full for `standby.signal` does not keep it running: then it is stopped, and stays so.
    ///
    /// # Errors
    /// From the first moment on a restart of PostgreSQL gives a standby, also when this fails half-way; call again.
    pub async fn demote(
        &self,
        peer: Option<&Peer>,
        stop_limit: Duration,
        start_limit: Duration,
    ) -> Result<Stopped, PgError> {
        if self.is_running() && self.is_in_recovery(ROLE_LIMIT.min(stop_limit)).await == Some(true) {
            self.follow(peer, start_limit).await?;
            return Ok(Stopped { how: super::StopHow::AlreadyDown, took: Duration::ZERO });
        }
        self.undo_rewind_not_begun().await?;
        if self.is_rewind_broken() {
            // Nothing runs in it, unless by a person's hand.
            self.stop(StopMode::Immediate, stop_limit).await?;
            return Err(self.refuses_half());
        }
        // Before the stop, so that whoever restarts it gets a standby; but the stop waits for no disk.
        let signal = write_signal(&self.settings.data_dir);
        let stopped = self.stop(StopMode::Fast, stop_limit).await?;
        signal?;
        self.make_standby(peer)?;
        self.start(start_limit).await?;
        if peer.is_some() {
            self.drop_idle_slots(ASK_LIMIT).await?;
        }
        Ok(stopped)
    }

    /// Turns the stopped cluster into a standby that will follow `peer`, or nobody, when it is started. The list of
    /// synchronous standbys stays as it is.
    ///
    /// # Errors
    /// `Refused` while PostgreSQL runs.
    pub fn make_standby(&self, peer: Option<&Peer>) -> Result<(), PgError> {
        if self.is_running() {
            return Err(PgError::Refused("PostgreSQL runs; stop it before it is made a standby".to_owned()));
        }
        write_signal(&self.settings.data_dir)?;
        if peer.is_some() {
            self.write_passfile()?;
        }
        let following = self.following(peer)?;
        self.edit_auto_conf(&self.settings.data_dir, |conf| {
            for (name, value) in &following {
                conf.set(name, value);
            }
        })
    }

    /// Tells a standby, running or stopped, to stream from `peer` or from nobody (PostgreSQL 13: a reload is enough).
    /// Slots that a former primary kept for its standbys are dropped when it follows: they would hold WAL for ever.
    ///
    /// # Errors
    /// The settings are not in force within `limit`.
    pub async fn follow(&self, peer: Option<&Peer>, limit: Duration) -> Result<(), PgError> {
        if peer.is_some() {
            self.write_passfile()?;
        }
        let following = self.following(peer)?;
        let settings = following.each_ref().map(|(name, value)| (*name, value.as_str()));
        self.apply(&settings, limit).await?;
        if peer.is_some() && self.is_running() {
            self.drop_idle_slots(limit).await?;
        }
        Ok(())
    }

    /// Where timeline `to` left timeline `from`, by the history file of `to`, which a standby fetches when it finds its
    /// primary there.
    ///
    /// # Errors
    /// The file is not there (yet), or does not name `from`: then `from` is no part of the history of `to`.
    pub fn switch_point(&self, from: TimelineId, to: TimelineId) -> Result<Lsn, PgError> {
        let path = self.settings.data_dir.join(format!("pg_wal/{:08X}.history", to.0));
        let text = std::fs::read_to_string(&path).map_err(|error| files::failed("read", &path, &error))?;
        let strange = || PgError::Failed(format!("{} does not say where timeline {from} ended", path.display()));
        left_at(&text, from).ok_or_else(strange)
    }

    /// Ends every client's session. A session that waits for its standby ends too, and what it wrote becomes visible
    /// (protocol-review S10): only behind a cut gate.
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit`.
    pub async fn terminate_clients(&self, limit: Duration) -> Result<(), PgError> {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type = 'client backend' \
            AND pid <> pg_backend_pid() \
            AND NOT (application_name = 'portcullis' AND client_addr IS NULL AND usename = current_user)";
        self.session(limit).await?.value(sql, limit).await.map(|_| ())
    }

    /// `None`: it does not say within `limit`.
    async fn is_in_recovery(&self, limit: Duration) -> Option<bool> {
        let asking = async {
            let session = self.session(limit).await.ok()?;
            Some(session.value("SELECT pg_is_in_recovery()", limit).await.ok()? == "t")
        };
        tokio::time::timeout(limit, asking).await.ok().flatten()
    }
}

/// A line of a history file: timeline, the position at which it was left, a reason.
fn left_at(history: &str, timeline: TimelineId) -> Option<Lsn> {
    let mut lines = history.lines().map(|line| line.split_whitespace());
    lines.find_map(|mut words| {
        let here = words.next()?.parse() == Ok(timeline.0);
        words.next().filter(|_| here)?.parse().ok()
    })
}

/// Removes what a promotion left that was cut short, for whoever starts PostgreSQL without the daemon. While one runs
/// nothing is removed: its promotion may still go on and need them.
pub fn clear_cut_short(data_dir: &Path) {
    if matches!(Postmaster::find(data_dir), Ok(None)) {
        clear_skipped(data_dir);
    }
}

/// Removes what a [`Cluster::promote_above`] that was cut short left: a standby that starts would take it for the
/// newest timeline. Below a real one they stay: a standby fetches the history of every number up to its primary's, and
/// gives up where one is missing.
pub(super) fn clear_skipped(data_dir: &Path) {
    let (mut skipped, mut newest) = (Vec::new(), 1);
    for entry in std::fs::read_dir(data_dir.join("pg_wal")).into_iter().flatten().flatten() {
        let path = entry.path();
        let number = path.file_stem().and_then(|stem| u32::from_str_radix(stem.to_str()?, 16).ok());
        let Some(number) = number.filter(|_| path.extension().is_some_and(|end| end == "history")) else { continue };
        match std::fs::read_to_string(&path) {
            Ok(text) if text == SKIPPED => skipped.push((number, path)),
            _ => newest = newest.max(number),
        }
    }
    for (_, path) in skipped.into_iter().filter(|(number, _)| *number > newest) {
        if let Err(error) = files::remove(&path) {
            tracing::warn!(file = %path.display(), %error, "remove it before PostgreSQL starts as a standby");
        }
    }
}

/// Writes `standby.signal` and removes `recovery.signal`, which would end recovery by itself.
pub(super) fn write_signal(data_dir: &Path) -> Result<(), PgError> {
    let signal = data_dir.join("standby.signal");
    if !signal.exists() {
        files::replace(&signal, b"", 0o600)?;
    }
    files::remove(&data_dir.join("recovery.signal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_file_says_where_each_timeline_was_left() {
        let text = "1\t0/3000148\tno recovery target specified\n\n2\t0/60BF860\tno recovery target specified\n";
        assert_eq!(left_at(text, TimelineId(1)), Some(Lsn(0x300_0148)));
        assert_eq!(left_at(text, TimelineId(2)), Some(Lsn(0x60B_F860)));
        assert_eq!(left_at(text, TimelineId(3)), None);
        assert_eq!(left_at("", TimelineId(1)), None);
    }
}
