//! One throw-away PostgreSQL 15, shared by whoever runs now.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

const BIN: &str = "/usr/lib/postgresql/15/bin";
pub const PORT: u16 = 5432;
pub const PASSWORD: &str = "correct horse";
/// Commits of a session that says `set synchronous_commit = on` wait for a standby that does not exist.
const CONF: &str = "
listen_addresses = ''
fsync = off
max_connections = 90
shared_buffers = 32MB
synchronous_standby_names = 'ghost'
synchronous_commit = local
";
const HBA: &str = "
local all postgres trust
local all trusty,lame,+carded trust
local all old md5
local replication streamer scram-sha-256
local all all scram-sha-256
";
const ROLES: &str = "
create role trusty login superuser;
create role lame nologin;
create role app login password 'correct horse';
create role expired login password 'correct horse' valid until '2001-01-01';
create role idle nologin password 'correct horse';
create role streamer login replication password 'correct horse';
create role bare login;
create role carded;
create role ann login in role carded;
create role retired nologin in role carded;
set password_encryption = md5;
create role old login password 'correct horse';
create database app;
";

pub struct Pg {
    dir: tempfile::TempDir,
    child: Mutex<Child>,
    pub port: u16,
}

static SHARED: Mutex<Weak<Pg>> = Mutex::new(Weak::new());

/// The cluster, started if nobody uses one.
pub fn shared() -> Arc<Pg> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let pg = Arc::new(Pg::start());
        *shared = Arc::downgrade(&pg);
        pg
    })
}

impl Pg {
    pub fn start() -> Pg {
        let pg = Pg::start_with(PORT, "", HBA);
        pg.admin(ROLES).unwrap();
        pg
    }

    /// One of its own, without the roles: on this port of its Unix socket, with more settings and these rules.
    pub fn start_with(port: u16, more: &str, hba: &str) -> Pg {
        install();
        // Not in $TMPDIR, which user postgres may not be able to enter.
        let dir = tempfile::Builder::new().prefix("portcullis-proxy-").tempdir_in("/tmp").unwrap();
        run(Command::new("chown").arg("postgres:postgres").arg(dir.path()));
        run(Command::new("chmod").arg("0711").arg(dir.path()));
        let data = dir.path().join("data");
        run(as_postgres("initdb")
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data));
        std::fs::write(data.join("pg_hba.conf"), hba).unwrap();
        let conf = format!("{CONF}{more}unix_socket_directories = '{}'\nport = {port}\n", dir.path().display());
        std::fs::write(data.join("postgresql.auto.conf"), conf).unwrap();
        let child = Mutex::new(spawn(dir.path()));
        let pg = Pg { dir, child, port };
        pg.wait_until_it_answers();
        pg
    }

    fn wait_until_it_answers(&self) {
        for _ in 0..900 {
            if self.admin("select 1").is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!(
            "PostgreSQL did not start: {}",
            std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
        );
    }

    /// Fast shutdown: sessions are ended.
    pub fn stop(&self) {
        self.signal("-INT");
    }

    pub fn start_again(&self) {
        *self.child.lock().unwrap() = spawn(self.dir.path());
        self.wait_until_it_answers();
    }

    /// Stops the postmaster from running, or lets it go on. Its backends run.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { "-STOP" } else { "-CONT" };
        run(Command::new("kill").args([signal, &self.child.lock().unwrap().id().to_string()]));
    }

    /// Sends a signal and waits for the end.
    fn signal(&self, signal: &str) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(child.try_wait(), Ok(None)) {
            run(Command::new("kill").args([signal, &child.id().to_string()]));
            // It may be frozen.
            run(Command::new("kill").args(["-CONT", &child.id().to_string()]));
            let _ = child.wait();
        }
    }

    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs SQL over the Unix socket as superuser, around the gate.
    pub fn admin(&self, sql: &str) -> Result<String, String> {
        let out = Command::new("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"])
            .arg(self.socket_dir())
            .args(["-p", &self.port.to_string(), "-d", "postgres", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                std::io::Write::write_all(&mut child.stdin.take().unwrap(), sql.as_bytes())?;
                child.wait_with_output()
            })
            .unwrap();
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into_owned())
        }
    }
}

impl Drop for Pg {
    fn drop(&mut self) {
        // Immediate shutdown: there is nothing to keep.
        self.signal("-QUIT");
    }
}

fn spawn(dir: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    as_postgres("postgres")
        .arg("-D")
        .arg(dir.join("data"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

pub fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(format!("{BIN}/{program}"));
    command.current_dir("/").env("LC_ALL", "C");
    command
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn install() {
    if !Path::new(BIN).join("initdb").exists() {
        run(Command::new("apt-get").args(["update", "-q"]));
        run(Command::new("apt-get").args(["install", "-y", "-q", "postgresql-15", "postgresql-client-15"]));
    }
}
