//! A pause of the whole machine, as the witness's signed time shows it (S17): here the witness's clock steps instead,
//! which to the node is the same thing.

use crate::ensure;
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::sys::{Outcome, never, secs, wait_until};
use crate::harness::witness::Kind;
use crate::in_lab;
use std::fs;

fn counter(node: &Node, name: &str) -> Outcome<u64> {
    Ok(node.status()?.pointer(&format!("/counters/{name}")).and_then(serde_json::Value::as_u64).unwrap_or(0))
}

#[test]
fn a_forward_step_of_the_witness_costs_one_lapse_and_a_backward_one_nothing() {
    in_lab(Options { witness: Kind::Embedded, stepped_clock: true, ..Options::new("pause") }, |lab| {
        lab.start_pair()?;
        let (a, clock) = (&lab.a, lab.dir.join("witness").join("clock"));
        let cuts = counter(a, "gate_cuts")?;
        fs::write(&clock, "+10\n")?;
        wait_until(secs(60), "the pause to be seen", || Ok(counter(a, "pauses_seen")? == 1))?;
        wait_until(secs(60), "the gate open again", || a.gate_is_open())?;
        ensure!(counter(a, "gate_cuts")? == cuts + 1, "{} cuts for one step", counter(a, "gate_cuts")? - cuts);
        ensure!(a.role()? == "active", "a lapse, never a fence");
        fs::write(&clock, "+0\n")?;
        never(secs(4), "a lapse for a step backwards", || Ok(counter(a, "gate_cuts")? != cuts + 1))?;
        ensure!(counter(a, "pauses_seen")? == 1, "a step backwards was taken for a pause");
        Ok(())
    });
}
