//! Removes what a lab process that died long ago could not: its janitor was killed too, or the machine lost power. It
//! is NOT the way a lab ends (see [`super::host::Lifeline`]), and it touches nothing of a process that lives.

use super::host::send;
use super::sys::{millis, pause, run, run_quietly};
use rustix::process::Signal;
use std::fs;
use std::path::Path;

/// Once per process, before its first lab.
pub fn sweep_leftovers() {
    let alive = |pid: &str| Path::new("/proc").join(pid).exists();
    let mut kept = Vec::new();
    for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix("pclab-") else { continue };
        let maker = rest.split('-').next().unwrap_or_default().to_owned();
        if !is_number(&maker) {
            continue;
        }
        let owner = fs::read_to_string(entry.path().join("owner")).unwrap_or_else(|_| maker.clone());
        if alive(owner.trim()) || alive(&maker) {
            kept.push(maker);
        } else {
            sweep_namespaces(&maker);
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((maker, _)) = name.strip_prefix("pc").and_then(|rest| rest.split_once('-')) else { continue };
        if is_number(maker) && !alive(maker) && !kept.iter().any(|pid| pid == maker) {
            sweep_namespaces(maker);
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn sweep_namespaces(maker: &str) {
    let prefix = format!("pc{maker}-");
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&prefix) {
            continue;
        }
        let pids = run(&["ip", "netns", "pids", &name]).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|word| word.parse().ok()) {
            let _ = send(pid, Signal::KILL);
        }
        pause(millis(50));
        run_quietly(&format!("ip netns del {name}"));
    }
}
