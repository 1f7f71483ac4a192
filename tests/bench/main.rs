//! `make bench`: direct, pgbouncer, HAProxy, pgpool-II and portcullis in turn, in one run, on the same PostgreSQL 15.
//!
//! Prints every figure as it comes, then tables of medians and of ratios against pgbouncer. The full run writes
//! `docs/benchmarks.md`; every run writes its report and each single figure below `target/bench`.

#[path = "../lab/harness/mod.rs"]
#[macro_use]
mod harness;
mod bulk;
mod client;
mod idle;
mod load;
mod plan;
mod report;
mod rig;
mod systems;
mod trace;
mod usage;

use bulk::Bulk;
use clap::{Parser, ValueEnum};
use harness::postgres::PROGRAM_VARIABLE;
use harness::sys::{Fail, Outcome, now};
use load::Load;
use plan::{Scenario, Work};
use report::{Figure, Results};
use rig::Rig;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use systems::{Kind, Running, Setup, System};

#[derive(Parser)]
#[command(about = "Compares portcullis with other proxies on the same PostgreSQL (root; namespaces of its own)")]
struct Args {
    /// `quick`: the edit-test loop, about three minutes
    what: Option<What>,
    /// Scenarios or groups of them, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Systems, separated by commas
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds of each pgbench run that count
    #[arg(long)]
    seconds: Option<u64>,
    /// Megabytes of COPY and of the slow reader's result
    #[arg(long)]
    megabytes: Option<u64>,
    /// Profile each proxy in each pgbench scenario with perf, after the figures
    #[arg(long)]
    perf: bool,
    /// Count the system calls per transaction with strace, after the figures
    #[arg(long)]
    syscalls: bool,
    /// Write docs/benchmarks.md whatever was left out
    #[arg(long)]
    write: bool,
    /// List scenarios and systems
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Quick,
    Full,
}

/// Transactions under strace, which makes each some twenty times slower.
const TRACED: u32 = 8_000;
/// Rows of pgbench_accounts are 100,000 times this.
const SCALE: u32 = 10;

/// A run as asked for.
struct Run {
    scenarios: Vec<Scenario>,
    systems: Vec<System>,
    rounds: u32,
    megabytes: u64,
    args: Args,
    /// `target/bench`.
    dir: PathBuf,
}

fn main() -> ExitCode {
    match bench(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: Args) -> Outcome {
    let run = Run::of(args)?;
    if run.args.list {
        println!("scenarios: {}", names(&run.scenarios, |one| &one.name));
        println!("systems:   {}", names(&run.systems, |one| &one.name));
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Fail("network namespaces need root; run it with sudo".to_owned()));
    }
    let program = std::env::var(PROGRAM_VARIABLE).map_err(|_| {
        Fail(format!(
            "{PROGRAM_VARIABLE} must name the optimised portcullis; `make bench BENCH=...` builds and names it"
        ))
    })?;
    let minutes = run.takes().div_ceil(60);
    println!(
        "bench: {program}; {} scenarios, {} systems, {} rounds: about {minutes} minutes",
        run.scenarios.len(),
        run.systems.len(),
        run.rounds
    );
    let began = now();
    let rig = Rig::new(SCALE)?;
    let mut results = Results::new(&run.scenarios, &run.systems);
    let outcome = run.play(&rig, &mut results);
    if outcome.is_err() {
        rig.lab.save_logs(&run.dir)?;
    }
    outcome?;
    let took = now().since(began).as_secs_f64() / 60.0;
    let facts = report::Facts::new(&rig, run.rounds, run.seconds(), run.bulk_megabytes(), took)?;
    let text = results.markdown(&facts);
    // How it was taken is in the file.
    println!("\n{}", text.split("\n## How").next().unwrap_or_default());
    fs::write(run.dir.join("report.md"), &text)?;
    fs::write(run.dir.join("figures.tsv"), results.tsv())?;
    println!("bench: {:.1} minutes; report and figures are in {}", took, run.dir.display());
    if run.args.write || run.is_full() {
        let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.md");
        fs::write(&to, text)?;
        println!("bench: wrote {}", to.display());
    }
    let failed = results.failed();
    ensure!(failed == 0, "{failed} figures are missing because a turn failed");
    Ok(())
}

fn names<'a, T>(of: &'a [T], name: impl Fn(&'a T) -> &'a String) -> String {
    of.iter().map(|one| name(one).as_str()).collect::<Vec<_>>().join(" ")
}

impl Run {
    fn of(args: Args) -> Outcome<Run> {
        let me = std::env::current_exe()?;
        let profile = me.parent().and_then(Path::parent).ok_or("this program has no folder above its own")?;
        let dir = profile.parent().ok_or("there is no folder above the profile's")?.join("bench");
        fs::create_dir_all(&dir)?;
        let quick = args.what == Some(What::Quick);
        let seconds = args.seconds.unwrap_or(if quick { 2 } else { 3 }).max(1);
        // Its place is known before the lab is: the lab's folder hangs on the process.
        let rows_file = format!("/tmp/pclab-{}-bench/bench/rows.sql", std::process::id());
        let mut scenarios = plan::scenarios(seconds, quick, &rows_file);
        let mut systems = systems::all(&dir)?;
        if let Some(word) = args.only.iter().find(|word| !scenarios.iter().any(|one| one.is_called(word))) {
            return Err(Fail(format!("no scenario {word:?}; --list names them")));
        }
        if let Some(word) = args.systems.iter().find(|word| !systems.iter().any(|one| one.name == **word)) {
            return Err(Fail(format!("no system {word:?}; --list names them")));
        }
        if !args.only.is_empty() {
            scenarios.retain(|one| args.only.iter().any(|word| one.is_called(word)));
        } else if quick {
            scenarios.retain(|one| one.quick);
        }
        if !args.systems.is_empty() {
            systems.retain(|one| args.systems.contains(&one.name));
        } else if quick {
            systems.retain(|one| one.contender && !one.is_direct());
        }
        let rounds = args.rounds.unwrap_or(if quick { 2 } else { 5 }).max(1);
        let megabytes = args.megabytes.unwrap_or(if quick { 200 } else { 1024 });
        Ok(Run { scenarios, systems, rounds, megabytes, args, dir })
    }

    fn is_full(&self) -> bool {
        self.args.what != Some(What::Quick)
            && self.args.only.is_empty()
            && self.args.systems.is_empty()
            && self.args.rounds.is_none_or(|rounds| rounds >= 5)
    }

    fn seconds(&self) -> u64 {
        self.scenarios
            .iter()
            .find_map(|one| if let Work::Bench(load) = &one.work { Some(load.seconds) } else { None })
            .unwrap_or(0)
    }

    fn has_bulk(&self) -> bool {
        self.scenarios.iter().any(|one| matches!(one.work, Work::Copy | Work::Slow))
    }

    fn bulk_megabytes(&self) -> u64 {
        if self.has_bulk() { self.megabytes } else { 0 }
    }

    /// Seconds, about.
    fn takes(&self) -> u64 {
        let mut sum = 15;
        for scenario in &self.scenarios {
            for system in self.systems.iter().filter(|system| scenario.leaves_out(system).is_none()) {
                sum += scenario.takes(system, self.megabytes) * u64::from(scenario.turns(system, self.rounds));
            }
        }
        sum
    }

    fn play(&self, rig: &Rig, results: &mut Results) -> Outcome {
        rig.sql(
            "CREATE TABLE rows1000 AS SELECT i, substr(md5(i::text), 1, 19) AS t FROM generate_series(1, 1000) i; \
             ANALYZE rows1000",
        )?;
        rig.write("rows.sql", plan::ROWS_SQL)?;
        let bulk = if self.has_bulk() { Some(Bulk::new(rig, self.megabytes)?) } else { None };
        let trust = idle::certificate(rig)?;
        let mut setup = None;
        for scenario in &self.scenarios {
            if setup != Some(scenario.setup) {
                self.turn_to(rig, scenario.setup, results)?;
                setup = Some(scenario.setup);
            }
            for round in 0..scenario.rounds(self.rounds) {
                // Another one begins each time.
                let shift = round as usize % self.systems.len();
                let order = self.systems[shift..].iter().chain(&self.systems[..shift]);
                for system in order.filter(|system| round < scenario.turns(system, self.rounds)) {
                    if let Some(why) = results.refusal(scenario, system) {
                        if round == 0 {
                            println!("{:<16} {:<18} {why}", scenario.name, system.name);
                        }
                        continue;
                    }
                    let began = now();
                    let figure = self.turn(rig, scenario, system, round, bulk.as_ref(), &trust);
                    let figure = figure.unwrap_or_else(|error| Figure::Failed(error.0));
                    println!(
                        "{:<16} {:<18} {} [{:.1} s]",
                        scenario.name,
                        system.name,
                        figure.line(),
                        now().since(began).as_secs_f64()
                    );
                    results.add(scenario, system, figure);
                }
            }
            if let Work::Bench(load) = &scenario.work {
                self.look_into(rig, scenario, load, results)?;
            }
        }
        Ok(())
    }

    /// Asks who can do this, and restarts the daemon for it.
    fn turn_to(&self, rig: &Rig, setup: Setup, results: &mut Results) -> Outcome {
        for system in &self.systems {
            let mut refusal = system.refuses(rig, setup)?;
            if system.kind == Kind::Portcullis && refusal.is_none() {
                refusal = System::restart_portcullis(rig).err().map(|error| format!("FAILED: {error}"));
            }
            for scenario in self.scenarios.iter().filter(|one| one.setup == setup) {
                let why = scenario.leaves_out(system).map(str::to_owned).or_else(|| refusal.clone());
                if let Some(why) = why {
                    results.refuse(scenario, system, why);
                }
            }
        }
        Ok(())
    }

    fn turn(
        &self,
        rig: &Rig,
        scenario: &Scenario,
        system: &System,
        round: u32,
        bulk: Option<&Bulk>,
        trust: &idle::Trust,
    ) -> Outcome<Figure> {
        let on = system.start(rig, scenario.setup, scenario.clients)?;
        let figure = self.measure(rig, scenario, &on, round, bulk, trust);
        on.end();
        figure
    }

    fn measure(
        &self,
        rig: &Rig,
        scenario: &Scenario,
        on: &Running,
        round: u32,
        bulk: Option<&Bulk>,
        trust: &idle::Trust,
    ) -> Outcome<Figure> {
        let bulk = || bulk.ok_or_else(|| Fail("there is no bulk to move".to_owned()));
        Ok(match &scenario.work {
            Work::Bench(load) => Figure::Load(load::run(rig, on, load)?),
            Work::Copy => Figure::Copied(bulk()?.copy(rig, on, round == 0)?),
            Work::Slow => Figure::Slow(bulk()?.slowly(rig, on)?),
            Work::Idle { sessions, busy, tls } => {
                let words = ["-S", "-M", "simple"].map(str::to_owned).to_vec();
                let busy =
                    (*busy > 0).then_some(Load { words, clients: *busy, seconds: 4, reconnect: false, scram: false });
                Figure::Idle(idle::measure(rig, on, *sessions, tls.then_some(trust), busy.as_ref())?)
            }
        })
    }

    /// System calls and profiles, where they were asked for.
    fn look_into(&self, rig: &Rig, scenario: &Scenario, load: &Load, results: &mut Results) -> Outcome {
        if !self.args.syscalls && !self.args.perf {
            return Ok(());
        }
        let proxies = self.systems.iter().filter(|one| !one.is_direct() && results.refusal(scenario, one).is_none());
        for system in proxies.collect::<Vec<_>>() {
            let on = system.start(rig, scenario.setup, scenario.clients)?;
            let looked = self.look(rig, scenario, system, &on, load, results);
            on.end();
            looked?;
        }
        Ok(())
    }

    fn look(
        &self,
        rig: &Rig,
        scenario: &Scenario,
        system: &System,
        on: &Running,
        load: &Load,
        results: &mut Results,
    ) -> Outcome {
        if self.args.syscalls {
            let calls = trace::syscalls(rig, on, load, TRACED)?;
            println!("{:<16} {:<18} {}", scenario.name, system.name, report::calls_line(&calls));
            results.add_calls(scenario, system, calls);
        }
        if self.args.perf {
            let name = format!("{}-{}", scenario.name, system.name);
            let (top, file) = trace::profile(rig, on, load, &name, &self.dir)?;
            println!("--- {} ({})\n{top}", name, file.display());
        }
        Ok(())
    }
}
