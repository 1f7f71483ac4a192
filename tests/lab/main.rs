//! The lab tests: the faults of the real world on two nodes of real PostgreSQL in network namespaces, as root. What is
//! claimed is measured at clients, by acknowledgements with the time they came, never by closed sockets.
//!
//! A few labs stand at once ([`turns`]).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod harness;

mod alone;
mod audit;
mod away;
mod behind;
mod carried;
mod claims;
mod claims_boot;
mod claims_pause;
mod claims_postgres;
mod claims_sessions;
mod commands;
mod crash_points;
mod doctor;
mod drill;
mod faults;
mod forward;
mod guide;
mod harness_itself;
mod ipv6;
mod maintenance;
mod night;
mod observe;
mod pause;
mod planned;
mod pooled;
mod random;
mod record;
mod rejoined;
mod restart;
mod side_doors;
mod stonith;
mod third;
mod turns;
mod units;
mod vip;
mod vip_full;
mod vip_only;
mod walk;
mod witness_faults;
mod witness_kinds;

use harness::Lab;
use harness::config::Options;
use harness::sys::{Fail, Outcome};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use turns::Turn;

/// Builds the lab, runs the test in it, and on failure shows everybody's logs before the lab is torn down.
/// `LAB_LOGS=DIR` copies the logs there in any case.
fn in_lab(options: Options, test: impl FnOnce(&Lab) -> Outcome) {
    let turn = Turn::wait(options.name, false);
    run_in_lab(turn, options, test);
}

/// The same with the machine to itself, for measurements that a busy one would spoil.
fn alone_in_lab(options: Options, test: impl FnOnce(&Lab) -> Outcome) {
    let turn = Turn::wait(options.name, true);
    run_in_lab(turn, options, test);
}

fn run_in_lab(_turn: Turn, options: Options, test: impl FnOnce(&Lab) -> Outcome) {
    let start = harness::sys::now();
    let name = options.name;
    let lab = Lab::new(options).unwrap_or_else(|error| panic!("the lab {name} cannot be built: {error}"));
    let built = harness::sys::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&lab))).unwrap_or_else(|_| Err(Fail("panicked".to_owned())));
    let ended = harness::sys::now();
    if let Err(error) = &outcome {
        // All machines go on again, or the diagnosis waits for the stopped ones.
        let third = lab.c.as_ref().map(|node| &node.host);
        for host in [&lab.a.host, &lab.b.host, &lab.witness.host].into_iter().chain(third) {
            let _ = host.thaw();
        }
        eprintln!("\n##### {name} failed: {error}\n{}##### {name} failed: {error}", lab.diagnosis());
    }
    if let Some(dir) = std::env::var_os("LAB_LOGS") {
        let _ = lab.save_logs(Path::new(&dir));
    }
    drop(lab);
    let (built, ran) = (harness::sys::ms(start, built), harness::sys::ms(built, ended));
    eprintln!("{name}: lab built in {built} ms, test ran {ran} ms");
    if let Err(error) = outcome {
        panic!("{name}: {error}");
    }
}
