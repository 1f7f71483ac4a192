//! When a client that shares backends has one: borrowed at the beginning of a transaction, given back at its end, its
//! settings brought along.
//!
//! What it is NOT: no bytes of the client pass here.
//!
//! **Invariant:** a backend is given back only at rest, without a cancel request on its way to it.

use super::super::chores;
use super::super::end::End;
use super::super::pool::{Lent, add, same_settings};
use super::{Done, Pump, Skipping, Step};
use crate::wire::pg::{self, HEADER, Refusal};
use bytes::BufMut;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

fn own_has(pairs: &[(String, String)], name: &str) -> bool {
    pairs.iter().any(|(own, _)| own == name)
}

impl Pump {
    /// Gives the backend back at a transaction boundary, unless more is to pass and nobody waits. Whether it went.
    pub(super) fn let_go(&mut self) -> bool {
        // Who is held keeps none: it would wait for it in vain after a switchover.
        let more = !self.up.is_empty() && !self.pool.is_wanted() && !self.is_held();
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
            self.chore = Some(Box::pin(async move {
                chores::learn(lease, options).await.map(|(lease, changed)| (lease, Done::Learnt(changed)))
            }));
        } else {
            lease.give_back();
        }
        true
    }

    /// The gate's own business with the backend goes first.
    pub(super) fn poll_chore(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if !self.passes() {
            return Err(End::Shut);
        }
        let Some(chore) = self.chore.as_mut() else { return Ok(false) };
        let Poll::Ready(done) = chore.as_mut().poll(cx) else { return Ok(false) };
        self.chore = None;
        match done {
            Some((lease, Done::Tuned)) => self.attach(lease),
            Some((lease, Done::Surveyed(hold, survey))) => {
                self.attach(lease);
                self.surveyed(hold, survey);
            }
            Some((mut lease, Done::Learnt(changed))) => {
                let Some(sharing) = self.sharing.as_mut() else { return Ok(true) };
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
    pub(super) fn link_up(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        if self.link.is_some() {
            return Ok(true);
        }
        let Some(sharing) = self.sharing.as_mut() else { return self.link_up_again(cx) };
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
        self.chore = Some(Box::pin(async move { chores::tune(lease, wanted).await.map(|lease| (lease, Done::Tuned)) }));
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
    pub(super) fn skip(&mut self) -> Result<Step, End> {
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
}
