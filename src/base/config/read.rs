//! The keys: each with its type and its default, exactly as the contract shows them.
//!
//! Knows no relation between keys; `proof.rs` does.

use super::text::{self, Notes, Section};
use super::{
    Auth, Cluster, Config, Console, Dns, DnsMode, Fence, FencePostgres, Node, NodePostgres, Notify, OnStandbyLoss,
    Passive, Pool, PoolMode, Postgres, Replication, ReplicationMode, Service, Tsig, Vip, Witness,
};
use crate::base::ids::NodeName;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use toml::de::DeTable;

const PEER_PORT: u16 = 6433;
const POSTGRES_PORT: u16 = 5432;
const TSIG_ALGORITHMS: [&str; 3] = ["hmac-sha256", "hmac-sha384", "hmac-sha512"];
/// Postgres backends of one pool; PostgreSQL's own `max_connections` ends at 262143.
const MOST_BACKENDS: u32 = 262_143;
/// Clients of one gate; each needs two descriptors, and Linux' `fs.nr_open` is 2^20 as it comes.
const MOST_CLIENTS: u32 = 500_000;
/// Prepared statements of one backend: each costs PostgreSQL memory.
const MOST_PREPARED: u32 = 100_000;
const MOST_THREADS: u32 = 64;
/// Longest time for which a changed password may leave the old one good.
const MAX_CACHE: Duration = Duration::from_secs(60);

/// Reads every key. `None` only after an error was noted.
pub(super) fn config(notes: &Notes<'_>, table: &DeTable<'_>) -> Option<Config> {
    let root = Section::root(notes, table);
    let state_dir = root.path_of("state_dir").unwrap_or_else(|| "/var/lib/portcullis".into());
    let runtime_dir = root.path_of("runtime_dir").unwrap_or_else(|| "/run/portcullis".into());
    let service = service(root.section("service"));
    let nodes = nodes(&root);
    let cluster = cluster(root.section("cluster"));
    let postgres = postgres(root.section("postgres"));
    let auth = auth(root.section("auth"));
    let dns_section = root.section("dns");
    let name = service.as_ref().map(|service| service.name.as_str());
    let dns = if dns_section.is_present() { dns(dns_section, name) } else { None };
    let witness_section = root.section("witness");
    let witness =
        if witness_section.is_present() { witness(witness_section, dns.as_ref(), nodes.as_deref()) } else { None };
    let vip_section = root.section("vip");
    let vip = if vip_section.is_present() { vip(vip_section) } else { None };
    let fence = fence(root.section("fence"));
    let replication = replication(root.section("replication"));
    let pool = pool(root.section("pool"));
    let reads_balance = reads(root.section("reads"));
    let status_listen = status(root.section("status"));
    let notify = notify(root.section("notify"));
    let console = console(root.section("console"));
    root.finish();
    Some(Config {
        state_dir,
        runtime_dir,
        service: service?,
        nodes: nodes?,
        cluster: cluster?,
        postgres,
        auth,
        dns,
        witness,
        vip,
        fence,
        replication,
        pool,
        reads_balance,
        status_listen,
        notify,
        console,
        warnings: Vec::new(),
    })
}

fn any(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// One of a few words; `built` of them do something already.
fn choice<T: Copy>(section: &Section<'_>, key: &str, words: &[(&str, T)], unbuilt: &[&str]) -> Option<T> {
    let first = words.first().map_or("", |(word, _)| word);
    let all: Vec<String> =
        words.iter().map(|(word, _)| *word).chain(unbuilt.iter().copied()).map(|word| format!("\"{word}\"")).collect();
    let word = section.parsed(key, &all.join(" or "), |text| {
        if words.iter().any(|(word, _)| *word == text) || unbuilt.contains(&text) {
            Ok(text.to_owned())
        } else {
            Err(format!("\"{}\" is not a value of this key", text.escape_debug()))
        }
    })?;
    if unbuilt.contains(&word.as_str()) {
        not_built(
            section,
            key,
            &format!("\"{word}\""),
            &format!("write \"{first}\", the default, or take the line out"),
        );
    }
    words.iter().find(|(known, _)| *known == word).map(|(_, value)| *value)
}

/// Refuses what would be silently ignored: a value whose function does not exist yet.
fn not_built(section: &Section<'_>, key: &str, value: &str, remedy: &str) {
    section.error(key, format!("{value} is not built yet"), remedy);
}

/// A list that must stay empty until its function is built.
fn not_built_list(section: &Section<'_>, key: &str) {
    if section.list(key, "\"...\"", any).is_some_and(|list| !list.is_empty()) {
        not_built(section, key, "this", "leave the list empty or take the line out");
    }
}

fn service(section: Section<'_>) -> Option<Service> {
    let name = section.parsed("name", "\"db.example.org\"", text::dns_name);
    let name = section.require("name", name, "\"db.example.org\"");
    let example = "\"0.0.0.0:6432\"";
    let listen = section
        .list("listen", example, text::socket)
        .unwrap_or_else(|| vec![SocketAddr::from(([0, 0, 0, 0], 6432)), SocketAddr::from(([0u16; 8], 6432))]);
    if listen.is_empty() {
        section.error("listen", "names no address, so that no client could connect", format!("write [{example}]"));
    }
    let passive = [("refuse", Passive::Refuse), ("forward", Passive::Forward)];
    let passive = choice(&section, "passive", &passive, &[]).unwrap_or(Passive::Refuse);
    let units = section.list("units", "\"web.service\"", text::unit).unwrap_or_default();
    section.finish();
    Some(Service { name: name?, listen, passive, units })
}

fn nodes(root: &Section<'_>) -> Option<Vec<Node>> {
    let sections = root.sections("node");
    let count = sections.len();
    let nodes: Vec<Node> =
        sections.into_iter().enumerate().filter_map(|(index, section)| node(section, index)).collect();
    if count < 2 {
        root.error("node", format!("{count} of the two nodes described"), "write one [[node]] section for each server");
        return None;
    }
    (nodes.len() == count).then_some(nodes)
}

fn node(section: Section<'_>, index: usize) -> Option<Node> {
    let name = section.parsed("name", "\"alp\"", |text| text.parse::<NodeName>().map_err(|error| error.to_string()));
    let name = section.require("name", name, "\"alp\"");
    let example = "\"192.0.2.11\"";
    let addresses = section.one_or_list("address", example, text::address);
    let addresses = section.require("address", addresses, example);
    if let Some(list) = &addresses {
        let four = list.iter().filter(|address| address.is_ipv4()).count();
        if four > 1 || list.len() - four > 1 {
            let remedy = "write at most one IPv4 and one IPv6 address: two of a kind in the record mean \"nothing\"";
            section.error("address", "two addresses of one family", remedy);
        } else if list.is_empty() {
            section.error("address", "is an empty list", format!("write {example}"));
        }
    }
    let first = addresses.as_ref().and_then(|list| list.first().copied());
    let peer_listen = section.parsed("peer_listen", "\"192.0.2.11:6433\"", text::socket);
    let weight = section.number("weight", 0.0, f64::INFINITY).unwrap_or(1.0);
    let voter = section.boolean("voter").unwrap_or(index < 2);
    let vip_interface = section.string("vip_interface").filter(|name| !name.is_empty());
    let postgres = node_postgres(section.section("postgres"), first);
    section.finish();
    Some(Node {
        name: name?,
        addresses: addresses?,
        peer_listen: peer_listen.or_else(|| first.map(|address| SocketAddr::new(address, PEER_PORT)))?,
        weight,
        voter,
        vip_interface,
        postgres: postgres?,
    })
}

fn node_postgres(section: Section<'_>, address: Option<IpAddr>) -> Option<NodePostgres> {
    let host = section.string("host").filter(|host| !host.is_empty());
    let port = section.integer("port", 1, 65_535).and_then(|port| u16::try_from(port).ok()).unwrap_or(POSTGRES_PORT);
    let socket_dir = section.path_of("socket_dir").unwrap_or_else(|| "/var/run/postgresql".into());
    let data_dir = section.path_of("data_dir");
    let data_dir = section.require("data_dir", data_dir, "\"/var/lib/postgresql/15/main\"");
    let bin_dir = section.path_of("bin_dir");
    let bin_dir = section.require("bin_dir", bin_dir, "\"/usr/lib/postgresql/15/bin\"");
    let command = |key| section.list(key, "\"/usr/bin/...\", \"...\"", any).filter(|words| !words.is_empty());
    let (start, stop) = (command("start"), command("stop"));
    section.finish();
    Some(NodePostgres {
        host: host.or_else(|| address.map(|address| address.to_string()))?,
        port,
        socket_dir,
        data_dir: data_dir?,
        bin_dir: bin_dir?,
        start,
        stop,
    })
}

fn cluster(section: Section<'_>) -> Option<Cluster> {
    let key_file = section.path_of("key_file");
    let key_file = section.require("key_file", key_file, "\"/etc/portcullis/cluster.key\"");
    section.finish();
    Some(Cluster { key_file: key_file? })
}

fn postgres(section: Section<'_>) -> Postgres {
    let admin_user = section.string("admin_user").unwrap_or_else(|| "postgres".to_owned());
    section.finish();
    Postgres { admin_user }
}

fn auth(section: Section<'_>) -> Auth {
    let hba_file = section.path_of("hba_file").unwrap_or_else(|| "/etc/portcullis/hba.conf".into());
    let ident_file = section.path_of("ident_file");
    let tls_cert_file = section.path_of("tls_cert_file");
    let tls_key_file = section.path_of("tls_key_file");
    let tls_ca_file = section.path_of("tls_ca_file");
    let tls_crl_file = section.path_of("tls_crl_file");
    let cache = section.duration("cache", "1s").unwrap_or(Duration::ZERO);
    if cache > MAX_CACHE {
        section.error("cache", "an old password would be good for so long", "write \"60s\" or less");
    }
    match (&tls_cert_file, &tls_key_file) {
        (Some(_), None) => section.error("tls_cert_file", "a certificate without its key", "write tls_key_file too"),
        (None, Some(_)) => section.error("tls_key_file", "a key without its certificate", "write tls_cert_file too"),
        (None, None) if tls_ca_file.is_some() => {
            section.error("tls_ca_file", "a CA for clients without a certificate", "write tls_cert_file too");
        }
        _ if tls_crl_file.is_some() && tls_ca_file.is_none() => {
            section.error("tls_crl_file", "revoked certificates without the CA of clients", "write tls_ca_file too");
        }
        _ => {}
    }
    section.finish();
    Auth { hba_file, ident_file, tls_cert_file, tls_key_file, tls_ca_file, tls_crl_file, cache }
}

fn dns(section: Section<'_>, service: Option<&str>) -> Option<Dns> {
    let mode = choice(&section, "mode", &[("update", DnsMode::Update), ("observe", DnsMode::Observe)], &[])
        .unwrap_or(DnsMode::Update);
    // Default: the service name without its first label.
    let zone = section.parsed("zone", "\"example.org\"", text::dns_name);
    let zone = zone.or_else(|| service?.split_once('.').map(|(_, zone)| zone.to_owned())).unwrap_or_default();
    let servers = section.list("servers", "\"192.0.2.53:53\"", text::dns_server).unwrap_or_default();
    let poll = section.duration("poll", "1s").unwrap_or(Duration::from_secs(1));
    let ttl = section.duration("ttl", "5s").unwrap_or(Duration::from_secs(5));
    let tsig_given = ["tsig_name", "tsig_key_file"].iter().any(|key| section.string(key).is_some());
    let tsig_name = section.parsed("tsig_name", "\"portcullis\"", text::dns_name);
    let algorithm = section.parsed("tsig_algorithm", "\"hmac-sha256\"", |text| {
        let word = text.to_ascii_lowercase();
        TSIG_ALGORITHMS
            .contains(&word.as_str())
            .then_some(word)
            .ok_or_else(|| format!("\"{}\" is none of {}", text.escape_debug(), TSIG_ALGORITHMS.join(", ")))
    });
    let key_file = section.path_of("tsig_key_file");
    if mode == DnsMode::Update && section.string("tsig_key_file").is_some_and(|path| path.is_empty()) {
        let remedy = "name the file of the key, \"/etc/portcullis/tsig.key\"";
        section.error("tsig_key_file", "is empty, and in update mode every question and update is signed", remedy);
    }
    let tsig = Tsig {
        name: tsig_name.unwrap_or_else(|| "portcullis".to_owned()),
        algorithm: algorithm.unwrap_or_else(|| "hmac-sha256".to_owned()),
        key_file: key_file.unwrap_or_else(|| PathBuf::from("/etc/portcullis/tsig.key")),
    };
    // In observe mode questions are signed only where a key is named; updates are always signed.
    let tsig = (mode == DnsMode::Update || tsig_given).then_some(tsig);
    not_built_list(&section, "update_command");
    let propagation = section.duration("propagation", "60s").unwrap_or(Duration::ZERO);
    section.finish();
    Some(Dns { mode, zone, servers, poll, ttl, tsig, update_command: Vec::new(), propagation })
}

fn witness(section: Section<'_>, dns: Option<&Dns>, nodes: Option<&[Node]>) -> Option<Witness> {
    let listen = section.list("listen", "\"192.0.2.53:53\"", text::socket);
    let listen = listen.or_else(|| dns.map(|dns| dns.servers.clone()).filter(|servers| !servers.is_empty()));
    let listen = section.require("listen", listen, "[\"192.0.2.53:53\"]");
    let ns = section.parsed("ns", "\"ns.example.org\"", text::dns_name);
    let ns = ns.or_else(|| dns.map(|dns| format!("ns.{}", dns.zone)));
    let first = nodes.and_then(|nodes| nodes.first()).map(|node| node.name.clone());
    let active = section.parsed("active", "the name of one [[node]]", |text| match nodes {
        Some(nodes) => nodes
            .iter()
            .find(|node| node.name.as_str() == text)
            .map(|node| node.name.clone())
            .ok_or_else(|| format!("\"{}\" is the name of no [[node]]", text.escape_debug())),
        None => text.parse().map_err(|error: crate::base::ids::BadId| error.to_string()),
    });
    section.finish();
    Some(Witness { listen: listen?, ns: ns?, active: active.or(first)? })
}

fn vip(section: Section<'_>) -> Option<Vip> {
    let example = "\"192.0.2.100/24\"";
    let addresses = section.one_or_list("address", example, text::network);
    let addresses = section.require("address", addresses, example);
    if addresses.as_ref().is_some_and(Vec::is_empty) {
        section.error("address", "is an empty list", format!("write {example}, or take [vip] out"));
    }
    let interface = section.string("interface").filter(|name| !name.is_empty());
    // Only a lease without DNS asks them (R3).
    let witness = section.list("witness", "\"192.0.2.1\"", text::address).unwrap_or_default();
    section.finish();
    Some(Vip { addresses: addresses?, interface, witness })
}

fn fence(section: Section<'_>) -> Fence {
    let lease = section.duration("lease", "5s").unwrap_or(Duration::from_secs(5));
    let max_drift = section.number("max_drift", 0.0, 0.1).unwrap_or(0.01);
    let margin = section.duration("margin", "500ms").unwrap_or(Duration::from_millis(500));
    let words = [("demote", FencePostgres::Demote), ("stop", FencePostgres::Stop), ("keep", FencePostgres::Keep)];
    let postgres = choice(&section, "postgres", &words, &[]).unwrap_or(FencePostgres::Demote);
    let kernel_gate = section.boolean("kernel_gate").unwrap_or(false);
    let stonith = section.list("stonith", "\"/usr/local/sbin/power-off\", \"{node}\"", any).unwrap_or_default();
    if stonith.first().is_some_and(|program| !program.starts_with('/')) {
        section.error(
            "stonith",
            "does not name a program by its full path",
            "write [\"/path/to/program\", \"{node}\"]",
        );
    }
    section.finish();
    Fence { lease, max_drift, margin, postgres, kernel_gate, stonith }
}

fn replication(section: Section<'_>) -> Replication {
    let modes = [("synchronous", ReplicationMode::Synchronous), ("asynchronous", ReplicationMode::Asynchronous)];
    let mode = choice(&section, "mode", &modes, &[]).unwrap_or(ReplicationMode::Synchronous);
    let losses = [("continue", OnStandbyLoss::Continue), ("block", OnStandbyLoss::Block)];
    let on_standby_loss = choice(&section, "on_standby_loss", &losses, &[]).unwrap_or(OnStandbyLoss::Continue);
    let standby_timeout = section.duration("standby_timeout", "3s").unwrap_or(Duration::from_secs(3));
    let user = section.string("user").unwrap_or_else(|| "replicator".to_owned());
    let password_file = section.path_of("password_file").unwrap_or_else(|| "/etc/portcullis/replication.pass".into());
    let conninfo = section.string("conninfo").unwrap_or_default();
    let slots = section.boolean("slots").unwrap_or(true);
    section.finish();
    Replication { mode, on_standby_loss, standby_timeout, user, password_file, conninfo, slots }
}

fn pool(section: Section<'_>) -> Pool {
    let d = Pool::default();
    let modes = [("session", PoolMode::Session), ("transaction", PoolMode::Transaction)];
    let pool = Pool {
        mode: choice(&section, "mode", &modes, &[]).unwrap_or(d.mode),
        size: section.integer("size", 1, MOST_BACKENDS).unwrap_or(d.size),
        reserve: section.integer("reserve", 0, MOST_BACKENDS).unwrap_or(d.reserve),
        reserve_after: section.duration("reserve_after", "5s").unwrap_or(d.reserve_after),
        idle_timeout: section.duration("idle_timeout", "10m").unwrap_or(d.idle_timeout),
        lifetime: section.duration("lifetime", "1h").unwrap_or(d.lifetime),
        max_clients: section.integer("max_clients", 1, MOST_CLIENTS).unwrap_or(d.max_clients),
        max_clients_per_user: section.integer("max_clients_per_user", 0, MOST_CLIENTS).unwrap_or(0),
        max_clients_per_database: section.integer("max_clients_per_database", 0, MOST_CLIENTS).unwrap_or(0),
        query_wait: section.duration("query_wait", "30s").unwrap_or(d.query_wait),
        login_timeout: section.duration("login_timeout", "60s").unwrap_or(d.login_timeout),
        client_idle_timeout: section.duration("client_idle_timeout", "30m").unwrap_or(Duration::ZERO),
        idle_in_transaction_timeout: section.duration("idle_in_transaction_timeout", "5m").unwrap_or(Duration::ZERO),
        max_prepared: section.integer("max_prepared", 1, MOST_PREPARED).unwrap_or(d.max_prepared),
        client_address: section.boolean("client_address").unwrap_or(false),
        threads: section.integer("threads", 0, MOST_THREADS).unwrap_or(0),
    };
    section.finish();
    pool
}

/// `true` is an error until balancing is built, so this is `false` in every proven configuration.
fn reads(section: Section<'_>) -> bool {
    let balance = section.boolean("balance").unwrap_or(false);
    if balance {
        not_built(&section, "balance", "true", "write false, the default, or take the line out");
    }
    section.finish();
    balance
}

fn status(section: Section<'_>) -> Option<SocketAddr> {
    let example = "\"127.0.0.1:6434\", or \"\" for none";
    let listen = section.parsed("listen", example, |text| match text {
        "" => Ok(None),
        text => text::socket(text).map(Some),
    });
    section.finish();
    listen.unwrap_or(Some(SocketAddr::from(([127, 0, 0, 1], 6434))))
}

fn notify(section: Section<'_>) -> Notify {
    let d = Notify::default();
    let command = section.list("command", "\"/usr/local/bin/page-someone\"", any).unwrap_or_default();
    if command.first().is_some_and(|program| !program.starts_with('/')) {
        let remedy = "write [\"/path/to/program\"], with its words after it; there is no shell";
        section.error("command", "does not name a program by its full path", remedy);
    }
    let mail = section.list("mail", "\"dba@example.org\"", text::mail_address).unwrap_or_default();
    let sendmail = section.path_of("sendmail").unwrap_or(d.sendmail);
    section.finish();
    Notify { command, mail, sendmail }
}

fn console(section: Section<'_>) -> Console {
    let role = |text: &str| match text.is_empty() {
        true => Err("is no name of a role".to_owned()),
        false => Ok(text.to_owned()),
    };
    let admins = section.list("admins", "\"dba\"", role).unwrap_or_default();
    let stats = section.list("stats", "\"monitoring\"", role).unwrap_or_default();
    section.finish();
    Console { admins, stats }
}
