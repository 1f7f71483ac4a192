//! The fields of one line to a rule, as PostgreSQL's `parse_hba_line` does it; and whether a rule matches.
//!
//! What it is NOT: it asks nobody. What a rule needs to know and nobody has said yet is a [`Question`].

use super::pattern::Pattern;
use super::words::{Place, Word};
use super::{Asker, ClientName, Entry, Facts, Method, Question};
use ipnet::IpNet;
use std::net::IpAddr;

#[derive(Debug)]
pub(super) struct Rule {
    transport: Transport,
    databases: Vec<Database>,
    users: Vec<User>,
    address: Address,
    entry: Entry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Any,
    Tls,
    Plain,
    /// GSSAPI encryption: never, here.
    Gss,
}

#[derive(Debug)]
enum Database {
    All,
    SameUser,
    SameRole,
    /// Physical replication; the only word that matches it.
    Replication,
    Matching(Pattern),
    Named(String),
}

#[derive(Debug)]
pub(super) enum User {
    All,
    MemberOf(String),
    Matching(Pattern),
    Named(String),
}

#[derive(Debug)]
enum Address {
    All,
    SameHost,
    SameNet,
    Masked {
        address: IpAddr,
        mask: IpAddr,
    },
    /// A name, or a suffix that begins with a dot.
    Name(String),
}

impl Rule {
    /// For whoever has no file: everyone by SCRAM.
    pub(super) fn scram_for_all() -> Rule {
        Rule {
            transport: Transport::Any,
            databases: vec![Database::All],
            users: vec![User::All],
            address: Address::All,
            entry: Entry::new(Method::ScramSha256, Place { file: "no auth.hba_file".into(), line: 0 }),
        }
    }

    pub(super) fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Users named without any keyword; `None`: others too.
    pub(super) fn named_users(&self) -> Option<Vec<&str>> {
        let mut names = Vec::new();
        for user in &self.users {
            let User::Named(name) = user else { return None };
            names.push(name.as_str());
        }
        Some(names)
    }

    pub(super) fn matches(&self, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        let transport = match self.transport {
            Transport::Any => true,
            Transport::Tls => asker.tls,
            Transport::Plain => !asker.tls,
            Transport::Gss => false,
        };
        if !transport {
            return Ok(false);
        }
        // A question is asked only where nothing else already says no.
        let parts = [
            self.address.matches(asker, facts),
            any(self.databases.iter().map(|database| database.matches(asker, facts))),
            any(self.users.iter().map(|user| user.matches(asker, facts))),
        ];
        if parts.contains(&Ok(false)) {
            return Ok(false);
        }
        parts.into_iter().find(Result::is_err).unwrap_or(Ok(true))
    }
}

/// Whether any says yes; a question where none does and one has to ask.
pub(super) fn any(answers: impl Iterator<Item = Result<bool, Question>>) -> Result<bool, Question> {
    let mut question = None;
    for answer in answers {
        match answer {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(asked) => question = question.or(Some(asked)),
        }
    }
    question.map_or(Ok(false), Err)
}

impl Database {
    fn matches(&self, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        if asker.replication {
            return Ok(matches!(self, Database::Replication));
        }
        match self {
            Database::All => Ok(true),
            Database::SameUser => Ok(asker.user == asker.database),
            Database::SameRole => facts.is_member(asker.database),
            Database::Replication => Ok(false),
            Database::Matching(pattern) => Ok(pattern.matches(asker.database)),
            Database::Named(name) => Ok(name == asker.database),
        }
    }
}

impl User {
    pub(super) fn matches(&self, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        match self {
            User::All => Ok(true),
            User::MemberOf(role) => facts.is_member(role),
            User::Matching(pattern) => Ok(pattern.matches(asker.user)),
            User::Named(name) => Ok(name == asker.user),
        }
    }
}

impl Address {
    fn matches(&self, asker: Asker<'_>, facts: &Facts) -> Result<bool, Question> {
        let own = || facts.interfaces.as_ref().ok_or(Question::Interfaces);
        match self {
            Address::All => Ok(true),
            Address::SameHost => Ok(own()?.iter().any(|(address, _)| *address == asker.address)),
            Address::SameNet => Ok(own()?.iter().any(|(address, mask)| within(asker.address, *address, *mask))),
            Address::Masked { address, mask } => Ok(within(asker.address, *address, *mask)),
            Address::Name(pattern) => {
                let names = facts.names.as_ref().ok_or(Question::Names)?;
                any(names.iter().filter(|name| is_named(pattern, name)).map(|name| facts.is_confirmed(name)))
            }
        }
    }
}

/// PostgreSQL's `hostname_match`.
fn is_named(pattern: &str, name: &str) -> bool {
    let name = if pattern.starts_with('.') {
        name.len().checked_sub(pattern.len()).and_then(|at| name.get(at..))
    } else {
        Some(name)
    };
    name.is_some_and(|name| name.eq_ignore_ascii_case(pattern))
}

fn within(asked: IpAddr, address: IpAddr, mask: IpAddr) -> bool {
    match (asked, address, mask) {
        (IpAddr::V4(a), IpAddr::V4(b), IpAddr::V4(mask)) => a & mask == b & mask,
        (IpAddr::V6(a), IpAddr::V6(b), IpAddr::V6(mask)) => a & mask == b & mask,
        _ => false,
    }
}

/// One line's rule; `None` for a `local` one.
pub(super) fn rule(place: &Place, fields: &[Vec<Word>]) -> Result<Option<Rule>, String> {
    let mut fields = fields.iter();
    let kind = single(fields.next(), "connection type", "begin the line with it")?;
    let transport = match kind.text.as_str() {
        "local" => None,
        "host" => Some(Transport::Any),
        "hostssl" => Some(Transport::Tls),
        "hostnossl" => Some(Transport::Plain),
        "hostnogssenc" => Some(Transport::Any),
        "hostgssenc" => Some(Transport::Gss),
        other => {
            return Err(format!(
                "connection type \"{}\" is unknown; use host, hostssl, hostnossl or local",
                other.escape_debug()
            ));
        }
    };
    let databases = fields.next().ok_or("the database is missing; add it after the connection type")?;
    let databases = databases.iter().map(database).collect::<Result<Vec<_>, _>>()?;
    let users = fields.next().ok_or("the user is missing; add it after the database")?;
    let users = users.iter().map(user).collect::<Result<Vec<_>, _>>()?;
    let address = if transport.is_some() { Some(address(&mut fields)?) } else { None };
    let method_word = single(fields.next(), "method", "add it at the end")?;
    let method = method(&method_word.text, &kind.text)?;
    let mut entry = Entry::new(method.unwrap_or(Method::Reject), place.clone());
    for word in fields.flatten() {
        option(&word.text, &kind.text, method, &mut entry)?;
    }
    // A local line is proven and then left out: the gate has no Unix socket.
    let (Some(transport), Some(address)) = (transport, address) else { return Ok(None) };
    Ok(Some(Rule { transport, databases, users, address, entry }))
}

pub(super) fn single<'a>(field: Option<&'a Vec<Word>>, what: &str, remedy: &str) -> Result<&'a Word, String> {
    match field.map(Vec::as_slice) {
        Some([word]) => Ok(word),
        Some(words) => {
            let shown: Vec<&str> = words.iter().map(|word| word.text.as_str()).collect();
            Err(format!("the {what} \"{}\" is a list; give one word", shown.join(",").escape_debug()))
        }
        None => Err(format!("the {what} is missing; {remedy}")),
    }
}

fn database(word: &Word) -> Result<Database, String> {
    Ok(match word {
        word if word.text.starts_with('/') => Database::Matching(Pattern::parse(&word.text)?),
        word if word.is("all") => Database::All,
        word if word.is("sameuser") => Database::SameUser,
        word if word.is("samerole") || word.is("samegroup") => Database::SameRole,
        word if word.is("replication") => Database::Replication,
        word => Database::Named(word.text.clone()),
    })
}

pub(super) fn user(word: &Word) -> Result<User, String> {
    Ok(match word {
        word if word.text.starts_with('/') => User::Matching(Pattern::parse(&word.text)?),
        word if word.is("all") => User::All,
        word => match word.text.strip_prefix('+').filter(|_| !word.quoted) {
            Some(role) => User::MemberOf(role.to_owned()),
            None => User::Named(word.text.clone()),
        },
    })
}

fn address<'a>(fields: &mut impl Iterator<Item = &'a Vec<Word>>) -> Result<Address, String> {
    let word = single(fields.next(), "address", "add it after the user")?;
    let shown = word.text.escape_debug();
    let keywords = [("all", Address::All), ("samehost", Address::SameHost), ("samenet", Address::SameNet)];
    if let Some((_, address)) = keywords.into_iter().find(|(keyword, _)| word.is(keyword)) {
        return Ok(address);
    }
    if let Some((name, bits)) = word.text.split_once('/') {
        if name.parse::<IpAddr>().is_err() && !is_numeric(name) {
            return Err(format!("\"{shown}\" is a host name with a mask; write the name alone, or an address"));
        }
        let net: Result<IpNet, _> = word.text.parse();
        let wrong = if name.parse::<IpAddr>().is_err() { name } else { bits };
        let net = net.map_err(|_| format!("\"{shown}\" is not ADDRESS/BITS; correct \"{}\"", wrong.escape_debug()))?;
        return Ok(Address::Masked { address: net.addr(), mask: net.netmask() });
    }
    let Ok(address) = word.text.parse::<IpAddr>() else {
        // What the C library reads as an address (`127.1`) must not become the name of a host here.
        if is_numeric(&word.text) {
            return Err(format!("\"{shown}\" is not an address; write it in full, as ADDRESS/BITS"));
        }
        if word.text.contains(['*', '?']) {
            return Err(format!("\"{shown}\" is not a host name; for all names of a domain write .example.org"));
        }
        return Ok(Address::Name(word.text.clone()));
    };
    let mask = single(fields.next(), "mask", &format!("write {shown}/BITS, or a mask behind it"))?;
    let shown = mask.text.escape_debug();
    let mask: IpAddr = mask.text.parse().map_err(|_| format!("\"{shown}\" is not a mask; write ADDRESS/BITS"))?;
    if address.is_ipv4() != mask.is_ipv4() {
        return Err(format!("the mask \"{shown}\" is of the other address family; write ADDRESS/BITS"));
    }
    Ok(Address::Masked { address, mask })
}

/// Numbers and dots, or with a colon: no name of a host.
fn is_numeric(text: &str) -> bool {
    text.contains([':', '%']) || text.starts_with("0x") || text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

const BUILT: &str = "use scram-sha-256, md5, cert, trust or reject";

/// The method; `None` for one that only a `local` line may have.
fn method(word: &str, kind: &str) -> Result<Option<Method>, String> {
    let shown = word.escape_debug();
    Ok(Some(match word {
        "trust" => Method::Trust,
        "reject" => Method::Reject,
        "scram-sha-256" => Method::ScramSha256,
        "md5" => Method::Md5,
        "cert" if kind == "hostssl" => Method::Cert,
        "cert" => return Err(format!("method \"cert\" needs TLS; write hostssl instead of {kind}")),
        "peer" | "ident" if kind == "local" => return Ok(None),
        "peer" => return Err(format!("method \"peer\" is for local lines only; {BUILT}")),
        "password" | "gss" | "sspi" | "ident" | "pam" | "bsd" | "ldap" | "radius" | "oauth" => {
            return Err(format!("method \"{shown}\" is not built into the gate; {BUILT}"));
        }
        _ => return Err(format!("method \"{shown}\" is unknown; {BUILT}")),
    }))
}

fn option(text: &str, kind: &str, method: Option<Method>, entry: &mut Entry) -> Result<(), String> {
    let shown = text.escape_debug();
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("the option \"{shown}\" has no value; write NAME=VALUE, or take it out"));
    };
    let tls_only = || match kind {
        "hostssl" => Ok(()),
        _ => Err(format!("\"{name}\" needs TLS; write hostssl instead of {kind}")),
    };
    match (name, value) {
        ("clientcert", "verify-full") => {
            tls_only()?;
            entry.needs_name = true;
            entry.needs_certificate = true;
        }
        ("clientcert", "verify-ca") => {
            tls_only()?;
            if method == Some(Method::Cert) {
                return Err("method \"cert\" is always verify-full; take clientcert=verify-ca out".to_owned());
            }
            entry.needs_certificate = true;
        }
        ("clientcert", _) => return Err(format!("\"{shown}\" is unknown; write verify-ca or verify-full")),
        ("clientname", "CN") => tls_only().map(|()| entry.client_name = ClientName::Cn)?,
        ("clientname", "DN") => tls_only().map(|()| entry.client_name = ClientName::Dn)?,
        ("clientname", _) => return Err(format!("\"{shown}\" is unknown; write CN or DN")),
        // A peer line is none of ours.
        ("map", _) if method.is_none() => {}
        // As PostgreSQL: an empty name is no map.
        ("map", map) if method == Some(Method::Cert) => entry.map = Some(map.to_owned()).filter(|map| !map.is_empty()),
        ("map", _) => return Err(format!("\"{shown}\" is not for this method; take it out")),
        _ => return Err(format!("the option \"{shown}\" is unknown; use clientcert, clientname or map")),
    }
    Ok(())
}
