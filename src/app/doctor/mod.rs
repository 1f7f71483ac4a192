//! `portcullis doctor`: everything a failover will need, looked at now, each finding with its remedy.
//!
//! What it is NOT: it changes nothing and shuts no side door; whether the state of this moment is fit to serve is
//! `check`'s. Facts are gathered live in [`gather`]; every check is a pure function from facts to findings.
//!
//! | file | is |
//! |---|---|
//! | `gather` | the facts: PostgreSQL, the daemon, the DNS servers, files, ports |
//! | `side_doors` | R7: ways to PostgreSQL that do not lead through the gate |
//! | `auth` | who is let in at the gate, and whether PostgreSQL then lets the gate in |
//! | `database` | settings, roles and databases that would lose writes or keep a standby out |
//! | `pair` | daemon, peer, witness, files and units |
//! | `show` | the report as text and JSON |
//!
//! **Invariants:** what could not be checked is named with the reason, never passed over; a finding that is critical or
//! a warning makes the exit code 1, advice does not.

mod auth;
mod database;
mod gather;
mod pair;
mod show;
mod side_doors;

use crate::app::client::Target;
use crate::app::render::Style;
use crate::base::config::{Config, Node};
use crate::base::fault::{ExitCode, Fault};
use crate::io::privileges;
use std::path::Path;

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Clients can pass the gate by, writes can be lost, or a failover cannot be done.
    Critical,
    /// A failover will be slower or harder than it should, or a promise holds only half.
    Warning,
    /// Worth a thought; not counted in the exit code.
    Advice,
}

impl Level {
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Critical => "critical",
            Level::Warning => "warning",
            Level::Advice => "advice",
        }
    }
}

/// One thing found. `remedy` may hold several lines: those to be copied stand alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub level: Level,
    pub area: &'static str,
    pub text: String,
    pub remedy: String,
}

/// Everything found, and what was looked at.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub checked: Vec<String>,
    /// What could not be checked, and why.
    pub unchecked: Vec<(String, String)>,
}

impl Report {
    fn find(&mut self, level: Level, area: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.findings.push(Finding { level, area, text: text.into(), remedy: remedy.into() });
    }
    fn checked(&mut self, what: impl Into<String>) {
        self.checked.push(what.into());
    }
    fn unchecked(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.unchecked.push((what.into(), why.into()));
    }

    /// Done, or failed where something weightier than advice was found.
    pub fn exit(&self) -> ExitCode {
        if self.findings.iter().any(|finding| finding.level < Level::Advice) {
            ExitCode::Failed
        } else {
            ExitCode::Done
        }
    }
}

/// Looks, prints, and gives the exit code.
///
/// # Errors
/// There is no runtime; nothing was looked at.
pub fn run(config: &Config, node: &Node, file: &Path, json: bool) -> Result<ExitCode, Fault> {
    // While this is root: a child has no capability later.
    let wall = gather::kernel_gate(config);
    // PostgreSQL takes its admin user from its owner alone, and the files must be readable to that user, not to root.
    let owner = privileges::become_owner(&node.postgres.data_dir, &[]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fault::new(ExitCode::Failed, format!("no runtime: {error}; try again")))?;
    let target = Target::new(config, Some(node.name.clone()));
    let mut facts = runtime.block_on(gather::gather(config, node, file, &target));
    facts.kernel_gate = wall;
    if let (Err(why), Err(lost)) = (&owner, &mut facts.survey) {
        *lost = format!("{lost}; {why}");
    }
    let mut report = judge(config, node, &facts);
    report.findings.sort_by_key(|finding| finding.level);
    let text = if json {
        show::json(&report, &node.name)
    } else {
        show::text(&report, &facts, &node.name, Style::of_stdout())
    };
    super::cli::print(&text);
    Ok(report.exit())
}

/// All checks.
fn judge(config: &Config, node: &Node, facts: &gather::Facts) -> Report {
    let mut report = Report::default();
    pair::daemon(config, facts, &mut report);
    side_doors::check(config, node, facts, &mut report);
    auth::check(config, facts, &mut report);
    database::check(config, node, facts, &mut report);
    pair::witness(config, facts, &mut report);
    pair::machine(config, node, facts, &mut report);
    report
}
