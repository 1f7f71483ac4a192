//! A restart of the active node's daemon, as `systemctl restart` does it: how long clients are without the service; and
//! the commands for one database, and a reload, as people type them.

use crate::claims::ON_THE_WIRE;
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::sys::{millis, ms, never, now, secs, wait_until};
use crate::{alone_in_lab, in_lab};
use rustix::process::Signal;
use std::fs::OpenOptions;
use std::io::Write;

const ROUNDS: usize = 5;

#[test]
fn a_restart_is_over_soon_and_loses_nothing() {
    alone_in_lab(Options::new("restart"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        let gate = a.gate()?;
        let epoch = a.epoch()?;
        let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(1, gate) };
        let writer = Writer::start_flowing(client, options)?;
        let mut told = Vec::new();
        for _ in 0..ROUNDS {
            writer.wait_acks(50, secs(60))?;
            let asked = now();
            a.stop_daemon()?;
            let ended = now();
            a.start_daemon()?;
            let back = writer.wait_ack_via(gate, ended, secs(60))?;
            let log = writer.log();
            let last = log.acks.iter().rev().find(|ack| ack.at < ended).map_or(asked, |ack| ack.at);
            told.push((ms(asked, ended), ms(ended, back), ms(last, back)));
            a.wait_in_sync(secs(60))?;
        }
        ensure!(a.epoch()? == epoch, "a restart changed the epoch");
        let log = writer.finish();
        let cut = log.errors.iter().filter(|(_, text)| text.contains("57P01")).count();
        ensure!(cut >= ROUNDS, "not every restart told the session: {:?}", log.errors);
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        eprintln!("restart: (SIGTERM to end, end to first commit, without commits) in ms: {told:?}");
        let worst = told.iter().map(|(_, _, without)| *without).max().unwrap_or_default();
        ensure!(worst < 20_000, "clients were without the service for {worst} ms");
        Ok(())
    });
}

#[test]
fn one_database_is_paused_killed_and_resumed_and_a_reload_says_what_it_did() {
    in_lab(Options::new("pools"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        let said = a.cli(&["pause", "nosuch"])?.expect(1)?;
        ensure!(said.err.contains("database nosuch"), "{}", said.err);
        let gate = a.gate()?;
        let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(1, gate) };
        let writer = Writer::start_flowing(client, options)?;
        let said = a.cli(&["pause", "nosuch"])?.expect(1)?;
        ensure!(said.err.contains("name app"), "{}", said.err);
        a.cli(&["kill"])?.expect(2)?;
        a.cli(&["pause", "app"])?.expect(0)?;
        let paused = now();
        never(millis(1500), "an acknowledgement while paused", || {
            Ok(!writer.log().acks_after(paused + ON_THE_WIRE).is_empty())
        })?;
        let (code, text) = a.http("/metrics")?;
        ensure!(code == 200 && text.contains("portcullis_pool_database_paused{database=\"app\"} 1.0"), "{text}");
        ensure!(writer.log().errors.is_empty(), "the client noticed: {:?}", writer.log().errors);
        a.cli(&["kill", "app"])?.expect(0)?;
        a.cli(&["resume", "app"])?.expect(0)?;
        writer.wait_acks(20, secs(60))?;
        let errors = writer.log().errors;
        ensure!(errors.iter().any(|(_, text)| text.contains("57P01") && text.contains("kill")), "{errors:?}");
        a.cli(&["reconnect", "app"])?.expect(0)?;
        writer.wait_acks(20, secs(60))?;

        OpenOptions::new().append(true).open(&a.config)?.write_all(b"\n[pool]\nsize = 7\nthreads = 3\n")?;
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(said.out.contains("and pool.size; needs a restart: pool.threads"), "{}", said.out);
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(!said.out.contains("pool.size") && said.out.contains("needs a restart: pool.threads"), "{}", said.out);
        // A file with an error changes nothing; the verb itself would not even read it, so SIGHUP.
        a.reconfigure("size = 7", "size = 0")?;
        a.kill_daemon(Signal::HUP)?;
        wait_until(secs(60), "the daemon to say that nothing was reloaded", || {
            Ok(std::fs::read_to_string(&a.log)?.contains("nothing was reloaded"))
        })?;
        a.reconfigure("size = 0", "size = 7")?;
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(!said.out.contains("pool.size"), "the broken file was in force: {}", said.out);
        writer.wait_acks(20, secs(60))?;
        drop(writer.finish());
        Ok(())
    });
}
