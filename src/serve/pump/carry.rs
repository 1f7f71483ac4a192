//! A session at a switchover: come to rest, looked into, without a backend, and taken apart for the other node.
//!
//! What it is NOT: it opens no tunnel (`serve::forward`), and nothing of a client passes here.
//!
//! **Invariants:** a session says that it has come to rest only when nothing of it is in flight and it begins nothing
//! more in that pause. Taken apart is only who has no backend, with a message of the client's at the front or nothing.

use super::super::backend::Proof;
use super::super::chores::{self, Survey};
use super::super::data::Data;
use super::super::end::{End, Mode};
use super::super::gate::Pass;
use super::super::pool::{Lent, Pairs};
use super::super::session::BOUND_HERE;
use super::super::tls::ClientStream;
use super::{Done, Pump};
use crate::base::ids::Epoch;
use crate::wire::pg::options::{Effect, Options};
use crate::wire::pg::statements::Names;
use crate::wire::pg::{HEADER, Header, Startup};
use crate::wire::tunnel::{Carried, Prepared, Proven};
use bytes::Bytes;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

/// What a client with a backend of its own had there, to be made again with another.
#[derive(Default)]
pub(super) struct Kept {
    settings: Pairs,
    statements: Vec<Prepared>,
}

/// What session mode has to know of a session for the day of a switchover.
#[derive(Default)]
pub(super) struct Baggage {
    /// Customized options, as far as its statements show them.
    pub(super) options: Options,
    /// Looked into in this pause of the gate, and nothing passed since.
    survey: Option<(u64, Survey)>,
    /// It has no backend now.
    kept: Option<Kept>,
}

/// A session without its pump.
pub(crate) struct Apart {
    pub(crate) client: ClientStream,
    /// What the client has sent already.
    pub(crate) early: Vec<u8>,
    pub(crate) carried: Carried,
    pub(crate) pass: Pass,
}

impl Pump {
    /// A message of the client's begins a transaction (session mode): what it sets that no list shows, and whether it
    /// parses the unnamed statement and leaves its Bind for later.
    pub(super) fn note_statement(&mut self, header: Header) {
        if let Some(baggage) = &mut self.baggage {
            baggage.survey = None;
        }
        let rest = self.up.bytes().get(self.up.parsed + HEADER..).unwrap_or_default();
        let body = &rest[..rest.len().min(header.body)];
        self.parses_unnamed = header.kind == b'P' && body.first() == Some(&0);
        let (text, is_query) = match header.kind {
            b'Q' => (body, true),
            b'P' => (body.splitn(2, |b| *b == 0).nth(1).unwrap_or_default(), false),
            _ => return,
        };
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        let begins = self.exchange.at_rest();
        let mut options = self.baggage.as_mut().map(|b| std::mem::take(&mut b.options)).unwrap_or_default();
        if begins {
            options.begin();
        }
        if is_query {
            options.query(text, body.len() == header.body);
        } else {
            let effect = Effect::of(text);
            options.parsed(text, effect);
            if effect.calls || effect.is_local {
                options.bound(effect, false, !begins);
            }
        }
        if self.baggage.is_some() || options.has_noted() {
            self.baggage.get_or_insert_default().options = options;
        }
    }

    /// A SET was carried out (session mode).
    pub(super) fn note_set(&mut self) {
        let by_execute = self.exchange.answers_execute();
        self.baggage.get_or_insert_default().options.carried_out(b"SET\0", by_execute);
    }

    /// The unnamed statement was parsed, and a Bind of it may be the client's next message.
    fn is_half_prepared(&self) -> bool {
        self.mode == Mode::Session && self.parses_unnamed && !self.exchange.is_bound()
    }

    /// Whether the client's next message waits in this pause.
    pub(super) fn is_held(&self) -> bool {
        let gate = self.gate();
        let paused = gate.is_paused() || self.pool.database.paused.load(Ordering::Relaxed);
        gate.is_suspended() || (paused && !(gate.is_to_carry() && self.is_half_prepared()))
    }

    /// Nothing is under way in either direction, and nothing of the gate's own.
    fn is_quiet(&self) -> bool {
        let nothing_goes =
            self.down.is_empty() && self.answer.is_empty() && !self.unflushed && self.confirming.is_none();
        let nothing_comes = self.up.start == self.up.parsed && self.skipping.is_none() && !self.is_at_console();
        let shares = self.sharing.as_ref().is_none_or(|sharing| sharing.out.is_empty() && sharing.whole == 0);
        self.exchange.at_rest() && nothing_goes && nothing_comes && shares && self.chore.is_none()
    }

    /// In a pause: says so when the session has come to rest; for a switchover it is looked into first.
    /// `true`: there is something to do first.
    pub(super) fn has_begun_to_settle(&mut self) -> bool {
        let hold = self.gate().hold();
        if !self.gate().is_paused() || self.slot().settled() == hold {
            return false;
        }
        if self.mode != Mode::Apart {
            if !self.is_quiet() || (self.mode == Mode::Transaction && self.link.is_some()) {
                return false;
            }
            if self.mode == Mode::Session && self.gate().is_to_carry() && self.link.is_some() {
                if self.is_half_prepared() {
                    return false;
                }
                let surveyed = self.baggage.as_ref().and_then(|b| b.survey.as_ref());
                if surveyed.is_none_or(|(of, _)| *of != hold) {
                    return self.begin_survey();
                }
            }
        }
        self.slot().settle(hold);
        false
    }

    /// Asks the backend what the session has there.
    fn begin_survey(&mut self) -> bool {
        // A cancel request on its way wakes us when it was acted on.
        if !self.passes() || self.backend_eof || !self.slot().unlink() {
            return false;
        }
        let Some(lease) = self.link.take() else { return false };
        let options = self.baggage.as_ref().map(|b| b.options.peek()).unwrap_or_default();
        let hold = self.gate().hold();
        self.chore = Some(Box::pin(async move {
            chores::survey(lease, options).await.map(|(lease, survey)| (lease, Done::Surveyed(hold, survey)))
        }));
        true
    }

    pub(super) fn surveyed(&mut self, hold: u64, survey: Survey) {
        self.baggage.get_or_insert_default().survey = Some((hold, survey));
    }

    /// The gate was suspended since the session was looked into, and PostgreSQL stops: it lets go of its backend, or
    /// ends where that has what cannot be made again.
    pub(super) fn let_go_for_switchover(&mut self) -> Result<(), End> {
        let gate = self.gate();
        if self.client.is_bound_here() && gate.is_suspended() && gate.is_to_carry() && self.is_quiet() {
            // One hop (S13): the node that takes over is the one it came through.
            return Err(End::Kept(BOUND_HERE.to_owned()));
        }
        let is_of_before = self.link.as_ref().is_some_and(|lease| lease.suspensions != gate.suspensions());
        if self.mode != Mode::Session || !is_of_before || !self.is_quiet() {
            return Ok(());
        }
        let survey = self.baggage.as_mut().and_then(|b| b.survey.take());
        let Some((_, survey)) = survey else { return Ok(()) };
        if let Some(why) = survey.kept_by {
            return Err(End::Kept(why));
        }
        if !self.slot().unlink() {
            return Ok(());
        }
        self.link = None;
        self.backend_eof = false;
        let statements = survey.statements.iter().map(chores::Found::prepared).collect();
        self.baggage.get_or_insert_default().kept = Some(Kept { settings: survey.settings, statements });
        Ok(())
    }

    /// A session whose switchover was given up wants a backend again; `Ok(false)`: not yet.
    pub(super) fn link_up_again(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.baggage.as_ref().is_none_or(|b| b.kept.is_none()) {
            return Err(End::BackendGone);
        }
        let answer = match &self.waiting {
            Some(waiting) => waiting.poll(cx),
            None => match self.pool.request(&self.shape, &None, &self.pass) {
                Lent::Now(lease) => Poll::Ready(Ok(lease)),
                Lent::Wait(waiting) => {
                    let answer = waiting.poll(cx);
                    self.waiting = Some(waiting);
                    answer
                }
            },
        };
        let Poll::Ready(answer) = answer else { return Ok(false) };
        self.waiting = None;
        let lease = answer.map_err(|none| End::NoBackend(Box::new(none)))?;
        let Some(kept) = self.baggage.as_mut().and_then(|b| b.kept.take()) else { return Err(End::BackendGone) };
        let settings = self.pool.settings(kept.settings);
        self.chore = Some(Box::pin(async move {
            match chores::replay(lease, settings, &kept.statements).await {
                Ok(lease) => Some((lease, Done::Tuned)),
                Err(why) => {
                    tracing::warn!("a session that was held for a switchover cannot go on: {why}");
                    None
                }
            }
        }));
        self.poll_chore(cx)?;
        Ok(self.link.is_some())
    }

    /// The generation ended by a carrying over: whether this session can go on elsewhere.
    pub(super) fn is_free(&self) -> bool {
        let has_backend = match self.mode {
            Mode::Transaction => self.link.is_some(),
            Mode::Session => self.link.is_some() || self.baggage.as_ref().is_none_or(|b| b.kept.is_none()),
            Mode::Apart => true,
        };
        let at_boundary = self.is_quiet() && !self.client_eof && !self.up_done;
        let own = self.console.as_ref().is_some_and(|console| console.has_statements());
        at_boundary && !has_backend && !own && !self.client.is_bound_here() && !self.slot().doubt.load(Ordering::SeqCst)
    }

    /// It was shut before its client was told that it is in, and may be let in later or elsewhere.
    pub(crate) fn is_unheard(&self) -> bool {
        self.unheard && (self.pass.stands() || self.pass.carried().is_some())
    }

    /// The client as it was when it had proven itself.
    pub(crate) fn undo(self) -> (Rc<Data>, ClientStream, Startup, SocketAddr, Proof, Pass) {
        let early = Bytes::copy_from_slice(self.up.bytes().get(self.up.parsed..).unwrap_or_default());
        let mut startup = Startup::clone(&self.shape);
        // In transaction mode it is no parameter of a backend.
        let first = self.sharing.as_ref().and_then(|sharing| sharing.first.as_deref());
        let first = first.into_iter().flatten().map(|(name, value)| (name.clone().into_bytes(), value.clone().into()));
        startup.parameters.extend(first);
        let peer = self.slot().peer;
        (self.data, self.client.with_ahead(early), startup, peer, self.pool.proof(), self.pass)
    }

    /// All that the other node needs to go on with the session. The session is out of the book with this.
    pub(crate) fn take_apart(self, epoch: Epoch) -> Apart {
        let slot = self.slot();
        let mut carried = Carried {
            client: slot.peer,
            tls: slot.tls,
            epoch,
            user: self.shape.user.clone(),
            database: self.shape.database.clone(),
            parameters: self.shape.parameters.clone(),
            proven: Proven::from(&self.pool.proof()),
            pid: slot.pid,
            key: slot.key,
            settings: Vec::new(),
            statements: Vec::new(),
        };
        if let Some(sharing) = &self.sharing {
            carried.settings = sharing.settings.as_deref().cloned().unwrap_or_default();
            carried.statements = exported(&sharing.names);
        } else if let Some(kept) = self.baggage.and_then(|b| b.kept) {
            carried.settings = kept.settings;
            carried.statements = kept.statements;
        }
        let early = self.up.bytes().get(self.up.parsed..).unwrap_or_default().to_vec();
        Apart { client: self.client, early, carried, pass: self.pass }
    }
}

fn exported(names: &Names) -> Vec<Prepared> {
    names.export().into_iter().map(|(name, text)| Prepared { name, text }).collect()
}
