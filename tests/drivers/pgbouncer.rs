//! Debian's pgbouncer in transaction mode, for the comparison in docs/conformance.md.
//!
//! What it is NOT: part of `make test`.

use crate::pg::{self, Pg};
use crate::suite::Server;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// Starts one on a free port, as user postgres, before the cluster's Unix socket.
pub fn start(pg: &Pg) -> (Server, SocketAddr) {
    static NEXT: AtomicU16 = AtomicU16::new(27_000);
    // Several start at once.
    let ports = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::SeqCst)).take(1000);
    let port = ports.into_iter().find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port");
    let dir = tempfile::Builder::new().prefix("portcullis-pgbouncer-").tempdir_in("/tmp").unwrap();
    let (ini, users) = (dir.path().join("pgbouncer.ini"), dir.path().join("users"));
    std::fs::write(&users, format!("\"trusty\" \"\"\n\"app\" \"{}\"\n", pg::PASSWORD)).unwrap();
    let text = format!(
        "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 40\n\
         max_client_conn = 1000\nignore_startup_parameters = extra_float_digits\n",
        pg.socket_dir().display(),
        pg::PORT,
        users.display()
    );
    std::fs::write(&ini, text).unwrap();
    let owned = Command::new("chown").args(["-R", "postgres:postgres"]).arg(dir.path()).status().unwrap();
    assert!(owned.success());
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--", "/usr/sbin/pgbouncer", "-q"])
        .arg(&ini);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Server::Pgbouncer(command.spawn().expect("pgbouncer is installed"), dir);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    for _ in 0..100 {
        if TcpStream::connect(address).is_ok() {
            return (server, address);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("pgbouncer does not listen");
}
