//! What a person reads at three in the morning: `promote` against a dead node, in a pipe.

use crate::ensure;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::sys::{ms, pause, secs};
use crate::in_lab;

#[test]
fn a_promote_over_a_dead_node_says_what_it_knows_and_what_comes_next() {
    in_lab(Options::new("night"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        a.power_off()?;
        pause(secs(2));
        let rehearsed = b.cli(&["promote", "--dry-run"])?;
        eprintln!("dry: {} {}{}", rehearsed.code, rehearsed.out, rehearsed.err);
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        eprintln!("{}\nfirst ack {} ms after Enter", said.out, ms(said.started, first));
        let missing = lost(&writer.finish(), 1, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        Ok(())
    });
}
