//! What belongs to one machine stays that machine's, though a copy and `pg_rewind` bring the other node's:
//! configuration and key files that live in the data directory, and [`MACHINE_KEYS`] of `postgresql.auto.conf`.

use super::autoconf::{AutoConf, value_in};
use super::settings::read_or_empty;
use super::{Cluster, Peer, PgError, control, files, standby, tool};
use std::ffi::OsString;
use std::fs;
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

/// What PostgreSQL itself keeps at the top of a data directory, apart from `pg_...`.
const POSTGRES_OWN: [&str; 11] = [
    "base",
    "global",
    "PG_VERSION",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "postmaster.opts",
    "standby.signal",
    "current_logfiles",
];

/// What somebody else put into a data directory (logs, keys): `pg_rewind` would remove it, for the source has it not.
fn foreign(data_dir: &Path) -> Result<Vec<OsString>, PgError> {
    let entries = fs::read_dir(data_dir).map_err(|error| files::failed("read", data_dir, &error))?;
    let known = |name: &str| {
        MACHINE_FILES.contains(&name)
            || POSTGRES_OWN.contains(&name)
            || [MACHINE_FOLDER, AUTO_CONF, "postmaster.pid", "recovery.signal"].contains(&name)
            || name.starts_with("pg_")
    };
    Ok(entries.flatten().map(|entry| entry.file_name()).filter(|name| !name.to_str().is_some_and(known)).collect())
}

/// Moves what is foreign to PostgreSQL out of `data_dir`, into `to`.
pub(super) fn move_foreign(data_dir: &Path, to: &Path) -> Result<(), PgError> {
    for name in foreign(data_dir)? {
        let from = data_dir.join(&name);
        fs::rename(&from, to.join(&name)).map_err(|error| files::failed("moved", &from, &error))?;
    }
    files::sync_parent(&to.join("."))?;
    files::sync_parent(&data_dir.join("."))
}

/// Moves it back; what the source has under the same names gives way.
pub(super) fn move_back(from: &Path, data_dir: &Path) -> Result<(), PgError> {
    for name in foreign(from)? {
        let to = data_dir.join(&name);
        let brought = fs::symlink_metadata(&to).map(|meta| meta.is_dir());
        match brought {
            Ok(true) => fs::remove_dir_all(&to).map_err(|error| files::failed("removed", &to, &error))?,
            Ok(false) => files::remove(&to)?,
            Err(_) => {}
        }
        fs::rename(from.join(&name), &to).map_err(|error| files::failed("moved", &to, &error))?;
    }
    files::sync_parent(&data_dir.join("."))
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
