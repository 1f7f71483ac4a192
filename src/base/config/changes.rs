//! Every key with its value, as a sheet that can be compared: which keys differ between two configurations, what a
//! reload applies, and what it names as in need of a restart; for `doctor`, with those of another node.
//!
//! What it is NOT: it reads no file and knows no daemon; which keys a reload can apply it says once, in [`is_live`].
//! The secrets themselves are in no configuration; words of commands, which may hold some, leave as a hash alone.

use super::{
    Auth, Cluster, Config, Console, Dns, Fence, Node, NodePostgres, Notify, Pool, Postgres, Replication, Service, Tsig,
    Vip, Witness,
};
use std::collections::BTreeMap;

/// Notes the keys of one section. A field that is forgotten here does not compile.
macro_rules! tell {
    ($out:expr, $section:expr, $type:ident, $values:expr, { $($field:ident: $key:literal),* $(,)? }) => {{
        let $type { $($field),* } = $values;
        $($out.push((format!("{}.{}", $section, $key), format!("{:?}", $field)));)*
    }};
}

/// Keys whose values may hold a password that somebody wrote there: told as a hash.
const VEILED: [&str; 6] = [
    "fence.stonith",
    "notify.command",
    "dns.update_command",
    "replication.conninfo",
    ".postgres.start",
    ".postgres.stop",
];
/// What stands for a section that is not there.
const ABSENT: &str = "not there";
/// Sections that may be left out as a whole.
const OPTIONAL: [&str; 3] = ["dns", "witness", "vip"];

/// Whether a daemon that runs can take this key over.
pub fn is_live(key: &str) -> bool {
    key.starts_with("auth.")
        || key.starts_with("notify.")
        || key.starts_with("console.")
        || (key.starts_with("pool.") && !matches!(key, "pool.mode" | "pool.threads"))
}

impl Config {
    /// The keys whose values differ, by their full paths.
    pub fn changes(&self, new: &Config) -> Vec<String> {
        let (old, new) = (self.values(), new.values());
        let keys: Vec<&String> = old.iter().chain(&new).map(|(key, _)| key).collect();
        let of = |values: &[(String, String)], key: &str| {
            values.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
        };
        let differs = |key: &str| of(&old, key) != of(&new, key);
        let mut out: Vec<String> = Vec::new();
        for key in keys {
            // A section that came or went, and nodes of other names, are told as one.
            let whole = key.split('.').next().filter(|section| *section != key && differs(section));
            if whole.is_none() && differs(key) && !out.contains(key) {
                out.push(key.clone());
            }
        }
        out
    }

    /// Every key with its value as text, for another node to compare. What may hold a secret is a hash.
    pub fn sheet(&self) -> BTreeMap<String, String> {
        let veil = |key: &str, value: String| match VEILED.iter().any(|veiled| key.ends_with(veiled)) {
            true => data_encoding::HEXLOWER.encode(
                ring::digest::digest(&ring::digest::SHA256, value.as_bytes()).as_ref().get(..8).unwrap_or_default(),
            ),
            false => value,
        };
        self.values().into_iter().map(|(key, value)| (key.clone(), veil(&key, value))).collect()
    }

    /// Is the value of this key only a hash in a sheet?
    pub fn is_veiled(key: &str) -> bool {
        VEILED.iter().any(|veiled| key.ends_with(veiled))
    }

    fn values(&self) -> Vec<(String, String)> {
        let mut out = Vec::new();
        let Config {
            state_dir,
            runtime_dir,
            service,
            nodes,
            cluster,
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
            // It says nothing of its own.
            warnings: _,
        } = self;
        for (key, value) in [
            ("state_dir", format!("{state_dir:?}")),
            ("runtime_dir", format!("{runtime_dir:?}")),
            ("reads.balance", format!("{reads_balance:?}")),
            ("status.listen", format!("{status_listen:?}")),
        ] {
            out.push((key.to_owned(), value));
        }
        tell!(out, "service", Service, service, {
            name: "name", listen: "listen", passive: "passive", units: "units",
        });
        tell_nodes(nodes, &mut out);
        tell!(out, "cluster", Cluster, cluster, { key_file: "key_file" });
        tell!(out, "postgres", Postgres, postgres, { admin_user: "admin_user" });
        tell!(out, "auth", Auth, auth, {
            hba_file: "hba_file", ident_file: "ident_file", tls_cert_file: "tls_cert_file",
            tls_key_file: "tls_key_file", tls_ca_file: "tls_ca_file", tls_crl_file: "tls_crl_file", cache: "cache",
        });
        if let Some(dns) = dns {
            tell_dns(dns, &mut out);
        }
        if let Some(witness) = witness {
            tell!(out, "witness", Witness, witness, { listen: "listen", ns: "ns", active: "active" });
        }
        if let Some(vip) = vip {
            tell!(out, "vip", Vip, vip, { addresses: "address", interface: "interface", witness: "witness" });
        }
        for section in OPTIONAL {
            if !out.iter().any(|(key, _)| key.split('.').next() == Some(section)) {
                out.push((section.to_owned(), ABSENT.to_owned()));
            }
        }
        tell!(out, "fence", Fence, fence, {
            lease: "lease", max_drift: "max_drift", margin: "margin", postgres: "postgres",
            kernel_gate: "kernel_gate", stonith: "stonith",
        });
        tell!(out, "replication", Replication, replication, {
            mode: "mode", on_standby_loss: "on_standby_loss", standby_timeout: "standby_timeout", user: "user",
            password_file: "password_file", conninfo: "conninfo", slots: "slots",
        });
        tell_pool(pool, &mut out);
        tell!(out, "notify", Notify, notify, {
            command: "command", mail: "mail", sendmail: "sendmail",
        });
        tell!(out, "console", Console, console, { admins: "admins", stats: "stats" });
        out
    }
}

fn tell_nodes(nodes: &[Node], out: &mut Vec<(String, String)>) {
    out.push(("node".to_owned(), nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ")));
    for node in nodes {
        let section = format!("node.{}", node.name);
        let Node { name: _, addresses: _, peer_listen: _, weight: _, voter: _, vip_interface: _, postgres } = node;
        tell!(out, section, Node, node, {
            name: "name", addresses: "address", peer_listen: "peer_listen", weight: "weight", voter: "voter",
            vip_interface: "vip_interface", postgres: "postgres",
        });
        // Key by key instead.
        out.pop();
        let section = format!("{section}.postgres");
        tell!(out, section, NodePostgres, postgres, {
            host: "host", port: "port", socket_dir: "socket_dir", data_dir: "data_dir", bin_dir: "bin_dir",
            start: "start", stop: "stop",
        });
    }
}

fn tell_dns(dns: &Dns, out: &mut Vec<(String, String)>) {
    tell!(out, "dns", Dns, dns, {
        mode: "mode", zone: "zone", servers: "servers", poll: "poll", ttl: "ttl", tsig: "tsig",
        update_command: "update_command", propagation: "propagation",
    });
    if let Some(tsig) = &dns.tsig {
        out.retain(|(key, _)| key != "dns.tsig");
        tell!(out, "dns", Tsig, tsig, {
            name: "tsig_name", algorithm: "tsig_algorithm", key_file: "tsig_key_file",
        });
    }
}

fn tell_pool(pool: &Pool, out: &mut Vec<(String, String)>) {
    tell!(out, "pool", Pool, pool, {
        mode: "mode", size: "size", reserve: "reserve", reserve_after: "reserve_after", idle_timeout: "idle_timeout",
        lifetime: "lifetime", max_clients: "max_clients", max_clients_per_user: "max_clients_per_user",
        max_clients_per_database: "max_clients_per_database", query_wait: "query_wait",
        login_timeout: "login_timeout", client_idle_timeout: "client_idle_timeout",
        idle_in_transaction_timeout: "idle_in_transaction_timeout", max_prepared: "max_prepared",
        client_address: "client_address", threads: "threads",
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("x")).expect("valid")
    }

    #[test]
    fn every_key_that_differs_is_named_and_no_other() {
        let text = Config::example();
        let old = parse(&text);
        assert!(old.changes(&old.clone()).is_empty());
        let (mut new, mut wanted) = (old.clone(), Vec::new());
        new.pool.size += 1;
        wanted.push("pool.size");
        new.pool.threads += 1;
        wanted.push("pool.threads");
        new.status_listen = None;
        new.reads_balance = !new.reads_balance;
        new.nodes[1].postgres.port = 1;
        new.nodes[0].weight = 9.0;
        wanted.extend(["node.midna.postgres.port", "node.alp.weight", "reads.balance"]);
        if old.status_listen.is_some() {
            wanted.push("status.listen");
        }
        if let Some(tsig) = new.dns.as_mut().and_then(|dns| dns.tsig.as_mut()) {
            tsig.name = "other".to_owned();
            wanted.push("dns.tsig_name");
        }
        new.auth.hba_file = "/other".into();
        wanted.push("auth.hba_file");
        new.warnings.push("nothing".to_owned());
        let mut found = old.changes(&new);
        found.sort();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
    }

    /// Each key of the sections that a reload applies, as a person changes it in the file.
    #[test]
    fn each_key_of_pool_and_auth_that_is_changed_in_the_file_is_named_alone() {
        let tls = "tls_cert_file = \"/c\"\ntls_key_file = \"/k\"";
        let cases = [
            ("pool.mode", "\"transaction\"", false),
            ("pool.threads", "3", false),
            ("pool.size", "7", true),
            ("pool.reserve", "2", true),
            ("pool.reserve_after", "\"2s\"", true),
            ("pool.idle_timeout", "\"2m\"", true),
            ("pool.lifetime", "\"2h\"", true),
            ("pool.max_clients", "77", true),
            ("pool.max_clients_per_user", "7", true),
            ("pool.max_clients_per_database", "7", true),
            ("pool.query_wait", "\"7s\"", true),
            ("pool.login_timeout", "\"7s\"", true),
            ("pool.client_idle_timeout", "\"7m\"", true),
            ("pool.idle_in_transaction_timeout", "\"7m\"", true),
            ("pool.max_prepared", "77", true),
            ("pool.client_address", "true", true),
            ("auth.hba_file", "\"/other\"", true),
            ("auth.tls_cert_file", "\"/other\"", true),
            ("auth.tls_key_file", "\"/other\"", true),
            ("auth.tls_ca_file", "\"/other\"", true),
        ];
        let whole = Config::example();
        // Without those two sections, whatever the example says in them.
        let mut kept = true;
        let lines = whole.lines().filter(|line| {
            if line.starts_with('[') {
                kept = !matches!(line.trim_end(), "[pool]" | "[auth]");
            }
            kept
        });
        let rest = lines.collect::<Vec<_>>().join("\n");
        let old = parse(&format!("{rest}\n[auth]\n{tls}\n"));
        for (path, value, live) in cases {
            let (section, key) = path.split_once('.').expect("a path");
            let line = format!("{key} = {value}\n");
            let others = tls.lines().filter(|tls| !tls.starts_with(&format!("{key} "))).collect::<Vec<_>>().join("\n");
            let new = match section {
                "pool" => parse(&format!("{rest}\n[auth]\n{tls}\n[pool]\n{line}")),
                _ => parse(&format!("{rest}\n[auth]\n{others}\n{line}")),
            };
            assert_eq!(old.changes(&new), [path]);
            assert_eq!(is_live(path), live, "{path}");
        }
    }

    #[test]
    fn a_section_that_came_or_went_is_named_as_one() {
        let old = parse(&Config::example());
        let new = Config { dns: None, ..old.clone() };
        assert_eq!(old.changes(&new), ["dns"]);
        assert_eq!(new.changes(&old), ["dns"]);
        let new = Config { nodes: old.nodes.iter().rev().cloned().collect(), ..old.clone() };
        assert_eq!(old.changes(&new), ["node"]);
    }

    #[test]
    fn what_a_reload_applies() {
        for key in ["auth.hba_file", "pool.size", "pool.query_wait", "notify.mail", "console.admins"] {
            assert!(is_live(key), "{key}");
        }
        for key in ["pool.mode", "pool.threads", "status.listen", "node.alp.address"] {
            assert!(!is_live(key), "{key}");
        }
    }
}
