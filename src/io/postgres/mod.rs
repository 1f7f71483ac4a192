//! The hand and the sense on the local PostgreSQL: watch, start, stop, promote, demote, follow, clone, and the few
//! settings the daemon owns.
//!
//! What it is NOT: it decides nothing (when to promote is the engine's), it serves no client, and the daemon never
//! touches `postgresql.conf` or `pg_hba.conf` (`prepare` does, for the person who says `init --postgres`). Everything
//! here runs as the owner of the data directory.
//!
//! | file | is |
//! |---|---|
//! | `session` | the lasting admin session, the look, the loss of it; short sessions for the rest |
//! | `control` | start, stop, `pg_controldata` |
//! | `postmaster` | which processes are this cluster's (from /proc, never from a pid file alone) |
//! | `settings`, `autoconf` | owned settings by ALTER SYSTEM, or in `postgresql.auto.conf` while it is stopped |
//! | `standby` | promote, demote, make a standby, follow |
//! | `role` | the replication role, slots, facts for a clone |
//! | `divergence`, `history` | where the cluster here left the source's history, and what follows from it |
//! | `replayed` | which timeline a standby has replayed, when nobody tells it |
//! | `rewind`, `kept`, `again` | a rejoin: follow, `pg_rewind`, or clone; what is kept before; one interrupted |
//! | `clone` | a fresh copy beside the old directory, then the swap |
//! | `spaces`, `room` | what lies outside the data directory; what a copy or a rewind needs on disk |
//! | `own` | what belongs to one machine and survives both |
//! | `progress` | a long tool watched while it runs |
//! | `survey`, `fitness` | the facts that `doctor` judges |
//! | `found`, `prepare` | for `init`: the clusters of this machine; what an administrator has written for one |
//! | `tool`, `files`, `paths` | child processes with a time limit; durable writes; names of directories |
//!
//! **Invariants:** a child process always has a time limit; no secret is in an argument, an environment variable, an
//! SQL text or a log; every action may be repeated after a crash at any point; what the daemon itself commits never
//! waits for a standby (`synchronous_commit = local`).

mod again;
mod autoconf;
mod clone;
mod control;
mod divergence;
mod errand;
mod files;
mod fitness;
mod found;
mod history;
mod kept;
mod own;
mod paths;
mod postmaster;
mod prepare;
mod progress;
mod replayed;
mod rewind;
mod role;
mod room;
mod session;
mod settings;
mod spaces;
mod standby;
mod survey;
pub(in crate::io) mod tool;

pub use clone::SET_ASIDE_INFIX;
pub use control::{StopHow, StopMode, Stopped};
pub use errand::start_was_ordered;
pub use fitness::{Fitness, Login, RoleFacts, SlotFacts, Tool};
pub use found::{FoundCluster, cluster_in, clusters, set_aside_fresh};
pub use kept::DIVERGED_INFIX;
pub use prepare::Preparation;
pub use progress::Tick;
pub use rewind::{Rejoined, is_rewind_broken};
pub use role::SourceFacts;
pub use session::{PgLost, Watcher, watch};
pub use settings::slot_name;
pub use standby::clear_cut_short;
pub use survey::{DatabaseFacts, HbaRule, Lowered, Survey};

use crate::base::config::{Config, Node, NodePostgres, Secret};
use crate::base::ids::NodeName;
use std::path::PathBuf;

/// The PostgreSQL cluster of this node, and all that is needed to act on it.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// This node's name: the `application_name` of its walreceiver.
    pub node: NodeName,
    pub settings: NodePostgres,
    /// A superuser, reached through `settings.socket_dir`.
    pub admin_user: String,
    /// Where the replication passfile and PostgreSQL's start log are kept.
    pub state_dir: PathBuf,
    pub replication: ReplicationAccess,
}

/// How a standby logs in to its primary.
#[derive(Debug, Clone)]
pub struct ReplicationAccess {
    pub user: String,
    /// `None`: the role needs no password (certificate, trust).
    pub password: Option<Secret>,
    /// Further libpq words, `sslmode=verify-full ...`.
    pub conninfo: String,
    /// Use one physical slot per standby.
    pub slots: bool,
}

/// The other node's PostgreSQL, as this node reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub name: NodeName,
    pub host: String,
    pub port: u16,
}

impl Peer {
    /// The peer that a `[[node]]` of the configuration describes.
    pub fn from_node(node: &Node) -> Peer {
        Peer { name: node.name.clone(), host: node.postgres.host.clone(), port: node.postgres.port }
    }
}

impl Cluster {
    /// The cluster of `node`; reads the replication password from its file (a missing or empty file means none).
    ///
    /// # Errors
    /// The password file is there but cannot be read.
    pub fn from_config(config: &Config, node: &Node) -> Result<Cluster, PgError> {
        let file = &config.replication.password_file;
        let password = match std::fs::read(file) {
            Ok(mut bytes) => {
                while bytes.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
                    bytes.pop();
                }
                (!bytes.is_empty()).then(|| Secret::new(bytes))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(PgError::Failed(format!(
                    "{} cannot be read: {error}; make it readable for the owner of the data directory alone",
                    file.display()
                )));
            }
        };
        Ok(Cluster {
            node: node.name.clone(),
            settings: node.postgres.clone(),
            admin_user: config.postgres.admin_user.clone(),
            state_dir: config.state_dir.clone(),
            replication: ReplicationAccess {
                user: config.replication.user.clone(),
                password,
                conninfo: config.replication.conninfo.clone(),
                slots: config.replication.slots,
            },
        })
    }
}

/// Why something asked of PostgreSQL was not done: one sentence for people, sorted by what the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PgError {
    /// PostgreSQL does not run here, or went away meanwhile.
    #[error("{0}")]
    Down(String),
    /// No answer within the limit; it may still happen.
    #[error("{0}")]
    TimedOut(String),
    /// A precondition does not hold; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// PostgreSQL, a tool or the file system said no.
    #[error("{0}")]
    Failed(String),
}

impl From<PgLost> for PgError {
    fn from(lost: PgLost) -> PgError {
        match lost {
            PgLost::Down(text) => PgError::Down(text),
            PgLost::Silent(text) => PgError::TimedOut(text),
            PgLost::Refused(text) => PgError::Failed(text),
        }
    }
}
