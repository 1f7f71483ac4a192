//! One round: a daemon dies (kill -9) with its n-th record of a procedure just on disk, is started again at once, and
//! the same command is run again until it is done. Clients at both gates and watchers judge it as they judge a
//! randomized run.
//!
//! **Invariant:** whatever became of the round, nothing stays armed.

use super::clients::Clients;
use super::eyes::Eyes;
use super::plan::Who;
use super::run::{Report, clients_of, reckon};
use super::stage::{Recovery, Stage};
use crate::harness::Lab;
use crate::harness::host::is_alive;
use crate::harness::node::Node;
use crate::harness::sys::{Fail, Outcome, ms, now, pause, secs, wait_until};
use portcullis::base::time::Instant;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Which command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// `promote` with the other node dead.
    Failover,
    /// `promote` with both alive.
    Switchover,
    /// `rejoin` of the standby, asked for on the active node.
    Rejoin,
}

/// Whose daemon dies: the one where the work is done, or the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// The taker; of a rejoin the node that comes back.
    Worker,
    /// The node that serves when the command is given.
    Active,
}

/// All there is to enumerate: what, and whose records.
pub const LINES: [(What, On); 5] = [
    (What::Switchover, On::Worker),
    (What::Switchover, On::Active),
    (What::Failover, On::Worker),
    (What::Rejoin, On::Worker),
    (What::Rejoin, On::Active),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    pub what: What,
    pub on: On,
    /// From 1; a number that no procedure reaches counts how many there are.
    pub record: u32,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {:?} dies at record {}", self.what, self.on, self.record)
    }
}

/// What a round came to.
#[derive(Debug)]
pub struct Round {
    pub report: Report,
    /// How many records there were, when the one was not reached.
    pub not_reached: Option<u32>,
    /// Exit code of each run of the command.
    pub exits: Vec<i32>,
    pub took_ms: i64,
}

/// More often nobody runs it again.
const RUNS: usize = 8;

/// Plays one point on a pair in sync. `first_id` and the three numbers after it are the clients'.
pub fn crash_round(lab: &Lab, point: Point, first_id: u32) -> Outcome<Round> {
    let stage = Stage::new(lab);
    let active = stage.serving().ok_or("nobody serves before the round begins")?;
    let (from, other) = (stage.node(active), stage.node(1 - active));
    stage.tell(&format!("{point}; {} serves", from.name()));
    let eyes = Eyes::open(lab)?;
    let clients = Clients::start(&lab.switch.ns, clients_of(lab, first_id))?;
    clients.wait_answer_of(active, now(), secs(20))?;
    if point.what == What::Failover {
        from.power_off()?;
        stage.tell(&format!("power off {}", from.name()));
    }
    if point.what == What::Rejoin {
        // One that is in sync is left alone.
        other.postgres.stop(&other.host, "fast")?;
        from.wait_status(secs(60), "to have lost its standby", |status| {
            status.pointer("/replication/in_sync") == Some(&false.into())
        })?;
    }
    let before = [inode(&stage, 0)?, inode(&stage, 1)?];
    let victim = if point.on == On::Worker { other } else { from };
    let begun = now();
    victim.crash_at_record(point.record)?;
    let done = AtomicBool::new(false);
    let played = std::thread::scope(|scope| {
        let restarter = scope.spawn(|| restart_when_dead(&stage, victim, &done));
        let played = until_done(&stage, point, active);
        done.store(true, Ordering::Relaxed);
        let restarted = restarter.join().unwrap_or_else(|_| Err(Fail("the restarter panicked".to_owned())));
        played.and_then(|exits| restarted.map(|()| exits))
    });
    let left = victim.crash_at_record(0)?;
    let took_ms = ms(begun, now());
    let exits = match played {
        Ok(exits) => exits,
        Err(error) => {
            stage.blame(error.0);
            Vec::new()
        }
    };
    for who in [0, 1] {
        if !holds(&stage, who, before[who])? {
            stage.blame(format!("the data directory of {} is gone", stage.node(who).name()));
        }
    }
    let serves = if point.what == What::Rejoin { active } else { 1 - active };
    let recovered = stage.serving().filter(|who| *who == serves).map(|who| (who, Recovery::ByItself));
    if recovered.is_none() {
        stage.blame(format!("{} does not serve at the end", stage.node(serves).name()));
    }
    let report = reckon(&stage, clients, eyes, u64::from(point.record), recovered)?;
    for who in [0, 1] {
        stage.node(who).postgres.forget_old_lives()?;
    }
    Ok(Round { report, not_reached: left.map(|left| point.record - left), exits, took_ms })
}

/// The command until it ends with 0, and the pair whole again.
fn until_done(stage: &Stage, point: Point, active: Who) -> Outcome<Vec<i32>> {
    let (from, other) = (stage.node(active), stage.node(1 - active));
    let (who, words) = match point.what {
        What::Failover | What::Switchover => (1 - active, vec!["promote", "--yes"]),
        What::Rejoin => (active, vec!["rejoin", other.name()]),
    };
    let mut exits = Vec::new();
    while exits.last() != Some(&0) {
        if exits.len() >= RUNS {
            return Err(Fail(format!("`{}` ended with {exits:?}", words.join(" "))));
        }
        let said = stage.node(who).cli(&words)?;
        stage.quote(who, &said);
        exits.push(said.code);
        if said.code != 0 {
            // A person reads first.
            pause(secs(1));
        }
    }
    let serves = if point.what == What::Rejoin { active } else { 1 - active };
    stage.node(serves).wait_active(secs(60))?;
    if point.what == What::Failover {
        let allowed = from.boot()?;
        stage.tell(&format!("booted {}; may-start-primary: {allowed}", from.name()));
        from.wait_role("fenced", secs(60))?;
        stage.node(serves).wait_peer()?;
    }
    // The old node follows by itself; the last of what it writes belongs to the procedure.
    if point.what != What::Failover {
        let _by_itself = stage.node(serves).wait_in_sync(secs(30));
    }
    if stage.restore(serves)? {
        stage.tell("it took a rejoin");
    }
    stage.node(serves).wait_in_sync(secs(60))?;
    Ok(exits)
}

/// systemd's `Restart=`, without its pause.
fn restart_when_dead(stage: &Stage, node: &Node, done: &AtomicBool) -> Outcome {
    while !done.load(Ordering::Relaxed) {
        if node.host.has_power() && node.daemon_pid().is_ok_and(|pid| !is_alive(pid)) {
            stage.tell(&format!("the daemon on {} died", node.name()));
            node.start_daemon()?;
            stage.tell(&format!("the daemon on {} was started again", node.name()));
        }
        pause(portcullis::base::time::Duration::from_millis(5));
    }
    Ok(())
}

fn inode(stage: &Stage, who: Who) -> Outcome<u64> {
    Ok(std::fs::metadata(&stage.node(who).postgres.data_dir)?.ino())
}

/// The directory is there still, in its place or set aside.
fn holds(stage: &Stage, who: Who, inode: u64) -> Outcome<bool> {
    let data_dir = &stage.node(who).postgres.data_dir;
    let place = data_dir.parent().ok_or("a data directory has a place")?;
    Ok(std::fs::read_dir(place)?.flatten().any(|entry| entry.metadata().is_ok_and(|meta| meta.ino() == inode)))
}

/// The pair in sync before the first round.
pub fn ready(lab: &Lab) -> Outcome {
    let stage = Stage::new(lab);
    let since: Instant = now();
    wait_until(secs(60), "one node to serve", || Ok(stage.serving().is_some()))?;
    let active = stage.serving().ok_or("nobody serves")?;
    stage.node(active).wait_in_sync(secs(60))?;
    stage.tell(&format!("ready after {} ms", ms(since, now())));
    Ok(())
}
