//! This machine: clock source, caches of names, the daemon's process, the VIP's interface and link, units at boot,
//! programs of the configuration.

use super::gather::Facts;
use super::{Level, Report};
use crate::base::config::{Config, Node};
use crate::base::time::Duration;
use crate::io::machine::{self, Caches, ProcessFacts, VipFacts};
use crate::io::outside;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolverOpts;
use hickory_resolver::proto::rr::RecordType;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const RESOLVER_LIMIT: Duration = Duration::from_secs(3);
const UNIT: &str = "portcullis.service";
/// Descriptors beside clients and their backends.
const SPARE_DESCRIPTORS: u64 = 256;
/// Sources that stand still or jump when the machine is busy, or that are read slowly.
const POOR_SOURCES: [&str; 4] = ["jiffies", "refined-jiffies", "acpi_pm", "pit"];
/// Longer than this a Java program keeps an address of a name.
const JAVA_TTL: i64 = 30;

/// What was seen of it.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    pub clock_source: Option<String>,
    pub caches: Caches,
    /// TTL that this machine's own resolver gives for the service name; `None`: not asked, or no answer.
    pub resolver_ttl: Option<u32>,
    /// Bytes free where the data directory is.
    pub free: Option<u64>,
    /// The daemon's; `None`: no daemon, or it is hidden from this user.
    pub daemon: Option<ProcessFacts>,
    pub vips: Vec<VipFacts>,
    /// This process may send ARP.
    pub may_ask: bool,
    /// Of `portcullis.service`; `None`: no systemd here.
    pub at_boot: Option<Result<String, String>>,
    /// Key and path of programs that cannot be run.
    pub programs: Vec<(&'static str, String)>,
}

/// Looks; nothing of it takes longer than a few seconds.
pub async fn gather(config: &Config, node: &Node) -> HostFacts {
    let daemon = async {
        let socket = config.runtime_dir.join("control.sock");
        let pid = tokio::time::timeout(RESOLVER_LIMIT, machine::listener_of(&socket));
        pid.await.ok().flatten().and_then(machine::process)
    };
    let vips = async {
        // A node without a vote never has the VIP.
        let Some(vip) = config.vip.as_ref().filter(|_| node.voter) else { return Vec::new() };
        let interface = node.vip_interface.as_deref().or(vip.interface.as_deref());
        futures_util::future::join_all(vip.addresses.iter().map(|net| machine::vip(net, interface, &vip.witness))).await
    };
    let at_boot = async {
        match outside::has_systemd() {
            true => Some(machine::unit_at_boot(UNIT).await),
            false => None,
        }
    };
    let (daemon, vips, at_boot, resolver_ttl) = tokio::join!(daemon, vips, at_boot, resolver_ttl(config, node));
    HostFacts {
        clock_source: machine::clock_source(),
        caches: machine::caches(),
        resolver_ttl,
        free: machine::free_bytes(&node.postgres.data_dir),
        daemon,
        vips,
        may_ask: machine::may_ask_neighbours(),
        at_boot,
        programs: programs(config),
    }
}

async fn resolver_ttl(config: &Config, node: &Node) -> Option<u32> {
    config.dns.as_ref()?;
    let mut options = ResolverOpts::default();
    options.cache_size = 0;
    let resolver = TokioResolver::builder_tokio().ok()?.with_options(options).build().ok()?;
    let kind = match node.addresses.first()?.is_ipv4() {
        true => RecordType::A,
        false => RecordType::AAAA,
    };
    let name = format!("{}.", config.service.name);
    let answer = tokio::time::timeout(RESOLVER_LIMIT, resolver.lookup(name, kind)).await.ok()?.ok()?;
    answer.answers().iter().map(|record| record.ttl).max()
}

fn programs(config: &Config) -> Vec<(&'static str, String)> {
    let sendmail = (!config.notify.mail.is_empty()).then(|| config.notify.sendmail.display().to_string());
    let all = [
        ("notify.command", config.notify.command.first().cloned()),
        ("notify.sendmail", sendmail),
        ("dns.update_command", config.dns.as_ref().and_then(|dns| dns.update_command.first().cloned())),
    ];
    let missing = |path: &String| {
        // A name alone is looked for in the search path of every child.
        let places: Vec<String> = match path.contains('/') {
            true => vec![path.clone()],
            false => ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
                .map(|folder| format!("{folder}/{path}"))
                .to_vec(),
        };
        !places.iter().any(|place| {
            std::fs::metadata(Path::new(place))
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
    };
    all.into_iter().filter_map(|(key, path)| Some((key, path.filter(missing)?))).collect()
}

pub(super) fn check(config: &Config, node: &Node, facts: &Facts, report: &mut Report) {
    let host = &facts.host;
    process(config, host, report);
    vips(config, node, host, report);
    boot(host, report);
    clock(host, report);
    report.checked("programs that the configuration names");
    for (key, path) in &host.programs {
        let text = format!("{path} of {key} cannot be run");
        report.find(Level::Warning, "program.missing", text, "install it (mode 0755), or take the key out");
    }
}

fn process(config: &Config, host: &HostFacts, report: &mut Report) {
    let Some(daemon) = &host.daemon else {
        return report.unchecked("the daemon's capabilities and limits", "it does not run, or hides from this user");
    };
    report.checked("the daemon's capabilities and limits");
    let needs = [
        (config.vip.is_some() || config.fence.kernel_gate, daemon.net_admin, "CAP_NET_ADMIN"),
        (config.vip.is_some(), daemon.net_raw, "CAP_NET_RAW"),
    ];
    let lacking: Vec<&str> = needs.iter().filter(|(needed, has, _)| *needed && !has).map(|(.., name)| *name).collect();
    if !lacking.is_empty() {
        let text = format!("the daemon runs without {}: the VIP or the kernel gate cannot be set", lacking.join(", "));
        let remedy = "run it by its packaged unit, or start it as root; in a unit of your own:\n\
                      AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW";
        report.find(Level::Critical, "daemon.rights", text, remedy);
    }
    // A client and, in the worst case, its backend.
    let wanted = u64::from(config.pool.max_clients) + SPARE_DESCRIPTORS;
    if let Some(limit) = daemon.descriptors.filter(|limit| *limit < wanted) {
        let text = format!("the daemon may have {limit} descriptors, pool.max_clients needs {wanted}");
        let remedy = format!(
            "lower pool.max_clients, or `systemctl edit {UNIT}`:\n[Service]\nLimitNOFILE={}",
            wanted.next_power_of_two().saturating_mul(2)
        );
        report.find(Level::Warning, "daemon.descriptors", text, remedy);
    }
}

fn vips(config: &Config, node: &Node, host: &HostFacts, report: &mut Report) {
    let solo = config.dns.is_none();
    for vip in &host.vips {
        let net = vip.net;
        let interface = match &vip.interface {
            Ok(name) => name,
            Err(why) => {
                let remedy = "correct vip.interface, or vip_interface of this [[node]]";
                report.find(Level::Critical, "vip.interface", format!("{}: {why}", node.name), remedy);
                report.unchecked(format!("the link of the VIP {net}"), "its interface is not known");
                continue;
            }
        };
        report.checked(format!("the interface and the link of the VIP {net}"));
        if !vip.up {
            let text = format!("{interface}, which the VIP {net} belongs on, is down or has no carrier");
            report.find(Level::Critical, "vip.link", text, format!("ip link set {interface} up; look at the cable"));
        } else if vip.own_address.is_none() {
            let text = format!("{interface} has no other address in the VIP's subnet {}", net.trunc());
            let remedy = "correct the mask of vip.address, or vip.interface; clients beyond a router need a route back";
            report.find(Level::Warning, "vip.subnet", text, remedy);
        }
        match &vip.witnesses {
            Err(why) if why.contains("gateway") || why.contains("names nobody") => {
                let level = if solo { Level::Critical } else { Level::Advice };
                report.find(
                    level,
                    "vip.witness",
                    why.clone(),
                    "set vip.witness to addresses of that link that are always there",
                );
            }
            Err(_) if !host.may_ask => {
                report.unchecked("ARP on the VIP's link", "this needs CAP_NET_RAW; run doctor as root");
            }
            Err(why) => report.unchecked("ARP on the VIP's link", why.clone()),
            Ok(all) => {
                report.checked("ARP on the VIP's link");
                let silent: Vec<String> =
                    all.iter().filter(|(_, answers)| !answers).map(|(ip, _)| ip.to_string()).collect();
                if !silent.is_empty() {
                    let all_silent = silent.len() == all.len();
                    let level = if solo && all_silent { Level::Critical } else { Level::Warning };
                    let text = format!("{} did not answer ARP or NDP on {interface}", silent.join(", "));
                    let remedy = "look at the cable, the VLAN and the switch's port; correct vip.witness";
                    report.find(level, "vip.arp", text, remedy);
                }
            }
        }
    }
}

fn boot(host: &HostFacts, report: &mut Report) {
    match &host.at_boot {
        None => report.unchecked("what starts at boot", "there is no systemd here"),
        Some(Err(why)) => report.unchecked("what starts at boot", why.clone()),
        Some(Ok(state)) => {
            report.checked("what starts at boot");
            let started = matches!(state.as_str(), "enabled" | "enabled-runtime" | "static" | "indirect" | "alias");
            if state.is_empty() {
                report.unchecked(
                    format!("{UNIT} at boot"),
                    "systemd knows no such unit; whatever starts the daemon must do so at boot",
                );
            } else if !started {
                let text = format!("{UNIT} is {state}: after a reboot this node takes no part");
                report.find(Level::Warning, "unit.boot", text, format!("systemctl enable {UNIT}"));
            }
        }
    }
}

fn clock(host: &HostFacts, report: &mut Report) {
    let Some(source) = &host.clock_source else {
        return report.unchecked("the clock source", "the kernel does not tell it");
    };
    report.checked(format!("the clock source ({source})"));
    if POOR_SOURCES.contains(&source.as_str()) {
        let text = format!("the kernel counts time by {source}, which is slow to read and may lose time under load");
        let remedy = "see /sys/devices/system/clocksource/clocksource0/available_clocksource; in a guest use the \
                      hypervisor's clock (kvm-clock, hyperv_clocksource_tsc_page)";
        report.find(Level::Advice, "clock.source", text, remedy);
    }
}

/// What keeps names longer than their TTL on this machine.
pub(super) fn caches(config: &Config, host: &HostFacts, report: &mut Report) {
    let Some(dns) = &config.dns else { return };
    let ttl = dns.ttl.as_secs();
    match host.resolver_ttl {
        Some(kept) => {
            report.checked("this machine's resolver, and caches of names");
            if u64::from(kept) > ttl {
                let text = format!(
                    "this machine's resolver keeps {} for {kept} s, the record's TTL is {ttl} s",
                    config.service.name
                );
                let remedy = "look for a smallest TTL in the resolvers of /etc/resolv.conf (unbound: cache-min-ttl; \
                              dnsmasq: min-cache-ttl) and take it out";
                report.find(Level::Warning, "cache.resolver", text, remedy);
            }
        }
        None => report.unchecked("this machine's resolver", "it gives no answer for the service name"),
    }
    if host.caches.nscd {
        let text = "nscd keeps host names for longer than their TTL: programs here find the new node late";
        report.find(Level::Advice, "cache.host", text, "in /etc/nscd.conf, then restart nscd:\nenable-cache hosts no");
    }
    for (file, value) in &host.caches.java {
        let seconds = value.parse::<i64>().unwrap_or(-1);
        if !(0..=JAVA_TTL).contains(&seconds) {
            let text =
                format!("Java here keeps addresses of names for {value} s (-1: for ever), see {}", file.display());
            report.find(Level::Advice, "cache.host", text, format!("there:\nnetworkaddress.cache.ttl={ttl}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::parse(&Config::example(), Path::new("example")).expect("the example parses")
    }

    fn good() -> HostFacts {
        let net = "192.0.2.100/24".parse().expect("a net");
        HostFacts {
            clock_source: Some("tsc".into()),
            resolver_ttl: Some(5),
            daemon: Some(ProcessFacts { net_admin: true, net_raw: true, descriptors: Some(524_288) }),
            may_ask: true,
            at_boot: Some(Ok("enabled".into())),
            vips: vec![VipFacts {
                net,
                interface: Ok("eth0".into()),
                up: true,
                own_address: Some("192.0.2.11".parse().expect("an address")),
                witnesses: Ok(vec![("192.0.2.1".parse().expect("an address"), true)]),
            }],
            ..HostFacts::default()
        }
    }

    fn judged(config: &Config, host: &HostFacts) -> Vec<(Level, String)> {
        let mut report = Report::default();
        process(config, host, &mut report);
        vips(config, &config.nodes[0], host, &mut report);
        boot(host, &mut report);
        clock(host, &mut report);
        caches(config, host, &mut report);
        assert!(report.findings.iter().all(|finding| !finding.remedy.is_empty()));
        report.findings.into_iter().map(|finding| (finding.level, finding.check)).collect()
    }

    #[test]
    fn each_fault_of_the_machine_is_found_alone() {
        let mut config = config();
        config.fence.kernel_gate = true;
        assert_eq!(judged(&config, &good()), []);
        type Break = fn(&mut HostFacts);
        let rows: [(Level, &str, Break); 12] = [
            (Level::Critical, "daemon.rights", |h| h.daemon.as_mut().expect("there").net_admin = false),
            (Level::Warning, "daemon.descriptors", |h| h.daemon.as_mut().expect("there").descriptors = Some(1024)),
            (Level::Critical, "vip.interface", |h| h.vips[0].interface = Err("no interface eth7".into())),
            (Level::Critical, "vip.link", |h| h.vips[0].up = false),
            (Level::Warning, "vip.subnet", |h| h.vips[0].own_address = None),
            (Level::Advice, "vip.witness", |h| h.vips[0].witnesses = Err("eth0 has no gateway to ask".into())),
            (Level::Warning, "vip.arp", |h| {
                h.vips[0].witnesses.as_mut().expect("there")[0].1 = false;
            }),
            (Level::Warning, "unit.boot", |h| h.at_boot = Some(Ok("disabled".into()))),
            (Level::Advice, "clock.source", |h| h.clock_source = Some("jiffies".into())),
            (Level::Warning, "cache.resolver", |h| h.resolver_ttl = Some(60)),
            (Level::Advice, "cache.host", |h| h.caches.nscd = true),
            (Level::Advice, "cache.host", |h| h.caches.java.push(("/x".into(), "-1".into()))),
        ];
        for (level, check, break_it) in rows {
            let mut host = good();
            break_it(&mut host);
            assert_eq!(judged(&config, &host), [(level, check.to_owned())], "{check}");
        }
    }

    #[test]
    fn without_dns_the_link_is_the_only_witness() {
        let config = Config { dns: None, ..config() };
        let mut host = good();
        host.vips[0].witnesses = Err("eth0 has no gateway to ask for the VIP; set vip.witness".into());
        assert_eq!(judged(&config, &host), [(Level::Critical, "vip.witness".to_owned())]);
        host.vips[0].witnesses = Ok(vec![("192.0.2.1".parse().expect("an address"), false)]);
        assert_eq!(judged(&config, &host), [(Level::Critical, "vip.arp".to_owned())]);
    }
}
