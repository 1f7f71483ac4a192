//! kill -9 of a daemon with a record of promote, switchover or rejoin just on disk, restarted at once, and the same
//! command again. Here a sample: of a switchover the first record, a late one and one drawn (another one every day, or
//! by PORTCULLIS_SEED), of the others one or two. All of them, one after another: `make soak SOAK=crash-points`.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::sys::Outcome;
use crate::in_lab;
use crate::random::play::crash::{On, Point, What, crash_round};
use crate::random::play::stage::TELL_LIVE;
use std::sync::atomic::Ordering;

#[test]
fn a_daemon_that_dies_at_a_record_of_a_switchover_finishes_it() {
    points(
        "crashswitch",
        &[
            (What::Switchover, On::Worker, drawn(2, 9)),
            (What::Switchover, On::Worker, 1),
            (What::Switchover, On::Worker, 12),
            (What::Switchover, On::Active, 1),
        ],
    );
}

#[test]
fn a_daemon_that_dies_at_a_record_of_a_failover_or_a_rejoin_finishes_it() {
    points(
        "crashpromote",
        &[
            (What::Failover, On::Worker, drawn(2, 12)),
            (What::Rejoin, On::Worker, drawn(1, 2)),
            (What::Rejoin, On::Active, 1),
        ],
    );
}

/// One of `from..=to`, another one every day; the failure names it.
fn drawn(from: u32, to: u32) -> u32 {
    let seed = std::env::var("PORTCULLIS_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs() / 86_400);
    from + u32::try_from(seed.unwrap_or(day) % u64::from(to - from + 1)).unwrap_or(0)
}

fn points(name: &'static str, points: &[(What, On, u32)]) {
    // Shown when the test fails.
    TELL_LIVE.store(true, Ordering::Relaxed);
    in_lab(Options::new(name), |lab| {
        lab.start_pair()?;
        let mut first_id = 1;
        for (what, on, record) in points {
            one(lab, Point { what: *what, on: *on, record: *record }, first_id)?;
            first_id += 4;
        }
        Ok(())
    });
}

fn one(lab: &Lab, point: Point, first_id: u32) -> Outcome {
    let round = crash_round(lab, point, first_id)?;
    let report = &round.report;
    ensure!(report.violations.is_empty(), "{point}: {:?}\n{}", report.violations, report.story);
    ensure!(round.not_reached.is_none(), "{point}: there are only {:?} records", round.not_reached);
    ensure!(report.answers > 50, "{point}: {} answers prove nothing", report.answers);
    eprintln!("crash: {point}: exits {:?}, {} ms, {} answers", round.exits, round.took_ms, report.answers);
    Ok(())
}
