//! `pg_ident.conf` (PostgreSQL 15, chapter 21.2, with what 16 lets stand for a database user: `all`, `+role`, `/...`):
//! which names in certificates may log in as which roles.
//!
//! What it is NOT: it asks nobody; `+role` is a [`Question`] as it is in a rule.
//!
//! **Invariant:** a line lets in or says nothing; no line can take away what another gives.

use super::pattern::Pattern;
use super::rule::{User, any, single, user};
use super::words::{Line, Reader, Word};
use super::{Asker, Facts, Files, HbaError, Nowhere, Question};
use std::path::Path;

/// A file, parsed: its lines in order. Empty by default.
#[derive(Debug, Default)]
pub struct IdentFile {
    /// Its name for messages; `None`: there is no such file.
    file: Option<String>,
    lines: Vec<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    map: String,
    name: Name,
    role: Role,
}

/// The name in the certificate.
#[derive(Debug)]
enum Name {
    Exactly(String),
    Matching(Pattern),
}

#[derive(Debug)]
enum Role {
    Is(User),
    /// What the first group of the expression matched, between these two (`\1`).
    Captured(String, String),
}

impl IdentFile {
    /// Parses a file that names no others; `file` is its name for messages. All errors are found, in order.
    pub fn parse(file: &str, text: &str) -> Result<IdentFile, Vec<HbaError>> {
        IdentFile::parse_with(Path::new(file), text, &Nowhere)
    }

    /// Parses a file; others that it names come from `files`.
    pub fn parse_with(file: &Path, text: &str, files: &dyn Files) -> Result<IdentFile, Vec<HbaError>> {
        let lines = Reader::parse(file, text, files, mapping)?;
        Ok(IdentFile { file: Some(file.display().to_string()), lines })
    }

    /// Why a rule cannot name this map; `None`: it can.
    pub(super) fn lacks(&self, map: &str) -> Option<String> {
        let shown = map.escape_debug();
        match &self.file {
            _ if self.lines.iter().any(|line| line.map == map) => None,
            Some(file) => Some(format!("the map \"{shown}\" is not in {file}; add it there, or correct the name")),
            None => Some(format!(
                "the map \"{shown}\" is nowhere; write pg_ident.conf beside this file, or set auth.ident_file"
            )),
        }
    }

    /// Whether the map lets this name log in as the asker's role.
    pub(super) fn allows(&self, map: &str, name: &str, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        any(self.lines.iter().filter(|line| line.map == map).map(|line| line.allows(name, asker, facts)))
    }
}

impl Mapping {
    fn allows(&self, name: &str, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        let fits = match &self.name {
            Name::Exactly(wanted) => wanted == name,
            Name::Matching(pattern) => pattern.matches(name),
        };
        match (&self.role, &self.name) {
            _ if !fits => Ok(false),
            (Role::Is(user), _) => user.matches(asker, facts),
            (Role::Captured(before, after), Name::Matching(pattern)) => {
                let captured = pattern.first_group(name);
                Ok(captured.is_some_and(|captured| format!("{before}{captured}{after}") == asker.user))
            }
            (Role::Captured(..), Name::Exactly(_)) => Ok(false),
        }
    }
}

/// One line, as PostgreSQL's `parse_ident_line` reads it.
fn mapping(line: &Line) -> Result<Option<Mapping>, String> {
    let mut fields = line.fields.iter();
    let map = single(fields.next(), "name of the map", "begin the line with it")?;
    let name = single(fields.next(), "name in the certificate", "add it after the map's")?;
    let role = single(fields.next(), "database user", "add it at the end")?;
    if let Some(more) = fields.flatten().next() {
        // PostgreSQL would not look at it.
        return Err(format!(
            "\"{}\" is a fourth word; put a name with blanks in quotation marks",
            more.text.escape_debug()
        ));
    }
    let pattern = name.text.starts_with('/').then(|| Pattern::parse(&name.text)).transpose()?;
    let role = match (&pattern, user(role)?) {
        (Some(pattern), User::Named(name)) => captured(pattern, name, role)?,
        (_, user) => Role::Is(user),
    };
    let name = pattern.map_or_else(|| Name::Exactly(name.text.clone()), Name::Matching);
    Ok(Some(Mapping { map: map.text.clone(), name, role }))
}

fn captured(pattern: &Pattern, name: String, word: &Word) -> Result<Role, String> {
    let Some((before, after)) = name.split_once("\\1") else { return Ok(Role::Is(User::Named(name))) };
    pattern.names_its_first_group().map_err(|why| {
        let shown = word.text.escape_debug();
        format!("\"{shown}\" takes what the first group of the expression matches, but {why}")
    })?;
    Ok(Role::Captured(before.to_owned(), after.to_owned()))
}
