//! `--fix`: the remedies that cannot hurt, each after a question (or with `--yes`), each told.
//!
//! What it is NOT: it restarts nothing, edits no file's content, and changes nothing on another node. What is here:
//! secret files closed to others; the replication role made, and given what `pg_rewind` executes, on the primary.

use super::{Report, gather};
use crate::base::config::{Config, Node};
use crate::base::fault::{ExitCode, Fault};
use crate::base::time::Duration;
use crate::io::postgres::Cluster;
use std::io::IsTerminal;
use std::os::unix::fs::PermissionsExt;

const ROLE_LIMIT: Duration = Duration::from_secs(10);
const OTHERS: u32 = 0o007;

/// Asks for and does what can be done here; how many remedies were carried out.
///
/// # Errors
/// There is no terminal to ask on, and `--yes` was not given; nothing was changed.
pub(super) fn apply(config: &Config, node: &Node, report: &Report, yes: bool) -> Result<usize, Fault> {
    let here = |check: &str| report.findings.iter().any(|f| f.check == check && f.node == node.name.as_str());
    let secrets = gather::open_secrets(config);
    let role = here("rejoin.grants") || (here("repl.role") && is_missing(report));
    if secrets.is_empty() && !role {
        say("nothing to fix here that is harmless; the remedies above are yours");
        return Ok(0);
    }
    if !yes && !std::io::stdin().is_terminal() {
        let text = "--fix asks on a terminal, and this is none; nothing was changed: say --yes to answer beforehand";
        return Err(Fault::new(ExitCode::Failed, text));
    }
    let mut done = 0;
    for place in secrets {
        let (path, mode) = (place.path.display(), place.mode & !OTHERS);
        if !agreed(yes, &format!("chmod {mode:04o} {path} (it has {:04o})?", place.mode)) {
            continue;
        }
        match std::fs::set_permissions(&place.path, PermissionsExt::from_mode(mode)) {
            Ok(()) => {
                say(&format!("fixed: {path} has mode {mode:04o} now"));
                done += 1;
            }
            Err(error) => say(&format!("not fixed: {path}: {error}; run doctor --fix as root")),
        }
    }
    let user = &config.replication.user;
    if role && agreed(yes, &format!("make the role {user} if it is missing, and grant it what pg_rewind executes?")) {
        match super::as_owner(node, |runtime, _| runtime.block_on(make_role(config, node)))? {
            Ok(()) => {
                say(&format!("fixed: the role {user} is there, with what pg_rewind executes"));
                done += 1;
            }
            Err(why) => say(&format!("not fixed: {why}")),
        }
    }
    Ok(done)
}

fn is_missing(report: &Report) -> bool {
    report.findings.iter().any(|finding| finding.check == "repl.role" && finding.text.starts_with("there is no role"))
}

async fn make_role(config: &Config, node: &Node) -> Result<(), String> {
    let cluster = Cluster::from_config(config, node).map_err(|error| error.to_string())?;
    let survey = cluster.survey(ROLE_LIMIT).await.map_err(|error| error.to_string())?;
    if survey.in_recovery {
        return Err("PostgreSQL here is a standby; run doctor --fix on the active node".to_owned());
    }
    cluster.ensure_replication_role(ROLE_LIMIT).await.map_err(|error| error.to_string())
}

fn agreed(yes: bool, question: &str) -> bool {
    yes || dialoguer::Confirm::new().with_prompt(question).default(false).interact().unwrap_or(false)
}

/// On standard error: standard output is the report's.
fn say(text: &str) {
    eprintln!("portcullis: {text}");
}
