//! What a drill measures, and where it goes.

use super::*;
use crate::engine::status::Role;

fn seen(ms: u64, good: bool) -> Seen {
    let at = Instant::from_nanos(1_000_000_000 + ms * 1_000_000);
    Seen { at, good, error: (!good).then(|| "refused".to_owned()) }
}

#[test]
fn the_gap_is_between_good_answers_and_only_of_this_way() {
    let all = [
        seen(0, true),
        seen(900, true), // an older way's
        seen(950, true),
        seen(1000, false),
        seen(1100, false),
        seen(1400, true),
        seen(1450, true),
    ];
    let way = measure(&all, seen(940, true).at);
    assert_eq!((millis(way.gap), way.errors, way.first_error.as_deref()), (450, 2, Some("refused")));
    // A gap that began before it and ended in it counts as a whole.
    assert_eq!(millis(measure(&all, seen(1200, true).at).gap), 450);
    assert_eq!(measure(&all, seen(1460, true).at).gap, Duration::ZERO);
}

#[test]
fn it_goes_to_the_other_voter_from_whichever_node_it_is_given_on() {
    let name = |text: &str| text.parse::<NodeName>().expect("a name");
    let golden = include_str!("../../../../tests/golden/status-active.json");
    let on = |node: &str, active: &str| {
        let mut now: Snapshot = serde_json::from_str(golden).expect("the golden status");
        now.node = name(node);
        now.role = if node == active { Role::Active } else { Role::Passive };
        now.gate.open = node == active;
        let peer = now.peer.as_mut().expect("a peer");
        // Of a voter the other one, of a node without a vote the active one.
        peer.name = name(if node == "alp" { "midna" } else { "alp" });
        if node == "third" {
            peer.name = name(active);
        }
        peer.role = Some(if node == active { Role::Passive } else { Role::Active });
        now
    };
    let voters = [name("alp"), name("midna")];
    for (active, away) in [("alp", "midna"), ("midna", "alp")] {
        for node in ["alp", "midna"] {
            let found = ends(&on(node, active), None, &voters).expect("there and back");
            assert_eq!(found, (name(active), name(away)), "given on {node}");
        }
        let refused = ends(&on("third", active), None, &voters).expect_err("no vote");
        assert!(refused.exit == ExitCode::Refused && refused.text.contains("alp and midna"), "{}", refused.text);
        let refused = ends(&on(active, active), Some(&name("third")), &voters).expect_err("never promoted");
        assert!(refused.exit == ExitCode::Refused && refused.text.contains("third is no voter"), "{}", refused.text);
    }
}

#[test]
fn the_prober_is_read_tick_by_tick() {
    let sightings = Sightings::default();
    let mut listening = Listening { seen: sightings.clone(), line: Vec::new() };
    let text = "{\"tick\":1,\"health\":true,\"select\":true,\"update\":true,\"error\":null}\n\
                {\"tick\":2,\"health\":\
                true,\"select\":true,\"update\":false,\"error\":\"update: late\"}\n{\"summary\":true}\n";
    for part in text.as_bytes().chunks(7) {
        listening.write_all(part).expect("never fails");
    }
    let all = sightings.all();
    assert_eq!(all.len(), 2);
    assert!(all[0].good && !all[1].good && all[1].error.as_deref() == Some("update: late"));
}
