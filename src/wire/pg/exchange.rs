//! Where a session stands: which answers are still to come, from the headers that passed in both directions.
//!
//! What it is NOT: it moves no bytes and knows no statement's name; it says where messages begin and what each answers.
//!
//! **Invariants:** arbitrary bytes never panic. The ledger is run-length coded and holds what is in flight, which the
//! sockets bound; [`Exchange::at_rest`] is true only when nothing is in flight in either direction and no transaction
//! is open.

use super::{HEADER, Header, MAX_NOTICE_READ, MAX_OWN_QUERY, Malformed, header};
use std::collections::VecDeque;

/// What stands at the front of the bytes not yet looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Everything was looked at and may pass, or the rest is too short to tell.
    More,
    /// Client side, nothing in flight: a message begins. The caller holds it, answers it, or lets it pass.
    Rest(Header),
    /// Client side: Parse, Bind, Describe, or Close, where asked for, and a short Parse that begins an exchange. The
    /// caller lets it pass, holds or rewrites it.
    Statement(Header),
    /// Backend side: a message that acknowledges (CommandComplete, ReadyForQuery), complete. The caller holds it or
    /// lets it pass.
    Success(Header),
    /// Backend side: a notice short enough to be read, complete. The caller lets it pass.
    Notice(Header),
    /// Backend side: a message the caller may have to act on or to swallow; its header is complete, and so is an error
    /// short enough to be read.
    Reply(Header),
}

/// What a backend's message settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Nothing,
    /// A Parse succeeded.
    Parsed,
    /// A Close succeeded.
    Closed,
    /// An error: so many Parse and Close messages were not carried out.
    Failed {
        parses: u32,
        closes: u32,
    },
    /// ReadyForQuery.
    Ready,
}

/// What is waited for. `CopyEnd` is answered by nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Parse,
    Bind,
    Describe,
    Execute,
    Close,
    CopyEnd,
    /// Query or FunctionCall.
    Query,
    Sync,
}

/// Messages in flight in the order they were sent, equal neighbours counted. The first run lies outside of the queue,
/// so that the simple protocol allocates nothing.
#[derive(Debug, Clone, Default)]
struct Ledger {
    first: Option<(Awaited, u32)>,
    rest: VecDeque<(Awaited, u32)>,
}

impl Ledger {
    fn push(&mut self, awaited: Awaited) {
        let last = if self.rest.is_empty() { self.first.as_mut() } else { self.rest.back_mut() };
        match last {
            Some((kind, count)) if *kind == awaited && *count < u32::MAX => *count += 1,
            Some(_) => self.rest.push_back((awaited, 1)),
            None => self.first = Some((awaited, 1)),
        }
    }

    fn front(&self) -> Option<Awaited> {
        self.first.map(|(kind, _)| kind)
    }

    fn pop(&mut self) {
        match &mut self.first {
            Some((_, count)) if *count > 1 => *count -= 1,
            _ => self.first = self.rest.pop_front(),
        }
    }

    /// Pops the front when it is this.
    fn settle(&mut self, awaited: Awaited) -> bool {
        let is = self.front() == Some(awaited);
        if is {
            self.pop();
        }
        is
    }

    /// Marks that were reached.
    fn skip_copy_ends(&mut self) {
        while self.settle(Awaited::CopyEnd) {}
    }

    /// Drops all up to the next Sync; what was dropped, and whether there was a Sync.
    fn drop_to_sync(&mut self) -> (u32, u32, bool) {
        let (mut parses, mut closes) = (0, 0);
        while let Some((kind, count)) = self.first {
            match kind {
                Awaited::Sync => return (parses, closes, true),
                Awaited::Parse => parses += count,
                Awaited::Close => closes += count,
                _ => {}
            }
            self.first = self.rest.pop_front();
        }
        (parses, closes, false)
    }

    /// The server began to read COPY data: it reads Syncs as part of that, up to the end of the data. Whether the end
    /// is already on its way.
    fn swallow_syncs(&mut self) -> bool {
        let mut kept = VecDeque::new();
        let mut ended = false;
        for (kind, count) in std::mem::take(&mut self.rest) {
            match kind {
                Awaited::CopyEnd if !ended => {
                    ended = true;
                    // This one is used up.
                    if count > 1 {
                        kept.push_back((kind, count - 1));
                    }
                }
                Awaited::Sync if !ended => {}
                _ => kept.push_back((kind, count)),
            }
        }
        self.rest = kept;
        ended
    }
}

/// Where a session stands, from the headers that passed in both directions.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Body bytes of the client's present message still to come.
    client_left: usize,
    /// Body bytes of the backend's present message still to come.
    backend_left: usize,
    /// Transaction status of the last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    ledger: Ledger,
    /// Extended-protocol messages passed since the last Sync.
    unsynced: bool,
    /// The server discards everything up to the next Sync, which was not sent yet.
    discarding: bool,
    /// The backend reads COPY data.
    copy_in: bool,
    /// The last that was settled is an error.
    failed: bool,
    /// A Bind or a Query passed since the last Parse.
    bound: bool,
}

impl Exchange {
    /// After the login, whose last message was a ReadyForQuery with this status.
    pub fn new(status: u8) -> Exchange {
        Exchange {
            client_left: 0,
            backend_left: 0,
            status,
            ledger: Ledger::default(),
            unsynced: false,
            discarding: false,
            copy_in: false,
            failed: false,
            bound: true,
        }
    }

    /// Nothing in flight in either direction, though perhaps in a transaction.
    pub fn is_quiet(&self) -> bool {
        self.is_all_answered() && self.client_left == 0 && self.backend_left == 0
    }

    /// At a transaction boundary.
    pub fn at_rest(&self) -> bool {
        self.status == b'I' && self.is_quiet()
    }

    /// The client has asked for nothing that was not answered to its end.
    pub fn is_all_answered(&self) -> bool {
        self.ledger.first.is_none() && !self.unsynced && !self.copy_in && !self.discarding
    }

    /// The answer to a command (Query, Execute) is still to come.
    pub fn awaits_command(&self) -> bool {
        let runs = self.ledger.first.iter().chain(&self.ledger.rest);
        runs.into_iter().any(|(kind, _)| matches!(kind, Awaited::Query | Awaited::Execute))
    }

    /// A Bind or a Query passed since the last Parse: that was for more than to be described.
    pub fn is_bound(&self) -> bool {
        self.bound
    }

    /// What PostgreSQL answers next is an Execute.
    pub fn answers_execute(&self) -> bool {
        self.ledger.front() == Some(Awaited::Execute)
    }

    /// What the client sends next begins an exchange, whose answers may come behind those of others.
    pub fn is_between_exchanges(&self) -> bool {
        !self.unsynced && !self.copy_in && !self.discarding
    }

    /// The server discards what the client sends, up to the next Sync.
    pub fn is_discarding(&self) -> bool {
        self.discarding
    }

    /// The backend's last acknowledgement or error was an error: a ReadyForQuery now acknowledges no commit.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Transaction status of the last ReadyForQuery.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Body bytes of the backend's present message still to come.
    pub fn backend_left(&self) -> usize {
        self.backend_left
    }

    /// Body bytes of the client's present message still to come.
    pub fn client_left(&self) -> usize {
        self.client_left
    }

    /// Looks at the client's bytes from `*at` on and moves `*at` over what may pass. With `statements` it stops at
    /// every message that names a prepared statement.
    pub fn look_client(&mut self, bytes: &[u8], at: &mut usize, statements: bool) -> Result<Look, Malformed> {
        loop {
            skip(&mut self.client_left, bytes, at);
            if self.client_left > 0 {
                return Ok(Look::More);
            }
            let Some(header) = header(&bytes[*at..])? else { return Ok(Look::More) };
            // PostgreSQL ends the session for any other (SocketBackend in postgres.c).
            if !b"QFPBDECHSXdcf".contains(&header.kind) {
                return Err(Malformed("invalid frontend message type"));
            }
            if self.is_quiet() {
                return Ok(Look::Rest(header));
            }
            let begins = header.kind == b'P' && header.body <= MAX_OWN_QUERY && self.is_between_exchanges();
            if begins || statements && matches!(header.kind, b'P' | b'B' | b'D' | b'C') {
                return Ok(Look::Statement(header));
            }
            self.pass_client(header, at);
        }
    }

    /// Lets the client's message at `*at` pass.
    pub fn pass_client(&mut self, header: Header, at: &mut usize) {
        *at += HEADER;
        self.client_left = header.body;
        self.note_client(header.kind);
    }

    /// Takes note of a message of `kind` on its way to the backend; what is left of its body passes from here on.
    pub fn pass_rewritten(&mut self, kind: u8, body_left: usize) {
        self.client_left = body_left;
        self.note_client(kind);
    }

    /// Takes note of a message of the gate's own on its way to the backend.
    pub fn note_own(&mut self, kind: u8) {
        self.note_client(kind);
    }

    fn note_client(&mut self, kind: u8) {
        let awaited = match kind {
            // Sync; one that comes while the backend reads COPY data is ignored by it (chapter 55.2.6).
            b'S' if self.copy_in => return,
            b'S' => {
                (self.unsynced, self.discarding) = (false, false);
                Awaited::Sync
            }
            // CopyDone, CopyFail. Where the data was not asked for yet, its end is noted for when it is.
            b'c' | b'f' if self.copy_in => {
                self.copy_in = false;
                return;
            }
            b'c' | b'f' => Awaited::CopyEnd,
            // Query, FunctionCall.
            b'Q' | b'F' => {
                self.bound = true;
                Awaited::Query
            }
            b'P' => {
                self.bound = false;
                Awaited::Parse
            }
            b'B' => {
                self.bound = true;
                Awaited::Bind
            }
            b'D' => Awaited::Describe,
            b'E' => Awaited::Execute,
            b'C' => Awaited::Close,
            _ => return,
        };
        if self.discarding {
            return;
        }
        match awaited {
            // It ends the transaction that extended messages before it began (exec_simple_query in postgres.c).
            Awaited::Query => self.unsynced = false,
            Awaited::Sync | Awaited::CopyEnd => {}
            _ => self.unsynced = true,
        }
        if awaited == Awaited::CopyEnd && self.ledger.first.is_none() {
            return;
        }
        self.ledger.push(awaited);
    }

    /// Looks at the backend's bytes from `*at` on and moves `*at` over what may pass. With `replies` it stops at every
    /// message that may concern a statement of the gate's own or a setting.
    pub fn look_backend(&mut self, bytes: &[u8], at: &mut usize, replies: bool) -> Result<Look, Malformed> {
        loop {
            skip(&mut self.backend_left, bytes, at);
            if self.backend_left > 0 {
                return Ok(Look::More);
            }
            let Some(header) = header(&bytes[*at..])? else { return Ok(Look::More) };
            let complete = bytes.len() - *at >= HEADER + header.body;
            match header.kind {
                // Real ones are below a hundred bytes; a longer one cannot be waited for in a bounded buffer.
                b'C' | b'Z' if header.body <= MAX_NOTICE_READ => {
                    return Ok(if complete { Look::Success(header) } else { Look::More });
                }
                b'C' | b'Z' => return Err(Malformed("a command tag of the backend is too long")),
                b'N' if header.body <= MAX_NOTICE_READ => {
                    return Ok(if complete { Look::Notice(header) } else { Look::More });
                }
                // An error is read as a notice is.
                b'E' if replies && header.body <= MAX_NOTICE_READ && !complete => return Ok(Look::More),
                b'1' | b'3' | b'E' | b'S' if replies => return Ok(Look::Reply(header)),
                _ => {
                    self.pass_backend(header, bytes, at);
                }
            }
        }
    }

    /// Lets the backend's message at `*at` pass; `bytes` as in [`Exchange::look_backend`]. What it settled.
    pub fn pass_backend(&mut self, header: Header, bytes: &[u8], at: &mut usize) -> Settled {
        *at += HEADER;
        self.backend_left = header.body;
        self.ledger.skip_copy_ends();
        match header.kind {
            b'E' => self.failed = true,
            b'C' | b'Z' => self.failed = false,
            _ => {}
        }
        let settled = self.settle(header.kind, bytes.get(*at).copied());
        self.ledger.skip_copy_ends();
        settled
    }

    fn settle(&mut self, kind: u8, first: Option<u8>) -> Settled {
        match kind {
            b'Z' => {
                self.status = first.unwrap_or(b'E');
                while let Some(front) = self.ledger.front() {
                    self.ledger.pop();
                    if matches!(front, Awaited::Query | Awaited::Sync) {
                        break;
                    }
                }
                self.copy_in = false;
                Settled::Ready
            }
            b'1' if self.ledger.settle(Awaited::Parse) => Settled::Parsed,
            b'3' if self.ledger.settle(Awaited::Close) => Settled::Closed,
            b'2' => self.done(Awaited::Bind),
            // RowDescription, NoData: after a ParameterDescription too.
            b'T' | b'n' => self.done(Awaited::Describe),
            // CommandComplete, EmptyQueryResponse, PortalSuspended.
            b'C' | b'I' | b's' => {
                self.copy_in = false;
                self.done(Awaited::Execute)
            }
            b'E' => {
                self.copy_in = false;
                if self.ledger.front() == Some(Awaited::Query) {
                    return Settled::Failed { parses: 0, closes: 0 };
                }
                let asked = self.ledger.front().is_some() || self.unsynced;
                let (parses, closes, sync) = self.ledger.drop_to_sync();
                // One that came unasked (a server that shuts down) is followed by nothing.
                self.discarding = !sync && asked;
                Settled::Failed { parses, closes }
            }
            // CopyInResponse: what follows in the client's stream is read as COPY data, Syncs are swallowed.
            b'G' => {
                let syncs = self.ledger.rest.iter().any(|(kind, _)| *kind == Awaited::Sync);
                self.copy_in = !self.ledger.swallow_syncs();
                self.unsynced |= syncs && self.copy_in && self.ledger.front() == Some(Awaited::Execute);
                Settled::Nothing
            }
            _ => Settled::Nothing,
        }
    }

    fn done(&mut self, awaited: Awaited) -> Settled {
        self.ledger.settle(awaited);
        Settled::Nothing
    }
}

fn skip(left: &mut usize, bytes: &[u8], at: &mut usize) {
    let step = (*left).min(bytes.len() - *at);
    *at += step;
    *left -= step;
}
