//! What is measured: the scenarios, in the order in which they run, and how long that takes.

use crate::load::Load;
use crate::systems::{Kind, Mode, Setup, System};

/// The query of `rows`: 1,000 rows, 38 KiB as messages.
pub const ROWS_SQL: &str = "SELECT i, t FROM rows1000;\n";

/// What one scenario does with each system.
#[derive(Debug, Clone)]
pub enum Work {
    Bench(Load),
    Copy,
    Slow,
    Idle { sessions: u32, busy: u32, tls: bool },
}

#[derive(Debug, Clone)]
pub struct Scenario {
    /// Its word on the command line: `group-clients`.
    pub name: String,
    pub group: &'static str,
    pub clients: u32,
    pub setup: Setup,
    pub work: Work,
    /// Takes part in the quick run.
    pub quick: bool,
    /// Named prepared statements in transaction mode.
    pub needs_prepared: bool,
}

/// Headings of the groups.
pub const GROUPS: [(&str, &str); 12] = [
    ("select", "pgbench select-only, simple protocol, session mode"),
    ("prepared", "pgbench select-only, prepared statements, session mode"),
    (
        "tpcb",
        "pgbench tpcb-like, simple protocol, session mode, `synchronous_commit = off` (else the disk is measured)",
    ),
    ("connect", "a new connection for each select, no password, session mode"),
    ("scram", "a new connection for each select, SCRAM-SHA-256, session mode"),
    ("rows", "1,000 rows (38 KiB) a query, simple protocol, session mode"),
    ("tx-select", "pgbench select-only, simple protocol, transaction mode, 64 backends"),
    ("tx-prepared", "pgbench select-only, prepared statements, transaction mode, 64 backends"),
    ("over", "more clients than backends: select-only, simple protocol, transaction mode, 8 backends"),
    ("over-prepared", "more clients than backends: prepared statements, transaction mode, 8 backends"),
    ("bulk", "COPY out and in, and a slow reader"),
    ("idle", "idle sessions"),
];

const SESSION: Setup = Setup { mode: Mode::Session, pool: 600, tls: false };
const TRANSACTION: Setup = Setup { mode: Mode::Transaction, pool: 64, tls: false };
const OVER: Setup = Setup { mode: Mode::Transaction, pool: 8, tls: false };
const CROWD: Setup = Setup { mode: Mode::Transaction, pool: 40, tls: false };

/// All scenarios, those of one setup side by side (the daemon is restarted between setups).
pub fn scenarios(seconds: u64, quick: bool, rows_file: &str) -> Vec<Scenario> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut all = Vec::new();
    let mut bench = |group, clients, setup, line: &str, quick, (reconnect, scram, needs_prepared)| {
        let load = Load { words: words(line), clients, seconds, reconnect, scram };
        let name = format!("{group}-{clients}");
        all.push(Scenario { name, group, clients, setup, work: Work::Bench(load), quick, needs_prepared });
    };
    let plain = (false, false, false);
    let (simple, prepared) = ("-S -M simple", "-S -M prepared");
    for clients in [1, 8, 64, 500] {
        bench("select", clients, SESSION, simple, clients <= 64, plain);
    }
    for clients in [1, 8, 64, 500] {
        bench("prepared", clients, SESSION, prepared, clients == 8, plain);
    }
    bench("tpcb", 8, SESSION, "-M simple", false, plain);
    bench("connect", 8, SESSION, simple, true, (true, false, false));
    bench("scram", 8, SESSION, simple, false, (true, true, false));
    bench("rows", 4, SESSION, &format!("-M simple -f {rows_file}"), true, plain);
    for clients in [1, 8, 64, 500] {
        bench("tx-select", clients, TRANSACTION, simple, clients == 8, plain);
    }
    for clients in [1, 8, 64] {
        bench("tx-prepared", clients, TRANSACTION, prepared, clients == 8, (false, false, true));
    }
    bench("over", 32, OVER, simple, true, plain);
    bench("over-prepared", 32, OVER, prepared, false, (false, false, true));
    let mut other = |name: &str, group, clients, setup, work, quick| {
        all.push(Scenario { name: name.to_owned(), group, clients, setup, work, quick, needs_prepared: false });
    };
    other("copy", "bulk", 1, SESSION, Work::Copy, true);
    other("slow", "bulk", 1, SESSION, Work::Slow, true);
    let crowd = if quick { 2_000 } else { 10_000 };
    other("idle-session", "idle", 500, SESSION, Work::Idle { sessions: 500, busy: 0, tls: false }, true);
    other("idle", "idle", crowd, CROWD, Work::Idle { sessions: crowd, busy: 100, tls: false }, true);
    let tls = Setup { tls: true, ..CROWD };
    other("idle-tls", "idle", 2_500, tls, Work::Idle { sessions: 2_500, busy: 100, tls: true }, false);
    // Beside the others of their setup.
    all.sort_by_key(|one| SETUPS.iter().position(|setup| *setup == one.setup));
    all
}

const SETUPS: [Setup; 5] = [SESSION, TRANSACTION, OVER, CROWD, Setup { tls: true, ..CROWD }];

impl Scenario {
    /// `group`, `group-clients`, or its own name.
    pub fn is_called(&self, word: &str) -> bool {
        self.name == word || self.group == word
    }

    /// In how many of the rounds it runs.
    pub fn rounds(&self, rounds: u32) -> u32 {
        match self.work {
            Work::Bench(_) => rounds,
            Work::Copy => rounds.min(3),
            Work::Slow | Work::Idle { .. } => 1,
        }
    }

    /// Why a system takes no part, where that is known before it is asked.
    pub fn leaves_out(&self, system: &System) -> Option<&'static str> {
        let pools = !matches!(system.kind, Kind::DirectUnix | Kind::DirectTcp | Kind::Haproxy | Kind::Pgpool);
        if self.setup.mode == Mode::Transaction && !pools {
            return Some("has no transaction mode");
        }
        if self.needs_prepared && system.is_debians_pgbouncer() {
            return Some("has no prepared statements in transaction mode");
        }
        match self.work {
            Work::Slow | Work::Idle { .. } if system.is_direct() => Some("has no proxy"),
            Work::Idle { sessions, .. } if sessions > 500 && !pools => Some("needs a backend for each session"),
            _ => None,
        }
    }

    /// Seconds of one turn with one system, about.
    pub fn takes(&self, system: &System, megabytes: u64) -> u64 {
        let start = if matches!(system.kind, Kind::Pgpool) { 2 } else { 1 };
        #[allow(clippy::integer_division, reason = "an estimate")]
        match &self.work {
            Work::Bench(load) => load.seconds + load.warm_up() + start / 2,
            Work::Copy => 1 + megabytes / 100,
            Work::Slow => 9 + megabytes / 300,
            Work::Idle { sessions, busy, tls } => {
                4 + u64::from(*sessions) / if *tls { 400 } else { 1000 } + if *busy > 0 { 5 } else { 0 }
            }
        }
    }

    /// In which rounds a system takes its turn: those beside the contest only in the first two.
    pub fn turns(&self, system: &System, rounds: u32) -> u32 {
        if system.contender { self.rounds(rounds) } else { self.rounds(rounds).min(2) }
    }
}
