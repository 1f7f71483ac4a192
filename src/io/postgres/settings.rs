//! The settings the daemon owns, and nothing else: `synchronous_standby_names`, `primary_conninfo`,
//! `primary_slot_name`, `standby.signal`, and the passfile they name.
//!
//! While PostgreSQL runs they change by ALTER SYSTEM and a reload, and a change is done only when a look finds it in
//! force; while it is stopped `postgresql.auto.conf` is edited as ALTER SYSTEM would. No password is ever part of a
//! setting: `primary_conninfo` names a passfile under `state_dir` (0600).

use super::autoconf::AutoConf;
use super::session::{INSERT_POSITION, PgLost, Session, last_record_end};
use super::{Cluster, Peer, PgError, files};
use crate::base::ids::{Lsn, NodeName};
use crate::io::clock;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a changed setting is looked for after a reload.
const WATCH_EVERY: Duration = Duration::from_millis(5);
/// A setting and its new value.
pub(super) type Setting<'a> = (&'static str, &'a str);

/// Name of the physical slot of a standby: slot names allow only `a-z 0-9 _` (PostgreSQL 15, section 27.2.6).
pub fn slot_name(node: &NodeName) -> String {
    let safe = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '_' };
    let name = format!("portcullis_{}", node.as_str().chars().map(safe).collect::<String>());
    // NAMEDATALEN - 1; node names may be 63 long themselves.
    name.get(..63).map(str::to_owned).unwrap_or(name)
}

impl Cluster {
    /// Sets the list of synchronous standbys to `name` alone, or to nobody, and waits until it is in force. That
    /// commits really wait is proven only by [`Cluster::rearm_barrier`] (R4).
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit`, or the value cannot come into force.
    pub async fn set_sync_list(&self, name: Option<&NodeName>, limit: Duration) -> Result<(), PgError> {
        let list = name.map(|name| format!("\"{name}\"")).unwrap_or_default();
        self.apply(&[("synchronous_standby_names", &list)], limit).await
    }

    /// R4, re-arming: returns an LSN such that every commit after it waits for the list now in force.
    ///
    /// Backends obey a flag that the checkpointer sets when *it* reloads, which neither SHOW nor `sync_state` shows.
    /// So: a reload; wait until `pg_conf_load_time()` has changed; then a session forked after that (the postmaster
    /// signals all its children before it forks again, so the checkpointer has its signal); then two CHECKPOINTs, of
    /// which at least the second begins after the checkpointer has reloaded; then the insert LSN.
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit` (each of the two checkpoints may take that long).
    pub async fn rearm_barrier(&self, limit: Duration) -> Result<Lsn, PgError> {
        let session = self.session(limit).await?;
        let loaded = "SELECT pg_conf_load_time()::text";
        let before = session.value(loaded, limit).await?;
        session.value("SELECT pg_reload_conf()", limit).await?;
        let deadline = clock::now() + limit;
        while session.value(loaded, limit).await? == before {
            if clock::now() >= deadline {
                return Err(PgError::TimedOut(format!("PostgreSQL did not reload within {limit:?}")));
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
        let session = self.session(limit).await?;
        for _ in 0..2 {
            session.rows("CHECKPOINT", limit).await?;
        }
        let lsn = session.value(INSERT_POSITION, limit).await?;
        last_record_end(&lsn).ok_or_else(|| PgError::Failed("PostgreSQL gave no LSN; look into its log".to_owned()))
    }

    /// A CHECKPOINT (on a standby a restartpoint).
    ///
    /// # Errors
    /// PostgreSQL does not run, or needs longer than `limit` (it goes on).
    pub async fn checkpoint(&self, limit: Duration) -> Result<(), PgError> {
        self.session(limit).await?.rows("CHECKPOINT", limit).await.map(|_| ())
    }

    /// Whether a session is to be had at all.
    ///
    /// # Errors
    /// [`PgLost`]; `Silent` where PostgreSQL is there and gives none within `limit`.
    pub async fn reach(&self, limit: Duration) -> Result<(), PgLost> {
        self.session(limit).await.map(drop)
    }

    /// Wakes a standby that waits out `wal_retrieve_retry_interval` (5 s) before it looks for its primary again: the
    /// start-up process does so at its next wake-up, which a reload is.
    ///
    /// # Errors
    /// PostgreSQL does not run, or does not answer within `limit`.
    pub async fn nudge(&self, limit: Duration) -> Result<(), PgError> {
        self.session(limit).await?.rows("SELECT pg_reload_conf()", limit).await.map(|_| ())
    }

    /// Changes owned settings wherever PostgreSQL stands: running, by ALTER SYSTEM, reload and a look; stopped, in the
    /// file.
    pub(super) async fn apply(&self, settings: &[Setting<'_>], limit: Duration) -> Result<(), PgError> {
        if !self.is_running() {
            return self.edit_auto_conf(&self.settings.data_dir, |conf| {
                for (name, value) in settings {
                    conf.set(name, value);
                }
            });
        }
        let session = self.session(limit).await?;
        for (name, value) in settings {
            let sql = format!("ALTER SYSTEM SET {} = {}", escape_identifier(name), escape_literal(value));
            session.rows(&sql, limit).await?;
        }
        session.value("SELECT pg_reload_conf()", limit).await?;
        wait_in_force(&session, settings, limit).await
    }

    /// Edits `postgresql.auto.conf` of a stopped cluster.
    pub(super) fn edit_auto_conf(&self, data_dir: &Path, change: impl FnOnce(&mut AutoConf)) -> Result<(), PgError> {
        let path = data_dir.join("postgresql.auto.conf");
        let mut conf = AutoConf::parse(&read_or_empty(&path)?);
        change(&mut conf);
        files::replace(&path, conf.render().as_bytes(), 0o600)
    }

    /// `primary_conninfo` and `primary_slot_name` that follow `peer`, or nobody.
    pub(super) fn following(&self, peer: Option<&Peer>) -> Result<[(&'static str, String); 2], PgError> {
        let conninfo = peer.map(|peer| self.conninfo(peer, self.node.as_str())).transpose()?.unwrap_or_default();
        let slot = if peer.is_some() && self.replication.slots { slot_name(&self.node) } else { String::new() };
        Ok([("primary_conninfo", conninfo), ("primary_slot_name", slot)])
    }

    /// For a tool that copies: a source whose machine died ends it within half a minute, not after the two hours of
    /// TCP. What the administrator says in `replication.conninfo` comes after it and counts.
    pub(super) fn tool_conninfo(&self, peer: &Peer, application: &str) -> Result<String, PgError> {
        Ok(format!(
            "connect_timeout=10 keepalives_idle=10 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=30000 {}",
            self.conninfo(peer, application)?
        ))
    }

    /// A libpq connection string for replication from `peer`. Holds no secret.
    pub(super) fn conninfo(&self, peer: &Peer, application: &str) -> Result<String, PgError> {
        let port = peer.port.to_string();
        let passfile = self.passfile();
        let mut words = vec![
            ("host", peer.host.as_str()),
            ("port", &port),
            ("user", &self.replication.user),
            ("application_name", application),
        ];
        if self.replication.password.is_some() {
            let path = passfile.to_str().ok_or_else(|| {
                PgError::Failed("state_dir is not UTF-8, which PostgreSQL's settings need; choose another".to_owned())
            })?;
            words.push(("passfile", path));
        }
        let mut text: Vec<String> =
            words.into_iter().map(|(key, value)| format!("{key}={}", libpq_word(value))).collect();
        let further = self.replication.conninfo.trim();
        if further.to_ascii_lowercase().split(['=', ' ', '\'']).any(|word| word == "password") {
            return Err(PgError::Refused(
                "replication.conninfo holds a password, which everyone could read in the process list; put it into \
                 replication.password_file"
                    .to_owned(),
            ));
        }
        if !further.is_empty() {
            text.push(further.to_owned());
        }
        Ok(text.join(" "))
    }

    pub(super) fn passfile(&self) -> PathBuf {
        self.state_dir.join("replication.passfile")
    }

    /// Writes the passfile that `primary_conninfo` names (0600).
    ///
    /// # Errors
    /// The password holds a line break, or the file cannot be written.
    pub fn write_passfile(&self) -> Result<(), PgError> {
        match self.passfile_line()? {
            Some(line) => files::replace(&self.passfile(), &line, 0o600),
            None => Ok(()),
        }
    }

    /// What a passfile holds; `None`: there is no password.
    pub(super) fn passfile_line(&self) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, PgError> {
        let Some(password) = &self.replication.password else { return Ok(None) };
        let mut line = zeroize::Zeroizing::new(b"*:*:*:".to_vec());
        escape_passfile(self.replication.user.as_bytes(), &mut line);
        line.push(b':');
        escape_passfile(password.expose(), &mut line);
        if line.iter().any(|b| matches!(b, b'\n' | b'\r' | 0)) {
            return Err(PgError::Refused(
                "the replication password holds a line break, which a passfile cannot; choose another".to_owned(),
            ));
        }
        line.push(b'\n');
        Ok(Some(line))
    }
}

/// Waits until the session, which reloads after the postmaster did, shows every value.
async fn wait_in_force(session: &Session, settings: &[Setting<'_>], limit: Duration) -> Result<(), PgError> {
    let deadline = clock::now() + limit;
    for (name, value) in settings {
        let sql = format!("SELECT setting, source FROM pg_settings WHERE name = {}", escape_literal(name));
        loop {
            let rows = session.rows(&sql, limit).await?;
            let column = |at| rows.first().and_then(|row| row.try_get(at).ok().flatten()).unwrap_or_default();
            if column(0) == *value {
                break;
            }
            if column(1) == "command line" {
                return Err(PgError::Failed(format!(
                    "{name} is given on PostgreSQL's command line, which outdoes ALTER SYSTEM; remove it there"
                )));
            }
            if clock::now() >= deadline {
                return Err(PgError::TimedOut(format!("{name} is not in force {limit:?} after the reload")));
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    }
    Ok(())
}

pub(super) fn read_or_empty(path: &Path) -> Result<String, PgError> {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map_err(|_| PgError::Failed(format!("{} is not UTF-8; correct it by hand", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(files::failed("read", path, &error)),
    }
}

/// One value of a connection string (PostgreSQL 15, section 34.1.1.1).
fn libpq_word(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | ':' | ',');
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Escapes `:` and `\` (PostgreSQL 15, section 34.16).
fn escape_passfile(field: &[u8], out: &mut Vec<u8>) {
    for &byte in field {
        if matches!(byte, b':' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_keep_to_postgresqls_alphabet_and_length() {
        let name = |text: &str| slot_name(&text.parse().expect("valid"));
        assert_eq!(name("alp-2"), "portcullis_alp_2");
        assert_eq!(name(&"a".repeat(63)).len(), 63);
    }

    #[test]
    fn words_of_a_conninfo_are_quoted_when_they_must() {
        assert_eq!(libpq_word("192.0.2.1"), "192.0.2.1");
        assert_eq!(libpq_word(""), "''");
        assert_eq!(libpq_word(r"a b'c\"), r"'a b\'c\\'");
    }

    #[test]
    fn passfile_fields_are_escaped() {
        let mut out = Vec::new();
        escape_passfile(br"a:b\c", &mut out);
        assert_eq!(out, br"a\:b\\c");
    }
}
