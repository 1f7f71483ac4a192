//! `fence.stonith`: exit code 0 means "surely off", and only then is anything waited for less.
//!
//! The command asks this test to pull the plug and waits until it has: what a management board does.

use crate::ensure;
use crate::harness::config::Options;
use crate::harness::sys::{Outcome, ms, now, secs, wait_until};
use crate::harness::{Lab, node::Node};
use crate::in_lab;
use std::fs;
use std::os::unix::fs::PermissionsExt;

const FENCE: &str = "stonith = [\"/bin/sh\", \"{dir}/board.sh\", \"{node}\"]\n";

/// The board of every node: told a name, it leaves `NAME.off` and answers as `NAME.done` or `NAME.failed` says.
const BOARD: &str = "cd \"$(dirname \"$0\")/board\" || exit 9\n: > \"$1.off\"\ni=0\nwhile [ $i -lt 200 ]; do\n  \
                     [ -e \"$1.done\" ] && exit 0\n  [ -e \"$1.failed\" ] && { echo \"no route to the board\" >&2; \
                     exit 3; }\n  sleep 0.05; i=$((i+1))\ndone\nexit 1\n";

fn board(lab: &Lab) -> Outcome {
    fs::write(lab.dir.join("board.sh"), BOARD)?;
    fs::create_dir(lab.dir.join("board"))?;
    fs::set_permissions(lab.dir.join("board"), fs::Permissions::from_mode(0o777))?;
    Ok(())
}

fn answer(lab: &Lab, node: &Node, word: &str) -> Outcome {
    fs::write(lab.dir.join("board").join(format!("{}.{word}", node.name())), "")?;
    Ok(())
}

#[test]
fn a_node_that_is_surely_off_is_not_waited_for_and_a_failed_command_is_not_believed() {
    in_lab(Options { fence: FENCE, lease: "20s", ..Options::new("stonith") }, |lab| {
        board(lab)?;
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        a.power_off()?;
        answer(lab, a, "done")?;
        let asked = now();
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        let took = ms(asked, now());
        eprintln!("figure: stonith: promote from a node switched off: {took} ms, where W is about 20 s");
        ensure!(lab.dir.join("board").join("a.off").exists(), "the board was not asked: {}", said.out);
        ensure!(took < 18_000, "{took} ms: W was waited out although the node was surely off");
        Ok(())
    });
}

#[test]
fn with_a_vip_alone_stonith_replaces_the_silent_nodes_word() {
    in_lab(Options { fence: FENCE, ..Options::vip_only("vipstonith") }, |lab| {
        board(lab)?;
        lab.start_servers()?;
        lab.b.start_daemon()?;
        lab.a.start_daemon()?;
        lab.a.wait_postgres("primary")?;
        lab.a.cli(&["promote", "--yes"])?.expect(0)?;
        lab.a.wait_in_sync(secs(60))?;
        let (a, b) = (&lab.a, &lab.b);
        // The nodes do not see each other any more, and the board says no: nothing happens.
        lab.switch.cut_between(&a.host.plug, &b.host.plug)?;
        wait_until(secs(60), "b to miss a", || {
            Ok(b.status()?.pointer("/peer/reachable") == Some(&serde_json::Value::Bool(false)))
        })?;
        answer(lab, a, "failed")?;
        let said = b.cli(&["promote", "--yes", "--accept-data-loss"])?.expect(3)?;
        ensure!(said.err.contains("no route to the board"), "{}", said.err);
        ensure!(a.gate_is_open()? && !b.gate_is_open()?, "a refused promote changed something");
        // Now it does switch it off.
        fs::remove_file(lab.dir.join("board").join("a.failed"))?;
        a.power_off()?;
        answer(lab, a, "done")?;
        b.cli(&["promote", "--yes", "--accept-data-loss"])?.expect(0)?;
        b.wait_active(secs(60))?;
        Ok(())
    });
}
