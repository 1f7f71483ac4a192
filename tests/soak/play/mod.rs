//! The parts of the long runs: what clients and watchers saw and what follows from it, seeded schedules, the stage they
//! are played on, and the race. Shared by `make soak` and, in small, by the lab suite.
//!
//! It is NOT the simulator: here are real daemons, real PostgreSQL, real BIND and real wires.
#![allow(dead_code, reason = "the lab suite and the soak program each use their part")]

pub mod bench;
pub mod clients;
pub mod crash;
pub mod eyes;
pub mod plan;
pub mod race;
pub mod readers;
pub mod run;
pub mod stage;
pub mod trace;
