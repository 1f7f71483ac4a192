//! Writes what an administrator would: one configuration file per node (they differ in `state_dir` and `runtime_dir`
//! only, because both daemons share this machine's disk), the client rules and the secrets.

use super::net::{address_of, at};
use super::postgres::{REPLICATION_PASSWORD, Template};
use super::sys::Outcome;
use super::witness::{Kind, SERVICE, ZONE};
use std::fs;
use std::path::Path;

/// Last numbers of the addresses of the DNS server, its secondary and the fault relay.
pub const DNS: u8 = 53;
pub const SECONDARY: u8 = 54;
pub const RELAY: u8 = 55;
/// Of the third node, which is called c and has no vote.
pub const THIRD: u8 = 13;

/// What varies from lab to lab.
#[derive(Debug, Clone)]
pub struct Options {
    /// Part of the lab's folder name.
    pub name: &'static str,
    /// Names of the two nodes; the first starts as the primary.
    pub nodes: [&'static str; 2],
    pub witness: Kind,
    pub vip: bool,
    /// Addresses of IPv6 only.
    pub ipv6: bool,
    /// The daemons ask the DNS fault relay instead of the server itself.
    pub relay: bool,
    /// A second authority: a BIND secondary that fetches the zone when it starts and then only once an hour.
    pub secondary: bool,
    pub lease: &'static str,
    pub poll: &'static str,
    pub margin: &'static str,
    pub mode: &'static str,
    /// Further lines of `[dns]`; `None`: no such section, a service with a VIP alone.
    pub dns: Option<&'static str>,
    /// Further lines of `[vip]` and `[fence]`; `{dir}` is the lab's folder.
    pub vip_lines: &'static str,
    pub fence: &'static str,
    /// Further lines for the end of the file (whole tables).
    pub extra: &'static str,
    /// The embedded witness runs on a wall clock of its own, which a test can step.
    pub stepped_clock: bool,
    /// Further lines of `[service]`.
    pub service: &'static str,
    /// The first node runs systemd as its PID 1 (see [`super::host::Boot`]).
    pub systemd: bool,
    /// There is a third node without a vote; nothing runs on it at first.
    pub third: bool,
}

impl Options {
    /// The pair of issue 2: BIND as witness, lease 3 s, poll 1 s, margin 200 ms, synchronous, no VIP.
    pub fn new(name: &'static str) -> Options {
        Options {
            name,
            nodes: ["a", "b"],
            witness: Kind::Bind,
            vip: false,
            ipv6: false,
            relay: false,
            secondary: false,
            lease: "3s",
            poll: "1s",
            margin: "200ms",
            mode: "synchronous",
            dns: Some(""),
            vip_lines: "",
            fence: "",
            extra: "",
            service: "",
            stepped_clock: false,
            systemd: false,
            third: false,
        }
    }

    /// The same with `dns.mode = "observe"`: a person edits the record.
    pub fn observed(name: &'static str) -> Options {
        Options { dns: Some("mode = \"observe\"\n"), ..Options::new(name) }
    }

    /// The same on a network without IPv4.
    pub fn ipv6_only(name: &'static str) -> Options {
        Options { ipv6: true, ..Options::new(name) }
    }

    pub fn with_vip(name: &'static str) -> Options {
        Options { vip: true, ..Options::new(name) }
    }

    /// A VIP and no DNS (R3); the DNS host, which is no node, is the ARP witness. Its DNS server runs all the same.
    pub fn vip_only(name: &'static str) -> Options {
        Options { dns: None, vip_lines: "witness = [\"192.0.2.53\"]\n", ..Options::with_vip(name) }
    }
}

/// Random keys of a lab, in base64.
#[derive(Clone)]
pub struct Keys {
    pub cluster: String,
    pub tsig: String,
}

impl Keys {
    pub fn new() -> Outcome<Keys> {
        Ok(Keys { cluster: random_key()?, tsig: random_key()? })
    }
}

fn random_key() -> Outcome<String> {
    let mut bytes = [0u8; 32];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(data_encoding::BASE64.encode(&bytes))
}

/// Writes the secret files and the client rules into the lab's folder, owned by the daemon's user.
pub fn write_secrets(lab_dir: &Path, keys: &Keys) -> Outcome {
    let template = Template::once()?;
    template.write_secret(&lab_dir.join("cluster.key"), &format!("{}\n", keys.cluster))?;
    template.write_secret(&lab_dir.join("tsig.key"), &format!("{}\n", keys.tsig))?;
    template.write_secret(&lab_dir.join("replication.pass"), &format!("{REPLICATION_PASSWORD}\n"))?;
    fs::write(lab_dir.join("hba.conf"), "host all all all scram-sha-256\n")?;
    Ok(())
}

/// The text of the configuration file as the node `own` (an index, 2 for the witness host, 3 for the third node) reads
/// it.
pub fn text(options: &Options, lab_dir: &Path, own: usize) -> Outcome<String> {
    let bin_dir = Template::once()?.bin_dir.display().to_string();
    let dir = lab_dir.display();
    let own_dir = options.nodes.get(own).copied().unwrap_or(if own == 3 { "c" } else { "witness" });
    let any = if options.ipv6 { "[::]" } else { "0.0.0.0" };
    let dns_door = at(&address_of(options.ipv6, DNS), 53);
    let first = if options.relay { at(&address_of(options.ipv6, RELAY), 53) } else { dns_door.clone() };
    let second = options.secondary.then(|| at(&address_of(options.ipv6, SECONDARY), 53));
    let servers: Vec<String> = [Some(first), second].into_iter().flatten().map(|at| format!("\"{at}\"")).collect();
    let servers = servers.join(", ");
    let Options { lease, poll, margin, mode, vip_lines, service, .. } = options;
    let fence = options.fence.replace("{dir}", &dir.to_string());
    let mut text = format!(
        "state_dir   = \"{dir}/{own_dir}/state\"\nruntime_dir = \"{dir}/{own_dir}/run\"\n\n\
         [service]\nname   = \"{SERVICE}\"\nlisten = [\"{any}:6432\"]\n{service}\n"
    );
    let third = options.third.then_some("c");
    for (name, last) in options.nodes.iter().chain(&third).zip([11, 12, THIRD]) {
        let address = address_of(options.ipv6, last);
        text.push_str(&format!(
            "[[node]]\nname = \"{name}\"\naddress = \"{address}\"\n[node.postgres]\nhost = \"{address}\"\n\
             port = 5432\nsocket_dir = \"{dir}/{name}/sock\"\ndata_dir = \"{dir}/{name}/pg/data\"\n\
             bin_dir = \"{bin_dir}\"\n\n"
        ));
    }
    text.push_str(&format!("[cluster]\nkey_file = \"{dir}/cluster.key\"\n\n[auth]\nhba_file = \"{dir}/hba.conf\"\n\n"));
    if let Some(dns) = options.dns {
        text.push_str(&format!(
            "[dns]\nzone = \"{ZONE}\"\nservers = [{servers}]\npoll = \"{poll}\"\nttl = \"5s\"\n\
             tsig_key_file = \"{dir}/tsig.key\"\n{dns}\n"
        ));
    }
    if options.witness == Kind::Embedded {
        let first = options.nodes[0];
        text.push_str(&format!("[witness]\nlisten = [\"{dns_door}\"]\nns = \"ns.{ZONE}\"\nactive = \"{first}\"\n\n"));
    }
    if options.vip {
        let address = if vip_lines.contains("address =") { "" } else { "address = \"192.0.2.100/24\"\n" };
        text.push_str(&format!("[vip]\n{address}interface = \"eth0\"\n{vip_lines}\n"));
    }
    text.push_str(&format!(
        "[fence]\nlease = \"{lease}\"\nmargin = \"{margin}\"\n{fence}\n\
         [replication]\nmode = \"{mode}\"\npassword_file = \"{dir}/replication.pass\"\n\n\
         [status]\nlisten = \"{any}:6434\"\n\n[console]\nadmins = [\"app\"]\n\n{}",
        options.extra
    ));
    Ok(text)
}
