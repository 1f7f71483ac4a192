//! Cancel requests: a client's, passed on to the backend its session has now, and the gate's own of a bounded drain.
//!
//! What it is NOT: a request for a backend that is no session's of this gate is not passed on.
//!
//! **Invariant (R4):** the session is in doubt *before* the request can reach its backend: a cancelled wait for the
//! standby looks like a success on the wire, so the pump holds that session's next success.

use super::listener::Proxy;
use super::slot::Slot;
use crate::wire::pg;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How long whoever cancels waits for PostgreSQL to act; the request stays on its way.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one session on their way at a time; one more would say nothing new.
const MAX_ON_THE_WAY: u32 = 16;
/// How long a success in doubt is held (R4); then the session ends with "outcome unknown".
const CONFIRM_WAIT: Duration = Duration::from_secs(10);
/// Pause between two questions whether the peer has it.
const CONFIRM_RETRY: Duration = Duration::from_millis(50);

/// Sends a CancelRequest to a session's backend and waits until it was acted on, or for too long. One that has no
/// backend stops waiting for one.
pub(crate) async fn forward(slot: Arc<Slot>) {
    let others = slot.cancels.fetch_add(1, Ordering::SeqCst);
    let backend = slot.backend().filter(|_| others < MAX_ON_THE_WAY);
    let Some((pid, key)) = backend else {
        slot.cancels.fetch_sub(1, Ordering::SeqCst);
        if others < MAX_ON_THE_WAY {
            slot.cancel_wait();
        }
        return;
    };
    slot.doubt.store(true, Ordering::SeqCst);
    // A task of its own: PostgreSQL may act on it at any time until it closes, whoever still waits for that.
    let delivery = tokio::spawn(deliver(slot, pid, key));
    if tokio::time::timeout(CANCEL_TIMEOUT, delivery).await.is_err() {
        let waited = CANCEL_TIMEOUT.as_secs();
        tracing::warn!(pid, "PostgreSQL did not act on a cancel request in {waited} s; its backend waits for that");
    }
}

/// Counted until PostgreSQL is done with it, so that the backend stays with its session, and the session in doubt.
async fn deliver(slot: Arc<Slot>, pid: i32, key: u32) {
    let sent = async {
        let mut stream = UnixStream::connect(slot.door.as_path()).await?;
        stream.write_all(&pg::cancel_request(pid, &key.to_be_bytes())).await?;
        // PostgreSQL closes after it sent the signal (chapter 55.2.8). A reset says the same.
        let _ = stream.read(&mut [0; 1]).await;
        Ok::<(), std::io::Error>(())
    };
    if let Err(error) = sent.await {
        tracing::warn!(pid, %error, "a cancel request did not reach PostgreSQL");
    }
    slot.cancels.fetch_sub(1, Ordering::SeqCst);
    // The session may have waited for this to let its backend go.
    slot.wake();
}

/// Asks until the peer has it, or for too long.
pub(crate) async fn confirm(proxy: Arc<Proxy>) -> bool {
    let asking = async {
        while !(proxy.confirm)().await {
            tokio::time::sleep(CONFIRM_RETRY).await;
        }
    };
    tokio::time::timeout(CONFIRM_WAIT, asking).await.is_ok()
}
