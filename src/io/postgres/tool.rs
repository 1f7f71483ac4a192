//! Child processes: cleaned environment, own process group, bounded output, a time limit, and no survivor when the
//! caller gives up.

use super::PgError;
use crate::io::privileges;
use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// What is kept of each output stream; of a longer one the beginning is dropped, because the end tells why it failed.
const OUTPUT_LIMIT: usize = 64 * 1024;
/// The search path of every child; the tools themselves are called by their full path.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a child said.
pub(in crate::io) struct Output {
    pub(in crate::io) ok: bool,
    pub(in crate::io) out: String,
    pub(in crate::io) err: String,
}

impl Output {
    /// The last line that says something: what a person needs to see.
    pub(in crate::io) fn last_line(&self) -> String {
        let line = |text: &str| text.lines().rev().map(str::trim).find(|l| !l.is_empty()).map(str::to_owned);
        line(&self.err).or_else(|| line(&self.out)).unwrap_or_else(|| "no message".to_owned())
    }
}

impl Output {
    /// What systemctl complains of: its last line only says where to read on.
    pub(in crate::io) fn complaint(&self) -> String {
        let told = |line: &&str| !line.is_empty() && !line.starts_with("See ");
        let lines: Vec<&str> = self.err.lines().map(str::trim).filter(told).collect();
        if lines.is_empty() { self.last_line() } else { lines.join("; ") }
    }
}

/// A command whose environment holds nothing of ours (no `PG*` variable reaches libpq) and whose messages are English.
pub(in crate::io) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").env("PATH", SEARCH_PATH);
    command.envs(privileges::own_variables());
    command.current_dir("/").stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    command
}

/// Kills the whole process group when dropped before the child was reaped: `pg_basebackup` forks a helper.
pub(in crate::io) struct Group(Option<Pid>);

impl Group {
    pub(in crate::io) fn of(child: &tokio::process::Child) -> Group {
        Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw))
    }
    /// The leader was reaped: its number may belong to somebody else from now on.
    pub(in crate::io) fn reaped(&mut self) {
        self.0 = None;
    }
}
impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _gone_is_fine = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs `command` to its end, or kills it at `limit`. `what` names it in errors.
pub(in crate::io) async fn run(command: Command, what: &str, limit: Duration) -> Result<Output, PgError> {
    run_with_input(command, what, None, limit).await
}

/// The same with `input` on its standard input; a program that does not read it is no error.
pub(in crate::io) async fn run_with_input(
    mut command: Command,
    what: &str,
    input: Option<&[u8]>,
    limit: Duration,
) -> Result<Output, PgError> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| not_started(what, &error))?;
    let mut group = Group::of(&child);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let stdin = child.stdin.take();
    let feed = async move {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            let _it_may_not_want_it = stdin.write_all(input).await;
        }
    };
    let work = async {
        let (out, err, status, ()) = tokio::join!(tail(out), tail(err), child.wait(), feed);
        (out, err, status)
    };
    let Ok((out, err, status)) = tokio::time::timeout(limit, work).await else {
        return Err(PgError::TimedOut(format!("{what} did not end within {limit:?} and was killed")));
    };
    group.reaped();
    let status = status.map_err(|error| PgError::Failed(format!("{what} could not be waited for: {error}")))?;
    Ok(Output { ok: status.success(), out, err })
}

/// The same for a command that may leave a daemon behind: its output goes to a file, because a PostgreSQL that
/// inherits a pipe of ours would die of it one day, and nobody but the command itself is killed at the limit.
pub(in crate::io) async fn run_detached(
    mut command: Command,
    what: &str,
    log: &std::path::Path,
    limit: Duration,
) -> Result<Output, PgError> {
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(log);
    std::fs::write(log, b"")
        .map_err(|error| PgError::Failed(format!("{} cannot be written: {error}", log.display())))?;
    let (out, err) = match (open(), open()) {
        (Ok(out), Ok(err)) => (out, err),
        (Err(error), _) | (_, Err(error)) => {
            return Err(PgError::Failed(format!("{} cannot be written: {error}", log.display())));
        }
    };
    command.stdout(out).stderr(err);
    let mut child = command.spawn().map_err(|error| not_started(what, &error))?;
    let Ok(status) = tokio::time::timeout(limit, child.wait()).await else {
        return Err(PgError::TimedOut(format!("{what} did not end within {limit:?} and was killed")));
    };
    let status = status.map_err(|error| PgError::Failed(format!("{what} could not be waited for: {error}")))?;
    let err = super::files::tail_from(log, 0, OUTPUT_LIMIT);
    Ok(Output { ok: status.success(), out: String::new(), err })
}

pub(in crate::io) fn not_started(what: &str, error: &std::io::Error) -> PgError {
    PgError::Failed(format!("{what} could not be started: {error}; check bin_dir of this node"))
}

/// Reads to the end, keeping the last [`OUTPUT_LIMIT`] bytes.
async fn tail(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut kept, mut chunk) = (Vec::new(), [0_u8; 4096]);
    while let Ok(read) = stream.read(&mut chunk).await {
        if read == 0 {
            break;
        }
        keep_tail(&mut kept, chunk.get(..read).unwrap_or_default());
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Appends, dropping from the front what exceeds [`OUTPUT_LIMIT`].
pub(in crate::io) fn keep_tail(kept: &mut Vec<u8>, more: &[u8]) {
    kept.extend_from_slice(more);
    if kept.len() > OUTPUT_LIMIT {
        kept.drain(..kept.len() - OUTPUT_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemctl_is_quoted_without_its_advice() {
        let said = |err: &str| Output { ok: false, out: String::new(), err: err.to_owned() }.complaint();
        let denied =
            "Failed to start x.service: Access denied\nSee system logs and 'systemctl status x' for details.\n";
        assert_eq!(said(denied), "Failed to start x.service: Access denied");
        assert_eq!(said("Job for a failed.\nSee \"a\".\nJob for b failed.\n"), "Job for a failed.; Job for b failed.");
        assert_eq!(said("See alone"), "See alone");
        assert_eq!(said(""), "no message");
    }
}
