//! Short conversations of the gate's own with a backend between two clients: settings put right or read, a session
//! tidied up.
//!
//! What it is NOT: no client's bytes are in them, and none of this is waited for by PostgreSQL's commits.
//!
//! **Invariant:** a backend that does not answer as expected, in time, at rest and without an error, is not used again.

use super::pool::{Lease, Settings};
use super::socket::Socket;
use crate::wire::pg::{self, HEADER};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long a backend may take for one of these.
const CHORE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer to one of these, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

/// Every setting that a session has changed and that outlives its transaction, and its role where it took another
/// (those two are hidden from the view). The role it logged in as follows.
const LEARN: &str = "select name, setting from pg_catalog.pg_settings where source = 'session' \
     and name not in ('transaction_isolation', 'transaction_read_only', 'transaction_deferrable') \
     union all select 'role', pg_catalog.current_setting('role') where pg_catalog.current_setting('role') <> 'none' \
     union all select 'session_authorization', session_user::pg_catalog.text where session_user <> ";

/// Why a chore failed: the connection, or what PostgreSQL said.
pub(crate) type Failed = String;

/// Sends one simple query and reads its rows, as text; a null is an empty text.
pub(crate) async fn ask(stream: &mut Socket, sql: &str) -> Result<Vec<Vec<String>>, Failed> {
    let lost = |error: io::Error| error.to_string();
    let mut message = vec![b'Q'];
    message.extend_from_slice(&u32::try_from(sql.len() + 5).unwrap_or(u32::MAX).to_be_bytes());
    message.extend_from_slice(sql.as_bytes());
    message.push(0);
    stream.write_all(&message).await.map_err(lost)?;
    let (mut rows, mut error, mut total) = (Vec::new(), None, 0);
    loop {
        let mut head = [0; HEADER];
        stream.read_exact(&mut head).await.map_err(lost)?;
        let header = pg::header(&head).map_err(|e| e.to_string())?.ok_or("no header")?;
        total += header.body;
        if total > MAX_ANSWER {
            return Err("an answer that is too long".to_owned());
        }
        let mut body = vec![0; header.body];
        stream.read_exact(&mut body).await.map_err(lost)?;
        match header.kind {
            b'D' => rows.push(cells(&body).ok_or("a row that is not understood")?),
            b'E' => error = Some(pg::field(&body, b'M').unwrap_or_default()),
            b'Z' if body == b"I" => return error.map_or(Ok(rows), Err),
            b'Z' => return Err("a transaction was left open".to_owned()),
            b'G' | b'H' | b'W' => return Err("COPY where none was asked for".to_owned()),
            _ => {}
        }
    }
}

/// The columns of a DataRow in text format.
fn cells(body: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut cells = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (cell, tail) = tail.split_at_checked(length)?;
        cells.push(String::from_utf8_lossy(cell).into_owned());
        rest = tail;
    }
    Some(cells)
}

/// Runs one query and gives the backend back to the caller; `None`: it is of no more use.
async fn run(mut lease: Lease, sql: &str, what: &str) -> Option<(Lease, Vec<Vec<String>>)> {
    let pid = lease.pid;
    let asked = tokio::time::timeout(CHORE_TIMEOUT, ask(&mut lease.stream, sql)).await;
    match asked {
        Ok(Ok(rows)) => Some((lease, rows)),
        Ok(Err(why)) => {
            tracing::info!(pid, why, "a backend is closed: {what}");
            None
        }
        Err(_) => {
            tracing::warn!(pid, "a backend is closed: {what} took longer than {} s", CHORE_TIMEOUT.as_secs());
            None
        }
    }
}

/// Brings a backend's settings to what the next client has.
pub(crate) async fn tune(lease: Lease, wanted: Settings) -> Option<Lease> {
    let (mut lease, _) = {
        let sql = difference(lease.settings.as_deref().map_or(&[], |v| v), wanted.as_deref().map_or(&[], |v| v));
        run(lease, &sql, "its settings could not be changed").await?
    };
    lease.settings = wanted;
    Some(lease)
}

/// What the client has set, `customized` options among it; the caller makes one value of it.
pub(crate) async fn learn(lease: Lease, customized: Vec<String>) -> Option<(Lease, Vec<(String, String)>)> {
    let mut sql = format!("{LEARN}{}", literal(&lease.shape.user));
    for name in customized.iter().map(|name| literal(name)) {
        let value = format!("pg_catalog.current_setting({name}, true)");
        sql.push_str(&format!(" union all select {name}, {value} where {value} <> ''"));
    }
    let (lease, rows) = run(lease, &sql, "its settings could not be read").await?;
    let pair = |row: Vec<String>| {
        let mut cells = row.into_iter();
        Some((cells.next()?, cells.next()?))
    };
    Some((lease, rows.into_iter().filter_map(pair).collect()))
}

/// After a session: everything of it goes.
pub(crate) async fn tidy_up(lease: Lease) {
    if let Some((mut lease, _)) = run(lease, "DISCARD ALL", "it could not be tidied up").await {
        lease.settings = None;
        lease.known.clear();
        lease.give_back();
    }
}

/// The statements that lead from one set of settings to another.
fn difference(from: &[(String, String)], to: &[(String, String)]) -> String {
    let mut sql = String::new();
    // A role is given back first and taken last: what it may set is another's business.
    let is_role = |name: &str| matches!(name, "role" | "session_authorization");
    let gone = |(name, _): &&(String, String)| !to.iter().any(|(other, _)| other == name);
    for (name, _) in from.iter().filter(gone).filter(|(name, _)| is_role(name)) {
        sql.push_str(if name == "role" { "RESET ROLE;" } else { "RESET SESSION AUTHORIZATION;" });
    }
    for (name, _) in from.iter().filter(gone).filter(|(name, _)| !is_role(name)) {
        sql.push_str(&format!("RESET {};", identifier(name)));
    }
    let changed = |pair: &&(String, String)| !from.contains(pair);
    for last in [false, true] {
        for (name, value) in to.iter().filter(changed).filter(|(name, _)| is_role(name) == last) {
            let value = literal(value);
            sql.push_str(&match name.as_str() {
                "session_authorization" => format!("SET SESSION AUTHORIZATION {value};"),
                // A list: quoted as one it would be one name.
                _ => format!("SELECT pg_catalog.set_config({}, {value}, false);", literal(name)),
            });
        }
    }
    sql
}

/// A setting's name, each part of it quoted.
fn identifier(name: &str) -> String {
    let parts: Vec<String> = name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
    parts.join(".")
}

/// A string constant, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn settings_lead_from_one_client_to_the_next() {
        let none = pairs(&[]);
        let a = pairs(&[("application_name", "it's"), ("search_path", "\"$user\", public")]);
        let b = pairs(&[("application_name", "b\\c"), ("role", "clerk"), ("x.y", "1")]);
        assert_eq!(difference(&a, &a), "");
        assert_eq!(
            difference(&none, &a),
            "SELECT pg_catalog.set_config('application_name', 'it''s', false);\
             SELECT pg_catalog.set_config('search_path', '\"$user\", public', false);"
        );
        assert_eq!(
            difference(&a, &b),
            "RESET \"search_path\";SELECT pg_catalog.set_config('application_name',  E'b\\\\c', false);\
             SELECT pg_catalog.set_config('x.y', '1', false);SELECT pg_catalog.set_config('role', 'clerk', false);"
        );
        assert_eq!(difference(&b, &none), "RESET ROLE;RESET \"application_name\";RESET \"x\".\"y\";");
    }
}
