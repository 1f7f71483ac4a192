//! Clone: a fresh copy of the peer's cluster beside the old directory, made this machine's own, then swapped in.
//!
//! ```text
//!  refuse or go on  ->  DATA.portcullis-new/{MARKER, data/}  ->  own files and settings, standby.signal
//!      ->  MARKER says "complete, old goes to ..."  ->  DATA to DATA.set-aside-TIME  ->  data/ to DATA
//! ```
//!
//! The old directory is never deleted and not touched before the copy is complete. A crash leaves either the old one in
//! place, or the old one set aside and the new one complete beside it; running again starts a new copy, and takes what
//! belongs to this machine from wherever the old directory then is (the marker says it).
//!
//! Where the directory above DATA may not be written to (root's, say), both names stand under `state_dir`, which must
//! be on the same file system, and DATA stays: its entries are moved out and in, `PG_VERSION` first and last. The
//! marker says when all are out: until then a retry goes on into the same directory, from then on what stands in DATA
//! is of the copy that was moved in.
//!
//! What belongs to one machine stays that machine's ([`super::own`]).

use super::own::{AUTO_CONF, MACHINE_FILES, MACHINE_FOLDER};
use super::progress::{self, Tick};
use super::{Cluster, Peer, PgError, SourceFacts, files, postmaster, rewind, spaces, tool};
use rustix::fs::{Access, AtFlags, CWD, StatxAttributes, StatxFlags};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Stands between the data directory's name and the time in the name of a directory that was set aside.
pub const SET_ASIDE_INFIX: &str = ".set-aside-";
/// Ends the name of the directory a copy is made in.
const FRESH_SUFFIX: &str = ".portcullis-new";
/// The file in it that proves it ours; its second line says where the old directory goes, its third that it is there.
const MARKER: &str = "PORTCULLIS-CLONE";
const MARKER_HEAD: &str = "A clone under way, made by portcullis; may be removed when portcullis does not run.\n";
const MOVED_OUT: &str = "moved out";
/// Free space beyond the source's size that must be there: the WAL of the copy's own duration.
const SPACE_MARGIN: u64 = 256 * 1024 * 1024;
/// A connection of the copy must not pass for the standby itself, or commits would be acknowledged by it.
const APPLICATION: &str = "portcullis-clone";
/// Says which data directory is a cluster's; moved out first and in last.
const VERSION_FILE: &str = "PG_VERSION";

/// The directories of one clone.
#[derive(Clone)]
struct Places {
    /// The data directory, symbolic links resolved.
    target: PathBuf,
    /// What the names of `fresh` and of a directory set aside begin with: `target`, or a path under `state_dir`.
    base: PathBuf,
    /// The directory that holds marker and copy.
    fresh: PathBuf,
    /// Where the old cluster is now: `target`, or set aside by a clone that crashed.
    old: Option<PathBuf>,
    /// All of the old cluster is there.
    moved_out: bool,
    /// Where this machine's own files are: `old`, or kept from before a rewind that did not end.
    own: Option<PathBuf>,
    /// The old cluster's, where there is one.
    mode: Option<u32>,
}

impl Cluster {
    /// Makes this node's cluster a fresh copy of `peer`'s, a standby that follows it, not yet started. `progress` gets
    /// bytes done and in all. Returns where the old directory was set aside.
    ///
    /// # Errors
    /// `Refused` (nothing touched): PostgreSQL runs here, not enough space, a data directory that is a
    /// mount point or whose `pg_wal` is elsewhere. Anything else leaves the old directory as it was; call again.
    pub async fn clone_from(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Option<PathBuf>, PgError> {
        files::settled().await;
        let places = self.places()?;
        self.refuse_clone(&places, source)?;
        let copy = prepare_apart(&places).await?;
        let facts = source.clone();
        files::apart(move || spaces::clear(&facts)).await?;
        let made = self.make_copy(&places, &copy, peer, source, tell).await;
        if made.is_err() {
            // It may be large, and the next attempt begins anew. The marker stays: it may know where the old one is.
            let _next_attempt_removes_it = remove_copy(&places).await;
        }
        made?;
        let source = source.clone();
        // Removes what is left of a copy.
        files::apart(move || swap(&places, &copy, &source)).await
    }

    async fn make_copy(
        &self,
        places: &Places,
        copy: &Path,
        peer: &Peer,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<(), PgError> {
        refuse_without_space(&places.base, source, 0)?;
        self.write_passfile()?;
        self.base_backup(peer, copy, source, tell).await?;
        let data = self.control_data_of(copy).await?;
        if data.system_id != source.system_id {
            return Err(PgError::Refused(format!(
                "{}:{} is another cluster (system identifier {}, not {}); check host and port of its node",
                peer.host, peer.port, data.system_id, source.system_id
            )));
        }
        self.make_own(places.own.as_deref(), copy, peer).await?;
        spaces::settle_links(copy, source)?;
        make_private(copy, places.mode)
    }

    fn places(&self) -> Result<Places, PgError> {
        let data_dir = &self.settings.data_dir;
        let target = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.clone());
        let parent = target.parent().unwrap_or(Path::new("/"));
        let base = match target.file_name() {
            Some(name) if !is_mount_point(&target) && !may_write(parent) => self.state_dir.join(name),
            _ => target.clone(),
        };
        let fresh = with_suffix(&base, FRESH_SUFFIX);
        let is_cluster = |dir: &Path| dir.join(VERSION_FILE).exists();
        // A clone that crashed between the two renames, or while it moved entries, says where it put the old one.
        let marker = read_marker(&fresh).filter(|(dir, _)| *dir != target);
        let (old, moved_out) = match marker {
            _ if is_cluster(&target) => (Some(target.clone()), false),
            Some((dir, moved_out)) if is_cluster(&dir) => (Some(dir), moved_out),
            _ => (None, false),
        };
        let broken = old.as_deref().is_some_and(rewind::is_half_rewound);
        let mark = rewind::Mark::read(&self.state_dir).filter(|_| broken);
        let mode = mark.as_ref().map(|mark| mark.mode).or_else(|| rewind::mode_of(old.as_deref()?));
        let own = if broken { mark.map(|mark| mark.own()) } else { old.clone() };
        Ok(Places { target, base, fresh, old, moved_out, own, mode })
    }

    /// Why a clone could not be made here, PostgreSQL running or not; nothing is touched.
    /// `keeping`: so many bytes are put beside the data directory before.
    pub(super) async fn clone_refusal(&self, source: &SourceFacts, keeping: u64) -> Result<(), PgError> {
        let (places, state_dir) = (self.places()?, self.state_dir.clone());
        let mut source = source.clone();
        files::apart(move || {
            refuse_places(&places, &state_dir, &source)?;
            let left_over = files::size(&places.fresh.join("data")) + spaces::left_over(&source);
            source.bytes = source.bytes.saturating_add(keeping);
            refuse_without_space(&places.base, &source, left_over)
        })
        .await
    }

    /// A name for a directory beside the data directory that is free: `DATA`, `infix` and the time; under `state_dir`
    /// where nothing can be put beside it.
    pub(super) fn kept_name(&self, infix: &str) -> Result<PathBuf, PgError> {
        let places = self.places()?;
        let base = match places.target.file_name() {
            Some(name) if is_mount_point(&places.target) => self.state_dir.join(name),
            _ => places.base,
        };
        Ok(dated_name(&base, infix))
    }

    /// Everything that can be known to fail, before anything is touched.
    fn refuse_clone(&self, places: &Places, source: &SourceFacts) -> Result<(), PgError> {
        if self.is_running() {
            return Err(PgError::Refused("PostgreSQL runs here; stop it before its directory is replaced".to_owned()));
        }
        refuse_places(places, &self.state_dir, source)
    }

    /// Runs `pg_basebackup` into `copy`.
    async fn base_backup(
        &self,
        peer: &Peer,
        copy: &Path,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<(), PgError> {
        let mut command = tool::command(self.bin("pg_basebackup"));
        command.arg("-D").arg(copy).arg("-d").arg(self.tool_conninfo(peer, APPLICATION)?);
        command.args(["--wal-method=stream", "--checkpoint=fast", "--progress", "--verbose", "--no-password"]);
        command.args(spaces::mapping(source));
        progress::watched(command, &format!("pg_basebackup from {}:{}", peer.host, peer.port), tell).await
    }
}

impl Places {
    /// The data directory itself stays, and what is in it is exchanged.
    fn in_place(&self) -> bool {
        self.base != self.target
    }
}

fn refuse_places(places: &Places, state_dir: &Path, source: &SourceFacts) -> Result<(), PgError> {
    let target = &places.target;
    spaces::refuse(source, target)?;
    if is_mount_point(target) {
        return Err(mount_point(target));
    }
    if places.in_place() && !may_move_between(state_dir, target) {
        let parent = target.parent().unwrap_or(Path::new("/"));
        return Err(PgError::Refused(format!(
            "{} may not be written to by the owner of the data directory, so that nothing can be put beside it; \
             give it to that user (chown)",
            parent.display()
        )));
    }
    if fs::symlink_metadata(target.join("pg_wal")).is_ok_and(|meta| meta.is_symlink()) {
        return Err(PgError::Refused(format!(
            "{}/pg_wal is a symbolic link, and a clone would put the WAL back into the data directory; clone by \
             hand with pg_basebackup --waldir",
            target.display()
        )));
    }
    Ok(())
}

/// The copy needs its room beside the old directory. Asked when a left-over copy is removed, which may be that room.
fn refuse_without_space(base: &Path, source: &SourceFacts, left_over: u64) -> Result<(), PgError> {
    for (dir, bytes) in spaces::room(source, base) {
        let space =
            rustix::fs::statvfs(&dir).map_err(|error| files::failed("examined", &dir, &std::io::Error::from(error)))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize).saturating_add(left_over);
        let needed = bytes.saturating_add(bytes / 20).saturating_add(SPACE_MARGIN);
        if free < needed {
            return Err(PgError::Refused(format!(
                "{} has {} MiB free, the copy needs {} MiB beside the old directory; make room, for instance by \
                 removing directories named *{SET_ASIDE_INFIX}*",
                dir.display(),
                free >> 20,
                needed >> 20
            )));
        }
    }
    Ok(())
}

/// [`prepare`] on a thread of its own: removing a large left-over takes its time.
async fn prepare_apart(places: &Places) -> Result<PathBuf, PgError> {
    let places = places.clone();
    files::apart(move || prepare(&places)).await
}

/// Makes the fresh directory with its marker, removing a left-over of ours; returns where the copy goes.
fn prepare(places: &Places) -> Result<PathBuf, PgError> {
    let fresh = &places.fresh;
    if fresh.exists() {
        if !fresh.join(MARKER).is_file() && fs::read_dir(fresh).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(PgError::Refused(format!(
                "{} is in the way and not from portcullis; move it elsewhere",
                fresh.display()
            )));
        }
        postmaster::kill_tool("pg_basebackup", &fresh.join("data"));
        take_back(places)?;
        remove_data(places)?;
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(fresh)
        .map_err(|error| files::failed("made", fresh, &error))?;
    write_marker(places, places.old.as_deref(), places.moved_out)?;
    Ok(fresh.join("data"))
}

async fn remove_copy(places: &Places) -> Result<(), PgError> {
    let places = places.clone();
    files::apart(move || remove_data(&places)).await
}

/// Removes the copy; the marker stays, so that an interrupted removal is still known as ours.
fn remove_data(places: &Places) -> Result<(), PgError> {
    let copy = places.fresh.join("data");
    match fs::remove_dir_all(&copy) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(files::failed("removed", &copy, &error)),
        _ => Ok(()),
    }
}

/// The marker names the old directory from the moment the copy begins, so that it is found again after any crash.
fn write_marker(places: &Places, old: Option<&Path>, moved_out: bool) -> Result<(), PgError> {
    let old = old.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let last = if moved_out { MOVED_OUT } else { "" };
    files::replace(&places.fresh.join(MARKER), format!("{MARKER_HEAD}{old}\n{last}\n").as_bytes(), 0o600)
}

/// Where the old directory goes or went, and whether all of it is there.
fn read_marker(fresh: &Path) -> Option<(PathBuf, bool)> {
    let marker = fs::read_to_string(fresh.join(MARKER)).ok()?;
    let mut lines = marker.strip_prefix(MARKER_HEAD)?.lines();
    let old = lines.next().filter(|line| !line.is_empty())?;
    Some((PathBuf::from(old), lines.next() == Some(MOVED_OUT)))
}

/// An exchange that crashed before `PG_VERSION` was out took the machine's own files: they go back.
fn take_back(places: &Places) -> Result<(), PgError> {
    let Some((aside, false)) = read_marker(&places.fresh) else { return Ok(()) };
    let begun = places.in_place() && aside != places.target && aside.is_dir() && !aside.join(VERSION_FILE).exists();
    if !begun || places.old.as_ref() != Some(&places.target) {
        return Ok(());
    }
    move_entries(&aside, &places.target, false)?;
    fs::remove_dir(&aside).map_err(|error| files::failed("removed", &aside, &error))
}

/// Sets the old directory aside and puts the copy into its place.
fn swap(places: &Places, copy: &Path, source: &SourceFacts) -> Result<Option<PathBuf>, PgError> {
    let target = &places.target;
    if places.in_place() {
        return exchange(places, copy, source);
    }
    let mut aside = None;
    if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none()) {
        // Empty, as a package or a person made it: nothing to keep.
        fs::remove_dir(target).map_err(|error| rename_failed(target, &error))?;
    } else if fs::symlink_metadata(target).is_ok() {
        let to = set_aside_name(&places.base);
        write_marker(places, Some(&to), false)?;
        fs::rename(target, &to).map_err(|error| rename_failed(target, &error))?;
        files::sync_parent(target)?;
        aside = Some(to);
    }
    // Set aside just now, or by a clone that crashed.
    let old = aside.as_deref().or(places.old.as_deref());
    if let Err(error) = spaces::swap(source, old).and_then(|()| renamed(copy, target)) {
        if let Some(aside) = &aside {
            // Nothing to fall back to where its tablespaces have gone with it.
            let _best_effort = source.spaces.is_empty().then(|| fs::rename(aside, target));
        }
        return Err(error);
    }
    files::sync_parent(target)?;
    let _left_over_is_harmless = fs::remove_dir_all(&places.fresh);
    Ok(aside)
}

/// [`swap`] where the data directory must stay: its entries go out one by one, the copy's come in.
fn exchange(places: &Places, copy: &Path, source: &SourceFacts) -> Result<Option<PathBuf>, PgError> {
    let target = &places.target;
    // Where a clone that crashed has put the old cluster, or a part of it.
    let mut aside = places.old.clone().filter(|old| old != target);
    if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
        let begun = aside.clone().filter(|_| !places.moved_out);
        let to = begun.clone().unwrap_or_else(|| set_aside_name(&places.base));
        if begun.is_none() {
            fs::DirBuilder::new().mode(0o700).create(&to).map_err(|error| files::failed("made", &to, &error))?;
        }
        if rewind::is_half_rewound(target) {
            rewind::poison(&to)?;
        }
        let old = aside.get_or_insert_with(|| to.clone());
        write_marker(places, Some(old), places.moved_out)?;
        if let Err(error) = move_entries(target, &to, true) {
            if begun.is_none() {
                let _best_effort = move_entries(&to, target, false);
            }
            return Err(error);
        }
    }
    write_marker(places, aside.as_deref(), true)?;
    spaces::swap(source, aside.as_deref())?;
    let mode = rewind::mode_of(copy).unwrap_or(rewind::PRIVATE);
    move_entries(copy, target, false)?;
    make_private(target, Some(mode))?;
    let _left_over_is_harmless = fs::remove_dir_all(&places.fresh);
    Ok(aside)
}

/// Moves all entries, the machine's own files and then `PG_VERSION` before everything else, or all of them last: what
/// is set aside counts as the old cluster only when its configuration is there too.
fn move_entries(from: &Path, to: &Path, version_first: bool) -> Result<(), PgError> {
    let rank = |name: &OsString| match name.to_str() {
        Some(VERSION_FILE) => 2,
        Some(name) if MACHINE_FILES.contains(&name) || [MACHINE_FOLDER, AUTO_CONF].contains(&name) => 1,
        _ => 0,
    };
    let entries = fs::read_dir(from).map_err(|error| files::failed("read", from, &error))?;
    let mut names: Vec<OsString> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort_by_key(|name| match (version_first, rank(name)) {
        (true, 0) => 3,
        (_, rank) => rank,
    });
    for name in names {
        fs::rename(from.join(&name), to.join(&name))
            .map_err(|error| files::failed("moved", &from.join(&name), &error))?;
    }
    files::sync_parent(&from.join("."))?;
    files::sync_parent(&to.join("."))
}

/// Whether entries can be made in and taken out of the directory.
pub(super) fn may_write(dir: &Path) -> bool {
    rustix::fs::accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

/// Whether a rename from one directory to the other can do: both writable, one file system.
fn may_move_between(a: &Path, b: &Path) -> bool {
    let device = |dir: &Path| fs::metadata(dir).ok().map(|meta| meta.dev());
    may_write(a) && may_write(b) && device(a).is_some() && device(a) == device(b)
}

/// A name beside `target` that is free.
fn set_aside_name(target: &Path) -> PathBuf {
    dated_name(target, SET_ASIDE_INFIX)
}

pub(super) fn dated_name(target: &Path, infix: &str) -> PathBuf {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let first = with_suffix(target, &format!("{infix}{time}"));
    let further = (2_u32..).map(|n| with_suffix(&first, &format!("-{n}")));
    std::iter::once(first.clone()).chain(further).find(|name| fs::symlink_metadata(name).is_err()).unwrap_or(first)
}

/// Gives it the mode of what it replaces; where that is not known, as little of its own as PostgreSQL wants.
pub(super) fn make_private(dir: &Path, mode: Option<u32>) -> Result<(), PgError> {
    let mode = mode.or_else(|| rewind::mode_of(dir)).unwrap_or(rewind::PRIVATE);
    fs::set_permissions(dir, fs::Permissions::from_mode(mode))
        .map_err(|error| files::failed("made private", dir, &error))
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// statx(2): the root of a mount, also of a bind mount within one file system.
pub(super) fn is_mount_point(path: &Path) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn mount_point(target: &Path) -> PgError {
    PgError::Refused(format!(
        "{} is a mount point and cannot be set aside; mount one level higher and put data_dir into a directory there",
        target.display()
    ))
}

fn renamed(from: &Path, to: &Path) -> Result<(), PgError> {
    fs::rename(from, to).map_err(|error| rename_failed(to, &error))
}

fn rename_failed(target: &Path, error: &std::io::Error) -> PgError {
    use std::io::ErrorKind::{CrossesDevices, ResourceBusy};
    if matches!(error.kind(), ResourceBusy | CrossesDevices) {
        return mount_point(target);
    }
    files::failed("replaced", target, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing_outside() -> SourceFacts {
        SourceFacts {
            system_id: crate::base::ids::SystemId(1),
            bytes: 0,
            tablespaces: 0,
            spaces: Vec::new(),
            timeline: crate::base::ids::TimelineId(1),
            history: Vec::new(),
            control_timeline: crate::base::ids::TimelineId(1),
            lsn: crate::base::ids::Lsn(0),
            oldest: crate::base::ids::Lsn(0),
            same_tail: None,
        }
    }

    #[test]
    fn a_directory_that_is_not_ours_is_not_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = dir.path().join("main");
        let fresh = with_suffix(&target, FRESH_SUFFIX);
        let places = Places {
            base: target.clone(),
            target,
            fresh: fresh.clone(),
            old: None,
            moved_out: false,
            own: None,
            mode: None,
        };
        fs::create_dir_all(fresh.join("data")).expect("mkdir");
        fs::write(fresh.join("data/precious"), "x").expect("write");
        assert!(matches!(prepare(&places), Err(PgError::Refused(_))));
        assert!(fresh.join("data/precious").exists());
        fs::write(fresh.join(MARKER), MARKER_HEAD).expect("write");
        assert!(prepare(&places).is_ok());
        assert!(!fresh.join("data/precious").exists());
    }

    #[test]
    fn an_exchange_keeps_the_directory_and_sets_all_its_entries_aside() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (target, base) = (dir.path().join("pg/main"), dir.path().join("state/main"));
        let places = Places {
            target: target.clone(),
            fresh: with_suffix(&base, FRESH_SUFFIX),
            base,
            old: Some(target.clone()),
            moved_out: false,
            own: None,
            mode: None,
        };
        fs::create_dir_all(target.join("base/1")).expect("mkdir");
        for name in [VERSION_FILE, "postgresql.conf"] {
            fs::write(target.join(name), "old").expect("write");
        }
        let copy = prepare(&places).expect("prepared");
        fs::create_dir_all(copy.join("base/2")).expect("mkdir");
        fs::write(copy.join(VERSION_FILE), "new").expect("write");
        let inode = fs::metadata(&target).expect("stat").ino();
        let aside = swap(&places, &copy, &nothing_outside()).expect("swapped").expect("something was set aside");
        assert_eq!(fs::metadata(&target).expect("stat").ino(), inode, "the directory itself stayed");
        assert!(aside.starts_with(dir.path().join("state")) && aside.join("base/1").is_dir());
        assert_eq!(fs::read_to_string(aside.join("postgresql.conf")).expect("read"), "old");
        assert_eq!(fs::read_to_string(target.join(VERSION_FILE)).expect("read"), "new");
        assert!(target.join("base/2").is_dir() && !target.join("base/1").exists());
        assert!(!places.fresh.exists());
    }

    #[test]
    fn an_exchange_that_crashed_anywhere_keeps_the_old_cluster_in_one_place() {
        // Entries moved out, then in, before the crash.
        for (out, into) in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2)] {
            let dir = tempfile::tempdir().expect("tempdir");
            let (target, base) = (dir.path().join("pg/main"), dir.path().join("state/main"));
            let fresh = with_suffix(&base, FRESH_SUFFIX);
            let find = || {
                let old = if target.join(VERSION_FILE).exists() { Some((target.clone(), false)) } else { None };
                let (old, moved_out) = old.or_else(|| read_marker(&fresh)).expect("it is known where it is");
                let (target, base, fresh) = (target.clone(), base.clone(), fresh.clone());
                Places { target, base, fresh, old: Some(old), moved_out, own: None, mode: None }
            };
            let names = ["postgresql.conf", VERSION_FILE, "base", "global"];
            fs::create_dir_all(target.join("base/1")).expect("mkdir");
            fs::create_dir_all(target.join("global/1")).expect("mkdir");
            for name in [VERSION_FILE, "postgresql.conf"] {
                fs::write(target.join(name), "old").expect("write");
            }
            prepare(&find()).expect("prepared");
            let to = set_aside_name(&base);
            fs::create_dir(&to).expect("mkdir");
            write_marker(&find(), Some(&to), false).expect("marked");
            for name in &names[..out] {
                fs::rename(target.join(name), to.join(name)).expect("moved out");
            }
            if into > 0 {
                write_marker(&find(), Some(&to), true).expect("marked");
                for name in &names[2..2 + into] {
                    fs::create_dir_all(target.join(name).join("2")).expect("moved in");
                }
            }

            let places = find();
            let copy = prepare(&places).expect("prepared again");
            let own = places.old.clone().expect("old").join("postgresql.conf");
            assert!(own.exists(), "{out} {into}: this machine's files are found");
            for name in ["base/2", "global/2"] {
                fs::create_dir_all(copy.join(name)).expect("mkdir");
            }
            fs::write(copy.join(VERSION_FILE), "new").expect("write");
            // And a crash during this copy.
            assert_eq!(find().moved_out, places.moved_out);
            let aside = swap(&places, &copy, &nothing_outside()).expect("swapped").expect("set aside");
            for name in ["postgresql.conf", VERSION_FILE, "base/1", "global/1"] {
                assert!(aside.join(name).exists(), "{out} {into}: {name} is elsewhere");
            }
            assert!(!aside.join("base/2").exists() && !target.join("base/1").exists(), "{out} {into}");
            assert_eq!(fs::read_to_string(target.join(VERSION_FILE)).expect("read"), "new");
            assert!(target.join("base/2").exists() && target.join("global/2").exists(), "{out} {into}");
        }
    }

    #[test]
    fn names_set_aside_never_collide() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = dir.path().join("main");
        let first = set_aside_name(&target);
        fs::create_dir(&first).expect("mkdir");
        // Possibly in the next second: free either way.
        assert!(!set_aside_name(&target).exists());
    }
}
