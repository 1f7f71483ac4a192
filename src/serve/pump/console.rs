//! `SHOW pool_...` in the extended protocol, as drivers speak it who prepare everything: for these statements the gate
//! is the server, from a message that names one of them while nothing is in flight up to the next Sync.
//!
//! What it is NOT: part of a pipeline. It waits until all before it is answered, and up to the Sync there is nothing
//! else beside it; such a statement behind others before a Sync is PostgreSQL's, which does not know it. An Execute
//! gives all rows, whatever number it names.
//!
//! **Invariant:** a name stands for a statement here only until the client parses or closes it elsewhere.

use super::super::end::End;
use super::super::listener::Proxy;
use super::super::show;
use super::{MAX_OUT, Pump, Step};
use crate::wire::pg::{self, HEADER, Header, OwnQuery, Refusal, Shown, cstring};
use bytes::{BufMut, BytesMut};
use std::collections::HashMap;

/// Longest message here, in bytes of its body.
const MAX_BODY: usize = 4096;
/// Statements of the gate that one client may have.
const MAX_STATEMENTS: usize = 64;

/// What one client has of it.
#[derive(Default)]
pub(super) struct Console {
    statements: HashMap<Box<[u8]>, Shown>,
    /// With their result formats.
    portals: HashMap<Box<[u8]>, (Shown, Vec<i16>)>,
    /// Until the next Sync.
    is_open: bool,
    /// An error came: all is skipped up to the Sync.
    has_failed: bool,
    /// Bytes of a skipped message still to come.
    left: usize,
}

/// The statement that a Parse, Bind, Describe or Close names, and what follows the name; `None`: none, or more of it
/// must be there first.
fn named(kind: u8, mut body: &[u8]) -> Option<(&[u8], &[u8])> {
    match kind {
        b'P' => {}
        b'B' => drop(cstring(&mut body)?),
        _ => body = body.strip_prefix(b"S")?,
    }
    let name = cstring(&mut body)?;
    Some((name, body))
}

fn shown(text: &[u8]) -> Option<Shown> {
    let end = text.iter().position(|b| *b == 0)?;
    match pg::own_query(&text[..=end]) {
        Some(OwnQuery::Show(what)) => Some(what),
        _ => None,
    }
}

fn malformed() -> Refusal {
    Refusal::new("08P01", "invalid message format")
}

fn numbers(body: &mut &[u8]) -> Option<Vec<i16>> {
    let mut number = || {
        let (first, rest) = body.split_first_chunk::<2>()?;
        *body = rest;
        Some(i16::from_be_bytes(*first))
    };
    (0..number()?).map(|_| number()).collect()
}

impl Console {
    /// Whether names have to be watched for.
    pub(super) fn has_statements(&self) -> bool {
        !self.statements.is_empty()
    }

    /// Answers one message, complete, of an exchange.
    fn answer(&mut self, kind: u8, mut body: &[u8], out: &mut BytesMut, asks: (&Proxy, &str)) -> Result<(), Refusal> {
        let foreign = || {
            Refusal::new("0A000", "portcullis: SHOW pool_... stands alone between two Syncs of the extended protocol")
                .hint("Send it as a simple query, or not in a pipeline with other statements.")
        };
        match kind {
            b'P' => {
                let (name, rest) = named(kind, body).ok_or_else(malformed)?;
                let what = shown(rest).ok_or_else(foreign)?;
                if self.statements.len() >= MAX_STATEMENTS {
                    return Err(Refusal::new("54000", "portcullis: too many prepared SHOW pool_..."));
                }
                self.statements.insert(name.into(), what);
                out.put_slice(&[b'1', 0, 0, 0, 4]);
            }
            b'B' => {
                let portal = cstring(&mut body).ok_or_else(malformed)?;
                let name = cstring(&mut body).ok_or_else(malformed)?;
                let what = *self.statements.get(name).ok_or_else(foreign)?;
                let _parameter_formats = numbers(&mut body).ok_or_else(malformed)?;
                let body = &mut body.strip_prefix(&[0, 0]).ok_or_else(malformed)?;
                let formats = numbers(body).ok_or_else(malformed)?;
                if self.portals.len() >= MAX_STATEMENTS {
                    return Err(Refusal::new("54000", "portcullis: too many portals of SHOW pool_..."));
                }
                self.portals.insert(portal.into(), (what, formats));
                out.put_slice(&[b'2', 0, 0, 0, 4]);
            }
            b'D' if body.first() == Some(&b'S') => {
                let (name, _) = named(kind, body).ok_or_else(malformed)?;
                let what = *self.statements.get(name).ok_or_else(foreign)?;
                // No parameters.
                out.put_slice(&[b't', 0, 0, 0, 6, 0, 0]);
                show::describe(what, &[], out);
            }
            b'C' if body.first() == Some(&b'S') => {
                let (name, _) = named(kind, body).ok_or_else(malformed)?;
                self.statements.remove(name);
                out.put_slice(&[b'3', 0, 0, 0, 4]);
            }
            // Those of a portal.
            _ => {
                if kind != b'E' {
                    body = body.strip_prefix(b"P").ok_or_else(malformed)?;
                }
                let portal = cstring(&mut body).ok_or_else(malformed)?;
                if kind == b'C' {
                    self.portals.remove(portal);
                    out.put_slice(&[b'3', 0, 0, 0, 4]);
                    return Ok(());
                }
                let (what, formats) = self.portals.get(portal).ok_or_else(foreign)?;
                match kind {
                    b'D' => show::describe(*what, formats, out),
                    _ => show::rows(*what, asks.0, asks.1, out),
                }
            }
        }
        Ok(())
    }
}

impl Pump {
    /// Whether this message, the first of an exchange, is the gate's to answer. `None`: more of it must be there first.
    pub(super) fn is_for_console(&self, header: Header) -> Option<bool> {
        if !matches!(header.kind, b'P' | b'B' | b'D' | b'C') || self.exchange.status() == b'E' {
            return Some(false);
        }
        let has = |name: &[u8]| self.console.as_ref().is_some_and(|console| console.statements.contains_key(name));
        let watches = self.console.as_ref().is_some_and(|console| console.has_statements());
        let short = pg::may_be_own(Header { kind: b'Q', ..header });
        if !(watches || header.kind == b'P' && short) {
            return Some(false);
        }
        let rest = self.up.bytes().get(self.up.parsed + HEADER..).unwrap_or_default();
        let body = &rest[..rest.len().min(header.body)];
        if body.len() < header.body.min(MAX_BODY) {
            return None;
        }
        let Some((name, rest)) = named(header.kind, body) else { return Some(false) };
        if header.kind != b'P' {
            return Some(has(name));
        }
        let is_taken = self.sharing.as_ref().is_some_and(|sharing| sharing.names.has(name));
        Some(!is_taken && short && shown(rest).is_some())
    }

    /// Begins an exchange with the gate.
    pub(super) fn open_console(&mut self) {
        self.console.get_or_insert_default().is_open = true;
    }

    /// A message passes to PostgreSQL: what it parses or closes is not the gate's any more. `false`: more of it must be
    /// there first.
    pub(super) fn leave_console(&mut self, header: Header) -> bool {
        let Some(console) = self.console.as_mut().filter(|console| console.has_statements()) else { return true };
        match header.kind {
            // It ends the unnamed one.
            b'Q' => drop(console.statements.remove(&b""[..])),
            b'P' | b'C' => {
                let rest = self.up.bytes().get(self.up.parsed + HEADER..).unwrap_or_default();
                match named(header.kind, &rest[..rest.len().min(header.body)]) {
                    Some((name, _)) => drop(console.statements.remove(name)),
                    // A portal, or no name.
                    None => return rest.len() >= header.body.min(MAX_BODY),
                }
            }
            _ => {}
        }
        true
    }

    /// Whether the gate is the one who is spoken to.
    pub(super) fn is_at_console(&self) -> bool {
        self.console.as_ref().is_some_and(|console| console.is_open)
    }

    /// Answers what the client sent, up to a Sync.
    pub(super) fn converse(&mut self) -> Result<Step, End> {
        let Some(console) = self.console.as_mut() else { return Ok(Step::Passed) };
        loop {
            let here = console.left.min(self.up.end - self.up.parsed);
            console.left -= here;
            let at = self.up.parsed + here;
            if here > 0 {
                self.up.skip_to(at);
            }
            if console.left > 0 {
                return Ok(Step::More);
            }
            if self.answer.len() >= MAX_OUT {
                return Ok(Step::Blocked);
            }
            let bytes = &self.up.bytes()[self.up.parsed..];
            let Some(header) = pg::header(bytes).map_err(End::Malformed)? else { return Ok(Step::More) };
            match header.kind {
                b'S' if header.body > 0 => return Err(End::Malformed(pg::Malformed("a Sync has no body"))),
                b'S' => {
                    self.answer.put_slice(&[b'Z', 0, 0, 0, 5, self.exchange.status()]);
                    (console.is_open, console.has_failed) = (false, false);
                    console.portals.clear();
                    let at = self.up.parsed + HEADER;
                    self.up.skip_to(at);
                    return Ok(Step::Passed);
                }
                b'P' | b'B' | b'D' | b'E' | b'C' if !console.has_failed => {
                    let answered = match bytes[HEADER..].get(..header.body) {
                        _ if header.body > MAX_BODY => Err(malformed()),
                        None => return Ok(Step::More),
                        Some(body) => {
                            let asks = (&*self.data.proxy, &*self.entry.slot.user);
                            console.answer(header.kind, body, &mut self.answer, asks)
                        }
                    };
                    if let Err(refusal) = answered {
                        self.answer.extend_from_slice(&refusal.encode_error());
                        console.has_failed = true;
                    }
                }
                b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => {}
                // None of an exchange: as if there had been a Sync.
                _ => {
                    (console.is_open, console.has_failed) = (false, false);
                    return Ok(Step::Passed);
                }
            }
            console.left = HEADER + header.body;
        }
    }
}
