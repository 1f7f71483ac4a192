//! The durable log on disk: one file under `state_dir`, appended and fsynced before anybody is told, one lock.
//!
//! It does NOT decide what is written. **Invariants:** an append that returned `Ok` is on disk; one that failed left
//! the file as it was (or the journal refuses every further append); two daemons never share a `state_dir`.
//!
//! Debug builds alone: a file `crash-at-record` under `state_dir` that holds a number n has the n-th append from now on
//! end the daemon as kill -9 would, when it is on disk and before anybody is told. Nothing of that is in a release.

use crate::engine::durable::{Durable, Entry};
use crate::wire::journal as frame;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file's name under `state_dir`.
const FILE: &str = "journal";
/// Size above which the file is replaced by one that begins with a snapshot.
const COMPACT_ABOVE: u64 = 256 * 1024;
/// Tries for the lock, with a pause between them: the last threads of a daemon that was just killed may still hold it.
const LOCK_TRIES: u32 = 50;
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// The open journal; holds the lock on `state_dir`.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    file: File,
    _lock: File,
    len: u64,
    next_sequence: u64,
    state: Durable,
    broken: Option<String>,
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

/// Replays the journal of `state_dir` without its lock, for who only asks; `None`: there is none.
///
/// # Errors
/// One sentence: it cannot be read or is damaged.
pub fn replay(state_dir: &Path) -> Result<Option<Durable>, String> {
    let path = state_dir.join(FILE);
    match std::fs::read(&path) {
        Ok(bytes) => read_state(&path, &bytes).map(|(state, _)| Some(state)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

fn read_state(path: &Path, bytes: &[u8]) -> Result<(Durable, frame::Decoded), String> {
    let decoded = frame::decode(bytes).map_err(|why| {
        format!(
            "{}: {why}; nothing may be concluded from it: set the file aside and bring this node back with `rejoin`",
            path.display()
        )
    })?;
    let mut state = Durable::default();
    for (sequence, payload) in &decoded.records {
        let entry: Entry = serde_json::from_slice(payload).map_err(|error| {
            let why = format!("record {sequence} is not understood ({error})");
            format!("{}: {why}; was it written by a newer version?", path.display())
        })?;
        state.apply(&entry);
    }
    Ok((state, decoded))
}

impl Journal {
    /// Opens (or begins) the journal of `state_dir` and replays it. A torn tail is cut off; the second value says so.
    ///
    /// # Errors
    /// One sentence: another daemon holds the lock, the file is damaged in the middle, or the disk refuses.
    pub fn open(state_dir: &Path) -> Result<(Journal, Durable, bool), String> {
        let told = |what: &str, error: &dyn std::fmt::Display| format!("{}: {what}: {error}", state_dir.display());
        let lock = options().open(state_dir.join("lock")).map_err(|e| told("the lock cannot be opened", &e))?;
        let taken = (0..LOCK_TRIES).any(|tried| {
            if tried > 0 {
                std::thread::sleep(LOCK_RETRY);
            }
            flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        taken.then_some(()).ok_or_else(|| {
            format!(
                "{} is in use by another portcullis daemon; stop it, or give each its own state_dir",
                state_dir.display()
            )
        })?;
        let path = state_dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(told("the journal cannot be read", &error)),
        };
        let (state, decoded) = read_state(&path, &bytes)?;
        let mut file = options().open(&path).map_err(|e| told("the journal cannot be opened", &e))?;
        let len = decoded.good_len as u64;
        if decoded.torn {
            file.set_len(len)
                .and_then(|()| file.sync_all())
                .map_err(|e| told("the torn tail cannot be cut off", &e))?;
        }
        file.seek(SeekFrom::Start(len)).map_err(|e| told("the journal cannot be positioned", &e))?;
        sync_dir(state_dir)?;
        let next_sequence = decoded.records.last().map_or(1, |(sequence, _)| sequence + 1);
        let dir = state_dir.to_owned();
        let journal = Journal { dir, file, _lock: lock, len, next_sequence, state: state.clone(), broken: None };
        Ok((journal, state, decoded.torn))
    }

    /// Appends and fsyncs; when this returns `Ok` the entries survive a power cut.
    ///
    /// # Errors
    /// The disk's reason; nothing was appended.
    pub fn append(&mut self, entries: &[Entry]) -> Result<(), String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        let mut bytes = Vec::new();
        let mut sequence = self.next_sequence;
        for entry in entries {
            let payload = serde_json::to_vec(entry).map_err(|error| error.to_string())?;
            bytes.extend(frame::encode(sequence, &payload).ok_or("an entry is too long for the journal")?);
            sequence += 1;
        }
        if let Err(error) = self.file.write_all(&bytes).and_then(|()| self.file.sync_data()) {
            let back = self.file.set_len(self.len).and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
            if back.is_err() {
                self.broken = Some(format!("the journal cannot be written any more ({error}); restart the daemon"));
            }
            return Err(error.to_string());
        }
        self.len += bytes.len() as u64;
        self.next_sequence = sequence;
        #[cfg(debug_assertions)]
        crash_if_told(&self.dir);
        for entry in entries {
            self.state.apply(entry);
        }
        if self.len > COMPACT_ABOVE
            && let Err(why) = self.compact()
        {
            tracing::warn!("the journal could not be made shorter: {why}");
        }
        Ok(())
    }

    /// Replaces the file by one that begins with the whole state.
    fn compact(&mut self) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let payload = serde_json::to_vec(&Entry::Snapshot(Box::new(self.state.clone()))).map_err(|e| e.to_string())?;
        let bytes = frame::encode(self.next_sequence, &payload).ok_or("the snapshot is too long")?;
        let fresh = self.dir.join("journal.new");
        let mut file = options().truncate(true).open(&fresh).map_err(text)?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(text)?;
        std::fs::rename(&fresh, self.dir.join(FILE)).map_err(text)?;
        self.file = file;
        self.len = bytes.len() as u64;
        self.next_sequence += 1;
        // Without the directory on disk a power cut could bring the old file back, and later entries be lost with it.
        sync_dir(&self.dir).inspect_err(|why| self.broken = Some(format!("{why}; restart the daemon")))
    }
}

/// The crash points of the lab (tests/soak/play/crash.rs).
#[cfg(debug_assertions)]
fn crash_if_told(dir: &Path) {
    let file = dir.join("crash-at-record");
    let Ok(text) = std::fs::read_to_string(&file) else { return };
    let left = text.trim().parse::<u32>().unwrap_or(0);
    let _told_once = if left > 1 { std::fs::write(&file, (left - 1).to_string()) } else { std::fs::remove_file(&file) };
    if left == 1 {
        let _gone = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

fn sync_dir(dir: &Path) -> Result<(), String> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|error| format!("{}: {error}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ids::Epoch;

    fn seen(epoch: u64) -> Entry {
        Entry::Seen { epoch: Epoch(epoch) }
    }

    #[test]
    fn what_was_appended_is_there_after_a_reopen() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut journal, state, torn) = Journal::open(dir.path()).expect("fresh");
        assert!(state.is_virgin() && !torn);
        journal.append(&[Entry::Initialised, seen(4)]).expect("append");
        assert!(Journal::open(dir.path()).is_err(), "the lock is held");
        drop(journal);
        let (_, state, _) = Journal::open(dir.path()).expect("reopen");
        assert_eq!((state.seen, state.initialised), (Epoch(4), true));
    }

    #[test]
    fn a_torn_tail_is_recovered_and_a_damaged_middle_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut journal, ..) = Journal::open(dir.path()).expect("fresh");
        journal.append(&[seen(1)]).expect("append");
        journal.append(&[seen(2)]).expect("append");
        drop(journal);
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).expect("read");
        std::fs::write(&path, &whole[..whole.len() - 3]).expect("write");
        let (mut journal, state, torn) = Journal::open(dir.path()).expect("torn");
        assert_eq!((state.seen, torn), (Epoch(1), true));
        journal.append(&[seen(3)]).expect("append after the tail was cut off");
        drop(journal);
        assert_eq!(Journal::open(dir.path()).expect("reopen").1.seen, Epoch(3));
        let mut bad = std::fs::read(&path).expect("read");
        bad[20] ^= 1;
        std::fs::write(&path, bad).expect("write");
        let why = Journal::open(dir.path()).expect_err("corrupt");
        assert!(why.contains("rejoin"), "{why}");
    }

    #[test]
    fn a_long_journal_is_compacted_without_forgetting() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut journal, ..) = Journal::open(dir.path()).expect("fresh");
        let fence = Entry::Fenced { number: Epoch(9), reason: "x".repeat(1000), at: String::new() };
        for _ in 0..400 {
            journal.append(std::slice::from_ref(&fence)).expect("append");
        }
        journal.append(&[seen(7)]).expect("append");
        assert!(journal.len < COMPACT_ABOVE);
        drop(journal);
        let (_, state, _) = Journal::open(dir.path()).expect("reopen");
        assert_eq!((state.fence, state.seen), (Epoch(9), Epoch(7)));
    }
}
