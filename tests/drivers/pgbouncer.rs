//! pgbouncer in transaction mode, for `--compare` (docs/conformance.md): the one that `packaging/bench.sh` builds.
//!
//! Its settings are its defaults but for what the comparison needs: the gate's number of backends, and clients enough.
//! What it is NOT: part of `make test`.

use crate::pg::{self, Pg};
use crate::suite::Server;
use portcullis::base::config::Pool;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// That of packaging/bench.sh.
const VERSION: &str = "1.25.2";

/// The program, or where it would be.
fn program() -> PathBuf {
    crate::program::target_folder().join("bench").join(format!("pgbouncer-{VERSION}/pgbouncer"))
}

/// Ends this process with what to do where it was not built.
pub fn must_be_there() {
    if !program().exists() {
        eprintln!("{} is not there: packaging/bench.sh builds it", program().display());
        std::process::exit(2);
    }
}

/// What its first line of `--version` says.
pub fn version() -> String {
    let out = Command::new(program()).arg("--version").output().expect("pgbouncer runs");
    String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned()
}

/// Starts one on a free port, as user postgres, before the cluster's Unix socket.
pub fn start(pg: &Pg, tls: bool) -> (Server, SocketAddr) {
    static NEXT: AtomicU16 = AtomicU16::new(27_000);
    // Several start at once.
    let ports = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::SeqCst)).take(1000);
    let port = ports.into_iter().find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port");
    let dir = tempfile::Builder::new().prefix("portcullis-pgbouncer-").tempdir_in("/tmp").unwrap();
    let (ini, users, program_here) = (dir.path().join("ini"), dir.path().join("users"), dir.path().join("pgbouncer"));
    // It authenticates as the gate does in these suites: trust for the first two, SCRAM for the rest.
    let hba = dir.path().join("hba");
    std::fs::write(&hba, crate::gate::HBA).unwrap();
    std::fs::write(&users, format!("\"trusty\" \"\"\n\"lowly\" \"\"\n\"app\" \"{}\"\n", pg::PASSWORD)).unwrap();
    let mut text = format!(
        "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         unix_socket_dir =\nauth_type = hba\nauth_hba_file = {}\nauth_file = {}\npool_mode = transaction\n\
         default_pool_size = {}\nmax_client_conn = 1000\n\
         ignore_startup_parameters = extra_float_digits\nlogfile = {}\n",
        pg.socket_dir().display(),
        pg::PORT,
        hba.display(),
        users.display(),
        Pool::default().size,
        dir.path().join("log").display(),
    );
    if tls {
        // Those of PostgreSQL, which its user may read.
        let file = |name: &str| pg.socket_dir().join(name).display().to_string();
        let (key, certificate) = (file("server.key"), file("server.crt"));
        text +=
            &format!("client_tls_sslmode = allow\nclient_tls_key_file = {key}\nclient_tls_cert_file = {certificate}\n");
    }
    std::fs::write(&ini, text).unwrap();
    // User postgres may not be able to enter the folder that it was built in.
    std::fs::copy(program(), &program_here).unwrap();
    let owned = Command::new("chown").args(["-R", "postgres:postgres"]).arg(dir.path()).status().unwrap();
    assert!(owned.success());
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(program_here).arg("-q").arg(&ini);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server::Pgbouncer(command.spawn().expect("pgbouncer starts"), dir);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    for _ in 0..200 {
        if TcpStream::connect(address).is_ok() {
            return (server, address);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("pgbouncer does not listen");
}
