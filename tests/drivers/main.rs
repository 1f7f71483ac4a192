//! Conformance: the drivers people use, first against PostgreSQL itself, then through the gate in each pool mode.
//!
//! A test that passes directly passes through session mode. In transaction mode those in `transaction.txt` fail, with
//! the reason beside each, and no others. `cargo test --test drivers -- NAME...` runs the suites whose names contain
//! one of the words; `--pgbouncer` compares with pgbouncer's transaction mode instead (docs/conformance.md).
//!
//! What it is NOT: no measurement. It is its own harness, since suites are run and compared as wholes; the gate runs
//! in a process of its own (`gate.rs`), which is this program once more.

#![allow(clippy::unwrap_used)]

mod cases;
mod decoders;
#[allow(dead_code)]
#[path = "../it/proxy/front.rs"]
mod front;
mod gate;
mod pg;
mod pgbouncer;
mod program;
#[allow(dead_code)]
#[path = "../it/proxy/raw.rs"]
mod raw;
mod suite;

use gate::{Gate, Mode};
use pg::Pg;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use suite::{Board, Kind, Outcome, Server, Suite, Target};

/// Suites at a time: they wait more than they work.
const AT_A_TIME: usize = 4;
/// A suite that fails as a whole is not run test by test.
const SECOND_CHANCES: usize = 20;
/// What fails in transaction mode by nature: `suite/test: reason`, a line each.
const TRANSACTION: &str = include_str!("transaction.txt");

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

/// Longest first.
fn suites() -> Vec<Suite> {
    let program = |name, command, at_least| Suite {
        name,
        limit: minutes(5),
        at_least,
        ours: true,
        apart: false,
        kind: Kind::Program(command),
    };
    let ours = |name, cases| Suite {
        name,
        limit: minutes(8),
        at_least: 1,
        ours: true,
        apart: false,
        kind: Kind::Cases(cases),
    };
    vec![
        Suite { ours: false, apart: true, limit: minutes(8), ..program("asyncpg", program::asyncpg, 280) },
        ours("stream", cases::stream::cases),
        ours("cancel", cases::cancel::cases),
        ours("tools", cases::tools::cases),
        ours("fuzz", cases::fuzz::cases),
        ours("tokio-postgres", cases::tokio_postgres::cases),
        program("psycopg", program::psycopg, 20),
        program("libpq-pipeline", program::libpq_pipeline, 10),
        program("node-postgres", program::node_postgres, 15),
        program("postgres.js", program::postgres_js, 15),
        program("sqlx", program::sqlx, 10),
    ]
}

/// What a run of one suite said.
struct Verdict {
    text: String,
    passed: usize,
    wrong: Vec<String>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "gate") {
        return gate::serve(&arguments[1..]);
    }
    suite::shorten_panics();
    // `cargo test` hands its own flags on; a word is a filter.
    let words: Vec<&String> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let compare = arguments.iter().any(|word| word == "--pgbouncer");
    let wanted = |suite: &Suite| words.is_empty() || words.iter().any(|word| suite.name.contains(word.as_str()));
    let chosen: Vec<Suite> = suites().into_iter().filter(wanted).collect();
    let began = tokio::time::Instant::now();
    let pg = prepare(&chosen);
    println!("ready after {:.1} s", began.elapsed().as_secs_f64());

    let queue: Mutex<VecDeque<Suite>> = Mutex::new(chosen.into());
    let verdicts: Mutex<Vec<Verdict>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(suite) = { queue.lock().unwrap().pop_front() } {
                    let verdict = judge(&suite, &pg, compare);
                    println!("{}", verdict.text);
                    verdicts.lock().unwrap().push(verdict);
                }
            });
        }
    });
    drop(pg);
    let verdicts = verdicts.into_inner().unwrap();
    let wrong: Vec<&String> = verdicts.iter().flat_map(|verdict| &verdict.wrong).collect();
    for line in &wrong {
        println!("FAILED {line}");
    }
    let passed: usize = verdicts.iter().map(|verdict| verdict.passed).sum();
    let word = if wrong.is_empty() && passed > 0 { "ok" } else { "FAILED" };
    let (failed, seconds) = (wrong.len(), began.elapsed().as_secs_f64());
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; finished in {seconds:.2}s");
    std::process::exit(i32::from(word != "ok"));
}

/// Starts PostgreSQL and installs what the chosen suites need.
fn prepare(chosen: &[Suite]) -> Arc<Pg> {
    let any = |names: &[&str]| chosen.iter().any(|suite| names.contains(&suite.name));
    std::thread::scope(|scope| {
        let needs: [(bool, fn()); 3] = [
            (any(&["asyncpg", "psycopg", "libpq-pipeline"]), program::install_python),
            (any(&["node-postgres", "postgres.js"]), program::install_node),
            (any(&["sqlx"]), program::build_sqlx),
        ];
        for (_, install) in needs.into_iter().filter(|(needed, _)| *needed) {
            scope.spawn(install);
        }
        Arc::new(Pg::start())
    })
}

/// What a suite is run against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Direct,
    Gate(Mode),
    Pgbouncer,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Direct => "direct",
            What::Gate(mode) => mode.name(),
            What::Pgbouncer => "pgbouncer",
        }
    }

    fn start(self, pg: &Pg) -> (Server, SocketAddr) {
        match self {
            What::Direct => (Server::Direct, SocketAddr::from(([127, 0, 0, 1], pg.port))),
            What::Gate(mode) => {
                let gate = Gate::start(pg.socket_dir(), mode);
                let address = gate.address;
                (Server::Gate(gate, mode), address)
            }
            What::Pgbouncer => pgbouncer::start(pg),
        }
    }
}

fn judge(suite: &Suite, pg: &Arc<Pg>, compare: bool) -> Verdict {
    let began = tokio::time::Instant::now();
    let mut verdict = Verdict { text: suite.name.to_owned(), passed: 0, wrong: Vec::new() };
    let expected = run(suite, What::Direct, pg, None);
    verdict.note("direct", &expected);
    if passed(&expected.outcomes).count() < suite.at_least {
        verdict.wrong.push(format!("{}: fewer than {} tests pass directly", suite.name, suite.at_least));
    }
    for (test, why) in failed(&expected.outcomes) {
        if suite.ours {
            verdict.wrong.push(format!("{}/{test} directly: {why}", suite.name));
        } else {
            verdict.text += &format!("\n        fails directly: {test}: {why:.200}");
        }
    }
    // The modes side by side: each has a gate and a database of its own.
    std::thread::scope(|scope| {
        let whats = if compare { vec![What::Pgbouncer] } else { Mode::ALL.iter().copied().map(What::Gate).collect() };
        let runs = whats.into_iter().map(|what| {
            let expected = &expected.outcomes;
            (what, scope.spawn(move || run(suite, what, pg, Some(expected))))
        });
        for (what, running) in runs.collect::<Vec<_>>() {
            let found = running.join().expect("the suite itself does not panic");
            verdict.note(what.name(), &found);
            compare_with(suite.name, what, &expected.outcomes, &found.outcomes, &mut verdict);
        }
    });
    verdict.text += &format!("\n    {:.1} s", began.elapsed().as_secs_f64());
    verdict
}

impl Verdict {
    fn note(&mut self, name: &str, run: &Run) {
        self.passed += passed(&run.outcomes).count();
        self.text += &format!(
            "\n    {name:<12} {:>4} passed, {:>2} failed, {:>2} skipped, {:>5.1} s",
            passed(&run.outcomes).count(),
            failed(&run.outcomes).count(),
            run.outcomes.values().filter(|outcome| **outcome == Outcome::Skipped).count(),
            run.took.as_secs_f64(),
        );
        if !run.again.is_empty() {
            self.text += &format!("\n        {} had a second chance alone: {}", run.again.len(), run.again.join(" "));
        }
    }
}

struct Run {
    outcomes: Outcomes,
    /// Those that had a second chance.
    again: Vec<String>,
    took: Duration,
}

type Outcomes = BTreeMap<String, Outcome>;

fn passed(outcomes: &Outcomes) -> impl Iterator<Item = &String> {
    outcomes.iter().filter(|(_, outcome)| **outcome == Outcome::Passed).map(|(test, _)| test)
}

fn failed(outcomes: &Outcomes) -> impl Iterator<Item = (&String, &String)> {
    outcomes.iter().filter_map(|(test, outcome)| match outcome {
        Outcome::Failed(why) => Some((test, why)),
        _ => None,
    })
}

/// One suite against one server. Others' tests that fail here and not directly are run once more, alone and in a fresh
/// database: what another test left behind (transaction mode has no sessions to clean up) and what is a matter of time
/// is not the gate's. A test written for this is never run twice, nor one that is known to fail.
fn run(suite: &Suite, what: What, pg: &Arc<Pg>, expected: Option<&Outcomes>) -> Run {
    let began = tokio::time::Instant::now();
    let board = Board::default();
    attempt(suite, what, pg, &[&[]], &board);
    let mut outcomes = board.take();
    let known: BTreeMap<&str, &str> = excused(suite.name).collect();
    let again: Vec<String> = outcomes
        .iter()
        .filter(|(test, outcome)| {
            let passed_directly = expected.and_then(|all| all.get(*test)) == Some(&Outcome::Passed);
            let known = what != What::Gate(Mode::Session) && known.contains_key(test.as_str());
            !suite.ours && !known && passed_directly && matches!(outcome, Outcome::Failed(_))
        })
        .map(|(test, _)| test.clone())
        .take(SECOND_CHANCES)
        .collect();
    if !again.is_empty() {
        let alone: Vec<&[String]> = again.iter().map(std::slice::from_ref).collect();
        attempt(suite, what, pg, &alone, &board);
        outcomes.extend(board.take().into_iter().filter(|(test, _)| again.contains(test)));
    }
    Run { outcomes, again, took: began.elapsed() }
}

/// Runs these groups of tests (empty: all), each in a database of its own.
fn attempt(suite: &Suite, what: What, pg: &Arc<Pg>, groups: &[&[String]], board: &Board) {
    let pg = if suite.apart { Arc::new(Pg::start()) } else { Arc::clone(pg) };
    let (server, address) = what.start(&pg);
    let mut target = Target { server, address, database: String::new(), pg: Arc::clone(&pg) };
    for (number, group) in groups.iter().enumerate() {
        target.database = match group {
            // asyncpg's pool tests name it.
            [] if suite.apart => "postgres".to_owned(),
            [] => format!("{}_{}", suite.name, what.name()).replace(['-', '.'], "_"),
            _ => format!("alone_{number}"),
        };
        if target.database != "postgres" {
            pg.admin(&format!("create database {}", target.database)).expect("a database");
        }
        let shared = Arc::new(target);
        suite.run(&shared, group, board);
        if shared.gate().is_some_and(|gate| !gate.is_alive()) {
            board.put("(the gate lives on)", Outcome::Failed("the gate's process ended: it panicked".to_owned()));
        }
        // A case that hangs may hold on to it; then this was the last group.
        let Ok(back) = Arc::try_unwrap(shared).map_err(drop) else { return };
        target = back;
    }
}

/// Tests that pass directly and fail here; and, in transaction mode, whether they are those we know.
fn compare_with(suite: &str, what: What, expected: &Outcomes, found: &Outcomes, verdict: &mut Verdict) {
    let known: BTreeMap<&str, &str> = match what {
        What::Gate(Mode::Transaction) => excused(suite).collect(),
        _ => BTreeMap::new(),
    };
    let name = what.name();
    let gate_died = found.iter().filter(|(test, _)| test.starts_with('('));
    for (test, outcome) in expected.iter().filter(|(_, outcome)| **outcome == Outcome::Passed).chain(gate_died) {
        let why = match (outcome, found.get(test)) {
            (_, Some(Outcome::Passed)) => {
                if known.contains_key(test.as_str()) {
                    verdict.wrong.push(format!("{suite}/{test} in {name} mode passes, but is in transaction.txt"));
                }
                continue;
            }
            (_, Some(Outcome::Failed(why))) => why.as_str(),
            (_, Some(Outcome::Skipped)) => "skips itself",
            (_, None) => "was not run",
        };
        if !known.contains_key(test.as_str()) {
            let line = format!("{suite}/{test} in {name} mode: {why}");
            if !verdict.wrong.contains(&line) {
                verdict.wrong.push(line);
            }
        }
    }
    for test in known.keys().filter(|test| !expected.contains_key(**test)) {
        verdict.wrong.push(format!("{suite}/{test} is in transaction.txt, but is no test"));
    }
}

/// The tests of a suite that fail in transaction mode, and why.
fn excused(suite: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = TRANSACTION.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(move |line| {
        let (test, reason) = line.split_once(": ").expect("transaction.txt: suite/test: reason");
        Some((test.strip_prefix(suite)?.strip_prefix('/')?, reason))
    })
}
