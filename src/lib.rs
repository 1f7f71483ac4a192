//! Portcullis: a DNS-fenced two-node failover appliance for PostgreSQL.
//!
//! This file IS the floor plan. Imports only point down, no circles, and `tests/tidy.rs` checks it:
//!
//! ```text
//!  5 app     driver, daemon, cli, ...   wires and turns the crank; the only floor that knows all others
//!  4 serve   gate, session, peer, ...   listeners and the data plane
//!  3 io      clock, dns, vip, ...       one file per hand or sense
//!  ----------------------- below this line no tokio, no sockets, no files, no clock
//!  2 engine  evidence, lease, guard...  pure state machines
//!  1 wire    pg, dns, arp, journal      bytes <-> values
//!  0 base    time, ids, fault, config   words everyone uses
//! ```
//!
//! Floors 3 and 4 do not import each other: `serve` gets what it needs as arguments. To read the crate, start at
//! [`engine::guard`], then [`engine::turn`], then `app::driver`. The rules R1 to R7 named in comments are those of
//! `docs/design.md`.

/// Floor 0: the words everyone uses.
/// Pure values; no bytes, no decisions.
pub mod base {
    pub mod config;
    pub mod fault;
    pub mod ids;
    pub mod tally;
    pub mod time;
}

/// Floor 1: bytes to values and back.
/// Codecs only; nothing here knows why it is asked.
pub mod wire {
    pub mod arp;
    pub mod dns;
    pub mod hba;
    pub mod journal;
    pub mod marker;
    pub mod md5;
    pub mod peer;
    pub mod pg;
    pub mod scram;
    pub mod tunnel;
    pub mod x509;
}

/// Floor 2: the pure state machines.
/// Every decision of the product is made here, from events and one reading of the clock.
pub mod engine {
    pub mod durable;
    pub mod evidence;
    pub mod follower;
    pub mod guard;
    pub mod lag;
    pub mod lease;
    pub mod machine;
    pub mod outlook;
    mod rejoining;
    pub mod report;
    pub mod setup;
    pub mod status;
    pub mod turn;
}

/// Floor 3: one file per hand or sense.
/// Executes what the engine asked for and reports what happened; decides nothing.
#[cfg(feature = "shell")]
pub mod io {
    pub mod arp;
    pub mod clock;
    pub mod dns;
    pub mod fd_store;
    pub mod files;
    pub mod host;
    pub mod journal;
    pub mod kernel_gate;
    pub mod links;
    pub mod machine;
    pub mod neighbour;
    pub mod network;
    pub mod outside;
    pub mod postgres;
    pub mod privileges;
    pub mod vip;
}

/// Floor 4: listeners and the data plane.
/// Asks the gate before anything passes, in either direction.
#[cfg(feature = "shell")]
pub mod serve {
    pub mod backend;
    pub mod cancel;
    pub mod chores;
    pub mod command;
    pub mod console;
    pub mod data;
    pub mod end;
    pub mod flow;
    pub mod forward;
    pub mod gate;
    pub mod http;
    pub mod listener;
    pub mod login;
    pub mod peer;
    pub mod pool;
    pub mod pump;
    pub mod roles;
    pub mod session;
    pub mod show;
    pub mod slot;
    pub mod socket;
    pub mod tally;
    pub mod tls;
    pub mod tunnel;
}

/// Floor 5: wires everything together.
/// The only floor that knows all others.
#[cfg(feature = "shell")]
pub mod app {
    pub mod audit;
    pub mod cli;
    pub mod client;
    pub mod daemon;
    pub mod doctor;
    pub mod driver;
    pub mod hands;
    pub mod init;
    pub mod lines;
    pub mod link_watch;
    pub mod log;
    pub mod manual;
    pub mod may_start;
    pub mod meter;
    pub mod notices;
    pub mod online;
    pub mod pools;
    pub mod probe;
    pub mod reload;
    pub mod render;
    pub mod verbs;
    pub mod wall;
    pub mod witness;
}
