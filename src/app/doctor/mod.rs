//! `portcullis doctor`: everything a failover will need, looked at now on every node, each finding with its remedy.
//!
//! ```text
//! here    facts of this node, gathered live -> pure checks -> report
//! others  the same question to each other node's daemon, which runs this very program with --here
//! pair    the sheets of both side by side: identity, versions, configuration, clocks, drills
//! ```
//!
//! What it is NOT: it shuts no side door, and changes nothing but what `--fix` is for ([`fix`]); whether the state of
//! this moment is fit to serve is `check`'s.
//!
//! | file | is |
//! |---|---|
//! | `checks` | every check's id, why it is there, and what a finding means for a failover |
//! | `gather`, `others` | the facts of this node; the other nodes asked, and their clocks |
//! | `examine` | the daemon's side of that question |
//! | `side_doors` | R7: ways to PostgreSQL that do not lead through the gate |
//! | `auth` | who is let in at the gate, and whether PostgreSQL then lets the gate in |
//! | `database`, `replication` | settings, roles and databases; what a standby, a clone and a rewind need |
//! | `names`, `host`, `pair` | the witness and caches; this machine; daemon, files and units |
//! | `sheet`, `compare` | what a node tells of itself, and what two nodes must have in common |
//! | `fix`, `show` | the harmless remedies; the report as text and JSON |
//!
//! **Invariants:** what could not be checked is named with the reason, never passed over; a finding that is critical or
//! a warning makes the exit code 1, advice does not; every question has a limit, and all nodes are asked at once.

mod auth;
mod checks;
mod compare;
mod database;
mod examine;
mod fix;
mod gather;
mod host;
mod names;
mod others;
mod pair;
mod replication;
mod sheet;
mod show;
mod side_doors;

pub use examine::{Asked, Examiner, Said};

use crate::app::client::Target;
use crate::app::render::Style;
use crate::base::config::{Config, Node};
use crate::base::fault::{ExitCode, Fault};
use crate::io::privileges;
use serde::{Deserialize, Serialize};
use sheet::Sheet;
use std::path::Path;

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whose it is; for what two nodes have in common the node that `doctor` ran on.
    #[serde(default)]
    pub node: String,
    /// One of [`checks::CHECKS`].
    pub check: String,
    #[serde(rename = "severity")]
    pub level: Level,
    #[serde(rename = "what")]
    pub text: String,
    pub remedy: String,
}

/// Everything found, and what was looked at.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub checked: Vec<String>,
    /// What could not be checked, and why.
    pub unchecked: Vec<(String, String)>,
}

impl Report {
    fn find(&mut self, level: Level, check: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        debug_assert!(checks::of(check).is_some(), "{check} is no check of the table");
        let (text, remedy) = (text.into(), remedy.into());
        self.findings.push(Finding { node: String::new(), check: check.to_owned(), level, text, remedy });
    }
    fn checked(&mut self, what: impl Into<String>) {
        self.checked.push(what.into());
    }
    fn unchecked(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.unchecked.push((what.into(), why.into()));
    }

    /// Gives every finding that has no node yet to this one.
    fn belongs_to(&mut self, node: &str) {
        self.findings.iter_mut().filter(|finding| finding.node.is_empty()).for_each(|f| f.node = node.to_owned());
    }

    /// Takes another node's report in.
    fn take_in(&mut self, node: &str, mut other: Report) {
        other.belongs_to(node);
        self.findings.append(&mut other.findings);
        self.checked.extend(other.checked.into_iter().map(|what| format!("{node}: {what}")));
        self.unchecked.extend(other.unchecked.into_iter().map(|(what, why)| (format!("{node}: {what}"), why)));
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

/// How it was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    pub json: bool,
    /// This node alone.
    pub here: bool,
    pub fix: bool,
    /// `--fix` asks nothing.
    pub yes: bool,
    /// For another node's `doctor`: report and sheet as one JSON text.
    pub for_peer: bool,
}

/// One look at everything.
struct Look {
    facts: gather::Facts,
    report: Report,
    /// This node's first.
    sheets: Vec<Sheet>,
}

/// Looks, prints, and gives the exit code.
///
/// # Errors
/// There is no runtime; nothing was looked at.
pub fn run(config: &Config, node: &Node, file: &Path, options: Options) -> Result<ExitCode, Fault> {
    let mut look = look(config, node, file, options)?;
    if options.for_peer {
        super::cli::print(&examine::answer(look.report, look.sheets.pop().unwrap_or_default()));
        return Ok(ExitCode::Done);
    }
    if options.fix {
        let shown = show::text(&look.report, &look.facts, &look.sheets, node, Style::of_stdout());
        if !options.json {
            super::cli::print(&shown);
        }
        if fix::apply(config, node, &look.report, options.yes)? == 0 {
            return Ok(look.report.exit());
        }
        look = self::look(config, node, file, options)?;
    }
    let text = if options.json {
        show::json(&look.report, &look.sheets, node)
    } else {
        show::text(&look.report, &look.facts, &look.sheets, node, Style::of_stdout())
    };
    super::cli::print(&text);
    Ok(look.report.exit())
}

fn look(config: &Config, node: &Node, file: &Path, options: Options) -> Result<Look, Fault> {
    // While this is root: a child has no capability later.
    let wall = gather::kernel_gate(config);
    let quiet = options.json || options.for_peer;
    let target = Target::new(config, Some(node.name.clone()));
    let (mut facts, others) = as_owner(node, |runtime, owner| {
        let progress = show::Progress::new(quiet);
        let here = gather::gather(config, node, file, &target, &progress);
        let others = others::ask(config, node, options.here || options.for_peer, &progress);
        let (mut facts, others) = runtime.block_on(async { tokio::join!(here, others) });
        progress.end();
        if let (Err(why), Err(lost)) = (&owner, &mut facts.survey) {
            *lost = format!("{lost}; {why}");
        }
        (facts, others)
    })?;
    facts.kernel_gate = wall;
    let mut report = judge(config, node, &facts);
    let own = Sheet::of(config, node, &facts);
    if options.for_peer {
        return Ok(Look { facts, report, sheets: vec![own] });
    }
    let me = node.name.as_str();
    let mut sheets = vec![own];
    for other in others {
        compare::clocks(config, &other, &mut report);
        match other.examined {
            Ok(mut examined) => {
                compare::pair(config, &sheets[0], &examined.sheet, &mut report);
                report.belongs_to(me);
                let told = |check: &str| report.findings.iter().any(|finding| finding.check == check);
                examined.report.findings.retain(|f| !(compare::TWICE.contains(&f.check.as_str()) && told(&f.check)));
                report.take_in(other.name.as_str(), examined.report);
                sheets.push(examined.sheet);
            }
            Err(why) => compare::unasked(&other.name, &why, &mut report),
        }
    }
    if !options.here {
        compare::drill(config, &sheets, crate::io::clock::wall(), &mut report);
    }
    report.belongs_to(me);
    compare::once(&sheets, &mut report);
    report.findings.sort_by(|a, b| (a.level, a.node != me, &a.node).cmp(&(b.level, b.node != me, &b.node)));
    Ok(Look { facts, report, sheets })
}

/// Does `work` on a thread that is the owner of the data directory: PostgreSQL takes its admin user from its owner
/// alone, and the files must be readable to that user, not to root. This thread stays who it is.
fn as_owner<T: Send>(
    node: &Node,
    work: impl FnOnce(&tokio::runtime::Runtime, Result<(), String>) -> T + Send,
) -> Result<T, Fault> {
    let failed = |why: String| Fault::new(ExitCode::Failed, format!("no runtime: {why}; try again"));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let owner = privileges::become_owner(&node.postgres.data_dir, &[]);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map(|runtime| work(&runtime, owner)).map_err(|error| failed(error.to_string()))
        });
        thread.join().unwrap_or_else(|_| Err(failed("its thread ended".to_owned())))
    })
}

/// All checks of this node.
fn judge(config: &Config, node: &Node, facts: &gather::Facts) -> Report {
    let mut report = Report::default();
    pair::daemon(config, facts, &mut report);
    side_doors::check(config, node, facts, &mut report);
    auth::check(config, facts, &mut report);
    database::check(config, node, facts, &mut report);
    replication::check(config, node, facts, &mut report);
    names::check(config, facts, &mut report);
    pair::files(facts, &mut report);
    pair::units(config, facts, &mut report);
    host::check(config, node, facts, &mut report);
    report
}
