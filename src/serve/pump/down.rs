//! From the backend to the client: answers are looked at, swallowed where they are the gate's own, held while a success
//! is in doubt (R4), and passed.
//!
//! **Invariants:** [`Pass::passes`](super::Pass::passes) is asked for an answer after it was read from PostgreSQL,
//! before every write and every flush. A success of a session in doubt is held until `confirm` says the peer has it.

use super::super::cancel;
use super::super::end::End;
use super::super::pool::add;
use super::Pump;
use crate::wire::pg::{self, HEADER, Header, Look, Malformed, Settled};
use bytes::{Buf, BytesMut};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

impl Pump {
    /// One turn from the backend to the client; `Ok(false)`: nothing to do until woken.
    pub(super) fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.down.start < self.down.parsed {
            let written = match self.write_client(cx, false) {
                Poll::Pending => return Ok(false),
                Poll::Ready(written) => written?,
            };
            self.down.start += written;
            add(&self.pool.stats.bytes_out, u64::try_from(written).unwrap_or(0));
            return Ok(true);
        }
        if !self.answer.is_empty() {
            return match self.write_client(cx, true) {
                Poll::Pending => Ok(false),
                Poll::Ready(written) => {
                    self.answer.advance(written?);
                    self.answer_begun = !self.answer.is_empty();
                    if self.answer.is_empty() {
                        self.answer = BytesMut::new();
                    }
                    Ok(true)
                }
            };
        }
        self.frame = (self.down.parsed, self.exchange.backend_left());
        if self.unflushed {
            if !self.passes() {
                return Err(End::Shut);
            }
            match Pin::new(&mut self.client).poll_flush(cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(())) => {
                    self.unflushed = false;
                    return Ok(true);
                }
                Poll::Ready(Err(_)) => return Err(End::ClientGone),
            }
        }
        if let Some(confirming) = &mut self.confirming {
            match confirming.as_mut().poll(cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(false) => return Err(End::OutcomeUnknown),
                Poll::Ready(true) => self.confirming = None,
            }
        }
        if self.examine_backend().map_err(End::Malformed)? {
            return Ok(true);
        }
        self.read_backend(cx)
    }

    fn write_client(&mut self, cx: &mut Context<'_>, own: bool) -> Poll<Result<usize, End>> {
        if !self.passes() {
            return Poll::Ready(Err(End::Shut));
        }
        let bytes = if own { &self.answer[..] } else { self.down.passing() };
        let written = ready!(Pin::new(&mut self.client).poll_write(cx, bytes));
        self.unheard = false;
        self.unflushed = self.client.holds_back();
        Poll::Ready(written.ok().filter(|n| *n > 0).ok_or(End::ClientGone))
    }

    /// Looks at what PostgreSQL said; `true`: something may pass now, or is being confirmed.
    fn examine_backend(&mut self) -> Result<bool, Malformed> {
        let before = (self.down.parsed, self.down.end);
        let replies = self.sharing.is_some();
        let doubtful = loop {
            let mut at = self.down.parsed;
            let look = self.exchange.look_backend(self.down.bytes(), &mut at, replies)?;
            self.down.parsed = at;
            match look {
                Look::Success(header)
                    if self.entry.slot.doubt.load(Ordering::SeqCst)
                        && at >= self.confirmed
                        && !(header.kind == b'Z' && self.exchange.has_failed()) =>
                {
                    break true;
                }
                Look::Success(header) => {
                    if self.sharing.is_some() && header.kind == b'C' {
                        self.note_tag(at + HEADER, header.body);
                    } else if header.kind == b'C' && self.down.bytes()[at + HEADER..].starts_with(b"SET\0") {
                        self.note_set();
                    }
                    self.pass_down(header);
                    if header.kind == b'Z' {
                        self.note_ready();
                    }
                }
                Look::Notice(header) => {
                    if pg::is_sync_wait_given_up(&self.down.bytes()[at + HEADER..at + HEADER + header.body]) {
                        self.entry.slot.doubt.store(true, Ordering::SeqCst);
                    }
                    self.pass_down(header);
                }
                Look::Reply(header) => self.reply(header),
                Look::Rest(_) | Look::Statement(_) | Look::More => break false,
            }
        };
        if (self.down.parsed, self.down.end) != before {
            return Ok(true);
        }
        if doubtful && self.confirming.is_none() {
            // What was read before the question is covered by its answer.
            self.confirmed = self.down.end;
            self.confirming = Some(Box::pin(cancel::confirm(Arc::clone(&self.data.proxy))));
            return Ok(true);
        }
        Ok(false)
    }

    fn pass_down(&mut self, header: Header) -> Settled {
        let mut at = self.down.parsed;
        let settled = self.exchange.pass_backend(header, self.down.bytes(), &mut at);
        self.down.parsed = at;
        settled
    }

    /// ReadyForQuery passed.
    fn note_ready(&mut self) {
        let is_all_answered = self.exchange.is_all_answered();
        if is_all_answered {
            self.slot().settle_doubt();
        }
        let Some(sharing) = self.sharing.as_deref_mut() else { return };
        sharing.options.interrupted();
        if let Some(lease) = self.link.as_mut().filter(|_| is_all_answered) {
            lease.known.settle();
        }
    }

    /// An answer that may be one to the gate itself (transaction mode).
    fn reply(&mut self, header: Header) {
        let from = self.down.parsed;
        if header.kind == b'E' {
            self.note_error(header);
        }
        let settled = self.pass_down(header);
        let Some(sharing) = self.sharing.as_deref_mut() else { return };
        let swallowed = match settled {
            Settled::Parsed => sharing.names.parsed(self.link.as_mut().map(|lease| &mut lease.known)),
            Settled::Closed => sharing.names.closed(),
            Settled::Failed { parses, closes } => {
                if let Some(lease) = self.link.as_mut() {
                    sharing.names.failed(parses, closes, &mut lease.known);
                }
                false
            }
            Settled::Nothing | Settled::Ready => false,
        };
        // ParameterStatus.
        if header.kind == b'S' {
            sharing.is_dirty = true;
        }
        if swallowed && header.body == 0 {
            let to = self.down.parsed;
            self.down.cut(from, to);
            self.down.parsed = from;
            if self.confirmed > from {
                self.confirmed = self.confirmed.saturating_sub(to - from).max(from);
            }
        }
    }

    /// An error comes.
    fn note_error(&mut self, header: Header) {
        let Some(sharing) = self.sharing.as_deref_mut() else { return };
        sharing.options.interrupted();
        let at = self.down.parsed + HEADER;
        if let (Some(body), Some(lease)) = (self.down.bytes().get(at..at + header.body), self.link.as_ref())
            && pg::is_stale_plan(body)
        {
            self.data.catalogue.borrow_mut().outdate(&lease.known.in_use());
        }
    }

    /// A command was carried out that may change what outlives its transaction.
    fn note_tag(&mut self, at: usize, length: usize) {
        let tag = &self.down.bytes()[at..at + length];
        let Some(sharing) = self.sharing.as_deref_mut() else { return };
        sharing.is_dirty |= sharing.options.carried_out(tag, self.exchange.answers_execute());
        if tag == b"DISCARD ALL\0" || tag == b"DEALLOCATE ALL\0" {
            sharing.names.forget_all();
            if let Some(lease) = self.link.as_mut() {
                lease.known.forget_all(&sharing.names);
            }
        }
    }

    fn read_backend(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let Some(lease) = self.link.as_mut() else { return Ok(false) };
        if self.backend_eof {
            return Err(End::BackendGone);
        }
        if self.backend_asleep {
            self.down.release_if_empty();
            return Ok(false);
        }
        let shift = self.down.compact();
        let read = self.down.poll_read(cx, Pin::new(&mut lease.stream));
        self.confirmed = self.confirmed.saturating_sub(shift);
        self.frame.0 = self.frame.0.saturating_sub(shift);
        match read {
            Poll::Pending => {
                self.backend_asleep = true;
                Ok(false)
            }
            // A reset comes when PostgreSQL closed with our bytes unread; what it said was read before.
            Poll::Ready(Ok(0) | Err(_)) => {
                self.backend_eof = true;
                Ok(true)
            }
            Poll::Ready(Ok(_)) => Ok(true),
        }
    }
}
