//! Real PostgreSQL of the lab: a cluster per node as an administrator would set it up by hand (initdb, a replication
//! role, pg_basebackup), and questions asked over the node's own socket.

use super::host::{Host, Lifeline, as_user};
use super::sys::{Fail, Outcome, run, run_within, secs, wait_until};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub const PORT: u16 = 5432;
pub const REPLICATION_PASSWORD: &str = "lab-replication";
pub const APP_PASSWORD: &str = "lab-app";
/// System user that owns the clusters; the daemon becomes it.
pub const SYSTEM_USER: &str = "postgres";

/// What a person creates once on the first primary.
const FIRST_SQL: &str = "
CREATE ROLE replicator LOGIN REPLICATION PASSWORD 'lab-replication';
GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean), pg_stat_file(text, boolean), pg_read_binary_file(text),
  pg_read_binary_file(text, bigint, bigint, boolean) TO replicator;
CREATE ROLE app LOGIN PASSWORD 'lab-app';
";

/// R4: a cancel from the side ends a commit's wait for the standby.
const NO_CANCEL_SQL: &str = "REVOKE EXECUTE ON FUNCTION pg_cancel_backend(integer) FROM PUBLIC";

/// Clients come through the gate (over the socket, with the role's own secret); only replication comes by network.
/// This is the setting that docs/operations.md recommends (R7).
pub const HBA: &str = "\
local   all           postgres                    peer
local   all           all                         scram-sha-256
host    replication   replicator   192.0.2.11/32  scram-sha-256
host    replication   replicator   192.0.2.12/32  scram-sha-256
host    replication   replicator   2001:db8:2::11/128  scram-sha-256
host    replication   replicator   2001:db8:2::12/128  scram-sha-256
";

/// The newest PostgreSQL server installed the Debian way.
pub fn newest_bin_dir() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let numbers = versions.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let dirs = numbers.map(|number| (number, PathBuf::from(format!("/usr/lib/postgresql/{number}/bin"))));
    dirs.filter(|(_, dir)| dir.join("initdb").exists()).max().map(|(_, dir)| dir)
}

/// Made once per process: an empty cluster to copy, and a copy of the program on the same file system as the labs.
#[derive(Debug)]
pub struct Template {
    pub bin_dir: PathBuf,
    /// The freshly initialised cluster.
    cluster: PathBuf,
    program: PathBuf,
    owner: (u32, u32),
    _lifeline: Lifeline,
}

static TEMPLATE: OnceLock<Outcome<Template>> = OnceLock::new();

impl Template {
    pub fn once() -> Outcome<&'static Template> {
        TEMPLATE.get_or_init(Template::make).as_ref().map_err(Clone::clone)
    }

    fn make() -> Outcome<Template> {
        super::sys::install_missing_tools()?;
        super::sweep::sweep_leftovers();
        let bin_dir = newest_bin_dir().ok_or("no PostgreSQL server under /usr/lib/postgresql; install postgresql")?;
        let dir = PathBuf::from(format!("/tmp/pclab-{}-template", std::process::id()));
        let lifeline = Lifeline::new(&dir, &[])?;
        fs::create_dir(&dir)?;
        let owner = (id_of("-u")?, id_of("-g")?);
        let program = dir.join("portcullis");
        let built = built_program()?;
        fs::copy(&built, &program).map_err(|error| Fail(format!("cannot copy {}: {error}", built.display())))?;
        chown(&dir, Some(owner.0), Some(owner.1))?;
        let cluster = dir.join("cluster");
        let mut words = as_user(SYSTEM_USER);
        words.push(bin_dir.join("initdb").display().to_string());
        for word in ["--data-checksums", "--no-sync", "--encoding=UTF8", "--locale=C", "--auth=peer", "-U", "postgres"]
        {
            words.push(word.to_owned());
        }
        words.extend(["-D".to_owned(), cluster.display().to_string()]);
        run(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(Template { bin_dir, cluster, program, owner, _lifeline: lifeline })
    }

    /// Puts the program under test into a lab's folder, where user postgres can reach it. Returns its path.
    pub fn lend_program(&self, lab_dir: &Path) -> Outcome<PathBuf> {
        let there = lab_dir.join("portcullis");
        fs::hard_link(&self.program, &there)?;
        Ok(there)
    }

    /// Gives a file or directory to the system user with the mode.
    pub fn give(&self, path: &Path, mode: u32) -> Outcome {
        chown(path, Some(self.owner.0), Some(self.owner.1))?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
    }

    /// Writes a secret file that only the system user can read.
    pub fn write_secret(&self, path: &Path, text: &str) -> Outcome {
        fs::write(path, "")?;
        self.give(path, 0o600)?;
        Ok(fs::write(path, text)?)
    }
}

fn id_of(flag: &str) -> Outcome<u32> {
    Ok(run(&["id", flag, SYSTEM_USER])?.trim().parse()?)
}

/// Names the program under test where it is built otherwise than what starts it.
pub const PROGRAM_VARIABLE: &str = "LAB_PROGRAM";

/// The built program: cargo names it to tests; an example lies in a folder beside it.
fn built_program() -> Outcome<PathBuf> {
    if let Some(path) = std::env::var_os(PROGRAM_VARIABLE) {
        return Ok(PathBuf::from(path));
    }
    if let Some(path) = option_env!("CARGO_BIN_EXE_portcullis") {
        return Ok(PathBuf::from(path));
    }
    let me = std::env::current_exe()?;
    let dir = me.parent().and_then(Path::parent).ok_or("this program has no folder above its own")?;
    let path = dir.join("portcullis");
    if path.exists() { Ok(path) } else { Err(Fail(format!("{} is missing; `cargo build` makes it", path.display()))) }
}

/// One node's cluster.
#[derive(Debug, Clone)]
pub struct Cluster {
    pub data_dir: PathBuf,
    pub socket_dir: PathBuf,
    /// What the server logs, whoever started it.
    pub log: PathBuf,
    node_dir: PathBuf,
}

impl Cluster {
    /// Lays out the folders under the node's directory; no cluster yet.
    pub fn new(node_dir: &Path) -> Outcome<Cluster> {
        let template = Template::once()?;
        let cluster = Cluster {
            data_dir: node_dir.join("pg/data"),
            socket_dir: node_dir.join("sock"),
            log: node_dir.join("pglog/postgresql.log"),
            node_dir: node_dir.to_owned(),
        };
        for (name, mode) in [("pg", 0o755), ("sock", 0o755), ("pglog", 0o755)] {
            let dir = node_dir.join(name);
            fs::create_dir_all(&dir)?;
            template.give(&dir, mode)?;
        }
        Ok(cluster)
    }

    fn configure(&self, address: &str) -> Outcome {
        let text = format!(
            "listen_addresses = 'localhost, {address}'\nport = {PORT}\nunix_socket_directories = '{sock}'\n\
             max_connections = 60\nshared_buffers = 32MB\nwal_level = replica\nmax_wal_senders = 10\n\
             max_replication_slots = 10\nwal_keep_size = 512MB\nmax_wal_size = 512MB\nhot_standby = on\n\
             wal_log_hints = on\nfsync = on\npassword_encryption = 'scram-sha-256'\n\
             logging_collector = on\nlog_directory = '{log}'\nlog_filename = 'postgresql.log'\nlog_file_mode = 0644\n\
             log_rotation_age = 0\nlog_line_prefix = '%m [%p] %q%u@%d '\nlog_timezone = 'UTC'\ntimezone = 'UTC'\n",
            sock = self.socket_dir.display(),
            log = self.node_dir.join("pglog").display(),
        );
        fs::write(self.data_dir.join("postgresql.conf"), text)?;
        fs::write(self.data_dir.join("pg_hba.conf"), HBA)?;
        Ok(())
    }

    /// A new primary with the roles and the database of the lab, running.
    pub fn init_primary(&self, host: &Host) -> Outcome {
        let template = Template::once()?;
        let (from, to) = (template.cluster.display().to_string(), self.data_dir.display().to_string());
        run(&["cp", "-a", &from, &to])?;
        self.configure(host.address())?;
        self.start(host)?;
        self.sql("postgres", FIRST_SQL)?;
        // Each database has its own privileges; the first one is where databases to come are copied from.
        for database in ["template1", "postgres"] {
            self.sql(database, NO_CANCEL_SQL)?;
        }
        self.sql("postgres", "CREATE DATABASE app OWNER app").map(drop)
    }

    /// A standby of the primary, taken with pg_basebackup, running and streaming.
    pub fn init_standby_of(&self, host: &Host, primary: &Host) -> Outcome {
        let template = Template::once()?;
        let passfile = self.node_dir.join("basebackup.pass");
        template.write_secret(&passfile, &format!("*:*:*:replicator:{REPLICATION_PASSWORD}\n"))?;
        let conninfo = format!(
            "host={} port={PORT} user=replicator application_name={} passfile={}",
            primary.address(),
            host.name,
            passfile.display()
        );
        let tool = template.bin_dir.join("pg_basebackup").display().to_string();
        let data = self.data_dir.display().to_string();
        host.exec(
            SYSTEM_USER,
            &[&tool, "-d", &conninfo, "-D", &data, "-R", "-X", "stream", "-c", "fast", "--no-sync"],
        )?;
        self.configure(host.address())?;
        self.start(host)?;
        wait_until(secs(60), "the new standby to stream", || {
            Ok(self.sql("postgres", "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'")? == "1")
        })
        .map(drop)
    }

    /// `pg_ctl start`, as a PostgreSQL unit would; Debian's `pg_ctlcluster` removes a pid file that names nobody,
    /// and the sockets of a former boot went with /run.
    pub fn start(&self, host: &Host) -> Outcome {
        let runs = host.named("postgres")?.len() > 1;
        for file in [self.data_dir.join("postmaster.pid"), self.socket_dir.join(format!(".s.PGSQL.{PORT}.lock"))] {
            if !runs && file.exists() {
                fs::remove_file(&file)?;
            }
        }
        let tool = Template::once()?.bin_dir.join("pg_ctl").display().to_string();
        let data = self.data_dir.display().to_string();
        let early = self.node_dir.join("pglog/start.log").display().to_string();
        host.exec(SYSTEM_USER, &[&tool, "-D", &data, "-l", &early, "-w", "-t", "30", "-s", "start"])
            .map_err(|error| Fail(format!("{error}; {}", super::sys::tail(&self.log, 8))))
            .map(drop)
    }

    /// `pg_ctl stop -m MODE`.
    pub fn stop(&self, host: &Host, mode: &str) -> Outcome {
        let tool = Template::once()?.bin_dir.join("pg_ctl").display().to_string();
        let data = self.data_dir.display().to_string();
        host.exec(SYSTEM_USER, &[&tool, "-D", &data, "-m", mode, "-w", "-t", "30", "-s", "stop"]).map(drop)
    }

    /// SQL as the superuser over the node's socket (a socket file is reachable from every network namespace); unaligned
    /// rows, fields separated by `|`. Half a minute at most.
    pub fn sql(&self, database: &str, sql: &str) -> Outcome<String> {
        let mut words = as_user(SYSTEM_USER);
        words.push(Template::once()?.bin_dir.join("psql").display().to_string());
        let socket = self.socket_dir.display().to_string();
        for word in ["-h", &socket, "-p", &PORT.to_string(), "-U", "postgres", "-d", database, "-XAtq"] {
            words.push(word.to_owned());
        }
        words.extend(["-v", "ON_ERROR_STOP=1", "-c", sql].map(str::to_owned));
        let output = run_within(secs(30), &words.iter().map(String::as_str).collect::<Vec<_>>())?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        let error = String::from_utf8_lossy(&output.stderr);
        Err(Fail(format!("{sql:?} over {socket}: {} {}", output.status, error.trim())))
    }

    /// The postmaster's pid as seen from here.
    pub fn postmaster(&self, host: &Host) -> Outcome<i32> {
        let found = host.titled(&format!("-D {}", self.data_dir.display()))?;
        found.into_iter().next().ok_or_else(|| Fail(format!("no postmaster runs on {}", host.name)))
    }

    /// Appends a line to one of its configuration files; for the next start.
    pub fn append(&self, file: &str, line: &str) -> Outcome {
        let path = self.data_dir.join(file);
        Ok(fs::write(&path, fs::read_to_string(&path)? + line)?)
    }

    /// Puts a line before the others of a configuration file (the first rule that fits decides).
    pub fn prepend(&self, file: &str, line: &str) -> Outcome {
        let path = self.data_dir.join(file);
        Ok(fs::write(&path, line.to_owned() + &fs::read_to_string(&path)?)?)
    }

    /// Folders of former lives that a clone has set aside are deleted: a lab that clones a hundred times is short of
    /// disk.
    pub fn forget_old_lives(&self) -> Outcome {
        for entry in fs::read_dir(self.node_dir.join("pg"))?.flatten() {
            if entry.path() != self.data_dir {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// True while it is a standby, or refuses to write for another reason.
    pub fn is_read_only(&self) -> Outcome<bool> {
        Ok(self.sql("postgres", "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'")?
            == "t")
    }

    /// Numbers in the table of [`super::client::Writer`]s that the writer `id` wrote.
    pub fn numbers_of(&self, id: u32) -> Outcome<BTreeSet<u64>> {
        self.numbers_since(id, 0)
    }

    /// The same from a number on.
    pub fn numbers_since(&self, id: u32, from: u64) -> Outcome<BTreeSet<u64>> {
        let text = self.sql("app", &format!("SELECT n FROM acks WHERE w = {id} AND n >= {from}"))?;
        text.lines().map(|line| line.parse::<u64>().map_err(Fail::from)).collect()
    }
}
