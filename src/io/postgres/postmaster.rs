//! Which processes belong to the cluster in a data directory, from /proc.
//!
//! A pid file alone proves nothing: its process may be dead, a zombie that nobody reaps, or a stranger that got the
//! same number. A process of the cluster is one whose command is `postgres`, whose working directory is the data
//! directory (PostgreSQL changes into it at start) and which is not a zombie.

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Line of `postmaster.pid` with the state (PostgreSQL: `LOCK_FILE_LINE_PM_STATUS`, counted from 1).
const STATUS_LINE: usize = 8;

/// What `postmaster.pid` says of the postmaster's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    /// In recovery, not yet consistent: no sessions.
    Standby,
    Ready,
    Stopping,
}

/// The live postmaster of a data directory, held by a pidfd: a signal never hits a recycled number.
pub(super) struct Postmaster {
    pid: Pid,
    handle: OwnedFd,
}

impl Postmaster {
    /// The postmaster that runs `data_dir` now, if one does.
    pub(super) fn find(data_dir: &Path) -> Option<Postmaster> {
        let pid = pid_of(&data_dir.join("postmaster.pid"))?;
        // First the handle, then the proof: the process proven is then the one held.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        runs(pid, data_dir).then_some(Postmaster { pid, handle })
    }

    /// Sends a signal; a process that is gone is fine.
    pub(super) fn signal(&self, signal: Signal) {
        let _gone_is_fine = pidfd_send_signal(&self.handle, signal);
    }

    /// Alive and not a zombie.
    pub(super) fn is_alive(&self, data_dir: &Path) -> bool {
        runs(self.pid, data_dir)
    }
}

/// What the pid file says of the phase; `None` when there is none or it says something unknown.
pub(super) fn phase(data_dir: &Path) -> Option<Phase> {
    let text = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    match text.lines().nth(STATUS_LINE - 1)?.trim() {
        "starting" => Some(Phase::Starting),
        "standby" => Some(Phase::Standby),
        "ready" => Some(Phase::Ready),
        "stopping" => Some(Phase::Stopping),
        _ => None,
    }
}

/// Every live process of the cluster: postmaster, backends, helpers, also those whose postmaster is dead.
pub(super) fn processes(data_dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(Pid::from_raw)
        .filter(|pid| is_of(*pid, data_dir))
        .collect()
}

/// Lets processes of the cluster that somebody froze (SIGSTOP) run again, so that they can obey. The signal goes to all
/// of them: a process being frozen this instant does not look frozen yet, and to the others it means nothing.
pub(super) fn thaw(data_dir: &Path) {
    kill_all(data_dir, Signal::CONT);
}

/// Sends a signal to every process of the cluster.
pub(super) fn kill_all(data_dir: &Path, signal: Signal) {
    for pid in processes(data_dir) {
        let _gone_is_fine = kill_process(pid, signal);
    }
}

/// Kills a tool that a daemon since dead left running: one named `name` with `argument` among its arguments.
pub(super) fn kill_tool(name: &str, argument: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = number.and_then(Pid::from_raw) else { continue };
        let named = fs::read_to_string(proc(pid, "comm")).is_ok_and(|comm| comm.trim_end() == name);
        let given = || fs::read(proc(pid, "cmdline")).unwrap_or_default();
        if named && given().split(|b| *b == 0).any(|word| word == argument.as_os_str().as_bytes()) {
            let _gone_is_fine = kill_process(pid, Signal::KILL);
        }
    }
}

/// Removes the pid file and the socket's lock file where they name a process that exists but is not this cluster's: a
/// zombie, or a stranger of our own user. PostgreSQL asks only `kill(pid, 0)` and would refuse to start. Not called
/// while any process of the cluster is left.
pub(super) fn clear_stale_locks(data_dir: &Path, socket_lock: &Path) -> Vec<PathBuf> {
    let mut removed = Vec::new();
    for file in [data_dir.join("postmaster.pid"), socket_lock.to_owned()] {
        let Some(pid) = pid_of(&file) else { continue };
        let misleads = state(pid).is_some_and(|s| s == 'Z') || (state(pid).is_some() && !is_postgres(pid));
        if misleads && fs::remove_file(&file).is_ok() {
            removed.push(file);
        }
    }
    removed
}

/// The process that a lock file names is in the middle of its exit: it has let go of its directory already, so that it
/// counts as nobody's, but is no zombie yet, and `kill(pid, 0)` finds it.
pub(super) fn is_leaving(lock: &Path) -> bool {
    let Some(pid) = pid_of(lock).filter(|pid| is_postgres(*pid)) else { return false };
    let gone = fs::metadata(proc(pid, "cwd")).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    gone && !matches!(state(pid), None | Some('Z' | 'X'))
}

/// The number in the first line of a lock file (negative for a single-user backend).
fn pid_of(file: &Path) -> Option<Pid> {
    let text = fs::read_to_string(file).ok()?;
    let number: i32 = text.lines().next()?.trim().parse().ok()?;
    Pid::from_raw(number.checked_abs()?)
}

/// Whether the process that the pid file names runs the cluster. One whose working directory is hidden from us
/// (proc(5): other groups, more capabilities) counts: a directory is never taken from under a postmaster for want of
/// proof.
fn runs(pid: Pid, data_dir: &Path) -> bool {
    let hidden = || matches!(fs::metadata(proc(pid, "cwd")), Err(e) if e.kind() == ErrorKind::PermissionDenied);
    is_of(pid, data_dir) || (is_postgres(pid) && !matches!(state(pid), None | Some('Z' | 'X')) && hidden())
}

fn is_of(pid: Pid, data_dir: &Path) -> bool {
    let same = || -> Option<bool> {
        // Not ours to read (another user's): not our cluster's either.
        let cwd = fs::metadata(proc(pid, "cwd")).ok()?;
        let dir = fs::metadata(data_dir).ok()?;
        Some(cwd.dev() == dir.dev() && cwd.ino() == dir.ino())
    };
    is_postgres(pid) && !matches!(state(pid), None | Some('Z' | 'X')) && same() == Some(true)
}

fn is_postgres(pid: Pid) -> bool {
    fs::read_to_string(proc(pid, "comm")).is_ok_and(|name| name.trim_end() == "postgres")
}

/// The state letter of /proc/PID/stat (proc(5)): it follows the command name's closing parenthesis.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(proc(pid, "stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

fn proc(pid: Pid, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", pid.as_raw_nonzero()))
}
