//! One session of the prober: connect, and five questions, each with a time limit.
//!
//! Simple queries throughout: one round trip each, and they pass any pooler. No text of a user stands in them: the
//! session's name is made of digits, the rest are numbers.

use super::{ATTEMPT_TIME, CONNECT_TIME, STATEMENT_TIME, VERIFY_TIME};
use crate::app::render::clean;
use crate::base::fault::{ExitCode, Fault};
use std::error::Error as _;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// The table; made when missing, in the first schema of the role's `search_path`.
pub(super) const TABLE: &str = "portcullis_probe";
/// Rows of dead sessions deleted in one go when a session is prepared.
const SWEEP_ROWS: u32 = 10_000;

pub(super) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Trouble>> + Send + 'a>>;

/// A parsed DSN. No `Debug`: it holds a password.
pub(super) struct Dsn {
    config: Config,
    /// Reached over TCP: then the server's own address says which node answered.
    tcp: bool,
}

impl Dsn {
    pub(super) fn parse(text: &str) -> Result<Dsn, Fault> {
        let bad = |what: String| Fault::new(ExitCode::Config, what);
        let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| {
            // The cause names the word it stumbled over, never a value that could be the password.
            let why = error.source().map_or_else(|| error.to_string(), |cause| cause.to_string());
            bad(format!("the DSN cannot be read ({}); write postgres://user@host:6432/dbname", clean(&why)))
        })?;
        if matches!(config.get_ssl_mode(), SslMode::Require) {
            return Err(bad("sslmode=require is not built yet for probe; use sslmode=prefer or disable".to_owned()));
        }
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(bad("the DSN names no host; write postgres://user@host:6432/dbname".to_owned()));
        }
        if config.get_password().is_none()
            && let Some(password) = std::env::var_os("PGPASSWORD")
        {
            config.password(password.into_encoded_bytes());
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIME);
        }
        if config.get_application_name().is_none() {
            config.application_name("portcullis probe");
        }
        let tcp = !config.get_hosts().iter().any(|host| matches!(host, Host::Unix(_)));
        Ok(Dsn { config, tcp })
    }
}

/// Why a question has no answer, for one line of output.
#[derive(Debug, Clone)]
pub(super) struct Trouble {
    text: String,
    /// Nothing came in time: the session's state is unknown.
    pub(super) timed_out: bool,
    /// PostgreSQL said ERROR: the statement surely did not happen. (After a FATAL it may have.)
    pub(super) refused: bool,
    code: Option<SqlState>,
}

impl Trouble {
    pub(super) fn closed() -> Trouble {
        Trouble { text: "no session".to_owned(), timed_out: false, refused: false, code: None }
    }

    fn late(limit: Duration) -> Trouble {
        Trouble {
            text: format!("nothing within {} s", limit.as_secs_f64()),
            timed_out: true,
            refused: false,
            code: None,
        }
    }

    /// The role may not do this: no waiting helps.
    pub(super) fn forbidden(&self) -> bool {
        self.code.as_ref() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)
    }

    /// The table is not there.
    pub(super) fn tableless(&self) -> bool {
        self.is(&SqlState::UNDEFINED_TABLE)
    }

    fn is(&self, code: &SqlState) -> bool {
        self.code.as_ref() == Some(code)
    }
}

impl From<tokio_postgres::Error> for Trouble {
    fn from(error: tokio_postgres::Error) -> Trouble {
        if let Some(db) = error.as_db_error() {
            let text = format!("{} {}: {}", db.severity(), db.code().code(), clean(db.message()));
            let refused = db.parsed_severity() == Some(Severity::Error);
            return Trouble { text, timed_out: false, refused, code: Some(db.code().clone()) };
        }
        // The outer words ("error connecting to server") say less than the cause behind them.
        let text = error.source().map_or_else(|| error.to_string(), |cause| cause.to_string());
        Trouble { text: clean(&text), timed_out: false, refused: false, code: None }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// An open session. Dropping it ends it, also in the middle of a statement.
pub(super) struct Session {
    client: Client,
    driver: JoinHandle<()>,
    node: Option<String>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    /// Resolves the name anew, connects, logs in and learns who answered.
    pub(super) async fn open(dsn: &Dsn) -> Result<Session, Trouble> {
        let opening = async {
            let (client, connection) = dsn.config.connect(NoTls).await?;
            // Its errors reach us through the client's.
            let driver = tokio::spawn(async move { drop(connection.await) });
            Ok::<Session, Trouble>(Session { client, driver, node: None })
        };
        let mut session = timeout(ATTEMPT_TIME, opening).await.map_err(|_| Trouble::late(ATTEMPT_TIME))??;
        session.node = session.who(dsn.tcp).await?;
        Ok(session)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Which node answered, as far as it could be learnt cheaply.
    pub(super) fn node(&self) -> Option<&str> {
        self.node.as_deref()
    }

    async fn query(&self, sql: &str, limit: Duration) -> Result<Vec<SimpleQueryMessage>, Trouble> {
        let answer = timeout(limit, self.client.simple_query(sql)).await;
        Ok(answer.map_err(|_| Trouble::late(limit))??)
    }

    async fn number(&self, sql: &str) -> Result<u64, Trouble> {
        let rows = self.query(sql, STATEMENT_TIME).await?;
        Ok(first(&rows, 0).and_then(|text| text.parse().ok()).unwrap_or(0))
    }

    /// The server's own address, or, through a gate (which reaches PostgreSQL over its Unix socket, so that there is
    /// none), the primary that `SHOW pool_nodes` names.
    async fn who(&self, tcp: bool) -> Result<Option<String>, Trouble> {
        let rows = self.query("select coalesce(host(inet_server_addr()), '')", STATEMENT_TIME).await?;
        if let Some(address) = first(&rows, 0).filter(|address| !address.is_empty()) {
            return Ok(Some(clean(address)));
        }
        if !tcp {
            return Ok(None);
        }
        let Ok(rows) = self.query("SHOW pool_nodes", STATEMENT_TIME).await else { return Ok(None) };
        let primary = rows.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                let column =
                    |name: &str| row.columns().iter().position(|c| c.name() == name).and_then(|at| row.get(at));
                let name = || column("name").or_else(|| column("hostname")).map(clean);
                (column("role") == Some("primary")).then(name).flatten()
            }
            _ => None,
        });
        Ok(primary)
    }

    pub(super) async fn alive(&self) -> Result<(), Trouble> {
        self.query("select 1", STATEMENT_TIME).await.map(drop)
    }

    /// Makes the table when it is missing and sweeps out what other sessions left a day ago.
    pub(super) async fn prepare(&self, id: &str) -> Result<(), Trouble> {
        // Asked first, because a role may use the table without being allowed to make one.
        let found = self.query(&format!("select to_regclass('{TABLE}') is not null"), STATEMENT_TIME).await?;
        if first(&found, 0) != Some("t") {
            let make = format!(
                "create table if not exists {TABLE} (id bigint generated always as identity primary key, \
                 session text not null, n bigint not null, at timestamptz not null default now(), unique (session, n))"
            );
            match self.query(&make, STATEMENT_TIME).await {
                // Two probers at once: "if not exists" can lose that race with either of these.
                Err(trouble) if trouble.is(&SqlState::UNIQUE_VIOLATION) || trouble.is(&SqlState::DUPLICATE_TABLE) => {}
                made => drop(made?),
            }
        }
        let sweep = format!(
            "delete from {TABLE} where id in (select id from {TABLE} \
             where session <> '{id}' and at < now() - interval '1 day' limit {SWEEP_ROWS})"
        );
        match self.query(&sweep, STATEMENT_TIME).await {
            // Rows that may not be deleted are somebody else's business.
            Err(trouble) if !trouble.forbidden() => Err(trouble),
            _ => Ok(()),
        }
    }

    /// The greatest number of this run that is to be seen. A table that is missing holds none.
    pub(super) async fn last_number(&self, id: &str) -> Result<u64, Trouble> {
        let sql = format!("select coalesce(max(n), 0) from {TABLE} where session = '{id}'");
        match self.number(&sql).await {
            Err(trouble) if trouble.tableless() => Ok(0),
            answer => answer,
        }
    }

    /// Acknowledged when it returns.
    pub(super) async fn insert(&self, id: &str, n: u64) -> Result<(), Trouble> {
        let sql = format!("insert into {TABLE} (session, n) values ('{id}', {n})");
        self.query(&sql, STATEMENT_TIME).await.map(drop)
    }

    /// Deletes this run's rows up to number `n`.
    pub(super) async fn trim(&self, id: &str, n: u64) -> Result<(), Trouble> {
        self.query(&format!("delete from {TABLE} where session = '{id}' and n <= {n}"), STATEMENT_TIME).await.map(drop)
    }

    /// This run's numbers from `first` on, rising.
    pub(super) async fn numbers(&self, id: &str, first: u64) -> Result<Vec<u64>, Trouble> {
        let sql = format!("select n from {TABLE} where session = '{id}' and n >= {first} order by n");
        let rows = self.query(&sql, VERIFY_TIME).await?;
        let number = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => row.get(0).and_then(|text| text.parse().ok()),
            _ => None,
        };
        Ok(rows.iter().filter_map(number).collect())
    }
}

/// Column `at` of the first row.
fn first(rows: &[SimpleQueryMessage], at: usize) -> Option<&str> {
    rows.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(at),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dsn_is_read_in_both_forms_and_its_errors_hold_no_password() {
        for good in ["postgres://app:pw@127.0.0.1:6432/app", "host=127.0.0.1 port=6432 user=app dbname=app"] {
            assert!(Dsn::parse(good).is_ok(), "{good}");
        }
        let table = [
            ("host=h password=hunter2 sslmode=require", "not built yet"),
            ("postgres://app:hunter2@h/app?sslmode=require", "not built yet"),
            ("host=h password=hunter2 colour=red", "colour"),
            ("user=app password=hunter2", "names no host"),
            ("postgres://app:hunter2@h:port/app", "cannot be read"),
        ];
        for (text, words) in table {
            let fault = Dsn::parse(text).err().expect(text);
            assert_eq!(fault.exit, ExitCode::Config, "{text}");
            assert!(fault.text.contains(words) && !fault.text.contains("hunter2"), "{fault}");
        }
    }
}
