//! What people see of each state, against golden files; `UPDATE_GOLDEN=1` writes them.

use crate::states::{active, fenced, lapsed, passive, paused};
use portcullis::app::render::check::{self, Level, Thresholds};
use portcullis::app::render::{Style, cgi, nodes, status};
use portcullis::engine::outlook::{Outlook, next};
use portcullis::engine::status::{Role, Snapshot, VerdictWord};

/// Compares with `tests/golden/NAME`; `UPDATE_GOLDEN=1` writes it instead.
pub fn golden(name: &str, text: &str) {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, wanted, "{path} differs; UPDATE_GOLDEN=1 accepts the new text");
}

#[test]
fn golden_texts_of_every_state() {
    for (name, mut snapshot) in
        [("active", active()), ("passive", passive()), ("lapsed", lapsed()), ("fenced", fenced()), ("paused", paused())]
    {
        if ["lapsed", "fenced"].contains(&name) {
            snapshot.outlook = Outlook::unknown("what would be lost if the active node died now is not known");
        }
        snapshot.next = next(&snapshot);
        let text = status(&snapshot, Style::PLAIN);
        assert!(!text.contains('\x1b') && text.lines().count() <= 25, "{text}");
        golden(&format!("status-{name}.txt"), &text);
        golden(&format!("check-{name}.txt"), &check(&snapshot).1);
    }
    golden("nodes.txt", &nodes(&active().nodes, Style::PLAIN));
    golden("nodes-terminal.txt", &nodes(&active().nodes, Style { color: false, terminal: true }));
    golden("cgi.txt", &cgi(&active()));
    golden("status-active.json", &(serde_json::to_string_pretty(&active()).unwrap() + "\n"));
}

#[test]
fn forwarded_clients_are_shown_when_there_are_any() {
    let mut snapshot = passive();
    assert!(!status(&snapshot, Style::PLAIN).contains("forwarded"));
    snapshot.gate.forwarded = 3;
    let text = status(&snapshot, Style::PLAIN);
    let line = text.lines().find(|line| line.starts_with("gate ")).unwrap_or_default();
    assert!(line.ends_with("0 sessions, 3 forwarded to the active node"), "{line}");
}

#[test]
fn colour_is_only_colour() {
    let coloured = status(&lapsed(), Style { color: true, terminal: false });
    assert!(coloured.contains("\x1b[31m"));
    let stripped = regex::Regex::new("\x1b\\[[0-9]+m").unwrap().replace_all(&coloured, "").into_owned();
    assert_eq!(stripped, status(&lapsed(), Style::PLAIN));
}

#[test]
fn what_came_over_the_wire_cannot_write_to_the_terminal() {
    let mut snapshot = lapsed();
    let evil = || Some("a\x1b]0;x\x07\nb\u{9b}2J".to_owned());
    snapshot.gate.reason = evil();
    snapshot.advice = evil();
    snapshot.postgres.error = evil();
    snapshot.replication.lsn = evil();
    snapshot.replication.alone_since = evil();
    snapshot.witness.as_mut().unwrap().servers[0].error = evil();
    snapshot.vips[0].conflict = evil();
    snapshot.events[0].text = evil().unwrap();
    snapshot.nodes[0].hostname = evil().unwrap();
    for text in [status(&snapshot, Style::PLAIN), check(&snapshot).1] {
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        assert!(text.lines().all(|line| !line.starts_with('b')), "{text:?}");
    }
}

fn check(snapshot: &Snapshot) -> (Level, String) {
    check::check(snapshot, &Thresholds::default())
}

#[test]
fn check_compares_values_with_thresholds() {
    let thresholds = |warning: &[&str], critical: &[&str]| {
        let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Thresholds { warning: all(warning), critical: all(critical) }
    };
    let mut lagging = active();
    lagging.nodes[1].replication_delay_bytes = Some(5_000_000);
    lagging.gate.waiting = 7;
    let table = [
        (active(), thresholds(&["replication_delay=1000", "lease=1:"], &["sessions=13"]), Level::Ok, ""),
        (active(), thresholds(&["lease=5:"], &[]), Level::Warning, "lease is 4.21s, outside of 5:"),
        (active(), thresholds(&["sessions=5"], &["sessions=10"]), Level::Critical, "sessions is 12, outside of 10"),
        (active(), thresholds(&["sessions=20", "sessions=5"], &[]), Level::Warning, "outside of 5"),
        (active(), thresholds(&["sessions=@10:20"], &[]), Level::Warning, "inside of @10:20"),
        (
            lagging.clone(),
            thresholds(&["replication_delay=1000000"], &["replication_delay=9000000"]),
            Level::Warning,
            "replication_delay is 5000000B",
        ),
        (lagging, thresholds(&[], &["waiting=5"]), Level::Critical, "waiting is 7, outside of 5"),
        // A passive node holds no lease: that is as it should be.
        (passive(), thresholds(&[], &["lease=1:"]), Level::Ok, ""),
        (passive(), thresholds(&["peer_age=0.05"], &[]), Level::Warning, "peer_age is 0.09s"),
        // What is worse comes first.
        (fenced(), thresholds(&["sessions=1:"], &[]), Level::Critical, "CRITICAL - alp is fenced"),
    ];
    for (snapshot, thresholds, level, words) in table {
        let (found, line) = check::check(&snapshot, &thresholds);
        assert_eq!(found, level, "{line}");
        assert!(line.contains(words), "{line}");
        is_performance_data(&line);
    }
    let (_, line) = check::check(&active(), &thresholds(&["lease=2:", "sessions=100"], &["lease=1:"]));
    assert!(line.contains("| lease=4.21s;2:;1:;0 sessions=12;100;;0 "), "{line}");
    for wrong in ["lease", "nothing=1", "lease=x", "lease=2:1"] {
        assert!(wrong.parse::<check::Threshold>().is_err(), "{wrong}");
    }
}

/// `label=value[UOM];warn;crit;min;max`, as the Monitoring Plugins' guidelines have it.
fn is_performance_data(line: &str) {
    let range = r"@?(?:[~0-9.]+:)?[0-9.]*:?";
    let one = format!(r"[a-z_]+=[0-9]+(?:\.[0-9]+)?(?:s|B|c|%)?;{range};{range};[0-9]*(?:;[0-9]*)?");
    let form = regex::Regex::new(&format!(r"^PORTCULLIS [A-Z]+ - [^|]+ \| {one}(?: {one})*\n$")).unwrap();
    assert!(form.is_match(line), "{line}");
}

fn with(mut snapshot: Snapshot, change: impl FnOnce(&mut Snapshot)) -> Snapshot {
    change(&mut snapshot);
    snapshot
}

#[test]
fn check_has_one_level_for_every_state() {
    let gone = |s: &mut Snapshot| {
        let peer = s.peer.as_mut().unwrap();
        peer.reachable = false;
    };
    let table: Vec<(&str, Snapshot, Level, &str)> = vec![
        ("active", active(), Level::Ok, "alp active, epoch 7, lease 4.2 s, in sync"),
        ("active, peer gone", with(active(), gone), Level::Ok, "midna does not answer"),
        (
            "active, witness silent",
            with(active(), |s| s.witness.as_mut().unwrap().servers[0].verdict = VerdictWord::Silent),
            Level::Ok,
            "the witness is silent",
        ),
        ("active, not in sync", with(active(), |s| s.replication.in_sync = false), Level::Warning, "not in sync"),
        (
            "alone",
            with(active(), |s| {
                s.replication.in_sync = false;
                s.replication.alone_since = Some("2026-11-20T15:12:00Z".into());
            }),
            Level::Warning,
            "alone since",
        ),
        (
            "asynchronous",
            with(active(), |s| {
                s.replication.in_sync = false;
                s.replication.mode = "asynchronous".into();
            }),
            Level::Ok,
            "asynchronous",
        ),
        (
            "asynchronous, no standby",
            with(active(), |s| {
                s.replication.in_sync = false;
                s.replication.mode = "asynchronous".into();
                s.nodes[1].replication_state = None;
            }),
            Level::Warning,
            "no standby is streaming",
        ),
        ("paused", paused(), Level::Warning, "paused"),
        ("VIP conflict", with(active(), |s| s.vips[0].conflict = Some("02:00:5e:00".into())), Level::Critical, "VIP"),
        ("hanging", with(active(), |s| s.turn_running = false), Level::Critical, "turn does not run"),
        (
            "PostgreSQL down",
            with(active(), |s| {
                s.postgres.up = false;
                s.postgres.error = Some("refused | connection".into());
            }),
            Level::Critical,
            "PostgreSQL is down: refused / connection",
        ),
        (
            "PostgreSQL hangs",
            with(active(), |s| {
                s.replication.in_sync = false;
                s.postgres.hangs_since = Some("2026-11-20T15:12:00Z".into());
            }),
            Level::Critical,
            "CRITICAL - PostgreSQL does not answer since 2026-11-20T15:12:00Z; alp active, epoch 7 |",
        ),
        ("passive", passive(), Level::Ok, "midna passive, epoch 7, streaming from alp"),
        ("passive, peer gone", with(passive(), gone), Level::Warning, "the peer alp does not answer"),
        ("not streaming", with(passive(), |s| s.postgres.streaming = false), Level::Warning, "not streaming"),
        (
            "nobody active",
            with(passive(), |s| s.peer.as_mut().unwrap().role = Some(Role::Passive)),
            Level::Critical,
            "nobody is known to be active",
        ),
        (
            "nothing known",
            with(with(passive(), gone), |s| s.witness.as_mut().unwrap().points_at = None),
            Level::Critical,
            "nobody is known to be active",
        ),
        (
            "a writable primary that is not active",
            with(passive(), |s| s.postgres.role = Some("primary".into())),
            Level::Critical,
            "writable primary",
        ),
        (
            "holder without proof",
            with(passive(), |s| {
                s.peer.as_mut().unwrap().role = Some(Role::Passive);
                s.witness.as_mut().unwrap().points_at = Some("midna".parse().unwrap());
            }),
            Level::Critical,
            "has no proof",
        ),
        ("lapsed", lapsed(), Level::Critical, "alp has lapsed"),
        ("fenced", fenced(), Level::Critical, "alp is fenced: midna won epoch 8"),
    ];
    for (name, snapshot, level, words) in table {
        let (found, line) = check(&snapshot);
        assert_eq!(found, level, "{name}: {line}");
        assert!(line.starts_with(&format!("PORTCULLIS {} - ", level.as_str())), "{name}: {line}");
        assert!(line.contains(words), "{name}: {line}");
        assert_eq!(line.matches('|').count(), 1, "{name}: {line}");
        assert_eq!(line.matches('\n').count(), 1, "{name}: {line}");
        is_performance_data(&line);
        assert!(line.contains(" | lease=") && line.contains(";;;0 sessions="), "{name}: {line}");
    }
    assert_eq!([Level::Ok, Level::Warning, Level::Critical, Level::Unknown].map(Level::exit), [0, 1, 2, 3]);
}
