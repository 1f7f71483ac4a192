//! Both nodes promoted at once: one of them wins the record, and everybody agrees who.

use super::clients::Clients;
use super::eyes::Eyes;
use super::plan::{Action, Ask, Who};
use super::run::{Report, clients_of, reckon};
use super::stage::{Recovery, Stage};
use crate::harness::Lab;
use crate::harness::node::{Node, text_at};
use crate::harness::sys::{Fail, Outcome, now, secs, wait_until};
use std::sync::Barrier;

/// What stands when the two operators press Enter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The old active node is fenced by hand; the nodes hear each other.
    Fenced,
    /// The same, but the peer channel is cut: neither can ask the other, the record alone decides.
    FencedApart,
    /// The old active node serves.
    Alive,
    /// It serves and the nodes do not hear each other; promoted again and again while the other takes over.
    AliveApart,
    /// It serves its own clients and is cut off from everybody: its lease still runs when the other is promoted.
    CutOff,
    /// Its daemon was killed and comes back.
    Killed,
    /// It lost power and comes back.
    PowerLost,
}

pub const STARTS: [Start; 7] = [
    Start::FencedApart,
    Start::CutOff,
    Start::Killed,
    Start::AliveApart,
    Start::Fenced,
    Start::PowerLost,
    Start::Alive,
];

/// What a round came to, beside the reckoning of the clients.
#[derive(Debug)]
pub struct Round {
    pub start: Start,
    pub report: Report,
    /// Nodes whose compare-and-swap won in this round: one, or none where the old active node serves on, or both where
    /// one took over from the other in turn.
    pub took: usize,
}

/// One race on a pair that is whole.
pub fn race_round(lab: &Lab, start: Start, first_id: u32) -> Outcome<Round> {
    let stage = Stage::new(lab);
    let old = stage.serving().ok_or("nobody serves before the race")?;
    stage.tell(&format!("race {start:?}; {} serves", stage.node(old).name()));
    let eyes = Eyes::open(lab)?;
    let clients = Clients::start(&lab.switch.ns, clients_of(lab, first_id))?;
    clients.wait_answer_of(old, now(), secs(20))?;
    let before = [won(&lab.a)?, won(&lab.b)?];
    prepare(&stage, start, old)?;
    run_both(&stage, start, old);
    stage.perform(Action::Heal);
    let settled = settle(&stage);
    // A boot that failed half-way is a finding of its own; the race is judged on two nodes that run.
    if stage.lab.nodes().into_iter().any(|node| node.status().is_err()) {
        stage.mend()?;
    }
    let after = [won(&lab.a)?, won(&lab.b)?];
    let took = [0, 1].into_iter().filter(|who| after[*who] > before[*who]).count();
    match settled {
        Ok(who) => {
            if let Err(error) = agree(&stage, who) {
                stage.blame(error.0);
            }
            if took == 0 && who == old && start != Start::Alive {
                // Killed and started again, or booted again, the old one may open its own epoch once more.
                stage.tell("  the old active node serves on");
            }
        }
        Err(error) => stage.blame(format!("no winner: {error}")),
    }
    let recovered = match settle(&stage) {
        Ok(who) => Some((who, Recovery::ByItself)),
        Err(_) => stage.bring_to_serve().ok(),
    };
    if let Some((who, _)) = recovered {
        clients.wait_answer_of(who, now(), secs(10))?;
    }
    let report = reckon(&stage, clients, eyes, 0, recovered)?;
    Ok(Round { start, report, took })
}

fn prepare(stage: &Stage, start: Start, old: Who) -> Outcome {
    match start {
        Start::Fenced | Start::FencedApart => {
            let said = stage.node(old).cli(&["fence", "--reason", "race"])?.expect(0)?;
            stage.quote(old, &said);
            if start == Start::FencedApart {
                stage.perform(Action::CutPeerChannel);
            }
        }
        Start::AliveApart => stage.perform(Action::CutPeerChannel),
        Start::CutOff => stage.perform(Action::CutOff(old)),
        Start::Killed => stage.perform(Action::KillDaemon(old)),
        Start::PowerLost => stage.perform(Action::PowerOff(old)),
        Start::Alive => {}
    }
    Ok(())
}

/// Both operators at once; the old active node's waits until its daemon is back.
fn run_both(stage: &Stage, start: Start, old: Who) {
    let line = Barrier::new(2);
    std::thread::scope(|scope| {
        let line = &line;
        let taker = scope.spawn(move || {
            line.wait();
            let _ = stage.promote(1 - old, Ask::Plain);
        });
        match start {
            Start::Killed => stage.perform(Action::StartDaemon(old)),
            Start::PowerLost => stage.perform(Action::Boot(old)),
            _ => {}
        }
        line.wait();
        let _ = stage.promote(old, Ask::Plain);
        while start == Start::AliveApart && !taker.is_finished() {
            let _ = stage.promote(old, Ask::Plain);
        }
    });
}

/// One node serves, and no procedure is under way on either.
fn settle(stage: &Stage) -> Outcome<Who> {
    let mut found = None;
    wait_until(secs(30), "one node to serve after the race", || {
        found = stage.serving();
        let busy = |node: &Node| node.status().is_ok_and(|status| status["procedure"] != serde_json::Value::Null);
        Ok(found.is_some() && !stage.lab.nodes().into_iter().any(busy))
    })?;
    found.ok_or_else(|| Fail("nobody serves".to_owned()))
}

fn won(node: &Node) -> Outcome<u64> {
    Ok(node.status()?["journal"]["won"].as_u64().unwrap_or_default())
}

/// Epochs, marker and address record all say that this node won.
fn agree(stage: &Stage, who: Who) -> Outcome {
    let (winner, loser) = (stage.node(who), stage.node(1 - who));
    let (ours, theirs) = (won(winner)?, won(loser)?);
    crate::ensure!(ours > theirs, "{} serves but won epoch {ours}, the other {theirs}", winner.name());
    let marker = stage.lab.witness.marker()?.unwrap_or_default();
    crate::ensure!(stage.named(&marker) == Some(who), "{} serves, and the marker says {marker}", winner.name());
    let epoch = format!(" epoch={ours} ");
    crate::ensure!(marker.contains(&epoch), "{} serves epoch {ours}, and the marker says {marker}", winner.name());
    let addresses = stage.lab.witness.service_addresses()?;
    crate::ensure!(addresses == [winner.address()], "{} serves, and the record says {addresses:?}", winner.name());
    let role = text_at(&loser.status()?, "/role");
    crate::ensure!(role != "active", "the loser says {role}");
    Ok(())
}
