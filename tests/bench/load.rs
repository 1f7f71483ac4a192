//! pgbench as the load: one run against one system, and what it and the system's own processes say about it.
//!
//! Throughput and CPU time are taken between two lines of progress, the first after a warm-up: connecting and the end
//! are left out of both.

use crate::harness::host::as_user;
use crate::harness::postgres::SYSTEM_USER;
use crate::harness::sys::{Fail, Outcome, secs};
use crate::rig::{DATABASE, Rig, SCRAM_PASSWORD, SCRAM_USER, USER};
use crate::systems::Running;
use crate::usage::Cpu;
use std::fs;

/// What the clients do.
#[derive(Debug, Clone)]
pub struct Load {
    /// pgbench's own words: the script and the protocol.
    pub words: Vec<String>,
    pub clients: u32,
    /// Seconds that count; [`Load::warm_up`] comes before them.
    pub seconds: u64,
    /// A new connection for each transaction.
    pub reconnect: bool,
    pub scram: bool,
}

impl Load {
    /// Seconds for clients to connect and for pools to fill, which do not count: pgbench's own time includes them.
    pub fn warm_up(&self) -> u64 {
        1 + u64::from(self.clients / 100)
    }
}

/// What one run gave.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    pub tps: f64,
    /// Microseconds of the proxy's CPU for one transaction, and the share of it in user space.
    pub cpu: Option<(f64, f64)>,
    /// Milliseconds: median, 95th and 99th percentile.
    pub latency: Option<[f64; 3]>,
}

/// Share of transactions written to the log; a line costs pgbench half a microsecond.
const SAMPLING: &str = "0.2";
/// A connection per transaction is slow enough to log all of them.
const SAMPLING_ALL: &str = "1.0";

#[derive(Debug, Clone)]
struct Mark {
    epoch: f64,
    tps: f64,
    cpu: Option<Cpu>,
}

/// Runs the load. Any error of any client fails it.
pub fn run(rig: &Rig, on: &Running, load: &Load) -> Outcome<Sample> {
    let prefix = rig.dir.join("transactions").display().to_string();
    let sampling = format!("--sampling-rate={}", if load.reconnect { SAMPLING_ALL } else { SAMPLING });
    let seconds = (load.seconds + load.warm_up()).to_string();
    let own = ["-T", &seconds, "-P", "1", "--progress-timestamp", "-l", "--log-prefix", &prefix, &sampling];
    let mut marks = Vec::new();
    let mut early = load.warm_up() - 1;
    let said = pgbench(rig, on, load, &own, |text| {
        if let Some((epoch, tps)) = progress(text) {
            if early > 0 {
                early -= 1;
                return;
            }
            marks.push(Mark { epoch, tps, cpu: on.pid.map(Cpu::of) });
        }
    });
    let latencies = take_log(rig, marks.first().map_or(0.0, |mark: &Mark| mark.epoch))?;
    said?;
    let (Some(first), Some(last)) = (marks.first(), marks.last()) else {
        return Err(Fail("pgbench showed no progress".to_owned()));
    };
    let mut transactions = 0.0;
    for pair in marks.windows(2) {
        transactions += pair[1].tps * (pair[1].epoch - pair[0].epoch);
    }
    let time = last.epoch - first.epoch;
    if time <= 0.0 || transactions <= 0.0 {
        return Err(Fail("pgbench showed one line of progress only: connecting took all the time".to_owned()));
    }
    let cpu = match (&first.cpu, &last.cpu) {
        (Some(before), Some(after)) => {
            let spent = after.since(before);
            Some((spent.micros / transactions, spent.user))
        }
        _ => None,
    };
    Ok(Sample { tps: transactions / time, cpu, latency: percentiles(latencies) })
}

/// Runs this many transactions, no more and no fewer; returns how many that was.
pub fn run_counted(rig: &Rig, on: &Running, load: &Load, transactions: u32) -> Outcome<u32> {
    let each = (transactions / load.clients).max(1);
    pgbench(rig, on, load, &["-t", &each.to_string()], |_| {})?;
    Ok(each * load.clients)
}

/// pgbench with these words and those of the load; returns all it said.
fn pgbench(rig: &Rig, on: &Running, load: &Load, own: &[&str], on_line: impl FnMut(&str)) -> Outcome<String> {
    let mut line = as_user(SYSTEM_USER);
    if load.scram {
        // Seen in the process list: it opens nothing but the bench's own database.
        line.extend(["env".to_owned(), format!("PGPASSWORD={SCRAM_PASSWORD}")]);
    }
    line.push(rig.program("pgbench"));
    let (clients, port, jobs) = (load.clients.to_string(), on.port.to_string(), load.clients.min(2).to_string());
    let user = if load.scram { SCRAM_USER } else { USER };
    let words = ["-n", "-h", &on.host, "-p", &port, "-U", user, "-c", &clients, "-j", &jobs];
    line.extend(words.iter().chain(own).map(|word| (*word).to_owned()));
    if load.reconnect {
        line.push("-C".to_owned());
    }
    line.extend(load.words.iter().cloned());
    line.push(DATABASE.to_owned());
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    let (code, said) = rig.lab.a.host.exec_live(secs(load.seconds + 60), &words, on_line)?;
    let failed = said.lines().find(|line| line.contains("aborted") || line.contains("error:"));
    if code != 0 || failed.is_some() {
        return Err(Fail(format!("pgbench ended with {code}: {}", failed.unwrap_or(said.trim()))));
    }
    Ok(said)
}

/// `progress: 1700000000.123 s, 15123.4 tps, ...`
fn progress(line: &str) -> Option<(f64, f64)> {
    let mut words = line.strip_prefix("progress: ")?.split_whitespace();
    let epoch = words.next()?.parse().ok()?;
    let tps = words.nth(1)?.parse().ok()?;
    Some((epoch, tps))
}

/// Latencies in microseconds of the logged transactions that ended after `from`; the logs are removed.
fn take_log(rig: &Rig, from: f64) -> Outcome<Vec<u32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(&rig.dir)?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with("transactions.") {
            continue;
        }
        for line in fs::read_to_string(entry.path())?.lines() {
            // client, number, microseconds, script, epoch, microseconds of it
            let mut words = line.split(' ');
            let (Some(took), Some(epoch), Some(micros)) = (words.nth(2), words.nth(1), words.next()) else { continue };
            if let (Ok(took), Ok(epoch), Ok(micros)) = (took.parse(), epoch.parse::<f64>(), micros.parse::<f64>())
                && epoch + micros / 1e6 >= from
            {
                all.push(took);
            }
        }
        fs::remove_file(entry.path())?;
    }
    Ok(all)
}

fn percentiles(mut micros: Vec<u32>) -> Option<[f64; 3]> {
    if micros.len() < 100 {
        return None;
    }
    micros.sort_unstable();
    let at = |percent: usize| f64::from(micros[(micros.len() - 1) * percent / 100]) / 1000.0;
    Some([at(50), at(95), at(99)])
}
