//! The rest of the pair: this node's daemon and what it says of its peer, the witness, files, units and interfaces.

use super::gather::{Facts, Server};
use super::{Level, Report};
use crate::app::client::DRILL_FAILED;
use crate::base::config::{Config, DnsMode, Node};
use crate::base::ids::NodeName;
use crate::engine::status::{PeerStatus, Role, Snapshot};
use crate::wire::dns::UpdateOutcome;

const DAEMON: &str = "daemon";
const PEER: &str = "peer";
const WITNESS: &str = "witness";
const FILES: &str = "files";
const UNITS: &str = "units";
/// Clocks that synchronise are nearer than this; it is also the tolerance of the pause detector.
const NEAR_SECONDS: u64 = 2;
/// Half of TSIG's fudge of 300 s: beyond that each answer counts as silence.
const FAR_SECONDS: u64 = 150;

pub(super) fn daemon(config: &Config, facts: &Facts, report: &mut Report) {
    match &facts.status {
        Ok(snapshot) => state(config, snapshot, report),
        Err(why) => {
            report.find(Level::Critical, DAEMON, why.clone(), "systemctl start portcullis, then run doctor again");
            report.unchecked("the peer, its version and configuration", "only the daemon hears it");
            report.unchecked("maintenance, the fence, synchronous replication", "only the daemon knows");
        }
    }
}

fn state(config: &Config, snapshot: &Snapshot, report: &mut Report) {
    report.checked("the daemon, and the peer as it sees it");
    let ours = env!("CARGO_PKG_VERSION");
    if snapshot.version != ours {
        let text = format!("the daemon runs version {}, this program is {ours}", snapshot.version);
        report.find(Level::Warning, DAEMON, text, "restart it: first on the passive node, then switch over, then here");
    }
    if snapshot.maintenance {
        let text = "maintenance is on: PostgreSQL here is left alone, and nothing can be promoted";
        report.find(Level::Warning, DAEMON, text, "portcullis maintenance off");
    }
    if snapshot.role == Role::Fenced {
        let reason = snapshot.gate.reason.as_deref().unwrap_or("no reason given");
        let text = format!("{} is fenced, so nobody can fail over to it: {reason}", snapshot.node);
        report.find(Level::Warning, DAEMON, text, format!("portcullis rejoin {}", snapshot.node));
    }
    let active = snapshot.role == Role::Active;
    if active && snapshot.replication.mode == "synchronous" && !snapshot.replication.in_sync {
        let text = "replication is not in sync: a failover now would lose what is acknowledged alone, or commits wait";
        report.find(Level::Warning, "replication", text, "see `portcullis status`; start the standby, or rejoin it");
    }
    if let Some(cause) = &snapshot.procedure {
        let text = format!("a {} is under way or was left half-way: {}", cause.kind, cause.step);
        report.find(Level::Warning, DAEMON, text, "wait for it; if it was left, run the same command again");
    }
    drilled(config, snapshot, report);
    let Some(peer) = &snapshot.peer else { return };
    let name = &peer.name;
    if !peer.reachable {
        let port = config.node(name).map_or(6433, |node| node.peer_listen.port());
        let text = format!("{name}'s daemon does not answer on the peer channel");
        let remedy = format!("start it; let TCP port {port} pass both ways; compare cluster.key on both nodes");
        report.find(Level::Warning, PEER, text, remedy);
        report.unchecked("the peer's version and configuration", "it does not answer");
        return;
    }
    if peer.same_configuration == Some(false) {
        let text = format!("{name} runs another configuration (nodes, timers, witness or VIP differ): neither pledges");
        let remedy = "make the files equal on both nodes and restart both daemons, the passive node's first";
        report.find(Level::Critical, PEER, text, remedy);
    }
    other_nodes(config, peer, report);
    if let Some(version) = peer.version.as_ref().filter(|version| **version != snapshot.version) {
        let text = format!("{name}'s daemon is version {version}, this node's {}", snapshot.version);
        report.find(Level::Warning, PEER, text, "finish the upgrade on both nodes");
    }
}

/// A switchover that was never tried is a hope.
fn drilled(config: &Config, snapshot: &Snapshot, report: &mut Report) {
    if !config.node(&snapshot.node).is_some_and(|node| node.voter) {
        return;
    }
    report.checked("the last drill");
    let (text, remedy) = match snapshot.events.iter().rev().find(|event| event.kind == "drill") {
        None => ("no drill on record among the events kept here".to_owned(), "portcullis drill"),
        Some(event) if event.text.starts_with(DRILL_FAILED) => {
            (format!("{}: {}", event.at, event.text), "mend what it says, then: portcullis drill")
        }
        Some(_) => return,
    };
    report.find(Level::Advice, DAEMON, text, remedy);
}

/// One file serves all nodes; who is missing in one has no slot there, and is not answered.
fn other_nodes(config: &Config, peer: &PeerStatus, report: &mut Report) {
    let theirs = &peer.nodes;
    if theirs.is_empty() {
        return;
    }
    let missing = |there: &dyn Fn(&NodeName) -> bool, all: &[NodeName]| {
        let names: Vec<&str> = all.iter().filter(|name| !there(name)).map(NodeName::as_str).collect();
        names.join(", ")
    };
    let ours: Vec<NodeName> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let (there, here) = (missing(&|n| theirs.contains(n), &ours), missing(&|n| ours.contains(n), theirs));
    for (names, whose) in [(there, format!("{}'s configuration", peer.name)), (here, "this node's file".to_owned())] {
        if !names.is_empty() {
            let text = format!("{whose} does not name {names}, the other one does");
            let remedy = "make the files equal on all nodes and restart the daemons, the passive node's first";
            report.find(Level::Warning, PEER, text, remedy);
        }
    }
}

pub(super) fn witness(config: &Config, facts: &Facts, report: &mut Report) {
    let Some(dns) = &config.dns else {
        let text = "there is no [dns]: without a third voter, taking over from a silent node needs a person's word or \
                    fence.stonith";
        report.find(Level::Advice, WITNESS, text, "add a DNS server that takes signed updates and stands with neither");
        return;
    };
    for server in &facts.server_on_node {
        let text = format!("the witness {server} stands on one of the nodes: when that dies, it is silent as well");
        let remedy = "use a DNS server that stands with neither node (portcullis witness runs on any third machine)";
        report.find(Level::Warning, WITNESS, text, remedy);
    }
    match &facts.servers {
        Ok(servers) => servers.iter().for_each(|server| answered(server, dns.mode, dns.ttl.as_secs(), report)),
        Err(why) => {
            report.find(Level::Critical, WITNESS, why.clone(), "correct [dns]; portcullis check-config proves it");
            report.unchecked("the witness", "it could not be asked");
        }
    }
}

fn answered(server: &Server, mode: DnsMode, ttl: u64, report: &mut Report) {
    let address = server.address;
    report.checked(format!("the witness {address}"));
    let reading = match &server.answer {
        Ok(reading) => reading,
        Err(why) => {
            let remedy = "let UDP and TCP port 53 pass to it; compare the TSIG key, and the clocks";
            report.find(Level::Critical, WITNESS, why.clone(), remedy);
            report.unchecked("the right to update, and the clock's difference", "the witness gave no answer");
            return;
        }
    };
    if let Some(what) = &reading.strange {
        report.find(
            Level::Critical,
            WITNESS,
            format!("{address}: {what}"),
            "put A and AAAA records at the name itself",
        );
    }
    if !reading.pair.addresses.is_empty() && u64::from(reading.pair.ttl) > ttl {
        let text = format!("the record's TTL is {} s, dns.ttl {ttl} s: clients stay away longer", reading.pair.ttl);
        report.find(Level::Advice, WITNESS, text, "the next promote writes dns.ttl; until then set it in the zone");
    }
    match reading.signed_time {
        Some(theirs) => clock(address, theirs, server.asked_at, report),
        None if mode == DnsMode::Update => {
            report.unchecked("the clock's difference to the witness", "its answers are not signed");
        }
        None => {}
    }
    let names = "the service name and the marker (_portcullis. before it)";
    match &server.update {
        None => {}
        Some(UpdateOutcome::Conflict) => {
            report.checked("the right to update the record (an update that had to fail, failed as it had to)");
        }
        Some(UpdateOutcome::Refused(why)) => {
            let remedy = format!("let the TSIG key of dns.tsig_name change {names} on that server; see README.md");
            report.find(Level::Critical, WITNESS, format!("{address} refuses updates: {why}"), remedy);
        }
        Some(UpdateOutcome::Done) => {
            let text =
                format!("{address} carried an update out whose prerequisite does not hold: no race can be decided");
            report.find(
                Level::Critical,
                WITNESS,
                text,
                "use a server that keeps to RFC 2136 section 2.4: BIND, Knot, PowerDNS",
            );
        }
        Some(UpdateOutcome::NotSent(why) | UpdateOutcome::Unknown(why)) => {
            let text = format!("whether {address} takes updates is unknown: {why}");
            report.find(Level::Warning, WITNESS, text, "let TCP port 53 pass to it, and run doctor again");
        }
    }
}

fn clock(address: std::net::SocketAddr, theirs: u64, ours: i64, report: &mut Report) {
    report.checked("the clock's difference to the witness");
    let theirs = i64::try_from(theirs).unwrap_or(i64::MAX);
    let off = theirs.abs_diff(ours);
    if off <= NEAR_SECONDS {
        return;
    }
    let level = if off > FAR_SECONDS { Level::Critical } else { Level::Warning };
    let way = if theirs > ours { "behind" } else { "ahead of" };
    let text = format!("this machine's clock is {off} s {way} that of {address}; at 300 s its answers stop counting");
    report.find(level, WITNESS, text, "synchronise both clocks: timedatectl set-ntp true");
}

pub(super) fn machine(config: &Config, node: &Node, facts: &Facts, report: &mut Report) {
    report.checked("files of the configuration");
    for (text, remedy) in &facts.files {
        report.find(Level::Critical, FILES, text.clone(), remedy.clone());
    }
    if let Some(name) = &facts.missing_interface {
        let text = format!("{} has no interface {name}, which the VIP is to be bound to", node.name);
        report.find(Level::Critical, "vip", text, "correct vip.interface, or vip_interface of this [[node]]");
    }
    match &facts.unit {
        Some((unit, true)) => report.checked(format!("{unit} asks may-start-primary")),
        Some((unit, false)) => {
            let text =
                format!("{unit} does not ask may-start-primary: after a reboot an old primary comes up writable");
            let remedy = format!(
                "as root:\ninstall -D -m 0644 /usr/share/doc/portcullis/examples/postgresql-portcullis.conf \
                 /etc/systemd/system/{unit}.d/portcullis.conf\nsystemctl daemon-reload"
            );
            report.find(Level::Warning, UNITS, text, remedy);
        }
        None => report.unchecked("may-start-primary", "no systemd unit owns this cluster; whatever starts it must ask"),
    }
    match &facts.units {
        Ok(units) => units.iter().for_each(|unit| {
            let name = &unit.name;
            if unit.load != "loaded" {
                let text = format!("{name} of service.units is {}", unit.load);
                report.find(Level::Critical, UNITS, text, "install the unit, or correct service.units");
            } else if matches!(unit.file.as_str(), "enabled" | "enabled-runtime") {
                let text = format!("{name} of service.units is enabled: it starts at boot, whoever is active");
                report.find(Level::Warning, UNITS, text, format!("systemctl disable {name}; the daemon starts it"));
            }
        }),
        Err(why) => report.unchecked("service.units", why.clone()),
    }
    if !config.service.units.is_empty() {
        report.checked("service.units");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::status::EventRow;
    use crate::wire::dns::{Reading, RecordPair};

    fn server(update: UpdateOutcome, signed_time: Option<u64>) -> Server {
        let pair = RecordPair::written(&["192.0.2.11".parse().expect("an address")], 5, "v=1");
        let reading = Reading { pair, signed_time, ..Reading::default() };
        let address = ([192, 0, 2, 53], 53).into();
        Server { address, answer: Ok(reading), asked_at: 1_000_000, update: Some(update) }
    }

    fn found(server: &Server) -> Vec<Level> {
        let mut report = Report::default();
        answered(server, DnsMode::Update, 5, &mut report);
        report.findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn the_right_to_update_is_proven_by_a_conflict_alone() {
        let found = |update| found(&server(update, Some(1_000_000)));
        assert_eq!(found(UpdateOutcome::Conflict), []);
        assert_eq!(found(UpdateOutcome::Refused("BADKEY".into())), [Level::Critical]);
        assert_eq!(found(UpdateOutcome::Done), [Level::Critical]);
        assert_eq!(found(UpdateOutcome::Unknown("silence".into())), [Level::Warning]);
    }

    #[test]
    fn a_clock_that_strays_is_found_before_tsig_gives_up() {
        let found = |theirs| found(&server(UpdateOutcome::Conflict, Some(theirs)));
        assert_eq!(found(1_000_002), []);
        assert_eq!(found(999_990), [Level::Warning]);
        assert_eq!(found(1_000_200), [Level::Critical]);
    }

    #[test]
    fn a_silent_witness_is_critical_and_says_what_was_not_checked() {
        let mut silent = server(UpdateOutcome::Conflict, None);
        silent.answer = Err("did not answer".into());
        let mut report = Report::default();
        answered(&silent, DnsMode::Update, 5, &mut report);
        assert_eq!((report.findings.len(), report.unchecked.len()), (1, 1));
    }

    fn config() -> Config {
        Config::parse(&Config::example(), std::path::Path::new("example")).expect("the example parses")
    }

    /// A pair in best order, seen from the active node.
    fn facts() -> Facts {
        let golden = include_str!("../../../tests/golden/status-active.json");
        let mut status: Snapshot = serde_json::from_str(golden).expect("the golden status");
        status.version = env!("CARGO_PKG_VERSION").into();
        status.peer.as_mut().expect("a peer").version = Some(status.version.clone());
        status.events.push(drill("drill: alp to midna: 90 ms without an answer, 0 errors"));
        Facts {
            survey: Err("not asked".into()),
            status: Ok(status),
            doors: Vec::new(),
            gate_taken: None,
            servers: Ok(vec![server(UpdateOutcome::Conflict, Some(1_000_000))]),
            server_on_node: Vec::new(),
            socket: None,
            socket_dir: None,
            rules: Ok(crate::wire::hba::HbaFile::default()),
            files: Vec::new(),
            unit: Some(("postgresql@15-main.service".into(), true)),
            units: Ok(Vec::new()),
            missing_interface: None,
            kernel_gate: None,
        }
    }

    fn drill(text: &str) -> EventRow {
        EventRow { at: "2026-11-20T15:12:00Z".into(), kind: "drill".into(), text: text.into() }
    }

    fn judged(facts: &Facts) -> Vec<(Level, String)> {
        let config = config();
        let mut report = Report::default();
        daemon(&config, facts, &mut report);
        witness(&config, facts, &mut report);
        machine(&config, &config.nodes[0], facts, &mut report);
        report.findings.into_iter().map(|f| (f.level, format!("{} -> {}", f.text, f.remedy))).collect()
    }

    #[test]
    fn a_pair_in_order_has_no_finding_and_each_fault_has_its_own() {
        assert_eq!(judged(&facts()), []);
        type Break = fn(&mut Facts);
        fn status(facts: &mut Facts) -> &mut Snapshot {
            facts.status.as_mut().expect("a daemon that answers")
        }
        let unit = |load: &str, file: &str| crate::io::outside::UnitFacts {
            name: "app.service".into(),
            load: load.into(),
            file: file.into(),
        };
        let names = |all: &[&str]| -> Vec<NodeName> { all.iter().map(|n| n.parse().expect("a name")).collect() };
        // As the file itself says it, in any order, there is nothing to be found.
        let mut equal = facts();
        let ours: Vec<NodeName> = config().nodes.iter().rev().map(|node| node.name.clone()).collect();
        status(&mut equal).peer.as_mut().expect("a peer").nodes = ours.clone();
        assert_eq!(judged(&equal), []);
        for (nodes, words) in [
            ([ours.clone(), names(&["third"])].concat(), "this node's file does not name third"),
            (vec![ours[0].clone()], "configuration does not name"),
        ] {
            let mut facts = facts();
            status(&mut facts).peer.as_mut().expect("a peer").nodes = nodes;
            let found = judged(&facts);
            assert!(matches!(&found[..], [(Level::Warning, text)] if text.contains(words)), "{words}: {found:?}");
        }
        let rows: [(Level, &str, Break); 13] = [
            (Level::Advice, "no drill on record", |f| status(f).events.retain(|event| event.kind != "drill")),
            (Level::Advice, "the way back failed", |f| {
                status(f).events.push(drill(&format!("{DRILL_FAILED}: the way back failed: a test")));
            }),
            (Level::Critical, "systemctl start portcullis", |f| f.status = Err("the daemon does not answer".into())),
            (Level::Warning, "runs version 0.0.9", |f| {
                status(f).version = "0.0.9".into();
                status(f).peer.as_mut().expect("a peer").version = Some("0.0.9".into());
            }),
            (Level::Warning, "'s daemon is version 0.0.9", |f| {
                status(f).peer.as_mut().expect("a peer").version = Some("0.0.9".into());
            }),
            (Level::Critical, "another configuration", |f| {
                status(f).peer.as_mut().expect("a peer").same_configuration = Some(false);
            }),
            (Level::Warning, "6433", |f| status(f).peer.as_mut().expect("a peer").reachable = false),
            (Level::Warning, "maintenance off", |f| status(f).maintenance = true),
            (Level::Warning, "not in sync", |f| status(f).replication.in_sync = false),
            (Level::Warning, "stands with neither node", |f| f.server_on_node.push(([192, 0, 2, 11], 53).into())),
            (Level::Warning, "/etc/systemd/system/postgresql@15-main.service.d/portcullis.conf", |f| {
                f.unit = Some(("postgresql@15-main.service".into(), false));
            }),
            (Level::Critical, "no interface eth7", |f| f.missing_interface = Some("eth7".into())),
            (Level::Critical, "chmod", |f| f.files.push(("cluster.key is open".into(), "chmod o-r".into()))),
        ];
        for (level, words, break_it) in rows {
            let mut facts = facts();
            break_it(&mut facts);
            let found = judged(&facts);
            assert!(matches!(&found[..], [(l, text)] if *l == level && text.contains(words)), "{words}: {found:?}");
        }
        for (load, file, level) in [
            ("not-found", "", Level::Critical),
            ("masked", "masked", Level::Critical),
            ("loaded", "enabled", Level::Warning),
        ] {
            let found = judged(&Facts { units: Ok(vec![unit(load, file)]), ..facts() });
            assert!(matches!(&found[..], [(l, _)] if *l == level), "{load}: {found:?}");
        }
        assert_eq!(judged(&Facts { units: Ok(vec![unit("loaded", "disabled")]), ..facts() }), []);
    }
}
