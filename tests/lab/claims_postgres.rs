//! Deliverable 6: the old primary's PostgreSQL is demoted, stopped or kept as configured, in bounded time, whatever
//! stands in the way; the gate is cut all the while.

use crate::claims::{ON_THE_WIRE, evidence};
use crate::ensure;
use crate::harness::Lab;
use crate::harness::host::{send, stop_all, wait_dead};
use crate::harness::node::{Node, text_at};
use crate::harness::postgres::SYSTEM_USER;
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
    lab.a.wait_active(secs(60))?;
    lab.a.wait_in_sync(secs(60)).map(drop)
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
    crowd.wait_answer_after(now(), secs(60))?;
    harm()?;
    let said = a.cli(&["fence", "--reason", what])?.expect(0)?;
    let pages = active_page(a.ns(), a.address())?;
    crowd.wait_ended(secs(60))?;
    wait_until(BOUND, &format!("{what}: PostgreSQL out of service"), done)?;
    let took = ms(said.started, now());
    // What had left before the cut may lie at the client until it is scheduled.
    let late = crowd.late(said.ended + ON_THE_WIRE);
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
    wait_until(secs(60), "one postmaster on the directory", || Ok(a.host.titled(&line)?.len() == 1))?;
    unfence(lab)?;
    eprintln!(
        "figure: fence.postgres = demote: a standby {frozen} ms after the fence with all of PostgreSQL frozen, \
        {orphans} ms with frozen orphans of a killed postmaster"
    );
    evidence(a)?;
    a_full_disk_keeps_nothing_running(lab)?;

    reconfigured(lab, "[fence]\n", "[fence]\npostgres = \"stop\"\n")?;
    let gone = || Ok(a.host.named("postgres")?.is_empty());
    let stopped = fenced_under(lab, "stop", everything, gone)?;
    never(secs(4), "a stopped PostgreSQL started again", || Ok(!a.host.named("postgres")?.is_empty()))?;
    // Writable it would be stopped again at once: who wants it back starts it as a standby, then lifts the fence.
    let signal = a.postgres.data_dir.join("standby.signal").display().to_string();
    a.host.exec(SYSTEM_USER, &["touch", &signal])?;
    a.postgres.start(&a.host)?;
    unfence(lab)?;

    reconfigured(lab, "postgres = \"stop\"\n", "postgres = \"keep\"\n")?;
    let kept = fenced_under(lab, "keep", || Ok(now()), || Ok(!a.gate_is_open()?))?;
    never(secs(1), "a kept PostgreSQL that was taken out of service", || a.postgres.is_read_only())?;
    unfence(lab)?;
    eprintln!(
        "figure: fence.postgres = stop: no process left {stopped} ms after the fence, all frozen before; keep: \
        gate cut {kept} ms after it, PostgreSQL writable behind it"
    );
    Ok(())
}

/// The disk of the data directory has neither room nor inodes: PostgreSQL cannot be made a standby, so it is
/// stopped and
/// stays so; it becomes one when there is room.
fn a_full_disk_keeps_nothing_running(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let pg = a.dir.join("pg").display().to_string();
    a.stop_daemon()?;
    a.postgres.stop(&a.host, "fast")?;
    let mount = format!(
        "mkdir {pg}.small && mount -t tmpfs -o size=600m,nr_inodes=6000 tmpfs {pg}.small && cp -a {pg}/. \
        {pg}.small/ && \
         mount --bind {pg}.small {pg}"
    );
    a.host.exec("", &["sh", "-c", &mount])?;
    a.postgres.start(&a.host)?;
    a.start_daemon()?;
    a.wait_active(secs(60))?;
    a.wait_in_sync(secs(60))?;
    let fill = format!(
        "mkdir {pg}/junk && cd {pg}/junk && dd if=/dev/zero of=fill bs=64k 2>/dev/null; \
         dd if=/dev/zero of=fill2 bs=1 count=65536 2>/dev/null; seq 1 6000 | xargs touch 2>/dev/null; true"
    );
    let full = || {
        a.host.exec("", &["sh", "-c", &fill])?;
        let written =
            a.host.exec("", &["sh", "-c", &format!("! touch {pg}/data/one-more && ! df {pg} | grep -q ' 0% '")]);
        written.map(|_| now())
    };
    let down = || Ok(a.host.named("postgres")?.is_empty());
    let stopped = fenced_under(lab, "a full disk", full, down)?;
    never(secs(4), "a writable PostgreSQL on a full disk", || Ok(a.postgres.is_read_only().is_ok_and(|is| !is)))?;
    a.host.exec("", &["sh", "-c", &format!("rm -r {pg}/junk")])?;
    let room = now();
    wait_until(secs(60), "a standby once there is room", || is_standby(a))?;
    eprintln!(
        "figure: fence.postgres = demote on a full disk: no process left {stopped} ms after the fence, a \
        standby {} ms after \
         there was room",
        ms(room, now())
    );
    unfence(lab)
}

/// The daemon of a with another configuration.
fn reconfigured(lab: &Lab, from: &str, to: &str) -> Outcome {
    lab.a.reconfigure(from, to)?;
    lab.a.stop_daemon()?;
    lab.a.start_daemon()?;
    lab.a.wait_active(secs(60))?;
    lab.a.wait_in_sync(secs(60)).map(drop)
}
