//! One client, from accept to close: its login, its pump, and the last word it hears.
//!
//! What it is NOT: it forwards nothing itself; that is the pump's.
//!
//! **Invariant:** when the gate is cut the backend is let go of first and not waited for; then the client is told,
//! where a message may begin.

use super::cancel;
use super::gate::{Pass, Slot};
use super::listener::Proxy;
use super::login::{self, Opened, Stop};
use super::pump::{End, Pump};
use super::tls::ClientStream;
use crate::wire::pg::{Refusal, Startup};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a client may take for its opening packets, and again for its login (PostgreSQL's
/// `authentication_timeout`); then the connection is closed.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last message may take to leave, and the client to close after it; then it is closed on.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(500);

/// Serves one accepted connection to its end.
pub(crate) async fn serve(stream: TcpStream, peer: SocketAddr, proxy: Arc<Proxy>, pass: Pass, crowded: bool) {
    let tls = proxy.options.rules.tls();
    let opening = tokio::time::timeout(LOGIN_TIMEOUT, login::open(stream, tls.as_ref()));
    let opened = tokio::select! {
        biased;
        () = pass.ended() => return,
        opened = opening => opened,
    };
    let (client, opened) = match opened {
        Err(_too_slow) => return,
        Ok(Err((client, stop))) => {
            if let Some(client) = client {
                dismiss(client, stop).await;
            }
            return;
        }
        Ok(Ok(opened)) => opened,
    };
    match opened {
        Opened::Cancel { pid, key } => {
            if pass.passes()
                && let Some(slot) = proxy.gate.find(pid, &key)
            {
                cancel::forward(slot).await;
            }
        }
        Opened::Startup(_) if crowded => {
            let refusal = Refusal::new("53300", "sorry, too many clients already")
                .hint("pool.max_clients of portcullis limits them.");
            dismiss(client, refusal.into()).await;
        }
        Opened::Startup(startup) => session(client, peer, startup, proxy, pass).await,
    }
}

async fn session(mut client: ClientStream, peer: SocketAddr, startup: Startup, proxy: Arc<Proxy>, pass: Pass) {
    let login = async {
        wait_while_paused(&proxy).await?;
        let log_in = async {
            let proof = login::authenticate(&mut client, peer, &startup, &proxy).await?;
            login::admit(&mut client, &startup, &proof, &proxy, &pass).await
        };
        tokio::time::timeout(LOGIN_TIMEOUT, log_in).await.unwrap_or(Err(Stop::Silent))
    };
    let backend = tokio::select! {
        biased;
        () = pass.ended() => Err(Refusal::new("57P01", &*pass.reason()).into()),
        backend = login => backend,
    };
    let backend = match backend {
        Ok(backend) => backend,
        // A reset passes the kernel gate, and a client that waits for an answer hears of nothing else.
        Err(_) if pass.is_walled_off() => return client.reset(),
        Err(stop) => return dismiss(client, stop).await,
    };
    drop(startup);
    let status = backend.greeting.last().copied().unwrap_or(b'I');
    let entry = proxy.gate.enter(Slot {
        pid: backend.pid,
        key: backend.key,
        door: Arc::clone(&proxy.door),
        busy: AtomicBool::new(false),
        doubt: AtomicBool::new(false),
        cancels: AtomicU32::new(0),
    });
    drop(backend.greeting);
    let pump = Pump::new(client, backend.stream, Arc::clone(&proxy), pass.clone(), Arc::clone(&entry.slot), status);
    // On the heap: the pump moves no more, and an idle session's task stays small.
    let mut pump = Box::new(pump);
    let end = drive(&mut pump, &proxy, &pass, &entry.slot).await;
    if end == End::Shut {
        // Where nobody cut it, it lapsed: all others hear it from the first that notices.
        proxy.gate.note_lapse(&proxy.lapsed);
    }
    let last_word = last_word(end, &proxy, &pass);
    let (client, whole) = pump.into_client();
    drop(entry);
    if end == End::Shut && pass.is_walled_off() {
        return client.reset();
    }
    // A lapse is told like a cut, but nothing is told into the middle of a message.
    match last_word {
        Some(refusal) if whole => dismiss(client, refusal.into()).await,
        // PostgreSQL's last words were passed on; they too shall arrive.
        None if end == End::BackendGone => dismiss(client, Stop::PassOn(Vec::new())).await,
        _ => {}
    }
}

/// Pumps until the session ends, looking up whenever the gate calls.
async fn drive(pump: &mut Pump, proxy: &Proxy, pass: &Pass, slot: &Arc<Slot>) -> End {
    let mut view = proxy.gate.watch();
    let mut cancels = view.borrow_and_update().cancels;
    loop {
        if !pass.passes() {
            return End::Shut;
        }
        tokio::select! {
            biased;
            // The gate outlives us: its sender cannot be gone.
            _ = view.changed() => {
                let called = view.borrow_and_update().cancels;
                if called != cancels && pump.is_busy() {
                    tokio::spawn(cancel::forward(Arc::clone(slot)));
                }
                cancels = called;
            }
            end = poll_fn(|cx| pump.poll(cx)) => return end,
        }
    }
}

/// What the client is told, if anything.
fn last_word(end: End, proxy: &Proxy, pass: &Pass) -> Option<Refusal> {
    match end {
        // PostgreSQL's own last words were passed on.
        End::ClientGone | End::BackendGone => None,
        End::Shut => Some(Refusal::new("57P01", &*pass.reason())),
        End::Drained => {
            let reason = proxy.gate.watch().borrow().drain.clone();
            let reason = reason.unwrap_or_else(|| "portcullis: this session was ended for a switchover".into());
            Some(Refusal::new("57P01", &*reason))
        }
        End::HeldTooLong => Some(paused_too_long(proxy)),
        End::OutcomeUnknown => Some(
            Refusal::new(
                "57P01",
                "portcullis: outcome unknown: the command was cancelled while it waited for the standby, which did \
                 not confirm it in time",
            )
            .hint(
                "It is committed on this node, but would be lost if the other took over now. Look before trying again.",
            ),
        ),
        End::Malformed(malformed) => Some(Refusal::new("08P01", malformed.0)),
    }
}

fn paused_too_long(proxy: &Proxy) -> Refusal {
    let waited = humantime::format_duration(proxy.options.query_wait);
    Refusal::new("57P03", format!("portcullis: the service is paused and did not resume within {waited}; try again"))
}

/// New clients of a paused gate wait before their login.
async fn wait_while_paused(proxy: &Proxy) -> Result<(), Stop> {
    if !proxy.gate.is_paused() {
        return Ok(());
    }
    let mut view = proxy.gate.watch();
    let resumed = view.wait_for(|_| !proxy.gate.is_paused());
    match tokio::time::timeout(proxy.options.query_wait, resumed).await {
        Ok(_) => Ok(()),
        Err(_) => Err(paused_too_long(proxy).into()),
    }
}

/// Sends the last message and closes, so that it arrives: closing with bytes unread would send a reset that may
/// overtake it.
async fn dismiss(mut client: ClientStream, stop: Stop) {
    let message = match stop {
        Stop::Silent => return,
        Stop::Refuse(refusal) => refusal.encode().to_vec(),
        Stop::PassOn(message) => message,
    };
    let farewell = async {
        client.write_all(&message).await?;
        client.shutdown().await?;
        let mut rest = [0; 1024];
        while client.read(&mut rest).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whatever goes wrong here: the client is gone, or slow, and is closed on.
    let _ = tokio::time::timeout(FAREWELL_TIMEOUT, farewell).await;
}
