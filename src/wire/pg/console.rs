//! The words of the admin console: from the text of a query to what it asks for.
//!
//! What it is NOT: SQL. What drivers send of themselves (BEGIN, SET, SELECT 1) is understood so far that they work;
//! all else is refused by name.
//!
//! **Invariant:** arbitrary text never panics.

use super::{Refusal, Shown};

/// A view of the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// One of those that every session may ask for.
    Pool(Shown),
    Clients,
    Config,
    Databases,
    Events,
    Help,
    Lease,
    Lists,
    Nodes,
    Pools,
    Servers,
    Stats,
    Status,
    Version,
}

impl View {
    /// Those of the console's own, with what each shows.
    pub const OWN: [(&'static str, View, &'static str); 13] = [
        ("CLIENTS", View::Clients, "sessions: who, from where, what it does, its id for KILL CLIENT"),
        ("CONFIG", View::Config, "the configuration in force, without secrets"),
        ("DATABASES", View::Databases, "databases that clients logged in to, and whether they are paused"),
        ("EVENTS", View::Events, "the last events, oldest first"),
        ("HELP", View::Help, "this list"),
        ("LEASE", View::Lease, "what holds the gate open, and for how long still"),
        ("LISTS", View::Lists, "how many there are of each thing"),
        ("NODES", View::Nodes, "the nodes, as `portcullis nodes` shows them"),
        ("POOLS", View::Pools, "clients and backends of each (database, user)"),
        ("SERVERS", View::Servers, "backends, and which client has them"),
        ("STATS", View::Stats, "totals of each (database, user)"),
        ("STATUS", View::Status, "this node, its peer, witness and replication"),
        ("VERSION", View::Version, "of this daemon"),
    ];

    fn of(name: &str) -> Option<View> {
        let own = View::OWN.iter().find(|(known, ..)| name.eq_ignore_ascii_case(known)).map(|(_, view, _)| *view);
        own.or_else(|| Shown::of(name).map(View::Pool))
    }
}

/// What the console does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Of one database, or of the whole service.
    Pause(Option<String>),
    Resume(Option<String>),
    Reconnect(Option<String>),
    Kill(String),
    KillClient(i32),
    Reload,
}

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    Show(View),
    /// `PGPOOL SHOW name`: an item of `SHOW pool_status`; none: all of them.
    PgpoolShow(Option<String>),
    /// A setting that drivers ask for.
    Setting(String),
    Act(Action),
    Begin,
    Commit,
    Rollback,
    /// Nothing comes of it but this command tag.
    Nothing(&'static str),
    /// `SELECT 1`, by which pools look whether somebody is there.
    One,
}

/// A word, a name in quotes, a string, a number, or one other character.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// Not in quotes: in lower case, and as it was written.
    Word(String, String),
    Quoted(String),
    Text(String),
    Symbol(char),
}

impl Token {
    fn is(&self, word: &str) -> bool {
        matches!(self, Token::Word(lower, _) if lower == word)
    }
}

fn syntax(text: impl Into<String>) -> Refusal {
    Refusal::new("42601", text.into()).hint("SHOW HELP lists what the console knows.")
}

/// Up to the closing mark, which stands for itself where it is doubled.
fn quoted(rest: &mut std::iter::Peekable<std::str::Chars<'_>>, mark: char) -> Result<String, Refusal> {
    let mut found = String::new();
    loop {
        match rest.next() {
            Some(c) if c == mark && rest.peek() == Some(&mark) => {
                rest.next();
                found.push(mark);
            }
            Some(c) if c == mark => return Ok(found),
            Some(c) => found.push(c),
            None => return Err(syntax("portcullis: a quotation does not end")),
        }
    }
}

/// The tokens, without comments.
fn tokens(text: &str) -> Result<Vec<Token>, Refusal> {
    let mut rest = text.chars().peekable();
    let mut found = Vec::new();
    while let Some(c) = rest.next() {
        match c {
            c if c.is_whitespace() => {}
            '-' if rest.peek() == Some(&'-') => while rest.next().is_some_and(|c| c != '\n') {},
            '/' if rest.peek() == Some(&'*') => {
                rest.next();
                let mut last = ' ';
                loop {
                    match rest.next() {
                        Some('/') if last == '*' => break,
                        Some(c) => last = c,
                        None => return Err(syntax("portcullis: a comment does not end")),
                    }
                }
            }
            '"' => found.push(Token::Quoted(quoted(&mut rest, '"')?)),
            '\'' => found.push(Token::Text(quoted(&mut rest, '\'')?)),
            c if c.is_alphanumeric() || c == '_' => {
                let mut word = String::from(c);
                while let Some(c) = rest.next_if(|c| c.is_alphanumeric() || matches!(c, '_' | '$' | '-')) {
                    word.push(c);
                }
                found.push(Token::Word(word.to_lowercase(), word));
            }
            c => found.push(Token::Symbol(c)),
        }
    }
    Ok(found)
}

/// The statements of a text, between semicolons; none where it is empty.
///
/// # Errors
/// The first that is not understood.
pub fn parse(text: &str) -> Result<Vec<Statement>, Refusal> {
    let tokens = tokens(text)?;
    let statements = tokens.split(|token| *token == Token::Symbol(';')).filter(|words| !words.is_empty());
    statements.map(statement).collect()
}

/// A database, as PostgreSQL reads a name.
fn name(words: &[Token]) -> Result<Option<String>, Refusal> {
    match words {
        [] => Ok(None),
        [Token::Word(lower, _)] => Ok(Some(lower.clone())),
        [Token::Quoted(name) | Token::Text(name)] => Ok(Some(name.clone())),
        _ => Err(syntax("portcullis: one name of a database is wanted here, in double quotes where it is odd")),
    }
}

fn statement(words: &[Token]) -> Result<Statement, Refusal> {
    let Some((first, rest)) = words.split_first() else { return Ok(Statement::Nothing("")) };
    let Token::Word(first, _) = first else { return Err(no_sql()) };
    let act = |action| Ok(Statement::Act(action));
    match first.as_str() {
        "show" => show(rest),
        "help" if rest.is_empty() => Ok(Statement::Show(View::Help)),
        "pgpool" => match rest {
            [show, what] if show.is("show") && what.is("all") => Ok(Statement::PgpoolShow(None)),
            [show, Token::Word(item, _)] if show.is("show") => Ok(Statement::PgpoolShow(Some(item.clone()))),
            _ => Err(syntax("portcullis: of PGPOOL there is only PGPOOL SHOW ALL and PGPOOL SHOW item")
                .hint("The configuration is changed in its file; then RELOAD.")),
        },
        "pause" => act(Action::Pause(name(rest)?)),
        "resume" | "continue" => act(Action::Resume(name(rest)?)),
        "reconnect" => act(Action::Reconnect(name(rest)?)),
        "kill_client" => act(Action::KillClient(id(rest)?)),
        "kill" if rest.first().is_some_and(|word| word.is("client")) => act(Action::KillClient(id(&rest[1..])?)),
        "kill" => match name(rest)? {
            Some(database) => act(Action::Kill(database)),
            None => Err(syntax("portcullis: KILL needs the name of a database, or CLIENT and an id")
                .hint("SHOW CLIENTS lists ids. To end everything: `portcullis fence`.")),
        },
        "reload" if rest.is_empty() => act(Action::Reload),
        "begin" | "start" => Ok(Statement::Begin),
        "commit" | "end" => Ok(Statement::Commit),
        "rollback" | "abort" => Ok(Statement::Rollback),
        "set" => set(rest),
        "reset" => Ok(Statement::Nothing("RESET")),
        "discard" => Ok(Statement::Nothing("DISCARD ALL")),
        "unlisten" => Ok(Statement::Nothing("UNLISTEN")),
        "close" => Ok(Statement::Nothing("CLOSE CURSOR ALL")),
        "select" if matches!(rest, [Token::Word(one, _)] if one == "1") => Ok(Statement::One),
        _ => Err(no_sql()),
    }
}

fn id(words: &[Token]) -> Result<i32, Refusal> {
    match words {
        [Token::Word(number, _) | Token::Text(number)] if number.bytes().all(|b| b.is_ascii_digit()) => number.parse(),
        _ => "".parse(),
    }
    .map_err(|_| syntax("portcullis: the id of a client is wanted here").hint("SHOW CLIENTS lists ids."))
}

fn show(words: &[Token]) -> Result<Statement, Refusal> {
    match words {
        [] => Ok(Statement::Show(View::Help)),
        [Token::Word(name, as_written)] => Ok(match View::of(name) {
            Some(view) => Statement::Show(view),
            None => Statement::Setting(as_written.clone()),
        }),
        [Token::Quoted(name)] => Ok(Statement::Setting(name.clone())),
        [a, b, c] if a.is("transaction") && b.is("isolation") && c.is("level") => {
            Ok(Statement::Setting("transaction_isolation".to_owned()))
        }
        [a, b] if a.is("time") && b.is("zone") => Ok(Statement::Setting("TimeZone".to_owned())),
        _ => Err(syntax("portcullis: SHOW takes one name")),
    }
}

/// Drivers set what matters to SQL, of which there is none.
fn set(words: &[Token]) -> Result<Statement, Refusal> {
    let words = match words.split_first() {
        Some((scope, rest)) if scope.is("session") || scope.is("local") => rest,
        _ => words,
    };
    let Some((Token::Word(name, _) | Token::Quoted(name), rest)) = words.split_first() else {
        return Err(syntax("portcullis: SET needs a name"));
    };
    if rest.first() == Some(&Token::Symbol('.')) {
        return Err(Refusal::new("55P02", "portcullis: the configuration is not changed from here")
            .hint("Edit portcullis.toml on both nodes, then RELOAD."));
    }
    let is_encoding = name.eq_ignore_ascii_case("client_encoding") || name == "names";
    if is_encoding
        && let Some(Token::Text(value) | Token::Word(value, _) | Token::Quoted(value)) = rest.last()
        && !matches!(&*value.to_lowercase().replace(['-', '_'], ""), "utf8" | "unicode" | "default")
    {
        return Err(Refusal::new("22023", "portcullis: the console speaks UTF-8 only"));
    }
    Ok(Statement::Nothing("SET"))
}

fn no_sql() -> Refusal {
    Refusal::new("0A000", "portcullis: this is the gate's console, which runs no SQL")
        .hint("SHOW HELP lists what it knows; for SQL connect to another database.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(text: &str) -> Statement {
        let mut all = parse(text).unwrap_or_else(|refusal| panic!("{text}: {refusal:?}"));
        assert_eq!(all.len(), 1, "{text}");
        all.remove(0)
    }

    #[test]
    fn statements_are_read_as_people_type_them() {
        let act = |action| Statement::Act(action);
        let table = [
            ("SHOW clients;", Statement::Show(View::Clients)),
            (" show\n Pool_Nodes -- who\n", Statement::Show(View::Pool(Shown::Nodes))),
            ("/* x */ help", Statement::Show(View::Help)),
            ("show", Statement::Show(View::Help)),
            ("pause", act(Action::Pause(None))),
            ("PAUSE App;", act(Action::Pause(Some("app".into())))),
            ("resume \"A \"\"b\"", act(Action::Resume(Some("A \"b".into())))),
            ("reconnect shop-2", act(Action::Reconnect(Some("shop-2".into())))),
            ("kill app", act(Action::Kill("app".into()))),
            ("kill \"client\"", act(Action::Kill("client".into()))),
            ("KILL CLIENT 4711", act(Action::KillClient(4711))),
            ("kill_client 1", act(Action::KillClient(1))),
            ("reload", act(Action::Reload)),
            ("begin isolation level serializable", Statement::Begin),
            ("SET extra_float_digits = 3", Statement::Nothing("SET")),
            ("SET client_encoding TO 'utf-8'", Statement::Nothing("SET")),
            ("SET application_name = 'it''s; me'", Statement::Nothing("SET")),
            ("show transaction isolation level", Statement::Setting("transaction_isolation".into())),
            ("SHOW DateStyle", Statement::Setting("DateStyle".into())),
            ("PGPOOL SHOW port", Statement::PgpoolShow(Some("port".into()))),
            ("pgpool show all", Statement::PgpoolShow(None)),
            ("select 1", Statement::One),
        ];
        for (text, wanted) in table {
            assert_eq!(one(text), wanted, "{text}");
        }
        assert_eq!(parse(" ; ;").map(|all| all.len()), Ok(0));
        assert_eq!(parse("pause app; resume app").map(|all| all.len()), Ok(2));
    }

    #[test]
    fn what_is_no_statement_of_the_console_is_refused_with_a_hint() {
        let table = [
            ("select * from pg_class", "0A000"),
            ("drop database app", "0A000"),
            ("kill", "42601"),
            ("kill client app", "42601"),
            ("kill client 99999999999", "42601"),
            ("pause a b", "42601"),
            ("set pool.size = 3", "55P02"),
            ("set client_encoding to 'latin1'", "22023"),
            ("pgpool set x to y", "42601"),
            ("show 'x", "42601"),
            ("show a b", "42601"),
            ("'x'", "0A000"),
        ];
        for (text, code) in table {
            let refusal = parse(text).expect_err(text);
            assert_eq!(refusal.code, code, "{text}");
            assert!(refusal.hint.is_some() || code == "22023", "{text}");
        }
    }

    const WORDS: &str = "(show|kill|set|pause|client|'|\"|;|/\\*|--|1| |\n){0,20}";

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}", words in WORDS) {
            let _ = parse(&text);
            let _ = parse(&words);
        }
    }
}
