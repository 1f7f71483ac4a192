//! What an administrator has `init --postgres` do to a Debian cluster: settings in a file of their own, rules at the
//! top of `pg_hba.conf`, the question before its unit's start, a restart.
//!
//! It is NOT the daemon's: that never touches these files. Non-Debian clusters are left to their administrator.
//!
//! **Invariants:** no file is overwritten (`pg_hba.conf` is replaced whole, and the old one kept beside it); what was
//! done before is not done again.

use super::autoconf::value_in;
use super::found::FoundCluster;
use super::tool;
use crate::base::time::Duration;
use crate::io::outside::has_systemd;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// A restart or stop writes a checkpoint first.
const SERVICE_LIMIT: Duration = Duration::from_secs(300);
/// A statement of a few milliseconds.
const SQL_LIMIT: Duration = Duration::from_secs(30);
/// The first and the last line of what is put into `pg_hba.conf`.
const RULES_BEGIN: &str = "# Written by portcullis init: over the network the nodes' replication alone, at the socket \
    the gate as the very role.";
const RULES_END: &str = "# The end of what portcullis init wrote.";
/// What the package has as an example.
const DROP_IN: &str = "\
# Written by portcullis init: a former primary does not come up writable after a reboot.
[Service]
ExecCondition=/usr/bin/portcullis may-start-primary
";

/// A cluster and what is to be written for it.
#[derive(Debug)]
pub struct Preparation<'a> {
    pub cluster: &'a FoundCluster,
    /// This node's `postgres.host`.
    pub own_host: &'a str,
    /// Those of all nodes, this one's too.
    pub hosts: Vec<&'a str>,
    /// `replication.user`.
    pub user: &'a str,
    /// `postgres.admin_user`.
    pub admin: &'a str,
}

fn with_mask(host: &str) -> String {
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => format!("{host}/32"),
        Ok(IpAddr::V6(_)) => format!("{host}/128"),
        Err(_) => host.to_owned(),
    }
}

/// `what happened; what to do about it` of a file.
fn cannot(path: &Path, error: &std::io::Error) -> String {
    format!("{} cannot be written ({error}); run init as root", path.display())
}

impl Preparation<'_> {
    /// The lines of `postgresql.conf`.
    pub fn settings(&self) -> String {
        format!("listen_addresses = 'localhost, {}'\nwal_log_hints = on\n", self.own_host)
    }

    /// The lines of `pg_hba.conf`, to stand before all others.
    pub fn rules(&self) -> String {
        let (user, admin) = (self.user, self.admin);
        let width = self.hosts.iter().map(|host| with_mask(host).len()).max().unwrap_or_default();
        let mut lines = format!("local   all           {admin:<12} {:width$}  peer\n", "");
        lines += &format!("local   all           {:<12} {:width$}  scram-sha-256\n", "all", "");
        for database in ["replication", "postgres"] {
            for host in &self.hosts {
                lines += &format!("host    {database:<13} {user:<12} {:width$}  scram-sha-256\n", with_mask(host));
            }
        }
        lines
    }

    fn name(&self) -> String {
        self.cluster.name.as_ref().map_or_else(String::new, |name| format!("{}/{name}", self.cluster.version))
    }

    /// The last of what is written is there: all before it was done once.
    pub fn is_done(&self) -> bool {
        self.drop_in().is_some_and(|path| path.exists())
    }

    fn drop_in(&self) -> Option<PathBuf> {
        let unit = self.cluster.unit().filter(|_| has_systemd())?;
        Some(PathBuf::from(format!("/etc/systemd/system/{unit}.d/portcullis.conf")))
    }

    /// Writes settings and rules. Each sentence says what was done.
    ///
    /// # Errors
    /// It is not one of Debian's clusters, or a file cannot be written; what was done stays and is not done again.
    pub fn write_settings(&self) -> Result<Vec<String>, String> {
        let dir = self.debian_dir()?;
        let mut said = vec![self.write_conf(&dir)?];
        said.push(self.write_rules(&dir)?);
        Ok(said)
    }

    fn debian_dir(&self) -> Result<PathBuf, String> {
        self.cluster.debian_dir().ok_or_else(|| {
            let data = self.cluster.data_dir.display();
            format!(
                "{data} is no cluster of postgresql-common; leave --postgres out and add the lines that init prints"
            )
        })
    }

    fn write_conf(&self, dir: &Path) -> Result<String, String> {
        let path = dir.join("conf.d/portcullis.conf");
        let text = format!("# Written by portcullis init, for this machine alone.\n{}", self.settings());
        let shown = path.display();
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(format!("kept {shown}, which was there already"));
        }
        if path.exists() {
            return Err(format!("{shown} exists with another text; move it away, or leave --postgres out"));
        }
        let main = dir.join("postgresql.conf");
        let text_of_main = fs::read_to_string(&main).map_err(|error| cannot(&main, &error))?;
        if value_in(&text_of_main, "include_dir").as_deref() != Some("conf.d") {
            return Err(format!("{} has no include_dir = 'conf.d'; add it at its end", main.display()));
        }
        let folder = dir.join("conf.d");
        fs::create_dir_all(&folder).map_err(|error| cannot(&folder, &error))?;
        write_like(&path, &text, &main, 0o644)?;
        Ok(format!("wrote {shown}: listen_addresses and wal_log_hints"))
    }

    fn write_rules(&self, dir: &Path) -> Result<String, String> {
        let conf = fs::read_to_string(dir.join("postgresql.conf")).unwrap_or_default();
        let path = value_in(&conf, "hba_file").map_or_else(|| dir.join("pg_hba.conf"), PathBuf::from);
        let old = fs::read_to_string(&path).map_err(|error| cannot(&path, &error))?;
        let rules = format!("{RULES_BEGIN}\n{}{RULES_END}\n", self.rules());
        let shown = path.display();
        if old.starts_with(&rules) {
            return Ok(format!("kept {shown}, which has the lines already"));
        }
        if old.contains(RULES_BEGIN) {
            return Err(format!(
                "{shown} has lines that an earlier init wrote for other nodes; take them out (from \"{RULES_BEGIN}\" \
                 to \"{RULES_END}\")"
            ));
        }
        let mode = fs::metadata(&path).map_or(0o640, |meta| meta.permissions().mode() & 0o7777);
        let kept = PathBuf::from(format!("{shown}.before-portcullis"));
        if !kept.exists() {
            write_like(&kept, &old, &path, mode)?;
        }
        let fresh = PathBuf::from(format!("{shown}.portcullis-new"));
        // Left by an init that was broken off; ours by its name.
        let _not_there = fs::remove_file(&fresh);
        write_like(&fresh, &format!("{rules}{old}"), &path, mode)?;
        fs::rename(&fresh, &path).map_err(|error| cannot(&path, &error))?;
        let count = self.rules().lines().count();
        let name = kept.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(format!("put {count} lines at the top of {shown}; as it was: {name}"))
    }

    /// Has its unit ask `may-start-primary`; nothing where systemd does not run.
    ///
    /// # Errors
    /// The drop-in cannot be written, or systemd does not read it.
    pub async fn write_drop_in(&self) -> Result<Option<String>, String> {
        let Some(path) = self.drop_in() else { return Ok(None) };
        let shown = path.display();
        if path.exists() {
            return Ok(Some(format!("kept {shown}, which was there already")));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| cannot(folder, &error))?;
        }
        crate::io::files::create(&path, DROP_IN.as_bytes(), 0o644, None)?;
        service(&["systemctl", "daemon-reload"]).await?;
        Ok(Some(format!("wrote {shown}: before a start it asks may-start-primary")))
    }

    /// Restarts it, so that the settings are in force, and takes from PUBLIC what could end a commit's wait.
    ///
    /// # Errors
    /// It is a standby, does not start, or refuses the statement.
    pub async fn restart(&self) -> Result<Vec<String>, String> {
        self.debian_dir()?;
        if self.cluster.data_dir.join("standby.signal").exists() {
            let data = self.cluster.data_dir.display();
            return Err(format!(
                "{data} is a standby's; --postgres primary is for the node whose data is the service's"
            ));
        }
        self.control("restart").await?;
        let list = self.sql("postgres", "SELECT datname FROM pg_database WHERE datallowconn ORDER BY datname").await?;
        let databases: Vec<&str> = list.lines().filter(|name| !name.is_empty()).collect();
        for database in &databases {
            self.sql(database, "REVOKE EXECUTE ON FUNCTION pg_catalog.pg_cancel_backend(integer) FROM PUBLIC").await?;
        }
        Ok(vec![
            format!("restarted PostgreSQL {}", self.name()),
            format!("revoked pg_cancel_backend from PUBLIC in {}", databases.join(", ")),
        ])
    }

    /// Stops it and moves its fresh data aside, so that a rejoin clones the other node's.
    ///
    /// # Errors
    /// The data is more than a fresh cluster, or it cannot be stopped or moved.
    pub async fn set_aside(&self) -> Result<String, String> {
        self.debian_dir()?;
        if self.cluster.running {
            self.control("stop").await?;
        }
        let moved = super::set_aside_fresh(&self.cluster.data_dir);
        let moved = match moved {
            Ok(moved) => moved,
            Err(why) if self.cluster.running => {
                self.control("start").await?;
                return Err(why);
            }
            Err(why) => return Err(why),
        };
        Ok(match moved {
            Some(to) => {
                let name = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
                format!(
                    "stopped PostgreSQL {}; its empty data is now {}",
                    self.name(),
                    to.with_file_name(name).display()
                )
            }
            None => format!("no data in {}; rejoin clones the other node's", self.cluster.data_dir.display()),
        })
    }

    /// As the service manager, or postgresql-common without one, does it.
    async fn control(&self, verb: &str) -> Result<(), String> {
        let (version, name) = (&self.cluster.version, self.cluster.name.as_deref().unwrap_or_default());
        match self.cluster.unit().filter(|_| has_systemd()) {
            Some(unit) => service(&["systemctl", verb, &unit]).await,
            None => service(&["pg_ctlcluster", version, name, verb]).await,
        }
    }

    /// Runs one statement as the admin user over the socket, by psql as the system user who owns the data.
    async fn sql(&self, database: &str, statement: &str) -> Result<String, String> {
        let owner = fs::metadata(&self.cluster.data_dir)
            .map_err(|error| format!("{} is not there ({error}); name --data-dir", self.cluster.data_dir.display()))?;
        let mut command = tool::command(self.cluster.bin_dir.join("psql"));
        command.uid(owner.uid()).gid(owner.gid());
        command.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", self.admin, "-d", database]);
        command.arg("-h").arg(&self.cluster.socket_dir).args(["-p", &self.cluster.port.to_string()]);
        command.args(["-c", statement]);
        let output = tool::run(command, "psql", SQL_LIMIT).await.map_err(|error| error.to_string())?;
        match output.ok {
            true => Ok(output.out),
            false => Err(format!("psql in {database}: {}; mend it and run init again", output.last_line())),
        }
    }
}

async fn service(words: &[&str]) -> Result<(), String> {
    let shown = words.join(" ");
    let mut command = tool::command(words.first().copied().unwrap_or_default());
    command.args(words.iter().skip(1));
    let output = tool::run(command, &shown, SERVICE_LIMIT).await.map_err(|error| error.to_string())?;
    match output.ok {
        true => Ok(()),
        false => Err(format!("{shown}: {}; mend it and run init again", output.complaint())),
    }
}

/// Writes a new file with this mode, its owner that of `like`.
fn write_like(path: &Path, text: &str, like: &Path, mode: u32) -> Result<(), String> {
    let write = || {
        let meta = fs::metadata(like)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        fchown(&file, Some(meta.uid()), Some(meta.gid()))?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(|error| cannot(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(dir: &Path) -> FoundCluster {
        FoundCluster {
            version: "15".into(),
            name: None,
            data_dir: dir.join("data"),
            bin_dir: "/usr/lib/postgresql/15/bin".into(),
            port: 5432,
            socket_dir: "/var/run/postgresql".into(),
            running: false,
        }
    }

    fn preparation<'a>(cluster: &'a FoundCluster, hosts: &[&'a str]) -> Preparation<'a> {
        Preparation {
            cluster,
            own_host: hosts.first().copied().unwrap_or_default(),
            hosts: hosts.to_vec(),
            user: "replicator",
            admin: "postgres",
        }
    }

    #[test]
    fn rules_come_first_once_and_the_old_file_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let found = cluster(dir.path());
        let preparation = preparation(&found, &["192.0.2.11", "2001:db8::12"]);
        let hba = dir.path().join("pg_hba.conf");
        let kept = dir.path().join("pg_hba.conf.before-portcullis");
        fs::write(dir.path().join("postgresql.conf"), "include_dir = 'conf.d'\n").expect("ours");
        fs::write(&hba, "local all all peer\n").expect("ours");
        fs::set_permissions(&hba, fs::Permissions::from_mode(0o640)).expect("ours");
        assert!(preparation.write_rules(dir.path()).expect("written").starts_with("put 6 lines at the top of "));
        let text = fs::read_to_string(&hba).expect("there");
        assert!(text.ends_with(&format!("{RULES_END}\nlocal all all peer\n")), "{text}");
        assert!(text.contains("host    replication   replicator   192.0.2.11/32     scram-sha-256\n"), "{text}");
        assert!(text.contains("host    postgres      replicator   2001:db8::12/128  scram-sha-256\n"), "{text}");
        assert_eq!(fs::read_to_string(&kept).expect("kept"), "local all all peer\n");
        assert_eq!(fs::metadata(&hba).expect("there").mode() & 0o7777, 0o640);
        assert!(preparation.write_rules(dir.path()).expect("kept").starts_with("kept "));
        assert_eq!(fs::read_to_string(&hba).expect("there"), text);
        // For other nodes the lines are not doubled.
        let other = super::tests::preparation(&found, &["192.0.2.11", "192.0.2.99"]);
        assert!(other.write_rules(dir.path()).expect_err("other nodes").contains("earlier init"));
        assert_eq!(fs::read_to_string(&hba).expect("there"), text);
    }

    #[test]
    fn settings_have_a_file_of_their_own_that_is_never_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        let found = cluster(dir.path());
        let preparation = preparation(&found, &["192.0.2.11", "192.0.2.12"]);
        fs::write(dir.path().join("postgresql.conf"), "#include_dir = 'conf.d'\n").expect("ours");
        assert!(preparation.write_conf(dir.path()).expect_err("not included").contains("no include_dir"));
        fs::write(dir.path().join("postgresql.conf"), "include_dir = 'conf.d'\n").expect("ours");
        assert!(preparation.write_conf(dir.path()).expect("written").starts_with("wrote "));
        let path = dir.path().join("conf.d/portcullis.conf");
        let text = fs::read_to_string(&path).expect("there");
        assert!(text.contains("listen_addresses = 'localhost, 192.0.2.11'\n"), "{text}");
        assert!(preparation.write_conf(dir.path()).expect("kept").starts_with("kept "));
        fs::write(&path, "work_mem = '4MB'\n").expect("ours");
        assert!(preparation.write_conf(dir.path()).expect_err("another text").contains("exists with another text"));
        // Not Debian's: nothing at all.
        assert!(preparation.write_settings().expect_err("not Debian's").contains("postgresql-common"));
    }
}
