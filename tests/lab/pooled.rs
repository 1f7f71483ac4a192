//! Transaction mode on a whole pair: clients that share backends, while the standby hangs, the configuration is read
//! again, the service moves, and every voter falls silent.

use crate::claims::LAST_ACK_MS;
use crate::ensure;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::sys::{millis, ms, now, pause, secs, wait_until};
use crate::harness::watch::{never_two_active, roles};
use crate::in_lab;

const WRITERS: u32 = 12;

/// Each of these at a time has a backend, and a writer or two wait for it.
const POOL: &str = "[pool]\nmode = \"transaction\"\nsize = 4\n";

#[test]
fn clients_that_share_backends_meet_no_error_lose_nothing_and_hear_nothing_after_the_lease() {
    in_lab(Options { extra: POOL, ..Options::new("pooled") }, |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let watched = (roles(a.ns(), a.address())?, roles(b.ns(), b.address())?);
        let dns = lab.witness.address();
        let writers = (1..=WRITERS).map(|id| Writer::start(client, WriterOptions::service(id, dns)));
        let writers = writers.collect::<Result<Vec<_>, _>>()?;
        for writer in &writers {
            writer.wait_acks(10, secs(60))?;
        }
        // Twelve at once, on a busy machine, may each need another try to get in.
        let errors = || writers.iter().map(|writer| writer.log().errors.len()).collect::<Vec<_>>();
        let before = errors();
        let backends =
            "select count(*) from pg_stat_activity where backend_type = 'client backend' and usename = 'app'";
        let count = a.postgres.sql("postgres", backends)?;
        ensure!(count.trim().parse::<u32>().is_ok_and(|count| count <= 4), "{count} backends for a pool of 4");

        // A standby that hangs makes commits wait, and nothing else (a writer gives up after 2 s).
        b.host.freeze()?;
        pause(millis(800));
        b.host.thaw()?;
        a.cli(&["reload"])?.expect(0)?;
        for writer in &writers {
            writer.wait_acks(10, secs(60))?;
        }
        let all = || writers.iter().map(|writer| (writer.id, writer.log().errors)).collect::<Vec<_>>();
        ensure!(errors() == before, "writers had errors: {:?}", all());

        a.wait_in_sync(secs(60))?;
        let said = b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        // They were carried over: nobody noticed, and their way still leads through a.
        for writer in &writers {
            writer.wait_acks(10, secs(60))?;
        }
        ensure!(errors() == before, "writers had errors at the switchover: {:?}", all());
        // Sessions of b's own gate, for what comes next.
        let late = (WRITERS + 1..=2 * WRITERS).map(|id| Writer::start(client, WriterOptions::service(id, dns)));
        let late = late.collect::<Result<Vec<_>, _>>()?;
        for writer in &late {
            writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        }
        let writers: Vec<_> = writers.into_iter().chain(late).collect();

        // Without its standby b goes alone, and so answers to the last.
        a.postgres.stop(&a.host, "immediate")?;
        let stopped = now();
        wait_until(secs(60), "b to go on alone", || {
            Ok(lab.witness.marker()?.is_some_and(|marker| marker.contains("sync=none")))
        })?;
        for writer in &writers[WRITERS as usize..] {
            writer.wait_ack_via(b.gate()?, stopped, secs(60))?;
            writer.wait_acks(10, secs(60))?;
        }

        // Nobody vouches for b any more, on sessions that are open.
        lab.switch.cut_between(&b.host.plug, &lab.witness.host.plug)?;
        lab.switch.cut_between(&b.host.plug, &a.host.plug)?;
        let cut = now();
        wait_until(secs(60), "b's gate to shut", || Ok(!b.gate_is_open()?))?;
        pause(secs(1));
        let logs: Vec<_> = writers.into_iter().map(|writer| (writer.id, writer.finish())).collect();
        let last = logs.iter().filter_map(|(_, log)| log.last_ack()).map(|ack| ack.at).max();
        let last = last.map_or(0, |at| ms(cut, at));
        eprintln!("figure: pooled: last answer {last} ms after every voter fell silent");
        ensure!(last <= LAST_ACK_MS, "answered {last} ms after the last proof could come");
        lab.switch.heal()?;
        b.wait_active(secs(60))?;
        for (id, log) in &logs {
            let missing = lost(log, *id, &b.postgres)?;
            ensure!(missing.is_empty(), "acknowledged to writer {id} but missing on b: {missing:?}");
        }
        never_two_active(&watched.0.finish(), &watched.1.finish())
    });
}
