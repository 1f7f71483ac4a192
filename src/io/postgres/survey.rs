//! What `doctor` asks of the local PostgreSQL: settings, `pg_hba` rules, roles and databases, as they are in force.
//!
//! What it is NOT: it judges nothing (`app::doctor` does) and changes nothing. It reads a primary and a standby alike.

use super::session::{Session, sentence};
use super::{Cluster, PgError};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio_postgres::{NoTls, SimpleQueryMessage, SimpleQueryRow};

/// Databases looked into one by one; more are not looked into, and the survey says so.
const MAX_DATABASES: usize = 64;

/// The settings that are asked for; what this server does not know is missing in the answer.
const SETTINGS: &str = "SELECT name, setting, pending_restart FROM pg_settings WHERE name IN ('listen_addresses', \
    'port', 'unix_socket_directories', 'unix_socket_permissions', 'wal_level', 'max_wal_senders', \
    'max_replication_slots', 'hot_standby', 'wal_log_hints', 'data_checksums', 'full_page_writes', 'fsync', \
    'restart_after_crash', 'synchronous_standby_names', 'server_version', 'hba_file', \
    'max_connections', 'superuser_reserved_connections', 'reserved_connections', 'max_worker_processes', \
    'max_prepared_transactions', 'max_locks_per_transaction', 'wal_keep_size', 'max_slot_wal_keep_size', \
    'shared_preload_libraries', 'archive_mode')";
/// The daemon's own session has another `synchronous_commit`, so the files are asked.
const COMMIT: &str = "SELECT setting FROM pg_file_settings WHERE name = 'synchronous_commit' AND applied";
const HBA: &str = "SELECT line_number, type, array_to_string(database, ','), array_to_string(user_name, ','), \
    address, netmask, auth_method, error, array_to_string(options, ',') FROM pg_hba_file_rules";
/// Changed after the last reload: what stands in the file is not what is in force.
const HBA_AGE: &str = "SELECT (pg_stat_file(current_setting('hba_file'))).modification > pg_conf_load_time()";
/// Roles and databases whose commits wait for less than the standby's flush.
const LOWERED: &str = "SELECT r.rolname, d.datname, split_part(word, '=', 2) FROM pg_db_role_setting s \
    LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase, \
    unnest(s.setconfig) AS word WHERE split_part(word, '=', 1) = 'synchronous_commit' ORDER BY 1, 2";
const ROLES: &str = "SELECT rolname, rolsuper FROM pg_roles WHERE rolcanlogin ORDER BY 1";
const MD5_ROLES: &str = "SELECT rolname FROM pg_authid WHERE rolcanlogin AND rolpassword LIKE 'md5%' ORDER BY 1";
const SLOTS: &str = "SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'physical'";
const DATABASES: &str = "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY 1";
/// Per database: its functions have privileges of their own.
const MAY_CANCEL: &str = "SELECT rolname FROM pg_roles WHERE rolcanlogin AND NOT rolsuper AND \
    has_function_privilege(oid, 'pg_catalog.pg_cancel_backend(integer)', 'EXECUTE') ORDER BY 1";
const UNLOGGED: &str =
    "SELECT count(*) FROM pg_class WHERE relpersistence = 'u' AND relkind IN ('r', 'm') AND relnamespace <> 0";
const LIBRARIES: &str = "SELECT DISTINCT probin FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang \
    WHERE lanname = 'c' AND probin IS NOT NULL ORDER BY 1";

/// One rule of `pg_hba_file_rules`; lists keep PostgreSQL's keywords.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HbaRule {
    pub line: u32,
    /// `local`, `host`, `hostssl`, ...
    pub kind: String,
    pub databases: Vec<String>,
    pub users: Vec<String>,
    /// An address, a host name, or a keyword; with its mask beside it.
    pub address: String,
    pub netmask: String,
    pub method: String,
    /// The line is not understood, and so not in force.
    pub error: String,
    /// `name=value`.
    pub options: Vec<String>,
}

/// `synchronous_commit` of a role, a database, or a role in a database (`None`: all).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lowered {
    pub role: Option<String>,
    pub database: Option<String>,
    pub value: String,
}

/// What one database holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatabaseFacts {
    pub name: String,
    /// Roles that may log in, are no superusers, and may execute `pg_cancel_backend` there.
    pub may_cancel: Vec<String>,
    pub unlogged: u64,
    /// Files that functions written in C are in, as PostgreSQL names them.
    pub libraries: Vec<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    pub in_recovery: bool,
    pub settings: BTreeMap<String, String>,
    /// Settings whose value in the files waits for a restart.
    pub pending_restart: Vec<String>,
    /// `synchronous_commit` as the files have it.
    pub synchronous_commit: Option<String>,
    pub hba: Vec<HbaRule>,
    pub hba_not_loaded: bool,
    pub lowered: Vec<Lowered>,
    /// May log in; true: superuser.
    pub roles: Vec<(String, bool)>,
    /// May log in, and their passwords are stored as md5.
    pub md5_roles: Vec<String>,
    pub slots: Vec<String>,
    pub databases: Vec<DatabaseFacts>,
    /// Databases that could not be looked into, with the reason.
    pub unseen: Vec<(String, String)>,
}

impl Survey {
    /// A setting in force, empty where this server has none of that name.
    pub fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map(String::as_str).unwrap_or_default()
    }
}

impl Cluster {
    /// Looks at everything once.
    ///
    /// # Errors
    /// PostgreSQL is down, or does not answer one question within `limit`.
    pub async fn survey(&self, limit: Duration) -> Result<Survey, PgError> {
        let session = self.session(limit).await?;
        let mut survey = Survey {
            in_recovery: session.value("SELECT pg_is_in_recovery()", limit).await? == "t",
            ..Survey::default()
        };
        for row in session.rows(SETTINGS, limit).await? {
            let name = word(&row, 0);
            if word(&row, 2) == "t" {
                survey.pending_restart.push(name.clone());
            }
            survey.settings.insert(name, word(&row, 1));
        }
        survey.synchronous_commit = firsts(&session, COMMIT, limit).await?.pop();
        survey.hba = session.rows(HBA, limit).await?.iter().map(rule).collect();
        survey.hba_not_loaded = session.value(HBA_AGE, limit).await? == "t";
        let optional = |text: String| if text.is_empty() { None } else { Some(text) };
        for row in session.rows(LOWERED, limit).await? {
            let (role, database) = (optional(word(&row, 0)), optional(word(&row, 1)));
            survey.lowered.push(Lowered { role, database, value: word(&row, 2) });
        }
        survey.roles =
            session.rows(ROLES, limit).await?.iter().map(|row| (word(row, 0), word(row, 1) == "t")).collect();
        survey.md5_roles = firsts(&session, MD5_ROLES, limit).await?;
        survey.slots = firsts(&session, SLOTS, limit).await?;
        for (at, name) in firsts(&session, DATABASES, limit).await?.into_iter().enumerate() {
            let seen = match at {
                0..MAX_DATABASES => self.database(&name, limit).await,
                _ => Err(format!("only the first {MAX_DATABASES} databases are looked into")),
            };
            match seen {
                Ok(facts) => survey.databases.push(facts),
                Err(why) => survey.unseen.push((name, why)),
            }
        }
        Ok(survey)
    }

    async fn database(&self, name: &str, limit: Duration) -> Result<DatabaseFacts, String> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.settings.socket_dir).port(self.settings.port).user(&self.admin_user).dbname(name);
        config.application_name("portcullis doctor").options("-c search_path=pg_catalog");
        let look = async {
            let (client, connection) = config.connect(NoTls).await?;
            let _ends_with_the_client = tokio::spawn(connection);
            let cancel = client.simple_query(MAY_CANCEL).await?;
            let unlogged = client.simple_query(UNLOGGED).await?;
            let libraries = client.simple_query(LIBRARIES).await?;
            Ok::<_, tokio_postgres::Error>((cancel, unlogged, libraries))
        };
        let answer = tokio::time::timeout(limit, look).await;
        let (cancel, unlogged, libraries) =
            answer.map_err(|_| format!("no answer within {limit:?}"))?.map_err(|error| sentence(&error))?;
        let column = |messages: Vec<SimpleQueryMessage>| -> Vec<String> {
            let rows = messages.into_iter().filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(word(&row, 0)),
                _ => None,
            });
            rows.collect()
        };
        let unlogged = column(unlogged).first().and_then(|count| count.parse().ok()).unwrap_or_default();
        Ok(DatabaseFacts { name: name.to_owned(), may_cancel: column(cancel), unlogged, libraries: column(libraries) })
    }

    /// The Debian unit that owns this node's data directory, where there is one.
    pub fn unit(&self) -> Option<String> {
        self.debian().map(|debian| debian.unit())
    }

    /// The socket that this node's sessions use.
    pub fn socket(&self) -> PathBuf {
        self.settings.socket_dir.join(format!(".s.PGSQL.{}", self.settings.port))
    }
}

pub(super) async fn firsts(session: &Session, sql: &str, limit: Duration) -> Result<Vec<String>, PgError> {
    Ok(session.rows(sql, limit).await?.iter().map(|row| word(row, 0)).collect())
}

/// A column as text; NULL is empty.
pub(super) fn word(row: &SimpleQueryRow, column: usize) -> String {
    row.try_get(column).ok().flatten().unwrap_or_default().to_owned()
}

fn rule(row: &SimpleQueryRow) -> HbaRule {
    let list = |column| word(row, column).split(',').filter(|w| !w.is_empty()).map(str::to_owned).collect();
    HbaRule {
        line: word(row, 0).parse().unwrap_or_default(),
        kind: word(row, 1),
        databases: list(2),
        users: list(3),
        address: word(row, 4),
        netmask: word(row, 5),
        method: word(row, 6),
        error: word(row, 7),
        options: list(8),
    }
}
