//! The systems under test: how each is configured and started, and what it cannot do.
//!
//! All of them reach PostgreSQL over its Unix socket, listen on 127.0.0.1 in the node's namespace, run as user
//! postgres, log no connection, and have their own defaults for all that is not written here.

use crate::harness::host::{as_user, is_alive, send};
use crate::harness::node::GATE_PORT;
use crate::harness::postgres::{PORT, SYSTEM_USER};
use crate::harness::sys::{Fail, Outcome, in_netns, secs, tail, wait_until};
use crate::rig::{DATABASE, Rig, SCRAM_PASSWORD, SCRAM_USER, USER};
use crate::usage::tree;
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Who gives a client its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Session,
    Transaction,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Session => "session",
            Mode::Transaction => "transaction",
        }
    }
}

/// What a scenario wants of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    pub mode: Mode,
    /// Backends at most.
    pub pool: u32,
    /// Client side TLS is offered.
    pub tls: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    DirectUnix,
    DirectTcp,
    Pgbouncer(PathBuf),
    Haproxy,
    Pgpool,
    Portcullis,
}

#[derive(Debug, Clone)]
pub struct System {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    port: u16,
    /// Measured in every round; the others in the first two.
    pub contender: bool,
}

/// A system that serves.
#[derive(Debug)]
pub struct Running {
    /// A folder for a Unix socket, else an address.
    pub host: String,
    pub port: u16,
    /// Its first process, as seen from here; none where there is no proxy.
    pub pid: Option<i32>,
    /// Ended with it.
    own: bool,
}

impl Running {
    /// PostgreSQL itself over its socket.
    pub fn direct(rig: &Rig) -> Running {
        Running { host: rig.socket_dir().display().to_string(), port: PORT, pid: None, own: false }
    }

    pub fn address(&self) -> Outcome<SocketAddr> {
        Ok(format!("{}:{}", self.host, self.port).parse()?)
    }
}

/// Those that are installed, in the order of the tables.
pub fn all(bench_dir: &Path) -> Outcome<Vec<System>> {
    let system = |name: &str, version: String, kind, port, contender| System {
        name: name.to_owned(),
        version,
        kind,
        port,
        contender,
    };
    let mut all = vec![
        system("direct-unix", String::new(), Kind::DirectUnix, PORT, false),
        system("direct", String::new(), Kind::DirectTcp, PORT, true),
    ];
    let newest = bench_dir.join("pgbouncer-1.25.2/pgbouncer");
    let has_newest = newest.exists();
    let debian = PathBuf::from("/usr/sbin/pgbouncer");
    if has_newest {
        all.push(system("pgbouncer", version(&newest, "--version")?, Kind::Pgbouncer(newest), 6501, true));
    } else {
        println!("bench: the newer pgbouncer was not built; Debian's is what ratios are taken against");
    }
    let name = if has_newest { "pgbouncer-debian" } else { "pgbouncer" };
    all.push(system(name, version(&debian, "--version")?, Kind::Pgbouncer(debian), 6502, !has_newest));
    all.push(system("haproxy", version(Path::new("/usr/sbin/haproxy"), "-v")?, Kind::Haproxy, 6503, false));
    all.push(system("pgpool", version(Path::new("/usr/sbin/pgpool"), "--version")?, Kind::Pgpool, 6504, false));
    all.push(system("portcullis", env!("CARGO_PKG_VERSION").to_owned(), Kind::Portcullis, GATE_PORT, true));
    Ok(all)
}

/// The first line a program says of itself.
fn version(program: &Path, flag: &str) -> Outcome<String> {
    let output = Command::new(program).arg(flag).output();
    let output = output.map_err(|error| Fail(format!("{}: {error}; packaging/bench.sh", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

impl System {
    pub fn is_direct(&self) -> bool {
        matches!(self.kind, Kind::DirectUnix | Kind::DirectTcp)
    }

    pub fn is_debians_pgbouncer(&self) -> bool {
        matches!(&self.kind, Kind::Pgbouncer(program) if program.starts_with("/usr"))
    }

    /// Why it takes no part in a setup, if so. Nothing is left out without a line.
    pub fn refuses(&self, rig: &Rig, setup: Setup) -> Outcome<Option<String>> {
        Ok(match &self.kind {
            Kind::DirectUnix | Kind::DirectTcp | Kind::Haproxy | Kind::Pgpool if setup.mode == Mode::Transaction => {
                Some("has no transaction mode".to_owned())
            }
            Kind::Portcullis => {
                self.configure_portcullis(rig, setup)?;
                let said = rig.lab.a.cli(&["check-config"])?;
                (said.code != 0).then(|| format!("not built: {}", said.err.trim().replace('\n', "; ")))
            }
            _ => None,
        })
    }

    /// Starts it for so many clients and waits until it takes connections. The daemon keeps running from one turn to
    /// the next.
    pub fn start(&self, rig: &Rig, setup: Setup, clients: u32) -> Outcome<Running> {
        let local = |pid, own| Running { host: "127.0.0.1".to_owned(), port: self.port, pid, own };
        let words = match &self.kind {
            Kind::DirectUnix => return Ok(Running::direct(rig)),
            Kind::DirectTcp => return Ok(local(None, false)),
            Kind::Portcullis => return Ok(local(Some(rig.lab.a.daemon_pid()?), false)),
            Kind::Pgbouncer(program) => self.pgbouncer(rig, program, setup)?,
            Kind::Haproxy => self.haproxy(rig)?,
            Kind::Pgpool => self.pgpool(rig, clients)?,
        };
        let log = rig.dir.join(format!("{}.log", self.name));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let pid = rig.lab.a.host.spawn(&log, &[], &words)?;
        let running = local(Some(pid), true);
        let door = running.address()?;
        let ready = wait_until(secs(15), &format!("{} to listen", self.name), || {
            if !is_alive(pid) {
                return Err(Fail("it ended".to_owned()));
            }
            in_netns(rig.lab.a.ns(), || Ok(TcpStream::connect(door).is_ok()))
        });
        if let Err(error) = ready {
            running.end();
            return Err(Fail(format!("{error}; its log: {}", tail(&log, 5))));
        }
        Ok(running)
    }

    fn pgbouncer(&self, rig: &Rig, program: &Path, setup: Setup) -> Outcome<Vec<String>> {
        let users = format!("\"{USER}\" \"\"\n\"{SCRAM_USER}\" \"{}\"\n", rig.scram_secret()?);
        let users = rig.write("users.txt", &users)?;
        let hba =
            rig.write("pgbouncer-hba.conf", &format!("host all {SCRAM_USER} 127.0.0.1/32 scram-sha-256\n{TRUST_HBA}"))?;
        let tls = if setup.tls {
            format!(
                "client_tls_sslmode = allow\nclient_tls_cert_file = {dir}/tls.pem\n\
                 client_tls_key_file = {dir}/tls.key\n",
                dir = rig.dir.display()
            )
        } else {
            String::new()
        };
        let text = format!(
            "[databases]\n{DATABASE} = host={socket} port={PORT}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = hba\nauth_hba_file = {hba}\nauth_file = {users}\n\
             pool_mode = {mode}\nmax_client_conn = 12000\ndefault_pool_size = {pool}\nlog_connections = 0\n\
             log_disconnections = 0\n{tls}",
            socket = rig.socket_dir().display(),
            port = self.port,
            mode = setup.mode.name(),
            pool = setup.pool,
        );
        let file = rig.write(&format!("{}.ini", self.name), &text)?;
        // A copy that user postgres can reach, wherever the build lies.
        let copy = rig.dir.join(&self.name);
        if !copy.exists() {
            std::fs::copy(program, &copy)?;
        }
        Ok(as_postgres(&[&copy.display().to_string(), "-q", &file]))
    }

    fn haproxy(&self, rig: &Rig) -> Outcome<Vec<String>> {
        let text = format!(
            "global\n  maxconn 4000\n\
             defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
             frontend bench\n  bind 127.0.0.1:{}\n  default_backend postgres\nbackend postgres\n  \
             server local unix@{}/.s.PGSQL.{PORT}\n",
            self.port,
            rig.socket_dir().display()
        );
        let file = rig.write("haproxy.cfg", &text)?;
        Ok(as_postgres(&["haproxy", "-db", "-q", "-f", &file]))
    }

    fn pgpool(&self, rig: &Rig, clients: u32) -> Outcome<Vec<String>> {
        let dir = rig.dir.display();
        let users = rig.write("pool_passwd", &format!("{SCRAM_USER}:TEXT{SCRAM_PASSWORD}\n"))?;
        let hba =
            rig.write("pool_hba.conf", &format!("host all {SCRAM_USER} 127.0.0.1/32 scram-sha-256\n{TRUST_HBA}"))?;
        let text = format!(
            "backend_clustering_mode = 'streaming_replication'\nlisten_addresses = '127.0.0.1'\nport = {port}\n\
             socket_dir = '{dir}'\npcp_socket_dir = '{dir}'\npcp_listen_addresses = ''\nwd_ipc_socket_dir = '{dir}'\n\
             backend_hostname0 = '{socket}'\nbackend_port0 = {PORT}\nbackend_weight0 = 1\n\
             backend_flag0 = 'ALWAYS_PRIMARY|DISALLOW_TO_FAILOVER'\nnum_init_children = {children}\nmax_pool = 1\n\
             enable_pool_hba = on\npool_passwd = '{users}'\nload_balance_mode = off\nsr_check_period = 0\n\
             health_check_period = 0\nuse_watchdog = off\nlisten_backlog_multiplier = 2\n\
             pid_file_name = '{dir}/pgpool.pid'\nlogdir = '{dir}'\nwork_dir = '{dir}'\nlog_min_messages = error\n",
            port = self.port,
            socket = rig.socket_dir().display(),
            children = clients + 8,
        );
        let file = rig.write("pgpool.conf", &text)?;
        let pcp = rig.write("pcp.conf", "")?;
        // Its semaphores and shared memory go with the IPC namespace, however it ends.
        let mut words = vec!["unshare".to_owned(), "--ipc".to_owned()];
        words.extend(as_postgres(&["pgpool", "-n", "-f", &file, "-a", &hba, "-F", &pcp]));
        Ok(words)
    }

    /// Writes the node's configuration: a size that is not built yet is left out where it bounds nothing.
    fn configure_portcullis(&self, rig: &Rig, setup: Setup) -> Outcome {
        let tls = if setup.tls {
            format!("tls_cert_file = \"{dir}/tls.pem\"\ntls_key_file = \"{dir}/tls.key\"\n", dir = rig.dir.display())
        } else {
            String::new()
        };
        let pool = |size: &str| {
            let clients = "max_clients = 11000\n";
            rig.configure_node(&tls, &format!("[pool]\nmode = \"{}\"\n{clients}{size}", setup.mode.name()))
        };
        pool(&format!("size = {}\n", setup.pool))?;
        if setup.mode == Mode::Session && rig.lab.a.cli(&["check-config"])?.code != 0 {
            pool("")?;
        }
        Ok(())
    }

    /// (Re)starts the daemon with the configuration that [`System::refuses`] has written, until it is active.
    pub fn restart_portcullis(rig: &Rig) -> Outcome {
        let node = &rig.lab.a;
        if node.daemon_pid().is_ok() {
            node.stop_daemon()?;
        }
        node.start_daemon()?;
        // Its peer is not there to agree, so a person has to say so; refused until the daemon has seen PostgreSQL.
        let mut said = String::new();
        let served = wait_until(secs(60), "the daemon to serve", || {
            if !node.gate_is_open()? {
                let promoted = node.cli(&["promote", "--yes", "--accept-data-loss"])?;
                said = promoted.out + &promoted.err;
            }
            node.gate_is_open()
        });
        served.map(drop).map_err(|error| Fail(format!("{error}; {said}")))
    }
}

/// Addresses spelled out: Debian's pgbouncer knows no `all` there.
const TRUST_HBA: &str = "host all all 127.0.0.1/32 trust\n";

fn as_postgres(words: &[&str]) -> Vec<String> {
    let mut line = as_user(SYSTEM_USER);
    line.extend(words.iter().map(|word| (*word).to_owned()));
    line
}

impl Running {
    /// Ends what [`System::start`] started.
    pub fn end(self) {
        let Some(pid) = self.pid.filter(|_| self.own) else { return };
        for pid in tree(pid) {
            let _ = send(pid, Signal::KILL);
        }
        let _ = wait_until(secs(5), "a system under test to end", || Ok(!is_alive(pid)));
    }
}
