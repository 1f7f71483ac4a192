//! What comes after `init`, as exact commands; and the lines that a DNS server needs.

use crate::base::config::{Config, DnsMode, Node};
use crate::base::fault::Fault;
use crate::base::ids::NodeName;
use crate::io::files;
use crate::io::network::NameFacts;
use crate::io::{host, network, outside};
use std::path::Path;

use super::wrong;
use crate::app::verbs::{DnsServer, PostgresHow};

/// What is known when the files are written.
pub(super) struct Place<'a> {
    pub(super) config: &'a Config,
    /// Which node this machine is; `None`: none of them.
    pub(super) here: Option<&'a Node>,
    pub(super) target: &'a Path,
    /// The first one, or the one that was given everything by `--import`.
    pub(super) imported: bool,
    pub(super) how: PostgresHow,
    /// What DNS says of the name now, where it was asked.
    pub(super) facts: Option<&'a NameFacts>,
    /// The lines PostgreSQL needs, where nobody wrote them.
    pub(super) lines: Option<String>,
}

/// The `ssh` of a person who administers both.
fn ssh(node: &Node) -> String {
    let address = node.addresses.first().map(ToString::to_string).unwrap_or_default();
    format!("ssh root@{address}")
}

/// How a unit is begun here.
fn enable(unit: &str, verb: &str) -> String {
    match outside::has_systemd() {
        true => format!("systemctl enable --now {unit}"),
        false => format!("portcullis {verb}    # no systemd here: have your service manager run it, as root"),
    }
}

/// The numbered steps from here to a drilled pair.
pub(super) fn next(place: &Place<'_>) -> String {
    let config = place.config;
    let mut steps: Vec<(String, Vec<String>)> = Vec::new();
    let own_dir = place.target.parent() != Some(Path::new("/etc/portcullis"));
    let with = if own_dir { format!(" --config {}", place.target.display()) } else { String::new() };
    let out = match place.target.parent() {
        Some(dir) if own_dir => format!(" --output-dir {}", dir.display()),
        _ => String::new(),
    };
    let other = config.nodes.iter().find(|node| place.here.is_none_or(|here| here.name != node.name));
    if let Some(lines) = &place.lines {
        steps.push((
            "PostgreSQL is as it was; it needs these lines, then a restart (or run init again with --postgres)".into(),
            lines.lines().map(str::to_owned).collect(),
        ));
    }
    if !place.imported {
        witness_steps(place, &out, &mut steps);
        // From neither of the nodes both are brought there.
        let far: Vec<&Node> = match place.here {
            Some(_) => other.into_iter().collect(),
            None => config.nodes.iter().collect(),
        };
        for other in far {
            let role = if place.how == PostgresHow::Leave { "" } else { " --postgres standby" };
            let line =
                format!("portcullis init --export -{out} | {} portcullis init --import -{out}{role}", ssh(other));
            steps.push((
                format!("the same configuration and secrets on {}, with portcullis installed there", other.name),
                vec![line],
            ));
        }
    }
    let both = if place.imported { "here" } else { "on both nodes" };
    steps.push((both.into(), vec![enable("portcullis", &format!("daemon{with}"))]));
    if !place.imported {
        if needs_first_epoch(place) {
            let first = place.here.or(config.nodes.first()).map_or("the first", |node| node.name.as_str());
            let text = format!("on {first}, once both daemons run: it becomes the active one (the first epoch)");
            steps.push((text, vec![format!("portcullis promote --yes{with}")]));
        }
        let standby = if place.here.is_some() { other } else { config.nodes.get(1) };
        if let Some(other) = standby {
            steps.push((
                format!("{} becomes the standby, and the pair is tried", other.name),
                vec![
                    format!("portcullis rejoin {}{with}", other.name),
                    format!("portcullis doctor{with}"),
                    format!("portcullis drill{with}"),
                ],
            ));
        }
    }
    let mut text = String::from("next:\n");
    for (index, (what, commands)) in steps.iter().enumerate() {
        text.push_str(&format!("  {}. {what}:\n", index + 1));
        commands.iter().for_each(|line| text.push_str(&format!("       {line}\n")));
    }
    text
}

/// Without DNS nobody begins by himself, nor where the name leads elsewhere; else the first daemon with a PostgreSQL
/// does, once it hears a peer that has none.
fn needs_first_epoch(place: &Place<'_>) -> bool {
    let elsewhere = |facts: &NameFacts| {
        let own = place.here.map(|here| here.addresses.as_slice()).unwrap_or_default();
        !facts.addresses.is_empty() && !facts.addresses.iter().any(|address| own.contains(address))
    };
    place.config.dns.is_none() || place.facts.is_some_and(elsewhere)
}

fn witness_steps(place: &Place<'_>, out: &str, steps: &mut Vec<(String, Vec<String>)>) {
    let Some(dns) = &place.config.dns else { return };
    if let Some(witness) = &place.config.witness {
        let address = witness.listen.first().map(|listen| listen.ip().to_string()).unwrap_or_default();
        steps.push((
            format!("the witness's machine {address}, with portcullis installed there"),
            vec![
                format!(
                    "portcullis init --export -{out} --for-witness | ssh root@{address} portcullis init --import -{out}"
                ),
                format!("ssh root@{address} systemctl enable --now portcullis-witness"),
            ],
        ));
        return;
    }
    if dns.mode != DnsMode::Update {
        return;
    }
    let server = dns.servers.first().map(|server| format!(" ({})", server.ip())).unwrap_or_default();
    steps.push((
        format!("the DNS server of {}{server} learns the key, and lets it change two names", dns.zone),
        vec![format!("portcullis init --dns-server bind{out}    # or knot: prints what to add there")],
    ));
}

/// The lines for a DNS server of one's own, with the key: printed only when asked for.
///
/// # Errors
/// Exit code 2: no updates, or no key.
pub(super) fn dns_server(target: &Path, server: DnsServer) -> Result<String, Fault> {
    let config = files::load_config(target)?;
    let Some((dns, tsig)) = config.dns.as_ref().and_then(|dns| Some((dns, dns.tsig.as_ref()?))) else {
        return Err(wrong(format!(
            "{} has no [dns] with updates, so that no server needs a key; see portcullis init --help",
            target.display()
        )));
    };
    let secret = files::tsig_secret(&tsig.key_file).map_err(wrong)?;
    let secret = data_encoding::BASE64.encode(secret.expose());
    let (zone, name, key, algorithm) = (&dns.zone, &config.service.name, &tsig.name, &tsig.algorithm);
    Ok(match server {
        DnsServer::Bind => format!(
            "// BIND: portcullis may change two names of {zone}. Keep this file from others: chmod 0640, group bind.\n\
             key \"{key}\" {{\n    algorithm {algorithm};\n    secret \"{secret}\";\n}};\n\
             // named.conf includes this file, and in its statement of the zone stands, instead of allow-update:\n\
             //     update-policy {{\n\
             //         grant {key} name {name} A AAAA;\n\
             //         grant {key} name _portcullis.{name} TXT;\n\
             //     }};\n"
        ),
        DnsServer::Knot => format!(
            "# Knot: portcullis may change two names of {zone}. Keep this file from others: chmod 0640, group knot.\n\
             key:\n  - id: {key}\n    algorithm: {algorithm}\n    secret: {secret}\n\
             acl:\n  - id: {key}\n    key: {key}\n    action: update\n    update-owner: name\n    \
             update-owner-match: equal\n    update-owner-name: [{name}., _portcullis.{name}.]\n\
             # knot.conf includes this file, and the section of the zone gets: acl: {key}\n"
        ),
    })
}

/// Which node this machine is, as the daemon will tell: by its name, else by an address.
pub(super) fn this_node(config: &Config) -> Option<&Node> {
    let hostname = host::name();
    let short = hostname.split('.').next().unwrap_or_default();
    let named = |node: &&Node| [hostname.as_str(), short].contains(&node.name.as_str());
    config.nodes.iter().find(named).or_else(|| config.nodes.iter().find(|node| is_here(node)))
}

fn is_here(node: &Node) -> bool {
    node.addresses.iter().any(|address| network::places().iter().any(|place| place.net.addr() == *address))
}

/// This machine has one node's name and another's address: the daemons of both would take themselves for the same.
pub(super) fn misnamed(config: &Config) -> Option<String> {
    let named = this_node(config).filter(|node| !is_here(node))?;
    let addressed = config.nodes.iter().find(|node| is_here(node))?;
    Some(format!(
        "this host is called {} but has the address of {}; rename it: hostnamectl set-hostname {}",
        named.name, addressed.name, addressed.name
    ))
}

/// Names of the nodes, for a sentence.
pub(super) fn names(config: &Config) -> String {
    config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The host name as a node's name, where it can be one.
pub(super) fn own_name() -> Option<NodeName> {
    host::name().split('.').next().and_then(|name| name.parse().ok())
}
