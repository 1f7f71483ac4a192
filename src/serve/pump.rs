//! The pump: bytes both ways between one client and one backend, asking the gate before each forward.
//!
//! One task owns both sockets and polls both directions, so that a pipeline of any length never deadlocks and never
//! grows memory: each direction has one buffer, taken from its thread's free list only while bytes are in it. Whole
//! buffers are forwarded; only headers are looked at (`wire::pg::Exchange`).
//!
//! What it is NOT: no SQL, no rewriting, no row is ever read. It decides nothing about the gate and ends no backend
//! that waits for its standby while the gate is open.
//!
//! **Invariants:** [`Pass::passes`] is asked before every write and every flush, for an answer after it was read from
//! PostgreSQL. A success of a session in doubt (R4) is held until `confirm` says the peer has it.

use super::gate::{Gate, Pass, Slot};
use super::listener::Proxy;
use super::show;
use super::tls::ClientStream;
use crate::wire::pg::{self, Exchange, HEADER, Header, Look, Malformed, TERMINATE};
use bytes::{Buf, BytesMut};
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Sleep;

/// Bytes of one direction's buffer; the other side's socket is not read while it is full.
const BUFFER: usize = 16 * 1024;
const _: () = assert!(BUFFER > HEADER + pg::MAX_NOTICE_READ, "a notice to be read must fit");
/// Free buffers a thread keeps; more are given back to the allocator.
const FREE_BUFFERS: usize = 256;
/// Turns of one poll before other sessions get theirs.
const TURNS: u32 = 16;
/// How long a success in doubt is held (R4); then the session ends with "outcome unknown".
const CONFIRM_WAIT: Duration = Duration::from_secs(10);
/// Pause between two questions whether the peer has it.
const CONFIRM_RETRY: Duration = Duration::from_millis(50);

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    ClientGone,
    /// PostgreSQL closed, and all it had said was passed on.
    BackendGone,
    /// The gate passes no more.
    Shut,
    /// At a transaction boundary, while sessions are being ended there.
    Drained,
    /// Held longer than `query_wait`.
    HeldTooLong,
    /// R4: a commit stands here whose wait for the standby was cancelled, and the peer did not confirm it.
    OutcomeUnknown,
    Malformed(Malformed),
}

thread_local!(static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) });

/// One direction: `start..parsed` may pass, `parsed..end` was not yet looked at or is held.
#[derive(Default)]
struct Flow {
    /// Present only while bytes are in it. Never holds bytes of another session beyond `end`.
    buffer: Option<Box<[u8]>>,
    start: usize,
    parsed: usize,
    end: usize,
}

impl Flow {
    fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| &buffer[..self.end])
    }

    fn passing(&self) -> &[u8] {
        &self.bytes()[self.start..self.parsed]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Moves what is left to the front. Returns by how much.
    fn compact(&mut self) -> usize {
        let shift = self.start;
        if shift > 0 {
            if let Some(buffer) = &mut self.buffer {
                buffer.copy_within(shift..self.end, 0);
            }
            (self.start, self.parsed, self.end) = (0, self.parsed - shift, self.end - shift);
        }
        shift
    }

    /// Reads once behind `end`. `Ready(Ok(0))`: end of file (the buffer is never full here).
    fn poll_read(&mut self, cx: &mut Context<'_>, from: Pin<&mut impl AsyncRead>) -> Poll<io::Result<usize>> {
        let buffer = self.buffer.get_or_insert_with(|| {
            FREE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
        });
        let mut into = ReadBuf::new(&mut buffer[self.end..]);
        let read = from.poll_read(cx, &mut into).map_ok(|()| into.filled().len());
        if let Poll::Ready(Ok(n)) = read {
            self.end += n;
        }
        if self.is_empty() {
            self.release();
        }
        read
    }

    fn release(&mut self) {
        (self.start, self.parsed, self.end) = (0, 0, 0);
        if let Some(buffer) = self.buffer.take() {
            FREE.with_borrow_mut(|free| {
                if free.len() < FREE_BUFFERS {
                    free.push(buffer);
                }
            });
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.release();
    }
}

/// One session's two sockets and all its state.
pub(crate) struct Pump {
    client: ClientStream,
    backend: UnixStream,
    proxy: Arc<Proxy>,
    pass: Pass,
    slot: Arc<Slot>,
    exchange: Exchange,
    up: Flow,
    down: Flow,
    /// The gate's own answer, sent before anything else goes down; only made when nothing is under way there.
    answer: BytesMut,
    answer_begun: bool,
    client_eof: bool,
    /// Nothing more goes up: Terminate was sent, or PostgreSQL does not take it.
    up_done: bool,
    backend_eof: bool,
    /// Written to the client but not flushed (TLS).
    unflushed: bool,
    /// Runs while a client that wants something is held.
    held: Option<Pin<Box<Sleep>>>,
    confirming: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
    /// Successes before this place in `down` were confirmed.
    confirmed: usize,
    /// At this place in `down` this many bytes of a message were still to come.
    frame: (usize, usize),
    busy: bool,
}

impl Pump {
    pub(crate) fn new(
        client: ClientStream,
        backend: UnixStream,
        proxy: Arc<Proxy>,
        pass: Pass,
        slot: Arc<Slot>,
        status: u8,
    ) -> Pump {
        Pump {
            client,
            backend,
            proxy,
            pass,
            slot,
            exchange: Exchange::new(status),
            up: Flow::default(),
            down: Flow::default(),
            answer: BytesMut::new(),
            answer_begun: false,
            client_eof: false,
            up_done: false,
            backend_eof: false,
            unflushed: false,
            held: None,
            confirming: None,
            confirmed: 0,
            frame: (0, 0),
            busy: false,
        }
    }

    /// In a transaction or with a request in flight.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    /// The client's stream, and whether an error message may follow what it was sent.
    pub(crate) fn into_client(self) -> (ClientStream, bool) {
        let (from, left) = self.frame;
        let whole = !self.unflushed
            && !self.answer_begun
            && pg::is_between_messages(self.down.bytes(), from, left, self.down.start);
        (self.client, whole)
    }

    /// Drives both directions until the session ends. Cancel-safe: all state is in `self`.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        for _ in 0..TURNS {
            let up = match self.poll_up(cx) {
                Ok(progress) => progress,
                Err(end) => return Poll::Ready(end),
            };
            let down = match self.poll_down(cx) {
                Ok(progress) => progress,
                Err(end) => return Poll::Ready(end),
            };
            let at_rest = self.exchange.at_rest();
            if self.busy == at_rest {
                self.busy = !at_rest;
                self.slot.busy.store(self.busy, Ordering::Relaxed);
            }
            if at_rest && self.gate().is_draining() && self.down.is_empty() && self.answer.is_empty() {
                return Poll::Ready(End::Drained);
            }
            if !up && !down {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn gate(&self) -> &Gate {
        &self.proxy.gate
    }

    /// One turn from the client to the backend; `Ok(false)`: nothing to do until woken.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.up_done {
            return Ok(false);
        }
        if self.up.start < self.up.parsed {
            if !self.pass.passes() {
                return Err(End::Shut);
            }
            return match Pin::new(&mut self.backend).poll_write(cx, self.up.passing()) {
                Poll::Pending => Ok(false),
                Poll::Ready(Ok(n)) if n > 0 => {
                    self.up.start += n;
                    Ok(true)
                }
                // It is closing; what it says about that is still to be read.
                Poll::Ready(_) => {
                    self.up_done = true;
                    Ok(true)
                }
            };
        }
        let (Flow { buffer, end, .. }, parsed) = (&self.up, self.up.parsed);
        let mut at = parsed;
        let bytes = buffer.as_deref().map_or(&[][..], |buffer| &buffer[..*end]);
        let look = self.exchange.look_client(bytes, &mut at).map_err(End::Malformed)?;
        self.up.parsed = at;
        if at > parsed {
            return Ok(true);
        }
        if let Look::Rest(header) = look
            && let Some(result) = self.at_rest(cx, header)
        {
            return result;
        }
        self.read_client(cx)
    }

    /// A client's message begins while nothing is in flight: hold it, answer it, or let it pass. `None`: more of it
    /// must be read first.
    fn at_rest(&mut self, cx: &mut Context<'_>, header: Header) -> Option<Result<bool, End>> {
        if self.gate().is_paused() && self.exchange.at_rest() {
            let wait = self.proxy.options.query_wait;
            let held = self.held.get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
            return Some(if held.as_mut().poll(cx).is_ready() { Err(End::HeldTooLong) } else { Ok(false) });
        }
        self.held = None;
        let body = self.up.parsed + HEADER..self.up.parsed + HEADER + header.body;
        if pg::may_be_own(header) && self.exchange.status() != b'E' {
            let body_bytes = match self.up.bytes().get(body.clone()) {
                Some(bytes) => bytes,
                None if self.client_eof => &[],
                None => return None,
            };
            if pg::own_query(body_bytes).is_some() {
                // Behind whatever is still on its way down.
                if !self.down.is_empty() || !self.answer.is_empty() {
                    return Some(Ok(false));
                }
                let snapshot = Arc::clone(&self.proxy.snapshots.borrow());
                self.answer = show::pool_nodes(&snapshot, self.exchange.status());
                (self.up.start, self.up.parsed) = (body.end, body.end);
                return Some(Ok(true));
            }
        }
        self.exchange.pass_client(header, &mut self.up.parsed);
        Some(Ok(true))
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.client_eof {
            self.say_goodbye(cx);
            return Ok(!self.up_done);
        }
        self.up.compact();
        match self.up.poll_read(cx, Pin::new(&mut self.client)) {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(0)) => {
                self.client_eof = true;
                Ok(true)
            }
            Poll::Ready(Ok(_)) => Ok(true),
            Poll::Ready(Err(_)) => Err(End::ClientGone),
        }
    }

    /// The client has closed its side: PostgreSQL is told, finishes what it was asked, and closes.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) {
        self.up_done = true;
        let between = self.up.is_empty() && self.exchange.client_left() == 0;
        let backend = Pin::new(&mut self.backend);
        // Five bytes into a socket that took everything before them; if it does not, closing says the same.
        if !between || !self.pass.passes() || !matches!(backend.poll_write(cx, &TERMINATE), Poll::Ready(Ok(5))) {
            let _ = Pin::new(&mut self.backend).poll_shutdown(cx);
        }
    }

    /// One turn from the backend to the client; `Ok(false)`: nothing to do until woken.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.down.start < self.down.parsed {
            let written = match self.write_client(cx, false) {
                Poll::Pending => return Ok(false),
                Poll::Ready(written) => written?,
            };
            self.down.start += written;
            return Ok(true);
        }
        if !self.answer.is_empty() {
            return match self.write_client(cx, true) {
                Poll::Pending => Ok(false),
                Poll::Ready(written) => {
                    self.answer.advance(written?);
                    self.answer_begun = !self.answer.is_empty();
                    Ok(true)
                }
            };
        }
        self.frame = (self.down.parsed, self.exchange.backend_left());
        if self.unflushed {
            if !self.pass.passes() {
                return Err(End::Shut);
            }
            match Pin::new(&mut self.client).poll_flush(cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(())) => self.unflushed = false,
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
        if !self.pass.passes() {
            return Poll::Ready(Err(End::Shut));
        }
        let bytes = if own { &self.answer[..] } else { self.down.passing() };
        let written = ready!(Pin::new(&mut self.client).poll_write(cx, bytes));
        self.unflushed = self.client.is_tls();
        Poll::Ready(written.ok().filter(|n| *n > 0).ok_or(End::ClientGone))
    }

    /// Looks at what PostgreSQL said; `true`: something may pass now, or is being confirmed.
    fn examine_backend(&mut self) -> Result<bool, Malformed> {
        let before = self.down.parsed;
        let bytes = self.down.buffer.as_deref().map_or(&[][..], |buffer| &buffer[..self.down.end]);
        let mut at = before;
        let doubtful = loop {
            match self.exchange.look_backend(bytes, &mut at)? {
                Look::Success(_) if self.slot.doubt.load(Ordering::SeqCst) && at >= self.confirmed => break true,
                Look::Success(header) => {
                    self.exchange.pass_backend(header, bytes, &mut at);
                    // Everything asked for was answered, and no cancel request is on its way.
                    let settled = header.kind == b'Z'
                        && self.exchange.is_all_answered()
                        && self.slot.cancels.load(Ordering::SeqCst) == 0;
                    if settled && self.slot.doubt.load(Ordering::Relaxed) {
                        self.slot.doubt.store(false, Ordering::SeqCst);
                    }
                }
                Look::Notice(header) => {
                    if pg::is_sync_wait_given_up(&bytes[at + HEADER..at + HEADER + header.body]) {
                        self.slot.doubt.store(true, Ordering::SeqCst);
                    }
                    self.exchange.pass_backend(header, bytes, &mut at);
                }
                Look::Rest(_) | Look::More => break false,
            }
        };
        self.down.parsed = at;
        if at > before {
            return Ok(true);
        }
        if doubtful && self.confirming.is_none() {
            // What was read before the question is covered by its answer.
            self.confirmed = self.down.end;
            self.confirming = Some(Box::pin(confirm(Arc::clone(&self.proxy))));
            return Ok(true);
        }
        Ok(false)
    }

    fn read_backend(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.backend_eof {
            return Err(End::BackendGone);
        }
        let shift = self.down.compact();
        let read = self.down.poll_read(cx, Pin::new(&mut self.backend));
        self.confirmed = self.confirmed.saturating_sub(shift);
        self.frame.0 = self.frame.0.saturating_sub(shift);
        match read {
            Poll::Pending => Ok(false),
            // A reset comes when PostgreSQL closed with our bytes unread; what it said was read before.
            Poll::Ready(Ok(0) | Err(_)) => {
                self.backend_eof = true;
                Ok(true)
            }
            Poll::Ready(Ok(_)) => Ok(true),
        }
    }
}

/// Asks until the peer has it, or for too long.
async fn confirm(proxy: Arc<Proxy>) -> bool {
    let asking = async {
        while !(proxy.confirm)().await {
            tokio::time::sleep(CONFIRM_RETRY).await;
        }
    };
    tokio::time::timeout(CONFIRM_WAIT, asking).await.is_ok()
}
