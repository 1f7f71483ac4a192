//! Clusters of this machine, as `init` proposes them: Debian's below /etc/postgresql, running ones, and a directory
//! that was named. And what moves a fresh cluster out of the way of a clone.

use super::autoconf::value_in;
use super::clone::SET_ASIDE_INFIX;
use super::control::DEBIAN_ETC;
use super::paths::{dated_name, is_mount_point};
use std::fs;
use std::path::{Path, PathBuf};

/// PostgreSQL gives what people make numbers from here on (FirstNormalObjectId); what initdb makes is below.
const FIRST_NORMAL_OID: u32 = 16384;

/// A cluster that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundCluster {
    /// Major version, "15".
    pub version: String,
    /// Debian's name for it; `None`: not one of Debian's.
    pub name: Option<String>,
    pub data_dir: PathBuf,
    pub bin_dir: PathBuf,
    pub port: u16,
    pub socket_dir: PathBuf,
    /// A postmaster of it is alive.
    pub running: bool,
}

impl FoundCluster {
    /// Debian's directory of its configuration.
    pub fn debian_dir(&self) -> Option<PathBuf> {
        self.name.as_ref().map(|name| Path::new(DEBIAN_ETC).join(&self.version).join(name))
    }

    /// Debian's unit of it.
    pub fn unit(&self) -> Option<String> {
        self.name.as_ref().map(|name| format!("postgresql@{}-{name}.service", self.version))
    }
}

/// Every cluster of this machine: Debian's by version, newest first, then what else runs.
pub fn clusters() -> Vec<FoundCluster> {
    let mut found = debian(Path::new(DEBIAN_ETC));
    found.sort_by_key(|cluster| {
        let version = cluster.version.parse::<u32>().unwrap_or_default();
        (std::cmp::Reverse(version), cluster.name.as_deref() != Some("main"), cluster.name.clone())
    });
    for cluster in running() {
        if !found.iter().any(|known| same(&known.data_dir, &cluster.data_dir)) {
            found.push(cluster);
        }
    }
    found
}

/// The cluster whose data is in `data_dir`, which need not be a Debian one nor run; `None`: none is there and none is
/// configured to be.
pub fn cluster_in(data_dir: &Path) -> Option<FoundCluster> {
    clusters().into_iter().find(|known| same(&known.data_dir, data_dir)).or_else(|| in_directory(data_dir))
}

fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn debian(etc: &Path) -> Vec<FoundCluster> {
    let mut found = Vec::new();
    for version in names_in(etc) {
        for name in names_in(&etc.join(&version)) {
            let Ok(text) = fs::read_to_string(etc.join(&version).join(&name).join("postgresql.conf")) else { continue };
            let Some(data_dir) = value_in(&text, "data_directory").map(PathBuf::from) else { continue };
            let bin_dir = PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"));
            found.push(cluster(version.clone(), Some(name), data_dir, bin_dir, &text));
        }
    }
    found
}

/// What a directory with a cluster in it says of itself.
fn in_directory(data_dir: &Path) -> Option<FoundCluster> {
    let version = fs::read_to_string(data_dir.join("PG_VERSION")).ok()?.trim().to_owned();
    let text = fs::read_to_string(data_dir.join("postgresql.conf")).unwrap_or_default();
    let bin_dir = PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"));
    Some(cluster(version, None, data_dir.to_owned(), bin_dir, &text))
}

fn cluster(version: String, name: Option<String>, data_dir: PathBuf, bin_dir: PathBuf, text: &str) -> FoundCluster {
    let port = value_in(text, "port").and_then(|port| port.parse().ok()).unwrap_or(5432);
    let first = value_in(text, "unix_socket_directories");
    let first = first.and_then(|list| list.split(',').next().map(|dir| dir.trim().trim_matches('"').to_owned()));
    let socket_dir = first.filter(|dir| dir.starts_with('/')).unwrap_or_else(|| "/var/run/postgresql".to_owned());
    let mut found =
        FoundCluster { version, name, data_dir, bin_dir, port, socket_dir: socket_dir.into(), running: false };
    // A running one knows best: port and socket directory are lines 4 and 5 of its pid file.
    let pid_file = fs::read_to_string(found.data_dir.join("postmaster.pid")).unwrap_or_default();
    let lines: Vec<&str> = pid_file.lines().map(str::trim).collect();
    let alive = lines.first().is_some_and(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == "postgres")
    });
    if alive {
        found.running = true;
        if let Some(port) = lines.get(3).and_then(|port| port.parse().ok()) {
            found.port = port;
        }
        if let Some(dir) = lines.get(4).filter(|dir| dir.starts_with('/')) {
            found.socket_dir = PathBuf::from(dir);
        }
    }
    found
}

/// Postmasters that run: processes called postgres whose own pid stands in the pid file of their working directory.
fn running() -> Vec<FoundCluster> {
    let mut found = Vec::new();
    for pid in names_in(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        if !fs::read_to_string(proc.join("comm")).is_ok_and(|comm| comm.trim_end() == "postgres") {
            continue;
        }
        let Ok(data_dir) = fs::read_link(proc.join("cwd")) else { continue };
        let own = fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
        if own.lines().next().map(str::trim) != Some(pid.as_str()) {
            continue;
        }
        if let Some(mut cluster) = in_directory(&data_dir) {
            if let Some(dir) = fs::read_link(proc.join("exe")).ok().and_then(|exe| exe.parent().map(Path::to_owned)) {
                cluster.bin_dir = dir;
            }
            found.push(cluster);
        }
    }
    found
}

/// Moves the data of a stopped cluster to a name beside it, for a clone to take its place. Returns where it is now;
/// `None`: there was none.
///
/// # Errors
/// It holds something of a person's, or cannot be moved; it is as it was.
pub fn set_aside_fresh(data_dir: &Path) -> Result<Option<PathBuf>, String> {
    if !data_dir.join("PG_VERSION").exists() {
        return Ok(None);
    }
    let shown = data_dir.display();
    if let Some(file) = made_by_people(data_dir) {
        return Err(format!(
            "{shown} holds more than a fresh cluster ({}); if nobody needs it, stop PostgreSQL and move it yourself: \
             mv {shown} {shown}.old",
            file.display()
        ));
    }
    if data_dir.is_symlink() || is_mount_point(data_dir) {
        return Err(format!("{shown} is a mount point or a link and cannot be moved; empty it yourself"));
    }
    let to = dated_name(data_dir, SET_ASIDE_INFIX);
    fs::rename(data_dir, &to).map_err(|error| format!("{shown} cannot be moved ({error}); move it yourself"))?;
    Ok(Some(to))
}

/// The first file or database with a number that initdb never gives, tablespaces included.
fn made_by_people(data_dir: &Path) -> Option<PathBuf> {
    let number = |name: &str| name.split(['.', '_']).next().unwrap_or_default().parse::<u32>().unwrap_or_default();
    let theirs = |dir: &Path| {
        let names = names_in(dir);
        names.into_iter().find(|name| number(name) >= FIRST_NORMAL_OID).map(|name| dir.join(name))
    };
    let base = data_dir.join("base");
    let inside = || names_in(&base).into_iter().find_map(|database| theirs(&base.join(database)));
    theirs(&base).or_else(inside).or_else(|| theirs(&data_dir.join("pg_tblspc")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, "").expect("written");
    }

    #[test]
    fn debian_clusters_are_found_with_port_and_sockets() {
        let dir = tempfile::tempdir().expect("a directory");
        let conf = dir.path().join("15/main/postgresql.conf");
        touch(&conf);
        let text = "data_directory = '/srv/pg' # here\nport = 5433\nunix_socket_directories = '/run/a, /run/b'\n";
        fs::write(&conf, text).expect("written");
        touch(&dir.path().join("13/no-conf/start.conf"));
        let found = debian(dir.path());
        assert_eq!(found.len(), 1, "{found:?}");
        let cluster = &found[0];
        assert_eq!((cluster.version.as_str(), cluster.name.as_deref(), cluster.port), ("15", Some("main"), 5433));
        assert_eq!(cluster.data_dir, Path::new("/srv/pg"));
        assert_eq!(cluster.bin_dir, Path::new("/usr/lib/postgresql/15/bin"));
        assert_eq!(cluster.socket_dir, Path::new("/run/a"));
        assert_eq!(cluster.unit().as_deref(), Some("postgresql@15-main.service"));
        assert!(!cluster.running);
    }

    #[test]
    fn only_a_fresh_cluster_is_set_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("main");
        assert_eq!(set_aside_fresh(&data), Ok(None));
        for file in ["PG_VERSION", "base/1/1259_fsm", "base/5/13395", "pg_tblspc/x"] {
            touch(&data.join(file));
        }
        for theirs in ["base/5/16384", "base/16390/1259", "pg_tblspc/16400"] {
            touch(&data.join(theirs));
            let error = set_aside_fresh(&data).expect_err(theirs);
            assert!(error.contains("more than a fresh cluster") && error.contains("mv "), "{error}");
            assert!(data.join(theirs).exists(), "{theirs} was touched");
            let top = data.join(theirs);
            match theirs == "base/16390/1259" {
                true => fs::remove_dir_all(data.join("base/16390")).expect("ours"),
                false => fs::remove_file(top).expect("ours"),
            }
        }
        let to = set_aside_fresh(&data).expect("fresh").expect("there was one");
        assert!(!data.exists() && to.join("base/5/13395").exists(), "{}", to.display());
        assert!(to.display().to_string().contains("main.set-aside-"), "{}", to.display());
    }
}
