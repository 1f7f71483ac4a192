//! A client's message that names a prepared statement: in transaction mode it is rewritten for the backend it has now.
//!
//! What it is NOT: what is written instead is `wire::pg::statements`' to say.
//!
//! **Invariant:** what already passes goes before what is written anew; a message longer than the buffer passes only
//! when it is whole.

use super::super::end::End;
use super::super::flow::BUFFER;
use super::{MAX_OUT, Pump, Sharing, Step};
use crate::wire::pg::statements::{MAX_TEXT, Out, Rewrite};
use crate::wire::pg::{HEADER, Header, Malformed};

impl Sharing {
    /// The body of a Parse passes.
    fn note_parse(&mut self, body: &[u8]) {
        let text = body.splitn(2, |b| *b == 0).nth(1).unwrap_or_default();
        self.options.parsed(text, self.names.parsed_effect());
    }

    /// A Bind may have passed. `busy`: the answer to a command before it is still to come.
    fn note_bind(&mut self, busy: bool) {
        if let Some((effect, portal)) = self.names.take_bound() {
            self.is_dirty |= self.options.bound(effect, portal, busy);
        }
    }
}

impl Pump {
    /// A message that names a statement, in transaction mode.
    pub(super) fn statement(&mut self, header: Header) -> Result<Step, End> {
        if self.exchange.is_between_exchanges() && !self.exchange.is_quiet() {
            match self.is_for_console(header) {
                // When all before it is answered.
                Some(true) => return Ok(Step::Blocked),
                Some(false) => {}
                None => return Ok(Step::More),
            }
        }
        if !self.leave_console(header) {
            return Ok(Step::More);
        }
        let (Some(sharing), Some(lease)) = (self.sharing.as_deref_mut(), self.link.as_mut()) else {
            return Ok(self.pass(header));
        };
        let whole = HEADER + header.body;
        let at = self.up.parsed;
        if sharing.out.len() >= MAX_OUT {
            return Ok(Step::Blocked);
        }
        // What passes already goes before it.
        let passing = self.up.start..at;
        let most = usize::try_from(self.data.limits.get().max_prepared).unwrap_or(usize::MAX);
        let mut rewritten = Vec::new();
        let mut out = Out { bytes: &mut rewritten, own: &mut sharing.own };
        let bytes = &self.up.bytes()[at..];
        let rewrite = sharing
            .names
            .rewrite(bytes, whole, &mut lease.known, &mut self.data.catalogue.borrow_mut(), most, &mut out)
            .map_err(End::Malformed)?;
        for kind in sharing.own.drain(..) {
            self.exchange.note_own(kind);
        }
        let replaced = match rewrite {
            // What is needed of it comes with the rest of the buffer, of a long Bind too.
            Rewrite::More if whole <= BUFFER || self.up.end - at < BUFFER => return Ok(Step::More),
            Rewrite::More if whole > MAX_TEXT => {
                return Err(End::Malformed(Malformed("a message that names a prepared statement is too long")));
            }
            Rewrite::More => {
                sharing.whole = whole;
                self.begin_to_gather();
                return self.gather();
            }
            Rewrite::Pass => 0,
            Rewrite::Replaced(replaced) => replaced,
        };
        if header.kind == b'P' {
            sharing.note_parse(self.up.bytes().get(at + HEADER..at + whole).unwrap_or_default());
        }
        sharing.note_bind(self.exchange.awaits_command());
        if replaced == 0 && rewritten.is_empty() {
            return Ok(self.pass(header));
        }
        sharing.out.extend_from_slice(&self.up.bytes()[passing]);
        sharing.out.extend_from_slice(&rewritten);
        (self.up.start, self.up.parsed) = (at, at);
        if replaced == 0 {
            return Ok(self.pass(header));
        }
        self.exchange.pass_rewritten(header.kind, whole - replaced);
        self.up.skip_to(at + replaced);
        Ok(Step::Passed)
    }

    /// A statement is longer than the buffer: it is kept aside until it is whole.
    fn begin_to_gather(&mut self) {
        let Some(sharing) = self.sharing.as_mut() else { return };
        let passing = self.up.start..self.up.parsed;
        sharing.out.extend_from_slice(&self.up.bytes()[passing]);
        self.up.start = self.up.parsed;
        sharing.gathered.reserve_exact(sharing.whole);
    }

    /// It passes when it is whole.
    pub(super) fn gather(&mut self) -> Result<Step, End> {
        let (Some(sharing), Some(lease)) = (self.sharing.as_deref_mut(), self.link.as_mut()) else {
            return Ok(Step::More);
        };
        let wanted = sharing.whole - sharing.gathered.len();
        let here = wanted.min(self.up.end - self.up.parsed);
        let at = self.up.parsed;
        sharing.gathered.extend_from_slice(&self.up.bytes()[at..at + here]);
        self.up.skip_to(at + here);
        if sharing.gathered.len() < sharing.whole {
            return Ok(Step::More);
        }
        let gathered = std::mem::take(&mut sharing.gathered);
        let whole = std::mem::take(&mut sharing.whole);
        let most = usize::try_from(self.data.limits.get().max_prepared).unwrap_or(usize::MAX);
        let mut out = Out { bytes: &mut sharing.out, own: &mut sharing.own };
        let (names, catalogue) = (&mut sharing.names, &mut self.data.catalogue.borrow_mut());
        let rewrite = match self.exchange.is_discarding() {
            // An error came meanwhile: PostgreSQL skips this, and it means nothing.
            true => Rewrite::Pass,
            false => {
                names.rewrite(&gathered, whole, &mut lease.known, catalogue, most, &mut out).map_err(End::Malformed)?
            }
        };
        for kind in sharing.own.drain(..) {
            self.exchange.note_own(kind);
        }
        if rewrite == Rewrite::Pass {
            sharing.out.extend_from_slice(&gathered);
        }
        if gathered[0] == b'P' && !self.exchange.is_discarding() {
            sharing.note_parse(&gathered[HEADER..]);
        }
        sharing.note_bind(self.exchange.awaits_command());
        self.exchange.pass_rewritten(gathered[0], 0);
        Ok(Step::Passed)
    }
}
