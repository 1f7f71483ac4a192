//! What a client that shares backends has set for its session, as far as its statements show it at their beginning.
//!
//! What it is NOT: no parser. It knows names of customized options (`my.tenant`), which PostgreSQL shows in no list,
//! and whether anything may have been set that it does not know; then the backend is reset rather than lent on as it
//! is. What a function or a DO block sets inside of itself is not seen here.
//!
//! **Invariants:** every SET that was carried out was either begun by a statement that was understood, or leaves doubt.
//! A SET counts for nothing only where its answer is surely that of one SET LOCAL.

use super::customized_option;

/// Customized options of one client that are looked after; what goes beyond them leaves doubt.
const MAX_NAMES: usize = 64;
/// Bytes of a statement that are looked at.
const HEAD: usize = 128;

/// Bytes of a simple query in which a call of set_config() is looked for; in a statement to be prepared, in all of it.
const CALL_HEAD: usize = 1024;

/// What a prepared statement does for its session, as far as its text shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Effect {
    /// It calls set_config() for more than its transaction.
    pub calls: bool,
    /// It is one SET LOCAL and nothing else.
    pub is_local: bool,
}

impl Effect {
    /// Of a text, with or without its terminator and what follows that.
    pub fn of(text: &[u8]) -> Effect {
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        Effect { calls: session_calls(text).next().is_some(), is_local: is_local(text) }
    }
}

/// Which answer is that of a SET LOCAL, surely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Local {
    #[default]
    None,
    /// The next CommandComplete, if it answers a simple query.
    Query,
    /// The next CommandComplete, if it answers an Execute.
    Bound,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Options {
    names: Vec<String>,
    /// SET statements that were understood and not yet carried out.
    understood: u32,
    in_doubt: bool,
    local: Local,
    /// A portal with a name was made in this transaction: an Execute may be of another than the one bound last.
    has_portals: bool,
}

impl Options {
    /// These were set with another gate.
    pub fn adopt<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        for name in names.filter(|name| name.contains('.')) {
            // What finds no room leaves doubt.
            self.in_doubt |= !self.keep(name.to_owned());
        }
    }

    /// A transaction begins.
    pub fn begin(&mut self) {
        (self.understood, self.has_portals) = (0, false);
    }

    /// A simple query comes while nothing is in flight; `whole`: all of it is there. Whether it sets something without
    /// saying so in the end.
    pub fn query(&mut self, text: &[u8], whole: bool) -> bool {
        if whole && is_local(text) {
            self.local = Local::Query;
            return false;
        }
        self.local = Local::None;
        self.note(&text[..text.len().min(CALL_HEAD)])
    }

    /// A statement of this effect is parsed; its terminator and more may follow the text. What it does is done when it
    /// is bound.
    pub fn parsed(&mut self, text: &[u8], effect: Effect) {
        if !effect.is_local {
            let before = self.in_doubt;
            // Most are not looked at further.
            let end = if effect.calls { text.len() } else { text.len().min(HEAD) };
            self.note(text[..end].split(|b| *b == 0).next().unwrap_or_default());
            self.in_doubt = before;
        }
    }

    /// A statement is bound, to be executed. `portal`: it gets a name. `busy`: the answer to another command is still
    /// to come. Whether it sets something without saying so in the end.
    pub fn bound(&mut self, effect: Effect, portal: bool, busy: bool) -> bool {
        self.has_portals |= portal;
        self.in_doubt |= effect.calls;
        // Bound and not executed, the one before may be the one that is answered.
        let sure = self.local == Local::None && !busy && !self.has_portals;
        self.local = if effect.is_local && sure { Local::Bound } else { Local::None };
        effect.calls
    }

    /// An error came, or the end of an exchange: what was waited for may not come.
    pub fn interrupted(&mut self) {
        self.local = Local::None;
    }

    /// Whether what begins like this sets something without saying so in the end.
    fn note(&mut self, statement: &[u8]) -> bool {
        let head = statement[..statement.len().min(HEAD)].trim_ascii_start();
        if strip(head, b"set ").is_some() {
            let is_kept = match customized_option(head) {
                Some(name) => self.keep(name),
                // A name in quotes may be a customized one.
                None => !quotes_a_name(head),
            };
            self.understood += u32::from(is_kept);
            return false;
        }
        let mut calls = false;
        for name in session_calls(statement) {
            calls = true;
            if let Some(name) = name.filter(|name| name.contains('.')) {
                self.keep(name);
            }
        }
        self.in_doubt |= calls;
        calls
    }

    /// A command was carried out; `tag` as in CommandComplete, which answers an Execute or else a simple query. Whether
    /// it set something that may outlive its transaction.
    pub fn carried_out(&mut self, tag: &[u8], by_execute: bool) -> bool {
        let local = std::mem::take(&mut self.local);
        if tag != b"SET\0" {
            return tag == b"RESET\0" || tag == b"DISCARD ALL\0";
        }
        if local == if by_execute { Local::Bound } else { Local::Query } {
            return false;
        }
        match self.understood.checked_sub(1) {
            Some(left) => self.understood = left,
            None => self.in_doubt = true,
        }
        true
    }

    /// Whether anything was seen that sets something.
    pub fn has_noted(&self) -> bool {
        self.in_doubt || !self.names.is_empty() || self.understood > 0 || self.local != Local::None
    }

    /// The names, and whether there is doubt.
    pub fn peek(&self) -> (Vec<String>, bool) {
        (self.names.clone(), self.in_doubt)
    }

    /// The names, and whether there was doubt since this was last asked.
    pub fn take(&mut self) -> (Vec<String>, bool) {
        (self.names.clone(), std::mem::take(&mut self.in_doubt))
    }

    fn keep(&mut self, name: String) -> bool {
        let is_known = self.names.contains(&name);
        if !is_known && self.names.len() < MAX_NAMES {
            self.names.push(name);
            return true;
        }
        is_known
    }
}

/// Whether a SET names its setting in quotes, as far as that is plain; quotes around its value are none.
fn quotes_a_name(set: &[u8]) -> bool {
    let is_end = |b: &u8| b.is_ascii_whitespace() || *b == b'=';
    let mut words = set.split(is_end).filter(|word| !word.is_empty()).skip(1);
    let is_scope = |word: &&[u8]| word.eq_ignore_ascii_case(b"session") || word.eq_ignore_ascii_case(b"local");
    let first = words.next().unwrap_or_default();
    let name = if is_scope(&first) { words.next().unwrap_or_default() } else { first };
    name.contains(&b'"') || name.is_empty() || name.contains(&b'/') || name.contains(&b'-')
}

/// Whether this is one SET LOCAL and nothing else. A semicolon inside of it is not understood.
fn is_local(text: &[u8]) -> bool {
    let text = text.strip_suffix(b"\0").unwrap_or(text).trim_ascii();
    let word = |text, word| strip(text, word).filter(|rest| rest.first().is_some_and(u8::is_ascii_whitespace));
    let rest = word(text, b"set").map(<[u8]>::trim_ascii_start).and_then(|rest| word(rest, b"local"));
    rest.is_some_and(|rest| !rest.strip_suffix(b";").unwrap_or(rest).contains(&b';'))
}

/// Calls of set_config() that may outlive their transaction: the name of what each sets, where that stands there.
fn session_calls(text: &[u8]) -> impl Iterator<Item = Option<String>> {
    const WORD: &[u8] = b"set_config";
    // Most texts have few of these.
    let underlines = text.iter().enumerate().filter(|(_, b)| **b == b'_').map(|(at, _)| at);
    let calls = underlines.filter_map(|at| strip(text.get(at.checked_sub(3)?..)?, WORD));
    calls.filter_map(|call| match arguments(call) {
        Some(arguments) if arguments.last().is_some_and(|last| last.eq_ignore_ascii_case(b"true")) => None,
        arguments => {
            let name = arguments.as_ref().and_then(|all| all.first()?.strip_prefix(b"'")?.strip_suffix(b"'"));
            Some(name.map(|name| String::from_utf8_lossy(name).to_ascii_lowercase()))
        }
    })
}

/// The arguments of a call that begins here; `None` where that is not plain.
fn arguments(call: &[u8]) -> Option<Vec<&[u8]>> {
    let inside = call.trim_ascii_start().strip_prefix(b"(")?;
    let (mut found, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0_u32, false);
    for (at, byte) in inside.iter().enumerate() {
        let next = inside.get(at + 1);
        match byte {
            b'\'' => quoted = !quoted,
            b'\\' => return None,
            _ if quoted => {}
            b'-' if next == Some(&b'-') => return None,
            b'/' if next == Some(&b'*') => return None,
            // A parameter, or a quoted string of another kind.
            b'$' if !next.is_some_and(u8::is_ascii_digit) => return None,
            b'"' => return None,
            b'(' => depth += 1,
            b')' if depth > 0 => depth -= 1,
            b',' | b')' if depth == 0 => {
                found.push(inside[start..at].trim_ascii());
                start = at + 1;
                if *byte == b')' {
                    return Some(found);
                }
            }
            _ => {}
        }
    }
    None
}

fn strip<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    text.split_at_checked(word.len()).filter(|(front, _)| front.eq_ignore_ascii_case(word)).map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_leaves_doubt() {
        for (statement, sets, names, doubt) in [
            ("set search_path = a", 1, &[][..], false),
            ("set search_path to a, \"B c\"", 1, &[], false),
            ("set session \"my\".\"x\" = 'y'", 1, &[], true),
            ("set /* */ \"my\".\"x\" = 'y'", 1, &[], true),
            (" SET my.tenant = 'x'", 1, &["my.tenant"], false),
            ("set \"my\".\"tenant\" = 'x'", 1, &[], true),
            ("/* app */ set my.tenant = 'x'", 1, &[], true),
            ("begin; set my.tenant = 'x'; commit", 1, &[], true),
            ("set my.a = '1'; set my.b = '2'", 2, &["my.a"], true),
            ("select set_config('my.tenant', 'x', false)", 0, &["my.tenant"], true),
            ("Select PG_CATALOG.Set_Config($1, $2, $3)", 0, &[], true),
            ("select 1, set_config('my.tenant', f('x', true), false)", 0, &["my.tenant"], true),
            ("select set_config('my.a', 'it''s), (', true), set_config('my.b', $1, TRUE )", 0, &[], false),
            ("select set_config('my.a', '', true), set_config('my.b', $1, $2)", 0, &["my.b"], true),
            ("select set_config('my.a', E'\\'', true)", 0, &[], true),
            ("select set_config('my.a', '', false) where f(true)", 0, &["my.a"], true),
            ("select set_config('my.tenant', 'x', true)", 0, &[], false),
            ("select 1", 0, &[], false),
            ("sel", 0, &[], false),
        ] {
            let mut options = Options::default();
            options.begin();
            options.query(statement.as_bytes(), true);
            (0..sets).for_each(|_| assert!(options.carried_out(b"SET\0", false)));
            let (known, in_doubt) = options.take();
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!((known, in_doubt), (names, doubt), "{statement}");
            assert!(!options.take().1, "said once");
            // Prepared, it counts when it is bound.
            let effect = Effect::of(statement.as_bytes());
            options.parsed(statement.as_bytes(), effect);
            assert!(!options.take().1, "{statement}");
            assert_eq!(options.bound(effect, false, false), doubt && sets == 0, "{statement}");
            assert_eq!(options.take().1, doubt && sets == 0, "{statement}");
        }
    }

    #[test]
    fn a_set_local_counts_for_nothing_where_it_is_surely_one() {
        for (text, is) in [
            ("set local work_mem = '5MB'\0", true),
            (" SET\tLocal my.x to 'y' ; \0", true),
            ("set local a = 'x;y'", false),
            ("set local a = 1; set b = 2", false),
            ("set localx = 1", false),
            ("set work_mem = 1", false),
            ("set session local = 1", false),
        ] {
            assert_eq!(is_local(text.as_bytes()), is, "{text}");
            let mut options = Options::default();
            options.query(text.as_bytes(), true);
            assert_eq!(options.carried_out(b"SET\0", false), !is, "{text}");
            assert!(options.carried_out(b"SET\0", false), "once");
        }
        let (local, other) = (Effect::of(b"set local a = 1\0\0\0"), Effect::of(b"set a = 1\0\0\0"));
        let answer = |script: &dyn Fn(&mut Options)| {
            let mut options = Options::default();
            script(&mut options);
            options.carried_out(b"SET\0", true)
        };
        assert!(!answer(&|options| _ = options.bound(local, false, false)));
        assert!(answer(&|options| _ = options.bound(other, false, false)));
        assert!(answer(&|options| _ = options.bound(local, false, true)), "another answer comes first");
        assert!(answer(&|options| _ = options.bound(local, true, false)), "a portal's name");
        assert!(answer(&|options| _ = options.query(b"set local a = 1", true)), "no simple query was answered");
        assert!(answer(&|options| _ = options.query(b"set local a = 1", false)), "there may be more of it");
        assert!(answer(&|options| {
            options.bound(local, false, false);
            options.bound(local, false, false);
        }));
        assert!(answer(&|options| {
            options.bound(other, true, false);
            options.bound(local, false, false);
        }));
        assert!(answer(&|options| {
            options.bound(local, false, false);
            options.interrupted();
        }));
    }

    #[test]
    fn names_beyond_the_limit_leave_doubt() {
        let mut options = Options::default();
        for n in 0..=MAX_NAMES {
            options.begin();
            options.query(format!("set my.o{n} = 1").as_bytes(), true);
            options.carried_out(b"SET\0", false);
            assert_eq!(options.take().1, n == MAX_NAMES);
        }
        // Prepared and never run, it vouches for nothing in the next transaction.
        options.parsed(b"set my.o1 = 2", Effect::default());
        options.begin();
        options.carried_out(b"SET\0", true);
        assert!(options.take().1);
    }
}
