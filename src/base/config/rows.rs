//! Every key of a configuration with its value as text, for people who look at a daemon that runs.
//!
//! **Invariant:** no secret is in it: those stand in files, of which only the paths are shown; a password in
//! `replication.conninfo` is hidden, and of commands, whose words may be secrets too, only the program is named.

use super::{
    Auth, Cluster, Config, Console, Dns, DnsMode, Fence, FencePostgres, Node, NodePostgres, Notify, OnStandbyLoss,
    Passive, Pool, PoolMode, Postgres, Replication, ReplicationMode, Service, Tsig, Vip, Witness, is_live,
};
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigRow {
    /// Its full path: `fence.lease`, `node.alp.address`.
    pub key: String,
    pub value: String,
    /// A reload applies it.
    pub live: bool,
}

struct Rows(Vec<ConfigRow>);

impl Rows {
    fn put(&mut self, section: &str, key: &str, value: impl Display) {
        let key = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        let live = is_live(&key);
        self.0.push(ConfigRow { key, value: value.to_string(), live });
    }
    fn path(&mut self, section: &str, key: &str, value: Option<&Path>) {
        self.put(section, key, value.map(|path| path.display().to_string()).unwrap_or_default());
    }
    fn time(&mut self, section: &str, key: &str, value: Duration) {
        self.put(section, key, humantime::format_duration(value));
    }
    fn list<T: Display>(&mut self, section: &str, key: &str, values: &[T]) {
        self.put(section, key, values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    }
    /// The program alone: its words may be tokens of a provider.
    fn command(&mut self, section: &str, key: &str, words: &[String]) {
        let more = if words.len() > 1 { " ..." } else { "" };
        self.put(section, key, words.first().map(|program| format!("{program}{more}")).unwrap_or_default());
    }
}

/// `password=` and `sslpassword=` of a libpq string without what follows, as far as that reaches.
fn without_passwords(conninfo: &str) -> String {
    if conninfo.to_ascii_lowercase().contains("password") { "***".to_owned() } else { conninfo.to_owned() }
}

impl Config {
    /// Every key and its value, defaults too, in the order of the example.
    pub fn rows(&self) -> Vec<ConfigRow> {
        // A field that is forgotten here does not compile. `warnings` says nothing of its own.
        let Config {
            state_dir,
            runtime_dir,
            service: Service { name, listen, passive, units },
            nodes,
            cluster: Cluster { key_file },
            postgres: Postgres { admin_user },
            auth,
            dns,
            witness,
            vip,
            fence,
            replication,
            pool,
            reads_balance,
            status_listen,
            notify: Notify { command, mail, sendmail },
            console: Console { admins, stats },
            warnings: _,
        } = self;
        let mut out = Rows(Vec::new());
        out.path("", "state_dir", Some(state_dir));
        out.path("", "runtime_dir", Some(runtime_dir));
        out.put("service", "name", name);
        out.list("service", "listen", listen);
        let passive = match passive {
            Passive::Refuse => "refuse",
            Passive::Forward => "forward",
        };
        out.put("service", "passive", passive);
        out.list("service", "units", units);
        nodes.iter().for_each(|node| out.node(node));
        out.path("cluster", "key_file", Some(key_file));
        out.put("postgres", "admin_user", admin_user);
        out.auth(auth);
        if let Some(dns) = dns {
            out.dns(dns);
        }
        if let Some(Witness { listen, ns, active }) = witness {
            out.list("witness", "listen", listen);
            out.put("witness", "ns", ns);
            out.put("witness", "active", active);
        }
        if let Some(Vip { addresses, interface, witness }) = vip {
            out.list("vip", "address", addresses);
            out.put("vip", "interface", interface.as_deref().unwrap_or_default());
            out.list("vip", "witness", witness);
        }
        out.fence(fence);
        out.replication(replication);
        out.pool(pool);
        out.put("reads", "balance", reads_balance);
        out.put("status", "listen", status_listen.map(|listen| listen.to_string()).unwrap_or_default());
        out.command("notify", "command", command);
        out.list("notify", "mail", mail);
        out.path("notify", "sendmail", Some(sendmail));
        out.list("console", "admins", admins);
        out.list("console", "stats", stats);
        out.0
    }
}

impl Rows {
    fn node(&mut self, node: &Node) {
        let Node { name, addresses, peer_listen, weight, voter, vip_interface, postgres } = node;
        let NodePostgres { host, port, socket_dir, data_dir, bin_dir, start, stop } = postgres;
        let section = &format!("node.{name}");
        self.list(section, "address", addresses);
        self.put(section, "peer_listen", peer_listen);
        self.put(section, "weight", weight);
        self.put(section, "voter", voter);
        self.put(section, "vip_interface", vip_interface.as_deref().unwrap_or_default());
        let section = &format!("{section}.postgres");
        self.put(section, "host", host);
        self.put(section, "port", port);
        self.path(section, "socket_dir", Some(socket_dir));
        self.path(section, "data_dir", Some(data_dir));
        self.path(section, "bin_dir", Some(bin_dir));
        self.command(section, "start", start.as_deref().unwrap_or_default());
        self.command(section, "stop", stop.as_deref().unwrap_or_default());
    }

    fn auth(&mut self, auth: &Auth) {
        let Auth { hba_file, ident_file, tls_cert_file, tls_key_file, tls_ca_file, tls_crl_file, cache } = auth;
        self.path("auth", "hba_file", Some(hba_file));
        for (key, file) in [
            ("ident_file", ident_file),
            ("tls_cert_file", tls_cert_file),
            ("tls_key_file", tls_key_file),
            ("tls_ca_file", tls_ca_file),
            ("tls_crl_file", tls_crl_file),
        ] {
            self.path("auth", key, file.as_deref());
        }
        self.time("auth", "cache", *cache);
    }

    fn dns(&mut self, dns: &Dns) {
        let Dns { mode, zone, servers, poll, ttl, tsig, update_command, propagation } = dns;
        let mode = match mode {
            DnsMode::Update => "update",
            DnsMode::Observe => "observe",
        };
        self.put("dns", "mode", mode);
        self.put("dns", "zone", zone);
        self.list("dns", "servers", servers);
        self.time("dns", "poll", *poll);
        self.time("dns", "ttl", *ttl);
        if let Some(Tsig { name, algorithm, key_file }) = tsig {
            self.put("dns", "tsig_name", name);
            self.put("dns", "tsig_algorithm", algorithm);
            self.path("dns", "tsig_key_file", Some(key_file));
        }
        self.command("dns", "update_command", update_command);
        self.time("dns", "propagation", *propagation);
    }

    fn fence(&mut self, fence: &Fence) {
        let Fence { lease, max_drift, margin, postgres, kernel_gate, stonith } = fence;
        self.time("fence", "lease", *lease);
        self.put("fence", "max_drift", max_drift);
        self.time("fence", "margin", *margin);
        let postgres = match postgres {
            FencePostgres::Demote => "demote",
            FencePostgres::Stop => "stop",
            FencePostgres::Keep => "keep",
        };
        self.put("fence", "postgres", postgres);
        self.put("fence", "kernel_gate", kernel_gate);
        self.command("fence", "stonith", stonith);
    }

    fn replication(&mut self, replication: &Replication) {
        let Replication { mode, on_standby_loss, standby_timeout, user, password_file, conninfo, slots } = replication;
        let mode = match mode {
            ReplicationMode::Synchronous => "synchronous",
            ReplicationMode::Asynchronous => "asynchronous",
        };
        self.put("replication", "mode", mode);
        let loss = match on_standby_loss {
            OnStandbyLoss::Continue => "continue",
            OnStandbyLoss::Block => "block",
        };
        self.put("replication", "on_standby_loss", loss);
        self.time("replication", "standby_timeout", *standby_timeout);
        self.put("replication", "user", user);
        self.path("replication", "password_file", Some(password_file));
        self.put("replication", "conninfo", without_passwords(conninfo));
        self.put("replication", "slots", slots);
    }

    fn pool(&mut self, pool: &Pool) {
        let Pool {
            mode,
            size,
            reserve,
            reserve_after,
            idle_timeout,
            lifetime,
            max_clients,
            max_clients_per_user,
            max_clients_per_database,
            query_wait,
            login_timeout,
            client_idle_timeout,
            idle_in_transaction_timeout,
            max_prepared,
            client_address,
            threads,
        } = pool;
        let mode = match mode {
            PoolMode::Session => "session",
            PoolMode::Transaction => "transaction",
        };
        self.put("pool", "mode", mode);
        for (key, number) in [
            ("size", size),
            ("max_clients", max_clients),
            ("reserve", reserve),
            ("max_prepared", max_prepared),
            ("max_clients_per_user", max_clients_per_user),
            ("max_clients_per_database", max_clients_per_database),
            ("threads", threads),
        ] {
            self.put("pool", key, number);
        }
        for (key, time) in [
            ("query_wait", query_wait),
            ("reserve_after", reserve_after),
            ("idle_timeout", idle_timeout),
            ("lifetime", lifetime),
            ("login_timeout", login_timeout),
            ("client_idle_timeout", client_idle_timeout),
            ("idle_in_transaction_timeout", idle_in_transaction_timeout),
        ] {
            self.time("pool", key, *time);
        }
        self.put("pool", "client_address", client_address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_there_and_no_secret() {
        let text = format!(
            "{}\n[notify]\ncommand = [\"/bin/page\", \"t0ken\"]\n[console]\nadmins = [\"dba\"]\n",
            Config::example().replace("[notify]", "").replace("[console]", "")
        );
        let mut config = Config::parse(&text, Path::new("x")).expect("valid");
        config.replication.conninfo = "sslmode=require password=hunter2".to_owned();
        config.fence.stonith = vec!["/bin/off".to_owned(), "--password=hunter2".to_owned()];
        let rows = config.rows();
        let value = |key: &str| &rows.iter().find(|row| row.key == key).unwrap_or_else(|| panic!("{key}")).value;
        assert_eq!(value("fence.lease"), "5s");
        assert_eq!(value("node.alp.address"), "192.0.2.11");
        assert_eq!(value("notify.command"), "/bin/page ...");
        assert_eq!(value("console.admins"), "dba");
        assert_eq!(value("pool.mode"), "session");
        assert!(rows.iter().any(|row| row.key == "pool.size" && row.live));
        assert!(rows.iter().any(|row| row.key == "fence.lease" && !row.live));
        assert!(rows.iter().all(|row| !row.value.contains("hunter2") && !row.value.contains("t0ken")));
        // Every key that the example shows, commented out or not.
        let mut section = String::new();
        for line in Config::example().lines() {
            let line = line.trim_start_matches("# ");
            if line.starts_with('[') {
                section = line.trim_matches(|c| matches!(c, '[' | ']')).to_owned();
            }
            let Some((key, _)) = line.split_once(" = ") else { continue };
            if section.starts_with("node") || ["witness", "vip"].contains(&&*section) || key.contains(' ') {
                continue;
            }
            let path = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
            assert!(rows.iter().any(|row| row.key == path), "{path}");
        }
    }
}
