//! R7, no side door: ways to PostgreSQL that do not lead through the gate. Judged twice: by the rules as they are
//! written, and by knocking.
//!
//! The recommended setting: `listen_addresses` is loopback and the replication address; over the network `pg_hba.conf`
//! admits `replication.user` alone, from the nodes alone, to `replication` (and, for pg_rewind, to a database).

use super::gather::{Door, Facts, Knock, Whose};
use super::{Level, Report};
use crate::base::config::{Config, Node};
use crate::io::postgres::{HbaRule, Survey};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};

/// What users and databases are called when any will do.
const ALL: &str = "all";
const REPLICATION: &str = "replication";
const OTHERS: u32 = 0o007;
const OTHERS_ENTER: u32 = 0o001;

pub(super) fn check(config: &Config, node: &Node, facts: &Facts, report: &mut Report) {
    match &facts.survey {
        Ok(survey) => {
            listen(config, node, survey, report);
            rules(config, node, survey, report);
        }
        Err(why) => {
            report.unchecked("listen_addresses and pg_hba.conf", why.clone());
        }
    }
    knocks(config, node, &facts.doors, report);
    sockets(facts, report);
    if let Some(address) = facts.gate_taken {
        let text = format!("the gate is shut, and yet something takes connections at {address}, where clients connect");
        let port = address.port();
        report.find(Level::Critical, "door.gate", text, format!("find it with `ss -ltnp sport = :{port}` and stop it"));
    }
    match &facts.kernel_gate {
        Some(Ok(true)) => report.checked("fence.kernel_gate: the table stands"),
        Some(Ok(false)) => report.find(
            Level::Critical,
            "wall.missing",
            "fence.kernel_gate is configured, but the kernel has no table inet portcullis",
            "start the daemon; it makes the table. If it runs, see its log for why it could not",
        ),
        Some(Err(why)) => report.unchecked("fence.kernel_gate", format!("{why}; run doctor as root")),
        None => {}
    }
}

/// The hosts by which the nodes' PostgreSQL reach each other, as addresses where they are.
fn node_addresses(config: &Config) -> Vec<IpAddr> {
    let hosts = config.nodes.iter().filter_map(|node| node.postgres.host.parse().ok());
    hosts.chain(config.nodes.iter().flat_map(|node| node.addresses.iter().copied())).collect()
}

fn listen(config: &Config, node: &Node, survey: &Survey, report: &mut Report) {
    report.checked("listen_addresses");
    let host = node.postgres.host.as_str();
    let wanted = format!("in postgresql.conf, then restart PostgreSQL:\nlisten_addresses = 'localhost, {host}'");
    if survey.pending_restart.iter().any(|name| name == "listen_addresses") {
        let text = "listen_addresses was changed, and PostgreSQL was not restarted since: the old value is in force";
        report.find(Level::Warning, "door.listen", text, "restart PostgreSQL");
    }
    let list = survey.setting("listen_addresses");
    let (mut reachable, mut unknown) = (false, Vec::new());
    for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let address: Option<IpAddr> = word.parse().ok();
        let any = word == "*" || address.is_some_and(|address| address.is_unspecified());
        let own = word == host || address.is_some_and(|address| host.parse() == Ok(address));
        reachable |= any || own;
        if any {
            let text = format!("listen_addresses is '{list}': PostgreSQL listens on every address of this machine");
            report.find(Level::Warning, "door.listen", text, wanted.clone());
        } else if own || word == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        } else if let Some(address) = address {
            let vip = config.vip.iter().flat_map(|vip| &vip.addresses).any(|net| net.addr() == address);
            let (level, what) = if vip { (Level::Critical, "the VIP") } else { (Level::Warning, "a further address") };
            let text = format!("listen_addresses holds {address}, {what}: PostgreSQL listens beside the gate there");
            report.find(level, "door.listen", text, wanted.clone());
        } else {
            unknown.push(word.to_owned());
        }
    }
    if !unknown.is_empty() {
        let why = format!("{} are names; write addresses", unknown.join(", "));
        report.unchecked("listen_addresses: which addresses its names mean", why);
    } else if !reachable {
        let text = format!("listen_addresses is '{list}' without {host}: the other node cannot replicate from here");
        report.find(Level::Critical, "repl.hba", text, wanted);
    }
}

/// From where a rule of pg_hba lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    ThisMachine,
    /// One of the nodes and nobody else.
    Nodes,
    /// A network or a name.
    Some,
    Everywhere,
}

fn net(rule: &HbaRule) -> Option<IpNet> {
    let address: IpAddr = rule.address.parse().ok()?;
    IpNet::with_netmask(address, rule.netmask.parse().ok()?).ok()
}

fn from(rule: &HbaRule, nodes: &[IpAddr]) -> From {
    match (rule.address.as_str(), net(rule)) {
        ("samehost", _) => From::ThisMachine,
        (ALL, _) => From::Everywhere,
        (_, None) => From::Some,
        (_, Some(net)) if net.prefix_len() == 0 => From::Everywhere,
        (_, Some(net)) if net.network().is_loopback() && net.prefix_len() >= 8 => From::ThisMachine,
        (_, Some(net)) if net.prefix_len() == net.max_prefix_len() && nodes.contains(&net.addr()) => From::Nodes,
        (_, Some(_)) => From::Some,
    }
}

/// Does an earlier rule that rejects leave nothing for this one?
fn is_shadowed(rule: &HbaRule, earlier: &[HbaRule]) -> bool {
    let covers = |wide: &[String], narrow: &[String], all_covers: bool| {
        (all_covers && wide.iter().any(|word| word == ALL)) || narrow.iter().all(|word| wide.contains(word))
    };
    // `all` stands for every database but the pseudo-database `replication`.
    let physical = rule.databases.iter().any(|database| database == REPLICATION);
    earlier.iter().filter(|before| before.method == "reject" && before.error.is_empty()).any(|before| {
        (before.kind == "host" || before.kind == rule.kind)
            && covers(&before.databases, &rule.databases, !physical)
            && covers(&before.users, &rule.users, true)
            && match (net(before), net(rule)) {
                _ if before.address == ALL => true,
                (Some(wide), Some(narrow)) => wide.contains(&narrow),
                _ => before.address == rule.address && before.netmask == rule.netmask,
            }
    })
}

fn rules(config: &Config, node: &Node, survey: &Survey, report: &mut Report) {
    report.checked("pg_hba.conf, rule by rule");
    let nodes = node_addresses(config);
    let user = &config.replication.user;
    let lines = recommended(config, node, user);
    if survey.hba_not_loaded {
        let text = "pg_hba.conf was changed after PostgreSQL read it last; doctor judges the file";
        report.find(Level::Warning, "hba.not-loaded", text, "reload PostgreSQL: SELECT pg_reload_conf();");
    }
    for (at, rule) in survey.hba.iter().enumerate() {
        if !rule.error.is_empty() {
            let text = format!("pg_hba.conf line {} is not understood: {}", rule.line, rule.error);
            report.find(
                Level::Warning,
                "hba.error",
                text,
                "correct the line; until then PostgreSQL takes no change of the file",
            );
            continue;
        }
        let earlier = survey.hba.get(..at).unwrap_or_default();
        if rule.method == "reject" || is_shadowed(rule, earlier) {
            continue;
        }
        if rule.kind == "local" {
            trusts_locally(rule, "the socket", report);
            continue;
        }
        let from = from(rule, &nodes);
        if from == From::ThisMachine {
            trusts_locally(rule, "loopback", report);
            continue;
        }
        remote(rule, from, user, &lines, report);
    }
    let peers = config.nodes.iter().filter(|other| other.name != node.name);
    for (peer, address) in peers.filter_map(|peer| Some((peer, peer.postgres.host.parse::<IpAddr>().ok()?))) {
        let admits = |rule: &HbaRule| {
            let reaches =
                rule.address == ALL || rule.address == "samenet" || net(rule).is_some_and(|net| net.contains(&address));
            rule.kind.starts_with("host")
                && rule.error.is_empty()
                && rule.databases.iter().any(|database| database == REPLICATION)
                && rule.users.iter().any(|name| name == user || name == ALL)
                && reaches
        };
        // The first rule that fits decides.
        if survey.hba.iter().find(|rule| admits(rule)).is_none_or(|rule| rule.method == "reject") {
            let text = format!("pg_hba.conf does not let {user} of {} ({address}) replicate from here", peer.name);
            report.find(Level::Critical, "repl.hba", text, format!("in pg_hba.conf, then reload:\n{lines}"));
        }
    }
}

/// The lines that belong into pg_hba.conf, as they are to be written.
fn recommended(config: &Config, node: &Node, user: &str) -> String {
    let peers = config.nodes.iter().filter(|other| other.name != node.name);
    peers.map(|other| line_for(&other.postgres.host, REPLICATION, user)).collect::<Vec<_>>().join("\n")
}

/// The line that lets the replication role of a host in.
pub(super) fn line_for(host: &str, database: &str, user: &str) -> String {
    let address = match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => format!("{host}/32"),
        Ok(IpAddr::V6(_)) => format!("{host}/128"),
        Err(_) => host.to_owned(),
    };
    format!("host  {database}  {user}  {address}  scram-sha-256")
}

fn trusts_locally(rule: &HbaRule, over: &str, report: &mut Report) {
    if rule.method == "trust" {
        let (line, users) = (rule.line, rule.users.join(","));
        let text = format!("pg_hba.conf line {line} lets everybody on this machine be {users} over {over} (trust)");
        report.find(Level::Advice, "door.trust", text, "use peer for the admin user and scram-sha-256 for all others");
    }
}

fn remote(rule: &HbaRule, from: From, user: &str, lines: &str, report: &mut Report) {
    let HbaRule { line, users, databases, method, .. } = rule;
    let place = match from {
        From::Everywhere => "everywhere".to_owned(),
        _ => net(rule).map_or_else(|| rule.address.clone(), |net| net.to_string()),
    };
    let (who, what) = (users.join(","), databases.join(","));
    let ours = users.iter().all(|name| name == user);
    let physical = databases.iter().all(|database| database == REPLICATION);
    // pg_rewind logs in to a database: our own user from the other node is no client.
    let rewind = ours && from == From::Nodes;
    if !(physical || rewind) {
        let text = format!("pg_hba.conf line {line} lets {who} into {what} from {place}, past the gate ({method})");
        let remedy = format!(
            "take the line out and reload: SELECT pg_reload_conf(); over the network only this stays:\n{lines}"
        );
        report.find(Level::Critical, "door.hba", text, remedy);
        return;
    }
    let remedy = format!("write instead, then reload:\n{lines}");
    if method == "trust" {
        let text = format!("pg_hba.conf line {line} lets {who} replicate from {place} without a password");
        report.find(Level::Critical, "door.trust", text, remedy.clone());
    }
    if !ours {
        let text = format!("pg_hba.conf line {line} lets {who} replicate from {place}; only {user} needs to");
        report.find(Level::Warning, "door.hba", text, remedy);
    } else if from != From::Nodes {
        let level = if from == From::Everywhere { Level::Warning } else { Level::Advice };
        let text = format!("pg_hba.conf line {line} lets {who} replicate from {place}, which is more than the nodes");
        report.find(level, "door.hba", text, remedy);
    }
}

fn knocks(config: &Config, node: &Node, doors: &[Door], report: &mut Report) {
    let is_vip = |ip: IpAddr| config.vip.iter().flat_map(|vip| &vip.addresses).any(|net| net.addr() == ip);
    let other = config.nodes.iter().find(|other| other.name != node.name).map_or("the other node", |o| o.name.as_str());
    let mut tried: Vec<SocketAddr> = Vec::new();
    for Door { whose, address, .. } in doors {
        if tried.contains(address) {
            continue;
        }
        tried.push(*address);
        let here = match whose {
            Whose::Own if is_vip(address.ip()) => "at the VIP",
            Whose::Own => "here",
            Whose::Peer => other,
        };
        report.checked(format!("a login at PostgreSQL's port {address} ({here})"));
        let mut admitted = Vec::new();
        for door in doors.iter().filter(|door| door.address == *address) {
            match &door.knock {
                Knock::Closed | Knock::Rejected => {}
                Knock::Admitted => admitted.push(format!("{} log in to {}", door.user, door.database)),
                Knock::Unclear(why) => report.unchecked(format!("a login at {address} ({here})"), why.clone()),
            }
        }
        if admitted.is_empty() {
            continue;
        }
        let (logins, remedy) = (admitted.join(", "), "take the rule out of pg_hba.conf that allows it, and reload");
        let (text, remedy) = match whose {
            Whose::Own => (format!("PostgreSQL lets {logins} at {address}, past the gate"), remedy.to_owned()),
            Whose::Peer => (
                format!("{other}'s PostgreSQL lets {logins} from this node at {address}, past its gate"),
                format!("on {other}: {remedy}"),
            ),
        };
        report.find(Level::Critical, "door.knock", text, remedy);
    }
}

fn sockets(facts: &Facts, report: &mut Report) {
    let (Some(socket), Some(dir)) = (&facts.socket, &facts.socket_dir) else {
        report.unchecked("the rights of PostgreSQL's socket", "it is not there");
        return;
    };
    report.checked("the rights of PostgreSQL's socket");
    if socket.mode & OTHERS != 0 && dir.mode & OTHERS_ENTER != 0 {
        let text = format!(
            "every user of this machine reaches PostgreSQL's socket {} (mode {:04o}); pg_hba alone stands before it",
            socket.path.display(),
            socket.mode
        );
        let remedy = "in postgresql.conf, then restart PostgreSQL:\nunix_socket_permissions = 0770";
        report.find(Level::Advice, "door.socket", text, remedy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config() -> Config {
        Config::parse(&Config::example(), Path::new("example")).expect("the example parses")
    }

    fn rule(line: u32, words: &str) -> HbaRule {
        let words: Vec<&str> = words.split_whitespace().collect();
        let [kind, databases, users, address, netmask, method] = words[..] else { panic!("{words:?}") };
        let list = |text: &str| text.split(',').map(str::to_owned).collect();
        HbaRule {
            options: Vec::new(),
            line,
            kind: kind.into(),
            databases: list(databases),
            users: list(users),
            address: address.into(),
            netmask: netmask.into(),
            method: method.into(),
            error: String::new(),
        }
    }

    /// Levels and line numbers of the findings over the rules, all about the first node of the example.
    fn found(lines: &[&str]) -> Vec<(Level, String)> {
        let config = config();
        let hba =
            lines.iter().enumerate().map(|(at, words)| rule(u32::try_from(at).expect("few") + 1, words)).collect();
        let mut report = Report::default();
        rules(&config, &config.nodes[0], &Survey { hba, ..Survey::default() }, &mut report);
        report.findings.into_iter().map(|finding| (finding.level, finding.text)).collect()
    }

    const GOOD: &str = "host replication replicator 192.0.2.12 255.255.255.255 scram-sha-256";

    #[test]
    fn the_recommended_rules_have_no_finding() {
        let rewind = "host postgres replicator 192.0.2.12 255.255.255.255 scram-sha-256";
        let local = "host all all 127.0.0.1 255.255.255.255 scram-sha-256";
        let rejected = "host all all 0.0.0.0 0.0.0.0 reject";
        assert_eq!(found(&["local all all - - scram-sha-256", local, GOOD, rewind, rejected]), []);
    }

    #[test]
    fn every_rule_that_lets_clients_past_the_gate_is_critical() {
        for door in [
            "host all all 0.0.0.0 0.0.0.0 scram-sha-256",
            "hostssl app app 198.51.100.0 255.255.255.0 cert",
            "hostnossl all all all - md5",
            "host all all samenet - scram-sha-256",
            "host app all .example.org - scram-sha-256",
            "host all all 192.0.2.12 255.255.255.255 scram-sha-256",
            "host all replicator 192.0.2.0 255.255.255.0 scram-sha-256",
            "host replication,app replicator 10.0.0.0 255.0.0.0 scram-sha-256",
            "host all all ::0 :: trust",
            // A loopback address with too short a mask is half of the Internet.
            "host all all 127.0.0.1 128.0.0.0 scram-sha-256",
        ] {
            let found = found(&[GOOD, door]);
            assert!(
                found.iter().any(|(level, text)| *level == Level::Critical && text.contains("line 2")),
                "{door}: {found:?}"
            );
        }
    }

    #[test]
    fn a_rule_behind_a_reject_that_covers_it_is_no_door() {
        let door = "host all all 198.51.100.0 255.255.255.0 md5";
        assert_eq!(found(&[GOOD, "host all all 0.0.0.0 0.0.0.0 reject", door]), []);
        for narrow in [
            "hostssl all all 0.0.0.0 0.0.0.0 reject",
            "host app all 0.0.0.0 0.0.0.0 reject",
            "host all app 0.0.0.0 0.0.0.0 reject",
            "host all all 198.51.100.0 255.255.255.128 reject",
        ] {
            assert_eq!(found(&[GOOD, narrow, door]).len(), 1, "{narrow}");
        }
        // "all" does not mean replication.
        let copies = "host replication all 198.51.100.0 255.255.255.0 md5";
        assert_eq!(found(&[GOOD, "host all all 0.0.0.0 0.0.0.0 reject", copies]).len(), 1);
    }

    #[test]
    fn replication_for_more_than_the_nodes_is_told_by_its_weight() {
        let level = |rule: &str| found(&[GOOD, rule]).first().map(|(level, _)| *level);
        assert_eq!(level("host replication replicator 192.0.2.0 255.255.255.0 scram-sha-256"), Some(Level::Advice));
        assert_eq!(level("host replication replicator all - scram-sha-256"), Some(Level::Warning));
        assert_eq!(level("host replication all 192.0.2.12 255.255.255.255 scram-sha-256"), Some(Level::Warning));
        assert_eq!(level("host replication replicator 192.0.2.12 255.255.255.255 trust"), Some(Level::Critical));
        assert_eq!(level("local all all - - trust"), Some(Level::Advice));
    }

    #[test]
    fn a_standby_that_may_not_replicate_is_found_with_the_line_to_add() {
        let config = config();
        let mut report = Report::default();
        rules(&config, &config.nodes[0], &Survey::default(), &mut report);
        let [finding] = &report.findings[..] else { panic!("{:?}", report.findings) };
        assert_eq!(finding.level, Level::Critical);
        assert!(finding.remedy.lines().any(|l| l == "host  replication  replicator  192.0.2.12/32  scram-sha-256"));
        assert_eq!(found(&["host replication all all - reject", GOOD]).len(), 1, "the first rule that fits decides");
    }

    fn listening(list: &str) -> Vec<Level> {
        let config = config();
        let mut survey = Survey::default();
        survey.settings.insert("listen_addresses".into(), list.into());
        let mut report = Report::default();
        listen(&config, &config.nodes[0], &survey, &mut report);
        report.findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn listening_is_right_on_loopback_and_the_replication_address_alone() {
        assert_eq!(listening("localhost, 192.0.2.11"), []);
        assert_eq!(listening("127.0.0.1,::1,192.0.2.11"), []);
        assert_eq!(listening("*"), [Level::Warning]);
        assert_eq!(listening("0.0.0.0"), [Level::Warning]);
        assert_eq!(listening("192.0.2.11, 198.51.100.1"), [Level::Warning]);
        assert_eq!(listening("localhost"), [Level::Critical], "the peer cannot replicate");
    }

    #[test]
    fn a_door_that_opens_is_critical_wherever_it_is() {
        let config = config();
        let door = |whose, knock| Door {
            whose,
            address: ([192, 0, 2, 11], 5432).into(),
            user: "app".into(),
            database: "app".into(),
            knock,
        };
        for whose in [Whose::Own, Whose::Peer] {
            let mut report = Report::default();
            let doors =
                [door(whose, Knock::Closed), door(whose, Knock::Rejected), door(whose, Knock::Unclear("x".into()))];
            knocks(&config, &config.nodes[0], &doors, &mut report);
            assert!(report.findings.is_empty() && report.unchecked.len() == 1, "{report:?}");
            // Two logins through one door are one finding.
            let two = [door(whose, Knock::Admitted), door(whose, Knock::Admitted)];
            knocks(&config, &config.nodes[0], &two, &mut report);
            assert_eq!(report.findings.len(), 1);
            report.findings.clear();
            knocks(&config, &config.nodes[0], &[door(whose, Knock::Admitted)], &mut report);
            assert!(matches!(&report.findings[..], [finding] if finding.level == Level::Critical));
        }
    }
}
