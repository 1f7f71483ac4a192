//! The prober against a real PostgreSQL 15: no outage, a restart, a hang, a loss, and its two forms of output.

#![allow(clippy::unwrap_used)] // Tests and their helpers may.

use portcullis::app::probe::{Kind, ProbeArgs, Summary, run};
use portcullis::base::fault::ExitCode;
use serde_json::Value;
use std::io::Write;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio_postgres::NoTls;

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A cluster of its own in a temporary directory; it ends with this value, and with this process.
struct Postgres {
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

fn postgres_ids() -> (u32, u32) {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("user postgres");
    let words: Vec<&str> = line.split(':').collect();
    (words[2].parse().unwrap(), words[3].parse().unwrap())
}

/// As user postgres, and killed by the kernel when the test that started it dies.
fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    let rights = ["--reuid", "postgres", "--regid", "postgres", "--init-groups", "--pdeathsig", "KILL"];
    command.args(rights).arg(format!("{BIN}/{program}")).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn free_port() -> u16 {
    static NEXT: Mutex<u16> = Mutex::new(0);
    let mut next = NEXT.lock().unwrap();
    let start = 12_000 + u16::try_from(std::process::id() % 7_000).unwrap() + *next;
    let port = (start..20_000).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap();
    *next += port - start + 1;
    port
}

impl Postgres {
    fn new() -> Postgres {
        static INSTALLED: Mutex<()> = Mutex::new(());
        let guard = INSTALLED.lock().unwrap();
        if !Path::new(BIN).join("initdb").exists() {
            let install = "apt-get update && apt-get install -y --no-install-recommends postgresql-15";
            assert!(Command::new("sh").args(["-c", install]).status().unwrap().success(), "{install}");
        }
        drop(guard);
        // Not in $TMPDIR, which user postgres may not be able to enter.
        let folder = tempfile::Builder::new().prefix("portcullis-probe-").tempdir_in("/tmp").unwrap();
        let (uid, gid) = postgres_ids();
        chown(folder.path(), Some(uid), Some(gid)).unwrap();
        let data = folder.path().join("data");
        let made = as_postgres("initdb").args(["-A", "trust", "-N", "--no-instructions", "-D"]).arg(&data).status();
        assert!(made.unwrap().success());
        let mut postgres = Postgres { folder, port: free_port(), child: None };
        postgres.start();
        postgres
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let child = as_postgres("postgres")
            .arg("-D")
            .arg(self.data())
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"])
            .arg("-k")
            .arg(self.folder.path())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let ready = || {
            let status = std::fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
            status.lines().nth(7).is_some_and(|line| line.trim() == "ready")
        };
        for _ in 0..3000 {
            if ready() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        panic!("PostgreSQL does not start:\n{log}");
    }

    /// `immediate`: as a crash; sessions are killed, nothing is flushed.
    fn stop(&mut self, immediate: bool) {
        if let Some(mut child) = self.child.take() {
            let pid = rustix::process::Pid::from_child(&child);
            let how = if immediate { rustix::process::Signal::QUIT } else { rustix::process::Signal::INT };
            rustix::process::kill_process(pid, how).unwrap();
            child.wait().unwrap();
        }
    }

    fn dsn(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    async fn session(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.dsn(), NoTls).await.unwrap();
        tokio::spawn(async move { drop(connection.await) });
        client
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop(true);
    }
}

/// What the probe writes, readable while it runs.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn ticks(&self) -> Vec<Value> {
        let text = self.text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
    }

    /// Until some `good` tick was written after the first `skip` ones; gives how many there are then.
    async fn until(&self, skip: usize, good: impl Fn(&Value) -> bool) -> usize {
        for _ in 0..3000 {
            let ticks = self.ticks();
            if ticks.iter().skip(skip).any(&good) {
                return ticks.len();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("never seen:\n{}", self.text());
    }
}

/// A probe under way.
struct Running {
    out: Shared,
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<Summary, portcullis::base::fault::Fault>>,
}

fn start(postgres: &Postgres, change: impl FnOnce(&mut ProbeArgs)) -> Running {
    let mut args = ProbeArgs::new(postgres.dsn());
    args.interval = Duration::from_millis(50);
    args.json = true;
    change(&mut args);
    let out = Shared::default();
    let mut writer = out.clone();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move { run(&args, &mut writer, async { drop(stopped.await) }).await });
    Running { out, stop, task }
}

impl Running {
    async fn finish(self) -> (Summary, Shared) {
        self.stop.send(()).unwrap();
        (self.task.await.unwrap().unwrap(), self.out)
    }
}

fn acknowledged(tick: &Value) -> bool {
    tick["update"] == true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undisturbed_service_has_no_outage() {
    let postgres = Postgres::new();
    let running = start(&postgres, |args| args.duration = Some(Duration::from_secs(3)));
    let (out, task) = (running.out, running.task);
    let summary = task.await.unwrap().unwrap();
    assert!(summary.outages.is_empty(), "{}", out.text());
    assert!(summary.acknowledged >= 3, "{summary:?}");
    assert_eq!(summary.lost_writes(), Some(0));
    assert_eq!((summary.verified, summary.reconnects, summary.unknown), (summary.acknowledged, 0, 0));
    let lines = out.ticks();
    let (last, ticks) = lines.split_last().unwrap();
    assert_eq!(ticks.len() as u64, summary.ticks);
    for (index, tick) in ticks.iter().enumerate() {
        assert_eq!(tick["tick"], index + 1);
        assert_eq!(
            (&tick["health"], &tick["select"], &tick["update"]),
            (&Value::Bool(true), &true.into(), &true.into())
        );
        assert_eq!((&tick["n"], &tick["node"]), (&Value::from(index + 1), &"127.0.0.1".into()));
        assert!(tick["at"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
        assert!(tick["ms"].as_f64().unwrap() > 0.0 && tick["error"].is_null(), "{tick}");
    }
    assert_eq!((&last["summary"], &last["lost_writes"]), (&true.into(), &0.into()));
    assert_eq!(last["longest_outage_ms"], serde_json::json!({"health": 0, "select": 0, "update": 0}));
    let rows = postgres.session().await.query_one("select count(*) from portcullis_probe", &[]).await.unwrap();
    assert_eq!(u64::try_from(rows.get::<_, i64>(0)).unwrap(), summary.acknowledged);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_and_restart_is_an_outage_without_loss() {
    let mut postgres = Postgres::new();
    let running = start(&postgres, |_| {});
    let seen = running.out.until(0, acknowledged).await;
    postgres.stop(true);
    // The first failed tick only lost its session; a later one finds nobody listening.
    let refused = |tick: &Value| tick["error"].as_str().is_some_and(|error| error.contains("Connection refused"));
    let seen = running.out.until(seen, refused).await;
    postgres.start();
    running.out.until(seen, acknowledged).await;
    let (summary, out) = running.finish().await;
    for kind in Kind::ALL {
        let outage = summary.outages.iter().find(|outage| outage.kind == kind);
        assert!(outage.is_some_and(|outage| outage.ms > 0 && !outage.unfinished), "{kind:?} in {}", out.text());
    }
    assert_eq!(summary.lost_writes(), Some(0), "{}", out.text());
    assert_eq!(summary.verified, summary.acknowledged);
    assert_eq!(summary.reconnects, 1);
    let outage = summary.outages.iter().find(|outage| outage.kind == Kind::Update).unwrap();
    assert!(outage.last_before.unwrap() < outage.first_after.unwrap());
    let last = out.ticks().pop().unwrap();
    assert_eq!(last["outages"].as_array().unwrap().len(), summary.outages.len());
    assert!(last["longest_outage_ms"]["update"].as_u64().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hang_is_an_outage_and_a_cut_session_alone_is_none() {
    let postgres = Postgres::new();
    let running = start(&postgres, |_| {});
    let seen = running.out.until(0, acknowledged).await;
    let other = postgres.session().await;
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'portcullis probe'";
    other.simple_query(cut).await.unwrap();
    let seen = running.out.until(seen, |tick| tick["reconnected"] == true && acknowledged(tick)).await;
    other.batch_execute("begin; lock table portcullis_probe in share mode").await.unwrap();
    // Reads pass that lock, writes wait: an outage of updates only.
    let seen = running.out.until(seen, |tick| tick["update"] == false).await;
    other.batch_execute("rollback").await.unwrap();
    running.out.until(seen, acknowledged).await;
    let (summary, out) = running.finish().await;
    let text = out.text();
    assert!(summary.outages.iter().all(|outage| outage.kind == Kind::Update || outage.ms < 1900), "{text}");
    let outage = summary.outages.iter().find(|outage| outage.ms >= 1900).expect("the hang");
    assert_eq!(outage.kind, Kind::Update);
    assert!(text.contains("update: nothing within 2 s"), "{text}");
    assert!(summary.unknown >= 1 && summary.lost_writes() == Some(0), "{summary:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_acknowledged_write_is_found() {
    let postgres = Postgres::new();
    let running = start(&postgres, |_| {});
    running.out.until(0, |tick| acknowledged(tick) && tick["n"].as_u64() > Some(6)).await;
    let other = postgres.session().await;
    assert_eq!(other.execute("delete from portcullis_probe where n in (2, 3, 5)", &[]).await.unwrap(), 3);
    let (summary, out) = running.finish().await;
    assert_eq!(summary.lost_writes(), Some(3), "{}", out.text());
    assert_eq!(out.ticks().pop().unwrap()["missing"], serde_json::json!([2, 3, 5]));
    assert!(summary.text().contains("lost writes:         3 (numbers 2, 3, 5)"), "{}", summary.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_service_refuses_updates_and_reading_alone_leaves_nothing() {
    let postgres = Postgres::new();
    let reading = start(&postgres, |args| {
        args.read_only = true;
        args.json = false;
        args.duration = Some(Duration::from_millis(300));
    });
    let summary = reading.task.await.unwrap().unwrap();
    let text = reading.out.text();
    assert!(summary.outages.is_empty() && summary.acknowledged == 0, "{text}");
    let first = text.lines().next().unwrap();
    assert!(first.contains(" ✓ ✓ - ") && first.ends_with(" ms  127.0.0.1"), "{text}");
    assert!(text.contains("\nhealth  no outage\nselect  no outage\n") && !text.contains("lost"), "{text}");
    let other = postgres.session().await;
    let table = other.query_one("select to_regclass('portcullis_probe') is null", &[]).await.unwrap();
    assert!(table.get::<_, bool>(0), "--read-only made a table");

    other.batch_execute("alter system set default_transaction_read_only = on").await.unwrap();
    other.batch_execute("select pg_reload_conf()").await.unwrap();
    // The reload reaches sessions made after it at the latest.
    for _ in 0..1500 {
        let row = postgres.session().await.query_one("show default_transaction_read_only", &[]).await.unwrap();
        if row.get::<_, String>(0) == "on" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let running = start(&postgres, |args| args.json = false);
    tokio::time::timeout(Duration::from_secs(60), async {
        while !running.out.text().contains(" ✓ ✓ x ") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("an x");
    let (summary, out) = running.finish().await;
    assert!(
        out.text().contains("ERROR 25006: cannot execute CREATE TABLE in a read-only transaction"),
        "{}",
        out.text()
    );
    assert!(summary.refused > 0 && summary.unknown == 0 && summary.acknowledged == 0, "{summary:?}");
    assert!(out.text().contains("not over at the end"), "{}", out.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_not_make_the_table_is_told_and_a_dead_address_is_an_outage() {
    let postgres = Postgres::new();
    postgres.session().await.batch_execute("create role app login").await.unwrap();
    let dsn = format!("host=127.0.0.1 port={} user=app dbname=postgres", postgres.port);
    let fault = run(&ProbeArgs::new(dsn), &mut Vec::new(), std::future::pending()).await.unwrap_err();
    assert_eq!(fault.exit, ExitCode::Config);
    assert!(fault.text.contains("permission denied") && fault.text.contains("--read-only"), "{fault}");

    let dead = start(&postgres, |args| {
        args.dsn = format!("postgres://postgres@127.0.0.1:{}/postgres", free_port());
        args.duration = Some(Duration::from_millis(300));
    });
    let summary = dead.task.await.unwrap().unwrap();
    assert_eq!(summary.outages.len(), 3);
    assert!(summary.outages.iter().all(|outage| outage.unfinished));
    assert_eq!(summary.lost_writes(), Some(0), "nothing was acknowledged, so nothing is lost");
}
