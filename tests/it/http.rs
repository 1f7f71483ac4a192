//! The status pages, the control stream, the client and the texts, over loopback and a real Unix socket, with
//! hand-made snapshots of every state.

#![allow(clippy::unwrap_used)] // Tests and their helpers may.

#[path = "http/browser.rs"]
mod browser;
#[path = "http/cgi.rs"]
mod cgi;
#[path = "http/client.rs"]
mod client;
#[path = "http/control.rs"]
mod control;
#[path = "http/live.rs"]
mod live;
#[path = "http/metrics.rs"]
mod metrics;
#[path = "http/pages.rs"]
mod pages;
#[path = "http/render.rs"]
mod render;
#[path = "http/screens.rs"]
mod screens;
#[path = "http/states.rs"]
mod states;
#[path = "http/words.rs"]
mod words;
