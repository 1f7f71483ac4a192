//! Prepared statements of clients that share backends (transaction mode): a client's names become names of the gate's
//! own, by the statement's text, and a backend that does not know one is told it before it is used.
//!
//! What it is NOT: it sees the protocol's statements only; SQL's PREPARE and EXECUTE are the session's own and do not
//! outlive a transaction here.
//!
//! **Invariants:** a name of ours stands for one text. What may or may not stand in a backend after an error is closed
//! before it is parsed again. Answers to messages of the gate's own are swallowed in the order of those messages.

use super::{HEADER, Malformed, cstring};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};

/// Longest statement that is kept for other backends, in bytes; a longer named one is refused.
pub const MAX_TEXT: usize = 16 * 1024 * 1024;
/// Longest unnamed statement that is kept; a longer one serves in the transaction it was parsed in.
const MAX_UNNAMED: usize = 64 * 1024;
/// Statements whose text is looked after at most; forgotten ones are swept when a new one comes.
const SWEEP_ABOVE: usize = 1024;

/// One text and the number in its name.
#[derive(Debug)]
pub struct Statement {
    id: u64,
    /// A Parse message's body behind the name: query, terminator, parameter types.
    text: Box<[u8]>,
}

/// Before the number of a statement. A client's own name that begins so and is not known is made another.
const PREFIX: &str = "portcullis_";

fn name_of(id: u64) -> String {
    format!("{PREFIX}{id}")
}

impl Statement {
    fn name(&self) -> String {
        name_of(self.id)
    }
}

/// Every text in use by the clients of a thread.
#[derive(Debug, Default)]
pub struct Catalogue {
    by_text: HashMap<Rc<[u8]>, Weak<Statement>>,
    next: u64,
    sweep_at: usize,
}

impl Catalogue {
    fn intern(&mut self, text: &[u8]) -> Rc<Statement> {
        if let Some(known) = self.by_text.get(text).and_then(Weak::upgrade) {
            return known;
        }
        if self.by_text.len() >= self.sweep_at.max(SWEEP_ABOVE) {
            self.by_text.retain(|_, statement| statement.strong_count() > 0);
            self.sweep_at = self.by_text.len() * 2;
        }
        self.next += 1;
        let statement = Rc::new(Statement { id: self.next, text: text.into() });
        self.by_text.insert(text.into(), Rc::downgrade(&statement));
        statement
    }
}

/// What a backend knows.
#[derive(Debug, Default)]
pub struct Known {
    /// By number: whether it surely stands there, and when it was last used.
    statements: HashMap<u64, (bool, u64)>,
    uses: u64,
    /// Whose unnamed statement it has, and which: a token and a serial of [`Names`].
    unnamed_of: (u64, u64),
}

impl Known {
    /// All statements are gone (DISCARD ALL, DEALLOCATE ALL).
    pub fn clear(&mut self) {
        *self = Known::default();
    }

    fn touch(&mut self, id: u64) -> bool {
        self.uses += 1;
        let uses = self.uses;
        match self.statements.get_mut(&id) {
            Some((sure, used)) => {
                *used = uses;
                *sure
            }
            None => false,
        }
    }

    fn learn(&mut self, id: u64) {
        self.uses += 1;
        self.statements.insert(id, (true, self.uses));
    }

    fn doubt(&mut self, id: u64) {
        if let Some((sure, _)) = self.statements.get_mut(&id) {
            *sure = false;
        }
    }

    /// The one that was not used for longest, where there are too many.
    fn evict(&mut self, most: usize) -> Option<u64> {
        if self.statements.len() < most {
            return None;
        }
        let oldest = self.statements.iter().min_by_key(|(_, (_, used))| *used).map(|(id, _)| *id)?;
        self.statements.remove(&oldest);
        Some(oldest)
    }
}

/// A Parse in flight.
#[derive(Debug)]
struct Parse {
    /// Of the gate's own: its answer is swallowed.
    own: bool,
    what: What,
    /// The client's name for it, where this Parse made it.
    name: Option<Box<[u8]>>,
}

/// What a Parse makes.
#[derive(Debug)]
enum What {
    /// The statement of this number.
    Numbered(u64),
    Unnamed,
    /// Nothing: its name is in use, and PostgreSQL says so.
    Twice,
}

/// One client's statements and those of its messages in flight.
#[derive(Debug, Default)]
pub struct Names {
    named: HashMap<Box<[u8]>, Rc<Statement>>,
    /// The last unnamed Parse's body behind the name; empty: there is none, or it was too long.
    unnamed: Vec<u8>,
    token: u64,
    /// Counts unnamed statements.
    serial: u64,
    parses: VecDeque<Parse>,
    closes: VecDeque<Close>,
}

/// A Close in flight.
#[derive(Debug, Clone, Copy, Default)]
struct Close {
    own: bool,
    /// What it takes from the backend; `None` for a client's, which takes nothing, and for the unnamed one.
    id: Option<u64>,
}

/// Receives the messages of the gate's own, so that their answers are waited for.
pub struct Out<'a> {
    pub bytes: &'a mut Vec<u8>,
    /// Kinds of messages that were added, in order.
    pub own: &'a mut Vec<u8>,
}

impl Out<'_> {
    fn message(&mut self, kind: u8, parts: &[&[u8]]) {
        let length = 4 + parts.iter().map(|part| part.len()).sum::<usize>();
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
    }
}

/// What became of a client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrite {
    /// It passes as it is.
    Pass,
    /// So many bytes of it, header included, were replaced by what was written; the rest passes as it is.
    Replaced(usize),
    /// More of it must be there first.
    More,
}

/// A name that no backend knows, for one of a client's that looks like ours.
fn unknown(name: &[u8]) -> Option<String> {
    name.starts_with(PREFIX.as_bytes()).then(|| format!("{}?", String::from_utf8_lossy(name)))
}

impl Names {
    /// Nobody's statements yet. The token tells clients apart and is never zero.
    pub fn new(token: u64) -> Names {
        Names { token, ..Names::default() }
    }

    /// Whether the client has this statement.
    pub fn has(&self, name: &[u8]) -> bool {
        self.named.contains_key(name)
    }

    /// DEALLOCATE of one statement.
    pub fn forget(&mut self, name: &[u8]) {
        self.named.remove(name);
    }

    /// DEALLOCATE ALL, DISCARD ALL.
    pub fn forget_all(&mut self) {
        self.named.clear();
        self.forget_unnamed();
    }

    /// A simple query ends the unnamed statement (chapter 55.2.3), whoever's the backend has.
    pub fn simple_query(&mut self, known: &mut Known) {
        self.forget_unnamed();
        known.unnamed_of = (0, 0);
    }

    fn forget_unnamed(&mut self) {
        self.unnamed = Vec::new();
        self.serial += 1;
    }

    /// Whether any answer is to be acted on.
    pub fn is_waiting(&self) -> bool {
        !self.parses.is_empty() || !self.closes.is_empty()
    }

    /// Rewrites one Parse, Bind, Describe or Close. `bytes` begin with its header and may end before it does; `whole`
    /// is its length with header. `most` bounds what the backend keeps.
    pub fn rewrite(
        &mut self,
        bytes: &[u8],
        whole: usize,
        known: &mut Known,
        catalogue: &mut Catalogue,
        most: usize,
        out: &mut Out<'_>,
    ) -> Result<Rewrite, Malformed> {
        let kind = bytes[0];
        let mut body = &bytes[HEADER..bytes.len().min(whole)];
        let complete = bytes.len() >= whole;
        const LAYOUT: Malformed = Malformed("a message that names a prepared statement is malformed");
        let short = |complete: bool| if complete { Err(LAYOUT) } else { Ok(Rewrite::More) };
        match kind {
            b'P' => {
                let Some(name) = cstring(&mut body) else { return short(complete) };
                if name.is_empty() {
                    if !complete && whole <= MAX_UNNAMED {
                        return Ok(Rewrite::More);
                    }
                    self.unnamed.clear();
                    if complete {
                        self.unnamed.extend_from_slice(body);
                    }
                    self.serial += 1;
                    known.unnamed_of = (self.token, self.serial);
                    self.parses.push_back(Parse { own: false, what: What::Unnamed, name: None });
                    return Ok(Rewrite::Pass);
                }
                if whole > MAX_TEXT {
                    return Err(Malformed("a prepared statement is too long for pool.mode = \"transaction\""));
                }
                if !complete {
                    return Ok(Rewrite::More);
                }
                let (name, text): (Box<[u8]>, _) = (name.into(), body);
                self.parse(name, text, known, catalogue, most, out);
                Ok(Rewrite::Replaced(whole))
            }
            b'B' => {
                let Some(portal) = cstring(&mut body) else { return short(complete) };
                let Some(name) = cstring(&mut body) else { return short(complete) };
                let used = HEADER + portal.len() + name.len() + 2;
                let new = match self.statement(name, known, out) {
                    Some(statement) => {
                        self.teach(&statement, known, most, out);
                        statement.name()
                    }
                    None => match unknown(name) {
                        Some(other) => other,
                        None => return Ok(Rewrite::Pass),
                    },
                };
                // The length counts the rest, which may still be to come.
                let length = 4 + portal.len() + 1 + new.len() + 1 + (whole - used);
                out.bytes.push(b'B');
                out.bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
                for part in [portal, b"\0", new.as_bytes(), b"\0"] {
                    out.bytes.extend_from_slice(part);
                }
                Ok(Rewrite::Replaced(used))
            }
            // Describe, Close.
            _ => {
                if !complete {
                    return Ok(Rewrite::More);
                }
                let is_close = kind == b'C';
                if is_close {
                    self.closes.push_back(Close::default());
                }
                if body.first() != Some(&b'S') {
                    return Ok(Rewrite::Pass);
                }
                body = &body[1..];
                let name = cstring(&mut body).ok_or(LAYOUT)?;
                let new = if is_close {
                    // No backend knows the client's name for it: closing that is answered, and closes nothing.
                    self.forget(name);
                    if name.is_empty() {
                        self.forget_unnamed();
                        known.unnamed_of = (0, 0);
                    }
                    unknown(name)
                } else if let Some(statement) = self.statement(name, known, out) {
                    self.teach(&statement, known, most, out);
                    Some(statement.name())
                } else {
                    unknown(name)
                };
                let Some(new) = new else { return Ok(Rewrite::Pass) };
                out.message(kind, &[b"S", new.as_bytes(), b"\0"]);
                Ok(Rewrite::Replaced(whole))
            }
        }
    }

    /// The statement of a name; where it is the unnamed one, the backend is made to have this client's.
    fn statement(&mut self, name: &[u8], known: &mut Known, out: &mut Out<'_>) -> Option<Rc<Statement>> {
        if !name.is_empty() {
            return self.named.get(name).cloned();
        }
        if known.unnamed_of == (self.token, self.serial) {
            return None;
        }
        if self.unnamed.is_empty() {
            // This client has none, so it shall not meet another's.
            out.message(b'C', &[b"S\0"]);
            out.own.push(b'C');
            self.closes.push_back(Close { own: true, id: None });
            known.unnamed_of = (0, 0);
        } else {
            out.message(b'P', &[b"\0", &self.unnamed]);
            out.own.push(b'P');
            self.parses.push_back(Parse { own: true, what: What::Unnamed, name: None });
            known.unnamed_of = (self.token, self.serial);
        }
        None
    }

    fn parse(
        &mut self,
        name: Box<[u8]>,
        text: &[u8],
        known: &mut Known,
        catalogue: &mut Catalogue,
        most: usize,
        out: &mut Out<'_>,
    ) {
        if let Some(twice) = self.named.get(&name).cloned() {
            // PostgreSQL says what is wrong with that.
            self.teach(&twice, known, most, out);
            out.message(b'P', &[twice.name().as_bytes(), b"\0", text]);
            self.parses.push_back(Parse { own: false, what: What::Twice, name: None });
            return;
        }
        let statement = catalogue.intern(text);
        self.make_room(&statement, known, most, out);
        out.message(b'P', &[statement.name().as_bytes(), b"\0", text]);
        known.learn(statement.id);
        self.parses.push_back(Parse { own: false, what: What::Numbered(statement.id), name: Some(name.clone()) });
        self.named.insert(name, statement);
    }

    /// Closes what stands in the way of parsing a statement: itself, or the one that was not used for longest.
    fn make_room(&mut self, statement: &Statement, known: &mut Known, most: usize, out: &mut Out<'_>) {
        let mut in_the_way = known.statements.remove(&statement.id).map(|_| statement.id);
        loop {
            // More than one where an error undid a Close.
            let Some(id) = in_the_way.take().or_else(|| known.evict(most)) else { return };
            out.message(b'C', &[b"S", name_of(id).as_bytes(), b"\0"]);
            out.own.push(b'C');
            self.closes.push_back(Close { own: true, id: Some(id) });
        }
    }

    /// Sees to it that the backend has the statement.
    fn teach(&mut self, statement: &Statement, known: &mut Known, most: usize, out: &mut Out<'_>) {
        if known.touch(statement.id) {
            return;
        }
        self.make_room(statement, known, most, out);
        out.message(b'P', &[statement.name().as_bytes(), b"\0", &statement.text]);
        out.own.push(b'P');
        known.learn(statement.id);
        self.parses.push_back(Parse { own: true, what: What::Numbered(statement.id), name: None });
    }

    /// A ParseComplete came; whether it is to be swallowed.
    pub fn parsed(&mut self) -> bool {
        self.parses.pop_front().is_some_and(|parse| parse.own)
    }

    /// A CloseComplete came; whether it is to be swallowed.
    pub fn closed(&mut self) -> bool {
        self.closes.pop_front().is_some_and(|close| close.own)
    }

    /// So many of each were not carried out.
    pub fn failed(&mut self, parses: u32, closes: u32, known: &mut Known) {
        for _ in 0..parses {
            let Some(parse) = self.parses.pop_front() else { break };
            match parse.what {
                What::Numbered(id) => known.doubt(id),
                What::Unnamed => {
                    known.unnamed_of = (0, 0);
                    // A Parse that failed took the former one with it (exec_parse_message in postgres.c).
                    if !parse.own {
                        self.forget_unnamed();
                    }
                }
                What::Twice => {}
            }
            if let Some(name) = parse.name {
                self.named.remove(&name);
            }
        }
        for _ in 0..closes {
            // It may still stand there.
            if let Some(id) = self.closes.pop_front().and_then(|close| close.id) {
                known.learn(id);
                known.doubt(id);
            }
        }
    }
}

#[cfg(test)]
#[path = "statements/tests.rs"]
mod tests;
