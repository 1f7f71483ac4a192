//! A gate in a process of its own: the real proxy, always open. Its death is a finding, its memory its own.
//!
//! What it is NOT: no daemon; nothing here guards, nothing shuts.

use crate::front::{Front, Setup, shut_with};
use crate::pg;
use portcullis::base::config::{Pool, PoolMode};
use portcullis::serve::tls::{self, TlsAcceptor};
use std::io::{BufRead, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// The hour outlives every run.
const OPEN_FOR: Duration = Duration::from_secs(3600);
const MAX_CLIENTS: u32 = 1000;
/// Who may come in how; pgbouncer's too, where it is compared.
pub const HBA: &str = "host all trusty,lowly 127.0.0.1/32 trust\nhost all all all scram-sha-256\n";

/// How a gate pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Session,
    Transaction,
}

impl Mode {
    pub const ALL: &'static [Mode] = &[Mode::Session, Mode::Transaction];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Session => "session",
            Mode::Transaction => "transaction",
        }
    }

    fn from_name(name: &str) -> Mode {
        [Mode::Session, Mode::Transaction].into_iter().find(|mode| mode.name() == name).expect("a mode")
    }

    /// The one place where the proxy hears of the mode.
    fn setup(self, tls: Option<TlsAcceptor>) -> Setup {
        let mode = match self {
            Mode::Session => PoolMode::Session,
            Mode::Transaction => PoolMode::Transaction,
        };
        Setup {
            hba: HBA,
            tls,
            max_clients: MAX_CLIENTS,
            pool: Pool { mode, threads: 2, ..Pool::default() },
            ..Setup::default()
        }
    }
}

/// A running gate's process. Dropping ends it.
pub struct Gate {
    pub address: SocketAddr,
    child: Mutex<Child>,
    pid: u32,
}

impl Gate {
    /// Starts this very program as a gate; with TLS it has PostgreSQL's own certificate.
    pub fn start(socket_dir: &Path, mode: Mode, tls: bool) -> Gate {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("gate")
            .arg(socket_dir)
            .arg(mode.name())
            .arg(if tls { "tls" } else { "plain" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().parse().expect("the gate's process says where it listens");
        Gate { address, pid: child.id(), child: Mutex::new(child) }
    }

    /// It still runs: it has not panicked.
    pub fn is_alive(&self) -> bool {
        matches!(self.child.lock().unwrap().try_wait(), Ok(None))
    }

    /// The most memory it ever had resident since [`Gate::forget_peak`], in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("the gate's process runs");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5").unwrap();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// What the gate's process does: `gate SOCKET_DIR MODE tls|plain`, until its standard input closes.
pub fn serve(arguments: &[String]) {
    let [socket_dir, mode, tls] = arguments else { panic!("gate SOCKET_DIR MODE tls|plain") };
    // A test profile unwinds; the product aborts. A panic in any task shall be seen.
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(info);
        std::process::abort();
    }));
    let file = |name: &str| Path::new(socket_dir).join(name);
    let load = || tls::load(&file("server.crt"), &file("server.key"), None).expect("a certificate");
    let acceptor = (tls == "tls").then(load);
    pg::borrow(Path::new(socket_dir));
    let mode = Mode::from_name(mode);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let front: Front = runtime.block_on(async {
        let front = shut_with(mode.setup(acceptor)).await;
        front.extend(OPEN_FOR);
        front.wait_for_door().await;
        front
    });
    println!("{}", front.address);
    // The parent's death closes it too.
    let _ = std::io::stdin().read(&mut [0; 1]);
    // Sessions are dropped with the runtime; waiting for them would prove nothing.
    std::process::exit(0);
}
