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
//! Where `pg_wal` leads out of DATA, the copy's WAL gets a directory beside that one, which is set aside like a
//! tablespace ([`super::spaces`]). A DATA that is a symbolic link stays one: what it leads to is set aside beside
//! itself. A DATA that is a mount point is refused: what is set aside inside it would be copied along by every base
//! backup of this node, and emptied by the next `pg_rewind`.
//!
//! What belongs to one machine stays that machine's ([`super::own`]).

use super::own::{AUTO_CONF, MACHINE_FILES, MACHINE_FOLDER};
use super::paths::{dated_name, is_mount_point, may_move_between, may_write, with_suffix};
use super::progress::{self, Tick};
use super::{Cluster, Peer, PgError, SourceFacts, files, kept, paths, postmaster, rewind, room, spaces, tool};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Stands between the data directory's name and the time in the name of a directory that was set aside.
pub const SET_ASIDE_INFIX: &str = ".set-aside-";
/// Ends the name of the directory a copy is made in.
const FRESH_SUFFIX: &str = ".portcullis-new";
/// The file in it that proves it ours; its second line says where the old directory goes, its third that it is there,
/// its fourth where the WAL is, if that is elsewhere.
const MARKER: &str = "PORTCULLIS-CLONE";
const MARKER_HEAD: &str = "A clone under way, made by portcullis; may be removed when portcullis does not run.\n";
const MOVED_OUT: &str = "moved out";
/// A connection of the copy must not pass for the standby itself, or commits would be acknowledged by it.
const APPLICATION: &str = "portcullis-clone";
/// What a clone needs, before the number.
const NEEDS: &str = "beside the old directory the copy needs";
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
    /// Where the WAL is, links resolved, if not in `target`.
    wal: Option<PathBuf>,
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
    /// `Refused` (nothing touched): PostgreSQL runs here, not enough space, a directory that is a mount point or beside
    /// which nothing can be put. Anything else leaves the old directory as it was; call again.
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
        let (facts, wal) = (source.clone(), places.wal.clone());
        files::apart(move || spaces::clear(&facts, wal.as_deref())).await?;
        let made = self.make_copy(&places, &copy, peer, source, tell).await;
        if made.is_err() {
            // It may be large, and the next attempt begins anew. The marker stays: it may know where the old one is.
            let _next_attempt_removes_it = remove_copy(&places).await;
        }
        made?;
        rewind::Mark::ends_in_a_clone(&self.state_dir)?;
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
        if let Some(short) = places.short(source, 0)? {
            return Err(short.refusal(NEEDS));
        }
        self.write_passfile()?;
        self.base_backup(peer, copy, places, source, tell).await?;
        let data = self.control_data_of(copy).await?;
        if data.system_id != source.system_id {
            return Err(PgError::Refused(format!(
                "{}:{} is another cluster (system identifier {}, not {}); check host and port of its node",
                peer.host, peer.port, data.system_id, source.system_id
            )));
        }
        self.make_own(places.own.as_deref(), copy, peer).await?;
        spaces::settle_links(copy, source, places.wal.as_deref())?;
        make_private(copy, places.mode)
    }

    fn places(&self) -> Result<Places, PgError> {
        let data_dir = &self.settings.data_dir;
        let target = paths::resolved(data_dir);
        let parent = target.parent().unwrap_or(Path::new("/"));
        let base = match target.file_name() {
            Some(name) if !is_mount_point(&target) && !may_write(parent) => self.state_dir.join(name),
            _ => target.clone(),
        };
        let fresh = with_suffix(&base, FRESH_SUFFIX);
        let is_cluster = |dir: &Path| dir.join(VERSION_FILE).exists();
        // A clone that crashed between the two renames, or while it moved entries, says where it put the old one.
        let marker = read_marker(&fresh);
        let wal = marker.as_ref().and_then(|marker| marker.wal.clone());
        let (old, moved_out, wal) = match marker.filter(|marker| marker.old != target) {
            _ if is_cluster(&target) => (Some(target.clone()), false, spaces::wal_dir(&target)),
            Some(marker) if is_cluster(&marker.old) => (Some(marker.old), marker.moved_out, wal),
            _ => (None, false, None),
        };
        let here = old.as_ref() == Some(&target);
        let broken = old.as_deref().is_some_and(rewind::is_half_rewound) || (here && self.is_rewind_broken());
        let mark = rewind::Mark::read(&self.state_dir).filter(|_| broken);
        let mode = mark.as_ref().map(|mark| mark.mode).or_else(|| rewind::mode_of(old.as_deref()?));
        let own = if broken { mark.map(|mark| mark.own()) } else { old.clone() };
        Ok(Places { target, base, fresh, wal, old, moved_out, own, mode })
    }

    /// Why a clone could not be made here, PostgreSQL running or not; nothing is touched.
    pub(super) async fn clone_refusal(&self, source: &SourceFacts) -> Result<(), PgError> {
        match self.clone_obstacle(source, None).await? {
            Some(short) => Err(short.refusal(NEEDS)),
            None => Ok(()),
        }
    }

    /// The same with too little room apart, after `keeping` was put where it goes.
    pub(super) async fn clone_obstacle(
        &self,
        source: &SourceFacts,
        keeping: Option<kept::Keeping>,
    ) -> Result<Option<room::Short>, PgError> {
        let (places, state_dir, source) = (self.places()?, self.state_dir.clone(), source.clone());
        files::apart(move || {
            refuse_places(&places, &state_dir, &source)?;
            let wal = places.wal.as_deref();
            let left_over = files::size(&places.fresh.join("data")) + spaces::left_over(&source, wal);
            let kept = keeping.map(|keeping| (keeping.dir.clone(), keeping.bytes(&places.target)));
            let wanted = spaces::growth(&source, wal, &places.base).into_iter().chain(kept).collect();
            room::short(wanted, left_over)
        })
        .await
    }

    /// What a name that is free begins with, for a directory beside the data directory; under `state_dir` where nothing
    /// can be put beside it.
    pub(super) fn kept_base(&self) -> Result<PathBuf, PgError> {
        let places = self.places()?;
        Ok(match places.target.file_name() {
            Some(name) if is_mount_point(&places.target) => self.state_dir.join(name),
            _ => places.base,
        })
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
        places: &Places,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<(), PgError> {
        let mut command = tool::command(self.bin("pg_basebackup"));
        command.arg("-D").arg(copy).arg("-d").arg(self.tool_conninfo(peer, APPLICATION)?);
        command.args(["--wal-method=stream", "--checkpoint=fast", "--progress", "--verbose", "--no-password"]);
        command.args(spaces::mapping(source, places.wal.as_deref()));
        progress::watched(command, &format!("pg_basebackup from {}:{}", peer.host, peer.port), tell).await
    }
}

impl Places {
    /// The data directory itself stays, and what is in it is exchanged.
    fn in_place(&self) -> bool {
        self.base != self.target
    }

    fn short(&self, source: &SourceFacts, left_over: u64) -> Result<Option<room::Short>, PgError> {
        room::short(spaces::growth(source, self.wal.as_deref(), &self.base), left_over)
    }
}

fn refuse_places(places: &Places, state_dir: &Path, source: &SourceFacts) -> Result<(), PgError> {
    let target = &places.target;
    spaces::refuse(source, places.wal.as_deref(), target)?;
    if is_mount_point(target) {
        return Err(mount_point(target));
    }
    if is_mount_point(&target.join(spaces::WAL)) {
        return Err(PgError::Refused(format!(
            "{}/pg_wal is a mount point, which a clone would leave with the old directory; mount that file system \
             elsewhere and let pg_wal be a symbolic link to a directory in it",
            target.display()
        )));
    }
    if places.in_place() && !may_move_between(state_dir, target) {
        let parent = target.parent().unwrap_or(Path::new("/"));
        return Err(PgError::Refused(format!(
            "{} may not be written to by the owner of the data directory, so that nothing can be put beside it; \
             give it to that user (chown)",
            parent.display()
        )));
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
    let text = |path: Option<&Path>| path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let (old, wal, last) = (text(old), text(places.wal.as_deref()), if moved_out { MOVED_OUT } else { "" });
    files::replace(&places.fresh.join(MARKER), format!("{MARKER_HEAD}{old}\n{last}\n{wal}\n").as_bytes(), 0o600)
}

/// What a marker says.
struct Marked {
    /// Where the old directory goes or went.
    old: PathBuf,
    /// All of it is there.
    moved_out: bool,
    wal: Option<PathBuf>,
}

fn read_marker(fresh: &Path) -> Option<Marked> {
    let marker = fs::read_to_string(fresh.join(MARKER)).ok()?;
    let mut lines = marker.strip_prefix(MARKER_HEAD)?.lines();
    let old = lines.next().filter(|line| !line.is_empty())?;
    let moved_out = lines.next() == Some(MOVED_OUT);
    let wal = lines.next().filter(|line| !line.is_empty()).map(PathBuf::from);
    Some(Marked { old: PathBuf::from(old), moved_out, wal })
}

/// An exchange that crashed before `PG_VERSION` was out took the machine's own files: they go back.
fn take_back(places: &Places) -> Result<(), PgError> {
    let Some(Marked { old: aside, moved_out: false, .. }) = read_marker(&places.fresh) else { return Ok(()) };
    let begun = places.in_place() && aside != places.target && aside.is_dir() && !aside.join(VERSION_FILE).exists();
    if !begun || places.old.as_ref() != Some(&places.target) {
        return Ok(());
    }
    move_entries(&aside, &places.target, false)?;
    fs::remove_dir(&aside).map_err(|error| files::failed("removed", &aside, &error))
}

/// Sets the old directory aside and puts the copy into its place.
fn swap(places: &Places, copy: &Path, source: &SourceFacts) -> Result<Option<PathBuf>, PgError> {
    let (target, wal) = (&places.target, places.wal.as_deref());
    if places.old.as_ref() == Some(target) {
        spaces::settle_wal(target, wal)?;
    }
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
    if let Err(error) = spaces::swap(source, wal, old).and_then(|()| renamed(copy, target)) {
        if let Some(aside) = &aside {
            // Nothing to fall back to where its tablespaces have gone with it.
            let _best_effort = (source.spaces.is_empty() && wal.is_none()).then(|| fs::rename(aside, target));
        }
        return Err(error);
    }
    files::sync_parent(target)?;
    let _left_over_is_harmless = fs::remove_dir_all(&places.fresh);
    Ok(aside.or_else(|| places.old.clone().filter(|old| old != target)))
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
    spaces::swap(source, places.wal.as_deref(), aside.as_deref())?;
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

/// A name beside `target` that is free.
fn set_aside_name(target: &Path) -> PathBuf {
    dated_name(target, SET_ASIDE_INFIX)
}

/// Gives it the mode of what it replaces; where that is not known, as little of its own as PostgreSQL wants.
pub(super) fn make_private(dir: &Path, mode: Option<u32>) -> Result<(), PgError> {
    let mode = mode.or_else(|| rewind::mode_of(dir)).unwrap_or(rewind::PRIVATE);
    fs::set_permissions(dir, fs::Permissions::from_mode(mode))
        .map_err(|error| files::failed("made private", dir, &error))
}

fn mount_point(target: &Path) -> PgError {
    PgError::Refused(format!(
        "{} is a mount point, which cannot be set aside; mount that file system one level higher, so that data_dir is \
         a directory in it",
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
mod tests;
