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
//! The parts: `lend` (when there is a backend), `up` and `down` (the two directions), `statement` (their names),
//! `console` (the gate's own statements), `carry` (a session at a switchover).

mod carry;
mod console;
mod down;
mod lend;
mod statement;
mod up;

pub(crate) use carry::Apart;

use super::cancel;
use super::chores;
use super::data::Data;
use super::end::{End, Mode};
use super::flow::{BUFFER, Flow};
use super::gate::{Gate, Pass};
use super::listener::Proxy;
use super::pool::{Lease, Pool, Settings, Shape, Waiting, add};
use super::session::Resumed;
use super::slot::{Doing, Entry, Order, Slot};
use super::tls::ClientStream;
use crate::base::time::Instant;
use crate::wire::pg::options::Options;
use crate::wire::pg::statements::Names;
use crate::wire::pg::{self, Exchange, HEADER};
use bytes::BytesMut;
use console::Console;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use tokio::time::Sleep;

const _: () = assert!(BUFFER > HEADER + pg::MAX_NOTICE_READ, "a notice to be read must fit");
/// Turns of one poll before other sessions get theirs.
const TURNS: u32 = 16;
/// Rewritten bytes that wait for the backend; while there are more, the client is not read.
const MAX_OUT: usize = 64 * 1024;
/// Room for rewritten bytes that an idle client keeps.
const KEPT_OUT: usize = 1024;
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
    /// In this pause of the gate.
    Surveyed(u64, chores::Survey),
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
    chore: Option<Chore>,
    /// What session mode knows for a switchover.
    baggage: Option<Box<carry::Baggage>>,
    up: Flow,
    down: Flow,
    /// The gate's own answer, sent before anything else goes down; only made when nothing is under way there.
    answer: BytesMut,
    answer_begun: bool,
    /// The client was not told that it is in.
    unheard: bool,
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
    /// The last transaction began with a Parse of the unnamed statement (session mode).
    parses_unnamed: bool,
    doing: Doing,
    /// When the present request, and the present transaction, began.
    began: (Instant, Instant),
    /// What the client cancelled before it had a backend, and is still to be dropped.
    skipping: Option<Skipping>,
    /// What the gate answers itself in the extended protocol; none before it was first asked.
    console: Option<Box<Console>>,
    /// Until the next look whether a client that closed its side, and waits, is still there.
    half_closed: Option<Pin<Box<Sleep>>>,
    /// Runs while a client that wants something is held.
    held: Option<Pin<Box<Sleep>>>,
    confirming: Option<Pin<Box<dyn Future<Output = bool>>>>,
    /// Successes before this place in `down` were confirmed.
    confirmed: usize,
    /// At this place in `down` this many bytes of a message were still to come.
    frame: (usize, usize),
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
            chore: None,
            baggage: None,
            up: Flow::default(),
            down: Flow::default(),
            answer: BytesMut::new(),
            answer_begun: false,
            unheard: false,
            client_eof: false,
            up_done: false,
            backend_eof: false,
            unflushed: false,
            is_registered: false,
            client_asleep: false,
            backend_asleep: false,
            busy: false,
            parses_unnamed: false,
            doing: Doing::Idle,
            began: (Instant::ZERO, Instant::ZERO),
            skipping: None,
            console: None,
            half_closed: None,
            held: None,
            confirming: None,
            confirmed: 0,
            frame: (0, 0),
        }
    }

    /// What the client is told first, and the backend it has.
    pub(crate) fn begin(&mut self, greeting: BytesMut, link: Option<Lease>) {
        self.unheard = !greeting.is_empty();
        self.answer = greeting;
        if let Some(lease) = link {
            self.attach(lease);
        }
    }

    /// The session goes on where the other node left it. Before it is first polled.
    pub(crate) fn resume(&mut self, resumed: Resumed) -> Result<(), pg::Malformed> {
        let names = resumed.settings.iter().flat_map(|pairs| pairs.iter()).map(|(name, _)| name.as_str());
        let Some(sharing) = self.sharing.as_deref_mut() else {
            // For the next switchover: no list shows the customized ones.
            if resumed.settings.is_some() {
                self.baggage.get_or_insert_default().options.adopt(names);
            }
            return Ok(());
        };
        sharing.options.adopt(names);
        sharing.settings = resumed.settings;
        let mut catalogue = self.data.catalogue.borrow_mut();
        // A DEALLOCATE is known by what it takes.
        let (mut last, first): (Vec<_>, Vec<_>) = resumed.statements.iter().partition(|one| one.is_deallocate());
        last.splice(0..0, first);
        last.iter().try_for_each(|one| sharing.names.adopt(&one.name, &one.text, &mut catalogue))
    }

    pub(crate) fn user(&self) -> Arc<str> {
        Arc::clone(&self.slot().user)
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

    /// Asked before every write in either direction. A backend of before a suspension passes nothing any more: what it
    /// said then may not be what PostgreSQL stands by now (R4, R6).
    fn passes(&self) -> bool {
        let is_of_now = |lease: &Lease| lease.suspensions == self.gate().suspensions();
        self.pass.passes() && self.link.as_ref().is_none_or(is_of_now)
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
            let Some(epoch) = self.pass.carried() else { return Poll::Ready(End::Shut) };
            let gone = self.let_go_for_switchover().map(|()| self.is_free());
            return Poll::Ready(match gone {
                Ok(true) => End::Carried(epoch),
                Ok(false) => End::Shut,
                Err(end) => end,
            });
        }
        if let Err(end) = self.let_go_for_switchover() {
            return Poll::Ready(end);
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
                if self.has_begun_to_settle() {
                    continue;
                }
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

    /// What it does changes: a request begins or was answered, and perhaps a transaction. A pipeline is one request.
    fn time(&mut self, next: Doing) {
        if self.doing != Doing::Active && next != Doing::Active {
            return;
        }
        let now = self.gate().now();
        if next == Doing::Active {
            let transaction = if self.doing == Doing::IdleInTransaction { self.began.1 } else { now };
            self.began = (now, transaction);
            return;
        }
        self.data.tally.queries.note(now.since(self.began.0));
        add(&self.pool.stats.queries, 1);
        if next != Doing::IdleInTransaction {
            self.data.tally.transactions.note(now.since(self.began.1));
            add(&self.pool.stats.ended, 1);
        }
    }

    /// One turn of both directions; `Ok(false)`: nothing to do until woken.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.chore.is_some() {
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
            self.time(doing);
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
}
