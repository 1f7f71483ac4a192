//! Prepared statements of clients that share backends (transaction mode): a client's names become names of the gate's
//! own, by the statement's text, and a backend that does not know one is told it before it is used.
//!
//! What it is NOT: it sees the protocol's statements only, and SQL's DEALLOCATE of one of them; SQL's PREPARE and
//! EXECUTE are the session's own and do not outlive a transaction here.
//!
//! **Invariants:** a name of ours stands for one text. What may or may not stand in a backend after an error is closed
//! before it is parsed again. Answers to messages of the gate's own are swallowed in the order of those messages.

mod carried;

use super::options::Effect;
use super::{HEADER, Malformed, OwnQuery, cstring, own_query};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};

/// Longest statement that is kept for other backends, in bytes; a longer named one is refused.
pub const MAX_TEXT: usize = 16 * 1024 * 1024;
/// Longest unnamed statement that is kept; a longer one serves in the transaction it was parsed in.
const MAX_UNNAMED: usize = 64 * 1024;
/// Statements that one client may have, and bytes of their texts: PostgreSQL would keep them in that client's own
/// process, the gate keeps them in everybody's.
const MAX_NAMED: (usize, usize) = (100_000, 64 * 1024 * 1024);
/// Statements whose text is looked after at most; forgotten ones are swept when a new one comes.
const SWEEP_ABOVE: usize = 1024;
/// The same in bytes of text.
const SWEEP_BYTES_ABOVE: usize = 8 * 1024 * 1024;

/// One text and the number in its name.
#[derive(Debug)]
pub struct Statement {
    id: u64,
    /// A Parse message's body behind the name: query, terminator, parameter types.
    text: Rc<[u8]>,
    effect: Effect,
}

/// Before the number of a statement. A client's own name that begins so and is not known is made another.
const PREFIX: &str = "portcullis_";
/// An empty statement that is made for each DEALLOCATE of a client's, to be what it takes; no text has this number.
const SACRIFICE: &[u8] = b"portcullis_0\0";
/// What a DEALLOCATE of a client's is made into: a Parse message's body behind the name.
const DEALLOCATE: &[u8] = b"DEALLOCATE portcullis_0\0\0\0";

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
    /// Bytes of the texts in `by_text`, and at how many they are swept.
    bytes: usize,
    sweep_bytes_at: usize,
}

impl Catalogue {
    fn intern(&mut self, text: &[u8]) -> Rc<Statement> {
        if let Some(known) = self.by_text.get(text).and_then(Weak::upgrade) {
            return known;
        }
        if self.by_text.len() >= self.sweep_at.max(SWEEP_ABOVE)
            || self.bytes >= self.sweep_bytes_at.max(SWEEP_BYTES_ABOVE)
        {
            self.by_text.retain(|_, statement| statement.strong_count() > 0);
            self.bytes = self.by_text.keys().map(|text| text.len()).sum();
            (self.sweep_at, self.sweep_bytes_at) = (self.by_text.len() * 2, self.bytes * 2);
        }
        self.next += 1;
        self.bytes += text.len();
        let text: Rc<[u8]> = text.into();
        let statement = Rc::new(Statement { id: self.next, effect: Effect::of(&text), text: Rc::clone(&text) });
        self.by_text.insert(text, Rc::downgrade(&statement));
        statement
    }

    /// Plans of some of these are stale ("cached plan must not change result type"), here and perhaps in every backend
    /// that knows them: who parses one of these texts from now on gets a statement that no backend knows.
    pub fn outdate(&mut self, ids: &[u64]) {
        let bytes = &mut self.bytes;
        self.by_text.retain(|text, statement| {
            let is_stale = statement.upgrade().is_some_and(|statement| ids.contains(&statement.id));
            *bytes -= if is_stale { text.len() } else { 0 };
            !is_stale
        });
    }
}

/// What a backend knows.
#[derive(Debug, Default)]
pub struct Known {
    /// By number: whether it surely stands there, and when it was last used.
    statements: HashMap<u64, (bool, u64)>,
    uses: u64,
    /// How many uses there were when everything was answered.
    settled: u64,
    /// Whose unnamed statement it has, and which: a token and a serial of [`Names`].
    unnamed_of: (u64, u64),
}

impl Known {
    /// All statements are gone (DISCARD ALL after a session).
    pub fn clear(&mut self) {
        *self = Known::default();
    }

    /// A DISCARD ALL or DEALLOCATE ALL of this client was carried out: all are gone, but those whose Parse is still to
    /// be answered and so came behind it. It takes no unnamed one.
    pub fn forget_all(&mut self, names: &Names) {
        self.statements.retain(|id, _| names.is_being_parsed(*id));
    }

    /// A simple query was carried out: there is no unnamed statement any more.
    pub fn forget_unnamed(&mut self) {
        self.unnamed_of = (0, 0);
    }

    /// Everything was answered.
    pub fn settle(&mut self) {
        self.settled = self.uses;
    }

    /// What was used since then: an error now is about one of these.
    pub fn in_use(&self) -> Vec<u64> {
        self.statements.iter().filter(|(_, (_, used))| *used > self.settled).map(|(id, _)| *id).collect()
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
    /// What a DEALLOCATE will take.
    Sacrifice,
    /// Nothing: its name is in use, and PostgreSQL says so; unless a DEALLOCATE ALL came before it in the pipeline.
    Twice(u64),
}

/// One client's statements and those of its messages in flight.
#[derive(Debug, Default)]
pub struct Names {
    named: HashMap<Box<[u8]>, Rc<Statement>>,
    /// At least the bytes of their texts.
    bytes_at_most: usize,
    /// The last unnamed Parse's body behind the name; empty: there is none, or it was too long.
    unnamed: Vec<u8>,
    unnamed_effect: Effect,
    /// Of the statement parsed last.
    parsed: Effect,
    /// What was bound last, and whether to a portal with a name; until it is asked for.
    bound: Option<(Effect, bool)>,
    /// Statements of the client that are a DEALLOCATE, and what of its own each takes.
    deallocates: HashMap<Box<[u8]>, Box<[u8]>>,
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

    /// Takes a statement that the client had with another gate: the Parse message's body behind its name. No backend
    /// knows it yet. `body` of a DEALLOCATE comes after what it takes.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn adopt(&mut self, name: &[u8], body: &[u8], catalogue: &mut Catalogue) -> Result<(), Malformed> {
        let text = self.deallocation(name, body).unwrap_or(body);
        if name.is_empty() {
            self.unnamed = text.to_vec();
            self.unnamed_effect = Effect::of(text);
            self.serial += 1;
            return Ok(());
        }
        self.check_room(text.len())?;
        self.named.insert(name.into(), catalogue.intern(text));
        Ok(())
    }

    /// Whether the client has this statement.
    pub fn has(&self, name: &[u8]) -> bool {
        self.named.contains_key(name)
    }

    /// DEALLOCATE of one statement.
    pub fn forget(&mut self, name: &[u8]) {
        self.named.remove(name);
    }

    /// DEALLOCATE ALL, DISCARD ALL: all but those whose Parse is still to be answered and so came behind it. It takes
    /// no unnamed one.
    pub fn forget_all(&mut self) {
        let parses = &self.parses;
        self.named.retain(|name, _| parses.iter().any(|parse| parse.name.as_ref() == Some(name)));
        self.deallocates.retain(|name, _| name.is_empty() || self.named.contains_key(name));
    }

    /// What the statement parsed last does.
    pub fn parsed_effect(&self) -> Effect {
        self.parsed
    }

    /// What the last Bind will do, and whether to a portal with a name. Said once.
    pub fn take_bound(&mut self) -> Option<(Effect, bool)> {
        self.bound.take()
    }

    /// A Parse of this name and body comes: where it is a DEALLOCATE of one of the client's statements, the body that
    /// does the same to the gate's.
    fn deallocation(&mut self, name: &[u8], body: &[u8]) -> Option<&'static [u8]> {
        let text = body.iter().position(|b| *b == 0).map(|end| &body[..=end]);
        if let Some(OwnQuery::Deallocate(taken)) = text.and_then(own_query)
            && self.has(taken.as_bytes())
        {
            self.deallocates.insert(name.into(), taken.into_bytes().into());
            return Some(DEALLOCATE);
        }
        if !self.deallocates.is_empty() {
            self.deallocates.remove(name);
        }
        None
    }

    /// A statement is bound: where it is a DEALLOCATE of the client's, there must be something that it takes.
    fn deallocate(&mut self, name: &[u8], out: &mut Out<'_>) {
        let taken = if self.deallocates.is_empty() { None } else { self.deallocates.get(name).cloned() };
        // One that is gone already is PostgreSQL's to complain of.
        if taken.is_some_and(|taken| self.named.remove(&taken).is_some()) {
            out.message(b'C', &[b"S", SACRIFICE]);
            out.own.push(b'C');
            self.closes.push_back(Close { own: true, id: None });
            out.message(b'P', &[SACRIFICE, b"\0\0\0"]);
            out.own.push(b'P');
            self.parses.push_back(Parse { own: true, what: What::Sacrifice, name: None });
        }
    }

    fn is_being_parsed(&self, id: u64) -> bool {
        self.parses.iter().any(|parse| matches!(parse.what, What::Numbered(parsed) if parsed == id))
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
                    let other = if complete { self.deallocation(name, body) } else { None };
                    let text = other.unwrap_or(body);
                    self.unnamed.clear();
                    if complete {
                        self.unnamed.extend_from_slice(text);
                    }
                    self.unnamed_effect = Effect::of(text);
                    self.parsed = self.unnamed_effect;
                    self.serial += 1;
                    known.unnamed_of = (self.token, self.serial);
                    self.parses.push_back(Parse { own: false, what: What::Unnamed, name: None });
                    let Some(other) = other else { return Ok(Rewrite::Pass) };
                    out.message(b'P', &[b"\0", other]);
                    return Ok(Rewrite::Replaced(whole));
                }
                if whole > MAX_TEXT {
                    return Err(Malformed("a prepared statement is too long for pool.mode = \"transaction\""));
                }
                if !complete {
                    return Ok(Rewrite::More);
                }
                let (name, text): (Box<[u8]>, _) = (name.into(), self.deallocation(name, body).unwrap_or(body));
                self.check_room(text.len())?;
                self.parse(name, text, known, catalogue, most, out);
                Ok(Rewrite::Replaced(whole))
            }
            b'B' => {
                let Some(portal) = cstring(&mut body) else { return short(complete) };
                let Some(name) = cstring(&mut body) else { return short(complete) };
                let used = HEADER + portal.len() + name.len() + 2;
                self.deallocate(name, out);
                let statement = self.statement(name, known, out);
                let effect = statement.as_ref().map_or(self.unnamed_effect, |statement| statement.effect);
                self.bound = Some((effect, !portal.is_empty()));
                let new = match statement {
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

    /// Whether one more may be kept. Counted anew where it may matter, so that nothing need be counted out.
    fn check_room(&mut self, more: usize) -> Result<(), Malformed> {
        self.bytes_at_most += more;
        if self.bytes_at_most > MAX_NAMED.1 {
            self.bytes_at_most = self.named.values().map(|statement| statement.text.len()).sum::<usize>() + more;
        }
        if self.named.len() >= MAX_NAMED.0 || self.bytes_at_most > MAX_NAMED.1 {
            return Err(Malformed("too many prepared statements for pool.mode = \"transaction\""));
        }
        Ok(())
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
            self.parses.push_back(Parse { own: false, what: What::Twice(twice.id), name: None });
            return;
        }
        let statement = catalogue.intern(text);
        self.parsed = statement.effect;
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
    pub fn parsed(&mut self, known: Option<&mut Known>) -> bool {
        let Some(parse) = self.parses.pop_front() else { return false };
        if let (What::Twice(id), Some(known)) = (parse.what, known) {
            // Another text stands there under its name.
            known.learn(id);
            known.doubt(id);
        }
        parse.own
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
                What::Twice(_) | What::Sacrifice => {}
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
