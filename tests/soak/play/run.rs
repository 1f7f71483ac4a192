//! One randomized run: a schedule played on a pair under load, then everything mended, then the reckoning.

use super::clients::{Client, Clients, Habit};
use super::eyes::Eyes;
use super::plan::{Action, Step, Who, plan};
use super::stage::{Recovery, Stage};
use super::trace::{overlaps, services, two_active};
use crate::harness::Lab;
use crate::harness::sys::{Outcome, millis, now, pause, secs};
use portcullis::base::time::{Duration, Instant};
use std::collections::BTreeSet;
use std::sync::mpsc::channel;

/// What a run came to.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub violations: Vec<String>,
    pub answers: usize,
    /// Intervals of service: how often it changed hands, and one more.
    pub services: usize,
    pub recovery: Option<Recovery>,
    pub loss_accepted: bool,
    /// Everything that was done and said, with times.
    pub story: String,
    /// Who serves at the end.
    pub active: Option<Who>,
}

/// The clients of a run, two at each gate.
pub fn clients_of(lab: &Lab, first_id: u32) -> Vec<Client> {
    let mut clients = Vec::new();
    for (node, habit) in [(0, Habit::Durable), (0, Habit::Local), (1, Habit::Durable), (1, Habit::Local)] {
        let at = lab.nodes()[node];
        clients.push(Client {
            id: first_id + u32::try_from(clients.len()).unwrap_or_default(),
            node,
            ns: at.ns().to_owned(),
            gate: at.address().to_owned(),
            habit,
            every: millis(10),
            patience: secs(2),
        });
    }
    clients
}

/// How long after the last action things are left as they are.
const TAIL: Duration = secs(4);

/// Plays the schedule of the seed. `first_id` and the three numbers after it are the clients'.
pub fn random_run(lab: &Lab, seed: u64, first_id: u32) -> Outcome<Report> {
    let stage = Stage::new(lab);
    let first = stage.serving().ok_or("nobody serves before the run begins")?;
    let steps: Vec<Step> =
        plan(seed).into_iter().map(|step| Step { action: step.action.seen_from(first), ..step }).collect();
    stage.tell(&format!("seed {seed}; {} serves", stage.node(first).name()));
    for step in &steps {
        stage.tell(&format!("  planned {:6} ms: {}", step.due.as_millis(), step.action));
    }
    let eyes = Eyes::open(lab)?;
    let clients = Clients::start(&lab.switch.ns, clients_of(lab, first_id))?;
    clients.wait_answer_of(first, now(), secs(10))?;
    let mended = play(&stage, &steps);
    let recovered = mended.and_then(|()| {
        let (who, recovery) = stage.bring_to_serve()?;
        stage.tell(&format!("{} serves: {recovery:?}", stage.node(who).name()));
        clients.wait_answer_of(who, now(), secs(10))?;
        Ok((who, recovery))
    });
    if let Err(error) = &recovered {
        stage.blame(error.0.clone());
    }
    reckon(&stage, clients, eyes, seed, recovered.ok())
}

/// What clients and eyes saw, judged.
pub fn reckon(
    stage: &Stage,
    clients: Clients,
    eyes: Eyes,
    seed: u64,
    recovered: Option<(Who, Recovery)>,
) -> Outcome<Report> {
    let habits = clients_of(stage.lab, 0);
    let log = clients.finish();
    let looks = eyes.finish();
    for wrong in overlaps(&log.acks).into_iter().chain(two_active(&looks)).chain(log.strangers.iter().cloned()) {
        stage.blame(wrong);
    }
    let accepted = stage.loss_accepted_until();
    if let Some((who, _)) = recovered {
        let mut ids: BTreeSet<u32> = log.acks.iter().map(|ack| ack.client).collect();
        ids.retain(|id| habits[(*id as usize - 1) % habits.len()].habit == Habit::Durable);
        for id in ids {
            let there = stage.node(who).postgres.numbers_of(id)?;
            let counts = |at: Instant| accepted.is_none_or(|until| at > until);
            let lost = |ack: &&super::trace::Ack| ack.client == id && counts(ack.at) && !there.contains(&ack.n);
            let missing: Vec<_> = log.acks.iter().filter(lost).collect();
            if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
                stage.blame(format!(
                    "{} acknowledged writes of client {id} are missing on {}: n {} (at {:.3} s) to n {} (at {:.3} s), \
                     timeline {}",
                    missing.len(),
                    stage.node(who).name(),
                    first.n,
                    first.at.since(stage.start).as_secs_f64(),
                    last.n,
                    last.at.since(stage.start).as_secs_f64(),
                    first.timeline,
                ));
            }
        }
    }
    let served = services(&log.acks);
    for service in &served {
        stage.tell(&format!(
            "served: {} on timeline {}, {} answers from {:.3} s to {:.3} s",
            stage.node(service.node).name(),
            service.timeline,
            service.answers,
            service.first.since(stage.start).as_secs_f64(),
            service.last.since(stage.start).as_secs_f64()
        ));
    }
    Ok(Report {
        seed,
        violations: stage.wrong(),
        answers: log.acks.len(),
        services: served.len(),
        recovery: recovered.map(|(_, recovery)| recovery),
        loss_accepted: accepted.is_some(),
        story: stage.story(),
        active: recovered.map(|(who, _)| who),
    })
}

/// Which actions wait for each other: those on one machine, and those on wires and DNS. Commands wait for nothing.
fn lane(action: Action) -> Option<usize> {
    use Action::*;
    match action {
        Freeze(n) | Thaw(n) | KillDaemon(n) | RestartDaemon(n) | StartDaemon(n) | PowerOff(n) | Boot(n) => Some(n),
        Promote(..) | Switchover(..) => None,
        _ => Some(2),
    }
}

/// Plays all steps at their times and mends everything; commands that still run are waited for at the end.
fn play(stage: &Stage, steps: &[Step]) -> Outcome {
    std::thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut lanes = Vec::new();
        for _ in 0..3 {
            let (sender, receiver) = channel::<Action>();
            senders.push(sender);
            lanes.push(scope.spawn(move || receiver.iter().for_each(|action| stage.perform(action))));
        }
        let begun = now();
        for step in steps {
            pause((begun + step.due).since(now()));
            match lane(step.action) {
                Some(lane) => drop(senders[lane].send(step.action)),
                None => drop(scope.spawn(move || stage.perform(step.action))),
            }
        }
        pause(TAIL);
        drop(senders);
        for lane in lanes {
            let _ = lane.join();
        }
        stage.mend()
    })
}
