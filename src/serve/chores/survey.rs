//! What a session has that goes with its backend (session mode): looked into once, when it is held for a switchover.
//!
//! What it is NOT: a proof that there is nothing else. What PostgreSQL shows nobody (`currval()`, a library loaded,
//! what an extension keeps) is not seen here, nor a customized option that was set inside of a function.

use super::super::pool::Lease;
use super::{LEARN, literal, run};
use crate::wire::tunnel::Prepared;

/// What only this backend has and nobody can make again: a word for the client each, one column.
const STATE: &str = "\
     select 'LISTEN' where exists (select from pg_catalog.pg_listening_channels()) \
     union all select 'a cursor WITH HOLD' where exists (select from pg_catalog.pg_cursors where is_holdable) \
     union all select 'an advisory lock' where exists (select from pg_catalog.pg_locks \
         where locktype = 'advisory' and pid = pg_catalog.pg_backend_pid()) \
     union all select 'a temporary table' where exists (select from pg_catalog.pg_class \
         where relnamespace = pg_catalog.pg_my_temp_schema()) \
     union all select 'a statement of PREPARE' where exists (select from pg_catalog.pg_prepared_statements \
         where from_sql)";

/// Prepared statements of the protocol: three columns.
const STATEMENTS: &str = "select name, statement, pg_catalog.array_to_string(parameter_types::pg_catalog.oid[], ',') \
     from pg_catalog.pg_prepared_statements where not from_sql";

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Survey {
    /// What cannot be taken along.
    pub(crate) kept_by: Option<String>,
    pub(crate) settings: Vec<(String, String)>,
    pub(crate) statements: Vec<Found>,
}

/// A prepared statement as PostgreSQL shows it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    name: String,
    query: String,
    types: Vec<u32>,
}

impl Found {
    /// As its Parse message said it.
    pub(crate) fn prepared(&self) -> Prepared {
        let mut text = self.query.clone().into_bytes();
        text.push(0);
        text.extend_from_slice(&u16::try_from(self.types.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.types.iter().for_each(|oid| text.extend_from_slice(&oid.to_be_bytes()));
        Prepared { name: self.name.clone().into_bytes(), text }
    }
}

/// Looks into a session at rest. `customized`: options it has set that PostgreSQL shows in no list, and whether there
/// may be more.
pub(crate) async fn survey(lease: Lease, (customized, in_doubt): (Vec<String>, bool)) -> Option<(Lease, Survey)> {
    let mut sql = format!("{LEARN}{}", literal(&lease.shape.user));
    for name in customized.iter().map(|name| literal(name)) {
        let value = format!("pg_catalog.current_setting({name}, true)");
        sql.push_str(&format!(" union all select {name}, {value} where {value} <> ''"));
    }
    sql.push_str(&format!("; {STATEMENTS}; {STATE}"));
    let (lease, rows) = run(lease, &sql, "its session could not be looked into").await?;
    let mut survey = of_rows(rows);
    if in_doubt && survey.kept_by.is_none() {
        survey.kept_by = Some("settings that show in no list (set_config(), or SET among other statements)".to_owned());
    }
    Some((lease, survey))
}

fn of_rows(rows: Vec<Vec<String>>) -> Survey {
    let mut survey = Survey::default();
    let mut kept_by: Vec<String> = Vec::new();
    for row in rows {
        match <[String; 3]>::try_from(row) {
            Ok([name, query, types]) => {
                // Lost in reading it as UTF-8: it would be another statement.
                if query.contains(char::REPLACEMENT_CHARACTER) || name.contains(char::REPLACEMENT_CHARACTER) {
                    kept_by.push("a prepared statement that is not UTF-8".to_owned());
                }
                let types = types.split(',').filter_map(|oid| oid.parse().ok()).collect();
                survey.statements.push(Found { name, query, types });
            }
            Err(row) => match <[String; 2]>::try_from(row) {
                Ok([name, value]) => {
                    if value.contains(char::REPLACEMENT_CHARACTER) {
                        kept_by.push("a setting that is not UTF-8".to_owned());
                    }
                    survey.settings.push((name, value));
                }
                Err(mut row) => kept_by.extend(row.pop()),
            },
        }
    }
    // As `learn`: none, and none was there before, is not this client's.
    let is_usual = survey.settings.iter().any(|(name, _)| name.is_empty());
    let is_none = |(name, value): &(String, String)| is_usual && name == "statement_timeout" && value == "0";
    survey.settings.retain(|pair| !(pair.0.is_empty() || is_none(pair)));
    survey.kept_by = (!kept_by.is_empty()).then(|| kept_by.join(" and "));
    survey
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_told_apart_by_their_columns() {
        let rows = [
            &["statement_timeout", "0"][..],
            &["", "0"],
            &["search_path", "a, b"],
            &["s1", "select $1", "23,25"],
            &["s2", "select 1", ""],
        ];
        let rows = |more: &[&[&str]]| {
            rows.iter().chain(more).map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect()
        };
        let survey = of_rows(rows(&[]));
        assert_eq!(survey.kept_by, None);
        assert_eq!(survey.settings, [("search_path".to_owned(), "a, b".to_owned())]);
        let text: Vec<_> = survey.statements.iter().map(|one| one.prepared().text).collect();
        assert_eq!(text, [&b"select $1\0\0\x02\0\0\0\x17\0\0\0\x19"[..], b"select 1\0\0\0"]);
        let kept = of_rows(rows(&[&["LISTEN"], &["a temporary table"]]));
        assert_eq!(kept.kept_by.as_deref(), Some("LISTEN and a temporary table"));
        let lossy = of_rows(rows(&[&["s3", "select '\u{fffd}'", ""]]));
        assert!(lossy.kept_by.is_some_and(|why| why.contains("UTF-8")));
    }
}
