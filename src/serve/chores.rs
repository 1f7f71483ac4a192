//! Short conversations of the gate's own with a backend between two clients: settings put right or read, a session
//! tidied up.
//!
//! What it is NOT: no client's bytes are in them, and none of this is waited for by PostgreSQL's commits.
//!
//! **Invariant:** a backend that does not answer as expected, in time, at rest and without an error, is not used again.

mod survey;

pub(crate) use survey::{Found, Survey, survey};

use super::pool::{Lease, Settings};
use super::socket::Socket;
use crate::wire::pg::{self, HEADER};
use crate::wire::tunnel::Prepared;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long a backend may take for one of these.
const CHORE_TIMEOUT: Duration = Duration::from_secs(10);
/// Statements of a session that are parsed before their answers are read.
const PARSED_AT_ONCE: usize = 24;
/// Longest answer to one of these, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

/// Every setting that a session has changed and that outlives its transaction, and its role where it took another
/// (those two are hidden from the view). Its `statement_timeout` comes first and is not for the rest, which takes a
/// millisecond; the value it would have without it comes with it. The role it logged in as follows.
const LEARN: &str = "select 'statement_timeout', pg_catalog.current_setting('statement_timeout');\
     set local statement_timeout = 0;\
     select '', reset_val from pg_catalog.pg_settings where name = 'statement_timeout' and reset_val = '0' union all \
     select name, setting from pg_catalog.pg_settings where source = 'session' \
     and name not in ('statement_timeout', 'transaction_isolation', 'transaction_read_only', 'transaction_deferrable') \
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
    answer(stream).await
}

/// Reads up to ReadyForQuery: the rows, as text.
async fn answer(stream: &mut Socket) -> Result<Vec<Vec<String>>, Failed> {
    let lost = |error: io::Error| error.to_string();
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
    // A simple query ends it.
    lease.known.forget_unnamed();
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

/// Gives a backend, as it logged in, the settings and prepared statements of a session that goes on with it.
///
/// # Errors
/// What PostgreSQL said; the backend is gone.
pub(crate) async fn replay(mut lease: Lease, wanted: Settings, statements: &[Prepared]) -> Result<Lease, Failed> {
    let sql = difference(&[], wanted.as_deref().map_or(&[], |pairs| pairs));
    let replaying = async {
        if !sql.is_empty() {
            ask(&mut lease.stream, &sql).await.map_err(|why| format!("its settings could not be made again: {why}"))?;
        }
        // By the dozen: PostgreSQL's answers find room while it reads.
        for some in statements.chunks(PARSED_AT_ONCE) {
            parse(&mut lease.stream, some)
                .await
                .map_err(|why| format!("a statement could not be prepared again: {why}"))?;
        }
        Ok(())
    };
    let slow =
        |_| Err(format!("making its settings and statements again took longer than {} s", CHORE_TIMEOUT.as_secs()));
    tokio::time::timeout(CHORE_TIMEOUT, replaying).await.unwrap_or_else(slow)?;
    lease.settings = wanted;
    Ok(lease)
}

/// Parses statements and reads that they are.
async fn parse(stream: &mut Socket, statements: &[Prepared]) -> Result<(), Failed> {
    let lost = |error: io::Error| error.to_string();
    let mut messages = Vec::new();
    for Prepared { name, text } in statements {
        messages.push(b'P');
        messages.extend_from_slice(&u32::try_from(4 + name.len() + 1 + text.len()).unwrap_or(u32::MAX).to_be_bytes());
        messages.extend_from_slice(name);
        messages.push(0);
        messages.extend_from_slice(text);
    }
    messages.extend_from_slice(&[b'S', 0, 0, 0, 4]);
    stream.write_all(&messages).await.map_err(lost)?;
    answer(stream).await.map(drop)
}

/// What a client has set.
pub(crate) struct Learnt {
    /// The caller makes one value of them.
    pub(crate) pairs: Vec<(String, String)>,
    /// And the backend has none of it any more.
    pub(crate) is_reset: bool,
}

/// What the client has set, these customized options among it. Where more may have been set than is known, the backend
/// is reset.
pub(crate) async fn learn(lease: Lease, (customized, in_doubt): (Vec<String>, bool)) -> Option<(Lease, Learnt)> {
    let mut sql = format!("{LEARN}{}", literal(&lease.shape.user));
    for name in customized.iter().map(|name| literal(name)) {
        let value = format!("pg_catalog.current_setting({name}, true)");
        sql.push_str(&format!(" union all select {name}, {value} where {value} <> ''"));
    }
    if in_doubt {
        sql.push_str("; reset role; reset session authorization; reset all");
    }
    let (lease, rows) = run(lease, &sql, "its settings could not be read").await?;
    let pair = |row: Vec<String>| {
        let mut cells = row.into_iter();
        Some((cells.next()?, cells.next()?))
    };
    let mut pairs: Vec<(String, String)> = rows.into_iter().filter_map(pair).collect();
    // None, and none was there before: not this client's.
    let is_usual = pairs.iter().any(|(name, _)| name.is_empty());
    let is_none = |(name, value): &(String, String)| is_usual && name == "statement_timeout" && value == "0";
    pairs.retain(|pair| !(pair.0.is_empty() || is_none(pair)));
    Some((lease, Learnt { pairs, is_reset: in_doubt }))
}

/// After a session: everything of it goes.
pub(crate) async fn tidy_up(lease: Lease) {
    if let Some((mut lease, _)) = run(lease, "DISCARD ALL", "it could not be tidied up").await {
        lease.settings = None;
        lease.known.clear();
        lease.give_back();
    }
}

/// Taken back before all other settings and made after them, in this order: whose settings they are, and what a slow
/// machine may need for them, is not the client's business. A new session user ends the role of the former.
const LATE: [&str; 3] = ["statement_timeout", "session_authorization", "role"];

/// The statements that lead from one set of settings to another.
fn difference(from: &[(String, String)], to: &[(String, String)]) -> String {
    let mut sql = String::new();
    if from.len() == to.len() && from.iter().all(|pair| to.contains(pair)) {
        return sql;
    }
    let is_late = |name: &str| LATE.contains(&name);
    let late = |set: &'_ [(String, String)], late: &str| set.iter().find(|(name, _)| name == late).cloned();
    for (name, _) in LATE.iter().rev().filter_map(|name| late(from, name)) {
        sql.push_str(match name.as_str() {
            "role" => "RESET ROLE;",
            "session_authorization" => "RESET SESSION AUTHORIZATION;",
            _ => "SET statement_timeout = 0;",
        });
    }
    let gone = |(name, _): &&(String, String)| !to.iter().any(|(other, _)| other == name);
    for (name, _) in from.iter().filter(gone).filter(|(name, _)| !is_late(name)) {
        sql.push_str(&format!("RESET {};", identifier(name)));
    }
    let changed = |pair: &&(String, String)| !from.contains(pair);
    // A list: quoted as one it would be one name.
    let set = |name: &str, value: &str| format!("SELECT pg_catalog.set_config({}, {value}, false);", literal(name));
    for (name, value) in to.iter().filter(changed).filter(|(name, _)| !is_late(name)) {
        sql.push_str(&set(name, &literal(value)));
    }
    for name in LATE {
        match late(to, name) {
            Some((_, user)) if name == "session_authorization" => {
                sql.push_str(&format!("SET SESSION AUTHORIZATION {};", literal(&user)));
            }
            Some((_, value)) => sql.push_str(&set(name, &literal(&value))),
            None if name == "statement_timeout" && late(from, name).is_some() => {
                sql.push_str("RESET statement_timeout;");
            }
            None => {}
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
        let bob = pairs(&[("role", "clerk"), ("session_authorization", "bob"), ("statement_timeout", "1")]);
        assert_eq!(difference(&bob, &bob), "");
        assert_eq!(
            difference(&pairs(&[("role", "clerk")]), &bob),
            "RESET ROLE;SELECT pg_catalog.set_config('statement_timeout', '1', false);\
             SET SESSION AUTHORIZATION 'bob';SELECT pg_catalog.set_config('role', 'clerk', false);"
        );
        assert_eq!(
            difference(&bob, &pairs(&[("role", "clerk")])),
            "RESET ROLE;RESET SESSION AUTHORIZATION;SET statement_timeout = 0;RESET statement_timeout;\
             SELECT pg_catalog.set_config('role', 'clerk', false);"
        );
    }
}
