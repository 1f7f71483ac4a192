//! Programs outside: `service.units` through `systemctl`, `fence.stonith`, `notify.command` and sendmail, and what
//! `doctor` asks of systemd and nft.
//!
//! What it is NOT: it decides nothing and keeps no state. Every call is bounded; a caller that drops it kills the
//! client program, never the unit's job in systemd.

use crate::base::ids::NodeName;
use crate::base::time::Duration;
use crate::io::postgres::tool::{self, Output};

/// A unit may take so long to start or stop; systemd's own default is 90 s.
const UNIT_LIMIT: Duration = Duration::from_secs(95);
/// Handing a job to systemd without waiting for it.
const ENQUEUE_LIMIT: Duration = Duration::from_secs(5);
/// A management board that answers slowly, and a machine that powers off.
const STONITH_LIMIT: Duration = Duration::from_secs(85);
/// What to do where polkit says no.
const POLKIT: &str = "; the daemon's user may not: install polkitd, copy polkit-units.rules from \
    /usr/share/doc/portcullis/examples to /etc/polkit-1/rules.d and name the units there";
/// What stands for the node's name in `fence.stonith`.
const NODE_WORD: &str = "{node}";

/// Starts or stops the units and waits until they are.
///
/// # Errors
/// What systemctl said, in one line.
pub async fn units(units: &[String], start: bool) -> Result<(), String> {
    if !start {
        // The jobs are systemd's before anything is waited for: a daemon that is ending must not take them with it.
        let _told_below = systemctl(&["stop", "--no-block", "--"], units, ENQUEUE_LIMIT).await;
    }
    let verb = if start { "start" } else { "stop" };
    systemctl(&[verb, "--"], units, UNIT_LIMIT).await
}

async fn systemctl(words: &[&str], units: &[String], limit: Duration) -> Result<(), String> {
    let mut command = tool::command("systemctl");
    command.arg("--no-ask-password").args(words).args(units);
    let output = tool::run(command, "systemctl", limit).await.map_err(|error| error.to_string())?;
    if output.ok {
        return Ok(());
    }
    let why = output.complaint();
    let denied = ["authentication required", "Access denied"].iter().any(|words| why.contains(words));
    Err(format!("systemctl: {why}{}", if denied { POLKIT } else { "" }))
}

/// Runs `fence.stonith` for `node`; `Ok` means that it is surely off.
///
/// # Errors
/// What the command said, or that it did not end in time.
pub async fn stonith(words: &[String], node: &NodeName) -> Result<(), String> {
    let mut words = words.iter().map(|word| word.replace(NODE_WORD, node.as_str()));
    let Some(program) = words.next() else { return Err("fence.stonith is empty".to_owned()) };
    let mut command = tool::command(&program);
    command.args(words);
    let output = tool::run(command, &program, STONITH_LIMIT).await.map_err(|error| error.to_string())?;
    said(output, &program)
}

/// Runs a program of the administrator's with `input` on its standard input: no shell, its own process group, killed
/// with all of it at `limit`. What it printed, for the log.
///
/// # Errors
/// It could not be started, ended with another exit code than 0, or did not end in time; in one line.
pub async fn tell(words: &[String], input: &[u8], limit: Duration) -> Result<String, String> {
    let Some((program, words)) = words.split_first() else { return Err("there is no program to run".to_owned()) };
    let mut command = tool::command(program);
    command.args(words);
    let output = tool::run_with_input(command, program, Some(input), limit).await;
    // What `tool` says of a program that is missing is about PostgreSQL's.
    let output = output.map_err(|error| error.to_string().replace("; check bin_dir of this node", ""))?;
    let printed = format!("{}{}", output.out, output.err);
    said(output, program).map(|()| printed)
}

/// Runs this very program, whatever has become of its file, and returns what it printed; its exit code says nothing
/// about that.
///
/// # Errors
/// It could not be started, did not end in time, or printed nothing.
pub async fn ourselves(words: &[std::ffi::OsString], limit: Duration) -> Result<String, String> {
    let mut command = tool::command("/proc/self/exe");
    command.arg0("portcullis").args(words);
    let output = tool::run(command, "portcullis", limit).await.map_err(|error| error.to_string())?;
    if output.out.trim().is_empty() { Err(output.last_line()) } else { Ok(output.out) }
}

/// Is systemd the service manager of this machine (sd_booted(3))?
pub fn has_systemd() -> bool {
    std::path::Path::new("/run/systemd/system").is_dir()
}

/// What systemd knows of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitFacts {
    pub name: String,
    /// `loaded`, `not-found`, `masked`, ...
    pub load: String,
    /// `enabled`, `disabled`, `static`, ...; empty where systemd has no word for it.
    pub file: String,
}

/// Asks systemd about units; none: an empty list, nobody asked.
///
/// # Errors
/// What systemctl said, in one line.
pub async fn unit_facts(units: &[String]) -> Result<Vec<UnitFacts>, String> {
    let mut facts = Vec::new();
    for name in units {
        let mut command = tool::command("systemctl");
        command.args(["show", "--property=LoadState,UnitFileState", "--"]).arg(name);
        let output = tool::run(command, "systemctl", ENQUEUE_LIMIT).await.map_err(|error| error.to_string())?;
        let of = |key: &str| {
            let value = output.out.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            value.unwrap_or_default().to_owned()
        };
        let (load, file) = (of("LoadState"), of("UnitFileState"));
        said(output, "systemctl")?;
        facts.push(UnitFacts { name: name.clone(), load, file });
    }
    Ok(facts)
}

/// Does the table of `fence.kernel_gate` stand? Needs CAP_NET_ADMIN, so it is asked before any right is given up.
///
/// # Errors
/// nft is not there, or not allowed to look.
pub fn kernel_gate_stands() -> Result<bool, String> {
    // No runtime yet, so the limit is another program's.
    let mut command = std::process::Command::new("/usr/bin/timeout");
    command
        .args(["-k", "1", "5", "/usr/sbin/nft", "list", "tables", "inet"])
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null());
    let output = command.output().map_err(|error| format!("/usr/sbin/nft: {error}"))?;
    if !output.status.success() {
        return Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.trim() == "table inet portcullis"))
}

fn said(output: Output, program: &str) -> Result<(), String> {
    if output.ok { Ok(()) } else { Err(format!("{program}: {}", output.last_line())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        runtime.block_on(stonith(&words, &"alp".parse().expect("valid")))
    }

    #[test]
    fn stonith_is_told_the_node_and_believed_only_at_exit_code_0() {
        assert_eq!(run(&["/bin/sh", "-c", "test \"$1\" = host-alp", "sh", "host-{node}"]), Ok(()));
        let why = run(&["/bin/sh", "-c", "echo no route to the board >&2; exit 3"]).expect_err("it failed");
        assert!(why.contains("no route to the board"), "{why}");
        assert!(run(&["/nowhere/stonith"]).is_err());
    }
}
