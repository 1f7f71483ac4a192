//! One guard alone, its events given by hand: what it asks of its hands, effect by effect. Whatever needs two nodes is
//! in the simulated world.

mod arming;
mod followers;
mod suspended;

use crate::base::config::FencePostgres;
use crate::base::ids::{Epoch, Lsn, SystemId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::{Durable, Entry};
use crate::engine::guard::Guard;
use crate::engine::lease::Timing;
use crate::engine::report::PgReport;
use crate::engine::setup::{Mode, NodeSetup, Setup};
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, Effect, Event, Now, PeerAnswer, PeerQuestion, PgOutput, PgTask};
use crate::wire::dns::{Reading, RecordPair};
use crate::wire::marker::Marker;
use std::net::IpAddr;

const MS: Duration = Duration::from_millis(1);
const BOOT: &str = "5f1c0000-0000-4000-8000-000000000001";
const OLD_BOOT: &str = "5f1c0000-0000-4000-8000-000000000009";
const W: Duration = Duration::from_millis(3261);

fn setup(mode: Mode) -> Setup {
    let node = |name: &str, last: u8| NodeSetup {
        name: name.parse().expect("valid"),
        addresses: vec![IpAddr::from([192, 0, 2, last])],
        hostname: format!("192.0.2.{last}"),
        port: 5432,
        weight: 0.5,
    };
    Setup {
        version: "test".into(),
        service: "db.example.org".into(),
        me: "a".parse().expect("valid"),
        peer: "b".parse().expect("valid"),
        nodes: vec![node("a", 11), node("b", 12), node("c", 13)],
        voters: vec!["a".parse().expect("valid"), "b".parse().expect("valid")],
        timing: Timing { lease: MS * 3000, max_drift: 0.01, margin: MS * 200 },
        poll: MS * 1000,
        mode,
        propagation: Duration::ZERO,
        servers: if mode == Mode::VipOnly { Vec::new() } else { vec!["192.0.2.53:53".to_owned()] },
        vips: if mode == Mode::VipOnly { vec!["192.0.2.100/24".parse().expect("valid")] } else { Vec::new() },
        kernel_gate: true,
        stonith: false,
        units: true,
        synchronous: true,
        block: false,
        standby_timeout: MS * 3000,
        hold_limit: Duration::from_secs(30),
        fence_postgres: FencePostgres::Demote,
        digest: "same".into(),
        start: 1,
        boot: BOOT.into(),
    }
}

/// The guard and the world it is told of.
struct Solo {
    guard: Guard,
    now: Instant,
    /// What the witness shows and its clock, in seconds; `None`: silent.
    marker: Option<Marker>,
    signed: Option<u64>,
    disk: Vec<Entry>,
    pg: Option<PgReport>,
    /// Everything but the routine: what a test looks at.
    fx: Vec<Effect>,
    /// Does the VIP's witness answer?
    neighbour: bool,
    /// The first question to the peer has failed: it is not there.
    peer_missed: bool,
}

fn marker(boot: &str) -> Marker {
    Marker {
        epoch: Epoch(3),
        seq: 7,
        active: "a".parse().expect("valid"),
        sync: None,
        timeline: TimelineId(1),
        lease: MS * 3000,
        sysid: SystemId(77),
        boot: boot.to_owned(),
        since: "2026-11-20T15:11:00Z".into(),
        loss: false,
    }
}

fn holder() -> Vec<Entry> {
    vec![
        Entry::Won { epoch: Epoch(3), seq: 7, loss: false, old_lease_ms: 0 },
        Entry::Sync { epoch: Epoch(3), seq: 7, sync: None, since: String::new() },
        Entry::Complete { epoch: Epoch(3) },
    ]
}

fn primary() -> PgReport {
    PgReport {
        next_xid: None,
        start: 1,
        system_id: SystemId(77),
        in_recovery: false,
        timeline: TimelineId(1),
        lsn: Lsn(1000),
        flush_lsn: Some(Lsn(1000)),
        replay_lsn: None,
        receive_lsn: None,
        streaming: false,
        sync_list: String::new(),
        conf_loaded_us: 0,
        read_only: false,
        standbys: Vec::new(),
    }
}

impl Solo {
    fn new(setup: Setup, disk: Vec<Entry>) -> Solo {
        Solo::shown(setup, disk, Some(marker(BOOT)))
    }

    /// With what the witness shows from the first question on.
    fn shown(setup: Setup, disk: Vec<Entry>, marker: Option<Marker>) -> Solo {
        let now = Instant::from_nanos(1_000_000_000_000);
        let mut fx = Vec::new();
        let vip_only = setup.mode == Mode::VipOnly;
        let guard = Guard::start(setup, Durable::replay(&disk), true, Solo::clocks(now), &mut fx);
        let mut solo = Solo {
            guard,
            now,
            marker,
            signed: None,
            disk,
            pg: Some(primary()),
            fx: Vec::new(),
            neighbour: true,
            // Without DNS its first answer is what everything begins with.
            peer_missed: vip_only,
        };
        solo.execute(fx);
        solo
    }

    fn active(mode: Mode) -> Solo {
        let mut solo = Solo::new(setup(mode), holder());
        if mode == Mode::VipOnly {
            solo.pledge_next();
        }
        solo.run(MS * 2000);
        assert!(solo.is_open(), "{:?}", solo.snapshot().gate);
        solo.fx.clear();
        solo
    }

    fn clocks(now: Instant) -> Now {
        let micros = i64::try_from(now.as_nanos() / 1000).expect("small") + 1_700_000_000_000_000;
        Now { boot: now, wall: jiff::Timestamp::from_microsecond(micros).expect("valid") }
    }

    fn snapshot(&self) -> crate::engine::status::Snapshot {
        self.guard.snapshot(Solo::clocks(self.now))
    }

    fn is_open(&self) -> bool {
        self.snapshot().gate.open
    }

    fn give(&mut self, event: Event) {
        let mut fx = Vec::new();
        self.guard.handle(Solo::clocks(self.now), event, &mut fx);
        self.execute(fx);
    }

    /// Answers what a healthy world answers at once; keeps the rest.
    fn execute(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            let answer = match &effect {
                Effect::Record { seq, entries } => {
                    self.disk.extend(entries.clone());
                    Some(Event::Recorded { seq: *seq })
                }
                Effect::AskWitness { question, .. } => {
                    let answer = match &self.marker {
                        Some(marker) => Ok(Reading {
                            pair: RecordPair::written(&[IpAddr::from([192, 0, 2, 11])], 5, &marker.to_string()),
                            signed_time: self.signed,
                            ..Reading::default()
                        }),
                        None => Err("no answer".to_owned()),
                    };
                    Some(Event::WitnessAnswered { question: *question, answer })
                }
                Effect::AskPeer { question, .. } if !self.peer_missed => {
                    self.peer_missed = true;
                    Some(Event::PeerAnswered { question: *question, answer: Err("no answer".into()) })
                }
                Effect::ProbeVip { address } => Some(Event::VipProbed { address: *address, claimed_by: None }),
                Effect::BindVip { address, .. } => Some(Event::VipBound { address: *address }),
                Effect::AskNeighbour { question, .. } => Some(Event::NeighbourAnswered {
                    question: *question,
                    answer: if self.neighbour { Ok(IpAddr::from([192, 0, 2, 1])) } else { Err("silence".into()) },
                }),
                _ => None,
            };
            self.fx.push(effect);
            if let Some(event) = answer {
                self.now = self.now + Duration::from_micros(100);
                self.give(event);
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.guard.next_deadline().max(self.now + MS).min(end);
            let event = match &self.pg {
                Some(report) => Event::PgObserved { asked: self.now, report: Box::new(report.clone()) },
                None => Event::PgLost("down".into()),
            };
            self.give(event);
        }
    }

    /// The next pulse that asks for a pledge gets one.
    fn pledge_next(&mut self) {
        for _ in 0..20 {
            let asked = self.fx.iter().rev().find_map(|effect| match effect {
                Effect::AskPeer { question, ask, .. } => match ask.as_ref() {
                    PeerQuestion::Pulse { state, pledge: Some(pledge) } => {
                        Some((*question, state.clone(), pledge.question))
                    }
                    _ => None,
                },
                _ => None,
            });
            if let Some((question, mut state, pledge)) = asked {
                state.node = "b".parse().expect("valid");
                state.won = Epoch::NONE;
                state.complete = Epoch::NONE;
                state.pg = None;
                let answer = PeerAnswer::Pulse { state, pledge: Some(Ok(pledge)) };
                self.give(Event::PeerAnswered { question, answer: Ok(Box::new(answer)) });
                return;
            }
            self.run(MS * 100);
        }
        panic!("no pledge was asked for: {:?}", self.fx);
    }

    fn wanted(&self, wanted: impl Fn(&Effect) -> bool) -> bool {
        self.fx.iter().any(wanted)
    }

    fn events(&self, kind: &str) -> usize {
        self.snapshot().events.iter().filter(|event| event.kind == kind).count()
    }
}

fn tasks(solo: &Solo) -> Vec<PgTask> {
    solo.fx
        .iter()
        .filter_map(|effect| match effect {
            Effect::Pg { task, .. } => Some(task.clone()),
            _ => None,
        })
        .collect()
}

#[test]
fn the_second_wall_moves_with_the_gate_and_falls_with_the_cut() {
    let mut solo = Solo::active(Mode::Update);
    solo.run(MS * 2500);
    let extended = |e: &Effect| matches!(e, Effect::Extend { .. });
    let walls = solo.fx.iter().filter(|e| matches!(e, Effect::KernelGate { until: Some(_) })).count();
    assert!(walls > 0 && walls == solo.fx.iter().filter(|e| extended(e)).count());
    solo.fx.clear();
    solo.give(Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } });
    assert!(matches!(solo.fx[0], Effect::Cut { .. }), "{:?}", solo.fx);
    assert_eq!(solo.fx[1], Effect::KernelGate { until: None });
    assert!(!solo.wanted(|e| matches!(e, Effect::KernelGate { until: Some(_) })), "nothing raises it again");
}

#[test]
fn units_start_after_the_gate_opened_and_stop_when_it_is_cut() {
    let mut solo = Solo::new(setup(Mode::Update), holder());
    solo.run(MS * 2000);
    let at = |fx: &[Effect], wanted: &dyn Fn(&Effect) -> bool| fx.iter().position(wanted);
    let opened = at(&solo.fx, &|e| matches!(e, Effect::Extend { .. })).expect("it opened");
    let started = at(&solo.fx, &|e| *e == Effect::Units { start: true }).expect("units were started");
    assert!(opened < started && !solo.wanted(|e| *e == Effect::Units { start: false }));
    solo.give(Event::UnitsDone { start: true, result: Err("web.service failed".into()) });
    assert_eq!(solo.events("units_failed"), 1);
    assert!(solo.is_open(), "the gate does not wait for them");
    solo.fx.clear();
    solo.marker = None;
    solo.run(MS * 4000);
    let cut = at(&solo.fx, &|e| matches!(e, Effect::Cut { .. })).expect("it was cut");
    let stopped = at(&solo.fx, &|e| *e == Effect::Units { start: false }).expect("units were stopped");
    assert!(cut < stopped);
}

#[test]
fn units_of_a_former_life_are_stopped_unless_the_gate_opens_within_a_lease() {
    let mut solo = Solo::shown(setup(Mode::Update), Vec::new(), None);
    solo.run(MS * 2900);
    assert!(!solo.wanted(|e| matches!(e, Effect::Units { .. })));
    solo.run(MS * 600);
    assert!(solo.wanted(|e| *e == Effect::Units { start: false }));
}

#[test]
fn s17_a_pause_that_the_witness_saw_lapses_once_and_a_backward_step_costs_nothing() {
    let mut solo = Solo::active(Mode::Update);
    solo.signed = Some(1_000_000);
    solo.run(MS * 1500);
    assert!(solo.is_open());
    // Ten seconds pass there while one passes here: this machine stood still with all its clocks.
    solo.fx.clear();
    solo.signed = Some(1_000_012);
    solo.run(MS * 1200);
    let cuts = |solo: &Solo| solo.fx.iter().filter(|e| matches!(e, Effect::Cut { .. })).count();
    assert_eq!((cuts(&solo), solo.events("pause_seen")), (1, 1), "{:?}", solo.snapshot().events);
    solo.run(MS * 300);
    assert!(solo.is_open(), "the next answer opens it again");
    assert_eq!(solo.snapshot().role, Role::Active, "a lapse, never a fence");
    // Two seconds prove nothing, backwards neither.
    solo.fx.clear();
    solo.signed = Some(1_000_014);
    solo.run(MS * 1200);
    solo.signed = Some(900_000);
    solo.run(MS * 1200);
    assert_eq!((cuts(&solo), solo.events("pause_seen")), (0, 1));
}

#[test]
fn a_pledge_that_was_asked_for_before_a_pause_counts_for_nothing() {
    let mut solo = Solo::active(Mode::Update);
    solo.signed = Some(1_000_000);
    solo.run(MS * 1500);
    let asked = solo.fx.iter().rev().find_map(|effect| match effect {
        Effect::AskPeer { question, .. } => Some(*question),
        _ => None,
    });
    let question = asked.expect("the peer is asked with every poll");
    solo.signed = Some(1_000_030);
    let before = solo.snapshot().counters.gate_cuts;
    while solo.snapshot().counters.gate_cuts == before {
        solo.run(MS * 50);
    }
    // From here on the witness is silent; the late pledge must not open the gate.
    solo.marker = None;
    solo.signed = None;
    let open = solo.is_open();
    let state = solo.fx.iter().rev().find_map(|effect| match effect {
        Effect::AskPeer { ask, .. } => match ask.as_ref() {
            PeerQuestion::Pulse { state, .. } => Some(state.clone()),
            _ => None,
        },
        _ => None,
    });
    let mut state = state.expect("asked");
    state.node = "b".parse().expect("valid");
    (state.won, state.complete) = (Epoch::NONE, Epoch::NONE);
    let deadline = solo.snapshot().gate.lease_remaining_ms;
    let answer = PeerAnswer::Pulse { state, pledge: Some(Ok(question)) };
    solo.give(Event::PeerAnswered { question, answer: Ok(Box::new(answer)) });
    assert_eq!((solo.is_open(), solo.snapshot().gate.lease_remaining_ms), (open, deadline));
    assert_eq!(solo.snapshot().counters.peer_pledges, 0);
}

#[test]
fn s6_a_new_boot_waits_w_also_when_the_daemon_is_started_again_meanwhile() {
    let mut solo = Solo::shown(setup(Mode::Update), holder(), Some(marker(OLD_BOOT)));
    solo.run(MS * 500);
    let asked = solo.fx.iter().find_map(|effect| match effect {
        Effect::Update { op, marker, .. } => Some((*op, marker.clone())),
        _ => None,
    });
    let (op, written) = asked.expect("this boot is written into the marker");
    let pending = Entry::BootPending { boot: BOOT.to_owned() };
    assert!(solo.disk.contains(&pending), "recorded before it was sent");
    solo.marker = Some(written.parse().expect("a marker"));
    solo.give(Event::UpdateAnswered { op, outcome: crate::wire::dns::UpdateOutcome::Done });
    solo.run(MS * 1500);
    assert!(!solo.is_open(), "W is not over");
    // kill -9 and a new start one second and a half into the wait.
    let mut again = Solo::shown(setup(Mode::Update), solo.disk.clone(), solo.marker.clone());
    let start = again.now;
    again.run(MS * 2500);
    assert!(!again.is_open(), "a start within W waits W anew: {:?}", again.snapshot().gate);
    while !again.is_open() {
        again.run(MS * 100);
        assert!(again.now < start + W + MS * 2000, "{:?}", again.snapshot().gate);
    }
    assert!(again.now >= start + W);
    again.run(MS * 500);
    assert!(again.disk.contains(&Entry::BootWaited));
    let mut third = Solo::shown(setup(Mode::Update), again.disk.clone(), again.marker.clone());
    third.run(MS * 500);
    assert!(third.is_open(), "once waited out, a restart opens at once");
}

#[test]
fn maintenance_cuts_and_fences_but_leaves_postgresql_alone() {
    let mut solo = Solo::active(Mode::Update);
    solo.give(Event::Command { ticket: 1, command: Command::Maintenance { on: true } });
    assert!(solo.wanted(|e| matches!(e, Effect::End { ticket: 1, exit: 0, .. })));
    assert!(solo.snapshot().maintenance && solo.is_open(), "the gate goes on obeying the lease");
    solo.fx.clear();
    solo.give(Event::Command { ticket: 2, command: Command::Fence { reason: "test".into() } });
    solo.run(MS * 5000);
    assert_eq!(solo.snapshot().gate.state, GateState::Fenced);
    assert_eq!(tasks(&solo), vec![], "PostgreSQL is left alone");
    solo.give(Event::Command { ticket: 3, command: Command::Unfence });
    assert!(solo.wanted(|e| matches!(e, Effect::End { ticket: 3, exit: 3, .. })));
    solo.give(Event::PeerAsked {
        ticket: 9,
        question: Box::new(PeerQuestion::Consent { attempt: 1, epoch: Epoch(9), handed_over: false }),
    });
    let refused = |e: &Effect| match e {
        Effect::AnswerPeer { ticket: 9, answer } => matches!(answer.as_ref(), PeerAnswer::Refused { .. }),
        _ => false,
    };
    assert!(solo.wanted(refused), "a consent would stop PostgreSQL");
    // It survives a restart, and its end lets the demotion begin.
    let mut again = Solo::new(setup(Mode::Update), solo.disk.clone());
    again.run(MS * 2000);
    assert!(again.snapshot().maintenance && tasks(&again).is_empty());
    again.give(Event::Command { ticket: 4, command: Command::Maintenance { on: false } });
    again.run(MS * 1000);
    assert_eq!(tasks(&again), vec![PgTask::Demote { follow_peer: false }]);
}

#[test]
fn a_postgresql_that_was_refused_at_boot_is_started_once_the_proof_has_come() {
    let mut solo = Solo::shown(setup(Mode::Update), holder(), None);
    solo.pg = None;
    solo.give(Event::PgStartRefused);
    solo.run(MS * 5000);
    assert_eq!(tasks(&solo), vec![], "no proof, no start");
    solo.marker = Some(marker(BOOT));
    solo.run(MS * 1500);
    assert_eq!(tasks(&solo), vec![PgTask::Start]);
    // The mark stands until PostgreSQL is up; it is started once.
    solo.give(Event::PgStartRefused);
    let running = solo.fx.iter().rev().find_map(|effect| match effect {
        Effect::Pg { op, .. } => Some(*op),
        _ => None,
    });
    solo.give(Event::PgDone { op: running.expect("it starts"), result: Ok(PgOutput::Done) });
    assert_eq!(tasks(&solo), vec![PgTask::Start]);
    // Refused, then started by its unit after all: an administrator who stops it later is obeyed.
    let mut again = Solo::shown(setup(Mode::Update), holder(), None);
    again.pg = None;
    again.give(Event::PgStartRefused);
    again.run(MS * 1000);
    again.pg = Some(PgReport { read_only: true, ..primary() });
    again.marker = Some(marker(BOOT));
    again.run(MS * 1500);
    again.pg = None;
    again.run(MS * 5000);
    assert_eq!(tasks(&again), vec![]);
    // One that an administrator stopped is not started.
    let mut other = Solo::new(setup(Mode::Update), holder());
    other.pg = None;
    other.run(MS * 5000);
    assert_eq!(tasks(&other), vec![]);
}

#[test]
fn p11_the_longest_lease_is_remembered_until_the_takeover_is_complete() {
    let mut disk = holder();
    disk.push(Entry::Refused { epoch: Epoch(4) });
    disk.push(Entry::Won { epoch: Epoch(5), seq: 9, loss: false, old_lease_ms: 30_000 });
    let state = Durable::replay(&disk);
    assert_eq!(state.old_lease_ms, 30_000);
    disk.push(Entry::Complete { epoch: Epoch(5) });
    assert_eq!(Durable::replay(&disk).old_lease_ms, 0);
}

#[test]
fn p10_arp_prolongs_a_lease_and_never_begins_one() {
    let mut solo = Solo::new(setup(Mode::VipOnly), holder());
    solo.run(MS * 10_000);
    assert!(!solo.is_open(), "after a start only the peer's pledge opens (R3, R6)");
    assert!(!solo.wanted(|e| matches!(e, Effect::AskNeighbour { .. })), "nothing is asked from an unproven VIP");
    solo.fx.clear();
    solo.pledge_next();
    solo.run(MS * 20_000);
    assert!(solo.is_open(), "the VIP's witness prolongs: {:?}", solo.snapshot().gate);
    assert!(solo.snapshot().counters.neighbour_proofs > 10);
    solo.neighbour = false;
    solo.run(MS * 4500);
    assert!(!solo.is_open(), "both voters are silent");
    assert_eq!(solo.snapshot().gate.state, GateState::Lapsed);
    solo.neighbour = true;
    solo.run(MS * 10_000);
    assert!(!solo.is_open(), "after a lapse ARP opens nothing");
    solo.fx.clear();
    solo.pledge_next();
    solo.run(MS * 1000);
    assert!(solo.is_open(), "the pledge does");
}

#[test]
fn the_first_turn_after_a_stall_announces_the_vip_anew() {
    let mut solo = Solo::active(Mode::VipOnly);
    solo.run(MS * 7000);
    solo.fx.clear();
    solo.run(MS * 4000);
    assert!(!solo.wanted(|e| matches!(e, Effect::AnnounceVip { .. })), "once a minute is enough");
    solo.now = solo.now + MS * 1500;
    solo.run(MS * 600);
    assert!(solo.wanted(|e| matches!(e, Effect::AnnounceVip { burst: true, .. })));
    solo.fx.clear();
    solo.run(MS * 6000);
    let again = solo.fx.iter().filter(|e| matches!(e, Effect::AnnounceVip { burst: false, .. })).count();
    assert_eq!(again, 4, "the rest of the schedule");
    solo.give(Event::LinkDown);
    assert!(!solo.is_open());
    solo.fx.clear();
    solo.give(Event::LinkUp);
    solo.run(MS * 100);
    assert!(solo.wanted(|e| matches!(e, Effect::AnnounceVip { burst: true, .. })), "the carrier is back");
}

#[test]
fn s12_the_operators_word_is_refused_within_w_of_a_start_too() {
    for (after, believed) in [(MS * 100, false), (W + MS * 100, true)] {
        // A standby whose daemon has just started again: it may have pledged a moment before.
        let disk = vec![Entry::Initialised, Entry::Seen { epoch: Epoch(3) }];
        let mut solo = Solo::new(setup(Mode::VipOnly), disk);
        solo.pg = Some(PgReport { in_recovery: true, ..primary() });
        solo.run(after);
        let command = Command::Promote {
            dry_run: false,
            yes: true,
            accept_data_loss: true,
            peer_is_off: Some("b".parse().expect("valid")),
        };
        solo.give(Event::Command { ticket: 5, command });
        solo.run(MS * 2400);
        let refused = solo.wanted(|e| matches!(e, Effect::End { ticket: 5, exit: 3, .. }));
        let won = solo.disk.iter().any(|entry| matches!(entry, Entry::Won { .. }));
        assert_eq!((refused, won), (!believed, believed), "{:?}", solo.disk);
    }
}

#[test]
fn a_demotion_that_fails_again_and_again_is_told_once() {
    let mut solo = Solo::active(Mode::Update);
    solo.give(Event::Command { ticket: 1, command: Command::Fence { reason: "test".into() } });
    let mut tried = 0;
    for (seconds, why, told) in [(30, "a rewind did not end", 1), (30, "another reason", 2)] {
        for _ in 0..seconds {
            let demoting = |effect: &Effect| match effect {
                Effect::Pg { op, task: PgTask::Demote { .. } } => Some(*op),
                _ => None,
            };
            if let Some(op) = std::mem::take(&mut solo.fx).iter().find_map(demoting) {
                tried += 1;
                solo.give(Event::PgDone { op, result: Err(why.to_owned()) });
            }
            solo.run(MS * 1000);
        }
        assert_eq!(solo.events("demotion_failed"), told, "{:?}", solo.snapshot().events);
    }
    assert!(tried > 15, "it is tried again: {tried}");
}
