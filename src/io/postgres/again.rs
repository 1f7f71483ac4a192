//! A rewind that was interrupted, done again.
//!
//! `pg_rewind` writes the new control file last, but on the way it removes WAL it needs for a second pass. Both are
//! kept before it begins, with this machine's configuration; put back, they make a second pass find every block that
//! the first one was to find. What the first one copied already is a state of the source on the way to now, which the
//! replay of the source's WAL from the last common checkpoint on brings to its end as it does the rest.
//!
//! **Invariants:** not after a boot: files grown by the first pass may then have lost what was never synced, and the
//! second pass would take their length for their content. Not from another source, or from another timeline of it: its
//! history may lack what the first pass brought. Then only a clone is right.

use super::divergence::Divergence;
use super::progress::Tick;
use super::rewind::{Mark, Phase, Rejoined};
use super::{Cluster, Peer, PgError, SourceFacts, control, files, history, own, spaces};
use crate::base::ids::{Lsn, SystemId, TimelineId};
use crate::io::clock;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// In the directory of what is kept.
const FILE: &str = "begun.json";

/// A rewind as it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    boot: String,
    /// Name of the source's node.
    source: String,
    system_id: SystemId,
    timeline: TimelineId,
    history: Vec<(TimelineId, Lsn)>,
    diverged: Divergence,
}

impl Begun {
    pub(super) fn now(peer: &Peer, source: &SourceFacts, diverged: &Divergence) -> Begun {
        Begun {
            boot: clock::boot_id().unwrap_or_default(),
            source: peer.name.as_str().to_owned(),
            system_id: source.system_id,
            timeline: source.timeline,
            history: source.history.clone(),
            diverged: diverged.clone(),
        }
    }

    pub(super) fn write(&self, kept: &Path) -> Result<(), PgError> {
        let text = serde_json::to_string(self).map_err(|error| PgError::Failed(error.to_string()))?;
        files::replace(&kept.join(FILE), text.as_bytes(), 0o600)
    }

    fn read(kept: &Path) -> Option<Begun> {
        serde_json::from_slice(&fs::read(kept.join(FILE)).ok()?).ok()
    }

    /// Why it must not be done again.
    fn obstacle(&self, peer: Option<&Peer>, source: &SourceFacts, boot: &str) -> Option<&'static str> {
        if boot.is_empty() || self.boot != boot {
            Some("this machine has booted since")
        } else if self.system_id != source.system_id || peer.is_some_and(|peer| peer.name.as_str() != self.source) {
            Some("another node was its source")
        } else if (self.timeline, &self.history) != (source.timeline, &source.history) {
            Some("its source has been promoted since")
        } else {
            None
        }
    }
}

impl Cluster {
    /// How the rewind that was interrupted here began, if it can be done again; else why not.
    fn begun(&self, peer: Option<&Peer>, source: &SourceFacts) -> Result<(Mark, Begun), &'static str> {
        let mark = Mark::read(&self.state_dir).ok_or("nothing tells how it began")?;
        if mark.phase == Phase::Cloning {
            // Parts of it may be elsewhere, or what stands here of the copy.
            return Err("a copy was about to take its place");
        }
        let begun = Begun::read(&mark.kept).ok_or("what was kept of before is not there")?;
        let boot = clock::boot_id().unwrap_or_default();
        begun.obstacle(peer, source, &boot).map_or(Ok((mark, begun)), Err)
    }

    /// Whether it can, as far as can be told without knowing the source's name.
    pub(super) fn may_rewind_again(&self, source: &SourceFacts) -> Result<(), &'static str> {
        self.begun(None, source).map(|_| ())
    }

    /// The inner error says why it must be a clone.
    pub(super) async fn rewind_again(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Result<Rejoined, String>, PgError> {
        let (mark, begun) = match self.begun(Some(peer), source) {
            Ok(found) => found,
            Err(why) => return Ok(Err(why.to_owned())),
        };
        tell(Tick::Words("a rewind was interrupted here: doing it again".to_owned()));
        let mark = Mark { phase: Phase::Rewinding, ..mark };
        mark.write(&self.state_dir)?;
        self.write_passfile()?;
        if let Err(error) = self.make_ready_again(&mark, source).await {
            return Ok(Err(error.to_string()));
        }
        let restore = self.can_restore_for_rewind().await;
        if let Err(why) = self.rehearse(peer, &begun.diverged, restore, tell).await {
            return Ok(Err(why));
        }
        let command = self.pg_rewind(peer, restore)?;
        self.run_rewind(command, mark, peer, tell).await
    }

    async fn make_ready_again(&self, mark: &Mark, source: &SourceFacts) -> Result<(), PgError> {
        let (kept, data_dir) = (mark.kept.clone(), self.settings.data_dir.clone());
        files::apart(move || put_back(&kept, &data_dir)).await?;
        let text = self.control_text(&self.settings.data_dir).await?;
        let size = control::control_field(&text, "Bytes per WAL segment").and_then(|size| size.parse().ok());
        let (data_dir, facts) = (self.settings.data_dir.clone(), source.clone());
        files::apart(move || {
            spaces::make_missing(&facts)?;
            remove_parts(&data_dir, size.unwrap_or(0))
        })
        .await
    }
}

/// Configuration, WAL and control file as they were before the first pass.
fn put_back(kept: &Path, data_dir: &Path) -> Result<(), PgError> {
    own::keep(&kept.join("own"), data_dir)?;
    let wal = kept.join("wal");
    let segments = fs::read_dir(&wal).map_err(|error| files::failed("read", &wal, &error))?;
    for segment in segments.flatten() {
        files::copy(&segment.path(), &data_dir.join(spaces::WAL).join(segment.file_name()))?;
    }
    files::remove(&data_dir.join("backup_label"))?;
    files::copy(&kept.join("pg_control"), &data_dir.join("global/pg_control"))
}

/// Removes WAL segments that the first pass did not copy whole: the source has them.
fn remove_parts(data_dir: &Path, size: u64) -> Result<(), PgError> {
    let wal = data_dir.join(spaces::WAL);
    for entry in fs::read_dir(&wal).map_err(|error| files::failed("read", &wal, &error))?.flatten() {
        let is_segment = entry.file_name().to_str().is_some_and(|name| history::segment_of(name, size).is_some());
        if is_segment && entry.metadata().is_ok_and(|meta| meta.len() != size) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewind_is_not_done_again_after_a_boot_nor_from_another_history() {
        let source = SourceFacts {
            system_id: SystemId(1),
            bytes: 0,
            tablespaces: 0,
            spaces: Vec::new(),
            timeline: TimelineId(2),
            history: vec![(TimelineId(1), Lsn(80))],
            control_timeline: TimelineId(2),
            lsn: Lsn(100),
            oldest: Lsn(0),
            same_tail: None,
        };
        let peer = |name: &str| Peer { name: name.parse().expect("name"), host: String::new(), port: 1 };
        let diverged = Divergence { at: Lsn(80), timeline: TimelineId(1), transactions: 3, whole: true, before: None };
        let begun = Begun { boot: "one".to_owned(), ..Begun::now(&peer("midna"), &source, &diverged) };
        let dir = tempfile::tempdir().expect("tempdir");
        begun.write(dir.path()).expect("written");
        assert_eq!(Begun::read(dir.path()).as_ref(), Some(&begun));
        let midna = peer("midna");
        assert_eq!(begun.obstacle(Some(&midna), &SourceFacts { lsn: Lsn(200), ..source.clone() }, "one"), None);
        assert!(begun.obstacle(Some(&midna), &source, "two").is_some_and(|why| why.contains("booted")));
        assert!(begun.obstacle(Some(&midna), &source, "").is_some(), "unknown is not the same");
        assert!(begun.obstacle(Some(&peer("tor")), &source, "one").is_some_and(|why| why.contains("another node")));
        for other in [
            SourceFacts { timeline: TimelineId(3), ..source.clone() },
            SourceFacts { history: vec![(TimelineId(1), Lsn(70))], ..source.clone() },
        ] {
            assert!(begun.obstacle(Some(&midna), &other, "one").is_some_and(|why| why.contains("promoted")));
        }
    }

    #[test]
    fn half_copied_segments_go_and_whole_ones_stay() {
        let dir = tempfile::tempdir().expect("tempdir");
        let wal = dir.path().join(spaces::WAL);
        fs::create_dir(&wal).expect("mkdir");
        for (name, len) in [("000000010000000000000001", 16), ("000000010000000000000002", 7), ("00000002.history", 7)]
        {
            fs::write(wal.join(name), vec![0; len]).expect("write");
        }
        remove_parts(dir.path(), 16).expect("removed");
        let mut left: Vec<_> = fs::read_dir(&wal).expect("read").flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["000000010000000000000001", "00000002.history"]);
    }
}
