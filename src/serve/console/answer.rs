//! What the console shows: a statement's columns and rows.

use super::{Rights, Session};
use crate::serve::show::{self, views};
use crate::wire::pg::console::{Statement, View};
use crate::wire::pg::table::{self, Cell, Kind, Row, Typing};
use crate::wire::pg::{Refusal, Shown};
use bytes::BufMut;

/// What PostgreSQL tells each client unasked, of [`Session::settings`].
const REPORTED: [&str; 14] = [
    "server_version",
    "server_encoding",
    "client_encoding",
    "application_name",
    "is_superuser",
    "session_authorization",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "integer_datetimes",
    "standard_conforming_strings",
    "default_transaction_read_only",
    "in_hot_standby",
    "scram_iterations",
];

pub(super) fn is_reported(name: &str) -> bool {
    REPORTED.contains(&name)
}

impl Session<'_> {
    /// Settings by which drivers find their way. The version is of the PostgreSQL whose protocol is spoken.
    pub(super) fn settings(&self) -> Vec<(&'static str, String)> {
        let version = &self.proxy.snapshots.borrow().version;
        let is_admin = if self.rights == Rights::All { "on" } else { "off" };
        let own = [
            ("server_version", format!("15.0 (portcullis {version})")),
            ("application_name", self.application.clone()),
            ("is_superuser", is_admin.to_owned()),
            ("session_authorization", self.user.to_owned()),
        ];
        let fixed = [
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "UTC"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("default_transaction_read_only", "off"),
            ("in_hot_standby", "off"),
            ("transaction_isolation", "read committed"),
            ("transaction_read_only", "off"),
            ("server_version_num", "150000"),
            ("extra_float_digits", "1"),
            ("search_path", ""),
        ];
        own.into_iter().chain(fixed.map(|(name, value)| (name, value.to_owned()))).collect()
    }

    /// The RowDescription of a statement that has rows. Whether it has.
    pub(super) fn describe(&mut self, statement: &Statement, formats: &[i16]) -> bool {
        let one;
        let columns = match statement {
            Statement::Show(view) => views::columns(*view),
            Statement::PgpoolShow(None) => show::columns(Shown::Status),
            Statement::PgpoolShow(Some(name)) | Statement::Setting(name) => {
                one = [(name.as_str(), Kind::Text)];
                &one
            }
            Statement::One => &[("?column?", Kind::Int)],
            _ => return false,
        };
        table::describe(columns, formats, Typing::Typed, &mut self.out);
        true
    }

    pub(super) fn describe_or_no_data(&mut self, statement: Option<&Statement>, formats: &[i16]) {
        if !statement.is_some_and(|statement| self.describe(statement, formats)) {
            self.out.put_slice(b"n\0\0\0\x04");
        }
    }

    /// Rows and command tag of a statement that has rows.
    pub(super) fn rows(&self, statement: &Statement) -> Result<(Vec<Row>, String), Refusal> {
        let unknown = |name: &str| {
            let text = format!("portcullis: there is no SHOW {}", name.escape_debug());
            Refusal::new("42704", text).hint("SHOW HELP lists what there is.")
        };
        let rows = match statement {
            Statement::Show(view) => views::rows(*view, self.proxy),
            Statement::PgpoolShow(None) => views::rows(View::Pool(Shown::Status), self.proxy),
            Statement::PgpoolShow(Some(item)) => {
                let value = show::item(self.proxy, item).ok_or_else(|| {
                    let text = format!("portcullis: pgpool-II's \"{item}\" has no equal here");
                    Refusal::new("42704", text).hint("PGPOOL SHOW ALL lists what has.")
                })?;
                vec![vec![Cell::Text(value)]]
            }
            Statement::Setting(name) => {
                let mut settings = self.settings().into_iter();
                let found = settings.find(|(known, _)| known.eq_ignore_ascii_case(name));
                vec![vec![Cell::Text(found.ok_or_else(|| unknown(name))?.1)]]
            }
            Statement::One => return Ok((vec![vec![Cell::Int(1)]], "SELECT 1".to_owned())),
            _ => Vec::new(),
        };
        Ok((rows, "SHOW".to_owned()))
    }
}
