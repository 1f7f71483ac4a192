//! What a suite is, what it is run against, and what is kept of it: one outcome per test.
//!
//! What it is NOT: it judges nothing; `main.rs` compares.

use crate::gate::{Gate, Mode};
use crate::pg::Pg;
use futures_util::future::BoxFuture;
use std::any::Any;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What clients connect to.
pub enum Server {
    /// PostgreSQL itself, over loopback.
    Direct,
    Gate(Gate, Mode),
    /// For the comparison in docs/conformance.md only.
    Pgbouncer(Child, #[expect(dead_code, reason = "removed with it")] tempfile::TempDir),
}

pub struct Target {
    pub server: Server,
    pub address: SocketAddr,
    /// A database of its own.
    pub database: String,
    pub pg: Arc<Pg>,
}

impl Target {
    pub fn name(&self) -> &'static str {
        match &self.server {
            Server::Direct => "direct",
            Server::Gate(_, mode) => mode.name(),
            Server::Pgbouncer(..) => "pgbouncer",
        }
    }

    pub fn gate(&self) -> Option<&Gate> {
        if let Server::Gate(gate, _) = &self.server { Some(gate) } else { None }
    }

    /// Seconds within which a notification is heard. Where backends are shared it never is, and waiting is for nothing.
    pub fn patience(&self) -> u32 {
        let is_shared = matches!(&self.server, Server::Gate(_, Mode::Transaction) | Server::Pgbouncer(..));
        if is_shared { 4 } else { 40 }
    }

    /// For programs that use libpq or read its variables: a superuser without a password.
    pub fn environment(&self, command: &mut Command) {
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.address.port().to_string());
        command.env("PGUSER", "trusty").env("PGDATABASE", &self.database);
        command.env("PGSSLMODE", "disable").env("PGCONNECT_TIMEOUT", "50");
        command.env("TARGET", self.name()).env("APP_PASSWORD", crate::pg::PASSWORD);
        command.env("PATIENCE", self.patience().to_string());
        // The way around the gate: user postgres is let in here without a password.
        command.env("AROUND", self.pg.socket_dir()).env("CERTIFICATE", self.pg.socket_dir().join("server.crt"));
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Server::Pgbouncer(child, _) = &mut self.server {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed(String),
    Skipped,
}

/// The outcomes so far; a suite that is ended half-way leaves what it had.
#[derive(Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<String, Outcome>>>);

impl Board {
    /// A test that reports twice has failed if one of them did.
    pub fn put(&self, test: &str, outcome: Outcome) {
        let mut all = self.0.lock().unwrap();
        match all.get(test) {
            Some(Outcome::Failed(_)) => {}
            _ => drop(all.insert(test.to_owned(), outcome)),
        }
    }

    pub fn take(&self) -> BTreeMap<String, Outcome> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A test written here, in Rust.
pub struct Case {
    pub name: &'static str,
    pub limit: Duration,
    pub run: fn(Arc<Target>) -> BoxFuture<'static, ()>,
}

/// `case!(module::function)`, a minute (that of a hang, not of a busy machine), or more where said.
macro_rules! case {
    ($function:path) => {
        case!($function, 60)
    };
    ($function:path, $seconds:expr) => {
        $crate::suite::Case {
            name: stringify!($function),
            limit: std::time::Duration::from_secs($seconds),
            run: |target| Box::pin($function(target)),
        }
    };
}
pub(crate) use case;

pub enum Kind {
    /// A program that prints `ok TEST`, `not ok TEST: why` or `skip TEST`, a line each.
    /// By hand it takes the names of tests to run those alone.
    Program(fn(&Target) -> Command),
    Cases(fn() -> Vec<Case>),
}

pub struct Suite {
    pub name: &'static str,
    /// For one target; what has not ended by then has failed.
    pub limit: Duration,
    /// As many must pass directly, or the suite itself is broken.
    pub at_least: usize,
    /// Every test of it must pass directly.
    pub ours: bool,
    /// Its tests make databases and roles under fixed names: every run has a cluster of its own.
    pub apart: bool,
    /// Before PostgreSQL, too, stands something that speaks TLS.
    pub tls: bool,
    pub kind: Kind,
}

impl Suite {
    /// Runs all tests against one target.
    pub fn run(&self, target: &Arc<Target>, board: &Board) {
        match &self.kind {
            Kind::Program(command) => crate::program::run(command(target), self.limit, board),
            Kind::Cases(cases) => run_cases(&cases(), target, board),
        }
    }
}

/// The name of the threads that run cases.
const CASES: &str = "cases";

/// A case that panics is an outcome, in transaction mode often the right one, which the summary tells: a line of where
/// it was is enough, and thirty of backtrace hide what matters. All other panics are shown as ever.
pub fn shorten_panics() {
    let as_ever = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() != Some(CASES) {
            return as_ever(panic);
        }
        let text = words_of(panic.payload());
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        eprintln!("a case ended at {place}: {:.200}", text.lines().next().unwrap_or_default());
    }));
}

/// One after another: some measure memory.
fn run_cases(cases: &[Case], target: &Arc<Target>, board: &Board) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).thread_name(CASES).enable_all().build().unwrap();
    for case in cases {
        let (limit, running) = (case.limit, (case.run)(Arc::clone(target)));
        let task = runtime.spawn(async move { tokio::time::timeout(limit, running).await });
        let outcome = match runtime.block_on(task) {
            Ok(Ok(())) => Outcome::Passed,
            Ok(Err(_)) => Outcome::Failed(format!("hangs: not over within {} s", case.limit.as_secs())),
            Err(error) => Outcome::Failed(why(error)),
        };
        board.put(case.name, outcome);
    }
    runtime.shutdown_background();
}

fn why(error: tokio::task::JoinError) -> String {
    error.try_into_panic().map_or_else(|_| "was cancelled".to_owned(), |panic| words_of(&*panic))
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
