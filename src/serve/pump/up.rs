//! From the client to the backend: what it sent is looked at, held, answered here, or passed.
//!
//! **Invariant:** [`Pass::passes`](super::Pass::passes) is asked before every write.

use super::super::end::{End, Mode};
use super::super::flow::BUFFER;
use super::super::pool::add;
use super::super::show;
use super::{KEPT_OUT, Pump, Step};
use crate::wire::pg::{self, HEADER, Header, Look, OwnQuery, TERMINATE};
use bytes::BufMut;
use std::future::Future;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::AsyncWrite;

/// Pause between two looks whether a client that closed its side is still there.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Pump {
    /// One turn from the client to the backend; `Ok(false)`: nothing to do until woken.
    pub(super) fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        // Where sessions end at their boundary none begins anything more.
        if self.up_done || (self.gate().is_draining() && self.exchange.at_rest()) {
            return Ok(false);
        }
        // Who has not been told that it is in may begin anew elsewhere, so that nothing of it passes before.
        if self.unheard {
            let waits = self.waiting.is_some() || self.held.is_some();
            return if waits { self.look_after_waiting(cx) } else { Ok(false) };
        }
        // As much as there is goes in one write: all that is here is looked at first.
        let step = self.look_up(cx)?;
        let own = self.sharing.as_ref().is_some_and(|sharing| !sharing.out.is_empty());
        match step {
            _ if own || self.up.start < self.up.parsed => self.write_backend(cx),
            Step::Passed => Ok(true),
            // Who waits may leave.
            Step::Blocked if self.waiting.is_some() || self.held.is_some() => self.look_after_waiting(cx),
            Step::Blocked => Ok(false),
            Step::More => self.read_client(cx),
        }
    }

    /// Looks at what the client sent, as far as it may pass.
    fn look_up(&mut self, cx: &mut Context<'_>) -> Result<Step, End> {
        let sharing = self.sharing.as_ref();
        if sharing.is_some_and(|sharing| sharing.whole > 0) {
            return self.gather();
        }
        if self.skipping.is_some() {
            let step = self.skip()?;
            if step != Step::Passed {
                return Ok(step);
            }
        }
        loop {
            if self.is_at_console() {
                let step = self.converse()?;
                if step != Step::Passed {
                    return Ok(step);
                }
            }
            let watches =
                self.sharing.is_some() || self.console.as_ref().is_some_and(|console| console.has_statements());
            let statements = watches && !self.exchange.is_discarding();
            let mut at = self.up.parsed;
            let look = self.exchange.look_client(self.up.bytes(), &mut at, statements).map_err(End::Malformed)?;
            self.up.parsed = at;
            let step = match look {
                Look::Rest(header) => self.at_rest(cx, header)?,
                Look::Statement(header) => self.statement(header)?,
                _ => Step::More,
            };
            if step != Step::Passed {
                return Ok(step);
            }
        }
    }

    /// A client's message begins while nothing is in flight: hold it, answer it, or let it pass.
    fn at_rest(&mut self, cx: &mut Context<'_>, header: Header) -> Result<Step, End> {
        if self.exchange.at_rest() {
            if header.kind == b'X'
                && self.mode != Mode::Apart
                && self.down.is_empty()
                && self.up.start == self.up.parsed
            {
                self.up.skip_to(self.up.end);
                return Err(End::Finished);
            }
            if self.is_held() {
                // A place in the queue would keep a backend from others.
                self.waiting = None;
                let wait = self.data.limits.get().query_wait;
                let held = self.held.get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
                return if held.as_mut().poll(cx).is_ready() { Err(End::HeldTooLong) } else { Ok(Step::Blocked) };
            }
        }
        self.held = None;
        if self.mode == Mode::Session {
            self.note_statement(header);
        }
        // The request may have taken longer than what it cancelled.
        self.slot().settle_doubt();
        if let Some(sharing) = self.sharing.as_mut().filter(|_| self.exchange.at_rest()) {
            sharing.options.begin();
        }
        if pg::may_be_own(header) && self.exchange.status() != b'E' {
            let body = self.up.parsed + HEADER..self.up.parsed + HEADER + header.body;
            let Some(bytes) = self.up.bytes().get(body.clone()) else {
                return if self.client_eof { Err(End::ClientGone) } else { Ok(Step::More) };
            };
            if let Some(own) = pg::own_query(bytes).filter(|own| self.answers(own)) {
                if !self.is_clear() {
                    return Ok(Step::Blocked);
                }
                let _ = self.leave_console(header);
                self.answer(&own);
                self.up.skip_to(body.end);
                return Ok(Step::Passed);
            }
        }
        match self.is_for_console(header) {
            Some(true) if self.is_clear() => {
                self.open_console();
                return Ok(Step::Passed);
            }
            Some(true) => return Ok(Step::Blocked),
            Some(false) => {}
            None => return if self.client_eof { Err(End::ClientGone) } else { Ok(Step::More) },
        }
        let whole = HEADER + header.body;
        let names_one = self.mode == Mode::Transaction && matches!(header.kind, b'P' | b'B' | b'D' | b'C');
        if names_one && self.up.end - self.up.parsed < whole.min(BUFFER) {
            // Whole first: two clients of half a message each would only hand a backend to and fro.
            return if self.client_eof { Err(End::ClientGone) } else { Ok(Step::More) };
        }
        if !self.link_up(cx)? {
            return Ok(Step::Blocked);
        }
        let body = self.up.bytes().get(self.up.parsed + HEADER..).unwrap_or_default();
        let statement = match header.kind {
            b'Q' => body,
            b'P' => body.splitn(2, |b| *b == 0).nth(1).unwrap_or_default(),
            _ => &[],
        };
        if let Some(database) = pg::wanted_alone(statement) {
            self.proxy().let_alone(&database);
        }
        if header.kind == b'Q'
            && let (Some(sharing), Some(lease)) = (self.sharing.as_mut(), self.link.as_mut())
        {
            sharing.names.simple_query(&mut lease.known);
            let text = &body[..body.len().min(header.body)];
            sharing.is_dirty |= sharing.options.query(text, text.len() == header.body);
        }
        if names_one {
            return self.statement(header);
        }
        if !self.leave_console(header) {
            return Ok(Step::More);
        }
        Ok(self.pass(header))
    }

    /// Nothing is on its way in either direction, so that the gate may answer.
    fn is_clear(&self) -> bool {
        let out = self.sharing.as_ref().is_none_or(|sharing| sharing.out.is_empty());
        self.down.is_empty() && self.answer.is_empty() && self.up.start == self.up.parsed && out
    }

    pub(super) fn pass(&mut self, header: Header) -> Step {
        self.exchange.pass_client(header, &mut self.up.parsed);
        Step::Passed
    }

    fn answers(&self, own: &OwnQuery) -> bool {
        match own {
            OwnQuery::Show(_) => true,
            OwnQuery::Deallocate(name) => {
                self.sharing.as_ref().is_some_and(|sharing| sharing.names.has(name.as_bytes()))
            }
        }
    }

    fn answer(&mut self, own: &OwnQuery) {
        match own {
            OwnQuery::Show(what) => {
                self.answer = show::answer(*what, self.proxy(), &self.slot().user, self.exchange.status());
            }
            OwnQuery::Deallocate(name) => {
                if let Some(sharing) = self.sharing.as_mut() {
                    sharing.names.forget(name.as_bytes());
                }
                self.answer.put_slice(b"C\0\0\0\x0fDEALLOCATE\0");
                self.answer.put_slice(&[b'Z', 0, 0, 0, 5, self.exchange.status()]);
            }
        }
    }

    fn write_backend(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if !self.passes() {
            return Err(End::Shut);
        }
        let Some(lease) = self.link.as_mut() else { return Err(End::BackendGone) };
        let backend = Pin::new(&mut lease.stream);
        let mut sharing = self.sharing.as_deref_mut();
        let own = sharing.as_ref().map_or(&[][..], |sharing| &sharing.out[sharing.out_at..]);
        let written = if own.is_empty() {
            backend.poll_write(cx, self.up.passing())
        } else {
            backend.poll_write_vectored(cx, &[IoSlice::new(own), IoSlice::new(self.up.passing())])
        };
        match written {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(n)) if n > 0 => {
                add(&self.pool.stats.bytes_in, u64::try_from(n).unwrap_or(0));
                let of_own = n.min(own.len());
                if let Some(sharing) = sharing.as_mut().filter(|_| of_own > 0) {
                    sharing.out_at += of_own;
                    if sharing.out_at == sharing.out.len() {
                        // Given back when large: an idle session is small.
                        if sharing.out.capacity() > KEPT_OUT {
                            sharing.out = Vec::new()
                        } else {
                            sharing.out.clear()
                        }
                        sharing.out_at = 0;
                    }
                }
                self.up.start += n - of_own;
                Ok(true)
            }
            // It is closing; what it says about that is still to be read.
            Poll::Ready(_) => {
                self.up_done = true;
                Ok(true)
            }
        }
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.client_eof {
            if self.link.is_none() {
                // It may still be there for its last answer.
                let all_told = self.answer.is_empty() && self.down.is_empty() && !self.unflushed;
                return if all_told { Err(End::ClientGone) } else { Ok(false) };
            }
            let left = self.exchange.at_rest() && self.up.is_empty() && self.exchange.client_left() == 0;
            let all_told = self.answer.is_empty() && self.down.is_empty() && !self.unflushed;
            if left && self.mode != Mode::Apart && !all_told {
                return Ok(false);
            }
            if left && self.mode != Mode::Apart {
                return Err(End::Finished);
            }
            self.say_goodbye(cx);
            return Ok(!self.up_done);
        }
        if self.unflushed && !self.passes() {
            // TLS that fails to read writes what it still has.
            return Err(End::Shut);
        }
        if self.client_asleep {
            self.up.release_if_empty();
            return Ok(false);
        }
        self.up.compact();
        match self.up.poll_read(cx, Pin::new(&mut self.client)) {
            Poll::Pending => {
                self.client_asleep = true;
                Ok(false)
            }
            Poll::Ready(Ok(0)) => {
                self.client_eof = true;
                Ok(true)
            }
            Poll::Ready(Ok(_)) => Ok(true),
            Poll::Ready(Err(_)) => Err(End::ClientGone),
        }
    }

    /// Reads on while the client is held or waits for a backend, as far as there is room: one that is gone leaves.
    fn look_after_waiting(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.client_eof {
            return self.look_after_half_closed(cx);
        }
        self.up.compact();
        if self.up.end == BUFFER {
            return Ok(false);
        }
        match self.up.poll_read(cx, Pin::new(&mut self.client)) {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(n)) if n > 0 => Ok(true),
            // Who takes its leave waits for nothing.
            Poll::Ready(Ok(_)) if !self.up.bytes().ends_with(&TERMINATE) => {
                self.client_eof = true;
                // Somebody who only closed its side takes this. Nobody does where there is nobody, and the other host
                // says so.
                // Nothing passes a gate that is shut, and nothing may come into the middle of a message.
                if self.passes() && self.exchange.backend_left() == 0 {
                    pg::put_notice("portcullis: still waiting for a backend, or held by a pause", &mut self.answer);
                }
                Ok(true)
            }
            Poll::Ready(_) => Err(End::ClientGone),
        }
    }

    /// The client closed its side while it waits: it may want its answer, or be gone.
    fn look_after_half_closed(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        loop {
            let pause = self.half_closed.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_AGAIN)));
            if pause.as_mut().poll(cx).is_pending() {
                return Ok(false);
            }
            self.half_closed = None;
            if self.client.was_reset() {
                return Err(End::ClientGone);
            }
        }
    }

    /// The client has closed its side: PostgreSQL is told, finishes what it was asked, and closes.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) {
        self.up_done = true;
        let between = self.up.is_empty() && self.exchange.client_left() == 0;
        let passes = self.passes();
        let Some(lease) = self.link.as_mut() else { return };
        let backend = Pin::new(&mut lease.stream);
        // Five bytes into a socket that took everything before them; if it does not, closing says the same.
        if !between || !passes || !matches!(backend.poll_write(cx, &TERMINATE), Poll::Ready(Ok(5))) {
            let _ = Pin::new(&mut lease.stream).poll_shutdown(cx);
        }
    }
}
