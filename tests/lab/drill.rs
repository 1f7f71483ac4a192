//! `portcullis drill` on a real pair: there and back, measured, and refused where it would hurt.

use crate::ensure;
use crate::harness::config::Options;
use crate::harness::host::{is_alive, send};
use crate::harness::node::{GATE_PORT, text_at};
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{secs, wait_until};
use crate::in_lab;
use rustix::process::Signal;
use serde_json::Value;

#[test]
fn a_drill_goes_there_and_back_and_measures_what_clients_felt() {
    in_lab(Options::new("drill"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let epoch = a.epoch()?;
        let dsn = format!("host=db.example.org port={GATE_PORT} user=app dbname=app password={APP_PASSWORD}");
        let said = b.cli(&["drill", "--dsn", &dsn])?.expect(0)?;
        eprintln!("{}", said.out);
        for words in
            ["drill: a to b: ", " ms without an answer", "and back: ", "acknowledged, 0 lost", "would lose nothing"]
        {
            ensure!(said.out.contains(words), "{words:?} is not in:\n{}", said.out);
        }
        ensure!(!said.out.contains(APP_PASSWORD), "the password is in the output");
        a.wait_active(secs(60))?;
        ensure!(a.epoch()? == epoch + 2, "there and back is two epochs, and it went from {epoch} to {}", a.epoch()?);
        a.wait_in_sync(secs(60))?;
        let events: Value = serde_json::from_str(&b.cli(&["events", "--json"])?.expect(0)?.out)?;
        let noted = events.as_array().is_some_and(|all| all.iter().any(|event| text_at(event, "/kind") == "drill"));
        ensure!(noted, "no event of the drill: {events}");

        // Without a login only the door is measured, and said to be.
        let door = a.cli(&["drill", "--json"])?.expect(0)?;
        let last: Value = serde_json::from_str(door.out.lines().last().unwrap_or_default())?;
        ensure!(last["exit"] == 0 && last.pointer("/data/drill/writes") == Some(&Value::Null), "ended with {last}");
        let gap = last.pointer("/data/drill/there/gap_ms").and_then(Value::as_u64).unwrap_or_default();
        ensure!(gap > 0, "no gap was measured: {last}");
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;

        // Ctrl-C in the middle: the daemon finishes the switchover, and the last word says how to get back.
        let log = lab.dir.join("drill.log");
        let line = a.command_line(&["drill"]);
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let pid = a.host.spawn(&log, &[], &words)?;
        let read = || std::fs::read_to_string(&log).unwrap_or_default();
        wait_until(secs(60), "the drill to begin", || Ok(read().contains("a to b:")))?;
        send(pid, Signal::INT)?;
        wait_until(secs(60), "the drill to end", || Ok(!is_alive(pid)))?;
        let text = read();
        ensure!(text.contains("portcullis: the drill was broken off; "), "it said: {text}");
        ensure!(text.contains("`portcullis switchover --to a` brings"), "it said: {text}");
        b.wait_active(secs(60))?;
        b.wait_in_sync(secs(60))?;
        a.cli(&["switchover", "--to", "a"])?.expect(0)?;
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;

        // Not over a standby that is down, and not without an answer through the door: nothing moves.
        let epoch = a.epoch()?;
        let nobody = a.cli(&["drill", "--dsn", "host=db.example.org port=1 user=app dbname=app"])?.expect(1)?;
        ensure!(nobody.err.contains("nothing was changed"), "{}", nobody.err);
        b.postgres.stop(&b.host, "fast")?;
        b.wait_status(secs(60), "to miss its PostgreSQL", |s| s.pointer("/postgres/up") == Some(&false.into()))?;
        let refused = a.cli(&["drill"])?.expect(3)?;
        ensure!(refused.err.starts_with("portcullis: no drill: "), "{}", refused.err);
        ensure!(a.gate_is_open()? && a.epoch()? == epoch, "a refused drill changed something");
        Ok(())
    });
}
