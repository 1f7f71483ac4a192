//! Conformance: the drivers people use, first against PostgreSQL itself, then through the gate in each pool mode.
//!
//! A test that passes directly passes through session mode. In transaction mode those in `transaction.txt` fail, with
//! the reason beside each, and no others. `cargo test --test drivers -- NAME...` runs the suites whose names contain
//! one of the words; `--compare` runs them through pgbouncer's transaction mode too (docs/conformance.md).
//!
//! What it is NOT: no measurement. It is its own harness, since suites are run and compared as wholes; the gate runs
//! in a process of its own (`gate.rs`), which is this program once more.

#![allow(clippy::unwrap_used)]

mod cases;
mod compare;
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
/// What fails in transaction mode by nature: `suite/test: reason`, a line each.
const TRANSACTION: &str = include_str!("transaction.txt");

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

/// Longest first.
fn suites() -> Vec<Suite> {
    let program = |name, command, at_least| Suite {
        name,
        limit: minutes(10),
        at_least,
        ours: true,
        apart: false,
        tls: false,
        kind: Kind::Program(command),
    };
    let ours = |name, cases| Suite {
        name,
        limit: minutes(10),
        at_least: 1,
        ours: true,
        apart: false,
        tls: false,
        kind: Kind::Cases(cases),
    };
    vec![
        Suite { ours: false, apart: true, ..program("asyncpg", program::asyncpg, 280) },
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
        Suite { tls: true, ..program("pgjdbc", program::pgjdbc, 30) },
    ]
}

/// What the runs of one suite said.
struct Verdict {
    suite: &'static str,
    text: String,
    passed: usize,
    wrong: Vec<String>,
    runs: Vec<(What, Outcomes)>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "gate") {
        return gate::serve(&arguments[1..]);
    }
    suite::shorten_panics();
    // `cargo test` hands its own flags on; a word is a filter.
    let words: Vec<&String> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let compare = arguments.iter().any(|word| word == "--compare");
    if compare {
        pgbouncer::must_be_there();
    }
    let wanted = |suite: &Suite| words.is_empty() || words.iter().any(|word| suite.name.contains(word.as_str()));
    let chosen: Vec<Suite> = suites().into_iter().filter(wanted).collect();
    let began = tokio::time::Instant::now();
    // Of the gate alone: PostgreSQL has none.
    let with_console = words.is_empty() || words.iter().any(|word| "console".contains(word.as_str()));
    let pg = prepare(&chosen, with_console);
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
    if with_console {
        let verdict = consoles(&pg);
        println!("{}", verdict.text);
        verdicts.lock().unwrap().push(verdict);
    }
    drop(pg);
    let mut verdicts = verdicts.into_inner().unwrap();
    if compare {
        verdicts.sort_by_key(|verdict| suites().iter().position(|suite| suite.name == verdict.suite));
        compare::tell(&mut verdicts);
    }
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
fn prepare(chosen: &[Suite], with_console: bool) -> Arc<Pg> {
    let any = |names: &[&str]| chosen.iter().any(|suite| names.contains(&suite.name));
    std::thread::scope(|scope| {
        let needs: [(bool, fn()); 4] = [
            (with_console || any(&["asyncpg", "psycopg", "libpq-pipeline"]), program::install_python),
            (any(&["node-postgres", "postgres.js"]), program::install_node),
            (any(&["sqlx"]), program::build_sqlx),
            (with_console || any(&["pgjdbc"]), program::build_jdbc),
        ];
        for (_, install) in needs.into_iter().filter(|(needed, _)| *needed) {
            scope.spawn(install);
        }
        Arc::new(Pg::start())
    })
}

/// What a suite is run against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    fn start(self, pg: &Pg, tls: bool) -> (Server, SocketAddr) {
        match self {
            What::Direct => (Server::Direct, SocketAddr::from(([127, 0, 0, 1], pg.port))),
            What::Gate(mode) => {
                let gate = Gate::start(pg.socket_dir(), mode, tls);
                let address = gate.address;
                (Server::Gate(gate, mode), address)
            }
            What::Pgbouncer => pgbouncer::start(pg, tls),
        }
    }
}

fn judge(suite: &Suite, pg: &Arc<Pg>, compare: bool) -> Verdict {
    let began = tokio::time::Instant::now();
    let mut verdict =
        Verdict { suite: suite.name, text: suite.name.to_owned(), passed: 0, wrong: Vec::new(), runs: Vec::new() };
    let direct = verdict.note(What::Direct, run(suite, What::Direct, pg));
    if passed(&direct).count() < suite.at_least {
        verdict.wrong.push(format!("{}: fewer than {} tests pass directly", suite.name, suite.at_least));
    }
    for (test, why) in failed(&direct) {
        if suite.ours {
            verdict.wrong.push(format!("{}/{test} directly: {why}", suite.name));
        } else {
            verdict.text += &format!("\n        fails directly: {test}: {why:.200}");
        }
    }
    // The modes side by side: each has a gate and a database of its own.
    std::thread::scope(|scope| {
        let whats = Mode::ALL.iter().copied().map(What::Gate).chain(compare.then_some(What::Pgbouncer));
        let runs: Vec<_> = whats.map(|what| (what, scope.spawn(move || run(suite, what, pg)))).collect();
        for (what, running) in runs {
            let found = verdict.note(what, running.join().expect("the suite itself does not panic"));
            if what != What::Pgbouncer {
                compare_with(suite.name, what, &direct, &found, &mut verdict);
            }
        }
    });
    verdict.text += &format!("\n    {:.1} s", began.elapsed().as_secs_f64());
    verdict
}

/// Drivers at the admin console, in each mode; all must pass.
fn consoles(pg: &Arc<Pg>) -> Verdict {
    let suite = "console";
    let mut verdict = Verdict { suite, text: suite.to_owned(), passed: 0, wrong: Vec::new(), runs: Vec::new() };
    for what in Mode::ALL.iter().copied().map(What::Gate) {
        let began = tokio::time::Instant::now();
        let (server, address) = what.start(pg, false);
        let target = Target { server, address, database: "portcullis".to_owned(), pg: Arc::clone(pg) };
        let board = Board::default();
        for command in program::consoles(&target) {
            program::run(command, minutes(5), &board);
        }
        let found = verdict.note(what, Run { outcomes: board.take(), took: began.elapsed() });
        let wrong = failed(&found).map(|(test, why)| format!("{suite}/{test} in {} mode: {why}", what.name()));
        verdict.wrong.extend(wrong);
        // The two programs themselves are one line.
        if passed(&found).count() < 5 {
            verdict.wrong.push(format!("{suite}: fewer tests than there are in {} mode", what.name()));
        }
    }
    verdict
}

impl Verdict {
    fn note(&mut self, what: What, run: Run) -> Outcomes {
        // What pgbouncer cannot do is no fault of ours, nor its merit.
        self.passed += if what == What::Pgbouncer { 0 } else { passed(&run.outcomes).count() };
        self.text += &format!(
            "\n    {:<12} {:>4} passed, {:>2} failed, {:>2} skipped, {:>5.1} s",
            what.name(),
            passed(&run.outcomes).count(),
            failed(&run.outcomes).count(),
            run.outcomes.values().filter(|outcome| **outcome == Outcome::Skipped).count(),
            run.took.as_secs_f64(),
        );
        self.runs.push((what, run.outcomes.clone()));
        run.outcomes
    }
}

struct Run {
    outcomes: Outcomes,
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

/// One suite against one server, in a database of its own. No test is run twice.
fn run(suite: &Suite, what: What, pg: &Arc<Pg>) -> Run {
    let began = tokio::time::Instant::now();
    let board = Board::default();
    let pg = if suite.apart { Arc::new(Pg::start()) } else { Arc::clone(pg) };
    let (server, address) = what.start(&pg, suite.tls);
    // asyncpg's pool tests name it.
    let database = if suite.apart { "postgres".to_owned() } else { database(suite, what) };
    if !suite.apart {
        pg.admin(&format!("create database {database}")).expect("a database");
    }
    let target = Arc::new(Target { server, address, database, pg });
    suite.run(&target, &board);
    if target.gate().is_some_and(|gate| !gate.is_alive()) {
        board.put("(the gate lives on)", Outcome::Failed("the gate's process ended: it panicked".to_owned()));
    }
    Run { outcomes: board.take(), took: began.elapsed() }
}

fn database(suite: &Suite, what: What) -> String {
    format!("{}_{}", suite.name, what.name()).replace(['-', '.'], "_")
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
