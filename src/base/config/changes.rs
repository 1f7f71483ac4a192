//! Which keys differ between two configurations: what a reload applies, and what it names as in need of a restart.
//!
//! What it is NOT: it reads no file and knows no daemon; which keys a reload can apply it says once, in [`is_live`].

use super::{
    Auth, Cluster, Config, Console, Dns, Fence, Node, NodePostgres, Notify, Pool, Postgres, Replication, Service, Tsig,
    Vip, Witness,
};

/// Notes the keys of one section that differ. A field that is forgotten here does not compile.
macro_rules! compare {
    ($out:expr, $section:expr, $type:ident, $old:expr, $new:expr, { $($field:ident: $key:literal),* $(,)? }) => {{
        let (old, new): (&$type, &$type) = ($old, $new);
        let $type { $($field: _),* } = old;
        $(if old.$field != new.$field {
            $out.push(format!("{}.{}", $section, $key));
        })*
    }};
}

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
        let mut out = Vec::new();
        let old = self;
        // `warnings` says nothing of its own.
        for (key, differs) in [
            ("state_dir", old.state_dir != new.state_dir),
            ("runtime_dir", old.runtime_dir != new.runtime_dir),
            ("reads.balance", old.reads_balance != new.reads_balance),
            ("status.listen", old.status_listen != new.status_listen),
        ] {
            if differs {
                out.push(key.to_owned());
            }
        }
        compare!(out, "service", Service, &old.service, &new.service, {
            name: "name", listen: "listen", passive: "passive", units: "units",
        });
        nodes(&old.nodes, &new.nodes, &mut out);
        compare!(out, "cluster", Cluster, &old.cluster, &new.cluster, { key_file: "key_file" });
        compare!(out, "postgres", Postgres, &old.postgres, &new.postgres, { admin_user: "admin_user" });
        compare!(out, "auth", Auth, &old.auth, &new.auth, {
            hba_file: "hba_file", ident_file: "ident_file", tls_cert_file: "tls_cert_file",
            tls_key_file: "tls_key_file", tls_ca_file: "tls_ca_file", tls_crl_file: "tls_crl_file", cache: "cache",
        });
        match (&old.dns, &new.dns) {
            (Some(old), Some(new)) => dns(old, new, &mut out),
            (None, None) => {}
            _ => out.push("dns".to_owned()),
        }
        match (&old.witness, &new.witness) {
            (Some(old), Some(new)) => {
                compare!(out, "witness", Witness, old, new, { listen: "listen", ns: "ns", active: "active" });
            }
            (None, None) => {}
            _ => out.push("witness".to_owned()),
        }
        match (&old.vip, &new.vip) {
            (Some(old), Some(new)) => {
                compare!(out, "vip", Vip, old, new, {
                    addresses: "address", interface: "interface", witness: "witness",
                });
            }
            (None, None) => {}
            _ => out.push("vip".to_owned()),
        }
        compare!(out, "fence", Fence, &old.fence, &new.fence, {
            lease: "lease", max_drift: "max_drift", margin: "margin", postgres: "postgres",
            kernel_gate: "kernel_gate", stonith: "stonith",
        });
        compare!(out, "replication", Replication, &old.replication, &new.replication, {
            mode: "mode", on_standby_loss: "on_standby_loss", standby_timeout: "standby_timeout", user: "user",
            password_file: "password_file", conninfo: "conninfo", slots: "slots",
        });
        pool(&old.pool, &new.pool, &mut out);
        compare!(out, "notify", Notify, &old.notify, &new.notify, {
            command: "command", mail: "mail", sendmail: "sendmail",
        });
        compare!(out, "console", Console, &old.console, &new.console, { admins: "admins", stats: "stats" });
        out
    }
}

fn nodes(old: &[Node], new: &[Node], out: &mut Vec<String>) {
    let names = |nodes: &[Node]| nodes.iter().map(|node| node.name.clone()).collect::<Vec<_>>();
    if names(old) != names(new) {
        return out.push("node".to_owned());
    }
    for (old, new) in old.iter().zip(new) {
        let section = format!("node.{}", old.name);
        compare!(out, section, Node, old, new, {
            name: "name", addresses: "address", peer_listen: "peer_listen", weight: "weight", voter: "voter",
            vip_interface: "vip_interface", postgres: "postgres",
        });
        if out.last().is_some_and(|last| *last == format!("{section}.postgres")) {
            out.pop();
        }
        let section = format!("{section}.postgres");
        compare!(out, section, NodePostgres, &old.postgres, &new.postgres, {
            host: "host", port: "port", socket_dir: "socket_dir", data_dir: "data_dir", bin_dir: "bin_dir",
            start: "start", stop: "stop",
        });
    }
}

fn dns(old: &Dns, new: &Dns, out: &mut Vec<String>) {
    compare!(out, "dns", Dns, old, new, {
        mode: "mode", zone: "zone", servers: "servers", poll: "poll", ttl: "ttl", tsig: "tsig",
        update_command: "update_command", propagation: "propagation",
    });
    if let (Some(old), Some(new)) = (&old.tsig, &new.tsig) {
        out.retain(|key| key != "dns.tsig");
        compare!(out, "dns", Tsig, old, new, {
            name: "tsig_name", algorithm: "tsig_algorithm", key_file: "tsig_key_file",
        });
    }
}

fn pool(old: &Pool, new: &Pool, out: &mut Vec<String>) {
    compare!(out, "pool", Pool, old, new, {
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
