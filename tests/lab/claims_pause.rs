//! C1 and C3: what stands still or dies acknowledges nothing afterwards, on sessions that were open before.

use crate::claims::{LAST_ACK_MS, ON_THE_WIRE, VIP_GONE_MS, evidence, runs};
use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::host::{continue_all, stop_all};
use crate::harness::net::{VIP, address_gone, connects};
use crate::harness::node::{GATE_PORT, Node, PEER_PORT};
use crate::harness::raw::{Crowd, GATE_RULE, Habit, POSTGRES_RULE, SETUP_SQL};
use crate::harness::sys::{Outcome, millis, ms, never, now, pause, secs, wait_until};
use crate::in_lab;
use portcullis::base::time::Instant;
use rustix::process::Signal;

/// W of this lab, in milliseconds, rounded up.
const W_MS: i64 = 3261;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frozen {
    Daemon,
    Postgres,
    Everything,
}

const KINDS: [Frozen; 3] = [Frozen::Daemon, Frozen::Postgres, Frozen::Everything];

/// Lets the crowd's role in; before the daemons start.
pub(crate) fn let_the_crowd_in(lab: &Lab) -> Outcome {
    let rules = lab.dir.join("hba.conf");
    std::fs::write(&rules, GATE_RULE.to_owned() + &std::fs::read_to_string(&rules)?)?;
    for node in lab.nodes() {
        node.postgres.prepend("pg_hba.conf", POSTGRES_RULE)?;
        node.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
    }
    lab.a.postgres.sql("app", SETUP_SQL).map(drop)
}

fn a_flowing_crowd(lab: &Lab, node: &Node) -> Outcome<Crowd> {
    let members =
        vec![(Habit::Pouring, false), (Habit::Pouring, false), (Habit::Asking, false), (Habit::InTransaction, false)];
    let crowd = Crowd::open(lab.client.ns(), node.gate()?, members, None)?;
    let begun = now();
    wait_until(secs(60), "answers to flow", || Ok(crowd.answers() > 300))?;
    crowd.wait_answer_after(begun, secs(60))?;
    Ok(crowd)
}

/// One pause of the active node, longer than W, while the other is promoted. Returns the answers before it,
/// and how long
/// it lasted.
fn one_pause(lab: &Lab, kind: Frozen, active: &Node, other: &Node) -> Outcome<(u64, i64)> {
    let crowd = a_flowing_crowd(lab, active)?;
    let daemon = [active.daemon_pid()?];
    let postgres = active.host.named("postgres")?;
    let frozen: Instant = match kind {
        Frozen::Daemon => stop_all(&daemon)?,
        Frozen::Postgres => {
            // The daemons do not hear each other, so that nobody can ask this one to stop its PostgreSQL.
            lab.switch.cut_port_between(&active.host.plug, &other.host.plug, PEER_PORT)?;
            stop_all(&postgres)?
        }
        Frozen::Everything => active.host.freeze()?,
    };
    let before = crowd.answers();
    other.cli(&["promote", "--yes"])?.expect(0)?;
    other.wait_active(secs(60))?;
    let stood = ms(frozen, now());
    ensure!(stood > W_MS, "{kind:?}: the pause of {stood} ms was not longer than W");
    let silent = crowd.late(frozen + ON_THE_WIRE);
    ensure!(silent.is_empty(), "{kind:?}: answers while it stood still: {silent:?}");
    match kind {
        Frozen::Daemon => continue_all(&daemon),
        Frozen::Postgres => continue_all(&postgres),
        Frozen::Everything => active.host.thaw()?,
    };
    never(millis(1500), "an answer after the pause", || Ok(!crowd.late(frozen + ON_THE_WIRE).is_empty())).map_err(
        |error| crate::harness::sys::Fail(format!("{kind:?}: {error}: {:?}", crowd.late(frozen + ON_THE_WIRE))),
    )?;
    crowd.wait_ended(secs(60))?;
    ensure!(!active.gate_is_open()?, "{kind:?}: the old gate is open");
    lab.switch.heal()?;
    Ok((before, stood))
}

/// The old node comes back as standby of the other.
fn bring_back(old: &Node, new: &Node) -> Outcome {
    old.wait_role("fenced", secs(60))?;
    wait_until(secs(60), "PostgreSQL of the old node read-only", || old.postgres.is_read_only())?;
    new.rejoin(old.name())?;
    new.wait_in_sync(secs(60))?;
    old.postgres.forget_old_lives()
}

/// C3: the daemon of the active node dies or stands still, and comes back.
fn without_daemon(lab: &Lab, node: &Node, signal: Signal) -> Outcome<(i64, i64)> {
    let crowd = a_flowing_crowd(lab, node)?;
    ensure!(node.has_vip()?, "{} is active without the VIP", node.name());
    let daemon = [node.daemon_pid()?];
    let ended = node.kill_daemon(signal)?;
    let gone = address_gone(node.ns(), VIP, secs(60))?;
    let last = crowd.last_answer().ok_or("no answer")?;
    ensure!(ms(ended, gone) <= VIP_GONE_MS, "{signal:?}: the VIP left after {} ms", ms(ended, gone));
    // Whatever still comes must come before the limit; and nothing comes when the daemon goes on.
    let limit = LAST_ACK_MS;
    let over = ended + millis(limit.unsigned_abs());
    if now() < over {
        pause(over.since(now()));
    }
    if signal == Signal::STOP {
        continue_all(&daemon);
        crowd.wait_ended(secs(60))?;
    } else {
        ensure!(!connects(lab.client.ns(), node.address(), GATE_PORT)?, "a dead daemon's gate accepts connections");
        node.start_daemon()?;
    }
    let late = crowd.late(over);
    ensure!(late.is_empty(), "{signal:?}: answers more than {limit} ms later: {late:?}");
    node.wait_active(secs(60))?;
    wait_until(secs(60), "the VIP back", || node.has_vip())?;
    Ok((ms(ended, last).max(0), ms(ended, gone)))
}

#[test]
fn claims_1_and_3_a_pause_or_a_death_passes_nothing() {
    in_lab(Options::with_vip("pauses"), |lab| {
        lab.start_servers()?;
        let_the_crowd_in(lab)?;
        for node in [&lab.b, &lab.a] {
            node.start_daemon()?;
        }
        lab.a.wait_active(secs(60))?;
        lab.a.wait_in_sync(secs(60))?;

        let (killed, killed_vip) = without_daemon(lab, &lab.a, Signal::KILL)?;
        let (stopped, stopped_vip) = without_daemon(lab, &lab.a, Signal::STOP)?;
        eprintln!(
            "figure: C3 kill -9 of the daemon: last answer {killed} ms, VIP gone {killed_vip} ms after it; \
            SIGSTOP: last \
             answer {stopped} ms, VIP gone {stopped_vip} ms (limits {LAST_ACK_MS} and {VIP_GONE_MS} ms)"
        );
        lab.a.wait_in_sync(secs(60))?;

        let (mut active, mut other) = (&lab.a, &lab.b);
        let (runs, mut answers, mut shortest) = (runs(KINDS.len()), 0, i64::MAX);
        let begun = now();
        for run in 0..runs {
            let kind = KINDS[run % KINDS.len()];
            let (before, stood) = one_pause(lab, kind, active, other)?;
            answers += before;
            shortest = shortest.min(stood);
            bring_back(active, other)?;
            std::mem::swap(&mut active, &mut other);
        }
        eprintln!(
            "figure: C1 {runs} pauses (daemon, PostgreSQL, everything in turn), each longer than W (shortest \
            {shortest} ms) \
             while the other node was promoted: 0 answers after the pause, {answers} before; {} ms a run",
            ms(begun, now()) / i64::try_from(runs.max(1)).unwrap_or(1)
        );
        let mut told = (0, 0);
        for node in lab.nodes() {
            let (opened, cut) = evidence(node)?;
            told = (told.0 + opened, told.1 + cut);
        }
        eprintln!("figure: C20 {} openings and {} cuts, one line and one event each", told.0, told.1);
        Ok(())
    });
}
