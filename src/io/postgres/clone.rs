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
//! be on the same file system, and DATA stays: its entries are moved out and in, `PG_VERSION` first and last.
//!
//! What belongs to one machine stays that machine's: configuration and key files that live in the old directory, and
//! [`MACHINE_KEYS`] of `postgresql.auto.conf`, which `pg_basebackup` brings from the other node.

use super::autoconf::{AutoConf, value_in};
use super::settings::read_or_empty;
use super::{Cluster, Peer, PgError, SourceFacts, control, files, postmaster, standby, tool};
use rustix::fs::{Access, AtFlags, CWD, StatxAttributes, StatxFlags};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;

/// Stands between the data directory's name and the time in the name of a directory that was set aside.
pub const SET_ASIDE_INFIX: &str = ".set-aside-";
/// Ends the name of the directory a copy is made in.
const FRESH_SUFFIX: &str = ".portcullis-new";
/// The file in it that proves it ours; its second line says where the old directory goes.
const MARKER: &str = "PORTCULLIS-CLONE";
const MARKER_HEAD: &str = "A clone under way, made by portcullis; may be removed when portcullis does not run.\n";
/// `pg_basebackup` is killed after this long without a sign of life: it waits for a checkpoint of the source, and it
/// syncs all files at the end, both without a word.
const STALL_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Free space beyond the source's size that must be there: the WAL of the copy's own duration.
const SPACE_MARGIN: u64 = 256 * 1024 * 1024;
/// A connection of the copy must not pass for the standby itself, or commits would be acknowledged by it.
const APPLICATION: &str = "portcullis-clone";
/// The tail of `pg_basebackup`'s words that is kept for its error.
const LINE_LIMIT: usize = 4096;

/// Files in the data directory that are this machine's own (`conf.d` is a directory).
const MACHINE_FILES: [&str; 7] =
    ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "server.crt", "server.key", "root.crt", "root.crl"];
const MACHINE_FOLDER: &str = "conf.d";

/// Settings that belong to one machine.
const MACHINE_KEYS: [&str; 20] = [
    "port",
    "listen_addresses",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
    "data_directory",
    "config_file",
    "hba_file",
    "ident_file",
    "external_pid_file",
    "log_directory",
    "ssl_cert_file",
    "ssl_key_file",
    "ssl_ca_file",
    "ssl_crl_file",
    "ssl_crl_dir",
    "ssl_dh_params_file",
    "krb_server_keyfile",
    "bonjour_name",
    "cluster_name",
];

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
}

impl Cluster {
    /// Makes this node's cluster a fresh copy of `peer`'s, a standby that follows it, not yet started. `progress` gets
    /// bytes done and in all. Returns where the old directory was set aside.
    ///
    /// # Errors
    /// `Refused` (nothing touched): PostgreSQL runs here, not enough space, tablespaces, a data directory that is a
    /// mount point or whose `pg_wal` is elsewhere. Anything else leaves the old directory as it was; call again.
    pub async fn clone_from(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        progress: impl FnMut(u64, Option<u64>),
    ) -> Result<Option<PathBuf>, PgError> {
        let places = self.places()?;
        self.refuse_clone(&places, source)?;
        let copy = prepare_apart(&places).await?;
        let made = self.make_copy(&places, &copy, peer, source, progress).await;
        if made.is_err() {
            // It may be large, and the next attempt begins anew. The marker stays: it may know where the old one is.
            let _next_attempt_removes_it = remove_copy(&places).await;
        }
        made?;
        swap(&places, &copy)
    }

    async fn make_copy(
        &self,
        places: &Places,
        copy: &Path,
        peer: &Peer,
        source: &SourceFacts,
        progress: impl FnMut(u64, Option<u64>),
    ) -> Result<(), PgError> {
        refuse_without_space(&places.base, source)?;
        self.write_passfile()?;
        self.base_backup(peer, copy, progress).await?;
        let data = self.control_data_of(copy).await?;
        if data.system_id != source.system_id {
            return Err(PgError::Refused(format!(
                "{}:{} is another cluster (system identifier {}, not {}); check host and port of its node",
                peer.host, peer.port, data.system_id, source.system_id
            )));
        }
        self.make_own(places, copy, peer).await
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
        let old = if is_cluster(&target) {
            Some(target.clone())
        } else {
            // A clone that crashed between the two renames says where it put the old one.
            let marker = fs::read_to_string(fresh.join(MARKER)).unwrap_or_default();
            marker.strip_prefix(MARKER_HEAD).map(|rest| PathBuf::from(rest.trim_end())).filter(|dir| is_cluster(dir))
        };
        Ok(Places { target, base, fresh, old })
    }

    /// Everything that can be known to fail, before anything is touched.
    fn refuse_clone(&self, places: &Places, source: &SourceFacts) -> Result<(), PgError> {
        let target = &places.target;
        if self.is_running() {
            return Err(PgError::Refused("PostgreSQL runs here; stop it before its directory is replaced".to_owned()));
        }
        if source.tablespaces > 0 {
            return Err(PgError::Refused(format!(
                "the source has {} tablespaces outside its data directory, which a clone cannot place yet; clone by \
                 hand with pg_basebackup --tablespace-mapping",
                source.tablespaces
            )));
        }
        if is_mount_point(target) {
            return Err(mount_point(target));
        }
        if places.in_place() && !may_move_between(&self.state_dir, target) {
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

    /// Runs `pg_basebackup` into `copy`.
    async fn base_backup(
        &self,
        peer: &Peer,
        copy: &Path,
        mut progress: impl FnMut(u64, Option<u64>),
    ) -> Result<(), PgError> {
        let mut command = tool::command(self.bin("pg_basebackup"));
        command.arg("-D").arg(copy).arg("-d").arg(self.conninfo(peer, APPLICATION)?);
        command.args(["--wal-method=stream", "--checkpoint=fast", "--progress", "--no-password"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| tool::not_started("pg_basebackup", &error))?;
        let mut group = tool::Group::of(&child);
        let mut said = Vec::new();
        if let Some(mut stderr) = child.stderr.take() {
            let (mut line, mut chunk) = (Vec::new(), [0_u8; 1024]);
            loop {
                let read = tokio::time::timeout(STALL_LIMIT, stderr.read(&mut chunk)).await.map_err(|_| stalled())?;
                let Ok(count) = read else { break };
                if count == 0 {
                    break;
                }
                for &byte in chunk.get(..count).unwrap_or_default() {
                    if !matches!(byte, b'\n' | b'\r') {
                        if line.len() < LINE_LIMIT {
                            line.push(byte);
                        }
                        continue;
                    }
                    let text = String::from_utf8_lossy(&line).into_owned();
                    match read_progress(&text) {
                        Some((done, total)) => progress(done, total),
                        None => tool::keep_tail(&mut said, format!("{text}\n").as_bytes()),
                    }
                    line.clear();
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
        Err(PgError::Failed(format!(
            "pg_basebackup from {}:{} failed: {}",
            peer.host,
            peer.port,
            reason.map_or("no message", str::trim)
        )))
    }

    /// Gives the copy what belongs to this machine, and makes it a standby of `peer`.
    async fn make_own(&self, places: &Places, copy: &Path, peer: &Peer) -> Result<(), PgError> {
        let mut own_conf = AutoConf::parse("");
        if let Some(old) = &places.old {
            own_conf = AutoConf::parse(&read_or_empty(&old.join("postgresql.auto.conf"))?);
            for name in MACHINE_FILES {
                if old.join(name).is_file() {
                    files::copy(&old.join(name), &copy.join(name))?;
                }
            }
            if old.join(MACHINE_FOLDER).is_dir() {
                replace_folder(&old.join(MACHINE_FOLDER), &copy.join(MACHINE_FOLDER))?;
            }
        }
        let following = self.following(Some(peer))?;
        self.edit_auto_conf(copy, |conf| {
            for name in MACHINE_KEYS {
                conf.set_line(name, own_conf.line(name));
            }
            // A source that was restored once may still say where to stop.
            conf.remove_prefix("recovery_target");
            conf.set("synchronous_standby_names", "");
            for (name, value) in &following {
                conf.set(name, value);
            }
        })?;
        let own_config = places.old.as_ref().is_some_and(|old| old.join("postgresql.conf").exists());
        if !own_config && self.debian().is_none() {
            self.derive_own(copy).await?;
        }
        standby::write_signal(copy)?;
        fs::set_permissions(copy, fs::Permissions::from_mode(0o700))
            .map_err(|error| files::failed("made private", copy, &error))
    }

    /// There was no configuration here before: where the source's would not fit this machine, say what this node's
    /// entry in our configuration says.
    async fn derive_own(&self, copy: &Path) -> Result<(), PgError> {
        let node = &self.settings;
        let port = node.port.to_string();
        let socket_dir = node.socket_dir.to_string_lossy().into_owned();
        let socket_dirs = self.effective(copy, "unix_socket_directories").await?;
        let listen = self.effective(copy, "listen_addresses").await?;
        let port_now = self.effective(copy, "port").await?;
        let has =
            |list: &str, wanted: &[&str]| list.split(',').any(|item| wanted.contains(&item.trim().trim_matches('"')));
        self.edit_auto_conf(copy, |conf| {
            if port_now != port {
                conf.set("port", &port);
            }
            if !has(&socket_dirs, &[&socket_dir]) {
                conf.set("unix_socket_directories", &socket_dir);
            }
            if !has(&listen, &["*", "0.0.0.0", "::", &node.host]) {
                conf.set("listen_addresses", &format!("localhost,{}", node.host));
            }
        })
    }

    /// The value a setting would have if PostgreSQL started in `data_dir`.
    async fn effective(&self, data_dir: &Path, name: &str) -> Result<String, PgError> {
        let mut command = tool::command(self.bin("postgres"));
        command.arg("-D").arg(data_dir).arg("-C").arg(name);
        let output = tool::run(command, "postgres -C", control::LOOK_LIMIT).await?;
        if output.ok {
            return Ok(output.out.trim_end_matches('\n').to_owned());
        }
        // The copied configuration cannot be evaluated here (a file it includes, a library); read it plainly.
        let text = read_or_empty(&data_dir.join("postgresql.conf"))?;
        Ok(value_in(&text, name).unwrap_or_default())
    }
}

impl Places {
    /// The data directory itself stays, and what is in it is exchanged.
    fn in_place(&self) -> bool {
        self.base != self.target
    }
}

/// The copy needs its room beside the old directory. Asked when a left-over copy is removed, which may be that room.
fn refuse_without_space(base: &Path, source: &SourceFacts) -> Result<(), PgError> {
    let parent = base.parent().unwrap_or(Path::new("/"));
    let space =
        rustix::fs::statvfs(parent).map_err(|error| files::failed("examined", parent, &std::io::Error::from(error)))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let needed = source.bytes.saturating_add(source.bytes / 20).saturating_add(SPACE_MARGIN);
    if free < needed {
        return Err(PgError::Refused(format!(
            "{} has {} MiB free, the copy needs {} MiB beside the old directory; make room, for instance by \
             removing directories named *{SET_ASIDE_INFIX}*",
            parent.display(),
            free >> 20,
            needed >> 20
        )));
    }
    Ok(())
}

/// [`prepare`] on a thread of its own: removing a large left-over takes its time.
async fn prepare_apart(places: &Places) -> Result<PathBuf, PgError> {
    let places = places.clone();
    tokio::task::spawn_blocking(move || prepare(&places))
        .await
        .unwrap_or_else(|error| Err(PgError::Failed(format!("the clone could not be prepared: {error}"))))
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
        remove_data(places)?;
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(fresh)
        .map_err(|error| files::failed("made", fresh, &error))?;
    write_marker(places, places.old.as_deref())?;
    Ok(fresh.join("data"))
}

async fn remove_copy(places: &Places) -> Result<(), PgError> {
    let places = places.clone();
    tokio::task::spawn_blocking(move || remove_data(&places))
        .await
        .unwrap_or_else(|error| Err(PgError::Failed(format!("a left-over copy could not be removed: {error}"))))
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
fn write_marker(places: &Places, old: Option<&Path>) -> Result<(), PgError> {
    let old = old.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    files::replace(&places.fresh.join(MARKER), format!("{MARKER_HEAD}{old}\n").as_bytes(), 0o600)
}

/// Sets the old directory aside and puts the copy into its place.
fn swap(places: &Places, copy: &Path) -> Result<Option<PathBuf>, PgError> {
    let target = &places.target;
    if places.in_place() {
        return exchange(places, copy);
    }
    let mut aside = None;
    if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none()) {
        // Empty, as a package or a person made it: nothing to keep.
        fs::remove_dir(target).map_err(|error| rename_failed(target, &error))?;
    } else if fs::symlink_metadata(target).is_ok() {
        let to = set_aside_name(&places.base);
        write_marker(places, Some(&to))?;
        fs::rename(target, &to).map_err(|error| rename_failed(target, &error))?;
        files::sync_parent(target)?;
        aside = Some(to);
    }
    if let Err(error) = fs::rename(copy, target) {
        if let Some(aside) = &aside {
            let _best_effort = fs::rename(aside, target);
        }
        return Err(rename_failed(target, &error));
    }
    files::sync_parent(target)?;
    let _left_over_is_harmless = fs::remove_dir_all(&places.fresh);
    Ok(aside)
}

/// [`swap`] where the data directory must stay: its entries go out one by one, the copy's come in.
fn exchange(places: &Places, copy: &Path) -> Result<Option<PathBuf>, PgError> {
    let target = &places.target;
    let mut aside = None;
    if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
        let to = set_aside_name(&places.base);
        fs::DirBuilder::new().mode(0o700).create(&to).map_err(|error| files::failed("made", &to, &error))?;
        write_marker(places, Some(&to))?;
        if let Err(error) = move_entries(target, &to, true) {
            let _best_effort = move_entries(&to, target, false);
            return Err(error);
        }
        aside = Some(to);
    }
    move_entries(copy, target, false)?;
    fs::set_permissions(target, fs::Permissions::from_mode(0o700))
        .map_err(|error| files::failed("made private", target, &error))?;
    let _left_over_is_harmless = fs::remove_dir_all(&places.fresh);
    Ok(aside)
}

/// Moves all entries, the machine's own files and then `PG_VERSION` before everything else, or all of them last: what
/// is set aside counts as the old cluster only when its configuration is there too.
fn move_entries(from: &Path, to: &Path, version_first: bool) -> Result<(), PgError> {
    let rank = |name: &OsString| match name.to_str() {
        Some(VERSION_FILE) => 2,
        Some(name) if MACHINE_FILES.contains(&name) || [MACHINE_FOLDER, "postgresql.auto.conf"].contains(&name) => 1,
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
fn may_write(dir: &Path) -> bool {
    rustix::fs::accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

/// Whether a rename from one directory to the other can do: both writable, one file system.
fn may_move_between(a: &Path, b: &Path) -> bool {
    let device = |dir: &Path| fs::metadata(dir).ok().map(|meta| meta.dev());
    may_write(a) && may_write(b) && device(a).is_some() && device(a) == device(b)
}

/// A name beside `target` that is free.
fn set_aside_name(target: &Path) -> PathBuf {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let first = with_suffix(target, &format!("{SET_ASIDE_INFIX}{time}"));
    let further = (2_u32..).map(|n| with_suffix(&first, &format!("-{n}")));
    std::iter::once(first.clone()).chain(further).find(|name| fs::symlink_metadata(name).is_err()).unwrap_or(first)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Replaces a folder of plain files.
fn replace_folder(from: &Path, to: &Path) -> Result<(), PgError> {
    if to.exists() {
        fs::remove_dir_all(to).map_err(|error| files::failed("removed", to, &error))?;
    }
    fs::create_dir(to).map_err(|error| files::failed("made", to, &error))?;
    for entry in fs::read_dir(from).map_err(|error| files::failed("read", from, &error))?.flatten() {
        if entry.path().is_file() {
            files::copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    files::sync_parent(&to.join("."))
}

/// statx(2): the root of a mount, also of a bind mount within one file system.
fn is_mount_point(path: &Path) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn mount_point(target: &Path) -> PgError {
    PgError::Refused(format!(
        "{} is a mount point and cannot be set aside; mount one level higher and put data_dir into a directory there",
        target.display()
    ))
}

fn rename_failed(target: &Path, error: &std::io::Error) -> PgError {
    use std::io::ErrorKind::{CrossesDevices, ResourceBusy};
    if matches!(error.kind(), ResourceBusy | CrossesDevices) {
        return mount_point(target);
    }
    files::failed("replaced", target, error)
}

fn stalled() -> PgError {
    PgError::TimedOut(format!("pg_basebackup gave no sign of life for {STALL_LIMIT:?} and was killed"))
}

/// `  4096/23456 kB (17%), 0/1 tablespace ...` of `pg_basebackup --progress`, in bytes.
fn read_progress(line: &str) -> Option<(u64, Option<u64>)> {
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
        assert_eq!(read_progress("  4096/8192 kB (50%), 0/1 tablespace (...)"), Some((4096 * 1024, Some(8192 * 1024))));
        assert_eq!(read_progress("waiting for checkpoint"), None);
        assert_eq!(read_progress("pg_basebackup: error: 1/2 kB ("), None);
    }

    #[test]
    fn a_directory_that_is_not_ours_is_not_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = dir.path().join("main");
        let fresh = with_suffix(&target, FRESH_SUFFIX);
        let places = Places { base: target.clone(), target, fresh: fresh.clone(), old: None };
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
        let places =
            Places { target: target.clone(), fresh: with_suffix(&base, FRESH_SUFFIX), base, old: Some(target.clone()) };
        fs::create_dir_all(target.join("base/1")).expect("mkdir");
        for name in [VERSION_FILE, "postgresql.conf"] {
            fs::write(target.join(name), "old").expect("write");
        }
        let copy = prepare(&places).expect("prepared");
        fs::create_dir_all(copy.join("base/2")).expect("mkdir");
        fs::write(copy.join(VERSION_FILE), "new").expect("write");
        let inode = fs::metadata(&target).expect("stat").ino();
        let aside = swap(&places, &copy).expect("swapped").expect("something was set aside");
        assert_eq!(fs::metadata(&target).expect("stat").ino(), inode, "the directory itself stayed");
        assert!(aside.starts_with(dir.path().join("state")) && aside.join("base/1").is_dir());
        assert_eq!(fs::read_to_string(aside.join("postgresql.conf")).expect("read"), "old");
        assert_eq!(fs::read_to_string(target.join(VERSION_FILE)).expect("read"), "new");
        assert!(target.join("base/2").is_dir() && !target.join("base/1").exists());
        assert!(!places.fresh.exists());
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
