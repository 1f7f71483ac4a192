//! The servers the suite runs against: BIND 9 and Knot as child processes, the embedded witness inside the test or as a
//! child.
//!
//! Each server has its own directory and port and ends with its [`Server`], also when the test fails or is killed
//! (`setpriv --pdeathsig`).

use portcullis::app::witness::{WitnessOptions, run};
use portcullis::io::dns::Authority;
use portcullis::wire::dns::{ServiceNames, TsigKey};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

pub const ZONE: &str = "example.org";
pub const NAME: &str = "db.example.org";
pub const KEY_NAME: &str = "portcullis";
pub const ALGORITHM: &str = "hmac-sha256";
/// Of no value: it exists for the time of a test.
pub const SECRET: &str = "dGhlIGdhdGUgaXMgaGVsZCB1cCBieSBhIHJvcGUhISE=";
pub const TTL: u32 = 5;
/// More than any answer over loopback needs, also on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
const START_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bind,
    Knot,
    Embedded,
}

/// A running server with the zone `example.org`, `db.example.org A 192.0.2.1`, and no marker.
pub struct Server {
    pub address: SocketAddr,
    pub directory: tempfile::TempDir,
    _running: Running,
}

enum Running {
    Child { _child: Guard },
    Inside { _stop: oneshot::Sender<()> },
}

impl Server {
    pub async fn start(kind: Kind) -> Server {
        let server = match kind {
            Kind::Bind => start_bind(),
            Kind::Knot => start_knot(),
            Kind::Embedded => {
                let directory = directory("/tmp");
                let address = free_address();
                let (stop, stopped) = oneshot::channel();
                let options = options(address, &directory.path().join("witness.zone.json"));
                tokio::spawn(async move {
                    let ended = run(options, async {
                        let _ = stopped.await;
                    });
                    ended.await.expect("the witness runs until it is told to stop");
                });
                Server { address, directory, _running: Running::Inside { _stop: stop } }
            }
        };
        answers(&server.authority()).await;
        server
    }

    /// Asks and updates as the product does.
    pub fn authority(&self) -> Authority {
        authority(self.address, NAME, Some(key()))
    }

    /// A file in the form `dig -k` and `nsupdate -k` take.
    pub fn key_file(&self) -> PathBuf {
        let path = self.directory.path().join("client.key");
        std::fs::write(&path, key_clause()).expect("a file in our own directory");
        path
    }
}

pub fn key() -> TsigKey {
    TsigKey::new(KEY_NAME, ALGORITHM, SECRET).expect("a key")
}

pub fn authority(server: SocketAddr, name: &str, key: Option<TsigKey>) -> Authority {
    let zone = if name.ends_with(ZONE) { ZONE } else { "example.net" };
    Authority::new(server, Arc::new(ServiceNames::new(zone, name).expect("names")), key.map(Arc::new))
}

/// Waits until the server gives an answer that counts.
pub async fn answers(authority: &Authority) {
    let mut last = String::new();
    let waiting = async {
        loop {
            match authority.ask(Duration::from_secs(1)).await {
                Ok(_) => return,
                Err(why) => last = why,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(START_LIMIT, waiting).await.is_err() {
        panic!("the server did not start within {START_LIMIT:?}: {last}");
    }
}

pub fn options(address: SocketAddr, store: &Path) -> WitnessOptions {
    WitnessOptions {
        listen: vec![address],
        zone: ZONE.into(),
        ns: "ns.example.org".into(),
        service_name: NAME.into(),
        ttl: Duration::from_secs(TTL.into()),
        key: key(),
        store: store.to_owned(),
        first_addresses: vec!["192.0.2.1".parse().expect("an address")],
    }
}

/// A child that is killed with its owner, and at the latest with the thread that started it.
pub struct Guard(pub Child);

impl Guard {
    pub fn spawn(command: &mut Command) -> Guard {
        Guard(command.stdin(Stdio::null()).spawn().expect("the child starts"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `command` under `setpriv`, so that the kernel kills it when the starting thread ends.
pub fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

pub fn directory(inside: &str) -> tempfile::TempDir {
    let prefix = format!("portcullis-witness-{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir_in(inside).expect("a directory")
}

/// An address on loopback whose UDP and TCP port is free, below the kernel's ephemeral ports.
pub fn free_address() -> SocketAddr {
    const FIRST: u16 = 15_000;
    const COUNT: u16 = 15_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = u16::try_from(std::process::id().wrapping_mul(37) % u32::from(COUNT)).expect("below COUNT");
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + (own + step % COUNT) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no free port");
}

/// What the tests need from the distribution; installed when it is missing.
pub fn need(program: &str, package: &str) {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let there = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
    if there {
        return;
    }
    println!("installing {package}");
    for arguments in [&["update"][..], &["install", "-y", "--no-install-recommends", package]] {
        let status = Command::new("apt-get")
            .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .status()
            .expect("apt-get runs");
        assert!(status.success(), "apt-get {arguments:?} failed");
    }
}

fn key_clause() -> String {
    format!("key \"{KEY_NAME}\" {{ algorithm {ALGORITHM}; secret \"{SECRET}\"; }};\n")
}

fn start_bind() -> Server {
    need("named", "bind9");
    // Where Debian's AppArmor profile lets named write.
    let directory = directory("/var/cache/bind");
    let path = directory.path();
    let address = free_address();
    let port = address.port();
    let config = format!(
        "options {{ directory \"{0}\"; listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }}; \
         recursion no; dnssec-validation no; notify no; allow-transfer {{ none; }}; pid-file none; \
         session-keyfile none; }};\n\
         controls {{ }};\n{1}zone \"{ZONE}\" {{ type primary; file \"{0}/zone.db\"; \
         allow-update {{ key \"{KEY_NAME}\"; }}; }};\n",
        path.display(),
        key_clause(),
    );
    std::fs::write(path.join("named.conf"), config).expect("named.conf");
    std::fs::write(path.join("zone.db"), zone_text()).expect("zone.db");
    let log = std::fs::File::create(path.join("named.log")).expect("named.log");
    let mut command = mortal("/usr/sbin/named");
    command.args(["-g", "-n", "2", "-c"]).arg(path.join("named.conf"));
    command.stdout(Stdio::null()).stderr(log);
    Server { address, _running: Running::Child { _child: Guard::spawn(&mut command) }, directory }
}

fn zone_text() -> String {
    format!(
        "$ORIGIN {ZONE}.\n$TTL {TTL}\n@ IN SOA ns.{ZONE}. hostmaster.{ZONE}. 1 3600 600 604800 {TTL}\n\
         @ IN NS ns.{ZONE}.\nns IN A 127.0.0.1\n{NAME}. IN A 192.0.2.1\n"
    )
}

/// Knot takes an update only with an `acl` that names the key and the action.
fn start_knot() -> Server {
    need("knotd", "knot");
    let directory = directory("/tmp");
    let path = directory.path();
    let address = free_address();
    let config = format!(
        "server:\n    rundir: \"{0}\"\n    listen: 127.0.0.1@{1}\n    udp-workers: 1\n    tcp-workers: 2\n\
         log:\n  - target: stderr\n    any: info\n\
         database:\n    storage: \"{0}\"\n\
         key:\n  - id: {KEY_NAME}\n    algorithm: {ALGORITHM}\n    secret: {SECRET}\n\
         acl:\n  - id: updates\n    key: {KEY_NAME}\n    action: update\n\
         zone:\n  - domain: {ZONE}\n    storage: \"{0}\"\n    file: zone.db\n    acl: updates\n",
        path.display(),
        address.port(),
    );
    std::fs::write(path.join("knot.conf"), config).expect("knot.conf");
    std::fs::write(path.join("zone.db"), zone_text()).expect("zone.db");
    let log = std::fs::File::create(path.join("knot.log")).expect("knot.log");
    let mut command = mortal("/usr/sbin/knotd");
    command.arg("-c").arg(path.join("knot.conf")).stdout(Stdio::null()).stderr(log);
    Server { address, _running: Running::Child { _child: Guard::spawn(&mut command) }, directory }
}
