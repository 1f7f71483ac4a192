//! The commented configuration: what `init` writes, what the package installs as an example, and what a test parses.
//!
//! **Invariant:** a rendered [`Template`] of valid answers parses; what is commented out shows the default.

use std::fmt::Write as _;

/// The answers that fill the example. All are written into TOML text quoted and escaped.
#[derive(Debug, Clone)]
pub struct Template {
    pub service_name: String,
    pub zone: String,
    /// `address:port` of the DNS servers; empty: found from the zone.
    pub servers: Vec<String>,
    pub nodes: Vec<ExampleNode>,
    pub data_dir: String,
    pub bin_dir: String,
    /// `None`: 5432.
    pub port: Option<u16>,
    /// `None`: Debian's.
    pub socket_dir: Option<String>,
    /// Where `cluster.key`, `tsig.key` and `replication.pass` stand.
    pub secrets_dir: String,
    /// `address/mask`; `None`: the section is commented out.
    pub vip: Option<String>,
    /// `None`: the card with the VIP's subnet.
    pub vip_interface: Option<String>,
    /// Add the section that `portcullis witness` reads.
    pub witness: bool,
    /// `false`: a service with a VIP alone.
    pub dns: bool,
}

/// One `[[node]]`.
#[derive(Debug, Clone)]
pub struct ExampleNode {
    pub name: String,
    /// One IPv4 address, one IPv6 address, or one of each.
    pub addresses: Vec<String>,
}

impl Default for Template {
    fn default() -> Template {
        let node = |name: &str, address: &str| ExampleNode { name: name.into(), addresses: vec![address.into()] };
        Template {
            service_name: "db.example.org".into(),
            zone: "example.org".into(),
            servers: vec!["192.0.2.53:53".into()],
            nodes: vec![node("alp", "192.0.2.11"), node("midna", "192.0.2.12")],
            data_dir: "/var/lib/postgresql/15/main".into(),
            bin_dir: "/usr/lib/postgresql/15/bin".into(),
            port: None,
            socket_dir: None,
            secrets_dir: "/etc/portcullis".into(),
            vip: None,
            vip_interface: None,
            witness: false,
            dns: true,
        }
    }
}

fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn quote_list(list: &[String]) -> String {
    format!("[{}]", list.iter().map(|text| quote(text)).collect::<Vec<_>>().join(", "))
}

/// Every line that is not a comment yet becomes one.
fn commented(text: &str) -> String {
    let line =
        |line: &str| if line.is_empty() || line.starts_with('#') { line.to_owned() } else { format!("# {line}") };
    text.lines().map(|text| line(text) + "\n").collect()
}

impl Template {
    /// The whole file.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(8192);
        let file = |name: &str| quote(&format!("{}/{name}", self.secrets_dir.trim_end_matches('/')));
        out.push_str(HEAD);
        out.push_str(&SERVICE.replace("@NAME@", &quote(&self.service_name)));
        for (index, node) in self.nodes.iter().enumerate() {
            out.push_str(&self.node(index, node));
        }
        out.push_str(&CLUSTER.replace("@KEY@", &file("cluster.key")));
        let dns = if self.dns { DNS.to_owned() } else { commented(DNS) };
        out.push_str(
            &dns.replace("@ZONE@", &quote(&self.zone))
                .replace("@SERVERS@", &quote_list(&self.servers))
                .replace("@TSIG@", &file("tsig.key")),
        );
        out.push_str(&self.witness());
        out.push_str(&self.vip());
        out.push_str(&REST.replace("@PASSWORD@", &file("replication.pass")));
        out
    }

    fn node(&self, index: usize, node: &ExampleNode) -> String {
        let address = match node.addresses.as_slice() {
            [one] => quote(one),
            list => quote_list(list),
        };
        let first = node.addresses.first().map(String::as_str).unwrap_or_default();
        let bracketed = if first.contains(':') { format!("[{first}]") } else { first.to_owned() };
        let text = if index == 0 { NODE_FIRST } else { NODE_NEXT };
        let port = self.port.map_or_else(|| "# port = 5432".to_owned(), |port| format!("port = {port}"));
        let sockets = match &self.socket_dir {
            Some(dir) => format!("socket_dir = {}", quote(dir)),
            None => "# socket_dir = \"/var/run/postgresql\"".to_owned(),
        };
        text.replace("@NAME@", &quote(&node.name))
            .replace("@PORT@", &port)
            .replace("@SOCKETS@", &sockets)
            .replace("@ADDRESS@", &address)
            .replace("@HOST@", first)
            .replace("@PEER@", &format!("{bracketed}:6433"))
            .replace("@DATA@", &quote(&self.data_dir))
            .replace("@BIN@", &quote(&self.bin_dir))
    }

    fn witness(&self) -> String {
        let mark = if self.witness { "" } else { "# " };
        let listen = if self.servers.is_empty() { vec!["0.0.0.0:53".to_owned()] } else { self.servers.clone() };
        let active = self.nodes.first().map(|node| node.name.as_str()).unwrap_or_default();
        let mut out = String::from(WITNESS);
        let _ = writeln!(out, "{mark}[witness]");
        let _ = writeln!(out, "{mark}listen = {}", quote_list(&listen));
        let _ = writeln!(
            out,
            "{mark}ns = {}          # the zone's NS and SOA primary",
            quote(&format!("ns.{}", self.zone))
        );
        let _ = writeln!(
            out,
            "{mark}active = {}      # the first record, written once when the store is empty",
            quote(active)
        );
        out
    }

    fn vip(&self) -> String {
        let mark = if self.vip.is_some() { "" } else { "# " };
        let address = self.vip.as_deref().unwrap_or("192.0.2.100/24");
        let mut out = String::from(VIP);
        let _ = writeln!(out, "{mark}[vip]");
        let _ = writeln!(out, "{mark}address = {}    # several: a list", quote(address));
        let interface = match &self.vip_interface {
            Some(name) => format!("interface = {}", quote(name)),
            None => "# interface = \"eth0\"".to_owned(),
        };
        let _ = writeln!(out, "{interface:<35}# default: the one with the address's subnet");
        out.push_str(
            "# witness = []                     # without [dns]: who answers ARP or NDP; default: the gateway\n",
        );
        out
    }
}

const HEAD: &str = r#"# Portcullis: who may serve PostgreSQL, and when to stop.
#
# The same file serves both nodes. Lines that are commented out show the default.
# Prove it with: portcullis check-config FILE

# state_dir   = "/var/lib/portcullis"    # what must survive a restart: the journal
# runtime_dir = "/run/portcullis"        # the control socket
"#;

const SERVICE: &str = r#"
[service]
name = @NAME@                # the DNS name clients use
# listen = ["0.0.0.0:6432", "[::]:6432"]   # where clients connect, on the VIP too when there is one
# passive = "refuse"         # what a passive node does with clients: "refuse" | "forward" (to the active one's gate)
# units = []                 # systemd units to start when the gate opened and to stop when it is cut
"#;

const NODE_FIRST: &str = r#"
# One section for each server.
[[node]]
name = @NAME@                # a-z 0-9 - _; also the standby's application_name
address = @ADDRESS@          # published in DNS while this node is active; a list for IPv4 and IPv6
# peer_listen = "@PEER@"     # the channel between the two daemons (TLS)
# weight = 1.0               # its share, as monitoring shows it
# voter = true               # exactly two voters; default: the first two nodes
# vip_interface = "ens18"    # where this node's differs from [vip] interface
[node.postgres]
# host = "@HOST@"            # as the other node reaches it
@PORT@
@SOCKETS@       # as this node's own daemon reaches it
data_dir = @DATA@
bin_dir = @BIN@
# start = ["/usr/bin/..."]   # default: the unit that owns data_dir, else pg_ctl
# stop = ["/usr/bin/..."]
"#;

const NODE_NEXT: &str = r#"
[[node]]
name = @NAME@
address = @ADDRESS@
# peer_listen = "@PEER@"
[node.postgres]
# host = "@HOST@"
@PORT@
@SOCKETS@
data_dir = @DATA@
bin_dir = @BIN@
"#;

const CLUSTER: &str = r#"
[cluster]
key_file = @KEY@    # the one shared secret: base64 of 32 bytes, the same on both nodes

# [postgres]
# admin_user = "postgres"    # superuser, reached through each node's own socket_dir

# [auth]
# hba_file = "/etc/portcullis/hba.conf"    # who may log in at the gate, without it: scram-sha-256 for all
# ident_file = ""            # pg_ident.conf's syntax, for map= in hba_file; empty: pg_ident.conf beside it
# cache = "0s"               # how long a role's secret is remembered, an old one accepted; "0s": asked at each login
# tls_cert_file = ""         # TLS for clients; empty: none
# tls_key_file = ""
# tls_ca_file = ""           # certificates of clients must be of a CA in here; empty: none are asked for
# tls_crl_file = ""          # revocation lists (PEM), one of each CA; empty: none is looked at
"#;

const DNS: &str = r#"
# The witness: the authoritative DNS server of the service name. It should stand with neither node.
[dns]
# mode = "update"            # "update" (RFC 2136, signed) | "observe" (a person edits the record)
zone = @ZONE@
servers = @SERVERS@          # empty: found from the zone's SOA and NS; in update mode the first takes the updates
# poll = "1s"                # how often the record is asked for
# ttl = "5s"                 # of the record: how long clients may hold the old address
# tsig_name = "portcullis"
# tsig_algorithm = "hmac-sha256"
tsig_key_file = @TSIG@    # base64; make one with: tsig-keygen -a hmac-sha256 portcullis
# propagation = "0s"         # observe mode: how long a provider may still give some askers the old answer
"#;

const WITNESS: &str = r#"
# Only for `portcullis witness`, the embedded DNS server, on a third machine. Zone, name, ttl and key are those of [dns]
# and [service].
"#;

const VIP: &str = r#"
# A virtual address that goes with the lease, where both nodes share a network.
"#;

const REST: &str = r#"
[fence]
# lease = "5s"               # how long one proof lasts; at least twice dns.poll, at least 3s with a VIP
# max_drift = 0.01           # how much faster one clock may run than the other; at most 0.1
# margin = "500ms"           # slack of a take-over; at least 100ms
# postgres = "demote"        # PostgreSQL of a fenced node: "demote" (read-only standby of nobody) | "stop" | "keep"
# kernel_gate = false        # a second wall: an nftables set with the lease as its timeout
# stonith = []               # a command; {node} is replaced; exit code 0 means "surely off"

[replication]
# mode = "synchronous"       # "synchronous" | "asynchronous"
# on_standby_loss = "continue"             # "continue" (after recording it) | "block"
# standby_timeout = "3s"     # silence of the standby after which on_standby_loss applies; commits wait that long
# user = "replicator"        # made by the active node when it is missing
password_file = @PASSWORD@    # the password alone
# conninfo = ""              # further libpq words: "sslmode=verify-full sslrootcert=..."
# slots = true               # one physical slot for each standby

[pool]
# mode = "session"           # a client has a backend "session": for all its life | "transaction": while it is in one
# size = 40                  # backend connections per (user, database)
# max_clients = 10000
# query_wait = "30s"         # how long a client waits for a backend, or while paused
# reserve = 0                # backends beyond size for a client that has waited for reserve_after
# reserve_after = "5s"
# idle_timeout = "10m"       # an idle backend is closed after this; "0s": never
# lifetime = "1h"            # a backend older than this is closed instead of lent again; "0s": no limit
# max_prepared = 200         # prepared statements kept in one backend (transaction mode)
# max_clients_per_user = 0   # 0: no limit but max_clients
# max_clients_per_database = 0
# login_timeout = "60s"      # time a client has for its login
# client_idle_timeout = "0s" # a client that asks nothing for so long is closed; "0s": never
# idle_in_transaction_timeout = "0s"
# client_address = false     # add the client's address to application_name, for PostgreSQL's log and pg_stat_activity
# threads = 0                # threads that move data; 0: half the cores, at least 1, at most 4

[status]
# listen = "127.0.0.1:6434"  # read-only HTTP: status page, /status.json, /metrics, /active

[notify]
# command = []               # run for every event worth waking someone for; the event as JSON on standard input
# mail = []                  # the same as a mail: ["dba@example.org"]
# sendmail = "/usr/sbin/sendmail"          # the program that takes it

# The admin console: `psql -d portcullis` at the gate of the active node, with the same login as for any database.
[console]
# admins = []                # roles that may look and command there; postgres.admin_user always may
# stats = []                 # roles that may only look
"#;
