//! What is kept of a diverged end before a rewind changes anything: beside the data directory, or under `state_dir`.
//!
//! What only this node has (the WAL from where the histories part), the control file, this machine's own files, a
//! report for people, and what a second pass of the rewind needs ([`super::again`]).

use super::divergence::Divergence;
use super::paths::dated_name;
use super::{Cluster, Peer, PgError, SourceFacts, again, files, history, own};
use crate::base::ids::Lsn;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Stands between the data directory's name and the time in the name of what is kept of a diverged end.
pub const DIVERGED_INFIX: &str = ".diverged-";

/// What a rewind puts elsewhere before it begins.
#[derive(Debug, Clone)]
pub(super) struct Keeping {
    /// Where.
    pub(super) dir: PathBuf,
    diverged: Divergence,
    /// WAL from here to there is kept as well, which the source has not: `pg_rewind` reads it, and removes it.
    common: Option<(Lsn, Lsn)>,
}

impl Keeping {
    /// How much that is; `data_dir` is where it comes from.
    pub(super) fn bytes(&self, data_dir: &Path) -> u64 {
        let device = |dir: &Path| fs::metadata(dir).ok().map(|meta| meta.dev());
        let foreign = if device(&self.dir) == device(data_dir) { 0 } else { own::foreign_bytes(data_dir) };
        foreign + kept_wal(data_dir, self).unwrap_or_default().iter().map(|(_, size)| size).sum::<u64>()
    }
}

impl Cluster {
    /// What a rewind keeps, and where. `common`: the checkpoint it goes back to, and the oldest WAL of the source.
    pub(super) fn keeping(&self, diverged: &Divergence, common: Option<(Lsn, Lsn)>) -> Result<Keeping, PgError> {
        let base = self.kept_base()?;
        let dir = base.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Keeping { dir, diverged: diverged.clone(), common })
    }

    /// What only this node has, in a dated directory, before anything of it is changed.
    pub(super) async fn keep_diverged(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        keeping: Keeping,
    ) -> Result<PathBuf, PgError> {
        let (data_dir, kept) = (self.settings.data_dir.clone(), dated_name(&self.kept_base()?, DIVERGED_INFIX));
        let diverged = &keeping.diverged;
        let pg_waldump = self.bin("pg_waldump");
        // One command for each timeline that was gone through here alone.
        let look: Vec<String> = (self.local().await?.history.from(diverged.at))
            .map(|span| {
                let (tool, wal) = (pg_waldump.display(), kept.join("wal"));
                format!("{tool} -p {} -t {} -s {}", wal.display(), span.timeline, span.begin)
            })
            .collect();
        let report = serde_json::json!({
            "node": self.node.as_str(),
            "diverged_at": diverged.at.to_string(),
            "timeline": diverged.timeline.0,
            "diverged_transactions": diverged.transactions,
            "all_wal_kept": diverged.whole,
            "look": look.join("; "),
        });
        let report = format!("{report:#}\n");
        let begun = again::Begun::now(peer, source, diverged);
        files::apart(move || {
            keep_in(&kept, &data_dir, &keeping, &report)?;
            begun.write(&kept)?;
            Ok(kept)
        })
        .await
    }
}

fn keep_in(kept: &Path, data_dir: &Path, keeping: &Keeping, report: &str) -> Result<(), PgError> {
    for dir in [kept.to_owned(), kept.join("wal"), kept.join("own")] {
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|error| files::failed("made", &dir, &error))?;
    }
    own::keep(data_dir, &kept.join("own"))?;
    files::copy(&data_dir.join("global/pg_control"), &kept.join("pg_control"))?;
    for (name, _) in kept_wal(data_dir, keeping)? {
        files::copy(&data_dir.join("pg_wal").join(&name), &kept.join("wal").join(&name))?;
    }
    files::sync_parent(&kept.join("wal/."))?;
    files::replace(&kept.join("report.json"), report.as_bytes(), 0o600)
}

/// The files of `pg_wal` that tell what diverged, or without which it could not be done again, with their sizes.
fn kept_wal(data_dir: &Path, keeping: &Keeping) -> Result<Vec<(OsString, u64)>, PgError> {
    let wal = data_dir.join("pg_wal");
    let entries = fs::read_dir(&wal).map_err(|error| files::failed("read", &wal, &error))?.flatten();
    let wanted = |entry: fs::DirEntry| {
        let (name, meta) = (entry.file_name(), entry.metadata().ok()?);
        let text = name.to_str()?;
        let wanted = is_diverged_segment(text, &keeping.diverged, meta.len())
            || keeping.common.is_some_and(|(from, to)| is_common_segment(text, from, to, meta.len()));
        let tells = text.ends_with(".history") || wanted;
        (tells && meta.is_file()).then(|| (name.clone(), meta.len()))
    };
    Ok(entries.filter_map(wanted).collect())
}

/// A segment with WAL from where the histories part; one made in advance has none. `size` is the file's, which is the
/// segment size.
fn is_diverged_segment(name: &str, diverged: &Divergence, size: u64) -> bool {
    history::segment_of(name, size.max(1)).is_some_and(|(timeline, first)| {
        let written = diverged.before.is_none_or(|before| first < before);
        timeline >= diverged.timeline && first.0 + size > diverged.at.0 && written
    })
}

/// A segment with WAL after the checkpoint that `pg_rewind` goes back to, older than all that the source has.
fn is_common_segment(name: &str, checkpoint: Lsn, oldest: Lsn, size: u64) -> bool {
    history::segment_of(name, size.max(1)).is_some_and(|(_, first)| first.0 + size > checkpoint.0 && first < oldest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ids::TimelineId;

    #[test]
    fn diverged_segments_are_those_from_the_fork_on() {
        let diverged = Divergence {
            at: Lsn(0x500_0098),
            timeline: TimelineId(2),
            transactions: 0,
            whole: true,
            before: Some(Lsn(0x700_0100)),
        };
        let size = 16 << 20;
        let common = Lsn(0x300_0060);
        for (name, wanted) in [
            ("000000020000000000000002", false),
            ("000000020000000000000003", true),
            ("000000020000000000000004", false),
            ("00000002.history", false),
        ] {
            assert_eq!(is_common_segment(name, common, Lsn(0x400_0000), size), wanted, "{name}");
        }
        for (name, wanted) in [
            ("000000020000000000000004", false),
            ("000000020000000000000005", true),
            ("000000030000000000000006", true),
            ("000000030000000000000007", true),
            ("000000030000000000000008", false),
            ("000000010000000000000005", false),
            ("00000003.history", false),
        ] {
            assert_eq!(is_diverged_segment(name, &diverged, size), wanted, "{name}");
        }
    }
}
