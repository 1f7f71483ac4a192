//! `make soak`: the long runs on real parts. `steady` is an hour of bad weather without a cut, `random` plays seeded
//! faults against a pair and looks for two nodes that serve or a write that is gone, `race` promotes both at once,
//! `crash-points` has a daemon die at every record of every procedure, `power-off` pulls the plug of the active node a
//! hundred times, `switchover` measures what clients see of one, `rejoin` copies and rewinds gigabytes.
//!
//! Without a word it runs all with their defaults. It prints a line per step, a summary, and `figure:` lines, and
//! ends with 1 on any violation; the logs of a failed run are kept below `target/soak`.

#[path = "../lab/harness/mod.rs"]
#[macro_use]
mod harness;
mod copies;
mod play;
mod power_off;
mod steady;
mod switchovers;
mod table;

use clap::{Parser, Subcommand};
use harness::Lab;
use harness::config::Options;
use harness::sys::{Fail, Outcome, ms, now, pause, secs};
use harness::witness::Kind;
use play::crash::{LINES, Point, crash_round};
use play::race::{STARTS, race_round};
use play::run::{Report, random_run};
use play::stage::{Recovery, Stage};
use portcullis::base::time::{Duration, Instant};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// All deadlines of one run, its mending and a pair built anew, with room to spare.
const STEP_LIMIT: Duration = secs(900);

#[derive(Parser)]
#[command(about = "Long runs against real PostgreSQL, BIND and the daemons, in namespaces of their own (root)")]
struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Print what is done and said as it happens, in every run
    #[arg(long, global = true)]
    story: bool,
}

#[derive(Subcommand, Clone, Debug)]
enum What {
    /// Lost packets, DNS restarts, short stalls: not one cut, not one client error
    Steady {
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// Per cent of all packets through the switch
        #[arg(long, default_value_t = 1)]
        loss: u32,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Seeded faults and commands at random moments, with clients at both gates
    Random {
        #[arg(long, default_value_t = 200)]
        runs: u64,
        /// Of the first run; each further run takes the next number
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Pairs at once, each in a process of its own
        #[arg(long, default_value_t = 1)]
        parallel: u64,
    },
    /// Both nodes promoted at once
    Race {
        #[arg(long, default_value_t = 100)]
        rounds: u64,
    },
    /// The active node loses power under load; promote on the other, rejoin, and again the other way
    PowerOff {
        #[arg(long, default_value_t = 100)]
        rounds: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The embedded witness instead of BIND
        #[arg(long)]
        embedded: bool,
        /// Nobody loses power: the active node is fenced, and confirms to the other that it serves no longer
        #[arg(long)]
        released: bool,
    },
    /// Switchovers there and back under load: failed transactions, and how long clients are held
    Switchover {
        #[arg(long, default_value_t = 20)]
        rounds: u64,
        #[arg(long, default_value_t = 16)]
        clients: u32,
        /// Sixteen clients of pgbench beside our own
        #[arg(long)]
        pgbench: bool,
        /// A gigabyte of dirty shared buffers before each
        #[arg(long)]
        dirty: bool,
        #[arg(long, default_value = "transaction")]
        pool: Pool,
    },
    /// A node of several gigabytes rejoins, from nothing and by a rewind: how long, and how honest its progress
    Rejoin {
        #[arg(long, default_value_t = 5)]
        gib: u64,
    },
    /// kill -9 of a daemon at every record of promote, switchover and rejoin
    CrashPoints {
        /// Of each procedure and side the first record to begin with
        #[arg(long, default_value_t = 1)]
        from: u32,
        /// Only every so manieth record
        #[arg(long, default_value_t = 1)]
        step: u32,
    },
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Pool {
    Transaction,
    Session,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("soak: network namespaces need root; run it with sudo");
        return ExitCode::FAILURE;
    }
    play::stage::TELL_LIVE.store(args.story, Ordering::Relaxed);
    let all = [
        What::Race { rounds: 100 },
        What::CrashPoints { from: 1, step: 1 },
        What::PowerOff { rounds: 100, seed: 1, embedded: false, released: false },
        What::Switchover { rounds: 20, clients: 16, pgbench: false, dirty: false, pool: Pool::Transaction },
        What::Random { runs: 200, seed: 1, parallel: 1 },
        What::Steady { minutes: 60, loss: 1, seed: 1 },
    ];
    let todo = args.what.map_or_else(|| all.to_vec(), |one| vec![one]);
    let mut good = true;
    for what in todo {
        match run(&what) {
            Ok(clean) => good &= clean,
            Err(error) => {
                eprintln!("soak: {error}");
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(what: &What) -> Outcome<bool> {
    match *what {
        What::Steady { minutes, loss, seed } => steadily(steady::Weather { minutes, loss_percent: loss, seed }),
        What::Random { runs, seed, parallel: 0 | 1 } => random(runs, seed),
        What::Random { runs, seed, parallel } => in_parallel(runs, seed, parallel.min(runs)),
        What::Race { rounds } => race(rounds),
        What::PowerOff { rounds, seed, embedded, released } => power_offs(rounds, seed, embedded, released),
        What::Switchover { rounds, clients, pgbench, dirty, pool } => {
            switchover(switchovers::Wanted { rounds, clients, pgbench, dirty }, pool)
        }
        What::Rejoin { gib } => rejoins(gib),
        What::CrashPoints { from, step } => crash_points(from.max(1), step.max(1)),
    }
}

fn steadily(weather: steady::Weather) -> Outcome<bool> {
    let lab = new_pair("soaksteady")?;
    println!("steady: {} minutes, {} % loss", weather.minutes, weather.loss_percent);
    let _watchdog = Watchdog::start(secs(weather.minutes * 60) + STEP_LIMIT);
    let report = steady::steady(&lab, &weather, |line| println!("steady: {line}"))?;
    for figure in &report.figures {
        println!("figure: {figure}");
    }
    for violation in &report.violations {
        println!("VIOLATION: {violation}");
    }
    if !report.violations.is_empty() {
        keep(&lab, &format!("steady-{}", weather.seed), &report.violations.join("\n"))?;
    }
    Ok(report.violations.is_empty())
}

fn random(runs: u64, seed: u64) -> Outcome<bool> {
    let mut pairs = Pairs::new("soakrandom");
    let mut sum = Sum::default();
    let watchdog = Watchdog::start(STEP_LIMIT);
    for index in 0..runs {
        watchdog.feed();
        let seed = seed + index;
        let began = now();
        let first_id = pairs.next_ids();
        let report = random_run(pairs.lab()?, seed, first_id)?;
        println!("random {}/{runs}: {} in {} ms", index + 1, line(&report), ms(began, now()));
        sum.add(&report);
        pairs.after(&report, &format!("seed-{seed}"))?;
    }
    sum.print("random", runs, &pairs);
    println!("figure: random: {} runs, {} of them with a violation, seed {seed} and up", runs, sum.bad.len());
    for seed in &sum.bad {
        println!("VIOLATION at seed {seed}: target/debug/examples/soak random --runs 1 --seed {seed}");
    }
    Ok(sum.bad.is_empty())
}

fn race(rounds: u64) -> Outcome<bool> {
    let mut pairs = Pairs::new("soakrace");
    let mut sum = Sum::default();
    let mut took = [0u64; 3];
    let mut number = 0;
    let watchdog = Watchdog::start(STEP_LIMIT);
    for start in STARTS.iter().cycle().take(usize::try_from(rounds).unwrap_or(usize::MAX)) {
        watchdog.feed();
        number += 1;
        let began = now();
        let first_id = pairs.next_ids();
        let mut round = race_round(pairs.lab()?, *start, first_id)?;
        round.report.seed = number;
        let winners = round.took;
        took[winners.min(2)] += 1;
        println!(
            "race {number}/{rounds}: {start:?}, {winners} took over; {} in {} ms",
            line(&round.report),
            ms(began, now())
        );
        sum.add(&round.report);
        pairs.after(&round.report, &format!("race-{number}"))?;
    }
    sum.print("race", rounds, &pairs);
    println!(
        "figure: race: {rounds} rounds, {} with a violation; one node took over in {}, none in {} (the old one served \
         on), both in turn in {}",
        sum.bad.len(),
        took[1],
        took[0],
        took[2]
    );
    Ok(sum.bad.is_empty())
}

fn power_offs(rounds: u64, seed: u64, embedded: bool, released: bool) -> Outcome<bool> {
    let witness = if embedded { Kind::Embedded } else { Kind::Bind };
    let lab = started(Options { witness, ..Options::new("soakpower") })?;
    let watchdog = Watchdog::start(STEP_LIMIT);
    println!("power-off: {rounds} rounds, seed {seed}, witness {witness:?}, lease 3 s, poll 1 s, margin 200 ms");
    judged(&lab, &format!("power-off-{seed}"), power_off::power_off(&lab, rounds, seed, released, || watchdog.feed()))
}

fn switchover(wanted: switchovers::Wanted, pool: Pool) -> Outcome<bool> {
    let extra = match pool {
        Pool::Transaction => "[pool]\nmode = \"transaction\"\nsize = 40\n",
        Pool::Session => "[pool]\nmode = \"session\"\nsize = 40\n",
    };
    let lab = Lab::new(Options { extra, ..Options::new("soakswitch") })?;
    let watchdog = Watchdog::start(STEP_LIMIT);
    let ready = lab.start_servers().and_then(|()| {
        if wanted.dirty {
            switchovers::make_room(&lab)?;
        }
        lab.b.start_daemon()?;
        lab.a.start_daemon()?;
        lab.a.wait_active(secs(60))?;
        lab.a.wait_in_sync(secs(60)).map(drop)
    });
    ready.map_err(|error| Fail(format!("the pair does not start: {error}\n{}", lab.diagnosis())))?;
    println!("switchover: {wanted:?}, pool {pool:?}");
    judged(&lab, "switchover", switchovers::switchovers(&lab, wanted, || watchdog.feed()))
}

/// Prints what was violated, keeps what there is to look at, and says whether all was well.
fn judged(lab: &Lab, name: &str, outcome: Outcome<Vec<String>>) -> Outcome<bool> {
    let violations = outcome.unwrap_or_else(|error| vec![error.0]);
    for violation in &violations {
        println!("VIOLATION: {violation}");
    }
    if !violations.is_empty() {
        keep(lab, name, &violations.join("\n"))?;
    }
    Ok(violations.is_empty())
}

fn rejoins(gib: u64) -> Outcome<bool> {
    let lab = started(Options::new("soakrejoin"))?;
    let watchdog = Watchdog::start(STEP_LIMIT);
    println!("rejoin: a cluster of {gib} GiB and its indexes");
    judged(&lab, "rejoin", copies::rejoins(&lab, gib, || watchdog.feed()))
}

/// Every record of every procedure, until a round ends without a crash.
fn crash_points(from: u32, step: u32) -> Outcome<bool> {
    let mut pairs = Pairs::new("soakcrash");
    let mut sum = Sum::default();
    let watchdog = Watchdog::start(STEP_LIMIT);
    let (mut rounds, mut counts) = (0, Vec::new());
    for (what, on) in LINES {
        let mut record = from;
        let records = loop {
            watchdog.feed();
            rounds += 1;
            let first_id = pairs.next_ids();
            let mut round = crash_round(pairs.lab()?, Point { what, on, record }, first_id)?;
            round.report.seed = rounds;
            println!(
                "crash {what:?} {on:?} at record {record}: exits {:?}, {} ms; {}",
                round.exits,
                round.took_ms,
                line(&round.report)
            );
            if round.exits.len() > 2 {
                println!("{}", round.report.story);
            }
            sum.add(&round.report);
            pairs.after(&round.report, &format!("crash-{what:?}-{on:?}-{record}"))?;
            if let Some(records) = round.not_reached {
                break records;
            }
            record += step;
        };
        counts.push(format!("{what:?} {on:?} {records}"));
    }
    sum.print("crash", rounds, &pairs);
    println!("figure: crash: records of each: {}", counts.join(", "));
    println!("figure: crash: {rounds} rounds, {} with a violation", sum.bad.len());
    Ok(sum.bad.is_empty())
}

/// The runs dealt out to processes of their own, because the names of a lab hang on the process.
fn in_parallel(runs: u64, seed: u64, parallel: u64) -> Outcome<bool> {
    let me = std::env::current_exe()?;
    let mut children = Vec::new();
    let mut next = seed;
    for index in 0..parallel {
        let share = runs / parallel + u64::from(index < runs % parallel);
        let words = ["random", "--runs", &share.to_string(), "--seed", &next.to_string()].map(str::to_owned);
        // They must not outlive this one, however it ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(&me).args(words).stdin(Stdio::null());
        children.push(command.spawn()?);
        next += share;
    }
    let mut good = true;
    for mut child in children {
        good &= child.wait()?.success();
    }
    Ok(good)
}

fn new_pair(name: &'static str) -> Outcome<Lab> {
    started(Options::new(name))
}

fn started(options: Options) -> Outcome<Lab> {
    let lab = Lab::new(options)?;
    match lab.start_pair() {
        Ok(()) => Ok(lab),
        Err(error) => Err(Fail(format!("the pair does not start: {error}\n{}", lab.diagnosis()))),
    }
}

/// Ends the program when a step takes far longer than all its deadlines together: then a deadline is missing, which is
/// a bug of this program. The lab goes with it, but its logs are kept.
struct Watchdog(Arc<AtomicU64>);

impl Watchdog {
    fn start(limit: Duration) -> Watchdog {
        let fed = Arc::new(AtomicU64::new(now().as_nanos()));
        let theirs = fed.clone();
        std::thread::spawn(move || {
            while now().since(Instant::from_nanos(theirs.load(Ordering::Relaxed))) < limit {
                pause(secs(1));
            }
            println!("VIOLATION: the step has not ended for {limit:?}; giving up. Repeat it alone with --story");
            let _ = keep_bare("hung");
            std::process::exit(1);
        });
        Watchdog(fed)
    }

    fn feed(&self) {
        self.0.store(now().as_nanos(), Ordering::Relaxed);
    }
}

/// The log files of this process's labs, without asking anybody anything.
fn keep_bare(name: &str) -> Outcome {
    let to = kept(name)?;
    let mine = format!("pclab-{}-", std::process::id());
    for entry in fs::read_dir("/tmp")?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&mine))
    {
        for file in fs::read_dir(entry.path())?.flatten().map(|file| file.path()) {
            if file.extension().is_some_and(|end| end == "log") {
                fs::copy(&file, to.join(file.file_name().unwrap_or_default()))?;
            }
        }
    }
    println!("  kept in {}", to.display());
    Ok(())
}

/// A fresh folder below `target/soak`, beside the built programs.
fn kept(name: &str) -> Outcome<PathBuf> {
    let me = std::env::current_exe()?;
    let target = me.ancestors().nth(3).ok_or("this program is not in a target folder")?;
    let dir = target.join("soak").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// One pair used again and again; built anew after a violation, or when it cannot be made whole.
struct Pairs {
    name: &'static str,
    lab: Option<Lab>,
    used: u32,
    built: u32,
    cloned: u32,
}

impl Pairs {
    fn new(name: &'static str) -> Pairs {
        Pairs { name, lab: None, used: 0, built: 0, cloned: 0 }
    }

    fn lab(&mut self) -> Outcome<&Lab> {
        if self.lab.is_none() {
            self.lab = Some(new_pair(self.name)?);
            self.built += 1;
        }
        self.lab.as_ref().ok_or_else(|| Fail("no lab".to_owned()))
    }

    /// Numbers for four clients that nobody had before.
    fn next_ids(&mut self) -> u32 {
        self.used += 1;
        (self.used - 1) * 4 + 1
    }

    /// Keeps what a failed run left, and makes the pair whole or throws it away.
    fn after(&mut self, report: &Report, name: &str) -> Outcome {
        let Some(lab) = &self.lab else { return Ok(()) };
        if !report.violations.is_empty() {
            keep(lab, name, &report.story)?;
            self.lab = None;
            return Ok(());
        }
        let Some(active) = report.active else { return Ok(()) };
        let stage = Stage::new(lab);
        match stage.restore(active) {
            Ok(cloned) => self.cloned += u32::from(cloned),
            Err(error) => {
                println!("  the pair cannot be made whole and is built anew: {error}");
                keep(lab, &format!("{name}-unrestored"), &format!("{}\n{}\n{error}", report.story, stage.story()))?;
                self.lab = None;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Sum {
    answers: usize,
    changes: usize,
    recovered: [u64; 3],
    accepted: u64,
    bad: Vec<u64>,
}

impl Sum {
    fn add(&mut self, report: &Report) {
        self.answers += report.answers;
        self.changes += report.services.saturating_sub(1);
        self.accepted += u64::from(report.loss_accepted);
        if let Some(recovery) = report.recovery {
            self.recovered[recovery as usize] += 1;
        }
        if !report.violations.is_empty() {
            self.bad.push(report.seed);
        }
    }

    fn print(&self, what: &str, runs: u64, pairs: &Pairs) {
        let [by_itself, promoted, with_loss] = self.recovered;
        println!(
            "figure: {what}: {runs} runs, {} statements answered, service moved {} times",
            self.answers, self.changes
        );
        println!(
            "figure: {what}: healed, it served by itself {by_itself} times, after a promote {promoted}, after one \
             that accepted loss {with_loss}; loss was accepted in {} runs",
            self.accepted
        );
        println!("figure: {what}: the other node was cloned {} times, pairs built: {}", pairs.cloned, pairs.built);
    }
}

fn line(report: &Report) -> String {
    let recovery = match report.recovery {
        Some(Recovery::ByItself) => "serves by itself",
        Some(Recovery::Promoted) => "serves after a promote",
        Some(Recovery::LossAccepted) => "serves after a promote that accepted loss",
        None => "NOBODY SERVES",
    };
    let verdict = if report.violations.is_empty() { "ok".to_owned() } else { report.violations.join("; ") };
    format!("seed {}: {} answers, {} services, {recovery}: {verdict}", report.seed, report.answers, report.services)
}

/// Logs, story and everybody's state below `target/soak/NAME`.
fn keep(lab: &Lab, name: &str, story: &str) -> Outcome {
    let dir = kept(name)?;
    fs::write(dir.join("story.txt"), story)?;
    println!("{story}");
    fs::write(dir.join("diagnosis.txt"), lab.diagnosis())?;
    lab.save_logs(Path::new(&dir))?;
    println!("  kept in {}", dir.display());
    Ok(())
}
