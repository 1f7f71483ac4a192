//! `SHOW pool_status` (and the console's `PGPOOL SHOW`): the settings of this gate under the names of pgpool-II's
//! parameters, where there is an equal.
//!
//! What it is NOT: our own keys; `SHOW CONFIG` of the console has those. Everyone who may log in reads this, so no path
//! of a file and no word of a command is in it.

use crate::base::config::PoolMode;
use crate::serve::command::figures;
use crate::serve::listener::Proxy;

type Item = [String; 3];

/// Item, value, description.
pub(super) fn items(proxy: &Proxy) -> Vec<Item> {
    let mut out: Vec<Item> = Vec::new();
    let mut put = |item: &str, value: String, description: &str| {
        out.push([item.to_owned(), value, description.to_owned()]);
    };
    let (limits, snapshot) = (proxy.limits(), proxy.snapshots.borrow().clone());
    let on = |is: bool| if is { "on" } else { "off" }.to_owned();
    let listen = &proxy.options.listen;
    let hosts: Vec<String> = listen.iter().map(|address| address.ip().to_string()).collect();
    let port = listen.first().map_or(0, std::net::SocketAddr::port);
    put("backend_clustering_mode", "streaming_replication".to_owned(), "clustering mode");
    put("listen_addresses", hosts.join(","), "host name(s) or IP address(es) to listen on");
    put("port", port.to_string(), "portcullis accepting port number");
    put("num_init_children", limits.max_clients.to_string(), "clients at most (pool.max_clients); none is preforked");
    put("max_pool", limits.size.to_string(), "backends of each user and database at most (pool.size)");
    put("reserved_connections", "0".to_owned(), "one more client than there may be is refused at once");
    put("child_life_time", "0".to_owned(), "there are no children");
    put("client_idle_limit", limits.client_idle_timeout.as_secs().to_string(), "pool.client_idle_timeout, seconds");
    put("connection_life_time", limits.idle_timeout.as_secs().to_string(), "pool.idle_timeout, seconds");
    put("child_max_connections", "0".to_owned(), "there are no children");
    put("authentication_timeout", limits.login_timeout.as_secs().to_string(), "pool.login_timeout, seconds");
    put("connection_cache", "on".to_owned(), "backends are kept for the next client");
    let reset = match limits.mode {
        PoolMode::Session => "ROLLBACK; DISCARD ALL",
        PoolMode::Transaction => "",
    };
    put("reset_query_list", reset.to_owned(), "what a backend is tidied up by after a session");
    put("enable_pool_hba", "on".to_owned(), "auth.hba_file");
    put("pool_passwd", String::new(), "there is no password file: roles and secrets are PostgreSQL's own");
    put("ssl", on(proxy.options.rules.tls().is_some()), "TLS for clients (auth.tls_cert_file)");
    put("load_balance_mode", "off".to_owned(), "reads go to the active node (reads.balance)");
    put("statement_level_load_balance", "off".to_owned(), "no statement is read");
    put("memory_cache_enabled", "off".to_owned(), "there is no query cache");
    put("failover_on_backend_error", "off".to_owned(), "a failover is a person's decision");
    put("auto_failback", "on".to_owned(), "a standby that streams again is in service again");
    put("use_watchdog", "on".to_owned(), "the gate is held open by a lease");
    let vips: Vec<&str> = snapshot.vips.iter().map(|vip| vip.address.as_str()).collect();
    put("delegate_IP", vips.join(","), "the VIP (vip.address)");
    for node in &snapshot.nodes {
        let id = node.node_id;
        put(&format!("backend_hostname{id}"), node.hostname.clone(), &format!("backend #{id} hostname"));
        put(&format!("backend_port{id}"), node.port.to_string(), &format!("backend #{id} port number"));
        put(&format!("backend_weight{id}"), format!("{:.6}", node.weight), &format!("weight of backend #{id}"));
        let name = format!("backend #{id} application_name");
        put(&format!("backend_application_name{id}"), node.name.to_string(), &name);
        put(&format!("backend_status{id}"), node.status.clone(), &format!("status of backend #{id}"));
    }
    let clients: u32 = figures(proxy).iter().map(|pool| pool.clients).sum();
    put("clients", clients.to_string(), "clients now (portcullis)");
    put("version", snapshot.version.clone(), "of portcullis");
    out
}

/// One item's value.
pub(crate) fn item(proxy: &Proxy, name: &str) -> Option<String> {
    items(proxy).into_iter().find(|[item, ..]| item.eq_ignore_ascii_case(name)).map(|[_, value, _]| value)
}
