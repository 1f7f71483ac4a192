//! The follower against two voters that say what the test wants, a journal that writes at once (or not at all), and a
//! PostgreSQL that does what it is told.

mod rejoined;

use super::*;
use crate::base::config::FencePostgres;
use crate::base::ids::{Lsn, SystemId, TimelineId};
use crate::engine::lease::Timing;
use crate::engine::report::{RejoinHow, RejoinPlan, SourceFacts, StandbyRow};
use crate::engine::setup::NodeSetup;
use crate::engine::status::{GateState, Role};
use crate::engine::turn::{Command, PeerPg, PeerState, Wish};
use std::net::IpAddr;

const MS: Duration = Duration::from_millis(1);

fn name(text: &str) -> NodeName {
    text.parse().expect("valid")
}

fn setup(fence_postgres: FencePostgres) -> Setup {
    let node = |text: &str, last: u8| NodeSetup {
        name: name(text),
        addresses: vec![IpAddr::from([192, 0, 2, last])],
        hostname: format!("192.0.2.{last}"),
        port: 5432,
        weight: 0.25,
    };
    Setup {
        version: "test".into(),
        service: "db.example.org".into(),
        me: name("c"),
        peer: name("a"),
        nodes: vec![node("a", 11), node("b", 12), node("c", 13), node("d", 14)],
        voters: vec![name("a"), name("b")],
        timing: Timing { lease: MS * 3000, max_drift: 0.01, margin: MS * 200 },
        poll: MS * 1000,
        mode: Mode::Update,
        propagation: Duration::ZERO,
        servers: Vec::new(),
        vips: vec!["192.0.2.100/24".parse().expect("valid")],
        kernel_gate: true,
        stonith: false,
        units: true,
        synchronous: true,
        block: false,
        standby_timeout: Duration::from_secs(3),
        hold_limit: Duration::from_secs(30),
        fence_postgres,
        digest: "same".into(),
        start: 1,
        boot: "5f1c0000-0000-4000-8000-000000000001".into(),
    }
}

fn pg(in_recovery: bool, system: u64, timeline: u32, lsn: u64) -> PeerPg {
    PeerPg {
        system_id: SystemId(system),
        in_recovery,
        timeline: TimelineId(timeline),
        lsn: Lsn(lsn),
        replay_lsn: in_recovery.then_some(Lsn(lsn)),
        streaming: in_recovery,
        confirmed: None,
    }
}

/// A voter that serves this epoch, or (zero) does not.
fn voter(node: &str, serves: u64) -> Facts {
    let epoch = Epoch(serves);
    let timeline = u32::try_from(serves.max(1)).expect("small");
    let state = PeerState {
        node: name(node),
        version: "test".into(),
        start: 7,
        boot: String::new(),
        role: if serves > 0 { Role::Active } else { Role::Passive },
        gate_open: serves > 0,
        refused: Epoch::NONE,
        won: epoch,
        complete: epoch,
        fence: Epoch::NONE,
        seen: epoch,
        digest: "same".into(),
        nodes: Vec::new(),
        pg: Some(pg(serves == 0, 77, timeline, 1000)),
        pg_present: true,
        in_sync: true,
        prepared: serves > 0,
        adopted: true,
        rejoining: false,
        unheard: false,
        maintenance: false,
        tunnels: true,
        looks: true,
        blocks: false,
        procedure: None,
        handing_over: None,
        hangs_since: None,
        wants_rejoin: false,
    };
    Facts { state, standbys: Vec::new(), others: Vec::new(), wish: None }
}

struct Play {
    follower: Follower,
    now: Instant,
    /// What the two voters answer; `None`: silence.
    voters: BTreeMap<NodeName, Option<Facts>>,
    disk: Vec<Entry>,
    /// The disk answers.
    writes: bool,
    report: Option<PgReport>,
    /// What PostgreSQL answers to its tasks, if not simply that they are done.
    answer: Option<Result<PgOutput, String>>,
    /// What a look at the data here finds.
    plan: RejoinPlan,
    /// How the work of a rejoin ends.
    work: Result<(), String>,
    /// What the source says to an end of WAL, and where its own is.
    same_tail: Option<bool>,
    source_lsn: u64,
    /// It writes so much between two answers.
    grows: u64,
    /// The voters serve until PostgreSQL here is stopped.
    gone_after_stop: bool,
    /// What was asked of whom for a rejoin: `look`, `prove` or `prepare`.
    asked: Vec<String>,
    upstream: Option<NodeName>,
    fx: Vec<Effect>,
    tasks: Vec<(Option<NodeName>, PgTask)>,
}

fn standby(system: u64, timeline: u32, lsn: u64, streaming: bool) -> PgReport {
    PgReport {
        next_xid: None,
        start: 1,
        system_id: SystemId(system),
        in_recovery: true,
        timeline: TimelineId(timeline),
        lsn: Lsn(lsn),
        replay_lsn: Some(Lsn(lsn)),
        receive_lsn: Some(Lsn(lsn)),
        flush_lsn: None,
        streaming,
        sync_list: String::new(),
        conf_loaded_us: 0,
        read_only: false,
        standbys: Vec::new(),
    }
}

fn at(boot: Instant) -> Now {
    Now { boot, wall: jiff::Timestamp::from_second(1_800_000_000 + boot.as_nanos() as i64 / 1_000_000_000).expect("t") }
}

impl Play {
    fn new(disk: Vec<Entry>) -> Play {
        Play::told(FencePostgres::Demote, disk, Some(voter("a", 1)), Some(voter("b", 0)))
    }

    /// b took over; a is not there.
    fn after_failover() -> Play {
        Play::told(FencePostgres::Demote, Vec::new(), None, Some(voter("b", 2)))
    }

    /// With what the voters say from the first question on, and a fence's treatment of PostgreSQL.
    fn told(fence: FencePostgres, disk: Vec<Entry>, a: Option<Facts>, b: Option<Facts>) -> Play {
        let now = Instant::from_nanos(1_000_000_000_000);
        let mut fx = Vec::new();
        let follower = Follower::start(setup(fence), Durable::replay(&disk), true, at(now), &mut fx);
        let voters = [(name("a"), a), (name("b"), b)].into();
        let (tasks, answer, upstream) = (Vec::new(), None, None);
        let report = Some(standby(77, 1, 1000, false));
        let plan = RejoinPlan { how: RejoinHow::Clone, why: "a test".into(), refusal: None, tail: None };
        let (same_tail, source_lsn, asked, writes) = (None, 0, Vec::new(), true);
        let mut play = Play {
            follower,
            now,
            voters,
            disk,
            writes,
            report,
            answer,
            plan,
            work: Ok(()),
            same_tail,
            source_lsn,
            grows: 0,
            gone_after_stop: false,
            asked,
            upstream,
            fx,
            tasks,
        };
        play.settle();
        play
    }

    fn give(&mut self, event: Event) {
        self.follower.handle(at(self.now), event, &mut self.fx);
        self.settle();
    }

    /// Answers what was asked until nothing more is; keeps the rest for the test. What must never be emitted fails it.
    fn settle(&mut self) {
        let mut next = 0;
        while let Some(effect) = self.fx.get(next).cloned() {
            next += 1;
            let answer = match effect {
                Effect::Record { seq, entries } if self.writes => {
                    self.disk.extend(entries);
                    Some(Event::Recorded { seq })
                }
                Effect::AskNode { question, node, ask, .. } => {
                    let answer = match (self.voters[&node].clone(), *ask) {
                        (None, _) => Err("silence".to_owned()),
                        (Some(facts), PeerQuestion::Follow { .. }) => Ok(PeerAnswer::Facts(Box::new(facts))),
                        (Some(facts), PeerQuestion::PrepareFollower { .. }) if !facts.state.gate_open => {
                            Ok(PeerAnswer::Refused { why: "a test serves not".to_owned() })
                        }
                        (Some(facts), PeerQuestion::PrepareFollower { id, look, tail }) => {
                            let what = match (look, &tail) {
                                (true, None) => "look",
                                (true, Some(_)) => "prove",
                                (false, _) => "prepare",
                            };
                            self.asked.push(format!("{what} {node}"));
                            self.source_lsn += self.grows;
                            let stopped = self.tasks.iter().any(|(_, task)| *task == PgTask::Stop);
                            let source = SourceFacts {
                                system_id: SystemId(77),
                                bytes: 1,
                                tablespaces: 0,
                                spaces: Vec::new(),
                                timeline: facts.state.pg.as_ref().map_or(TimelineId(0), |pg| pg.timeline),
                                history: Vec::new(),
                                control_timeline: TimelineId(1),
                                lsn: Lsn(self.source_lsn),
                                oldest: Lsn(0),
                                same_tail: tail.and(self.same_tail),
                            };
                            match self.gone_after_stop && stopped {
                                true => Ok(PeerAnswer::Refused { why: "a test serves not".to_owned() }),
                                false => Ok(PeerAnswer::Prepared { id, source }),
                            }
                        }
                        (_, other) => panic!("a node without a vote asked {other:?}"),
                    };
                    Some(Event::PeerAnswered { question, answer: answer.map(Box::new) })
                }
                Effect::FollowFrom { node } => {
                    self.upstream = Some(node);
                    None
                }
                Effect::Pg { op, task } => {
                    assert!(
                        !matches!(task, PgTask::Promote { .. } | PgTask::SetSyncList(_) | PgTask::Start),
                        "{task:?}"
                    );
                    let usual = match &task {
                        PgTask::PlanRejoin(_) => Ok(PgOutput::Plan(self.plan.clone())),
                        PgTask::Rejoin(_) => self.work.clone().map(|()| PgOutput::Done),
                        _ => Ok(PgOutput::Done),
                    };
                    self.tasks.push((self.upstream.clone(), task));
                    let result = self.answer.clone().unwrap_or(usual);
                    Some(Event::PgDone { op, result })
                }
                Effect::Extend { .. }
                | Effect::Suspend { .. }
                | Effect::Update { .. }
                | Effect::BindVip { .. }
                | Effect::AskPeer { .. }
                | Effect::KernelGate { until: Some(_) }
                | Effect::Stonith { .. }
                | Effect::Units { start: true } => panic!("a node without a vote wants {effect:?}"),
                _ => None,
            };
            if let Some(event) = answer {
                self.follower.handle(at(self.now), event, &mut self.fx);
            }
        }
        self.fx.drain(..).for_each(|effect| {
            if let Effect::End { ticket, exit, text, .. } = effect {
                ENDS.with_borrow_mut(|ends| ends.push((ticket, exit, text)));
            }
        });
    }

    /// A quarter of a second at a time: a look at PostgreSQL, then time.
    fn run(&mut self, millis: u64) {
        for _ in 0..millis.div_ceil(250) {
            self.now = self.now + MS * 250;
            if let Some(report) = self.report.clone() {
                self.give(Event::PgObserved { asked: self.now, report: Box::new(report) });
            }
            self.give(Event::DeadlinePassed);
        }
    }

    fn command(&mut self, ticket: Ticket, command: Command) -> (u8, String) {
        self.give(Event::Command { ticket, command });
        ended(ticket).expect("it ended")
    }

    /// Whom it was told to follow, in order.
    fn followed(&self) -> Vec<&str> {
        let adopted = self.tasks.iter().filter(|(_, task)| *task == PgTask::Adopt);
        adopted.filter_map(|(from, _)| from.as_ref().map(NodeName::as_str)).collect()
    }

    fn trouble(&self) -> String {
        self.follower.snapshot(at(self.now)).postgres.error.unwrap_or_default()
    }
}

thread_local! {
    static ENDS: std::cell::RefCell<Vec<(Ticket, u8, String)>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn ended(ticket: Ticket) -> Option<(u8, String)> {
    ENDS.with_borrow(|ends| ends.iter().find(|(t, ..)| *t == ticket).map(|(_, exit, text)| (*exit, text.clone())))
}

#[test]
fn it_starts_shut_and_clears_what_a_voter_would_have_left() {
    let mut fx = Vec::new();
    let now = at(Instant::from_nanos(1_000_000_000));
    let follower = Follower::start(setup(FencePostgres::Demote), Durable::default(), true, now, &mut fx);
    assert!(matches!(fx[0], Effect::Cut { .. }), "{fx:?}");
    for wanted in [
        Effect::UnbindVip { address: IpAddr::from([192, 0, 2, 100]) },
        Effect::KernelGate { until: None },
        Effect::Units { start: false },
    ] {
        assert!(fx.contains(&wanted), "{wanted:?} is missing");
    }
    let shown = follower.snapshot(now);
    assert_eq!((shown.role, shown.gate.state, shown.gate.open), (Role::Passive, GateState::Shut, false));
    assert!(shown.peer.is_none(), "nobody has said that it is active");
}

#[test]
fn it_follows_the_open_gate_of_the_highest_epoch_and_never_goes_back() {
    let mut play = Play::new(Vec::new());
    play.run(1500);
    assert_eq!(play.followed(), ["a"]);
    // Both claim one epoch, nobody answers, nobody serves: it stays.
    for (a, b) in [(Some(voter("a", 1)), Some(voter("b", 1))), (None, None), (Some(voter("a", 0)), Some(voter("b", 0)))]
    {
        play.voters = [(name("a"), a), (name("b"), b)].into();
        play.run(5000);
        assert_eq!(play.followed(), ["a"]);
    }
    // b took over; a, which has not noticed, still says that it serves.
    play.voters = [(name("a"), Some(voter("a", 1))), (name("b"), Some(voter("b", 2)))].into();
    play.run(1500);
    assert_eq!(play.followed(), ["a", "b"]);
    play.voters.insert(name("b"), None);
    play.run(5000);
    assert_eq!(play.followed(), ["a", "b"], "an epoch that is over is followed");
    // Not even by the next life.
    let mut again = Play::new(play.disk.clone());
    again.voters.insert(name("b"), None);
    again.run(5000);
    assert_eq!(again.followed(), Vec::<&str>::new(), "an epoch that is over is followed after a restart");
}

#[test]
fn it_waits_for_its_slot_and_leaves_another_cluster_alone() {
    let mut facts = voter("a", 1);
    facts.state.prepared = false;
    let mut play = Play::told(FencePostgres::Demote, Vec::new(), Some(facts), None);
    play.run(3000);
    assert_eq!(play.tasks, []);

    let mut play = Play::new(Vec::new());
    play.report = Some(standby(78, 1, 1000, false));
    play.run(3000);
    assert_eq!(play.tasks, [], "another cluster's standby was touched");
    assert!(play.trouble().contains("system identifier"), "{}", play.trouble());

    // Somebody's database, which this daemon was given by mistake.
    let mut play = Play::new(Vec::new());
    play.report = Some(PgReport { in_recovery: false, ..standby(78, 1, 1000, false) });
    play.run(3000);
    assert_eq!(play.tasks, [], "another cluster's primary was touched");
    assert!(play.trouble().contains("another cluster"), "{}", play.trouble());
}

#[test]
fn a_postgresql_found_writable_is_marked_then_demoted_and_follows_nobody_until_rejoin() {
    let demote = PgTask::Demote { follow_peer: false };
    for (fence, wanted) in
        [(FencePostgres::Demote, Some(demote)), (FencePostgres::Stop, Some(PgTask::Stop)), (FencePostgres::Keep, None)]
    {
        let serves = || Some(voter("a", 1));
        let mut play = Play::told(fence, Vec::new(), serves(), None);
        play.writes = false;
        play.report = Some(PgReport { in_recovery: false, ..standby(77, 1, 1000, false) });
        play.run(2000);
        assert_eq!(play.tasks, [], "it acted before it was on disk");
        let mut play = Play::told(fence, Vec::new(), serves(), None);
        play.report = Some(PgReport { in_recovery: false, ..standby(77, 1, 1000, false) });
        play.run(1250);
        assert_eq!(play.tasks.first().map(|(_, task)| task.clone()), wanted);
        assert!(play.trouble().contains("portcullis rejoin c"), "{}", play.trouble());
        if fence == FencePostgres::Demote {
            play.report = Some(standby(77, 2, 1000, false));
            play.run(3000);
            let mut next = Play::new(play.disk.clone());
            next.report = play.report.clone();
            next.run(3000);
            for life in [&play, &next] {
                assert_eq!(life.followed(), Vec::<&str>::new(), "it follows with data of its own");
                assert!(life.trouble().contains("portcullis rejoin c"), "{}", life.trouble());
            }
        }
    }
}

#[test]
fn who_is_ahead_of_the_switch_point_says_so_and_is_not_nudged_for_ever() {
    let mut play = Play::after_failover();
    play.report = Some(standby(77, 1, 1500, false));
    play.run(9000);
    assert_eq!(play.followed(), ["b"]);
    let nudges = |play: &Play| play.tasks.iter().filter(|(_, task)| *task == PgTask::Nudge).count();
    assert!((5..=9).contains(&nudges(&play)), "{} nudges in 9 s", nudges(&play));
    play.answer = Some(Ok(PgOutput::Lsn(Lsn(1400))));
    play.run(3000);
    let looked = PgTask::SwitchPoint { from: TimelineId(1), to: TimelineId(2) };
    assert_eq!(play.tasks.iter().filter(|(_, task)| *task == looked).count(), 1);
    assert!(play.trouble().contains("is ahead of where timeline 2 of b began"), "{}", play.trouble());
    let before = nudges(&play);
    play.run(20_000);
    assert_eq!(nudges(&play), before);

    // Behind the switch point it is not ahead: something else is wrong, and it goes on looking.
    let mut play = Play::after_failover();
    play.report = Some(standby(77, 1, 1300, false));
    play.answer = Some(Ok(PgOutput::Lsn(Lsn(1400))));
    play.run(14_000);
    assert!(play.trouble().contains("does not stream from b"), "{}", play.trouble());
    play.report = Some(standby(77, 2, 1300, true));
    play.run(1000);
    assert_eq!(play.trouble(), "");
    assert!(play.follower.snapshot(at(play.now)).postgres.streaming);
}

#[test]
fn what_only_a_voter_can_do_is_refused_with_where_to_do_it() {
    let mut play = Play::new(Vec::new());
    play.run(2000);
    let promote = Command::Promote { dry_run: false, yes: true, accept_data_loss: true, peer_is_off: Some(name("a")) };
    let switchover = Command::Switchover { to: Some(name("c")), dry_run: false };
    let rejoin = Command::Rejoin { node: name("b"), dry_run: false };
    for (ticket, command) in [(11, promote), (12, switchover), (13, rejoin), (14, Command::Pause)] {
        let (exit, text) = play.command(ticket, command);
        assert_eq!(exit, 3, "{text}");
        assert!(text.contains("a or b"), "{text}");
    }
    assert_eq!(play.command(15, Command::Fence { reason: String::new() }).0, 0);
    assert_eq!(play.command(16, Command::Unfence).0, 0);
    // Maintenance: PostgreSQL is left alone, whoever serves.
    assert_eq!(play.command(17, Command::Maintenance { on: true }).0, 0);
    play.voters = [(name("a"), None), (name("b"), Some(voter("b", 2)))].into();
    play.run(3000);
    assert_eq!(play.followed(), ["a"]);
    assert_eq!(play.command(18, Command::Rejoin { node: name("c"), dry_run: false }).0, 3);
    assert_eq!(play.command(19, Command::Maintenance { on: false }).0, 0);
    play.run(1000);
    assert_eq!(play.followed(), ["a", "b"]);
}

#[test]
fn a_rejoin_marks_prepares_stops_clones_and_ends_when_it_streams() {
    let mut play = Play::new(Vec::new());
    play.report = None;
    play.run(1000);
    play.give(Event::Command { ticket: 21, command: Command::Rejoin { node: name("c"), dry_run: false } });
    let kinds: Vec<&PgTask> = play.tasks.iter().map(|(_, task)| task).collect();
    assert!(matches!(kinds.as_slice(), [PgTask::PlanRejoin(_), PgTask::Stop, PgTask::Rejoin(_)]), "{kinds:?}");
    assert!(play.tasks[1..].iter().all(|(from, _)| from == &Some(name("a"))));
    assert_eq!(play.asked, ["look a", "prepare a", "look a", "look a"], "facts, role and slot, facts, the goal");
    assert!(Durable::replay(&play.disk).rejoining && ended(21).is_none());
    // The service moves while it catches up: it goes along.
    play.voters = [(name("a"), None), (name("b"), Some(voter("b", 2)))].into();
    play.report = Some(standby(77, 1, 1000, false));
    play.source_lsn = 2000;
    play.run(3000);
    assert_eq!(play.followed(), ["b"]);
    assert_eq!(play.asked.last().map(String::as_str), Some("look b"), "a's last word is no goal any more");
    // It streams, and has not got yet what was written after the work.
    play.report = Some(standby(77, 2, 1999, true));
    play.run(3000);
    assert!(ended(21).is_none() && Durable::replay(&play.disk).rejoining);
    // As far, and on a timeline that is over.
    play.report = Some(PgReport { start: 2, ..standby(77, 1, 2000, true) });
    play.run(1000);
    assert!(ended(21).is_none(), "it ended on the old timeline");
    play.report = Some(PgReport { start: 2, ..standby(77, 2, 2000, true) });
    play.run(1000);
    assert_eq!(ended(21), Some((0, "c is a standby of b, streaming".to_owned())));
    let durable = Durable::replay(&play.disk);
    assert!(!durable.rejoining && durable.initialised && !durable.is_holder());
}

#[test]
fn a_rejoin_interrupted_by_a_restart_follows_nobody_and_is_run_again() {
    let mut play = Play::new(Vec::new());
    play.run(1000);
    play.work = Err("the disk is full".to_owned());
    let (exit, text) = play.command(31, Command::Rejoin { node: name("c"), dry_run: false });
    assert_eq!(exit, 4, "{text}");
    let mut next = Play::new(play.disk.clone());
    next.run(3000);
    assert_eq!(next.tasks, []);
    assert!(next.trouble().contains("portcullis rejoin c"), "{}", next.trouble());
    next.give(Event::Command { ticket: 32, command: Command::Rejoin { node: name("c"), dry_run: false } });
    next.report = Some(standby(77, 1, 1000, true));
    next.run(1000);
    assert_eq!(ended(32).map(|(exit, _)| exit), Some(0));

    // Before anything was touched it is taken back whole.
    let mut play = Play::new(Vec::new());
    play.run(1000);
    play.writes = false;
    play.give(Event::Command { ticket: 33, command: Command::Rejoin { node: name("c"), dry_run: false } });
    play.give(Event::RecordFailed { seq: play.follower.next_seq - 1, why: "full".to_owned() });
    assert_eq!(ended(33).map(|(exit, _)| exit), Some(1));
    // Nobody serves: said so after the limit.
    let mut play = Play::new(Vec::new());
    play.voters = [(name("a"), None), (name("b"), Some(voter("b", 0)))].into();
    play.run(3000);
    play.give(Event::Command { ticket: 34, command: Command::Rejoin { node: name("c"), dry_run: false } });
    play.run(29_000);
    assert_eq!(ended(34), None);
    play.run(2000);
    assert_eq!(ended(34).map(|(exit, _)| exit), Some(1));
    assert!(!play.disk.iter().any(|entry| matches!(entry, Entry::RejoinStarted { .. })));
}

#[test]
fn a_wish_said_again_and_again_is_one_rejoin() {
    let mut play = Play::new(Vec::new());
    let mut facts = voter("a", 1);
    facts.wish = Some(Wish { id: 4711, dry_run: false });
    play.voters.insert(name("a"), Some(facts));
    play.report = Some(standby(77, 1, 1000, true));
    play.run(10_000);
    let clones = play.tasks.iter().filter(|(_, task)| matches!(task, PgTask::Rejoin(_))).count();
    assert_eq!(clones, 1);
    let brief = play.follower.state().procedure.expect("it tells of it");
    assert_eq!((brief.id, brief.ended.map(|(exit, _)| exit)), (4711, Some(0)));
}

#[test]
fn all_nodes_are_shown_with_what_the_active_one_sees() {
    let mut play = Play::new(Vec::new());
    let row = |text: &str, sync: &str| StandbyRow {
        application_name: text.to_owned(),
        state: "streaming".into(),
        sync_state: sync.to_owned(),
        flush_lsn: Some(Lsn(990)),
        replay_lsn: Some(Lsn(980)),
        pid: 1,
    };
    let mut facts = voter("a", 1);
    facts.standbys = vec![row("b", "sync"), row("c", "async")];
    play.voters.insert(name("a"), Some(facts));
    play.report = Some(standby(77, 1, 980, true));
    play.run(2000);
    let shown = play.follower.snapshot(at(play.now));
    let rows: Vec<_> = shown
        .nodes
        .iter()
        .map(|n| (n.name.as_str(), n.status.as_str(), n.role.as_str(), n.replication_delay_bytes))
        .collect();
    let wanted = [
        ("a", "up", "primary", Some(0)),
        ("b", "up", "standby", Some(20)),
        ("c", "up", "standby", Some(20)),
        ("d", "down", "standby", None),
    ];
    assert_eq!(rows, wanted);
    assert_eq!(shown.nodes[1].sync_state.as_deref(), Some("sync"));
    assert_eq!(shown.active_node(), Some(&name("a")));
}
