//! Deliverable 6: the old primary's PostgreSQL is demoted, stopped or kept as configured, in bounded time, whatever
//! stands in the way; the gate is cut all the while.

use crate::claims::evidence;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::host::{send, stop_all, wait_dead};
use crate::harness::node::{Node, text_at};
use crate::harness::raw::{Crowd, Habit};
use crate::harness::sys::{Outcome, ms, never, now, secs, wait_until};
use crate::harness::watch::active_page;
use portcullis::base::time::Instant;
use rustix::process::Signal;
use serde_json::Value;

/// Stopping may take 2 s of asking, 5 s fast, 6 s immediate, and the start of the standby a few.
const BOUND: std::time::Duration = secs(20);

/// The fenced node takes a new epoch and serves, with its standby in sync.
pub(crate) fn unfence(lab: &Lab) -> Outcome {
    lab.a.cli(&["unfence"])?.expect(0)?;
    lab.a.wait_active(secs(20))?;
    lab.a.wait_in_sync(secs(20)).map(drop)
}

fn is_standby(node: &Node) -> Outcome<bool> {
    let status = node.status()?;
    Ok(status.pointer("/postgres/up") == Some(&Value::Bool(true)) && text_at(&status, "/postgres/role") == "standby")
}

/// Fences a by command under what `harm` did, and waits for `done`; no gate passes meanwhile. Milliseconds it took.
fn fenced_under(
    lab: &Lab,
    what: &str,
    harm: impl FnOnce() -> Outcome<Instant>,
    done: impl Fn() -> Outcome<bool>,
) -> Outcome<i64> {
    let a = &lab.a;
    let crowd = Crowd::open(lab.client.ns(), a.gate()?, vec![(Habit::Pouring, false), (Habit::Asking, false)], None)?;
    crowd.wait_answer_after(now(), secs(5))?;
    harm()?;
    let said = a.cli(&["fence", "--reason", what])?.expect(0)?;
    let pages = active_page(a.ns(), a.address())?;
    crowd.wait_ended(secs(2))?;
    wait_until(BOUND, &format!("{what}: PostgreSQL out of service"), done)?;
    let took = ms(said.started, now());
    let late = crowd.late(said.ended);
    ensure!(late.is_empty(), "{what}: answers after the fence: {late:?}");
    ensure!(pages.finish().iter().all(|look| look.seen != Some(true)), "{what}: the gate was open meanwhile");
    Ok(took)
}

pub(crate) fn the_old_primary_is_taken_out(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let everything = || stop_all(&a.host.named("postgres")?);
    let frozen = fenced_under(lab, "all of PostgreSQL frozen", everything, || is_standby(a))?;
    unfence(lab)?;

    let orphan = || {
        let backends = a.host.titled("postgres: load app")?;
        ensure!(!backends.is_empty(), "no backend of the crowd");
        let still = stop_all(&backends)?;
        let postmaster = a.postgres.postmaster(&a.host)?;
        send(postmaster, Signal::KILL)?;
        wait_dead(postmaster)?;
        Ok(still)
    };
    let orphans = fenced_under(lab, "orphans of a killed postmaster", orphan, || is_standby(a))?;
    // A child is called like its postmaster for the moment before it sets its title.
    let line = format!("-D {}", a.postgres.data_dir.display());
    wait_until(secs(2), "one postmaster on the directory", || Ok(a.host.titled(&line)?.len() == 1))?;
    unfence(lab)?;
    eprintln!(
        "figure: fence.postgres = demote: a standby {frozen} ms after the fence with all of PostgreSQL frozen, {orphans} ms with frozen orphans of a killed postmaster"
    );
    evidence(a)?;

    reconfigured(lab, "[fence]\n", "[fence]\npostgres = \"stop\"\n")?;
    let gone = || Ok(a.host.named("postgres")?.is_empty());
    let stopped = fenced_under(lab, "stop", everything, gone)?;
    never(secs(4), "a stopped PostgreSQL started again", || Ok(!a.host.named("postgres")?.is_empty()))?;
    a.postgres.start(&a.host)?;
    unfence(lab)?;

    reconfigured(lab, "postgres = \"stop\"\n", "postgres = \"keep\"\n")?;
    let kept = fenced_under(lab, "keep", || Ok(now()), || Ok(!a.gate_is_open()?))?;
    never(secs(4), "a kept PostgreSQL that was taken out of service", || a.postgres.is_read_only())?;
    unfence(lab)?;
    eprintln!(
        "figure: fence.postgres = stop: no process left {stopped} ms after the fence, all frozen before; keep: gate cut {kept} ms after it, PostgreSQL writable behind it"
    );
    Ok(())
}

/// Both daemons with another configuration.
fn reconfigured(lab: &Lab, from: &str, to: &str) -> Outcome {
    for node in lab.nodes() {
        node.reconfigure(from, to)?;
        node.stop_daemon()?;
        node.start_daemon()?;
    }
    lab.a.wait_active(secs(15))?;
    lab.a.wait_in_sync(secs(15)).map(drop)
}
