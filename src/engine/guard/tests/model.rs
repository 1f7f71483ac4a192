//! The model: two guards, the very code, explored exhaustively by `stateright` in a world that an adversary may
//! disturb.
//!
//! The state is the whole [`World`]. One step runs it to the next thing that could go wrong: the head of the queue,
//! which is then delivered promptly and in order. Instead, at every such step, the adversary may spend one of `k`
//! deviations: lose, delay or copy the head; fail the journal or PostgreSQL; kill, crash, stop or freeze a node that
//! takes part in it; cut a wire one way or both; or give an order. Cuts and crashes heal by themselves after one of a
//! few set times (never, too). So every history with at most `k` deviations inside the window is visited, and nothing
//! else is claimed.
//!
//! Timers are coarse (lease 4 s, poll 2 s, looks 1 s) and the clocks as far apart as `max_drift` = 0.1 allows, both
//! ways. What is NOT here: rates that change, three faults at once beyond `k`, what tests/random plays over long
//! histories.
//!
//! `PORTCULLIS_MODEL_DEVIATIONS` (k, 1 unless told), `PORTCULLIS_MODEL_SCENARIO` (one of them by name),
//! `PORTCULLIS_MODEL_THREADS`.

use super::laws::{
    MISSING, ONE_OWNER, OPEN_RIGHTLY, SERVES_AGAIN, TOLD, TOO_EARLY, TRUE_RECORD, TWO_GATES, UNRECORDED,
};
use super::scenarios::{
    ALMOST, ALONE, CONSENTED, FAR, LATE, LEASE, LONG, MET, NEVER, RACE, SHORT, Scenario, State, UPDATE_LATE,
    UPDATE_LOST, at_work, scenarios,
};
use super::world::{Act, Cut, Delivery, MS, World, address, name, secs};
use crate::base::time::Duration;
use crate::engine::guard::Guard;
use crate::engine::setup::Mode;
use crate::engine::turn::{Command, Event, PeerQuestion};
use crate::wire::dns::{RecordPair, UpdateOutcome};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::sync::atomic::{AtomicU64, Ordering};

/// One thing that happens instead of the prompt delivery of the head.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Go,
    Lose,
    Delay(Duration),
    /// Delivered, and once more after this time.
    Again(Duration),
    /// The journal or PostgreSQL answers an error; the bool: PostgreSQL did it all the same.
    Fail(bool),
    /// An act, and after this time the daemon or the machine is there again.
    Down(Act, Duration),
    Cut(Cut, Duration),
    Act(Act),
}

struct Guards {
    deviations: u8,
    scenarios: Vec<Scenario>,
    met: [AtomicU64; MET.len()],
    turns: AtomicU64,
    leaves: AtomicU64,
    healed: AtomicU64,
    /// Of so many ends of histories one is healed and run on.
    sample: u64,
}

fn busy(guard: &Guard) -> bool {
    guard.takeover.is_some() || guard.rejoin.is_some()
}

impl Guards {
    fn new(deviations: u8, sample: u64, only: Option<&str>) -> Guards {
        let mut scenarios = scenarios();
        scenarios.retain(|s| only.is_none_or(|only| s.name == only));
        assert!(!scenarios.is_empty(), "no scenario {only:?}");
        let met = std::array::from_fn(|_| AtomicU64::new(0));
        let [turns, leaves, healed] = std::array::from_fn(|_| AtomicU64::new(0));
        Guards { deviations, scenarios, met, turns, leaves, healed, sample }
    }

    /// Runs to the next moment at which the adversary has a choice.
    fn run_on(&self, state: &mut State) {
        let world = &mut state.world;
        loop {
            if world.broken.is_some() || world.now >= state.end {
                return;
            }
            if world.now > state.window {
                state.left = 0;
            }
            if state.left > 0 && world.head().is_some_and(|head| branches(head, world)) {
                return;
            }
            let second = world.now.as_nanos() / 1_000_000_000;
            world.step();
            let takeovers = world.nodes.iter().filter(|n| n.guard.as_ref().is_some_and(|g| g.takeover.is_some()));
            state.past |= if takeovers.count() == 2 { RACE } else { 0 };
            state.past |= if world.nodes[0].shadow.consented { CONSENTED } else { 0 };
            state.past |= match world.marker() {
                Some(m) if m.sync.is_none() => ALONE,
                _ => 0,
            };
            // Undisturbed histories are looked at once a second: often enough for those that have become one again.
            if state.left == 0 && world.now.as_nanos() / 1_000_000_000 != second {
                return;
            }
        }
    }

    fn play(&self, state: &mut State, step: Step) {
        let world = &mut state.world;
        if step == Step::Go {
            world.step();
            return;
        }
        state.left -= 1;
        let at = world.queue.keys().next().map(|(at, _)| *at).expect("a head");
        world.now = world.now.max(at);
        world.note(|w| format!("{step:?} instead of {:?}", w.queue.values().next()));
        match step {
            Step::Go => {}
            Step::Lose | Step::Delay(_) | Step::Again(_) | Step::Fail(_) => {
                let Some((_, head)) = world.queue.pop_first() else { return };
                state.past |= match (&head, &step) {
                    (Delivery::Update { .. }, Step::Lose) => UPDATE_LOST,
                    (Delivery::Update { .. }, Step::Delay(_)) => UPDATE_LATE,
                    _ => 0,
                };
                disturb(world, head, &step);
            }
            Step::Down(act, back) => {
                let (Act::Kill(node) | Act::Crash(node) | Act::StopPg(node)) = act else { return };
                world.act(act);
                if back < NEVER {
                    world.post(back, Delivery::Revive(node));
                }
            }
            Step::Cut(cut, time) => {
                world.cut(cut, true);
                if time < NEVER {
                    world.post(time, Delivery::Heal(cut));
                }
            }
            Step::Act(act) => world.act(act),
        }
    }
}

/// The head is lost, late, doubled, or fails.
fn disturb(world: &mut World, head: Delivery, step: &Step) {
    let silence = |event: &Event| match event {
        Event::WitnessAnswered { question, .. } => {
            Some(Event::WitnessAnswered { question: *question, answer: Err("lost".into()) })
        }
        Event::UpdateAnswered { op, .. } => {
            Some(Event::UpdateAnswered { op: *op, outcome: UpdateOutcome::Unknown("lost".into()) })
        }
        Event::NeighbourAnswered { question, .. } => {
            Some(Event::NeighbourAnswered { question: *question, answer: Err("lost".into()) })
        }
        _ => None,
    };
    match (head, step) {
        (Delivery::To(node, life, event), Step::Lose) => {
            if let Some(event) = silence(&event) {
                world.post(ALMOST, Delivery::To(node, life, event));
            }
        }
        (Delivery::Update { node, life, op, prerequisite, next, limit }, step) => match step {
            Step::Again(time) => {
                world.post(*time, Delivery::Landing { prerequisite: prerequisite.clone(), next: next.clone() });
                world.deliver(Delivery::Update { node, life, op, prerequisite, next, limit });
            }
            step => {
                let event = Event::UpdateAnswered { op, outcome: UpdateOutcome::Unknown("no answer".into()) };
                world.post(limit, Delivery::To(node, life, event));
                if let Step::Delay(time) = step {
                    world.post(*time, Delivery::Landing { prerequisite, next });
                }
            }
        },
        (Delivery::Ask { from, life, question, ask, .. }, Step::Again(time)) => {
            world.post(*time, Delivery::Ask { from, life, question, ask: ask.clone(), copy: true });
            world.deliver(Delivery::Ask { from, life, question, ask, copy: false });
        }
        (Delivery::Write { node, seq, .. }, Step::Fail(_)) => {
            world.give(node, Event::RecordFailed { seq, why: "No space left on device".into() });
        }
        (Delivery::Pg { node, op, task, .. }, Step::Fail(done)) => {
            if *done {
                let _ = world.run_pg(node, task);
            }
            world.give(node, Event::PgDone { op, result: Err("it broke off".into()) });
        }
        (head, Step::Delay(time)) => world.post(*time, head),
        // A lost question is answered by the failure that waits in the queue already.
        _ => {}
    }
}

/// Is there anything to choose at this delivery?
fn branches(head: &Delivery, world: &World) -> bool {
    let lives = |node: usize, life: u64| world.nodes[node].life == life && world.nodes[node].guard.is_some();
    match head {
        Delivery::To(node, life, event) => {
            lives(*node, *life)
                && matches!(
                    event,
                    Event::WitnessAnswered { answer: Ok(_), .. }
                        | Event::PeerAnswered { answer: Ok(_), .. }
                        | Event::NeighbourAnswered { answer: Ok(_), .. }
                        | Event::VipProbed { .. }
                        | Event::UpdateAnswered { outcome: UpdateOutcome::Done | UpdateOutcome::Conflict, .. }
                )
        }
        Delivery::Update { .. } => true,
        Delivery::Ask { from, .. } => world.nodes[1 - from].guard.is_some() && world.wire_up && !world.mute[*from],
        Delivery::Write { node, life, .. } | Delivery::Pg { node, life, .. } => lives(*node, *life),
        _ => false,
    }
}

/// What may be done to the head itself, and which nodes and wires take part in it.
fn choices(head: &Delivery) -> (Vec<Step>, Vec<usize>, Vec<Cut>) {
    use Step::{Again, Delay, Fail, Lose};
    match head {
        Delivery::To(node, _, Event::PeerAnswered { answer: Ok(answer), .. }) => {
            let pulse = matches!(answer.as_ref(), crate::engine::turn::PeerAnswer::Pulse { .. });
            let mut steps = vec![Lose, Delay(ALMOST)];
            steps.extend((!pulse).then_some(Delay(LONG)));
            (steps, vec![*node], vec![Cut::Wire, Cut::WireFrom(1 - node)])
        }
        Delivery::To(node, _, Event::WitnessAnswered { .. }) => {
            (vec![Lose, Delay(ALMOST)], vec![*node], vec![Cut::Witness(*node), Cut::Deaf(*node)])
        }
        Delivery::To(node, _, Event::NeighbourAnswered { .. }) => {
            (vec![Lose, Delay(SHORT)], vec![*node], vec![Cut::Gateway(*node), Cut::Lan])
        }
        Delivery::To(node, _, Event::VipProbed { .. }) => (vec![Delay(LATE)], vec![*node], vec![Cut::Lan]),
        Delivery::To(node, ..) => (vec![Lose], vec![*node], vec![Cut::Witness(*node)]),
        Delivery::Update { node, .. } => {
            let steps = vec![Lose, Delay(LEASE), Delay(LONG), Delay(LONG * 2), Delay(FAR), Again(LONG)];
            (steps, vec![*node], vec![Cut::Deaf(*node)])
        }
        Delivery::Ask { from, ask, .. } => {
            let mut steps = vec![Lose, Delay(LATE)];
            match ask.as_ref() {
                PeerQuestion::Pulse { .. } => steps.push(Delay(ALMOST)),
                _ => steps.extend([Delay(LONG), Again(LEASE)]),
            }
            (steps, vec![1 - from], vec![Cut::Wire, Cut::WireFrom(*from)])
        }
        Delivery::Write { node, .. } => (vec![Delay(SHORT), Fail(false)], vec![*node], vec![]),
        Delivery::Pg { node, .. } => (vec![Delay(LONG), Fail(false), Fail(true)], vec![*node], vec![]),
        _ => (vec![], vec![], vec![]),
    }
}

/// Everything heals; does somebody serve then, by himself or after a promote?
fn serves_again(mut world: World) -> bool {
    world.heal();
    world.run_for(secs(20));
    // A promote may find one that still waits for a lost answer, and only join it: the person tries once more.
    for accepted in [false, false, true] {
        for node in [0, 1] {
            if world.somebody_is_open() || world.broken.is_some() {
                return world.broken.is_none();
            }
            world.loss_accepted |= accepted;
            // Where there is no witness a person has to say it, and it has to be true.
            let peer_is_off = (accepted && world.mode == Mode::VipOnly).then(|| name(1 - node));
            let promote = Command::Promote { dry_run: false, yes: true, accept_data_loss: accepted, peer_is_off };
            let ticket = world.command(node, promote);
            if world.mode == Mode::Observe {
                world.run_for(secs(3));
                world.record = RecordPair::new(vec![address(node)], 5, Vec::new());
            }
            let end = world.now + secs(95);
            while !world.nodes[node].ends.contains_key(&ticket) && world.now < end && world.broken.is_none() {
                world.step();
            }
            world.run_for(secs(3));
        }
    }
    world.somebody_is_open() && world.broken.is_none()
}

impl Model for Guards {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut states = Vec::new();
        for (index, scenario) in self.scenarios.iter().enumerate() {
            // The holder's clock slow and the taker's fast, and the other way round.
            for rates in [[900, 1100], [1100, 900]] {
                let mut world = at_work(scenario, rates);
                let begin = world.now;
                for (after, act) in &scenario.script {
                    if let Act::Order(_, Command::Promote { accept_data_loss: true, .. }) = act {
                        world.loss_accepted = true;
                    }
                    world.post(MS * u32::try_from(*after).expect("small"), Delivery::Act(act.clone()));
                }
                let (window, end) = (begin + scenario.window, begin + scenario.window + scenario.tail);
                let openings = world.openings;
                let mut state =
                    State { world, left: self.deviations, scenario: index, past: 0, openings, begin, window, end };
                self.run_on(&mut state);
                states.push(state);
            }
        }
        states
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        let world = &state.world;
        if world.broken.is_some() || world.now >= state.end {
            return;
        }
        actions.push(Step::Go);
        let Some(head) = world.head().filter(|_| state.left > 0) else { return };
        let (steps, nodes, cuts) = choices(head);
        actions.extend(steps);
        for node in nodes {
            if world.nodes[node].guard.is_none() {
                continue;
            }
            actions.extend([
                Step::Down(Act::Kill(node), SHORT),
                Step::Down(Act::Kill(node), LONG),
                Step::Down(Act::Crash(node), LEASE),
                Step::Down(Act::Crash(node), NEVER),
                Step::Down(Act::StopPg(node), LEASE),
                Step::Act(Act::Freeze(node, LATE)),
                Step::Act(Act::Freeze(node, LONG)),
            ]);
            for order in &self.scenarios[state.scenario].orders {
                let Act::Order(at, _) = order else { continue };
                if *at == node && world.nodes[node].guard.as_ref().is_some_and(|guard| !busy(guard)) {
                    actions.push(Step::Act(order.clone()));
                }
            }
        }
        for cut in cuts {
            actions.push(Step::Cut(cut, LEASE));
            actions.push(Step::Cut(cut, if matches!(cut, Cut::Wire | Cut::Witness(_)) { NEVER } else { LONG }));
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        let before = state.world.turns;
        self.play(&mut state, step);
        self.run_on(&mut state);
        self.turns.fetch_add(state.world.turns - before, Ordering::Relaxed);
        for ((_, holds), count) in MET.iter().zip(&self.met) {
            if holds(&state) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn kept(state: &State, law: &str) -> bool {
            state.world.broken.as_ref().is_none_or(|(broken, _)| *broken != law)
        }
        macro_rules! laws {
            ($($law:expr),*) => { vec![$(Property::<Self>::always($law, |_, state| kept(state, $law))),*] };
        }
        macro_rules! met {
            ($($index:literal),*) => {
                [$(Property::<Self>::sometimes(MET[$index].0, |model: &Guards, _| {
                    model.met[$index].load(Ordering::Relaxed) > 0
                })),*]
            };
        }
        let mut all = laws![TWO_GATES, TOO_EARLY, ONE_OWNER, UNRECORDED, MISSING, TRUE_RECORD, TOLD, OPEN_RIGHTLY];
        all.push(Property::<Self>::always(SERVES_AGAIN, |model, state| {
            if state.world.now < state.end || state.world.broken.is_some() {
                return true;
            }
            let leaf = model.leaves.fetch_add(1, Ordering::Relaxed);
            if leaf % model.sample != 0 {
                return true;
            }
            model.healed.fetch_add(1, Ordering::Relaxed);
            serves_again(state.world.clone())
        }));
        // In one scenario alone not everything can be met.
        if self.scenarios.len() > 1 {
            all.extend(met![0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        }
        all
    }
}

/// A counterexample for people: the deviations, then every transition of the replay.
fn tell(model: &Guards, law: &str, path: stateright::Path<State, Step>) -> String {
    let path = path.into_vec();
    let depth = path.len();
    let mut state = path[0].0.clone();
    let scenario = model.scenarios[state.scenario].name;
    let rates = [state.world.nodes[0].clock.rate, state.world.nodes[1].clock.rate];
    let mut text = format!("\"{law}\" fails in \"{scenario}\", clocks {rates:?}, depth {depth}:\n");
    state.world.log = Some(Vec::new());
    for (_, step) in path {
        let Some(step) = step else { break };
        model.play(&mut state, step);
        model.run_on(&mut state);
    }
    let broken = state.world.broken.clone();
    for line in state.world.log.unwrap_or_default() {
        text.push_str(&line);
        text.push('\n');
    }
    text + &format!("{broken:?}")
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Explores everything within the bounds; fails with a history where a property does.
#[test]
fn no_history_with_so_many_deviations_breaks_a_law() {
    let deviations = number("PORTCULLIS_MODEL_DEVIATIONS").unwrap_or(1);
    let threads = number("PORTCULLIS_MODEL_THREADS").unwrap_or(2);
    let sample = number("PORTCULLIS_MODEL_SAMPLE").unwrap_or(100);
    let only = std::env::var("PORTCULLIS_MODEL_SCENARIO").ok();
    let model = Guards::new(u8::try_from(deviations).expect("few"), sample, only.as_deref());
    let names: Vec<_> = model.scenarios.iter().map(|s| s.name).collect();
    let checker = model
        .checker()
        .threads(usize::try_from(threads).expect("few"))
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_dfs()
        .join();
    let model = checker.model();
    let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
    eprintln!(
        "figure: model: {deviations} deviations, scenarios {names:?}: {} states ({} unique), depth {}, {} turns of the \
         guards, {} ends of histories, {} of them healed",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        load(&model.turns),
        load(&model.leaves),
        load(&model.healed)
    );
    for ((what, _), count) in MET.iter().zip(&model.met) {
        eprintln!("  met {} times: {what}", load(count));
    }
    for property in model.properties() {
        if matches!(property.expectation, stateright::Expectation::Always)
            && let Some(path) = checker.discovery(property.name)
        {
            panic!("{}", tell(model, property.name, path));
        }
    }
    if names.len() > 1 {
        checker.assert_properties();
    }
}
