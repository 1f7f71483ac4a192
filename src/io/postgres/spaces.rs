//! Tablespaces of a clone: each stands at the same place as on the source, copied beside it, then swapped in together
//! with the data directory.
//!
//! ```text
//!  P.portcullis-new (pg_basebackup) -> old DATA's link to P.set-aside-TIME -> P to there -> P.portcullis-new to P
//! ```
//!
//! The link comes first: a directory set aside never points to files that are not its own, and the link of one that a
//! crash left says under which name the old files go.

use super::clone::{SET_ASIDE_INFIX, dated_name, make_private, may_write, with_suffix};
use super::{PgError, SourceFacts, files};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

const FRESH_SUFFIX: &str = ".portcullis-new";
/// Of the data directory.
const LINKS: &str = "pg_tblspc";

fn fresh(space: &Path) -> PathBuf {
    with_suffix(space, FRESH_SUFFIX)
}

fn spaces(source: &SourceFacts) -> impl Iterator<Item = &Path> {
    source.spaces.iter().map(|(dir, _)| Path::new(dir))
}

/// Nothing can be put beside one of them.
pub(super) fn refuse(source: &SourceFacts, data_dir: &Path) -> Result<(), PgError> {
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
        let parent = space.parent().unwrap_or(Path::new("/"));
        if !may_write(parent) {
            return Err(PgError::Refused(format!(
                "the tablespace {} is copied beside its place, and {} is not there or may not be written to by the \
                 owner of the data directory; make it, and give it to that user (chown)",
                space.display(),
                parent.display()
            )));
        }
    }
    Ok(())
}

/// What must fit where: the file system of each directory, and the bytes that come to it.
pub(super) fn room(source: &SourceFacts, base: &Path) -> Vec<(PathBuf, u64)> {
    let outside: u64 = source.spaces.iter().map(|(_, bytes)| bytes).sum();
    let wanted = std::iter::once((base, source.bytes.saturating_sub(outside)))
        .chain(source.spaces.iter().map(|(dir, bytes)| (Path::new(dir.as_str()), *bytes)));
    let mut needs: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (dir, bytes) in wanted {
        let parent = dir.parent().unwrap_or(Path::new("/"));
        let device = fs::metadata(parent).map_or(0, |meta| meta.dev());
        match needs.iter_mut().find(|(known, ..)| *known == device) {
            Some((_, _, sum)) => *sum = sum.saturating_add(bytes),
            None => needs.push((device, parent.to_owned(), bytes)),
        }
    }
    needs.into_iter().map(|(_, parent, bytes)| (parent, bytes)).collect()
}

/// Bytes of left-over copies, which the next one removes.
pub(super) fn left_over(source: &SourceFacts) -> u64 {
    spaces(source).map(|space| files::size(&fresh(space))).sum()
}

/// Removes left-over copies of ours.
pub(super) fn clear(source: &SourceFacts) -> Result<(), PgError> {
    for space in spaces(source) {
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

/// `--tablespace-mapping` of `pg_basebackup`, whose separator is an equals sign.
pub(super) fn mapping(source: &SourceFacts) -> Vec<String> {
    let word = |path: &Path| path.display().to_string().replace('=', "\\=");
    spaces(source).map(|space| format!("--tablespace-mapping={}={}", word(space), word(&fresh(space)))).collect()
}

/// The copy's links, which lead to where the copies were made, lead to where they go.
pub(super) fn settle_links(copy: &Path, source: &SourceFacts) -> Result<(), PgError> {
    for space in spaces(source) {
        relink(copy, &fresh(space), space)?;
        make_private(&fresh(space), None)?;
    }
    Ok(())
}

/// Sets the old tablespaces aside, with the old data directory that is at `aside` now, and puts the copies into place.
pub(super) fn swap(source: &SourceFacts, aside: Option<&Path>) -> Result<(), PgError> {
    for space in spaces(source) {
        if !fresh(space).exists() {
            return Err(PgError::Failed(format!("the copy of the tablespace {} is missing", space.display())));
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

/// Where a swap that crashed was about to put it.
fn promised(space: &Path, aside: Option<&Path>) -> Option<PathBuf> {
    let begin = with_suffix(space, SET_ASIDE_INFIX).into_os_string();
    let links = fs::read_dir(aside?.join(LINKS)).ok()?.flatten();
    links
        .filter_map(|link| fs::read_link(link.path()).ok())
        .find(|to| to.as_os_str().as_encoded_bytes().starts_with(begin.as_encoded_bytes()) && !to.exists())
}

/// Makes the links of a data directory that lead to `from` lead to `to`.
fn relink(data_dir: &Path, from: &Path, to: &Path) -> Result<(), PgError> {
    let links = data_dir.join(LINKS);
    for link in fs::read_dir(&links).map_err(|error| files::failed("read", &links, &error))?.flatten() {
        let link = link.path();
        if fs::read_link(&link).is_ok_and(|now| now == from) {
            let fresh = with_suffix(&link, FRESH_SUFFIX);
            let _none_is_fine = fs::remove_file(&fresh);
            symlink(to, &fresh)
                .and_then(|()| fs::rename(&fresh, &link))
                .map_err(|error| files::failed("made to lead elsewhere", &link, &error))?;
        }
    }
    files::sync_parent(&links.join("."))
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
        swap(&facts, Some(&aside)).expect("swapped");
        assert_eq!(fs::read_to_string(space.join("file")).expect("read"), "new");
        let link = fs::read_link(aside.join(LINKS).join("16384")).expect("link");
        assert_eq!(link, promised_name);
        assert_eq!(fs::read_to_string(link.join("file")).expect("read"), "old");
        // Again, without a crash; and without a copy nothing is done.
        fs::create_dir_all(fresh(&space)).expect("mkdir");
        let newer = dir.path().join("newer");
        fs::create_dir_all(newer.join(LINKS)).expect("mkdir");
        symlink(&space, newer.join(LINKS).join("16384")).expect("symlink");
        swap(&facts, Some(&newer)).expect("swapped");
        assert!(swap(&facts, Some(&newer)).is_err());
        let link = fs::read_link(newer.join(LINKS).join("16384")).expect("link");
        assert_eq!(fs::read_to_string(link.join("file")).expect("read"), "new");
        assert_eq!(room(&facts, &dir.path().join("data")).iter().map(|(_, bytes)| bytes).sum::<u64>(), 10);
    }

    #[test]
    fn a_tablespace_inside_the_data_directory_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let data = fs::canonicalize(dir.path()).expect("path").join("data");
        fs::create_dir_all(data.join("one")).expect("mkdir");
        symlink(&data, dir.path().join("elsewhere")).expect("symlink");
        for inside in [data.join("one"), data.clone(), dir.path().join("elsewhere/one")] {
            let refused = refuse(&source(&inside), &data).expect_err("refused");
            assert!(refused.to_string().contains("is inside this node's data directory"), "{refused}");
        }
        // Beside it, though the name begins alike.
        fs::create_dir(dir.path().join("data2")).expect("mkdir");
        refuse(&source(&dir.path().join("data2")), &data).expect("fine");
    }
}
