//! Room on disk: what a clone and a rewind need, and where, asked before either touches anything.
//!
//! A clone needs the source's size beside the old directory. A rewind works in place: it needs what is kept of the
//! diverged end, and the growth from what is here to what the source has.

use super::clone::SET_ASIDE_INFIX;
use super::kept::Keeping;
use super::{Cluster, PgError, SourceFacts, files, paths, spaces};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Free space beyond what is known to be needed: the WAL of the copy's own duration.
const SPACE_MARGIN: u64 = 256 * 1024 * 1024;

/// A file system with too little room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Short {
    dir: PathBuf,
    free: u64,
    needed: u64,
    /// Without the margin.
    bytes: u64,
}

impl Short {
    /// `what` needs it.
    pub(super) fn refusal(&self, what: &str) -> PgError {
        PgError::Refused(format!(
            "{} has {} free, {what} {} ({}, and {} kept free for WAL and growth meanwhile); make room, for instance by \
             removing directories named *{SET_ASIDE_INFIX}*",
            self.dir.display(),
            size(self.free),
            size(self.needed),
            size(self.bytes),
            size(self.needed.saturating_sub(self.bytes)),
        ))
    }

    /// `DIR has so much too little`
    pub(super) fn words(&self) -> String {
        format!("{} has {} too little", self.dir.display(), size(self.needed.saturating_sub(self.free)))
    }
}

/// As people say it.
fn size(bytes: u64) -> String {
    let mib = bytes.div_ceil(1 << 20);
    if mib < 10 * 1024 { format!("{mib} MiB") } else { format!("{} GiB", mib.div_ceil(1024)) }
}

/// The first file system on which what comes to these directories has no room. `left_over` bytes will be removed from
/// each before.
pub(super) fn short(wanted: Vec<(PathBuf, u64)>, left_over: u64) -> Result<Option<Short>, PgError> {
    let mut needs: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (dir, bytes) in wanted {
        // Where nothing is yet, it will be on its parent's.
        let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned();
        let device = fs::metadata(&there).map_or(0, |meta| meta.dev());
        match needs.iter_mut().find(|(known, ..)| *known == device) {
            Some((_, _, sum)) => *sum = sum.saturating_add(bytes),
            None => needs.push((device, there, bytes)),
        }
    }
    for (_, dir, bytes) in needs {
        let space =
            rustix::fs::statvfs(&dir).map_err(|error| files::failed("examined", &dir, &std::io::Error::from(error)))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize).saturating_add(left_over);
        let needed = bytes.saturating_add(bytes / 20).saturating_add(SPACE_MARGIN);
        if free < needed {
            return Ok(Some(Short { dir, free, needed, bytes }));
        }
    }
    Ok(None)
}

impl Cluster {
    /// What keeps a rewind from having room; nothing is touched. An estimate: files that are here already are rewritten
    /// in place, and of the source's WAL only its length is known.
    pub(super) async fn rewind_room(&self, source: &SourceFacts, keeping: &Keeping) -> Result<Option<Short>, PgError> {
        let (target, wal) = (paths::resolved(&self.settings.data_dir), spaces::wal_dir(&self.settings.data_dir));
        let (source, keeping) = (source.clone(), keeping.clone());
        files::apart(move || {
            let pg_wal = target.join(spaces::WAL);
            let their_wal = source.lsn.0.saturating_sub(source.oldest.0);
            let mut wanted = Vec::new();
            for (dir, bytes) in spaces::growth(&source, None, &target) {
                let here = if dir == target {
                    files::size(&target.join("base")) + files::size(&target.join("global"))
                } else {
                    files::size(&dir)
                };
                wanted.push((dir, bytes.saturating_sub(here)));
            }
            wanted.push((keeping.dir.clone(), keeping.bytes(&target)));
            let our_wal = files::size(&pg_wal.join("."));
            wanted.push((wal.unwrap_or(pg_wal), their_wal.saturating_sub(our_wal)));
            short(wanted, 0)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_to_one_file_system_is_summed_and_the_shortage_said_in_words() {
        let dir = tempfile::tempdir().expect("tempdir");
        let half = u64::MAX / 4;
        let (one, two) = (dir.path().join("not/there/yet"), dir.path().join("two"));
        let found = short(vec![(one.clone(), half), (two, half)], 0).expect("looked").expect("too little");
        assert!(found.needed > half + half && found.dir == dir.path(), "{found:?}");
        assert_eq!(short(vec![(one, 0)], u64::MAX).expect("looked"), None);
        let found = Short { dir: "/data".into(), free: 5 << 30, needed: 2048 << 30, bytes: 1900 << 30 };
        assert_eq!(found.words(), "/data has 2043 GiB too little");
        let refusal = found.refusal("the copy needs").to_string();
        let words = "/data has 5120 MiB free, the copy needs 2048 GiB (1900 GiB, and 148 GiB kept free for WAL";
        assert!(refusal.starts_with(words) && refusal.contains("make room"), "{refusal}");
    }
}
