//! What belongs to one machine stays that machine's, though a copy and `pg_rewind` bring the other node's:
//! configuration and key files that live in the data directory, and [`MACHINE_KEYS`] of `postgresql.auto.conf`.

use super::autoconf::{AutoConf, value_in};
use super::paths::{is_mount_point, with_suffix};
use super::settings::read_or_empty;
use super::{Cluster, Peer, PgError, control, files, paths, spaces, standby, tool};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

/// Files in the data directory that are this machine's own (`conf.d` is a directory).
pub(super) const MACHINE_FILES: [&str; 7] =
    ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "server.crt", "server.key", "root.crt", "root.crl"];
pub(super) const MACHINE_FOLDER: &str = "conf.d";

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
pub(super) const AUTO_CONF: &str = "postgresql.auto.conf";

impl Cluster {
    /// Gives `copy` what belongs to this machine, as found in `own` (a data directory, or [`keep`] of one), and makes
    /// it a standby of `peer`.
    pub(super) async fn make_own(&self, own: Option<&Path>, copy: &Path, peer: &Peer) -> Result<(), PgError> {
        let mut own_conf = AutoConf::parse("");
        if let Some(old) = own {
            own_conf = AutoConf::parse(&read_or_empty(&old.join(AUTO_CONF))?);
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
        let own_config = own.is_some_and(|old| old.join("postgresql.conf").exists());
        if !own_config && self.debian().is_none() {
            self.derive_own(copy).await?;
        }
        standby::write_signal(copy)
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

/// Where a file system keeps what it found at a check, at the top of a mount.
pub(super) const LOST_FOUND: &str = "lost+found";
/// Ends the name of what is being copied or removed.
const PART_SUFFIX: &str = ".portcullis-part";

/// What PostgreSQL itself, from 13 to 17, keeps at the top of a data directory, beside the machine's own: what `initdb`
/// makes, and what a server, a base backup or `pg_rewind` leaves. A name that only begins with `pg_` is nobody's.
const POSTGRES_OWN: [&str; 35] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_multixact",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_xact",
    "PG_VERSION",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "standby.signal",
    "recovery.signal",
    "recovery.done",
    "promote",
    "logrotate",
    "backup_label",
    "backup_label.old",
    "backup_label.tmp",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "backup_manifest.tmp",
    "current_logfiles",
    "current_logfiles.tmp",
];

/// What somebody else put into a data directory (logs, keys): `pg_rewind` would remove it, for the source has it not.
fn foreign(data_dir: &Path) -> Result<Vec<OsString>, PgError> {
    let entries = fs::read_dir(data_dir).map_err(|error| files::failed("read", data_dir, &error))?;
    let known = |name: &str| {
        MACHINE_FILES.contains(&name)
            || POSTGRES_OWN.contains(&name)
            || [MACHINE_FOLDER, AUTO_CONF].contains(&name)
            || name.ends_with(PART_SUFFIX)
            // A file system's own; root's, as a rule.
            || name == LOST_FOUND
    };
    Ok(entries.flatten().map(|entry| entry.file_name()).filter(|name| !name.to_str().is_some_and(known)).collect())
}

/// What is foreign there, in bytes; links are not followed.
pub(super) fn foreign_bytes(data_dir: &Path) -> u64 {
    let names = foreign(data_dir).unwrap_or_default();
    names.iter().map(|name| files::size_of(&data_dir.join(name))).sum()
}

/// Why `pg_rewind` would stop in it, or empty what it must not.
pub(super) fn unfit_for_rewind(data_dir: &Path) -> Option<String> {
    let mounted = foreign(data_dir).ok()?.into_iter().find(|name| is_mount_point(&data_dir.join(name)));
    if let Some(name) = mounted {
        let name = name.display();
        return Some(format!("something is mounted on {name} in the data directory, and pg_rewind would empty it"));
    }
    let lost = data_dir.join(LOST_FOUND);
    let real = paths::resolved(data_dir);
    if let Some(inside) = spaces::led_to(data_dir).into_iter().find(|to| to.starts_with(&real)) {
        let inside = inside.display();
        return Some(format!(
            "a link leads to {inside}, inside the data directory, and pg_rewind would find that twice"
        ));
    }
    (lost.exists() && fs::read_dir(&lost).is_err()).then(|| {
        format!("{} may not be read by the owner of the data directory, and pg_rewind stops at it", lost.display())
    })
}

/// Moves what is foreign to PostgreSQL out of `data_dir`, into `to`.
pub(super) fn move_foreign(data_dir: &Path, to: &Path) -> Result<(), PgError> {
    for name in foreign(data_dir)? {
        let (from, to) = (data_dir.join(&name), to.join(&name));
        carry(&from, &to, fs::rename(&from, &to))?;
    }
    files::sync_parent(&to.join("."))?;
    files::sync_parent(&data_dir.join("."))
}

/// Moves it back. What stands there under the same names gives way: to `later`, which is made then; or, where that is
/// not given, for good, as the source's.
pub(super) fn move_back(from: &Path, data_dir: &Path, later: Option<&Path>) -> Result<(), PgError> {
    for name in foreign(from)? {
        let to = data_dir.join(&name);
        match later {
            Some(later) if fs::symlink_metadata(&to).is_ok() => {
                let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(later);
                made.map_err(|error| files::failed("made", later, &error))?;
                files::sync_parent(later)?;
                let aside = later.join(&name);
                carry(&to, &aside, fs::rename(&to, &aside))?;
                files::sync_parent(&aside)?;
            }
            _ => remove_all(&to)?,
        }
        carry(&from.join(&name), &to, fs::rename(from.join(&name), &to))?;
    }
    files::sync_parent(&data_dir.join("."))
}

/// Moves one entry whose rename ended so, also to another file system or mount: it is whole at one of the two places at
/// any time, and what is not whole ends in [`PART_SUFFIX`].
fn carry(from: &Path, to: &Path, renamed: io::Result<()>) -> Result<(), PgError> {
    match renamed {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
        done => return done.map_err(|error| files::failed("moved", from, &error)),
    }
    let (part, gone) = (with_suffix(to, PART_SUFFIX), with_suffix(from, PART_SUFFIX));
    remove_all(&part)?;
    remove_all(&gone)?;
    copy_all(from, &part)?;
    fs::rename(&part, to).map_err(|error| files::failed("moved", to, &error))?;
    files::sync_parent(to)?;
    fs::rename(from, &gone).map_err(|error| files::failed("moved", from, &error))?;
    remove_all(&gone)
}

/// Copies a file, a link, or a folder with all that is in it, to where nothing is.
fn copy_all(from: &Path, to: &Path) -> Result<(), PgError> {
    let failed = |error: io::Error| files::failed("copied", from, &error);
    let meta = fs::symlink_metadata(from).map_err(failed)?;
    if meta.is_symlink() {
        return fs::read_link(from).and_then(|target| symlink(target, to)).map_err(failed);
    }
    if meta.is_file() {
        return files::copy(from, to);
    }
    if !meta.is_dir() || is_mount_point(from) {
        return Err(PgError::Failed(format!("{} is neither a file nor a plain folder; move it away", from.display())));
    }
    fs::create_dir(to).map_err(failed)?;
    for entry in fs::read_dir(from).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        copy_all(&from.join(&name), &to.join(&name))?;
    }
    fs::set_permissions(to, meta.permissions()).map_err(failed)?;
    files::sync_parent(&to.join("."))
}

fn remove_all(path: &Path) -> Result<(), PgError> {
    match fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path).map_err(|error| files::failed("removed", path, &error)),
        Ok(_) => files::remove(path),
    }
}

/// Copies into `to` all that [`Cluster::make_own`] needs of the data directory `from`.
pub(super) fn keep(from: &Path, to: &Path) -> Result<(), PgError> {
    for name in MACHINE_FILES.into_iter().chain([AUTO_CONF]) {
        if from.join(name).is_file() {
            files::copy(&from.join(name), &to.join(name))?;
        }
    }
    if from.join(MACHINE_FOLDER).is_dir() {
        replace_folder(&from.join(MACHINE_FOLDER), &to.join(MACHINE_FOLDER))?;
    }
    files::sync_parent(&to.join("."))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_goes_to_another_file_system_whole() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (from, to) = (dir.path().join("log"), dir.path().join("kept/log"));
        fs::create_dir_all(from.join("deep")).expect("mkdir");
        fs::create_dir(dir.path().join("kept")).expect("mkdir");
        fs::write(from.join("deep/file"), "precious").expect("write");
        symlink("deep/file", from.join("link")).expect("symlink");
        // Left by a crash in the middle.
        fs::create_dir(with_suffix(&to, PART_SUFFIX)).expect("mkdir");
        carry(&from, &to, Err(io::ErrorKind::CrossesDevices.into())).expect("carried");
        assert_eq!(fs::read_to_string(to.join("link")).expect("read"), "precious");
        assert!(fs::symlink_metadata(to.join("link")).expect("link").is_symlink());
        assert!(!from.exists() && !with_suffix(&to, PART_SUFFIX).exists() && !with_suffix(&from, PART_SUFFIX).exists());
        assert!(carry(&to, &from, Err(io::ErrorKind::ResourceBusy.into())).is_err());
        assert!(to.join("deep/file").exists());
    }

    #[test]
    fn a_link_into_the_data_directory_is_unfit_and_one_out_of_it_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let data = dir.path().join("data");
        for name in ["data/pg_tblspc", "data/inside", "wal"] {
            fs::create_dir_all(dir.path().join(name)).expect("mkdir");
        }
        symlink("../wal", data.join("pg_wal")).expect("symlink");
        assert_eq!(unfit_for_rewind(&data), None);
        symlink(data.join("inside"), data.join("pg_tblspc/16384")).expect("symlink");
        assert!(unfit_for_rewind(&data).is_some_and(|why| why.contains("inside the data directory")));
    }

    #[test]
    fn what_belongs_to_the_file_system_or_is_half_copied_stays() {
        let dir = tempfile::tempdir().expect("tempdir");
        for name in ["lost+found", "log", "log.portcullis-part", "pg_wal", "base"] {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
        }
        assert_eq!(foreign(dir.path()).expect("read"), ["log"]);
        // Named like PostgreSQL's, and not PostgreSQL's: before version 10, an administrator's, pg_upgrade's, ours.
        let others = ["pg_audit", "pg_clog", "pg_log", "pg_upgrade_output.d", "pg_wal.set-aside-20260101T000000Z"];
        for name in others {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
        }
        let mut found = foreign(dir.path()).expect("read");
        found.sort();
        assert_eq!(found, [&["log"], &others[..]].concat());
    }
}
