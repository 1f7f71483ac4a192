//! The pump: bytes both ways between one client and its backend, asking the gate before each forward.
//!
//! One task owns both sockets and polls both directions, so that a pipeline of any length never deadlocks and never
//! grows memory: each direction has one buffer (`serve::flow`). Whole buffers are forwarded; only headers are looked at
//! (`wire::pg::exchange`), and in transaction mode the names of statements (`wire::pg::statements`). There a backend is
//! borrowed when a message begins and given back when nothing is in flight and no transaction is open.
//!
//! What it is NOT: no SQL is parsed, no row is ever read. It decides nothing about the gate and ends no backend that
//! waits for its standby while the gate is open.
//!
//! **Invariants:** [`Pass::passes`] is asked before every write and every flush, for an answer after it was read from
//! PostgreSQL. A success of a session in doubt (R4) is held until `confirm` says the peer has it. A backend is given
//! back only at rest, without a cancel request on its way to it.
//!
//! Over 600 lines: one state machine, whose parts make sense only together.

use super::cancel;
use super::chores;
use super::data::Data;
use super::end::{End, Mode};
use super::flow::{BUFFER, Flow};
use super::gate::{Gate, Pass};
use super::listener::Proxy;
use super::pool::{Lease, Lent, Pool, Settings, Shape, Waiting, add, same_settings};
use super::show;
use super::slot::{Doing, Entry, Order, Slot};
use super::tls::ClientStream;
use crate::wire::pg::options::Options;
use crate::wire::pg::statements::{MAX_TEXT, Names, Out, Rewrite};
use crate::wire::pg::{self, Exchange, HEADER, Header, Look, Malformed, OwnQuery, Refusal, Settled, TERMINATE};
use bytes::{Buf, BufMut, BytesMut};
use std::future::Future;
use std::io::IoSlice;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;
use tokio::time::Sleep;

const _: () = assert!(BUFFER > HEADER + pg::MAX_NOTICE_READ, "a notice to be read must fit");
/// Turns of one poll before other sessions get theirs.
const TURNS: u32 = 16;
/// Rewritten bytes that wait for the backend; while there are more, the client is not read.
const MAX_OUT: usize = 64 * 1024;
/// What became of the client's message at the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Passed,
    /// It may not pass yet.
    Blocked,
    /// More of it must be there first.
    More,
}

/// Messages that are dropped because the client cancelled them.
#[derive(Debug, Clone, Copy)]
struct Skipping {
    /// Bytes of the present one still to come.
    left: usize,
    /// The present one is the last.
    last: bool,
    begun: bool,
}

/// A conversation of the gate's own with the backend (`serve::chores`).
type Chore = Pin<Box<dyn Future<Output = Option<(Lease, Done)>>>>;

/// What a chore was for.
enum Done {
    Tuned,
    Learnt(chores::Learnt),
}

/// What only a client that shares backends has.
struct Sharing {
    names: Names,
    settings: Settings,
    /// What it began with: `application_name`.
    first: Settings,
    /// A setting may have changed that outlives the transaction.
    is_dirty: bool,
    options: Options,
    chore: Option<Chore>,
    /// Bytes of the gate's own or rewritten ones, to go before what passes; and how many of them went.
    out: Vec<u8>,
    out_at: usize,
    own: Vec<u8>,
    /// A statement longer than the buffer, as far as it is there, and its length.
    gathered: Vec<u8>,
    whole: usize,
}

/// One session's two sockets and all its state.
pub(crate) struct Pump {
    client: ClientStream,
    link: Option<Lease>,
    waiting: Option<Waiting>,
    data: Rc<Data>,
    pool: Rc<Pool>,
    pass: Pass,
    entry: Entry,
    mode: Mode,
    shape: Shape,
    exchange: Exchange,
    sharing: Option<Box<Sharing>>,
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
    is_registered: bool,
    /// Nothing more can be read in this poll: whoever sends something wakes us.
    client_asleep: bool,
    backend_asleep: bool,
    busy: bool,
    doing: Doing,
    /// What the client cancelled before it had a backend, and is still to be dropped.
    skipping: Option<Skipping>,
    /// Runs while a client that wants something is held.
    held: Option<Pin<Box<Sleep>>>,
    confirming: Option<Pin<Box<dyn Future<Output = bool>>>>,
    /// Successes before this place in `down` were confirmed.
    confirmed: usize,
    /// At this place in `down` this many bytes of a message were still to come.
    frame: (usize, usize),
}

fn own_has(pairs: &[(String, String)], name: &str) -> bool {
    pairs.iter().any(|(own, _)| own == name)
}

impl Pump {
    #[expect(clippy::too_many_arguments, reason = "everything a session is made of")]
    pub(crate) fn new(
        client: ClientStream,
        data: Rc<Data>,
        pool: Rc<Pool>,
        pass: Pass,
        entry: Entry,
        mode: Mode,
        shape: Shape,
        settings: Settings,
    ) -> Pump {
        let sharing = (mode == Mode::Transaction).then(|| {
            Box::new(Sharing {
                names: Names::new(data.token()),
                first: settings.clone(),
                settings,
                is_dirty: false,
                options: Options::default(),
                chore: None,
                out: Vec::new(),
                out_at: 0,
                own: Vec::new(),
                gathered: Vec::new(),
                whole: 0,
            })
        });
        Pump {
            client,
            link: None,
            waiting: None,
            data,
            pool,
            pass,
            entry,
            mode,
            shape,
            exchange: Exchange::new(b'I'),
            sharing,
            up: Flow::default(),
            down: Flow::default(),
            answer: BytesMut::new(),
            answer_begun: false,
            client_eof: false,
            up_done: false,
            backend_eof: false,
            unflushed: false,
            is_registered: false,
            client_asleep: false,
            backend_asleep: false,
            busy: false,
            doing: Doing::Idle,
            skipping: None,
            held: None,
            confirming: None,
            confirmed: 0,
            frame: (0, 0),
        }
    }

    /// What the client is told first, and the backend it has.
    pub(crate) fn begin(&mut self, greeting: BytesMut, link: Option<Lease>) {
        self.answer = greeting;
        if let Some(lease) = link {
            self.attach(lease);
        }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    pub(crate) fn proxy(&self) -> &Arc<Proxy> {
        &self.data.proxy
    }

    /// The backend, where it may serve another: at rest, and without a cancel request on its way.
    pub(crate) fn take_lease(&mut self) -> Option<Lease> {
        let free = self.exchange.at_rest() && self.down.is_empty() && self.up.is_empty() && !self.backend_eof;
        if free && self.slot().unlink() { self.link.take() } else { None }
    }

    /// What the client set may still stand in the backend that [`Pump::take_lease`] gave.
    pub(crate) fn is_dirty(&self) -> bool {
        self.sharing.as_ref().is_some_and(|sharing| sharing.is_dirty)
    }

    /// The client's stream, and whether an error message may follow what it was sent. The backend is let go of.
    pub(crate) fn into_client(self) -> (ClientStream, bool, Pass) {
        let (from, left) = self.frame;
        let whole = !self.unflushed
            && !self.answer_begun
            && pg::is_between_messages(self.down.bytes(), from, left, self.down.start);
        (self.client, whole, self.pass)
    }

    fn slot(&self) -> &Arc<Slot> {
        &self.entry.slot
    }

    fn gate(&self) -> &Gate {
        &self.entry.gate
    }

    fn attach(&mut self, lease: Lease) {
        self.slot().link(lease.pid, lease.key);
        self.link = Some(lease);
        self.backend_asleep = false;
    }

    /// Drives both directions until the session ends. Cancel-safe: all state is in `self`.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if !self.is_registered {
            // The task, and so its waker, stays the same.
            self.is_registered = true;
            self.slot().register(cx.waker());
        }
        if self.pass.is_over() {
            return Poll::Ready(End::Shut);
        }
        if let Some(order) = self.slot().order()
            && self.obeys(order)
        {
            return Poll::Ready(End::Ordered(order));
        }
        if self.slot().is_asked_to_cancel() && self.busy {
            drop(tokio::task::spawn_local(cancel::forward(Arc::clone(self.slot()))));
        }
        (self.client_asleep, self.backend_asleep) = (false, false);
        for _ in 0..TURNS {
            let progress = match self.turn(cx) {
                Ok(progress) => progress,
                Err(end) => return Poll::Ready(end),
            };
            if !progress {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// An order for the idle counts only while they are.
    fn obeys(&self, order: Order) -> bool {
        let obeys = match order {
            Order::Kill => true,
            Order::Idle => self.doing == Doing::Idle,
            Order::IdleInTransaction => self.doing == Doing::IdleInTransaction,
        };
        if !obeys {
            self.slot().clear_order();
        }
        obeys
    }

    /// One turn of both directions; `Ok(false)`: nothing to do until woken.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.sharing.as_ref().is_some_and(|sharing| sharing.chore.is_some()) {
            return self.poll_chore(cx);
        }
        let up = self.poll_up(cx)?;
        let down = self.poll_down(cx)?;
        let at_rest = self.exchange.at_rest();
        if self.busy == at_rest {
            self.busy = !at_rest;
            self.slot().busy.store(self.busy, Ordering::Relaxed);
        }
        let doing = match () {
            () if self.waiting.is_some() => Doing::Waiting,
            () if at_rest => Doing::Idle,
            () if self.exchange.is_quiet() => Doing::IdleInTransaction,
            () => Doing::Active,
        };
        if doing != self.doing {
            self.doing = doing;
            self.slot().set_doing(doing, self.data.now.get());
        }
        if at_rest && self.down.is_empty() && self.answer.is_empty() && !self.unflushed {
            if self.gate().is_draining() {
                return Err(End::Drained);
            }
            if self.mode == Mode::Transaction && self.link.is_some() && self.let_go() {
                return Ok(true);
            }
        }
        Ok(up || down)
    }

    /// Gives the backend back at a transaction boundary, unless more is to pass and nobody waits. Whether it went.
    fn let_go(&mut self) -> bool {
        let more = !self.up.is_empty() && !self.pool.is_wanted();
        // What is being gathered was promised to this backend.
        let written = self.up.start == self.up.parsed && self.sharing.as_ref().is_none_or(|sharing| sharing.whole == 0);
        let Some(sharing) = self.sharing.as_mut() else { return false };
        if more || !written || !sharing.out.is_empty() || self.backend_eof || self.unflushed || self.client_eof {
            return false;
        }
        if !self.entry.slot.unlink() {
            // It wakes us when it was acted on.
            return false;
        }
        let Some(lease) = self.link.take() else { return false };
        // Nothing is in flight, so no success can be in doubt.
        self.entry.slot.doubt.store(false, Ordering::SeqCst);
        self.down.release();
        (self.confirmed, self.frame) = (0, (0, 0));
        add(&self.pool.stats.transactions, 1);
        if std::mem::take(&mut sharing.is_dirty) {
            let options = sharing.options.take();
            sharing.chore = Some(Box::pin(async move {
                chores::learn(lease, options).await.map(|(lease, changed)| (lease, Done::Learnt(changed)))
            }));
        } else {
            lease.give_back();
        }
        true
    }

    /// The gate's own business with the backend goes first.
    fn poll_chore(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if !self.pass.passes() {
            return Err(End::Shut);
        }
        let Some(sharing) = self.sharing.as_mut() else { return Ok(false) };
        let Some(chore) = sharing.chore.as_mut() else { return Ok(false) };
        let Poll::Ready(done) = chore.as_mut().poll(cx) else { return Ok(false) };
        sharing.chore = None;
        match done {
            Some((lease, Done::Tuned)) => self.attach(lease),
            Some((mut lease, Done::Learnt(changed))) => {
                let made = self.pool.settings(changed.pairs.clone());
                // What it was made then; one that was reset has none.
                lease.settings = made.clone().filter(|_| !changed.is_reset);
                lease.give_back();
                // A RESET leads back to what the client began with, which no backend has of itself.
                let first = sharing.first.iter().flat_map(|pairs| pairs.iter().cloned());
                let mut own = changed.pairs;
                own.extend(first.filter(|(name, _)| !own_has(&own, name)).collect::<Vec<_>>());
                sharing.settings = self.pool.settings(own);
            }
            None => return Err(End::Untuned),
        }
        Ok(true)
    }

    /// Sees to it that there is a backend; `Ok(false)`: not yet.
    fn link_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.link.is_some() {
            return Ok(true);
        }
        let Some(sharing) = self.sharing.as_mut() else { return Err(End::BackendGone) };
        let answer = match &self.waiting {
            Some(waiting) => {
                if self.entry.slot.is_wait_cancelled() {
                    self.waiting = None;
                    self.cancel_wait();
                    return Ok(false);
                }
                waiting.poll(cx)
            }
            None => match self.pool.request(&self.shape, &sharing.settings, &self.pass) {
                Lent::Now(lease) => Poll::Ready(Ok(lease)),
                Lent::Wait(waiting) => {
                    // One of before this wait means nobody.
                    let _ = self.entry.slot.is_wait_cancelled();
                    let answer = waiting.poll(cx);
                    self.waiting = Some(waiting);
                    answer
                }
            },
        };
        let Poll::Ready(answer) = answer else { return Ok(false) };
        self.waiting = None;
        let lease = answer.map_err(|none| End::NoBackend(Box::new(none)))?;
        if same_settings(&lease.settings, &sharing.settings) {
            self.attach(lease);
            return Ok(true);
        }
        let wanted = sharing.settings.clone();
        sharing.chore =
            Some(Box::pin(async move { chores::tune(lease, wanted).await.map(|lease| (lease, Done::Tuned)) }));
        self.poll_chore(cx)?;
        Ok(self.link.is_some())
    }

    /// The client cancelled what waits for a backend: it is told as PostgreSQL would, and goes on.
    fn cancel_wait(&mut self) {
        let refusal = Refusal::new("57014", "canceling statement due to user request")
            .hint("It was waiting for a backend of portcullis (pool.size).");
        // Behind what may still be on its way.
        self.answer.extend_from_slice(&refusal.encode_error());
        let Some(kind) = self.up.bytes().get(self.up.parsed).copied() else { return };
        // A query is one message; extended ones are skipped up to their Sync.
        self.skipping = Some(Skipping { left: 0, last: kind == b'Q' || kind == b'F', begun: false });
    }

    /// Drops what was cancelled before it had a backend. At its end the client is told that it may go on.
    fn skip(&mut self) -> Result<Step, End> {
        let Some(mut skipping) = self.skipping else { return Ok(Step::Passed) };
        loop {
            let here = skipping.left.min(self.up.end - self.up.parsed);
            skipping.left -= here;
            let at = self.up.parsed + here;
            self.up.skip_to(at);
            self.skipping = Some(skipping);
            if skipping.left > 0 {
                return Ok(Step::More);
            }
            if skipping.begun && skipping.last {
                self.skipping = None;
                self.answer.put_slice(&[b'Z', 0, 0, 0, 5, b'I']);
                return Ok(Step::Passed);
            }
            let bytes = &self.up.bytes()[self.up.parsed..];
            let Some(header) = pg::header(bytes).map_err(End::Malformed)? else { return Ok(Step::More) };
            skipping.left = HEADER + header.body;
            skipping.begun = true;
            skipping.last |= header.kind == b'S';
        }
    }

    /// One turn from the client to the backend; `Ok(false)`: nothing to do until woken.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        // Where sessions end at their boundary none begins anything more.
        if self.up_done || (self.gate().is_draining() && self.exchange.at_rest()) {
            return Ok(false);
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
        let sharing = self.sharing.as_ref();
        let statements = sharing.is_some() && !self.exchange.is_discarding();
        loop {
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
            if self.gate().is_paused() || self.pool.database.paused.load(Ordering::Relaxed) {
                // A place in the queue would keep a backend from others.
                self.waiting = None;
                let wait = self.data.limits.get().query_wait;
                let held = self.held.get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
                return if held.as_mut().poll(cx).is_ready() { Err(End::HeldTooLong) } else { Ok(Step::Blocked) };
            }
        }
        self.held = None;
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
                // Behind whatever is still on its way in both directions.
                let out = self.sharing.as_ref().is_none_or(|sharing| sharing.out.is_empty());
                if !self.down.is_empty() || !self.answer.is_empty() || self.up.start < self.up.parsed || !out {
                    return Ok(Step::Blocked);
                }
                self.answer(&own);
                self.up.skip_to(body.end);
                return Ok(Step::Passed);
            }
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
            sharing.is_dirty |= sharing.options.note(body);
        }
        if names_one {
            return self.statement(header);
        }
        Ok(self.pass(header))
    }

    fn pass(&mut self, header: Header) -> Step {
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

    /// A message that names a statement, in transaction mode.
    fn statement(&mut self, header: Header) -> Result<Step, End> {
        let (Some(sharing), Some(lease)) = (self.sharing.as_deref_mut(), self.link.as_mut()) else {
            return Ok(self.pass(header));
        };
        let whole = HEADER + header.body;
        let at = self.up.parsed;
        if header.kind == b'P' {
            let mut body = self.up.bytes()[at + HEADER..].splitn(2, |b| *b == 0);
            sharing.is_dirty |= sharing.options.note(body.nth(1).unwrap_or_default());
        }
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
            Rewrite::Pass if rewritten.is_empty() => return Ok(self.pass(header)),
            Rewrite::Pass => 0,
            Rewrite::Replaced(replaced) => replaced,
        };
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
    fn gather(&mut self) -> Result<Step, End> {
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
        self.exchange.pass_rewritten(gathered[0], 0);
        Ok(Step::Passed)
    }

    fn write_backend(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if !self.pass.passes() {
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
                        if sharing.out.capacity() > MAX_OUT {
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
                return Err(End::ClientGone);
            }
            let left = self.exchange.at_rest() && self.up.is_empty() && self.exchange.client_left() == 0;
            if left && self.mode != Mode::Apart && self.down.is_empty() {
                return Err(End::Finished);
            }
            self.say_goodbye(cx);
            return Ok(!self.up_done);
        }
        if self.unflushed && !self.pass.passes() {
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
        self.up.compact();
        if self.up.end == BUFFER {
            return Ok(false);
        }
        match self.up.poll_read(cx, Pin::new(&mut self.client)) {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(n)) if n > 0 => Ok(true),
            // Half-closed counts as gone: nobody is there to be told that there was no backend.
            Poll::Ready(_) => Err(End::ClientGone),
        }
    }

    /// The client has closed its side: PostgreSQL is told, finishes what it was asked, and closes.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) {
        self.up_done = true;
        let between = self.up.is_empty() && self.exchange.client_left() == 0;
        let Some(lease) = self.link.as_mut() else { return };
        let backend = Pin::new(&mut lease.stream);
        // Five bytes into a socket that took everything before them; if it does not, closing says the same.
        if !between || !self.pass.passes() || !matches!(backend.poll_write(cx, &TERMINATE), Poll::Ready(Ok(5))) {
            let _ = Pin::new(&mut lease.stream).poll_shutdown(cx);
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
            if !self.pass.passes() {
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
                    }
                    self.pass_down(header);
                    if header.kind == b'Z' && self.exchange.is_all_answered() {
                        self.slot().settle_doubt();
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

    /// An answer that may be one to the gate itself (transaction mode).
    fn reply(&mut self, header: Header) {
        let from = self.down.parsed;
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

    /// A command was carried out that may change what outlives its transaction.
    fn note_tag(&mut self, at: usize, length: usize) {
        let tag = &self.down.bytes()[at..at + length];
        let (sets, forgets) = match tag.first() {
            Some(b'S') => (tag == b"SET\0", false),
            Some(b'R') => (tag == b"RESET\0", false),
            Some(b'D') => (tag == b"DISCARD ALL\0", tag == b"DISCARD ALL\0" || tag == b"DEALLOCATE ALL\0"),
            _ => (false, false),
        };
        let Some(sharing) = self.sharing.as_deref_mut() else { return };
        sharing.is_dirty |= sets;
        sharing.options.carried_out(tag);
        if forgets {
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
