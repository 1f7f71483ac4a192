//! A session that the other node held through a switchover goes on here: no login, and not a word to its client, which
//! has its greeting and its ReadyForQuery already.
//!
//! **Invariant:** nothing of the client is read before everything that it had set and prepared is here again, or is
//! known to the pump; where that fails, the client is told so and the session ends.

use super::{Opening, Started, enter, shared_mode};
use crate::serve::backend::Proof;
use crate::serve::chores;
use crate::serve::data::{Newcomer, Threads};
use crate::serve::end::Mode;
use crate::serve::gate::{Pass, Passage};
use crate::serve::listener::{Proxy, Seat};
use crate::serve::login::Stop;
use crate::serve::pool::Settings;
use crate::serve::slot::{Slot, Who};
use crate::serve::tls::Parked;
use crate::wire::pg::{self, HEADER, Refusal, Startup};
use crate::wire::tunnel::{Carried, Prepared};
use bytes::BytesMut;
use std::sync::Arc;

/// What a client brings along: settings, and where it shares backends its statements too.
pub(crate) struct Resumed {
    pub(crate) settings: Settings,
    pub(crate) statements: Vec<Prepared>,
}

/// Hands a carried session to the data thread of its pool.
pub(crate) fn admit(
    client: Parked,
    carried: Carried,
    proof: Proof,
    threads: &Threads,
    pass: Pass,
    (seat, passage): (Seat, Passage),
) {
    let startup = startup_of(&carried);
    let (peer, carried) = (carried.client, Some(Box::new(carried)));
    threads.admit(Newcomer { client, peer, startup, proof, pass, seat, passage, carried });
}

/// The same for a client that has proven itself at the other node, and is greeted here.
pub(crate) fn admit_proven(
    client: Parked,
    carried: &Carried,
    proof: Proof,
    threads: &Threads,
    pass: Pass,
    (seat, passage): (Seat, Passage),
) {
    let (startup, peer) = (startup_of(carried), carried.client);
    threads.admit(Newcomer { client, peer, startup, proof, pass, seat, passage, carried: None });
}

fn startup_of(carried: &Carried) -> Startup {
    Startup {
        minor: 0,
        user: carried.user.clone(),
        database: carried.database.clone(),
        parameters: carried.parameters.clone(),
        options: Vec::new(),
    }
}

/// What the client of a session hears that cannot go on here.
pub(crate) fn failed(proxy: &Proxy, why: &str) -> Stop {
    let node = &proxy.options.node;
    let hint = "Connect again: the service is there.";
    Refusal::new("57P01", format!("portcullis: this session could not go on at node {node}: {why}")).hint(hint).into()
}

impl Opening<'_> {
    /// Takes the session up where it was.
    pub(super) async fn resume(&self, startup: Startup, carried: Carried) -> Result<Started, Stop> {
        let user = carried.user.clone();
        self.take_up(startup, carried).await.map_err(|stop| {
            let why = match stop {
                Stop::Silent => return Stop::Silent,
                Stop::Refuse(refusal) => refusal.message,
                Stop::PassOn(message) => {
                    message.get(HEADER..).and_then(|body| pg::field(body, b'M')).unwrap_or_default()
                }
            };
            tracing::warn!(user, why = &*why, "a session that was held through a switchover ends");
            failed(&self.data.proxy, &why)
        })
    }

    async fn take_up(&self, mut startup: Startup, carried: Carried) -> Result<Started, Stop> {
        let Carried { tls, pid, key, settings, statements, .. } = carried;
        let proxy = &self.data.proxy;
        let mode = shared_mode(proxy);
        let application = self.take_application(&mut startup, mode);
        let shape = self.pool.shape(startup);
        let (link, first, resumed) = match mode {
            Mode::Transaction => {
                let first = (!application.is_empty()).then(|| ("application_name".to_owned(), application));
                let mut all = settings;
                all.extend(
                    first
                        .iter()
                        .filter(|(name, _)| !all.iter().any(|(own, _)| own == name))
                        .cloned()
                        .collect::<Vec<_>>(),
                );
                let resumed = Resumed { settings: self.pool.settings(all), statements };
                (None, self.pool.settings(first.into_iter().collect()), Some(resumed))
            }
            Mode::Session | Mode::Apart => {
                let lease = self.lease(&shape, mode).await?;
                let settings = self.pool.settings(settings);
                let replayed = chores::replay(lease, settings.clone(), &statements).await;
                let resumed = Resumed { settings, statements: Vec::new() };
                (Some(replayed.map_err(|why| Refusal::new("57P01", why))?), None, Some(resumed))
            }
        };
        if !self.pass.stands() {
            return Err(Refusal::new("57P01", &*self.pass.reason()).into());
        }
        let who =
            || Who { user: shape.user.as_str().into(), database: shape.database.as_str().into(), peer: self.peer, tls };
        let slot = Slot::new(pid, key, who(), self.data.now.get(), Arc::clone(&proxy.door));
        let number = link.as_ref().map(|lease| lease.pid);
        let entry = proxy.gate.enter(slot).unwrap_or_else(|| enter(&proxy.gate, who(), number, proxy, self.data));
        Ok(Started { greeting: BytesMut::new(), link, entry, mode, shape, settings: first, resumed })
    }
}
