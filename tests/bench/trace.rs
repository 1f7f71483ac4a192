//! Looking into a system under load: system calls per transaction (strace) and where its CPU time goes (perf).
//!
//! Both slow the system down, so that no other figure comes from these runs.

use crate::harness::sys::{Fail, Outcome, pause, run_within, secs, wait_until};
use crate::load::{self, Load};
use crate::rig::Rig;
use crate::systems::Running;
use crate::usage::tree;
use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Lines of a profile that are shown.
const TOP: usize = 30;

/// Calls per transaction: all together, then each by name, most frequent first.
#[derive(Debug, Clone)]
pub struct Calls {
    pub all: f64,
    pub each: Vec<(String, f64)>,
}

/// Runs the load with strace counting along.
pub fn syscalls(rig: &Rig, on: &Running, load: &Load, transactions: u32) -> Outcome<Calls> {
    let file = rig.lab.dir.join("strace.txt");
    let mut command = Command::new("strace");
    command.args(["-c", "-f", "-o"]).arg(&file);
    for pid in tree(on.pid.ok_or("system calls are counted at a proxy")?) {
        command.args(["-p", &pid.to_string()]);
    }
    let mut strace = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let pid = i32::try_from(strace.id()).map_err(|error| Fail(error.to_string()))?;
    // It says nothing when it has attached; the traced threads do.
    let traced = wait_until(secs(10), "strace to attach", || {
        let status = fs::read_to_string(format!("/proc/{}/status", on.pid.unwrap_or(0)))?;
        Ok(status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0")))
    });
    pause(secs(1));
    let ran = traced.and_then(|_| load::run_counted(rig, on, load, transactions));
    crate::harness::host::send(pid, Signal::INT)?;
    strace.wait()?;
    let done = f64::from(ran?);
    let mut each: Vec<(String, f64)> = fs::read_to_string(&file)?.lines().filter_map(call).collect();
    for (_, calls) in &mut each {
        *calls /= done;
    }
    each.sort_by(|one, other| other.1.total_cmp(&one.1));
    Ok(Calls { all: each.iter().map(|(_, calls)| calls).sum(), each })
}

/// `% time, seconds, usecs/call, calls, [errors,] name`
fn call(line: &str) -> Option<(String, f64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let name = *words.last()?;
    if words.len() < 5 || name == "total" {
        return None;
    }
    Some((name.to_owned(), words[3].parse().ok()?))
}

/// Records a profile while the load runs; returns its top lines and where the recording is.
pub fn profile(rig: &Rig, on: &Running, load: &Load, name: &str, to: &Path) -> Outcome<(String, PathBuf)> {
    let data = to.join(format!("perf-{name}.data"));
    let pids: Vec<String> =
        tree(on.pid.ok_or("a profile is taken of a proxy")?).iter().map(ToString::to_string).collect();
    let seconds = load.seconds.to_string();
    let mut command = Command::new("perf");
    // No hardware counters in a virtual machine.
    command.args(["record", "-e", "cpu-clock", "-F", "1999", "-g", "-o"]).arg(&data);
    command.args(["-p", &pids.join(","), "--", "sleep", &seconds]);
    let mut perf = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let ran = load::run(rig, on, load);
    let ended = perf.wait()?;
    ran?;
    if !ended.success() {
        return Err(Fail(format!("perf record ended with {ended}; is linux-perf there, and are we root?")));
    }
    let data_text = data.display().to_string();
    let words =
        ["perf", "report", "-i", &data_text, "--stdio", "--no-children", "-g", "none", "--percent-limit", "0.3"];
    let report = run_within(secs(60), &words)?;
    let text = String::from_utf8_lossy(&report.stdout).into_owned();
    fs::write(to.join(format!("perf-{name}.txt")), &text)?;
    // Frames one below the other, for a flame graph: the program's symbols are gone with the lab.
    let script = run_within(secs(120), &["perf", "script", "-i", &data_text])?;
    fs::write(to.join(format!("perf-{name}.script")), &script.stdout)?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()).take(TOP);
    Ok((lines.collect::<Vec<_>>().join("\n"), data))
}
