//! The one PostgreSQL 15 cluster behind all suites: on a Unix socket for the gates, on loopback for the direct runs.
//!
//! It has the interface of `tests/it/proxy/pg.rs`, so that `front.rs` of the proxy's tests serves here too. What it is
//! NOT: it is never shared between runs, and a gate's process only borrows it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const BIN: &str = "/usr/lib/postgresql/15/bin";
/// The port in the name of the socket that gates use; loopback has a free one.
pub const PORT: u16 = 5432;
pub const PASSWORD: &str = "correct horse";
const CONF: &str = "
listen_addresses = '127.0.0.1'
fsync = off
full_page_writes = off
max_connections = 300
shared_buffers = 64MB
max_wal_size = 4GB
jit = off
autovacuum = off
ssl = on
";
/// The same ways in for gates (local) and direct runs (host).
const HBA: &str = "
local all postgres,trusty,lowly trust
local all all scram-sha-256
host all postgres,trusty,lowly 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
";
const ROLES: &str = "
create role trusty login superuser;
create role lowly login;
create role app login password 'correct horse';
create database app;
";

pub struct Pg {
    dir: PathBuf,
    /// On loopback; where it is borrowed, that in the name of its socket.
    pub port: u16,
    owned: Option<(tempfile::TempDir, Child)>,
}

static SHARED: OnceLock<Arc<Pg>> = OnceLock::new();

/// The cluster of this process; started or borrowed before.
pub fn shared() -> Arc<Pg> {
    Arc::clone(SHARED.get().expect("a cluster"))
}

/// Makes a running cluster this process's.
pub fn borrow(dir: &Path) {
    let pg = Pg { dir: dir.to_owned(), port: PORT, owned: None };
    assert!(SHARED.set(Arc::new(pg)).is_ok(), "one cluster only");
}

impl Pg {
    pub fn start() -> Pg {
        // Not in $TMPDIR, which user postgres may not be able to enter.
        let dir = tempfile::Builder::new().prefix("portcullis-drivers-").tempdir_in("/tmp").unwrap();
        run(Command::new("chown").arg("postgres:postgres").arg(dir.path()));
        run(Command::new("chmod").arg("0711").arg(dir.path()));
        let data = dir.path().join("data");
        run(as_postgres("initdb")
            .args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-D"])
            .arg(&data));
        std::fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        certify(dir.path(), &data);
        let port = free_port();
        let conf = format!("{CONF}unix_socket_directories = '{}'\nport = {port}\n", dir.path().display());
        std::fs::write(data.join("postgresql.auto.conf"), conf).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = as_postgres("postgres")
            .arg("-D")
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let socket = |port: u16| dir.path().join(format!(".s.PGSQL.{port}"));
        std::os::unix::fs::symlink(socket(port), socket(PORT)).unwrap();
        let pg = Pg { dir: dir.path().to_owned(), port, owned: Some((dir, child)) };
        for _ in 0..300 {
            if pg.admin("select 1").is_ok() {
                pg.admin(ROLES).unwrap();
                return pg;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("PostgreSQL did not start: {}", std::fs::read_to_string(pg.dir.join("log")).unwrap_or_default());
    }

    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Runs SQL over the Unix socket as superuser, around every gate.
    pub fn admin(&self, sql: &str) -> Result<String, String> {
        let out = Command::new("psql")
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h"])
            .arg(&self.dir)
            .args(["-p", &PORT.to_string(), "-d", "postgres", "-f", "-"])
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
        if let Some((_, child)) = &mut self.owned {
            // Immediate shutdown: there is nothing to keep.
            run(Command::new("kill").args(["-QUIT", &child.id().to_string()]));
            let _ = child.wait();
        }
    }
}

/// One certificate for PostgreSQL and all that stands before it: `server.crt` and `server.key`, there and here.
fn certify(dir: &Path, data: &Path) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    for (name, text) in [("server.crt", made.cert.pem()), ("server.key", made.signing_key.serialize_pem())] {
        for place in [dir, data] {
            let file = place.join(name);
            std::fs::write(&file, &text).unwrap();
            run(Command::new("chmod").arg("0600").arg(&file));
            run(Command::new("chown").arg("postgres:postgres").arg(&file));
        }
    }
}

/// Below the ephemeral range, free now, not given out before.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let offset = u16::try_from(std::process::id() % 6000).unwrap() + 7 * NEXT.fetch_add(1, Ordering::SeqCst);
    let mut ports = (0..6000).map(|n| 14_000 + (offset + n) % 6000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    // It dies with the thread that started it, however that ends.
    command
        .args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=QUIT", "--"])
        .arg(format!("{BIN}/{program}"));
    command.current_dir("/").env("LC_ALL", "C");
    command
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}
