//! Why a session ends, and when it has a backend.
//!
//! What it is NOT: the words that the client hears are the session's.

use super::backend::NoBackend;
use super::slot::Order;
use crate::base::ids::Epoch;
use crate::wire::pg::Malformed;

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client took its leave at rest.
    Finished,
    ClientGone,
    /// PostgreSQL closed, and all it had said was passed on.
    BackendGone,
    /// The gate passes no more.
    Shut,
    /// At a transaction boundary, while sessions are being ended there.
    Drained,
    /// It was held through a switchover, and goes on at the peer's gate, which is open at this epoch.
    Carried(Epoch),
    /// It was held for a switchover, and something of it cannot be taken along.
    Kept(String),
    /// Held longer than `query_wait`.
    HeldTooLong,
    /// R4: a commit stands here whose wait for the standby was cancelled, and the peer did not confirm it.
    OutcomeUnknown,
    /// No backend could be had.
    NoBackend(Box<NoBackend>),
    /// A backend did not take the session's settings.
    Untuned,
    Ordered(Order),
    Malformed(Malformed),
}

/// When the session has a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// All its life, one of the pool's.
    Session,
    /// While it is in a transaction.
    Transaction,
    /// All its life, one of its own: a replication connection.
    Apart,
}
