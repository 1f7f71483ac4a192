//! Clients that go on at the other node after a switchover: carried over through a tunnel, or given back through the
//! one they came by.
//!
//! What it is NOT: it does not decide who may; the gate's pass says that its generation was carried over, and the pump
//! which session is free.
//!
//! **Invariant:** nothing is said to a client between the moment it leaves and the moment the other node has it; where
//! that fails it is told so, and its session ends.

use super::{Places, begin, dismiss};
use crate::base::ids::Epoch;
use crate::serve::data::Newcomer;
use crate::serve::forward::{Home, Quiet};
use crate::serve::gate::Pass;
use crate::serve::listener::Proxy;
use crate::serve::login::Stop;
use crate::serve::pump::{Apart, Pump};
use crate::serve::tls::ClientStream;
use crate::serve::tunnel;
use crate::wire::pg::{Refusal, Startup};
use crate::wire::tunnel::{Carried, Opening, Proven};
use std::net::SocketAddr;
use std::sync::Arc;

/// What kept a client that came through the other node.
pub(crate) const BOUND_HERE: &str = "come through the other node, with TLS that ends here or by a daemon of an older \
                                     version";

/// A session that was held through a switchover goes on at the other node, in its place here, until it ends or comes
/// back.
pub(super) async fn carry_over(pump: Pump, epoch: Epoch, places: Places) {
    let proxy = Arc::clone(pump.proxy());
    let Apart { client, early, carried, pass } = pump.take_apart(epoch);
    let home = leave(&proxy, client, Opening::Session(Box::new(carried)), early, &pass).await;
    // It takes places anew.
    drop(places);
    if let Some(home) = home {
        tunnel::take_up(&proxy, home).await;
    }
}

/// The same for a client that has said what it wants and heard nothing.
pub(super) async fn send_on(
    proxy: &Arc<Proxy>,
    client: ClientStream,
    peer: SocketAddr,
    startup: &Startup,
    pass: &Pass,
) {
    let Some(epoch) = pass.carried() else { return };
    let opening = Opening::Connection { client: peer, epoch, tls: client.secured() };
    if let Some(home) = leave(proxy, client, opening, startup.encode_as_sent(), pass).await {
        tunnel::take_up(proxy, home).await;
    }
}

/// The same for one that has proven itself, and was told so, but not that it is in.
pub(super) async fn send_proven(
    proxy: &Arc<Proxy>,
    client: ClientStream,
    peer: SocketAddr,
    (startup, proven): (&Startup, Proven),
    pass: &Pass,
) {
    let Some(epoch) = pass.carried() else { return };
    let carried = Carried {
        client: peer,
        tls: client.is_tls(),
        epoch,
        user: startup.user.clone(),
        database: startup.database.clone(),
        parameters: startup.parameters.clone(),
        proven,
        pid: 0,
        key: 0,
        settings: Vec::new(),
        statements: Vec::new(),
    };
    if let Some(home) = leave(proxy, client, Opening::Proven(Box::new(carried)), Vec::new(), pass).await {
        tunnel::take_up(proxy, home).await;
    }
}

/// A client that is let in, and was not told so when the gate was suspended: it waits, and is let in or sent on then.
pub(super) fn begin_again(pump: Pump, mut places: Places) {
    let (proxy, seat) = (Arc::clone(pump.proxy()), places.seat.take());
    let (data, client, startup, peer, proof, pass) = pump.undo();
    drop(places);
    if let (Some(seat), Ok(client)) = (seat, client.park()) {
        let passage = proxy.gate.passage();
        let newcomer = Newcomer { client, peer, startup, proof, pass, seat, passage, carried: None };
        drop(tokio::task::spawn_local(begin(data, newcomer)));
    }
}

/// To the other node. Returns when that is done with it, or the client with what the other node gives back.
async fn leave(
    proxy: &Arc<Proxy>,
    client: ClientStream,
    opening: Opening,
    mut early: Vec<u8>,
    pass: &Pass,
) -> Option<Home> {
    let user = opening.user().to_owned();
    let (client, behind) = client.without_ahead();
    early.extend_from_slice(&behind);
    let left = match client {
        client if client.is_bound_here() => Err((client, format!("it has {BOUND_HERE}"))),
        ClientStream::Tunnel(mut tunnel) => {
            let back = tunnel.give_back(&opening, early).await;
            back.map(|()| None).map_err(|why| (ClientStream::Tunnel(tunnel), why))
        }
        client => match &proxy.options.forward {
            Some(forwarder) => forwarder
                .carry(Quiet::new(client, early), opening)
                .await
                .map_err(|(quiet, error)| (quiet.into_parts().0, error.to_string())),
            None => Err((client, "there is no way to it".to_owned())),
        },
    };
    match left {
        Ok(home) => home,
        Err((client, why)) => {
            tracing::warn!(user, why, "a client that was held for a switchover could not be carried over");
            let refusal =
                Refusal::new("57P01", format!("{}; this session could not go on there: {why}", pass.reason()));
            dismiss(client, Stop::from(refusal.hint("Connect again."))).await;
            None
        }
    }
}
