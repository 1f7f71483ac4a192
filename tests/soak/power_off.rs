//! A hundred power-offs of the active node under load, each followed by a promote on the other one and a rejoin
//! (issue 5). Every figure is from the clients' own logs: which writes were acknowledged and when, which rows a reader
//! was shown. After each round and at the end both nodes must hold them all.

use crate::harness::Lab;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::net::at;
use crate::harness::node::Node;
use crate::harness::sys::{Fail, Outcome, millis, ms, now, pause, secs, wait_until};
use crate::play::plan::Rng;
use crate::play::readers::{Reader, Seen};
use crate::play::stage::{Stage, TELL_LIVE};
use crate::table::{Percentiles, table};
use portcullis::base::time::Instant;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// How long before the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Silence {
    /// The command is given the instant it died.
    None,
    /// It had been silent for 2 s.
    TwoSeconds,
    /// It is alive and its gate fenced by a person: it answers, and confirms that it serves no longer (C15).
    Released,
}

/// W with lease 3 s, drift 1 %, margin 200 ms, in milliseconds, and what the issue allows on top of it.
const W: i64 = 3261;

impl Silence {
    pub fn limit(self) -> i64 {
        match self {
            Silence::None => W + 3500,
            Silence::TwoSeconds => W + 1500,
            Silence::Released => 2000,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Silence::None => "died that instant",
            Silence::TwoSeconds => "silent for 2 s",
            Silence::Released => "released",
        }
    }
}

/// Writers and readers, each on a thread of its own.
pub struct Load {
    writers: Vec<Writer>,
    readers: Vec<Reader>,
    /// Acknowledgements that were checked already, of each writer.
    checked: Vec<usize>,
    pub acknowledged: usize,
    pub shown: usize,
}

impl Load {
    pub fn start(lab: &Lab) -> Outcome<Load> {
        let dns = at(lab.witness.address(), 53);
        let ids = [1, 2, 3, 4];
        let options = |id| WriterOptions {
            every: millis(10),
            target: Target::Service { dns: dns.clone() },
            ..WriterOptions::service(id, lab.witness.address())
        };
        let writers: Outcome<Vec<_>> =
            ids.iter().map(|id| Writer::start_flowing(lab.client.ns(), options(*id))).collect();
        let readers: Outcome<Vec<_>> = (0..2).map(|_| Reader::start(lab.client.ns(), &dns, &ids)).collect();
        let writers = writers?;
        let checked = vec![0; writers.len()];
        Ok(Load { writers, readers: readers?, checked, acknowledged: 0, shown: 0 })
    }

    /// The first acknowledgement through this node's gate after the moment, whichever writer got it.
    fn first_ack(&self, node: &Node, after: Instant) -> Outcome<Instant> {
        let gate = node.gate()?;
        let mut first: Option<Instant> = None;
        wait_until(secs(30), &format!("a write acknowledged by {}", node.name()), || {
            let acks = self.writers.iter().filter_map(|writer| writer.first_ack_via(gate, after));
            first = acks.min();
            Ok(first.is_some())
        })?;
        first.ok_or_else(|| Fail("no acknowledgement".to_owned()))
    }

    fn last_ack(&self) -> Option<Instant> {
        self.writers.iter().filter_map(|writer| writer.log().last_ack()).map(|ack| ack.at).max()
    }

    /// What was acknowledged or shown since the last time and is not on this node: C8 and C9.
    fn missing(&mut self, node: &Node) -> Outcome<[Vec<String>; 2]> {
        let mut seen = Seen::new();
        for reader in &self.readers {
            seen.extend(reader.take());
        }
        self.shown += seen.len();
        let mut missing = [Vec::new(), Vec::new()];
        for (index, writer) in self.writers.iter().enumerate() {
            let acks = writer.log().acks;
            let fresh = &acks[self.checked[index]..];
            let shown: Vec<u64> = seen.keys().filter(|(w, _)| *w == writer.id).map(|(_, n)| *n).collect();
            let from = fresh.iter().map(|ack| ack.n).chain(shown.iter().copied()).min().unwrap_or(0);
            let there = node.postgres.numbers_since(writer.id, from)?;
            let gone = |n: &u64| !there.contains(n);
            missing[0]
                .extend(fresh.iter().map(|ack| ack.n).filter(gone).map(|n| format!("writer {} n {n}", writer.id)));
            missing[1].extend(shown.into_iter().filter(gone).map(|n| format!("writer {} n {n}", writer.id)));
            self.checked[index] = acks.len();
            self.acknowledged += fresh.len();
        }
        Ok(missing)
    }

    /// The whole log once more, on a node that replays.
    fn lost_at_the_end(&self, node: &Node) -> Outcome<usize> {
        let mut lost = 0;
        wait_until(secs(30), &format!("{} to hold all that was acknowledged", node.name()), || {
            lost = 0;
            for writer in &self.writers {
                lost += writer.lost_on(&node.postgres)?.len();
            }
            Ok(lost == 0)
        })
        .or_else(|error| if lost > 0 { Ok(secs(0)) } else { Err(error) })?;
        Ok(lost)
    }
}

/// One power-off.
struct Round {
    silence: Silence,
    died: String,
    /// From Enter to the first acknowledged write on the other side; from the last one before to that one.
    enter_to_write: i64,
    gap: i64,
    promote: i64,
    exits: Vec<i32>,
    rejoin: i64,
    lost: usize,
    vanished: usize,
}

/// All rounds; the violations.
pub fn power_off(lab: &Lab, rounds: u64, seed: u64, released: bool, mut fed: impl FnMut()) -> Outcome<Vec<String>> {
    let mut rng = Rng::new(seed);
    let stage = Stage::new(lab);
    let mut load = Load::start(lab)?;
    let mut done: Vec<Round> = Vec::new();
    let mut violations = Vec::new();
    for number in 0..rounds {
        fed();
        let silence = match number % 2 {
            _ if released => Silence::Released,
            0 => Silence::None,
            _ => Silence::TwoSeconds,
        };
        let round = one(&stage, &mut load, silence, &mut rng)?;
        println!(
            "power-off {}/{rounds}: {} {}; first write {} ms after Enter (at most {}), clients were without for {} ms; \
             promote {:?} in {} ms, rejoin {} ms; {} lost, {} vanished",
            number + 1,
            round.died,
            silence.word(),
            round.enter_to_write,
            silence.limit(),
            round.gap,
            round.exits,
            round.promote,
            round.rejoin,
            round.lost,
            round.vanished
        );
        if round.lost + round.vanished > 0 {
            violations.push(format!("round {}: {} lost, {} vanished", number + 1, round.lost, round.vanished));
        }
        if round.exits.as_slice() != [0] {
            violations.push(format!("round {}: promote ended with {:?}", number + 1, round.exits));
        }
        if round.enter_to_write > silence.limit() {
            let text = format!("{} ms, at most {}", round.enter_to_write, silence.limit());
            violations.push(format!("round {}: the first write took {text}", number + 1));
        }
        done.push(round);
    }
    for node in lab.nodes() {
        let lost = load.lost_at_the_end(node)?;
        if lost > 0 {
            violations.push(format!("at the end {lost} acknowledged writes are missing on {}", node.name()));
        }
    }
    print(&done, &load);
    violations.extend(stage.wrong());
    Ok(violations)
}

fn one(stage: &Stage, load: &mut Load, silence: Silence, rng: &mut Rng) -> Outcome<Round> {
    let active = stage.serving().ok_or("nobody serves before the round begins")?;
    let (old, new) = (stage.node(active), stage.node(1 - active));
    new.wait_peer()?;
    // Anywhere within a poll, and with enough written to be lost.
    load.first_ack(old, now())?;
    pause(millis(1000 + rng.below(1000)));
    let dark = if silence == Silence::Released {
        let fenced = old.cli(&["fence", "--reason", "to be released"])?;
        stage.quote(active, &fenced);
        fenced.expect(0)?.ended
    } else {
        old.power_off()?
    };
    if silence == Silence::TwoSeconds {
        pause(secs(2).saturating_sub(now().since(dark)));
    }
    let mut exits = Vec::new();
    let entered = now();
    let mut promote = 0;
    let mut told = String::new();
    while exits.last() != Some(&0) {
        if exits.len() > 3 {
            return Err(Fail(format!("promote on {} ended with {exits:?}", new.name())));
        }
        let said = new.cli(&["promote", "--yes"])?;
        stage.quote(1 - active, &said);
        told.push_str(&said.out);
        told.push_str(&said.err);
        promote = ms(entered, said.ended);
        exits.push(said.code);
    }
    let first = load.first_ack(new, entered)?;
    let live = TELL_LIVE.load(Ordering::Relaxed);
    if live || exits != [0] || ms(entered, first) > silence.limit() {
        println!("{told}");
    }
    let last = load.writers.iter().flat_map(|w| w.log().acks).map(|ack| ack.at).filter(|at| *at < first).max();
    // A second of service, so that the readers are shown what the new node has.
    pause(secs(1));
    let [lost, vanished] = load.missing(new)?;
    for text in lost.iter().chain(&vanished).take(10) {
        println!("  missing on {}: {text}", new.name());
    }
    let begun = now();
    if silence == Silence::Released {
        // It was handed over to, and has become the standby by itself.
        new.wait_peer()?;
    } else {
        old.boot()?;
        new.wait_peer()?;
        old.wait_role("fenced", secs(60))?;
    }
    stage.restore(1 - active)?;
    new.wait_in_sync(secs(60))?;
    old.postgres.forget_old_lives()?;
    if silence != Silence::Released {
        load.last_ack().filter(|at| *at > begun).ok_or("no write was acknowledged during the rejoin")?;
    }
    Ok(Round {
        silence,
        died: old.name().to_owned(),
        enter_to_write: ms(entered, first),
        gap: ms(last.unwrap_or(dark), first),
        promote,
        exits,
        rejoin: ms(begun, now()),
        lost: lost.len(),
        vanished: vanished.len(),
    })
}

fn print(rounds: &[Round], load: &Load) {
    let mut rows = BTreeMap::new();
    for round in rounds {
        let of = rows.entry(round.silence).or_insert_with(|| [const { Vec::new() }; 4]);
        for (list, value) in of.iter_mut().zip([round.enter_to_write, round.gap, round.promote, round.rejoin]) {
            list.push(value);
        }
    }
    let mut lines = Vec::new();
    for (silence, [write, gap, promote, rejoin]) in rows {
        for (what, values) in [
            ("Enter to first acknowledged write", write),
            ("writers without service", gap),
            ("promote", promote),
            ("rejoin until in sync", rejoin),
        ] {
            lines.push((format!("{}: {what}", silence.word()), Percentiles::of(values)));
        }
    }
    println!("{}", table(&lines));
    let (lost, vanished) = rounds.iter().fold((0, 0), |(l, v), round| (l + round.lost, v + round.vanished));
    println!(
        "figure: power-off: {} power-offs, {} writes acknowledged and {lost} of them missing, {} rows shown to readers \
         and {vanished} of them gone",
        rounds.len(),
        load.acknowledged,
        load.shown
    );
}
