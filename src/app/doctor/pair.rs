//! The daemon of this node and what it says of its peer; files of the configuration, and units.

use super::gather::Facts;
use super::{Level, Report};
use crate::base::config::Config;
use crate::base::ids::NodeName;
use crate::engine::status::{PeerStatus, Role, Snapshot};

pub(super) fn daemon(config: &Config, facts: &Facts, report: &mut Report) {
    match &facts.status {
        Ok(snapshot) => state(config, snapshot, report),
        Err(why) => {
            report.find(
                Level::Critical,
                "daemon.down",
                why.clone(),
                "systemctl start portcullis, then run doctor again",
            );
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
        report.find(
            Level::Warning,
            "daemon.version",
            text,
            "restart it: first on the passive node, then switch over, then here",
        );
    }
    if snapshot.maintenance {
        let text = "maintenance is on: PostgreSQL here is left alone, and nothing can be promoted";
        report.find(Level::Warning, "node.maintenance", text, "portcullis maintenance off");
    }
    if snapshot.role == Role::Fenced {
        let reason = snapshot.gate.reason.as_deref().unwrap_or("no reason given");
        let text = format!("{} is fenced, so nobody can fail over to it: {reason}", snapshot.node);
        report.find(Level::Warning, "node.fenced", text, format!("portcullis rejoin {}", snapshot.node));
    }
    let active = snapshot.role == Role::Active;
    if active && snapshot.replication.mode == "synchronous" && !snapshot.replication.in_sync {
        let text = "replication is not in sync: a failover now would lose what is acknowledged alone, or commits wait";
        report.find(Level::Warning, "node.sync", text, "see `portcullis status`; start the standby, or rejoin it");
    }
    if let Some(cause) = &snapshot.procedure {
        let text = format!("a {} is under way or was left half-way: {}", cause.kind, cause.step);
        report.find(Level::Warning, "node.procedure", text, "wait for it; if it was left, run the same command again");
    }
    let Some(peer) = &snapshot.peer else { return };
    let name = &peer.name;
    if !peer.reachable {
        let port = config.node(name).map_or(6433, |node| node.peer_listen.port());
        let text = format!("{name}'s daemon does not answer on the peer channel");
        let remedy = format!("start it; let TCP port {port} pass both ways; compare cluster.key on both nodes");
        report.find(Level::Warning, "peer.unreachable", text, remedy);
        report.unchecked("the peer's version and configuration", "it does not answer");
        return;
    }
    if peer.same_configuration == Some(false) {
        let text = format!("{name} runs another configuration (nodes, timers, witness or VIP differ): neither pledges");
        let remedy = "make the files equal on both nodes and restart both daemons, the passive node's first";
        report.find(Level::Critical, "config.pledge", text, remedy);
    }
    other_nodes(config, peer, report);
    if let Some(version) = peer.version.as_ref().filter(|version| **version != snapshot.version) {
        let text = format!("{name}'s daemon is version {version}, this node's {}", snapshot.version);
        report.find(Level::Warning, "peer.version", text, "finish the upgrade on both nodes");
    }
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
            report.find(Level::Warning, "peer.nodes", text, remedy);
        }
    }
}

pub(super) fn files(facts: &Facts, report: &mut Report) {
    report.checked("files of the configuration, and their modes");
    for (text, remedy) in &facts.files {
        report.find(Level::Critical, "config.files", text.clone(), remedy.clone());
    }
    for place in &facts.open_secrets {
        let path = place.path.display();
        let text = format!("{path} has mode {:04o}: others on this machine can read or write it", place.mode);
        let remedy = format!("chmod o-rwx {path}\nand consider a new secret: this one may have been read");
        report.find(Level::Critical, "secret.mode", text, remedy);
    }
    for (path, uid) in &facts.foreign_secrets {
        let path = path.display();
        let text = format!("{path} belongs to user {uid}, who is neither root nor the data directory's owner");
        report.find(Level::Warning, "secret.owner", text, format!("as root:\nchown root:postgres {path}"));
    }
}

pub(super) fn units(config: &Config, facts: &Facts, report: &mut Report) {
    match &facts.unit {
        Some((unit, true)) => report.checked(format!("{unit} asks may-start-primary")),
        Some((unit, false)) => {
            let text =
                format!("{unit} does not ask may-start-primary: after a reboot an old primary comes up writable");
            let remedy = format!(
                "as root:\ninstall -D -m 0644 /usr/share/doc/portcullis/examples/postgresql-portcullis.conf \
                 /etc/systemd/system/{unit}.d/portcullis.conf\nsystemctl daemon-reload"
            );
            report.find(Level::Warning, "unit.asks", text, remedy);
        }
        None => report.unchecked("may-start-primary", "no systemd unit owns this cluster; whatever starts it must ask"),
    }
    match &facts.units {
        Ok(units) => units.iter().for_each(|unit| {
            let name = &unit.name;
            if unit.load != "loaded" {
                let text = format!("{name} of service.units is {}", unit.load);
                report.find(Level::Critical, "unit.missing", text, "install the unit, or correct service.units");
            } else if matches!(unit.file.as_str(), "enabled" | "enabled-runtime") {
                let text = format!("{name} of service.units is enabled: it starts at boot, whoever is active");
                report.find(
                    Level::Warning,
                    "unit.enabled",
                    text,
                    format!("systemctl disable {name}; the daemon starts it"),
                );
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
    use super::super::names::tests::server;
    use super::*;
    use crate::wire::dns::UpdateOutcome;

    fn config() -> Config {
        Config::parse(&Config::example(), std::path::Path::new("example")).expect("the example parses")
    }

    /// A pair in best order, seen from the active node.
    fn facts() -> Facts {
        let golden = include_str!("../../../tests/golden/status-active.json");
        let mut status: Snapshot = serde_json::from_str(golden).expect("the golden status");
        status.version = env!("CARGO_PKG_VERSION").into();
        status.peer.as_mut().expect("a peer").version = Some(status.version.clone());
        Facts {
            survey: Err("not asked".into()),
            fitness: Err("not asked".into()),
            tools: Vec::new(),
            logins: Vec::new(),
            host: super::super::host::HostFacts::default(),
            open_secrets: Vec::new(),
            foreign_secrets: Vec::new(),
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
            kernel_gate: None,
        }
    }

    fn judged(facts: &Facts) -> Vec<(Level, String)> {
        let config = config();
        let mut report = Report::default();
        daemon(&config, facts, &mut report);
        super::super::names::check(&config, facts, &mut report);
        files(facts, &mut report);
        units(&config, facts, &mut report);
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
        let rows: [(Level, &str, Break); 12] = [
            (Level::Warning, "chown root:postgres /k", |f| f.foreign_secrets.push(("/k".into(), 1000))),
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
            (Level::Critical, "chmod o-rwx /k", |f| {
                f.open_secrets.push(super::super::gather::Place { path: "/k".into(), mode: 0o644 });
            }),
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
