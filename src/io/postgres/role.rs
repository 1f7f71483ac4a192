//! What the active node makes for its standbys: the replication role, the physical slots, and the facts a clone needs
//! to know beforehand.

use super::session::{Session, last_record_end, lost_by};
use super::{Cluster, PgError, history};
use crate::base::ids::{SystemId, TimelineId};
use crate::engine::report::WalTail;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use postgres_protocol::password::scram_sha_256;
use std::fmt;
use std::time::Duration;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type};

/// What `pg_rewind` executes on its source as the replication role (PostgreSQL 15, pg_rewind, Notes).
pub(super) const REWIND_FUNCTIONS: [&str; 4] = [
    "pg_catalog.pg_ls_dir(text, boolean, boolean)",
    "pg_catalog.pg_stat_file(text, boolean)",
    "pg_catalog.pg_read_binary_file(text)",
    "pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)",
];

/// Keeps what this session does out of the server's log and out of pg_stat_statements.
const QUIET: &str = "SET log_statement = 'none'; SET log_min_duration_statement = -1; SET log_duration = off; \
    SET log_min_duration_sample = -1; SET log_min_error_statement = 'panic'; SET pg_stat_statements.track = 'none'; \
    SET default_transaction_read_only = off";

/// The verifier travels as a parameter into a setting of the session and from there into dynamic SQL: it is in no SQL
/// text, hence neither in a log nor in pg_stat_activity.
const CREATE_ROLE: &str = "DO $$ BEGIN EXECUTE format('CREATE ROLE %I LOGIN REPLICATION PASSWORD %s', \
    current_setting('portcullis.role'), \
    coalesce(quote_literal(nullif(current_setting('portcullis.verifier'), '')), 'NULL')); END $$";

/// All of [`SourceFacts`] but the history.
const FACTS: &str = "SELECT (SELECT system_identifier FROM pg_control_system()), \
    (SELECT sum(pg_tablespace_size(oid))::bigint FROM pg_tablespace), \
    (SELECT count(*) FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')), \
    pg_walfile_name(pg_current_wal_insert_lsn()), (SELECT timeline_id FROM pg_control_checkpoint()), \
    pg_current_wal_insert_lsn(), (SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'), \
    (SELECT min(substr(name, 9)) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'), \
    (SELECT coalesce(string_agg(pg_tablespace_size(oid) || ' ' || pg_tablespace_location(oid), E'\\n'), '') \
     FROM pg_tablespace \
     WHERE spcname NOT IN ('pg_default', 'pg_global'))";

pub use crate::engine::report::SourceFacts;

impl Cluster {
    /// Makes the replication role when it is missing, and gives it what `pg_rewind` needs. An existing role keeps its
    /// password and attributes. The password itself never leaves this process: PostgreSQL gets the SCRAM verifier.
    ///
    /// # Errors
    /// PostgreSQL is not a writable primary, or does not answer within `limit`.
    pub async fn ensure_replication_role(&self, limit: Duration) -> Result<(), PgError> {
        let session = self.session(limit).await?;
        session.rows(QUIET, limit).await?;
        let user = self.replication.user.as_str();
        let exists = format!("SELECT count(*) FROM pg_roles WHERE rolname = {}", escape_literal(user));
        if session.value(&exists, limit).await? == "0" {
            let verifier = self.replication.password.as_ref().map(|password| scram_sha_256(password.expose()));
            set_quietly(&session, "portcullis.role", user, limit).await?;
            set_quietly(&session, "portcullis.verifier", verifier.as_deref().unwrap_or_default(), limit).await?;
            session.rows(CREATE_ROLE, limit).await?;
            tracing::info!(role = user, "made the replication role");
        }
        for function in REWIND_FUNCTIONS {
            let granted = format!("SELECT has_function_privilege({}, '{function}', 'EXECUTE')", escape_literal(user));
            if session.value(&granted, limit).await? == "f" {
                let grant = format!("GRANT EXECUTE ON FUNCTION {function} TO {}", escape_identifier(user));
                session.rows(&grant, limit).await?;
            }
        }
        Ok(())
    }

    /// Makes a physical slot that keeps WAL from now on. Already there is fine.
    ///
    /// # Errors
    /// No free slot (`max_replication_slots`), or no answer within `limit`.
    pub async fn ensure_slot(&self, name: &str, limit: Duration) -> Result<(), PgError> {
        let name = escape_literal(name);
        let sql = format!(
            "SELECT count(pg_create_physical_replication_slot({name}, true)) \
             WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {name})"
        );
        self.session(limit).await?.value(&sql, limit).await.map(|_| ())
    }

    /// Drops a slot. Not there is fine.
    ///
    /// # Errors
    /// A standby streams over it, or no answer within `limit`.
    pub async fn drop_slot(&self, name: &str, limit: Duration) -> Result<(), PgError> {
        let sql = format!(
            "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE slot_name = {}",
            escape_literal(name)
        );
        self.session(limit).await?.value(&sql, limit).await.map(|_| ())
    }

    /// Drops the slots of ours that nobody uses: on a standby they are left over from when it was the primary.
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit`.
    pub async fn drop_idle_slots(&self, limit: Duration) -> Result<(), PgError> {
        let sql = "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots \
            WHERE slot_type = 'physical' AND NOT active AND slot_name LIKE 'portcullis\\_%'";
        self.session(limit).await?.value(sql, limit).await.map(|_| ())
    }

    /// What a rejoin to this primary must know beforehand. Changes nothing, except that right after a promotion it
    /// makes the checkpoint that `pg_rewind` waits for. With `tail`: whether the WAL here is the same.
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit`.
    pub async fn look_as_source(&self, tail: Option<&WalTail>, limit: Duration) -> Result<SourceFacts, PgError> {
        let mut facts = self.source_facts(limit).await?;
        if facts.control_timeline != facts.timeline {
            self.checkpoint(limit).await?;
            facts = self.source_facts(limit).await?;
        }
        if let Some(tail) = tail {
            facts.same_tail = self.has_tail(tail, limit).await?;
        }
        Ok(facts)
    }

    async fn has_tail(&self, tail: &WalTail, limit: Duration) -> Result<Option<bool>, PgError> {
        if tail.segment.len() != 24 || !tail.segment.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        // A file that is not there is NULL, and nothing follows from it.
        let sql = format!(
            "SELECT coalesce(encode(sha256(pg_read_binary_file('pg_wal/{}', {}, {}, true)), 'hex'), '')",
            tail.segment, tail.from, tail.len
        );
        let here = self.session(limit).await?.value(&sql, limit).await?;
        Ok((!here.is_empty()).then(|| here == tail.sha256))
    }

    /// What a clone of this cluster must know beforehand.
    ///
    /// # Errors
    /// PostgreSQL does not answer within `limit`.
    pub async fn source_facts(&self, limit: Duration) -> Result<SourceFacts, PgError> {
        let session = self.session(limit).await?;
        let rows = session.rows(FACTS, limit).await?;
        let column = |at| rows.first().and_then(|row| row.try_get(at).ok().flatten()).unwrap_or_default();
        let facts = || -> Option<SourceFacts> {
            // The first eight digits of a segment's name are its timeline.
            let timeline = TimelineId(u32::from_str_radix(column(3).get(..8)?, 16).ok()?);
            let segment_size = column(6).parse().ok()?;
            Some(SourceFacts {
                system_id: SystemId(column(0).parse::<i64>().ok()?.cast_unsigned()),
                bytes: column(1).parse().ok()?,
                tablespaces: column(2).parse().ok()?,
                spaces: column(8).lines().filter_map(space).collect(),
                timeline,
                history: Vec::new(),
                control_timeline: TimelineId(column(4).parse().ok()?),
                lsn: last_record_end(&format!("{} {segment_size}", column(5)))?,
                oldest: history::segment_of(&format!("{:08X}{}", timeline.0, column(7)), segment_size)?.1,
                same_tail: None,
            })
        };
        let mut facts =
            facts().ok_or_else(|| PgError::Failed("PostgreSQL did not tell its size; look into its log".to_owned()))?;
        let file = history::file_name(facts.timeline);
        let sql = format!("SELECT coalesce(pg_read_file('pg_wal/{file}', 0, 1000000, true), '')");
        facts.history = history::parse(&session.value(&sql, limit).await?);
        Ok(facts)
    }
}

/// `BYTES DIRECTORY`
fn space(line: &str) -> Option<(String, u64)> {
    let (bytes, dir) = line.split_once(' ')?;
    Some((dir.to_owned(), bytes.parse().ok()?))
}

async fn set_quietly(session: &Session, name: &str, value: &str, limit: Duration) -> Result<(), PgError> {
    let sql = "SELECT set_config($1, $2, false) IS NULL";
    tokio::time::timeout(limit, session.client().query_one(sql, &[&name, &Quiet(value)]))
        .await
        .map_err(|_| PgError::TimedOut(format!("PostgreSQL did not answer within {limit:?}")))?
        .map(|_| ())
        .map_err(|error| PgError::from(lost_by(&error)))
}

/// A text parameter that does not show itself: the client library logs parameters at debug level.
struct Quiet<'a>(&'a str);

impl fmt::Debug for Quiet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("...")
    }
}
impl ToSql for Quiet<'_> {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql(ty, out)
    }
    fn accepts(ty: &Type) -> bool {
        <&str as ToSql>::accepts(ty)
    }
    tokio_postgres::types::to_sql_checked!();
}
