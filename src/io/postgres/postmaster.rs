//! Which processes belong to the cluster in a data directory, from /proc.
//!
//! A pid file alone proves nothing: its process may be dead, a zombie that nobody reaps, or a stranger that got the
//! same number. A process of the cluster is one whose command is `postgres`, whose working directory is the data
//! directory (PostgreSQL changes into it at start) and which is not a zombie.
//!
//! **Invariant:** what cannot be looked at, because this daemon has no descriptor left, is not taken for gone: two
//! postmasters on one directory, or a directory moved from under one, are the worst that could follow.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::{self, ErrorKind};
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
    handle: OwnedFd,
}

impl Postmaster {
    /// The postmaster that runs `data_dir` now, if one does.
    ///
    /// # Errors
    /// It cannot be told, for want of descriptors: nobody may conclude that none runs.
    pub(super) fn find(data_dir: &Path) -> io::Result<Option<Postmaster>> {
        let Some(pid) = pid_of(&data_dir.join("postmaster.pid"))? else { return Ok(None) };
        // First the handle, then the proof: the process proven is then the one held.
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return told(error.into()).map(|()| None),
        };
        Ok(runs(pid, data_dir)?.then_some(Postmaster { handle }))
    }

    /// Sends a signal; a process that is gone is fine.
    pub(super) fn signal(&self, signal: Signal) {
        let _gone_is_fine = pidfd_send_signal(&self.handle, signal);
    }

    /// It has ended: a pidfd is readable from then on, also while nobody has reaped the zombie. Needs no descriptor.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(ready) if ready > 0)
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
///
/// # Errors
/// It cannot be told, for want of descriptors.
pub(super) fn processes(data_dir: &Path) -> io::Result<Vec<Pid>> {
    // All numbers first, so that no more than one descriptor is needed at a time.
    let names: Vec<_> = fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name()).collect();
    let numbers = names.iter().filter_map(|name| name.to_str()?.parse::<i32>().ok()).filter_map(Pid::from_raw);
    let mut found = Vec::new();
    for pid in numbers {
        if is_of(pid, data_dir)? {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Lets processes of the cluster that somebody froze (SIGSTOP) run again, so that they can obey. The signal goes to all
/// of them: a process being frozen this instant does not look frozen yet, and to the others it means nothing.
pub(super) fn thaw(data_dir: &Path) {
    kill_all(data_dir, Signal::CONT);
}

/// Sends a signal to every process of the cluster that can be found.
pub(super) fn kill_all(data_dir: &Path, signal: Signal) {
    for pid in processes(data_dir).unwrap_or_default() {
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
///
/// # Errors
/// It cannot be told, for want of descriptors; nothing more was removed.
pub(super) fn clear_stale_locks(data_dir: &Path, socket_lock: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for file in [data_dir.join("postmaster.pid"), socket_lock.to_owned()] {
        let Some(pid) = pid_of(&file)? else { continue };
        let state = state(pid)?;
        let misleads = state.is_some_and(|s| s == 'Z') || (state.is_some() && !is_postgres(pid)?);
        if misleads && fs::remove_file(&file).is_ok() {
            removed.push(file);
        }
    }
    Ok(removed)
}

/// The process that a lock file names is in the middle of its exit: it has let go of its directory already, so that it
/// counts as nobody's, but is no zombie yet, and `kill(pid, 0)` finds it.
pub(super) fn is_leaving(lock: &Path) -> bool {
    let Ok(Some(pid)) = pid_of(lock) else { return false };
    let gone = || fs::metadata(proc(pid, "cwd")).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    is_postgres(pid).unwrap_or(false) && gone() && !matches!(state(pid), Ok(None | Some('Z' | 'X')))
}

/// The number in the first line of a lock file (negative for a single-user backend).
fn pid_of(file: &Path) -> io::Result<Option<Pid>> {
    let Some(text) = read(file)? else { return Ok(None) };
    let number = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok()?.checked_abs());
    Ok(number.and_then(Pid::from_raw))
}

/// Whether the process that the pid file names runs the cluster. One whose working directory is hidden from us
/// (proc(5): other groups, more capabilities) counts: a directory is never taken from under a postmaster for want of
/// proof.
fn runs(pid: Pid, data_dir: &Path) -> io::Result<bool> {
    let hidden = || matches!(fs::metadata(proc(pid, "cwd")), Err(e) if e.kind() == ErrorKind::PermissionDenied);
    Ok(is_of(pid, data_dir)? || (is_live_postgres(pid)? && hidden()))
}

fn is_of(pid: Pid, data_dir: &Path) -> io::Result<bool> {
    let same = || -> Option<bool> {
        // Not ours to read (another user's): not our cluster's either.
        let cwd = fs::metadata(proc(pid, "cwd")).ok()?;
        let dir = fs::metadata(data_dir).ok()?;
        Some(cwd.dev() == dir.dev() && cwd.ino() == dir.ino())
    };
    // The working directory first: it needs no descriptor, and rules out nearly all.
    Ok(same() == Some(true) && is_live_postgres(pid)?)
}

fn is_live_postgres(pid: Pid) -> io::Result<bool> {
    Ok(is_postgres(pid)? && !matches!(state(pid)?, None | Some('Z' | 'X')))
}

fn is_postgres(pid: Pid) -> io::Result<bool> {
    Ok(read(&proc(pid, "comm"))?.is_some_and(|name| name.trim_end() == "postgres"))
}

/// The state letter of /proc/PID/stat (proc(5)): it follows the command name's closing parenthesis.
fn state(pid: Pid) -> io::Result<Option<char>> {
    let Some(stat) = read(&proc(pid, "stat"))? else { return Ok(None) };
    Ok(stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next()))
}

/// A small file; `None` when there is none, or nothing of ours to read.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) => told(error).map(|()| None),
    }
}

/// An error that says something of the file is an answer; one that says something of this process or machine is not.
fn told(error: io::Error) -> io::Result<()> {
    let unknown = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::IO].map(Errno::raw_os_error);
    if error.raw_os_error().is_some_and(|code| unknown.contains(&code)) { Err(error) } else { Ok(()) }
}

fn proc(pid: Pid, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", pid.as_raw_nonzero()))
}
