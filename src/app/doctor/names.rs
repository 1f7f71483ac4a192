//! The witness and the way to it, and the caches between it and clients: reachability by UDP and TCP, authority, the
//! key and its rights, time to live, clocks.
//!
//! The right to update is proven by an update that must fail (`gather`). Servers differ in what they look at first: a
//! wrong key is NOTAUTH with BADKEY, BADSIG or BADTIME everywhere; a key without rights is REFUSED at BIND, Knot,
//! PowerDNS and `portcullis witness`; a key with rights gets to the prerequisite, and so NXRRSET or YXRRSET.

use super::gather::{Facts, Server};
use super::{Level, Report};
use crate::base::config::{Config, DnsMode};
use crate::wire::dns::UpdateOutcome;
use std::net::IpAddr;

/// Clocks that synchronise are nearer than this; it is also the tolerance of the pause detector.
const NEAR_SECONDS: u64 = 2;
/// Half of TSIG's fudge of 300 s: beyond that each answer counts as silence.
const FAR_SECONDS: u64 = 150;

pub(super) fn check(config: &Config, facts: &Facts, report: &mut Report) {
    witness(config, facts, report);
    // The lines to copy, with this service's own words.
    let key = config.dns.as_ref().and_then(|dns| dns.tsig.as_ref()).map_or("KEY", |tsig| tsig.name.as_str());
    for finding in report.findings.iter_mut().filter(|finding| finding.check == "dns.update") {
        finding.remedy = finding.remedy.replace("KEY", key).replace("SERVICE", &config.service.name);
    }
    super::host::caches(config, &facts.host, report);
}

fn witness(config: &Config, facts: &Facts, report: &mut Report) {
    let Some(dns) = &config.dns else {
        let text = "there is no [dns]: without a third voter, taking over from a silent node needs a person's word or \
                    fence.stonith";
        report.find(
            Level::Advice,
            "dns.none",
            text,
            "add a DNS server that takes signed updates and stands with neither",
        );
        return;
    };
    for server in &facts.server_on_node {
        let text = format!("the witness {server} stands on one of the nodes: when that dies, it is silent as well");
        let remedy = "use a DNS server that stands with neither node (portcullis witness runs on any third machine)";
        report.find(Level::Warning, "dns.on-node", text, remedy);
    }
    match &facts.servers {
        Ok(servers) => {
            servers.iter().for_each(|server| answered(server, dns.mode, dns.ttl.as_secs(), report));
            agree(servers, report);
        }
        Err(why) => {
            report.find(Level::Critical, "dns.config", why.clone(), "correct [dns]; portcullis check-config proves it");
            report.unchecked("the witness", "it could not be asked");
        }
    }
}

fn answered(server: &Server, mode: DnsMode, ttl: u64, report: &mut Report) {
    let address = server.address;
    report.checked(format!("the witness {address}"));
    let reading = match &server.answer {
        Ok(reading) => reading,
        Err(why) => {
            let (check, remedy) = silence(why);
            report.find(Level::Critical, check, why.clone(), remedy);
            report.unchecked("the right to update, and the clock's difference", "the witness gave no answer");
            return;
        }
    };
    if let Some(what) = &reading.strange {
        report.find(
            Level::Critical,
            "dns.strange",
            format!("{address}: {what}"),
            "put A and AAAA records at the name itself",
        );
    }
    match &server.head {
        Ok(_) => report.checked(format!("the witness {address} by TCP, and its authority for the zone")),
        Err(why) => {
            let remedy = "let TCP port 53 pass to it; name the zone's own servers in dns.servers, and dns.zone as \
                          it is there";
            report.find(Level::Critical, "dns.tcp", why.clone(), remedy);
        }
    }
    if !reading.pair.addresses.is_empty() && u64::from(reading.pair.ttl) > ttl {
        let text = format!("the record's TTL is {} s, dns.ttl {ttl} s: clients stay away longer", reading.pair.ttl);
        report.find(Level::Advice, "dns.ttl", text, "the next promote writes dns.ttl; until then set it in the zone");
    }
    match reading.signed_time {
        Some(theirs) => clock(address, theirs, server.asked_at, report),
        None if mode == DnsMode::Update => {
            report.unchecked("the clock's difference to the witness", "its answers are not signed");
        }
        None => {}
    }
    match &server.update {
        None => {}
        Some(UpdateOutcome::Conflict) => {
            report.checked("the right to update the record (an update that had to fail, failed as it had to)");
        }
        Some(UpdateOutcome::Refused(why)) => {
            report.find(Level::Critical, "dns.update", format!("{address} refuses updates: {why}"), rights(why));
        }
        Some(UpdateOutcome::Done) => {
            let text =
                format!("{address} carried an update out whose prerequisite does not hold: no race can be decided");
            report.find(
                Level::Critical,
                "dns.unsafe",
                text,
                "use a server that keeps to RFC 2136 section 2.4: BIND, Knot, PowerDNS",
            );
        }
        Some(UpdateOutcome::NotSent(why) | UpdateOutcome::Unknown(why)) => {
            let text = format!("whether {address} takes updates is unknown: {why}");
            let remedy = match why.contains("SERVFAIL") {
                true => "its zone may be frozen (BIND: rndc thaw ZONE) or its files not writable; see the server's log",
                false => "let TCP port 53 pass to it, and run doctor again",
            };
            report.find(Level::Warning, "dns.unknown", text, remedy);
        }
    }
}

fn clock(address: std::net::SocketAddr, theirs: u64, ours: i64, report: &mut Report) {
    report.checked("the clock's difference to the witness");
    let theirs = i64::try_from(theirs).unwrap_or(i64::MAX);
    let off = theirs.abs_diff(ours);
    if off <= NEAR_SECONDS {
        return;
    }
    let level = if off > FAR_SECONDS { Level::Critical } else { Level::Warning };
    let way = if theirs > ours { "behind" } else { "ahead of" };
    let text = format!("this machine's clock is {off} s {way} that of {address}; at 300 s its answers stop counting");
    report.find(level, "clock.witness", text, "synchronise both clocks: timedatectl set-ntp true");
}

/// Which check a server that gives no answer that counts belongs to, and what helps.
fn silence(why: &str) -> (&'static str, &'static str) {
    let has = |words: &[&str]| words.iter().any(|word| why.to_ascii_lowercase().contains(word));
    if has(&["badtime", "clock"]) {
        return ("dns.key", "synchronise both clocks: timedatectl set-ntp true");
    }
    if has(&["badkey", "badsig", "signature", "signed", "tsig"]) {
        let remedy = "compare dns.tsig_name, dns.tsig_algorithm and the secret in dns.tsig_key_file with the \
                      server's:\n\
                      BIND: key \"NAME\" { algorithm hmac-sha256; secret \"...\"; };\n\
                      Knot: key: - id: NAME / algorithm: hmac-sha256 / secret: ...";
        return ("dns.key", remedy);
    }
    if has(&["no authority"]) {
        return ("dns.silent", "name the zone's own servers in dns.servers, no resolver and no balancer");
    }
    if has(&["refused the question", "answered refused"]) {
        return ("dns.silent", "let this node ask it (BIND: allow-query), and compare the TSIG key");
    }
    ("dns.silent", "let UDP and TCP port 53 pass to it; see that the server runs, and answers on that address")
}

/// What helps where an update is refused.
fn rights(why: &str) -> String {
    if why.contains("BADTIME") {
        return "synchronise both clocks: timedatectl set-ntp true".to_owned();
    }
    if ["TSIG key", "BADSIG"].iter().any(|word| why.contains(word)) && !why.contains("REFUSED") {
        return "compare dns.tsig_name, dns.tsig_algorithm and the secret in dns.tsig_key_file with the server's"
            .to_owned();
    }
    if why.contains("NOTAUTH") {
        return "put the zone's primary first in dns.servers".to_owned();
    }
    "let the TSIG key of dns.tsig_name change the service name and the marker (_portcullis. before it) there:\n\
     BIND, in the zone: update-policy { grant KEY name SERVICE A AAAA; grant KEY name _portcullis.SERVICE TXT; };\n\
     Knot: acl: - id: portcullis / key: KEY / action: update, and acl: portcullis in the zone"
        .to_owned()
}

/// Servers that lag show clients of theirs another node.
fn agree(servers: &[Server], report: &mut Report) {
    let shown = |server: &Server| -> Option<Vec<IpAddr>> { Some(server.answer.as_ref().ok()?.pair.addresses.clone()) };
    let Some((first, wanted)) = servers.first().and_then(|server| Some((server.address, shown(server)?))) else {
        return;
    };
    let words = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    for (server, addresses) in servers.iter().skip(1).filter_map(|server| Some((server.address, shown(server)?))) {
        if addresses != wanted {
            let text = format!("{server} shows {} where {first} shows {}", words(&addresses), words(&wanted));
            let remedy = "let the primary notify it (BIND: also-notify; Knot: notify), and look at its transfer log";
            report.find(Level::Warning, "dns.disagree", text, remedy);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::wire::dns::{Reading, RecordPair, ZoneHead};

    pub(crate) fn server(update: UpdateOutcome, signed_time: Option<u64>) -> Server {
        let pair = RecordPair::written(&["192.0.2.11".parse().expect("an address")], 5, "v=1");
        let reading = Reading { pair, signed_time, ..Reading::default() };
        let address = ([192, 0, 2, 53], 53).into();
        let head = Ok(ZoneHead { primary: "ns.example.org".into(), serial: 7 });
        Server { address, answer: Ok(reading), head, asked_at: 1_000_000, update: Some(update) }
    }

    fn found(server: &Server) -> Vec<Level> {
        let mut report = Report::default();
        answered(server, DnsMode::Update, 5, &mut report);
        report.findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn the_right_to_update_is_proven_by_a_conflict_alone() {
        let found = |update| found(&server(update, Some(1_000_000)));
        assert_eq!(found(UpdateOutcome::Conflict), []);
        assert_eq!(found(UpdateOutcome::Refused("BADKEY".into())), [Level::Critical]);
        assert_eq!(found(UpdateOutcome::Done), [Level::Critical]);
        assert_eq!(found(UpdateOutcome::Unknown("silence".into())), [Level::Warning]);
    }

    #[test]
    fn a_clock_that_strays_is_found_before_tsig_gives_up() {
        let found = |theirs| found(&server(UpdateOutcome::Conflict, Some(theirs)));
        assert_eq!(found(1_000_002), []);
        assert_eq!(found(999_990), [Level::Warning]);
        assert_eq!(found(1_000_200), [Level::Critical]);
    }

    #[test]
    fn a_silent_witness_is_critical_and_says_what_was_not_checked() {
        let mut silent = server(UpdateOutcome::Conflict, None);
        silent.answer = Err("did not answer".into());
        let mut report = Report::default();
        answered(&silent, DnsMode::Update, 5, &mut report);
        assert_eq!((report.findings.len(), report.unchecked.len()), (1, 1));
    }

    #[test]
    fn what_servers_answer_is_interpreted() {
        for (why, check, words) in [
            (
                "1.2.3.4:53 gives no answer that counts: it refused the question for x: NOTAUTH (BadKey)",
                "dns.key",
                "tsig_name",
            ),
            ("x gives no answer that counts: its answer does not count, for it is not signed", "dns.key", "tsig_name"),
            ("x: it refused the question for y: NOTAUTH (BadTime)", "dns.key", "clocks"),
            ("x did not answer within 3s", "dns.silent", "port 53"),
            ("x: it is no authority for db.example.org", "dns.silent", "no resolver"),
        ] {
            let (found, remedy) = silence(why);
            assert!(found == check && remedy.contains(words), "{why}: {found} {remedy}");
        }
        assert!(
            rights("the server refused the update (REFUSED); allow TSIG key k to update").contains("update-policy")
        );
        assert!(rights("the server does not know the TSIG key k").contains("tsig_key_file"));
        assert!(rights("the server is not the primary of zone z (NOTAUTH)").contains("first in dns.servers"));
    }

    #[test]
    fn tcp_authority_and_servers_that_lag_are_found() {
        let mut mute = server(UpdateOutcome::Conflict, Some(1_000_000));
        mute.head = Err("did not answer by TCP".into());
        assert_eq!(found(&mute), [Level::Critical]);
        let one = server(UpdateOutcome::Conflict, Some(1_000_000));
        let mut other = server(UpdateOutcome::Conflict, Some(1_000_000));
        other.answer.as_mut().expect("answers").pair =
            RecordPair::written(&["192.0.2.12".parse().expect("ip")], 5, "v=1");
        let mut report = Report::default();
        agree(&[one, other], &mut report);
        assert!(matches!(&report.findings[..], [finding] if finding.check == "dns.disagree"));
    }
}
