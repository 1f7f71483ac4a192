//! A backend as it is lent, kept and let go of.
//!
//! **Invariant:** a place is free only once PostgreSQL has ended its backend, or the gate's generation is over.

use super::{Backend, Pool};
use crate::serve::gate::Pass;
use crate::serve::socket::Socket;
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixStream;
use std::rc::{Rc, Weak};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A backend and its place in its pool. Dropped on loan, it is closed, and its place is free when PostgreSQL has ended
/// it; else at once.
pub(crate) struct Lease {
    /// Boxed: it goes to and fro with each transaction, and a client without one has no room for it.
    backend: Box<Backend>,
    pool: Weak<Pool>,
    pub(super) on_loan: bool,
}

impl Lease {
    pub(super) fn new(backend: Backend, pool: &Rc<Pool>) -> Lease {
        Lease { backend: Box::new(backend), pool: Rc::downgrade(pool), on_loan: false }
    }

    pub(super) fn lent(mut self) -> Lease {
        self.on_loan = true;
        self
    }

    /// At rest and as it was lent.
    pub(crate) fn give_back(self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.give_back(self);
        }
    }
}

impl Deref for Lease {
    type Target = Backend;
    fn deref(&self) -> &Backend {
        &self.backend
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Backend {
        &mut self.backend
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // One apart has no place.
        let Some(pool) = self.pool.upgrade().filter(|_| !self.backend.shape.wants_replication()) else { return };
        if !self.on_loan {
            return pool.free_place();
        }
        let pass = &self.backend.pass;
        if !pass.is_over()
            && pool.data.strong_count() > 0
            && let Ok(stream) = self.backend.stream.again()
        {
            // It may still wait for its standby, and PostgreSQL counts it as long as it lives.
            drop(tokio::task::spawn_local(see_off(stream, pass.clone(), pool)));
        } else {
            pool.lost();
        }
    }
}

/// Waits for the end of a backend that nobody needs any more, or for that of the gate's generation; only then is its
/// place free.
async fn see_off(stream: UnixStream, pass: Pass, pool: Rc<Pool>) {
    let leaving = async {
        let mut stream = Socket::new(stream)?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    tokio::select! {
        biased;
        () = pass.ended() => {}
        // A reset is an end too.
        _ = leaving => {}
    }
    pool.lost();
}
