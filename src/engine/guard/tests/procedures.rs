//! Every procedure, in every mode, with every step done twice, with a crash at every record, with a failure at every
//! step (issue 5, item 6). A run without faults is recorded and its steps are counted; then each step gets each fault
//! that its kind can have, in a run of its own. A new step is covered because it is there.
//!
//! Asked of each run: the laws hold at every event; it ends, with 0, 1, 3 or 4; after 1 or 3 nothing has changed, so
//! that the old node serves again by itself; the same command run again finishes it, with no word about data loss in
//! update mode; and at the end the pair is in sync and nothing that was acknowledged is missing.
//!
//! A failure names procedure, mode, step and fault, and prints one line per transition.

mod meddle;

use super::world::{Act, MS, World, address, name, secs};
use crate::base::time::{Duration, Instant};
use crate::engine::guard::Guard;
use crate::engine::setup::Mode;
use crate::engine::status::Role;
use crate::engine::turn::Command;
use meddle::Fault;
pub(super) use meddle::Meddler;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Longer than all limits of one procedure together.
const HANGS: Duration = secs(300);
/// Until a pair on which nothing was changed serves again, or one that is mended is in sync.
const BY_ITSELF: Duration = secs(90);
/// Who edits the record by hand leaves an edit standing for W.
const EDITS_APART: Duration = Duration::from_millis(3400);
/// How often a person runs the command again.
const AGAIN: usize = 2;

struct Procedure {
    name: &'static str,
    /// The pair just before it.
    begin: fn(Mode) -> World,
    order: fn(Mode) -> (usize, Command),
    /// Whose gate is open at the end.
    serves: usize,
    /// Whose gate is open again when nothing was changed.
    before: Option<usize>,
    /// Who has no power until it is over.
    dead: Option<usize>,
    done: fn(&World) -> bool,
}

const MODES: [Mode; 3] = [Mode::Update, Mode::Observe, Mode::VipOnly];

fn promote(mode: Mode, node: usize, peer_is_off: bool) -> Command {
    let accept_data_loss = peer_is_off && mode != Mode::Update;
    let peer_is_off = (peer_is_off && mode == Mode::VipOnly).then(|| name(1 - node));
    let _ = node;
    Command::Promote { dry_run: false, yes: true, accept_data_loss, peer_is_off }
}

const FAILOVER: Procedure = Procedure {
    name: "promote, the other node dead",
    begin: |mode| {
        let mut run = Run::new(in_sync(mode));
        run.world.loss_accepted = mode != Mode::Update;
        run.world.kill_all(0);
        if mode == Mode::VipOnly {
            run.world.nodes[0].off = true;
            run.world.run_for(secs(8));
        }
        run.world
    },
    order: |mode| (1, promote(mode, 1, true)),
    serves: 1,
    before: None,
    dead: Some(0),
    done: |world| world.serves(1),
};

const PLANNED: Procedure = Procedure {
    name: "promote, both alive",
    begin: in_sync,
    order: |mode| (1, promote(mode, 1, false)),
    serves: 1,
    before: Some(0),
    dead: None,
    done: |world| world.serves(1),
};

const SWITCHOVER: Procedure = Procedure {
    name: "switchover, asked for on the old node",
    begin: in_sync,
    order: |_| (0, Command::Switchover { to: Some(name(1)), dry_run: false }),
    serves: 1,
    before: Some(0),
    dead: None,
    done: |world| world.serves(1),
};

const REJOIN_HERE: Procedure = Procedure {
    name: "rejoin, asked for on the node that comes back",
    begin: fenced_beside_the_new,
    order: |_| (0, Command::Rejoin { node: name(0), dry_run: false }),
    serves: 1,
    before: Some(1),
    dead: None,
    done: rejoined,
};

const REJOIN_THERE: Procedure = Procedure {
    name: "rejoin, asked for on the active node",
    order: |_| (1, Command::Rejoin { node: name(0), dry_run: false }),
    ..REJOIN_HERE
};

const UNFENCE: Procedure = Procedure {
    name: "unfence",
    begin: |mode| {
        let mut run = Run::new(in_sync(mode));
        run.world.command(0, Command::Fence { reason: "test".into() });
        run.world.run_for(secs(5));
        run.world
    },
    order: |_| (0, Command::Unfence),
    serves: 0,
    before: None,
    dead: None,
    done: |world| world.serves(0),
};

fn rejoined(world: &World) -> bool {
    let node = &world.nodes[0];
    node.guard.as_ref().is_some_and(|guard| guard.role() == Role::Passive) && !node.shadow.rejoining && world.streams(0)
}

/// a serves and b stands by.
fn in_sync(mode: Mode) -> World {
    let mut run = Run::new(World::with(mode, 1));
    if mode != Mode::Update {
        run.world.run_for(secs(5));
        run.world.promote(0, false);
    }
    assert!(run.until(secs(60), in_sync_at(0)), "a pair of {mode:?}");
    run.world
}

fn in_sync_at(node: usize) -> impl Fn(&World) -> bool {
    move |world| {
        let look = |n: usize| world.nodes[n].guard.as_ref().map(|guard: &Guard| guard.in_sync());
        world.is_open(node) && look(node) == Some(true) && look(1 - node) == Some(true)
    }
}

/// b serves alone; a, which had served before it, is there again and fenced.
fn fenced_beside_the_new(mode: Mode) -> World {
    let mut run = Run::new((FAILOVER.begin)(mode));
    let (node, command) = (FAILOVER.order)(mode);
    let ticket = run.world.command(node, command);
    assert!(run.until(HANGS, |w| w.nodes[node].ends.contains_key(&ticket)), "{mode:?}");
    assert!(run.world.is_open(1), "{mode:?}: {:?}", run.world.nodes[1].ends);
    run.world.nodes[0].off = false;
    run.world.revive(0);
    assert!(run.until(secs(30), |w| w.nodes[0].shadow.fenced.is_some()), "{mode:?}: fenced");
    run.world.run_for(secs(5));
    // What a person gave up is gone; from here on everything counts again.
    run.world.loss_accepted = false;
    run.world.acked = run.world.nodes[1].pg.data.iter().copied().collect();
    run.world
}

/// A world, and the person who edits the address record when told to.
struct Run {
    world: World,
    read: [usize; 2],
    edited: Option<Instant>,
    edits: usize,
}

impl Run {
    fn new(mut world: World) -> Run {
        for node in &mut world.nodes {
            node.said.clear();
            node.ends.clear();
        }
        Run { world, read: [0; 2], edited: None, edits: 0 }
    }

    fn step(&mut self) {
        self.world.step();
        if self.world.mode != Mode::Observe {
            return;
        }
        for node in 0..2 {
            let said = &self.world.nodes[node].said;
            let wanted = format!("change the address record to db.example.org -> {} now", address(node));
            let told = said[self.read[node]..].iter().any(|line| line.contains(&wanted));
            self.read[node] = said.len();
            if told {
                let now = self.world.now;
                let at = self.edited.map_or(now, |edited| edited + EDITS_APART).max(now + MS * 300);
                self.edited = Some(at);
                self.edits += 1;
                self.world.post(at.since(now), super::world::Delivery::Act(Act::Edit(node)));
            }
        }
    }

    /// False: not within the limit, or a law was broken.
    fn until(&mut self, limit: Duration, done: impl Fn(&World) -> bool) -> bool {
        let end = self.world.now + limit;
        while !done(&self.world) {
            if self.world.now >= end || self.world.broken.is_some() {
                return false;
            }
            self.step();
        }
        true
    }

    /// What the command came to; `None`: its daemon ended before it.
    fn ordered(&mut self, node: usize, command: Command) -> Result<Option<(u8, String)>, String> {
        let life = self.world.nodes[node].life;
        let ticket = self.world.command(node, command);
        let gone = |w: &World| w.nodes[node].life != life || w.nodes[node].guard.is_none();
        let ended = |w: &World| w.nodes[node].ends.contains_key(&ticket) || gone(w);
        let mut over = self.until(HANGS, ended);
        if !over && self.world.mode == Mode::Observe && !self.world.dns_up {
            // It waits for the authorities, without a limit: somebody brings them back.
            self.world.dns_up = true;
            over = self.until(HANGS, ended);
        }
        if let Some((law, text)) = &self.world.broken {
            return Err(format!("{law}: {text}"));
        }
        let ended = self.world.nodes[node].ends.get(&ticket).cloned();
        match ended {
            Some((exit, text)) if ![0, 1, 3, 4].contains(&exit) => Err(format!("exit {exit}: {text}")),
            None if !over => Err(format!("the command on {} hangs: {}", name(node), self.world.state_of(node))),
            ended => Ok(ended),
        }
    }

    fn lawful(&self) -> Result<(), String> {
        self.world.broken.as_ref().map_or(Ok(()), |(law, text)| Err(format!("{law}: {text}")))
    }
}

/// How a run with one fault went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Went {
    /// Of the first command; none: its daemon ended.
    exit: Option<u8>,
    /// How often it was run again.
    again: usize,
}

fn play(what: &Procedure, mode: Mode, run: &mut Run, fault: Option<(Option<usize>, Fault)>) -> Result<Went, String> {
    run.world.strict = false;
    run.world.meddler = Some(Box::new(Meddler::with(fault)));
    let marker = run.world.marker();
    let (node, command) = (what.order)(mode);
    let first = run.ordered(node, command.clone())?;
    let exit = first.as_ref().map(|(exit, _)| *exit);
    if matches!(fault, None | Some((_, Fault::Twice | Fault::CopyLater))) {
        if exit != Some(0) || !(what.done)(&run.world) {
            return Err(format!("the same end: {first:?}"));
        }
        // What comes late, and what the nodes do afterwards, is doubled as well.
        run.until(secs(15), |_| false);
        run.lawful()?;
    }
    run.world.mend(what.dead);
    if matches!(exit, Some(1 | 3)) {
        let moved = run.world.marker().map(|m| m.epoch) != marker.map(|m| m.epoch);
        if moved && mode == Mode::Update {
            return Err(format!("{first:?}, but the record moved to {:?}", run.world.marker()));
        }
        if let Some(before) = what.before.filter(|_| run.edits == 0)
            && !run.until(BY_ITSELF, |w| w.serves(before))
        {
            run.lawful()?;
            let gate = run.world.snapshot(before).gate;
            return Err(format!("{first:?}, and the old node does not serve again: {gate:?}"));
        }
    }
    let mut again = 0;
    let mut last = first;
    while !(last.as_ref().is_some_and(|(exit, _)| *exit == 0) && (what.done)(&run.world)) {
        again += 1;
        if again > AGAIN {
            return Err(format!("run again {AGAIN} times, and at the end: {last:?}"));
        }
        run.until(secs(3), |_| false);
        let refused = last.as_ref().is_some_and(|(exit, _)| *exit == 3);
        // "promote decides by itself which case it is".
        let (node, command) = match &command {
            Command::Switchover { .. } if refused => (what.serves, promote(mode, what.serves, false)),
            _ => (node, command.clone()),
        };
        last = run.ordered(node, command)?;
    }
    whole_again(what, run)?;
    Ok(Went { exit, again })
}

/// Both nodes there, in sync, and nothing missing.
fn whole_again(what: &Procedure, run: &mut Run) -> Result<(), String> {
    let (active, other) = (what.serves, 1 - what.serves);
    if what.dead.is_some() {
        run.world.nodes[other].off = false;
        run.world.mend(None);
    }
    let mut last = None;
    for _ in 0..=3 {
        if run.until(if last.is_none() { secs(30) } else { BY_ITSELF }, in_sync_at(active)) {
            let missing = run.world.missing_on(active).filter(|_| !run.world.loss_accepted);
            return missing.map_or(Ok(()), Err);
        }
        run.lawful()?;
        last = Some(run.ordered(active, Command::Rejoin { node: name(other), dry_run: false })?);
    }
    Err(format!("not in sync again, after rejoin: {last:?}; {}", run.world.state_of(active)))
}

/// One run; a panic of the guard or of a law is a failure like any other.
fn attempt(
    what: &Procedure,
    mode: Mode,
    base: &World,
    fault: Option<(Option<usize>, Fault)>,
    tell_it: bool,
) -> Result<Went, String> {
    let mut run = Run::new(base.clone());
    let outcome = catch_unwind(AssertUnwindSafe(|| play(what, mode, &mut run, fault)));
    let outcome = outcome.unwrap_or_else(|_| Err("a panic, see above".to_owned()));
    if outcome.is_err() && tell_it {
        let mut telling = base.clone();
        telling.log = Some(Vec::new());
        let mut run = Run::new(telling);
        let _same = catch_unwind(AssertUnwindSafe(|| play(what, mode, &mut run, fault)));
        tell(&run.world, what, mode, fault);
    }
    outcome
}

/// One line per transition.
fn tell(world: &World, what: &Procedure, mode: Mode, fault: Option<(Option<usize>, Fault)>) {
    eprintln!("--- {} in {mode:?}, {fault:?}", what.name);
    let mut before = ["", ""];
    for line in world.log.iter().flatten() {
        let node = match line.split(' ').nth(1) {
            Some("a") => 0,
            Some("b") => 1,
            _ => 2,
        };
        let state = line.rsplit_once(": ").map_or("", |(_, state)| state);
        if node < 2 && before[node] == state {
            continue;
        }
        if node < 2 {
            before[node] = state;
        }
        eprintln!("{line}");
    }
    for (n, node) in world.nodes.iter().enumerate() {
        eprintln!("{}: {:?}\n  {:?}\n  ends {:?}", name(n), node.pg, node.shadow, node.ends);
    }
    eprintln!("record {:?}", world.record);
}

/// What the nodes do without being told.
struct ByItself {
    name: &'static str,
    /// The pair just before it.
    begin: fn(Mode) -> World,
    because: Act,
    done: fn(&World) -> bool,
}

/// The standby is there again: the list is armed, and the record says so last.
const ARMING: ByItself = ByItself {
    name: "arming",
    begin: alone,
    because: Act::PowerOn(1),
    done: |world| in_sync_at(0)(world) && world.nodes[0].pg.list == "\"b\"",
};

/// a serves alone, as the record says; b is off.
fn alone(mode: Mode) -> World {
    let mut run = Run::new(World::with(mode, 1));
    if mode == Mode::Update {
        assert!(run.until(secs(30), |w| w.is_open(0)), "a pair of {mode:?}");
        run.world.act(Act::PowerOff(1));
    } else {
        run.world.run_for(secs(5));
        run.world.act(Act::PowerOff(1));
        run.world.run_for(secs(8));
        run.world.command(0, promote(mode, 0, true));
    }
    run.until(secs(15), |_| false);
    let list = &run.world.nodes[0].pg.list;
    assert!(run.world.is_open(0) && list.is_empty(), "alone in {mode:?}: {list:?}, {}", run.world.state_of(0));
    run.world
}

fn play_by_itself(what: &ByItself, run: &mut Run, fault: Option<(Option<usize>, Fault)>) -> Result<Went, String> {
    run.world.strict = false;
    run.world.meddler = Some(Box::new(Meddler::with(fault)));
    run.world.act(what.because.clone());
    // Whatever a machine that failed took with it, it is there again.
    let done = |w: &World| (what.done)(w) && w.nodes.iter().all(|node| node.guard.is_some());
    let mut again = 0;
    while !run.until(secs(60), done) {
        run.lawful()?;
        again += 1;
        if again > 2 {
            return Err(format!("it does not come to its end: {}", run.world.state_of(0)));
        }
        run.world.mend(None);
    }
    // What was late comes now.
    run.until(secs(15), |_| false);
    run.world.mend(None);
    if !run.until(BY_ITSELF, done) {
        run.lawful()?;
        return Err(format!("it does not last: {}", run.world.state_of(0)));
    }
    let active = usize::from(run.world.is_open(1));
    run.lawful().and(run.world.missing_on(active).map_or(Ok(Went { exit: None, again }), Err))
}

/// The same treatment of what nobody ordered.
fn every_step_by_itself(what: &ByItself) {
    let mut bad = Vec::new();
    let (mut runs, mut steps) = (0, 0);
    for mode in MODES {
        let base = (what.begin)(mode);
        let recorded = {
            let mut run = Run::new(base.clone());
            run.world.meddler = Some(Box::default());
            run.world.act(what.because.clone());
            assert!(run.until(secs(60), what.done), "{} in {mode:?}", what.name);
            run.world.meddler.take().map(|m| m.steps).unwrap_or_default()
        };
        steps += recorded.len();
        let each = recorded.iter().enumerate();
        let each = each.flat_map(|(number, (_, kind))| kind.faults().iter().map(move |fault| (Some(number), *fault)));
        for fault in std::iter::once((None, Fault::Twice)).chain(each) {
            runs += 1;
            let mut run = Run::new(base.clone());
            let outcome = catch_unwind(AssertUnwindSafe(|| play_by_itself(what, &mut run, Some(fault))));
            if let Err(why) = outcome.unwrap_or_else(|_| Err("a panic, see above".to_owned())) {
                let step = fault.0.map(|number| recorded[number]);
                bad.push(format!("{mode:?} {fault:?} at {step:?}: {why}"));
            }
        }
    }
    eprintln!("figure: {}: {steps} steps in 3 modes, {runs} runs, {} bad", what.name, bad.len());
    assert!(bad.is_empty(), "{}: {} of {runs} runs:\n{}", what.name, bad.len(), bad.join("\n"));
}

/// The whole treatment of one procedure in all modes.
fn every_step_of(what: &Procedure) {
    let mut bad = Vec::new();
    let (mut runs, mut steps) = (0, 0);
    let mut went: BTreeMap<Went, u64> = BTreeMap::new();
    for mode in MODES {
        let base = (what.begin)(mode);
        let recorded = {
            let mut run = Run::new(base.clone());
            run.world.meddler = Some(Box::default());
            let (node, command) = (what.order)(mode);
            let ended = run.ordered(node, command);
            assert!(matches!(ended, Ok(Some((0, _)))), "{} in {mode:?}: {ended:?}", what.name);
            // What the nodes do afterwards by themselves belongs to it: the old one follows, the list is armed.
            run.until(secs(12), in_sync_at(what.serves));
            run.world.meddler.take().map(|m| m.steps).unwrap_or_default()
        };
        steps += recorded.len();
        let mut faults: Vec<_> = vec![Some((None, Fault::Twice))];
        for (number, (_, kind)) in recorded.iter().enumerate() {
            faults.extend(kind.faults().iter().map(|fault| Some((Some(number), *fault))));
        }
        for fault in faults {
            runs += 1;
            match attempt(what, mode, &base, fault, bad.is_empty()) {
                Ok(how) => *went.entry(how).or_default() += 1,
                Err(why) => {
                    let step = fault.and_then(|(number, _)| number).map(|number| recorded[number]);
                    bad.push(format!("{mode:?} {fault:?} at {step:?}: {why}"));
                }
            }
        }
    }
    eprintln!("figure: {}: {steps} steps in 3 modes, {runs} runs, {} bad; {went:?}", what.name, bad.len());
    assert!(bad.is_empty(), "{}: {} of {runs} runs:\n{}", what.name, bad.len(), bad.join("\n"));
}

#[test]
fn promote_of_a_dead_node_survives_every_fault_at_every_step() {
    every_step_of(&FAILOVER);
}

#[test]
fn promote_with_both_alive_survives_every_fault_at_every_step() {
    every_step_of(&PLANNED);
}

#[test]
fn switchover_from_the_old_node_survives_every_fault_at_every_step() {
    every_step_of(&SWITCHOVER);
}

#[test]
fn rejoin_on_the_node_itself_survives_every_fault_at_every_step() {
    every_step_of(&REJOIN_HERE);
}

#[test]
fn rejoin_from_the_active_node_survives_every_fault_at_every_step() {
    every_step_of(&REJOIN_THERE);
}

#[test]
fn unfence_survives_every_fault_at_every_step() {
    every_step_of(&UNFENCE);
}

#[test]
fn arming_survives_every_fault_at_every_step() {
    every_step_by_itself(&ARMING);
}
