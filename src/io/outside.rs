//! Programs outside: `service.units` through `systemctl`, and `fence.stonith`.
//!
//! What it is NOT: it decides nothing and keeps no state. Every call is bounded; a caller that drops it kills the client
//! program, never the unit's job in systemd.

use crate::base::ids::NodeName;
use crate::base::time::Duration;
use crate::io::postgres::tool::{self, Output};

/// A unit may take so long to start or stop; systemd's own default is 90 s.
const UNIT_LIMIT: Duration = Duration::from_secs(95);
/// Handing a job to systemd without waiting for it.
const ENQUEUE_LIMIT: Duration = Duration::from_secs(5);
/// A management board that answers slowly, and a machine that powers off.
const STONITH_LIMIT: Duration = Duration::from_secs(85);
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
    said(output, "systemctl")
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
