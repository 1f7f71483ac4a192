//! A long tool watched while it runs: how many bytes it moved, and what else it says it does.

use super::{PgError, tool};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// A tool is killed after this long without a sign of life: `pg_basebackup` waits for a checkpoint of the source, and
/// both sync all files at the end, without a word.
const STALL_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Of a line of the tool's words; longer ones are cut.
const LINE_LIMIT: usize = 4096;

/// A sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tick {
    /// Bytes moved, and how many there are by the tool's estimate.
    Bytes { done: u64, total: Option<u64> },
    /// What it does now, which moves no bytes that are counted.
    Phase(&'static str),
    /// Something to be told once.
    Words(String),
    /// The same, with how many transactions the source does not have.
    Diverged { transactions: u64, words: String },
    /// They could not be counted, and why.
    Uncounted(String),
}

/// Runs `command` to its end. `what` names it in errors; its own complaint is quoted.
pub(super) async fn watched(mut command: Command, what: &str, tell: &mut impl FnMut(Tick)) -> Result<(), PgError> {
    let stalled = || PgError::TimedOut(format!("{what} gave no sign of life for {STALL_LIMIT:?} and was killed"));
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| tool::not_started(what, &error))?;
    let mut group = tool::Group::of(&child);
    let mut said = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        let (mut line, mut chunk) = (Vec::new(), [0_u8; 1024]);
        loop {
            let read = tokio::time::timeout(STALL_LIMIT, stderr.read(&mut chunk)).await.map_err(|_| stalled())?;
            let count = read.unwrap_or(0);
            for &byte in chunk.get(..count).unwrap_or_default() {
                if !matches!(byte, b'\n' | b'\r') {
                    if line.len() < LINE_LIMIT {
                        line.push(byte);
                    }
                    continue;
                }
                let text = String::from_utf8_lossy(&line).into_owned();
                match read_line(&text) {
                    Some(tick) => tell(tick),
                    None => tool::keep_tail(&mut said, format!("{text}\n").as_bytes()),
                }
                line.clear();
            }
            if count == 0 {
                tool::keep_tail(&mut said, &line);
                break;
            }
        }
    }
    let status = tokio::time::timeout(STALL_LIMIT, child.wait()).await.map_err(|_| stalled())?;
    group.reaped();
    if status.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    // The error itself comes before its clean-up messages.
    let reason = said.lines().rev().find(|line| line.contains("error:")).or_else(|| said.lines().last());
    Err(PgError::Failed(format!("{what} failed: {}", reason.map_or("no message", str::trim))))
}

fn read_line(line: &str) -> Option<Tick> {
    if let Some((done, total)) = read_bytes(line) {
        return Some(Tick::Bytes { done, total });
    }
    let phase = |part: &str| line.contains(part) && !line.contains("error:");
    if phase("waiting for checkpoint") {
        Some(Tick::Phase("waiting for a checkpoint of the source"))
    } else if phase("waiting for background process") {
        Some(Tick::Phase("waiting for the last WAL of the source"))
    } else if phase("syncing data to disk") || phase("syncing target data directory") {
        Some(Tick::Phase("all is copied; syncing it to disk"))
    } else if phase("reading WAL in target") {
        Some(Tick::Phase("reading what changed here since the histories parted"))
    } else {
        None
    }
}

/// `  4096/23456 kB (17%), 0/1 tablespace ...` of `pg_basebackup --progress`, in bytes; `pg_rewind` writes alike.
fn read_bytes(line: &str) -> Option<(u64, Option<u64>)> {
    let (numbers, _) = line.split_once(" kB (")?;
    let (done, total) = numbers.split_once('/')?;
    let bytes = |text: &str| text.trim().parse::<u64>().ok()?.checked_mul(1024);
    Some((bytes(done)?, bytes(total)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_lines_are_told_from_words() {
        let bytes = |done: u64, total: u64| Some(Tick::Bytes { done: done * 1024, total: Some(total * 1024) });
        assert_eq!(read_line("  4096/8192 kB (50%), 0/1 tablespace (...)"), bytes(4096, 8192));
        assert_eq!(read_line("  12/340 kB (3%) copied"), bytes(12, 340));
        assert_eq!(read_line("pg_basebackup: error: 1/2 kB ("), None);
        assert_eq!(read_line("pg_basebackup: error: waiting for checkpoint failed"), None);
        for (line, word) in [
            ("pg_basebackup: initiating base backup, waiting for checkpoint to complete", "checkpoint"),
            ("pg_basebackup: syncing data to disk ...", "syncing"),
            ("pg_rewind: syncing target data directory", "syncing"),
        ] {
            assert!(matches!(read_line(line), Some(Tick::Phase(text)) if text.contains(word)), "{line}");
        }
    }
}
