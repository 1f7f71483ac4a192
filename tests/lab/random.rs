//! The soak in small: two seeded schedules and three races on one pair, and the judge that they lean on. `make soak`
//! plays hundreds.

#[path = "../soak/play/mod.rs"]
pub(crate) mod play;

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::sys::{Fail, Outcome, millis, pause, secs, wait_until};
use crate::in_lab;
use play::plan::plan;
use play::race::{Start, race_round};
use play::run::random_run;
use play::stage::{Stage, TELL_LIVE};
use play::trace::{Ack, Look, overlaps, two_active};
use portcullis::base::time::Instant;
use std::sync::atomic::Ordering;

/// Schedules short enough for every day: together they freeze, cut, kill and promote.
const SEEDS: [u64; 2] = [3, 7];

#[test]
fn two_seeded_schedules_never_serve_twice() {
    // Shown when the test fails.
    TELL_LIVE.store(true, Ordering::Relaxed);
    in_lab(Options::new("random"), |lab| {
        lab.start_pair()?;
        let mut first_id = 1;
        for seed in SEEDS {
            let report = random_run(lab, seed, first_id)?;
            ensure!(report.violations.is_empty(), "seed {seed}: {:?}\n{}", report.violations, report.story);
            ensure!(report.answers > 50, "seed {seed}: {} answers prove nothing", report.answers);
            eprintln!("random: seed {seed}: {} answers, {} services", report.answers, report.services);
            first_id += 4;
            whole_again(lab, report.active)?;
        }
        Ok(())
    });
}

#[test]
fn three_races_have_one_winner_each() {
    TELL_LIVE.store(true, Ordering::Relaxed);
    in_lab(Options::new("race"), |lab| {
        lab.start_pair()?;
        let mut first_id = 1;
        for start in [Start::FencedApart, Start::CutOff, Start::PowerLost] {
            let round = race_round(lab, start, first_id)?;
            let report = &round.report;
            ensure!(report.violations.is_empty(), "{start:?}: {:?}\n{}", report.violations, report.story);
            eprintln!("race: {start:?}: {} took over, {} services", round.took, report.services);
            first_id += 4;
            whole_again(lab, report.active)?;
        }
        Ok(())
    });
}

#[test]
fn a_command_in_a_frozen_machine_ends_with_thaw_or_power() {
    in_lab(Options::new("doors"), |lab| {
        let host = &lab.b.host;
        let sleeps =
            |seconds: &str| host.exec_within(secs(30), "", &["sleep", seconds]).map(|out| out.status.success());
        let asleep = || wait_until(secs(60), "the command to run", || Ok(host.processes()?.len() > 2));
        std::thread::scope(|scope| {
            let command = scope.spawn(|| sleeps("1"));
            asleep()?;
            host.freeze()?;
            pause(millis(200));
            host.thaw()?;
            ensure!(command.join().unwrap()?, "the command did not go on after the thaw");
            let command = scope.spawn(|| sleeps("20"));
            asleep()?;
            host.freeze()?;
            pause(millis(200));
            host.power_off()?;
            ensure!(!command.join().unwrap()?, "the command outlived its machine");
            Ok(())
        })
    });
}

fn whole_again(lab: &Lab, active: Option<usize>) -> Outcome {
    let active = active.ok_or("nobody serves")?;
    let stage = Stage::new(lab);
    stage.restore(active).map(drop).map_err(|error| Fail(format!("{error}\n{}", stage.story())))
}

fn at(millis: u64) -> Instant {
    Instant::from_nanos(millis * 1_000_000)
}

fn ack(node: usize, timeline: u32, millis: u64) -> Ack {
    Ack { client: 1, node, n: millis, asked: at(millis - 1), at: at(millis), timeline }
}

fn look(node: usize, epoch: u64, from: u64) -> Look {
    let (asked, answered) = (at(from), at(from + 5));
    Look { node, asked, answered, active: true, open: true, complete: epoch, won: epoch, lease_ms: 1, cuts: 0 }
}

#[test]
fn the_judge_sees_what_it_must() {
    // There and back in order is no overlap; an answer of the old node after one of the new is.
    let there_and_back = [ack(0, 1, 10), ack(0, 1, 20), ack(1, 2, 30), ack(1, 2, 40), ack(0, 3, 50)];
    assert!(overlaps(&there_and_back).is_empty());
    assert_eq!(overlaps(&[ack(0, 1, 10), ack(1, 2, 30), ack(0, 1, 31)]).len(), 1);
    // Two promotions of one parent make the same timeline twice.
    assert_eq!(overlaps(&[ack(0, 2, 10), ack(1, 2, 20), ack(0, 2, 30)]).len(), 1);

    assert!(two_active(&[look(0, 1, 10), look(0, 1, 20), look(1, 2, 30), look(0, 3, 40)]).is_empty());
    assert_eq!(two_active(&[look(0, 1, 10), look(1, 2, 20), look(0, 1, 40)]).len(), 1);
    // Two looks that overlap prove nothing; one epoch on two nodes does, whenever it was seen.
    assert!(two_active(&[look(0, 1, 10), look(1, 2, 20), look(0, 1, 22)]).is_empty());
    assert_eq!(two_active(&[look(0, 4, 10), look(1, 4, 200)]).len(), 2);
}

#[test]
fn a_seed_means_one_schedule() {
    for seed in 0..200 {
        let steps = plan(seed);
        assert_eq!(steps, plan(seed));
        assert!((5..=10).contains(&steps.len()), "seed {seed} has {} steps", steps.len());
        assert!(steps.windows(2).all(|pair| pair[0].due <= pair[1].due));
        let last = steps.last().map_or(0, |step| step.due.as_secs());
        assert!(last <= 25, "seed {seed} ends after {last} s");
    }
    assert_ne!(plan(1), plan(2));
}
