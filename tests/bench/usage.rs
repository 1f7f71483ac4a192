//! What processes cost: CPU time and memory of a program and all its children, from /proc.

use crate::harness::sys::Outcome;
use std::collections::BTreeMap;
use std::fs;

/// CPU time since the processes began.
#[derive(Debug, Clone, Default)]
pub struct Cpu {
    /// Nanoseconds of each thread, by its number.
    threads: BTreeMap<i32, u64>,
    /// Clock ticks in user space and in the kernel, all processes together.
    ticks: (u64, u64),
}

/// CPU time between two looks.
#[derive(Debug, Clone, Copy)]
pub struct Spent {
    pub micros: f64,
    /// Share of user space, 0 to 1.
    pub user: f64,
}

impl Cpu {
    /// What `root` and its children have used until now.
    pub fn of(root: i32) -> Cpu {
        let mut cpu = Cpu::default();
        for pid in tree(root) {
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let Some(thread) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
                // The first number is the time on the CPU in nanoseconds; utime and stime count in steps of 10 ms.
                let spent = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                let spent = spent.split_whitespace().next().and_then(|word| word.parse().ok());
                cpu.threads.insert(thread, spent.unwrap_or(0));
            }
            if let Some((user, system)) = ticks(pid) {
                cpu.ticks.0 += user;
                cpu.ticks.1 += system;
            }
        }
        cpu
    }

    /// What was used since `before`; threads that ended meanwhile count until then only.
    pub fn since(&self, before: &Cpu) -> Spent {
        let nanos: u64 = self
            .threads
            .iter()
            .map(|(thread, spent)| spent.saturating_sub(before.threads.get(thread).copied().unwrap_or(0)))
            .sum();
        let user = self.ticks.0.saturating_sub(before.ticks.0);
        let system = self.ticks.1.saturating_sub(before.ticks.1);
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let (micros, user, all) = (nanos as f64 / 1000.0, user as f64, (user + system) as f64);
        Spent { micros, user: if all > 0.0 { user / all } else { 0.0 } }
    }
}

/// Fields 14 and 15 of /proc/PID/stat: of all its threads, those that ended too.
fn ticks(pid: i32) -> Option<(u64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// The process and all its descendants.
pub fn tree(root: i32) -> Vec<i32> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(pid) = all.get(at).copied() {
        at += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
        }
    }
    all
}

/// Proportional resident memory in KiB of the process and its descendants.
pub fn pss_kib(root: i32) -> Outcome<u64> {
    let mut sum = 0;
    for pid in tree(root) {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or_default();
        sum += line.split_whitespace().next().unwrap_or("0").parse::<u64>()?;
    }
    Ok(sum)
}
