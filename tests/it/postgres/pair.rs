//! Real PostgreSQL for one test: the test binary runs itself again as user `postgres`, in a directory of its own, and
//! both processes see to it that nothing is left behind.

use portcullis::base::config::{NodePostgres, Secret};
use portcullis::io::clock;
use portcullis::io::postgres::{Cluster, Peer, ReplicationAccess, slot_name};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use std::fs;
use std::future::Future;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub const BIN: &str = "/usr/lib/postgresql/15/bin";
/// Names the inner process's directory; its presence tells the inner process from the outer one.
const BASE_VARIABLE: &str = "PORTCULLIS_PG_TEST_BASE";
/// The inner process is killed after this long.
const TEST_LIMIT: Duration = Duration::from_secs(400);
/// Any single thing a test waits for.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Needs escaping in a passfile, and is unmistakable in a log.
pub const PASSWORD: &str = r"s3cr:et\of-the-test";

/// Runs `body` as user postgres with a directory of its own.
pub fn as_postgres<F: Future<Output = ()>>(name: &str, body: impl FnOnce(Base) -> F) {
    as_postgres_on(name, &[], body);
}

/// The same with file systems of their own at `mounts`, each a directory below the test's and a size.
pub fn as_postgres_on<F: Future<Output = ()>>(name: &str, mounts: &[(&str, &str)], body: impl FnOnce(Base) -> F) {
    match std::env::var_os(BASE_VARIABLE) {
        Some(dir) => inner(PathBuf::from(dir), body),
        None => outer(name, mounts),
    }
}

fn inner<F: Future<Output = ()>>(dir: PathBuf, body: impl FnOnce(Base) -> F) {
    // Orphaned postmasters become our children, and zombies until the end: as under a PID 1 that does not reap.
    set_child_subreaper(Some(getpid())).expect("subreaper");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let base = Base { dir };
    let _sweep_at_the_end_also_after_a_panic = Sweep(base.dir.clone());
    runtime.block_on(body(base));
}

fn outer(name: &str, mounts: &[(&str, &str)]) {
    install();
    set_child_subreaper(Some(getpid())).expect("subreaper");
    // Short: a socket's path has at most 107 bytes.
    static TESTS: AtomicU32 = AtomicU32::new(0);
    let number = TESTS.fetch_add(1, Ordering::Relaxed);
    let dir = PathBuf::from(format!("/tmp/portcullis-pg-{}-{number}", std::process::id()));
    fs::create_dir(&dir).expect("mkdir");
    let _remove = Remove(dir.clone());
    let (uid, gid) = postgres_ids();
    chown(&dir, Some(uid), Some(gid)).expect("chown");
    let binary = dir.join("test");
    fs::copy(std::env::current_exe().expect("exe"), &binary).expect("copy");
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("chmod");
    let _sweep = Sweep(dir.clone());
    // What it says is printed here, so that it stands beside the name of a test that fails.
    let said = dir.join("said");
    let out = fs::File::create(&said).expect("file");
    // They are gone with the last process that sees them.
    let mut script = String::new();
    for (sub, size) in mounts {
        let at = dir.join(sub);
        let (at, options) = (at.display(), format!("size={size},mode=700,uid={uid},gid={gid}"));
        script += &format!("setpriv --reuid {uid} --regid {gid} --clear-groups mkdir -p {at} && ");
        script += &format!("mount -t tmpfs -o {options} none {at} && ");
    }
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", &format!("{script}exec \"$@\""), "sh", "setpriv"])
        .args(["--reuid", "postgres", "--regid", "postgres", "--init-groups", "--pdeathsig", "KILL"])
        .arg(&binary)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(BASE_VARIABLE, &dir)
        .env("HOME", "/var/lib/postgresql")
        .current_dir("/")
        .stdout(out.try_clone().expect("dup"))
        .stderr(out)
        .spawn()
        .expect("setpriv");
    let begun = clock::now();
    let status = loop {
        let status = child.try_wait().expect("wait");
        if status.is_some() || clock::now().since(begun) > TEST_LIMIT {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    println!("{}", String::from_utf8_lossy(&fs::read(&said).expect("what it said")));
    let status = status.unwrap_or_else(|| panic!("the test as user postgres did not end within {TEST_LIMIT:?}"));
    assert!(status.success(), "the test as user postgres failed: {status}");
}

fn install() {
    if Path::new(BIN).join("postgres").exists() {
        return;
    }
    for arguments in [&["update"][..], &["install", "-y", "postgresql-15"]] {
        let done = Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status();
        assert!(done.is_ok_and(|status| status.success()), "apt-get {arguments:?} failed");
    }
}

fn postgres_ids() -> (u32, u32) {
    let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
    let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("user postgres");
    let mut fields = line.split(':').skip(2).map(|field| field.parse().expect("number"));
    (fields.next().expect("uid"), fields.next().expect("gid"))
}

struct Remove(PathBuf);
impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Kills and reaps every process that works in the directory, which only this test's do.
struct Sweep(PathBuf);
impl Drop for Sweep {
    fn drop(&mut self) {
        let begun = clock::now();
        while clock::now().since(begun) < Duration::from_secs(30) {
            let left = working_in(&self.0);
            for pid in &left {
                let _ = kill_process(*pid, Signal::KILL);
            }
            let zombies = zombies_of_ours();
            for pid in &zombies {
                let _ = waitpid(Some(*pid), WaitOptions::NOHANG);
            }
            if left.is_empty() && zombies.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn pids() -> impl Iterator<Item = Pid> {
    let names = fs::read_dir("/proc").expect("proc").flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).filter_map(Pid::from_raw)
}

fn working_in(dir: &Path) -> Vec<Pid> {
    pids()
        .filter(|pid| {
            fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).is_ok_and(|cwd| cwd.starts_with(dir))
        })
        .collect()
}

/// Dead postmasters and backends that were handed to this process.
fn zombies_of_ours() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let is_ours = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        let Some((head, rest)) = stat.rsplit_once(')') else { return false };
        let mut fields = rest.split_whitespace();
        head.ends_with("(postgres") && fields.next() == Some("Z") && fields.next() == Some(&own)
    };
    pids().filter(is_ours).collect()
}

/// The directory of one test.
pub struct Base {
    pub dir: PathBuf,
}

/// How many ports one node looks through for a free one.
const PORT_TRIES: u16 = 500;

fn free_port(name: &str) -> u16 {
    let seed = std::process::id().wrapping_mul(7).wrapping_add(name.bytes().map(u32::from).sum::<u32>() * 131);
    let first = 20_000 + u16::try_from(seed % 11_000).expect("small");
    (first..first + PORT_TRIES).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

impl Base {
    /// A node without a cluster yet.
    pub fn node(&self, name: &str) -> Arc<Cluster> {
        let dir = self.dir.join(name);
        for sub in ["state", "s"] {
            fs::create_dir_all(dir.join(sub)).expect("mkdir");
        }
        Arc::new(Cluster {
            node: name.parse().expect("node name"),
            settings: NodePostgres {
                host: "127.0.0.1".into(),
                port: free_port(name),
                socket_dir: dir.join("s"),
                data_dir: dir.join("data"),
                bin_dir: BIN.into(),
                start: None,
                stop: None,
            },
            admin_user: "postgres".into(),
            state_dir: dir.join("state"),
            replication: ReplicationAccess {
                user: "replicator".into(),
                password: Some(Secret::new(PASSWORD.as_bytes().to_vec())),
                conninfo: "connect_timeout=5".into(),
                slots: true,
            },
        })
    }

    /// A node with a running primary, its role included.
    pub async fn primary(&self, name: &str) -> Arc<Cluster> {
        let node = self.node(name);
        let data = &node.settings.data_dir;
        let made = Command::new(format!("{BIN}/initdb"))
            .args(["-U", "postgres", "--auth-local=peer", "--auth-host=scram-sha-256", "-N", "-D"])
            .arg(data)
            .output()
            .expect("initdb");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut conf = fs::read_to_string(data.join("postgresql.conf")).expect("conf");
        conf += &format!(
            "\nport = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nfsync = off\n\
             shared_buffers = 16MB\nlog_statement = all\nlog_connections = on\nwal_sender_timeout = 60s\n",
            node.settings.port,
            node.settings.socket_dir.display()
        );
        fs::write(data.join("postgresql.conf"), conf).expect("conf");
        let mut hba = fs::read_to_string(data.join("pg_hba.conf")).expect("hba");
        hba += "\nhost replication replicator 127.0.0.1/32 scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), hba).expect("hba");
        node.start(LIMIT).await.expect("start");
        node.ensure_replication_role(LIMIT).await.expect("role");
        node
    }

    /// A primary `alp` and its streaming standby `midna`, made by a clone.
    pub async fn pair(&self) -> (Arc<Cluster>, Arc<Cluster>) {
        let alp = self.primary("alp").await;
        let midna = self.node("midna");
        clone(&midna, &alp).await;
        midna.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;
        (alp, midna)
    }
}

/// `standby` as a fresh copy of `primary`, not started; gives where the old directory went.
pub async fn clone(standby: &Cluster, primary: &Cluster) -> Option<PathBuf> {
    primary.ensure_slot(&slot_name(&standby.node), LIMIT).await.expect("slot");
    let facts = primary.source_facts(LIMIT).await.expect("facts");
    standby.clone_from(&peer(primary), &facts, &mut |_| {}).await.expect("clone")
}

pub fn peer(node: &Cluster) -> Peer {
    Peer { name: node.node.clone(), host: node.settings.host.clone(), port: node.settings.port }
}

/// A client's session over the socket.
pub async fn client(node: &Cluster) -> tokio_postgres::Client {
    let mut config = tokio_postgres::Config::new();
    config.host_path(&node.settings.socket_dir).port(node.settings.port).user("postgres").dbname("postgres");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("connect");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    client
}

/// The first column of the first row; empty when there is none.
pub async fn sql(node: &Cluster, text: &str) -> String {
    let messages = client(node).await.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    let rows = messages.into_iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    });
    rows.unwrap_or_default()
}

/// Waits until `ask` says yes.
pub async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let begun = clock::now();
    while !ask().await {
        assert!(clock::now().since(begun) < LIMIT, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until `standby` streams from `primary`.
pub async fn wait_streaming(primary: &Cluster, standby: &str) {
    let text = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = '{standby}' \
         AND flush_lsn IS NOT NULL"
    );
    until("streaming", || async { sql(primary, &text).await == "1" }).await;
}

/// The pid that a query tells.
pub async fn pid(node: &Cluster, text: &str) -> Pid {
    Pid::from_raw(sql(node, text).await.parse().expect("pid")).expect("pid")
}

pub fn postmaster(node: &Cluster) -> Pid {
    let text = fs::read_to_string(node.settings.data_dir.join("postmaster.pid")).expect("pid file");
    Pid::from_raw(text.lines().next().expect("line").parse().expect("pid")).expect("pid")
}

pub fn send(pid: Pid, signal: Signal) {
    kill_process(pid, signal).expect("signal");
}
