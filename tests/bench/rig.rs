//! The machine the bench runs on: one node of the lab (namespaces, the embedded witness, PostgreSQL 15, the daemon),
//! made ready for load. Every system under test and every client runs inside it, so that all take the same way.
//!
//! The standby plays no part: replication is asynchronous and the second machine is switched on but empty.

use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::host::as_user;
use crate::harness::postgres::{PORT, SYSTEM_USER, Template};
use crate::harness::sys::{Fail, Outcome, in_netns, run, run_within, secs};
use crate::harness::witness::Kind;
use std::fs;
use std::path::{Path, PathBuf};

/// The role of every load without a password, and its database.
pub const USER: &str = "bench";
/// The role that logs in with SCRAM-SHA-256, everywhere.
pub const SCRAM_USER: &str = "loginer";
pub const SCRAM_PASSWORD: &str = "bench-scram";
pub const DATABASE: &str = "bench";
/// 500 sessions through a system without a pool, with room for those that are still ending.
const MAX_CONNECTIONS: u32 = 1300;

const ROLES_SQL: &str = "
CREATE ROLE bench LOGIN SUPERUSER;
CREATE ROLE loginer LOGIN PASSWORD 'bench-scram';
";

/// What PostgreSQL has on top of the lab's own settings. Everything fits in memory, and nothing waits for the disk but
/// what a scenario wants to wait for it.
fn settings() -> String {
    format!(
        "max_connections = {MAX_CONNECTIONS}\nshared_buffers = 1GB\nmax_wal_size = 8GB\ncheckpoint_timeout = 1h\n\
         autovacuum = off\nsynchronous_commit = off\nlog_min_messages = fatal\nlog_checkpoints = off\n\
         listen_addresses = '127.0.0.1'\n"
    )
}

/// The node, PostgreSQL running; no daemon yet.
#[derive(Debug)]
pub struct Rig {
    pub lab: Lab,
    /// Belongs to user postgres: configurations, logs and per-transaction logs of the bench.
    pub dir: PathBuf,
    /// The node's configuration file without `[pool]`, and without TLS.
    base_config: String,
    /// The programs of PostgreSQL.
    bin_dir: PathBuf,
}

impl Rig {
    /// Builds the node, starts PostgreSQL and the witness, and fills the pgbench tables.
    pub fn new(scale: u32) -> Outcome<Rig> {
        let options = Options {
            nodes: ["alp", "midna"],
            witness: Kind::Embedded,
            mode: "asynchronous",
            lease: "5s",
            margin: "500ms",
            ..Options::new("bench")
        };
        let lab = Lab::new(options)?;
        let template = Template::once()?;
        let dir = lab.dir.join("bench");
        fs::create_dir(&dir)?;
        template.give(&dir, 0o755)?;
        lab.witness.start()?;
        let (host, postgres) = (&lab.a.host, &lab.a.postgres);
        postgres.init_primary(host)?;
        postgres.append("postgresql.conf", &settings())?;
        postgres.prepend(
            "pg_hba.conf",
            "local all loginer scram-sha-256\nhost all loginer 127.0.0.1/32 scram-sha-256\n\
             local all bench trust\nhost all bench 127.0.0.1/32 trust\n",
        )?;
        postgres.stop(host, "fast")?;
        postgres.start(host)?;
        postgres.sql("postgres", ROLES_SQL)?;
        postgres.sql("postgres", "CREATE DATABASE bench OWNER bench")?;
        fs::write(lab.dir.join("hba.conf"), "host all loginer all scram-sha-256\nhost all all all trust\n")?;
        // More than enough ports for a client that connects anew for each transaction.
        in_netns(lab.a.ns(), || Ok(fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10240 64999")?))
            .or_else(|_| run(&["ip", "netns", "exec", lab.a.ns(), "sysctl", "-qw", PORTS]).map(drop))?;
        let base_config = fs::read_to_string(&lab.a.config)?;
        let rig = Rig { dir, base_config, bin_dir: template.bin_dir.clone(), lab };
        let socket = rig.socket_dir().display().to_string();
        let fill = ["-i", "-q", "-n", "-I", "dtgvp", "-s", &scale.to_string(), "-h", &socket, "-U", USER, DATABASE];
        rig.pgbench_tool(&fill)?;
        rig.sql("VACUUM ANALYZE")?;
        rig.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO loginer")?;
        Ok(rig)
    }

    pub fn socket_dir(&self) -> &Path {
        &self.lab.a.postgres.socket_dir
    }

    pub fn program(&self, name: &str) -> String {
        self.bin_dir.join(name).display().to_string()
    }

    fn pgbench_tool(&self, words: &[&str]) -> Outcome {
        let mut line = as_user(SYSTEM_USER);
        line.push(self.program("pgbench"));
        line.extend(words.iter().map(|word| (*word).to_owned()));
        let output = run_within(secs(120), &line.iter().map(String::as_str).collect::<Vec<_>>())?;
        if output.status.success() {
            return Ok(());
        }
        Err(Fail(format!("pgbench {words:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }

    /// SQL in the bench's database as its superuser, directly; five minutes at most.
    pub fn sql(&self, sql: &str) -> Outcome<String> {
        let (socket, port) = (self.socket_dir().display().to_string(), PORT.to_string());
        let psql = self.program("psql");
        let mut line = as_user(SYSTEM_USER);
        let words = [&psql, "-h", &socket, "-p", &port, "-U", USER, "-d", DATABASE, "-XAtq", "-v", "ON_ERROR_STOP=1"];
        line.extend(words.iter().map(|word| (*word).to_owned()));
        line.extend(["-c".to_owned(), sql.to_owned()]);
        let output = run_within(secs(300), &line.iter().map(String::as_str).collect::<Vec<_>>())?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        Err(Fail(format!("{sql:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }

    /// The role's secret as pgbouncer's file of users has it.
    pub fn scram_secret(&self) -> Outcome<String> {
        self.sql("SELECT rolpassword FROM pg_authid WHERE rolname = 'loginer'")
    }

    /// Writes the node's configuration with these tables at its end and these lines in `[auth]`.
    pub fn configure_node(&self, auth: &str, tables: &str) -> Outcome {
        let hba = "hba.conf\"\n";
        let text = self.base_config.replacen(hba, &format!("{hba}{auth}"), 1) + "\n" + tables;
        Ok(fs::write(&self.lab.a.config, text)?)
    }

    /// A file in the bench's folder that belongs to user postgres and to nobody else.
    pub fn write(&self, name: &str, text: &str) -> Outcome<String> {
        let path = self.dir.join(name);
        Template::once()?.write_secret(&path, text)?;
        Ok(path.display().to_string())
    }
}

const PORTS: &str = "net.ipv4.ip_local_port_range=10240 64999";
