//! `pg_hba.conf` and `pg_ident.conf` (PostgreSQL 15, chapters 21.1 and 21.2, with the files and regular expressions of
//! 16) for the gate's own front door: text to rules, rules to a verdict.
//!
//! | file | is |
//! |---|---|
//! | `words` | text to lines of fields of words; `@file` and `include` |
//! | `rule` | the fields of a line to a rule; whether a rule matches |
//! | `ident` | maps of names in certificates to roles |
//! | `pattern` | regular expressions |
//!
//! What it is NOT: it reads no files, asks no catalogue and resolves no names. Files come through [`Files`]; the rest
//! is a [`Question`] to the caller, asked only when a rule is reached that needs the answer. Whatever PostgreSQL would
//! understand and we do not is an error with its line, never a rule that silently means something else. `local` lines
//! are parsed and then left out: the gate has no Unix socket.
//!
//! **Invariant:** the first matching rule decides; no match refuses.

mod ident;
mod pattern;
mod rule;
mod words;

pub use ident::IdentFile;
use rule::Rule;
use std::net::IpAddr;
use std::path::Path;
pub use words::{FileTrouble, Files};
use words::{Place, Reader};

/// How a client proves who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Trust,
    Reject,
    ScramSha256,
    /// md5 where the role's secret is an md5 hash, else SCRAM (as PostgreSQL).
    Md5,
    /// By a certificate whose name is the role's.
    Cert,
}

/// What of a certificate is compared with the role's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientName {
    /// Its common name.
    Cn,
    /// Its whole subject as RFC 2253 writes it.
    Dn,
}

/// What the matching rule demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub method: Method,
    /// `clientcert=verify-ca`: a certificate of our CA.
    pub needs_certificate: bool,
    /// `clientcert=verify-full`: and in the role's name.
    pub needs_name: bool,
    pub client_name: ClientName,
    /// `map=`: the certificate's name is looked up there, not compared with the role's.
    pub map: Option<String>,
    place: Place,
}

impl Entry {
    fn new(method: Method, place: Place) -> Entry {
        let cert = method == Method::Cert;
        Entry { method, needs_certificate: cert, needs_name: cert, client_name: ClientName::Cn, map: None, place }
    }

    /// Where the rule stands, for the log.
    pub fn place(&self) -> String {
        format!("{}, line {}", self.place.file, self.place.line)
    }

    /// The file it stands in.
    pub fn file(&self) -> &str {
        &self.place.file
    }

    /// The line, counted from one.
    pub fn line(&self) -> usize {
        self.place.line
    }
}

/// A file, parsed: its rules in order, `local` lines left out; with the maps that they name.
#[derive(Debug)]
pub struct HbaFile {
    rules: Vec<Rule>,
    maps: IdentFile,
}

/// There are no other files.
struct Nowhere;

impl Files for Nowhere {
    fn read(&self, _: &Path) -> Result<String, FileTrouble> {
        Err(FileTrouble::Missing)
    }
    fn list(&self, _: &Path) -> Result<Vec<String>, FileTrouble> {
        Err(FileTrouble::Missing)
    }
}

/// Why a file is refused: where, what, and the fix, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}, line {line}: {problem}")]
pub struct HbaError {
    pub file: String,
    /// Counted from one.
    pub line: usize,
    pub problem: String,
}

/// Who asks, and from where.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    pub address: IpAddr,
    pub tls: bool,
    pub user: &'a str,
    pub database: &'a str,
    /// For physical replication, which has no database.
    pub replication: bool,
}

/// What the caller found out about one asker, as far as it was asked.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Roles that the user is a member of, itself included, by explicit grants alone: that a superuser may do
    /// everything makes it a member of nothing. Empty for a role that does not exist.
    pub memberships: Option<Vec<String>>,
    /// Names that the address claims to have; none where the look-up failed.
    pub names: Option<Vec<String>>,
    /// Of these, whether the name leads back to the address.
    pub confirmed: Vec<(String, bool)>,
    /// Addresses of this machine with their masks.
    pub interfaces: Option<Vec<(IpAddr, IpAddr)>>,
}

impl Facts {
    fn is_member(&self, role: &str) -> Result<bool, Question> {
        let memberships = self.memberships.as_ref().ok_or(Question::Memberships)?;
        Ok(memberships.iter().any(|name| name == role))
    }

    fn is_confirmed(&self, name: &str) -> Result<bool, Question> {
        let known = self.confirmed.iter().find(|(known, _)| known == name);
        known.map(|(_, confirmed)| *confirmed).ok_or_else(|| Question::Confirm(name.to_owned()))
    }
}

/// Which fact is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    Memberships,
    Names,
    /// Whether this name leads back to the asker's address.
    Confirm(String),
    Interfaces,
}

/// What the rules say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision<'a> {
    Entry(&'a Entry),
    NoEntry,
    /// Answer this and ask again.
    Ask(Question),
}

impl Default for HbaFile {
    /// Without a file: scram-sha-256 for everyone.
    fn default() -> HbaFile {
        HbaFile { rules: vec![Rule::scram_for_all()], maps: IdentFile::default() }
    }
}

impl HbaFile {
    /// Parses a file that names no others; `file` is its name for messages. All errors are found, in order.
    pub fn parse(file: &str, text: &str) -> Result<HbaFile, Vec<HbaError>> {
        HbaFile::parse_with(Path::new(file), text, &Nowhere)
    }

    /// Parses a file; others that it names come from `files`. All errors are found, file by file, those of words first.
    pub fn parse_with(file: &Path, text: &str, files: &dyn Files) -> Result<HbaFile, Vec<HbaError>> {
        let rules = Reader::parse(file, text, files, |line| rule::rule(&line.place, &line.fields))?;
        Ok(HbaFile { rules, maps: IdentFile::default() })
    }

    /// With the maps that its rules name. Errors: the lines that name one that is not there.
    pub fn with_maps(self, maps: IdentFile) -> Result<HbaFile, Vec<HbaError>> {
        let wrong = |entry: &Entry| {
            let problem = maps.lacks(entry.map.as_deref()?)?;
            Some(HbaError { file: entry.file().to_owned(), line: entry.line(), problem })
        };
        let errors: Vec<HbaError> = self.rules.iter().filter_map(|rule| wrong(rule.entry())).collect();
        if errors.is_empty() { Ok(HbaFile { maps, ..self }) } else { Err(errors) }
    }

    /// Whether a certificate in this name may log in as the asker's role under one of these rules.
    pub fn fits(&self, entry: &Entry, name: &str, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        match &entry.map {
            None => Ok(name == asker.user),
            Some(map) => self.maps.allows(map, name, asker, facts),
        }
    }

    /// What the first matching rule demands.
    pub fn decide(&self, asker: Asker<'_>, facts: &Facts) -> Decision<'_> {
        for rule in &self.rules {
            match rule.matches(asker, facts) {
                Ok(false) => {}
                Ok(true) => return Decision::Entry(rule.entry()),
                Err(question) => return Decision::Ask(question),
            }
        }
        Decision::NoEntry
    }

    /// Every rule's demand, in order, with its users where all of them are named (`None`: others too). For `doctor`.
    pub fn entries(&self) -> impl Iterator<Item = (&Entry, Option<Vec<&str>>)> {
        self.rules.iter().map(|rule| (rule.entry(), rule.named_users()))
    }
}

#[cfg(test)]
mod tests;
