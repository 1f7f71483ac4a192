//! The proxy against a real PostgreSQL 15, over loopback: psql, tokio-postgres and raw sockets.
//!
//! One cluster is shared by the tests that run at the same time; the last one stops it and removes it.

#![allow(clippy::unwrap_used)]

#[path = "proxy/back.rs"]
mod back;
#[path = "proxy/carry.rs"]
mod carry;
#[path = "proxy/commands.rs"]
mod commands;
#[path = "proxy/console.rs"]
mod console;
#[path = "proxy/forward.rs"]
mod forward;
#[path = "proxy/front.rs"]
mod front;
#[path = "proxy/gate.rs"]
mod gate;
#[path = "proxy/limits.rs"]
mod limits;
#[path = "proxy/login.rs"]
mod login;
#[path = "proxy/pg.rs"]
mod pg;
#[path = "proxy/protocol.rs"]
mod protocol;
#[path = "proxy/raw.rs"]
mod raw;
#[path = "proxy/review.rs"]
mod review;
#[path = "proxy/rules.rs"]
mod rules;
#[path = "proxy/rules_maps.rs"]
mod rules_maps;
#[path = "proxy/secrets.rs"]
mod secrets;
#[path = "proxy/secrets_kept.rs"]
mod secrets_kept;
#[path = "proxy/sharing.rs"]
mod sharing;
#[path = "proxy/stream.rs"]
mod stream;
#[path = "proxy/success.rs"]
mod success;
#[path = "proxy/tls.rs"]
mod tls;
#[path = "proxy/tls_revoked.rs"]
mod tls_revoked;
