//! Durable writes: after they return, a power cut finds the old content or the new one, never half of either.

use super::PgError;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// One piece of long file work at a time: what a dropped caller began ends before the next begins.
static APART: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Does file work that takes its time on a thread of its own: the daemon's few workers go on answering meanwhile.
pub(super) async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PgError> + Send + 'static,
) -> Result<T, PgError> {
    let one_at_a_time = APART.lock().await;
    let done = tokio::task::spawn_blocking(move || {
        let _until_the_end = one_at_a_time;
        work()
    });
    done.await.unwrap_or_else(|error| Err(PgError::Failed(format!("file work did not end: {error}; call again"))))
}

/// Waits for what [`apart`] still does for a caller that was dropped.
pub(super) async fn settled() {
    drop(APART.lock().await);
}

/// `path: error`, as a fault of ours.
pub(super) fn failed(action: &str, path: &Path, error: &io::Error) -> PgError {
    PgError::Failed(format!("{} cannot be {action}: {error}", path.display()))
}

/// Replaces `path` by `content` through a temporary file beside it: written, synced, renamed, directory synced.
pub(super) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), PgError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".portcullis-tmp");
    let temporary = Path::new(&name);
    let write = || -> io::Result<()> {
        // A left-over of a crash: its mode may be another one.
        match fs::remove_file(temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(temporary, path)
    };
    write().map_err(|error| failed("written", path, &error))?;
    sync_parent(path)
}

/// Removes a file if it is there; the directory is synced.
pub(super) fn remove(path: &Path) -> Result<(), PgError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("removed", path, &error)),
    }
}

/// Copies one file with its mode and syncs it.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), PgError> {
    fs::copy(from, to).and_then(|_| File::open(to)?.sync_all()).map_err(|error| failed("written", to, &error))
}

/// Syncs the directory that holds `path`.
pub(super) fn sync_parent(path: &Path) -> Result<(), PgError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|error| failed("synced", parent, &error))
}

/// Bytes in all files below `dir`, links not followed; what cannot be seen counts for nothing.
pub(super) fn size(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let of = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => size(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(of).sum()
}

/// [`size`] of a directory; of anything else its own.
pub(super) fn size_of(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => size(path),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    }
}

/// Text of a log from byte `from` on, at most its last `limit` bytes; empty when it cannot be read.
pub(super) fn tail_from(path: &Path, from: u64, limit: usize) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let end = file.metadata()?.len();
        let bound = u64::try_from(limit).unwrap_or(u64::MAX);
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(bound))))?;
        let mut bytes = Vec::new();
        file.take(bound).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_only_worker_goes_on_while_files_are_worked_on() {
        let (to, from) = std::sync::mpsc::channel();
        let (work, ()) = tokio::join!(apart(move || Ok(from.recv_timeout(Duration::from_secs(60)).is_ok())), async {
            to.send(()).expect("it waits")
        });
        assert_eq!(work, Ok(true), "the worker was blocked");
    }

    #[tokio::test]
    async fn work_of_a_dropped_caller_ends_before_the_next_begins() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (to, from) = std::sync::mpsc::channel();
        let file = dir.path().join("done");
        let written = file.clone();
        let mut work = Box::pin(apart(move || {
            let _told = from.recv_timeout(Duration::from_secs(60));
            fs::write(written, "").map_err(|error| PgError::Failed(error.to_string()))
        }));
        while APART.try_lock().is_ok() {
            assert!(tokio::time::timeout(Duration::from_millis(1), &mut work).await.is_err());
        }
        drop(work);
        to.send(()).expect("it waits");
        settled().await;
        assert!(file.exists());
    }
}
