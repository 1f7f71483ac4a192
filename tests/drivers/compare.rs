//! `--compare`: which tests fail through pgbouncer and which through the gate, both in transaction mode.
//!
//! The aim of docs/conformance.md: what passes directly and through pgbouncer passes through the gate. A test that does
//! not is a failure of the run. What it is NOT: part of `make test`.

use crate::gate::Mode;
use crate::suite::Outcome;
use crate::{Outcomes, Verdict, What, passed, pgbouncer};

const TRANSACTION: What = What::Gate(Mode::Transaction);
const ALL: [What; 4] = [What::Direct, What::Gate(Mode::Session), TRANSACTION, What::Pgbouncer];

fn of(verdict: &Verdict, what: What) -> &Outcomes {
    let run = verdict.runs.iter().find(|(found, _)| *found == what);
    &run.expect("each suite was run against all of them").1
}

/// Tests that pass directly and fail here, and why: one that did not report has failed.
fn lost(verdict: &Verdict, what: What) -> Vec<(&str, &str)> {
    let found = of(verdict, what);
    let why = |test: &String| match found.get(test) {
        Some(Outcome::Passed) => None,
        Some(Outcome::Failed(why)) => Some(why.as_str()),
        Some(Outcome::Skipped) => Some("skips itself"),
        None => Some("was not run"),
    };
    tests(verdict).filter_map(|test| Some((test.as_str(), why(test)?))).collect()
}

/// Those that pass directly, less what is said of a program as a whole.
fn tests(verdict: &Verdict) -> impl Iterator<Item = &String> {
    passed(of(verdict, What::Direct)).filter(|test| !test.starts_with('('))
}

/// Prints the table of docs/conformance.md and both lists. What only we fail is wrong.
pub fn tell(verdicts: &mut [Verdict]) {
    println!("\nPassed, of the tests that pass directly; pgbouncer is {}\n", pgbouncer::version());
    println!("| suite | direct | session | transaction | pgbouncer, transaction |\n|---|---|---|---|---|");
    for verdict in verdicts.iter() {
        let direct = tests(verdict).count();
        let counts = ALL.map(|what| (direct - lost(verdict, what).len()).to_string());
        println!("| {} | {} |", verdict.suite, counts.join(" | "));
    }
    // Where it fails; where it is looked up; whether it fails there too.
    for (heading, here, there, too) in [
        ("Fail through pgbouncer and not through us", What::Pgbouncer, TRANSACTION, false),
        ("Fail through both", TRANSACTION, What::Pgbouncer, true),
        ("Fail through us and not through pgbouncer", TRANSACTION, What::Pgbouncer, false),
    ] {
        println!("\n{heading}:");
        for verdict in verdicts.iter_mut() {
            let elsewhere = lost(verdict, there);
            let fails_there = |test: &str| elsewhere.iter().any(|(other, _)| *other == test);
            let chosen = lost(verdict, here).into_iter().filter(|(test, _)| fails_there(test) == too);
            let line = |(test, why): (&str, &str)| format!("{}/{test}: {:.160}", verdict.suite, why.replace('\n', " "));
            let lines: Vec<String> = chosen.map(line).collect();
            for line in &lines {
                println!("  {line}");
            }
            if here == TRANSACTION && !too {
                let wrong = lines.into_iter().map(|line| format!("through us and not through pgbouncer: {line}"));
                verdict.wrong.extend(wrong);
            }
        }
    }
}
