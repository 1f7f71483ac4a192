//! More of what `doctor` asks of PostgreSQL: slots, the replication role, libraries, collations, the tools of
//! `bin_dir`, and a real login of the replication role at another node. It judges nothing and changes nothing.

use super::role::REWIND_FUNCTIONS;
use super::session::Session;
use super::survey::{firsts, word};
use super::{Cluster, Peer, PgError, tool};
use postgres_protocol::escape::escape_literal;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

const MACHINE: &str = "SELECT (SELECT system_identifier FROM pg_control_system()), \
    (SELECT sum(pg_tablespace_size(oid))::bigint FROM pg_tablespace), \
    (SELECT setting FROM pg_config WHERE name = 'PKGLIBDIR'), \
    (SELECT status || ' ' || coalesce(sender_host, '') FROM pg_stat_wal_receiver), \
    current_setting('server_version_num')";
const SLOTS: &str = "SELECT slot_name, active, coalesce(wal_status, ''), slot_type FROM pg_replication_slots";
/// From PostgreSQL 15 on a database remembers the version of its collation.
const COLLATIONS: &str = "SELECT datname, datcollversion, pg_database_collation_actual_version(oid) FROM pg_database \
    WHERE datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) AND datcollversion IS NOT NULL";
/// What a failover and a rejoin run.
const TOOLS: [&str; 6] = ["postgres", "pg_ctl", "pg_controldata", "pg_basebackup", "pg_rewind", "psql"];
const TOOL_LIMIT: Duration = Duration::from_secs(3);

/// One replication slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotFacts {
    pub name: String,
    pub active: bool,
    /// `reserved`, `extended`, `unreserved`, `lost`, or empty.
    pub wal_status: String,
    pub physical: bool,
}

/// The replication role as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoleFacts {
    pub login: bool,
    pub replication: bool,
    pub superuser: bool,
    /// Its password's validity is over.
    pub expired: bool,
    /// Functions of `pg_rewind` that it may not execute.
    pub lacks: Vec<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fitness {
    pub system_id: String,
    pub version: u32,
    /// Bytes of all tablespaces.
    pub bytes: u64,
    pub slots: Vec<SlotFacts>,
    /// `None`: there is no such role.
    pub role: Option<RoleFacts>,
    /// Libraries that a setting or a function names, and the file that is not there.
    pub missing_libraries: Vec<(String, PathBuf)>,
    /// Database, version recorded, version of this machine.
    pub collations: Vec<(String, String, String)>,
    /// Status of the walreceiver, and whom it follows.
    pub receiver: Option<String>,
}

/// How a login of the replication role at another node ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// The other side's system identifier.
    Done(String),
    Failed(String),
    /// It could not be tried from here.
    Untried(String),
}

/// One tool of `bin_dir`: its name and its version's line, or why there is none.
pub type Tool = (&'static str, Result<String, String>);

impl Cluster {
    /// Looks once. `libraries` are further ones that functions name.
    ///
    /// # Errors
    /// PostgreSQL is down, or does not answer one question within `limit`.
    pub async fn fitness(&self, preload: &str, libraries: &[String], limit: Duration) -> Result<Fitness, PgError> {
        let session = self.session(limit).await?;
        let mut fitness = Fitness::default();
        let mut folder = String::new();
        if let Some(row) = session.rows(MACHINE, limit).await?.first() {
            fitness.system_id = word(row, 0);
            fitness.bytes = word(row, 1).parse().unwrap_or_default();
            folder = word(row, 2);
            fitness.receiver = Some(word(row, 3)).filter(|text| !text.is_empty());
            fitness.version = word(row, 4).parse().unwrap_or_default();
        }
        for row in session.rows(SLOTS, limit).await? {
            fitness.slots.push(SlotFacts {
                name: word(&row, 0),
                active: word(&row, 1) == "t",
                wal_status: word(&row, 2),
                physical: word(&row, 3) == "physical",
            });
        }
        fitness.role = self.role_facts(&session, limit).await?;
        if fitness.version >= 150_000 {
            let rows = session.rows(COLLATIONS, limit).await?;
            fitness.collations = rows.iter().map(|row| (word(row, 0), word(row, 1), word(row, 2))).collect();
        }
        // Somewhere else PostgreSQL would look further than here.
        if session.value("SHOW dynamic_library_path", limit).await? == "$libdir" && !folder.is_empty() {
            fitness.missing_libraries = missing(preload, libraries, Path::new(&folder));
        }
        Ok(fitness)
    }

    async fn role_facts(&self, session: &Session, limit: Duration) -> Result<Option<RoleFacts>, PgError> {
        let user = escape_literal(&self.replication.user);
        let sql = format!(
            "SELECT rolcanlogin, rolreplication, rolsuper, coalesce(rolvaliduntil < now(), false) FROM pg_roles \
             WHERE rolname = {user}"
        );
        let rows = session.rows(&sql, limit).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let is = |at| word(row, at) == "t";
        let list = REWIND_FUNCTIONS.map(|function| escape_literal(function).trim().to_owned()).join(", ");
        let sql =
            format!("SELECT f FROM unnest(ARRAY[{list}]) AS f WHERE NOT has_function_privilege({user}, f, 'EXECUTE')");
        let lacks = firsts(session, &sql, limit).await?;
        Ok(Some(RoleFacts { login: is(0), replication: is(1), superuser: is(2), expired: is(3), lacks }))
    }

    /// Logs in at `peer` as the replication role with what `primary_conninfo` would hold. With `database` as
    /// `pg_rewind` does, else as a standby does, which tells the system identifier of the other side.
    pub async fn try_login(&self, peer: &Peer, database: Option<&str>, limit: Duration) -> Login {
        // In memory, and gone with this process: the password touches no disk.
        let passfile = match self.passfile_line().and_then(|line| line.map(|line| in_memory(&line)).transpose()) {
            Ok(file) => file,
            Err(error) => return Login::Untried(error.to_string()),
        };
        let conninfo = match self.conninfo(peer, "portcullis doctor") {
            Ok(text) => text,
            Err(error) => return Login::Untried(error.to_string()),
        };
        let place = passfile.as_ref().map(|file| format!(" passfile=/proc/self/fd/{}", file.as_raw_fd()));
        let (what, sql) = match database {
            Some(database) => (format!("dbname={database}"), "SELECT 1"),
            None => ("dbname=replication replication=true".to_owned(), "IDENTIFY_SYSTEM"),
        };
        // The last word for a key counts.
        let conninfo = format!("{conninfo} {what} connect_timeout=2{}", place.unwrap_or_default());
        let program = self.settings.bin_dir.join("psql");
        if !program.exists() {
            return Login::Untried(format!("{} is not there", program.display()));
        }
        let mut command = tool::command(program);
        command.args(["-XAtw", "-c", sql]).arg(conninfo);
        match tool::run(command, "psql", limit).await {
            Ok(output) if output.ok => {
                Login::Done(output.out.split(['|', '\n']).next().unwrap_or_default().trim().to_owned())
            }
            Ok(output) => Login::Failed(output.last_line()),
            Err(error) => Login::Failed(error.to_string()),
        }
    }

    /// The tools of `bin_dir` with their versions.
    pub async fn tools(&self) -> Vec<Tool> {
        let ask = async |name: &'static str| -> Tool {
            let program = self.settings.bin_dir.join(name);
            if !program.exists() {
                return (name, Err(format!("{} is not there", program.display())));
            }
            let mut command = tool::command(program);
            command.arg("--version");
            let said = match tool::run(command, name, TOOL_LIMIT).await {
                Ok(output) if output.ok => Ok(output.out.trim().to_owned()),
                Ok(output) => Err(output.last_line()),
                Err(error) => Err(error.to_string()),
            };
            (name, said)
        };
        futures_util::future::join_all(TOOLS.map(ask)).await
    }
}

/// A file in memory that a child can open by its number.
fn in_memory(content: &[u8]) -> Result<std::fs::File, PgError> {
    use std::io::Write;
    let failed = |error: std::io::Error| PgError::Failed(format!("no file in memory for the password: {error}"));
    let make = || -> std::io::Result<std::fs::File> {
        let fd = rustix::fs::memfd_create("passfile", rustix::fs::MemfdFlags::empty())?;
        let mut file = std::fs::File::from(fd);
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        file.write_all(content)?;
        Ok(file)
    };
    make().map_err(failed)
}

/// The files that PostgreSQL would not find: `name`, `$libdir/name`, or a path, each with or without its end.
fn missing(preload: &str, libraries: &[String], folder: &Path) -> Vec<(String, PathBuf)> {
    let preload = preload.split(',').map(|name| name.trim().trim_matches('"').to_owned());
    let mut names: Vec<String> = preload.chain(libraries.iter().cloned()).filter(|name| !name.is_empty()).collect();
    names.sort();
    names.dedup();
    let file = |name: &String| {
        let plain = name.strip_prefix("$libdir/").unwrap_or(name);
        let path = folder.join(plain);
        let with_end = PathBuf::from(format!("{}.so", path.display()));
        (!path.is_file() && !with_end.is_file()).then_some((name.clone(), with_end))
    };
    names.iter().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_looked_for_as_postgresql_does() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("here.so"), "").expect("written");
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let found = missing("here, \"gone\"", &names(&["$libdir/here", "$libdir/gone", "here.so"]), dir.path());
        let found: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(found, ["$libdir/gone", "gone"]);
        assert_eq!(missing("", &[], dir.path()), []);
    }

    #[test]
    fn a_file_in_memory_is_closed_to_others() {
        use std::os::unix::fs::PermissionsExt;
        let file = in_memory(b"x").expect("made");
        assert_eq!(file.metadata().expect("there").permissions().mode() & 0o777, 0o600);
    }
}
