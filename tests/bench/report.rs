//! Figures, medians, ratios, and the document made of them.

use crate::bulk::{Copied, Slow};
use crate::harness::sys::{Outcome, run};
use crate::idle::Idle;
use crate::load::Sample;
use crate::plan::{GROUPS, Scenario, Work};
use crate::rig::Rig;
use crate::systems::{Kind, System};
use crate::trace::Calls;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

/// What one turn gave.
#[derive(Debug, Clone)]
pub enum Figure {
    Load(Sample),
    Copied(Copied),
    Slow(Slow),
    Idle(Idle),
    Failed(String),
}

impl Figure {
    pub fn line(&self) -> String {
        match self {
            Figure::Load(sample) => load_line(sample),
            Figure::Copied(copied) => {
                let cpu = copied.cpu.map(|(out, into)| format!(", CPU {out:.2}/{into:.2} ms/MB")).unwrap_or_default();
                format!("out {:.0} MB/s, in {:.0} MB/s{cpu}", copied.out_rate, copied.in_rate)
            }
            Figure::Slow(slow) => format!("{} KiB before, {} KiB at most", slow.before, slow.most),
            Figure::Idle(idle) => {
                let busy = idle.busy.as_ref().map(|sample| format!("; busy: {}", load_line(sample)));
                format!(
                    "{:.2} KiB each ({} -> {} KiB, {} KiB after){}",
                    idle.each(),
                    idle.before,
                    idle.with_all,
                    idle.after_busy,
                    busy.unwrap_or_default()
                )
            }
            Figure::Failed(why) => format!("FAILED: {why}"),
        }
    }

    fn tsv(&self) -> String {
        match self {
            Figure::Load(sample) => {
                let (cpu, user) = sample.cpu.unwrap_or((0.0, 0.0));
                let [p50, p95, p99] = sample.latency.unwrap_or_default();
                format!("{:.1}\t{cpu:.3}\t{user:.3}\t{p50:.3}\t{p95:.3}\t{p99:.3}", sample.tps)
            }
            other => other.line(),
        }
    }
}

fn load_line(sample: &Sample) -> String {
    let cpu = sample.cpu.map(|(cpu, user)| format!(", CPU {cpu:.2} us ({:.0} % user)", user * 100.0));
    let latency = sample.latency.map(|[p50, p95, p99]| format!(", {p50:.3}/{p95:.3}/{p99:.3} ms"));
    format!("{:.0} tx/s{}{}", sample.tps, cpu.unwrap_or_default(), latency.unwrap_or_default())
}

/// `4.30 calls: 1.02 recvfrom, ...`
pub fn calls_line(calls: &Calls) -> String {
    let each: Vec<String> =
        calls.each.iter().filter(|(_, n)| *n >= 0.01).map(|(name, n)| format!("{n:.2} {name}")).collect();
    format!("{:.2} system calls: {}", calls.all, each.join(", "))
}

/// All figures, by scenario and system.
pub struct Results {
    scenarios: Vec<Scenario>,
    systems: Vec<System>,
    figures: BTreeMap<(String, String), Vec<Figure>>,
    refusals: BTreeMap<(String, String), String>,
    calls: BTreeMap<(String, String), Calls>,
}

/// Where and how it was measured.
pub struct Facts {
    lines: Vec<String>,
    rounds: u32,
    seconds: u64,
    megabytes: u64,
    minutes: f64,
}

impl Facts {
    pub fn new(rig: &Rig, rounds: u32, seconds: u64, megabytes: u64, minutes: f64) -> Outcome<Facts> {
        let cpu = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let model = model.trim_start_matches([' ', '\t', ':']).to_owned();
        let memory = fs::read_to_string("/proc/meminfo")?;
        let memory = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0);
        let commit = run(&["git", "-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short", "HEAD"]);
        let lines = vec![
            format!(
                "- Machine: {model}, {} cores, {:.0} GiB memory",
                std::thread::available_parallelism().map_or(0, usize::from),
                memory / 1_048_576.0
            ),
            format!("- Kernel: {}", run(&["uname", "-sr"])?.trim()),
            format!("- PostgreSQL: {}", rig.sql("SHOW server_version")?),
            format!("- Date: {}", run(&["date", "-u", "+%Y-%m-%d %H:%M UTC"])?.trim()),
            format!("- portcullis: commit {}", commit.unwrap_or_default().trim()),
        ];
        Ok(Facts { lines, rounds, seconds, megabytes, minutes })
    }
}

fn key(scenario: &Scenario, system: &System) -> (String, String) {
    (scenario.name.clone(), system.name.clone())
}

fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len().checked_sub(1)?;
    Some(f64::midpoint(numbers[middle / 2], numbers[middle.div_ceil(2)]))
}

impl Results {
    pub fn new(scenarios: &[Scenario], systems: &[System]) -> Results {
        Results {
            scenarios: scenarios.to_vec(),
            systems: systems.to_vec(),
            figures: BTreeMap::new(),
            refusals: BTreeMap::new(),
            calls: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, scenario: &Scenario, system: &System, figure: Figure) {
        self.figures.entry(key(scenario, system)).or_default().push(figure);
    }

    pub fn refuse(&mut self, scenario: &Scenario, system: &System, why: String) {
        self.refusals.insert(key(scenario, system), why);
    }

    pub fn refusal(&self, scenario: &Scenario, system: &System) -> Option<&str> {
        self.refusals.get(&key(scenario, system)).map(String::as_str)
    }

    pub fn add_calls(&mut self, scenario: &Scenario, system: &System, calls: Calls) {
        self.calls.insert(key(scenario, system), calls);
    }

    /// How many turns gave no figure.
    pub fn failed(&self) -> usize {
        let figures = self.figures.values().flatten().filter(|figure| matches!(figure, Figure::Failed(_)));
        figures.count() + self.refusals.values().filter(|why| why.starts_with("FAILED")).count()
    }

    /// Every single figure.
    pub fn tsv(&self) -> String {
        let mut text = "scenario\tsystem\tround\ttps\tcpu_us\tuser\tp50_ms\tp95_ms\tp99_ms\n".to_owned();
        for ((scenario, system), figures) in &self.figures {
            for (round, figure) in figures.iter().enumerate() {
                let _ = writeln!(text, "{scenario}\t{system}\t{round}\t{}", figure.tsv());
            }
        }
        text
    }

    fn figures(&self, scenario: &Scenario, system: &System) -> &[Figure] {
        self.figures.get(&key(scenario, system)).map_or(&[], Vec::as_slice)
    }

    /// A number of each round, `None` where a turn has none.
    fn numbers(&self, scenario: &Scenario, system: &System, of: &impl Fn(&Figure) -> Option<f64>) -> Vec<Option<f64>> {
        self.figures(scenario, system).iter().map(of).collect()
    }

    fn middle(&self, scenario: &Scenario, system: &System, of: &impl Fn(&Figure) -> Option<f64>) -> Option<f64> {
        median(self.numbers(scenario, system, of).into_iter().flatten().collect())
    }

    /// The median of the ratios within one round each: what slowed a round down slowed both.
    fn ratio(&self, scenario: &Scenario, system: &System, of: &impl Fn(&Figure) -> Option<f64>) -> Option<f64> {
        let base = self.systems.iter().find(|one| one.name == "pgbouncer")?;
        if base.name == system.name {
            return None;
        }
        let (own, other) = (self.numbers(scenario, system, of), self.numbers(scenario, base, of));
        let ratios = own.into_iter().zip(other).filter_map(|(own, other)| Some(own? / other.filter(|n| *n > 0.0)?));
        median(ratios.collect())
    }

    /// The whole document.
    pub fn markdown(&self, facts: &Facts) -> String {
        let mut text = format!("# Benchmarks\n\n{INTRO}\n");
        text.push_str(&facts.lines.join("\n"));
        text.push('\n');
        for system in self.systems.iter().filter(|system| !system.version.is_empty()) {
            let _ = writeln!(text, "- {}: {}", system.name, system.version);
        }
        let _ = writeln!(
            text,
            "- {} rounds (systems beside the contest: 2), {} s of each pgbench run, {} MB of COPY; {:.0} minutes",
            facts.rounds, facts.seconds, facts.megabytes, facts.minutes
        );
        text.push_str(&self.summary());
        for (group, title) in GROUPS {
            let scenarios: Vec<&Scenario> = self.scenarios.iter().filter(|one| one.group == group).collect();
            if scenarios.is_empty() {
                continue;
            }
            let _ = write!(text, "\n## {group}: {title}\n");
            if scenarios.iter().any(|one| matches!(one.work, Work::Bench(_))) {
                text.push_str(&self.loads(&scenarios));
            }
            for scenario in &scenarios {
                match scenario.work {
                    Work::Copy => text.push_str(&self.copies(scenario)),
                    Work::Slow => text.push_str(&self.slow(scenario)),
                    _ => {}
                }
            }
            if group == "idle" {
                text.push_str(&self.idle(&scenarios));
            }
            text.push_str(&self.not_measured(&scenarios));
        }
        text.push_str(&self.all_calls());
        let _ = write!(text, "\n{HOW}");
        text
    }

    /// portcullis against pgbouncer, one line a scenario.
    fn summary(&self) -> String {
        let Some(ours) = self.systems.iter().find(|one| one.kind == Kind::Portcullis) else { return String::new() };
        let mut text = "\n## portcullis : pgbouncer\n\nCPU and p99: less is better. Throughput: more is better.\n\n\
                        | scenario | CPU per transaction | throughput | p99 |\n|---|---:|---:|---:|\n"
            .to_owned();
        for scenario in &self.scenarios {
            if !matches!(scenario.work, Work::Bench(_)) {
                continue;
            }
            if self.figures(scenario, ours).is_empty() {
                let _ = writeln!(text, "| {} | not measured | | |", scenario.name);
                continue;
            }
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} |",
                scenario.name,
                times(self.ratio(scenario, ours, &cpu)),
                times(self.ratio(scenario, ours, &tps)),
                times(self.ratio(scenario, ours, &p99)),
            );
        }
        text
    }

    fn loads(&self, scenarios: &[&Scenario]) -> String {
        let mut text =
            "\n| clients | system | tx/s | : pgb | CPU us/tx | user | : pgb | p50 ms | p95 | p99 | : pgb |\n\
                        |---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
                .to_owned();
        for scenario in scenarios {
            for system in &self.systems {
                if !self.figures(scenario, system).iter().any(|one| matches!(one, Figure::Load(_))) {
                    continue;
                }
                let middle = |of: &dyn Fn(&Figure) -> Option<f64>| self.middle(scenario, system, &of);
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                    scenario.clients,
                    system.name,
                    number(middle(&tps), 0),
                    times(self.ratio(scenario, system, &tps)),
                    number(middle(&cpu), 1),
                    middle(&user).map(|user| format!("{:.0} %", user * 100.0)).unwrap_or_default(),
                    times(self.ratio(scenario, system, &cpu)),
                    number(middle(&|one| latency(one, 0)), 3),
                    number(middle(&|one| latency(one, 1)), 3),
                    number(middle(&p99), 3),
                    times(self.ratio(scenario, system, &p99)),
                );
            }
        }
        text
    }

    fn copies(&self, scenario: &Scenario) -> String {
        let mut text = "\n| COPY | out MB/s | : pgb | : direct | in MB/s | : pgb | : direct | CPU ms/MB out | in |\n\
                        |---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
            .to_owned();
        let copied = |figure: &Figure| if let Figure::Copied(copied) = figure { Some(*copied) } else { None };
        let out = |figure: &Figure| copied(figure).map(|one| one.out_rate);
        let into = |figure: &Figure| copied(figure).map(|one| one.in_rate);
        let cpu_out = |figure: &Figure| copied(figure)?.cpu.map(|cpu| cpu.0);
        let cpu_in = |figure: &Figure| copied(figure)?.cpu.map(|cpu| cpu.1);
        let direct = self.systems.iter().find(|one| one.kind == Kind::DirectTcp);
        for system in &self.systems {
            if !self.figures(scenario, system).iter().any(|one| copied(one).is_some()) {
                continue;
            }
            let to_direct = |of: &dyn Fn(&Figure) -> Option<f64>| {
                let direct = self.middle(scenario, direct?, &of)?;
                Some(self.middle(scenario, system, &of)? / direct)
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                system.name,
                number(self.middle(scenario, system, &out), 0),
                times(self.ratio(scenario, system, &out)),
                times(to_direct(&out)),
                number(self.middle(scenario, system, &into), 0),
                times(self.ratio(scenario, system, &into)),
                times(to_direct(&into)),
                number(self.middle(scenario, system, &cpu_out), 2),
                number(self.middle(scenario, system, &cpu_in), 2),
            );
        }
        text
    }

    fn slow(&self, scenario: &Scenario) -> String {
        let mut text =
            "\n| slow reader | memory before, KiB | at most, KiB | grown by, KiB |\n|---|---:|---:|---:|\n".to_owned();
        for system in &self.systems {
            for figure in self.figures(scenario, system) {
                if let Figure::Slow(slow) = figure {
                    let grown = slow.most.saturating_sub(slow.before);
                    let _ = writeln!(text, "| {} | {} | {} | {grown} |", system.name, slow.before, slow.most);
                }
            }
        }
        text
    }

    fn idle(&self, scenarios: &[&Scenario]) -> String {
        let mut text =
            "\n| sessions | system | KiB each | memory without, KiB | with | after the busy ones | busy: tx/s \
                        | CPU us/tx | p99 ms |\n|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
                .to_owned();
        for scenario in scenarios {
            for system in &self.systems {
                for figure in self.figures(scenario, system) {
                    let Figure::Idle(idle) = figure else { continue };
                    let busy = idle.busy.map(Figure::Load);
                    let busy = |of: &dyn Fn(&Figure) -> Option<f64>, digits| number(busy.as_ref().and_then(of), digits);
                    let _ = writeln!(
                        text,
                        "| {} ({}) | {} | {:.2} | {} | {} | {} | {} | {} | {} |",
                        idle.sessions,
                        scenario.name,
                        system.name,
                        idle.each(),
                        idle.before,
                        idle.with_all,
                        idle.after_busy,
                        busy(&tps, 0),
                        busy(&cpu, 1),
                        busy(&p99, 1),
                    );
                }
            }
        }
        text
    }

    /// What failed and who took no part, by name.
    fn not_measured(&self, scenarios: &[&Scenario]) -> String {
        let mut lines: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for scenario in scenarios {
            for system in self.systems.iter().filter(|one| !one.is_direct()) {
                if let Some(why) = self.refusal(scenario, system) {
                    lines.entry(format!("{}: {why}", system.name)).or_default().push(&scenario.name);
                }
            }
            for system in &self.systems {
                for figure in self.figures(scenario, system) {
                    if let Figure::Failed(why) = figure {
                        let why = why.lines().next().unwrap_or_default();
                        lines.entry(format!("{}: FAILED: {why}", system.name)).or_default().push(&scenario.name);
                    }
                }
            }
        }
        if lines.is_empty() {
            return String::new();
        }
        let lines: Vec<String> = lines.iter().map(|(why, names)| format!("- {why} ({})", names.join(", "))).collect();
        format!("\nNot measured:\n{}\n", lines.join("\n"))
    }

    fn all_calls(&self) -> String {
        if self.calls.is_empty() {
            return String::new();
        }
        let mut text = "\n## System calls per transaction (strace)\n\n| scenario | system | all | each |\n\
                        |---|---|---:|---|\n"
            .to_owned();
        for scenario in &self.scenarios {
            for system in &self.systems {
                if let Some(calls) = self.calls.get(&key(scenario, system)) {
                    let line = calls_line(calls);
                    let each = line.split_once(": ").map_or("", |(_, each)| each);
                    let _ = writeln!(text, "| {} | {} | {:.2} | {each} |", scenario.name, system.name, calls.all);
                }
            }
        }
        text
    }
}

fn sample(figure: &Figure) -> Option<&Sample> {
    if let Figure::Load(sample) = figure { Some(sample) } else { None }
}

fn tps(figure: &Figure) -> Option<f64> {
    Some(sample(figure)?.tps)
}

fn cpu(figure: &Figure) -> Option<f64> {
    Some(sample(figure)?.cpu?.0)
}

fn user(figure: &Figure) -> Option<f64> {
    Some(sample(figure)?.cpu?.1)
}

fn latency(figure: &Figure, which: usize) -> Option<f64> {
    sample(figure)?.latency?.get(which).copied()
}

fn p99(figure: &Figure) -> Option<f64> {
    latency(figure, 2)
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map(|value| format!("{value:.digits$}")).unwrap_or_default()
}

fn times(ratio: Option<f64>) -> String {
    ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default()
}

const INTRO: &str = "Written by `make bench`, which compares portcullis with other proxies on one machine, in one \
run,\nagainst the same PostgreSQL. Absolute figures belong to this machine; ratios and system calls travel better.\n";

const HOW: &str = include_str!("how.md");
