//! The answers of `init`: what the flags say, else what a person says to a question with a proposal, else (`--yes`)
//! what was found here.
//!
//! **Invariants:** an answer is judged when it is given and asked again when it is wrong, so that nothing is lost by a
//! slip; nothing is changed before the last one.

use super::{steps, terminal, wrong};
use crate::app::verbs::{InitArgs, PostgresHow};
use crate::base::config::{ExampleNode, Template};
use crate::base::fault::Fault;
use crate::base::ids::NodeName;
use crate::io::network::{self, NameFacts, Place};
use crate::io::postgres::{FoundCluster, cluster_in, clusters};
use crate::wire::dns::ServiceNames;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// What was answered, and what the answers rest on.
pub(super) struct Answers {
    pub(super) template: Template,
    pub(super) how: PostgresHow,
    /// What DNS says of the service name; `None`: it was not asked.
    pub(super) facts: Option<NameFacts>,
    /// Worth saying, but no reason to stop.
    pub(super) notes: Vec<String>,
}

/// Who answers what no flag does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Person,
    /// What was found.
    Found,
    /// Nobody: a gap is an error.
    Flags,
}

struct Gathering<'a> {
    args: &'a InitArgs,
    source: Source,
    places: Vec<Place>,
    cluster: Option<FoundCluster>,
    /// portcullis serves the zone itself, on a third machine.
    witness: bool,
    /// Flags that must still be given.
    gaps: Vec<String>,
}

/// All answers.
///
/// # Errors
/// Every gap at once, or the first flag that cannot be; nothing was changed.
pub(super) async fn gather(args: &InitArgs, dir: &Path) -> Result<Answers, Fault> {
    let source = match (args.yes, terminal::is_there()) {
        (true, _) => Source::Found,
        (false, true) => Source::Person,
        (false, false) => Source::Flags,
    };
    let cluster = match &args.data_dir {
        Some(dir) => cluster_in(dir),
        None => None,
    };
    let mut gathering =
        Gathering { args, source, places: network::places(), cluster, witness: args.witness, gaps: Vec::new() };
    gathering.all(dir).await
}

impl Gathering<'_> {
    async fn all(&mut self, dir: &Path) -> Result<Answers, Fault> {
        if self.source == Source::Person {
            terminal::say("Enter takes the proposal in brackets. Nothing is written before the end; Ctrl-C leaves.");
        }
        let (data_dir, bin_dir, port, socket_dir) = self.postgres()?;
        let nodes = self.nodes()?;
        let service_name = self.service_name()?;
        let (with_dns, with_vip) = self.recipe()?;
        self.refuse_gaps()?;
        let mut notes = Vec::new();
        let mut facts = None;
        let (mut zone, mut servers) = (String::new(), Vec::new());
        if with_dns {
            if !self.args.witness && self.source != Source::Flags {
                facts = Some(network::look_up(&service_name).await);
            }
            (zone, servers) = self.zone(&service_name, facts.as_ref(), &mut notes)?;
        } else if let Some((_, parent)) = service_name.split_once('.') {
            zone = parent.to_owned();
        }
        let vip = if with_vip { self.vip(&nodes, &mut notes)? } else { None };
        let how = self.how()?;
        let template = Template {
            service_name,
            zone,
            servers,
            nodes,
            data_dir,
            bin_dir,
            port,
            socket_dir,
            secrets_dir: dir.display().to_string(),
            vip,
            vip_interface: self.args.vip_interface.clone(),
            witness: self.witness,
            dns: with_dns,
        };
        if self.source == Source::Person {
            terminal::say(&summary(&template, how));
            if !terminal::confirm("Write this?", true)? {
                return Err(wrong(format!("nothing was written; the same answers: {}", as_flags(&template, how))));
            }
        }
        Ok(Answers { template, how, facts, notes })
    }

    /// The value of a flag, a person's answer, what was found, or a gap.
    fn pick(
        &mut self,
        flag: Option<String>,
        gap: &str,
        question: &str,
        found: Option<String>,
        judge: &dyn Fn(&str) -> Result<(), String>,
    ) -> Result<String, Fault> {
        if let Some(value) = flag {
            let name = gap.split(' ').next().unwrap_or_default();
            return judge(&value).map(|()| value).map_err(|why| wrong(format!("{name}: {why}")));
        }
        match (self.source, found) {
            (Source::Person, found) => terminal::ask(question, found, judge),
            (Source::Found, Some(found)) if judge(&found).is_ok() => Ok(found),
            (_, found) => {
                let hint = found.map(|found| format!(" (found: {found})")).unwrap_or_default();
                self.gaps.push(format!("{gap}{hint}"));
                Ok(String::new())
            }
        }
    }

    /// Without a terminal every gap is named at once.
    fn refuse_gaps(&self) -> Result<(), Fault> {
        if self.gaps.is_empty() {
            return Ok(());
        }
        let yes = if self.source == Source::Flags { ", or --yes for what was found," } else { "" };
        Err(wrong(format!(
            "init needs {}; give them{yes} or run it on a terminal, where it asks",
            self.gaps.join(", ")
        )))
    }

    fn postgres(&mut self) -> Result<(String, String, Option<u16>, Option<String>), Fault> {
        if self.cluster.is_none() && self.args.data_dir.is_none() {
            let all = clusters();
            let at = match (self.source, all.len()) {
                (Source::Person, 2..) => {
                    let rows: Vec<String> = all.iter().map(describe).collect();
                    terminal::choose("Which PostgreSQL cluster of this machine?", &rows)?
                }
                _ => 0,
            };
            self.cluster = all.into_iter().nth(at);
            if let Some(cluster) = self.cluster.as_ref().filter(|_| self.source == Source::Person) {
                terminal::say(&format!("PostgreSQL here: {}", describe(cluster)));
            }
        }
        let found = self.cluster.clone();
        let shown = |path: &Path| path.display().to_string();
        let data = found.as_ref().map(|cluster| shown(&cluster.data_dir));
        let data_flag = self.args.data_dir.as_deref().map(shown);
        let data_dir = self.pick(data_flag, "--data-dir DIR", "PostgreSQL's data directory", data, &absolute)?;
        // A directory that a person named may hold a cluster as well.
        let cluster =
            found.filter(|found| found.data_dir == Path::new(&data_dir)).or_else(|| cluster_in(Path::new(&data_dir)));
        let bin = cluster.as_ref().map(|cluster| shown(&cluster.bin_dir)).or_else(newest_bin_dir);
        let known = cluster.as_ref().filter(|_| self.source == Source::Person).map(|cluster| shown(&cluster.bin_dir));
        let bin_flag = self.args.bin_dir.as_deref().map(shown).or(known);
        let bin_dir = self.pick(bin_flag, "--bin-dir DIR", "Directory of PostgreSQL's programs", bin, &absolute)?;
        let found_port = cluster.as_ref().map(|cluster| cluster.port).filter(|port| *port != 5432);
        let found_sockets = cluster.as_ref().map(|cluster| shown(&cluster.socket_dir));
        let usual = ["/var/run/postgresql", "/run/postgresql"];
        let found_sockets = found_sockets.filter(|dir| !usual.contains(&dir.as_str()));
        self.cluster = cluster;
        let sockets = self.args.socket_dir.as_deref().map(shown).or(found_sockets);
        Ok((data_dir, bin_dir, self.args.port.or(found_port), sockets))
    }

    fn nodes(&mut self) -> Result<Vec<ExampleNode>, Fault> {
        let mut nodes = self.args.nodes.iter().map(|text| node(text)).collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        if nodes.len() > 2 {
            return Err(wrong("--node is given more than twice; write further nodes into the file later".to_owned()));
        }
        if nodes.len() == 2 {
            return both_judged(nodes);
        }
        let default_address = self.places.first().map(|place| place.net.addr().to_string());
        if self.source != Source::Person {
            if self.source == Source::Found
                && let (Some(name), Some(address), [other]) = (steps::own_name(), default_address, nodes.as_slice())
                && other.name != name.as_str()
            {
                nodes.insert(0, ExampleNode { name: name.to_string(), addresses: vec![address] });
                return both_judged(nodes);
            }
            self.gaps.push("--node NAME=ADDRESS for each of the two nodes".to_owned());
            return Ok(nodes);
        }
        let name = steps::own_name().map(|name| name.to_string());
        let own = terminal::ask("This machine's name as a node", name, &node_name)?;
        if self.places.len() > 1 {
            let all: Vec<String> =
                self.places.iter().map(|place| format!("{} ({})", place.net, place.interface)).collect();
            terminal::say(&format!("Addresses here: {}", all.join(", ")));
        }
        let question = "Its address, by which clients and the other node reach it";
        let address = terminal::ask(question, default_address, &addresses)?;
        let other_name = match nodes.pop() {
            Some(other) => return both_judged(vec![ExampleNode { name: own, addresses: words(&address) }, other]),
            None => terminal::ask("The other machine's name as a node", None, &|text| {
                node_name(text)?;
                if text == own { Err(format!("{own} is this machine; name the other one")) } else { Ok(()) }
            })?,
        };
        let other_address = terminal::ask("Its address", None, &|text| {
            addresses(text)?;
            differ(&words(&address), &words(text))
        })?;
        both_judged(vec![
            ExampleNode { name: own, addresses: words(&address) },
            ExampleNode { name: other_name, addresses: words(&other_address) },
        ])
    }

    fn service_name(&mut self) -> Result<String, Fault> {
        let found = network::domain().map(|domain| format!("db.{domain}"));
        let question = "The DNS name that clients use";
        let name = self.pick(self.args.service_name.clone(), "--service-name NAME", question, found, &domain_name)?;
        Ok(name.trim_end_matches('.').to_ascii_lowercase())
    }

    /// With DNS? With a VIP?
    fn recipe(&mut self) -> Result<(bool, bool), Fault> {
        let args = self.args;
        if args.no_dns || args.vip.is_some() || self.source != Source::Person {
            if args.no_dns && args.vip.is_none() && self.source != Source::Person {
                self.gaps.push("--vip ADDRESS/MASK with --no-dns".to_owned());
            }
            return Ok((!args.no_dns, args.vip.is_some() || args.no_dns));
        }
        if args.zone.is_some() || !args.servers.is_empty() || args.witness {
            return Ok((true, terminal::confirm("A virtual address as well (both nodes share a network)?", false)?));
        }
        let rows = [
            "DNS: the name's record moves with the service (the DNS server is the third voter)",
            "a virtual address: it moves with the service; both nodes share a network",
            "both: clients use the virtual address, and the DNS server is the third voter",
        ];
        let at = terminal::choose("How do clients find the active node?", &rows.map(str::to_owned))?;
        Ok((at != 1, at != 0))
    }

    fn zone(
        &mut self,
        service: &str,
        facts: Option<&NameFacts>,
        notes: &mut Vec<String>,
    ) -> Result<(String, Vec<String>), Fault> {
        let found = facts.and_then(|facts| facts.zone.as_ref());
        let parent = service.split_once('.').map(|(_, zone)| zone.to_owned());
        if let Some(found) = found {
            let servers: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
            let text = format!(
                "DNS: zone {}, updates go to {}; its servers: {}",
                found.name,
                found.primary,
                if servers.is_empty() { "none with an address".to_owned() } else { servers.join(", ") }
            );
            self.note(text, notes);
        } else if facts.is_some() && self.args.servers.is_empty() {
            self.note(format!("DNS: no zone with {service} in it was found from here"), notes);
        }
        for address in facts.into_iter().flat_map(|facts| &facts.addresses) {
            self.note(format!("DNS: {service} leads to {address} now"), notes);
        }
        let judge = |text: &str| ServiceNames::new(text, service).map(drop);
        let zone_found = found.map(|zone| zone.name.clone()).or(parent);
        let zone = match self.source {
            Source::Flags => self.args.zone.clone().or(zone_found).unwrap_or_default(),
            _ => self.pick(self.args.zone.clone(), "--zone ZONE", "The DNS zone it is in", zone_found, &judge)?,
        };
        if !self.args.servers.is_empty() {
            let servers: Result<Vec<_>, _> = self.args.servers.iter().map(|text| server(text)).collect();
            return Ok((zone, servers.map_err(|why| wrong(format!("--server: {why}")))?));
        }
        if self.source == Source::Person && found.is_none() && facts.is_some() {
            let question = "Shall portcullis serve that zone itself, on a third machine?";
            self.witness = terminal::confirm(question, false)?;
            if self.witness {
                let judge = |text: &str| server(text).map(drop);
                let address = terminal::ask("The third machine's address", None, &judge)?;
                return Ok((zone, server(&address).into_iter().collect()));
            }
        }
        let same = found.filter(|found| found.name == zone);
        let proposed: Vec<String> = same.into_iter().flat_map(|zone| &zone.servers).map(ToString::to_string).collect();
        if self.source != Source::Person {
            return Ok((zone, proposed));
        }
        let question = "Its DNS servers, that which takes updates first (empty: found from the zone at each start)";
        let judge = |text: &str| words(text).iter().try_for_each(|word| server(word).map(drop));
        let answer = terminal::ask_any(question, proposed.join(", "), &judge)?;
        Ok((zone, words(&answer).iter().filter_map(|word| server(word).ok()).collect()))
    }

    /// Told at once to a person who is asked, else at the end.
    fn note(&self, text: String, notes: &mut Vec<String>) {
        match self.source {
            Source::Person => terminal::say(&text),
            Source::Found | Source::Flags => notes.push(text),
        }
    }

    fn vip(&mut self, nodes: &[ExampleNode], notes: &mut Vec<String>) -> Result<Option<String>, Fault> {
        let flag = self.args.vip.clone();
        let taken: Vec<IpAddr> = nodes.iter().flat_map(|node| &node.addresses).filter_map(|a| a.parse().ok()).collect();
        let judge = |text: &str| {
            let net: IpNet = text.parse().map_err(|_| {
                format!("\"{}\" is no address with a mask; write it as 192.0.2.100/24", text.escape_debug())
            })?;
            match taken.contains(&net.addr()) {
                true => Err(format!("{} is a node's own address; take a free one", net.addr())),
                false => Ok(()),
            }
        };
        // What the flag says is left to the configuration's own judgement, which names key and remedy.
        let vip = match flag {
            Some(flag) => flag,
            None => terminal::ask("The virtual address with its mask", self.free_network(), &judge)?,
        };
        if let Ok(net) = vip.parse::<IpNet>() {
            let card = self.places.iter().find(|place| place.net.contains(&net.addr()));
            let here = self.places.iter().any(|place| taken.contains(&place.net.addr()));
            match card {
                Some(card) => self.note(format!("VIP: {} goes on {} here", net.addr(), card.interface), notes),
                None if here && self.args.vip_interface.is_none() => self.note(
                    format!("VIP: no card here has the subnet of {net}; give it one, or name it: --vip-interface"),
                    notes,
                ),
                None => {}
            }
        }
        Ok(Some(vip))
    }

    /// Only the network can be known, not which address of it is free: no proposal.
    fn free_network(&self) -> Option<String> {
        None
    }

    fn how(&mut self) -> Result<PostgresHow, Fault> {
        if let Some(how) = self.args.postgres {
            return Ok(how);
        }
        let Some(cluster) = self.cluster.as_ref().filter(|cluster| cluster.name.is_some()) else {
            return Ok(PostgresHow::Leave);
        };
        if self.source != Source::Person {
            return Ok(PostgresHow::Leave);
        }
        let rows = [
            "leave: change nothing there and print the lines it needs",
            "prepare: write conf.d/portcullis.conf, lines at the top of pg_hba.conf, and a drop-in of its unit",
            "primary: the same and restart it; its data is the service's",
        ];
        let question = format!("PostgreSQL {}/{} here", cluster.version, cluster.name.as_deref().unwrap_or_default());
        let at = terminal::choose(&question, &rows.map(str::to_owned))?;
        Ok([PostgresHow::Leave, PostgresHow::Prepare, PostgresHow::Primary][at.min(2)])
    }
}

fn describe(cluster: &FoundCluster) -> String {
    let name = cluster.name.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
    let state = if cluster.running { "running" } else { "stopped" };
    format!("{}{name}, port {}, {state}, in {}", cluster.version, cluster.port, cluster.data_dir.display())
}

/// The programs of the highest version under /usr/lib/postgresql.
fn newest_bin_dir() -> Option<String> {
    let entries = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let newest = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).max()?;
    Some(format!("/usr/lib/postgresql/{newest}/bin"))
}

fn absolute(text: &str) -> Result<(), String> {
    match Path::new(text).is_absolute() {
        true => Ok(()),
        false => Err(format!("\"{}\" does not begin with /; write the whole path", text.escape_debug())),
    }
}

fn node_name(text: &str) -> Result<(), String> {
    text.parse::<NodeName>().map(drop).map_err(|error| error.to_string())
}

fn domain_name(text: &str) -> Result<(), String> {
    let parent = text.trim_end_matches('.').split_once('.').map(|(_, zone)| zone).unwrap_or_default();
    if parent.is_empty() {
        return Err(format!("\"{}\" has no domain; write the full name, as db.example.org", text.escape_debug()));
    }
    ServiceNames::new(parent, text).map(drop)
}

/// One address, or one of each family.
fn addresses(text: &str) -> Result<(), String> {
    let words = words(text);
    if words.is_empty() {
        return Err("an address is needed, as 192.0.2.11".to_owned());
    }
    for word in &words {
        let address: IpAddr = word.parse().map_err(|_| {
            format!("\"{}\" is no address; write it as 192.0.2.11 or 2001:db8::11", word.escape_debug())
        })?;
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} is reached by nobody else; give the address that others use"));
        }
    }
    Ok(())
}

fn differ(one: &[String], other: &[String]) -> Result<(), String> {
    match other.iter().find(|address| one.contains(address)) {
        Some(address) => Err(format!("{address} is the first node's; give the other machine's")),
        None => Ok(()),
    }
}

fn both_judged(nodes: Vec<ExampleNode>) -> Result<Vec<ExampleNode>, Fault> {
    if let [one, other] = nodes.as_slice() {
        for node in &nodes {
            node_name(&node.name).and_then(|()| addresses(&node.addresses.join(","))).map_err(wrong)?;
        }
        differ(&one.addresses, &other.addresses).map_err(wrong)?;
    }
    Ok(nodes)
}

/// `address:port`, the port being DNS's own where none is written.
fn server(text: &str) -> Result<String, String> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Ok(socket.to_string());
    }
    match text.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => Ok(SocketAddr::new(address, 53).to_string()),
        Err(_) => Err(format!("\"{}\" is no address of a server; write it as 192.0.2.53:53", text.escape_debug())),
    }
}

fn words(text: &str) -> Vec<String> {
    text.split([' ', ',']).filter(|word| !word.is_empty()).map(ToOwned::to_owned).collect()
}

fn node(text: &str) -> Result<ExampleNode, String> {
    match text.split_once('=') {
        Some((name, addresses)) if !name.is_empty() && !addresses.is_empty() => {
            Ok(ExampleNode { name: name.trim().to_owned(), addresses: words(addresses) })
        }
        _ => Err(format!("\"{}\" is no node; write it as name=address, alp=192.0.2.11", text.escape_debug())),
    }
}

/// What is about to be written, in a few lines.
fn summary(template: &Template, how: PostgresHow) -> String {
    let nodes: Vec<String> =
        template.nodes.iter().map(|node| format!("{} ({})", node.name, node.addresses.join(", "))).collect();
    let servers =
        if template.servers.is_empty() { "found from the zone".to_owned() } else { template.servers.join(", ") };
    let mut text = format!("\n  service     {}\n  nodes       {}\n", template.service_name, nodes.join(", "));
    if template.dns {
        text += &format!("  DNS         zone {}, servers {servers}\n", template.zone);
    }
    if let Some(vip) = &template.vip {
        text += &format!("  VIP         {vip}\n");
    }
    let how = match how {
        PostgresHow::Leave => "left as it is",
        PostgresHow::Prepare => "prepared",
        PostgresHow::Primary => "prepared and restarted",
        PostgresHow::Standby => "prepared, stopped, its fresh data moved aside",
    };
    text + &format!("  PostgreSQL  {} ({how})\n  files       {}\n", template.data_dir, template.secrets_dir)
}

/// The same answers as a command line, so that none is given twice.
pub(super) fn as_flags(template: &Template, how: PostgresHow) -> String {
    let mut line = format!("portcullis init --yes --service-name {}", template.service_name);
    for node in &template.nodes {
        line += &format!(" --node {}={}", node.name, node.addresses.join(","));
    }
    if template.dns {
        line += &format!(" --zone {}", template.zone);
        template.servers.iter().for_each(|server| line += &format!(" --server {server}"));
    } else {
        line += " --no-dns";
    }
    if let Some(vip) = &template.vip {
        line += &format!(" --vip {vip}");
    }
    if let Some(interface) = &template.vip_interface {
        line += &format!(" --vip-interface {interface}");
    }
    line += &format!(" --data-dir {} --bin-dir {}", template.data_dir, template.bin_dir);
    if let Some(port) = template.port {
        line += &format!(" --port {port}");
    }
    if let Some(dir) = &template.socket_dir {
        line += &format!(" --socket-dir {dir}");
    }
    if template.witness {
        line += " --witness";
    }
    if let Some(how) = match how {
        PostgresHow::Leave => None,
        PostgresHow::Prepare => Some("prepare"),
        PostgresHow::Primary => Some("primary"),
        PostgresHow::Standby => Some("standby"),
    } {
        line += &format!(" --postgres {how}");
    }
    if template.secrets_dir != "/etc/portcullis" {
        line += &format!(" --output-dir {}", template.secrets_dir);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_with_the_way_out() {
        type Judge = fn(&str) -> Result<(), String>;
        let rows: [(Judge, &str, &str); 9] = [
            (domain_name, "db", "write the full name"),
            (domain_name, "", "write the full name"),
            (addresses, "", "is needed"),
            (addresses, "192.0.2.300", "is no address"),
            (addresses, "127.0.0.1", "nobody else"),
            (node_name, "Alp!", "a-z"),
            (absolute, "data", "whole path"),
            (|text| server(text).map(drop), "ns.example.org", "192.0.2.53:53"),
            (|text| node(text).map(drop), "alp", "name=address"),
        ];
        for (judge, text, words) in rows {
            let why = judge(text).expect_err(text);
            assert!(why.contains(words), "{text}: {why}");
        }
        for (judge, text) in [
            (domain_name as Judge, "db.example.org."),
            (addresses, "192.0.2.11, 2001:db8::11"),
            (node_name, "alp"),
            (absolute, "/data"),
        ] {
            assert_eq!(judge(text), Ok(()), "{text}");
        }
        assert_eq!(server("192.0.2.53").as_deref(), Ok("192.0.2.53:53"));
        assert_eq!(server("[2001:db8::53]").as_deref(), Ok("[2001:db8::53]:53"));
    }
}
