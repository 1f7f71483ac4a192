//! What of a cluster lies outside its data directory, at a clone: tablespaces, which stand at the same place as on the
//! source, and a WAL directory that `pg_wal` leads to, which is this machine's own. Each is made beside its place, then
//! swapped in together with the data directory.
//!
//! ```text
//!  P.portcullis-new (pg_basebackup) -> old DATA's link to P.set-aside-TIME -> P to there -> P.portcullis-new to P
//! ```
//!
//! The link comes first: a directory set aside never points to files that are not its own, and the link of one that a
//! crash left says under which name the old files go.

use super::clone::{SET_ASIDE_INFIX, make_private};
use super::paths::{dated_name, is_mount_point, may_write, resolved, with_suffix};
use super::{PgError, SourceFacts, files};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

const FRESH_SUFFIX: &str = ".portcullis-new";
/// Of the data directory.
const LINKS: &str = "pg_tblspc";
pub(super) const WAL: &str = "pg_wal";

/// Where `pg_wal` of this data directory leads, if it is a symbolic link; links resolved.
pub(super) fn wal_dir(data_dir: &Path) -> Option<PathBuf> {
    let link = data_dir.join(WAL);
    fs::symlink_metadata(&link).ok().filter(fs::Metadata::is_symlink).map(|_| resolved(&link))
}

fn fresh(space: &Path) -> PathBuf {
    with_suffix(space, FRESH_SUFFIX)
}

fn spaces(source: &SourceFacts) -> impl Iterator<Item = &Path> {
    source.spaces.iter().map(|(dir, _)| Path::new(dir))
}

/// The tablespaces, then the WAL directory.
fn outside<'a>(source: &'a SourceFacts, wal: Option<&'a Path>) -> impl Iterator<Item = &'a Path> {
    spaces(source).chain(wal)
}

/// Nothing can be put beside one of them.
pub(super) fn refuse(source: &SourceFacts, wal: Option<&Path>, data_dir: &Path) -> Result<(), PgError> {
    refuse_inside(source, data_dir)?;
    for space in spaces(source) {
        let parent = space.parent().unwrap_or(Path::new("/"));
        if !may_write(parent) {
            return Err(PgError::Refused(format!(
                "the tablespace {} is copied beside its place, and {} is not there or may not be written to by the \
                 owner of the data directory; make it, and give it to that user (chown)",
                space.display(),
                parent.display()
            )));
        }
        if is_mount_point(space) {
            return Err(PgError::Refused(format!(
                "the tablespace {} is a mount point here and cannot be set aside; mount one level higher",
                space.display()
            )));
        }
    }
    let Some(wal) = wal else { return Ok(()) };
    let (parent, name) = (wal.parent().unwrap_or(Path::new("/")), wal.display());
    if wal.starts_with(data_dir) {
        return Err(PgError::Refused(format!(
            "pg_wal leads to {name}, which is inside the data directory; make pg_wal a directory (mv), or move that \
             out of the data directory"
        )));
    }
    if is_mount_point(wal) {
        return Err(PgError::Refused(format!(
            "pg_wal leads to {name}, which is a mount point and cannot be set aside; with PostgreSQL stopped, move its \
             files into a directory made there and let pg_wal lead to that one"
        )));
    }
    if !may_write(parent) {
        return Err(PgError::Refused(format!(
            "pg_wal leads to {name}, beside which the copy's is made, and {} may not be written to by the owner of the \
             data directory; give it to that user (chown)",
            parent.display()
        )));
    }
    Ok(())
}

/// A tablespace of the source would be in the data directory here.
pub(super) fn refuse_inside(source: &SourceFacts, data_dir: &Path) -> Result<(), PgError> {
    if source.spaces.len() != usize::try_from(source.tablespaces).unwrap_or(usize::MAX) {
        return Err(PgError::Refused(
            "the source has tablespaces, and its daemon does not say where; bring both daemons to one version"
                .to_owned(),
        ));
    }
    for space in spaces(source) {
        let real = fs::canonicalize(space).unwrap_or_else(|_| space.to_owned());
        if space.starts_with(data_dir) || real.starts_with(data_dir) {
            return Err(PgError::Refused(format!(
                "the tablespace {} of the active node is inside this node's data directory {}, where a clone cannot \
                 put it; move its contents to a tablespace elsewhere (ALTER TABLE ... SET TABLESPACE) and drop it",
                space.display(),
                data_dir.display()
            )));
        }
    }
    Ok(())
}

/// The directories that grow by a copy, and by how many bytes; of the WAL nobody knows.
pub(super) fn growth(source: &SourceFacts, wal: Option<&Path>, base: &Path) -> Vec<(PathBuf, u64)> {
    let outside: u64 = source.spaces.iter().map(|(_, bytes)| bytes).sum();
    std::iter::once((base.to_owned(), source.bytes.saturating_sub(outside)))
        .chain(source.spaces.iter().map(|(dir, bytes)| (PathBuf::from(dir), *bytes)))
        .chain(wal.map(|wal| (wal.to_owned(), 0)))
        .collect()
}

/// Makes what tablespaces of the source are not here yet: `pg_rewind` makes their links, and not what they lead to.
pub(super) fn make_missing(source: &SourceFacts) -> Result<(), PgError> {
    for space in spaces(source).filter(|space| !space.exists()) {
        fs::DirBuilder::new().mode(0o700).create(space).map_err(|error| files::failed("made", space, &error))?;
        files::sync_parent(space)?;
    }
    Ok(())
}

/// Bytes of left-over copies, which the next one removes.
pub(super) fn left_over(source: &SourceFacts, wal: Option<&Path>) -> u64 {
    outside(source, wal).map(|space| files::size(&fresh(space))).sum()
}

/// Removes left-over copies of ours.
pub(super) fn clear(source: &SourceFacts, wal: Option<&Path>) -> Result<(), PgError> {
    for space in outside(source, wal) {
        let dir = fresh(space);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(files::failed("removed", &dir, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// `--tablespace-mapping` of `pg_basebackup`, whose separator is an equals sign, and `--waldir`.
pub(super) fn mapping(source: &SourceFacts, wal: Option<&Path>) -> Vec<String> {
    let word = |path: &Path| path.display().to_string().replace('=', "\\=");
    let spaces = spaces(source).map(|space| format!("--tablespace-mapping={}={}", word(space), word(&fresh(space))));
    spaces.chain(wal.map(|wal| format!("--waldir={}", fresh(wal).display()))).collect()
}

/// The copy's links, which lead to where the copies were made, lead to where they go.
pub(super) fn settle_links(copy: &Path, source: &SourceFacts, wal: Option<&Path>) -> Result<(), PgError> {
    for space in outside(source, wal) {
        relink(copy, &fresh(space), space)?;
        make_private(&fresh(space), None)?;
    }
    Ok(())
}

/// Sets the old ones aside, with the old data directory that is at `aside` now, and puts the copies into place.
pub(super) fn swap(source: &SourceFacts, wal: Option<&Path>, aside: Option<&Path>) -> Result<(), PgError> {
    for space in outside(source, wal) {
        if !fresh(space).exists() {
            return Err(PgError::Failed(format!("the copy of {} is missing", space.display())));
        }
        if fs::read_dir(space).is_ok_and(|mut entries| entries.next().is_none()) {
            fs::remove_dir(space).map_err(|error| files::failed("replaced", space, &error))?;
        } else if space.exists() {
            let to = promised(space, aside).unwrap_or_else(|| dated_name(space, SET_ASIDE_INFIX));
            if let Some(aside) = aside {
                relink(aside, space, &to)?;
            }
            fs::rename(space, &to).map_err(|error| files::failed("set aside", space, &error))?;
        }
        fs::rename(fresh(space), space).map_err(|error| files::failed("replaced", space, &error))?;
        files::sync_parent(space)?;
    }
    Ok(())
}

/// Where the links of a data directory lead, links resolved.
pub(super) fn led_to(data_dir: &Path) -> Vec<PathBuf> {
    let links = links(data_dir).unwrap_or_default().into_iter();
    links.filter(|link| link.is_symlink()).map(|link| resolved(&link)).collect()
}

/// Where a swap that crashed was about to put it.
fn promised(space: &Path, aside: Option<&Path>) -> Option<PathBuf> {
    let begin = with_suffix(space, SET_ASIDE_INFIX).into_os_string();
    links(aside?)
        .ok()?
        .into_iter()
        .filter_map(|link| fs::read_link(link).ok())
        .find(|to| to.as_os_str().as_encoded_bytes().starts_with(begin.as_encoded_bytes()) && !to.exists())
}

/// Makes the link of the WAL absolute, so that it leads to the same place wherever the data directory is moved to.
pub(super) fn settle_wal(data_dir: &Path, wal: Option<&Path>) -> Result<(), PgError> {
    let wal = wal.filter(|wal| fs::read_link(data_dir.join(WAL)).is_ok_and(|now| now != *wal));
    wal.map_or(Ok(()), |wal| relink(data_dir, wal, wal))
}

/// The symbolic links of a data directory that lead out of it.
fn links(data_dir: &Path) -> Result<Vec<PathBuf>, PgError> {
    let dir = data_dir.join(LINKS);
    let entries = fs::read_dir(&dir).map_err(|error| files::failed("read", &dir, &error))?;
    Ok(entries.flatten().map(|entry| entry.path()).chain([data_dir.join(WAL)]).collect())
}

/// Makes the links of a data directory that lead to `from` lead to `to`.
fn relink(data_dir: &Path, from: &Path, to: &Path) -> Result<(), PgError> {
    for link in links(data_dir)? {
        // The one of the WAL is a person's: it may be relative, or lead there by way of others.
        let leads_there = |now: PathBuf| now == from || (link.ends_with(WAL) && resolved(&link) == from);
        if fs::read_link(&link).is_ok_and(leads_there) {
            let fresh = with_suffix(&link, FRESH_SUFFIX);
            let _none_is_fine = fs::remove_file(&fresh);
            symlink(to, &fresh)
                .and_then(|()| fs::rename(&fresh, &link))
                .map_err(|error| files::failed("made to lead elsewhere", &link, &error))?;
            files::sync_parent(&link)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ids::{Lsn, SystemId, TimelineId};

    fn source(space: &Path) -> SourceFacts {
        SourceFacts {
            system_id: SystemId(1),
            bytes: 10,
            tablespaces: 1,
            spaces: vec![(space.display().to_string(), 4)],
            timeline: TimelineId(1),
            history: Vec::new(),
            control_timeline: TimelineId(1),
            lsn: Lsn(0),
            oldest: Lsn(0),
            same_tail: None,
        }
    }

    #[test]
    fn what_is_set_aside_keeps_its_own_tablespace_also_over_a_crash() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (space, aside) = (dir.path().join("ts/one"), dir.path().join("old"));
        let facts = source(&space);
        fs::create_dir_all(aside.join(LINKS)).expect("mkdir");
        for (at, text) in [(space.clone(), "old"), (fresh(&space), "new")] {
            fs::create_dir_all(&at).expect("mkdir");
            fs::write(at.join("file"), text).expect("write");
        }
        // A crash after the link was changed and before the directory moved.
        let promised_name = with_suffix(&space, ".set-aside-20260101T000000Z");
        symlink(&promised_name, aside.join(LINKS).join("16384")).expect("symlink");
        swap(&facts, None, Some(&aside)).expect("swapped");
        assert_eq!(fs::read_to_string(space.join("file")).expect("read"), "new");
        let link = fs::read_link(aside.join(LINKS).join("16384")).expect("link");
        assert_eq!(link, promised_name);
        assert_eq!(fs::read_to_string(link.join("file")).expect("read"), "old");
        // Again, without a crash; and without a copy nothing is done.
        fs::create_dir_all(fresh(&space)).expect("mkdir");
        let newer = dir.path().join("newer");
        fs::create_dir_all(newer.join(LINKS)).expect("mkdir");
        symlink(&space, newer.join(LINKS).join("16384")).expect("symlink");
        swap(&facts, None, Some(&newer)).expect("swapped");
        assert!(swap(&facts, None, Some(&newer)).is_err());
        let link = fs::read_link(newer.join(LINKS).join("16384")).expect("link");
        assert_eq!(fs::read_to_string(link.join("file")).expect("read"), "new");
        let grows = growth(&facts, None, &dir.path().join("data"));
        assert_eq!(grows.iter().map(|(_, bytes)| bytes).sum::<u64>(), 10);
    }

    #[test]
    fn a_tablespace_inside_the_data_directory_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let data = fs::canonicalize(dir.path()).expect("path").join("data");
        fs::create_dir_all(data.join("one")).expect("mkdir");
        symlink(&data, dir.path().join("elsewhere")).expect("symlink");
        for inside in [data.join("one"), data.clone(), dir.path().join("elsewhere/one")] {
            let refused = refuse(&source(&inside), None, &data).expect_err("refused");
            assert!(refused.to_string().contains("is inside this node's data directory"), "{refused}");
        }
        // Beside it, though the name begins alike.
        fs::create_dir(dir.path().join("data2")).expect("mkdir");
        refuse(&source(&dir.path().join("data2")), None, &data).expect("fine");
    }
}
