//! `pg_hba.conf` syntax (PostgreSQL 15, chapter 21.1) for the gate's own front door: text to rules, rules to a verdict.
//!
//! What it is NOT: it reads no files (so `@file` and `include` are errors), asks no catalogue (so `+role` is one), and
//! resolves no host names. Whatever PostgreSQL would understand and we do not is an error with its line, never a
//! rule that silently means something else. `local` lines are parsed and then ignored: the gate has no Unix socket.
//!
//! **Invariant:** the first matching rule decides; no match refuses.

use ipnet::IpNet;
use std::net::IpAddr;

/// Longest file accepted, in bytes; a longer one is an error.
const MAX_FILE: usize = 1 << 20;

/// How a client proves who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Trust,
    Reject,
    ScramSha256,
}

/// A file, parsed: its rules in order, `local` lines left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HbaFile {
    rules: Vec<Rule>,
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

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    transport: Transport,
    databases: Vec<Database>,
    users: Vec<User>,
    address: Address,
    method: Method,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Any,
    Tls,
    Plain,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Database {
    All,
    SameUser,
    /// Matches replication connections only; none pass the gate, so it never matches.
    Replication,
    Named(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum User {
    All,
    Named(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    All,
    Net(IpNet),
}

/// Who asks, and from where.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    pub address: IpAddr,
    pub tls: bool,
    pub user: &'a str,
    pub database: &'a str,
}

impl Default for HbaFile {
    /// Without a file: scram-sha-256 for everyone.
    fn default() -> HbaFile {
        HbaFile {
            rules: vec![Rule {
                transport: Transport::Any,
                databases: vec![Database::All],
                users: vec![User::All],
                address: Address::All,
                method: Method::ScramSha256,
            }],
        }
    }
}

impl HbaFile {
    /// Parses the text of a file; `file` is its name for messages. All errors are found, in order.
    pub fn parse(file: &str, text: &str) -> Result<HbaFile, Vec<HbaError>> {
        let error = |line, problem| HbaError { file: file.to_owned(), line, problem };
        if text.len() > MAX_FILE {
            return Err(vec![error(1, format!("the file is longer than {MAX_FILE} bytes; shorten it"))]);
        }
        let (mut rules, mut errors) = (Vec::new(), Vec::new());
        for (number, line) in logical_lines(text) {
            match fields(&line).and_then(|fields| rule(&fields)) {
                Ok(Some(rule)) => rules.push(rule),
                Ok(None) => {}
                Err(problem) => errors.push(error(number, problem)),
            }
        }
        if errors.is_empty() { Ok(HbaFile { rules }) } else { Err(errors) }
    }

    /// The method of the first rule that matches; `None`: no entry.
    pub fn method(&self, asker: Asker<'_>) -> Option<Method> {
        self.rules.iter().find(|rule| rule.matches(asker)).map(|rule| rule.method)
    }
}

impl Rule {
    fn matches(&self, asker: Asker<'_>) -> bool {
        let transport = match self.transport {
            Transport::Any => true,
            Transport::Tls => asker.tls,
            Transport::Plain => !asker.tls,
        };
        transport
            && self.databases.iter().any(|database| match database {
                Database::All => true,
                Database::SameUser => asker.user == asker.database,
                Database::Replication => false,
                Database::Named(name) => name == asker.database,
            })
            && self.users.iter().any(|user| match user {
                User::All => true,
                User::Named(name) => name == asker.user,
            })
            && match self.address {
                Address::All => true,
                Address::Net(net) => net.contains(&asker.address),
            }
    }
}

/// Lines with their number, continued ones (a backslash at the end) joined.
fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    let mut continued = false;
    for (index, line) in text.lines().enumerate() {
        let (body, continues) = line.strip_suffix('\\').map_or((line, false), |body| (body, true));
        match lines.last_mut().filter(|_| continued) {
            Some((_, previous)) => previous.push_str(body),
            None => lines.push((index + 1, body.to_owned())),
        }
        continued = continues;
    }
    lines
}

/// A word; a quoted one has lost any special meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    text: String,
    quoted: bool,
}

impl Word {
    fn is(&self, keyword: &str) -> bool {
        !self.quoted && self.text == keyword
    }
}

/// Splits a line in fields of comma-separated words, as PostgreSQL's `next_field_expand` does.
fn fields(line: &str) -> Result<Vec<Vec<Word>>, String> {
    let mut fields: Vec<Vec<Word>> = Vec::new();
    let mut word: Option<Word> = None;
    // After a comma the next word still belongs to the same field, blanks or not.
    let mut after_comma = false;
    let mut in_quotes = false;
    let mut end_word = |word: &mut Option<Word>, after_comma: &mut bool| {
        if let Some(word) = word.take() {
            match fields.last_mut().filter(|_| *after_comma) {
                Some(field) => field.push(word),
                None => fields.push(vec![word]),
            }
            *after_comma = false;
        }
    };
    for c in line.chars() {
        match c {
            '"' => {
                in_quotes = !in_quotes;
                word.get_or_insert_with(|| Word { text: String::new(), quoted: false }).quoted = true;
            }
            _ if in_quotes => word.get_or_insert_with(|| Word { text: String::new(), quoted: true }).text.push(c),
            '#' => break,
            ',' => {
                end_word(&mut word, &mut after_comma);
                after_comma = true;
            }
            c if c.is_ascii_whitespace() => end_word(&mut word, &mut after_comma),
            c => word.get_or_insert_with(|| Word { text: String::new(), quoted: false }).text.push(c),
        }
    }
    if in_quotes {
        return Err("a quotation mark is not closed; add the missing \"".to_owned());
    }
    end_word(&mut word, &mut after_comma);
    Ok(fields)
}

/// One line's rule; `None` for an empty or a `local` line.
fn rule(fields: &[Vec<Word>]) -> Result<Option<Rule>, String> {
    let mut fields = fields.iter();
    let Some(kind) = fields.next() else { return Ok(None) };
    let transport = match single(kind, "connection type")?.text.as_str() {
        "local" => None,
        "host" => Some(Transport::Any),
        "hostssl" => Some(Transport::Tls),
        "hostnossl" => Some(Transport::Plain),
        "hostgssenc" | "hostnogssenc" => return Err(not_built("GSSAPI encryption")),
        "include" | "include_if_exists" | "include_dir" => return Err(not_built("including other files")),
        other => {
            return Err(format!(
                "connection type \"{}\" is unknown; use local, host, hostssl or hostnossl",
                other.escape_debug()
            ));
        }
    };
    let databases = fields.next().ok_or("the database is missing; add it after the connection type")?;
    let databases = databases.iter().map(database).collect::<Result<Vec<_>, _>>()?;
    let users = fields.next().ok_or("the user is missing; add it after the database")?;
    let users = users.iter().map(user).collect::<Result<Vec<_>, _>>()?;
    let Some(transport) = transport else {
        // Only its method is looked at, so that a typo is found here too.
        let field = fields.next().ok_or("the method is missing; add it after the user")?;
        return match single(field, "method")?.text.as_str() {
            "peer" | "md5" | "cert" => Ok(None),
            _ => method(field).map(|_| None),
        };
    };
    let address = address(&mut fields)?;
    let method = method(fields.next().ok_or("the method is missing; add it after the address")?)?;
    if let Some(option) = fields.next() {
        let text = option.first().map_or("", |word| word.text.as_str());
        return Err(not_built(&format!("the option \"{}\"", text.escape_debug())));
    }
    Ok(Some(Rule { transport, databases, users, address, method }))
}

fn single<'a>(field: &'a [Word], what: &str) -> Result<&'a Word, String> {
    match field {
        [word] => Ok(word),
        _ => Err(format!("the {what} must be one word; remove the comma")),
    }
}

fn not_built(what: &str) -> String {
    format!("{what} is not built yet; remove it or use another line")
}

fn database(word: &Word) -> Result<Database, String> {
    Ok(match word {
        word if word.is("all") => Database::All,
        word if word.is("sameuser") => Database::SameUser,
        word if word.is("replication") => Database::Replication,
        word if word.is("samerole") || word.is("samegroup") => return Err(not_built(&word.text)),
        word if !word.quoted && word.text.starts_with(['@', '/']) => {
            return Err(not_built("a file or pattern as database"));
        }
        word => Database::Named(word.text.clone()),
    })
}

fn user(word: &Word) -> Result<User, String> {
    Ok(match word {
        word if word.is("all") => User::All,
        word if !word.quoted && word.text.starts_with('+') => return Err(not_built("\"+role\" (members of a role)")),
        word if !word.quoted && word.text.starts_with(['@', '/']) => {
            return Err(not_built("a file or pattern as user"));
        }
        word => User::Named(word.text.clone()),
    })
}

fn address<'a>(fields: &mut impl Iterator<Item = &'a Vec<Word>>) -> Result<Address, String> {
    let field = fields.next().ok_or("the address is missing; add it after the user")?;
    let word = single(field, "address")?;
    if word.is("all") {
        return Ok(Address::All);
    }
    if word.is("samehost") || word.is("samenet") {
        return Err(not_built(&word.text));
    }
    let bad =
        |why: &str| format!("\"{}\" is not an address ({why}); write it as ADDRESS/BITS", word.text.escape_debug());
    if word.text.contains('/') {
        let net: IpNet = word.text.parse().map_err(|_| bad("not CIDR notation"))?;
        return Ok(Address::Net(net.trunc()));
    }
    let Ok(ip) = word.text.parse::<IpAddr>() else {
        return Err(format!(
            "\"{}\": a host name as address is not built yet; write ADDRESS/BITS",
            word.text.escape_debug()
        ));
    };
    let mask = fields.next().ok_or_else(|| bad("the mask is missing"))?;
    let mask: IpAddr = single(mask, "mask")?.text.parse().map_err(|_| bad("the word after it is no mask"))?;
    let net = IpNet::with_netmask(ip, mask).map_err(|_| bad("the mask does not fit"))?;
    Ok(Address::Net(net.trunc()))
}

fn method(field: &[Word]) -> Result<Method, String> {
    let word = single(field, "method")?;
    match word.text.as_str() {
        "trust" => Ok(Method::Trust),
        "reject" => Ok(Method::Reject),
        "scram-sha-256" => Ok(Method::ScramSha256),
        "md5" | "cert" | "peer" => {
            Err(format!("method \"{}\" is not built yet; use scram-sha-256, trust or reject", word.text))
        }
        other => Err(format!("method \"{}\" is unknown; use scram-sha-256, trust or reject", other.escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> HbaFile {
        HbaFile::parse("hba.conf", text).expect("valid")
    }
    fn problem(line: &str) -> String {
        let errors = HbaFile::parse("hba.conf", line).expect_err(line);
        assert_eq!(errors.len(), 1, "{errors:?}");
        errors[0].to_string()
    }
    fn ask(file: &HbaFile, address: &str, tls: bool, user: &str, database: &str) -> Option<Method> {
        file.method(Asker { address: address.parse().expect("address"), tls, user, database })
    }

    #[test]
    fn the_first_match_decides_and_no_match_refuses() {
        let file = parse(
            "# comment\n\nlocal all all peer\nhost all bad 0.0.0.0/0 reject # why\n\
             host app,\"two words\" a,b 192.0.2.0/24 scram-sha-256\n\
             hostssl sameuser all all trust\nhostnossl \"all\" all 127.0.0.1 255.255.255.255 trust\n\
             host all all ::1/128 trust\n",
        );
        assert_eq!(ask(&file, "127.0.0.1", false, "bad", "app"), Some(Method::Reject));
        assert_eq!(ask(&file, "192.0.2.9", false, "a", "two words"), Some(Method::ScramSha256));
        assert_eq!(ask(&file, "192.0.3.9", false, "a", "app"), None);
        assert_eq!(ask(&file, "192.0.3.9", true, "x", "x"), Some(Method::Trust));
        assert_eq!(ask(&file, "192.0.3.9", false, "x", "x"), None, "hostssl needs TLS");
        assert_eq!(ask(&file, "127.0.0.1", false, "c", "all"), Some(Method::Trust), "a quoted all is a name");
        assert_eq!(ask(&file, "127.0.0.1", false, "c", "app"), None);
        assert_eq!(ask(&file, "127.0.0.1", true, "c", "all"), None, "hostnossl refuses TLS");
        assert_eq!(ask(&file, "::1", false, "c", "app"), Some(Method::Trust));
        assert_eq!(ask(&HbaFile::default(), "::1", false, "c", "app"), Some(Method::ScramSha256));
        assert_eq!(ask(&parse(""), "::1", false, "c", "app"), None, "an empty file is not a missing file");
    }

    #[test]
    fn lists_go_on_after_a_comma_and_lines_after_a_backslash() {
        let file = parse("host  a, b ,c  x,y \\\n 10.0.0.0/8   trust");
        for database in ["a", "b", "c"] {
            assert_eq!(ask(&file, "10.1.2.3", false, "y", database), Some(Method::Trust));
        }
        assert_eq!(ask(&file, "10.1.2.3", false, "y", "d"), None);
        let errors = HbaFile::parse("f", "host a b all trust\nhost a \\\n b all foo\n").expect_err("line 2");
        assert_eq!(errors[0].line, 2);
    }

    #[test]
    fn what_is_not_built_or_not_known_names_file_line_and_remedy() {
        assert_eq!(
            problem("host all all all md5"),
            "hba.conf, line 1: method \"md5\" is not built yet; use scram-sha-256, trust or reject"
        );
        assert!(problem("host all all all gss").contains("method \"gss\" is unknown; use"));
        for (line, word) in [
            ("host all all samenet trust", "samenet"),
            ("host all +staff all trust", "+role"),
            ("host @dbs all all trust", "file or pattern"),
            ("host all all db.example.org trust", "host name"),
            ("host all all 10.0.0.1 trust", "mask"),
            ("host all all 10.0.0.0/99 trust", "CIDR"),
            ("host all all all scram-sha-256 clientcert=verify-full", "clientcert"),
            ("hots all all all trust", "connection type \"hots\""),
            ("host all", "user is missing"),
            ("host all all all", "method is missing"),
            ("host \"all all all trust", "quotation mark"),
            ("local all all pear", "unknown"),
        ] {
            assert!(problem(line).contains(word), "{line}: {}", problem(line));
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_text_never_panics(
            text in "\\PC{0,200}",
            near in "(host|local|hostssl)[ \",a-z0-9./\\\\#\n+@]{0,80}",
        ) {
            let _ = HbaFile::parse("f", &text);
            let _ = HbaFile::parse("f", &near);
        }
    }
}
